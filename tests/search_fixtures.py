"""One small search that nobody disturbs, on the bundled model and two plain patterns, for the tests of the search."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from raygard.config import RunConfig
from tests.patterns import make_patterns

SETTINGS = (
    "domain.name=patterns",
    "domain.illegal=[stripes]",
    "domain.legal=[checks]",
    "domain.resolution=64",
    "domain.legal_budget=1.0",
    "engine.cpus_per_worker=1",
    "engine.checkpointing_steps=1",
    "bilevel.train_batch_size=4",
    "bilevel.inner_steps=2",
    "bilevel.publisher_steps=4",
    "bilevel.user_lr=3e-4",
    "relearn.max_train_steps=6",
    "relearn.learning_rate=3e-4",
    "adapt.max_train_steps=8",
    "adapt.learning_rate=2e-3",
    "adapt.train_batch_size=8",
    "generation.num_images=8",
    "generation.num_inference_steps=4",
    "generation.guidance_scale=2",
    "generation.batch_size=4",
    "evaluation.defences=[none,freeze,random-matched]",
    "evaluation.random_draws=1",
    "evaluation.bootstrap_samples=200",
    "search.freeze_ratios=[0.3,0.7]",
    "search.inner_steps=[2,4]",
    "search.controls=[random-matched]",
    "search.fidelities=[0.5,1.0]",
)


def start_search(data: Path, out: Path, *overrides: str) -> subprocess.Popen[str]:
    """`raygard search` in a process group of its own, so that exactly what was started can be ended."""
    command = [
        sys.executable,
        "-m",
        "raygard.cli",
        "search",
        "--data",
        str(data),
        "--out",
        str(out),
        *SETTINGS,
        *overrides,
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.fixture(scope="session")
def patterns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_patterns(tmp_path_factory.mktemp("patterns") / "data")


@pytest.fixture(scope="session")
def searched(patterns: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Directory and output of a finished search: two p, two L, one domain."""
    out = tmp_path_factory.mktemp("searched") / "search"
    process = start_search(patterns, out)
    output = process.communicate(timeout=1200)[0]
    assert process.returncode == 0, output[-4000:]
    return out, output


def lend(searched: Path, out: Path, config: RunConfig, parts: Sequence[str] = ("relearn", "cache", "store")) -> None:
    """Give a search of the same domain the relearned state, caches and stored results of a finished one.

    parts: which of these. config: of the search to come in `out`. Whatever it decides otherwise it finds missing under
    its own hash, and computes.
    """
    for name in parts:
        shutil.copytree(searched / name, out / name)
    content = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"half": "publisher"})})
    (out / "config.yaml").write_text(yaml.safe_dump(content.model_dump(mode="json")), encoding="utf-8")


def check_hierarchy(uri: str, choice: Mapping[str, Any]) -> None:
    """Assert that an MLflow store holds the search of SETTINGS: nested, named for the compare page, each point once."""
    import mlflow

    client = mlflow.MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = list(client.search_runs(experiments, max_results=500))
    by_id = {run.info.run_id: run for run in runs}
    parents = {run.info.run_name: by_id.get(run.data.tags.get("mlflow.parentRunId")) for run in runs}
    (top,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    trials = [run for run in runs if run.info.run_name.startswith("p0.")]
    assert len(trials) == 4
    for trial in trials:
        assert by_id[trial.data.tags["mlflow.parentRunId"]] is top and trial.info.status == "FINISHED"
        # MLflow's compare page shows what was logged first.
        assert set(trial.data.params) == {"p", "T", "L"} and next(iter(trial.data.metrics)) == "mitigation"
        assert {"mitigation", "legal_impact", "legal_impact_high", "proxy_score", "score", "seconds_learn"} <= set(
            trial.data.metrics
        )
        children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == trial.info.run_id]
        (learning,) = [run for run in children if run.info.run_name == "learn"]
        assert {"publisher_illegal_loss", "soft_mean"} <= set(learning.data.metrics)
        users = [run for run in children if run is not learning]
        assert {run.data.params["class"] for run in users} == {"stripes", "checks"}
        assert all({"distance", "held_out_loss", "loss"} <= set(run.data.metrics) for run in users)
        for user in users:
            assert [point.step for point in client.get_metric_history(user.info.run_id, "held_out_loss")] == [4, 8]
    assert parents["relearn"] is top and parents["final"] is top
    if choice["meets_budget"]:
        (version,) = client.search_model_versions("name = 'raygard-mask-patterns'")
        assert version.tags["raygard.mask_sha256"] == choice["chosen"]["mask_sha256"]
        assert float(version.tags["raygard.mitigation"]) == pytest.approx(choice["outcome"]["mitigation"])
    found = client.search_runs(experiments, "params.p = '0.3' and metrics.mitigation > -9")
    assert len(found) == 2
