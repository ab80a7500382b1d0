"""What the operators over the vocabulary share: products of a chunk of rows, their gradients, argument checks.

N rows, D hidden size, V vocabulary. Products and logits are float32 from the accumulator on (float64 for float64 hidden
states): bf16 logits would reorder gains and spoil the divergence of two close models.
The library's matrix product forms z = hidden @ weight.T of a chunk; a row pass turns z into results and, in place, into
the gradient by z; two more products give the gradients by hidden states and weight. Row passes are those of csrc/cpu on
a CPU, of Triton on a CUDA GPU, plain PyTorch elsewhere.
A GPU multiplies half-precision factors as they are and sums in float32; there the gradient by z is rounded to half
precision, as a factor of the last two products, but those by weight and bias are summed in float32 over the chunks.
"""

import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kpig_fast._native import isa_name
from kpig_fast.ops import rows_cpu, rows_cuda, rows_torch
from kpig_fast.ops.log import took
from kpig_fast.ops.native import runs_native
from kpig_fast.ops.precision import compute_dtype, factor_dtype
from kpig_fast.ops.reference import IGNORE

# Elements of a training chunk on a CPU: 512 MB in float32; longer chunks read and write dW less often.
CHUNK_ELEMENTS = 2**27
# On a GPU a chunk takes this share of its memory, and more, up to twice this share, for this many rows.
CHUNK_SHARE, CHUNK_ROWS = 1 / 16, 2048
# Rows of a chunk start at multiples of this many bytes on a GPU, whose matrix products need aligned rows.
ROW_BYTES = 256


class Transform(NamedTuple):
    """How raw products become logits: ``softcap · tanh((z + bias) · logit_scale / softcap)``."""

    bias: Tensor | None
    softcap: float | None
    logit_scale: float


