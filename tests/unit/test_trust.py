"""What is trusted and what is not: pickles, code of models, other users' runs, open ports, sensitive pictures."""

from __future__ import annotations

import ast
import os
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from report_run import write_run

from raygard import files
from raygard.cluster import search as searching
from raygard.cluster import training
from raygard.config_file import load_config
from raygard.errors import RaygardError
from raygard.flow import Flow
from raygard.report import build_report
from raygard.rundir import RunDirectory
from raygard.tracking import RunHandle, Tracker
from tests.conftest import Maker

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("raygard", "jobs", "benchmarks", "clusters")

# Every place that reads what could be a pickle or code, and why it may.
MAY_LOAD = {
    ("raygard/store.py", "torch.load"): "a paused adaptation of this run, weights_only",
    ("raygard/scoring/enlite0.py", "torch.load"): "weights of a pinned package, weights_only",
    ("raygard/scoring/lpips.py", "torch.load"): "published weights the user put there, weights_only",
    ("raygard/scoring/csd.py", "torch.load"): "published weights the user put there, weights_only",
    ("raygard/scoring/fid.py", "torch.jit.load"): "published weights the user put there; TorchScript, no pickle",
    ("raygard/zoo/autoencoder.py", "torch.load"): "checkpoints of the script that made the model, weights_only",
    ("raygard/zoo/pretrain.py", "torch.load"): "checkpoints of the script that made the model, weights_only",
    ("benchmarks/selectivity_bench.py", "torch.load"): "results of the same benchmark, weights_only",
    ("benchmarks/workers.py", "torch.load"): "results of the same benchmark's ranks, weights_only",
    ("raygard/cluster/engine.py", "self.engine.load_checkpoint"): "DeepSpeed's pickles, in a run directory of our own",
    ("raygard/cluster/search.py", "tune.Tuner.restore"): "Tune's pickles, in a run directory of our own",
}
LOADERS = re.compile(
    r"(^|\.)(torch\.load|torch\.jit\.load|load_checkpoint|Tuner\.restore|(c?[pP]ickle|cloudpickle|dill|joblib|shelve|marshal)"
    r"\.(load|loads|open|Unpickler)|yaml\.(load|unsafe_load|full_load)|load_module|exec_module)$"
)


@cache
def calls() -> list[tuple[str, str, ast.Call]]:
    """All calls in what ships: file, name of what is called, the call."""
    found = []
    for path in sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                found.append((path.relative_to(ROOT).as_posix(), ast.unparse(node.func), node))
    return found


def keyword(call: ast.Call, name: str) -> Any:
    """The constant a call passes as `name`; None if it passes none, ... if it is no constant."""
    value = next((each.value for each in call.keywords if each.arg == name), None)
    return None if value is None else value.value if isinstance(value, ast.Constant) else ...


# ---------------------------------------------------------------------------------------- pickles and code


def test_pickles_are_read_in_known_places_only() -> None:
    found = {(path, name): call for path, name, call in calls() if LOADERS.search(name)}
    assert set(found) == set(MAY_LOAD)
    for (path, name), call in found.items():
        if name == "torch.load":
            assert keyword(call, "weights_only") is True, path


def test_arrays_are_read_without_pickle_and_nothing_is_evaluated() -> None:
    for path, name, call in calls():
        if name in ("np.load", "numpy.load"):
            assert keyword(call, "allow_pickle") is False, path
        assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), f"{path}: {name}"
        assert keyword(call, "shell") in (None, False), path


def test_code_of_a_model_is_never_asked_for() -> None:
    loaded = 0
    for path, name, call in calls():
        assert keyword(call, "trust_remote_code") in (None, False), path
        assert keyword(call, "custom_pipeline") is None, path
        if name.endswith(".from_pretrained"):
            loaded += 1
            # Auto classes take whatever class a model's configuration names.
            assert not name.split(".")[0].startswith("Auto") or name.startswith("AutoencoderKL"), f"{path}: {name}"
    assert loaded >= 6


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickled_weights_are_not_read(tmp_path: Path, tiny_sd: Path, part: str) -> None:
    import torch

    from raygard.diffusion.model import load_denoiser, load_text_encoder, load_vae

    class Evil:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    folder = shutil.copytree(tiny_sd, tmp_path / "model")
    for file in (folder / part).glob("*.safetensors"):
        name = "pytorch_model.bin" if part == "text_encoder" else file.with_suffix(".bin").name
        torch.save(Evil(), folder / part / name)
        file.unlink()
    config = load_config(None, [f"model.pretrained_model_name_or_path={folder}"]).model
    load = {"unet": load_denoiser, "vae": load_vae, "text_encoder": load_text_encoder}[part]
    with pytest.raises(RaygardError, match="cannot load the"):
        load(config)
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------------- whose run it is


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a path another user's: really, where tests run as root, else by changing who we are."""

    def give(path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, 12345, 12345, follow_symlinks=False)
        else:
            monkeypatch.setattr(files, "own_users", lambda _: {12345})

    return give


def test_another_users_run_is_not_resumed(tmp_path: Path, others: Callable[[Path], None]) -> None:
    config, run = load_config(), tmp_path / "run"
    RunDirectory(run, config)
    RunDirectory.check(run, config)
    before = sorted(path.name for path in run.iterdir())
    others(run)
    for open_it in (RunDirectory.check, RunDirectory):
        with pytest.raises(RaygardError, match=r"belongs to another user .*checkpoints run code.*chown") as caught:
            open_it(run, config)
        assert str(caught.value).isprintable()
    assert sorted(path.name for path in run.iterdir()) == before


