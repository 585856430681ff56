"""`raygard search` with real Tune trials, Ray Train runs and evaluation actors."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from raygard.config_file import load_config
from raygard.mask import FreezeMask
from raygard.schemas import load as load_schema
from tests.search_fixtures import SETTINGS, check_hierarchy, lend, start_search

pytestmark = pytest.mark.distributed

STOPPED = Path(__file__).parent / "stopped_trial.py"


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_point_is_scored_and_listed(searched) -> None:
    out, output = searched
    search = read(out / "search.json")
    assert {trial["trial_id"] for trial in search["trials"]} == {f"p{p}-T0.2-L{n}" for p in (0.3, 0.7) for n in (2, 4)}
    assert {trial["status"] for trial in search["trials"]} == {"scored"}
    with (out / "trials.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["candidate_id"] for row in rows} == {trial["trial_id"] for trial in search["trials"]}
    for trial in search["trials"]:
        (candidate,) = trial["candidates"]
        assert candidate["K"] * candidate["L"] == 8
        assert [entry["fidelity"] for entry in candidate["proxy"]] == [0.5, 1.0]
        assert candidate["mitigation_ci"][0] <= candidate["mitigation"] <= candidate["mitigation_ci"][1]
        mask = FreezeMask.load(out / candidate["mask"])
        assert mask.sha256 == candidate["mask_sha256"]
        assert abs(mask.ratio_by_count - candidate["p"]) < 0.01
        assert all(trial["seconds"][kind] > 0 for kind in ("learn", "adapt", "generate", "score"))
    assert {(entry["p"], entry["defence"]) for entry in search["controls"]} == {
        (0.3, "random-matched"),
        (0.7, "random-matched"),
    }
    assert str(out / "report.html") in output


def test_relearning_ran_once_for_all_trials(searched) -> None:
    out, _ = searched
    assert read(out / "run.json")["relearn_runs"] == 1 == read(out / "search.json")["relearn_runs"]
    assert len(list(out.rglob("relearned.safetensors"))) == 1


def test_the_choice_follows_its_rule_and_its_mask_is_released(searched) -> None:
    import jsonschema

    out, output = searched
    choice, search = read(out / "choice.json"), read(out / "search.json")
    jsonschema.validate(choice, load_schema("choice"))
    candidates = [entry for trial in search["trials"] for entry in trial["candidates"]]
    within = [entry for entry in candidates if entry["legal_impact_ci"][1] <= choice["legal_budget"]]
    if choice["meets_budget"]:
        assert choice["chosen"]["mitigation"] == max(entry["mitigation"] for entry in within)
    else:
        assert not within
    pick, folder = (choice["chosen"], "mask") if choice["meets_budget"] else (choice["nearest"], "nearest-mask")
    assert FreezeMask.load(out / folder).sha256 == pick["mask_sha256"]
    assert (out / "mask").exists() == choice["meets_budget"]
    assert choice["statement"] in " ".join(output.split())


def test_the_reported_outcome_is_of_the_user_half(searched) -> None:
    out, _ = searched
    outcome, choice = read(out / "final" / "outcome.json"), read(out / "choice.json")
    entry = next(row for row in outcome["summary"] if row["defence"] == "freeze")
    assert choice["outcome"]["mitigation"] == entry["mitigation"]
    select = read(out / "select" / "references.json")["captions"]
    final = read(out / "final" / "evaluation" / "references.json")["captions"]
    for cls, captions in select.items():
        assert captions and not set(captions) & set(final[cls])


def test_runs_are_nested_in_mlflow_and_searchable(searched) -> None:
    out, _ = searched
    check_hierarchy(f"sqlite:///{out / 'mlflow.db'}", read(out / "choice.json"))


def test_with_values_every_candidate_is_a_release_of_its_own(patterns, searched, tmp_path) -> None:
    """One trial of two seeds: values in the candidate and in the other seed's mask, chosen by both budgets."""
    import mlflow

    out = tmp_path / "out"
    overrides = ["domain.general=[bars]", "values.max_train_steps=6", "values.lr_warmup_steps=1"]
    overrides += ["values.train_batch_size=8", "search.freeze_ratios=[0.3]", "search.inner_steps=[2]"]
    overrides += ["search.controls=[]", "evaluation.mask_seeds=[0,1]", "domain.base_loss_budget=1e-9"]
    lend(searched[0], out, load_config(None, [*SETTINGS, f"domain.data={patterns}", *overrides]))
    process = start_search(patterns, out, *overrides)
    output = process.communicate(timeout=900)[0]
    assert process.returncode == 0, output[-4000:]
    choice = read(out / "choice.json")
    (trial,) = read(out / "search.json")["trials"]
    (candidate,) = trial["candidates"]
    mask = FreezeMask.load(out / candidate["mask"])
    assert set(mask.values) == set(mask.frozen_names) and trial["seconds"]["values"] > 0
    rise = mask.metrics["base_loss_after"] / mask.metrics["base_loss_before"] - 1
    assert candidate["base_loss_rise"] == rise
    # Six steps of training move the release's own loss, if by little, so its budget decides.
    keeps = rise <= 1e-9 and candidate["legal_impact_ci"][1] <= 1
    assert choice["meets_budget"] == keeps and (out / ("mask" if keeps else "nearest-mask")).exists()
    seeds = [FreezeMask.load(path) for path in sorted((out / "final" / "evaluation" / "masks").glob("freeze-*"))]
    assert [bool(each.values) for each in seeds] == [True, True] and seeds[0].sha256 == mask.sha256
    losses = {row["defence"]: row["base_loss"] for row in read(out / "final" / "outcome.json")["summary"]}
    assert losses["none"] != losses["freeze"]
    client = mlflow.MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    (learning,) = [run for run in runs if run.info.run_name == "learn"]
    assert {"publisher_illegal_loss", "values_legal_loss"} <= set(learning.data.metrics)
    (own,) = [run for run in runs if "base_loss_rise" in run.data.metrics]
    assert own.data.metrics["base_loss_rise"] == pytest.approx(rise)


