from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from raygard.config import ModelConfig
from raygard.diffusion.families.stable_diffusion import encode_captions
from raygard.diffusion.layers import attention_tensors
from raygard.diffusion.model import load_denoiser, load_text_encoder
from raygard.editing import UCESettings, uce, uce_values
from raygard.editing.uce import concept_embeddings
from raygard.errors import RaygardError
from raygard.seeding import generator

WIDTH = 16


@pytest.fixture(scope="module")
def unet(tiny_model: ModelConfig) -> nn.Module:
    return load_denoiser(tiny_model)


@pytest.fixture(scope="module")
def text(tiny_model: ModelConfig) -> tuple[Any, Any]:
    return load_text_encoder(tiny_model)


def features(seed: int, *counts: int) -> list[Tensor]:
    return [torch.randn(count, WIDTH, generator=generator(seed, count, i)) for i, count in enumerate(counts)]


def objective(weight: Tensor, before: Tensor, sets: list[Tensor], weights: tuple[float, float, float]) -> Tensor:
    """What UCE minimises, in float64 (methods.md, section 8)."""
    weight, before, old, new, kept = (tensor.detach().double() for tensor in (weight, before, *sets))
    lamb, erase, preserve = weights
    erased = (old @ weight.T - new @ before.T).square().sum()
    moved = (kept @ weight.T - kept @ before.T).square().sum()
    return erase * erased + preserve * moved + lamb * (weight - before).square().sum()


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    counts=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    weights=st.tuples(st.floats(1e-3, 2), st.floats(0.1, 2), st.floats(0, 2)),
)
def test_edit_equals_the_dense_least_squares_solution(
    unet: nn.Module, seed: int, counts: tuple[int, int], weights: tuple[float, float, float]
) -> None:
    old, new, kept = features(seed, counts[0], counts[0], counts[1])
    lamb, erase, preserve = weights
    values = uce_values(unet, old, new, kept, lamb=lamb, erase_scale=erase, preserve_scale=preserve)
    parameters = dict(unet.named_parameters())
    rows = torch.cat([erase**0.5 * old, preserve**0.5 * kept, lamb**0.5 * torch.eye(WIDTH)]).double()
    for name, value in values.items():
        before = parameters[name].detach().double()
        targets = [erase**0.5 * new.double(), preserve**0.5 * kept.double(), lamb**0.5 * torch.eye(WIDTH).double()]
        solution = torch.linalg.lstsq(rows, torch.cat(targets) @ before.T).solution.T
        torch.testing.assert_close(value.double(), solution, rtol=1e-5, atol=1e-6)


def test_edit_is_a_minimum_and_keeps_what_it_preserves_within_the_residual(unet: nn.Module) -> None:
    sets, weights = features(0, 3, 3, 20), (0.5, 1.0, 1.0)
    values = uce_values(unet, *sets, lamb=0.5)
    parameters = dict(unet.named_parameters())
    for number, (name, value) in enumerate(values.items()):
        best = objective(value, parameters[name], sets, weights)
        # At the old weights nothing preserved has moved, so what has moved since is bounded by the erasing's gain.
        assert best < objective(parameters[name], parameters[name], sets, weights)
        nudge = 1e-2 * torch.randn(value.shape, generator=generator("nudge", number))
        assert best < min(objective(value + sign * nudge, parameters[name], sets, weights) for sign in (1, -1))


def test_few_erased_features_get_the_keys_and_values_of_their_guides(unet: nn.Module) -> None:
    old, new, kept = features(1, 3, 3, 4)
    parameters = dict(unet.named_parameters())
    for name, value in uce_values(unet, old, new, kept, lamb=1e-6).items():
        before = parameters[name].detach()
        torch.testing.assert_close(old @ value.T, new @ before.T, rtol=0, atol=1e-4)
        torch.testing.assert_close(kept @ value.T, kept @ before.T, rtol=0, atol=1e-4)


def test_exactly_the_cross_attention_keys_and_values_are_edited(unet: nn.Module) -> None:
    before = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
    old, new = features(2, 2, 2)
    values = uce_values(unet, old, new)
    expected = {name for name in before if "attn2.to_k" in name or "attn2.to_v" in name}
    assert set(values) == expected == set(attention_tensors(unet, "cross-kv"))
    assert all(value.dtype == torch.float32 and not torch.equal(value, before[n]) for n, value in values.items())
    assert all(torch.equal(parameter, before[name]) for name, parameter in unet.named_parameters())
    unchanged = uce_values(unet, old, old.clone(), new)
    assert all(torch.equal(unchanged[name], before[name]) for name in values)
    sequences = uce_values(unet, old[None].repeat(3, 1, 1), new[None].repeat(3, 1, 1), erase_scale=1 / 3)
    for name, value in sequences.items():
        torch.testing.assert_close(value, values[name], rtol=1e-5, atol=1e-6)


def test_variants_take_the_features_that_the_scripts_take(text: tuple[Any, Any]) -> None:
    # The tiny tokenizer has one token for each letter, between a start and an end.
    states = encode_captions(*text, ["abc", "d", ""]).detach()
    old, new = concept_embeddings(*text, [("abc", "d"), ("abc", "")])
    torch.testing.assert_close(old, states[[0, 0], 3])
    torch.testing.assert_close(new, states[[1, 2], [1, 0]])
    old, new = concept_embeddings(*text, [("abc", "d")], "all")
    torch.testing.assert_close(old, states[0, 3:])
    torch.testing.assert_close(new, states[1, 1 : 1 + len(old)])


def test_prompts_decide_the_edit(unet: nn.Module, text: tuple[Any, Any]) -> None:
    last, again, every, kept = (
        uce(unet, *text, ["abc"], preserve, UCESettings(tokens=tokens))
        for tokens, preserve in (("last", ()), ("last", ()), ("all", ()), ("last", ("abd",)))
    )
    names = set(last)
    assert all(torch.equal(last[name], again[name]) for name in names)
    assert not any(torch.equal(last[name], other[name]) for other in (every, kept) for name in names)
    parameters = dict(unet.named_parameters())
    feature = encode_captions(*text, ["abd"]).detach()[0, 3]
    for name in names:
        moved = [((values[name] - parameters[name].detach()) @ feature).norm() for values in (last, kept)]
        assert moved[1] < moved[0]


def test_bad_input_is_one_line(unet: nn.Module, text: tuple[Any, Any]) -> None:
    old, new = features(3, 2, 2)
    for arguments, message in (
        ((old, new[:1]), "must have one shape"),
        ((old[:, :8], new[:, :8]), "embeddings have 8 features, 'down_blocks.* takes 16"),
        ((old, new * torch.nan), "new_embeddings must be finite"),
        ((old, new, old[:, :8]), "preserve_embeddings have 8 features, the others 16"),
    ):
        with pytest.raises(RaygardError, match=message):
            uce_values(unet, *arguments)
    with pytest.raises(RaygardError, match="UCE needs lamb > 0"):
        uce_values(unet, old, new, lamb=0)
    with pytest.raises(RaygardError, match="nothing to erase"):
        uce(unet, *text, [])
    with pytest.raises(RaygardError, match="no variant tokens='al'; did you mean 'all'"):
        UCESettings(tokens="al")  # type: ignore[arg-type]
    with pytest.raises(RaygardError, match="no such attention"):
        uce_values(nn.Linear(2, 2), old, new)
    with pytest.raises(RaygardError, match="unknown layers 'cros'; did you mean 'cross'"):
        attention_tensors(unet, "cros")
