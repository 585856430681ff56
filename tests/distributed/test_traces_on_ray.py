"""`raygard trace` on a real cluster: users as tasks, a stage that goes on, and what the traces recognise."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from raygard.adaptation import get_adaptation
from raygard.config import RunConfig
from raygard.config_file import load_config
from raygard.diffusion.cache import load_cache
from raygard.diffusion.model import load_denoiser, load_loss
from raygard.errors import RaygardError
from raygard.mask import FreezeMask
from raygard.trace_flow import TraceFlow
from raygard.traces import Traces, findings, share_of_pictures

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_maker, imagefolder_maker) -> RunConfig:
    root = tmp_path_factory.mktemp("traces-on-ray")
    tiny_maker(root / "sd")
    imagefolder_maker(root / "data", dict.fromkeys("abcd", 48))
    return load_config(
        None,
        [
            f"domain.data={root / 'data'}",
            f"model.pretrained_model_name_or_path={root / 'sd'}",
            "domain.resolution=16",
            "domain.illegal=[a]",
            "domain.legal=[b,c]",
            "domain.general=[d]",
            "adapt.max_train_steps=30",
            "adapt.learning_rate=1e-3",
            "adapt.train_batch_size=4",
            "evaluation.cpus_per_job=0.5",
            "tracking.enabled=false",
        ],
    )


@pytest.fixture(scope="module")
def run(config: RunConfig, ray_cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flow = TraceFlow(config, tmp_path_factory.mktemp("run") / "out")
    flow.trace(runs=2, handfuls=2)
    return flow.dir.path


def test_there_is_a_user_for_each_run_and_handful(config: RunConfig, run: Path) -> None:
    traces = Traces.load(run / "traces")
    assert [r.cls for r in traces.references] == list("aabbcc") + ["handful 0"] * 2 + ["handful 1"] * 2
    assert [r.forbidden for r in traces.references] == [True] * 2 + [False] * 8
    release = dict(load_denoiser(config.model).named_parameters())
    traces.check_release(release)
    assert all(set(r.update.tensors) == set(release) for r in traces.references)


def test_who_trains_as_a_publishers_user_did_leaves_the_same(config: RunConfig, run: Path) -> None:
    """A task's update is that of the same fine-tuning in this process."""
    traces = Traces.load(run / "traces")
    data = load_cache(next(iter((run / "cache").iterdir())))
    denoiser = load_denoiser(config.model)
    base = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    rows = data.subset(share_of_pictures(data.rows("a").tolist(), 0)[0])
    get_adaptation("full")(denoiser, rows, config.adapt, load_loss(config.model), mask=None, seed=1000)
    update = traces.sketcher.update(base, dict(denoiser.named_parameters()))
    for name, sketch in update.tensors.items():
        assert float(sketch @ traces.references[0].update.tensors[name]) > 0.98 * float(sketch @ sketch)
    (finding,) = findings(update, traces.references)
    assert finding.cls == "a"


def test_a_stage_that_was_cut_off_goes_on_with_its_secret(config: RunConfig, run: Path, tmp_path: Path) -> None:
    again = tmp_path / "out"
    shutil.copytree(run, again)
    kept = sorted((again / "trace").glob("*.safetensors"))
    shutil.rmtree(again / "traces")
    (again / "trace" / "_SUCCESS.json").unlink()
    kept.pop().unlink()
    time.sleep(0.01)
    stamps = [os.stat(file).st_mtime_ns for file in kept]
    traces = TraceFlow(config, again).trace(runs=2, handfuls=2)
    assert [os.stat(file).st_mtime_ns for file in kept] == stamps
    before = Traces.load(run / "traces")
    for one, other in zip(before.references, traces.references, strict=True):
        for name, sketch in one.update.tensors.items():
            assert torch.equal(torch.from_numpy(sketch), torch.from_numpy(other.update.tensors[name]))


def test_traces_of_a_release_with_values_are_of_these_values(config: RunConfig, ray_cluster, tmp_path: Path) -> None:
    denoiser = load_denoiser(config.model)
    name = max(dict(denoiser.named_parameters()).items(), key=lambda item: item[1].numel())[0]
    values = {name: dict(denoiser.named_parameters())[name].detach() + 0.01}
    mask = FreezeMask.create(denoiser, [name], values=values).save(tmp_path / "mask")
    short = config.model_copy(update={"adapt": config.adapt.model_copy(update={"max_train_steps": 2})})
    traces = TraceFlow(short, tmp_path / "out").trace(runs=2, handfuls=2, mask=mask)
    base = {key: p.detach() for key, p in load_denoiser(config.model).named_parameters()}
    with pytest.raises(RaygardError, match="the mask too if that carries values"):
        traces.check_release(base)
    traces.check_release({**base, **values})
    # A user who is looked for may train what the mask freezes.
    assert all(name in r.update.tensors for r in traces.references)
    # The same directory again, with other arguments.
    assert len(TraceFlow(short, tmp_path / "out").trace(runs=2, handfuls=3).references) == 12
    Traces.load(tmp_path / "out" / "traces").check_release(base)
