"""Pictures from elsewhere: refused in one line, before their pixels take memory, by the one place that opens any."""

from __future__ import annotations

import ast
import io
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raygard.errors import RaygardError
from raygard.pictures import ENDINGS, MAX_FILE_BYTES, MAX_PIXELS, SUFFIXES, read_picture

ROOT = Path(__file__).resolve().parents[2]


def encoded(form: str, side: int = 8, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(side * side * 3, dtype=np.uint8).reshape(side, side, 3)).save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(width: int, height: int, rows: int = 0) -> bytes:
    """A PNG of zeros that claims this size and, compressed, holds that many of its rows."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes((width * 3 + 1) * rows), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def exif(*entries: tuple[int, int, int, int]) -> bytes:
    """Tags as (number, type, count, value), little-endian."""
    tags = b"".join(struct.pack("<HHLL", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<LH", 8, len(entries)) + tags + bytes(64)


def huge_gif(side: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", side, side, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, side, side, 0)


def huge_bmp(side: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header


def huge_webp(side: int) -> bytes:
    size = (side - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\x00\x00\x00" + size + size
    return b"RIFF" + struct.pack("<I", len(body)) + body


@contextmanager
def little_memory() -> Iterator[None]:
    """Fails if the block holds 64 MiB more than before at any time."""
    # Linux forgets the highest amount so far; without that, whatever ran before would hide what the block takes.
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_kib()
    yield
    assert peak_kib() - before < 64 * 1024


def peak_kib() -> int:
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def refused(path: Path) -> str:
    with pytest.raises(RaygardError) as caught:
        read_picture(path)
    text = str(caught.value)
    assert str(path) in text and text.isprintable()
    return text


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("hundred.png", huge_png(10_000, 10_000)),
        ("bomb.png", huge_png(60_000, 60_000, rows=2)),
        ("wide.png", huge_png(2**31 - 1, 1)),
        ("screen.gif", huge_gif(40_000)),
        ("claims.bmp", huge_bmp(30_000)),
        ("canvas.webp", huge_webp(16_384)),
    ],
)
def test_a_huge_picture_is_refused_before_it_takes_memory(tmp_path: Path, name: str, data: bytes) -> None:
    assert len(data) < 10**6
    (tmp_path / name).write_bytes(data)
    with little_memory():
        text = refused(tmp_path / name)
    assert "pixels" in text or "cannot read" in text or "not a picture" in text


def test_the_limit_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    monkeypatch.setattr("raygard.pictures.MAX_PIXELS", 64)
    assert read_picture(tmp_path / "a.png").size == (8, 8)
    monkeypatch.setattr("raygard.pictures.MAX_PIXELS", 63)
    assert "8 x 8 pixels; at most 63" in refused(tmp_path / "a.png")
    assert MAX_PIXELS < 100e6


def test_the_limit_does_not_depend_on_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries switch Pillow's own limit off for the whole process."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "hundred.png").write_bytes(huge_png(10_000, 10_000))
    assert "10000 x 10000 pixels" in refused(tmp_path / "hundred.png")


def test_a_large_file_and_what_is_no_file_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large.png").open("wb") as stream:
        stream.truncate(MAX_FILE_BYTES + 1)
    assert "larger than 256 MiB" in refused(tmp_path / "large.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a file" in refused(tmp_path / "pipe.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    assert "not a file" in refused(tmp_path / "endless.png")


def test_compressed_text_and_profiles_stay_small(tmp_path: Path) -> None:
    """Bombs beside the pixels: endless text, an endless colour profile."""
    bomb = zlib.compress(bytes(100 * 2**20))
    data = encoded("PNG")
    start = data.index(b"IDAT") - 4
    for kind in (chunk(b"zTXt", b"a\0\0" + bomb), chunk(b"iCCP", b"a\0\0" + bomb)):
        (tmp_path / "a.png").write_bytes(data[:start] + kind + data[start:])
        with little_memory():
            try:
                read_picture(tmp_path / "a.png")
            except RaygardError as error:
                assert str(error).isprintable()


def test_the_measurement_sees_memory() -> None:
    with pytest.raises(AssertionError), little_memory():
        assert np.ones(2**27, dtype=np.uint8).all()


@pytest.mark.parametrize("form", sorted(set(ENDINGS) - {"MPO"}))
def test_the_ending_must_be_that_of_the_content(tmp_path: Path, form: str) -> None:
    data = encoded(form)
    for ending in sorted(SUFFIXES):
        path = tmp_path / f"x{ending.upper()}"
        path.write_bytes(data)
        if ending in ENDINGS[form]:
            assert read_picture(path).size == (8, 8)
        else:
            assert f"holds a {form} picture; rename it to {ENDINGS[form][0]}" in refused(path)
    for name in ("x.txt", "x", "x.svg", ".png"):
        (tmp_path / name).write_bytes(data)
        assert "does not end like a picture" in refused(tmp_path / name)


@pytest.mark.parametrize("data", [b"", b"just text\n", b"%!PS-Adobe\n", b"<svg/>", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture(tmp_path: Path, data: bytes) -> None:
    for ending in (".jpg", ".png"):
        (tmp_path / f"x{ending}").write_bytes(data)
        refused(tmp_path / f"x{ending}")


@pytest.mark.parametrize("form", sorted(set(ENDINGS) - {"MPO"}))
def test_a_picture_cut_off_anywhere_is_refused_or_whole(tmp_path: Path, form: str) -> None:
    data = encoded(form, side=24)
    path = tmp_path / f"x{ENDINGS[form][0]}"
    path.write_bytes(data)
    whole = read_picture(path).tobytes()
    for end in range(0, len(data) - 1, 1 + len(data) // 60):
        path.write_bytes(data[:end])
        try:
            # Some formats end with bytes that say nothing of the picture.
            assert read_picture(path).tobytes() == whole
        except RaygardError as error:
            assert str(error).isprintable()
    path.write_bytes(data[: len(data) // 2])
    refused(path)


def test_a_phones_jpeg_with_a_second_picture_is_a_jpeg(tmp_path: Path) -> None:
    second = Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8))
    (tmp_path / "x.jpg").write_bytes(encoded("MPO", save_all=True, append_images=[second]))
    assert read_picture(tmp_path / "x.jpg").size == (8, 8)


def test_nothing_else_opens_pictures() -> None:
    """Whatever reads pictures goes through raygard/pictures.py, so its limits hold for all of them."""
    openers = {"imread", "imdecode", "load_image", "read_image", "decode_image", "decode_png", "decode_jpeg", "imopen"}
    found = []
    for path in [p for room in ("raygard", "jobs", "benchmarks", "clusters") for p in (ROOT / room).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            owner = ast.unparse(node.value)
            if node.attr in openers or (node.attr == "open" and owner.split(".")[-1] == "Image"):
                found.append((path.relative_to(ROOT).as_posix(), f"{owner}.{node.attr}"))
    assert found == [("raygard/pictures.py", "Image.open")]


def test_no_decoder_starts_a_program(tmp_path: Path) -> None:
    """Pillow hands EPS to Ghostscript; ours is never asked, whatever the file is called."""
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    code = (
        "import sys\nfrom pathlib import Path\nfrom raygard.pictures import read_picture\n"
        "sys.addaudithook(lambda name, _: name == 'subprocess.Popen' and sys.exit('started a program'))\n"
        "try:\n    read_picture(Path(sys.argv[1]))\nexcept ValueError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.png")], capture_output=True, text=True)
    assert done.returncode == 0 and "not a picture" in done.stdout, done


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("other", [(0x0100, 11, 1, 0), (0x010F, 11, 1, 0), (0x829A, 5, 1, 8)])
def test_a_picture_with_a_strange_tag_is_turned_like_any_other(
    form: str, other: tuple[int, int, int, int], tmp_path: Path
) -> None:
    """No tag but the orientation decides anything, so what others hold is nobody's business."""
    plain, turned = (tmp_path / f"{name}{ENDINGS[form][0]}" for name in ("plain", "turned"))
    plain.write_bytes(encoded(form))
    turned.write_bytes(encoded(form, exif=exif((0x0112, 3, 1, 6), other)))
    expected = read_picture(plain).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(read_picture(turned)), np.asarray(expected))


@pytest.mark.parametrize("error", [EOFError(), struct.error("odd"), OverflowError("odd"), TypeError("odd")])
def test_whatever_a_decoder_raises_is_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> None:
        raise error

    (tmp_path / "x.png").write_bytes(encoded("PNG"))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fails)
    assert refused(tmp_path / "x.png").endswith(str(error) or "EOFError")
