"""Sparsifying by the rank of a magnitude: the band of Model Breadcrumbs, and DELLA's MAGPRUNE.

The order of magnitudes is that of `cl_fast.ops.magnitude`: by falling code (the bits of |d| in
float32), and of equal codes by rising index. Position j of an element is how many come before it.

    band      keep = n_top <= j < n_top + n_keep, j in the whole tensor, see `band_counts`
    magprune  j in the element's row, a row of L elements being the last dimension:
              p_j  = (density - epsilon) + 2 epsilon (L - 1 - j) / (L - 1)    in float64
              T_j  = min(2^32, floor(p_j 2^32 + 1/2))
              keep = u < T_j, u the element's draw in the documented stream (cl_fast.ops.streams)
              A row of one element has p = density. A tensor without dimensions is one row.

Sources: Davari and Belilovsky, "Model Breadcrumbs", 2023 (arXiv 2312.06795); Deep et al.,
"DELLA-Merging", 2024 (arXiv 2406.11617).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cl_fast.ops.dropping import below_thresholds
from cl_fast.ops.magnitude import check_readable, check_same, magnitude_codes, select_code
from cl_fast.ops.policy import Rescale, TrimCount, band_counts, check_keep_probabilities
from cl_fast.ops.streams import stream_key

__all__ = ["keep_thresholds", "magnitude_band", "magprune"]

_ROWS_AT_ONCE = 1 << 22  # elements that are ranked together: bounds the int64 temporaries


def band_mask(codes: Tensor, n_top: int, n_keep: int) -> tuple[Tensor, int, int, int, int]:
    """The mask of a band over flat codes, and how its ends are met.

    Returns:
        (keep, low, at_low, high, at_high): the codes at the lower and at the upper end of the band
        (-1: no such end) and how many elements with these codes are kept. With one code at both
        ends `at_high` is 0.
    """
    n = codes.numel()
    end = n_top + n_keep
    if n_keep == 0:
        return torch.zeros_like(codes, dtype=torch.bool), -1, 0, -1, 0
    keep = torch.ones_like(codes, dtype=torch.bool)
    low = high = -1
    if end < n:
        low = select_code([codes], end)
        keep &= _first(codes, low, end)
    if n_top > 0:
        high = select_code([codes], n_top)
        keep &= ~_first(codes, high, n_top)
    at_low = int((keep & (codes == low)).sum()) if low >= 0 else 0
    at_high = int((keep & (codes == high)).sum()) if 0 <= high != low else 0
    return keep, low, at_low, high, at_high


def _first(codes: Tensor, code: int, count: int) -> Tensor:
    """The first `count` elements of the order, where `code` is that of the last of them."""
    taken = codes > code
    tied = (codes == code).nonzero().reshape(-1)
    taken[tied[: count - int(taken.sum())]] = True
    return taken


def keep_thresholds(length: int, density: float, epsilon: float, device: Any = None) -> Tensor:
    """T_j of every position of a row, int64."""
    if length == 1:
        p = torch.full((1,), density, dtype=torch.float64, device=device)
    else:
        below = torch.arange(length - 1, -1, -1, dtype=torch.float64, device=device)
        p = (density - epsilon) + (2.0 * epsilon) * (below / (length - 1))
    return (p * 2.0**32 + 0.5).floor().clamp(max=2.0**32).to(torch.int64)


def magprune_mask(
    codes: Tensor, length: int, density: float, epsilon: float, key: int
) -> tuple[Tensor, Tensor]:
    """What magprune keeps of flat codes in rows of `length`: the mask, and T of each element."""
    keep = torch.empty_like(codes, dtype=torch.bool)
    thresholds = torch.empty_like(codes, dtype=torch.int64)
    if not codes.numel():
        return keep, thresholds
    by_position = keep_thresholds(length, density, epsilon, codes.device)
    step = max(1, _ROWS_AT_ONCE // length) * length
    for first in range(0, codes.numel(), step):
        rows = codes[first : first + step].view(-1, length)
        order = torch.sort(rows, dim=1, descending=True, stable=True).indices
        mine = torch.empty_like(order)
        mine.scatter_(1, order, by_position.expand_as(order))
        thresholds[first : first + step] = mine.view(-1)
        keep[first : first + step] = below_thresholds(key, mine.view(-1), start=first)
    return keep, thresholds


def magnitude_band(
    x: Tensor,
    *,
    density: float,
    gamma: float = 0.01,
    base: Tensor | None = None,
    count: TrimCount = "floor",
) -> Tensor:
    """Which elements of `x`, or of `x - base`, Model Breadcrumbs keeps: a bool mask of its shape.

    Args:
        x: any shape; bfloat16, float16, float32 or eight-bit float.
        density: the fraction to keep, in (0, 1]; 1 keeps everything.
        gamma: the fraction of largest magnitudes that is dropped, in [0, 1].
        base: subtracted first, in float32; the shape and device of `x`.
        count: how the density becomes a number, see `cl_fast.ops.trim_keep_count`.

    Raises:
        TypeError: a dtype that is not readable.
        ValueError: shapes or devices differ, a number out of its range.
    """
    check_readable("x", x)
    if base is not None:
        check_readable("base", base)
        check_same("base", base, "x", x)
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must be in (0, 1]; got {density}")
    values = x.float() if base is None else x.float() - base.float()
    keep = band_mask(magnitude_codes(values.reshape(-1)), *band_counts(
        density, gamma, x.numel(), count
    ))[0]  # fmt: skip
    return keep.reshape(x.shape)


def magprune(
    delta: Tensor,
    *,
    density: float,
    epsilon: float = 0.15,
    seed: int = 0,
    model: str = "",
    tensor: str = "",
    rescale: Rescale = "keep_rate",
    backend: str | None = None,
) -> Tensor:
    """Drop elements of a delta, the smaller of each row more often, and rescale the others (DELLA).

    Args:
        delta: any shape, its last dimension the rows; bfloat16, float16 or float32.
        density: the mean fraction that is kept, in (0, 1]; 1 keeps everything.
        epsilon: the keep probabilities run from density - epsilon to density + epsilon.
        seed, model, tensor: name the random stream (docs/random-stream.md).
        rescale: "keep_rate" divides each element by its own keep rate (the paper), "l1" multiplies
            by sum |d| / sum |d kept| (mergekit), "none".
        backend: "eager" or "native", for tests and benchmarks; otherwise the fastest there is.

    Returns:
        A new tensor of the shape and dtype of `delta`. There is no gradient.

    Raises:
        TypeError, ValueError: as `cl_fast.ops.combine`.
    """
    from cl_fast.ops.combining import combine
    from cl_fast.ops.policy import Policy

    check_readable("delta", delta)
    if not isinstance(density, (int, float)) or not math.isfinite(density):
        raise ValueError(f"density must be in (0, 1]; got {density!r}")
    return combine(
        None,
        [delta],
        weights=1.0,
        policy=Policy(difference=False, sparsify="magprune", rescale=rescale),
        density=density,
        epsilon=epsilon,
        keys=[stream_key(seed, model, tensor)],
        backend=backend,
    )


def check_epsilon(density: float, epsilon: float) -> None:
    """Raise ValueError unless all keep probabilities of magprune lie in (0, 1]."""
    wrong = check_keep_probabilities(density, epsilon)
    if wrong is not None:
        raise ValueError(f"epsilon: {wrong}")
