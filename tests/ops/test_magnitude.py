"""magnitude_threshold against a sort."""

from __future__ import annotations

import re

import nasty
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_fast.ops import magnitude_threshold
from cl_fast.ops.magnitude import kept_by_code, magnitude_codes, select_code


def by_sorting(values: torch.Tensor, k: int, ties: str) -> tuple[float, int]:
    size = values.abs().reshape(-1)
    t = size.sort(descending=True).values[k - 1].item()
    at = {
        "first": k - int((size > t).sum()),
        "all": int((size == t).sum()),
        "none": 0,
    }
    return t, at[ties]


@pytest.mark.parametrize("ties", ["first", "all", "none"])
@pytest.mark.parametrize("dtype", nasty.DTYPES)
@pytest.mark.parametrize("kind", nasty.KINDS)
def test_exact(kind: str, dtype: torch.dtype, ties: str, backend: str) -> None:
    for n in (1, 2, 17, 1000, 70_001):
        base, (x,) = nasty.models(kind, n, 1, dtype)
        for k in {1, max(1, n // 5), max(1, n // 2), n}:
            for given_base, values in ((None, x.float()), (base, x.float() - base.float())):
                t, at = magnitude_threshold(x, k=k, base=given_base, ties=ties, backend=backend)
                assert t.dtype == torch.float32
                assert at.dtype == torch.int64
                assert (t.item(), at.item()) == by_sorting(values, k, ties), (n, k)


def test_fp8_and_mixed_base(backend: str) -> None:
    x = torch.randn(500).to(torch.float8_e4m3fn)
    base = torch.randn(500).half()
    t, at = magnitude_threshold(x, k=100, base=base, backend=backend)
    assert (t.item(), at.item()) == by_sorting(x.float() - base.float(), 100, "first")


def test_density_rules(backend: str) -> None:
    x = torch.arange(1.0, 11.0)

    def threshold(density: float, count: str) -> float:
        return magnitude_threshold(x, density=density, count=count, backend=backend)[0].item()

    assert threshold(0.35, "at_least_one") == 8.0
    assert threshold(0.01, "at_least_one") == 10.0
    assert threshold(0.01, "floor") == float("inf")
    assert threshold(0.35, "floor_plus_one") == 7.0
    assert threshold(1.0, "floor") == 1.0


def test_nothing_to_keep(backend: str) -> None:
    for x, asked in ((torch.randn(5), {"k": 0}), (torch.zeros(0), {"density": 0.5})):
        t, at = magnitude_threshold(x, **asked, backend=backend)
        assert (t.item(), at.item()) == (float("inf"), 0)


def test_nan_comes_first(backend: str) -> None:
    x = torch.tensor([1.0, float("nan"), float("inf"), -3.0])
    assert magnitude_threshold(x, k=2, backend=backend)[0].item() == float("inf")
    assert magnitude_threshold(x, k=1, backend=backend)[0].isnan()


def test_strides_and_point(backend: str) -> None:
    x = torch.randn(20, 30)
    want = magnitude_threshold(x.t().contiguous(), k=50, backend=backend)
    got = magnitude_threshold(x.t(), k=50, backend=backend)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert magnitude_threshold(x[0, 0], k=1, backend=backend)[0] == x[0, 0].abs()


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(
        st.lists(st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0])),
        min_size=1,
        max_size=4,
    ),
    share=st.floats(0.0, 1.0),
)
def test_selection_over_parts(parts: list[list[float]], share: float) -> None:
    codes = [magnitude_codes(torch.tensor(part, dtype=torch.float32)) for part in parts]
    whole = torch.cat(codes)
    k = int(share * whole.numel())
    code = select_code(codes, k)
    if k == 0:
        assert code == -1
        return
    assert code == whole.sort(descending=True).values[k - 1]
    mask, at = kept_by_code(whole, code, k, "first")
    assert int(mask.sum()) == k
    assert at >= 1
    tied = (whole == code).nonzero().reshape(-1)
    assert mask[tied[:at]].all()
    assert not mask[tied[at:]].any()


X = torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ValueError, "exactly one of density and k"),
        ({"k": 1, "density": 0.5}, ValueError, "exactly one of density and k"),
        ({"k": 5}, ValueError, "k must be in 0 .. 4, the number of elements of x; got 5"),
        ({"k": -1}, ValueError, "k must be in 0 .. 4"),
        ({"density": 0.0}, ValueError, "density must be in (0, 1]; got 0.0"),
        ({"density": 1.1}, ValueError, "density must be in (0, 1]; got 1.1"),
        ({"k": 1, "ties": "last"}, ValueError, "ties must be one of 'first', 'all', 'none'"),
        ({"k": 1, "x": X.double()}, TypeError, "x must have one of the dtypes"),
        ({"k": 1, "base": X.long()}, TypeError, "base must have one of the dtypes"),
        ({"k": 1, "base": X[:2]}, ValueError, "base must have the shape of x, (4,); got (2,)"),
        ({"density": 0.5, "count": "ceil"}, ValueError, "must be one of"),
    ],
)
def test_bad_input(arguments: dict, error: type[Exception], words: str, backend: str) -> None:
    rest = {name: value for name, value in arguments.items() if name != "x"}
    for chosen in (backend, None):
        with pytest.raises(error, match=re.escape(words)):
            magnitude_threshold(arguments.get("x", X), **rest, backend=chosen)
