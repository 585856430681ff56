"""What several scorers need: checks of pictures and packages, a network's input, batches, cosine distances."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raygard.errors import RaygardError, require_packages

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def check_pictures(images: NDArray[np.uint8]) -> None:
    """Raise RaygardError unless `images` are pictures, uint8 (n, H, W, 3)."""
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise RaygardError(f"expected pictures as uint8 (n, H, W, 3), found {images.dtype} {images.shape}")


def check_references(references: NDArray[np.float32]) -> None:
    """Raise RaygardError if there is not one reference."""
    if len(references) == 0:
        raise RaygardError("no reference pictures to measure the distance to")


def require(scorer: str, extra: str, *packages: str) -> None:
    """Raise RaygardError naming the extra to install if one of the packages is missing; imports none of them."""
    require_packages(f"scorer {scorer}", extra, *packages)


def package_folder(name: str) -> Path | None:
    """Where an installed package lies, None if it is missing; it is not imported."""
    package = find_spec(name)
    folders = package.submodule_search_locations if package else None
    return Path(next(iter(folders))) if folders else None


def unit(embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    """Embeddings (n, d) scaled to length 1."""
    values = embeddings.astype(np.float64)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def mean_cosine_similarity(generated: NDArray[np.float32], references: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean cosine similarity of each generated embedding (n, d) to all references (m, d): float32 (n,)."""
    check_references(references)
    return (unit(generated) @ unit(references).T).mean(axis=1).astype(np.float32)


def mean_cosine_distance(generated: NDArray[np.float32], references: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean cosine distance, 0 to 2, of each generated embedding (n, d) to all references (m, d): float32 (n,)."""
    check_references(references)
    return (1 - (unit(generated) @ unit(references).T).mean(axis=1)).astype(np.float32)


def in_batches(
    images: NDArray[np.uint8], size: int, width: int, embed: Callable[[NDArray[np.uint8]], NDArray[np.float32]]
) -> NDArray[np.float32]:
    """`embed` of `size` pictures at a time: float32 (n, width), also for n = 0. Raises RaygardError as above."""
    check_pictures(images)
    found = [embed(images[start : start + size]) for start in range(0, len(images), size)]
    return np.concatenate(found) if found else np.zeros((0, width), dtype=np.float32)


def to_input(
    images: NDArray[np.uint8], side: int, mean: tuple[float, ...], std: tuple[float, ...], device: str
) -> Tensor:
    """Pictures uint8 (n, H, W, 3) as a network's input float32 (n, 3, side, side).

    The shorter edge is scaled to `side`, the middle cut out, and each channel becomes (x / 255 - mean) / std.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 255
    height, width = pixels.shape[2:]
    scale = side / min(height, width)
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    scaled = nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    cut = scaled[:, :, top : top + side, left : left + side]
    shape = (1, 3, 1, 1)
    return (cut - cut.new_tensor(mean).view(shape)) / cut.new_tensor(std).view(shape)
