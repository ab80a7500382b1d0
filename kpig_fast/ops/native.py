"""What the callers of the CPU kernels share: when they run, and tensors as addresses."""

from collections.abc import Callable

import torch
from torch import Tensor

from kpig_fast import _native


def runs_native(x: Tensor) -> bool:
    """Whether a kernel of csrc/cpu works on tensors like ``x``."""
    return x.device.type == "cpu"


def kernel(name: str, dtype: torch.dtype) -> Callable[..., None]:
    """The kernel ``name`` for float32 or float64."""
    return getattr(_native, f"{name}_{ {torch.float32: 'float', torch.float64: 'double'}[dtype] }")


def address(x: Tensor | None) -> int:
    """Where a contiguous CPU tensor starts; 0 for None."""
    assert x is None or (x.is_contiguous() and x.device.type == "cpu")
    return 0 if x is None else x.data_ptr()


def heads(x: Tensor) -> tuple[int, int, int]:
    """Address, stride of a head and stride of a token of ``x`` [heads, T, size]."""
    assert x.stride(2) == 1 or x.shape[2] == 1
    assert x.device.type == "cpu"
    return x.data_ptr(), x.stride(0), x.stride(1)
