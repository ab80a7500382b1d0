"""The figures of runs in long form, with intervals: a row a figure of a task, a category or all tasks of a role."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from kpig_fast.data.schema import Role
from kpig_fast.evaluation.metrics import mean_tally
from kpig_fast.evaluation.rescoring import RescoredRun
from kpig_fast.evaluation.runs import StepMetrics, summarise
from kpig_fast.evaluation.statistics import Draws, draw, over_answers, over_seeds
from kpig_fast.evaluation.tables import TaskResult

Level = Literal["role", "category", "task"]
SHARES = ("asked", "old", "neither")
FORGETTING, BACKWARD_TRANSFER = "forgetting", "backward transfer"


@dataclass(frozen=True)
class ScoreRow:
    """One figure of one run, or of all runs of an arm.

    Args:
        arm: name of the arm.
        run, seed: the run; empty and None where the row is the mean over the seeds of the arm.
        step: number of the step; -1 for the model before the first.
        level, role, name: what it is a figure of: a task, a category of tasks of that role, or all tasks of the role.
        figure: P, V, WFR, OOS, WR; gain; asked, old, neither (half-listening); forgetting, backward transfer.
        value: the figure; percent or points, the gain as it is.
        low, high: 95 % interval: over answers for a run after its last step, over seeds for an arm; None without one.
        n: answers of a run, seeds of an arm; None where it does not apply.
    """

    arm: str
    run: str
    seed: int | None
    step: int
    level: Level
    role: Role
    name: str
    figure: str
    value: float
    low: float | None
    high: float | None
    n: int | None


@dataclass(frozen=True)
class _Cell:
    """A figure of one task; ``draws``: for other answers, as ``statistics.draw`` gives them."""

    value: float
    n: int | None = None
    draws: Draws | None = None


_Cells = dict[str, dict[str, _Cell]]
"""Figure, then task."""


def run_rows(arm: str, run: RescoredRun) -> list[ScoreRow]:
    """Every figure of every step of a run that belongs to ``arm``; with intervals after the last step."""
    rows, summary = [], summarise(run.history)
    blank = ScoreRow(arm, run.run.name, run.seed, run.last.step, "role", "seen", "seen", "", 0.0, None, None, None)
    for step in run.history:
        cells = _scores(step, run if step is run.last else None) | _gains(step) | _shares(step)
        if step is run.last:
            cells |= {FORGETTING: {task: _Cell(lost) for task, lost in summary.forgetting.items()}}
        rows += _step_rows(replace(blank, step=step.step), step.evaluation.tasks, cells)
    if summary.backward_transfer is not None:
        rows.append(replace(blank, figure=BACKWARD_TRANSFER, value=summary.backward_transfer))
    return rows


def arm_rows(rows: Sequence[ScoreRow]) -> list[ScoreRow]:
    """The rows of an arm's runs as means over its seeds, with Student's interval over those that have the figure."""
    seeds: dict[ScoreRow, list[float]] = {}
    for row in rows:
        blank = replace(row, run="", seed=None, value=0.0, low=None, high=None, n=None)
        seeds.setdefault(blank, []).append(row.value)
    found = [(blank, over_seeds(values), len(values)) for blank, values in seeds.items()]
    return [replace(blank, value=one.value, low=one.low, high=one.high, n=n) for blank, one, n in found]


def _step_rows(blank: ScoreRow, tasks: Sequence[TaskResult], cells: _Cells) -> Iterator[ScoreRow]:
    for (level, role, name), members in _groups(tasks).items():
        for figure, by_task in cells.items():
            chosen = [by_task[task] for task in members if task in by_task]
            if chosen:
                one = over_answers([cell.value for cell in chosen], [cell.draws for cell in chosen])
                n = sum(cell.n or 0 for cell in chosen) or None
                place = replace(blank, level=level, role=role, name=name, figure=figure)
                yield replace(place, value=one.value, low=one.low, high=one.high, n=n)


def _groups(tasks: Sequence[TaskResult]) -> dict[tuple[Level, Role, str], list[str]]:
    """Names of the tasks of every role, of every category within a role, and of every task alone."""
    groups: dict[tuple[Level, Role, str], list[str]] = {}
    for level in get_args(Level):
        for task in tasks:
            name = {"role": task.role, "category": task.category, "task": task.task}[level]
            groups.setdefault((level, task.role, name), []).append(task.task)
    return groups


def _scores(step: StepMetrics, run: RescoredRun | None) -> _Cells:
    """P, V and the rates; drawn again where the ``run`` of the step is given."""
    cells: _Cells = {}
    for task in step.evaluation.tasks:
        figures: Mapping[str, float | None] = {"P": task.p, "V": task.v, **task.rates}
        for figure, value in figures.items():
            if value is not None:
                draws = draw(task.task, run.tallies[task.task][figure]) if run else None
                cells.setdefault(figure, {})[task.task] = _Cell(value, task.n, draws)
    return cells


def _gains(step: StepMetrics) -> _Cells:
    return {"gain": {task: _Cell(gain) for task, gain in step.gains.items()}}


def _shares(step: StepMetrics) -> _Cells:
    """The half-listening shares; which answers they are of does not matter to drawing them again."""
    cells: _Cells = {share: {} for share in SHARES}
    for one in step.obedience:
        for share in SHARES:
            value = getattr(one, share)
            count = round(value * one.n / 100)
            draws = draw(one.task, mean_tally([100.0] * count + [0.0] * (one.n - count)))
            cells[share][one.task] = _Cell(value, one.n, draws)
    return cells
