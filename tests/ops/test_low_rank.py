"""rank_update and gram: the formulas in float64, one rounding, gradients, memory, bad input."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl_fast.ops import gram, gram_, rank_update, rank_update_, rank_update_many_, streams
from cl_fast.ops.low_rank import _LARGEST, _round_at_random

WEIGHTS = (torch.bfloat16, torch.float16, torch.float32)
RANKS = (1, 2, 15, 16, 17, 257, 4096)


def layer(
    m: int,
    n: int,
    r: int,
    weight: torch.dtype = torch.bfloat16,
    factors: torch.dtype = torch.float32,
    seed: int = 0,
    kind: str = "normal",
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed + 7 * m + 11 * n + 13 * r)
    w = 0.02 * torch.randn(m, n, generator=g)
    u, v = (
        torch.randn(m, r, generator=g),
        torch.randn(n, r, generator=g) * (0.01 / max(1, r) ** 0.5),
    )
    if kind == "heavy":
        u = u / (0.01 + torch.rand(m, r, generator=g)) ** 2
    elif kind == "cancel":
        u[:, 1::2] = -u[:, : r - r % 2 : 2]
        v[:, 1::2] = v[:, : r - r % 2 : 2]
    elif kind == "tiny":
        w, u = w * torch.finfo(weight).tiny * 100, u * torch.finfo(weight).tiny * 100
    elif kind == "wide":
        u = u * torch.randint(-8, 8, (m, 1), generator=g).float().exp2()
    return w.to(weight), u.to(factors), v.to(factors)


def told(w: Tensor, u: Tensor, v: Tensor, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """The sum in float64, and the sum of the sizes of all that was added up."""
    wide = [t.detach().double().numpy() for t in (w, u, v)]
    alpha = float(np.float32(alpha))
    value = wide[0] + alpha * np.einsum("...ik,...jk->...ij", wide[1], wide[2])
    size = np.abs(wide[0]) + abs(alpha) * np.einsum(
        "...ik,...jk->...ij", np.abs(wide[1]), np.abs(wide[2])
    )
    return value, size


def check_one_rounding(
    got: Tensor, w: Tensor, u: Tensor, v: Tensor, alpha: float, spacings: float = 0.5
) -> None:
    """Within half a spacing of the float64 sum, and what float32 loses before the rounding.

    A float32 sum of r products in any order loses at most (r + 1) 2^-24 of the sum of the sizes;
    alpha, the base and their sum are three roundings more.
    """
    want, size = told(w, u, v, alpha)
    out = got.double().numpy()
    bound = spacings * np.maximum(
        oracle.spacing(want, got.dtype), oracle.spacing(out, got.dtype)
    ) + (u.shape[-1] + 4) * (2.0**-24 * size + 2.0**-149)
    assert (np.abs(out - want) <= bound).all()


@pytest.mark.parametrize("kind", ["normal", "heavy", "cancel", "tiny", "wide"])
@pytest.mark.parametrize("factors", WEIGHTS)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("r", RANKS[:6])
def test_one_rounding(r: int, weight: torch.dtype, factors: torch.dtype, kind: str) -> None:
    w, u, v = layer(9, 13, r, weight, factors, kind=kind)
    before = [t.clone() for t in (w, u, v)]
    for alpha in (1.0, -0.3):
        check_one_rounding(rank_update(w, u, v, alpha=alpha), w, u, v, alpha)
    for tensor, copy in zip((w, u, v), before, strict=True):
        assert torch.equal(tensor, copy)


def test_rank_4096() -> None:
    w, u, v = layer(3, 5, 4096)
    check_one_rounding(rank_update(w, u, v), w, u, v, 1.0)


def test_no_worse_than_torch_in_the_same_dtypes() -> None:
    """Peers round the product first, then the sum: never closer to float64 than one rounding."""
    for dtype in (torch.bfloat16, torch.float16):
        w, u, v = layer(64, 80, 33, dtype, dtype)
        want, _ = told(w, u, v, 1.0)
        ours = np.abs(rank_update(w, u, v).double().numpy() - want)
        peer = np.abs((w + u @ v.t()).double().numpy() - want)
        assert ours.max() <= peer.max()
        assert ours.mean() < peer.mean()


def test_float64() -> None:
    w, u, v = (t.double() for t in layer(9, 13, 5))
    got = rank_update(w, u, v, alpha=0.1).numpy()
    want = w.numpy() + 0.1 * (u.numpy() @ v.numpy().T)
    np.testing.assert_allclose(got, want, rtol=1e-15, atol=1e-18)


def test_rank_one_is_exact_before_the_rounding() -> None:
    """A product of two bfloat16 fits into float32: the result is the rounded float32 sum."""
    w, u, v = layer(40, 50, 1, torch.bfloat16, torch.bfloat16)
    want = (w.float() + u.float() * v.float().t()).to(torch.bfloat16)
    assert torch.equal(rank_update(w, u, v), want)


@pytest.mark.parametrize("m", [0, 1, 7])
@pytest.mark.parametrize("n", [0, 1, 9])
@pytest.mark.parametrize("r", [0, 1, 3])
def test_empty_and_small(m: int, n: int, r: int) -> None:
    w, u, v = layer(m, n, r)
    got = rank_update(w, u, v)
    assert got.shape == (m, n)
    check_one_rounding(got, w, u, v, 1.0)


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rows bound the temporaries; the bits of a rank-one update do not change."""
    w, u, v = layer(50, 40, 1, torch.bfloat16, torch.bfloat16)
    whole = [rank_update(w, u, v, rounding=mode, seed=3) for mode in ("nearest", "stochastic")]
    monkeypatch.setattr("cl_fast.ops.low_rank._BLOCK", 4 * 40 * 7)
    monkeypatch.setattr("cl_fast.ops.low_rank._FACTOR_BLOCK", 4 * 11)
    for mode, want in zip(("nearest", "stochastic"), whole, strict=True):
        assert torch.equal(rank_update(w, u, v, rounding=mode, seed=3), want)
    w, u, v = layer(50, 40, 33, torch.bfloat16, torch.bfloat16)
    check_one_rounding(rank_update(w, u, v), w, u, v, 1.0)


