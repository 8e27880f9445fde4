"""Rows of logits: normalisers, divergences between two rows, log-probs, and their gradients.

    v = softcap tanh(scale x / softcap), or scale x       x: the stored number
    z = v / T, or log(x) / T for probabilities            lp = (z - max z) - log sum e^(z - max z)
    p = e^lp of the student, q = e^lq of the teacher, d = lq - lp
    r = log(1 - w + w e^d), the logarithm of m / p for the mixture m = w q + (1 - w) p

    kind              loss of a row                       slope g; dL/dz = p (g - K), K = sum p g
    forward_kl        sum q d                             dL/dz = p - q
    reverse_kl        sum p (-d)                          -d
    jsd               w sum q (d - r) + K                 (1 - w) (-r)
    skew_forward_kl   sum q (d - r)                       (1 - w) (1 - e^(d - r))
    skew_reverse_kl   sum p (-r) with 1 - w               -r + w (1 - e^(-r)), r with 1 - w
    tvd               sum |p - q| / 2                     sign(p - q) / 2, sign(0) = 0
    log-prob          z[id] - max z - log sum             dL/dz = 1[id] - p
    entropy           log sum - E, E = sum p (z - max z)  dL/dz = -p (lp + entropy)

Both KL divergences are one pass over the row. With x the side that weights, y the other one, a and
b their z less the running maxima:

    A = sum e^a (a - b)      maxima move by dx, dy:  A' = e^-dx (A - (dx - dy) sum e^a)
    L = A / sum e^a + log sum e^b - log sum e^a

so no large numbers cancel, and equal rows give 0, since all that is done to one side is done to the
other by the same instructions. The other kinds need the normalisers first and read the row twice.
Entropies take the same way: E sum e^a = sum e^a a.

A program owns one row, or SPAN columns of a longer one, and walks over it in blocks; a second
kernel joins the spans. Spans do not depend on the number of rows, so neither do the bits of a row.
A block has the shape [steps, lanes, vector]: a thread loads whole vectors of 16 bytes and keeps
maxima and sums of its own lane, and lanes meet once, at the end of a span.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

__all__ = [
    "divergence_forward",
    "divergence_gradient",
    "divergence_sums",
    "logprob_forward",
    "logprob_gradient",
    "normalisers",
]

KINDS = {
    "forward_kl": 0, "reverse_kl": 1, "jsd": 2, "skew_forward_kl": 3, "skew_reverse_kl": 4, "tvd": 5
}  # fmt: skip
FORWARD, REVERSE, JSD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SKEW_FORWARD, SKEW_REVERSE, TVD = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
_PLAIN, _SOFTCAP, _PROBS = 0, 1, 2
SOFTCAP, PROBS = tl.constexpr(_SOFTCAP), tl.constexpr(_PROBS)

BLOCK = 2048
LANES = 128
SPAN = 1 << 15
WARPS = 4
_MOST_COLUMNS = 2**31 - 2 * SPAN


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _tanh(x):  # type: ignore[no-untyped-def]
    """1 - e cancels near 0, where the series has ended after x^9."""
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    s = x * x
    odd = 0.021869488536155203 * s - 0.05396825396825397
    odd = odd * s + 0.13333333333333333
    odd = odd * s - 0.3333333333333333
    return tl.where(tl.abs(x) < 0.25, x + x * (s * odd), tl.where(x < 0, -large, large))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _load(  # type: ignore[no-untyped-def]
    row_ptr, col, n, inner, FORM: tl.constexpr, MASKED: tl.constexpr
):
    """What z is proportional to. Outside of the row it is finite, and to be replaced."""
    if MASKED:
        u = tl.load(row_ptr + col, mask=col < n, other=0.0).to(tl.float32)
    else:
        # A mask would break the vectors up; only the end of a row needs one.
        u = tl.load(row_ptr + col).to(tl.float32)
    if FORM == SOFTCAP:
        u = _tanh(u * inner)
    elif FORM == PROBS:
        u = tl.log(u)
    return u


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _away(u, factor, top, SCALED: tl.constexpr):  # type: ignore[no-untyped-def]
    """z - top. The fma is told, not left to the compiler, which might do so for one side only."""
    if SCALED:
        u = tl.fma(u, factor, -top)
    else:
        u = u - top
    return u


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _finite(top):  # type: ignore[no-untyped-def]
    """What to subtract for a maximum: 0 where all are -inf, since -inf - -inf is NaN."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _sum(x):  # type: ignore[no-untyped-def]
    """Of each lane."""
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _meet(  # type: ignore[no-untyped-def]
    row_ptr, col, n, inner, factor, top,
    FORM: tl.constexpr, SCALED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of one row: the new maxima, those to subtract, z less these, e^ of that, and by
    what earlier sums shrink."""
    u = _load(row_ptr, col, n, inner, FORM, MASKED)
    z = u
    if SCALED:
        z = u * factor
    if MASKED:
        z = tl.where(col < n, z, -float("inf"))
    new = tl.maximum(top, tl.max(tl.max(z, axis=2), axis=0))
    near = _finite(new)
    away = _away(u, factor, near[None, :, None], SCALED)
    if MASKED:
        away = tl.where(col < n, away, -float("inf"))
    return new, near, away, tl.exp(away), tl.exp(top - near)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _moved(shrink, a, sums, by):  # type: ignore[no-untyped-def]
    """A of maxima that have moved by `by`; nothing where nothing is left, although `by` is inf."""
    return tl.where(shrink == 0.0, 0.0, shrink * (a - by * sums))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _pair_block(  # type: ignore[no-untyped-def]
    x_row, y_row, col, nx, ny, x_inner, x_factor, y_inner, y_factor, x_top, x_sum, y_top, y_sum, a,
    X_FORM: tl.constexpr, X_SCALED: tl.constexpr, Y_FORM: tl.constexpr, Y_SCALED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    x_new, x_near, x_away, x_exp, x_shrink = _meet(
        x_row, col, nx, x_inner, x_factor, x_top, X_FORM, X_SCALED, MASKED
    )
    y_new, y_near, y_away, y_exp, y_shrink = _meet(
        y_row, col, ny, y_inner, y_factor, y_top, Y_FORM, Y_SCALED, MASKED
    )
    a = _moved(x_shrink, a, x_sum, (x_near - x_top) - (y_near - y_top))
    a += _sum(tl.where(x_exp == 0.0, 0.0, x_exp * (x_away - y_away)))
    x_sum = x_sum * x_shrink + _sum(x_exp)
    y_sum = y_sum * y_shrink + _sum(y_exp)
    return x_new, x_sum, y_new, y_sum, a


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _join_pairs(x_top, x_sum, y_top, y_sum, a):  # type: ignore[no-untyped-def]
    """Lanes or spans [n] as one."""
    x_new, y_new = tl.max(x_top, axis=0), tl.max(y_top, axis=0)
    x_near, y_near = _finite(x_new), _finite(y_new)
    x_shrink, y_shrink = tl.exp(x_top - x_near), tl.exp(y_top - y_near)
    a = _moved(x_shrink, a, x_sum, (x_near - x_top) - (y_near - y_top))
    return (
        x_new,
        tl.sum(x_sum * x_shrink, axis=0),
        y_new,
        tl.sum(y_sum * y_shrink, axis=0),
        tl.sum(a, axis=0),
    )


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _join(top, sums, a):  # type: ignore[no-untyped-def]
    new = tl.max(top, axis=0)
    near = _finite(new)
    shrink = tl.exp(top - near)
    a = _moved(shrink, a, sums, near - top)
    return new, tl.sum(sums * shrink, axis=0), tl.sum(a, axis=0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _columns(STEPS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    step = tl.arange(0, STEPS)[:, None, None]
    lane = tl.arange(0, LANES)[None, :, None]
    return (step * LANES + lane) * VECTOR + tl.arange(0, VECTOR)[None, None, :]


@triton.jit(do_not_specialize=["x_stride", "y_stride", "nx", "ny"])  # type: ignore[untyped-decorator, unused-ignore]
def _pair_kernel(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, o_ptr, x_stride, y_stride, nx, ny, x_inner, x_factor, y_inner, y_factor,
    X_FORM: tl.constexpr, X_SCALED: tl.constexpr, Y_FORM: tl.constexpr, Y_SCALED: tl.constexpr,
    ALIGNED: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """Maxima and sums of both sides and A, of one span of one row."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * x_stride
    y_row = y_ptr + row * y_stride
    if ALIGNED:
        x_row = tl.multiple_of(x_row, 16)
        y_row = tl.multiple_of(y_row, 16)
    BLOCK: tl.constexpr = STEPS * LANES * VECTOR
    first = tl.program_id(1) * SPAN
    last = tl.minimum(first + SPAN, tl.maximum(nx, ny))
    whole = tl.maximum(first, tl.minimum(last, tl.minimum(nx, ny)) // BLOCK * BLOCK)
    cols = _columns(STEPS, LANES, VECTOR)
    x_top = tl.full((LANES,), -float("inf"), tl.float32)
    y_top = tl.full((LANES,), -float("inf"), tl.float32)
    x_sum = tl.zeros((LANES,), tl.float32)
    y_sum = tl.zeros((LANES,), tl.float32)
    a = tl.zeros((LANES,), tl.float32)
    for start in range(first, whole, BLOCK):
        x_top, x_sum, y_top, y_sum, a = _pair_block(
            x_row, y_row, start + cols, nx, ny, x_inner, x_factor, y_inner, y_factor,
            x_top, x_sum, y_top, y_sum, a, X_FORM, X_SCALED, Y_FORM, Y_SCALED, False,
        )  # fmt: skip
    for start in range(whole, last, BLOCK):
        x_top, x_sum, y_top, y_sum, a = _pair_block(
            x_row, y_row, start + cols, nx, ny, x_inner, x_factor, y_inner, y_factor,
            x_top, x_sum, y_top, y_sum, a, X_FORM, X_SCALED, Y_FORM, Y_SCALED, True,
        )  # fmt: skip
    x_top, x_sum, y_top, y_sum, a = _join_pairs(x_top, x_sum, y_top, y_sum, a)
    out = o_ptr + (row * tl.num_programs(1) + tl.program_id(1)) * 5
    tl.store(out, x_top)
    tl.store(out + 1, x_sum)
    tl.store(out + 2, y_top)
    tl.store(out + 3, y_sum)
    tl.store(out + 4, a)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _log_sum(top, sums):  # type: ignore[no-untyped-def]
    """Of a row that holds nothing but -inf: NaN, as z - max z is."""
    return tl.where(top == -float("inf"), float("nan"), tl.log(sums))


@triton.jit(do_not_specialize=["spans"])  # type: ignore[untyped-decorator, unused-ignore]
def _finish_pair_kernel(  # type: ignore[no-untyped-def]
    partial_ptr, loss_ptr, stats_ptr, spans, KIND: tl.constexpr, SPANS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    span = tl.arange(0, SPANS)
    inside = span < spans
    place = partial_ptr + (row * spans + span) * 5
    x_top, x_sum, y_top, y_sum, a = _join_pairs(
        tl.load(place, mask=inside, other=-float("inf")),
        tl.load(place + 1, mask=inside, other=0.0),
        tl.load(place + 2, mask=inside, other=-float("inf")),
        tl.load(place + 3, mask=inside, other=0.0),
        tl.load(place + 4, mask=inside, other=0.0),
    )
    x_log = _log_sum(x_top, x_sum)
    y_log = _log_sum(y_top, y_sum)
    loss = a / x_sum + (y_log - x_log)
    tl.store(loss_ptr + row, loss)
    stats_ptr += row * 5
    if KIND == REVERSE:
        tl.store(stats_ptr, x_top)
        tl.store(stats_ptr + 1, x_log)
        tl.store(stats_ptr + 2, y_top)
        tl.store(stats_ptr + 3, y_log)
        tl.store(stats_ptr + 4, loss)
    else:
        tl.store(stats_ptr, y_top)
        tl.store(stats_ptr + 1, y_log)
        tl.store(stats_ptr + 2, x_top)
        tl.store(stats_ptr + 3, x_log)
        tl.store(stats_ptr + 4, 0.0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _single_block(  # type: ignore[no-untyped-def]
    x_row, col, n, inner, factor, top, sums, a,
    FORM: tl.constexpr, SCALED: tl.constexpr, ENTROPY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    new, near, away, e, shrink = _meet(x_row, col, n, inner, factor, top, FORM, SCALED, MASKED)
    if ENTROPY:
        a = _moved(shrink, a, sums, near - top)
        a += _sum(tl.where(e == 0.0, 0.0, e * away))
    return new, sums * shrink + _sum(e), a


@triton.jit(do_not_specialize=["x_stride", "n"])  # type: ignore[untyped-decorator, unused-ignore]
def _single_kernel(  # type: ignore[no-untyped-def]
    x_ptr, o_ptr, x_stride, n, inner, factor,
    FORM: tl.constexpr, SCALED: tl.constexpr, ENTROPY: tl.constexpr, ALIGNED: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """The maximum, the sum, and A of one span of one row."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * x_stride
    if ALIGNED:
        x_row = tl.multiple_of(x_row, 16)
    BLOCK: tl.constexpr = STEPS * LANES * VECTOR
    first = tl.program_id(1) * SPAN
    last = tl.minimum(first + SPAN, n)
    whole = last // BLOCK * BLOCK
    cols = _columns(STEPS, LANES, VECTOR)
    top = tl.full((LANES,), -float("inf"), tl.float32)
    sums = tl.zeros((LANES,), tl.float32)
    a = tl.zeros((LANES,), tl.float32)
    for start in range(first, whole, BLOCK):
        top, sums, a = _single_block(
            x_row, start + cols, n, inner, factor, top, sums, a, FORM, SCALED, ENTROPY, False
        )
    for start in range(whole, last, BLOCK):
        top, sums, a = _single_block(
            x_row, start + cols, n, inner, factor, top, sums, a, FORM, SCALED, ENTROPY, True
        )
    top, sums, a = _join(top, sums, a)
    out = o_ptr + (row * tl.num_programs(1) + tl.program_id(1)) * 3
    tl.store(out, top)
    tl.store(out + 1, sums)
    tl.store(out + 2, a)


@triton.jit(  # type: ignore[untyped-decorator, unused-ignore]
    do_not_specialize=["x_stride", "spans", "id_stride", "o_stride"],
    do_not_specialize_on_alignment=["x_ptr", "ids_ptr"],
)
def _finish_single_kernel(  # type: ignore[no-untyped-def]
    partial_ptr, o_ptr, x_ptr, ids_ptr, x_stride, id_stride, o_stride, spans, inner, factor,
    FORM: tl.constexpr, SCALED: tl.constexpr, ENTROPY: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    span = tl.arange(0, SPANS)
    inside = span < spans
    place = partial_ptr + (row * spans + span) * 3
    top, sums, a = _join(
        tl.load(place, mask=inside, other=-float("inf")),
        tl.load(place + 1, mask=inside, other=0.0),
        tl.load(place + 2, mask=inside, other=0.0),
    )
    o_ptr += row * o_stride
    tl.store(o_ptr, top)
    tl.store(o_ptr + 1, _log_sum(top, sums))
    if ENTROPY:
        tl.store(o_ptr + 2, a / sums)
        which = tl.load(ids_ptr + row * id_stride).to(tl.int64)
        u = _load(x_ptr + row * x_stride, tl.maximum(which, 0), 0, inner, FORM, False)
        if SCALED:
            u = u * factor
        tl.store(o_ptr + 3, tl.where(which < 0, 0.0, u))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _log_probs(  # type: ignore[no-untyped-def]
    row_ptr, col, n, inner, factor, top, log,
    FORM: tl.constexpr, SCALED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(what z is proportional to, log-probs); -inf outside of the row."""
    u = _load(row_ptr, col, n, inner, FORM, MASKED)
    logs = _away(u, factor, top, SCALED) - log
    if MASKED:
        logs = tl.where(col < n, logs, -float("inf"))
    return u, logs


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _expm1(x):  # type: ignore[no-untyped-def]
    """e^x - 1 cancels near 0, where the series has ended after x^6."""
    series = 0.001388888888888889 * x + 0.008333333333333333
    series = series * x + 0.041666666666666664
    series = series * x + 0.16666666666666666
    series = series * x + 0.5
    return tl.where(tl.abs(x) < 0.25, x + x * (x * series), tl.exp(x) - 1.0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _log1p(x):  # type: ignore[no-untyped-def]
    """Gives back what 1 + x has lost to rounding; for x <= 0."""
    more = 1.0 + x
    return tl.log(more) + (x - (more - 1.0))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _mixture(d, w):  # type: ignore[no-untyped-def]
    """r = log m - log p and d - r = log q - log m: exactly 0 at d = 0, without overflow."""
    away = _expm1(-tl.abs(d))
    tail = _log1p(away * tl.where(d > 0.0, 1.0 - w, w))
    return tl.where(d > 0.0, d, 0.0) + tail, tl.where(d > 0.0, 0.0, d) - tail


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _half_sign(x):  # type: ignore[no-untyped-def]
    """0 of 0, and NaN of NaN."""
    return tl.where(x > 0.0, 0.5, tl.where(x < 0.0, -0.5, x))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _slopes(lp, lq, mix, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """g of all kinds but forward KL; NaN where both sides give nothing."""
    if KIND == TVD:
        p = tl.exp(lp)
        q = tl.exp(lq)
        g = _half_sign(p - q)
    elif KIND == REVERSE:
        g = lp - lq
    elif KIND == SKEW_REVERSE:
        r, _ = _mixture(lq - lp, 1.0 - mix)
        g = -r - mix * _expm1(-r)
    else:
        r, away = _mixture(lq - lp, mix)
        if KIND == JSD:
            g = (1.0 - mix) * -r
        else:
            g = (mix - 1.0) * _expm1(away)
    return g


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _terms(lp, lq, mix, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Summands of the loss and of K; what a side gives probability 0 it does not count."""
    p = tl.exp(lp)
    q = tl.exp(lq)
    if KIND == FORWARD:
        loss = tl.where(q == 0.0, 0.0, q * (lq - lp))
        k = tl.zeros_like(loss)
    elif KIND == REVERSE:
        loss = tl.where(p == 0.0, 0.0, p * (lp - lq))
        k = loss
    elif KIND == TVD:
        loss = tl.abs(p - q) * 0.5
        k = p * _half_sign(p - q)
    elif KIND == SKEW_REVERSE:
        r, _ = _mixture(lq - lp, 1.0 - mix)
        loss = tl.where(p == 0.0, 0.0, p * -r)
        k = tl.where(p == 0.0, 0.0, p * (-r - mix * _expm1(-r)))
    else:
        r, away = _mixture(lq - lp, mix)
        loss = tl.where(q == 0.0, 0.0, q * away)
        if KIND == JSD:
            k = (1.0 - mix) * tl.where(p == 0.0, 0.0, p * -r)
            loss = mix * loss + k
        else:
            k = tl.where(p == 0.0, 0.0, p * ((mix - 1.0) * _expm1(away)))
    return loss, k


@triton.jit(  # type: ignore[untyped-decorator, unused-ignore]
    do_not_specialize=["s_stride", "t_stride", "ns_stride", "nt_stride", "ns", "nt"],
    do_not_specialize_on_alignment=["normal_s_ptr", "normal_t_ptr"],
)
def _sums_kernel(  # type: ignore[no-untyped-def]
    s_ptr, t_ptr, normal_s_ptr, normal_t_ptr, o_ptr, s_stride, t_stride, ns_stride, nt_stride,
    ns, nt, s_inner, s_factor, t_inner, t_factor, mix,
    KIND: tl.constexpr, S_FORM: tl.constexpr, S_SCALED: tl.constexpr, T_FORM: tl.constexpr,
    T_SCALED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Loss and K of one span of one row whose normalisers are known."""
    row = tl.program_id(0).to(tl.int64)
    s_row = s_ptr + row * s_stride
    t_row = t_ptr + row * t_stride
    if ALIGNED:
        s_row = tl.multiple_of(s_row, 16)
        t_row = tl.multiple_of(t_row, 16)
    s_top = tl.load(normal_s_ptr + row * ns_stride)
    s_log = tl.load(normal_s_ptr + row * ns_stride + 1)
    t_top = tl.load(normal_t_ptr + row * nt_stride)
    t_log = tl.load(normal_t_ptr + row * nt_stride + 1)
    first = tl.program_id(1) * SPAN
    last = tl.minimum(first + SPAN, ns)
    whole = tl.maximum(first, tl.minimum(last, nt) // BLOCK * BLOCK)
    loss = tl.zeros((BLOCK,), tl.float32)
    k = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, whole, BLOCK):
        col = start + tl.arange(0, BLOCK)
        _, lp = _log_probs(s_row, col, ns, s_inner, s_factor, s_top, s_log, S_FORM, S_SCALED, False)
        _, lq = _log_probs(t_row, col, nt, t_inner, t_factor, t_top, t_log, T_FORM, T_SCALED, False)
        more, more_k = _terms(lp, lq, mix, KIND)
        loss += more
        k += more_k
    for start in range(whole, last, BLOCK):
        col = start + tl.arange(0, BLOCK)
        _, lp = _log_probs(s_row, col, ns, s_inner, s_factor, s_top, s_log, S_FORM, S_SCALED, True)
        _, lq = _log_probs(t_row, col, nt, t_inner, t_factor, t_top, t_log, T_FORM, T_SCALED, True)
        more, more_k = _terms(lp, lq, mix, KIND)
        loss += more
        k += more_k
    out = o_ptr + (row * tl.num_programs(1) + tl.program_id(1)) * 2
    tl.store(out, tl.sum(loss, axis=0))
    tl.store(out + 1, tl.sum(k, axis=0))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _gradient_block(  # type: ignore[no-untyped-def]
    o_row, s_row, t_row, col, ns, nt, s_inner, s_factor, t_inner, t_factor,
    s_top, s_log, t_top, t_log, k, g, mix, c_factor, c_top, c_log, c_g, which,
    KIND: tl.constexpr, S_FORM: tl.constexpr, S_SCALED: tl.constexpr, T_FORM: tl.constexpr,
    T_SCALED: tl.constexpr, EXTRA: tl.constexpr, C_SCALED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    u, lp = _log_probs(s_row, col, ns, s_inner, s_factor, s_top, s_log, S_FORM, S_SCALED, MASKED)
    _, lq = _log_probs(t_row, col, nt, t_inner, t_factor, t_top, t_log, T_FORM, T_SCALED, MASKED)
    p = tl.exp(lp)
    if KIND == FORWARD:
        dx = p - tl.exp(lq)
    else:
        dx = tl.where(p == 0.0, 0.0, p * (_slopes(lp, lq, mix, KIND) - k))
    dx *= g
    if EXTRA:
        # Without a gradient a side counts for nothing, NaN or not.
        dx = tl.where(g == 0.0, 0.0, dx)
        c = tl.exp(_away(u, c_factor, c_top, C_SCALED) - c_log) - tl.where(col == which, 1.0, 0.0)
        dx += tl.where(c_g == 0.0, 0.0, c * c_g)
    if S_FORM == SOFTCAP:
        dx *= 1.0 - u * u
    if MASKED:
        tl.store(o_row + col, dx.to(o_row.dtype.element_ty), mask=col < ns)
    else:
        tl.store(o_row + col, dx.to(o_row.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _fill_zeros(  # type: ignore[no-untyped-def]
    o_row, first, whole, last, BLOCK: tl.constexpr
):
    zeros = tl.zeros((BLOCK,), o_row.dtype.element_ty)
    for start in range(first, whole, BLOCK):
        tl.store(o_row + start + tl.arange(0, BLOCK), zeros)
    for start in range(whole, last, BLOCK):
        col = start + tl.arange(0, BLOCK)
        tl.store(o_row + col, zeros, mask=col < last)


@triton.jit(  # type: ignore[untyped-decorator, unused-ignore]
    do_not_specialize=[
        "o_stride", "s_stride", "t_stride", "g_stride", "c_g_stride", "c_normal_stride",
        "id_stride", "ns", "nt",
    ],
    do_not_specialize_on_alignment=["g_ptr", "stats_ptr", "c_g_ptr", "c_normal_ptr", "ids_ptr"],
)  # fmt: skip
def _gradient_kernel(  # type: ignore[no-untyped-def]
    o_ptr, g_ptr, s_ptr, t_ptr, stats_ptr, c_g_ptr, c_normal_ptr, ids_ptr,
    o_stride, s_stride, t_stride, g_stride, c_g_stride, c_normal_stride, id_stride, ns, nt,
    s_inner, s_factor, t_inner, t_factor, c_factor, chain, c_chain, mix,
    KIND: tl.constexpr, S_FORM: tl.constexpr, S_SCALED: tl.constexpr, T_FORM: tl.constexpr,
    T_SCALED: tl.constexpr, EXTRA: tl.constexpr, C_SCALED: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One span of one row of the gradient; each number is read before it may be overwritten."""
    row = tl.program_id(0).to(tl.int64)
    o_row = o_ptr + row * o_stride
    s_row = s_ptr + row * s_stride
    t_row = t_ptr + row * t_stride
    if ALIGNED:
        o_row = tl.multiple_of(o_row, 16)
        s_row = tl.multiple_of(s_row, 16)
        t_row = tl.multiple_of(t_row, 16)
    first = tl.program_id(1) * SPAN
    last = tl.minimum(first + SPAN, ns)
    g = tl.load(g_ptr + row * g_stride).to(tl.float32)
    # Without a cross-entropy these stand for none.
    c_g, c_top, c_log = g * 0.0, g * 0.0, g * 0.0
    which = -1
    idle = g == 0.0
    if EXTRA:
        c_g = tl.load(c_g_ptr + row * c_g_stride).to(tl.float32)
        c_top = tl.load(c_normal_ptr + row * c_normal_stride).to(tl.float32)
        c_log = tl.load(c_normal_ptr + row * c_normal_stride + 1).to(tl.float32)
        which = tl.load(ids_ptr + row * id_stride).to(tl.int32)
        idle = idle & (c_g == 0.0)
    if idle:
        _fill_zeros(o_row, first, tl.maximum(first, last // BLOCK * BLOCK), last, BLOCK)
    else:
        stats_ptr += row * 5
        s_top = tl.load(stats_ptr)
        s_log = tl.load(stats_ptr + 1)
        t_top = tl.load(stats_ptr + 2)
        t_log = tl.load(stats_ptr + 3)
        k = tl.load(stats_ptr + 4)
        whole = tl.maximum(first, tl.minimum(last, nt) // BLOCK * BLOCK)
        for start in range(first, whole, BLOCK):
            _gradient_block(
                o_row, s_row, t_row, start + tl.arange(0, BLOCK), ns, nt,
                s_inner, s_factor, t_inner, t_factor, s_top, s_log, t_top, t_log, k, g * chain,
                mix, c_factor, c_top, c_log, c_g * c_chain, which,
                KIND, S_FORM, S_SCALED, T_FORM, T_SCALED, EXTRA, C_SCALED, False,
            )  # fmt: skip
        for start in range(whole, last, BLOCK):
            _gradient_block(
                o_row, s_row, t_row, start + tl.arange(0, BLOCK), ns, nt,
                s_inner, s_factor, t_inner, t_factor, s_top, s_log, t_top, t_log, k, g * chain,
                mix, c_factor, c_top, c_log, c_g * c_chain, which,
                KIND, S_FORM, S_SCALED, T_FORM, T_SCALED, EXTRA, C_SCALED, True,
            )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _logprob_block(  # type: ignore[no-untyped-def]
    o_row, x_row, col, n, inner, factor, top, log, entropy, g, e, which,
    FORM: tl.constexpr, SCALED: tl.constexpr, ENTROPY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    u, lp = _log_probs(x_row, col, n, inner, factor, top, log, FORM, SCALED, MASKED)
    p = tl.exp(lp)
    if ENTROPY:
        slope = -g - tl.where(e == 0.0, 0.0, e * (lp + entropy))
        dx = tl.where(p == 0.0, 0.0, p * slope) + tl.where(col == which, g, 0.0)
    else:
        dx = g * (tl.where(col == which, 1.0, 0.0) - p)
    if FORM == SOFTCAP:
        dx *= 1.0 - u * u
    if MASKED:
        tl.store(o_row + col, dx.to(o_row.dtype.element_ty), mask=col < n)
    else:
        tl.store(o_row + col, dx.to(o_row.dtype.element_ty))


@triton.jit(  # type: ignore[untyped-decorator, unused-ignore]
    do_not_specialize=["o_stride", "x_stride", "g_stride", "e_stride", "id_stride", "n"],
    do_not_specialize_on_alignment=["g_ptr", "e_ptr", "ids_ptr", "stats_ptr"],
)
def _logprob_gradient_kernel(  # type: ignore[no-untyped-def]
    o_ptr, g_ptr, e_ptr, x_ptr, ids_ptr, stats_ptr,
    o_stride, x_stride, g_stride, e_stride, id_stride, n, inner, factor, chain,
    FORM: tl.constexpr, SCALED: tl.constexpr, ENTROPY: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One span of one row of the gradient; each number is read before it may be overwritten."""
    row = tl.program_id(0).to(tl.int64)
    o_row = o_ptr + row * o_stride
    x_row = x_ptr + row * x_stride
    if ALIGNED:
        o_row = tl.multiple_of(o_row, 16)
        x_row = tl.multiple_of(x_row, 16)
    first = tl.program_id(1) * SPAN
    last = tl.minimum(first + SPAN, n)
    whole = last // BLOCK * BLOCK
    g = tl.load(g_ptr + row * g_stride).to(tl.float32)
    e = g * 0.0
    if ENTROPY:
        e = tl.load(e_ptr + row * e_stride).to(tl.float32)
    if (g == 0.0) & (e == 0.0):
        _fill_zeros(o_row, first, whole, last, BLOCK)
    else:
        which = tl.load(ids_ptr + row * id_stride).to(tl.int32)
        stats_ptr += row * 4
        top = tl.load(stats_ptr)
        log = tl.load(stats_ptr + 1)
        entropy = log - tl.load(stats_ptr + 2)
        for start in range(first, whole, BLOCK):
            _logprob_block(
                o_row, x_row, start + tl.arange(0, BLOCK), n, inner, factor, top, log, entropy,
                g * chain, e * chain, which, FORM, SCALED, ENTROPY, False,
            )  # fmt: skip
        for start in range(whole, last, BLOCK):
            _logprob_block(
                o_row, x_row, start + tl.arange(0, BLOCK), n, inner, factor, top, log, entropy,
                g * chain, e * chain, which, FORM, SCALED, ENTROPY, True,
            )  # fmt: skip


# ------------------------------------------------------------------------------------ launchers


class _Form(NamedTuple):
    """z = factor u, u = x, tanh(inner x) or log x; dL/dx = chain dL/dz, times 1 - u^2 for tanh."""

    form: int
    inner: float
    factor: float
    chain: float

    @classmethod
    def of(cls, how: Any, temperature: float | None = None) -> _Form:
        t = float(how.temperature) if temperature is None else temperature
        chain = float(how.scale) / t
        if how.probs:
            return cls(_PROBS, 0.0, 1.0 / t, chain)
        if how.softcap:
            return cls(_SOFTCAP, how.scale / how.softcap, how.softcap / t, chain)
        return cls(_PLAIN, 0.0, chain, chain)

    @property
    def scaled(self) -> bool:
        return self.factor != 1.0


def _rows(x: torch.Tensor) -> torch.Tensor:
    """With neighbouring columns side by side in memory."""
    if x.size(1) > _MOST_COLUMNS:
        raise ValueError(f"rows must have at most {_MOST_COLUMNS} columns, got {x.size(1)}")
    return x if _unit(x) else x.contiguous()


def _unit(x: torch.Tensor) -> bool:
    return bool(x.stride(1) == 1 or x.size(1) <= 1)


def _aligned(*tensors: torch.Tensor) -> bool:
    """Whether all rows start at multiples of 16 bytes; one row is asked like many, or its sums
    would be added in another order."""
    return all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in tensors)


def block_shape(aligned: bool, forms: tuple[int, ...], *sizes: int) -> dict[str, int]:
    """STEPS, LANES and VECTOR of a block of elements of these sizes: a thread owns a lane.

    Logarithms hold more numbers at once than a thread has registers for twice as many steps.
    """
    vector = 16 // max(sizes) if aligned else 1
    steps = BLOCK // (LANES * vector) // (2 if _PROBS in forms else 1)
    return {"STEPS": max(1, steps), "LANES": LANES, "VECTOR": vector}


def flat_block(*forms: int, crowded: bool = False) -> int:
    """BLOCK, less where a thread would hold too much for its registers.

    Args:
        crowded: single elements hold an address each, beside a cross-entropy.
    """
    return BLOCK // (2 if _SOFTCAP in forms else 1) // (2 if crowded else 1)


def _spans(columns: int) -> int:
    return max(1, -(-columns // SPAN))


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _single(x: torch.Tensor, ids: torch.Tensor | None, how: Any, out: torch.Tensor) -> torch.Tensor:
    rows, columns = x.shape
    if rows == 0:
        return out
    x = _rows(x)
    form = _Form.of(how)
    aligned = _aligned(x)
    spans = _spans(columns)
    entropy = ids is not None
    with torch.cuda.device_of(x):
        partial = torch.empty(rows * spans * 3, dtype=torch.float32, device=x.device)
        _single_kernel[(rows, spans)](
            x, partial, x.stride(0), columns, form.inner, form.factor,
            FORM=form.form, SCALED=form.scaled, ENTROPY=entropy, ALIGNED=aligned,
            **block_shape(aligned, (form.form,), x.element_size()), SPAN=SPAN, num_warps=WARPS,
        )  # fmt: skip
        _finish_single_kernel[(rows,)](
            partial, out, x, x if ids is None else ids, x.stride(0),
            0 if ids is None else ids.stride(0), out.stride(0), spans, form.inner, form.factor,
            FORM=form.form, SCALED=form.scaled, ENTROPY=entropy, SPANS=_power(spans), num_warps=1,
        )  # fmt: skip
    return out


def normalisers(x: torch.Tensor, how: Any) -> torch.Tensor:
    """float32 [M, 2] of rows [M, V]: the maximum of z, and the logarithm of sum exp(z - maximum).

    Args:
        x: bfloat16, float16 or float32.
        how: has scale, softcap (0: none), temperature, and probs (the rows hold probabilities).
    """
    out = torch.empty((x.size(0), 2), dtype=torch.float32, device=x.device)
    return _single(x, None, how, out)


def logprob_forward(x: torch.Tensor, ids: torch.Tensor, how: Any) -> torch.Tensor:
    """float32 [M, 4] of rows [M, V]: max, log, E = sum p (z - max), and z of the id.

    Args:
        ids: int64 [M]; 0 stands for the z of a negative one.
    """
    out = torch.empty((x.size(0), 4), dtype=torch.float32, device=x.device)
    return _single(x, ids, how, out)


def divergence_sums(
    student: torch.Tensor,
    teacher: torch.Tensor,
    normal_s: torch.Tensor,
    normal_t: torch.Tensor,
    kind: str,
    mix: float,
    how_s: Any,
    how_t: Any,
) -> torch.Tensor:
    """float32 [M, 2]: loss and K of rows whose normalisers are known.

    Args:
        student: [M, V].
        teacher: [M, Vt], Vt <= V; it gives probability 0 to the columns that it lacks.
        normal_s, normal_t: float32 [M, 2], of the whole vocabulary.
    """
    rows, columns = student.shape
    spans = _spans(columns)
    out = torch.empty((rows, spans, 2), dtype=torch.float32, device=student.device)
    if rows:
        student, teacher = _rows(student), _rows(teacher)
        normal_s, normal_t = _rows(normal_s.float()), _rows(normal_t.float())
        s, t = _Form.of(how_s), _Form.of(how_t)
        aligned = _aligned(student, teacher)
        with torch.cuda.device_of(student):
            _sums_kernel[(rows, spans)](
                student, teacher, normal_s, normal_t, out, student.stride(0), teacher.stride(0),
                normal_s.stride(0), normal_t.stride(0), columns, teacher.size(1),
                s.inner, s.factor, t.inner, t.factor, mix,
                KIND=KINDS[kind], S_FORM=s.form, S_SCALED=s.scaled, T_FORM=t.form,
                T_SCALED=t.scaled, ALIGNED=aligned, BLOCK=flat_block(s.form, t.form),
                SPAN=SPAN, num_warps=WARPS,
            )  # fmt: skip
    return out[:, 0] if spans == 1 else out.sum(1)


def divergence_forward(
    student: torch.Tensor, teacher: torch.Tensor, kind: str, mix: float, how_s: Any, how_t: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [M] and statistics [M, 5], both float32: max_s, log_s, max_t, log_t, K.

    Args:
        student: [M, V]; bfloat16, float16 or float32, and so is the teacher.
        teacher: [M, Vt], Vt <= V.
        kind, mix: of the table above; mix is w.
        how_s, how_t: as in `normalisers`.
    """
    if kind in ("forward_kl", "reverse_kl"):
        return _kl(student, teacher, kind, how_s, how_t)
    normal_s = normalisers(student, how_s)
    normal_t = normalisers(teacher, how_t)
    sums = divergence_sums(student, teacher, normal_s, normal_t, kind, mix, how_s, how_t)
    return sums[:, 0].clone(), torch.cat([normal_s, normal_t, sums[:, 1:]], 1)


def _kl(
    student: torch.Tensor, teacher: torch.Tensor, kind: str, how_s: Any, how_t: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = student.shape
    loss = torch.empty(rows, dtype=torch.float32, device=student.device)
    stats = torch.empty((rows, 5), dtype=torch.float32, device=student.device)
    if rows == 0:
        return loss, stats
    x, y = _rows(teacher), _rows(student)
    x_form, y_form = _Form.of(how_t), _Form.of(how_s)
    if kind == "reverse_kl":
        x, y, x_form, y_form = y, x, y_form, x_form
    aligned = _aligned(x, y)
    spans = _spans(columns)
    with torch.cuda.device_of(student):
        partial = torch.empty(rows * spans * 5, dtype=torch.float32, device=student.device)
        _pair_kernel[(rows, spans)](
            x, y, partial, x.stride(0), y.stride(0), x.size(1), y.size(1),
            x_form.inner, x_form.factor, y_form.inner, y_form.factor,
            X_FORM=x_form.form, X_SCALED=x_form.scaled, Y_FORM=y_form.form,
            Y_SCALED=y_form.scaled, ALIGNED=aligned,
            **block_shape(
                aligned, (x_form.form, y_form.form), x.element_size(), y.element_size()
            ),
            SPAN=SPAN, num_warps=WARPS,
        )  # fmt: skip
        _finish_pair_kernel[(rows,)](
            partial, loss, stats, spans, KIND=KINDS[kind], SPANS=_power(spans), num_warps=1
        )
    return loss, stats


def divergence_gradient(
    out: torch.Tensor,
    grad: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor,
    stats: torch.Tensor,
    kind: str,
    mix: float,
    how_s: Any,
    how_t: Any,
    extra: Any = None,
) -> None:
    """Writes grad * dL/dx into `out` [M, V], which may be the student itself.

    A row whose gradients are 0 is written as 0 without a look at its numbers.

    Args:
        grad: [M], of the losses.
        stats: [M, 5], of `divergence_forward`.
        extra: a cross-entropy at temperature 1 to add: has grad [M], normal [M, 2] and ids [M].
    """
    rows, columns = student.shape
    if student.numel() == 0:
        return
    target = out if _unit(out) else torch.empty_like(out, memory_format=torch.contiguous_format)
    student, teacher, stats = _rows(student), _rows(teacher), stats.float().contiguous()
    s, t, c = _Form.of(how_s), _Form.of(how_t), _Form.of(how_s, 1.0)
    c_grad, c_normal, ids = grad, stats, grad
    if extra is not None:
        c_grad, c_normal, ids = extra.grad, _rows(extra.normal), extra.ids
    aligned = _aligned(target, student, teacher)
    with torch.cuda.device_of(student):
        _gradient_kernel[(rows, _spans(columns))](
            target, grad, student, teacher, stats, c_grad, c_normal, ids,
            target.stride(0), student.stride(0), teacher.stride(0), grad.stride(0),
            c_grad.stride(0), c_normal.stride(0), ids.stride(0), columns, teacher.size(1),
            s.inner, s.factor, t.inner, t.factor, c.factor, s.chain, c.chain, mix,
            KIND=KINDS[kind], S_FORM=s.form, S_SCALED=s.scaled, T_FORM=t.form, T_SCALED=t.scaled,
            EXTRA=extra is not None, C_SCALED=c.scaled,
            ALIGNED=aligned,
            BLOCK=flat_block(s.form, t.form, crowded=extra is not None and not aligned),
            SPAN=SPAN, num_warps=WARPS,
        )  # fmt: skip
    if target is not out:
        out.copy_(target)


def logprob_gradient(
    out: torch.Tensor,
    grad: torch.Tensor,
    entropy_grad: torch.Tensor | None,
    x: torch.Tensor,
    ids: torch.Tensor,
    stats: torch.Tensor,
    how: Any,
) -> None:
    """Writes the gradient of log-probs and entropies into `out` [M, V], which may be x itself.

    A row whose gradients are 0 is written as 0 without a look at its numbers. A negative id drops
    the 1 of its log-prob and keeps the p.

    Args:
        grad: [M], of the log-probs.
        entropy_grad: [M], of the entropies, or None.
        stats: [M, 4], of `logprob_forward`.
    """
    rows, columns = x.shape
    if x.numel() == 0:
        return
    target = out if _unit(out) else torch.empty_like(out, memory_format=torch.contiguous_format)
    x, stats = _rows(x), stats.float().contiguous()
    form = _Form.of(how)
    e = grad if entropy_grad is None else entropy_grad
    aligned = _aligned(target, x)
    with torch.cuda.device_of(x):
        _logprob_gradient_kernel[(rows, _spans(columns))](
            target, grad, e, x, ids, stats, target.stride(0), x.stride(0), grad.stride(0),
            e.stride(0), ids.stride(0), columns, form.inner, form.factor, form.chain,
            FORM=form.form, SCALED=form.scaled, ENTROPY=entropy_grad is not None,
            ALIGNED=aligned, BLOCK=flat_block(form.form), SPAN=SPAN, num_warps=WARPS,
        )  # fmt: skip
    if target is not out:
        out.copy_(target)
