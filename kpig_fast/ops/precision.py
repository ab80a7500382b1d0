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


def factor_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the factors of ``hidden @ weight.T``: on a GPU their own, since products are summed in float32."""
    if hidden.device.type == "cuda":
        return torch.promote_types(hidden.dtype, weight.dtype)
    return compute_dtype(hidden)


def shielded(kernel: Callable[..., Result]) -> Callable[..., Result]:
    """The kernel as an operator needs it: on the GPU of its first argument, and without autocast.

    Autocast would round its float32 matrix products to half precision; a GPU that is not the current one would get
    another's launches.
    """

    @wraps(kernel)
    def exact(first: Tensor, *rest: object) -> Result:
        with torch.autocast(first.device.type, enabled=False), torch.cuda.device_of(first):
            return kernel(first, *rest)

    return exact


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Factors of matrix products as autocast wants them on a GPU, where half precision is what makes them fast."""
    device = tensors[0].device.type
    if device != "cuda" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.dtype == torch.float32 else x for x in tensors)
