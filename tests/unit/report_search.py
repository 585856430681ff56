"""A realistic synthetic search directory for the tests of its report: real masks of a tiny model, made-up numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
import yaml
from report_run import tiny_unet, write_evaluation, write_learning

from raygard.config_file import load_config
from raygard.mask import FreezeMask, select_frozen
from raygard.search.choice import best_by_ratio, choose, with_outcome
from raygard.search.proxy import Evidence, score, summary, with_predictions

RATIOS, TEMPERATURES, INNER_STEPS = (0.1, 0.3, 0.5, 0.7), (0.1, 0.2), (5, 10)
FIDELITIES = (0.25, 0.5, 1.0)
BUDGET, PENALTY, THRESHOLD, CALIBRATION_TRIALS = 0.05, 2.0, 0.5, 6
PRUNED = {"p0.5-T0.1-L5", "p0.7-T0.1-L5", "p0.7-T0.1-L10"}
FAILED = "p0.1-T0.1-L10"
NOTES = [
    "Intervals are 95 % percentile intervals; pictures are resampled, paired across defences.",
    "One mask each of freeze: their intervals are conditional on it.",
    "Adaptation seeds are resampled (2).",
    "Mitigation is conditional on the 2 counted illegal classes (fewer than 5 are not resampled).",
]
RESOLVABLE, DRAWS = 0.031, 2
CONTROLS = {"random": (0.35, 0.5), "random-matched": (0.7, 1.1), "largest-first": (1.25, 2.4)}


class Masks:
    """Masks of one ranking with noise, so that a larger p keeps most of a smaller one."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.unet, self.rng = tiny_unet(), rng
        names = [name for name, _ in self.unet.named_parameters()]
        self.ranking = np.array([1.0 * ("attn2" in n) + 0.6 * ("up_blocks" in n) + 0.3 * ("conv" in n) for n in names])
        self.sizes = torch.tensor([p.numel() for p in self.unet.parameters()])

    def save(self, path: Path, ratio: float) -> FreezeMask:
        scores = torch.from_numpy(self.ranking + self.rng.normal(0, 0.2, len(self.ranking)))
        mask = FreezeMask.create(self.unet, select_frozen(scores, self.sizes, ratio), logits=scores)
        mask.save(path)
        return mask


def _measured(rng: np.random.Generator, mitigation: float, legal: float) -> dict:
    spans = rng.uniform(0.015, 0.035, 2)
    return {
        "mitigation": mitigation,
        "mitigation_ci": [mitigation - 2 * spans[0], mitigation + 2 * spans[0]],
        "legal_impact": legal,
        "legal_impact_ci": [legal - spans[1], legal + spans[1]],
    }


def _proxies(rng: np.random.Generator, mitigation: float, legal: float, fidelities: tuple[float, ...]) -> list[dict]:
    entries = []
    for fidelity in fidelities:
        noise = rng.normal(0, 0.12 * (1.2 - fidelity), 2)
        proxy = {"mitigation": 0.7 * mitigation + noise[0], "legal_impact": legal + 0.3 * noise[1]}
        entries.append({"fidelity": fidelity, "step": int(160 * fidelity), **proxy})
    return entries


def _trial(folder: Path, point: tuple[float, float, int], masks: Masks, rng: np.random.Generator) -> dict:
    p, temperature, inner_steps = point
    name = f"p{p:g}-T{temperature:g}-L{inner_steps}"
    status = "failed" if name == FAILED else "pruned" if name in PRUNED else "scored"
    setting = {"rule": "budget", "illegal_weight": 1.0, "legal_weight": 1.0}
    trial = {
        "schema_version": 1,
        "trial_id": name,
        "phase": "calibration",
        "status": status,
        "reason": {"pruned": "proxy below the median at fidelity 0.5", "failed": "loss is not finite"}.get(status),
        "point": {"freeze_ratio": p, "temperature": temperature, "inner_steps": inner_steps, "publisher_steps": 30}
        | setting,
        "candidates": [],
        "seconds": {"learn": 31.0 + inner_steps, "adapt": 0.0, "generate": 0.0, "score": 0.0},
        "started": "2026-11-21T23:00:00Z",
        "finished": "2026-11-21T23:04:00Z",
    }
    if status != "failed":
        path = f"trials/{name}/masks/{name}"
        mask = masks.save(folder / path, p)
        mitigation = 0.9 * p**0.7 * (1.1 if temperature == 0.2 else 0.85) + rng.normal(0, 0.02)
        legal = 0.32 * p**2 + rng.normal(0, 0.008) + 0.01 * (inner_steps == 5)
        fidelities = FIDELITIES[:2] if status == "pruned" else FIDELITIES
        candidate = {"candidate_id": name, "trial_id": name, "p": p, "T": temperature, "L": inner_steps, "K": 30}
        candidate |= {**setting, "mask": path, "mask_sha256": mask.sha256}
        candidate |= {"freeze_ratio": mask.ratio_by_count, "param_share": mask.ratio_by_params}
        candidate |= {"incomplete": []}
        candidate["proxy"] = _proxies(rng, mitigation, legal, fidelities)
        fields = ("mitigation", "mitigation_ci", "legal_impact", "legal_impact_ci")
        candidate |= dict.fromkeys((*fields, "relative_illegal", "relative_legal", "score"))
        trial["seconds"] |= {"adapt": 44.0 if status == "pruned" else 88.0}
        if status == "scored":
            candidate |= _measured(rng, mitigation, legal)
            candidate |= {"relative_illegal": 2 * mitigation, "relative_legal": legal}
            candidate["score"] = score(mitigation, legal, BUDGET, PENALTY)
            trial["seconds"] |= {"generate": 40.0 + rng.uniform(0, 6), "score": 9.5}
        trial["candidates"] = [candidate]
    trial["seconds"]["total"] = sum(trial["seconds"].values())
    return trial


