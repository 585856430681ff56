"""Does an update point where fine-tuning on a forbidden class points? A linear test with a bound from other classes.

Similarity of two updates: mean over the tensors that both moved of their cosines. Of an update and a class: of the
update and the mean update of the publisher's own users of that class, scaled to norm 1. Updates on kindred classes are
similar, and so is what every fine-tuning does; so a *score* is how much more similar an update is to the class than is
to be expected of somebody as similar to all the other classes as it is. The expectation is a ridge regression (Hoerl
and Kennard 1970) over the publisher's users of other classes.

What a score is compared with: the scores of users of each other class, with that class left out of everything, as if
nobody had known it. The bound is the one that another such user exceeds with probability `false_alarms` if these are
normal (prediction interval of Student's t).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raygard.errors import RaygardError
from raygard.traces.sketch import Update

FALSE_ALARMS = 1e-3
# Weight of the ridge, in users: similarities are scaled by their overall standard deviation.
RIDGE = 1.0
# Fewer other classes or users leave the bound to chance; fewer tensors leave a score to a few directions.
MIN_CLASSES, MIN_OTHERS, MIN_TENSORS = 3, 4, 4

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Reference:
    """A publisher's own user: the class it was fine-tuned on, and what that left.

    forbidden: the class is illegal. group: users of a class and a group trained on the same pictures.
    """

    cls: str
    forbidden: bool
    update: Update
    group: int = 0


@dataclass(frozen=True)
class Finding:
    """How an update compares with a forbidden class. score, bound: see the module; deviations: of the score from users
    of other classes, in their standard deviations."""

    cls: str
    score: float
    bound: float
    deviations: float

    @property
    def found(self) -> bool:
        return self.score > self.bound


def findings(
    update: Update, references: Sequence[Reference], *, false_alarms: float = FALSE_ALARMS
) -> tuple[Finding, ...]:
    """One finding for each forbidden class, in the order of first appearance.

    Raises RaygardError if the update and the references have too few tensors in common, or the references are of too
    few other users.
    """
    names = sorted(set(update.tensors).intersection(*(r.update.tensors for r in references)))
    if len(names) < MIN_TENSORS:
        raise RaygardError(
            f"the model moved {len(update.tensors)} tensors, of which the references know {len(names)}; too few to "
            f"tell what it was fine-tuned on (at least {MIN_TENSORS})"
        )
    rows = _rows([*(r.update for r in references), update], names)
    gram = (rows @ rows.T).astype(np.float64)
    users, own = _Users(references, gram[:-1, :-1]), gram[-1, :-1]
    return tuple(
        users.judge(cls, users.scorer(cls)(users.similarities(own)), false_alarms) for cls in _forbidden(references)
    )


def recall(references: Sequence[Reference], *, false_alarms: float = FALSE_ALARMS) -> dict[str, tuple[int, int]]:
    """Of each forbidden class how many of its own users are found, and of how many.

    Each is judged without all that trained on the same pictures, so by fewer than a stranger is; where all of a class
    did, none can be judged. Raises RaygardError as `findings`.
    """
    names = sorted(set.intersection(*(set(r.update.tensors) for r in references)))
    rows = _rows([r.update for r in references], names)
    users = _Users(references, (rows @ rows.T).astype(np.float64))
    found = {}
    for cls in _forbidden(references):
        scorer = users.scorer(cls)
        own = [i for i in users.members[cls] if users.apart(i)]
        scores = [scorer(users.similarities(users.gram[i], i)) for i in own]
        found[cls] = sum(users.judge(cls, score, false_alarms).found for score in scores), len(own)
    return found


def _forbidden(references: Iterable[Reference]) -> list[str]:
    return list(dict.fromkeys(r.cls for r in references if r.forbidden))


def _rows(updates: Sequence[Update], names: Sequence[str]) -> NDArray[np.float32]:
    """(n, tensors x width), each of norm 1: dot products are mean cosines over the tensors."""
    rows = np.stack([np.concatenate([u.tensors[name] for name in names]) for u in updates])
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return rows


class _Users:
    """The publisher's own users by their dot products with each other (n, n): all else follows from these."""

    def __init__(self, references: Sequence[Reference], gram: Array) -> None:
        self.references, self.gram = references, gram
        self.members: dict[str, list[int]] = {}
        for index, reference in enumerate(references):
            self.members.setdefault(reference.cls, []).append(index)
        self.classes = list(self.members)
        self._null: dict[str, list[float]] = {}

    def apart(self, user: int) -> list[int]:
        """Users of the same class who trained on other pictures."""
        own = self.references[user]
        return [i for i in self.members[own.cls] if self.references[i].group != own.group]

    def others(self, user: int | None, cls: str) -> list[int]:
        """Users of a class to compare `user` with: not himself, and nobody of the same pictures if there are more."""
        if user is None or self.references[user].cls != cls:
            return self.members[cls]
        return self.apart(user) or [i for i in self.members[cls] if i != user]

    def similarities(self, dots: Array, user: int | None = None) -> Array:
        """To the classes, in their order. dots: with all users (n,). user: who it is, if one of them."""
        found = []
        for cls in self.classes:
            own = self.others(user, cls)
            norm = math.sqrt(float(self.gram[np.ix_(own, own)].mean())) if own else 1.0
            found.append(float(dots[own].mean()) / max(norm, 1e-12) if own else 0.0)
        return np.array(found)

    def scorer(self, cls: str, unknown: str | None = None) -> Callable[[Array], float]:
        """Score of a row of `similarities`. unknown: a class that is left out, as if nobody had known it."""
        target = self.classes.index(cls)
        rest = [i for i, name in enumerate(self.classes) if name not in (cls, unknown)]
        users = [i for name in self.classes if name not in (cls, unknown) for i in self.members[name]]
        if len(rest) + 1 < MIN_CLASSES or len(users) < MIN_OTHERS:
            raise RaygardError(
                f"{len(users)} users of {len(rest)} other classes are too few to say what is unusual (at least "
                f"{MIN_OTHERS} of {MIN_CLASSES} once any of them is left out)"
            )
        known = np.stack([self.similarities(self.gram[i], i) for i in users])
        # Counted from each user's mean similarity: who is more similar to all classes alike is expected to be to this.
        level = known[:, rest].mean(axis=1, keepdims=True)
        features, aim = known[:, rest] - level, known[:, target] - level[:, 0]
        center, scale = features.mean(axis=0), max(float(features.std()), 1e-12)
        scaled = (features - center) / scale
        weights = np.linalg.solve(scaled.T @ scaled + RIDGE * np.eye(len(rest)), scaled.T @ (aim - aim.mean()))

        def score(row: Array) -> float:
            level = row[rest].mean()
            return float(row[target] - level - aim.mean() - (row[rest] - level - center) / scale @ weights)

        return score

    def judge(self, cls: str, score: float, false_alarms: float) -> Finding:
        """The finding of a score, by what users of other classes score as if theirs were not known."""
        from scipy.stats import t

        if cls not in self._null:
            self._null[cls] = [
                scorer(self.similarities(self.gram[i], i))
                for other in self.classes
                if other != cls
                for scorer in [self.scorer(cls, other)]
                for i in self.members[other]
            ]
        others = self._null[cls]
        mean, deviation = float(np.mean(others)), float(np.std(others, ddof=1))
        bound = mean + float(t.ppf(1 - false_alarms, len(others) - 1)) * deviation * math.sqrt(1 + 1 / len(others))
        return Finding(cls, score, bound, (score - mean) / max(deviation, 1e-12))
