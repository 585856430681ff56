"""MLflow runs on a real sqlite store, and on a server that is not there."""

import errno
import http.server
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

from raygard.config import TrackingConfig
from raygard.errors import RaygardError
from raygard.redaction import redact
from raygard.tracking import DOMAIN_TAG, MASK_TAG, SPOOL, STATE, Tracker, sync

OUR_VARIABLES = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


@pytest.fixture(autouse=True)
def _prepared(monkeypatch, tmp_path, empty_store):
    for key, value in OUR_VARIABLES.items():
        monkeypatch.setenv(key, value)
    shutil.copy(empty_store, tmp_path / "mlflow.db")


@pytest.fixture
def dead_uri():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def client_of(run_dir):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{run_dir / 'mlflow.db'}")


def runs_of(client, experiment="raygard"):
    found = client.get_experiment_by_name(experiment)
    return {run.info.run_name: run for run in client.search_runs([found.experiment_id])}


def log_everything(tracker, folder):
    file = folder / "note.txt"
    file.write_text("hello")
    parent = tracker.start(tags={DOMAIN_TAG: "emoji"})
    parent.params({"mask.freeze_ratio": 0.3, "k" * 300: "v" * 600})
    child = tracker.start("trial", parent)
    for step in range(3):
        child.metrics({"loss": 1.0 / (step + 1), "bad": float("nan")}, step)
    child.artifact(file, "notes")
    child.tags({MASK_TAG: "ab" * 32})
    child.finish()
    grandchild = tracker.start("job", child)
    grandchild.finish("FAILED")
    parent.finish()


