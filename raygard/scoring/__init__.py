"""Scorers: evaluation models that say how far pictures are from a class. One file and one `register` line
each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal, Protocol

from raygard.errors import RaygardError, nearest
from raygard.scoring.clip import ClipImage, ClipText
from raygard.scoring.csd import Csd
from raygard.scoring.deepface_faces import DlibFace, DlibWhole, FaceNet128, FaceNet512, VggFace
from raygard.scoring.dino import Dino
from raygard.scoring.fd_enlite0 import FdEnLite0
from raygard.scoring.fid import Fid
from raygard.scoring.kid_enlite0 import KidEnLite0
from raygard.scoring.lpips import Lpips
from raygard.scoring.nudenet_explicit import NudeNet, NudeNetAll
from raygard.scoring.style_enlite0 import StyleEnLite0

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SCORERS: dict[str, Callable[..., Scorer]] = {}
# What `face_detection` adds to a score.
DETECTION = ("undetected", "mean_detected")


class Scorer(Protocol):
    """An evaluation model, named for what it is.

    direction: "distance" (lower is closer to the target) or "similarity". unit, source, licence: for the
    report.

    Some can more: `undetected(embeddings) -> bool (n,)` says where no face was found; `between(generated, references)
    -> float` compares whole sets, and `per_picture` is False where there is nothing else; `references` is "captions"
    where references are captions (`embed_captions(captions)`) and "none" where there are none.
    """

    name: str
    direction: Literal["distance", "similarity"]
    unit: str
    source: str
    licence: str

    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings (n, d) of pictures uint8 (n, H, W, 3)."""
        ...

    def distances(self, generated: NDArray[np.float32], references: NDArray[np.float32]) -> NDArray[np.float32]:
        """Mean distance of each generated embedding (n, d) to the references (m, d): (n,)."""
        ...


def register(name: str, factory: Callable[..., Scorer]) -> None:
    """Add a scorer; `factory()` loads it on the CPU, `factory(device="cuda")` on a GPU if it can.

    Raises RaygardError if the name is taken.
    """
    if name in SCORERS:
        raise RaygardError(f"scorer '{name}' is registered twice")
    SCORERS[name] = factory


def get_scorer(name: str, device: str = "cpu") -> Scorer:
    """Load the scorer called `name` (`evaluation.scorer`).

    device: "cpu" or "cuda". Raises RaygardError with the nearest known name, if the packages it needs are missing,
    or if it runs on the CPU only.
    """
    if name not in SCORERS:
        raise RaygardError(f"unknown scorer '{name}' (evaluation.scorer){nearest(name, SCORERS)}")
    factory = SCORERS[name]
    if device == "cpu":
        return factory()
    if "device" not in signature(factory).parameters:
        raise RaygardError(f"scorer '{name}' runs on the CPU only; set evaluation.scorer_gpus to 0")
    return factory(device=device)


def scorer_facts(name: str) -> Any:
    """What has `direction` and `unit` of the scorer called `name`. Raises RaygardError with the nearest known name."""
    if name not in SCORERS:
        raise RaygardError(f"unknown scorer '{name}'{nearest(name, SCORERS)}")
    factory: Any = SCORERS[name]
    # A class tells these without loading any weights; a plain function must be called first.
    return factory if hasattr(factory, "direction") and hasattr(factory, "unit") else factory()


def check_evaluation(name: str) -> None:
    """Raise RaygardError unless `evaluation.scorer` can be `name`: a number for each picture."""
    if not getattr(SCORERS.get(name), "per_picture", True):
        raise RaygardError(
            f"evaluation.scorer '{name}' has one number for all pictures together, and intervals need one for each; "
            "use kid_enlite0"
        )


def embed_references(scorer: Any, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What `scorer` compares with, made of the reference pictures uint8 (m, H, W, 3): float32 (m, d), or (0, d) for a
    scorer that compares with nothing."""
    return scorer.embed(pictures[:0] if getattr(scorer, "references", "pictures") == "none" else pictures)


def face_detection(
    scorer: Any, generated: NDArray[np.float32], distances: NDArray[np.float32]
) -> dict[str, float | None]:
    """What stands beside the distances (n,) of generated embeddings (n, d) of faces; empty for other scorers.

    undetected: share of pictures without a face. mean_detected: mean distance of the others, None if there are none.
    """
    if not hasattr(scorer, "undetected"):
        return {}
    missing = scorer.undetected(generated)
    found = distances[~missing]
    share = float(missing.mean()) if len(missing) else 0.0
    return {"undetected": share, "mean_detected": float(found.mean()) if len(found) else None}


def pooled_detection(items: Sequence[tuple[int, Mapping[str, float | None]]]) -> dict[str, float | None]:
    """What `face_detection` says of all pictures together, from items of n pictures each and what it says of them."""
    if not all(found for _, found in items):
        return {}
    total, faces, distances = 0, 0, 0.0
    for count, found in items:
        detected = round(count * (1 - (found["undetected"] or 0.0)))
        total, faces = total + count, faces + detected
        distances += detected * (found["mean_detected"] or 0.0)
    return {
        "undetected": (total - faces) / total if total else 0.0,
        "mean_detected": distances / faces if faces else None,
    }


register(StyleEnLite0.name, StyleEnLite0)
register(Csd.name, Csd)
register(FaceNet512.name, FaceNet512)
register(FaceNet128.name, FaceNet128)
register(VggFace.name, VggFace)
register(DlibFace.name, DlibFace)
register(DlibWhole.name, DlibWhole)
register(NudeNet.name, NudeNet)
register(NudeNetAll.name, NudeNetAll)
register(ClipText.name, ClipText)
register(ClipImage.name, ClipImage)
register(Dino.name, Dino)
register(Lpips.name, Lpips)
register(Fid.name, Fid)
register(FdEnLite0.name, FdEnLite0)
register(KidEnLite0.name, KidEnLite0)
