"""Run by test_tune.py: the trials of a real search, through Tune, Optuna and ASHA, with canned results.

canned_trials.py DATA OUT SECONDS      SECONDS: how long a trial takes between two reports
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

sys.path.insert(0, str(Path(__file__).parents[2]))

import raygard.cluster.search as search
from raygard.cluster.evaluation import EvaluationInputs
from raygard.cluster.session import ray_session
from raygard.cluster.trial import OUTCOME_FIELDS, PROGRESS, Trial
from raygard.config_file import load_config
from raygard.flow import Flow
from raygard.search.space import candidate_id, milestones
from raygard.search_flow import SearchFlow
from tests.search_fixtures import SETTINGS

OWN = (
    "search.freeze_ratios=[0.1,0.3,0.5,0.7]",
    "search.temperatures=[0.1,0.4]",
    "search.inner_steps=[2]",
    "search.algorithm=optuna",
    "search.num_trials=7",
    "search.calibration_trials=3",
    # One after the other, so that what is proposed and pruned does not depend on who is faster.
    "search.max_concurrent_trials=1",
    "domain.legal_budget=0.2",
    "tracking.enabled=false",
)


class Canned(Trial):
    """More frozen blocks more of both; the losses show a tenth of it."""

    seconds = 0.0

    def run(self, report: Any) -> dict[str, Any]:
        p, points = self.point.freeze_ratio, (2.0 + self.point.temperature)
        assert p is not None
        mitigation, legal_impact = p * points, p * p * points
        candidate = {
            "candidate_id": candidate_id(self.point, p),
            "proxy": [],
            "incomplete": [],
            **dict.fromkeys((*OUTCOME_FIELDS, "score")),
        }
        for index, step in enumerate(milestones(self.base)):
            fidelity = step / self.base.adapt.max_train_steps
            parts = {"mitigation": mitigation / 10, "legal_impact": legal_impact / 10}
            candidate["proxy"].append({"fidelity": fidelity, "step": step, **parts})
            self.write("running", [candidate], name=PROGRESS)
            report(self.metrics([candidate], self.times[index], scored=False))
            self.reported += 1
            time.sleep(self.seconds)
        candidate |= {
            "mitigation": mitigation,
            "legal_impact": legal_impact,
            "score": self.score(mitigation, legal_impact),
        }
        return self.write("scored", [candidate])


def main() -> None:
    data, out, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    config = load_config(None, [*SETTINGS, f"domain.data={data}", *OWN])

    def run_canned(tune_config: dict[str, Any], inputs: Any) -> None:
        import raygard.cluster.trial as trial

        Canned.seconds, trial.Trial = seconds, Canned
        trial.run_trial(tune_config, inputs)

    search.run_trial = run_canned
    Flow.learn_cache = Path("learn")
    with ray_session(local_cpus=2, state_api=True):
        flow = SearchFlow(config, out)
        flow.tracking = Mock()
        folder = flow.dir / "select"
        inputs = EvaluationInputs(config.model_dump(mode="json"), "select", "", "", str(folder / "r.npz"), str(folder))
        records, decisions = flow._trials(inputs, None, Path("relearned"), [])
    statuses = {record["trial_id"]: record["status"] for record in records}
    print(json.dumps({"statuses": statuses, "decisions": decisions}))


if __name__ == "__main__":
    main()
