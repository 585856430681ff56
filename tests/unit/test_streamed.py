"""Gradients used as they arrive, and theta_d kept in another form, against the plain path on the bundled model."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from raygard.bilevel import BilevelOptimizer, ShardLayout
from raygard.bilevel.alternation import DenoiserLoss, PlainEngine, Schedule, StepRecord, alternate
from raygard.bilevel.batches import BatchSource
from raygard.bilevel.halves import join, split
from raygard.bilevel.ops import round_at_random
from raygard.bilevel.rules import RuleSettings, make_rule
from raygard.bilevel.streamed import StreamedEngine
from raygard.cluster.engine import initialize
from raygard.cluster.worker import prepare
from raygard.config import EngineConfig, ModelConfig
from raygard.diffusion.model import load_denoiser, load_loss
from tests.latents import latent_set

ROUNDS, INNER, BATCH = 3, 2, 4


class Run:
    """Mask learning on a small model; `options` are the optimizer's."""

    def __init__(
        self,
        model: ModelConfig,
        engine: type = PlainEngine,
        *,
        user: str = "adamw",
        autocast: torch.dtype | None = None,
        checkpointing: bool = False,
        memory_format: torch.memory_format = torch.contiguous_format,
        clip: float = 0.0,
        half: bool = False,
        **options: object,
    ) -> None:
        denoiser = load_denoiser(model).train()
        if checkpointing:
            denoiser.enable_gradient_checkpointing()
        self.parameters = dict(denoiser.named_parameters())
        self.pre = {name: p.detach().clone() for name, p in self.parameters.items()}
        rng = torch.Generator().manual_seed(1)
        relearned = {name: p + 1e-2 * torch.randn(p.shape, generator=rng) for name, p in self.pre.items()}
        if half:
            torch.nn.Module.to(denoiser, torch.bfloat16)
        rule = make_rule("budget", RuleSettings(len(self.pre), 0.3, 0.2, 0.05, 0.0, None, 0))
        shards = list(self.parameters.values())
        self.optimizer = BilevelOptimizer(
            shards, rule=rule, user_optimizer=user, lr=1e-4, max_grad_norm=clip, **options
        )
        layout = ShardLayout.dense({name: p.numel() for name, p in self.parameters.items()})
        self.optimizer.bind(shards, layout, self.pre, relearned)
        self.engine = engine(DenoiserLoss(denoiser, load_loss(model), autocast, memory_format), self.optimizer)
        data, roles = latent_set(8), ([torch.arange(4)], [torch.arange(4, 8)])
        self.sources = [BatchSource(data, *roles, BATCH, 0, stream) for stream in ("lower", "upper")]

    def go(self, last: int = ROUNDS, first: int = 0) -> list[StepRecord]:
        schedule = Schedule(INNER, last)
        return list(alternate(self.engine, self.optimizer, *self.sources, schedule, first_k=first))

    def theta(self) -> Tensor:
        return torch.cat(self.optimizer.theta())


@pytest.mark.parametrize("user", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "how", [{}, {"autocast": torch.bfloat16}, {"checkpointing": True}, {"theta_d_dtype": torch.bfloat16}], ids=str
)
def test_streamed_equals_plain_bit_for_bit(tiny_model, user: str, how: dict) -> None:
    plain, streamed = (Run(tiny_model, engine, user=user, **how) for engine in (PlainEngine, StreamedEngine))
    assert plain.go() == streamed.go()
    assert torch.equal(plain.theta(), streamed.theta())
    assert torch.equal(plain.optimizer.logits, streamed.optimizer.logits)
    for one, other in zip(plain.optimizer.theta_d(), streamed.optimizer.theta_d(), strict=True):
        assert torch.equal(one, other)


