"""The whole run: domain -> cache -> relearn -> mask -> adaptations -> outcome -> report.

Each method is a stage of the run directory and can be repeated: what is finished for the same inputs is not run
again. Everything that needs a cluster is called through `raygard.cluster`, imported when it is needed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raygard.adaptation import check_adaptation
from raygard.config import SCHEDULING, RunConfig, config_hash, flatten, public
from raygard.defences import (
    CONTROLS,
    GIVEN_MASKS,
    make_mask,
    save_controls,
    seed_agreement,
    unlearned_mask,
)
from raygard.diffusion.cache import build_cache
from raygard.diffusion.model import check_memory_format, model_family, model_fingerprint, with_resolution
from raygard.domain import Domain, load_domain
from raygard.errors import RaygardError
from raygard.files import scratch, write_text
from raygard.mask import FreezeMask
from raygard.outcome import PARTS, build_outcome
from raygard.pictures import read_pixels
from raygard.progress import Progress
from raygard.report import build_report
from raygard.rundir import RunDirectory
from raygard.scoring import check_evaluation, get_scorer
from raygard.store import Store
from raygard.tracking import RunHandle, Tracker, track_job
from raygard.values.batches import further_captions

if TYPE_CHECKING:
    from raygard.cluster.values import ValuesInputs

log = logging.getLogger("raygard")

YARDSTICKS = ("base", "none")
BASE_LOSSES = ("base_loss_before", "base_loss_after")


class Flow:
    """One run in one run directory."""

    def __init__(
        self,
        config: RunConfig,
        out: str | Path,
        progress: Progress | None = None,
        connect: Callable[[], None] = lambda: None,
        upstream: Flow | None = None,
    ) -> None:
        """Check pictures, model and run directory before anything long starts or anything is written.

        connect: reaches the cluster and refuses what it can never run; called after the checks, before the writing.
        upstream: a run of the same model, domain, adaptation and scorer whose caches, relearning, stored results and
        MLflow store this run uses instead of its own.
        """
        tracking = config.tracking
        config = public(config.model_copy(update={"domain": with_resolution(config.domain, config.model)}))
        self.config = config
        self.progress = progress or Progress(quiet=True)
        self.upstream = upstream
        if upstream is None:
            check_adaptation(config.adapt, config.model)
            check_evaluation(config.evaluation.scorer)
            get_scorer(config.evaluation.scorer)
        self.domain: Domain = load_domain(config.domain)
        check_memory_format(config.engine, config.model)
        self.model_hash = model_fingerprint(config.model, model_family(config.model).denoiser)
        RunDirectory.check(out, config)
        connect()
        self.dir = RunDirectory(out, config)
        self.dir.note(domain_counts=self.domain.counts(), model_sha256=self.model_hash)
        name = f"{config.domain.name}-{config_hash(config)}"
        tags = {"raygard.domain": config.domain.name}
        if upstream is None:
            Store(self.root / "store").sweep()
            self.tracker = Tracker.open(tracking, self.dir.path, name, sensitive=config.domain.sensitive)
            self.parent: RunHandle = self.tracker.start(tags=tags)
        else:
            self.tracker = upstream.tracker
            self.parent = self.tracker.start(self.dir.path.name, parent=upstream.parent, tags=tags)
        self.parent.params({**flatten(config), "config_hash": config_hash(config)})
        if upstream is None and self.parent.address:
            # `raygard submit` finds the run by this line of the job's log.
            log.info("MLflow run %s", self.parent.address)

    @property
    def root(self) -> Path:
        """The run directory whose caches and stored results this run uses."""
        return self.dir.path if self.upstream is None else self.upstream.root

    # Stages that learn the mask

    @cached_property
    def learn_cache(self) -> Path:
        return self._cache("learn", self.domain.learn_parts)

    def relearn(self) -> Path:
        """theta_ft: the base fully fine-tuned on illegal and legal pictures; shared by every mask of the run."""
        from raygard.cluster.training import relearn

        if self.upstream is not None:
            return self.upstream.relearn()
        config = self.config
        inputs = {**self._inputs("relearn", "bilevel_user", "engine"), "cache": self.learn_cache.name}
        with self.dir.stage("relearn", inputs) as (folder, done):
            if not done:
                self.dir.note(relearn_runs=self.relearn_runs + 1)
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

    @property
    def relearn_runs(self) -> int:
        """How often relearning was started in this run directory."""
        return int(self.dir.info.get("relearn_runs", 0))

    def learn(self, mask_seed: int) -> FreezeMask:
        """The mask of one seed, with trained values if `values.*` asks for them."""
        mask = self._learn_mask(mask_seed) if self.config.mask.learned else unlearned_mask(self.config, mask_seed)
        return self._learn_values(mask, mask_seed) if self.config.values.enabled else mask

    def _learn_mask(self, mask_seed: int) -> FreezeMask:
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
                    mask = make_mask(config, logits, soft, mask_seed)
                    mask.save(folder / "mask")
                    run.tags({"raygard.mask_sha256": mask.sha256})
                    run.artifact(folder / "mask", "mask")
            return FreezeMask.load(folder / "mask")

    def _learn_values(self, mask: FreezeMask, mask_seed: int) -> FreezeMask:
        """Train the values of `mask`'s frozen tensors and save the release under `values/seed-<s>/mask`."""
        from raygard.cluster.values import release_values

        config, sources = self.config, self.values_inputs(mask_seed)
        inputs = {**self._inputs("values", "engine"), "cache": Path(sources.cache).name, "mask_seed": mask_seed}
        inputs |= {"mask": mask.sha256}
        with self.dir.stage(f"values/seed-{mask_seed}", inputs) as (folder, done):
            if not done:
                with (
                    self.progress.bar(f"train values, seed {mask_seed}", config.values.max_train_steps) as bar,
                    self.tracker.start(f"values-seed-{mask_seed}", parent=self.parent) as run,
                ):
                    released = release_values(
                        config,
                        mask,
                        sources,
                        mask_seed,
                        folder,
                        on_row=lambda row: self._on_row(run, bar, row, "values"),
                    )
                    metrics = {name: released.metrics[name] for name in BASE_LOSSES}
                    run.metrics(metrics, step=config.values.max_train_steps)
                    run.tags({"raygard.mask_sha256": released.sha256})
                    run.artifact(folder / "mask", "mask")
            return FreezeMask.load(folder / "mask")

    def values_inputs(self, mask_seed: int) -> ValuesInputs:
        """Latents of all that values are trained on, and its captions, also under meaningless names."""
        from raygard.cluster.values import ValuesInputs

        parts, view = self.domain.learn_parts, self.domain.view("values")
        captions = [(cls, picture.caption) for cls, part in parts for picture in view.pictures(cls, part)]
        further = further_captions(captions, self.config.domain, self.config.values, mask_seed)
        cache = self._cache("values", [*parts, *self.domain.general_parts], further)
        return ValuesInputs(str(cache), str(self.general_cache), str(self.root / "store"))

    def learn_all(self) -> list[FreezeMask]:
        """Masks of all `evaluation.mask_seeds`; the first is released as `mask/`."""
        self._refuse_given()
        masks = [self.learn(seed) for seed in self.config.evaluation.mask_seeds]
        self.release(masks)
        return masks

    def _refuse_given(self) -> None:
        if GIVEN_MASKS in self.dir.info and "mask" not in self.dir.info:
            raise RaygardError(f"{self.dir.path} measures masks that were given to it (--mask); choose another --out")

    def release(self, masks: Sequence[FreezeMask]) -> None:
        """Save the first mask as `mask/`, and note how well the masks of all seeds agree."""
        masks[0].save(self.dir / "mask")
        self.parent.tags({"raygard.mask_sha256": masks[0].sha256})
        self.parent.artifact(self.dir / "mask", "mask")
        metrics = {"frozen_by_count": masks[0].ratio_by_count, "frozen_by_params": masks[0].ratio_by_params}
        metrics |= {key: masks[0].metrics[key] for key in BASE_LOSSES if key in masks[0].metrics}
        if len(masks) > 1:
            metrics |= seed_agreement([mask.frozen for mask in masks])
        self.parent.metrics(metrics, step=0)
        self.dir.note(mask={"sha256": masks[0].sha256, **metrics})

    # Stages that measure it

    @cached_property
    def general_cache(self) -> Path | None:
        """Latents of the general classes, for the loss of the release; None if the domain has none."""
        general = self.domain.general_parts
        return self._cache("base_loss", general) if general else None

    def evaluate(self, masks: Sequence[FreezeMask], pool: Any = None) -> dict[str, Any]:
        """Adapt every class under every defence, score, and write outcome.json.

        pool: evaluation actors to use; None starts some and stops them.
        """
        from raygard.cluster.evaluation import EvaluationPool, run_jobs, save_result

        config = self.config
        folder = self.dir / "evaluation"
        inputs = self.evaluation_inputs(folder)
        paths = self._save_masks(folder / "masks", masks)
        jobs = self._jobs(paths)
        runs: dict[str, RunHandle] = {}
        failures: list[dict[str, Any]] = []
        with (
            self.progress.bar("adapt, generate, score", len(jobs)) as bar,
            nullcontext(pool) if pool is not None else EvaluationPool.start(config) as actors,
        ):

            def on_result(result: dict[str, Any]) -> None:
                where = f"{result['defence']} / {result['class']}"
                if result.get("failed"):
                    bar.advance(1, f"{where}: failed")
                    failures.append(result)
                    refuse_if_unmeasurable(jobs, failures)
                    return
                bar.advance(1, f"{where}: {result['distance']:.4f}")
                save_result(self.dir.path, inputs.store, result)
                self._track_job(runs, result)

            try:
                found = run_jobs(jobs, inputs, actors, on_result=on_result)
            finally:
                self._note_failures(folder / "failures.json", failures)
        for run in runs.values():
            run.finish()
        results = self.results = [result for result in found if not result.get("failed")]
        if not all(result["audit_ok"] in (True, None) for result in results):
            raise RaygardError(
                "a frozen tensor moved during an adaptation: this is a defect of raygard, please report it"
            )
        losses = self._base_losses(masks, paths, inputs.store)
        outcome = build_outcome(results, config, losses)
        write_text(self.dir / "outcome.json", json.dumps(outcome, indent=1) + "\n")
        self._track_outcome(outcome)
        return outcome

    def _base_losses(
        self, masks: Sequence[FreezeMask], paths: dict[tuple[str, int], str], store: str
    ) -> dict[str, float]:
        """The release's own loss under each defence: on pictures that no values were trained on, the same for all."""
        from raygard.cluster.evaluation import base_loss

        config, cache = self.config, self.general_cache
        if cache is None:
            return {}
        kept = any(mask.values for mask in masks)
        # Where no values were edited, the release is the base.
        losses = dict.fromkeys(config.evaluation.defences, base_loss(config, str(cache), store, kept=kept))
        if kept:
            own = [Path(path) for (defence, _), path in paths.items() if defence == "freeze"]
            losses["freeze"] = float(np.mean([base_loss(config, str(cache), store, mask, kept=True) for mask in own]))
        return losses

    def evaluation_inputs(self, folder: Path, milestones: tuple[int, ...] = ()) -> Any:
        """Caches and references of the half that evaluation reads, for `run_jobs`.

        milestones: steps at which users report the held-out loss on the reference part.
        """
        from raygard.cluster.evaluation import EvaluationInputs

        config = self.config
        stage, adapt_part, reference_part = _half(config)
        classes = [cls for cls, _ in config.domain.adapted]
        parts = (adapt_part, reference_part) if milestones else (adapt_part,)
        return EvaluationInputs(
            config=config.model_dump(mode="json"),
            cache=str(self._cache(stage, [(cls, part) for cls in classes for part in parts])),
            adapt_part=adapt_part,
            reference_part=reference_part,
            references=str(self._references(folder, stage, reference_part, classes)),
            store=str(self.root / "store"),
            milestones=milestones,
        )

    def report(self) -> Path:
        """Write report.html and hand it to MLflow; that of a sensitive domain shows no pictures."""
        with self.progress.bar("report", 1) as bar:
            path = build_report(self.dir.path)
            bar.advance(1, path.name)
        self.parent.artifact(path, "report", pictures=not self.config.domain.sensitive)
        return path

    def evaluate_masks(self, masks: Sequence[FreezeMask], *, given: bool) -> dict[str, Any]:
        """`evaluate` and `report` for masks that exist, one for each of `evaluation.mask_seeds`; the outcome.

        given: they come from elsewhere, so this run does not release them.
        """
        with self.parent:
            if given:
                self.dir.note(**{GIVEN_MASKS: [mask.sha256 for mask in masks]})
            else:
                self._refuse_given()
                self.release(masks)
            outcome = self.evaluate(masks)
            self.report()
        return outcome

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
        exclude = {"unseen", "legal_budget", "base_loss_budget", "sensitive"}
        found["domain"] = config.domain.model_dump(mode="json", exclude=exclude)
        for section in sections:
            if section == "bilevel_user":
                exclude = {"publisher_steps", "inner_steps", "user_optimizer", "user_lr"}
                exclude |= {"illegal_weight", "legal_weight"}
                found[section] = config.bilevel.model_dump(mode="json", exclude=exclude)
            elif section == "engine":
                found[section] = config.engine.model_dump(mode="json", exclude=SCHEDULING["engine"])
            else:
                found[section] = getattr(config, section).model_dump(mode="json")
        return found

    def _cache(self, stage: str, parts: list[tuple[str, str]], further_captions: Sequence[str] = ()) -> Path:
        with self.progress.bar(f"cache latents ({stage})", 1) as bar:
            view = self.domain.view(stage)
            path = build_cache(
                self.config.model,
                self.config.domain,
                view,
                parts,
                self.root / "cache",
                further_captions=further_captions,
            )
            bar.advance(1, "")
        return path

    def _references(self, folder: Path, stage: str, part: str, classes: Sequence[str]) -> Path:
        """Reference pictures, cropped as the model sees them, and their captions."""
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
        listing = json.dumps({"classes": list(classes), "captions": captions})
        # Actors may be reading what an earlier start has written.
        with scratch(path, keep_same=True) as file, file.open("wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, **arrays)
        write_text(path.with_suffix(".json"), listing, keep_same=True)
        return path

    def _save_masks(self, folder: Path, masks: Sequence[FreezeMask]) -> dict[tuple[str, int], str]:
        """Save learned and control masks; `{(defence, seed or draw): path}`."""
        config = self.config
        paths = {}
        for seed, mask in zip(config.evaluation.mask_seeds, masks, strict=True):
            paths["freeze", seed] = str(mask.save(folder / f"freeze-{seed}"))
        controls = [name for name in config.evaluation.defences if name in CONTROLS]
        return paths | save_controls(config, masks[0], folder, controls, self.relearn)

    def _jobs(self, paths: dict[tuple[str, int], str]) -> list[Any]:
        from raygard.cluster.evaluation import EvaluationJob

        evaluation, jobs = self.config.evaluation, []
        classes = self.config.domain.adapted
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

    def _note_failures(self, path: Path, failures: Sequence[dict[str, Any]]) -> None:
        path.unlink(missing_ok=True)
        if failures:
            write_text(path, json.dumps(failures, indent=1) + "\n")
        for failure in failures:
            log.warning(
                "%s failed %d times (%s) and is left out: %s",
                failure["job_id"],
                failure["attempts"],
                failure["stage"],
                failure["reason"],
            )

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
        track_job(self.tracker, runs[defence], result)

    def _track_outcome(self, outcome: dict[str, Any]) -> None:
        for entry in outcome["summary"]:
            name = entry["defence"].replace("-", "_")
            fields = (*PARTS, "relative_illegal", "relative_legal", "base_loss")
            values = {f"{name}_{field}": entry[field] for field in fields if entry[field] is not None}
            if values:
                self.parent.metrics(values, step=0)
        self.parent.artifact(self.dir / "outcome.json")


def refuse_if_unmeasurable(jobs: Sequence[Any], failures: Sequence[dict[str, Any]]) -> None:
    """Raise RaygardError once a class has lost every job of a yardstick, or nothing is left at all."""
    last = failures[-1]
    if last["defence"] in YARDSTICKS:
        alike = [job for job in jobs if (job.defence, job.cls) == (last["defence"], last["class"])]
        lost = [f for f in failures if (f["defence"], f["class"]) == (last["defence"], last["class"])]
        measurable = len(lost) < len(alike)
    else:
        measurable = len(failures) < len(jobs)
    if not measurable:
        raise RaygardError(f"{last['job_id']}: {last['reason']} (nothing can be measured without it)")


def _half(config: RunConfig) -> tuple[str, str, str]:
    """Stage, adaptation part and reference part of the half that evaluation reads."""
    if config.evaluation.half == "user":
        return "evaluate", "adapt", "reference"
    return "select", "select_adapt", "select_reference"
