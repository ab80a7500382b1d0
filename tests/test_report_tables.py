"""Runs side by side in a table: every figure by hand, in three forms."""

import csv
import io
import re
import subprocess
import sys

from sample_runs import BEFORE, FIRST, HISTORY, step_metrics, table_rows, task_result

from kpig_fast.report.tables import comparison_table


def test_comparison_table_by_hand():
    assert comparison_table({"mine": HISTORY}).splitlines() == [
        "run        tasks  P seen  V seen  P held-out  V held-out  gain seen  gain held-out  forgetting"
        "  backward transfer  seconds",
        "untrained      0    15.0   100.0         5.0        25.0      0.250         -0.250           –"
        "                  –        –",
        "mine           2    70.0    20.0        40.0        10.0      0.500          0.375        30.0"
        "              -30.0     42.5",
    ]


def test_untrained_is_measured_over_the_tasks_of_the_last_step():
    rows = table_rows(comparison_table({"half": [BEFORE, FIRST]}))
    assert rows[1][:4] == ["untrained", "0", "10.0", "100.0"]
    assert rows[2][:4] == ["half", "1", "80.0", "10.0"]


def test_untrained_comes_once_where_all_runs_have_the_same():
    rows = table_rows(comparison_table({"a": HISTORY, "b": HISTORY, "c": HISTORY[1:]}))
    assert [row[0] for row in rows] == ["run", "untrained", "a", "b", "c"]


def test_untrained_comes_once_a_run_where_they_differ():
    rows = table_rows(comparison_table({"whole": HISTORY, "half": HISTORY[:2]}))
    assert [row[0] for row in rows] == ["run", "untrained (whole)", "untrained (half)", "whole", "half"]


def test_no_untrained_row_without_its_evaluation():
    assert [row[0] for row in table_rows(comparison_table({"a": HISTORY[1:]}))] == ["run", "a"]


def test_a_run_before_its_first_step_is_the_untrained_model():
    assert [row[0] for row in table_rows(comparison_table({"a": [BEFORE]}))] == ["run", "untrained"]


def test_a_run_may_be_called_untrained():
    rows = table_rows(comparison_table({"untrained": HISTORY}))
    assert [row[:3] for row in rows[1:]] == [["untrained", "0", "15.0"], ["untrained", "2", "70.0"]]


def test_what_a_run_lacks_is_a_dash():
    step = step_metrics(0, [task_result("a", None, metric="gpt")], tasks=["a"])
    assert table_rows(comparison_table({"bare": [step]}))[1] == ["bare", "1", *"–" * 8, "0.0"]


def test_no_figure_is_minus_zero():
    almost = step_metrics(1, [task_result("a", 80.01), task_result("b", 1.0)], tasks=["b"], gains={"a": -1e-9})
    assert "-0.0" not in comparison_table({"a": [FIRST, almost]})


def test_markdown_table():
    lines = comparison_table({"with|bar": HISTORY}, "markdown").splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 4
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert all(re.fullmatch("-+:", cell) for cell in rows[1][1:])
    assert re.fullmatch("-+", rows[1][0])
    assert rows[3] == ["with\\|bar", "2", "70.0", "20.0", "40.0", "10.0", "0.500", "0.375", "30.0", "-30.0", "42.5"]


def test_csv_table_keeps_all_digits():
    third = step_metrics(0, [task_result("a", 100 / 3)], tasks=["a"], training={"seconds": 0.1})
    rows = list(csv.reader(io.StringIO(comparison_table({"a, b": [third]}, "csv"))))
    assert rows[1] == ["a, b", "1", str(100 / 3), "", "", "", "", "", "", "", "0.1"]
    assert len(rows[0]) == len(rows[1])


def test_tables_load_no_heavy_library():
    code = "import sys, kpig_fast.report.tables; print({'torch', 'matplotlib', 'jinja2'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
