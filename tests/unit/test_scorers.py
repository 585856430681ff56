"""What every scorer promises, and those whose weights are not here on tiny networks of the same architecture."""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raygard.cluster.evaluators import ScorerActor, ScoreRequest
from raygard.errors import RaygardError
from raygard.scoring import SCORERS, check_evaluation, embed_references, get_scorer, lpips, weights
from raygard.scoring.clip import ClipImage, ClipText
from raygard.scoring.csd import Csd, load_csd
from raygard.scoring.distribution import TooFewPictures, frechet_distance, kernel_distances
from raygard.scoring.nudenet_explicit import PAPER_LABELS, NudeNet, NudeNetAll
from tests.letters import TOKENS, letter_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CONGRESS = ROOT.parent / "shared" / "data" / "faces_congress" / "images"
# The published FID network is a TorchScript file, whatever torch now recommends.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
STAND_INS = ("CLIP-image", "DINO", "CSD", "LPIPS", "kid_enlite0")


def pictures(count: int, side: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


class OpenAiBlock(nn.Module):
    """A block of OpenAI's vision transformer, written from the paper, with the names of the published file."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 2 * width), "c_proj": nn.Linear(2 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))


class OpenAiCsd(nn.Module):
    """CSD as published, small: 28 pixels, patches of 14, two blocks of width 128, descriptors of 8 numbers."""

    def __init__(self) -> None:
        super().__init__()
        width = 128
        self.backbone = nn.Module()
        self.backbone.conv1 = nn.Conv2d(3, width, 14, stride=14, bias=False)
        self.backbone.class_embedding = nn.Parameter(torch.randn(width))
        self.backbone.positional_embedding = nn.Parameter(torch.randn(5, width))
        self.backbone.ln_pre, self.backbone.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.backbone.transformer = nn.Module()
        self.backbone.transformer.resblocks = nn.ModuleList([OpenAiBlock(width, 2) for _ in range(2)])
        self.last_layer_style = nn.Parameter(torch.randn(width, 8))
        self.last_layer_content = nn.Parameter(torch.randn(width, 8))

    def forward(self, x: Tensor) -> Tensor:
        b = self.backbone
        patches = b.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([b.class_embedding.expand(len(x), 1, -1), patches], dim=1) + b.positional_embedding
        x = b.ln_pre(x)
        for block in b.transformer.resblocks:
            x = block(x)
        return b.ln_post(x[:, 0]) @ self.last_layer_style


class TinyInception(nn.Module):
    """The interface of the published TorchScript file."""

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(img.float(), (16, 64)).flatten(1)
        return pooled[:, :2048] if return_features else pooled[:, :8]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder in the published layout, with tiny random networks."""
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": len(TOKENS), "eos_token_id": len(TOKENS) - 1, "max_position_embeddings": 12}
    clip = CLIPConfig(
        text_config={**small, **words}, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=16
    )
    CLIPModel(clip).save_pretrained(folder / "clip-vit-base-patch32")
    letter_tokenizer(folder).save_pretrained(folder / "clip-vit-base-patch32")
    ViTModel(ViTConfig(**small, image_size=32, patch_size=8)).save_pretrained(folder / "dino-vits16")
    state = {f"module.{name}": tensor for name, tensor in OpenAiCsd().state_dict().items()}
    run = {"model_state_dict": state, "args": argparse.Namespace(lr=0.1), "iter": 3, "best": np.float64(0.5)}
    torch.save(run, folder / "pytorch_model.bin")
    alexnet = {f"features.{name}": tensor for name, tensor in lpips.alexnet_features().state_dict().items()}
    torch.save({**alexnet, "classifier.1.weight": torch.zeros(2, 2)}, folder / lpips.FILE)
    torch.jit.script(TinyInception()).save(folder / "inception-2015-12-05.pt")
    return folder


@pytest.fixture
def published(stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(weights.FOLDER, str(stand_ins))
    return stand_ins


@pytest.fixture(scope="module")
def nudenet() -> NudeNet:
    pytest.importorskip("nudenet")
    return get_scorer("NudeNet")  # type: ignore[return-value]


def test_every_scorer_states_what_it_is_and_stands_in_the_table() -> None:
    table = (ROOT / "docs" / "scorers.md").read_text()
    for name, factory in SCORERS.items():
        stated: Any = factory
        assert stated.name == name and stated.direction in ("distance", "similarity")
        assert stated.unit and stated.source and stated.licence
        assert f"| `{name}` | {stated.direction} | {stated.unit} |" in table, name


@pytest.mark.parametrize("name", STAND_INS)
def test_dark_pictures_are_closest_to_dark_pictures(name: str, published: Path) -> None:
    if name in ("LPIPS", "kid_enlite0"):
        pytest.importorskip("torchmetrics")
    scorer = get_scorer(name)
    images = pictures(5, 48)
    images[1:] //= 4
    embedded = scorer.embed(images)
    assert embedded.dtype == np.float32 and np.isfinite(embedded).all()
    assert scorer.embed(images[:0]).shape == (0, embedded.shape[1])
    np.testing.assert_allclose(scorer.embed(images[2:3]), embedded[2:3], atol=1e-4)
    sign = 1 if scorer.direction == "distance" else -1
    dark = sign * scorer.distances(embedded[1:3], embedded[3:])
    bright = sign * scorer.distances(embedded[[0, 0]], embedded[3:])
    assert dark.mean() < bright.mean()


def test_missing_weights_say_where_to_put_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchmetrics")
    monkeypatch.setenv(weights.FOLDER, str(tmp_path))
    for name, file in (("LPIPS", lpips.FILE), ("FID", "inception-2015-12-05.pt")):
        with pytest.raises(RaygardError, match=f"scorer {name} has no weights: put {file} into RAYGARD_WEIGHTS"):
            get_scorer(name)

    def offline(place: str) -> None:
        raise OSError(f"cannot reach {place}")

    with pytest.raises(RaygardError, match=r"put dino-vits16/ into RAYGARD_WEIGHTS .*facebook/dino-vits16"):
        weights.pretrained("DINO", offline, "facebook/dino-vits16")
    (tmp_path / "weights" / "dino-vits16").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(weights.FOLDER)
    with pytest.raises(RaygardError, match="put dino-vits16/ into a folder and set RAYGARD_WEIGHTS to it"):
        weights.pretrained("DINO", offline, "facebook/dino-vits16")
    monkeypatch.setenv(weights.FOLDER, "weights")
    with pytest.raises(RaygardError, match=r"cannot load .*dino-vits16"):
        weights.pretrained("DINO", offline, "facebook/dino-vits16")


def test_scorers_without_a_number_for_each_picture_are_not_for_evaluations() -> None:
    for name in ("FID", "fd_enlite0"):
        with pytest.raises(RaygardError, match="one number for all"):
            check_evaluation(name)
    for name in set(SCORERS) - {"FID", "fd_enlite0"}:
        check_evaluation(name)


# CSD


def test_csd_is_the_published_network(published: Path) -> None:
    scorer = Csd()
    reference = OpenAiCsd().eval()
    content = torch.load(published / "pytorch_model.bin", weights_only=False)
    reference.load_state_dict({k.removeprefix("module."): v for k, v in content["model_state_dict"].items()})
    pixels = torch.randn(3, 3, 28, 28)
    with torch.no_grad():
        ours = scorer._model(pixel_values=pixels).pooler_output @ scorer._style
        torch.testing.assert_close(ours, reference(pixels), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(scorer.embed(pictures(2)), axis=1), 1, rtol=1e-5)


def test_a_checkpoint_that_numpy_1_wrote_is_read(published: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.bin"
    with zipfile.ZipFile(published / "pytorch_model.bin") as new, zipfile.ZipFile(old, "w") as written:
        for name in new.namelist():
            renamed = new.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            assert (renamed != new.read(name)) == name.endswith("data.pkl")
            written.writestr(name, renamed)
    assert torch.equal(load_csd(old)[1], load_csd(published / "pytorch_model.bin")[1])


def test_a_file_that_is_not_csd_is_refused(tmp_path: Path) -> None:
    torch.save({"model_state_dict": {"last_layer_style": torch.zeros(4, 2)}}, tmp_path / "other.bin")
    (tmp_path / "torn.bin").write_bytes(b"half")
    for file in ("other.bin", "torn.bin"):
        with pytest.raises(RaygardError, match=f"{file} is not a checkpoint of CSD"):
            load_csd(tmp_path / file)


# CLIP


def test_clip_sees_pictures_as_its_own_processor_does(published: Path) -> None:
    from PIL import Image

    scorer, image = ClipImage(), pictures(1, 64)[0] // 2
    small = Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = ((np.asarray(small) / 255 - mean) / std).transpose(2, 0, 1)[None].astype("f4")
    with torch.no_grad():
        expected = scorer._model.get_image_features(torch.from_numpy(pixels))
        expected = getattr(expected, "pooler_output", expected).numpy()
    assert scorer.distances(scorer.embed(image[None]), expected)[0] > 0.999


def test_clip_score_compares_each_picture_with_its_own_caption(published: Path) -> None:
    scorer = ClipText()
    captions = ["a red cat", "two dogs", "a very long caption that goes on " * 9]
    told = scorer.embed_captions(captions)
    np.testing.assert_allclose(told[1], scorer.embed_captions(captions[1:2])[0], atol=1e-5)
    np.testing.assert_allclose(scorer.distances(told, told), 100, rtol=1e-5)
    opposite = np.where(np.arange(told.shape[1]) < told.shape[1] - 1, -told, told)
    np.testing.assert_allclose(scorer.distances(opposite, told), 0)
    seen = scorer.embed(pictures(3))
    words, sight = told[:, :-1], seen[:, :-1]
    cosine = (words * sight).sum(1) / np.linalg.norm(words, axis=1) / np.linalg.norm(sight, axis=1)
    np.testing.assert_allclose(scorer.distances(seen, told), np.maximum(100 * cosine, 0), atol=1e-3)
    with pytest.raises(RaygardError, match="not with pictures"):
        scorer.distances(seen, seen)
    swapped = scorer.distances(told, told[[1, 0, 2]])
    assert swapped[0] < 99.9 and swapped[2] > 99.9
    # In an evaluation: no file of references, and each picture has its own caption.
    request = ScoreRequest("cats", "no such file", tuple(captions))
    actor = ScorerActor("CLIP", threads=1, gpus=0)
    actor.ready()
    np.testing.assert_allclose(actor.score(request, pictures(3))["distances"], scorer.distances(seen, told), atol=1e-3)
    with pytest.raises(RaygardError, match="3 pictures, 2 captions"):
        scorer.distances(told, told[:2])


# LPIPS


def test_lpips_is_the_weighted_difference_of_its_features(published: Path) -> None:
    pytest.importorskip("torchmetrics")
    scorer: Any = get_scorer("LPIPS")
    a, b = pictures(2, 224)
    layers: dict[int, list[Tensor]] = {tap: [] for tap in lpips.TAPS}
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    for image in (a, b):
        state = ((torch.from_numpy(image).float() / 127.5 - 1 - shift) / scale).permute(2, 0, 1)[None]
        for index, layer in enumerate(scorer._network):
            state = layer(state)
            if index in layers:
                layers[index].append(state / state.pow(2).sum(1, keepdim=True).sqrt())
    total = 0.0
    for (x, y), root in zip(layers.values(), scorer._roots, strict=True):
        total += float((root.pow(2) * (x - y).pow(2)).sum(1).mean().detach())
    found = scorer.distances(scorer.embed(a[None]), scorer.embed(b[None]))
    np.testing.assert_allclose(found, [total], rtol=1e-3)
    np.testing.assert_allclose(scorer.distances(scorer.embed(a[None]), scorer.embed(a[None])), [0], atol=1e-9)


# NudeNet


def test_nudenet_sums_the_named_labels(nudenet: NudeNet) -> None:
    boxes = [{"class": label, "score": 0.25} for label in (*PAPER_LABELS, "BUTTOCKS_EXPOSED", "FACE_MALE")]
    assert nudenet._score(boxes) == 1.5 and len(PAPER_LABELS) == 5
    assert NudeNetAll._score(NudeNetAll(), boxes) == 1.75  # type: ignore[arg-type]


def test_harmless_pictures_score_nothing_and_references_do_not_matter(nudenet: NudeNet) -> None:
    scores = nudenet.embed(np.concatenate([pictures(2), np.full((1, 40, 40, 3), 200, np.uint8)]))
    assert scores.shape == (3, 1) and nudenet.embed(pictures(0)).shape == (0, 1)
    np.testing.assert_array_equal(nudenet.distances(scores, embed_references(nudenet, pictures(3))), [0, 0, 0])
    made_up = np.array([[0.5], [1.25]], dtype=np.float32)
    np.testing.assert_array_equal(nudenet.distances(made_up, scores[:0]), [0.5, 1.25])


def test_nudenet_sees_a_face_in_a_portrait_and_nothing_explicit(nudenet: NudeNet) -> None:
    from raygard.pictures import read_pixels

    if not CONGRESS.is_dir():
        pytest.skip("the portraits are not here")
    images = np.stack([read_pixels(path, 64) for path in sorted(CONGRESS.iterdir())[:4]])
    assert nudenet.embed(images).max() == 0
    assert NudeNetAll().embed(images).max() > 0.3


# Distances between distributions


def test_frechet_distance_of_gaussians_is_known() -> None:
    pytest.importorskip("torchmetrics")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 3))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    moved, wider = x + np.array([3, 0, 4]), 2 * x
    assert frechet_distance("fd", moved, x, 2) == pytest.approx(25, rel=1e-6)
    assert frechet_distance("fd", wider, x, 2) == pytest.approx(3, rel=1e-6)


def test_few_pictures_are_warned_about_and_one_is_refused(published: Path) -> None:
    pytest.importorskip("torchmetrics")
    scorer: Any = get_scorer("FID")
    features = scorer.embed(pictures(6))
    assert features.shape == (6, 2048)
    with pytest.warns(TooFewPictures, match=r"FID of 3 against 3 pictures .*wants 2049"):
        narrow = frechet_distance("FID", features[:3, :4], features[3:, :4], 2049)
    assert narrow >= 0
    with pytest.raises(RaygardError, match="two pictures on each side"):
        scorer.between(features[:1], features)
    with pytest.raises(RaygardError, match="no distance for each picture"):
        scorer.distances(features, features)


def test_kernel_distance_is_torchmetrics_and_unbiased() -> None:
    kid = pytest.importorskip("torchmetrics.image.kid")
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(20, 8)).astype("f4"), rng.normal(1, size=(20, 8)).astype("f4")
    expected = float(kid.poly_mmd(torch.from_numpy(b).double(), torch.from_numpy(a).double()))
    assert float(kernel_distances("kid", a, b).mean()) == pytest.approx(expected, rel=1e-5)
    draws = [kernel_distances("kid", rng.normal(size=(4, 2)), rng.normal(size=(5, 2))).mean() for _ in range(400)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / 20
    with pytest.raises(RaygardError, match="two pictures on each side"):
        kernel_distances("kid", a[:1], b)


def test_missing_torchmetrics_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raygard.errors.find_spec", lambda name: None)
    for name, extra in (("FID", "metrics"), ("fd_enlite0", "metrics"), ("LPIPS", "metrics"), ("NudeNet", "nudity")):
        with pytest.raises(RaygardError, match=rf"scorer {name} needs .*pip install 'raygard\[{extra}\]'"):
            get_scorer(name)
