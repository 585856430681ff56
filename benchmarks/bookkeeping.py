"""Cost of the mask: what user and publisher steps do beyond forward and backward.

    python benchmarks/bookkeeping.py [--out benchmarks/results/bookkeeping.json]

Two models: the bundled one, and 686 tensors with the sizes of SD 2.1's UNet (true sizes on a GPU; divided by
--scale on a CPU). Two ways of the same arithmetic (SGD user step, Eq 9 and 10; publisher step, Eq 8 and 12), both in
this run, checked to agree: raygard's flat shard, and a Python loop over tensors with per-tensor updates and
synchronisation, as the published code does. Beside them the time of a step's forward and backward (bundled model),
and of copying the same bytes once: where the flat version is close to that, memory bandwidth sets the limit.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raygard.bilevel import BilevelOptimizer, ShardLayout
from raygard.bilevel.rules import RuleSettings, make_rule

LR, TEMPERATURE, RATIO = 1e-4, 0.2, 0.3


def timed(run: Callable[[], Any], repeats: int, device: str) -> float:
    """Median seconds of `run`."""
    times = []
    for _ in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def flat_version(sizes: list[int], pre: Tensor, ft: Tensor, device: str) -> tuple[BilevelOptimizer, torch.nn.Parameter]:
    """raygard's optimizer on one flat shard, as under ZeRO-1/2 with one process."""
    names = {f"t{i}": size for i, size in enumerate(sizes)}
    offsets = torch.tensor([0, *sizes]).cumsum(0)[:-1].tolist()
    layout = ShardLayout.flat_slice(names, offsets, 0, sum(sizes))
    shard = torch.nn.Parameter(torch.empty(sum(sizes), device=device))
    rule = make_rule("budget", RuleSettings(len(sizes), RATIO, TEMPERATURE, 0.05, 0.0, None, 0))
    optimizer = BilevelOptimizer([shard], rule=rule, user_optimizer="sgd", lr=LR)
    split = {name: dict(zip(names, flat.split(sizes), strict=True)) for name, flat in (("pre", pre), ("ft", ft))}
    optimizer.bind([shard], layout, split["pre"], split["ft"])
    return optimizer, shard


class LoopVersion:
    """The same arithmetic as a loop over named tensors: temporaries, sigmoid and synchronisation for each."""

    def __init__(self, sizes: list[int], pre: Tensor, ft: Tensor) -> None:
        self.rule = make_rule("budget", RuleSettings(len(sizes), RATIO, TEMPERATURE, 0.05, 0.0, None, 0))
        self.state = self.rule.initial()
        m = self.rule.soft(self.state).float()
        self.theta_d = {
            i: (a - b).clone() for i, (a, b) in enumerate(zip(pre.split(sizes), ft.split(sizes), strict=True))
        }
        self.theta = {i: (a - (1 - m[i].to(a)) * self.theta_d[i]).clone() for i, a in enumerate(pre.split(sizes))}

    def user(self, grads: list[Tensor]) -> None:
        for i in self.theta:
            m = torch.sigmoid(self.state["logits"][i].to(grads[i].device) / TEMPERATURE).float()
            self.theta_d[i] = self.theta_d[i] + LR * grads[i] * (1 - m)
            self.theta[i] = self.theta[i] - LR * grads[i] * (1 - m) ** 2

    def publisher(self, grads: list[Tensor]) -> None:
        signal = torch.empty(len(grads), dtype=torch.float64)
        for i in self.theta:
            signal[i] = (grads[i] * self.theta_d[i]).sum().item()
        before = self.rule.soft(self.state)
        self.rule.update(self.state, signal)
        after = self.rule.soft(self.state)
        for i in self.theta:
            self.theta[i] = self.theta[i] + self.theta_d[i] * (after[i] - before[i]).item()


