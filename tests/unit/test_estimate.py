"""`raygard estimate`: its arithmetic against what was counted and measured, and its command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.scaling_model import load
from raygard.cli import app
from raygard.cluster.doctor.facts import worker_memory
from raygard.cluster.doctor.memory import CUDA_CONTEXT
from raygard.cluster.estimate import (
    GPUS,
    PAYLOADS,
    UTILISATION,
    StageEstimate,
    compute_seconds,
    duration,
    estimate_run,
    fits,
    sent_in_a_step,
)
from raygard.config_file import load_config
from raygard.errors import RaygardError

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
SETTINGS = ("model.pretrained_model_name_or_path=SD2.1-shape", "domain.resolution=512", "engine.mixed_precision=bf16")
BATCH = ("bilevel.train_batch_size=32",)


@pytest.fixture(scope="module")
def runs():
    return json.loads((RESULTS / "scaling.json").read_text())["runs"]


def test_payloads_are_those_that_were_counted_on_real_runs(runs) -> None:
    counted = load(runs).payloads
    for stage, payloads in PAYLOADS.items():
        own = {kind: share for kind, share in counted[stage, "user"].items() if share > 0.001}
        assert own == pytest.approx(payloads, rel=0.01)


def test_the_assumed_share_of_the_peak_is_the_published_run_s(runs) -> None:
    assert load(runs).utilisation() == pytest.approx(UTILISATION, abs=0.001)


def test_memory_is_the_doctor_s_and_time_is_the_formula() -> None:
    config = load_config(None, [*SETTINGS, "engine.num_workers=8", "engine.use_gpu=true"])
    found = estimate_run(config, GPUS["H200"])
    doctor = worker_memory(config)
    assert set(found) == {"relearn", "learn"}
    for stage, each in found.items():
        assert each.memory_bytes == sum(doctor[stage].values()) + CUDA_CONTEXT
        assert each.compute_s == pytest.approx(2 * 3 * 804.3e9 / (0.28 * 989e12), rel=0.01)
        # An all-reduce and an all-gather of bf16 weights, by rings, over NVLink.
        assert each.communication_s == pytest.approx((2 + 1) * 7 / 8 * 2 * 865.9e6 / 450e9, rel=0.01)
    assert found["learn"].steps == config.bilevel.publisher_steps * (config.bilevel.inner_steps + 1)


def test_every_mask_has_values_of_its_own() -> None:
    own = ("values.max_train_steps=30", "domain.general=[other]", "values.train_batch_size=8")
    found = estimate_run(load_config(None, [*SETTINGS, *own, "evaluation.mask_seeds=[0,1,2]"]), GPUS["H200"])
    assert found["values"].steps == 90


def test_float32_is_not_timed_as_if_torch_took_tf32_for_all_products() -> None:
    half, full = (
        estimate_run(load_config(None, [*SETTINGS, f"engine.mixed_precision={kind}"]), GPUS["A100"])["learn"]
        for kind in ("bf16", "no")
    )
    assert not torch.backends.cuda.matmul.allow_tf32
    assert full.compute_s == pytest.approx(half.compute_s * 312 / 19.5)


def test_a_size_that_the_denoiser_cannot_take_is_refused_in_words() -> None:
    settings = ["model.pretrained_model_name_or_path=Flux.1-dev-shape", "domain.resolution=520"]
    with pytest.raises(RaygardError, match="cannot run this denoiser"):
        estimate_run(load_config(None, settings), GPUS["H200"])


def test_more_workers_hold_less_and_two_nodes_send_over_the_network() -> None:
    one, two = (
        estimate_run(
            load_config(None, [*SETTINGS, "bilevel.train_batch_size=32", f"engine.num_workers={n}"]), GPUS["H200"]
        )
        for n in (8, 16)
    )
    assert two["learn"].memory_bytes < one["learn"].memory_bytes
    assert two["learn"].compute_s == pytest.approx(one["learn"].compute_s / 2)
    assert two["learn"].communication_s == pytest.approx(one["learn"].communication_s * 15 / 14 * 9, rel=0.01)


def test_weights_that_are_not_kept_gathered_are_sent_twice() -> None:
    small, large = (sent_in_a_step(PAYLOADS[3], n, 3, True, 4) / n for n in (10**9, 10**9 + 4))
    assert large == pytest.approx(small * 1.5)


def test_checkpointing_costs_one_more_forward_pass() -> None:
    assert compute_seconds(1e12, 4, True, 1e15) == pytest.approx(compute_seconds(1e12, 4, False, 1e15) * 4 / 3)


@pytest.mark.parametrize(
    ("seconds", "said"), [(35, "35 s"), (125, "2 min 05 s"), (1800, "30 min"), (7500, "2 h 05 min")]
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_command_line_says_what_fits() -> None:
    command = ["estimate", "--model", "SD2.1-shape", "--workers", "8", "domain.resolution=512"]
    done = CliRunner().invoke(app, [*command, "--gpu", "H200"])
    assert (
        done.exit_code == 0
        and done.output.count(" of one H200;") == 2
        and "Nothing of it was measured on an actual H200" in done.output
    )
    small = CliRunner().invoke(app, [*command, "--gpu", "A100-40GB", "--json", "bilevel.train_batch_size=160"])
    document = json.loads(small.output)
    assert small.exit_code == 4 and document["fits"] is False and set(document["stages"]) == {"relearn", "learn"}
    unknown = CliRunner().invoke(app, [*command, "--gpu", "H20"])
    assert "did you mean 'H200'" in str(unknown.exception)


def test_fits_looks_at_the_stage_that_needs_most() -> None:
    small, large = (StageEstimate({"weights": size, "activations": 1}, 0.0, 0.0, 1) for size in (1, 40 * 10**9))
    assert fits({"relearn": small, "learn": small}, GPUS["A100-40GB"])
    assert not fits({"relearn": small, "learn": large}, GPUS["A100-40GB"])
    assert not fits({"relearn": large, "learn": small}, GPUS["A100-40GB"])
