"""Can a hub tell from a model's weights what it was fine-tuned on? Users of every kind against a publisher's traces.

    python benchmarks/traces.py --domain emoji-styles|faces-small [--pictures DIR] [--seeds N] [--attacks A,B] \
        [--cache DIR] [--results FILE] [KEY=VALUE ...]
    python benchmarks/traces.py --table [--plot FILE]

The publisher fine-tunes the release on its own pictures (part `learn`) of every class it knows, and on handfuls of
general pictures, and keeps sketches (`raygard.traces`). Users train on other pictures (part `select_adapt`); unseen
classes are ones that the publisher has never looked at. Every known class is asked about, illegal and legal alike:
which of them is forbidden is for the publisher to say, and exchanging the roles changes nothing. Printed for each kind
of user: how many are found to have trained on the class they trained on, of how many that class deviates most (which
knows no bound), how many are accused of another one, and how many users of unseen classes are accused, with 95 %
intervals (Clopper and Pearson 1934). Every user is a line of the results file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.selectivity_bench import ALIASES, Bench  # noqa: E402
from benchmarks.selectivity_domains import open_bench  # noqa: E402
from benchmarks.selectivity_rules.freeze import largest_names  # noqa: E402
from raygard.adaptation import full, lora  # noqa: E402
from raygard.config import AdaptConfig  # noqa: E402
from raygard.diffusion.cache import LatentSet  # noqa: E402
from raygard.diffusion.model import load_denoiser  # noqa: E402
from raygard.files import scratch  # noqa: E402
from raygard.mask import FreezeMask  # noqa: E402
from raygard.seeding import generator  # noqa: E402
from raygard.traces import (  # noqa: E402
    Reference,
    Sketcher,
    Update,
    findings,
    handful,
    recall,
    share_of_pictures,
    steps_of,
)
from raygard.traces.detect import FALSE_ALARMS  # noqa: E402

RESULTS = HERE / "results" / "traces.jsonl"
# Illegal and legal classes, where they are not those of the bench, and the unseen ones.
SETTINGS: dict[str, tuple[list[str], list[str]]] = {
    "emoji-styles": (
        ["domain.illegal=[Noto Line,OpenMoji]", "domain.legal=[Fluent High Contrast,EmojiOne Monotone]"],
        ["FxEmoji", "Twemoji", "Fluent 3D"],
    ),
    "faces-small": ([], [f"person {number:02d}" for number in range(7, 15)]),
}
SECRET = b"of a benchmark, which everybody may know"
HANDFULS = 6


@dataclass(frozen=True)
class Attack:
    """How a user trains. steps, lr: factors on `adapt.*`; first: train on an unseen class before; evade: keep away from
    the directions of three own runs; noise: added to every tensor, as a share of how far it moved; merge: average with
    a model fine-tuned on an unseen class; illegal_only: only users of illegal classes."""

    name: str
    steps: float = 1.0
    lr: float = 1.0
    alias: bool = False
    lora: bool = False
    mask: bool = False
    first: bool = False
    evade: bool = False
    noise: float = 0.0
    merge: bool = False
    illegal_only: bool = False


ATTACKS = {
    attack.name: attack
    for attack in (
        Attack("plain"),
        Attack("other name", alias=True),
        Attack("a third of the steps", steps=1 / 3),
        Attack("five times the steps", steps=5.0),
        Attack("three times the rate", lr=3.0),
        Attack("LoRA", lora=True, lr=4.0),
        Attack("largest tensors frozen", mask=True),
        Attack("another class first", first=True, illegal_only=True),
        Attack("merged with another", merge=True, illegal_only=True),
        Attack("noise as large", noise=1.0, illegal_only=True),
        Attack("three times the noise", noise=3.0, illegal_only=True),
        Attack("away from own runs", evade=True, illegal_only=True),
    )
}

State = dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=sorted(SETTINGS))
    parser.add_argument("--pictures", type=Path, help="where faces_congress and faces_olivetti are, for faces-small")
    parser.add_argument("--seeds", type=int, default=1, help="adaptation seeds of every user")
    parser.add_argument("--runs", type=int, default=4, help="publisher's own users of each class")
    parser.add_argument("--references", choices=("full", "lora"), default="full", help="how they train")
    parser.add_argument("--attacks", default="all", help=f"some of {','.join(ATTACKS)}")
    parser.add_argument("--false-alarms", type=float, default=FALSE_ALARMS)
    parser.add_argument("--cache", type=Path, default=Path("runs/selectivity"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the tables of the results file")
    parser.add_argument("--plot", type=Path, help="picture of how far every user is from the bound")
    parser.add_argument("overrides", nargs="*", help="settings as key=value")
    arguments = parser.parse_args()
    if not arguments.table:
        if arguments.domain is None:
            parser.error("--domain is needed")
        names = list(ATTACKS) if arguments.attacks == "all" else arguments.attacks.split(",")
        for name in set(names).difference(ATTACKS):
            parser.error(f"'{name}' is not one of {', '.join(ATTACKS)}")
        torch.set_num_threads(1)
        measure(arguments, [ATTACKS[name] for name in names])
    rows = [json.loads(line) for line in arguments.results.read_text(encoding="utf-8").splitlines()]
    print(tables(rows))
    if arguments.plot is not None:
        plot(rows, arguments.plot)


def measure(arguments: argparse.Namespace, attacks: Sequence[Attack]) -> None:
    """Run every user and append what was found to the results file."""
    overrides, unseen = SETTINGS[arguments.domain]
    settings = [*overrides, "domain.unseen=[]", *arguments.overrides]
    bench = open_bench(arguments.domain, arguments.cache, arguments.pictures, settings)
    bench = bench.with_domain(unseen=tuple(cls for cls in unseen if cls not in bench.classes))
    sketcher = Sketcher(SECRET)
    known = references(bench, sketcher, arguments.runs, arguments.references)
    own = recall(known, false_alarms=arguments.false_alarms)
    about = {"domain": arguments.domain, "overrides": arguments.overrides, "runs": arguments.runs}
    about["references"] = arguments.references
    about |= {"false_alarms": arguments.false_alarms, "recall": own}
    print(f"of the publisher's own: {own}", flush=True)
    for attack in attacks:
        for seed in range(arguments.seeds):
            for cls, role in bench.roles.items():
                if role != "illegal" and attack.illegal_only:
                    continue
                train = partial(user, bench, cls, attack, seed)
                update = kept(bench, sketcher, f"user {cls} {attack.name} {seed}", train)
                found = findings(update, known, false_alarms=arguments.false_alarms)
                row = {**about, "attack": attack.name, "seed": seed, "class": cls, "role": role}
                row |= {"findings": [{**asdict(f), "found": f.found} for f in found]}
                with arguments.results.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")
                said = ", ".join(f"{f.cls} {f.score:.3f} (bound {f.bound:.3f})" for f in found if f.found)
                print(f"{attack.name:<24}{role:<9}{cls:<24}{said or '-'}", flush=True)


def references(bench: Bench, sketcher: Sketcher, runs: int, method: str) -> list[Reference]:
    """The publisher's own users, as `raygard trace` has them. Every class is asked about, as if it were forbidden."""
    steps = bench.config.adapt.max_train_steps
    adapter = method == "lora"
    lr, name = (ATTACKS["LoRA"].lr, "lora ") if adapter else (1.0, "")
    found: list[Reference] = []
    for cls in bench.classes:
        rows = bench.learn.rows(cls)
        for run in range(runs):
            own, group = share_of_pictures(rows.tolist(), run)
            data = bench.learn.subset(own)
            named = bench.alias(data, ALIASES[1 + run % 4]) if run % 2 else data
            train = partial(
                _train, bench, named, bench.base, steps_of(steps, run), 1000 + len(found), lr=lr, adapter=adapter
            )
            update = kept(bench, sketcher, f"{name}{cls} {run}", train)
            found.append(Reference(cls, True, update, group))
    size = min(len(bench.learn.rows(cls)) for cls in bench.classes)
    general = bench.general["rehearsed"]
    for number in range(HANDFULS):
        cls = bench.config.domain.general[number % len(bench.config.domain.general)]
        rows = general.rows(cls)
        if not len(rows):
            continue
        data = general.subset(handful(rows, size, bench.config.seed, number))
        for run in range(2):
            train = partial(_train, bench, data, bench.base, steps, 1000 + len(found), lr=lr, adapter=adapter)
            update = kept(bench, sketcher, f"{name}handful {number} {run}", train)
            found.append(Reference(f"handful {number}", False, update))
    return found


