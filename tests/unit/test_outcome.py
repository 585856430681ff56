"""The outcome's formulas against numbers worked out by hand, its intervals against known truth."""

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygard import schemas
from raygard.config_file import load_config
from raygard.errors import RaygardError
from raygard.outcome import build_outcome
from raygard.outcome_text import compare_sentence, format_table

ROLE = {"A": "illegal", "B": "illegal", "C": "legal"}
CONFIG = load_config(overrides=["domain.illegal=[A,B]", "domain.legal=[C]", "evaluation.bootstrap_samples=400"])


def result(defence, cls, distances, *, draw=None, mask_seed=None, seed=0, share=0.0, role=None):
    return {
        "job_id": f"{defence}-{cls}-{mask_seed}-{draw}-{seed}",
        "defence": defence,
        "class": cls,
        "role": role or ROLE[cls],
        "adaptation": "full",
        "scorer": "style_enlite0",
        "draw": draw,
        "mask_seed": mask_seed,
        "seed": seed,
        "freeze_ratio": share,
        "param_share": share,
        "distances": list(distances),
    }


def around(mean, n=8):
    """n distances with this mean and a small, fixed spread."""
    return mean + 0.001 * np.linspace(-1, 1, n)


def study(guarded):
    base, full = {"A": 0.9, "B": 0.8, "C": 0.7}, {"A": 0.1, "B": 0.4, "C": 0.2}
    results = [result("base", c, around(d)) for c, d in base.items()]
    results += [result("none", c, around(d)) for c, d in full.items()]
    return results + [result("freeze", c, around(d), mask_seed=0, share=0.3) for c, d in guarded.items()]


def of(outcome, defence):
    return next(s for s in outcome["summary"] if s["defence"] == defence)


def test_formulas_by_hand():
    outcome = build_outcome(study({"A": 0.5, "B": 0.5, "C": 0.25}), CONFIG, {"none": 1.5}, direction="distance")
    freeze = of(outcome, "freeze")
    assert freeze["mitigation"] == pytest.approx((0.4 + 0.1) / (0.8 + 0.4))
    assert freeze["legal_impact"] == pytest.approx(0.05 / 0.5)
    assert freeze["relative_illegal"] == pytest.approx(((0.5 / 0.1 - 1) + (0.5 / 0.4 - 1)) / 2)
    assert freeze["relative_legal"] == pytest.approx(0.25)
    assert freeze["worst_illegal"] == {"class": "B", "blocked": pytest.approx(0.25)}
    assert (freeze["freeze_ratio"], freeze["param_share"], freeze["base_loss"]) == (0.3, 0.3, None)
    none = of(outcome, "none")
    assert (none["mitigation"], none["mitigation_ci"], none["base_loss"]) == (0.0, [0.0, 0.0], 1.5)
    row = next(r for r in outcome["rows"] if r["defence"] == "freeze" and r["class"] == "A")
    assert (row["d_base"], row["d_full"]) == (pytest.approx(0.9), pytest.approx(0.1))
    assert row["blocked"] == pytest.approx(0.5)
    assert not any(r["defence"] == "base" for r in outcome["rows"])


def test_unseen_classes_count_as_legal_and_stand_alone_as_well():
    """A mask that lets through whom it knows looks harmless only where nobody else is measured."""
    results = study({"A": 0.5, "B": 0.5, "C": 0.2})
    results += [result(d, "D", around(v), role="legal") for d, v in (("base", 0.6), ("none", 0.2))]
    results += [result("freeze", "D", around(0.6), mask_seed=0, share=0.3, role="legal")]
    config = load_config(overrides=["domain.illegal=[A,B]", "domain.legal=[C]", "domain.unseen=[D]"])
    outcome = build_outcome(results, config, {}, direction="distance")
    freeze = of(outcome, "freeze")
    assert freeze["legal_impact"] == pytest.approx(0.4 / (0.5 + 0.4)) and freeze["worst_legal"]["class"] == "D"
    assert freeze["unseen_impact"] == pytest.approx(1.0) and freeze["unseen_impact_ci"] is not None
    assert "unseen impact [95 %]" in format_table(outcome)
    known = build_outcome(study({"A": 0.5, "B": 0.5, "C": 0.2}), CONFIG, {}, direction="distance")
    assert of(known, "freeze")["unseen_impact"] is None and "unseen" not in format_table(known)


def test_taught_values_without_an_unseen_class_are_said_to_prove_nothing_of_others():
    taught = ["domain.illegal=[A,B]", "domain.legal=[C]", "domain.general=[G]", "values.max_train_steps=50"]
    words = "domain.unseen names no class"
    results = study({"A": 0.5, "B": 0.5, "C": 0.2})
    for overrides, said in ((taught, True), (taught[:2], False)):
        notes = build_outcome(results, load_config(overrides=overrides), {}, direction="distance")["notes"]
        assert any(words in note for note in notes) == said


