"""The report of a search: one self-contained page, whatever part of the search exists; what its titles claim."""

import json
import re
import shutil

import numpy as np
import pytest
from report_search import RATIOS, write_final, write_search
from test_report import Elements

from raygard.errors import RaygardError
from raygard.report import build_report, search_page
from raygard.report.html import data_uri
from raygard.report.layers import block_shares
from raygard.report.plots import THEMES
from raygard.report.search_findings import against_p, listing, pareto, proxy, settings_that_matter
from raygard.report.search_load import SearchFiles
from raygard.report.search_masks import mask_path


@pytest.fixture(scope="module")
def search_dir(tmp_path_factory):
    path = write_search(tmp_path_factory.mktemp("report") / "search")
    write_final(path)
    return path


@pytest.fixture(scope="module")
def page(search_dir):
    return build_report(search_dir).read_text(encoding="utf-8")


@pytest.fixture
def one_theme(monkeypatch):
    """Draw each plot once and use it in both themes: drawing is what takes the time."""
    monkeypatch.setattr(search_page, "both_themes", lambda draw: dict.fromkeys(THEMES, data_uri(draw(0))))


@pytest.fixture
def copy(search_dir, tmp_path, one_theme):
    """Search, choice and masks in a folder of their own, to change."""
    for name in ("search.json", "choice.json", "run.json", "config.yaml"):
        shutil.copy(search_dir / name, tmp_path)
    shutil.copytree(search_dir / "trials", tmp_path / "trials")
    return tmp_path


def change(folder, **values):
    record = json.loads((folder / "search.json").read_text()) | values
    (folder / "search.json").write_text(json.dumps(record))
    return record


def built(folder):
    return build_report(folder).read_text(encoding="utf-8")


def test_page_is_self_contained_but_for_the_link_to_the_final_run(page):
    elements = Elements(page)
    addresses = [a[key] for _, a in elements.found for key in ("src", "srcset", "href") if key in a]
    assert [a for a in addresses if not a.startswith("data:image/png;base64,")] == ["final/report.html"]
    assert re.findall(r"\w+://\S+", page) == ["http://***@mlflow:5000</dd>"]
    assert "<script" not in page and "@import" not in page and "hunter2" not in page


def test_page_is_accessible(page):
    elements = Elements(page)
    images, heads = elements.all("img"), elements.all("th")
    assert len(images) == 7 and all(image.get("alt") for image in images)
    assert heads and all(head.get("scope") for head in heads)
    assert len(elements.all("h1")) == 1 and elements.all("html")[0]["lang"] == "en"


def test_page_says_what_was_chosen_and_its_outcome(search_dir, page):
    choice = json.loads((search_dir / "choice.json").read_text())
    picked, outcome = choice["chosen"], choice["outcome"]
    assert f"Release with p = {picked['p']:g}, T = {picked['T']:g}, L = {picked['L']}." in page
    assert "On the user half" in choice["statement"] and choice["statement"] in page.replace("&#39;", "'")
    assert f"<b>{outcome['mitigation']:.3f}</b>" in page and f"<b>{outcome['legal_impact']:.3f}</b>" in page


def test_table_has_every_candidate_and_why_others_stopped(search_dir, page):
    search = json.loads((search_dir / "search.json").read_text())
    for trial in search["trials"]:
        assert f'<th scope="row">{trial["trial_id"]}</th>' in page
        assert trial["reason"] is None or trial["reason"] in page
    assert page.count('<tr class="own">') == 1
    for control in search["controls"]:
        assert f"<td>{control['mitigation']:.3f}<small>" in page


def test_no_p_meets_the_budget(tmp_path, one_theme):
    page = built(write_search(tmp_path, budget=0.0))
    nearest = json.loads((tmp_path / "choice.json").read_text())["nearest"]
    assert f"No p meets the legal budget of 0; the nearest is p = {nearest['p']:g}" in page
    assert "can be kept at no p" in page and "has not been scored on the user half" in page and "<a " not in page


