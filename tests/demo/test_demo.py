"""`raygard demo` itself, with fewer steps: the bundled model and domain, two Ray Train workers, ZeRO-2."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

import raygard
from raygard.mask import FreezeMask

pytestmark = pytest.mark.demo

SMALLER = (
    "relearn.max_train_steps=8",
    "bilevel.publisher_steps=2",
    "adapt.max_train_steps=4",
    "evaluation.random_draws=1",
    "generation.num_images=4",
    "generation.num_inference_steps=2",
)
PACKAGE = Path(raygard.__file__).parent


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, "-m", "raygard.cli", "demo", "--out", str(out), *SMALLER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr[-4000:]
    return out, done.stdout


def test_ends_with_the_table_and_the_paths(demo) -> None:
    out, printed = demo
    for name in ("none", "freeze", "random", "random-matched", "largest-first"):
        assert re.search(rf"^{name}\s", printed, re.MULTILINE)
    assert str(out / "report.html") in printed and f"sqlite:///{out / 'mlflow.db'}" in printed


def test_outcome_follows_its_schema_and_counts_every_cell(demo) -> None:
    outcome = json.loads((demo[0] / "outcome.json").read_text())
    jsonschema.validate(outcome, json.loads((PACKAGE / "schemas" / "outcome.schema.json").read_text()))
    config = yaml.safe_load((demo[0] / "config.yaml").read_text())
    classes = [*config["domain"]["illegal"], *config["domain"]["legal"]]
    cells = {(row["defence"], row["class"], row["draw"], row["mask_seed"]) for row in outcome["rows"]}
    assert len(cells) == len(outcome["rows"]) == len(classes) * (1 + len(config["evaluation"]["mask_seeds"]) + 3)
    assert all(row["n"] == 4 and 0 < row["distance"] < 2 for row in outcome["rows"])
    shares = {entry["defence"]: entry["param_share"] for entry in outcome["summary"]}
    assert shares["none"] == 0 and shares["largest-first"] > shares["random"] > 0
    assert abs(shares["random-matched"] - FreezeMask.load(demo[0] / "mask").ratio_by_params) < 0.02


def test_mask_freezes_exactly_its_share_and_every_audit_passed(demo) -> None:
    mask = FreezeMask.load(demo[0] / "mask")
    assert int(mask.frozen.sum()) == round(0.05 * len(mask.names))
    results = [json.loads(f.read_text()) for f in (demo[0] / "evaluation" / "jobs").glob("*/result.json")]
    assert all(result["audit_ok"] for result in results if result["defence"] not in ("base", "none"))


def test_report_opens_without_a_network(demo) -> None:
    page = (demo[0] / "report.html").read_text()
    assert page.count("data:image/") >= 10
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page)


def test_mlflow_runs_are_nested(demo) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{demo[0] / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("raygard")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id], max_results=1000)}
    parent = next(run for run in runs.values() if "mlflow.parentRunId" not in run.data.tags)
    children = {n for n, r in runs.items() if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert {"relearn", "learn-seed-0", "learn-seed-1", "defence-freeze", "defence-none"} <= children
    assert all(run.info.status == "FINISHED" for run in runs.values())
    assert len(parent.data.tags["raygard.mask_sha256"]) == 64
    assert {"seed_agreement", "frozen_by_params"} <= set(parent.data.metrics)
    learned = runs["learn-seed-0"].data.metrics
    assert {"user_illegal_loss", "publisher_legal_loss", "soft_mean", "frozen_by_count"} <= set(learned)
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} >= {"mask", "report", "outcome.json"}
