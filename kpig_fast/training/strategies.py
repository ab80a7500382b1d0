"""What a time step trains besides its new tasks: one function a strategy, from a request to a replay plan.

kpig    the earlier tasks with the lowest information gain, and the divergence from the frozen model
replay  earlier tasks at random, as many instances as kpig
sft     nothing
joint   nothing, because all tasks are one step
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from kpig_fast.method.replay import Draw, ReplayPlan, draw, make_plan
from kpig_fast.training.run_config import StrategyName


@dataclass(frozen=True)
class PlanRequest:
    """What a strategy may look at.

    Args:
        step, seed, alpha, n_replay_tasks, n_per_task, model_hash: as in ``ReplayPlan``.
        earlier: names of the earlier tasks.
        draw: the N drawn instances of a task.
        measure: the gain of each drawn instance, with the frozen model of the step before.
    """

    step: int
    seed: int
    alpha: float
    n_replay_tasks: int
    n_per_task: int
    model_hash: str
    earlier: tuple[str, ...]
    draw: Callable[[str], list[Draw]]
    measure: Callable[[list[Draw]], list[float]]

    def make_plan(self, drawn: list[Draw], gains: list[float]) -> ReplayPlan:
        """The plan that replays the drawn tasks with the lowest mean gain; nothing without draws."""
        return make_plan(
            drawn,
            gains,
            step=self.step,
            seed=self.seed,
            alpha=self.alpha,
            n_replay_tasks=self.n_replay_tasks,
            n_per_task=self.n_per_task,
            model_hash=self.model_hash,
        )


@dataclass(frozen=True)
class Strategy:
    """``plan`` makes the replay plan; ``distils``: train the divergence too; ``joint``: all tasks are one step."""

    plan: Callable[[PlanRequest], ReplayPlan]
    distils: bool = False
    joint: bool = False


def _lowest_gain(request: PlanRequest) -> ReplayPlan:
    drawn = [one for task in request.earlier for one in request.draw(task)]
    return request.make_plan(drawn, request.measure(drawn))


def _at_random(request: PlanRequest) -> ReplayPlan:
    # The tasks of a step are drawn by the same rule as the rows of a task.
    order = draw("", list(request.earlier), 1, n=request.n_replay_tasks, seed=request.seed, step=request.step)
    chosen = tuple(one.row_id for one in order)
    drawn = tuple(one for task in chosen for one in request.draw(task))
    return replace(request.make_plan([], []), drawn=drawn, chosen=chosen)


def _nothing(request: PlanRequest) -> ReplayPlan:
    return request.make_plan([], [])


STRATEGIES: dict[StrategyName, Strategy] = {
    "kpig": Strategy(_lowest_gain, distils=True),
    "replay": Strategy(_at_random),
    "sft": Strategy(_nothing),
    "joint": Strategy(_nothing, joint=True),
}
