"""The kernels of the penalty and the projection, through the ops, against float64.

bfloat16 is read correctly here, but results are compared in float32: the interpreter truncates
where it should round.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cl_fast.triton_kernels import orthogonality as kernels
from torch import Tensor

from cl_fast.ops import orthogonal_penalty, orthogonal_project, orthogonal_project_

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPACING = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return torch.randn(shape, generator=g).to(dtype)


def ragged(dtype: torch.dtype, past_dtype: torch.dtype) -> tuple[list[Tensor], list[Any]]:
    """Modules of all sorts: several tiles, several chunks, no past, many pasts, one row."""
    new = [
        randn(r, d, seed=m, dtype=dtype)
        for m, (r, d) in enumerate([(8, 64), (3, 600), (40, 40), (1, 7), (8, 64), (2, 16)])
    ]
    past = [
        randn(8, 64, seed=10, dtype=past_dtype),
        [randn(r, 600, seed=20 + r, dtype=past_dtype) for r in (8, 1)],
        randn(70, 40, seed=30, dtype=past_dtype),
        [randn(2, 7, seed=40, dtype=past_dtype)],
        None,
        randn(0, 16, dtype=past_dtype),
    ]
    return new, past


def stacked(past: Any, d: int) -> Tensor:
    parts = [] if past is None else [past] if isinstance(past, Tensor) else past
    return torch.cat([torch.zeros(0, d, dtype=torch.float64), *(p.double() for p in parts)])


def oracle(new: Tensor, past: Any, form: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, gradient, and the sizes that the errors of both are measured by."""
    a, p = new.detach().double(), stacked(past, new.shape[1])
    s = a @ p.t()
    room = a.abs() @ p.abs().t()
    if form == "l1":
        return s.abs().sum(), s.sign() @ p, room.sum(), torch.ones_like(s) @ p.abs()
    return (s**2).sum(), 2 * s @ p, (2 * room * s.abs()).sum() + 1e-30, 2 * room @ p.abs()


@pytest.mark.parametrize(("dtype", "past_dtype"), list(itertools.product(DTYPES, DTYPES)))
@pytest.mark.parametrize("form", ["l1", "squared"])
def test_penalty(form: str, dtype: torch.dtype, past_dtype: torch.dtype) -> None:
    new, past = ragged(dtype, past_dtype)
    for a in new:
        a.requires_grad_()
    values = orthogonal_penalty(new, past, form=form, reduction="none", backend="triton")
    assert values.dtype == torch.float32
    upstream = torch.tensor([1.0, -0.5, 3.0, 1.0, 2.0, 1.0])
    (values * upstream).sum().backward()
    for m, a in enumerate(new):
        value, grad, value_room, grad_room = oracle(a, past[m], form)
        # float32 sums of n terms in any order: n roundings at most, of the sizes added up.
        roundings = (a.shape[1] + 32 + stacked(past[m], a.shape[1]).shape[0]) * 2.0**-24
        assert (values[m].double() - value).abs() <= roundings * value_room + 1e-30, m
        assert a.grad is not None
        assert a.grad.dtype == dtype
        error = (a.grad.double() - upstream[m].double() * grad).abs()
        allowed = roundings * grad_room + SPACING[dtype] * grad.abs()
        assert (error <= upstream[m].abs() * allowed + 1e-30).all(), m


def test_sums_are_the_products_of_the_op() -> None:
    """S itself, block after block, in float32."""
    new, past = ragged(torch.float32, torch.float32)
    flat = [p for x in past if x is not None for p in ([x] if isinstance(x, Tensor) else x)]
    counts = [1, 2, 1, 1, 0, 1]
    _, s = kernels.penalty(new, flat, counts, "l1")
    _, want = torch.ops.cl_fast.orthogonal_penalty(new, flat, counts, "l1", "eager")
    torch.testing.assert_close(s, want, rtol=1e-5, atol=1e-4)
    assert s.shape == want.shape


def test_zero_has_no_sign() -> None:
    new = [torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, 0.0]], requires_grad=True)]
    past = [torch.tensor([[2.0, 2.0, 5.0], [0.0, 0.0, 7.0], [-1.0, 0.0, 1.0]])]
    orthogonal_penalty(new, past, backend="triton").backward()
    assert new[0].grad is not None
    assert new[0].grad.tolist() == [[1.0, 0.0, -1.0], [3.0, 2.0, 4.0]]


def test_one_gradient_of_many_and_mixed_dtypes() -> None:
    new = [randn(4, 32, seed=m, dtype=DTYPES[m % 3]) for m in range(6)]
    past = [randn(4, 32, seed=10 + m, dtype=DTYPES[(m + 1) % 3]) for m in range(6)]
    for m in (1, 3, 5):
        new[m].requires_grad_()
    want = torch.autograd.grad(orthogonal_penalty(new, past, backend="eager"), new[1::2])
    got = torch.autograd.grad(orthogonal_penalty(new, past, backend="triton"), new[1::2])
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=2.0**-7, atol=1e-5)


