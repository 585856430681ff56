"""The command line: every mistake is one line on standard error, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import raygard as package
from raygard import cli
from raygard.cli_flow import open_flow
from raygard.cli_options import resolve_config
from raygard.config_file import load_config
from raygard.errors import ExitCode
from raygard.mask import FreezeMask
from raygard.rundir import RunDirectory

Maker = Callable[..., Path]
Runner = Callable[..., tuple[int, str, str]]
COMMANDS = (
    *("demo", "run", "learn", "evaluate", "adapt", "generate", "score", "audit", "report", "track", "version"),
    *("submit", "doctor"),
)  # fmt: skip


@pytest.fixture
def raygard(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["raygard", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


@pytest.fixture
def refused(raygard: Runner) -> Callable[..., str]:
    def run(*arguments: object) -> str:
        code, out, err = raygard(*arguments)
        assert (code, out) == (2, ""), err
        assert err.startswith("raygard: ") and err.count("\n") == 1 and len(err) < 700
        return err

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Enough of a pipeline folder for everything that comes before its weights are loaded."""
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    (folder / "unet" / "config.json").write_text("{}")
    return folder


def test_help_teaches_every_command(raygard: Runner) -> None:
    code, out, err = raygard("--help")
    assert (code, err) == (0, "") and "raygard demo --out runs/demo" in out
    for command in COMMANDS:
        assert command in out
        code, text, _ = raygard(command, "--help")
        assert code == 0 and "Usage" in text and len(text.split()) > 15


def test_version(raygard: Runner) -> None:
    assert raygard("version") == (0, f"{package.__version__}\n", "")


