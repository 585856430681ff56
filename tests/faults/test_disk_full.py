"""A real file system is really full while a checkpoint is written; with room again the same command goes on."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from raygard.cluster.checkpoint import find_damage
from raygard.errors import RaygardError
from tests.faults.nodes import Watch, last_step

pytestmark = pytest.mark.faults


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16M", "raygard-test", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip(f"a small file system may not be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], timeout=30, check=True)


def fill(filler: Path, leave: int) -> None:
    """Take all of the disk but `leave` bytes."""
    with filler.open("wb", buffering=0) as stream:
        for size in (2**16, 2**12):
            try:
                while True:
                    stream.write(bytes(size))
            except OSError:
                continue
    os.truncate(filler, filler.stat().st_size - leave)


def test_full_disk_is_one_line_and_costs_one_interval(setting, undisturbed, small_disk, tmp_path, report_fault) -> None:
    from raygard.cluster.training import learn

    out, filler = small_disk / "learn", small_disk / "filler"
    config = setting.config("engine.num_workers=2", "engine.zero_stage=3", "engine.max_failures=0")

    def strike() -> None:
        # Room for lines of history, and for no checkpoint.
        (whole, *_) = sorted(out.glob("ray/train/checkpoint_*/state-00000-theta.safetensors"))
        fill(filler, leave=whole.stat().st_size // 2)

    watch = Watch(out / "history.jsonl", 5, strike)
    with pytest.raises(RaygardError, match=r"no space left while writing .*checkpoint_") as caught:
        learn(config, setting.cache, setting.relearned, 0, out)
    watch.end()
    assert "\n" not in str(caught.value)
    assert not list(out.rglob("*.tmp"))
    checkpoints = sorted(out.glob("ray/train/checkpoint_*"))
    assert any(find_damage(folder, 0, 1) is None for folder in checkpoints)
    reached = last_step(out / "history.jsonl")

    filler.unlink()
    started = time.monotonic()
    again = Watch(out / "history.jsonl", 0, lambda: None)
    logits, _ = learn(config, setting.cache, setting.relearned, 0, out)
    again.end()
    assert torch.equal(logits, undisturbed[0])
    assert (out / "history.jsonl").read_text() == undisturbed[1]
    assert not (out / "ray").exists()
    assert 0 < again.repeated <= config.engine.checkpointing_steps + 1 and again.furthest >= reached
    seconds = again.struck_at - started + again.recovered_s
    report_fault("disk full while a checkpoint is written", f"{again.repeated} publisher steps", seconds)
