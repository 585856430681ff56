"""Per-tensor arithmetic on flat shards without a Python loop over small tensors.

Real denoisers have hundreds of tiny tensors between a few huge ones (SD 2.1: 398 of 686 tensors hold 0.04 % of the
parameters). A run of small neighbours becomes one operation with a factor for each element; a large tensor is one
fused multiply-add with a scalar. Nothing of the model's size is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raygard.bilevel.halves import Halves
from raygard.bilevel.segments import Segment

# From here on one operation for a tensor costs less than a factor for each of its elements.
LARGE = 1 << 11
# A float32 dot product adds up at most this many elements before its result goes to float64. A GPU adds in a tree, and
# starting one product for each 2^18 elements of a large model would take longer than the products.
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}
# What is kept in another form, or in main memory, is brought over in pieces of so many elements; a CPU's stay in its
# cache.
PIECE = {"cpu": 1 << 16, "cuda": 1 << 24}


@dataclass(frozen=True)
class Run:
    """Neighbouring segments [start, stop) of a shard: one large segment (`tensor`), or several (`tensor` None)."""

    start: int
    stop: int
    tensor: int | None
    tensors: Tensor
    lengths: Tensor


class SegmentOps:
    """Operations on one shard whose segments belong to tensors 0..N-1."""

    def __init__(self, segments: Sequence[Segment], num_tensors: int, num_elements: int, device: torch.device) -> None:
        self.num_tensors = num_tensors
        self.device = device
        self.runs = [_run(group, device) for group in _group(segments)]
        small = [run.tensors for run in self.runs if run.tensor is None]
        self._small = torch.cat(small).to(device) if small else torch.empty(0, dtype=torch.int64)
        inside = torch.zeros(num_elements, dtype=torch.bool)
        for s in segments:
            inside[s.shard_start : s.shard_start + s.length] = True
        self.padding = (~inside).nonzero().flatten().to(device)
        self._factors: dict[str, list[float | Tensor]] = {}

    def set_mask(self, soft: Tensor) -> None:
        """Prepare the factors of a soft mask m, float64 (N,) on the CPU: m, 1 - m, (1 - m)^2, m - m_before."""
        before = self._factors.get("soft")
        scalars = soft.tolist()
        prepared: list[float | Tensor] = []
        for run in self.runs:
            if run.tensor is not None:
                prepared.append(scalars[run.tensor])
            else:
                values = soft[run.tensors].float().to(run.lengths.device)
                prepared.append(torch.repeat_interleave(values, run.lengths))
        self._factors = {
            "soft": prepared,
            "keep": [1 - m for m in prepared],
            "keep2": [(1 - m) ** 2 for m in prepared],
            "change": [now - then for now, then in zip(prepared, before or prepared, strict=True)],
        }

    def add_scaled(
        self,
        target: Tensor | Halves,
        source: Tensor,
        name: str,
        scale: float = 1.0,
        rng: torch.Generator | None = None,
    ) -> None:
        """target += scale * factor[tensor] * source, elementwise by segment; padding is not touched.

        Both may be bfloat16 or lie in main memory: sums are made in float32 on the shard's device. rng: of that
        device, needed where target is bfloat16, which is rounded at random (`round_at_random`).
        """
        whole = self._is_plain(target) and self._is_plain(source)
        for run, factor in zip(self.runs, self._factors[name], strict=True):
            # Runs that have a factor for each element are short.
            step = run.stop - run.start if whole or isinstance(factor, Tensor) else PIECE[self.device.type]
            for start in range(run.start, run.stop, step):
                stop = min(start + step, run.stop)
                kept, values = target[start:stop], self._fetch(source[start:stop])
                out = self._fetch(kept)
                if isinstance(factor, Tensor):
                    out.addcmul_(values, factor, value=scale)
                else:
                    out.add_(values, alpha=scale * factor)
                if isinstance(kept, Halves):
                    kept.set(out)
                    continue
                if kept.dtype == torch.bfloat16:
                    assert rng is not None
                    out = round_at_random(out, rng)
                if out is not kept:
                    kept.copy_(out, non_blocking=True)

    def _is_plain(self, values: Tensor | Halves) -> bool:
        return isinstance(values, Tensor) and values.dtype == torch.float32 and values.device == self.device

    def _fetch(self, part: Tensor | Halves) -> Tensor:
        if isinstance(part, Halves):
            return part.value()
        # In two steps: in one, torch converts in main memory and sends float32 from a copy that is not pinned.
        return part.to(self.device, non_blocking=True).float()

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        """s_i = sum over my elements of tensor i of left * right: float64 (N,) on the shard's device (Eq 12).

        left: float32 on that device. right: as in `add_scaled`.
        """
        sums = torch.zeros(self.num_tensors, dtype=torch.float64, device=left.device)
        chunk = (CHUNK if self._is_plain(right) else PIECE)[left.device.type]
        large: list[int] = []
        dots: list[Tensor] = []
        small: list[Tensor] = []
        for run in self.runs:
            a, b = left[run.start : run.stop], right[run.start : run.stop]
            if run.tensor is None:
                small.append(torch.segment_reduce(a.double().mul_(self._fetch(b)), "sum", lengths=run.lengths))
                continue
            for start in range(0, len(a), chunk):
                large.append(run.tensor)
                dots.append(torch.dot(a[start : start + chunk], self._fetch(b[start : start + chunk])))
        if small:
            sums.index_add_(0, self._small, torch.cat(small))
        if large:
            sums.index_add_(0, torch.tensor(large, device=sums.device), torch.stack(dots).double())
        return sums

    def zero_padding(self, shard: Tensor) -> None:
        if len(self.padding):
            shard[self.padding] = 0


def round_at_random(values: Tensor, rng: torch.Generator) -> Tensor:
    """bfloat16 of finite float32 values, which are overwritten: up or down with a chance that makes the mean exact.

    Rounding to the nearest would lose every step smaller than half of the distance between neighbours (Gupta et al.
    2015, stochastic rounding).
    """
    # One random word is enough for four elements.
    words = torch.empty(-(-values.numel() // 4), dtype=torch.int64, device=values.device)
    noise = words.random_(-(2**63), None, generator=rng).view(torch.int16)[: values.numel()].to(torch.int32)
    bits = values.view(torch.int32)
    bits.add_(noise.bitwise_and_((1 << 16) - 1).view(values.shape)).bitwise_and_(-(1 << 16))
    return values.to(torch.bfloat16)


def _group(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Neighbours shorter than LARGE together, every other segment alone."""
    groups: list[list[Segment]] = []
    for segment in segments:
        last = groups[-1][-1] if groups else None
        joins = (
            last is not None
            and segment.length < LARGE
            and last.length < LARGE
            and last.shard_start + last.length == segment.shard_start
        )
        if joins:
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return groups


def _run(group: Sequence[Segment], device: torch.device) -> Run:
    tensors = torch.tensor([s.tensor for s in group])
    lengths = torch.tensor([s.length for s in group], device=device)
    alone = group[0].tensor if len(group) == 1 else None
    return Run(group[0].shard_start, group[-1].shard_start + group[-1].length, alone, tensors, lengths)
