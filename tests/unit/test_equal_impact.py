"""The learned mask against the best baseline at equal legal impact."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from raygard.compare.equal_impact import CLOSED, answers, equal_impact, reached
from raygard.errors import RaygardError

BASELINES = {"none": (0.0, 0.0), "small": (0.2, 0.3), "large": (0.6, 0.5), "poor": (0.4, 0.1)}


def test_between_two_baselines_the_straight_line_counts() -> None:
    assert reached(BASELINES, 0.1) == (pytest.approx(0.15), ("none", "small"))
    assert reached(BASELINES, 0.4) == (pytest.approx(0.4), ("small", "large"))
    assert reached(BASELINES, 0.2) == (pytest.approx(0.3), ("small",))
    # Who harms legal users less is not worse.
    assert reached(BASELINES, 0.9) == (0.5, ("large",))
    assert reached(BASELINES, -0.1) is None and reached({}, 0.1) is None


def test_no_mixture_of_two_baselines_is_above_the_edge_and_one_is_on_it() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = {str(index): tuple(map(float, rng.uniform(-0.2, 1, 2))) for index in range(6)}
        at = float(rng.uniform(min(x for x, _ in points.values()), 1.2))
        mixtures = [y for x, y in points.values() if x <= at]
        for (x, y), (end, top) in itertools.permutations(points.values(), 2):
            if x <= at < end:
                mixtures.append(y + (at - x) / (end - x) * (top - y))
        found = reached(points, at)
        assert found is not None and found[0] == pytest.approx(max(mixtures))


def said(entry: dict[str, Any] | None, name: str = "freeze") -> str:
    (sentence,) = answers({name: entry})
    return sentence


def samples(points: dict[str, tuple[float, float]], noise: float = 0.0) -> dict[tuple[str, str], np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        (name, role): np.full(200, value) + noise * rng.standard_normal(200)
        for name, point in points.items()
        for role, value in zip(("legal", "illegal"), point, strict=True)
    }


@pytest.mark.parametrize(("mitigation", "verdict"), [(0.9, "mask is better"), (0.1, "baselines are better")])
def test_the_sign_says_who_is_better(mitigation: float, verdict: str) -> None:
    learned = {"uce+freeze": (0.0, 5.0), "freeze@0.5": (0.0, 5.0), "uce+freeze@0.5": (0.0, 5.0)}
    points = {**BASELINES, "freeze": (0.4, mitigation), **learned}
    found = equal_impact("freeze", points, samples(points, 0.01))
    assert found is not None
    assert found["difference"] == pytest.approx(mitigation - 0.475) and found["between"] == ["small", CLOSED]
    low, high = found["difference_ci"]
    assert low < found["difference"] < high and (low > 0) == (high > 0) == (mitigation > 0.475)
    assert verdict in said(found)


def test_a_learned_mask_of_another_ratio_is_compared_with_the_same_baselines() -> None:
    points = {**BASELINES, "freeze": (0.4, 0.9), "freeze@0.5": (0.5, 0.2), "uce+freeze@0.5": (0.0, 5.0)}
    found = equal_impact("freeze@0.5", points, samples(points))
    assert found is not None and found["between"] == ["small", CLOSED] and found["difference"] == pytest.approx(-0.3625)
    assert "the learned mask freeze@0.5 has a mitigation of 0.200" in said(found, "freeze@0.5")


@pytest.mark.parametrize("strong", [(0.53, 0.4), (0.86, 0.63)])
def test_a_mask_that_takes_more_from_legal_users_is_no_better_for_being_stronger_than_any_baseline(
    strong: tuple[float, float],
) -> None:
    points = {"none": (0.0, 0.0), "random": (0.5, 0.38), "freeze": strong}
    found = equal_impact("freeze", points, samples(points, 0.001))
    assert found is not None and found["between"] == ["none", CLOSED]
    assert found["reached"] == pytest.approx(strong[0]) and "baselines are better" in said(found)


def test_noise_larger_than_the_difference_is_no_difference() -> None:
    points = {**BASELINES, "freeze": (0.4, 0.5)}
    assert "no difference beyond" in said(equal_impact("freeze", points, samples(points, 0.2)))


def test_what_cannot_be_compared_is_said() -> None:
    assert "cannot be compared" in said(equal_impact("freeze", BASELINES, {}))
    points = {"small": (0.2, 0.3), "freeze": (0.1, 0.2)}
    found = equal_impact("freeze", points, samples(points))
    assert found is not None and found["reached"] is None and found["difference_ci"] is None
    assert "no baseline harms legal users as little" in said(found)


@pytest.mark.parametrize("missing", ["freeze", "small"])
@pytest.mark.parametrize("role", ["legal", "illegal"])
def test_samples_without_a_number_for_one_defence_do_not_count(missing: str, role: str) -> None:
    points = {**BASELINES, "freeze": (0.4, 0.6)}
    drawn = samples(points, 0.01)
    whole = equal_impact("freeze", points, drawn)
    lost = np.arange(200) % 3 == 0
    rest = equal_impact("freeze", points, {key: values[~lost] for key, values in drawn.items()})
    drawn[missing, role] = np.where(lost, np.nan, drawn[missing, role])
    found = equal_impact("freeze", points, drawn, incomplete=[missing, "poor"])
    assert whole is not None and rest is not None and found is not None
    assert found["difference_ci"] == rest["difference_ci"] and found["difference"] == whole["difference"]
    assert f"Not all cells of {missing} are measured." in said(found)
    assert "Not all cells" not in said(whole)


def test_without_any_whole_sample_there_is_no_interval() -> None:
    points = {**BASELINES, "freeze": (0.4, 0.6)}
    found = equal_impact("freeze", points, {**samples(points), ("freeze", "legal"): np.full(200, np.nan)})
    assert found is not None and found["difference_ci"] is None and "no interval is known" in said(found)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_edge_is_of_finite_numbers(value: float) -> None:
    for points, at in ((BASELINES, value), ({**BASELINES, "odd": (value, 0.1)}, 0.1), ({"odd": (0.1, value)}, 0.2)):
        with pytest.raises(RaygardError, match="not finite"):
            reached(points, at)
