"""dare by the Triton kernel on a card: the mask of every other backend, and the bits of eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cl_fast.ops import dare, keep_mask, keep_threshold, stream_key

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LENGTHS = (0, 1, 15, 511, 512, 513, 100_003, 9_000_001)
DENSITIES = (0.1, 0.5, 0.9, 1.0, 1e-12, 1 - 2.0**-40)


def randn(n: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, generator=torch.Generator("cuda").manual_seed(n), device="cuda").to(dtype)


def equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.isnan(), other.isnan()) and torch.equal(
        one.nan_to_num(nan=0.0, posinf=1e4, neginf=-1e4),
        other.nan_to_num(nan=0.0, posinf=1e4, neginf=-1e4),
    )  # fmt: skip


@pytest.mark.parametrize("rescale", ["keep_rate", "none", "l1"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_eager(dtype: torch.dtype, rescale: str) -> None:
    for n in LENGTHS:
        x = randn(n, dtype)
        x[3:5], x[7:9] = float("nan"), float("inf")
        for density in DENSITIES:
            more = {"density": density, "seed": n, "model": "m", "tensor": "t", "rescale": rescale}
            if rescale == "l1":
                x = x.nan_to_num()
            got = dare(x, backend="triton", **more)
            assert equal(got, dare(x, backend="eager", **more))
            assert equal(got, dare(x, **more))


def test_masks_are_those_of_the_cpu() -> None:
    from cl_fast.triton_kernels import philox

    for key in (0, 2**64 - 1, stream_key(3, "m", "t")):
        for threshold in (0, 1, 77 << 24, (77 << 24) + 5, (1 << 32) - 1, keep_threshold(0.37)):
            for first in (0, 2**32 - 30):
                got = philox.keep_mask(key, 100_003, threshold, first_group=first).cpu()
                assert torch.equal(got, keep_mask(key, 100_003, threshold, start=16 * first))


def test_views() -> None:
    x = randn(60_000, torch.bfloat16)
    for view in (x[1:], x.view(200, 300).t(), x[::3], x[0]):
        got = dare(view, density=0.3, backend="triton")
        assert got.shape == view.shape
        assert equal(got, dare(view, density=0.3, backend="eager"))


def test_gradient() -> None:
    x = randn(10_000, torch.float32).requires_grad_()
    dare(x, density=0.3).backward(torch.ones_like(x))
    assert torch.equal(x.grad, dare(torch.ones_like(x), density=0.3, backend="eager"))


def test_graph() -> None:
    x = randn(100_003, torch.bfloat16)
    dare(x, density=0.3, backend="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dare(x, density=0.3, backend="triton")
    for factor in (1.0, 0.5):
        x.mul_(factor)
        graph.replay()
        assert equal(out, dare(x, density=0.3, backend="eager"))


def test_stream() -> None:
    x = randn(1_000_000, torch.float16)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what follows must wait for its own stream
        late.copy_(x)
        got = dare(late, density=0.3, backend="triton")
    stream.synchronize()
    assert equal(got, dare(x, density=0.3, backend="eager"))


def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x = randn(10_000, torch.bfloat16).to("cuda:1")
    assert equal(dare(x, density=0.3, backend="triton"), dare(x, density=0.3, backend="eager"))


@pytest.mark.slow
def test_more_than_2_31_elements(need_memory: Callable[[int], None]) -> None:
    n = 2**31 + 5000
    need_memory(4 * n + (1 << 30))
    x = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    got = dare(x, density=0.25, seed=1, model="m", tensor="t", backend="triton")
    key = stream_key(1, "m", "t")
    for start in (0, 2**31 - 2500, n - 5000):
        keep = keep_mask(key, 5000, 1 << 30, start=start, device="cuda")
        assert torch.equal(got[start : start + 5000], keep * torch.tensor(4.0).bfloat16().cuda())
