"""What the interpreter of Triton does not look for: loads and stores outside of a kernel's arguments."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor


def addresses(x: Tensor) -> Tensor:
    """Where each entry of ``x`` lies."""
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        offsets = offsets[..., None] + torch.arange(size) * stride
    return x.data_ptr() + offsets.flatten() * x.element_size()


@contextmanager
def touches_only(*tensors: Tensor | None, stores: bool = True) -> Iterator[None]:
    """Holds interpreted kernels to loads from, and stores to, entries of ``tensors``."""
    allowed = torch.cat([addresses(x) for x in tensors if x is not None]).numpy().astype(np.uint64)
    builder = pytest.importorskip("triton").runtime.interpreter.InterpreterBuilder
    with pytest.MonkeyPatch.context() as patch:
        for name, mask_at in (("create_masked_load", 0), ("create_masked_store", 1))[: 2 if stores else 1]:
            plain = getattr(builder, name)

            def checked(self, pointers, *args, plain=plain, mask_at=mask_at):
                assert np.isin(pointers.data[args[mask_at].data], allowed).all()
                return plain(self, pointers, *args)

            patch.setattr(builder, name, checked)
        yield
