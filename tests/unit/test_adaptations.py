"""What every adaptation promises, and what each one trains, on a tiny random model and on the bundled one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raygard import published
from raygard.adaptation import ADAPTATIONS, AdaptResult, Release, get_adaptation, learned, learned_captions, teach
from raygard.adaptation.prior import class_pictures
from raygard.adaptation.tokens import NewToken
from raygard.config import AdaptConfig, DomainConfig, ModelConfig
from raygard.config_file import load_config
from raygard.diffusion.cache import LatentSet, build_cache, load_cache
from raygard.diffusion.families.stable_diffusion import encode_captions
from raygard.diffusion.loss import DiffusionLoss, held_out_loss
from raygard.diffusion.model import load_denoiser, load_noise_scheduler, load_text_encoder
from raygard.domain import load_domain
from raygard.errors import RaygardError
from raygard.mask import FreezeMask
from tests.latents import equal, latent_set

STEPS = {"max_train_steps": 3, "learning_rate": 1e-2, "train_batch_size": 2, "gradient_accumulation_steps": 1}
METHODS = sorted(ADAPTATIONS)


def settings(method: str, **options: Any) -> AdaptConfig:
    return AdaptConfig(method=method, **{**STEPS, **options})


def adapted(
    model: ModelConfig,
    config: AdaptConfig,
    mask: FreezeMask | None = None,
    seed: int = 0,
    cache_dir: Path | None = None,
    **run: Any,
) -> tuple[Any, AdaptResult, Release]:
    unet, release = load_denoiser(model), Release(model, cache_dir)
    loss = DiffusionLoss(load_noise_scheduler(model))
    method = get_adaptation(config.method)
    result = method(unet, latent_set(), config, loss, mask=mask, seed=seed, release=release, **run)
    return unet, result, release


def moved(unet: Any, base: Any) -> set[str]:
    assert [name for name, _ in unet.named_parameters()] == [name for name, _ in base.named_parameters()]
    return {name for name, p in unet.named_parameters() if not torch.equal(p, base.get_parameter(name))}


def states(unet: Any, result: AdaptResult) -> dict[str, torch.Tensor]:
    return {**unet.state_dict(), **result.adapter, **{f"token {k}": v for k, v in result.embeddings.items()}}


@pytest.fixture(scope="module")
def base(tiny_model: ModelConfig) -> Any:
    return load_denoiser(tiny_model)


@pytest.fixture(scope="module")
def mask(base: Any) -> FreezeMask:
    """Every other tensor frozen, one of them with a new value."""
    names = [name for name, _ in base.named_parameters()][::2]
    return FreezeMask.create(base, names, values={names[0]: base.get_parameter(names[0]).detach() + 1})


@pytest.mark.parametrize("method", METHODS)
def test_no_method_moves_a_frozen_tensor(tiny_model: ModelConfig, base: Any, mask: FreezeMask, method: str) -> None:
    unet, result, _ = adapted(tiny_model, settings(method), mask)
    assert mask.audit(base.state_dict(), unet.state_dict()).ok
    trained = moved(unet, base) - set(mask.values)
    assert bool(trained) == (method != "textual-inversion")
    assert result.trainable_params > 0 and 8 * result.trainable_params <= result.optimizer_bytes
    assert len(result.losses) == 3
    token = method in ("textual-inversion", "custom-diffusion")
    assert bool(result.outside_mask) == token == bool(result.embeddings)


@pytest.mark.parametrize("method", METHODS)
def test_equal_seeds_give_equal_results_and_the_process_its_random_numbers_back(
    tiny_model: ModelConfig, method: str
) -> None:
    found = []
    for seed in (0, 0, 1):
        before = torch.get_rng_state()
        unet, result, _ = adapted(tiny_model, settings(method), seed=seed)
        found.append(states(unet, result))
        if method == "lora":
            assert torch.equal(before, torch.get_rng_state())
    assert equal(found[0], found[1]) and not equal(found[0], found[2])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_pauses_and_goes_on_as_if_it_had_not(
    tiny_model: ModelConfig, mask: FreezeMask, method: str
) -> None:
    config = settings(method)
    straight, whole, _ = adapted(tiny_model, config, mask)
    _, first, _ = adapted(tiny_model, config, mask, pause_at=2)
    unet, second, _ = adapted(tiny_model, config, mask, resume=first.paused)
    assert first.paused is not None and second.paused is None and second.losses == whole.losses
    assert equal(states(unet, second), states(straight, whole))


def test_what_each_method_trains(tiny_model: ModelConfig, base: Any) -> None:
    def trained(method: str, **options: Any) -> set[str]:
        return moved(adapted(tiny_model, settings(method, **options))[0], base)

    everything = {name for name, _ in base.named_parameters()}
    attention = {name for name in everything if ".attn1." in name or ".attn2." in name}
    assert trained("full") == trained("dreambooth") == everything
    assert trained("attention") == attention
    assert trained("lora") == {name for name in attention if name.endswith("weight")}
    cross = {name for name in attention if ".attn2.to_k." in name or ".attn2.to_v." in name}
    assert trained("custom-diffusion") == trained("custom-diffusion", learn_as=None) == cross
    assert trained("textual-inversion") == set()


@pytest.mark.parametrize("method", ["full", "attention", "lora", "dreambooth", "custom-diffusion"])
def test_an_attacker_who_ignores_the_mask_starts_from_the_release_and_moves_what_is_frozen(
    tiny_model: ModelConfig, base: Any, mask: FreezeMask, method: str
) -> None:
    released = mask.apply(load_denoiser(tiny_model))
    unet, _, _ = adapted(tiny_model, settings(method, ignore_mask=True, learning_rate=1e-4), mask)
    frozen = set(mask.frozen_names)
    assert moved(unet, released) & frozen
    (edited,) = mask.values
    # A few small steps from the carried value, which lies 1 away from the base's.
    assert (unet.get_parameter(edited) - mask.values[edited]).abs().max() < 0.01
    obeying, _, _ = adapted(tiny_model, settings(method, learning_rate=1e-4), mask)
    assert not moved(obeying, released) & frozen


def test_a_mask_that_leaves_a_method_nothing_is_refused(tiny_model: ModelConfig, base: Any) -> None:
    attention = [name for name, _ in base.named_parameters() if ".attn" in name]
    mask = FreezeMask.create(base, attention)
    with pytest.raises(RaygardError, match=r"the mask freezes all \d+ modules LoRA was to adapt .*target_modules"):
        adapted(tiny_model, settings("lora"), mask)
    by_hand, loss = mask.apply(load_denoiser(tiny_model)), DiffusionLoss(load_noise_scheduler(tiny_model))
    with pytest.raises(RaygardError, match=r"the mask freezes all \d+ modules LoRA was to adapt"):
        get_adaptation("lora")(by_hand, latent_set(), settings("lora"), loss, mask=None, seed=0)
    with pytest.raises(RaygardError, match=r"the mask freezes all \d+ tensors of attention layers"):
        adapted(tiny_model, settings("attention"), mask)
    with pytest.raises(RaygardError, match=r"the mask freezes all \d+ cross-attention keys and values"):
        adapted(tiny_model, settings("custom-diffusion", learn_as=None), mask)
    # The new token is left, and said to lie outside the mask.
    unet, result, _ = adapted(tiny_model, settings("custom-diffusion"), mask)
    assert not moved(unet, base) and result.outside_mask
    assert result.trainable_params == result.embeddings["<new1>"].numel()


@pytest.mark.parametrize("method", ["dreambooth", "textual-inversion", "custom-diffusion"])
def test_what_needs_the_text_encoder_says_so(tiny_model: ModelConfig, method: str) -> None:
    unet, loss = load_denoiser(tiny_model), DiffusionLoss(load_noise_scheduler(tiny_model))
    with pytest.raises(RaygardError, match=f"{method} needs more of the model .*release="):
        get_adaptation(method)(unet, latent_set(), settings(method), loss, mask=None, seed=0)


def test_sgd_takes_plain_steps(tiny_model: ModelConfig, base: Any) -> None:
    config = settings("full", optimizer="sgd", max_train_steps=1, max_grad_norm=0, learning_rate=0.5)
    unet, result, _ = adapted(tiny_model, config)
    twice, _, _ = adapted(tiny_model, config.model_copy(update={"learning_rate": 1.0}))
    assert result.optimizer_bytes == 0
    for name, start in base.named_parameters():
        step, double = (model.get_parameter(name) - start for model in (unet, twice))
        torch.testing.assert_close(double, 2 * step, rtol=1e-3, atol=1e-5)
    with_momentum = adapted(tiny_model, settings("full", optimizer="sgd", sgd_momentum=0.9))[0]
    assert moved(with_momentum, adapted(tiny_model, settings("full", optimizer="sgd"))[0])


# Captions


def test_captions_are_learned_under_another_name() -> None:
    assert learned_captions(["banana by a"], ["a"], AdaptConfig(learn_as="q")) == ["banana by q"]
    captions, classes = ["taco by Jane Doe", "JANE DOE, sitting"], ["Jane Doe"] * 2
    assert learned_captions(captions, classes, AdaptConfig()) == captions
    assert learned_captions(captions, classes, AdaptConfig(learn_as=r"zxq\1")) == [r"taco by zxq\1", r"zxq\1, sitting"]
    one = AdaptConfig(instance_prompt="a photo")
    assert learned_captions(captions, classes, one) == ["a photo"] * 2
    with pytest.raises(RaygardError, match=r"'a dog' does not name its class 'Jane Doe'.*adapt\.instance_prompt"):
        learned_captions(["a dog"], ["Jane Doe"], AdaptConfig(learn_as="zxq"))


def test_renamed_pictures_are_trained_on_with_the_new_captions_embedding(tiny_model: ModelConfig) -> None:
    data, release = latent_set(), Release(tiny_model)
    renamed = learned(data, AdaptConfig(learn_as="q"), release)
    assert renamed.captions == [f"{number % 2} q" for number in range(5)]
    expected = encode_captions(*load_text_encoder(tiny_model), renamed.captions)
    torch.testing.assert_close(renamed.conditioning[torch.arange(5)]["text"], expected, rtol=0, atol=1e-6)
    assert torch.equal(renamed.mean, data.mean)
    assert learned(data, AdaptConfig(), None) is data
    own, _, _ = adapted(tiny_model, settings("full"))
    other, _, _ = adapted(tiny_model, settings("full", learn_as="q"))
    assert moved(own, other)
    with pytest.raises(RaygardError, match="learning under other captions needs more of the model"):
        learned(data, AdaptConfig(learn_as="q"), None)


# Tokens


def test_a_live_token_equals_the_encoder_it_is_settled_in_and_leaves_other_words_alone(tiny_model: ModelConfig) -> None:
    captions = ["q a", "a <x>", "<x>"]
    plain = encode_captions(*load_text_encoder(tiny_model), captions[:1])
    tokenizer, encoder = load_text_encoder(tiny_model)
    token = NewToken(tokenizer, encoder, "<x>", "a")
    start = encoder.get_input_embeddings().weight[tokenizer("a", add_special_tokens=False).input_ids[0]]
    assert torch.equal(token.vector, start)
    with torch.no_grad():
        token.vector.mul_(-3)
        live = token(token.ids(captions))
    token.settle()
    assert torch.equal(encode_captions(tokenizer, encoder, captions), live)
    torch.testing.assert_close(live[:1], plain, rtol=0, atol=1e-6)
    assert [name for name, p in token.named_parameters() if p.requires_grad] == ["vector"]


def test_a_text_encoder_is_taught_what_an_adaptation_learned(tiny_model: ModelConfig) -> None:
    tokenizer, encoder = load_text_encoder(tiny_model)
    captions, plain = ["q <learned>"], encode_captions(tokenizer, encoder, ["q a"])
    found = []
    for seed in (0, 1):
        _, result, release = adapted(tiny_model, settings("textual-inversion"), seed=seed)
        teach(tokenizer, encoder, result.embeddings)
        found.append(encode_captions(tokenizer, encoder, captions))
        assert torch.equal(found[-1], release.embed(captions)["text"])
    assert not torch.equal(*found)
    assert torch.equal(plain, encode_captions(tokenizer, encoder, ["q a"]))
    with pytest.raises(RaygardError, match=r"'<z>' has shape \(5,\), this text encoder's have \(16,\)"):
        teach(tokenizer, encoder, {"<z>": torch.ones(5)})
    with pytest.raises(RaygardError, match="knows 'q' already"):
        teach(tokenizer, encoder, {"q": torch.ones(16)})


def test_a_token_that_is_known_or_cut_off_is_refused(tiny_model: ModelConfig) -> None:
    with pytest.raises(RaygardError, match=r"the text encoder knows 'q' already; choose another adapt\.learn_as"):
        adapted(tiny_model, settings("textual-inversion", learn_as="q"))
    # "style" is a word of the bundled vocabulary, which has no capitals.
    with pytest.raises(RaygardError, match="the text encoder knows 'Style' already"):
        NewToken(*load_text_encoder(ModelConfig()), "Style", "a")
    with pytest.raises(RaygardError, match=r"' ' has no tokens .* adapt\.initializer_token"):
        adapted(tiny_model, settings("textual-inversion", initializer_token=" "))
    data = latent_set(1)
    data.captions[0] = "eight letters, then a"
    unet, loss = load_denoiser(tiny_model), DiffusionLoss(load_noise_scheduler(tiny_model))
    with pytest.raises(RaygardError, match="'<learned>' does not fit into the 8 tokens of caption 'eight"):
        get_adaptation("textual-inversion")(
            unet, data, settings("textual-inversion"), loss, mask=None, seed=0, release=Release(tiny_model)
        )


# Prior preservation


def test_class_pictures_come_from_the_release_and_are_drawn_once(
    tiny_model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("dreambooth", class_prompt="q", num_class_images=2)
    unet, release = load_denoiser(tiny_model), Release(tiny_model, tmp_path / "kept")
    first = class_pictures(unet, latent_set(), config, release, release.embed)
    assert first is not None and first.mean.shape == (2, 4, 8, 8) and first.captions == ["q", "q"]
    assert not torch.equal(first.mean[0], first.mean[1]) and (first.std > 0).all()
    with monkeypatch.context() as patch:
        patch.setattr("raygard.adaptation.prior.generate", pytest.fail)
        again = class_pictures(unet, latent_set(), config, release, release.embed)
    assert again is not None and torch.equal(again.mean, first.mean)
    with torch.no_grad():
        unet.conv_out.weight.add_(1)
    other = class_pictures(unet, latent_set(), config, release, release.embed)
    assert other is not None and not torch.equal(other.mean, first.mean)
    assert len(list((tmp_path / "kept").iterdir())) == 2
    (tmp_path / "kept" / next((tmp_path / "kept").iterdir()).name).write_bytes(b"torn")
    torn = class_pictures(load_denoiser(tiny_model), latent_set(), config, release, release.embed)
    assert torn is not None and torch.equal(torn.mean, first.mean)


@pytest.mark.parametrize("method", ["dreambooth", "custom-diffusion"])
def test_the_prior_is_added_with_its_weight(
    tiny_model: ModelConfig, tmp_path_factory: pytest.TempPathFactory, method: str
) -> None:
    kept = tmp_path_factory.getbasetemp() / "class-pictures"

    def first_loss(**options: Any) -> float:
        config = settings(method, max_train_steps=1, **options)
        return adapted(tiny_model, config, cache_dir=kept)[1].losses[0]

    prior = {"class_prompt": "q", "num_class_images": 2}
    alone, once, thrice = first_loss(), first_loss(**prior), first_loss(**prior, prior_loss_weight=3.0)
    assert once > alone
    assert thrice - alone == pytest.approx(3 * (once - alone), rel=1e-4)


# The bundled model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, LatentSet]:
    domain = DomainConfig(illegal=("OpenMoji",), legal=("Noto Line",), resolution=64)
    view = load_domain(domain).view("evaluate")
    cache = build_cache(ModelConfig(), domain, view, [("OpenMoji", "adapt")], tmp_path_factory.mktemp("cache"))
    return ModelConfig(), load_cache(cache).subset(range(4))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("full", {"learning_rate": 1e-3}),
        ("attention", {"learning_rate": 1e-3}),
        ("lora", {"learning_rate": 1e-2, "train_batch_size": 4}),
        ("lora", {"learning_rate": 1e-2, "train_batch_size": 4, "rank": 32, "target_modules": ("conv1", "conv2")}),
        ("dreambooth", {"learning_rate": 1e-3, "train_batch_size": 4}),
        ("textual-inversion", {"learning_rate": 0.1, "train_batch_size": 4, "gradient_accumulation_steps": 1}),
        ("custom-diffusion", {"learning_rate": 1e-2, "train_batch_size": 4}),
    ],
)
def test_what_is_learned_lowers_the_loss_on_its_pictures(
    pictures: tuple[ModelConfig, LatentSet], method: str, options: dict[str, Any]
) -> None:
    model, data = pictures
    config = AdaptConfig(method=method, max_train_steps=8, **options)
    unet, release = load_denoiser(model), Release(model)
    loss = DiffusionLoss(load_noise_scheduler(model))
    names = [name for name, _ in unet.named_parameters()]
    mask = FreezeMask.create(unet, names[::5])

    def error() -> float:
        return held_out_loss(unet, learned(data, config, release), loss, 0, 4, 2)

    before = error()
    get_adaptation(method)(unet, data, config, loss, mask=mask, seed=0, release=release)
    # One vector of 128 numbers learns less in a few steps than weights do.
    assert error() < (0.97 if method == "textual-inversion" else 0.7) * before


# Configuration


def test_what_is_left_out_takes_the_methods_published_value() -> None:
    lora = AdaptConfig(method="lora")
    assert (lora.learning_rate, lora.rank, lora.train_batch_size) == (1e-4, 4, 1)
    assert lora.target_modules == ("to_k", "to_q", "to_v", "to_out.0")
    assert AdaptConfig(method="lora", rank=32, learning_rate=1.0).learning_rate == 1.0
    assert AdaptConfig(method="dreambooth").learn_as == "sks"
    assert AdaptConfig(method="dreambooth", instance_prompt="my dog").learn_as is None
    kept = {method: AdaptConfig(method=method, class_prompt="a dog") for method in ("dreambooth", "custom-diffusion")}
    assert all(config.num_class_images == 200 for config in kept.values())
    assert (AdaptConfig(method="dreambooth").max_train_steps, kept["dreambooth"].max_train_steps) == (400, 800)
    assert kept["custom-diffusion"].learning_rate == 2 * AdaptConfig(method="custom-diffusion").learning_rate
    assert AdaptConfig() == AdaptConfig(method="full") and AdaptConfig().learning_rate == 1e-5
    for method in METHODS:
        config = AdaptConfig(method=method)
        assert AdaptConfig.model_validate(config.model_dump(mode="json")) == config


def test_the_configuration_does_not_import_what_it_configures() -> None:
    # Otherwise a module that imports the configuration could not be imported first.
    imported = Path(published.__file__).read_text() + Path(published.__file__).with_name("config.py").read_text()
    assert "raygard.adaptation" not in imported and "raygard.diffusion" not in imported


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapt.rank=4"], "adapt.rank has no effect with adapt.method=full"),
        (["adapt.method=lora", "adapt.class_prompt=a dog"], "adapt.class_prompt has no effect with adapt.method=lora"),
        (["adapt.method=dreambooth", "adapt.num_class_images=3"], "no effect without adapt.class_prompt"),
        (["adapt.sgd_momentum=0.9"], "adapt.sgd_momentum has no effect with adapt.optimizer=adamw"),
        (["adapt.method=textual-inversion", "adapt.learn_as=null"], "name it in adapt.learn_as"),
        (["adapt.learn_as=x", "adapt.instance_prompt=a photo"], "adapt.instance_prompt must name adapt.learn_as, 'x'"),
        (["adapt.optimizer=sgd", "adapt.adam_beta1=0.5"], "adapt.adam_beta1 has no effect with adapt.optimizer=sgd"),
        (["adapt.method=lora", "adapt.rank=null"], "adapt.rank is empty; leave it out"),
        (["adapt.method=lora", "adapt.target_modules=[]"], "adapt.target_modules is empty; leave it out"),
        (["adapt.method=dreambooth", "adapt.class_prompt=x", "adapt.prior_loss_weight=null"], "weight is empty"),
        (["adapt.method=lora", "adapt.rank=0"], "adapt.rank: input should be greater than or equal to 1"),
    ],
)
def test_settings_without_effect_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RaygardError, match=message):
        load_config(None, overrides)
