"""Style as the channel statistics of early EfficientNet-Lite0 blocks, compared by cosine distance.

Mean and standard deviation over the picture of every channel say which textures, edges and colours are there,
not where: style rather than content (Huang and Belongie 2017, arXiv 1703.06868). The weights are ImageNet's,
from a Python package, so the scorer works offline. It is not CSD, and its numbers do not compare with CSD's.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raygard.scoring.common import in_batches, mean_cosine_distance
from raygard.scoring.enlite0 import LICENCE, SOURCE, enlite0_input, load_enlite0

BLOCKS = (0, 2, 4, 7, 10)
NUM_FEATURES = 544
# At 128 pixels the class of nearest mean distance names the team of an emoji it has never seen with 0.77 (bundled
# domain, four styles, chance 0.25). 64 pixels did worse and 224 no better when the two were compared on parts of it.
INPUT_SIDE = 128
BATCH_SIZE = 32


class StyleEnLite0:
    """Style embedding of 544 numbers; distances are cosine distances, 0 (same style) to 2.

    Raises RaygardError if its packages are not installed or the weights are damaged.
    """

    name = "style_enlite0"
    direction: Literal["distance", "similarity"] = "distance"
    unit = "cosine distance"
    source = SOURCE
    licence = LICENCE

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._network = load_enlite0(self.name).to(device)

    @torch.no_grad()
    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings float32 (n, 544) of pictures uint8 (n, H, W, 3), scaled to 128 x 128 first."""
        return in_batches(images, BATCH_SIZE, NUM_FEATURES, self._statistics)

    def distances(self, generated: NDArray[np.float32], references: NDArray[np.float32]) -> NDArray[np.float32]:
        """Mean cosine distance of each generated embedding (n, 544) to all references (m, 544): float32
        (n,)."""
        return mean_cosine_distance(generated, references)

    def _statistics(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        scaled = enlite0_input(images, INPUT_SIDE, self.device)
        network = self._network
        state: Tensor = network._swish(network._bn0(network._conv_stem(scaled)))
        found = []
        for index, block in enumerate(network._blocks[: BLOCKS[-1] + 1]):
            state = block(state)
            if index in BLOCKS:
                found += [state.mean(dim=(2, 3)), state.std(dim=(2, 3), correction=0)]
        return torch.cat(found, dim=1).cpu().numpy()
