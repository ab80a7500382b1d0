"""The Triton kernels of attention on a token tree; ``attention_triton`` launches them and says what they do."""

# Triton's language looks like Python, but compile-time values stand for tensors and for conditions.
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# What differs from tree to tree; the kernels are not compiled again for another value, or for another alignment.
VARYING = ["ends", "positions", "full", "n_full", "partial", "n_partial", "tokens", "window", "blocks"]


@triton.jit(do_not_specialize=VARYING)
def visits_kernel(ends, positions, full, n_full, partial, n_partial, tokens, window, blocks, HAS_WINDOW: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """For a query block: the key blocks that it sees whole, a list and its length, and those that it sees in part."""
    m = tl.program_id(0)
    full, partial = full + m.to(tl.int64) * blocks, partial + m.to(tl.int64) * blocks
    first, last = m * BLOCK_M, tl.minimum(m * BLOCK_M + BLOCK_M, tokens) - 1
    n_whole, n_part = 0, 0
    if HAS_WINDOW:
        q = first + tl.arange(0, BLOCK_M)
        highest = tl.min(tl.load(positions + q, mask=q <= last, other=2147483647))
        deepest = tl.max(tl.load(positions + q, mask=q <= last, other=-1))
    for n in range(last // BLOCK_N + 1):
        k = n * BLOCK_N + tl.arange(0, BLOCK_N)
        end = tl.load(ends + k, mask=k < tokens, other=0)
        seen = (end > first) & (k <= last)
        whole = (end > last) & (k <= first)
        if HAS_WINDOW:
            position = tl.load(positions + k, mask=k < tokens, other=0)
            seen = seen & (highest - position < window)
            whole = whole & (deepest - position < window)
        if tl.min(whole.to(tl.int32)) == 1:
            tl.store(full + n_whole, n)
            n_whole += 1
        elif tl.max(seen.to(tl.int32)) == 1:
            tl.store(partial + n_part, n)
            n_part += 1
    tl.store(n_full + m, n_whole)
    tl.store(n_partial + m, n_part)


@triton.jit
def _rows(base, index, stride, x, limit, width):
    """[len(index), len(x)]: rows ``index`` below ``limit`` of a matrix with ``stride``, zeros elsewhere."""
    mask = (index < limit)[:, None] & (x < width)[None, :]
    return tl.load(base + index.to(tl.int64)[:, None] * stride + x[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(base, index, stride, x, limit, width, value):
    mask = (index < limit)[:, None] & (x < width)[None, :]
    tl.store(base + index.to(tl.int64)[:, None] * stride + x[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _tanh(x):
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    size = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -size, size)


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr):
    """Product with float32 sums; UPCAST for the interpreter, whose half-precision products are wrong."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _visible(q_index, k_index, ends, positions, tokens, window, HAS_WINDOW: tl.constexpr):
    """bool: may the query see the key? Both indices have two dimensions, so that either may go down the rows."""
    end = tl.load(ends + k_index, mask=k_index < tokens, other=0)
    seen = (k_index <= q_index) & (q_index < end)
    if HAS_WINDOW:
        deep = tl.load(positions + q_index, mask=q_index < tokens, other=0)
        high = tl.load(positions + k_index, mask=k_index < tokens, other=0)
        seen = seen & (deep - high < window)
    return seen


@triton.jit
def _scores(a, b, scale, softcap, HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr):
    """Scores of rows with rows in units of ln 2, and their slope: the derivative of a score by scale · a·b."""
    products = _dot(a, tl.trans(b), UPCAST)
    slope = 1.0
    if HAS_SOFTCAP:
        bent = _tanh(products * (scale / softcap))
        products = bent * (softcap * LOG2E)
        slope = 1.0 - bent * bent
    else:
        products = products * (scale * LOG2E)
    return products, slope


@triton.jit
def _attend(block, state, query, q_index, k, v, ends, positions, tokens, window, scale, softcap, stride_k, stride_v,
            d, dv, MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
            BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """One key block into the running (maximum, sum, mixture) of a query block."""
    top, total, mixed = state
    k_index = block * BLOCK_N + tl.arange(0, BLOCK_N)
    key = _rows(k, k_index, stride_k, tl.arange(0, BLOCK_D), tokens, d)
    scores, _ = _scores(query, key, scale, softcap, HAS_SOFTCAP, UPCAST)
    if MASKED:
        seen = _visible(q_index[:, None], k_index[None, :], ends, positions, tokens, window, HAS_WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    now = tl.maximum(top, tl.max(scores, 1))
    # A query that has seen no key yet: any finite maximum gives weights of 0.
    finite = tl.where(now == float("-inf"), 0.0, now)
    weights = tl.exp2(scores - finite[:, None])
    keep = tl.exp2(top - finite)
    value = _rows(v, k_index, stride_v, tl.arange(0, BLOCK_DV), tokens, dv)
    mixed = mixed * keep[:, None] + _dot(weights.to(value.dtype), value, UPCAST)
    return now, total * keep + tl.sum(weights, 1), mixed


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(q, k, v, out, lse, ends, positions, sinks, full, n_full, partial, n_partial, tokens, window, scale,
                    softcap, stride_qh, stride_q, stride_kh, stride_k, stride_vh, stride_v, stride_oh, stride_o, blocks,
                    d, dv, GROUPS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                    HAS_SINKS: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    m, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_head = head // GROUPS
    q_index = m * BLOCK_M + tl.arange(0, BLOCK_M)
    query = _rows(q + head * stride_qh, q_index, stride_q, tl.arange(0, BLOCK_D), tokens, d)
    k, v = k + kv_head * stride_kh, v + kv_head * stride_vh
    full, partial = full + m.to(tl.int64) * blocks, partial + m.to(tl.int64) * blocks
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        # A key that everyone sees and that has no value.
        top = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2E
        total += 1.0
    mixed = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for i in range(tl.load(n_full + m)):
        top, total, mixed = _attend(
            tl.load(full + i), (top, total, mixed), query, q_index, k, v, ends, positions, tokens, window,
            scale, softcap, stride_k, stride_v, d, dv, False, HAS_WINDOW, HAS_SOFTCAP, UPCAST, BLOCK_N, BLOCK_D,
            BLOCK_DV)  # fmt: skip
    for i in range(tl.load(n_partial + m)):
        top, total, mixed = _attend(
            tl.load(partial + i), (top, total, mixed), query, q_index, k, v, ends, positions, tokens,
            window, scale, softcap, stride_k, stride_v, d, dv, True, HAS_WINDOW, HAS_SOFTCAP, UPCAST, BLOCK_N, BLOCK_D,
            BLOCK_DV)  # fmt: skip
    _store_rows(out + head * stride_oh, q_index, stride_o, tl.arange(0, BLOCK_DV), tokens, dv, mixed / total[:, None])
    tl.store(lse + head * tokens + q_index, (top + tl.log2(total)) * LN2, mask=q_index < tokens)


@triton.jit
def _weights(a, b, q_index, k_index, lse, ends, positions, tokens, window, scale, softcap, MASKED: tl.constexpr,
             HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Probabilities of queries with keys, or of keys with queries, and the slope of their scores.

    ``lse`` in units of ln 2, it and the indices with two dimensions.
    """
    scores, slope = _scores(a, b, scale, softcap, HAS_SOFTCAP, UPCAST)
    weights = tl.exp2(scores - lse)
    if MASKED:
        weights = tl.where(_visible(q_index, k_index, ends, positions, tokens, window, HAS_WINDOW), weights, 0.0)
    return weights, slope


@triton.jit
def _query_step(block, dq, query, grad, q_index, lse, delta, k, v, ends, positions, tokens, window, scale, softcap,
                stride_k, stride_v, d, dv, MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                BLOCK_DV: tl.constexpr):  # fmt: skip
    """What one key block adds to the gradient of a query block."""
    k_index = block * BLOCK_N + tl.arange(0, BLOCK_N)
    key = _rows(k, k_index, stride_k, tl.arange(0, BLOCK_D), tokens, d)
    value = _rows(v, k_index, stride_v, tl.arange(0, BLOCK_DV), tokens, dv)
    weights, slope = _weights(query, key, q_index[:, None], k_index[None, :], lse[:, None], ends, positions, tokens,
                              window, scale, softcap, MASKED, HAS_WINDOW, HAS_SOFTCAP, UPCAST)  # fmt: skip
    dscores = weights * (_dot(grad, tl.trans(value), UPCAST) - delta[:, None]) * slope
    return dq + _dot(dscores.to(key.dtype), key, UPCAST)


@triton.jit(do_not_specialize=VARYING)
def query_gradient_kernel(q, k, v, grad, lse, delta, dq, ends, positions, full, n_full, partial, n_partial, tokens,
                           window, scale, softcap, stride_qh, stride_q, stride_kh, stride_k, stride_vh, stride_v,
                           stride_gh, stride_g, stride_dqh, stride_dq, blocks, d, dv, GROUPS: tl.constexpr,
                           HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
                           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                           BLOCK_DV: tl.constexpr):  # fmt: skip
    m, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_head = head // GROUPS
    q_index = m * BLOCK_M + tl.arange(0, BLOCK_M)
    query = _rows(q + head * stride_qh, q_index, stride_q, tl.arange(0, BLOCK_D), tokens, d)
    upstream = _rows(grad + head * stride_gh, q_index, stride_g, tl.arange(0, BLOCK_DV), tokens, dv)
    k, v = k + kv_head * stride_kh, v + kv_head * stride_vh
    full, partial = full + m.to(tl.int64) * blocks, partial + m.to(tl.int64) * blocks
    row = head * tokens + q_index
    # Where there is no query, weights are 0.
    row_lse = tl.load(lse + row, mask=q_index < tokens, other=float("inf")) * LOG2E
    row_delta = tl.load(delta + row, mask=q_index < tokens, other=0.0)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range(tl.load(n_full + m)):
        total = _query_step(
            tl.load(full + i), total, query, upstream, q_index, row_lse, row_delta, k, v, ends, positions,
            tokens, window, scale, softcap, stride_k, stride_v, d, dv, False, HAS_WINDOW, HAS_SOFTCAP, UPCAST, BLOCK_N,
            BLOCK_D, BLOCK_DV)  # fmt: skip
    for i in range(tl.load(n_partial + m)):
        total = _query_step(
            tl.load(partial + i), total, query, upstream, q_index, row_lse, row_delta, k, v, ends,
            positions, tokens, window, scale, softcap, stride_k, stride_v, d, dv, True, HAS_WINDOW, HAS_SOFTCAP, UPCAST,
            BLOCK_N, BLOCK_D, BLOCK_DV)  # fmt: skip
    _store_rows(dq + head * stride_dqh, q_index, stride_dq, tl.arange(0, BLOCK_D), tokens, d, total * scale)


@triton.jit
def _key_step(head, m, dk, dv_sum, key, value, k_index, q, grad, lse, delta, ends, positions, tokens, window, scale,
              softcap, stride_qh, stride_q, stride_gh, stride_g, d, dv, MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr,
              HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
              BLOCK_DV: tl.constexpr):  # fmt: skip
    """What one query block of one head adds to the gradients of a key block."""
    q_index = m * BLOCK_M + tl.arange(0, BLOCK_M)
    query = _rows(q + head * stride_qh, q_index, stride_q, tl.arange(0, BLOCK_D), tokens, d)
    upstream = _rows(grad + head * stride_gh, q_index, stride_g, tl.arange(0, BLOCK_DV), tokens, dv)
    row = head * tokens + q_index
    row_lse = tl.load(lse + row, mask=q_index < tokens, other=float("inf")) * LOG2E
    row_delta = tl.load(delta + row, mask=q_index < tokens, other=0.0)
    # Keys go down the rows, so that every product sums into rows of keys and no tile in registers is transposed.
    weights, slope = _weights(key, query, q_index[None, :], k_index[:, None], row_lse[None, :], ends, positions, tokens,
                              window, scale, softcap, MASKED, HAS_WINDOW, HAS_SOFTCAP, UPCAST)  # fmt: skip
    dv_sum += _dot(weights.to(upstream.dtype), upstream, UPCAST)
    dscores = weights * (_dot(value, tl.trans(upstream), UPCAST) - row_delta[None, :]) * slope
    dk += _dot(dscores.to(query.dtype), query, UPCAST)
    return dk, dv_sum


@triton.jit(do_not_specialize=VARYING)
def key_gradient_kernel(q, k, v, grad, lse, delta, dk, dv_out, ends, positions, tokens, window, scale, softcap,
                         stride_qh, stride_q, stride_kh, stride_k, stride_vh, stride_v, stride_gh, stride_g, stride_dkh,
                         stride_dk, stride_dvh, stride_dv, d, dv, GROUPS: tl.constexpr, HAS_WINDOW: tl.constexpr,
                         HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                         BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    n, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    k_index = n * BLOCK_N + tl.arange(0, BLOCK_N)
    key = _rows(k + kv_head * stride_kh, k_index, stride_k, tl.arange(0, BLOCK_D), tokens, d)
    value = _rows(v + kv_head * stride_vh, k_index, stride_v, tl.arange(0, BLOCK_DV), tokens, dv)
    end = tl.load(ends + k_index, mask=k_index < tokens, other=0)
    start, stop = n * BLOCK_N // BLOCK_M, tl.cdiv(tl.max(end), BLOCK_M)
    # Query blocks that see the key block whole: behind its last key, up to where its first subtree ends.
    whole_start = tl.cdiv(n * BLOCK_N + BLOCK_N - 1, BLOCK_M)
    whole_stop = tl.min(end) // BLOCK_M
    if HAS_WINDOW:
        whole_stop = start
    whole_start = tl.minimum(tl.maximum(whole_start, start), stop)
    whole_stop = tl.maximum(whole_stop, whole_start)
    dk_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_sum = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    whole = whole_stop - whole_start
    partly = stop - start - whole
    # One loop over all heads of the group: most subtrees are short, and loads run ahead within a loop only.
    for i in range(GROUPS * whole):
        dk_sum, dv_sum = _key_step(
            kv_head * GROUPS + i // whole, whole_start + i % whole, dk_sum, dv_sum, key, value, k_index, q, grad, lse,
            delta, ends, positions, tokens, window, scale, softcap, stride_qh, stride_q, stride_gh, stride_g, d, dv,
            False, HAS_WINDOW, HAS_SOFTCAP, UPCAST, BLOCK_M, BLOCK_D, BLOCK_DV)  # fmt: skip
    for i in range(GROUPS * partly):
        m = start + i % partly
        m = tl.where(m < whole_start, m, m + whole)
        dk_sum, dv_sum = _key_step(
            kv_head * GROUPS + i // partly, m, dk_sum, dv_sum, key, value, k_index, q, grad, lse, delta, ends,
            positions, tokens, window, scale, softcap, stride_qh, stride_q, stride_gh, stride_g, d, dv, True,
            HAS_WINDOW, HAS_SOFTCAP, UPCAST, BLOCK_M, BLOCK_D, BLOCK_DV)  # fmt: skip
    _store_rows(dk + kv_head * stride_dkh, k_index, stride_dk, tl.arange(0, BLOCK_D), tokens, d, dk_sum * scale)
    _store_rows(dv_out + kv_head * stride_dvh, k_index, stride_dv, tl.arange(0, BLOCK_DV), tokens, dv, dv_sum)
