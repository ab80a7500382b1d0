"""What a time step trains besides its new tasks, and how: a replay plan, the divergence, a penalty.

kpig     the earlier tasks with the lowest information gain, and the divergence from the frozen model
replay   earlier tasks at random
entropy  the earlier instances with the highest predictive entropy (DynaInst)
inscl    more of the earlier tasks that are farther from the new one (InsCL)
ewc, l2  nothing, but a quadratic penalty on leaving the old weights, weighted by the Fisher information or plain
sft      nothing
joint    nothing, because all tasks are one step

Those that replay have the same budget: M · N instances.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kpig_fast.method.replay import ReplayPlan
from kpig_fast.training.run_config import StrategyName
from kpig_fast.training.strategies.chance import at_random, nothing
from kpig_fast.training.strategies.entropy import highest_entropy
from kpig_fast.training.strategies.inscl import by_distance
from kpig_fast.training.strategies.kpig import lowest_gain
from kpig_fast.training.strategies.request import PlanRequest

__all__ = ["STRATEGIES", "PlanRequest", "Strategy"]


@dataclass(frozen=True)
class Strategy:
    """``plan`` makes the replay plan; ``distils``: train the divergence too; ``joint``: all tasks are one step.

    ``penalty``: what leaving the old weights costs, ``plain`` or weighted by the ``fisher`` information.
    """

    plan: Callable[[PlanRequest], ReplayPlan]
    distils: bool = False
    joint: bool = False
    penalty: Literal["plain", "fisher"] | None = None


STRATEGIES: dict[StrategyName, Strategy] = {
    "kpig": Strategy(lowest_gain, distils=True),
    "replay": Strategy(at_random),
    "entropy": Strategy(highest_entropy),
    "inscl": Strategy(by_distance),
    "ewc": Strategy(nothing, penalty="fisher"),
    "l2": Strategy(nothing, penalty="plain"),
    "sft": Strategy(nothing),
    "joint": Strategy(nothing, joint=True),
}
