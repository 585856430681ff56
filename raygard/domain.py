"""Pictures of a domain, read from an imagefolder and divided into halves that never overlap.

    publisher half   learn_lower, learn_upper, select_adapt, select_reference
    user half        adapt, reference

Near-duplicates are grouped, groups are sorted by a hash of their pixels and cut at exact counts (design,
section 6), so the parts depend on neither the order nor the names of the files. A stage sees only the parts
it declares in STAGE_READS.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raygard.config import DomainConfig
from raygard.errors import RaygardError, nearest
from raygard.imagefolder import Entry, read_entries, resolve_data
from raygard.near_duplicates import group_near_duplicates, thumbnail
from raygard.pictures import digest, read_picture

LEARN_PARTS = ("learn_lower", "learn_upper")
PUBLISHER_PARTS = (*LEARN_PARTS, "select_adapt", "select_reference")
USER_PARTS = ("adapt", "reference")
PARTS = PUBLISHER_PARTS + USER_PARTS
GENERAL = "general"
ROLES = ("illegal", "legal", "unseen", GENERAL)

STAGE_READS: Mapping[str, frozenset[str]] = {
    "relearn": frozenset({"learn_lower"}),
    "learn": frozenset(LEARN_PARTS),
    "values": frozenset({*LEARN_PARTS, GENERAL}),
    "traces": frozenset({*LEARN_PARTS, GENERAL}),
    "base_loss": frozenset({GENERAL}),
    "select": frozenset({"select_adapt", "select_reference"}),
    "evaluate": frozenset({"adapt", "reference"}),
    "user": frozenset({GENERAL}),
}


class HalvesError(RuntimeError):
    """A stage asked for a part it does not declare: a bug in raygard, never a user's mistake."""


@dataclass(frozen=True)
class Picture:
    """One picture; sha256 (hex) is of its size and decoded RGB pixels, so copies of a file are equal."""

    path: Path
    caption: str
    cls: str
    sha256: str


@dataclass(frozen=True)
class Domain:
    """Classes by role, and the pictures of each part: `parts[cls][part]`."""

    name: str
    illegal: tuple[str, ...]
    legal: tuple[str, ...]
    general: tuple[str, ...]
    parts: Mapping[str, Mapping[str, tuple[Picture, ...]]]
    unseen: tuple[str, ...] = ()

    @property
    def learn_parts(self) -> list[tuple[str, str]]:
        """(class, part) of all that a publisher learns from."""
        return [(cls, part) for cls in self.illegal + self.legal for part in LEARN_PARTS]

    @property
    def general_parts(self) -> list[tuple[str, str]]:
        """(class, part) of the general classes."""
        return [(cls, GENERAL) for cls in self.general]

    def role(self, cls: str) -> str:
        """`illegal`, `legal`, `unseen` or `general`. Raises RaygardError for a class the domain does not name."""
        for role in ROLES:
            if cls in getattr(self, role):
                return role
        known = self.illegal + self.legal + self.unseen + self.general
        raise RaygardError(f"domain '{self.name}' has no class '{cls}'{nearest(cls, known)}")

    def view(self, stage: str) -> DomainView:
        """What `stage` (a key of STAGE_READS) may read."""
        if stage not in STAGE_READS:
            raise HalvesError(f"unknown stage '{stage}'{nearest(stage, STAGE_READS)}")
        return DomainView(self, stage)

    def counts(self) -> dict[str, dict[str, int]]:
        """Number of pictures: `{class: {part: n}}`."""
        return {cls: {part: len(found) for part, found in parts.items()} for cls, parts in self.parts.items()}


@dataclass(frozen=True)
class DomainView:
    """A domain as one stage sees it."""

    domain: Domain
    stage: str

    def pictures(self, cls: str, part: str) -> tuple[Picture, ...]:
        """Pictures of one part of a class, in the domain's order.

        Raises HalvesError if the stage may not read the part, RaygardError for an unknown class.
        """
        if part not in STAGE_READS[self.stage]:
            allowed = ", ".join(sorted(STAGE_READS[self.stage]))
            raise HalvesError(f"stage '{self.stage}' may not read part '{part}' (it reads {allowed})")
        self.domain.role(cls)
        parts = self.domain.parts[cls]
        if part not in parts:
            raise HalvesError(f"class '{cls}' is {self.domain.role(cls)} and has no part '{part}'")
        return parts[part]


def load_domain(config: DomainConfig) -> Domain:
    """Read, verify and divide the pictures of the classes named in `config`.

    Every picture is decoded once, to verify and hash it. The data may be a folder with `metadata.jsonl` or
    `metadata.csv`, or without either one folder for each class (the caption is then the folder's name).
    Raises RaygardError for missing data or columns, a path that leaves the folder, an unreadable picture, a
    class that is missing or too small for its parts, and a picture with two roles or in both halves.
    """
    folder = resolve_data(config.data)
    entries = read_entries(folder, config.caption_column, config.class_column)
    by_class: dict[str, list[Entry]] = {}
    for entry in entries:
        by_class.setdefault(entry.cls, []).append(entry)
    parts: dict[str, dict[str, tuple[Picture, ...]]] = {}
    for cls in config.illegal + config.legal + config.unseen + config.general:
        if cls not in by_class:
            raise RaygardError(
                f"{folder}: no pictures of class '{cls}' (column '{config.class_column}'); "
                f"classes found: {', '.join(sorted(by_class)) or 'none'}"
            )
        groups = _groups(by_class[cls])
        if config.max_per_class is not None:
            groups = _head(groups, config.max_per_class)
        pictures = [picture for group in groups for picture in group]
        parts[cls] = {GENERAL: tuple(pictures)} if cls in config.general else _divide(cls, groups, config)
    domain = Domain(config.name, config.illegal, config.legal, config.general, parts, config.unseen)
    _check_disjoint(domain)
    # Unseen classes are cut as others are, so that their users have as much, but what others learn from is nobody's.
    kept = {cls: {part: own for part, own in parts[cls].items() if part not in LEARN_PARTS} for cls in config.unseen}
    return replace(domain, parts={**parts, **kept})


