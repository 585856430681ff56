"""DINO: how alike two pictures are to a network that learned without labels (M of IMMA's similarity gap ratio)."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from raygard.scoring.common import IMAGENET_MEAN, IMAGENET_STD, in_batches, mean_cosine_similarity, to_input
from raygard.scoring.weights import pretrained

REPOSITORY = "facebook/dino-vits16"
BATCH_SIZE = 32


class Dino:
    """Cosine similarity of pictures under DINO ViT-S/16 (its class token), -1 to 1.

    Raises RaygardError saying where to put the weights if they are nowhere.
    """

    name = "DINO"
    direction: Literal["distance", "similarity"] = "similarity"
    unit = "cosine similarity"
    source = "DINO ViT-S/16 (Caron et al. 2021, arXiv 2104.14294; facebook/dino-vits16)"
    licence = "Apache-2.0"

    def __init__(self, device: str = "cpu") -> None:
        from transformers import ViTModel

        self.device = device
        load = partial(ViTModel.from_pretrained, add_pooling_layer=False)
        self._model: Any = pretrained(self.name, load, REPOSITORY).to(device).eval()

    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings float32 (n, d) of pictures uint8 (n, H, W, 3)."""
        return in_batches(images, BATCH_SIZE, int(self._model.config.hidden_size), self._embed)

    def distances(self, generated: NDArray[np.float32], references: NDArray[np.float32]) -> NDArray[np.float32]:
        """Mean cosine similarity of each generated embedding (n, d) to all references (m, d): float32 (n,)."""
        return mean_cosine_similarity(generated, references)

    @torch.no_grad()
    def _embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = to_input(images, int(self._model.config.image_size), IMAGENET_MEAN, IMAGENET_STD, self.device)
        return self._model(pixel_values=pixels).last_hidden_state[:, 0].cpu().numpy()