def kept(bench: Bench, sketcher: Sketcher, name: str, train: Callable[[], State]) -> Update:
    """What a user leaves, from the cache if he has been there before."""
    from safetensors.numpy import load_file, save_file

    steps = bench.config.adapt.max_train_steps
    file = bench.cache / "traces" / f"{bench.config.domain.name}-{steps}-{name}.safetensors"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with scratch(file) as part:
            save_file(dict(sketcher.update(bench.base, train()).tensors), part)
    return Update(load_file(file))


def user(bench: Bench, cls: str, attack: Attack, seed: int) -> State:
    """The tensors that such a user publishes."""
    data = bench.select.subset(bench.select.rows(cls, "select_adapt"))
    if attack.alias:
        data = bench.alias(data, ALIASES[0])
    steps, start = round(bench.config.adapt.max_train_steps * attack.steps), bench.base
    if attack.first:
        start = _train(bench, _other(bench), start, steps, seed)
    mask = bench.mask(largest_names(bench, 0.3)) if attack.mask else None
    if attack.evade:
        own = [_train(bench, data, start, steps, 5000 + seed + run) for run in range(3)]
        with _away_from(own, start) as bind:
            tuned = _train(bench, data, start, steps, seed, bind=bind)
    else:
        tuned = _train(bench, data, start, steps, seed, lr=attack.lr, mask=mask, adapter=attack.lora)
    if attack.merge:
        other = _train(bench, _other(bench), start, steps, seed)
        tuned = {name: (tensor + other[name]) / 2 for name, tensor in tuned.items()}
    if attack.noise:
        rng = generator(seed, "noise", cls)
        for name, tensor in tuned.items():
            drawn = torch.randn(tensor.shape, generator=rng)
            size = torch.linalg.vector_norm(tensor - bench.base[name]) / torch.linalg.vector_norm(drawn)
            tuned[name] = tensor + attack.noise * size * drawn
    return tuned


