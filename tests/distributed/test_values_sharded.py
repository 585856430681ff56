"""Training values: sharded equals dense on real gloo processes and DeepSpeed engines, ZeRO 0 to 3, worlds 1 and 2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from raygard.diffusion.cache import build_cache
from raygard.domain import load_domain
from raygard.values.batches import further_captions
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).parent / "values_worker.py"
# Runs of one process: what ZeRO-3 and bf16 leave behind stands between a straight run and its resumed one.
PLANS = {
    1: ["zero2:2:no"],
    2: ["zero0:0:no", "zero1:1:no", "zero2:2:no", "zero3:3:no", "bf0:0:bf16", "bf2:2:bf16", "accumulated:2:no:2",
        "resumed-zero3:3:no:resume", "resumed-zero2:2:no:resume", "resumed-zero0:0:no:resume",
        "offload1:1:no:2:offload", "offload2:2:no:offload", "offload3:3:no:offload-all",
        "resumed-offload3:3:no:resume:offload-all", "resumed-offload2:2:no:resume:offload"],
}  # fmt: skip
FP32 = [(world, item.split(":")[0]) for world, plan in PLANS.items() for item in plan if ":no" in item]


@pytest.fixture(scope="module")
def worker():
    sys.path.insert(0, str(WORKER.parent))
    import values_worker

    return values_worker


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_maker, imagefolder_maker, worker) -> Path:
    root = tmp_path_factory.mktemp("values")
    tiny_maker(root / "sd")
    imagefolder_maker(root / "data", dict.fromkeys("abc", 48))
    config = worker.configuration(root)
    view = load_domain(config.domain).view("values")
    parts = [("a", "learn_lower"), ("b", "learn_lower"), ("c", "general")]
    captions = [(cls, picture.caption) for cls, part in parts for picture in view.pictures(cls, part)]
    further = further_captions(captions, config.domain, config.values, worker.SEED)
    build_cache(config.model, config.domain, view, parts, root / "cache", further_captions=further)
    return root


@pytest.fixture(scope="module")
def results(root: Path) -> dict[int, list[dict[str, dict]]]:
    """Run every plan once; `results[world][rank][name]`."""
    found = {}
    for world, plan in PLANS.items():
        run_ranks(WORKER, world, root / f"store-{world}", root, ",".join(plan))
        found[world] = [torch.load(root / f"world{world}-rank{rank}.pt") for rank in range(world)]
    return found


@pytest.fixture(scope="module")
def reference(root: Path, worker) -> dict[str, dict[str, torch.Tensor]]:
    torch.set_num_threads(1)
    return worker.dense(root)


@pytest.mark.parametrize(("world", "name"), FP32)
def test_values_equal_the_dense_run(root, results, reference, worker, world: int, name: str) -> None:
    for rank in results[world]:
        for tensor in worker.frozen_names(root):
            # Adam's steps are of the learning rate's size, 1e-3, whatever the gradient's.
            torch.testing.assert_close(rank[name]["values"][tensor], reference["values"][tensor], rtol=0, atol=5e-5)


@pytest.mark.parametrize(("world", "name"), FP32)
def test_the_releases_errors_equal_the_dense_ones(results, reference, world: int, name: str) -> None:
    for rank in results[world]:
        torch.testing.assert_close(rank[name]["curves"], reference["curves"], rtol=1e-4, atol=0)
        assert torch.equal(rank[name]["curves"], results[world][0][name]["curves"])


def test_all_frozen_values_move_and_nothing_else(root, results, worker) -> None:
    from raygard.diffusion.model import load_denoiser

    frozen = worker.frozen_names(root)
    for world, name in FP32:
        for parameter, value in load_denoiser(worker.configuration(root).model).named_parameters():
            for rank in results[world]:
                found = rank[name]["values"].get(parameter)
                assert found is not None or "3" in name
                if found is not None:
                    assert torch.equal(found, value) != (parameter in frozen)


@pytest.mark.parametrize("name", ["zero0", "zero2", "bf0", "bf2"])
def test_history_is_the_dense_one_on_average(results, reference, name: str) -> None:
    errors = torch.stack([rank[name]["errors"] for rank in results[2]]).mean(dim=0)
    # How far general answers have moved begins at nothing, which no relative tolerance can be taken of.
    rtol, atol = (0.1, 1e-4) if name.startswith("bf") else (1e-3, 1e-9)
    torch.testing.assert_close(errors, reference["errors"], rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3", "offload2", "offload3"])
def test_resume_is_bitwise_the_straight_run(root, results, worker, name: str) -> None:
    for rank in results[2]:
        straight, resumed = rank[name], rank[f"resumed-{name}"]
        assert resumed["first_step"] == worker.STEPS // 2
        for tensor in worker.frozen_names(root):
            assert not torch.equal(resumed["half"][tensor], straight["values"][tensor])
            assert torch.equal(resumed["values"][tensor], straight["values"][tensor])
