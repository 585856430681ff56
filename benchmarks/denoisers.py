"""How large the denoisers of public releases are and what a step of them costs, found without their weights.

    python benchmarks/denoisers.py [--out benchmarks/results/denoisers.json]

Built by diffusers from the configurations of the releases, on tensors without memory: numbers of parameters and
tensors, what autograd keeps for one picture, and floating-point operations of one forward pass (torch's
FlopCounterMode, which counts matrix products and convolutions; a multiplication and an addition are two).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from raygard.diffusion.families.stable_diffusion import CLIP_TOKENS as TEXT_TOKENS
from raygard.diffusion.families.stable_diffusion import StableDiffusion
from raygard.diffusion.shape import measure

RESULTS = Path(__file__).parent / "results" / "denoisers.json"
# unet/config.json of stabilityai/stable-diffusion-xl-base-1.0, where it is not diffusers' default.
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# transformer/config.json of black-forest-labs/FLUX.1-dev: diffusers' defaults, and guidance as an input.
FLUX = {"guidance_embeds": True}
FLUX_TEXT_TOKENS = 512


def sd21(side: int) -> tuple[Any, Any]:
    from diffusers import UNet2DConditionModel

    def run(unet: Any) -> object:
        return unet(torch.empty(1, 4, side, side), torch.zeros(1), torch.empty(1, TEXT_TOKENS, 1024))

    return lambda: UNet2DConditionModel(**StableDiffusion.shapes["SD2.1-shape"]), run


def sdxl(side: int) -> tuple[Any, Any]:
    from diffusers import UNet2DConditionModel

    def run(unet: Any) -> object:
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.zeros(1, 6)}
        text = torch.empty(1, TEXT_TOKENS, 2048)
        return unet(torch.empty(1, 4, side, side), torch.zeros(1), text, added_cond_kwargs=added)

    return lambda: UNet2DConditionModel(**SDXL), run


def flux(side: int) -> tuple[Any, Any]:
    from diffusers import FluxTransformer2DModel

    def run(transformer: Any) -> object:
        # Flux takes two by two latents as one token.
        tokens = (side // 2) ** 2
        return transformer(
            hidden_states=torch.empty(1, tokens, 64),
            encoder_hidden_states=torch.empty(1, FLUX_TEXT_TOKENS, 4096),
            pooled_projections=torch.empty(1, 768),
            timestep=torch.zeros(1),
            img_ids=torch.zeros(tokens, 3),
            txt_ids=torch.zeros(FLUX_TEXT_TOKENS, 3),
            guidance=torch.zeros(1),
        )

    return lambda: FluxTransformer2DModel(**FLUX), run


# name: how it is made and run, latents' side, pixels.
DENOISERS = {
    "SD 2.1": (sd21, 64, 512),
    "SDXL": (sdxl, 128, 1024),
    "Flux.1-dev": (flux, 128, 1024),
}


def checkpointed(make: Any) -> Any:
    def made() -> nn.Module:
        module = make()
        module.train()
        module.enable_gradient_checkpointing()
        return module

    return made


def forward_flops(make: Any, run: Any) -> int:
    """Of one picture. On the meta device, where attention is made of products that the counter knows."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad():
        module = make()
        with counter:
            run(module)
    return int(counter.get_total_flops())


def facts(name: str) -> dict[str, Any]:
    denoiser, side, pixels = DENOISERS[name]
    make, run = denoiser(side)
    plain, kept = measure(make, run), measure(checkpointed(make), run)
    return {
        "pixels": pixels,
        "num_params": plain.num_params,
        "num_tensors": plain.num_tensors,
        "largest_tensor": max(plain.sizes),
        "saved_elements": plain.saved_elements,
        "saved_elements_checkpointed": kept.saved_elements,
        "forward_flops": forward_flops(make, run),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    found = {name: facts(name) for name in DENOISERS}
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
