"""A run's figures on disk: what every step measured, read back and summed up over the steps.

A run folder holds ``untrained/`` and ``step-000/``, ``step-001/`` …; each has ``metrics.json`` and, once it is whole,
the empty file ``COMPLETE``.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from kpig_fast.data.files import write_lines
from kpig_fast.data.schema import Role
from kpig_fast.evaluation.history import backward_transfer, forgetting
from kpig_fast.evaluation.tables import EvaluationResult

METRICS_FILE = "metrics.json"
COMPLETE_FILE = "COMPLETE"
UNTRAINED = -1


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
    """

    step: int
    strategy: str
    tasks: tuple[str, ...]
    replayed: tuple[str, ...]
    evaluation: EvaluationResult
    gains: Mapping[str, float]
    training: Mapping[str, float] = field(default_factory=dict)

    def gain(self, role: Role | None = None) -> float | None:
        """Mean over the evaluated tasks (of that role) of their mean gain; None without one."""
        roles = {task.task: task.role for task in self.evaluation.tasks}
        chosen = [gain for task, gain in self.gains.items() if role in (None, roles.get(task))]
        return fmean(chosen) if chosen else None

    def to_json(self) -> str:
        """The metrics as JSON text, which ``from_json`` reads."""
        fields = {**asdict(self), "evaluation": json.loads(self.evaluation.to_json())}
        return json.dumps(fields, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "StepMetrics":
        """Read what ``to_json`` wrote. Raises ValueError where the text is something else."""
        try:
            fields = json.loads(text)
            evaluation = EvaluationResult.from_json(json.dumps(fields.pop("evaluation")))
            tasks, replayed = tuple(fields.pop("tasks")), tuple(fields.pop("replayed"))
            return cls(tasks=tasks, replayed=replayed, evaluation=evaluation, **fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no metrics of a step ({error}); run the step again") from error


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
    """Say that everything in ``folder`` is whole; must be the last file written."""
    write_lines(folder / COMPLETE_FILE, [])


def read_run(run: Path) -> list[StepMetrics]:
    """Metrics of the complete steps of a run, in order, that of the untrained model first where there is one.

    Raises:
        FileNotFoundError: no step of the run is complete.
    """
    folders = [step_folder(run, UNTRAINED), *sorted(run.glob("step-*"))]
    history = [
        StepMetrics.from_json((folder / METRICS_FILE).read_text("utf-8")) for folder in folders if is_complete(folder)
    ]
    if not history:
        raise FileNotFoundError(f"no complete step in {run}; give the output_dir of a run that has finished a step")
    return history


def summarise(history: Sequence[StepMetrics]) -> dict[str, Any]:
    """The run in figures: P, V and gain by role after the last step, forgetting per task, backward transfer."""
    trained = [step for step in history if step.step != UNTRAINED]
    results = [step.evaluation for step in trained]
    learnt_at = {task: i for i, step in enumerate(trained) for task in step.tasks}
    last = history[-1]
    roles: tuple[Role, ...] = ("seen", "held_out")
    return {
        "strategy": last.strategy,
        "steps": len(trained),
        "seconds": sum(step.training.get("seconds", 0.0) for step in trained),
        "scores": {
            role: {"p": last.evaluation.p_score(role), "v": last.evaluation.v_score(role), "gain": last.gain(role)}
            for role in roles
        },
        "forgetting": forgetting(results, learnt_at) if results else {},
        "backward_transfer": backward_transfer(results, learnt_at) if results else None,
    }


def steps_csv(history: Sequence[StepMetrics]) -> str:
    """One line per step and task: step, strategy, task, role, P, V, gain; what does not apply is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", "strategy", "task", "role", "P", "V", "gain"])
    for step in history:
        for task in step.evaluation.tasks:
            gain = step.gains.get(task.task)
            writer.writerow([step.step, step.strategy, task.task, task.role, task.p, task.v, gain])
    return text.getvalue()
