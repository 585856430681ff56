from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from raygard.config import ModelConfig
from raygard.diffusion.conditioning import Conditioning
from raygard.diffusion.loss import DiffusionLoss, Teacher, draw, held_out_loss
from raygard.diffusion.model import load_denoiser, load_noise_scheduler
from raygard.errors import RaygardError
from tests.latents import latent_set


class Constant(torch.nn.Module):
    """Predicts one fixed tensor."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(value)

    def forward(self, noisy: torch.Tensor, *_: object, return_dict: bool) -> tuple[torch.Tensor]:
        assert return_dict is False
        return (self.value.expand_as(noisy),)


def test_epsilon_and_v_targets_are_equation_1() -> None:
    scheduler = DDPMScheduler()
    eps, noise, timesteps = draw(0, "test", 0, range(5), (4, 8, 8))
    guess = torch.full((1,), 0.3)
    alpha = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    targets = {"epsilon": noise, "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * eps}
    for kind, target in targets.items():
        found = DiffusionLoss(scheduler, kind).per_sample(
            Constant(guess), eps, Conditioning(text=torch.zeros(5, 8, 16)), noise, timesteps
        )
        torch.testing.assert_close(found, (target - 0.3).square().flatten(1).mean(1))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_teachers_answers_are_the_targets_of_its_rows_and_get_no_gradient(kind: str) -> None:
    loss = DiffusionLoss(DDPMScheduler(), kind)
    eps, noise, timesteps = draw(0, "test", 0, range(5), (4, 8, 8))
    student, teacher = Constant(torch.full((1,), 0.3)), Constant(torch.full((1,), 0.5))
    arguments = (student, eps, Conditioning(text=torch.zeros(5, 8, 16)), noise, timesteps)
    rows = torch.tensor([True, False, False, True, False])
    plain, found = loss.per_sample(*arguments), loss.per_sample(*arguments, Teacher(teacher, rows))
    assert torch.equal(found[~rows], plain[~rows])
    torch.testing.assert_close(found[rows], torch.full((2,), 0.2**2))
    found.sum().backward()
    assert teacher.value.grad is None and student.value.grad is not None


@pytest.mark.parametrize(("kind", "extra"), [("epsilon", 0), ("v_prediction", 1)])
def test_min_snr_weight(kind: str, extra: int) -> None:
    scheduler = DDPMScheduler()
    eps, noise, timesteps = draw(0, "test", 0, range(6), (4, 8, 8))
    arguments = (Constant(torch.zeros(1)), eps, Conditioning(text=torch.zeros(6, 8, 16)), noise, timesteps)
    plain = DiffusionLoss(scheduler, kind).per_sample(*arguments)
    weighted = DiffusionLoss(scheduler, kind, snr_gamma=5.0).per_sample(*arguments)
    alpha = scheduler.alphas_cumprod[timesteps]
    snr = alpha / (1 - alpha)
    torch.testing.assert_close(weighted / plain, snr.clamp(max=5.0) / (snr + extra))


def test_prediction_type_without_a_loss_is_refused() -> None:
    with pytest.raises(RaygardError, match="'sample' is not supported"):
        DiffusionLoss(DDPMScheduler(prediction_type="sample"))
    assert DiffusionLoss(DDPMScheduler(prediction_type="v_prediction")).prediction_type == "v_prediction"


def test_draws_are_keyed_by_sample_and_nothing_else() -> None:
    whole = draw(3, "learn", 7, [4, 9, 11], (2, 3))
    for index, sample in enumerate([4, 9, 11]):
        for row, alone in zip(whole, draw(3, "learn", 7, [sample], (2, 3)), strict=True):
            assert torch.equal(row[index], alone[0])
    for other in (
        draw(4, "learn", 7, [4], (2, 3)),
        draw(3, "x", 7, [4], (2, 3)),
        draw(3, "learn", 8, [4], (2, 3)),
    ):
        assert not torch.equal(other[1][0], whole[1][0])
    assert not torch.equal(whole[0], whole[1])
    eps, _, timesteps = draw(0, "learn", 0, range(500), (1,), num_timesteps=10)
    assert sorted(set(timesteps.tolist())) == list(range(10))
    assert abs(float(eps.std()) - 1) < 0.1


def test_held_out_loss_is_independent_of_batch_size_and_leaves_the_model_alone(
    tiny_model: ModelConfig,
) -> None:
    unet = load_denoiser(tiny_model).train()
    data, loss = latent_set(5), DiffusionLoss(load_noise_scheduler(tiny_model))
    first = held_out_loss(unet, data, loss, 0, batch_size=5, num_draws=2)
    assert first == pytest.approx(held_out_loss(unet, data, loss, 0, batch_size=2, num_draws=2), rel=1e-5)
    assert first != held_out_loss(unet, data, loss, 1, batch_size=5, num_draws=2)
    assert unet.training and all(parameter.grad is None for parameter in unet.parameters())
    with pytest.raises(RaygardError, match="no pictures"):
        held_out_loss(unet, data.subset([]), loss, 0, 2, 1)


def test_denoiser_in_bfloat16_gives_a_float32_loss(tiny_model: ModelConfig) -> None:
    unet, loss = load_denoiser(tiny_model).to(torch.bfloat16), DiffusionLoss(load_noise_scheduler(tiny_model))
    eps, noise, timesteps = draw(0, "test", 0, range(2), (4, 8, 8))
    found = loss.per_sample(unet, eps, Conditioning(text=torch.zeros(2, 8, 16)), noise, timesteps)
    assert found.dtype == torch.float32 and torch.isfinite(found).all()


def test_prediction_type_override_reaches_the_scheduler(tiny_model: ModelConfig) -> None:
    scheduler = load_noise_scheduler(tiny_model.model_copy(update={"prediction_type": "v_prediction"}))
    assert DiffusionLoss(scheduler).prediction_type == "v_prediction"
    assert DiffusionLoss(load_noise_scheduler(tiny_model)).prediction_type == "epsilon"
    assert DiffusionLoss(scheduler).num_timesteps == 1000
