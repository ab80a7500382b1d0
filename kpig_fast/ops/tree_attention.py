"""Attention on a token tree: every token attends to its ancestors and itself.

    out[h, q] = sum_k softmax_k(cap(scale · q·k))[k] · v[k]      over k with  k <= q < subtree_end[k]

H query heads, Hkv key/value heads (grouped-query), T tokens in depth-first order, d head size.
Queries are taken in blocks of consecutive tokens. A block sees only the keys whose subtree reaches it: the path from
the root to its first token, and the block itself. Those keys are gathered once a block, so that time and memory are
O(T · (depth + block)) instead of O(T²), and the backward pass recomputes a block's probabilities from its log-sum-exp.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kpig_fast.ops.precision import compute_dtype, without_autocast

BLOCK = 128


def _blocks(subtree_end: Tensor, position_ids: Tensor, window: int | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each query block: its slice, the visible key indices [n], and the hidden pairs as bool [block, n]."""
    tokens = len(subtree_end)
    index = torch.arange(tokens, device=subtree_end.device)
    for start in range(0, tokens, BLOCK):
        stop = min(start + BLOCK, tokens)
        reaches = subtree_end[:stop] > start
        if window is not None:
            reaches &= position_ids[:stop] > position_ids[start:stop].min() - window
        keys = reaches.nonzero()[:, 0]
        query = index[start:stop, None]
        hidden = (keys > query) | (query >= subtree_end[keys])
        if window is not None:
            hidden |= position_ids[start:stop, None] - position_ids[keys] >= window
        yield slice(start, stop), keys, hidden


def _scores(q: Tensor, k: Tensor, softcap: float | None, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scores [Hkv, group, block, n] of scaled queries, -inf at hidden pairs; the derivative of the soft-cap if any."""
    scores = torch.matmul(q.flatten(1, 2), k.transpose(1, 2)).view(*q.shape[:3], k.shape[1])
    slope = None
    if softcap is not None:
        ratio = scores.div_(softcap).tanh_()
        slope = 1 - ratio * ratio
        scores = ratio * softcap
    return scores.masked_fill_(hidden, -math.inf), slope


@torch.library.custom_op("kpig_fast::tree_attention", mutates_args=())
@without_autocast
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
    compute = compute_dtype(q)
    grouped = q.unflatten(0, (k.shape[0], -1))
    out = torch.empty(*grouped.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(grouped.shape[:-1], dtype=compute, device=q.device)
    for block, keys, hidden in _blocks(subtree_end, position_ids, window):
        query = grouped[:, :, block].to(compute) * scale
        scores, _ = _scores(query, k.index_select(1, keys).to(compute), softcap, hidden)
        top = scores.amax(-1, keepdim=True)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total += (sinks.to(compute).view(k.shape[0], -1, 1, 1) - top).exp_()
        lse[:, :, block] = total.log().add_(top)[..., 0]
        mixed = torch.matmul(weights.flatten(1, 2), v.index_select(1, keys).to(compute))
        out[:, :, block] = mixed.view(*query.shape[:3], -1).div_(total)
    return out.flatten(0, 1), lse.flatten(0, 1)


@_tree_attention.register_fake
def _(q, k, v, subtree_end, position_ids, scale, window, softcap, sinks):
    lse = torch.empty(q.shape[:2], dtype=compute_dtype(q), device=q.device)
    return torch.empty(*q.shape[:2], v.shape[-1], dtype=q.dtype, device=q.device), lse


@torch.library.custom_op("kpig_fast::tree_attention_backward", mutates_args=())
@without_autocast
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
    compute = compute_dtype(q)
    kv_heads = k.shape[0]

    def grouped(x: Tensor) -> Tensor:
        return x.unflatten(0, (kv_heads, -1))

    queries, grads, totals = grouped(q), grouped(grad), grouped(lse)
    delta = grouped((grad.to(compute) * out.to(compute)).sum(-1))
    dq = torch.empty(queries.shape, dtype=q.dtype, device=q.device)
    dk = torch.zeros(k.shape, dtype=compute, device=k.device)
    dv = torch.zeros(v.shape, dtype=compute, device=v.device)
    for block, keys, hidden in _blocks(subtree_end, position_ids, window):
        query, upstream = queries[:, :, block].to(compute) * scale, grads[:, :, block].to(compute)
        key, value = k.index_select(1, keys).to(compute), v.index_select(1, keys).to(compute)
        scores, slope = _scores(query, key, softcap, hidden)
        weights = scores.sub_(totals[:, :, block, None]).exp_()
        flat = upstream.flatten(1, 2)
        dv.index_add_(1, keys, torch.matmul(weights.flatten(1, 2).transpose(1, 2), flat))
        dscores = torch.matmul(flat, value.transpose(1, 2)).view_as(weights)
        dscores.sub_(delta[:, :, block, None]).mul_(weights)
        if slope is not None:
            dscores.mul_(slope)
        dscores = dscores.flatten(1, 2)
        dq[:, :, block] = torch.matmul(dscores, key).mul_(scale).view_as(query)
        dk.index_add_(1, keys, torch.matmul(dscores.transpose(1, 2), query.flatten(1, 2)))
    return dq.view(q.shape), dk.to(k.dtype), dv.to(v.dtype), delta.flatten(0, 1)


@_tree_attention_backward.register_fake
def _(grad, q, k, v, out, lse, subtree_end, position_ids, scale, window, softcap):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(lse)


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
