"""The driver is really killed; the same command again finishes without repeating what was done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.faults

SETTINGS = (
    "domain.illegal=[a]",
    "domain.legal=[c]",
    "domain.resolution=16",
    "engine.num_workers=1",
    "engine.cpus_per_worker=0.5",
    "engine.checkpointing_steps=2",
    "bilevel.train_batch_size=4",
    "bilevel.inner_steps=1",
    "bilevel.publisher_steps=4",
    "relearn.max_train_steps=4",
    "adapt.max_train_steps=2",
    "generation.num_images=2",
    "generation.num_inference_steps=2",
    "evaluation.random_draws=1",
    "evaluation.bootstrap_samples=100",
    "evaluation.cpus_per_job=0.5",
)


def start(setting, out: Path) -> subprocess.Popen[str]:
    paths = [f"domain.data={setting.root / 'data'}", f"model.pretrained_model_name_or_path={setting.root / 'sd'}"]
    command = [sys.executable, "-m", "raygard.cli", "run", "--out", str(out), *paths, *SETTINGS]
    # A process group of its own, so that exactly what this test started can be ended.
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def end_group(process: subprocess.Popen[str]) -> None:
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def test_same_command_again_finishes_and_repeats_nothing(setting, tmp_path, report_fault) -> None:
    out = tmp_path / "run"
    process = start(setting, out)
    deadline = time.monotonic() + 400
    jobs = out / "evaluation" / "jobs"
    while len(list(jobs.glob("*/result.json"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    assert process.poll() is None, process.communicate()[0][-3000:]
    end_group(process)
    finished = {file: file.stat().st_mtime_ns for file in jobs.glob("*/result.json")}
    stages = {file: file.stat().st_mtime_ns for file in out.rglob("_SUCCESS.json")}
    assert len(finished) >= 2 and len(stages) == 2

    started = time.monotonic()
    again = start(setting, out)
    while len(list(jobs.glob("*/result.json"))) <= len(finished) and again.poll() is None:
        time.sleep(0.1)
    report_fault("driver killed, same command again", "adaptations under way", time.monotonic() - started)
    output = again.communicate(timeout=500)[0]
    assert again.returncode == 0, output[-3000:]
    for file, written in {**finished, **stages}.items():
        assert file.stat().st_mtime_ns == written, f"{file} was written again"
    outcome = json.loads((out / "outcome.json").read_text())
    assert {row["defence"] for row in outcome["rows"]} == {
        "none",
        "freeze",
        "random",
        "random-matched",
        "largest-first",
    }
    assert (out / "report.html").stat().st_size > 10_000
    assert "mitigation" in output and str(out / "report.html") in output
