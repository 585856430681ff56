"""Real workers of raygard without Ray: gloo processes that set up, step and save as a Ray Train worker does.

So that a benchmark can look inside a step: what `raygard.cluster.worker.train_worker` builds is built here as well, on
a model with random weights and on random latents, because neither memory nor traffic depends on their values.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raygard.bilevel.alternation import StepRecord, alternate
from raygard.cluster.engine import ShardedTraining, cpu_environment
from raygard.config import RunConfig
from raygard.config_file import load_config
from raygard.diffusion.cache import LatentSet
from raygard.diffusion.conditioning import Conditioning, ConditioningRows

TEXT_TOKENS = 77
# One process on two busy cores waits long for the other.
TIMEOUT = timedelta(minutes=30)
# glibc keeps freed memory for later; with these it gives it back, and resident memory is what is in use. Work on small
# pieces then takes long, because their pages are fetched anew each time.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
CLASSES = ("a", "b")


def make_model(folder: Path, **unet: Any) -> Path:
    """A pipeline folder with a UNet of random weights and a noise schedule, which is all that training reads.

    unet: arguments of diffusers' UNet2DConditionModel. Beside it `relearned.safetensors`, equal to the UNet.
    """
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = UNet2DConditionModel(**unet)
    model.save_pretrained(folder / "unet")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}), encoding="utf-8")
    save_file({name: p.detach().clone() for name, p in model.named_parameters()}, folder / "relearned.safetensors")
    return folder


def run_config(model: Path, *overrides: str) -> RunConfig:
    """A run of that model on the classes of `random_latents`."""
    names = [f"domain.illegal=[{CLASSES[0]}]", f"domain.legal=[{CLASSES[1]}]"]
    return load_config(None, [f"model.pretrained_model_name_or_path={model}", *names, *overrides])


def random_latents(model: Path, rows: int = 4) -> LatentSet:
    """`rows` random latents of each class, of the size the model's UNet was made for."""
    unet = json.loads((model / "unet" / "config.json").read_text(encoding="utf-8"))
    rng = torch.Generator().manual_seed(0)
    count, side = rows * len(CLASSES), unet["sample_size"]
    mean = torch.randn(count, unet["in_channels"], side, side, generator=rng)
    text = torch.randn(len(CLASSES), TEXT_TOKENS, unet["cross_attention_dim"], generator=rng)
    classes = [cls for cls in CLASSES for _ in range(rows)]
    index = torch.arange(len(CLASSES)).repeat_interleave(rows)
    conditioning = ConditioningRows(Conditioning(text=text), index)
    return LatentSet(mean, torch.ones_like(mean), conditioning, classes, list(classes), [])


def learning_job(model: Path) -> dict[str, Any]:
    """What `set_up` reads of a job."""
    return {"relearned": str(model / "relearned.safetensors"), "mask_seed": 0}


def steps(training: ShardedTraining, config: RunConfig, data: LatentSet, relearning: bool) -> Iterator[StepRecord]:
    """The steps of `train_worker`, without its checkpoints."""
    from raygard.bilevel.batches import BatchSource
    from raygard.cluster.worker import make_schedule

    roles = [[data.rows(cls)] for cls in CLASSES]
    size, seed = config.bilevel.train_batch_size, config.seed
    lower, upper = (BatchSource(data, roles[0], roles[1], size, seed, stream) for stream in ("lower", "upper"))
    schedule = make_schedule(config, relearning, dist.get_rank(), dist.get_world_size())
    return alternate(training.engine, training.optimizer, lower, None if relearning else upper, schedule)


def run_world(
    world: int, function: Callable[..., Any], *arguments: Any, on_gpu: bool = False, malloc: Mapping[str, str] = MALLOC
) -> list[Any]:
    """`function(*arguments)` in `world` new processes that form a group; what each returned, by rank.

    on_gpu: NCCL and a GPU for each; otherwise gloo, and no GPU even where there are some. malloc: settings of glibc.
    function: of a module that can be imported; it runs after DeepSpeed has been imported. Raises RuntimeError with the
    output of a process that failed (torch.multiprocessing).
    """
    return _spawn(_rank, world, malloc, world, on_gpu, function, arguments)


def run_alone(function: Callable[..., Any], *arguments: Any, malloc: Mapping[str, str] = MALLOC) -> Any:
    """`function(*arguments)` in a new process of one thread, without DeepSpeed and a group; what it returned."""
    return _spawn(_alone, 1, malloc, function, arguments)[0]


def measured(run: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a function that reports `peak_bytes` and times finds, run by `run` (`run_alone` or alike).

    On a CPU in two processes: what shows memory as it is in use would make large temporaries slow.
    """
    found = run(*arguments)
    return found if torch.cuda.is_available() else {**run(*arguments, malloc={}), "peak_bytes": found["peak_bytes"]}


def _spawn(start: Callable[..., None], count: int, malloc: Mapping[str, str], *arguments: Any) -> list[Any]:
    before = {name: os.environ.get(name) for name in malloc}
    os.environ.update(malloc)
    try:
        with tempfile.TemporaryDirectory(prefix="raygard-") as folder:
            torch.multiprocessing.spawn(start, (folder, *arguments), nprocs=count)
            return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(count)]
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _alone(rank: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.save(function(*arguments), Path(folder) / f"{rank}.pt")


def _rank(
    rank: int, folder: str, world: int, on_gpu: bool, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    if on_gpu:
        torch.cuda.set_device(rank)
    else:
        cpu_environment()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    store = dist.FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def has_deepspeed() -> bool:
    """A GPU machine that is lent for benchmarks of the pure core may not have it."""
    return importlib.util.find_spec("deepspeed") is not None


def machine() -> dict[str, Any]:
    """What a result must say of where it was measured."""
    import platform
    from importlib.metadata import version

    name = platform.processor() or platform.machine()
    return {
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else name,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed") if has_deepspeed() else None,
        "python": sys.version.split()[0],
    }
