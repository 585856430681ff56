"""The choice: what may be chosen, what may never change it, and what it says."""

import json
import math

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raygard import schemas
from raygard.errors import RaygardError
from raygard.search.choice import best_by_ratio, choose, with_outcome

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
        "incomplete": [],
        "mitigation": mitigation,
        "mitigation_ci": [mitigation - 0.05, mitigation + 0.05],
        "legal_impact": impact,
        "legal_impact_ci": [impact - 0.02, upper],
        "score": mitigation,
        **fields,
    }


def chosen_from(candidates, budget=BUDGET, **more):
    about = {"domain": "d", "legal_penalty": 2.0, "config_hash": "0123456789abcdef", "seed": 0}
    return choose(candidates, legal_budget=budget, **about, **more)


def numbers(**fields):
    measured = {"mitigation": 0.3, "mitigation_ci": [0.2, 0.4], "legal_impact": 0.01, "legal_impact_ci": [-0.02, 0.03]}
    return {**measured, "unseen_impact": None, "unseen_impact_ci": None, **fields}


SEVERAL = numbers(mitigation=0.25, mitigation_ci=[0.1, 0.5], mask_seeds=[0, 7])


def test_values_that_spoil_the_release_are_not_chosen():
    """However much they block: with a budget for the release's own loss, what exceeds it is on no front either."""
    spoilt = candidate("spoilt", 0.9, 0.01, base_loss_rise=0.05)
    kept, plain = candidate("kept", 0.4, 0.03, base_loss_rise=0.02), candidate("plain", 0.1, 0.02)
    found = chosen_from([spoilt, kept, plain], base_loss_budget=0.02)
    assert found["chosen"]["candidate_id"] == "kept" and found["front"] == ["kept", "plain"]
    assert (found["chosen"]["base_loss_rise"], found["base_loss_budget"]) == (0.02, 0.02)
    assert "by at most 2 %" in found["rule"] and "own loss on general pictures by +2.0 %" in found["statement"]
    assert chosen_from([spoilt, kept, plain])["chosen"]["candidate_id"] == "spoilt"


def test_the_nearest_keeps_the_release_where_one_does():
    spoilt, kept = candidate("spoilt", 0.9, 0.01, base_loss_rise=0.05), candidate("kept", 0.4, 0.3, base_loss_rise=0.0)
    found = chosen_from([spoilt, kept], base_loss_budget=0.02)
    assert (found["chosen"], found["nearest"]["candidate_id"]) == (None, "kept")
    assert "and the release's own loss from rising by more than 2 %" in found["statement"]
    assert chosen_from([spoilt], base_loss_budget=0.02)["nearest"]["candidate_id"] == "spoilt"


def test_many_known_classes_do_not_hide_what_strangers_lose():
    closed = candidate("closed", 0.9, 0.04, unseen_impact=0.9, unseen_impact_ci=[0.8, 1.0])
    open_ = candidate("open", 0.2, 0.04, unseen_impact=0.0, unseen_impact_ci=[-0.02, 0.05])
    found = chosen_from([closed, open_])
    assert found["chosen"]["candidate_id"] == "open" and "of the unseen classes alone" in found["rule"]
    alone = chosen_from([closed])
    assert (alone["chosen"], alone["nearest"]["candidate_id"]) == (None, "closed") and "upper bound 1" in alone[
        "statement"
    ]


def test_what_strangers_lose_is_in_the_statement():
    found = chosen_from([candidate("a", unseen_impact=0.03, unseen_impact_ci=[0.01, 0.05])])
    assert "(0.030 [0.010, 0.050] of unseen classes alone), whose upper bound" in found["statement"]
    filled = with_outcome(found, numbers(unseen_impact=0.9, unseen_impact_ci=[0.8, 1.0]))
    assert "0.900 [0.800, 1.000] of unseen classes alone" in filled["statement"]


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


def test_of_equal_candidates_the_one_that_saves_users_more_is_chosen():
    equal = [candidate("less", p=0.1, param_share=0.2), candidate("more", p=0.3, param_share=0.6)]
    assert chosen_from(equal)["chosen"]["candidate_id"] == "more"
    assert chosen_from([candidate("better", 0.21, param_share=0.2), equal[1]])["chosen"]["candidate_id"] == "better"


def test_as_much_mitigation_as_the_publisher_says_is_given_up_for_savings():
    best, near, far, dear = (
        candidate("best", 0.5, param_share=0.2),
        candidate("near", 0.46, param_share=0.6),
        candidate("far", 0.4, param_share=0.9),
        candidate("dear", 0.5, upper=0.2, param_share=0.9),
    )
    found = chosen_from([best, near, far, dear], savings_tolerance=0.05)
    assert found["chosen"]["candidate_id"] == "near"
    assert found["rule"].endswith("the largest share of the parameters: its users save most.")
    assert chosen_from([best, near, far, dear])["chosen"]["candidate_id"] == "best"
    assert "save" not in chosen_from([best])["rule"]
    assert chosen_from([dear], savings_tolerance=0.05)["chosen"] is None


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
    for over_seeds in (None, SEVERAL):
        validate(json.loads(json.dumps(with_outcome(found, numbers(), over_seeds), allow_nan=False)))


