"""CSD: how far the style of a picture is from the style of the references (contrastive style descriptors).

Somepalli et al. 2024, arXiv 2404.01292: CLIP's ViT-L/14 picture encoder, trained on, with its projection replaced by
one for style. The published checkpoint has OpenAI's names; here they are put into transformers' CLIPVisionModel.
"""

from __future__ import annotations

import argparse
import pickle
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raygard.errors import RaygardError
from raygard.scoring.common import CLIP_MEAN, CLIP_STD, in_batches, mean_cosine_distance, to_input
from raygard.scoring.weights import weights_file

REPOSITORY, FILE = "tomg-group-umd/CSD-ViT-L", "pytorch_model.bin"
BATCH_SIZE = 16
# OpenAI's ViT-L/14 and all its smaller versions have heads of this width.
HEAD_WIDTH = 64
NAMES = (
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^ln_pre\.", "pre_layrnorm."),
    (r"^ln_post\.", "post_layernorm."),
    (r"^transformer\.resblocks\.(\d+)\.ln_(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"encoder.layers.\1.self_attn.out_proj."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"encoder.layers.\1.mlp.fc1."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"encoder.layers.\1.mlp.fc2."),
)
ATTENTION = re.compile(r"^transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$")

# What the published training checkpoint holds beside tensors: the arguments of its run and numbers of numpy, under the
# name of numpy 2 or, in files as old as the published one, of numpy 1.
SCALAR = np.float64(0).__reduce__()[0]
HARMLESS: list[Any] = [
    argparse.Namespace, SCALAR, (SCALAR, "numpy.core.multiarray.scalar"), np.dtype, np.dtypes.Float64DType,
]  # fmt: skip


class Csd:
    """CSD of the FreezeAsGuard paper: cosine distance of style descriptors, 0 (same style) to 2.

    Raises RaygardError saying where to put the weights if they are nowhere, or that they are not CSD's.
    """

    name = "CSD"
    direction: Literal["distance", "similarity"] = "distance"
    unit = "cosine distance"
    source = "CSD ViT-L (Somepalli et al. 2024, arXiv 2404.01292; tomg-group-umd/CSD-ViT-L)"
    licence = "MIT (CLIP), weights as stated by tomg-group-umd/CSD-ViT-L"

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        model, style = load_csd(weights_file(self.name, FILE, REPOSITORY))
        self._model, self._style = model.to(device).eval(), style.to(device)

    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Style descriptors of length 1, float32 (n, d), of pictures uint8 (n, H, W, 3)."""
        return in_batches(images, BATCH_SIZE, self._style.shape[1], self._embed)

    def distances(self, generated: NDArray[np.float32], references: NDArray[np.float32]) -> NDArray[np.float32]:
        """Mean cosine distance of each descriptor (n, d) to all references (m, d): float32 (n,)."""
        return mean_cosine_distance(generated, references)

    @torch.no_grad()
    def _embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = to_input(images, int(self._model.config.image_size), CLIP_MEAN, CLIP_STD, self.device)
        features = self._model(pixel_values=pixels).pooler_output @ self._style
        return torch.nn.functional.normalize(features, dim=1).cpu().numpy()


def load_csd(path: Path) -> tuple[Any, Tensor]:
    """transformers' CLIPVisionModel and the style projection (width, d) of a checkpoint with OpenAI's names.

    path: the published checkpoint, read without running code from it.
    Raises RaygardError if the file is damaged or holds something else.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    state = {name.removeprefix("module."): tensor.float() for name, tensor in _read(path).items()}
    try:
        style = state["last_layer_style"]
        kernel, positions = state["backbone.conv1.weight"], state["backbone.positional_embedding"]
        hidden = state["backbone.transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    except KeyError as error:
        raise RaygardError(f"{path} is not a checkpoint of CSD: it has no tensor {error}") from None
    translated = _translated({k.removeprefix("backbone."): t for k, t in state.items() if k.startswith("backbone.")})
    width, patch = kernel.shape[0], kernel.shape[-1]
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=sum(name.endswith("mlp.fc1.weight") for name in translated),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=patch * round((len(positions) - 1) ** 0.5),
        patch_size=patch,
        hidden_act="quick_gelu",
    )
    model = CLIPVisionModel(config)
    # Older versions of transformers put the network into an attribute of the model.
    inner = getattr(model, "vision_model", model)
    try:
        inner.load_state_dict(translated)
    except RuntimeError as error:
        raise RaygardError(f"{path} is not a checkpoint of CSD: {' '.join(str(error).split())[:200]}") from None
    return model, style


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return content["model_state_dict"]
    except (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise RaygardError(f"{path} is not a checkpoint of CSD: {str(error).splitlines()[0]}") from None


def _translated(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's names to transformers'; query, key and value are one tensor there and three here."""
    result = {}
    for name, tensor in state.items():
        attention = ATTENTION.match(name)
        if attention:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                result[f"encoder.layers.{attention[1]}.self_attn.{part}_proj.{attention[2]}"] = piece
            continue
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result
