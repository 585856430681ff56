"""What runs in the processes of an evaluation: the adaptation task, generation actors and scorer actors.

Plain functions and classes; `ray.remote` is put around them where they are started.
"""

from __future__ import annotations

import copy
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

from raygard.adaptation import Release, get_adaptation, learned, teach
from raygard.cluster.memory import PeakMemory
from raygard.config import GenerationConfig, ModelConfig, RunConfig
from raygard.diffusion.cache import load_cache
from raygard.diffusion.generate import generate
from raygard.diffusion.loss import held_out_loss
from raygard.diffusion.model import denoiser_of, load_denoiser, load_loss, load_pipeline
from raygard.editing import Edit
from raygard.errors import RaygardError
from raygard.files import read_array
from raygard.mask import FreezeMask
from raygard.mask.audit import audit_states
from raygard.scoring import embed_references, face_detection, get_scorer
from raygard.store import Store, read_pictures
from raygard.values.batches import general_rows

# Draws of noise and timestep for each held-out picture at a milestone.
HELD_OUT_DRAWS = 4
# The same for the release's loss on general classes, of which there are many pictures.
BASE_LOSS_DRAWS = 1
# An adaptation gives this many signs of life in the time after which silence ends it.
SIGNS_OF_LIFE = 10
# What a generator holds after a failed load: neither the base (None) nor any file.
UNKNOWN = ""
# Marks the embedding of a new token among the tensors of an adaptation.
TOKEN = "token:"
# Where a store keeps what releases draw for prior preservation.
CLASS_PICTURES = "class-pictures"


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

    mask: folder of the mask, None for full fine-tuning. edit: file of an edit of the released values, None for the
    original ones. untouched: nothing is trained, only the release's own
    held-out loss is taken. milestones: optimizer steps after which the held-out loss is taken; 0 is before training.
    held_out: hash of what the held-out loss is taken on. pause_at: step after which to pause and write down all that
    is needed to go on; None runs to the end. A task goes on from where another of the same key has paused.
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
    pause_at: int | None = None
    edit: str | None = None


