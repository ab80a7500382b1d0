"""What the operators over the vocabulary share: products of a chunk of rows, their gradients, argument checks.

N rows, D hidden size, V vocabulary. Products and logits are float32 from the accumulator on (float64 for float64 hidden
states): bf16 logits would reorder gains and spoil the divergence of two close models.
The library's matrix product forms z = hidden @ weight.T of a chunk; a row pass turns z into results and, in place, into
the gradient by z; two more products give the gradients by hidden states and weight. Row passes are those of csrc/cpu on
a CPU, plain PyTorch elsewhere.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from kpig_fast.ops import rows_cpu, rows_torch
from kpig_fast.ops.native import runs_native
from kpig_fast.ops.reference import IGNORE

# Elements of a training chunk: 512 MB in float32; longer chunks read and write dW less often.
CHUNK_ELEMENTS = 2**27


class Transform(NamedTuple):
    """How raw products become logits: ``softcap · tanh((z + bias) · logit_scale / softcap)``."""

    bias: Tensor | None
    softcap: float | None
    logit_scale: float


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
        self.weight = weight.to(dtype)
        self.transform = Transform(None if bias is None else bias.to(dtype).contiguous(), softcap, logit_scale)
        self.dweight = torch.empty_like(self.weight) if wants_weight else self.weight.new_empty(0)
        self.dbias = self.weight.new_zeros(len(weight)) if wants_bias else self.weight.new_empty(0)
        self.wants_weight, self.wants_bias = wants_weight, wants_bias
        self.chunks_added = 0

    def products(self, hidden: Tensor, out: Tensor) -> Tensor:
        """``out`` [n, V] filled with ``hidden`` [n, D] times the weight."""
        return torch.mm(hidden.to(out.dtype), self.weight.t(), out=out)

    def backward(self, dz: Tensor, hidden: Tensor, dhidden: Tensor) -> None:
        """From the gradient by products ``dz`` [n, V]: set ``dhidden`` [n, D], add to those by weight and bias."""
        if self.wants_weight:
            # The first product overwrites, so that nothing is set to zero before.
            self.dweight.addmm_(dz.t(), hidden.to(dz.dtype), beta=min(self.chunks_added, 1))
        if self.wants_bias:
            self.dbias += dz.sum(0)
        self.chunks_added += 1
        if dhidden.dtype == dz.dtype:
            torch.mm(dz, self.weight, out=dhidden)
        else:
            dhidden.copy_(torch.mm(dz, self.weight))

    def gradients(self) -> tuple[Tensor, Tensor]:
        """By weight [V, D] and bias [V]; empty where not wanted."""
        return self.dweight if self.chunks_added else self.dweight.zero_(), self.dbias


def chunk_space(like: Tensor, rows: int, columns: int) -> Tensor:
    """A flat buffer for chunks of ``rows`` rows of ``columns`` products: all of them, or CHUNK_ELEMENTS."""
    return like.new_empty(max(columns, min(CHUNK_ELEMENTS // columns, rows) * columns))


def chunks(space: Tensor, rows: int, columns: int) -> Iterator[tuple[slice, Tensor]]:
    """Cut rows into chunks that fit into ``space``; each with its part of it, [n, columns]."""
    for part in blocks(rows, len(space) // columns):
        yield part, space[: (part.stop - part.start) * columns].view(-1, columns)


def row_passes(z: Tensor) -> ModuleType:
    """The module whose functions work on rows like those of ``z``."""
    return rows_cpu if runs_native(z) else rows_torch


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
