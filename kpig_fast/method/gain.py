"""Information gain of the key parts (He et al., ACL 2025, Eq. 1-3).

    Info(y | x) = sum over k = 1..K of alpha^k p(t_k)        G = Info(y | complete) - Info(y | masked)

Letters: n instances; K_i response tokens of instance i; alpha the decay, in (0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def gain_bound(alpha: float) -> float:
    """alpha / (1 - alpha), which |G| stays below; infinite for alpha 1. Raises ValueError for alpha outside (0, 1]."""
    _check_alpha(alpha)
    return math.inf if alpha == 1 else alpha / (1 - alpha)


def scored_length(alpha: float, tail_tol: float) -> int | None:
    """How many response tokens need scoring so that the ignored tail moves G by at most ``tail_tol``.

    The smallest k >= 1 with alpha^k / (1 - alpha) <= ``tail_tol``: 14 for alpha 0.3 and 34 for 0.6 at 1e-7.

    Args:
        alpha: decay, in (0, 1].
        tail_tol: accepted error of G, finite, >= 0.

    Returns:
        The number of leading tokens; None where all of them are needed (``tail_tol`` = 0 or alpha = 1).

    Raises:
        ValueError: ``alpha`` or ``tail_tol`` is out of its range.
    """
    _check_alpha(alpha)
    if not 0 <= tail_tol < math.inf:
        raise ValueError(f"tail_tol is {tail_tol}; give a finite number >= 0 (0 scores every response token)")
    if tail_tol == 0 or alpha == 1:
        return None
    # The tail after k tokens is alpha^(k+1) / (1 - alpha): k - 1 tokens would do in exact arithmetic. The spare one
    # keeps the promise when the logarithms round across an integer.
    exact = (math.log(tail_tol) + math.log1p(-alpha)) / math.log(alpha)
    return max(1, math.ceil(exact))


def info(log_probs: Tensor, alpha: float) -> float:
    """Info of one response (Eq. 1-2): sum of alpha^k exp(``log_probs[k - 1]``) over k from 1, in float64; empty: 0.

    Args:
        log_probs: log p of each response token [K], any float dtype.
        alpha: decay, in (0, 1].

    Raises:
        ValueError: ``alpha`` is out of its range.
    """
    return float(_decayed_sums(_probabilities([log_probs]), [log_probs.numel()], alpha))


def gains(complete: Sequence[Tensor], masked: Sequence[Tensor], alpha: float) -> Tensor:
    """Information gain G of every instance (Eq. 3); exactly 0.0 where both vectors are equal bit for bit.

    Args:
        complete: n vectors [K_i]: log p of the response tokens under the complete instruction, any float dtype.
        masked: the same tokens under the masked instruction.
        alpha: decay, in (0, 1].

    Returns:
        G, float64 [n], on the CPU.

    Raises:
        ValueError: ``alpha`` is out of its range, or the two sides differ in number or in a length.
    """
    if len(complete) != len(masked):
        raise ValueError(
            f"{len(complete)} complete but {len(masked)} masked log-prob vectors; score every instance under both"
        )
    lengths = [vector.numel() for vector in complete]
    for index, (length, other) in enumerate(zip(lengths, masked)):
        if length != other.numel():
            raise ValueError(
                f"instance {index} has {length} complete but {other.numel()} masked log-probs; "
                "both must score the same response tokens"
            )
    return _decayed_sums(_probabilities(complete) - _probabilities(masked), lengths, alpha)


def _probabilities(log_probs: Sequence[Tensor]) -> Tensor:
    import torch

    vectors = [vector.detach().to("cpu", torch.float64) for vector in log_probs]
    # torch.cat refuses an empty list.
    return torch.cat([torch.zeros(0, dtype=torch.float64), *vectors]).exp()


def _decayed_sums(values: Tensor, lengths: Sequence[int], alpha: float) -> Tensor:
    """Sum of alpha^k ``values`` over each of the consecutive segments [n]; always added in the same order."""
    import torch

    _check_alpha(alpha)
    sizes = torch.tensor(lengths, dtype=torch.int64)
    segment = torch.repeat_interleave(sizes)
    k = torch.arange(1, len(values) + 1, dtype=torch.float64) - (sizes.cumsum(0) - sizes)[segment]
    return torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, segment, values * alpha**k)


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha is {alpha}; the decay must lie in (0, 1], such as 0.3 or 0.6")
