"""The scripts of clusters/ against stand-ins: a metadata service, `ray`, Slurm."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

CLUSTERS = Path(__file__).resolve().parents[2] / "clusters"


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(0o755)


class Metadata(BaseHTTPRequestHandler):
    """AWS (IMDSv2) and Google Cloud: no notice until `noticed` is set."""

    noticed = False
    asked = 0

    def do_PUT(self) -> None:
        wanted = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer(200 if wanted else 400, "session")

    def do_GET(self) -> None:
        type(self).asked += 1
        if self.path == "/computeMetadata/v1/instance/preempted":
            self._answer(
                200 if self.headers["Metadata-Flavor"] == "Google" else 403, "TRUE" if self.noticed else "FALSE"
            )
        elif self.path == "/latest/meta-data/spot/instance-action":
            known = self.headers["X-aws-ec2-metadata-token"] == "session"
            self._answer((200 if self.noticed else 404) if known else 401, '{"action": "terminate"}')
        else:
            self._answer(400, "")

    def _answer(self, code: int, body: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[str]:
    Metadata.noticed, Metadata.asked = False, 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("cloud", "seconds"), [("aws", 120), ("gcp", 30)])
def test_a_node_is_drained_at_its_notice_and_not_before(
    cloud: str, seconds: int, metadata: str, tmp_path: Path
) -> None:
    executable(tmp_path / "bin" / "ray", f'printf "%s\\n" "$RAY_ADDRESS" "$@" > {tmp_path}/calls\nexit 7\n')
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, str(CLUSTERS / "preemption.py"), "watch", cloud, "--metadata", metadata]
    process = subprocess.Popen([*command, "--poll-s", "0.05", "--address", "10.0.0.1:6379"], env=environment)
    try:
        deadline = time.monotonic() + 60
        while Metadata.asked < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert Metadata.asked >= 3 and process.poll() is None and not (tmp_path / "calls").exists()
        Metadata.noticed = True
        assert process.wait(timeout=60) == 7
    finally:
        process.kill()
        process.wait()
    address, name, *options = (tmp_path / "calls").read_text().splitlines()
    assert (address, name) == ("10.0.0.1:6379", "drain-node")
    assert "--reason=DRAIN_NODE_REASON_PREEMPTION" in options
    assert f"--deadline-remaining-seconds={seconds}" in options
    assert not any(option.startswith("--node-id") for option in options)


def test_a_silent_metadata_service_is_no_notice() -> None:
    namespace: dict[str, object] = {"__name__": "preemption"}
    exec((CLUSTERS / "preemption.py").read_text(), namespace)
    assert namespace["noticed"]("aws", "http://127.0.0.1:1") is False  # type: ignore[operator]
    assert namespace["noticed"]("gcp", "http://127.0.0.1:1") is False  # type: ignore[operator]


# Slurm: `srun` runs what follows its options here and now; `ray start` stays until it is told to end.
SRUN = 'while [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
# Its line comes last: once the search has seen the lines of all nodes it ends, and the token is removed.
RAY = """[[ $1 != start ]] || stat -c %a "$RAY_AUTH_TOKEN_PATH" >> "$CALLS"
printf '%s\\n' "$*" >> "$CALLS"
[[ $1 != start ]] || exec sleep 300
"""
PYTHON = """if [[ $1 == -c ]]; then exec {python} "$@"; fi
printf 'python %s\\n' "$*" >> "$CALLS"
[[ -z ${{SEARCH_LASTS:-}} ]] || exec sleep "$SEARCH_LASTS"
# The real one waits for its workers.
for _ in $(seq 300); do (($(grep -c '^start --block' "$CALLS") < 4)) || break; sleep 0.1; done
exit 3
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    fakes = tmp_path / "venv" / "bin"
    (tmp_path / "venv").mkdir()
    executable(fakes / "srun", SRUN)
    executable(fakes / "ray", RAY)
    executable(fakes / "python", PYTHON.format(python=sys.executable))
    executable(fakes / "hostname", "echo fe80::1 10.1.2.3\n")
    requeue = 'if [[ $1 == requeue ]]; then echo "requeue $2" >> "$CALLS"; else printf "n1\\nn2\\nn3\\n"; fi\n'
    executable(fakes / "scontrol", requeue)
    return {
        **os.environ,
        "CALLS": str(tmp_path / "calls"),
        "RAYGARD_VENV": str(tmp_path / "venv"),
        "RAYGARD_SHARED": str(tmp_path / "shared"),
        "SLURM_SUBMIT_DIR": str(CLUSTERS.parent),
        "SLURM_JOB_ID": "40123",
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_GPUS_PER_NODE": "h200:8",
    }


def left(group: int) -> list[str]:
    """What still runs of a process group, after a moment for what is just ending."""
    deadline = time.monotonic() + 10
    while True:
        found = []
        for process in psutil.process_iter():
            try:
                if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def test_the_slurm_job_starts_a_head_and_a_worker_on_each_node_and_leaves_nothing(slurm, tmp_path) -> None:
    script = ["bash", str(CLUSTERS / "slurm" / "search.sbatch"), "--config", "c.yaml", "--out", "/shared/a b"]
    process = subprocess.Popen(script, env=slurm, start_new_session=True)
    assert process.wait(timeout=60) == 3, "the job ends with the exit code of the search"
    calls = (tmp_path / "calls").read_text().splitlines()
    starts = [call for call in calls if call.startswith("start ")]
    (head,) = (call for call in starts if "--head" in call)
    assert "--num-cpus=0" in head and "--dashboard-host=127.0.0.1" in head and "--port=20123" in head
    assert "--node-ip-address=10.1.2.3" in head
    assert len([call for call in starts if "--address=10.1.2.3:20123" in call]) == 3
    assert calls.count("600") == 4, "only its owner reads the token"
    (search,) = (call for call in calls if call.startswith("python "))
    assert "--workers 3 --cpus 1 --gpus 8" in search
    assert search.endswith("-- python jobs/search.py --config c.yaml --out /shared/a b")
    assert not list((tmp_path / "shared").iterdir()), "the token is gone"
    assert not left(process.pid), "nothing runs any more"


def test_the_slurm_job_requeues_itself_when_it_is_told_to_end(slurm, tmp_path) -> None:
    script = ["bash", str(CLUSTERS / "slurm" / "search.sbatch"), "--config", "c.yaml"]
    process = subprocess.Popen(script, env={**slurm, "SEARCH_LASTS": "300"}, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        calls = tmp_path / "calls"
        while not (calls.exists() and "python clusters/hold.py" in calls.read_text()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.terminate()
        assert process.wait(timeout=60) == 143
    finally:
        process.kill()
        process.wait()
    assert "requeue 40123" in calls.read_text().splitlines()
    assert not left(process.pid)
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o700
    assert not list((tmp_path / "shared").iterdir())
