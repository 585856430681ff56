"""A worker is really killed in the middle of learning; the run finishes by itself with the same logits."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

pytestmark = pytest.mark.faults


def workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any("RayTrainWorker" in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


class Killer(threading.Thread):
    """SIGKILLs one training worker once history shows publisher step `k`."""

    def __init__(self, history: Path, k: int) -> None:
        super().__init__(daemon=True)
        self.history, self.k, self.victim, self.done = history, k, None, threading.Event()

    def run(self) -> None:
        while not self.done.is_set():
            rows = self.history.read_text().splitlines() if self.history.exists() else []
            if rows and json.loads(rows[-1])["k"] >= self.k and (alive := workers()):
                self.victim = alive[-1].pid
                os.kill(self.victim, signal.SIGKILL)
                return
            time.sleep(0.02)


def test_killed_worker_resumes_to_the_same_logits(setting, undisturbed, tmp_path) -> None:
    from raygard.cluster.training import learn

    history = tmp_path / "history.jsonl"
    killer = Killer(history, k=5)
    killer.start()
    config = setting.config("engine.num_workers=2", "engine.zero_stage=3")
    logits, _ = learn(config, setting.cache, setting.relearned, 0, tmp_path)
    killer.done.set()
    killer.join()
    assert killer.victim is not None and not psutil.pid_exists(killer.victim)
    assert torch.equal(logits, undisturbed[0])
    assert history.read_text() == undisturbed[1]
    assert not (tmp_path / "ray").exists()
