"""Thousands of tiny items through generators and scorers on a cluster of three nodes: speed, and memory over time.

    python benchmarks/evaluation_scale.py [--items 2000 10000] [--slow-scorer SECONDS] [--out FILE.json]

For each number of items: a head and two workers start (clusters/local), with a token, and `run_jobs` measures jobs of
100 items. An item is one picture of 192 x 192 from a denoiser of random weights in one step, 110 kB, which Ray keeps in
its object store; all pictures of 10,000 items are twice what the three stores hold. The scorer compares mean colours,
so the time is that of passing items. Resident memory is that of each process without what it shares (USS, psutil).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil

from benchmarks.mean_colour import DELAY, MeanColour, add_scorer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "evaluation_scale.json"
PER_JOB = 100
LATENTS, FACTOR = 12, 16
PICTURE_BYTES = 3 * (LATENTS * FACTOR) ** 2
SAMPLE_EVERY_S = 1.0
REFERENCE_SIDE = 16
ACTORS = 2


def make_model(folder: Path) -> Path:
    """The bundled pipeline with a small denoiser and decoder of random weights: fast, and of large pictures."""
    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

    from raygard.config import ModelConfig
    from raygard.diffusion.model import load_pipeline

    bundled: Any = load_pipeline(ModelConfig())
    torch.manual_seed(0)
    width = bundled.text_encoder.config.hidden_size
    unet = UNet2DConditionModel(
        sample_size=LATENTS, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
    )  # fmt: skip
    blocks = FACTOR.bit_length()
    vae = AutoencoderKL(
        block_out_channels=(4,) * blocks, down_block_types=("DownEncoderBlock2D",) * blocks, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * blocks, layers_per_block=1, latent_channels=4,
        sample_size=LATENTS * FACTOR,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=bundled.text_encoder, tokenizer=bundled.tokenizer, safety_checker=None,
        scheduler=bundled.scheduler, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_references(file: Path, jobs: int) -> list[str]:
    """Reference pictures and captions of one class for each job; the classes."""
    rng = np.random.default_rng(0)
    classes = [f"class {number:04d}" for number in range(jobs)]
    shape = (PER_JOB, REFERENCE_SIDE, REFERENCE_SIDE, 3)
    arrays = {str(index): rng.integers(0, 256, shape, dtype=np.uint8) for index in range(jobs)}
    np.savez(file, allow_pickle=False, **arrays)
    captions = {cls: [f"picture {row} of {cls}" for row in range(PER_JOB)] for cls in classes}
    file.with_suffix(".json").write_text(json.dumps({"classes": classes, "captions": captions}), encoding="utf-8")
    return classes


class Sampler(threading.Thread):
    """Memory of the driver, of the evaluation's processes and of all object stores, once a second."""

    def __init__(self, pool: Any) -> None:
        super().__init__(daemon=True)
        self.pool, self.rows, self.over = pool, [], threading.Event()  # type: ignore[var-annotated]

    def run(self) -> None:
        started = time.monotonic()
        while not self.over.wait(SAMPLE_EVERY_S):
            self.rows.append({"seconds": round(time.monotonic() - started, 1), **self._sample()})

    def _sample(self) -> dict[str, Any]:
        status = self.pool.status()
        pids = {"driver": [os.getpid()], "coordinator": [status["pid"]]}
        for kind in ("generators", "scorers"):
            pids[kind] = [worker["pid"] for worker in status[kind]["workers"] if "pid" in worker]
        memory = {kind: max((_own(pid) for pid in found), default=0) for kind, found in pids.items()}
        return {"items": status["scorers"]["done"], "object_store": stored(), **memory}


def stored() -> int:
    """Bytes in the object stores of all nodes."""
    import ray

    name = "object_store_memory"
    return int(ray.cluster_resources().get(name, 0) - ray.available_resources().get(name, 0))


def _own(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_full_info().uss)
    except psutil.Error:
        return 0


