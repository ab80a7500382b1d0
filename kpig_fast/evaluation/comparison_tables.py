"""A comparison for readers: Markdown that is aligned as text too."""

from collections.abc import Sequence
from typing import get_args

from kpig_fast.evaluation.comparison import Comparison, DifferenceRow
from kpig_fast.evaluation.score_rows import BACKWARD_TRANSFER, FORGETTING, SHARES, ScoreRow
from kpig_fast.evaluation.statistics import Difference
from kpig_fast.evaluation.tables import markdown_table
from kpig_fast.evaluation.violations import Violation

RATES: tuple[str, ...] = get_args(Violation)
_ROLE_NAMES: dict[str, str] = {"seen": "seen", "held_out": "held-out"}
_N_CHANGES = 5
_NOTE = """\
Means over tasks after the last step, P higher and V lower is better, [95 % interval]. An arm of one run: intervals and
tests over its answers, for these tasks and this training; an arm of several seeds: over its seeds. p: two-sided, paired
(permutation of answers, or t over the seeds that both arms have). Holm: p corrected for the number of arms, in each
figure of each role. A width of 0 says only that all answers fared alike."""


def summary_tables(comparison: Comparison) -> str:
    """The arms side by side and against the baseline, over the tasks of each role; no new line at the end."""
    table = _Table(comparison)
    sections = [
        _NOTE,
        _section("Scores", table.by_role(("P", "V"))),
        _section("Violations by kind, in percent", table.by_role(RATES)),
        _section(f"Differences from {comparison.baseline}", _difference_cells(comparison.differences)),
        _section("Over the steps", table.by_role((FORGETTING, BACKWARD_TRANSFER, "gain"))),
        _section("Half-listening: share of answers that obey the new wording, the old one, neither", table.shares()),
        _changes(comparison.changes),
    ]
    return "\n\n".join(filter(None, sections))


def all_tables(comparison: Comparison) -> str:
    """``summary_tables``, and a table of every score by category and task."""
    table = _Table(comparison)
    figures = ("P", "V", *RATES, *SHARES)
    details = [_section(f"{figure} by category and task", table.by_name(figure)) for figure in figures]
    return "\n\n".join(["# Comparison", summary_tables(comparison), *filter(None, details)])


class _Table:
    """The final figures of a comparison, by where they stand."""

    def __init__(self, comparison: Comparison) -> None:
        self.arms = {name: f"{name} ({len(seeds)})" for name, seeds in comparison.arms.items()}
        self.rows = {(row.arm, row.level, row.role, row.name, row.figure): row for row in comparison.final()}

    def by_role(self, figures: Sequence[str]) -> list[list[str]]:
        """A row an arm, a column a figure of a role."""
        present = {(row.role, row.figure) for row in self.rows.values() if row.level == "role"}
        columns = [(role, figure) for role in _ROLE_NAMES for figure in figures if (role, figure) in present]
        header = [f"{figure} {_ROLE_NAMES[role]}" for role, figure in columns]
        return self._arms(header, [("role", role, role, figure) for role, figure in columns])

    def shares(self) -> list[list[str]]:
        """A row an arm, a column a half-listening share."""
        present = {row.figure for row in self.rows.values()}
        shares = [share for share in SHARES if share in present]
        return self._arms(shares, [("role", "seen", "seen", share) for share in shares])

    def by_name(self, figure: str) -> list[list[str]]:
        """A row a category or task, a column an arm."""
        rows = [row for row in self.rows.values() if row.figure == figure and row.level != "role"]
        # Categories before tasks, seen before held-out.
        found = dict.fromkeys((row.level, row.role, row.name) for row in rows)
        places = sorted(found, key=lambda place: (place[0], place[1] != "seen"))
        table = [["", *self.arms.values()]]
        for level, role, name in places:
            figures = [self._text(arm, level, role, name, figure) for arm in self.arms]
            table.append([f"{_ROLE_NAMES[role]} {level} {name}", *figures])
        return table

    def _arms(self, header: Sequence[str], places: Sequence[tuple[str, str, str, str]]) -> list[list[str]]:
        if not places:
            return []
        rows = [[shown, *(self._text(arm, *place) for place in places)] for arm, shown in self.arms.items()]
        return [["arm (seeds)", *header], *rows]

    def _text(self, arm: str, level: str, role: str, name: str, figure: str) -> str:
        row = self.rows.get((arm, level, role, name, figure))
        return "–" if row is None else _with_interval(row, "z.3f" if figure == "gain" else "z.1f")


def _with_interval(found: ScoreRow | Difference, form: str) -> str:
    value = format(found.value, form)
    if found.low is None or found.high is None:
        return value
    return f"{value} [{format(found.low, form)}, {format(found.high, form)}]"


def _difference_cells(rows: Sequence[DifferenceRow]) -> list[list[str]]:
    header = ["arm", "figure", "difference", "p", "Holm", "Wilcoxon", "test", "n"]
    return [header, *map(_difference_line, rows)]


def _difference_line(row: DifferenceRow) -> list[str]:
    found = row.difference
    p_values = [_p(found.p), _p(row.holm), _p(found.wilcoxon)]
    units = "answers" if found.test == "permutation" else "seeds"
    figure = f"{row.figure} {_ROLE_NAMES[row.role]}"
    return [row.arm, figure, _with_interval(found, "+z.1f"), *p_values, found.test, f"{found.n} {units}"]


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _section(title: str, rows: list[list[str]]) -> str:
    """Nothing where there are no rows under the header."""
    return f"## {title}\n\n{markdown_table(rows)}" if len(rows) > 1 else ""


def _changes(changes: Sequence[str]) -> str:
    if not changes:
        return ""
    more = f"\n* and {len(changes) - _N_CHANGES} more" if len(changes) > _N_CHANGES else ""
    shown = "\n".join(f"* {change}" for change in changes[:_N_CHANGES])
    return (
        f"## Scored anew\n\n{len(changes)} figures differ from those in `metrics.json`; the tables have the new ones."
        f"\n\n{shown}{more}"
    )