def test_base_is_read_and_the_weight_is_not() -> None:
    w, u, v = layer(6, 8, 3)
    nan = torch.full_like(w, float("nan"))
    want = rank_update(w, u, v, alpha=0.5)
    assert torch.equal(rank_update(nan, u, v, base=w, alpha=0.5), want)
    assert torch.equal(rank_update_(nan, u, v, base=w, alpha=0.5), want)
    # a base of another dtype is read as it is
    wide = w.float() + 1e-4
    check_one_rounding(rank_update(w, u, v, base=wide), wide, u, v, 1.0)
    assert torch.equal(rank_update(w, u, v, base=w), rank_update(w, u, v))


def test_undo_bit_for_bit() -> None:
    for dtype in WEIGHTS:
        w, u, v = layer(6, 8, 3, dtype)
        w[0, 0], w[0, 1], w[0, 2] = -0.0, float("inf"), float("nan")
        untouched = w.clone()
        view = torch.int32 if dtype == torch.float32 else torch.int16
        rank_update_(w, u, v, base=untouched)
        assert not torch.equal(w.view(view), untouched.view(view))
        rank_update_(w, u[:, :0], v[:, :0], base=untouched)
        assert torch.equal(w.view(view), untouched.view(view))
        rank_update_(w, u[:, :0], v[:, :0])
        assert torch.equal(w.view(view), untouched.view(view))


def test_rank_0_of_another_dtype_keeps_minus_zero() -> None:
    base = torch.tensor([[-0.0, 0.0, 1e-9]])
    got = rank_update(torch.zeros(1, 3).half(), torch.zeros(1, 0), torch.zeros(3, 0), base=base)
    assert torch.equal(got.view(torch.int16), base.half().view(torch.int16))


def test_rebasing_beats_adding_up() -> None:
    """A hundred small edits: rounded once from the base, or a hundred times."""
    w, _, _ = layer(64, 64, 1)
    edits = [layer(64, 64, 1, seed=i)[1:] for i in range(100)]
    us, vs = [u for u, _ in edits], [0.002 * v for _, v in edits]
    step = w.clone()
    for u, v in zip(us, vs, strict=True):
        rank_update_(step, u, v)
    once = rank_update(w, torch.cat(us, 1), torch.cat(vs, 1))
    want, _ = told(w, torch.cat(us, 1), torch.cat(vs, 1), 1.0)
    assert np.abs(once.double().numpy() - want).mean() < (
        0.7 * np.abs(step.double().numpy() - want).mean()
    )


def test_batched_is_the_loop() -> None:
    parts = [layer(6, 8, 3, seed=i) for i in range(4)]
    w, u, v = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    got = rank_update(w, u, v, alpha=0.5)
    for i, (a, b, c) in enumerate(parts):
        assert torch.equal(got[i], rank_update(a, b, c, alpha=0.5))
    four = rank_update(w.view(2, 2, 6, 8), u.view(2, 2, 6, 3), v.view(2, 2, 8, 3), alpha=0.5)
    assert torch.equal(four.view(4, 6, 8), got)
    rank_update_(w, u, v, alpha=0.5)
    assert torch.equal(w, got)
    assert rank_update(w[:0], u[:0], v[:0]).shape == (0, 6, 8)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_many_is_the_loop(rounding: str) -> None:
    shapes = [(6, 8, 3), (1, 5, 1), (17, 3, 40), (4, 4, 0), (0, 3, 2)]
    layers = [layer(*shape, dtype) for shape in shapes for dtype in WEIGHTS[:2]]
    bases: list[Tensor | None] = [
        None if i % 2 else w.clone() for i, (w, _, _) in enumerate(layers)
    ]
    alphas = [0.5 - 0.25 * i for i in range(len(layers))]
    want = [
        rank_update(w, u, v, base=b, alpha=a, rounding=rounding, seed=5 + i)
        for i, ((w, u, v), b, a) in enumerate(zip(layers, bases, alphas, strict=True))
    ]
    weights = [w.fill_(float("nan")) if i % 2 == 0 else w for i, (w, _, _) in enumerate(layers)]
    rank_update_many_(
        weights, [u for _, u, _ in layers], [v for _, _, v in layers],
        bases=bases, alphas=alphas, rounding=rounding, seed=5,
    )  # fmt: skip
    for got, expected in zip(weights, want, strict=True):
        assert torch.equal(got, expected)
    rank_update_many_([], [], [])


