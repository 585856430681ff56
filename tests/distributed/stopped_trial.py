"""Run by test_search.py: on a cluster of one CPU, really stop a trial while its workers learn.

stopped_trial.py DATA SEARCHED OUT      SEARCHED: a finished search that lends its relearned state and stored results

A second, newer cluster with a dashboard runs on the machine all the while; it knows nothing of the trial.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

sys.path.insert(0, str(Path(__file__).parents[2]))

import raygard.cluster.search as search
from raygard.cluster.session import ray_session
from raygard.config_file import load_config
from raygard.search_flow import SearchFlow
from tests.search_fixtures import SETTINGS, lend

stopped: list[str] = []


class TrialsEnded(Exception):
    """What comes after the trials is of no interest here."""


OTHER_CLUSTER = """
import sys, ray
ray.init(address="local", num_cpus=0, dashboard_host="127.0.0.1", include_dashboard=True, log_to_driver=False)
print("ready", flush=True)
sys.stdin.read()
ray.shutdown()
"""


@contextlib.contextmanager
def other_cluster() -> Iterator[None]:
    with subprocess.Popen(
        [sys.executable, "-c", OTHER_CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
        # Its end of file tells the other cluster to go.
        process.stdin.close()
        process.wait(60)


class StopFirst(FIFOScheduler):
    """Stops the first trial at its first report from learning."""

    def on_trial_result(self, tune_controller, trial, result) -> str:
        name = search.read_point(trial.config).trial_id
        if (not stopped or stopped == [name]) and "fidelity" not in result:
            stopped[:] = [name]
            return TrialScheduler.STOP
        return TrialScheduler.CONTINUE


def end_here(*arguments: object) -> None:
    raise TrialsEnded


def main() -> None:
    data, searched, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    config = load_config(
        None, [*SETTINGS, f"domain.data={data}", "search.inner_steps=[2]", "bilevel.publisher_steps=6"]
    )
    search._scheduler = lambda config: StopFirst()
    SearchFlow._controls = end_here
    with ray_session(local_cpus=1, state_api=True), other_cluster():
        with contextlib.suppress(TrialsEnded):
            flow = SearchFlow(config, out)
            lend(searched, out, config)
            flow.run()
        deadline = time.monotonic() + 60
        while ray.available_resources().get("CPU", 0.0) < 1 and time.monotonic() < deadline:
            time.sleep(0.5)
        free = ray.available_resources().get("CPU", 0.0)
    records = {path.parent.name: json.loads(path.read_text()) for path in out.glob("trials/*/trial.json")}
    (following,) = set(records) - set(stopped)
    facts = {
        "stopped": stopped[0],
        "next": following,
        "stopped_while": "learning" if not records[stopped[0]]["candidates"] else "adapting",
        "statuses": {name: record["status"] for name, record in records.items()},
        "free_cpus_at_the_end": free,
        "relearn_runs": flow.flow.relearn_runs,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
