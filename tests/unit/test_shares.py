"""A global batch dealt to any number of workers: nothing is lost or repeated, and the gradient is that of the whole."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raygard.bilevel.alternation import Schedule, _objective
from raygard.bilevel.batches import BatchSource
from raygard.cluster.worker import batch_sources
from raygard.config_file import load_config
from raygard.shares import largest_share, share, weight
from tests.latents import latent_set


@given(num_shares=st.integers(1, 64), more=st.integers(0, 300))
def test_every_slot_is_in_one_share_and_shares_differ_by_one_at_most(num_shares: int, more: int) -> None:
    slots = num_shares + more
    shares = [share(slots, num_shares, index) for index in range(num_shares)]
    assert [slot for own in shares for slot in own] == list(range(slots))
    sizes = {len(own) for own in shares}
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1 and max(sizes) == largest_share(slots, num_shares)
    weights = [weight(slots, num_shares, index) for index in range(num_shares)]
    assert sum(weights) == pytest.approx(num_shares)
    if slots % num_shares == 0:
        assert set(weights) == {1.0}


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 1), (4, 2), (3, 1), (5, 1), (3, 2), (7, 1)])
@pytest.mark.parametrize("kind", ["user", "publisher"])
def test_loss_and_gradient_over_all_ranks_are_those_of_the_global_batch(
    kind, world_size: int, accumulation: int
) -> None:
    source = BatchSource(latent_set(12), [torch.arange(6)], [torch.arange(6, 12)], 16, 0, "lower")
    schedule = Schedule(1, 1, illegal_weight=0.7, legal_weight=1.3)
    factor = torch.nn.Parameter(torch.tensor(0.8))

    def engine(latents, text, noise, timesteps):
        return ((factor * latents - noise) ** 2).mean(dim=(1, 2, 3)) * (1 + timesteps)

    def gradient(world: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As an engine forms it: the mean over ranks and accumulation steps."""
        factor.grad, losses = None, []
        for rank in range(world):
            for batch in source.batches(3, rank=rank, world_size=world, accumulation=steps):
                assert batch.illegal.sum() * 2 == len(batch.illegal)
                loss, *of_roles = _objective(engine, batch, kind, schedule)
                (loss / (world * steps)).backward()
                losses.append(torch.stack(of_roles).detach() / (world * steps))
        assert factor.grad is not None
        return factor.grad.clone(), torch.stack(losses).sum(dim=0)

    whole, parts = gradient(1, 1), gradient(world_size, accumulation)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-4)


def test_batches_draw_among_the_timesteps_that_the_model_has(tiny_sd: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_sd, tmp_path / "model")
    schedule = model / "scheduler" / "scheduler_config.json"
    schedule.write_text(json.dumps({**json.loads(schedule.read_text()), "num_train_timesteps": 50}))
    names = [f"model.pretrained_model_name_or_path={model}", "domain.illegal=[a]", "domain.legal=[b]"]
    data = dataclasses.replace(latent_set(4), classes=["a", "a", "b", "b"], parts=["learn_lower", "learn_upper"] * 2)
    for source in batch_sources(load_config(None, names), data, False, 0):
        assert source is not None
        drawn = torch.cat([source.batches(step)[0].timesteps for step in range(20)])
        assert 25 < drawn.max() < 50
