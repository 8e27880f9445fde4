"""nearest_key by the Triton kernel on a card, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cl_fast.ops import nearest_key

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [(1, 1, 1), (1, 10_000, 4096), (16, 999, 64), (17, 1000, 129), (300, 5000, 768)]
SHAPES += [(2048, 300, 136), (5, 70_000, 40)]
INF, NAN = float("inf"), float("nan")


def inputs(count: int, n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(count + n + d)
    q, k = (torch.randn(rows, d, generator=g).to(dtype).cuda() for rows in (count, n))
    return q, k, torch.randn(n, generator=g).cuda()


def whole(count: int, n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Small integers: float32 sums are exact in any order."""
    g = torch.Generator().manual_seed(count + n + d)
    q, k = (torch.randint(-3, 4, (m, d), generator=g).to(dtype).cuda() for m in (count, n))
    return q, k, torch.randint(-3, 4, (n,), generator=g).float().cuda()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "n", "d"), SHAPES)
def test_the_largest_score(count: int, n: int, d: int, dtype: torch.dtype) -> None:
    q, k, bias = inputs(count, n, d, dtype)
    for b in (None, bias):
        score, index = nearest_key(q, k, b)
        table = q.double() @ k.double().t()
        size = q.double().abs() @ k.double().abs().t()
        if b is not None:
            table += b.double()
            size += b.double().abs()
        limit = 2 * (d + 4) * 2.0**-23 * size.amax(1)  # a tensor core may cut where it adds
        found = table.gather(1, index[:, None])[:, 0]
        assert (found >= table.amax(1) - limit).all()
        assert ((score.double() - found).abs() <= limit).all()
        again = nearest_key(q, k, b)
        assert torch.equal(again[0], score)
        assert torch.equal(again[1], index)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "n", "d"), [(1, 5000, 64), (40, 3000, 130), (3000, 700, 16)])
def test_equal_bits_and_ties_are_those_of_the_reference(
    count: int, n: int, d: int, dtype: torch.dtype
) -> None:
    q, k, bias = whole(count, n, d, dtype)
    half = n // 2
    k[half : 2 * half] = k[:half]  # in other tiles and other ranges
    bias[half : 2 * half] = bias[:half]
    q[0] = 0
    off = bias.clone()
    off[: n // 3] = -INF
    broken = k.clone()
    broken[half - 1, 0] = NAN
    none = torch.full_like(bias, -INF)
    for keys, b in ((k, None), (k, bias), (k, off), (broken, off), (k, none)):
        want = nearest_key(q.cpu(), keys.cpu(), None if b is None else b.cpu())
        got = nearest_key(q, keys, b)
        assert torch.equal(got[0].cpu(), want[0])
        assert torch.equal(got[1].cpu(), want[1])


def test_float32_keys_are_as_exact_as_a_float32_matmul() -> None:
    q, k, _ = inputs(64, 4000, 1024, torch.float32)
    exact = q.double() @ k.double().t()
    size = q.double().abs() @ k.double().abs().t()
    score, index = nearest_key(q, k)
    at = index[:, None]
    ours = (score.double() - exact.gather(1, at)[:, 0]).abs() / size.gather(1, at)[:, 0]
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        peer = ((q @ k.t()).double() - exact).abs() / size
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert ours.max() <= 4 * peer.max() + 2.0**-23


def test_layouts_and_float64() -> None:
    q, k, bias = whole(20, 900, 48, torch.float32)
    want = nearest_key(q.cpu(), k.cpu(), bias.cpu())
    wide = torch.full((900, 99), NAN, device="cuda")
    wide[:, 3:51] = k
    turned = q.t().contiguous().t()
    for queries, keys in ((q, wide[:, 3:51]), (turned, k), (q.double(), k.double())):
        b = bias.double() if keys.dtype == torch.float64 else bias
        score, index = nearest_key(queries, keys, b)
        assert torch.equal(score.float().cpu(), want[0])
        assert torch.equal(index.cpu(), want[1])


def test_no_matrix_of_scores() -> None:
    q, k, _ = inputs(8192, 20_000, 128, torch.bfloat16)
    nearest_key(q, k)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nearest_key(q, k)
    assert torch.cuda.max_memory_allocated() - before <= 0.01 * 4 * len(q) * len(k)


@pytest.mark.parametrize("count", [1, 300])
def test_in_a_cuda_graph(count: int) -> None:
    """No sync, and replays that read what the tensors hold then."""
    q, k, bias = inputs(count, 5000, 72, torch.bfloat16)
    nearest_key(q, k, bias)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        score, index = nearest_key(q, k, bias)
    q.neg_()
    bias[::2] = -INF
    graph.replay()
    want = nearest_key(q, k, bias)
    assert torch.equal(score, want[0])
    assert torch.equal(index, want[1])


def test_on_another_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    q, k, bias = (x.to("cuda:1") for x in whole(9, 500, 40, torch.bfloat16))
    want = nearest_key(q.cpu(), k.cpu(), bias.cpu())
    assert torch.equal(nearest_key(q, k, bias)[1].cpu(), want[1])


def test_keys_of_more_than_2_31_elements(need_memory: Callable[[int], None]) -> None:
    n, d = 600_000, 4096
    need_memory(3 * n * d)
    k = torch.zeros(n, d, dtype=torch.bfloat16, device="cuda")
    k[-1, -1] = 1.0
    q = torch.ones(2, d, dtype=torch.bfloat16, device="cuda")
    score, index = nearest_key(q, k)
    assert score.tolist() == [1.0, 1.0]
    assert index.tolist() == [n - 1] * 2


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend: str) -> None:
    q, k, bias = inputs(30, 700, 64, torch.bfloat16)

    def gate(q: Tensor, k: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        score, index = nearest_key(q, k, bias)
        return score + 0.0, index + 0

    torch._dynamo.reset()
    got = torch.compile(gate, fullgraph=True, backend=backend)(q, k, bias)
    for a, b in zip(got, gate(q, k, bias), strict=True):
        assert torch.equal(a, b)
