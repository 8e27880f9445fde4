"""Weights of merges that stay in the span of their inputs, from inner products alone.

Spherical interpolation, its generalisations and Model Stock all give ``sum_k c_k x_k`` (or
``base + sum_k c_k d_k`` on deltas ``d_k = x_k - base``), where the ``c_k`` depend on the vectors
only through their Gram matrix ``G_ij = <x_i, x_j>``. With G summed in float64 the rest is a few
operations on K x K numbers, here in plain Python:

===============  =====================================================================
slerp            ``c = sin((1-t) a) / sin a, sin(t a) / sin a``, a the angle of x_0 and x_1
multislerp       ``c_k = r w_k / (|x_k| |m|)``, ``m = sum w_k x_k / |x_k|``, ``r = sum w_k |x_k|``
karcher          the point of the unit sphere with the least sum of squared angles, times r
model_stock      ``c_k = t / K``, ``t = K cos / (1 + (K-1) cos)``, cos the mean over pairs
===============  =====================================================================

A vector of zeros has no direction: it makes a right angle with every other, and takes no part in
a mean of directions. G is a list of rows, or packed (:func:`unpack_gram`). No torch, no numpy.

Sources: Shoemake 1985 (slerp), Karcher 1977, Jang et al. 2024 (Model Stock, arXiv:2403.19522).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = [
    "LINEAR_ABOVE",
    "karcher_weights",
    "model_stock_ratio",
    "model_stock_weights",
    "multislerp_weights",
    "nuslerp_weights",
    "slerp_weights",
    "unpack_gram",
]

#: |cos| above which slerp is linear interpolation, as in the peers.
LINEAR_ABOVE = 0.9995

#: Sine below which nuslerp takes two directions for one line, and karcher for opposite points:
#: what inner products in float64 can tell apart.
_SMALLEST_SINE = 1e-6

#: Length below which a mean of unit vectors has no direction.
_SMALLEST_MEAN = 1e-7

Gram = Sequence[Sequence[float]]


def unpack_gram(packed: Sequence[float], count: int) -> list[list[float]]:
    """The symmetric matrix of ``count`` vectors whose row i is stored from the diagonal on.

    Raises:
        ValueError: not ``count (count + 1) / 2`` numbers.
    """
    if len(packed) != count * (count + 1) // 2:
        raise ValueError(f"a Gram matrix of {count} vectors is not of {len(packed)} numbers")
    rows = [[0.0] * count for _ in range(count)]
    place = iter(packed)
    for i in range(count):
        for j in range(i, count):
            rows[i][j] = rows[j][i] = next(place)
    return rows


def slerp_weights(gram: Gram, t: float, *, linear_above: float = LINEAR_ABOVE) -> list[float]:
    """Weights of x_0 and x_1 of the spherical interpolation at ``t`` (0: x_0, 1: x_1).

    Linear where ``|cos| > linear_above``. With a vector of zeros the angle is a right one.
    """
    _check(gram, 2)
    if abs(_cosine(gram, 0, 1)) > linear_above:
        return [1.0 - t, t]
    return _arc(_angle(gram), t)


def nuslerp_weights(gram: Gram, weights: Sequence[float]) -> list[float]:
    """Weights of x_0 and x_1 at ``t = w_1 / (w_0 + w_1)`` (one half where the sum is 0).

    Linear only where the two are one line as far as float64 can tell (a sine below 1e-6).
    """
    _check(gram, 2)
    total = weights[0] + weights[1]
    t = 0.5 if abs(total) < 1e-6 else weights[1] / total
    angle = _angle(gram)
    if math.sin(angle) < _SMALLEST_SINE:
        return [1.0 - t, t]
    return _arc(angle, t)


def multislerp_weights(
    gram: Gram, weights: Sequence[float], *, normalize_weights: bool = True, eps: float = 1e-8
) -> list[float]:
    """The weighted mean of the directions, as long as the weighted mean of the lengths.

    The interpolation in the tangent space at that mean adds nothing: the weighted sum of the
    tangents at ``m / |m|`` is ``m - <m, m> m / |m|^2 = 0``. A single vector is left as it is.
    Where the directions cancel (``|m|`` below ``eps`` or 1e-7) it is the weighted mean of the
    vectors themselves.

    Raises:
        ValueError: the weights are to be normalised and sum to 0.
    """
    _check(gram, len(weights))
    if len(weights) == 1:
        return [1.0]
    shares = _shares(weights) if normalize_weights else list(weights)
    lengths = _lengths(gram)
    inverse = [1.0 / (length + eps) if length > 0.0 else 0.0 for length in lengths]
    mean = [w * f for w, f in zip(shares, inverse, strict=True)]
    norm = _norm(gram, mean)
    if norm < max(eps, _SMALLEST_MEAN):
        return shares
    radius = sum(w * length for w, length in zip(shares, lengths, strict=True))
    return [radius * m / norm for m in mean]


def karcher_weights(
    gram: Gram, weights: Sequence[float] | None = None, *, max_iter: int = 10, tol: float = 1e-5
) -> list[float]:
    """The weighted Karcher (Frechet) mean of the directions, as long as the mean length.

    Gradient steps on the sphere from the weighted mean of the directions (from the first vector
    where they cancel) until the step is shorter than ``tol`` or ``max_iter`` were taken. A point
    opposite to the present mean has no shortest way to it and does not pull. Vectors of zeros
    count for the length only.

    Args:
        weights: not negative; equal ones by default.

    Raises:
        ValueError: the weights sum to 0.
    """
    count = len(gram)
    _check(gram, count)
    shares = [1.0 / count] * count if weights is None else _shares(weights)
    if count == 1:
        return [1.0]
    lengths = _lengths(gram)
    used = [k for k in range(count) if lengths[k] > 0.0]
    pull = sum(shares[k] for k in used)
    if not used or pull == 0.0:
        return [0.0] * count
    unit = [[gram[i][j] / (lengths[i] * lengths[j]) for j in used] for i in used]
    alpha = [shares[k] / pull for k in used]
    mean = list(alpha)
    norm = _norm(unit, mean)
    if norm < max(tol, _SMALLEST_MEAN):
        mean, norm = [1.0] + [0.0] * (len(used) - 1), 1.0
    mean = [m / norm for m in mean]
    for _ in range(max_iter):
        step = [0.0] * len(used)
        for k, row in enumerate(unit):
            cosine = sum(g * m for g, m in zip(row, mean, strict=True))
            angle = math.acos(max(-1.0, min(1.0, cosine)))
            if angle < tol or math.sin(angle) < _SMALLEST_SINE:
                continue
            factor = alpha[k] * angle / math.sin(angle)
            step[k] += factor
            for j, m in enumerate(mean):
                step[j] -= factor * cosine * m
        length = _norm(unit, step)
        if length < tol:
            break
        turn = math.sin(length) / length
        mean = [math.cos(length) * m + turn * s for m, s in zip(mean, step, strict=True)]
        norm = _norm(unit, mean)
        mean = [m / norm for m in mean]
    radius = sum(w * length for w, length in zip(shares, lengths, strict=True))
    found = [0.0] * count
    for k, m in zip(used, mean, strict=True):
        found[k] = radius * m / lengths[k]
    return found


def model_stock_ratio(gram: Gram) -> float:
    """``t = K cos / (1 + (K-1) cos)`` from the Gram matrix of K >= 2 deltas.

    Not clamped: deltas that point away from one another give a negative ratio. 0 (the base) where
    the denominator vanishes.
    """
    count = len(gram)
    if count < 2:
        raise ValueError(f"model stock needs two or more models beside the base; got {count}")
    _check(gram, count)
    pairs = [_cosine(gram, i, j) for i in range(count) for j in range(i + 1, count)]
    cosine = math.fsum(pairs) / len(pairs)
    denominator = 1.0 + (count - 1) * cosine
    return 0.0 if abs(denominator) < 1e-6 else count * cosine / denominator


def model_stock_weights(gram: Gram) -> list[float]:
    """The weight of each delta: the ratio over their number."""
    return [model_stock_ratio(gram) / len(gram)] * len(gram)


def _check(gram: Gram, count: int) -> None:
    if len(gram) != count or any(len(row) != count for row in gram):
        shape = [len(gram), *{len(row) for row in gram}]
        raise ValueError(f"the Gram matrix of {count} vectors must be square; got {shape}")


def _shares(weights: Sequence[float]) -> list[float]:
    total = math.fsum(weights)
    if abs(total) < 1e-8:
        raise ValueError(f"the weights sum to {total:g} and cannot be normalised")
    return [w / total for w in weights]


def _lengths(gram: Gram) -> list[float]:
    return [math.sqrt(gram[k][k]) for k in range(len(gram))]


def _norm(gram: Gram, c: Sequence[float]) -> float:
    """|sum c_k x_k|."""
    return math.sqrt(
        max(0.0, math.fsum(a * b * g for a, row in zip(c, gram, strict=True)
                           for b, g in zip(c, row, strict=True)))
    )  # fmt: skip


def _cosine(gram: Gram, i: int, j: int) -> float:
    size = math.sqrt(gram[i][i]) * math.sqrt(gram[j][j])
    return max(-1.0, min(1.0, gram[i][j] / size)) if size > 0.0 else 0.0


def _angle(gram: Gram) -> float:
    (a, dot), (_, b) = gram
    # atan2 is exact near 0 and pi, where the arc cosine is not. The products of sums of squares of
    # float32 are far from the ends of float64.
    return math.atan2(math.sqrt(max(0.0, a * b - dot * dot)), dot) if a * b > 0.0 else math.pi / 2


def _arc(angle: float, t: float) -> list[float]:
    sine = math.sin(angle)
    return [math.sin((1.0 - t) * angle) / sine, math.sin(t * angle) / sine]