def test_strides() -> None:
    w, u, v = layer(6, 8, 3)
    want = rank_update(w, u, v)
    turned = w.t().contiguous().t()
    assert rank_update(turned, u, v).is_contiguous()
    assert torch.equal(rank_update(turned, u.t().contiguous().t(), v), want)
    rank_update_(turned, u, v)
    assert torch.equal(turned, want)
    wide = torch.zeros(6, 20, dtype=torch.bfloat16)
    wide[:, 1:17:2] = w
    rank_update_(wide[:, 1:17:2], u, v)
    assert torch.equal(wide[:, 1:17:2], want)
    assert not wide[:, 0::2].any()


# Stochastic rounding.


def drawn(seed: int, count: int) -> np.ndarray:
    """The 16 bits of each element, by the scalar generator."""
    key = streams.stream_key(seed, "rank_update", "rounding")
    words = [
        streams.philox4x32_10((g, 0, 0, 0), (key & 0xFFFFFFFF, key >> 32))
        for g in range(-(-count // 8))
    ]
    halves = [word >> shift & 0xFFFF for four in words for word in four for shift in (0, 16)]
    return np.array(halves[:count], dtype=np.int64)


@pytest.mark.parametrize("dtype", WEIGHTS[:2])
def test_stream_of_the_module_docstring(dtype: torch.dtype) -> None:
    w, u, v = layer(5, 9, 1, dtype, dtype)
    w[0, :3] = torch.tensor([3e-7, -3e-7, 0.0]).to(dtype)
    u[0] = 1e-7
    got = rank_update(w, u, v, rounding="stochastic", seed=-4).double().numpy().reshape(-1)
    total = w.float() + u.float() * v.float().t()
    for i, (x, d) in enumerate(
        zip(total.reshape(-1).tolist(), drawn(-4, 45).tolist(), strict=True)
    ):
        bits = int(np.float32(x).view(np.int32))
        if dtype == torch.bfloat16:
            want = float(
                np.int64((bits & 0xFFFFFFFF) + d & 0xFFFF0000).astype(np.uint32).view("f4")
            )
        elif abs(x) >= 2.0**-14:
            moved = ((bits & 0xFFFFFFFF) + (d >> 3)) & 0xFFFFE000
            want = float(np.uint32(moved).view("f4"))
        else:
            q, f = divmod(abs(x) * 2.0**24, 1.0)
            want = float(np.copysign(2.0**-24 * (q + (2.0**16 * f >= d + 1)), x))
        assert got[i] == want


@pytest.mark.parametrize("dtype", WEIGHTS[:2])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 3e-7, 1e-41])
def test_stochastic_rounding_is_unbiased(scale: float, dtype: torch.dtype) -> None:
    """The mean over draws is the sum: both neighbours appear, as often as they should."""
    draws, seeds = 500, 8
    total = scale * torch.randn(40, generator=torch.Generator().manual_seed(1))
    zero = torch.zeros(draws, 40, dtype=dtype)
    u, v = torch.ones(draws, 1), total.view(40, 1)
    sums = total.double()
    outs = torch.cat(
        [rank_update(zero, u, v, rounding="stochastic", seed=seed) for seed in range(seeds)]
    ).double()
    low, high = outs.min(0).values, outs.max(0).values
    spacing = torch.from_numpy(oracle.spacing(sums.numpy(), dtype))
    assert ((high - low) <= spacing).all()
    # A draw is a coin: its variance is p (1 - p) of a spacing squared; 2^-16 is the resolution.
    p = ((sums - low) / spacing).clamp(0, 1)
    sigma = spacing * (p * (1 - p) / (draws * seeds)).sqrt()
    assert ((outs.mean(0) - sums).abs() <= 5.0 * sigma + spacing * 2.0**-15).all()


