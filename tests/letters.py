"""A tokenizer of CLIP's kind that knows single letters only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ALPHABET = [chr(code) for code in range(33, 127)]
TOKENS = [*ALPHABET, *(f"{letter}</w>" for letter in ALPHABET), "<|startoftext|>", "<|endoftext|>"]


def letter_tokenizer(folder: Path, **settings: Any) -> Any:
    """transformers' CLIPTokenizer of `TOKENS`, whose last two mark start and end; its files lie in `folder`."""
    from transformers import CLIPTokenizer

    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(TOKENS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), **settings)