def check_everything(client):
    runs = runs_of(client)
    assert set(runs) == {"demo", "trial", "job"}
    parent, child, job = runs["demo"], runs["trial"], runs["job"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert job.data.tags["mlflow.parentRunId"] == child.info.run_id
    assert "mlflow.parentRunId" not in parent.data.tags
    assert parent.data.tags[DOMAIN_TAG] == "emoji" and child.data.tags[MASK_TAG] == "ab" * 32
    assert parent.data.params["mask.freeze_ratio"] == "0.3"
    assert parent.data.params["k" * 250] == "v" * 500
    history = client.get_metric_history(child.info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    assert "bad" not in child.data.metrics
    assert [f.path for f in client.list_artifacts(child.info.run_id, "notes")] == ["notes/note.txt"]
    assert (parent.info.status, child.info.status, job.info.status) == ("FINISHED", "FINISHED", "FAILED")


def test_hierarchy_in_a_sqlite_store(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        log_everything(Tracker.open(TrackingConfig(), tmp_path, "demo"), tmp_path)
    check_everything(client_of(tmp_path))
    assert [r.name for r in caplog.records] == ["raygard.tracking"]
    assert "not finite" in caplog.records[0].getMessage()
    assert not (tmp_path / SPOOL).exists()
    assert list((tmp_path / "mlartifacts").rglob("note.txt"))


def test_resumed_run_continues_its_runs(tmp_path):
    log_everything(Tracker.open(TrackingConfig(), tmp_path, "demo"), tmp_path)
    again = Tracker.open(TrackingConfig(), tmp_path, "demo")
    parent = again.start()
    runs = runs_of(client_of(tmp_path))
    assert len(runs) == 3 and runs["demo"].info.status == "RUNNING"
    trial = again.start("trial", parent)
    before = client_of(tmp_path).get_metric_history(runs["trial"].info.run_id, "loss")
    for metric in before:
        trial.metrics({"loss": metric.value}, metric.step)
    trial.metrics({"loss": 0.1}, 3)
    after = client_of(tmp_path).get_metric_history(runs["trial"].info.run_id, "loss")
    assert [(m.step, m.value) for m in after] == [*((m.step, m.value) for m in before), (3, 0.1)]


def test_dead_server_neither_stops_nor_delays_and_can_be_synced(tmp_path, dead_uri, caplog):
    started = time.monotonic()
    tracker = Tracker.open(TrackingConfig(tracking_uri=dead_uri), tmp_path, "demo")
    log_everything(tracker, tmp_path)
    assert time.monotonic() - started < 30
    assert not tracker.connected
    failures = [r for r in caplog.records if "tracking failed" in r.getMessage()]
    assert len(failures) == 1
    with pytest.raises(RaygardError, match="failed"):
        sync(tmp_path)
    live = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = client_of(tmp_path)
    assert sync(tmp_path, live) == len((tmp_path / SPOOL).read_text().splitlines())
    check_everything(client)
    assert sync(tmp_path, live) == 0
    check_everything(client)


def test_replay_interrupted_before_it_was_recorded_changes_nothing(tmp_path, dead_uri):
    log_everything(Tracker.open(TrackingConfig(tracking_uri=dead_uri), tmp_path, "demo"), tmp_path)
    live = f"sqlite:///{tmp_path / 'mlflow.db'}"
    sync(tmp_path, live)
    state = json.loads((tmp_path / STATE).read_text())
    for store in state["stores"].values():
        store["replayed"] = 0
    (tmp_path / STATE).write_text(json.dumps(state))
    assert sync(tmp_path, live) > 0
    check_everything(client_of(tmp_path))


def test_each_store_gets_the_spool(tmp_path, dead_uri, empty_store):
    """What was sent to one by hand is not lost to the run's own."""
    log_everything(Tracker.open(TrackingConfig(tracking_uri=dead_uri), tmp_path, "demo"), tmp_path)
    shutil.copy(empty_store, tmp_path / "other.db")
    sent = [sync(tmp_path, f"sqlite:///{tmp_path / name}.db") for name in ("other", "mlflow", "other")]
    assert sent[0] == sent[1] > 0 and sent[2] == 0
    check_everything(client_of(tmp_path))


def test_a_torn_record_is_left_out(tmp_path, dead_uri, caplog):
    """A full disk takes a part of a line, and the next record comes right after it."""
    tracker = Tracker.open(TrackingConfig(tracking_uri=dead_uri), tmp_path, "demo")
    run = tracker.start()
    with (tmp_path / SPOOL).open("a") as stream:
        stream.write('{"op": "metr')
    run.metrics({"loss": 1.0}, 0)
    run.metrics({"loss": 2.0}, 1)
    run.finish()
    live = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert sync(tmp_path, live) == 4 and sync(tmp_path, live) == 0
    assert "line 2 of" in caplog.text and "is torn" in caplog.text
    (run,) = runs_of(client_of(tmp_path)).values()
    assert run.data.metrics == {"loss": 2.0} and run.info.status == "FINISHED"


def test_a_full_disk_is_one_line(tmp_path, dead_uri, monkeypatch):
    run = Tracker.open(TrackingConfig(tracking_uri=dead_uri), tmp_path, "demo").start()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(RaygardError, match="no space left while writing"):
        run.metrics({"loss": 1.0}, 0)


def test_store_that_dies_in_the_middle_is_synced_into_the_same_runs(tmp_path, dead_uri, caplog):
    from mlflow import MlflowClient

    tracker = Tracker.open(TrackingConfig(), tmp_path, "demo")
    run = tracker.start()
    run.metrics({"loss": 1.0}, 0)
    tracker._store.client = MlflowClient(tracking_uri=dead_uri)
    run.metrics({"loss": 2.0}, 1)
    run.metrics({"loss": 3.0}, 2)
    run.finish()
    assert caplog.text.count("tracking failed") == 1
    assert Tracker.open(TrackingConfig(), tmp_path, "demo").connected
    assert sync(tmp_path) == 0
    (run,) = runs_of(client_of(tmp_path)).values()
    history = client_of(tmp_path).get_metric_history(run.info.run_id, "loss")
    assert sorted(m.value for m in history) == [1.0, 2.0, 3.0] and run.info.status == "FINISHED"


def test_failing_server_is_left_alone_and_no_secret_leaks(tmp_path, caplog):
    class Broken(http.server.BaseHTTPRequestHandler):
        calls = 0

        def do_GET(self):
            type(self).calls += 1
            self.send_response(500)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://user:hunter2@127.0.0.1:{server.server_port}"
    tracker = Tracker.open(TrackingConfig(tracking_uri=uri), tmp_path, "demo")
    calls = Broken.calls
    log_everything(tracker, tmp_path)
    server.shutdown()
    assert Broken.calls == calls
    written = "".join(p.read_text() for p in (tmp_path / STATE, tmp_path / SPOOL))
    assert "hunter2" not in caplog.text + written


def test_store_that_hangs_is_given_up(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        tracker = Tracker.open(
            TrackingConfig(tracking_uri=f"http://127.0.0.1:{silent.getsockname()[1]}"), tmp_path, "demo"
        )
        tracker.start().metrics({"loss": 1.0}, 0)
        assert time.monotonic() - started < 30
    assert not tracker.connected and (tmp_path / SPOOL).exists()


@pytest.mark.parametrize("scheme", ["sqlite", "sqlite+pysqlite"])
@pytest.mark.parametrize("relative", [True, False])
def test_artifacts_of_a_named_database_lie_beside_it(tmp_path, monkeypatch, scheme, relative):
    here, elsewhere = tmp_path / "here", tmp_path / "else where"
    here.mkdir()
    elsewhere.mkdir()
    shutil.move(tmp_path / "mlflow.db", elsewhere / "all.db")
    monkeypatch.chdir(here)
    database = "../else where/all.db" if relative else elsewhere / "all.db"
    tracker = Tracker.open(TrackingConfig(tracking_uri=f"{scheme}:///{database}"), tmp_path / "run", "demo")
    (here / "note.txt").write_text("hello")
    tracker.start().artifact(here / "note.txt")
    assert tracker.connected
    (stored,) = tmp_path.rglob("artifacts/note.txt")
    assert stored.is_relative_to(elsewhere / "mlartifacts")
    assert [path.name for path in here.iterdir()] == ["note.txt"]


def test_refused_parameter_does_not_end_tracking(tmp_path, caplog):
    tracker = Tracker.open(TrackingConfig(), tmp_path, "demo")
    run = tracker.start()
    run.params({"seed": 1})
    run.params({"seed": 2})
    run.metrics({"loss": 1.0}, 0)
    assert tracker.connected and "refused params" in caplog.text
    assert runs_of(client_of(tmp_path))["demo"].data.metrics == {"loss": 1.0}


def test_disabled_does_nothing(tmp_path):
    run_dir = tmp_path / "run"
    log_everything(Tracker.open(TrackingConfig(enabled=False), run_dir, "demo"), tmp_path)
    assert not run_dir.exists()


def test_pictures_are_kept_back(tmp_path):
    (tmp_path / "face.png").write_bytes(b"x")
    (tmp_path / "plot.png").write_bytes(b"x")
    run = Tracker.open(TrackingConfig(log_images=False), tmp_path, "demo").start()
    run.artifact(tmp_path / "face.png")
    run.artifact(tmp_path / "plot.png", pictures=False)
    assert [p.name for p in (tmp_path / "mlartifacts").rglob("*.png")] == ["plot.png"]


@pytest.mark.parametrize("folder", ["../out", "a/../../b", "/etc", ".."])
def test_artifact_folder_cannot_leave_the_run(tmp_path, folder):
    (tmp_path / "a.txt").write_text("x")
    run = Tracker.open(TrackingConfig(enabled=False), tmp_path, "demo").start()
    with pytest.raises(RaygardError, match="relative"):
        run.artifact(tmp_path / "a.txt", folder)


def test_failed_block_marks_the_run(tmp_path):
    tracker = Tracker.open(TrackingConfig(), tmp_path, "demo")
    with pytest.raises(ZeroDivisionError), tracker.start():
        raise ZeroDivisionError
    assert runs_of(client_of(tmp_path))["demo"].info.status == "FAILED"


@pytest.mark.parametrize(
    ("uri", "safe"),
    [
        ("http://me:secret@host:5000/x", "http://***@host:5000/x"),
        ("failed: https://me:se/cret@host", "failed: https://***@host"),
        ("sqlite:///runs/mlflow.db", "sqlite:///runs/mlflow.db"),
        ("http://host:5000", "http://host:5000"),
    ],
)
def test_redact(uri, safe):
    assert redact(uri) == safe


def test_parameters_carry_no_secret(tmp_path):
    run = Tracker.open(TrackingConfig(), tmp_path, "demo").start()
    run.params({"tracking.tracking_uri": "http://me:secret@host"})
    assert runs_of(client_of(tmp_path))["demo"].data.params["tracking.tracking_uri"] == "http://***@host"


def test_sync_of_an_untracked_folder(tmp_path):
    with pytest.raises(RaygardError, match="nothing was tracked"):
        sync(tmp_path)


def test_importing_the_module_does_not_import_mlflow():
    code = "import sys, raygard.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
