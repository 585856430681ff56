"""The bundled small model and domain, so that everything runs without a download.

`MODEL_DIR` is `tiny_sd`, a complete Stable Diffusion pipeline (64-pixel emoji) pretrained by `pretrain.py`;
`DOMAIN_DIR` is `emoji_styles`, 284 concepts drawn in eight styles, built by `build_domain.py`. A class of
the domain is a style.

Roles. The model is pretrained on three styles, shaded and flat, so that it knows every concept. The illegal
styles are two looks that it does not know and that are most particular to one team: soft three-dimensional
light (Fluent 3D) and thick black outlines (OpenMoji). The legal styles ask for something new as well, in
different amounts: two flat styles close to the pretraining styles (Twemoji, FxEmoji), and black pictograms
(Fluent High Contrast) that share their shapes with Fluent 3D and their black lines with OpenMoji, so that a
defence which is not selective shows there.
"""

from __future__ import annotations

from pathlib import Path

MODEL_DIR: Path = Path(__file__).resolve().parent / "tiny_sd"
DOMAIN_DIR: Path = Path(__file__).resolve().parent / "emoji_styles"

PRETRAINING_STYLES: tuple[str, ...] = ("Noto", "Fluent Flat", "EmojiOne")
ILLEGAL_STYLES: tuple[str, ...] = ("Fluent 3D", "OpenMoji")
LEGAL_STYLES: tuple[str, ...] = ("Twemoji", "FxEmoji", "Fluent High Contrast")

__all__ = ["DOMAIN_DIR", "ILLEGAL_STYLES", "LEGAL_STYLES", "MODEL_DIR", "PRETRAINING_STYLES"]
