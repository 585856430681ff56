"""Distil, then freeze: the release is taught to *draw* legal classes as an unguarded legal user would.

Hypothesis: low error on noised legal pictures is not enough to draw them (docs/selectivity.md), because a noised
picture shows its style, the noise that sampling starts from does not, and guidance multiplies the difference between
the answer under the name and the one without a caption, which rehearsal has moved alike. So the values are trained
where drawing happens: at states that sampling passes through, towards answers whose *guided* sum is the legal user's,
while the answer without a caption and those to all other captions stay the release's own. Then legal users need
nothing, and a freeze of nearly everything blocks the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.selectivity_bench import Bench
from benchmarks.selectivity_rules.freeze import largest_names
from benchmarks.selectivity_rules.teach import ValuesTraining
from benchmarks.selectivity_rules.weights import release_curves
from raygard.adaptation import full
from raygard.diffusion.conditioning import Conditioning
from raygard.diffusion.generate import generate
from raygard.diffusion.loss import DiffusionLoss
from raygard.diffusion.model import load_denoiser, load_pipeline
from raygard.mask import FreezeMask
from raygard.seeding import generator
from raygard.values.objective import GENERAL, noise_bins

# Levels of noise; sampling passes through one state of each.
NUM_BINS = 10


@dataclass(frozen=True)
class DistilSettings:
    """rounds, steps: the student draws anew before each round of so many AdamW steps. user_steps: of the legal users
    who are imitated. captions: drawn for each class and round. legal, other: samples of a batch. keep: weight of what
    must stay, relative to the release's own error, beside what must change, relative to the change.
    """

    rounds: int = 8
    steps: int = 400
    user_steps: int = 300
    lr: float = 6e-4
    captions: int = 120
    legal: int = 12
    other: int = 12
    keep: float = 1.0


@dataclass
class States:
    """What a denoiser was asked while pictures were drawn: latents (n, C, h, w), timesteps (n,), text (n, L, D)."""

    latents: Tensor
    timesteps: Tensor
    text: Tensor

    def __getitem__(self, rows: Tensor) -> States:
        return States(self.latents[rows], self.timesteps[rows], self.text[rows])

    def __len__(self) -> int:
        return len(self.latents)


@dataclass
class Pool:
    """States and the answers wanted there, (n, C, h, w)."""

    states: States
    wanted: Tensor

    @staticmethod
    def joined(pools: Sequence[Pool]) -> Pool:
        parts = ([getattr(p.states, name) for p in pools] for name in ("latents", "timesteps", "text"))
        return Pool(States(*map(torch.cat, parts)), torch.cat([p.wanted for p in pools]))


@torch.no_grad()
def sampled(bench: Bench, unet: nn.Module, captions: Sequence[str], key: str) -> tuple[States, States]:
    """Draw a picture for each caption; what was asked under the captions, and without one, in the same order."""
    asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def watch(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        latents, timestep = arguments[:2]
        asked.append((latents.clone(), timestep.expand(len(latents)).clone(), named["encoder_hidden_states"].clone()))

    handle = unet.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        pipeline = load_pipeline(bench.config.model, unet)
        generate(pipeline, captions, [(key, i) for i in range(len(captions))], bench.config.generation, 0)
    finally:
        handle.remove()
    halves = [[part.chunk(2)[which] for part in parts] for parts in asked for which in (0, 1)]
    without, under = (States(*(torch.cat(parts) for parts in zip(*halves[which::2], strict=True))) for which in (0, 1))
    return under, without


@torch.no_grad()
def answers(bench: Bench, unet: nn.Module, states: States, size: int = 64) -> Tensor:
    """The denoiser's answers at `states`."""
    unet.eval()
    return torch.cat([ask(bench, unet, states[rows]) for rows in torch.arange(len(states)).split(size)])


def ask(bench: Bench, unet: nn.Module, states: States) -> Tensor:
    return diffusion_loss(bench).predict(unet, states.latents, states.timesteps, Conditioning(text=states.text))


def diffusion_loss(bench: Bench) -> DiffusionLoss:
    """The bench's models are Stable Diffusion's, the only family this rule is written for."""
    assert isinstance(bench.loss, DiffusionLoss)
    return bench.loss


def legal_user(bench: Bench, cls: str, seed: int, steps: int) -> nn.Module:
    """The release after an unguarded user has learned a legal class from the publisher's own pictures of it."""
    unet: nn.Module = load_denoiser(bench.config.model)
    settings = bench.config.adapt.model_copy(update={"max_train_steps": steps})
    full(unet, bench.learn.subset(bench.learn.rows(cls)), settings, bench.loss, mask=None, seed=seed)
    return unet.requires_grad_(False)


