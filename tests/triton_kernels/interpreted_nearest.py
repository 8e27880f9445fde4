"""The kernel of nearest_key against the reference.

Queries and keys are small integers, so that float32 sums are exact in any order and results must
be equal bits. The kernel widens what it multiplies, since the interpreter multiplies bfloat16
wrongly.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cl_fast.triton_kernels import nearest
from torch import Tensor

from cl_fast.ops import nearest_key

INF, NAN = float("inf"), float("nan")


def inputs(count: int, n: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(count + n + d)
    q, k = (torch.randint(-3, 4, (rows, d), generator=g).to(dtype) for rows in (count, n))
    return [q, k, torch.randint(-3, 4, (n,), generator=g).float()]


def same(q: Tensor, k: Tensor, bias: Tensor | None) -> None:
    want = nearest_key(q, k, bias, backend="eager")
    got = nearest_key(q, k, bias, backend="triton")
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.fixture(params=[1, 5])
def units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Few and many multiprocessors: one range of keys, and several."""
    monkeypatch.setattr(nearest, "_units", lambda device: request.param)
    monkeypatch.setattr(nearest, "PROGRAMS_PER_UNIT", 1)
    return int(request.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("count", "n", "d"),
    [(1, 1, 1), (1, 300, 40), (5, 64, 129), (16, 65, 3), (17, 130, 70), (70, 257, 33)],
)
def test_any_shape(count: int, n: int, d: int, dtype: torch.dtype, units: int) -> None:
    q, k, bias = inputs(count, n, d, dtype)
    same(q, k, None)
    same(q, k, bias)


@pytest.mark.parametrize("count", [3, 40])
def test_ties_nan_and_keys_that_are_off(count: int, units: int) -> None:
    q, k, bias = inputs(count, 400, 8)
    k[200:] = k[:200]  # in other tiles, and other ranges
    k[7] = k[3]
    q[0] = 0  # every score is equal
    same(q, k, None)
    bias[200:] = bias[:200]
    same(q, k, bias)
    assert bool((nearest_key(q, k, bias, backend="triton")[1] < 200).all())
    bias[:130] = -INF
    k[150, 0], q[1, 0], bias[160], k[170] = NAN, NAN, NAN, INF
    same(q, k, bias)
    bias[:] = -INF
    score, index = nearest_key(q, k, bias, backend="triton")
    assert bool((score == -INF).all())
    assert bool((index == -1).all())
    bias[399], bias[398] = INF, INF
    q, k = q.nan_to_num(), k.nan_to_num(posinf=1.0)
    same(q, k, bias)


def test_the_split_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []

    class Spy:
        def __getitem__(self, grid: Any) -> Any:
            ran.append(grid)
            return nearest_kernel[grid]

    nearest_kernel = nearest._reduce_kernel
    monkeypatch.setattr(nearest, "_reduce_kernel", Spy())
    monkeypatch.setattr(nearest, "_units", lambda device: 3)
    same(*inputs(2, 700, 16))
    assert ran == [(2,)]
    monkeypatch.setattr(nearest, "MOST_SPLITS", 1)
    same(*inputs(2, 700, 16))
    assert ran == [(2,)]


def test_layouts() -> None:
    q, k, bias = inputs(6, 90, 24)
    wide = torch.full((90, 50), NAN)
    wide[:, 3:27] = k
    for keys in (k.t().contiguous().t(), wide[:, 3:27], k.repeat(1, 2)[:, ::2]):
        keys = keys if keys.shape == k.shape else keys[:, :24]
        same(q, keys, bias)
    same(q[::2], k[::3], bias[::3])
    same(q[:0], k, bias)
    same(q, k[:0], bias[:0])
    same(q[:, :0], k[:, :0], bias)
    same(q.double(), k.double(), bias.double())
