"""Rule `average`: every signal counts once, whatever its step and the scale of the loss."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raygard.bilevel.rules import RuleSettings, make_rule, read_off
from raygard.cluster.worker import batch_sources, make_schedule, rule_settings
from raygard.config_file import load_config
from raygard.defences import make_mask
from raygard.diffusion.model import load_denoiser
from raygard.errors import RaygardError
from raygard.mask.soft import select_frozen
from tests.latents import latent_set

NUM_TENSORS = 40


def learned(signals: Tensor, p: float = 0.3, draw_ratios: tuple[float, ...] = ()) -> Tensor:
    """Logits after publisher steps with these signals, float64 (steps, N)."""
    rule = make_rule("average", RuleSettings(NUM_TENSORS, p, 0.2, 0.05, 0.0, None, 0, draw_ratios))
    state = rule.initial()
    for signal in signals:
        rule.update(state, signal)
    assert float(rule.soft(state).mean()) == pytest.approx(max(p, 0.3), abs=1e-9)
    return state["logits"]


def signals(seed: int, steps: int = 12) -> Tensor:
    return torch.randn(steps, NUM_TENSORS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=st.integers(0, 2**31))
def test_what_is_frozen_is_what_gives_a_user_most_over_all_steps(seed: int) -> None:
    drawn = signals(seed)
    frozen = select_frozen(learned(drawn), torch.ones(NUM_TENSORS), 0.3)
    kept = drawn.sum(dim=0)
    # m grows where the upper loss falls with it.
    assert kept[frozen].max() < kept[~frozen].min()


@given(seed=st.integers(0, 2**31), order=st.permutations(range(12)))
def test_neither_the_order_of_steps_nor_the_scale_of_the_loss_matters(seed: int, order: list[int]) -> None:
    drawn = signals(seed)
    expected = learned(drawn)
    torch.testing.assert_close(learned(drawn[order]), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(learned(drawn * 1e-9), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), p=st.floats(0.02, 0.29))
def test_smaller_p_are_read_off_one_ranking(seed: int, p: float) -> None:
    drawn = signals(seed)
    assert torch.equal(learned(drawn, p), learned(drawn))
    assert torch.equal(learned(drawn, draw_ratios=(p, 0.05, 0.3)), learned(drawn))


def test_a_mask_of_smaller_p_holds_that_p(tiny_sd) -> None:
    names = [f"model.pretrained_model_name_or_path={tiny_sd}", "domain.illegal=[a]", "domain.legal=[b]"]
    config = load_config(None, [*names, "mask.freeze_ratio=0.05"])
    count = len(list(load_denoiser(config.model).parameters()))
    rule = make_rule("average", rule_settings(config, torch.ones(count), 0))
    state = rule.initial()
    rule.update(state, torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    mask = make_mask(config, state["logits"], rule.soft(state), 0)
    assert float(mask.soft.mean()) == pytest.approx(0.05) and int(mask.frozen.sum()) == round(0.05 * count)
    larger = make_mask(config, state["logits"], rule.soft(state), 0, 0.3)
    assert set(mask.frozen_names) < set(larger.frozen_names)


@pytest.mark.parametrize("overrides", [["mask.freeze_ratio=0.3"], ["mask.freeze_ratio=0.05", "mask.rule=budget"]])
def test_what_was_learned_at_its_own_p_is_taken_as_it_is(overrides: list[str]) -> None:
    logits, soft = torch.zeros(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    read = read_off(load_config(None, overrides).mask, logits, soft, torch.ones(4))
    assert read[0] is logits and read[1] is soft


def test_without_a_signal_no_tensor_is_preferred() -> None:
    logits = learned(torch.zeros(3, NUM_TENSORS, dtype=torch.float64))
    assert torch.isfinite(logits).all() and torch.equal(logits, logits[:1].expand_as(logits))


@pytest.mark.parametrize(
    ("rule", "part", "weights"), [("average", "learn_lower", (1.0, 0.0)), ("budget", "learn_upper", (0.5, 2.0))]
)
def test_upper_loss_is_the_rule_s(tiny_sd, rule: str, part: str, weights: tuple[float, float]) -> None:
    names = [f"model.pretrained_model_name_or_path={tiny_sd}", "domain.illegal=[a]", "domain.legal=[b]"]
    given_ = ["bilevel.illegal_weight=0.5", "bilevel.legal_weight=2"] if rule == "budget" else []
    config = load_config(None, [*names, f"mask.rule={rule}", *given_])
    parts = ["learn_lower", "learn_upper"] * 2
    data = dataclasses.replace(latent_set(4), classes=["a", "a", "b", "b"], parts=parts)
    lower, upper = batch_sources(config, data, False, 0)
    assert {parts[row] for step in range(5) for row in lower.rows(step).tolist()} == {"learn_lower"}
    assert upper is not None and {parts[row] for step in range(5) for row in upper.rows(step).tolist()} == {part}
    schedule = make_schedule(config, False, 0, 1)
    assert (schedule.illegal_weight, schedule.legal_weight) == weights


@pytest.mark.parametrize(
    "overrides",
    [
        ["bilevel.legal_weight=2"],
        ["bilevel.illegal_weight=0"],
        ["search.legal_weights=[0.5]"],
        ["search.rules=[budget,average]", "search.illegal_weights=[0.5]"],
    ],
)
def test_weights_that_would_do_nothing_are_refused(overrides: list[str]) -> None:
    with pytest.raises(RaygardError, match=r"weight.* has no effect with rule 'average'") as caught:
        load_config(None, overrides)
    assert "\n" not in str(caught.value)
