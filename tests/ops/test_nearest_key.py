"""nearest_key against numpy in float64: who is found, ties, NaN, keys that are off, bad input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cl_fast.ops import nearest_key

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INF, NAN = math.inf, math.nan


def inputs(
    count: int, n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(rows, d, generator=g).to(dtype) for rows in (count, n))
    bias = torch.randn(n, generator=g)
    return q, k, bias.double() if dtype == torch.float64 else bias


def scores(q: Tensor, k: Tensor, bias: Tensor | None = None) -> np.ndarray:
    """All of them, in float64."""
    product = q.double().numpy() @ k.double().numpy().T
    return product if bias is None else product + bias.double().numpy()


def first_of_the_largest(table: np.ndarray) -> tuple[list[float], list[int]]:
    """By one plain loop: the rule of the module's docstring."""
    best, where = [], []
    for row in table:
        top, at = -INF, -1
        for i, value in enumerate(row):
            if value > top:
                top, at = float(value), i
        best.append(top)
        where.append(at)
    return best, where


def agree(q: Tensor, k: Tensor, bias: Tensor | None) -> None:
    """The key found is as near as any, up to a float32 sum; its score is that sum."""
    score, index = nearest_key(q, k, bias)
    table = scores(q, k, bias)
    slack = 1e-13 if q.dtype == torch.float64 else (q.shape[1] + 2) * 2.0**-24
    size = np.abs(q.double().numpy()) @ np.abs(k.double().numpy()).T
    size += 0 if bias is None else bias.double().abs().numpy()
    want = table.max(1)
    limit = 2 * slack * size.max(1)
    found = np.take_along_axis(table, index.numpy()[:, None], 1)[:, 0]
    assert (found >= want - limit).all()
    assert (np.abs(score.double().numpy() - found) <= limit).all()
    assert score.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert index.dtype == torch.int64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "n", "d"), [(1, 1, 1), (7, 50, 33), (40, 300, 128), (3, 9, 0)])
def test_the_largest_score(count: int, n: int, d: int, dtype: torch.dtype) -> None:
    q, k, bias = inputs(count, n, d, dtype)
    before = [x.clone() for x in (q, k, bias)]
    agree(q, k, bias)
    agree(q, k, None)
    for x, copy in zip((q, k, bias), before, strict=True):
        assert torch.equal(x, copy)


@pytest.mark.parametrize(("block", "key_block"), [(4 * 7, 4 * 11), (4 * 256 * 3, 4 * 33 * 8)])
def test_blocks_do_not_show(block: int, key_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small integers: sums are exact, so ties across blocks are real ones."""
    q, k, bias = inputs(20, 90, 3)
    q, k, bias = (x.round() for x in (q, k, bias))
    want = first_of_the_largest(scores(q, k, bias))
    monkeypatch.setattr("cl_fast.ops.nearest._BLOCK", block)
    monkeypatch.setattr("cl_fast.ops.nearest._KEY_BLOCK", key_block)
    score, index = nearest_key(q, k, bias)
    assert (score.tolist(), index.tolist()) == want


def test_the_matrix_of_scores_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product is larger than a block, whatever T and n are."""
    largest = 0
    multiply = torch.mm

    def watched(a: Tensor, b: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, a.shape[0] * b.shape[1])
        return multiply(a, b)

    monkeypatch.setattr(torch, "mm", watched)
    monkeypatch.setattr("cl_fast.ops.nearest._BLOCK", 4 * 4096)
    monkeypatch.setattr("cl_fast.ops.nearest._KEY_BLOCK", 4 * 1024)
    q, k, _ = inputs(300, 700, 4)
    nearest_key(q, k)
    assert 0 < largest <= 4096


@settings(max_examples=60)
@given(data=st.data())
def test_any_small_integers(data: st.DataObject) -> None:
    """Ties, NaN, infinities, keys that are off, no keys: exactly the rule."""
    count, n, d = (data.draw(st.integers(low, 5)) for low in (0, 0, 1))
    numbers = st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0, NAN])
    offsets = st.sampled_from([-INF, -1.0, 0.0, 1.0, INF, NAN])
    q, k = (
        torch.tensor(
            data.draw(st.lists(st.lists(numbers, min_size=d, max_size=d), min_size=m, max_size=m))
        ).reshape(m, d)
        for m in (count, n)
    )
    bias = torch.tensor(data.draw(st.lists(offsets, min_size=n, max_size=n))).reshape(n)
    dtype = data.draw(st.sampled_from(DTYPES))
    q, k = q.to(dtype), k.to(dtype)
    bias = bias.to(torch.float64 if dtype == torch.float64 else torch.float32)
    with np.errstate(invalid="ignore"):
        want = first_of_the_largest(scores(q, k, bias))
    score, index = nearest_key(q, k, bias)
    assert (score.tolist(), index.tolist()) == want


