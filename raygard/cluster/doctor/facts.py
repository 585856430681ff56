"""What a cluster's nodes say of themselves, asked by one small Ray task on each."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from raygard.cluster.doctor.checks import Facts, NodeFacts, fit_or_reason
from raygard.cluster.doctor.memory import FP32, Placement, TrainStage, estimate_memory, most_trained
from raygard.cluster.doctor.node import Listing, list_data, look_around, remove_markers, unseen_markers, versions
from raygard.config import BilevelConfig, RunConfig, ValuesConfig
from raygard.editing.imma import IMMASettings
from raygard.files import existing_folder
from raygard.tracking_store import store_trouble

# A node that starts its first worker process imports Ray and raygard from a cold disk.
NODE_TIMEOUT_S = 120.0
LEARNING: tuple[TrainStage, ...] = ("relearn", "learn")


def collect(config: RunConfig, out: str | Path, address: str) -> Facts:
    """Ask every node of the cluster that this process is connected to.

    out: the run directory; it need not exist, nothing is left in it or beside it. address: for the report.
    """
    import ray

    from raygard.diffusion.shape import is_shape

    nodes = [node for node in ray.nodes() if node["Alive"]]
    storage = existing_folder(Path(os.path.abspath(os.path.expanduser(out))))
    folder = str(storage / f".raygard-doctor-{secrets.token_hex(8)}")
    model = config.model.pretrained_model_name_or_path
    try:
        first = _on_each(nodes, look_around, [(folder, node["NodeID"], model, config.model.revision) for node in nodes])
        wrote = [
            n["NodeID"] for n, (said, failed) in zip(nodes, first, strict=True) if not failed and not said["wrote"]
        ]
        second = _on_each(nodes, unseen_markers, [(folder, wrote) for _ in nodes])
    finally:
        _on_each(nodes, remove_markers, [(folder,) for _ in nodes])
    found = []
    for node, (said, failed), (unseen, late) in zip(nodes, first, second, strict=True):
        name = _name(node, nodes)
        if failed or late:
            found.append(NodeFacts(node["NodeID"], name, failed=failed or late))
            continue
        if is_shape(model):
            said["model"] = Listing()
        found.append(NodeFacts(node["NodeID"], name, resources=node["Resources"], unseen=unseen, **said))
    uri = config.tracking.tracking_uri if config.tracking.enabled else None
    return Facts(
        address=address,
        storage=str(storage),
        versions=versions(),
        nodes=found,
        memory=fit_or_reason(lambda: worker_memory(config)),
        data=list_data(config.domain.data),
        mlflow_trouble=store_trouble(uri) if uri else None,
    )


def worker_memory(config: RunConfig) -> dict[TrainStage, dict[str, int]]:
    """`estimate_memory` for each training stage of a run. Raises RaygardError if the model's shape cannot be found."""
    from raygard.cluster.doctor.imma import count_trained, immunisations
    from raygard.cluster.imma import workers
    from raygard.diffusion.shape import denoiser_config, family_of, latent_side, measure_denoiser, text_encoder_bytes

    content, engine, b, values = denoiser_config(config.model), config.engine, config.bilevel, config.values
    side = latent_side(content, config.model, config.domain.resolution)
    family = family_of(config.model)
    shape = measure_denoiser(content, side, checkpointing=engine.gradient_checkpointing, family=family)

    def estimate(
        stage: TrainStage,
        settings: BilevelConfig | ValuesConfig | IMMASettings,
        num_trained: int,
        num_workers: int = engine.fewest_workers,
        more: int = 0,
        pictures: int = 1,
    ) -> dict[str, int]:
        return estimate_memory(
            shape.num_params + more,
            stage=stage,
            num_trained=num_trained,
            largest=max(shape.sizes),
            zero_stage=engine.zero_stage,
            num_workers=num_workers,
            mixed_precision=engine.mixed_precision,
            adam=stage != "learn" or b.user_optimizer == "adamw",
            samples_per_worker=pictures * settings.micro_batch(num_workers),
            saved_elements=shape.saved_elements,
            accumulates=settings.gradient_accumulation_steps > 1,
            host=not engine.use_gpu,
            placement=Placement.of(engine),
        )

    found: dict[TrainStage, dict[str, int]] = {stage: estimate(stage, b, shape.num_params) for stage in LEARNING}
    if values.enabled:
        trained = most_trained(shape.sizes, config.mask.freeze_ratio, config.mask.budget)
        found["values"] = estimate("values", values, trained)
    for settings in immunisations(config):
        counted = count_trained(content, settings, family)
        number = workers(settings, engine, ())
        # What the release must keep goes through the denoiser with what the attacker learns.
        pictures = 2 if settings.retain_weight > 0 else 1
        terms = estimate("imma", settings, counted.trained, number, counted.more, pictures)
        shared = -(-counted.both // (number if engine.zero_stage > 0 else 1))
        terms |= {"other side's moments": 2 * shared * FP32, "text encoder": text_encoder_bytes(config.model)}
        found["imma"] = max(terms, found.get("imma", {}), key=lambda each: sum(each.values()))
    return found


def _on_each(
    nodes: Sequence[dict[str, Any]], function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]
) -> list[tuple[Any, str | None]]:
    """`function` on every node: what it returned, or in one line why it did not."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    refs = []
    for node, values in zip(nodes, arguments, strict=True):
        here = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        refs.append(ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(function).remote(*values))
    done, _ = ray.wait(refs, num_returns=len(refs), timeout=NODE_TIMEOUT_S)
    found: list[tuple[Any, str | None]] = []
    for ref in refs:
        if ref not in done:
            ray.cancel(ref, force=True)
            found.append((None, f"no answer in {NODE_TIMEOUT_S:g} s"))
            continue
        try:
            found.append((ray.get(ref), None))
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines()
            found.append((None, lines[-1].strip()[:200] if lines else type(error).__name__))
    return found


def _name(node: dict[str, Any], nodes: Sequence[dict[str, Any]]) -> str:
    """The node's address, and if others share it the beginning of its id."""
    address = str(node["NodeManagerAddress"])
    alike = sum(other["NodeManagerAddress"] == address for other in nodes)
    head = " (head)" if "node:__internal_head__" in node["Resources"] else ""
    return address + (f"/{node['NodeID'][:6]}" if alike > 1 else "") + head
