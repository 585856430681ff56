"""Options that make an adaptation smaller or faster: gradient checkpointing, the fused and the 8-bit optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import workers
from benchmarks.memory import TINY
from benchmarks.user_savings import choose, moment_bytes, train
from raygard.adaptation import ADAPTATIONS, AdaptResult, Release, get_adaptation
from raygard.config import AdaptConfig, ModelConfig
from raygard.config_file import load_config
from raygard.diffusion.loss import DiffusionLoss
from raygard.diffusion.model import load_denoiser, load_noise_scheduler
from raygard.errors import RaygardError
from raygard.mask import FreezeMask
from raygard.store import Store
from tests.latents import equal, latent_set

STEPS = {"max_train_steps": 4, "learning_rate": 1e-3, "train_batch_size": 2, "gradient_accumulation_steps": 1}
PARTS = {"class_prompt": "q", "num_class_images": 2}
METHODS = [(name, {}) for name in sorted(ADAPTATIONS)]
# bitsandbytes keeps moments of smaller tensors in float32.
SMALLEST_8BIT = 4096


def adapted(
    model: ModelConfig,
    method: str,
    mask: FreezeMask | None = None,
    unet: Any = None,
    watch: Any = None,
    data: Any = None,
    **options: Any,
) -> tuple[Any, AdaptResult]:
    """A user of the tiny model. options: settings of `adapt`, and `pause_at` and `resume`."""
    run = {key: options.pop(key) for key in ("pause_at", "resume") if key in options}
    unet = load_denoiser(model) if unet is None else unet
    config, loss = AdaptConfig(method=method, **{**STEPS, **options}), DiffusionLoss(load_noise_scheduler(model))
    on_step = None if watch is None else lambda *_: watch(unet)
    result = get_adaptation(method)(
        unet, data or latent_set(), config, loss, mask=mask, seed=0, release=Release(model), on_step=on_step, **run
    )
    return unet, result


def states(unet: Any, result: AdaptResult) -> dict[str, torch.Tensor]:
    return {**unet.state_dict(), **result.adapter, **result.embeddings}


def source(folder: Path) -> ModelConfig:
    return ModelConfig(pretrained_model_name_or_path=str(folder))


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """All in nested dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet of which most tensors are large enough for moments of 8 bits."""
    return workers.make_model(tmp_path_factory.mktemp("wider"), **TINY)


@pytest.fixture(scope="module")
def front(tiny_model: ModelConfig) -> FreezeMask:
    """The tensors that come first are frozen, so that the first blocks have nothing to differentiate."""
    names = [name for name, _ in load_denoiser(tiny_model).named_parameters()]
    return FreezeMask.create(load_denoiser(tiny_model), names[: len(names) // 3])


# Gradient checkpointing


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("method", "options"), [*METHODS, ("dreambooth", PARTS), ("custom-diffusion", PARTS)])
def test_gradient_checkpointing_changes_no_result(
    tiny_model: ModelConfig, front: FreezeMask, method: str, options: dict[str, Any], masked: bool
) -> None:
    mask, found, passes = front if masked else None, [], []
    for checkpointing in (False, True):
        unet, calls, seen = load_denoiser(tiny_model), [], []
        block = unet.up_blocks[0].resnets[0]
        block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        _, result = adapted(
            tiny_model, method, mask, unet, lambda model, seen=seen: seen.append(model.is_gradient_checkpointing),
            gradient_checkpointing=checkpointing, **options,
        )  # fmt: skip
        assert seen == [checkpointing] * 4 and not unet.is_gradient_checkpointing
        found.append((states(unet, result), result.losses, result.optimizer_bytes))
        passes.append(calls.count(True))
    assert equal(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]
    # Every block runs once more for its backward pass.
    assert passes == [4, 8]


def test_a_model_that_checkpoints_gradients_goes_on_with_it(tiny_model: ModelConfig) -> None:
    unet = load_denoiser(tiny_model)
    unet.enable_gradient_checkpointing()
    adapted(tiny_model, "full", unet=unet)
    assert unet.is_gradient_checkpointing
    adapted(tiny_model, "full", unet=unet, gradient_checkpointing=True)
    assert unet.is_gradient_checkpointing


def test_an_adaptation_that_breaks_off_leaves_checkpointing_off(tiny_model: ModelConfig) -> None:
    unet = load_denoiser(tiny_model)
    with pytest.raises(RaygardError, match="the loss is"):
        adapted(tiny_model, "full", unet=unet, gradient_checkpointing=True, learning_rate=1e30)
    assert not unet.is_gradient_checkpointing


# Optimizers


@pytest.mark.parametrize(("optimizer", "tolerance"), [("adamw-fused", 1e-5), ("adamw-8bit", 0.1)])
def test_the_optimizers_take_adamws_steps(tiny_model: ModelConfig, optimizer: str, tolerance: float) -> None:
    if optimizer == "adamw-8bit":
        pytest.importorskip("bitsandbytes")
    settings = {"adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-6, "adam_weight_decay": 0.1}
    base = load_denoiser(tiny_model)
    plain, _ = adapted(tiny_model, "full", **settings)
    own, result = adapted(tiny_model, "full", optimizer=optimizer, **settings)
    assert result.trainable_params == sum(p.numel() for p in base.parameters())
    steps = [torch.cat([(m.get_parameter(n) - p).flatten() for n, p in base.named_parameters()]) for m in (own, plain)]
    assert not torch.equal(*steps)
    assert (steps[0] - steps[1]).norm() < tolerance * steps[1].norm()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_moments_of_eight_bits_are_counted_as_they_are(wider: Path, p: float) -> None:
    pytest.importorskip("bitsandbytes")
    sizes = [parameter.numel() for parameter in load_denoiser(source(wider)).parameters()]
    trained = [size for size, held in zip(sizes, choose(sizes, "count", p, 0), strict=True) if not held]
    assert sum(size >= SMALLEST_8BIT for size in trained) > 10
    found = train(wider, 0, "count", p, "8-bit")
    # Two tables of the 256 numbers that eight bits stand for, which all tensors share.
    assert found["optimizer_bytes"] == moment_bytes(trained, "adamw-8bit") + 2 * 4 * 256
    assert found["trainable_params"] == sum(trained)
    plain = train(wider, 0, "count", p, "none")["optimizer_bytes"]
    assert plain == moment_bytes(trained, "adamw") + 4 * len(trained)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_eight_bits_are_taken_up_again_where_they_were(wider: Path, tmp_path: Path, method: str) -> None:
    pytest.importorskip("bitsandbytes")
    data, model = workers.random_latents(wider), source(wider)
    options = {"optimizer": "adamw-8bit", "lr_scheduler": "cosine"} | ({"rank": 256} if method == "lora" else {})
    straight, whole = adapted(model, method, data=data, **options)
    _, first = adapted(model, method, data=data, pause_at=2, **options)
    assert first.paused is not None
    assert any(t.dtype == torch.uint8 for t in tensors(first.paused["optimizer"]))
    Store(tmp_path).write_paused("key", first.paused)
    unet, second = adapted(model, method, data=data, resume=Store(tmp_path).paused("key"), **options)
    assert second.losses == whole.losses and second.optimizer_bytes == whole.optimizer_bytes
    assert equal(states(unet, second), states(straight, whole))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-fused", "adamw-8bit"])
@pytest.mark.parametrize("method", ["full", "lora", "custom-diffusion"])
def test_a_pause_changes_no_result_under_any_option(
    tiny_model: ModelConfig, front: FreezeMask, tmp_path: Path, optimizer: str, method: str
) -> None:
    if optimizer == "adamw-8bit":
        pytest.importorskip("bitsandbytes")
    options = {"optimizer": optimizer, "gradient_checkpointing": True, "lr_scheduler": "cosine"}
    straight, whole = adapted(tiny_model, method, front, **options)
    state = None
    for pause_at in (1, 3, None):
        unet, part = adapted(tiny_model, method, front, pause_at=pause_at, resume=state, **options)
        Store(tmp_path).write_paused("key", part.paused or {})
        state = Store(tmp_path).paused("key")
    assert part.paused is None and part.losses == whole.losses
    assert equal(states(unet, part), states(straight, whole))
    assert part.optimizer_bytes == whole.optimizer_bytes


def test_a_missing_package_is_named_before_anything_is_drawn_or_trained(
    tiny_model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raygard.errors.find_spec", lambda name: None)
    monkeypatch.setattr("raygard.adaptation.prior.generate", pytest.fail)
    message = r"adapt\.optimizer=adamw-8bit needs bitsandbytes: pip install 'raygard\[8bit\]'"
    with pytest.raises(RaygardError, match=message):
        adapted(tiny_model, "dreambooth", optimizer="adamw-8bit", **PARTS)
    adapted(tiny_model, "full", optimizer="adamw-fused")


# Configuration


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapt.optimizer=adamw-fused", "adapt.sgd_momentum=0.9"], "no effect with adapt.optimizer=adamw-fused"),
        (["adapt.optimizer=adamw-8bit", "adapt.sgd_momentum=0.9"], "no effect with adapt.optimizer=adamw-8bit"),
        (
            ["adapt.optimizer=adamw-8bit", "adapt.method=textual-inversion"],
            "adapt.optimizer=adamw-8bit has no effect with adapt.method=textual-inversion",
        ),
        (["adapt.optimizer=adam8bit"], "adapt.optimizer"),
    ],
)
def test_options_without_effect_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RaygardError, match=message):
        load_config(None, overrides)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-fused", "adamw-8bit"])
def test_settings_of_adamw_are_those_of_all_its_kinds(optimizer: str) -> None:
    config = load_config(None, [f"adapt.optimizer={optimizer}", "adapt.adam_beta1=0.5"])
    assert (config.adapt.optimizer, config.adapt.adam_beta1) == (optimizer, 0.5)


def test_checkpointing_has_a_place_of_its_own_in_the_store_and_moves_no_other(
    tmp_path: Path, tiny_maker: Callable[..., Any], imagefolder_maker: Callable[..., Any]
) -> None:
    from raygard.cluster.jobs import EvaluationJob, job_content
    from tests.evaluation_bench import make_bench

    bench = make_bench(tmp_path, tiny_maker, imagefolder_maker)
    job = EvaluationJob("freeze", "a", "illegal")
    off, on = (bench.config(f"adapt.gradient_checkpointing={value}") for value in ("false", "true"))
    contents = [job_content(job, bench.inputs(each, tmp_path / "s"), each, None, ["x"])["adapt"] for each in (off, on)]
    assert "gradient_checkpointing" not in contents[0]
    assert contents[1] == {**contents[0], "gradient_checkpointing": True}
