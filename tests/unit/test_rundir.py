"""A run directory: finished stages stay, changed ones start anew, other configurations and full disks are refused."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from raygard import rundir as rundir_module
from raygard.config import RunConfig
from raygard.config_file import load_config
from raygard.errors import RaygardError
from raygard.files import readable_disk_errors, write_text
from raygard.mask import FreezeMask
from raygard.rundir import INPUTS, SUCCESS, RunDirectory

CONFIG = RunConfig()


class Interrupted(BaseException):
    pass


def refused(path: Path, config: RunConfig = CONFIG) -> str:
    with pytest.raises(RaygardError) as caught:
        RunDirectory(path, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def work(run: RunDirectory, name: str, inputs: dict[str, object], text: str = "x") -> bool:
    """Run a stage that writes one file; return whether it had to be run."""
    with run.stage(name, inputs) as (folder, done):
        if not done:
            (folder / "result").write_text(text)
        return not done


def interrupted(run: RunDirectory, name: str, inputs: dict[str, object]) -> None:
    with pytest.raises(Interrupted), run.stage(name, inputs) as (folder, done):
        assert not done
        (folder / "checkpoint").write_text("half")
        raise Interrupted


def test_a_new_run_says_what_it_is(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "a" / "run", CONFIG)
    assert load_config(run / "config.yaml") == CONFIG
    info = json.loads((run / "run.json").read_text())
    assert {"raygard_version", "versions", "config_hash", "started"} <= info.keys()
    assert {"python", "torch"} <= info["versions"].keys()


def test_opening_again_keeps_what_was_noted(tmp_path: Path) -> None:
    RunDirectory(tmp_path, CONFIG).note(extra=1)
    before = json.loads((tmp_path / "run.json").read_text())
    RunDirectory(tmp_path, CONFIG).note(more=2)
    assert json.loads((tmp_path / "run.json").read_text()) == {**before, "more": 2}


@pytest.mark.parametrize("reopen", [False, True])
@pytest.mark.parametrize("name", ["relearn", "learn/seed-0"])
def test_a_finished_stage_is_not_run_again(tmp_path: Path, reopen: bool, name: str) -> None:
    run = RunDirectory(tmp_path, CONFIG)
    assert work(run, name, {"a": 1, "b": [2]}, "first")
    again = RunDirectory(tmp_path, CONFIG) if reopen else run
    assert not work(again, name, {"b": [2], "a": 1}, "second")
    assert (tmp_path / name / "result").read_text() == "first"
    assert name in json.loads((tmp_path / "run.json").read_text())["seconds"]


def test_changed_inputs_start_from_an_empty_folder(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, CONFIG)
    work(run, "learn", {"a": 1})
    (tmp_path / "learn" / "old").write_text("old")
    assert work(run, "learn", {"a": 2})
    assert set(files(tmp_path / "learn")) == {"result", INPUTS, SUCCESS}
    assert not work(run, "learn", {"a": 2})
    assert work(run, "learn", {"a": 1})


def test_an_interrupted_stage_keeps_its_folder_and_runs_again(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, CONFIG)
    interrupted(run, "learn", {"a": 1})
    with RunDirectory(tmp_path, CONFIG).stage("learn", {"a": 1}) as (folder, done):
        assert not done and (folder / "checkpoint").read_text() == "half"
    assert not work(run, "learn", {"a": 1})


def test_an_interrupted_stage_of_other_inputs_leaves_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, CONFIG)
    interrupted(run, "learn", {"a": 1})
    assert work(run, "learn", {"a": 2})
    assert not (tmp_path / "learn" / "checkpoint").exists()


def test_a_folder_that_is_only_half_removed_is_never_taken_for_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path, CONFIG)
    work(run, "learn", {"a": 1})

    def killed(folder: Path) -> None:
        (folder / "result").unlink()
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(rundir_module.shutil, "rmtree", killed)
        with pytest.raises(Interrupted):
            work(run, "learn", {"a": 2})
    assert work(run, "learn", {"a": 1})
    assert (tmp_path / "learn" / "result").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"inputs": 1}'])
def test_a_damaged_mark_means_not_finished(tmp_path: Path, text: str) -> None:
    run = RunDirectory(tmp_path, CONFIG)
    work(run, "learn", {"a": 1})
    (tmp_path / "learn" / SUCCESS).write_text(text)
    (tmp_path / "run.json").write_text(text)
    assert work(RunDirectory(tmp_path, CONFIG), "learn", {"a": 1})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mask.freeze_ratio=0.5", "mask.freeze_ratio was 0.3, now 0.5"),
        ("seed=1", "seed was 0, now 1"),
        ("domain.illegal=[x, y]", "domain.illegal was 'OpenMoji,Noto Line', now 'x,y'"),
        ("bilevel.snr_gamma=5", "bilevel.snr_gamma was None, now 5.0"),
    ],
)
def test_another_configuration_is_refused_and_nothing_is_touched(tmp_path: Path, override: str, message: str) -> None:
    work(RunDirectory(tmp_path, CONFIG), "learn", {})
    before = files(tmp_path)
    assert message in refused(tmp_path, load_config(None, [override]))
    assert files(tmp_path) == before


def test_tracking_may_change(tmp_path: Path) -> None:
    RunDirectory(tmp_path, CONFIG)
    other = load_config(None, ["tracking.tracking_uri=http://x", "tracking.enabled=false"])
    RunDirectory(tmp_path, other)
    assert load_config(tmp_path / "config.yaml") == other


@pytest.mark.parametrize("content", [b"", b"[]", b"seed: [", b"seed: 2020-13-45", b"\xff", b"unknown: 1", None])
def test_a_damaged_configuration_is_refused(tmp_path: Path, content: bytes | None) -> None:
    RunDirectory(tmp_path, CONFIG)
    (tmp_path / "config.yaml").unlink()
    if content is None:
        (tmp_path / "config.yaml").mkdir()
    else:
        (tmp_path / "config.yaml").write_bytes(content)
    assert "is damaged or of another raygard version" in refused(tmp_path)


def test_a_folder_that_is_no_run_is_refused_and_not_touched(tmp_path: Path) -> None:
    folder = tmp_path / "holidays"
    folder.mkdir()
    (folder / "beach.jpg").write_text("mine")
    assert "is not empty and is not a raygard run" in refused(folder)
    assert files(folder) == {"beach.jpg": b"mine"}
    assert "not a raygard run" in refused(folder / "beach.jpg")
    assert "cannot write to" in refused(folder / "beach.jpg" / "run")
    assert "cannot write to" in refused(tmp_path / ("x" * 300))


def test_too_little_space_is_said_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir_module, "MIN_FREE_BYTES", 2**60)
    assert "MiB free, a run needs at least" in refused(tmp_path / "a" / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("function", ["replace", "write"])
def test_a_full_disk_leaves_the_old_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, function: str
) -> None:
    file = tmp_path / "file"
    write_text(file, "old")

    def full(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    owner = os if function == "replace" else Path
    monkeypatch.setattr(owner, "replace" if function == "replace" else "write_text", full)
    message = r"no space left while writing .*same command again"
    with pytest.raises(RaygardError, match=message), readable_disk_errors(file):
        write_text(file, "new")
    assert files(tmp_path) == {"file": b"old"}


def test_a_full_disk_within_a_stage_is_one_line_and_the_stage_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path, CONFIG)
    real = write_text

    def full(path: Path, text: str) -> None:
        if path.name == refuse:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, text)

    monkeypatch.setattr(rundir_module, "write_text", full)
    for refuse in (INPUTS, SUCCESS, "run.json"):
        with pytest.raises(RaygardError, match="no space left"):
            work(run, f"stage {refuse}", {})
        assert (tmp_path / f"stage {refuse}" / SUCCESS).exists() == (refuse == "run.json")


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), readable_disk_errors(tmp_path):
        (tmp_path / "none").read_text()
    with pytest.raises(RaygardError, match=r"cannot write to .*Permission denied"), readable_disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    ) if os.geteuid() == 0 else None  # fmt: skip
    if mount is None or mount.returncode != 0:
        pytest.skip("may not mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path, left: int = 0) -> None:
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filler").write_bytes(b"x" * (free - left))


@pytest.mark.faults
def test_a_disk_that_is_really_full(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "MiB free" in refused(small_disk / "run")
    monkeypatch.setattr(rundir_module, "MIN_FREE_BYTES", 0)
    run = RunDirectory(small_disk / "run", CONFIG)
    mask = FreezeMask.create(nn.Linear(2, 2), ["bias"])
    mask.save(run / "mask")
    write_text(run / "file", "old")
    fill(small_disk)
    before = files(small_disk / "run")
    with pytest.raises(RaygardError, match="no space left"), readable_disk_errors(run.path):
        write_text(run / "file", "new" * 4096)
    with pytest.raises(RaygardError, match="no space left"):
        FreezeMask.create(nn.Linear(9, 9), ["bias"]).save(run / "mask")
    with pytest.raises(RaygardError, match="no space left"), run.stage("relearn", {}) as (folder, _):
        save_file({"x": torch.zeros(2**16)}, str(folder / "x.safetensors"))
    assert not (run / "relearn" / SUCCESS).exists()
    assert {name: data for name, data in files(small_disk / "run").items() if "relearn" not in name} == before
    (small_disk / "filler").unlink()
    assert FreezeMask.load(run / "mask").frozen_names == ("bias",)
    assert work(RunDirectory(small_disk / "run", CONFIG), "relearn", {})


@pytest.mark.faults
def test_safetensors_on_a_full_disk_is_one_line(small_disk: Path) -> None:
    fill(small_disk, left=4096)
    with pytest.raises(RaygardError, match="no space left"), readable_disk_errors(small_disk):
        save_file({"x": torch.zeros(2**16)}, str(small_disk / "x.safetensors"))


def test_the_configuration_on_disk_is_plain_yaml(tmp_path: Path) -> None:
    RunDirectory(tmp_path, CONFIG)
    data = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert data["mask"]["freeze_ratio"] == 0.3 and data["domain"]["illegal"] == ["OpenMoji", "Noto Line"]


def test_a_directory_another_process_works_in_is_refused_until_that_process_ends(tmp_path) -> None:
    code = (
        "import sys; from raygard.config import RunConfig; from raygard.rundir import RunDirectory; "
        "held = RunDirectory(sys.argv[1], RunConfig()); print('open', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "open\n"
    with pytest.raises(RaygardError, match=rf"in use by another raygard process \(.*process {other.pid}\)"):
        RunDirectory(tmp_path / "run", RunConfig())
    other.kill()
    other.wait(30)
    first = RunDirectory(tmp_path / "run", RunConfig())
    second = RunDirectory(tmp_path / "run", RunConfig())
    del first
    assert run_in_another_process(code, tmp_path).returncode != 0
    del second
    assert run_in_another_process(code, tmp_path).returncode == 0


def run_in_another_process(code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdin=subprocess.DEVNULL, capture_output=True, timeout=60
    )
