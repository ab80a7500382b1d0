"""Plots of runs: the points, limits and cells that they draw, by hand; names and sizes of the images."""

import math
import re

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sample_runs import BEFORE, CURVES, FIRST, HISTORY, SECOND, STRATEGIES, sample_history, step_metrics, task_result

from kpig_fast.evaluation.runs import UNTRAINED
from kpig_fast.report.plots import CURVE_INCHES, DPI, plot_curves, plot_tasks


def png_size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(png[16:20]), int.from_bytes(png[20:24])


@pytest.fixture
def unrendered(monkeypatch) -> None:
    """Leave the rendering out, for tests that look only at what is drawn."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: None)


@pytest.fixture
def drawn(monkeypatch, unrendered) -> list[dict]:
    """Every line that is drawn: its label, points, style and the limits that its plot was given."""
    lines: list[dict] = []
    plot, set_ylim = Axes.plot, Axes.set_ylim

    def record(axes, *points, **style):
        if "label" in style:
            lines.append({"label": style["label"], "points": list(zip(*points)), "style": style, "axes": axes})
        return plot(axes, *points, **style)

    def limit(axes, *limits, **rest):
        for line in lines:
            if line["axes"] is axes and not rest:
                line["limits"] = limits[0]
        return set_ylim(axes, *limits, **rest)

    monkeypatch.setattr(Axes, "plot", record)
    monkeypatch.setattr(Axes, "set_ylim", limit)
    return lines


def test_curves_are_named_images_of_the_same_size():
    plots = plot_curves({name: sample_history(name) for name in STRATEGIES})
    assert [plot.name for plot in plots] == CURVES
    assert len({plot.title for plot in plots}) == len(CURVES)
    for plot in plots:
        assert png_size(plot.png) == tuple(DPI * inches for inches in CURVE_INCHES)
        assert len(plot.png) > 10_000


def test_curves_by_hand(drawn):
    assert len(plot_curves({"mine": HISTORY})) == 6
    untrained, mine = drawn[:2]
    assert (untrained["label"], mine["label"]) == ("untrained, same tasks", "mine")
    assert untrained["points"] == [(0, 15.0), (1, 10.0), (2, 15.0)]
    assert mine["points"] == [(1, 80.0), (2, 70.0)]
    points = [line["points"] for line in drawn if line["label"] == "mine"]
    assert points[1:] == [
        [(1, 30.0), (2, 40.0)],
        [(1, 10.0), (2, 20.0)],
        [(1, 30.0), (2, 10.0)],
        [(1, 0.5), (2, 0.5)],
        [(1, 0.125), (2, 0.375)],
    ]


def test_a_run_that_learns_all_at_once_stands_where_the_others_end(drawn):
    plot_curves({name: sample_history(name) for name in STRATEGIES})
    ends = {line["label"]: line["points"][-1][0] for line in drawn}
    assert ends == {"untrained, same tasks": 6, "sft": 6, "kpig": 6, "joint": 6}
    assert next(len(line["points"]) for line in drawn if line["label"] == "joint") == 1


def test_untrained_models_that_differ_are_drawn_apart(drawn):
    other = [step_metrics(UNTRAINED, [task_result("a", 99.0)]), FIRST]
    plot_curves({"mine": HISTORY, "other": other})
    labels = [line["label"] for line in drawn]
    assert labels[:4] == ["untrained, tasks of mine", "untrained, tasks of other", "mine", "other"]


def test_plots_of_one_score_share_limits_that_hold_every_point(drawn):
    plot_curves({name: sample_history(name) for name in STRATEGIES})
    shared = [line["limits"] for line in drawn]
    n = len(shared) // 3
    for start in (0, n, 2 * n):
        assert len(set(shared[start : start + n])) == 1
    assert len(set(shared)) == 3
    for line in drawn:
        low, high = line["limits"]
        assert all(low < value < high for _, value in line["points"])
        assert low < 0 < high


def test_runs_differ_in_colour_and_marker(drawn):
    plot_curves({f"run {n}": HISTORY for n in range(9)})
    styles = [(line["style"]["color"], line["style"]["marker"]) for line in drawn[:10]]
    assert len(set(styles)) == 10


@pytest.mark.parametrize(
    ("history", "names"),
    [
        (sample_history("kpig", held_out=()), ["p-seen", "v-seen", "gain-seen"]),
        ([step_metrics(0, [task_result("a", 50.0)], tasks=["a"])], ["p-seen"]),
        ([step_metrics(0, [task_result("a", None, metric="gpt", WR=0.0)], tasks=["a"])], ["v-seen"]),
        ([step_metrics(0, [task_result("a", None, metric="gpt")], tasks=["a"])], []),
        ([BEFORE], CURVES),
    ],
    ids=["no held-out", "one step", "not scored", "nothing", "untrained only"],
)
def test_only_what_was_measured_is_plotted(history, names, unrendered):
    assert [plot.name for plot in plot_curves({"a": history})] == names


@pytest.fixture
def grids(monkeypatch, unrendered) -> list[list[list[float]]]:
    """The figures of every heat map that is drawn."""
    seen = []
    pcolormesh = Axes.pcolormesh

    def record(axes, *grid, **style):
        seen.append(grid[-1])
        return pcolormesh(axes, *grid, **style)

    monkeypatch.setattr(Axes, "pcolormesh", record)
    return seen


def test_heat_map_by_hand(grids):
    plot_tasks("mine", HISTORY)
    expected = [[10, 80, 50], [20, math.nan, 90], [5, 30, 40]]
    assert [[str(value) for value in row] for row in grids[0]] == [[str(float(v)) for v in row] for row in expected]


def test_heat_map_rows_are_in_the_order_of_learning(grids):
    order = [SECOND.evaluation.tasks[i] for i in (2, 1, 0)]
    first = step_metrics(0, [order[1]], tasks=["b"])
    second = step_metrics(1, order, tasks=["a"])
    plot_tasks("mine", [first, second])
    assert [row[1] for row in grids[0]] == [90, 50, 40]


def test_heat_map_grows_with_tasks_and_steps():
    small = plot_tasks("run", HISTORY)
    large = plot_tasks("run", sample_history("kpig", seen=[f"task {n}" for n in range(40)]))
    assert png_size(small.png)[0] == 7.5 * DPI
    assert png_size(large.png)[0] > 2 * png_size(small.png)[0]
    assert png_size(large.png)[1] - png_size(small.png)[1] == pytest.approx(0.27 * DPI * (42 - 3), abs=1)


def test_heat_map_of_a_task_without_a_score_is_empty(grids):
    plot_tasks("run", [step_metrics(0, [task_result("a", None, metric="gpt")], tasks=["a"])])
    assert math.isnan(grids[0][0][0])


@pytest.mark.parametrize("name", ["a/b: c", "../up", "50 % <b>"])
def test_names_of_runs_make_no_paths(name, unrendered):
    plot = plot_tasks(name, HISTORY)
    assert re.fullmatch(r"tasks-[\w.-]+", plot.name)
    assert name in plot.title


def test_dollar_signs_and_underscores_in_names_are_text():
    assert len(plot_curves({"_a $\\frac{": HISTORY})) == 6
