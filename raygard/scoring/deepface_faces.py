"""Faces through DeepFace: how far the person in a picture is from the person in the references.

A face is found and aligned by Dlib's detector, then embedded by one of four networks and compared by cosine
distance. An embedding carries, as its last number, whether a face was found: the share of pictures without a face
travels with the embeddings and stands beside the distance. DeepFace runs on torch, without TensorFlow.
"""

from __future__ import annotations

import importlib
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from raygard.errors import RaygardError
from raygard.files import scratch
from raygard.scoring.common import check_pictures, check_references, mean_cosine_distance, package_folder, require

# Dlib's detector misses one in six small portraits of 64 pixels, and none of them at 128. Faces that fill the picture
# are found better as they are, so a picture is enlarged only when nothing is found (docs/scorers.md).
LARGE_SIDE = 128
# The detector's box cuts off chin and forehead; with them people are told apart better (docs/scorers.md).
EXPAND_PERCENTAGE = 25
LANDMARKS = "shape_predictor_5_face_landmarks.dat"
WEIGHTS_PACKAGE = "face_recognition_models"
SETTINGS = {"DEEPFACE_BACKEND_ENGINE": "pytorch", "DEEPFACE_LOG_LEVEL": "40"}


class DeepFaceScorer:
    """One of DeepFace's networks; distances are cosine distances, 0 (same) to 2.

    without_face: "stranger": a generated picture without a face is as far as a stranger (`stranger`), and reference
    pictures without a face are left out; "whole": the whole picture is embedded in place of a face.
    Raises RaygardError if packages are missing, or weights, saying where to put them.
    """

    name: str
    model: str
    weights: str
    # Distance of pictures of two people who look least alike to this network.
    stranger: float = 1.0
    without_face: Literal["stranger", "whole"] = "stranger"
    direction: Literal["distance", "similarity"] = "distance"
    unit = "cosine distance"
    source: str
    licence: str

    def __init__(self, device: str = "cpu") -> None:
        require(self.name, "faces", "deepface", "dlib", WEIGHTS_PACKAGE, "cv2")
        with _deepface_home(self.weights) as folder:
            for file in (LANDMARKS, self.weights):
                _place(folder / file)
            self._deepface = _import_deepface()
            try:
                client = self._deepface.build_model(task="facial_recognition", model_name=self.model)
                self._deepface.build_model(task="face_detector", model_name="dlib")
            except (ValueError, OSError, RuntimeError) as error:
                place = folder / self.weights
                state = "has damaged weights" if place.is_file() else "has no weights and could not download them"
                raise RaygardError(f"scorer {self.name} {state}; put DeepFace's {self.weights} at {place}") from error
        if hasattr(client, "device"):
            # DeepFace takes any GPU it sees; a scorer takes what it was given.
            import torch

            client.device = torch.device(device)
            client.model.to(client.device)
        self._width = int(client.output_shape) + 1

    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings float32 (n, d + 1) of pictures uint8 (n, H, W, 3); of several faces the largest counts.

        The last number is 1 where a face was found. Where none was, the others embed the whole picture.
        """
        check_pictures(images)
        found = [self._embed(image) for image in images]
        return np.stack(found) if found else np.zeros((0, self._width), dtype=np.float32)

    def undetected(self, embeddings: NDArray[np.float32]) -> NDArray[np.bool_]:
        """In which of the embedded pictures (n, d + 1) no face was found: bool (n,)."""
        return embeddings[:, -1] == 0

    def distances(self, generated: NDArray[np.float32], references: NDArray[np.float32]) -> NDArray[np.float32]:
        """Mean cosine distance of each generated embedding (n, d + 1) to all references (m, d + 1): float32 (n,).

        Raises RaygardError if there are no references, or no face in any of them.
        """
        check_references(references)
        if self.without_face == "whole":
            return mean_cosine_distance(generated[:, :-1], references[:, :-1])
        known = references[~self.undetected(references)]
        if len(known) == 0:
            raise RaygardError(f"scorer {self.name} found no face in any of {len(references)} reference pictures")
        distances = mean_cosine_distance(generated[:, :-1], known[:, :-1])
        return np.where(self.undetected(generated), np.float32(self.stranger), distances)

    def _embed(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        from deepface.modules.exceptions import FaceNotDetected, ImgNotFound

        options = {"model_name": self.model, "max_faces": 1}
        aligned = {"detector_backend": "dlib", "expand_percentage": EXPAND_PERCENTAGE}
        # DeepFace takes pictures in the order blue, green, red.
        picture = np.ascontiguousarray(image[:, :, ::-1])
        for tried in (picture, _enlarged(picture)):
            try:
                faces = self._deepface.represent(tried, **aligned, **options)
            except (FaceNotDetected, ImgNotFound):
                continue
            return np.array([*faces[0]["embedding"], 1.0], dtype=np.float32)
        faces = self._deepface.represent(picture, detector_backend="skip", **options)
        return np.array([*faces[0]["embedding"], 0.0], dtype=np.float32)


class FaceNet512(DeepFaceScorer):
    """FN-L of the FreezeAsGuard paper."""

    name, model, weights = "FN-L", "Facenet512", "facenet512_weights.pth"
    source = "DeepFace, Facenet512 (Schroff et al. 2015, arXiv 1503.03832; weights of serengil/deepface_models)"
    licence = "MIT (DeepFace), weights as stated by serengil/deepface_models"


class FaceNet128(DeepFaceScorer):
    """FN of the FreezeAsGuard paper."""

    name, model, weights = "FN", "Facenet", "facenet_weights.pth"
    source = "DeepFace, Facenet (Schroff et al. 2015, arXiv 1503.03832; weights of serengil/deepface_models)"
    licence = "MIT (DeepFace), weights as stated by serengil/deepface_models"


class VggFace(DeepFaceScorer):
    """VGG of the FreezeAsGuard paper."""

    name, model, weights = "VGG", "VGG-Face", "vgg_face_weights.pth"
    source = "DeepFace, VGG-Face (Parkhi et al., BMVC 2015; weights of serengil/deepface_models)"
    licence = "MIT (DeepFace), weights for non-commercial research only"


class DlibFace(DeepFaceScorer):
    """Dlib's ResNet, whose weights come from a package, so that it works offline."""

    name, model, weights = "Dlib", "Dlib", "dlib_face_recognition_resnet_model_v1.dat"
    # The largest between pictures of two of 40 people (Olivetti, docs/scorers.md).
    stranger = 0.28
    source = "DeepFace, Dlib (King, dlib.net; weights of the package face-recognition-models)"
    licence = "MIT (DeepFace), Boost (dlib), CC0 (weights)"

    def __init__(self) -> None:
        super().__init__()


