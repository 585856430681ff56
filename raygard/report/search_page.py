"""Assembles report.html of a search: the choice, what it rests on, and every candidate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raygard.outcome_text import bracket, compare_sentence, shown_parts
from raygard.redaction import redact
from raygard.report import plots, search_findings, search_plots
from raygard.report.html import both_themes, run_facts, settings_list, write_page
from raygard.report.search_findings import describe, listing, varied_settings
from raygard.report.search_load import FINAL_REPORT, SearchFiles, last_proxy
from raygard.report.search_masks import agreement, blocks_by_p, mask_path
from raygard.search.choice import measure, rise_words
from raygard.search.proxy import is_finite
from raygard.search.tables import point_settings

Plot = dict[str, Any]


def build_search_report(path: Path) -> Path:
    """Write `report.html` into a search directory, atomically, and return its path.

    What is not there is left out, with one sentence each. The page is self-contained: no network; its only link
    leads to the report of the final run beside it. Raises RaygardError for a damaged file.
    """
    files = SearchFiles(path)
    return write_page("search.html.j2", _content(files), path / "report.html")


def _content(files: SearchFiles) -> dict[str, Any]:
    search, settings = files.search, varied_settings(files.candidates)
    return {
        "name": files.path.resolve().name,
        "domain": search["domain"],
        "headline": headline(files),
        "verdict": verdict(files),
        "missing": _missing(files),
        "cards": _cards(files),
        "rule": (files.choice or {}).get("rule"),
        "scorer": search["scorer"],
        "budget": files.budget,
        "link": FINAL_REPORT if (files.path / FINAL_REPORT).is_file() else None,
        "results": _results(files),
        "conditions": _conditions(files),
        "trials": _trials(files, settings),
        "masks": _masks(files),
        "proxy": _proxy(files),
        "pruning": search_findings.pruning(files) if search.get("proxy") else None,
        "setting_words": [words for _, words in settings],
        "rows": _rows(files, settings),
        "edited": any(c.get("base_loss_rise") is not None for c in files.candidates),
        "unseen": any(c.get("unseen_impact") is not None for c in files.candidates),
        "incomplete": any(c["incomplete"] for c in files.candidates),
        "controls": [_control_row(c) for c in files.controls],
        "classes": search.get("classes") or [],
        "facts": _facts(files),
        "counts": files.run.get("domain_counts") or {},
        "settings": settings_list(files.config),
    }


def headline(files: SearchFiles) -> str:
    """The choice in one short sentence."""
    if files.choice is None or files.pick is None:
        return "This search has not chosen a mask."
    point = describe(files.pick, varied_settings(files.candidates))
    if files.choice["meets_budget"]:
        return f"Release with {point}."
    budgets = f"legal budget of {files.budget:g}"
    if files.choice.get("base_loss_budget") is not None:
        budgets += f" and keeps the release's own loss within {100 * files.choice['base_loss_budget']:g} %"
    return f"No p meets the {budgets}; the nearest is {point}."


def verdict(files: SearchFiles) -> list[str]:
    """The statement of the choice, and on the user half: is it better than random masks of its size?"""
    sentences = [files.choice["statement"]] if files.choice else []
    if files.final:
        mean = (files.choice or {}).get("outcome_over_seeds")
        about = f" This compares the mean over masks of seeds {listing(mean['mask_seeds'])}." if mean else ""
        sentences.append(compare_sentence(files.final) + about)
    return sentences


def _missing(files: SearchFiles) -> list[str]:
    stages = (
        (files.trials, "No trial has finished."),
        (files.scored or not files.trials, "No candidate was scored: there is nothing to compare or to choose from."),
        (files.final, "No final outcome yet: the picked mask has not been scored on the user half."),
    )
    return [sentence for present, sentence in stages if not present]


def _cards(files: SearchFiles) -> list[tuple[str, str, str]]:
    cards = []
    if files.pick:
        half = (files.choice or {}).get("outcome")
        numbers, words = (half, "user half") if half else (files.pick, "publisher half")
        for field in shown_parts([numbers]):
            detail = f"95 % {bracket(numbers[f'{field}_ci'])}, {words}" if numbers[field] is not None else words
            cards.append((field.replace("_", " "), measure(numbers[field], None), detail))
        share = f"{files.pick['freeze_ratio']:.0%} of tensors"
        cards.append(("frozen parameters", f"{files.pick['param_share']:.0%}", share))
    statuses = [trial["status"] for trial in files.trials]
    stopped = f"{statuses.count('pruned')} pruned, {statuses.count('failed')} failed"
    cards.append(("trials", str(len(statuses)), stopped))
    return cards


def _results(files: SearchFiles) -> list[Plot]:
    if not files.scored:
        return []
    found = [
        {
            "title": search_findings.against_p(files),
            "plot": both_themes(lambda theme: search_plots.against_p(files, theme)),
            "alt": "Mitigation and legal impact at each p of masks and controls; the numbers are in the tables",
            "caption": "Line: at each p the mask the controls are matched to, else that of highest score; faint: other "
            "candidates. Bars are 95 % intervals on the publisher half, conditional on what is listed below; they hold "
            "for one candidate and do not say that the best of many was picked."
            + ("" if files.controls else " No controls were scored, so nothing shows what a mask of this size does."),
        }
    ]
    if any(is_finite(c["legal_impact"]) for c in files.scored):
        found.append(
            {
                "title": search_findings.pareto(files),
                "plot": both_themes(lambda theme: search_plots.pareto(files, theme)),
                "alt": "Mitigation against legal impact of all candidates and controls, with front, budget and aim",
                "caption": "The choice holds the upper end of the 95 % interval of legal impact against the budget, as "
                "does the front: its line joins these upper ends, the bar to the right of each of its candidates. "
                "A control is held against it by the same two numbers, which is no test. "
                f"Shaded: mitigation of at least {plots.TARGET_MITIGATION:g} within the budget.",
            }
        )
    return found


def _conditions(files: SearchFiles) -> list[str]:
    """What the intervals of the publisher half cover and are conditional on."""
    resolvable = files.search.get("resolvable_legal_impact")
    sentences = list(files.search.get("notes") or [])
    if resolvable is not None:
        sentences.append(f"Smallest resolvable legal impact: {resolvable:.3f} (budget {files.budget:g}).")
    return sentences


def _trials(files: SearchFiles, settings: list[tuple[str, str]]) -> list[Plot]:
    found = []
    if files.scored:
        found.append(
            {
                "title": search_findings.settings_that_matter(files),
                "plot": both_themes(lambda theme: search_plots.parallel(files, settings, theme)),
                "alt": "Parallel coordinates of all candidates; the numbers are in the table of candidates",
                "caption": "One line for each candidate; lines of equal settings are drawn a little apart. A dotted "
                "line that ends at the proxy was pruned before it was scored. The score is mitigation less a penalty "
                "for legal impact above the budget; differences of means over few trials are a hint, not a test.",
            }
        )
    if any(trial["seconds"].get(stage) for trial in files.trials for stage in search_plots.STAGES):
        found.append(
            {
                "title": search_findings.cost(files),
                "plot": both_themes(lambda theme: search_plots.cost(files.trials, theme)),
                "alt": "Seconds of each trial in learning, adapting, generating and scoring",
                "caption": "Seconds are summed over the tasks of a trial; tasks run side by side, so the clock on the "
                "wall shows less.",
            }
        )
    return found


def _masks(files: SearchFiles) -> dict[str, Any]:
    path, seeds = None, files.search.get("agreement") or []
    masks = files.masks(files.best)
    found: dict[str, Any] = {"plots": [], "steps": [], "sentences": []}
    if masks:
        path = mask_path(masks)
        found["steps"] = [step.sentence for step in path.steps]
        found["plots"].append(
            {
                "title": search_findings.added_blocks(path),
                "plot": both_themes(lambda theme: blocks_by_p(path, files.ratio_axis, theme)),
                "alt": "Heat map of the frozen share of every block at each p, by tensors and by parameters",
                "caption": "The learned masks of the line above, blocks in the order of the signal.",
            }
        )
    elif files.best:
        found["sentences"].append("The masks of the best candidates are not in this directory.")
    nested = path if path is not None and len(path.p) > 1 else None
    if masks and nested is None:
        found["sentences"].append("Masks of one p only: whether masks are nested cannot be told.")
    if files.best and not seeds:
        found["sentences"].append("No mask was learned with a second seed, so agreement between seeds is not known.")
    if nested is not None or seeds:
        found["plots"].append(
            {
                "title": search_findings.overlap(nested, seeds),
                "plot": both_themes(lambda theme: agreement(nested, seeds, files.ratio_axis, theme)),
                "alt": "Share of the tensors frozen at a smaller p that a larger one keeps, and agreement of seeds",
                "caption": "By chance: what a random mask of the same number of tensors would share with the other. "
                "Masks of different p may differ in T and L too.",
            }
        )
    return found


def _proxy(files: SearchFiles) -> Plot | None:
    record = files.search.get("proxy")
    if not record or not any(c["proxy"] for c in files.scored):
        return None
    return {
        "title": search_findings.proxy(files),
        "plot": both_themes(lambda theme: search_plots.proxy(files, theme)),
        "alt": "Rank correlation of the proxy with the final result by fidelity, and the proxy against the final score",
        "caption": "Proxy: held-out losses after a share of the adaptation, mapped to the scorer's scale by a line "
        "fitted on the other scored trials, in the score's formula. Rank correlations of its parts, as measured: "
        f"{search_findings.proxy_parts(record)}. Trials that were stopped are missing here, so what is shown may "
        "differ from what the scheduler knew at the time.",
    }


def _rows(files: SearchFiles, settings: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Every candidate; a trial that failed without one has a row of its own."""
    reasons = {trial["trial_id"]: trial["reason"] or "" for trial in files.trials}
    rows = []
    for c in files.candidates:
        proxy = last_proxy(c)
        row = {
            "name": c["candidate_id"],
            "settings": [_setting(c[field]) for field, _ in settings],
            "params": f"{c['param_share']:.1%}",
            "rise": rise_words(c.get("base_loss_rise")),
            "unseen": measure(c.get("unseen_impact"), None),
            "proxy": measure(proxy["score"] if proxy else None, None),
            "fidelity": f"at {proxy['fidelity']:g}" if proxy else "",
            "score": measure(c["score"], None),
            "mark": _mark(files, c),
            "reason": "; ".join(part for part in (_lost(c), redact(reasons[c["trial_id"]])) if part),
            "own": c["candidate_id"] == files.pick_id,
        }
        rows.append(row | _numbers(c))
    for trial in files.trials:
        if not trial["candidates"]:
            point = point_settings(trial["point"])
            row = dict.fromkeys(("params", "rise", "unseen", "proxy", "score", "mitigation", "legal_impact"), "-")
            row |= dict.fromkeys(("fidelity", "mitigation_ci", "legal_impact_ci"), "")
            text = {"name": trial["trial_id"], "mark": trial["status"], "reason": redact(trial["reason"] or "")}
            rows.append({**row, **text, "settings": [_setting(point[field]) for field, _ in settings], "own": False})
    return rows


