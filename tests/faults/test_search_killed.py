"""The driver of a search is really killed; the same command again goes on, and chooses as if nothing had happened."""

from __future__ import annotations

import json
import time

import pytest

from tests.faults.test_driver_killed import end_group
from tests.search_fixtures import start_search

pytestmark = pytest.mark.faults


def test_finished_trials_are_not_repeated_and_the_choice_is_that_of_an_undisturbed_search(
    patterns, searched, tmp_path
) -> None:
    out = tmp_path / "search"
    process = start_search(patterns, out)
    deadline = time.monotonic() + 600
    while not list(out.glob("trials/*/trial.json")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    assert process.poll() is None, process.communicate()[0][-3000:]
    end_group(process)
    watched = [*out.glob("trials/*/trial.json"), *out.rglob("_SUCCESS.json"), *out.glob("store/*/*/*.json")]
    finished = {file: file.stat().st_mtime_ns for file in watched}
    trials = [file for file in finished if file.name == "trial.json"]
    assert 1 <= len(trials) < 4

    again = start_search(patterns, out)
    output = again.communicate(timeout=900)[0]
    assert again.returncode == 0, output[-3000:]
    for file, written in finished.items():
        assert file.stat().st_mtime_ns == written, f"{file} was written again"
    mine, theirs = (json.loads((folder / "choice.json").read_text()) for folder in (out, searched[0]))
    assert mine == theirs
    assert json.loads((out / "run.json").read_text())["relearn_runs"] == 1
