"""The Triton kernels of the row passes over the vocabulary; ``rows_triton`` launches them and says what they do.

A program takes one row, BLOCK columns at a time from left to right. Arguments that may be None are left out then:
``bias``, ``inner`` (no cap), ``upstream`` and ``dz`` (no gradient).
Sums are kept for each lane of the block, and added up once a row in float64; what is known of a row enters every entry.
"""

# Triton's language looks like Python, but compile-time values stand for tensors and for conditions.
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

IGNORE = tl.constexpr(-100)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
# A finite logit whose probability is 0, so that differences of two of them are finite, too.
FAR = tl.constexpr(-1e30)
# Added to a small float, 1.5 · 2^23 rounds it to an integer; 127 more leaves a biased exponent in the low bits.
SHIFT = tl.constexpr(12582912.0 + 127.0)
# ln 2 in two parts: the first has so few bits that its product with an exponent is exact.
LN2_HIGH, LN2_LOW = tl.constexpr(0.693359375), tl.constexpr(-2.12194440e-4)


@triton.jit
def row_offset(row, stride):
    """Where ``row`` starts. In int64: 14,134 rows of 151,936 entries pass 2^31."""
    return tl.cast(row, tl.int64) * stride


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 88, as 2^k (1 + f + q f²) - 1, which does not cancel near 0. NaN stays NaN."""
    x = tl.maximum(x, -88.0, propagate_nan=tl.PropagateNan.ALL)
    shifted = tl.fma(x, LOG2E, SHIFT)
    k = shifted - SHIFT
    f = tl.fma(k, -LN2_LOW, tl.fma(k, -LN2_HIGH, x))
    q = tl.fma(tl.fma(f, 1.39460512e-3, 8.36637398e-3), f, 4.16662898e-2)
    q = tl.fma(tl.fma(q, f, 1.66665453e-1), f, 0.5)
    power = (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    return tl.fma(power, tl.fma(q * f, f, f), power - 1.0)


@triton.jit
def log_mean_exp(x):
    """log((1 + e^x) / 2) for x <= 0, without the cancellation that softplus(x) - ln 2 has near 0."""
    u = expm1(x) * 0.5
    # log1p(u) = 2 artanh(s) = u - s (u - 2 s² tail), |s| <= 1/3.
    s = u / (u + 2.0)
    t = s * s
    tail = tl.fma(tl.fma(tl.fma(t, 2.79541372e-1, 2.80153446e-1), t, 4.00205376e-1), t, 6.66664382e-1)
    return tl.fma(tl.fma(t, tail, -u), s, u)


@triton.jit
def tanh(x):
    """Hyperbolic tangent, without cancellation near 0."""
    y = expm1(tl.abs(x) * -2.0)
    size = -y / (y + 2.0)
    return tl.where(x < 0, -size, size)


@triton.jit
def bend(x, inner, outer):
    """``outer · tanh(inner · x)``, or ``outer · x`` where there is no ``inner``; and the slope of tanh."""
    slope = 1.0
    if inner is not None:
        x = tanh(x * inner)
        slope = tl.fma(x, -x, 1.0)
    return x * outer, slope


@triton.jit
def _logits(z, bias, column, columns, inner, outer, RAGGED: tl.constexpr):
    """Logits of one or many columns of a row, -inf behind the last one if RAGGED; and the cap's slope."""
    # Without a mask, which can break off anywhere, a thread loads 16 bytes at once.
    inside = column < columns if RAGGED else None
    x = tl.load(z + column, mask=inside)
    if bias is not None:
        x += tl.load(bias + column, mask=inside)
    x, slope = bend(x, inner, outer)
    if RAGGED:
        x = tl.where(inside, x, float("-inf"))
    return x, slope


