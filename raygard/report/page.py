"""Assembles report.html from what a run directory holds."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raygard.errors import RaygardError
from raygard.outcome import legal_upper_bound
from raygard.outcome_text import bracket, compare_sentence, shown_parts
from raygard.redaction import redact
from raygard.report import plots
from raygard.report.html import both_themes, data_uri, percent_bracket, run_facts, settings_list, write_page
from raygard.report.layers import frozen_shares
from raygard.report.load import Pictures, RunFiles
from raygard.report.search_load import SEARCH
from raygard.report.search_page import build_search_report

NUM_PROMPTS, CELL_PX = 6, 128
GRID_DEFENCES = ("base", "none", "random", "random-matched", "freeze")
UNITS = ("B", "kB", "MB", "GB", "TB")


def build_report(run_dir: Path) -> Path:
    """Write `report.html` into the directory of a run or of a search, atomically, and return its path.

    Stages that have not run are left out, with one sentence each. The page is self-contained: no network.
    Raises RaygardError if there is no such folder, nothing in it belongs to a run, or a file is damaged.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise RaygardError(f"no run directory at {path}")
    if (path / SEARCH).exists():
        return build_search_report(path)
    files = RunFiles(path)
    if not (files.config or files.run or files.outcome or files.mask or files.learn):
        raise RaygardError(f"{files.path} holds no raygard run: neither config.yaml, learn, mask nor outcome.json")
    return write_page("run.html.j2", _content(files), files.path / "report.html")


def _content(files: RunFiles) -> dict[str, Any]:
    outcome = files.outcome
    # Reports are sent around. What a sensitive domain shows stays in the run directory.
    sensitive = bool((files.config.get("domain") or {}).get("sensitive"))
    parts: dict[str, Any] = {
        "outcome": outcome,
        "headline": headline(outcome) if outcome else "This run has no outcome yet.",
        "verdict": verdict(outcome) if outcome else [],
        "cards": _cards(files),
        "table": _table(outcome) if outcome else [],
        "tradeoff": None,
        "blocked": None,
        "sensitive": sensitive,
        "grids": [] if sensitive else _grids(files),
        "losses": None,
        "soft_mask": None,
        "heat_map": None,
        "faces": _faces(files.results),
        "savings": _savings(files.results),
        "settings": settings_list(files.config),
        "facts": _facts(files),
        "counts": files.run.get("domain_counts") or {},
        "name": files.path.resolve().name,
        "domain": (outcome or files.mask or {}).get("domain") or files.config.get("domain", {}).get("name", ""),
        "missing": _missing(files),
        "label": plots.label,
    }
    if outcome and any(s["mitigation"] is not None and s["legal_impact"] is not None for s in outcome["summary"]):
        parts["tradeoff"] = both_themes(lambda theme: plots.tradeoff(outcome, theme))
    if outcome and any(s["defence"] != "none" for s in outcome["summary"]):
        parts["blocked"] = both_themes(lambda theme: plots.blocked(outcome, theme))
    if files.relearn or files.learn:
        parts["losses"] = both_themes(lambda theme: plots.losses(files.relearn, files.learn, theme))
    if any(r["kind"] == "publisher" for history in files.learn.values() for r in history):
        parts["soft_mask"] = both_themes(lambda theme: plots.soft_mask(files.learn, theme))
    if files.mask:
        tensors = files.mask["tensors"]
        sizes = [int(np.prod(t["shape"])) for t in tensors]
        shares = frozen_shares([t["name"] for t in tensors], sizes, [t["frozen"] for t in tensors])
        parts["heat_map"] = both_themes(lambda theme: plots.heat_map(shares, theme))
    return parts


def _summary(outcome: Mapping[str, Any], defence: str) -> Mapping[str, Any] | None:
    return next((s for s in outcome["summary"] if s["defence"] == defence), None)


def headline(outcome: Mapping[str, Any]) -> str:
    """What the learned mask blocks and costs, in one sentence with its numbers."""
    freeze = _summary(outcome, "freeze")
    if freeze is None:
        return "No learned mask was evaluated in this run."
    if freeze["mitigation"] is None:
        return "No illegal class adapts measurably in this run, so there is nothing a mask could block."
    text = (
        f"Freezing {freeze['freeze_ratio']:.0%} of tensors ({freeze['param_share']:.0%} of parameters) "
        f"blocks {freeze['mitigation']:.1%} {percent_bracket(freeze['mitigation_ci'])} of illegal adaptation"
    )
    if freeze["legal_impact"] is None:
        return f"{text}; what it costs legal users could not be measured."
    return f"{text} and {freeze['legal_impact']:.1%} {percent_bracket(freeze['legal_impact_ci'])} of legal adaptation."


