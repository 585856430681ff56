"""Where in a denoiser a mask sits: parameter names read as (block, kind), for any diffusers model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK_NAMES = {
    "conv_in": "input conv",
    "time_embedding": "time embedding",
    "down_blocks": "down",
    "mid_block": "middle",
    "up_blocks": "up",
    "conv_norm_out": "output",
    "conv_out": "output",
    # SDXL's text and sizes join the time embedding; SD3 and Flux are transformers.
    "add_embedding": "time embedding",
    "time_text_embed": "time embedding",
    "pos_embed": "input conv",
    "x_embedder": "input conv",
    "context_embedder": "text",
    "norm_out": "output",
    "proj_out": "output",
}
# Order of the heat map: the path of the signal through the model, and the modules of a block.
BLOCK_ORDER = (
    *("input conv", "text", "time embedding", "down", "middle", "up"),
    *("transformer_blocks", "single_transformer_blocks", "output"),
)
KIND_ORDER = (
    *(f"{attention} {part}" for attention in ("self", "cross") for part in ("q", "k", "v", "out")),
    *("feed-forward", "projection", "conv", "time", "norm", "bias", "other"),
)
KINDS = (
    (r"\b(to_q|q_proj|add_q_proj)\b", "q"),
    (r"\b(to_k|k_proj|add_k_proj)\b", "k"),
    (r"\b(to_v|v_proj|add_v_proj)\b", "v"),
    (r"\b(to_out|to_add_out|out_proj)\b", "out"),
)


def block_of(name: str) -> tuple[str, str]:
    """Read a parameter name as (block, kind), e.g. ('down 0', 'cross k').

    Norms keep their biases; every other bias is of kind 'bias'. An unknown name keeps its first part as the
    block and gets the kind 'other', so that nothing is ever left out.
    """
    parts = name.split(".")
    block = BLOCK_NAMES.get(parts[0], parts[0])
    if len(parts) > 2 and parts[1].isdigit():
        block = f"{block} {parts[1]}"
    return block, _kind(name, parts)


def _kind(name: str, parts: Sequence[str]) -> str:
    module = parts[-2] if len(parts) > 1 else ""
    if any(re.match(r"(conv_)?(layer_)?(group_)?norm", part) for part in parts):
        return "norm"
    if parts[-1] == "bias":
        return "bias"
    for pattern, kind in KINDS:
        if re.search(pattern, name):
            return f"{'cross' if 'attn2' in parts or 'cross_attn' in parts else 'self'} {kind}"
    if {"ff", "mlp", "ff_context", "proj_mlp"} & set(parts):
        return "feed-forward"
    if module.startswith("time_emb") or parts[0] in ("time_embedding", "time_embed", "time_text_embed"):
        return "time"
    if module in ("proj_in", "proj_out"):
        return "projection"
    return "conv" if "conv" in module else "other"


@dataclass(frozen=True)
class FrozenShares:
    """Shares of tensors and parameters frozen, float64 (blocks, kinds); NaN where a block lacks the kind."""

    blocks: tuple[str, ...]
    kinds: tuple[str, ...]
    by_count: NDArray[np.float64]
    by_params: NDArray[np.float64]


def frozen_shares(names: Sequence[str], sizes: Sequence[int], frozen: Sequence[bool]) -> FrozenShares:
    """Aggregate a mask over blocks and kinds. names, sizes (parameters), frozen: one entry per tensor."""
    placed = [block_of(name) for name in names]
    blocks = tuple(sorted({block for block, _ in placed}, key=_block_rank))
    kinds = tuple(sorted({kind for _, kind in placed}, key=KIND_ORDER.index))
    totals, held = np.zeros((2, len(blocks), len(kinds))), np.zeros((2, len(blocks), len(kinds)))
    for (block, kind), size, flag in zip(placed, sizes, frozen, strict=True):
        place = blocks.index(block), kinds.index(kind)
        for measure, weight in enumerate((1, size)):
            totals[(measure, *place)] += weight
            held[(measure, *place)] += weight * flag
    with np.errstate(invalid="ignore"):
        shares = held / totals
    return FrozenShares(blocks, kinds, shares[0], shares[1])


def block_shares(
    names: Sequence[str], sizes: Sequence[int], frozen: Sequence[bool]
) -> tuple[tuple[str, ...], NDArray[np.float64], NDArray[np.float64]]:
    """Blocks in the order of the signal, and the share frozen of their tensors and of their parameters, (blocks,)."""
    placed = [block_of(name)[0] for name in names]
    blocks = tuple(sorted(set(placed), key=_block_rank))
    rows = np.array([blocks.index(block) for block in placed])
    shares = [
        np.bincount(rows, np.multiply(weights, frozen)) / np.bincount(rows, weights)
        for weights in (np.ones(len(names)), np.array(sizes, dtype=float))
    ]
    return blocks, shares[0], shares[1]


def _block_rank(block: str) -> tuple[int, str, int]:
    stem, _, index = block.rpartition(" ")
    stem, number = (stem, int(index)) if index.isdigit() else (block, 0)
    rank = BLOCK_ORDER.index(stem) if stem in BLOCK_ORDER else BLOCK_ORDER.index("middle")
    return rank, stem, number
