"""Merges that choose per element by more than its own rank: SCE, NearSwap, Arcee Fusion, RAM.

With d_k = x_k - base, all in float64 but for what is named, one rounding to float32 at most:

    sce           V = variance of the d_k over the models; of the elements with V != 0 the
                  int(select_topk * their number) with the largest V stay (V compared in float32, of
                  equal ones the first by index), the others are 0 in every d_k. Then
                  w_k = mean(d_k^2) / sum_j mean(d_j^2), or 1 / K where that sum is below 1e-6;
                  plus = sum_k d_k >= 0; out = base + sum w_k d_k / max(1e-6, sum w_k), both over
                  the k with d_k > 0 if plus, d_k < 0 if not (Wan et al., FuseChat, 2024, arXiv
                  2408.07990)
    nearswap      out = base + min(1, t / max(1e-6, |d|)) d: no element moves further than t
                  (alchemonaut, QuartetAnemoi-70B)
    arcee_fusion  I = |d| KL(p || q) with p, q = softmax of the rows of x and base, + 1e-8; out = x
                  where I >= median + 1.5 (Q3 - Q1), else base; the quantiles are those of all I of
                  the tensor, Qf = the element at int(f (n - 1)) in rising order
    ram           an element belongs to the models with |d_k| > epsilon; out = base + the mean of
                  their d_k, base where there are none (arXiv 2601.13572)
    ramplus_tl    ram, where the d_k that only one model has are times
                  1 + r min(alpha, shared_k / max(epsilon, alone_k)), the numbers of elements that
                  model k has with others and alone

The definitions and constants are those of mergekit 0.1.5. Functions have the form of
`cl_fast.merging.rules.Whole`: `values` and `base` have one shape and any dtypes that are readable,
`weights` are not used, and the result is float32 or float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cl_fast.ops.magnitude import kept_by_code, magnitude_codes, select_code

__all__ = ["arcee_fusion", "nearswap", "ram", "ramplus_tl", "sce"]

_PART = 1 << 16  # elements worked on at a time: the float64 temporaries stay in the cache
_SMALLEST_SQUARES = 1e-6
_SMALLEST_DIVISOR = 1e-6
_SMALLEST_STEP = 1e-6
_SMOOTHING = 1e-8


def _parts(n: int, step: int = _PART) -> Iterator[slice]:
    for first in range(0, n, step):
        yield slice(first, min(n, first + step))


def _deltas(values: Sequence[Tensor], base: Tensor, part: slice) -> Tensor:
    """[models, elements] in float64, of flat tensors."""
    start = base[part].double()
    return torch.stack([value[part].double() - start for value in values])


def _row_sums(values: Tensor) -> Tensor:
    """The sum of each row, in an order that no number of threads changes."""
    run = 4096  # too short to be cut among threads
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % run))
    return padded.view(values.shape[0], -1, run).sum(dim=2).sum(dim=1)


def sce(
    values: list[Tensor],
    base: Tensor | None,
    *,
    weights: Sequence[float],
    select_topk: float,
) -> Tensor:
    """Select, calculate, erase: the weight of a model follows from the size of its deltas.

    Args:
        values: the models.
        base: what the deltas are taken from.
        weights: not used.
        select_topk: the fraction of the elements that differ between models to keep, in [0, 1].
    """
    assert base is not None
    shape, n, count = base.shape, base.numel(), len(values)
    base = base.reshape(-1)
    values = [value.reshape(-1) for value in values]
    keep: Tensor | None = None
    if select_topk < 1.0:
        codes = torch.empty(n, dtype=torch.int32, device=base.device)
        for part in _parts(n):
            deltas = _deltas(values, base, part)
            deltas -= deltas.sum(dim=0) / count
            codes[part] = magnitude_codes((deltas.square_().sum(dim=0) / count).float())
        wanted = int(int(torch.count_nonzero(codes)) * select_topk)
        if wanted == 0:
            return base.float().reshape(shape)
        code = select_code(lambda: codes.split(_PART), wanted)
        keep = kept_by_code(codes, code, wanted, "first")[0]
        del codes

    def chosen(part: slice) -> Tensor:
        deltas = _deltas(values, base, part)
        return deltas if keep is None else torch.where(keep[part], deltas, 0.0)

    squares = torch.zeros(count, dtype=torch.float64, device=base.device)
    for part in _parts(n):
        square = chosen(part).square()
        # What is not finite weighs nothing, so that it stays where it is.
        squares += _row_sums(torch.where(square.isfinite(), square, 0.0))
    squares /= max(1, n)
    total = float(squares.sum())
    share = torch.full_like(squares, 1.0 / count) if total < _SMALLEST_SQUARES else squares / total

    out = torch.empty_like(base, dtype=torch.float32)
    for part in _parts(n):
        deltas = chosen(part)
        plus = deltas.sum(dim=0) >= 0
        # Said by what does not agree, so that NaN agrees and reaches the output.
        agree = torch.where(plus, ~(deltas <= 0), ~(deltas >= 0))
        taken = share[:, None] * agree
        merged = (taken * deltas).sum(dim=0) / taken.sum(dim=0).clamp(min=_SMALLEST_DIVISOR)
        out[part] = (base[part].double() + merged).float()
    return out.reshape(shape)


def nearswap(
    values: list[Tensor], base: Tensor | None, *, weights: Sequence[float], t: float
) -> Tensor:
    """The base moved towards the other model, no element further than `t`.

    Args:
        values: the one other model.
        base: where the way begins.
        weights: not used.
        t: at least 0.
    """
    assert base is not None
    start = base.double()
    delta = values[0].double() - start
    share = (t / delta.abs().clamp(min=_SMALLEST_STEP)).clamp(min=0.0, max=1.0)
    return start + share * delta


def arcee_fusion(values: list[Tensor], base: Tensor | None, *, weights: Sequence[float]) -> Tensor:
    """The elements of the other model that matter most, the base elsewhere.

    Args:
        values: the one other model, in its shape: rows are the last dimension.
        base: the base.
        weights: not used.
    """
    assert base is not None
    shape, n = base.shape, base.numel()
    length = shape[-1] if shape else 1
    x, start = values[0].reshape(-1), base.reshape(-1)
    importance = torch.empty_like(start, dtype=torch.float32)
    for part in _parts(n, max(1, _PART // max(1, length)) * max(1, length)):
        theirs, ours = (t[part].double().view(-1, length) for t in (x, start))
        p, q = (t.softmax(dim=-1) + _SMOOTHING for t in (theirs, ours))
        divergence = (p * (p / q).log()).sum(dim=-1, keepdim=True).clamp(min=0.0)
        importance[part] = ((theirs - ours).abs() * divergence).view(-1).float()
    if not n:
        return base.float()

    def codes() -> Iterator[Tensor]:  # none is negative: codes have the order of the values
        return (magnitude_codes(importance[part]) for part in _parts(n))

    low, middle, high = (
        _float(select_code(codes, n - (quarters * (n - 1)) // 4)) for quarters in (1, 2, 3)
    )
    threshold = middle + 1.5 * (high - low)
    out = torch.empty_like(importance)
    for part in _parts(n):
        # not below: NaN goes to the output
        below = importance[part].double() < threshold
        out[part] = torch.where(below, start[part].float(), x[part].float())
    return out.reshape(shape)


def _float(code: int) -> float:
    return float(torch.tensor(code, dtype=torch.int32).view(torch.float32))


def _members(deltas: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Whether a model has an element, and how many have it. NaN does."""
    has = ~(deltas.abs() <= epsilon)
    return has, has.sum(dim=0)


