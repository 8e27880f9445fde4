"""The O-LoRA penalty and the projection: formulas, gradients, bad input, what torch asks of ops."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl_fast.ops import orthogonal_penalty, orthogonal_project, orthogonal_project_

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
UNIT = {
    torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}  # fmt: skip
FORMS = ("l1", "squared")
KINDS = ("normal", "heavy", "cancel", "tiny", "ties")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return torch.randn(shape, generator=g).to(dtype)


def nasty(kind: str, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    x = randn(*shape, seed=seed)
    if kind == "heavy":
        x = (x / (1e-2 + randn(*shape, seed=seed + 1).abs())).clamp(-1e3, 1e3)
    elif kind == "cancel":
        x = x * (1.0 + 1e-3 * randn(1, shape[1], seed=7))
        x[:, 1::2] = x[:, : shape[1] - shape[1] % 2 : 2] * -1.0
    elif kind == "tiny":
        x = x * 1e-3
    elif kind == "ties":
        x = x.sign()
    return x.to(dtype)


def modules(
    kind: str, dtype: torch.dtype, past_dtype: torch.dtype | None = None
) -> tuple[list[Tensor], list[Any]]:
    """Equal and ragged modules; one, many and no past."""
    past_dtype = past_dtype or dtype
    new = [
        nasty(kind, r, d, seed=m, dtype=dtype)
        for m, (r, d) in enumerate([(8, 64), (3, 33), (1, 7), (8, 64), (2, 16)])
    ]
    past = [
        nasty(kind, 24, 64, seed=10, dtype=past_dtype),
        [nasty(kind, r, 33, seed=20 + r, dtype=past_dtype) for r in (8, 1, 5)],
        [nasty(kind, 2, 7, seed=40, dtype=past_dtype)],
        None,
        nasty(kind, 0, 16, dtype=past_dtype),
    ]
    return new, past


def parts(entry: Any) -> list[Tensor]:
    return [] if entry is None else [entry] if isinstance(entry, Tensor) else list(entry)


def told(new: Tensor, past: Any, form: str) -> tuple[float, Tensor, float, Tensor]:
    """Value and gradient in float64, and the sizes by which their errors are measured."""
    a = new.detach().double()
    value, value_room = 0.0, 0.0
    grad, grad_room = torch.zeros_like(a), torch.zeros_like(a)
    for part in parts(past):
        for p in part.double():
            for i in range(a.shape[0]):
                s, size = float((a[i] * p).sum()), float((a[i] * p).abs().sum())
                if form == "l1":
                    value += abs(s)
                    value_room += size
                    grad[i] += (0.0 if s == 0 else 1.0 if s > 0 else -1.0) * p
                    grad_room[i] += p.abs()
                else:
                    value += s * s
                    value_room += 2 * size * abs(s) + size * size * 2.0**-20
                    grad[i] += 2 * s * p
                    grad_room[i] += 2 * size * p.abs()
    return value, grad, value_room, grad_room


def penalty(new: Any, past: Any, **options: Any) -> Tensor:
    return orthogonal_penalty(new, past, **options)


# --- the formula ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_penalty_and_gradient(dtype: torch.dtype, kind: str, form: str) -> None:
    new, past = modules(kind, dtype)
    for a in new:
        a.requires_grad_()
    upstream = torch.tensor([1.0, -0.5, 3.0, 0.7, 2.0])
    values = penalty(new, past, form=form, reduction="none")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert values.dtype == wide
    assert values.shape == (5,)
    (values * upstream.to(wide)).sum().backward()
    for m, a in enumerate(new):
        value, grad, value_room, grad_room = told(a, past[m], form)
        count = sum(p.shape[0] for p in parts(past[m]))
        # Every product and every sum may round once, relative to the sizes added up.
        roundings = (a.shape[1] + a.shape[0] * count + 4) * UNIT[wide]
        assert abs(values[m].item() - value) <= roundings * value_room
        assert a.grad is not None
        assert a.grad.dtype == dtype
        g = upstream[m].to(wide).double()
        error = (a.grad.double() - g * grad).abs()
        if form == "l1" and kind == "cancel":
            # A product that is nothing but rounding may have either sign.
            wide_s = a.detach().double() @ torch.cat([*parts(past[m]), a[:0]]).double().t()
            if bool((wide_s.abs() <= roundings * value_room).any()):
                continue
        # fp16 counts in steps of 2^-24 below its normal numbers.
        allowed = roundings * grad_room + 1.01 * UNIT[dtype] * grad.abs()
        allowed = g.abs() * allowed + 2.0**-25 * (dtype == torch.float16)
        beyond = (g * grad).abs() > torch.finfo(dtype).max
        assert torch.equal(a.grad.isinf(), beyond)
        assert (error <= allowed)[~beyond].all()


@pytest.mark.parametrize("form", FORMS)
def test_no_further_from_float64_than_autograd(form: str) -> None:
    """The same formula in plain torch and float32, with a factor of two for luck."""
    new = [randn(8, 512, seed=m).requires_grad_() for m in range(6)]
    past = [randn(40, 512, seed=10 + m) for m in range(6)]
    ours = torch.autograd.grad(penalty(new, past, form=form), new)
    plain_loss = torch.zeros(())
    for a, p in zip(new, past, strict=True):
        s = a @ p.t()
        plain_loss = plain_loss + (s.abs() if form == "l1" else s**2).sum()
    plain = torch.autograd.grad(plain_loss, new)
    worst_ours, worst_plain = 0.0, 0.0
    for a, p, x, y in zip(new, past, ours, plain, strict=True):
        _, want, _, _ = told(a, p, form)
        worst_ours = max(worst_ours, float((x.double() - want).abs().max()))
        worst_plain = max(worst_plain, float((y.double() - want).abs().max()))
    assert worst_ours <= 2.0 * worst_plain


def test_the_numbers_of_the_docs() -> None:
    a, p = torch.tensor([[1.0, 0.0]], requires_grad=True), torch.tensor([[3.0, 4.0]])
    for form, value, grad in (("l1", 3.0, [[3.0, 4.0]]), ("squared", 9.0, [[18.0, 24.0]])):
        a.grad = None
        out = penalty([a], [p], form=form)
        out.backward()
        assert out.shape == ()
        assert out.item() == value
        assert a.grad is not None
        assert a.grad.tolist() == grad


def test_zero_has_no_sign() -> None:
    new = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, 0.0]], requires_grad=True)
    past = torch.tensor([[2.0, 2.0, 5.0], [0.0, 0.0, 7.0], [-1.0, 0.0, 1.0]])
    penalty([new], [past]).backward()
    assert new.grad is not None
    assert new.grad.tolist() == [[1.0, 0.0, -1.0], [3.0, 2.0, 4.0]]
    zero = torch.zeros(3, 5, requires_grad=True)
    penalty([zero], [randn(4, 5)]).backward()
    assert zero.grad is not None
    assert not zero.grad.any()


def test_bfloat16_is_not_rounded_in_between() -> None:
    """S would lose its sign in bfloat16: 256 + 1 - 256 is 0 there."""
    new = torch.tensor([[16.0, 1.0, 16.0]], dtype=torch.bfloat16, requires_grad=True)
    past = torch.tensor([[16.0, 1.0, -16.0]], dtype=torch.bfloat16)
    value = penalty([new], [past])
    value.backward()
    assert value.item() == 1.0
    assert new.grad is not None
    assert torch.equal(new.grad, past)


@pytest.mark.parametrize("form", FORMS)
def test_mixed_dtypes(form: str) -> None:
    for dtype, past_dtype in itertools.product(DTYPES, DTYPES):
        new, past = modules("normal", dtype, past_dtype)
        for a in new:
            a.requires_grad_()
        value = penalty(new, past, form=form)
        double = torch.float64 in (dtype, past_dtype)
        assert value.dtype == (torch.float64 if double else torch.float32)
        want = sum(told(a, p, form)[0] for a, p in zip(new, past, strict=True))
        assert value.item() == pytest.approx(want, rel=1e-5)
        value.backward()
        assert all(a.grad is not None and a.grad.dtype == dtype for a in new)
    one_of_each = [randn(3, 8, seed=m, dtype=dtype).requires_grad_() for m, dtype in
                   enumerate(DTYPES)]  # fmt: skip
    penalty(one_of_each, [randn(2, 8)] * 4, form=form).backward()
    assert [a.grad.dtype for a in one_of_each if a.grad is not None] == list(DTYPES)


# --- how the modules are given ------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_one_past_or_its_parts(form: str) -> None:
    a, p = randn(4, 30).requires_grad_(), randn(12, 30, seed=1)
    whole = penalty([a], [p], form=form)
    (want,) = torch.autograd.grad(whole, a)
    for given_past in ([p[:5], p[5:]], list(p.split(1)), (p, None, p[:0])[:1], [p[:0], p]):
        value = penalty([a], [list(given_past)], form=form)
        (grad,) = torch.autograd.grad(value, a)
        torch.testing.assert_close(value, whole)
        torch.testing.assert_close(grad, want)


def test_no_past_costs_nothing_and_has_a_gradient_of_zero() -> None:
    new = [randn(4, 30).requires_grad_(), randn(2, 6).requires_grad_()]
    for past in ([None, None], [[], ()], [torch.zeros(0, 30), None]):
        value = penalty(new, past)
        grads = torch.autograd.grad(value, new)
        assert value == 0
        assert all(not g.any() and g.shape == a.shape for g, a in zip(grads, new, strict=True))


def test_empty_matrices() -> None:
    new = [torch.zeros(0, 8, requires_grad=True), torch.zeros(3, 0, requires_grad=True)]
    value = penalty(new, [torch.ones(2, 8), torch.zeros(2, 0)])
    value.backward()
    assert value == 0
    assert [a.grad.shape for a in new if a.grad is not None] == [(0, 8), (3, 0)]


def test_strides_do_not_matter() -> None:
    a, p = randn(5, 48), randn(20, 48, seed=1)
    want = penalty([a], [p])
    wide = torch.zeros(5, 100)
    wide[:, 1:97:2] = a
    for new in (wide[:, 1:97:2], a.t().contiguous().t()):
        for past in (p, p.t().contiguous().t(), torch.cat([p, p])[20:]):
            leaf = new.detach().requires_grad_()
            value = penalty([leaf], [past])
            torch.testing.assert_close(value, want)
            (grad,) = torch.autograd.grad(value, leaf)
            torch.testing.assert_close(grad, (a @ p.t()).sign() @ p)


@pytest.mark.parametrize("form", FORMS)
def test_order_of_modules(form: str) -> None:
    new, past = modules("normal", torch.float32)
    values = penalty(new, past, form=form, reduction="none")
    order = [3, 0, 4, 2, 1]
    moved = penalty([new[m] for m in order], [past[m] for m in order], form=form, reduction="none")
    assert torch.equal(moved, values[order])
    torch.testing.assert_close(penalty(new, past, form=form), values.sum())


def test_one_tensor_twice() -> None:
    a, p = randn(4, 20).requires_grad_(), randn(6, 20, seed=1)
    (once,) = torch.autograd.grad(penalty([a], [p], form="squared"), a)
    (twice,) = torch.autograd.grad(penalty([a, a], [p, p], form="squared"), a)
    torch.testing.assert_close(twice, 2 * once)
    value = penalty([a], [p], form="squared") + penalty([2.0 * a], [p], form="squared")
    (both,) = torch.autograd.grad(value, a)
    torch.testing.assert_close(both, 5 * once)


def test_only_what_needs_a_gradient_gets_one() -> None:
    new = [randn(4, 20, seed=m) for m in range(4)]
    past = [randn(6, 20, seed=10 + m) for m in range(4)]
    new[1].requires_grad_()
    new[3].requires_grad_()
    penalty(new, past).backward()
    assert [a.grad is not None for a in new] == [False, True, False, True]
    torch.testing.assert_close(new[3].grad, (new[3] @ past[3].t()).sign() @ past[3])
    assert not penalty([a.detach() for a in new], past).requires_grad


def test_accumulation_does_not_change_the_update() -> None:
    """A quarter of the penalty in each of four micro-batches is the penalty once."""
    past = [randn(16, 32, seed=10 + m) for m in range(5)]

    def grads(steps: int) -> list[Tensor]:
        new = [torch.nn.Parameter(randn(8, 32, seed=m)) for m in range(5)]
        for _ in range(steps):
            (penalty(new, past) / steps).backward()
        return [a.grad for a in new if a.grad is not None]

    for one, four in zip(grads(1), grads(4), strict=True):
        torch.testing.assert_close(four, one, rtol=4 * 2.0**-24, atol=0.0)


def test_a_gradient_may_be_changed_in_place() -> None:
    new = [torch.nn.Parameter(randn(4, 20, seed=m)) for m in range(3)]
    past = [randn(6, 20, seed=10 + m) for m in range(3)]
    penalty(new, past).backward()
    before = [a.grad.clone() for a in new if a.grad is not None]
    torch.nn.utils.clip_grad_norm_(new, 1e-3)
    penalty(new, past).backward()
    for a, g in zip(new, before, strict=True):
        assert a.grad is not None
        a.grad.mul_(2.0)
        assert not torch.equal(a.grad, g)
    torch.optim.AdamW(new).step()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 9), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(FORMS),
    st.integers(0, 1000),
)
def test_any_shapes(shapes: list[tuple[int, int, list[int]]], form: str, seed: int) -> None:
    """float64 against a loop over rows, whatever the modules look like."""
    new = [randn(r, d, seed=seed + m).double().requires_grad_() for m, (r, d, _) in
           enumerate(shapes)]  # fmt: skip
    past = [[randn(k, d, seed=seed + 50 + k).double() for k in ks] for _, d, ks in shapes]
    values = penalty(new, past, form=form, reduction="none")
    grads = torch.autograd.grad(values.sum(), new)
    for m, (a, g) in enumerate(zip(new, grads, strict=True)):
        value, grad, _, _ = told(a, past[m], form)
        assert values[m].item() == pytest.approx(value, rel=1e-12, abs=1e-12)
        torch.testing.assert_close(g, grad, rtol=1e-12, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.floats(-8.0, 8.0), st.integers(0, 1000))
def test_scales_as_it_should(factor: float, seed: int) -> None:
    """|factor| for l1, its square for the other form; a rotation of the inputs changes nothing."""
    a, p = randn(3, 12, seed=seed).double(), randn(7, 12, seed=seed + 1).double()
    rotation = torch.linalg.qr(randn(12, 12, seed=seed + 2).double()).Q
    for form, power in (("l1", 1), ("squared", 2)):
        want = penalty([a], [p], form=form).item()
        scaled = penalty([factor * a], [p], form=form).item()
        assert scaled == pytest.approx(abs(factor) ** power * want, rel=1e-10, abs=1e-12)
        turned = penalty([a @ rotation], [p @ rotation], form=form).item()
        assert turned == pytest.approx(want, rel=1e-10)


# --- what torch asks of an op -------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str) -> None:
    new = [randn(3, 5).double(), randn(2, 7, seed=1).double(), randn(2, 4).double()]
    past = [
        randn(4, 5, seed=2).double(),
        [randn(1, 7).double(), randn(2, 7, seed=3).double()],
        None,
    ]
    for a, p in zip(new, past, strict=True):
        for part in parts(p):
            # l1 has a corner at zero: the products are far from it.
            assert ((a @ part.t()).abs() > 1e-2).all()
    for a in new:
        a.requires_grad_()

    def f(*new: Tensor) -> Tensor:
        return penalty(list(new), past, form=form, reduction="none")

    assert torch.autograd.gradcheck(f, new)
    assert torch.autograd.gradgradcheck(f, new)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, form: str) -> None:
    new, past = modules("normal", dtype)
    flat = [part for entry in past for part in parts(entry)]
    counts = [len(parts(entry)) for entry in past]
    for a in new[:3]:
        a.requires_grad_()
    torch.library.opcheck(torch.ops.cl_fast.orthogonal_penalty, (new, flat, counts, form, None))
    _, s = torch.ops.cl_fast.orthogonal_penalty(new, flat, counts, form, None)
    needed = [True, False, True, True, True]
    new = [a.detach() for a in new]
    arguments = (torch.ones(5), s.detach(), new, flat, counts, needed, form, None)
    torch.library.opcheck(torch.ops.cl_fast.orthogonal_penalty_backward, arguments)


@pytest.mark.parametrize("rows", [False, True])
def test_opcheck_projection(rows: bool) -> None:
    a = [randn(4, 20).requires_grad_(), randn(3, 12).bfloat16()]
    q = [torch.linalg.qr(randn(20, 6)).Q, torch.linalg.qr(randn(12, 2)).Q]
    q = [x.t() for x in q] if rows else q
    torch.library.opcheck(torch.ops.cl_fast.orthogonal_project, (a, q, rows, 1, None))
    a = [x.detach() for x in a]
    torch.library.opcheck(torch.ops.cl_fast.orthogonal_project_, (a, q, rows, 2, None))


def test_compile_fullgraph() -> None:
    def step(a: Tensor, b: Tensor, p: Tensor, q: Tensor) -> Tensor:
        value = penalty([a * 1.0, b], [[p, p[:3]], None]) + penalty([b], [b.detach()])
        return value + (orthogonal_project(a, q) ** 2).sum()

    a, b = randn(4, 20).requires_grad_(), randn(3, 12).requires_grad_()
    p, q = randn(6, 20, seed=1), torch.linalg.qr(randn(20, 5)).Q
    want = step(a, b, p, q)
    want_grads = torch.autograd.grad(want, (a, b))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = compiled(a, b, p, q)
    torch.testing.assert_close(got, want)
    for x, y in zip(torch.autograd.grad(got, (a, b)), want_grads, strict=True):
        torch.testing.assert_close(x, y)


def test_compile_in_place() -> None:
    def step(a: Tensor, q: Tensor) -> Tensor:
        b = a * 2.0
        orthogonal_project_([b], [q])
        return b + 1.0

    a, q = randn(4, 20), torch.linalg.qr(randn(20, 5)).Q
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, q), step(a, q))


def test_autocast_changes_nothing() -> None:
    new, past = modules("normal", torch.float32)
    for a in new:
        a.requires_grad_()
    want = penalty(new, past)
    want_grads = torch.autograd.grad(want, new)
    q = torch.linalg.qr(randn(64, 5)).Q
    projected = orthogonal_project(new[0], q)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = penalty(new, past)
        grads = torch.autograd.grad(got, new)
        assert torch.equal(orthogonal_project(new[0], q), projected)
    assert torch.equal(got, want)
    for x, y in zip(grads, want_grads, strict=True):
        assert torch.equal(x, y)


def test_meta() -> None:
    new = [torch.empty(4, 20, device="meta"), torch.empty(2, 8, device="meta")]
    value = penalty(new, [torch.empty(6, 20, device="meta"), None], reduction="none")
    assert (value.shape, value.dtype, value.device.type) == ((2,), torch.float32, "meta")
    out = orthogonal_project(new, [torch.empty(20, 3, device="meta"), torch.empty(8, 2,
                                   device="meta")])  # fmt: skip
    assert [x.shape for x in out] == [(4, 20), (2, 8)]


# --- the projection -----------------------------------------------------------------------------


def basis(d: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linalg.qr(randn(d, k, seed=seed).double()).Q.to(dtype)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_projection(dtype: torch.dtype, passes: int) -> None:
    shapes = [(8, 64, 24), (3, 33, 33), (1, 7, 1), (8, 64, 0), (0, 5, 2)]
    a = [randn(r, d, seed=d, dtype=dtype) for r, d, _ in shapes]
    q = [basis(d, k, dtype=dtype) for _, d, k in shapes]
    before = [x.clone() for x in a]
    got = orthogonal_project(a, q, passes=passes)
    by_rows = orthogonal_project(a, [x.t().contiguous() for x in q], rows=True, passes=passes)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for x, y, z, b in zip(a, got, by_rows, q, strict=True):
        want, c = x.double(), b.double()
        for _ in range(passes):
            want = want - want @ c @ c.t()
        room = x.double().abs() + x.double().abs() @ c.abs() @ c.abs().t()
        allowed = 2 * passes * (2 * sum(b.shape) + 4) * UNIT[wide] * room
        allowed += 1.01 * UNIT[dtype] * want.abs() + 2.0**-25 * (dtype == torch.float16)
        assert y.dtype == dtype
        assert ((y.double() - want).abs() <= allowed).all()
        assert ((z.double() - want).abs() <= allowed).all()
    for x, y in zip(a, before, strict=True):
        assert torch.equal(x, y)


def test_projection_leaves_nothing_in_the_subspace() -> None:
    """Under 1e-6 of the result in float32, also where most of the input lies in the subspace."""
    q = basis(512, 64)
    a = randn(8, 512)
    inside = randn(8, 64, seed=1) @ q.t() + 1e-3 * a

    def left(x: Tensor) -> float:
        exact = torch.linalg.qr(q.double()).Q
        return float((x.double() @ exact).norm() / x.double().norm())

    assert left(orthogonal_project(a, q)) < 1e-6
    assert left(orthogonal_project(inside, q, passes=2)) < 1e-6
    assert left(orthogonal_project(inside, q)) > left(orthogonal_project(inside, q, passes=2))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 24), st.data())
def test_projection_is_one(r: int, d: int, data: st.DataObject) -> None:
    """Idempotent, orthogonal, shortening, linear, and self-adjoint."""
    k = data.draw(st.integers(0, d))
    seed = data.draw(st.integers(0, 1000))
    a, b = randn(r, d, seed=seed).double(), randn(r, d, seed=seed + 1).double()
    q = basis(d, k, seed=seed, dtype=torch.float64)
    once = orthogonal_project(a, q)
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(orthogonal_project(once, q), once, **close)
    torch.testing.assert_close(once @ q, torch.zeros(r, k).double(), **close)
    assert once.norm() <= a.norm() * (1 + 1e-12)
    combined = orthogonal_project(2.0 * a - 3.0 * b, q)
    torch.testing.assert_close(combined, 2.0 * once - 3.0 * orthogonal_project(b, q), **close)
    torch.testing.assert_close((once * b).sum(), (a * orthogonal_project(b, q)).sum(), **close)


def test_projection_of_both_sides() -> None:
    """OSF and the like: nothing of the update is left in U on the left, nor in V on the right."""
    w = randn(12, 20).double()
    u, v = basis(12, 4, dtype=torch.float64), basis(20, 6, dtype=torch.float64)
    out = orthogonal_project(orthogonal_project(w, v).t(), u).t()
    assert (u.t() @ out).abs().max() < 1e-14
    assert (out @ v).abs().max() < 1e-14


def test_projection_silences_the_penalty() -> None:
    past = [randn(16, 64, seed=m) for m in range(3)]
    q = [torch.linalg.qr(p.t()).Q for p in past]
    new = [randn(8, 64, seed=10 + m) for m in range(3)]
    before, after = penalty(new, past), penalty(orthogonal_project(new, q), past)
    assert after < 1e-5 * before


def test_projection_holds_under_adam() -> None:
    """Projected after each step, a parameter that starts outside of the subspace stays there."""
    q = basis(64, 16)
    weight = torch.nn.Parameter(orthogonal_project(randn(8, 64), q, passes=2))
    optimizer = torch.optim.AdamW([weight], lr=1e-2)
    start = weight.detach().clone()
    x, y = randn(32, 64, seed=1), randn(32, 8, seed=2)
    for _ in range(20):
        optimizer.zero_grad()
        ((x @ weight.t() - y) ** 2).mean().backward()
        optimizer.step()
        version = weight._version
        orthogonal_project_([weight], [q])
        assert weight._version > version
    moved = (weight.detach() - start).double()
    assert moved.norm() > 0.1
    assert (moved @ torch.linalg.qr(q.double()).Q).norm() / moved.norm() < 1e-6


def test_projection_in_place() -> None:
    around = randn(6, 80)
    outside = around[:, :10].clone()
    a = [around[:, 10:50], randn(4, 40).bfloat16(), randn(40, 5).t(), randn(3, 40)]
    q = [basis(40, 6, seed=m) for m in range(4)]
    want = orthogonal_project(a, q)
    assert orthogonal_project_(a, q) is None
    for x, y in zip(a, want, strict=True):
        assert torch.equal(x, y)
    assert torch.equal(around[:, :10], outside)


def test_projection_in_place_refuses_shared_memory() -> None:
    whole = randn(8, 60)
    q = [basis(20, 3), basis(20, 3)]
    before = whole.clone()
    same = r"a\[[01]\] must not overlap a\[[01]\] in memory"
    for a, words in (
        ([whole[:, :20], whole[:, 10:30]], same),
        ([whole[:5, :20], whole[4:, :20]], same),
        ([whole[:, :20], whole[:, :20]], same),
        ([whole[:, :20], whole[:, 40:].t().contiguous().t()], None),
        ([whole[:1, :20].expand(4, 20), whole[:, 40:]], r"a\[[01]\] must not overlap itself"),
        ([whole[:, 20:40], q[1].t()], r"a\[[01]\] must not overlap q\[[01]\] in memory"),
        ([whole[:, :20], whole[:, 20:40]], None),
        ([whole[:4, :20], whole[4:, :20]], None),
    ):
        if words is None:
            orthogonal_project_(a, q)
            before = whole.clone()
            continue
        for _ in range(2):
            with pytest.raises(ValueError, match=words):
                orthogonal_project_(a, q)
            a, q = a[::-1], q[::-1]
        assert torch.equal(whole, before)
    shared = [q[0], q[0]]
    sides = [whole[:, :20], whole[:, 20:40]]
    want = orthogonal_project(sides, shared)
    orthogonal_project_(sides, shared)
    for x, y in zip(sides, want, strict=True):
        assert torch.equal(x, y)
    assert torch.equal(whole[:, 40:], before[:, 40:])


def test_projection_in_place_refuses_what_autograd_computed() -> None:
    a = randn(4, 20).requires_grad_()
    with pytest.raises(ValueError, match=r"a\[0\] was computed by autograd"):
        orthogonal_project_(a * 2.0, basis(20, 3))
    with torch.no_grad():
        orthogonal_project_(a, basis(20, 3))


def test_gradient_of_the_projection() -> None:
    a = [randn(3, 9).double().requires_grad_(), randn(2, 5).double().requires_grad_()]
    q = [basis(9, 4, dtype=torch.float64), basis(5, 2, dtype=torch.float64)]

    def f(*a: Tensor) -> tuple[Tensor, ...]:
        return tuple(orthogonal_project(list(a), q))

    assert torch.autograd.gradcheck(f, a)
    assert torch.autograd.gradgradcheck(f, a)
    first, second = orthogonal_project(a, q)
    (first * 3.0).sum().backward()
    assert a[1].grad is None or not a[1].grad.any()
    assert second.requires_grad


def test_check_of_the_basis() -> None:
    for dtype in DTYPES:
        for d, k in ((64, 24), (2048, 16)):
            q = basis(d, k, dtype=torch.float64).to(dtype)
            orthogonal_project(randn(2, d, dtype=dtype), q, check=True)
            orthogonal_project(randn(2, d, dtype=dtype), q.t(), rows=True, check=True)
    orthogonal_project(randn(2, 8), torch.zeros(8, 0), check=True)
    bad = basis(64, 24)
    bad[:, 3] *= 1.01
    nan = basis(64, 24)
    nan[0, 0] = float("nan")
    for q in (bad, nan, randn(64, 24)):
        for project in (orthogonal_project, orthogonal_project_):
            a = [randn(2, 8), randn(2, 64)]
            before = a[1].clone()
            with pytest.raises(ValueError, match=r"q\[1\] must be orthonormal: an entry of its"):
                project(a, [basis(8, 2), q], check=True)
            assert torch.equal(a[1], before)


# --- bad input ----------------------------------------------------------------------------------

A, P = torch.ones(2, 3), torch.ones(4, 3)
META = torch.ones(4, 3, device="meta")
Case = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], type[Exception], str]

BAD: list[Case] = [
    (penalty, ([A], []), {}, ValueError, "past must have an entry for each of the 1 modules"),
    (penalty, ([A], [P, P]), {}, ValueError, "past must have an entry for each of the 1 modules"),
    (penalty, ([], []), {}, ValueError, "new must hold at least one matrix"),
    (penalty, ([A, A], [P, torch.ones(4, 5)]), {}, ValueError,
     "past of module 1 must have 3 columns like new[1]; got 5"),
    (penalty, ([A, A], [P, [P, torch.ones(4, 5)]]), {}, ValueError,
     "past of module 1 must have 3 columns like new[1]; got 5"),
    (penalty, ([A, torch.ones(3)], [P, P]), {}, ValueError,
     "new[1] must be a matrix; got the shape (3,)"),
    (penalty, ([A], [torch.ones(1, 4, 3)]), {}, ValueError,
     "past[0] must be a matrix; got the shape (1, 4, 3)"),
    (penalty, ([A], [P.long()]), {}, TypeError, "past[0] must have one of the dtypes bfloat16"),
    (penalty, ([A.bool()], [P]), {}, TypeError, "new[0] must have one of the dtypes bfloat16"),
    (penalty, ([A], [META]), {}, ValueError,
     "past[0] must be on the device of new[0], cpu; got meta"),
    (penalty, ([A, META], [P, P]), {}, ValueError,
     "new[1] must be on the device of new[0], cpu; got meta"),
    (penalty, (A, [P]), {}, TypeError, "new must be a list or tuple of matrices, got Tensor"),
    (penalty, ([A], P), {}, TypeError, "past must be a list or tuple of matrices, got Tensor"),
    (penalty, ([A, 1.0], [P, P]), {}, TypeError, "new[1] must be a torch.Tensor, got float"),
    (penalty, ([A], [3]), {}, TypeError, "past[0] must be a list or tuple of matrices, got int"),
    (penalty, ([A], [[P, "x"]]), {}, TypeError, "past[1] must be a torch.Tensor, got str"),
    (penalty, ([A], [P]), {"form": "l2"}, ValueError,
     "form must be one of 'l1', 'squared'; got 'l2'"),
    (penalty, ([A], [P]), {"reduction": "mean"}, ValueError,
     "reduction must be one of 'sum', 'none'; got 'mean'"),
    (penalty, ([A], [P]), {"backend": "cuda"}, ValueError, "backend must be one of"),
    (penalty, ([A.double()], [P.double()]), {"backend": "native"}, ValueError,
     "backend='native' cannot be used for matrices other than float32"),
    (orthogonal_project, (A, torch.ones(3, 1)), {"backend": "native"}, ValueError,
     "backend must be one of 'eager', 'triton' or None"),
    (penalty, ([A], [P]), {"backend": "triton"}, ValueError, "needs tensors on cuda; got cpu"),
    (orthogonal_project, ([A], []), {}, ValueError, "q must hold one basis for each of the 1 of a"),
    (orthogonal_project, ([], []), {}, ValueError, "a must hold at least one matrix"),
    (orthogonal_project, (A, [P]), {}, TypeError, "a and q must both be matrices, or both be"),
    (orthogonal_project, ([A, A], [torch.ones(3, 1), torch.ones(4, 3)]), {}, ValueError,
     "q[1] must have 3 rows, the columns of a[1]; got 4"),
    (orthogonal_project, (A, torch.ones(2, 4)), {"rows": True}, ValueError,
     "q[0] must have 3 columns, the columns of a[0]; got 4"),
    (orthogonal_project, (A, torch.ones(3, 4)), {}, ValueError,
     "q[0] holds 4 vectors of 3 numbers, which cannot be orthonormal"),
    (orthogonal_project, (A, torch.ones(3)), {}, ValueError, "q[0] must be a matrix"),
    (orthogonal_project, (A.int(), torch.ones(3, 1)), {}, TypeError,
     "a[0] must have one of the dtypes"),
    (orthogonal_project, (A, torch.ones(3, 1, device="meta")), {}, ValueError,
     "q[0] must be on the device of a[0], cpu; got meta"),
    (orthogonal_project, (A, torch.ones(3, 1)), {"passes": 3}, ValueError,
     "passes must be 1 or 2; got 3"),
    (orthogonal_project, (A, torch.ones(3, 1)), {"backend": "cuda"}, ValueError,
     "backend must be one of"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "arguments", "options", "error", "words"), BAD)
def test_bad_input(
    function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any],
    error: type[Exception], words: str,
) -> None:  # fmt: skip
    functions = [function]
    if function is orthogonal_project:
        functions.append(orthogonal_project_)
    for chosen in functions:
        for backend in ({}, {"backend": "eager"}):
            with pytest.raises(error, match=re.escape(words)):
                chosen(*arguments, **{**backend, **options})


def test_the_past_is_a_constant() -> None:
    new, past = randn(2, 3).requires_grad_(), randn(4, 3).requires_grad_()
    words = r"past of module 1 requires grad; detach it"
    with pytest.raises(ValueError, match=words):
        penalty([new, new], [None, past])
    with pytest.raises(ValueError, match=words):
        penalty([new.detach(), new.detach()], [None, [past.detach(), past]])
    with torch.no_grad():
        penalty([new], [past])
    penalty([new], [past.detach()]).backward()
    with pytest.raises(ValueError, match=r"q\[0\] requires grad; detach it"):
        orthogonal_project(randn(2, 3), basis(3, 1).requires_grad_())


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda a, p: torch.ops.cl_fast.orthogonal_penalty([a], [p], [1], "l2", None)[0],
         "form must be one of 'l1', 'squared'; got 'l2'"),
        (lambda a, p: torch.ops.cl_fast.orthogonal_penalty([a], [p], [2], "l1", None)[0],
         "counts must add up to the 1 matrices of past"),
        (lambda a, p: orthogonal_penalty([a], [p.t()]),
         "past of module 0 must have 3 columns like new[0]; got 4"),
        (lambda a, p: orthogonal_project(a, p.t(), passes=1),
         "q[0] holds 4 vectors of 3 numbers, which cannot be orthonormal"),
    ],
)  # fmt: skip
def test_same_words_under_compile(bad: Callable[..., Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        bad(A, P)
    with pytest.raises(Exception, match=re.escape(words)):
        torch.compile(bad, fullgraph=True, backend="aot_eager")(A, P)


@pytest.mark.parametrize("form", ["l1", "squared"])
def test_the_core_is_as_near_to_float64_as_torch(form: str, backend: str) -> None:
    """Ragged modules, some without a past, some frozen; value and gradient."""
    g = torch.Generator().manual_seed(1)
    new = [torch.randn(r, d, generator=g) for r, d in ((8, 100), (4, 33), (8, 100), (1, 7))]
    past = [[torch.randn(k, a.size(1), generator=g) for k in ranks]
            for a, ranks in zip(new, ((8, 3), (), (5,), (2, 2, 2)), strict=True)]  # fmt: skip

    def run(dtype: torch.dtype, **more: str) -> list[torch.Tensor]:
        leaves = [a.to(dtype).requires_grad_(m != 2) for m, a in enumerate(new)]
        old = [[p.to(dtype) for p in ps] for ps in past]
        value = orthogonal_penalty(leaves, old, form=form, **more)  # type: ignore[call-overload]
        (3.0 * value).backward()
        assert leaves[2].grad is None
        return [value.detach(), *(leaves[m].grad for m in (0, 1, 3))]

    exact = run(torch.float64)
    got, plain = run(torch.float32, backend=backend), run(torch.float32, backend="eager")
    for x, y, z in zip(got, plain, exact, strict=True):
        error = (x.double() - z).abs().max()
        assert error <= 2.0 * (y.double() - z).abs().max() + 2.0**-22 * z.abs().max()