class Head:
    """A head's parameters as matrix products take them, and the gradients that chunks of rows add up to."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        logit_scale: float,
        hidden: Tensor,
        *,
        wants_weight: bool = False,
        wants_bias: bool = False,
    ) -> None:
        dtype = compute_dtype(hidden)
        self.weight = weight.to(factor_dtype(hidden, weight))
        self.transform = Transform(None if bias is None else bias.to(dtype).contiguous(), softcap, logit_scale)
        self.dweight = torch.empty_like(weight, dtype=dtype) if wants_weight else weight.new_empty(0, dtype=dtype)
        self.dbias = weight.new_zeros(len(weight) if wants_bias else 0, dtype=dtype)
        self.wants_weight, self.wants_bias = wants_weight, wants_bias
        self.chunks_added = 0

    def products(self, hidden: Tensor, out: Tensor) -> None:
        """Fill ``out`` [n, V] with ``hidden`` [n, D] times the weight."""
        multiply(hidden.to(self.weight.dtype), self.weight.t(), out)

    def gradient_of(self, z: Tensor) -> Tensor:
        """Where a row pass writes the gradient by ``z`` [n, V]: each row over its own row of ``z``."""
        return z if z.dtype == self.weight.dtype else z.view(self.weight.dtype)[:, : z.shape[1]]

    def backward(self, dz: Tensor, hidden: Tensor, dhidden: Tensor) -> None:
        """From the gradient by products ``dz`` [n, V]: set ``dhidden`` [n, D], add to those by weight and bias."""
        if self.wants_weight:
            # The first product overwrites, so that nothing is set to zero before.
            multiply(dz.t(), hidden.to(dz.dtype), self.dweight, adds=self.chunks_added > 0)
        if self.wants_bias:
            self.dbias += dz.sum(0, dtype=self.dbias.dtype)
        self.chunks_added += 1
        if dhidden.dtype == dz.dtype:
            torch.mm(dz, self.weight, out=dhidden)
        else:
            dhidden.copy_(torch.mm(dz, self.weight))

    def gradients(self) -> tuple[Tensor, Tensor]:
        """By weight [V, D] and bias [V]; empty where not wanted."""
        return self.dweight if self.chunks_added else self.dweight.zero_(), self.dbias


def multiply(a: Tensor, b: Tensor, out: Tensor, *, adds: bool = False) -> None:
    """Set ``out`` to ``a @ b``, or add that to it; a GPU sums half-precision factors in the dtype of ``out``."""
    mixed = () if a.dtype == out.dtype else (out.dtype,)
    if adds:
        torch.addmm(out, a, b, *mixed, out=out)
    else:
        torch.mm(a, b, *mixed, out=out)


def chunk_space(head: Head, rows: int, sides: int = 1) -> Tensor:
    """A buffer for the products of a chunk, ``sides`` a row: of all rows, or of as many as a chunk may have."""
    like, stride, elements = head.dweight, len(head.weight), CHUNK_ELEMENTS
    if like.device.type == "cuda":
        stride = round_up(stride, ROW_BYTES // like.element_size())
        memory = torch.cuda.get_device_properties(like.device).total_memory
        elements = gpu_chunk_elements(memory // like.element_size(), sides * stride)
    return like.new_empty(sides * max(1, min(elements // (sides * stride), rows)), stride)


def gpu_chunk_elements(memory: int, columns: int) -> int:
    """How many elements a chunk may have on a GPU that holds ``memory`` elements, with ``columns`` for each row."""
    share = int(CHUNK_SHARE * memory)
    return max(share, min(CHUNK_ROWS * columns, 2 * share))


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is not below ``n``."""
    return -(-n // multiple) * multiple


def chunks(space: Tensor, rows: int, vocabulary: int, sides: int = 1) -> Iterator[tuple[slice, list[Tensor]]]:
    """Cut rows into chunks whose products [n, V], one for each of ``sides``, fit into ``space`` [capacity, >= V]."""
    for part in blocks(rows, len(space) // sides):
        n = part.stop - part.start
        yield part, [space[side * n : (side + 1) * n, :vocabulary] for side in range(sides)]


def row_passes(z: Tensor, sides: int = 1) -> ModuleType:
    """The module whose ``logprob`` (of one side) or ``jsd`` (of two) works on whole rows like those of ``z``."""
    refusal = None if runs_native(z) else rows_cuda.refusal(z, sides)
    if z.device.type != "cuda" or refusal is not None:
        return _passes(z, f"whole rows, {sides} together", refusal or "")
    took(f"whole rows of {z.dtype} on {z.device.type}, {sides} together", "CUDA C++", "a cluster reads each row once")
    return rows_cuda


def tile_passes(z: Tensor) -> ModuleType:
    """The module whose ``score_tile`` works on tiles like ``z``."""
    return _passes(z, "tiles", "tiles need no clusters")


def _passes(z: Tensor, what: str, why_no_clusters: str) -> ModuleType:
    operator = f"{what} of {z.dtype} on {z.device.type}"
    if runs_native(z):
        took(operator, "C++", f"kernels for {isa_name()}")
        return rows_cpu
    if z.device.type != "cuda" or z.dtype != torch.float32 or not importlib.util.find_spec("triton"):
        took(operator, "plain PyTorch", "there are no kernels for this device and dtype, or Triton is not installed")
        return rows_torch
    from kpig_fast.ops import rows_triton

    took(operator, "Triton", why_no_clusters)
    return rows_triton


def blocks(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of ``size``, the last one ragged."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def check_head(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, row_name: str) -> None:
    """Raise ValueError unless hidden [N, D], weight [V, D], bias [V] and the per-row argument [N] fit together."""
    if isinstance(weight, DTensor):
        raise ValueError(
            f"{name} got a weight that is sharded over processes (a DTensor, {weight.placements}); "
            "gather it once a step with weight.full_tensor() and give that"
        )
    if not weight.numel() and hasattr(weight, "ds_id"):
        raise ValueError(
            f"{name} got a weight that DeepSpeed ZeRO-3 has sharded; "
            "call it inside deepspeed.zero.GatheredParameters([weight])"
        )
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name} needs hidden [N, D] and weight [V, D]; got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if rows.shape != hidden.shape[:1]:
        raise ValueError(f"{name} needs {row_name} [{hidden.shape[0]}], one a row; got {list(rows.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name} needs bias [{weight.shape[0]}], one a vocabulary entry; got {list(bias.shape)}")


def check_targets(target: Tensor, vocabulary: int) -> None:
    """Raise ValueError unless every target [N] is a token id or ``IGNORE``; not while a CUDA graph is captured."""
    if target.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    wrong = target[(target != IGNORE) & ((target < 0) | (target >= vocabulary))]
    if len(wrong):
        raise ValueError(
            f"target {int(wrong[0])} is no token id; give 0 ... {vocabulary - 1}, or {IGNORE} to leave a row out"
        )
