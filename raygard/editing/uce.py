"""UCE: erase concepts by a closed-form edit of cross-attention keys and values (Gandikota et al., arXiv 2308.14761).

Every edited matrix W is the exact minimiser of
    s_e sum_i |W c_i - W_old g_i|^2 + s_p sum_j |W p_j - W_old p_j|^2 + lamb |W - W_old|_F^2
over text features c_i of what is erased, g_i of its guides and p_j of what is preserved (methods.md, section 8).
Shape letters: k feature vectors, L tokens, D text features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raygard.diffusion.families.stable_diffusion import encode_captions
from raygard.diffusion.layers import attention_tensors
from raygard.errors import RaygardError, nearest

TOKENS = ("last", "all")


@dataclass(frozen=True)
class UCESettings:
    """tokens: "last" takes the last subject token alone (the current script, `trainscripts/uce_sd_erase.py`); "all"
    takes every position from there to the end, padding included, aligned with the guide (the older script, which
    FreezeAsGuard runs). They give different models.

    guide: the prompt whose keys and values the erased prompts get; the scripts use "art" for styles and "" otherwise.
    lamb, erase_scale, preserve_scale: lamb, s_e and s_p; preserve_scale None takes the script's: 1 for "last",
    max(0.1, 1 / number of preserved prompts) for "all".
    """

    tokens: Literal["last", "all"] = "last"
    guide: str = ""
    lamb: float = 0.5
    erase_scale: float = 1.0
    preserve_scale: float | None = None

    def __post_init__(self) -> None:
        if self.tokens not in TOKENS:
            raise RaygardError(f"UCE has no variant tokens='{self.tokens}'{nearest(self.tokens, TOKENS)}")


def uce(
    denoiser: nn.Module,
    tokenizer: Any,
    encoder: Any,
    erase: Sequence[str],
    preserve: Sequence[str] = (),
    settings: UCESettings | None = None,
) -> dict[str, Tensor]:
    """Edited tensors by name, float32, CPU: the prompts `erase` get the keys and values of `settings.guide`.

    tokenizer, encoder: the model's own. preserve: prompts whose keys and values should stay; the variant "all" adds
    "" as its script does. The model is not changed. Nothing is drawn. Raises RaygardError if nothing is to be erased.
    """
    settings = settings or UCESettings()
    if not erase:
        raise RaygardError("nothing to erase: UCE needs at least one prompt")
    kept = list(dict.fromkeys([*preserve, ""] if settings.tokens == "all" else preserve))
    old, new = concept_embeddings(tokenizer, encoder, [(prompt, settings.guide) for prompt in erase], settings.tokens)
    scale = settings.preserve_scale
    if scale is None:
        scale = max(0.1, 1 / len(kept)) if settings.tokens == "all" else 1.0
    features = _preserved(tokenizer, encoder, kept, settings.tokens) if kept else None
    return uce_values(
        denoiser, old, new, features, lamb=settings.lamb, erase_scale=settings.erase_scale, preserve_scale=scale
    )


def uce_values(
    denoiser: nn.Module,
    old_embeddings: Tensor,
    new_embeddings: Tensor,
    preserve_embeddings: Tensor | None = None,
    *,
    lamb: float = 0.5,
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
) -> dict[str, Tensor]:
    """Edited cross-attention key and value matrices by parameter name, float32, CPU; a pure function of its inputs.

    old_embeddings, new_embeddings: text features (..., D) of the same shape: what is erased, and for each vector the
    one whose keys and values it gets. preserve_embeddings: (..., D). Solved in float64, once for all matrices:
    W = W_old + s_e W_old (G - C) C^T (lamb I + s_e C C^T + s_p P P^T)^-1.
    Raises RaygardError for features that do not fit the model or one another, are not finite, or weights below 0.
    """
    if not (lamb > 0 and erase_scale >= 0 and preserve_scale >= 0):
        raise RaygardError(
            f"UCE needs lamb > 0 and scales >= 0, got lamb {lamb:g}, erase_scale {erase_scale:g}, "
            f"preserve_scale {preserve_scale:g}"
        )
    if old_embeddings.shape != new_embeddings.shape:
        raise RaygardError(
            f"old and new embeddings must have one shape, got {tuple(old_embeddings.shape)} and "
            f"{tuple(new_embeddings.shape)}"
        )
    old, new = _rows(old_embeddings, "old_embeddings"), _rows(new_embeddings, "new_embeddings")
    width = old.shape[1]
    gram = lamb * torch.eye(width, dtype=torch.float64) + erase_scale * old.T @ old
    if preserve_embeddings is not None:
        kept = _rows(preserve_embeddings, "preserve_embeddings")
        if kept.shape[1] != width:
            raise RaygardError(f"preserve_embeddings have {kept.shape[1]} features, the others {width}")
        gram += preserve_scale * kept.T @ kept
    # The right-hand factor of the update; gram is symmetric and positive definite because lamb > 0.
    change = torch.cholesky_solve(erase_scale * old.T @ (new - old), torch.linalg.cholesky(gram)).T
    parameters = dict(denoiser.named_parameters())
    values = {}
    for name in attention_tensors(denoiser, "cross-kv", ("weight",)):
        before = parameters[name].detach().cpu().double()
        if before.shape[1] != width:
            raise RaygardError(f"embeddings have {width} features, '{name}' takes {before.shape[1]}")
        values[name] = (before + before @ change).float()
    return values


def concept_embeddings(
    tokenizer: Any, encoder: Any, pairs: Sequence[tuple[str, str]], tokens: Literal["last", "all"] = "last"
) -> tuple[Tensor, Tensor]:
    """Features of (erased prompt, guide) pairs, aligned token by token: two float32 (k, D).

    "last": k pairs of last subject tokens ("" has its start token there). "all": from each prompt's last subject
    token on, as many positions as both prompts have left.
    """
    old, new = [], []
    for first, second in pairs:
        states, ends = _encode(tokenizer, encoder, [first, second])
        count = 1 if tokens == "last" else states.shape[1] - max(ends)
        old.append(states[0, ends[0] : ends[0] + count])
        new.append(states[1, ends[1] : ends[1] + count])
    return torch.cat(old), torch.cat(new)


def _preserved(tokenizer: Any, encoder: Any, prompts: Sequence[str], tokens: str) -> Tensor:
    states, ends = _encode(tokenizer, encoder, prompts)
    return states.flatten(0, 1) if tokens == "all" else states[torch.arange(len(prompts)), torch.tensor(ends)]


@torch.no_grad()
def _encode(tokenizer: Any, encoder: Any, prompts: Sequence[str]) -> tuple[Tensor, list[int]]:
    """Hidden states (len, L, D) and the position of each prompt's last subject token."""
    states = encode_captions(tokenizer, encoder, prompts).float().cpu()
    marks = tokenizer(
        list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True
    ).attention_mask
    return states, [sum(mark) - 2 for mark in marks]


def _rows(embeddings: Tensor, what: str) -> Tensor:
    if embeddings.dim() < 2 or embeddings.numel() == 0 or not torch.isfinite(embeddings).all():
        raise RaygardError(f"{what} must be finite vectors of shape (..., D), got {tuple(embeddings.shape)}")
    return embeddings.detach().cpu().double().flatten(0, -2)
