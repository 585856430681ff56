"""The paper's tables: published numbers, the configurations that would measure them, and ours beside them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import raygard
from raygard import cli
from raygard.baselines import DEFENCES
from raygard.compare.matrix import COLUMNS, to_csv
from raygard.compare.plan import edit_settings, parse_defences, variants
from raygard.config_file import load_config
from raygard.editing import EDITS, choose_edit
from raygard.errors import RaygardError
from raygard.mask import FreezeMask
from raygard.paper_tables import NAMES, PublishedTable, command, fill, load_table, place
from raygard.paper_tables.published import Part
from raygard.scoring import SCORERS, check_evaluation

ROOT = Path(raygard.__file__).parents[1]
CONFIGS = ROOT / "jobs" / "configs" / "paper"
NUMBERED = [name for name in NAMES if load_table(name).kind == "matrix"]
# Rows and columns of the paper's tables; of 7 and 8 our copy has no body.
SHAPES = {"table1": (6, 3), "table2": (19, 5), "table3": (23, 4), "table4": (24, 3), "table5": (8, 3), "table6": (8, 3)}


def parts(table: PublishedTable, small: bool) -> Iterator[Part]:
    yield from (part for part in table.parts or [Part(name="")] if not (small and part.small_missing))


def published(name: str, method: str, role: str | None, column: str) -> float:
    table = load_table(name)
    place_ = [each.name for each in table.columns].index(column)
    (row,) = [row for row in table.rows if (row.method, row.role) == (method, role)]
    assert row.cells is not None
    return float(row.cells[place_].rstrip("*"))


@pytest.mark.parametrize("name", NAMES)
def test_every_published_table_has_its_shape_and_source(name: str) -> None:
    table = load_table(name)
    assert table.source.label.replace(" ", "").lower() == name and "2405.17472v2" in table.source.paper
    assert re.fullmatch(r"section \d\.\d|appendix B", table.source.where)
    numbers = [row.cells for row in table.rows if row.cells is not None]
    if name in SHAPES:
        assert (len(numbers), len(table.columns)) == SHAPES[name] and len(numbers) == len(table.rows)
        assert table.not_in_copy is None
    else:
        assert numbers == [] and table.not_in_copy and table.claims


def test_published_numbers_agree_with_the_papers_claims_and_with_each_other() -> None:
    full, uce = published("table2", "Full FT", "illegal", "FN"), published("table2", "UCE", "illegal", "FN")
    best = published("table2", "FG-50%", "illegal", "FN")
    assert best / full == pytest.approx(1.40, abs=0.005) and best / uce == pytest.approx(1.37, abs=0.006)
    style = published("table3", "FG-70%", "illegal", "CSD")
    assert style / published("table3", "Full FT", "illegal", "CSD") == pytest.approx(1.47, abs=0.005)
    explicit = [published("table4", method, "illegal", "NudeNet") for method in ("UCE", "FG-70%")]
    assert explicit[0] / explicit[1] == pytest.approx(1.38, abs=0.005)
    for role in ("illegal", "legal"):
        for method in ("Full FT", "UCE", "IMMA", "FG-30%"):
            ten = published("table5", method, role, "10 classes")
            assert ten == published("table2", method, role, "FN-L")
        for method in ("UCE", "IMMA", "FG-70%"):
            assert published("table6", method, role, "1 class") == published("table3", method, role, "CSD")


@pytest.mark.parametrize("name", NUMBERED)
def test_published_distances_are_distances(name: str) -> None:
    table = load_table(name)
    for row in table.rows:
        for column, cell in zip(table.columns, row.cells or (), strict=False):
            if cell not in (".", "-"):
                low, high = {"FID": (100, 330), "CLIP": (25, 35), "Human": (1, 7), "NudeNet": (0, 5)}.get(
                    column.name, (0, 1)
                )
                assert low <= float(cell.rstrip("*")) <= high, (row.method, column.name)


@pytest.mark.parametrize("small", [False, True], ids=["full", "small"])
@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_measures_what_its_table_shows(name: str, small: bool) -> None:
    table = load_table(name)
    listed = [json.loads(line) for line in (ROOT / "raygard/zoo/emoji_styles/metadata.jsonl").open()]
    bundled = {row["class"] for row in listed}
    for part in parts(table, small):
        config = load_config(CONFIGS / f"{place(name, small)}.yaml", part.small if small else part.full)
        if small and table.pictures is None:
            assert config.domain.data == "zoo:emoji-styles"
            assert {*config.domain.illegal, *config.domain.legal, *config.domain.general} <= bundled
        if table.kind == "overlap":
            continue
        if table.kind == "loss":
            assert config.bilevel.inner_steps >= 30 and config.bilevel.publisher_steps >= 11
            continue
        edits = edit_settings(EDITS, config)
        for method, settings in edits.values():
            choose_edit(method, **settings)
        parse_defences(config.compare.defences, edits, DEFENCES)
        assert [variant.name for variant in variants(config)] == ["full"]
        legal = [config.compare.legal_scorer] if config.compare.legal_scorer else []
        used = (config.evaluation.scorer, *legal, *config.compare.scorers)
        for scorer in used:
            assert scorer in SCORERS
            check_evaluation(scorer)
        needed = {row.defence for row in table.rows if row.defence}
        assert needed == set(config.compare.defences)
        assert all(row.draw is None or row.draw < config.evaluation.random_draws for row in table.rows)
        for column in table.columns:
            if column.why_missing(small) is None and column.scorers(small) and column.part in (None, part.name):
                assert set(column.scorers(small)) & set(used), column.name


def test_every_configuration_belongs_to_a_table() -> None:
    expected = {f"{place(name, small)}.yaml" for name in NAMES for small in (False, True)}
    assert {file.name for file in CONFIGS.glob("*")} == expected


def line(defence: str, role: str, cls: str, distance: float | None, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"adaptation": "full", "method": "full", "defence": defence, "role": role, "class": cls, "draw": 0}
    row |= {"scorer": "style_enlite0", "status": "done", "distance": distance, "d_base": 0.9, **changes}
    return row


def save(runs: Path, where: str, rows: list[dict[str, Any]]) -> None:
    (runs / where).mkdir(parents=True)
    (runs / where / "matrix.csv").write_text(to_csv(rows))


def cell(lines: list[list[str]], method: str, role: str, header: str) -> str:
    (found,) = [each for each in lines if each[:2] == [method, role]]
    return found[lines[0].index(header)]


@pytest.mark.parametrize("small", [False, True], ids=["full", "small"])
@pytest.mark.parametrize("name", NAMES)
def test_ours_stand_right_of_the_published_numbers(name: str, small: bool, tmp_path: Path) -> None:
    table, block = load_table(name), fill(name, small, [tmp_path])
    labels = len(block.lines[0]) - 2 * len(table.columns)
    assert len(block.lines) == len(table.rows) + 1
    assert {len(each) for each in block.lines} == {labels + 2 * len(table.columns)}
    header = block.lines[0][labels:]
    assert all(
        paper.endswith(", paper") and own.endswith(", ours") for paper, own in zip(*[iter(header)] * 2, strict=True)
    )
    for row, each in zip(table.rows, block.lines[1:], strict=True):
        expected = ["" if cell == "." else cell for cell in row.cells or ["n/a"] * len(table.columns)]
        assert each[labels::2] == expected
        assert set(each[labels + 1 :: 2]) <= {"not run", "n/a", ""}
    commands = [note for note in block.remarks if "not run; raygard " in note]
    assert len(commands) == len(list(parts(table, small)))


def test_means_spreads_and_counts_are_of_the_rows_users(tmp_path: Path) -> None:
    rows = [line("none", role, cls, 0.2) for role, cls in (("illegal", "a"), ("legal", "b"))]
    rows += [line("freeze@0.7", "illegal", "a", value, mask_seed=seed) for seed, value in enumerate((0.4, 0.6))]
    rows += [line("freeze@0.7", "legal", "b", 0.3), line("freeze@0.7", "legal", "b", None, status="failed")]
    rows += [
        line("random@0.7", "illegal", "a", None, status="unfinished"),
        line("uce", "illegal", "a", None, status="failed"),
    ]
    rows += [line("none", "illegal", "a", 0.01, scorer="kid_enlite0", d_base=0.05)]
    rows += [line("none", "illegal", "a", 9.0, adaptation="lora", method="lora")]
    rows += [line("none", "illegal", "a", 9.0, adaptation="full-5x")]
    save(tmp_path, "table3-small", rows)
    block = fill("table3", True, [tmp_path / "elsewhere", tmp_path])
    ours = "style_enlite0, ours"
    assert cell(block.lines, "Full FT", "illegal", ours) == "0.200 (n=1)"
    assert cell(block.lines, "FG-70%", "illegal", ours) == "0.500 +- 0.141 (n=2)"
    assert cell(block.lines, "FG-70%", "legal", ours) == "0.300 (n=1 of 2)"
    assert cell(block.lines, "R-70%", "illegal", ours) == "unfinished"
    assert cell(block.lines, "UCE", "illegal", ours) == "failed"
    assert cell(block.lines, "IMMA", "illegal", ours) == "not run"
    assert cell(block.lines, "Pre-trained model", "all", ours) == "0.900 +- 0.000 (n=2)"
    assert cell(block.lines, "Full FT", "illegal", "kid_enlite0, ours") == "0.0100 (n=1)"
    assert cell(block.lines, "Pre-trained model", "all", "kid_enlite0, ours") == "0.0500 (n=1)"
    assert f"Ours: {tmp_path / 'table3-small'}" in block.remarks
    assert block.lines[0][2:] == [
        *("CSD, paper", "style_enlite0, ours", "FID, paper", "kid_enlite0, ours"),
        *("CLIP, paper", "CLIP, ours", "Human, paper", "Human, ours"),
    ]
    assert "small twin" in block.heading
    assert fill("table3", False, [tmp_path]).lines[2][3] == "not run"


def test_draws_of_table_1_and_savings_of_table_8(tmp_path: Path) -> None:
    kid = {"scorer": "kid_enlite0"}
    save(
        tmp_path,
        "table1-small",
        [line("random-matched", "legal", "b", 0.1 * (1 + draw), draw=draw, **kid) for draw in (0, 1)],
    )
    lines = fill("table1", True, [tmp_path]).lines
    assert [each[-1] for each in lines if "random" in each[0]] == ["0.1000 (n=1)", "0.2000 (n=1)"]
    costs = {"none": (10.0, 0.0, 2**20), "freeze@0.5": (8.0, 0.6, 2**19)}
    rows = [
        line(name, role, role, 0.2, seconds_adapt=seconds, param_share=share, peak_memory_bytes=peak, scorer=scorer)
        for name, (seconds, share, peak) in costs.items()
        for role in ("illegal", "legal")
        for scorer in ("FN-L", "FN")
    ]
    save(tmp_path, "table8", rows)
    lines = fill("table8", False, [tmp_path]).lines
    assert cell(lines, "p=50%", "all", "time saved, ours") == "20.0%"
    assert cell(lines, "p=50%", "all", "memory saved, ours") == "50.0%"
    assert cell(lines, "p=50%", "all", "parameters frozen, ours") == "60.0% +- 0.0% (n=2)"
    assert cell(lines, "p=30%", "all", "time saved, ours") == "not run"


def test_figures_read_masks_and_histories(tmp_path: Path) -> None:
    model = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(8))
    names = [name for name, _ in model.named_parameters()]
    for number, frozen in ((1, names[:4]), (2, names[2:6])):
        FreezeMask.create(model, frozen).save(tmp_path / "figure12-small" / f"set-{number}" / "mask")
    block = fill("figure12", True, [tmp_path])
    assert block.lines[1][1:] == ["n/a", f"{2 / 6:.3f}", "n/a", f"{2 / 6:.3f}"]
    assert {*block.lines[2][2::2], *block.lines[3][2::2]} == {"not run"}

    folder = tmp_path / "figure14-small" / "learn" / "seed-0"
    folder.mkdir(parents=True)
    history = [
        {"kind": "user", "k": k, "l": step, "illegal_loss": 1.0 if step < 10 else 0.5, "legal_loss": 0.1 * (step == 29)}
        for k in (5, 6)
        for step in range(30 if k == 5 else 3)
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    lines = fill("figure14", True, [tmp_path]).lines
    assert lines[1][2::2] == ["1.000", "1.000", "0.505", f"{0.1 / 0.505:.0%}"]
    assert set(lines[2][2::2]) == {"not run"}
    (folder / "history.jsonl").write_text("[]\n")
    with pytest.raises(RaygardError, match="no history of mask learning"):
        fill("figure14", True, [tmp_path])


def test_the_repository_holds_the_run_it_speaks_of() -> None:
    results = ROOT / "benchmarks" / "results" / "paper"
    assert load_config(results / "table3-small" / "config.yaml") == load_config(CONFIGS / "table3-small.yaml")
    lines = fill("table3", True, [results]).lines
    own = [each[3] for each in lines[1:]]
    assert all(re.match(r"0\.\d{3}", text) for text in own), own


def test_one_command_prints_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["raygard", "tables", "--runs", str(tmp_path / "runs"), *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    out = tmp_path / "out"
    code, text, _ = run("--small", "--out", str(out))
    assert code == 0 and text.count("arXiv 2405.17472v2") == len(NAMES)
    assert "no explicit pictures are here" in text and command("table4", True, folder=tmp_path / "runs") in text
    assert "the body of Table 7" in text and "the body of Table 8" in text
    for file in ("tables.md", "tables.tex", "tables.html"):
        assert (out / file).read_text().count("0.436") >= 4
    code, text, _ = run("--only", "table3")
    assert code == 0 and "Table 3" in text and "Table 2" not in text
    code, text, error = run("--only", "table9")
    assert (code, text) == (2, "") and error.count("\n") == 1 and "did you mean" in error
    (tmp_path / "runs" / "table3-small").mkdir(parents=True)
    (tmp_path / "runs" / "table3-small" / "matrix.csv").write_text("a,b\n1,2\n")
    code, text, error = run("--small")
    assert (code, text) == (2, "") and error.count("\n") == 1 and "no column 'adaptation'" in error
