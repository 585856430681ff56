"""Training values in one process: the loss by hand, batches that do not depend on workers, names, configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raygard.bilevel.alternation import DenoiserLoss
from raygard.config_file import load_config
from raygard.defences import unlearned_mask, with_values
from raygard.diffusion.cache import LatentSet, build_cache, load_cache
from raygard.diffusion.conditioning import Conditioning, ConditioningRows
from raygard.diffusion.loss import DiffusionLoss
from raygard.diffusion.model import load_denoiser, load_noise_scheduler
from raygard.domain import load_domain
from raygard.errors import RaygardError
from raygard.flow import Flow
from raygard.mask import FreezeMask
from raygard.values import (
    GENERAL,
    NUM_BINS,
    Objective,
    Plan,
    TaughtLoss,
    ValuesSource,
    general_rows,
    release_errors,
    train_values,
)
from raygard.values.batches import further_captions
from raygard.values.names import meaningless_captions, pseudoword

ROLES = {"a": "illegal", "b": "illegal", "c": "legal", "g": "general"}
NUM_TIMESTEPS, SEED = 1000, 3


def domain_config(*overrides: str):
    named = ["domain.illegal=[a,b]", "domain.legal=[c]", "domain.general=[g]", "values.max_train_steps=20"]
    return load_config(None, [*named, "values.train_batch_size=16", *overrides])


def material() -> LatentSet:
    """Ten pictures of each class, each of another value, with embeddings of all captions and names."""
    config, rng = domain_config(), torch.Generator().manual_seed(0)
    classes = [cls for cls in ROLES for _ in range(10)]
    captions = [f"thing {number} by {cls}" for number, cls in enumerate(classes)]
    rows = [(cls, caption) for cls, caption in zip(classes, captions, strict=True)]
    vocabulary = sorted({*captions, *further_captions(rows, config.domain, config.values, SEED)})
    index = torch.tensor([vocabulary.index(caption) for caption in captions])
    text = ConditioningRows(Conditioning(text=torch.randn(len(vocabulary), 8, 16, generator=rng)), index)
    mean = torch.arange(40.0).view(-1, 1, 1, 1).expand(40, 4, 8, 8)
    parts = ["general" if cls == "g" else "learn_lower" for cls in classes]
    return LatentSet(mean, torch.zeros_like(mean), text, classes, captions, parts, vocabulary)


def source(*overrides: str) -> ValuesSource:
    config = domain_config(*overrides)
    return ValuesSource.of(material(), config.domain, config.values, NUM_TIMESTEPS, SEED)


def words(data: LatentSet, batch) -> list[str]:
    """The caption of each sample, found by its embedding."""
    known = data.conditioning.unique["text"]
    found = (known[None] == batch.conditioning["text"][:, None]).all(dim=(2, 3)).int().argmax(dim=1)
    return [data.vocabulary[row] for row in found.tolist()]


def test_loss_is_the_formula_written_out() -> None:
    rng = torch.Generator().manual_seed(1)
    curves = torch.rand(3, NUM_BINS, generator=rng) + 0.1
    errors = torch.rand(12, generator=rng) * 2
    roles = torch.tensor([0, 1, 2] * 4)
    timesteps = torch.tensor([0, 49, 50, 499, 500, 950, 999, 951, 120, 300, 301, 777])
    loss, means = Objective(curves, 1000, 3.0, 10.0, 0.3, 1.5)(errors, roles, timesteps)
    sums = [0.0, 0.0, 0.0]
    capped = 0.0
    for e, r, t in zip(errors.tolist(), roles.tolist(), timesteps.tolist(), strict=True):
        of_role = [float(value) for value in curves[r]]
        rel = 0.5 * e / (sum(of_role) / 20) + 0.5 * e / of_role[t // 50]
        sums[r] += rel / 4
        capped += min(rel, 1.5) / 4 if r == 2 else 0.0
    assert capped < sums[2], "no sample is above the cap"
    assert float(loss) == pytest.approx(3.0 * sums[0] + 10.0 * sums[1] - 0.3 * capped, rel=1e-5)
    torch.testing.assert_close(means, torch.tensor(sums), rtol=1e-5, atol=0)


def test_above_the_cap_nothing_more_is_asked() -> None:
    objective = Objective(torch.ones(3, NUM_BINS), 1000, 1.0, 1.0, 1.0, 1.5)
    errors = torch.tensor([1.0, 1.0, 1.4, 1.6], requires_grad=True)
    loss, _ = objective(errors, torch.tensor([0, 1, 2, 2]), torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert errors.grad.tolist() == [1.0, 1.0, -0.5, 0.0]


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (1, 4), (2, 2), (3, 1)])
def test_ranks_share_the_same_batch(world_size: int, accumulation: int) -> None:
    dealer = source()
    (whole,) = dealer.batches(5)
    parts = [
        batch
        for rank in range(world_size)
        for batch in dealer.batches(5, rank=rank, world_size=world_size, accumulation=accumulation)
    ]
    for batch in parts:
        legal, general, illegal = batch.roles.bincount().tolist()
        assert general // 2 == legal == illegal == round(float(batch.weight) * 4 / len(parts))
    plain = [batch._replace(conditioning=batch.conditioning["text"])[:-1] for batch in (whole, *parts)]
    for whole_column, *columns in zip(*plain, strict=True):
        key = [tuple(row.reshape(-1).tolist()) for row in whole_column]
        assert sorted(key) == sorted(tuple(row.reshape(-1).tolist()) for column in columns for row in column)


def test_slots_hold_pictures_of_their_role_under_all_names() -> None:
    dealer, seen = source(), set()
    roles = ("legal", "general", "illegal")
    kept = set(general_rows(dealer.data, ["g"])[1].tolist())
    for step in range(12):
        (batch,) = dealer.batches(step)
        rows = batch.latents[:, 0, 0, 0].long().tolist()
        assert [ROLES[dealer.data.classes[row]] for row in rows] == [roles[r] for r in batch.roles.tolist()]
        assert not kept & set(rows)
        captions = words(dealer.data, batch)
        for row, caption in zip(rows, captions, strict=True):
            assert caption.split()[:2] == dealer.data.captions[row].split()[:2]
            seen.add((dealer.data.classes[row], caption.split()[-1]))
        named = [caption.split()[-1] in ROLES for caption in captions]
        assert named == [True, False] * 2 + [True] * 8 + [True, False] * 2
    expected = {(cls, cls) for cls in ROLES} | {("c", pseudoword(SEED, "c", 0))}
    expected |= {(cls, pseudoword(SEED, cls, number)) for cls in "ab" for number in range(3)}
    assert seen == expected


def test_every_second_general_picture_is_mirrored_and_no_other() -> None:
    dealer = source()
    ramp = dealer.data.mean + torch.linspace(0, 0.5, 8)
    dealer = dataclasses.replace(dealer, data=dataclasses.replace(dealer.data, mean=ramp))
    (batch,) = dealer.batches(4)
    falls = batch.latents[:, 0, 0, 0] > batch.latents[:, 0, 0, -1]
    assert falls.tolist() == [False] * 4 + [False, True] * 4 + [False] * 4
    probe = dealer.probe(GENERAL, 3, NUM_BINS, torch.arange(24), 24)
    assert (probe.latents[..., 0] < probe.latents[..., -1]).all(), "the release is measured on what it knows"


def test_without_meaningless_names_all_slots_go_by_their_own() -> None:
    dealer = source("values.legal_names=0", "values.illegal_names=0")
    (batch,) = dealer.batches(0)
    assert {caption.split()[-1] for caption in words(dealer.data, batch)} == set(ROLES)


def test_the_last_tenth_of_each_general_class_is_kept() -> None:
    trained, kept = general_rows(material(), ["g"])
    assert (trained.tolist(), kept.tolist()) == (list(range(30, 39)), [39])


def test_a_general_class_of_one_picture_is_refused() -> None:
    data = material().subset([0, 30])
    with pytest.raises(RaygardError, match="general class 'g' has 1 picture: one to train on and one to keep"):
        general_rows(data, ["g"])


def test_meaningless_names_replace_the_class_and_nothing_else() -> None:
    first, second = meaningless_captions(["a man by a Line", "LINE art"], "Line", 2, seed=0)
    word, other = pseudoword(0, "Line", 0), pseudoword(0, "Line", 1)
    assert first == [f"a man by a {word}", f"{word} art"]
    assert second == [f"a man by a {other}", f"{other} art"]
    assert word != other


def test_a_caption_without_its_class_is_one_line() -> None:
    with pytest.raises(RaygardError, match=r"'a cat' does not name its class 'dog'.*values.legal_names=0") as caught:
        meaningless_captions(["a cat"], "dog", 1, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["values.max_train_steps=100"], "values.max_train_steps needs domain.general: name classes"),
        (["values.learning_rate=1e-3"], "values.learning_rate has no effect with values.max_train_steps=0"),
        (["values.max_train_steps=5"], "values.lr_warmup_steps 20 exceeds values.max_train_steps 5"),
        (
            ["values.max_train_steps=50", "domain.general=[g]", "values.train_batch_size=4", "engine.num_workers=2"],
            "values.train_batch_size 4 must be at least 8 (4 quarters x engine.num_workers",
        ),
        (["values.steps=5"], "unknown key 'values.steps'"),
        (["mask.rule=largest-first", "mask.temperature=0.3"], "mask.temperature has no effect with mask.rule=largest"),
        (["search.rules=[largest-first]"], "'largest-first' learns nothing to search for"),
        (["mask.rule=largest-first", "search.mode=one_ranking"], "needs a rule that can draw p"),
    ],
)
def test_bad_configurations_are_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(RaygardError, match=message.replace("(", r"\(")) as caught:
        load_config(None, overrides)
    assert "\n" not in str(caught.value)


def test_cache_embeds_further_captions_once(tiny_model, imagefolder, tmp_path) -> None:
    data = imagefolder({"a": 48, "c": 48})
    config = load_config(
        None, [f"domain.data={data}", "domain.illegal=[a]", "domain.legal=[c]", "domain.resolution=16"]
    )
    view = load_domain(config.domain).view("values")
    arguments = (tiny_model, config.domain, view, [("a", "learn_lower")], tmp_path / "cache")
    plain = load_cache(build_cache(*arguments))
    folder = build_cache(*arguments, further_captions=["by zorb", plain.captions[0]])
    both = load_cache(folder)
    assert set(both.vocabulary) == {*plain.captions, "by zorb"}
    assert torch.equal(*(rows.conditioning[torch.arange(len(rows))]["text"] for rows in (both, plain)))
    assert build_cache(*arguments, further_captions=[plain.captions[0], "by zorb"]) == folder
    assert build_cache(*arguments, further_captions=["by other"]) != folder
    zorb = both.conditioning.unique["text"][both.vocabulary.index("by zorb")]
    assert not (plain.conditioning.unique["text"] == zorb).all(dim=(1, 2)).any()


class PlainAdamW:
    """One process without DeepSpeed."""

    def __init__(self, module: TaughtLoss, lr: float) -> None:
        self.module = module
        self.held = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.held, lr=lr, weight_decay=0.0)

    def __call__(self, *batch: torch.Tensor) -> torch.Tensor:
        return self.module(*batch)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.held, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_release_errors_are_one_on_average_and_shared_by_ranks(tiny_model) -> None:
    dealer, plain = source(), load_noise_scheduler(tiny_model)
    dealer = dataclasses.replace(dealer, data=dataclasses.replace(dealer.data, mean=dealer.data.mean / 40))
    engine = DenoiserLoss(load_denoiser(tiny_model), DiffusionLoss(plain))
    whole = release_errors(engine, dealer, Plan(1))
    shares = []
    for rank in range(5):
        release_errors(engine, dealer, Plan(1, 1, rank, 5), reduce=lambda sums: shares.append(sums.clone()))
    torch.testing.assert_close(sum(shares) / 24, whole.double(), rtol=1e-4, atol=0)
    batch = dealer.probe(2, 7, NUM_BINS, torch.arange(24), 24)
    assert ((batch.timesteps >= 350) & (batch.timesteps < 400)).all() and len(batch.timesteps.unique()) > 5
    assert engine(*batch[:4]).mean().item() == pytest.approx(float(whole[2, 7]), rel=1e-4)


def test_training_moves_frozen_values_only_and_tells_roles_apart(tiny_model, tmp_path) -> None:
    config = domain_config(
        f"model.pretrained_model_name_or_path={tiny_model.pretrained_model_name_or_path}",
        "mask.rule=largest-first",
    )
    mask = unlearned_mask(config, 0)
    largest = sorted(mask.sizes.tolist(), reverse=True)[: int(mask.frozen.sum())]
    assert sorted(mask.sizes[mask.frozen].tolist(), reverse=True) == largest
    assert mask.ratio_by_count == pytest.approx(0.3, abs=0.01)

    unet, base = load_denoiser(tiny_model), load_denoiser(tiny_model)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name in mask.frozen_names)
    dealer = source()
    shifted = torch.randn(40, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    shifted[:20] += 3
    dealer = dataclasses.replace(dealer, data=dataclasses.replace(dealer.data, mean=shifted))
    engine = PlainAdamW(TaughtLoss(unet, DiffusionLoss(load_noise_scheduler(tiny_model)), base), 3e-3)
    objective = Objective(release_errors(engine, dealer, Plan(1)), NUM_TIMESTEPS, 10.0, 3.0, 10.0, 1.5)
    records = list(train_values(engine, dealer, objective, Plan(60)))
    legal, general, illegal = torch.stack([record.errors for record in records[-10:]]).mean(dim=0).tolist()
    assert legal < 0.95 and illegal > legal + 0.05
    assert records[0].errors[1] < 1e-9 and general < 0.3, "general pictures are answered as the release answers them"

    trained, released = dict(unet.named_parameters()), dict(base.named_parameters())
    for name in mask.names:
        assert torch.equal(trained[name], released[name]) != (name in mask.frozen_names)

    values = {name: trained[name] for name in mask.frozen_names}
    saved = FreezeMask.load(with_values(config, mask, values, {"base_loss_after": 1.0}).save(tmp_path / "mask"))
    assert saved.metrics["base_loss_after"] == 1.0 and saved.frozen_names == mask.frozen_names
    user = saved.apply(load_denoiser(tiny_model))
    state = {name: p.detach().clone() for name, p in user.named_parameters()}
    assert all(torch.equal(state[name], values[name]) for name in values)
    original = {name: p.detach() for name, p in released.items()}
    assert saved.audit(original, state).ok
    assert not saved.audit(original, original).ok


def test_a_given_masks_values_are_measured_whatever_its_metrics_say(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(None, [f"model.pretrained_model_name_or_path={tiny_model.pretrained_model_name_or_path}"])
    unet = load_denoiser(tiny_model)
    names = [name for name, _ in unet.named_parameters()]
    values = {names[0]: torch.zeros_like(dict(unet.named_parameters())[names[0]])}
    plain, valued = FreezeMask.create(unet, names[1:2]), FreezeMask.create(unet, names[:1], values=values)
    paths = {("freeze", seed): str(valued.save(tmp_path / f"freeze-{seed}")) for seed in (0, 1)}
    asked: list[tuple[Path | None, bool]] = []

    def base_loss(config, cache, store, mask=None, edit=None, *, kept=False) -> float:
        asked.append((mask, kept))
        return 1.0 if mask is None else 2.0 + int(mask.name[-1])

    monkeypatch.setattr("raygard.cluster.evaluation.base_loss", base_loss)
    flow: Any = SimpleNamespace(config=config, general_cache=tmp_path)
    losses = Flow._base_losses(flow, [valued, valued], paths, "store")
    assert losses == {**dict.fromkeys(config.evaluation.defences, 1.0), "freeze": 2.5}
    assert len(asked) == 3 and all(kept for _, kept in asked), "every defence on the same pictures"
    assert set(Flow._base_losses(flow, [plain], paths, "store").values()) == {1.0} and asked[3:] == [(None, False)]


def test_a_loss_that_is_not_finite_is_one_line(tiny_model) -> None:
    objective = Objective(torch.full((3, NUM_BINS), float("nan")), NUM_TIMESTEPS, 3.0, 10.0, 0.3, 1.5)
    release, loss = load_denoiser(tiny_model), DiffusionLoss(load_noise_scheduler(tiny_model))
    engine = PlainAdamW(TaughtLoss(load_denoiser(tiny_model), loss, release), 1e-3)
    with pytest.raises(RaygardError, match=r"not finite at step 0; lower values.learning_rate"):
        next(train_values(engine, source(), objective, Plan(2)))
