"""Types of the native module (csrc/bindings.cpp)."""

import numpy as np
from numpy.typing import NDArray

Forest = tuple[
    NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]
]

def pack_forests(
    tokens: NDArray[np.int32],
    offsets: NDArray[np.int64],
    response_start: NDArray[np.int64],
    *,
    max_tokens: int,
) -> list[Forest]: ...
