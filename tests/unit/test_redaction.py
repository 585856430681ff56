"""Planted secrets are searched in all that a run writes, sends, logs and prints, and found nowhere."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from raygard.cluster.doctor import examine as examining
from raygard.cluster.doctor.checks import Check
from raygard.cluster.errors import user_mistake
from raygard.cluster.pool import reason
from raygard.cluster.search import _reason as trial_reason
from raygard.cluster.session import ray_session
from raygard.cluster.submit import submit
from raygard.config_file import load_config
from raygard.errors import ExitCode, RaygardError
from raygard.flow import Flow
from raygard.redaction import HIDDEN, RedactingFormatter, holds_secret, redact, redact_all
from raygard.tracking import SPOOL, sync
from tests.conftest import Maker

PASSWORD = "p1anted-passw0rd"
VARIABLES = {
    "RAY_AUTH_TOKEN": "3f" * 32,
    "HF_TOKEN": "hf_" + "pLaNtEd" * 5,
    "AWS_ACCESS_KEY_ID": "AKIA" + "PLANTED0" * 2,
    "AWS_SECRET_ACCESS_KEY": "planted/secret+key/of/aws/0123456789abcd",
    "MLFLOW_TRACKING_PASSWORD": "another-planted-one",
    "MLFLOW_TRACKING_TOKEN": "planted.tracking.token",
}
SECRETS = (PASSWORD, *VARIABLES.values())
URI = f"http://alice:{PASSWORD}@127.0.0.1:9"


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        **VARIABLES,
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "1",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }.items():
        monkeypatch.setenv(name, value)


def found_in(*texts: object) -> list[str]:
    content = "\n".join(map(str, texts))
    return [secret for secret in SECRETS if secret in content]


def found_below(folder: Path) -> list[tuple[str, str]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [(secret, str(path)) for path in files for secret in SECRETS if secret.encode() in path.read_bytes()]


# ------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"at {URI}/api", "at http://***@127.0.0.1:9/api"),
        ("postgresql://u:a/b@db:5432/x and s3://id:key@b", "postgresql://***@db:5432/x and s3://***@b"),
        ("http://alice:p@ss-w@rd@h:5000/x", "http://***@h:5000/x"),
        ("postgresql://u:a/b/c@db/x", "postgresql://***@db/x"),
        ("http://h/x#access_token=abc", "http://h/x#access_token=***"),
        ("https://h/x?Expires=1&Signature=a-b~c&Key-Pair-Id=K", "https://h/x?Expires=1&Signature=***&Key-Pair-Id=K"),
        ("https://h/x?X-Amz-Signature=0af1&sv=2&sig=a%2Bb", "https://h/x?X-Amz-Signature=***&sv=2&sig=***"),
        ("github_pat_11ABCDEFG0abcdefghij_klmnop", "***"),
        ("http://h/x?a=1&token=abc&b=2", "http://h/x?a=1&token=***&b=2"),
        ("http://h/x?api_key=abc", "http://h/x?api_key=***"),
        ("Authorization: Bearer abcdefgh.ijk", "Authorization: Bearer ***"),
        (f"token {VARIABLES['HF_TOKEN']}!", "token ***!"),
        (f"key {VARIABLES['AWS_ACCESS_KEY_ID']}", "key ***"),
        ("ghp_0123456789abcdefghij0", "***"),
        ("-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIG\n-----END ENCRYPTED PRIVATE KEY-----\nrest", "***\nrest"),
    ],
)
def test_secrets_of_known_form_are_taken_out(text: str, shown: str) -> None:
    assert redact(text) == shown and redact(redact(text)) == shown


@pytest.mark.parametrize(
    "text",
    ["http://h:8265/a/b@c", "docker://registry:5000/team/image@sha256:0", "bash -c 'x=$HF_TOKEN; run --key keys/r'",
     "adapt.initializer_token=emoji", "sqlite:////shared/mlflow.db", "http://h:5000/#/experiments/1/runs/2", "a@b.c",
     "hf_transfer", "zoo:tiny-sd", "the token was refused", "s3://bucket/a/b", "0" * 64, "basic", 0.5, None],
)  # fmt: skip
def test_what_is_no_secret_stays(text: object) -> None:
    assert redact(text) == str(text) and not holds_secret(str(text).replace("initializer_token", "x"))


def test_values_of_variables_that_are_named_like_secrets(monkeypatch: pytest.MonkeyPatch, planted: None) -> None:
    assert not found_in(redact(f"{VARIABLES} in one line")) and redact("x") == "x"
    for name in ("AZURE_STORAGE_KEY", "PGPASSWORD", "MYSQL_PWD", "my_api_token"):
        monkeypatch.setenv(name, f"planted-in-{name}")
        assert redact(f"got planted-in-{name}.") == f"got {HIDDEN}."
    plain = {"TOKENIZERS_PARALLELISM": "falsehood", "RAY_AUTH_TOKEN_PATH": "/home/token", "MY_TOKEN": "short"}
    for name, value in plain.items():
        monkeypatch.setenv(name, value)
        assert redact(value) == value
    assert not found_in(redact_all({"a": [VARIABLES["HF_TOKEN"], {URI: (PASSWORD[:2], URI)}], "n": 1.5}))
    assert redact_all({"a": [1, None, True]}) == {"a": [1, None, True]}


def test_log_records_and_tracebacks_are_redacted(planted: None) -> None:
    try:
        raise ValueError(f"cannot reach {URI}")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "token %s", (VARIABLES["HF_TOKEN"],), sys.exc_info())
    text = RedactingFormatter("%(levelname)s %(message)s").format(record)
    assert text.startswith(f"ERROR token {HIDDEN}") and "cannot reach http://***@" in text and not found_in(text)


# ---------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    "key", ["domain.data", "model.pretrained_model_name_or_path", "tracking.experiment", "domain.name"]
)
@pytest.mark.parametrize("value", [f"https://alice:{PASSWORD}@h/x", *VARIABLES.values()])
def test_a_secret_in_a_setting_is_refused_unquoted(planted: None, key: str, value: str) -> None:
    with pytest.raises(RaygardError, match=f"{key} holds a password or token") as caught:
        load_config(None, [f"{key}={json.dumps(value)}"])
    assert not found_in(caught.value)


def test_a_secret_in_a_class_or_caption_is_refused(planted: None) -> None:
    with pytest.raises(RaygardError, match=r"domain\.illegal holds") as caught:
        load_config(None, [f"domain.illegal=[{VARIABLES['HF_TOKEN']}]"])
    assert not found_in(caught.value)


# ----------------------------------------------------------------------------------------- a small flow


def test_a_small_flow_leaves_no_secret_anywhere(
    planted: None, tiny_sd: Path, imagefolder: Maker, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, empty_store: Path,
) -> None:  # fmt: skip
    """Run directory, spool, mask, report, and the database that the spooled records are then sent to."""
    from raygard.cli_flow import print_outcome

    config = load_config(
        None,
        [
            f"model.pretrained_model_name_or_path={tiny_sd}", f"domain.data={imagefolder({'a': 48, 'b': 48})}",
            "domain.illegal=[a]", "domain.legal=[b]", "domain.resolution=16", "mask.rule=largest-first",
            f"tracking.tracking_uri={URI}",
        ],
    )  # fmt: skip
    run = tmp_path / "run"
    with caplog.at_level(logging.INFO):
        flow = Flow(config, run)
        with flow.parent:
            flow.learn_all()
            flow.parent.params({"note": f"{URI} {VARIABLES['HF_TOKEN']}", "keys": VARIABLES})
            flow.parent.tags({"reason": f"failed at {URI} with {VARIABLES['RAY_AUTH_TOKEN']}"})
            flow.tracker.start(f"trial {URI}", parent=flow.parent, tags={"x": VARIABLES["HF_TOKEN"]}).finish()
            flow.report()
    assert flow.config.tracking.tracking_uri == "http://127.0.0.1:9" and (run / SPOOL).exists()
    assert "tracking failed" in caplog.text
    store = tmp_path / "store.db"
    shutil.copy(empty_store, store)
    assert sync(run, f"sqlite:///{store}") > 5
    monkeypatch.setattr("raygard.outcome_text.format_table", lambda _: "table")
    print_outcome(flow, {})
    captured = capsys.readouterr()
    assert found_in(caplog.text, captured.out, captured.err) == []
    assert "MLflow   http://127.0.0.1:9 " in captured.out and found_below(tmp_path) == []
    assert (
        json.loads((run / "mask" / "mask.json").read_text())["config"]["tracking.tracking_uri"] == "http://127.0.0.1:9"
    )
    assert yaml.safe_load((run / "config.yaml").read_text())["tracking"]["tracking_uri"] == "http://127.0.0.1:9"
    # The next attempt may have other credentials, or none.
    Flow(config.model_copy(update={"tracking": config.tracking.model_copy(update={"enabled": False})}), run)


# ------------------------------------------------------------------------------------- commands and jobs


def ended(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    from raygard.cli import main

    monkeypatch.setattr(sys, "argv", ["raygard", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


def test_what_commands_print(
    planted: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Settings, refusals, and the traceback of a defect."""
    assert ended(monkeypatch, "config", f"tracking.tracking_uri={URI}") == 0
    assert ended(monkeypatch, "config", f"{VARIABLES['HF_TOKEN']}") == ExitCode.BAD_INPUT
    assert (
        ended(monkeypatch, "generate", "x", "--model", f"https://a:{PASSWORD}@h/m", "--out", str(tmp_path / "o")) == 2
    )
    assert ended(monkeypatch, "audit", "--mask", f"/{VARIABLES['AWS_SECRET_ACCESS_KEY']}") == ExitCode.BAD_INPUT

    def broken(*_: object) -> None:
        raise KeyError(f"no answer from {URI} for {VARIABLES['RAY_AUTH_TOKEN']}")

    monkeypatch.setattr("raygard.report.build_report", broken)
    assert ended(monkeypatch, "report", str(tmp_path)) == ExitCode.DEFECT
    text = capsys.readouterr()
    assert "tracking_uri: http://127.0.0.1:9" in text.out and "Traceback" in text.err and "no answer from" in text.err
    assert found_in(text.out, text.err) == []


