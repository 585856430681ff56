"""Reading denoiser weights from disk: safetensors only, never pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from raygard.errors import RaygardError

DENOISER_FOLDERS = ("unet", "transformer")
STEM = "diffusion_pytorch_model"


def load_denoiser_state(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a denoiser, on the CPU, in their stored dtype.

    path: a diffusers pipeline folder (with `unet/` or `transformer/`), a denoiser folder, or one `.safetensors`
    file. Sharded checkpoints (`*.safetensors.index.json`) and variants (`*.fp16.safetensors`) are found.
    Raises RaygardError if there is nothing to read, the file is damaged, or only pickled weights exist.
    """
    root = Path(path)
    if not root.exists():
        raise RaygardError(f"no model at {root}: expected a diffusers folder or a .safetensors file")
    if root.is_file():
        return _read(root)
    folder = next((root / name for name in DENOISER_FOLDERS if (root / name).is_dir()), root)
    index = sorted(folder.glob(f"{STEM}*.safetensors.index.json")) + sorted(
        folder.glob(f"{STEM}.safetensors.index*.json")
    )
    if index:
        names = sorted(set(json.loads(index[0].read_text(encoding="utf-8"))["weight_map"].values()))
        if any("/" in name or "\\" in name or ".." in name for name in names):
            raise RaygardError(f"{index[0]}: shard names must not leave the folder")
        return {key: tensor for name in names for key, tensor in _read(folder / name).items()}
    files = [folder / f"{STEM}.safetensors", *sorted(folder.glob(f"{STEM}.*.safetensors"))]
    for file in files:
        if file.is_file():
            return _read(file)
    if list(folder.glob("*.bin")):
        raise RaygardError(f"{folder} holds pickled weights only; save them with safe_serialization=True")
    raise RaygardError(f"{folder} holds no {STEM}.safetensors")


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(str(file))
    except (SafetensorError, OSError, ValueError) as error:
        raise RaygardError(f"cannot read {file}: damaged or incomplete ({error})") from None


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 (hex) of the tensor's values as float32, little-endian, row-major."""
    values = tensor.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False)
    return hashlib.sha256(values.tobytes()).hexdigest()


def fingerprint(digests: Mapping[str, str]) -> str:
    """One SHA-256 (hex) over `name digest` lines in the mapping's order."""
    lines = "".join(f"{name} {digest}\n" for name, digest in digests.items())
    return hashlib.sha256(lines.encode()).hexdigest()
