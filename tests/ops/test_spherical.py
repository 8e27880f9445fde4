"""Spherical merges against their definitions on the vectors themselves, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cl_fast.ops.blending import (
    karcher_weights,
    model_stock_ratio,
    multislerp_weights,
    nuslerp_weights,
    slerp_weights,
    unpack_gram,
)
from cl_fast.ops.spherical import (
    karcher_mean,
    model_stock,
    multislerp,
    nuslerp,
    slerp,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def vectors(
    count: int, *, dtype: torch.dtype = torch.float64, spread: float = 1.0, seed: int = 0
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    center = torch.randn(12, 11, generator=g, dtype=torch.float64)
    return [
        (center + spread * torch.randn(12, 11, generator=g, dtype=torch.float64)).to(dtype)
        for _ in range(count)
    ]


def angle(a: Tensor, b: Tensor) -> float:
    """2 atan2(|u - v|, |u + v|), exact for small and for large angles."""
    u, v = a.double().flatten(), b.double().flatten()
    u, v = u / u.norm(), v / v.norm()
    return 2.0 * math.atan2(float((u - v).norm()), float((u + v).norm()))


def assert_close(found: Tensor, exact: Tensor, inputs: list[Tensor]) -> None:
    """Within the rounding of the store, and of a few float32 operations."""
    assert found.dtype == inputs[0].dtype
    unit = torch.finfo(found.dtype).eps / 2
    size = sum(x.double().abs() for x in inputs)
    work = 1e-13 if found.dtype == torch.float64 else 8 * 2.0**-24
    error = (found.double() - exact).abs()
    assert (error <= exact.abs() * unit + work * size + 1e-30).all(), float(error.max())


# The definitions.


def by_slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    turn = angle(a, b)
    if abs(math.cos(turn)) > 0.9995:
        return (1 - t) * a + t * b
    return (math.sin((1 - t) * turn) * a + math.sin(t * turn) * b) / math.sin(turn)


def by_karcher(xs: list[Tensor], weights: list[float], steps: int, tol: float) -> Tensor:
    units = [x / x.norm() for x in xs]
    shares = [w / sum(weights) for w in weights]
    mean = sum(w * u for w, u in zip(shares, units, strict=True))
    mean = mean / mean.norm()
    for _ in range(steps):
        step = torch.zeros_like(mean)
        for w, u in zip(shares, units, strict=True):
            turn = angle(mean, u)
            if turn >= tol:
                along = u - (u * mean).sum() * mean
                step = step + w * turn * along / along.norm()
        if step.norm() < tol:
            break
        mean = mean * math.cos(step.norm()) + step / step.norm() * math.sin(step.norm())
        mean = mean / mean.norm()
    return sum(w * x.norm() for w, x in zip(shares, xs, strict=True)) * mean


def by_multislerp(xs: list[Tensor], weights: list[float]) -> Tensor:
    """As it is described: tangents at the mean, their weighted sum, and back to the sphere."""
    shares = [w / sum(weights) for w in weights]
    units = [x / x.norm() for x in xs]
    mean = sum(w * u for w, u in zip(shares, units, strict=True))
    mean = mean / mean.norm()
    tangent = sum(
        w * (u - (u * mean).sum() * mean) for w, u in zip(shares, units, strict=True)
    )
    length = tangent.norm()
    point = mean * torch.cos(length) + tangent * torch.sinc(length / math.pi)
    return point * sum(w * x.norm() for w, x in zip(shares, xs, strict=True))


def by_model_stock(base: Tensor, xs: list[Tensor]) -> Tensor:
    deltas = [x - base for x in xs]
    pairs = [math.cos(angle(a, b)) for i, a in enumerate(deltas) for b in deltas[i + 1 :]]
    cosine, count = sum(pairs) / len(pairs), len(xs)
    t = count * cosine / (1 + (count - 1) * cosine)
    return t * sum(xs) / count + (1 - t) * base


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1.0, 0.05, 1e-3])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, -0.5])
def test_slerp(dtype: torch.dtype, spread: float, t: float) -> None:
    a, b = vectors(2, dtype=dtype, spread=spread)
    assert_close(slerp(a, b, t), by_slerp(a.double(), b.double(), t), [a, b])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("along", ["all", "rows", "columns"])
@pytest.mark.parametrize("on_base", [False, True])
def test_nuslerp(dtype: torch.dtype, along: Any, on_base: bool) -> None:
    a, b, start = vectors(3, dtype=dtype, spread=0.5)
    base = start if on_base else None
    exact = [x.double() - (start.double() if on_base else 0.0) for x in (a, b)]
    if along == "columns":
        exact = [x.t() for x in exact]
    if along == "all":
        out = by_slerp(*exact, 0.75)
    else:
        out = torch.stack([by_slerp(x, y, 0.75) for x, y in zip(*exact, strict=True)])
    out = out.t() if along == "columns" else out
    out = out + (start.double() if on_base else 0.0)
    assert_close(nuslerp(a, b, [1.0, 3.0], base=base, along=along), out, [a, b, start])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("on_base", [False, True])
def test_multislerp_and_karcher(dtype: torch.dtype, on_base: bool) -> None:
    *xs, start = vectors(5, dtype=dtype, spread=0.7)
    weights = [1.0, 2.0, 0.5, 0.25]
    origin = start.double() if on_base else torch.zeros(12, 11, dtype=torch.float64)
    exact = by_multislerp([x.double() - origin for x in xs], weights) + origin
    found = multislerp(xs, weights, base=start if on_base else None, eps=1e-30)
    assert_close(found, exact, [*xs, start])
    if not on_base:
        exact = by_karcher([x.double() for x in xs], weights, 10, 1e-9)
        assert_close(karcher_mean(xs, weights, tol=1e-9), exact, xs)


def test_karcher_is_the_minimum() -> None:
    xs = vectors(4, spread=1.5)

    def cost(point: Tensor) -> float:
        return sum(angle(point, x) ** 2 for x in xs)

    found = karcher_mean(xs, max_iter=200, tol=1e-12)
    for seed in range(5):
        other = found + 1e-3 * vectors(1, seed=seed + 9)[0]
        assert cost(found) < cost(other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock(dtype: torch.dtype, filter_wise: bool) -> None:
    base, *xs = vectors(4, dtype=dtype, spread=0.5)
    wide = [x.double() for x in xs]
    if filter_wise:
        rows = [by_model_stock(base[i].double(), [x[i] for x in wide]) for i in range(12)]
        exact = torch.stack(rows)
    else:
        exact = by_model_stock(base.double(), wide)
    assert_close(model_stock(base, xs, filter_wise=filter_wise), exact, [base, *xs])


# What has no angle, or no direction.


def gram_of(*rows: list[float]) -> list[list[float]]:
    x = torch.tensor(rows, dtype=torch.float64)
    matrix: list[list[float]] = (x @ x.t()).tolist()
    return matrix


EDGES: list[tuple[str, Callable[[], object], object]] = [
    ("slerp, equal", lambda: slerp_weights(gram_of([3, 4], [3, 4]), 0.25), [0.75, 0.25]),
    ("slerp, opposite", lambda: slerp_weights(gram_of([3, 4], [-3, -4]), 0.25), [0.75, 0.25]),
    ("nuslerp, one line", lambda: nuslerp_weights(gram_of([1, 2], [3, 6]), [1, 3]), [0.25, 0.75]),
    ("nuslerp, opposite", lambda: nuslerp_weights(gram_of([1, 2], [-1, -2]), [1, 3]), [0.25, 0.75]),
    ("nuslerp, weights that cancel", lambda: nuslerp_weights(gram_of([1, 1], [2, 2]), [1, -1]),
     [0.5, 0.5]),
    ("multislerp, one", lambda: multislerp_weights(gram_of([1, 2]), [0.5]), [1.0]),
    ("multislerp, zeros", lambda: multislerp_weights(gram_of([0], [0], [0]), [1, 1, 2]),
     [0.25, 0.25, 0.5]),
    ("multislerp, cancel", lambda: multislerp_weights(gram_of([2, 0], [-1, 0]), [1, 1]),
     [0.5, 0.5]),
    ("karcher, zeros", lambda: karcher_weights(gram_of([0], [0])), [0.0, 0.0]),
    ("karcher, one", lambda: karcher_weights(gram_of([1, 2])), [1.0]),
    ("karcher, opposite", lambda: karcher_weights(gram_of([2, 0], [-1, 0])), [0.75, 0.0]),
    ("model stock, equal", lambda: model_stock_ratio(gram_of([1, 2], [1, 2])), 1.0),
    ("model stock, right angle", lambda: model_stock_ratio(gram_of([1, 0], [0, 5])), 0.0),
    ("model stock, opposite", lambda: model_stock_ratio(gram_of([1, 0], [-1, 0])), 0.0),
    ("model stock, zeros", lambda: model_stock_ratio(gram_of([0, 0], [0, 0], [1, 0])), 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("found", "expected"), [edge[1:] for edge in EDGES],
                         ids=[edge[0] for edge in EDGES])  # fmt: skip
def test_edges(found: Callable[[], Any], expected: Any) -> None:
    assert found() == pytest.approx(expected, abs=1e-12)


def test_zeros_make_a_right_angle() -> None:
    a, b = slerp_weights(gram_of([0, 0], [3, 4]), 1 / 3)
    assert (a, b) == pytest.approx((math.sin(math.pi / 3), 0.5))
    assert karcher_weights(gram_of([3, 4], [0, 0])) == pytest.approx([0.5, 0.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_inputs_come_out_as_they_are(dtype: torch.dtype) -> None:
    x = vectors(1, dtype=dtype)[0]
    y = vectors(1, dtype=dtype, seed=1)[0]
    for found in (
        slerp(x, x, 0.3),
        nuslerp(x, x, [1, 2], base=y),
        multislerp([x, x, x]),
        karcher_mean([x, x, x]),
        model_stock(y, [x, x]),
        model_stock(y, [x, x], filter_wise=True),
    ):
        assert_close(found, x.double(), [x, y])


@given(st.integers(2, 5), st.floats(0.05, 3.0), st.integers(0, 50))
def test_what_must_hold(count: int, spread: float, seed: int) -> None:
    xs = vectors(count, spread=spread, seed=seed)
    turned = [xs[-1], *xs[:-1]]
    mean = karcher_mean(xs, max_iter=100, tol=1e-12)
    # the order does not matter, the length is the mean length, scaling one turns nothing
    assert torch.allclose(mean, karcher_mean(turned, max_iter=100, tol=1e-12), rtol=1e-6, atol=1e-6)
    length = sum(float(x.norm()) for x in xs) / count
    assert float(mean.norm()) == pytest.approx(length)
    assert angle(multislerp(xs), multislerp([2 * xs[0], *xs[1:]])) < 1e-6
    a, b = xs[:2]
    assert torch.allclose(slerp(a, b, 0.25), slerp(b, a, 0.75), rtol=1e-9, atol=1e-9)
    if abs(math.cos(angle(a, b))) < 0.999:
        assert angle(a, slerp(a, b, 0.25)) != 0.0
    base = vectors(1, seed=seed + 100)[0]
    alike = [[1.0 if i == j else 0.5 for j in range(count)] for i in range(count)]
    ratio = model_stock_ratio(alike)
    assert ratio == pytest.approx(count * 0.5 / (1 + (count - 1) * 0.5))
    scaled = [base + 3.0 * (x - base) for x in xs]
    one, three = model_stock(base, xs) - base, model_stock(base, scaled) - base
    assert torch.allclose(3.0 * one, three, rtol=1e-7, atol=1e-7)


X = torch.zeros(3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: slerp(X, torch.zeros(4), 0.5), ValueError, "must have the shape"),
        (lambda: slerp(X, X.long(), 0.5), TypeError, "floating type"),
        (lambda: nuslerp(X, X, [1.0]), ValueError, "weights must be two"),
        (lambda: nuslerp(X, X, [1.0, 1.0], along="diagonal"), ValueError, "along must be one of"),  # type: ignore[arg-type]
        (lambda: nuslerp(X, torch.zeros(4), [1.0, 1.0], along="rows"), ValueError, "shapes differ"),
        (lambda: multislerp([]), ValueError, "at least one"),
        (lambda: multislerp([X, X], [1.0, -1.0]), ValueError, "cannot be normalised"),
        (lambda: multislerp([X, X], [1.0]), ValueError, "as many weights"),
        (lambda: karcher_mean([X, X], [1.0, -1.0]), ValueError, "cannot be normalised"),
        (lambda: model_stock(X, [X]), ValueError, "two or more"),
        (lambda: model_stock(X, [X], filter_wise=True), ValueError, "two or more"),
        (lambda: model_stock(X, [X, torch.zeros(4)], filter_wise=True), ValueError, "shape"),
        (lambda: unpack_gram([1.0, 2.0], 2), ValueError, "is not of 2 numbers"),
        (lambda: slerp_weights([[1.0]], 0.5), ValueError, "must be square"),
    ],
)
def test_bad_input(call: Callable[[], object], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        call()
