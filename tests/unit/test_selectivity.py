"""What the selectivity bench computes of its users, and that values are shared as the rules need it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.selectivity import interval
from benchmarks.selectivity_bench import Result, User, blocked
from benchmarks.selectivity_rules.teach import share


def user(role: str, base: float, full: float, guarded: float) -> User:
    return User("a", role, 0, Result(base, 10 * base), Result(full, 10 * full), Result(guarded, 10 * guarded))


def test_blocked_is_a_quotient_of_sums_over_the_users_of_a_role() -> None:
    users = [user("illegal", 1.0, 0.0, 0.5), user("illegal", 4.0, 1.0, 1.0), user("legal", 1.0, 0.5, 0.25)]
    assert blocked(users, "illegal", "loss") == pytest.approx(0.5 / 4.0)
    assert blocked(users, "illegal", "distance") == pytest.approx(0.5 / 4.0)
    # A guarded user who gets closer than an unguarded one counts as negative, nothing is clipped.
    assert blocked(users, "legal", "loss") == pytest.approx(-0.5)
    assert blocked(users, "unseen", "loss") is None


def test_an_interval_needs_two_seeds() -> None:
    assert interval([0.25]) == "+0.25" and interval([None]) == "-"
    low, high = (float(word.strip("[],")) for word in interval([0.1, 0.3]).split()[1:])
    assert low < 0.1 and high > 0.3


def test_shared_values_are_one_storage_in_every_model() -> None:
    models = [nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)) for _ in range(2)]
    values = {"0.weight": nn.Parameter(torch.zeros(2, 2))}
    for model in models:
        share(model, values)
    with torch.no_grad():
        values["0.weight"].fill_(3.0)
    assert all(torch.equal(model[0].weight, torch.full((2, 2), 3.0)) for model in models)
    assert [name for name, _ in models[0].named_parameters()] == ["0.weight", "0.bias", "1.weight", "1.bias"]
