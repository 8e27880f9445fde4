"""rank_update and gram by the Triton kernels on a card, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_fast.ops import gram, gram_, rank_update, rank_update_, rank_update_many_

pytestmark = pytest.mark.gpu

WEIGHTS = (torch.bfloat16, torch.float16, torch.float32)
HALF_BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}
SHAPES = [(1, 1, 1), (64, 129, 5), (300, 512, 8), (257, 520, 16), (513, 1000, 100), (640, 768, 256)]
SHAPES += [(130, 72, 257), (200, 264, 1000), (96, 40, 4096)]


def layer(
    m: int, n: int, r: int, weight: torch.dtype, factors: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed + m + n + r)
    w = 0.02 * torch.randn(m, n, generator=g)
    u = torch.randn(m, r, generator=g) * torch.randint(-6, 6, (m, 1), generator=g).float().exp2()
    v = 0.01 * torch.randn(n, r, generator=g)
    return w.to(weight).cuda(), u.to(factors).cuda(), v.to(factors).cuda()


def told(w: Tensor, u: Tensor, v: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The sum in float64, and the sum of the sizes."""
    wide = [t.double() for t in (w, u, v)]
    size = wide[0].abs() + abs(alpha) * wide[1].abs() @ wide[2].abs().mT
    return wide[0] + alpha * wide[1] @ wide[2].mT, size


