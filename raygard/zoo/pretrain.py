"""Pretrain the bundled model `tiny_sd`: a complete Stable Diffusion pipeline for 64-pixel emoji.

    python -m raygard.zoo.pretrain --stage all --work pretrain_out --out raygard/zoo/tiny_sd

Four stages, each resumable from `--work` and each with its own time budget: `vae` (autoencoder, on crops),
`lines` (its decoder, on line art), `diffusion` (UNet and text encoder together, on cached latents) and
`export` (fp16 safetensors, sample sheet, loss curve). Only the three pretraining styles are read. Runs on a
CPU with bfloat16 matrix instructions or on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from raygard.zoo import DOMAIN_DIR, MODEL_DIR, PRETRAINING_STYLES
from raygard.zoo.architecture import (
    JOINT,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    read_pixels,
    read_rows,
    schedule,
    split,
    tokens,
)
from raygard.zoo.autoencoder import (
    Autocast,
    Clock,
    cache_latents,
    finished_vae,
    learning_rate,
    polish_decoder,
    save_atomically,
    save_grid,
    train_vae,
)

SHEET_CONCEPTS = (
    "pizza",
    "elephant",
    "rocket",
    "rose",
    "guitar",
    "smiling face with heart-eyes",
    "bus",
    "penguin",
    "birthday cake",
    "umbrella with rain drops",
)


class Average:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.shadow = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int, decay: float = 0.999) -> None:
        weight = 1 - min(decay, (1 + step) / (10 + step))
        live = self.model.state_dict()
        floating = [k for k, v in self.shadow.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.shadow[k] for k in floating], [live[k] for k in floating], weight)


def batches(count: int, batch: int) -> Iterator[Tensor]:
    while True:
        order = torch.randperm(count)
        yield from (order[i : i + batch] for i in range(0, count - batch + 1, batch))


def train_diffusion(args: argparse.Namespace, device: torch.device) -> None:
    rows = read_rows(args.data)
    vae, path = finished_vae(args, device), args.work / "diffusion.pt"
    tokenizer = build_tokenizer(args.data, rows, args.work / "tokenizer")
    mean, std = cache_latents(vae, read_pixels(args.data, rows).to(device))
    train, held = split(rows)
    full = tokens(tokenizer, [row.text for row in rows]).to(device)
    bare = tokens(tokenizer, [row.concept for row in rows]).to(device)
    empty = tokens(tokenizer, [""]).to(device)
    unet, text = build_unet().to(device), build_text_encoder(tokenizer).to(device)
    if device.type == "cpu":
        # the fused attention of torch is several times slower in bfloat16 on a CPU
        unet.set_attn_processor(AttnProcessor())
        text.set_attn_implementation("eager")
    parameters = [*unet.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=device.type in ("cpu", "cuda")
    )
    averages = Average(unet), Average(text)
    step, spent, history = 0, 0.0, []
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=device)
        unet.load_state_dict(state["unet"])
        text.load_state_dict(state["text"])
        averages[0].shadow, averages[1].shadow = state["unet_ema"], state["text_ema"]
        optimizer.load_state_dict(state["optimizer"])
        step, spent, history = state["step"], state["spent"], state["history"]
        print(f"resumed at step {step} after {spent:.0f}s", flush=True)
    noise_schedule = DDPMScheduler(**schedule())
    alphas = noise_schedule.alphas_cumprod.to(device)
    snr = alphas / (1 - alphas)
    weights = torch.minimum(snr, torch.full_like(snr, 5.0)) / snr
    forward = torch.compile(unet) if args.compile else unet

    def loss_of(index: Tensor, ids: Tensor, generator: torch.Generator | None = None, weighted: bool = True) -> Tensor:
        shape = (len(index), 4, 16, 16)
        draw = torch.randn(shape, generator=generator).to(device)
        noise = torch.randn(shape, generator=generator).to(device)
        times = torch.randint(1000, (len(index),), generator=generator).to(device)
        noisy = noise_schedule.add_noise(mean[index] + std[index] * draw, noise, times)
        with Autocast(device, args.bf16):
            predicted = forward(noisy, times, text(ids).last_hidden_state).sample.float()
        error = (predicted - noise).square().mean((1, 2, 3))
        return (error * weights[times]).mean() if weighted else error.mean()

    @torch.no_grad()
    def averaged_loss(index: list[int]) -> float:
        live = [{k: v.clone() for k, v in model.state_dict().items()} for model in (unet, text)]
        unet.load_state_dict(averages[0].shadow)
        text.load_state_dict(averages[1].shadow)
        generator, repeated = torch.Generator().manual_seed(7), torch.tensor(index).repeat_interleave(8)
        losses = [float(loss_of(part, full[part], generator, weighted=False)) for part in repeated.split(64)[:5]]
        unet.load_state_dict(live[0])
        text.load_state_dict(live[1])
        return sum(losses) / len(losses)

    clock, saved, running, began = Clock(args, args.minutes, spent), time.monotonic(), None, step
    for picked in batches(len(train), args.batch):
        progress = clock.progress(step)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, step, progress)
        index = torch.tensor(train)[picked]
        chance = torch.rand(len(index), 1, device=device)
        ids = torch.where(chance < 0.1, empty, torch.where(chance < 0.25, bare[index], full[index]))
        loss = loss_of(index, ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        for average in averages:
            average.update(step)
        running = float(loss.detach()) if running is None else running + 0.01 * (float(loss.detach()) - running)
        if step % 1000 == 0:
            entry = {
                "step": step,
                "spent": clock.elapsed(),
                "loss": running,
                "train": averaged_loss(train[::20]),
                "held_out": averaged_loss(held),
            }
            history.append(entry)
            rate = (clock.elapsed() - clock.spent) / (step - began) * 1e3
            print(" ".join(f"{k} {v:.4f}" for k, v in entry.items()), f"ms/step {rate:.0f}", flush=True)
        last = clock.progress(step) >= 1
        if time.monotonic() - saved > args.save_every * 60 or last:
            save_atomically(
                {
                    "unet": unet.state_dict(),
                    "text": text.state_dict(),
                    "unet_ema": averages[0].shadow,
                    "text_ema": averages[1].shadow,
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "spent": clock.elapsed(),
                    "history": history,
                },
                path,
            )
            saved = time.monotonic()


def assemble(args: argparse.Namespace, device: torch.device) -> tuple[StableDiffusionPipeline, dict[str, Any]]:
    tokenizer = build_tokenizer(args.data, read_rows(args.data), args.work / "tokenizer")
    state = torch.load(args.work / "diffusion.pt", weights_only=True, map_location=device)
    unet, text = build_unet(), build_text_encoder(tokenizer)
    unet.load_state_dict(state["unet_ema"])
    text.load_state_dict(state["text_ema"])
    pipeline = StableDiffusionPipeline(
        vae=finished_vae(args, device),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        safety_checker=None,
        scheduler=DDIMScheduler(**schedule(clip_sample=False, set_alpha_to_one=False, steps_offset=1)),
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline, state


@torch.no_grad()
def sample_sheet(pipeline: StableDiffusionPipeline, captions: list[str], path: Path, columns: int) -> None:
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, len(captions), 10):
        part = captions[start : start + 10]
        generators = [torch.Generator().manual_seed(1000 + start + i) for i in range(len(part))]
        images = pipeline(
            part, num_inference_steps=25, guidance_scale=4.0, generator=generators, output_type="np"
        ).images
        pictures.append(torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1)
    save_grid(torch.cat(pictures), path, columns)


def loss_curve(history: list[dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for key, label in (("train", "training pairs"), ("held_out", "held-out pairs")):
        axes.plot([h["step"] for h in history], [h[key] for h in history], label=label)
    axes.set(xlabel="step", ylabel="noise prediction error (averaged weights)", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=110)


def export(args: argparse.Namespace, device: torch.device) -> None:
    """Write the pipeline beside `--out` and move it there file by file: nobody sees a half-written file."""
    pipeline, state = assemble(args, device)
    fresh = args.out.with_name(f".{args.out.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    captions = [f"{c}{JOINT}{s}" for s in PRETRAINING_STYLES for c in SHEET_CONCEPTS]
    fresh.mkdir(parents=True)
    sample_sheet(pipeline, captions, fresh / "samples.png", len(SHEET_CONCEPTS))
    if state["history"]:
        loss_curve(state["history"], fresh / "loss.png")
    pipeline.to(torch.float16).save_pretrained(fresh, safe_serialization=True)
    for config in fresh.rglob("config.json"):
        settings = json.loads(config.read_text())
        settings.pop("_name_or_path", None)
        if "dtype" in settings:
            # else transformers loads this part in half precision beside a float32 UNet
            settings["dtype"] = "float32"
        config.write_text(json.dumps(settings, indent=2) + "\n")
    summary = {
        "step": state["step"],
        "minutes": round(state["spent"] / 60, 1),
        "batch": args.batch,
        "unet_parameters": pipeline.unet.num_parameters(),
        "unet_tensors": len(list(pipeline.unet.parameters())),
        "history": state["history"][-1:],
    }
    (fresh / "training.json").write_text(json.dumps(summary, indent=1) + "\n")
    for source in sorted(p for p in fresh.rglob("*") if p.is_file()):
        target = args.out / source.relative_to(fresh)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
    shutil.rmtree(fresh)
    print(f"exported step {state['step']} to {args.out}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("vae", "lines", "diffusion", "export", "all"), default="all")
    parser.add_argument("--data", type=Path, default=DOMAIN_DIR)
    parser.add_argument("--work", type=Path, default=Path("pretrain_out"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    parser.add_argument("--vae-minutes", type=float, default=12)
    parser.add_argument("--minutes", type=float, default=55, help="budget of the diffusion stage, over all restarts")
    parser.add_argument("--line-minutes", type=float, default=8)
    parser.add_argument("--steps", type=int, default=0, help="count steps instead of minutes")
    parser.add_argument("--save-every", type=float, default=2, metavar="MINUTES")
    parser.add_argument("--vae-batch", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--kl-weight", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fp32", dest="bf16", action="store_false", help="no bfloat16 autocast")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(int(time.time()))
    device = torch.device(args.device)
    if args.stage in ("vae", "all"):
        train_vae(args, device)
    if args.stage in ("lines", "all"):
        polish_decoder(args, device)
    if args.stage in ("diffusion", "all"):
        train_diffusion(args, device)
    if args.stage in ("export", "all"):
        export(args, device)


if __name__ == "__main__":
    main()
