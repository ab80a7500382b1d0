"""Runs scored again and compared: figures, pairs and tests by hand, files read back, errors that name their cause."""

import csv
import io
import json
import math
import re
from dataclasses import replace

import pytest
from answered_runs import FIRST, LAST, answered, collection, write_answered

from kpig_fast.evaluation.comparison import COMPARISON_FILE, SCORES_FILE, compare_runs
from kpig_fast.evaluation.comparison_tables import all_tables, summary_tables
from kpig_fast.evaluation.rescoring import rescore
from kpig_fast.evaluation.runs import METRICS_FILE, PREDICTIONS_FILE, step_folder

# Student's quantile for two degrees of freedom.
T2 = 0.95 / math.sqrt(2 * 0.975 * 0.025)


def value(comparison, figure, name, level="role", **more):
    """The one row of the final figures that fits."""
    rows = [
        row
        for row in comparison.final()
        if (row.figure, row.name, row.level) == (figure, name, level)
        and all(getattr(row, key) == wanted for key, wanted in more.items())
    ]
    assert len(rows) == 1
    return rows[0]


def test_figures_of_one_run_by_hand(tmp_path):
    found = compare_runs([answered(tmp_path / "run")])
    assert found.arms == {"kpig": {0: "run"}}
    assert found.baseline == "kpig"
    assert found.differences == found.changes == []
    # Task a: 2 of 4 right, 1 of 4 out of scope. Task b: all right, none wordy. Task h: 3 of 4.
    assert [value(found, "P", name, "task").value for name in "abh"] == [50, 100, 75]
    assert value(found, "P", "seen").value == 75
    assert value(found, "V", "seen").value == 12.5
    assert value(found, "OOS", "seen").value == 25
    assert value(found, "WR", "seen").value == 0
    assert value(found, "P", "held_out").value == 75
    assert value(found, "gain", "seen").value == 0.5
    # Task a fell from 100 to 50.
    assert value(found, "forgetting", "a", "task").value == 50
    assert value(found, "forgetting", "seen").value == 50
    assert value(found, "backward transfer", "seen").value == -50


def test_a_category_is_split_by_role(tmp_path):
    found = compare_runs([answered(tmp_path / "run")])
    assert value(found, "P", "short", "category", role="seen").value == 75
    assert value(found, "P", "short", "category", role="held_out").value == 75
    assert value(found, "P", "short", "category", role="seen").n == 8


def test_intervals_and_numbers_of_answers(tmp_path):
    found = compare_runs([answered(tmp_path / "run")])
    a = value(found, "P", "a", "task")
    assert a.n == 4
    # Four answers, half of them right: 0 and 100 each come up once in sixteen draws.
    assert (a.low, a.high) == (0, 100)
    b = value(found, "P", "b", "task")
    assert (b.low, b.high) == (100, 100)
    seen = value(found, "P", "seen")
    assert (seen.low, seen.high, seen.n) == (50, 100, 8)
    assert value(found, "gain", "a", "task").low is None


def test_earlier_steps_have_figures_without_intervals(tmp_path):
    found = compare_runs([answered(tmp_path / "run")])
    first = [row for row in found.scores if row.step == 0]
    assert {row.name: row.value for row in first if (row.figure, row.level) == ("P", "task")} == {"a": 100, "h": 50}
    assert {row.value for row in first if row.figure == "gain"} == {0.25}
    assert all(row.low is row.high is None for row in first)
    assert not any(row.figure == "forgetting" for row in first)


def test_half_listening_shares(tmp_path):
    found = compare_runs([answered(tmp_path / "run", loud="YYYYyyxx")])
    assert [value(found, share, "seen").value for share in ("asked", "old", "neither")] == [50, 25, 25]
    asked = value(found, "asked", "a", "task")
    # Eight answers, half of which count: between 1 and 7 of 8 in 95 % of the draws.
    assert 0 < asked.low < 25
    assert 75 < asked.high < 100
    assert asked.n == 8
    assert [row[0] for row in cells(all_tables(found), "asked by category and task")[1:]][-1] == "seen task a"
    assert "## Half-listening" in summary_tables(found)
    assert "## Half-listening" not in summary_tables(compare_runs([answered(tmp_path / "other")]))


