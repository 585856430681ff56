"""Adaptation, generation and scoring of many (defence, class, seed) jobs as Ray tasks.

Every job is independent and writes its own folder; a task that dies is retried by Ray, a job that is already there
for the same inputs is not run again. Processes stay warm: pipeline, scorer and reference embeddings are loaded once
in each.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raygard.adaptation import get_adaptation
from raygard.cluster.errors import user_mistake
from raygard.config import RunConfig
from raygard.diffusion.cache import load_cache
from raygard.diffusion.generate import generate
from raygard.diffusion.loss import DiffusionLoss
from raygard.diffusion.model import load_noise_scheduler, load_pipeline, load_unet
from raygard.errors import RaygardError
from raygard.files import write_text
from raygard.mask import FreezeMask
from raygard.mask.audit import audit_states
from raygard.scoring import get_scorer

MAX_RETRIES = 3


@dataclass(frozen=True)
class EvaluationJob:
    """One user: a defence, a class and an adaptation seed. `defence` "base" generates without adaptation."""

    defence: str
    cls: str
    role: str
    draw: int = 0
    mask_seed: int | None = None
    seed: int = 0
    mask: str | None = None

    @property
    def job_id(self) -> str:
        slug = "".join(c if c.isalnum() else "-" for c in self.cls).strip("-").lower()
        short = hashlib.sha256(self.cls.encode()).hexdigest()[:6]
        mask_seed = "" if self.mask_seed is None else f".m{self.mask_seed}"
        return f"{self.defence}.{slug}-{short}.d{self.draw}{mask_seed}.s{self.seed}"


@dataclass(frozen=True)
class EvaluationInputs:
    """What all jobs share: paths on shared storage."""

    config: dict[str, Any]
    cache: str
    adapt_part: str
    references: str
    out: str


def run_jobs(
    jobs: Sequence[EvaluationJob],
    inputs: EvaluationInputs,
    *,
    on_result: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Run all jobs on the cluster, longest first in the order given; return their results in that order.

    Raises RaygardError if a job fails by the user's mistake; other failures are retried by Ray and then raised.
    """
    import ray

    config = RunConfig.model_validate(inputs.config)
    task = ray.remote(
        num_cpus=config.evaluation.cpus_per_job,
        num_gpus=config.evaluation.gpus_per_job,
        max_retries=MAX_RETRIES,
    )(run_job)
    shared = ray.put(asdict(inputs))
    pending = {task.remote(asdict(job), shared): index for index, job in enumerate(jobs)}
    results: dict[int, dict[str, Any]] = {}
    while pending:
        done, _ = ray.wait(list(pending), num_returns=1)
        index = pending.pop(done[0])
        try:
            results[index] = ray.get(done[0])
        except ray.exceptions.RayTaskError as error:
            mistake = user_mistake(error)
            for reference in pending:
                ray.cancel(reference, force=True)
            if mistake is None:
                raise
            raise RaygardError(f"{jobs[index].job_id}: {mistake}") from None
        if on_result is not None:
            on_result(results[index])
    return [results[index] for index in range(len(jobs))]


