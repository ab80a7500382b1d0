"""What a strategy may look at when it plans a time step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kpig_fast.data.schema import PoolInstruction
from kpig_fast.method.replay import Draw, ReplayPlan, make_plan


@dataclass(frozen=True)
class PlanRequest:
    """One time step, and what can be measured with the frozen model of the step before.

    Args:
        step, seed, alpha, n_replay_tasks, n_per_task, model_hash: as in ``ReplayPlan``.
        earlier: names of the earlier tasks.
        new: names of the step's own tasks.
        pool: the wordings of a task.
        draw: that many drawn instances of a task; a larger draw begins with the smaller one.
        gains: the information gain of each drawn instance.
        entropies: the predictive entropy of each drawn instance, a mean over its response tokens in nats.
        embed: a vector [d] for each text.
    """

    step: int
    seed: int
    alpha: float
    n_replay_tasks: int
    n_per_task: int
    model_hash: str
    earlier: tuple[str, ...]
    new: tuple[str, ...]
    pool: Callable[[str], Sequence[PoolInstruction]]
    draw: Callable[[str, int | None], list[Draw]]
    gains: Callable[[list[Draw]], list[float]]
    entropies: Callable[[list[Draw]], list[float]]
    embed: Callable[[Sequence[str]], NDArray[np.floating]]

    @property
    def budget(self) -> int:
        """How many instances a step replays at most, with every strategy."""
        return self.n_replay_tasks * self.n_per_task

    def draw_all(self) -> list[Draw]:
        """N instances of every earlier task."""
        return [one for task in self.earlier for one in self.draw(task, self.n_per_task)]

    def lowest_gain(self, drawn: list[Draw], gains: list[float]) -> ReplayPlan:
        """The plan that replays the drawn tasks with the lowest mean gain."""
        return make_plan(drawn, gains, **self._facts())

    def exactly(self, drawn: Sequence[Draw], measured: Mapping[str, float] | None = None) -> ReplayPlan:
        """The plan that replays ``drawn``; ``measured``: what led to it, a figure for each earlier task."""
        plan = make_plan([], [], **self._facts())
        chosen = tuple(dict.fromkeys(one.task for one in drawn))
        return replace(plan, drawn=tuple(drawn), chosen=chosen, measured=dict(measured or {}))

    def _facts(self) -> dict[str, Any]:
        names = ("step", "seed", "alpha", "n_replay_tasks", "n_per_task", "model_hash")
        return {name: getattr(self, name) for name in names}
