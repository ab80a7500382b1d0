"""What a stream of steps did to the tasks learnt earlier, from the evaluations after every step.

``history`` holds one result per step, in order; ``learnt_at`` maps a task to the step (index into ``history``) that
trained it. Only tasks learnt before the last step have figures, and only where they were scored.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

from kpig_fast.evaluation.tables import EvaluationResult


def forgetting(history: Sequence[EvaluationResult], learnt_at: Mapping[str, int]) -> dict[str, float]:
    """Best earlier P minus final P of every task, in points (Chaudhry et al. 2018); negative where it gained.

    Raises ValueError for a step outside ``history``.
    """
    scores = _scores(history)
    lost = {}
    for task in _learnt_before_last(history, learnt_at):
        earlier = [step[task] for step in scores[:-1] if task in step]
        if earlier and task in scores[-1]:
            lost[task] = max(earlier) - scores[-1][task]
    return lost


def backward_transfer(history: Sequence[EvaluationResult], learnt_at: Mapping[str, int]) -> float | None:
    """Mean over tasks of final P minus the P right after learning, in points (Lopez-Paz and Ranzato 2017).

    None where no task has both figures. Raises ValueError for a step outside ``history``.
    """
    scores = _scores(history)
    changes = [
        scores[-1][task] - scores[step][task]
        for task, step in _learnt_before_last(history, learnt_at).items()
        if task in scores[-1] and task in scores[step]
    ]
    return fmean(changes) if changes else None


def _scores(history: Sequence[EvaluationResult]) -> list[dict[str, float]]:
    return [{task.task: task.p for task in result.tasks if task.p is not None} for result in history]


def _learnt_before_last(history: Sequence[EvaluationResult], learnt_at: Mapping[str, int]) -> dict[str, int]:
    for task, step in learnt_at.items():
        if not 0 <= step < len(history):
            raise ValueError(
                f"task {task!r} is learnt at step {step}, but the history has {len(history)} steps, from 0"
            )
    return {task: step for task, step in learnt_at.items() if step < len(history) - 1}
