"""What was wrong with data that was read: counted by kind, with first examples that name place, field and fix."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, get_args

ProblemKind = Literal[
    "schema", "missing field", "empty", "duplicate", "too long", "key part not found", "leaked test row"
]

_EXAMPLES = 3


class RowError(ValueError):
    """One row is bad: its ``kind`` of problem and the text ``field: message; fix``."""

    def __init__(self, kind: ProblemKind, text: str) -> None:
        super().__init__(text)
        self.kind: ProblemKind = kind


class DataError(ValueError):
    """Strict reading found problems; ``report`` has them all."""

    def __init__(self, report: "ValidationReport") -> None:
        super().__init__(str(report))
        self.report = report


@dataclass
class Problems:
    """All problems of one kind: how many, and the first few as ``place: field: message; fix``."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class ValidationReport:
    """What a reader kept and dropped, and why. ``str(report)`` is a table.

    Args:
        kept: rows that passed.
        dropped: rows, and lines that hold none, that did not; each counts towards one kind of problem.
        problems: by kind; those of tasks and of their wordings are counted here too, though they are no rows.
        unused: fields that no reader knows, such as licences, with the number of rows that have them.
    """

    kept: int = 0
    dropped: int = 0
    problems: dict[ProblemKind, Problems] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)

    def add(self, where: str, error: RowError) -> None:
        """Count a problem found at ``where`` (``file:line``)."""
        found = self.problems.setdefault(error.kind, Problems())
        found.count += 1
        if len(found.examples) < _EXAMPLES:
            found.examples.append(f"{where}: {error}")

    def drop(self, where: str, error: RowError) -> None:
        """Count a problem for which the row at ``where`` is dropped."""
        self.add(where, error)
        self.dropped += 1

    def require_clean(self, strict: bool = True) -> None:
        """Raise DataError if ``strict`` and any problem was found."""
        if strict and self.problems:
            raise DataError(self)

    def __str__(self) -> str:
        lines = [f"{self.kept:,} rows kept, {self.dropped:,} dropped"]
        for kind in get_args(ProblemKind):
            if kind in self.problems:
                found = self.problems[kind]
                rest = found.count - len(found.examples)
                more = [f"… and {rest:,} more"] if rest else []
                first, *others = [*found.examples, *more]
                lines += [f"  {kind:<18} {found.count:>7,}  {first}", *(f"{'':<30}{line}" for line in others)]
        if self.unused:
            lines.append("  fields not used: " + ", ".join(f"{name} ({n:,})" for name, n in self.unused.items()))
        return "\n".join(lines)
