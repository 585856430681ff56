"""Reading denoiser weights from disk: safetensors only, never pickle."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from raygard.errors import RaygardError

DENOISER_FOLDERS = ("unet", "transformer")
STEM = "diffusion_pytorch_model"
PACKED = getattr(torch, "float4_e2m1fn_x2", None)
SHARD = re.compile(r"[\w.\-]+\.safetensors")


def load_denoiser_state(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a denoiser, on the CPU, in their stored dtype.

    path: a diffusers pipeline folder (with `unet/` or `transformer/`), a denoiser folder, or one `.safetensors`
    file. Sharded checkpoints (`*.safetensors.index.json`) are found; variants (`*.fp16.safetensors`) where there
    is nothing else, because diffusers loads them only on demand.
    Raises RaygardError if there is nothing to read, the file is damaged, only pickled weights exist, or there are
    several denoisers.
    """
    root = Path(path)
    if not root.exists():
        raise RaygardError(f"no model at {root}: expected a diffusers folder or a .safetensors file")
    if root.is_file():
        return read_safetensors(root)
    folder = _denoiser_in(root)
    variants = (f"{STEM}.*.safetensors.index.json", f"{STEM}.safetensors.index.*.json", f"{STEM}.*.safetensors")
    files = [folder / f"{STEM}.safetensors.index.json", folder / f"{STEM}.safetensors"]
    files += [file for pattern in variants for file in sorted(folder.glob(pattern))]
    for file in files:
        if file.is_file():
            return _read_shards(file) if file.suffix == ".json" else read_safetensors(file)
    if list(folder.glob("*.bin")):
        raise RaygardError(f"{folder} holds pickled weights only; save them with safe_serialization=True")
    raise RaygardError(f"{folder} holds no {STEM}.safetensors")


def _denoiser_in(root: Path) -> Path:
    # Which of two a pipeline would load is its own to say; the other could be the release, to be audited in its place.
    found = [root / name for name in DENOISER_FOLDERS if (root / name).is_dir()]
    found += [root] if any(root.glob(f"{STEM}*")) else []
    if len(found) > 1:
        raise RaygardError(f"{root} holds several denoisers, in {' and '.join(map(str, found))}; name one of them")
    return found[0] if found else root


def shard_files(index: Path) -> dict[str, str]:
    """File of every tensor of a sharded checkpoint, by the tensor's name.

    index: `*.safetensors.index.json`. Raises RaygardError if it is damaged, or names a file that is not safetensors or
    lies in another folder.
    """
    try:
        where: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        unsafe = [name for name in where.values() if not SHARD.fullmatch(name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise RaygardError(f"{index} is damaged: no readable weight_map") from None
    if unsafe:
        raise RaygardError(f"{index}: shard {unsafe[0]!r} must be a .safetensors file in the same folder")
    return where


def _read_shards(index: Path) -> dict[str, Tensor]:
    where = shard_files(index)
    state: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        shard = read_safetensors(index.parent / name)
        if set(shard) != {key for key, home in where.items() if home == name}:
            raise RaygardError(f"{index.parent / name} does not hold the tensors that {index.name} says")
        state |= shard
    return state


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of one file, on the CPU. Raises RaygardError if it is missing, damaged or of another format."""
    if not file.exists():
        raise RaygardError(f"no file at {file}")
    if file.suffix != ".safetensors":
        raise RaygardError(f"{file} is not a .safetensors file; pickled weights are never read")
    try:
        state = load_file(str(file))
    except (SafetensorError, OSError, ValueError) as error:
        raise RaygardError(f"cannot read {file}: damaged or incomplete ({error})") from None
    refuse_packed(state, file)
    return state


def refuse_packed(state: Mapping[str, Tensor], file: Path) -> None:
    """Raise RaygardError for a tensor of numbers smaller than a byte, which torch can store and not read."""
    for name, tensor in state.items():
        if tensor.dtype == PACKED:
            raise RaygardError(f"{file}: '{name}' is stored as {PACKED}, which cannot be read; save it in another type")


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 (hex) of the tensor's values as float32, little-endian, row-major."""
    values = tensor.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False)
    return hashlib.sha256(values.tobytes()).hexdigest()


def fingerprint(digests: Mapping[str, str]) -> str:
    """One SHA-256 (hex) over `name digest` lines in the mapping's order."""
    lines = "".join(f"{name} {digest}\n" for name, digest in digests.items())
    return hashlib.sha256(lines.encode()).hexdigest()