@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("n", [5, 17, 257])
def test_equal_keys_tie(count: int, n: int) -> None:
    """Wherever they stand: the product of one query does not take the way of a vector."""
    for seed in range(20):
        q, k, _ = inputs(count, 1, 100, seed=seed)
        _, index = nearest_key(q, k.expand(n, 100).contiguous())
        assert index.tolist() == [0] * count


def test_without_keys_or_queries() -> None:
    q, k, bias = inputs(4, 0, 8)
    for b in (None, bias):
        score, index = nearest_key(q, k, b)
        assert score.tolist() == [-INF] * 4
        assert index.tolist() == [-1] * 4
    score, index = nearest_key(q[:0], q)
    assert (score.shape, index.shape) == ((0,), (0,))


def test_cosine_and_distance_as_the_module_says() -> None:
    q, k, _ = inputs(30, 40, 16, torch.float64)
    _, index = nearest_key(q, k / k.norm(dim=1, keepdim=True))
    cosines = torch.nn.functional.cosine_similarity(q[:, None], k[None], dim=2)
    assert torch.equal(index, cosines.argmax(1))
    score, index = nearest_key(q, k, -0.5 * k.square().sum(1))
    distances = torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(index, distances.argmin(1))
    got = (q.square().sum(1) - 2 * score).sqrt()
    torch.testing.assert_close(got, distances.amin(1), rtol=1e-10, atol=1e-12)


def test_layouts_and_autocast() -> None:
    q, k, bias = inputs(9, 30, 16)
    want = nearest_key(q, k, bias)
    wide = torch.full((30, 40), NAN)
    wide[:, 5:21] = k
    for queries, keys in ((q.t().contiguous().t(), k), (q, wide[:, 5:21])):
        got = nearest_key(queries, keys, bias)
        assert torch.equal(got[1], want[1])
        torch.testing.assert_close(got[0], want[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_key(q, k, bias)[0], want[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    q, k, bias = inputs(3, 5, 4, dtype)
    torch.library.opcheck(torch.ops.cl_fast.nearest_key, (q, k, bias))
    torch.library.opcheck(torch.ops.cl_fast.nearest_key, (q, k, None))


def test_compile_and_fake_shapes() -> None:
    def gate(q: Tensor, k: Tensor) -> Tensor:
        score, index = nearest_key(q, k)
        return torch.where(score > 0, index, -1)

    q, k, _ = inputs(6, 9, 8)
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(q, k), gate(q, k))
    with FakeTensorMode():
        score, index = nearest_key(torch.empty(3, 4).half(), torch.empty(7, 4).half())
        assert (score.shape, score.dtype) == ((3,), torch.float32)
        assert (index.shape, index.dtype) == ((3,), torch.int64)


def test_no_gradient_and_says_so() -> None:
    q, k, _ = inputs(3, 5, 4)
    q.requires_grad_()
    score, index = nearest_key(q, k)
    assert not index.requires_grad
    with pytest.raises(RuntimeError, match=r"backward.*cl_fast[.:]+nearest_key"):
        score.sum().backward()


Q, K, B = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(5)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ((None, K), TypeError, "queries must be a torch.Tensor, got NoneType"),
        ((Q, K.tolist()), TypeError, "keys must be a torch.Tensor, got list"),
        ((Q, K, 0.0), TypeError, "bias must be a torch.Tensor, got float"),
        ((Q.int(), K.int()), TypeError, "queries must have one of the dtypes"),
        ((Q, K.half()), TypeError, "keys must have the dtype of queries, torch.float32"),
        ((Q[0], K), ValueError, r"queries must have the shape \[count, d\]; got \(4,\)"),
        ((Q, K[None]), ValueError, r"keys must have the shape \[count, d\]; got \(1, 5, 4\)"),
        ((Q, K[:, :3]), ValueError, "keys must have the width of queries, 4; got 3"),
        ((Q, K, B[:4]), ValueError, "bias must have one number for each of the 5 keys"),
        ((Q, K, B.double()), TypeError, "bias must be torch.float32 for torch.float32 keys"),
        ((Q.double(), K.double(), B), TypeError, "bias must be torch.float64"),
        ((Q, K.to("meta")), ValueError, "keys must be on the device of queries, cpu; got meta"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], kind: type[Exception], words: str) -> None:
    for more in ({}, {"backend": "eager"}):
        with pytest.raises(kind, match=words):
            nearest_key(*arguments, **more)


def test_unknown_backend() -> None:
    for backend, words in (("native", "must be one of"), ("triton", "needs tensors on cuda")):
        with pytest.raises(ValueError, match=words):
            nearest_key(Q, K, backend=backend)