def test_stochastic_seed_and_values() -> None:
    w, u, v = layer(30, 40, 5)
    first = rank_update(w, u, v, rounding="stochastic", seed=1)
    assert torch.equal(first, rank_update(w, u, v, rounding="stochastic", seed=1))
    assert not torch.equal(first, rank_update(w, u, v, rounding="stochastic", seed=2))
    # a sum that bfloat16 holds stays, whatever is drawn
    whole = rank_update(w, u, v)
    assert torch.equal(
        rank_update(whole, u[:, :1] * 0, v[:, :1], rounding="stochastic", seed=1), whole
    )
    check_one_rounding(first, w, u, v, 1.0, spacings=1.0)


@pytest.mark.parametrize("dtype", WEIGHTS[:2])
def test_stochastic_leaves_infinities_and_nan(dtype: torch.dtype) -> None:
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e-45, -1e-45])
    for key in range(50):
        got = _round_at_random(values.view(1, -1), dtype, key, 0).to(dtype)[0]
        assert got[:2].tolist() == [float("inf"), -float("inf")]
        assert bool(got[2].isnan())
        assert got[3:].abs().max() <= torch.finfo(dtype).smallest_normal
        assert torch.equal(got.signbit()[3:], values.signbit()[3:])


# Gradients, compile, torch's own checks.


def test_gradients() -> None:
    w, u, v = (t.double().requires_grad_() for t in layer(4, 5, 3))
    base = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: rank_update(*a, alpha=0.7), (w, u, v))
    assert torch.autograd.gradgradcheck(lambda *a: rank_update(*a, alpha=0.7), (w, u, v))
    assert torch.autograd.gradcheck(lambda b, u, v: rank_update(w, u, v, base=b), (base, u, v))
    rank_update(w, u, v, base=base).sum().backward()
    assert w.grad is None
    assert torch.equal(base.grad, torch.ones_like(base))
    batch = [t.detach().expand(2, *t.shape).clone().requires_grad_() for t in (w, u, v)]
    assert torch.autograd.gradcheck(rank_update, batch)


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32])
def test_gradients_in_half_precision(factors: torch.dtype) -> None:
    w, u, v = (t.requires_grad_() for t in layer(30, 40, 5, torch.bfloat16, factors))
    up = torch.randn(30, 40).bfloat16()
    out = rank_update(w, u, v, alpha=0.5, rounding="stochastic")
    (out * up + out * up).sum().backward()
    g = 2 * up.double()
    assert torch.equal(w.grad, (2 * up))
    for grad, want in ((u.grad, 0.5 * g @ v.double()), (v.grad, 0.5 * g.t() @ u.double())):
        assert grad.dtype == factors
        eps = 2.0**-7 if factors == torch.bfloat16 else 2.0**-20
        assert (grad.double() - want).abs().max() <= eps * want.abs().max()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_opcheck(rounding: str) -> None:
    w, u, v = layer(5, 7, 3)
    for grad in (False, True):
        arguments = [t.clone().requires_grad_(grad) for t in (w, u, v)]
        op = torch.ops.cl_fast.rank_update
        torch.library.opcheck(op, (*arguments, None, 0.5, rounding, 3))
        base = w.clone().requires_grad_(grad)
        torch.library.opcheck(op, (*arguments, base, 0.5, rounding, 3))
    in_place = torch.ops.cl_fast.rank_update_
    torch.library.opcheck(in_place, (w.clone(), u, v, None, 0.5, rounding, 3))
    torch.library.opcheck(in_place, (w.t().clone().t(), u, v, w.clone(), 0.5, rounding, 3))
    many = torch.ops.cl_fast.rank_update_many_
    weights, bases = [w.clone(), w.clone()], [None, w.clone()]
    torch.library.opcheck(many, (weights, [u, u], [v, v], bases, [0.5, 1.0], rounding, 3))


def test_opcheck_gram() -> None:
    k, mask = torch.randn(2, 10, 4), torch.rand(2, 10) < 0.5
    for grad in (False, True):
        keys = k.clone().requires_grad_(grad)
        for dtype in (torch.float64, torch.float32):
            torch.library.opcheck(torch.ops.cl_fast.gram, (keys, mask, dtype))
            torch.library.opcheck(torch.ops.cl_fast.gram, (keys, None, dtype))
    cs = [torch.zeros(2, 4, 4, dtype=torch.float64), torch.zeros(4, 4)]
    torch.library.opcheck(torch.ops.cl_fast.gram_, (cs, [k, k[0]], [mask, None], 0.5, False))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool) -> None:
    def step(w: Tensor, u: Tensor, v: Tensor, k: Tensor, c: Tensor, seed: int) -> list[Tensor]:
        new = rank_update(w, u, v, base=w, alpha=0.5, rounding="stochastic", seed=seed)
        w0 = w.clone()
        rank_update_(w, u, v, alpha=2.0)
        rank_update_many_([w], [u], [v], bases=[w0])
        gram_(c, k, alpha=0.5)
        return [new, w, c, gram(k, mask=k[:, 0] > 0), *gram([k], mask=[None])]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seed in (1, 2):
        w, u, v = layer(6, 8, 3)
        k = torch.randn(20, 8)
        wants = step(w.clone(), u, v, k, torch.zeros(8, 8), seed)
        gots = compiled(w, u, v, k, torch.zeros(8, 8), seed)
        assert torch.equal(w, wants[1])
        for got, want in zip(gots, wants, strict=True):
            assert torch.equal(got, want)


