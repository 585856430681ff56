"""What the text encoders make of captions: a few named tensors, whatever the model family.

Shape letters: B captions, u unique captions, n rows, L tokens, D text features, P pooled features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# text: features of each token, (B, L, D), or token ids (B, L) where the text encoder is live.
# pooled: one vector for a whole caption, (B, P).
NAMES = ("text", "pooled")


class Conditioning(dict[str, Tensor]):
    """Tensors of NAMES, those that the family uses, each with one row for each caption.

    A dictionary, because DeepSpeed, accelerate and DistributedDataParallel look for tensors in dictionaries, and in no
    class of ours. Raises ValueError for another name.
    """

    def __init__(self, *args: object, **tensors: Tensor) -> None:
        super().__init__(*args, **tensors)  # type: ignore[arg-type]
        unknown = set(self) - set(NAMES)
        if unknown:
            raise ValueError(f"conditioning has no tensor '{sorted(unknown)[0]}'; the names are {', '.join(NAMES)}")

    def each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """`change` of every tensor."""
        return Conditioning({name: change(tensor) for name, tensor in self.items()})

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Conditioning:
        return self.each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def rows(self, index: Tensor | slice | int) -> Conditioning:
        """The given captions; index as a tensor of them takes it."""
        return self.each(lambda tensor: tensor[index])


def joined(parts: Sequence[Any]) -> Any:
    """The rows of all parts, in order: tensors, or conditioning of one family."""
    if isinstance(parts[0], Conditioning):
        return Conditioning({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    return torch.cat(list(parts))


@dataclass(frozen=True)
class ConditioningRows:
    """Conditioning of n rows, held once for each unique caption; indexing by rows expands it.

    unique: of u captions. index: int64 (n,), each row's caption.
    """

    unique: Conditioning
    index: Tensor

    def __getitem__(self, rows: Tensor | slice | int) -> Conditioning:
        """Of the given rows, in their order; without the leading dimension for one row."""
        return self.unique.rows(self.index[rows])

    def __len__(self) -> int:
        return len(self.index)
