"""One trial of the search, as a Ray Tune function: learn, let users adapt, report a proxy on the way, score.

The function only drives: learning is a Ray Train run, adaptations are tasks, pictures and scores come from the
evaluation actors. What it finishes lies in the trial's folder, so a trial that starts again goes on from there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raygard.cluster.evaluation import EvaluationInputs, EvaluationJob, EvaluationPool, run_jobs
from raygard.cluster.values import ValuesInputs, release_values
from raygard.config import RunConfig
from raygard.defences import make_mask
from raygard.errors import RaygardError
from raygard.files import write_text
from raygard.mask import FreezeMask
from raygard.outcome import PARTS, build_outcome
from raygard.rundir import stage, stage_seconds
from raygard.search.proxy import blocked_by_loss, score
from raygard.search.space import Point, candidate_id, candidate_ratios, milestones, trial_config

TRIAL, PROGRESS = "trial.json", "progress.json"
SCHEMA_VERSION = 1
FINISHED = ("scored", "pruned")
OUTCOME_FIELDS = (*PARTS, *(f"{part}_ci" for part in PARTS), "relative_illegal", "relative_legal")


@dataclass(frozen=True)
class TrialInputs:
    """What all trials share. Paths are on shared storage.

    key: hash of everything that decides a trial's result besides its point. reference: results of the jobs "base"
    and "none", which every trial is measured against. values: what training values reads; None where masks have none.
    """

    config: dict[str, Any]
    key: str
    cache: str
    relearned: str
    out: str
    evaluation: EvaluationInputs
    pool: EvaluationPool
    reference: list[dict[str, Any]]
    values: ValuesInputs | None = None

    def folder(self, point: Point) -> Path:
        return Path(self.out) / point.trial_id


def rung_times(config: RunConfig) -> list[int]:
    """ASHA's time of each fidelity, and of the score last: powers of the reduction factor, as its rungs are."""
    return [config.search.reduction_factor**index for index in range(len(milestones(config)) + 1)]


def shares(config: RunConfig) -> dict[int, float]:
    """Share of the full adaptation at each rung, by ASHA's time of it."""
    steps = milestones(config)
    return dict(zip(rung_times(config), (step / config.adapt.max_train_steps for step in steps), strict=False))


def read_point(tune_config: Mapping[str, Any]) -> Point:
    """The trial's point: one value of Tune's grid, or Optuna's choice for each dimension."""
    return Point(**tune_config.get("point", tune_config))


def run_trial(tune_config: dict[str, Any], inputs: TrialInputs) -> None:
    """The trainable: reports at each rung and when all is scored, as `Trial.metrics` says; writes trial.json last."""
    from ray import tune

    point = read_point(tune_config)
    trial = Trial(point, inputs)
    record = trial.finished()
    if record is None:
        try:
            record = trial.run(tune.report)
        except RaygardError as error:
            record = trial.write("failed", [], reason=str(error))
    for metrics in trial.reports(record)[trial.reported :]:
        tune.report(metrics)


