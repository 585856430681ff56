from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raygard.errors import RaygardError
from raygard.mask.soft import select_frozen, shift_to_budget, soft_mask

logits_lists = st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=60)


@settings(max_examples=60, deadline=None)
@given(logits_lists, st.floats(0.01, 0.99), st.floats(0.01, 5), st.booleans())
def test_shift_holds_the_budget_exactly_and_keeps_the_order(
    values: list[float], ratio: float, temperature: float, weighted: bool
) -> None:
    logits = torch.tensor(values, dtype=torch.float64)
    weights = torch.arange(1, len(values) + 1, dtype=torch.float64) if weighted else torch.ones(len(values))
    shifted = shift_to_budget(logits, temperature, ratio, weights if weighted else None)
    mean = (soft_mask(shifted, temperature) * weights).sum() / weights.sum()
    assert abs(float(mean) - ratio) < 1e-9
    torch.testing.assert_close(shifted - shifted[0], logits - logits[0], rtol=0, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(logits_lists, st.floats(0.01, 0.99))
def test_count_budget_freezes_round_pn_of_the_highest(values: list[float], ratio: float) -> None:
    logits = torch.tensor(values)
    frozen = select_frozen(logits, torch.ones(len(values)), ratio)
    count = max(1, min(len(values) - 1, round(ratio * len(values))))
    assert int(frozen.sum()) == count
    assert logits[frozen].min() >= logits[~frozen].max()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=2, max_size=40), st.floats(0.05, 0.95))
def test_params_budget_is_never_exceeded_and_is_maximal(sizes: list[int], ratio: float) -> None:
    table = torch.tensor(sizes)
    logits = torch.linspace(1, -1, len(sizes))
    limit = ratio * sum(sizes)
    if min(sizes) > limit:
        with pytest.raises(RaygardError, match="smallest tensor"):
            select_frozen(logits, table, ratio, "params")
        return
    frozen = select_frozen(logits, table, ratio, "params")
    used = int(table[frozen].sum())
    assert used <= limit
    assert all(used + int(size) > limit for size in table[~frozen])


def test_ties_are_broken_by_index() -> None:
    assert select_frozen(torch.zeros(4), torch.ones(4), 0.5).tolist() == [True, True, False, False]
