"""IMMA's inner adaptations: what the simulated attacker trains while the publisher immunises.

An inner adaptation owns its parameters phi and says how they enter the denoiser. `parameters()` are stepped down the
illegal loss; `weights()` gives the tensors that replace the denoiser's own in a forward pass, differentiable in phi
and in the immunised tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from raygard.diffusion.cache import LatentSet
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


class InnerAdaptation(Protocol):
    """What IMMA needs of an adaptation. published_lr: inner and outer learning rate of its script (SD 1.4, 512 px)."""

    published_lr: tuple[float, float]

    def parameters(self) -> list[Tensor]:
        """phi, leaves that require gradients; they may be immunised tensors themselves."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Parameters by name that replace the denoiser's own in a forward pass."""
        ...

    def text(self, data: LatentSet, rows: Tensor) -> Tensor:
        """Text features (len(rows), L, D) of these rows as the attacker has them."""
        ...


class KeepsText:
    """An inner adaptation that leaves the text as it is cached."""

    def text(self, data: LatentSet, rows: Tensor) -> Tensor:
        return data.text[rows]


class DreamBooth(KeepsText):
    """The attacker trains the denoiser itself, so phi shares storage with the immunised tensors, as published.

    only_immunised: he trains nothing but the immunised tensors, which is cheaper.
    """

    published_lr = (5e-6, 2e-5)

    def __init__(
        self,
        unet: nn.Module,
        immunised: Mapping[str, nn.Parameter],
        seed: int,
        text: TextModel | None = None,
        *,
        only_immunised: bool = False,
    ) -> None:
        own = {} if only_immunised else {name: p for name, p in unet.named_parameters() if name not in immunised}
        self._weights: dict[str, Tensor] = {
            **{name: nn.Parameter(parameter.detach().clone()) for name, parameter in own.items()},
            **immunised,
        }

    def parameters(self) -> list[Tensor]:
        return list(self._weights.values())

    def weights(self) -> dict[str, Tensor]:
        return self._weights


class LoRA(KeepsText):
    """Low-rank updates W + B A of every attention projection (Hu et al., arXiv 2106.09685), rank and scale as in IMMA's
    script: A normal with standard deviation 1 / rank, B from zero."""

    published_lr = (1e-4, 1e-5)
    rank = 4

    def __init__(
        self, unet: nn.Module, immunised: Mapping[str, nn.Parameter], seed: int, text: TextModel | None = None
    ) -> None:
        parameters = dict(unet.named_parameters())
        self._base: dict[str, Tensor] = {
            name: immunised.get(name, parameters[name].detach())
            for name in attention_tensors(unet, "attention", ("weight",))
        }
        self._immunised = dict(immunised)
        self._down, self._up = {}, {}
        for name, weight in self._base.items():
            rows, columns = weight.shape
            drawn = torch.randn(self.rank, columns, generator=generator(seed, "imma lora", name)) / self.rank
            self._down[name] = nn.Parameter(drawn.to(weight.device))
            self._up[name] = nn.Parameter(torch.zeros(rows, self.rank, device=weight.device))

    def parameters(self) -> list[Tensor]:
        return [*self._down.values(), *self._up.values()]

    def weights(self) -> dict[str, Tensor]:
        merged = {name: weight + self._up[name] @ self._down[name] for name, weight in self._base.items()}
        return {**self._immunised, **merged}


class TextualInversion:
    """The attacker learns the embedding of one new token for each illegal word and leaves every weight as it is.

    The new token takes the place of the word in each caption and starts from the mean of the word's embeddings.
    Raises RaygardError without a text model, or for pictures whose captions name none of its words.
    """

    published_lr = (5e-4, 1e-6)

    def __init__(
        self, unet: nn.Module, immunised: Mapping[str, nn.Parameter], seed: int, text: TextModel | None = None
    ) -> None:
        if text is None or not text.words:
            raise RaygardError("textual inversion needs the model's text encoder and the words of the illegal classes")
        self._tokenizer, self._encoder = text.tokenizer, text.encoder
        self._immunised: dict[str, Tensor] = dict(immunised)
        table = self._encoder.get_input_embeddings().weight
        self._name = next(name for name, p in self._encoder.named_parameters() if p is table)
        self._table = table.detach()
        self._words = [self._ids(word) for word in text.words]
        starts = [self._table[torch.tensor(ids)].mean(dim=0) for ids in self._words]
        self._learned = nn.Parameter(torch.stack(starts).clone())

    def parameters(self) -> list[Tensor]:
        return [self._learned]

    def weights(self) -> dict[str, Tensor]:
        return self._immunised

    def text(self, data: LatentSet, rows: Tensor) -> Tensor:
        captions = [self._with_new_tokens(data.captions[row]) for row in rows.tolist()]
        tokens = self._tokenizer.pad(
            {"input_ids": captions}, padding="max_length", max_length=self._tokenizer.model_max_length,
            return_tensors="pt",
        ).to(self._table.device)  # fmt: skip
        uses_mask = getattr(self._encoder.config, "use_attention_mask", False)
        options = {"attention_mask": tokens.attention_mask if uses_mask else None}
        table = {self._name: torch.cat([self._table, self._learned])}
        found: Tensor = functional_call(self._encoder, table, (tokens.input_ids,), options)[0]
        return found

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _with_new_tokens(self, caption: str) -> list[int]:
        ids, first = self._ids(caption), len(self._table)
        for number, word in enumerate(self._words):
            starts = [at for at in range(len(ids) - len(word) + 1) if ids[at : at + len(word)] == word]
            for at in reversed(starts):
                ids[at : at + len(word)] = [first + number]
        if max(ids, default=0) < first:
            raise RaygardError(f"textual inversion has no word to learn in the caption '{caption}'")
        room = self._tokenizer.model_max_length - 2
        return [self._tokenizer.bos_token_id, *ids[:room], self._tokenizer.eos_token_id]


class Adapted(nn.Module):
    """`unet` with an inner adaptation's tensors in the place of its own; the unet itself is never changed."""

    def __init__(self, unet: nn.Module, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.unet = unet
        self._weights = weights

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return functional_call(self.unet, dict(self._weights()), inputs, options)


# `INNER[name](unet, immunised, seed, text)`: immunised are the tensors IMMA changes, by name; text may be None.
INNER: dict[str, Callable[..., InnerAdaptation]] = {
    "lora": LoRA,
    "dreambooth": DreamBooth,
    "dreambooth-immunised": partial(DreamBooth, only_immunised=True),
    "textual-inversion": TextualInversion,
}
