"""Tables and figures of finished runs, over what ``kpig eval`` makes of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments import ARMS, OURS
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kpig_fast.data.files import write_lines
from kpig_fast.evaluation.comparison import Comparison, compare_runs
from kpig_fast.evaluation.comparison_tables import all_tables, summary_tables
from kpig_fast.evaluation.runs import UNTRAINED
from kpig_fast.evaluation.score_rows import ScoreRow
from kpig_fast.evaluation.tables import markdown_table
from kpig_fast.training.stored_runs import open_runs

Point = tuple[str, Any]
"""A setting and its value."""

ROLES = {"seen": "seen", "held_out": "held-out"}
# Column: role, figure, number format.
PAPER = {
    **{f"{figure} {shown}": (role, figure, ".1f") for role, shown in ROLES.items() for figure in ("P", "V")},
    "gain held-out": ("held_out", "gain", ".3f"),
    **{share: ("seen", share, ".1f") for share in ("asked", "old", "neither")},
    **{name: ("seen", name, ".1f") for name in ("forgetting", "backward transfer")},
}


def write_comparison(runs: Mapping[str, Path], results: Path) -> None:
    """Write the tables of ``kpig eval`` against kpig, the paper-shaped one and the figure of gain over the steps."""
    comparison = compare_runs(open_runs(runs), baseline=OURS, progress=True)
    _write_scores(comparison, results / "scores.csv", course=True)
    write_lines(results / "comparison.md", [all_tables(comparison)])
    table = [["", *PAPER], _line("untrained", [row for row in comparison.scores if row.step == UNTRAINED and row.run])]
    table += [_line(arm, [row for row in comparison.final() if row.arm == arm]) for arm in comparison.arms]
    write_lines(results / "paper.md", markdown_table(table).splitlines())
    _draw_gain(comparison, results / "gain.png")
    print(summary_tables(comparison))
    print(f"wrote {results}")


def write_sensitivity(runs: Mapping[str, Path], points: Mapping[str, Sequence[Point]], results: Path) -> None:
    """Write the figures of kpig under other settings as CSV, and P and V over each setting as an image.

    Args:
        runs: folders by name.
        points: the places of every run on the courses of the settings.
        results: folder to write to.
    """
    comparison = compare_runs(open_runs(runs), progress=True)
    _write_scores(comparison, results / "sensitivity.csv", course=False)
    last = max(row.step for row in comparison.scores)
    rows = [row for row in comparison.scores if row.run and row.level == "role" and row.step == last]
    settings = list(dict.fromkeys(setting for some in points.values() for setting, _ in some))
    figure = Figure(figsize=(3.2 * len(settings), 5.6), layout="constrained")
    axes = figure.subplots(2, len(settings), sharey="row", squeeze=False)
    for column, setting in enumerate(settings):
        for line, letter in enumerate("PV"):
            _draw_setting(axes[line, column], rows, points, setting, letter)
    axes[0, 0].legend()
    figure.savefig(results / "sensitivity.png", dpi=130)
    print(f"wrote {results}")


def _write_scores(comparison: Comparison, path: Path, *, course: bool) -> None:
    """Write the means over the tasks of a role after the last step; with the ``course`` of arms after every step."""
    last = {row.arm: row.step for row in comparison.final()}
    rows = [
        row
        for row in comparison.scores
        if row.level == "role" and (row.step == last[row.arm] or (course and not row.run))
    ]
    write_lines(path, replace(comparison, scores=rows).to_csv().splitlines())


def _line(name: str, rows: Iterable[ScoreRow]) -> list[str]:
    return [name, *(_cell([row for row in rows if row.level == "role"], *column) for column in PAPER.values())]


def _cell(rows: Iterable[ScoreRow], role: str, figure: str, form: str) -> str:
    found = [row for row in rows if (row.role, row.figure) == (role, figure)]
    if not found:
        return "–"
    value = format(fmean(row.value for row in found), form)
    (first, *others) = found
    if others or first.low is None or first.high is None:
        return value
    return f"{value} ± {format((first.high - first.low) / 2, form)}"


def _draw_gain(comparison: Comparison, path: Path) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (role, shown) in zip(axes, ROLES.items()):
        axis.set_prop_cycle(color=[colormaps["tab20"](number) for number in range(20)])
        for arm in comparison.arms:
            points: dict[int, list[float]] = {}
            for row in comparison.scores:
                if (row.arm, row.level, row.role, row.figure) == (arm, "role", role, "gain") and row.run:
                    points.setdefault(row.step + 1, []).append(row.value)
            # A run that learns everything at once has no course.
            if arm in ARMS and len(points) > 2:
                steps = sorted(points)
                style = "--" if arm.startswith(f"{OURS} -") else "-"
                axis.plot(steps, [fmean(points[step]) for step in steps], style, label=arm)
        axis.set_title(f"information gain, {shown} tasks, mean over seeds")
        axis.set_xlabel("tasks learnt")
    axes[-1].legend(fontsize="small")
    figure.savefig(path, dpi=130)


def _draw_setting(
    axis: Axes, rows: Iterable[ScoreRow], points: Mapping[str, Sequence[Point]], setting: str, letter: str
) -> None:
    values = sorted({value for some in points.values() for name, value in some if name == setting})
    for role, shown in ROLES.items():
        of_role = [row for row in rows if (row.role, row.figure) == (role, letter)]
        means = [fmean(row.value for row in of_role if (setting, value) in points[row.run]) for value in values]
        axis.plot(range(len(values)), means, "o-", label=shown)
    axis.set_xticks(range(len(values)), [str(value) for value in values])
    axis.set_title(f"{letter} by {setting}")
