"""Log-probability of one target token a row, without a [N, V] buffer.

    out[n] = z[n, target[n]] - logsumexp_v z[n, v]      z = cap(hidden @ weight.T + bias)

N rows, D hidden size, V vocabulary. Forward: tiles of rows × vocabulary with an online log-sum-exp, nothing stored but
[N]. Backward: chunks of rows; a chunk's logits are formed again and turned into their gradient in place.
"""

import torch
from torch import Tensor

from kpig_fast.ops.head import (
    Head,
    Transform,
    blocks,
    check_head,
    check_targets,
    chunk_space,
    chunks,
    row_passes,
)
from kpig_fast.ops.precision import compute_dtype, without_autocast
from kpig_fast.ops.reference import IGNORE

# Rows × vocabulary columns of one no-gradient tile, 2 MB in float32: still in the cores' caches when it is swept. Few
# columns, so that their weights are too, while all rows pass.
TILE_ROWS, TILE_COLUMNS = 1024, 512


def logprob_pass(
    head: Head, hidden: Tensor, target: Tensor, upstream: Tensor | None, space: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] by chunks of rows in ``space``; for an ``upstream`` [N] also the gradient by hidden."""
    target = target.long().contiguous()
    out = torch.empty(target.shape, dtype=head.weight.dtype, device=hidden.device)
    dhidden = hidden.new_empty(0 if upstream is None else hidden.shape)
    for rows, z in chunks(space, len(target), len(head.weight)):
        head.products(hidden[rows], z)
        grad = None if upstream is None else upstream[rows]
        row_passes(z).logprob(z, target[rows], head.transform, out[rows], grad)
        if upstream is not None:
            head.backward(z, hidden[rows], dhidden[rows])
    return out, dhidden


@torch.library.custom_op("kpig_fast::response_logprob", mutates_args=())
@without_autocast
def _response_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> Tensor:
    check_targets(target, len(weight))
    dtype, target = compute_dtype(hidden), target.long().contiguous()
    top = torch.full(target.shape, -torch.inf, dtype=dtype, device=hidden.device)
    total, picked = torch.zeros_like(top), torch.zeros_like(top)
    space = top.new_empty(min(TILE_ROWS, len(target)) * min(TILE_COLUMNS, len(weight)))
    for columns in blocks(len(weight), TILE_COLUMNS):
        tile = weight[columns].to(dtype).t()
        transform = Transform(None if bias is None else bias[columns].to(dtype).contiguous(), softcap, logit_scale)
        for rows in blocks(len(target), TILE_ROWS):
            z = space[: (rows.stop - rows.start) * tile.shape[1]].view(-1, tile.shape[1])
            torch.mm(hidden[rows].to(dtype), tile, out=z)
            state = top[rows], total[rows], picked[rows]
            row_passes(z).score_tile(z, columns.start, target[rows], transform, *state)
    return torch.where(target == IGNORE, 0, ((picked - top) - total.log()).clamp_(max=0))


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
    space = chunk_space(head.weight, len(hidden), len(weight))
    _, dhidden = logprob_pass(head, hidden, target, grad.to(dtype).contiguous(), space)
    dweight, dbias = head.gradients()
    return dhidden, dweight.to(weight.dtype), dbias if bias is None else dbias.to(bias.dtype)


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
