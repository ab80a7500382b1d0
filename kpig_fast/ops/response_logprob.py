"""Log-probability of one target token a row, without a [N, V] buffer.

    out[n] = z[n, target[n]] - logsumexp_v z[n, v]      z = cap(hidden @ weight.T + bias)

N rows, D hidden size, V vocabulary. Forward: tiles of rows × vocabulary with an online log-sum-exp, nothing stored but
[N]. Backward: chunks of rows; a chunk's logits are formed again and turned into their gradient in place.
"""

import importlib.util

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
    multiply,
    row_passes,
    tile_passes,
)
from kpig_fast.ops.log import took
from kpig_fast.ops.precision import compute_dtype, factor_dtype, shielded, under_autocast
from kpig_fast.ops.reference import IGNORE

# Rows × vocabulary columns of one no-gradient tile, 2 MB in float32: still in the cores' caches when it is swept. Few
# columns, so that their weights are too, while all rows pass.
CPU_TILE = 1024, 512
# The same on a GPU, 32 MB for its L2 cache: enough rows and columns to fill it with matrix products.
GPU_TILE = 4096, 2048


def logprob_pass(
    head: Head, hidden: Tensor, target: Tensor, upstream: Tensor | None, space: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] by chunks of rows in ``space``; for an ``upstream`` [N] also the gradient by hidden."""
    target = target.long().contiguous()
    out = space.new_empty(target.shape)
    dhidden = hidden.new_empty(0 if upstream is None else hidden.shape)
    for rows, (z,) in chunks(space, len(target), len(head.weight)):
        head.products(hidden[rows], z)
        gradient = None if upstream is None else (upstream[rows], head.gradient_of(z))
        row_passes(z, sides=1).logprob(z, target[rows], head.transform, out[rows], gradient)
        if gradient is not None:
            head.backward(gradient[1], hidden[rows], dhidden[rows])
    return out, dhidden


@torch.library.custom_op("kpig_fast::response_logprob", mutates_args=())
@shielded
def _response_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> Tensor:
    check_targets(target, len(weight))
    target = target.long().contiguous()
    top = torch.full(target.shape, -torch.inf, dtype=compute_dtype(hidden), device=hidden.device)
    total, picked = torch.zeros_like(top), torch.zeros_like(top)
    bias = None if bias is None else bias.to(top.dtype).contiguous()
    _scores(hidden, weight, target, Transform(bias, softcap, logit_scale), (top, total, picked))
    return torch.where(target == IGNORE, 0, ((picked - top) - total.log()).clamp_(max=0))


def _scores(
    hidden: Tensor, weight: Tensor, target: Tensor, transform: Transform, state: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Bring each row's running maximum, sum of exponentials and target's logit over the whole vocabulary."""
    on_gpu = hidden.device.type == "cuda"
    if on_gpu and importlib.util.find_spec("triton"):
        from kpig_fast.ops import scoring_triton

        if scoring_triton.takes(hidden, weight):
            took(f"scoring of {hidden.dtype} on a GPU", "one Triton kernel", f"hidden size {hidden.shape[1]}")
            scoring_triton.score(hidden, weight, target, transform, *state)
            return
    factors, (n_rows, n_columns) = factor_dtype(hidden, weight), GPU_TILE if on_gpu else CPU_TILE
    space = state[0].new_empty(min(n_rows, len(target)), min(n_columns, len(weight)))
    for columns in blocks(len(weight), n_columns):
        tile = weight[columns].to(factors).t()
        of_tile = transform._replace(bias=None if transform.bias is None else transform.bias[columns])
        for rows in blocks(len(target), n_rows):
            z = space[: rows.stop - rows.start, : tile.shape[1]]
            multiply(hidden[rows].to(factors), tile, z)
            of_rows = (x[rows] for x in state)
            tile_passes(z).score_tile(z, columns.start, target[rows], of_tile, *of_rows)


@_response_logprob.register_fake
def _(hidden, weight, target, bias, softcap, logit_scale):
    return torch.empty(target.shape, dtype=compute_dtype(hidden), device=hidden.device)


@torch.library.custom_op("kpig_fast::response_logprob_backward", mutates_args=())
@shielded
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
    head = Head(weight, bias, softcap, logit_scale, hidden, wants_weight=wants_weight, wants_bias=wants_bias)
    space = chunk_space(head, len(hidden))
    _, dhidden = logprob_pass(head, hidden, target, grad.to(space.dtype).contiguous(), space)
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
    hidden, weight = under_autocast(hidden, weight)
    return torch.ops.kpig_fast.response_logprob(hidden, weight, target, bias, softcap, logit_scale)
