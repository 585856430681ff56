"""A real MLflow server is killed in the middle of a run and brought back: every record arrives."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from raygard.config import TrackingConfig
from raygard.tracking import SPOOL, Tracker, sync

pytestmark = pytest.mark.faults

STEPS = 6


class Server:
    """`mlflow server` on loopback, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", self.uri.rsplit(":", 1)[1],
            "--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}",
            "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 180
        while not self.answers():
            assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "mlflow server does not answer"
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        if self.process is None:
            return
        try:
            family = [self.process.pid, *(c.pid for c in psutil.Process(self.process.pid).children(recursive=True))]
        except psutil.NoSuchProcess:
            family = []
        for pid in family:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        self.process = None


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    running = Server(tmp_path)
    try:
        running.start()
        yield running
    finally:
        running.kill()


def test_killed_server_is_one_warning_and_every_record_arrives_once(server, tmp_path, caplog, report_fault) -> None:
    from mlflow import MlflowClient

    run_dir = tmp_path / "run"
    note = run_dir / "note.txt"
    tracker = Tracker.open(TrackingConfig(tracking_uri=server.uri), run_dir, "killed")
    note.write_text("hello")
    run = tracker.start()
    for step in range(STEPS):
        if step == STEPS // 2:
            server.kill()
        run.metrics({"loss": 1.0 / (step + 1)}, step)
    run.params({"p": 0.3})
    run.artifact(note, "notes")
    run.finish()
    assert not tracker.connected
    assert sum("MLflow tracking failed, the run goes on" in message for message in caplog.messages) == 1
    assert len((run_dir / SPOOL).read_text().splitlines()) == STEPS - STEPS // 2 + 3

    server.start()
    started = time.monotonic()
    assert sync(run_dir) == STEPS - STEPS // 2 + 3
    seconds = time.monotonic() - started
    assert sync(run_dir) == 0
    client = MlflowClient(server.uri)
    (found,) = client.search_runs([client.get_experiment_by_name("raygard").experiment_id])
    history = client.get_metric_history(found.info.run_id, "loss")
    assert sorted((point.step, point.value) for point in history) == [(s, 1.0 / (s + 1)) for s in range(STEPS)]
    assert found.info.status == "FINISHED" and found.data.params == {"p": "0.3"}
    assert [file.path for file in client.list_artifacts(found.info.run_id, "notes")] == ["notes/note.txt"]
    report_fault("MLflow server killed and brought back", "nothing (spooled)", seconds)
