"""Which elements of my shards belong to which parameter tensor.

A *shard* is one flat float32 tensor the optimizer updates on this rank. One process (or ZeRO stage 0) holds N
shards that are whole tensors; ZeRO-1/2 holds one slice of the concatenated model; ZeRO-3 holds one concatenation
of a part of every tensor. Padding belongs to no segment: under ZeRO-3 it is uninitialised memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """`length` elements of tensor `tensor`, from `tensor_start` in it, lying at `shard_start` in the shard."""

    tensor: int
    tensor_start: int
    shard_start: int
    length: int


@dataclass(frozen=True)
class ShardLayout:
    """Segments of every shard of this rank.

    names: the N tensor names. sizes: their numbers of elements. shards: one tuple of segments for each shard, in
    shard order. replicated: every rank holds everything, so inner products need no reduction.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    shards: tuple[tuple[Segment, ...], ...]
    replicated: bool

    @classmethod
    def dense(cls, named_sizes: Mapping[str, int]) -> ShardLayout:
        """One shard for each whole tensor (one process, or ZeRO stage 0)."""
        shards = tuple((Segment(i, 0, 0, size),) for i, size in enumerate(named_sizes.values()))
        return cls(tuple(named_sizes), tuple(named_sizes.values()), shards, replicated=True)

    @classmethod
    def flat_slice(
        cls,
        named_sizes: Mapping[str, int],
        offsets: Sequence[int],
        start: int,
        length: int,
        replicated: bool = False,
    ) -> ShardLayout:
        """Elements [start, start + length) of a flat buffer in which tensor i begins at offsets[i] (ZeRO-1/2)."""
        segments = []
        for index, (offset, size) in enumerate(zip(offsets, named_sizes.values(), strict=True)):
            first, last = max(offset, start), min(offset + size, start + length)
            if first < last:
                segments.append(Segment(index, first - offset, first - start, last - first))
        segments.sort(key=lambda segment: segment.shard_start)
        return cls(tuple(named_sizes), tuple(named_sizes.values()), (tuple(segments),), replicated)

    @classmethod
    def partitioned(cls, named_sizes: Mapping[str, int], parts: Sequence[int], rank: int) -> ShardLayout:
        """Part `rank` of every tensor, each `parts[i]` elements long including padding (ZeRO-3)."""
        segments, position = [], 0
        for index, (size, part) in enumerate(zip(named_sizes.values(), parts, strict=True)):
            start = rank * part
            if start < size:
                segments.append(Segment(index, start, position, min(part, size - start)))
            position += part
        return cls(tuple(named_sizes), tuple(named_sizes.values()), (tuple(segments),), replicated=False)

    @property
    def num_tensors(self) -> int:
        return len(self.names)

    def scatter(self, state: Mapping[str, Tensor], shards: Sequence[Tensor]) -> None:
        """Copy full tensors into my shards, converting to the shards' dtype; padding is left alone."""
        for segments, shard in zip(self.shards, shards, strict=True):
            flat = shard.detach().view(-1)
            for s in segments:
                source = state[self.names[s.tensor]].reshape(-1)[s.tensor_start : s.tensor_start + s.length]
                flat[s.shard_start : s.shard_start + s.length].copy_(source)

    def pieces(self, shards: Sequence[Tensor], copy: bool = True) -> dict[str, tuple[int, Tensor]]:
        """Return `{name: (tensor_start, values)}` of what this rank holds, on the CPU.

        copy: False gives views of shards that lie there.
        """
        found = {}
        for segments, shard in zip(self.shards, shards, strict=True):
            flat = shard.detach().view(-1)
            for s in segments:
                values = flat[s.shard_start : s.shard_start + s.length]
                found[self.names[s.tensor]] = (s.tensor_start, values.to("cpu", copy=copy))
        return found


def assemble(
    parts: Sequence[Mapping[str, tuple[int, Tensor]]], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Join the `pieces` of all ranks into full tensors.

    Overlapping pieces (replicated layouts) must be equal. Raises ValueError if any element is missing.
    """
    full: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        pieces = [part[name] for part in parts if name in part]
        size = int(torch.Size(shape).numel())
        flat = torch.empty(size, dtype=pieces[0][1].dtype if pieces else torch.float32)
        covered = torch.zeros(size, dtype=torch.bool)
        for start, values in pieces:
            flat[start : start + len(values)] = values
            covered[start : start + len(values)] = True
        if not covered.all():
            raise ValueError(f"no rank holds all of tensor '{name}'")
        full[name] = flat.view(tuple(shape))
    return full
