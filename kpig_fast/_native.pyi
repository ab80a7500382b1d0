"""Types of the native module (csrc/bindings.cpp). Tensors come as addresses and strides."""

import numpy as np
from numpy.typing import NDArray

Forest = tuple[
    NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]
]
Heads = tuple[int, int, int]
Rows = tuple[int, int, int, int, int, float, float]

KEY_CHUNK: int
QUERY_BLOCK: int
HEAD_MULTIPLE: int

class Attention:
    def __init__(
        self,
        q: Heads,
        k: Heads,
        v: Heads,
        subtree_end: int,
        position_ids: int,
        sizes: tuple[int, int, int, int, int],
        scale: float,
        softcap: float,
        window: int,
        /,
    ) -> None: ...

def pack_forests(
    tokens: NDArray[np.int32],
    offsets: NDArray[np.int64],
    response_start: NDArray[np.int64],
    *,
    max_tokens: int,
) -> list[Forest]: ...
def tree_attention_float(tree: Attention, sinks: int, out: Heads, lse: int, threads: int, /) -> None: ...
def tree_attention_double(tree: Attention, sinks: int, out: Heads, lse: int, threads: int, /) -> None: ...
def tree_attention_backward_float(
    tree: Attention,
    grad: Heads,
    out: Heads,
    lse: int,
    delta: int,
    dq: Heads,
    dk: int,
    dv: int,
    segments: int,
    threads: int,
    /,
) -> None: ...
def tree_attention_backward_double(
    tree: Attention,
    grad: Heads,
    out: Heads,
    lse: int,
    delta: int,
    dq: Heads,
    dk: int,
    dv: int,
    segments: int,
    threads: int,
    /,
) -> None: ...
def score_tile_float(
    tile: Rows, first_column: int, target: int, top: int, total: int, picked: int, threads: int, /
) -> None: ...
def score_tile_double(
    tile: Rows, first_column: int, target: int, top: int, total: int, picked: int, threads: int, /
) -> None: ...
def logprob_rows_float(z: Rows, target: int, upstream: int, out: int, threads: int, /) -> None: ...
def logprob_rows_double(z: Rows, target: int, upstream: int, out: int, threads: int, /) -> None: ...
def jsd_rows_float(z: Rows, reference: Rows, temperature: int, upstream: int, out: int, threads: int, /) -> None: ...
def jsd_rows_double(z: Rows, reference: Rows, temperature: int, upstream: int, out: int, threads: int, /) -> None: ...
def supported_isas() -> list[str]: ...
def isa_name() -> str: ...
def use_isa(name: str, /) -> None: ...
def thread_source() -> str: ...
def cuda_architectures() -> list[str]: ...
def cuda_cluster_size(columns: int, sides: int, shared_memory: int, /) -> int: ...

# Only in a module that was built with CUDA: where cuda_architectures() is not empty.
def cuda_versions() -> tuple[int, int]: ...
def logprob_rows_cuda(z: Rows, target: int, gradient: tuple[int, str], out: int, stream: int, /) -> None: ...
def jsd_rows_cuda(
    z: Rows, reference: Rows, temperature: int, gradient: tuple[int, str], out: int, stream: int, /
) -> None: ...
