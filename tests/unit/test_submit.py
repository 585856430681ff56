"""`raygard submit` without a cluster: what would be uploaded, what a job ended with, and refusals in one line."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus
from typer.testing import CliRunner

from raygard.cli_cluster import cluster_app
from raygard.cluster import address as reaching
from raygard.cluster import package as packing
from raygard.cluster import submit as submitting
from raygard.cluster.address import cluster_address, is_dashboard, require_answer
from raygard.cluster.package import measure_package, require_uploadable
from raygard.cluster.submit import follow, jobs_client, outcome
from raygard.errors import ExitCode, RaygardError


def write(folder: Path, **sizes: int) -> None:
    for name, size in sizes.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)


def test_the_size_is_that_of_rays_own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the package that Ray makes of the same folder."""
    from zipfile import ZipFile

    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    monkeypatch.delenv(packing.NO_GITIGNORE, raising=False)
    folder = tmp_path / "work"
    write(folder, a=10, runs__b=100, deep__runs__c=1000, deep__keep=7, deep__skip=70, data__weights=5000, more=3)
    for excluded in (".git", "deep/__pycache__", ".venv", "sub/venv"):
        write(folder / excluded, file=10**6)
    (folder / ".rayignore").write_text("runs/\n/data\n*.log\n")
    (folder / ".gitignore").write_text("more\n")
    (folder / "deep" / ".rayignore").write_text("skip\n")
    found = measure_package(folder)
    excludes = get_runtime_env_default_excludes()
    create_package(str(folder), tmp_path / "packed.zip", include_gitignore=True, excludes=excludes)
    files = [entry for entry in ZipFile(tmp_path / "packed.zip").infolist() if not entry.is_dir()]
    assert {entry.filename for entry in files} >= {"a", "deep/keep"}
    assert (found.num_files, found.size_bytes) == (len(files), sum(entry.file_size for entry in files))
    assert found.size_bytes < 10**6
    monkeypatch.setenv("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", "")
    assert measure_package(folder).size_bytes == found.size_bytes + 4 * 10**6
    monkeypatch.delenv("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES")
    monkeypatch.setenv(packing.NO_GITIGNORE, "1")
    assert measure_package(folder).size_bytes == found.size_bytes + 3


def test_too_large_a_folder_is_refused_naming_what_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, small=10, weights__large=3 * packing.MIB)
    assert require_uploadable(tmp_path).num_files == 2
    monkeypatch.setattr(packing, "LIMIT_BYTES", 2 * packing.MIB)
    with pytest.raises(RaygardError, match=r"3 MiB, Ray uploads at most 2 \(largest: weights 3.0 MiB.*\.rayignore"):
        require_uploadable(tmp_path)
    (tmp_path / ".rayignore").write_text("weights\n")
    assert require_uploadable(tmp_path).entries["small"] == 10
    with pytest.raises(RaygardError, match="no working directory"):
        measure_package(tmp_path / "none")


def test_a_link_to_a_folder_above_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    with pytest.raises(RaygardError, match="links back"):
        measure_package(tmp_path)


def test_this_checkout_can_be_uploaded() -> None:
    assert require_uploadable(Path(__file__).resolve().parents[2]).size_bytes < 100 * packing.MIB


def ended(status: JobStatus, code: int | None = None, message: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(status=status, driver_exit_code=code, message=message)


@pytest.mark.parametrize(
    ("details", "code", "reason"),
    [
        (ended(JobStatus.SUCCEEDED, 0), 0, None),
        (ended(JobStatus.FAILED, 4), 4, None),
        (ended(JobStatus.FAILED, -9), 137, None),
        (ended(JobStatus.STOPPED), ExitCode.INTERRUPTED, "it was stopped"),
        (ended(JobStatus.FAILED, None, "no room\nmore"), ExitCode.DEFECT, "no room"),
    ],
)
def test_the_exit_code_is_the_jobs(details: Any, code: int, reason: str | None) -> None:
    assert outcome(details) == (code, reason)


class FakeJob:
    """A job whose connection breaks where the script says so."""

    def __init__(self, log: str, connections: list[tuple[int, type[BaseException] | None]]) -> None:
        self.log, self.connections = log, connections

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        end, error = self.connections.pop(0)
        for start in range(0, end, 7):
            await asyncio.sleep(0)
            yield self.log[start : min(start + 7, end)]
        if error is not None:
            raise error("gone")

    def get_job_info(self, _: str) -> Any:
        return ended(JobStatus.RUNNING) if self.connections else ended(JobStatus.FAILED, 3)

    def get_job_logs(self, _: str) -> str:
        return self.log


LOG = "start\nINFO MLflow run http://m/#/experiments/1/runs/2\nechoes INFO MLflow run nothing\nlast line\n"


def test_a_broken_connection_neither_loses_nor_repeats_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitting, "RETRY_S", 0.0)
    shown: list[str] = []
    job = FakeJob(LOG, [(10, RuntimeError), (0, OSError), (33, None), (len(LOG) - 5, None)])
    found = follow(job, "id", shown.append)
    assert "".join(shown) == LOG and found.exit_code == 3 and not found.detached
    assert found.mlflow_runs == ["http://m/#/experiments/1/runs/2"]


