"""What the operators compute, in plain differentiable PyTorch: the specification that every kernel is held to.

Any floating dtype; float64 for gradient checks. Nothing here is meant to be fast or small.
Letters: T tokens of a tree, H query heads, Hkv key/value heads, d head size, N rows, D hidden size, V vocabulary.
"""

import math

import torch
from torch import Tensor

from kpig_fast.method.objective import jsd_bits

IGNORE = -100


def tree_mask(subtree_end: Tensor, position_ids: Tensor, window: int | None = None) -> Tensor:
    """bool [T, T]: may query q (row) attend to key k (column)? ``k <= q < subtree_end[k]``, and within the window.

    Args:
        subtree_end: int [T], first flat index after each token's subtree.
        position_ids: int [T], depth of each token.
        window: if given, also ``position[q] - position[k] < window``.
    """
    index = torch.arange(len(subtree_end), device=subtree_end.device)
    mask = (index[None, :] <= index[:, None]) & (index[:, None] < subtree_end[None, :])
    if window is not None:
        mask &= position_ids[:, None] - position_ids[None, :] < window
    return mask


def tree_attention_reference(
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
    """[H, T, d]: attention of each token to its ancestors and itself, with a dense [H, T, T] score matrix."""
    groups = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~tree_mask(subtree_end, position_ids, window), -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, scores.shape[1], 1).to(scores)], dim=-1)
    return scores.softmax(-1)[..., : k.shape[1]] @ v


def logits_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> Tensor:
    """[N, V]: the model's logits, ``softcap · tanh((hidden @ weight.T + bias) · logit_scale / softcap)``."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def response_logprob_reference(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N]
    *,
    bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """[N]: log-probability of each target; exactly 0 where the target is -100."""
    log_probs = logits_reference(hidden, weight, bias, softcap, logit_scale).log_softmax(-1)
    picked = log_probs.gather(1, target.clamp(min=0)[:, None])[:, 0]
    return torch.where(target == IGNORE, torch.zeros_like(picked), picked)


def linear_jsd_reference(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    ref_hidden: Tensor,  # [N, Dr]
    ref_weight: Tensor,  # [V, Dr]
    temperature: Tensor,  # [N]
    *,
    bias: Tensor | None = None,  # [V]
    ref_bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """[N]: base-2 Jensen-Shannon divergence of ``softmax(z / temperature)`` between the model and its reference."""
    z = logits_reference(hidden, weight, bias, softcap, logit_scale)
    r = logits_reference(ref_hidden, ref_weight, ref_bias, softcap, logit_scale)
    return jsd_bits(z, r, temperature)
