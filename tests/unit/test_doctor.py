"""Verdicts of `raygard doctor` on made-up facts, the estimate of memory, and what a node looks at."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raygard.bilevel.optimizer import BilevelOptimizer
from raygard.bilevel.segments import ShardLayout
from raygard.cluster.doctor import node as on_node
from raygard.cluster.doctor.checks import STAGES, Check, Facts, NodeFacts, all_green, judge
from raygard.cluster.doctor.examine import examine, read_checks, report_json, require_fit
from raygard.cluster.doctor.facts import worker_memory
from raygard.cluster.doctor.imma import Trained, count_trained, immunisations
from raygard.cluster.doctor.main_memory import main_memory
from raygard.cluster.doctor.memory import GIB, REDUCE_BUCKET, Placement, describe_memory, estimate_memory
from raygard.cluster.doctor.node import Listing
from raygard.config import EngineConfig, ModelConfig
from raygard.config_file import load_config
from raygard.diffusion.layers import LAYERS, attention_tensors
from raygard.diffusion.model import load_denoiser
from raygard.diffusion.shape import denoiser_config, is_shape, measure_denoiser
from raygard.errors import ExitCode, RaygardError, UnfitClusterError
from raygard.files import existing_folder

VERSIONS = {"python": "3.11.7", "ray": "2.60.0"}


def a_node(name: str, **facts: Any) -> NodeFacts:
    resources = {"CPU": 2.0, "GPU": 1.0, "object_store_memory": 1e9}
    defaults = {"resources": resources, "versions": VERSIONS, "shm_bytes": 8 * GIB, "memory_bytes": 64 * GIB}
    return NodeFacts(name, name, **{**defaults, "gpus": [(80 * GIB, 80 * GIB)], **facts})


def the_facts(*nodes: NodeFacts, **other: Any) -> Facts:
    defaults = {
        "address": "h:1",
        "storage": "/s",
        "versions": VERSIONS,
        "memory": {"relearn": {"weights": GIB // 2}, "learn": {"weights": GIB}},
        "data": Listing(9, 9),
    }
    return Facts(**{**defaults, "nodes": nodes or (a_node("a"), a_node("b")), "mlflow_trouble": None, **other})


GPU = ("engine.use_gpu=true",)
ON_CPU = {"CPU": 2.0, "object_store_memory": 1e9}
REMOTE = ("tracking.tracking_uri=http://m:5000",)


@pytest.mark.parametrize(
    ("name", "settings", "facts", "said"),
    [
        ("cluster", (), the_facts(a_node("a"), NodeFacts("b", "b", failed="no answer")), "1 of 2 nodes run no task"),
        ("versions", (), the_facts(a_node("a"), a_node("b", versions={**VERSIONS, "ray": "2.59.0"})), "2.59.0 on b"),
        ("versions", (), the_facts(a_node("a", versions={"python": "3.11.7"})), "ray missing on a"),
        ("resources", ("engine.num_workers=8",), the_facts(), "8 workers x 1 CPU = 8 CPU, but the cluster has 4"),
        (
            "resources",
            ("engine.num_workers=8", "engine.min_workers=4"),
            the_facts(),
            "",
        ),
        ("resources", ("engine.cpus_per_worker=3",), the_facts(), "one worker needs 3 CPU"),
        ("resources", ("engine.cpus_per_worker=1.5", "engine.num_workers=2"), the_facts(), ""),
        ("resources", ("evaluation.generators=9", "evaluation.generator_cpus=1"), the_facts(), "9 generators x 1"),
        ("storage", (), the_facts(a_node("a"), a_node("b", wrote="Permission denied")), "b: Permission denied"),
        ("storage", (), the_facts(a_node("a"), a_node("b", unseen=["a"])), "b does not see what a writes"),
        ("shm", (), the_facts(a_node("a", shm_bytes=64 * 1024**2)), "a has 64 of 954 MiB"),
        ("shm", GPU, the_facts(a_node("a", shm_bytes=10**9)), "of 1978 MiB (1 GiB of it for NCCL)"),
        ("shm", GPU, the_facts(a_node("a"), a_node("b", resources=ON_CPU, shm_bytes=10**9)), ""),
        ("shm", GPU, the_facts(a_node("a"), a_node("b", resources=ON_CPU, shm_bytes=10**8)), "b has 95 of 954 MiB"),
        ("memory", GPU, the_facts(a_node("a", gpus=[(GIB, 80 * GIB)])), "0 of 1 GPUs have that free, 1 are needed"),
        ("memory", GPU, the_facts(a_node("a", gpus=[])), "no node shows a GPU"),
        ("memory", (), the_facts(a_node("a", memory_bytes=GIB // 2)), "a may get 1 and has 0.5 GiB"),
        ("mlflow", REMOTE, the_facts(mlflow_trouble="refused"), "does not answer (refused)"),
        ("model", (), the_facts(a_node("a"), a_node("b", model=Listing(error="no such folder"))), "b: no such folder"),
        ("model", (), the_facts(a_node("a", model=Listing(3, 9)), a_node("b", model=Listing(2, 9))), "differs"),
        ("data", (), the_facts(data=Listing(error="gone")), "by the driver: gone"),
    ],
)
def test_one_fault_is_one_red_line_with_its_mend(name: str, settings: tuple[str, ...], facts: Facts, said: str) -> None:
    checks = judge(load_config(None, settings), facts)
    red = [check for check in checks if not check.ok]
    if not said:
        assert not red
        return
    (check,) = red
    assert check.name == name and said in check.text and check.mend
    assert "\n" not in check.line() and check.line().startswith("RED") and check.mend in check.line()


@pytest.mark.parametrize("settings", [(), GPU, REMOTE, ("tracking.enabled=false",)])
def test_a_cluster_without_fault_is_green_on_every_line(settings: tuple[str, ...]) -> None:
    checks = judge(load_config(None, settings), the_facts())
    assert all_green(checks) and len({check.name for check in checks}) == 9
    assert all(check.line().startswith("green") for check in checks)
    (resources,) = (check for check in checks if check.name == "resources")
    assert "1 workers x 1 CPU = 1 of 4" in resources.text


def test_a_job_is_not_refused_for_a_stage_it_has_not() -> None:
    config = load_config(None, ["evaluation.generators=2", "evaluation.generator_cpus=1", "engine.num_workers=4"])
    facts = the_facts()
    ok = {stages: all_green(judge(config, facts, stages)) for stages in (("learn",), ("learn", "evaluate"), STAGES)}
    # 4 workers x 1 CPU or 2 generators x 1 + 1 adaptation fit into 4 CPUs; the workers beside the generators do not.
    assert ok == {("learn",): True, ("learn", "evaluate"): True, STAGES: False}


def test_what_cannot_be_estimated_keeps_no_job_from_starting() -> None:
    checks = judge(load_config(None, GPU), the_facts(memory="no unet/config.json"))
    assert all_green(checks) and "not estimated: no unet/config.json" in checks[5].text


def test_workers_are_not_split_over_nodes() -> None:
    config = load_config(None, ["engine.cpus_per_worker=1.5", "engine.num_workers=2"])
    nodes = [replace(a_node(name), resources={"CPU": cpus}) for name, cpus in (("a", 2.0), ("b", 1.0), ("c", 1.0))]
    (red,) = (check for check in judge(config, the_facts(*nodes)) if not check.ok)
    assert "2 workers of 1.5 CPU each, but the nodes have room for 1" in red.text


def test_a_node_that_is_lost_in_the_middle_is_one_red_line() -> None:
    """It wrote its marker and then went away, so that nobody can say where the marker is."""
    lost = NodeFacts("b", "b", failed="no answer")
    (red,) = (c for c in judge(load_config(None), the_facts(a_node("a", unseen=["b"]), lost)) if not c.ok)
    assert red.name == "cluster" and "b: no answer" in red.text


def test_checks_survive_the_way_through_a_job_log() -> None:
    checks = [Check("cluster", True, "3 nodes"), Check("shm", False, "small", "raise it")]
    log = f'INFO something {{"checks"\n{json.dumps(report_json(checks))}\nnot json\n'
    assert read_checks(log) == checks and read_checks("nothing\n[1]\n3") is None


def test_a_cluster_that_does_not_answer_is_one_red_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    (check,) = examine(load_config(None), tmp_path, "127.0.0.1:1")
    assert (check.name, check.ok) == ("cluster", False) and "127.0.0.1:1" in check.text and "start it" in check.mend


def test_what_is_uploaded_with_a_job_is_looked_at_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_sd: Path
) -> None:
    """The job that looks around in the cluster has no working directory of the user's."""
    module = sys.modules["raygard.cluster.doctor.examine"]
    red = [Check("storage", True, "s"), Check("model", False, "gone"), Check("data", False, "gone")]

    @contextmanager
    def connected(_: str) -> Any:
        yield SimpleNamespace(submit_job=lambda **_: "job")

    def followed(_client: Any, _job: str, write: Any) -> SimpleNamespace:
        write(json.dumps(report_json(red)))
        return SimpleNamespace(detached=False)

    monkeypatch.setattr(module, "jobs_client", connected)
    monkeypatch.setattr(module, "_takes_anyone", lambda _: False)
    monkeypatch.setattr(module, "follow", followed)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd").symlink_to(tiny_sd)
    (tmp_path / "pictures").mkdir()
    for folder, ok in (("", True), (f"{tmp_path}/", False)):
        settings = [f"model.pretrained_model_name_or_path={folder}sd", f"domain.data={folder}pictures"]
        checks = module.examine_from_outside(load_config(None, settings), "/out", "http://h:8265")
        assert [(check.name, check.ok) for check in checks] == [("storage", True), ("model", ok), ("data", ok)]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[[Facts], None]:
    """Sets what the automatic check finds in a cluster that RAY_ADDRESS names."""
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "h:1")
    module = sys.modules["raygard.cluster.doctor.examine"]
    return lambda facts: monkeypatch.setattr(module, "collect", lambda *_: facts)


