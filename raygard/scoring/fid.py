"""FID: Frechet distance on features of the Inception network of 2015, when its weights are given.

The weights are the TorchScript file that NVIDIA publishes with StyleGAN2-ADA (StyleGAN3's .pkl is another format): it
takes pictures of any size as uint8 (n, 3, H, W) and scales them itself as the original does, and with
`return_features=True` gives the 2048 numbers FID is defined on (Heusel et al. 2017, arXiv 1706.08500).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from raygard.errors import RaygardError
from raygard.scoring.common import in_batches, require
from raygard.scoring.distribution import frechet_distance, no_single_distances
from raygard.scoring.weights import weights_file

FILE = "inception-2015-12-05.pt"
NUM_FEATURES = 2048
BATCH_SIZE = 32


class Fid:
    """FID, at least 0; one number for all pictures together.

    Raises RaygardError if torchmetrics is missing, or saying where to put the weights.
    """

    name = "FID"
    direction: Literal["distance", "similarity"] = "distance"
    unit = "Frechet distance"
    source = "Inception of 2015 as TorchScript (NVlabs/stylegan2-ada-pytorch, metrics/inception-2015-12-05.pt)"
    licence = "Apache-2.0 (weights, TensorFlow)"
    per_picture = False

    def __init__(self, device: str = "cpu") -> None:
        require(self.name, "metrics", "torchmetrics")
        path = weights_file(self.name, FILE)
        try:
            self._network: Any = torch.jit.load(path, map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise RaygardError(f"{path} is not a TorchScript file: {str(error).splitlines()[0]}") from None
        self.device = device

    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features float32 (n, 2048) of pictures uint8 (n, H, W, 3)."""
        return in_batches(images, BATCH_SIZE, NUM_FEATURES, self._embed)

    def between(self, generated: NDArray[np.float32], references: NDArray[np.float32]) -> float:
        """FID of features (n, 2048) and (m, 2048). Warns with `TooFewPictures` below 2049 pictures."""
        return frechet_distance(self.name, generated, references, NUM_FEATURES + 1)

    def distances(self, generated: NDArray[np.float32], references: NDArray[np.float32]) -> NDArray[np.float32]:
        """Raises RaygardError: there is no distance for each picture."""
        raise no_single_distances(self.name)

    @torch.no_grad()
    def _embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self.device).permute(0, 3, 1, 2)
        return self._network(pixels, return_features=True).float().cpu().numpy()