def test_paired_constant_differences_have_no_width():
    outcome = build_outcome(study({"A": 0.5, "B": 0.5, "C": 0.25}), CONFIG, {}, direction="distance")
    low, high = of(outcome, "freeze")["mitigation_ci"]
    assert high - low < 1e-9


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.floats(0.5, 1.0), min_size=4, max_size=4),
    st.lists(st.floats(0.0, 0.2), min_size=4, max_size=4),
)
def test_blocked_is_zero_at_full_and_one_at_base(base, full):
    results = []
    for cls in ROLE:
        results += [
            result("base", cls, base),
            result("none", cls, full),
            result("freeze", cls, full, mask_seed=0),
        ]
        results.append(result("largest-first", cls, base, mask_seed=0))
    outcome = build_outcome(results, CONFIG, {}, direction="distance")
    for row in outcome["rows"]:
        expected = 1.0 if row["defence"] == "largest-first" else 0.0
        assert row["blocked"] == pytest.approx(expected, abs=1e-9)


def test_similarity_turns_signs_and_keeps_quotients():
    results = study({"A": 0.5, "B": 0.5, "C": 0.25})
    flipped = [{**r, "distances": [1 - d for d in r["distances"]]} for r in results]
    near = of(build_outcome(results, CONFIG, {}, direction="distance"), "freeze")
    far = of(build_outcome(flipped, CONFIG, {}, direction="similarity"), "freeze")
    assert far["mitigation"] == pytest.approx(near["mitigation"])
    assert far["relative_illegal"] > 0 and near["relative_illegal"] > 0
    wrong = build_outcome(results, CONFIG, {}, direction="similarity")
    assert not any(c["counted"] for c in wrong["classes"])


def test_direction_comes_from_the_scorer():
    results = study({"A": 0.5, "B": 0.5, "C": 0.25})
    assert build_outcome(results, CONFIG, {})["direction"] == "distance"
    with pytest.raises(RaygardError, match="must be 'distance' or 'similarity'"):
        build_outcome(results, CONFIG, {}, direction="up")


def test_defences_are_listed_in_the_configured_order():
    outcome = matched(0.5, 0.4)
    assert [s["defence"] for s in outcome["summary"]] == ["none", "freeze", "random-matched"]


def test_nothing_is_clipped():
    outcome = build_outcome(study({"A": 0.05, "B": 0.3, "C": 0.9}), CONFIG, {}, direction="distance")
    assert of(outcome, "freeze")["mitigation"] < 0
    assert of(outcome, "freeze")["legal_impact"] > 1


def test_class_within_three_standard_errors_is_listed_but_not_counted():
    results = [r for r in study({"A": 0.5, "B": 0.5, "C": 0.25}) if r["class"] != "C"]
    up = np.linspace(0, 1, 8)
    results += [result("base", "C", up + 0.1), result("none", "C", up[::-1]), result("freeze", "C", up)]
    outcome = build_outcome(results, CONFIG, {}, direction="distance")
    entry = next(c for c in outcome["classes"] if c["class"] == "C")
    assert not entry["counted"] and entry["gap"] <= 3 * entry["se"]
    assert of(outcome, "freeze")["legal_impact"] is None
    assert of(outcome, "freeze")["legal_impact_ci"] is None
    assert outcome["resolvable_legal_impact"] is None
    assert any("no legal class" in note for note in outcome["notes"])
    assert any(note.startswith("C (legal) does not count") for note in outcome["notes"])
    assert "-" in format_table(outcome)


def noisy(rng, truth=0.4, draws=4, seeds=3, n=24):
    """Results whose masks, seeds and pictures scatter about a mitigation and legal impact of `truth`."""
    results = []
    for cls in ROLE:
        shared = rng.normal(0, 0.05, n)
        results.append(result("base", cls, 1.0 + shared + rng.normal(0, 0.02, n)))
        for seed in range(seeds):
            results.append(result("none", cls, 0.2 + shared + rng.normal(0, 0.01) + rng.normal(0, 0.02, n), seed=seed))
    for draw in range(draws):
        shift = rng.normal(0, 0.05)
        for cls in ROLE:
            base = np.mean(next(r for r in results if r["class"] == cls)["distances"])
            for seed in range(seeds):
                level = 0.2 + 0.8 * (truth + shift) + (base - 1.0)
                noise = rng.normal(0, 0.01) + rng.normal(0, 0.02, n)
                results.append(result("random", cls, level + noise, draw=draw, seed=seed))
    return results


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(7)
    config = CONFIG.model_copy(update={"evaluation": CONFIG.evaluation.model_copy(update={"bootstrap_samples": 200})})
    hits, widths = 0, []
    for _ in range(40):
        summary = of(build_outcome(noisy(rng, draws=10), config, {}, direction="distance"), "random")
        low, high = summary["mitigation_ci"]
        assert low <= summary["mitigation"] <= high
        hits += low <= 0.4 <= high
        widths.append(high - low)
    assert hits >= 33
    assert 0.02 < np.mean(widths) < 0.12


