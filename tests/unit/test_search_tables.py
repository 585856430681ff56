"""The tables hold every candidate once, in one order, with the numbers they were given."""

import csv
import io

import pytest

from raygard.errors import RaygardError
from raygard.search.choice import choose, with_outcome
from raygard.search.tables import domains_markdown, domains_table, format_trials, trials_csv
from raygard.search_flow import learned_entry

COLUMNS = (
    "domain,trial_id,candidate_id,phase,status,incomplete,p,T,L,K,rule,illegal_weight,legal_weight,freeze_ratio,param_share,"
    "base_loss_rise,proxy_0.25_score,proxy_0.25_mitigation,proxy_0.25_legal_impact,"
    "proxy_1.0_score,proxy_1.0_mitigation,proxy_1.0_legal_impact,"
    "mitigation,mitigation_low,mitigation_high,legal_impact,legal_impact_low,legal_impact_high,"
    "unseen_impact,unseen_impact_low,unseen_impact_high,score,"
    "seconds_learn,seconds_values,seconds_adapt,seconds_generate,seconds_score,seconds_total,mask_sha256"
)


def trial(p, mitigation, upper, *, T=0.2, L=5, status="scored", fidelities=(0.25, 1.0), incomplete=(), **point):
    name = f"p{p}-T{T}-L{L}"
    settings = {"K": 30, "rule": "budget", "illegal_weight": 1.0, "legal_weight": 1.0, **point}
    scored = status == "scored"
    entry = {
        "candidate_id": name,
        "trial_id": name,
        "p": p,
        "T": T,
        "L": L,
        **settings,
        "mask": f"trials/{name}/masks/{name}",
        "mask_sha256": "0" * 64,
        "freeze_ratio": p - 0.01,
        "param_share": 0.4,
        "proxy": [
            {"fidelity": f, "step": 10, "mitigation": f / 3, "legal_impact": 0.01, "score": f / 3} for f in fidelities
        ],
        "mitigation": mitigation if scored else None,
        "mitigation_ci": [mitigation - 0.05, mitigation + 0.05] if scored else None,
        "legal_impact": upper - 0.02 if scored else None,
        "legal_impact_ci": [upper - 0.04, upper] if scored else None,
        "incomplete": list(incomplete),
        "relative_illegal": 0.5,
        "relative_legal": 0.1,
        "score": mitigation if scored else None,
    }
    return {
        "trial_id": name,
        "phase": "search",
        "status": status,
        "reason": None if scored else "worker died",
        "point": {
            "freeze_ratio": p,
            "temperature": T,
            "inner_steps": L,
            "publisher_steps": settings["K"],
            **{key: settings[key] for key in ("rule", "illegal_weight", "legal_weight")},
        },
        "candidates": [] if status == "failed" else [entry],
        "seconds": {"learn": 1.5, "adapt": 2.0, "generate": 0.5, "score": 0.25, "total": 4.25},
    }


TRIALS = [
    trial(0.5, 0.4, 0.2),
    trial(0.3, 0.2, 0.04, T=1.0),
    trial(0.3, 0.1, 0.04),
    trial(0.7, 0.0, 0.0, status="failed"),
    trial(0.1, 0.0, 0.0, status="pruned", fidelities=(0.25,)),
]


def searched(trials, domain="styles", budget=0.05):
    search = {"domain": domain, "trials": trials}
    candidates = [c for t in trials for c in t["candidates"]]
    return search, choose(
        candidates, domain=domain, legal_budget=budget, legal_penalty=2.0, config_hash="0123456789abcdef", seed=0
    )


def scored(search, choice, mask_seeds=()):
    own = {"mitigation": 0.25, "mitigation_ci": [0.1, 0.4], "legal_impact": 0.011, "legal_impact_ci": [-0.01, 0.03]}
    mean = {**own, "mitigation": 0.177, "mask_seeds": mask_seeds} if mask_seeds else None
    return search, with_outcome(choice, own, mean)


def rows_of(search):
    return list(csv.DictReader(io.StringIO(trials_csv(search))))


