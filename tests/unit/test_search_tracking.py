"""A search in MLflow, on a real sqlite store: what ends up in which run, also after a resume."""

import json
import shutil
from types import SimpleNamespace

import pytest
from report_search import write_final, write_search

from raygard.config import TrackingConfig
from raygard.config_file import load_config
from raygard.search_tracking import SearchTracking
from raygard.tracking import Tracker

POINT = {"freeze_ratio": 0.3, "temperature": 0.2, "inner_steps": 5, "publisher_steps": 30}
POINT |= {"rule": "budget", "illegal_weight": 1.0, "legal_weight": 0.5}
SECONDS = {"learn": 1.0, "adapt": 2.0, "generate": 3.0, "score": 4.0, "total": 10.0}
OVERRIDES = ("mask.rule=budget", "search.freeze_ratios=[0.3,0.5]", "search.legal_weights=[0.5,1.0]")


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """A sqlite store without runs: MLflow's schema migrations take seconds, so they run once."""
    folder = tmp_path_factory.mktemp("store")
    Tracker.open(TrackingConfig(experiment="other"), folder, "none")
    return folder / "mlflow.db"


@pytest.fixture
def begin(tmp_path, empty_store):
    """An attempt at a search of the same directory: called again, a resumed one."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    mask = tmp_path / "trials" / "mask"
    mask.mkdir(parents=True)
    (mask / "mask.json").write_text("{}")

    def attempt(*overrides, folder=tmp_path):
        tracker = Tracker.open(TrackingConfig(), folder, "search")
        config = load_config(overrides=[*OVERRIDES, *overrides])
        return SearchTracking(SimpleNamespace(config=config, dir=folder, tracker=tracker, parent=tracker.start()))

    return attempt


def runs_of(folder):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return client, {run.info.run_name: run for run in client.search_runs(experiments, max_results=500)}


def candidate(p=0.3, **fields):
    names = ("mitigation", "mitigation_ci", "legal_impact", "legal_impact_ci")
    empty = dict.fromkeys((*names, "relative_illegal", "relative_legal", "score"))
    about = {"candidate_id": f"c{p}", "trial_id": "t", "p": p, "T": 0.2, "L": 5, "K": 30, "rule": "budget"}
    about |= {
        "illegal_weight": 1.0,
        "legal_weight": 0.5,
        "mask": "trials/mask",
        "mask_sha256": "ab",
        "param_share": 0.2,
    }
    proxy = [{"fidelity": 0.25, "step": 5, "mitigation": 0.1, "legal_impact": 0.0}]
    return {**about, **empty, "incomplete": [], "proxy": proxy, **fields}


def job(name, draw=0):
    named = {"job_id": name, "class": "stripes", "role": "illegal", "defence": "freeze", "adaptation": "full"}
    named |= {"scorer": "s", "draw": draw, "mask_seed": 0, "seed": 0, "mask_sha256": "ab", "distance": 0.5}
    named |= {"freeze_ratio": 0.3, "param_share": 0.2, "trainable_params": 3, "optimizer_bytes": 24}
    return {**named, "losses": [1.0, 0.5], "milestones": [[1, 0.7]], "seconds": {"adapt": 1.0}}


def record(status, *, candidates=(), jobs=(), reason=None, **point):
    about = {"trial_id": "t", "status": status, "reason": reason, "point": {**POINT, **point}}
    return {**about, "candidates": list(candidates), "jobs": list(jobs), "seconds": SECONDS}


@pytest.mark.parametrize("status", ["failed", "pruned"])
def test_trial_that_left_nothing_has_its_point(begin, tmp_path, status):
    begin().trial(record(status, reason="killed"))
    _, runs = runs_of(tmp_path)
    assert runs["t"].data.params == {"p": "0.3", "T": "0.2", "L": "5", "legal_weight": "0.5"}
    assert runs["t"].data.tags["raygard.status"] == status and runs["t"].data.tags["raygard.reason"] == "killed"


def test_pruned_trial_has_its_point_its_proxy_and_what_was_done(begin, tmp_path):
    begin().trial(record("pruned", candidates=[candidate()], jobs=[job("done")]))
    _, runs = runs_of(tmp_path)
    assert runs["t"].data.params == {"p": "0.3", "T": "0.2", "L": "5", "legal_weight": "0.5"}
    assert runs["t"].data.metrics["proxy_mitigation"] == 0.1 and "mitigation" not in runs["t"].data.metrics
    assert runs["done"].data.tags["mlflow.parentRunId"] == runs["t"].info.run_id
    assert runs["done"].data.metrics["held_out_loss"] == 0.7


def test_one_ranking_has_a_run_for_each_p_with_its_own_jobs(begin, tmp_path):
    entries = [candidate(0.3), candidate(0.5, incomplete=["stripes"])]
    jobs = [job("first"), job("second", draw=1)]
    begin("search.mode=one_ranking").trial(record("pruned", candidates=entries, jobs=jobs, freeze_ratio=None))
    _, runs = runs_of(tmp_path)
    assert runs["t"].data.params == {"T": "0.2", "L": "5", "legal_weight": "0.5"}
    assert runs["p=0.5"].data.params["p"] == "0.5" and runs["p=0.5"].data.tags["raygard.incomplete"] == "stripes"
    assert "raygard.incomplete" not in runs["p=0.3"].data.tags
    for name, p in (("first", "p=0.3"), ("second", "p=0.5")):
        assert runs[name].data.tags["mlflow.parentRunId"] == runs[p].info.run_id


def test_resumed_trial_reports_at_the_steps_it_had(begin, tmp_path):
    reports = [{"kind": "publisher", "k": k, "illegal_loss": 1.0 / k, "trial": "t"} for k in range(1, 7)]
    first = begin()
    for report in reports[:4]:
        first.report("t", report)
    again = begin()
    for report in reports[2:]:
        again.report("t", report)
    client, runs = runs_of(tmp_path)
    history = client.get_metric_history(runs["learn"].info.run_id, "publisher_illegal_loss")
    assert sorted((m.step, m.value) for m in history) == [(r["k"], pytest.approx(r["illegal_loss"])) for r in reports]


def test_losses_of_the_values_stand_beside_those_of_the_mask(begin, tmp_path):
    tracking = begin()
    tracking.report("t", {"kind": "publisher", "k": 3, "illegal_loss": 0.4, "trial": "t"})
    tracking.report("t", {"kind": "values", "k": 3, "illegal_loss": 1.4, "general_loss": 0.1, "trial": "t"})
    tracking.trial(record("scored", candidates=[candidate(mitigation=0.2, base_loss_rise=0.01)]))
    _, runs = runs_of(tmp_path)
    expected = {"publisher_illegal_loss": 0.4, "values_illegal_loss": 1.4, "values_general_loss": 0.1}
    assert runs["learn"].data.metrics == expected
    assert runs["t"].data.metrics["base_loss_rise"] == 0.01


def test_report_of_a_rung_logs_no_parts(begin, tmp_path):
    rung = {"trial": "t", "fidelity": 3, "scored": 0, "mitigations": [0.1], "legal_impacts": [None]}
    tracking = begin()
    tracking.report("t", rung)
    tracking.trial(record("scored", candidates=[candidate(score=0.2, mitigation=0.2)]))
    _, runs = runs_of(tmp_path)
    names = ("mitigation", "param_share", "proxy_legal_impact", "proxy_mitigation", "score")
    assert set(runs["t"].data.metrics) == {*names, *(f"seconds_{name}" for name in SECONDS)}


def test_trial_that_failed_and_then_was_scored_is_scored(begin, tmp_path):
    tracking = begin()
    tracking.trial(record("failed", reason="killed"))
    tracking.trial(record("scored", candidates=[candidate(mitigation=0.2)]))
    _, runs = runs_of(tmp_path)
    assert runs["t"].data.metrics["mitigation"] == 0.2
    assert (runs["t"].info.status, runs["t"].data.tags["raygard.status"]) == ("FINISHED", "scored")


def test_finished_search_has_the_released_masks_outcome_and_names_the_mean(begin, tmp_path):
    folder = write_search(tmp_path / "search")
    write_final(folder)
    shutil.copy(tmp_path / "mlflow.db", folder)
    search, choice = (json.loads((folder / f"{name}.json").read_text()) for name in ("search", "choice"))
    (folder / "trials.csv").write_text("")
    shutil.copytree(folder / choice["chosen"]["mask"], folder / "mask")
    tracking = begin(folder=folder)
    for trial in search["trials"]:
        tracking.trial({**trial, "jobs": []})
    tracking.finish(search, choice, folder / "final" / "report.html")
    client, runs = runs_of(folder)
    parent, own, mean = runs["search"].data.metrics, choice["outcome"], choice["outcome_over_seeds"]
    for name in ("mitigation", "legal_impact"):
        assert parent[name] == own[name] and parent[f"{name}_over_seeds"] == mean[name]
    assert own["mitigation"] != mean["mitigation"]
    (version,) = client.search_model_versions("name = 'raygard-mask-emoji-styles'")
    assert version.tags["raygard.mitigation"] == str(own["mitigation"])
    assert version.tags["raygard.mitigation_over_seeds"] == str(mean["mitigation"])
    for fidelity, entry in search["proxy"]["correlation"].items():
        for part, rho in entry.items():
            assert parent[f"proxy_correlation_{part}_{fidelity}"] == rho
    scored = next(trial for trial in search["trials"] if trial["status"] == "scored")
    history = client.get_metric_history(runs[scored["trial_id"]].info.run_id, "proxy_score")
    proxies = scored["candidates"][0]["proxy"]
    assert [(m.step, m.value) for m in history] == [(i, e["score"]) for i, e in enumerate(proxies)]
