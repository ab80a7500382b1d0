"""Results of an evaluation: a row per task, P-score and V-score over tasks (He et al., ACL 2025); JSON, CSV, text."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import get_args

from pydantic import TypeAdapter

from kpig_fast.data.schema import Metric, Role
from kpig_fast.evaluation.violations import Violation

_RATES: tuple[Violation, ...] = get_args(Violation)


@dataclass(frozen=True)
class TaskResult:
    """One task's figures.

    Args:
        task: its name.
        role: seen or held out.
        category: its category.
        metric: its performance metric.
        p: the metric, 0–100; None where it was not scored because the metric needs a judge.
        rates: for every constraint that the task defines (WFR, OOS, WR) the share of answers that violate it, in
            percent.
        n: number of answers.
    """

    task: str
    role: Role
    category: str
    metric: Metric
    p: float | None
    rates: dict[Violation, float]
    n: int

    @property
    def v(self) -> float | None:
        """Mean of the rates that apply, in percent; None for a task without constraints."""
        return _mean(self.rates.values())


@dataclass(frozen=True)
class EvaluationResult:
    """The figures of all evaluated tasks, in their order."""

    tasks: list[TaskResult]

    def p_score(self, role: Role | None = None) -> float | None:
        """Mean of the tasks' metrics, 0–100, higher is better; None without a scored task (of that role)."""
        return _mean(task.p for task in self._of(role))

    def v_score(self, role: Role | None = None) -> float | None:
        """Mean of the tasks' violation rates, in percent, lower is better; None without a constrained task."""
        return _mean(task.v for task in self._of(role))

    @property
    def not_scored(self) -> list[str]:
        """Names of the tasks whose metric needs a judge; they do not enter the P-score."""
        return [task.task for task in self.tasks if task.p is None]

    def to_json(self) -> str:
        """The result as JSON text: the rows, and the scores by role for readers (``from_json`` derives them anew)."""
        rows = TypeAdapter(list[TaskResult]).dump_python(self.tasks)
        return json.dumps({"scores": self._scores(), "not_scored": self.not_scored, "tasks": rows}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "EvaluationResult":
        """Read what ``to_json`` wrote. Raises ValueError naming the field that is missing or wrong."""
        return TypeAdapter(cls).validate_json(text)

    def to_csv(self) -> str:
        """One line per task: task, role, category, metric, n, P, V, WFR, OOS, WR; what does not apply is empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["task", "role", "category", "metric", "n", "P", "V", *_RATES])
        for task in self.tasks:
            rates = [task.rates.get(name) for name in _RATES]
            writer.writerow([task.task, task.role, task.category, task.metric, task.n, task.p, task.v, *rates])
        return text.getvalue()

    def format_table(self) -> str:
        """An aligned text table: the tasks, then the scores by role, then the tasks that were not scored."""
        rows = [["task", "role", "metric", "n", "P", "V", *_RATES]]
        for task in self.tasks:
            figures = [task.p, task.v, *(task.rates.get(name) for name in _RATES)]
            rows.append([task.task, task.role, task.metric, str(task.n), *map(_number, figures)])
        for name, score in self._scores().items():
            n = str(sum(task.n for task in self.tasks if name in ("all", task.role)))
            rows.append(["mean", name, "", n, _number(score["p"]), _number(score["v"]), "", "", ""])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [_aligned(row, widths) for row in rows]
        if self.not_scored:
            lines.append(f"not scored (the metric needs a judge): {', '.join(self.not_scored)}")
        return "\n".join(lines)

    def _of(self, role: Role | None) -> list[TaskResult]:
        return [task for task in self.tasks if role in (None, task.role)]

    def _scores(self) -> dict[str, dict[str, float | None]]:
        present = [role for role in get_args(Role) if self._of(role)]
        return {role or "all": {"p": self.p_score(role), "v": self.v_score(role)} for role in (*present, None)}


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is aligned as text too; the first row is its header, and all columns but the first are
    figures. No new line after the last row."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    first, *figures = [max(map(len, column)) for column in zip(*escaped, strict=True)]
    lines = [[row[0].ljust(first), *map(str.rjust, row[1:], figures)] for row in escaped]
    rule = ["-" * max(first, 3), *("-" * max(width - 1, 2) + ":" for width in figures)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def _mean(values: Iterable[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return fmean(numbers) if numbers else None


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _aligned(cells: list[str], widths: list[int]) -> str:
    texts = [cell.ljust(width) for cell, width in zip(cells[:3], widths[:3], strict=True)]
    figures = [cell.rjust(width) for cell, width in zip(cells[3:], widths[3:], strict=True)]
    return "  ".join([*texts, *figures]).rstrip()
