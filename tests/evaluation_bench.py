"""A tiny model, four classes and a mask, ready for `run_jobs`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from raygard.cluster.evaluation import EvaluationInputs, EvaluationJob, EvaluationPool, run_jobs
from raygard.config import RunConfig
from raygard.config_file import load_config
from raygard.diffusion.cache import build_cache
from raygard.diffusion.model import load_denoiser
from raygard.domain import load_domain
from raygard.mask import FreezeMask
from raygard.pictures import read_pixels
from raygard.store import Store

CLASSES = {"a": "illegal", "b": "illegal", "c": "legal", "d": "legal"}
PARTS = ("select_adapt", "select_reference")
NUM_IMAGES, BATCH = 5, 2
SPANS = [[0, 2], [2, 4], [4, 5]]
OVERRIDES = (
    "domain.illegal=[a,b]",
    "domain.legal=[c,d]",
    "domain.resolution=16",
    "adapt.max_train_steps=4",
    "adapt.learning_rate=1e-3",
    f"generation.num_images={NUM_IMAGES}",
    f"generation.batch_size={BATCH}",
    "generation.num_inference_steps=3",
    "evaluation.half=publisher",
    "evaluation.cpus_per_job=1",
)


@dataclass(frozen=True)
class Bench:
    """Everything lies in `root`: sd, data, cache, mask, references.npz."""

    root: Path

    def config(self, *overrides: str) -> RunConfig:
        paths = [f"domain.data={self.root / 'data'}", f"model.pretrained_model_name_or_path={self.root / 'sd'}"]
        return load_config(None, [*paths, *OVERRIDES, *overrides])

    def inputs(self, config: RunConfig, store: Path, milestones: tuple[int, ...] = ()) -> EvaluationInputs:
        (cache,) = (self.root / "cache").iterdir()
        references = str(self.root / "references.npz")
        return EvaluationInputs(config.model_dump(mode="json"), str(cache), *PARTS, references, str(store), milestones)

    def jobs(self, *defences: str, classes: str = "abcd") -> list[EvaluationJob]:
        """One user of each class under each defence; "freeze" has the bench's mask."""
        masks = {"freeze": str(self.root / "mask")}
        return [EvaluationJob(name, cls, CLASSES[cls], mask=masks.get(name)) for name in defences for cls in classes]


def make_bench(
    root: Path,
    tiny_maker: Callable[..., Path],
    imagefolder_maker: Callable[..., Path],
    greys: Mapping[str, int] | None = None,
    repeat: int = 1,
) -> Bench:
    """greys: classes whose reference pictures are painted in one grey, so that a scorer can tell them.

    repeat: of the reference pictures; a scorer takes long over the first item of a class with many.
    """
    tiny_maker(root / "sd")
    imagefolder_maker(root / "data", dict.fromkeys(CLASSES, 48))
    bench = Bench(root)
    config = bench.config()
    view = load_domain(config.domain).view("select")
    build_cache(config.model, config.domain, view, [(c, p) for c in CLASSES for p in PARTS], root / "cache")
    arrays, captions = {}, {}
    for index, cls in enumerate(CLASSES):
        pictures = view.pictures(cls, PARTS[1])
        arrays[str(index)] = np.stack([read_pixels(picture.path, 16, True) for picture in pictures] * repeat)
        captions[cls] = [picture.caption for picture in pictures]
        if cls in (greys or {}):
            arrays[str(index)][:] = (greys or {})[cls]
    np.savez(root / "references.npz", allow_pickle=False, **arrays)
    (root / "references.json").write_text(json.dumps({"classes": list(CLASSES), "captions": captions}))
    unet = load_denoiser(config.model)
    FreezeMask.create(unet, [name for name, _ in unet.named_parameters()][::3]).save(root / "mask")
    return bench


def assert_each_picture_scored_once(results: list[dict[str, Any]], store: Path) -> int:
    """Every picture of every result has one distance; returns how many items that took."""
    items = 0
    for key in {result["store"] for result in results}:
        record = Store(store)._read_json(key, "score-style_enlite0.json")
        assert record is not None
        assert [item["rows"] for item in record["items"]] == SPANS
        assert len(record["distances"]) == NUM_IMAGES
        items += len(record["items"])
    assert all(result["n"] == len(result["distances"]) == NUM_IMAGES for result in results)
    return items


class Trial:
    """What a Ray Tune trial is to an evaluation: another process that owns adaptations."""

    def __init__(self, pool: EvaluationPool) -> None:
        self.pool = pool

    def run(self, jobs: list[EvaluationJob], inputs: EvaluationInputs) -> list[dict[str, Any]]:
        return run_jobs(jobs, inputs, self.pool)


def adaptations() -> list[psutil.Process]:
    """Processes that run an adaptation of this test."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray::adapt_task" in process.cmdline()[:1]:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 300) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("waited in vain")