def test_a_connection_that_has_gone_silent_is_taken_up_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing tells of a machine that slept, or of a router that forgot the connection."""

    class Silent(FakeJob):
        async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
            async for chunk in super().tail_job_logs(name):
                yield chunk
            if self.connections:
                await asyncio.sleep(60)

    monkeypatch.setattr(submitting, "RETRY_S", 0.0)
    monkeypatch.setattr(submitting, "SILENCE_S", 0.1)
    shown: list[str] = []
    found = follow(Silent(LOG, [(10, None), (20, None), (30, None)]), "id", shown.append)
    assert "".join(shown) == LOG and found.exit_code == 3


def test_ctrl_c_ends_the_following_only() -> None:
    found = follow(FakeJob(LOG, [(70, KeyboardInterrupt), (0, None)]), "id", lambda _: None)
    assert found.detached and found.exit_code == ExitCode.INTERRUPTED and len(found.mlflow_runs) == 1


def test_a_cluster_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitting, "RETRY_S", 0.0)
    monkeypatch.setattr(submitting, "OUTAGE_S", 0.0)
    with pytest.raises(RaygardError, match="may go on: ray job logs --follow id"):
        follow(FakeJob(LOG, [(3, OSError)] * 3), "id", lambda _: None)


def test_a_job_the_cluster_has_forgotten_is_not_waited_for() -> None:
    class Forgotten(FakeJob):
        def get_job_info(self, _: str) -> Any:
            raise RuntimeError("Request failed with status code 404: Job id does not exist")

    job = Forgotten(LOG, [(3, None)])
    with pytest.raises(RaygardError, match="does not know job id any more"):
        follow(job, "id", lambda _: None)


def test_a_closed_pipe_is_no_lost_connection() -> None:
    def write(_: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(RaygardError, match=r"cannot be written here \(Broken pipe\); the job goes on"):
        follow(FakeJob(LOG, [(70, None), (0, None)]), "id", write)


@pytest.mark.parametrize("typo", [("--adress", "http://x:1"), ("--working_dir", "x")])
def test_a_misspelt_option_is_no_part_of_the_command(typo: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(submitting, "jobs_client", asked.append)
    options = CliRunner().invoke(cluster_app, ["submit", *typo, "--", "python", "job.py"])
    assert options.exit_code == ExitCode.BAD_INPUT and "No such option" in options.output and not asked


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert cluster_address(None) is None
    with pytest.raises(RaygardError, match="no cluster is named"), jobs_client(None):
        pass
    monkeypatch.setenv("RAY_ADDRESS", "h:6379")
    assert cluster_address(None) == "h:6379" and cluster_address("http://x:1") == "http://x:1"
    assert is_dashboard("http://x:1") and not is_dashboard("h:6379")
    for wrong in ("nonsense", "http://", "h:port"):
        with pytest.raises(RaygardError, match="is no cluster's address"):
            require_answer(wrong)
    with (
        pytest.raises(RaygardError, match=r"no Ray cluster answers at http://127.0.0.1:1 "),
        jobs_client("http://127.0.0.1:1"),
    ):
        pass


@contextmanager
def listener(answer: bytes) -> Iterator[str]:
    """What takes connections, as a tunnel to a hung machine does, and sends each the same `answer`, or nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def serve() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                except OSError:
                    return
                if answer:
                    kept[-1].recv(65536)
                    kept[-1].sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + answer)
                    kept.pop().close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    for connection in kept:
        connection.close()


@pytest.mark.parametrize(
    ("answer", "said"),
    [(b"", "no Ray cluster answers at"), (b'{"version": "0.1"}', "is no Ray dashboard"), (b"<html>", "is no Ray dash")],
)
def test_what_is_no_dashboard_is_said_in_bounded_time(
    answer: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reaching, "DASHBOARD_TIMEOUT_S", 0.3)
    with listener(answer) as address, pytest.raises(RaygardError, match=said), jobs_client(address):
        pass


def test_a_cluster_whose_agent_is_not_up_yet_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        asked = 0

        def submit_job(self, **job: object) -> str:
            self.asked += 1
            if self.asked < 3:
                raise RuntimeError("Request failed with status code 500: No available agent to submit job")
            return "job"

    monkeypatch.setattr("raygard.cluster.submit.RETRY_S", 0.0)
    client = Client()
    assert submitting.submit(client, ["python", "job.py"], tmp_path) == "job" and client.asked == 3
    monkeypatch.setattr("raygard.cluster.submit.AGENT_S", -1.0)
    with pytest.raises(RuntimeError, match="No available agent"):
        submitting.submit(Client(), ["python", "job.py"], tmp_path)
