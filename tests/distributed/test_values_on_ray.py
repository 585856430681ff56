"""The stage `values` of a run, inside Ray Train: a mask with values, the base's own loss, and its outcome."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from raygard.config import RunConfig
from raygard.config_file import load_config
from raygard.diffusion.model import load_denoiser
from raygard.flow import Flow
from raygard.mask import FreezeMask

pytestmark = pytest.mark.distributed

STEPS = 12


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_maker, imagefolder_maker) -> RunConfig:
    root = tmp_path_factory.mktemp("values-on-ray")
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
            "mask.rule=largest-first",
            f"values.max_train_steps={STEPS}",
            "values.lr_warmup_steps=2",
            "values.train_batch_size=8",
            "engine.num_workers=2",
            "engine.cpus_per_worker=0.5",
            "adapt.max_train_steps=2",
            "generation.num_images=2",
            "generation.num_inference_steps=1",
            "evaluation.defences=[none,freeze]",
            "tracking.enabled=false",
        ],
    )


@pytest.fixture(scope="module")
def finished(config: RunConfig, ray_cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flow = Flow(config, tmp_path_factory.mktemp("run") / "out")
    flow.evaluate(flow.learn_all())
    return flow.dir.path


def test_the_mask_carries_values_of_all_frozen_tensors(config: RunConfig, finished: Path) -> None:
    mask = FreezeMask.load(finished / "mask")
    assert set(mask.values) == set(mask.frozen_names)
    base = {name: p.detach().clone() for name, p in load_denoiser(config.model).named_parameters()}
    assert not any(torch.equal(value, base[name]) for name, value in mask.values.items())
    user = {name: p.detach() for name, p in mask.apply(load_denoiser(config.model)).named_parameters()}
    assert mask.audit(base, user).ok
    assert not mask.audit(base, base).ok
    assert all(torch.equal(user[name], base[name]) for name in mask.names if name not in mask.values)


def test_nothing_was_relearned_and_every_step_is_in_the_history(finished: Path) -> None:
    assert not (finished / "relearn").exists() and not (finished / "learn").exists()
    lines = (finished / "values" / "seed-0" / "history.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert all(row[f"{role}_loss"] > 0 for row in rows for role in ("legal", "general", "illegal"))


def test_the_bases_own_loss_stands_beside_the_outcome(finished: Path) -> None:
    metrics = FreezeMask.load(finished / "mask").metrics
    outcome = json.loads((finished / "outcome.json").read_text())
    losses = {row["defence"]: row["base_loss"] for row in outcome["summary"]}
    assert losses == {"none": metrics["base_loss_before"], "freeze": metrics["base_loss_after"]}
    assert losses["none"] != losses["freeze"]
    noted = json.loads((finished / "run.json").read_text())["mask"]
    assert (noted["base_loss_before"], noted["base_loss_after"]) == (losses["none"], losses["freeze"])


def test_a_finished_stage_is_not_run_again(config: RunConfig, finished: Path, monkeypatch) -> None:
    from raygard.cluster import values

    def never(*arguments: object, **named: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(values, "learn_values", never)
    mask = Flow(config, finished).learn(0)
    assert mask.sha256 == FreezeMask.load(finished / "mask").sha256


def test_a_stage_cut_off_after_its_training_does_not_train_again(
    config: RunConfig, finished: Path, monkeypatch
) -> None:
    from raygard.cluster import values

    before = FreezeMask.load(finished / "mask").sha256
    (finished / "values" / "seed-0" / "_SUCCESS.json").unlink()
    monkeypatch.setattr(values, "fit", lambda *_: pytest.fail("trained again"))
    assert Flow(config, finished).learn(0).sha256 == before