@triton.jit
def _statistics(z, bias, columns, inner, outer, BLOCK: tl.constexpr):
    """A row's largest logit, and in float64 the sum of exp(logit - largest), in one reading."""
    top = tl.full([BLOCK], FAR, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    whole = columns // BLOCK * BLOCK
    for RAGGED in tl.static_range(2):
        for start in range(whole if RAGGED else 0, columns if RAGGED else whole, BLOCK):
            x, _ = _logits(z, bias, start + tl.arange(0, BLOCK), columns, inner, outer, RAGGED)
            # Of the old and the new maximum of a lane one has weight 1, so that one exponential does for both.
            ahead = x - top
            weight = tl.exp(-tl.abs(ahead))
            total = tl.where(ahead > 0, tl.fma(total, weight, 1.0), total + weight)
            top = tl.maximum(top, x)
    peak = tl.max(top)
    return peak, tl.sum((total * tl.exp(top - peak)).to(tl.float64))


@triton.jit(
    do_not_specialize=["first_column", "columns"],
    do_not_specialize_on_alignment=["target", "top", "total", "picked"],
)
def score_tile_kernel(z, target, bias, top, total, picked, stride_z, first_column, columns, inner, outer,
                      BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    z += row_offset(row, stride_z)
    column = tl.load(target + row) - first_column
    if (column >= 0) & (column < columns):
        chosen, _ = _logits(z, bias, column, columns, inner, outer, False)
        tl.store(picked + row, chosen)
    peak, tile_sum = _statistics(z, bias, columns, inner, outer, BLOCK)
    old = tl.load(top + row)
    now = tl.maximum(old, peak)
    tl.store(total + row, tl.load(total + row) * tl.exp(old - now) + tile_sum.to(tl.float32) * tl.exp(peak - now))
    tl.store(top + row, now)


@triton.jit
def _store_over(dz, column, columns, gradient, RAGGED: tl.constexpr):
    """Store a block of the gradient over the row that it is formed from."""
    # Half-precision entries of block j lie over float32 entries of blocks up to j. This program has read them, but only
    # the barrier says so of each of its warps, which else might be a block or more behind the one that stores.
    tl.debug_barrier()
    tl.store(dz + column, gradient.to(dz.dtype.element_ty), mask=column < columns if RAGGED else None)


@triton.jit(do_not_specialize=["columns"], do_not_specialize_on_alignment=["target", "out", "upstream"])
def logprob_kernel(z, target, bias, out, upstream, dz, stride_z, stride_dz, columns, inner, outer, scale,
                   BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    aim = tl.load(target + row).to(tl.int32)
    z += row_offset(row, stride_z)
    if dz is not None:
        dz += row_offset(row, stride_dz)
    if aim == IGNORE:
        tl.store(out + row, 0.0)
        if dz is not None:
            for start in range(0, columns, BLOCK):
                column = start + tl.arange(0, BLOCK)
                tl.store(dz + column, tl.zeros([BLOCK], dz.dtype.element_ty), mask=column < columns)
    else:
        peak, total = _statistics(z, bias, columns, inner, outer, BLOCK)
        chosen, _ = _logits(z, bias, aim, columns, inner, outer, False)
        # Never above 0: the largest logit has no term below 1.
        log_p = ((chosen.to(tl.float64) - peak) - tl.log(total)).to(tl.float32)
        tl.store(out + row, log_p)
        if dz is not None:
            factor = -tl.load(upstream + row) * scale
            share = (factor / total).to(tl.float32)
            # 1 - p from log p keeps its relative accuracy where p is near 1.
            own = expm1(log_p) * factor
            whole = columns // BLOCK * BLOCK
            for RAGGED in tl.static_range(2):
                for start in range(whole if RAGGED else 0, columns if RAGGED else whole, BLOCK):
                    column = start + tl.arange(0, BLOCK)
                    x, slope = _logits(z, bias, column, columns, inner, outer, RAGGED)
                    gradient = tl.where(column == aim, own, tl.exp(x - peak) * share) * slope
                    _store_over(dz, column, columns, gradient, RAGGED)


@triton.jit
def _divergence(a, b, a_peak, b_peak, a_share, b_share, shift, shift_rest):
    """p, q and log(p/m), log(q/m) with m their mean, from logits ``a`` and ``b``.

    ``shift``: how much larger the log-sum-exp of ``b`` is; with ``shift_rest``, in two parts.
    """
    # A bias of -inf may rule an entry out on both sides. NaN comes back with the shares and the shift.
    a, b = tl.maximum(a, FAR), tl.maximum(b, FAR)
    p, q = tl.exp(a - a_peak) * a_share, tl.exp(b - b_peak) * b_share
    # The difference of two close logits is exact, that of two log-probs is not.
    log_qp = ((b - a) - shift) - shift_rest
    # Finite where p and q underflow, and without the cancellation that ln 2 - softplus has near 0.
    common = -log_mean_exp(-tl.abs(log_qp))
    return p, q, common - tl.maximum(log_qp, 0.0), common + tl.minimum(log_qp, 0.0)


@triton.jit(do_not_specialize=["columns"], do_not_specialize_on_alignment=["t", "out", "upstream"])
def jsd_kernel(z, r, bias, ref_bias, t, out, upstream, dz, stride_z, stride_r, stride_dz, columns, inner, outer, scale,
               ref_inner, ref_outer, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    z += row_offset(row, stride_z)
    r += row_offset(row, stride_r)
    temperature = tl.load(t + row)
    outer, ref_outer = outer / temperature, ref_outer / temperature
    a_peak, a_sum = _statistics(z, bias, columns, inner, outer, BLOCK)
    b_peak, b_sum = _statistics(r, ref_bias, columns, ref_inner, ref_outer, BLOCK)
    a_share, b_share = (1.0 / a_sum).to(tl.float32), (1.0 / b_sum).to(tl.float32)
    # A rounding of it would move every entry the same way.
    whole_shift = (b_peak.to(tl.float64) - a_peak) + tl.log(b_sum / a_sum)
    shift = whole_shift.to(tl.float32)
    shift_rest = (whole_shift - shift).to(tl.float32)
    whole = columns // BLOCK * BLOCK
    kl_p = tl.zeros([BLOCK], tl.float32)
    kl_q = tl.zeros([BLOCK], tl.float32)
    for RAGGED in tl.static_range(2):
        for start in range(whole if RAGGED else 0, columns if RAGGED else whole, BLOCK):
            column = start + tl.arange(0, BLOCK)
            a, _ = _logits(z, bias, column, columns, inner, outer, RAGGED)
            b, _ = _logits(r, ref_bias, column, columns, ref_inner, ref_outer, RAGGED)
            p, q, log_pm, log_qm = _divergence(a, b, a_peak, b_peak, a_share, b_share, shift, shift_rest)
            kl_p = tl.fma(p, log_pm, kl_p)
            kl_q = tl.fma(q, log_qm, kl_q)
    from_p = tl.sum(kl_p.to(tl.float64))
    bits = (from_p + tl.sum(kl_q.to(tl.float64))) / (2.0 * LN2)
    tl.store(out + row, tl.where(bits < 0, 0.0, bits).to(tl.float32))
    if dz is not None:
        dz += row_offset(row, stride_dz)
        factor = tl.load(upstream + row) * scale / (2.0 * LN2 * temperature)
        for RAGGED in tl.static_range(2):
            for start in range(whole if RAGGED else 0, columns if RAGGED else whole, BLOCK):
                column = start + tl.arange(0, BLOCK)
                a, slope = _logits(z, bias, column, columns, inner, outer, RAGGED)
                b, _ = _logits(r, ref_bias, column, columns, ref_inner, ref_outer, RAGGED)
                p, _, log_pm, _ = _divergence(a, b, a_peak, b_peak, a_share, b_share, shift, shift_rest)
                gradient = (log_pm - from_p.to(tl.float32)) * p * factor * slope
                _store_over(dz, column, columns, gradient, RAGGED)
