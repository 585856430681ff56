"""The one place where pictures are opened: files from elsewhere, any of which may be broken or hostile.

What a file is, its ending must say; how many pixels it has is known before any is decoded.
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from raygard.errors import RaygardError
from raygard.files import read_limited

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

# Raster formats only: other decoders of Pillow start programs (EPS) or are hardly ever used. MPO is a JPEG with
# further pictures behind it, as many phones write it.
ENDINGS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
}
FORMATS = tuple(name for name in ENDINGS if name != "MPO")
SUFFIXES = frozenset(ending for endings in ENDINGS.values() for ending in endings)
# What Pillow lets through for damaged files, and for tags of other kinds than their format's.
DAMAGED_PICTURE = (
    *(OSError, SyntaxError, ValueError, EOFError, TypeError, AttributeError, LookupError, OverflowError),
    struct.error,
)
# 256 MiB as RGBA; above what any stage keeps of a picture by far.
MAX_PIXELS = 2**26
MAX_FILE_BYTES = 2**28


def read_picture(path: Path) -> Image:
    """A picture file as RGB, upright, transparency on white.

    Raises RaygardError naming the file if it cannot be read, is larger than MAX_FILE_BYTES, or as `decode_picture`.
    """
    from PIL import Image

    try:
        data = read_limited(path, MAX_FILE_BYTES)
    except OSError as error:
        raise RaygardError(f"cannot read picture {path}: {error.strerror or error}") from None
    image = decode_picture(data, str(path))
    if image.mode == "P" or "A" in image.mode or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def decode_picture(data: bytes, name: str) -> Image:
    """The first picture in a file of these bytes, upright, in its own mode.

    name: path of the file, for its ending and for what is said. Raises RaygardError for an ending that is not one of
    SUFFIXES or not that of the content, more pixels than MAX_PIXELS, and whatever cannot be decoded.
    """
    from PIL import Image, UnidentifiedImageError

    ending = Path(name).suffix.lower()
    if ending not in SUFFIXES:
        raise RaygardError(f"{name} does not end like a picture ({', '.join(sorted(SUFFIXES))})")
    try:
        with warnings.catch_warnings():
            # Pillow warns of sizes that are refused here, and at length of damaged tags that decide nothing.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if ending not in ENDINGS[str(image.format)]:
                    fitting = ENDINGS[str(image.format)][0]
                    raise RaygardError(f"{name} holds a {image.format} picture; rename it to {fitting} or convert it")
                if image.width * image.height > MAX_PIXELS:
                    size = f"{image.width} x {image.height}"
                    raise RaygardError(f"{name} has {size} pixels; at most {MAX_PIXELS} are read")
                image.load()
                return _upright(image)
    except UnidentifiedImageError:
        raise RaygardError(f"{name} is not a picture raygard can read ({', '.join(FORMATS)})") from None
    except RaygardError:
        raise
    except Image.DecompressionBombError:
        raise RaygardError(f"{name} has far too many pixels; at most {MAX_PIXELS} are read") from None
    except DAMAGED_PICTURE as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise RaygardError(f"cannot read picture {name}: {why}") from None


def _upright(image: Image) -> Image:
    """The picture turned as its EXIF tag says."""
    from PIL import ExifTags
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    # ImageOps.exif_transpose writes all tags anew, which fails for those of other kinds than the standard's.
    turn = turns.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image.copy() if turn is None else image.transpose(turn)


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
