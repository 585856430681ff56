"""FreezeMask: the folder a publisher releases and a user applies.

    mask.json          manifest: every tensor by name, base model and fingerprint, ratios, domain, metrics
    mask.safetensors   logits, soft mask, binary mask, each of length N in the manifest's order
    values.safetensors new values of frozen tensors (optional; the release is then the base with these values)
    mask.sig           a publisher's signature of all of the above (optional; see `signature`)

Nothing is matched by position and nothing is pickled; loading checks all of it.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn

import raygard
from raygard.errors import RaygardError
from raygard.files import read_limited, readable_disk_errors, sha256_file
from raygard.mask.audit import AuditReport, audit_states
from raygard.mask.manifest import FORMAT_VERSION, BaseModelInfo, Manifest, RatioInfo, TensorEntry, problem
from raygard.mask.signature import SIGNATURE, SignatureError, check_signature, require_files
from raygard.mask.weights import fingerprint, refuse_packed, tensor_sha256

MANIFEST, ARRAYS, VALUES = "mask.json", "mask.safetensors", "values.safetensors"
# A manifest of 10,000 tensors has about 2 MiB.
MAX_MANIFEST_BYTES = 64 * 2**20
_NOT_AS_NAMED = f"is missing or differs from the hash in {MANIFEST}; fetch the mask again"


@dataclass(frozen=True, eq=False)
class FreezeMask:
    """A binary freeze mask over named parameter tensors of one base model.

    names, shapes: N tensors in the order of the base's `named_parameters()`.
    frozen: bool (N,). logits, soft: float32 (N,).
    digests: SHA-256 of each frozen tensor as released. values: new values for some frozen tensors.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    frozen: Tensor
    logits: Tensor
    soft: Tensor
    digests: Mapping[str, str]
    base_model: str = ""
    domain: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    config_hash: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    values: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def create(
        cls,
        module: nn.Module,
        frozen: Tensor | Sequence[str],
        *,
        logits: Tensor | None = None,
        soft: Tensor | None = None,
        values: Mapping[str, Tensor] | None = None,
        **info: Any,
    ) -> FreezeMask:
        """Build a mask for `module`, whose parameters hold the base's values.

        frozen: bool (N,) in the order of `module.named_parameters()`, or the names to freeze.
        logits, soft: (N,); default +1/-1 and the binary mask, for masks that were not learned.
        info: base_model, domain, config, config_hash, metrics.
        Raises RaygardError for an unknown name, or if all or none would be frozen.
        """
        parameters = dict(module.named_parameters())
        names = tuple(parameters)
        if not isinstance(frozen, Tensor):
            unknown = sorted(set(frozen) - set(names))
            if unknown:
                raise RaygardError(f"the model has no parameter tensor '{unknown[0]}'")
            chosen = set(frozen)
            frozen = torch.tensor([name in chosen for name in names])
        frozen = frozen.detach().cpu().bool()
        if frozen.shape != (len(names),):
            raise RaygardError(f"frozen has shape {tuple(frozen.shape)}, the model has {len(names)} parameter tensors")
        if frozen.all() or not frozen.any():
            count = int(frozen.sum())
            raise RaygardError(f"a mask must freeze some of the {len(names)} tensors, not {count} of them")
        for label, numbers in (("logits", logits), ("soft", soft)):
            if numbers is not None and (numbers.shape != frozen.shape or not torch.isfinite(numbers).all()):
                raise RaygardError(f"{label} must be {len(names)} finite numbers")
        values = {name: tensor.detach().cpu() for name, tensor in (values or {}).items()}
        held = {name for name, flag in zip(names, frozen.tolist(), strict=True) if flag}
        loose = sorted(set(values) - held)
        if loose:
            raise RaygardError(f"values were given for '{loose[0]}', which is not frozen")
        for name, value in values.items():
            if value.shape != parameters[name].shape:
                expected = tuple(parameters[name].shape)
                raise RaygardError(f"values of '{name}' have shape {tuple(value.shape)}, the tensor has {expected}")
        return cls(
            names=names,
            shapes=tuple(tuple(parameters[name].shape) for name in names),
            frozen=frozen,
            logits=(frozen.float() * 2 - 1 if logits is None else logits.detach().cpu().float()),
            soft=(frozen.float() if soft is None else soft.detach().cpu().float()),
            digests={n: tensor_sha256(values.get(n, parameters[n])) for n in names if n in held},
            values=values,
            **info,
        )

    @property
    def frozen_names(self) -> tuple[str, ...]:
        return tuple(name for name, flag in zip(self.names, self.frozen.tolist(), strict=True) if flag)

    @property
    def sizes(self) -> Tensor:
        """Number of elements of each tensor, int64 (N,)."""
        return torch.tensor([int(torch.Size(shape).numel()) for shape in self.shapes])

    @property
    def ratio_by_count(self) -> float:
        return float(self.frozen.double().mean())

    @property
    def ratio_by_params(self) -> float:
        sizes = self.sizes.double()
        return float(sizes[self.frozen].sum() / sizes.sum())

    @property
    def sha256(self) -> str:
        """Identity of the mask: base fingerprint and frozen names; equal for equal masks of equal bases."""
        return fingerprint(self.digests)

    def manifest(self) -> Manifest:
        sizes = self.sizes
        return Manifest(
            format_version=FORMAT_VERSION,
            raygard_version=raygard.__version__,
            base=BaseModelInfo(id=self.base_model, fingerprint=self.sha256),
            ratio=RatioInfo(
                by_count=self.ratio_by_count,
                by_params=self.ratio_by_params,
                frozen_tensors=int(self.frozen.sum()),
                frozen_params=int(sizes[self.frozen].sum()),
                num_tensors=len(self.names),
                num_params=int(sizes.sum()),
            ),
            domain=self.domain,
            config=dict(self.config),
            config_hash=self.config_hash,
            metrics=dict(self.metrics),
            tensors=tuple(
                TensorEntry(name=name, shape=shape, frozen=flag, sha256=self.digests.get(name))
                for name, shape, flag in zip(self.names, self.shapes, self.frozen.tolist(), strict=True)
            ),
            files={},
        )

    def save(self, path: str | Path) -> Path:
        """Write the folder whole or not at all; an older mask at `path` is replaced, anything else refused.

        A signed mask stays as it is if it is this one, and is never replaced by another.
        Raises RaygardError for a folder with other files in it, a full disk, or metrics that are not finite.
        """
        target = Path(path)
        if target.exists() and (target.is_file() or not _may_replace(target)):
            raise RaygardError(f"{target} exists and is not a mask; choose another folder")
        try:
            manifest = self.manifest()
        except ValidationError as error:
            raise RaygardError(f"cannot save the mask: {problem(error)}") from None
        with readable_disk_errors(target):
            place = target.resolve()
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as scratch:
                new, old = Path(scratch) / "new", Path(scratch) / "old"
                new.mkdir()
                self._write(new, manifest)
                if (place / SIGNATURE).exists():
                    if (place / MANIFEST).read_bytes() == (new / MANIFEST).read_bytes():
                        return target
                    raise RaygardError(f"{target} holds another mask, which is signed; choose another folder")
                if place.exists():
                    place.rename(old)
                try:
                    new.rename(place)
                except BaseException:
                    if old.exists():
                        old.rename(place)
                    raise
        return target

    def _write(self, folder: Path, manifest: Manifest) -> None:
        arrays = {"logits": self.logits, "soft": self.soft, "mask": self.frozen.to(torch.uint8)}
        save_file({k: v.contiguous().clone() for k, v in arrays.items()}, str(folder / ARRAYS))
        if self.values:
            save_file({k: v.contiguous().clone() for k, v in self.values.items()}, str(folder / VALUES))
        files = {file.name: sha256_file(file) for file in sorted(folder.iterdir())}
        text = manifest.model_copy(update={"files": files}).model_dump_json(indent=2)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, *, require_signature: str | Path | None = None) -> FreezeMask:
        """Read and check a mask folder.

        require_signature: PEM file of the public key whose owner must have signed every byte of the folder.
        Raises RaygardError if a file is missing, torn or altered, or contradicts the manifest; SignatureError for the
        same, for a missing or another signature, and for an added file, if a signature is required.
        """
        folder = Path(path)
        try:
            manifest = read_limited(folder / MANIFEST, MAX_MANIFEST_BYTES)
        except OSError:
            kind = RaygardError if require_signature is None else SignatureError
            raise kind(f"{folder} is not a mask: no readable {MANIFEST}") from None
        if require_signature is None:
            return cls._read(folder, manifest)
        check_signature(folder, manifest, require_signature)
        try:
            mask = cls._read(folder, manifest, own=True)
        except RaygardError as error:
            raise SignatureError(str(error)) from None
        require_files(folder, manifest, signed=True)
        return mask

    @classmethod
    def _read(cls, folder: Path, content: bytes, *, own: bool = False) -> FreezeMask:
        """The mask in `folder`, whose manifest has this content.

        own: keep the values in memory before they are checked; otherwise they stay mapped, and a later change of the
        file changes them.
        """
        try:
            manifest = Manifest.model_validate_json(content)
        except ValidationError as error:
            raise RaygardError(f"{folder / MANIFEST}: {problem(error)}") from None
        if set(manifest.files) not in ({ARRAYS}, {ARRAYS, VALUES}):
            raise RaygardError(f"{folder / MANIFEST}: files must be {ARRAYS} and perhaps {VALUES}")
        try:
            found = read_limited(folder / ARRAYS, MAX_MANIFEST_BYTES)
            digests = {ARRAYS: hashlib.sha256(found).hexdigest()}
            if VALUES in manifest.files:
                digests[VALUES] = sha256_file(folder / VALUES)
            for name, digest in manifest.files.items():
                if digests[name] != digest:
                    raise RaygardError(f"{folder / name} {_NOT_AS_NAMED}")
            arrays = load(found)
            values = load_file(str(folder / VALUES)) if VALUES in manifest.files else {}
            if own:
                values = {name: value.clone() for name, value in values.items()}
        except FileNotFoundError as error:
            raise RaygardError(f"{error.filename} {_NOT_AS_NAMED}") from None
        except OSError as error:
            raise RaygardError(f"cannot read the mask in {folder}: {error.strerror or error}") from None
        except (SafetensorError, KeyError) as error:
            # safetensors has no word of its own for a type of numbers that it does not know.
            raise RaygardError(f"{folder}: damaged safetensors ({error})") from None
        refuse_packed(values, folder / VALUES)
        count = len(manifest.tensors)
        for key in ("logits", "soft", "mask"):
            if key not in arrays or arrays[key].shape != (count,) or not torch.isfinite(arrays[key].float()).all():
                raise RaygardError(f"{folder / ARRAYS}: '{key}' must hold {count} finite numbers")
        frozen = torch.tensor([entry.frozen for entry in manifest.tensors])
        if not torch.equal(arrays["mask"].bool(), frozen):
            raise RaygardError(f"{folder}: {ARRAYS} and {MANIFEST} disagree on which tensors are frozen")
        mask = cls(
            names=tuple(entry.name for entry in manifest.tensors),
            shapes=tuple(entry.shape for entry in manifest.tensors),
            frozen=frozen,
            logits=arrays["logits"].float(),
            soft=arrays["soft"].float(),
            digests={entry.name: entry.sha256 for entry in manifest.tensors if entry.sha256 is not None},
            base_model=manifest.base.id,
            domain=manifest.domain,
            config=manifest.config,
            config_hash=manifest.config_hash,
            metrics=manifest.metrics,
            values=values,
        )
        if set(mask.digests) != set(mask.frozen_names) or mask.sha256 != manifest.base.fingerprint:
            raise RaygardError(f"{folder / MANIFEST}: fingerprint and tensor hashes disagree")
        shapes = dict(zip(mask.names, mask.shapes, strict=True))
        for name, value in values.items():
            if shapes.get(name) != tuple(value.shape) or not value.is_floating_point():
                raise RaygardError(f"{folder / VALUES}: '{name}' does not have the shape in {MANIFEST}")
            if mask.digests.get(name) != tensor_sha256(value):
                raise RaygardError(f"{folder / VALUES}: values of '{name}' do not have the hash in {MANIFEST}")
        return mask

    def check_model(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise RaygardError naming the first tensor that is missing, unknown to the mask, or of another shape."""
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in shapes:
                raise RaygardError(f"the mask was made for another model: the model has no tensor '{name}'")
            if tuple(shapes[name]) != shape:
                raise RaygardError(
                    f"the mask was made for another model: '{name}' has shape {tuple(shapes[name])}, "
                    f"the mask says {shape}"
                )
        extra = sorted(set(shapes) - set(self.names))
        if extra:
            raise RaygardError(f"the mask was made for another model: it does not know tensor '{extra[0]}'")

    def apply(self, module: nn.Module, *, verify: bool = True) -> nn.Module:
        """Freeze `module` in place: `requires_grad` is False exactly for the frozen tensors. Returns `module`.

        Carried values are loaded first. verify compares every frozen tensor with the release (SHA-256).
        Raises RaygardError for other names, shapes or values and says which; the module is then unchanged.
        """
        parameters = dict(module.named_parameters())
        self.check_model({name: tuple(p.shape) for name, p in parameters.items()})
        if verify:
            for name in self.frozen_names:
                if name not in self.values and tensor_sha256(parameters[name]) != self.digests[name]:
                    hint = _dtype_hint(parameters[name], "loaded as {}; load it as float32")
                    raise RaygardError(f"'{name}' does not have the values this mask was made for{hint}")
        with torch.no_grad():
            for name, value in self.values.items():
                parameters[name].copy_(value)
        for name, flag in zip(self.names, self.frozen.tolist(), strict=True):
            parameters[name].requires_grad_(not flag)
            if flag:
                parameters[name].grad = None
        return module

    def audit(self, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> AuditReport:
        """List the frozen tensors of `tuned` whose bits differ from the release (`base` with carried values).

        Raises RaygardError if `base` is not the mask's base model, or the models do not match.
        """
        for name in self.frozen_names:
            if name in base and name not in self.values and tensor_sha256(base[name]) != self.digests[name]:
                hint = _dtype_hint(base[name], "stored as {}; give it as it was released")
                raise RaygardError(f"the base is not the model this mask was made for: '{name}' has other values{hint}")
        return audit_states(self.frozen_names, {**base, **self.values}, tuned)


def _may_replace(folder: Path) -> bool:
    found = {file.name for file in folder.iterdir()}
    return not found or (MANIFEST in found and found <= {MANIFEST, ARRAYS, VALUES, SIGNATURE})


def _dtype_hint(tensor: Tensor, hint: str) -> str:
    return "" if tensor.dtype == torch.float32 else f" (it is {hint.format(str(tensor.dtype))})"
