"""`raygard doctor`: on this cluster, on one that is only reached through its dashboard, and before a long job."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from raygard.cluster.address import TOKEN_HELP
from raygard.cluster.doctor.checks import Check, NodeFacts, all_green, check_data, check_model, judge
from raygard.cluster.doctor.facts import collect
from raygard.cluster.doctor.node import list_data, list_model
from raygard.cluster.session import environment, ray_session
from raygard.cluster.submit import follow, jobs_client, submit
from raygard.config import RunConfig, public
from raygard.errors import RaygardError, UnfitClusterError

CONFIG_FILE = "doctor.yaml"

log = logging.getLogger("raygard")


def examine(config: RunConfig, out: str | Path, address: str | None) -> list[Check]:
    """Check the cluster whose head is at `address` (HOST:PORT), or for None a private one on this machine.

    out: where the run directory would lie. A cluster that cannot be reached, or does not let us in, is one red check.
    """
    try:
        with environment({"RAY_ADDRESS": address} if address else {}), ray_session():
            return judge(config, collect(config, out, address or ""))
    except RaygardError as error:
        return [_unreachable(error)]


def examine_from_outside(config: RunConfig, out: str | Path, address: str) -> list[Check]:
    """As `examine`, for a cluster reached through its dashboard (http): a job in it looks around.

    Raises RaygardError if that job did not come to an end.
    """
    log: list[str] = []
    try:
        with jobs_client(address) as client, tempfile.TemporaryDirectory(prefix="raygard-") as folder:
            if _takes_anyone(address):
                mend = "start its nodes with RAY_AUTH_MODE=token: whoever reaches it can run code on it"
                return [Check("cluster", False, f"the cluster at {address} takes jobs without a token", mend)]
            content = yaml.safe_dump(public(config).model_dump(mode="json"), sort_keys=False)
            (Path(folder) / CONFIG_FILE).write_text(content, encoding="utf-8")
            command = ["python", "-m", "raygard.cli", "doctor", "--config", CONFIG_FILE, "--out", str(out), "--json"]
            job_id = submit(client, command, Path(folder))
            ended = follow(client, job_id, log.append)
    except RaygardError as error:
        return [_unreachable(error)]
    if ended.detached:
        raise KeyboardInterrupt
    checks = read_checks("".join(log))
    if checks is None:
        last = next((line for line in reversed("".join(log).splitlines()) if line.strip()), ended.reason or "no output")
        raise RaygardError(f"the job that looks around in the cluster at {address} failed (ray job {job_id}): {last}")
    # `raygard submit` uploads them with the working directory, which the job that looked around had none of.
    data, model = config.domain.data, config.model.pretrained_model_name_or_path
    here: dict[str, Check] = {}
    if _uploaded(data):
        here["data"] = check_data(data, list_data(data))
    if _uploaded(model):
        here["model"] = check_model(model, [NodeFacts("", "here", model=list_model(model, config.model.revision))])
    return [here.get(check.name, check) for check in checks]


def _uploaded(name: str) -> bool:
    return Path(name).is_dir() and not Path(name).is_absolute()


def require_fit(config: RunConfig, out: str | Path, *stages: str) -> None:
    """Before a long job on a cluster that RAY_ADDRESS names: raise UnfitClusterError with the red lines that end it.

    Other red lines are logged as warnings. stages: what the job does, of `checks.STAGES`. The process must be
    connected. Does nothing on a private cluster, which has only the machine it runs on, or without
    `engine.check_cluster`.
    """
    # RAY_API_SERVER_ADDRESS is where jobs are submitted to; a driver joins the cluster of RAY_ADDRESS alone.
    address = os.environ.get("RAY_ADDRESS")
    if not address or not config.engine.check_cluster:
        return
    red = [check for check in judge(config, collect(config, out, address), stages) if not check.ok]
    fatal = " | ".join(_red(check) for check in red if check.fatal)
    for check in red:
        if not check.fatal:
            log.warning("raygard doctor: %s", _red(check))
    if fatal:
        raise UnfitClusterError(f"this cluster cannot run the job (raygard doctor): {fatal}")


def report_json(checks: Sequence[Check]) -> dict[str, Any]:
    """What `raygard doctor --json` prints."""
    return {"ok": all_green(checks), "checks": [check.to_json() for check in checks]}


def read_checks(text: str) -> list[Check] | None:
    """The checks in the last line of a log that is the output of `raygard doctor --json`; None if there is none."""
    for line in reversed(text.splitlines()):
        try:
            content = json.loads(line)
            return [Check(**entry) for entry in content["checks"]]
        except (ValueError, TypeError, KeyError):
            continue
    return None


def _red(check: Check) -> str:
    return check.line().removeprefix("RED").strip()


def _unreachable(error: RaygardError) -> Check:
    text, _, mend = str(error).partition("; ")
    return Check("cluster", False, text, mend or TOKEN_HELP)


def _takes_anyone(address: str) -> bool:
    """Whether the dashboard lists jobs to a caller without a token."""
    request = urllib.request.Request(f"{address.rstrip('/')}/api/jobs/")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return bool(answer.status == 200)
    except urllib.error.URLError:
        return False
