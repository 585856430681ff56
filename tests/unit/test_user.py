"""The user's side from end to end on a tiny random pipeline: fine-tune, draw, score."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raygard import user
from raygard.config import RunConfig
from raygard.config_file import load_config
from raygard.errors import RaygardError
from raygard.mask import FreezeMask
from raygard.mask.weights import load_denoiser_state
from raygard.user import adapt_model, generate_pictures, score_folders
from tests.latents import equal

Maker = Callable[..., Path]


def settings(model: Path, *overrides: str) -> RunConfig:
    return load_config(
        None,
        [
            f"model.pretrained_model_name_or_path={model}", "domain.resolution=16", "adapt.max_train_steps=3",
            "adapt.learning_rate=1e-3", "adapt.train_batch_size=2", *overrides,
        ],
    )  # fmt: skip


def adapt(model: Path, data: Path, out: Path, mask: Path | None = None, classes: tuple[str, ...] = (), seed: int = 0):
    return adapt_model(settings(model), data, classes, mask, out, seed, quiet=True)


def make_mask(model: Path, folder: Path) -> FreezeMask:
    from raygard.config import ModelConfig
    from raygard.diffusion.model import load_denoiser

    unet = load_denoiser(ModelConfig(pretrained_model_name_or_path=str(model)))
    names = [name for name, _ in unet.named_parameters()]
    mask = FreezeMask.create(unet, names[::3])
    mask.save(folder)
    return mask


def test_fine_tuning_under_a_mask_passes_the_audit(tiny_sd: Path, imagefolder: Maker, tmp_path: Path) -> None:
    data = imagefolder({"a": 4, "b": 3})
    mask = make_mask(tiny_sd, tmp_path / "mask")
    facts = adapt(tiny_sd, data, tmp_path / "deep" / "guarded", tmp_path / "mask")
    base, tuned = load_denoiser_state(tiny_sd), load_denoiser_state(tmp_path / "deep" / "guarded")
    assert mask.audit(base, tuned).ok
    loose = [name for name in mask.names if name not in mask.frozen_names]
    assert sum(not torch.equal(base[name], tuned[name]) for name in loose) > len(loose) / 2
    assert facts is not None and facts["mask_sha256"] == mask.sha256
    assert facts["trainable_params"] == sum(base[name].numel() for name in loose)
    assert facts == json.loads((tmp_path / "deep" / "guarded" / "raygard_adapt.json").read_text())
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"guarded"}

    free = adapt(tiny_sd, data, tmp_path / "free")
    assert free is not None and free["mask_sha256"] is None
    assert free["trainable_params"] == sum(tensor.numel() for tensor in base.values())
    assert not mask.audit(base, load_denoiser_state(tmp_path / "free")).ok


def test_equal_seeds_give_equal_weights_and_the_saved_pipeline_draws(
    tiny_sd: Path, imagefolder: Maker, tmp_path: Path
) -> None:
    data = imagefolder({"a": 4, "b": 3})
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        adapt(tiny_sd, data, tmp_path / name, classes=("a", "a"), seed=seed)
    one, two, three = (load_denoiser_state(tmp_path / name) for name in ("one", "two", "three"))
    assert equal(one, two) and not equal(one, three)
    before, after = (
        generate_pictures(str(model), ["x", "y", "x"], tmp_path / f"drawn-{model.name}", 0, 2, 2.0)
        for model in (tiny_sd, tmp_path / "one")
    )
    pixels = [[np.asarray(Image.open(path)) for path in paths] for paths in (before, after)]
    assert all(picture.shape == (16, 16, 3) for picture in pixels[0])
    assert not np.array_equal(pixels[0][0], pixels[1][0])
    assert not np.array_equal(pixels[0][0], pixels[0][2])
    again = generate_pictures(str(tiny_sd), ["x"], tmp_path / "again", 0, 2, 2.0)
    np.testing.assert_allclose(np.asarray(Image.open(again[0])).astype(int), pixels[0][0].astype(int), atol=1)
    rows = [json.loads(line) for line in (before[0].parent / "metadata.jsonl").read_text().splitlines()]
    assert rows == [{"file_name": p.name, "text": t} for p, t in zip(before, ["x", "y", "x"], strict=True)]


@pytest.mark.parametrize(
    ("classes", "message"),
    [(("aa",), "no pictures of class 'aa'; did you mean 'a'"), (("a", "zebra"), "no pictures of class 'zebra'")],
)
def test_an_unknown_class_is_named(
    tiny_sd: Path, imagefolder: Maker, tmp_path: Path, classes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RaygardError, match=message):
        adapt(tiny_sd, imagefolder({"a": 4, "b": 3}), tmp_path / "out", classes=classes)
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_not_empty_is_refused_and_not_touched(tiny_sd: Path, imagefolder: Maker, tmp_path: Path) -> None:
    data = imagefolder({"a": 4})
    before = sorted(data.rglob("*"))
    for out in (data, data / "metadata.jsonl"):
        with pytest.raises(RaygardError, match="is not empty; choose another --out"):
            adapt(tiny_sd, data, out)
        with pytest.raises(RaygardError, match="is not empty; choose another --out"):
            generate_pictures(str(tiny_sd), ["x"], out, 0, 2, 2.0)
    assert sorted(data.rglob("*")) == before


def test_a_failure_while_saving_leaves_nothing(
    tiny_sd: Path, imagefolder: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        assert path.parent.is_dir() and any(path.parent.iterdir())
        raise OSError(28, "No space left on device")

    data = imagefolder({"a": 4})
    monkeypatch.setattr(user, "write_text", full)
    with pytest.raises(RaygardError, match="no space left"):
        adapt(tiny_sd, data, tmp_path / "out" / "tuned")
    assert not list((tmp_path / "out").iterdir())


def test_the_mask_of_another_model_is_refused_before_the_pictures_are_encoded(
    tiny_sd: Path, imagefolder: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FreezeMask.create(torch.nn.Linear(2, 2), ["bias"]).save(tmp_path / "mask")
    monkeypatch.setattr("raygard.diffusion.cache.build_cache", pytest.fail)
    with pytest.raises(RaygardError, match="made for another model: the model has no tensor 'weight'"):
        adapt(tiny_sd, imagefolder({"a": 4}), tmp_path / "out", tmp_path / "mask")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "at least one caption"),
        ({"prompts": ["x", " "]}, "no empty ones"),
        ({"num_inference_steps": 0}, "generation.num_inference_steps"),
        ({"guidance_scale": float("nan")}, "generation.guidance_scale.*finite"),
        ({"guidance_scale": 0.5}, "generation.guidance_scale.*greater than or equal to 1"),
        ({"model": "/no/such/model"}, "no model at /no/such/model"),
    ],
)
def test_drawing_refuses(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    good = {"model": "/no/such/model", "prompts": ["x"], "seed": 0, "num_inference_steps": 2, "guidance_scale": 2.0}
    with pytest.raises(RaygardError, match=message):
        generate_pictures(out=tmp_path / "out", **{**good, **options})
    assert not (tmp_path / "out").exists()


def draw_style(folder: Path, style: str, count: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    (folder / "inner").mkdir(parents=True)
    for number in range(count):
        pixels = np.full((48, 48 + number, 3), 250, dtype=np.uint8)
        x, y = rng.integers(4, 20, 2)
        if style == "flat":
            pixels[y : y + 24, x : x + 24] = (220, 40, 40)
        else:
            pixels[...] = rng.integers(0, 256, pixels.shape)
        Image.fromarray(pixels).save(folder / ("inner" if number % 2 else "") / f"{number}.png")
    return folder


def test_pictures_of_one_style_are_nearer_than_of_another(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    flat, same_style, noise = (
        draw_style(tmp_path / name, style, 6, seed)
        for name, style, seed in (("flat", "flat", 0), ("same", "flat", 1), ("noise", "noise", 2))
    )
    near, far = (score_folders(folder, flat, "style_enlite0") for folder in (same_style, noise))
    assert near["direction"] == "distance" and near["mean"] < far["mean"] / 3
    assert (near["num_generated"], near["num_reference"]) == (6, 6)
    with pytest.raises(RaygardError, match=r"unknown scorer 'style_enlite' .*did you mean 'style_enlite0'"):
        score_folders(flat, noise, "style_enlite")


def test_scoring_names_what_it_cannot_read(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    good = draw_style(tmp_path / "good", "flat", 2, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RaygardError, match="holds no pictures"):
        score_folders(good, tmp_path / "empty", "style_enlite0")
    with pytest.raises(RaygardError, match="no folder at"):
        score_folders(tmp_path / "none", good, "style_enlite0")
    for victim in ("0.png", "inner/1.png"):
        whole = (good / victim).read_bytes()
        (good / victim).write_bytes(b"not a picture")
        with pytest.raises(RaygardError, match=f"{victim} is not a picture raygard can read"):
            score_folders(good, good, "style_enlite0")
        (good / victim).write_bytes(whole)
