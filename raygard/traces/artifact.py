"""Traces: the folder a publisher keeps to itself, or gives to a hub it trusts.

    traces.json         which release, its tensors, the publisher's own users, the secret of the sketches
    traces.safetensors  float16 (users, width) of each tensor, in the order of the users

Whoever has it can train so that nothing is found; only its owner may read it. Nothing is pickled, and loading checks
all of it.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

import raygard
from raygard.errors import RaygardError
from raygard.files import read_limited, whole_folder, write_text
from raygard.mask.manifest import Part, Sha256, Side, TensorName, problem
from raygard.mask.weights import fingerprint, tensor_sha256
from raygard.traces.detect import Reference
from raygard.traces.sketch import Sketcher, Update

MANIFEST, SKETCHES = "traces.json", "traces.safetensors"
MAX_MANIFEST_BYTES, MAX_SKETCHES_BYTES = 64 * 2**20, 8 * 2**30
SECRET_BYTES = 32


class _Tensor(Part):
    name: TensorName
    shape: Annotated[tuple[Side, ...], Field(max_length=8)]


class _User(Part):
    cls: str
    forbidden: bool
    group: Annotated[int, Field(ge=0)]


class _Manifest(Part):
    format_version: Literal[1]
    raygard_version: str
    base_model: str
    fingerprint: Sha256
    domain: str
    secret: Annotated[str, Field(pattern=r"^[0-9a-f]{32,128}$")]
    width: Annotated[int, Field(ge=64, le=2**20)]
    tensors: Annotated[tuple[_Tensor, ...], Field(min_length=1)]
    users: Annotated[tuple[_User, ...], Field(min_length=2)]
    sha256: Sha256


def new_secret() -> bytes:
    """A secret for sketches that nobody can guess."""
    return secrets.token_bytes(SECRET_BYTES)


def release_fingerprint(release: Mapping[str, Tensor]) -> str:
    """One SHA-256 (hex) of the names and float32 values of all tensors, whatever their order."""
    return fingerprint({name: tensor_sha256(release[name]) for name in sorted(release)})


@dataclass(frozen=True, eq=False)
class Traces:
    """What a publisher's own users left in a release's tensors.

    fingerprint: `release_fingerprint` of the release. shapes: of its tensors, by name.
    """

    base_model: str
    fingerprint: str
    domain: str
    shapes: Mapping[str, tuple[int, ...]]
    sketcher: Sketcher
    references: Sequence[Reference]

    @property
    def classes(self) -> tuple[str, ...]:
        """Forbidden classes."""
        return tuple(dict.fromkeys(r.cls for r in self.references if r.forbidden))

    def check_release(self, release: Mapping[str, Tensor]) -> None:
        """Raise RaygardError if these are not traces of this release."""
        if release_fingerprint(release) != self.fingerprint:
            raise RaygardError(
                f"the base is not the release these traces were made for ({self.base_model}): its tensors differ; give "
                "it as it was released, and the mask too if that carries values"
            )

    def save(self, path: str | Path) -> Path:
        """Write the folder, whole or not at all, for the owner's eyes only.

        Raises RaygardError if there is something else at `path`, or the disk is full.
        """
        target = Path(path)
        names = sorted(set().union(*(r.update.tensors for r in self.references)))
        # A user whose update left a tensor alone has zeros there, which is no direction.
        nothing = np.zeros(self.sketcher.width, np.float32)
        arrays = {
            name: np.stack([r.update.tensors.get(name, nothing) for r in self.references]).astype(np.float16)
            for name in names
        }
        data = save(arrays)
        manifest = _Manifest(
            format_version=1,
            raygard_version=raygard.__version__,
            base_model=self.base_model,
            fingerprint=self.fingerprint,
            domain=self.domain,
            secret=self.sketcher.secret.hex(),
            width=self.sketcher.width,
            tensors=tuple(_Tensor(name=name, shape=shape) for name, shape in self.shapes.items()),
            users=tuple(_User(cls=r.cls, forbidden=r.forbidden, group=r.group) for r in self.references),
            sha256=hashlib.sha256(data).hexdigest(),
        )
        with whole_folder(target) as folder:
            folder.chmod(0o700)
            (folder / SKETCHES).write_bytes(data)
            write_text(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
        return target

    @classmethod
    def load(cls, path: str | Path) -> Traces:
        """Read and check a folder. Raises RaygardError if it is none, or a file is missing, torn or altered."""
        folder = Path(path)
        try:
            manifest = _Manifest.model_validate_json(read_limited(folder / MANIFEST, MAX_MANIFEST_BYTES))
        except OSError:
            raise RaygardError(f"{folder} holds no traces: no readable {MANIFEST}") from None
        except ValidationError as error:
            raise RaygardError(f"{folder / MANIFEST}: {problem(error)}") from None
        try:
            data = read_limited(folder / SKETCHES, MAX_SKETCHES_BYTES)
            if hashlib.sha256(data).hexdigest() != manifest.sha256:
                raise RaygardError(f"{folder / SKETCHES} differs from the hash in {MANIFEST}; make the traces again")
            arrays = load(data)
        except OSError as error:
            raise RaygardError(f"cannot read {folder / SKETCHES}: {error.strerror or error}") from None
        except (SafetensorError, ValueError) as error:
            raise RaygardError(f"{folder / SKETCHES} is damaged: {error}") from None
        shapes = {entry.name: entry.shape for entry in manifest.tensors}
        for name, array in arrays.items():
            if name not in shapes or array.shape != (len(manifest.users), manifest.width):
                raise RaygardError(f"{folder / SKETCHES}: '{name}' does not fit {MANIFEST}")
        try:
            sketcher = Sketcher(bytes.fromhex(manifest.secret), manifest.width)
        except ValueError as error:
            raise RaygardError(f"{folder / MANIFEST}: {error}") from None
        references = [
            Reference(
                user.cls,
                user.forbidden,
                Update({name: a[i].astype(np.float32) for name, a in arrays.items() if a[i].any()}),
                user.group,
            )
            for i, user in enumerate(manifest.users)
        ]
        return cls(manifest.base_model, manifest.fingerprint, manifest.domain, shapes, sketcher, references)
