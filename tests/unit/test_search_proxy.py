"""The proxy by hand: blocked adaptation by loss, scores, rank correlations and what may prune."""

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raygard.errors import RaygardError
from raygard.search.proxy import Evidence, blocked_by_loss, rank_correlation, score, summary, with_predictions

ROLES = {"A": "illegal", "B": "illegal", "C": "legal"}
BASE, FULL = {"A": 0.9, "B": 0.8, "C": 0.7}, {"A": 0.1, "B": 0.4, "C": 0.2}
FINITE = st.floats(-10, 10)


def test_blocked_by_hand():
    mitigation, impact = blocked_by_loss({"A": 0.5, "B": 0.5, "C": 0.25}, FULL, BASE, ROLES)
    assert mitigation == pytest.approx((0.4 + 0.1) / (0.8 + 0.4))
    assert impact == pytest.approx(0.05 / 0.5)


def test_nothing_frozen_blocks_nothing_and_everything_frozen_blocks_all():
    assert blocked_by_loss(FULL, FULL, BASE, ROLES) == (0.0, 0.0)
    assert blocked_by_loss(BASE, FULL, BASE, ROLES) == (1.0, 1.0)


def test_class_that_fine_tuning_does_not_improve_is_left_out():
    guarded = {"A": 0.5, "B": 123.0, "C": 0.25}
    for full_b in (BASE["B"], BASE["B"] + 0.1):
        mitigation, impact = blocked_by_loss(guarded, {**FULL, "B": full_b}, BASE, ROLES)
        assert (mitigation, impact) == (pytest.approx(0.5), pytest.approx(0.1))
    assert blocked_by_loss(guarded, {**FULL, "C": 0.7}, BASE, ROLES)[1] is None
    assert blocked_by_loss(guarded, BASE, BASE, ROLES) == (None, None)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_loss_that_is_not_finite_is_refused(which, loss):
    losses = [dict(FULL), dict(FULL), dict(BASE)]
    losses[which]["B"] = loss
    with pytest.raises(RaygardError, match=r"class 'B' is (nan|inf)"):
        blocked_by_loss(*losses, ROLES)


def test_score_charges_only_what_exceeds_the_budget():
    assert score(0.4, 0.05, 0.05, 2.0) == 0.4
    assert score(0.4, -0.3, 0.05, 2.0) == 0.4
    assert score(0.4, 0.15, 0.05, 2.0) == pytest.approx(0.4 - 2 * 0.1)
    assert score(0.4, None, 0.05, 2.0) == 0.4


@pytest.mark.parametrize("numbers", [(None, 0.1), (math.nan, 0.1), (math.inf, 0.1), (0.4, math.nan), (0.4, math.inf)])
def test_score_is_null_without_finite_numbers(numbers):
    assert score(*numbers, 0.05, 2.0) is None


def test_rank_correlation_by_hand():
    # No ties: 1 - 6 sum d^2 / (n (n^2 - 1)), d = rank differences 0, -2, 1, 1, 0.
    assert rank_correlation([10, 20, 30, 40, 50], [1, 9, 2, 5, 12]) == pytest.approx(1 - 6 * 6 / (5 * 24))
    # Ties share their mean rank: ranks 1.5, 1.5, 3 against 1, 2, 3.
    assert rank_correlation([7, 7, 9], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(1.5 * 2))


def test_rank_correlation_needs_three_pairs_and_variation():
    assert rank_correlation([], []) is None
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 1, 1, 1], [1, 2, 3, 4]) is None
    assert rank_correlation([1, 2, 3, 4], [1, 1, 1, 1]) is None


@pytest.mark.parametrize("hole", [None, math.nan, math.inf])
def test_rank_correlation_leaves_out_pairs_with_a_hole(hole):
    assert rank_correlation([1, hole, 2, 3, 9], [1, 50, 3, 2, hole]) == rank_correlation([1, 2, 3], [1, 3, 2]) == 0.5
    assert rank_correlation([1, 2, hole], [1, 2, 3]) is None


def test_rank_correlation_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="zip"):
        rank_correlation([1, 2, 3], [1, 2])


@given(st.lists(st.tuples(FINITE, FINITE), min_size=3, max_size=12), st.randoms(use_true_random=False))
def test_rank_correlation_is_symmetric_bounded_and_blind_to_order_and_scale(pairs, random):
    xs, ys = zip(*pairs, strict=True)
    rho = rank_correlation(xs, ys)
    random.shuffle(pairs)
    assert rank_correlation(*zip(*pairs, strict=True)) == rho
    assert rank_correlation(ys, xs) == rho
    assert rank_correlation([4 * x for x in xs], ys) == rho
    negated = rank_correlation([-x for x in xs], ys)
    assert (rho is None and negated is None) or (abs(rho) <= 1 and negated == -rho)


def evidence(trials, *, budget=0.2, penalty=2.0):
    """trials: {name: (proxy parts, final parts or None)} at fidelity 0.5, one candidate each."""
    found = Evidence(budget, penalty)
    for name, (proxy, final) in trials.items():
        found.proxies[name] = {0.5: [proxy]}
        if final is not None:
            found.finals[name] = [final]
    return found


