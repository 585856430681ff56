"""The comparison: learn or load a mask, edit the release, let every user meet every defence, write the matrix.

The numbers are made by `raygard.compare`, the work is done by the evaluation actors and kept in the store, so a
comparison that was cut off goes on when the same command is given again.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from raygard.adaptation import check_adaptation
from raygard.baselines import DEFENCES, DRAWN
from raygard.compare.matrix import Matrix, Scale, to_csv
from raygard.compare.plan import Cell, Defence, Variant, classes, edit_settings, parse_defences, plan_cells, variants
from raygard.compare.tables import to_latex, to_markdown, to_text
from raygard.config import SCHEDULING, RunConfig
from raygard.defences import save_controls
from raygard.diffusion.model import load_denoiser
from raygard.editing import EDITS, Edit, IMMASettings, check_family, choose_edit, freeze_after
from raygard.errors import RaygardError
from raygard.files import write_text
from raygard.flow import Flow
from raygard.mask import FreezeMask
from raygard.outcome import BASE, LEARNED, NONE
from raygard.progress import Progress
from raygard.report.matrix import build_matrix_page
from raygard.scoring import check_evaluation, get_scorer, scorer_facts

log = logging.getLogger("raygard")

MATRIX, SUMMARY, PAGE = "matrix.csv", "summary.json", "compare.html"
# While results arrive, files are written again when this many times what their last writing took has passed.
REST = 20.0
TABLES = {"tables.md": to_markdown, "tables.tex": to_latex}


@dataclass(frozen=True)
class Release:
    """What a defence releases for one draw.

    mask: folder of a mask. edit: file of the edit that users have to apply before it. values: file of the edit that is
    part of the release, also where the mask carries it.
    """

    draw: int = 0
    mask_seed: int | None = None
    mask: str | None = None
    edit: str | None = None
    values: str | None = None


class CompareFlow:
    """One comparison in one directory."""

    def __init__(
        self,
        config: RunConfig,
        out: str | Path,
        progress: Progress | None = None,
        connect: Callable[[], None] = lambda: None,
    ) -> None:
        """Check every name and a given mask before anything is written; arguments as for `Flow`.

        Raises RaygardError for an unknown defence, edit, adaptation or scorer, listing the known ones.
        """
        self.edits = edit_settings(EDITS, config)
        for method, settings in self.edits.values():
            choose_edit(method, **settings)
        # A given mask was learned with a ratio of its own, whatever the configuration says.
        own_ratio = config.mask.freeze_ratio if config.compare.mask is None else None
        self.defences = parse_defences(config.compare.defences, self.edits, DEFENCES, own_ratio)
        self.variants = variants(config)
        for variant in self.variants:
            check_adaptation(variant.config, config.model)
        for defence in self.defences:
            if defence.edit:
                method, settings = self.edits[defence.edit]
                check_family(method, config.model, **settings)
        legal = [config.compare.legal_scorer] if config.compare.legal_scorer else []
        self.scorers = tuple(dict.fromkeys((config.evaluation.scorer, *legal, *config.compare.scorers)))
        for name in self.scorers[1:]:
            try:
                check_evaluation(name)
                get_scorer(name)
            except RaygardError as error:
                key = f"compare.{'legal_scorer' if name in legal else 'scorers'}"
                raise RaygardError(re.sub(r"\bevaluation\.scorer\b", key, str(error))) from None
        denoiser = load_denoiser(config.model)
        self.given: FreezeMask | None = None
        if config.compare.mask is not None:
            for defence in self.defences:
                if defence.ratio is not None:
                    raise RaygardError(
                        f"defence '{defence.name}': the freeze ratio of compare.mask is what it was learned with; "
                        f"leave out @{defence.ratio:g} or compare.mask"
                    )
            self.given = FreezeMask.load(config.compare.mask)
            self.given.apply(denoiser)
        self.num_params = sum(parameter.numel() for parameter in denoiser.parameters())
        self.flow = Flow(config, out, progress, connect)
        self.config, self.dir = self.flow.config, self.flow.dir
        self.progress = self.flow.progress
        self._due = {"rows": 0.0, "tables": 0.0}
        self.matrix = Matrix(self.config, self.variants, [_scale(name) for name in self.scorers], self.num_params)

    def run(self) -> dict[str, Any]:
        """The whole comparison; returns what summary.json holds."""
        with self.flow.parent:
            # Learning may take long or be cut off; what an earlier go has measured stays readable meanwhile.
            if not (self.dir / MATRIX).exists():
                self.matrix.cells = self._cells({})
                self._write()
            releases = self._releases()
            self.matrix.cells = self._cells(releases)
            self._write()
            try:
                for scorer in self.scorers:
                    self._measure(scorer, releases)
            finally:
                summary = self._write()
            self._track(summary)
        return summary

    def text(self) -> str:
        """The tables for a terminal."""
        return to_text(self.matrix.summaries())

    # What is released

    def _releases(self) -> dict[str, list[Release]]:
        """Every defence that could be made, and why the others could not (`Matrix.lost`)."""
        folder = self.dir / "masks"
        learned: dict[float | None, dict[int | None, FreezeMask]] = {}
        paths: dict[tuple[str | None, float | None], dict[int, str]] = {}
        edits: dict[str, Path] = {}
        lost: dict[str, str] = {}
        for ratio in dict.fromkeys(defence.ratio for defence in self.defences if defence.mask):
            try:
                learned[ratio] = self._learned(ratio)
            except RaygardError as error:
                lost |= {each.name: str(error) for each in self.defences if each.mask and each.ratio == ratio}
        for mask, ratio in dict.fromkeys(d.key for d in self.defences if d.mask and d.name not in lost):
            try:
                paths[mask, ratio] = self._masks(str(mask), learned[ratio], at_ratio(folder, ratio))
            except RaygardError as error:
                lost |= {defence.name: str(error) for defence in self.defences if defence.key == (mask, ratio)}
        for edit in dict.fromkeys(d.edit for d in self.defences if d.edit and d.name not in lost):
            try:
                edits[edit] = self._edit(edit)
            except RaygardError as error:
                lost |= {defence.name: str(error) for defence in self.defences if defence.edit == edit}
        found: dict[str, list[Release]] = {}
        for defence in self.defences:
            if defence.name in lost:
                continue
            try:
                masks = paths.get(defence.key, {})
                found[defence.name] = self._release(defence, masks, edits, list(learned.get(defence.ratio, ())), folder)
            except RaygardError as error:
                lost[defence.name] = str(error)
        if NONE in lost:
            raise RaygardError(lost[NONE])
        for name, why in lost.items():
            log.warning("defence %s cannot be made: %s", name, why)
        self.matrix.lost = lost
        return found

    def _learned(self, ratio: float | None) -> dict[int | None, FreezeMask]:
        """Learned masks of one freeze ratio (None: the run's own) by seed; a given one has no seed."""
        if self.given is not None:
            return {None: self.given}
        flow, seeds = self.flow, self.config.evaluation.mask_seeds
        if ratio is not None:
            mask = self.config.mask.model_copy(update={"freeze_ratio": ratio})
            config = self.config.model_copy(update={"mask": mask})
            flow = Flow(config, at_ratio(self.dir.path, ratio), self.progress, upstream=self.flow)
        with nullcontext() if ratio is None else flow.parent:
            return dict(zip(seeds, flow.learn_all(), strict=True))

    def _masks(self, name: str, learned: Mapping[int | None, FreezeMask], folder: Path) -> dict[int, str]:
        """Save the masks of a defence: {draw or place of the mask seed: folder}."""
        if name == LEARNED:
            saved = [mask.save(folder / f"{name}-{place}") for place, mask in enumerate(learned.values())]
            return {place: str(path) for place, path in enumerate(saved)}
        found = save_controls(self.config, next(iter(learned.values())), folder, [name], self.flow.relearn)
        return {draw: path for (_, draw), path in found.items()}

    def _edit(self, name: str) -> Path:
        """The file of an edit, made unless it is there."""
        from raygard.cluster.edits import make_edit

        method, settings = self.edits[name]
        cache, general = self.flow.learn_cache, self.flow.general_cache
        inputs = {
            "method": method, "settings": settings, "model": self.flow.model_hash, "seed": self.config.seed,
            "cache": cache.name, "general": None if general is None else general.name,
            "classes": [self.config.domain.illegal, self.config.domain.legal, self.config.domain.general],
        }  # fmt: skip
        chosen = choose_edit(method, **settings)[1]
        steps = 1
        if isinstance(chosen, IMMASettings):
            # A training that was cut off goes on from its checkpoint, which another engine could not read.
            inputs["engine"] = self.config.engine.model_dump(mode="json", exclude=SCHEDULING["engine"])
            steps = chosen.rounds * len(chosen.round)
        with (
            self.dir.stage(f"edits/{name}", inputs) as (folder, done),
            self.progress.bar(f"edit: {name}", steps) as bar,
        ):

            def on_row(row: dict[str, Any]) -> None:
                bar.advance(1, f"illegal {row['illegal_loss']:.4f}")

            file = folder / "edit.safetensors"
            if not done:
                make_edit(self.config, method, settings, cache, general, file, on_row=on_row)
            bar.advance(steps, "")
        return file

    def _release(
        self,
        defence: Defence,
        masks: Mapping[int, str],
        edits: Mapping[str, Path],
        seeds: Sequence[int | None],
        folder: Path,
    ) -> list[Release]:
        edit = str(edits[defence.edit]) if defence.edit else None
        if defence.mask is None:
            return [Release(edit=edit, values=edit)]
        found = []
        for number, path in masks.items():
            draw, seed = (0, seeds[number]) if defence.mask == LEARNED else (number, seeds[0])
            release = Release(draw, seed, path)
            if edit is not None:
                mask = FreezeMask.load(path)
                if mask.values:
                    raise RaygardError(
                        f"the mask '{defence.mask}' carries values of its own, which an edit of the original release "
                        "does not know; leave out this defence, or take a mask without values"
                    )
                guarded = freeze_after(
                    load_denoiser(self.config.model),
                    Edit.load(edit),
                    mask.frozen_names,
                    base_model=mask.base_model,
                    domain=mask.domain,
                    config_hash=mask.config_hash,
                )
                saved = guarded.mask.save(folder / f"{defence.name}-{number}")
                # A mask that carries the whole edit belongs to the original base.
                given = edit if guarded.needs_edited_base else None
                release = replace(release, mask=str(saved), edit=given, values=edit)
            found.append(release)
        return found

    def _cells(self, releases: Mapping[str, Sequence[Release]]) -> list[Cell]:
        """Every user; a defence that could not be made has the cells it would have had."""
        evaluation = self.config.evaluation
        seeds: Sequence[int | None] = (None,) if self.given is not None else evaluation.mask_seeds
        places: dict[str, list[tuple[int, int | None]]] = {}
        for defence in self.defences:
            made = releases.get(defence.name)
            if made is not None:
                places[defence.name] = [(release.draw, release.mask_seed) for release in made]
            elif defence.mask is None:
                places[defence.name] = [(0, None)]
            elif defence.mask == LEARNED:
                places[defence.name] = [(0, seed) for seed in seeds]
            else:
                draws = evaluation.random_draws if defence.mask in DRAWN else 1
                places[defence.name] = [(draw, seeds[0]) for draw in range(draws)]
        return [cell for variant in self.variants for cell in plan_cells(self.config, variant.name, places)]

    # What users make of it

    def _measure(self, scorer: str, releases: Mapping[str, Sequence[Release]]) -> None:
        """Results of every cell under one scorer, and the releases' own losses; from the store where it has them."""
        from raygard.cluster.evaluation import EvaluationPool

        config = self._with_scorer(scorer)
        inputs = self.flow.evaluation_inputs(self.dir / "evaluation")
        with EvaluationPool.start(config) as pool:
            self._base(config, inputs, pool, scorer)
            general = self.flow.general_cache
            if general is not None and not self.matrix.base_loss:
                # Several masks with values of their own are several releases.
                known = {
                    name: float(np.mean([self._base_loss(config, general, inputs.store, each) for each in made]))
                    for name, made in releases.items()
                }
                # An edit may have no finite loss: its cells then fail and say so, and JSON has no number for it.
                self.matrix.base_loss = {name: loss for name, loss in known.items() if math.isfinite(loss)}
            # A comparison that is cut off then has all defences and adaptations with fewer seeds.
            for seed in self.config.evaluation.adaptation_seeds:
                for variant in self.variants:
                    self._meet(config, inputs, pool, scorer, variant, seed, releases)

    def _base_loss(self, config: RunConfig, general: Path, store: str, release: Release) -> float:
        """Held-out loss of what is released, with the values that its mask carries; from the store if it is known."""
        from raygard.cluster.evaluation import base_loss

        if release.values is None and release.mask is not None and FreezeMask.load(release.mask).values:
            return base_loss(config, str(general), store, mask=Path(release.mask))
        return base_loss(config, str(general), store, edit=release.values)

    def _base(self, config: RunConfig, inputs: Any, pool: Any, scorer: str) -> None:
        from raygard.cluster.evaluation import EvaluationJob, run_jobs

        jobs = [EvaluationJob(BASE, cls, role) for cls, role in classes(config)]
        with self.progress.bar(f"the release itself, {scorer}", len(jobs)) as bar:
            found = run_jobs(jobs, _inputs_for(inputs, config), pool, on_result=lambda r: bar.advance(1, r["class"]))
        for result in found:
            self.matrix.add(scorer, "", result)
        if all(result.get("failed") for result in found):
            raise RaygardError(f"{found[0]['job_id']}: {found[0]['reason']} (nothing can be measured without it)")

    def _meet(
        self,
        config: RunConfig,
        inputs: Any,
        pool: Any,
        scorer: str,
        variant: Variant,
        seed: int,
        releases: Mapping[str, Sequence[Release]],
    ) -> None:
        """All users of one adaptation and seed."""
        from raygard.cluster.evaluation import run_jobs

        masked, plain = self._jobs(seed, releases)
        with self.progress.bar(f"{variant.name}, seed {seed}, {scorer}", len(masked) + len(plain)) as bar:

            def on_result(result: dict[str, Any]) -> None:
                where = f"{result['defence']} / {result['class']}"
                bar.advance(1, f"{where}: {'failed' if result.get('failed') else format(result['distance'], '.4f')}")
                if not result.get("failed") and result["audit_ok"] is False:
                    raise RaygardError(
                        f"a frozen tensor moved during {where}: this is a defect of raygard, please report it"
                    )
                self.matrix.add(scorer, variant.name, result)
                self._write_if_due()

            for jobs, adapt in ((plain, variant.without_mask()), (masked, variant.config)):
                ahead = []
                for job in jobs:
                    # A further scorer is of the same pictures: who could not adapt has none for it either.
                    failure = self._failed_to_adapt(variant, job)
                    if failure is None:
                        ahead.append(job)
                    else:
                        on_result(failure)
                if ahead:
                    adapted = config.model_copy(update={"adapt": adapt})
                    run_jobs(ahead, _inputs_for(inputs, adapted), pool, on_result=on_result)

    def _failed_to_adapt(self, variant: Variant, job: Any) -> dict[str, Any] | None:
        """The failure of a job that did not get through its adaptation under the first scorer."""
        cell = Cell(variant.name, job.defence, job.role, job.cls, job.draw, job.mask_seed, job.seed)
        found = self.matrix.results.get((self.scorers[0], cell), {})
        return dict(found) if found.get("failed") and found["stage"] == "adapt" else None

    def _jobs(self, seed: int, releases: Mapping[str, Sequence[Release]]) -> tuple[list[Any], list[Any]]:
        """Jobs with a mask, and jobs without."""
        from raygard.cluster.evaluation import EvaluationJob

        masked: list[Any] = []
        plain: list[Any] = []
        for name, made in releases.items():
            for each in made:
                for cls, role in classes(self.config):
                    job = EvaluationJob(name, cls, role, each.draw, each.mask_seed, seed, each.mask, each.edit)
                    (masked if each.mask else plain).append(job)
        return masked, plain

    def _with_scorer(self, scorer: str) -> RunConfig:
        return self.config.model_copy(
            update={"evaluation": self.config.evaluation.model_copy(update={"scorer": scorer})}
        )

    # What comes of it

    def _write_if_due(self) -> None:
        for what, write in (("rows", self._write_rows), ("tables", self._write)):
            started = time.monotonic()
            if started >= self._due[what]:
                write()
                ended = time.monotonic()
                self._due[what] = ended + REST * (ended - started)

    def _write_rows(self) -> list[dict[str, Any]]:
        rows = self.matrix.rows()
        write_text(self.dir / MATRIX, to_csv(rows))
        return rows

    def _write(self) -> dict[str, Any]:
        """Everything there is to write of the cells so far; returns what summary.json holds."""
        rows = self._write_rows()
        counts = Counter(row["status"] for row in rows)
        tables = self.matrix.summaries()
        for name, render in TABLES.items():
            write_text(self.dir / name, render(tables))
        summary = {"domain": self.config.domain.name, "cells": dict(counts), "tables": tables}
        write_text(self.dir / SUMMARY, json.dumps(summary, indent=1) + "\n")
        build_matrix_page(tables, counts, self.config.model_dump(mode="json"), self.dir.info, self.dir / PAGE)
        return summary

    def _track(self, summary: Mapping[str, Any]) -> None:
        for table in summary["tables"]:
            place = f"{table['scorer']}_{table['adaptation']}"
            values = {
                re.sub(r"\W", "_", f"{place}_{entry['defence']}_{name}"): entry[name]
                for entry in table["defences"]
                for name in ("mitigation", "legal_impact")
                if entry[name] is not None
            }
            if values:
                self.flow.parent.metrics(values, step=0)
        for name in (MATRIX, SUMMARY, PAGE, *TABLES):
            self.flow.parent.artifact(self.dir / name)


def at_ratio(folder: Path, ratio: float | None) -> Path:
    """Where in a comparison's folder things of masks of this freeze ratio lie (None: of the run's own)."""
    return folder if ratio is None else folder / f"p-{ratio:g}"


def _inputs_for(inputs: Any, config: RunConfig) -> Any:
    """`EvaluationInputs` for another configuration of the same model and domain."""
    return replace(inputs, config=config.model_dump(mode="json"))


def _scale(scorer: str) -> Scale:
    told = scorer_facts(scorer)
    return Scale(scorer, str(told.direction), str(told.unit))
