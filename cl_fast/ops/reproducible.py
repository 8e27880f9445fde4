"""The low-rank update whose bits depend on nothing but its numbers.

    W = round(B + U V^T)        W, B [m, n], U [m, r], V [n, r]

A matrix product of floats is summed in an order that the BLAS chooses by shape, threads and
processor, and its last bits follow. Where bits are promised - a checkpoint on disk and the model
in memory, a merge and its verification on another machine - the factors are cut into integers
small enough that every sum of their products is exact in float64, in whatever order (the error-free
splitting of Ozaki et al. 2012):

    u_ir = 2^a_i (h_ir + 2^-p l_ir),  v_jr likewise;   h, l integers, |h| <= 2^p, |l| <= 2^(p-1)
    p = (53 - ceil(log2 r)) / 2,  so that  r 2^p 2^p <= 2^53
    (U V^T)_ij = 2^(a_i + b_j) (sum h h' + 2^-p sum (h l' + l h'))

Before that each column of U and V is scaled by a power of two and its inverse, so that both reach
equally far. What is left out, sum l l', is below 2^-36 of the largest product for a rank of 4096,
and less for smaller ones: much finer than float32. Then come one addition in float64, the rounding
to float32, and that to the weight's dtype, as `rank_update` does it. Two float64 products, of ranks
r and 2r, take the place of one in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cl_fast.ops.low_rank import Rounding, rank_update_

__all__ = ["reproducible_update_"]

_BLOCK = 1 << 19
"""Elements of the float64 sums that are made at a time: 4 MB, which caches hold."""


def reproducible_update_(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    base: Tensor | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
) -> Tensor:
    """weight = round(base + u v^T), with the same bits for any threads, BLAS and processor.

    Not differentiable.

    Args:
        weight: [m, n], float32, bfloat16 or float16; returned.
        u, v: [m, r] and [n, r], of a floating type, finite; any rank.
        base: as `weight`, of any of those types; by default `weight` itself.
        rounding, seed: as `rank_update_`.

    Raises:
        TypeError: the weight is of another type.
        ValueError: shapes differ, u or v holds NaN or infinity, rounding does not fit.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"weight must be float32, bfloat16 or float16; got {weight.dtype}")
    m, n = weight.shape
    r = u.shape[-1]
    for name, factor, rows in (("u", u, m), ("v", v, n)):
        if tuple(factor.shape) != (rows, r):
            raise ValueError(
                f"{name} must have the shape {(rows, r)} for a weight of {(m, n)}; got "
                f"{tuple(factor.shape)}"
            )
    base = weight if base is None else base
    with torch.no_grad():
        nothing = (
            weight.new_zeros(m, 0, dtype=torch.float32),
            weight.new_zeros(n, 0, dtype=torch.float32),
        )
        if not r:
            return rank_update_(weight, *nothing, base=base, rounding=rounding, seed=seed)
        left, right = u.detach().to(torch.float64), v.detach().to(torch.float64)
        for name, factor in (("u", left), ("v", right)):
            if not bool(torch.isfinite(factor).all()):
                raise ValueError(f"{name} holds NaN or infinite values")
        shift = (_exponents(right, 0) - _exponents(left, 0)) // 2
        bits = (53 - math.ceil(math.log2(r))) // 2
        left_high, left_low = _split(left * _power(shift), bits)
        right_high, right_low = _split(right * _power(-shift), bits)
        left_both = torch.cat([left_high, left_low], 1) * 2.0**-bits
        right_both = torch.cat([right_low, right_high], 1)
        total = weight if weight.dtype == torch.float32 and rounding == "nearest" else None
        if total is None:
            total = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        step = max(1, _BLOCK // max(1, n))
        low = left.new_empty(min(step, m), n)
        high = torch.empty_like(low)
        for first in range(0, m, step):
            block = slice(first, first + step)
            count = min(step, m - first)
            # Each product by itself is exact; then there are two roundings, in this order.
            sums = torch.mm(left_both[block], right_both.t(), out=low[:count])
            sums += torch.mm(left_high[block], right_high.t(), out=high[:count])
            sums += base[block]
            total[block] = sums
        if total is not weight:
            rank_update_(weight, *nothing, base=total, rounding=rounding, seed=seed)
    return weight


def _exponents(x: Tensor, dim: int) -> Tensor:
    """e with max |x| < 2^e along a dimension; 0 where all is 0."""
    return torch.frexp(x.abs().amax(dim))[1].to(torch.int64)


def _power(exponents: Tensor) -> Tensor:
    """2^e, exactly."""
    return ((exponents + 1023).clamp(1, 2046) << 52).view(torch.float64)


def _split(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """2^a h and 2^a l for x = 2^a (h + 2^-bits l): integers h, l [m, r], one a for each row."""
    exponents = _exponents(x, 1) - bits
    scale = _power(exponents)[:, None]
    whole = x * _power(-exponents)[:, None]
    high = whole.round()
    low = ((whole - high) * 2.0**bits).round()
    return high * scale, low * scale
