"""The publisher's own users as Ray tasks: each fine-tunes the release and leaves a sketch of what it moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raygard.adaptation import Release, get_adaptation
from raygard.cluster.errors import user_mistake
from raygard.cluster.evaluation import remote_task
from raygard.cluster.evaluators import device_for
from raygard.cluster.pool import reason
from raygard.config import RunConfig
from raygard.diffusion.cache import load_cache
from raygard.diffusion.model import load_denoiser, load_loss
from raygard.errors import RaygardError
from raygard.files import scratch
from raygard.mask import FreezeMask
from raygard.traces import Reference, Sketcher, Update


@dataclass(frozen=True)
class TraceUser:
    """One user. rows: of the cache. word: the name the pictures are learned under instead of their class's; None: that.

    steps: optimizer steps. group: `Reference.group`.
    """

    cls: str
    forbidden: bool
    rows: tuple[int, ...]
    word: str | None
    steps: int
    seed: int
    group: int = 0


def trace_task(
    config_dict: dict[str, Any], user: TraceUser, cache: str, mask: str | None, sketcher: Sketcher, out: str
) -> None:
    """Let one user fine-tune the release, which carries the values of `mask`, and write its sketches to `out`."""
    from safetensors.numpy import save_file

    config = RunConfig.model_validate(config_dict)
    torch.set_num_threads(config.engine.torch_threads)
    denoiser = load_denoiser(config.model)
    if mask is not None:
        # Its values belong to the release; a user who is looked for may train every tensor.
        FreezeMask.load(mask).apply(denoiser).requires_grad_(True)
    base = {name: tensor.detach().clone() for name, tensor in denoiser.named_parameters()}
    denoiser.to(device_for(config.evaluation.gpus_per_job))
    changed: dict[str, Any] = {"max_train_steps": user.steps}
    if user.word is not None:
        changed["learn_as"] = user.word
    settings = config.adapt.model_copy(update=changed)
    rows, loss = load_cache(cache).subset(list(user.rows)), load_loss(config.model, settings.snr_gamma)
    release = Release(config.model)
    get_adaptation(settings.method)(denoiser, rows, settings, loss, mask=None, seed=user.seed, release=release)
    tuned = dict(denoiser.named_parameters())
    with scratch(Path(out)) as file:
        save_file(dict(sketcher.update(base, tuned).tensors), str(file))


def run_users(
    config: RunConfig,
    users: Sequence[TraceUser],
    cache: Path,
    mask: Path | None,
    sketcher: Sketcher,
    folder: Path,
    *,
    on_done: Callable[[TraceUser], None] = lambda _: None,
) -> list[Reference]:
    """Let all users train, as many at a time as the cluster has room for; what lies in `folder` is not done again.

    Paths are on shared storage. Raises RaygardError with the reason when a user has failed `evaluation.max_attempts`
    times, or by a user's mistake.
    """
    import ray
    from safetensors.numpy import load_file

    task = remote_task(trace_task, config)
    files = [folder / f"{number:04d}.safetensors" for number in range(len(users))]
    attempts = dict.fromkeys(range(len(users)), 0)
    running: dict[Any, int] = {}

    def submit(number: int) -> None:
        attempts[number] += 1
        arguments = config.model_dump(mode="json"), users[number], str(cache), None if mask is None else str(mask)
        running[task.remote(*arguments, sketcher, str(files[number]))] = number

    try:
        for number, file in enumerate(files):
            if file.exists():
                on_done(users[number])
            else:
                submit(number)
        while running:
            (ended,), _ = ray.wait(list(running), num_returns=1)
            number = running.pop(ended)
            try:
                ray.get(ended)
            except ray.exceptions.RayError as error:
                if user_mistake(error) is not None or attempts[number] >= config.evaluation.max_attempts:
                    raise RaygardError(f"a user of '{users[number].cls}': {reason(error)}") from None
                submit(number)
            else:
                on_done(users[number])
    finally:
        for task_ in running:
            ray.cancel(task_, force=True)
    return [
        Reference(user.cls, user.forbidden, Update(load_file(str(file))), user.group)
        for user, file in zip(users, files, strict=True)
    ]
