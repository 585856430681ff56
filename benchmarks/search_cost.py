"""What a search saves, and what that costs: pruning against the full grid, one ranking against one run for each p.

    python benchmarks/search_cost.py --out DIR [--results benchmarks/results/search_cost.json] [KEY=VALUE ...]

Two real searches on the bundled model, in one Ray cluster: the full grid (every trial learned, adapted and scored,
nothing pruned), and mode `one_ranking` (one learning run for all p) at the same T and L.

1. *Pruning.* The scheduler that ships (`CalibratedASHA`) is fed the reports of the full grid in the order in which
   its trials ended, so that its decisions are those it would have taken; a trial it stops costs its learning and its
   users' adaptation up to that rung, since users adapt rung by rung. Reported: CPU-seconds against the full grid's,
   and whether the choice is the same.
2. *One ranking.* For each p: mitigation and legal impact of the mask read off the shared ranking, less those of the
   mask learned for this p, with both intervals; and the CPU-seconds of learning.

CPU-seconds are reserved ones: wall-clock of each stage times the CPUs it holds, start-up of its processes included.
A repeated call with the same --out reuses what is finished.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raygard.cluster.search import CalibratedASHA
from raygard.cluster.session import ray_session
from raygard.cluster.trial import rung_times, shares
from raygard.config import RunConfig
from raygard.config_file import load_config
from raygard.progress import Progress
from raygard.search.choice import choose, measure, pick_of
from raygard.search.proxy import Evidence
from raygard.search_flow import SearchFlow

CONFIG = Path(__file__).parent.parent / "jobs" / "configs" / "search.yaml"
# What is recorded in docs/benchmarks.md is of rule `budget`.
SIZES = (
    "mask.rule=budget",
    "domain.illegal=[Noto Line]",
    "domain.legal=[Fluent High Contrast]",
    "search.freeze_ratios=[0.1,0.3,0.5,0.7]",
    "search.temperatures=[]",
    "search.inner_steps=[3,8]",
    "search.algorithm=grid",
    "search.num_trials=null",
    "search.scheduler=fifo",
    "search.calibration_trials=4",
    "search.controls=[]",
    "evaluation.defences=[none,freeze]",
    "evaluation.mask_seeds=[0]",
)

Content = Mapping[str, Any]


def search(out: Path, overrides: Sequence[str]) -> tuple[RunConfig, dict[str, Any]]:
    """Run one search; return its configuration and search.json."""
    config = load_config(CONFIG, [*SIZES, *overrides])
    flow = SearchFlow(config, out, Progress(quiet=False))
    flow.run()
    return config, flow.summary


def cpu_seconds(trial: Content, config: RunConfig, share: float = 1.0, *, scored: bool = True) -> float:
    """CPU-seconds of a trial of which `share` of the adaptation was done, and pictures and scores if `scored`."""
    seconds = trial["seconds"]
    total = seconds["learn"] * config.engine.num_workers + seconds["adapt"] * share
    return total + (seconds["generate"] + seconds["score"] if scored else 0.0)


def replay(config: RunConfig, summary: Content) -> dict[str, Any]:
    """What the shipped scheduler would have stopped, and what that would have saved."""
    s, rungs = config.search, {share: rung for rung, share in shares(config).items()}
    scheduler = CalibratedASHA(rung_times(config), s.reduction_factor, s.calibration_trials, s.min_proxy_correlation)
    evidence = Evidence(config.domain.legal_budget, s.legal_penalty)
    spent, survivors, stopped = 0.0, [], []
    trials = sorted(summary["trials"], key=lambda trial: trial["finished"])
    for trial in trials:
        name, (candidate,) = trial["trial_id"], trial["candidates"]
        share, scored = 1.0, True
        for entry in candidate["proxy"]:
            rung = rungs[entry["fidelity"]]
            evidence.proxies.setdefault(name, {})[rung] = [(entry["mitigation"], entry["legal_impact"])]
            if scheduler.decide(evidence, name, rung)["stopped"]:
                share, scored = entry["fidelity"], False
                stopped.append({"trial_id": name, "fidelity": share})
                break
        else:
            survivors.append(candidate)
            evidence.finals[name] = [(candidate["mitigation"], candidate["legal_impact"])]
        # A trial stopped at the last rung has adapted to the end, but is neither drawn nor scored.
        spent += cpu_seconds(trial, config, share, scored=scored)
    full = sum(cpu_seconds(trial, config) for trial in trials)
    everyone = [entry for trial in trials for entry in trial["candidates"]]
    picks = [_pick(config, entries) for entries in (everyone, survivors)]
    return {
        "trials": len(trials),
        "stopped": stopped,
        "full_cpu_seconds": round(full, 1),
        "pruned_cpu_seconds": round(spent, 1),
        "saved": round(1 - spent / full, 4),
        "rank_correlation": summary["proxy"]["correlation"],
        "threshold": s.min_proxy_correlation,
        "choice_full": picks[0],
        "choice_pruned": picks[1],
    }


def _pick(config: RunConfig, candidates: Sequence[dict[str, Any]]) -> str:
    choice = choose(
        candidates,
        domain=config.domain.name,
        legal_budget=config.domain.legal_budget,
        legal_penalty=config.search.legal_penalty,
        config_hash="",
        seed=config.seed,
    )
    return str(pick_of(choice)["candidate_id"])


def compare(config: RunConfig, separate: Content, shared: Content) -> dict[str, Any]:
    """Masks of one ranking against masks learned for each p, at equal T and L."""
    own = {(c["p"], c["L"]): c for trial in separate["trials"] for c in trial["candidates"]}
    rows = []
    for trial in shared["trials"]:
        for candidate in trial["candidates"]:
            mine = own[candidate["p"], candidate["L"]]
            rows.append(
                {"p": candidate["p"], "L": candidate["L"], "separate": _numbers(mine), "shared": _numbers(candidate)}
            )
    learn = [sum(trial["seconds"]["learn"] for trial in each["trials"]) for each in (separate, shared)]
    differences = [
        {name: row["shared"][name] - row["separate"][name] for name in ("mitigation", "legal_impact")}
        for row in rows
        if None not in (row["shared"]["mitigation"], row["separate"]["mitigation"])
    ]
    means = {name: sum(d[name] for d in differences) / len(differences) for name in ("mitigation", "legal_impact")}
    return {
        "rows": sorted(rows, key=lambda row: (row["p"], row["L"])),
        "mean_difference": means,
        "learn_cpu_seconds_separate": round(learn[0] * config.engine.num_workers, 1),
        "learn_cpu_seconds_shared": round(learn[1] * config.engine.num_workers, 1),
        "learning_runs": [len(separate["trials"]), len(shared["trials"])],
    }


def _numbers(candidate: Content) -> dict[str, Any]:
    names = ("mitigation", "mitigation_ci", "legal_impact", "legal_impact_ci", "param_share", "score")
    return {name: candidate[name] for name in names}


def show(results: Content) -> str:
    """The two comparisons as text."""
    pruning, ranking = results["pruning"], results["one_ranking"]
    known = pruning["rank_correlation"].items()
    rho = ", ".join(f"{key}: {'-' if rhos['score'] is None else format(rhos['score'], '.2f')}" for key, rhos in known)
    costs = ranking["learn_cpu_seconds_shared"], ranking["learn_cpu_seconds_separate"]
    heads = "".join(
        f"  {text:>24}" for text in ("mitigation, own run", "one ranking", "legal impact, own run", "one ranking")
    )
    lines = [
        f"1. Pruning, {pruning['trials']} trials: {pruning['pruned_cpu_seconds']:.0f} CPU-s against "
        f"{pruning['full_cpu_seconds']:.0f} CPU-s of the full grid ({pruning['saved']:.0%} saved)",
        f"   rank correlation of proxy and score by fidelity: {rho} (below {pruning['threshold']:g} nothing is pruned)",
        f"   stopped: {', '.join(s['trial_id'] for s in pruning['stopped']) or 'none'}; choice "
        f"{pruning['choice_full']} with the full grid, {pruning['choice_pruned']} with pruning",
        f"2. One ranking: learning {costs[0]:.0f} CPU-s ({ranking['learning_runs'][1]} runs) "
        f"against {costs[1]:.0f} CPU-s ({ranking['learning_runs'][0]} runs), a factor of {costs[1] / costs[0]:.1f}",
        f"   {'p':>4} {'L':>3}{heads}",
    ]
    for row in ranking["rows"]:
        cells = [
            measure(row[side][name], row[side][f"{name}_ci"])
            for name in ("mitigation", "legal_impact")
            for side in ("separate", "shared")
        ]
        lines.append(f"   {row['p']:>4g} {row['L']:>3}  {cells[0]:>24} {cells[1]:>24}  {cells[2]:>24} {cells[3]:>24}")
    means = ranking["mean_difference"]
    lines.append(
        f"   mean difference (one ranking - own run): mitigation {means['mitigation']:+.3f}, "
        f"legal impact {means['legal_impact']:+.3f}"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the two searches")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "search_cost.json")
    parser.add_argument("overrides", nargs="*", help="settings as key=value")
    arguments = parser.parse_args()
    with ray_session(state_api=True):
        config, separate = search(arguments.out / "separate", arguments.overrides)
        _, shared = search(arguments.out / "one-ranking", [*arguments.overrides, "search.mode=one_ranking"])
    machine = f"{platform.machine()}, CPU, one thread for each process"
    pruning = replay(config, separate)
    results = {"machine": machine, "pruning": pruning, "one_ranking": compare(config, separate, shared)}
    arguments.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(show(results))


if __name__ == "__main__":
    main()