def compare(name: str, sizes: list[int], repeats: int, device: str) -> dict[str, Any]:
    """Time both versions of both steps on tensors of the given sizes; check that they agree."""
    rng = torch.Generator().manual_seed(0)
    total = sum(sizes)
    pre, ft, grad = (scale * torch.randn(total, generator=rng) for scale in (0.02, 0.02, 1e-3))
    pre, ft, grad = pre.to(device), ft.to(device), grad.to(device)
    optimizer, shard = flat_version(sizes, pre, ft, device)
    loop = LoopVersion(sizes, pre, ft)
    shard.grad = grad.clone()
    pieces = list(grad.split(sizes))

    def flat_step(kind: Any) -> Callable[[], None]:
        def run() -> None:
            optimizer.kind = kind
            optimizer.step()

        return run

    for kind in ("user", "user", "publisher", "user"):
        flat_step(kind)()
        (loop.user if kind == "user" else loop.publisher)(pieces)
    gap = float((torch.cat(list(loop.theta.values())) - shard.detach()).abs().max())
    assert gap < 1e-5, f"the two versions disagree by {gap}"
    source, target = torch.empty_like(grad), torch.empty_like(grad)
    copy_bytes = 2 * grad.numel() * grad.element_size()
    bandwidth = copy_bytes / timed(lambda: target.copy_(source), repeats, device)
    # Least traffic: a user step reads g, theta_d, theta and writes two of them; a publisher step reads g, theta_d,
    # then theta_d and theta, and writes theta.
    least = {"user": 5 * 4 * total / bandwidth, "publisher": 5 * 4 * total / bandwidth}
    result: dict[str, Any] = {"model": name, "num_tensors": len(sizes), "num_params": total, "max_gap": gap}
    for kind, looped in (("user", loop.user), ("publisher", loop.publisher)):
        flat_s = timed(flat_step(kind), repeats, device)
        loop_s = timed(functools.partial(looped, pieces), repeats, device)
        result[kind] = {
            "flat_ms": 1e3 * flat_s,
            "loop_ms": 1e3 * loop_s,
            "times_faster": loop_s / flat_s,
            "bandwidth_limit_ms": 1e3 * least[kind],
            "share_of_bandwidth": least[kind] / flat_s,
        }
    return result


def step_seconds(repeats: int, batch: int) -> float:
    """Forward and backward of the bundled model, one worker's half of the demo's batch."""
    from raygard.config import ModelConfig
    from raygard.diffusion.model import load_denoiser

    unet = load_denoiser(ModelConfig()).train()
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    latents = torch.randn(batch, unet.config.in_channels, size, size)
    text, timesteps = torch.randn(batch, 24, width), torch.randint(0, 1000, (batch,))

    def run() -> None:
        unet(latents, timesteps, text).sample.square().mean().backward()
        unet.zero_grad()

    return timed(run, repeats, "cpu")


def sd21_sizes(scale: int) -> list[int]:
    """Tensor sizes of SD 2.1's UNet, in order, each divided by `scale` (at least 1)."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=96,
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        )
    return [max(1, parameter.numel() // scale) for parameter in unet.parameters()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--scale", type=int, default=None, help="divides SD 2.1's sizes; default 1 on a GPU, 16 on a CPU"
    )
    parser.add_argument("--batch", type=int, default=8, help="pictures per worker and step, bundled model")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scale = args.scale or (1 if device == "cuda" else 16)

    from raygard.config import ModelConfig
    from raygard.diffusion.model import load_denoiser

    bundled = [parameter.numel() for parameter in load_denoiser(ModelConfig()).parameters()]
    step = step_seconds(args.repeats, args.batch)
    results = [
        compare("bundled", bundled, args.repeats, device),
        compare(f"SD 2.1 sizes / {scale}", sd21_sizes(scale), args.repeats, device),
    ]
    print(f"{platform.processor() or platform.machine()}, {device}, torch {torch.__version__}, 1 thread")
    print(f"bundled model, forward + backward, batch {args.batch}: {1e3 * step:.1f} ms\n")
    print(f"{'model':22} {'step':10} {'flat ms':>9} {'loop ms':>9} {'faster':>7} {'copy limit ms':>14} {'of limit':>9}")
    for result in results:
        for kind in ("user", "publisher"):
            row = result[kind]
            print(
                f"{result['model']:22} {kind:10} {row['flat_ms']:9.3f} {row['loop_ms']:9.3f} "
                f"{row['times_faster']:6.1f}x {row['bandwidth_limit_ms']:14.3f} {row['share_of_bandwidth']:8.0%}"
            )
    for kind in ("user", "publisher"):
        share = results[0][kind]["flat_ms"] / 1e3 / (step + results[0][kind]["flat_ms"] / 1e3)
        results[0][kind]["share_of_step"] = share
        print(f"bundled model: {kind} bookkeeping is {share:.1%} of a {kind} step")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "device": device,
            "torch": torch.__version__,
            "forward_backward_s": step,
            "results": results,
        }
        args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