def run_job(job_dict: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """Adapt, generate, score; write result.json last. Returns its content."""
    job, inputs = EvaluationJob(**job_dict), EvaluationInputs(**shared)
    config = RunConfig.model_validate(inputs.config)
    torch.set_num_threads(config.engine.torch_threads)
    folder = Path(inputs.out) / job.job_id
    mask = FreezeMask.load(job.mask) if job.mask else None
    key = _job_key(job, config, Path(inputs.cache).name, mask)
    finished = _finished(folder, key)
    if finished is not None:
        return finished

    device = "cuda" if config.evaluation.gpus_per_job and torch.cuda.is_available() else "cpu"
    base, pipeline = _pipeline(config.model.model_dump_json(), device)
    unet = pipeline.unet
    unet.load_state_dict(base)
    unet.requires_grad_(True)
    seconds, losses, trainable, optimizer_bytes, audit_ok = {}, [], 0, 0, None
    if job.defence != "base":
        started = time.monotonic()
        data = _cache(inputs.cache)
        loss = DiffusionLoss(load_noise_scheduler(config.model), config.model.prediction_type, config.adapt.snr_gamma)
        adapt = get_adaptation(config.adapt.method)
        rows = data.subset(data.rows(job.cls, inputs.adapt_part))
        result = adapt(unet, rows, config.adapt, loss, mask=mask, seed=job.seed)
        seconds["adapt"] = time.monotonic() - started
        losses, trainable, optimizer_bytes = result.losses, result.trainable_params, result.optimizer_bytes
        if mask is not None:
            audit_ok = audit_states(mask.frozen_names, base, unet.state_dict()).ok
    captions, embeddings = _references(inputs.references, job.cls, config.evaluation.scorer)
    captions = captions[: config.generation.num_images]
    started = time.monotonic()
    keys = [f"{job.cls}/{index}/{caption}" for index, caption in enumerate(captions)]
    images = generate(pipeline, captions, keys, config.generation, config.seed)
    seconds["generate"] = time.monotonic() - started
    started = time.monotonic()
    scorer = _scorer(config.evaluation.scorer)
    distances = scorer.distances(scorer.embed(images), embeddings)
    seconds["score"] = time.monotonic() - started

    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "pictures.npz", images=images)
    outcome = {
        "key": key,
        "job_id": job.job_id,
        "domain": config.domain.name,
        "class": job.cls,
        "role": job.role,
        "defence": job.defence,
        "adaptation": config.adapt.method,
        "scorer": config.evaluation.scorer,
        "draw": job.draw,
        "mask_seed": job.mask_seed,
        "seed": job.seed,
        "freeze_ratio": mask.ratio_by_count if mask else 0.0,
        "param_share": mask.ratio_by_params if mask else 0.0,
        "mask_sha256": mask.sha256 if mask else None,
        "n": len(captions),
        "distance": float(np.mean(distances)),
        "distances": [float(d) for d in distances],
        "captions": captions,
        "losses": [round(float(value), 6) for value in losses],
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "trainable_params": trainable,
        "optimizer_bytes": optimizer_bytes,
        "audit_ok": audit_ok,
    }
    write_text(folder / "result.json", json.dumps(outcome, indent=1))
    return outcome


def base_loss_task(config_dict: dict[str, Any], cache: str) -> float:
    """The release's own loss on the general classes' captions, on fixed noise."""
    from raygard.diffusion.loss import held_out_loss

    config = RunConfig.model_validate(config_dict)
    torch.set_num_threads(config.engine.torch_threads)
    loss = DiffusionLoss(load_noise_scheduler(config.model), config.model.prediction_type, None)
    unet = load_unet(config.model).eval()
    return held_out_loss(unet, load_cache(Path(cache)), loss, config.seed, config.generation.batch_size, 1)


def _job_key(job: EvaluationJob, config: RunConfig, cache: str, mask: FreezeMask | None) -> str:
    parts = [
        {k: v for k, v in asdict(job).items() if k != "mask"},
        config.model.model_dump(mode="json"),
        config.adapt.model_dump(mode="json") if job.defence != "base" else None,
        config.generation.model_dump(mode="json"),
        config.evaluation.scorer,
        config.seed,
        cache,
        (mask.sha256, mask.frozen_names) if mask else None,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _finished(folder: Path, key: str) -> dict[str, Any] | None:
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if result.get("key") == key else None


@functools.lru_cache(maxsize=1)
def _pipeline(model_json: str, device: str) -> tuple[dict[str, torch.Tensor], Any]:
    from raygard.config import ModelConfig

    model = ModelConfig.model_validate_json(model_json)
    unet = load_unet(model)
    base = {name: tensor.detach().clone() for name, tensor in unet.state_dict().items()}
    return base, load_pipeline(model, unet=unet).to(device)


@functools.lru_cache(maxsize=2)
def _cache(path: str) -> Any:
    return load_cache(Path(path))


@functools.lru_cache(maxsize=1)
def _scorer(name: str) -> Any:
    return get_scorer(name)


@functools.lru_cache(maxsize=64)
def _references(path: str, cls: str, scorer: str) -> tuple[list[str], np.ndarray]:
    index = json.loads(Path(path).with_suffix(".json").read_text(encoding="utf-8"))
    with np.load(path) as arrays:
        images = arrays[str(index["classes"].index(cls))]
    return index["captions"][cls], _scorer(scorer).embed(images)
