"""Merges on the sphere and Model Stock, for tensors in memory.

    slerp          c_0 x_0 + c_1 x_1,     c = sin((1-t) a) / sin a, sin(t a) / sin a
    nuslerp        the same with t = w_1 / (w_0 + w_1), of the whole, or of each row or column
    multislerp     r m / |m|,             m = sum_k w_k x_k / |x_k|,   r = sum_k w_k |x_k|
    karcher_mean   r p,                   p the unit vector with the least sum_k w_k angle(p, x_k)^2
    model_stock    b + t (mean x_k - b),  t = K cos / (1 + (K-1) cos), cos the mean over pairs

All take their weights from the inner products in float64 (:mod:`cl_fast.ops.blending` has the
formulas, and what is done with zeros, equal and opposite vectors), and combine once, in float32
with one rounding, or in float64 for float64 tensors. For float32, bfloat16 and float16 on the CPU
the results are those of ``cl-fast merge`` to the last bit. None is differentiable. ``out_dtype`` is
the type of the result; by default that of the base or of the first tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from cl_fast.ops.blending import (
    LINEAR_ABOVE,
    karcher_weights,
    model_stock_weights,
    multislerp_weights,
    nuslerp_weights,
    slerp_weights,
)
from cl_fast.ops.combining import combine, combine_reference
from cl_fast.ops.inner_products import gram_matrix
from cl_fast.ops.policy import Policy

__all__ = [
    "Along",
    "karcher_mean",
    "model_stock",
    "model_stock_rows",
    "multislerp",
    "nuslerp",
    "nuslerp_columns",
    "nuslerp_rows",
    "slerp",
]

Along = Literal["all", "rows", "columns"]
"""What is one vector: the whole tensor, its last dimension, or its first."""

_SMALLEST_SINE = 1e-6


def slerp(
    start: Tensor,
    end: Tensor,
    t: float,
    *,
    linear_above: float = LINEAR_ABOVE,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Spherical interpolation from ``start`` (t = 0) to ``end`` (t = 1), each as one vector.

    Args:
        start, end: of one shape and floating type.
        t: any finite number; outside 0..1 the arc goes on.
        linear_above: where ``|cos|`` is larger, ``(1-t) start + t end`` is taken.

    Returns:
        As ``start``.

    Raises:
        ValueError: shapes differ. TypeError: not of a floating type.
    """
    gram = _gram([start, end], None)
    found = slerp_weights(gram, t, linear_above=linear_above)
    return _combine([start, end], found, None, out_dtype)


