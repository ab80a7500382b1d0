"""Intervals and paired tests of figures that are means over tasks of what the answers of each task reach.

One run: its answers are drawn again within every task (bootstrap), the tasks stay as they are; two runs that answered
the same questions: their answers to each are swapped at random (permutation test). Several seeds: Student's t.

The draws of a task depend on its name and on how many answers it has, nothing else. So results do not depend on the
order of tasks, and two runs are drawn alike: the difference of their draws is a paired bootstrap (Koehn 2004).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from kpig_fast.evaluation.metrics import Tally

CONFIDENCE = 0.95
N_DRAWS = 2000
# From as many seeds on the signed-rank test can reach p < 0.05.
N_WILCOXON = 6

Draws = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; ``low`` and ``high`` are None where there is too little to tell."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Difference:
    """A difference with its 95 % interval and the two-sided p-value of there being none.

    Args:
        value, low, high: as of ``Estimate``.
        test: what gave ``p``: ``permutation`` of answers or ``t`` over seeds.
        p: None where the test cannot be made: differences over seeds that are all the same.
        wilcoxon: p-value of the signed-rank test over seeds, from six on.
        n: answers, or seeds.
    """

    value: float
    low: float | None
    high: float | None
    test: str
    p: float | None
    wilcoxon: float | None
    n: int


def draw(name: str, tally: Tally) -> Draws | None:
    """The figure of task ``name`` for answers drawn again, [N_DRAWS]; None for one answer, which does not vary."""
    n = len(tally.counts)
    if n < 2:
        return None
    chosen = _generator(name, "answers").integers(0, n, (N_DRAWS, n))
    return tally.of_sums(tally.counts[chosen].sum(1))


def over_answers(values: Sequence[float], draws: Sequence[Draws | None]) -> Estimate:
    """The mean over tasks with a percentile interval.

    Args:
        values: the figure of every task.
        draws: what ``draw`` gives for it; where it gives None there is no interval.

    Raises:
        ValueError: no task.
    """
    if not values:
        raise ValueError("no task has this figure; give at least one")
    known = [one for one in draws if one is not None]
    if len(known) < len(values):
        return Estimate(fmean(values))
    return Estimate(fmean(values), *_bounds(np.mean(known, axis=0)))


def between_answers(ours: Mapping[str, Tally], theirs: Mapping[str, Tally]) -> Difference:
    """Ours minus theirs, as means over tasks, of one figure; the answers of a task are in the same order.

    The p-value counts the difference itself as one of the swaps, hence is never 0.

    Raises:
        ValueError: no task, or the tasks or their numbers of answers differ.
    """
    if not ours or {name: len(one.counts) for name, one in ours.items()} != {
        name: len(one.counts) for name, one in theirs.items()
    }:
        raise ValueError("the tasks or their numbers of answers differ; paired answers are answers to the same rows")
    values = [ours[name].value - theirs[name].value for name in ours]
    pairs = [(draw(name, ours[name]), draw(name, theirs[name])) for name in ours]
    found = over_answers(values, [None if a is None or b is None else a - b for a, b in pairs])
    swapped = np.mean([_swapped(name, ours[name], theirs[name]) for name in ours], axis=0)
    # Swaps that undo each other give the same difference up to rounding.
    reached = np.abs(swapped) >= abs(found.value) - 1e-9
    p = float((reached.sum() + 1) / (N_DRAWS + 1))
    n = sum(len(one.counts) for one in ours.values())
    return Difference(found.value, found.low, found.high, "permutation", p, None, n)


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean with Student's interval; without one for a single value. Raises ValueError for none."""
    if not values:
        raise ValueError("no values; give at least one")
    mean = fmean(values)
    if len(values) < 2:
        return Estimate(mean)
    half = stdev(values) / math.sqrt(len(values)) * _t_quantile(len(values) - 1)
    return Estimate(mean, mean - half, mean + half)


def between_seeds(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Ours minus theirs, of the same seeds in the same order: a paired t-test, and the signed-rank test from six on.

    Raises:
        ValueError: fewer than two seeds, or another number of them on one side.
    """
    from scipy import stats

    if len(ours) != len(theirs) or len(ours) < 2:
        raise ValueError(f"{len(ours)} and {len(theirs)} seeds; a paired test needs the same two or more")
    gaps = [a - b for a, b in zip(ours, theirs)]
    found = over_seeds(gaps)
    # Without spread there is nothing to test the difference against.
    t_test = stats.ttest_rel(ours, theirs) if np.ptp(gaps) > 1e-9 else None
    signed_rank = stats.wilcoxon(gaps) if len(gaps) >= N_WILCOXON and any(gaps) else None
    return Difference(found.value, found.low, found.high, "t", _p(t_test), _p(signed_rank), len(gaps))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for being several (Holm 1979), in their order."""
    corrected, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = worst
    return corrected


def _swapped(name: str, ours: Tally, theirs: Tally) -> Draws:
    """The difference in task ``name`` when each pair of answers is swapped or not, at random, [N_DRAWS]."""
    swap = _generator(name, "swaps").integers(0, 2, (N_DRAWS, len(ours.counts))).astype(float)
    sums = ours.counts.sum(0) + swap @ (theirs.counts - ours.counts)
    return ours.of_sums(sums) - theirs.of_sums(ours.counts.sum(0) + theirs.counts.sum(0) - sums)


@cache
def _t_quantile(freedom: int) -> float:
    from scipy import stats

    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))


def _p(result: Any) -> float | None:
    return None if result is None else float(result.pvalue)


def _generator(name: str, purpose: str) -> np.random.Generator:
    return np.random.default_rng([crc32(name.encode("utf-8", "surrogatepass")), crc32(purpose.encode())])


def _bounds(draws: Draws) -> tuple[float, float]:
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [outside, 1 - outside])
    return float(low), float(high)
