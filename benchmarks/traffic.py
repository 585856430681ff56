"""Collectives of this process, counted where torch hands them to the backend."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# torch's operators by what they are.
KINDS = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "barrier": "barrier",
}


class Traffic(TorchDispatchMode):
    """While it is entered: calls and payload bytes of each kind of collective, whoever issues them.

    The payload is the whole tensor that is reduced or broadcast, or the larger side of a gather or scatter; what of it
    travels is `sent`. A collective of an unknown kind raises KeyError rather than going uncounted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.payload: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = KINDS[func._schema.name.removeprefix("c10d::")]
            self.calls[kind] += 1
            self.payload[kind] += max((_bytes(argument) for argument in args), default=0)
        return func(*args, **(kwargs or {}))

    def counts(self) -> dict[str, list[int]]:
        """{kind: [calls, payload bytes]}."""
        return {kind: [self.calls[kind], self.payload[kind]] for kind in sorted(self.calls)}


def _bytes(argument: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(argument) if isinstance(leaf, torch.Tensor))
