"""The published arrangement that raygard's is measured against learns the same as raygard's does."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from benchmarks import learning_models, mask_learning
from benchmarks.learning_models import Sizes, make_material, make_schedule
from benchmarks.mask_learning import CASES, Case, distance, set_up

UNET = {"in_channels": 4, "sample_size": 16, "block_out_channels": (64,) * 4, "cross_attention_dim": 32}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (learning_models, mask_learning):
        monkeypatch.setattr(module, "SIZES", Sizes(UNET, (32,) * 4, TEXT, 4))
    # Far above the paper's, so that the lower loop moves weights as much as the mask does.
    monkeypatch.setattr(mask_learning, "LR", 1e-2)
    monkeypatch.setattr(mask_learning, "start", functools.cache(mask_learning.start.__wrapped__))


def learned(case: Case, folder: Path) -> dict[str, Any]:
    steps, found = set_up(case, make_material(folder))
    for _, step in steps:
        step()
    return found()


def test_the_published_arrangement_learns_what_the_plain_path_does(small: None, tmp_path: Path) -> None:
    folder = make_schedule(tmp_path)
    plain = learned(CASES["float32"], folder)
    published = learned(Case("published, float32", "published", bf16=False), folder)
    found = distance(published, plain)
    # theta_d in bfloat16 is all that differs.
    assert found["logits_correlation"] > 0.99 and found["weights_apart"] < 0.05
    nothing = distance({**plain, "weights": mask_learning.start()}, plain)
    assert nothing["weights_apart"] == pytest.approx(1)
