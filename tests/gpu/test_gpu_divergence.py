"""Divergences and log-probs on a card: real bfloat16, graphs, streams, memory, large tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cl_fast.losses import (
    Hidden,
    Logits,
    Probs,
    divergence_from_logits,
    linear_divergence,
    token_logprobs,
)
from cl_fast.ops import vocabulary_rows as rows
from cl_fast.ops.vocabulary_rows import KINDS, Extra, How

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
UNIT = 2.0**-24
PLAIN = How()
WARM = How(temperature=2.5)
CAPPED = How(scale=0.7, softcap=20.0, temperature=1.5)
GIB = 2**30


def randn(
    *shape: int, seed: int = 0, std: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    g = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=g, device="cuda") * std).to(dtype)


def logits(m: int, v: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Peaked, flat and heavy-tailed rows by turns."""
    x = randn(m, v, seed=seed, std=3.0)
    x[::3] *= 10
    x[1::3] = x[1::3].sign() * x[1::3] ** 2
    return x.to(dtype)


def near(got: Tensor, exact: Tensor, plain: Tensor, size: float, rounding: float = 0.0) -> None:
    """Twice the error of the reference in float32, two roundings of numbers of that size, and the
    rounding of what is stored."""
    infinite = ~exact.isfinite()
    assert torch.equal(got[infinite].double().nan_to_num(), exact[infinite].nan_to_num())
    exact, got, plain = exact[~infinite], got[~infinite].double(), plain[~infinite].double()
    if exact.numel():
        room = 2 * (plain - exact).abs().max() + 2 * UNIT * size
        assert (
            (got - exact).abs() <= room + rounding * exact.abs() + 2.0**-24 * (rounding > UNIT)
        ).all()


