"""Mask learning against the published arrangement: peak memory and pictures per second (docs/performance.md).

    python benchmarks/mask_learning.py [--rounds 2] [--only CASE ...] [--out FILE]
    python benchmarks/mask_learning.py --profile DIR

The published arrangement is written out in benchmarks/published_arrangement.py; raygard's cases are its own engines and
optimizer, one option after the other. Each case runs in a process of its own, on one thread, and a round runs all of
them once: what a ratio compares was measured in the same run. Every case learns on the same pictures, noise and
timesteps with the same SGD lower loop and update rule, and its logits and weights are compared with those of the plain
float32 path.

On a CPU the denoiser is a UNet of Stable Diffusion's layout with 79 million parameters, with an autoencoder and a text
encoder smaller in the same proportion, batch 4. Memory is resident memory less what libraries take, in a process that
returns all it frees; time is the CPU time of another that does not, so that other work of the machine does not count.
With a GPU it is SD 2.1 at its own size, 512 pixels, batch 16; memory is what torch allocated, and time is wall time.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks import workers
from benchmarks.learning_models import (
    DEVICE,
    ON_GPU,
    SD21,
    SIZES,
    Material,
    make_batches,
    make_material,
    make_schedule,
    make_text_encoder,
    make_unet,
    make_vae,
    relearned,
)
from benchmarks.published_arrangement import PublishedArrangement
from benchmarks.resident import reset_peak, resident
from raygard.bilevel import BilevelOptimizer, ShardLayout
from raygard.bilevel.alternation import DenoiserLoss, PlainEngine, Schedule, alternate
from raygard.bilevel.rules import Rule, RuleSettings, make_rule
from raygard.bilevel.streamed import StreamedEngine
from raygard.config import BilevelConfig, EngineConfig
from raygard.diffusion.shape import measure_denoiser

RESULTS = Path(__file__).resolve().parent / "results" / "mask_learning.json"
PAPER_L = 10
TEMPERATURE, RATIO, LR = 0.2, 0.3, 1e-5
INNER, ROUNDS = 2, 3  # the first round warms up


@dataclass(frozen=True)
class Case:
    """engine: published, alone (forward and backward only), plain, streamed, or zeroN (DeepSpeed)."""

    says: str
    engine: str = "streamed"
    bf16: bool = True
    checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False
    fused_attention: bool = True
    optimizer: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    against: str = "published"
    gpu_only: bool = False


ROUNDED = {"theta_d_dtype": torch.bfloat16}
OFFLOAD = {"offload_optimizer_device": "cpu", "offload_param_device": "cpu"}
CASES = {
    "float32": Case("latents and text cached, float32", "plain", bf16=False),
    "published": Case("the published arrangement", "published"),
    "plain": Case("latents and text cached", "plain"),
    "streamed": Case("+ gradients used as they arrive, weights in halves"),
    "rounded": Case("+ theta_d in bfloat16, rounded at random", optimizer=ROUNDED),
    "host": Case("theta_d in main memory instead", optimizer={"theta_d_on_host": True}, gpu_only=True),
    "channels-last": Case("rounded, channels_last", optimizer=ROUNDED, channels_last=True),
    "compiled": Case("rounded, compiled blocks", optimizer=ROUNDED, compile=True),
    "unfused": Case("rounded, attention without SDPA", optimizer=ROUNDED, fused_attention=False),
    "published-checkpointed": Case("the published arrangement, checkpointing", "published", checkpointing=True),
    "checkpointed": Case(
        "rounded, gradient checkpointing", optimizer=ROUNDED, checkpointing=True, against="published-checkpointed"
    ),
    "zero0": Case("DeepSpeed ZeRO 0, one worker", "zero0"),
    "zero2": Case("DeepSpeed ZeRO 2, one worker", "zero2"),
    "zero3": Case("DeepSpeed ZeRO 3, one worker", "zero3"),
    "zero3-offload": Case("DeepSpeed ZeRO 3, all offloaded", "zero3", options=OFFLOAD, gpu_only=True),
    "alone": Case("forward and backward alone, bfloat16 weights", "alone"),
}


def make_budget(count: int) -> Rule:
    return make_rule("budget", RuleSettings(count, RATIO, TEMPERATURE, 0.05, 0.0, None, 0))


def run_case(folder: Path, name: str) -> dict[str, Any]:
    """Peak memory, seconds of both kinds of step, and what was learned; in a process of its own."""
    case = CASES[name]
    material = make_material(folder)
    gc.collect()
    baseline = memory_now()
    steps, learned = set_up(case, material)
    gc.collect()
    # Setting up copies the model several times, in main memory wherever there is a GPU.
    forget_peak()
    clock = time.perf_counter if ON_GPU else time.process_time
    seconds: dict[str, list[float]] = {"user": [], "publisher": []}
    for index, (kind, step) in enumerate(steps):
        settle()
        started = clock()
        step()
        settle()
        if index > INNER:
            seconds[kind].append(clock() - started)
    peak = torch.cuda.max_memory_allocated() if ON_GPU else resident("VmHWM")
    found = {f"{kind}_s": statistics.median(taken) for kind, taken in seconds.items()}
    return {"peak_bytes": peak - baseline, **found, "learned": learned()}


def memory_now() -> int:
    if ON_GPU:
        torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() if ON_GPU else resident("VmRSS")


def forget_peak() -> None:
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak()


def settle() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


Steps = Iterator[tuple[str, Callable[[], object]]]


def set_up(case: Case, material: Material) -> tuple[Steps, Callable[[], dict[str, Any]]]:
    """The steps of a case, each with its kind, and what gives what was learned when they are done."""
    return published(case, material) if case.engine == "published" else own(case, material)


def learned_state(logits: Tensor, weights: Iterable[Tensor]) -> dict[str, Any]:
    """Logits, and weights of all over the model. weights: every tensor, flat, in the model's order."""
    flat = [w.detach()[:: max(1, w.numel() // 4)][:4].float().cpu() for w in weights]
    return {"logits": logits.clone(), "weights": torch.cat(flat)}


def weights_of(unet: nn.Module) -> Iterator[Tensor]:
    return (p.reshape(-1) for p in unet.parameters())


def published(case: Case, material: Material) -> tuple[Steps, Callable[[], dict[str, Any]]]:
    unet = make_unet()
    if case.checkpointing:
        unet.enable_gradient_checkpointing()  # type: ignore[operator]
    torch.manual_seed(2)
    vae, text = make_vae(SIZES), make_text_encoder(SIZES)
    rule = make_budget(sum(1 for _ in unet.parameters()))
    arrangement = PublishedArrangement(
        unet, vae, text, material.loss, rule, TEMPERATURE, LR, relearned(unet), material.pixels, material.tokens,
        DEVICE, torch.bfloat16 if case.bf16 else torch.float32,
    )  # fmt: skip
    lower, upper = make_batches(material)

    def steps() -> Steps:
        for k in range(ROUNDS):
            for step in range(k * INNER, (k + 1) * INNER):
                yield "user", lambda step=step: arrangement.user_step(lower, step)  # type: ignore[misc]
            yield "publisher", lambda k=k: arrangement.publisher_step(upper, k)  # type: ignore[misc]

    return steps(), lambda: learned_state(arrangement.state["logits"], weights_of(unet))


def own(case: Case, material: Material) -> tuple[Steps, Callable[[], dict[str, Any]]]:
    """raygard's engines: the pure core in one process, or DeepSpeed around the same optimizer."""
    unet: Any = make_unet()
    if case.checkpointing:
        unet.enable_gradient_checkpointing()
    if case.compile:
        unet.compile_repeated_blocks()
    if not case.fused_attention:
        from diffusers.models.attention_processor import AttnProcessor

        unet.set_attn_processor(AttnProcessor())
    module = DenoiserLoss(unet, material.loss)
    if case.channels_last:
        module.memory_format = torch.channels_last
    optimizer, engine = build(case, unet, module)
    lower, upper = make_batches(material)
    records = alternate(engine, optimizer, lower, upper, Schedule(INNER, ROUNDS), device=DEVICE)
    kinds = ([*["user"] * INNER, "publisher"]) * ROUNDS

    def learned() -> dict[str, Any]:
        pieces = optimizer.layout.pieces(optimizer.theta())
        return learned_state(optimizer.logits, [pieces[name][1] for name in optimizer.layout.names])

    return ((kind, lambda: next(records)) for kind in kinds), learned


def build(case: Case, unet: nn.Module, module: DenoiserLoss) -> tuple[BilevelOptimizer, Any]:
    pre = {name: p.detach().clone() for name, p in unet.named_parameters()}
    after, count = relearned(unet), len(pre)

    def factory(params: Any, reduce: Any = None) -> BilevelOptimizer:
        rule = make_budget(count)
        return BilevelOptimizer(params, rule=rule, user_optimizer="sgd", lr=LR, reduce=reduce, **case.optimizer)

    if case.engine.startswith("zero"):
        from raygard.cluster.engine import build as build_sharded

        stage: Any = int(case.engine.removeprefix("zero"))
        engine = EngineConfig(zero_stage=stage, mixed_precision="bf16", use_gpu=ON_GPU, **case.options)
        training = build_sharded(
            unet, module, factory, pre, after, engine, BilevelConfig(train_batch_size=SIZES.batch, max_grad_norm=0)
        )
        return training.optimizer, training.engine
    module.to(DEVICE)
    if case.engine in ("streamed", "alone"):
        nn.Module.to(unet, torch.bfloat16)
    elif case.bf16:
        module.autocast = torch.bfloat16
    parameters = list(unet.parameters())
    optimizer = factory(parameters)
    layout = ShardLayout.dense({name: p.numel() for name, p in pre.items()})
    optimizer.bind(parameters, layout, pre, after)
    if case.engine == "alone":
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        return optimizer, Alone(module, optimizer)
    return optimizer, (StreamedEngine if case.engine == "streamed" else PlainEngine)(module, optimizer)


class Alone(PlainEngine):
    """Forward and backward whose gradients nobody uses."""

    def step(self) -> None:
        pass


def profile(folder: Path, name: str, out: Path) -> None:
    """Trace one user step and one publisher step of a case; in a process of its own."""
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as torch_profile

    use, update = BilevelOptimizer._use, BilevelOptimizer._update_mask

    def marked(words: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with record_function(words):
                return function(*arguments)

        return run

    BilevelOptimizer._use = marked("mask: use of a gradient", use)  # type: ignore[method-assign]
    BilevelOptimizer._update_mask = marked("mask: update of the logits", update)  # type: ignore[method-assign]
    steps, _ = set_up(CASES[name], make_material(folder))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    by = "self_cuda_time_total" if ON_GPU else "self_cpu_time_total"
    for index, (kind, step) in enumerate(steps):
        if index < 2 * INNER:
            step()
            continue
        with torch_profile(activities=activities) as seen:
            step()
            settle()
        out.mkdir(parents=True, exist_ok=True)
        seen.export_chrome_trace(str(out / f"{kind}.json.gz"))
        print(f"{kind} step, case '{name}'")
        print(seen.key_averages().table(sort_by=by, row_limit=14, max_name_column_width=50), flush=True)
        if kind == "publisher":
            break


def possible(case: Case) -> bool:
    """Whether this machine can tell anything about a case."""
    return (ON_GPU or not case.gpu_only) and (workers.has_deepspeed() or not case.engine.startswith("zero"))


def runner(name: str) -> Callable[..., Any]:
    if CASES[name].engine.startswith("zero"):
        return lambda *arguments, **named: workers.run_world(1, *arguments, on_gpu=ON_GPU, **named)[0]
    return workers.run_alone


def pictures_per_second(row: dict[str, Any]) -> float:
    """Of a round with the paper's L = 10."""
    return SIZES.batch * (PAPER_L + 1) / (PAPER_L * float(row["user_s"]) + float(row["publisher_s"]))


@functools.cache
def start() -> Tensor:
    """Weights that every case starts from: theta(m) for the budget rule's first m, which is p."""
    unet = make_unet()
    after = relearned(unet)
    before = [p + (1 - RATIO) * (after[name] - p) for name, p in unet.named_parameters()]
    return cast(Tensor, learned_state(torch.empty(0), [w.reshape(-1) for w in before])["weights"])


def distance(own: dict[str, Tensor], plain: dict[str, Tensor]) -> dict[str, float]:
    """From the plain float32 path: correlation of the logits, and how far weights are apart beside the way they went.

    A case that had moved nothing would be 1 apart.
    """
    apart = (own["weights"] - plain["weights"]).norm() / (plain["weights"] - start()).norm()
    correlation = torch.corrcoef(torch.stack([own["logits"], plain["logits"]]))[0, 1]
    return {"logits_correlation": float(correlation), "weights_apart": float(apart)}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Means over rounds, ratios to the published arrangement of the same round."""
    rounds = {row["round"]: {each["case"]: each for each in rows if each["round"] == row["round"]} for row in rows}
    unit = "time" if ON_GPU else "CPU time"
    lines = [
        "| case | peak memory | of published | pictures a second, of published | user step | publisher step | "
        "logits | weights |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]

    for name, case in CASES.items():
        own = [cases for cases in rounds.values() if name in cases and case.against in cases]
        if not own:
            continue
        peak = statistics.mean(cases[name]["peak_bytes"] / 2**30 for cases in own)
        memory = statistics.mean(cases[name]["peak_bytes"] / cases[case.against]["peak_bytes"] for cases in own)
        speeds = [pictures_per_second(cases[name]) / pictures_per_second(cases[case.against]) for cases in own]
        user, publisher = (statistics.mean(cases[name][f"{kind}_s"] for cases in own) for kind in ("user", "publisher"))
        known = [cases[name] for cases in own if "weights_apart" in cases[name]]
        logits = f"{min(row['logits_correlation'] for row in known):.3f}" if known else ""
        weights = f"{max(row['weights_apart'] for row in known):.1e}" if known else ""
        lines.append(
            f"| {case.says} | {peak:.2f} GiB | {memory:.2f} | {statistics.mean(speeds):.2f} | {user:.2f} s | "
            f"{publisher:.2f} s | {logits} | {weights} |"
        )
    whole = [cases for cases in rounds.values() if {"alone", "streamed"} <= cases.keys()]
    for kind in ("user", "publisher"):
        if whole:
            share = statistics.mean(1 - cases["alone"][f"{kind}_s"] / cases["streamed"][f"{kind}_s"] for cases in whole)
            lines.append(f"\nstreamed: {share:.1%} of the {unit} of a {kind} step is not forward and backward")
    return "\n".join(lines)


def count_sd21() -> str:
    """What SD 2.1 needs at 512 pixels, batch 16, bf16, by arithmetic: GB of each arrangement at the peak of a step,
    with and without gradient checkpointing. Nothing is run.
    """
    shapes = [measure_denoiser(SD21.unet, int(SD21.unet["sample_size"]), checkpointing=kept) for kept in (False, True)]
    params, largest = shapes[0].num_params, max(shapes[0].sizes)
    with torch.device("meta"):
        encoders = sum(p.numel() for part in (make_vae(SD21), make_text_encoder(SD21)) for p in part.parameters())
    # What stands throughout, theta(m) among it; what autocast makes of the weights; all gradients that are kept.
    arrangements = {
        "the published arrangement": ((4 + 2) * params + 2 * encoders, 2 * params, 4 * params),
        "latents and text cached": ((4 + 4) * params, 2 * params, 4 * params),
        "+ gradients used as they arrive, weights in halves": ((4 + 4) * params, 0, 2 * largest),
        "+ theta_d in bfloat16": ((4 + 2) * params, 0, 2 * largest),
        "theta_d in main memory instead": (4 * params, 0, 2 * largest),
    }
    kept = [2 * SD21.batch * shape.saved_elements for shape in shapes]

    def peak(standing: int, cast: int, gradients: int, activations: int) -> float:
        # As in raygard.cluster.doctor.memory: a backward pass frees activations, and what autocast has made of the
        # weights, while it makes gradients.
        forward = activations + cast
        return standing + max(forward, (forward + gradients) / 2, gradients)

    lines = [
        f"activations: {kept[0] / 1e9:.1f} GB, with gradient checkpointing {kept[1] / 1e9:.1f} GB",
        "",
        "| SD 2.1, 512 px, batch 16, bf16 | peak | of published | checkpointed | of published |",
        "|---|---:|---:|---:|---:|",
    ]
    published = arrangements["the published arrangement"]
    for says, sizes in arrangements.items():
        cells = [f"{peak(*sizes, a) / 1e9:.1f} GB | {peak(*sizes, a) / peak(*published, a):.2f}" for a in kept]
        lines.append(f"| {says} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tables", action="store_true", help="print the table of --out; measure nothing")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="trace one step of each kind instead")
    args = parser.parse_args()
    if args.tables:
        print(markdown(json.loads(args.out.read_text(encoding="utf-8"))["rows"]), count_sd21(), sep="\n\n")
        return
    with tempfile.TemporaryDirectory(prefix="raygard-") as root:
        folder = make_schedule(Path(root))
        if args.profile:
            workers.run_alone(profile, folder, "rounded", args.profile.resolve())
            return
        learned: dict[str, dict[str, Tensor]] = {}
        document = {**workers.machine(), "device": DEVICE, "batch": SIZES.batch, "rows": []}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        for number in range(args.rounds):
            # In this order, because the plain float32 path is what the others are compared with.
            for name in (each for each in CASES if each in args.only and possible(CASES[each])):
                found = workers.measured(runner(name), run_case, folder, name)
                learned[name] = found.pop("learned")
                row = {"round": number, "case": name, **found}
                if "float32" in learned and CASES[name].engine != "alone":
                    row |= distance(learned[name], learned["float32"])
                print(json.dumps(row), flush=True)
                document["rows"].append(row)
                # Each time, because a machine that is lent for minutes may end it at any.
                args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(markdown(document["rows"]), count_sd21(), sep="\n\n")


if __name__ == "__main__":
    main()
