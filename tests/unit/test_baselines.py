from __future__ import annotations

import pytest
import torch

from raygard.baselines import DEFENCES, choose_frozen
from raygard.errors import RaygardError
from raygard.seeding import generator

CHOOSERS = sorted(name for name, choose in DEFENCES.items() if choose is not None)


def unet_like_sizes() -> torch.Tensor:
    kinds = torch.tensor([64, 64, 128, 4096, 4096, 8192, 36864, 73728])
    return kinds[torch.randint(len(kinds), (208,), generator=generator(0, "sizes"))]


@pytest.mark.parametrize("name", CHOOSERS)
def test_choice_depends_on_the_generator_alone(name: str) -> None:
    sizes = unet_like_sizes()
    learned = torch.rand(len(sizes), generator=generator(0, "learned")) < 0.3
    first = choose_frozen(name, sizes, learned, generator(0, "mask", 1))
    assert first.dtype == torch.bool and first.shape == sizes.shape
    assert torch.equal(first, choose_frozen(name, sizes, learned, generator(0, "mask", 1)))
    assert torch.equal(first, choose_frozen(name, sizes, learned, generator(0, "mask", 2))) == (name == "largest-first")


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


def test_none_and_freeze() -> None:
    learned = torch.tensor([True, False])
    assert not choose_frozen("none", torch.tensor([1, 2]), learned, generator(0)).any()
    assert torch.equal(choose_frozen("freeze", torch.tensor([1, 2]), learned, generator(0)), learned)


def test_unknown_defence_names_the_nearest() -> None:
    with pytest.raises(RaygardError, match="did you mean 'random-matched'"):
        choose_frozen("random-match", torch.tensor([1]), torch.tensor([True]), generator(0))
