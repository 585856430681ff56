"""What a training run hands Ray Train, and what it makes of the errors that come back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from raygard.cluster import training, worker
from raygard.cluster.imma import workers
from raygard.cluster.training import fit
from raygard.cluster.worker import save_tensors
from raygard.config import RunConfig
from raygard.config_file import load_config
from raygard.diffusion.model import load_denoiser
from raygard.editing import IMMASettings
from raygard.errors import RaygardError


def test_a_users_mistake_in_a_worker_ends_the_run_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray Train repeats what a worker raises, but not what a callback makes of it."""
    from ray.train import ControllerError

    def fails(trainer, engine) -> None:
        for callback in trainer.run_config.callbacks:
            callback.after_exception(None, {0: RuntimeError("a connection was lost")})
        with pytest.raises(RaygardError) as mistake:
            trainer.run_config.callbacks[-1].after_exception(
                None, {0: RuntimeError("aborted"), 1: RaygardError("no room; make some")}
            )
        raise ControllerError(mistake.value)

    monkeypatch.setattr(training, "require_resources", lambda engine: None)
    monkeypatch.setattr(training, "fit_in_bounded_time", fails)
    with pytest.raises(RaygardError) as caught:
        fit(RunConfig(), print, {}, tmp_path / "out", None)
    assert str(caught.value) == "no room; make some"


def test_a_full_disk_leaves_nothing_half_written_of_what_was_relearned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_sd: Path
) -> None:
    config = load_config(None, [f"model.pretrained_model_name_or_path={tiny_sd}"])
    parts = {f"0:{name}": p.detach().flatten() for name, p in load_denoiser(config.model).named_parameters()}

    def full(_: object, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(training, "fit", lambda *_: None)
    save_tensors(parts, tmp_path / "parts" / "rank-00000.safetensors")
    monkeypatch.setattr("raygard.cluster.worker.save_file", full)
    with pytest.raises(RaygardError, match="no space left"):
        training.relearn(config, tmp_path, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


def test_a_training_that_had_come_to_its_end_is_not_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its checkpoints are gone by then, and its stage may have been cut off before it was marked as finished."""

    def never(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "fit", never)
    save_tensors({"logits": torch.zeros(3), "soft": torch.ones(3)}, tmp_path / "logits.safetensors")
    save_tensors({"w": torch.zeros(3)}, tmp_path / "relearned.safetensors")
    logits, soft = training.learn(RunConfig(), tmp_path, tmp_path, 0, tmp_path)
    assert logits.tolist() == [0.0] * 3 and soft.tolist() == [1.0] * 3
    (tmp_path / "ray").mkdir()
    assert training.relearn(RunConfig(), tmp_path, tmp_path) == tmp_path / "relearned.safetensors"
    assert not (tmp_path / "ray").exists()


@pytest.mark.parametrize(
    ("batch", "settings", "room", "expected"),
    [
        (1, ("engine.num_workers=4",), 4, 1),
        (6, ("engine.num_workers=4",), 4, 2),
        (6, ("engine.num_workers=4",), 1, 2),
        (8, ("engine.num_workers=4", "engine.min_workers=1"), 4, 4),
        (8, ("engine.num_workers=4", "engine.min_workers=1"), 3, 2),
        (8, ("engine.num_workers=4", "engine.min_workers=3"), 3, 2),
        (8, ("engine.num_workers=4", "engine.min_workers=1"), 0, 1),
    ],
)
def test_imma_takes_as_many_workers_as_divide_its_batch_and_have_room(
    batch: int, settings: tuple[str, ...], room: int, expected: int
) -> None:
    """Only an elastic run may have fewer than it asks for; without room for one, it says so as any other."""
    config = load_config(None, [*settings, "bilevel.train_batch_size=24"])
    assert workers(IMMASettings(train_batch_size=batch), config.engine, [{"CPU": float(room)}]) == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_what_killed_workers_left_is_removed_at_the_next_start(
    rank: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Copies of state that a killed worker had not handed to Ray Train yet are as large as a checkpoint."""
    import ray.train.collective
    import ray.train.torch

    monkeypatch.setattr(ray.train.collective, "broadcast_from_rank_zero", lambda value: value)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: "cpu")
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    monkeypatch.setattr(worker, "first_whole", lambda *_: None)
    monkeypatch.setattr(worker.dist, "get_rank", lambda: rank)
    for name in ("rank-abc/state", "train/checkpoint_half", "train/other"):
        (tmp_path / "ray" / name).mkdir(parents=True)
    assert worker.last_checkpoint(tmp_path) is None
    left = {path.relative_to(tmp_path / "ray").as_posix() for path in (tmp_path / "ray").glob("**/*")}
    assert left == ({"train", "train/other"} if rank == 0 else {
        "rank-abc", "rank-abc/state", "train", "train/checkpoint_half", "train/other"
    })  # fmt: skip
