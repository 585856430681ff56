"""Latents and conditioning, computed once for a domain and a model and kept on disk by content.

    <cache_dir>/<key>/latents.safetensors   mean, std (n, C, h, w); caption_index (n,); conditioning of the u unique
    captions, e.g. text (u, L, D), pooled (u, P)
    <cache_dir>/<key>/cache.json            hash of that file; class, part, caption and picture hash of every
    row

The key covers the weights of the autoencoder and of all text encoders and tokenizers, the resolution, the pictures and
all captions. Shape letters: n rows, u unique captions, C latent channels, h, w latent sides, L tokens, D text features,
P pooled features.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from raygard.config import DomainConfig, ModelConfig
from raygard.diffusion.conditioning import NAMES, Conditioning, ConditioningRows, joined
from raygard.diffusion.model import (
    load_text_encoders,
    load_vae,
    model_family,
    model_fingerprint,
    text_parts,
    vae_factor,
    with_resolution,
)
from raygard.domain import DomainView, Picture
from raygard.errors import RaygardError
from raygard.files import sha256_file
from raygard.pictures import read_pixels

FORMAT_VERSION = 1
ARRAYS, MANIFEST = "latents.safetensors", "cache.json"


@dataclass(frozen=True)
class LatentSet:
    """Training material: the posterior of every picture in latent space, its conditioning, class and caption.

    mean, std: float32 (n, C, h, w), already shifted and scaled as the autoencoder's configuration says. parts:
    empty, or one for each row. vocabulary: the captions of `conditioning.unique`, in its order, also those of no row;
    empty if not known.
    """

    mean: Tensor
    std: Tensor
    conditioning: ConditioningRows
    classes: list[str]
    captions: list[str]
    parts: list[str]
    vocabulary: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, h, w) of one latent."""
        return tuple(self.mean.shape[1:])

    def rows(self, cls: str, part: str | None = None) -> Tensor:
        """Rows of a class (and part), int64, in stored order; empty if there are none."""
        parts: list[str] | list[None] = self.parts or [None] * len(self)
        found = [
            row
            for row, (own_cls, own_part) in enumerate(zip(self.classes, parts, strict=True))
            if own_cls == cls and part in (None, own_part)
        ]
        return torch.tensor(found, dtype=torch.int64)

    def subset(self, rows: Tensor | Sequence[int]) -> LatentSet:
        """The given rows, in the given order; unique captions are shared."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        chosen = index.tolist()
        return LatentSet(
            mean=self.mean[index],
            std=self.std[index],
            conditioning=ConditioningRows(self.conditioning.unique, self.conditioning.index[index]),
            classes=[self.classes[row] for row in chosen],
            captions=[self.captions[row] for row in chosen],
            parts=[self.parts[row] for row in chosen] if self.parts else [],
            vocabulary=self.vocabulary,
        )

    def latents(self, rows: Tensor, eps: Tensor) -> Tensor:
        """Sample of the posterior, mean + std * eps: float32 (len(rows), C, h, w)."""
        return self.mean[rows] + self.std[rows] * eps


def build_cache(
    model: ModelConfig,
    domain: DomainConfig,
    view: DomainView,
    parts: Sequence[tuple[str, str]],
    cache_dir: str | Path,
    *,
    further_captions: Sequence[str] = (),
    device: str = "cpu",
    batch_size: int = 16,
) -> Path:
    """Encode the pictures and captions of `parts` ((class, part) pairs, in this order) and return the folder.

    further_captions: are embedded too, although no row has them (`LatentSet.vocabulary`).
    A sound cache of the same content is reused, a damaged one is built again. Autoencoder and text encoders
    are out of memory when this returns. Not collective: call it on one rank, or let ranks race (the first one
    wins). Raises RaygardError for an unreadable model or picture and for a full disk, with nothing
    half-written left.
    """
    domain = with_resolution(domain, model)
    rows = [(cls, part, picture) for cls, part in parts for picture in view.pictures(cls, part)]
    if not rows:
        raise RaygardError("no pictures to encode")
    key = _key(model, domain, rows, further_captions)
    folder = Path(cache_dir) / key[:32]
    if _sound(folder, key):
        return folder
    arrays = _encode_pictures(model, domain, [picture for _, _, picture in rows], device, batch_size)
    captions = [picture.caption for _, _, picture in rows]
    unique = _vocabulary(captions, further_captions)
    position = {caption: number for number, caption in enumerate(unique)}
    arrays |= _encode_captions(model, unique, device, batch_size).each(Tensor.contiguous)
    arrays["caption_index"] = torch.tensor([position[caption] for caption in captions], dtype=torch.int64)
    gc.collect()
    data = save(arrays)
    manifest = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "sha256": hashlib.sha256(data).hexdigest(),
        "classes": [cls for cls, _, _ in rows],
        "parts": [part for _, part, _ in rows],
        "captions": captions,
        "pictures": [picture.sha256 for _, _, picture in rows],
        **({"further_captions": sorted(set(further_captions))} if further_captions else {}),
    }
    _publish(folder, key, data, manifest)
    return folder


def load_cache(path: str | Path) -> LatentSet:
    """Read a cache folder. Raises RaygardError if it is missing, torn or of another format version."""
    folder = Path(path)
    manifest = _manifest(folder)
    if manifest is None:
        raise RaygardError(f"{folder} holds no readable cache; build it again")
    try:
        data = (folder / ARRAYS).read_bytes()
    except OSError as error:
        raise RaygardError(
            f"cannot read {folder / ARRAYS}: {error.strerror}; delete the folder and run again"
        ) from None
    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise RaygardError(f"{folder / ARRAYS} is damaged (its hash is not the recorded one); delete the folder")
    try:
        arrays = load(data)
    except SafetensorError as error:
        raise RaygardError(f"cannot read {folder / ARRAYS}: {error}; delete the folder") from None
    return LatentSet(
        mean=arrays["mean"],
        std=arrays["std"],
        conditioning=ConditioningRows(
            Conditioning({name: arrays[name] for name in NAMES if name in arrays}), arrays["caption_index"]
        ),
        classes=list(manifest["classes"]),
        captions=list(manifest["captions"]),
        parts=list(manifest["parts"]),
        vocabulary=_vocabulary(manifest["captions"], manifest.get("further_captions", ())),
    )


def _vocabulary(captions: Sequence[str], further: Sequence[str]) -> list[str]:
    return sorted({*captions, *further})


def _key(
    model: ModelConfig, domain: DomainConfig, rows: Sequence[tuple[str, str, Picture]], further: Sequence[str]
) -> str:
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "model": {part: model_fingerprint(model, part) for part in ("vae", *text_parts(model))},
        "resolution": domain.resolution,
        "center_crop": domain.center_crop,
        "rows": [(cls, part, picture.sha256, picture.caption) for cls, part, picture in rows],
        **({"further_captions": sorted(set(further))} if further else {}),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    sound = isinstance(manifest, dict) and manifest.get("format_version") == FORMAT_VERSION
    fields = ("key", "sha256", "classes", "parts", "captions", "pictures")
    return manifest if sound and all(field in manifest for field in fields) else None


def _sound(folder: Path, key: str) -> bool:
    manifest = _manifest(folder)
    if manifest is None or manifest["key"] != key:
        return False
    try:
        return sha256_file(folder / ARRAYS) == manifest["sha256"]
    except OSError:
        return False


@torch.no_grad()
def encode_pixels(vae: Any, pixels: Tensor, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """Posterior of pictures, uint8 (B, H, W, 3): mean and std (B, C, h, w), shifted and scaled.

    As the denoiser knows latents. Float32, on the CPU.
    """
    scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
    posterior = vae.encode(pixels.permute(0, 3, 1, 2).float().to(device) / 127.5 - 1).latent_dist
    return ((posterior.mean - shift) * scale).float().cpu(), (posterior.std * scale).float().cpu()


def _encode_pictures(
    model: ModelConfig, domain: DomainConfig, pictures: Sequence[Picture], device: str, batch_size: int
) -> dict[str, Tensor]:
    assert domain.resolution is not None
    vae = load_vae(model).to(device).eval()
    side = vae_factor(vae.config) * model_family(model).latent_multiple
    if domain.resolution % side:
        raise RaygardError(f"domain.resolution {domain.resolution} must be a multiple of {side} for this model")
    means, stds = [], []
    for batch in _batches(pictures, batch_size):
        pixels = torch.stack(
            [torch.from_numpy(read_pixels(p.path, domain.resolution, domain.center_crop)) for p in batch]
        )
        mean, std = encode_pixels(vae, pixels, device)
        means.append(mean)
        stds.append(std)
    return {"mean": torch.cat(means).contiguous(), "std": torch.cat(stds).contiguous()}


def _encode_captions(model: ModelConfig, captions: Sequence[str], device: str, batch_size: int) -> Conditioning:
    encoders = load_text_encoders(model).to(device)
    found: Conditioning = joined([encoders.embed(batch) for batch in _batches(captions, batch_size)])
    return found


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _publish(folder: Path, key: str, data: bytes, manifest: dict[str, Any]) -> None:
    """Write beside the target and rename, so that readers see all of it or nothing."""
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        temporary.chmod(0o755)
        _write(temporary / ARRAYS, data)
        _write(temporary / MANIFEST, json.dumps(manifest).encode())
        if folder.exists() and not _sound(folder, key):
            shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
    except OSError as error:
        if _sound(folder, key):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            megabytes = len(data) / 1e6
            raise RaygardError(f"no space left for the cache in {folder.parent}: {megabytes:.1f} MB needed") from None
        raise RaygardError(f"cannot write the cache in {folder.parent}: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _write(file: Path, data: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