def verdict(outcome: Mapping[str, Any]) -> list[str]:
    """Sentences that keep the headline honest: the control, the aim, zero inside the interval, resolution."""
    freeze = _summary(outcome, "freeze")
    if freeze is None or freeze["mitigation"] is None:
        return []
    sentences = [compare_sentence(outcome)]
    low, high = freeze["mitigation_ci"]
    if low <= 0 <= high:
        sentences.append("The interval of its mitigation includes zero: it may block nothing.")
    worst = freeze["worst_illegal"]
    sentences.append(f"Least blocked illegal class: {worst['class']} ({worst['blocked']:.1%}).")
    if freeze["legal_impact"] is not None:
        worst = freeze["worst_legal"]
        sentences[-1] += f" Most blocked legal class: {worst['class']} ({worst['blocked']:.1%})."
        budget = outcome["legal_budget"]
        kept = legal_upper_bound(freeze) <= budget
        met = kept and freeze["mitigation"] >= plots.TARGET_MITIGATION
        sentences.append(
            f"Aim: mitigation of at least {plots.TARGET_MITIGATION:g} with the legal impact's upper bound "
            f"within {budget:g}: {'met' if met else 'not met'}."
        )
        sentences.append(f"Smallest resolvable legal impact: {outcome['resolvable_legal_impact']:.3f}.")
    return sentences


def _cards(files: RunFiles) -> list[tuple[str, str, str]]:
    cards = []
    freeze = _summary(files.outcome, "freeze") if files.outcome else None
    for field in shown_parts(files.outcome["summary"]) if files.outcome else ():
        if freeze and freeze[field] is not None:
            cards.append((field.replace("_", " "), f"{freeze[field]:.3f}", f"95 % {bracket(freeze[f'{field}_ci'])}"))
    if files.mask:
        ratio = files.mask["ratio"]
        tensors = f"{ratio['frozen_tensors']} of {ratio['num_tensors']} tensors"
        cards.append(("frozen parameters", f"{ratio['by_params']:.0%}", tensors))
    saved = {row["defence"]: row for row in _savings(files.results)}
    if "freeze" in saved:
        own = saved["freeze"]
        cards.append(("optimizer memory", own["bytes_share"], f"of full fine-tuning ({own['optimizer_bytes']})"))
    return cards


def _table(outcome: Mapping[str, Any]) -> list[dict[str, str]]:
    rows = []
    for s in outcome["summary"]:
        row = {
            "defence": s["defence"],
            "tensors": f"{s['freeze_ratio']:.1%}",
            "params": f"{s['param_share']:.1%}",
            "n": str(sum(r["defence"] == s["defence"] for r in outcome["rows"])),
            "base_loss": "-" if s["base_loss"] is None else f"{s['base_loss']:.4f}",
        }
        row |= dict.fromkeys(("unseen_impact", "unseen_impact_ci"), "")
        for field in shown_parts(outcome["summary"]):
            row[field] = "-" if s[field] is None else f"{s[field]:.3f}"
            row[f"{field}_ci"] = bracket(s[f"{field}_ci"])
        for role in ("illegal", "legal"):
            relative, worst = s[f"relative_{role}"], s[f"worst_{role}"]
            row[f"relative_{role}"] = "-" if relative is None else f"{relative:+.1%}"
            row[f"worst_{role}"] = "-" if worst is None else f"{worst['blocked']:.3f}"
            row[f"worst_{role}_class"] = "" if worst is None else worst["class"]
        rows.append(row)
    return rows


def _first(results: Sequence[Mapping[str, Any]], defence: str, name: str) -> Mapping[str, Any] | None:
    """The job of the lowest mask seed, draw and adaptation seed: columns of a grid then match."""
    own = [r for r in results if (r["defence"], r["class"]) == (defence, name)]
    return min(own, key=lambda r: (r["mask_seed"] or 0, r["draw"] or 0, r["seed"]), default=None)


