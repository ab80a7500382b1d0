"""Scores over tasks, their files and tables, forgetting and transfer: all by hand."""

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpig_fast.evaluation.history import backward_transfer, forgetting
from kpig_fast.evaluation.tables import EvaluationResult, TaskResult, markdown_table

RESULT = EvaluationResult(
    [
        # A task of 100 answers weighs as much as one of 2.
        TaskResult("tense", "seen", "probing", "acc", 80.0, {"OOS": 10.0, "WR": 0.0}, 100),
        TaskResult("genes", "seen", "extraction", "f1", 50.0, {"WFR": 40.0, "OOS": 20.0, "WR": 0.0}, 2),
        TaskResult("story", "seen", "generation", "rougeL", 20.0, {}, 10),
        TaskResult("essay", "held_out", "generation", "gpt", None, {"WR": 50.0}, 4),
        TaskResult("title, short", "held_out", "titles", "bleu", 30.0, {"WFR": 25.0}, 4),
    ]
)


def test_scores_are_means_over_tasks():
    assert RESULT.p_score() == pytest.approx((80 + 50 + 20 + 30) / 4)
    assert RESULT.p_score("seen") == 50
    assert RESULT.p_score("held_out") == 30


def test_violation_scores_leave_unconstrained_tasks_out():
    assert [task.v for task in RESULT.tasks] == [5, 20, None, 50, 25]
    assert RESULT.v_score("seen") == pytest.approx((5 + 20) / 2)
    assert RESULT.v_score("held_out") == pytest.approx((50 + 25) / 2)
    assert RESULT.v_score() == 25


def test_unscored_tasks_are_listed_not_zero():
    assert RESULT.not_scored == ["essay"]
    only = EvaluationResult([RESULT.tasks[3]])
    assert only.p_score() is None
    assert only.v_score() == 50


def test_nothing_to_average_is_none():
    assert EvaluationResult([]).p_score() is None
    assert EvaluationResult([]).v_score() is None
    assert EvaluationResult(RESULT.tasks[:3]).p_score("held_out") is None
    assert EvaluationResult([RESULT.tasks[2]]).v_score() is None


def test_json_round_trip():
    text = RESULT.to_json()
    assert EvaluationResult.from_json(text) == RESULT
    assert EvaluationResult.from_json(text).to_json() == text


def test_json_carries_the_scores_for_readers():
    data = json.loads(RESULT.to_json())
    assert data["scores"] == {
        "seen": {"p": 50, "v": 12.5},
        "held_out": {"p": 30, "v": 37.5},
        "all": {"p": 45, "v": 25},
    }
    assert data["not_scored"] == ["essay"]
    assert data["tasks"][0]["rates"] == {"OOS": 10, "WR": 0}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{}", "tasks"),
        ('{"tasks": [{"task": "a"}]}', "role"),
        (RESULT.to_json().replace('"WFR"', '"XYZ"'), "XYZ"),
        (RESULT.to_json()[:40], "JSON"),
    ],
)
def test_broken_json_is_named(text, named):
    with pytest.raises(ValueError, match=named):
        EvaluationResult.from_json(text)


def test_csv_has_a_line_per_task():
    rows = list(csv.DictReader(io.StringIO(RESULT.to_csv())))
    assert [row["task"] for row in rows] == [task.task for task in RESULT.tasks]
    genes, story, essay = rows[1], rows[2], rows[3]
    assert (genes["P"], genes["V"], genes["WFR"], genes["OOS"], genes["WR"]) == ("50.0", "20.0", "40.0", "20.0", "0.0")
    assert (story["V"], story["WFR"]) == ("", "")
    assert (essay["P"], essay["V"], essay["n"]) == ("", "50.0", "4")
    assert rows[4]["task"] == "title, short"


def test_table_shows_tasks_means_and_what_was_not_scored():
    lines = RESULT.format_table().splitlines()
    assert lines[0].split() == ["task", "role", "metric", "n", "P", "V", "WFR", "OOS", "WR"]
    assert lines[2].split() == ["genes", "seen", "f1", "2", "50.0", "20.0", "40.0", "20.0", "0.0"]
    assert lines[3].split() == ["story", "seen", "rougeL", "10", "20.0", "–", "–", "–", "–"]
    assert lines[6].split() == ["mean", "seen", "112", "50.0", "12.5"]
    assert lines[7].split() == ["mean", "held_out", "8", "30.0", "37.5"]
    assert lines[8].split() == ["mean", "all", "120", "45.0", "25.0"]
    assert lines[9] == "not scored (the metric needs a judge): essay"
    ends = [line.index(figure) + len(figure) for line, figure in ((lines[1], "80.0"), (lines[8], "45.0"))]
    assert ends[0] == ends[1] == lines[0].index(" P ") + 2


