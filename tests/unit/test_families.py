"""What every model family owes the rest: detection, tensor counts, the loss by hand, conditioning, noise levels."""

from __future__ import annotations

import inspect
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raygard.adaptation import prior, prompts
from raygard.cluster.doctor.facts import worker_memory
from raygard.config import AdaptConfig, DomainConfig, GenerationConfig, ModelConfig
from raygard.config_file import load_config
from raygard.diffusion.cache import build_cache, load_cache
from raygard.diffusion.conditioning import Conditioning, joined
from raygard.diffusion.families import FAMILIES, StableDiffusion, denoiser_folder, register
from raygard.diffusion.flow_matching import logit_normal_indices
from raygard.diffusion.loss import draw
from raygard.diffusion.model import (
    load_denoiser,
    load_loss,
    load_noise_scheduler,
    load_pipeline,
    load_text_encoders,
    model_family,
    model_parts,
    with_resolution,
)
from raygard.diffusion.shape import KNOWN, family_of_shape, make_denoiser, measure_denoiser, run_denoiser
from raygard.domain import load_domain
from raygard.errors import RaygardError
from tests.families import TINY, make_tiny_sd3
from tests.latents import latent_set

pytestmark = pytest.mark.families
CAPTIONS = ["ab c", "d", ""]
# Named parameter tensors of the denoisers, shared/reference/setup.md.
COUNTS = {
    "SD1.5-shape": (686, 859_520_964),
    "SD2.1-shape": (686, 865_910_724),
    "SDXL-shape": (1680, 2_567_463_684),
    "SD3-medium-shape": (682, 2_028_328_000),
    "Flux.1-dev-shape": (1160, 11_901_408_320),
}


@pytest.fixture(scope="module", params=TINY)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("family") / request.param
    return ModelConfig(pretrained_model_name_or_path=str(TINY[request.param](folder)))


def test_parts_that_raygard_does_not_use_are_not_loaded(tmp_path: Path, model: ModelConfig) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = shutil.copytree(model.pretrained_model_name_or_path, tmp_path / "model")
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size"), 8)
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, num_hidden_layers=1, projection_dim=8))
    encoder.config.save_pretrained(folder / "image_encoder")
    torch.save(encoder.state_dict(), folder / "image_encoder" / "pytorch_model.bin")
    index = json.loads((folder / "model_index.json").read_text())
    index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
    (folder / "model_index.json").write_text(json.dumps(index))
    pipeline = load_pipeline(ModelConfig(pretrained_model_name_or_path=str(folder)))
    assert getattr(pipeline, "image_encoder", None) is None


