"""agem_ against the formula in float64."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_fast.training.agem import agem_


@given(st.integers(0, 2**31))
def test_formula(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 2), (4,), ()]
    g, r = ([torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
            for _ in range(2))  # fmt: skip
    flat_g, flat_r = (torch.cat([x.flatten() for x in xs]) for xs in (g, r))
    dot = flat_g @ flat_r
    want = flat_g - dot / (flat_r @ flat_r) * flat_r if dot < 0 else flat_g
    assert agem_(g, r) == bool(dot < 0)
    got = torch.cat([x.flatten() for x in g])
    torch.testing.assert_close(got, want)
    assert float(got @ flat_r) >= -1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    r = [torch.randn(1000, generator=generator).to(dtype)]
    g = [(torch.randn(1000, generator=generator) - 0.5 * r[0].float()).to(dtype)]
    flat, ref = g[0].double(), r[0].double()
    want = flat - (flat @ ref) / (ref @ ref) * ref
    assert agem_(g, r)
    error = (g[0].double() - want).abs().max()
    assert error <= 2 * (want.to(dtype).double() - want).abs().max() + 1e-6


X = torch.ones(3)


@pytest.mark.parametrize(
    ("grads", "reference", "words"),
    [
        ([X], [], "reference must hold one tensor for each of the 1 of grads; got 0"),
        ([X], [X[:2]], "reference[0] must have the shape of grads[0], (3,); got (2,)"),
        ([X * float("nan")], [X], "hold NaN or infinity"),
        ([X * float("inf")], [X], "hold NaN or infinity"),
    ],
)
def test_bad_input(grads: Any, reference: Any, words: str) -> None:
    before = [g.clone() for g in grads]
    with pytest.raises(ValueError, match=re.escape(words)):
        agem_(grads, reference)
    torch.testing.assert_close(grads, before, equal_nan=True)
