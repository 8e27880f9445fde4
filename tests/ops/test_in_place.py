"""combine_ and combine_many_: the bits of the forms that return a tensor, written over the base."""

from __future__ import annotations

import re

import nasty
import pytest
import torch
from test_combine import POLICIES, call
from test_registration import TIES, numbers

from cl_fast.ops import Policy, combine, combine_, combine_many, combine_many_

IN_PLACE = [name for name, policy in POLICIES.items() if policy.difference]


@pytest.mark.parametrize("name", IN_PLACE)
def test_the_same_bits_in_place(name: str, backend: str) -> None:
    for n, dtype in ((0, torch.bfloat16), (1, torch.float16), (5000, torch.bfloat16),
                     (70_001, torch.float32)):  # fmt: skip
        base, tensors = nasty.models("normal", n, 3, dtype)
        want = combine(base, tensors, backend="eager", **call(name, base, tensors))
        before = [t.clone() for t in tensors]
        out = combine_(base, tensors, backend=backend, **call(name, base, tensors))
        assert out is base
        assert torch.equal(base, want)
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("name", IN_PLACE)
def test_not_finite_in_place(name: str, backend: str) -> None:
    """Where a block is worked off a second time, its base is still the one that was given."""
    base, tensors = nasty.models("normal", 7000, 3)
    tensors[1][3] = float("nan")
    tensors[2][5000] = float("inf")
    want = combine(base, tensors, backend="eager", **call(name, base, tensors))
    combine_(base, tensors, backend=backend, **call(name, base, tensors))
    assert torch.equal(base.isnan(), want.isnan())
    assert torch.equal(base[~base.isnan()], want[~want.isnan()])


def test_many_bases(backend: str) -> None:
    models = [nasty.models("normal", n, 2) for n in (100, 0, 17, 3000)]
    bases, rows = [base for base, _ in models], [tensors for _, tensors in models]
    arguments = {"weights": [1.0, 0.5], "policy": TIES, "density": 0.3}
    want = combine_many(bases, rows, **arguments)
    combine_many_(bases, rows, backend=backend, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(bases, want, strict=True))


def test_what_is_not_contiguous(backend: str) -> None:
    base, tensors = nasty.models("normal", 600, 3)
    want = combine(base.view(20, 30).t(), [t.view(20, 30).t() for t in tensors], weights=0.5)
    wide = torch.full((20, 31), 7.0, dtype=base.dtype)
    wide[:, :30] = base.view(20, 30)
    combine_(wide[:, :30].t(), [t.view(20, 30).t() for t in tensors], weights=0.5, backend=backend)
    assert torch.equal(wide[:, :30].t(), want)
    assert (wide[:, 30] == 7.0).all()


def test_without_naming_a_backend() -> None:
    base, tensors = nasty.models("normal", 600, 3)
    want = combine(base, tensors, weights=0.5)
    assert torch.equal(combine_(base, tensors, weights=0.5), want)


X = torch.arange(20.0)


@pytest.mark.parametrize(
    ("base", "tensors", "words"),
    [
        (X[:8], [X[4:12]], "tensors[0] must not overlap base in memory"),
        (X[4:12], [X[12:20], X[:8]], "base must not overlap tensors[1] in memory"),
        (X[::2], [X[1::2]], "must not overlap"),
        (torch.zeros(1).expand(8), [X[:8]], "base must not overlap itself"),
    ],
)
def test_overlap_is_refused(
    base: torch.Tensor, tensors: list[torch.Tensor], words: str, backend: str
) -> None:
    before = X.clone()
    for chosen in (backend, None):
        with pytest.raises(ValueError, match=re.escape(words)):
            combine_(base, tensors, weights=1.0, backend=chosen)
    assert torch.equal(X, before)


def test_overlap_of_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="base of row 1 must not overlap base of row 0"):
        combine_many_([X[:8], X[7:15]], [[X[15:19].repeat(2)]] * 2, weights=1.0)
    one = X[15:20]
    combine_many_([X[:5].clone(), X[5:10].clone()], [[one], [one]], weights=1.0)  # only read


def test_bad_input_in_place() -> None:
    with pytest.raises(ValueError, match="base has no effect with policy"):
        combine_(X[:4], [X[4:8]], weights=1.0, policy=Policy(difference=False))
    with pytest.raises(TypeError, match="out_dtype must be one of bfloat16, float16, float32"):
        combine_(X[:4].to(torch.float8_e4m3fn), [X[4:8]], weights=1.0)
    with pytest.raises(ValueError, match="bases must hold at least one tensor"):
        combine_many_([], [[X]], weights=1.0)


def test_a_base_that_autograd_watches_is_refused() -> None:
    base = torch.zeros(4, requires_grad=True)
    with pytest.raises(ValueError, match=r"requires grad.*torch.no_grad\(\)"):
        combine_(base, [X[:4]], weights=1.0)
    with torch.no_grad():
        combine_(base, [X[:4]], weights=1.0)
    assert torch.equal(base.detach(), X[:4])


def test_opcheck_and_compile() -> None:
    base, tensors = nasty.models("normal", 40, 3)
    arguments = ([base], tensors, 3, *numbers(TIES, 3)[:-1])
    torch.library.opcheck(torch.ops.cl_fast.combine_many_, arguments)

    def step(base: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        base = base + 0.0
        combine_(base, [a, b], weights=0.5, policy=TIES, density=0.3)
        return base * 2.0

    base, (a, b) = nasty.models("normal", 500, 2)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(base, a, b), step(base, a, b))
