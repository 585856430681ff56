from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import raygard
from raygard.adaptation import ADAPTATIONS, AdaptResult, full, get_adaptation, register
from raygard.cluster.evaluators import TOKEN, Adaptation, GeneratorActor, PictureRequest, adapt_task
from raygard.config import AdaptConfig, ModelConfig
from raygard.diffusion.cache import LatentSet
from raygard.diffusion.loss import DiffusionLoss
from raygard.diffusion.model import load_denoiser, load_noise_scheduler
from raygard.errors import RaygardError
from raygard.mask import FreezeMask
from raygard.store import Store
from tests.evaluation_bench import PARTS, Bench, make_bench
from tests.latents import latent_set

SETTINGS = AdaptConfig(max_train_steps=4, learning_rate=1e-3, train_batch_size=2)


def adapted(model: ModelConfig, settings: AdaptConfig = SETTINGS, seed: int = 0, frozen: object = None,
            data: LatentSet | None = None) -> tuple[torch.nn.Module, AdaptResult]:  # fmt: skip
    unet = load_denoiser(model)
    mask = None if frozen is None else FreezeMask.create(unet, frozen)
    loss = DiffusionLoss(load_noise_scheduler(model))
    return unet, full(unet, latent_set() if data is None else data, settings, loss, mask=mask, seed=seed)


def states_equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(value, other[name]) for name, value in first.state_dict().items())


def test_frozen_tensors_keep_their_bits_and_cost_no_state(tiny_model: ModelConfig) -> None:
    base = dict(load_denoiser(tiny_model).named_parameters())
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
    unet = load_denoiser(tiny_model)
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

    spy = Spy(data.mean, data.std, data.conditioning, data.classes, data.captions, data.parts)
    adapted(tiny_model, SETTINGS.model_copy(update={"max_train_steps": 6}), data=spy)
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    assert seen[:6] != seen[6:]


def test_one_trainable_tensor_is_enough_and_none_is_refused(tiny_model: ModelConfig) -> None:
    names = [name for name, _ in load_denoiser(tiny_model).named_parameters()]
    for kept in (names[0], names[-1]):
        unet, result = adapted(tiny_model, frozen=[name for name in names if name != kept])
        assert result.trainable_params == dict(unet.named_parameters())[kept].numel()
    unet = load_denoiser(tiny_model).requires_grad_(False)
    with pytest.raises(RaygardError, match="nothing to train"):
        full(unet, latent_set(), SETTINGS, DiffusionLoss(load_noise_scheduler(tiny_model)), mask=None, seed=0)


def test_a_loss_that_is_not_finite_stops_with_the_step(tiny_model: ModelConfig) -> None:
    data = latent_set()
    data.mean[3] = torch.nan
    with pytest.raises(RaygardError, match=r"the loss is nan at step \d of fine-tuning"):
        adapted(tiny_model, data=data)
    with pytest.raises(RaygardError, match="no pictures"):
        adapted(tiny_model, data=latent_set().subset([]))


def test_precision_of_an_adaptation_does_not_outlive_it(tiny_model: ModelConfig) -> None:
    alone, result = adapted(tiny_model)
    mixed, _ = adapted(tiny_model, SETTINGS.model_copy(update={"mixed_precision": "bf16"}))
    after, again = adapted(tiny_model)
    assert states_equal(alone, after) and result.losses == again.losses
    assert not states_equal(alone, mixed)
    plain = load_denoiser(tiny_model).eval()
    plain.load_state_dict(mixed.state_dict())
    sample, text = torch.ones(1, 4, 8, 8), torch.ones(1, 8, 16)
    assert torch.equal(mixed(sample, 1, text).sample, plain(sample, 1, text).sample)


def test_gradients_of_a_broken_adaptation_are_not_added(tiny_model: ModelConfig) -> None:
    settings = SETTINGS.model_copy(update={"gradient_accumulation_steps": 3, "train_batch_size": 1})
    alone, _ = adapted(tiny_model, settings)
    broken, good, loss = latent_set(), latent_set(), DiffusionLoss(load_noise_scheduler(tiny_model))
    unet = load_denoiser(tiny_model)
    base = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    finite: list[int] = []

    class Spy(LatentSet):
        def latents(self, rows: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
            finite.append(len(finite))
            return super().latents(rows, eps) * (torch.nan if len(finite) == 2 else 1)

    spy = Spy(broken.mean, broken.std, broken.conditioning, broken.classes, broken.captions, broken.parts)
    with pytest.raises(RaygardError, match="the loss is nan at step 1"):
        full(unet, spy, settings, loss, mask=None, seed=0)
    unet.load_state_dict(base)
    full(unet, good, settings, loss, mask=None, seed=0)
    assert states_equal(alone, unet)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_maker, imagefolder_maker) -> Bench:
    return make_bench(tmp_path_factory.mktemp("bench"), tiny_maker, imagefolder_maker)


