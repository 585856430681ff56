"""Masks with a freeze ratio of their own in a comparison: `freeze@0.5`."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raygard.compare.plan import parse_defences
from raygard.config import RunConfig
from raygard.config_file import load_config
from raygard.diffusion.model import load_denoiser
from raygard.editing import Edit
from raygard.errors import RaygardError
from raygard.mask import FreezeMask

# Of the tiny pipeline of conftest.
NUM_TENSORS = 208


def test_a_mask_of_fixed_size_has_no_ratio() -> None:
    with pytest.raises(RaygardError, match="freezes all of its kind"):
        parse_defences(["manual-attention@0.5"], [], ["none", "manual-attention"])


@pytest.fixture
def relearned(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where relearning was asked for; masks of random logits are learned from it at once, p = 0.9 never."""
    from raygard.cluster import training

    asked: list[Path] = []

    def fake_relearn(config: RunConfig, cache: Path, out: Path, **_: Any) -> Path:
        asked.append(out)
        return out

    def fake_learn(config: RunConfig, cache: Path, relearned: Path, mask_seed: int, out: Path, **_: Any) -> Any:
        if config.mask.freeze_ratio == 0.9:
            raise RaygardError("the upper loss is no longer finite")
        logits = torch.randn(NUM_TENSORS, dtype=torch.float64, generator=torch.Generator().manual_seed(mask_seed))
        return logits, logits.sigmoid()

    monkeypatch.setattr(training, "relearn", fake_relearn)
    monkeypatch.setattr(training, "learn", fake_learn)
    return asked


Settings = Callable[..., RunConfig]


@pytest.fixture
def settings(tiny_sd: Path, imagefolder: Any) -> Settings:
    data = imagefolder({"a": 48, "c": 48})

    def make(*overrides: str) -> RunConfig:
        return load_config(
            None,
            [
                f"domain.data={data}", f"model.pretrained_model_name_or_path={tiny_sd}", "domain.illegal=[a]",
                "domain.legal=[c]", "mask.freeze_ratio=0.1", "evaluation.mask_seeds=[0, 1]",
                "evaluation.random_draws=1", "tracking.enabled=false", *overrides,
            ],
        )  # fmt: skip

    return make


def test_masks_of_other_ratios_share_relearning_and_controls_follow_them(
    settings: Settings, relearned: list[Path], tmp_path: Path
) -> None:
    from raygard.compare_flow import CompareFlow

    names = "compare.defences=[none, freeze, freeze@0.25, random@0.25, freeze@0.5]"
    flow = CompareFlow(settings(names), tmp_path / "out")
    with flow.flow.parent:
        releases = flow._releases()
    shares = {
        name: [FreezeMask.load(str(each.mask)).ratio_by_count for each in made if each.mask]
        for name, made in releases.items()
    }
    assert flow.matrix.lost == {} and len(relearned) == 1
    assert {name: len(made) for name, made in shares.items()} == {
        "none": 0, "freeze": 2, "freeze@0.25": 2, "random@0.25": 1, "freeze@0.5": 2
    }  # fmt: skip
    for name, expected in (("freeze", 0.1), ("freeze@0.25", 0.25), ("random@0.25", 0.25), ("freeze@0.5", 0.5)):
        assert shares[name] == pytest.approx([expected] * len(shares[name]), abs=1 / NUM_TENSORS)
    assert [each.mask_seed for each in releases["freeze@0.5"]] == [0, 1]


def test_a_ratio_that_cannot_be_learned_takes_its_own_defences_only(
    settings: Settings, relearned: list[Path], tmp_path: Path
) -> None:
    from raygard.compare_flow import CompareFlow

    names = "compare.defences=[none, freeze, freeze@0.9, random@0.9, uce+freeze@0.9, manual-attention]"
    flow = CompareFlow(settings(names), tmp_path / "out")
    with flow.flow.parent:
        releases = flow._releases()
    assert list(releases) == ["none", "freeze", "manual-attention"]
    assert flow.matrix.lost == dict.fromkeys(
        ["freeze@0.9", "random@0.9", "uce+freeze@0.9"], "the upper loss is no longer finite"
    )


