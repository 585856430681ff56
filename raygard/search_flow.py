"""The search of one domain: relearn once, run the trials, choose on the publisher half, score once on the user half."""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raygard.config import RunConfig, config_hash, public
from raygard.config_file import describe_error
from raygard.defences import save_controls
from raygard.errors import RaygardError
from raygard.files import write_text
from raygard.flow import YARDSTICKS, Flow, refuse_if_unmeasurable
from raygard.mask import FreezeMask
from raygard.outcome import LEARNED, PARTS, build_outcome
from raygard.progress import Progress
from raygard.report import build_report
from raygard.search.choice import best_by_ratio, choose, pick_of, with_outcome
from raygard.search.proxy import Evidence, with_predictions
from raygard.search.proxy import summary as proxy_summary
from raygard.search.space import Point, grid, milestones, num_trials, trial_config
from raygard.search.tables import SECONDS, domains_markdown, trials_csv
from raygard.search_tracking import SearchTracking
from raygard.store import Store, content_key

log = logging.getLogger("raygard")

SCHEMA_VERSION = 1
CONTROL_FIELDS = ("param_share", *PARTS, *(f"{part}_ci" for part in PARTS))


class SearchFlow:
    """One search in one directory. Everything but the last step reads the publisher half only."""

    def __init__(
        self,
        config: RunConfig,
        out: str | Path,
        progress: Progress | None = None,
        connect: Callable[[], None] = lambda: None,
    ) -> None:
        """Check everything before anything is written; arguments as for `Flow`.

        Raises RaygardError, also for a combination of the space that is no valid configuration.
        """
        if config.evaluation.half != "publisher":
            evaluation = config.evaluation.model_copy(update={"half": "publisher"})
            config = config.model_copy(update={"evaluation": evaluation})
        if not config.domain.illegal or not config.domain.legal:
            raise RaygardError("a search needs illegal and legal classes: the choice weighs one against the other")
        if not config.mask.learned:
            raise RaygardError(
                f"mask.rule={config.mask.rule} learns nothing to search for; use `raygard learn` or `run`"
            )
        if LEARNED not in config.evaluation.defences:
            raise RaygardError(f"evaluation.defences must contain '{LEARNED}': it is the mask the search is about")
        for point, other in pairwise(sorted(grid(config), key=lambda point: point.trial_id)):
            if point.trial_id == other.trial_id:
                raise RaygardError(
                    f"two points of the search are called {point.trial_id}; values need 6 digits to differ"
                )
        for point in grid(config):
            try:
                trial_config(config, point)
            except ValidationError as error:
                raise RaygardError(f"trial {point.trial_id}: {describe_error(error)}") from None
        self.config, self.out = public(config), Path(out)
        self.flow = Flow(config, out, progress, connect)
        self.dir = self.flow.dir
        self.progress = self.flow.progress
        self.seconds: dict[str, float] = dict(self.dir.info.get("search_seconds", {}))
        self.tracking = SearchTracking(self.flow)
        self.summary: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        """The whole search; returns choice.json's content."""
        from raygard.cluster.evaluation import EvaluationPool

        started, begun = self.dir.info["started"], time.monotonic()
        with self.flow.parent, EvaluationPool.start(self.config) as pool:
            relearned = self._timed("relearn", self.flow.relearn)
            folder = self.dir / "select"
            inputs = self.flow.evaluation_inputs(folder, milestones(self.config))
            reference = self._timed("reference", self._reference, inputs, pool)
            records, decisions = self._timed("trials", self._trials, inputs, pool, relearned, reference)
            search = self._summary(records, decisions, reference, started)
            candidates = [entry for record in search["trials"] for entry in record["candidates"]]
            choice = choose(
                candidates,
                domain=self.config.domain.name,
                legal_budget=self.config.domain.legal_budget,
                base_loss_budget=self.config.domain.base_loss_budget if self.config.values.enabled else None,
                legal_penalty=self.config.search.legal_penalty,
                config_hash=config_hash(self.config),
                seed=self.config.seed,
                savings_tolerance=self.config.search.savings_tolerance,
                notes=search["notes"],
                resolvable_legal_impact=search["resolvable_legal_impact"],
            )
            matched = best_by_ratio(candidates) | {pick_of(choice)["p"]: pick_of(choice)}
            search["controls"] = self._timed("controls", self._controls, inputs, pool, reference, matched)
            self._write(search, choice)
            self._copy_mask(choice)
            released, over_seeds, agreement = self._timed("final", self._final, choice, pool)
            choice = with_outcome(choice, released, over_seeds)
            self._add_seconds("total", time.monotonic() - begun)
            search = {**search, "agreement": agreement, "seconds": self.seconds}
            search["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            self._write(search, choice)
            self.summary = search
            report = build_report(self.dir.path)
            self.tracking.finish(search, choice, report)
        return choice

    # Stages

    def _reference(self, inputs: Any, pool: Any) -> list[dict[str, Any]]:
        """The release itself and users without any mask: what every trial is measured against."""
        from raygard.cluster.evaluation import EvaluationJob, run_jobs

        jobs = [
            EvaluationJob(defence, cls, role, seed=seed)
            for defence in reversed(YARDSTICKS)
            for seed in (self.config.evaluation.adaptation_seeds if defence == "none" else (0,))
            for cls, role in self.config.domain.adapted
        ]
        with self.progress.bar("users without a mask", len(jobs)) as bar:
            results = run_jobs(jobs, inputs, pool, on_result=lambda result: bar.advance(1, result["class"]))
        failures: list[dict[str, Any]] = []
        for failure in (result for result in results if result.get("failed")):
            failures.append(failure)
            refuse_if_unmeasurable(jobs, failures)
            log.warning("%s failed and is left out: %s", failure["job_id"], failure["reason"])
        results = [result for result in results if not result.get("failed")]
        self._refuse_if_nothing_counts(build_outcome(results, self.config, {})["classes"])
        self.tracking.reference(results)
        return results

    def _refuse_if_nothing_counts(self, classes: Sequence[Mapping[str, Any]]) -> None:
        for role in ("illegal", "legal"):
            own = [entry for entry in classes if entry["role"] == role]
            if not any(entry["counted"] for entry in own):
                gaps = ", ".join(f"{c['class']} {c['gap']:.3g} (3 standard errors: {3 * c['se']:.3g})" for c in own)
                raise RaygardError(
                    f"no {role} class can be measured: fine-tuning without a mask moves the {role} classes too little "
                    f"({gaps}); raise adapt.max_train_steps, adapt.learning_rate or generation.num_images"
                )

    def _trials(
        self, inputs: Any, pool: Any, relearned: Path, reference: list[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Records of all trials, and the decisions on pruning."""
        from raygard.cluster.search import run_trials
        from raygard.cluster.trial import PROGRESS, TRIAL, TrialInputs, read_record

        trials = self.dir / "trials"
        seed = self.config.evaluation.mask_seeds[0]
        values = self.flow.values_inputs(seed) if self.config.values.enabled else None
        caches = [self.flow.learn_cache.name, Path(inputs.cache).name]
        caches += [] if values is None else [Path(values.cache).name, Path(values.general).name]
        decisive = [config_hash(self.config), self.flow.model_hash, *caches]
        shared = TrialInputs(
            config=self.config.model_dump(mode="json"),
            key=content_key({"decisive": decisive}),
            cache=str(self.flow.learn_cache),
            relearned=str(relearned),
            out=str(trials),
            evaluation=inputs,
            pool=pool,
            reference=reference,
            values=values,
        )
        ended: set[str] = set()
        with self.progress.bar("trials", num_trials(self.config)) as bar:

            def listen(event: str, trial_id: str, result: dict[str, Any]) -> None:
                folder = trials / trial_id
                if event == "result":
                    bar.advance(0, describe(trial_id, result))
                    self.tracking.report(trial_id, result)
                    return
                record = read_record(folder / TRIAL)
                if record is None or record["key"] != shared.key:
                    record = read_record(folder / PROGRESS) or _bare_record(self.config, trial_id, shared.key)
                    status = "failed" if event == "error" else "pruned"
                    reason = result.get("reason") if event == "error" else "stopped early: its proxy ranked low"
                    record = {**record, "status": status, "reason": reason}
                    write_text(folder / TRIAL, json.dumps(record, indent=1) + "\n")
                if trial_id not in ended:
                    ended.add(trial_id)
                    bar.advance(1, f"{trial_id} {record['status']}")
                    if record["status"] == "failed":
                        log.warning("trial %s failed: %s", trial_id, record["reason"])
                self.tracking.trial(record)

            decisions = run_trials(self.config, shared, self.dir.path, listen)
        # The users of pruned trials wait in vain.
        Store(Path(inputs.store)).drop_paused()
        records = [read_record(trials / point.trial_id / TRIAL) for point in grid(self.config)]
        known = [record for record in records if record is not None and record["key"] == shared.key]
        if len(known) < num_trials(self.config):
            raise RaygardError(
                f"only {len(known)} of {num_trials(self.config)} trials ended; give the same command again to go on"
            )
        for record in known:
            self.tracking.trial(record)
        scored = sorted((r for r in known if r["status"] == "scored"), key=lambda r: r["finished"])
        first = {record["trial_id"] for record in scored[: self.config.search.calibration_trials]}
        known = [{**record, "phase": "calibration" if record["trial_id"] in first else "search"} for record in known]
        return known, decisions

    def _controls(
        self,
        inputs: Any,
        pool: Any,
        reference: Sequence[dict[str, Any]],
        matched: Mapping[float, Mapping[str, Any]],
    ) -> list[dict[str, Any]]:
        """Users under control masks, for each p matched to one candidate's mask."""
        from raygard.cluster.evaluation import EvaluationJob, run_jobs

        names, config = self.config.search.controls, self.config
        owners: list[tuple[float, str]] = []
        jobs = []
        for ratio, candidate in sorted(matched.items()):
            learned = FreezeMask.load(self.dir / candidate["mask"])
            folder = self.dir / "controls" / f"p{ratio:g}"
            paths = save_controls(config, learned, folder, names, self.flow.relearn)
            for (name, draw), path in paths.items():
                for seed in config.evaluation.adaptation_seeds:
                    for cls, role in config.domain.adapted:
                        owners.append((ratio, name))
                        jobs.append(EvaluationJob(name, cls, role, draw, None, seed, path))
        if not jobs:
            return []
        with self.progress.bar("control masks", len(jobs)) as bar:
            plain = replace(inputs, milestones=())
            results = run_jobs(jobs, plain, pool, on_result=lambda result: bar.advance(1, result["defence"]))
        found = []
        for ratio, candidate in sorted(matched.items()):
            for name in names:
                own = [r for r, owner in zip(results, owners, strict=True) if owner == (ratio, name)]
                done = [{**r, "mask_seed": 0} for r in own if not r.get("failed")]
                for result in (r for r in own if r.get("failed")):
                    log.warning("%s at p %g: %s", result["job_id"], ratio, result["reason"])
                if not done:
                    continue
                outcome = build_outcome([*reference, *done], config, {})
                entry = next(row for row in outcome["summary"] if row["defence"] == name)
                values = {field: entry[field] for field in CONTROL_FIELDS}
                values |= {"candidate_id": candidate["candidate_id"], "draws": len({r["draw"] for r in done})}
                found.append({"p": ratio, "defence": name, **values})
        return found

    def _final(
        self, choice: Mapping[str, Any], pool: Any
    ) -> tuple[dict[str, Any], dict[str, Any] | None, list[dict[str, Any]]]:
        """Score the picked mask, and masks of the other seeds at the same point, on the user half. Done once.

        Returns the picked mask's own numbers, those over all seeds (None for one), and how far the seeds agree.
        """
        pick, seeds = pick_of(choice), list(self.config.evaluation.mask_seeds)
        point = next(point for point in grid(self.config) if point.trial_id == pick["trial_id"])
        config = trial_config(self.config, point)
        mask = config.mask.model_copy(update={"freeze_ratio": pick["p"]})
        evaluation = config.evaluation.model_copy(update={"half": "user"})
        final = Flow(
            config.model_copy(update={"mask": mask, "evaluation": evaluation}),
            self.dir / "final",
            self.progress,
            upstream=self.flow,
        )
        with final.parent:
            first = FreezeMask.load(self.dir / pick["mask"])
            masks = [first, *(final.learn(seed) for seed in seeds[1:])]
            final.release(masks)
            outcome = final.evaluate(masks, pool)
            final.report()
        over_seeds = learned_entry(outcome)
        if len(seeds) == 1:
            return over_seeds, None, []
        own = [result for result in final.results if result["defence"] != LEARNED or result["mask_seed"] == seeds[0]]
        alone = config.evaluation.model_copy(update={"half": "user", "mask_seeds": (seeds[0],)})
        released = learned_entry(build_outcome(own, final.config.model_copy(update={"evaluation": alone}), {}))
        facts = final.dir.info["mask"]
        names = ("seed_agreement", "seed_agreement_chance")
        agreement = {"p": pick["p"], "seeds": seeds, **{name: facts[name] for name in names}}
        return released, {**over_seeds, "mask_seeds": seeds}, [agreement]

    # Files

    def _summary(
        self,
        records: Sequence[dict[str, Any]],
        decisions: list[dict[str, Any]],
        reference: Sequence[dict[str, Any]],
        started: str,
    ) -> dict[str, Any]:
        config = self.config
        evidence = Evidence(config.domain.legal_budget, config.search.legal_penalty)
        for record in records:
            evidence.add_record(record)
        shares = [step / config.adapt.max_train_steps for step in milestones(config)]
        return {
            "schema_version": SCHEMA_VERSION,
            "domain": config.domain.name,
            "scorer": config.evaluation.scorer,
            "config_hash": config_hash(config),
            "legal_budget": config.domain.legal_budget,
            "mode": config.search.mode,
            "algorithm": config.search.algorithm,
            "scheduler": config.search.scheduler,
            "seed": config.seed,
            "relearn_runs": self.flow.relearn_runs,
            "trials": [{k: v for k, v in r.items() if k != "jobs"} for r in with_predictions(records, evidence)],
            "controls": [],
            "proxy": {
                "threshold": config.search.min_proxy_correlation,
                "calibration_trials": config.search.calibration_trials,
                "decisions": decisions,
                **proxy_summary(evidence, shares),
            },
            "classes": build_outcome(list(reference), config, {})["classes"],
            **self._conditions(records, reference),
            "agreement": [],
            "seconds": self.seconds,
            "started": started,
            "finished": None,
        }

    def _conditions(self, records: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What the intervals of the publisher half are conditional on: the same for every candidate of a search."""
        scored = [record for record in records if record["status"] == "scored"][:1]
        own = [result for record in scored for result in record["jobs"] if result["draw"] == 0]
        outcome = build_outcome([*reference, *own], self.config, {})
        return {name: outcome[name] for name in ("notes", "resolvable_legal_impact")}

    def _write(self, search: Mapping[str, Any], choice: Mapping[str, Any]) -> None:
        write_text(self.dir / "search.json", json.dumps(search, indent=1) + "\n")
        write_text(self.dir / "trials.csv", trials_csv(search))
        write_text(self.dir / "choice.json", json.dumps(choice, indent=1) + "\n")

    def _copy_mask(self, choice: Mapping[str, Any]) -> None:
        """The chosen mask as `mask/`; one over the budget is kept apart, so that nobody releases it by accident."""
        name, other = ("mask", "nearest-mask") if choice["chosen"] else ("nearest-mask", "mask")
        shutil.rmtree(self.dir / other, ignore_errors=True)
        FreezeMask.load(self.dir / pick_of(choice)["mask"]).save(self.dir / name)

    def _timed(self, name: str, work: Callable[..., Any], *args: Any) -> Any:
        started = time.monotonic()
        result = work(*args)
        self._add_seconds(name, time.monotonic() - started)
        return result

    def _add_seconds(self, name: str, seconds: float) -> None:
        # A search that is resumed has cost what its earlier attempts took as well.
        self.seconds[name] = round(self.seconds.get(name, 0.0) + seconds, 2)
        self.dir.note(search_seconds=self.seconds)


def learned_entry(outcome: Mapping[str, Any]) -> dict[str, Any]:
    """The learned mask's row of an outcome's summary. Raises RaygardError if no user under it was measured."""
    for row in outcome["summary"]:
        if row["defence"] == LEARNED:
            return dict(row)
    raise RaygardError(
        "no user under the released mask could be measured; failures.json beside outcome.json says why, "
        "mend it and run the same command again"
    )


def search_folders(configs: Sequence[RunConfig], out: Path) -> list[Path]:
    """Where each search writes: `out` itself for one domain, a folder named after each for several.

    Raises RaygardError if two domains have the same name.
    """
    names = [config.domain.name for config in configs]
    for name in names:
        if names.count(name) > 1:
            raise RaygardError(f"two domains are called '{name}'; give each its own domain.name")
        # MLflow's registry refuses the same names, hours later.
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_. -]*", name):
            raise RaygardError(f"domain.name '{name}' cannot name a folder; use letters, digits and dashes")
    return [out / name for name in names] if len(configs) > 1 else [out]


def write_domains(out: Path, done: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """domains.md: one table over all domains of one call."""
    write_text(out / "domains.md", domains_markdown(done))


def describe(trial_id: str, result: Mapping[str, Any]) -> str:
    """One line for the progress bar."""
    if "fidelity" not in result:
        doing = "training values, step" if result.get("kind") == "values" else "learning, publisher step"
        return f"{trial_id} {doing} {result.get('k', 0)}"
    if not result["scored"]:
        return f"{trial_id} adapting, rung {result['fidelity']}"
    return f"{trial_id} scored {result.get('score', float('nan')):.3f}"


def _bare_record(config: RunConfig, trial_id: str, key: str) -> dict[str, Any]:
    """trial.json of a trial that left nothing behind."""
    point: Point = next(point for point in grid(config) if point.trial_id == trial_id)
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return {
        "schema_version": SCHEMA_VERSION,
        "key": key,
        "trial_id": trial_id,
        "point": {**point.to_json(), "publisher_steps": trial_config(config, point).bilevel.publisher_steps},
        "candidates": [],
        "jobs": [],
        "seconds": dict.fromkeys(SECONDS, 0.0),
        "started": now,
        "finished": now,
    }
