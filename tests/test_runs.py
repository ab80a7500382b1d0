"""A run's figures on disk: written, read back in order, and summed up over the steps as by hand."""

import csv
import io
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_runs import BEFORE, FIRST, HISTORY, SECOND, sample_history, step_metrics, task_result, write_run

from kpig_fast.evaluation.runs import (
    METRICS_FILE,
    UNTRAINED,
    Scores,
    StepMetrics,
    is_complete,
    mark_complete,
    read_run,
    split_untrained,
    step_folder,
    steps_csv,
    summarise,
    write_metrics,
)


def test_scores_of_a_step_are_means_over_its_tasks():
    assert SECOND.scores("seen") == Scores(p=(50 + 90) / 2, v=20.0, gain=(0.25 + 0.75) / 2)
    assert SECOND.scores("held_out") == Scores(p=40.0, v=(0 + 20) / 2, gain=0.375)
    assert SECOND.scores() == Scores(p=60.0, v=(20 + 10) / 2, gain=(0.25 + 0.75 + 0.375) / 3)


def test_scores_that_nothing_has_are_none():
    step = step_metrics(0, [task_result("a", None, metric="gpt")], tasks=["a"])
    assert step.scores("seen") == Scores(None, None, None)
    assert step.scores("held_out") == Scores(None, None, None)
    assert step.gain() is None


def test_only_keeps_figures_of_the_named_tasks_and_everything_else():
    kept = SECOND.only(["b", "h", "unknown"])
    assert kept.evaluated == ["b", "h"]
    assert kept.gains == {"b": 0.75, "h": 0.375}
    assert kept.scores("seen") == Scores(90.0, None, 0.75)
    assert (kept.step, kept.tasks, kept.replayed, kept.training) == (1, ("b",), ("a",), SECOND.training)
    assert SECOND.evaluated == ["a", "b", "h"]


def test_summary_by_hand():
    run = summarise(HISTORY)
    assert (run.strategy, run.steps, run.tasks, run.seconds) == ("kpig", 2, 2, 42.5)
    assert run.scores == {"seen": SECOND.scores("seen"), "held_out": SECOND.scores("held_out")}
    assert run.forgetting == {"a": 80 - 50}
    assert run.mean_forgetting == 30
    assert run.backward_transfer == 50 - 80


def test_forgetting_takes_the_best_earlier_step_and_transfer_the_step_of_learning():
    better = step_metrics(1, [task_result("a", 95.0), task_result("b", 60.0)], tasks=["b"])
    last = step_metrics(2, [task_result("a", 70.0), task_result("b", 65.0), task_result("c", 1.0)], tasks=["c"])
    run = summarise([FIRST, better, last])
    assert run.forgetting == {"a": 95 - 70, "b": 60 - 65}
    assert run.mean_forgetting == (25 - 5) / 2
    assert run.backward_transfer == ((70 - 80) + (65 - 60)) / 2


def test_the_untrained_model_is_no_step_that_could_be_forgotten():
    knew = step_metrics(UNTRAINED, [task_result("a", 100.0)])
    assert summarise([knew, FIRST, SECOND]).forgetting == {"a": 30}


def test_summary_of_a_single_step_forgets_nothing():
    run = summarise([BEFORE, FIRST])
    assert (run.steps, run.forgetting, run.mean_forgetting, run.backward_transfer) == (1, {}, None, None)


def test_summary_of_the_untrained_model_alone():
    run = summarise([BEFORE])
    assert (run.steps, run.tasks, run.seconds) == (0, 0, 0)
    assert run.scores["seen"].p == 15
    assert run.backward_transfer is None


def test_summary_as_json_is_the_summary():
    fields = json.loads(summarise(HISTORY).to_json())
    assert fields["scores"]["held_out"] == {"p": 40.0, "v": 10.0, "gain": 0.375}
    assert fields["forgetting"] == {"a": 30.0}
    assert fields["seconds"] == 42.5


def test_untrained_is_told_from_the_steps():
    assert split_untrained(HISTORY) == (BEFORE, [FIRST, SECOND])
    assert split_untrained([FIRST]) == (None, [FIRST])