def test_csv_has_the_stated_columns_and_a_row_for_each_candidate():
    search, _ = searched(TRIALS)
    assert trials_csv(search).splitlines()[0] == COLUMNS
    rows = rows_of(search)
    assert [row["trial_id"] for row in rows] == [
        "p0.1-T0.2-L5",
        "p0.3-T0.2-L5",
        "p0.3-T1.0-L5",
        "p0.5-T0.2-L5",
        "p0.7-T0.2-L5",
    ]
    assert {row["domain"] for row in rows} == {"styles"}


def test_csv_returns_the_numbers_exactly():
    search, _ = searched([trial(0.3, 0.1 + 0.2, 1 / 3)])
    (row,) = rows_of(search)
    (entry,) = search["trials"][0]["candidates"]
    for field in ("mitigation", "legal_impact"):
        found = [float(row[f"{field}{end}"]) for end in ("", "_low", "_high")]
        assert found == [entry[field], *entry[f"{field}_ci"]]
    for proxy in entry["proxy"]:
        for field in ("score", "mitigation", "legal_impact"):
            assert float(row[f"proxy_{proxy['fidelity']}_{field}"]) == proxy[field]
    for field in ("p", "T", "L", "K", "freeze_ratio", "param_share", "score"):
        assert float(row[field]) == entry[field]
    assert float(row["seconds_total"]) == 4.25


def test_csv_leaves_cells_empty_where_nothing_was_measured():
    search, _ = searched(TRIALS)
    by_name = {row["trial_id"]: row for row in rows_of(search)}
    pruned, failed = by_name["p0.1-T0.2-L5"], by_name["p0.7-T0.2-L5"]
    assert (pruned["status"], pruned["proxy_1.0_score"], pruned["mitigation"], pruned["mitigation_low"]) == (
        "pruned",
        "",
        "",
        "",
    )
    assert float(pruned["proxy_0.25_score"]) == pytest.approx(0.25 / 3)
    assert (failed["status"], failed["candidate_id"], failed["p"], failed["mask_sha256"]) == ("failed", "", "0.7", "")


def test_tables_do_not_depend_on_the_order_of_trials():
    search, choice = searched(TRIALS)
    turned, same = searched(TRIALS[::-1])
    assert trials_csv(turned) == trials_csv(search)
    assert format_trials(turned, same) == format_trials(search, choice)


def test_csv_quotes_what_needs_it():
    search, _ = searched([trial(0.3, 0.2, 0.04)], domain='a, "b"')
    assert rows_of(search)[0]["domain"] == 'a, "b"'


def test_one_ranking_has_a_row_for_each_p_and_one_for_a_failure():
    ranking = trial(0.3, 0.2, 0.04)
    ranking["point"]["freeze_ratio"] = None
    ranking["candidates"].append({**ranking["candidates"][0], "candidate_id": "other", "p": 0.1})
    failure = trial(0.3, 0.2, 0.04, T=1.0, status="failed")
    failure["point"]["freeze_ratio"] = None
    search, choice = searched([failure, ranking])
    assert [row["p"] for row in rows_of(search)] == ["0.1", "0.3", ""]
    assert "p0.3-T1.0-L5 failed: worker died" in format_trials(search, choice)


def test_text_marks_each_candidate_and_ends_with_the_statement():
    search, choice = searched(TRIALS)
    lines = format_trials(search, choice).splitlines()
    marks = [line.split()[-1] for line in lines[2:7]]
    assert marks == ["pruned", "4", "chosen", "front", "failed"]
    assert "0.200 [0.150, 0.250]" in lines[4]
    assert lines[7:] == ["p0.7-T0.2-L5 failed: worker died", choice["statement"]]


