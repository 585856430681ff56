"""Mask learning inside Ray Train: worlds and ZeRO stages agree, rows of history, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.selectivity_rules.freeze import learn_in_one_process
from raygard.diffusion.cache import load_cache
from raygard.errors import RaygardError

pytestmark = pytest.mark.distributed


def test_two_workers_zero3_equal_one_worker_stage0(setting, undisturbed, tmp_path) -> None:
    from raygard.cluster.training import learn

    rows: list[dict] = []
    config = setting.config("engine.num_workers=1", "engine.zero_stage=0")
    logits, soft = learn(config, setting.cache, setting.relearned, 0, tmp_path, on_row=rows.append)
    torch.testing.assert_close(logits, undisturbed[0], rtol=0, atol=1e-4)
    assert abs(float(soft.mean()) - config.mask.freeze_ratio) < 1e-9
    assert [row["kind"] for row in rows] == ["user", "user", "publisher"] * 20
    assert {row["k"] for row in rows} == set(range(20))
    assert len(logits.unique()) > len(logits) // 2


def test_streamed_gradients_give_the_mask_of_plain_ones(setting, tmp_path) -> None:
    from raygard.cluster.training import learn

    options = ("engine.num_workers=1", "engine.zero_stage=0", "bilevel.max_grad_norm=0")
    streamed = ("engine.stream_gradients=true", "engine.checkpointing_steps=7")
    cases = [(*streamed, "engine.theta_d_device=cpu"), (*streamed, "engine.mixed_precision=bf16")]
    same, half = (
        learn(setting.config(*options, *more), setting.cache, setting.relearned, 0, tmp_path / str(number))[0]
        for number, more in enumerate(cases)
    )
    data, relearned = load_cache(setting.cache), load_file(setting.relearned)
    plain = learn_in_one_process(setting.config(*options), data, relearned, 0).logits
    torch.testing.assert_close(same, plain, rtol=0, atol=1e-6)
    assert torch.corrcoef(torch.stack([half, plain]))[0, 1] > 0.9


def test_history_is_the_mean_over_workers(setting, undisturbed) -> None:
    rows = [json.loads(line) for line in undisturbed[1].splitlines()]
    assert len(rows) == 60
    publisher = [row for row in rows if row["kind"] == "publisher"]
    assert all(abs(row["soft_mean"] - 0.3) < 1e-9 and row["signal_norm"] > 0 for row in publisher)


def test_more_workers_than_the_cluster_has_are_refused_with_the_arithmetic(setting, tmp_path) -> None:
    from raygard.cluster.training import learn

    config = setting.config("engine.num_workers=4", "engine.cpus_per_worker=8")
    with pytest.raises(RaygardError, match=r"4 workers x 8 CPU = 32 CPU, but the cluster has 2"):
        learn(config, setting.cache, setting.relearned, 0, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_mistake_inside_a_worker_is_one_line_and_not_repeated(setting, tmp_path) -> None:
    from raygard.cluster.training import learn

    config = setting.config("engine.num_workers=1", "bilevel.user_lr=1e30", "engine.max_failures=-1")
    with pytest.raises(RaygardError, match="not finite") as caught:
        learn(config, setting.cache, setting.relearned, 0, tmp_path / "out")
    assert "\n" not in str(caught.value)
