"""Attention on a token tree by the kernels of csrc/cpu. Letters and arguments are those of ``tree_attention``."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kpig_fast import _native
from kpig_fast.ops.native import address, heads, kernel
from kpig_fast.ops.precision import compute_dtype

# Gradients of keys and values are summed in one piece for each key/value head and segment; this many pieces of work
# are enough for the threads of a large machine, and none depends on their number.
PIECES = 16
INT32_MAX = 2**31 - 1


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    position_ids: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    out: Tensor,  # [H, T, dv]
    lse: Tensor,  # [H, T]
) -> None:
    """Fill ``out``, and ``lse`` with the log-sum-exp of each query's scores, its sink's included."""
    dtype = compute_dtype(q)
    q, k, v = (_whole_vectors(x, dtype) for x in (q, k, v))
    ends, positions = _int32(subtree_end), _int32(position_ids)
    sinks = None if sinks is None else sinks.to(dtype).contiguous()
    fits = out.dtype == dtype and out.shape[2] == v.shape[2]
    result = out if fits else torch.empty(out.shape[0], out.shape[1], v.shape[2], dtype=dtype)
    tree = _arguments(q, k, v, ends, positions, scale, window, softcap)
    kernel("tree_attention", dtype)(tree, address(sinks), heads(result), address(lse), torch.get_num_threads())
    if not fits:
        out.copy_(result[..., : out.shape[2]])


def backward(
    grad: Tensor,  # [H, T, dv]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,  # [H, T, dv]
    lse: Tensor,  # [H, T]
    subtree_end: Tensor,
    position_ids: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    dq: Tensor,  # [H, T, d]
    delta: Tensor,  # [H, T]
) -> tuple[Tensor, Tensor]:
    """Fill ``dq``, and ``delta`` with each query's sum of ``grad · out``; return the gradients by keys and values."""
    dtype = compute_dtype(q)
    sizes = q.shape[2], v.shape[2]
    grad, q, k, v, out = (_whole_vectors(x, dtype) for x in (grad, q, k, v, out))
    ends, positions = _int32(subtree_end), _int32(position_ids)
    fits = dq.dtype == dtype and dq.shape[2] == q.shape[2]
    result = dq if fits else torch.empty(q.shape, dtype=dtype)
    segments = -(-PIECES // k.shape[0])
    dk, dv = (torch.zeros(segments, x.shape[1], x.shape[0], x.shape[2], dtype=dtype) for x in (k, v))
    tree = _arguments(q, k, v, ends, positions, scale, window, softcap)
    kernel("tree_attention_backward", dtype)(
        tree, heads(grad), heads(out), address(lse.contiguous()), address(delta), heads(result), address(dk),
        address(dv), segments, torch.get_num_threads(),
    )  # fmt: skip
    if not fits:
        dq.copy_(result[..., : sizes[0]])
    return _summed(dk, sizes[0]), _summed(dv, sizes[1])


def _summed(parts: Tensor, size: int) -> Tensor:
    """[Hkv, T, size] from the parts [segments, T, Hkv, size padded]; token after token in memory."""
    whole = parts[0] if len(parts) == 1 else parts.sum(0)
    return whole[..., :size].contiguous().transpose(0, 1)


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, positions: Tensor, scale: float, window: int | None,
    softcap: float | None,
) -> _native.Attention:  # fmt: skip
    sizes = (q.shape[0], k.shape[0], q.shape[1], q.shape[2], v.shape[2])
    # A window that no tree can reach is none; kernels count positions in 32 bits.
    window = 0 if window is None or window > INT32_MAX else window
    where = heads(q), heads(k), heads(v), address(ends), address(positions)
    return _native.Attention(*where, sizes, scale, softcap or 0.0, window)


def _whole_vectors(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` [heads, T, size] in ``dtype`` with a contiguous last dimension, zeros up to a size that kernels take."""
    missing = -x.shape[2] % _native.HEAD_MULTIPLE
    x = F.pad(x.to(dtype), (0, missing)) if missing else x.to(dtype)
    return x if x.stride(2) == 1 else x.contiguous()


def _int32(x: Tensor) -> Tensor:
    return x.to(torch.int32).contiguous()