@pytest.mark.parametrize("change", [{"meets_budget": "yes"}, {"chosen": {}}, {"front": None}, {"surprise": 1}])
def test_schema_refuses_damage(change):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(chosen_from([candidate("a")]) | change, schemas.load("choice"))


def test_outcome_of_the_user_half_is_filled_in_once():
    found = chosen_from([candidate("a")])
    filled = with_outcome(found, numbers(defence="freeze"), path="final/outcome.json")
    assert filled["outcome"] == {**numbers(), "path": "final/outcome.json"}
    assert filled["outcome_over_seeds"] is None and "Mean over" not in filled["statement"]
    assert filled["statement"].startswith(found["statement"])
    assert "0.03, is within the budget" in filled["statement"]
    assert with_outcome(filled, numbers()) == filled
    kept = {key: value for key, value in filled.items() if key not in ("outcome", "statement")}
    assert kept == {key: found[key] for key in kept}


def test_outcome_is_the_released_masks_own_and_the_mean_over_seeds_is_named_apart():
    alone = with_outcome(chosen_from([candidate("a")]), numbers())
    both = with_outcome(chosen_from([candidate("a")]), numbers(), {**SEVERAL, "defence": "freeze"})
    assert both["outcome"] == alone["outcome"]
    assert both["outcome_over_seeds"] == SEVERAL
    own, mean = both["statement"].split("Mean over masks of seeds 0, 7")
    assert own.strip() == alone["statement"]
    assert "mitigation 0.300 [0.200, 0.400]" in own and "mitigation 0.250 [0.100, 0.500]" in mean


def test_user_half_above_the_budget_is_said():
    over = with_outcome(chosen_from([candidate("a")]), numbers(legal_impact_ci=[0.0, 0.08]))
    assert "0.08, exceeds the budget of 0.05" in over["statement"]
    unknown = with_outcome(chosen_from([candidate("a")]), numbers(legal_impact=None, legal_impact_ci=None))
    assert "cannot be measured" in unknown["statement"]


def test_candidate_that_lost_a_class_competes_with_none():
    lost = candidate("lost", 0.9, 0.0, incomplete=["stripes"])
    found = chosen_from([lost, candidate("whole", 0.1)])
    assert (found["chosen"]["candidate_id"], found["front"], found["considered"]) == ("whole", ["whole"], 1)
    nearest = chosen_from([lost, candidate("whole", 0.1, 0.9)])["nearest"]
    assert nearest["candidate_id"] == "whole"
    with pytest.raises(RaygardError, match="1 incomplete"):
        chosen_from([lost])


def test_best_of_a_ratio_has_every_class_and_a_score():
    found = best_by_ratio(
        [
            candidate("lost", 0.9, incomplete=["stripes"]),
            candidate("unscored", 0.8, score=None),
            candidate("best", 0.3),
            candidate("less", 0.2),
            candidate("alone", 0.7, p=0.1, incomplete=["checks"]),
            candidate("other", 0.1, p=0.5),
        ]
    )
    assert {p: c["candidate_id"] for p, c in found.items()} == {0.3: "best", 0.5: "other"}


def test_what_the_intervals_are_conditional_on_is_recorded_and_said():
    notes = ["Pictures are resampled.", "One adaptation seed: intervals are conditional on it."]
    found = chosen_from([candidate("a")], notes=notes, resolvable_legal_impact=0.0321)
    assert (found["notes"], found["resolvable_legal_impact"]) == (notes, 0.0321)
    assert notes[1] in found["statement"] and "0.032" in found["statement"] and "more than" not in found["statement"]
    assert notes[1] in with_outcome(found, numbers())["statement"]
    coarse = chosen_from([candidate("a")], resolvable_legal_impact=0.2)
    assert "0.200, more than the budget of 0.05" in coarse["statement"]
    plain = chosen_from([candidate("a")])
    assert (plain["notes"], plain["resolvable_legal_impact"]) == ([], None)
    assert "intervals" not in plain["statement"] and "resolve" not in plain["statement"]


@pytest.mark.parametrize(("low", "shown"), [(-0.01, False), (0.0, False), (0.01, True)])
def test_a_mask_that_blocks_nothing_on_the_user_half_is_said_to(low, shown) -> None:
    choice = with_outcome(chosen_from([candidate("a")]), numbers(mitigation=0.05, mitigation_ci=[low, 0.2]))
    assert ("There it is not shown to block anything." in choice["statement"]) is not shown
