"""Names that mean nothing, and captions under them.

A guard that is trained on the illegal classes' own names only is avoided by learning the pictures under another name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raygard.adaptation.prompts import renamed
from raygard.errors import RaygardError
from raygard.seeding import generator

SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ha", "je", "ki", "lo", "mu", "na", "pe", "qui", "ro", "su", "ta", "ve",
             "wi", "xo", "zu")  # fmt: skip


def pseudoword(seed: int, cls: str, number: int) -> str:
    """Three syllables that mean nothing, the same ones for equal arguments."""
    picked = torch.randint(len(SYLLABLES), (3,), generator=generator(seed, "pseudoword", cls, number))
    return "".join(SYLLABLES[index] for index in picked.tolist())


def meaningless_captions(captions: Sequence[str], cls: str, count: int, seed: int) -> list[list[str]]:
    """`count` lists of captions, each with the class's name replaced by another meaningless word.

    Raises RaygardError for a caption that does not name its class.
    """
    found = []
    for number in range(count):
        learned = []
        for caption in captions:
            other = renamed(caption, cls, pseudoword(seed, cls, number))
            if other is None:
                raise RaygardError(
                    f"caption '{caption}' does not name its class '{cls}', so that a meaningless name could replace "
                    "it; name the class in its captions, or set values.legal_names=0 values.illegal_names=0"
                )
            learned.append(other)
        found.append(learned)
    return found
