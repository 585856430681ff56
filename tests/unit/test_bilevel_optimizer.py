"""The bilevel optimizer against the equations written out by hand, dense and on flat shards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raygard.bilevel import BilevelOptimizer, ShardLayout
from raygard.bilevel.ops import LARGE, SegmentOps
from raygard.bilevel.rules import RULES, RuleSettings, make_rule
from raygard.bilevel.segments import Segment, assemble

SHAPES = {"a.weight": (7, 5), "a.bias": (7,), "b.weight": (LARGE + 3,), "b.bias": (1,), "c.weight": (4, 3, 3)}
SIZES = {name: int(torch.Size(shape).numel()) for name, shape in SHAPES.items()}
TEMPERATURE, RATIO, LR = 0.2, 0.4, 0.05


def random_state(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}


def settings(rule: str, **changes: object) -> RuleSettings:
    values = {
        "num_tensors": len(SHAPES),
        "freeze_ratio": RATIO,
        "temperature": TEMPERATURE,
        "mask_lr": RULES[rule].default_mask_lr,
        "sparsity_weight": 50.0,
        "weights": None,
        "seed": 3,
    }
    return RuleSettings(**{**values, **changes})


class Reference:
    """Algorithm 1 with theta_pre, theta_ft, theta(m) held apart, in float64, straight from the equations."""

    def __init__(self, rule: str, user_optimizer: str, weight_decay: float) -> None:
        self.pre = {n: t.double() for n, t in random_state(0).items()}
        self.ft = {n: t.double() for n, t in random_state(1).items()}
        self.rule = make_rule(rule, settings(rule))
        self.state = self.rule.initial()
        self.user_optimizer, self.weight_decay, self.t = user_optimizer, weight_decay, 0
        self.first = {n: torch.zeros_like(t) for n, t in self.pre.items()}
        self.second = {n: torch.zeros_like(t) for n, t in self.pre.items()}

    def theta(self) -> dict[str, Tensor]:
        m = self.rule.soft(self.state)
        return {n: m[i] * self.pre[n] + (1 - m[i]) * self.ft[n] for i, n in enumerate(SHAPES)}  # Eq 4

    def user(self, grads: dict[str, Tensor]) -> None:
        self.t += 1
        m = self.rule.soft(self.state)
        for i, n in enumerate(SHAPES):
            g = grads[n].double()
            if self.user_optimizer == "adamw":
                self.first[n] = 0.9 * self.first[n] + 0.1 * g
                self.second[n] = 0.999 * self.second[n] + 0.001 * g * g
                corrected = self.first[n] / (1 - 0.9**self.t)
                g = corrected / ((self.second[n] / (1 - 0.999**self.t)).sqrt() + 1e-8) + self.weight_decay * self.ft[n]
            self.ft[n] = self.ft[n] - LR * (1 - m[i]) * g

    def publisher(self, grads: dict[str, Tensor]) -> Tensor:
        s = torch.stack([(grads[n].double() * (self.pre[n] - self.ft[n])).sum() for n in SHAPES])
        self.rule.update(self.state, s)
        return s


def build(layouts: list[ShardLayout], lengths: list[list[int]], rule: str, user_optimizer: str, decay: float):
    """One optimizer for each simulated rank; reductions go through a shared list."""
    optimizers = []
    for layout, shard_lengths in zip(layouts, lengths, strict=True):
        shards = [torch.nn.Parameter(torch.full((length,), float("nan"))) for length in shard_lengths]
        optimizer = BilevelOptimizer(
            shards,
            rule=make_rule(rule, settings(rule)),
            user_optimizer=user_optimizer,
            lr=LR,
            weight_decay=decay,
        )
        optimizer.bind(shards, layout, random_state(0), random_state(1))
        optimizers.append(optimizer)
    return optimizers


def layouts_for(kind: str, world_size: int) -> tuple[list[ShardLayout], list[list[int]]]:
    if kind == "dense":
        return [ShardLayout.dense(SIZES)], [list(SIZES.values())]
    total = sum(SIZES.values())
    if kind == "slice":
        offsets = [sum(list(SIZES.values())[:i]) for i in range(len(SIZES))]
        length = -(-(total + 5) // world_size)
        layouts = [ShardLayout.flat_slice(SIZES, offsets, rank * length, length) for rank in range(world_size)]
        return layouts, [[length]] * world_size
    parts = [-(-size // world_size) for size in SIZES.values()]
    layouts = [ShardLayout.partitioned(SIZES, parts, rank) for rank in range(world_size)]
    return layouts, [[sum(parts)]] * world_size


def run_world(kind: str, world_size: int, rule: str, user_optimizer: str, decay: float, steps: int = 12):
    layouts, lengths = layouts_for(kind, world_size)
    optimizers = build(layouts, lengths, rule, user_optimizer, decay)
    reference = Reference(rule, user_optimizer, decay)
    for step in range(steps):
        grads = random_state(100 + step, 0.1)
        kind_of_step = "publisher" if step % 4 == 3 else "user"
        for optimizer in optimizers:
            optimizer.kind = kind_of_step
            for shard in optimizer.shards():
                shard.grad = torch.full_like(shard, float("nan"))
            optimizer.layout.scatter(grads, [shard.grad for shard in optimizer.shards()])
        if kind_of_step == "publisher":
            expected = reference.publisher(grads)
            # Every rank's part is summed by hand: what the all-reduce does between processes.
            parts = [local_signal(optimizer) for optimizer in optimizers]
            torch.testing.assert_close(torch.stack(parts).sum(0), expected, rtol=1e-4, atol=1e-4)
            total = torch.stack(parts).sum(0)
            for optimizer in optimizers:
                optimizer._reduce = lambda values, total=total: values.copy_(total)
                optimizer._layout = ShardLayout(
                    *[getattr(optimizer.layout, f) for f in ("names", "sizes", "shards")], False
                )
        else:
            reference.user(grads)
        for optimizer in optimizers:
            optimizer.step()
    return optimizers, reference


def local_signal(optimizer: BilevelOptimizer) -> Tensor:
    signal = torch.zeros(len(SHAPES), dtype=torch.float64)
    for shard, theta_d in zip(optimizer.shards(), optimizer.theta_d(), strict=True):
        ops = optimizer._ops[shard]
        ops.zero_padding(shard.grad)
        signal += ops.inner(shard.grad, theta_d)
    return signal


@pytest.mark.parametrize(("user_optimizer", "decay"), [("sgd", 0.0), ("adamw", 0.0), ("adamw", 0.1)])
@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize(("kind", "world_size"), [("dense", 1), ("slice", 1), ("slice", 3), ("part", 2), ("part", 4)])
def test_equals_equations(kind: str, world_size: int, rule: str, user_optimizer: str, decay: float) -> None:
    optimizers, reference = run_world(kind, world_size, rule, user_optimizer, decay)
    theta = assemble([o.layout.pieces(o.shards()) for o in optimizers], SHAPES)
    for name, expected in reference.theta().items():
        torch.testing.assert_close(theta[name].double(), expected, rtol=2e-4, atol=2e-5)
    for optimizer in optimizers:
        torch.testing.assert_close(optimizer.logits, reference.state["logits"], rtol=1e-4, atol=1e-4)
        assert torch.equal(optimizer.logits, optimizers[0].logits)
        assert optimizer.invariant_error(random_state(0)) < 1e-5


def test_relearning_is_plain_adamw_that_tracks_theta_d() -> None:
    pre = random_state(0)
    model = [torch.nn.Parameter(t.clone()) for t in pre.values()]
    twin = [torch.nn.Parameter(t.clone()) for t in pre.values()]
    optimizer = BilevelOptimizer(model, rule=None, lr=LR, weight_decay=0.01)
    optimizer.bind(model, ShardLayout.dense(SIZES), pre, pre)
    plain = torch.optim.AdamW(twin, lr=LR, weight_decay=0.01)
    for step in range(5):
        for parameter, other, grad in zip(model, twin, random_state(step, 0.1).values(), strict=True):
            parameter.grad, other.grad = grad.clone(), grad.clone()
        optimizer.step()
        plain.step()
    for parameter, other, theta_d, start in zip(model, twin, optimizer.theta_d(), pre.values(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(theta_d.view_as(start), start - parameter, rtol=1e-4, atol=1e-5)


def test_state_dict_resumes_bitwise() -> None:
    straight, _ = run_world("slice", 1, "budget", "adamw", 0.1, steps=12)
    half, _ = run_world("slice", 1, "budget", "adamw", 0.1, steps=8)
    layouts, lengths = layouts_for("slice", 1)
    fresh = build(layouts, lengths, "budget", "adamw", 0.1)[0]
    fresh.load_state_dict(half[0].state_dict())
    with torch.no_grad():
        fresh.shards()[0].copy_(half[0].shards()[0])
    for step in range(8, 12):
        fresh.kind = "publisher" if step % 4 == 3 else "user"
        fresh.shards()[0].grad = torch.zeros_like(fresh.shards()[0])
        fresh.layout.scatter(random_state(100 + step, 0.1), [fresh.shards()[0].grad])
        fresh.step()
    assert torch.equal(fresh.logits, straight[0].logits)
    assert torch.equal(fresh.theta_d()[0], straight[0].theta_d()[0])


def test_clipping_acts_on_user_steps_only() -> None:
    def run(kind: str, limit: float) -> BilevelOptimizer:
        optimizer = build(*layouts_for("dense", 1), "budget", "sgd", 0.0)[0]
        optimizer.max_grad_norm = limit
        for shard, grad in zip(optimizer.shards(), random_state(9).values(), strict=True):
            shard.grad = grad.reshape(-1).clone()
        optimizer.kind = kind
        optimizer.step()
        return optimizer

    assert torch.equal(run("publisher", 1e-3).logits, run("publisher", 0.0).logits)
    before = random_state(0)["a.bias"] - random_state(1)["a.bias"]
    moved = [run("user", limit).theta_d()[1] - before for limit in (0.0, 1.0)]
    norm = torch.cat([g.reshape(-1) for g in random_state(9).values()]).norm()
    torch.testing.assert_close(moved[1] * norm, moved[0], rtol=1e-3, atol=1e-4)


def test_inner_products_of_long_segments_are_exact_to_float32() -> None:
    size = 3_000_001
    ops = SegmentOps([Segment(0, 0, 0, size)], 1, size, torch.device("cpu"))
    rng = torch.Generator().manual_seed(0)
    left, right = torch.rand(size, generator=rng), torch.rand(size, generator=rng)
    exact = left.double() @ right.double()
    assert abs(float(ops.inner(left, right)[0] - exact)) / float(exact) < 2e-7


def test_assemble_refuses_a_gap() -> None:
    layouts, lengths = layouts_for("part", 2)
    shards = [[torch.zeros(n) for n in row] for row in lengths]
    with pytest.raises(ValueError, match=r"a\.weight"):
        assemble([layouts[0].pieces(shards[0])], SHAPES)
