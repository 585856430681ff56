from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from raygard.baselines import DEFENCES, DRAWN, choose_frozen, relative_change
from raygard.config import ModelConfig
from raygard.config_file import load_config
from raygard.defences import save_controls
from raygard.diffusion.model import load_denoiser
from raygard.errors import RaygardError
from raygard.mask import FreezeMask
from raygard.seeding import generator

CHOOSERS = sorted(name for name, choose in DEFENCES.items() if choose is not None)


def unet_like_sizes() -> torch.Tensor:
    kinds = torch.tensor([64, 64, 128, 4096, 4096, 8192, 36864, 73728])
    return kinds[torch.randint(len(kinds), (208,), generator=generator(0, "sizes"))]


KINDS = ("attn1.to_q.weight", "attn2.to_out.0.bias", "resnets.0.conv1.weight", "resnets.0.time_emb_proj.bias", "norm")


@pytest.mark.parametrize("name", CHOOSERS)
def test_choice_depends_on_the_facts_and_the_generator_alone(name: str) -> None:
    sizes = unet_like_sizes()
    learned = torch.rand(len(sizes), generator=generator(0, "learned")) < 0.3
    names = [f"blocks.{number}.{KINDS[number % len(KINDS)]}" for number in range(len(sizes))]
    facts = {"names": names, "relative_change": torch.rand(len(sizes), generator=generator(0, "change"))}
    first = choose_frozen(name, sizes, learned, generator(0, "mask", 1), **facts)
    assert first.dtype == torch.bool and first.shape == sizes.shape and 0 < int(first.sum()) < len(sizes)
    assert torch.equal(first, choose_frozen(name, sizes, learned, generator(0, "mask", 1), **facts))
    again = choose_frozen(name, sizes, learned, generator(0, "mask", 2), **facts)
    assert torch.equal(first, again) == (name not in DRAWN)


def test_random_and_largest_first_freeze_as_many_tensors_as_learned() -> None:
    sizes = unet_like_sizes()
    learned = torch.arange(len(sizes)) < 62
    for name in ("random", "largest-first"):
        assert int(choose_frozen(name, sizes, learned, generator(1)).sum()) == 62
    largest = choose_frozen("largest-first", sizes, learned, generator(1))
    assert sizes[largest].min() >= sizes[~largest].max()


def test_largest_first_breaks_ties_by_index() -> None:
    frozen = choose_frozen("largest-first", torch.tensor([5, 7, 5, 5]), torch.tensor([1, 1, 0, 0]).bool(), generator(0))
    assert frozen.tolist() == [True, True, False, False]


@pytest.mark.parametrize("draw", range(5))
def test_random_matched_meets_the_share_of_parameters_within_one_percent(draw: int) -> None:
    sizes = unet_like_sizes()
    learned = torch.zeros(len(sizes), dtype=torch.bool)
    learned[torch.argsort(sizes, descending=True)[10:60]] = True
    frozen = choose_frozen("random-matched", sizes, learned, generator(draw, "mask"))
    gap = abs(int(sizes[frozen].sum()) - int(sizes[learned].sum()))
    assert gap <= 0.01 * int(sizes.sum())
    assert not torch.equal(frozen, learned)


def test_random_matched_with_one_dominating_tensor_gets_as_near_as_the_sizes_allow() -> None:
    sizes = torch.tensor([1000, 10, 10, 10])
    for draw in range(4):
        frozen = choose_frozen("random-matched", sizes, torch.tensor([True, False, False, False]), generator(draw))
        assert int(sizes[frozen].sum()) == 1000


