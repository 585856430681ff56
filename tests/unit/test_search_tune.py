"""What Tune is told to do: prune only by a proxy that has earned it, propose each point once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from raygard.cluster.search import CalibratedASHA, DistinctOptuna
from raygard.cluster.trial import rung_times
from raygard.config import load_config
from raygard.search.space import Point, dimensions, grid

SPACE = ["search.freeze_ratios=[0.1,0.3,0.5]", "search.temperatures=[0.1,0.4]", "search.inner_steps=[2,5]"]


def decisions(score_of, *, min_trials: int = 4, num_trials: int = 12) -> list[list[str]]:
    """Decisions at each report of trials whose proxies fall from trial to trial; score_of: final score by trial."""
    times = [1, 2, 4]
    scheduler = CalibratedASHA(times, 2, min_trials, 0.5)
    found = []
    for number in range(num_trials):
        trial = SimpleNamespace(trial_id=str(number))
        scheduler.on_trial_add(None, trial)
        reports = [{"k": 1}, {"k": 2}]
        reports += [{"fidelity": t, "proxy": -float(number), "score": -float(number), "scored": 0} for t in times[:-1]]
        reports += [{"fidelity": times[-1], "score": score_of(number), "proxy": score_of(number), "scored": 1}]
        mine = []
        for report in reports:
            mine.append(scheduler.on_trial_result(None, trial, report))
            if mine[-1] == "STOP":
                break
        found.append(mine)
    return found


def test_nothing_is_pruned_before_the_calibration_trials_are_scored() -> None:
    found = decisions(lambda number: -number, min_trials=4)
    assert all("STOP" not in mine for mine in found[:4])


def test_a_proxy_that_ranks_as_the_score_does_prunes_and_saves_the_rest_of_the_trial() -> None:
    found = decisions(lambda number: -number, min_trials=4)
    stopped = [mine for mine in found[4:] if "STOP" in mine]
    assert len(stopped) == len(found) - 4
    # At the first rung: after two reports from learning and one proxy.
    assert all(len(mine) == 3 for mine in stopped)


@pytest.mark.parametrize("score_of", [lambda number: number, lambda number: (number * 7) % 5, lambda number: 1.0])
def test_a_proxy_that_does_not_rank_as_the_score_prunes_nothing(score_of) -> None:
    assert all("STOP" not in mine for mine in decisions(score_of))


def test_the_final_score_is_the_last_time_and_rungs_are_powers_of_the_reduction_factor() -> None:
    assert rung_times(load_config(None, ["search.fidelities=[0.25,0.5,1.0]"])) == [1, 2, 4, 8]
    assert rung_times(load_config(None, ["search.fidelities=[1.0]", "search.reduction_factor=3"])) == [1, 3]


def optuna(seed: int = 0) -> DistinctOptuna:
    config = load_config(None, SPACE)
    return DistinctOptuna(dimensions(config), [point.to_json() for point in grid(config)], seed)


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
