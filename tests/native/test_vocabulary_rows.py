"""Rows of logits in the core, on every instruction set.

The oracle is the reference in float64. The bound: twice the error of the reference in float32 on
the same numbers, and one rounding (or as many as said) of the largest number of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cl_fast.backends import vocabulary_ops
from cl_fast.ops import vocabulary_rows as reference
from cl_fast.ops.vocabulary_rows import KINDS, Extra, How

ULP = 2.0**-23
INF, NAN = math.inf, math.nan
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, BF16), (F16, F32), (F32, BF16)]
HOWS = {
    "plain": (How(), How()),
    "temperatures": (How(temperature=2.0), How(temperature=1.3)),
    "softcap": (How(scale=0.5, softcap=30.0, temperature=1.5), How(scale=0.25)),
    "falling": (How(scale=-0.5), How(probs=True, temperature=1.2)),
}
MIX = 0.3


class Case(NamedTuple):
    student: Tensor
    teacher: Tensor
    how_s: How
    how_t: How
    grad: Tensor
    extra_grad: Tensor
    ids: Tensor


class Everything(NamedTuple):
    losses: Tensor
    stats: Tensor
    gradient: Tensor
    both: Tensor
    """With a cross-entropy added."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(
    dtypes: tuple[torch.dtype, torch.dtype],
    hows: tuple[How, How] = HOWS["plain"],
    rows: int = 6,
    columns: int = 1037,
    lacking: int = 5,
    std: float = 30.0,
) -> Case:
    """Peaked rows; the teacher lacks the last columns, and each side excludes an id."""
    g = generator(rows * columns)
    student = (torch.randn(rows, columns, generator=g) * std).to(dtypes[0])
    teacher = torch.randn(rows, max(1, columns - lacking), generator=g) * std
    if hows[1].probs:
        teacher = (teacher / 8).softmax(1)
    if columns > 20:
        student[0, 3] = INF if hows[0].scale < 0 else -INF
        teacher[1, 5] = 0 if hows[1].probs else -INF
        teacher[1, 6:9] = 3e-40 if hows[1].probs else -120.0
    grad = torch.randn(rows, generator=g)
    extra = torch.randn(rows, generator=g)
    ids = torch.randint(0, columns, (rows,), generator=g)
    if rows > 4:
        grad[2], extra[3], ids[4] = 0, 0, -1
    return Case(student, teacher.to(dtypes[1]), *hows, grad, extra, ids)


def compute(rows: Any, case: Case, kind: str, wide: bool = False, out: torch.dtype = F32) -> Any:
    student, teacher = case.student, case.teacher
    if wide:
        student, teacher, out = student.double(), teacher.double(), torch.float64
    how_s, how_t = case.how_s, case.how_t
    losses, stats = rows.divergence_forward(student, teacher, kind, MIX, how_s, how_t)
    normal = rows.normalisers(student, how_s._replace(temperature=1.0))
    extra = Extra(case.extra_grad, normal, case.ids)
    gradient, both = (torch.full(student.shape, 7.0, dtype=out) for _ in range(2))
    same = (student, teacher, stats, kind, MIX, how_s, how_t)
    rows.divergence_gradient(gradient, case.grad, *same)
    rows.divergence_gradient(both, case.grad, *same, extra=extra)
    return Everything(losses, stats, gradient, both)


def error(got: Tensor, exact: Tensor) -> Tensor:
    """Of each column; infinite where one is infinite or NaN and the other is not."""
    got, exact = got.double(), exact.double()
    away = torch.where((got == exact) | (got.isnan() & exact.isnan()), 0, (got - exact).abs())
    away = away.nan_to_num(nan=INF)
    return away.amax(0) if away.size(0) else away.new_zeros(away.shape[1:])


