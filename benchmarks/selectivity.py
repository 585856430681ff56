"""Does a rule block the illegal and let the legal through? By scorer and by held-out loss, on the publisher half.

    python benchmarks/selectivity.py --rules all --domain emoji-styles --seeds 3 [--p 0.3] [--attacks plain,longer] \
        [--swap] [--cache DIR] [--results FILE] [KEY=VALUE ...]

For each rule, p and seed one mask is made; for each attack one user adapts to each class under it. Every run is
appended to the results file, also the bad ones. Printed: blocked adaptation of illegal, legal and *unseen* classes
(legal ones that no rule may look at), mean over seeds with a 95 % t-interval, how far the seeds' frozen sets agree
(and by chance would), and the rise of the release's own loss on general captions. --swap exchanges illegal and legal:
what selects must then select the other way.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.selectivity_bench import ATTACKS, Bench, blocked  # noqa: E402
from benchmarks.selectivity_domains import DOMAINS, open_bench  # noqa: E402
from benchmarks.selectivity_rules import RULES, WITHOUT_CHANCE  # noqa: E402
from raygard.defences import seed_agreement  # noqa: E402

COLUMNS = [(role, measure) for measure in ("distance", "loss") for role in ("illegal", "legal", "unseen")]
GENERAL = ("rehearsed", "kept", "held out")
KEYS = [f"general loss, {name}" for name in GENERAL]


def run(bench: Bench, rule: str, p: float, seed: int, attacks: Sequence[str], folder: Path) -> Iterator[dict[str, Any]]:
    """Make one mask, keep it in `folder` and measure it; a row for each attack."""
    started = time.monotonic()
    mask = RULES[rule](bench, p, seed)
    learn_seconds = time.monotonic() - started
    shutil.rmtree(folder, ignore_errors=True)
    mask.save(folder)
    rise = bench.general_loss_rise(mask)
    for name in attacks:
        users = bench.measure(mask, ATTACKS[name], bench.config.evaluation.adaptation_seeds)
        yield {
            "rule": rule,
            "p": p,
            "seed": seed,
            "attack": name,
            **{f"{role} {measure}": blocked(users, role, measure) for role, measure in COLUMNS},
            **{f"general loss, {name}": value for name, value in rise.items()},
            "param_share": mask.ratio_by_params,
            "frozen": pack(mask.frozen),
            "learn_seconds": round(learn_seconds, 1),
            "users": [asdict(user) for user in users],
        }


def pack(frozen: Tensor) -> str:
    """Which tensors are frozen, bool (N,), as one character each."""
    return "".join("01"[flag] for flag in frozen.tolist())


def agreement(rows: Sequence[dict[str, Any]]) -> str:
    """Overlap of the frozen sets of all pairs of seeds and, in brackets, what chance gives; a dash for one seed."""
    sets = [torch.tensor([flag == "1" for flag in row["frozen"]]) for row in rows if "frozen" in row]
    if len(sets) < 2:
        return "-"
    found = seed_agreement(sets)
    return f"{found['seed_agreement']:.2f} ({found['seed_agreement_chance']:.2f})"


def interval(values: Sequence[float | None]) -> str:
    """Mean and, where seeds differ, its 95 % t-interval over them."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = statistics.fmean(known)
    # Seeds that chose one and the same mask say nothing of chance.
    if len(set(known)) < 2:
        return f"{mean:+.2f}"
    from scipy.stats import t

    half = float(t.ppf(0.975, len(known) - 1)) * statistics.stdev(known) / math.sqrt(len(known))
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def crossover(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """For each class that was illegal in some runs and legal in others: its blocked adaptation as each, by scorer.

    rows: of one rule, p and attack, roles exchanged and not. A class's own ease of being learned is in both numbers, so
    their difference is what the role does. Means over runs.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for user in row["users"]:
            base, full, guarded = (user[key]["distance"] for key in ("base", "full", "guarded"))
            if user["role"] != "unseen":
                roles = found.setdefault(user["cls"], {"illegal": [], "legal": []})
                roles[user["role"]].append((guarded - full) / (base - full))
    both = {cls: roles for cls, roles in found.items() if all(roles.values())}
    return {cls: (statistics.fmean(roles["illegal"]), statistics.fmean(roles["legal"])) for cls, roles in both.items()}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each rule, p and attack."""
    groups: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["rule"], row["p"], row["attack"]), []).append(row)
    heads = "".join(f"{f'{role}, {measure}':<22}" for role, measure in COLUMNS)
    first = f"{'rule':<18}{'p':>5} {'attack':<11}{'seeds':>6} {'agreement':<13}{'params':>7}"
    lines = [f"{first}  {heads}general loss: {', '.join(GENERAL)}"]
    for (rule, p, attack), own in sorted(groups.items()):
        cells = "".join(f"{interval([row[f'{role} {measure}'] for row in own]):<22}" for role, measure in COLUMNS)
        share = statistics.fmean(row["param_share"] for row in own)
        known = {name: [row[name] for row in own if row.get(name) is not None] for name in KEYS}
        rises = " ".join(f"{statistics.fmean(found):+.1%}" if found else "-" for found in known.values())
        lines.append(f"{rule:<18}{p:>5g} {attack:<11}{len(own):>6} {agreement(own):<13}{share:>7.1%}  {cells}{rises}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", default="all", help=f"all, or some of {','.join(RULES)}")
    parser.add_argument("--domain", choices=sorted(DOMAINS), default="emoji-styles")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--p", type=float, nargs="+", help="default: the domain's mask.freeze_ratio")
    parser.add_argument("--attacks", default="plain", help=f"some of {','.join(ATTACKS)}")
    parser.add_argument("--swap", action="store_true", help="exchange illegal and legal classes")
    parser.add_argument("--pictures", type=Path, help="where faces_congress and faces_olivetti are, for faces-small")
    parser.add_argument("--cache", type=Path, default=Path("runs/selectivity"))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "selectivity.jsonl")
    parser.add_argument("overrides", nargs="*", help="settings as key=value")
    arguments = parser.parse_args()
    rules = list(RULES) if arguments.rules == "all" else arguments.rules.split(",")
    attacks = arguments.attacks.split(",")
    for names, known in ((rules, list(RULES)), (attacks, list(ATTACKS))):
        for name in set(names).difference(known):
            parser.error(f"'{name}' is not one of {', '.join(known)}")
    torch.set_num_threads(1)
    bench = open_bench(arguments.domain, arguments.cache, arguments.pictures, arguments.overrides)
    if arguments.swap:
        domain = bench.config.domain
        bench = bench.with_domain(illegal=domain.legal, legal=domain.illegal)
    about = {"domain": arguments.domain, "swap": arguments.swap, "overrides": arguments.overrides}
    rows = []
    for p in arguments.p or [bench.config.mask.freeze_ratio]:
        for rule in rules:
            for seed in range(1 if rule in WITHOUT_CHANCE else arguments.seeds):
                folder = (
                    arguments.cache / "masks" / f"{arguments.domain}{'-swap' * arguments.swap}-{rule}-p{p:g}-{seed}"
                )
                for row in run(bench, rule, p, seed, attacks, folder):
                    with arguments.results.open("a", encoding="utf-8") as stream:
                        stream.write(json.dumps({**about, **row}) + "\n")
                    rows.append(row)
                    print(table([row]).splitlines()[1], flush=True)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
