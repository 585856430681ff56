"""docs/scaling.md against its results and its model: what was counted, what was measured, and the arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel

from benchmarks import evaluation_scale, memory, scaling, scaling_model
from benchmarks.traffic import Traffic
from raygard.cluster.doctor.memory import estimate_memory
from raygard.cluster.estimate import sent
from raygard.diffusion import shape

ROOT = Path(__file__).resolve().parents[2]
COUNTED = json.loads(scaling.COUNTED.read_text())["runs"]
MEMORY = json.loads(memory.RESULTS.read_text())
SHARE_OFF = 0.15


@pytest.fixture(scope="module")
def model() -> scaling_model.ScalingModel:
    return scaling_model.load(COUNTED)


def test_the_tables_of_the_document_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "scaling.md").read_text()
    for name, table in scaling.tables().items():
        assert table in text, f"run `python benchmarks/scaling.py --tables` and copy the table '{name}'"


def test_every_measured_worker_is_estimated_within_15_percent(tmp_path: Path, monkeypatch) -> None:
    shapes = {}
    for size in memory.SIZES:
        (tmp_path / size / "unet").mkdir(parents=True)
        (tmp_path / size / "unet" / "config.json").write_text(json.dumps(MEMORY[size]))
        (tmp_path / size / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
        with torch.device("meta"):
            sizes = tuple(p.numel() for p in UNet2DConditionModel.from_config(MEMORY[size]).parameters())
        shapes[MEMORY[size]["sample_size"]] = shape.DenoiserShape(sizes, MEMORY["saved_elements"][size])
    # Running the denoisers on fake tensors again would take long, and is tested where the doctor is.
    monkeypatch.setattr(shape, "measure_denoiser", lambda config, side, **_: shapes[side])
    assert MEMORY["cases"].keys() == memory.CASES.keys()
    for name, case in MEMORY["cases"].items():
        folder = tmp_path / memory.size_of(name)
        estimated = sum(memory.estimate(name, memory.configuration(folder, name)).values())
        assert estimated == case["estimate"], f"{name}: the estimate has changed; measure again"
        assert abs(memory.off(estimated, case)) < SHARE_OFF, name


@pytest.mark.parametrize("run", COUNTED.values(), ids=COUNTED.keys())
def test_a_publisher_step_costs_one_all_reduce_of_n_numbers_beside_a_user_step(run: dict[str, Any]) -> None:
    sharded = run["zero_stage"] > 0
    assert run["publisher"]["optimizer"] == ({"all-reduce": [1, 8 * run["num_tensors"]]} if sharded else {})
    # Clipping needs the norm of the whole model: one number.
    assert run["user"]["optimizer"] == ({"all-reduce": [1, 8]} if sharded else {})
    others = []
    for step in (run["user"], run["publisher"]):
        own = step["optimizer"]
        others.append({kind: [calls - own.get(kind, [0, 0])[0], payload - own.get(kind, [0, 0])[1]]
                       for kind, (calls, payload) in step["all"].items()})  # fmt: skip
    assert others[0] == others[1]


def test_traffic_counts_calls_and_bytes(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with Traffic() as inner:
            dist.all_reduce(torch.zeros(5, dtype=torch.float64))
            dist.all_reduce(torch.zeros(3))
            dist.all_gather_into_tensor(torch.zeros(8), torch.zeros(8))
            torch.zeros(100).add_(1)
    finally:
        dist.destroy_process_group()
    assert inner.counts() == {"all-gather": [1, 32], "all-reduce": [2, 52]}


@pytest.mark.parametrize(
    ("kind", "world", "expected"),
    [("all-reduce", 1, 0), ("all-reduce", 2, 100), ("all-reduce", 4, 150), ("all-gather", 4, 75), ("barrier", 4, 0)],
)
def test_a_ring_sends_what_it_must(kind: str, world: int, expected: float) -> None:
    assert sent(kind, 100, world) == expected


def test_memory_is_the_doctors_estimate(model: scaling_model.ScalingModel) -> None:
    facts = model.denoisers["SD 2.1"]
    terms = estimate_memory(
        facts["num_params"], stage="learn", num_trained=facts["num_params"], largest=facts["largest_tensor"],
        zero_stage=2, num_workers=8, mixed_precision="bf16", adam=True, samples_per_worker=8,
        saved_elements=facts["saved_elements"], accumulates=False, host=False,
    )  # fmt: skip
    assert model.memory("SD 2.1", 2, 8) == sum(terms.values()) + 2**30
    for stage in (1, 2, 3):
        needs = [model.memory("SDXL", stage, gpus) for gpus in scaling_model.GPUS]
        assert needs == sorted(needs, reverse=True) and needs[0] > needs[-1]
    assert len({model.memory("SDXL", 0, gpus) for gpus in scaling_model.GPUS}) == 1


def test_step_time_follows_from_the_published_anchor(model: scaling_model.ScalingModel) -> None:
    # 290 pictures/s on 8 A100s: at the same share of its peak an H200 does 989 / 312 times as much.
    assert model.compute_s("SD 2.1") == pytest.approx(8 / (290 / 8 * 989 / 312))
    assert 0.2 < model.utilisation() < 0.4
    within, beyond = (model.communication_s("SD 2.1", 2, gpus) for gpus in (8, 16))
    assert beyond / within == pytest.approx(450 / 50 * (15 / 16) / (7 / 8), rel=1e-3)
    assert model.mask_bytes("SD 2.1", 8) == 2 * 7 / 8 * 8 * 686
    assert model.mask_bytes("SD 2.1", 8) < 1e-5 * model.sent("SD 2.1", 2, 8)


def test_memory_of_an_evaluation_does_not_grow_with_its_items() -> None:
    runs = json.loads(evaluation_scale.RESULTS.read_text())["runs"]
    few, many = (evaluation_scale.highest(run) for run in sorted(runs, key=lambda run: run["items"]))
    # As many jobs as actors at a time.
    most = 2 * evaluation_scale.ACTORS * evaluation_scale.PER_JOB * evaluation_scale.PICTURE_BYTES / 2**20
    assert max(few["object_store"], many["object_store"]) < 1.05 * most
    for kind in ("driver", "coordinator", "generators", "scorers"):
        assert many[kind] < 1.05 * few[kind], kind
