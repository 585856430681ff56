"""The matrix of defences and adaptations from canned results: rows, summaries and tables without a cluster."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raygard.compare.equal_impact import CLOSED
from raygard.compare.matrix import COLUMNS, Matrix, Scale, to_csv
from raygard.compare.plan import parse_defences, plan_cells, variants
from raygard.compare.similarity import sgr, similarity
from raygard.compare.tables import latex, lines, to_html, to_latex, to_markdown, to_text
from raygard.config import RunConfig
from raygard.config_file import load_config
from raygard.errors import RaygardError
from raygard.outcome import build_outcome
from raygard.report.matrix import build_matrix_page

ADAPTATIONS = "compare.adaptations=[full, {name: full-ignoring, method: full, ignore_mask: true}, textual-inversion]"
PLACES = {"none": [(0, None)], "freeze": [(0, 0)], "random": [(0, 0), (1, 0)], "uce": [(0, None)]}
# How far adapted pictures are from their class; the release is at 0.9.
DISTANCES = {"none": 0.3, "freeze": 0.6, "random": 0.35, "uce": 0.3}
STYLE = Scale("style_enlite0", "distance", "cosine distance")


def config(*overrides: str) -> RunConfig:
    return load_config(
        None,
        [
            "domain.illegal=[i1,i2]",
            "domain.legal=[l1,l2]",
            "evaluation.adaptation_seeds=[0,1]",
            "evaluation.bootstrap_samples=200",
            "compare.defences=[none,freeze,random,uce]",
            ADAPTATIONS,
            *overrides,
        ],
    )


def result(cell: Any, mean: float, **changes: Any) -> dict[str, Any]:
    """A result of `run_jobs`."""
    rng = np.random.default_rng([cell.seed, cell.draw, len(cell.cls)])
    distances = [float(mean + 0.01 * noise) for noise in rng.standard_normal(8)]
    masked = cell.defence in ("freeze", "random")
    return {
        "job_id": f"{cell.defence}.{cell.cls}.{cell.draw}.{cell.seed}",
        "class": cell.cls, "role": cell.role, "defence": cell.defence, "draw": cell.draw,
        "mask_seed": cell.mask_seed, "seed": cell.seed, "domain": "d", "adaptation": "full", "scorer": STYLE.name,
        "freeze_ratio": 0.3 if masked else 0.0, "param_share": 0.5 if masked else 0.0,
        "mask_sha256": "ab" if masked else None, "n": 8, "distance": float(np.mean(distances)),
        "distances": distances, "seconds": {"adapt": 2.0, "generate": 1.0, "score": 0.5}, "trainable_params": 500,
        "audit_ok": True if masked else None, "outside_mask": [], "peak_memory_bytes": 2**20, "store": "k", **changes,
    }  # fmt: skip


def matrix(settings: RunConfig, **options: Any) -> Matrix:
    """Every cell measured."""
    found = Matrix(settings, variants(settings), [STYLE], num_params=1000, **options)
    found.cells = [cell for variant in found.variants for cell in plan_cells(settings, variant.name, PLACES)]
    base = {cell.cls: cell for cell in found.cells}
    for cell in base.values():
        found.add(STYLE.name, "full", {**result(cell, 0.9), "defence": "base"})
    for cell in found.cells:
        outside = ["the token"] if cell.adaptation == "textual-inversion" else []
        mean = DISTANCES[cell.defence] + (0.1 if cell.role == "illegal" and cell.defence == "freeze" else 0)
        found.add(STYLE.name, cell.adaptation, result(cell, mean, outside_mask=outside))
    return found


def test_every_cell_has_one_row_and_the_file_reads_back_equal() -> None:
    rows = matrix(config()).rows()
    keys = [
        tuple(row[name] for name in ("adaptation", "defence", "class", "draw", "mask_seed", "seed")) for row in rows
    ]
    assert len(rows) == len(set(keys)) == 3 * 5 * 4 * 2
    back = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert [list(line) for line in back] == [list(COLUMNS)] * len(rows)
    for row, line in zip(rows, back, strict=True):
        assert float(line["distance"]) == row["distance"] and line["draw"] == str(row["draw"])
        assert line["mask_seed"] == ("" if row["mask_seed"] is None else str(row["mask_seed"]))


def test_rows_agree_with_the_outcome_of_their_adaptation() -> None:
    settings = config()
    found = matrix(settings)
    own = [r for (_, cell), r in found.results.items() if cell.adaptation == "full"]
    outcome = build_outcome([*found.base.values(), *own], settings, {}, direction="distance")
    rows = [row for row in found.rows() if row["adaptation"] == "full"]
    assert len(outcome["rows"]) == len(rows)
    for expected in outcome["rows"]:
        (row,) = [
            row for row in rows if all(row[n] == expected[n] for n in ("defence", "class", "draw", "mask_seed", "seed"))
        ]
        assert row["d_none"] == pytest.approx(expected["d_full"]) and row["d_base"] == pytest.approx(expected["d_base"])
        assert row["blocked"] == pytest.approx(expected["blocked"])
        assert row["relative"] == pytest.approx(row["distance"] / row["d_none"] - 1)
    summary = found.summaries()[0]
    for entry, expected in zip(summary["defences"], outcome["summary"], strict=True):
        assert entry["defence"] == expected["defence"]
        for name in ("mitigation", "mitigation_ci", "legal_impact", "legal_impact_ci", "relative_illegal"):
            assert entry[name] == expected[name]
        assert (entry["done"], entry["failed"], entry["unfinished"]) == (
            16 if entry["defence"] == "random" else 8,
            0,
            0,
        )
        assert entry["trainable_share"] == 0.5 and entry["peak_memory_bytes"] == 2**20


def test_unseen_classes_have_a_column_of_their_own_where_there_are_any() -> None:
    name = "unseen impact [95 %]"
    found = matrix(config("domain.legal=[l1]", "domain.unseen=[l2]")).summaries()[0]
    header, release, *defences = lines(found)
    column = header.index(name)
    assert release[column] == "-" and [line[column][:6] for line in defences] == [
        f"{entry['unseen_impact']:.3f} " for entry in found["defences"]
    ]
    assert name in to_text([found]) and name not in to_text([matrix(config()).summaries()[0]])


def test_each_adaptation_is_measured_against_itself() -> None:
    found = matrix(config())
    for (scorer, cell), kept in list(found.results.items()):
        if cell.adaptation == "textual-inversion":
            found.results[scorer, cell] = {**kept, "distance": 0.5, "distances": [0.49, 0.51] * 4}
    full, _, inversion = found.summaries()
    assert [entry["mitigation"] for entry in inversion["defences"]] == [0.0] * 4
    assert full["defences"][1]["mitigation"] == pytest.approx(0.4 / 0.6, abs=0.03)
    assert full["defences"][1]["legal_impact"] == pytest.approx(0.3 / 0.6, abs=0.03)


def test_an_edit_is_not_called_a_mask() -> None:
    notes = matrix(config()).summaries()[0]["notes"]
    assert "One edit each of uce: their intervals are conditional on it." in notes
    assert "One mask each of freeze: their intervals are conditional on it." in notes


def test_plain_distances_are_means_over_every_class_or_nothing() -> None:
    found = matrix(config())
    summary = found.summaries()[0]
    freeze = next(entry for entry in summary["defences"] if entry["defence"] == "freeze")
    own = [row for row in found.rows() if (row["adaptation"], row["defence"]) == ("full", "freeze")]
    for role in ("illegal", "legal"):
        assert freeze[f"distance_{role}"] == pytest.approx(
            np.mean([row["distance"] for row in own if row["role"] == role])
        )
        assert summary["release"][f"distance_{role}"] == pytest.approx(0.9, abs=0.01)
    for key in [key for key in found.results if (key[1].defence, key[1].cls) == ("freeze", "l2")]:
        del found.results[key]
    freeze = next(entry for entry in found.summaries()[0]["defences"] if entry["defence"] == "freeze")
    assert freeze["distance_legal"] is None and freeze["distance_illegal"] is not None


def test_the_learned_mask_is_compared_at_equal_legal_impact() -> None:
    summary = matrix(config()).summaries()[0]
    entries = {entry["defence"]: entry for entry in summary["defences"]}
    equal = summary["equal_impact"]["freeze"]
    assert equal["mitigation"] == entries["freeze"]["mitigation"] and equal["between"] == ["none", CLOSED]
    # No baseline here blocks more of the illegal than of the legal.
    assert equal["difference"] == pytest.approx(entries["freeze"]["mitigation"] - entries["freeze"]["legal_impact"])
    assert equal["difference_ci"][0] > 0 and "the learned mask is better" in to_markdown([summary])
    assert {entry["against"] for entry in summary["comparisons"]} == {"random", "uce"}


def test_every_learned_mask_without_an_edit_is_compared() -> None:
    def table(**names: str) -> dict[str, Any]:
        found = matrix(config())
        found.results = {
            (scorer, replace(cell, defence=names.get(cell.defence, cell.defence))):
            {**kept, "defence": names.get(cell.defence, cell.defence)}
            for (scorer, cell), kept in found.results.items()
        }  # fmt: skip
        found.cells = [cell for _, cell in found.results]
        return found.summaries()[0]

    whole, other, edited = table(), table(freeze="freeze@0.5"), table(freeze="uce+freeze@0.5")
    assert list(other["equal_impact"]) == ["freeze@0.5"] and edited["equal_impact"] == {}
    equal, expected = other["equal_impact"]["freeze@0.5"], whole["equal_impact"]["freeze"]
    assert equal["difference"] == expected["difference"] and equal["difference_ci"][0] > 0
    for text in (to_markdown([other]), to_text([other])):
        assert "the learned mask freeze@0.5 is better" in text
    assert "learned mask" not in to_markdown([edited])


def test_a_missing_cell_of_the_learned_mask_does_not_turn_the_verdict() -> None:
    found = matrix(config())
    whole = found.summaries()[0]["equal_impact"]["freeze"]
    (cell,) = (
        c for s, c in found.results if c.adaptation == "full" and (c.defence, c.cls, c.seed) == ("freeze", "l1", 0)
    )
    del found.results[STYLE.name, cell]
    summary = found.summaries()[0]
    equal = summary["equal_impact"]["freeze"]
    assert equal["difference_ci"] == pytest.approx(whole["difference_ci"], abs=0.05) and equal["difference_ci"][0] > 0
    assert equal["incomplete"] == ["freeze"] and whole["incomplete"] == []
    assert "the learned mask is better. Not all cells of freeze are measured." in to_markdown([summary])


def test_a_scorer_for_each_role_takes_its_columns_from_its_own_table() -> None:
    settings = config("compare.legal_scorer=closeness")
    found = matrix(settings)
    found.scales = [STYLE, Scale("closeness", "similarity", "cosine similarity")]
    for (_, cls), kept in list(found.base.items()):
        found.base["closeness", cls] = {**kept, "distance": 1 - kept["distance"],
                                        "distances": [1 - value for value in kept["distances"]]}  # fmt: skip
    for (_, cell), kept in list(found.results.items()):
        # Twice as close, so that the two scorers give different numbers.
        values = [1 - value / 2 for value in kept["distances"]]
        found.results["closeness", cell] = {**kept, "distance": float(np.mean(values)), "distances": values}
    tables = found.summaries()
    assert [(table["scorer"], table["direction"]) for table in tables] == [
        *[("style_enlite0 / closeness", "distance / similarity")] * 3,
        *[("style_enlite0", "distance")] * 3,
        *[("closeness", "similarity")] * 3,
    ]
    both, style, close = tables[0], tables[3], tables[6]
    for mixed, first, second in zip(both["defences"], style["defences"], close["defences"], strict=True):
        for name in ("mitigation", "mitigation_ci", "relative_illegal", "distance_illegal", "sgr_illegal"):
            assert mixed[name] == first[name]
        for name in ("legal_impact", "legal_impact_ci", "relative_legal", "distance_legal", "sgr_legal"):
            assert mixed[name] == second[name]
        assert mixed["done"] == first["done"]
    assert both["defences"][1]["legal_impact"] != style["defences"][1]["legal_impact"]
    assert both["defences"][1]["relative_legal"] > 0 and both["equal_impact"]["freeze"]["mitigation"] == pytest.approx(
        style["defences"][1]["mitigation"]
    )
    assert both["equal_impact"]["freeze"]["legal_impact"] == close["defences"][1]["legal_impact"]
    assert any(note.startswith("closeness: ") for note in both["notes"])


def test_sgr_is_the_share_of_similarity_taken_away() -> None:
    assert sgr(0.8, 0.6) == pytest.approx(0.25) and sgr(0.6, 0.8) < 0 and sgr(0.5, 0.5) == 0
    for undefined in (0.0, -0.1, float("nan")):
        with pytest.raises(RaygardError, match="not above 0"):
            sgr(undefined, 0.5)
    assert similarity(0.3, "cosine distance") == 0.7 and similarity(0.3, "cosine similarity") == 0.3
    assert similarity(0.3, "Frechet distance") is None
    rows = [row for row in matrix(config()).rows() if row["defence"] == "freeze" and row["role"] == "illegal"]
    for row in rows:
        assert row["sgr"] == pytest.approx((row["distance"] - row["d_none"]) / (1 - row["d_none"])) and row["sgr"] > 0


def test_an_undefined_sgr_is_an_empty_field_with_its_reason() -> None:
    found = matrix(config())
    found.scales = [Scale(STYLE.name, "similarity", "cosine similarity")]
    for key, kept in list(found.results.items()):
        if kept["defence"] == "none":
            found.results[key] = {**kept, "distance": -0.1, "distances": [-0.1, -0.1] * 4}
    rows = [row for row in found.rows() if row["defence"] == "freeze"]
    assert all(row["sgr"] is None and "SGR is undefined" in row["reason"] and row["status"] == "done" for row in rows)


def test_failed_unfinished_and_impossible_cells_are_rows_with_a_reason() -> None:
    settings = config()
    found = matrix(settings, lost={"uce": "the model has no cross-attention"})
    whole = {entry["defence"]: entry for entry in matrix(settings).summaries()[0]["defences"]}
    frozen = next(cell for cell in found.cells if cell.defence == "freeze" and cell.cls == "i1" and cell.seed == 0)
    found.results[STYLE.name, frozen] = {
        **result(frozen, 0), "failed": True, "stage": "adapt", "reason": "nothing to train", "attempts": 1
    }  # fmt: skip
    open_cell = next(cell for cell in found.cells if cell.defence == "random" and cell.adaptation == "full")
    del found.results[STYLE.name, open_cell]
    rows = found.rows()
    assert {row["status"] for row in rows if row["defence"] == "uce"} == {"failed"}
    (failed,) = [row for row in rows if row["reason"] == "adapt: nothing to train"]
    (open_row,) = [row for row in rows if row["status"] == "unfinished"]
    assert failed["class"] == "i1" and failed["distance"] is None and open_row["defence"] == "random"
    summary = found.summaries()[0]
    entries = {entry["defence"]: entry for entry in summary["defences"]}
    assert entries["uce"]["mitigation"] is None and entries["uce"]["failed"] == 8
    assert (entries["freeze"]["done"], entries["freeze"]["failed"]) == (7, 1) and entries["random"]["unfinished"] == 1
    assert entries["none"]["mitigation_ci"] == whole["none"]["mitigation_ci"]
    assert any("nothing to train" in reason for reason in summary["reasons"])
    cells = [line[lines(summary)[0].index("cells")] for line in lines(summary)]
    assert cells == ["cells", "-", "8/8", "7/8, 1 failed", "15/16, 1 unfinished", "0/8, 8 failed"]


@pytest.mark.parametrize("yardstick", ["base", "none"])
def test_a_class_without_a_yardstick_has_distances_and_nothing_else(yardstick: str) -> None:
    found = matrix(config())
    failure = {"failed": True, "stage": "score", "reason": "no face", "attempts": 1}
    for key, kept in list(found.results.items()):
        if yardstick == "none" and (kept["defence"], kept["class"]) == ("none", "i1"):
            found.results[key] = {**kept, **failure}
    if yardstick == "base":
        found.base[STYLE.name, "i1"] = {**found.base[STYLE.name, "i1"], **failure}
    rows = [row for row in found.rows() if row["class"] == "i1" and row["defence"] == "freeze"]
    assert all(row["distance"] is not None and row["blocked"] is None for row in rows)
    summary = found.summaries()[0]
    assert summary["defences"][1]["mitigation"] is not None and "nothing can be said of i1" in summary["notes"][-1]


def test_nothing_measured_is_a_matrix_as_well() -> None:
    settings = config()
    empty = Matrix(settings, variants(settings), [STYLE], num_params=1000)
    empty.cells = plan_cells(settings, "full", PLACES)
    assert {row["status"] for row in empty.rows()} == {"unfinished"}
    assert all(entry["mitigation"] is None for entry in empty.summaries()[0]["defences"])
    assert "unfinished" in to_markdown(empty.summaries())


def test_what_goes_around_the_mask_is_printed() -> None:
    found = matrix(config())
    full, ignoring, inversion = found.summaries()
    assert full["around"] == [] and inversion["around"] == ["the token"]
    assert ignoring["around"] == ["the mask is ignored: every tensor is trained"]
    rows = [row for row in found.rows() if row["adaptation"] == "full-ignoring" and row["outside_mask"]]
    assert {row["defence"] for row in rows} == {"freeze", "random"}
    for text in (to_markdown([inversion]), to_latex([inversion]), to_text([inversion])):
        assert "utside every mask: the token" in text


def test_faces_have_columns_of_either_role_only_where_they_are_sought() -> None:
    found = matrix(config())
    assert "face" not in " ".join(lines(found.summaries()[0])[0])
    said = {"illegal": {"undetected": 0.25, "mean_detected": 0.2}, "legal": {"undetected": 0.5, "mean_detected": 0.1}}
    for key, kept in list(found.results.items()):
        found.results[key] = {**kept, **said[kept["role"]]}
    for key, kept in list(found.base.items()):
        found.base[key] = {**kept, "undetected": 1.0, "mean_detected": None}
    header, release, *defences = [line[-4:] for line in lines(found.summaries()[0])]
    assert header == ["no face, illegal", "no face, legal", "with a face, illegal", "with a face, legal"]
    assert release == ["100.0%", "100.0%", "-", "-"] and defences == [["25.0%", "50.0%", "0.2000", "0.1000"]] * 4


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.rows[-1][-1] += data


def test_markdown_html_and_latex_show_the_same_cells() -> None:
    summary = matrix(config()).summaries()[0]
    plain = lines(summary)
    parser = Cells()
    parser.feed(to_html(summary))
    assert parser.rows == plain
    table = [line for line in to_markdown([summary]).splitlines() if line.startswith("|")]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in table[:1] + table[2:]] == plain
    body = [line for line in to_latex([summary]).splitlines() if line.endswith("\\\\")]
    assert [line.removesuffix(" \\\\").split(" & ") for line in body] == [
        [latex(cell) for cell in row] for row in plain
    ]
    assert latex(r"a_b & 5% \x") == r"a\_b \& 5\% \textbackslash{}x"


def test_the_page_holds_every_table_and_escapes_names(tmp_path: Path) -> None:
    settings = config("domain.illegal=['<b>i1', i2]")
    summaries = matrix(settings).summaries()
    counts = {"done": 119, "failed": 1, "unfinished": 0}
    page = build_matrix_page(summaries, counts, settings.model_dump(mode="json"), {}, tmp_path / "compare.html")
    text = page.read_text()
    assert text.count("<table>") == 3 and "119 of 120 cells" in text and "1 cell failed" in text
    assert "<b>i1" not in text and text.count("data:image/png") == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compare.defences=[none, freze]", "did you mean 'freeze'"),
        ("compare.defences=[none, uce+imma]", "no mask is called 'imma'"),
        ("compare.adaptations=[full, {name: x, method: loar}]", "unknown adaptation 'loar'.*did you mean 'lora'"),
        ("compare.legal_scorer=fd_enlite0", "compare.legal_scorer 'fd_enlite0' has one number for all pictures"),
        ("compare.scorers=[style]", "unknown scorer 'style' .compare.scorers.; did you mean"),
        ("compare.edits=[{name: x, method: imma, outer: 1}]", "'imma' has no setting 'outer'"),
        ("compare.mask=no/such/folder", "is not a mask"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tiny_sd: Path, imagefolder: Any, tmp_path: Path, override: str, message: str
) -> None:
    from raygard.compare_flow import CompareFlow

    data = imagefolder({"a": 48, "c": 48})
    paths = [f"domain.data={data}", f"model.pretrained_model_name_or_path={tiny_sd}"]
    settings = load_config(None, [*paths, "domain.illegal=[a]", "domain.legal=[c]", override])
    with pytest.raises(RaygardError, match=message) as caught:
        CompareFlow(settings, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("given", "seeds"), [(False, [3, 4]), (True, [None])])
def test_a_defence_that_could_not_be_made_has_the_cells_it_would_have_had(given: bool, seeds: list[Any]) -> None:
    from types import SimpleNamespace

    from raygard.compare_flow import CompareFlow, Release

    settings = config("evaluation.mask_seeds=[3,4]", "compare.defences=[none,random,uce,uce+freeze,uce+random]")
    defences = parse_defences(settings.compare.defences, ["uce"], ["none", "freeze", "random"])
    flow: Any = SimpleNamespace(
        config=settings, defences=defences, variants=variants(settings)[:1], given=object() if given else None
    )
    cells = CompareFlow._cells(flow, {"none": [Release()], "random": [Release(draw, seeds[0]) for draw in range(3)]})
    places = {name: [] for name in settings.compare.defences}
    for cell in cells:
        if (cell.cls, cell.seed) == ("i1", 0):
            places[cell.defence].append((cell.draw, cell.mask_seed))
    assert places["uce+freeze"] == [(0, seed) for seed in seeds]
    assert places["uce+random"] == places["random"] and places["uce"] == places["none"] == [(0, None)]
