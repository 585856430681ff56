"""A search in MLflow: the search is the parent run, each trial a child, each adaptation a grandchild.

Everything is logged by the driver, so no worker races for a run's name. Short names (p, T, L, mitigation,
legal_impact, score) make MLflow's compare page and search syntax readable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raygard.flow import Flow
from raygard.outcome import PARTS
from raygard.search.choice import pick_of
from raygard.search.space import dimensions
from raygard.search.tables import point_settings
from raygard.tracking import DOMAIN_TAG, MASK_TAG, RunHandle, track_job
from raygard.values import ROLES

# MLflow's compare page plots the parameters and the metric that were logged first, so nothing may come before these.
SETTINGS = ("p", "T", "L")
FURTHER = ("K", "rule", "illegal_weight", "legal_weight")
SCORES = (*PARTS, "relative_illegal", "relative_legal", "score", "param_share", "base_loss_rise")
REPORTED = {
    "illegal_loss": "publisher_illegal_loss",
    "legal_loss": "publisher_legal_loss",
    "soft_mean": "soft_mean",
    "rounding_gap": "rounding_gap",
}
VALUES_REPORTED = {f"{role}_loss": f"values_{role}_loss" for role in ROLES}


class SearchTracking:
    """Logs one search; every method may be called again with the same content after a resume."""

    def __init__(self, flow: Flow) -> None:
        self.flow, self.tracker, self.parent = flow, flow.tracker, flow.parent
        self._done: dict[str, str] = {}
        self._runs: dict[str, RunHandle] = {}
        self._learning: dict[str, RunHandle] = {}
        self._candidates: dict[str, RunHandle] = {}

    def reference(self, results: Sequence[Mapping[str, Any]]) -> None:
        """The jobs every trial is measured against, under a child run of their own."""
        with self.tracker.start("reference", parent=self.parent) as run:
            for result in results:
                track_job(self.tracker, run, result)

    def report(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """One report of a running trial, in a run of its own below the trial's; rungs come with the candidates."""
        names = VALUES_REPORTED if result.get("kind") == "values" else REPORTED
        values = {new: float(result[name]) for name, new in names.items() if isinstance(result.get(name), (int, float))}
        if values:
            self._learn_run(trial_id).metrics(values, step=result["k"])

    def trial(self, record: Mapping[str, Any]) -> None:
        """A trial that ended: its point, numbers, masks and, under each mask, the adaptations that were done."""
        if self._done.get(record["trial_id"]) == record["status"]:
            return
        self._done[record["trial_id"]] = record["status"]
        run = self._trial_run(record["trial_id"])
        single = record["point"]["freeze_ratio"] is not None
        run.tags(
            {"raygard.status": record["status"], **({"raygard.reason": record["reason"]} if record["reason"] else {})}
        )
        if record["trial_id"] in self._learning:
            self._learning[record["trial_id"]].finish()
        if not (single and record["candidates"]):
            run.params(self._searched(point_settings(record["point"])))
        for index, candidate in enumerate(record["candidates"]):
            own = run if single else self.tracker.start(f"p={candidate['p']:g}", parent=run)
            self._candidates[candidate["candidate_id"]] = own
            self.candidate(own, candidate)
            for result in record["jobs"]:
                if result["draw"] == index:
                    track_job(self.tracker, own, result)
            if not single:
                own.finish()
        run.metrics({f"seconds_{name}": value for name, value in record["seconds"].items()}, step=0)
        run.finish("FAILED" if record["status"] == "failed" else "FINISHED")

    def candidate(self, run: RunHandle, candidate: Mapping[str, Any]) -> None:
        """Settings as params; final numbers and the proxy as metrics; the mask as artifact."""
        params = self._searched(candidate)
        run.params(params)
        run.tags({f"raygard.{name}": str(candidate[name]) for name in FURTHER if name not in params})
        if candidate["incomplete"]:
            run.tags({"raygard.incomplete": ", ".join(candidate["incomplete"])})
        values = {name: candidate[name] for name in SCORES if candidate.get(name) is not None}
        for name in PARTS:
            if candidate.get(f"{name}_ci") is not None:
                values[f"{name}_low"], values[f"{name}_high"] = candidate[f"{name}_ci"]
        run.metrics(values, step=0)
        for step, entry in enumerate(candidate["proxy"]):
            run.metrics({f"proxy_{name}": entry[name] for name in PARTS if entry.get(name) is not None}, step=step)
        run.tags({MASK_TAG: candidate["mask_sha256"]})
        run.artifact(self.flow.dir / candidate["mask"], "mask")

    def finish(self, search: Mapping[str, Any], choice: Mapping[str, Any], report: Path) -> None:
        """The choice on the parent run, its files, and the chosen mask in the model registry."""
        self._proxy_scores(search)
        pick, outcome = pick_of(choice), reported(choice)
        values = {f"chosen_{name}": pick[name] for name in ("p", "T", "L")}
        values |= {f"select_{name}": pick[name] for name in PARTS if pick[name] is not None}
        values |= outcome
        values |= {f"seconds_{name}": value for name, value in search["seconds"].items()}
        for fidelity, entry in search["proxy"]["correlation"].items():
            values |= {f"proxy_correlation_{name}_{fidelity}": rho for name, rho in entry.items() if rho is not None}
        self.parent.metrics(values, step=0)
        self.parent.tags({"raygard.meets_budget": str(choice["meets_budget"]).lower(), MASK_TAG: pick["mask_sha256"]})
        for name in ("search.json", "choice.json", "trials.csv"):
            self.parent.artifact(self.flow.dir / name)
        self.parent.artifact(report, "report")
        if choice["chosen"] is None:
            return
        self.parent.artifact(self.flow.dir / "mask", "mask")
        domain = self.flow.config.domain.name
        tags = {MASK_TAG: pick["mask_sha256"], DOMAIN_TAG: domain}
        tags |= {f"raygard.{name}": str(pick[name]) for name in ("p", "T", "L", "param_share")}
        tags |= {f"raygard.{name}": str(value) for name, value in outcome.items()}
        self.parent.register(f"raygard-mask-{domain}", "mask", tags)

    def _proxy_scores(self, search: Mapping[str, Any]) -> None:
        # Calibrated on all scored trials, so known only now.
        for candidate in (c for trial in search["trials"] for c in trial["candidates"]):
            for step, entry in enumerate(candidate["proxy"]):
                if entry["score"] is not None:
                    self._candidates[candidate["candidate_id"]].metrics({"proxy_score": entry["score"]}, step=step)

    def _searched(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """p, T, L and whatever else the search varies; p is left out where it has all."""
        searched = {name for name, values in dimensions(self.flow.config).items() if len(values) > 1}
        names = [name for name in (*SETTINGS, *FURTHER) if name in SETTINGS or name in searched]
        return {name: settings[name] for name in names if settings[name] is not None}

    def _learn_run(self, trial_id: str) -> RunHandle:
        if trial_id not in self._learning:
            self._learning[trial_id] = self.tracker.start("learn", parent=self._trial_run(trial_id))
        return self._learning[trial_id]

    def _trial_run(self, trial_id: str) -> RunHandle:
        if trial_id not in self._runs:
            self._runs[trial_id] = self.tracker.start(trial_id, parent=self.parent)
        return self._runs[trial_id]


def reported(choice: Mapping[str, Any]) -> dict[str, float]:
    """The picked mask's own numbers on the user half and, as `<name>_over_seeds`, the mean over mask seeds."""
    halves = (("", choice["outcome"]), ("_over_seeds", choice["outcome_over_seeds"]))
    return {f"{name}{end}": half[name] for end, half in halves if half for name in PARTS if half[name] is not None}
