"""Pictures of plain patterns that a model learns in a few steps, so that small searches measure something."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {
    "stripes": ((230, 30, 30), (20, 20, 20)),
    "checks": ((30, 60, 230), (240, 230, 40)),
    "bars": ((40, 160, 40), (250, 250, 250)),
}


def make_patterns(folder: Path, count: int = 96, side: int = 64, seed: int = 0) -> Path:
    """An imagefolder of a class for each of COLOURS; pictures of a class differ in phase and period."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side]
    lines = []
    for cls, colours in COLOURS.items():
        (folder / cls).mkdir(parents=True)
        for number in range(count):
            period, shift = 10 + number % 7, int(rng.integers(0, 60))
            field = ((rows if cls == "bars" else columns) + shift) // period % 2
            if cls == "checks":
                field = (field + (rows + 2 * shift) // period) % 2
            pixels = np.array(colours, dtype=np.uint8)[field]
            pixels = np.clip(pixels + rng.integers(-12, 13, pixels.shape), 0, 255).astype(np.uint8)
            name = f"{cls}/{number:03d}.png"
            Image.fromarray(pixels).save(folder / name)
            lines.append({"file_name": name, "text": f"pattern {number} in the style of {cls}", "class": cls})
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder
