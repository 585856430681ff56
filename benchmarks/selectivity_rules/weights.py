"""What rules share: endless batches, and the release's errors that others count relative to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.selectivity_bench import Bench
from raygard.diffusion.cache import LatentSet
from raygard.diffusion.conditioning import joined
from raygard.diffusion.loss import draw
from raygard.diffusion.model import load_denoiser
from raygard.seeding import generator
from raygard.values import NUM_BINS, ROLES


def batches(bench: Bench, sets: Sequence[LatentSet], seed: int, stream: str, size: int) -> Iterator[tuple[Any, ...]]:
    """Endless (latents, conditioning, noise, timesteps); each row from one of `sets`, drawn with equal chance."""
    step = 0
    while True:
        rng = generator(seed, stream, step)
        eps, noise, timesteps = draw(seed, stream, step, range(size), sets[0].shape, bench.loss.num_timesteps)
        latents, conditioning = [], []
        for sample in range(size):
            data = sets[int(torch.randint(len(sets), (), generator=rng))]
            row = torch.randint(len(data), (1,), generator=rng)
            latents.append(data.latents(row, eps[sample : sample + 1]))
            conditioning.append(data.conditioning[row])
        yield torch.cat(latents), joined(conditioning), noise, timesteps
        step += 1


@cache
def release_curves(bench: Bench) -> Tensor:
    """The release's mean error on what a rule learns from, by role (in the order of ROLES) and noise bin: (R, N)."""
    release = load_denoiser(bench.config.model).requires_grad_(False)
    sets = {
        "general": [bench.general["rehearsed"]],
        **{
            role: [bench.learn.subset(bench.learn.rows(cls)) for cls in getattr(bench.config.domain, role)]
            for role in ("legal", "illegal")
        },
    }
    span = bench.loss.num_timesteps // NUM_BINS
    curves = []
    for role in ROLES:
        source, means = batches(bench, sets[role], bench.config.seed, f"timestep weights {role}", 24), []
        for number in range(NUM_BINS):
            latents, conditioning, noise, timesteps = next(source)
            timesteps = number * span + timesteps % span
            with torch.no_grad():
                means.append(bench.loss.per_sample(release, latents, conditioning, noise, timesteps).mean())
        curves.append(torch.stack(means))
    return torch.stack(curves)
