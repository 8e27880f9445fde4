"""SCE, NearSwap, Arcee Fusion and RAM against plain definitions, element by element."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import nasty
import pytest
import torch
from torch import Tensor

from cl_fast.ops import selective
from cl_fast.ops.selective import arcee_fusion, nearswap, ram, ramplus_tl, sce

Rows = list[list[float]]


def case(kind: str, shape: tuple[int, ...], k: int) -> tuple[Tensor, list[Tensor]]:
    base, tensors = nasty.models(kind, math.prod(shape), k, torch.float32)
    return base.view(shape), [t.view(shape) for t in tensors]


def plain(base: Tensor, tensors: list[Tensor]) -> tuple[list[float], Rows]:
    start = base.double().flatten().tolist()
    return start, [
        [x - b for x, b in zip(t.double().flatten().tolist(), start, strict=True)] for t in tensors
    ]


def sce_plain(base: Tensor, tensors: list[Tensor], topk: float) -> list[float]:
    start, deltas = plain(base, tensors)
    n, count = len(start), len(deltas)
    if topk < 1:
        columns = list(zip(*deltas, strict=True))
        means = [sum(c) / count for c in columns]
        spread = [
            float(torch.tensor(sum((d - m) ** 2 for d in c) / count).float())
            for c, m in zip(columns, means, strict=True)
        ]
        wanted = int(sum(v != 0 for v in spread) * topk)
        kept = set(sorted(range(n), key=lambda i: (-spread[i], i))[:wanted])
        deltas = [[d if i in kept else 0.0 for i, d in enumerate(row)] for row in deltas]
    squares = [sum(d * d for d in row) / n for row in deltas]
    total = sum(squares)
    share = [1 / count if total < 1e-6 else s / total for s in squares]
    out = []
    for i in range(n):
        sign = 1 if sum(row[i] for row in deltas) >= 0 else -1
        part = [(w, row[i]) for w, row in zip(share, deltas, strict=True) if row[i] * sign > 0]
        merged = sum(w * d for w, d in part) / max(1e-6, sum(w for w, _ in part))
        out.append(start[i] + merged)
    return out


@pytest.mark.parametrize("kind", nasty.KINDS)
@pytest.mark.parametrize("topk", [1.0, 0.5, 0.1, 0.0])
@pytest.mark.parametrize("size", [1, 2, 60])
def test_sce(kind: str, topk: float, size: int) -> None:
    base, tensors = case(kind, (size, 5), 3)
    if kind == "normal":  # deltas so large that their squares give the weights
        tensors = [base + 10 * (1 + k) * (t - base) for k, t in enumerate(tensors)]
    out = sce(tensors, base, weights=[1.0] * 3, select_topk=topk)
    want = torch.tensor(sce_plain(base, tensors, topk), dtype=torch.float64).view(base.shape)
    size_of = base.double().abs() + sum((t.double() - base.double()).abs() for t in tensors)
    assert ((out.double() - want).abs() <= 4 * 2.0**-24 * size_of + 1e-42).all()


def test_sce_weights_follow_the_squares() -> None:
    base = torch.zeros(4)
    out = sce([torch.full((4,), 1.0), torch.full((4,), 3.0)], base, weights=[], select_topk=1.0)
    assert torch.allclose(out, torch.full((4,), 0.1 * 1 + 0.9 * 3))
    out = sce([torch.full((4,), 1e-4), torch.full((4,), 3e-4)], base, weights=[], select_topk=1.0)
    assert torch.allclose(out, torch.full((4,), 2e-4))  # squares too small to weigh with


@pytest.mark.parametrize("kind", nasty.KINDS)
@pytest.mark.parametrize("t", [0.0, 1e-8, 1e-4, 0.001, 10.0])
def test_nearswap(kind: str, t: float) -> None:
    base, (x,) = case(kind, (7, 9), 1)
    out = nearswap([x], base, weights=[1.0], t=t)
    start, (delta,) = plain(base, [x])
    want = [b + min(1.0, t / max(1e-6, abs(d))) * d for b, d in zip(start, delta, strict=True)]
    assert torch.allclose(out.flatten(), torch.tensor(want, dtype=torch.float64), rtol=1e-15)
    assert ((out - base.double()).abs() <= t * (1 + 1e-15) + 1e-12).all()


def arcee_plain(base: Tensor, x: Tensor) -> tuple[list[float], float, list[float]]:
    length = base.shape[-1] if base.dim() else 1
    start, (delta,) = plain(base, [x])
    values = [b + d for b, d in zip(start, delta, strict=True)]
    importance = []
    for first in range(0, len(start), length):
        chances = []
        for row in (values, start):
            part = row[first : first + length]
            largest = max(part)
            exps = [math.exp(v - largest) for v in part]
            chances.append([e / math.fsum(exps) + 1e-8 for e in exps])
        divergence = max(
            0.0, math.fsum(p * math.log(p / q) for p, q in zip(*chances, strict=True))
        )
        importance += [abs(d) * divergence for d in delta[first : first + length]]
    ranked = sorted(importance)
    q1, q2, q3 = (ranked[int(f * (len(ranked) - 1))] for f in (0.25, 0.5, 0.75))
    threshold = q2 + 1.5 * (q3 - q1)
    return importance, threshold, values


@pytest.mark.parametrize("shape", [(1,), (30,), (12, 11), (3, 4, 5), ()])
def test_arcee_fusion(shape: tuple[int, ...]) -> None:
    base, (x,) = case("normal", shape, 1)
    base, x = base * 50, base * 50 + (x - base) * 300
    out = arcee_fusion([x], base, weights=[1.0])
    importance, threshold, _ = arcee_plain(base, x)
    clear = [abs(i - threshold) > 1e-5 * max(i, threshold) for i in importance]
    wanted = [i >= threshold for i in importance]
    took = (out == x).flatten().tolist()
    left = (out == base).flatten().tolist()
    for sure, want, a, b in zip(clear, wanted, took, left, strict=True):
        assert a or b
        assert not sure or (a if want else b)
    if math.prod(shape) > 100:
        assert 0 < sum(took) < len(took)


def test_arcee_fusion_of_equal_models_and_of_none() -> None:
    base = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(arcee_fusion([base.clone()], base, weights=[]), base)
    assert arcee_fusion([torch.ones(0, 3)], torch.ones(0, 3), weights=[]).shape == (0, 3)


def ram_plain(
    base: Tensor, tensors: list[Tensor], epsilon: float, r: float = 0.0, alpha: float = 0.0
) -> list[float]:
    start, deltas = plain(base, tensors)
    has = [[abs(d) > epsilon for d in row] for row in deltas]
    count = [sum(column) for column in zip(*has, strict=True)]
    scale = []
    for row in has:
        shared = sum(h and c > 1 for h, c in zip(row, count, strict=True))
        alone = sum(h and c == 1 for h, c in zip(row, count, strict=True))
        scale.append(1 + r * min(alpha, shared / max(alone, epsilon)))
    out = []
    for i, b in enumerate(start):
        mine = [
            row[i] * (f if count[i] == 1 else 1.0)
            for row, h, f in zip(deltas, has, scale, strict=True)
            if h[i]
        ]
        out.append(b + (sum(mine) / count[i] if mine else 0.0))
    return out


@pytest.mark.parametrize("kind", nasty.KINDS)
@pytest.mark.parametrize("epsilon", [1e-5, 5e-4, 0.01])
def test_ram(kind: str, epsilon: float) -> None:
    base, tensors = case(kind, (6, 10), 3)
    for out, want in (
        (ram(tensors, base, weights=[], epsilon=epsilon), ram_plain(base, tensors, epsilon)),
        (
            ramplus_tl(tensors, base, weights=[], r=0.5, alpha=0.3, epsilon=epsilon),
            ram_plain(base, tensors, epsilon, 0.5, 0.3),
        ),
    ):
        wanted = torch.tensor(want, dtype=torch.float64).view(base.shape)
        assert torch.allclose(out.double(), wanted, rtol=2.0**-23, atol=1e-42)


FUNCTIONS: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
    (sce, {"select_topk": 0.3}),
    (nearswap, {"t": 1e-3}),
    (arcee_fusion, {}),
    (ram, {"epsilon": 1e-5}),
    (ramplus_tl, {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}),
]


@pytest.mark.parametrize(("function", "settings"), FUNCTIONS)
def test_how_a_tensor_is_cut_changes_no_bit(
    function: Callable[..., Tensor], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tensors = case("normal", (31, 17), 2 if function not in (nearswap, arcee_fusion) else 1)
    before = [t.clone() for t in (base, *tensors)]
    whole = function(tensors, base, weights=[], **settings)
    monkeypatch.setattr(selective, "_PART", 100)
    if function is sce:  # sums of squares in another order: the weights may differ in the last bit
        assert torch.allclose(function(tensors, base, weights=[], **settings), whole, rtol=1e-6)
    else:
        assert torch.equal(function(tensors, base, weights=[], **settings), whole)
    assert all(torch.equal(a, b) for a, b in zip(before, (base, *tensors), strict=True))


@pytest.mark.parametrize(("function", "settings"), FUNCTIONS)
def test_nan_stays_where_it_is(function: Callable[..., Tensor], settings: dict[str, Any]) -> None:
    base, tensors = case("normal", (4, 6), 1 if function in (nearswap, arcee_fusion) else 2)
    tensors[0][1, 2] = math.nan
    out = function(tensors, base, weights=[], **settings)
    assert out.isnan().nonzero().tolist() == [[1, 2]]
