"""Did anyone move a frozen tensor? Bit-for-bit comparison of a fine-tuned model with its base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from raygard.errors import RaygardError


@dataclass(frozen=True)
class MovedTensor:
    """A frozen tensor whose bits differ: how many elements, and the largest absolute difference (NaN if one
    of the two is NaN)."""

    name: str
    num_elements: int
    max_abs_difference: float


@dataclass(frozen=True)
class MovedReport:
    """Which frozen tensors were moved, of how many; `moved` is empty if the mask was kept."""

    num_frozen: int
    moved: tuple[MovedTensor, ...]

    @property
    def ok(self) -> bool:
        return not self.moved

    def to_json(self) -> dict[str, object]:
        """JSON-able values; a difference that is not finite is None, for which JSON has no number."""
        found = asdict(self)
        for moved in found["moved"]:
            if not math.isfinite(moved["max_abs_difference"]):
                moved["max_abs_difference"] = None
        return {"ok": self.ok, **found}


@dataclass(frozen=True)
class AuditReport(MovedReport):
    """Outcome of an audit of a denoiser's tensors."""

    num_tensors: int
    compared_dtypes: tuple[str, ...]


def audit_states(frozen: Sequence[str], base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> AuditReport:
    """Compare every frozen tensor of `tuned` with `base`, bit for bit, in the dtype `tuned` is stored in.

    A base stored in higher precision is rounded to that dtype first: a fine-tune saved as float16 is compared
    with the float16 rounding of the base, and `compared_dtypes` says so.
    Raises RaygardError naming the first tensor that is missing, has another shape or is stored as integers; and
    if nothing moved, a tensor that the base does not have (an adapter): then nothing can be certified.
    """
    moved, dtypes = [], set()
    for name in frozen:
        for label, state in (("base", base), ("model", tuned)):
            if name not in state:
                raise RaygardError(f"{label} has no tensor '{name}': it is not the model this mask was made for")
        released, found = base[name].detach().cpu(), tuned[name].detach().cpu()
        if released.shape != found.shape:
            raise RaygardError(
                f"tensor '{name}' has shape {tuple(found.shape)} in the model and {tuple(released.shape)} in the base"
            )
        if not found.is_floating_point():
            raise RaygardError(f"tensor '{name}' is stored as {found.dtype}, which cannot be compared with the base")
        dtypes.add(str(found.dtype).removeprefix("torch."))
        expected = released.to(found.dtype)
        different = _bits(expected) != _bits(found)
        if different.any():
            gap = (expected.double() - found.double()).abs().max()
            moved.append(MovedTensor(name, int(different.sum()), float(gap)))
    extra = sorted(set(tuned) - set(base))
    if extra and not moved:
        raise RaygardError(
            f"the model has a tensor '{extra[0]}' that the base does not have; it cannot be "
            "certified (audit an adapter's own file with --lora)"
        )
    return AuditReport(len(frozen), tuple(moved), len(tuned), tuple(sorted(dtypes)))


def _bits(tensor: Tensor) -> Tensor:
    # Integer views make NaN equal to itself and -0.0 differ from 0.0: bits, not values, are promised.
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(integer)
