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

from raygard.bilevel.segments import Segment

LARGE = 1 << 15
# Below this a reduction by segments beats a dot product for each tensor; above it the dot product is vectorised.
TINY = 1 << 10
# A float32 dot product adds up at most this many elements before its result goes to float64.
CHUNK = 1 << 18


@dataclass(frozen=True)
class Run:
    """Neighbouring segments [start, stop) of a shard; one segment if it is large, else several."""

    start: int
    stop: int
    tensors: Tensor
    lengths: Tensor


class SegmentOps:
    """Operations on one shard whose segments belong to tensors 0..N-1."""

    def __init__(self, segments: Sequence[Segment], num_tensors: int, num_elements: int, device: torch.device) -> None:
        self.num_tensors = num_tensors
        self.segments = tuple(segments)
        self.runs = [_run(group, device) for group in _group(segments, LARGE)]
        self._dots = [_run(group, device) for group in _group(segments, TINY)]
        inside = torch.zeros(num_elements, dtype=torch.bool)
        for s in segments:
            inside[s.shard_start : s.shard_start + s.length] = True
        self.padding = (~inside).nonzero().flatten().to(device)
        self._factors: dict[str, list[float | Tensor]] = {}

    def set_factor(self, name: str, values: Tensor) -> None:
        """Prepare one factor for each tensor (float64 (N,), CPU) for later use by `add_scaled`."""
        prepared: list[float | Tensor] = []
        scalars = values.tolist()
        for run in self.runs:
            if len(run.tensors) == 1:
                prepared.append(scalars[int(run.tensors[0])])
            else:
                factors = values[run.tensors].float().to(run.lengths.device)
                prepared.append(torch.repeat_interleave(factors, run.lengths))
        self._factors[name] = prepared

    def add_scaled(self, target: Tensor, source: Tensor, name: str, scale: float = 1.0) -> None:
        """target += scale * factor[tensor] * source, elementwise by segment; padding is not touched."""
        for run, factor in zip(self.runs, self._factors[name], strict=True):
            out, values = target[run.start : run.stop], source[run.start : run.stop]
            if isinstance(factor, float):
                out.add_(values, alpha=scale * factor)
            else:
                out.addcmul_(values, factor, value=scale)

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        """s_i = sum over my elements of tensor i of left * right: float64 (N,) on the shard's device (Eq 12)."""
        sums = torch.zeros(self.num_tensors, dtype=torch.float64, device=left.device)
        large, large_sums = [], []
        for run in self._dots:
            a, b = left[run.start : run.stop], right[run.start : run.stop]
            if len(run.tensors) == 1:
                dots = [torch.dot(x, y) for x, y in zip(a.split(CHUNK), b.split(CHUNK), strict=True)]
                large.append(int(run.tensors[0]))
                large_sums.append(dots[0].double() if len(dots) == 1 else torch.stack(dots).double().sum())
            else:
                products = torch.mul(a.double(), b)
                sums[run.tensors.to(sums.device)] += torch.segment_reduce(products, "sum", lengths=run.lengths)
        if large:
            sums[torch.tensor(large, device=sums.device)] += torch.stack(large_sums)
        return sums

    def zero_padding(self, shard: Tensor) -> None:
        if len(self.padding):
            shard[self.padding] = 0


def _group(segments: Sequence[Segment], limit: int) -> list[list[Segment]]:
    """Neighbours shorter than `limit` together, every other segment alone."""
    groups: list[list[Segment]] = []
    for segment in segments:
        last = groups[-1][-1] if groups else None
        joins = (
            last is not None
            and segment.length < limit
            and last.length < limit
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
    return Run(group[0].shard_start, group[-1].shard_start + group[-1].length, tensors, lengths)
