from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raygard.adaptation import full
from raygard.config import AdaptConfig, ModelConfig
from raygard.diffusion.cache import LatentSet
from raygard.diffusion.families.stable_diffusion import encode_captions
from raygard.diffusion.layers import LAYERS, attention_tensors
from raygard.diffusion.loss import DiffusionLoss, draw, held_out_loss
from raygard.diffusion.model import load_denoiser, load_noise_scheduler, load_text_encoder
from raygard.editing import IMMASettings, imma_values
from raygard.editing.inner import INNER, TextModel, TextualInversion
from raygard.errors import RaygardError
from raygard.seeding import generator
from tests.latents import flat_latents

BUNDLED = ModelConfig(pretrained_model_name_or_path="zoo:tiny-sd")
QUICK = IMMASettings(layers="cross-kv", rounds=3, train_batch_size=2, inner_lr=1e-3, outer_lr=1e-3)


@pytest.fixture(scope="module")
def unet(tiny_model: ModelConfig) -> nn.Module:
    return load_denoiser(tiny_model)


@pytest.fixture(scope="module")
def loss(tiny_model: ModelConfig) -> DiffusionLoss:
    return DiffusionLoss(load_noise_scheduler(tiny_model))


@pytest.fixture(scope="module")
def text(tiny_model: ModelConfig) -> TextModel:
    return TextModel(*load_text_encoder(tiny_model), ("x",))


def with_values(unet: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    edited = copy.deepcopy(unet)
    edited.load_state_dict(dict(values), strict=False)
    return edited


def written_out(unet: nn.Module, data: LatentSet, loss: DiffusionLoss, rank: int | None) -> dict[str, Tensor]:
    """QUICK by hand, on a copy of the model: forward hooks for LoRA, `backward` and one optimizer for each side."""
    model, seed = copy.deepcopy(unet), 5
    theta = {name: p for name, p in model.named_parameters() if "attn2.to_k" in name or "attn2.to_v" in name}
    phi: list[Tensor] = list(model.parameters())
    if rank is not None:
        phi = []
        for name, module in model.named_modules():
            if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
                rng = generator(seed, "imma lora", f"{name}.weight")
                down = nn.Parameter(torch.randn(rank, module.in_features, generator=rng) / rank)
                up = nn.Parameter(torch.zeros(module.out_features, rank))
                phi += [down, up]
                module.register_forward_hook(
                    lambda _, inputs, output, down=down, up=up: output + F.linear(F.linear(inputs[0], down), up)
                )
    sides = {"inner": (phi, 1.0), "outer": (list(theta.values()), -1.0)}
    optimizers = {side: torch.optim.AdamW(tensors, lr=1e-3, weight_decay=1e-2) for side, (tensors, _) in sides.items()}
    for step in range(6):
        side = ("inner", "outer")[step % 2]
        rows = torch.randint(len(data), (2,), generator=generator(seed, "imma", "rows", step))
        eps, noise, timesteps = draw(seed, "imma", step, range(2), data.shape, 1000)
        error = loss.per_sample(model, data.latents(rows, eps), data.conditioning[rows], noise, timesteps).mean()
        tensors, sign = sides[side]
        for tensor in [*model.parameters(), *phi]:
            tensor.grad = None
        (sign * error).backward()
        nn.utils.clip_grad_norm_(tensors, 1.0)
        optimizers[side].step()
    return {name: parameter.detach() for name, parameter in theta.items()}


@pytest.mark.parametrize(("inner", "rank"), [("lora", 4), ("dreambooth", None)])
def test_first_steps_equal_a_loop_written_out(
    unet: nn.Module, loss: DiffusionLoss, inner: str, rank: int | None
) -> None:
    data = flat_latents()
    settings = IMMASettings(**{**vars(QUICK), "inner": inner})
    values = imma_values(unet, data, loss, seed=5, settings=settings)
    expected = written_out(unet, data, loss, rank)
    assert values.keys() == expected.keys()
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-5)
        assert (value - dict(unet.named_parameters())[name]).abs().max() > 1e-3