def test_table_without_unscored_or_held_out_tasks():
    lines = EvaluationResult(RESULT.tasks[:1]).format_table().splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["task", "role"],
        ["tense", "seen"],
        ["mean", "seen"],
        ["mean", "all"],
    ]


def test_markdown_table_is_aligned_as_text():
    assert markdown_table([["arm", "P"], ["a|b", "7.0"], ["long name", "100.0"]]).splitlines() == [
        "| arm       |     P |",
        "| --------- | ----: |",
        "| a\\|b      |   7.0 |",
        "| long name | 100.0 |",
    ]


percents = st.floats(0, 100)
names = st.text(st.characters(exclude_categories=["C"]))
results = st.lists(
    st.builds(
        TaskResult,
        task=names,
        role=st.sampled_from(["seen", "held_out"]),
        category=names,
        metric=st.just("acc"),
        p=st.none() | percents,
        rates=st.dictionaries(st.sampled_from(["WFR", "OOS", "WR"]), percents),
        n=st.integers(1, 1000),
    )
).map(EvaluationResult)


@given(results)
def test_any_result_keeps_range_and_survives_json(result):
    for score in (result.p_score(), result.v_score()):
        assert score is None or 0 <= score <= 100
    assert EvaluationResult.from_json(result.to_json()) == result
    assert len(list(csv.reader(io.StringIO(result.to_csv(), newline="")))) == 1 + len(result.tasks)
    assert result.format_table()


def step(**scores: float | None) -> EvaluationResult:
    return EvaluationResult([TaskResult(task, "seen", "", "acc", p, {}, 10) for task, p in scores.items()])


HISTORY = [
    step(a=60.0, b=20.0, c=10.0, held=40.0),
    step(a=70.0, b=90.0, c=15.0, held=45.0),
    step(a=55.0, b=95.0, c=80.0, held=30.0),
]
LEARNT = {"a": 0, "b": 1, "c": 2}


def test_forgetting_is_best_earlier_minus_final():
    # a: 70 − 55; b rose from 90 to 95; c was learnt last and cannot be forgotten yet.
    assert forgetting(HISTORY, LEARNT) == {"a": 15, "b": -5}


def test_backward_transfer_is_final_minus_right_after_learning():
    # a: 55 − 60; b: 95 − 90.
    assert backward_transfer(HISTORY, LEARNT) == 0
    assert backward_transfer(HISTORY[:2], {"a": 0, "b": 1}) == 10


def test_tasks_learnt_together_count_together():
    assert forgetting(HISTORY, {"a": 0, "b": 0, "c": 1}) == {"a": 15, "b": -5, "c": -65}
    # a: 55 − 60, b: 95 − 20, c: 80 − 15.
    assert backward_transfer(HISTORY, {"a": 0, "b": 0, "c": 1}) == pytest.approx((-5 + 75 + 65) / 3)


def test_tasks_evaluated_from_their_own_step_on():
    history = [step(a=60.0), step(a=50.0, b=90.0), step(a=40.0, b=85.0, c=70.0)]
    assert forgetting(history, LEARNT) == {"a": 20, "b": 5}
    assert backward_transfer(history, LEARNT) == pytest.approx((-20 - 5) / 2)


def test_unscored_tasks_have_no_history():
    history = [step(a=None, b=50.0), step(a=None, b=40.0)]
    assert forgetting(history, {"a": 0, "b": 0}) == {"b": 10}
    assert backward_transfer(history, {"a": 0, "b": 0}) == -10
    assert backward_transfer(history, {"a": 0}) is None


def test_one_step_or_none_forgets_nothing():
    assert forgetting(HISTORY[:1], {"a": 0}) == {}
    assert backward_transfer(HISTORY[:1], {"a": 0}) is None
    assert forgetting([], {}) == {}
    assert backward_transfer([], {}) is None


@pytest.mark.parametrize("figure", [forgetting, backward_transfer])
@pytest.mark.parametrize("at", [-1, 3])
def test_a_step_outside_the_history_is_named(figure, at):
    with pytest.raises(ValueError, match=rf"task 'a' is learnt at step {at}, but the history has 3 steps"):
        figure(HISTORY, {"a": at})
