"""Replay by predictive entropy (DynaInst): the drawn instances whose answers the model is least sure of."""

from statistics import fmean

from kpig_fast.method.replay import ReplayPlan
from kpig_fast.training.strategies.request import PlanRequest


def highest_entropy(request: PlanRequest) -> ReplayPlan:
    """Of N instances of every earlier task the M · N with the highest entropy, equal ones in the order of drawing."""
    drawn = request.draw_all()
    entropies = request.entropies(drawn)
    order = sorted(range(len(drawn)), key=lambda i: -entropies[i])[: request.budget]
    by_task: dict[str, list[float]] = {}
    for one, entropy in zip(drawn, entropies):
        by_task.setdefault(one.task, []).append(entropy)
    return request.exactly([drawn[i] for i in order], {task: fmean(values) for task, values in by_task.items()})