def adapt_task(adaptation: Adaptation) -> Iterator[dict[str, Any]]:
    """Fine-tune; yield {"step", "loss", "seconds"} at each milestone, seconds being those of the adaptation so far.

    Last comes {"record": ...}, which is then in the store, unless it pauses before its end. In between {"alive": step}:
    at the start, and after optimizer steps, ten times within `evaluation.item_timeout_s`.
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
    signed = time.monotonic()
    emit({"alive": 0})
    pristine = _denoiser(config.model.model_dump_json())
    base = pristine.state_dict()
    # Training leaves more than weights behind: gradients, hooks, a replaced `forward`.
    denoiser = copy.deepcopy(pristine).to(device_for(config.evaluation.gpus_per_job))
    values: Mapping[str, Tensor] = {}
    if adaptation.edit is not None:
        edit = Edit.load(adaptation.edit)
        edit.apply(denoiser)
        values = edit.values
    peak = PeakMemory()
    data = _cache(adaptation.cache)
    plain = load_loss(config.model)
    store, before = Store(Path(adaptation.store)), _paused(adaptation)
    losses: dict[int, float] = dict(before["milestones"]) if before else {}
    spent = before["seconds"] if before else 0.0

    def sign(step: int) -> None:
        nonlocal signed
        if time.monotonic() - signed > config.evaluation.item_timeout_s / SIGNS_OF_LIFE:
            signed = time.monotonic()
            emit({"alive": step})

    release = Release(config.model, Path(adaptation.store) / CLASS_PICTURES, on_drawn=lambda: sign(0))

    def at_step(step: int, _loss: float = 0.0) -> None:
        sign(step)
        if step in adaptation.milestones:
            rows = data.subset(data.rows(adaptation.cls, adaptation.reference_part))
            if not adaptation.untouched:
                rows = learned(rows, config.adapt, release)
            batch = config.generation.batch_size
            losses[step] = held_out_loss(denoiser, rows, plain, config.seed, batch, HELD_OUT_DRAWS)
            emit({"step": step, "loss": losses[step], "seconds": seconds()})

    # What a process loads for its first user only is no part of an adaptation.
    started = time.monotonic()

    def seconds() -> float:
        return round(spent + time.monotonic() - started, 3)

    if before is None:
        at_step(0)
    else:
        for step, value in sorted(losses.items()):
            emit({"step": step, "loss": value, "seconds": spent})
        if adaptation.pause_at is not None and before["step"] >= adaptation.pause_at:
            return
    record: dict[str, Any] = {"losses": [], "trainable_params": 0, "optimizer_bytes": 0, "audit_ok": None}
    tensors: dict[str, Tensor] | None = None
    if not adaptation.untouched:
        mask = FreezeMask.load(adaptation.mask) if adaptation.mask else None
        loss = load_loss(config.model, config.adapt.snr_gamma)
        rows = data.subset(data.rows(adaptation.cls, adaptation.adapt_part))
        result = get_adaptation(config.adapt.method)(
            denoiser,
            rows,
            config.adapt,
            loss,
            mask=mask,
            seed=adaptation.seed,
            release=release,
            on_step=at_step,
            pause_at=adaptation.pause_at,
            resume=before["state"] if before else None,
        )
        if result.paused is not None:
            reached = {"milestones": sorted(losses.items()), "seconds": seconds(), "held_out": adaptation.held_out}
            facts = {"step": len(result.losses), **reached, "state": result.paused, "peak_memory_bytes": peak.bytes}
            store.write_paused(adaptation.key, facts)
            return
        state = {name: tensor.detach().cpu() for name, tensor in denoiser.state_dict().items()}
        tensors = {name: t for name, t in state.items() if name not in base or not torch.equal(t, base[name])}
        tensors |= {f"{TOKEN}{token}": vector for token, vector in result.embeddings.items()}
        record |= {
            "losses": [round(float(value), 6) for value in result.losses],
            "trainable_params": result.trainable_params,
            "optimizer_bytes": result.optimizer_bytes,
            "outside_mask": list(result.outside_mask),
        }
        if mask is not None and not config.adapt.ignore_mask:
            record["audit_ok"] = audit_states(mask.frozen_names, {**base, **values, **mask.values}, state).ok
    known = store.adapted(adaptation.key) or {"held_out": adaptation.held_out, "milestones": []}
    held_out = adaptation.held_out or known["held_out"]
    if known["held_out"] == held_out:
        losses = {**dict(known["milestones"]), **losses}
    record["milestones"] = sorted([step, loss] for step, loss in losses.items())
    record |= {"held_out": held_out, "seconds": seconds(), "peak_memory_bytes": peak.over(before)}
    needed = not store.has_pictures(adaptation.key)
    store.write_adapted(adaptation.key, record, tensors if needed else None)
    store.drop_paused(adaptation.key)
    emit({"record": record})


def _paused(adaptation: Adaptation) -> dict[str, Any] | None:
    """Where another task of the same key has paused, if its held-out losses are those that are wanted."""
    found = Store(Path(adaptation.store)).paused(adaptation.key)
    if found is None or found["held_out"] != adaptation.held_out:
        return None
    wanted = {step for step in adaptation.milestones if step <= found["step"]}
    return found if wanted <= dict(found["milestones"]).keys() else None


def base_loss_task(
    config_dict: dict[str, Any], cache: str, mask: str | None = None, edit: str | None = None, kept: bool = False
) -> float:
    """The release's own loss on the general classes' captions, on fixed noise; where values are trained, or with
    `kept`, on the pictures kept from that training.

    mask: folder of the mask whose values the release carries. edit: file of an edit of its values, before the mask.
    """
    config = RunConfig.model_validate(config_dict)
    torch.set_num_threads(config.engine.torch_threads)
    loss = load_loss(config.model)
    denoiser: Any = load_denoiser(config.model)
    if edit is not None:
        Edit.load(edit).apply(denoiser)
    if mask is not None:
        FreezeMask.load(mask).apply(denoiser)
    denoiser = denoiser.to(device_for(config.evaluation.gpus_per_job)).eval()
    rows, batch = load_cache(Path(cache)), config.generation.batch_size
    if config.values.enabled or kept:
        rows = rows.subset(general_rows(rows, config.domain.general)[1])
    return held_out_loss(denoiser, rows, loss, config.seed, batch, BASE_LOSS_DRAWS)


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
        self._text: tuple[Any, Any] = (None, None)
        self._holds: str | None = None

    def ready(self) -> dict[str, Any]:
        """Load the pipeline, unless that is done; return facts about the process."""
        if self._pipeline is None:
            torch.set_num_threads(self.threads)
            denoiser = load_denoiser(self.model)
            self._base = _copy(denoiser.state_dict())
            self._pipeline = load_pipeline(self.model, denoiser=denoiser).to(device_for(self.gpus))
            self._text = self._pipeline.tokenizer, self._pipeline.text_encoder
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
            words = {name.removeprefix(TOKEN): changed.pop(name) for name in [*changed] if name.startswith(TOKEN)}
            denoiser_of(self._pipeline).load_state_dict({**self._base, **changed})
            # What one adaptation calls by a new word may be letters to the next.
            tokenizer, encoder = copy.deepcopy(self._text) if words else self._text
            teach(tokenizer, encoder, words)
            self._pipeline.tokenizer, self._pipeline.text_encoder = tokenizer, encoder
        except (OSError, SafetensorError, RuntimeError) as error:
            raise RaygardError(f"cannot load the adapted weights {adapted}: {str(error).splitlines()[0]}") from None
        self._holds = adapted


@dataclass(frozen=True)
class ScoreRequest:
    """captions: of the pictures, in order. saved: file of saved pictures, rows: half-open range of those in it; None if
    the pictures themselves are sent along."""

    cls: str
    references: str
    captions: tuple[str, ...]
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
            self._scorer = get_scorer(self.name, device_for(self.gpus))
        return _facts()

    def score(self, request: ScoreRequest, pictures: NDArray[np.uint8] | None = None) -> dict[str, Any]:
        """Distance of each picture, uint8 (n, H, W, 3), to the references of its class, or to its own caption where the
        scorer compares with captions: {"distances", "seconds"}.

        A scorer of faces adds what `face_detection` says. Raises RaygardError if a distance is not finite.
        """
        started = time.monotonic()
        if pictures is None:
            pictures = read_pictures(str(request.saved))[slice(*request.rows)]
        embedded = self._scorer.embed(pictures)
        distances = self._scorer.distances(embedded, self._embedded(request))
        if len(distances) != len(pictures) or not np.isfinite(distances).all():
            raise RaygardError(f"scorer {self.name} did not give one finite distance for each picture")
        found = face_detection(self._scorer, embedded, distances)
        return {**found, "distances": [float(d) for d in distances], "seconds": time.monotonic() - started}

    def _embedded(self, request: ScoreRequest) -> NDArray[np.float32]:
        if getattr(self._scorer, "references", "pictures") == "captions":
            return self._scorer.embed_captions(request.captions)
        # A references file of another run may come to lie at the same path.
        key = (request.references, Path(request.references).stat().st_mtime_ns, request.cls)
        if key not in self._references:
            pictures = read_references(request.references, request.cls)[1]
            self._references[key] = embed_references(self._scorer, pictures)
        return self._references[key]


def read_references(path: str | Path, cls: str) -> tuple[list[str], NDArray[np.uint8]]:
    """Captions and reference pictures, uint8 (n, H, W, 3), of one class. Raises RaygardError if they are not there."""
    file = Path(path)
    try:
        index = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        return index["captions"][cls], read_array(file, str(index["classes"].index(cls)))
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


def device_for(gpus: float) -> str:
    """Where a process that was given `gpus` computes. Raises RaygardError if torch sees none of them."""
    if not gpus:
        return "cpu"
    if not torch.cuda.is_available():
        raise RaygardError("an evaluation was given a GPU, but torch sees none in its process; check the driver")
    return "cuda"


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


@functools.lru_cache(maxsize=1)
def _denoiser(model_json: str) -> Any:
    return load_denoiser(ModelConfig.model_validate_json(model_json))


@functools.lru_cache(maxsize=2)
def _cache(path: str) -> Any:
    return load_cache(Path(path))
