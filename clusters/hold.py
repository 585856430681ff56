"""Hold autoscaled nodes while a command runs: `hold.py --workers 4 --gpus 1 -- python jobs/search.py ...`.

raygard refuses at once what a cluster can never place, so a cluster that has scaled to nothing would be refused,
although it could grow. This asks the autoscaler for the workers, waits for them, runs the command, gives them back, and
ends with the command's exit code. Without a command it gives back what an earlier, killed call still holds.
"""

from __future__ import annotations

import argparse
import logging
import signal
import subprocess
import sys
import time
from typing import NoReturn

import ray
from ray.autoscaler.sdk import request_resources

POLL_S = 5.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="equal bundles of CPUs and GPUs")
    parser.add_argument("--cpus", type=float, default=1.0, help="of each")
    parser.add_argument("--gpus", type=float, default=0.0, help="of each")
    parser.add_argument("--timeout-s", type=float, default=1800.0, help="how long to wait for the nodes")
    parser.add_argument("command", nargs="*")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _leave)
    try:
        if not arguments.command:
            return 0
        needed = {"CPU": arguments.workers * arguments.cpus, "GPU": arguments.workers * arguments.gpus}
        bundle = {name: amount / arguments.workers for name, amount in needed.items() if amount}
        _request([bundle] * arguments.workers)
        short = _wait(needed, arguments.timeout_s)
        if short:
            print(f"hold: after {arguments.timeout_s:g} s the cluster has {short}", file=sys.stderr)
            return 1
        child = subprocess.Popen(arguments.command)
        try:
            return child.wait()
        finally:
            child.terminate()
            child.wait()
    finally:
        _request([])


def _leave(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def _request(bundles: list[dict[str, float]]) -> None:
    # Connected only while asking: the command is a driver of its own.
    with ray.init(log_to_driver=False, logging_level=logging.ERROR):
        request_resources(bundles=bundles)


def _wait(needed: dict[str, float], timeout_s: float) -> str:
    """Empty once the cluster has what is needed, else what it has instead, when the time is over."""
    deadline = time.monotonic() + timeout_s
    with ray.init(log_to_driver=False, logging_level=logging.ERROR):
        while True:
            have = ray.cluster_resources()
            short = [
                f"{have.get(name, 0):g} of {need:g} {name}" for name, need in needed.items() if have.get(name, 0) < need
            ]
            if not short or time.monotonic() > deadline:
                return ", ".join(short)
            time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main())
