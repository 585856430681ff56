"""Near-duplicates: the same picture stored again at another size, quality or colour depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 16
# Measured on 2,272 emoji of 64 pixels in eight styles: re-encoding as JPEG (quality 75) or halving the size
# stays below both limits for 99 %, and the most alike different drawings of one team (smileys: 62 in a cell)
# above one.
MEAN_LIMIT = 5.0
CELL_LIMIT = 40


def thumbnail(image: Image) -> NDArray[np.uint8]:
    """Averages over a 16 x 16 grid: uint8 (16, 16, 3)."""
    from PIL.Image import Resampling

    return np.asarray(image.resize((SIDE, SIDE), Resampling.BOX))


def group_near_duplicates(hashes: Sequence[str], thumbnails: Sequence[NDArray[np.uint8]]) -> list[list[int]]:
    """Connected components of "same hash, or thumbnails nearly equal": lists of indices.

    Thumbnails are nearly equal if they differ by at most MEAN_LIMIT on average and CELL_LIMIT in every cell
    and colour (of 255). Both are needed: two smileys with different mouths differ little on average.
    """
    parent = list(range(len(hashes)))

    def find(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[str, int] = {}
    for index, value in enumerate(hashes):
        parent[find(index)] = find(first.setdefault(value, index))
    cells = np.stack(thumbnails).reshape(len(hashes), -1).astype(np.int16)
    brightness = cells.mean(axis=1)
    order = np.argsort(brightness, kind="stable")
    ordered = brightness[order]
    # Averages that differ by more than MEAN_LIMIT cannot belong to thumbnails that do not.
    ends = np.searchsorted(ordered, ordered + MEAN_LIMIT, side="right")
    for position, end in enumerate(ends.tolist()):
        others = order[position + 1 : end]
        gap = np.abs(cells[others] - cells[order[position]])
        near = (gap.max(axis=1, initial=0) <= CELL_LIMIT) & (gap.mean(axis=1) <= MEAN_LIMIT)
        for other in others[near].tolist():
            parent[find(int(other))] = find(int(order[position]))
    groups: dict[int, list[int]] = {}
    for index in range(len(hashes)):
        groups.setdefault(find(index), []).append(index)
    return list(groups.values())
