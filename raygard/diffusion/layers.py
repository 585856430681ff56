"""Names of attention parameters, found through diffusers' attention modules."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from raygard.errors import RaygardError, nearest

# `LAYERS[name]`: whether cross-attention alone or every attention, and which of its projections.
LAYERS: dict[str, tuple[bool, tuple[str, ...]]] = {
    "cross-kv": (True, ("to_k", "to_v")),
    "cross": (True, ("to_q", "to_k", "to_v", "to_out")),
    # The last four are the text's own in joint attention (SD3, Flux).
    "attention": (
        False,
        ("to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    ),
}


def attention_tensors(
    denoiser: nn.Module, layers: str = "cross-kv", kinds: Sequence[str] = ("weight", "bias")
) -> list[str]:
    """Names of attention parameters in the order of `denoiser.named_parameters()`.

    layers: "cross-kv" (keys and values of the text), "cross" (all projections of cross-attention) or "attention"
    (self-attention and joint attention too, what IMMA's published code immunises). kinds: weights, biases or both.
    Raises RaygardError for an unknown name, or if the model has no such tensors.
    """
    if layers not in LAYERS:
        raise RaygardError(f"unknown layers '{layers}'{nearest(layers, LAYERS)}")
    only_cross, projections = LAYERS[layers]
    places = tuple(
        f"{name}.{projection}."
        for name, module in denoiser.named_modules()
        if _is_attention(module) and (getattr(module, "is_cross_attention", False) or not only_cross)
        for projection in projections
    )
    found = [
        name for name, _ in denoiser.named_parameters() if name.startswith(places) and name.rpartition(".")[2] in kinds
    ]
    if not found:
        raise RaygardError(f"the model has no tensors of layers '{layers}': it has no such attention")
    return found


def _is_attention(module: nn.Module) -> bool:
    # diffusers has several attention classes without a base of their own; all of them have these.
    return all(hasattr(module, name) for name in ("to_q", "to_k", "to_v"))
