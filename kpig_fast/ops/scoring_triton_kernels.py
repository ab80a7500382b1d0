"""The Triton kernel that scores rows without logits in memory; ``scoring_triton`` launches it and says what it does.

``bias`` and ``inner`` may be None: no bias, no cap.
"""

# Triton's language looks like Python, but compile-time values stand for tensors and for conditions.
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from kpig_fast.ops.rows_triton_kernels import FAR, bend, row_offset


@triton.jit
def _products(hidden, weight, d, WHOLE_K: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """float32 [M, N]: products of the rows that start at ``hidden`` [M, 1] with those at ``weight`` [1, N].

    UPCAST for the interpreter, whose half-precision products are wrong.
    """
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, d, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if WHOLE_K:
            x, w = tl.load(hidden + k[None, :]), tl.load(weight + k[:, None])
        else:
            x = tl.load(hidden + k[None, :], mask=(k < d)[None, :], other=0.0)
            w = tl.load(weight + k[:, None], mask=(k < d)[:, None], other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        sums = tl.dot(x, w, sums, input_precision="ieee")
    return sums


@triton.jit
def _absorb(state, z, aim, bias, start, columns, inner, outer, SIZE: tl.constexpr):
    """Products ``z`` [M, SIZE] with columns from ``start`` on into (largest logit, sum, target's logit) of each row."""
    top, total, picked = state
    # Columns, and targets with them, are counted from the first one: as int64 they would not fit into registers.
    column, left = tl.arange(0, SIZE), columns - start
    if bias is not None:
        z += tl.load(bias + start + column, mask=column < left, other=0.0)[None, :]
    z, _ = bend(z, inner, outer)
    z = tl.where((column < left)[None, :], z, float("-inf"))
    now = tl.maximum(top, tl.max(z, 1))
    total = total * tl.exp(top - now) + tl.sum(tl.exp(z - now[:, None]), 1)
    return now, total, picked + tl.sum(tl.where(column[None, :] == (aim - start)[:, None], z, 0.0), 1)


@triton.jit(do_not_specialize=["rows", "columns", "tiles"], do_not_specialize_on_alignment=["target", "partials"])
def score_kernel(hidden, weight, target, bias, partials, stride_hidden, stride_weight, rows, columns, tiles, d, inner,
                 outer, WHOLE_K: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_K: tl.constexpr):  # fmt: skip
    """A block of rows with ``tiles`` tiles of the vocabulary; its state goes to ``partials`` [3, splits, rows]."""
    first_row, lane = tl.program_id(0) * BLOCK_M, tl.arange(0, BLOCK_M)
    row = first_row + lane
    aim = tl.load(target + row, mask=row < rows, other=-1).to(tl.int32)
    # A row or column behind the last one is read as the last one, and then left out.
    x = (
        hidden
        + row_offset(first_row, stride_hidden)
        + (tl.minimum(lane, rows - 1 - first_row) * stride_hidden)[:, None]
    )
    # FAR is finite, so that no difference from a logit of -inf is undefined.
    zero = tl.zeros([BLOCK_M], tl.float32)
    state = zero + FAR, zero, zero
    begin = tl.program_id(1) * tiles * BLOCK_N
    for start in range(begin, tl.minimum(begin + tiles * BLOCK_N, columns), BLOCK_N):
        column = tl.minimum(tl.arange(0, BLOCK_N), columns - 1 - start)
        w = weight + row_offset(start, stride_weight) + (column * stride_weight)[None, :]
        z = _products(x, w, d, WHOLE_K, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K)
        # In halves, which need fewer registers at a time.
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = z.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        state = _absorb(state, left, aim, bias, start, columns, inner, outer, HALF)
        state = _absorb(state, right, aim, bias, start + HALF, columns, inner, outer, HALF)
    partials += row_offset(tl.program_id(1), rows)
    for i in tl.static_range(3):
        tl.store(partials + row_offset(i * tl.num_programs(1), rows) + row, state[i], mask=row < rows)
