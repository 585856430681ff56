"""The proxy by hand: blocked adaptation by loss, scores, rank correlations and what may prune."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raygard.errors import RaygardError
from raygard.search.proxy import (
    blocked_by_loss,
    calibrate,
    correlations,
    measured,
    pruning_allowed,
    rank_correlation,
    score,
)

ROLES = {"A": "illegal", "B": "illegal", "C": "legal"}
BASE, FULL = {"A": 0.9, "B": 0.8, "C": 0.7}, {"A": 0.1, "B": 0.4, "C": 0.2}
FINITE = st.floats(-10, 10)


def candidates(finals, **proxies):
    """One candidate for each final score; proxies: f25=[...] is the proxy score at fidelity 0.25."""
    by_fidelity = {int(name[1:]) / 100: scores for name, scores in proxies.items()}
    return [
        {
            "candidate_id": f"c{i}",
            "score": final,
            "proxy": [{"fidelity": f, "score": s[i]} for f, s in by_fidelity.items() if i < len(s)],
        }
        for i, final in enumerate(finals)
    ]


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


def test_correlations_by_fidelity_over_scored_candidates_only():
    found = candidates([1, 2, 3, 4, None, math.nan], f100=[1, 2, 3, 4, 0, 0], f25=[4, 3, 2, 1, 9, 9], f50=[5, 5, 5, 5])
    assert correlations(found) == {"0.25": -1.0, "0.5": None, "1.0": 1.0}
    assert list(correlations(found)) == ["0.25", "0.5", "1.0"]
    assert measured(found) == {"n": 4, "correlation": correlations(found)}


def test_only_trustworthy_fidelities_prune():
    found = candidates([1, 2, 3, 4, 5], f25=[2, 1, 3, 5, 4], f50=[5, 4, 3, 2, 1], f100=[1, 2, 3])
    assert pruning_allowed(found, threshold=0.5) == [0.25]
    assert pruning_allowed(found, threshold=0.9) == []
    assert pruning_allowed(found, threshold=0.5, min_pairs=3) == [0.25, 1.0]
    assert calibrate(found) == {**measured(found), "pruning": True, "fidelities": [0.25]}


def test_threshold_itself_is_enough():
    assert pruning_allowed(candidates([1, 2, 3], f25=[1, 3, 2]), threshold=0.5, min_pairs=3) == [0.25]
    assert pruning_allowed(candidates(range(7), f25=range(7)), threshold=1.0) == [0.25]


def test_nothing_prunes_without_evidence():
    nothing = {"pruning": False, "fidelities": []}
    assert calibrate([]) == {"n": 0, "correlation": {}, **nothing}
    assert calibrate(candidates([1, 2, 3], f25=[1, 2, 3])) == {"n": 3, "correlation": {"0.25": 1.0}, **nothing}
    constant = calibrate(candidates([1, 2, 3, 4], f25=[0, 0, 0, 0]), threshold=-1.0)
    assert constant == {"n": 4, "correlation": {"0.25": None}, **nothing}


def test_correlation_of_noise_with_the_score_is_that_of_the_ranks():
    rng = np.random.default_rng(0)
    final, proxy = rng.normal(size=(2, 20))
    ranks = [np.argsort(np.argsort(values)) for values in (final, proxy)]
    expected = float(np.corrcoef(*ranks)[0, 1])
    assert correlations(candidates(list(final), f50=list(proxy)))["0.5"] == pytest.approx(expected)


def test_the_core_of_the_search_needs_no_cluster():
    code = (
        "import sys, raygard.search.proxy, raygard.search.choice, raygard.search.tables; "
        "print(*{'ray', 'mlflow', 'deepspeed', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
