"""Damaged and hostile files: 100,000 of them, and not one crash (about a minute; `pytest -m fuzz`)."""

from __future__ import annotations

import json
import math
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.readers import Reader, make_readers

pytestmark = pytest.mark.fuzz

# Masks and metadata come first, 100,000 together.
INPUTS = {
    "manifest": 30_000, "arrays": 10_000, "values": 10_000, "signature": 10_000,
    "metadata.jsonl": 20_000, "metadata.csv": 20_000,
    "index": 3_000, "lora": 3_000, "edit": 3_000, "picture": 10_000, "config": 3_000,
}  # fmt: skip
WORDS = [
    b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"9" * 5000, b"[" * 2000, b"{", b"}", b'"', b"\\", b"\\ud800",
    b"\\u0000", b"\x00", b"\xff", b"\xed\xa0\x80", b"\n", b"\r\n", b"\r", b",", b"..", b"/", b"../../x", b"C:", b"~",
    "\u2028".encode(), b"\x1b[2J", b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x00\x00\x00\x80",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**63, 10**400, 1e308, math.nan, math.inf, "", "0", "\n", "\x00", "\ud800", "..",
    "../x", "/etc/passwd", "C:\\x", "a" * 10_000, [], {}, [[]], [None], {"": 0}, {"a": {"a": {"a": []}}},
]  # fmt: skip


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where there is such a folder: every input is a file."""
    made = tempfile.mkdtemp(prefix="raygard-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    yield Path(made)
    shutil.rmtree(made)


def mutate_bytes(rng: random.Random, seeds: tuple[bytes, ...]) -> bytes:
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((0, 1, 1, 2, 8, 64)))
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[rng.randrange(len(data))] = rng.randrange(256)
        elif kind == 1:
            data[start:end] = rng.choice(WORDS)
        elif kind == 2:
            del data[start:end]
        elif kind == 3:
            data[start:start] = data[start:end] * rng.choice((1, 2, 50))
        elif kind == 4:
            del data[start:]
        else:
            other = rng.choice(seeds)
            cut = rng.randrange(len(other) + 1)
            data[start:end] = other[cut : cut + 64]
    return bytes(data)


def mutate_json(rng: random.Random, text: str) -> str:
    """Change one place of a JSON document; what it says elsewhere stays true, so that deep checks are reached."""
    content = json.loads(text)
    node = content
    while True:
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        if not (isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8):
            break
        node = node[key]
    kind = rng.randrange(5)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[rng.choice([value for value in VALUES if isinstance(value, str)])] = node.pop(key)
    elif kind == 2 and isinstance(node, list):
        node.insert(rng.randrange(len(node) + 1), rng.choice(node))
    elif kind == 3 and isinstance(node[key], str):
        node[key] = node[key][: rng.randrange(len(node[key]) + 1)] + rng.choice(WORDS).decode("latin-1")
    else:
        node[key] = rng.choice(VALUES)
    return json.dumps(content)


def mutate_lines(rng: random.Random, text: str) -> str:
    lines = text.removeprefix("\ufeff").splitlines()
    where = rng.randrange(len(lines))
    lines[where] = mutate_json(rng, lines[where])
    return "\n".join(lines)


def mutate_header(rng: random.Random, data: bytes) -> bytes:
    """Change the JSON header of a safetensors file and keep its length field right."""
    size = int.from_bytes(data[:8], "little")
    header = mutate_json(rng, data[8 : 8 + size].decode()).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


STRUCTURED: dict[str, Callable[[random.Random, bytes], bytes]] = {
    **dict.fromkeys(("manifest", "signature", "index"), lambda rng, d: mutate_json(rng, d.decode()).encode()),
    **dict.fromkeys(("arrays", "values", "lora", "edit"), mutate_header),
    "metadata.jsonl": lambda rng, d: mutate_lines(rng, d.decode()).encode(),
}


def inputs(reader: Reader) -> Iterator[bytes]:
    rng = random.Random(f"raygard {reader.name}")
    structured = STRUCTURED.get(reader.name)
    for _ in range(INPUTS[reader.name]):
        if structured is not None and rng.random() < 0.5:
            yield structured(rng, rng.choice(reader.seeds))
        else:
            yield mutate_bytes(rng, reader.seeds)


def test_no_file_crashes_a_reader(folder: Path) -> None:
    readers = make_readers(folder)
    assert {reader.name for reader in readers} == set(INPUTS) and sum(list(INPUTS.values())[:6]) >= 100_000
    for reader in readers:
        assert all(reader(seed) for seed in reader.seeds), f"{reader.name} refuses what it should read"
        refused = 0
        for number, data in enumerate(inputs(reader)):
            try:
                refused += not reader(data)
            except Exception as error:
                raise AssertionError(f"{reader.name}, input {number}: {data[:2000]!r}") from error
        # Most of what a mutation makes is wrong: a reader that takes it all looks at nothing.
        assert refused > INPUTS[reader.name] / 20, f"{reader.name} refused {refused}"
