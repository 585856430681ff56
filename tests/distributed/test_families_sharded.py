"""Mask learning of other families than Stable Diffusion under DeepSpeed equals the plain run: two gloo processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from raygard.bilevel.segments import assemble
from raygard.config import ModelConfig
from raygard.diffusion.model import load_denoiser
from tests.families import TINY
from tests.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.families]
WORLD = 2
PLANS = {"sgd2": "sgd2:2:no:sgd", "sgd3": "sgd3:3:no:sgd"}


@pytest.mark.parametrize("pipeline", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline"])
def test_two_ranks_equal_the_dense_run(tmp_path: Path, imagefolder_maker: Callable[..., Path], pipeline: str) -> None:
    import sharded_worker

    root = sharded_worker.make_root(tmp_path, TINY[pipeline], imagefolder_maker)
    run_ranks(Path(sharded_worker.__file__), WORLD, root / "store", root, ",".join(PLANS.values()), root)
    results = [torch.load(root / f"world{WORLD}-rank{rank}.pt", weights_only=False) for rank in range(WORLD)]
    reference = sharded_worker.dense(root, "sgd")
    denoiser = load_denoiser(ModelConfig(pretrained_model_name_or_path=str(root / "sd")))
    shapes = {name: tuple(p.shape) for name, p in denoiser.named_parameters()}
    for name in PLANS:
        assert torch.equal(results[0][name]["logits"], results[1][name]["logits"])
        torch.testing.assert_close(results[0][name]["logits"], reference["logits"], rtol=0, atol=1e-4)
        theta = assemble([rank[name]["pieces"] for rank in results], shapes)
        flat = torch.cat([tensor.reshape(-1) for tensor in theta.values()])
        torch.testing.assert_close(flat, reference["theta"], rtol=0, atol=2e-4)
        assert max(rank[name]["invariant"] for rank in results) < 1e-5