def check(got: Tensor, plain: Tensor, exact: Tensor, roundings: float = 1.0) -> None:
    if got.ndim == 2 and got.size(1) > 5:  # a gradient: its columns are alike
        got, plain, exact = (x.reshape(-1, 1) for x in (got, plain, exact))
    size = torch.where(exact.isfinite(), exact.abs(), 0).amax(0)
    bound = 2 * error(plain, exact) + roundings * ULP * size.clamp(min=1e-30)
    assert (error(got, exact) <= bound).all(), (error(got, exact), error(plain, exact))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("how", HOWS)
def test_divergences(
    core: ModuleType, kind: str, dtypes: tuple[torch.dtype, torch.dtype], how: str
) -> None:
    case = make(dtypes, HOWS[how])
    if kind in ("forward_kl", "reverse_kl"):
        # An id that one side excludes would make this infinite, which has a test of its own.
        side = case.student if kind == "forward_kl" else case.teacher
        side[0, 3] = side[1, 5] = 0.25
        if kind == "reverse_kl":
            case = case._replace(student=case.student[:, : case.teacher.size(1)])
            case = case._replace(ids=case.ids.clamp(max=case.student.size(1) - 1))
    got = compute(vocabulary_ops.of(core), case, kind)
    plain = compute(reference, case, kind)
    exact = compute(reference, case, kind, wide=True)
    assert exact.losses.isfinite().all()
    # tanh is good to 2 ulp, and a slope at a large logit hangs on it
    roundings = 4.0 if how == "softcap" else 1.0
    check(got.losses, plain.losses, exact.losses, roundings)
    check(got.stats, plain.stats, exact.stats, roundings)
    for mine, theirs, true in zip(got[2:], plain[2:], exact[2:], strict=True):
        check(mine, theirs, true, roundings)
    assert not got.gradient[2].any()


@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 1023, 1024, 1025, 2065])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_columns(core: ModuleType, kind: str, columns: int) -> None:
    case = make((BF16, F32), columns=columns, lacking=0, std=3.0)
    if kind in ("forward_kl", "reverse_kl"):
        case.student[case.student == -INF] = 0
        case.teacher[case.teacher == -INF] = 0
    got = compute(vocabulary_ops.of(core), case, kind)
    plain = compute(reference, case, kind)
    exact = compute(reference, case, kind, wide=True)
    for mine, theirs, true in zip(got, plain, exact, strict=True):
        check(mine, theirs, true, 2.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32), (F32, F16)])
@pytest.mark.parametrize("how", [How(), How(temperature=1.7), How(scale=0.5, softcap=30.0)])
def test_a_row_equal_to_its_teacher_gives_exactly_0(
    core: ModuleType, kind: str, dtypes: tuple[torch.dtype, torch.dtype], how: How
) -> None:
    x = (torch.randn(5, 1037, generator=generator(1)) * 30).to(BF16).half().to(BF16)
    if not how.softcap:
        x[1, 7] = -INF
    rows = vocabulary_ops.of(core)
    student, teacher = x.to(dtypes[0]), x.to(dtypes[1])
    losses, stats = rows.divergence_forward(student, teacher, kind, MIX, how, how)
    out = torch.full(x.shape, 7.0)
    rows.divergence_gradient(out, torch.ones(5), student, teacher, stats, kind, MIX, how, how)
    assert not losses.any()
    assert not stats[:, 4].any()
    assert not out.any()


@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_parts_of_the_vocabulary(core: ModuleType, kind: str) -> None:
    case = make((F32, F32), std=5.0)
    case.student[0, 3] = case.teacher[1, 5] = 0
    if kind == "reverse_kl":
        case = case._replace(student=case.student[:, : case.teacher.size(1)])

    def parts(rows: Any, wide: bool) -> Tensor:
        student, teacher = (x.double() if wide else x for x in (case.student, case.teacher))
        normal_s = rows.normalisers(student, How())
        normal_t = rows.normalisers(teacher, How())
        total = torch.zeros(student.size(0), 2, dtype=torch.float64)
        for first, last in ((0, 400), (400, 1031), (1031, 1033), (1033, 1037)):
            total += rows.divergence_sums(
                student[:, first:last],
                teacher[:, first:last],  # none at all in the last part
                normal_s,
                normal_t,
                kind,
                MIX,
                How(),
                How(),
            )
        return total

    exact = parts(reference, True)
    check(parts(vocabulary_ops.of(core), False), parts(reference, False), exact, 4.0)
    whole, stats = reference.divergence_forward(
        case.student.double(), case.teacher.double(), kind, MIX, How(), How()
    )
    assert torch.allclose(exact[:, 0], whole)
    assert torch.allclose(exact[:, 1], stats[:, 4])


