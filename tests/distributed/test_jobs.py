"""`ray job submit` to a real head with token authentication: searches as jobs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from raygard.cluster.session import IDLE_WORKER_MS
from raygard.config_file import load_config
from raygard.mask import FreezeMask
from tests.faults.test_driver_killed import end_group
from tests.search_fixtures import SETTINGS, lend

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")


@dataclass(frozen=True)
class Head:
    address: str
    env: dict[str, str]
    token: str


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def status(url: str, token: str | None) -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.fixture(scope="module")
def head(searched, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """`ray start --head` in the foreground, with a home and a token of its own; begun when the search has ended."""
    home = tmp_path_factory.mktemp("home")
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # A job says `python`: it must find the interpreter that raygard is installed for.
    env |= {"HOME": str(home), "RAY_AUTH_MODE": "token", "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([str(RAY), "get-auth-token", "--generate"], env=env, check=True, capture_output=True, timeout=120)
    token = (home / ".ray" / "auth_token").read_text().strip()
    port, dashboard, client, agent = free_ports(4)
    command = [
        str(RAY), "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}",
        "--dashboard-host=127.0.0.1", f"--ray-client-server-port={client}", "--num-cpus=2",
        # The agent starts jobs; its usual port may be taken by another cluster of this machine.
        f"--dashboard-agent-listen-port={agent}", "--object-store-memory=200000000", "--disable-usage-stats",
        f'--system-config={{"idle_worker_killing_time_threshold_ms": {IDLE_WORKER_MS}}}',
    ]  # fmt: skip
    log = (home / "head.log").open("w")
    process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 180
        while status(f"{address}/api/jobs/", token) != 200:
            assert time.monotonic() < deadline and process.poll() is None, (home / "head.log").read_text()[-3000:]
            time.sleep(1)
        head = Head(address, env, token)
        # The agent that starts jobs is up a little later than the page that takes them.
        while "No available agent" in (probe := submit(head, "python", "-c", "pass", timeout=180)).stderr:
            assert time.monotonic() < deadline, probe.stderr[-2000:]
            time.sleep(1)
        yield head
    finally:
        if process.poll() is None:
            end_group(process)
        log.close()


def submit(head: Head, *entrypoint: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    command = [str(RAY), "job", "submit", "--address", head.address, "--working-dir", ".", "--", *entrypoint]
    return subprocess.run(command, cwd=ROOT, env=head.env, capture_output=True, text=True, timeout=timeout, check=False)


def test_the_jobs_api_is_closed_without_the_token(head) -> None:
    assert status(f"{head.address}/api/jobs/", None) in (401, 403)
    assert status(f"{head.address}/api/jobs/", "wrong") in (401, 403)


def test_two_domains_as_one_job_each_with_one_ranking_for_all_p(head, patterns, searched, tmp_path) -> None:
    files, out = [], tmp_path / "out"
    for name, illegal, legal in (("patterns", "stripes", "checks"), ("second", "checks", "stripes")):
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(f"domain: {{name: {name}, data: {patterns}, illegal: [{illegal}], legal: [{legal}]}}\n")
    configs = [part for file in files for part in ("--config", str(file))]
    shared = [text for text in SETTINGS if not text.startswith(("domain.name", "domain.illegal", "domain.legal="))]
    own = (
        "search.mode=one_ranking",
        "search.inner_steps=[2]",
        "search.controls=[]",
        "search.fidelities=[1.0]",
        "evaluation.defences=[none,freeze]",
    )
    # Users without a mask are the same in any role and need not be simulated again; what was relearned is not.
    for file in files:
        lend(searched[0], out / file.stem, load_config(file, [*shared, *own]))
    done = submit(head, "python", "jobs/search.py", *configs, "--out", str(out), "--quiet", *shared, *own, timeout=1300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "succeeded" in done.stdout
    table = (out / "domains.md").read_text()
    for name, relearn_runs in (("patterns", 0), ("second", 1)):
        search, choice = (json.loads((out / name / file).read_text()) for file in ("search.json", "choice.json"))
        assert search["relearn_runs"] == relearn_runs
        (trial,) = search["trials"]
        assert [entry["p"] for entry in trial["candidates"]] == [0.3, 0.7]
        assert all(entry["score"] is not None for entry in trial["candidates"])
        small, large = (FreezeMask.load(out / name / entry["mask"]) for entry in trial["candidates"])
        # Both are read off one ranking, so the smaller one lies within the larger.
        assert set(small.frozen_names) < set(large.frozen_names)
        assert f"{choice['outcome']['mitigation']:.3f}" in table and name in table and name in done.stdout
        assert str(out / name / "report.html") in done.stdout


def test_a_job_with_bad_input_fails_and_its_last_line_says_why(head, tmp_path) -> None:
    done = submit(head, "python", "jobs/search.py", "--out", str(tmp_path / "out"), "search.freeze_ratios=[7]")
    assert done.returncode != 0
    # Ray prints the end of a failed job's log once more.
    (line,) = {line for line in done.stdout.splitlines() if line.startswith("raygard: ")}
    assert "between 0 and 1, got 7" in line
    assert "Traceback" not in done.stdout
