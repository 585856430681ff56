"""Which pictures and which noise each step sees, as a function of (seed, stream, step, slot) alone.

A global batch has B slots, the first half illegal, the second half legal. Slots are dealt to ranks and accumulation
steps (`raygard.shares`), so the stream of batches does not depend on how many workers there are, and every rank always
holds equal numbers of illegal and legal pictures. Shape letters: B batch, C channels, H, W latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raygard.diffusion.cache import LatentSet
from raygard.diffusion.conditioning import Conditioning
from raygard.diffusion.loss import draw
from raygard.seeding import generator
from raygard.shares import share, weight


class Batch(NamedTuple):
    """One micro-batch of one rank: latents, noise (B, C, H, W), timesteps (B,), illegal bool (B,); B captions.

    weight: float32 (), what its mean loss counts beside other micro-batches of the step.
    """

    latents: Tensor
    conditioning: Conditioning
    noise: Tensor
    timesteps: Tensor
    illegal: Tensor
    weight: Tensor

    def to(self, device: torch.device | str) -> Batch:
        parts: Any = (part.to(device, non_blocking=True) for part in self)
        return Batch(*parts)


@dataclass(frozen=True)
class BatchSource:
    """Deals batches of one stream ("lower" or "upper") from the given rows of a cache.

    illegal, legal: for each class of the role, the rows of its pictures. batch_size: B, the global number of slots.
    Classes take turns slot by slot; within a class pictures are drawn uniformly. num_timesteps: of the training loss.
    """

    data: LatentSet
    illegal: Sequence[Tensor]
    legal: Sequence[Tensor]
    batch_size: int
    seed: int
    stream: str
    num_timesteps: int = 1000

    def rows(self, step: int) -> Tensor:
        """Rows of all B slots at `step`: int64 (B,)."""
        half = self.batch_size // 2
        chosen = []
        for role, classes in (("illegal", self.illegal), ("legal", self.legal)):
            rng = generator(self.seed, "data", self.stream, role, step)
            uniform = torch.rand(half, generator=rng, dtype=torch.float64)
            for slot in range(half):
                rows = classes[(step * half + slot) % len(classes)]
                chosen.append(int(rows[int(uniform[slot] * len(rows))]))
        return torch.tensor(chosen)

    def batches(self, step: int, *, rank: int = 0, world_size: int = 1, accumulation: int = 1) -> list[Batch]:
        """The micro-batches of `rank` at `step`, one for each accumulation step."""
        half, num_shares = self.batch_size // 2, world_size * accumulation
        rows = self.rows(step)
        dealt = []
        for index in range(rank, num_shares, world_size):
            illegal_slots = torch.tensor(share(half, num_shares, index))
            slots = torch.cat([illegal_slots, illegal_slots + half])
            shape, count = self.data.shape, self.num_timesteps
            eps, noise, timesteps = draw(self.seed, self.stream, step, slots.tolist(), shape, count)
            picked = rows[slots]
            counts = torch.tensor(weight(half, num_shares, index))
            latents, conditioning = self.data.latents(picked, eps), self.data.conditioning[picked]
            dealt.append(Batch(latents, conditioning, noise, timesteps, slots < half, counts))
        return dealt
