"""A worker is really killed in the middle of learning, and a checkpoint is really torn; the logits are the same."""

from __future__ import annotations

import os
import time

import psutil
import pytest
import torch

from raygard.cluster.checkpoint import find_damage, read_manifest
from tests.faults.nodes import Watch, last_step

pytestmark = pytest.mark.faults

TWO_SHARDED = ("engine.num_workers=2", "engine.zero_stage=3")
SHARD = "state-00001-theta.safetensors"


def workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any("RayTrainWorker" in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_killed_worker_resumes_to_the_same_logits(setting, undisturbed, tmp_path, report_fault) -> None:
    from raygard.cluster.training import learn

    history = tmp_path / "history.jsonl"
    victims: list[psutil.Process] = []

    def strike() -> None:
        victims.append(workers()[-1])
        victims[0].kill()

    watch = Watch(history, 5, strike)
    config = setting.config(*TWO_SHARDED)
    logits, _ = learn(config, setting.cache, setting.relearned, 0, tmp_path)
    watch.end()
    assert not victims[0].is_running()
    assert torch.equal(logits, undisturbed[0])
    assert history.read_text() == undisturbed[1]
    assert not (tmp_path / "ray").exists()
    assert watch.repeated <= config.engine.checkpointing_steps
    report_fault("worker killed", f"{watch.repeated} publisher steps", watch.recovered_s)


def test_damaged_shards_mean_the_checkpoint_before_them(setting, undisturbed, tmp_path, report_fault) -> None:
    from raygard.cluster.training import learn

    history = tmp_path / "history.jsonl"
    config = setting.config(*TWO_SHARDED, "engine.max_failures=0", "engine.checkpoints_total_limit=3")
    cut_off = Watch(history, 7, lambda: workers()[-1].kill())
    with pytest.raises(Exception, match="Training failed due to worker errors"):
        learn(config, setting.cache, setting.relearned, 0, tmp_path)
    cut_off.end()
    whole = [path for path in sorted(tmp_path.glob("ray/train/checkpoint_*")) if find_damage(path, 0, 1) is None]
    assert len(whole) >= 3
    (whole[-1] / SHARD).unlink()
    os.truncate(whole[-2] / SHARD, (whole[-2] / SHARD).stat().st_size // 2)
    expected = last_step(history) + 1 - read_manifest(whole[-3])["k"]

    started = time.monotonic()
    watch = Watch(history, 0, lambda: None)
    logits, _ = learn(config, setting.cache, setting.relearned, 0, tmp_path)
    watch.end()
    assert torch.equal(logits, undisturbed[0])
    assert history.read_text() == undisturbed[1]
    assert watch.repeated == expected > 0
    seconds = watch.struck_at - started + watch.recovered_s
    report_fault("checkpoint shards missing and truncated", f"{watch.repeated} publisher steps", seconds)
