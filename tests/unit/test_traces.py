"""Sketches of updates, what is found in them, the folder they are kept in, and the audit that reads it."""

from __future__ import annotations

import json
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from raygard.cli import app
from raygard.errors import ExitCode, RaygardError
from raygard.seeding import generator
from raygard.traces import Reference, Sketcher, Traces, Update, findings, recall, share_of_pictures, steps_of
from raygard.traces.artifact import MANIFEST, SKETCHES, release_fingerprint

SECRET, OTHER = b"nobody has guessed it yet", b"somebody else's secret, longer"
SHAPES = {f"block{number}.weight": (24, 24) for number in range(12)} | {"head.bias": (8,)}
State = dict[str, Tensor]


def random_state(*names: object) -> State:
    rng = generator(0, "traces", *names)
    return {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}


BASE = random_state("base")


def fine_tuned(cls: str, run: object, own: float = 0.6, common: float = 0.5) -> State:
    """A user of a class: what all users do, what its class does, and what only it does."""
    parts = random_state("common"), random_state("class", cls), random_state("user", cls, run)
    return {
        name: BASE[name] + 0.01 * (common * parts[0][name] + own * parts[1][name] + parts[2][name]) for name in SHAPES
    }


def references(sketcher: Sketcher, classes: Sequence[str] = "abcdefg", forbidden: str = "ab") -> list[Reference]:
    return [
        Reference(cls, cls in forbidden, sketcher.update(BASE, fine_tuned(cls, run)), run // 2)
        for cls in classes
        for run in range(4)
    ]


@pytest.fixture(scope="module")
def sketcher() -> Sketcher:
    return Sketcher(SECRET, 256)


@pytest.fixture(scope="module")
def known(sketcher: Sketcher) -> list[Reference]:
    return references(sketcher)


def test_dot_products_of_sketches_are_those_of_the_updates() -> None:
    rng = generator(0, "dot")
    pair = [torch.randn(300, 300, generator=rng) for _ in range(2)]
    pair[1] += 0.5 * pair[0]
    cosine = float(torch.nn.functional.cosine_similarity(pair[0].flatten(), pair[1].flatten(), dim=0))
    first, second = (Sketcher(SECRET).moves({"w": move}).tensors["w"] for move in pair)
    assert float(first @ second) == pytest.approx(cosine, abs=4 / 2048**0.5)
    assert float(first @ Sketcher(OTHER).moves({"w": pair[0]}).tensors["w"]) == pytest.approx(0, abs=4 / 2048**0.5)


@pytest.mark.parametrize("size", [1, 100, 256])
def test_tensors_no_larger_than_a_sketch_keep_their_dot_products(sketcher: Sketcher, size: int) -> None:
    rng = generator(0, "small", size)
    pair = [torch.randn(size, generator=rng) for _ in range(2)]
    exact = float(torch.nn.functional.cosine_similarity(pair[0], pair[1], dim=0))
    first, second = (sketcher.moves({"w": move}).tensors["w"] for move in pair)
    assert float(first @ second) == pytest.approx(exact, abs=1e-5)


def test_a_sketch_is_what_it_was_on_other_machines() -> None:
    found = Sketcher(SECRET, 64).moves({"w": torch.arange(1.0, 201.0)}).tensors["w"]
    assert [round(float(x), 4) for x in found[:6]] == [-0.0738, 0.1391, -0.0415, -0.1074, 0.1086, 0.0]


def test_only_what_moved_is_sketched_and_rounding_is_no_move(sketcher: Sketcher) -> None:
    tuned = {name: tensor.clone() for name, tensor in BASE.items()}
    tuned["head.bias"] += 0.1
    assert set(sketcher.update(BASE, tuned).tensors) == {"head.bias"}
    halves = {name: tensor.half() for name, tensor in tuned.items()}
    assert set(sketcher.update(BASE, halves).tensors) == {"head.bias"}


def test_other_models_are_refused(sketcher: Sketcher) -> None:
    with pytest.raises(RaygardError, match=r"has no tensor 'head\.bias'"):
        sketcher.update(BASE, {name: t for name, t in BASE.items() if name != "head.bias"})
    with pytest.raises(RaygardError, match=r"shape \(9,\) in the model"):
        sketcher.update(BASE, {**BASE, "head.bias": torch.zeros(9)})
    with pytest.raises(RaygardError, match="not finite"):
        sketcher.update(BASE, {**BASE, "head.bias": torch.full((8,), float("nan"))})


@pytest.mark.parametrize(("cls", "expected"), [("a", {"a"}), ("b", {"b"}), ("c", set()), ("never seen", set())])
def test_a_forbidden_class_is_found_and_others_are_not(
    sketcher: Sketcher, known: list[Reference], cls: str, expected: set[str]
) -> None:
    for user in range(5):
        found = findings(sketcher.update(BASE, fine_tuned(cls, f"user {user}")), known)
        assert [finding.cls for finding in found] == ["a", "b"]
        assert {finding.cls for finding in found if finding.found} == expected


def test_honest_users_are_accused_no_oftener_than_stated(sketcher: Sketcher, known: list[Reference]) -> None:
    honest = [sketcher.update(BASE, fine_tuned(f"honest {number}", 0)) for number in range(120)]
    accused = sum(f.found for update in honest for f in findings(update, known, false_alarms=0.05))
    # 240 tests at 5 %: 12 expected, and 25 or more once in a thousand times.
    assert accused < 25


def test_what_all_fine_tunings_share_counts_for_nothing(sketcher: Sketcher, known: list[Reference]) -> None:
    update = sketcher.update(BASE, fine_tuned("c", "much in common", own=0.0, common=5.0))
    assert not any(finding.found for finding in findings(update, known))


def test_a_part_of_the_tensors_is_enough(sketcher: Sketcher, known: list[Reference]) -> None:
    tuned = fine_tuned("a", "a few tensors")
    few = {**BASE, **{name: tuned[name] for name in list(SHAPES)[:6]}}
    assert [f.found for f in findings(sketcher.update(BASE, few), known)] == [True, False]
    with pytest.raises(RaygardError, match="moved 2 tensors"):
        findings(Update({name: np.ones(256, np.float32) for name in list(SHAPES)[:2]}), known)


def test_recall_says_what_is_too_small_to_be_found(sketcher: Sketcher, known: list[Reference]) -> None:
    assert recall(known) == {"a": (4, 4), "b": (4, 4)}
    faint = [
        Reference(cls, cls == "a", sketcher.update(BASE, fine_tuned(cls, run, own=0.02)), run // 2)
        for cls in "abcd"
        for run in range(4)
    ]
    assert recall(faint)["a"][0] < 4


def test_too_few_others_are_refused(sketcher: Sketcher) -> None:
    with pytest.raises(RaygardError, match="4 users of 1 other classes are too few"):
        recall(references(sketcher, classes="ac", forbidden="a"))


@pytest.fixture
def folder(sketcher: Sketcher, known: list[Reference], tmp_path: Path) -> Path:
    traces = Traces("the base", release_fingerprint(BASE), "letters", SHAPES, sketcher, known)
    return traces.save(tmp_path / "traces")


def test_the_folder_holds_the_same_and_only_its_owner_can_read_it(folder: Path, known: list[Reference]) -> None:
    traces = Traces.load(folder)
    assert traces.classes == ("a", "b")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for before, after in zip(known, traces.references, strict=True):
        assert (before.cls, before.forbidden) == (after.cls, after.forbidden)
        for name in SHAPES:
            assert after.update.tensors[name] == pytest.approx(before.update.tensors[name], abs=1e-3)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (MANIFEST, b'"width": 256', b'"width": 32', "width"),
        (MANIFEST, b'"width": 256', b'"width": 512', "does not fit"),
        (MANIFEST, b'"cls": "a"', b'"kind": "a"', "users.0.cls"),
        (SKETCHES, b"head.bias", b"tail.bias", "differs from the hash"),
    ],
)
def test_damage_is_one_line(folder: Path, file: str, old: bytes, new: bytes, message: str) -> None:
    content = (folder / file).read_bytes()
    assert old in content
    (folder / file).write_bytes(content.replace(old, new))
    with pytest.raises(RaygardError, match=message):
        Traces.load(folder)


