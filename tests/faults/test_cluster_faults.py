"""Nodes, the head and a worker in the middle of slow writing are really lost, on a cluster of several nodes."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.faults.learn_run import LEFT
from tests.faults.nodes import ROOT, Nodes, Watch, last_step, wait_for
from tests.ray_fixtures import Setting

pytestmark = pytest.mark.faults

CHECKPOINTING_STEPS = 2
RUN_TIMEOUT_S = 400
# Seconds after which Ray Train asks anew whether its workers have room; it may not know of the lost node at first.
ASK_AGAIN_S = "20"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    started = Nodes.start(tmp_path_factory.mktemp("nodes") / "cluster", workers=3)
    yield started
    started.stop()


def logits_of(out: Path) -> torch.Tensor:
    return load_file(out / "logits.safetensors")["logits"]


def kill_a_host(nodes: Nodes) -> None:
    nodes.hosts()[-1].send_signal(signal.SIGKILL)


def ended(process: subprocess.Popen[str]) -> str:
    """What a run printed until its end; one that does not end is killed, which its exit code shows."""
    try:
        return process.communicate(timeout=RUN_TIMEOUT_S)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0]


def ends_well(process: subprocess.Popen[str], nodes: Nodes, out: Path) -> str:
    """Wait for a run, which must leave nothing behind in the cluster and on the disk; what it printed."""
    output = ended(process)
    assert process.returncode == 0, output[-4000:]
    assert json.loads((out / LEFT).read_text(encoding="utf-8")) == []
    assert {path.name for path in out.iterdir()} == {"history.jsonl", "logits.safetensors", LEFT}
    for name in ("RayTrainWorker", "TrainController"):
        wait_for(lambda name=name: not nodes.processes(name), 30, f"no {name} is left")
    return output


def test_with_a_spare_node_the_run_goes_on_by_itself_to_the_same_logits(
    nodes, material: Setting, undisturbed, tmp_path, report_fault
) -> None:
    nodes.have(3)
    watch = Watch(tmp_path / "history.jsonl", 5, lambda: kill_a_host(nodes))
    ends_well(nodes.drive(material.root, tmp_path), nodes, tmp_path)
    watch.end()
    assert torch.equal(logits_of(tmp_path), undisturbed[0])
    assert (tmp_path / "history.jsonl").read_text() == undisturbed[1]
    assert len(nodes.raylets()) == 1 + 2
    assert watch.repeated <= CHECKPOINTING_STEPS
    report_fault("node killed, with a spare", f"{watch.repeated} publisher steps", watch.recovered_s)


def test_an_elastic_run_goes_on_with_the_node_that_remains(
    nodes, material: Setting, undisturbed, tmp_path, report_fault
) -> None:
    nodes.have(2)
    watch = Watch(tmp_path / "history.jsonl", 5, lambda: kill_a_host(nodes))
    output = ends_well(
        nodes.drive(
            material.root, tmp_path, "engine.min_workers=1", RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=ASK_AGAIN_S
        ),
        nodes,
        tmp_path,
    )
    watch.end()
    assert output.count("was written by 2 workers and goes on with 1") == 1
    assert watch.repeated <= CHECKPOINTING_STEPS
    torch.testing.assert_close(logits_of(tmp_path), undisturbed[0], rtol=0, atol=1e-4)
    report_fault("node killed, elastic (1:2)", f"{watch.repeated} publisher steps", watch.recovered_s)


def test_a_notice_of_preemption_writes_a_checkpoint_before_the_node_goes(
    nodes, material: Setting, undisturbed, tmp_path, report_fault
) -> None:
    nodes.have(3)
    notice_s, interval = 10, 100
    history = tmp_path / "history.jsonl"

    def drain() -> None:
        victim = nodes.hosts()[-1]
        node_id = next(part.split("=", 1)[1] for part in victim.cmdline() if part.startswith("--node_id="))
        script = [sys.executable, str(ROOT / "clusters" / "preemption.py"), "drain", "--seconds", str(notice_s)]
        subprocess.run(
            [*script, "--address", nodes.state["address"], "--node-id", node_id], env=nodes.env, check=True, timeout=60
        )
        deadline = time.monotonic() + notice_s
        wait_for(lambda: list(tmp_path.glob("ray/train/checkpoint_*/manifest-00001.json")), notice_s, "a checkpoint")
        time.sleep(max(0.0, deadline - time.monotonic()))
        # The cloud takes the machine, unless Ray has ended a node that was drained until now.
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()

    watch = Watch(history, 0, drain)
    process = nodes.drive(
        material.root, tmp_path, f"engine.checkpointing_steps={interval}", "engine.max_failures=0",
        RAYGARD_TEST_STEP_S="1.5", RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="1",
    )  # fmt: skip
    output = ends_well(process, nodes, tmp_path)
    watch.end()
    assert "are about to lose their node; writing a checkpoint now" in output
    assert torch.equal(logits_of(tmp_path), undisturbed[0])
    assert (tmp_path / "history.jsonl").read_text() == undisturbed[1]
    # Without the notice everything would have been repeated: no other checkpoint was due.
    assert watch.repeated <= watch.furthest
    report_fault(
        f"preemption, {notice_s} s notice", f"{watch.repeated} publisher steps (done within it)", watch.recovered_s
    )


def test_storage_is_slow_and_a_worker_dies_while_it_writes_and_nothing_torn_is_used(
    nodes, material: Setting, undisturbed, tmp_path, report_fault
) -> None:
    nodes.have(2)
    halves: list[Path] = []

    def strike() -> None:
        wait_for(lambda: list(tmp_path.glob("ray/train/checkpoint_00000010_*/state-*")), 30, "a checkpoint's files")
        nodes.processes("RayTrainWorker")[-1].kill()
        (half,) = tmp_path.glob("ray/train/checkpoint_00000010_*")
        halves.append(half)
        assert not list(half.glob("manifest-*"))

    watch = Watch(tmp_path / "history.jsonl", 9, strike)
    process = nodes.drive(material.root, tmp_path, "engine.checkpointing_steps=5", RAYGARD_TEST_FILE_S="0.7")
    wait_for(lambda: halves and not halves[0].exists(), 200, "the half checkpoint is removed")
    ends_well(process, nodes, tmp_path)
    watch.end()
    assert torch.equal(logits_of(tmp_path), undisturbed[0])
    assert (tmp_path / "history.jsonl").read_text() == undisturbed[1]
    assert watch.repeated == 5
    report_fault("slow storage, worker killed while it writes", "5 publisher steps", watch.recovered_s)


def test_without_a_spare_one_line_in_bounded_time_and_with_a_new_node_the_same_command_goes_on(
    nodes, material: Setting, undisturbed, tmp_path, report_fault
) -> None:
    nodes.have(2)
    history = tmp_path / "history.jsonl"
    watch = Watch(history, 5, lambda: kill_a_host(nodes))
    process = nodes.drive(material.root, tmp_path, "engine.node_timeout_s=4")
    output = ended(process)
    watch.end()
    bounded_s = time.monotonic() - watch.struck_at
    (said,) = [line for line in output.splitlines() if line.startswith("learn_run: ")] or [output]
    assert process.returncode == 1 and "nodes were lost and none came for 4 s" in said
    assert "2 workers x 1 CPU = 2 CPU, but the cluster has 1" in said and "--workers 1:N" in said
    assert bounded_s < 120
    report_fault("node killed, no spare: one line", "the run ends", bounded_s)

    before = last_step(history)
    nodes.have(2)
    started = time.monotonic()
    again = Watch(history, 0, lambda: None)
    ends_well(nodes.drive(material.root, tmp_path), nodes, tmp_path)
    again.end()
    assert torch.equal(logits_of(tmp_path), undisturbed[0])
    assert history.read_text() == undisturbed[1]
    assert again.repeated <= CHECKPOINTING_STEPS + 1 and again.furthest >= before
    seconds = again.struck_at - started + again.recovered_s
    report_fault("... a node added, same command", f"{again.repeated} publisher steps", seconds)


def test_head_is_lost_and_the_same_command_goes_on_on_a_new_one(
    nodes, material: Setting, undisturbed, tmp_path, report_fault
) -> None:
    nodes.have(2)
    history = tmp_path / "history.jsonl"

    def kill_the_head() -> None:
        head = psutil.Process(nodes.state["processes"][0][0])
        for process in [head, *head.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    first = Watch(history, 5, kill_the_head)
    # Its driver would wait a minute for the head to come back.
    process = nodes.drive(material.root, tmp_path, RAY_gcs_rpc_server_reconnect_timeout_s="10")
    # The driver's own node is gone with the head: it ends by itself, never waits for ever.
    ended(process)
    first.end()
    assert process.returncode not in (0, -signal.SIGKILL)
    before = last_step(history)
    nodes.stop()
    assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / "logits.safetensors").exists()

    restarted = Nodes.start(nodes.folder, workers=2)
    started = time.monotonic()
    second = Watch(history, 0, lambda: None)
    ends_well(restarted.drive(material.root, tmp_path), restarted, tmp_path)
    second.end()
    assert torch.equal(logits_of(tmp_path), undisturbed[0])
    assert history.read_text() == undisturbed[1]
    assert second.repeated <= CHECKPOINTING_STEPS + 1 and second.furthest >= before
    seconds = second.struck_at - started + second.recovered_s
    report_fault("head lost, same command again", f"{second.repeated} publisher steps", seconds)
