"""Names from elsewhere cannot leave their folder: of pictures, of a mask's files, of shards, classes and runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from raygard.cluster.jobs import EvaluationJob
from raygard.config_file import load_config
from raygard.diffusion.model import model_folder, resolve_model
from raygard.errors import RaygardError
from raygard.files import named_inside
from raygard.imagefolder import read_entries, resolve_data
from raygard.mask import FreezeMask
from raygard.mask.artifact import ARRAYS, MANIFEST
from raygard.mask.weights import load_denoiser_state
from raygard.search_flow import search_folders
from raygard.tracking import Tracker
from tests.conftest import Maker

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PIECES = ["..", ".", "", "a", "a.png", "~", "C:", "c:\\", "\\", "\\\\host", "\x00", "\n", "/", "//", "etc", "passwd",
          "link", "\ud800", "\u2215", "CON", "%2e%2e", "outside.png"]  # fmt: skip
names = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=6).map("/".join) | st.text(max_size=12)
OUT = ["/etc/passwd", "../outside.png", "a/../../outside.png", "link/outside.png", "..\\outside.png", "C:\\x.png",
       "C:/x.png",
       "\\\\host\\x.png", "a/\x00.png", "", "/", "..", "a/.."]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a link that leads out, to a folder that has a picture."""
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "a.png").touch()
    (tmp_path / "outside.png").touch()
    (tmp_path / "data" / "link").symlink_to(tmp_path)
    return tmp_path / "data"


@QUICK
@given(name=names)
@example(name="a/a.png")
@example(name="link/outside.png")
def test_a_picture_lies_in_its_folder_or_is_refused(folder: Path, name: str) -> None:
    for table, content in (
        ("metadata.jsonl", json.dumps({"file_name": name, "text": "x", "class": "c"})),
        ("metadata.csv", 'file_name,text,class\n"{}",x,c\n'.format(name.replace('"', '""'))),
    ):
        (folder / table).write_bytes(content.encode("utf-8", "surrogatepass"))
        try:
            (entry,) = read_entries(folder, "text", "class")
        except RaygardError as error:
            assert str(error).isprintable()
        else:
            assert entry.path.resolve().is_relative_to(folder.resolve()) and entry.path.is_file()
        (folder / table).unlink()


@pytest.mark.parametrize("name", OUT)
def test_names_that_lead_out_are_refused_in_every_table(folder: Path, name: str) -> None:
    row = {"file_name": name, "text": "x", "class": "c"}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(RaygardError, match="line 1"):
        read_entries(folder, "text", "class")


@QUICK
@given(name=names)
def test_a_name_that_passes_stays_inside_on_every_system(name: str) -> None:
    from pathlib import PureWindowsPath

    try:
        path = named_inside(Path("/folder"), name, "name")
    except RaygardError as error:
        assert str(error).isprintable()
        return
    assert os.path.normpath(path) == "/folder" or os.path.normpath(path).startswith("/folder/")
    windows = PureWindowsPath(name)
    assert not windows.drive and not windows.root and ".." not in windows.parts and "\0" not in name