def test_long_jobs_are_refused_with_every_line_that_ends_them(
    found: Callable[[Facts], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found(the_facts(a_node("a", wrote="read-only", model=Listing(error="gone"))))
    with pytest.raises(UnfitClusterError, match=r"storage.*read-only.*\| model.*gone") as refused:
        require_fit(load_config(None), tmp_path)
    assert refused.value.exit_code == ExitCode.UNFIT_CLUSTER and "\n" not in str(refused.value)
    require_fit(load_config(None, ["engine.check_cluster=false"]), tmp_path)
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://elsewhere:8265")
    require_fit(load_config(None), tmp_path)


def test_long_jobs_start_in_spite_of_what_may_pass(
    found: Callable[[Facts], None], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    held = a_node("a", shm_bytes=0, gpus=[(GIB // 2, 80 * GIB)])
    found(the_facts(held, data=Listing(error="gone"), mlflow_trouble="refused"))
    with caplog.at_level("WARNING", "raygard"):
        require_fit(load_config(None, [*GPU, *REMOTE]), tmp_path)
    said = [record.getMessage() for record in caplog.records]
    assert [line.split()[2] for line in said] == ["shm", "memory", "mlflow", "data"]
    assert all("\n" not in line for line in said)
    caplog.clear()
    found(the_facts())
    require_fit(load_config(None), tmp_path)
    assert not caplog.records


# Memory


def estimate(**changes: Any) -> dict[str, int]:
    settings: dict[str, Any] = {
        "stage": "learn", "num_trained": changes.get("num_params", 10**9), "largest": 10**7, "zero_stage": 2,
        "num_workers": 4, "mixed_precision": "no", "adam": True, "samples_per_worker": 1, "saved_elements": 1000,
        "accumulates": False, "host": False,
    }  # fmt: skip
    return estimate_memory(changes.pop("num_params", 10**9), **{**settings, **changes})


def test_standing_memory_is_that_of_the_optimizer() -> None:
    weights = torch.nn.Parameter(torch.randn(1000))
    optimizer = BilevelOptimizer([weights], rule=None, user_optimizer="adamw", lr=1e-3)
    layout = ShardLayout.dense({"w": 1000})
    optimizer.bind([weights], layout, {"w": weights.detach().clone()}, {"w": torch.zeros(1000)})
    weights.grad = torch.randn(1000)
    optimizer.step()
    state = sum(v.nbytes for v in optimizer.state[weights].values() if torch.is_tensor(v))
    terms = estimate(num_params=1000, zero_stage=0, num_workers=1)
    assert terms["theta_d"] + terms["Adam's moments"] == state
    assert terms["weights"] + terms["gradients"] == weights.nbytes + weights.grad.nbytes


def test_each_stage_divides_what_it_shards() -> None:
    totals = [sum(estimate(zero_stage=stage, host=True).values()) for stage in (1, 2, 3)]
    assert totals[0] >= totals[1]
    assert estimate(zero_stage=3)["weights"] * 4 == estimate(zero_stage=2)["weights"] == 4 * 10**9
    assert estimate(zero_stage=2)["gradients"] * 4 == estimate(zero_stage=1)["gradients"] == 4 * 10**9
    one, many = (estimate(zero_stage=2, num_workers=n)["Adam's moments"] for n in (1, 8))
    assert one == 8 * many
    assert "float32 shard" not in estimate(zero_stage=0)


def test_only_what_lives_at_the_same_time_is_added() -> None:
    backward = estimate(saved_elements=10**11)
    assert backward["activations"] == 4 * 10**11 and "Adam's temporary" not in backward
    assert backward["reduce buffer"] == 4 * REDUCE_BUCKET
    assert "reduce buffer" not in {name for name, size in estimate(saved_elements=10**11, host=True).items() if size}
    step = estimate(num_workers=1, num_params=10**10)
    assert "activations" not in step and step["Adam's temporary"] == 4 * 10**10
    accumulated = estimate(saved_elements=10**11, host=True, accumulates=True)
    assert accumulated["gradients"] == 10**9


def test_half_precision_halves_weights_and_activations_only() -> None:
    full, half = estimate(saved_elements=10**11), estimate(saved_elements=10**11, mixed_precision="bf16")
    for name in ("weights", "activations", "reduce buffer"):
        assert full[name] == 2 * half[name]
    for name in ("theta_d", "float32 shard", "Adam's moments"):
        assert full[name] == half[name]
    assert estimate(mixed_precision="bf16", zero_stage=0)["weights"] == 4 * 10**9


def test_options_of_the_engine_take_their_part_away() -> None:
    rounded = Placement.of(EngineConfig(theta_d_dtype="bfloat16", zero_stage=2, use_gpu=True))
    assert estimate(placement=rounded)["theta_d"] * 2 == estimate()["theta_d"]
    pinned = Placement.of(EngineConfig(theta_d_device="cpu", use_gpu=True))
    assert estimate(placement=pinned)["theta_d"] == 0
    offload = Placement.of(EngineConfig(offload_optimizer_device="cpu", use_gpu=True))
    left = estimate(placement=offload, zero_stage=2)
    assert left["weights"] == 4 * 10**9 and not {"float32 shard", "Adam's moments", "flat gradient"} & left.keys()
    everything = EngineConfig(
        offload_optimizer_device="cpu", offload_param_device="cpu", zero_stage=3, use_gpu=True, num_workers=4
    )
    assert estimate(placement=Placement.of(everything), zero_stage=3)["weights"] == 0
    streaming = Placement.of(EngineConfig(stream_gradients=True, zero_stage=0, use_gpu=True))
    plain, streamed = (estimate(zero_stage=0, num_workers=1, placement=each) for each in (Placement(), streaming))
    assert sum(plain.values()) - sum(streamed.values()) > 3 * 10**9


def test_without_a_gpu_nothing_is_elsewhere_than_in_main_memory() -> None:
    away = EngineConfig(offload_optimizer_device="cpu", theta_d_dtype="bfloat16")
    assert Placement.of(away) == Placement(theta_d_bytes=2)


def test_relearning_has_moments_whatever_the_simulated_user_has() -> None:
    found = worker_memory(load_config(None, ["domain.resolution=64", "bilevel.user_optimizer=sgd"]))
    assert "Adam's moments" in found["relearn"] and "Adam's moments" not in found["learn"]
    assert "values" not in found


def test_values_need_the_moments_of_what_is_frozen_at_most() -> None:
    values = ["values.max_train_steps=40", "domain.general=[x]", "domain.resolution=64", "mask.freeze_ratio=0.5"]
    by_params, by_count = (worker_memory(load_config(None, [*values, f"mask.budget={b}"])) for b in ("params", "count"))
    whole = by_params["learn"]["Adam's moments"]
    assert by_params["values"]["Adam's moments"] == pytest.approx(whole / 2, rel=1e-4)
    # Half of the tensors may be the largest ones.
    assert whole / 2 < by_count["values"]["Adam's moments"] < whole
    assert "theta_d" not in by_params["values"]
    assert by_params["values"]["the release"] == by_params["values"]["weights"], "it answers for general pictures"


@pytest.mark.parametrize(
    ("settings", "trained", "both", "more"),
    [
        ({"method": "imma"}, "attention + lora", "0", "lora"),
        ({"method": "imma-retain", "inner": "dreambooth", "layers": "cross-kv"}, "all", "cross-kv", "all - cross-kv"),
        ({"method": "imma", "inner": "dreambooth-immunised"}, "attention", "attention", "0"),
        ({"method": "imma", "inner": "textual-inversion"}, "attention + lora", "0", "lora"),
    ],
)
def test_what_imma_trains_is_counted_as_it_is_built(
    settings: dict[str, str], trained: str, both: str, more: str, tiny_sd: Path
) -> None:
    model = ModelConfig(pretrained_model_name_or_path=str(tiny_sd))
    unet = load_denoiser(model)
    sizes = {name: sum(unet.get_parameter(n).numel() for n in attention_tensors(unet, name)) for name in LAYERS}
    lora = sum(4 * sum(unet.get_parameter(n).shape) for n in attention_tensors(unet, "attention", ("weight",)))
    known = {**sizes, "lora": lora, "all": sum(p.numel() for p in unet.parameters()), "0": 0}
    edit = json.dumps([{"name": "mine", **settings}])
    (found,) = immunisations(load_config(None, ["compare.defences=[none, mine+freeze@0.5]", f"compare.edits={edit}"]))

    def total(words: str) -> int:
        first, *rest = re.split(" ([+-]) ", words)
        return known[first] + (known[rest[1]] * (1 if rest[0] == "+" else -1) if rest else 0)

    expected = Trained(total(trained), total(both), total(more))
    assert count_trained(denoiser_config(model), found) == expected


def test_imma_is_estimated_where_a_comparison_has_it(tiny_sd: Path) -> None:
    base = [f"model.pretrained_model_name_or_path={tiny_sd}", "domain.resolution=16", "engine.num_workers=2"]
    assert "imma" not in worker_memory(load_config(None, base))
    plain, retains, attacked = (
        worker_memory(
            load_config(None, [*base, "compare.defences=[none, x]", f"compare.edits=[{{name: x, method: {edit}}}]"])
        )["imma"]
        for edit in ("imma", "imma-retain", "imma, inner: dreambooth-immunised, train_batch_size: 2")
    )
    assert retains["activations"] == 2 * plain["activations"] > 0 == plain["other side's moments"]
    assert attacked["other side's moments"] == attacked["Adam's moments"] and plain["text encoder"] > 1000
    assert "theta_d" not in plain


def test_the_description_adds_up() -> None:
    assert describe_memory({"a": 3 * GIB, "b": GIB, "c": 1}) == "4.0 GiB = a 3.0 + b 1.0"


def test_a_shape_has_the_published_number_of_parameters() -> None:
    found = measure_denoiser(denoiser_config(ModelConfig(pretrained_model_name_or_path="SD2.1-shape")), 8)
    assert (found.num_params, found.num_tensors) == (865_910_724, 686)
    with pytest.raises(RaygardError, match=r"no known shape 'SD2-shape'.*SD2.1-shape"):
        denoiser_config(ModelConfig(pretrained_model_name_or_path="SD2-shape"))


def test_a_folder_is_a_model_whatever_its_name(tiny_sd: Path, tmp_path: Path, monkeypatch) -> None:
    for name in ("my-shape", "SD2.1-shape"):
        (tmp_path / name).symlink_to(tiny_sd)
    monkeypatch.chdir(tmp_path)
    for name in ("my-shape", "SD2.1-shape"):
        assert not is_shape(name)
        own = denoiser_config(ModelConfig(pretrained_model_name_or_path=name))
        assert own["block_out_channels"] == [8, 16]


def test_a_denoiser_that_cannot_be_run_is_an_error_in_one_line() -> None:
    config = {**denoiser_config(ModelConfig()), "addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    with pytest.raises(RaygardError, match="cannot run this denoiser") as caught:
        measure_denoiser({**config, "projection_class_embeddings_input_dim": 64}, 8)
    assert "\n" not in str(caught.value)


def test_fake_activations_are_those_a_real_pass_keeps(tiny_sd: Path) -> None:
    model = ModelConfig(pretrained_model_name_or_path=str(tiny_sd))
    found = measure_denoiser(denoiser_config(model), 8)
    unet = load_denoiser(model).train()
    own = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    assert (found.num_params, found.num_tensors) == (sum(p.numel() for p in unet.parameters()), len(own))
    saved: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        unet(torch.randn(1, 4, 8, 8), torch.tensor([0]), torch.randn(1, 77, 16))
    real = sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in own)
    assert found.saved_elements * 4 == pytest.approx(real, rel=0.02)


def test_a_run_is_estimated_from_its_configuration() -> None:
    small, large = (
        worker_memory(load_config(None, ["domain.resolution=64", f"bilevel.train_batch_size={batch}"]))
        for batch in (16, 32)
    )
    assert 0 < small["learn"]["activations"] * 2 == large["learn"]["activations"]


# A node


def test_markers_tell_one_file_system_from_two(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    for folder in ("one", "two"):
        assert on_node.write_marker(str(tmp_path / folder / "m"), folder) is None
    assert on_node.write_marker(str(tmp_path / "one" / "m"), "other") is None
    assert on_node.unseen_markers(str(tmp_path / "one" / "m"), ["one", "other"], 0) == []
    assert on_node.unseen_markers(str(tmp_path / "two" / "m"), ["one", "two"], 0) == ["one"]
    (tmp_path / "one" / "m" / "one").write_text("left by somebody else")
    assert on_node.unseen_markers(str(tmp_path / "one" / "m"), ["one"], 0) == ["one"]
    on_node.remove_markers(str(tmp_path / "one" / "m"))
    assert list((tmp_path / "one").iterdir()) == []
    assert "No such file" in str(on_node.write_marker(str(tmp_path / "none" / "m"), "a"))
    assert not (tmp_path / "none").exists()
    assert existing_folder(tmp_path / "one" / "not" / "yet") == tmp_path / "one"


def test_listings_name_what_cannot_be_read(tmp_path: Path, tiny_sd: Path) -> None:
    found = on_node.list_model(str(tiny_sd), None)
    assert found.error is None and found.num_files >= 8 and found.size_bytes > 1000
    assert "no model_index.json" in str(on_node.list_model(str(tmp_path), None).error)
    assert on_node.list_model("/no/such/model", None).error
    assert "/no/such/data" in str(on_node.list_data("/no/such/data").error)
    assert on_node.list_data("zoo:emoji-styles").num_files > 0
    assert str(Path.cwd()) in str(on_node.list_data("no/such/data").error)


V1, V2 = "4:memory:/kubepods/pod7", "0::/"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("", {}, 8000 * 1024),
        (V2, {"memory.max": "max\n", "memory.current": "10\n"}, 8000 * 1024),
        (V2, {"memory.max": "5000\n", "memory.current": "3000\n", "memory.stat": "anon 9\ninactive_file 500\n"}, 2500),
        # A container sees its group at the mount, or, without a namespace of its own, below it.
        (V1, {"memory/memory.limit_in_bytes": "4000\n", "memory/memory.usage_in_bytes": "1000\n"}, 3000),
        (V1, {"memory/kubepods/memory.limit_in_bytes": "900\n", "memory/kubepods/memory.usage_in_bytes": "1000\n"}, 0),
    ],
)
def test_main_memory_is_what_the_container_may_have(tmp_path: Path, groups: str, files: dict, expected: int) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 99999 kB\nMemAvailable: 8000 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text(f"{groups}\n" if groups else "")
    for name, content in files.items():
        file = tmp_path / "sys" / "fs" / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    assert main_memory(tmp_path) == expected


def test_main_memory_of_this_machine_is_known_and_that_of_none_is_not(tmp_path: Path) -> None:
    assert main_memory() > 2**20
    assert main_memory(tmp_path) == 0
