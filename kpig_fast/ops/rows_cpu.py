"""Row passes over the vocabulary by the kernels of csrc/cpu.

``z`` [n, V] raw products, contiguous; ``transform`` (bias, softcap, logit_scale) makes them logits.
"""

import torch
from torch import Tensor

from kpig_fast.ops.native import address, kernel

Transform = tuple[Tensor | None, float | None, float]


def score_tile(
    z: Tensor, first_column: int, target: Tensor, transform: Transform, top: Tensor, total: Tensor, picked: Tensor
) -> None:
    """Add a tile of columns to each row's running maximum, sum of exponentials and target's logit; destroys ``z``."""
    kernel("score_tile", z.dtype)(
        _rows(z, transform), first_column, address(target), address(top), address(total), address(picked),
        torch.get_num_threads(),
    )  # fmt: skip


def logprob(z: Tensor, target: Tensor, transform: Transform, out: Tensor, upstream: Tensor | None) -> None:
    """Write log-probabilities to ``out`` [n]; for an ``upstream`` [n], ``z`` becomes the gradient by it."""
    kernel("logprob_rows", z.dtype)(
        _rows(z, transform), address(target), address(upstream), address(out), torch.get_num_threads()
    )


def jsd(
    z: Tensor,
    transform: Transform,
    r: Tensor,
    ref_transform: Transform,
    t: Tensor,
    out: Tensor,
    upstream: Tensor | None,
) -> None:
    """Write divergences to ``out`` [n], destroying both sides; for an ``upstream`` [n], ``z`` becomes its gradient."""
    kernel("jsd_rows", z.dtype)(
        _rows(z, transform), _rows(r, ref_transform), address(t), address(upstream), address(out),
        torch.get_num_threads(),
    )  # fmt: skip


def _rows(z: Tensor, transform: Transform) -> tuple[int, int, int, int, int, float, float]:
    bias, softcap, scale = transform
    return address(z), z.shape[0], z.shape[1], z.stride(0), address(bias), scale, softcap or 0.0
