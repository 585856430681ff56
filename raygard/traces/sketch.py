"""Keyed sketches of weight updates: what is kept of a fine-tuning, small and of no use without the key.

The update of a tensor, scaled to norm 1, is hashed into `width` numbers with signs (count sketch: Charikar, Chen and
Farach-Colton, ICALP 2002; its dot products are those of the updates, up to a deviation of 1 / sqrt(width)). Places and
signs come from a secret, so who does not have it cannot tell which directions are looked at. Tensors of no more than
`width` elements only have their signs changed and their elements shuffled, which keeps dot products as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raygard.errors import RaygardError

WIDTH = 2048
# Elements hashed at a time: 32 MiB of random bits.
CHUNK = 2**22
# A move below this share of a tensor's norm is rounding, of which no direction can be told.
ROUNDING = 1e-7


@dataclass(frozen=True)
class Update:
    """Sketches float32 (width,) of the tensors that a fine-tuning moved, by name, each of an update of norm 1."""

    tensors: Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Sketcher:
    """secret: at least 16 bytes that nobody else has. width: numbers kept of each tensor, a power of two."""

    secret: bytes = field(repr=False)
    width: int = WIDTH

    def __post_init__(self) -> None:
        if self.width < 1 or self.width & (self.width - 1) or len(self.secret) < 16:
            raise ValueError("a sketch needs a width that is a power of two and a secret of 16 bytes or more")

    def update(self, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> Update:
        """Sketch of tuned - base. base: the release; higher precision than `tuned` is rounded to it first.

        Raises RaygardError for a tensor of `base` that `tuned` lacks or has in another shape, or that is not finite.
        """
        found: dict[str, NDArray[np.float32]] = {}
        for name, released in base.items():
            if name not in tuned:
                raise RaygardError(f"the model has no tensor '{name}': it is not a fine-tuning of this release")
            other = tuned[name]
            if other.shape != released.shape or not other.is_floating_point():
                raise RaygardError(
                    f"tensor '{name}' is {other.dtype} of shape {tuple(other.shape)} in the model, in the release "
                    f"{released.dtype} of shape {tuple(released.shape)}"
                )
            start = released.detach().cpu().to(other.dtype).float()
            moved = other.detach().cpu().float() - start
            found |= self.moves({name: moved}, at_least=ROUNDING * float(torch.linalg.vector_norm(start))).tensors
        return Update(found)

    def moves(self, moved: Mapping[str, Tensor], at_least: float = 0.0) -> Update:
        """Sketch of what is added to tensors, by their names; what is of no larger norm than `at_least` is left out.

        Raises RaygardError for one that is not finite.
        """
        found = {}
        for name, move in moved.items():
            norm = float(torch.linalg.vector_norm(move.float()))
            if not np.isfinite(norm):
                raise RaygardError(f"tensor '{name}' is not finite in the model")
            if norm > at_least:
                found[name] = self._tensor(name, move.detach().cpu().float().flatten() / norm)
        return Update(found)

    def _tensor(self, name: str, values: Tensor) -> NDArray[np.float32]:
        flat: NDArray[np.float32] = values.numpy()
        out = np.zeros(self.width)
        if len(flat) <= self.width:
            bits = next(self._bits(name, self.width))
            out[np.argsort(bits, kind="stable")[: len(flat)]] = np.where(bits[: len(flat)] & 1, flat, -flat)
            return out.astype(np.float32)
        start = 0
        for bits in self._bits(name, len(flat)):
            part = flat[start : start + len(bits)]
            places = ((bits >> np.uint64(1)) & np.uint64(self.width - 1)).astype(np.int64)
            out += np.bincount(places, np.where(bits & 1, part, -part), minlength=self.width)
            start += len(bits)
        return out.astype(np.float32)

    def _bits(self, name: str, count: int) -> Iterator[NDArray[np.uint64]]:
        # numpy promises that a bit generator's raw stream stays what it is, which torch does not of its generators.
        digest = hashlib.sha256(self.secret + name.encode()).digest()
        stream = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8"))
        for start in range(0, count, CHUNK):
            yield np.asarray(stream.random_raw(min(CHUNK, count - start)), dtype=np.uint64)
