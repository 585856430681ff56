"""A new word for what is learned: textual inversion, and custom diffusion with its modifier token.

Shape letters: B batch, L tokens, D text features, u unique captions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raygard.adaptation.full import keep_trainable
from raygard.adaptation.prompts import learned_captions, with_captions
from raygard.adaptation.task import Adaptation, Task
from raygard.adaptation.training import AdaptResult
from raygard.diffusion.conditioning import Conditioning
from raygard.diffusion.layers import attention_tensors
from raygard.errors import RaygardError


class NewToken(nn.Module):
    """A frozen text encoder with one trainable vector: the input embedding of a token it did not know.

    start: words whose mean embedding the vector begins with. The tokenizer and the encoder are extended in place.
    Raises RaygardError if the tokenizer knows `token` already, or `start` has no tokens.
    """

    def __init__(self, tokenizer: Any, encoder: Any, token: str, start: str) -> None:
        super().__init__()
        self.tokenizer, self.token = tokenizer, token
        self.token_id = _add(tokenizer, encoder, token)
        self.encoder = encoder.requires_grad_(False)
        table = encoder.get_input_embeddings()
        first = tokenizer(start, add_special_tokens=False).input_ids
        if not first:
            raise RaygardError(
                f"'{start}' has no tokens for a new one to start from; name a word in adapt.initializer_token"
            )
        self.vector = nn.Parameter(table.weight[torch.tensor(first)].mean(dim=0).clone())
        # Training the whole table would move every other word, and would cost its optimizer state.
        self._hook = table.register_forward_hook(self._insert)

    def _insert(self, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.where((inputs[0] == self.token_id)[..., None], self.vector.to(output.dtype), output)

    def ids(self, captions: list[str]) -> Tensor:
        """Token ids (u, L), padded to the encoder's length."""
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        return tokens.input_ids

    def ids_with_token(self, captions: list[str]) -> Tensor:
        """The same. Raises RaygardError for a caption in which the token was cut off."""
        ids = self.ids(captions)
        lost = (ids != self.token_id).all(dim=1).nonzero()
        if len(lost):
            raise RaygardError(
                f"'{self.token}' does not fit into the {ids.shape[1]} tokens of caption "
                f"'{captions[int(lost[0])]}'; shorten it, or give one adapt.instance_prompt"
            )
        return ids

    def forward(self, ids: Tensor) -> Tensor:
        """Last hidden states (B, L, D) of token ids (B, L)."""
        mask = None
        if getattr(self.encoder.config, "use_attention_mask", False):
            ends = (ids == self.tokenizer.eos_token_id).long()
            mask = (ends.cumsum(dim=1) - ends == 0).long()
        return self.encoder(ids, attention_mask=mask)[0]

    def settle(self) -> None:
        """Write the vector into the encoder's own table, so that encoder and tokenizer can be used without this."""
        self._hook.remove()
        with torch.no_grad():
            self.encoder.get_input_embeddings().weight[self.token_id] = self.vector


def teach(tokenizer: Any, encoder: Any, embeddings: Mapping[str, Tensor]) -> None:
    """Give a text encoder the vectors (D,) of new tokens, in place; those it was taught before are overwritten.

    Raises RaygardError for a word of its own vocabulary, or a vector made for another text encoder.
    """
    for token, vector in embeddings.items():
        width = encoder.get_input_embeddings().weight.shape[1]
        if vector.shape != (width,):
            raise RaygardError(
                f"the embedding of '{token}' has shape {tuple(vector.shape)}, this text encoder's have ({width},)"
            )
        taught = tokenizer.get_added_vocab().get(token)
        token_id = _add(tokenizer, encoder, token) if taught is None else taught
        with torch.no_grad():
            encoder.get_input_embeddings().weight[token_id] = vector.to(encoder.device)


def _add(tokenizer: Any, encoder: Any, token: str) -> int:
    # "</w>" marks the end of a word in CLIP's vocabulary, which has no capitals: "Dog" would take the place of "dog".
    if {token, token.lower(), f"{token.lower()}</w>"} & tokenizer.get_vocab().keys():
        raise RaygardError(f"the text encoder knows '{token}' already; choose another adapt.learn_as")
    tokenizer.add_tokens(token)
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return int(tokenizer.convert_tokens_to_ids(token))


@partial(Adaptation, one_text_encoder="textual inversion")
def textual_inversion(task: Task) -> AdaptResult:
    """Train the embedding of a new token and nothing else (Gal et al. 2022, arXiv 2208.01618): around every mask.

    The release's text encoder knows the token from then on. Raises RaygardError also without `release`, and for a
    token that is known already or does not fit into a caption.
    """
    task.denoiser.requires_grad_(False)
    return dataclasses.replace(_with_token(task), embeddings_only=True)


@partial(Adaptation, one_text_encoder="custom diffusion")
def custom_diffusion(task: Task) -> AdaptResult:
    """Train the cross-attention keys and values that are not frozen (Kumari et al. 2023, arXiv 2212.04488).

    With `config.learn_as`, a new token's embedding as well, around the mask; with `config.class_prompt`, pictures
    that the release draws for it are learned along. Errors are those of `textual_inversion`; RaygardError also if the
    mask freezes all keys and values and there is no token.
    """
    names = set(attention_tensors(task.denoiser, "cross-kv"))
    has_token = task.config.learn_as is not None
    keep_trainable(task.denoiser, names, "cross-attention keys and values", may_be_none=has_token)
    if has_token:
        return _with_token(task)
    prior = task.prior(task.release.embed)
    return task.train(task.learned(), prior=prior)


def _with_token(task: Task) -> AdaptResult:
    data, config = task.data, task.config
    assert config.learn_as is not None
    captions = learned_captions(data.captions, data.classes, config)
    start = config.initializer_token or " ".join(sorted(set(data.classes)))
    text = NewToken(*task.release.text_encoder, config.learn_as, start)
    try:
        rows = with_captions(data, captions, lambda those: Conditioning(text=text.ids_with_token(those)))
        prior = task.prior(lambda those: Conditioning(text=text.ids(those)))
        result = task.train(rows, text=text, prior=prior)
    finally:
        text.settle()
    return dataclasses.replace(
        result,
        embeddings={config.learn_as: text.vector.detach().cpu().clone()},
        outside_mask=(f"text encoder: the embedding of the new token '{config.learn_as}'",),
    )
