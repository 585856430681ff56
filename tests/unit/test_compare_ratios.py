"""Masks with a freeze ratio of their own in a comparison: `freeze@0.5`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raygard.compare.plan import parse_defences
from raygard.config import RunConfig
from raygard.config_file import load_config
from raygard.errors import RaygardError
from raygard.mask import FreezeMask

# Of the tiny pipeline of conftest.
NUM_TENSORS = 208


def test_a_mask_of_fixed_size_has_no_ratio() -> None:
    with pytest.raises(RaygardError, match="freezes all of its kind"):
        parse_defences(["manual-attention@0.5"], [], ["none", "manual-attention"])


def test_masks_of_other_ratios_share_relearning_and_controls_follow_them(
    tiny_sd: Path, imagefolder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raygard.cluster import training
    from raygard.compare_flow import CompareFlow

    relearned: list[Path] = []

    def fake_relearn(config: RunConfig, cache: Path, out: Path, **_: Any) -> Path:
        relearned.append(out)
        return out

    def fake_learn(config: RunConfig, cache: Path, relearned: Path, mask_seed: int, out: Path, **_: Any) -> Any:
        logits = torch.randn(NUM_TENSORS, dtype=torch.float64, generator=torch.Generator().manual_seed(mask_seed))
        return logits, logits.sigmoid()

    monkeypatch.setattr(training, "relearn", fake_relearn)
    monkeypatch.setattr(training, "learn", fake_learn)
    data = imagefolder({"a": 48, "c": 48})
    settings = load_config(
        None,
        [
            f"domain.data={data}", f"model.pretrained_model_name_or_path={tiny_sd}", "domain.illegal=[a]",
            "domain.legal=[c]", "mask.freeze_ratio=0.1", "evaluation.mask_seeds=[0, 1]", "evaluation.random_draws=1",
            "compare.defences=[none, freeze, freeze@0.25, random@0.25, freeze@0.5]", "tracking.enabled=false",
        ],
    )  # fmt: skip
    flow = CompareFlow(settings, tmp_path / "out")
    with flow.flow.parent:
        releases = flow._releases()
    shares = {
        name: [FreezeMask.load(str(each.mask)).ratio_by_count for each in made if each.mask]
        for name, made in releases.items()
    }
    assert flow.matrix.lost == {} and len(relearned) == 1
    assert {name: len(made) for name, made in shares.items()} == {
        "none": 0, "freeze": 2, "freeze@0.25": 2, "random@0.25": 1, "freeze@0.5": 2
    }  # fmt: skip
    for name, expected in (("freeze", 0.1), ("freeze@0.25", 0.25), ("random@0.25", 0.25), ("freeze@0.5", 0.5)):
        assert shares[name] == pytest.approx([expected] * len(shares[name]), abs=1 / NUM_TENSORS)
    assert [each.mask_seed for each in releases["freeze@0.5"]] == [0, 1]


def test_a_given_mask_has_its_own_ratio(tiny_sd: Path, imagefolder: Any, tmp_path: Path) -> None:
    from raygard.compare_flow import CompareFlow

    data = imagefolder({"a": 48, "c": 48})
    paths = [f"domain.data={data}", f"model.pretrained_model_name_or_path={tiny_sd}", f"compare.mask={tmp_path / 'm'}"]
    settings = load_config(
        None, [*paths, "domain.illegal=[a]", "domain.legal=[c]", "compare.defences=[none, freeze@0.5]"]
    )
    with pytest.raises(RaygardError, match=r"'freeze@0.5': the freeze ratio of compare.mask is what it was learned"):
        CompareFlow(settings, tmp_path / "out")
