"""The bundled small model and domain, so that everything runs without a download.

`MODEL_DIR` is `tiny_sd`, a complete Stable Diffusion pipeline (64-pixel emoji) pretrained by `pretrain.py`;
`DOMAIN_DIR` is `emoji_styles`, 284 concepts drawn in ten styles, built by `build_domain.py`. A class of the domain is a
style.

Roles. The model is pretrained on three styles that between them cover shaded, flat and outlined-flat drawing, so that
it knows every concept. The illegal styles are two ways of drawing with outlines: thick black lines around flat colour
(OpenMoji) and thin line art (Noto Line). The legal styles are black pictograms (Fluent High Contrast, EmojiOne
Monotone). On the publisher half, 200 steps of full fine-tuning (3e-4) move the style distance by 4 (OpenMoji) to 10
standard errors. They also share black on white, so a defence that is not selective shows. In the demo's shorter
fine-tuning OpenMoji's change is visible but not measurable with the bundled scorer, and the outcome says so. Fluent 3D,
Twemoji and FxEmoji are bundled for harder domains: their change stays within three standard errors.
"""

from __future__ import annotations

from pathlib import Path

MODEL_DIR: Path = Path(__file__).resolve().parent / "tiny_sd"
DOMAIN_DIR: Path = Path(__file__).resolve().parent / "emoji_styles"

PRETRAINING_STYLES: tuple[str, ...] = ("Noto", "Fluent Flat", "EmojiOne")
ILLEGAL_STYLES: tuple[str, ...] = ("OpenMoji", "Noto Line")
LEGAL_STYLES: tuple[str, ...] = ("Fluent High Contrast", "EmojiOne Monotone")

__all__ = ["DOMAIN_DIR", "ILLEGAL_STYLES", "LEGAL_STYLES", "MODEL_DIR", "PRETRAINING_STYLES"]