def test_compile_with_gradient() -> None:
    def loss(w: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return (rank_update(w, u, v, alpha=0.5) ** 2).sum()

    one = [t.float().requires_grad_() for t in layer(6, 8, 3)]
    two = [t.detach().clone().requires_grad_() for t in one]
    loss(*one).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*two).backward()
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_autocast_changes_nothing() -> None:
    w, u, v = layer(20, 30, 16, torch.float32)
    k = torch.randn(100, 20)
    want, moments = rank_update(w, u, v), gram(k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rank_update(w, u, v), want)
        assert torch.equal(gram(k), moments)


# gram.


def check_moments(c: Tensor, k: Tensor, mask: Tensor | None, block: int = 2048) -> None:
    keys = k.double() if mask is None else k.double()[mask]
    want, size = keys.t() @ keys, keys.t().abs() @ keys.abs()
    assert torch.equal(c, c.t())
    eps = 2.0**-24 * min(block, len(k) + 1)
    if c.dtype == torch.float32:
        eps += 2.0**-24 * (2 + len(k) // 64)
    assert ((c.double() - want).abs() <= eps * size + 1e-300).all()


@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("out", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "d"), [(0, 3), (1, 1), (3, 5), (100, 7), (2100, 70), (500, 200)]
)
def test_gram(tokens: int, d: int, out: torch.dtype, dtype: torch.dtype) -> None:
    k = torch.randn(tokens, d).to(dtype)
    c = gram(k, dtype=out)
    assert c.dtype == out
    check_moments(c, k, None)
    mask = torch.rand(tokens) < 0.6
    k[~mask] = float("nan")
    check_moments(gram(k, mask=mask, dtype=out), k, mask)


def test_gram_of_float64() -> None:
    k = torch.randn(50, 6, dtype=torch.float64)
    want = k.numpy().T @ k.numpy()
    np.testing.assert_allclose(gram(k).numpy(), want, rtol=1e-14, atol=1e-14)


def test_gram_in_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    k = torch.randn(300, 200).bfloat16()
    monkeypatch.setattr("cl_fast.ops.low_rank._BLOCK", 1)
    monkeypatch.setattr("cl_fast.ops.low_rank._FACTOR_BLOCK", 1)
    check_moments(gram(k), k, None)


def test_gram_of_100_000_tokens_is_as_exact_as_one_block() -> None:
    """The promise of the float64 master: no growth with the number of tokens.

    Keys with a spectrum over eight decades: what a running float32 sum would lose.
    """
    g = torch.Generator().manual_seed(0)
    mix = torch.linalg.qr(torch.randn(16, 16, generator=g))[0] * torch.logspace(0, -4, 16)
    k = torch.randn(100_000, 16, generator=g) @ mix.t()
    want = k.double().t() @ k.double()
    size = k.double().abs().t() @ k.double().abs()
    ours = ((gram(k) - want).abs() / size).max()
    assert ours <= 2.0**-24 * 16  # a pairwise sum of a block, not 100 000 roundings
    running = torch.zeros(16, 16)
    for row in k.split(10):
        running += row.t() @ row
    assert ours < 0.1 * ((running.double() - want).abs() / size).max()


def test_gram_adds_up_and_takes_away() -> None:
    k = torch.randn(1000, 12)
    c = torch.zeros(12, 12, dtype=torch.float64)
    assert gram_(c, k[:300]) is c
    gram_(c, k[300:])
    torch.testing.assert_close(c, gram(k), rtol=1e-6, atol=1e-4)
    gram_(c, k[300:], alpha=-1.0)
    torch.testing.assert_close(c, gram(k[:300]), rtol=0.0, atol=1e-10)
    c.copy_(torch.eye(12))
    gram_(c, k, alpha=0.5)
    torch.testing.assert_close(c, torch.eye(12) + 0.5 * gram(k), rtol=1e-12, atol=1e-12)


