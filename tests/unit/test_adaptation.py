from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import raygard
from raygard.adaptation import ADAPTATIONS, AdaptResult, full, get_adaptation, register
from raygard.config import AdaptConfig, ModelConfig
from raygard.diffusion.cache import LatentSet, TextRows
from raygard.diffusion.loss import DiffusionLoss
from raygard.diffusion.model import load_noise_scheduler, load_unet
from raygard.errors import RaygardError
from raygard.mask import FreezeMask

SETTINGS = AdaptConfig(max_train_steps=4, learning_rate=1e-3, train_batch_size=2)


def latent_set(count: int = 5) -> LatentSet:
    rng = torch.Generator().manual_seed(0)
    mean, std = torch.randn(2, count, 4, 8, 8, generator=rng)
    text = TextRows(torch.randn(2, 8, 16, generator=rng), torch.arange(count) % 2)
    return LatentSet(mean, std.abs(), text, ["a"] * count, ["x"] * count, [])


def adapted(model: ModelConfig, settings: AdaptConfig = SETTINGS, seed: int = 0, frozen: object = None,
            data: LatentSet | None = None) -> tuple[torch.nn.Module, AdaptResult]:  # fmt: skip
    unet = load_unet(model)
    mask = None if frozen is None else FreezeMask.create(unet, frozen)
    loss = DiffusionLoss(load_noise_scheduler(model))
    return unet, full(unet, latent_set() if data is None else data, settings, loss, mask=mask, seed=seed)


def states_equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(value, other[name]) for name, value in first.state_dict().items())


def test_frozen_tensors_keep_their_bits_and_cost_no_state(tiny_model: ModelConfig) -> None:
    base = dict(load_unet(tiny_model).named_parameters())
    frozen = list(base)[::2]
    unet, result = adapted(tiny_model, frozen=frozen)
    trainable = 0
    for name, parameter in unet.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, base[name]) and parameter.grad is None and not parameter.requires_grad
        else:
            trainable += parameter.numel()
    moved = [name for name, p in unet.named_parameters() if not torch.equal(p, base[name])]
    assert set(moved) == set(base) - set(frozen)
    assert result.trainable_params == trainable
    assert 8 * trainable <= result.optimizer_bytes <= 8 * trainable + 8 * len(base)


def test_training_is_deterministic_in_its_seed(tiny_model: ModelConfig) -> None:
    (first, one), (second, two), (third, _) = (adapted(tiny_model, seed=seed) for seed in (0, 0, 1))
    assert one.losses == two.losses and states_equal(first, second)
    assert not states_equal(first, third)


def test_max_train_steps_counts_optimizer_steps(tiny_model: ModelConfig) -> None:
    seen: list[tuple[int, float]] = []
    unet = load_unet(tiny_model)
    settings = SETTINGS.model_copy(update={"gradient_accumulation_steps": 3})
    result = full(
        unet, latent_set(), settings, DiffusionLoss(load_noise_scheduler(tiny_model)), mask=None, seed=0,
        on_step=lambda step, value: seen.append((step, value)),
    )  # fmt: skip
    assert seen == list(enumerate(result.losses, start=1)) and len(seen) == 4


def test_a_picture_is_seen_once_in_every_epoch(tiny_model: ModelConfig) -> None:
    data, seen = latent_set(6), []
    original = LatentSet.latents

    class Spy(LatentSet):
        def latents(self, rows: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
            seen.extend(rows.tolist())
            return original(self, rows, eps)

    spy = Spy(data.mean, data.std, data.text, data.classes, data.captions, data.parts)
    adapted(tiny_model, SETTINGS.model_copy(update={"max_train_steps": 6}), data=spy)
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    assert seen[:6] != seen[6:]


def test_one_trainable_tensor_is_enough_and_none_is_refused(tiny_model: ModelConfig) -> None:
    names = [name for name, _ in load_unet(tiny_model).named_parameters()]
    for kept in (names[0], names[-1]):
        unet, result = adapted(tiny_model, frozen=[name for name in names if name != kept])
        assert result.trainable_params == dict(unet.named_parameters())[kept].numel()
    unet = load_unet(tiny_model).requires_grad_(False)
    with pytest.raises(RaygardError, match="nothing to train"):
        full(unet, latent_set(), SETTINGS, DiffusionLoss(load_noise_scheduler(tiny_model)), mask=None, seed=0)


def test_a_loss_that_is_not_finite_stops_with_the_step(tiny_model: ModelConfig) -> None:
    data = latent_set()
    data.mean[3] = torch.nan
    with pytest.raises(RaygardError, match=r"the loss is nan at step \d of fine-tuning"):
        adapted(tiny_model, data=data)
    with pytest.raises(RaygardError, match="no pictures"):
        adapted(tiny_model, data=latent_set().subset([]))


def test_learning_rate_schedule_is_followed(tiny_model: ModelConfig) -> None:
    still = SETTINGS.model_copy(update={"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 10**9})
    base = dict(load_unet(tiny_model).named_parameters())
    unet, _ = adapted(tiny_model, still)
    for name, parameter in unet.named_parameters():
        torch.testing.assert_close(parameter, base[name], rtol=0, atol=1e-9)
    with pytest.raises(RaygardError, match=r"unknown adapt\.lr_scheduler 'constnat'; did you mean 'constant'"):
        adapted(tiny_model, SETTINGS.model_copy(update={"lr_scheduler": "constnat"}))


def test_registry_refuses_unknown_and_double_names() -> None:
    assert get_adaptation("full") is full and "full" in ADAPTATIONS
    with pytest.raises(RaygardError, match=r"unknown adaptation 'ful' .*did you mean 'full'"):
        get_adaptation("ful")
    with pytest.raises(RaygardError, match="registered twice"):
        register("full", full)


SCRIPT = """
import json, sys
import torch
from safetensors.torch import save_file
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[3])
from test_adaptation import SETTINGS, adapted
from raygard.config import ModelConfig
from accelerate import PartialState
unet, result = adapted(ModelConfig(pretrained_model_name_or_path=sys.argv[1]), frozen=["conv_in.weight"])
if PartialState().is_main_process:
    save_file(unet.state_dict(), sys.argv[2] + ".safetensors")
    open(sys.argv[2] + ".json", "w").write(json.dumps([PartialState().num_processes, result.losses]))
"""


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_two_processes_equal_one_with_twice_the_batch(tiny_model: ModelConfig, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    script, out = tmp_path / "adapt.py", tmp_path / "out"
    script.write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = str(Path(raygard.__file__).parents[1])
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", str(port), str(script),
        tiny_model.pretrained_model_name_or_path, str(out), str(Path(__file__).parent),
    ]  # fmt: skip
    # The launcher starts several processes for GPUs only; Accelerator falls back to the CPU in each of them.
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    world, losses = json.loads(out.with_suffix(".json").read_text())
    single, result = adapted(tiny_model, SETTINGS.model_copy(update={"train_batch_size": 4}), frozen=["conv_in.weight"])
    assert world == 2
    torch.testing.assert_close(losses, result.losses, rtol=1e-4, atol=1e-6)
    for name, value in load_file(out.with_suffix(".safetensors")).items():
        torch.testing.assert_close(value, single.state_dict()[name], rtol=0, atol=2e-4)
