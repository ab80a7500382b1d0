"""Log-probability of one target token a row, without a [N, V] buffer.

    out[n] = z[n, target[n]] - logsumexp_v z[n, v]      z = cap(hidden @ weight.T + bias)

N rows, D hidden size, V vocabulary. Forward: tiles of rows × vocabulary with an online log-sum-exp, nothing stored but
[N]. Backward: chunks of rows; a chunk's logits are formed again and turned into their gradient in place.
"""

import torch
from torch import Tensor

from kpig_fast.ops.head import TILE_COLUMNS, TILE_ROWS, Head, check_head, chunk_rows, compute_dtype, logits
from kpig_fast.ops.reference import IGNORE


@torch.library.custom_op("kpig_fast::response_logprob", mutates_args=())
def _response_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(hidden)
    vocabulary = weight.shape[0]
    lse = torch.full(target.shape, -torch.inf, dtype=dtype, device=hidden.device)
    picked = torch.zeros_like(lse)
    for start in range(0, vocabulary, TILE_COLUMNS):
        stop = min(start + TILE_COLUMNS, vocabulary)
        tile, tile_bias = weight[start:stop].to(dtype), None if bias is None else bias[start:stop]
        for rows in torch.arange(len(target), device=hidden.device).split(TILE_ROWS):
            block = slice(int(rows[0]), int(rows[-1]) + 1)
            z = logits(hidden[block], tile, tile_bias, softcap, logit_scale, dtype)
            lse[block] = torch.logaddexp(lse[block], z.logsumexp(-1))
            column = target[block] - start
            inside = (column >= 0) & (column < stop - start)
            value = z.gather(1, column.clamp(0, stop - start - 1)[:, None])[:, 0]
            picked[block] = torch.where(inside, value, picked[block])
    return torch.where(target == IGNORE, 0, (picked - lse).clamp_(max=0)), lse


@_response_logprob.register_fake
def _(hidden, weight, target, bias, softcap, logit_scale):
    out = torch.empty(target.shape, dtype=compute_dtype(hidden), device=hidden.device)
    return out, torch.empty_like(out)


def logprob_gradient(z: Tensor, lse: Tensor, target: Tensor, upstream: Tensor) -> Tensor:
    """Overwrite logits ``z`` [n, V] with ``upstream · (one_hot(target) - softmax(z))``; rows of -100 become 0.

    The target's entry is formed from ``1 - p`` directly, so that it keeps its relative accuracy.
    """
    upstream = torch.where(target == IGNORE, 0, upstream)[:, None]
    probability = z.sub_(lse[:, None]).exp_()
    index = target.clamp(min=0)[:, None]
    at_target = (1 - probability.gather(1, index)) * upstream
    return probability.mul_(-upstream).scatter_(1, index, at_target)


@torch.library.custom_op("kpig_fast::response_logprob_backward", mutates_args=())
def _response_logprob_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(hidden)
    head = Head(weight, bias, softcap, logit_scale, dtype, wants_weight=wants_weight, wants_bias=wants_bias)
    dhidden = torch.empty_like(hidden)
    for start in range(0, len(target), chunk_rows(weight.shape[0])):
        rows = slice(start, start + chunk_rows(weight.shape[0]))
        z = head.logits(hidden[rows])
        kept = head.before_overwriting(z)
        dz = logprob_gradient(z, lse[rows], target[rows], grad[rows].to(dtype))
        dhidden[rows] = head.backward(dz, kept, hidden[rows])
    return dhidden, head.dweight.to(weight.dtype), head.dbias if bias is None else head.dbias.to(bias.dtype)


@_response_logprob_backward.register_fake
def _(grad, hidden, weight, target, lse, bias, softcap, logit_scale, wants_weight, wants_bias):
    dbias = hidden.new_empty(weight.shape[:1] if wants_bias else (0,), dtype=lse.dtype if bias is None else bias.dtype)
    return torch.empty_like(hidden), weight.new_empty(weight.shape if wants_weight else (0,)), dbias


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, target, bias, ctx.softcap, ctx.logit_scale = inputs
    ctx.save_for_backward(hidden, weight, target, output[1], bias)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_lse):
    if grad is None:
        return (None,) * 6
    hidden, weight, target, lse, bias = ctx.saved_tensors
    wants_weight, wants_bias = ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[3]
    dhidden, dweight, dbias = torch.ops.kpig_fast.response_logprob_backward(
        grad, hidden, weight, target, lse, bias, ctx.softcap, ctx.logit_scale, wants_weight, wants_bias
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
        ValueError: shapes do not fit.
    """
    check_head("response_logprob", hidden, weight, bias, target, "target")
    out, _ = torch.ops.kpig_fast.response_logprob(hidden, weight, target, bias, softcap, logit_scale)
    return out