def _lost(candidate: Mapping[str, Any]) -> str:
    return f"no result for {', '.join(candidate['incomplete'])}" if candidate["incomplete"] else ""


def _setting(value: float | str | None) -> str:
    if value is None:
        return "all"
    return value if isinstance(value, str) else f"{value:g}"


def _numbers(entry: Mapping[str, Any]) -> dict[str, str]:
    fields = ("mitigation", "legal_impact")
    intervals = {f"{field}_ci": bracket(entry[f"{field}_ci"]) for field in fields}
    return intervals | {field: measure(entry[field], None) for field in fields}


def _mark(files: SearchFiles, candidate: Mapping[str, Any]) -> str:
    name = candidate["candidate_id"]
    if name == files.pick_id:
        return "chosen" if files.choice and files.choice["meets_budget"] else "nearest"
    if any(name == c["candidate_id"] for c in files.front):
        return "front"
    return str(candidate["status"])


def _control_row(control: Mapping[str, Any]) -> dict[str, str]:
    row = {"p": f"{control['p']:g}", "defence": plots.label(control["defence"]), "draws": str(control["draws"])}
    row |= {"candidate": control["candidate_id"], "params": f"{control['param_share']:.1%}"}
    return row | _numbers(control)


def _facts(files: SearchFiles) -> list[tuple[str, str]]:
    search = files.search
    fields = ("mode", "algorithm", "scheduler", "seed", "relearn_runs", "started", "finished")
    facts = [("raygard", files.run.get("raygard_version")), ("configuration hash", search.get("config_hash"))]
    facts += [(field.replace("_", " "), search.get(field)) for field in fields]
    facts += [(f"time of {stage}", f"{s:.1f} s") for stage, s in (search.get("seconds") or {}).items()]
    facts += run_facts({"versions": files.run.get("versions")})
    if files.pick:
        facts.append(("sha256 of the picked mask", files.pick["mask_sha256"]))
    return [(name, str(value)) for name, value in facts if value not in (None, "")]
