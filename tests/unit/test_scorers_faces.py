"""Faces through DeepFace: people are told apart, and a picture without a face is counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raygard.errors import RaygardError
from raygard.pictures import read_pixels
from raygard.scoring import SCORERS, deepface_faces, face_detection, get_scorer
from raygard.scoring.deepface_faces import LANDMARKS, DlibFace, DlibWhole, FaceNet512

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
OLIVETTI, CONGRESS = DATA / "faces_olivetti", DATA / "faces_congress" / "images"
# Portraits whose faces the detector misses at 64 pixels.
SMALL_FACES = ("B000944.png", "B001230.png")
BLANK = np.full((1, 64, 64, 3), 127, dtype=np.uint8)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("dlib")
    pytest.importorskip("cv2")
    folder = tmp_path_factory.mktemp("deepface")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPFACE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def scorer(home: Path) -> DlibFace:
    return get_scorer("Dlib")  # type: ignore[return-value]


def people(count: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (count x each, 64, 64, 3) and whom they show."""
    if not OLIVETTI.is_dir():
        pytest.skip("the Olivetti faces are not here")
    rows = [json.loads(line) for line in (OLIVETTI / "metadata.jsonl").read_text().splitlines()]
    names = sorted({row["class"] for row in rows})[:count]
    chosen = [row for name in names for row in [r for r in rows if r["class"] == name][:each]]
    return np.stack([read_pixels(OLIVETTI / r["file_name"], 64) for r in chosen]), np.repeat(np.arange(count), each)


def rows(*values: tuple[float, float, float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_a_person_is_nearer_to_herself_than_to_others(scorer: DlibFace) -> None:
    pictures, person = people(4, 3)
    embedded = scorer.embed(pictures)
    assert embedded.shape == (12, 129) and embedded.dtype == np.float32
    assert scorer.undetected(embedded).mean() < 0.3
    first = np.arange(12) % 3 == 0
    gaps = np.stack([scorer.distances(embedded[first], embedded[~first & (person == p)]) for p in range(4)])
    assert (gaps.argmin(axis=0) == np.arange(4)).all()
    assert gaps.diagonal().max() < gaps[~np.eye(4, dtype=bool)].min()


def test_small_faces_are_found_by_enlarging(scorer: DlibFace, monkeypatch: pytest.MonkeyPatch) -> None:
    if not CONGRESS.is_dir():
        pytest.skip("the portraits are not here")
    images = np.stack([read_pixels(CONGRESS / name, 64) for name in SMALL_FACES])
    assert not scorer.undetected(scorer.embed(images)).any()
    monkeypatch.setattr(deepface_faces, "LARGE_SIDE", 64)
    assert scorer.undetected(scorer.embed(images)).all()


def test_weights_are_put_into_the_folder_that_was_named(scorer: DlibFace, home: Path) -> None:
    placed = {path.name for path in (home / ".deepface" / "weights").iterdir()}
    # Another test may have put its own weights there.
    assert placed - {FaceNet512.weights} == {LANDMARKS, DlibFace.weights}


def test_the_users_home_is_left_alone(tmp_path: Path) -> None:
    pytest.importorskip("deepface")
    user = tmp_path / "user"
    user.mkdir()
    code = (
        "from raygard.scoring import get_scorer; import os; get_scorer('Dlib'); print(os.environ.get('DEEPFACE_HOME'))"
    )
    variables = {k: v for k, v in os.environ.items() if k != "DEEPFACE_HOME"}
    variables |= {"HOME": str(user), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"
    assert (tmp_path / "cache" / "raygard" / ".deepface" / "weights" / LANDMARKS).is_file()
    assert list(user.iterdir()) == []


def test_a_picture_without_a_face_is_counted(scorer: DlibFace) -> None:
    embedded = scorer.embed(np.concatenate([BLANK, BLANK]))
    assert scorer.undetected(embedded).all() and np.isfinite(embedded).all()
    with pytest.raises(RaygardError, match="no face in any of 2 reference pictures"):
        scorer.distances(embedded, embedded)
    assert scorer.embed(BLANK[:0]).shape == (0, 129)


def test_without_a_face_the_distance_is_that_of_a_stranger(scorer: DlibFace) -> None:
    generated, references = rows((1, 0, 1), (1, 0, 0)), rows((1, 0, 1), (0, 1, 0))
    distances = scorer.distances(generated, references)
    np.testing.assert_allclose(distances, [0, DlibFace.stranger], atol=1e-6)
    assert face_detection(scorer, generated, distances) == {"undetected": 0.5, "mean_detected": 0.0}
    nothing = face_detection(scorer, generated[1:], distances[1:])
    assert nothing == {"undetected": 1.0, "mean_detected": None}


def test_whole_pictures_are_compared_where_that_was_asked_for(home: Path) -> None:
    scorer = DlibWhole()
    generated, references = rows((1, 0, 1), (1, 0, 0)), rows((1, 0, 1), (0, 1, 0))
    np.testing.assert_allclose(scorer.distances(generated, references), [0.5, 0.5], atol=1e-6)
    assert face_detection(scorer, generated, np.zeros(2, "f4"))["undetected"] == 0.5


def test_facenet_runs_on_torch_with_weights_of_its_architecture(home: Path) -> None:
    torch = pytest.importorskip("torch")
    place = home / ".deepface" / "weights" / FaceNet512.weights
    from deepface.models.facial_recognition.pytorch.Facenet import InceptionResNetV1

    place.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.save(InceptionResNetV1(dimension=512).state_dict(), place)
    scorer = FaceNet512()
    embedded = scorer.embed(np.concatenate([BLANK, BLANK]))
    assert embedded.shape == (2, 513)
    np.testing.assert_array_equal(embedded[0], embedded[1])
    assert "tensorflow" not in sys.modules


def test_missing_weights_say_where_to_put_them(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_utils = pytest.importorskip("deepface.commons.weight_utils")

    def refuse(url: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr(weight_utils, "ensure_source_is_reachable", refuse)
    with pytest.raises(
        RaygardError, match=r"scorer FN has no weights.*facenet_weights.pth at .*weights/facenet_weights"
    ):
        get_scorer("FN")


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepface_faces, "WEIGHTS_PACKAGE", "no_such_package_at_all")
    with pytest.raises(RaygardError, match=r"scorer Dlib needs no_such_package_at_all: pip install 'raygard\[faces\]'"):
        get_scorer("Dlib")


def test_dlib_refuses_a_gpu() -> None:
    assert "Dlib" in SCORERS
    with pytest.raises(RaygardError, match="runs on the CPU only"):
        get_scorer("Dlib", "cuda")