class Trial:
    """The work of one trial."""

    def __init__(self, point: Point, inputs: TrialInputs) -> None:
        self.point, self.inputs, self.folder = point, inputs, inputs.folder(point)
        self.base = RunConfig.model_validate(inputs.config)
        self.config = trial_config(self.base, point)
        self.times = rung_times(self.base)
        self.reported = 0
        self.started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._losses = _reference_losses(inputs.reference)

    def finished(self) -> dict[str, Any] | None:
        """trial.json of an earlier attempt with the same inputs."""
        record = read_record(self.folder / TRIAL)
        return record if record and record["key"] == self.inputs.key and record["status"] in FINISHED else None

    def run(self, report: Any) -> dict[str, Any]:
        """Learn, adapt, generate and score; return trial.json's content."""
        from ray.tune.integration.ray_train import TuneReportCallback

        candidates = self.learn([TuneReportCallback()])
        jobs = self.jobs(candidates)

        def on_milestone(step: int, losses: Mapping[str, float], seconds: float) -> None:
            self.add_proxy(candidates, jobs, step, losses)
            self.write("running", candidates, adapt_seconds=seconds, name=PROGRESS)
            report(self.metrics(candidates, self.times[self.reported], scored=False))
            self.reported += 1

        results = run_jobs(jobs, self.inputs.evaluation, self.inputs.pool, on_milestone=on_milestone)
        failed = [result for result in results if result.get("failed")]
        if len(failed) == len(jobs):
            raise RaygardError(failed[0]["reason"])
        done = [result for result in results if not result.get("failed")]
        for index, candidate in enumerate(candidates):
            own = [result for result in done if result["draw"] == index]
            candidate.update(self.measure(own))
        reason = "; ".join(f"{result['job_id']}: {result['reason']}" for result in failed) or None
        return self.write("scored", candidates, reason=reason, results=done)

    def learn(self, callbacks: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Learn the ranking once, and save the mask of each candidate read off it, with values if asked for."""
        from raygard.cluster.training import learn

        seed, config = self.base.evaluation.mask_seeds[0], self.config
        with stage(self.folder / "learn", {"key": self.inputs.key, "point": self.point.to_json()}) as (folder, done):
            if not done:
                caches = Path(self.inputs.cache), Path(self.inputs.relearned)
                logits, soft = learn(config, *caches, seed, folder, callbacks=callbacks)
                for ratio in candidate_ratios(self.base, self.point):
                    mask = make_mask(config, logits, soft, seed, ratio)
                    mask.save(self.learned_folder(ratio))
        ratios = candidate_ratios(self.base, self.point)
        if self.inputs.values is not None:
            for ratio in ratios:
                # The losses of several masks would be one curve in MLflow.
                self.teach(ratio, self.inputs.values, callbacks if len(ratios) == 1 else ())
        return [self.candidate(ratio) for ratio in ratios]

    def teach(self, ratio: float, inputs: ValuesInputs, callbacks: Sequence[Any]) -> None:
        """Train the values of one candidate's frozen tensors."""
        mask, seed = FreezeMask.load(self.learned_folder(ratio)), self.base.evaluation.mask_seeds[0]
        decisive = {"key": self.inputs.key, "point": self.point.to_json(), "mask": mask.sha256}
        with stage(self.values_folder(ratio), decisive) as (folder, done):
            if not done:
                release_values(self.config, mask, inputs, seed, folder, callbacks=callbacks)

    def learned_folder(self, ratio: float) -> Path:
        return self.folder / "masks" / candidate_id(self.point, ratio)

    def values_folder(self, ratio: float) -> Path:
        return self.folder / "values" / candidate_id(self.point, ratio)

    def mask_folder(self, ratio: float) -> Path:
        """The mask users adapt under, which may be chosen."""
        return self.learned_folder(ratio) if self.inputs.values is None else self.values_folder(ratio) / "mask"

    def candidate(self, ratio: float) -> dict[str, Any]:
        mask = FreezeMask.load(self.mask_folder(ratio))
        path = self.mask_folder(ratio).relative_to(Path(self.inputs.out).parent)
        return {
            "candidate_id": candidate_id(self.point, ratio),
            "trial_id": self.point.trial_id,
            "p": ratio,
            "T": self.point.temperature,
            "L": self.point.inner_steps,
            "K": self.config.bilevel.publisher_steps,
            "rule": self.point.rule,
            "illegal_weight": self.point.illegal_weight,
            "legal_weight": self.point.legal_weight,
            "mask": str(path),
            "mask_sha256": mask.sha256,
            "freeze_ratio": mask.ratio_by_count,
            "param_share": mask.ratio_by_params,
            "base_loss_rise": base_loss_rise(mask),
            "proxy": [],
            "incomplete": [],
            **dict.fromkeys((*OUTCOME_FIELDS, "score")),
        }

    def jobs(self, candidates: Sequence[Mapping[str, Any]]) -> list[EvaluationJob]:
        """A user for each candidate, class and adaptation seed. `draw` is the candidate's number."""
        evaluation, domain = self.base.evaluation, self.base.domain
        return [
            EvaluationJob("freeze", cls, role, index, evaluation.mask_seeds[0], seed, str(self.mask_folder(entry["p"])))
            for index, entry in enumerate(candidates)
            for seed in evaluation.adaptation_seeds
            for cls, role in domain.adapted
        ]

    def add_proxy(
        self, candidates: list[dict[str, Any]], jobs: Sequence[EvaluationJob], step: int, losses: Mapping[str, float]
    ) -> None:
        """Blocked share by held-out loss after `step` steps of adaptation, for every candidate."""
        roles = {job.cls: job.role for job in jobs}
        for index, candidate in enumerate(candidates):
            own = [(job.cls, losses[job.job_id]) for job in jobs if job.draw == index and job.job_id in losses]
            guarded = _means(own)
            mitigation, legal_impact = None, None
            # A user of every class, or the sums would be over other classes than the other candidates'.
            if guarded.keys() == roles.keys():
                full = {cls: self._losses["none", cls, step] for cls in guarded}
                base = {cls: self._losses["base", cls, step] for cls in guarded}
                mitigation, legal_impact = blocked_by_loss(guarded, full, base, roles)
            fidelity = step / self.base.adapt.max_train_steps
            candidate["proxy"].append(
                {"fidelity": fidelity, "step": step, "mitigation": mitigation, "legal_impact": legal_impact}
            )

    def score(self, mitigation: float | None, legal_impact: float | None) -> float | None:
        return score(mitigation, legal_impact, self.base.domain.legal_budget, self.base.search.legal_penalty)

    def measure(self, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Mitigation and legal impact of one candidate on the publisher half, with intervals.

        Without a user of every counted class it has no score: the sums would be over other classes than elsewhere.
        """
        # build_outcome tells masks apart by (mask_seed, draw); here `draw` only numbers the candidates.
        own = [{**result, "draw": 0} for result in results]
        outcome = build_outcome([*self.inputs.reference, *own], self.config, {})
        expected = {(entry["class"], seed) for entry in outcome["classes"] if entry["counted"] for seed in self.seeds}
        missing = sorted({cls for cls, _ in expected - {(result["class"], result["seed"]) for result in results}})
        entry = next((row for row in outcome["summary"] if row["defence"] == "freeze"), None)
        if entry is None:
            return {"incomplete": missing}
        values = {field: entry[field] for field in OUTCOME_FIELDS}
        found = None if missing else self.score(values["mitigation"], values["legal_impact"])
        return {**values, "incomplete": missing, "score": found}

    @property
    def seeds(self) -> list[int]:
        return list(self.base.evaluation.adaptation_seeds)

    def metrics(self, candidates: Sequence[Mapping[str, Any]], fidelity: int, scored: bool) -> dict[str, Any]:
        """What Tune sees: the parts of each candidate, by proxy or, when all is scored, by the scorer.

        {"trial", "fidelity", "scored": 0 | 1, "mitigations", "legal_impacts"} and, only when scored, "score" of the
        best candidate: a proxy is no score, and must not reach the search algorithm as one.
        """
        entries: list[Mapping[str, Any]]
        if scored:
            entries = [dict.fromkeys(("mitigation", "legal_impact")) if c["incomplete"] else c for c in candidates]
        else:
            entries = [candidate["proxy"][-1] for candidate in candidates]
        known = [c["score"] for c in candidates if c["score"] is not None]
        return {
            "trial": self.point.trial_id,
            "fidelity": fidelity,
            "scored": int(scored),
            "mitigations": [entry["mitigation"] for entry in entries],
            "legal_impacts": [entry["legal_impact"] for entry in entries],
            **({"score": max(known)} if scored and known else {}),
        }

    def reports(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        """All reports that lead to `record`, so that a repeated trial tells Tune the same as the first."""
        candidates = record["candidates"]
        length = min((len(entry["proxy"]) for entry in candidates), default=0)
        found = []
        for index in range(length):
            cut = [{**entry, "proxy": entry["proxy"][: index + 1]} for entry in candidates]
            found.append(self.metrics(cut, self.times[index], scored=False))
        if record["status"] == "scored":
            found.append(self.metrics(candidates, self.times[-1], scored=True))
        return found or [{"trial": self.point.trial_id}]

    def write(
        self,
        status: str,
        candidates: list[dict[str, Any]],
        *,
        reason: str | None = None,
        results: Sequence[Mapping[str, Any]] = (),
        adapt_seconds: float = 0.0,
        name: str = TRIAL,
    ) -> dict[str, Any]:
        """Write trial.json (or the progress a stopped trial leaves behind) in one piece.

        adapt_seconds: spent by users without a result yet.
        """
        taught = (self.values_folder(ratio) for ratio in candidate_ratios(self.base, self.point))
        seconds = {"learn": stage_seconds(self.folder / "learn"), "values": round(sum(map(stage_seconds, taught)), 2)}
        for kind in ("adapt", "generate", "score"):
            seconds[kind] = round(sum(result["seconds"].get(kind, 0.0) for result in results), 2)
        seconds["adapt"] = round(seconds["adapt"] + adapt_seconds, 2)
        record = {
            "schema_version": SCHEMA_VERSION,
            "key": self.inputs.key,
            "trial_id": self.point.trial_id,
            "phase": "search",
            "status": status,
            "reason": reason,
            "point": {**self.point.to_json(), "publisher_steps": self.config.bilevel.publisher_steps},
            "candidates": candidates,
            "jobs": [dict(result) for result in results],
            "seconds": {**seconds, "total": round(sum(seconds.values()), 2)},
            "started": self.started,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_text(self.folder / name, json.dumps(record, indent=1) + "\n")
        return record


def read_record(path: Path) -> dict[str, Any] | None:
    """trial.json or progress.json; None if it is not there or not whole."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("schema_version") == SCHEMA_VERSION else None


def base_loss_rise(mask: FreezeMask) -> float | None:
    """By what share the mask's values raise the release's own loss on general pictures; None without values."""
    if not mask.values:
        return None
    return mask.metrics["base_loss_after"] / mask.metrics["base_loss_before"] - 1


def _means(pairs: Sequence[tuple[Any, float]]) -> dict[Any, float]:
    groups: dict[Any, list[float]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return {key: sum(values) / len(values) for key, values in groups.items()}


def _reference_losses(reference: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, int], float]:
    """Held-out loss of the jobs "base" and "none": `{(defence, class, step): mean over adaptation seeds}`."""
    return _means(
        [
            ((result["defence"], result["class"], step), loss)
            for result in reference
            for step, loss in result["milestones"]
        ]
    )
