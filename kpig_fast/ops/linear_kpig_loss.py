"""The whole training loss over the vocabulary, gradients included, in one pass over the logits.

    loss = -ce_scale · sum_n log p(target[n]) + jsd_scale · sum_m JSD[m]

The factors are known before the loss is (they are constants of the optimizer batch), so a chunk's logits become their
gradient right after they were formed: 3 matrix products for the cross-entropy and 4 for the divergence, none repeated.
``response_logprob`` and ``linear_jsd``, whose upstream gradient arrives later, pay one more product each.
N complete rows, M masked rows, D and Dr hidden sizes, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kpig_fast.ops.head import Head, check_head, check_targets, chunk_space
from kpig_fast.ops.linear_jsd import check_sides, jsd_pass
from kpig_fast.ops.precision import compute_dtype, shielded, under_autocast
from kpig_fast.ops.response_logprob import logprob_pass


class KPIGLoss(NamedTuple):
    """``loss`` [] with its graph; ``log_probs`` [N] and ``jsd`` [M] for the logs, without one."""

    loss: Tensor
    log_probs: Tensor
    jsd: Tensor


@torch.library.custom_op("kpig_fast::linear_kpig_loss", mutates_args=())
@shielded
def _linear_kpig_loss(
    hidden: Tensor,
    target: Tensor,
    masked_hidden: Tensor,
    ref_hidden: Tensor,
    temperature: Tensor,
    weight: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ce_scale: float,
    jsd_scale: float,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_targets(target, weight.shape[0])
    dtype = compute_dtype(hidden)
    head = Head(weight, bias, softcap, logit_scale, hidden, wants_weight=wants_weight, wants_bias=wants_bias)
    ref_head = Head(ref_weight, ref_bias, softcap, logit_scale, ref_hidden)
    wants_any = wants_hidden or wants_weight or wants_bias
    by_log_prob = hidden.new_full(target.shape, -ce_scale, dtype=dtype) if wants_any else None
    by_jsd = hidden.new_full(temperature.shape, jsd_scale, dtype=dtype) if wants_any else None
    space = chunk_space(head, max((len(hidden) + 1) // 2, len(masked_hidden)), sides=2)
    log_probs, dhidden = logprob_pass(head, hidden, target, by_log_prob, space)
    jsd, dmasked = jsd_pass(head, masked_hidden, ref_head, ref_hidden, temperature, by_jsd, space)
    loss = jsd.sum() * jsd_scale - log_probs.sum() * ce_scale
    dweight, dbias = head.gradients()
    return loss, log_probs, jsd, dhidden, dmasked, dweight.to(weight.dtype), dbias


@_linear_kpig_loss.register_fake
def _(
    hidden, target, masked, ref_hidden, t, weight, ref_weight, bias, ref_bias, softcap, logit_scale, ce_scale,
    jsd_scale, wants_hidden, wants_weight, wants_bias,
):  # fmt: skip
    dtype = compute_dtype(hidden)
    wants_any = wants_hidden or wants_weight or wants_bias
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(target.shape, dtype=dtype),
        hidden.new_empty(t.shape, dtype=dtype),
        hidden.new_empty(hidden.shape if wants_any else (0,)),
        hidden.new_empty(masked.shape if wants_any else (0,)),
        weight.new_empty(weight.shape if wants_weight else (0,)),
        hidden.new_empty(weight.shape[:1] if wants_bias else (0,), dtype=dtype),
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.bias_dtype = None if inputs[7] is None else inputs[7].dtype
    ctx.save_for_backward(*output[3:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    dhidden, dmasked, dweight, dbias = ctx.saved_tensors
    wants = ctx.needs_input_grad
    grads = [None] * len(wants)
    if grad is not None:
        # Mostly the loss itself is differentiated: then no second copy of the weight's gradient is made. A tracer's
        # tensor has no value to look at, and looking at one on a GPU would wait for it.
        plain = type(grad) is Tensor and grad.device.type == "cpu" and grad.item() == 1
        for index, saved in ((0, dhidden), (2, dmasked), (5, dweight), (7, dbias)):
            if wants[index]:
                scaled = saved if plain else grad * saved
                grads[index] = scaled.to(ctx.bias_dtype if index == 7 else saved.dtype)
    return tuple(grads)


_linear_kpig_loss.register_autograd(_backward, setup_context=_setup_context)


def linear_kpig_loss(
    hidden: Tensor,  # [N, D]
    target: Tensor,  # [N]
    masked_hidden: Tensor,  # [M, D]
    ref_hidden: Tensor,  # [M, Dr]
    temperature: Tensor,  # [M]
    weight: Tensor,  # [V, D]
    ref_weight: Tensor,  # [V, Dr]
    *,
    ce_scale: float,
    jsd_scale: float,
    bias: Tensor | None = None,  # [V]
    ref_bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> KPIGLoss:
    """``-ce_scale · sum log p(target) + jsd_scale · sum JSD`` (Eq. 5), its gradient formed on the way.

    Gradient to ``hidden``, ``masked_hidden``, ``weight`` and ``bias``; that to a frozen head is not computed.

    Args:
        hidden, target: [N, D], int64 [N] complete rows and their targets (-100: left out).
        masked_hidden, ref_hidden, temperature: [M, D], [M, Dr], [M] masked rows of the model and of its reference.
        weight, bias / ref_weight, ref_bias: [V, D], [V] / [V, Dr], [V] the heads.
        ce_scale, jsd_scale: factors on the two sums.
        softcap, logit_scale: as in ``response_logprob``.

    Raises:
        ValueError: shapes do not fit, or a target is no token id.
    """
    check_head("linear_kpig_loss", hidden, weight, bias, target, "target")
    masked, reference = (masked_hidden, weight, bias), (ref_hidden, ref_weight, ref_bias)
    check_sides("linear_kpig_loss, masked rows,", masked, reference, temperature)
    hidden, masked_hidden, weight = under_autocast(hidden, masked_hidden, weight)
    ref_hidden, ref_weight = under_autocast(ref_hidden, ref_weight)
    grad = torch.is_grad_enabled()
    wants_hidden = grad and (hidden.requires_grad or masked_hidden.requires_grad)
    wants_bias = grad and bias is not None and bias.requires_grad
    out = torch.ops.kpig_fast.linear_kpig_loss(
        hidden, target, masked_hidden, ref_hidden, temperature, weight, ref_weight, bias, ref_bias, softcap,
        logit_scale, ce_scale, jsd_scale, wants_hidden, grad and weight.requires_grad, wants_bias,
    )  # fmt: skip
    return KPIGLoss(*out[:3])