def check(got: Tensor, w: Tensor, u: Tensor, v: Tensor, alpha: float, ulps: float = 0.5) -> None:
    """Half a spacing of the result, and what a float32 sum may lose before the rounding.

    A tensor core may cut where it adds instead of rounding: 2^-23 per product, not 2^-24.
    """
    want, size = told(w, u, v, alpha)
    low = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-149}[got.dtype]
    spacing = torch.maximum(got.double().abs(), want.abs()) * 2.0 ** (1 - HALF_BITS[got.dtype])
    bound = ulps * spacing.clamp(min=low) + (u.shape[-1] + 4) * (2.0**-23 * size + 2.0**-149)
    assert ((got.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("factors", WEIGHTS)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_one_rounding(m: int, n: int, r: int, weight: torch.dtype, factors: torch.dtype) -> None:
    w, u, v = layer(m, n, r, weight, factors)
    for alpha in (1.0, -0.3):
        got = rank_update(w, u, v, alpha=alpha)
        check(got, w, u, v, alpha)
        assert torch.equal(got, rank_update(w, u, v, alpha=alpha))  # one order of addition
    turned = w.t().contiguous().t()
    rank_update_(turned, u, v)
    check(turned, w, u, v, 1.0)
    padded = torch.zeros(m, n + 3, dtype=weight, device="cuda")
    padded[:, 1 : n + 1] = w
    rank_update_(padded[:, 1 : n + 1], u, v, base=w.float(), alpha=0.5)
    check(padded[:, 1 : n + 1], w, u, v, 0.5)
    assert not padded[:, 0].any()
    assert not padded[:, n + 1 :].any()


@pytest.mark.parametrize("r", [9, 256, 1000, 4096])
def test_float32_factors_are_as_exact_as_a_float32_matmul(r: int) -> None:
    _, u, v = layer(256, 320, r, torch.float32, torch.float32)
    zero = torch.zeros(256, 320, device="cuda")
    want, size = told(zero, u, v, 1.0)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        peer = u @ v.t()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    ours = ((rank_update(zero, u, v).double() - want).abs() / size).max()
    assert ours <= 4 * ((peer.double() - want).abs() / size).max() + 2.0**-23


def test_rank_one_has_the_bits_of_the_cpu() -> None:
    """One product of halves is exact in float32: all backends round the same sum."""
    for dtype in WEIGHTS[:2]:
        w, u, v = layer(200, 296, 1, dtype, dtype)
        modes = ("nearest", "stochastic")
        for rounding in modes:
            options: dict[str, Any] = {"alpha": 0.3, "rounding": rounding, "seed": 5}
            want = rank_update(w.cpu(), u.cpu(), v.cpu(), **options)
            assert torch.equal(rank_update(w, u, v, **options).cpu(), want)
            turned = w.t().contiguous().t()
            assert torch.equal(rank_update_(turned, u, v, **options).cpu(), want)
            odd = w[:, :293]
            want = rank_update(odd.cpu(), u.cpu(), v[:293].cpu(), **options)
            assert torch.equal(rank_update(odd, u, v[:293], **options).cpu(), want)


@pytest.mark.parametrize("r", [4, 64, 300])
def test_stochastic(r: int) -> None:
    for dtype in WEIGHTS[:2]:
        w, u, v = layer(256, 320, r, dtype, torch.bfloat16)
        outs = [rank_update(w, u, v, rounding="stochastic", seed=seed) for seed in range(200)]
        for out in outs[:3]:
            check(out, w, u, v, 1.0, ulps=1.0)
        want, _ = told(w, u, v, 1.0)
        mean = torch.stack(outs).double().mean(0)
        nearest = (rank_update(w, u, v).double() - want).abs().mean()
        assert (mean - want).abs().mean() < 0.3 * nearest


def test_many_is_the_loop() -> None:
    shapes = [(64, 80, 1), (8, 9, 3), (300, 512, 64), (128, 256, 300), (0, 8, 2), (40, 48, 0)]
    layers = [layer(*s, w, f, i) for i, s in enumerate(shapes) for w in WEIGHTS for f in WEIGHTS]
    bases = [None if i % 2 else w.clone() for i, (w, _, _) in enumerate(layers)]
    want = [
        rank_update(w, u, v, base=b, alpha=0.5) for (w, u, v), b in zip(layers, bases, strict=True)
    ]
    weights = [w for w, _, _ in layers]
    rank_update_many_(
        weights, [u for _, u, _ in layers], [v for _, _, v in layers], bases=bases, alphas=0.5
    )
    for got, expected in zip(weights, want, strict=True):
        assert torch.equal(got, expected)


def test_undo_bit_for_bit() -> None:
    w, u, v = layer(300, 512, 64, torch.bfloat16, torch.float32)
    untouched = w.clone()
    rank_update_(w, u, v, base=untouched)
    rank_update_(w, u[:, :0], v[:, :0], base=untouched)
    assert torch.equal(w.view(torch.int16), untouched.view(torch.int16))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_in_a_cuda_graph(rounding: str) -> None:
    """No sync, and replays that read what the tensors hold then."""
    layers = [layer(64, 80, r, torch.bfloat16, torch.bfloat16) for r in (3, 40, 300)]
    weights, us, vs = ([tensors[i] for tensors in layers] for i in range(3))
    bases = [w.clone() for w in weights]
    k = torch.randn(100, 72, device="cuda").bfloat16()
    c = torch.zeros(72, 72, dtype=torch.float64, device="cuda")

    def step() -> None:
        rank_update_many_(weights, us, vs, bases=bases, rounding=rounding)
        gram_(c, k)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for tensors in (us, vs):
        for tensor in tensors:
            tensor.mul_(0.5)
    k.mul_(2)
    c.zero_()
    graph.replay()
    graph.replay()
    wanted = [b.clone() for b in bases]
    rank_update_many_(wanted, us, vs, rounding=rounding)
    for got, expected in zip(weights, wanted, strict=True):
        assert torch.equal(got, expected)
    torch.testing.assert_close(c, 2 * gram(k), rtol=1e-12, atol=1e-12)


def test_on_another_stream() -> None:
    w, u, v = layer(2048, 2048, 64, torch.bfloat16, torch.bfloat16)
    want = rank_update(2 * w, u, v)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(20):
            w.add_(0)  # the update must wait for these
        w.mul_(2)
        rank_update_(w, u, v)
    stream.synchronize()
    assert torch.equal(w, want)


def test_on_another_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    w, u, v = (t.to("cuda:1") for t in layer(64, 80, 20, torch.bfloat16, torch.bfloat16))
    check(rank_update(w, u, v), w, u, v, 1.0)
    assert torch.equal(gram(u).cpu(), gram(u.to("cuda:0")).cpu())


def test_more_than_2_31_elements(need_memory: Callable[[int], None]) -> None:
    m, n = 46_400, 46_400
    need_memory(6 * m * n)
    w = torch.zeros(m, n, dtype=torch.bfloat16, device="cuda")
    for r in (1, 16, 260):
        u = torch.zeros(m, r, dtype=torch.bfloat16, device="cuda")
        v = torch.zeros(n, r, dtype=torch.bfloat16, device="cuda")
        u[-1, -1], v[-1, -1], u[0, 0], v[0, 0] = 2.0, 3.0, 1.0, 1.0
        rank_update_(w, u, v, rounding="stochastic" if r == 16 else "nearest")
    # the corners of three updates; rank 1 fills the other two corners as well
    corners = [float(w[i, j]) for i in (0, -1) for j in (0, -1)]
    assert corners == [3.0, 3.0, 2.0, 18.0]
    assert int(w.count_nonzero()) == 4


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend: str) -> None:
    def step(w: Tensor, u: Tensor, v: Tensor, c: Tensor) -> Tensor:
        rank_update_(w, u, v, alpha=0.5)
        gram_(c, u)
        return rank_update(w, u, v) * 1.0

    w, u, v = layer(64, 80, 20, torch.bfloat16, torch.bfloat16)
    c = torch.zeros(20, 20, device="cuda")
    want_w, want_c = w.clone(), c.clone()
    want = step(want_w, u, v, want_c)
    torch._dynamo.reset()
    got = torch.compile(step, fullgraph=True, backend=backend)(w, u, v, c)
    assert torch.equal(got, want)
    assert torch.equal(w, want_w)
    assert torch.equal(c, want_c)


def test_gradients() -> None:
    w, u, v = (t.requires_grad_() for t in layer(64, 80, 20, torch.bfloat16, torch.float32))
    up = torch.randn(64, 80, device="cuda").bfloat16()
    rank_update(w, u, v, alpha=0.5).backward(up)
    assert torch.equal(w.grad, up)
    for grad, want in (
        (u.grad, 0.5 * up.double() @ v.double()),
        (v.grad, 0.5 * up.double().t() @ u.double()),
    ):
        torch.testing.assert_close(grad.double(), want, rtol=1e-2, atol=1e-3 * want.abs().max())


def test_in_place_takes_no_memory() -> None:
    w, u, v = layer(4096, 4096, 64, torch.bfloat16, torch.bfloat16)
    rank_update_(w, u, v)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rank_update_(w, u, v)
    assert torch.cuda.max_memory_allocated() - before <= 0.01 * w.numel() * 2


@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("out", [torch.float64, torch.float32])
@pytest.mark.parametrize(("tokens", "d"), [(0, 8), (1, 1), (100, 7), (5000, 264), (9000, 70)])
def test_gram(tokens: int, d: int, out: torch.dtype, dtype: torch.dtype) -> None:
    k = torch.randn(tokens, d, device="cuda").to(dtype)
    mask = torch.rand(tokens, device="cuda") < 0.7
    for taken in (None, mask):
        if taken is not None:
            k[~mask] = float("nan")
        c = gram(k, mask=taken, dtype=out)
        rows = k.double() if taken is None else k.double()[mask]
        want, size = rows.t() @ rows, rows.t().abs() @ rows.abs()
        eps = 2.0**-23 * min(2048, tokens + 1) + (2.0**-22 if out == torch.float32 else 0.0)
        assert torch.equal(c, c.t())
        assert ((c.double() - want).abs() <= eps * size + 1e-300).all()
        assert torch.equal(c, gram(k, mask=taken, dtype=out))


def test_gram_of_a_million_tokens() -> None:
    """No growth with the number of tokens: as exact as one block."""
    k = torch.randn(1_000_000, 64, device="cuda") * torch.logspace(0, -4, 64, device="cuda")
    for keys in (k, k.bfloat16()):
        want = keys.double().t() @ keys.double()
        size = keys.double().abs().t() @ keys.double().abs()
        error = ((gram(keys) - want).abs() / size).max()
        first = keys[:2048]
        one = first.double().t() @ first.double()
        one_size = first.double().abs().t() @ first.double().abs()
        one_error = ((gram(first) - one).abs() / one_size).max()
        assert error <= 2 * one_error + 2.0**-24


def test_gram_of_many_layers() -> None:
    ks = [torch.randn(t, d, device="cuda").bfloat16() for t, d in ((300, 72), (5000, 72), (9, 5))]
    cs = gram(ks)
    for c, k in zip(cs, ks, strict=True):
        torch.testing.assert_close(c, gram(k), rtol=1e-12, atol=1e-12)
