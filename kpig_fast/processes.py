"""Work shared over the processes of one launch (``torchrun``, ``accelerate launch``); a lone process does all of it."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TypeVar

import torch
from torch import distributed

Item = TypeVar("Item")


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if _together() else 1


def rank() -> int:
    """The number of this one; process 0 writes and speaks."""
    return distributed.get_rank() if _together() else 0


def wait() -> None:
    """Go on when every process has come here."""
    if _together():
        distributed.barrier()


def leave() -> None:
    """End what the processes have in common, when the work of all is done and no wrapped model is in use any more."""
    if _together():
        # A wrapper of DDP that outlived the group would end it while it holds the interpreter's lock: for ever.
        gc.collect()
        wait()
        # Its threads, still running when the interpreter ends, would end the process by a signal.
        distributed.destroy_process_group()


@contextmanager
def main_first() -> Iterator[None]:
    """Process 0 goes through the body before the others, which then find what it wrote."""
    if rank():
        wait()
    yield
    if not rank():
        wait()


def share(items: Sequence[Item]) -> list[Item]:
    """The contiguous part of ``items`` that this process works on; parts differ by one item at most."""
    first, last = (len(items) * i // world() for i in (rank(), rank() + 1))
    return list(items[first:last])


def gather(items: Sequence[Item]) -> list[Item]:
    """The items of all processes, in order of rank: what every process makes of its :func:`share`, put together."""
    if not _together():
        return list(items)
    parts: list[list[Item]] = [[] for _ in range(world())]
    distributed.all_gather_object(parts, list(items))
    return list(chain.from_iterable(parts))


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether parameters of ``model`` lie in pieces on the processes, so that all of them must call it together."""
    # FSDP's DTensors, and what DeepSpeed ZeRO-3 leaves of a parameter.
    return _together() and any(hasattr(p, "device_mesh") or hasattr(p, "ds_status") for p in model.parameters())


def whole(x: torch.Tensor) -> torch.Tensor:
    """``x`` put together, where it is a parameter that FSDP holds in pieces; every process must ask for it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # type: ignore[operator]


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()
