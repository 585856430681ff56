"""What a user saves who keeps to a mask: memory and time of fine-tuning at several freeze ratios (docs/performance.md).

    python benchmarks/user_savings.py [--rounds 3] [--out benchmarks/results/user_savings.json] [--plot FILE]
    python benchmarks/user_savings.py --options [--rounds 1]    # options of `adapt` instead; --out keeps the rest

The loop is raygard's own (`raygard.adaptation.training.train`, AdamW, float32). A share p is frozen in three ways:
random tensors, p of their number (`count`); random tensors, p of the parameters (`params`); the largest tensors, p of
their number (`largest`). Every case runs in a process of its own, on one thread, and a round runs all of them once,
with other random tensors: what a ratio compares was measured in the same run.

On a CPU the model is a UNet of Stable Diffusion's layout with 79 million parameters, memory is resident memory less
what libraries take, and time is the process's CPU time, which does not count other work of the machine. With a GPU it
is SD 2.1's UNet on latents of 512 pixels in bf16 autocast, memory is what torch allocated, and time is wall time.

Options are gradient checkpointing and the fused and the 8-bit AdamW, each without a mask and at p = 0.3 (`count`).

Counted beside it for SD 2.1's UNet, without running it: gradients, Adam's moments, what autograd keeps, and
floating-point operations of forward and backward.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from benchmarks import workers
from benchmarks.memory import TINY, UNET
from benchmarks.resident import reset_peak, resident
from raygard.diffusion.shape import (
    KNOWN,
    count_flops,
    family_of_shape,
    make_denoiser,
    measure,
    meta_denoiser,
    run_denoiser,
)
from raygard.mask.soft import select_frozen

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "user_savings.json"
RATIOS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.85)
WAYS = ("count", "params", "largest")
# Settings of `adapt`, by the name in the table. The 8-bit AdamW is one kernel a tensor already.
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "checkpointing": {"gradient_checkpointing": True},
    "fused": {"optimizer": "adamw-fused"},
    "8-bit": {"optimizer": "adamw-8bit"},
    "checkpointing, fused": {"gradient_checkpointing": True, "optimizer": "adamw-fused"},
    "checkpointing, 8-bit": {"gradient_checkpointing": True, "optimizer": "adamw-8bit"},
}
OPTION_RATIOS = (0.0, 0.3)
STEPS, BATCH = 6, 4
SD21_SIDE = 64  # latents of 512 pixels
GIB = 2**30
# What tells the rows of a round apart.
CASE = ("way", "p", "option")


def cases() -> list[dict[str, Any]]:
    """Ways to freeze and their p, p = 0 once."""
    pairs = [("count", 0.0)] + [(way, p) for way in WAYS for p in RATIOS if p > 0]
    return [{"way": way, "p": p} for way, p in pairs]


def option_cases() -> list[dict[str, Any]]:
    return [{"way": "count", "p": p, "option": option} for p in OPTION_RATIOS for option in OPTIONS]


def choose(counts: Sequence[int], way: str, p: float, seed: int) -> list[bool]:
    """Which of the tensors of these sizes are frozen."""
    if p == 0:
        return [False] * len(counts)
    sizes = torch.tensor(counts)
    random = torch.rand(len(sizes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits = sizes.double() if way == "largest" else random
    return select_frozen(logits, sizes, p, "params" if way == "params" else "count").tolist()


def freeze(unet: nn.Module, frozen: Sequence[bool]) -> nn.Module:
    for parameter, held in zip(unet.parameters(), frozen, strict=True):
        parameter.requires_grad_(not held)
    return unet


def share(counts: Sequence[int], frozen: Sequence[bool]) -> float:
    """Of the parameters, that are frozen."""
    return sum(count for count, held in zip(counts, frozen, strict=True) if held) / sum(counts)


def moment_bytes(counts: Sequence[int], optimizer: str) -> int:
    """Of Adam for trained tensors of these sizes.

    bitsandbytes keeps 8 bits in blocks of 256 with a float32 scale each, and tensors below 4096 elements in float32.
    """
    if optimizer != "adamw-8bit":
        return 8 * sum(counts)
    return sum(2 * count + 8 * -(-count // 256) if count >= 4096 else 8 * count for count in counts)


def fine_tune(model: Path, tiny: Path, seed: int, way: str, p: float, option: str = "none") -> dict[str, float]:
    """Peak memory and seconds of a step of one user; in a process of its own."""
    train(tiny, seed, "count", 0.0, option)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        libraries = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        libraries = resident("VmRSS")
        reset_peak()
    found = train(model, seed, way, p, option)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")
    return {**found, "peak_bytes": peak - libraries}


def train(model: Path, seed: int, way: str, p: float, option: str) -> dict[str, float]:
    """A few steps of raygard's own user."""
    from raygard.adaptation.training import train as train_user
    from raygard.config import AdaptConfig, ModelConfig
    from raygard.diffusion.model import load_denoiser, load_loss

    source = ModelConfig(pretrained_model_name_or_path=str(model))
    unet = load_denoiser(source)
    counts = [parameter.numel() for parameter in unet.parameters()]
    frozen = choose(counts, way, p, seed)
    freeze(unet, frozen)
    precision: Any = "bf16" if torch.cuda.is_available() else "no"
    config = AdaptConfig(max_train_steps=STEPS, train_batch_size=BATCH, mixed_precision=precision, **OPTIONS[option])
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    ticks: list[float] = []
    loss = load_loss(source)
    result = train_user(
        unet, workers.random_latents(model), config, loss, seed=seed, on_step=lambda *_: ticks.append(clock())
    )
    # The first step, which makes Adam's moments, ends at the first tick.
    seconds = [after - before for before, after in itertools.pairwise(ticks)]
    return {
        "param_share": share(counts, frozen),
        "trainable_params": result.trainable_params,
        "optimizer_bytes": result.optimizer_bytes,
        "step_s": statistics.median(seconds),
    }