@pytest.mark.parametrize("link", [False, True])
def test_another_users_checkpoint_is_not_read(
    tmp_path: Path, others: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, link: bool
) -> None:
    """In a directory of our own, before Ray Train looks for a checkpoint and before Tune's state is read."""
    planted = tmp_path / "out" / "ray" / "train" / "checkpoint" / "state.pt"
    planted.parent.mkdir(parents=True)
    if link:
        (tmp_path / "elsewhere.pt").touch()
        planted.symlink_to(tmp_path / "elsewhere.pt")
        others(tmp_path / "elsewhere.pt")
    else:
        planted.touch()
        others(planted)
    monkeypatch.setattr(training, "require_resources", lambda _: None)
    with pytest.raises(RaygardError, match="belongs to another user"):
        training.fit(load_config(), lambda _: None, {}, tmp_path / "out", None)
    state = tmp_path / "search" / "tune" / "key" / "tuner.pkl"
    state.parent.mkdir(parents=True)
    state.touch()
    others(state)
    inputs = SimpleNamespace(key="key", folder=lambda point: tmp_path / "none")
    with pytest.raises(RaygardError, match="belongs to another user"):
        searching.run_trials(load_config(), inputs, tmp_path / "search", lambda *_: None)  # type: ignore[arg-type]


def test_a_file_system_that_renames_users_is_no_other_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems may write all files as one user: then our own files tell who we are there."""
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    files.require_own(tmp_path / "run", whole=True)
    files.require_own(tmp_path / "missing")


# --------------------------------------------------------------------------------------------- open ports


def test_whatever_starts_ray_asks_for_a_token() -> None:
    starters = []
    for path in sorted(path for path in (ROOT / "clusters").rglob("*") if path.is_file() and "cache" not in str(path)):
        text = path.read_text()
        if path.suffix == ".md" or not re.search(
            r"ray[\"',]* [\"']?start|\"ray\"\), \"start\"|^kind: Ray(Cluster|Job)", text, re.M
        ):
            continue
        starters.append(path.relative_to(ROOT / "clusters").as_posix())
        token = re.search(r"RAY_AUTH_MODE[\"']?[=:] ?[\"']?token|authOptions: ?\{?\s*mode: token", text)
        assert token, f"{path.name} starts Ray without a token"
    assert {"aws.yaml", "gcp.yaml", "local/cluster.py", "slurm/search.sbatch"} <= set(starters)
    assert {"kuberay/raycluster.yaml", "kuberay/rayjob.yaml"} <= set(starters)


def test_no_code_listens_on_all_interfaces() -> None:
    for path, name, call in calls():
        given = [*call.args, *(each.value for each in call.keywords)]
        assert not any(isinstance(each, ast.Constant) and each.value in ("0.0.0.0", "::") for each in given), path
        if name.endswith("listener.bind"):
            assert ast.unparse(call.args[0]).startswith("(LOOPBACK,"), path
        assert name.split(".")[-1] not in ("HTTPServer", "ThreadingHTTPServer", "create_server", "TCPServer"), path


# -------------------------------------------------------------------------------------- sensitive domains


def artifacts(run: Path) -> set[str]:
    return {path.name for path in (run / "mlartifacts").rglob("*") if path.is_file()}


def log_pictures(parent: RunHandle, run: Path) -> None:
    (run / "samples").mkdir(parents=True)
    picture = Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8))
    for ending in (".png", ".jpg", ".webp", ".gif", ".bmp", ".tiff"):
        picture.save(run / "samples" / f"sample{ending}")
        picture.save(run / f"single{ending}")
        parent.artifact(run / f"single{ending}", "pictures")
    np.savez(run / "samples.npz", images=np.zeros((1, 4, 4, 3), dtype=np.uint8))
    for path in (run / "samples", run / "samples.npz"):
        parent.artifact(path, "pictures")
    parent.artifact(run / "single.bmp", "plots", pictures=False)


def test_no_picture_of_a_sensitive_domain_reaches_mlflow(
    tiny_sd: Path, imagefolder: Maker, tmp_path: Path, empty_store: Path
) -> None:
    """On a real store; the mask, plots and the report, which shows none, are sent."""
    settings = [
        f"model.pretrained_model_name_or_path={tiny_sd}", f"domain.data={imagefolder({'a': 48, 'b': 48})}",
        "domain.illegal=[a]", "domain.legal=[b]", "domain.resolution=16", "mask.rule=largest-first",
        "domain.sensitive=true", "tracking.log_images=true",
    ]  # fmt: skip
    config, run, other = load_config(None, settings), tmp_path / "run", tmp_path / "other"
    RunDirectory(run, config)
    other.mkdir()
    for folder in (run, other):
        shutil.copy(empty_store, folder / "mlflow.db")
    flow = Flow(config, run)
    log_pictures(flow.parent, run)
    flow.learn_all()
    flow.report()
    assert flow.tracker.connected
    assert artifacts(run) == {"mask.json", "mask.safetensors", "report.html", "single.bmp"}
    log_pictures(Tracker.open(config.tracking, other, "run").start(), other)
    assert len(artifacts(other)) == 13


def test_the_report_of_a_sensitive_domain_shows_no_picture_and_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", n=2)
    # Only what has pictures: the plots take seconds to draw.
    for name in ("outcome.json", "learn", "relearn", "mask"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    build_report(run)
    shown = (run / "report.html").read_text()
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["domain"]["sensitive"] = True
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    build_report(run)
    hidden = (run / "report.html").read_text()
    assert "data:image" in shown and "data:image" not in hidden
    assert "marked sensitive" in hidden and "marked sensitive" not in shown
