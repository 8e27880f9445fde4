"""Registered ops of divergences, rows of logits and the head: float64, gradients, compile."""

from __future__ import annotations

import re
from typing import Any

import divergence_oracle as oracle
import pytest
import torch
from torch import Tensor

from cl_fast.ops import divergences, vocabulary_rows
from cl_fast.ops.divergences import divergence_rows, linear_divergence_rows
from cl_fast.ops.heads import Head, HeadGradients, chunks
from cl_fast.ops.vocabulary_rows import Extra, How

KINDS = oracle.KINDS
MIX = 0.3
LOW = (torch.bfloat16, torch.float16)
DTYPES = (*LOW, torch.float32)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed + sum(shape)), dtype=torch.float64).to(dtype)


def teacher_rows(m: int, v: int, probs: bool, seed: int = 9) -> Tensor:
    x = 2 * randn(m, v, seed=seed)
    return 0.7 * x.softmax(1) if probs else x


# --- rows of logits ----------------------------------------------------------------------------


def test_kinds_are_all_here() -> None:
    assert set(KINDS) == set(vocabulary_rows.KINDS)


@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_papers_in_float64(kind: str, probs: bool) -> None:
    x, t = 2 * randn(7, 13), teacher_rows(7, 13, probs)
    up = randn(7, seed=5)
    how, other = How(0.7, 5.0, 1.5), How(1.3, 0.0, 0.8, probs)
    ours = x.clone().requires_grad_()
    got = divergence_rows(ours, t, kind=kind, mix=MIX, how=how, teacher_how=other)
    got.backward(up)
    plain = x.clone().requires_grad_()
    lp = oracle.log_probs(plain, scale=0.7, softcap=5.0, temperature=1.5)
    lq = oracle.log_probs(t, scale=1.3, temperature=0.8, probs=probs)
    want = oracle.divergence(lp, lq, kind, MIX)
    want.backward(up)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("how", [How(), How(0.7, 5.0, 1.5)])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_rows(kind: str, how: How) -> None:
    t = teacher_rows(3, 5, probs=False)
    x = randn(3, 6, seed=1).requires_grad_()
    mixed = kind != "reverse_kl"  # a teacher that lacks a column makes it infinite

    def f(x: Tensor) -> Tensor:
        student = x if mixed else x[:, :5]
        return divergence_rows(
            student, t, kind=kind, mix=MIX, how=how, teacher_how=How(temperature=2.0)
        )

    assert torch.autograd.gradcheck(f, (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_linear_op(kind: str) -> None:
    """Softcap, scale, temperatures, cross-entropy, weights, trainable head; rows each their own."""
    hidden, weight, bias = randn(5, 3), randn(4, 3, seed=1), randn(4, seed=2)
    th, tw, tb = randn(5, 2, seed=3), randn(4, 2, seed=4), randn(4, seed=5)
    row_weight = torch.tensor([1.0, 0.0, -0.5, 2.5, 0.3], dtype=torch.float64)
    labels = torch.tensor([0, 1, 3, -1, 2])
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]

    def f(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_divergence_rows(
            x, w, b, th, tw, tb, row_weight=row_weight, labels=labels, ce_weight=0.4, kind=kind,
            mix=MIX, how=How(0.9, 4.0, 1.5), teacher_how=How(1.1, 6.0, 0.7), chunk_tokens=2,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(f, inputs)

    def total(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_divergence_rows(
            x, w, b, th, tw, tb, row_weight=row_weight, labels=labels, ce_weight=0.4, kind=kind,
            mix=MIX, how=How(0.9, 4.0, 1.5), teacher_how=How(1.1, 6.0, 0.7), chunk_tokens=2,
            uniform=True,
        )[0].sum()  # fmt: skip

    assert torch.autograd.gradcheck(total, inputs)


@pytest.mark.parametrize("trainable", [(0,), (1,), (2,), (0, 1), (1, 2)])
@pytest.mark.parametrize("uniform", [False, True])
def test_each_input_alone(trainable: tuple[int, ...], uniform: bool) -> None:
    """What is trained decides what is computed, and changes no gradient."""
    up = torch.full((6,), 1.7, dtype=torch.float64) if uniform else randn(6, seed=3)

    def gradients(which: tuple[int, ...]) -> list[Tensor | None]:
        inputs = [randn(6, 3), randn(7, 3), randn(7, seed=4)]
        for i in which:
            inputs[i].requires_grad_()
        x, w, b = inputs
        losses, _ = linear_divergence_rows(
            x, w, b, teacher_rows(6, 7, False), chunk_tokens=4, uniform=uniform
        )
        losses.backward(up)
        return [x.grad for x in inputs]

    whole = gradients((0, 1, 2))
    for i, got in enumerate(gradients(trainable)):
        want = whole[i] if i in trainable else None
        if want is None:
            assert got is None
        else:
            torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_shared_entries_of_the_gradient_kernel(kind: str, dtype: torch.dtype, backend: str) -> None:
    """In place or beside, with a cross-entropy or without; and rows that do not count."""
    x, t = (3 * randn(6, 11, seed=i).to(dtype) for i in (0, 1))
    how, other = How(0.7, 5.0, 1.5), How(temperature=0.8)
    rows = vocabulary_rows.kernels(backend, x)
    _, stats = rows.divergence_forward(x, t, kind, MIX, how, other)
    assert stats.shape == (6, 5)
    grad = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.7, 0.0])
    ids = torch.tensor([0, 10, 3, -1, 5, 2])
    plain = rows.normalisers(x, how._replace(temperature=1.0))
    extra = Extra(0.4 * grad, plain, ids)
    out = torch.full_like(x, float("nan"))
    rows.divergence_gradient(out, grad, x, t, stats, kind, MIX, how, other, extra)
    wide = x.double().requires_grad_()
    loss = oracle.divergence(
        oracle.log_probs(wide, scale=0.7, softcap=5.0, temperature=1.5),
        oracle.log_probs(t.double(), temperature=0.8),
        kind,
        MIX,
    )
    lp = oracle.log_probs(wide, scale=0.7, softcap=5.0)
    # A negative id picks nothing, and what is left is log sum exp.
    z = 5.0 * torch.tanh(0.7 * wide / 5.0)
    ce = torch.where(ids < 0, z.logsumexp(1), -lp.gather(1, ids.clamp(min=0)[:, None])[:, 0])
    (grad.double() * (loss + 0.4 * ce)).sum().backward()
    assert wide.grad is not None
    tolerance = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-21}[dtype]
    error = (out.double() - wide.grad).abs()
    assert (error <= tolerance * wide.grad.abs() + 2.0**-21).all()
    assert not out[[2, 5]].any()
    same = x.clone()
    rows.divergence_gradient(same, grad, same, t, stats, kind, MIX, how, other, extra)
    assert torch.equal(same, out)
    assert float(rows.divergence_sums(
        x, t, stats[:, :2], stats[:, 2:4], kind, MIX, how, other
    )[:, 1].sub(stats[:, 4]).abs().max()) <= 1e-5  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_parts_of_the_vocabulary(kind: str) -> None:
    """What ranks that split the vocabulary add up."""
    x, t = 3 * randn(4, 10), 3 * randn(4, 10, seed=1)
    loss, stats = vocabulary_rows.divergence_forward(x, t, kind, MIX, How(), How())
    parts = [
        vocabulary_rows.divergence_sums(
            x[:, cut], t[:, cut], stats[:, :2], stats[:, 2:4], kind, MIX, How(), How()
        )
        for cut in (slice(0, 3), slice(3, 4), slice(4, 10))
    ]
    want = torch.stack([loss, stats[:, 4]], 1)
    torch.testing.assert_close(sum(parts), want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_do_not_show(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, t = (3 * randn(9, 7, seed=i, dtype=torch.float32) for i in (0, 1))

    def run() -> list[Tensor]:
        ours = x.clone().requires_grad_()
        loss = divergence_rows(ours, t, kind=kind, backend="eager")
        loss.sum().backward()
        assert ours.grad is not None
        return [loss.detach(), ours.grad]

    whole = run()
    monkeypatch.setattr("cl_fast.ops.vocabulary_rows._BLOCK", 14)
    for got, want in zip(run(), whole, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_narrow_teacher_has_no_probability_elsewhere(kind: str, backend: str) -> None:
    x, t = (3 * randn(4, v, dtype=torch.float32) for v in (9, 6))
    padded = torch.cat([t, torch.full((4, 3), -torch.inf)], 1)
    results = []
    for teacher in (t, padded):
        ours = x.clone().requires_grad_()
        loss = divergence_rows(ours, teacher, kind=kind, backend=backend)
        loss.sum().backward()
        results.append((loss.detach(), ours.grad))
    if kind == "reverse_kl":
        assert (results[0][0] == torch.inf).all()
        assert (results[1][0] == torch.inf).all()
    else:
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-7)


# --- opcheck and compile -----------------------------------------------------------------------

PLAIN = [1.0, 0.0, 1.0]
TEACHER = [1.0, 0.0, 2.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_of_rows(dtype: torch.dtype) -> None:
    x, t = randn(3, 5).to(dtype), randn(3, 4).to(dtype)
    rest = ("jsd", 0.3, PLAIN, TEACHER)
    torch.library.opcheck(
        divergences._divergence_rows, (x.clone().requires_grad_(), t, *rest, False, None)
    )
    stats = divergences._divergence_rows(x, t, *rest, False, None)[1]
    grad = torch.ones(3)
    torch.library.opcheck(divergences._rows_gradient, (grad, x, t, stats, *rest, None))
    torch.library.opcheck(divergences._rows_gradient_, (grad, x.clone(), t, stats, *rest, None))


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("needed", [[True, True, True], [True, False, False]])
def test_opcheck_of_the_linear_op(needed: list[bool], uniform: bool) -> None:
    tensors = [randn(5, 3).float(), randn(4, 3).float(), randn(4).float()]
    inputs = [x.requires_grad_(need) for x, need in zip(tensors, needed, strict=True)]
    arguments = (
        *inputs, randn(5, 2).float(), randn(4, 2).float(), None, torch.tensor([1.0, 0, 2, 1, 1]),
        torch.tensor([0, 1, -1, 2, 3]), 0.5, "jsd", 0.3, PLAIN, TEACHER, 2, needed, uniform, True,
        None,
    )  # fmt: skip
    # AOTAutograd's run gives each loss its own gradient; `uniform` promises that none does.
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not uniform:
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(divergences._linear_divergence, arguments, test_utils=tests)


@pytest.mark.parametrize("inplace", [False, True])
def test_compile_of_rows(inplace: bool) -> None:
    def step(x: Tensor, t: Tensor) -> Tensor:
        # + 0: a leaf's own storage is not overwritten
        return (3.7 * divergence_rows(x + 0, t, kind="jsd", inplace=inplace)).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for m, v in ((3, 5), (4, 7), (6, 2)):
        x, t = randn(m, v).float(), randn(m, v, seed=1).float()
        results = []
        for f in (step, compiled):
            ours = x.clone().requires_grad_()
            loss = f(ours, t)
            loss.backward()
            results.append((loss.detach(), ours.grad))
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("uniform", [False, True])
def test_compile_of_the_linear_op(uniform: bool) -> None:
    def step(x: Tensor, w: Tensor, b: Tensor, t: Tensor, up: Tensor, rw: Tensor) -> Tensor:
        losses = linear_divergence_rows(
            x, w, b, t, row_weight=rw, uniform=uniform, chunk_tokens=2
        )[0]  # fmt: skip
        return losses.sum() * 3.7 if uniform else (losses * up).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for m, v in ((3, 5), (4, 7), (6, 2)):
        rest = randn(m, v, seed=1).float(), randn(m).float(), torch.arange(m).float()
        results = []
        for f in (step, compiled):
            inputs = [randn(m, 3).float(), randn(v, 3).float(), randn(v).float()]
            inputs = [x.requires_grad_() for x in inputs]
            loss = f(inputs[0], inputs[1], inputs[2], *rest)
            loss.backward()
            results.append([loss.detach(), *(x.grad for x in inputs)])
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_meta() -> None:
    x, w = torch.empty(5, 3, device="meta"), torch.empty(4, 3, device="meta")
    losses, aux = linear_divergence_rows(x, w, None, x, w, measure=True)
    assert losses.shape == (5,)
    assert aux.shape == (5, 2)
    assert divergence_rows(x, x).shape == (5,)


# --- gradients as autograd has them ------------------------------------------------------------


def test_in_place_is_the_other_and_comes_once() -> None:
    for dtype in (*DTYPES, torch.float64):
        x, t = 3 * randn(4, 9).to(dtype), randn(4, 9, seed=1).to(dtype)
        up = randn(4, seed=2).float()
        beside = x.clone().requires_grad_()
        divergence_rows(beside, t, kind="jsd").backward(up)
        over = x.clone().requires_grad_()
        losses = divergence_rows(over, t, kind="jsd", inplace=True)
        losses.backward(up, retain_graph=True)
        assert over.grad is not None
        assert torch.equal(over.grad, beside.grad)
        assert over.grad.data_ptr() == over.data_ptr()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            losses.backward(up)


def test_twice_is_twice() -> None:
    """retain_graph, and one tensor used by two losses."""
    x, t = randn(4, 3).requires_grad_(), randn(4, 5)
    w = randn(5, 3).requires_grad_()
    for uniform in (False, True):
        losses = linear_divergence_rows(x, w, None, t, uniform=uniform)[0]
        first = torch.autograd.grad(losses.sum(), (x, w), retain_graph=True)
        again = torch.autograd.grad(losses.sum(), (x, w))
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)
    both = divergence_rows(x @ w.t(), t) + divergence_rows(x @ w.t(), t, kind="tvd")
    one, two = (divergence_rows(x @ w.t(), t, kind=k) for k in ("forward_kl", "tvd"))
    (got,) = torch.autograd.grad(both.sum(), x)
    want = torch.autograd.grad(one.sum(), x)[0] + torch.autograd.grad(two.sum(), x)[0]
    torch.testing.assert_close(got, want)
    z = randn(4, 5, seed=3).requires_grad_()
    joint = divergence_rows(z, t) + 2 * divergence_rows(z, t)
    (got,) = torch.autograd.grad(joint.sum(), z)
    torch.testing.assert_close(got, 3 * torch.autograd.grad(divergence_rows(z, t).sum(), z)[0])


@pytest.mark.parametrize("form", ["rows", "in place", "frozen", "uniform", "each"])
def test_second_order_is_refused(form: str) -> None:
    """Never a silent 0 in place of a second derivative."""
    x, w, t = randn(4, 3).requires_grad_(), randn(5, 3), randn(4, 5)
    if form in ("rows", "in place"):
        losses = divergence_rows(x @ w.t(), t, inplace=form == "in place")
    else:
        w.requires_grad_(form != "frozen")
        losses = linear_divergence_rows(x, w, None, t, uniform=form == "uniform")[0]
    # As a gradient penalty is written, with a part that is differentiable twice.
    (grad,) = torch.autograd.grad(losses.sum() + (x**2).sum(), x, create_graph=True)
    penalty = grad.square().sum()
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        penalty.backward()


def test_teacher_has_no_gradient() -> None:
    x, t = randn(4, 5).requires_grad_(), randn(4, 5).requires_grad_()
    with pytest.raises(RuntimeError, match="detach it"):
        divergence_rows(x, t).sum().backward()


def test_no_grad_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(HeadGradients, "add", refuse)
    x, w, t = randn(4, 3).requires_grad_(), randn(5, 3).requires_grad_(), randn(4, 5)
    with torch.no_grad():
        linear_divergence_rows(x, w, None, t)
    linear_divergence_rows(x.detach(), w.detach(), None, t)
    with pytest.raises(AssertionError, match="was computed"):
        linear_divergence_rows(x, w, None, t)


def test_one_wide_tensor_widens_all() -> None:
    """Any one input in float64, the others in float32."""
    names = ("hidden", "weight", "teacher", "teacher_weight")
    shapes = ((4, 3), (5, 3), (4, 2), (5, 2))
    full = [randn(*shape, seed=i).float().double() for i, shape in enumerate(shapes)]
    want = linear_divergence_rows(full[0], full[1], None, *full[2:], kind="jsd")[0]
    for wide in range(4):
        given = [(x if i == wide else x.float()).detach() for i, x in enumerate(full)]
        given[0].requires_grad_()
        losses = linear_divergence_rows(given[0], given[1], None, *given[2:], kind="jsd")[0]
        losses.sum().backward()
        assert losses.dtype == torch.float64, names[wide]
        assert given[0].grad is not None
        assert given[0].grad.dtype == given[0].dtype
        torch.testing.assert_close(losses, want, rtol=1e-4, atol=1e-5)


def test_rows_that_are_not_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under graph capture the number of rows is not asked for: weight 0 must do the same."""
    labels, row_weight = torch.tensor([0, 1, 2, -1]), torch.tensor([1.0, 0.0, 0.5, 0.0])

    def run() -> list[Tensor]:
        inputs = [randn(4, 3).float(), randn(5, 3).float(), randn(5).float()]
        inputs[0][1] = torch.nan
        inputs[0][3] = torch.inf
        t = randn(4, 5, seed=1).float()
        t[1] = torch.nan
        for x in inputs:
            x.requires_grad_()
        losses, aux = linear_divergence_rows(
            inputs[0], inputs[1], inputs[2], t, row_weight=row_weight, labels=labels,
            ce_weight=0.3, uniform=True,
            measure=True,
        )  # fmt: skip
        losses.sum().backward()
        return [losses.detach(), aux, *(x.grad for x in inputs if x.grad is not None)]

    removed = run()
    monkeypatch.setattr(divergences, "counting_rows", lambda row_weight: None)
    for got, want in zip(run(), removed, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


# --- the head ----------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [None, [3, 0, 4]])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("w_dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("x_dtype", [*DTYPES, torch.float64])
def test_head(
    x_dtype: torch.dtype, w_dtype: torch.dtype, with_bias: bool, index: list[int] | None
) -> None:
    """Logits are never rounded to the dtype of the inputs; sums are wide."""
    x, w, b = randn(5, 8).to(x_dtype), randn(7, 8).to(w_dtype), randn(7).to(w_dtype)
    rows = None if index is None else torch.tensor(index)
    head = Head(x, w, b if with_bias else None, rows)
    wide = torch.float64 if torch.float64 in (x_dtype, w_dtype) else torch.float32
    assert head.wide == wide
    gradients = HeadGradients(head, True, True, True)
    picked = x if rows is None else x[rows]
    dz = randn(len(picked), 7, seed=3).to(wide)
    eps = torch.finfo(wide).eps
    for part in (slice(0, 2), slice(2, len(picked))):
        z = head.logits(part)
        assert z.dtype == wide
        assert z.is_contiguous()
        want = picked[part].double() @ w.double().t() + (b.double() if with_bias else 0)
        torch.testing.assert_close(z.double(), want, rtol=16 * eps, atol=32 * eps)
        gradients.target(z).copy_(dz[part])
        gradients.add(part, z)
    assert gradients.hidden is not None
    assert gradients.weight is not None
    assert gradients.bias is not None
    d_hidden = torch.zeros(5, 8, dtype=torch.float64)
    d_hidden[slice(None) if rows is None else rows] = dz.double() @ w.double()
    wants = (d_hidden, dz.double().t() @ picked.double(), dz.double().sum(0))
    for got, want in zip((gradients.hidden, gradients.weight, gradients.bias), wants, strict=True):
        assert got.dtype == wide
        torch.testing.assert_close(got.double(), want, rtol=16 * eps, atol=32 * eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_of_the_weight_do_not_show(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w, b = randn(5, 8).to(dtype), randn(37, 8).to(torch.bfloat16), randn(37).to(dtype)

    def run() -> list[Tensor]:
        head = Head(x, w, b)
        gradients = HeadGradients(head, True, True, False)
        z = head.logits(slice(1, 5))
        gradients.add(slice(1, 5), z.clone())
        assert gradients.hidden is not None
        assert gradients.weight is not None
        return [z, gradients.hidden, gradients.weight]

    whole = run()
    monkeypatch.setattr("cl_fast.ops.heads._BLOCK_BYTES", 8 * 4 * 5)
    assert len(Head(x, w, b).blocks()) == 8
    for got, want in zip(run(), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_head_of_float32_is_not_copied() -> None:
    w = randn(7, 8).float()
    ((_, block),) = Head(randn(5, 8).float(), w, None).blocks()
    assert block.data_ptr() == w.data_ptr()


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 63, 65, 1000, 4096])
@pytest.mark.parametrize("columns", [1, 33, 32000, 262144])
@pytest.mark.parametrize("size", [None, 1, 7, 5000])
def test_chunks_cover_all_rows(rows: int, columns: int, size: int | None) -> None:
    parts = chunks(rows, columns, size)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(rows))
    sizes = {part.stop - part.start for part in parts[:-1]}
    assert len(sizes) <= 1
    if size is None and parts:
        # 64 MB, or a 32nd of all, or 16 rows: whichever is most.
        step = parts[0].stop - parts[0].start
        assert step * columns * 4 <= max(1 << 26, 4 * 16 * columns, 4 * columns * -(-rows // 32))


# --- bad input ---------------------------------------------------------------------------------

X, W, T = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, 5)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"kind": "kl"}, ValueError, "kind must be one of 'forward_kl'"),
    ({"kind": "jsd", "mix": 0.0}, ValueError, "beta must be between 0 and 1"),
    ({"kind": "skew_forward_kl", "mix": 1.0}, ValueError, "skew must be between 0 and 1"),
    ({"kind": "skew_reverse_kl", "mix": float("nan")}, ValueError, "skew must be between"),
    ({"how": How(temperature=0.0)}, ValueError, "temperature must be positive"),
    ({"how": How(temperature=float("inf"))}, ValueError, "temperature must be positive"),
    ({"how": How(scale=float("nan"))}, ValueError, "logit_scale must be a finite number"),
    ({"how": How(softcap=-1.0)}, ValueError, "softcap must be positive"),
    ({"teacher_how": How(temperature=-1.0)}, ValueError, "teacher temperature must be positive"),
    ({"teacher_how": How(softcap=-1.0)}, ValueError, "teacher softcap must be positive"),
    ({"teacher": T.long()}, TypeError, "teacher must have one of the dtypes"),
    ({"teacher": T[:3]}, ValueError, "teacher must have the"),
    ({"teacher": torch.zeros(4, 6)}, ValueError, "teacher must have the 5"),
    ({"teacher": T[0]}, ValueError, "teacher must be a matrix"),
    ({"teacher": T.to("meta")}, ValueError, "teacher must be on the device"),
    ({"backend": "cuda"}, ValueError, "backend"),
    ({"backend": "triton"}, ValueError, "backend"),
]
BAD_LINEAR: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hidden": X.int()}, TypeError, "hidden must have one of the dtypes"),
    ({"weight": W.int()}, TypeError, "weight must have one of the dtypes"),
    ({"weight": W[:, :2]}, ValueError, "weight must have 3 columns like hidden; got 2"),
    ({"weight": W[:0]}, ValueError, "weight must have at least one row"),
    ({"weight": W.to("meta")}, ValueError, "weight must be on the device"),
    ({"bias": torch.zeros(4)}, ValueError, "bias must have one entry per token id, 5"),
    ({"teacher_weight": W}, ValueError, "teacher.weight must have 5 columns like teacher.hidden"),
    ({"row_weight": torch.ones(3)}, ValueError, "token_weight must have one entry per token, 4"),
    ({"labels": torch.ones(5).long()}, ValueError, "labels must have one entry per token, 4"),
    ({"ce_weight": 1.0}, ValueError, "ce_weight needs labels"),
    ({"chunk_tokens": 0}, ValueError, "chunk_tokens must be at least 1"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_bad_rows(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        divergence_rows(torch.zeros(4, 5), **{"teacher": T, **change})


@pytest.mark.parametrize(("change", "error", "words"), BAD + BAD_LINEAR)
def test_bad_linear(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        linear_divergence_rows(**{"hidden": X, "weight": W, "bias": None, "teacher": T, **change})


def test_no_columns() -> None:
    with pytest.raises(ValueError, match="logits must have at least one column"):
        divergence_rows(torch.zeros(4, 0), torch.zeros(4, 0))


def test_float64_has_no_float32_backend() -> None:
    with pytest.raises(ValueError, match="computes in float32"):
        divergence_rows(torch.zeros(4, 5).double(), T, backend="native")