def test_gram_of_many_layers() -> None:
    k = torch.randn(3, 50, 6).bfloat16()
    mask = torch.rand(3, 50) < 0.5
    got = gram(k, mask=mask)
    one = gram(k, mask=mask[0])
    for i in range(3):
        assert torch.equal(got[i], gram(k[i], mask=mask[i]))
        assert torch.equal(one[i], gram(k[i], mask=mask[0]))
    ragged = [torch.randn(20, 4), torch.randn(2, 30, 5).half(), torch.randn(7, 4).double()]
    outs = gram(ragged, mask=[None, torch.rand(30) < 0.5, None])
    assert [tuple(c.shape) for c in outs] == [(4, 4), (2, 5, 5), (4, 4)]
    assert torch.equal(outs[0], gram(ragged[0]))
    assert gram([]) == []
    cs = [torch.zeros(4, 4).t(), torch.zeros(5, 5, dtype=torch.float64)]
    gram_(cs, [ragged[0], ragged[1][0]], alpha=2.0)
    torch.testing.assert_close(cs[0].double(), 2 * gram(ragged[0]), rtol=1e-6, atol=1e-6)


def test_gram_gradient() -> None:
    k = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 7) < 0.5
    assert torch.autograd.gradcheck(gram, (k,))
    assert torch.autograd.gradcheck(lambda k: gram(k, mask=mask), (k,))
    assert torch.autograd.gradgradcheck(lambda k: gram(k, mask=mask[0]), (k,))


# What must hold for any input.


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 12), n=st.integers(1, 12), r=st.integers(0, 20),
    weight=st.sampled_from(WEIGHTS), factors=st.sampled_from(WEIGHTS),
    alpha=st.floats(-4, 4), seed=st.integers(0, 99),
)  # fmt: skip
def test_properties_of_rank_update(
    m: int, n: int, r: int, weight: torch.dtype, factors: torch.dtype, alpha: float, seed: int
) -> None:
    w, u, v = layer(m, n, r, weight, factors, seed)
    got = rank_update(w, u, v, alpha=alpha)
    check_one_rounding(got, w, u, v, alpha)
    # the transposed weight takes the factors in the other order
    check_one_rounding(rank_update(w.t(), v, u, alpha=alpha), w.t(), v, u, alpha)
    # signs move together
    assert torch.equal(rank_update(-w, -u, v, alpha=alpha), -got)
    # powers of two scale exactly
    if weight != torch.float16 and factors != torch.float16:
        assert torch.equal(rank_update(4 * w, 4 * u, v, alpha=alpha), 4 * got)
    # the order of the factors does not matter to more than their rounding
    order = torch.randperm(r, generator=torch.Generator().manual_seed(seed))
    check_one_rounding(rank_update(w, u[:, order], v[:, order], alpha=alpha), w, u, v, alpha)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 80), d=st.integers(1, 9), seed=st.integers(0, 99),
    dtype=st.sampled_from(WEIGHTS),
)  # fmt: skip
def test_properties_of_gram(tokens: int, d: int, seed: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    k = torch.randn(tokens, d, generator=g).to(dtype)
    mask = torch.rand(tokens, generator=g) < 0.5
    check_moments(gram(k), k, None)
    # a mask is the choice of rows; its two halves add up to the whole
    torch.testing.assert_close(gram(k, mask=mask), gram(k[mask]), rtol=1e-5, atol=1e-5)
    both = gram_(gram(k, mask=mask), k, mask=~mask)
    torch.testing.assert_close(both, gram(k), rtol=1e-5, atol=1e-5)
    assert (torch.linalg.eigvalsh(gram(k)) >= -1e-4).all()


# Bad input.

W, U, V = torch.zeros(4, 6), torch.zeros(4, 2), torch.zeros(6, 2)
ONE = torch.zeros(40)


def call(**given: Any) -> dict[str, Any]:
    return {"weight": W, "u": U, "v": V} | given


UPDATES = [
    (call(weight=[1.0]), TypeError, "weight must be a torch.Tensor, got list"),
    (call(u=None), TypeError, "u must be a torch.Tensor, got NoneType"),
    (call(base=1), TypeError, "base must be a torch.Tensor, got int"),
    (call(weight=W.long()), TypeError, "weight must have one of the dtypes bfloat16, float16"),
    (call(u=U.to(torch.int32)), TypeError, "u must have one of the dtypes bfloat16"),
    (call(u=U.half()), TypeError, "v must have the dtype of u, torch.float16; got torch.float32"),
    (call(weight=W.double()), TypeError, "float64 is for all or none: weight is torch.float64, u"),
    (call(base=W.double()), TypeError, "float64 is for all or none: weight is torch.float32, base"),
    (call(weight=W.to_sparse()), TypeError, "weight must be a dense tensor; got the layout"),
    (call(weight=W[0]), ValueError, "weight must have the shape [..., m, n]; got (6,)"),
    (call(u=U[:3]), ValueError, "u must have the shape [..., m, r] for weight of shape (4, 6)"),
    (call(u=U[None]), ValueError, "u must have the shape [..., m, r]"),
    (call(v=U), ValueError, "v must have the shape [..., n, r] for weight of shape (4, 6)"),
    (call(v=V[:, :1]), ValueError, "v must have the rank of u, 2; got 1"),
    (
        call(u=torch.zeros(4, 4097), v=torch.zeros(6, 4097)),
        ValueError,
        "u must have a rank of at most 4096; got 4097",
    ),
    (call(base=W.t()), ValueError, "base must have the shape of weight, (4, 6); got (6, 4)"),
    (call(v=V.to("meta")), ValueError, "v must be on the device of weight, cpu; got meta"),
    (call(base=W.to("meta")), ValueError, "base must be on the device of weight, cpu; got meta"),
    (call(alpha=float("nan")), ValueError, "alpha must be a finite number; got nan"),
    (call(alpha=1e39), ValueError, "alpha must be a finite number; got 1e+39"),
    (call(alpha="1"), TypeError, "alpha must be a number, got str"),
    (call(rounding="up"), ValueError, "rounding must be one of 'nearest', 'stochastic'; got 'up'"),
    (call(rounding="stochastic"), ValueError, "needs a weight of bfloat16 or float16; got"),
    (call(seed=1.5), TypeError, "seed must be an int, got float"),
    (call(seed=1 << 63), ValueError, "seed must fit into 64 bits"),
    (call(backend="cuda"), ValueError, "backend must be one of 'eager', 'triton' or None"),
    (call(backend="triton"), ValueError, "backend='triton' needs tensors on cuda; got cpu"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), UPDATES)
def test_bad_updates(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    weight, u, v = arguments["weight"], arguments["u"], arguments["v"]
    rest = {k: a for k, a in arguments.items() if k not in ("weight", "u", "v")}
    chosen = [rest] if "backend" in rest else [rest, rest | {"backend": "eager"}]
    for options in chosen:
        for op in (rank_update, rank_update_):
            with pytest.raises(error, match=re.escape(words)):
                op(weight, u, v, **options)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"weights": W}, TypeError, "weights must be a list of tensors, got Tensor"),
        ({"us": [U]}, ValueError, "us must have one item for each of the 2 weights; got 1"),
        ({"bases": [None]}, ValueError, "bases must have one item for each of the 2 weights"),
        ({"alphas": [1.0]}, ValueError, "alphas must have one item for each of the 2 weights"),
        ({"alphas": [1.0, float("inf")]}, ValueError, "alphas[1] must be a finite number; got inf"),
        ({"alphas": "1"}, TypeError, "alphas must be a number, got str"),
        ({"vs": [V, U]}, ValueError, "vs[1] must have the shape [..., n, r] for weights[1]"),
        ({"us": [U, 3]}, TypeError, "us[1] must be a torch.Tensor, got int"),
        ({"bases": [None, W[:1]]}, ValueError, "bases[1] must have the shape of weights[1]"),
        ({"rounding": "down"}, ValueError, "rounding must be one of 'nearest', 'stochastic'"),
        ({"rounding": "stochastic"}, ValueError, "needs a weights[0] of bfloat16 or float16"),
    ],
)
def test_bad_lists(given: dict[str, Any], error: type[Exception], words: str) -> None:
    weights = given.pop("weights", [torch.ones(4, 6), torch.ones(4, 6)])
    lists = [given.pop(name, default) for name, default in (("us", [U, U]), ("vs", [V, V]))]
    for backend in (None, "eager"):
        with pytest.raises(error, match=re.escape(words)):
            rank_update_many_(weights, *lists, backend=backend, **given)
    if weights is not W:
        assert all(bool((weight == 1).all()) for weight in weights)  # nothing was written


