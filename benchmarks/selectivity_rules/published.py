"""Edit as published, then freeze: the baselines of the family that edits values.

Hypothesis: UCE moves what a name means and IMMA what the first steps of an adaptation find; whoever trains everything
can undo both, and freezing the largest tensors with the edited ones takes that away from the user.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.selectivity_bench import Bench
from benchmarks.selectivity_rules.freeze import largest_names
from raygard.diffusion.model import load_denoiser
from raygard.editing import EditMaterial, edit_model
from raygard.mask import FreezeMask

# IMMA's published learning rates are for Stable Diffusion at 512 pixels.
IMMA = {"layers": "cross-kv", "rounds": 40, "train_batch_size": 8, "inner_lr": 1e-3, "outer_lr": 1e-3}


def _rule(method: str, **settings: Any) -> Callable[[Bench, float, int], FreezeMask]:
    def rule(bench: Bench, p: float, seed: int) -> FreezeMask:
        config = bench.config.model_copy(update={"seed": seed})
        material = EditMaterial.of(config, bench.learn, bench.general["rehearsed"])
        values = edit_model(method, load_denoiser(config.model), material, **settings).values
        return bench.mask(list(dict.fromkeys([*largest_names(bench, p), *values])), values)

    return rule


RULES = {"uce-freeze": _rule("uce"), "imma-freeze": _rule("imma-retain", **IMMA)}
