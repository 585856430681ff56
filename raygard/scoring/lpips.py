"""LPIPS: how different two pictures look, from the features of AlexNet (Zhang et al. 2018, arXiv 1801.03924, Eq 1).

LPIPS of two pictures is a sum of squared differences of features, each scaled to length 1 over its channels, weighted
by channel and averaged over places. So it is the squared Euclidean distance of embeddings that hold those features
times the roots of weight and share of places, and all pairs cost one pass for each picture.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raygard.errors import RaygardError
from raygard.scoring.common import check_references, in_batches, package_folder, require, to_input
from raygard.scoring.weights import weights_file

FILE = "alexnet-owt-7be5be79.pth"
CHANNEL_WEIGHTS = "functional/image/lpips_models/alex.pth"
SIDE = 224
BATCH_SIZE = 16
# AlexNet as torchvision publishes it; features are taken after these layers, each the ReLU of a convolution.
TAPS = (1, 4, 7, 9, 11)
# LPIPS wants (2 x - 1 - shift) / scale of x in [0, 1]; here as the mean and standard deviation of x.
MEAN = tuple((1 + shift) / 2 for shift in (-0.030, -0.088, -0.188))
STD = tuple(scale / 2 for scale in (0.458, 0.448, 0.450))


class Lpips:
    """LPIPS (AlexNet, version 0.1) at 224 x 224 pixels, at least 0. IMMA's measure is 1 - LPIPS.

    Raises RaygardError if torchmetrics is missing, or saying where to put AlexNet's weights.
    """

    name = "LPIPS"
    direction: Literal["distance", "similarity"] = "distance"
    unit = "LPIPS"
    source = "AlexNet (torchvision, ImageNet) with the channel weights of LPIPS 0.1 (package torchmetrics)"
    licence = "BSD-3-Clause (AlexNet), BSD-2-Clause (LPIPS)"

    def __init__(self, device: str = "cpu") -> None:
        require(self.name, "metrics", "torchmetrics")
        self.device = device
        network = alexnet_features()
        path = weights_file(self.name, FILE)
        state = {k.removeprefix("features."): v for k, v in _read(path).items() if k.startswith("features.")}
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise RaygardError(f"{path} is not AlexNet: {' '.join(str(error).split())[:200]}") from None
        self._network = network.to(device).eval()
        folder = package_folder("torchmetrics")
        assert folder is not None
        channels = _read(folder / CHANNEL_WEIGHTS)
        self._roots = [channels[f"lin{tap}.model.1.weight"].clamp(min=0).sqrt().to(device) for tap in range(len(TAPS))]
        self._width = self._embed(np.zeros((1, SIDE, SIDE, 3), dtype=np.uint8)).shape[1]

    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings float32 (n, 484992) of pictures uint8 (n, H, W, 3): about 2 MB each."""
        return in_batches(images, BATCH_SIZE, self._width, self._embed)

    def distances(self, generated: NDArray[np.float32], references: NDArray[np.float32]) -> NDArray[np.float32]:
        """Mean LPIPS of each generated picture (n, d) to all references (m, d): float32 (n,)."""
        check_references(references)
        pairs = [((picture - references) ** 2).sum(axis=1, dtype=np.float64).mean() for picture in generated]
        return np.array(pairs, dtype=np.float32)

    @torch.no_grad()
    def _embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        state: Tensor = to_input(images, SIDE, MEAN, STD, self.device)
        found = []
        for index, layer in enumerate(self._network):
            state = layer(state)
            if index in TAPS:
                length = state.norm(dim=1, keepdim=True) + 1e-10
                places = state.shape[2] * state.shape[3]
                found.append((state / length * self._roots[TAPS.index(index)] / places**0.5).flatten(1))
        return torch.cat(found, dim=1).cpu().numpy()


def alexnet_features() -> nn.Sequential:
    """The convolutions of AlexNet with torchvision's names, random weights."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, stride=2)),
    )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise RaygardError(f"cannot read weights from {path}: {str(error).splitlines()[0]}") from None
