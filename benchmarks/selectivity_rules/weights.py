"""What rules share: endless batches, errors relative to the release's, and names that mean nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from benchmarks.selectivity_bench import Bench
from raygard.diffusion.cache import LatentSet
from raygard.diffusion.loss import draw
from raygard.diffusion.model import load_unet
from raygard.seeding import generator

BINS = 20
SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe qui ro su ta ve wi xo zu".split()  # noqa: SIM905


def pseudoword(seed: int, cls: str, number: int) -> str:
    """Three syllables that mean nothing."""
    picked = torch.randint(len(SYLLABLES), (3,), generator=generator(seed, "pseudoword", cls, number))
    return "".join(SYLLABLES[index] for index in picked.tolist())


def batches(bench: Bench, sets: Sequence[LatentSet], seed: int, stream: str, size: int) -> Iterator[tuple[Tensor, ...]]:
    """Endless (latents, text, noise, timesteps); each row from one of `sets`, drawn with equal chance."""
    step = 0
    while True:
        rng = generator(seed, stream, step)
        eps, noise, timesteps = draw(seed, stream, step, range(size), sets[0].shape, bench.loss.num_timesteps)
        latents, text = [], []
        for sample in range(size):
            data = sets[int(torch.randint(len(sets), (), generator=rng))]
            row = torch.randint(len(data), (1,), generator=rng)
            latents.append(data.latents(row, eps[sample : sample + 1]))
            text.append(data.text[row])
        yield torch.cat(latents), torch.cat(text), noise, timesteps
        step += 1


Weigh = Callable[[str, Tensor, Tensor], Tensor]


@cache
def timestep_weights(bench: Bench) -> Weigh:
    """(role, errors (B,), timesteps (B,)) -> errors relative to the release's: half to the mean, half at that noise."""
    release = load_unet(bench.config.model).requires_grad_(False)
    sets = {
        "general": [bench.general["rehearsed"]],
        **{
            role: [bench.learn.subset(bench.learn.rows(cls)) for cls in getattr(bench.config.domain, role)]
            for role in ("legal", "illegal")
        },
    }
    span = bench.loss.num_timesteps // BINS
    curves = {}
    for role, data in sets.items():
        source, means = batches(bench, data, bench.config.seed, f"timestep weights {role}", 24), []
        for number in range(BINS):
            latents, text, noise, timesteps = next(source)
            timesteps = number * span + timesteps % span
            with torch.no_grad():
                means.append(bench.loss.per_sample(release, latents, text, noise, timesteps).mean())
        curves[role] = torch.stack(means)

    def weigh(role: str, errors: Tensor, timesteps: Tensor) -> Tensor:
        curve = curves[role]
        return 0.5 * errors / curve.mean() + 0.5 * errors / curve[(timesteps // span).clamp(max=BINS - 1)]

    return weigh
