"""What a training run hands Ray Train, and what it makes of the errors that come back."""

from __future__ import annotations

from pathlib import Path

import pytest

from raygard.cluster import training
from raygard.cluster.training import fit
from raygard.config import RunConfig
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