def test_several_draws_widen_the_interval_and_are_pooled():
    rng = np.random.default_rng(1)
    results = noisy(rng)
    pooled = of(build_outcome(results, CONFIG, {}, direction="distance"), "random")
    single = [r for r in results if r["draw"] in (None, 0)]
    alone = of(build_outcome(single, CONFIG, {}, direction="distance"), "random")
    assert np.ptp(pooled["mitigation_ci"]) > np.ptp(alone["mitigation_ci"])


def test_seeds_give_none_an_interval_around_zero():
    none = of(build_outcome(noisy(np.random.default_rng(2)), CONFIG, {}, direction="distance"), "none")
    assert none["mitigation"] == 0.0
    assert none["mitigation_ci"][0] < 0 < none["mitigation_ci"][1]


def test_classes_are_resampled_from_six_on():
    rng = np.random.default_rng(3)
    names = [f"I{i}" for i in range(6)]
    results = []
    for i, cls in enumerate(names):
        noise = rng.normal(0, 0.001, 8)
        for defence, level in (("base", 1.0), ("none", 0.0), ("freeze", i / 6)):
            results.append(result(defence, cls, level + noise, role="illegal"))
    outcome = build_outcome(results, CONFIG, {}, direction="distance")
    assert np.ptp(of(outcome, "freeze")["mitigation_ci"]) > 0.1
    assert not any("Mitigation is conditional" in note for note in outcome["notes"])
    five = [r for r in results if r["class"] != "I0"]
    outcome = build_outcome(five, CONFIG, {}, direction="distance")
    assert np.ptp(of(outcome, "freeze")["mitigation_ci"]) < 1e-6
    assert any("conditional on the 5 counted illegal" in note for note in outcome["notes"])


def test_seeded_and_independent_of_the_order_of_results():
    results = noisy(np.random.default_rng(4))
    first = build_outcome(results, CONFIG, {}, direction="distance")
    assert first == build_outcome(results, CONFIG, {}, direction="distance")
    backwards = build_outcome(results[::-1], CONFIG, {}, direction="distance")
    assert of(first, "random")["mitigation_ci"] == of(backwards, "random")["mitigation_ci"]


def test_output_follows_the_schema():
    outcome = build_outcome(study({"A": 0.5, "B": 0.5, "C": 0.25}), CONFIG, {}, direction="distance")
    jsonschema.validate(outcome, schemas.load("outcome"))
    del outcome["summary"][0]["mitigation"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(outcome, schemas.load("outcome"))


def matched(learned, random):
    results = study({"A": learned, "B": learned, "C": 0.25})
    for draw in range(3):
        results += [
            result("random-matched", c, around(d + 0.01 * draw), draw=draw, mask_seed=0)
            for c, d in {"A": random, "B": random, "C": 0.25}.items()
        ]
    return build_outcome(results, CONFIG, {}, direction="distance")


@pytest.mark.parametrize(
    ("learned", "random", "words"),
    [(0.7, 0.4, "blocks more than"), (0.4, 0.7, "blocks less than"), (0.51, 0.5, "cannot be told from")],
)
def test_sentence_is_honest_about_the_control(learned, random, words):
    outcome = matched(learned, random)
    assert words in compare_sentence(outcome)
    assert compare_sentence(outcome) in format_table(outcome)


def test_sentence_without_the_control():
    outcome = build_outcome(study({"A": 0.5, "B": 0.5, "C": 0.25}), CONFIG, {}, direction="distance")
    assert "was not compared" in compare_sentence(outcome)


def test_missing_jobs_are_noted_and_left_out():
    results = noisy(np.random.default_rng(5))
    lost = [r for r in results if not (r["defence"] == "random" and r["class"] == "A" and r["seed"] == 1)]
    outcome = build_outcome(lost, CONFIG, {}, direction="distance")
    assert any("4 combinations" in note for note in outcome["notes"])
    assert of(outcome, "random")["mitigation"] == pytest.approx(0.4, abs=0.15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: [], "no evaluation results"),
        (lambda r: [x for x in r if x["defence"] != "base"], "no result for 'base'"),
        (lambda r: [x for x in r if x["defence"] != "none"], "no result for 'none'"),
        (lambda r: [*r, r[-1]], "appears twice"),
        (lambda r: [*r[:-1], {**r[-1], "distances": [0.1, float("nan")]}], "finite"),
        (lambda r: [*r[:-1], {**r[-1], "distances": [0.1, 0.2]}], "differing numbers"),
        (lambda r: [*r[:-1], {**r[-1], "adaptation": "lora"}], "one adaptation"),
    ],
)
def test_bad_results_are_refused(change, message):
    with pytest.raises(RaygardError, match=message):
        build_outcome(change(study({"A": 0.5, "B": 0.5, "C": 0.25})), CONFIG, {}, direction="distance")
