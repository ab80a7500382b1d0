"""Replay by information gain (He et al., ACL 2025): the M earlier tasks whose key parts tell the model least."""

from kpig_fast.method.replay import ReplayPlan
from kpig_fast.training.strategies.request import PlanRequest


def lowest_gain(request: PlanRequest) -> ReplayPlan:
    """The drawn instances of the earlier tasks with the lowest mean gain."""
    drawn = request.draw_all()
    return request.lowest_gain(drawn, request.gains(drawn))
