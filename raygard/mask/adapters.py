"""Adapters under a mask: what LoRA may adapt, and which frozen tensors a LoRA file would change when merged.

An adapter adds to a weight without touching it, so that freezing with `requires_grad` alone is walked around.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from raygard.errors import RaygardError, nearest
from raygard.mask.audit import MovedReport, MovedTensor
from raygard.mask.weights import read_safetensors

if TYPE_CHECKING:
    from raygard.mask.artifact import FreezeMask

# Of diffusers' pipelines and of peft's own folder.
LORA_FILE, PEFT_FILE, PEFT_CONFIG = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
)

# lora_A, lora_B: peft and newer diffusers; lora.down: diffusers; to_q_lora.down: its attention processors;
# lora_down: kohya's sd-scripts.
_FACTOR = re.compile(
    r"(?P<module>.+?)(?:\.lora_(?P<peft>[AB])|[._]lora\.(?P<plain>down|up)|\.lora_(?P<kohya>down|up))(?:\.\w+)?\.weight"
)
_TEXT = re.compile(r"(?:base_model\.model\.)?(?:text_encoder|text_model|lora_te\d?_)")
_DENOISER = re.compile(r"(?:base_model\.model\.)?(?:unet\.|transformer\.|lora_unet_)?")


@dataclass(frozen=True)
class AdapterReport(MovedReport):
    """Outcome of an adapter's audit; `moved`: what merging it would move.

    num_targets: tensors of the denoiser it adapts. outside_mask: what it changes that no mask governs, in words.
    """

    num_targets: int
    outside_mask: tuple[str, ...]


def lora_targets(denoiser: nn.Module, wanted: Sequence[str], frozen: Collection[str] = ()) -> list[str]:
    """Full names of the linear and convolution modules LoRA may adapt: those wanted whose weight is not frozen.

    wanted: names as peft's `target_modules` takes them, the end of a module's path ("to_q") or all of it.
    frozen: names of tensors, `FreezeMask.frozen_names`.
    Pass the result to peft as a regular expression of whole names, because it matches a list by endings.
    Raises RaygardError for a name no such module has, and if the mask leaves nothing to adapt.
    """
    modules = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for ending in wanted:
        if not any(_ends(name, ending) for name in modules):
            known = {name.rpartition(".")[2] for name in modules if not name.rpartition(".")[2].isdigit()}
            raise RaygardError(f"the model has no linear or convolution module '{ending}'{nearest(ending, known)}")
    chosen = [name for name in modules if any(_ends(name, ending) for ending in wanted)]
    left = [name for name in chosen if f"{name}.weight" not in frozen]
    if not left:
        raise RaygardError(
            f"the mask freezes all {len(chosen)} modules LoRA was to adapt ({', '.join(wanted)}); "
            "name others in adapt.target_modules"
        )
    return left


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def audit_lora(mask: FreezeMask, path: str | Path) -> AdapterReport:
    """List the frozen tensors that merging a LoRA file would change: those whose low-rank product is not zero.

    path: a `.safetensors` file in the layout of diffusers, peft or kohya's scripts, or the folder it lies in.
    Whatever factor the adapter is scaled with, the verdict is the same; the reported size has the file's own.
    Raises RaygardError for a damaged file, an adapter of another base model, and for tensors that are not LoRA
    factors: what they do to a frozen tensor cannot be told.
    """
    file = adapter_file(Path(path))
    shapes, frozen = dict(zip(mask.names, mask.shapes, strict=True)), set(mask.frozen_names)
    factors, alphas, num_text = _factors(file, shapes)
    scale = _peft_scale(file)
    moved = []
    for name, down, up in _products(file, factors, shapes):
        if name not in frozen:
            continue
        change = up @ down
        if count := int((change != 0).sum()):
            size = float(change.abs().max()) * (alphas[name] / len(down) if name in alphas else scale)
            moved.append(MovedTensor(name, count, size))
    outside = (f"text encoder: {num_text} LoRA tensors",) if num_text else ()
    return AdapterReport(len(frozen), tuple(moved), len(factors), outside)


def lora_moves(path: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """What merging a LoRA file adds to each tensor, up to a positive factor: float32 in the tensor's shape, by name.

    shapes: of the base model's tensors. path and errors: as for `audit_lora`.
    """
    file = adapter_file(Path(path))
    factors, _, _ = _factors(file, shapes)
    return {name: (up @ down).float().reshape(shapes[name]) for name, down, up in _products(file, factors, shapes)}


def _products(
    file: Path, factors: Mapping[str, Mapping[str, Tensor]], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(tensor, down, up) of each pair of factors, float64 matrices."""
    for name, parts in sorted(factors.items()):
        if set(parts) != {"down", "up"}:
            raise RaygardError(f"{file}: '{name}' has only one of its two LoRA factors; the file is incomplete")
        down, up = (parts[part].double().reshape(len(parts[part]), -1) for part in ("down", "up"))
        fits = down.shape[0] == up.shape[1] and (up.shape[0], down.shape[1]) == _matrix(shapes[name])
        if not fits:
            raise RaygardError(
                f"{file} is an adapter of another base model: its factors {tuple(parts['up'].shape)} and "
                f"{tuple(parts['down'].shape)} do not fit '{name}' of shape {shapes[name]}"
            )
        yield name, down, up


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def adapter_file(path: Path) -> Path:
    """The LoRA file in a folder of diffusers or peft; a file is taken as it is.

    Raises RaygardError if the folder has none, or one of each: an audit of either would pass for both.
    """
    if not path.is_dir():
        return path
    found = [path / name for name in (LORA_FILE, PEFT_FILE) if (path / name).is_file()]
    if not found:
        raise RaygardError(f"{path} holds no LoRA: neither {LORA_FILE} nor {PEFT_FILE}")
    if len(found) > 1:
        raise RaygardError(f"{path} holds both {LORA_FILE} and {PEFT_FILE}; name the file")
    return found[0]


