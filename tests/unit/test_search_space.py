"""The points of a search and the configuration of each trial; p drawn anew for each publisher step."""

from __future__ import annotations

import pytest
import torch

from raygard.bilevel.rules import RULES, RuleSettings, make_rule
from raygard.config import RunConfig
from raygard.config_file import load_config
from raygard.errors import RaygardError
from raygard.search.space import (
    candidate_id,
    candidate_ratios,
    concurrent_trials,
    grid,
    milestones,
    num_trials,
    trial_config,
)

SPACE = ("search.freeze_ratios=[0.1,0.3,0.5,0.7]", "search.temperatures=[0.1,0.4]", "search.inner_steps=[2,5,10]")


def config(*overrides: str) -> RunConfig:
    return load_config(None, ["bilevel.publisher_steps=40", "bilevel.inner_steps=10", *SPACE, *overrides])


def test_grid_holds_every_combination_once_in_an_order_that_the_seed_decides() -> None:
    points = grid(config())
    assert len(points) == len(set(points)) == 4 * 2 * 3
    assert len({point.trial_id for point in points}) == len(points)
    assert points == grid(config()) and points != grid(config("seed=1"))
    assert set(points) == set(grid(config("seed=1")))


def test_dimensions_that_are_not_searched_keep_the_configuration() -> None:
    (point,) = grid(load_config(None, ["search.freeze_ratios=[0.3]", "mask.temperature=0.7", "bilevel.inner_steps=3"]))
    assert (point.freeze_ratio, point.temperature, point.inner_steps) == (0.3, 0.7, 3)


def test_k_times_l_is_held_and_relearning_does_not_depend_on_the_point() -> None:
    base = config()
    for point in grid(base):
        trial = trial_config(base, point)
        assert trial.bilevel.publisher_steps * trial.bilevel.inner_steps == 400
        assert (trial.mask.freeze_ratio, trial.mask.temperature) == (point.freeze_ratio, point.temperature)
        assert (trial.relearn, trial.domain, trial.mask.mask_lr) == (base.relearn, base.domain, base.mask.mask_lr)


def test_one_ranking_serves_every_p() -> None:
    base = config("search.mode=one_ranking")
    points = grid(base)
    assert len(points) == 6
    for point in points:
        assert candidate_ratios(base, point) == (0.1, 0.3, 0.5, 0.7)
        assert trial_config(base, point).mask.draw_ratios == (0.1, 0.3, 0.5, 0.7)
        assert len({candidate_id(point, ratio) for ratio in (0.1, 0.3, 0.5, 0.7)}) == 4


def test_optuna_may_ask_for_fewer_trials_than_the_grid_has() -> None:
    assert num_trials(config()) == 24
    assert num_trials(config("search.algorithm=optuna", "search.num_trials=7")) == 7
    assert num_trials(config("search.algorithm=optuna", "search.num_trials=99")) == 24


def test_milestones_end_with_the_full_adaptation() -> None:
    steps = milestones(config("adapt.max_train_steps=100", "search.fidelities=[0.25,0.5,1.0]"))
    assert steps == (25, 50, 100)


@pytest.mark.parametrize(
    ("have", "overrides", "expected"),
    [
        ({"CPU": 8.0}, [], 8),
        ({"CPU": 8.0}, ["engine.num_workers=2"], 4),
        ({"CPU": 8.0}, ["engine.num_workers=2", "search.max_concurrent_trials=3"], 3),
        ({"CPU": 8.0}, ["search.max_concurrent_trials=99"], 8),
        ({"CPU": 3.0}, ["engine.num_workers=4", "engine.min_workers=2", "bilevel.train_batch_size=24"], 1),
        ({"CPU": 64.0, "GPU": 9.0}, ["engine.use_gpu=true", "engine.num_workers=4"], 2),
        ({"CPU": 64.0, "GPU": 8.0}, ["engine.use_gpu=true", "engine.num_workers=4", "evaluation.generator_gpus=1"], 1),
    ],
)
def test_concurrent_trials_follow_the_cluster(have, overrides, expected: int) -> None:
    assert concurrent_trials(load_config(None, overrides), have) == expected


@pytest.mark.parametrize(
    ("have", "overrides", "says"),
    [
        ({"CPU": 1.0}, ["engine.num_workers=2", "engine.min_workers=2"], "one trial needs 2 CPU"),
        ({"CPU": 1.0}, ["engine.num_workers=4"], "one trial needs 4 CPU and the evaluation actors hold 0"),
        ({"CPU": 2.0}, ["engine.num_workers=2", "evaluation.generator_cpus=0.5"], "hold 0.5, but the cluster has 2"),
        (
            {"CPU": 64.0, "GPU": 2.0},
            ["engine.use_gpu=true", "engine.num_workers=2", "evaluation.scorer_gpus=0.5"],
            "needs 2 GPU and the evaluation actors hold 0.5",
        ),
    ],
)
def test_what_fits_alone_but_not_together_is_refused(have, overrides, says: str) -> None:
    with pytest.raises(RaygardError, match=says):
        concurrent_trials(load_config(None, overrides), have)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("search.freeze_ratios=[]", "search space is empty"),
        ("search.freeze_ratios=[0.3,1.0]", "between 0 and 1, got 1"),
        ("search.freeze_ratios=[0.3,0.3]", "twice"),
        ("search.controls=[rndom]", "did you mean 'random'"),
        ("search.rules=[budgt]", "did you mean 'budget'"),
        ("search.fidelities=[0.5]", "rise from above 0 to 1"),
        ("search.num_trials=3", "no effect with search.algorithm=grid"),
        ("domain.legal_budget=many", "domain.legal_budget"),
        ("domain.legal_budget=yes", "needs a number"),
        ("evaluation.generator_gpus=1.5", "given out whole"),
        ("domain.legal_budget=1.5", "less than or equal to 1"),
    ],
)
def test_bad_search_settings_are_one_line(override: str, says: str) -> None:
    with pytest.raises(RaygardError) as caught:
        load_config(None, [override])
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(name for name, rule in RULES.items() if rule.draws_ratios))
def test_drawing_p_moves_the_budget_from_step_to_step_and_every_rank_draws_alike(name: str) -> None:
    ratios = (0.2, 0.5, 0.8)
    settings = RuleSettings(50, 0.3, 0.2, 0.05, 0.0, None, 4, ratios)
    rules = [make_rule(name, settings) for _ in range(2)]
    states = [rule.initial() for rule in rules]
    signals = torch.randn(30, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    held, seen = {max(ratio, RULES[name].least_ratio) for ratio in ratios}, set()
    for signal in signals:
        for rule, state in zip(rules, states, strict=True):
            rule.update(state, signal)
        assert torch.equal(states[0]["logits"], states[1]["logits"])
        mean = float(rules[0].soft(states[0]).mean())
        seen.add(min(held, key=lambda ratio: abs(ratio - mean)))
        assert min(abs(mean - ratio) for ratio in held) < 1e-9
    assert seen == held


def test_a_rule_that_cannot_draw_p_is_refused_for_one_ranking() -> None:
    for overrides in (["mask.rule=paper"], ["search.rules=[budget,paper]"]):
        with pytest.raises(RaygardError, match="needs a rule that can draw p; 'paper' cannot"):
            load_config(None, ["search.mode=one_ranking", *overrides])
