"""IMMA: sharded equals one process on real gloo processes and DeepSpeed engines, ZeRO 0 to 3, worlds 1 and 2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).parent / "imma_worker.py"
# case:stage:precision[:accumulation steps | resume][:offload]. What ZeRO-3 and bf16 leave behind in a process stands
# between a straight run and its resumed one.
PLANS = {
    1: ["lora:3:no"],
    2: ["lora:0:no", "dreambooth-retain:2:no", "textual-inversion:2:no", "dreambooth:1:no", "lora:2:no:2",
        "lora-retain:3:no", "dreambooth-retain:3:no", "textual-inversion:3:no", "lora:0:bf16", "lora:2:bf16",
        "lora-retain:3:no:resume", "dreambooth-retain:2:no:resume", "lora:0:no:resume", "lora:2:no:offload",
        "dreambooth:2:no:2:offload", "dreambooth-retain:3:no:offload-all", "lora:2:no:resume:offload"],
}  # fmt: skip
RUNS = [(world, item) for world, plan in PLANS.items() for item in plan]
FP32 = [(world, item) for world, item in RUNS if ":no" in item]
RESUMED = [item for item in PLANS[2] if ":resume" in item]


@pytest.fixture(scope="module")
def worker():
    sys.path.insert(0, str(WORKER.parent))
    import imma_worker

    return imma_worker


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_maker) -> Path:
    root = tmp_path_factory.mktemp("imma")
    tiny_maker(root / "sd")
    return root


@pytest.fixture(scope="module")
def results(root: Path) -> dict[int, list[dict[str, dict]]]:
    """Run every plan once; `results[world][rank][item]`."""
    found = {}
    for world, plan in PLANS.items():
        run_ranks(WORKER, world, root / f"store-{world}", root, ",".join(plan))
        found[world] = [torch.load(root / f"world{world}-rank{rank}.pt") for rank in range(world)]
    return found


@pytest.fixture(scope="module")
def reference(root: Path, worker) -> dict[str, dict]:
    torch.set_num_threads(1)
    return {case: worker.dense(root, case) for case in sorted({item.split(":")[0] for _, item in RUNS})}


@pytest.mark.parametrize(("world", "item"), FP32)
def test_both_sides_end_where_one_process_ends(results, reference, world: int, item: str) -> None:
    expected = reference[item.split(":")[0]]
    immunised = [f"denoiser.{name}" for name in expected["names"]]
    learned = [name for name in expected["parameters"] if name.startswith("inner.") and "release" not in name]
    assert learned or item.startswith("dreambooth")
    for rank in results[world]:
        for name in (*immunised, *learned):
            # Adam's steps are of the learning rates' size, 1e-3 and 2e-3, whatever the gradient's.
            found = rank[item]["parameters"][name]
            torch.testing.assert_close(found, expected["parameters"][name], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("world", "item"), FP32)
def test_nothing_moves_but_what_a_side_trains(root, results, reference, worker, world: int, item: str) -> None:
    names = reference[item.split(":")[0]]["names"]
    for name, value in worker.setting(root, "lora")[0].named_parameters():
        for rank in results[world]:
            found = rank[item]["parameters"].get(f"denoiser.{name}")
            assert found is not None or ":3:" in item
            if found is not None:
                assert torch.equal(found, value) != (name in names or item.startswith("dreambooth"))
            if item.startswith("dreambooth-retain") and ":3:" not in item:
                own = rank[item]["parameters"].get(f"inner.release.{name}")
                # The immunised tensors are the denoiser's own.
                assert own is None if name in names else torch.equal(own, value)


@pytest.mark.parametrize("item", [item for item in PLANS[2] if item not in RESUMED])
def test_history_is_that_of_one_process_on_average(results, reference, item: str) -> None:
    losses = torch.stack([rank[item]["losses"] for rank in results[2]]).mean(dim=0)
    tolerance = 0.05 if "bf16" in item else 1e-3
    expected = reference[item.split(":")[0]]["losses"]
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=0)
    assert (expected[1::2, 1] > 0).all() == ("retain" in item)


@pytest.mark.parametrize("item", [item for item in PLANS[2] if "bf16" in item])
def test_bf16_moves_the_immunised_tensors_mostly_as_float32_does(root, results, reference, worker, item: str) -> None:
    expected, unet = reference["lora"], worker.setting(root, "lora")[0]
    moves = []
    for parameters in (results[2][0][item]["parameters"], expected["parameters"]):
        moves.append(
            torch.cat([(parameters[f"denoiser.{n}"] - unet.get_parameter(n)).flatten() for n in expected["names"]])
        )
    assert torch.cosine_similarity(*moves, dim=0) > 0.9


@pytest.mark.parametrize("item", RESUMED)
def test_resume_is_bitwise_the_straight_run(results, reference, worker, item: str) -> None:
    names = [f"denoiser.{name}" for name in reference[item.split(":")[0]]["names"]]
    for rank in results[2]:
        straight, resumed = rank[item.replace(":resume", "")], rank[item]
        assert resumed["first_round"] == worker.STOP
        assert straight["parameters"].keys() == resumed["parameters"].keys()
        for name, value in straight["parameters"].items():
            assert torch.equal(resumed["parameters"][name], value)
            assert not (name in names and torch.equal(resumed["part"][name], value))
        assert torch.equal(resumed["losses"], straight["losses"][-len(resumed["losses"]) :])


def test_a_batch_that_ranks_cannot_share_is_refused(root, worker) -> None:
    from raygard.cluster.imma import workers
    from raygard.config import EngineConfig
    from raygard.editing import IMMASettings
    from raygard.editing.imma import Place, immunise
    from raygard.errors import RaygardError

    engine = EngineConfig(num_workers=4)
    assert [workers(IMMASettings(train_batch_size=size), engine, []) for size in (1, 3, 6, 8)] == [1, 1, 2, 4]
    with pytest.raises(RaygardError, match="train_batch_size 3 cannot be divided among 2 workers x 1"):
        next(immunise(None, None, None, None, IMMASettings(train_batch_size=3), Place(0, 2)))


@pytest.mark.parametrize("case", ["lora-retain", "dreambooth-retain"])
def test_the_copy_of_the_release_is_compiled_as_well(root, worker, monkeypatch, case: str) -> None:
    from types import SimpleNamespace

    from raygard.cluster import imma
    from raygard.cluster.worker import prepare

    monkeypatch.setattr(imma, "initialize", lambda module, *_: SimpleNamespace(module=module))
    config = worker.configuration(root, "engine.compile=true")
    unet, material, settings = worker.setting(root, case)
    prepare(unet, config.engine)
    module = imma.build_imma(config, unet, material, settings)[0].engine.module
    compiled = [
        sum(part._compiled_call_impl is not None for part in model.modules())
        for model in (module.denoiser, module.inner.release)
    ]
    assert compiled[0] == compiled[1] > 0
