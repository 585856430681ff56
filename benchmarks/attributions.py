"""How much of what one class gains, and how much of what another does, lies in the tensors, channels or numbers chosen?

    python benchmarks/attributions.py [--domain emoji-styles] [--cache DIR] [--pictures DIR] [KEY=VALUE ...]

A separate user learns each class twice, from the publisher's learn part and from its select part. Along the straight
line from the release to where he ends, the loss on pictures he did not train on is integrated (integrated gradients,
Sundararajan et al. 2017), so that every number of the denoiser has its share of what he gained and the shares add up.
Units are then chosen by the shares of the learn part, illegal - mu legal for each parameter, and counted on the select
part: the front of such masks to first order, for users who find no other way where one is closed. It says nothing of
edited values. Printed: correlations, and for each unit, mu and share of parameters the illegal, legal and unseen gain
within the choice.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.selectivity_bench import Bench  # noqa: E402
from benchmarks.selectivity_domains import DOMAINS, open_bench  # noqa: E402
from raygard.adaptation import full  # noqa: E402
from raygard.diffusion.cache import LatentSet  # noqa: E402
from raygard.diffusion.loss import draw  # noqa: E402
from raygard.diffusion.model import load_denoiser  # noqa: E402
from raygard.seeding import generator  # noqa: E402

PLACES = 8
DRAWS = 4
MUS = (0.0, 0.5, 0.8, 0.9, 1.0, 1.1, 1.3, 2.0)
SHARES = (0.01, 0.03, 0.1, 0.3, 0.5, 0.7)
LEGAL_BUDGET = 0.05
ROLES = ("illegal", "legal", "unseen")
# Sums of a tensor's shares over what is one unit. Vectors are one unit as tensors and channels.
UNITS: dict[str, Callable[[Tensor], Tensor]] = {
    "tensor": lambda value: value.sum().view(1),
    "output channel": lambda value: value.flatten(1).sum(1) if value.ndim > 1 else value.sum().view(1),
    "input channel": lambda value: value.transpose(0, 1).flatten(1).sum(1) if value.ndim > 1 else value.sum().view(1),
    "number": Tensor.flatten,
}


def shares(bench: Bench, train: LatentSet, held_out: LatentSet, seed: int) -> dict[str, Tensor]:
    """Each number's share of the fall of the held-out loss of a user of `train`, by tensor name."""
    unet = load_denoiser(bench.config.model)
    full(unet, train, bench.config.adapt, bench.loss, mask=None, seed=bench.config.seed)
    moved = {name: p.detach() - bench.base[name] for name, p in unet.named_parameters()}
    found = {name: torch.zeros_like(way) for name, way in moved.items()}
    unet.eval().requires_grad_(True)
    for place in range(PLACES):
        with torch.no_grad():
            for name, p in unet.named_parameters():
                p.copy_(bench.base[name] + (place + 0.5) / PLACES * moved[name])
        unet.zero_grad()
        for number in range(DRAWS):
            _loss(bench, unet, held_out, seed, place * DRAWS + number).div(DRAWS).backward()
        for name, p in unet.named_parameters():
            assert p.grad is not None
            found[name] -= p.grad * moved[name] / PLACES
    return found


def _loss(bench: Bench, unet: torch.nn.Module, data: LatentSet, seed: int, number: int) -> Tensor:
    """Mean loss of all rows, timesteps spread evenly over them."""
    rows = torch.arange(len(data))
    eps, noise, _ = draw(seed, "attributions", number, rows.tolist(), data.shape)
    rng = generator(seed, "attributions", number)
    even = (torch.randperm(len(rows), generator=rng) + torch.rand(len(rows), generator=rng)) / len(rows)
    timesteps = (even * bench.loss.num_timesteps).long().clamp(max=bench.loss.num_timesteps - 1)
    return bench.loss.per_sample(unet, data.latents(rows, eps), data.conditioning[rows], noise, timesteps).mean()


