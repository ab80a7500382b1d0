"""Log-probability of one target token a row, without a [N, V] buffer.

    out[n] = z[n, target[n]] - logsumexp_v z[n, v]      z = cap(hidden @ weight.T + bias)

N rows, D hidden size, V vocabulary. Forward: tiles of rows × vocabulary with an online log-sum-exp, nothing stored but
[N]. Backward: chunks of rows; a chunk's logits are formed again and turned into their gradient in place.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kpig_fast.ops.head import Head, blocks, check_head, check_targets, chunks, logits, sweeps
from kpig_fast.ops.precision import compute_dtype, without_autocast
from kpig_fast.ops.reference import IGNORE

# Rows × vocabulary columns of one no-gradient tile: a float32 tile of 8 MB stays near the cores.
TILE_ROWS, TILE_COLUMNS = 512, 4096


def logprob_pass(head: Head, hidden: Tensor, target: Tensor, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] by chunks of rows; for an ``upstream`` [N] also the gradient by hidden (else empty)."""
    out = torch.empty(target.shape, dtype=head.weight.dtype, device=hidden.device)
    dhidden = hidden.new_empty(0 if upstream is None else hidden.shape)
    for rows in chunks(len(target), len(head.weight)):
        z = head.logits(hidden[rows])
        kept = None if upstream is None else head.before_overwriting(z)
        _sweep(z, target[rows], out[rows], None if upstream is None else upstream[rows])
        if upstream is not None:
            dhidden[rows] = head.backward(z, kept, hidden[rows])
        # Or the next chunk's logits would be formed beside them.
        del z, kept
    return out, dhidden


def _sweep(z: Tensor, target: Tensor, out: Tensor, upstream: Tensor | None) -> None:
    """Write log-probabilities to ``out`` [n]; for an ``upstream`` [n], logits ``z`` [n, V] become their gradient.

    The target's entry ``1 - p`` is formed from ``log p``, so that it keeps its relative accuracy near 0.
    """
    for rows in sweeps(*z.shape):
        log_p = F.log_softmax(z[rows], -1)
        counts, index = target[rows, None] != IGNORE, target[rows, None].clamp(min=0)
        picked = log_p.gather(1, index)
        out[rows] = torch.where(counts, picked, 0)[:, 0]
        if upstream is not None:
            scale = torch.where(counts, -upstream[rows, None], 0)
            torch.mul(log_p.exp_(), scale, out=z[rows]).scatter_(1, index, picked.expm1_() * scale)


@torch.library.custom_op("kpig_fast::response_logprob", mutates_args=())
@without_autocast
def _response_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> Tensor:
    check_targets(target, len(weight))
    dtype = compute_dtype(hidden)
    lse = torch.full(target.shape, -torch.inf, dtype=dtype, device=hidden.device)
    picked = torch.zeros_like(lse)
    for columns in blocks(len(weight), TILE_COLUMNS):
        tile, tile_bias = weight[columns].to(dtype), None if bias is None else bias[columns]
        for rows in blocks(len(target), TILE_ROWS):
            z = logits(hidden[rows], tile, tile_bias, softcap, logit_scale, dtype)
            lse[rows] = torch.logaddexp(lse[rows], z.logsumexp(-1))
            column = target[rows] - columns.start
            value = z.gather(1, column.clamp(0, len(tile) - 1)[:, None])[:, 0]
            picked[rows] = torch.where((column >= 0) & (column < len(tile)), value, picked[rows])
    return torch.where(target == IGNORE, 0, (picked - lse).clamp_(max=0))


@_response_logprob.register_fake
def _(hidden, weight, target, bias, softcap, logit_scale):
    return torch.empty(target.shape, dtype=compute_dtype(hidden), device=hidden.device)


@torch.library.custom_op("kpig_fast::response_logprob_backward", mutates_args=())
@without_autocast
def _response_logprob_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(hidden)
    head = Head(weight, bias, softcap, logit_scale, dtype, wants_weight=wants_weight, wants_bias=wants_bias)
    _, dhidden = logprob_pass(head, hidden, target, grad)
    return dhidden, head.dweight.to(weight.dtype), head.dbias if bias is None else head.dbias.to(bias.dtype)


@_response_logprob_backward.register_fake
def _(grad, hidden, weight, target, bias, softcap, logit_scale, wants_weight, wants_bias):
    dbias = grad.new_empty(weight.shape[:1] if wants_bias else (0,), dtype=grad.dtype if bias is None else bias.dtype)
    return torch.empty_like(hidden), weight.new_empty(weight.shape if wants_weight else (0,)), dbias


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, target, bias, ctx.softcap, ctx.logit_scale = inputs
    ctx.save_for_backward(hidden, weight, target, bias)


def _backward(ctx, grad):
    hidden, weight, target, bias = ctx.saved_tensors
    wants_weight, wants_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
    dhidden, dweight, dbias = torch.ops.kpig_fast.response_logprob_backward(
        grad, hidden, weight, target, bias, ctx.softcap, ctx.logit_scale, wants_weight, wants_bias
    )
    return dhidden, dweight if wants_weight else None, None, dbias if wants_bias else None, None, None


_response_logprob.register_autograd(_backward, setup_context=_setup_context)


def response_logprob(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N]
    *,
    bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Log-probability of each row's target token. Gradient to ``hidden``, ``weight`` and ``bias``.

    Args:
        hidden: [N, D] hidden states before the head.
        weight: [V, D] the head; ``bias`` [V] if it has one.
        target: int64 [N], token ids in ``[0, V)``; -100 gives exactly 0 and no gradient.
        softcap: logits become ``softcap · tanh(logit / softcap)`` (after ``logit_scale``).
        logit_scale: factor on the logits.

    Returns:
        float32 [N] (float64 for float64 ``hidden``), never above 0.

    Raises:
        ValueError: shapes do not fit, or a target is no token id.
    """
    check_head("response_logprob", hidden, weight, bias, target, "target")
    return torch.ops.kpig_fast.response_logprob(hidden, weight, target, bias, softcap, logit_scale)
