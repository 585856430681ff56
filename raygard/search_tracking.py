"""A search in MLflow: the search is the parent run, each trial a child, each adaptation a grandchild.

Everything is logged by the driver, so no worker races for a run's name. Short names (p, T, L, mitigation,
legal_impact, score) make MLflow's compare page and search syntax readable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raygard.flow import Flow
from raygard.search.space import dimensions
from raygard.tracking import DOMAIN_TAG, MASK_TAG, RunHandle, track_job

# MLflow's compare page plots the first parameters and the first metric by name, so nothing else may come before these.
SETTINGS = ("p", "T", "L")
FURTHER = ("K", "rule", "illegal_weight", "legal_weight")
SCORES = ("mitigation", "legal_impact", "relative_illegal", "relative_legal", "score", "param_share")
REPORTED = {
    "illegal_loss": "train_illegal_loss",
    "legal_loss": "train_legal_loss",
    "soft_mean": "train_soft_mean",
    "rounding_gap": "train_rounding_gap",
    "proxy": "proxy_best",
}


class SearchTracking:
    """Logs one search; every method may be called again with the same content after a resume."""

    def __init__(self, flow: Flow) -> None:
        self.flow, self.tracker, self.parent = flow, flow.tracker, flow.parent
        self._steps: dict[str, int] = {}
        self._done: set[str] = set()
        self._runs: dict[str, RunHandle] = {}

    def reference(self, results: Sequence[Mapping[str, Any]]) -> None:
        """The jobs every trial is measured against, under a child run of their own."""
        with self.tracker.start("reference", parent=self.parent) as run:
            for result in results:
                track_job(self.tracker, run, result)

    def report(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """One report of a running trial."""
        step = self._steps[trial_id] = self._steps.get(trial_id, -1) + 1
        values = {
            new: float(result[name]) for name, new in REPORTED.items() if isinstance(result.get(name), (int, float))
        }
        if values:
            self._trial_run(trial_id).metrics(values, step=step)

    def trial(self, record: Mapping[str, Any]) -> None:
        """A trial that ended: its point, numbers, mask and adaptations."""
        if record["trial_id"] in self._done:
            return
        self._done.add(record["trial_id"])
        run = self._trial_run(record["trial_id"])
        single = record["point"]["freeze_ratio"] is not None
        run.tags(
            {"raygard.status": record["status"], **({"raygard.reason": record["reason"]} if record["reason"] else {})}
        )
        run.metrics({f"seconds_{name}": value for name, value in record["seconds"].items()}, step=0)
        if not single:
            run.params({"T": record["point"]["temperature"], "L": record["point"]["inner_steps"]})
        for index, candidate in enumerate(record["candidates"]):
            own = run if single else self.tracker.start(f"p={candidate['p']:g}", parent=run)
            self.candidate(own, candidate)
            for result in record["jobs"]:
                if result["draw"] == index:
                    track_job(self.tracker, own, result)
            if not single:
                own.finish()
        run.finish("FAILED" if record["status"] == "failed" else "FINISHED")

    def candidate(self, run: RunHandle, candidate: Mapping[str, Any]) -> None:
        """Settings as params; final numbers and the last proxy as metrics; the mask as artifact."""
        searched = {name for name, values in dimensions(self.flow.config).items() if len(values) > 1}
        params = [name for name in (*SETTINGS, *FURTHER) if name in SETTINGS or name in searched]
        run.params({name: candidate[name] for name in params})
        run.tags({f"raygard.{name}": str(candidate[name]) for name in FURTHER if name not in searched})
        values = {name: candidate[name] for name in SCORES if candidate[name] is not None}
        for name in ("mitigation", "legal_impact"):
            if candidate[f"{name}_ci"] is not None:
                values[f"{name}_low"], values[f"{name}_high"] = candidate[f"{name}_ci"]
        run.metrics(values, step=0)
        for step, entry in enumerate(candidate["proxy"]):
            names = ("mitigation", "legal_impact", "score")
            run.metrics({f"proxy_{name}": entry[name] for name in names if entry[name] is not None}, step=step)
        run.tags({MASK_TAG: candidate["mask_sha256"]})
        run.artifact(self.flow.dir / candidate["mask"], "mask")

    def finish(self, search: Mapping[str, Any], choice: Mapping[str, Any], report: Path) -> None:
        """The choice on the parent run, its files, and the chosen mask in the model registry."""
        pick = choice["chosen"] or choice["nearest"]
        values = {f"chosen_{name}": pick[name] for name in ("p", "T", "L")}
        values |= {f"select_{name}": pick[name] for name in ("mitigation", "legal_impact")}
        outcome = {name: choice["outcome"][name] for name in ("mitigation", "legal_impact")}
        values |= {name: value for name, value in outcome.items() if value is not None}
        values |= {f"seconds_{name}": value for name, value in search["seconds"].items()}
        for fidelity, rho in search["proxy"]["all"]["correlation"].items():
            if rho is not None:
                values[f"proxy_correlation_{fidelity}"] = rho
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

    def _trial_run(self, trial_id: str) -> RunHandle:
        if trial_id not in self._runs:
            self._runs[trial_id] = self.tracker.start(trial_id, parent=self.parent)
        return self._runs[trial_id]
