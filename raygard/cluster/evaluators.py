"""What runs in the processes of an evaluation: the adaptation task, generation actors and scorer actors.

Plain functions and classes; `ray.remote` is put around them where they are started.
"""

from __future__ import annotations

import functools
import json
import os
import queue
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raygard.adaptation import get_adaptation
from raygard.config import GenerationConfig, ModelConfig, RunConfig
from raygard.diffusion.cache import load_cache
from raygard.diffusion.generate import generate
from raygard.diffusion.loss import DiffusionLoss, held_out_loss
from raygard.diffusion.model import load_noise_scheduler, load_pipeline, load_unet
from raygard.errors import RaygardError
from raygard.mask import FreezeMask
from raygard.mask.audit import audit_states
from raygard.scoring import get_scorer
from raygard.store import Store, read_pictures

# Draws of noise and timestep for each held-out picture at a milestone.
HELD_OUT_DRAWS = 4
# What a generator holds after a failed load: neither the base (None) nor any file.
UNKNOWN = ""


def environment(threads: int, gpus: float) -> dict[str, Any]:
    """Runtime environment of one process: its threads, and no device unless it asked for one.

    Ray itself leaves every device visible to a process that asked for none.
    """
    variables = {"OMP_NUM_THREADS": str(threads)}
    if not gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return {"env_vars": variables}


@dataclass(frozen=True)
class Adaptation:
    """One user's fine-tuning. Paths are on shared storage.

    mask: folder of the mask, None for full fine-tuning. untouched: nothing is trained, only the release's own
    held-out loss is taken. milestones: optimizer steps after which the held-out loss is taken; 0 is before training.
    held_out: hash of what the held-out loss is taken on.
    """

    key: str
    store: str
    config: dict[str, Any]
    cache: str
    cls: str
    adapt_part: str
    reference_part: str
    seed: int
    mask: str | None
    untouched: bool
    milestones: tuple[int, ...]
    held_out: str | None


def adapt_task(adaptation: Adaptation) -> Iterator[dict[str, Any]]:
    """Fine-tune; yield {"step", "loss"} at each milestone and last {"record": ...}, which is then in the store.

    Raises RaygardError where repeating is of no use (a broken mask, a loss that is not finite).
    """
    records: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    with ThreadPoolExecutor(1) as thread:
        # Adaptations report through a callback; a task streams what it yields. The thread turns one into the other.
        ending = thread.submit(_adapt, adaptation, records.put)
        ending.add_done_callback(lambda _: records.put(None))
        while (record := records.get()) is not None:
            yield record
        ending.result()


def _adapt(adaptation: Adaptation, emit: Callable[[dict[str, Any]], None]) -> None:
    config = RunConfig.model_validate(adaptation.config)
    torch.set_num_threads(config.engine.torch_threads)
    started = time.monotonic()
    unet, base = _unet(config.model.model_dump_json())
    unet.load_state_dict(base)
    unet.requires_grad_(True)
    data = _cache(adaptation.cache)
    scheduler = load_noise_scheduler(config.model)
    losses: dict[int, float] = {}

    def at_step(step: int, _loss: float = 0.0) -> None:
        if step in adaptation.milestones:
            rows = data.subset(data.rows(adaptation.cls, adaptation.reference_part))
            plain = DiffusionLoss(scheduler, config.model.prediction_type, None)
            batch = config.generation.batch_size
            losses[step] = held_out_loss(unet, rows, plain, config.seed, batch, HELD_OUT_DRAWS)
            emit({"step": step, "loss": losses[step]})

    at_step(0)
    record: dict[str, Any] = {"losses": [], "trainable_params": 0, "optimizer_bytes": 0, "audit_ok": None}
    tensors: dict[str, Tensor] | None = None
    if not adaptation.untouched:
        mask = FreezeMask.load(adaptation.mask) if adaptation.mask else None
        loss = DiffusionLoss(scheduler, config.model.prediction_type, config.adapt.snr_gamma)
        rows = data.subset(data.rows(adaptation.cls, adaptation.adapt_part))
        adapt = get_adaptation(config.adapt.method)
        result = adapt(unet, rows, config.adapt, loss, mask=mask, seed=adaptation.seed, on_step=at_step)
        state = {name: tensor.detach().cpu() for name, tensor in unet.state_dict().items()}
        tensors = {name: t for name, t in state.items() if name not in base or not torch.equal(t, base[name])}
        record |= {
            "losses": [round(float(value), 6) for value in result.losses],
            "trainable_params": result.trainable_params,
            "optimizer_bytes": result.optimizer_bytes,
        }
        if mask is not None:
            record["audit_ok"] = audit_states(mask.frozen_names, {**base, **mask.values}, state).ok
    store = Store(Path(adaptation.store))
    before = store.adapted(adaptation.key) or {"held_out": adaptation.held_out, "milestones": []}
    held_out = adaptation.held_out or before["held_out"]
    if before["held_out"] == held_out:
        losses = {**dict(before["milestones"]), **losses}
    record["milestones"] = sorted([step, loss] for step, loss in losses.items())
    record |= {"held_out": held_out, "seconds": round(time.monotonic() - started, 3)}
    needed = not store.has_pictures(adaptation.key)
    store.write_adapted(adaptation.key, record, tensors if needed else None)
    emit({"record": record})