def count_sd21(way: str, p: float, option: str = "none") -> dict[str, float]:
    """Bytes and operations of one float32 step of SD 2.1's UNet at 512 px, batch 1, by arithmetic."""
    settings = {"gradient_checkpointing": False, "optimizer": "adamw", **OPTIONS[option]}
    family, config = family_of_shape("SD2.1-shape"), KNOWN["SD2.1-shape"]
    denoiser = meta_denoiser(family, config)
    counts = [parameter.numel() for parameter in denoiser.parameters()]
    frozen = choose(counts, way, p, seed=0)
    freeze(denoiser, frozen)
    if settings["gradient_checkpointing"]:
        denoiser.enable_gradient_checkpointing()
    flops = count_flops(lambda: run_denoiser(family, denoiser, SD21_SIDE).sum().backward())
    kept = measure(
        lambda: freeze(make_denoiser(family, config, settings["gradient_checkpointing"]), frozen),
        lambda module: run_denoiser(family, module, SD21_SIDE),
    )
    trained = [count for count, held in zip(counts, frozen, strict=True) if not held]
    return {
        "param_share": share(counts, frozen),
        "weights": 4 * sum(counts),
        "gradients": 4 * sum(trained),
        "moments": moment_bytes(trained, settings["optimizer"]),
        "activations": 4 * kept.saved_elements,
        "flops": flops,
    }


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over rounds for each case, with ratios to p = 0 of the same round, and the range of these ratios."""
    whole = {row["seed"]: row for row in rows if row["p"] == 0 and row.get("option", "none") == "none"}
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(str([row[key] for key in CASE if key in row]), []).append(row)
    table = []
    for own in cases.values():
        line: dict[str, Any] = {key: own[0][key] for key in CASE if key in own[0]}
        line["rounds"] = len(own)
        for key in ("param_share", "optimizer_bytes"):
            line[key] = statistics.mean(row[key] for row in own)
        for key in ("peak_bytes", "step_s"):
            ratios = [row[key] / whole[row["seed"]][key] for row in own]
            line[key] = statistics.mean(row[key] for row in own)
            line[f"{key}_ratio"] = statistics.mean(ratios)
            line[f"{key}_range"] = [min(ratios), max(ratios)]
        table.append(line)
    return table


def standing(sd21: dict[str, float], batch: int) -> float:
    """Bytes at the end of a forward pass or of a backward one, whichever holds more: weights and moments, and what
    autograd keeps of `batch` pictures or the gradients.
    """
    return sd21["weights"] + sd21["moments"] + max(sd21["gradients"], batch * sd21["activations"])


def markdown(table: Sequence[dict[str, Any]], counted: Sequence[dict[str, Any]], device: str) -> str:
    """The tables of docs/performance.md: what was measured, and what was counted. They begin with p = 0."""
    unit = "CPU time" if device == "cpu" else "time"
    many = table[0]["rounds"] > 1
    said = "saved [range]" if many else "saved"
    names = ["options", "p", "optimizer state"] if "option" in table[0] else ["frozen", "p", "of the parameters"]
    lines = _head(*names, "peak memory", said, f"{unit} of a step", said)
    for row in table:
        saved = []
        for key in ("peak_bytes", "step_s"):
            low, high = (1 - row[f"{key}_range"][end] for end in (1, 0))
            saved.append(_percent(1 - row[f"{key}_ratio"]) + (f" [{_percent(low)}, {_percent(high)}]" if many else ""))
        third = f"{row['optimizer_bytes'] / GIB:.2f} GiB" if "option" in row else f"{row['param_share']:.0%}"
        lines.append(
            f"| {_case(row)} | {row['p']:g} | {third} | "
            f"{row['peak_bytes'] / GIB:.2f} GiB | {saved[0]} | {row['step_s']:.2f} s | {saved[1]} |"
        )
    sizes = ["gradients", "Adam's moments", "kept by autograd", "saved, batch 1", "batch 4", "operations saved"]
    lines += ["", *_head(names[0], "p", "of the parameters", *sizes)]
    whole = counted[0]
    for own in counted:
        saved = [_percent(1 - standing(own, batch) / standing(whole, batch)) for batch in (1, 4)]
        bytes_ = " | ".join(f"{own[key] / GIB:.1f} GiB" for key in ("gradients", "moments", "activations"))
        lines.append(
            f"| {_case(own)} | {own['p']:g} | {own['param_share']:.0%} | {bytes_} | "
            f"{saved[0]} | {saved[1]} | {_percent(1 - own['flops'] / whole['flops'])} |"
        )
    return "\n".join(lines)


def _percent(share: float) -> str:
    # Not ":.0%", which writes what is just below zero as -0%.
    return f"{round(100 * share)}%"


def _case(row: dict[str, Any]) -> str:
    return str(row.get("option", row["way"] if row["p"] else "nothing"))


def _head(first: str, *others: str) -> list[str]:
    return [f"| {' | '.join((first, *others))} |", "|---|" + "---:|" * len(others)]


def plot(table: Sequence[dict[str, Any]], path: Path) -> None:
    """Memory and time of a step against the share of parameters, one line for each way of freezing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key, words in zip(axes, ("peak_bytes", "step_s"), ("peak memory", "time of a step"), strict=True):
        for way in WAYS:
            own = sorted((row for row in table if row["way"] == way or row["p"] == 0), key=lambda row: row["p"])
            x, y = [row["p"] for row in own], [row[f"{key}_ratio"] for row in own]
            low, high = zip(*(row[f"{key}_range"] for row in own), strict=True)
            axis.plot(x, y, marker="o", label=way)
            axis.fill_between(x, low, high, alpha=0.2)
        axis.set(xlabel="p", ylabel=f"{words}, of that without a mask", ylim=(0, 1.1))
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--options", action="store_true", help="measure options of `adapt` instead of ways to freeze")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, default=None)
    parser.add_argument("--tables", action="store_true", help="print the tables of --out; measure nothing")
    args = parser.parse_args()
    document = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() or args.tables else {}
    if not args.tables:
        found = run(option_cases() if args.options else cases(), args.rounds)
        # What was measured before of the other kind stays, with the machine it was measured on.
        others = {"options": document["options"]} if "options" in document else {}
        document = {**document, "options": found} if args.options else {**found, **others}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for part in (document, document.get("options")):
        if part and "rows" in part:
            print(markdown(summarize(part["rows"]), part["sd21"], part["device"]), end="\n\n")
    if args.plot:
        plot(summarize(document["rows"]), args.plot)


def run(own: Sequence[dict[str, Any]], rounds: int) -> dict[str, Any]:
    """Rows of all cases in every round, the same of SD 2.1's UNet by arithmetic, and the machine."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="raygard-") as root:
        unet = {**KNOWN["SD2.1-shape"], "sample_size": SD21_SIDE} if torch.cuda.is_available() else UNET
        model, tiny = (workers.make_model(Path(root, name), **shape) for name, shape in (("m", unet), ("t", TINY)))
        for seed in range(rounds):
            for case in own:
                found = workers.measured(workers.run_alone, fine_tune, model, tiny, seed, *case.values())
                rows.append({**case, "seed": seed, **found})
                print(json.dumps(rows[-1]), flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # One kernel or several take the same memory and operations.
    counted = [{**case, **count_sd21(**case)} for case in own if "fused" not in case.get("option", "")]
    return {**workers.machine(), "device": device, "rows": rows, "sd21": counted}


if __name__ == "__main__":
    main()
