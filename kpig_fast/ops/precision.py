"""In which precision the operators compute: float32, or float64 for float64 inputs, whatever surrounds them."""

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of logits, scores and sums for inputs like ``x``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def without_autocast(kernel: Callable[..., Result]) -> Callable[..., Result]:
    """The kernel with autocast switched off, which would round its float32 matrix products to half precision."""

    @wraps(kernel)
    def exact(first: Tensor, *rest: object) -> Result:
        with torch.autocast(first.device.type, enabled=False):
            return kernel(first, *rest)

    return exact
