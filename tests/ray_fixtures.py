"""A tiny model and domain, and one local Ray cluster, shared by the tests that run Ray Train."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from raygard.config import RunConfig
from raygard.config_file import load_config
from raygard.diffusion.cache import build_cache
from raygard.diffusion.model import load_denoiser
from raygard.domain import load_domain

OVERRIDES = (
    "domain.illegal=[a,b]",
    "domain.legal=[c,d]",
    "domain.resolution=16",
    "engine.cpus_per_worker=0.5",
    "engine.checkpointing_steps=2",
    "bilevel.train_batch_size=8",
    "bilevel.inner_steps=2",
    "bilevel.publisher_steps=20",
    "bilevel.user_optimizer=sgd",
    "bilevel.user_lr=1e-2",
)


@dataclass(frozen=True)
class Setting:
    """A model, a domain, its cache and on disk a state as relearning leaves one."""

    root: Path
    cache: Path
    relearned: Path

    def config(self, *overrides: str) -> RunConfig:
        paths = [f"domain.data={self.root / 'data'}", f"model.pretrained_model_name_or_path={self.root / 'sd'}"]
        return load_config(None, [*paths, *OVERRIDES, *overrides])


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    from raygard.cluster.session import ray_session

    with ray_session(local_cpus=2):
        yield


@pytest.fixture(scope="session")
def setting(material: Setting, ray_cluster) -> Setting:
    return material


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory, tiny_maker, imagefolder_maker) -> Setting:
    """A setting for those who bring a cluster of their own."""
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("ray")
    tiny_maker(root / "sd")
    imagefolder_maker(root / "data", dict.fromkeys("abcd", 48))
    unfinished = Setting(root, root, root)
    config = unfinished.config()
    parts = [(cls, part) for cls in "abcd" for part in ("learn_lower", "learn_upper")]
    cache = build_cache(config.model, config.domain, load_domain(config.domain).view("learn"), parts, root / "cache")
    # What relearning itself makes is tested by the demo and the search; here any other state of the model will do.
    rng = torch.Generator().manual_seed(7)
    weights = {name: p.detach() for name, p in load_denoiser(config.model).named_parameters()}
    relearned = root / "relearned.safetensors"
    save_file({n: p + 0.02 * torch.randn(p.shape, generator=rng) for n, p in weights.items()}, relearned)
    return Setting(root, cache, relearned)


@pytest.fixture(scope="session")
def undisturbed(setting: Setting, tmp_path_factory: pytest.TempPathFactory):
    """Logits and history of two ZeRO-3 workers that nobody killed."""
    from raygard.cluster.training import learn

    out = tmp_path_factory.mktemp("undisturbed")
    config = setting.config("engine.num_workers=2", "engine.zero_stage=3")
    logits, _ = learn(config, setting.cache, setting.relearned, 0, out)
    return logits, (out / "history.jsonl").read_text()
