"""Memory, traffic and step time of mask learning on 8 to 256 H200s: a model, and all that goes into it.

Pure functions of published figures (`HARDWARE`, `ANCHOR`), of the denoisers' sizes (results/denoisers.json), of the
collectives counted on real runs (results/scaling.json) and of the doctor's own estimate of memory. Nothing here was
measured on an H200: none was to be had.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raygard.cluster.doctor.memory import CUDA_CONTEXT, FP32, GIB, TrainStage, ZeroStage, estimate_memory
from raygard.cluster.estimate import GPUS_PER_NODE, PASSES, compute_seconds, named_gpu, sent, sent_in_a_step

H200, A100 = named_gpu("H200"), named_gpu("A100")
# name: (value, unit, source)
HARDWARE = {
    "H200 memory": (H200.memory_bytes, "B", "NVIDIA's system description in MLPerf Inference v4.1 (H200-SXM-141GBx8)"),
    "H200 bf16, dense": (H200.bf16_flops, "FLOP/s", "NVIDIA H200 data sheet: half of the 1,979 with sparsity"),
    "H200 NVLink, one direction": (H200.link_bytes, "B/s", "the same description: 18 links, 900 GB/s both ways"),
    "between nodes, for each GPU": (
        H200.network_bytes,
        "B/s",
        "NVIDIA DGX BasePOD guide, DGX H200: eight ConnectX-7 of 400 Gb/s",
    ),
    "A100 bf16, dense": (A100.bf16_flops, "FLOP/s", "NVIDIA A100 data sheet"),
}
# SD2-base's UNet from cached latents at 512 px: pictures a second by number of A100s (mosaicml/diffusion, README.md).
ANCHOR = {8: 290, 16: 585, 32: 1195, 64: 2340, 128: 4590}
# Pictures for each GPU, even because roles share them, and whether gradients are checkpointed.
SETTINGS = {"SD 2.1": (8, False), "SDXL": (4, True), "Flux.1-dev": (2, True)}
STAGES: tuple[ZeroStage, ...] = (0, 1, 2, 3)
# Below ZeRO-2 a rank holds all gradients and gains nothing for it.
TIMED_STAGES: tuple[ZeroStage, ...] = (2, 3)
GPUS = (8, 16, 32, 64, 128, 256)
MEMORY_GPUS = (8, 32, 128, 256)
StepKind = Literal["user", "publisher"]


@dataclass(frozen=True)
class ScalingModel:
    """denoisers: facts by name, as `benchmarks/denoisers.py` finds them.

    payloads: by ZeRO stage and kind of step, the payload of each kind of collective, in model sizes.
    """

    denoisers: Mapping[str, Mapping[str, Any]]
    payloads: Mapping[tuple[int, str], Mapping[str, float]]

    def memory(self, name: str, zero_stage: ZeroStage, gpus: int) -> int:
        """Bytes on one GPU: the doctor's estimate with the CUDA context, of the stage that needs most."""
        facts, (batch, checkpointing) = self.denoisers[name], SETTINGS[name]
        stages: tuple[TrainStage, ...] = ("relearn", "learn")
        found = [
            estimate_memory(
                facts["num_params"],
                stage=stage,
                num_trained=facts["num_params"],
                largest=facts["largest_tensor"],
                zero_stage=zero_stage,
                num_workers=gpus,
                mixed_precision="bf16",
                adam=True,
                samples_per_worker=batch,
                saved_elements=facts["saved_elements_checkpointed" if checkpointing else "saved_elements"],
                accumulates=False,
                host=False,
            )
            for stage in stages
        ]
        return max(sum(terms.values()) for terms in found) + CUDA_CONTEXT

    def sent(self, name: str, zero_stage: ZeroStage, gpus: int, kind: StepKind = "user") -> float:
        """Bytes one GPU sends in a step."""
        return sent_in_a_step(
            self.payloads[zero_stage, kind], self.denoisers[name]["num_params"], zero_stage, True, gpus
        )

    def mask_bytes(self, name: str, gpus: int) -> float:
        """Bytes one GPU sends for the mask in a publisher step: one all-reduce of N float64 numbers."""
        return sent("all-reduce", 8 * self.denoisers[name]["num_tensors"], gpus)

    def compute_s(self, name: str) -> float:
        """Seconds of a step's forward and backward passes."""
        facts, (batch, checkpointing) = self.denoisers[name], SETTINGS[name]
        peak = HARDWARE["H200 bf16, dense"][0]
        return compute_seconds(facts["forward_flops"], batch, checkpointing, peak, self.utilisation())

    def communication_s(self, name: str, zero_stage: ZeroStage, gpus: int) -> float:
        """Seconds of a user step's collectives at the bandwidth of the slowest link, none of it hidden by compute."""
        link = "H200 NVLink, one direction" if gpus <= GPUS_PER_NODE else "between nodes, for each GPU"
        return self.sent(name, zero_stage, gpus) / HARDWARE[link][0]

    def efficiency(self, name: str, zero_stage: ZeroStage, gpus: int) -> float:
        """Share of a user step that computes."""
        compute = self.compute_s(name)
        return compute / (compute + self.communication_s(name, zero_stage, gpus))

    def utilisation(self) -> float:
        """Share of an A100's peak that the published run reached; the same share is assumed of an H200."""
        gpus = min(ANCHOR)
        flops = ANCHOR[gpus] / gpus * PASSES * self.denoisers["SD 2.1"]["forward_flops"]
        return float(flops / HARDWARE["A100 bf16, dense"][0])


