"""Reading a Hugging Face imagefolder: table, paths and pictures, any of which may be broken or hostile."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from raygard.errors import RaygardError, nearest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

# Raster formats only: other decoders of Pillow start programs (EPS) or are hardly ever used.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
METADATA = ("metadata.jsonl", "metadata.csv")
ONE_CLASS = "all"


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    path: Path
    caption: str
    cls: str


def resolve_data(name: str) -> Path:
    """Folder of a domain: a path, or `zoo:emoji-styles` (bundled). Raises RaygardError if it is missing."""
    if name.startswith("zoo:"):
        zoo = Path(__file__).parent / "zoo"
        folder = zoo / name.removeprefix("zoo:").replace("-", "_")
        if folder.parent != zoo or not (folder / METADATA[0]).is_file():
            known = sorted(f"zoo:{p.parent.name.replace('_', '-')}" for p in zoo.glob(f"*/{METADATA[0]}"))
            raise RaygardError(f"no bundled domain '{name}'{nearest(name, known)}")
        return folder
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise RaygardError(f"no data folder at {folder} (domain.data)")
    return folder


def has_column(folder: Path, column: str) -> bool:
    """Whether any row of the folder's table has `column`; a folder without a table has its classes as folders."""
    table = _table(folder)
    return table is None or any(column in row for _, row in _rows(table))


def read_entries(folder: Path, caption_column: str, class_column: str | None) -> list[Entry]:
    """Rows of `metadata.jsonl` or `metadata.csv`, with checked paths; else one folder for each class.

    class_column: None puts all pictures of a table into one class, ONE_CLASS.
    Raises RaygardError naming the row for an unreadable table, a missing column, caption or class, and a file
    name that is absolute, leaves the folder (also through a symbolic link) or does not exist.
    """
    table = _table(folder)
    if table is None:
        return _class_folders(folder)
    rows = _rows(table)
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    needed = {
        "file_name": "",
        caption_column: " (domain.caption_column)",
        **({class_column: " (domain.class_column)"} if class_column is not None else {}),
    }
    for column, setting in needed.items():
        if column not in columns:
            raise RaygardError(
                f"{table} has no column '{column}'{setting}{nearest(column, columns)}; "
                f"columns found: {', '.join(columns) or 'none'}"
            )
    root = folder.resolve()
    return [
        Entry(
            _inside(folder, root, _text(row, "file_name", f"{table}, line {line}"), f"{table}, line {line}"),
            _text(row, caption_column, f"{table}, line {line}"),
            ONE_CLASS if class_column is None else _text(row, class_column, f"{table}, line {line}"),
        )
        for line, row in rows
    ]


def _table(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def _rows(table: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        return _read_jsonl(table) if table.suffix == ".jsonl" else _read_csv(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RaygardError(f"cannot read {table}: {str(error).splitlines()[0]}") from None


def _read_jsonl(table: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for line, text in enumerate(table.read_text(encoding="utf-8").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise RaygardError(f"{table}, line {line} is not valid JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise RaygardError(f"{table}, line {line}: expected an object, found {type(row).__name__}")
        rows.append((line, row))
    return rows


def _read_csv(table: Path) -> list[tuple[int, dict[str, Any]]]:
    with table.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, restkey="", strict=True)
        return [(reader.line_num, {key: value for key, value in row.items() if key}) for row in reader]


def _text(row: dict[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise RaygardError(f"{where}: '{column}' is empty or not text ({value!r})")
    return value


def _inside(folder: Path, root: Path, name: str, where: str) -> Path:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\0" in name:
        raise RaygardError(f"{where}: file_name {name!r} must be a path inside the folder, without '..'")
    path = folder / pure
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise RaygardError(f"{where}: {path} does not exist") from None
    if not target.is_relative_to(root):
        raise RaygardError(f"{where}: {path} is a link that leaves the folder")
    if not target.is_file():
        raise RaygardError(f"{where}: {path} is not a file")
    return path


def _class_folders(folder: Path) -> list[Entry]:
    root, entries = folder.resolve(), []
    for directory in sorted(path for path in folder.iterdir() if path.is_dir()):
        for path in sorted(directory.iterdir()):
            if path.suffix.lower() in SUFFIXES:
                name = path.relative_to(folder).as_posix()
                inside = _inside(folder, root, name, str(folder))
                entries.append(Entry(inside, directory.name.replace("_", " "), directory.name))
    if not entries:
        raise RaygardError(f"{folder} holds no {' or '.join(METADATA)} and no folder for each class (domain.data)")
    return entries


def read_picture(path: Path) -> Image:
    """Decode a picture as RGB, upright, transparency on white. Raises RaygardError naming the file."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    limit = Image.MAX_IMAGE_PIXELS
    try:
        with Image.open(io.BytesIO(path.read_bytes()), formats=FORMATS) as image:
            if limit is not None and image.width * image.height > limit:
                size = f"{image.width} x {image.height}"
                raise RaygardError(f"{path} has {size} pixels; at most {limit} are read")
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode == "P" or "A" in upright.mode or "transparency" in upright.info:
                layer = upright.convert("RGBA")
                white = Image.new("RGBA", layer.size, "white")
                return Image.alpha_composite(white, layer).convert("RGB")
            return upright.convert("RGB")
    except UnidentifiedImageError:
        raise RaygardError(f"{path} is not a picture raygard can read ({', '.join(FORMATS)})") from None
    except RaygardError:
        raise
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError) as error:
        raise RaygardError(f"cannot read picture {path}: {str(error).splitlines()[0]}") from None


def digest(image: Image) -> str:
    """SHA-256 (hex) of the size and the RGB pixels."""
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).hexdigest()


def read_pixels(path: Path, resolution: int, center_crop: bool = True) -> NDArray[np.uint8]:
    """Picture as uint8 (resolution, resolution, 3): shorter side to `resolution` (bilinear), then a square
    crop.

    As diffusers' training scripts do it, except that without `center_crop` the place of the crop is drawn
    from the picture's hash, so that it is the same every time.
    """
    import numpy as np
    import torch
    from PIL.Image import Resampling

    from raygard.seeding import generator

    image = read_picture(path)
    scale = resolution / min(image.size)
    width, height = (resolution if side == min(image.size) else int(side * scale) for side in image.size)
    size = (width, height)
    resized = image if size == image.size else image.resize(size, Resampling.BILINEAR)
    spare = [side - resolution for side in size]
    if center_crop:
        left, top = (round(length / 2) for length in spare)
    else:
        rng = generator("crop", digest(image))
        left, top = (int(torch.randint(length + 1, (), generator=rng)) for length in spare)
    return np.array(resized.crop((left, top, left + resolution, top + resolution)))
