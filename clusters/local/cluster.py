"""A small multi-node Ray cluster on one machine: `python clusters/local/cluster.py start|add|stop [--folder FOLDER]`.

The head does no work; every worker is a Ray node of its own. The dashboard listens on loopback only; Ray's other ports
listen on every interface, as Ray has it, and all want the token. What was started is stopped by process id: another Ray
on the machine is left alone, which `ray stop` would not do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 10.0
OBJECT_STORE_BYTES = 200_000_000
# Ray's processes inherit it: so those whose parents died are found too.
MARK = "RAYGARD_LOCAL_CLUSTER"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    starting = commands.add_parser("start", help="start a head and workers, print how to use them")
    starting.add_argument("--workers", type=int, default=2, help="nodes beside the head")
    adding = commands.add_parser("add", help="add workers to what `start` started")
    adding.add_argument("--workers", type=int, default=1)
    for command in (starting, adding):
        command.add_argument("--cpus", type=int, default=1, help="of each worker")
    stopping = commands.add_parser("stop", help="stop exactly what `start` and `add` started")
    for command in (starting, adding, stopping):
        command.add_argument("--folder", type=Path, default=Path("runs/local-cluster"), help="state, token and logs")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if arguments.command == "stop":
        stop(folder)
    elif min(arguments.workers, arguments.cpus) < 1:
        sys.exit("a cluster needs at least one worker, with at least one CPU")
    elif arguments.command == "add":
        add(folder, arguments.workers, arguments.cpus)
    else:
        start(folder, arguments.workers, arguments.cpus)


def start(folder: Path, workers: int, cpus: int) -> None:
    """Start a head and `workers` nodes of `cpus` CPUs; write cluster.json, env.sh, token and logs to `folder`."""
    if (folder / "cluster.json").exists():
        sys.exit(f"{folder} holds a cluster already; stop it first: python {sys.argv[0]} stop --folder {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(folder / "token", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    gcs, dashboard, client = _free_ports(3)
    state: dict[str, Any] = {
        "mark": secrets.token_hex(8),
        # Ray's socket paths must stay under 108 bytes, which a run directory need not.
        "temp_dir": tempfile.mkdtemp(prefix="raygard-", dir="/tmp"),
        "address": f"{LOOPBACK}:{gcs}",
        "dashboard": f"http://{LOOPBACK}:{dashboard}",
        "processes": [],
    }
    try:
        _start_node(
            folder, state, "head", "--head", f"--port={gcs}", "--num-cpus=0", "--num-gpus=0",
            f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard}", "--include-dashboard=true",
            f"--ray-client-server-port={client}", f"--temp-dir={state['temp_dir']}",
        )  # fmt: skip
        _wait_for_nodes(folder, state, 1)
        _start_workers(folder, state, workers, cpus)
    except BaseException:
        stop(folder)
        raise
    exports = {**_variables(folder), "RAY_ADDRESS": state["dashboard"]}
    (folder / "env.sh").write_text("".join(f"export {name}='{value}'\n" for name, value in exports.items()))
    print(f"{workers} workers with {cpus} CPU each; dashboard {state['dashboard']}")
    print(f"use it:  source {folder}/env.sh\n         ray job submit --working-dir . -- python jobs/search.py ...")
    print(f"stop it: python {sys.argv[0]} stop --folder {folder}")


def add(folder: Path, workers: int, cpus: int) -> None:
    """Add `workers` nodes of `cpus` CPUs to the cluster of `folder`."""
    try:
        state = json.loads((folder / "cluster.json").read_text())
    except FileNotFoundError:
        sys.exit(f"{folder} holds no cluster; start one first")
    _start_workers(folder, state, workers, cpus)
    print(f"{workers} more workers with {cpus} CPU each")


def stop(folder: Path) -> None:
    """Stop exactly the processes that `start` and `add` recorded in `folder`, and their descendants, if any."""
    try:
        state = json.loads((folder / "cluster.json").read_text())
    except FileNotFoundError:
        print(f"{folder} holds no cluster; nothing to stop")
        return
    started = [process for pid, created in state["processes"] if (process := _process(pid, created))]
    ours = {*started, *_descendants(started), *_marked(state["mark"])}
    for process in ours:
        _signal(process, "terminate")
    _wait_until_gone(ours)
    # What was born meanwhile, and Ray's gcs_server, which may not heed the first signal.
    ours |= _marked(state["mark"])
    for process in ours:
        _signal(process, "kill")
    left = _wait_until_gone(ours)
    if left:
        sys.exit(f"still running: {', '.join(str(process.pid) for process in left)}")
    shutil.rmtree(state["temp_dir"], ignore_errors=True)
    for name in ("token", "env.sh", "cluster.json"):
        (folder / name).unlink(missing_ok=True)
    print(f"stopped {len(state['processes'])} nodes; logs of `ray start` are in {folder}")


def _variables(folder: Path) -> dict[str, str]:
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}


def _start_node(folder: Path, state: dict[str, Any], name: str, *options: str) -> None:
    bin_folder = str(Path(sys.executable).parent)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # A job says `python`: it must find the interpreter that raygard is installed for.
    path = f"{bin_folder}{os.pathsep}{os.environ.get('PATH', '')}"
    environment |= {**_variables(folder), MARK: state["mark"], "PATH": path}
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats",
        f"--object-store-memory={OBJECT_STORE_BYTES}", f"--dashboard-agent-listen-port={_free_ports(1)[0]}", *options,
    ]  # fmt: skip
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    state["processes"].append([process.pid, psutil.Process(process.pid).create_time()])
    (folder / "cluster.json").write_text(json.dumps(state, indent=1))


def _start_workers(folder: Path, state: dict[str, Any], workers: int, cpus: int) -> None:
    before, first = _alive_nodes(state["dashboard"], (folder / "token").read_text()), len(state["processes"])
    for number in range(first, first + workers):
        # A folder of its own, as on a machine of its own: nodes unpack a job's working directory there, and whoever
        # comes second would take it from under the first.
        own = f"--temp-dir={state['temp_dir']}/{number}"
        address = f"--address={state['address']}"
        _start_node(folder, state, f"worker-{number}", address, own, f"--num-cpus={cpus}", "--num-gpus=0")
    _wait_for_nodes(folder, state, before + workers, first)


def _wait_for_nodes(folder: Path, state: dict[str, Any], count: int, first: int = 0) -> None:
    token = (folder / "token").read_text()
    deadline = time.monotonic() + START_TIMEOUT_S
    while _alive_nodes(state["dashboard"], token) < count:
        for number, (pid, created) in enumerate(state["processes"][first:], first):
            if _process(pid, created) is None:
                log = folder / ("head.log" if number == 0 else f"worker-{number}.log")
                sys.exit(f"a node ended while it started; the end of {log}:\n{log.read_text()[-2000:]}")
        if time.monotonic() > deadline:
            sys.exit(f"{count} nodes were not up after {START_TIMEOUT_S:.0f} s; see the logs in {folder}")
        time.sleep(0.5)


def _alive_nodes(dashboard: str, token: str) -> int:
    """Nodes that the state API lists as alive; 0 while it does not answer."""
    query = f"{dashboard}/api/v0/nodes?filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"
    request = urllib.request.Request(query, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return len(json.load(answer)["data"]["result"]["result"])
    except (OSError, urllib.error.HTTPError, ValueError, KeyError, TypeError):
        return 0


def _free_ports(count: int) -> list[int]:
    listeners = [socket.socket() for _ in range(count)]
    try:
        for listener in listeners:
            listener.bind((LOOPBACK, 0))
        return [int(listener.getsockname()[1]) for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


def _process(pid: int, created: float) -> psutil.Process | None:
    """The recorded process, if it still lives: a process id alone may belong to another one by now."""
    try:
        process = psutil.Process(pid)
        return process if abs(process.create_time() - created) < 1.0 and _lives(process) else None
    except psutil.NoSuchProcess:
        return None


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _descendants(processes: Iterable[psutil.Process]) -> set[psutil.Process]:
    found: set[psutil.Process] = set()
    for process in processes:
        try:
            found |= set(process.children(recursive=True))
        except psutil.NoSuchProcess:
            continue
    return found


def _marked(mark: str) -> set[psutil.Process]:
    found = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.pid != os.getpid():
                found.add(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess, OSError):
            continue
    return found


def _signal(process: psutil.Process, name: str) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        getattr(process, name)()


def _wait_until_gone(processes: set[psutil.Process]) -> list[psutil.Process]:
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while (left := [process for process in processes if _lives(process)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


if __name__ == "__main__":
    main()