def test_candidate_that_lost_a_class_is_listed_as_incomplete_with_the_class():
    search, choice = searched([*TRIALS, trial(0.3, 0.9, 0.0, T=0.1, incomplete=("stripes", "checks"))])
    assert choice["chosen"]["candidate_id"] == "p0.3-T1.0-L5"
    lines = format_trials(search, choice).splitlines()
    assert [line.split()[-1] == "incomplete" for line in lines[2:8]] == [False, True, False, False, False, False]
    assert "p0.3-T0.1-L5 incomplete: no result for stripes, checks" in lines[8:]
    cells = {row["trial_id"]: row["incomplete"] for row in rows_of(search)}
    assert cells.pop("p0.3-T0.1-L5") == "stripes; checks" and set(cells.values()) == {""}


def test_text_marks_the_nearest_where_none_meets_the_budget():
    search, choice = searched(TRIALS, budget=0.01)
    lines = format_trials(search, choice).splitlines()[2:7]
    assert [line.split()[-1] == "nearest" for line in lines] == [False, False, True, False, False]
    assert "chosen" not in format_trials(search, choice)


def test_the_releases_own_loss_is_shown_where_masks_carry_values():
    search, choice = searched([trial(0.3, 0.2, 0.04), trial(0.5, 0.3, 0.04)])
    assert "own loss" not in format_trials(search, choice)
    search["trials"][0]["candidates"][0]["base_loss_rise"] = 0.0125
    first, _, row, other, *_ = format_trials(search, choice).splitlines()
    assert "own loss" in first and "+1.2 %" in row and "%" not in other.replace("40.0%", "")
    assert rows_of(search)[0]["base_loss_rise"] == "0.0125"


def test_text_shows_a_setting_only_where_it_varies():
    constant = format_trials(*searched(TRIALS)).splitlines()[0]
    varied = format_trials(*searched([*TRIALS, trial(0.9, 0.1, 0.3, rule="paper")])).splitlines()[0]
    assert "rule" not in constant and "legal weight" not in constant
    assert "rule" in varied and "legal weight" not in varied


def test_domains_show_the_user_half_and_say_where_no_p_meets_the_budget():
    met, missed = scored(*searched(TRIALS)), scored(*searched(TRIALS, domain="a|b", budget=0.01))
    text = domains_table([met, missed]).splitlines()
    assert text[2].split("  ")[0] == "styles"
    assert "0.250 [0.100, 0.400]" in text[2] and "0.011 [-0.010, 0.030]" in text[2]
    assert "none (nearest: 0.3)" in text[3] and "none" not in text[2]
    assert "budget of 0.01 (a|b)" in text[4]
    assert len(domains_table([met]).splitlines()) == 3


def test_domains_in_markdown_are_the_same_cells():
    rows = [scored(*searched(TRIALS)), scored(*searched(TRIALS, domain="a|b", budget=0.01))]
    lines = domains_markdown(rows).splitlines()
    assert {line.replace(r"\|", "").count("|") for line in lines[:4]} == {7}
    assert lines[3].startswith(r"| a\|b | none (nearest: 0.3) | 1 | 5 | 0.250 [0.100, 0.400] |")
    assert lines[4:] == ["", domains_table(rows).splitlines()[4]]


def test_domains_show_the_released_mask_and_name_the_mean_over_seeds_below():
    alone, several = scored(*searched(TRIALS)), scored(*searched(TRIALS, domain="other"), mask_seeds=(0, 3))
    lines = domains_table([alone, several]).splitlines()
    assert all("0.250 [0.100, 0.400]" in line and "0.177" not in line for line in lines[2:4])
    assert len(lines) == 5 and lines[4].startswith("other: ") and "seeds 0, 3" in lines[4] and "0.177" in lines[4]
    assert domains_markdown([alone, several]).splitlines()[-1] == lines[4]


def test_domain_not_yet_scored_on_the_user_half_shows_no_publisher_numbers():
    row = domains_table([searched(TRIALS)]).splitlines()[2]
    assert row.count("not scored") == 2
    assert "0.200" not in row


def test_a_released_mask_without_any_measured_user_is_one_line() -> None:
    row = {"defence": "freeze", "mitigation": 0.5}
    assert learned_entry({"summary": [{"defence": "none"}, row]}) == row
    with pytest.raises(RaygardError, match=r"failures\.json"):
        learned_entry({"summary": [{"defence": "none"}]})
