"""Top-k teachers: against float64 autograd on the categories, written without the ops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cl_fast.ops import supports
from cl_fast.ops.supports import TAILS, linear_topk, topk_from_logits, topk_logprobs
from cl_fast.ops.vocabulary_rows import KINDS, How

HOWS = {
    "plain": How(),
    "temperature": How(temperature=2.0),
    "scale": How(scale=0.5),
    "softcap": How(scale=1.5, softcap=5.0, temperature=0.7),
    "negative": How(scale=-0.8),
}


# --- the oracle --------------------------------------------------------------------------------


def values(x: Tensor, how: How, temperature: float | None = None) -> Tensor:
    v = how.scale * x
    if how.softcap:
        v = how.softcap * torch.tanh(v / how.softcap)
    return v / (how.temperature if temperature is None else temperature)


def divergence(lp: Tensor, lq: Tensor, kind: str, w: float) -> Tensor:
    """Of the categories, which need not sum to 1."""
    p, q = lp.exp(), lq.exp()
    # A logarithm whose factor is 0 must not make the gradient NaN.
    lp = torch.where(torch.isneginf(lp), -1e30, lp)
    lq = torch.where(torch.isneginf(lq), -1e30, lq)

    def kl(a: Tensor, la: Tensor, lb: Tensor) -> Tensor:
        return torch.where(a > 0, a * (la - lb), 0.0).sum(-1)

    def mixed(t: float) -> Tensor:
        """log(t q + (1 - t) p)"""
        return torch.logaddexp(lq + math.log(t), lp + math.log(1 - t))

    if kind == "forward_kl":
        return kl(q, lq, lp)
    if kind == "reverse_kl":
        return kl(p, lp, lq)
    if kind == "jsd":
        return w * kl(q, lq, mixed(w)) + (1 - w) * kl(p, lp, mixed(w))
    if kind == "skew_forward_kl":
        return kl(q, lq, mixed(w))
    if kind == "skew_reverse_kl":
        return kl(p, lp, mixed(1 - w))
    return (p - q).abs().sum(-1) / 2


def told(
    x: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    *,
    tail: str,
    kind: str,
    mix: float = 0.5,
    how: How = HOWS["plain"],
    teacher_temperature: float = 1.0,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
) -> Tensor:
    z = values(x, how)
    lp = z.log_softmax(-1)
    lq = logprobs.double()
    inside = lp.gather(1, ids)
    if tail == "renorm":
        inside = inside.log_softmax(-1)
        lq = (lq / teacher_temperature).log_softmax(-1)
    elif ids.size(1) < x.size(1):
        outside = torch.ones_like(z, dtype=torch.bool).scatter(1, ids, False)
        rest = torch.where(outside, lp, -torch.inf).logsumexp(-1, keepdim=True)
        q_rest = (1 - lq.exp().sum(-1, keepdim=True)).clamp(min=2.0**-24).log()
        lq = torch.cat([lq, q_rest], 1)
        inside = torch.cat([inside, rest], 1)
        if teacher_temperature != 1:
            lq = (lq / teacher_temperature).log_softmax(-1)
        if tail == "none":
            lq, inside = lq[:, :-1], inside[:, :-1]
    loss = divergence(inside, lq, kind, mix)
    if ce_weight:
        assert labels is not None
        hard = -values(x, how, 1.0).log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
        loss = loss + ce_weight * torch.where(labels < 0, 0.0, hard)
    return loss


def teacher(rows: int, columns: int, k: int, std: float = 2.0, seed: int = 0) -> tuple[Tensor, ...]:
    """A student's logits, and a teacher's ids and log-probs in a random order; float64."""
    g = torch.Generator().manual_seed(seed)
    x = std * torch.randn(rows, columns, generator=g, dtype=torch.float64)
    t = x + 0.5 * std * torch.randn(rows, columns, generator=g, dtype=torch.float64)
    logs, ids = t.log_softmax(-1).topk(k, -1)
    order = torch.rand(rows, k, generator=g).argsort(-1)
    return x, ids.gather(1, order), logs.gather(1, order)


def loss_and_grad(f: Any, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    loss = f(x)
    (grad,) = torch.autograd.grad(loss, x, upstream.to(loss.dtype))
    return loss.detach(), grad


def upstream(rows: int) -> Tensor:
    return torch.linspace(-1.0, 2.0, rows, dtype=torch.float64)


# --- logits that exist -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("inplace", [False, True])
def test_float64_equals_the_oracle(tail: str, kind: str, how: str, inplace: bool) -> None:
    x, ids, logs = teacher(6, 23, 5)
    labels = torch.tensor([3, -1, 22, 0, 7, -1])
    options: dict[str, Any] = {
        "tail": tail, "kind": kind, "mix": 0.3, "how": HOWS[how], "labels": labels,
        "teacher_temperature": 1.7 if how == "temperature" else 1.0,
        "ce_weight": 0.25 if how in ("temperature", "softcap") else 0.0,
    }  # fmt: skip
    up = upstream(6)
    want, slope = loss_and_grad(lambda x: told(x, ids, logs, **options), x, up)
    got, grad = loss_and_grad(
        lambda x: topk_from_logits(x.clone(), ids, logs, inplace=inplace, **options)[0], x, up
    )
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(grad, slope, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("std", [1.0, 30.0])
def test_float32_is_no_worse_than_plain_float32(tail: str, kind: str, std: float) -> None:
    x, ids, logs = teacher(40, 501, 16, std)
    x, logs = x.float(), logs.float()
    options: dict[str, Any] = {"tail": tail, "kind": kind, "mix": 0.4}
    up = upstream(40)
    want, slope = loss_and_grad(lambda x: told(x, ids, logs, **options), x.double(), up)

    def eager(x: Tensor) -> Tensor:
        """What one writes in float32."""
        lp = x.log_softmax(-1).gather(1, ids)
        lq = logs
        if tail == "renorm":
            lp, lq = lp.log_softmax(-1), lq.log_softmax(-1)
        if tail == "bucket":
            lp, lq = (
                torch.cat(
                    [a, (-torch.expm1(a.logsumexp(-1, keepdim=True).clamp(max=-1e-7))).log()], 1
                )
                for a in (lp, lq)
            )
        return divergence(lp, lq, kind, 0.4)

    plain, plain_slope = loss_and_grad(eager, x, up.float())
    got, grad = loss_and_grad(lambda x: topk_from_logits(x, ids, logs, **options)[0], x, up)
    for name, ours, theirs, exact in (
        ("loss", got, plain, want),
        ("gradient", grad, plain_slope, slope),
    ):
        ours_off = (ours.double() - exact).abs().max().item()
        theirs_off = (theirs.double() - exact).abs().max().item()
        assert ours_off <= 2 * theirs_off + 2.0**-24, (name, ours_off, theirs_off)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_round_the_gradient_once(dtype: torch.dtype, backend: str) -> None:
    x, ids, logs = teacher(12, 300, 9)
    x = x.to(dtype)
    up = upstream(12)
    want, slope = loss_and_grad(
        lambda x: told(x, ids, logs.float(), tail="bucket", kind="jsd"), x.double(), up
    )
    got, grad = loss_and_grad(
        lambda x: topk_from_logits(x, ids, logs.float(), kind="jsd", backend=backend)[0], x, up
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-7)
    spacing = torch.finfo(dtype).eps
    bound = 0.5 * spacing * slope.abs() + 1e-6
    assert ((grad.double() - slope).abs() <= bound).all()


@pytest.mark.parametrize("tail", ["bucket", "none"])
def test_backends_agree(tail: str, backend: str) -> None:
    x, ids, logs = teacher(9, 777, 12, 5.0)
    x, logs, up = x.float(), logs.float(), upstream(9)
    want = loss_and_grad(lambda x: told(x, ids, logs, tail=tail, kind="reverse_kl"), x.double(), up)
    got = loss_and_grad(
        lambda x: topk_from_logits(x, ids, logs, tail=tail, kind="reverse_kl", backend=backend)[0],
        x, up,
    )  # fmt: skip
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", TAILS)
def test_a_support_of_everything_is_the_whole_loss(tail: str, kind: str) -> None:
    x, ids, logs = teacher(5, 31, 31, 4.0)
    full = torch.empty_like(logs).scatter(1, ids, logs)
    up = upstream(5)
    want = loss_and_grad(lambda x: divergence(x.log_softmax(-1), full, kind, 0.5), x, up)
    for dtype, off in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        got = loss_and_grad(
            lambda x, d=dtype: topk_from_logits(x, ids, logs.to(d), tail=tail, kind=kind)[0],
            x.to(dtype), up,
        )  # fmt: skip
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=off, atol=off)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", ["bucket", "renorm"])
@pytest.mark.parametrize("std", [1.0, 30.0])
@pytest.mark.parametrize("made_by", ["topk_logprobs", "log_softmax"])
def test_a_student_like_its_teacher_is_at_rest(
    tail: str, kind: str, std: float, made_by: str
) -> None:
    x = std * torch.randn(50, 999, generator=torch.Generator().manual_seed(1))
    if made_by == "log_softmax":
        logs, ids = x.log_softmax(-1).topk(20)
    else:
        ids, logs = topk_logprobs(x, 20)
    loss, grad = loss_and_grad(
        lambda x: topk_from_logits(x, ids, logs, tail=tail, kind=kind)[0], x, torch.ones(50)
    )
    assert not loss.any()
    assert not grad.any()


def test_log_probs_of_the_most_probable_ids() -> None:
    x = 30 * torch.randn(40, 700, generator=torch.Generator().manual_seed(2))
    for how in HOWS.values():
        ids, logs = topk_logprobs(x, 25, how=how)
        exact = values(x.double(), how).log_softmax(-1)
        assert logs.dtype == torch.float32
        torch.testing.assert_close(logs.double(), exact.gather(1, ids), rtol=2e-7, atol=1e-9)
        if not how.softcap:
            torch.testing.assert_close(logs.double(), exact.topk(25).values, rtol=2e-7, atol=1e-9)
    whole = topk_logprobs(x, 700)[1].double().exp().sum(1)
    torch.testing.assert_close(whole, torch.ones_like(whole), rtol=1e-6, atol=0)
    for k in (0, 701):
        with pytest.raises(ValueError, match="between 1 and 700"):
            topk_logprobs(x, k)


def test_masses() -> None:
    x, ids, logs = teacher(7, 40, 6)
    for tail in TAILS:
        _, student, given = topk_from_logits(x, ids, logs, tail=tail)
        torch.testing.assert_close(given, logs.exp().sum(1))
        if tail == "renorm":
            assert student.isnan().all()
        else:
            torch.testing.assert_close(student, x.softmax(-1).gather(1, ids).sum(1))


def test_a_tail_of_almost_nothing() -> None:
    """The student puts 1e-26 outside of the support: no difference of two numbers near 1 does."""
    x = torch.zeros(1, 50)
    x[0, 3] = 60.0
    ids = torch.tensor([[3, 4]])
    logs = torch.tensor([[0.5, 0.3]]).log()
    up = torch.ones(1)
    for kind in KINDS:
        want = loss_and_grad(
            lambda x, kind=kind: told(x, ids, logs, tail="bucket", kind=kind), x.double(), up
        )
        got = loss_and_grad(
            lambda x, kind=kind: topk_from_logits(x, ids, logs, kind=kind)[0], x, up
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_rounds_above_one_stays_finite(kind: str) -> None:
    x = torch.randn(4, 30, generator=torch.Generator().manual_seed(3))
    logs, ids = (8 * x).log_softmax(-1).topk(10)
    logs = logs.bfloat16() * 0.99
    assert (logs.double().exp().sum(1) > 1).any()
    for tail in TAILS:
        loss, grad = loss_and_grad(
            lambda x, tail=tail: topk_from_logits(x, ids, logs, tail=tail, kind=kind)[0],
            x, torch.ones(4),
        )  # fmt: skip
        assert loss.isfinite().all()
        assert grad.isfinite().all()
        if tail != "none":
            assert (loss >= 0).all()
            assert grad.sum(1).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"])
@pytest.mark.parametrize("tail", TAILS)
def test_ids_that_the_teacher_excludes(tail: str, kind: str) -> None:
    x, ids, logs = teacher(5, 20, 6)
    logs[1, 2] = -torch.inf
    logs[2, :5] = -torch.inf
    up = upstream(5)
    want = loss_and_grad(lambda x: told(x, ids, logs, tail=tail, kind=kind), x, up)
    got = loss_and_grad(lambda x: topk_from_logits(x, ids, logs, tail=tail, kind=kind)[0], x, up)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_ids_that_the_student_excludes() -> None:
    """Logits of -inf, also all over outside of the support."""
    x, ids, logs = teacher(3, 12, 4)
    x[0] = torch.where(torch.zeros(12, dtype=torch.bool).scatter(0, ids[0], True), x[0], -torch.inf)
    x[1, (ids[1, 0] + 1) % 12] = -torch.inf
    loss, grad = loss_and_grad(
        lambda x: topk_from_logits(x, ids, logs, kind="reverse_kl")[0], x, torch.ones(3)
    )
    assert loss.isfinite().all()
    assert grad.isfinite().all()
    assert not grad[x == -torch.inf].any()
    loss, grad = loss_and_grad(lambda x: topk_from_logits(x, ids, logs)[0], x, torch.ones(3))
    assert loss[0] == torch.inf
    assert grad.isfinite().all()


@given(seed=st.integers(0, 2**16), k=st.integers(1, 9), kind=st.sampled_from(KINDS))
def test_the_order_of_a_support_does_not_matter(seed: int, k: int, kind: str) -> None:
    x, ids, logs = teacher(3, 9, k, seed=seed)
    order = torch.rand(3, k, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    for tail in TAILS:
        first = loss_and_grad(
            lambda x, tail=tail: topk_from_logits(x, ids, logs, tail=tail, kind=kind)[0],
            x, torch.ones(3),
        )  # fmt: skip
        other = loss_and_grad(
            lambda x, tail=tail: topk_from_logits(
                x, ids.gather(1, order), logs.gather(1, order), tail=tail, kind=kind
            )[0],
            x, torch.ones(3),
        )  # fmt: skip
        for a, b in zip(first, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@given(seed=st.integers(0, 2**16), shift=st.floats(-50, 50), tail=st.sampled_from(TAILS))
def test_a_shift_of_the_logits_does_not_matter(seed: int, shift: float, tail: str) -> None:
    x, ids, logs = teacher(3, 14, 5, seed=seed)
    first = topk_from_logits(x, ids, logs, tail=tail)[0]
    other = topk_from_logits(x + shift, ids, logs, tail=tail)[0]
    torch.testing.assert_close(first, other, rtol=1e-10, atol=1e-12)


def test_rows_that_do_not_count_are_not_looked_at() -> None:
    x, ids, logs = teacher(4, 15, 3)
    weights = torch.tensor([1.0, 0.0, 2.5, 0.0], dtype=torch.float64)
    want, slope = loss_and_grad(
        lambda x: weights * told(x, ids, logs, tail="bucket", kind="forward_kl"), x, upstream(4)
    )
    x[1], ids[1], logs[3], ids[3] = torch.nan, -100, torch.nan, 7
    for how in (HOWS["plain"], How(softcap=1e6)):
        got, grad = loss_and_grad(
            lambda x, how=how: topk_from_logits(x, ids, logs, row_weight=weights, how=how)[0],
            x, upstream(4),
        )  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(grad, slope, rtol=1e-8, atol=1e-9)


# --- a head without its logits -----------------------------------------------------------------


def head(rows: int, width: int, columns: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(columns)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    return [make(rows, width), make(columns, width) / 2, make(columns)]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("columns", [20, 200])
@pytest.mark.parametrize("how", ["plain", "softcap"])
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_head_equals_the_oracle(
    tail: str, columns: int, how: str, uniform: bool, weighted: bool
) -> None:
    """200 columns: "renorm" gathers rows of the head; 20: it does not."""
    tensors = [t.requires_grad_() for t in head(7, 6, columns)]
    _, ids, logs = teacher(7, columns, 5)
    weights = torch.tensor([0, 1, 2, 0, 0.5, 1, 1], dtype=torch.float64) if weighted else None
    up = torch.full((7,), 0.3, dtype=torch.float64) if uniform else upstream(7)
    labels = torch.tensor([1, 2, -1, 3, 4, 5, 6])
    ce = 0.5 if how == "softcap" else 0.0
    options: dict[str, Any] = {
        "tail": tail, "kind": "jsd", "how": HOWS[how], "labels": labels, "ce_weight": ce,
    }  # fmt: skip
    x, w, b = tensors
    want = told(x @ w.T + b, ids, logs, **options) * (1 if weights is None else weights)
    slopes = torch.autograd.grad(want, tensors, up)
    for chunk in (None, 3):
        got = linear_topk(
            x, w, b, ids, logs, row_weight=weights, uniform=uniform, chunk_tokens=chunk, **options
        )[0]
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
        grads = torch.autograd.grad(got, tensors, up)
        for grad, slope in zip(grads, slopes, strict=True):
            torch.testing.assert_close(grad, slope, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_keeps_its_accumulators(tail: str, dtype: torch.dtype, backend: str) -> None:
    """Never worse than the product in that dtype with logits that stay float32."""
    x, w, _ = head(16, 48, 400, dtype)
    x = (5 * x).detach()
    exact = x.double() @ w.double().T
    _, ids, logs = teacher(16, 400, 8, 6.0)
    logs = logs.float()
    up = upstream(16)
    hidden = x.double().requires_grad_()
    want = told(hidden @ w.double().T, ids, logs, tail=tail, kind="forward_kl")
    (slope,) = torch.autograd.grad(want, hidden, up)
    x.requires_grad_()
    got = linear_topk(x, w, None, ids, logs, tail=tail, backend=backend)[0]
    (grad,) = torch.autograd.grad(got, x, up.float())
    size = exact.abs().max().item()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6 * size)
    bound = torch.finfo(dtype).eps * slope.abs() + 4e-6 * slope.abs().max()
    assert ((grad.double() - slope).abs() <= bound).all()


def test_a_frozen_head_multiplies_nothing_for_its_weight() -> None:
    x, w, b = head(5, 4, 30)
    _, ids, logs = teacher(5, 30, 3)
    calls: list[list[bool]] = []
    real = supports.HeadGradients

    class Seen(real):  # type: ignore[misc, valid-type]
        def __init__(self, head: Any, *needed: bool) -> None:
            calls.append(list(needed))
            super().__init__(head, *needed)

    supports.HeadGradients = Seen  # type: ignore[misc]
    try:
        linear_topk(x.requires_grad_(), w, b, ids, logs)[0].sum().backward()
        with torch.no_grad():
            linear_topk(x, w, b, ids, logs)
    finally:
        supports.HeadGradients = real  # type: ignore[misc]
    assert calls == [[True, False, False], [False, False, False]]


def test_no_rows_and_rows_that_do_not_count() -> None:
    for columns in (10, 500):
        x, w, _ = (t.requires_grad_() for t in head(0, 4, columns))
        for tail in TAILS:
            nothing = torch.zeros(0, 2)
            loss, *_ = linear_topk(x, w, None, nothing.long(), nothing, tail=tail)
            loss.sum().backward()
            assert loss.shape == (0,)
            assert not w.grad.any()
        x, w, _ = (t.requires_grad_() for t in head(3, 4, columns))
        ids, logs = torch.full((3, 2), -100), torch.full((3, 2), torch.nan)
        for tail in TAILS:
            loss, *_ = linear_topk(x, w, None, ids, logs, tail=tail, row_weight=torch.zeros(3))
            loss.sum().backward()
            assert loss.tolist() == [0.0, 0.0, 0.0]
            assert not x.grad.any()
            assert not w.grad.any()
    logits = torch.zeros(0, 9, requires_grad=True)
    topk_from_logits(logits, torch.zeros(0, 2).long(), torch.zeros(0, 2))[0].sum().backward()


# --- as torch ops ------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", TAILS)
def test_gradcheck(tail: str) -> None:
    x, w, b = (t.requires_grad_() for t in head(3, 4, 40))
    _, ids, logs = teacher(3, 40, 2)
    labels = torch.tensor([0, 1, 2])
    assert torch.autograd.gradcheck(
        lambda x, w, b: linear_topk(x, w, b, ids, logs, tail=tail, kind="reverse_kl")[0], (x, w, b)
    )
    logits = (x @ w.T).detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: topk_from_logits(
            z, ids, logs, tail=tail, kind="skew_reverse_kl", mix=0.2, how=HOWS["softcap"],
            labels=labels, ce_weight=0.3,
        )[0],
        (logits,),
    )  # fmt: skip


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(tail: str, requires_grad: bool) -> None:
    _, ids, logs = teacher(4, 50, 3)
    x, w, b = (t.requires_grad_(requires_grad) for t in head(4, 6, 50, torch.float32))
    labels = torch.tensor([0, -1, 5, 7])
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0])
    how = [1.0, 0.0, 1.0]
    for ce in (0.0, 0.5):
        torch.library.opcheck(
            torch.ops.cl_fast.linear_support.default,
            (x, w, b, ids, logs.float(), weights, labels, tail, "jsd", 0.5, how, 1.0, ce, None,
             [requires_grad] * 3, ce == 0.0, False, None),
        )  # fmt: skip
        torch.library.opcheck(
            torch.ops.cl_fast.support_rows.default,
            ((x @ w.T).detach().requires_grad_(requires_grad), ids, logs.float(), weights, labels,
             tail, "jsd", 0.5, how, 1.0, ce, False, False, None),
        )  # fmt: skip


@pytest.mark.parametrize("tail", TAILS)
def test_opcheck_of_the_gradients(tail: str) -> None:
    x, ids, logs = teacher(4, 50, 3)
    labels, how = torch.tensor([0, -1, 5, 7]), [1.0, 0.0, 1.0]
    _, _, h, normals, stats = torch.ops.cl_fast.support_rows(
        x, ids, logs, None, labels, tail, "jsd", 0.5, how, 1.0, 0.5, False, False, None
    )
    for op in ("support_rows_gradient", "support_rows_gradient_"):
        torch.library.opcheck(
            getattr(torch.ops.cl_fast, op).default,
            (upstream(4), x, ids, h, normals, labels, stats, 0.5, how, None),
        )


@pytest.mark.parametrize("inplace", [False, True])
def test_strided_logits(inplace: bool, backend: str) -> None:
    x, ids, logs = teacher(6, 40, 5)
    x, logs, up = x.float(), logs.float(), torch.ones(6)
    want = loss_and_grad(lambda x: topk_from_logits(x, ids, logs)[0], x, up)
    layouts = {
        "transposed": lambda x: x.t().contiguous().t(),
        "padded": lambda x: torch.nn.functional.pad(x, (1, 6))[:, 1:41],
        "every other": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    }
    for name, laid_out in layouts.items():
        got = loss_and_grad(
            lambda x, f=laid_out: topk_from_logits(
                f(x), ids.t().contiguous().t(), logs.t().contiguous().t(), inplace=inplace,
                backend=backend,
            )[0],
            x, up,
        )  # fmt: skip
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize(("columns", "k"), [(1, 1), (2, 1), (2, 2), (3, 1), (17, 1), (17, 16)])
@pytest.mark.parametrize("tail", TAILS)
def test_small_vocabularies(columns: int, k: int, tail: str, backend: str) -> None:
    x, ids, logs = teacher(3, columns, k)
    x, logs, up = x.float(), logs.float(), torch.ones(3)
    want = loss_and_grad(lambda x: told(x, ids, logs, tail=tail, kind="jsd"), x.double(), up)
    got = loss_and_grad(
        lambda x: topk_from_logits(x, ids, logs, tail=tail, kind="jsd", backend=backend)[0], x, up
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_rows(inplace: bool) -> None:
    x, ids, logs = teacher(4, 50, 3)

    def step(x: Tensor) -> Tensor:
        return topk_from_logits(3 * x, ids, logs, inplace=inplace)[0].sum()

    x.requires_grad_()
    (want,) = torch.autograd.grad(step(x), x)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(got, want)


def test_compiled_without_breaks() -> None:
    _, ids, logs = teacher(4, 50, 3)
    logs = logs.float()
    tensors = [t.requires_grad_() for t in head(4, 6, 50, torch.float32)]

    def step(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        one = linear_topk(x, w, b, ids, logs, tail="bucket", uniform=True)[0].mean()
        two = topk_from_logits(x @ w.T + b, ids, logs, tail="renorm")[0].mean()
        return one + two

    want = torch.autograd.grad(step(*tensors), tensors)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*tensors), tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_changes_nothing() -> None:
    _, ids, logs = teacher(4, 50, 3)
    x, w, b = head(4, 6, 50, torch.float32)
    want = linear_topk(x, w, b, ids, logs.float())[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_topk(x, w, b, ids, logs.float())[0], want)


def test_twice_differentiated_is_refused() -> None:
    x, ids, logs = teacher(2, 9, 3)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(topk_from_logits(x, ids, logs)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.square().sum().backward()


def test_in_place_backward_once() -> None:
    x, ids, logs = teacher(2, 9, 3)
    leaf = x.requires_grad_()
    logits = leaf.clone()
    loss = topk_from_logits(logits, ids, logs, inplace=True)[0].sum()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(logits.detach(), leaf.grad)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


# --- bad input ---------------------------------------------------------------------------------


def _bad() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    ids, logs = torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.full((2, 3), -2.0)
    repeated = torch.tensor([[0, 1, 2], [3, 8, 3]])
    high, low = ids + 7, ids - 1
    nan = logs.clone()
    nan[1, 1] = torch.nan
    empty = logs.clone()
    empty[0] = -torch.inf
    return {
        "tail": ({"tail": "rest"}, ValueError, "teacher.tail must be one of 'bucket'"),
        "kind": ({"kind": "kl"}, ValueError, "kind must be one of"),
        "mix": ({"kind": "jsd", "mix": 1.0}, ValueError, "beta must be between 0 and 1"),
        "ids of floats": ({"ids": ids.float()}, TypeError, "teacher.ids must be integers"),
        "logprobs of ints": ({"logprobs": ids}, TypeError, "teacher.logprobs must have one of"),
        "shapes": ({"ids": ids[:, :2]}, ValueError, "of one shape; got (2, 2) and (2, 3)"),
        "dimensions": ({"logprobs": logs[0]}, ValueError, "teacher.logprobs must be a matrix"),
        "rows": (
            {"ids": ids[:1], "logprobs": logs[:1]}, ValueError, "the 2 rows of the student; got 1",
        ),
        "k > V": (
            {"ids": torch.arange(11).repeat(2, 1), "logprobs": torch.full((2, 11), -3.0)},
            ValueError, "between 1 and 10 ids per row",
        ),
        "k = 0": ({"ids": ids[:, :0], "logprobs": logs[:, :0]}, ValueError, "between 1 and 10 ids"),
        "twice": ({"ids": repeated}, ValueError, "got 3 twice in row 1"),
        "too high": ({"ids": high}, ValueError, "must be in 0 .. 9"),
        "negative": ({"ids": low}, ValueError, "got -1"),
        "nan": ({"logprobs": nan}, ValueError, "got NaN or infinity"),
        "inf": ({"logprobs": -torch.inf * logs}, ValueError, "got NaN or infinity"),
        "probabilities": ({"logprobs": logs.exp()}, ValueError, "sum to at most 1 in a row"),
        "nothing": (
            {"logprobs": empty, "tail": "renorm"}, ValueError, "nothing is left to renormalise",
        ),
        "grad": (
            {"logprobs": logs.clone().requires_grad_()}, ValueError,
            "teacher.logprobs must not require grad: detach them",
        ),
        "temperature": ({"how": How(temperature=0.0)}, ValueError, "temperature must be positive"),
        "teacher's": (
            {"teacher_temperature": -1.0}, ValueError, "teacher temperature must be positive",
        ),
        "softcap": ({"how": How(softcap=-1.0)}, ValueError, "softcap must be positive"),
        "scale": ({"how": How(scale=float("nan"))}, ValueError, "logit_scale must be a finite"),
        "no labels": ({"ce_weight": 1.0}, ValueError, "ce_weight needs labels"),
        "ce": ({"ce_weight": float("inf")}, ValueError, "ce_weight must be a finite number"),
        "labels": ({"labels": torch.zeros(3).long()}, ValueError, "labels must have one entry per"),
        "weights": ({"row_weight": torch.ones(3)}, ValueError, "token_weight must have one entry"),
        "backend": ({"backend": "fastest"}, ValueError, "backend"),
    }  # fmt: skip


@pytest.mark.parametrize("case", _bad())
def test_bad_input(case: str) -> None:
    changed, error, words = _bad()[case]
    arguments: dict[str, Any] = {
        "ids": torch.tensor([[0, 1, 2], [3, 4, 5]]),
        "logprobs": torch.full((2, 3), -2.0),
        **changed,
    }
    ids, logs = arguments.pop("ids"), arguments.pop("logprobs")
    with pytest.raises(error) as of_rows:
        topk_from_logits(torch.zeros(2, 10), ids, logs, **arguments)
    assert words in str(of_rows.value)
    with pytest.raises(error) as of_head:
        linear_topk(torch.zeros(2, 4), torch.zeros(10, 4), None, ids, logs, **arguments)
    assert words in str(of_head.value)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((2, 4), (10, 5), None), "weight must have 4 columns like hidden; got 5"),
        (((2, 4), (0, 4), None), "weight must have at least one row"),
        (((2, 4, 1), (10, 4), None), "hidden must be a matrix"),
        (((2, 4), (10, 4), (9,)), "bias must have one entry per token id"),
    ],
)
def test_bad_heads(shapes: tuple[Any, ...], words: str) -> None:
    x, w, b = (None if shape is None else torch.zeros(shape) for shape in shapes)
    ids, logs = torch.tensor([[0, 1], [3, 4]]), torch.full((2, 2), -2.0)
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        linear_topk(x, w, b, ids, logs)  # type: ignore[arg-type]
    assert words in str(raised.value)


def test_ids_of_any_integer_dtype() -> None:
    x, ids, logs = teacher(3, 20, 4)
    want = topk_from_logits(x, ids, logs)[0]
    for dtype in (torch.int32, torch.int16, torch.uint8, torch.uint16):
        assert torch.equal(topk_from_logits(x, ids.to(dtype), logs)[0], want)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_second_derivative_is_refused(inplace: bool) -> None:
    """Else the saved gradient would pass for a constant."""
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    logs, ids = torch.randn(3, 9, dtype=torch.float64).log_softmax(1).topk(3, 1)
    if inplace:
        logits = hidden @ weight.detach().T
        loss = topk_from_logits(logits, ids, logs, inplace=True)[0].square().sum()
    else:
        loss = linear_topk(hidden, weight, None, ids, logs)[0].square().sum()
    gradient = torch.autograd.grad(loss, hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        gradient.sum().backward()
