"""Row passes over the vocabulary by the kernels of csrc/cpu.

``z`` [n, V] raw products, each row contiguous; ``transform`` (bias, softcap, logit_scale) makes them logits.
``gradient``, if one is wanted: the upstream gradient [n], and ``z`` again, which becomes the gradient by it.
"""

import torch
from torch import Tensor

from kpig_fast.ops.native import address, kernel

Transform = tuple[Tensor | None, float | None, float]
Gradient = tuple[Tensor, Tensor] | None


def score_tile(
    z: Tensor, first_column: int, target: Tensor, transform: Transform, top: Tensor, total: Tensor, picked: Tensor
) -> None:
    """Add a tile of columns to each row's running maximum, sum of exponentials and target's logit; destroys ``z``."""
    kernel("score_tile", z.dtype)(
        _rows(z, transform), first_column, address(target), address(top), address(total), address(picked),
        torch.get_num_threads(),
    )  # fmt: skip


def logprob(z: Tensor, target: Tensor, transform: Transform, out: Tensor, gradient: Gradient) -> None:
    """Write log-probabilities to ``out`` [n]."""
    kernel("logprob_rows", z.dtype)(
        _rows(z, transform), address(target), _upstream(z, gradient), address(out), torch.get_num_threads()
    )


def jsd(
    z: Tensor,
    transform: Transform,
    r: Tensor,
    ref_transform: Transform,
    t: Tensor,
    out: Tensor,
    gradient: Gradient,
) -> None:
    """Write divergences to ``out`` [n]; with a ``gradient``, ``r`` is destroyed."""
    kernel("jsd_rows", z.dtype)(
        _rows(z, transform), _rows(r, ref_transform), address(t), _upstream(z, gradient), address(out),
        torch.get_num_threads(),
    )  # fmt: skip


def _rows(z: Tensor, transform: Transform) -> tuple[int, int, int, int, int, float, float]:
    bias, softcap, scale = transform
    assert z.stride(1) == 1 or z.shape[1] == 1
    return z.data_ptr(), z.shape[0], z.shape[1], z.stride(0), address(bias), scale, softcap or 0.0


def _upstream(z: Tensor, gradient: Gradient) -> int:
    if gradient is None:
        return 0
    assert gradient[1] is z
    return address(gradient[0])
