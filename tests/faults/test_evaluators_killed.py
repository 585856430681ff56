"""Generators, scorers, adaptations and the coordinator are really killed; every item is scored exactly once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raygard.cluster.evaluation import EvaluationPool, run_jobs
from raygard.store import Store
from tests.evaluation_bench import Bench, adaptations, assert_each_picture_scored_once, make_bench, wait_for
from tests.faults.poison_run import GREYS, LOG

pytestmark = pytest.mark.faults

# Long enough that a generator is in the middle of an item when it is killed.
SLOW = ("generation.num_inference_steps=60",)
CLASSES = "ac"


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tiny_maker, imagefolder_maker) -> Bench:
    return make_bench(tmp_path_factory.mktemp("bench"), tiny_maker, imagefolder_maker, repeat=10)


@pytest.fixture(scope="module")
def pool(bench, ray_cluster) -> Iterator[EvaluationPool]:
    """For whoever needs no scorer that still has to read its references, and no counts from zero."""
    with EvaluationPool.start(bench.config(*SLOW)) as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(bench, pool, tmp_path_factory) -> list[dict[str, Any]]:
    return measure(bench, pool, tmp_path_factory.mktemp("undisturbed"), [])


def measure(
    bench: Bench, pool: EvaluationPool, store: Path, strikes: list[Callable[[EvaluationPool], None]], *overrides: str
) -> list[dict[str, Any]]:
    """Results of a run during which `strikes` are carried out, one after the other, by a thread."""
    failed: list[BaseException] = []

    def strike() -> None:
        try:
            for blow in strikes:
                blow(pool)
        except AssertionError as error:
            failed.append(error)

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    inputs = bench.inputs(bench.config(*SLOW, *overrides), store)
    results = run_jobs(bench.jobs("none", "base", classes=CLASSES), inputs, pool)
    thread.join(300)
    assert not thread.is_alive() and not failed, failed
    return results


def measure_apart(
    bench: Bench, store: Path, strikes: list[Callable[[EvaluationPool], None]], *overrides: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The same on actors of its own, and their status at the end."""
    with EvaluationPool.start(bench.config(*SLOW, *overrides)) as own:
        return measure(bench, own, store, strikes, *overrides), own.status()


def working(pool: EvaluationPool, kind: str, items: int) -> tuple[int, int] | None:
    """Pid of a worker that is on an item once `items` of them are done, and how many are done."""
    status = pool.status()[kind]
    pids = [worker["pid"] for worker in status["workers"] if worker["working"]]
    return (pids[0], status["done"]) if pids and status["done"] >= items else None


def strike_at_work(kind: str, after: int, number: signal.Signals) -> Callable[[EvaluationPool], None]:
    """Send a signal to a worker while it is on an item: it is stopped first, and looked at again."""

    def blow(pool: EvaluationPool) -> None:
        while True:
            found = wait_for(lambda: working(pool, kind, after))
            os.kill(found[0], signal.SIGSTOP)
            time.sleep(0.2)
            if working(pool, kind, after) == found:
                os.kill(found[0], number)
                return
            os.kill(found[0], signal.SIGCONT)

    return blow


