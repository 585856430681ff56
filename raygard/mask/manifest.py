"""mask.json as a typed model; its JSON Schema is shipped as raygard/schemas/mask.schema.json."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

FORMAT_VERSION: Literal[1] = 1

MAX_SIDE = 2**40

Side = Annotated[int, Field(gt=0, le=MAX_SIDE)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
TensorName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$", max_length=512)]
FileName = Annotated[str, Field(pattern=r"^[a-z]+\.safetensors$")]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def problem(error: ValidationError) -> str:
    """Where in a manifest the first mistake is, and what it is, in one line."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))[:100]
    return " ".join(f"{where}: {first['msg']}".removeprefix(": ").split())


class TensorEntry(Part):
    """One parameter tensor. `unit` is what is frozen: the whole tensor (channel and subspace are reserved)."""

    name: TensorName
    shape: Annotated[tuple[Side, ...], Field(max_length=8)]
    unit: Literal["tensor"] = "tensor"
    frozen: bool
    sha256: Sha256 | None = Field(None, description="float32 little-endian values as released; frozen tensors only")


class BaseModelInfo(Part):
    id: str = Field(description="path or hub id of the base model; informative, the fingerprint decides")
    fingerprint: Sha256


class RatioInfo(Part):
    by_count: float = Field(ge=0, le=1)
    by_params: float = Field(ge=0, le=1)
    frozen_tensors: NonNegativeInt
    frozen_params: NonNegativeInt
    num_tensors: PositiveInt
    num_params: PositiveInt


class Manifest(Part):
    """Manifest of a freeze mask."""

    format_version: Literal[1]
    raygard_version: str
    base: BaseModelInfo
    ratio: RatioInfo
    domain: str
    config: dict[str, Any]
    config_hash: str
    metrics: dict[str, float]
    tensors: Annotated[tuple[TensorEntry, ...], Field(min_length=1)]
    files: dict[FileName, Sha256]

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        names = [entry.name for entry in self.tensors]
        if len(set(names)) != len(names):
            raise ValueError("a tensor name appears twice")
        for entry in self.tensors:
            if entry.frozen != (entry.sha256 is not None):
                raise ValueError(f"'{entry.name}': frozen tensors, and only they, carry a sha256")
        sizes = [math.prod(entry.shape) for entry in self.tensors]
        held = [size for size, entry in zip(sizes, self.tensors, strict=True) if entry.frozen]
        exact = (
            (self.ratio.num_tensors, len(sizes)),
            (self.ratio.num_params, sum(sizes)),
            (self.ratio.frozen_tensors, len(held)),
            (self.ratio.frozen_params, sum(held)),
        )
        shares = (
            (self.ratio.by_count, len(held) / len(sizes)),
            (self.ratio.by_params, sum(held) / sum(sizes)),
        )
        if any(said != found for said, found in exact) or any(abs(s - f) > 1e-9 for s, f in shares):
            raise ValueError("ratio contradicts the list of tensors")
        return self
