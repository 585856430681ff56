"""Seeds derived from names, so that no draw depends on worker count, call order or interpreter.

Every random draw in raygard comes from `generator(root_seed, stream, ...)` with a stream name of its own
("data", "noise", "timestep", "mask", "generate", ...). Two draws share bits only if all their keys are equal.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*keys: object) -> int:
    """Return a 63-bit seed from the keys; equal keys give equal seeds on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, keys)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*keys: object) -> torch.Generator:
    """Return a CPU torch.Generator seeded with `derive_seed(*keys)`."""
    return torch.Generator("cpu").manual_seed(derive_seed(*keys))
