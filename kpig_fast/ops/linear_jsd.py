"""Jensen-Shannon divergence between a model and its reference, one a row, without a [N, V] buffer.

    out[n] = JSD(softmax(z[n] / t[n]) ‖ softmax(r[n] / t[n])) in bits
    z = cap(hidden @ weight.T + bias)      r = cap(ref_hidden @ ref_weight.T + ref_bias)

N rows, D and Dr hidden sizes, V vocabulary, t the temperature of each row. Both directions work on chunks of rows; the
backward pass forms a chunk's products again and overwrites them with their gradient.
The divergence is symmetric, so the gradient by the reference side is the same operator with the sides exchanged.
"""

import torch
from torch import Tensor

from kpig_fast.ops.head import Head, check_head, chunk_space, chunks, row_passes
from kpig_fast.ops.precision import compute_dtype, shielded, under_autocast

Side = tuple[Tensor, Tensor, Tensor | None]


def jsd_pass(
    head: Head,
    hidden: Tensor,
    ref_head: Head,
    ref_hidden: Tensor,
    temperature: Tensor,
    upstream: Tensor | None,
    space: Tensor,
) -> tuple[Tensor, Tensor]:
    """Divergences [N] by chunks of rows in ``space``; for an ``upstream`` [N] also the gradient by hidden."""
    t = temperature.to(space.dtype).contiguous()
    out = torch.empty_like(t)
    dhidden = hidden.new_empty(0 if upstream is None else hidden.shape)
    for rows, (z, r) in chunks(space, len(t), len(head.weight), sides=2):
        head.products(hidden[rows], z)
        ref_head.products(ref_hidden[rows], r)
        gradient = None if upstream is None else (upstream[rows], head.gradient_of(z))
        row_passes(z, sides=2).jsd(z, head.transform, r, ref_head.transform, t[rows], out[rows], gradient)
        if gradient is not None:
            head.backward(gradient[1], hidden[rows], dhidden[rows])
    return out, dhidden


def check_sides(name: str, model: Side, reference: Side, temperature: Tensor) -> None:
    """Raise ValueError unless both sides' (hidden, weight, bias) fit together and have one vocabulary."""
    check_head(name, *model, temperature, "temperature")
    check_head(f"{name}, reference side,", *reference, temperature, "temperature")
    sizes = len(model[1]), len(reference[1])
    if sizes[0] != sizes[1]:
        raise ValueError(f"{name} compares distributions over one vocabulary; got {sizes[0]} and {sizes[1]} entries")


@torch.library.custom_op("kpig_fast::linear_jsd", mutates_args=())
@shielded
def _linear_jsd(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    head = Head(weight, bias, softcap, logit_scale, hidden)
    ref_head = Head(ref_weight, ref_bias, softcap, logit_scale, ref_hidden)
    space = chunk_space(head, len(hidden), sides=2)
    out, _ = jsd_pass(head, hidden, ref_head, ref_hidden, temperature, None, space)
    return out


@_linear_jsd.register_fake
def _(hidden, weight, ref_hidden, ref_weight, temperature, bias, ref_bias, softcap, logit_scale):
    return torch.empty(temperature.shape, dtype=compute_dtype(hidden), device=hidden.device)


@torch.library.custom_op("kpig_fast::linear_jsd_backward", mutates_args=())
@shielded
def _linear_jsd_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(weight, bias, softcap, logit_scale, hidden, wants_weight=wants_weight, wants_bias=wants_bias)
    ref_head = Head(ref_weight, ref_bias, softcap, logit_scale, ref_hidden)
    space = chunk_space(head, len(hidden), sides=2)
    _, dhidden = jsd_pass(head, hidden, ref_head, ref_hidden, temperature, grad.to(space.dtype).contiguous(), space)
    dweight, dbias = head.gradients()
    return dhidden, dweight.to(weight.dtype), dbias if bias is None else dbias.to(bias.dtype)


@_linear_jsd_backward.register_fake
def _(grad, hidden, weight, ref_hidden, ref_weight, t, bias, ref_bias, softcap, scale, wants_weight, wants_bias):
    dtype = compute_dtype(hidden) if bias is None else bias.dtype
    dbias = hidden.new_empty(weight.shape[:1] if wants_bias else (0,), dtype=dtype)
    return torch.empty_like(hidden), weight.new_empty(weight.shape if wants_weight else (0,)), dbias


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, ref_hidden, ref_weight, temperature, bias, ref_bias, ctx.softcap, ctx.logit_scale = inputs
    ctx.save_for_backward(hidden, weight, ref_hidden, ref_weight, temperature, bias, ref_bias)


def _backward(ctx, grad):
    hidden, weight, ref_hidden, ref_weight, t, bias, ref_bias = ctx.saved_tensors
    wants = ctx.needs_input_grad

    def side(own: Side, other: Side, wants_hidden: bool, wants_weight: bool, wants_bias: bool) -> list[Tensor | None]:
        if not (wants_hidden or wants_weight or wants_bias):
            return [None, None, None]
        grads = torch.ops.kpig_fast.linear_jsd_backward(
            grad, own[0], own[1], other[0], other[1], t, own[2], other[2], ctx.softcap, ctx.logit_scale,
            wants_weight, wants_bias,
        )  # fmt: skip
        return [g if w else None for g, w in zip(grads, (wants_hidden, wants_weight, wants_bias))]

    model, reference = (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias)
    dhidden, dweight, dbias = side(model, reference, wants[0], wants[1], wants[5])
    dref_hidden, dref_weight, dref_bias = side(reference, model, wants[2], wants[3], wants[6])
    return dhidden, dweight, dref_hidden, dref_weight, None, dbias, dref_bias, None, None


_linear_jsd.register_autograd(_backward, setup_context=_setup_context)


def linear_jsd(
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
    """Base-2 Jensen-Shannon divergence of each row's ``softmax(logits / temperature)`` from the reference's (Eq. 4).

    Gradient to ``hidden``, ``weight`` and ``bias``, and to the reference side where it requires one; none to
    ``temperature``.

    Args:
        hidden, weight, bias: [N, D], [V, D], [V] the model's side.
        ref_hidden, ref_weight, ref_bias: [N, Dr], [V, Dr], [V] the reference's side.
        temperature: [N] positive, one a row.
        softcap, logit_scale: as in ``response_logprob``, for both sides.

    Returns:
        float32 [N] in [0, 1] (float64 for float64 ``hidden``).

    Raises:
        ValueError: shapes do not fit.
    """
    check_sides("linear_jsd", (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias), temperature)
    hidden, weight, ref_hidden, ref_weight = under_autocast(hidden, weight, ref_hidden, ref_weight)
    return torch.ops.kpig_fast.linear_jsd(
        hidden, weight, ref_hidden, ref_weight, temperature, bias, ref_bias, softcap, logit_scale
    )
