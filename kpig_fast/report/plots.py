"""Plots of runs as PNG images: P, V and gain over the tasks learnt, and P of every task after every step."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("plots need matplotlib; install it with: pip install 'kpig-fast[train]'") from error

from kpig_fast.data.schema import Role
from kpig_fast.evaluation.runs import Scores, StepMetrics, split_untrained

DPI = 130
CURVE_INCHES = (5.0, 3.5)

Score = Literal["p", "v", "gain"]
Curve = Sequence[tuple[int, Scores]]

_TITLES: dict[Score, str] = {
    "p": "P, {} tasks (higher is better)",
    "v": "V, {} tasks (lower is better)",
    "gain": "information gain, {} tasks",
}
# Okabe and Ito's palette, which colour-blind readers can tell apart; its yellow is too pale on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX*"
_GREY = "#777777"
_MOST_ANNOTATED_COLUMNS, _MOST_NAMED_COLUMNS = 20, 30
_LONGEST_LABEL = 34


@dataclass(frozen=True)
class Plot:
    """An image: its name (of a file, without the ending), its title and the PNG."""

    name: str
    title: str
    png: bytes


def plot_curves(runs: Mapping[str, Sequence[StepMetrics]]) -> list[Plot]:
    """P, V and mean gain over the number of tasks learnt, apart for seen and held-out tasks, all runs in one plot.

    Counting tasks instead of steps puts a run that learns all tasks at once beside the last step of the others. Seen
    tasks are those learnt so far, so the untrained model (grey, from 0 on) is drawn over the same tasks. Plots of one
    score share their limits. A score that no run has is left out.
    """
    plots = []
    curves = {role: _curves(runs, role) for role in get_args(Role)}
    references = {role: _references(runs, role) for role in get_args(Role)}
    for score in get_args(Score):
        drawn = [*curves.values(), *references.values()]
        values = [value for by_name in drawn for curve in by_name.values() for _, value in _points(curve, score)]
        for role in get_args(Role):
            if any(_points(curve, score) for curve in (*curves[role].values(), *references[role].values())):
                label = role.replace("_", "-")
                title = _TITLES[score].format(label)
                png = _draw_curves(title, score, curves[role], references[role], _limits(values))
                plots.append(Plot(f"{score}-{label}", title, png))
    return plots


def plot_tasks(name: str, history: Sequence[StepMetrics]) -> Plot:
    """P of every task (row, in the order of learning, held-out ones last) after every step (column) of one run.

    A frame marks where a task was learnt, a dot where it was replayed; grey cells were not evaluated or not scored.

    Args:
        name: name of the run.
        history: its metrics, as ``read_run`` gives them.
    """
    roles: dict[str, Role] = {task.task: task.role for step in history for task in step.evaluation.tasks}
    tasks = _row_order(history, roles)
    figure = Figure((max(7.5, 3.5 + 0.36 * len(history)), 1.3 + 0.27 * len(tasks)), DPI, layout="constrained")
    axes = figure.subplots()
    grid = [[_p_of(step, task) for step in history] for task in tasks]
    colours = colormaps["viridis"].with_extremes(bad="#eeeeee")
    mesh = axes.pcolormesh(grid, cmap=colours, vmin=0, vmax=100, edgecolors="white", linewidth=1)
    _mark_learnt_and_replayed(axes, history, tasks)
    if len(history) <= _MOST_ANNOTATED_COLUMNS:
        _annotate(axes, grid)
    _name_rows_and_columns(axes, history, tasks, roles)
    figure.colorbar(mesh, pad=0.01, aspect=1.7 * len(tasks)).ax.tick_params(labelsize=8)
    title = "P of every task after every step"
    axes.set_title(f"{title} of {_label(name)} (italic: held-out)", fontsize=10, loc="left")
    file_name = re.sub(r"[^\w.-]+", "-", f"tasks-{name}")
    return Plot(file_name, f"{title} of {name}", _png(figure))


def _curves(runs: Mapping[str, Sequence[StepMetrics]], role: Role) -> dict[str, Curve]:
    return {name: [(learnt, step.scores(role)) for learnt, step in _learnt(history)] for name, history in runs.items()}


def _references(runs: Mapping[str, Sequence[StepMetrics]], role: Role) -> dict[str, Curve]:
    """The untrained model over the tasks of every step; a curve that lies on a longer one is left out."""
    references: dict[str, Curve] = {}
    for name, history in runs.items():
        untrained, _ = split_untrained(history)
        if untrained is not None:
            same_tasks = [(learnt, untrained.only(step.evaluated)) for learnt, step in _learnt(history)]
            references[name] = [(n, step.scores(role)) for n, step in [(0, untrained), *same_tasks]]
    kept: dict[str, Curve] = {}
    for name in sorted(references, key=lambda name: -len(references[name])):
        if not any(set(references[name]) <= set(curve) for curve in kept.values()):
            kept[name] = references[name]
    if len(kept) == 1:
        return {"untrained, same tasks": next(iter(kept.values()))}
    return {f"untrained, tasks of {name}": curve for name, curve in kept.items()}


def _learnt(history: Sequence[StepMetrics]) -> list[tuple[int, StepMetrics]]:
    _, trained = split_untrained(history)
    return list(zip(accumulate(len(step.tasks) for step in trained), trained))


def _points(curve: Curve, score: Score) -> list[tuple[int, float]]:
    values = [(learnt, getattr(scores, score)) for learnt, scores in curve]
    return [(learnt, value) for learnt, value in values if value is not None]


def _limits(values: Sequence[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    low, high = min(low, 0.0), max(high, 0.0)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _draw_curves(
    title: str,
    score: Score,
    curves: Mapping[str, Curve],
    references: Mapping[str, Curve],
    limits: tuple[float, float],
) -> bytes:
    figure = Figure(CURVE_INCHES, DPI, layout="constrained")
    axes = figure.subplots()
    for name, curve in references.items():
        axes.plot(
            *_xy(curve, score), color=_GREY, linestyle="--", linewidth=1.2, marker="d", markersize=4, label=_label(name)
        )
    for index, (name, curve) in enumerate(curves.items()):
        colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
        line = {"linewidth": 1.8, "markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.8}
        axes.plot(*_xy(curve, score), color=colour, marker=marker, label=_label(name), **line)
    axes.set_ylim(limits)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("tasks learnt (0: untrained)", fontsize=9)
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    figure.legend(handles=axes.lines, loc="outside lower left", ncols=2, fontsize=8, frameon=False)
    return _png(figure)


def _xy(curve: Curve, score: Score) -> tuple[list[int], list[float]]:
    points = _points(curve, score)
    return [learnt for learnt, _ in points], [value for _, value in points]


def _row_order(history: Sequence[StepMetrics], roles: Mapping[str, Role]) -> list[str]:
    trained = [task for step in history for task in (*step.tasks, *step.replayed)]
    return list(dict.fromkeys([*trained, *(task for task, role in roles.items() if role == "seen"), *roles]))


def _p_of(step: StepMetrics, name: str) -> float:
    p = next((task.p for task in step.evaluation.tasks if task.task == name), None)
    return math.nan if p is None else p


def _name_rows_and_columns(
    axes: Axes, history: Sequence[StepMetrics], tasks: Sequence[str], roles: Mapping[str, Role]
) -> None:
    axes.set_yticks([row + 0.5 for row in range(len(tasks))], [_label(task) for task in tasks])
    for label, task in zip(axes.get_yticklabels(), tasks):
        label.set_fontstyle("italic" if roles.get(task) == "held_out" else "normal")
    columns = range(0, len(history), math.ceil(len(history) / _MOST_NAMED_COLUMNS))
    axes.set_xticks([column + 0.5 for column in columns], [str(history[column].step + 1) for column in columns])
    axes.tick_params(length=0, labelsize=8)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.set_xlabel("step (0: untrained; frame: learnt; dot: replayed; grey: no score)", fontsize=9)


def _mark_learnt_and_replayed(axes: Axes, history: Sequence[StepMetrics], tasks: Sequence[str]) -> None:
    row_of = {task: row for row, task in enumerate(tasks)}
    for column, step in enumerate(history):
        for task in step.tasks:
            axes.add_patch(
                Rectangle((column + 0.05, row_of[task] + 0.06), 0.9, 0.88, fill=False, edgecolor="black", linewidth=1.6)
            )
    dots = [(column + 0.86, row_of[task] + 0.2) for column, step in enumerate(history) for task in step.replayed]
    axes.scatter([x for x, _ in dots], [y for _, y in dots], s=9, color="white", edgecolors="black", linewidths=0.6)


def _annotate(axes: Axes, grid: Sequence[Sequence[float]]) -> None:
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            if math.isfinite(value):
                colour = "black" if value > 55 else "white"
                text = axes.text(
                    column + 0.5, row + 0.52, f"{value:.0f}", color=colour, fontsize=7, ha="center", va="center"
                )
                # Texts lie inside their cells; measuring them would take most of the time.
                text.set_in_layout(False)


def _label(name: str) -> str:
    """A name as text of a plot, where dollar signs would begin a formula."""
    short = name if len(name) <= _LONGEST_LABEL else name[: _LONGEST_LABEL - 1] + "…"
    return short.replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()
