"""A second telling of combine, for tests: float64, one element at a time, sorting for selection.

It shares no code with the ops. Decisions (what a trim keeps) are taken on float32 differences,
because that is how they are defined; everything else is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cl_fast.ops import Policy, keep_threshold, streams


@dataclass
class Told:
    """What the oracle says: the value, the size of what was added up, and whether it is sure."""

    out: np.ndarray
    scale: np.ndarray
    sure: np.ndarray


def _f32(tensor: Tensor) -> np.ndarray:
    return tensor.detach().reshape(-1).to(torch.float32).numpy()


def _wanted(policy: Policy, density: float, n: int) -> int:
    count = int(density * n)
    if policy.trim_count == "at_least_one":
        count = max(1, count)
    if policy.trim_count == "floor_plus_one":
        count += 1
    return min(n, count)


def _kept(policy: Policy, d32: np.ndarray, density: float, key: int) -> np.ndarray:
    n = d32.size
    keep = np.zeros(n, dtype=bool)
    if policy.sparsify == "drop":
        return np.array(streams.keep_mask(key, 0, n, keep_threshold(density)), dtype=bool)
    k = _wanted(policy, density, n)
    if k == 0:
        return keep
    size = np.abs(d32)
    order = sorted(range(n), key=lambda i: (-size[i], i))
    t = size[order[k - 1]]
    if policy.trim_ties == "first":
        keep[order[:k]] = True
    elif policy.trim_ties == "all":
        keep = size >= t
    else:
        keep = size > t
    return keep


def _rescale(policy: Policy, d: np.ndarray, kept: np.ndarray, density: float) -> float:
    if policy.rescale == "keep_rate":
        if policy.sparsify == "trim":
            return 1.0 / density
        t = keep_threshold(density)
        return 2.0**32 / t if t else 1.0
    if policy.rescale == "l1":
        whole, part = float(np.abs(d).sum()), float(np.abs(kept).sum())
        return 1.0 if whole < 1e-7 or part < 1e-7 else whole / part
    return 1.0


def told(
    base: Tensor | None,
    tensors: list[Tensor],
    *,
    weights: list[float],
    policy: Policy,
    density: list[float],
    keys: list[int],
    lam: float,
) -> Told:
    """combine for tensors of up to a few thousand elements."""
    n = tensors[0].numel()
    b32 = _f32(base) if policy.difference and base is not None else np.zeros(n, np.float32)
    b = b32.astype(np.float64)
    values, votes = [], []
    for x, w, rho, key in zip(tensors, weights, density, keys, strict=True):
        d = _f32(x).astype(np.float64) - b
        r = 1.0
        if policy.sparsify != "none" and rho < 1.0:
            kept = np.where(_kept(policy, _f32(x) - b32, rho, key), d, 0.0)
            r = _rescale(policy, d, kept, rho)
            d = kept
        values.append(d * w * r)
        votes.append(d * w * r if policy.elect_on == "weighted" else d * r)

    count = len(tensors)
    out, scale, sure = np.zeros(n), np.zeros(n), np.ones(n, dtype=bool)
    for i in range(n):
        v = [float(value[i]) for value in values]
        u = [float(vote[i]) for vote in votes]
        size = sum(map(abs, v))
        if policy.elect == "none":
            total = sum(v)
            if policy.reduce == "mean":
                by = sum(weights) if policy.divisor == "weights" else count
                by = by if abs(by) >= 1e-8 else 1.0
                total, size = total / by, size / abs(by)
        else:
            signs = [(x > 0) - (x < 0) for x in u]
            mass = sum(u) if policy.elect == "mass" else sum(signs)
            # float32 may round a mass of nearly nothing to either side of zero
            if policy.elect == "mass" and abs(mass) <= (count + 4) * 2.0**-24 * sum(map(abs, u)):
                sure[i] = mass == 0 and not any(u)
            majority = 1 if mass >= 0 else -1
            taking = [k for k in range(count) if signs[k] == majority]
            if policy.reduce == "max":
                total = 0.0
                for k in taking:
                    if abs(v[k]) > abs(total):
                        total = v[k]
            else:
                total = sum(v[k] for k in taking)
            if policy.reduce == "mean":
                by = len(taking) if policy.divisor == "count" else sum(weights[k] for k in taking)
                span = sum(abs(weights[k]) for k in taking)
                if policy.divisor == "weights" and abs(by) <= 1e-5 * span:
                    sure[i] = sure[i] and not taking
                by = by or 1.0
                total, size = total / by, size / abs(by)
                if policy.divisor == "weights":
                    size *= max(1.0, span / abs(by))
        out[i] = b[i] + lam * total if policy.difference else lam * total
        scale[i] = abs(b[i]) + abs(lam) * size
    return Told(out, scale, sure)


def spacing(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The distance of neighbours of `dtype` at x."""
    bits, lowest = {
        torch.bfloat16: (7, -126),
        torch.float16: (10, -14),
        torch.float32: (23, -126),
    }[dtype]
    _, exponent = np.frexp(np.abs(x))
    return np.ldexp(1.0, np.maximum(exponent - 1, lowest) - bits)


def allowed(told: Told, got: np.ndarray, dtype: torch.dtype, models: int) -> np.ndarray:
    """Half a spacing of the output, and what float32 arithmetic may lose before it.

    The second part is a count of roundings: three on each term (difference, factor, product), one
    per sum, two for the divisor, one each for lambda and the base, all relative to the sum of the
    sizes. It is under 0.01 bfloat16 spacings unless terms cancel, hence the promise of 0.51.
    """
    half = 0.5 * np.maximum(spacing(told.out, dtype), spacing(got, dtype))
    return half + (2 * models + 8) * (2.0**-24 * told.scale + 2.0**-149)