def test_a_folder_without_traces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RaygardError, match="holds no traces"):
        Traces.load(tmp_path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    models = {"base": BASE, "forbidden": fine_tuned("a", "attacker"), "honest": fine_tuned("never seen", "user")}
    for name, state in models.items():
        save_file(state, str(tmp_path / f"{name}.safetensors"))
    return {name: str(tmp_path / f"{name}.safetensors") for name in models}


def audit(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["audit", *map(str, arguments)])
    mistake = "" if isinstance(result.exception, SystemExit) else str(result.exception or "")
    return result.exit_code, result.stdout + mistake


@pytest.mark.parametrize(("model", "code"), [("forbidden", ExitCode.MOVED), ("honest", ExitCode.DONE)])
def test_the_audit_says_what_a_model_was_fine_tuned_on(
    folder: Path, files: dict[str, str], model: str, code: ExitCode
) -> None:
    arguments = "--traces", folder, "--base", files["base"], "--model", files[model]
    assert audit(*arguments)[0] == code
    report = json.loads(audit(*arguments, "--json")[1])
    assert report["ok"] == (code == ExitCode.DONE)
    assert [(f["cls"], f["found"]) for f in report["traces"]] == [("a", model == "forbidden"), ("b", False)]


def test_a_lora_is_recognised_as_well(folder: Path, tmp_path: Path) -> None:
    move = {name: tensor - BASE[name] for name, tensor in fine_tuned("a", "adapter").items()}
    factors = {}
    for number in range(12):
        # Of full rank, so that the product is the whole update.
        factors[f"unet.block{number}.lora_A.weight"] = torch.eye(24)
        factors[f"unet.block{number}.lora_B.weight"] = move[f"block{number}.weight"].contiguous()
    save_file(factors, str(tmp_path / "pytorch_lora_weights.safetensors"))
    code, said = audit("--traces", folder, "--lora", tmp_path / "pytorch_lora_weights.safetensors")
    assert code == ExitCode.MOVED
    assert "points to fine-tuning on a " in said


def test_an_untouched_model_and_another_release(folder: Path, files: dict[str, str]) -> None:
    code, said = audit("--traces", folder, "--base", files["base"], "--model", files["base"])
    assert (code, "nothing to recognise" in said) == (ExitCode.DONE, True)
    code, said = audit("--traces", folder, "--base", files["honest"], "--model", files["base"])
    assert "is not the release these traces were made for" in said


def test_an_audit_needs_something_to_audit_with(files: dict[str, str]) -> None:
    assert "give --mask, --traces, or both" in audit("--base", files["base"], "--model", files["honest"])[1]


def test_users_of_a_class_take_halves_of_its_pictures_in_turn() -> None:
    shares = [share_of_pictures(range(10), run) for run in range(4)]
    assert shares[0] == shares[1] == ([0, 2, 4, 6, 8], 0)
    assert shares[2] == shares[3] == ([1, 3, 5, 7, 9], 1)
    assert share_of_pictures(range(7), 3) == (list(range(7)), 0)
    assert [steps_of(100, run) for run in range(4)] == [100, 50, 50, 100]
    assert steps_of(1, 1) == 1