def test_the_resolved_configuration_can_be_printed_and_read_back(raygard: Runner, tmp_path: Path) -> None:
    code, out, _ = raygard("config", "mask.freeze_ratio=0.4")
    (tmp_path / "run.yaml").write_text(out)
    assert code == 0 and load_config(tmp_path / "run.yaml") == load_config(None, ["mask.freeze_ratio=0.4"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lern", "--out", "x"], "No such command 'lern'"),
        (["learn"], "Missing option '--out'"),
        (["learn", "--out", "x", "--wrkers", "2"], "No such option"),
        (["learn", "--out", "x", "--workers", "two"], "'--workers'"),
        (["learn", "--out", "x", "--workers", "0"], "engine.num_workers"),
        (
            ["learn", "--out", "x", "--workers", "9"],
            "train_batch_size 16 must be at least 18 (2 roles x engine",
        ),
        (["learn", "--out", "x", "--workers", "4:"], "'--workers'"),
        (["learn", "--out", "x", "--workers", "2:1"], "engine.min_workers 2 is above engine.num_workers 1"),
        (["learn", "--out", "x", "--workers", "1:9"], "bilevel.train_batch_size 16 must be at least 18"),
        (["learn", "--out", "x", "--zero-stage", "4"], "engine.zero_stage"),
        (["learn", "--out", "x", "--config", "none.yaml"], "cannot read configuration none.yaml"),
        (["run", "--out", "x", "mask.freeze_ratio=0"], "mask.freeze_ratio: input should be greater than 0"),
        (["run", "--out", "x", "mask.freeze_ratio=1"], "mask.freeze_ratio: input should be less than 1"),
        (["demo", "--out", "x", "mask.freeze_ratio=1.5"], "mask.freeze_ratio"),
        (["demo", "--out", "x", "mask.freze_ratio=0.5"], "did you mean 'mask.freeze_ratio'"),
        (["demo", "--out", "x", "domain.legal=[OpenMoji]"], "'OpenMoji' is both illegal and legal"),
        (["run", "--out", "x", "freeze"], "'freeze' is not of the form key=value"),
        (["run", "--out", "x", "adapt.method=ful"], "did you mean 'full'"),
        (["run", "--out", "x", "evaluation.scorer=style"], "unknown scorer 'style'"),
        (["run", "--out", "x", "--data", "/no/such/data"], "no data folder at /no/such/data"),
        (["adapt", "--data", "/no/such/data", "--out", "x"], "no data folder at /no/such/data"),
        (["adapt", "--data", "/tmp", "--out", "x", "--mask", "/no/mask"], "/no/mask is not a mask"),
        (["generate", "taco", "--out", "x", "--model", "/no/model"], "no model at /no/model"),
        (["generate", "taco", "--out", "x", "--guidance-scale", "nan"], "'--guidance-scale'"),
        (["generate", "taco", "--out", "x", "--steps", "0"], "--steps"),
        (["generate", "--out", "x"], "Missing argument 'prompts'"),
        (["score", "--generated", "/no/a", "--reference", "/no/b"], "no folder at /no/a"),
        (["audit", "--base", "/no/a", "--model", "/no/b", "--mask", "/no/c"], "/no/c is not a mask"),
        (["evaluate", "--out", "x", "--mask", "/no/mask"], "/no/mask is not a mask"),
        (["evaluate", "--out", "x"], "x has no mask of seed 0; give --mask"),
        (["submit", "--", "python", "jobs/run.py"], "no cluster is named"),
        (["submit", "--address", "http://127.0.0.1:1", "--", "x"], "no Ray cluster answers at http://127.0.0.1:1"),
        (["submit"], "Missing argument"),
        (["doctor", "--workers", "0"], "engine.num_workers"),
        (["report", "/no/run"], "/no/run"),
        (["track", "--sync", "/no/run"], "/no/run"),
    ],
)
def test_bad_arguments(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert message.lower() in refused(*arguments).lower()
    assert not list(tmp_path.iterdir())


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def two_roles(data: Path) -> None:
    (data / "b/000.png").write_bytes((data / "a/000.png").read_bytes())


def empty_class(data: Path) -> None:
    write_rows(data, [row for row in rows_of(data) if row["class"] != "b"])


def drop_pictures(data: Path) -> None:
    write_rows(data, [row for row in rows_of(data) if row["class"] != "b" or row["file_name"] < "b/010"])


@pytest.mark.parametrize("command", ["run", "learn"])
@pytest.mark.parametrize(
    ("damage", "overrides", "message"),
    [
        (None, ["domain.illegal=[z]"], "no pictures of class 'z' (column 'class'); classes found: a, b"),
        (empty_class, [], "no pictures of class 'b'"),
        (None, ["domain.legal=[a]"], "class 'a' is both illegal and legal"),
        (two_roles, [], "are the same picture, in illegal class 'a' and legal class 'b'"),
        (drop_pictures, [], "class 'b' has 10 pictures (10 distinct), too few"),
        (lambda data: (data / "a/003.png").write_bytes(b"x"), [], "a/003.png is not a picture"),
        (lambda data: (data / "a/003.png").unlink(), [], "a/003.png does not exist"),
        (None, ["domain.caption_column=captoin"], "has no column 'captoin' (domain.caption_column)"),
        (lambda data: (data / "metadata.jsonl").write_text("{"), [], "metadata.jsonl, line 1"),
    ],
)
def test_a_bad_domain(
    refused: Callable[..., str],
    imagefolder: Maker,
    tmp_path: Path,
    model: Path,
    command: str,
    damage: Callable[[Path], object] | None,
    overrides: list[str],
    message: str,
) -> None:
    data = imagefolder({"a": 48, "b": 48})
    if damage is not None:
        damage(data)
    settings = ["domain.illegal=[a]", "domain.legal=[b]", "domain.resolution=16", *overrides]
    found = refused(command, "--data", data, "--model", model, "--out", tmp_path / "out", "--quiet", *settings)
    assert message in found
    assert not (tmp_path / "out").exists()


def learn(data: Path, model: Path, out: Path, *more: str) -> list[object]:
    settings = ["domain.illegal=[a]", "domain.legal=[b]", "domain.resolution=16", *more]
    return ["learn", "--data", data, "--model", model, "--out", out, "--quiet", *settings]


def test_a_run_directory_of_another_configuration(
    refused: Callable[..., str], imagefolder: Maker, tmp_path: Path, model: Path
) -> None:
    data = imagefolder({"a": 48, "b": 48})
    out = tmp_path / "out"
    command = learn(data, model, out, "mask.freeze_ratio=0.4")
    RunDirectory(out, load_config(None, [
        f"domain.data={data}", f"model.pretrained_model_name_or_path={model}", "domain.illegal=[a]",
        "domain.legal=[b]", "domain.resolution=16", "mask.freeze_ratio=0.6",
    ]))  # fmt: skip
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "holds another configuration: mask.freeze_ratio was 0.6, now 0.4" in refused(*command)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_out_that_is_no_run(refused: Callable[..., str], imagefolder: Maker, tmp_path: Path, model: Path) -> None:
    data = imagefolder({"a": 48, "b": 48})
    assert "is not empty and is not a raygard run" in refused(*learn(data, model, data))
    assert not (data / "config.yaml").exists()


@pytest.mark.parametrize("damage", ["missing", "index", "class", "unet"])
def test_a_model_that_is_none(
    refused: Callable[..., str], imagefolder: Maker, tmp_path: Path, model: Path, damage: str
) -> None:
    index = model / "model_index.json"
    if damage == "missing":
        model = tmp_path / "no" / "such" / "model"
    elif damage == "index":
        index.write_text("{")
    elif damage == "class":
        index.write_text(json.dumps({"_class_name": "FluxPipeline"}))
    else:
        (model / "unet" / "config.json").unlink()
    assert str(model) in refused(*learn(imagefolder({"a": 48, "b": 48}), model, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def torn(mask: Path) -> None:
    file = mask / "mask.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def torn_manifest(mask: Path) -> None:
    file = mask / "mask.json"
    file.write_text(file.read_text()[:100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (None, "made for another model: the model has no tensor 'weight'"),
        (torn, "mask.safetensors is missing or differs from the hash"),
        (torn_manifest, "mask.json: Invalid JSON"),
    ],
)
def test_a_mask_of_another_model_or_torn(
    refused: Callable[..., str],
    imagefolder: Maker,
    tiny_sd: Path,
    tmp_path: Path,
    damage: Callable[[Path], None] | None,
    message: str,
) -> None:
    mask = FreezeMask.create(nn.Linear(2, 2), ["bias"]).save(tmp_path / "mask")
    if damage is not None:
        damage(mask)
    command = ["adapt", "--model", tiny_sd, "--data", imagefolder({"a": 4}), "--mask", mask, "--quiet"]
    assert message in refused(*command, "--out", tmp_path / "out", "domain.resolution=16")
    assert not (tmp_path / "out").exists()


def test_adapt_audit_generate_as_a_user_types_them(
    raygard: Runner, imagefolder: Maker, tiny_sd: Path, tmp_path: Path
) -> None:
    from raygard.mask.weights import load_denoiser_state

    state = load_denoiser_state(tiny_sd)
    module = nn.Module()
    for name, tensor in state.items():
        owner = module
        *parents, last = name.split(".")
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = getattr(owner, parent)
        owner.register_parameter(last, nn.Parameter(tensor))
    FreezeMask.create(module, list(state)[::2]).save(tmp_path / "mask")
    settings = ["domain.resolution=16", "adapt.max_train_steps=2", "adapt.learning_rate=1e-3"]
    code, out, err = raygard(
        "adapt", "--model", tiny_sd, "--data", imagefolder({"a": 4, "b": 4}), "--class", "b", "--mask",
        tmp_path / "mask", "--out", tmp_path / "tuned", "--quiet", *settings,
    )  # fmt: skip
    assert (code, err) == (0, "") and out.startswith("trained ") and str(tmp_path / "tuned") in out
    audit = ["audit", "--base", tiny_sd, "--model", tmp_path / "tuned", "--mask", tmp_path / "mask", "--json"]
    code, out, _ = raygard(*audit)
    assert code == 0 and json.loads(out)["num_frozen"] == len(list(state)[::2])
    drawn = ["--model", tmp_path / "tuned", "--out", tmp_path / "drawn", "--steps", "1"]
    code, out, _ = raygard("generate", "taco", "cat", *drawn)
    assert code == 0 and [Path(line).is_file() for line in out.splitlines()] == [True, True]
    code, out, _ = raygard("score", "--generated", tmp_path / "drawn", "--reference", tmp_path / "data", "--json")
    assert code == 0 and json.loads(out)["num_generated"] == 2
    assert torch.isfinite(torch.tensor(json.loads(out)["mean"]))


def test_demo_settings_are_the_shipped_file() -> None:
    assert cli.demo_config().is_file()
    assert yaml.safe_load(cli.demo_config().read_text())["engine"]["num_workers"] == 2


def test_a_defect_keeps_its_traceback_and_its_last_line_says_why(raygard: Runner, monkeypatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        print("what was done before")
        raise ZeroDivisionError("a worker said:\nnothing to divide by")

    monkeypatch.setattr(cli, "app", broken)
    code, out, err = raygard()
    assert (code, out) == (ExitCode.DEFECT, "what was done before\n")
    assert "Traceback" in err and "in broken" in err
    assert err.splitlines()[-1] == "raygard: failed: ZeroDivisionError: nothing to divide by"


def test_in_a_log_of_both_streams_the_reason_comes_last(tmp_path: Path) -> None:
    script = "import sys; from raygard import cli; print('table'); cli._fail('because', cli.ExitCode.UNFIT_CLUSTER)"
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run([sys.executable, "-c", script], stdout=log, stderr=log, check=False)
    assert done.returncode == 4 and (tmp_path / "log").read_text() == "table\nraygard: because\n"


def test_evaluate_measures_masks_that_exist(
    raygard: Runner, refused: Callable[..., str], imagefolder: Maker, tiny_sd: Path, tmp_path: Path, monkeypatch
) -> None:
    from raygard.diffusion.model import load_denoiser
    from raygard.flow import Flow

    config = load_config(None, [f"model.pretrained_model_name_or_path={tiny_sd}"])
    unet = load_denoiser(config.model)
    names = [name for name, _ in unet.named_parameters()]
    masks = [FreezeMask.create(unet, names[start::3]).save(tmp_path / f"mask-{start}") for start in (0, 1)]
    other = FreezeMask.create(nn.Linear(2, 2), ["bias"]).save(tmp_path / "other")
    with torch.no_grad():
        dict(unet.named_parameters())[names[0]].add_(1)
    moved = FreezeMask.create(unet, names[:1]).save(tmp_path / "moved")
    settings = ["domain.illegal=[a]", "domain.legal=[b]", "domain.resolution=16", "tracking.enabled=false"]
    data, out = imagefolder({"a": 48, "b": 48}), tmp_path / "out"
    command = ["evaluate", "--model", tiny_sd, "--data", data, "--out", out, "--quiet", *settings]
    assert "made for another model" in refused(*command, "--mask", other) and not out.exists()
    assert "does not have the values" in refused(*command, "--mask", moved) and not out.exists()

    seen: list[Any] = []
    monkeypatch.setattr("raygard.cluster.session.ray_session", nullcontext)
    monkeypatch.setattr("raygard.cluster.session.require_resources", lambda _: None)
    monkeypatch.setattr("raygard.cluster.evaluation_pool.require_evaluation", lambda _: None)
    monkeypatch.setattr(Flow, "evaluate", lambda self, given: seen.append((self.config, given)) or {})
    monkeypatch.setattr(Flow, "report", lambda self: None)
    monkeypatch.setattr(cli, "print_outcome", lambda flow, outcome: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, _, err = raygard(*command, "--mask", masks[0], "--mask", masks[1])
    assert code == 0, err
    ((used, given),) = seen
    assert used.evaluation.mask_seeds == (0, 1)
    assert [mask.sha256 for mask in given] == [FreezeMask.load(path).sha256 for path in masks]
    assert not (out / "mask").exists(), "a mask that was given is not the run's"
    two = [*command, "evaluation.mask_seeds=[0,1]"]
    others = ("--mask", masks[1], "--mask", masks[0])
    assert "holds the run of another mask" in refused(*command, *others)
    for seed in (0, 1):
        shutil.copytree(masks[seed], out / "learn" / f"seed-{seed}" / "mask")
    assert "measures masks that were given" in refused(*two)
    two[two.index(out)] = learned = tmp_path / "learned"
    shutil.copytree(out / "learn", learned / "learn")
    shutil.copy(out / "config.yaml", learned)
    code, _, err = raygard(*two)
    assert FreezeMask.load(learned / "mask").sha256 == given[0].sha256
    outcome = [*command[: command.index(out)], learned, *command[command.index(out) + 1 :]]
    assert "holds the run of another mask" in refused(*outcome, *others)
    assert FreezeMask.load(learned / "mask").sha256 == given[0].sha256
    assert code == 0 and [mask.sha256 for mask in seen[1][1]] == [mask.sha256 for mask in given], err


def test_interruption_is_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 130


@pytest.mark.parametrize(
    ("defences", "learns", "needed"),
    [("[none,freeze]", True, True), ("[none,freeze]", False, False), ("[none,busy-layer]", False, True)],
)
def test_learnings_workers_are_asked_for_only_where_something_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defences: str, learns: bool, needed: bool
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("raygard.cluster.session.ray_session", nullcontext)
    monkeypatch.setattr("raygard.cluster.session.require_resources", lambda engine: asked.append("workers"))
    monkeypatch.setattr("raygard.cluster.evaluation_pool.require_evaluation", lambda evaluation: None)
    monkeypatch.setattr("raygard.cluster.doctor.examine.require_fit", lambda config, out, *stages: asked.extend(stages))
    config = load_config(None, ["domain.illegal=[Noto Line]", f"evaluation.defences={defences}"])
    with open_flow(config, tmp_path / "out", True, learns=learns):
        assert ("workers" in asked, "learn" in asked, "evaluate" in asked) == (needed, needed, True)


@pytest.mark.parametrize(("workers", "expected"), [("4", (None, 4)), ("1:2", (1, 2)), (None, (None, 1))])
def test_workers_are_a_number_or_a_range(workers: str | None, expected: tuple[int | None, int]) -> None:
    engine = resolve_config(None, None, workers=workers).engine
    assert (engine.min_workers, engine.num_workers) == expected
