"""Edit: the tensors a weight-editing defence has changed, as one safetensors file tied to its base model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from raygard.errors import RaygardError
from raygard.files import scratch
from raygard.mask.weights import fingerprint, refuse_packed, tensor_sha256

METADATA = "raygard_edit"


@dataclass(frozen=True, eq=False)
class Edit:
    """New values of named parameter tensors of one base model.

    values: by parameter name, on the CPU. base_sha256: fingerprint of the same tensors as they were before.
    method, settings: what made them, JSON-able.
    """

    values: Mapping[str, Tensor]
    base_sha256: str
    method: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def create(cls, denoiser: nn.Module, values: Mapping[str, Tensor], method: str = "", **settings: Any) -> Edit:
        """Tie `values` to `denoiser`, which holds the base's values.

        Raises RaygardError for a name the model does not have, another shape, values that are not finite, or none.
        """
        if not values:
            raise RaygardError("an edit must change at least one tensor")
        parameters = dict(denoiser.named_parameters())
        for name, value in values.items():
            if name not in parameters:
                raise RaygardError(f"the model has no parameter tensor '{name}'")
            if value.shape != parameters[name].shape:
                expected = tuple(parameters[name].shape)
                raise RaygardError(f"values of '{name}' have shape {tuple(value.shape)}, the tensor has {expected}")
            if not torch.isfinite(value).all():
                raise RaygardError(f"values of '{name}' are not finite")
        held = {name: value.detach().cpu().contiguous() for name, value in values.items()}
        return cls(held, _fingerprint(parameters, held), method, settings)

    @property
    def sha256(self) -> str:
        """Identity of the edit: its base and its values; equal for equal edits of equal bases."""
        return fingerprint({"base": self.base_sha256, **{n: tensor_sha256(v) for n, v in self.values.items()}})

    def check(self, denoiser: nn.Module) -> None:
        """Raise RaygardError unless `denoiser` has the tensors, with the values, that this edit was made for."""
        parameters = dict(denoiser.named_parameters())
        for name, value in self.values.items():
            if name not in parameters or parameters[name].shape != value.shape:
                raise RaygardError(f"the edit was made for another model: no tensor '{name}' {tuple(value.shape)}")
        if _fingerprint(parameters, self.values) != self.base_sha256:
            raise RaygardError("the model does not have the values this edit was made for (or is edited already)")

    def apply(self, denoiser: nn.Module) -> nn.Module:
        """Put the values into `denoiser` in place and return it.

        Raises RaygardError if it is not the base the edit was made for; the module is then unchanged.
        """
        self.check(denoiser)
        parameters = dict(denoiser.named_parameters())
        with torch.no_grad():
            for name, value in self.values.items():
                parameters[name].copy_(value)
        return denoiser

    def save(self, path: str | Path) -> Path:
        """Write one `.safetensors` file, whole or not at all. Raises RaygardError for another ending or a full disk."""
        file = Path(path)
        if file.suffix != ".safetensors":
            raise RaygardError(f"{file}: an edit is saved as a .safetensors file")
        about = {"base_sha256": self.base_sha256, "method": self.method, "settings": dict(self.settings)}
        with scratch(file) as part:
            save_file(dict(self.values), str(part), metadata={METADATA: json.dumps(about, sort_keys=True)})
        return file

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read a file that `save` wrote. Raises RaygardError if it is missing, damaged or no edit."""
        file = Path(path)
        try:
            with safe_open(str(file), framework="pt") as opened:
                about = json.loads((opened.metadata() or {})[METADATA])
                values = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            found = cls(values, str(about["base_sha256"]), str(about["method"]), dict(about["settings"]))
        except (OSError, SafetensorError) as error:
            raise RaygardError(f"cannot read {file}: {error}") from None
        except (KeyError, TypeError, ValueError, RecursionError):
            raise RaygardError(f"{file} is not an edit: it lacks its description in the metadata") from None
        refuse_packed(values, file)
        return found


def _fingerprint(parameters: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> str:
    return fingerprint({name: tensor_sha256(parameters[name]) for name in sorted(names)})
