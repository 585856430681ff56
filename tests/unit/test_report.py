"""The report: one self-contained page, whatever part of a run exists; mask shares by block and kind."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from report_run import tiny_unet, write_learning, write_run

from raygard.errors import RaygardError
from raygard.report import build_report
from raygard.report.layers import KIND_ORDER, block_of, frozen_shares
from raygard.report.load import RunFiles
from raygard.report.page import headline, picture_grid, verdict
from raygard.report.plots import smooth


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = write_run(tmp_path_factory.mktemp("report") / "run", n=8)
    build_report(path)
    return path


@pytest.fixture(scope="module")
def page(run_dir):
    return (run_dir / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def elements(page):
    return Elements(page)


class Elements(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def test_page_is_self_contained(page, elements):
    for _, attributes in elements.found:
        for key in ("src", "srcset", "href"):
            assert attributes.get(key, "data:").startswith(("data:", "#"))
    assert re.findall(r"\w+://\S+", page) == ["http://***@mlflow:5000</dd>"]
    assert "<script" not in page and "@import" not in page


def test_page_is_accessible(elements):
    assert all(image.get("alt") for image in elements.all("img"))
    assert all(head.get("scope") for head in elements.all("th"))
    assert elements.all("html")[0]["lang"] == "en" and len(elements.all("h1")) == 1


def test_page_holds_every_section(page, elements):
    for words in (
        "Outcome",
        "Pictures",
        "The mask over the model",
        "Learning",
        "What a user saves",
        "Configuration",
    ):
        assert words in page
    assert len(elements.all("source")) == 5
    grids = [image for image in elements.all("img") if image["alt"].startswith("Pictures of")]
    assert len(grids) == 4
    assert "real picture, before adaptation, no defence, random" in grids[0]["alt"]


def test_numbers_on_the_page_are_those_of_the_outcome(run_dir, page):
    outcome = json.loads((run_dir / "outcome.json").read_text())
    freeze = next(s for s in outcome["summary"] if s["defence"] == "freeze")
    assert f"{freeze['mitigation']:.1%}" in headline(outcome)
    assert headline(outcome) in page
    assert f"{freeze['legal_impact']:.3f}" in page


def test_secrets_do_not_reach_the_page(page):
    assert "hunter2" not in page and "***@mlflow" in page


def test_rebuilding_is_atomic_and_leaves_no_litter(run_dir, tmp_path):
    shutil.copy(run_dir / "run.json", tmp_path)
    before = build_report(tmp_path).stat().st_ino
    assert build_report(tmp_path) == tmp_path / "report.html"
    assert (tmp_path / "report.html").stat().st_ino != before
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "report.html"}


def test_only_learn_exists(tmp_path):
    write_learning(tmp_path / "run", np.random.default_rng(0))
    shutil.rmtree(tmp_path / "run" / "relearn")
    page = build_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "No outcome yet" in page and "What a user saves" not in page
    assert "The mask over the model" in page and "Learning" in page


def test_pictures_without_a_face_are_told_where_faces_were_sought(run_dir, page, tmp_path):
    assert "Pictures without a face" not in page
    shutil.copytree(run_dir, tmp_path / "run")
    for number, file in enumerate(sorted((tmp_path / "run").glob("evaluation/jobs/*/result.json"))):
        found = (
            {"undetected": 1.0, "mean_detected": None} if number == 0 else {"undetected": 0.25, "mean_detected": 0.125}
        )
        file.write_text(json.dumps({**json.loads(file.read_text()), **found}))
    faces = build_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "Pictures without a face" in faces and "25.0%" in faces and "0.1250" in faces


def test_outcome_without_a_counted_class(run_dir, tmp_path):
    outcome = json.loads((run_dir / "outcome.json").read_text())
    for entry in outcome["summary"]:
        for role, field in (("illegal", "mitigation"), ("legal", "legal_impact")):
            entry.update({field: None, f"{field}_ci": None, f"relative_{role}": None, f"worst_{role}": None})
    outcome["resolvable_legal_impact"] = None
    (tmp_path / "outcome.json").write_text(json.dumps(outcome))
    page = build_report(tmp_path).read_text(encoding="utf-8")
    assert "nothing a mask could block" in page and "What it blocks against" not in page


def test_names_from_the_domain_are_escaped(run_dir, tmp_path):
    text = (run_dir / "outcome.json").read_text().replace("OpenMoji", "<img src=x>")
    (tmp_path / "outcome.json").write_text(text)
    page = build_report(tmp_path).read_text(encoding="utf-8")
    assert "<img src=x>" not in page and "&lt;img src=x&gt;" in page


@pytest.mark.parametrize("content", [None, "{"])
def test_no_run_or_a_damaged_one_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "outcome.json").write_text(content)
    with pytest.raises(RaygardError):
        build_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_verdict_tells_an_interval_with_zero_and_a_missed_aim(run_dir):
    outcome = json.loads((run_dir / "outcome.json").read_text())
    freeze = next(s for s in outcome["summary"] if s["defence"] == "freeze")
    freeze["mitigation_ci"] = [-0.1, 0.6]
    text = " ".join(verdict(outcome))
    assert "includes zero" in text and "not met" in text
    freeze.update(legal_impact_ci=[0.0, 0.04], mitigation=0.6)
    assert "within 0.05: met" in " ".join(verdict(outcome))


def test_history_survives_a_resume_and_a_torn_last_line(tmp_path):
    file = tmp_path / "relearn" / "history.jsonl"
    file.parent.mkdir()
    file.write_text('{"step": 0, "x": 1}\n{"step": 1, "x": 2}\n{"step": 1, "x": 3}\n{"step"')
    assert [(r["step"], r["x"]) for r in RunFiles(tmp_path).relearn] == [(0, 1), (1, 3)]


def test_grid_places_columns_and_rows():
    from io import BytesIO

    from PIL import Image

    columns = [
        np.full((3, 8, 8, 3), 40 * c, np.uint8) + np.arange(3, dtype=np.uint8)[:, None, None, None] for c in (1, 2)
    ]
    sheet = np.asarray(Image.open(BytesIO(picture_grid(columns))))
    cell = sheet.shape[0] // 3
    assert sheet.shape == (3 * cell, 2 * cell, 3)
    for row in range(3):
        for column in range(2):
            assert sheet[row * cell + cell // 2, column * cell + cell // 2, 0] == 40 * (column + 1) + row


def test_smooth_keeps_a_constant_series():
    np.testing.assert_allclose(smooth(np.full(60, 2.5)), 2.5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("conv_in.weight", ("input conv", "conv")),
        ("conv_out.bias", ("output", "bias")),
        ("conv_norm_out.bias", ("output", "norm")),
        ("time_embedding.linear_1.weight", ("time embedding", "time")),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight", ("down 0", "cross k")),
        ("up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0.weight", ("up 1", "self out")),
        ("up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0.bias", ("up 1", "bias")),
        ("mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight", ("middle", "feed-forward")),
        ("mid_block.attentions.0.proj_in.weight", ("middle", "projection")),
        ("mid_block.resnets.0.time_emb_proj.weight", ("middle", "time")),
        ("down_blocks.1.resnets.0.conv_shortcut.weight", ("down 1", "conv")),
        ("down_blocks.0.downsamplers.0.conv.weight", ("down 0", "conv")),
        ("down_blocks.0.attentions.0.transformer_blocks.0.norm3.weight", ("down 0", "norm")),
        ("transformer_blocks.12.attn.to_q.weight", ("transformer_blocks 12", "self q")),
        ("something.weight", ("something", "other")),
    ],
)
def test_block_of(name, expected):
    assert block_of(name) == expected


def test_every_tensor_of_a_real_unet_has_a_place():
    names = [name for name, _ in tiny_unet().named_parameters()]
    placed = [block_of(name) for name in names]
    assert {kind for _, kind in placed} == set(KIND_ORDER) - {"other"}
    shares = frozen_shares(names, [1] * len(names), [True] * len(names))
    assert shares.blocks == (
        "input conv",
        "time embedding",
        "down 0",
        "down 1",
        "middle",
        "up 0",
        "up 1",
        "output",
    )


def test_shares_by_tensors_and_by_parameters():
    names = ["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "down_blocks.0.resnets.0.conv2.weight"]
    shares = frozen_shares(names, [10, 30, 10], [False, True, False])
    assert shares.kinds == ("conv",)
    assert shares.by_count.ravel().tolist() == [0.0, 0.5]
    assert shares.by_params.ravel().tolist() == [0.0, 0.75]