def _groups(entries: Sequence[Entry]) -> list[list[Picture]]:
    """Groups of near-duplicates, sorted by the smallest hash in each; members by hash and caption."""
    pictures, thumbnails = [], []
    for entry in entries:
        image = read_picture(entry.path)
        pictures.append(Picture(entry.path, entry.caption, entry.cls, digest(image)))
        thumbnails.append(thumbnail(image))
    groups = group_near_duplicates([p.sha256 for p in pictures], thumbnails)
    members = ([pictures[index] for index in group] for group in groups)
    found = [sorted(group, key=lambda p: (p.sha256, p.caption, p.path)) for group in members]
    return sorted(found, key=lambda group: group[0].sha256)


def _head(groups: list[list[Picture]], limit: int) -> list[list[Picture]]:
    kept: list[list[Picture]] = []
    for group in groups:
        if len(group) <= limit:
            kept.append(group)
            limit -= len(group)
    return kept


def part_sizes(total: int, config: DomainConfig) -> dict[str, int]:
    """How many of `total` pictures each part of a class gets, before groups are kept whole."""
    publisher = _share(total, config.publisher_fraction)
    learn = _share(publisher, config.learn_fraction)
    upper = _share(learn, config.upper_fraction)
    select_adapt = _share(publisher - learn, 0.5)
    adapt = _share(total - publisher, config.adapt_fraction)
    return {
        "learn_lower": learn - upper,
        "learn_upper": upper,
        "select_adapt": select_adapt,
        "select_reference": publisher - learn - select_adapt,
        "adapt": adapt,
        "reference": total - publisher - adapt,
    }


def _share(total: int, fraction: float) -> int:
    return math.floor(total * fraction + 0.5)


def _divide(cls: str, groups: list[list[Picture]], config: DomainConfig) -> dict[str, tuple[Picture, ...]]:
    total = sum(map(len, groups))
    sizes = part_sizes(total, config)
    waiting = list(groups)
    parts: dict[str, tuple[Picture, ...]] = {}
    for part in PARTS[:-1]:
        taken = _take(waiting, sizes[part])
        parts[part] = tuple(picture for group in taken for picture in group)
    parts[PARTS[-1]] = tuple(picture for group in waiting for picture in group)
    smallest = min(parts, key=lambda part: len(parts[part]))
    if len(parts[smallest]) < config.min_part:
        counts = ", ".join(f"{part} {len(found)}" for part, found in parts.items())
        raise RaygardError(
            f"class '{cls}' has {total} pictures ({len(groups)} distinct), too few: every part "
            f"needs {config.min_part} (domain.min_part), but they give {counts}; add pictures"
        )
    return parts


def _take(waiting: list[list[Picture]], size: int) -> list[list[Picture]]:
    """Remove whole groups, in order, whose sizes add up to `size` or come near it from below or above."""
    taken, left = [], size
    for group in list(waiting):
        if len(group) <= left:
            taken.append(group)
            left -= len(group)
    rest = [group for group in waiting if group not in taken]
    smallest = min(rest, key=len, default=None)
    if left and smallest is not None and len(smallest) - left < left:
        taken.append(smallest)
        rest.remove(smallest)
    waiting[:] = rest
    return taken


def _check_disjoint(domain: Domain) -> None:
    """No picture may have two roles, or be in the publisher half of one class and the user half of
    another."""
    seen: dict[str, tuple[str, str, Picture]] = {}
    for cls, parts in domain.parts.items():
        role = domain.role(cls)
        for part, pictures in parts.items():
            half = "user half" if part in USER_PARTS else "publisher half"
            for picture in pictures:
                other_role, other_half, other = seen.setdefault(picture.sha256, (role, half, picture))
                both = f"{other.path} and {picture.path} are the same picture"
                if other_role != role:
                    raise RaygardError(
                        f"{both}, in {other_role} class '{other.cls}' and {role} class '{cls}'; remove one"
                    )
                if other_half != half:
                    raise RaygardError(
                        f"{both}, in the {other_half} of class '{other.cls}' and the {half} of class "
                        f"'{cls}'; remove one"
                    )


def domain_fingerprint(domain: Domain) -> str:
    """SHA-256 (hex) of the domain's classes, parts, pictures and captions; file names do not enter."""
    content: dict[str, Any] = {
        cls: {part: [(p.sha256, p.caption) for p in found] for part, found in parts.items()}
        for cls, parts in domain.parts.items()
    }
    roles = [list(domain.illegal), list(domain.legal), list(domain.general)]
    roles += [list(domain.unseen)] * bool(domain.unseen)
    text = json.dumps([roles, content], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
