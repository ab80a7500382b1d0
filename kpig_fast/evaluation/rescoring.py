"""Finished runs scored again from their stored answers, without their models, by the rules that hold now."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kpig_fast.data.schema import TaskCollection
from kpig_fast.evaluation.evaluate import Judge, Prediction, read_predictions, score_predictions, tallies
from kpig_fast.evaluation.half_listening import Obedience, score_obedience
from kpig_fast.evaluation.metrics import Tally
from kpig_fast.evaluation.runs import HALF_LISTENING_FILE, PREDICTIONS_FILE, StepMetrics, read_run, step_folder
from kpig_fast.evaluation.tables import TaskResult


@dataclass(frozen=True)
class StoredRun:
    """A run on disk, with what is needed to score and to name it.

    Args:
        name: how tables call it.
        folder: its ``output_dir``.
        settings: its resolved config as plain data, ``seed`` and ``output_dir`` among them.
        collection: the tasks that it was asked.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    collection: TaskCollection


@dataclass(frozen=True)
class RescoredRun:
    """A run with the figures that its answers have now.

    Args:
        run: the run.
        history: the complete steps, in order.
        ids: of every task, the rows that were answered after the last step, in order of their ids.
        tallies: of every task, its figures after the last step (``evaluate.tallies``), answers in the order of ``ids``.
        changes: figures of tasks that ``metrics.json`` has otherwise, one sentence each.
    """

    run: StoredRun
    history: list[StepMetrics]
    ids: dict[str, tuple[str, ...]]
    tallies: dict[str, dict[str, Tally]]
    changes: list[str]

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.run.settings["seed"]

    @property
    def last(self) -> StepMetrics:
        """Its last complete step."""
        return self.history[-1]


def rescore(run: StoredRun, judge: Judge | None = None) -> RescoredRun:
    """Score the answers of every complete step again; nothing on disk is changed.

    Raises:
        FileNotFoundError: no step is complete, or one has no stored answers.
        ValueError: an answer of a task that the collection does not have, or a file that cannot be read.
    """
    history: list[StepMetrics] = []
    changes: list[str] = []
    predictions: list[Prediction] = []
    for step in read_run(run.folder):
        folder = step_folder(run.folder, step.step)
        predictions = _answers(folder)
        evaluation = score_predictions(predictions, run.collection, judge)
        scored = replace(step, evaluation=evaluation, obedience=_obedience(folder, step, run.collection))
        changes += [f"{run.name}, {folder.name}, {change}" for change in _changes(step, scored)]
        history.append(scored)
    by_task: dict[str, list[Prediction]] = {}
    for prediction in sorted(predictions, key=lambda one: one.id):
        by_task.setdefault(prediction.task, []).append(prediction)
    return RescoredRun(
        run,
        history,
        {name: tuple(one.id for one in found) for name, found in by_task.items()},
        {name: tallies(run.collection.tasks[name], found, judge) for name, found in by_task.items()},
        changes,
    )


def _answers(folder: Path) -> list[Prediction]:
    path = folder / PREDICTIONS_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there, so that nothing can be scored; run the step again")
    return read_predictions(path)


def _obedience(folder: Path, step: StepMetrics, collection: TaskCollection) -> tuple[Obedience, ...]:
    path = folder / HALF_LISTENING_FILE
    return tuple(score_obedience(read_predictions(path), collection)) if path.exists() else step.obedience


def _changes(before: StepMetrics, now: StepMetrics) -> list[str]:
    stored = {task.task: _figures(task) for task in before.evaluation.tasks}
    scored = {task.task: _figures(task) for task in now.evaluation.tasks}
    return [
        f"task {task}: {name} was {_text(old)}, is {_text(new)}"
        for task in stored | scored
        for name in stored.get(task, {}) | scored.get(task, {})
        if not _same(old := stored.get(task, {}).get(name), new := scored.get(task, {}).get(name))
    ]


def _figures(task: TaskResult) -> dict[str, float | None]:
    return {"P": task.p, **task.rates}


def _same(old: float | None, new: float | None) -> bool:
    if old is None or new is None:
        return old is new
    return math.isclose(old, new, rel_tol=1e-9, abs_tol=1e-9)


def _text(value: float | None) -> str:
    return "not scored" if value is None else f"{value:.2f}"
