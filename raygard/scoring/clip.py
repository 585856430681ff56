"""CLIP: how well a picture fits its caption, and how alike two pictures are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from raygard.errors import RaygardError
from raygard.scoring.common import (
    CLIP_MEAN,
    CLIP_STD,
    check_references,
    in_batches,
    mean_cosine_similarity,
    to_input,
    unit,
)
from raygard.scoring.weights import pretrained

REPOSITORY = "openai/clip-vit-base-patch32"
BATCH_SIZE = 32


class ClipImage:
    """Cosine similarity of pictures under CLIP ViT-B/32, -1 to 1: M of IMMA's similarity gap ratio.

    Raises RaygardError saying where to put the weights if they are nowhere.
    """

    name = "CLIP-image"
    direction: Literal["distance", "similarity"] = "similarity"
    unit = "cosine similarity"
    source = "CLIP ViT-B/32 (Radford et al. 2021, arXiv 2103.00020; openai/clip-vit-base-patch32)"
    licence = "MIT"

    def __init__(self, device: str = "cpu") -> None:
        from transformers import CLIPModel

        self.device = device
        self._model: Any = pretrained(self.name, CLIPModel.from_pretrained, REPOSITORY).to(device).eval()
        self._side = int(self._model.config.vision_config.image_size)
        self._width = int(self._model.config.projection_dim)

    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings float32 (n, d) of pictures uint8 (n, H, W, 3)."""
        return in_batches(images, BATCH_SIZE, self._width, self._embed)

    def distances(self, generated: NDArray[np.float32], references: NDArray[np.float32]) -> NDArray[np.float32]:
        """Mean cosine similarity of each generated embedding (n, d) to all references (m, d): float32 (n,)."""
        return mean_cosine_similarity(generated, references)

    @torch.no_grad()
    def _embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = to_input(images, self._side, CLIP_MEAN, CLIP_STD, self.device)
        pooled = self._model.vision_model(pixel_values=pixels).pooler_output
        return self._model.visual_projection(pooled).cpu().numpy()


class ClipText(ClipImage):
    """CLIP score: 100 x cosine similarity of a picture and its caption, at least 0 (Hessel et al. 2021).

    The references are captions: `embed_captions` makes them. The factor is torchmetrics', and fits FreezeAsGuard's
    values near 32; Hessel et al. (arXiv 2104.08718) take 2.5.
    """

    name = "CLIP"
    unit = "100 x cosine similarity of picture and caption"
    references = "captions"

    def __init__(self, device: str = "cpu") -> None:
        from transformers import CLIPTokenizer

        super().__init__(device)
        self._tokenizer: Any = pretrained(self.name, CLIPTokenizer.from_pretrained, REPOSITORY)

    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings float32 (n, d + 1) of pictures uint8 (n, H, W, 3); the last number, 0, says: no caption."""
        return np.pad(super().embed(images), ((0, 0), (0, 1)))

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings float32 (n, d + 1) of captions, cut off at CLIP's 77 tokens; the last number is 1."""
        length = int(self._model.config.text_config.max_position_embeddings)
        found = [np.zeros((0, self._width), dtype=np.float32)]
        for start in range(0, len(captions), BATCH_SIZE):
            batch = list(captions[start : start + BATCH_SIZE])
            tokens = self._tokenizer(batch, padding=True, truncation=True, max_length=length, return_tensors="pt")
            pooled = self._model.text_model(**tokens.to(self.device)).pooler_output
            found.append(self._model.text_projection(pooled).cpu().numpy())
        return np.pad(np.concatenate(found), ((0, 0), (0, 1)), constant_values=1)

    def distances(self, generated: NDArray[np.float32], references: NDArray[np.float32]) -> NDArray[np.float32]:
        """CLIP score of each picture (n, d + 1) with its own caption: float32 (n,), 0 to 100.

        references: captions (n, d + 1) in the order of the pictures, or one for all (1, d + 1). Raises RaygardError if
        they are no captions, or not as many.
        """
        check_references(references)
        if not references[:, -1].all():
            raise RaygardError("scorer CLIP compares with captions, not with pictures; for pictures take CLIP-image")
        if len(references) not in (1, len(generated)):
            raise RaygardError(
                f"scorer CLIP compares each picture with its own caption: {len(generated)} pictures, "
                f"{len(references)} captions"
            )
        similarity = (unit(generated[:, :-1]) * unit(references[:, :-1])).sum(axis=1)
        return np.maximum(100 * similarity, 0).astype(np.float32)
