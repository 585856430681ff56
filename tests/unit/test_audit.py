"""The audit finds one changed bit of one frozen tensor, and says so through the command line's exit code."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from raygard import cli
from raygard.errors import RaygardError
from raygard.mask import FreezeMask
from raygard.mask.weights import STEM, load_denoiser_state
from tests.latents import equal

FROZEN = ("0.weight", "1.bias")
State = dict[str, Tensor]
Runner = Callable[..., tuple[int, str, str]]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))


def state() -> State:
    return {name: tensor.clone() for name, tensor in net().state_dict().items()}


MASK = FreezeMask.create(net(), FROZEN, base_model="net")


def refused(base: State, tuned: State) -> str:
    with pytest.raises(RaygardError) as caught:
        MASK.audit(base, tuned)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(name=st.sampled_from(sorted(state())), place=st.integers(0, 10**6), up=st.booleans())
def test_one_element_moved_by_the_smallest_step_is_found(name: str, place: int, up: bool) -> None:
    tuned = state()
    flat = tuned[name].view(-1)
    index = place % len(flat)
    flat[index] = torch.nextafter(flat[index], torch.tensor(torch.inf if up else -torch.inf))
    report = MASK.audit(state(), tuned)
    assert report.ok == (name not in FROZEN)
    if not report.ok:
        (moved,) = report.moved
        assert (moved.name, moved.num_elements) == (name, 1)
        assert moved.max_abs_difference == float((state()[name].double() - tuned[name].double()).abs().max()) > 0


def test_an_untouched_model_passes_and_the_report_counts() -> None:
    report = MASK.audit(state(), state())
    assert (report.ok, report.num_frozen, report.num_tensors, report.compared_dtypes) == (True, 2, 4, ("float32",))
    assert json.loads(json.dumps(report.to_json()))["moved"] == []


@pytest.mark.parametrize(("before", "after"), [(0.0, -0.0), (-0.0, 0.0), (1.0, torch.nan), (1.0, torch.inf)])
def test_bits_count_not_values(before: float, after: float) -> None:
    base, tuned = state(), state()
    base["1.bias"][1], tuned["1.bias"][1] = before, after
    module = net()
    module.load_state_dict(base)
    mask = FreezeMask.create(module, FROZEN)
    assert mask.audit(base, base).ok
    report = mask.audit(base, tuned)
    assert [(moved.name, moved.num_elements) for moved in report.moved] == [("1.bias", 1)]
    text = json.dumps(report.to_json(), allow_nan=False)
    assert json.loads(text)["moved"][0]["max_abs_difference"] == (0.0 if before == 0 else None)


def test_a_nan_of_the_base_is_no_move() -> None:
    base = state()
    base["1.bias"][0] = torch.nan
    module = net()
    module.load_state_dict(base)
    assert FreezeMask.create(module, FROZEN).audit(base, base).ok


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_as_it_is_stored(dtype: torch.dtype) -> None:
    tuned = {name: tensor.to(dtype) for name, tensor in state().items()}
    report = MASK.audit(state(), tuned)
    assert report.ok and report.compared_dtypes == (str(dtype).removeprefix("torch."),)
    bits = tuned["0.weight"].view(torch.int16).view(-1)
    bits[7] ^= 1
    assert [(m.name, m.num_elements) for m in MASK.audit(state(), tuned).moved] == [("0.weight", 1)]


def test_a_half_precision_base_and_its_float32_fine_tune() -> None:
    base = {name: tensor.half() for name, tensor in state().items()}
    mask = FreezeMask.create(net().half(), FROZEN)
    tuned = {name: tensor.float() for name, tensor in base.items()}
    assert mask.audit(base, tuned).ok
    tuned["0.weight"][0, 0] += 1e-6
    assert not mask.audit(base, tuned).ok


def test_what_cannot_be_compared_is_refused() -> None:
    base = state()
    assert "model has no tensor '0.weight'" in refused(base, {k: v for k, v in base.items() if k != "0.weight"})
    assert "base has no tensor '1.bias'" in refused(*[{k: v for k, v in base.items() if k != "1.bias"}] * 2)
    assert "shape (5, 4) in the model" in refused(base, {**base, "0.weight": base["0.weight"].T.contiguous()})
    assert "stored as torch.int8" in refused(base, {**base, "0.weight": base["0.weight"].to(torch.int8)})
    assert "'0.lora_A' that the base does not have" in refused(base, {**base, "0.lora_A": torch.zeros(2)})


def test_another_base_is_refused() -> None:
    other = {**state(), "1.bias": torch.zeros(3)}
    assert "'1.bias' has other values" in refused(other, other)
    half = {name: tensor.half() for name, tensor in state().items()}
    assert "stored as torch.float16; give it as it was released" in refused(half, state())
    assert MASK.audit({**state(), "0.bias": torch.zeros(4)}, state()).ok


# Files


def shard(folder: Path, index: str = f"{STEM}.safetensors.index.json") -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    whole, where = state(), {}
    for number, name in enumerate(sorted(whole)):
        file = f"{STEM}-{number % 2 + 1:05d}-of-00002.safetensors"
        where[name] = file
    for file in set(where.values()):
        save_file({name: whole[name] for name in where if where[name] == file}, str(folder / file))
    table = {"metadata": {}, "weight_map": where}
    (folder / index).write_text(json.dumps(table))
    return table


@pytest.mark.parametrize("place", ["", "unet", "transformer"])
@pytest.mark.parametrize("name", [f"{STEM}.safetensors", f"{STEM}.fp16.safetensors"])
def test_one_file_is_found_in_a_pipeline_and_in_a_denoiser_folder(tmp_path: Path, place: str, name: str) -> None:
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    save_file(state(), str(folder / name))
    assert equal(load_denoiser_state(tmp_path), state())
    assert equal(load_denoiser_state(folder / name), state())


@pytest.mark.parametrize("infix", ["", ".fp16"])
def test_shards_are_joined(tmp_path: Path, infix: str) -> None:
    shard(tmp_path / "unet", f"{STEM}.safetensors.index{infix}.json")
    assert equal(load_denoiser_state(tmp_path), state())
    (tmp_path / "unet" / f"{STEM}.safetensors.index{infix}.json").rename(
        tmp_path / "unet" / f"{STEM}{infix}.safetensors.index.json"
    )
    assert equal(load_denoiser_state(tmp_path), state())


def test_the_file_that_diffusers_loads_is_audited_and_not_a_variant_beside_it(tmp_path: Path) -> None:
    shard(tmp_path, f"{STEM}.fp16.safetensors.index.json")
    moved = {name: tensor + 1 for name, tensor in state().items()}
    save_file(moved, str(tmp_path / f"{STEM}.safetensors"))
    assert equal(load_denoiser_state(tmp_path), moved)


@pytest.mark.parametrize("decoy", ["", "unet"])
def test_a_second_denoiser_does_not_stand_in_for_the_one_that_is_loaded(tmp_path: Path, decoy: str) -> None:
    for place in (decoy, "transformer"):
        (tmp_path / place).mkdir(exist_ok=True)
        save_file(state(), str(tmp_path / place / f"{STEM}.safetensors"))
    with pytest.raises(RaygardError, match="several denoisers"):
        load_denoiser_state(tmp_path)
    assert equal(load_denoiser_state(tmp_path / "transformer"), state())


def test_weights_that_cannot_be_trusted_are_refused(tmp_path: Path) -> None:
    (tmp_path / f"{STEM}.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(RaygardError, match="pickled weights only"):
        load_denoiser_state(tmp_path)
    with pytest.raises(RaygardError, match="pickled weights are never read"):
        load_denoiser_state(tmp_path / f"{STEM}.bin")
    (tmp_path / f"{STEM}.safetensors").write_bytes(pickle.dumps({}))
    with pytest.raises(RaygardError, match="damaged or incomplete"):
        load_denoiser_state(tmp_path)
    save_file(state(), str(tmp_path / f"{STEM}.safetensors"))
    whole = (tmp_path / f"{STEM}.safetensors").read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        (tmp_path / f"{STEM}.safetensors").write_bytes(whole[:length])
        with pytest.raises(RaygardError, match="damaged or incomplete") as caught:
            load_denoiser_state(tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RaygardError, match="holds no diffusion_pytorch_model"):
        load_denoiser_state(tmp_path / "empty")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..\\b.safetensors", "x.bin", "", 7, None, []]
)
def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path, name: object) -> None:
    save_file(state(), str(tmp_path / "outside.safetensors"))
    table = shard(tmp_path / "unet")
    table["weight_map"]["0.weight"] = name
    (tmp_path / "unet" / f"{STEM}.safetensors.index.json").write_text(json.dumps(table))
    with pytest.raises(RaygardError, match=r"in the same folder|no readable weight_map"):
        load_denoiser_state(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}', "\udcff"])
def test_a_damaged_index_is_refused(tmp_path: Path, text: str) -> None:
    shard(tmp_path)
    index = tmp_path / f"{STEM}.safetensors.index.json"
    index.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RaygardError, match="no readable weight_map"):
        load_denoiser_state(tmp_path)


def test_missing_and_exchanged_shards_are_refused(tmp_path: Path) -> None:
    table = shard(tmp_path)
    first, second = (tmp_path / name for name in sorted(set(table["weight_map"].values())))
    whole = first.read_bytes()
    first.unlink()
    with pytest.raises(RaygardError, match=first.name):
        load_denoiser_state(tmp_path)
    first.write_bytes(second.read_bytes())
    with pytest.raises(RaygardError, match="does not hold the tensors"):
        load_denoiser_state(tmp_path)
    first.write_bytes(whole)
    assert equal(load_denoiser_state(tmp_path), state())


# Command line


@pytest.fixture
def raygard(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["raygard", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def written(folder: Path, tuned: State) -> list[str]:
    for name, tensors in (("base", state()), ("tuned", tuned)):
        (folder / name / "unet").mkdir(parents=True)
        save_file(tensors, str(folder / name / "unet" / f"{STEM}.safetensors"))
    MASK.save(folder / "mask")
    return ["audit", "--base", str(folder / "base"), "--model", str(folder / "tuned"), "--mask", str(folder / "mask")]


def test_exit_code_0_for_a_kept_mask(tmp_path: Path, raygard: Runner) -> None:
    command = written(tmp_path, {**state(), "0.bias": torch.zeros(4)})
    code, out, err = raygard(*command)
    assert (code, err) == (0, "") and "the mask was kept" in out and "2 frozen of 4 tensors" in out
    code, out, _ = raygard(*command, "--json")
    assert code == 0 and json.loads(out)["ok"] is True


def test_exit_code_3_lists_the_moved_tensors(tmp_path: Path, raygard: Runner) -> None:
    tuned = state()
    tuned["1.bias"][2] = torch.nan
    command = written(tmp_path, tuned)
    code, out, _ = raygard(*command)
    assert code == 3 and "moved  1.bias  1 elements" in out and "0.weight" not in out
    code, out, _ = raygard(*command, "--json")
    assert code == 3
    found = json.loads(out, parse_constant=pytest.fail)
    assert found["ok"] is False and [moved["name"] for moved in found["moved"]] == ["1.bias"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "mask" / "mask.json").unlink(), "is not a mask"),
        (lambda folder: (folder / "tuned" / "unet" / f"{STEM}.safetensors").write_bytes(b"x"), "damaged"),
        (lambda folder: (folder / "base").rename(folder / "gone"), "no model at"),
        (lambda folder: save_file({}, str(folder / "base/unet" / f"{STEM}.safetensors")), "no tensor '0.weight'"),
        (lambda folder: save_file(net()[:1].state_dict(), str(folder / "tuned/unet" / f"{STEM}.safetensors")),
         "no tensor '1.bias'"),
    ],
)  # fmt: skip
def test_exit_code_2_for_bad_input(
    tmp_path: Path, raygard: Runner, damage: Callable[[Path], object], message: str
) -> None:
    command = written(tmp_path, state())
    damage(tmp_path)
    code, out, err = raygard(*command)
    assert (code, out) == (2, "")
    assert err.startswith("raygard: ") and err.count("\n") == 1 and message in err
