"""Several real Ray nodes on this machine, drivers on them, and a watch that strikes and measures what it cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "clusters" / "local" / "cluster.py"
MARK = "RAYGARD_LOCAL_CLUSTER"
# One worker on each node, so that whoever loses a node loses a worker.
ONE_EACH = ("engine.num_workers=2", "engine.zero_stage=3", "engine.cpus_per_worker=1")


@dataclass(frozen=True)
class Nodes:
    """A cluster of clusters/local in `folder`: a head without CPUs, and nodes of one CPU."""

    folder: Path

    @classmethod
    def start(cls, folder: Path, workers: int) -> Nodes:
        nodes = cls(folder)
        try:
            nodes._do("start", "--workers", str(workers), "--cpus", "1")
        except AssertionError:
            nodes.stop()
            raise
        return nodes

    def stop(self) -> None:
        """End every process of the cluster, and every driver that `drive` started on it."""
        self._do("stop")

    def have(self, workers: int) -> None:
        """Add nodes until so many are alive."""
        missing = workers - len(self.raylets()[1:])
        assert missing >= 0
        if missing:
            self._do("add", "--workers", str(missing))

    def _do(self, command: str, *options: str) -> None:
        arguments = [sys.executable, str(CLUSTER), command, "--folder", str(self.folder), *options]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    @property
    def state(self) -> dict:
        return json.loads((self.folder / "cluster.json").read_text())

    @property
    def env(self) -> dict[str, str]:
        base = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token")}
        bin_folder = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        ours = {"RAY_ADDRESS": self.state["address"], "PYTHONPATH": str(ROOT), "PATH": bin_folder}
        # A driver is stopped with the cluster, also when its test fails.
        return {**base, **token, **ours, MARK: self.state["mark"]}

    def processes(self, name: str) -> list[psutil.Process]:
        """Processes of this cluster whose command line holds `name`, oldest first."""
        found, mark = [], self.state["mark"]
        for process in psutil.process_iter():
            try:
                ours = process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
                if ours and any(name in part for part in process.cmdline()):
                    found.append(process)
            except (psutil.AccessDenied, psutil.NoSuchProcess, OSError):
                continue
        return sorted(found, key=lambda process: process.create_time())

    def raylets(self) -> list[psutil.Process]:
        """The head's first."""
        return [process for process in self.processes("raylet/raylet") if process.name() == "raylet"]

    def hosts(self) -> list[psutil.Process]:
        """Raylets of the nodes that Ray Train's workers are on."""
        parents = [worker.parent() for worker in self.processes("RayTrainWorker")]
        return [parent for parent in parents if parent is not None]

    def drive(self, root: Path, out: Path, *overrides: str, **variables: str) -> subprocess.Popen[str]:
        """`learn_run` on this cluster."""
        command = [sys.executable, "-m", "tests.faults.learn_run", str(root), str(out), *ONE_EACH, *overrides]
        return subprocess.Popen(
            command, env={**self.env, **variables}, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip


class Watch(threading.Thread):
    """Strikes once history shows publisher step `k`, and sees what is repeated and when the run is as far again.

    repeated: publisher steps that were done twice. recovered_s: from the strike to the first step not done before.
    """

    def __init__(self, history: Path, k: int, strike: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.history, self.k, self.strike = history, k, strike
        self.ended = threading.Event()
        self.struck_at: float | None = None
        self.furthest, self.repeated, self.recovered_s = -1, 0, float("nan")
        self.failed: BaseException | None = None
        self.striking = threading.Thread(target=self._strike, daemon=True)
        self.start()

    def _strike(self) -> None:
        try:
            self.strike()
        except BaseException as error:
            self.failed = error

    def run(self) -> None:
        resumed, before = False, None
        while not self.ended.wait(0.02):
            k = last_step(self.history)
            if self.struck_at is None and k >= self.k:
                self.struck_at = time.monotonic()
                before = self.history.stat().st_ino
                # A strike may take long, and the run goes on meanwhile.
                self.striking.start()
            if self.struck_at is None:
                continue
            # A run that goes on writes its history anew, from the checkpoint's step on.
            if not resumed and self.history.stat().st_ino != before:
                k, resumed = last_step(self.history), True
                self.repeated = max(0, self.furthest - k)
            elif resumed and k > self.furthest:
                self.recovered_s = time.monotonic() - self.struck_at
                return
            if not resumed:
                self.furthest = max(self.furthest, k)

    def end(self) -> None:
        """Raises what the strike raised; an assertion fails if it never came."""
        self.ended.set()
        self.join()
        if self.struck_at is not None:
            self.striking.join()
        if self.failed is not None:
            raise self.failed
        assert self.struck_at is not None, "the run never came so far"


def last_step(history: Path) -> int:
    """The publisher step of the last whole line; -1 without one."""
    try:
        return int(json.loads(history.read_text().splitlines()[-1])["k"])
    except (FileNotFoundError, IndexError, ValueError):
        return -1


def wait_for(done: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.2)