def triton() -> object:
    return rows.kernels("triton", torch.empty(0, device="cuda"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("v", "how_s", "how_t"),
    [
        (1, PLAIN, PLAIN),
        (999, WARM, PLAIN),
        (4096, CAPPED, CAPPED),
        (50257, PLAIN, WARM),
        (128256, WARM, How(probs=True)),
    ],
)
@pytest.mark.parametrize(
    ("s_dtype", "t_dtype"),
    [*((d, d) for d in DTYPES), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)],
)
def test_rows(
    s_dtype: torch.dtype, t_dtype: torch.dtype, v: int, how_s: How, how_t: How, kind: str
) -> None:
    s, t = logits(6, v, s_dtype), logits(6, v, t_dtype, 7)
    if how_t.probs:
        t = t.float().softmax(1).to(t_dtype)
    elif v > 1 and kind != "reverse_kl":
        t[:, v // 3 :: 5] = -math.inf
        t[1, : v // 2] = -math.inf
    ids = torch.tensor([0, v - 1, -100, v // 2, 0, 0], device="cuda")
    grad = torch.tensor([1.0, -0.5, 0.0, 3.0, 1.0, 0.0], device="cuda")
    ce = torch.tensor([0.5, 0.0, 0.0, 2.0, -1.0, 1.0], device="cuda")
    found = []
    for k, x, y in (
        (triton(), s, t), (rows, s.double(), t.double()), (rows, s.float(), t.float())
    ):  # fmt: skip
        loss, stats = k.divergence_forward(x, y, kind, 0.3, how_s, how_t)
        wide = stats.dtype
        own = s_dtype if k is not rows else wide
        outs = []
        for extra in (
            None,
            Extra(ce.to(wide), k.normalisers(x, how_s._replace(temperature=1.0)), ids),
        ):
            out = torch.full(s.shape, math.nan, dtype=own, device="cuda")
            k.divergence_gradient(out, grad.to(wide), x, y, stats, kind, 0.3, how_s, how_t, extra)
            outs.append(out)
        found.append((outs, (loss, stats)))
    size = 1 + float(found[1][1][1][:, :4].abs().max())
    for group, rounding in ((0, ROUNDING[s_dtype]), (1, 0.0)):
        for got, exact, plain in zip(*(f[group] for f in found), strict=True):
            near(got, exact, plain, size, rounding)


@pytest.mark.parametrize("how", [PLAIN, WARM, CAPPED])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [1, 999, 128256])
def test_log_probs(v: int, dtype: torch.dtype, how: How) -> None:
    x = logits(4, v, dtype)
    ids = torch.tensor([0, v - 1, -100, v // 2], device="cuda")
    grad = torch.tensor([1.0, -0.5, 0.0, 2.0], device="cuda")
    e = torch.tensor([0.3, 0.0, 0.0, -2.0], device="cuda")
    found = []
    for k, y in ((triton(), x), (rows, x.double()), (rows, x.float())):
        stats = k.logprob_forward(y, ids, how)
        out = torch.full(
            x.shape, math.nan, dtype=dtype if k is not rows else stats.dtype, device="cuda"
        )
        k.logprob_gradient(out, grad.to(stats.dtype), e.to(stats.dtype), y, ids, stats, how)
        found.append((stats, out))
    size = 1 + float(found[1][0].abs().max())
    for i, rounding in ((0, 0.0), (1, ROUNDING[dtype])):
        near(*(f[i] for f in found), size, rounding)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_give_exactly_zero(dtype: torch.dtype, kind: str) -> None:
    """Whatever the compiler fuses: both sides must go the same way."""
    for how in (PLAIN, How(scale=0.3, temperature=0.7), CAPPED):
        for v in (999, 128256):
            s = logits(5, v, dtype)
            s[:, ::7] = -math.inf
            loss, stats = triton().divergence_forward(s, s.clone(), kind, 0.3, how, how)
            out = torch.full_like(s, math.nan)
            triton().divergence_gradient(
                out, torch.ones(5, device="cuda"), s, s.clone(), stats, kind, 0.3, how, how
            )
            assert not loss.any()
            assert not out.any()


@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_those_of_the_row(kind: str) -> None:
    """Equal in every run, for any number of rows, and in place."""
    s, t = logits(33, 128256, torch.bfloat16), logits(33, 128256, torch.bfloat16, 7)
    grad = torch.linspace(-1, 1, 33, device="cuda")

    def run(part: slice) -> tuple[Tensor, Tensor]:
        loss, stats = triton().divergence_forward(s[part], t[part], kind, 0.3, WARM, PLAIN)
        out = torch.empty_like(s[part])
        triton().divergence_gradient(
            out, grad[part], s[part], t[part], stats, kind, 0.3, WARM, PLAIN
        )
        return loss, out

    loss, out = run(slice(None))
    for _ in range(3):
        again, more = run(slice(None))
        assert torch.equal(again, loss)
        assert torch.equal(more, out)
    some, more = run(slice(30, 33))
    assert torch.equal(some, loss[30:])
    assert torch.equal(more, out[30:])
    _, stats = triton().divergence_forward(s, t, kind, 0.3, WARM, PLAIN)
    triton().divergence_gradient(s, grad, s, t, stats, kind, 0.3, WARM, PLAIN)
    assert torch.equal(s, out)


def heads(
    n: int, h: int, v: int, dtype: torch.dtype = torch.bfloat16, frozen: bool = True
) -> tuple[Tensor, Tensor, Hidden]:
    hidden = randn(n, h, dtype=dtype).requires_grad_()
    weight = randn(v, h, seed=1, std=3 * h**-0.5, dtype=dtype).requires_grad_(not frozen)
    teacher = Hidden(
        randn(n, h, seed=2, dtype=dtype), randn(v, h, seed=3, std=3 * h**-0.5, dtype=dtype)
    )
    return hidden, weight, teacher


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [True, False])
def test_linear_divergence(frozen: bool, kind: str) -> None:
    """bfloat16 matrices: no further from float64 than float32 logits of the same matrices, whose
    gradient is rounded to bfloat16 for its product."""
    hidden, weight, teacher = heads(300, 256, 5003, frozen=frozen)
    wanted = [hidden] if frozen else [hidden, weight]
    loss = linear_divergence(hidden, weight, teacher, kind=kind, beta=0.3)
    got = torch.autograd.grad(loss, wanted)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    t = Logits(teacher.hidden.double() @ teacher.weight.double().T)
    exact = divergence_from_logits(wide[0] @ wide[1].T, t, kind=kind, beta=0.3)
    want = torch.autograd.grad(exact, wide[: len(wanted)])
    assert abs(loss.double() - exact) <= 1e-5 * exact
    for x, y in zip(got, want, strict=True):
        assert x.dtype == torch.bfloat16
        # One rounding of dz and one of the result, of independent signs: 2^-9 each.
        assert (x.double() - y).norm() <= 2.0**-8 * y.norm()


def test_graph_capture() -> None:
    """All of it, masked rows included, replayed with other numbers."""
    hidden, weight, teacher = heads(256, 128, 4000)
    labels = torch.arange(256, device="cuda") % 4000
    labels[::3] = -100
    denom = torch.tensor(100.0, device="cuda")

    def run() -> list[Tensor]:
        loss = linear_divergence(
            hidden, weight, teacher, kind="jsd", labels=labels, ce_weight=0.5, denom=denom
        )
        logprobs = token_logprobs(hidden, weight, labels)
        return [loss, logprobs, *torch.autograd.grad(loss + logprobs.sum(), [hidden])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    with torch.no_grad():
        hidden.copy_(randn(256, 128, seed=77))
    graph.replay()
    got = [x.clone() for x in out]
    for x, y in zip(got, run(), strict=True):
        torch.testing.assert_close(x, y, rtol=2.0**-7, atol=1e-4)


def test_graph_capture_of_rows() -> None:
    s, t = logits(64, 40000, torch.bfloat16), logits(64, 40000, torch.bfloat16, 7)
    s.requires_grad_()

    def run() -> list[Tensor]:
        found = []
        for kind in KINDS:
            loss = divergence_from_logits(s, Logits(t), kind=kind)
            found += [loss, *torch.autograd.grad(loss, [s])]
        return found

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    t.copy_(logits(64, 40000, torch.bfloat16, 9))
    graph.replay()
    got = [x.clone() for x in out]
    for x, y in zip(got, run(), strict=True):
        assert torch.equal(x, y)


def test_no_wait_for_the_device() -> None:
    """No host sync where no row is masked: torch raises at one."""
    hidden, weight, teacher = heads(256, 128, 4000, frozen=False)
    t = teacher.hidden @ teacher.weight.T
    s = t.flip(0).requires_grad_()
    denom = torch.tensor(100.0, device="cuda")

    def run() -> None:
        for kind in ("forward_kl", "jsd"):
            linear_divergence(hidden, weight, teacher, kind=kind, denom=denom).backward()
            linear_divergence(hidden, weight, Probs(t.softmax(1)), kind=kind).backward()
            divergence_from_logits(s, Logits(t), kind=kind, denom=denom).backward()

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream() -> None:
    s, t = logits(64, 9000, torch.bfloat16), logits(64, 9000, torch.bfloat16, 7)
    want = divergence_from_logits(s, Logits(t), reduction="none")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        got = divergence_from_logits(s, Logits(t), reduction="none")
    side.synchronize()
    assert torch.equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device() -> None:
    s, t = logits(8, 900), logits(8, 900, seed=7)
    want = divergence_from_logits(s, Logits(t), reduction="none")
    got = divergence_from_logits(s.to("cuda:1"), Logits(t.to("cuda:1")), reduction="none")
    assert got.device == torch.device("cuda:1")
    assert torch.equal(got.cpu(), want.cpu())


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_compile_fullgraph(kind: str) -> None:
    hidden, weight, teacher = heads(128, 64, 3000, frozen=False)
    t = teacher.hidden @ teacher.weight.T

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        one = linear_divergence(hidden, weight, teacher, kind=kind)
        two = divergence_from_logits(hidden @ weight.T, Logits(t), kind=kind)
        ids = torch.arange(128, device="cuda")
        return one + two - token_logprobs(hidden, weight, ids).mean()

    want = step(hidden, weight)
    want_grads = torch.autograd.grad(want, [hidden, weight])
    got = torch.compile(step, fullgraph=True)(hidden, weight)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for x, y in zip(torch.autograd.grad(got, [hidden, weight]), want_grads, strict=True):
        assert (x.double() - y.double()).norm() <= 2.0**-6 * y.double().norm()


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_memory_of_the_fused_loss(kind: str, need_memory: Callable[[int], None]) -> None:
    """4096 tokens, 128256 ids, a frozen head: 0.3 GB beyond the inputs, with the gradient of the
    hidden states. float32 logits would be 2.1 GB for each model."""
    need_memory(6 * GIB)
    hidden, weight, teacher = heads(4096, 4096, 128256)
    linear_divergence(hidden[:64], weight, Hidden(teacher.hidden[:64], teacher.weight)).backward()
    hidden.grad = None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_divergence(hidden, weight, teacher, kind=kind).backward()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 0.3 * 1e9, f"{extra / 1e9:.3f} GB"


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_more_elements_than_int32(kind: str, need_memory: Callable[[int], None]) -> None:
    """The last rows of logits of more than 2^31 elements count like the first."""
    m, v = 2**31 // 128256 + 8, 128256
    need_memory(4 * m * v + 3 * GIB)
    s = torch.zeros(m, v, dtype=torch.bfloat16, device="cuda")
    t = torch.zeros_like(s)
    tail_s, tail_t = logits(3, v, torch.bfloat16), logits(3, v, torch.bfloat16, 7)
    s[-3:], t[-3:] = tail_s, tail_t
    loss, stats = triton().divergence_forward(s, t, kind, 0.3, PLAIN, PLAIN)
    want, small = triton().divergence_forward(tail_s, tail_t, kind, 0.3, PLAIN, PLAIN)
    assert not loss[:-3].any()
    assert torch.equal(loss[-3:], want)
    grad = torch.ones(m, device="cuda")
    triton().divergence_gradient(s, grad, s, t, stats, kind, 0.3, PLAIN, PLAIN)
    out = torch.empty_like(tail_s)
    triton().divergence_gradient(out, grad[:3], tail_s, tail_t, small, kind, 0.3, PLAIN, PLAIN)
    assert torch.equal(s[-3:], out)
    assert not s[:4].any()
