"""The captions pictures are learned under, and their conditioning when it is not the cached one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from raygard.config import AdaptConfig, ModelConfig
from raygard.diffusion.cache import LatentSet
from raygard.diffusion.conditioning import Conditioning, ConditioningRows
from raygard.diffusion.model import TextEncoders, load_text_encoders, require_one_text_encoder
from raygard.errors import RaygardError


@dataclass
class Release:
    """The released model besides its denoiser, for adaptations that need more of it; read when it is asked for.

    An adaptation changes the text encoder in place, as it does the denoiser: give each one a `Release` of its own.
    cache_dir: where pictures drawn from the release are kept; None draws them anew each time. on_drawn: called after
    every batch of them.
    """

    model: ModelConfig
    cache_dir: Path | None = None
    on_drawn: Callable[[], None] | None = None

    @cached_property
    def encoders(self) -> TextEncoders:
        """All tokenizers and text encoders, float32."""
        return load_text_encoders(self.model)

    @property
    def text_encoder(self) -> tuple[Any, Any]:
        """Tokenizer and text encoder of Stable Diffusion. Raises RaygardError as `require_one_text_encoder`."""
        require_one_text_encoder(self.model, "teaching the text encoder a word")
        return self.encoders.parts["tokenizer"], self.encoders.parts["text_encoder"]

    def embed(self, captions: list[str]) -> Conditioning:
        """What the text encoders make of captions now: float32, on the CPU."""
        return self.encoders.embed(captions)


def require(release: Release | None, why: str) -> Release:
    """`release` itself. Raises RaygardError if there is none."""
    if release is None:
        raise RaygardError(f"{why} needs more of the model than its denoiser: call it with release=Release(model)")
    return release


def learned_captions(captions: Sequence[str], classes: Sequence[str], config: AdaptConfig) -> list[str]:
    """What pictures with these captions and classes are learned under, and must be asked for afterwards.

    `config.instance_prompt` for all of them if given; else each caption with the class's name, whatever its case,
    replaced by `config.learn_as` if given. Raises RaygardError for a caption that does not name its class.
    """
    if config.instance_prompt is not None:
        return [config.instance_prompt] * len(captions)
    if config.learn_as is None:
        return list(captions)
    learned = []
    for caption, cls in zip(captions, classes, strict=True):
        other = renamed(caption, cls, config.learn_as)
        if other is None:
            raise RaygardError(
                f"caption '{caption}' does not name its class '{cls}', so that adapt.learn_as could replace it; "
                f"give one caption for all pictures, e.g. adapt.instance_prompt='a photo of {config.learn_as}'"
            )
        learned.append(other)
    return learned


def renamed(caption: str, cls: str, word: str) -> str | None:
    """`caption` with the class's name, whatever its case, replaced by `word`; None if it does not name its class."""
    other, count = re.subn(rf"(?<!\w){re.escape(cls)}(?!\w)", lambda _: word, caption, flags=re.IGNORECASE)
    return other if count else None


def with_captions(data: LatentSet, captions: Sequence[str], embed: Callable[[list[str]], Conditioning]) -> LatentSet:
    """`data` with other captions. embed: unique captions -> their conditioning."""
    unique = sorted(set(captions))
    position = {caption: number for number, caption in enumerate(unique)}
    index = torch.tensor([position[caption] for caption in captions], dtype=torch.int64)
    rows = ConditioningRows(embed(unique), index)
    return dataclasses.replace(data, captions=list(captions), conditioning=rows, vocabulary=unique)


def learned(data: LatentSet, config: AdaptConfig, release: Release | None) -> LatentSet:
    """`data` under the captions it is learned under, as `release`'s text encoders make of them now.

    Cached conditioning is kept where captions are. Held-out pictures of an adapted class must come through here as
    well. Raises RaygardError where captions change and there is no `release` to encode them.
    """
    captions = learned_captions(data.captions, data.classes, config)
    if captions == data.captions:
        return data
    return with_captions(data, captions, require(release, "learning under other captions").embed)