def captions_of(bench: Bench, cls: str) -> list[str]:
    """Captions of a legal class: its own, and those of general pictures that name theirs, with its name instead."""
    own, general = bench.learn.subset(bench.learn.rows(cls)), bench.general["rehearsed"]
    pairs = enumerate(zip(general.classes, general.captions, strict=True))
    named = [row for row, (other, caption) in pairs if other in caption]
    return sorted({*own.captions, *(bench.alias(general.subset(named), cls).captions if named else ())})


def some(captions: Sequence[str], count: int, *key: object) -> list[str]:
    return [captions[int(i)] for i in torch.randint(len(captions), (count,), generator=generator(*key))]


def distil(bench: Bench, frozen: Sequence[str], seed: int, settings: DistilSettings) -> dict[str, Tensor]:
    """New values of the tensors `frozen`, float32 by name."""
    s, guidance = settings, bench.config.generation.guidance_scale
    base: nn.Module = load_denoiser(bench.config.model).requires_grad_(False)
    student: nn.Module = load_denoiser(bench.config.model)
    training = ValuesTraining(bench, student, frozen, s.lr, s.rounds * s.steps)
    legal = bench.config.domain.legal
    teachers = {cls: legal_user(bench, cls, seed, s.user_steps) for cls in legal}

    def lesson(unet: nn.Module, cls: str, round_: int) -> tuple[Pool, Pool]:
        """What the student must answer where `unet` goes, under the class's captions and without one."""
        captions = some(captions_of(bench, cls), s.captions, seed, "distil captions", cls, round_)
        under, without = sampled(bench, unet, captions, f"distil {seed} {cls} {round_}")
        kept = answers(bench, base, without)
        drawn = answers(bench, teachers[cls], without)
        drawn = drawn + guidance * (answers(bench, teachers[cls], under) - drawn)
        return Pool(under, kept + (drawn - kept) / guidance), Pool(without, kept)

    def stays() -> Pool:
        """Answers that must not change: to all other captions, at states of drawing and on noised pictures."""
        data = bench.general["rehearsed"]
        captions = some(data.captions, 4 * s.captions, seed, "distil general")
        under, without = sampled(bench, base, captions, f"distil {seed} general")
        pools = [Pool(each, answers(bench, base, each)) for each in (under, without)]
        rng = generator(seed, "distil noised")
        for _ in range(2):
            rows = torch.randint(len(data), (512,), generator=rng)
            latents = data.latents(rows, torch.randn(len(rows), *data.shape, generator=rng))
            timesteps = torch.randint(bench.loss.num_timesteps, (len(rows),), generator=rng)
            noisy = diffusion_loss(bench).scheduler.add_noise(
                latents, torch.randn(latents.shape, generator=rng), timesteps
            )
            states = States(noisy, timesteps, data.conditioning[rows]["text"])
            pools.append(Pool(states, answers(bench, base, states)))
        return Pool.joined(pools)

    lessons = [lesson(teachers[cls], cls, 0) for cls in legal]
    change = Pool.joined([under for under, _ in lessons])
    keep = Pool.joined([stays(), *(without for _, without in lessons)])
    change_scale = by_noise(bench, change.states, (change.wanted - answers(bench, base, change.states)).square())
    keep_scale = release_curves(bench)[GENERAL].reshape(NUM_BINS, -1).mean(1)
    rng = generator(seed, "distil order")
    for round_ in range(s.rounds):
        if round_ > 0:
            lessons = [lesson(student, cls, round_) for cls in legal]
            change = Pool.joined([change, *(under for under, _ in lessons)])
            keep = Pool.joined([keep, *(without for _, without in lessons)])
        student.train()
        for _ in range(s.steps):
            rows = [torch.randint(len(p.states), (n,), generator=rng) for p, n in ((change, s.legal), (keep, s.other))]
            batch = Pool.joined([Pool(p.states[r], p.wanted[r]) for p, r in zip((change, keep), rows, strict=True)])
            error = (ask(bench, student, batch.states) - batch.wanted).square().mean((1, 2, 3))
            bins = noise_bins(batch.states.timesteps, bench.loss.num_timesteps, NUM_BINS)
            relative = error / torch.cat([change_scale[bins[: s.legal]], keep_scale[bins[s.legal :]]])
            training.step(relative[: s.legal].mean() + s.keep * relative[s.legal :].mean())
    return training.learned()


def by_noise(bench: Bench, states: States, square: Tensor) -> Tensor:
    """Mean by noise level, (NUM_BINS,). square: (n, C, h, w)."""
    bins = noise_bins(states.timesteps, bench.loss.num_timesteps, NUM_BINS)
    each = square.mean((1, 2, 3))
    return torch.stack([each[bins == number].mean() for number in range(NUM_BINS)])


def _rule(settings: DistilSettings) -> Callable[[Bench, float, int], FreezeMask]:
    def rule(bench: Bench, p: float, seed: int) -> FreezeMask:
        frozen = largest_names(bench, p)
        return bench.mask(frozen, distil(bench, frozen, seed, settings))

    return rule


RULES = {"distil": _rule(DistilSettings())}
