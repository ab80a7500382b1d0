"""Replay by distance from the new task (InsCL, Wang et al., 2024, arXiv 2403.11435).

The share of an earlier task grows with the Wasserstein-1 distance (cosine cost) between its instructions and the new
task's; inside a task, instructions that carry rarer tags come first (InsInfo). The tags are the key parts.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kpig_fast.method.replay import ReplayPlan
from kpig_fast.training.strategies.request import PlanRequest


def by_distance(request: PlanRequest) -> ReplayPlan:
    """M · N instances, more of the tasks whose instructions are farther away, of each the most informative first."""
    vectors = {
        task: request.embed([wording.text for wording in request.pool(task)]) for task in request.earlier + request.new
    }
    if not request.earlier:
        return request.exactly([])
    new = np.concatenate([vectors[task] for task in request.new])
    distances = {task: wasserstein(vectors[task], new) for task in request.earlier}
    candidates = {task: request.draw(task, None) for task in request.earlier}
    parts = shares(distances, request.budget, {task: len(drawn) for task, drawn in candidates.items()})
    info = _information(request)
    return request.exactly(
        [
            one
            for task, drawn in candidates.items()
            for one in sorted(drawn, key=lambda one: -info[one.task, one.instruction])[: parts[task]]
        ],
        distances,
    )


def _information(request: PlanRequest) -> dict[tuple[str, int], float]:
    """InsInfo of every wording of every task so far."""
    wordings = [(task, i) for task in request.earlier + request.new for i in range(len(request.pool(task)))]
    tags = [_tags(request, task, i) for task, i in wordings]
    return dict(zip(wordings, insinfo(tags)))


def _tags(request: PlanRequest, task: str, i: int) -> list[str]:
    wording = request.pool(task)[i]
    parts = (part if isinstance(part, str) else wording.text[slice(*part)] for part in wording.key_parts)
    return [" ".join(part.casefold().split()) for part in parts]


def wasserstein(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Wasserstein-1 distance of two sets of vectors [n, d] and [m, d], each of equal weights, with cost 1 - cosine.

    Raises:
        ValueError: a set is empty, or a vector is zero or not finite.
    """
    from scipy.optimize import linprog
    from scipy.sparse import eye_array, kron, vstack

    cost = np.maximum(1 - _unit(a) @ _unit(b).T, 0)
    n, m = cost.shape
    # What leaves each a, and what reaches each b, of a plan [n, m] in row-major order.
    flows = vstack([kron(eye_array(n), np.ones((1, m))), kron(np.ones((1, n)), eye_array(m))])
    weights = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    found = linprog(cost.ravel(), A_eq=flows, b_eq=weights, method="highs")
    return max(float(found.fun), 0.0)


def shares(distances: Mapping[str, float], budget: int, available: Mapping[str, int]) -> dict[str, int]:
    """Cut a budget of instances in proportion to the distances, by largest remainders; equal parts where all are 0.

    A task that has fewer instances than its share gives all of them; the rest of its share goes to the others.

    Args:
        distances: distance of each earlier task from the new one, >= 0.
        budget: instances to replay.
        available: instances that each task has.
    """
    given = dict.fromkeys(distances, 0)
    while (left := min(budget, sum(available[task] for task in distances)) - sum(given.values())) > 0:
        open_tasks = [task for task in distances if given[task] < available[task]]
        weights = np.array([distances[task] for task in open_tasks])
        weights = weights if weights.sum() > 0 else np.ones(len(open_tasks))
        wanted = left * weights / weights.sum()
        parts = np.floor(wanted).astype(int)
        for i in sorted(range(len(parts)), key=lambda i: (parts[i] - wanted[i], i))[: left - int(parts.sum())]:
            parts[i] += 1
        for task, part in zip(open_tasks, parts.tolist()):
            given[task] = min(available[task], given[task] + part)
    return given


def insinfo(tags: Sequence[Iterable[str]]) -> list[float]:
    """InsInfo of each instruction: the sum over its tags of log(N / instructions with that tag), N instructions."""
    distinct = [set(each) for each in tags]
    counts = Counter(tag for each in distinct for tag in each)
    return [sum(math.log(len(tags) / counts[tag]) for tag in sorted(each)) for each in distinct]


def _unit(x: NDArray[np.floating]) -> NDArray[np.float64]:
    x = np.asarray(x, np.float64)
    sizes = np.linalg.norm(x, axis=1, keepdims=True)
    if not len(x) or not np.isfinite(sizes).all() or not sizes.all():
        raise ValueError(f"{len(x)} embeddings, some of them zero or not finite; check the sentence embedder")
    return x / sizes