def run_task(bench: Bench, store: Path, *overrides: str, untouched: bool = False) -> list[dict]:
    """What an adaptation task reports that runs in this process."""
    config = bench.config(*overrides)
    inputs = bench.inputs(config, store)
    adaptation = Adaptation(
        key="k", store=str(store), config=inputs.config, cache=inputs.cache, cls="a", adapt_part=PARTS[0],
        reference_part=PARTS[1], seed=0, mask=None, untouched=untouched, milestones=(0,) if untouched else (0, 2, 4),
        held_out="h",
    )  # fmt: skip
    return list(adapt_task(adaptation))


def milestones(reports: list[dict]) -> list[tuple[int, float]]:
    return [(report["step"], report["loss"]) for report in reports if "step" in report]


def test_adaptations_that_share_a_process_do_not_touch_each_other(bench: Bench, tmp_path: Path) -> None:
    base = milestones(run_task(bench, tmp_path / "base", untouched=True))
    alone = milestones(run_task(bench, tmp_path / "alone"))
    mixed = milestones(run_task(bench, tmp_path / "mixed", "adapt.mixed_precision=bf16"))
    with pytest.raises(RaygardError, match="the loss is"):
        run_task(bench, tmp_path / "broken", "adapt.learning_rate=1e30", "adapt.gradient_accumulation_steps=2")
    assert milestones(run_task(bench, tmp_path / "base again", untouched=True)) == base
    assert milestones(run_task(bench, tmp_path / "after")) == alone
    assert alone[0] == mixed[0] == base[0] and alone[1:] != mixed[1:]
    first, second = (load_file(Store(tmp_path / name).tensors_file("k")) for name in ("alone", "after"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_an_adapter_reaches_the_store_merged_into_the_release(bench: Bench, tmp_path: Path) -> None:
    reports = run_task(bench, tmp_path, "adapt.method=lora", "adapt.learning_rate=0.01")
    losses = [loss for _, loss in milestones(reports)]
    assert len(set(losses)) == 3
    changed = load_file(Store(tmp_path).tensors_file("k"))
    attention = [name for name, _ in load_denoiser(bench.config().model).named_parameters() if ".attn" in name]
    assert changed.keys() == {name for name in attention if name.endswith("weight")}


def test_a_generator_forgets_the_word_another_adaptation_taught_it(bench: Bench, tmp_path: Path) -> None:
    config = bench.config()
    actor = GeneratorActor(config.model.model_dump(mode="json"), 1, 0)
    actor.ready()
    save_file({f"{TOKEN}<x>": torch.full((16,), 3.0)}, str(tmp_path / "taught.safetensors"))

    def drawn(adapted: str | None) -> list[int]:
        request = PictureRequest(adapted, ("<x>",), ("k",), config.generation.model_dump(mode="json"), 0)
        return actor.generate(request)[1].flatten().tolist()

    before, taught = drawn(None), drawn(str(tmp_path / "taught.safetensors"))
    assert before != taught and before == drawn(None)


def test_a_long_adaptation_gives_signs_of_life(bench: Bench, tmp_path: Path) -> None:
    signs = [r["alive"] for r in run_task(bench, tmp_path, "evaluation.item_timeout_s=0.001") if "alive" in r]
    # Each step takes longer than a tenth of the limit.
    assert signs == [0, 0, 1, 2, 3, 4]
    prior = ("adapt.method=dreambooth", "adapt.instance_prompt=x", "adapt.class_prompt=q", "adapt.num_class_images=9")
    options = ("evaluation.item_timeout_s=0.001", *prior, "adapt.max_train_steps=1")
    signs = [r["alive"] for r in run_task(bench, tmp_path / "prior", *options) if "alive" in r]
    # Nine class pictures are two batches.
    assert signs == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_an_adaptation_that_pauses_equals_a_straight_one(tiny_model: ModelConfig, tmp_path: Path, accumulation) -> None:
    settings = SETTINGS.model_copy(
        update={"lr_scheduler": "cosine", "gradient_accumulation_steps": accumulation, "max_train_steps": 5}
    )
    straight, whole = adapted(tiny_model, settings, frozen=["conv_in.weight"])
    loss, data = DiffusionLoss(load_noise_scheduler(tiny_model)), latent_set()
    state = None
    for pause_at in (2, 3, None):
        # Each stretch begins with the released model, as it does in a process of its own.
        unet = load_denoiser(tiny_model)
        mask = FreezeMask.create(unet, ["conv_in.weight"])
        part = full(unet, data, settings, loss, mask=mask, seed=0, pause_at=pause_at, resume=state)
        Store(tmp_path).write_paused("key", part.paused or {})
        state = Store(tmp_path).paused("key")
    assert part.paused is None and part.losses == whole.losses and states_equal(unet, straight)
    assert part.optimizer_bytes == whole.optimizer_bytes


def test_learning_rate_schedule_is_followed(tiny_model: ModelConfig) -> None:
    still = SETTINGS.model_copy(update={"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 10**9})
    base = dict(load_denoiser(tiny_model).named_parameters())
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
