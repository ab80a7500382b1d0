"""A run's figures on disk: what every step measured, read back and summed up over the steps.

A run folder holds ``config.yaml``, ``environment.json``, ``untrained/`` and ``step-000/``, ``step-001/`` …; each step
has ``metrics.json`` and, once it is whole, the empty file ``COMPLETE``; a trained one has its ``plan.json``.
"""

import csv
import io
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import get_args

from pydantic import TypeAdapter

from kpig_fast.data.files import write_lines
from kpig_fast.data.schema import Role
from kpig_fast.evaluation.half_listening import Obedience
from kpig_fast.evaluation.history import backward_transfer, forgetting
from kpig_fast.evaluation.tables import EvaluationResult
from kpig_fast.evaluation.violations import Violation

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
PLAN_FILE = "plan.json"
METRICS_FILE = "metrics.json"
PREDICTIONS_FILE = "predictions.jsonl"
HALF_LISTENING_FILE = "half_listening.jsonl"
COMPLETE_FILE = "COMPLETE"
UNTRAINED = -1


@dataclass(frozen=True)
class Scores:
    """P-score and V-score (0–100) and mean gain over tasks; None where no task has the figure."""

    p: float | None
    v: float | None
    gain: float | None


@dataclass(frozen=True)
class StepMetrics:
    """What one step of a run did and measured.

    Args:
        step: number of the step; -1 for the model before the first one.
        strategy: how the step was trained.
        tasks: the tasks learnt in it.
        replayed: the earlier tasks that were replayed.
        evaluation: figures after the step.
        gains: mean information gain of every evaluated task after the step.
        training: mean loss, seconds, counts of instances and tokens.
        obedience: of every task learnt so far that has a changed wording, what its answers to that obey.
    """

    step: int
    strategy: str
    tasks: tuple[str, ...]
    replayed: tuple[str, ...]
    evaluation: EvaluationResult
    gains: Mapping[str, float]
    training: Mapping[str, float] = field(default_factory=dict)
    obedience: tuple[Obedience, ...] = ()

    @property
    def evaluated(self) -> list[str]:
        """Names of the evaluated tasks."""
        return [task.task for task in self.evaluation.tasks]

    def gain(self, role: Role | None = None) -> float | None:
        """Mean over the evaluated tasks (of that role) of their mean gain; None without one."""
        roles = {task.task: task.role for task in self.evaluation.tasks}
        chosen = [gain for task, gain in self.gains.items() if role in (None, roles.get(task))]
        return fmean(chosen) if chosen else None

    def scores(self, role: Role | None = None) -> Scores:
        """The step in three figures, over the tasks of that role where one is given."""
        return Scores(self.evaluation.p_score(role), self.evaluation.v_score(role), self.gain(role))

    def only(self, tasks: Collection[str]) -> "StepMetrics":
        """The same step with the figures of the named tasks alone."""
        evaluation = EvaluationResult([task for task in self.evaluation.tasks if task.task in tasks])
        gains = {task: gain for task, gain in self.gains.items() if task in tasks}
        obedience = tuple(one for one in self.obedience if one.task in tasks)
        return replace(self, evaluation=evaluation, gains=gains, obedience=obedience)

    def to_json(self) -> str:
        """The metrics as JSON text, which ``from_json`` reads."""
        fields = {**asdict(self), "evaluation": json.loads(self.evaluation.to_json())}
        return json.dumps(fields, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "StepMetrics":
        """Read what ``to_json`` wrote. Raises ValueError naming the field that is missing or wrong."""
        return TypeAdapter(cls).validate_json(text)


@dataclass(frozen=True)
class RunSummary:
    """A run in figures.

    Args:
        strategy: how it was trained.
        steps: complete steps, without the evaluation of the untrained model.
        tasks: tasks learnt in them.
        seconds: planning and training, summed over the steps; without evaluation.
        scores: by role, after the last step.
        forgetting: best earlier P minus final P of every task learnt before the last step, in points.
        mean_forgetting: its mean over the tasks; None without one.
        backward_transfer: mean of final P minus P right after learning, in points; None without such a task.
    """

    strategy: str
    steps: int
    tasks: int
    seconds: float
    scores: dict[Role, Scores]
    forgetting: dict[str, float]
    mean_forgetting: float | None
    backward_transfer: float | None

    def to_json(self) -> str:
        """The summary as JSON text."""
        return json.dumps(asdict(self), indent=2)


def step_folder(run: Path, step: int) -> Path:
    """The folder of one step; of the model before the first one for -1."""
    return run / ("untrained" if step == UNTRAINED else f"step-{step:03d}")


def is_complete(folder: Path) -> bool:
    """Whether a step's folder was finished."""
    return (folder / COMPLETE_FILE).exists()


def write_metrics(run: Path, metrics: StepMetrics) -> None:
    """Write a step's metrics into its folder."""
    write_lines(step_folder(run, metrics.step) / METRICS_FILE, [metrics.to_json()])


def mark_complete(folder: Path) -> None:
    """Say that everything in ``folder`` is whole and on the disk; must be the last file written."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    write_lines(folder / COMPLETE_FILE, [])


def read_run(run: Path) -> list[StepMetrics]:
    """Metrics of the complete steps of a run, in order, that of the untrained model first where there is one.

    Raises:
        FileNotFoundError: no step of the run is complete.
        ValueError: the metrics of a complete step cannot be read; the message names the file.
    """
    folders = [step_folder(run, UNTRAINED), *run.glob("step-*")]
    history = [_read_metrics(folder / METRICS_FILE) for folder in folders if is_complete(folder)]
    if not history:
        raise FileNotFoundError(f"no complete step in {run}; give the output_dir of a run that has finished a step")
    # By number: names of folders sort step-1000 before step-999.
    return sorted(history, key=lambda metrics: metrics.step)


def split_untrained(history: Sequence[StepMetrics]) -> tuple[StepMetrics | None, list[StepMetrics]]:
    """The figures of the untrained model, None where it was not evaluated, and the trained steps."""
    trained = [step for step in history if step.step != UNTRAINED]
    return next((step for step in history if step.step == UNTRAINED), None), trained


def summarise(history: Sequence[StepMetrics]) -> RunSummary:
    """The run in figures; ``history`` is what ``read_run`` gives."""
    _, trained = split_untrained(history)
    results = [step.evaluation for step in trained]
    learnt_at = {task: i for i, step in enumerate(trained) for task in step.tasks}
    lost = forgetting(results, learnt_at) if results else {}
    return RunSummary(
        strategy=history[-1].strategy,
        steps=len(trained),
        tasks=len(learnt_at),
        seconds=sum(step.training.get("seconds", 0.0) for step in trained),
        scores={role: history[-1].scores(role) for role in get_args(Role)},
        forgetting=lost,
        mean_forgetting=fmean(lost.values()) if lost else None,
        backward_transfer=backward_transfer(results, learnt_at) if results else None,
    )


def steps_csv(history: Sequence[StepMetrics]) -> str:
    """One line per step and task: what the task measured after the step; what does not apply is empty.

    Columns: step, strategy, task, role, metric, n, P, V, WFR, OOS, WR, gain.
    """
    rates = get_args(Violation)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", "strategy", "task", "role", "metric", "n", "P", "V", *rates, "gain"])
    for step in history:
        for task in step.evaluation.tasks:
            figures = [task.p, task.v, *(task.rates.get(rate) for rate in rates), step.gains.get(task.task)]
            writer.writerow([step.step, step.strategy, task.task, task.role, task.metric, task.n, *figures])
    return text.getvalue()


def _read_metrics(path: Path) -> StepMetrics:
    try:
        return StepMetrics.from_json(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} holds no metrics of a step; run the step again: {error}") from error