def ram(
    values: list[Tensor], base: Tensor | None, *, weights: Sequence[float], epsilon: float
) -> Tensor:
    """Each delta where one model alone has it, the mean where several do.

    Args:
        values: the models.
        base: what the deltas are taken from.
        weights: not used.
        epsilon: deltas up to this do not count, at least 0.
    """
    assert base is not None
    start = base.double()
    deltas = torch.stack([value.double() - start for value in values])
    has, count = _members(deltas, epsilon)
    return start + torch.where(has, deltas, 0.0).sum(dim=0) / count.clamp(min=1)


def ramplus_tl(
    values: list[Tensor],
    base: Tensor | None,
    *,
    weights: Sequence[float],
    r: float,
    alpha: float,
    epsilon: float,
) -> Tensor:
    """`ram`, with what a model has alone scaled up by how much it shares in the tensor.

    Args:
        values, base, weights, epsilon: see `ram`.
        r: how much sharing scales.
        alpha: the largest ratio of shared to lone elements that counts, at least 0.
    """
    assert base is not None
    shape, n = base.shape, base.numel()
    base = base.reshape(-1)
    values = [value.reshape(-1) for value in values]
    shared = torch.zeros(len(values), dtype=torch.float64, device=base.device)
    alone = torch.zeros_like(shared)
    for part in _parts(n):
        has, count = _members(_deltas(values, base, part), epsilon)
        shared += (has & (count > 1)).sum(dim=1)
        alone += (has & (count == 1)).sum(dim=1)
    scale = 1.0 + r * (shared / alone.clamp(min=epsilon)).clamp(min=0.0, max=alpha)
    scale = torch.where(shared == 0, 1.0, scale)  # also where epsilon is 0
    out = torch.empty_like(base, dtype=torch.float32)
    for part in _parts(n):
        deltas = _deltas(values, base, part)
        has, count = _members(deltas, epsilon)
        factor = torch.where(count == 1, scale[:, None], 1.0)
        merged = (torch.where(has, deltas, 0.0) * factor).sum(dim=0) / count.clamp(min=1)
        out[part] = (base[part].double() + merged).float()
    return out.reshape(shape)
