"""Attention on a token tree: every token attends to its ancestors and itself.

    out[h, q] = sum_k softmax_k(cap(scale · q·k))[k] · v[k]      over k with  k <= q < subtree_end[k]

H query heads, Hkv key/value heads (grouped-query), T tokens in depth-first order, d head size.
On a CPU the work is done by csrc/cpu/attention_kernels.cpp, on a CUDA GPU by Triton, elsewhere by plain PyTorch. All
visit only the keys that a block of queries sees, in time and memory O(T · (depth + block)), and recompute probabilities
in the backward pass.
"""

import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from kpig_fast._native import isa_name
from kpig_fast.ops import attention_cpu, attention_torch
from kpig_fast.ops.log import took
from kpig_fast.ops.native import runs_native
from kpig_fast.ops.precision import compute_dtype, shielded


def path_of(q: Tensor, v: Tensor) -> ModuleType:
    """The module whose ``forward`` and ``backward`` work on tensors like these."""
    path, name, why = _path_of(q, v)
    took(f"tree attention in {q.dtype} on {q.device.type}", name, why)
    return path


def _path_of(q: Tensor, v: Tensor) -> tuple[ModuleType, str, str]:
    if runs_native(q):
        return attention_cpu, "C++", f"kernels for {isa_name()}"
    if q.device.type != "cuda":
        return attention_torch, "plain PyTorch", "there are no kernels for this device"
    if not importlib.util.find_spec("triton"):
        return attention_torch, "plain PyTorch", "triton is not installed"
    from kpig_fast.ops import attention_triton

    if attention_triton.takes(q, v):
        return attention_triton, "Triton", "the inputs are on a CUDA GPU"
    return attention_torch, "plain PyTorch", "the Triton kernels take no float64 and no heads of more than 256"


def _empty(like: Tensor, size: int) -> Tensor:
    """[H, T, size] for ``like`` [H, T, d]; token after token in memory, as layers give and take it."""
    return like.new_empty(like.shape[1], like.shape[0], size).transpose(0, 1)


@torch.library.custom_op("kpig_fast::tree_attention", mutates_args=())
@shielded
def _tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    position_ids: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out = _empty(q, v.shape[-1])
    lse = torch.empty(q.shape[:2], dtype=compute_dtype(q), device=q.device)
    path_of(q, v).forward(q, k, v, subtree_end, position_ids, scale, window, softcap, sinks, out, lse)
    return out, lse


@_tree_attention.register_fake
def _(q, k, v, subtree_end, position_ids, scale, window, softcap, sinks):
    lse = torch.empty(q.shape[:2], dtype=compute_dtype(q), device=q.device)
    return _empty(q, v.shape[-1]), lse


@torch.library.custom_op("kpig_fast::tree_attention_backward", mutates_args=())
@shielded
def _tree_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    subtree_end: Tensor,
    position_ids: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    delta = torch.empty_like(lse)
    dq = _empty(q, q.shape[-1])
    dk, dv = path_of(q, v).backward(
        grad, q, k, v, out, lse, subtree_end, position_ids, scale, window, softcap, dq, delta
    )
    return dq, dk.to(k.dtype), dv.to(v.dtype), delta


@_tree_attention_backward.register_fake
def _(grad, q, k, v, out, lse, subtree_end, position_ids, scale, window, softcap):
    return _empty(q, q.shape[-1]), _empty(k, k.shape[-1]), _empty(v, v.shape[-1]), torch.empty_like(lse)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, subtree_end, position_ids, ctx.scale, ctx.window, ctx.softcap, sinks = inputs
    ctx.save_for_backward(q, k, v, subtree_end, position_ids, sinks, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_lse):
    q, k, v, subtree_end, position_ids, sinks, out, lse = ctx.saved_tensors
    if grad is None:
        return (None,) * 9
    dq, dk, dv, delta = torch.ops.kpig_fast.tree_attention_backward(
        grad, q, k, v, out, lse, subtree_end, position_ids, ctx.scale, ctx.window, ctx.softcap
    )
    dsinks = None if sinks is None else -((sinks.to(lse)[:, None] - lse).exp() * delta).sum(1).to(sinks.dtype)
    return dq, dk, dv, None, None, None, None, None, dsinks


_tree_attention.register_autograd(_backward, setup_context=_setup_context)


def tree_attention(
    q: Tensor,  # [H, T, d]
    k: Tensor,  # [Hkv, T, d]
    v: Tensor,  # [Hkv, T, d]
    subtree_end: Tensor,  # [T]
    position_ids: Tensor,  # [T]
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [H]
) -> Tensor:
    """Attention of each token of a tree to its ancestors and itself. Gradient to ``q``, ``k``, ``v`` and ``sinks``.

    Sums are float32 (float64 for float64 inputs) whatever the inputs' dtype.

    Args:
        q: [H, T, d] queries in depth-first token order.
        k, v: [Hkv, T, d] keys and values; Hkv divides H.
        subtree_end: int [T], first flat index after each token's subtree.
        position_ids: int [T], depth of each token; read only with ``window``.
        scale: factor on q·k, default ``d ** -0.5``.
        window: a token sees only ancestors less than this many positions above it.
        softcap: scores become ``softcap · tanh(score / softcap)``.
        sinks: [H] one extra logit a head that takes probability and gives nothing.

    Returns:
        [H, T, d] in the dtype of ``q``.

    Raises:
        ValueError: shapes do not fit, or the window is empty.
    """
    if not q.dim() == k.dim() == v.dim() == 3 or k.shape[:2] != v.shape[:2] or q.shape[1:] != k.shape[1:]:
        raise ValueError(f"tree_attention needs q [H, T, d] and k, v [Hkv, T, d] of one tree; got {_shapes(q, k, v)}")
    if k.shape[0] == 0 or q.shape[0] % k.shape[0]:
        raise ValueError(f"tree_attention: {q.shape[0]} query heads are no multiple of {k.shape[0]} key/value heads")
    if subtree_end.shape != q.shape[1:2] or position_ids.shape != q.shape[1:2]:
        raise ValueError(
            f"tree_attention: subtree_end and position_ids need shape [{q.shape[1]}]; "
            f"got {_shapes(subtree_end, position_ids)}"
        )
    if sinks is not None and sinks.shape != q.shape[:1]:
        raise ValueError(f"tree_attention: sinks need shape [{q.shape[0]}]; got {_shapes(sinks)}")
    if window is not None and window < 1:
        raise ValueError(f"tree_attention: window is {window}; a token sees at least itself")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, _ = torch.ops.kpig_fast.tree_attention(q, k, v, subtree_end, position_ids, scale, window, softcap, sinks)
    return out


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(list(tensor.shape)) for tensor in tensors)
