"""The choice: what may be chosen, what may never change it, and what it says."""

import json
import math

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raygard import schemas
from raygard.errors import RaygardError
from raygard.search.choice import choose, with_outcome

BUDGET = 0.05
PICKED = ("meets_budget", "chosen", "nearest", "front")


def candidate(name, mitigation=0.2, upper=0.04, *, p=0.3, impact=None, **fields):
    impact = upper - 0.02 if impact is None else impact
    return {
        "candidate_id": name,
        "trial_id": f"trial-{name}",
        "p": p,
        "T": 0.2,
        "L": 5,
        "K": 30,
        "rule": "budget",
        "illegal_weight": 1.0,
        "legal_weight": 1.0,
        "mask": f"trials/trial-{name}/masks/{name}",
        "mask_sha256": "0" * 64,
        "freeze_ratio": p,
        "param_share": 0.4,
        "proxy": [],
        "mitigation": mitigation,
        "mitigation_ci": [mitigation - 0.05, mitigation + 0.05],
        "legal_impact": impact,
        "legal_impact_ci": [impact - 0.02, upper],
        "score": mitigation,
        **fields,
    }


def chosen_from(candidates, budget=BUDGET):
    return choose(
        candidates, domain="d", legal_budget=budget, legal_penalty=2.0, config_hash="0123456789abcdef", seed=0
    )


def summary(**fields):
    entry = {"defence": "freeze", "mitigation": 0.3, "mitigation_ci": [0.2, 0.4], "freeze_ratio": 0.3}
    return {
        "summary": [{"defence": "none"}, {**entry, "legal_impact": 0.01, "legal_impact_ci": [-0.02, 0.03], **fields}]
    }


# Few distinct values, so that ties and candidates exactly on the budget are common.
LEVELS = st.sampled_from([-0.1, 0.0, 0.05, 0.1, 0.2])


@st.composite
def searches(draw, min_size=1):
    values = draw(st.lists(st.tuples(LEVELS, LEVELS, st.sampled_from([0.1, 0.3])), min_size=min_size, max_size=8))
    return [candidate(f"c{i}", mitigation, upper, p=p) for i, (mitigation, upper, p) in enumerate(values)]


def test_largest_mitigation_within_the_budget_is_chosen():
    found = chosen_from([candidate("low", 0.1, 0.01), candidate("best", 0.3, 0.05), candidate("dear", 0.6, 0.0501)])
    assert found["chosen"]["candidate_id"] == "best"
    assert (found["meets_budget"], found["nearest"], found["considered"]) == (True, None, 3)
    assert found["front"] == ["dear", "best", "low"]
    assert found["chosen"]["mask"] == "trials/trial-best/masks/best"
    assert "p = 0.3 (T = 0.2, L = 5)" in found["statement"]


def test_the_upper_bound_decides_not_the_estimate():
    found = chosen_from([candidate("wide", 0.5, 0.2, impact=0.0), candidate("narrow", 0.1, 0.04, impact=0.03)])
    assert found["chosen"]["candidate_id"] == "narrow"
    assert set(found["front"]) == {"wide", "narrow"}


def test_no_candidate_within_the_budget_is_said_plainly():
    found = chosen_from([candidate("far", 0.6, 0.3), candidate("near", 0.1, 0.06), candidate("worse", 0.05, 0.06)])
    assert (found["meets_budget"], found["chosen"], found["nearest"]["candidate_id"]) == (False, None, "near")
    assert found["statement"].startswith("No p meets the budget")
    assert found["front"] == ["far", "near"]


@given(searches(), LEVELS)
def test_never_above_the_budget_and_never_beaten_within_it(candidates, budget):
    budget = abs(budget)
    found = chosen_from(candidates, budget)
    within = [c for c in candidates if c["legal_impact_ci"][1] <= budget]
    assert found["meets_budget"] == bool(within)
    assert (found["chosen"] is None) != (found["nearest"] is None)
    if within:
        assert found["chosen"]["legal_impact_ci"][1] <= budget
        assert found["chosen"]["mitigation"] == max(c["mitigation"] for c in within)
    else:
        assert found["nearest"]["legal_impact_ci"][1] == min(c["legal_impact_ci"][1] for c in candidates)


@given(searches(min_size=2), st.randoms(use_true_random=False))
def test_order_does_not_matter(candidates, random):
    found = chosen_from(candidates)
    random.shuffle(candidates)
    assert chosen_from(candidates) == found


@given(searches(), st.data())
def test_a_dominated_candidate_never_changes_the_choice(candidates, data):
    found = chosen_from(candidates)
    better = data.draw(st.sampled_from(candidates))
    less, more = data.draw(st.sampled_from([(0.0, 0.01), (0.01, 0.0), (0.03, 0.02)]))
    dominated = candidate("a", better["mitigation"] - less, better["legal_impact_ci"][1] + more, p=0.05, impact=-1.0)
    again = chosen_from([dominated, *candidates])
    assert {key: again[key] for key in PICKED} == {key: found[key] for key in PICKED}


