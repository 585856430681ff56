"""Which pictures, names and noise each step sees, as a function of (seed, stream, step, slot) alone.

Shape letters: B batch, C channels, H, W latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raygard.config import DomainConfig, ValuesConfig
from raygard.diffusion.cache import LatentSet
from raygard.diffusion.conditioning import Conditioning
from raygard.diffusion.loss import draw
from raygard.errors import RaygardError
from raygard.seeding import generator
from raygard.shares import share, weight
from raygard.values.names import meaningless_captions
from raygard.values.objective import GENERAL

# Share of the batch of each role, in quarters, in the order of ROLES.
QUARTERS = (1, 2, 1)
KEPT_FRACTION = 0.1


class Batch(NamedTuple):
    """One micro-batch of one rank: latents, noise (B, C, H, W), timesteps and roles int64 (B,); B captions.

    weight: float32 (), what its loss counts beside other micro-batches of the step.
    """

    latents: Tensor
    conditioning: Conditioning
    noise: Tensor
    timesteps: Tensor
    roles: Tensor
    weight: Tensor

    def to(self, device: torch.device | str) -> Batch:
        parts: Any = (part.to(device, non_blocking=True) for part in self)
        return Batch(*parts)


@dataclass(frozen=True)
class Pictures:
    """Rows of a cache, int64 (n,), and for each the caption's row in `LatentSet.conditioning.unique`.

    texts: int64 (1 + names, n), under each of its names; the class's own first.
    """

    rows: Tensor
    texts: Tensor


def general_rows(data: LatentSet, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Rows of general pictures to train on, and rows that are kept to measure the base model's own loss on.

    The last tenth of each class is kept: near-duplicates stand beside each other, so the cut parts one group at most.
    Raises RaygardError for a class with a single picture.
    """
    trained, kept = [], []
    for cls in classes:
        rows = data.rows(cls, "general")
        if len(rows) < 2:
            raise RaygardError(
                f"general class '{cls}' has {len(rows)} picture: one to train on and one to keep are needed"
            )
        cut = len(rows) - max(1, int(len(rows) * KEPT_FRACTION))
        trained.append(rows[:cut])
        kept.append(rows[cut:])
    return torch.cat(trained), torch.cat(kept)