def test_strides_do_not_matter() -> None:
    a, p = randn(5, 48), randn(20, 48, seed=1)
    want = orthogonal_penalty([a], [p], backend="triton")
    wide = torch.zeros(5, 100)
    wide[:, 1:49] = a
    for new in (wide[:, 1:49], a.t().contiguous().t(), a):
        for past in (p, p.t().contiguous().t(), torch.cat([p, p])[20:]):
            torch.testing.assert_close(
                orthogonal_penalty([new], [past], backend="triton"), want, rtol=1e-6, atol=0.0
            )


def test_larger_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What many modules lead to: fewer, longer partial sums."""
    new, past = [randn(2, 1500)], [randn(3, 1500, seed=1)]
    want = orthogonal_penalty(new, past, backend="triton")
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    assert kernels._chunk(1, 1500) == 2048
    got = orthogonal_penalty(new, past, backend="triton")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_project(dtype: torch.dtype, rows: bool) -> None:
    shapes = [(8, 64, 24), (20, 40, 40), (3, 600, 5), (1, 7, 1), (4, 32, 0)]
    a = [randn(r, d, seed=d, dtype=dtype) for r, d, _ in shapes]
    q64 = [torch.linalg.qr(randn(d, k, seed=k).double()).Q for _, d, k in shapes]
    # A basis in every layout that a caller may have, the dtype its own.
    layouts = (
        [x.to(dtype) for x in q64],
        [x.float().contiguous() for x in q64],
        [x.float().t().contiguous().t() for x in q64],
        [x.to(dtype).contiguous() if m % 2 else x.float() for m, x in enumerate(q64)],
    )
    for layout, q in enumerate(layouts):
        given = [x.t() for x in q] if rows else q
        for passes in (1, 2) if layout == 0 else (1,):
            got = orthogonal_project(a, given, rows=rows, passes=passes, backend="triton")
            for m, (x, y, basis) in enumerate(zip(a, got, q, strict=True)):
                want, b = x.double(), basis.double()
                for _ in range(passes):
                    want = want - want @ b @ b.t()
                room = x.double().abs() + x.double().abs() @ b.abs() @ b.abs().t()
                error = (y.double() - want).abs()
                assert y.dtype == dtype
                assert y.is_contiguous()
                allowed = passes * (x.shape[1] + 64) * 2.0**-24 * room * (1 + room.max())
                assert (error <= allowed + SPACING[dtype] * want.abs()).all(), (m, passes)


def test_project_in_place() -> None:
    base = randn(6, 80)
    a = [base[:, 10:50], randn(4, 40).half(), randn(40, 5).t()]
    q = [torch.linalg.qr(randn(40, 6, seed=m)).Q for m in range(3)]
    want = orthogonal_project(a, q, backend="triton")
    around = base[:, :10].clone()
    orthogonal_project_(a, q, backend="triton")
    for x, y in zip(a, want, strict=True):
        assert torch.equal(x, y)
    assert torch.equal(base[:, :10], around)


def test_two_passes_leave_nothing_behind() -> None:
    """A matrix that lies in the subspace, but for a thousandth."""
    q = torch.linalg.qr(randn(64, 16)).Q
    a = randn(8, 16, seed=1) @ q.t() + 1e-3 * randn(8, 64, seed=2)
    once = orthogonal_project(a, q, backend="triton")
    twice = orthogonal_project(a, q, passes=2, backend="triton")
    basis = torch.linalg.qr(q.double()).Q

    def left(x: Tensor) -> float:
        return float((x.double() @ basis).norm() / x.double().norm())

    assert left(twice) < 1e-6
    assert left(twice) < left(once)


def test_gradient_of_the_projection() -> None:
    a, q, up = randn(5, 32).requires_grad_(), torch.linalg.qr(randn(32, 4)).Q, randn(5, 32, seed=3)
    (orthogonal_project(a, q, backend="triton") * up).sum().backward()
    torch.testing.assert_close(a.grad, up - up @ q @ q.t(), rtol=1e-5, atol=1e-6)


def test_nothing_to_do() -> None:
    new = [torch.zeros(0, 8, requires_grad=True), torch.zeros(3, 0, requires_grad=True)]
    value = orthogonal_penalty(new, [torch.zeros(2, 8), torch.zeros(2, 0)], backend="triton")
    value.backward()
    assert value == 0
    assert new[0].grad is not None
    assert new[0].grad.shape == (0, 8)
    new = [randn(3, 8).requires_grad_()]
    orthogonal_penalty(new, [None], backend="triton").backward()
    assert new[0].grad is not None
    assert not new[0].grad.any()


def test_bits_are_equal_twice() -> None:
    new, past = ragged(torch.float32, torch.float32)
    first = orthogonal_penalty(new, past, reduction="none", backend="triton")
    assert torch.equal(first, orthogonal_penalty(new, past, reduction="none", backend="triton"))


def test_float64_is_not_for_the_kernels() -> None:
    with pytest.raises(ValueError, match="backend='triton' computes in float32"):
        orthogonal_penalty([torch.zeros(2, 3).double()], [None], backend="triton")
