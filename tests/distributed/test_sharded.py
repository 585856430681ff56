"""Sharded equals dense: real gloo processes, real DeepSpeed engines, ZeRO 0 to 3, worlds 1 to 4."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raygard.bilevel.segments import assemble
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).parent / "sharded_worker.py"
FP32 = [
    "sgd0:0:no:sgd",
    "sgd1:1:no:sgd",
    "sgd2:2:no:sgd",
    "sgd3:3:no:sgd",
    "adam2:2:no:adamw",
    "adam3:3:no:adamw",
]
PARTS_OF_BATCH = ("latents", "text", "noise", "timesteps")
TORN = "torn2:2:no:adamw:torn"
PLANS = {
    1: [*FP32[:1], *FP32[3:5], "resume2:2:no:adamw:resume", "resume0:0:no:adamw:resume", "host2:2:no:sgd:host"],
    2: [*FP32, "bf0:0:bf16:adamw", "bf2:2:bf16:adamw", "bf3:3:bf16:adamw", "accum2:2:no:sgd:2",
        "resume2:2:no:adamw:resume", "resume3:3:no:adamw:resume", TORN, "resume1:1:no:adamw:resume",
        "carried2:2:no:adamw:carried:half-resume2-1", "offload1:1:no:adamw:offload", "offload2:2:no:sgd:offload",
        "offload3:3:no:adamw:offload-all", "channels2:2:no:sgd:channels-last"],
    # The batch does not divide by three: shares of two, three and three pictures of each role.
    3: ["sgd0:0:no:sgd", "sgd2:2:no:sgd", "adam3:3:no:adamw"],
    4: ["sgd2:2:no:sgd", "sgd3:3:no:sgd", "carried3:3:no:adamw:carried:half-resume2-2",
        "carried2:2:no:adamw:carried:half-resume0-1"],
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_maker, imagefolder_maker) -> Path:
    import sharded_worker

    return sharded_worker.make_root(tmp_path_factory.mktemp("sharded"), tiny_maker, imagefolder_maker)


@pytest.fixture(scope="module")
def results(root: Path) -> dict[int, list[dict[str, dict]]]:
    """Run every plan once; `results[world][rank][name]`."""
    found = {}
    for world, plan in PLANS.items():
        run_ranks(WORKER, world, root / f"store-{world}", root, ",".join(plan), root)
        files = [root / f"world{world}-rank{rank}.pt" for rank in range(world)]
        found[world] = [torch.load(file, weights_only=False) for file in files]
    return found


@pytest.fixture(scope="module")
def reference(root: Path) -> dict[str, dict[str, torch.Tensor]]:
    import sharded_worker

    torch.set_num_threads(1)
    return {name: sharded_worker.dense(root, name) for name in ("sgd", "adamw")}


def cases(precision: str) -> list[tuple[int, str, str]]:
    split = [(world, *item.split(":")) for world, plan in PLANS.items() for item in plan if item != TORN]
    return [(world, name, user) for world, name, _, bits, user, *_ in split if bits == precision]


@pytest.mark.parametrize(("world", "name", "user"), cases("no"))
def test_logits_equal_the_dense_run(results, reference, world: int, name: str, user: str) -> None:
    for rank in results[world]:
        torch.testing.assert_close(rank[name]["logits"], reference[user]["logits"], rtol=0, atol=1e-4)


def shapes(root: Path) -> dict[str, tuple[int, ...]]:
    from raygard.config import ModelConfig
    from raygard.diffusion.model import load_denoiser

    unet = load_denoiser(ModelConfig(pretrained_model_name_or_path=str(root / "sd")))
    return {name: tuple(p.shape) for name, p in unet.named_parameters()}


@pytest.mark.parametrize(("world", "name", "user"), cases("no"))
def test_weights_equal_the_dense_run(root, results, reference, world: int, name: str, user: str) -> None:
    theta = assemble([rank[name]["pieces"] for rank in results[world]], shapes(root))
    flat = torch.cat([tensor.reshape(-1) for tensor in theta.values()])
    torch.testing.assert_close(flat, reference[user]["theta"], rtol=0, atol=2e-4)


@pytest.mark.parametrize(("world", "name", "user"), cases("no") + cases("bf16"))
def test_logits_are_bitwise_equal_on_all_ranks(results, world: int, name: str, user: str) -> None:
    first = results[world][0][name]["logits"]
    assert torch.isfinite(first).all()
    assert all(torch.equal(rank[name]["logits"], first) for rank in results[world])


@pytest.mark.parametrize(
    ("world", "name", "accumulation"), [(1, "sgd3", 1), (2, "sgd3", 1), (4, "sgd3", 1), (2, "accum2", 2)]
)
def test_the_stream_of_batches_does_not_depend_on_the_number_of_workers(
    results, reference, world: int, name: str, accumulation: int
) -> None:
    seen = [rank[name]["seen"] for rank in results[world]]
    expected = reference["sgd"]["seen"]
    assert all(len(passes) == accumulation * len(expected) for passes in seen)
    for step, batch in enumerate(expected):
        parts = [passes[accumulation * step + micro] for micro in range(accumulation) for passes in seen]
        for index, (name_of_part, whole) in enumerate(zip(PARTS_OF_BATCH, batch, strict=True)):
            # Each part holds as many illegal as legal pictures, illegal ones first, as the whole does.
            halves = [part[index].chunk(2) for part in parts]
            joined = torch.cat([half for role in zip(*halves, strict=True) for half in role])
            assert torch.equal(joined, whole), f"{name_of_part} of step {step}"


@pytest.mark.parametrize(("world", "name", "user"), cases("no") + cases("bf16"))
def test_invariant_holds_at_the_end(results, world: int, name: str, user: str) -> None:
    assert max(rank[name]["invariant"] for rank in results[world]) < 1e-5


@pytest.mark.parametrize(("world", "name", "user"), cases("no") + cases("bf16"))
def test_one_collective_of_n_numbers_per_publisher_step(results, world: int, name: str, user: str) -> None:
    for rank in results[world]:
        num_tensors = len(rank[name]["logits"])
        replicated = name in ("sgd0", "resume0", "bf0")
        assert rank[name]["collectives"]["publisher"] == {() if replicated else (num_tensors,)}
        # Clipping needs the norm of the whole model: one number.
        assert rank[name]["collectives"]["user"] == {() if replicated else (1,)}


@pytest.mark.parametrize(("world", "name", "user"), cases("bf16"))
def test_bf16_follows_the_dense_run(results, reference, world: int, name: str, user: str) -> None:
    logits, expected = results[world][0][name]["logits"], reference[user]["logits"]
    correlation = torch.corrcoef(torch.stack([logits, expected]))[0, 1]
    assert correlation > 0.9


@pytest.mark.parametrize(
    ("world", "resumed", "straight"),
    [(2, "resume2", "adam2"), (2, "resume3", "adam3"), (1, "resume2", "adam2")],
)
def test_resume_is_bitwise_the_straight_run(results, world: int, resumed: str, straight: str) -> None:
    for rank in results[world]:
        assert not torch.equal(rank[resumed]["half"], rank[straight]["logits"])
        assert torch.equal(rank[resumed]["logits"], rank[straight]["logits"])
        for kind in ("pieces", "theta_d"):
            for name, (_, values) in rank[straight][kind].items():
                assert torch.equal(rank[resumed][kind][name][1], values)


@pytest.mark.parametrize(
    ("world", "carried", "writers", "half"),
    [(2, "carried2", 1, "resume2"), (4, "carried3", 2, "resume2"), (4, "carried2", 1, "resume0")],
)
def test_another_world_takes_on_the_state_by_name_bit_for_bit(
    root, results, world: int, carried: str, writers: int, half: str
) -> None:
    left = [rank[half]["half_state"] for rank in results[writers]]
    taken = [rank[carried]["half_state"] for rank in results[world]]
    assert {"theta", "theta_d", "exp_avg", "exp_avg_sq", "shared"} == set(left[0]) == set(taken[0])
    for kind in ("theta", "theta_d", "exp_avg", "exp_avg_sq"):
        before, after = (assemble([rank[kind] for rank in ranks], shapes(root)) for ranks in (left, taken))
        assert all(torch.equal(after[name], value) for name, value in before.items())
    for rank in taken:
        assert {"mask.logits", "step"} <= set(rank["shared"]) == set(left[0]["shared"])
        assert all(torch.equal(rank["shared"][name], value) for name, value in left[0]["shared"].items())


def test_a_torn_checkpoint_falls_back_to_the_one_before(results) -> None:
    for rank in results[2]:
        assert rank["torn2"]["found"] == ["checkpoint_2", "checkpoint_1", None]
