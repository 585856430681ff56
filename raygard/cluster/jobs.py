"""What an evaluation job is: one user of one defence, the key of its content, and the record of its result."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raygard.cluster.evaluators import BASE_LOSS_DRAWS, HELD_OUT_DRAWS, read_references
from raygard.config import ModelConfig, RunConfig
from raygard.diffusion.cache import MANIFEST
from raygard.diffusion.model import model_fingerprint, model_parts
from raygard.editing import Edit
from raygard.errors import RaygardError
from raygard.files import write_text
from raygard.mask import FreezeMask
from raygard.scoring import DETECTION
from raygard.store import Store, content_key
from raygard.values.batches import KEPT_FRACTION

BASE = "base"
# To be raised with a change after which equal inputs give other results, so that the store's old ones are not taken.
FORMATS = {"pictures": 1, "held_out": 1, "score": 2, "base_loss": 1}


@dataclass(frozen=True)
class EvaluationJob:
    """One user: a defence, a class and an adaptation seed. `defence` "base" generates without adaptation.

    mask: folder of a mask. edit: file of an edit of the released values, which comes before the mask.
    """

    defence: str
    cls: str
    role: str
    draw: int = 0
    mask_seed: int | None = None
    seed: int = 0
    mask: str | None = None
    edit: str | None = None

    @property
    def job_id(self) -> str:
        slug = "".join(c if c.isalnum() else "-" for c in self.cls).strip("-").lower()
        short = hashlib.sha256(self.cls.encode()).hexdigest()[:6]
        mask_seed = "" if self.mask_seed is None else f".m{self.mask_seed}"
        return f"{self.defence}.{slug}-{short}.d{self.draw}{mask_seed}.s{self.seed}"


@dataclass(frozen=True)
class EvaluationInputs:
    """What all jobs share; paths are on shared storage.

    cache: latents of `adapt_part`, and of `reference_part` where there are milestones. references: file of the
    reference pictures. store: folder of results by content. milestones: optimizer steps, ascending, after which the
    held-out loss is taken; 0 is before the first.
    """

    config: dict[str, Any]
    cache: str
    adapt_part: str
    reference_part: str
    references: str
    store: str
    milestones: tuple[int, ...] = ()


def job_content(
    job: EvaluationJob, inputs: EvaluationInputs, config: RunConfig, mask: FreezeMask | None, captions: Sequence[str]
) -> dict[str, Any]:
    """Everything that decides the pictures of a job; jobs with equal content share one place in the store.

    Raises RaygardError if model, cache or edit cannot be read.
    """
    content: dict[str, Any] = {
        "format": FORMATS["pictures"],
        "model": _model_facts(config.model),
        "class": job.cls,
        "captions": list(captions),
        "generation": config.generation.model_dump(mode="json"),
        "seed": config.seed,
    }
    if job.defence != BASE:
        content |= {
            # Off, it is not said: what was adapted before there was a choice keeps its place in the store.
            "adapt": config.adapt.model_dump(
                mode="json", exclude=set() if config.adapt.gradient_checkpointing else {"gradient_checkpointing"}
            ),
            "adapt_seed": job.seed,
            "pictures": _rows_key(inputs.cache, job.cls, inputs.adapt_part, config),
            "mask": [mask.sha256, *mask.frozen_names] if mask else None,
        }
        if job.edit:
            content["edit"] = edit_hash(job.edit)
    return content


def held_out_key(cls: str, inputs: EvaluationInputs, config: RunConfig) -> str | None:
    """Hash of what the held-out losses of a class are taken on; None without milestones."""
    if not inputs.milestones:
        return None
    rows = _rows_key(inputs.cache, cls, inputs.reference_part, config)
    content = {"format": FORMATS["held_out"], "rows": rows, "seed": config.seed, "draws": HELD_OUT_DRAWS}
    return content_key(content)


def base_loss_content(
    config: RunConfig, cache: str, mask: FreezeMask | None = None, edit: str | None = None, *, kept: bool = False
) -> dict[str, Any]:
    """Everything that decides the release's own loss on the general classes. Raises RaygardError as `job_content`.

    mask: one whose values the release carries. edit: file of an edit of the released values. kept: as for `base_loss`.
    """
    content: dict[str, Any] = {} if mask is None else {"mask": mask.sha256}
    if edit is not None:
        content["edit"] = edit_hash(edit)
    if config.values.enabled or kept:
        content["kept"] = KEPT_FRACTION
    return {
        **content,
        "format": FORMATS["base_loss"],
        "model": _model_facts(config.model),
        "pictures": [[cls, _rows_key(cache, cls, "general", config)] for cls in config.domain.general],
        "seed": config.seed,
        "draws": BASE_LOSS_DRAWS,
    }


def edit_hash(path: str) -> str:
    """Identity of the edit in a file. Raises RaygardError if it cannot be read."""
    file = Path(path)
    return _edit_hash(path, file.stat().st_mtime_ns if file.exists() else 0)


def reference_facts(references: str, cls: str) -> tuple[list[str], str]:
    """Captions of a class's reference pictures, and a hash of these pictures and of how scores compare with them.

    Raises RaygardError if they cannot be read.
    """
    path = Path(references)
    # A references file of another run may come to lie at the same path.
    return _reference_facts(references, path.stat().st_mtime_ns if path.exists() else 0, cls)


def job_names(job: EvaluationJob) -> dict[str, Any]:
    """What names a job in its result or failure."""
    return {
        "job_id": job.job_id,
        "class": job.cls,
        "role": job.role,
        "defence": job.defence,
        "draw": job.draw,
        "mask_seed": job.mask_seed,
        "seed": job.seed,
    }


def job_result(
    job: EvaluationJob,
    config: RunConfig,
    mask: FreezeMask | None,
    captions: Sequence[str],
    adapted: Mapping[str, Any],
    score: Mapping[str, Any],
) -> dict[str, Any]:
    """The result of a job from the records of its adaptation ({} for the base) and its score."""
    seconds = {} if job.defence == BASE else {"adapt": adapted["seconds"]}
    return {
        **job_names(job),
        "domain": config.domain.name,
        "adaptation": config.adapt.method,
        "scorer": config.evaluation.scorer,
        "freeze_ratio": mask.ratio_by_count if mask else 0.0,
        "param_share": mask.ratio_by_params if mask else 0.0,
        "mask_sha256": mask.sha256 if mask else None,
        "n": len(captions),
        "distance": float(np.mean(score["distances"])),
        "distances": score["distances"],
        "captions": list(captions),
        "losses": adapted.get("losses", []),
        "seconds": {**seconds, **score["seconds"]},
        "trainable_params": adapted.get("trainable_params", 0),
        "optimizer_bytes": adapted.get("optimizer_bytes", 0),
        "audit_ok": adapted.get("audit_ok"),
        "outside_mask": adapted.get("outside_mask", []),
        "peak_memory_bytes": adapted.get("peak_memory_bytes"),
        **{name: score[name] for name in DETECTION if name in score},
    }


def save_result(run_dir: str | Path, store: str | Path, result: Mapping[str, Any]) -> None:
    """Write `evaluation/jobs/<job_id>/result.json` of a run directory, unless it is there already.

    Its `pictures` is the path of the job's pictures in the store, relative to the run directory.
    """
    folder = Path(run_dir) / "evaluation" / "jobs" / result["job_id"]
    pictures = os.path.relpath(Store(Path(store)).pictures_file(result["store"]), run_dir)
    text = json.dumps({**result, "pictures": pictures}, indent=1)
    try:
        if (folder / "result.json").read_text(encoding="utf-8") == text:
            return
    except OSError:
        folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "result.json", text)


def _rows_key(cache: str, cls: str, part: str, config: RunConfig) -> str:
    """Hash of the pictures of a class and part, as they are cropped; the rest of the cache does not matter."""
    file = Path(cache) / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        columns = [manifest[name] for name in ("classes", "parts", "pictures", "captions")]
    except (OSError, ValueError, KeyError) as error:
        raise RaygardError(f"cannot read {file}: {error}; build the cache again") from None
    rows = [row[2:] for row in zip(*columns, strict=True) if row[:2] == (cls, part)]
    domain = config.domain
    return content_key({"rows": rows, "resolution": domain.resolution, "center_crop": domain.center_crop})


@functools.lru_cache(maxsize=64)
def _edit_hash(path: str, mtime_ns: int) -> str:
    return Edit.load(path).sha256


@functools.lru_cache(maxsize=4)
def _model_facts(model: ModelConfig) -> dict[str, str | None]:
    parts = {part: model_fingerprint(model, part) for part in model_parts(model)}
    return {"prediction_type": model.prediction_type, **parts}


@functools.lru_cache(maxsize=64)
def _reference_facts(references: str, mtime_ns: int, cls: str) -> tuple[list[str], str]:
    captions, images = read_references(references, cls)
    shape = f"{FORMATS['score']} {images.shape}"
    return captions, hashlib.sha256(shape.encode() + images.tobytes()).hexdigest()
