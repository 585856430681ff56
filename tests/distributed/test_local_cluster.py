"""clusters/local: a head and a worker really start, run work, and are stopped, and nothing else is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.distributed

CLUSTERS = Path(__file__).resolve().parents[2] / "clusters"


@dataclass(frozen=True)
class Local:
    folder: Path
    state: dict
    env: dict[str, str]

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(CLUSTERS / script), *arguments]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=120, check=False)


def cluster(command: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(CLUSTERS / "local" / "cluster.py"), command, "--folder", str(folder), *options]
    return subprocess.run(script, capture_output=True, text=True, timeout=240, check=False)


def ours(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAYGARD_LOCAL_CLUSTER") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess, OSError):
            continue
    return found


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    folder = tmp_path / "a folder"
    try:
        started = cluster("start", folder, "--workers", "1", "--cpus", "2")
        assert started.returncode == 0, started.stdout + started.stderr
        exports = dict(re.findall(r"^export (\w+)='(.*)'$", (folder / "env.sh").read_text(), re.MULTILINE))
        assert set(exports) == {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"}
        state = json.loads((folder / "cluster.json").read_text())
        base = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        bin_folder = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        yield Local(folder, state, {**base, **exports, "RAY_ADDRESS": state["address"], "PATH": bin_folder})
    finally:
        cluster("stop", folder)


def nodes(local: Local, token: str) -> list[dict]:
    url = f"{local.state['dashboard']}/api/v0/nodes?detail=1"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["data"]["result"]["result"]


def test_two_nodes_start_work_and_exactly_they_are_stopped(local: Local) -> None:
    with subprocess.Popen(["sleep", "300"]) as bystander:
        try:
            token = (local.folder / "token").read_text()
            assert (local.folder / "token").stat().st_mode & 0o777 == 0o600
            with pytest.raises(urllib.error.HTTPError) as refused:
                nodes(local, "wrong")
            assert refused.value.code in (401, 403)
            cpus = {node["is_head_node"]: node["resources_total"].get("CPU", 0) for node in nodes(local, token)}
            assert cpus == {True: 0, False: 2}
            assert "holds a cluster already" in cluster("start", local.folder).stderr

            held = local.run("hold.py", "--workers", "2", "--", sys.executable, "-c", "raise SystemExit(5)")
            assert held.returncode == 5, held.stderr
            short = local.run("hold.py", "--workers", "3", "--timeout-s", "0", "--", sys.executable, "-c", "")
            assert short.returncode == 1 and "2 of 3 CPU" in short.stderr

            # A preemption's notice: Ray takes the node out itself, saying why.
            (worker,) = (node["node_id"] for node in nodes(local, token) if not node["is_head_node"])
            notice = ("drain", "--address", local.state["address"], "--node-id", worker)
            assert local.run("preemption.py", *notice).returncode == 0

            before = ours(local.state["mark"])
            assert any("raylet" in process.name() for process in before)
            stopped = cluster("stop", local.folder)
            assert stopped.returncode == 0 and "stopped 2 nodes" in stopped.stdout, stopped.stderr
            assert not ours(local.state["mark"])
            assert bystander.poll() is None
            assert not Path(local.state["temp_dir"]).exists()
            assert not {"token", "env.sh", "cluster.json"} & {path.name for path in local.folder.iterdir()}
            assert "nothing to stop" in cluster("stop", local.folder).stdout
        finally:
            bystander.kill()
