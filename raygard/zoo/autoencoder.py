"""The autoencoder of `tiny_sd`: trained on crops, latents normalised, decoder polished on line art."""

from __future__ import annotations

import argparse
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from raygard.zoo.architecture import LATENT_SCALE, build_vae, read_pixels, read_rows


def save_atomically(state: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


class Clock:
    """Time spent training, over all restarts; `progress` drives the learning rate."""

    def __init__(self, args: argparse.Namespace, minutes: float, spent: float) -> None:
        self.seconds, self.steps, self.spent, self.since = minutes * 60, args.steps, spent, time.monotonic()

    def elapsed(self) -> float:
        return self.spent + time.monotonic() - self.since

    def progress(self, step: int) -> float:
        return min(1.0, step / self.steps if self.steps else self.elapsed() / self.seconds)


def learning_rate(peak: float, step: int, progress: float, warmup: int = 200) -> float:
    return peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


class Autocast(torch.autocast):
    def __init__(self, device: torch.device, enabled: bool) -> None:
        super().__init__(device.type, dtype=torch.bfloat16, enabled=enabled)


def crops(pixels: Tensor, batch: int, side: int = 32) -> Tensor:
    """Random crops, flipped and recoloured: the autoencoder must not depend on the palette of a style."""
    picked = torch.randint(len(pixels), (batch,))
    tops, lefts = torch.randint(0, 64 - side + 1, (2, batch))
    out = torch.stack(
        [
            pixels[i, :, y : y + side, x : x + side]
            for i, y, x in zip(picked.tolist(), tops.tolist(), lefts.tolist(), strict=True)
        ]
    )
    if random.random() < 0.5:
        out = out.flip(3)
    if random.random() < 0.4:
        out = out[:, torch.randperm(3)]
    if random.random() < 0.15:
        out = -out
    return out


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def losses(restored: Tensor, x: Tensor, posterior: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Error of the pixels, error of their gradients, and divergence of the latents from a standard normal."""
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    across, down = ((a - b).abs().mean() for a, b in zip(gradients(restored), gradients(x), strict=True))
    divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return (restored - x).abs().mean() + F.mse_loss(restored, x), across + down, divergence


def train_vae(args: argparse.Namespace, device: torch.device) -> None:
    path, pixels = args.work / "vae.pt", read_pixels(args.data, read_rows(args.data)).to(device)
    vae = build_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1.5e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    step, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=device)
        if state["done"]:
            return
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    clock, saved, mean_loss = Clock(args, args.vae_minutes, spent), time.monotonic(), 0.0
    while (progress := clock.progress(step)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(1.5e-3, step, progress)
        x = crops(pixels, args.vae_batch)
        with Autocast(device, args.bf16):
            posterior = vae.encode(x).latent_dist
            restored = vae.decode(posterior.sample()).sample.float()
        pixel, edges, divergence = losses(restored, x, posterior)
        loss = pixel + 0.5 * edges + args.kl_weight * divergence
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        mean_loss += 0.02 * (float(pixel.detach()) - mean_loss)
        if step % 200 == 0:
            print(
                f"vae step {step} spent {clock.elapsed():.0f}s pixel {mean_loss:.4f} kl "
                f"{float(divergence.detach()):.2f}",
                flush=True,
            )
        if time.monotonic() - saved > args.save_every * 60 or clock.progress(step) >= 1:
            save_atomically(
                {
                    "model": vae.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "spent": clock.elapsed(),
                    "done": clock.progress(step) >= 1,
                },
                path,
            )
            saved = time.monotonic()
            reconstruction_sheet(vae, pixels, args.work / "vae_sheet.png")


@torch.no_grad()
def reconstruction_sheet(vae: AutoencoderKL, pixels: Tensor, path: Path, count: int = 20) -> float:
    picked = pixels[:: max(1, len(pixels) // count)][:count]
    restored = vae.decode(vae.encode(picked).latent_dist.mode()).sample.clamp(-1, 1)
    save_grid(torch.cat([picked, restored]), path, count)
    return float((picked - restored).abs().mean() / 2)


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    bytes_ = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rows = math.ceil(len(bytes_) / columns)
    sheet = Image.new("RGB", (columns * 66, rows * 66), "#888888")
    for index, picture in enumerate(bytes_):
        sheet.paste(Image.fromarray(picture), (index % columns * 66 + 1, index // columns * 66 + 1))
    sheet.save(path, optimize=True)


@torch.no_grad()
def fold_latent_statistics(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Give every latent channel mean 0 and deviation 1 / LATENT_SCALE, through the 1x1 convolutions alone."""
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pixels.split(64)])
    shift = latents.mean((0, 2, 3))
    gain = 1 / (LATENT_SCALE * latents.std((0, 2, 3)))
    encode, decode = vae.quant_conv, vae.post_quant_conv
    decode.bias += decode.weight[:, :, 0, 0] @ shift
    decode.weight /= gain[None, :, None, None]
    encode.bias[:4] = (encode.bias[:4] - shift) * gain
    encode.weight[:4] *= gain[:, None, None, None]
    encode.bias[4:] += 2 * gain.log()