def test_an_edit_under_a_mask_with_values_of_its_own_is_lost_with_its_reason(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raygard.compare_flow import CompareFlow

    unet = load_denoiser(settings().model)
    first, one = next(unet.named_parameters())
    mask = FreezeMask.create(unet, [first], values={first: 2 * one}).save(tmp_path / "mask")
    edit = Edit.create(unet, {first: 3 * one}).save(tmp_path / "edit.safetensors")
    names = "compare.defences=[none, freeze, uce, uce+freeze, uce+random]"
    flow = CompareFlow(settings(f"compare.mask={mask}", names), tmp_path / "out")
    monkeypatch.setattr(flow, "_edit", lambda name: edit)
    with flow.flow.parent:
        releases = flow._releases()
    assert list(releases) == ["none", "freeze", "uce", "uce+random"] and list(flow.matrix.lost) == ["uce+freeze"]
    assert "'freeze' carries values of its own" in flow.matrix.lost["uce+freeze"]


def test_who_failed_to_adapt_is_not_tried_again_for_another_scorer(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raygard.cluster import evaluation
    from raygard.cluster.jobs import EvaluationInputs, job_names
    from raygard.compare_flow import CompareFlow, Release

    tried: list[tuple[str, str]] = []

    def fake_run_jobs(jobs: Any, inputs: EvaluationInputs, pool: Any, on_result: Callable[..., None]) -> None:
        for job in jobs:
            tried.append((inputs.config["evaluation"]["scorer"], job.cls))
            stage = "adapt" if job.cls == "a" else "score"
            on_result({**job_names(job), "failed": True, "stage": stage, "reason": "no luck", "attempts": 1})

    monkeypatch.setattr(evaluation, "run_jobs", fake_run_jobs)
    scorers = ("style_enlite0", "kid_enlite0")
    flow = CompareFlow(settings("compare.defences=[none]", "compare.scorers=[kid_enlite0]"), tmp_path / "out")
    flow.matrix.cells = flow._cells({})
    inputs = EvaluationInputs({}, "cache", "adapt", "reference", references="pictures", store="store")
    for scorer in scorers:
        flow._meet(flow._with_scorer(scorer), inputs, None, scorer, flow.variants[0], 0, {"none": [Release()]})
    assert tried == [(scorers[0], "a"), (scorers[0], "c"), (scorers[1], "c")]
    known = {(scorer, cell.cls): found["stage"] for (scorer, cell), found in flow.matrix.results.items()}
    assert known == {(scorer, cls): stage for scorer in scorers for cls, stage in (("a", "adapt"), ("c", "score"))}


def test_what_is_to_be_measured_is_written_before_anything_is_learned(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raygard.compare_flow import MATRIX, CompareFlow

    flow = CompareFlow(settings("compare.defences=[none, freeze, random]"), tmp_path / "out")

    def cut_off() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(flow, "_releases", cut_off)
    with pytest.raises(KeyboardInterrupt):
        flow.run()
    rows = list(csv.DictReader((flow.dir / MATRIX).open()))
    assert {row["defence"] for row in rows} == {"none", "freeze", "random"}
    assert {row["status"] for row in rows} == {"unfinished"}
    kept = (flow.dir / MATRIX).read_bytes() + b"measured before"
    (flow.dir / MATRIX).write_bytes(kept)
    with pytest.raises(KeyboardInterrupt):
        flow.run()
    assert (flow.dir / MATRIX).read_bytes() == kept


def test_a_given_mask_has_its_own_ratio(settings: Settings, tmp_path: Path) -> None:
    from raygard.compare_flow import CompareFlow

    own = ["mask.freeze_ratio=0.5", "compare.defences=[none, freeze@0.5]"]
    given = settings(f"compare.mask={tmp_path / 'm'}", *own)
    with pytest.raises(RaygardError, match=r"'freeze@0.5': the freeze ratio of compare.mask is what it was learned"):
        CompareFlow(given, tmp_path / "out")