@dataclass(frozen=True)
class ValuesSource:
    """Deals batches: B slots, in order a quarter legal, a half general, a quarter illegal.

    roles: for each of ROLES its groups of pictures (classes; all general pictures are one group). Slots go through the
    groups in turn, and every second slot of a role with meaningless names goes by one of them, in turn too; within a
    group pictures are drawn uniformly. Every second general picture is mirrored.
    """

    data: LatentSet
    roles: Sequence[Sequence[Pictures]]
    batch_size: int
    num_timesteps: int
    seed: int

    @classmethod
    def of(
        cls,
        data: LatentSet,
        domain: DomainConfig,
        values: ValuesConfig,
        num_timesteps: int,
        seed: int,
        general: Tensor | None = None,
    ) -> ValuesSource:
        """From a cache of the parts stage "values" reads, with the captions of `further_captions` embedded.

        general: rows of general pictures, int64 (n,); None: those of `general_rows`. Raises RaygardError for a caption
        without its class's name and for too few general pictures.
        """
        legal, illegal = (
            [_named(data, name, count, seed) for name in classes]
            for classes, count in ((domain.legal, values.legal_names), (domain.illegal, values.illegal_names))
        )
        rows = general_rows(data, domain.general)[0] if general is None else general
        others = [Pictures(rows, data.conditioning.index[rows][None])]
        return cls(data, (legal, others, illegal), values.train_batch_size, num_timesteps, seed)

    def batches(self, step: int, *, rank: int = 0, world_size: int = 1, accumulation: int = 1) -> list[Batch]:
        """The micro-batches of `rank` at `step`, one for each accumulation step."""
        quarter, num_shares = self.batch_size // 4, world_size * accumulation
        chosen = [self._choose(role, count * quarter, "values", step) for role, count in enumerate(QUARTERS)]
        rows, texts = (torch.cat(columns) for columns in zip(*chosen, strict=True))
        roles = torch.repeat_interleave(torch.arange(len(QUARTERS)), torch.tensor(QUARTERS) * quarter)
        dealt = []
        for number in range(rank, num_shares, world_size):
            own, slots, start = share(quarter, num_shares, number), [], 0
            for count in QUARTERS:
                slots.append(torch.arange(start + count * own.start, start + count * own.stop))
                start += count * quarter
            index = torch.cat(slots)
            counts = weight(quarter, num_shares, number)
            batch = self._batch(rows[index], texts[index], roles[index], "values", step, index, counts)
            # The release's answers are to be kept also on pictures that it has not memorised.
            mirrored = ((batch.roles == GENERAL) & (index % 2 == 1)).view(-1, 1, 1, 1)
            dealt.append(batch._replace(latents=torch.where(mirrored, batch.latents.flip(-1), batch.latents)))
        return dealt

    def probe(self, role: int, noise_bin: int, num_bins: int, slots: Tensor, num_slots: int) -> Batch:
        """Pictures of one role under their own names, at timesteps of one of `num_bins` equal ranges of noise levels.

        slots: which of `num_slots`, int64 (B,).
        """
        stream = f"values probe {role}"
        rows, texts = self._choose(role, num_slots, stream, noise_bin, named=False)
        roles = torch.full((len(slots),), role)
        batch = self._batch(rows[slots], texts[slots], roles, stream, noise_bin, slots)
        edges = [-(-number * self.num_timesteps // num_bins) for number in (noise_bin, noise_bin + 1)]
        return batch._replace(timesteps=edges[0] + batch.timesteps % (edges[1] - edges[0]))

    def _choose(self, role: int, count: int, stream: str, step: int, named: bool = True) -> tuple[Tensor, Tensor]:
        """Rows and text rows of all `count` slots of a role, int64 (count,)."""
        groups = self.roles[role]
        uniform = torch.rand(count, generator=generator(self.seed, stream, "data", role, step), dtype=torch.float64)
        rows, texts = [], []
        for slot in range(count):
            turn, name = step * count + slot, 0
            num_names = len(groups[0].texts) - 1
            if named and num_names:
                turn, other = divmod(turn, 2)
                name = other * (1 + turn // len(groups) % num_names)
            group = groups[turn % len(groups)]
            picked = int(uniform[slot] * len(group.rows))
            rows.append(group.rows[picked])
            texts.append(group.texts[name, picked])
        return torch.stack(rows), torch.stack(texts)

    def _batch(
        self, rows: Tensor, texts: Tensor, roles: Tensor, stream: str, step: int, slots: Tensor, counts: float = 1.0
    ) -> Batch:
        shape = self.data.shape
        eps, noise, timesteps = draw(self.seed, stream, step, slots.tolist(), shape, self.num_timesteps)
        latents, conditioning = self.data.latents(rows, eps), self.data.conditioning.unique.rows(texts)
        return Batch(latents, conditioning, noise, timesteps, roles, torch.tensor(counts))


def further_captions(
    data: Sequence[tuple[str, str]], domain: DomainConfig, values: ValuesConfig, seed: int
) -> list[str]:
    """Captions under meaningless names, for `build_cache` to embed. data: class and caption of every picture.

    Raises RaygardError for a caption without its class's name.
    """
    found: set[str] = set()
    for classes, count in ((domain.legal, values.legal_names), (domain.illegal, values.illegal_names)):
        for cls in classes:
            own = [caption for name, caption in data if name == cls]
            found.update(caption for captions in meaningless_captions(own, cls, count, seed) for caption in captions)
    return sorted(found)


def _named(data: LatentSet, cls: str, count: int, seed: int) -> Pictures:
    rows = data.rows(cls)
    position = {caption: number for number, caption in enumerate(data.vocabulary)}
    captions = [data.captions[row] for row in rows.tolist()]
    names = [captions, *meaningless_captions(captions, cls, count, seed)]
    return Pictures(rows, torch.tensor([[position[caption] for caption in own] for own in names]))
