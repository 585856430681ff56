"""The content store: whole files or none, keys that follow content, records that are not trusted blindly."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raygard.cluster.evaluation import EvaluationJob, base_loss
from raygard.cluster.evaluators import read_references
from raygard.cluster.jobs import base_loss_content, job_content
from raygard.errors import RaygardError
from raygard.files import scratch, write_text
from raygard.flow import Flow
from raygard.mask import FreezeMask
from raygard.store import Store, content_key, read_pictures
from tests.evaluation_bench import Bench, make_bench

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


def test_writers_of_one_file_do_not_share_a_scratch_file(tmp_path) -> None:
    # As two nodes would whose processes have the same id.
    with scratch(tmp_path / "f") as first, scratch(tmp_path / "f") as second:
        first.write_text("first")
        second.write_text("second")
    assert [file.name for file in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_text() == "first"


def test_equal_content_keeps_its_time_where_that_is_asked_for(tmp_path) -> None:
    file = tmp_path / "f"
    write_text(file, "a")
    os.utime(file, (1, 1))
    write_text(file, "a", keep_same=True)
    assert file.stat().st_mtime == 1
    write_text(file, "b", keep_same=True)
    assert file.stat().st_mtime > 1 and file.read_text() == "b"


def test_sweep_removes_what_is_old_and_keeps_what_may_be_in_use(tmp_path) -> None:
    store, yesterday = Store(tmp_path), time.time() - 90000
    store.sweep()
    for key in ("old", "new"):
        store.write_adapted(key, {"losses": [1.0]}, {"w": torch.ones(3)})
        store.write_pictures(key, images())
        (store.folder(key) / ".pictures.npz.0123.tmp").write_bytes(b"half")
    for file in store.folder("old").iterdir():
        os.utime(file, (yesterday, yesterday))
    store.sweep()
    assert {file.name for file in store.folder("old").iterdir()} == {"adapted.json", "pictures.npz"}
    assert store.has_tensors("new") and (store.folder("new") / ".pictures.npz.0123.tmp").exists()


# What decides a key


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tiny_maker, imagefolder_maker) -> Bench:
    return make_bench(tmp_path_factory.mktemp("bench"), tiny_maker, imagefolder_maker)


USER = EvaluationJob("freeze", "a", "illegal")


def key_of(bench: Bench, *overrides: str, job: EvaluationJob = USER, captions=("x", "y"), mask=None, cache=None) -> str:
    config = bench.config(*overrides)
    inputs = bench.inputs(config, bench.root / "store")
    inputs = inputs if cache is None else replace(inputs, cache=str(cache))
    return content_key(job_content(job, inputs, config, mask, captions))


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "adapt.learning_rate=2e-3",
        "adapt.mixed_precision=bf16",
        "generation.guidance_scale=2",
        "generation.num_images=4",
        "model.prediction_type=v_prediction",
        "domain.resolution=32",
        "domain.center_crop=false",
    ],
)
def test_settings_that_decide_a_result_decide_its_key(bench, override) -> None:
    assert key_of(bench, override) != key_of(bench)


@pytest.mark.parametrize("override", ["evaluation.generators=2", "engine.torch_threads=2", "mask.freeze_ratio=0.7"])
def test_settings_that_decide_nothing_leave_the_key(bench, override) -> None:
    assert key_of(bench, override) == key_of(bench)


def test_user_and_mask_decide_the_key_and_their_names_do_not(bench) -> None:
    mask = FreezeMask.load(bench.root / "mask")
    others = [
        key_of(bench, job=replace(USER, cls="b")),
        key_of(bench, job=replace(USER, seed=1)),
        key_of(bench, job=replace(USER, defence="base")),
        key_of(bench, captions=("x", "z")),
        key_of(bench, mask=mask),
    ]
    assert len({key_of(bench), *others}) == 1 + len(others)
    assert key_of(bench, job=replace(USER, defence="random", draw=3, mask_seed=5, role="legal")) == key_of(bench)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_every_part_of_the_model_decides_the_key(bench, tmp_path, part) -> None:
    shutil.copytree(bench.root / "sd", tmp_path / "sd")
    elsewhere = f"model.pretrained_model_name_or_path={tmp_path / 'sd'}"
    same = key_of(bench, elsewhere)
    shutil.copytree(tmp_path / "sd", tmp_path / "other")
    files = [*(tmp_path / "other" / part).iterdir()]
    for file in [file for file in files if file.suffix == ".safetensors"] or files:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    assert same == key_of(bench)
    assert key_of(bench, f"model.pretrained_model_name_or_path={tmp_path / 'other'}") != same


def test_pictures_that_are_trained_on_decide_the_key_and_others_do_not(bench, tmp_path) -> None:
    (cache,) = (bench.root / "cache").iterdir()
    (listing,) = cache.glob("*.json")
    manifest = json.loads(listing.read_text())
    rows = [*zip(manifest["classes"], manifest["parts"], strict=True)]
    keys = {}
    for cls, part in (("a", "select_adapt"), ("a", "select_reference"), ("b", "select_adapt")):
        changed = [*manifest["pictures"]]
        changed[rows.index((cls, part))] = "another picture"
        folder = tmp_path / f"{cls}-{part}"
        folder.mkdir()
        (folder / listing.name).write_text(json.dumps({**manifest, "pictures": changed}))
        keys[cls, part] = key_of(bench, cache=folder)
    assert [found != key_of(bench) for found in keys.values()] == [True, False, False]


def test_release_s_own_loss_is_taken_from_the_store(bench, tmp_path) -> None:
    config = bench.config("domain.general=[c]", "domain.legal=[d]")
    cache = bench.inputs(config, tmp_path).cache
    key = content_key(base_loss_content(config, cache))
    Store(tmp_path).write_base_loss(key, 0.25)
    assert base_loss(config, cache, str(tmp_path)) == 0.25
    other = bench.config("domain.general=[c]", "domain.legal=[d]", "seed=1")
    assert content_key(base_loss_content(other, cache)) != key


# Reference pictures


def test_references_are_written_once_and_mended(bench, tmp_path) -> None:
    flow = Flow(bench.config("tracking.enabled=false"), tmp_path / "run")
    file = Path(flow.evaluation_inputs(tmp_path / "run" / "evaluation").references)
    whole, written = file.read_bytes(), file.stat().st_mtime_ns
    assert read_references(file, "c")[1].shape[1:] == (16, 16, 3)
    flow.evaluation_inputs(tmp_path / "run" / "evaluation")
    assert file.stat().st_mtime_ns == written
    for damage in (b"", b"no archive", whole[: len(whole) // 2]):
        file.write_bytes(damage)
        with pytest.raises(RaygardError, match=r"references\.npz") as caught:
            read_references(file, "c")
        assert "\n" not in str(caught.value)
    flow.evaluation_inputs(tmp_path / "run" / "evaluation")
    assert file.read_bytes() == whole