def _other(bench: Bench) -> LatentSet:
    return bench.select.subset(bench.select.rows(bench.config.domain.unseen[0], "select_adapt"))


def _train(
    bench: Bench,
    data: LatentSet,
    start: Mapping[str, Tensor],
    steps: int,
    seed: int,
    *,
    lr: float = 1.0,
    mask: FreezeMask | None = None,
    adapter: bool = False,
    bind: Callable[[nn.Module], None] | None = None,
) -> State:
    adapt = bench.config.adapt
    same = {"max_train_steps": steps, "learning_rate": adapt.learning_rate * lr}
    settings = adapt.model_copy(update=same)
    if adapter:
        settings = AdaptConfig(method="lora", train_batch_size=adapt.train_batch_size, **same)
    unet = load_denoiser(bench.config.model)
    unet.load_state_dict(dict(start))
    if bind is not None:
        bind(unet)
    (lora if adapter else full)(unet, data, settings, bench.loss, mask=mask, seed=seed)
    return {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}


@contextmanager
def _away_from(models: Sequence[State], start: Mapping[str, Tensor]) -> Iterator[Callable[[nn.Module], None]]:
    """While this lasts, a bound model's every step is projected away from where `models` went from `start`."""
    spans = {}
    for name, tensor in start.items():
        moves = torch.stack([(model[name] - tensor).flatten() for model in models], dim=1)
        spans[name] = torch.linalg.qr(moves)[0]
    bound: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    def bind(unet: nn.Module) -> None:
        bound.extend((p, start[name], spans[name]) for name, p in unet.named_parameters())

    @torch.no_grad()
    def project(*_: Any) -> None:
        for parameter, origin, span in bound:
            move = (parameter - origin).flatten()
            parameter.sub_((span @ (span.T @ move)).view_as(parameter))

    handle = register_optimizer_step_post_hook(project)
    try:
        yield bind
    finally:
        handle.remove()


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """For each domain and its settings a line for each attack."""
    lines = []
    for settings, own in _groups(rows).items():
        said = ", ".join(f"{cls} {found} of {count}" for cls, (found, count) in own[-1]["recall"].items() if count)
        lines.append(" ".join(settings))
        lines.append(f"false alarms {own[-1]['false_alarms']:g}; of the publisher's own: {said or 'too few pictures'}")
        lines.append(f"{'attack':<25}{'found':<25}{'own class highest':<25}{'accused of another':<25}unseen accused")
        for attack in dict.fromkeys(row["attack"] for row in own):
            group = [row for row in own if row["attack"] == attack]
            known, unseen = ([row for row in group if (row["role"] == "unseen") == new] for new in (False, True))
            counts = (
                (sum(row["class"] in _named(row) for row in known), len(known)),
                (sum(row["class"] == _highest(row) for row in known), len(known)),
                (sum(bool(_named(row) - {row["class"]}) for row in known), len(known)),
                (sum(bool(_named(row)) for row in unseen), len(unseen)),
            )
            cells = "".join(f"{share(*count):<25}" for count in counts)
            lines.append(f"{attack:<25}{cells}".rstrip())
        lines.append("")
    return "\n".join(lines)