def load(runs: Mapping[str, Any]) -> ScalingModel:
    """From the committed facts on denoisers and the counted runs at most workers."""
    denoisers = json.loads((Path(__file__).parent / "results" / "denoisers.json").read_text(encoding="utf-8"))
    most = max(run["workers"] for run in runs.values())
    payloads = {
        (run["zero_stage"], kind): {
            what: payload / (FP32 * run["num_params"]) for what, (_, payload) in run[kind]["all"].items()
        }
        for run in runs.values()
        if run["workers"] == most
        for kind in ("user", "publisher")
    }
    return ScalingModel(denoisers, payloads)


def inputs_table(model: ScalingModel) -> str:
    """What goes into the model."""
    lines = ["| input | value | from |", "|---|---:|---|"]
    lines += [f"| {name} | {_si(value)}{unit} | {source} |" for name, (value, unit, source) in HARDWARE.items()]
    gpus, rate = min(ANCHOR), ANCHOR[min(ANCHOR)]
    lines.append(f"| SD 2 at 512 px on {gpus} A100s | {rate} pictures/s | published anchor: mosaicml/diffusion |")
    lines.append(f"| share of peak reached there, assumed here | {model.utilisation():.1%} | the two lines above |")
    for name, facts in model.denoisers.items():
        batch, checkpointing = SETTINGS[name]
        lines.append(
            f"| {name} at {facts['pixels']} px | {_si(facts['num_params'])}parameters, {facts['num_tensors']} tensors, "
            f"{_si(facts['forward_flops'])}FLOP forward | counted; {batch} pictures for each GPU"
            f"{', gradient checkpointing' if checkpointing else ''} |"
        )
    return "\n".join(lines)


def memory_table(model: ScalingModel) -> str:
    """GiB on each GPU, struck through where an H200 does not have it."""
    lines = ["| denoiser | ZeRO |" + "".join(f" {gpus} GPUs |" for gpus in MEMORY_GPUS), "|---|---:|" + "---:|" * 4]
    limit = HARDWARE["H200 memory"][0]
    for name in model.denoisers:
        for stage in STAGES:
            needs = [model.memory(name, stage, gpus) for gpus in MEMORY_GPUS]
            cells = [f"{need / GIB:.1f}" if need <= limit else f"~~{need / GIB:.1f}~~" for need in needs]
            lines.append(f"| {name} | {stage} | {' | '.join(cells)} |")
    return "\n".join(lines)


def steps_table(model: ScalingModel) -> str:
    """Traffic and time of a user step."""
    lines = [
        "| denoiser | ZeRO | GPUs | sent, GB | compute, s | communication, s | computes | mask's all-reduce, kB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    limit = HARDWARE["H200 memory"][0]
    for name in model.denoisers:
        for stage in TIMED_STAGES:
            for gpus in GPUS:
                if model.memory(name, stage, gpus) > limit:
                    continue
                lines.append(
                    f"| {name} | {stage} | {gpus} | {model.sent(name, stage, gpus) / 1e9:.2f} "
                    f"| {model.compute_s(name):.3f} | {model.communication_s(name, stage, gpus):.3f} "
                    f"| {model.efficiency(name, stage, gpus):.0%} | {model.mask_bytes(name, gpus) / 1e3:.1f} |"
                )
    return "\n".join(lines)


def _si(value: float) -> str:
    """`141 G`, to be followed by a unit."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.4g} {prefix}"
    return f"{value:.4g} "