@pytest.mark.parametrize("std", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("columns", [32_000, 262_144])
def test_long_rows(core: ModuleType, std: float, columns: int) -> None:
    g = generator(columns)
    student, teacher = (torch.randn(3, columns, generator=g) * std for _ in range(2))
    ids = torch.tensor([0, columns - 1, 77])
    rows = vocabulary_ops.of(core)
    for kind in KINDS:
        inputs = (kind, MIX, How(), How())
        exact = reference.divergence_forward(student.double(), teacher.double(), *inputs)
        plain = reference.divergence_forward(student, teacher, *inputs)
        got = rows.divergence_forward(student, teacher, *inputs)
        for mine, theirs, true in zip(got, plain, exact, strict=True):
            check(mine, theirs, true)
        if kind in ("forward_kl", "reverse_kl") and std < 1:
            # The loss of nearly equal rows is not lost in the rounding of their log-probs.
            assert error(got[0], exact[0]) <= 0.01 * exact[0].max()
    exact = reference.logprob_forward(student.double(), ids, How())
    check(
        rows.logprob_forward(student, ids, How()),
        reference.logprob_forward(student, ids, How()),
        exact,
    )


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("how", [How(), How(temperature=1.3), How(-0.5, 30.0, 2.0)])
@pytest.mark.parametrize("entropy", [False, True])
def test_logprobs(core: ModuleType, dtype: torch.dtype, how: How, entropy: bool) -> None:
    case = make((dtype, dtype), (how, How()))
    x, ids = case.student, case.ids
    if how.scale < 0:
        x[0, 3] = 0

    def both(rows: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        stats = rows.logprob_forward(x, ids, how)
        out = torch.full(x.shape, 7.0, dtype=stats.dtype)
        e = case.extra_grad if entropy else None
        rows.logprob_gradient(out, case.grad, e, x, ids, stats, how)
        return stats, out

    got, plain = both(vocabulary_ops.of(core), x), both(reference, x)
    exact = both(reference, x.double())
    for mine, theirs, true in zip(got, plain, exact, strict=True):
        check(mine, theirs, true, 4.0 if how.softcap else 1.0)
    if not entropy:
        assert not got[1][2].any()


def test_an_id_beyond_the_row_is_refused(core: ModuleType) -> None:
    x, ids = torch.randn(2, 5), torch.tensor([0, 5])
    rows = vocabulary_ops.of(core)
    with pytest.raises(IndexError, match=r"ids\[1\] is 5, but the rows have 5 columns"):
        rows.logprob_forward(x, ids, How())
    with pytest.raises(IndexError, match="the rows have 5 columns"):
        rows.logprob_gradient(x, torch.ones(2), None, x, ids, torch.ones(2, 4), How())
    extra = Extra(torch.ones(2), torch.ones(2, 2), ids)
    with pytest.raises(IndexError, match="the rows have 5 columns"):
        rows.divergence_gradient(
            x, torch.ones(2), x, x, torch.ones(2, 5), "jsd", MIX, How(), How(), extra
        )


def padded(x: Tensor) -> Tensor:
    """The same numbers, rows further apart."""
    return torch.nn.functional.pad(x, (3, 4))[:, 3 : 3 + x.size(1)]


def across(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


@pytest.mark.parametrize("layout", [padded, across])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_layouts(core: ModuleType, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    rows = vocabulary_ops.of(core)
    case = make((dtype, F32))
    laid = case._replace(student=layout(case.student), teacher=layout(case.teacher))
    want, got = compute(rows, case, "jsd"), compute(rows, laid, "jsd")
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    around = layout(torch.full(case.student.shape, 7.0, dtype=dtype))
    same = (want.stats, "jsd", MIX, How(), How())
    rows.divergence_gradient(around, case.grad, laid.student, laid.teacher, *same)
    assert torch.equal(around, want.gradient.to(dtype))
    if layout is padded:
        whole = around.as_strided((6, 1044), (1044, 1), 0)
        assert not whole[:, :3].any()
        assert not whole[:, -4:].any()
    one = case.student[:1].expand(6, -1)  # rows that lie in one place
    a = rows.divergence_forward(one, case.teacher, "jsd", MIX, How(), How())
    b = rows.divergence_forward(one.contiguous(), case.teacher, "jsd", MIX, How(), How())
    assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("how", [How(), How(softcap=30.0, temperature=2.0)])
def test_in_place(core: ModuleType, dtype: torch.dtype, how: How) -> None:
    rows = vocabulary_ops.of(core)
    for kind in KINDS:
        case = make((dtype, dtype), (how, how))
        want = compute(rows, case, kind, out=dtype)
        normal = rows.normalisers(case.student, how._replace(temperature=1.0))
        extra = Extra(case.extra_grad, normal, case.ids)
        x = case.student
        same = (case.teacher, want.stats, kind, MIX, how, how, extra)
        rows.divergence_gradient(x, case.grad, x, *same)
        assert torch.equal(x.nan_to_num(), want.both.nan_to_num())
    x = make((dtype, dtype)).student
    stats = rows.logprob_forward(x, case.ids, how)
    apart = torch.empty_like(x)
    rows.logprob_gradient(apart, case.grad, case.extra_grad, x, case.ids, stats, how)
    rows.logprob_gradient(x, case.grad, case.extra_grad, x, case.ids, stats, how)
    assert torch.equal(x, apart)


def test_an_output_that_crosses_an_input(core: ModuleType) -> None:
    rows = vocabulary_ops.of(core)
    case = make((F32, F32))
    want = compute(rows, case, "tvd")
    whole = torch.zeros(7, 1037)
    whole[:6] = case.student
    same = (case.teacher, want.stats, "tvd", MIX, How(), How())
    rows.divergence_gradient(whole[1:], case.grad, whole[:6], *same)
    assert torch.equal(whole[1:], want.gradient)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_stays_in_its_row_and_is_not_hidden(core: ModuleType, kind: str, side: str) -> None:
    rows = vocabulary_ops.of(core)
    case = make((F32, BF16))
    # whatever a NaN carries: one that reads 1 where an integer would be
    nan = torch.tensor([0x7FC00001, 0x7F800003, -0x003FFF81], dtype=torch.int32).view(F32)
    for column, number in zip((0, 1000, 1030), nan, strict=True):
        clean = compute(rows, case, kind)
        dirty = case._replace(student=case.student.clone(), teacher=case.teacher.clone())
        rows_of_side = getattr(dirty, side)
        rows_of_side[torch.tensor([2, 5]), column] = number.to(rows_of_side.dtype)
        got = compute(rows, dirty, kind)
        assert got.losses[[2, 5]].isnan().all()
        assert got.gradient[5].isnan().any()
        assert not got.gradient[2].any()  # a row without a gradient is not looked at
        for mine, theirs in zip(got, clean, strict=True):
            others = [0, 1, 3, 4]
            assert torch.equal(mine[others].nan_to_num(), theirs[others].nan_to_num())


@pytest.mark.parametrize("depth", [3.0, 95.0, 300.0])
def test_what_only_one_side_excludes(core: ModuleType, depth: float) -> None:
    """The other side's probability is not 0, even where float32 holds it no more."""
    rows = vocabulary_ops.of(core)
    x, y = torch.zeros(2, 40), torch.zeros(2, 40)
    x[0, 9] = y[1, 9] = -INF
    x[1, 9] = y[0, 9] = -depth
    loss = {k: rows.divergence_forward(x, y, k, MIX, How(), How())[0] for k in KINDS}
    assert loss["forward_kl"][0] == INF
    assert loss["forward_kl"][1].isfinite()
    assert loss["reverse_kl"][0].isfinite()
    assert loss["reverse_kl"][1] == INF
    assert all(loss[k].isfinite().all() for k in KINDS[2:])
    for kind in KINDS:
        both = rows.divergence_forward(x[:1], x[:1], kind, MIX, How(), How())
        assert not both[0].any()


def test_no_rows(core: ModuleType) -> None:
    rows = vocabulary_ops.of(core)
    x = torch.empty(0, 9)
    losses, stats = rows.divergence_forward(x, x, "jsd", MIX, How(), How())
    assert losses.shape == (0,)
    assert stats.shape == (0, 5)
    rows.divergence_gradient(x, losses, x, x, stats, "jsd", MIX, How(), How())
    ids = torch.empty(0, dtype=torch.int64)
    assert rows.logprob_forward(x, ids, How()).shape == (0, 4)


def everything(rows: Any, hows: list[str], number: int) -> list[Tensor]:
    found: list[Tensor] = []
    for how in (HOWS[name] for name in hows):
        case = make((F32, BF16), how, rows=number)
        for kind in KINDS:
            found += compute(rows, case, kind)
        found.append(rows.logprob_forward(case.student, case.ids, how[0]))
    return [x.nan_to_num() for x in found]


def test_the_same_bits_on_every_instruction_set(core: ModuleType) -> None:
    got = everything(vocabulary_ops.of(core), list(HOWS), 20)
    before = core.isa()
    core.set_isa("portable")
    want = everything(vocabulary_ops.of(core), list(HOWS), 20)
    core.set_isa(before)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_any_number_of_threads(core: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for threads in ("1", "3"):
        monkeypatch.setenv("CL_FAST_THREADS", threads)
        # a thread takes 65536 numbers at a time, here 63 rows
        found.append(everything(vocabulary_ops.of(core), ["plain"], 150))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def ulps(got: Tensor, exact: Tensor) -> float:
    spacing = 2.0 ** (exact.abs().frexp()[1] - 24).double()
    return float(((got.double() - exact).abs() / spacing.clamp(min=2.0**-149)).max())


def test_elementary_functions(core: ModuleType) -> None:
    rows = vocabulary_ops.of(core)
    g = generator(3)
    x = -torch.rand(1, 20_000, generator=g) * torch.logspace(-6, 1.94, 20_000)
    out = torch.empty_like(x)
    stats = torch.zeros(1, 4)
    nothing = torch.tensor([-1])
    rows.logprob_gradient(out, torch.tensor([-1.0]), None, x, nothing, stats, How())
    assert ulps(out, x.double().exp()) <= 1.5
    # A row of one column: its maximum is the value.
    p = torch.cat([torch.logspace(-44.5, 38, 9_000), 1 + 0.1 * torch.randn(9_000, generator=g)])
    value = rows.normalisers(p[:, None], How(probs=True))[:, 0]
    assert ulps(value, p.double().log()) <= 1.5
    y = torch.randn(20_000, generator=g) * torch.logspace(-6, 1, 20_000)
    value = rows.normalisers(y[:, None], How(softcap=1.0))[:, 0]
    assert ulps(value, y.double().tanh()) <= 2.5
    nasty = torch.tensor([0.0, -0.0, INF, -1.0, NAN])[:, None]
    value = rows.normalisers(nasty, How(probs=True))
    assert value[:3, 0].tolist() == [-INF, -INF, INF]
    assert value[3:, 1].isnan().all()
