"""Rules the bench compares: `rule(bench, p, seed) -> FreezeMask`. A file for each idea, its hypothesis first."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.selectivity_bench import Bench
from benchmarks.selectivity_rules import freeze, published, teach
from raygard.mask import FreezeMask

Rule = Callable[[Bench, float, int], FreezeMask]

RULES: dict[str, Rule] = {**freeze.RULES, **published.RULES, **teach.RULES}

# A choice without chance: one seed of these says it all.
WITHOUT_CHANCE = ("largest-first", "busy-layer", "uce-freeze")