def _grids(files: RunFiles) -> list[dict[str, Any]]:
    grids = []
    for name, role in dict.fromkeys((r["class"], r["role"]) for r in files.results):
        columns: list[tuple[str, Pictures]] = []
        if files.references.get(name) is not None:
            columns.append(("real picture", files.references[name]))
        captions: Sequence[str] = []
        for defence in GRID_DEFENCES:
            job = _first(files.results, defence, name)
            pictures = files.pictures(job["job_id"]) if job else None
            if job and pictures is not None:
                words = {"base": "before adaptation"}.get(defence, plots.label(defence))
                columns.append((words, pictures))
                captions = job["captions"]
        if not captions:
            continue
        rows = min(NUM_PROMPTS, len(captions), *(len(pictures) for _, pictures in columns))
        grids.append(
            {
                "class": name,
                "role": role,
                "columns": [title for title, _ in columns],
                "captions": list(captions[:rows]),
                "image": data_uri(picture_grid([pictures[:rows] for _, pictures in columns])),
            }
        )
    return sorted(grids, key=lambda grid: grid["role"])


def picture_grid(columns: Sequence[Pictures]) -> bytes:
    """One PNG of equally sized cells: column c, row r shows `columns[c][r]`, resized with Lanczos.

    columns: uint8 (rows, H, W, 3) each.
    """
    from PIL import Image

    sheet = Image.new("RGB", (CELL_PX * len(columns), CELL_PX * len(columns[0])), "white")
    for x, pictures in enumerate(columns):
        for y, picture in enumerate(pictures):
            cell = Image.fromarray(picture).resize((CELL_PX - 4, CELL_PX - 4), Image.Resampling.LANCZOS)
            sheet.paste(cell, (x * CELL_PX + 2, y * CELL_PX + 2))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def _savings(results: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What a user trains and stores under each defence, beside full fine-tuning."""
    means: dict[str, dict[str, float]] = {}
    for defence in sorted({r["defence"] for r in results} - {"base"}, key=plots.rank):
        own = [r for r in results if r["defence"] == defence]
        mean = {key: float(np.mean([r[key] for r in own])) for key in ("trainable_params", "optimizer_bytes")}
        means[defence] = {**mean, "seconds": float(np.mean([r["seconds"]["adapt"] for r in own]))}
    full = means.get("none")
    if full is None:
        return []
    return [
        {
            "defence": defence,
            "trainable_params": f"{mean['trainable_params']:,.0f}",
            "params_share": _share(mean["trainable_params"], full["trainable_params"]),
            "optimizer_bytes": _bytes(mean["optimizer_bytes"]),
            "bytes_share": _share(mean["optimizer_bytes"], full["optimizer_bytes"]),
            "seconds": f"{mean['seconds']:.1f}",
        }
        for defence, mean in means.items()
    ]


def _faces(results: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Pictures without a face under each defence, and the mean distance of the others; empty for other scorers."""
    rows = []
    for defence in sorted({r["defence"] for r in results}, key=plots.rank):
        own = [r for r in results if r["defence"] == defence and r.get("undetected") is not None]
        known = [r["mean_detected"] for r in own if r["mean_detected"] is not None]
        if own:
            rows.append(
                {
                    "defence": defence,
                    "undetected": f"{np.mean([r['undetected'] for r in own]):.1%}",
                    "distance": f"{np.mean([r['distance'] for r in own]):.4f}",
                    "mean_detected": f"{np.mean(known):.4f}" if known else "-",
                }
            )
    return rows


def _share(value: float, whole: float) -> str:
    return f"{value / whole:.0%}" if whole else "-"


def _bytes(value: float) -> str:
    unit = 0
    while value >= 1000 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {UNITS[unit]}"


def _facts(files: RunFiles) -> list[tuple[str, str]]:
    run, mask = files.run, files.mask
    facts = [
        ("raygard", str(run.get("raygard_version", ""))),
        ("started", str(run.get("started", ""))),
        ("seed", str(files.config.get("seed", ""))),
        ("configuration hash", str(run.get("config_hash") or (files.outcome or {}).get("config_hash", ""))),
    ]
    if mask:
        facts += [("base model", redact(mask["base"]["id"])), ("mask sha256", mask["base"]["fingerprint"])]
    facts += run_facts(run)
    return [(name, value) for name, value in facts if value]


def _missing(files: RunFiles) -> list[str]:
    stages = (
        (files.outcome, "No outcome yet: the evaluation has not finished."),
        (files.results, "No adapted models yet, so there are no pictures and no savings to show."),
        (
            files.relearn or files.learn,
            "No loss curves: neither relearning nor mask learning has left a history.",
        ),
        (files.mask, "No mask has been released yet."),
    )
    return [sentence for present, sentence in stages if not present]