def _groups(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, ...], list[Mapping[str, Any]]]:
    """Rows by domain and settings."""
    runs: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        settings = row["domain"], *row["overrides"], *["LoRA references"] * (row["references"] == "lora")
        runs.setdefault(settings, []).append(row)
    return runs


def _named(row: Mapping[str, Any]) -> set[str]:
    return {finding["cls"] for finding in row["findings"] if finding["found"]}


def _highest(row: Mapping[str, Any]) -> str:
    return str(max(row["findings"], key=lambda finding: float(finding["deviations"]))["cls"])


def plot(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Deviations of every user, a row for each attack: his own class and all others."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = _groups(rows)
    figure, axes = plt.subplots(1, len(groups), figsize=(5.2 * len(groups), 4.6), sharey=True, layout="constrained")
    for axis, (settings, own) in zip(axes, groups.items(), strict=True):
        names = list(ATTACKS)[::-1]
        for label, colour, mine in (("another class", "0.75", False), ("the class he trained on", "tab:red", True)):
            points = [
                (finding["deviations"], names.index(row["attack"]))
                for row in own
                for finding in row["findings"]
                if (finding["cls"] == row["class"]) == mine
            ]
            axis.scatter(*zip(*points, strict=True), s=14, c=colour, label=label, zorder=2 + mine)
        axis.set(yticks=range(len(names)), yticklabels=names, xlabel="standard deviations from users of other classes")
        axis.set_title("\n".join(settings).replace("domain.", ""), fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, loc="lower right")
    figure.savefig(file, dpi=110)


def share(hits: int, count: int) -> str:
    """hits of count, with the 95 % interval of Clopper and Pearson in percent."""
    if not count:
        return "-"
    from scipy.stats import beta

    low = float(beta.ppf(0.025, hits, count - hits + 1)) if hits else 0.0
    high = float(beta.ppf(0.975, hits + 1, count - hits)) if hits < count else 1.0
    return f"{hits} of {count} [{low:.0%}, {high:.0%}]"


if __name__ == "__main__":
    main()
