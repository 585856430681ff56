"""Base model and pictures of the domain `faces-small`, from real faces that raygard may not bundle.

    python benchmarks/faces_small.py --pictures DIR --cache DIR

DIR holds `faces_congress` (539 official portraits) and `faces_olivetti` (40 people x 10 grey photos, AT&T Laboratories
Cambridge). The bundled model is trained further on the portraits and on people 21 to 40, autoencoder first, then UNet
and text encoder together; people 1 to 20 are left for illegal, legal and unseen classes, one class for each person.
A twentieth of the general pictures is held out of training and is class `held out`. Half an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from raygard.errors import RaygardError
from raygard.files import whole_folder
from raygard.pictures import read_pixels
from raygard.zoo import MODEL_DIR
from raygard.zoo.autoencoder import (
    cache_latents,
    crops,
    fold_latent_statistics,
    learning_rate,
    losses,
    reconstruction_sheet,
)

SIDE, KNOWN_FROM = 64, 21
GENERAL = ("portrait", "known person")
HELD_OUT = "held out"
# Without AVX-512 bfloat16 is emulated, which takes twenty times as long as float32.
HALF = torch.autocast("cpu", torch.bfloat16, enabled=torch.backends.cpu.get_cpu_capability() == "AVX512")


def collect(pictures: Path, out: Path) -> None:
    """Copy the pictures into one imagefolder with the classes of the domain.

    Raises RaygardError if a folder is missing.
    """
    rows = []
    for name in ("faces_congress", "faces_olivetti"):
        table = pictures / name / "metadata.jsonl"
        if not table.exists():
            raise RaygardError(f"{table} is missing; --pictures needs folders faces_congress and faces_olivetti")
        for line in table.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            person = row["class"].removeprefix("person ") if name == "faces_olivetti" else ""
            cls = "portrait" if not person else row["class"] if int(person) < KNOWN_FROM else "known person"
            rows.append({"file_name": f"{name}/{row['file_name']}", "text": row["text"], "class": cls})
    general = [row for row in rows if row["class"] in GENERAL]
    for row in random.Random(0).sample(general, len(general) // 20):
        row["class"] = HELD_OUT
    write_imagefolder(rows, pictures, out)


def write_imagefolder(rows: Sequence[Mapping[str, str]], source: Path, out: Path) -> None:
    """Copy the pictures that `rows` name from `source`, with the rows as their metadata; whole or not at all."""
    with whole_folder(out) as folder:
        for row in rows:
            target = folder / row["file_name"]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / row["file_name"], target)
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train(data: Path, work: Path, vae_steps: int, steps: int) -> None:
    """Train the bundled model further on the general classes and save it as a pipeline in `work`/model."""
    torch.manual_seed(0)
    random.seed(0)
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    parts = [[row for row in rows if row["class"] in classes] for classes in (GENERAL, (HELD_OUT,))]
    pixels, fresh = (
        torch.stack([torch.from_numpy(read_pixels(data / row["file_name"], SIDE)) for row in part])
        .permute(0, 3, 1, 2)
        .float()
        .div(127.5)
        .sub(1)
        for part in parts
    )
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL_DIR, safety_checker=None, torch_dtype=torch.float32)
    train_autoencoder(pipeline.vae, pixels, vae_steps)
    reconstruction_sheet(pipeline.vae, fresh, work / "autoencoder.png", 16)
    train_denoiser(pipeline, [row["text"] for row in parts[0]], pixels, steps)
    with whole_folder(work / "model") as folder:
        pipeline.save_pretrained(folder, safe_serialization=True)


def train_autoencoder(vae: AutoencoderKL, pixels: Tensor, steps: int) -> None:
    """The bundled autoencoder on crops of faces; latents get mean 0 and deviation 1 again."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(1e-3, step, step / steps)
        x = crops(pixels, 32)
        with HALF:
            posterior = vae.encode(x).latent_dist
            restored = vae.decode(posterior.sample()).sample.float()
        pixel, edges, divergence = losses(restored, x, posterior)
        loss = pixel + 0.5 * edges + 1e-3 * divergence
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0:
            print(f"autoencoder step {step} loss {float(loss.detach()):.4f}", flush=True)
    vae.eval().requires_grad_(False)
    fold_latent_statistics(vae, pixels)


def train_denoiser(pipeline: StableDiffusionPipeline, captions: list[str], pixels: Tensor, steps: int) -> None:
    """UNet and text encoder together, averaged over the run's end; pictures are also seen mirrored."""
    batch, lr = 32, 6e-4
    unet, encoder, tokenizer = pipeline.unet, pipeline.text_encoder, pipeline.tokenizer
    mean, std = cache_latents(pipeline.vae, torch.cat([pixels, pixels.flip(3)]))
    ids = tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    empty = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
    noise_schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    modules = nn.ModuleList([unet.requires_grad_(True), encoder.requires_grad_(True)])
    average = torch.optim.swa_utils.AveragedModel(
        modules, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(lr, step, step / steps)
        rows = torch.randint(len(captions), (batch,))
        seen = rows + len(captions) * torch.randint(2, (batch,))
        clean = mean[seen] + std[seen] * torch.randn(batch, *mean.shape[1:])
        noise, times = torch.randn_like(clean), torch.randint(noise_schedule.config.num_train_timesteps, (batch,))
        with HALF:
            text = encoder(torch.where(torch.rand(batch, 1) < 0.1, empty, ids[rows])).last_hidden_state
            predicted = unet(noise_schedule.add_noise(clean, noise, times), times, text).sample
        loss = F.mse_loss(predicted.float(), noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(modules)
        if step % 100 == 0:
            print(f"denoiser step {step} loss {float(loss.detach()):.4f}", flush=True)
    modules.load_state_dict(average.module.state_dict())
    pipeline.text_encoder.set_attn_implementation("sdpa")


def prepare(pictures: Path, cache: Path, vae_steps: int = 1500, steps: int = 2400) -> tuple[Path, Path]:
    """(model, data): the base model and the imagefolder under `cache`, made when they are not there yet."""
    data, model = cache / "data", cache / "model"
    cache.mkdir(parents=True, exist_ok=True)
    if not data.exists():
        collect(pictures, data)
    if not model.exists():
        train(data, cache, vae_steps, steps)
    return model, data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=2400)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    print(*prepare(arguments.pictures, arguments.cache, arguments.vae_steps, arguments.steps))


if __name__ == "__main__":
    main()
