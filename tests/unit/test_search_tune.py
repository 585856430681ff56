"""What Tune is told to do: prune only by a proxy that has earned it, propose each point once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import raygard.cluster.search as search
from raygard.cluster.search import CalibratedASHA, DistinctOptuna
from raygard.cluster.trial import rung_times
from raygard.config_file import load_config
from raygard.search.proxy import Evidence
from raygard.search.space import Point, dimensions, grid

SPACE = ["search.freeze_ratios=[0.1,0.3,0.5]", "search.temperatures=[0.1,0.4]", "search.inner_steps=[2,5]"]


TIMES = [1, 2, 4]


@pytest.fixture
def session(monkeypatch, tmp_path) -> search.Session:
    found = search.Session(lambda *event: None, Evidence(budget=0.2, penalty=2.0), tmp_path / "decisions.json")
    monkeypatch.setattr(search, "_SESSION", found)
    return found


def reports(number: int, mitigation: float) -> list[dict[str, Any]]:
    """What a trial reports whose proxy falls with its number."""
    shared = {"trial": str(number), "legal_impacts": [0.0]}
    proxies = [{**shared, "fidelity": t, "scored": 0, "mitigations": [-float(number)]} for t in TIMES[:-1]]
    final = {**shared, "fidelity": TIMES[-1], "scored": 1, "mitigations": [mitigation], "score": mitigation}
    return [{"k": 1}, {"k": 2}, *proxies, final]


def decisions(score_of, numbers=range(12), *, min_trials: int = 4) -> list[list[str]]:
    """Decisions at each report of trials whose proxies fall from trial to trial; score_of: final score by trial."""
    scheduler = CalibratedASHA(TIMES, 2, min_trials, 0.5)
    found = []
    for number in numbers:
        trial = SimpleNamespace(trial_id=f"tune-{number}")
        scheduler.on_trial_add(None, trial)
        mine = []
        for report in reports(number, float(score_of(number))):
            mine.append(scheduler.on_trial_result(None, trial, report))
            if mine[-1] == "STOP":
                break
        found.append(mine)
    return found


def test_nothing_is_pruned_before_the_calibration_trials_are_scored(session) -> None:
    found = decisions(lambda number: -number, min_trials=4)
    assert all("STOP" not in mine for mine in found[:4])


def test_a_proxy_that_ranks_as_the_score_does_prunes_and_saves_the_rest_of_the_trial(session) -> None:
    found = decisions(lambda number: -number, min_trials=4)
    stopped = [mine for mine in found[4:] if "STOP" in mine]
    assert len(stopped) == len(found) - 4
    # At the first rung: after two reports from learning and one proxy.
    assert all(len(mine) == 3 for mine in stopped)


@pytest.mark.parametrize("score_of", [lambda number: number, lambda number: (number * 7) % 5, lambda number: 1.0])
def test_a_proxy_that_does_not_rank_as_the_score_prunes_nothing(session, score_of) -> None:
    assert all("STOP" not in mine for mine in decisions(score_of))


def test_every_decision_is_written_down_with_its_grounds(session) -> None:
    found = decisions(lambda number: -number, min_trials=4)
    written = search.read_decisions(session.file)
    assert written == session.evidence.decisions
    assert sum(entry["stopped"] for entry in written) == sum("STOP" in mine for mine in found)
    assert all(entry["pruning"] == (entry["scored"] >= 4) for entry in written)
    assert all(entry["correlation"] == 1.0 for entry in written if entry["pruning"])


def test_a_scheduler_that_tune_restored_decides_as_the_one_that_was_lost(session) -> None:
    straight = decisions(lambda number: -number)
    session.evidence.__init__(0.2, 2.0)
    before = decisions(lambda number: -number, range(6))
    # Tune pickles a scheduler when the search begins, and never again.
    after = decisions(lambda number: -number, range(6, 12))
    assert before + after == straight


def test_the_final_score_is_the_last_time_and_rungs_are_powers_of_the_reduction_factor() -> None:
    assert rung_times(load_config(None, ["search.fidelities=[0.25,0.5,1.0]"])) == [1, 2, 4, 8]
    assert rung_times(load_config(None, ["search.fidelities=[1.0]", "search.reduction_factor=3"])) == [1, 3]


def optuna(seed: int = 0, first: tuple[Point, ...] = ()) -> DistinctOptuna:
    config = load_config(None, SPACE)
    return DistinctOptuna(dimensions(config), [point.to_json() for point in grid(config)], seed, first)


def test_optuna_proposes_every_point_once_and_then_ends() -> None:
    searcher, seen = optuna(), []
    for number in range(12):
        point = searcher.suggest(str(number))
        seen.append(Point(**point).trial_id)
        searcher.on_trial_result(str(number), {"k": 1, "training_iteration": 1})
        searcher.on_trial_complete(str(number), {"score": float(number)})
    assert len(set(seen)) == 12
    assert searcher.suggest("13") == searcher.FINISHED


def test_optuna_proposes_alike_for_equal_seeds_and_goes_on_after_a_restore(tmp_path) -> None:
    def proposals(searcher: DistinctOptuna, first: int, last: int) -> list[dict]:
        found = []
        for number in range(first, last):
            found.append(searcher.suggest(str(number)))
            searcher.on_trial_complete(str(number), {"score": float(number % 3)})
        return found

    straight = proposals(optuna(), 0, 9)
    broken = optuna()
    before = proposals(broken, 0, 4)
    broken.save(str(tmp_path / "state"))
    restored = optuna(seed=5)
    restored.restore(str(tmp_path / "state"))
    assert before + proposals(restored, 4, 9) == straight


def test_optuna_begins_with_what_an_earlier_attempt_finished() -> None:
    first = tuple(grid(load_config(None, SPACE))[-3:])
    searcher = optuna(first=first)
    seen = [Point(**searcher.suggest(str(number))) for number in range(12)]
    assert tuple(seen[:3]) == first and len(set(seen)) == 12


def test_a_pruned_trial_does_not_reach_optuna_as_a_scored_one() -> None:
    searcher = optuna()
    searcher.suggest("0")
    searcher.on_trial_complete("0", reports(0, 0.3)[2])
    (trial,) = searcher._ot_study.trials
    assert trial.value is None
