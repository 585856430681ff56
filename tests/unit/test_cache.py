from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from raygard.config import DomainConfig, ModelConfig
from raygard.diffusion import cache as cache_module
from raygard.diffusion.cache import ARRAYS, MANIFEST, LatentSet, build_cache, load_cache
from raygard.diffusion.model import load_denoiser, load_pipeline, load_vae, model_fingerprint, resolve_model
from raygard.domain import DomainView, HalvesError, load_domain
from raygard.errors import RaygardError
from raygard.pictures import read_pixels

Maker = Callable[..., Path]
PARTS = [("a", "adapt"), ("b", "adapt"), ("b", "reference")]


@pytest.fixture
def settings(imagefolder: Maker) -> DomainConfig:
    folder = imagefolder({"a": 24, "b": 24})
    return DomainConfig(data=str(folder), illegal=("a",), legal=("b",), resolution=16, min_part=1)


@pytest.fixture
def view(settings: DomainConfig) -> DomainView:
    return load_domain(settings).view("evaluate")


@pytest.fixture
def built(tiny_model: ModelConfig, settings: DomainConfig, view: DomainView, tmp_path: Path) -> Path:
    return build_cache(tiny_model, settings, view, PARTS, tmp_path / "cache")


def equal(first: LatentSet, second: LatentSet) -> bool:
    tensors = (
        (first.mean, second.mean),
        (first.std, second.std),
        (first.conditioning[:]["text"], second.conditioning[:]["text"]),
    )
    lists = (first.classes, first.captions, first.parts) == (second.classes, second.captions, second.parts)
    return lists and all(torch.equal(one, other) for one, other in tensors)


def test_rows_are_the_posterior_and_text_of_the_pictures(
    built: Path, tiny_model: ModelConfig, view: DomainView
) -> None:
    data = load_cache(built)
    pictures = [picture for cls, part in PARTS for picture in view.pictures(cls, part)]
    assert data.captions == [p.caption for p in pictures] and data.classes == [p.cls for p in pictures]
    assert data.rows("b", "reference").tolist() == list(range(12, 18)) and len(data.rows("b")) == 12
    vae = load_vae(tiny_model)
    pixels = torch.stack([torch.from_numpy(read_pixels(p.path, 16)) for p in pictures]).permute(0, 3, 1, 2)
    with torch.no_grad():
        posterior = vae.encode(pixels / 127.5 - 1).latent_dist
    torch.testing.assert_close(data.mean, posterior.mean * vae.config.scaling_factor)
    eps = torch.randn(2, *data.shape)
    expected = (posterior.mean + posterior.std * torch.cat([eps, eps[:1].expand(16, -1, -1, -1)]))[:2]
    torch.testing.assert_close(data.latents(torch.tensor([0, 1]), eps), expected * vae.config.scaling_factor)


def test_text_is_what_the_pipeline_computes(built: Path, tiny_model: ModelConfig) -> None:
    data = load_cache(built)
    expected, _ = load_pipeline(tiny_model).encode_prompt(data.captions, "cpu", 1, False)
    torch.testing.assert_close(data.conditioning[torch.arange(len(data))]["text"], expected, rtol=0, atol=1e-6)
    assert len(data.conditioning) == len(expected) and data.conditioning[3]["text"].shape == expected[3].shape


def test_subset_keeps_rows_together(built: Path) -> None:
    data = load_cache(built)
    part = data.subset([13, 2])
    assert part.captions == [data.captions[13], data.captions[2]] and part.parts == ["reference", "adapt"]
    assert torch.equal(part.mean, data.mean[[13, 2]])
    assert torch.equal(part.conditioning[:]["text"], data.conditioning[torch.tensor([13, 2])]["text"])
    assert part.rows("a").tolist() == [1] and part.rows("a", "reference").tolist() == []


