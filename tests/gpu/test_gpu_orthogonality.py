"""The penalty and the projection on a card: real bfloat16, graphs, streams, large tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cl_fast.ops import orthogonal_penalty, orthogonal_project, orthogonal_project_

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
FORMS = ("l1", "squared")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return torch.randn(shape, generator=g).to("cuda", dtype)


def model(dtype: torch.dtype, past_dtype: torch.dtype) -> tuple[list[Tensor], list]:
    """Modules as models have them, and ragged ones."""
    shapes = [(8, 1024)] * 6 + [(8, 4096), (3, 1100), (70, 40), (1, 7), (64, 2048)]
    new = [randn(r, d, seed=m, dtype=dtype) for m, (r, d) in enumerate(shapes)]
    past: list = [randn(120, d, seed=50 + m, dtype=past_dtype) for m, (_, d) in enumerate(shapes)]
    past[1] = list(past[1].split(8))
    past[2] = None
    past[3] = past[3][:0]
    past[4] = past[4][3:]
    return new, past


def stacked(past: Tensor | list[Tensor] | None, d: int) -> Tensor:
    parts = [] if past is None else past if isinstance(past, list) else [past]
    start = torch.zeros(0, d, dtype=torch.float64, device="cuda")
    return torch.cat([start, *(p.double() for p in parts)])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("past_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_penalty(dtype: torch.dtype, past_dtype: torch.dtype, form: str) -> None:
    new, past = model(dtype, past_dtype)
    for a in new:
        a.requires_grad_()
    upstream = torch.linspace(-1.0, 2.0, len(new), device="cuda")
    values = orthogonal_penalty(new, past, form=form, reduction="none")
    (values * upstream).sum().backward()
    for m, a in enumerate(new):
        x, p = a.detach().double(), stacked(past[m], a.shape[1])
        s, room = x @ p.t(), x.abs() @ p.abs().t()
        # One rounding for each product and each sum, relative to the sizes added up.
        roundings = (x.shape[1] + p.shape[0] + 1100) * 2.0**-24
        g = upstream[m].double()
        if form == "l1":
            value, grad = s.abs().sum(), s.sign() @ p
            value_room = room.sum()
            # Products within rounding of zero may have either sign.
            unsure = (s.abs() <= roundings * room).double()
            grad_room = roundings * torch.ones_like(s) @ p.abs() + 2 * unsure @ p.abs()
        else:
            value, grad = (s**2).sum(), 2 * s @ p
            value_room = (2 * room * s.abs() + roundings * room**2).sum()
            grad_room = 2 * roundings * room @ p.abs()
        assert (values[m].double() - value).abs() <= roundings * value_room
        assert a.grad is not None
        error = (a.grad.double() - g * grad).abs()
        allowed = g.abs() * (grad_room + 1.01 * UNIT[dtype] * grad.abs()) + 2.0**-25
        assert (error <= allowed).all(), m


@pytest.mark.parametrize("form", FORMS)
def test_two_runs_have_equal_bits(form: str) -> None:
    new, past = model(torch.bfloat16, torch.bfloat16)
    for a in new:
        a.requires_grad_()

    def run() -> list[Tensor]:
        values = orthogonal_penalty(new, past, form=form, reduction="none")
        return [values, *torch.autograd.grad(values.sum(), new)]

    first = run()
    for _ in range(5):
        for x, y in zip(run(), first, strict=True):
            assert torch.equal(x, y)


def test_agrees_with_the_reference() -> None:
    new, past = model(torch.float32, torch.float32)
    for form in FORMS:
        got = orthogonal_penalty(new, past, form=form, reduction="none")
        want = orthogonal_penalty(new, past, form=form, reduction="none", backend="eager")
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_project(dtype: torch.dtype, rows: bool) -> None:
    shapes = [(8, 1024, 120), (8, 4096, 64), (64, 512, 512), (3, 33, 5), (300, 1000, 100)]
    a = [randn(r, d, seed=d, dtype=dtype) for r, d, _ in shapes]
    q64 = [torch.linalg.qr(randn(d, k, seed=k).double()).Q for _, d, k in shapes]
    for q_dtype in (dtype, torch.float32):
        q = [x.to(q_dtype).contiguous() for x in q64]
        given = [x.t().contiguous() for x in q] if rows else q
        for passes in (1, 2):
            got = orthogonal_project(a, given, rows=rows, passes=passes)
            for x, y, b in zip(a, got, q, strict=True):
                want, c = x.double(), b.double()
                for _ in range(passes):
                    want = want - want @ c @ c.t()
                room = x.double().abs() + x.double().abs() @ c.abs() @ c.abs().t()
                allowed = passes * 2 * (sum(b.shape) + 64) * 2.0**-24 * room
                allowed += 1.01 * UNIT[dtype] * want.abs() + 2.0**-25
                assert ((y.double() - want).abs() <= allowed).all()


def test_projection_leaves_nothing_in_the_subspace() -> None:
    q = torch.linalg.qr(randn(4096, 120).double()).Q
    a = randn(8, 120, seed=1) @ q.float().t() + 1e-3 * randn(8, 4096)
    weight = a.clone()
    orthogonal_project_(weight, q.float(), passes=2, check=True)
    assert (weight.double() @ q).norm() / weight.double().norm() < 1e-6


def test_graph_capture() -> None:
    new, past = model(torch.bfloat16, torch.bfloat16)
    for a in new:
        a.requires_grad_()
    q = [torch.linalg.qr(randn(a.shape[1], 5)).Q for a in new]
    weights = [a.detach().clone() for a in new]

    def run() -> list[Tensor]:
        value = orthogonal_penalty(new, past)
        grads = torch.autograd.grad(value, new)
        orthogonal_project_(weights, q)
        return [value, *grads]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    with torch.no_grad():
        for m, a in enumerate(new):
            a.copy_(randn(*a.shape, seed=900 + m, dtype=a.dtype))
            weights[m].copy_(a)
    graph.replay()
    got = [x.clone() for x in out]
    projected = [w.clone() for w in weights]
    for w, a in zip(weights, new, strict=True):
        w.copy_(a.detach())
    for x, y in zip(got, run(), strict=True):
        assert torch.equal(x, y)
    for x, y in zip(projected, weights, strict=True):
        assert torch.equal(x, y)


def test_no_wait_for_the_device() -> None:
    """No host sync: torch raises at one."""
    new, past = model(torch.bfloat16, torch.bfloat16)
    for a in new:
        a.requires_grad_()
    orthogonal_penalty(new, past).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        orthogonal_penalty(new, past).backward()
        with torch.no_grad():
            orthogonal_project_(new, [torch.zeros(a.shape[1], 2, device="cuda") for a in new])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream() -> None:
    new, past = model(torch.float32, torch.float32)
    want = orthogonal_penalty(new, past)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        got = orthogonal_penalty(new, past)
    side.synchronize()
    assert torch.equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device() -> None:
    a, p = randn(8, 64), randn(16, 64, seed=1)
    want = orthogonal_penalty([a], [p])
    got = orthogonal_penalty([a.to("cuda:1")], [p.to("cuda:1")])
    assert got.device == torch.device("cuda:1")
    assert torch.equal(got.cpu(), want.cpu())


def test_compile_fullgraph() -> None:
    new, past = model(torch.bfloat16, torch.bfloat16)
    for a in new:
        a.requires_grad_()

    def step(*new: Tensor) -> Tensor:
        return orthogonal_penalty(list(new), past) * 2.0

    want = step(*new)
    want_grads = torch.autograd.grad(want, new)
    got = torch.compile(step, fullgraph=True)(*new)
    torch.testing.assert_close(got, want)
    for x, y in zip(torch.autograd.grad(got, new), want_grads, strict=True):
        assert torch.equal(x, y)


def test_autocast_changes_nothing() -> None:
    new, past = model(torch.float32, torch.float32)
    want = orthogonal_penalty(new, past)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.equal(orthogonal_penalty(new, past), want)


def test_float64_stays_float64() -> None:
    a, p = randn(8, 64).double().requires_grad_(), randn(16, 64, seed=1).double()
    value = orthogonal_penalty([a], [p])
    value.backward()
    assert value.dtype == torch.float64
    torch.testing.assert_close(a.grad, (a @ p.t()).sign() @ p)


def test_more_elements_than_int32(need_memory: Callable[[int], None]) -> None:
    """The last rows of a past of more than 2^31 elements count like the first."""
    rows, d = 2**17 + 40, 2**14
    need_memory(2 * rows * d + 3 * 2**30)
    past = torch.zeros(rows, d, dtype=torch.bfloat16, device="cuda")
    a = randn(1, d, dtype=torch.bfloat16).requires_grad_()
    tail = randn(8, d, seed=1, dtype=torch.bfloat16)
    past[-8:] = tail
    value = orthogonal_penalty([a], [past])
    value.backward()
    small = a.detach().clone().requires_grad_()
    want = orthogonal_penalty([small], [tail])
    want.backward()
    torch.testing.assert_close(value, want, rtol=1e-5, atol=0.0)
    assert torch.equal(a.grad, small.grad)
