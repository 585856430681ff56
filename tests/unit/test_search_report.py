"""The report of a search: one self-contained page, whatever part of the search exists; what its titles claim."""

import html
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
from raygard.report.search_findings import against_p, listing, pareto, proxy, pruning, settings_that_matter
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
    assert files.pick["p"] == 0.3 and files.best[1]["candidate_id"] == files.pick_id
    assert files.best[1]["score"] < scores[0.3], "the record shows nothing if the picked mask has the best score"
    change(copy, controls=[])
    assert [c["score"] for c in SearchFiles(copy).best] == [scores[p] for p in RATIOS]


def random_controls(files, *, mitigation, half, draws=2):
    """Matched random masks whose mitigation is that of each best mask plus `mitigation`, +- `half`."""
    names = {c["candidate_id"]: c for c in files.best}
    own = [c for c in files.controls if c["defence"] == "random-matched"]
    values = [names[c["candidate_id"]]["mitigation"] + mitigation for c in own]
    return [
        {**c, "draws": draws, "mitigation": v, "mitigation_ci": [v - half, v + half]}
        for c, v in zip(own, values, strict=True)
    ]


def test_a_difference_from_random_masks_is_claimed_only_where_intervals_are_apart(copy):
    files = SearchFiles(copy)
    ps = listing(list(RATIOS))
    for mitigation, half, words in (
        (-0.3, 0.01, f"blocks more at p = {ps}"),
        (0.3, 0.01, f"blocks less at p = {ps}"),
        (-0.3, 0.6, "not shown to block more or less"),
        (0.0, 0.001, "not shown to block more or less"),
    ):
        change(copy, controls=random_controls(files, mitigation=mitigation, half=half))
        title = against_p(SearchFiles(copy))
        assert words in title and "2 draws" in title
    mixed = random_controls(files, mitigation=-0.3, half=0.01, draws=1)
    mixed[1] = {**mixed[1], "mitigation_ci": [-1.0, 1.0]}
    mixed[2] = {**mixed[2], "mitigation_ci": None}
    change(copy, controls=mixed)
    title = against_p(SearchFiles(copy))
    assert "blocks more at p = 0.1 and 0.7, and no difference is shown at p = 0.3 and 0.5" in title
    assert "(1 draw at" in title


def test_titles_follow_the_numbers(copy):
    files = SearchFiles(copy)
    assert "no control beyond the front" in pareto(files)
    assert settings_that_matter(files).startswith("p moves the score most")
    controls = [{**c, "mitigation": 0.99, "legal_impact_ci": [-1.0, -0.9]} for c in files.controls]
    change(copy, controls=controls)
    files = SearchFiles(copy)
    assert f"{len(controls)} controls beyond the front" in pareto(files)
    budget_kept = {c["p"] for c in files.scored if c["legal_impact_ci"][1] <= files.budget}
    assert f"can be kept at p = {listing(sorted(budget_kept))};" in against_p(files)


def test_what_the_intervals_are_conditional_on_is_printed(search_dir, page):
    search = json.loads((search_dir / "search.json").read_text())
    assert search["notes"] and all(f"<li>{html.escape(note)}</li>" in page for note in search["notes"])
    assert f"Smallest resolvable legal impact: {search['resolvable_legal_impact']:.3f}" in page
    assert "over adaptation seeds, classes and pictures" not in page


def test_the_mean_over_mask_seeds_is_not_sold_as_the_released_mask(search_dir, page):
    choice = json.loads((search_dir / "choice.json").read_text())
    own, mean = choice["outcome"]["mitigation"], choice["outcome_over_seeds"]["mitigation"]
    assert own != mean and f"<b>{own:.3f}</b>" in page and f"<b>{mean:.3f}</b>" not in page
    assert "Mean over masks of seeds 0, 1" in page and "This compares the mean over masks of seeds 0 and 1." in page


