"""Attention on a token tree in Triton, for GPUs. Letters and arguments are those of ``tree_attention``.

A block of queries visits the key blocks that reach it: those of which some subtree ends behind the block's first token.
A key block that every query of the block sees whole takes a path without a mask. Which is which is found once a call by
``visits_kernel``. For the gradients of a key block, the queries that see it are one run of tokens. Nothing is added up
by atomics, and no configuration is searched for, so that the bits are the same in every run.
"""

# A kernel's compile-time arguments are given as plain values, and strides are unpacked, which a checker cannot count.
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs

from kpig_fast.ops.attention_triton_kernels import (
    forward_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
    visits_kernel,
)
from kpig_fast.ops.precision import compute_dtype

INT32_MAX = 2**31 - 1


def takes(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels take these inputs: float64 and heads of more than 256 are left to plain PyTorch."""
    return q.dtype != torch.float64 and max(q.shape[2], v.shape[2]) <= 256


class Blocks(NamedTuple):
    """Queries and keys of a block, and warps of a program."""

    m: int
    n: int
    warps: int


def forward_blocks(width: int, dtype: torch.dtype) -> Blocks:
    """For the forward kernel, by padded head size: sizes that spill no register, with any option on any chip.

    Exact float32 products have no matrix instructions, and take more registers.
    """
    if dtype == torch.float32:
        return Blocks(32, 16, 8)
    return Blocks(128, 64, 8) if width <= 128 else Blocks(64, 32, 8)


def query_blocks(width: int, dtype: torch.dtype) -> Blocks:
    """For the gradient by queries, likewise."""
    if dtype == torch.float32:
        return Blocks(16, 16, 8)
    if width <= 64:
        return Blocks(128, 32, 8)
    return Blocks(64, 32, 4) if width <= 128 else Blocks(64, 16, 8)


def key_blocks(width: int, dtype: torch.dtype) -> Blocks:
    """For the gradients by keys and values, likewise."""
    if dtype == torch.float32:
        return Blocks(16, 16, 8)
    if width <= 64:
        return Blocks(32, 64, 4)
    return Blocks(32, 64, 8) if width <= 128 else Blocks(32, 32, 8)


class _Call:
    """What the kernels of one call have in common."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, positions: Tensor, window: int | None) -> None:
        self.d, self.dv, self.tokens = q.shape[2], v.shape[2], q.shape[1]
        self.block_d, self.block_dv = (max(16, triton.next_power_of_2(size)) for size in (self.d, self.dv))
        self.width, self.dtype = max(self.block_d, self.block_dv), q.dtype
        self.ends, self.positions = (x.to(torch.int32).contiguous() for x in (ends, positions))
        # A window that no tree can reach is none.
        self.window = None if window is None or window > INT32_MAX else window
        self.groups = q.shape[0] // k.shape[0]

    def options(self, blocks: Blocks, softcap: float | None) -> dict[str, Any]:
        """The compile-time arguments of a kernel that goes over ``blocks``."""
        return {
            "GROUPS": self.groups,
            "HAS_WINDOW": self.window is not None,
            "HAS_SOFTCAP": softcap is not None,
            "UPCAST": knobs.runtime.interpret,
            "BLOCK_M": blocks.m,
            "BLOCK_N": blocks.n,
            "BLOCK_D": self.block_d,
            "BLOCK_DV": self.block_dv,
            "num_warps": blocks.warps,
            "num_stages": 2,
        }

    def visits(self, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Key blocks that each query block sees whole, and those it sees in part; a list and its length for each."""
        rows, columns = triton.cdiv(self.tokens, blocks.m), triton.cdiv(self.tokens, blocks.n)
        full, partial = self.ends.new_empty(2, rows, columns)
        n_full, n_partial = self.ends.new_empty(2, rows)
        visits_kernel[(rows,)](
            self.ends, self.positions, full, n_full, partial, n_partial, self.tokens, self.window or 0, columns,
            self.window is not None, blocks.m, blocks.n,
        )  # fmt: skip
        return full, n_full, partial, n_partial


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    position_ids: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    out: Tensor,  # [H, T, dv]
    lse: Tensor,  # [H, T]
) -> None:
    """Fill ``out``, and ``lse`` with the log-sum-exp of each query's scores, its sink's included."""
    if not q.shape[1]:
        return
    q, k, v = map(_unit_stride, (q, k, v))
    call = _Call(q, k, v, subtree_end, position_ids, window)
    blocks = forward_blocks(call.width, q.dtype)
    forward_kernel[(triton.cdiv(call.tokens, blocks.m), q.shape[0])](
        q, k, v, out, lse, call.ends, call.positions, lse if sinks is None else sinks.contiguous(),
        *call.visits(blocks), call.tokens, call.window or 0, scale, softcap or 1.0, *q.stride()[:2], *k.stride()[:2],
        *v.stride()[:2], *out.stride()[:2], triton.cdiv(call.tokens, blocks.n), call.d, call.dv,
        HAS_SINKS=sinks is not None, **call.options(blocks, softcap),
    )  # fmt: skip


def backward(
    grad: Tensor,  # [H, T, dv]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,  # [H, T, dv]
    lse: Tensor,  # [H, T]
    subtree_end: Tensor,
    position_ids: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    dq: Tensor,  # [H, T, d]
    delta: Tensor,  # [H, T]
) -> tuple[Tensor, Tensor]:
    """Fill ``dq``, and ``delta`` with each query's sum of ``grad · out``; return the gradients by keys and values."""
    compute = compute_dtype(q)
    torch.sum(grad.to(compute) * out.to(compute), -1, out=delta)
    q, k, v, grad = map(_unit_stride, (q, k, v, grad))
    dk, dv = (x.new_empty(x.shape[1], x.shape[0], x.shape[2], dtype=compute).transpose(0, 1) for x in (k, v))
    if not q.shape[1]:
        return dk, dv
    call = _Call(q, k, v, subtree_end, position_ids, window)
    inputs, tree = (q, k, v, grad, lse.contiguous(), delta), (call.ends, call.positions)
    numbers = call.tokens, call.window or 0, scale, softcap or 1.0
    strides = *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *grad.stride()[:2]
    blocks = query_blocks(call.width, q.dtype)
    query_gradient_kernel[(triton.cdiv(call.tokens, blocks.m), q.shape[0])](
        *inputs, dq, *tree, *call.visits(blocks), *numbers, *strides, *dq.stride()[:2],
        triton.cdiv(call.tokens, blocks.n), call.d, call.dv, **call.options(blocks, softcap),
    )  # fmt: skip
    blocks = key_blocks(call.width, q.dtype)
    key_gradient_kernel[(triton.cdiv(call.tokens, blocks.n), k.shape[0])](
        *inputs, dk, dv, *tree, *numbers, *strides, *dk.stride()[:2], *dv.stride()[:2], call.d, call.dv,
        **call.options(blocks, softcap),
    )  # fmt: skip
    return dk, dv


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()
