"""What the ranks of a mask-learning run send each other, counted on real runs, and a model of larger ones.

    python benchmarks/scaling.py [--out benchmarks/results/scaling.json]     real runs at 1, 2 and 4 workers
    python benchmarks/scaling.py --tables                                    the tables of docs/scaling.md

The real runs are gloo processes with DeepSpeed on the bundled model, stepping as a Ray Train worker does. Counted are
all collectives of one user step and of one publisher step on every rank, DeepSpeed's own among them, and beside them
those that raygard's optimizer issues within its step.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import scaling_model, workers
from benchmarks.traffic import Traffic
from raygard.cluster.estimate import sent
from raygard.config import RunConfig
from raygard.diffusion.model import resolve_model

RESULTS = Path(__file__).parent / "results"
COUNTED, MEMORY = RESULTS / "scaling.json", RESULTS / "memory.json"
WORLDS, STAGES = (1, 2, 4), (0, 1, 2, 3)
ROUNDS = 3


def counted(config: RunConfig) -> dict[str, Any]:
    """Collectives of the last round's steps on this rank: {kind of step: {"all", "optimizer"}}; earlier rounds warm up.

    ZeRO-3 learns in the first pass in which order tensors are needed, and gathers otherwise in it.
    """
    from raygard.cluster.worker import set_up

    model = Path(config.model.pretrained_model_name_or_path)
    training, sizes, _ = set_up(config, workers.learning_job(model), relearning=False)
    optimizer, own = training.optimizer, Traffic()
    step = optimizer.step

    def watched(*arguments: Any, **options: Any) -> None:
        nonlocal own
        with Traffic() as own:
            step(*arguments, **options)

    optimizer.step = watched  # type: ignore[method-assign]
    taken = workers.steps(training, config, workers.random_latents(model), relearning=False)
    found: dict[str, Any] = {}
    while True:
        with Traffic() as everything:
            record = next(taken, None)
        if record is None:
            break
        found[record.kind] = {"all": everything.counts(), "optimizer": own.counts()}
    return {**found, "num_tensors": len(sizes), "num_params": int(sizes.sum())}


def run_all() -> dict[str, Any]:
    """Every ZeRO stage at every world size; all ranks must have taken part in the same collectives."""
    runs = {}
    with tempfile.TemporaryDirectory(prefix="raygard-") as folder:
        model = bundled(Path(folder) / "model")
        for world in WORLDS:
            for stage in STAGES:
                more = (f"engine.num_workers={world}", f"engine.zero_stage={stage}", "bilevel.train_batch_size=8")
                config = workers.run_config(model, *more, "bilevel.inner_steps=1", f"bilevel.publisher_steps={ROUNDS}")
                ranks = workers.run_world(world, counted, config)
                assert all(rank == ranks[0] for rank in ranks), f"ranks differ at world {world}, stage {stage}"
                runs[f"zero{stage}-{world}"] = {"zero_stage": stage, "workers": world, **ranks[0]}
                print(f"zero{stage}-{world}", json.dumps(ranks[0]), flush=True)
    return runs


def bundled(folder: Path) -> Path:
    """A copy of the bundled model, with its own weights in the place of relearned ones."""
    from safetensors.torch import save_file

    from raygard.config import ModelConfig
    from raygard.diffusion.model import load_denoiser

    shutil.copytree(resolve_model("zoo:tiny-sd"), folder)
    weights = load_denoiser(ModelConfig()).named_parameters()
    save_file({name: p.detach().clone() for name, p in weights}, folder / "relearned.safetensors")
    return folder


def traffic_table(runs: dict[str, Any]) -> str:
    """What a rank sends in a step, in model sizes (4 bytes for each parameter), and what of it is the mask's."""
    lines = [
        "| ZeRO | workers | user step: model sizes sent | publisher step | of it for the mask | its all-reduces |",
        "|---:|---:|---:|---:|---:|---|",
    ]
    for run in runs.values():
        world, size = run["workers"], 4 * run["num_params"]
        both = [sum(sent(kind, n, world) for kind, (_, n) in run[k]["all"].items()) for k in ("user", "publisher")]
        own = sum(sent(kind, n, world) for kind, (_, n) in run["publisher"]["optimizer"].items())
        calls = ", ".join(f"{n} of {b // (8 * n)} numbers" for n, b in run["publisher"]["optimizer"].values()) or "none"
        share = f"{own / both[1]:.2%}" if both[1] else "-"
        lines.append(
            f"| {run['zero_stage']} | {world} | {both[0] / size:.3f} | {both[1] / size:.3f} | {share} | {calls} |"
        )
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """Every table of docs/scaling.md by name, made of the committed results."""
    from benchmarks import evaluation_scale, memory

    runs = json.loads(COUNTED.read_text(encoding="utf-8"))["runs"]
    cases = json.loads(MEMORY.read_text(encoding="utf-8"))["cases"]
    items = json.loads(evaluation_scale.RESULTS.read_text(encoding="utf-8"))["runs"]
    model = scaling_model.load(runs)
    return {
        "traffic": traffic_table(runs),
        "measured memory": memory.table(cases),
        "inputs": scaling_model.inputs_table(model),
        "memory": scaling_model.memory_table(model),
        "steps": scaling_model.steps_table(model),
        "evaluation": evaluation_scale.table(items),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=COUNTED)
    parser.add_argument("--tables", action="store_true", help="print the tables of docs/scaling.md and run nothing")
    args = parser.parse_args()
    if args.tables:
        print("\n\n".join(f"{name}\n\n{text}" for name, text in tables().items()))
        return
    runs = run_all()
    args.out.write_text(json.dumps({**workers.machine(), "runs": runs}, indent=1) + "\n", encoding="utf-8")
    print(traffic_table(runs))


if __name__ == "__main__":
    main()
