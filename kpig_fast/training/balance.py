"""Which instances of an optimizer batch make up each micro-batch: token trees of equal size, shared starts kept.

In token order the instances of one instruction are neighbours, and whoever is cut from its neighbours pays for the
start that they share again. The smallest capacity for which a greedy filling needs no more bins than there are is found
by bisection (MULTIFIT: Coffman, Garey, Johnson, SIAM J. Comput. 7, 1978).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from kpig_fast.data.encoding import EncodedPair

# How far the largest tree may exceed the mean before single instances are exchanged.
TOLERANCE = 0.05

# Bisection ends when the capacity is known to this share of itself.
_RESOLUTION = 0.005

_Bins = list[list[int]]


def balanced_bins(pairs: Sequence[EncodedPair], bins: int, *, masked: bool) -> list[list[int]]:
    """Distribute instances over ``bins`` bins whose token trees have nearly the same size.

    Args:
        pairs: the instances as token ids.
        bins: number of bins, at least 1.
        masked: the trees hold the masked branch too.

    Returns:
        ``bins`` lists of indices into ``pairs``, largest tree first; the last are empty if there are fewer instances
        than bins, and no others are.
    """
    if not pairs:
        return [[] for _ in range(bins)]
    order, trees = _in_token_order(pairs, masked)
    filled = _exchanged(trees, _smallest_filling(trees, min(bins, len(pairs))))
    filled.sort(key=trees.size, reverse=True)
    return [[order[i] for i in members] for members in filled] + [[] for _ in range(bins - len(filled))]


@dataclass(frozen=True)
class _Trees:
    """What n instances in token order cost: ``tokens`` [n] each alone, of which every two share ``shared`` [n, n]."""

    tokens: NDArray[np.int64]
    shared: NDArray[np.int32]

    def size(self, members: list[int]) -> int:
        """Tokens laid out for ``members`` together."""
        members = sorted(members)
        return int(self.tokens[members].sum() - self.shared[members[:-1], members[1:]].sum())


def _in_token_order(pairs: Sequence[EncodedPair], masked: bool) -> tuple[list[int], _Trees]:
    # As the packer lays them out: the last token of a response needs no row.
    complete = [[*p.complete_ids, *p.response_ids[:-1]] for p in pairs]
    order = sorted(range(len(pairs)), key=complete.__getitem__)
    sequences = [complete[i] for i in order]
    if masked:
        sequences += [[*pairs[i].masked_ids, *pairs[i].response_ids[:-1]] for i in order]
    ids, lengths = _padded(sequences)
    n = len(pairs)
    shared = _between_all(_common(ids[1:n], ids[: n - 1]))
    if not masked:
        return order, _Trees(lengths, shared)
    # The masked branch leaves the complete one after ``own`` tokens; only what follows can be shared anew.
    own = _common(ids[:n], ids[n:])
    beyond = _between_all(_common(ids[n + 1 :], ids[n:-1])) - np.minimum.outer(own, own)
    return order, _Trees(lengths[:n] + lengths[n:] - own, shared + np.maximum(beyond, 0))


def _padded(sequences: list[list[int]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The token ids as rows filled up with -1, and the lengths."""
    lengths = np.array([len(sequence) for sequence in sequences])
    ids = np.full((len(sequences), lengths.max()), -1, np.int32)
    ids[np.arange(lengths.max()) < lengths[:, None]] = np.fromiter(chain.from_iterable(sequences), np.int32)
    return ids, lengths


def _common(a: NDArray[np.int32], b: NDArray[np.int32]) -> NDArray[np.int32]:
    """How many tokens each row of ``a`` shares with that of ``b`` from the start."""
    differ = (a != b) | (a < 0)
    return np.where(differ.any(axis=1), differ.argmax(axis=1), a.shape[1]).astype(np.int32)


def _between_all(neighbours: NDArray[np.int32]) -> NDArray[np.int32]:
    """[n, n] starts shared by any two of n ordered sequences, from those of neighbours: the least on the way; 0 on the
    diagonal."""
    n = len(neighbours) + 1
    later = np.where(np.tri(n, dtype=bool), np.iinfo(np.int32).max, np.pad(neighbours, (1, 0)))
    least = np.triu(np.minimum.accumulate(later, axis=1), 1)
    return least + least.T


def _smallest_filling(trees: _Trees, bins: int) -> _Bins:
    together = trees.size(list(range(len(trees.tokens))))
    low = high = max(together / bins, float(trees.tokens.max()))
    while (found := _filling(trees, bins, high)) is None:
        low, high = high, 1.1 * high
    while high - low > _RESOLUTION * high:
        middle = (low + high) / 2
        smaller = _filling(trees, bins, middle)
        if smaller is None:
            low = middle
        else:
            high, found = middle, smaller
    return found


def _filling(trees: _Trees, bins: int, capacity: float) -> _Bins | None:
    """Fill one bin after the other, none left empty; None if ``capacity`` is too small."""
    tokens, shared = trees.tokens, trees.shared
    nearest = shared.max(axis=0)
    rest = np.arange(len(tokens))
    filled = []
    for to_come in range(bins - 1, -1, -1):
        # In order as long as two more fit.
        laid_out = np.cumsum(tokens[rest] - np.append(0, shared[rest[:-1], rest[1:]]))
        fit = int(np.searchsorted(laid_out, capacity, side="right"))
        taken = max(min(fit - 1, len(rest) - to_come), 1)
        members, rest, room = rest[:taken].tolist(), rest[taken:], capacity - laid_out[taken - 1]
        if room < 0:
            return None
        reach = shared[members].max(axis=0)
        # Then whichever fills the room best: tokens that it would lay out even among its nearest.
        while len(rest) > to_come:
            cost = tokens[rest] - reach[rest]
            useful = np.where(cost <= room, tokens[rest] - np.maximum(reach, nearest)[rest], -1)
            best = int(useful.argmax())
            if useful[best] < 0:
                break
            members.append(int(rest[best]))
            room -= cost[best]
            reach = np.maximum(reach, shared[members[-1]])
            rest = np.delete(rest, best)
        filled.append(members)
    return None if len(rest) else filled


def _exchanged(trees: _Trees, filled: _Bins) -> _Bins:
    """Where filling alone leaves one bin too full, move or exchange single instances as long as that makes it less."""
    largest = int(trees.tokens.max())
    while True:
        filled = sorted(filled, key=trees.size)
        *others, fullest = filled
        size = trees.size(fullest)
        if size <= max(largest, (1 + TOLERANCE) * sum(map(trees.size, filled)) / len(filled)):
            return filled
        for i, other in enumerate(others):
            if better := _exchange(trees, fullest, other):
                filled = [*others[:i], *others[i + 1 :], *better]
                break
        else:
            return filled


def _exchange(trees: _Trees, full: list[int], other: list[int]) -> _Bins | None:
    """Both bins after the best move or exchange of one instance; None if none makes the larger of them smaller."""
    best, least = None, trees.size(full)
    for given in full:
        for back in ([], *([k] for k in other)):
            bins = [[k for k in full if k != given] + back, [k for k in other if k not in back] + [given]]
            size = max(map(trees.size, bins))
            if size < least:
                best, least = bins, size
    return best