@given(searches())
def test_front_holds_the_pick_and_only_what_nothing_beats(candidates):
    found = chosen_from(candidates)
    by_name = {c["candidate_id"]: (c["mitigation"], -c["legal_impact_ci"][1]) for c in candidates}
    assert (found["chosen"] or found["nearest"])["candidate_id"] in found["front"]
    for name, point in by_name.items():
        beaten = any(o != point and o[0] >= point[0] and o[1] >= point[1] for o in by_name.values())
        assert (name in found["front"]) != beaten


def test_ties_go_to_less_impact_then_smaller_p_then_name():
    assert chosen_from([candidate("a", 0.2, 0.04), candidate("b", 0.2, 0.03)])["chosen"]["candidate_id"] == "b"
    assert chosen_from([candidate("a", p=0.5), candidate("b", p=0.1)])["chosen"]["candidate_id"] == "b"
    assert chosen_from([candidate("b"), candidate("a")])["chosen"]["candidate_id"] == "a"
    near = [candidate("a", 0.1, 0.2), candidate("b", 0.2, 0.2, p=0.5), candidate("c", 0.2, 0.2, p=0.3)]
    assert chosen_from(near)["nearest"]["candidate_id"] == "c"


@pytest.mark.parametrize("hole", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["mitigation", "legal_impact"])
def test_candidate_without_finite_numbers_is_never_chosen(field, hole):
    broken = candidate("broken", 0.9, 0.0) | {field: hole}
    wide = candidate("wide", 0.9, 0.0) | {f"{field}_ci": None if hole is None else [hole, hole]}
    found = chosen_from([broken, wide, candidate("whole")])
    assert found["chosen"]["candidate_id"] == "whole"
    assert (found["front"], found["considered"]) == (["whole"], 1)
    with pytest.raises(RaygardError, match="none of the 2 candidates of domain 'd'") as caught:
        chosen_from([broken, wide])
    assert "\n" not in str(caught.value)


def test_nothing_to_choose_from_is_refused():
    with pytest.raises(RaygardError, match="no candidate to choose from"):
        chosen_from([])


def test_two_candidates_of_one_name_are_refused():
    with pytest.raises(RaygardError, match="two candidates of domain 'd' are called 'a'"):
        chosen_from([candidate("a"), candidate("b"), candidate("a", 0.5)])


def test_mitigation_that_may_be_zero_is_not_sold():
    assert "not shown to be above zero" in chosen_from([candidate("a", 0.04)])["statement"]
    assert "not shown to be above zero" not in chosen_from([candidate("a", 0.2)])["statement"]


@given(searches())
def test_choice_follows_its_schema(candidates):
    found = chosen_from(candidates)
    validate = jsonschema.Draft202012Validator(schemas.load("choice")).validate
    validate(json.loads(json.dumps(found, allow_nan=False)))
    validate(json.loads(json.dumps(with_outcome(found, summary()), allow_nan=False)))


@pytest.mark.parametrize("change", [{"meets_budget": "yes"}, {"chosen": {}}, {"front": None}, {"surprise": 1}])
def test_schema_refuses_damage(change):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(chosen_from([candidate("a")]) | change, schemas.load("choice"))


def test_outcome_of_the_user_half_is_filled_in_once():
    found = chosen_from([candidate("a")])
    filled = with_outcome(found, summary(), path="final/outcome.json")
    assert filled["outcome"] == {
        "mitigation": 0.3,
        "mitigation_ci": [0.2, 0.4],
        "legal_impact": 0.01,
        "legal_impact_ci": [-0.02, 0.03],
        "path": "final/outcome.json",
    }
    assert filled["statement"].startswith(found["statement"])
    assert "0.03, is within the budget" in filled["statement"]
    assert with_outcome(filled, summary()) == filled
    kept = {key: value for key, value in filled.items() if key not in ("outcome", "statement")}
    assert kept == {key: found[key] for key in kept}


def test_user_half_above_the_budget_is_said():
    over = with_outcome(chosen_from([candidate("a")]), summary(legal_impact_ci=[0.0, 0.08]))
    assert "0.08, exceeds the budget of 0.05" in over["statement"]
    unknown = with_outcome(chosen_from([candidate("a")]), summary(legal_impact=None, legal_impact_ci=None))
    assert "cannot be measured" in unknown["statement"]


def test_outcome_without_the_learned_mask_is_refused():
    with pytest.raises(RaygardError, match="no defence 'freeze'"):
        with_outcome(chosen_from([candidate("a")]), {"summary": [{"defence": "none"}]})
