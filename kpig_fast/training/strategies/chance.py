"""Replay of M earlier tasks that are drawn at random, as many instances as kpig replays."""

from kpig_fast.method.replay import ReplayPlan, draw
from kpig_fast.training.strategies.request import PlanRequest


def at_random(request: PlanRequest) -> ReplayPlan:
    """N instances of each of M random earlier tasks."""
    # The tasks of a step are drawn by the same rule as the rows of a task.
    order = draw("", list(request.earlier), 1, n=request.n_replay_tasks, seed=request.seed, step=request.step)
    return request.exactly([one for task in order for one in request.draw(task.row_id, request.n_per_task)])


def nothing(request: PlanRequest) -> ReplayPlan:
    """No earlier instance."""
    return request.exactly([])
