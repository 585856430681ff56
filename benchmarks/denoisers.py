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

from raygard.diffusion.shape import (
    KNOWN,
    family_of_shape,
    forward_flops,
    make_denoiser,
    measure,
    meta_denoiser,
    run_denoiser,
)

RESULTS = Path(__file__).parent / "results" / "denoisers.json"
# name: known shape, latents' side, pixels.
DENOISERS = {
    "SD 2.1": ("SD2.1-shape", 64, 512),
    "SDXL": ("SDXL-shape", 128, 1024),
    "Flux.1-dev": ("Flux.1-dev-shape", 128, 1024),
}


def facts(name: str) -> dict[str, Any]:
    shape, side, pixels = DENOISERS[name]
    family = family_of_shape(shape)

    def make(checkpointing: bool = False) -> Any:
        return make_denoiser(family, KNOWN[shape], checkpointing)

    def run(denoiser: Any) -> object:
        return run_denoiser(family, denoiser, side)

    plain, kept = measure(make, run), measure(lambda: make(True), run)
    return {
        "pixels": pixels,
        "num_params": plain.num_params,
        "num_tensors": plain.num_tensors,
        "largest_tensor": max(plain.sizes),
        "saved_elements": plain.saved_elements,
        "saved_elements_checkpointed": kept.saved_elements,
        "forward_flops": forward_flops(family, meta_denoiser(family, KNOWN[shape]), side),
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