@dataclass(frozen=True)
class PictureRequest:
    """Pictures of one item. adapted: file of tensors that replace the base's; None for the untouched base."""

    adapted: str | None
    captions: tuple[str, ...]
    keys: tuple[str, ...]
    generation: dict[str, Any]
    seed: int


class GeneratorActor:
    """Holds one pipeline and the weights of the last request, so that the next item with them starts at once."""

    def __init__(self, model: dict[str, Any], threads: int, gpus: float) -> None:
        self.model, self.threads, self.gpus = ModelConfig.model_validate(model), threads, gpus
        self._pipeline: Any = None
        self._base: dict[str, Tensor] = {}
        self._holds: str | None = None

    def ready(self) -> dict[str, Any]:
        """Load the pipeline, unless that is done; return facts about the process."""
        if self._pipeline is None:
            torch.set_num_threads(self.threads)
            unet = load_unet(self.model)
            self._base = _copy(unet.state_dict())
            self._pipeline = load_pipeline(self.model, unet=unet).to(_device(self.gpus))
        return _facts()

    def generate(self, request: PictureRequest) -> tuple[dict[str, Any], NDArray[np.uint8]]:
        """Seconds it took, and pictures uint8 (n, H, W, 3); start it with two returns, so that only the first
        travels back. Raises RaygardError if the weights cannot be read."""
        started = time.monotonic()
        self._load(request.adapted)
        generation = GenerationConfig.model_validate(request.generation)
        images = generate(self._pipeline, request.captions, request.keys, generation, request.seed)
        return {"seconds": time.monotonic() - started}, images

    def _load(self, adapted: str | None) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if adapted == self._holds:
            return
        self._holds = UNKNOWN
        try:
            changed = load_file(adapted) if adapted is not None else {}
            self._pipeline.unet.load_state_dict({**self._base, **changed})
        except (OSError, SafetensorError, RuntimeError) as error:
            raise RaygardError(f"cannot load the adapted weights {adapted}: {str(error).splitlines()[0]}") from None
        self._holds = adapted


@dataclass(frozen=True)
class ScoreRequest:
    """rows: half-open range of the saved pictures; None if the pictures themselves are sent along."""

    cls: str
    references: str
    saved: str | None = None
    rows: tuple[int, int] = (0, 0)


class ScorerActor:
    """Holds one evaluation network and the embeddings of the references it has seen."""

    def __init__(self, scorer: str, threads: int, gpus: float) -> None:
        self.name, self.threads, self.gpus = scorer, threads, gpus
        self._scorer: Any = None
        self._references: dict[tuple[str, int, str], NDArray[np.float32]] = {}

    def ready(self) -> dict[str, Any]:
        """Load the network, unless that is done; return facts about the process."""
        if self._scorer is None:
            torch.set_num_threads(self.threads)
            self._scorer = get_scorer(self.name, _device(self.gpus))
        return _facts()

    def score(self, request: ScoreRequest, pictures: NDArray[np.uint8] | None = None) -> dict[str, Any]:
        """Distance of each picture, uint8 (n, H, W, 3), to the references of its class: {"distances", "seconds"}.

        Raises RaygardError if a distance is not finite.
        """
        started = time.monotonic()
        if pictures is None:
            pictures = read_pictures(str(request.saved))[slice(*request.rows)]
        distances = self._scorer.distances(self._scorer.embed(pictures), self._embedded(request))
        if len(distances) != len(pictures) or not np.isfinite(distances).all():
            raise RaygardError(f"scorer {self.name} did not give one finite distance for each picture")
        return {"distances": [float(d) for d in distances], "seconds": time.monotonic() - started}

    def _embedded(self, request: ScoreRequest) -> NDArray[np.float32]:
        # A references file of another run may come to lie at the same path.
        key = (request.references, Path(request.references).stat().st_mtime_ns, request.cls)
        if key not in self._references:
            self._references[key] = self._scorer.embed(read_references(request.references, request.cls)[1])
        return self._references[key]


def read_references(path: str | Path, cls: str) -> tuple[list[str], NDArray[np.uint8]]:
    """Captions and reference pictures, uint8 (n, H, W, 3), of one class. Raises RaygardError if they are not there."""
    file = Path(path)
    try:
        index = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        with np.load(file, allow_pickle=False) as arrays:
            return index["captions"][cls], arrays[str(index["classes"].index(cls))]
    except (OSError, ValueError, KeyError) as error:
        raise RaygardError(f"no reference pictures of class '{cls}' in {file}: {error}") from None


def save_task(store: str, key: str, *parts: NDArray[np.uint8]) -> None:
    """Write all pictures of a job, in order."""
    Store(Path(store)).write_pictures(key, np.concatenate(parts))


def _facts() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": os.uname().nodename,
        "threads": torch.get_num_threads(),
        "devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


def _device(gpus: float) -> str:
    if not gpus:
        return "cpu"
    if not torch.cuda.is_available():
        raise RaygardError("an evaluation actor was given a GPU, but torch sees none in its process; check the driver")
    return "cuda"


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


@functools.lru_cache(maxsize=1)
def _unet(model_json: str) -> tuple[Any, dict[str, Tensor]]:
    unet = load_unet(ModelConfig.model_validate_json(model_json))
    return unet, _copy(unet.state_dict())


@functools.lru_cache(maxsize=2)
def _cache(path: str) -> Any:
    return load_cache(Path(path))
