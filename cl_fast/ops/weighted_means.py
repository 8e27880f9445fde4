"""Means of tensors whose weights are measured: Fisher merging and RegMean.

    fisher_mean   out_i = sum_k w_k F_k,i x_k,i / sum_k w_k F_k,i
    regmean       W = (sum_k w_k G_k)^-1 sum_k w_k G_k W_k,   off-diagonals of G times alpha

F is a diagonal of the Fisher information in the shape of the tensor; G the second moments
``E[x x^T]`` of a linear layer's inputs, W its weight as [in, out]. The first is the maximum of the
product of K Gaussians around the models (Matena and Raffel 2022, arXiv:2111.09832), the second the
minimum of ``sum_k w_k E|W^T x - W_k^T x|^2`` (Jin et al. 2023, arXiv:2212.09849). float64 inside.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["fisher_mean", "regmean"]


def fisher_mean(
    tensors: Sequence[Tensor], fishers: Sequence[Tensor], weights: Sequence[float] | None = None
) -> Tensor:
    """The mean weighted by Fisher diagonals; where they sum to 0, the plain weighted mean.

    Args:
        tensors, fishers: K of each, all of one shape; no entry of F is negative.
        weights: K numbers that do not sum to 0; equal ones by default.

    Returns:
        float64 in that shape.

    Raises:
        ValueError: shapes or numbers differ; an F is negative, NaN or infinite.
    """
    given = _weights(tensors, weights)
    if len(fishers) != len(tensors):
        raise ValueError(f"{len(tensors)} tensors need as many fishers; got {len(fishers)}")
    total = torch.zeros(tensors[0].shape, dtype=torch.float64, device=tensors[0].device)
    plain, size = torch.zeros_like(total), torch.zeros_like(total)
    with torch.no_grad():
        for k, (x, f, w) in enumerate(zip(tensors, fishers, given, strict=True)):
            if x.shape != total.shape or f.shape != total.shape:
                raise ValueError(
                    f"tensors[{k}] and fishers[{k}] must have the shape {tuple(total.shape)}; got "
                    f"{tuple(x.shape)} and {tuple(f.shape)}"
                )
            wide = f.double()
            if not bool((wide >= 0.0).all() & torch.isfinite(wide).all()):
                raise ValueError(f"fishers[{k}] holds negative, NaN or infinite values")
            total += w * wide * x.double()
            size += w * wide
            plain += w * x.double()
        none = size == 0.0
        return torch.where(none, plain / sum(given), total / torch.where(none, 1.0, size))


def regmean(
    tensors: Sequence[Tensor],
    grams: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    *,
    alpha: float = 0.9,
    in_first: bool = False,
) -> Tensor:
    """The weight of a linear layer that keeps the outputs of K layers on their own inputs.

    Args:
        tensors: K weights, [out, in], or [in, out] with ``in_first`` (GPT-2's Conv1D).
        grams: K second moments of the inputs, [in, in], symmetric.
        weights: K numbers that do not sum to 0; equal ones by default.
        alpha: factor of the off-diagonals, from 0 (each input by itself) to 1.

    Returns:
        float64 in the shape of the tensors. Where the sum of the G is singular, the directions that
        no input has are the plain weighted mean.

    Raises:
        ValueError: shapes or numbers differ, alpha out of 0..1, a G is not symmetric or not finite.
    """
    given = _weights(tensors, weights)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be from 0 to 1; got {alpha!r}")
    if len(grams) != len(tensors):
        raise ValueError(f"{len(tensors)} tensors need as many grams; got {len(grams)}")
    if tensors[0].ndim != 2:
        raise ValueError(f"regmean is for matrices; got the shape {tuple(tensors[0].shape)}")
    n = tensors[0].shape[0 if in_first else 1]
    with torch.no_grad():
        device = tensors[0].device
        left = torch.zeros(n, n, dtype=torch.float64, device=device)
        right = torch.zeros(
            n, tensors[0].shape[1 if in_first else 0], dtype=torch.float64, device=device
        )
        mean = torch.zeros_like(right)
        for k, (x, g, w) in enumerate(zip(tensors, grams, given, strict=True)):
            if x.shape != tensors[0].shape or g.shape != (n, n):
                raise ValueError(
                    f"tensors[{k}] must be {tuple(tensors[0].shape)} and grams[{k}] {(n, n)}; got "
                    f"{tuple(x.shape)} and {tuple(g.shape)}"
                )
            wide = g.double()
            if not bool(torch.isfinite(wide).all()):
                raise ValueError(f"grams[{k}] holds NaN or infinite values")
            if not torch.allclose(wide, wide.t(), rtol=1e-3, atol=1e-5 * float(wide.abs().max())):
                raise ValueError(f"grams[{k}] is not symmetric")
            reduced = alpha * wide + (1.0 - alpha) * torch.diag(wide.diagonal())
            weight = x.double() if in_first else x.double().t()
            left += w * reduced
            right += w * (reduced @ weight)
            mean += w * weight
        mean /= sum(given)
        # The mean plus what the data asks for beyond it: exact where G is regular, and the mean in
        # the null space of a G that is not.
        rest = right - left @ mean
        solved = torch.linalg.lstsq(left, rest, driver="gelsd").solution if not _regular(
            left
        ) else torch.cholesky_solve(rest, torch.linalg.cholesky(left))  # fmt: skip
        out = mean + solved
        return out if in_first else out.t().contiguous()


def _regular(matrix: Tensor) -> bool:
    """Whether a symmetric matrix is positive definite with some room."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return False
    diagonal = factor.diagonal()
    return bool(diagonal.min() > 1e-6 * diagonal.max()) if len(diagonal) else True


def _weights(tensors: Sequence[Tensor], weights: Sequence[float] | None) -> list[float]:
    if not tensors:
        raise ValueError("tensors must hold at least one tensor")
    given = [1.0] * len(tensors) if weights is None else [float(w) for w in weights]
    if len(given) != len(tensors):
        raise ValueError(f"{len(tensors)} tensors need as many weights; got {len(given)}")
    if abs(sum(given)) < 1e-8:
        raise ValueError(f"the weights sum to {sum(given):g}, which gives no mean")
    return given


# What rules of merges call.


def fisher_rule(
    values: Sequence[Tensor],
    base: Tensor | None,
    *,
    weights: Sequence[float],
    statistics: Sequence[Tensor],
) -> Tensor:
    """`fisher_mean` of a part of a tensor."""
    return fisher_mean(values, statistics, weights)


def regmean_rule(
    values: Sequence[Tensor],
    base: Tensor | None,
    *,
    weights: Sequence[float],
    statistics: Sequence[Tensor],
    alpha: float,
    in_first: bool,
) -> Tensor:
    """`regmean` of a tensor."""
    return regmean(values, statistics, weights, alpha=alpha, in_first=in_first)