def test_streamed_keeps_no_gradient(tiny_model, monkeypatch) -> None:
    held = []
    consume = BilevelOptimizer.consume

    def watched(optimizer: BilevelOptimizer, shard: Tensor) -> None:
        held.append(sum(each.grad is not None for each in optimizer.shards()))
        consume(optimizer, shard)

    monkeypatch.setattr(BilevelOptimizer, "consume", watched)
    run = Run(tiny_model, StreamedEngine)
    run.go(1)
    assert held == [1] * len(run.parameters) * (INNER + 1)


def test_streamed_refuses_clipping(tiny_model) -> None:
    with pytest.raises(ValueError, match="clipping"):
        Run(tiny_model, StreamedEngine, clip=1.0)


def test_a_tensor_without_gradient_is_an_error(tiny_model) -> None:
    run = Run(tiny_model, StreamedEngine)
    next(iter(run.parameters.values())).requires_grad_(False)
    with pytest.raises(ValueError, match="shards have had gradients"):
        run.go(1)


def test_theta_d_in_main_memory_changes_nothing(tiny_model) -> None:
    plain, host = Run(tiny_model), Run(tiny_model, theta_d_on_host=True)
    assert plain.go() == host.go()
    assert torch.equal(plain.theta(), host.theta())


def test_channels_last_follows_the_plain_run(tiny_model) -> None:
    plain, other = Run(tiny_model), Run(tiny_model, memory_format=torch.channels_last)
    plain.go()
    other.go()
    torch.testing.assert_close(other.theta(), plain.theta(), rtol=0, atol=1e-4)
    torch.testing.assert_close(other.optimizer.logits, plain.optimizer.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("user", ["sgd", "adamw"])
def test_rounded_theta_d_follows_the_plain_run(tiny_model, user: str) -> None:
    plain, rounded = Run(tiny_model, user=user), Run(tiny_model, user=user, theta_d_dtype=torch.bfloat16)
    plain.go()
    rounded.go()
    assert all(d.dtype == torch.bfloat16 for d in rounded.optimizer.theta_d())
    # theta_d is near 1e-2, where bfloat16's neighbours are 6e-5 apart.
    assert rounded.optimizer.invariant_error(rounded.pre) < 1e-3
    moved = torch.cat([p.reshape(-1) for p in plain.pre.values()]) - plain.theta()
    assert (rounded.theta() - plain.theta()).norm() < 0.05 * moved.norm()
    both = torch.stack([rounded.optimizer.logits, plain.optimizer.logits])
    assert torch.corrcoef(both)[0, 1] > 0.99


@pytest.mark.parametrize("engine", [PlainEngine, StreamedEngine])
@pytest.mark.parametrize("how", [{"theta_d_dtype": torch.bfloat16}, {"half": True}], ids=str)
def test_resumes_bit_for_bit(tiny_model, engine: type, how: dict) -> None:
    straight = Run(tiny_model, engine, **how)
    straight.go()
    half = Run(tiny_model, engine, **how)
    half.go(2)
    state = {
        kind: [t.detach().float().view(-1) for t in shards] for kind, shards in half.optimizer.sharded_state().items()
    }
    again = Run(tiny_model, engine, **how)
    again.optimizer.restore(state, half.optimizer.shared_state())
    again.go(first=2)
    assert torch.equal(again.theta(), straight.theta())
    for one, other in zip(again.optimizer.theta_d(), straight.optimizer.theta_d(), strict=True):
        assert torch.equal(one, other)


class Masters:
    """Float32 masters beside a bfloat16 denoiser, which is given their nearest values before every step."""

    def __init__(self, half: Run, plain: Run) -> None:
        self.half, self.plain = half, plain

    def __call__(self, *batch: object) -> Tensor:
        for working, master in zip(self.half.parameters.values(), self.plain.parameters.values(), strict=True):
            working.data = split(master.detach())[0].contiguous().view(master.shape)
        return self.half.engine.module(*batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        for working, master in zip(self.half.parameters.values(), self.plain.parameters.values(), strict=True):
            master.grad, working.grad = working.grad.float(), None
        self.plain.optimizer.step()


@pytest.mark.parametrize("user", ["sgd", "adamw"])
def test_a_bfloat16_denoiser_learns_as_with_float32_masters_bit_for_bit(tiny_model, user: str) -> None:
    half = Run(tiny_model, StreamedEngine, half=True, user=user)
    plain, working = Run(tiny_model, user=user), Run(tiny_model, half=True, user=user)
    plain.engine = Masters(working, plain)
    assert half.go() == plain.go()
    assert torch.equal(half.theta(), plain.theta())
    assert torch.equal(half.optimizer.logits, plain.optimizer.logits)
    assert half.optimizer.invariant_error(half.pre) < 1e-5
    assert {p.dtype for p in half.parameters.values()} == {torch.bfloat16}


def test_halves_hold_every_bit() -> None:
    rng = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 20,), generator=rng, dtype=torch.int64).to(torch.int32)
    values = torch.cat([bits.view(torch.float32), torch.tensor([0.0, -0.0, 1.0, -1e-45, 1e-39, 3e38])])
    values = values[values.abs() < 3.3e38]
    high, low = split(values)
    assert torch.equal(join(high, low).view(torch.int32), values.view(torch.int32))
    distance = (high.double() - values.double()).abs()
    assert (distance <= (values.bfloat16().double() - values.double()).abs()).all(), "the nearest"


