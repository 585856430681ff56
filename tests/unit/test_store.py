"""The content store: whole files or none, keys that follow content, records that are not trusted blindly."""

from __future__ import annotations

import errno
import multiprocessing
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raygard.errors import RaygardError
from raygard.store import Store, content_key, read_pictures

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=8,
)
contents = st.dictionaries(st.text(max_size=4), json_values, min_size=1, max_size=4)


@settings(deadline=None)
@given(contents, st.randoms(use_true_random=False))
def test_key_does_not_depend_on_the_order_of_its_parts(content, random) -> None:
    shuffled = list(content.items())
    random.shuffle(shuffled)
    assert content_key(content) == content_key(dict(shuffled))


@settings(deadline=None)
@given(contents, contents)
def test_keys_differ_where_contents_differ(first, second) -> None:
    # JSON text tells 1 from True, Python's equality does not.
    assert (content_key(first) == content_key(second)) == (_typed(first) == _typed(second))


def _typed(value):
    if isinstance(value, dict):
        return {key: _typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_typed(item) for item in value]
    return type(value).__name__, value


def images(n: int = 3) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)


def test_what_is_written_is_read_back(tmp_path) -> None:
    store = Store(tmp_path)
    tensors = {"w": torch.arange(6.0).reshape(2, 3).T}
    assert store.adapted("k") is None and not store.has_tensors("k") and not store.has_pictures("k")
    store.write_adapted("k", {"losses": [1.0]}, tensors)
    store.write_pictures("k", images())
    store.write_score("k", "style", {"references": "r", "distances": [0.5]})
    from safetensors.torch import load_file

    assert store.adapted("k")["losses"] == [1.0] and store.has_tensors("k")
    assert torch.equal(load_file(store.tensors_file("k"))["w"], tensors["w"])
    assert np.array_equal(read_pictures(store.pictures_file("k")), images())
    assert store.score("k", "style", "r")["distances"] == [0.5]
    store.drop_tensors("k")
    assert not store.has_tensors("k") and store.adapted("k") is not None


def test_score_of_other_references_or_another_scorer_does_not_count(tmp_path) -> None:
    store = Store(tmp_path)
    store.write_score("k", "style", {"references": "r", "distances": [0.5]})
    assert store.score("k", "style", "other") is None
    assert store.score("k", "face", "r") is None
    assert store.score("other", "style", "r") is None


@pytest.mark.parametrize("damage", [b"", b"torn", b"\x00" * 200])
def test_damaged_tensors_are_not_taken(tmp_path, damage) -> None:
    store = Store(tmp_path)
    store.write_adapted("k", {}, {"w": torch.ones(3)})
    store.tensors_file("k").write_bytes(damage)
    assert not store.has_tensors("k")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_damaged_records_are_as_good_as_absent(tmp_path, text) -> None:
    store = Store(tmp_path)
    store.write_adapted("k", {}, {"w": torch.ones(3)})
    (store.folder("k") / "adapted.json").write_text(text)
    assert store.adapted("k") is None and not store.has_tensors("k")


def test_damaged_pictures_are_refused_in_one_line(tmp_path) -> None:
    store = Store(tmp_path)
    store.write_pictures("k", images())
    whole = store.pictures_file("k").read_bytes()
    for damage in (b"", b"no archive", whole[: len(whole) // 2]):
        store.pictures_file("k").write_bytes(damage)
        with pytest.raises(RaygardError, match="cannot read") as caught:
            read_pictures(store.pictures_file("k"))
        assert "\n" not in str(caught.value)


def test_description_is_written_once(tmp_path) -> None:
    store = Store(tmp_path)
    store.describe("k", {"class": "a"})
    written = (store.folder("k") / "inputs.json").stat().st_mtime_ns
    store.describe("k", {"class": "a"})
    assert (store.folder("k") / "inputs.json").stat().st_mtime_ns == written


def test_full_disk_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch) -> None:
    store = Store(tmp_path)
    store.write_pictures("k", images())

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(RaygardError, match="no space left"):
        store.write_pictures("k", images(5))
    assert [file.name for file in store.folder("k").iterdir()] == ["pictures.npz"]
    assert np.array_equal(read_pictures(store.pictures_file("k")), images())


def race(root: str, rounds: int) -> None:
    store = Store(root)
    for _ in range(rounds):
        store.write_adapted("k", {"losses": [0.5] * 100}, {"w": torch.ones(2000)})
        store.write_pictures("k", images())


def test_racing_writers_and_a_reader_see_whole_files_only(tmp_path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=race, args=(tmp_path, 15)) for _ in range(2)]
    for writer in writers:
        writer.start()
    store, seen = Store(tmp_path), 0
    while any(writer.is_alive() for writer in writers):
        if store.has_pictures("k"):
            assert np.array_equal(read_pictures(store.pictures_file("k")), images())
            assert store.adapted("k")["losses"] == [0.5] * 100
            seen += 1
    assert seen > 0 and all(writer.exitcode == 0 for writer in writers)
    assert store.has_tensors("k")
    assert {file.name for file in store.folder("k").iterdir()} == {
        "adapted.json",
        "adapted.safetensors",
        "pictures.npz",
    }
