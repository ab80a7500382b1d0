"""Dynamic replay (He et al., ACL 2025): the earlier tasks whose key parts tell the model least are trained again.

Once per time step: ``draw`` instances of every earlier task, measure their gains with the model of the step before,
and ``make_plan`` chooses the tasks. Drawing ranks rows by a hash of (seed, step, task, row id) instead of using a
generator, so a draw depends on nothing else: not on other tasks, row order, or library versions.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean


@dataclass(frozen=True)
class Draw:
    """One training row of a task, to be asked with the ``instruction``-th wording of the task's pool."""

    task: str
    row_id: str
    instruction: int


@dataclass(frozen=True)
class ReplayPlan:
    """What one time step replays, and everything that led to it; training reads nothing else.

    Attributes:
        step: time step that the plan is for.
        seed: seed of the drawing.
        alpha: decay of the gains.
        n_replay_tasks: M, how many tasks are replayed at most.
        n_per_task: N, how many instances are drawn of each earlier task at most.
        model_hash: names the frozen model that measured the gains.
        drawn: every instance drawn, of all earlier tasks.
        gains: gain of each drawn instance.
        mean_gains: mean gain of each earlier task.
        chosen: the replayed tasks, lowest mean gain first, equal ones by name.
        measured: what another rule than the gain measured of each earlier task.
    """

    step: int
    seed: int
    alpha: float
    n_replay_tasks: int
    n_per_task: int
    model_hash: str
    drawn: tuple[Draw, ...]
    gains: tuple[float, ...]
    mean_gains: dict[str, float]
    chosen: tuple[str, ...]
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def replayed(self) -> list[Draw]:
        """The drawn instances of the chosen tasks, which join the training data, in the order of ``chosen``."""
        return [one for task in self.chosen for one in self.drawn if one.task == task]

    def to_json(self) -> str:
        """The plan as JSON text; equal plans give equal bytes, and floats survive the round trip exactly."""
        return json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "ReplayPlan":
        """Read what ``to_json`` wrote. Raises ValueError where the text is no replay plan."""
        try:
            fields = json.loads(text)
            drawn = tuple(Draw(**one) for one in fields.pop("drawn"))
            return cls(drawn=drawn, gains=tuple(fields.pop("gains")), chosen=tuple(fields.pop("chosen")), **fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no replay plan ({error}); delete the file and run the step again") from error


def assign_instructions(task: str, row_ids: Sequence[str], n_instructions: int, *, seed: int, step: int) -> list[int]:
    """A random index into the task's pool of ``n_instructions`` for each row; ValueError where the pool is empty."""
    if n_instructions < 1:
        raise ValueError(f"task {task!r} has {n_instructions} instructions; its pool needs at least one")
    return [_hash("instruction", seed, step, task, row_id) % n_instructions for row_id in row_ids]


def draw(task: str, row_ids: Sequence[str], n_instructions: int, *, n: int, seed: int, step: int) -> list[Draw]:
    """Draw ``n`` of a task's training rows without replacement (all where it has fewer), each with an instruction.

    Args:
        task: name of the task.
        row_ids: ids of its training rows, all different.
        n_instructions: size of its pool.
        n: rows to draw, >= 0. A larger draw begins with the smaller one.
        seed: recorded seed.
        step: time step.

    Raises:
        ValueError: ``n`` is negative or the pool is empty.
    """
    _check_count("number of instances drawn per task", n)
    rows = sorted(row_ids, key=lambda row_id: (_hash("row", seed, step, task, row_id), row_id))[:n]
    instructions = assign_instructions(task, rows, n_instructions, seed=seed, step=step)
    return [Draw(task, row_id, instruction) for row_id, instruction in zip(rows, instructions)]


def choose(mean_gains: Mapping[str, float], m: int) -> list[str]:
    """The ``m`` tasks with the lowest mean gain (all where there are fewer), lowest first, equal ones by name.

    Raises:
        ValueError: ``m`` is negative, or a task's gain is no finite number.
    """
    _check_count("number of replayed tasks", m)
    for task, gain in mean_gains.items():
        if not math.isfinite(gain):
            raise ValueError(f"task {task!r} has mean gain {gain}; check the model that scored it for NaN weights")
    return sorted(mean_gains, key=lambda task: (mean_gains[task], task))[:m]


def make_plan(
    drawn: Sequence[Draw],
    gains: Sequence[float],
    *,
    step: int,
    seed: int,
    alpha: float,
    n_replay_tasks: int,
    n_per_task: int,
    model_hash: str,
) -> ReplayPlan:
    """Choose the tasks to replay from the gains of the drawn instances; without draws the plan is empty.

    Args:
        drawn: draws of all earlier tasks.
        gains: gain of each draw, in the same order.
        step, seed, alpha, n_replay_tasks, n_per_task, model_hash: as in ``ReplayPlan``.

    Raises:
        ValueError: the two sequences differ in length, a gain is no finite number, or ``n_replay_tasks`` is negative.
    """
    if len(drawn) != len(gains):
        raise ValueError(f"{len(drawn)} drawn instances but {len(gains)} gains; score every drawn instance once")
    by_task: dict[str, list[float]] = {}
    for one, gain in zip(drawn, gains):
        by_task.setdefault(one.task, []).append(float(gain))
    mean_gains = {task: fmean(values) for task, values in by_task.items()}
    return ReplayPlan(
        step=step,
        seed=seed,
        alpha=float(alpha),
        n_replay_tasks=n_replay_tasks,
        n_per_task=n_per_task,
        model_hash=model_hash,
        drawn=tuple(drawn),
        gains=tuple(float(gain) for gain in gains),
        mean_gains=mean_gains,
        chosen=tuple(choose(mean_gains, n_replay_tasks)),
    )


def _check_count(what: str, count: int) -> None:
    if count < 0:
        raise ValueError(f"{what} is {count}; give a number >= 0")


def _hash(*parts: str | int) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8])
