"""The driver of a search is really killed; the same command again goes on, and chooses as if nothing had happened.

Its MLflow server cannot be reached all the while; what it would have been told is sent later.
"""

from __future__ import annotations

import json
import time

import pytest

from raygard.config_file import load_config
from raygard.tracking import sync
from tests.faults.test_driver_killed import end_group
from tests.search_fixtures import SETTINGS, check_hierarchy, lend, start_search

pytestmark = pytest.mark.faults

# Nothing listens on the port "discard" of loopback.
UNREACHABLE = "tracking.tracking_uri=http://127.0.0.1:9"


def test_finished_trials_are_not_repeated_and_the_choice_is_that_of_an_undisturbed_search(
    patterns, searched, tmp_path
) -> None:
    out = tmp_path / "search"
    # Users have tests of their own kills: here masks are learned, and trials begun and finished.
    config = load_config(None, [*SETTINGS, f"domain.data={patterns}", UNREACHABLE])
    lend(searched[0], out, config, parts=("cache", "store"))
    process = start_search(patterns, out, UNREACHABLE)
    deadline = time.monotonic() + 600
    while not list(out.glob("trials/*/trial.json")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    assert process.poll() is None, process.communicate()[0][-3000:]
    end_group(process)
    watched = [*out.glob("trials/*/trial.json"), *out.rglob("_SUCCESS.json"), *out.glob("store/*/*/*.json")]
    finished = {file: file.stat().st_mtime_ns for file in watched}
    trials = [file for file in finished if file.name == "trial.json"]
    assert 1 <= len(trials) < 4

    again = start_search(patterns, out, UNREACHABLE)
    output = again.communicate(timeout=900)[0]
    assert again.returncode == 0, output[-3000:]
    assert output.count("MLflow tracking failed, the run goes on") == 1
    for file, written in finished.items():
        assert file.stat().st_mtime_ns == written, f"{file} was written again"
    mine, theirs = (json.loads((folder / "choice.json").read_text()) for folder in (out, searched[0]))
    assert mine == theirs
    assert json.loads((out / "run.json").read_text())["relearn_runs"] == 1

    live = f"sqlite:///{tmp_path / 'live.db'}"
    assert sync(out, live) > 0
    check_hierarchy(live, mine)