def _factors(file: Path, known: Collection[str]) -> tuple[dict[str, dict[str, Tensor]], dict[str, float], int]:
    """LoRA factors and alphas by the name of the tensor they add to; and how many concern the text encoder.

    known: names of the base model's tensors.
    """
    # kohya's names have underscores where a module's path has dots, which only the list of all names can undo.
    flat = {name.removesuffix(".weight").replace(".", "_"): name for name in known if name.endswith(".weight")}
    factors: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    num_text = 0
    for key, value in read_safetensors(file).items():
        if _TEXT.match(key):
            num_text += 1
            continue
        match = _FACTOR.fullmatch(key)
        if match is None and not key.endswith(".alpha"):
            raise RaygardError(f"{file}: '{key}' is no LoRA factor; what it does to frozen tensors cannot be told")
        module = _DENOISER.sub("", match["module"] if match else key.removesuffix(".alpha"), count=1)
        module = re.sub(r"\.processor\.to_out$", ".to_out.0", module).replace(".processor.", ".")
        name = f"{module}.weight" if f"{module}.weight" in known else flat.get(module)
        if name is None:
            raise RaygardError(
                f"{file} is an adapter of another base model, which has no '{module}' (only diffusers' names "
                "of layers are read)"
            )
        if value.ndim < 2 and (match or value.numel() != 1):
            raise RaygardError(
                f"{file}: '{key}' has shape {tuple(value.shape)}, which no LoRA has; the file is damaged"
            )
        if match is None:
            alphas[name] = float(value)
            continue
        part = match["plain"] or match["kohya"] or {"A": "down", "B": "up"}[match["peft"]]
        if factors.setdefault(name, {}).setdefault(part, value) is not value:
            raise RaygardError(f"{file} has two LoRA factors '{part}' for '{name}'")
    if not factors and not num_text:
        raise RaygardError(f"{file} holds no LoRA factors")
    return factors, alphas, num_text


def _peft_scale(file: Path) -> float:
    """lora_alpha / r of peft's folder; 1 elsewhere, as diffusers reads files that do not say."""
    config = file.with_name(PEFT_CONFIG)
    if not config.is_file():
        return 1.0
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
        rank = float(found["r"])
        return float(found["lora_alpha"]) / (math.sqrt(rank) if found.get("use_rslora") else rank)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, RecursionError):
        raise RaygardError(f"{config} is damaged: no readable r and lora_alpha") from None