def test_several_seeds_have_the_interval_over_seeds(tmp_path):
    lasts = [LAST, {**LAST, "a": "yyyy"}, {**LAST, "a": "nnnn"}]
    runs = [answered(tmp_path / f"run{seed}", (FIRST, last), seed=seed) for seed, last in enumerate(lasts)]
    found = compare_runs(runs)
    assert found.arms == {"kpig": {0: "run0", 1: "run1", 2: "run2"}}
    # Over both seen tasks: 75, 100, 50; standard deviation 25.
    seen = value(found, "P", "seen")
    assert (seen.run, seen.seed, seen.n) == ("", None, 3)
    half = T2 * 25 / math.sqrt(3)
    assert (seen.value, seen.low, seen.high) == pytest.approx((75, 75 - half, 75 + half))
    of_runs = [row for row in found.scores if (row.figure, row.name, row.step) == ("P", "seen", 1) and row.run]
    assert [(row.run, row.seed, row.value) for row in of_runs] == [("run0", 0, 75), ("run1", 1, 100), ("run2", 2, 50)]
    assert value(found, "forgetting", "seen").value == pytest.approx((50 + 0 + 100) / 3)


def test_two_runs_are_compared_over_their_answers(tmp_path):
    worse = {**LAST, "a": "nnnn", "b": "nnnn", "h": "nnnn"}
    runs = [
        answered(tmp_path / "sft", (FIRST, worse), strategy="sft"),
        answered(tmp_path / "kpig", (FIRST, {**LAST, "a": "yyyy", "h": "yyyx"}), seed=5),
    ]
    found = compare_runs(runs)
    rows = {(row.role, row.figure): row for row in found.differences}
    assert list(rows) == [("seen", "P"), ("seen", "V"), ("held_out", "P"), ("held_out", "V")]
    assert {row.arm for row in rows.values()} == {"kpig"}
    p_seen = rows["seen", "P"].difference
    assert (p_seen.value, p_seen.test, p_seen.n) == (100, "permutation", 8)
    # All eight swapped or none: 2 / 256; the largest of 2,000 draws leave some room.
    assert p_seen.p < 0.02
    # Three of four right against none: 2 of the 8 signs of three gaps.
    assert rows["held_out", "P"].difference.p == pytest.approx(1 / 4, abs=0.04)
    assert rows["held_out", "V"].difference.value == 25
    assert rows["held_out", "V"].difference.p == 1
    # A single arm beside the baseline: nothing to correct for.
    assert all(row.holm == row.difference.p for row in rows.values())


def test_arms_are_compared_over_the_seeds_that_both_have(tmp_path):
    right = {"sft": ["nnnn", "ynnn", "yyyy"], "kpig": ["ynnn", "yyyn"]}
    runs = [
        answered(tmp_path / f"{arm}{seed}", (FIRST, {**LAST, "h": held}), seed=seed, strategy=arm)
        for arm, of_seeds in right.items()
        for seed, held in enumerate(of_seeds)
    ]
    row = next(row for row in compare_runs(runs).differences if (row.role, row.figure) == ("held_out", "P"))
    # Gaps 25 and 50: t = 37.5 / 12.5 = 3 with one degree of freedom.
    assert row.difference.value == 37.5
    assert (row.difference.test, row.difference.n) == ("t", 2)
    assert row.difference.p == pytest.approx(1 - 2 / math.pi * math.atan(3))


def test_p_values_are_corrected_for_the_number_of_arms(tmp_path):
    runs = [answered(tmp_path / "sft", (FIRST, {**LAST, "h": "nnnn"}), strategy="sft")]
    for name, held in (("kpig", "yyyy"), ("replay", "yynn")):
        runs.append(answered(tmp_path / name, (FIRST, {**LAST, "h": held}), strategy=name))
    rows = {row.arm: row for row in compare_runs(runs).differences if (row.role, row.figure) == ("held_out", "P")}
    p, worse = rows["kpig"].difference.p, rows["replay"].difference.p
    # Four gaps against two: 2/16 and 2/4.
    assert p < worse
    assert rows["kpig"].holm == pytest.approx(2 * p)
    assert rows["replay"].holm == pytest.approx(max(worse, 2 * p))


def test_the_baseline_can_be_chosen(tmp_path):
    runs = [answered(tmp_path / name, strategy=name) for name in ("sft", "kpig")]
    assert compare_runs(runs).baseline == "sft"
    chosen = compare_runs(runs, baseline="kpig")
    assert {row.arm for row in chosen.differences} == {"sft"}
    with pytest.raises(ValueError, match=r"no arm is called 'ewc'; the arms are: 'sft', 'kpig'"):
        compare_runs(runs, baseline="ewc")