def nuslerp(
    first: Tensor,
    second: Tensor,
    weights: Sequence[float],
    *,
    base: Tensor | None = None,
    along: Along = "all",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Spherical interpolation by weights, of tensors or of their differences from a base.

    Args:
        first, second, base: of one shape and floating type.
        weights: two numbers; ``t = w_1 / (w_0 + w_1)``, one half where they sum to 0.
        along: ``all``; ``rows`` interpolates each vector of the last dimension by itself,
            ``columns`` each of the first.

    Returns:
        As ``first``.

    Raises:
        ValueError: shapes differ, not two weights, or an unknown ``along``.
    """
    if len(weights) != 2:
        raise ValueError(f"weights must be two numbers; got {len(weights)}")
    if along not in get_args(Along):
        raise ValueError(f"along must be one of {', '.join(get_args(Along))}; got {along!r}")
    if along == "all":
        found = nuslerp_weights(_gram([first, second], base), weights)
        return _combine([first, second], found, base, out_dtype)
    _gram([first[:0] if first.ndim else first, second[:0] if second.ndim else second], None)
    if first.shape != second.shape or (base is not None and base.shape != first.shape):
        raise ValueError(f"the shapes differ: {tuple(first.shape)} and {tuple(second.shape)}")
    run = nuslerp_rows if along == "rows" else nuslerp_columns
    with torch.no_grad():
        return _rounded(run([first, second], base, weights=weights), out_dtype or first.dtype)


def multislerp(
    tensors: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    *,
    base: Tensor | None = None,
    normalize_weights: bool = True,
    eps: float = 1e-8,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The weighted mean of the directions of K tensors (or deltas), with their mean length.

    Args:
        tensors, base: of one shape and floating type.
        weights: K numbers, by default equal ones.
        normalize_weights: divide them by their sum first.
        eps: added to each length; the smallest length of a mean that has a direction.

    Raises:
        ValueError: shapes or numbers of weights differ; weights that sum to 0 are to be normalised.
    """
    given = _weights(tensors, weights)
    found = multislerp_weights(
        _gram(tensors, base), given, normalize_weights=normalize_weights, eps=eps
    )
    return _combine(tensors, found, base, out_dtype)


def karcher_mean(
    tensors: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    *,
    max_iter: int = 10,
    tol: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The Karcher (Frechet) mean of the directions of K tensors, with their mean length.

    Args:
        tensors: of one shape and floating type.
        weights: K numbers, by default equal ones; divided by their sum.
        max_iter: the most steps. tol: the step, in radians, that is the last.

    Raises:
        ValueError: shapes or numbers of weights differ, weights that sum to 0.
    """
    given = _weights(tensors, weights)
    found = karcher_weights(_gram(tensors, None), given, max_iter=max_iter, tol=tol)
    return _combine(tensors, found, None, out_dtype)


def model_stock(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    filter_wise: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Between a base and the mean of K >= 2 finetuned tensors, as far as their deltas agree.

    Args:
        base, tensors: of one shape and floating type.
        filter_wise: take an angle, and a ratio, for each vector of the last dimension.

    Raises:
        ValueError: fewer than two tensors, or shapes that differ.
    """
    if not filter_wise:
        found = model_stock_weights(_gram(tensors, base))
        return _combine(tensors, found, base, out_dtype)
    if len(tensors) < 2:
        raise ValueError(f"model stock needs two or more tensors; got {len(tensors)}")
    if any(x.shape != base.shape for x in tensors):
        raise ValueError(f"every tensor must have the shape of the base, {tuple(base.shape)}")
    with torch.no_grad():
        made = model_stock_rows(list(tensors), base, weights=())
        return _rounded(made, out_dtype or base.dtype)


# The parts of tensors that rules of merges are given: inputs of any floating type, float64 inside.


def nuslerp_rows(
    values: Sequence[Tensor], base: Tensor | None, *, weights: Sequence[float]
) -> Tensor:
    """nuslerp of each vector of the last dimension; float64."""
    a, b = (x.double() if base is None else x.double() - base.double() for x in values)
    total = weights[0] + weights[1]
    t = 0.5 if abs(total) < 1e-6 else weights[1] / total
    dot = (a * b).sum(-1, keepdim=True)
    squares = (a * a).sum(-1, keepdim=True) * (b * b).sum(-1, keepdim=True)
    angle = torch.atan2((squares - dot * dot).clamp(min=0.0).sqrt(), dot)
    angle = torch.where(squares > 0.0, angle, torch.pi / 2)
    sine = angle.sin()
    line = sine < _SMALLEST_SINE
    sine = torch.where(line, 1.0, sine)
    first = torch.where(line, 1.0 - t, torch.sin((1.0 - t) * angle) / sine)
    second = torch.where(line, t, torch.sin(t * angle) / sine)
    out = first * a + second * b
    return out if base is None else base.double() + out


def nuslerp_columns(
    values: Sequence[Tensor], base: Tensor | None, *, weights: Sequence[float]
) -> Tensor:
    """nuslerp of each vector of the first dimension; float64."""
    if not values[0].ndim:
        return nuslerp_rows(values, base, weights=weights)
    turned = [x.transpose(0, -1) for x in values]
    start = None if base is None else base.transpose(0, -1)
    return nuslerp_rows(turned, start, weights=weights).transpose(0, -1)


def model_stock_rows(
    values: Sequence[Tensor], base: Tensor | None, *, weights: Sequence[float]
) -> Tensor:
    """Model Stock of each vector of the last dimension; float64. It has no weights."""
    if base is None:
        raise ValueError("model stock needs a base")
    start, count = base.double(), len(values)
    deltas = [x.double() - start for x in values]
    lengths = [d.square().sum(-1, keepdim=True).sqrt() for d in deltas]
    total = torch.zeros_like(lengths[0])
    for i in range(count):
        for j in range(i + 1, count):
            size = lengths[i] * lengths[j]
            dot = (deltas[i] * deltas[j]).sum(-1, keepdim=True)
            total += torch.where(size > 0.0, dot / size, 0.0).clamp(-1.0, 1.0)
    cosine = total / (count * (count - 1) / 2)
    denominator = 1.0 + (count - 1) * cosine
    singular = denominator.abs() < 1e-6
    ratio = torch.where(singular, 0.0, cosine / torch.where(singular, 1.0, denominator))
    return start + ratio * torch.stack(deltas).sum(0)


def _weights(tensors: Sequence[Tensor], weights: Sequence[float] | None) -> list[float]:
    given = [1.0] * len(tensors) if weights is None else [float(w) for w in weights]
    if len(given) != len(tensors):
        raise ValueError(f"{len(tensors)} tensors need as many weights; got {len(given)}")
    return given


def _gram(tensors: Sequence[Tensor], base: Tensor | None) -> list[list[float]]:
    rows: list[list[float]] = gram_matrix(tensors, base).tolist()
    return rows


def _rounded(made: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 in the type of the result, by way of float32 as a merge stores it."""
    return made if dtype == torch.float64 else made.float().to(dtype)


def _combine(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    policy = Policy(difference=base is not None)
    every = [*tensors, *([] if base is None else [base])]
    with torch.no_grad():
        if any(x.dtype == torch.float64 for x in every):
            return combine_reference(
                base,
                tensors,
                weights=weights,
                policy=policy,
                out_dtype=out_dtype or torch.float64,
                compute_dtype=torch.float64,
            )
        inputs = [x.detach() for x in tensors]
        return combine(base, inputs, weights=weights, policy=policy, out_dtype=out_dtype)