def test_class_pictures_are_drawn_as_the_family_s_own_pipeline_draws(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def generate(pipeline: Any, captions: list[str], keys: object, config: GenerationConfig, seed: int) -> Any:
        used.append((config.num_inference_steps, config.guidance_scale))
        return np.zeros((len(captions), 16, 16, 3), dtype=np.uint8)

    monkeypatch.setattr(prior, "generate", generate)
    config = AdaptConfig(method="dreambooth", class_prompt="a", num_class_images=2)
    release = prompts.Release(model)
    prior.class_pictures(load_denoiser(model), latent_set(2), config, release, release.embed)
    call = inspect.signature(getattr(diffusers, model_family(model).pipeline).__call__).parameters
    assert used == [(call["num_inference_steps"].default, call["guidance_scale"].default)]


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY["FluxPipeline"](tmp_path_factory.mktemp("flux") / "model")


def shards(folder: Path, name: str) -> None:
    """Put the index of an only shard of this name in the place of a text encoder's weights."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save = torch.save if name.endswith(".bin") else save_file
    save(weights, folder / name)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["../../outside.bin", "../../outside.safetensors", "model.bin"])
def test_an_encoder_s_shards_are_safetensors_beside_their_index(tmp_path: Path, flux: Path, name: str) -> None:
    folder = shutil.copytree(flux, tmp_path / "model")
    shards(folder / "text_encoder_2", name)
    with pytest.raises(RaygardError, match="in the same folder"):
        load_text_encoders(ModelConfig(pretrained_model_name_or_path=str(folder)))


def test_an_adapter_does_not_name_another_encoder(tmp_path: Path, flux: Path) -> None:
    folder = shutil.copytree(flux, tmp_path / "model")
    about = {"base_model_name_or_path": "elsewhere", "peft_type": "LORA", "r": 1, "target_modules": ["q"]}
    (folder / "text_encoder_2" / "adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(RaygardError, match="holds an adapter"):
        load_text_encoders(ModelConfig(pretrained_model_name_or_path=str(folder)))


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_quantized_weights_are_refused_in_words(tmp_path: Path, flux: Path, part: str) -> None:
    folder = shutil.copytree(flux, tmp_path / "model")
    file = folder / part / "config.json"
    about = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": about}))
    config = ModelConfig(pretrained_model_name_or_path=str(folder))
    with pytest.raises(RaygardError, match="holds quantized weights"):
        load_denoiser(config) if part == "transformer" else load_text_encoders(config)


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_shards_of_a_variant_are_read_where_there_is_nothing_else(tmp_path: Path, flux: Path, part: str) -> None:
    folder = shutil.copytree(flux, tmp_path / "model")
    config = ModelConfig(pretrained_model_name_or_path=str(folder))
    module = load_denoiser(config) if part == "transformer" else load_text_encoders(config).parts[part]
    (file,) = (folder / part).glob("*.safetensors")
    file.unlink()
    module.save_pretrained(str(folder / part), variant="fp16", max_shard_size="8KB")
    assert len(list((folder / part).glob("*.fp16-*.safetensors"))) > 1
    again = load_denoiser(config) if part == "transformer" else load_text_encoders(config).parts[part]
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_every_family_has_a_tiny_pipeline() -> None:
    assert TINY.keys() == FAMILIES.keys()
    with pytest.raises(RaygardError, match="StableDiffusionPipeline is registered twice"):
        register(StableDiffusion())


def test_the_family_is_read_from_the_index(model: ModelConfig) -> None:
    folder, family = Path(model.pretrained_model_name_or_path), model_family(model)
    assert family.pipeline == json.loads((folder / "model_index.json").read_text())["_class_name"] == folder.name
    assert denoiser_folder(load_denoiser(model)) == family.denoiser == model_parts(model)[0]
    assert all((folder / part).is_dir() for part in model_parts(model))
    side = with_resolution(DomainConfig(illegal=("a",), legal=("b",)), model).resolution
    assert side == (256 if family.pipeline == "FluxPipeline" else 16)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("StableDiffusionImg2ImgPipeline", "reads StableDiffusionPipeline.*convert it to the text-to-image pipeline"),
        ("StableDiffusionXLInpaintPipeline", "convert it to the text-to-image"),
        ("FluxFillPipeline", "convert it to the text-to-image"),
        ("KolorsPipeline", "reads .*FluxPipeline$"),
        (["StableDiffusionPipeline"], "reads .*FluxPipeline$"),
    ],
)
def test_other_pipelines_are_refused_in_one_line(tmp_path: Path, name: Any, message: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(RaygardError, match=message) as caught:
        load_denoiser(ModelConfig(pretrained_model_name_or_path=str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", KNOWN)
def test_the_releases_have_the_known_numbers_of_tensors(name: str) -> None:
    family = family_of_shape(name)
    with torch.device("meta"):
        denoiser = make_denoiser(family, KNOWN[name])
        with torch.no_grad():
            latents = run_denoiser(family, denoiser, 16)
    parameters = dict(denoiser.named_parameters())
    assert (len(parameters), sum(p.numel() for p in parameters.values())) == COUNTS[name]
    assert latents.shape == (1, family.latent_channels(denoiser.config), 16, 16)


def test_the_known_shapes_are_all_counted() -> None:
    assert COUNTS.keys() == KNOWN.keys()


def test_fake_activations_are_those_a_real_pass_keeps(model: ModelConfig) -> None:
    family, denoiser = model_family(model), load_denoiser(model).train()
    own = {p.untyped_storage().data_ptr() for p in denoiser.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run_denoiser(family, denoiser, 8)
    real = sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in own)
    plain, kept = (
        measure_denoiser(denoiser.config, 8, family=family, checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    assert plain.sizes == tuple(p.numel() for p in denoiser.parameters())
    assert plain.saved_elements * 4 == pytest.approx(real, rel=0.02)
    assert 0 < kept.saved_elements < plain.saved_elements


def test_a_shape_is_estimated_with_its_own_activations() -> None:
    settings = ["model.pretrained_model_name_or_path=SD3-medium-shape", "bilevel.train_batch_size=64"]
    small, large = (worker_memory(load_config(None, [*settings, f"domain.resolution={r}"])) for r in (512, 1024))
    weights = COUNTS["SD3-medium-shape"][1] * 4
    assert small["learn"]["weights"] == large["learn"]["weights"] == weights
    # The text is part of the sequence, so four times the picture is less than four times the tokens.
    assert 1.5 < large["learn"]["activations"] / small["learn"]["activations"] < 4


# Losses by hand


def packed(latents: Tensor) -> Tensor:
    """Two by two latents as one token, channel first: (B, H / 2 * W / 2, 4 C)."""
    rows = [
        latents[:, :, i : i + 2, j : j + 2].flatten(1)
        for i in range(0, latents.shape[2], 2)
        for j in range(0, latents.shape[3], 2)
    ]
    return torch.stack(rows, dim=1)


def logit_normal_sigma(timestep: int, shift: float) -> float:
    level = 1 / (1 + math.exp(-NormalDist().inv_cdf((timestep + 0.5) / 1000)))
    sigma = (1000 - int(level * 1000)) / 1000
    return shift * sigma / (1 + (shift - 1) * sigma)


def noise_by_hand(denoiser: Any, x: Tensor, text: Conditioning, noise: Tensor, t: Tensor, alphas: Tensor) -> Tensor:
    kept = alphas[t].view(-1, 1, 1, 1)
    noisy, added = kept.sqrt() * x + (1 - kept).sqrt() * noise, None
    if "pooled" in text:
        added = {"text_embeds": text["pooled"], "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * len(x))}
    predicted = denoiser(noisy, t, text["text"], added_cond_kwargs=added).sample
    return (noise - predicted).pow(2).flatten(1).mean(1)


def velocity_by_hand(denoiser: Any, x: Tensor, text: Conditioning, noise: Tensor, t: Tensor, alphas: Tensor) -> Tensor:
    is_flux = type(denoiser).__name__.startswith("Flux")
    sigma = torch.tensor([logit_normal_sigma(i, 1.0 if is_flux else 3.0) for i in t.tolist()]).view(-1, 1, 1, 1)
    noisy = (1 - sigma) * x + sigma * noise
    about = {"pooled_projections": text["pooled"], "encoder_hidden_states": text["text"]}
    if not is_flux:
        predicted = denoiser(noisy, timestep=1000 * sigma.flatten(), **about).sample
        return (noise - x - predicted).pow(2).flatten(1).mean(1)
    places = torch.tensor([[0.0, i, j] for i in range(4) for j in range(4)])
    predicted = denoiser(
        packed(noisy), timestep=sigma.flatten(), guidance=torch.full((len(x),), 3.5), img_ids=places,
        txt_ids=torch.zeros(text["text"].shape[1], 3), **about,
    ).sample  # fmt: skip
    return (packed(noise - x) - predicted).pow(2).flatten(1).mean(1)


BY_HAND: dict[str, Callable[..., Tensor]] = {
    "StableDiffusionPipeline": noise_by_hand,
    "StableDiffusionXLPipeline": noise_by_hand,
    "StableDiffusion3Pipeline": velocity_by_hand,
    "FluxPipeline": velocity_by_hand,
}


def test_the_loss_is_the_formula_written_out(model: ModelConfig) -> None:
    denoiser, loss = load_denoiser(model).eval(), load_loss(model)
    latents, noise, timesteps = draw(0, "test", 0, range(4), (4, 8, 8), loss.num_timesteps)
    text = load_text_encoders(model).embed([*CAPTIONS, "e"])
    with torch.no_grad():
        found = loss.per_sample(denoiser, latents, text, noise, timesteps)
        alphas = getattr(load_noise_scheduler(model), "alphas_cumprod", torch.empty(0))
        expected = BY_HAND[model_family(model).pipeline](denoiser, latents, text, noise, timesteps, alphas)
    assert found.dtype == torch.float32 and found.shape == (4,)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_velocity_prediction_of_unets_is_the_formula_written_out(model: ModelConfig) -> None:
    settings = model.model_copy(update={"prediction_type": "v_prediction"})
    if model_family(model).denoiser == "transformer":
        with pytest.raises(RaygardError, match=r"model\.prediction_type has no effect on .* flow matching; remove it"):
            load_loss(settings)
        with pytest.raises(RaygardError, match=r"model\.prediction_type has no effect"):
            load_pipeline(settings)
        with pytest.raises(RaygardError, match=r"snr_gamma has no effect on .* flow matching; remove it"):
            load_loss(model, snr_gamma=5.0)
        return
    denoiser, loss = load_denoiser(model).eval(), load_loss(settings)
    latents, noise, timesteps = draw(0, "test", 0, range(3), (4, 8, 8))
    text = load_text_encoders(model).embed(CAPTIONS)
    kept = load_noise_scheduler(model).alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    with torch.no_grad():
        found = loss.per_sample(denoiser, latents, text, noise, timesteps)
        # What the model predicts, from the loss of noise: its own check is the test above.
        asked: list[Tensor] = []
        denoiser.register_forward_hook(lambda _, inputs, output: asked.append(output[0]))
        loss.per_sample(denoiser, latents, text, noise, timesteps)
    velocity = kept.sqrt() * noise - (1 - kept).sqrt() * latents
    torch.testing.assert_close(found, (velocity - asked[0]).pow(2).flatten(1).mean(1), rtol=0, atol=1e-5)


def test_a_denoiser_in_bfloat16_gives_a_float32_loss(model: ModelConfig) -> None:
    denoiser, loss = load_denoiser(model).to(torch.bfloat16), load_loss(model)
    latents, noise, timesteps = draw(0, "test", 0, range(3), (4, 8, 8))
    found = loss.per_sample(denoiser, latents, load_text_encoders(model).embed(CAPTIONS), noise, timesteps)
    assert found.dtype == torch.float32 and torch.isfinite(found).all()


def test_noise_levels_are_those_that_diffusers_draws() -> None:
    draws = compute_density_for_timestep_sampling(
        "logit_normal", 200_000, 0.0, 1.0, generator=torch.Generator().manual_seed(0)
    )
    theirs, ours = ((draws * 1000).long().double(), logit_normal_indices(1000).double())
    assert ours.tolist() == sorted(ours.tolist()) and 0 <= ours.min() < ours.max() < 1000
    shares = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    gaps = theirs[torch.randperm(200_000)[:100_000]].quantile(shares) - ours.quantile(shares)
    assert gaps.abs().max() < 6
    assert theirs.std() == pytest.approx(float(ours.std()), rel=0.01)


# Conditioning


def hidden(encoder: nn.Module, tokenizer: Any, length: int) -> Any:
    ids = tokenizer(CAPTIONS, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return encoder(ids, output_hidden_states=True)


def test_conditioning_is_what_the_papers_take_of_the_encoders(model: ModelConfig) -> None:
    family, encoders = model_family(model), load_text_encoders(model)
    found, parts = encoders.embed(CAPTIONS), encoders.parts
    first = hidden(parts["text_encoder"], parts["tokenizer"], 8)
    expected = {"text": first.last_hidden_state}
    if family.pipeline == "FluxPipeline":
        t5 = hidden(parts["text_encoder_2"], parts["tokenizer_2"], 512).last_hidden_state
        expected = {"text": t5, "pooled": first.pooler_output}
    if family.pipeline in ("StableDiffusionXLPipeline", "StableDiffusion3Pipeline"):
        second = hidden(parts["text_encoder_2"], parts["tokenizer_2"], 8)
        both = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        expected = {"text": both, "pooled": second.text_embeds}
    if family.pipeline == "StableDiffusion3Pipeline":
        t5 = hidden(parts["text_encoder_3"], parts["tokenizer_3"], 256).last_hidden_state
        pooled = torch.cat([first.text_embeds, second.text_embeds], dim=-1)
        expected = {"text": torch.cat([both, t5], dim=1), "pooled": pooled}
    torch.testing.assert_close(dict(found), expected, rtol=0, atol=1e-6)


def test_sd3_without_t5_takes_zeros_in_its_place(tmp_path: Path) -> None:
    full, bare = (
        ModelConfig(pretrained_model_name_or_path=str(make_tiny_sd3(tmp_path / str(with_t5), with_t5)))
        for with_t5 in (True, False)
    )
    assert {*model_parts(full)} - {*model_parts(bare)} == {"tokenizer_3", "text_encoder_3"}
    found = load_text_encoders(bare).embed(CAPTIONS)
    assert found["text"].shape == (3, 8 + 256, 32) and found["text"][:, 8:].abs().max() == 0
    assert found["text"][:, :8].abs().max() > 0
    assert load_pipeline(bare)("ab", num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)


@pytest.fixture
def domain(imagefolder: Callable[..., Path]) -> DomainConfig:
    return DomainConfig(
        data=str(imagefolder({"a": 8, "b": 8})), illegal=("a",), legal=("b",), resolution=16, min_part=1
    )


def cached(model: ModelConfig, domain: DomainConfig, out: Path) -> Path:
    return build_cache(model, domain, load_domain(domain).view("evaluate"), [("a", "adapt")], out)


def test_the_cache_keeps_all_conditioning_and_its_key_covers_every_encoder(
    model: ModelConfig, domain: DomainConfig, tmp_path: Path
) -> None:
    built = cached(model, domain, tmp_path / "cache")
    data, encoders = load_cache(built), load_text_encoders(model)
    expected = encoders.embed(data.captions)
    assert data.conditioning[:].keys() == expected.keys()
    torch.testing.assert_close(dict(data.conditioning[:]), dict(expected), rtol=0, atol=1e-6)
    vae = load_pipeline(model).vae
    shift = vae.config.shift_factor or 0.0
    assert (data.mean / vae.config.scaling_factor + shift).abs().max() < 10
    for part in (name for name in encoders.parts if name.startswith("text_encoder")):
        other = tmp_path / part
        shutil.copytree(model.pretrained_model_name_or_path, other)
        file = other / part / "model.safetensors"
        weights = bytearray(file.read_bytes())
        weights[-1] ^= 1
        file.write_bytes(weights)
        changed = cached(ModelConfig(pretrained_model_name_or_path=str(other)), domain, tmp_path / "cache")
        assert changed != built, part


def test_pictures_must_fill_whole_tokens(model: ModelConfig, domain: DomainConfig, tmp_path: Path) -> None:
    multiple = 2 * model_family(model).latent_multiple
    odd = domain.model_copy(update={"resolution": 16 + multiple // 2})
    with pytest.raises(RaygardError, match=f"must be a multiple of {multiple} for this model"):
        cached(model, odd, tmp_path / "cache")


def test_an_autoencoder_with_another_scale_is_refused(model: ModelConfig, tmp_path: Path) -> None:
    shutil.copytree(model.pretrained_model_name_or_path, tmp_path / "other")
    file = tmp_path / "other" / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}))
    with pytest.raises(RaygardError, match="scales latents by `latents_mean`"):
        load_pipeline(ModelConfig(pretrained_model_name_or_path=str(tmp_path / "other")))


def test_conditioning_is_cut_joined_and_checked_by_name() -> None:
    whole = Conditioning(text=torch.arange(12.0).view(3, 2, 2), pooled=torch.arange(3.0)[:, None])
    parts = [whole.rows(slice(0, 1)), whole.rows(torch.tensor([1, 2]))]
    again = joined(parts)
    assert all(torch.equal(again[name], whole[name]) for name in ("text", "pooled"))
    with pytest.raises(ValueError, match="no tensor 'mask'; the names are text, pooled"):
        Conditioning(mask=torch.zeros(1))