def run_items(items: int, folder: Path) -> dict[str, Any]:
    """In a process that reaches the cluster: measure `items` items and say what it took."""
    import ray

    from raygard.cluster.evaluation import EvaluationInputs, EvaluationJob, EvaluationPool, run_jobs
    from raygard.config_file import load_config

    add_scorer()
    hook = {"worker_process_setup_hook": "benchmarks.mean_colour.add_scorer"}
    variables = {name: os.environ[name] for name in ("PYTHONPATH", DELAY) if name in os.environ}
    ray.init(runtime_env={**hook, "env_vars": variables}, log_to_driver=False)
    classes = make_references(folder / "references.npz", items // PER_JOB)
    config = load_config(
        None,
        [
            f"model.pretrained_model_name_or_path={make_model(folder / 'model')}",
            f"evaluation.scorer={MeanColour.name}",
            f"evaluation.generators={ACTORS}",
            f"evaluation.scorers={ACTORS}",
            f"generation.num_images={PER_JOB}",
            "generation.batch_size=1",
            "generation.num_inference_steps=1",
            "generation.guidance_scale=1",
        ],
    )
    content, parts = config.model_dump(mode="json"), ("select_adapt", "select_reference")
    inputs = EvaluationInputs(content, str(folder), *parts, str(folder / "references.npz"), str(folder / "store"))
    jobs = [EvaluationJob("base", cls, "legal") for cls in classes]
    with EvaluationPool.start(config) as pool:
        # Starting the actors is no part of it.
        run_jobs(jobs[:1], inputs, pool)
        sampler = Sampler(pool)
        sampler.start()
        started = time.monotonic()
        results = run_jobs(jobs[1:], inputs, pool)
        seconds = time.monotonic() - started
        sampler.over.set()
        sampler.join()
    nodes = sum(node["Alive"] for node in ray.nodes())
    done = sum(result.get("n", 0) for result in results)
    assert done == items - PER_JOB, [result for result in results if result.get("failed")][:1]
    return {
        "items": items,
        "nodes": nodes,
        "seconds": round(seconds, 1),
        "items_per_second": round(done / seconds, 2),
        "store_capacity": int(ray.cluster_resources()["object_store_memory"]),
        "samples": sampler.rows,
    }


def on_cluster(items: int) -> dict[str, Any]:
    """Start a cluster, run a driver in it, stop it."""
    script = [sys.executable, str(ROOT / "clusters" / "local" / "cluster.py")]
    with tempfile.TemporaryDirectory(prefix="raygard-") as root:
        cluster, out = Path(root) / "cluster", Path(root) / "result.json"
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        where = ["--folder", str(cluster)]
        subprocess.run([*script, "start", *where, "--workers", "2", "--cpus", "1"], env=env, check=True, timeout=400)
        try:
            exports = dict(re.findall(r"^export (\w+)='(.*)'$", (cluster / "env.sh").read_text(), re.MULTILINE))
            address = json.loads((cluster / "cluster.json").read_text())["address"]
            driver = [sys.executable, str(Path(__file__).resolve()), "--inside", root, "--items", str(items)]
            command = [*driver, "--out", str(out)]
            subprocess.run(command, env={**env, **exports, "RAY_ADDRESS": address}, cwd=root, check=True)
        finally:
            subprocess.run([*script, "stop", *where], check=True, timeout=120)
        return dict(json.loads(out.read_text(encoding="utf-8")))


def thinned(run: dict[str, Any], rows: int = 200) -> dict[str, Any]:
    """A run with at most about `rows` of its samples, evenly over time."""
    return {**run, "samples": run["samples"][:: max(1, len(run["samples"]) // rows)]}


def highest(run: dict[str, Any]) -> dict[str, float]:
    """MiB of each kind in the highest of all samples."""
    kinds = ("driver", "coordinator", "generators", "scorers", "object_store")
    return {kind: round(max(row[kind] for row in run["samples"]) / 2**20, 1) for kind in kinds}


def table(runs: list[dict[str, Any]]) -> str:
    """The table of docs/scaling.md."""
    lines = [
        "| items | items/s | driver MiB | coordinator MiB | generator MiB | scorer MiB | object stores MiB |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in runs:
        cells = " | ".join(f"{value:.0f}" for value in highest(run).values())
        lines.append(f"| {run['items']:,} | {run['items_per_second']:.1f} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--items", type=int, nargs="+", default=[2000, 10000], help=f"multiples of {PER_JOB}")
    parser.add_argument("--slow-scorer", type=float, default=0.0, help="seconds a scorer sleeps over each item")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        args.out.write_text(json.dumps(run_items(args.items[0], args.inside)), encoding="utf-8")
        return
    os.environ[DELAY] = str(args.slow_scorer)
    runs = []
    for items in args.items:
        runs.append(thinned(on_cluster(items)))
        print(table(runs), flush=True)
    document = {"scorer_sleeps_s": args.slow_scorer, "runs": runs}
    args.out.write_text(json.dumps(document) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
