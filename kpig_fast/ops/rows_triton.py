"""Row passes over the vocabulary in Triton, for GPUs.

``z`` [n, V] raw products in float32, each row contiguous; ``transform`` (bias, softcap, logit_scale) makes them logits.
``gradient``, if one is wanted: the upstream gradient [n], and where to write the gradient by ``z`` [n, V], each row
over its own row of ``z``, in float32 or half precision. Vectors [n] are contiguous.
A program takes a row and reads it twice: for its maximum and sum of exponentials, and for the gradient or the
divergence; the gradient of a divergence takes a third reading.
"""

# A kernel's compile-time arguments are given as plain values, which a checker does not expect.
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import Any

from torch import Tensor

from kpig_fast.ops.rows_triton_kernels import jsd_kernel, logprob_kernel, score_tile_kernel

Transform = tuple[Tensor | None, float | None, float]
Gradient = tuple[Tensor, Tensor] | None

# Columns that a program takes at a time, and its warps: one load of 16 bytes a thread, few enough registers for four
# programs or more on a multiprocessor.
# Products and sums are fused only where the kernels say so: then two equal rows have a divergence of exactly 0.
OPTIONS: dict[str, Any] = {"BLOCK": 1024, "num_warps": 8, "enable_fp_fusion": False}


def score_tile(
    z: Tensor, first_column: int, target: Tensor, transform: Transform, top: Tensor, total: Tensor, picked: Tensor
) -> None:
    """Add a tile of columns to each row's running maximum, sum of exponentials and target's logit."""
    bias, inner, outer = factors(transform)
    score_tile_kernel[(len(z),)](
        z, target, bias, top, total, picked, row_stride(z), first_column, z.shape[1], inner, outer, **OPTIONS
    )  # fmt: skip


def logprob(z: Tensor, target: Tensor, transform: Transform, out: Tensor, gradient: Gradient) -> None:
    """Write log-probabilities to ``out`` [n]."""
    bias, inner, outer = factors(transform)
    upstream, dz = gradient or (None, None)
    logprob_kernel[(len(z),)](
        z, target, bias, out, upstream, dz, row_stride(z), row_stride(dz), z.shape[1], inner, outer, transform[2],
        **OPTIONS,
    )  # fmt: skip


def jsd(
    z: Tensor,
    transform: Transform,
    r: Tensor,
    ref_transform: Transform,
    t: Tensor,
    out: Tensor,
    gradient: Gradient,
) -> None:
    """Write divergences to ``out`` [n]."""
    (bias, inner, outer), (ref_bias, ref_inner, ref_outer) = factors(transform), factors(ref_transform)
    upstream, dz = gradient or (None, None)
    jsd_kernel[(len(z),)](
        z, r, bias, ref_bias, t, out, upstream, dz, row_stride(z), row_stride(r), row_stride(dz), z.shape[1], inner,
        outer, transform[2], ref_inner, ref_outer, **OPTIONS,
    )  # fmt: skip


def factors(transform: Transform) -> tuple[Tensor | None, float | None, float]:
    """Bias, ``inner`` and ``outer`` of logits ``outer · tanh(inner · (z + bias))``; without a cap ``inner`` is None."""
    bias, softcap, scale = transform
    return (bias, None, scale) if softcap is None else (bias, scale / softcap, softcap)


def row_stride(x: Tensor | None) -> int:
    """Entries from one row of ``x`` [n, V] to the next."""
    if x is None:
        return 0
    assert x.stride(1) == 1 or x.shape[1] == 1
    return x.stride(0)