class DlibWhole(DlibFace):
    """Dlib's ResNet; a picture without a face is embedded whole, as DeepFace does with `enforce_detection=False`."""

    name = "Dlib-whole"
    without_face = "whole"


def _enlarged(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    import cv2

    height, width = picture.shape[:2]
    scale = max(1.0, LARGE_SIDE / min(height, width))
    size = (round(width * scale), round(height * scale))
    return cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC).astype(np.uint8)


@contextmanager
def _deepface_home(weights: str) -> Iterator[Path]:
    """The folder of DeepFace's weights: DEEPFACE_HOME, else the user's home if it holds `weights`, else a cache folder.

    DeepFace reads the environment while it is imported and while it loads weights, and makes ~/.deepface.
    """
    before, inside = os.environ.get("DEEPFACE_HOME"), Path(".deepface") / "weights"
    if before:
        home = Path(before)
    elif (Path.home() / inside / weights).is_file():
        home = Path.home()
    else:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raygard"
    os.environ["DEEPFACE_HOME"] = str(home)
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    try:
        yield home / inside
    finally:
        if before is None:
            del os.environ["DEEPFACE_HOME"]
        else:
            os.environ["DEEPFACE_HOME"] = before


def _place(file: Path) -> None:
    """Copy weights that a package brought to where DeepFace looks for them."""
    package = package_folder(WEIGHTS_PACKAGE)
    if file.is_file() or package is None or not (source := package / "models" / file.name).is_file():
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RaygardError(f"cannot write to {file.parent}: {error.strerror}; set DEEPFACE_HOME to a folder") from None
    with scratch(file) as copy:
        shutil.copyfile(source, copy)


def _import_deepface() -> Any:
    # Importing DeepFace silences every warning of the process.
    with warnings.catch_warnings():
        return importlib.import_module("deepface.DeepFace")