def test_same_content_is_not_encoded_twice(
    built: Path, tiny_sd: Path, settings: DomainConfig, view: DomainView, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    elsewhere = tmp_path / "copied-model"
    shutil.copytree(tiny_sd, elsewhere)
    monkeypatch.setattr(cache_module, "load_vae", lambda _: pytest.fail("encoded again"))
    again = build_cache(ModelConfig(pretrained_model_name_or_path=str(elsewhere)), settings, view, PARTS, built.parent)
    assert again == built


def test_other_content_gets_another_folder(
    built: Path, tiny_model: ModelConfig, settings: DomainConfig, view: DomainView
) -> None:
    assert build_cache(tiny_model, settings, view, PARTS[:2], built.parent) != built
    wider = settings.model_copy(update={"resolution": 32})
    larger = build_cache(tiny_model, wider, view, PARTS, built.parent)
    assert load_cache(larger).shape == (4, 16, 16)


@pytest.mark.parametrize("name", [ARRAYS, MANIFEST])
@pytest.mark.parametrize("damage", ["torn", "changed", "missing"])
def test_damage_is_reported_and_mended(
    built: Path, tiny_model: ModelConfig, settings: DomainConfig, view: DomainView, name: str, damage: str
) -> None:
    sound = load_cache(built)
    data = (built / name).read_bytes()
    if damage == "missing":
        (built / name).unlink()
    else:
        (built / name).write_bytes(data[: len(data) // 2] if damage == "torn" else b"{}" + data[2:])
    with pytest.raises(RaygardError, match=str(built)):
        load_cache(built)
    assert build_cache(tiny_model, settings, view, PARTS, built.parent) == built
    assert equal(load_cache(built), sound)


def test_full_disk_is_one_clear_line_and_leaves_nothing(
    tiny_model: ModelConfig, settings: DomainConfig, view: DomainView, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def full(file: Path, data: bytes) -> None:
        file.write_bytes(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module, "_write", full)
    with pytest.raises(RaygardError, match=r"no space left for the cache in .*: 0\.0 MB needed"):
        build_cache(tiny_model, settings, view, PARTS, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_stage_cannot_cache_what_it_may_not_read(
    tiny_model: ModelConfig, settings: DomainConfig, tmp_path: Path
) -> None:
    with pytest.raises(HalvesError, match="reference"):
        build_cache(tiny_model, settings, load_domain(settings).view("learn"), PARTS[2:], tmp_path)


def test_resolution_must_fit_the_autoencoder(
    tiny_model: ModelConfig, settings: DomainConfig, view: DomainView, tmp_path: Path
) -> None:
    with pytest.raises(RaygardError, match=r"domain\.resolution 17 must be a multiple of 2"):
        build_cache(tiny_model, settings.model_copy(update={"resolution": 17}), view, PARTS, tmp_path)


def test_models_that_are_not_there_or_not_models_are_named(tiny_sd: Path, tmp_path: Path) -> None:
    empty, torn = tmp_path / "empty", tmp_path / "torn"
    empty.mkdir()
    shutil.copytree(tiny_sd, torn)
    weights = torn / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text(json.dumps({"_class_name": "KolorsPipeline"}))
    cases = {
        str(tmp_path / "none"): "no model at",
        str(empty): "not a diffusers pipeline folder",
        str(other): "holds a KolorsPipeline",
        str(torn): "cannot load the unet",
        "zoo:nothing": "no bundled model 'zoo:nothing'",
    }
    for name, message in cases.items():
        with pytest.raises(RaygardError, match=message) as caught:
            load_denoiser(ModelConfig(pretrained_model_name_or_path=name))
        assert "\n" not in str(caught.value)
    with pytest.raises(RaygardError, match="no weights of variant 'fp16'"):
        load_denoiser(ModelConfig(pretrained_model_name_or_path=str(tiny_sd), variant="fp16"))


def test_half_precision_files_are_read_as_float32(tiny_sd: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    load_pipeline(ModelConfig(pretrained_model_name_or_path=str(tiny_sd))).to(torch.float16).save_pretrained(
        half, variant="fp16"
    )
    unet = load_denoiser(ModelConfig(pretrained_model_name_or_path=str(half)))
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}


def test_fingerprint_follows_the_weights(tiny_sd: Path, tiny_model: ModelConfig, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(tiny_sd, changed)
    file = changed / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    other = ModelConfig(pretrained_model_name_or_path=str(changed))
    assert model_fingerprint(other, "vae") != model_fingerprint(tiny_model, "vae")
    assert model_fingerprint(other, "unet") == model_fingerprint(tiny_model, "unet")
    assert resolve_model("owner/name") == "owner/name"
