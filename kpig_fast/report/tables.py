"""Runs side by side: one row a run, as text, Markdown or CSV."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from kpig_fast.evaluation.runs import Scores, StepMetrics, split_untrained, summarise
from kpig_fast.evaluation.tables import markdown_table

TableForm = Literal["text", "markdown", "csv"]

# Every column of figures with its format.
_COLUMNS = {
    "tasks": "d",
    "P seen": "z.1f",
    "V seen": "z.1f",
    "P held-out": "z.1f",
    "V held-out": "z.1f",
    "gain seen": "z.3f",
    "gain held-out": "z.3f",
    "forgetting": "z.1f",
    "backward transfer": "+z.1f",
    "seconds": "z.1f",
}

Figures = Sequence[float | None]


def comparison_table(runs: Mapping[str, Sequence[StepMetrics]], form: TableForm = "text") -> str:
    """A table with a row for every run; no new line after the last.

    Columns: tasks learnt; P, V (0–100) and mean gain after the last step, over seen and over held-out tasks; mean
    forgetting and backward transfer in points; seconds of planning and training. The untrained model comes first, over
    the tasks that the last step evaluated; once, or once a run where its figures differ.

    Args:
        runs: metrics of every run, by name, as ``read_run`` gives them.
        form: ``text`` is aligned, ``csv`` keeps all digits and leaves empty what does not apply.
    """
    if form == "csv":
        return _csv([["run", *_COLUMNS], *([name, *figures] for name, figures in _rows(runs))])
    cells = comparison_cells(runs)
    if form == "markdown":
        return markdown_table(cells)
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells)


def comparison_cells(runs: Mapping[str, Sequence[StepMetrics]]) -> list[list[str]]:
    """The texts of ``comparison_table``: the header, then the rows."""
    return [["run", *_COLUMNS], *([name, *_texts(figures)] for name, figures in _rows(runs))]


def format_figure(value: float | None, spec: str) -> str:
    """``value`` in a format, a dash where there is none."""
    return "–" if value is None else format(value, spec)


def _rows(runs: Mapping[str, Sequence[StepMetrics]]) -> list[tuple[str, Figures]]:
    trained = [(name, _run_figures(history)) for name, history in runs.items() if split_untrained(history)[1]]
    return _untrained_rows(runs) + trained


def _untrained_rows(runs: Mapping[str, Sequence[StepMetrics]]) -> list[tuple[str, Figures]]:
    rows = []
    for name, history in runs.items():
        untrained, _ = split_untrained(history)
        if untrained is not None:
            same_tasks = untrained.only(history[-1].evaluated)
            scores = _score_figures(same_tasks.scores("seen"), same_tasks.scores("held_out"))
            rows.append((f"untrained ({name})", [0, *scores, None, None, None]))
    if len({tuple(_texts(figures)) for _, figures in rows}) == 1:
        return [("untrained", rows[0][1])]
    return rows


def _run_figures(history: Sequence[StepMetrics]) -> Figures:
    run = summarise(history)
    scores = _score_figures(run.scores["seen"], run.scores["held_out"])
    return [run.tasks, *scores, run.mean_forgetting, run.backward_transfer, run.seconds]


def _score_figures(seen: Scores, held_out: Scores) -> Figures:
    return [seen.p, seen.v, held_out.p, held_out.v, seen.gain, held_out.gain]


def _texts(figures: Figures) -> list[str]:
    return [format_figure(value, spec) for value, spec in zip(figures, _COLUMNS.values(), strict=True)]


def _csv(rows: Iterable[Iterable[str | float | None]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().rstrip("\n")
