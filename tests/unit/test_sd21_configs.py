"""The configurations of SD 2.1, that on 2 nodes of 8 GPUs taken through everything but the GPUs."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raygard.cluster.doctor.checks import Facts, NodeFacts, all_green, judge
from raygard.cluster.doctor.facts import worker_memory
from raygard.cluster.doctor.memory import CUDA_CONTEXT, GIB
from raygard.cluster.doctor.node import list_data, list_model, versions
from raygard.cluster.engine import deepspeed_config
from raygard.config import RunConfig
from raygard.config_file import load_config
from raygard.diffusion.model import load_denoiser, model_folder, with_resolution
from raygard.diffusion.shape import KNOWN
from raygard.domain import load_domain
from raygard.search.space import concurrent_trials, grid

CONFIGS = Path(__file__).resolve().parents[2] / "jobs" / "configs"
# What each job does, of the doctor's STAGES.
STAGES = {"sd21-learn": ("learn", "evaluate"), "sd21-search": ("learn", "evaluate", "search")}
NODE = {"CPU": 112.0, "GPU": 8.0, "object_store_memory": 200e9}
NUM_PARAMS, NUM_TENSORS = 865_910_724, 686


def make_sd21(folder: Path) -> Path:
    """A folder of SD 2.1's layout whose weights are all zero, as sparse files that take no room on the disk."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    vae_blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel(**KNOWN["SD2.1-shape"]),
            "vae": AutoencoderKL(block_out_channels=(128, 256, 512, 512), latent_channels=4, **vae_blocks),
        }
    for name, module in parts.items():
        (folder / name).mkdir(parents=True)
        module.save_config(folder / name)
        write_zeros(folder / name / "diffusion_pytorch_model.safetensors", module.state_dict())
    DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False).save_pretrained(folder / "scheduler")
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_zeros(file: Path, state: Mapping[str, torch.Tensor]) -> None:
    header, end = {}, 0
    for name, tensor in state.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(content)) + content)
        stream.truncate(8 + len(content) + end)


@pytest.fixture(scope="module")
def sd21(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sd21(tmp_path_factory.mktemp("sd21") / "model")


@pytest.fixture(params=STAGES)
def name(request) -> str:
    return request.param


@pytest.fixture
def config(name: str, sd21: Path, imagefolder) -> RunConfig:
    """A shipped configuration, with its model and pictures where this machine has them."""
    data = imagefolder({"artist one": 60, "artist two": 60}, side=16)
    own = [f"model.pretrained_model_name_or_path={sd21}", f"domain.data={data}"]
    return load_config(CONFIGS / f"{name}.yaml", own)


def two_nodes(config: RunConfig, gpu_bytes: int) -> Facts:
    """What the doctor would be told by 2 nodes of 8 GPUs that have this model."""
    model = list_model(config.model.pretrained_model_name_or_path, config.model.revision)
    nodes = [
        NodeFacts(
            name, name, resources=NODE, versions=versions(), shm_bytes=512 * GIB, gpus=[(gpu_bytes, gpu_bytes)] * 8,
            memory_bytes=1500 * GIB, model=model,
        )
        for name in ("one", "two")
    ]  # fmt: skip
    data = list_data(config.domain.data)
    return Facts("10.0.0.1:6379", "/shared/runs", versions(), nodes, worker_memory(config), data, None)


def test_two_nodes_of_h200s_are_green_and_the_memory_is_far_below_80_gb(name: str, config: RunConfig) -> None:
    facts = two_nodes(config, 141 * 10**9)
    checks = judge(config, facts, STAGES[name])
    assert all_green(checks), [check.line() for check in checks if not check.ok]
    assert max(sum(terms.values()) for terms in facts.memory.values()) + CUDA_CONTEXT < 40e9  # type: ignore[union-attr]
    small = judge(config, two_nodes(config, 8 * GIB), STAGES[name])
    assert [check.name for check in small if not check.ok] == ["memory"]


@pytest.mark.parametrize("name", ["sd21-learn"])
def test_one_node_is_red_on_resources_with_the_arithmetic(config: RunConfig) -> None:
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"min_workers": None})})
    facts = two_nodes(config, 141 * 10**9)
    one = Facts(**{**vars(facts), "nodes": facts.nodes[:1]})
    red = [check for check in judge(config, one, STAGES["sd21-learn"]) if not check.ok]
    assert [check.name for check in red] == ["resources", "memory"]
    assert "16 workers x 8 CPU = 128 CPU, but the cluster has 112" in red[0].text
    assert "8 of 8 GPUs have that free, 16 are needed" in red[1].text


def test_one_gpu_of_24_gb_holds_mask_learning_and_needs_its_options_for_it() -> None:
    settings = CONFIGS / "sd21-one-gpu.yaml"
    shape = "model.pretrained_model_name_or_path=SD2.1-shape"
    lean = worker_memory(load_config(settings, [shape]))
    plain = ["engine.stream_gradients=false", "engine.theta_d_dtype=float32", "engine.gradient_checkpointing=false"]
    assert max(sum(terms.values()) for terms in lean.values()) + CUDA_CONTEXT < 20e9
    assert sum(worker_memory(load_config(settings, [shape, *plain]))["learn"].values()) > 24e9


def test_deepspeed_takes_the_configuration_of_all_workers(config: RunConfig, monkeypatch) -> None:
    from deepspeed.runtime import config as deepspeed_settings

    world = config.engine.num_workers
    ranks = SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: world)
    monkeypatch.setattr(deepspeed_settings, "dist", ranks)
    read = deepspeed_settings.DeepSpeedConfig(deepspeed_config(config.engine, config.bilevel))
    assert read.train_micro_batch_size_per_gpu * world == config.bilevel.train_batch_size
    # A worker's share holds as many illegal pictures as legal ones.
    assert read.train_micro_batch_size_per_gpu % 2 == 0
    assert read.zero_config.stage == 2 and read.bfloat16_config.enabled


def test_the_model_is_read_as_sd21_and_the_pictures_are_divided(config: RunConfig) -> None:
    assert model_folder(config.model).name == "model"
    unet = load_denoiser(config.model)
    sizes = [parameter.numel() for parameter in unet.parameters()]
    assert (len(sizes), sum(sizes)) == (NUM_TENSORS, NUM_PARAMS)
    assert with_resolution(config.domain, config.model).resolution == 512
    domain = load_domain(config.domain)
    assert all(count >= config.domain.min_part for parts in domain.counts().values() for count in parts.values())


def test_the_search_holds_three_trials_at_once_beside_its_actors() -> None:
    config = load_config(CONFIGS / "sd21-search.yaml", [])
    have = {resource: 2 * amount for resource, amount in NODE.items()}
    assert len(grid(config)) == 4 * 3 * 2
    assert concurrent_trials(config, have) == 3
