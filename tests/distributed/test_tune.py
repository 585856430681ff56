"""Optuna proposes, ASHA prunes by a calibrated proxy, the driver is killed: a real Tuner with canned results."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.test_driver_killed import end_group

pytestmark = pytest.mark.distributed

CANNED = Path(__file__).parent / "canned_trials.py"


def start(data: Path, out: Path, seconds: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, str(CANNED), str(data), str(out), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, output[-2000:] + errors[-3000:]
    return json.loads(output.splitlines()[-1])


@pytest.fixture(scope="module")
def undisturbed(patterns, tmp_path_factory) -> dict[str, Any]:
    return finish(start(patterns, tmp_path_factory.mktemp("undisturbed") / "out"))


def test_a_proxy_on_another_scale_than_the_budget_prunes_once_it_is_calibrated(undisturbed) -> None:
    statuses, decisions = undisturbed["statuses"], undisturbed["decisions"]
    assert len(statuses) == 7 and set(statuses.values()) == {"scored", "pruned"}
    assert {d["trial_id"] for d in decisions if d["stopped"]} == {t for t, s in statuses.items() if s == "pruned"}
    assert all(d["pruning"] == (d["scored"] >= 3 and d["correlation"] >= 0.5) for d in decisions)
    assert all(d["fidelity"] == 0.5 for d in decisions if d["stopped"])


def test_a_killed_search_prunes_and_scores_what_an_undisturbed_one_does(patterns, undisturbed, tmp_path) -> None:
    out = tmp_path / "out"
    process = start(patterns, out, seconds=1.0)
    deadline = time.monotonic() + 300
    # Past the calibration: what was learned from it must survive.
    while len(list(out.glob("trials/*/trial.json"))) < 4 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    assert process.poll() is None, process.communicate()[1][-3000:]
    end_group(process)
    assert finish(start(patterns, out)) == undisturbed