def test_busy_layer_freezes_what_relearning_moved_most() -> None:
    base = {"a": torch.ones(4), "b": torch.ones(100), "c": torch.zeros(9), "d": 2 * torch.ones(4)}
    moves = {"a": 0.5, "b": 0.1, "c": 1e-6, "d": 0.6}
    change = relative_change(base, {name: tensor + moves[name] for name, tensor in base.items()})
    # A tensor of zeros has no norm to compare with; the floor keeps a tiny step of it from leading.
    torch.testing.assert_close(change[[0, 1, 3]], torch.tensor([0.5, 0.1, 0.3], dtype=torch.float64), rtol=1e-6, atol=0)
    assert change[2] < change[1]
    learned = torch.tensor([False, True, True, False])
    frozen = choose_frozen("busy-layer", torch.tensor([4, 100, 9, 4]), learned, generator(0), relative_change=change)
    assert frozen.tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("manual-attention", ("to_q", "to_k", "to_v", "to_out")),
        ("manual-convolution", ("conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "samplers.0.conv.")),
        ("manual-time-embedding", ("time_embedding", "time_emb_proj")),
    ],
)
def test_manual_freezes_all_tensors_of_one_kind_of_the_bundled_model(kind: str, words: tuple[str, ...]) -> None:
    names = [
        name for name, _ in load_denoiser(ModelConfig(pretrained_model_name_or_path="zoo:tiny-sd")).named_parameters()
    ]
    count = torch.ones(len(names), dtype=torch.int64)
    frozen = choose_frozen(kind, count, count > 0, generator(0), names=names)
    chosen = {name for name, flag in zip(names, frozen.tolist(), strict=True) if flag}
    assert chosen == {name for name in names if any(word in name for word in words)}
    assert all(any(word in name for name in chosen) for word in words)


def test_a_baseline_without_the_facts_it_needs_says_which() -> None:
    sizes, learned = torch.tensor([1, 2]), torch.tensor([True, False])
    with pytest.raises(RaygardError, match="busy-layer ranks tensors by what relearning changed"):
        choose_frozen("busy-layer", sizes, learned, generator(0))
    with pytest.raises(RaygardError, match="manual-attention chooses tensors by name, and no names"):
        choose_frozen("manual-attention", sizes, learned, generator(0))
    for names, count in ((["x", "y"], "no"), (["to_k.weight", "to_v.weight"], "every")):
        with pytest.raises(RaygardError, match=f"{count} tensor of this model is"):
            choose_frozen("manual-attention", sizes, learned, generator(0), names=names)


def test_controls_are_saved_for_every_baseline_and_relearning_is_asked_for_only_where_it_counts(
    tiny_model: ModelConfig, tmp_path: Path
) -> None:
    path = tiny_model.pretrained_model_name_or_path
    config = load_config(None, [f"model.pretrained_model_name_or_path={path}", "evaluation.random_draws=2"])
    unet = load_denoiser(tiny_model)
    moved = {name: p.detach().clone() for name, p in unet.named_parameters()}
    busiest = ["conv_out.weight", "mid_block.resnets.0.conv1.weight"]
    for name in busiest:
        moved[name] += 1
    save_file(moved, str(tmp_path / "relearned.safetensors"))
    learned = FreezeMask.create(unet, list(moved)[:2])
    names = [name for name in CHOOSERS if name != "busy-layer"]
    paths = save_controls(config, learned, tmp_path, names, lambda: pytest.fail("nothing here looks at relearning"))
    paths |= save_controls(config, learned, tmp_path, ["busy-layer"], lambda: tmp_path / "relearned.safetensors")
    assert set(paths) == {(name, draw) for name in CHOOSERS for draw in range(2 if name in DRAWN else 1)}
    assert set(FreezeMask.load(paths["busy-layer", 0]).frozen_names) == set(busiest)
    assert all("conv" in name for name in FreezeMask.load(paths["manual-convolution", 0]).frozen_names)


def test_none_and_freeze() -> None:
    learned = torch.tensor([True, False])
    assert not choose_frozen("none", torch.tensor([1, 2]), learned, generator(0)).any()
    assert torch.equal(choose_frozen("freeze", torch.tensor([1, 2]), learned, generator(0)), learned)


def test_unknown_defence_names_the_nearest() -> None:
    with pytest.raises(RaygardError, match="did you mean 'random-matched'"):
        choose_frozen("random-match", torch.tensor([1]), torch.tensor([True]), generator(0))