def same(results: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    return [(r["job_id"], r["distances"]) for r in results] == [(r["job_id"], r["distances"]) for r in expected]


def test_killed_scorer_and_generator_are_replaced(bench, undisturbed, tmp_path) -> None:
    results, status = measure_apart(
        bench,
        tmp_path,
        [
            strike_at_work("scorers", 0, signal.SIGKILL),
            strike_at_work("generators", 2, signal.SIGKILL),
        ],
    )
    assert same(results, undisturbed)
    items = assert_each_picture_scored_once(results, tmp_path)
    for kind in ("generators", "scorers"):
        assert (status[kind]["done"], status[kind]["retried"], status[kind]["failed"]) == (items, 1, 0)
    attempts = [item for result in results for item in score_record(tmp_path, result)["items"]]
    assert sorted(item["generate_attempts"] for item in attempts) == [1] * (items - 1) + [2]
    assert sorted(item["score_attempts"] for item in attempts) == [1] * (items - 1) + [2]


def test_silent_scorer_is_replaced(bench, undisturbed, tmp_path) -> None:
    results, status = measure_apart(
        bench,
        tmp_path,
        [strike_at_work("scorers", 1, signal.SIGSTOP)],
        "evaluation.item_timeout_s=45",
    )
    assert same(results, undisturbed)
    items = assert_each_picture_scored_once(results, tmp_path)
    assert (status["scorers"]["done"], status["scorers"]["retried"]) == (items, 1)


def test_killed_coordinator_starts_again_and_finishes(bench, pool, undisturbed, tmp_path) -> None:
    before = pool.status()

    def blow(pool: EvaluationPool) -> None:
        wait_for(lambda: working(pool, "generators", before["generators"]["done"] + 1))
        os.kill(before["pid"], signal.SIGKILL)

    results = measure(bench, pool, tmp_path, [blow])
    assert pool.status()["pid"] != before["pid"]
    assert same(results, undisturbed)
    assert_each_picture_scored_once(results, tmp_path)


def test_killed_adaptation_is_repeated(bench, pool, undisturbed, tmp_path) -> None:
    def blow(_pool: EvaluationPool) -> None:
        os.kill(wait_for(adaptations)[0].pid, signal.SIGKILL)

    results = measure(bench, pool, tmp_path, [blow])
    assert same(results, undisturbed)
    assert_each_picture_scored_once(results, tmp_path)


def test_adaptation_that_always_dies_is_reported(bench, pool, undisturbed, tmp_path) -> None:
    ended = threading.Event()

    def blow(_pool: EvaluationPool) -> None:
        while not ended.is_set():
            for process in adaptations():
                process.kill()
            ended.wait(0.05)

    thread = threading.Thread(target=blow, args=(pool,), daemon=True)
    thread.start()
    failure, base = run_jobs(bench.jobs("none", "base", classes="a"), bench.inputs(bench.config(*SLOW), tmp_path), pool)
    ended.set()
    thread.join()
    assert (failure["failed"], failure["stage"], failure["attempts"]) == (True, "adapt", 3)
    assert failure["reason"].startswith("WorkerCrashedError: The worker died unexpectedly")
    assert same([base], [r for r in undisturbed if r["job_id"] == base["job_id"]])


def score_record(store: Path, result: dict[str, Any], scorer: str = "style_enlite0") -> dict[str, Any]:
    return json.loads((Store(store).folder(result["store"]) / f"score-{scorer}.json").read_text())


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory, tiny_maker, imagefolder_maker) -> tuple[Path, dict[str, Any], list[Any]]:
    """Store, output and log of a run whose scorer chokes on class c and on one item of class d."""
    root = tmp_path_factory.mktemp("poisoned")
    make_bench(root, tiny_maker, imagefolder_maker, GREYS)
    log = root / "log"
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.poison_run", str(root)],
        # The hook runs before Ray gives a worker the driver's path.
        env={**os.environ, LOG: str(log), "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return root / "poisoned", json.loads((root / "output.json").read_text()), lines


def test_poisoned_items_are_reported_after_three_attempts(poisoned) -> None:
    _, output, log = poisoned
    a, b, c, d = output["results"]
    assert (c["stage"], c["attempts"], c["reason"]) == ("score", 3, "ZeroDivisionError: cannot stand class c")
    assert (d["stage"], d["attempts"], d["reason"]) == ("score", 3, "the scorer's process died")
    assert sum(grey == GREYS["d"] and count == 1 for _, grey, count in log) == 3
    assert not a.get("failed") and not b.get("failed")


def test_innocent_items_are_scored_once_and_charged_nothing(poisoned) -> None:
    store, output, log = poisoned
    for result in output["results"][:2]:
        items = score_record(store, result, "poisoned")["items"]
        assert [(item["generate_attempts"], item["score_attempts"]) for item in items] == [(1, 1)] * 3
        assert len(result["distances"]) == 5
    assert sum(grey is None for _, grey, _ in log) == 6
    assert sum(grey == GREYS["d"] and count == 2 for _, grey, count in log) <= 2
