"""IMMA's inner adaptations: what the simulated attacker trains while the publisher immunises.

Its parameters phi live in modules, the denoiser's own or ones that it hangs on the denoiser, because ZeRO-3 gathers a
parameter when the module that owns it is called, and at no other time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from raygard.diffusion.cache import LatentSet
from raygard.diffusion.conditioning import Conditioning
from raygard.diffusion.layers import attention_tensors
from raygard.errors import RaygardError
from raygard.seeding import generator


@dataclass(frozen=True, eq=False)
class TextModel:
    """For inner adaptations that learn words: the model's tokenizer and text encoder, and the words that captions
    name the illegal classes by."""

    tokenizer: Any
    encoder: Any
    words: tuple[str, ...]


class InnerAdaptation(nn.Module):
    """What IMMA needs of an adaptation: phi, the attacker's text, and the release as it is without him.

    published_lr: inner and outer learning rate of its script (SD 1.4, 512 px). release: the denoiser as released, which
    shares the immunised tensors with the attacker's; None if that is the attacker's own.
    """

    published_lr: tuple[float, float]

    def __init__(self, release: nn.Module | None = None) -> None:
        super().__init__()
        self.release = release

    def phi(self) -> list[nn.Parameter]:
        """What the attacker trains; immunised tensors may be among it."""
        raise NotImplementedError

    def conditioning(self, data: LatentSet, rows: Tensor) -> Conditioning:
        """What `embed` takes for these rows, on the CPU."""
        return data.conditioning[rows]

    def embed(self, conditioning: Conditioning) -> Conditioning:
        """Conditioning as the attacker has it, differentiable in phi."""
        return conditioning


class DreamBooth(InnerAdaptation):
    """The attacker trains the denoiser itself, so phi shares storage with the immunised tensors, as published.

    only_immunised: he trains nothing but the immunised tensors, which is cheaper.
    """

    published_lr = (5e-6, 2e-5)

    def __init__(
        self,
        denoiser: nn.Module,
        immunised: Mapping[str, nn.Parameter],
        seed: int,
        text: TextModel | None,
        retains: bool,
        *,
        only_immunised: bool = False,
    ) -> None:
        super().__init__(_copy(denoiser, immunised.values()) if retains and not only_immunised else None)
        self._phi = list((immunised if only_immunised else dict(denoiser.named_parameters())).values())

    def phi(self) -> list[nn.Parameter]:
        return self._phi


class LowRank(nn.Module):
    """x -> B A x of one layer: A (rank, columns) normal with standard deviation 1 / rank, B (rows, rank) zero."""

    def __init__(self, weight: Tensor, rank: int, rng: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter((torch.randn(rank, columns, generator=rng) / rank).to(weight.device))
        self.up = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(F.linear(inputs, self.down), self.up)


class LoRA(InnerAdaptation):
    """Low-rank updates W + B A of every attention projection (Hu et al., arXiv 2106.09685), rank and scale as in IMMA's
    script."""

    published_lr = (1e-4, 1e-5)
    rank = 4

    def __init__(
        self,
        denoiser: nn.Module,
        immunised: Mapping[str, nn.Parameter],
        seed: int,
        text: TextModel | None,
        retains: bool,
    ) -> None:
        super().__init__(_copy(denoiser, denoiser.parameters()) if retains else None)
        self.updates = nn.ModuleList()
        for name in attention_tensors(denoiser, "attention", ("weight",)):
            layer = denoiser.get_submodule(name.rpartition(".")[0])
            update = LowRank(denoiser.get_parameter(name), self.rank, generator(seed, "imma lora", name))
            layer.register_forward_hook(partial(_add, update))
            self.updates.append(update)

    def phi(self) -> list[nn.Parameter]:
        return list(self.updates.parameters())


class TextualInversion(InnerAdaptation):
    """The attacker learns the embedding of one new token for each illegal word and leaves every weight as it is.

    The new token takes the place of the word in each caption and starts from the mean of the word's embeddings. The
    text encoder is no part of this module: it is never trained, nor sharded.
    Raises RaygardError without a text model, or for pictures whose captions name none of its words.
    """

    published_lr = (5e-4, 1e-6)

    def __init__(
        self,
        denoiser: nn.Module,
        immunised: Mapping[str, nn.Parameter],
        seed: int,
        text: TextModel | None,
        retains: bool,
    ) -> None:
        super().__init__()
        if text is None or not text.words:
            raise RaygardError(
                "textual inversion needs the model's text encoder, of Stable Diffusion 1.x/2.x alone, and the words of "
                "the illegal classes"
            )
        self._text = text
        self._frozen = {name: parameter.detach() for name, parameter in text.encoder.named_parameters()}
        table = text.encoder.get_input_embeddings().weight
        self._name = next(name for name, parameter in text.encoder.named_parameters() if parameter is table)
        self._words = [self._ids(word) for word in text.words]
        starts = [table.detach()[torch.tensor(ids)].mean(dim=0) for ids in self._words]
        self.learned = nn.Parameter(torch.stack(starts).to(next(denoiser.parameters()).device))

    def phi(self) -> list[nn.Parameter]:
        return [self.learned]

    def conditioning(self, data: LatentSet, rows: Tensor) -> Conditioning:
        """Text: token ids and attention mask, int64 (len(rows), 2, L); new tokens are numbered after the vocabulary."""
        captions = [self._with_new_tokens(data.captions[row]) for row in rows.tolist()]
        tokens = self._text.tokenizer.pad(
            {"input_ids": captions}, padding="max_length", max_length=self._text.tokenizer.model_max_length,
            return_tensors="pt",
        )  # fmt: skip
        return Conditioning(text=torch.stack([tokens.input_ids, tokens.attention_mask], dim=1))

    def embed(self, conditioning: Conditioning) -> Conditioning:
        return Conditioning(text=self(conditioning["text"]))

    def forward(self, tokens: Tensor) -> Tensor:
        encoder, table = self._text.encoder, self._frozen[self._name]
        ids, mask = tokens.to(table.device).unbind(dim=1)
        uses_mask = getattr(encoder.config, "use_attention_mask", False)
        weights = {**self._frozen, self._name: torch.cat([table, self.learned.to(table)])}
        found: Tensor = functional_call(encoder, weights, (ids,), {"attention_mask": mask if uses_mask else None})[0]
        return found

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._text.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _with_new_tokens(self, caption: str) -> list[int]:
        tokenizer, first = self._text.tokenizer, len(self._frozen[self._name])
        ids = self._ids(caption)
        for number, word in enumerate(self._words):
            starts = [at for at in range(len(ids) - len(word) + 1) if ids[at : at + len(word)] == word]
            for at in reversed(starts):
                ids[at : at + len(word)] = [first + number]
        if max(ids, default=0) < first:
            raise RaygardError(f"textual inversion has no word to learn in the caption '{caption}'")
        room = tokenizer.model_max_length - 2
        return [tokenizer.bos_token_id, *ids[:room], tokenizer.eos_token_id]


def _copy(denoiser: nn.Module, shared: Any) -> nn.Module:
    """A copy of a denoiser, with the `shared` parameters themselves in it; before anything is hung on the denoiser."""
    return copy.deepcopy(denoiser, {id(parameter): parameter for parameter in shared})


def _add(update: LowRank, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + update(inputs[0])


# `INNER[name](denoiser, immunised, seed, text, retains)`: immunised are the denoiser's tensors that IMMA changes, by
# name; text may be None; retains: whether the release itself is needed as well. Parameters of `denoiser` are float32.
INNER: dict[str, Callable[..., InnerAdaptation]] = {
    "lora": LoRA,
    "dreambooth": DreamBooth,
    "dreambooth-immunised": partial(DreamBooth, only_immunised=True),
    "textual-inversion": TextualInversion,
}
