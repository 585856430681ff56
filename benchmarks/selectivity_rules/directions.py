"""Directions: users may train all but what a layer does to inputs that illegal pictures cause and others do not.

Hypothesis: if illegal pictures excite directions of a layer's input that legal and general ones hardly use, then
changes of the weight that vanish on those directions leave illegal pictures unlearnable and cost the legal little (as
gradient projection memory keeps old tasks; Saha et al. 2021).

For each weight (linear, or convolution as a matrix on patches) with input moments A_illegal and A_other: directions
are eigenvectors of A_other^-1/2 A_illegal A_other^-1/2, and the share `p` of them with the largest eigenvalues is
forbidden. After every user step the change of the weight is projected (obliquely, in the metric of A_other).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.selectivity_bench import Bench, Projection
from benchmarks.selectivity_rules.weights import batches
from raygard.diffusion.cache import LatentSet
from raygard.diffusion.model import load_unet

BATCHES, BATCH = 12, 24


def patches(module: nn.Linear | nn.Conv2d, inputs: Tensor) -> Tensor:
    """Input vectors of a layer, (rows, features of one output)."""
    if isinstance(module, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1])
    assert not isinstance(module.padding, str)
    found = F.unfold(inputs, module.kernel_size, module.dilation, module.padding, module.stride)
    return found.transpose(1, 2).reshape(-1, found.shape[1])


def moments(bench: Bench, sets: list[LatentSet], seed: int, stream: str) -> dict[str, Tensor]:
    """Second moments of the inputs of every weight matrix, float64 (d, d) by parameter name."""
    unet = load_unet(bench.config.model).requires_grad_(False)
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def record(name: str, module: nn.Linear | nn.Conv2d, inputs: Tensor) -> None:
        found = patches(module, inputs)
        sums[name] = sums.get(name, torch.zeros(())) + (found.T @ found).double()
        rows[name] = rows.get(name, 0) + len(found)

    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_pre_hook(lambda m, x, name=f"{name}.weight": record(name, m, x[0]))
    source = batches(bench, sets, seed, stream, BATCH)
    for _ in range(BATCHES):
        latents, text, noise, timesteps = next(source)
        bench.loss.per_sample(unet, latents, text, noise, timesteps)
    return {name: total / rows[name] for name, total in sums.items()}


def directions(bench: Bench, p: float, seed: int) -> Projection:
    """The projection of every weight matrix that forbids a share p of its input directions."""
    domain, learn = bench.config.domain, bench.learn
    sets = {role: [learn.subset(learn.rows(cls)) for cls in getattr(domain, role)] for role in ("illegal", "legal")}
    renamed = [
        bench.alias(data, cls, word)
        for data, cls in zip(sets["illegal"], domain.illegal, strict=True)
        for word in ("mopa", "xirro")
    ]
    illegal = moments(bench, [*sets["illegal"], *renamed], seed, "directions illegal")
    other = moments(bench, [*sets["legal"], bench.general["rehearsed"]], seed, "directions other")
    allowed = {}
    for name, moment in other.items():
        damped = moment + 1e-3 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
        values, vectors = torch.linalg.eigh(damped)
        root, inverse = (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
        _, found = torch.linalg.eigh(inverse @ illegal[name] @ inverse)
        top = found[:, found.shape[1] - round(p * len(moment)) :]
        # whitened input z = inverse x; a change D acts on z as D root, and must not act on `top`
        allowed[name] = (torch.eye(len(moment), dtype=torch.float64) - root @ top @ top.T @ inverse).float()
    return Projection(bench.base, allowed)


RULES = {"directions": directions}
