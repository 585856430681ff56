"""Freezing by hand: one kind of module, as in the FreezeAsGuard paper's motivation (Table 1).

The paper names the kinds and not their tensors. Here, in diffusers' names: attention projections are the queries,
keys, values and outputs of every attention; convolutions are the input and output convolution, those of residual
blocks and of up- and down-sampling, not the 1 x 1 projections around a transformer; time embeddings are their
projections in the residual blocks as well. The budget of the learned mask is not held.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from raygard.errors import RaygardError

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from raygard.baselines.facts import TensorFacts

PATTERNS = {
    "manual-attention": r"(^|\.)to_(q|k|v|out)\.",
    "manual-convolution": r"(^|\.)(conv|conv_in|conv_out|conv1|conv2|conv_shortcut)\.",
    "manual-time-embedding": r"(^|\.)(time_embedding|time_emb_proj)\.",
}


def choose(facts: TensorFacts, rng: Generator, *, kind: str) -> Tensor:
    """Freeze every tensor whose name matches `PATTERNS[kind]`: bool (N,). Draws nothing from `rng`.

    Raises RaygardError without names, or if no tensor or every tensor matches.
    """
    import torch

    if not facts.names:
        raise RaygardError(f"{kind} chooses tensors by name, and no names are at hand here")
    frozen = torch.tensor([re.search(PATTERNS[kind], name) is not None for name in facts.names])
    if frozen.all() or not frozen.any():
        count = "every" if frozen.all() else "no"
        raise RaygardError(f"{kind} freezes tensors named like {PATTERNS[kind]}; {count} tensor of this model is")
    return frozen


CHOOSERS: dict[str, Callable[[TensorFacts, Generator], Tensor]] = {
    kind: partial(choose, kind=kind) for kind in PATTERNS
}