def test_predictions_are_on_the_scale_of_the_score():
    """Losses say a tenth of what the scorer says, so the budget binds only on the scorer's scale."""
    numbers = range(1, 9)
    found = evidence({str(n): ((n / 100, n / 100), (n / 10, n / 10)) for n in numbers}, penalty=3.0)
    for n in numbers:
        assert found.prediction(str(n), 0.5) == pytest.approx(score(n / 10, n / 10, 0.2, 3.0))
    raw = [score(n / 100, n / 100, 0.2, 3.0) for n in numbers]
    assert rank_correlation(raw, [found.score(str(n)) for n in numbers]) < 0
    assert found.correlation(0.5) == 1.0
    assert found.part_correlations(0.5) == {"mitigation": 1.0, "legal_impact": 1.0}


def test_a_trial_takes_no_part_in_its_own_prediction():
    trials = {str(n): ((n / 10, 0.0), (n / 5, 0.0)) for n in range(6)}
    before = evidence(trials).prediction("3", 0.5)
    assert evidence({**trials, "3": ((0.3, 0.0), (99.0, 0.0))}).prediction("3", 0.5) == pytest.approx(before)
    assert evidence({**trials, "3": ((0.3, 0.0), None)}).prediction("3", 0.5) == pytest.approx(before)


def test_a_proxy_that_falls_as_the_score_rises_predicts_nothing():
    found = evidence({str(n): ((-n / 10, 0.0), (n / 5, 0.0)) for n in range(8)})
    assert found.correlation(0.5) is None or found.correlation(0.5) < 0
    assert not found.is_trusted(0.5, threshold=0.5, min_trials=3)


def test_trust_needs_enough_trials_and_enough_correlation():
    found = evidence({str(n): ((n / 10, 0.0), (n / 5, 0.0)) for n in range(5)})
    assert found.is_trusted(0.5, threshold=1.0, min_trials=5)
    assert not found.is_trusted(0.5, threshold=0.5, min_trials=6)
    assert not found.is_trusted(0.25, threshold=0.5, min_trials=1)


@pytest.mark.parametrize("hole", [None, math.nan])
def test_a_proxy_or_a_result_that_is_missing_is_left_out(hole):
    trials = {str(n): ((n / 10, 0.0), (n / 5, 0.0)) for n in range(5)}
    whole = evidence(trials)
    holed = evidence({**trials, "x": ((hole, 0.0), (0.1, 0.0)), "y": ((0.1, 0.0), (hole, 0.0))})
    assert holed.prediction("3", 0.5) == pytest.approx(whole.prediction("3", 0.5))
    assert holed.prediction("x", 0.5) is None or math.isnan(holed.prediction("x", 0.5))
    assert "y" not in holed.scored_at(0.5)


def test_a_trial_is_as_good_as_its_best_candidate():
    found = evidence({str(n): ((n / 10, 0.0), (n / 5, 0.0)) for n in range(4)})
    found.proxies["two"] = {0.5: [(0.1, 0.0), (0.3, 0.0)]}
    assert found.prediction("two", 0.5) == pytest.approx(0.6)
    found.finals["two"] = [(0.2, 0.0), (0.5, 0.0)]
    assert found.score("two") == 0.5


def test_records_give_the_evidence_back_and_get_their_predictions():
    def record(n, status):
        entry = {"fidelity": 0.5, "step": 5, "mitigation": n / 10, "legal_impact": 0.0}
        final = n / 5 if status == "scored" else None
        candidate = {"proxy": [entry], "incomplete": [], "mitigation": final, "legal_impact": 0.0}
        return {"trial_id": str(n), "status": status, "candidates": [candidate]}

    records = [record(n, "scored" if n < 5 else "pruned") for n in range(6)]
    found = Evidence(0.2, 2.0)
    for each in records:
        found.add_record(each)
    assert found.finals.keys() == {str(n) for n in range(5)} and found.proxies.keys() == {str(n) for n in range(6)}
    predicted = with_predictions(records, found)
    assert [r["candidates"][0]["proxy"][0]["score"] for r in predicted] == pytest.approx([n / 5 for n in range(6)])
    assert summary(found, [0.5]) == {
        "n": 5,
        "correlation": {"0.5": {"score": 1.0, "mitigation": 1.0, "legal_impact": None}},
    }
    renamed = Evidence(0.2, 2.0)
    renamed.add_record(records[0], {0.5: 2})
    assert renamed.proxies == {"0": {2: [(0.0, 0.0)]}}


def test_an_incomplete_candidate_teaches_nothing():
    entry = {"fidelity": 0.5, "step": 5, "mitigation": 0.1, "legal_impact": 0.0}
    candidate = {"proxy": [entry], "incomplete": ["A"], "mitigation": 0.3, "legal_impact": 0.0}
    found = Evidence(0.2, 2.0)
    found.add_record({"trial_id": "a", "status": "scored", "candidates": [candidate]})
    assert found.score("a") is None and found.scored_at(0.5) == []


def test_the_core_of_the_search_needs_no_cluster():
    code = (
        "import sys, raygard.search.proxy, raygard.search.choice, raygard.search.tables; "
        "print(*{'ray', 'mlflow', 'deepspeed', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