def finished_vae(args: argparse.Namespace, device: torch.device) -> AutoencoderKL:
    folder = args.work / "vae"
    if (args.work / "vae_polished" / "config.json").exists():
        folder = args.work / "vae_polished"
    if not (folder / "config.json").exists():
        vae = build_vae().to(device)
        vae.load_state_dict(torch.load(args.work / "vae.pt", weights_only=True, map_location=device)["model"])
        pixels = read_pixels(args.data, read_rows(args.data)).to(device)
        fold_latent_statistics(vae, pixels)
        error = reconstruction_sheet(vae, pixels, args.work / "vae_sheet.png", 100)
        print(f"vae finished: mean absolute error {error:.4f} of the full range", flush=True)
        vae.save_pretrained(folder)
    return AutoencoderKL.from_pretrained(folder).to(device).eval().requires_grad_(False)


def line_art(x: Tensor) -> Tensor:
    """Black contours on the picture, contours alone, or a black and white picture, at random per batch."""
    grey = x.mean(1, keepdim=True)
    width = random.choice((3, 3, 5))
    contrast = F.max_pool2d(grey, width, 1, width // 2) + F.max_pool2d(-grey, width, 1, width // 2)
    contours = (contrast > random.uniform(0.25, 0.6)).float()
    kind = random.random()
    if kind < 0.5:
        return x * (1 - contours) - contours
    if kind < 0.7:
        return (1 - 2 * contours).expand_as(x)
    return ((grey > random.uniform(-0.3, 0.8)).float() * 2 - 1).expand_as(x)


def polish_decoder(args: argparse.Namespace, device: torch.device) -> None:
    """Teach the decoder line art made from the training pictures; the encoder, and so every latent, stays."""
    path, pixels = args.work / "decoder.pt", read_pixels(args.data, read_rows(args.data)).to(device)
    vae = finished_vae(args, device)
    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    step, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=device)
        if state["done"]:
            return
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    clock, saved, mean_loss = Clock(args, args.line_minutes, spent), time.monotonic(), 0.0
    while (progress := clock.progress(step)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(1e-3, step, progress)
        x = crops(pixels, args.vae_batch)
        if random.random() < 0.5:
            x = line_art(x)
        with Autocast(device, args.bf16):
            with torch.no_grad():
                latents = vae.encode(x).latent_dist.sample()
            restored = vae.decode(latents).sample.float()
        edges = sum((a - b).abs().mean() for a, b in zip(gradients(restored), gradients(x), strict=True))
        loss = (restored - x).abs().mean() + F.mse_loss(restored, x) + 0.5 * edges
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step += 1
        mean_loss += 0.02 * (float(loss.detach()) - mean_loss)
        if step % 200 == 0:
            print(f"decoder step {step} spent {clock.elapsed():.0f}s loss {mean_loss:.4f}", flush=True)
        done = clock.progress(step) >= 1
        if time.monotonic() - saved > args.save_every * 60 or done:
            state = {"model": vae.state_dict(), "optimizer": optimizer.state_dict()}
            save_atomically({**state, "step": step, "spent": clock.elapsed(), "done": done}, path)
            saved = time.monotonic()
    vae.save_pretrained(args.work / "vae_polished")


@torch.no_grad()
def cache_latents(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    parts = [vae.encode(part).latent_dist for part in pixels.split(64)]
    return (
        torch.cat([p.mean for p in parts]) * LATENT_SCALE,
        torch.cat([p.std for p in parts]) * LATENT_SCALE,
    )