def test_a_run_is_read_as_it_was_written(tmp_path):
    for metrics in (SECOND, FIRST, BEFORE):
        write_metrics(tmp_path, metrics)
        mark_complete(step_folder(tmp_path, metrics.step))
    assert read_run(tmp_path) == HISTORY


def test_steps_are_read_by_number_not_by_name(tmp_path):
    for number in (1000, 999, 2):
        write_metrics(tmp_path, step_metrics(number, FIRST.evaluation.tasks))
        mark_complete(step_folder(tmp_path, number))
    assert [step.step for step in read_run(tmp_path)] == [2, 999, 1000]


def test_a_step_that_is_not_complete_is_not_read(tmp_path):
    for metrics in HISTORY:
        write_metrics(tmp_path, metrics)
    assert not is_complete(step_folder(tmp_path, 0))
    with pytest.raises(FileNotFoundError, match=r"no complete step in .* finished a step"):
        read_run(tmp_path)
    mark_complete(step_folder(tmp_path, 0))
    assert read_run(tmp_path) == [FIRST]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("", "Invalid JSON"),
        ('{"step": 0', "Invalid JSON"),
        (SECOND.to_json().replace('"gains"', '"grains"'), "gains"),
        (SECOND.to_json().replace('"p": 50.0', '"p": "half"'), "p\n.*valid number"),
    ],
)
def test_broken_metrics_are_named(tmp_path, broken, message):
    write_run(tmp_path, HISTORY)
    path = step_folder(tmp_path, 1) / METRICS_FILE
    path.write_text(broken)
    with pytest.raises(ValueError, match=message) as error:
        read_run(tmp_path)
    assert str(path) in str(error.value)
    assert "run the step again" in str(error.value)


def test_metrics_show_the_scores_to_readers():
    scores = json.loads(SECOND.to_json())["evaluation"]["scores"]
    assert scores["seen"] == {"p": 70.0, "v": 20.0}


figures = st.floats(-1e6, 1e6)


@given(
    step=st.integers(-1, 10**6),
    names=st.lists(st.text(min_size=1), min_size=1, max_size=4, unique=True),
    p=st.none() | figures,
    rate=figures,
    gain=figures,
)
def test_metrics_survive_the_round_trip_exactly(step, names, p, rate, gain):
    metrics = step_metrics(
        step,
        [task_result(name, p, "held_out" if n else "seen", WFR=rate) for n, name in enumerate(names)],
        tasks=names[:1],
        gains=dict.fromkeys(names, gain),
        training={"loss": rate},
    )
    assert StepMetrics.from_json(metrics.to_json()) == metrics


def test_metrics_of_a_run_that_diverged_can_be_read(tmp_path):
    write_run(tmp_path, [step_metrics(0, FIRST.evaluation.tasks, gains={"a": math.nan}, training={"loss": math.inf})])
    step = read_run(tmp_path)[0]
    assert math.isnan(step.gains["a"])
    assert step.training["loss"] == math.inf


def test_steps_as_csv_have_every_task_of_every_step():
    rows = list(csv.DictReader(io.StringIO(steps_csv(HISTORY))))
    assert [(row["step"], row["task"]) for row in rows] == [
        (str(step.step), name) for step in HISTORY for name in step.evaluated
    ]
    assert rows[4] == {
        "step": "0",
        "strategy": "kpig",
        "task": "h",
        "role": "held_out",
        "metric": "acc",
        "n": "10",
        "P": "30.0",
        "V": "30.0",
        "WFR": "",
        "OOS": "20.0",
        "WR": "40.0",
        "gain": "0.125",
    }


def test_steps_as_csv_leave_empty_what_was_not_scored_or_measured():
    step = step_metrics(0, [task_result('a, "b"', None, metric="gpt")])
    assert steps_csv([step]).splitlines()[1] == '0,kpig,"a, ""b""",seen,gpt,10,,,,,,'


def test_the_sample_run_forgets_what_it_does_not_replay():
    sft, kpig = (summarise(sample_history(strategy)) for strategy in ("sft", "kpig"))
    assert sft.mean_forgetting is not None
    assert kpig.mean_forgetting is not None
    assert sft.mean_forgetting > kpig.mean_forgetting > 0