@pytest.mark.parametrize("layers", sorted(LAYERS))
@pytest.mark.parametrize("inner", sorted(INNER))
def test_exactly_the_named_tensors_change_and_seeds_decide(
    unet: nn.Module, loss: DiffusionLoss, text: TextModel, inner: str, layers: str
) -> None:
    before = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
    settings = IMMASettings(**{**vars(QUICK), "rounds": 1, "inner": inner, "layers": layers})
    first, same, other = (
        imma_values(unet, flat_latents(), loss, seed=seed, settings=settings, text=text) for seed in (0, 0, 1)
    )
    assert list(first) == attention_tensors(unet, layers)
    for name, value in first.items():
        assert value.dtype == torch.float32 and not torch.equal(value, before[name])
        assert torch.equal(value, same[name]) and not torch.equal(value, other[name])
    assert all(torch.equal(parameter, before[name]) for name, parameter in unet.named_parameters())
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_textual_inversion_starts_where_its_words_are_and_learns_them_alone() -> None:
    tokenizer, encoder = load_text_encoder(BUNDLED)
    unet, loss = load_denoiser(BUNDLED), DiffusionLoss(load_noise_scheduler(BUNDLED))
    before = {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}
    captions = ["cyclone in the style of OpenMoji", "OpenMoji", "rainbow in the style of EmojiOne"]
    data = replace(flat_latents(tokens=(24, 128), side=16, count=3), captions=captions)
    inner = TextualInversion(unet, {}, 0, TextModel(tokenizer, encoder, ("OpenMoji", "EmojiOne")), False)
    tokens = inner.conditioning(data, torch.arange(3))
    # Each of these words is one token, so at the start the new tokens change nothing.
    start = inner.embed(tokens)["text"].detach()
    torch.testing.assert_close(start, encode_captions(tokenizer, encoder, captions).detach())
    with torch.no_grad():
        inner.phi()[0][0, 0] += 1
    moved = inner.embed(tokens)["text"].detach() - start
    assert moved[0].abs().max() > 1e-3 < moved[1].abs().max() and not moved[2].any()
    settings = IMMASettings(rounds=1, inner="textual-inversion")
    imma_values(
        unet, data, loss, seed=0, settings=settings, text=TextModel(tokenizer, encoder, ("emojione", "Openmoji"))
    )
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in encoder.named_parameters())
    with pytest.raises(RaygardError, match="no word to learn in the caption 'cyclone in the style of OpenMoji'"):
        TextualInversion(unet, {}, 0, TextModel(tokenizer, encoder, ("Noto",)), False).conditioning(
            data, torch.arange(1)
        )
    with pytest.raises(RaygardError, match="needs the model's text encoder"):
        imma_values(unet, data, loss, seed=0, settings=settings)


def attacked(unet: nn.Module, data: LatentSet, loss: DiffusionLoss) -> float:
    settings = AdaptConfig(max_train_steps=4, learning_rate=3e-4, train_batch_size=4)
    full(unet, data, settings, loss, mask=None, seed=0)
    return held_out_loss(unet, data, loss, 0, 6, 2)


def test_an_immunised_bundled_model_leaves_the_attacker_with_a_higher_loss() -> None:
    base = load_denoiser(BUNDLED)
    loss, data = DiffusionLoss(load_noise_scheduler(BUNDLED)), flat_latents(tokens=(24, 128), side=16)
    settings = IMMASettings(layers="cross-kv", rounds=6, train_batch_size=2, inner_lr=1e-3, outer_lr=5e-3)
    immunised = with_values(base, imma_values(base, data, loss, seed=0, settings=settings))
    unguarded = attacked(copy.deepcopy(base), data, loss)
    assert unguarded < held_out_loss(base, data, loss, 0, 6, 2)
    assert attacked(immunised, data, loss) > 1.05 * unguarded


def test_a_retain_term_keeps_the_loss_of_what_is_retained_lower() -> None:
    base = load_denoiser(BUNDLED)
    loss = DiffusionLoss(load_noise_scheduler(BUNDLED))
    illegal, kept = (flat_latents(seed, tokens=(24, 128), side=16) for seed in (0, 1))
    found = {}
    for weight in (0.0, 5.0):
        settings = replace(QUICK, rounds=4, outer_lr=5e-3, retain_weight=weight)
        values = imma_values(base, illegal, loss, seed=0, settings=settings, retain=kept if weight else None)
        found[weight] = held_out_loss(with_values(base, values), kept, loss, 0, 6, 2)
    assert found[5.0] < 0.95 * found[0.0]


def test_bad_input_is_one_line(unet: nn.Module, loss: DiffusionLoss) -> None:
    data = flat_latents()
    with pytest.raises(RaygardError, match="needs illegal pictures"):
        imma_values(unet, data.subset([]), loss, seed=0, settings=QUICK)
    with pytest.raises(RaygardError, match="no pictures to retain"):
        imma_values(unet, data, loss, seed=0, settings=IMMASettings(retain_weight=1.0))
    with pytest.raises(RaygardError, match="no effect with retain_weight 0"):
        imma_values(unet, data, loss, seed=0, settings=QUICK, retain=data)
    with pytest.raises(RaygardError, match="unknown inner adaptation 'lor'; did you mean 'lora'"):
        imma_values(unet, data, loss, seed=0, settings=IMMASettings(inner="lor"))
    with pytest.raises(RaygardError, match=r"illegal loss is nan at IMMA step \d+; lower the learning rates"):
        imma_values(unet, data, loss, seed=0, settings=IMMASettings(rounds=3, outer_lr=1e30))
    for settings, message in (
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"outer_lr": 0.0}, "outer_lr must be above 0"),
        ({"retain_weight": -1.0}, "retain_weight must be at least 0"),
        (
            {"gradient_accumulation_steps": 2},
            "train_batch_size 1 must be a multiple of its gradient_accumulation_steps 2",
        ),
    ):
        with pytest.raises(RaygardError, match=message):
            IMMASettings(**settings)
