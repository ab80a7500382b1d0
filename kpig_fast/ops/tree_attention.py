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

BLOCK = 64


def _blocks(
    subtree_end: Tensor, position_ids: Tensor, window: int | None, groups: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each query block: its slice, the visible key indices [n], and 0 or -inf for each pair [groups · block, n]."""
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
        bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -math.inf)
        yield slice(start, stop), keys, bias.repeat(groups, 1)


def _empty(like: Tensor, size: int) -> Tensor:
    """[H, T, size] for ``like`` [H, T, d]; token after token in memory, as layers give and take it."""
    return like.new_empty(like.shape[1], like.shape[0], size).transpose(0, 1)


def _by_token(x: Tensor) -> Tensor:
    """[T, Hkv, d] of ``x`` [Hkv, T, d], so that all heads of a token are one piece of memory."""
    return x.transpose(0, 1).contiguous()


def _gather(tokens: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """[Hkv, n, d]: the ``keys`` among ``tokens`` [T, Hkv, d]."""
    return tokens.index_select(0, keys).to(dtype).transpose(0, 1)


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float | None, bias: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scores [Hkv, groups · block, n], -inf at hidden pairs; the derivative of the soft-cap if any."""
    if softcap is None:
        return torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale), None
    ratio = torch.bmm(q, k.transpose(1, 2)).mul_(scale / softcap).tanh_()
    return torch.add(bias, ratio, alpha=softcap), 1 - ratio * ratio


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
    keys_by_token, values_by_token = _by_token(k), _by_token(v)
    out = _empty(q, v.shape[-1])
    lse = torch.empty(q.shape[:2], dtype=compute, device=q.device)
    queries, outs, lses = (x.unflatten(0, (k.shape[0], -1)) for x in (q, out, lse))
    for block, keys, bias in _blocks(subtree_end, position_ids, window, queries.shape[1], compute):
        query = queries[:, :, block].to(compute)
        scores, _ = _scores(query.flatten(1, 2), _gather(keys_by_token, keys, compute), scale, softcap, bias)
        weights = scores.softmax(-1)
        # Of two row-wise maxima: cheaper than a second pass of exponentials.
        total = scores.amax(-1).sub_(weights.amax(-1).log_()).view(query.shape[:3])
        mixed = torch.bmm(weights, _gather(values_by_token, keys, compute)).view(*query.shape[:3], -1)
        if sinks is not None:
            with_sinks = torch.logaddexp(total, sinks.to(compute).view(k.shape[0], -1, 1))
            mixed *= (total - with_sinks).exp_()[..., None]
            total = with_sinks
        outs[:, :, block], lses[:, :, block] = mixed, total
    return out, lse


@_tree_attention.register_fake
def _(q, k, v, subtree_end, position_ids, scale, window, softcap, sinks):
    lse = torch.empty(q.shape[:2], dtype=compute_dtype(q), device=q.device)
    return _empty(q, v.shape[-1]), lse


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
    keys_by_token, values_by_token = _by_token(k), _by_token(v)
    delta = (grad.to(compute) * out.to(compute)).sum(-1).contiguous()
    dq = _empty(q, q.shape[-1])
    dk = torch.zeros(keys_by_token.shape, dtype=compute, device=k.device)
    dv = torch.zeros(values_by_token.shape, dtype=compute, device=v.device)
    queries, dqueries, grads, lses, deltas = (x.unflatten(0, (k.shape[0], -1)) for x in (q, dq, grad, lse, delta))
    for block, keys, bias in _blocks(subtree_end, position_ids, window, queries.shape[1], compute):
        query, upstream = (x[:, :, block].to(compute).flatten(1, 2) for x in (queries, grads))
        key, value = _gather(keys_by_token, keys, compute), _gather(values_by_token, keys, compute)
        scores, slope = _scores(query, key, scale, softcap, bias)
        weights = scores.sub_(lses[:, :, block].flatten(1, 2)[..., None]).exp_()
        dv.index_add_(0, keys, torch.bmm(weights.transpose(1, 2), upstream).transpose(0, 1))
        dscores = torch.bmm(upstream, value.transpose(1, 2))
        dscores.sub_(deltas[:, :, block].flatten(1, 2)[..., None]).mul_(weights)
        if slope is not None:
            dscores.mul_(slope)
        dqueries[:, :, block] = torch.bmm(dscores, key).mul_(scale).view(queries[:, :, block].shape)
        dk.index_add_(0, keys, torch.bmm(dscores.transpose(1, 2), query).transpose(0, 1), alpha=scale)
    return dq, dk.to(k.dtype).transpose(0, 1), dv.to(v.dtype).transpose(0, 1), delta


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
