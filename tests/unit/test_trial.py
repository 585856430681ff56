"""What a trial makes of its users' results, some of which may be missing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from report_run import tiny_unet

from raygard.cluster.evaluation import EvaluationInputs, EvaluationJob, EvaluationPool
from raygard.cluster.trial import TRIAL, Trial, TrialInputs, read_record, shares
from raygard.cluster.values import ValuesInputs
from raygard.config_file import load_config
from raygard.mask import FreezeMask, select_frozen
from raygard.search.space import grid
from tests.unit.test_outcome import around, result

CONFIG = load_config(
    None,
    [
        "domain.illegal=[A,B]",
        "domain.legal=[C]",
        "domain.legal_budget=0.3",
        "evaluation.bootstrap_samples=200",
        "adapt.max_train_steps=10",
        "search.fidelities=[0.5,1.0]",
    ],
)
BASE, FULL, GUARDED = {"A": 0.9, "B": 0.8, "C": 0.7}, {"A": 0.1, "B": 0.4, "C": 0.2}, {"A": 0.5, "B": 0.5, "C": 0.3}


@pytest.fixture
def trial(tmp_path) -> Trial:
    reference = [
        {**result(defence, cls, around(distance), draw=0), "milestones": [[5, distance], [10, distance]]}
        for defence, distances in (("base", BASE), ("none", FULL))
        for cls, distance in distances.items()
    ]
    config = CONFIG.model_dump(mode="json")
    evaluation = EvaluationInputs(config, "", "", "", "", "")
    pool = EvaluationPool(None, config, None)
    inputs = TrialInputs(config, "key", "", "", str(tmp_path / "trials"), evaluation, pool, reference)
    return Trial(grid(CONFIG)[0], inputs)


def guarded(*classes: str) -> list[dict[str, Any]]:
    return [result("freeze", cls, around(GUARDED[cls]), draw=0, mask_seed=0) for cls in classes]


def candidate() -> dict[str, Any]:
    names = ("mitigation", "mitigation_ci", "legal_impact", "legal_impact_ci", "score")
    return {"candidate_id": "c", "proxy": [], "incomplete": [], **dict.fromkeys(names)}


JOBS = [EvaluationJob("freeze", cls, role) for cls, role in (("A", "illegal"), ("B", "illegal"), ("C", "legal"))]


def test_a_trial_with_all_its_users_is_scored(trial) -> None:
    found = trial.measure(guarded("A", "B", "C"))
    assert found["mitigation"] == pytest.approx((0.4 + 0.1) / (0.8 + 0.4))
    assert found["legal_impact"] == pytest.approx(0.2)
    assert found["score"] == pytest.approx(found["mitigation"]) and found["incomplete"] == []


def test_a_trial_that_lost_a_class_that_counts_has_no_score(trial) -> None:
    """Without its worst legal class it would look harmless."""
    assert trial.measure(guarded("A", "C"))["incomplete"] == ["B"]
    without_legal = trial.measure(guarded("A", "B"))
    assert without_legal["incomplete"] == ["C"] and without_legal["score"] is None
    assert trial.measure([])["incomplete"] == ["A", "B", "C"]


def test_the_proxy_of_a_trial_that_lost_a_user_is_null_and_the_trial_goes_on(trial) -> None:
    whole, holed = candidate(), candidate()
    losses = {job.job_id: GUARDED[job.cls] for job in JOBS}
    trial.add_proxy([whole], JOBS, 5, losses)
    (entry,) = whole["proxy"]
    assert entry == {
        "fidelity": 0.5,
        "step": 5,
        "mitigation": pytest.approx(0.5 / 1.2),
        "legal_impact": pytest.approx(0.2),
    }
    del losses[JOBS[1].job_id]
    trial.add_proxy([holed], JOBS, 5, losses)
    assert (holed["proxy"][0]["mitigation"], holed["proxy"][0]["legal_impact"]) == (None, None)
    report = trial.metrics([holed], 1, scored=False)
    assert report["mitigations"] == [None] and "score" not in report


def test_only_a_final_report_has_a_score(trial) -> None:
    done = candidate()
    trial.add_proxy([done], JOBS, 5, {job.job_id: GUARDED[job.cls] for job in JOBS})
    done |= trial.measure(guarded("A", "B", "C"))
    record = trial.write("scored", [done])
    first, last = trial.reports(record)
    assert "score" not in first and last["score"] == done["score"]
    assert (first["fidelity"], last["fidelity"]) == (trial.times[0], trial.times[-1])
    assert shares(CONFIG) == {1: 0.5, 2: 1.0}


def test_a_failed_trial_is_not_finished_and_runs_again(trial) -> None:
    trial.write("failed", [], reason="the disk is full")
    assert trial.finished() is None
    trial.write("scored", [])
    assert trial.finished() == read_record(trial.folder / TRIAL)


def test_what_users_have_cost_so_far_is_written_down(trial) -> None:
    assert trial.write("running", [], adapt_seconds=7.5)["seconds"]["adapt"] == 7.5


def test_every_candidate_of_one_ranking_gets_values_of_its_own_once(trial, tmp_path, monkeypatch) -> None:
    """Their losses would be one curve, so none of these trainings reports to Tune."""
    from raygard.cluster import training
    from raygard.cluster import trial as module

    unet = tiny_unet()
    count = len(list(unet.named_parameters()))
    logits = torch.linspace(-1, 1, count, dtype=torch.float64)
    learned, taught = [], []

    def make(config, *arguments):
        return FreezeMask.create(unet, select_frozen(-logits, torch.ones(count, dtype=torch.int64), arguments[-1]))

    def teach(config, mask, inputs, seed, folder, *, callbacks):
        taught.append((mask.ratio_by_count, inputs, list(callbacks)))
        values = {name: unet.get_parameter(name).detach() + 1 for name in mask.frozen_names}
        metrics = {"base_loss_before": 1.0, "base_loss_after": 1.0 + mask.ratio_by_count}
        FreezeMask.create(unet, mask.frozen, values=values, metrics=metrics).save(folder / "mask")

    monkeypatch.setattr(training, "learn", lambda *a, **k: learned.append(1) or (logits, logits))
    monkeypatch.setattr(module, "make_mask", make)
    monkeypatch.setattr(module, "release_values", teach)
    config = load_config(None, ["search.freeze_ratios=[0.2,0.5]", "search.mode=one_ranking"])
    inputs = replace(
        trial.inputs, config=config.model_dump(mode="json"), values=ValuesInputs("cache", "general", "store")
    )
    (point,) = grid(config)
    for _ in range(2):
        found = Trial(point, inputs).learn(["callback"])
    assert learned == [1] and [entry[1:] for entry in taught] == [(inputs.values, [])] * 2
    assert [entry["base_loss_rise"] for entry in found] == pytest.approx([ratio for ratio, *_ in taught])
    for entry in found:
        mask = FreezeMask.load(tmp_path / entry["mask"])
        assert mask.sha256 == entry["mask_sha256"] and set(mask.values) == set(mask.frozen_names)
