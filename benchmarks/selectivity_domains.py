"""The domains of the bench and a control: which classes are illegal, legal and unseen, and which model they are for."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.faces_small import HELD_OUT, prepare, write_imagefolder
from benchmarks.selectivity_bench import Bench
from raygard.config_file import load_config
from raygard.errors import RaygardError
from raygard.zoo import DOMAIN_DIR
from raygard.zoo.architecture import read_rows, split

CONFIGS = Path(__file__).parent.parent / "jobs" / "configs"


def emoji_styles(cache: Path, pictures: Path | None, overrides: Sequence[str]) -> Bench:
    """Styles drawn in black and white, on the bundled model; what its training held out is held out."""
    named = ["domain.illegal=[Noto Line]", "domain.legal=[Fluent High Contrast]", "domain.unseen=[EmojiOne Monotone]"]
    config = load_config(CONFIGS / "search.yaml", [*named, *overrides])
    return Bench(config, cache, _never_trained_on())


def _never_trained_on() -> dict[str, set[str]]:
    rows = read_rows(DOMAIN_DIR)
    held_out: dict[str, set[str]] = {}
    for index in split(rows)[1]:
        held_out.setdefault(rows[index].style, set()).add(rows[index].text)
    return held_out


def faces_small(cache: Path, pictures: Path | None, overrides: Sequence[str]) -> Bench:
    """People of the Olivetti set, each a class, on the bundled model trained further on other faces."""
    if pictures is None:
        raise RaygardError("--domain faces-small needs --pictures DIR with faces_congress and faces_olivetti")
    model, data = prepare(pictures, cache / "faces-small")
    where = [f"model.pretrained_model_name_or_path={model}", f"domain.data={data}"]
    # p = 0.3 blocks a third of what anybody learns, and rules are compared where freezing blocks most.
    config = load_config(CONFIGS / "faces-small.yaml", [*where, "mask.freeze_ratio=0.5", *overrides])
    rows = map(json.loads, (data / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
    held_out = {HELD_OUT: {row["text"] for row in rows if row["class"] == HELD_OUT}}
    return Bench(config, cache, held_out)


def one_style(cache: Path, pictures: Path | None, overrides: Sequence[str]) -> Bench:
    """Negative control: illegal, legal and unseen are random thirds of one style, each under a name of its own."""
    folder, style = cache / "one-style", "Noto Line"
    names = [f"{style} {number}" for number in (1, 2, 3)]
    if not folder.exists():
        rows = [json.loads(line) for line in (DOMAIN_DIR / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
        own = [row for row in rows if row["class"] == style]
        for index, row in enumerate(random.Random(0).sample(own, len(own))):
            row["class"] = names[index % len(names)]
            row["text"] = row["text"].replace(style, row["class"])
        write_imagefolder(rows, DOMAIN_DIR, folder)
    roles = zip(("illegal", "legal", "unseen"), names, strict=True)
    split_ = [f"domain.data={folder}", *(f"domain.{role}=[{name}]" for role, name in roles)]
    return Bench(load_config(CONFIGS / "search.yaml", [*split_, *overrides]), cache, _never_trained_on())


DOMAINS: dict[str, Callable[[Path, Path | None, Sequence[str]], Bench]] = {
    "emoji-styles": emoji_styles,
    "faces-small": faces_small,
    "one-style": one_style,
}


def open_bench(domain: str, cache: Path, pictures: Path | None, overrides: Sequence[str]) -> Bench:
    """The bench of a domain; ends the program with one line where something is missing or wrong."""
    try:
        return DOMAINS[domain](cache, pictures, overrides)
    except RaygardError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
