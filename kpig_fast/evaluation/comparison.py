"""Any number of runs compared: figures with intervals by task, category and role, and paired tests between arms."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import get_args

from tqdm import tqdm

from kpig_fast.data.files import write_lines
from kpig_fast.data.schema import Role
from kpig_fast.evaluation.arms import arm_names
from kpig_fast.evaluation.evaluate import Judge
from kpig_fast.evaluation.metrics import Tally
from kpig_fast.evaluation.rescoring import RescoredRun, StoredRun, rescore
from kpig_fast.evaluation.score_rows import ScoreRow, arm_rows, run_rows
from kpig_fast.evaluation.statistics import Difference, between_answers, between_seeds, holm

COMPARED = ("P", "V")
SCORES_FILE, COMPARISON_FILE = "scores.csv", "comparison.json"


@dataclass(frozen=True)
class DifferenceRow:
    """An arm minus the baseline in one figure over the tasks of a role, after the last step.

    Args:
        arm, role, figure: what is compared.
        difference: with its interval and test.
        holm: the p-value corrected for the number of arms (Holm 1979).
    """

    arm: str
    role: Role
    figure: str
    difference: Difference
    holm: float | None = None


@dataclass(frozen=True)
class Comparison:
    """What ``compare_runs`` finds.

    Args:
        arms: names of the runs of every arm, by seed; arms in the order of their first runs.
        baseline: the arm that the others are compared with.
        scores: every figure of every step.
        differences: every other arm against the baseline.
        changes: figures that the runs have stored otherwise, one sentence each.
    """

    arms: dict[str, dict[int, str]]
    baseline: str
    scores: list[ScoreRow]
    differences: list[DifferenceRow]
    changes: list[str]

    def final(self) -> list[ScoreRow]:
        """The rows of every arm after its last step: over seeds where it has several, else of its run."""
        last = {row.arm: row.step for row in sorted(self.scores, key=lambda row: row.step)}
        return [
            row
            for row in self.scores
            if row.step == last[row.arm] and (row.seed is None or len(self.arms[row.arm]) < 2)
        ]

    def to_csv(self) -> str:
        """``scores`` as CSV in long form; what does not apply is empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([field.name for field in fields(ScoreRow)])
        writer.writerows(astuple(row) for row in self.scores)
        return text.getvalue()

    def to_json(self) -> str:
        """Everything but the figures of earlier steps, which ``to_csv`` has."""
        found = {
            "baseline": self.baseline,
            "arms": self.arms,
            "scores": [asdict(row) for row in self.final()],
            "differences": [asdict(row) for row in self.differences],
            "changes": self.changes,
        }
        return json.dumps(found, indent=1, ensure_ascii=False)

    def write(self, folder: Path) -> None:
        """Write ``scores.csv`` and ``comparison.json`` into ``folder``, which is made where it is not there."""
        write_lines(folder / SCORES_FILE, [self.to_csv().rstrip("\n")])
        write_lines(folder / COMPARISON_FILE, [self.to_json()])


def compare_runs(
    runs: Sequence[StoredRun], *, baseline: str | None = None, judge: Judge | None = None, progress: bool = False
) -> Comparison:
    """Score finished runs again from their answers, and compare them.

    Runs whose settings differ in ``seed`` and ``output_dir`` alone are one arm. An arm is compared with the baseline
    over the seeds that both have: a paired t-test from two seeds on, else a paired permutation test over the answers of
    the two runs. Two arms of one run each need not have the same seed.

    Args:
        runs: the runs, as ``kpig_fast.training.stored_runs.open_runs`` gives them.
        baseline: name of an arm; default that of the first run.
        judge: scores tasks with metric ``gpt``.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: a run without complete step, or a step without answers.
        ValueError: no runs, an unknown baseline, a seed twice in an arm, runs of an arm that stand at different steps,
            or arms without a common seed or that answered different rows.
    """
    if not runs:
        raise ValueError("no runs; name at least one")
    scored = [rescore(run, judge) for run in tqdm(runs, desc="scoring", unit="run", disable=not progress)]
    arms = _arms(scored)
    baseline = baseline or next(iter(arms))
    if baseline not in arms:
        raise ValueError(f"no arm is called {baseline!r}; the arms are: {', '.join(map(repr, arms))}")
    # Before the slow part: what cannot be compared ends it.
    pairs = {name: _pairs(name, arm, baseline, arms[baseline]) for name, arm in arms.items() if name != baseline}
    differences = [row for name, paired in pairs.items() for row in _differences(name, paired)]
    rows: list[ScoreRow] = []
    for name, arm in tqdm(arms.items(), desc="intervals", unit="arm", disable=not progress):
        of_runs = [row for run in arm.values() for row in run_rows(name, run)]
        rows += of_runs + (arm_rows(of_runs) if len(arm) > 1 else [])
    return Comparison(
        {name: {seed: run.run.name for seed, run in arm.items()} for name, arm in arms.items()},
        baseline,
        rows,
        _corrected(differences),
        [change for run in scored for change in run.changes],
    )