def test_candidate_that_lost_a_class_is_listed_but_not_compared(copy):
    files = SearchFiles(copy)
    lost = max(files.scored, key=lambda c: c["score"])["candidate_id"]
    trials = json.loads((copy / "search.json").read_text())["trials"]
    for candidate in (c for trial in trials for c in trial["candidates"]):
        if candidate["candidate_id"] == lost:
            candidate["incomplete"] = ["OpenMoji", "Fluent 3D"]
    change(copy, trials=trials)
    again = SearchFiles(copy)
    assert {c["candidate_id"] for c in files.scored} - {c["candidate_id"] for c in again.scored} == {lost}
    assert lost not in {c["candidate_id"] for c in again.best}
    page = built(copy)
    assert "no result for OpenMoji, Fluent 3D" in page and "was not considered for the choice" in page
    assert page.count('<td class="text">incomplete') == 1


def with_proxy(copy, scheduler="asha", **values):
    """search.json with another record of the proxy."""
    before = json.loads((copy / "search.json").read_text())["proxy"]
    change(copy, scheduler=scheduler, proxy=before | values)
    return SearchFiles(copy)


def decision(trial, scored, correlation, *, pruning=False, stopped=False):
    about = {"trial_id": trial, "fidelity": 0.5, "scored": scored, "correlation": correlation}
    return {**about, "pruning": pruning, "stopped": stopped}


def rhos(*scores, mitigation=0.9, legal_impact=None):
    parts = {"mitigation": mitigation, "legal_impact": legal_impact}
    return {str(index): {"score": score, **parts} for index, score in enumerate(scores)}


def test_pruning_is_told_from_what_the_scheduler_did(copy):
    early, weak = decision("a", 2, None), decision("b", 6, 0.1)
    free, stop = decision("c", 7, 0.8, pruning=True), decision("d", 8, 0.8, pruning=True, stopped=True)
    never = pruning(with_proxy(copy, decisions=[early, weak, weak]))
    assert never.startswith("A trial could be stopped at 0 of the 3 rungs") and never.endswith("nothing was pruned")
    assert "at 1 fewer than 6 trials" in never and "at 2 the rank correlation by then was unknown or below 0.5" in never
    kept = pruning(with_proxy(copy, decisions=[early, free]))
    assert "at 1 of the 2 rungs" in kept and kept.endswith("no trial was stopped") and "below" not in kept
    assert pruning(with_proxy(copy, decisions=[free, stop])).endswith(
        "at 2 of the 2 rungs that trials reached; stopped: d"
    )
    assert "No trial reached a rung" in pruning(with_proxy(copy, decisions=[]))
    assert "Nothing is pruned by choice" in pruning(with_proxy(copy, scheduler="fifo", decisions=[]))


def test_pruning_of_the_whole_record_is_on_the_page(search_dir, page):
    assert f"<p>{pruning(SearchFiles(search_dir))}.</p>" in page and "stopped: p0.5-T0.1-L5" in page


def test_correlation_below_the_threshold_is_said_with_its_number(copy):
    assert "-0.80 to 0.20, below the threshold of 0.5" in proxy(with_proxy(copy, correlation=rhos(-0.8, 0.2, None)))
    assert "0.20 to 0.90, at some fidelities below" in proxy(with_proxy(copy, correlation=rhos(0.2, 0.9)))
    assert "is 0.50, not below the threshold of 0.5" in proxy(with_proxy(copy, correlation=rhos(0.5)))
    assert "could not be compared" in proxy(with_proxy(copy, correlation=rhos(None)))
    assert "could not be compared" in proxy(with_proxy(copy, correlation={}))


def test_parts_may_rank_well_where_the_score_does_not(copy):
    with_proxy(copy, correlation=rhos(-0.8, mitigation=0.93))
    page = built(copy)
    assert "is -0.80, below the threshold" in page and "mitigation 0.93, legal impact unknown" in page


def test_scores_that_could_not_be_calibrated_leave_the_parts(copy):
    trials = json.loads((copy / "search.json").read_text())["trials"]
    for entry in (e for trial in trials for c in trial["candidates"] for e in c["proxy"]):
        entry["score"] = None
    change(copy, trials=trials)
    with_proxy(copy, scheduler="fifo", correlation=rhos(None, mitigation=0.93), decisions=[])
    page = built(copy)
    assert "could not be compared with the final score" in page and "mitigation 0.93" in page
    assert "Nothing is pruned by choice" in page


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
