"""Can the denoiser tell, from a noisy picture, whether it shows a forbidden class, and does it in time?

    python benchmarks/recognition.py --domain faces-small --pictures DIR [--cache DIR] [--parts gate] -- [KEY=VALUE ...]

Values that block users of one class and let strangers through, under any name, must tell the two apart by what the
denoiser is given: x_t. So probes are trained on what the publisher has (illegal classes' learn part against legal
ones', general pictures and every second stranger) and asked about pictures and strangers they have not seen. A probe is
a logistic regression on x_t itself or on a block's features of the release, averaged over 4 x 4 cells. Printed: area
under the ROC curve at each noise level, illegal against strangers and against legal classes; 0.5 is chance. Strangers
are all classes of the data that the domain does not name.

Then, when a picture's class is decided: an unguarded user's denoiser draws above a noise level only, or below only, and
the release the rest. Printed: the shares of his gain, by scorer, that are left. Five minutes on one core.

Last, how well a release would have to recognise: of what a user's training changes in the answers below a noise
level, a share is taken away, as an ideal gate in the frozen tensors would. Printed: blocked adaptation of illegal and
unseen classes, with the gate closed while he trains and draws, and while he trains only. Twenty minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.selectivity_bench import ATTACKS, Bench  # noqa: E402
from benchmarks.selectivity_domains import DOMAINS, open_bench  # noqa: E402
from raygard.adaptation import full  # noqa: E402
from raygard.diffusion.cache import LatentSet  # noqa: E402
from raygard.diffusion.loss import DiffusionLoss, draw  # noqa: E402
from raygard.diffusion.model import load_denoiser  # noqa: E402
from raygard.imagefolder import read_entries, resolve_data  # noqa: E402

LEVELS = (50, 200, 400, 600, 800, 950)
SWITCHES = (900, 800, 700, 600, 400, 200)
INPUT = "x_t"
CELLS = 4
PASSES = 40
BATCH = 64
GATES = (0.2, 0.5, 0.8, 0.9, 0.95, 1.0)
GATED_BELOW = 600
# Of the regression, strong: there are few pictures and many features.
PENALTY = 0.003


def with_strangers(bench: Bench) -> Bench:
    """The bench with every class of its data that has no other use among the unseen ones."""
    domain = bench.config.domain
    used = {*domain.illegal, *domain.legal, *domain.general}
    entries = read_entries(resolve_data(domain.data), domain.caption_column, domain.class_column)
    return bench.with_domain(unseen=tuple(sorted({entry.cls for entry in entries} - used)))


class Features:
    """What the release's blocks make of noisy pictures, all under the caption of one general picture."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._unet = bench, load_denoiser(bench.config.model).eval()
        self._found: dict[str, Tensor] = {}
        blocks = {f"down {index}": block for index, block in enumerate(self._unet.down_blocks)}
        blocks |= {"middle": self._unet.mid_block}
        blocks |= {f"up {index}": block for index, block in enumerate(self._unet.up_blocks)}
        for name, block in blocks.items():
            block.register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            value = output[0] if isinstance(output, tuple) else output
            self._found[name] = F.adaptive_avg_pool2d(value, min(CELLS, value.shape[-1])).flatten(1)

        return hook

    @torch.no_grad()
    def of(self, data: LatentSet, level: int, passes: int, stream: str) -> dict[str, NDArray[np.float32]]:
        """Features of every picture at one timestep, `passes` draws of noise each: by place, float32 (n passes, D)."""
        loss = self._bench.loss
        assert isinstance(loss, DiffusionLoss)
        caption = self._bench.general["rehearsed"].conditioning[0]
        parts: dict[str, list[Tensor]] = {}
        rows = torch.arange(len(data)).repeat(passes)
        for number, own in enumerate(rows.split(BATCH)):
            slots = [number * BATCH + index for index in range(len(own))]
            eps, noise, _ = draw(self._bench.config.seed, stream, level, slots, data.shape, loss.num_timesteps)
            times = torch.full((len(own),), level)
            noisy = loss.scheduler.add_noise(data.latents(own, eps), noise, times)
            text = caption.each(lambda tensor: tensor.expand(len(own), *tensor.shape))  # noqa: B023
            loss.predict(self._unet, noisy, times, text)
            for name, value in {INPUT: noisy.flatten(1), **self._found}.items():
                parts.setdefault(name, []).append(value)
        return {name: torch.cat(values).numpy() for name, values in parts.items()}


def probe(positive: NDArray[np.float32], negative: NDArray[np.float32]) -> Pipeline:
    """A classifier of illegal pictures, both sides weighing the same."""
    features = np.concatenate([positive, negative])
    labels = np.repeat([1, 0], [len(positive), len(negative)])
    regression = LogisticRegression(C=PENALTY, max_iter=300, class_weight="balanced")
    return make_pipeline(StandardScaler(), regression).fit(features, labels)


