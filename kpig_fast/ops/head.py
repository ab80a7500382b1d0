"""What the operators over the vocabulary share: logits of a block of rows, block sizes, argument checks.

N rows, D hidden size, V vocabulary. Logits are float32 from the accumulator on (float64 for float64 hidden states):
bf16 logits would reorder gains and spoil the divergence of two close models.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kpig_fast.ops.reference import IGNORE

# Elements of one training chunk's logits: 512 MB in float32; longer chunks read and write dW less often.
CHUNK_ELEMENTS = 2**27
# Elements that the element-wise passes of a training chunk take at a time.
SWEEP_ELEMENTS = 2**20


def logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float, dtype: torch.dtype
) -> Tensor:
    """[N, V] fresh: ``softcap · tanh((hidden @ weight.T + bias) · logit_scale / softcap)`` in ``dtype``."""
    out = torch.mm(hidden.to(dtype), weight.to(dtype).t())
    if bias is not None:
        out.add_(bias.to(dtype))
    if softcap is not None:
        return out.mul_(logit_scale / softcap).tanh_().mul_(softcap)
    return out if logit_scale == 1.0 else out.mul_(logit_scale)


class Head:
    """A head's parameters in the dtype of the sums, and the gradients that chunks of rows add up to."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        logit_scale: float,
        dtype: torch.dtype,
        *,
        wants_weight: bool = False,
        wants_bias: bool = False,
    ) -> None:
        self.weight, self.bias, self.softcap, self.logit_scale = weight.to(dtype), bias, softcap, logit_scale
        self.dweight = torch.zeros_like(self.weight) if wants_weight else self.weight.new_empty(0)
        self.dbias = self.weight.new_zeros(len(weight)) if wants_bias else self.weight.new_empty(0)
        self.wants_weight, self.wants_bias = wants_weight, wants_bias

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, V]: a fresh buffer with the logits of ``hidden`` [n, D]."""
        return logits(hidden, self.weight, self.bias, self.softcap, self.logit_scale, self.weight.dtype)

    def before_overwriting(self, z: Tensor) -> Tensor | None:
        """What ``backward`` must know of the logits ``z`` [n, V] after they have become their gradient."""
        return None if self.softcap is None else (z / self.softcap).square_()

    def backward(self, dz: Tensor, kept: Tensor | None, hidden: Tensor) -> Tensor:
        """[n, D], the gradient by ``hidden`` from that by its logits ``dz`` (destroyed); adds to the parameters'."""
        if kept is not None:
            dz.mul_(kept.neg_().add_(1))
        if self.logit_scale != 1.0:
            dz.mul_(self.logit_scale)
        if self.wants_weight:
            self.dweight.addmm_(dz.t(), hidden.to(dz.dtype))
        if self.wants_bias:
            self.dbias += dz.sum(0)
        return torch.mm(dz, self.weight)


def chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Cut rows into training chunks."""
    return blocks(rows, max(1, CHUNK_ELEMENTS // vocabulary))


def sweeps(rows: int, vocabulary: int) -> Iterator[slice]:
    """Cut the rows of a chunk into what the element-wise passes take at a time."""
    return blocks(rows, max(1, SWEEP_ELEMENTS // vocabulary))


def blocks(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of ``size``, the last one ragged."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def check_head(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, row_name: str) -> None:
    """Raise ValueError unless hidden [N, D], weight [V, D], bias [V] and the per-row argument [N] fit together."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name} needs hidden [N, D] and weight [V, D]; got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if rows.shape != hidden.shape[:1]:
        raise ValueError(f"{name} needs {row_name} [{hidden.shape[0]}], one a row; got {list(rows.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name} needs bias [{weight.shape[0]}], one a vocabulary entry; got {list(bias.shape)}")


def check_targets(target: Tensor, vocabulary: int) -> None:
    """Raise ValueError unless every target [N] is a token id or ``IGNORE``."""
    wrong = target[(target != IGNORE) & ((target < 0) | (target >= vocabulary))]
    if len(wrong):
        raise ValueError(
            f"target {int(wrong[0])} is no token id; give 0 ... {vocabulary - 1}, or {IGNORE} to leave a row out"
        )