def test_the_order_of_runs_does_not_matter(tmp_path):
    runs = [
        answered(tmp_path / f"{name}{seed}", (FIRST, {**LAST, "h": held}), strategy=name, seed=seed)
        for name, seed, held in (("sft", 0, "yynn"), ("kpig", 0, "yyyn"), ("sft", 1, "ynnn"), ("kpig", 1, "yyyy"))
    ]
    forth, back = compare_runs(runs, baseline="sft"), compare_runs(runs[::-1], baseline="sft")
    assert forth.differences == back.differences
    assert sorted(map(str, forth.scores)) == sorted(map(str, back.scores))


def test_the_order_of_answers_does_not_matter(tmp_path):
    turned = {task: LAST[task] for task in reversed(LAST)}
    runs = [answered(tmp_path / "a"), answered(tmp_path / "b", (FIRST, turned), settings={"x": 1})]
    path = step_folder(tmp_path / "b", 1) / PREDICTIONS_FILE
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[::-1]) + "\n")
    found = compare_runs(runs)
    assert all((row.difference.value, row.difference.p) == (0, 1) for row in found.differences)
    sides = [[replace(row, arm="", run="") for row in found.final() if row.arm == arm] for arm in found.arms]
    assert sorted(map(str, sides[0])) == sorted(map(str, sides[1]))


def test_figures_that_have_changed_are_told_and_the_new_ones_used(tmp_path):
    run = answered(tmp_path / "run")
    path = step_folder(run.folder, 1) / METRICS_FILE
    stored = path.read_text().replace('"p": 75.0', '"p": 70.0').replace('"OOS": 25.0', '"OOS": 0.0')
    path.write_text(stored)
    found = compare_runs([run])
    assert found.changes == [
        "run, step-001, task a: OOS was 0.00, is 25.00",
        "run, step-001, task h: P was 70.00, is 75.00",
    ]
    assert value(found, "P", "held_out").value == 75
    assert path.read_text() == stored
    assert "2 figures differ from those in `metrics.json`" in summary_tables(found)
    assert found.changes[1] in summary_tables(found)


def test_rules_that_have_changed_change_the_figures(tmp_path):
    run = replace(answered(tmp_path / "run"), collection=collection(metric="match"))
    assert rescore(run).changes == []
    wordless = replace(run, collection=collection(metric="gpt"))
    assert "run, step-000, task a: P was 100.00, is not scored" in rescore(wordless).changes


def test_a_judge_scores_what_needs_one(tmp_path):
    run = replace(answered(tmp_path / "run"), collection=collection(metric="gpt"))
    found = compare_runs([run], judge=lambda task, told: [one.answer != "may be" for one in told])
    assert value(found, "P", "a", "task").value == 75
    unjudged = compare_runs([run])
    assert value(unjudged, "P", "seen").value == 100
    assert not any((row.figure, row.name) == ("P", "a") for row in unjudged.scores)


def test_other_rows_are_named(tmp_path):
    runs = [answered(tmp_path / "ours"), answered(tmp_path / "theirs", strategy="sft", ids="q")]
    with pytest.raises(
        ValueError, match=r"theirs and ours answered different rows of task 'a': 8 rows only.*first 'a0'"
    ):
        compare_runs(runs)


def test_another_task_is_named(tmp_path):
    runs = [answered(tmp_path / "ours"), answered(tmp_path / "theirs", (FIRST, FIRST), strategy="sft")]
    with pytest.raises(ValueError, match=r"answered different rows of task 'b': 4 rows only one of them, first 'b0'"):
        compare_runs(runs)


def test_runs_that_have_no_partner_are_named(tmp_path):
    runs = [answered(tmp_path / f"kpig{seed}", seed=seed) for seed in (0, 1)]
    runs.append(answered(tmp_path / "sft", seed=2, strategy="sft"))
    with pytest.raises(ValueError, match=r"arm 'sft' has seeds 2, the baseline 'kpig' has 0, 1; .* common seed"):
        compare_runs(runs)


def test_the_same_run_twice_is_named(tmp_path):
    runs = [answered(tmp_path / name) for name in ("one", "two")]
    with pytest.raises(ValueError, match=r"one and two are both seed 0 of arm 'kpig'; leave one out"):
        compare_runs(runs)


