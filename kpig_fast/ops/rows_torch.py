"""Row passes over the vocabulary in plain PyTorch, for devices that have no kernels of their own.

``z`` [n, V] raw products; ``transform`` (bias, softcap, logit_scale) makes them logits.
``gradient``, if one is wanted: the upstream gradient [n], and where to write the gradient by ``z`` [n, V], over ``z``.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kpig_fast.ops.reference import IGNORE

LN2 = math.log(2.0)
# Elements that the passes take at a time.
SWEEP_ELEMENTS = 2**20

Transform = tuple[Tensor | None, float | None, float]
Gradient = tuple[Tensor, Tensor] | None


def score_tile(
    z: Tensor, first_column: int, target: Tensor, transform: Transform, top: Tensor, total: Tensor, picked: Tensor
) -> None:
    """Add a tile of columns to each row's running maximum, sum of exponentials and target's logit; destroys ``z``."""
    _to_logits(z, transform)
    column = target - first_column
    value = z.gather(1, column.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
    picked.copy_(torch.where((column >= 0) & (column < z.shape[1]), value, picked))
    now = torch.maximum(top, z.amax(-1))
    total.mul_((top - now).exp_()).add_(z.sub_(now[:, None]).exp_().sum(-1))
    top.copy_(now)


def logprob(z: Tensor, target: Tensor, transform: Transform, out: Tensor, gradient: Gradient) -> None:
    """Write log-probabilities to ``out`` [n].

    The target's entry ``1 - p`` is formed from ``log p``, so that it keeps its relative accuracy near 0.
    """
    for rows in _sweeps(z):
        slope = _to_logits(z[rows], transform)
        log_p = F.log_softmax(z[rows], -1)
        counts, index = target[rows, None] != IGNORE, target[rows, None].clamp(min=0)
        picked = log_p.gather(1, index)
        out[rows] = torch.where(counts, picked, 0)[:, 0]
        if gradient is not None:
            upstream, dz = gradient
            scale = torch.where(counts, -upstream[rows, None], 0)
            dz[rows] = log_p.exp_().mul_(scale).scatter_(1, index, picked.expm1_() * scale).mul_(slope)


def jsd(
    z: Tensor,
    transform: Transform,
    r: Tensor,
    ref_transform: Transform,
    t: Tensor,
    out: Tensor,
    gradient: Gradient,
) -> None:
    """Write divergences to ``out`` [n], destroying both sides.

    With ``a, b`` the log-probabilities of p, q and m their mean: ``log(p/m) = ln 2 + logsigmoid(a - b)``,
    ``log(q/m) = ln 2 + logsigmoid(b - a)``, and ``d out/dz = p (log(p/m) - KL_p) / (2 t ln 2)``: finite where both
    probabilities underflow.
    """
    for rows in _sweeps(z):
        slope = _to_logits(z[rows], transform)
        _to_logits(r[rows], ref_transform)
        by = t[rows, None]
        a, b = F.log_softmax(z[rows].div_(by), -1), F.log_softmax(r[rows].div_(by), -1)
        difference = a - b
        log_pm = F.logsigmoid(difference).add_(LN2)
        log_qm = F.logsigmoid(difference.neg_()).add_(LN2)
        kl_q = log_qm.mul_(b.exp_()).sum(-1)
        p = a.exp_()
        kl_p = (p * log_pm).sum(-1)
        out[rows] = ((kl_p + kl_q) / (2 * LN2)).clamp_(min=0)
        if gradient is not None:
            upstream, dz = gradient
            factor = upstream[rows, None] / (2 * LN2 * by)
            dz[rows] = log_pm.sub_(kl_p[:, None]).mul_(factor).mul_(p).mul_(slope)


def _to_logits(z: Tensor, transform: Transform) -> Tensor | float:
    """Turn raw products into logits in place; their derivative by the products."""
    bias, softcap, scale = transform
    if bias is not None:
        z.add_(bias)
    if softcap is None:
        z.mul_(scale)
        return scale
    z.mul_(scale / softcap).tanh_()
    slope = (1 - z * z) * scale
    z.mul_(softcap)
    return slope


def _sweeps(z: Tensor) -> Iterator[slice]:
    size = max(1, SWEEP_ELEMENTS // z.shape[1])
    return (slice(start, start + size) for start in range(0, len(z), size))
