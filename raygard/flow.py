"""The whole run: domain -> cache -> relearn -> mask -> adaptations -> outcome -> report.

Each method is a stage of the run directory and can be repeated: what is finished for the same inputs is not run
again. Everything that needs a cluster is called through `raygard.cluster`, imported when it is needed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raygard.adaptation import get_adaptation
from raygard.baselines import DEFENCES, choose_frozen
from raygard.config import RunConfig, config_hash, flatten
from raygard.diffusion.cache import build_cache
from raygard.diffusion.model import load_unet, model_fingerprint, with_resolution
from raygard.domain import Domain, load_domain
from raygard.errors import RaygardError
from raygard.files import write_text
from raygard.imagefolder import read_pixels
from raygard.mask import FreezeMask, select_frozen
from raygard.outcome import build_outcome
from raygard.progress import Progress
from raygard.report import build_report
from raygard.rundir import RunDirectory
from raygard.scoring import get_scorer
from raygard.seeding import generator
from raygard.tracking import RunHandle, Tracker

log = logging.getLogger("raygard")

CONTROLS = tuple(name for name, choose in DEFENCES.items() if choose is not None)
DRAWN = ("random", "random-matched")


class Flow:
    """One run in one run directory."""

    def __init__(
        self,
        config: RunConfig,
        out: str | Path,
        progress: Progress | None = None,
        connect: Callable[[], None] = lambda: None,
    ) -> None:
        """Check pictures, model and run directory before anything long starts or anything is written.

        connect: reaches the cluster and refuses what it can never run; called after the checks, before the writing.
        """
        config = config.model_copy(update={"domain": with_resolution(config.domain, config.model)})
        self.config = config
        self.progress = progress or Progress(quiet=True)
        get_adaptation(config.adapt.method)
        get_scorer(config.evaluation.scorer)
        self.domain: Domain = load_domain(config.domain)
        self.model_hash = model_fingerprint(config.model, "unet")
        RunDirectory.check(out, config)
        connect()
        self.dir = RunDirectory(out, config)
        self.dir.note(domain_counts=self.domain.counts(), model_sha256=self.model_hash)
        self.tracker = Tracker.open(config.tracking, self.dir.path, f"{config.domain.name}-{config_hash(config)}")
        self.parent: RunHandle = self.tracker.start(tags={"raygard.domain": config.domain.name})
        self.parent.params({**flatten(config), "config_hash": config_hash(config)})

    # Stages that learn the mask

    @cached_property
    def learn_cache(self) -> Path:
        parts = ("learn_lower", "learn_upper")
        classes = (*self.config.domain.illegal, *self.config.domain.legal)
        return self._cache("learn", [(cls, part) for cls in classes for part in parts])

    def relearn(self) -> Path:
        """theta_ft: the base fully fine-tuned on illegal and legal pictures; shared by every mask of the run."""
        from raygard.cluster.training import relearn

        config = self.config
        inputs = {**self._inputs("relearn", "bilevel_user", "engine"), "cache": self.learn_cache.name}
        with self.dir.stage("relearn", inputs) as (folder, done):
            if not done:
                with (
                    self.progress.bar("relearn", config.relearn.max_train_steps) as bar,
                    self.tracker.start("relearn", parent=self.parent) as run,
                ):
                    relearn(
                        config,
                        self.learn_cache,
                        folder,
                        on_row=lambda row: self._on_row(run, bar, row, "relearn"),
                    )
            return folder / "relearned.safetensors"

    def learn(self, mask_seed: int) -> FreezeMask:
        """Learn one mask (Algorithm 1) and save it under `learn/seed-<s>/mask`."""
        from raygard.cluster.training import learn

        config = self.config
        relearned = self.relearn()
        inputs = {**self._inputs("relearn", "bilevel", "mask", "engine"), "cache": self.learn_cache.name}
        inputs |= {"mask_seed": mask_seed}
        steps = config.bilevel.publisher_steps * (config.bilevel.inner_steps + 1)
        with self.dir.stage(f"learn/seed-{mask_seed}", inputs) as (folder, done):
            if not done:
                with (
                    self.progress.bar(f"learn mask, seed {mask_seed}", steps) as bar,
                    self.tracker.start(f"learn-seed-{mask_seed}", parent=self.parent) as run,
                ):
                    logits, soft = learn(
                        config,
                        self.learn_cache,
                        relearned,
                        mask_seed,
                        folder,
                        on_row=lambda row: self._on_row(run, bar, row, "learn"),
                    )
                    mask = self._make_mask(logits, soft, mask_seed)
                    mask.save(folder / "mask")
                    run.tags({"raygard.mask_sha256": mask.sha256})
                    run.artifact(folder / "mask", "mask")
            return FreezeMask.load(folder / "mask")

    def learn_all(self) -> list[FreezeMask]:
        """Masks of all `evaluation.mask_seeds`; the first is released as `mask/`."""
        masks = [self.learn(seed) for seed in self.config.evaluation.mask_seeds]
        masks[0].save(self.dir / "mask")
        self.parent.tags({"raygard.mask_sha256": masks[0].sha256})
        self.parent.artifact(self.dir / "mask", "mask")
        metrics = {"frozen_by_count": masks[0].ratio_by_count, "frozen_by_params": masks[0].ratio_by_params}
        if len(masks) > 1:
            metrics |= seed_agreement([mask.frozen for mask in masks])
        self.parent.metrics(metrics, step=0)
        self.dir.note(mask={"sha256": masks[0].sha256, **metrics})
        return masks

    def _make_mask(self, logits: Tensor, soft: Tensor, mask_seed: int) -> FreezeMask:
        config = self.config
        unet = load_unet(config.model)
        sizes = torch.tensor([parameter.numel() for parameter in unet.parameters()])
        frozen = select_frozen(logits, sizes, config.mask.freeze_ratio, config.mask.budget)
        return FreezeMask.create(
            unet,
            frozen,
            logits=logits,
            soft=soft,
            base_model=config.model.pretrained_model_name_or_path,
            domain=config.domain.name,
            config={**flatten(config), "mask_seed": mask_seed},
            config_hash=config_hash(config),
            metrics={"rounding_gap": float((soft - frozen.double()).abs().mean())},
        )

    # Stages that measure it

    def evaluate(self, masks: Sequence[FreezeMask]) -> dict[str, Any]:
        """Adapt every class under every defence, score, and write outcome.json."""
        from raygard.cluster.evaluation import EvaluationInputs, base_loss_task, run_jobs

        config = self.config
        stage, adapt_part, reference_part = _half(config)
        classes = (*config.domain.illegal, *config.domain.legal)
        cache = self._cache(stage, [(cls, adapt_part) for cls in classes])
        folder = self.dir / "evaluation"
        references = self._references(folder, stage, reference_part, classes)
        paths = self._save_masks(folder / "masks", masks)
        jobs = self._jobs(paths)
        inputs = EvaluationInputs(
            config.model_dump(mode="json"), str(cache), adapt_part, str(references), str(folder / "jobs")
        )
        runs: dict[str, RunHandle] = {}
        with self.progress.bar("adapt, generate, score", len(jobs)) as bar:

            def on_result(result: dict[str, Any]) -> None:
                bar.advance(1, f"{result['defence']} / {result['class']}: {result['distance']:.4f}")
                self._track_job(runs, result)

            results = run_jobs(jobs, inputs, on_result=on_result)
        for run in runs.values():
            run.finish()
        if not all(result["audit_ok"] in (True, None) for result in results):
            raise RaygardError(
                "a frozen tensor moved during an adaptation: this is a defect of raygard, please report it"
            )
        base_loss = self._base_loss(base_loss_task)
        # None of these defences edits values, so the release is the base under each of them.
        losses = {} if base_loss is None else dict.fromkeys(config.evaluation.defences, base_loss)
        outcome = build_outcome(results, config, losses)
        write_text(self.dir / "outcome.json", json.dumps(outcome, indent=1) + "\n")
        self._track_outcome(outcome)
        return outcome

    def report(self) -> Path:
        """Write report.html and hand it to MLflow."""
        with self.progress.bar("report", 1) as bar:
            path = build_report(self.dir.path)
            bar.advance(1, path.name)
        self.parent.artifact(path, "report")
        return path

    def run(self) -> dict[str, Any]:
        """All stages; returns the outcome."""
        with self.parent:
            outcome = self.evaluate(self.learn_all())
            self.report()
        return outcome

    # Parts

    def _inputs(self, *sections: str) -> dict[str, Any]:
        """What decides a learning stage, as JSON: the named sections, domain, model and seed."""
        config = self.config
        found: dict[str, Any] = {"model": self.model_hash, "seed": config.seed, "stage": sections}
        found["domain"] = config.domain.model_dump(mode="json", exclude={"legal_budget"})
        for section in sections:
            if section == "bilevel_user":
                exclude = {"publisher_steps", "inner_steps", "user_optimizer", "user_lr"}
                exclude |= {"illegal_weight", "legal_weight"}
                found[section] = config.bilevel.model_dump(mode="json", exclude=exclude)
            elif section == "engine":
                exclude = {
                    "max_failures",
                    "checkpoints_total_limit",
                    "timeout_s",
                    "cpus_per_worker",
                    "torch_threads",
                }
                found[section] = config.engine.model_dump(mode="json", exclude=exclude)
            else:
                found[section] = getattr(config, section).model_dump(mode="json")
        return found

    def _cache(self, stage: str, parts: list[tuple[str, str]]) -> Path:
        with self.progress.bar(f"cache latents ({stage})", 1) as bar:
            view = self.domain.view(stage)
            path = build_cache(self.config.model, self.config.domain, view, parts, self.dir / "cache")
            bar.advance(1, "")
        return path

    def _references(self, folder: Path, stage: str, part: str, classes: Sequence[str]) -> Path:
        """Reference pictures, cropped as the model sees them, and their captions."""
        folder.mkdir(parents=True, exist_ok=True)
        view, arrays, captions = self.domain.view(stage), {}, {}
        size = self.config.domain.resolution
        assert size is not None
        for index, cls in enumerate(classes):
            pictures = view.pictures(cls, part)
            arrays[str(index)] = np.stack(
                [read_pixels(picture.path, size, self.config.domain.center_crop) for picture in pictures]
            )
            captions[cls] = [picture.caption for picture in pictures]
        path = folder / "references.npz"
        np.savez_compressed(path, allow_pickle=False, **arrays)
        write_text(path.with_suffix(".json"), json.dumps({"classes": list(classes), "captions": captions}))
        return path

    def _save_masks(self, folder: Path, masks: Sequence[FreezeMask]) -> dict[tuple[str, int], str]:
        """Save learned and control masks; `{(defence, seed or draw): path}`."""
        config, paths = self.config, {}
        unet = load_unet(config.model)
        for seed, mask in zip(config.evaluation.mask_seeds, masks, strict=True):
            paths["freeze", seed] = str(mask.save(folder / f"freeze-{seed}"))
        learned = masks[0]
        for name in (name for name in config.evaluation.defences if name in CONTROLS):
            for draw in range(config.evaluation.random_draws if name in DRAWN else 1):
                rng = generator(config.seed, "defence", name, draw)
                frozen = choose_frozen(name, learned.sizes, learned.frozen, rng)
                mask = FreezeMask.create(
                    unet,
                    frozen,
                    base_model=learned.base_model,
                    domain=learned.domain,
                    config_hash=learned.config_hash,
                )
                paths[name, draw] = str(mask.save(folder / f"{name}-{draw}"))
        return paths

    def _jobs(self, paths: dict[tuple[str, int], str]) -> list[Any]:
        from raygard.cluster.evaluation import EvaluationJob

        evaluation, jobs = self.config.evaluation, []
        classes = [(cls, role) for role in ("illegal", "legal") for cls in getattr(self.config.domain, role)]
        for cls, role in classes:
            jobs.append(EvaluationJob("base", cls, role))
        for seed in evaluation.adaptation_seeds:
            for name in evaluation.defences:
                for cls, role in classes:
                    if name == "none":
                        jobs.append(EvaluationJob("none", cls, role, seed=seed))
                        continue
                    for (defence, number), path in paths.items():
                        if defence != name:
                            continue
                        learned = name == "freeze"
                        draw, mask_seed = (0, number) if learned else (number, evaluation.mask_seeds[0])
                        jobs.append(EvaluationJob(name, cls, role, draw, mask_seed, seed, path))
        # Cheap jobs last: a long one at the end would leave workers idle.
        return sorted(jobs, key=lambda job: job.defence == "base")

    def _base_loss(self, task: Any) -> float | None:
        """The release's own loss on general captions; masks without values leave it as it is."""
        classes = self.config.domain.general
        if not classes:
            return None
        import ray

        cache = self._cache("base_loss", [(cls, "general") for cls in classes])
        return ray.get(ray.remote(task).remote(self.config.model_dump(mode="json"), str(cache)))

    def _on_row(self, run: RunHandle, bar: Any, row: dict[str, Any], what: str) -> None:
        bar.advance(1, f"illegal {row['illegal_loss']:.4f}  legal {row['legal_loss']:.4f}")
        prefix = "" if what == "relearn" else f"{row['kind']}_"
        values = {f"{prefix}{k}": v for k, v in row.items() if k.endswith("_loss")}
        values |= {k: v for k, v in row.items() if k not in ("kind", "k", "l", "step") and not k.endswith("_loss")}
        run.metrics(values, step=row["step"])

    def _track_job(self, runs: dict[str, RunHandle], result: dict[str, Any]) -> None:
        defence = result["defence"]
        if defence not in runs:
            runs[defence] = self.tracker.start(f"defence-{defence}", parent=self.parent)
        with self.tracker.start(result["job_id"], parent=runs[defence]) as run:
            keys = (
                "class",
                "role",
                "defence",
                "adaptation",
                "scorer",
                "draw",
                "mask_seed",
                "seed",
                "mask_sha256",
            )
            run.params({key: result[key] for key in keys})
            for step, value in enumerate(result["losses"]):
                if step % 10 == 0 or step == len(result["losses"]) - 1:
                    run.metrics({"loss": value}, step=step)
            seconds = {f"{name}_seconds": value for name, value in result["seconds"].items()}
            numbers = ("distance", "freeze_ratio", "param_share", "trainable_params", "optimizer_bytes")
            run.metrics({**{key: result[key] for key in numbers}, **seconds}, step=len(result["losses"]))

    def _track_outcome(self, outcome: dict[str, Any]) -> None:
        for entry in outcome["summary"]:
            name = entry["defence"].replace("-", "_")
            fields = ("mitigation", "legal_impact", "relative_illegal", "relative_legal", "base_loss")
            values = {f"{name}_{field}": entry[field] for field in fields if entry[field] is not None}
            if values:
                self.parent.metrics(values, step=0)
        self.parent.artifact(self.dir / "outcome.json")


def seed_agreement(masks: Sequence[Tensor]) -> dict[str, float]:
    """Mean overlap of the frozen sets over pairs of seeds, as a share of the smaller set, and what chance gives."""
    overlaps, chances = [], []
    for index, first in enumerate(masks):
        for second in masks[index + 1 :]:
            smaller = int(min(first.sum(), second.sum()))
            overlaps.append(int((first & second).sum()) / smaller)
            chances.append(int(first.sum()) * int(second.sum()) / len(first) / smaller)
    return {"seed_agreement": float(np.mean(overlaps)), "seed_agreement_chance": float(np.mean(chances))}


def _half(config: RunConfig) -> tuple[str, str, str]:
    """Stage, adaptation part and reference part of the half that evaluation reads."""
    if config.evaluation.half == "user":
        return "evaluate", "adapt", "reference"
    return "select", "select_adapt", "select_reference"
