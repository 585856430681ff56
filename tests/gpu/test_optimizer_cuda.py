"""The flat-shard optimizer on a CUDA device gives what it gives on the CPU."""

from __future__ import annotations

import pytest
import torch

from raygard.bilevel import BilevelOptimizer, ShardLayout
from raygard.bilevel.ops import round_at_random
from raygard.bilevel.rules import RuleSettings, make_rule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = {"a": 7, "b": 50_000, "c": 1, "d": 300_001, "e": 33}


def run(device: str, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    total = sum(SIZES.values())
    offsets = [sum(list(SIZES.values())[:i]) for i in range(len(SIZES))]
    shard = torch.nn.Parameter(torch.empty(total, device=device))
    rule = make_rule("budget", RuleSettings(len(SIZES), 0.4, 0.2, 0.05, 0.0, None, 0))
    optimizer = BilevelOptimizer([shard], rule=rule, lr=1e-2, **options)
    rng = torch.Generator().manual_seed(0)
    pre, ft = ({n: torch.randn(size, generator=rng) for n, size in SIZES.items()} for _ in range(2))
    optimizer.bind([shard], ShardLayout.flat_slice(SIZES, offsets, 0, total), pre, ft)
    for step in range(12):
        optimizer.kind = "publisher" if step % 4 == 3 else "user"
        shard.grad = torch.randn(total, generator=rng).to(device)
        optimizer.step()
    return optimizer.logits, shard.detach().cpu()


def test_cuda_equals_cpu() -> None:
    on_cpu, on_cuda = run("cpu"), run("cuda")
    torch.testing.assert_close(on_cuda[0], on_cpu[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(on_cuda[1], on_cpu[1], rtol=1e-4, atol=1e-4)


def test_theta_d_in_pinned_memory_equals_theta_d_on_the_device() -> None:
    for one, other in zip(run("cuda", theta_d_on_host=True), run("cuda"), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_rounded_theta_d_follows_on_cuda() -> None:
    logits, weights = run("cuda", theta_d_dtype=torch.bfloat16)
    plain = run("cuda")
    torch.testing.assert_close(logits, plain[0], rtol=0, atol=0.005)
    assert (weights - plain[1]).norm() < 0.01 * plain[1].norm()


def test_rounded_theta_d_in_pinned_memory_equals_that_on_the_device() -> None:
    rounded = {"theta_d_dtype": torch.bfloat16}
    for one, other in zip(run("cuda", theta_d_on_host=True, **rounded), run("cuda", **rounded), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_rounding_at_random_is_right_on_average_on_cuda() -> None:
    value, count = 1 + 2**-9, 1 << 20  # a quarter of the way between two neighbours
    rng = torch.Generator("cuda").manual_seed(0)
    many = round_at_random(torch.full((count,), value, device="cuda"), rng).double()
    assert many.unique().tolist() == [1, 1 + 2**-7]
    # Five standard errors of a coin that falls so once in four times.
    assert abs(float(many.mean()) - value) < 5 * 2**-7 * (0.25 * 0.75 / count) ** 0.5