def test_what_the_doctor_prints(
    planted: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An address may have credentials, and a node may say why it fails in any words."""
    for form in ((), ("--json",)):
        address = f"http://alice:{PASSWORD}@127.0.0.1:9"
        assert ended(monkeypatch, "doctor", "--address", address, *form) == ExitCode.UNFIT_CLUSTER
        red = [Check("cluster", False, f"no answer from {URI}")]
        with monkeypatch.context() as patch:
            patch.setattr(examining, "examine", lambda *_, red=red: red)
            assert ended(patch, "doctor", "--address", "h:6379", *form) == ExitCode.UNFIT_CLUSTER
    text = capsys.readouterr()
    assert text.out.count("127.0.0.1:9") == 4 and found_in(text.out, text.err) == []


def test_reasons_that_go_into_tables_are_redacted(planted: None) -> None:
    """Tables of a search and of a comparison are printed, and are sent to MLflow as files."""
    for error in (OSError(f"no answer from {URI}"), RaygardError(f"{VARIABLES['HF_TOKEN']} is refused at {URI}")):
        trial = SimpleNamespace(get_error=lambda error=error: error)
        assert found_in(reason(error), trial_reason(trial), user_mistake(error)) == []
        assert "http://***@127.0.0.1:9" in reason(error)


class FakeClient:
    """Takes jobs and keeps what Ray would be told, and what it would upload."""

    def __init__(self) -> None:
        self.jobs: list[dict[str, Any]] = []
        self.files: dict[str, str] = {}

    def submit_job(self, **job: Any) -> str:
        self.jobs.append(job)
        folder = Path(job["runtime_env"]["working_dir"])
        self.files |= {path.name: path.read_text() for path in folder.rglob("*") if path.is_file()}
        return "job"


@pytest.mark.parametrize(
    "word",
    [f"tracking.tracking_uri={URI}", *VARIABLES.values(), "HF_TOKEN=x", f"--password={PASSWORD}", "--api-key=k",
     "MLFLOW_TRACKING_PASSWORD=x", "http://h/?token=abc", "cd x && HF_TOKEN=abc python y", "export 'HF_TOKEN=a'; y",
     "run --api-token abc"],
)  # fmt: skip
def test_submit_refuses_a_command_with_a_secret(planted: None, tmp_path: Path, word: str) -> None:
    client = FakeClient()
    with pytest.raises(RaygardError, match="word 3 of the command holds a password or token") as caught:
        submit(client, ["python", "jobs/search.py", word], tmp_path)
    assert client.jobs == [] and found_in(caught.value) == []


def test_submit_refuses_a_secret_that_follows_its_option(planted: None, tmp_path: Path) -> None:
    client = FakeClient()
    with pytest.raises(RaygardError, match="word 4 of the command holds a password or token"):
        submit(client, ["python", "x.py", "--mlflow-password", "hunter2"], tmp_path)
    submit(client, ["python", "x.py", "--new-token", "--out", "x", "bash", "-c", "export HF_TOKEN=$(cat f)"], tmp_path)
    assert len(client.jobs) == 1


def test_submit_takes_what_jobs_are_given(planted: None, tmp_path: Path) -> None:
    command = ["python", "jobs/search.py", "--config", "jobs/configs/search.yaml", "--out", "/shared/runs/a b"]
    command += ["tracking.tracking_uri=http://mlflow:5000", "domain.illegal=[Jane Doe]", "adapt.learn_as=sks dog"]
    client = FakeClient()
    submit(client, command, tmp_path)
    (job,) = client.jobs
    assert (
        set(job["runtime_env"]) == {"working_dir"}
        and "metadata" not in job
        and "'/shared/runs/a b'" in job["entrypoint"]
    )


def test_the_doctor_uploads_no_secret(planted: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client = FakeClient()

    @contextmanager
    def connected(_: str) -> Any:
        yield client

    def followed(_client: Any, _job: str, write: Any) -> SimpleNamespace:
        write('{"ok": true, "checks": []}\n')
        return SimpleNamespace(detached=False)

    monkeypatch.setattr(examining, "jobs_client", connected)
    monkeypatch.setattr(examining, "_takes_anyone", lambda _: False)
    monkeypatch.setattr(examining, "follow", followed)
    config = load_config(None, [f"tracking.tracking_uri={URI}"])
    assert examining.examine_from_outside(config, tmp_path, "http://h:8265") == []
    assert found_in(client.jobs, client.files) == []
    told = yaml.safe_load(client.files[examining.CONFIG_FILE])
    assert told["tracking"]["tracking_uri"] == "http://127.0.0.1:9"


def test_runtime_environments_hold_an_address_and_nothing_else(planted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with ray_session():
        pass
    monkeypatch.delenv("RAY_ADDRESS")
    with ray_session(state_api=True):
        pass
    assert asked[0]["runtime_env"] == {"env_vars": {"RAY_ADDRESS": "auto"}} and "runtime_env" not in asked[1]
    assert asked[1]["dashboard_host"] == "127.0.0.1" and found_in(asked) == []