def test_rounding_at_random_is_right_on_average() -> None:
    values = torch.tensor([1.0, 1 + 2**-9, -1 - 2**-10, 3e-5, -7.7e3])
    rng = torch.Generator().manual_seed(0)
    many = round_at_random(values.repeat(20_000, 1), rng).double()
    below, above = many.min(0).values, many.max(0).values
    spread = (above - below).clamp(min=1e-30)
    assert torch.equal(many[:, 0].unique(), torch.ones(1, dtype=torch.float64)), "what fits is kept"
    assert (spread / values.abs() < 2**-7 + 1e-9).all(), "neighbours only"
    # Five standard errors of a coin with two faces.
    assert ((many.mean(0) - values.double()).abs() <= 5 * spread / 2 / 20_000**0.5 + 1e-12).all()


def test_small_steps_add_up_in_bfloat16() -> None:
    kept = torch.full((4096,), 1e-2, dtype=torch.bfloat16)
    rng = torch.Generator().manual_seed(0)
    start = kept.double().mean()
    for _ in range(100):
        kept = round_at_random(kept.float() + 1e-6, rng)
    assert kept.double().mean() - start == pytest.approx(1e-4, rel=0.1)
    nearest = torch.full((4096,), 1e-2, dtype=torch.bfloat16).add_(1e-6)
    assert nearest.double().mean() == start, "rounding to the nearest loses them"


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_follow_the_plain_run(tiny_model, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plain, compiled = Run(tiny_model), Run(tiny_model)
    prepare(compiled.engine.module.denoiser, EngineConfig(compile=True))
    assert any(module._compiled_call_impl is not None for module in compiled.engine.module.modules())
    plain.go(1)
    compiled.go(1)
    torch.testing.assert_close(compiled.theta(), plain.theta(), rtol=0, atol=1e-4)
    torch.testing.assert_close(compiled.optimizer.logits, plain.optimizer.logits, rtol=0, atol=1e-4)


def test_stages_that_stream_nothing_keep_their_precision(tiny_model, monkeypatch) -> None:
    import deepspeed

    monkeypatch.setattr(deepspeed, "initialize", lambda **named: (named["model"],))
    module = DenoiserLoss(load_denoiser(tiny_model), load_loss(tiny_model))
    engine = EngineConfig(zero_stage=0, stream_gradients=True, mixed_precision="bf16", channels_last=True)
    initialize(module, torch.optim.SGD(module.parameters(), 1.0), engine, {})
    assert (module.autocast, module.memory_format) == (torch.bfloat16, torch.channels_last)
