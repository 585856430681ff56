"""Readers of files from elsewhere, as functions of one file's bytes, with files that each of them accepts.

A reader may return or raise RaygardError; whatever else it raises is a defect. `with_atheris.py` and
`test_fuzz_readers.py` feed them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import nn

from raygard.config_file import load_config
from raygard.editing import Edit
from raygard.errors import RaygardError
from raygard.files import sha256_file
from raygard.imagefolder import read_entries
from raygard.mask import FreezeMask, audit_lora, make_keys, sign_mask
from raygard.mask.artifact import ARRAYS, MANIFEST, VALUES
from raygard.mask.signature import SIGNATURE
from raygard.mask.weights import load_denoiser_state
from raygard.pictures import ENDINGS, decode_picture


@dataclass(frozen=True)
class Reader:
    """One reader: `read` takes the bytes of a file; `seeds` are files it accepts."""

    name: str
    read: Callable[[bytes], object]
    seeds: tuple[bytes, ...]

    def __call__(self, data: bytes) -> bool:
        """Whether the file was accepted. Raises AssertionError for an error that is not one clear line."""
        try:
            self.read(data)
        except RaygardError as error:
            text = str(error)
            assert text and text.isprintable(), text
            return False
        return True


def make_readers(folder: Path) -> list[Reader]:
    """All readers, working in `folder`; the first five are those of masks and metadata."""
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    values = {"2.bias": torch.tensor([5.0, -0.0])}
    info = {"domain": "emoji", "config": {"a": [1, {"b": None}]}, "metrics": {"x": 0.5}, "base_model": "net"}
    mask = FreezeMask.create(module, ["0.weight", "2.bias"], values=values, **info)
    key = folder / "key"
    make_keys(key)
    return [
        *_mask_readers(folder, mask, key),
        *_table_readers(folder),
        *_weight_readers(folder, mask, module),
        Reader("picture", _read_picture, tuple(_pictures())),
        _config_reader(folder),
    ]


def _mask_readers(folder: Path, mask: FreezeMask, key: Path) -> list[Reader]:
    def place(name: str) -> Path:
        where = mask.save(folder / name)
        sign_mask(where, key)
        return where

    def load_manifest(data: bytes) -> None:
        (manifests / MANIFEST).write_bytes(data)
        FreezeMask.load(manifests)

    def load_signed(data: bytes) -> None:
        (signed / SIGNATURE).write_bytes(data)
        FreezeMask.load(signed, require_signature=f"{key}.pub")

    def load_with(name: str) -> Callable[[bytes], None]:
        where = place(name.split(".")[0] + "-file")
        manifest = (where / MANIFEST).read_text()
        digest = sha256_file(where / name)

        def load(data: bytes) -> None:
            # The manifest agrees with the file, as a careful forger would see to: its own reader must refuse it.
            (where / name).write_bytes(data)
            (where / MANIFEST).write_text(manifest.replace(digest, sha256_file(where / name)))
            FreezeMask.load(where)

        return load

    manifests, signed = place("manifest"), place("signed")
    seeds = {name: (manifests / name).read_bytes() for name in (MANIFEST, ARRAYS, VALUES, SIGNATURE)}
    return [
        Reader("manifest", load_manifest, (seeds[MANIFEST],)),
        Reader("arrays", load_with(ARRAYS), (seeds[ARRAYS],)),
        Reader("values", load_with(VALUES), (seeds[VALUES],)),
        Reader("signature", load_signed, (seeds[SIGNATURE],)),
    ]


def _table_readers(folder: Path) -> list[Reader]:
    rows = [{"file_name": f"a/{n}.png", "text": "ein Hündchen", "class": c} for n, c in enumerate(("a", "b c"))]

    def reader(name: str, seed: str) -> Reader:
        where = folder / name.replace(".", "-")
        (where / "a").mkdir(parents=True)
        for row in rows:
            (where / row["file_name"]).touch()

        def read(data: bytes) -> None:
            (where / name).write_bytes(data)
            root = where.resolve()
            for entry in read_entries(where, "text", "class"):
                assert entry.path.resolve().is_relative_to(root) and entry.caption.strip() and entry.cls.strip()

        return Reader(name, read, (seed.encode(), b"\xef\xbb\xbf" + seed.encode()))

    lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    table = "".join(f'{row["file_name"]},"{row["text"]}",{row["class"]}\r\n' for row in rows)
    return [reader("metadata.jsonl", lines), reader("metadata.csv", f"file_name,text,class\r\n{table}")]


def _weight_readers(folder: Path, mask: FreezeMask, module: nn.Module) -> list[Reader]:
    where = folder / "weights"
    shard = where / "a.safetensors"
    where.mkdir()
    shard.write_bytes(save({"x": torch.ones(2), "y": torch.zeros(3, 1)}))
    index = {"metadata": {"total_size": 20}, "weight_map": {"x": shard.name, "y": shard.name}}
    factors = {"0.lora_A.weight": torch.ones(1, 2), "0.lora_B.weight": torch.ones(3, 1), "0.alpha": torch.tensor(1.0)}

    def load_index(data: bytes) -> None:
        (where / "diffusion_pytorch_model.safetensors.index.json").write_bytes(data)
        load_denoiser_state(where)

    def load_lora(data: bytes) -> None:
        (folder / "lora.safetensors").write_bytes(data)
        audit_lora(mask, folder / "lora.safetensors")

    def load_edit(data: bytes) -> None:
        edit.write_bytes(data)
        Edit.load(edit)

    edit = Edit.create(module, {"0.bias": torch.ones(3)}, "uce", weight=1).save(folder / "edit.safetensors")
    return [
        Reader("index", load_index, (json.dumps(index).encode(),)),
        Reader("lora", load_lora, (save(factors),)),
        Reader("edit", load_edit, (edit.read_bytes(),)),
    ]


def _pictures() -> list[bytes]:
    found = []
    for mode in ("RGB", "P", "RGBA", "L", "1", "I;16"):
        picture = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).convert(
            "L" if mode == "I;16" else mode
        )
        picture = picture.convert("I;16") if mode == "I;16" else picture
        for form in ENDINGS:
            buffer = io.BytesIO()
            try:
                picture.save(buffer, form)
            except (OSError, ValueError):
                # Not every format has every mode.
                continue
            found.append(buffer.getvalue())
    return found


def _read_picture(data: bytes) -> None:
    endings = {b"\x89P": ".png", b"\xff\xd8": ".jpg", b"RI": ".webp", b"BM": ".bmp", b"GI": ".gif"}
    decode_picture(data, f"x{endings.get(data[:2], '.tif')}").convert("RGB")


def _config_reader(folder: Path) -> Reader:
    file = folder / "config.yaml"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        load_config(file)

    return Reader("config", read, (b"seed: 3\ndomain: {illegal: [a, b], legal: [c]}\nmask:\n  freeze_ratio: 0.5\n",))
