"""`raygard submit` and `raygard doctor` on a head and two workers that want a token: green, then red on one line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.distributed.test_local_cluster import CLUSTERS, Local, nodes

pytestmark = pytest.mark.distributed

ROOT = CLUSTERS.parent
# Several examinations by one driver: what is red, and what each line says.
EXAMINATIONS = """
import json, sys
from pathlib import Path
from raygard.cluster.doctor.checks import judge
from raygard.cluster.doctor.facts import collect
from raygard.cluster.session import ray_session
from raygard.config_file import load_config

own, elsewhere, faked = sys.argv[1:]
config = load_config(None)
with ray_session():
    def red(config, out):
        return [[check.name, check.text] for check in judge(config, collect(config, out, "here")) if not check.ok]

    print(json.dumps({"none": red(config, own)}))
    print(json.dumps({"cpus": red(load_config(None, ["engine.num_workers=4"]), own)}))
    print(json.dumps({"unshared": red(config, elsewhere)}))
    found = Path(faked, "ray-2.59.0.dist-info")
    found.mkdir()
    (found / "METADATA").write_text("Metadata-Version: 2.1\\nName: ray\\nVersion: 2.59.0\\n")
    print(json.dumps({"version": red(config, own)}))
"""


@dataclass(frozen=True)
class Two:
    """A cluster of which one worker has another current folder and another folder on its Python path."""

    folder: Path
    state: dict
    env: dict[str, str]
    faked: Path

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command], cwd=self.folder, env={**self.env, **env}, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    root = tmp_path_factory.mktemp("two")
    one, other, faked = (root / name for name in ("one", "other", "faked"))
    for folder in (one, other, faked):
        folder.mkdir()
    script = [sys.executable, str(CLUSTERS / "local" / "cluster.py")]
    where = ("--folder", str(root / "cluster"))
    try:
        options = ("--workers", "1", "--cpus", "1")
        started = subprocess.run(
            [*script, "start", *where, *options], cwd=one, capture_output=True, text=True, timeout=240
        )
        assert started.returncode == 0, started.stdout + started.stderr
        exports = dict(re.findall(r"^export (\w+)='(.*)'$", (root / "cluster" / "env.sh").read_text(), re.MULTILINE))
        state = json.loads((root / "cluster" / "cluster.json").read_text())
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        env |= {**exports, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        path = os.pathsep.join(filter(None, [str(faked), env.get("PYTHONPATH")]))
        ray = str(Path(sys.executable).with_name("ray"))
        # `stop` finds this node by its mark, as it finds its own.
        mark = {"RAYGARD_LOCAL_CLUSTER": state["mark"], "PYTHONPATH": path}
        command = [
            ray, "start", "--block", "--disable-usage-stats", f"--address={state['address']}", "--num-cpus=1",
            "--num-gpus=0", "--object-store-memory=100000000", f"--temp-dir={state['temp_dir']}/other",
        ]  # fmt: skip
        with (root / "other.log").open("w") as log:
            other_node = subprocess.Popen(
                command, cwd=other, env={**env, **mark}, stdout=log, stderr=log, start_new_session=True
            )
        token = (root / "cluster" / "token").read_text()
        deadline = time.monotonic() + 180
        while len([n for n in nodes(Local(root / "cluster", state, {}), token) if n["state"] == "ALIVE"]) < 3:
            assert time.monotonic() < deadline and other_node.poll() is None, (root / "other.log").read_text()[-2000:]
            time.sleep(0.5)
        yield Two(one, state, env, faked)
    finally:
        subprocess.run([*script, "stop", *where], capture_output=True, timeout=120, check=False)


def test_submit_hands_on_log_exit_code_and_mlflow_run_and_wants_the_token(two: Two, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    run = "http://mlflow:5000/#/experiments/1/runs/abc"
    (work / "job.py").write_text(
        f"import os, sys\nprint('INFO MLflow run {run}')\nprint(sorted(os.listdir('.')), sys.argv[1:], flush=True)\n"
        "print('the reason', file=sys.stderr)\nsys.exit(5)\n"
    )
    (work / "weights.bin").write_bytes(b"x" * 1000)
    (work / ".rayignore").write_text("*.bin\n")
    command = ("-m", "raygard.cli", "submit", "--working-dir", str(work), "--", "python", "job.py", "--out", "a b")
    done = two.run(*command)
    assert done.returncode == 5, done.stdout + done.stderr
    assert "['.rayignore', 'job.py'] ['--out', 'a b']" in done.stdout
    assert done.stdout.rstrip().endswith("the reason")
    assert done.stderr.rstrip().endswith(f"MLflow run  {run}") and "Traceback" not in done.stderr

    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    for token in (str(wrong), str(tmp_path / "none")):
        refused = two.run(*command, RAY_AUTH_TOKEN_PATH=token)
        assert refused.returncode == 2 and "the reason" not in refused.stdout
        assert len(refused.stderr.splitlines()) == 1 and "refuses the token" in refused.stderr, refused.stderr


def test_ctrl_c_leaves_the_job_running(two: Two, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(600)\n")
    command = [sys.executable, "-m", "raygard.cli", "submit", "--working-dir", str(tmp_path), "--", "python", "job.py"]
    process = subprocess.Popen(
        command, cwd=two.folder, env=two.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Tests that a shell has put into the background ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "begun":
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    (job,) = re.findall(r"ray job stop (\w+)", err)
    assert f"ray job logs --follow {job}" in err
    mine = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[-1:] == ["job.py"]]
    assert any("raygard.cli" not in p.info["cmdline"] for p in mine)


def test_doctor_is_green_and_then_red_on_exactly_the_line_at_fault(two: Two, tmp_path: Path) -> None:
    # From outside, through the dashboard: a job looks around.
    green = two.run("-m", "raygard.cli", "doctor", "--out", str(tmp_path / "run"))
    lines = green.stdout.splitlines()
    assert green.returncode == 0 and len(lines) == 9, green.stdout + green.stderr
    assert all(line.startswith("green") for line in lines) and "3 nodes" in lines[0]

    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    refused = two.run("-m", "raygard.cli", "doctor", "--json", RAY_AUTH_TOKEN_PATH=str(wrong))
    (check,) = json.loads(refused.stdout)["checks"]
    assert refused.returncode == 4 and check["name"] == "cluster" and "token" in check["text"] and check["mend"]

    # The same path on every node, and two different folders behind it.
    unshared = "/proc/self/cwd/run"
    found = two.run("-c", EXAMINATIONS, str(tmp_path), unshared, str(two.faked), RAY_ADDRESS=two.state["address"])
    assert found.returncode == 0, found.stderr[-3000:]
    red = {name: lines for line in found.stdout.splitlines() for name, lines in json.loads(line).items()}
    assert red.pop("none") == []
    assert {name: [check for check, _ in lines] for name, lines in red.items()} == {
        "cpus": ["resources"], "unshared": ["storage"], "version": ["versions"],
    }  # fmt: skip
    assert "4 workers x 1 CPU = 4 CPU, but the cluster has 2" in red["cpus"][0][1]
    assert "is not shared" in red["unshared"][0][1] and "does not see" in red["unshared"][0][1]
    assert red["version"][0][1].startswith("ray 2.59.0 on ") and red["version"][0][1].count(" on ") == 1
    left = [path.name for folder in (tmp_path, two.folder, two.folder.parent / "other") for path in folder.iterdir()]
    assert not [name for name in left if name.startswith(".raygard-doctor")]