Arm = Mapping[int, RescoredRun]
"""The runs of an arm, by seed, in that order."""


def _arms(runs: Sequence[RescoredRun]) -> dict[str, Arm]:
    arms: dict[str, dict[int, RescoredRun]] = {}
    names = arm_names([(run.last.strategy, run.run.settings) for run in runs])
    for name, run in zip(names, runs, strict=True):
        arm = arms.setdefault(name, {})
        if run.seed in arm:
            raise ValueError(
                f"{arm[run.seed].run.name} and {run.run.name} are both seed {run.seed} of arm {name!r}; leave one out"
            )
        for other in arm.values():
            if other.last.step != run.last.step:
                raise ValueError(
                    f"{other.run.name} stands at step {other.last.step}, {run.run.name} at step {run.last.step}, but "
                    f"both are seeds of arm {name!r}; finish the run that is behind or leave it out"
                )
        arm[run.seed] = run
    return {name: dict(sorted(arm.items())) for name, arm in arms.items()}


def _pairs(name: str, arm: Arm, baseline: str, other: Arm) -> list[tuple[RescoredRun, RescoredRun]]:
    """The runs of both arms that belong together, checked to have answered the same rows."""
    pairs = [(arm[seed], other[seed]) for seed in arm if seed in other]
    if len(arm) == len(other) == 1:
        pairs = list(zip(arm.values(), other.values()))
    if not pairs:
        raise ValueError(
            f"arm {name!r} has seeds {', '.join(map(str, arm))}, the baseline {baseline!r} has "
            f"{', '.join(map(str, other))}; paired tests need a common seed"
        )
    for ours, theirs in pairs:
        for task in ours.ids | theirs.ids:
            if ours.ids.get(task) != theirs.ids.get(task):
                apart = sorted(set(ours.ids.get(task, ())) ^ set(theirs.ids.get(task, ())))
                raise ValueError(
                    f"{ours.run.name} and {theirs.run.name} answered different rows of task {task!r}: {len(apart)} "
                    f"rows only one of them, first {next(iter(apart), '')!r}; compare runs with the same data, steps "
                    "and evaluation"
                )
    return pairs


def _differences(name: str, pairs: Sequence[tuple[RescoredRun, RescoredRun]]) -> Iterator[DifferenceRow]:
    for role in get_args(Role):
        for figure in COMPARED:
            sides = [[_of_role(run, role, figure) for run in pair] for pair in pairs]
            if not all(one for pair in sides for one in pair):
                continue
            if len(sides) == 1:
                yield DifferenceRow(name, role, figure, between_answers(*sides[0]))
            else:
                means = [[fmean(tally.value for tally in one.values()) for one in pair] for pair in sides]
                ours, theirs = zip(*means)
                yield DifferenceRow(name, role, figure, between_seeds(ours, theirs))


def _of_role(run: RescoredRun, role: Role, figure: str) -> dict[str, Tally]:
    names = [task.task for task in run.last.evaluation.tasks if task.role == role]
    return {name: run.tallies[name][figure] for name in names if figure in run.tallies[name]}


def _corrected(rows: Sequence[DifferenceRow]) -> list[DifferenceRow]:
    """With the p-values of each figure of a role corrected for the number of arms."""
    corrected = {}
    for role, figure in {(row.role, row.figure) for row in rows}:
        family = [row for row in rows if (row.role, row.figure) == (role, figure) and row.difference.p is not None]
        values = holm([row.difference.p for row in family if row.difference.p is not None])
        corrected |= {(row.arm, role, figure): value for row, value in zip(family, values, strict=True)}
    return [replace(row, holm=corrected.get((row.arm, row.role, row.figure))) for row in rows]