def test_only_search_json(search_dir, tmp_path, one_theme):
    shutil.copy(search_dir / "search.json", tmp_path)
    change(tmp_path, agreement=[])
    page = built(tmp_path)
    assert "has not chosen a mask" in page and "without a choice there is no front" in page
    assert "are not in this directory" in page
    assert {path.name for path in tmp_path.iterdir()} == {"search.json", "report.html"}


def test_no_controls_agreement_proxy_or_classes(copy):
    record = json.loads((copy / "search.json").read_text())
    kept = {key: value for key, value in record.items() if key not in ("controls", "agreement", "proxy", "classes")}
    (copy / "search.json").write_text(json.dumps(kept))
    page = built(copy)
    assert "no random masks of the same parameter share were scored" in page
    assert "agreement between seeds is not known" in page and "No scored candidate has a proxy" in page


def test_nothing_was_scored(copy):
    (copy / "choice.json").unlink()
    trials = json.loads((copy / "search.json").read_text())["trials"]
    for trial in trials:
        trial |= {"status": "failed", "reason": "killed", "candidates": []}
    change(copy, trials=trials, controls=[], agreement=[])
    page = built(copy)
    assert "No candidate was scored" in page and "killed" in page and "What can be had" not in page


def test_no_trials(copy):
    (copy / "choice.json").unlink()
    change(copy, trials=[], controls=[], agreement=[], seconds={})
    assert "No trial has finished" in built(copy)


def test_legal_impact_was_not_measured(copy):
    (copy / "choice.json").unlink()
    trials = json.loads((copy / "search.json").read_text())["trials"]
    for candidate in (c for trial in trials for c in trial["candidates"]):
        candidate |= {"legal_impact": None, "legal_impact_ci": None}
    change(copy, trials=trials, controls=[])
    page = built(copy)
    assert "can be kept at no p" in page and "on the front" not in page


def test_one_p_only(tmp_path, one_theme):
    page = built(write_search(tmp_path, ratios=(0.3,)))
    assert "Only p = 0.3 has a mask" in page and "whether masks are nested cannot be told" in page


def test_one_ranking_for_every_p(copy):
    """Mode one_ranking: a trial has a candidate for each p, a failed one no p at all; other settings may vary."""
    trials = json.loads((copy / "search.json").read_text())["trials"]
    candidates = [c for trial in trials for c in trial["candidates"]]
    for candidate in candidates[::2]:
        candidate["rule"] = "paper"
    failed = next(trial for trial in trials if trial["status"] == "failed")
    failed["point"]["freeze_ratio"] = None
    together = {**trials[0], "candidates": [{**c, "trial_id": trials[0]["trial_id"]} for c in candidates]}
    change(copy, trials=[together, failed], mode="one_ranking")
    page = built(copy)
    assert '<th scope="col">rule</th>' in page and "<td>all</td>" in page


def test_names_are_escaped(copy, monkeypatch):
    monkeypatch.setattr(search_page, "both_themes", lambda draw: dict.fromkeys(THEMES, "data:"))
    text = (copy / "search.json").read_text().replace("loss is not finite", "<img src=x>")
    (copy / "search.json").write_text(text.replace("emoji-styles", "<script>"))
    page = built(copy)
    assert "&lt;img src=x&gt;" in page and "domain &lt;script&gt;" in page
    assert "<img src=x>" not in page and "<script>" not in page


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"trials": []}', "null"])
def test_a_damaged_search_is_refused(tmp_path, content):
    (tmp_path / "search.json").write_text(content)
    with pytest.raises(RaygardError, match=r"search\.json"):
        build_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_damaged_choice_is_refused(copy):
    (copy / "choice.json").write_text('{"chosen": null}')
    with pytest.raises(RaygardError, match=r"choice\.json is damaged: it has no 'nearest'"):
        build_report(copy)