def test_a_stopped_trial_frees_its_workers_and_the_next_one_starts_beside_another_cluster(
    patterns, searched, tmp_path
) -> None:
    done = subprocess.run(
        [sys.executable, str(STOPPED), str(patterns), str(searched[0]), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["stopped_while"] == "learning"
    assert facts["statuses"] == {facts["stopped"]: "pruned", facts["next"]: "scored"}
    # One CPU in all: the second trial could not have learned beside a leaked placement group.
    assert facts["free_cpus_at_the_end"] == 1.0
    # Relearning does not depend on how many steps a mask is learned for.
    assert facts["relearn_runs"] == 0


def command(data: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "raygard.cli", "search", "--data", str(data), *arguments],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["search.freeze_ratios=[]"], "the search space is empty"),
        (["search.freeze_ratios=[0.3,1.5]"], "a freeze ratio p lies between 0 and 1, got 1.5"),
        (["domain.legal_budget=2"], "less than or equal to 1"),
        (["evaluation.scorer=styl"], "style_enlite0"),
        (["engine.num_workers=2", "engine.cpus_per_worker=400"], "2 workers x 400 CPU = 800 CPU"),
    ],
)
def test_bad_input_is_one_line_in_seconds_and_writes_nothing(
    patterns, tmp_path, overrides: list[str], says: str
) -> None:
    done = command(patterns, "--out", str(tmp_path / "out"), *SETTINGS, *overrides)
    lines = [line for line in done.stderr.splitlines() if line.startswith("raygard: ")]
    assert done.returncode == 2 and len(lines) == 1 and says in lines[0]
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_the_directory_of_another_search_is_refused_and_left_alone(patterns, searched) -> None:
    out, _ = searched
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.json")}
    done = command(patterns, "--out", str(out), *SETTINGS, "search.freeze_ratios=[0.2]")
    assert done.returncode == 2 and "another configuration: search.freeze_ratios" in done.stderr
    assert before == {file: file.stat().st_mtime_ns for file in out.rglob("*.json")}