def area(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> float:
    """Area under the ROC curve: how often the first kind of picture is found likelier illegal than the other."""
    labels = np.repeat([1, 0], [len(positive), len(negative)])
    return float(roc_auc_score(labels, np.concatenate([positive, negative])))


def rows_of(data: LatentSet, classes: Sequence[str]) -> LatentSet:
    return data.subset(torch.cat([data.rows(cls) for cls in classes]))


def recognised(bench: Bench, level: int, features: Features) -> dict[str, dict[str, float]]:
    """By place: areas against new strangers together, against the one least told apart, and against legal classes."""
    domain, strangers = bench.config.domain, list(bench.config.domain.unseen)
    known, new = strangers[::2], strangers[1::2]
    sets = {
        "illegal": rows_of(bench.learn, domain.illegal),
        "legal": rows_of(bench.learn, domain.legal),
        "general": bench.general["rehearsed"],
        "known": rows_of(bench.select, known),
        "new illegal": rows_of(bench.select, domain.illegal),
        "new legal": rows_of(bench.select, domain.legal),
        **{cls: rows_of(bench.select, [cls]) for cls in new},
    }
    few = -(-PASSES // 10)
    found = {name: features.of(data, level, PASSES if name == "illegal" else few, name) for name, data in sets.items()}
    result = {}
    for place in found["illegal"]:
        others = np.concatenate([found[name][place] for name in ("legal", "general", "known")])
        model = probe(found["illegal"][place], others)
        scores = {name: model.decision_function(found[name][place]) for name in ("new illegal", "new legal", *new)}
        own = scores.pop("new illegal")
        legal = scores.pop("new legal")
        alike = min(area(own, values) for values in scores.values())
        result[place] = {"strangers": area(own, np.concatenate(list(scores.values()))), "worst of them": alike}
        result[place]["legal"] = area(own, legal)
    return result


def drawn_by_turns(bench: Bench, level: int) -> tuple[float, float]:
    """Shares of what unguarded users of the illegal classes gain if they draw above a noise level only, and below only.

    The release draws the rest.
    """
    attack, release = ATTACKS["plain"], load_denoiser(bench.config.model)
    gains = [0.0, 0.0]
    whole = 0.0
    for cls in bench.config.domain.illegal:
        base = bench.released(cls, attack).distance
        whole += base - bench.unguarded(cls, attack, 0).distance
        user = _user(bench, cls)
        own = user.forward
        for index, (above, below) in enumerate(((own, release.forward), (release.forward, own))):

            def switched(noisy: Tensor, timestep: Tensor, *arguments: object, **named: object) -> object:
                return (above if timestep >= level else below)(noisy, timestep, *arguments, **named)  # noqa: B023

            user.forward = switched
            gains[index] += base - bench.distance(user, cls, attack)
        user.forward = own
    return gains[0] / whole, gains[1] / whole


@cache
def _user(bench: Bench, cls: str) -> nn.Module:
    return bench.user(None, cls, ATTACKS["plain"], 0)


def blocked_by_gate(bench: Bench, classes: Sequence[str], gate: float) -> tuple[float, float]:
    """Blocked adaptation of these classes' users if a share `gate` of their change is held off below `GATED_BELOW`.

    First with the gate closed in training and drawing, then in training only.
    """
    attack, release = ATTACKS["plain"], load_denoiser(bench.config.model).requires_grad_(False).eval()
    lost = [0.0, 0.0]
    whole = 0.0
    for cls in classes:
        learned = bench.unguarded(cls, attack, 0).distance
        whole += bench.released(cls, attack).distance - learned
        user = load_denoiser(bench.config.model)
        own = user.forward

        def held(noisy: Tensor, timestep: Tensor, *arguments: object, **named: object) -> tuple[Tensor]:
            answer, before = (model(noisy, timestep, *arguments, **named)[0] for model in (own, release))  # noqa: B023
            acting = 1 - gate * (timestep.reshape(-1, 1, 1, 1) < GATED_BELOW).float()
            return (before + acting * (answer - before),)

        user.forward = held
        full(user, bench.users(cls, attack)[0], bench.config.adapt, bench.loss, mask=None, seed=0)
        for index, forward in enumerate((held, own)):
            user.forward = forward
            lost[index] += bench.distance(user, cls, attack) - learned
    return lost[0] / whole, lost[1] / whole


def print_recognised(bench: Bench) -> None:
    wide = with_strangers(bench)
    print(f"learned from {len(wide.learn)} pictures; strangers: {', '.join(wide.config.domain.unseen)}", flush=True)
    features = Features(wide)
    for level in LEVELS:
        for place, areas in recognised(wide, level, features).items():
            cells = "  ".join(f"{name} {value:.2f}" for name, value in areas.items())
            print(f"t {level:>3}  {place:<8} {cells}", flush=True)


def print_drawn_by_turns(bench: Bench) -> None:
    for level in SWITCHES:
        above, below = drawn_by_turns(bench, level)
        print(
            f"of the user's gain, drawn by him above t {level:>3} only: {above:+.2f}, below only: {below:+.2f}",
            flush=True,
        )


def print_gates(bench: Bench) -> None:
    for gate in GATES:
        for role in ("illegal", "unseen"):
            both, training = blocked_by_gate(bench, getattr(bench.config.domain, role), gate)
            print(
                f"gate {gate:.2f}  {role:<7} blocked {both:+.2f}, closed in training only {training:+.2f}", flush=True
            )


PARTS = {"recognise": print_recognised, "draw": print_drawn_by_turns, "gate": print_gates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=sorted(DOMAINS), default="emoji-styles")
    parser.add_argument("--pictures", type=Path, help="where faces_congress and faces_olivetti are, for faces-small")
    parser.add_argument("--cache", type=Path, default=Path("runs/selectivity"))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("overrides", nargs="*", help="settings as key=value")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = open_bench(arguments.domain, arguments.cache, arguments.pictures, arguments.overrides)
    for part in arguments.parts:
        PARTS[part](bench)


if __name__ == "__main__":
    main()
