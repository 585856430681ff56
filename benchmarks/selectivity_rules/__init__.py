"""Rules the bench compares: `rule(bench, p, seed) -> Defence`. A file for each idea, its hypothesis first."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.selectivity_bench import Bench, Defence
from benchmarks.selectivity_rules import directions, freeze, guard, published, teach

Rule = Callable[[Bench, float, int], Defence]

RULES: dict[str, Rule] = {
    **freeze.RULES,
    **published.RULES,
    **teach.RULES,
    **guard.RULES,
    **directions.RULES,
}