def _controls(matched: dict[float, dict], rng: np.random.Generator) -> list[dict]:
    controls = []
    for p, best in sorted(matched.items()):
        for defence, (gain, cost) in CONTROLS.items():
            numbers = _measured(rng, gain * 0.8 * best["mitigation"], cost * best["legal_impact"] + 0.01)
            about = {"p": p, "defence": defence, "candidate_id": best["candidate_id"], "draws": DRAWS}
            controls.append({**about, "param_share": min(0.99, best["param_share"]), **numbers})
    return controls


def _decisions(trials: list[dict]) -> list[dict]:
    """What the scheduler would have known and done had the trials run one after another."""
    evidence, decisions = Evidence(BUDGET, PENALTY), []
    for trial in trials:
        evidence.add_record(trial)
        reached = [entry["fidelity"] for candidate in trial["candidates"] for entry in candidate["proxy"]]
        others = replace(evidence, finals={k: v for k, v in evidence.finals.items() if k != trial["trial_id"]})
        for fidelity in reached:
            about = {"trial_id": trial["trial_id"], "fidelity": fidelity, "scored": len(others.scored_at(fidelity))}
            free = others.is_trusted(fidelity, threshold=THRESHOLD, min_trials=CALIBRATION_TRIALS)
            about |= {"correlation": others.correlation(fidelity), "pruning": free}
            decisions.append(about | {"stopped": trial["status"] == "pruned" and fidelity == reached[-1]})
    return decisions


def write_search(folder: Path, ratios: tuple[float, ...] = RATIOS, budget: float = BUDGET) -> Path:
    """search.json, choice.json and the masks of a finished search, its final run left out."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    config = load_config(overrides=["tracking.tracking_uri=http://me:hunter2@mlflow:5000"])
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    run = {
        "raygard_version": "0.1.0",
        "versions": {"torch": "2.13.0", "ray": "2.57.0"},
        "config_hash": "0123456789abcdef",
    }
    (folder / "run.json").write_text(json.dumps(run))
    masks = Masks(rng)
    trials = [_trial(folder, point, masks, rng) for point in product(ratios, TEMPERATURES, INNER_STEPS)]
    evidence, decisions = Evidence(BUDGET, PENALTY), _decisions(trials)
    for trial in trials:
        evidence.add_record(trial)
    trials = with_predictions(trials, evidence)
    candidates = [c for trial in trials for c in trial["candidates"]]
    about = {"domain": "emoji-styles", "config_hash": "0123456789abcdef", "seed": 0}
    about |= {"notes": NOTES, "resolvable_legal_impact": RESOLVABLE}
    choice = choose(candidates, legal_budget=budget, legal_penalty=PENALTY, **about)
    pick = choice["chosen"] or choice["nearest"]
    matched = best_by_ratio(candidates) | {pick["p"]: pick}
    roles = {"Fluent 3D": "illegal", "OpenMoji": "illegal", "Twemoji": "legal", "FxEmoji": "legal"}
    gap = {"d_base": 0.42, "d_full": 0.18, "gap": 0.24, "se": 0.011, "counted": True}
    search = {
        "schema_version": 1,
        "domain": "emoji-styles",
        "scorer": "style_enlite0",
        "config_hash": "0123456789abcdef",
        "legal_budget": budget,
        "mode": "per_ratio",
        "algorithm": "grid",
        "scheduler": "asha",
        "seed": 0,
        "relearn_runs": 1,
        "trials": trials,
        "controls": _controls(matched, rng) if ratios == RATIOS else [],
        "proxy": {
            "threshold": THRESHOLD,
            "calibration_trials": CALIBRATION_TRIALS,
            **summary(evidence, FIDELITIES),
            "decisions": decisions,
        },
        "notes": NOTES,
        "resolvable_legal_impact": RESOLVABLE,
        "classes": [{"class": name, "role": role, **gap} for name, role in roles.items()],
        "agreement": [
            {"p": p, "seed_agreement": min(1, p + 0.35), "seed_agreement_chance": p, "seeds": [0, 1]} for p in ratios
        ],
        "seconds": {"relearn": 80.5, "trials": 1812.0, "controls": 402.7, "final": 390.2, "total": 2685.4},
        "started": "2026-11-21T23:00:00Z",
        "finished": "2026-11-21T23:45:00Z",
    }
    (folder / "search.json").write_text(json.dumps(search))
    (folder / "choice.json").write_text(json.dumps(choice))
    return folder


def write_final(folder: Path) -> None:
    """The final run of the picked mask, with its report, and the choice with its outcome."""
    rng = np.random.default_rng(1)
    write_learning(folder / "final", rng)
    write_evaluation(folder / "final", rng, n=4)
    (folder / "final" / "report.html").write_text("<!doctype html><title>final</title>")
    choice = json.loads((folder / "choice.json").read_text())
    outcome = json.loads((folder / "final" / "outcome.json").read_text())
    mean = next(entry for entry in outcome["summary"] if entry["defence"] == "freeze")
    low, high = mean["mitigation_ci"]
    released = {**mean, "mitigation": mean["mitigation"] - 0.04, "mitigation_ci": [low - 0.07, high - 0.02]}
    (folder / "choice.json").write_text(json.dumps(with_outcome(choice, released, {**mean, "mask_seeds": [0, 1]})))
