"""Attention on a token tree in plain PyTorch, for devices that have no kernel of their own.

Queries are taken in blocks of consecutive tokens. A block sees only the keys whose subtree reaches it: the path from
the root to its first token, and the block itself. Those keys are gathered once a block, so that time and memory are
O(T · (depth + block)) instead of O(T²), and the backward pass recomputes a block's probabilities from its log-sum-exp.
Letters and arguments are those of ``kpig_fast.ops.tree_attention``.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kpig_fast.ops.precision import compute_dtype

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
    compute = compute_dtype(q)
    keys_by_token, values_by_token = _by_token(k), _by_token(v)
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
    keys_by_token, values_by_token = _by_token(k), _by_token(v)
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
    return dk.transpose(0, 1), dv.transpose(0, 1)
