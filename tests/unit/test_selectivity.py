"""What the selectivity bench computes of its users, and what it shows its rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.attributions import UNITS, by_unit, fronts
from benchmarks.attributions import table as table_of_attributions
from benchmarks.faces_small import HELD_OUT, collect
from benchmarks.selectivity import agreement, crossover, interval, pack, table
from benchmarks.selectivity_bench import Bench, Result, User, blocked
from benchmarks.selectivity_domains import DOMAINS
from benchmarks.selectivity_report import crossovers
from raygard.config_file import load_config
from raygard.domain import load_domain
from raygard.errors import RaygardError
from raygard.values import GENERAL


def user(role: str, base: float, full: float, guarded: float) -> User:
    return User("a", role, 0, Result(base, 10 * base), Result(full, 10 * full), Result(guarded, 10 * guarded))


def test_blocked_is_a_quotient_of_sums_over_the_users_of_a_role() -> None:
    users = [user("illegal", 1.0, 0.0, 0.5), user("illegal", 4.0, 1.0, 1.0), user("legal", 1.0, 0.5, 0.25)]
    assert blocked(users, "illegal", "loss") == pytest.approx(0.5 / 4.0)
    assert blocked(users, "illegal", "distance") == pytest.approx(0.5 / 4.0)
    # A guarded user who gets closer than an unguarded one counts as negative, nothing is clipped.
    assert blocked(users, "legal", "loss") == pytest.approx(-0.5)
    assert blocked(users, "unseen", "loss") is None


def test_an_interval_needs_two_seeds() -> None:
    assert interval([0.25]) == "+0.25" and interval([None]) == "-"
    low, high = (float(word.strip("[],")) for word in interval([0.1, 0.3]).split()[1:])
    assert low < 0.1 and high > 0.3


def test_values_are_taught_on_rehearsed_general_pictures_only(tiny_model, imagefolder, tmp_path: Path) -> None:
    data = imagefolder({"a": 48, "b": 48, "g": 40})
    named = ["domain.illegal=[a]", "domain.legal=[b]", "domain.general=[g]", "domain.resolution=16"]
    model = f"model.pretrained_model_name_or_path={tiny_model.pretrained_model_name_or_path}"
    config = load_config(None, [model, f"domain.data={data}", *named, "values.max_train_steps=20"])
    bench = Bench(config, tmp_path / "cache", held_out={"g": {load_domain(config.domain).view("base_loss")
                                                              .pictures("g", "general")[0].caption}})  # fmt: skip
    source = bench.values_source(config.values, seed=0)
    taught = {(source.data.parts[row], source.data.captions[row]) for group in source.roles[GENERAL]
              for row in group.rows.tolist()}  # fmt: skip
    kinds = {name: set(found.captions) for name, found in bench.general.items()}
    assert taught == {("general", caption) for caption in kinds["rehearsed"]}
    assert len(kinds["held out"]) == 1 and not kinds["rehearsed"] & (kinds["kept"] | kinds["held out"])


def test_faces_are_divided_into_people_to_learn_and_general_ones_some_of_them_held_out(tmp_path: Path) -> None:
    for folder, rows in (
        ("faces_congress", [(f"images/{n}.png", "portrait", f"Jane {n}") for n in range(30)]),
        ("faces_olivetti", [(f"person_{n:02}/01.png", "grey", f"person {n:02}") for n in (1, 20, *range(21, 41))]),
    ):
        for name, text, cls in rows:
            file = tmp_path / folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(name.encode())
            with (tmp_path / folder / "metadata.jsonl").open("a") as stream:
                stream.write(json.dumps({"file_name": name, "text": text, "class": cls}) + "\n")
    collect(tmp_path, tmp_path / "out")
    found = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    classes = [row["class"] for row in found]
    assert {name: classes.count(name) for name in set(classes)} == {
        "person 01": 1,
        "person 20": 1,
        HELD_OUT: 50 // 20,
        "portrait": 30 - sum(row["class"] == HELD_OUT and "congress" in row["file_name"] for row in found),
        "known person": 20 - sum(row["class"] == HELD_OUT and "olivetti" in row["file_name"] for row in found),
    }
    assert all((tmp_path / "out" / row["file_name"]).read_bytes() for row in found)
    with pytest.raises(RaygardError, match="faces_congress and faces_olivetti"):
        collect(tmp_path / "out", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_agreement_of_seeds_stands_beside_chance() -> None:
    rows = [{"frozen": pack(torch.tensor(flags))} for flags in ([True, True, False, False], [True, False, True, False])]
    assert agreement(rows) == "0.50 (0.50)" and agreement(rows[:1]) == "-" and agreement([{}, *rows]) == "0.50 (0.50)"


def test_the_table_shows_what_is_not_known_as_a_dash() -> None:
    row = {"rule": "random", "p": 0.3, "attack": "plain", "param_share": 0.5, "general loss, kept": 0.125}
    row |= {f"{role} {measure}": 0.25 for role in ("illegal", "legal") for measure in ("distance", "loss")}
    line = table([{**row, "unseen distance": None, "unseen loss": None}]).splitlines()[1]
    assert line.split() == [
        "random",
        "0.3",
        "plain",
        "1",
        "-",
        "50.0%",
        *["+0.25"] * 2,
        "-",
        *["+0.25"] * 2,
        "-",
        "-",
        "+12.5%",
        "-",
    ]


def test_the_control_of_one_style_gives_each_third_its_own_name(tmp_path: Path) -> None:
    bench = DOMAINS["one-style"](tmp_path, None, [])
    rows = [json.loads(line) for line in (tmp_path / "one-style" / "metadata.jsonl").read_text().splitlines()]
    thirds = [[row for row in rows if row["class"] == cls] for cls in bench.roles]
    assert max(map(len, thirds)) - min(map(len, thirds)) <= 1
    assert all(row["text"].endswith(f"in the style of {row['class']}") for third in thirds for row in third)
    concepts = [{row["concept"] for row in third} for third in thirds]
    assert not concepts[0] & concepts[1] and not concepts[1] & concepts[2]


def crossed(cls: str, role: str, guarded: float) -> dict:
    return {
        "cls": cls,
        "role": role,
        **{key: {"distance": d} for key, d in (("base", 2.0), ("full", 1.0), ("guarded", guarded))},
    }


def test_a_crossover_sets_each_class_against_itself() -> None:
    plain = [crossed("a", "illegal", 1.8), crossed("b", "legal", 1.2), crossed("c", "unseen", 1.5)]
    swapped = [crossed("a", "legal", 1.6), crossed("b", "illegal", 1.3), crossed("c", "unseen", 1.5)]
    again = [crossed("a", "illegal", 1.6), crossed("b", "legal", 1.2), crossed("d", "legal", 1.2)]
    found = crossover([{"users": users} for users in (plain, swapped, again)])
    assert found == {"a": pytest.approx((0.7, 0.6)), "b": pytest.approx((0.3, 0.2))}
    row = {"domain": "x", "rule": "r", "p": 0.3, "attack": "plain", "overrides": []}
    lines = crossovers([{**row, "swap": swap, "users": users} for swap, users in ((False, plain), (True, swapped))])
    assert lines.splitlines()[1].split()[:5] == ["x", "r", "0.3", "2", "1+1"]
    assert not crossovers([{**row, "swap": False, "users": plain}]).splitlines()[1:]


def test_units_are_chosen_by_one_half_and_counted_on_the_other() -> None:
    def half(illegal: list[float], legal: list[float]) -> list[dict[str, torch.Tensor]]:
        return [{"a.weight": torch.tensor(v).view(2, 2), "a.bias": torch.zeros(2)} for v in (illegal, legal)]

    learn, select = half([8.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 7.0]), half([5.0, 0.0, 0.0, 5.0], [2.0, 0.0, 0.0, 8.0])
    found = {
        (name, role): shares
        for name, both in (("learn", learn), ("select", select))
        for role, shares in zip(("illegal", "legal"), both, strict=True)
    }
    rows = list(fronts(found))
    # Of six numbers the first is taken, then those that say nothing; the legal one comes last.
    (number,) = [row for row in rows if (row["unit"], row["mu"], row["share"]) == ("number", 1.0, 0.7)]
    assert (number["count"], number["illegal"], number["legal"]) == (6, 0.5, 0.2)
    (tensor,) = [row for row in rows if (row["unit"], row["mu"], row["share"]) == ("tensor", 0.0, 0.7)]
    assert (tensor["count"], tensor["illegal"]) == (2, 1.0)
    assert {unit: len(by_unit(learn[0], unit)) for unit in UNITS} == {
        "tensor": 2, "output channel": 3, "input channel": 3, "number": 6
    }  # fmt: skip
    assert float(by_unit(learn[0], "output channel")[0]) == pytest.approx(0.9)
    assert "most illegal at legal <= 0.05" in table_of_attributions(rows)