def collect(bench: Bench) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Shares by (half, role), classes of a role averaged; nobody looks at unseen classes when learning."""
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    started = time.monotonic()
    halves = (("learn", bench.learn, "lower", "upper"), ("select", bench.select, "adapt", "reference"))
    for seed, (half, data, train, held_out) in enumerate(halves):
        roles = bench.classes if half == "learn" else bench.roles
        for cls, role in roles.items():
            parts = [data.subset(data.rows(cls, f"{half}_{part}")) for part in (train, held_out)]
            own = shares(bench, parts[0], parts[1], seed)
            gained = sum(float(value.sum()) for value in own.values())
            print(f"{half} {cls} ({role}): loss falls by {gained:.4f}, {time.monotonic() - started:.0f} s", flush=True)
            weight = 1 / list(roles.values()).count(role)
            mean = found.setdefault((half, role), {name: torch.zeros_like(value) for name, value in own.items()})
            for name, value in own.items():
                mean[name] += weight * value
    return found


def by_unit(found: Mapping[str, Tensor], unit: str) -> Tensor:
    """Shares of all units as parts of the whole, float64 (units,)."""
    values = torch.cat([UNITS[unit](value) for value in found.values()]).double()
    return values / values.sum()


def fronts(found: Mapping[tuple[str, str], Mapping[str, Tensor]]) -> Iterator[dict[str, Any]]:
    """A row for each kind of unit, mu and share of parameters."""
    for unit in UNITS:
        learn = {role: by_unit(found["learn", role], unit) for role in ("illegal", "legal")}
        select = {role: by_unit(found["select", role], unit) for role in ROLES if ("select", role) in found}
        sizes = torch.cat(
            [UNITS[unit](torch.ones_like(value)) for value in found["learn", "illegal"].values()]
        ).double()
        alike = {
            "illegal, other pictures": correlation(learn["illegal"], select["illegal"]),
            "illegal and legal": correlation(learn["illegal"], select["legal"]),
            "their difference, other pictures": correlation(
                learn["illegal"] - learn["legal"], select["illegal"] - select["legal"]
            ),
        }
        for mu in MUS:
            order = ((learn["illegal"] - mu * learn["legal"]) / sizes).argsort(descending=True)
            taken = sizes[order].cumsum(0) / sizes.sum()
            for share in SHARES:
                chosen = order[: int((taken <= share).sum())]
                counted = {role: float(values[chosen].sum()) for role, values in select.items()}
                yield {"unit": unit, "count": len(sizes), "mu": mu, "share": share, **counted, "correlation": alike}


def correlation(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first, second]))[0, 1])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each kind of unit and mu: illegal/legal/unseen at each share of parameters."""
    lines = []
    for unit in UNITS:
        own = [row for row in rows if row["unit"] == unit]
        alike = ", ".join(f"{name} {value:.3f}" for name, value in own[0]["correlation"].items())
        lines += [f"{own[0]['count']} units of one {unit}; correlations: {alike}"]
        within = [row for row in own if row["legal"] <= LEGAL_BUDGET]
        best = max(within, key=lambda row: row["illegal"])
        counted = ", ".join(f"{role} {best[role]:.2f}" for role in ROLES if role in best)
        lines += [f"most illegal at legal <= {LEGAL_BUDGET:g}: {counted} (mu {best['mu']:g}, {best['share']:.0%})"]
        lines += ["   mu" + "".join(f"{f'{share:.0%} of parameters':>20}" for share in SHARES)]
        for mu in MUS:
            cells = ("/".join(f"{row[role]:.2f}" for role in ROLES if role in row) for row in own if row["mu"] == mu)
            lines.append(f"{mu:>5g}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=sorted(DOMAINS), default="emoji-styles")
    parser.add_argument("--pictures", type=Path, help="where faces_congress and faces_olivetti are, for faces-small")
    parser.add_argument("--cache", type=Path, default=Path("runs/selectivity"))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "attributions.jsonl")
    parser.add_argument("overrides", nargs="*", help="settings as key=value")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = open_bench(arguments.domain, arguments.cache, arguments.pictures, arguments.overrides)
    about = {"domain": arguments.domain, "overrides": arguments.overrides}
    rows = [{**about, **row} for row in fronts(collect(bench))]
    with arguments.results.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    print(table(rows))


if __name__ == "__main__":
    main()
