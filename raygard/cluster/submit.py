"""Submitting a job to a cluster from outside: upload, follow the log, hand on the exit code (Ray's Jobs API)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raygard.cluster.address import cluster_address, refused_token, require_answer
from raygard.cluster.package import MIB, require_uploadable
from raygard.cluster.session import environment
from raygard.errors import ExitCode, RaygardError
from raygard.redaction import holds_secret

RETRY_S = 2.0
# A dashboard that is restarted, or a tunnel that is opened again, is back sooner; the job does not notice either.
OUTAGE_S = 300.0
# A connection that was cut without a word looks like a job that prints nothing; the log is sent from its beginning
# when it is taken up again.
SILENCE_S = 300.0
# The agent that starts jobs comes up later than the dashboard that takes them, on a busy machine by a minute.
AGENT_S, NO_AGENT = 120.0, "No available agent"
# What Ray's client says where a head that was restarted has forgotten its jobs.
UNKNOWN_JOB = "status code 404"
# `Flow` logs this line when its MLflow run exists.
MLFLOW_LINE = re.compile(r"^INFO MLflow run (\S.*?)\s*$", re.MULTILINE)

log = logging.getLogger("raygard")


@dataclass
class Followed:
    """A job as far as its log was seen: the MLflow runs it named, in order, and the exit code once it has ended.

    detached: the user stopped following (Ctrl-C); the job goes on. reason: Ray's words if the job never ran.
    """

    job_id: str
    mlflow_runs: list[str] = field(default_factory=list)
    exit_code: int = ExitCode.DEFECT
    detached: bool = False
    reason: str | None = None


@contextlib.contextmanager
def jobs_client(address: str | None) -> Iterator[Any]:
    """Ray's JobSubmissionClient for the cluster that `address`, or else the environment, names.

    Raises RaygardError, in one line, if none is named, nothing answers there, or the token is missing or refused; also
    when any of that happens to a call within the block.
    """
    from ray.exceptions import AuthenticationError, RayError

    named = cluster_address(address)
    if named is None:
        raise RaygardError("no cluster is named; give --address http://HOST:8265 or set RAY_ADDRESS")
    require_answer(named)
    # Ray lets its environment variables win over what is given to the client.
    with environment({"RAY_API_SERVER_ADDRESS": named}):
        from ray.job_submission import JobSubmissionClient

        # Ray tells every ignore file it reads, several times.
        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.WARNING)
        try:
            yield JobSubmissionClient()
        except AuthenticationError:
            raise refused_token(named) from None
        except (RayError, RuntimeError, OSError) as error:
            raise RaygardError(f"the cluster at {named} does not take the job: {_first_line(error)}") from None


def submit(
    client: Any,
    command: Sequence[str],
    working_dir: Path,
    *,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
) -> str:
    """Upload the working directory and start `command` in it on the cluster; return the job's id.

    num_cpus, num_gpus: reserved for the command's own process, beside what it starts.
    Raises RaygardError if the directory is missing or larger than Ray takes, and if the command holds a secret: Ray
    shows it to everyone who sees the dashboard.
    """
    for number, argument in enumerate(command, start=1):
        before = command[number - 2] if number > 1 else ""
        follows = before.startswith("-") and not argument.startswith("-") and holds_secret(f"{before}={argument}")
        if follows or holds_secret(argument):
            raise RaygardError(
                f"word {number} of the command holds a password or token, which the dashboard would show to everyone; "
                "leave it out and set it in the environment of the cluster's nodes (MLFLOW_TRACKING_USERNAME, "
                "MLFLOW_TRACKING_PASSWORD, HF_TOKEN)"
            )
    package = require_uploadable(working_dir)
    log.info("uploading %d files, %.1f MiB", package.num_files, package.size_bytes / MIB)
    deadline = time.monotonic() + AGENT_S
    while True:
        try:
            return str(
                client.submit_job(
                    entrypoint=shlex.join(command),
                    runtime_env={"working_dir": str(working_dir.resolve())},
                    entrypoint_num_cpus=num_cpus,
                    entrypoint_num_gpus=num_gpus,
                )
            )
        except RuntimeError as error:
            if NO_AGENT not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(RETRY_S)


def follow(client: Any, job_id: str, write: Callable[[str], None]) -> Followed:
    """Hand the job's log to `write` as it comes, until the job ends; a lost connection is taken up again.

    Ctrl-C ends the following, not the job. Raises RaygardError if the cluster cannot be reached for OUTAGE_S seconds or
    no longer knows the job, and if the log cannot be written.
    """
    found, tail = Followed(job_id), _Tail(client, job_id, write)
    try:
        details = tail.until_the_end()
    except KeyboardInterrupt:
        found.detached, found.exit_code = True, ExitCode.INTERRUPTED
    else:
        found.exit_code, found.reason = outcome(details)
    found.mlflow_runs = list(dict.fromkeys(MLFLOW_LINE.findall(tail.text)))
    return found


def outcome(details: Any) -> tuple[int, str | None]:
    """Exit code of a job that has ended, and why it never ran, from Ray's JobDetails."""
    status, code = str(getattr(details.status, "value", details.status)), details.driver_exit_code
    if status == "SUCCEEDED":
        return ExitCode.DONE, None
    if status == "STOPPED":
        return ExitCode.INTERRUPTED, "it was stopped"
    if code is None:
        return ExitCode.DEFECT, _first_line(details.message or "Ray does not say why")
    # A process ended by a signal, as a shell counts it.
    return (128 - code if code < 0 else code or ExitCode.DEFECT), None


class _Tail:
    """The log of one job, from its beginning, over as many connections as it takes."""

    def __init__(self, client: Any, job_id: str, write: Callable[[str], None]) -> None:
        self.client, self.job_id, self.write = client, job_id, write
        self.text = ""

    def until_the_end(self) -> Any:
        from aiohttp import ClientError

        lost_since: float | None = None
        while True:
            try:
                asyncio.run(self._read())
                details = self.client.get_job_info(self.job_id)
                lost_since = None
                if details.status.is_terminal():
                    # The connection may close before the last lines have come through.
                    self._show(self.client.get_job_logs(self.job_id)[len(self.text) :])
                    return details
            except (OSError, RuntimeError, ClientError) as error:
                if UNKNOWN_JOB in str(error):
                    raise RaygardError(
                        f"the cluster does not know job {self.job_id} any more (was its head restarted?); submit it "
                        "again: what it has finished is in its run directory"
                    ) from None
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > OUTAGE_S:
                    raise RaygardError(
                        f"the cluster does not answer for {OUTAGE_S:g} s ({_first_line(error)}); the job may go on: "
                        f"ray job logs --follow {self.job_id}"
                    ) from None
            time.sleep(RETRY_S)

    async def _read(self) -> None:
        skip, loop = len(self.text), asyncio.get_running_loop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SILENCE_S) as limit:
                async for chunk in self.client.tail_job_logs(self.job_id):
                    self._show(chunk[skip:])
                    skip = max(0, skip - len(chunk))
                    limit.reschedule(loop.time() + SILENCE_S)

    def _show(self, text: str) -> None:
        if not text:
            return
        self.text += text
        try:
            self.write(text)
        except OSError as error:
            # Not to be taken for a connection to the cluster that broke.
            raise RaygardError(
                f"the job's log cannot be written here ({error.strerror or error}); the job goes on: "
                f"ray job logs --follow {self.job_id}"
            ) from None


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:300] if lines else type(error).__name__