def test_overlaps() -> None:
    room = torch.zeros(100)
    w, u, v = room[:24].view(4, 6), room[20:28].view(4, 2), room[40:52].view(6, 2)
    with pytest.raises(ValueError, match="weight overlaps u in memory"):
        rank_update_(w, u, V)
    with pytest.raises(ValueError, match="weight overlaps base in memory"):
        rank_update_(w, U, v, base=room[6:30].view(4, 6))
    with pytest.raises(ValueError, match=r"weights\[[01]\] overlaps weights\[[01]\] in memory"):
        rank_update_many_([w, room[23:47].view(4, 6)], [U, U], [V, V])
    with pytest.raises(ValueError, match=r"weights\[1\] overlaps bases\[0\] in memory"):
        rank_update_many_([W.clone(), w], [U, U], [V, V], bases=[w, None])
    with pytest.raises(ValueError, match="weight has elements that share memory; copy it first"):
        rank_update_(torch.zeros(1, 6).expand(4, 6), U, V)
    with pytest.raises(ValueError, match="c overlaps k in memory"):
        gram_(room[:4].view(2, 2), room[3:9].view(3, 2))
    with pytest.raises(ValueError, match="c has elements that share memory"):
        gram_(torch.zeros(1, 2).expand(2, 2), room[:6].view(3, 2))
    assert not room.any()
    # the base may be the weight; factors may share; columns of one matrix are apart
    rank_update_(w, U, V, base=w)
    rank_update_(w, U, V, base=room[:24].view(4, 6))
    rank_update_(torch.zeros(4, 4), U, U)
    fused = torch.randn(4, 18)
    want = [rank_update(fused[:, i : i + 6], U + 1, V + i) for i in (0, 6, 12)]
    rank_update_many_(
        [fused[:, i : i + 6] for i in (0, 6, 12)], [U + 1] * 3, [V + i for i in (0, 6, 12)]
    )
    assert torch.equal(fused, torch.cat(want, 1))
    with pytest.raises(ValueError, match="overlaps"):
        rank_update_many_([fused[:, :7], fused[:, 6:12]], [U, U], [torch.zeros(7, 2), V])


