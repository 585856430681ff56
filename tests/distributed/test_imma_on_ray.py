"""IMMA inside Ray Train: the edit it makes, its history, and a training that goes on where it was cut off."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from raygard.cluster.edits import make_edit
from raygard.cluster.imma import RESULT, imma_worker
from raygard.cluster.training import fit
from raygard.config import RunConfig
from raygard.config_file import load_config
from raygard.diffusion.cache import build_cache, load_cache
from raygard.diffusion.model import load_denoiser
from raygard.domain import load_domain
from raygard.editing import Edit, EditMaterial, IMMASettings, choose_edit, edit_model

pytestmark = pytest.mark.distributed

SETTINGS = {"layers": "cross-kv", "rounds": 3, "train_batch_size": 2, "inner_lr": 1e-3, "outer_lr": 1e-3}
METHOD = "imma-retain"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_maker, imagefolder_maker) -> RunConfig:
    root = tmp_path_factory.mktemp("imma-on-ray")
    tiny_maker(root / "sd")
    imagefolder_maker(root / "data", dict.fromkeys("abc", 48))
    return load_config(
        None,
        [
            f"domain.data={root / 'data'}",
            f"model.pretrained_model_name_or_path={root / 'sd'}",
            "domain.resolution=16",
            "domain.illegal=[a]",
            "domain.legal=[b]",
            "domain.general=[c]",
            "engine.num_workers=2",
            "engine.zero_stage=2",
            "engine.cpus_per_worker=0.5",
        ],
    )


@pytest.fixture(scope="module")
def caches(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Latents of the illegal class, and of the general one."""
    root, domain = tmp_path_factory.mktemp("caches"), load_domain(config.domain)

    def cache(stage: str, part: tuple[str, str]) -> Path:
        return build_cache(config.model, config.domain, domain.view(stage), [part], root)

    return cache("learn", ("a", "learn_lower")), cache("base_loss", ("c", "general"))


@pytest.fixture(scope="module")
def made(config: RunConfig, caches: tuple[Path, Path], ray_cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The edit of a training that was cut off after two of its rounds."""
    out = tmp_path_factory.mktemp("edit") / "imma"
    settings = choose_edit(METHOD, **SETTINGS)[1]
    assert isinstance(settings, IMMASettings)
    cache, general = caches
    job = {"settings": asdict(replace(settings, rounds=2)), "cache": str(cache), "general": str(general)}
    fit(config, imma_worker, {**job, "out": str(out)}, out, None)
    (out / RESULT).unlink()
    history = out / "history.jsonl"
    history.write_text(history.read_text().replace('{"kind"', '{"first": true, "kind"'))
    rows: list[dict] = []
    file = make_edit(config, METHOD, SETTINGS, cache, general, out / "edit.safetensors", on_row=rows.append)
    assert rows == [json.loads(line) for line in history.read_text().splitlines()]
    return file


def test_the_edit_is_that_of_one_process(config: RunConfig, caches: tuple[Path, Path], made: Path) -> None:
    torch.set_num_threads(1)
    unet, found = load_denoiser(config.model), Edit.load(made)
    material = EditMaterial.of(config, *(load_cache(path) for path in caches))
    expected = edit_model(METHOD, unet, material, **SETTINGS)
    assert (found.method, found.settings, found.base_sha256) == (METHOD, expected.settings, expected.base_sha256)
    assert found.values.keys() == expected.values.keys()
    for name, value in expected.values.items():
        # Adam's steps are of the learning rate's size, 1e-3, whatever the gradient's.
        torch.testing.assert_close(found.values[name], value, rtol=0, atol=5e-5)
        assert not torch.equal(value, unet.get_parameter(name))


def test_every_step_is_in_the_history_and_the_rest_is_tidied_away(made: Path) -> None:
    rows = [json.loads(line) for line in (made.parent / "history.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["k"], row["step"]) for row in rows] == [
        (("inner", "outer")[step % 2], step // 2, step) for step in range(2 * SETTINGS["rounds"])
    ]
    assert [row.get("first", False) for row in rows] == [row["k"] < 2 for row in rows]
    assert all(row["illegal_loss"] > 0 and ("retain_loss" in row) == (row["kind"] == "outer") for row in rows)
    assert sorted(file.name for file in made.parent.iterdir()) == ["edit.safetensors", "history.jsonl"]