@QUICK
@given(name=names)
@example(name="../mask.safetensors")
@example(name="/tmp/mask.safetensors")
def test_a_mask_has_files_of_its_own_folder_only(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "mask"
    if not folder.exists():
        FreezeMask.create(nn.Linear(2, 3), ["bias"]).save(folder)
        (tmp_path / "kept.json").write_bytes((folder / MANIFEST).read_bytes())
    manifest = json.loads((tmp_path / "kept.json").read_text())
    manifest["files"] = {name: manifest["files"][ARRAYS]}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(RaygardError) as caught:
        FreezeMask.load(folder)
    assert str(caught.value).isprintable()


def test_a_mask_is_not_read_from_what_never_ends(tmp_path: Path) -> None:
    folder = FreezeMask.create(nn.Linear(2, 3), ["bias"]).save(tmp_path / "mask")
    for make in (lambda path: path.symlink_to("/dev/zero"), os.mkfifo):
        (folder / MANIFEST).unlink()
        make(folder / MANIFEST)
        with pytest.raises(RaygardError, match=r"no readable mask\.json"):
            FreezeMask.load(folder)


@QUICK
@given(name=names)
@example(name="../x.safetensors")
def test_a_shard_lies_beside_its_index(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "unet"
    folder.mkdir(exist_ok=True)
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    save_file({"x": torch.ones(1)}, folder / "x.safetensors")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(RaygardError) as caught:
        load_denoiser_state(folder)
    assert str(caught.value).isprintable()
    index.write_text(json.dumps({"weight_map": {"x": "x.safetensors"}}))
    assert set(load_denoiser_state(folder)) == {"x"}


@QUICK
@given(cls=names)
def test_the_folder_of_a_job_is_one_level_below_the_jobs(cls: str) -> None:
    """Class names come from tables."""
    job_id = EvaluationJob("none", cls.encode("utf-8", "ignore").decode(), "illegal").job_id
    assert Path("/jobs", job_id).parent == Path("/jobs") and job_id not in ("", ".", "..") and "\0" not in job_id
    assert "/" not in job_id and "\\" not in job_id


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "/x", "C:\\x", "a\\b", ".", "\x00"])
def test_domains_searched_together_have_folders_of_their_own(tmp_path: Path, name: str) -> None:
    configs = [load_config(None, [f"domain.name={json.dumps(each)}"]) for each in (name, "other")]
    try:
        folders = search_folders(configs, tmp_path)
    except RaygardError as error:
        assert str(error).isprintable()
    else:
        assert all(folder.resolve().parent == tmp_path.resolve() for folder in folders)


@QUICK
@given(name=names)
def test_artifacts_in_mlflow_stay_in_their_run(tmp_path: Path, name: str) -> None:
    run = Tracker(tmp_path, "run", enabled=False).start()
    (tmp_path / "x.txt").touch()
    try:
        run.artifact(tmp_path / "x.txt", name)
    except RaygardError as error:
        assert str(error).isprintable()
    else:
        assert os.path.normpath(f"/run/{name}").startswith("/run") and ".." not in name.replace("\\", "/").split("/")


@QUICK
@given(name=names)
def test_what_is_bundled_is_found_in_the_zoo_only(name: str) -> None:
    name = name.encode("utf-8", "ignore").decode()
    for find in (resolve_data, resolve_model):
        with pytest.raises(RaygardError) as caught:
            find(f"zoo:{name}x")
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("part", "source", "file", "message"),
    [
        ("scheduler", ["evil", "Evil"], "evil.py", "'scheduler' is of 'evil'"),
        ("scheduler", ["os", "system"], None, "'scheduler' is of 'os'"),
        ("scheduler", ["diffusers", "DDIMScheduler"], "diffusers.py", "code of a model is never run"),
        ("../x", ["diffusers", "DDIMScheduler"], None, "must be a path inside the folder"),
        ("scheduler", [{}, "x"], None, "'scheduler' is of {}"),
    ],
)
def test_a_model_brings_no_code(
    tmp_path: Path, part: str, source: list[object], file: str | None, message: str
) -> None:
    folder = tmp_path / "model"
    (folder / "scheduler").mkdir(parents=True)
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0", part: source}
    (folder / "model_index.json").write_text(json.dumps(index))
    if file is not None:
        (folder / "scheduler" / file).write_text("raise SystemExit('ran')\n")
    config = load_config(None, [f"model.pretrained_model_name_or_path={folder}"])
    with pytest.raises(RaygardError, match=message):
        model_folder(config.model)


def test_class_folders_cannot_lead_out(imagefolder: Maker, tmp_path: Path) -> None:
    folder = imagefolder({"a": 2})
    (folder / "metadata.jsonl").unlink()
    outside = imagefolder({"b": 2}, name="elsewhere")
    assert {entry.cls for entry in read_entries(folder, "text", "class")} == {"a"}
    (folder / "b").symlink_to(outside / "b")
    with pytest.raises(RaygardError, match="is a link that leaves the folder"):
        read_entries(folder, "text", "class")