def test_seeds_at_different_steps_are_named(tmp_path):
    runs = [answered(tmp_path / "one"), answered(tmp_path / "two", (FIRST,), seed=1)]
    with pytest.raises(ValueError, match=r"one stands at step 1, two at step 0, .* arm 'kpig'; finish"):
        compare_runs(runs)


def test_no_runs_and_absent_answers_are_named(tmp_path):
    with pytest.raises(ValueError, match="no runs"):
        compare_runs([])
    run = answered(tmp_path / "run")
    path = step_folder(run.folder, 0) / PREDICTIONS_FILE
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(path))} is not there"):
        compare_runs([run])


def test_files_can_be_read_back(tmp_path):
    runs = [answered(tmp_path / name, strategy=name, loud="YYyx") for name in ("sft", "kpig")]
    found = compare_runs(runs)
    found.write(tmp_path / "out")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / SCORES_FILE).read_text())))
    assert len(rows) == len(found.scores)
    columns = ["arm", "run", "seed", "step", "level", "role", "name", "figure", "value", "low", "high", "n"]
    assert list(rows[0]) == columns
    gain = next(row for row in rows if (row["figure"], row["level"], row["step"]) == ("gain", "task", "0"))
    assert (gain["value"], gain["low"], gain["n"]) == ("0.25", "", "")
    data = json.loads((tmp_path / "out" / COMPARISON_FILE).read_text())
    assert data["baseline"] == "sft"
    assert data["arms"] == {"sft": {"0": "sft"}, "kpig": {"0": "kpig"}}
    assert {row["step"] for row in data["scores"]} == {1}
    assert data["differences"][0]["difference"]["test"] == "permutation"


def cells(text, title):
    """The rows of the table under a title."""
    lines = text.split(f"## {title}\n\n")[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if not line.startswith("| -")]


def test_tables_show_the_figures(tmp_path):
    runs = [answered(tmp_path / "sft", (FIRST, {**LAST, "h": "nnnn"}), strategy="sft"), answered(tmp_path / "kpig")]
    found = compare_runs(runs)
    text = summary_tables(found)
    scores = cells(text, "Scores")
    assert scores[0] == ["arm (seeds)", "P seen", "V seen", "P held-out", "V held-out"]
    assert scores[2][0] == "kpig (1)"
    assert scores[2][1] == "75.0 [50.0, 100.0]"
    differences = cells(text, "Differences from sft")
    assert differences[3][:2] == ["kpig", "P held-out"]
    assert differences[3][2].startswith("+75.0 [")
    assert differences[3][-2:] == ["permutation", "4 answers"]
    steps = cells(text, "Over the steps")
    assert steps[0][1:] == ["forgetting seen", "backward transfer seen", "gain seen", "gain held-out"]
    assert steps[1][1:] == ["50.0", "-50.0", "0.500", "0.500"]


def test_all_tables_have_every_category_and_task(tmp_path):
    text = all_tables(compare_runs([answered(tmp_path / "run")]))
    assert text.startswith("# Comparison\n\n")
    table = cells(text, "P by category and task")
    assert [row[0] for row in table[1:]] == [
        "seen category short",
        "held-out category short",
        "seen task a",
        "seen task b",
        "held-out task h",
    ]
    assert cells(text, "WR by category and task")[2][0] == "seen task b"
    assert "WFR by category" not in text


def test_many_changes_are_counted(tmp_path):
    run = answered(tmp_path / "run")
    for step in (0, 1):
        path = step_folder(run.folder, step) / METRICS_FILE
        path.write_text(re.sub(r'"(p|OOS|WR)": [0-9.]+', r'"\1": 33.0', path.read_text()))
    found = compare_runs([run])
    # P and OOS of a and h, twice; P and WR of b.
    assert len(found.changes) == 10
    assert "* and 5 more" in summary_tables(found)


def test_an_unfinished_step_is_not_read(tmp_path):
    run = answered(tmp_path / "run")
    write_answered(tmp_path / "other", (FIRST, LAST, LAST))
    step_folder(tmp_path / "other", 2).rename(step_folder(run.folder, 2))
    (step_folder(run.folder, 2) / "COMPLETE").unlink()
    assert compare_runs([run]).final()[0].step == 1