def test_best_of_each_p_is_what_the_controls_are_matched_to(copy):
    files = SearchFiles(copy)
    scores = {p: max(c["score"] for c in files.scored if c["p"] == p) for p in RATIOS}
    assert [c["score"] for c in files.best] == [scores[p] for p in RATIOS]
    other = next(c for c in files.scored if c["p"] == 0.3 and c["score"] != scores[0.3])
    change(copy, controls=[{**files.controls[0], "p": 0.3, "candidate_id": other["candidate_id"]}])
    assert SearchFiles(copy).best[1]["candidate_id"] == other["candidate_id"]


def test_titles_follow_the_numbers(copy):
    files = SearchFiles(copy)
    assert "at every p compared" in against_p(files) and "no control beyond the front" in pareto(files)
    assert settings_that_matter(files).startswith("p moves the score most")
    controls = [{**c, "mitigation": 0.99, "legal_impact_ci": [-1.0, -0.9]} for c in files.controls]
    change(copy, controls=controls)
    files = SearchFiles(copy)
    assert "share at no p" in against_p(files) and f"{len(controls)} controls beyond the front" in pareto(files)
    budget_kept = {c["p"] for c in files.scored if c["legal_impact_ci"][1] <= files.budget}
    assert f"can be kept at p = {listing(sorted(budget_kept))};" in against_p(files)


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        ({"n": 6, "correlation": {"0.5": 0.8, "1.0": 0.9}, "pruning": True, "fidelities": [0.5, 1.0]}, "0.5 and 1"),
        ({"n": 6, "correlation": {"0.5": 0.2, "1.0": None}, "pruning": False, "fidelities": []}, "pruning was off"),
        ({"n": 2, "correlation": {"0.5": None}, "pruning": False, "fidelities": []}, "could not be compared"),
        (None, "could not be compared"),
    ],
)
def test_title_of_the_proxy(calibration, words):
    assert words in proxy({"threshold": 0.5, "calibration": calibration})


def tensors(*frozen):
    names = ("conv_in.weight", "mid_block.a.weight", "mid_block.b.weight", "conv_out.weight")
    return [{"name": n, "shape": [2, 5 if "a" in n else 1], "frozen": n[:-7] in frozen} for n in names]


def test_mask_path_by_hand():
    path = mask_path({0.5: tensors("mid_block.a", "conv_out"), 0.25: tensors("mid_block.b"), 0.75: tensors("conv_in")})
    assert path.p == (0.25, 0.5, 0.75) and path.blocks == ("input conv", "middle", "output")
    np.testing.assert_allclose(path.by_count, [[0, 0, 1], [0.5, 0.5, 0], [0, 1, 0]])
    np.testing.assert_allclose(path.by_params[1], [1 / 6, 5 / 6, 0])
    np.testing.assert_allclose(path.ratios, [0.25, 0.5, 0.25])
    assert path.nested[0, 1] == 0 and np.isnan(path.nested[1, 0]) and np.isnan(path.nested[0, 0])
    assert path.steps[0].sentence == "p = 0.25 to 0.5: 2 tensors added, most in middle (1), output (1); 1 released."


def test_nested_masks_keep_everything(copy):
    path = mask_path({0.25: tensors("conv_in"), 0.75: tensors("conv_in", "mid_block.a", "conv_out")})
    assert path.nested[0, 1] == 1 and path.steps[0].num_released == 0
    masks = SearchFiles(copy).masks(SearchFiles(copy).best)
    assert set(masks) == set(RATIOS) and (mask_path(masks).nested[0, 1:] > mask_path(masks).ratios[1:]).all()


def test_block_shares_weigh_by_parameters():
    blocks, by_count, by_params = block_shares(["conv_in.weight", "conv_in.bias"], [9, 1], [True, False])
    assert blocks == ("input conv",) and by_count.tolist() == [0.5] and by_params.tolist() == [0.9]