def test_in_place_and_gradients() -> None:
    w, u, v = W.clone(), U.clone().requires_grad_(), V
    for call_it, words in (
        (lambda: rank_update_(w, u, v), "u requires a gradient, and rank_update_ has none"),
        (lambda: rank_update_many_([w], [u], [v]), r"us\[0\] requires a gradient"),
        (lambda: gram_(torch.zeros(2, 2), u), "k requires a gradient, and gram_ has none"),
        (lambda: gram([u]), r"k\[0\] requires a gradient"),
    ):
        with pytest.raises(ValueError, match=words):
            call_it()
        with torch.no_grad():
            call_it()
    parameter = torch.nn.Parameter(W.clone())
    with torch.no_grad():
        rank_update_(parameter, U + 1, V + 1)
    assert bool((parameter == 2).all())


K = torch.zeros(5, 3)


@pytest.mark.parametrize(
    ("k", "given", "error", "words"),
    [
        (1, {}, TypeError, "k must be a torch.Tensor or a list of them, got int"),
        (K.long(), {}, TypeError, "k must have one of the dtypes"),
        (K[0], {}, ValueError, "k must have the shape [tokens, d] or [layers, tokens, d]"),
        (K, {"mask": torch.zeros(5)}, TypeError, "mask must have one of the dtypes bool"),
        (K, {"mask": torch.zeros(4) > 0}, ValueError, "mask must have the shape (5,) of the token"),
        (K, {"mask": [None]}, TypeError, "mask must be a torch.Tensor, got list"),
        (K, {"dtype": torch.float16}, TypeError, "dtype must be float64 or float32; got torch.flo"),
        (K.double(), {"dtype": torch.float32}, TypeError, "dtype must be float64 for float64 k"),
        ([K, K[0]], {}, ValueError, "k[1] must have the shape [tokens, d]"),
        ([K], {"mask": [None, None]}, ValueError, "must have one item for each of the 1 layers"),
        ([K, K], {"mask": 3}, TypeError, "mask must be a torch.Tensor or a list, got int"),
        (K, {"c": torch.zeros(3, 3).half()}, TypeError, "c must have one of the dtypes float64"),
        (K, {"c": torch.zeros(3, 4)}, ValueError, "c must have the shape (3, 3) for k of shape"),
        (K, {"c": [torch.zeros(3, 3)]}, TypeError, "c must be a torch.Tensor like k"),
        (K, {"c": torch.zeros(3, 3, device="meta")}, ValueError, "c must be on the device of k"),
        (K.double(), {"c": torch.zeros(3, 3)}, TypeError, "c must be float64 for float64 k"),
        ([K, K], {"c": [torch.zeros(3, 3)]}, ValueError, "c must have one item for each of the 2"),
        ([K], {"c": torch.zeros(3, 3)}, TypeError, "c must be a list like k"),
        (K, {"c": torch.zeros(3, 3), "alpha": float("nan")}, ValueError, "alpha must be a finite"),
        (K, {"c": torch.zeros(3, 3), "alpha": None}, TypeError, "alpha must be a number, got None"),
    ],
)
def test_bad_moments(k: Any, given: dict[str, Any], error: type[Exception], words: str) -> None:
    rest = {name: value for name, value in given.items() if name != "c"}
    for backend in (None, "eager"):

        def call_it(backend: str | None = backend) -> Any:
            if "c" in given:
                return gram_(given["c"], k, backend=backend, **rest)
            return gram(k, backend=backend, **rest)

        with pytest.raises(error, match=re.escape(words)):
            call_it()


def test_compile_says_the_same_words() -> None:
    def bad(w: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return rank_update(w, u, v)

    with pytest.raises(Exception, match=r"v must have the rank of u, 2; got 1"):
        torch.compile(bad, fullgraph=True, backend="aot_eager")(W, U, V[:, :1])


def test_large_alpha() -> None:
    w, u, v = layer(3, 4, 2, torch.float32)
    check_one_rounding(rank_update(w, u, v, alpha=1e20), w, u, v, 1e20)
    assert bool(rank_update(w, u, 100 * v, alpha=_LARGEST).isinf().any())
