"""The update whose bits do not depend on the order of sums: against exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl_fast.ops import rank_update_, reproducible
from cl_fast.ops.reproducible import reproducible_update_

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def drawn(m: int, n: int, r: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    base, u, v = (torch.randn(*size, generator=draw) for size in ((m, n), (m, r), (n, r)))
    return base, u, v


@settings(max_examples=15)
@given(
    st.sampled_from(DTYPES),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 40),
    st.integers(0, 99),
    st.sampled_from([0.0, 12.0, 30.0]),
)
def test_it_is_the_exact_sum_rounded(
    dtype: torch.dtype, m: int, n: int, r: int, seed: int, spread: float
) -> None:
    base, u, v = drawn(m, n, r, seed)
    base = base.to(dtype)
    # Columns of very different sizes whose products are alike, as keys and values may be.
    scales = torch.exp2(torch.linspace(-spread, spread, r).round())
    u, v = u.double() * 1.1 * scales, v.double() / 1.3 / scales  # all 53 bits
    weight = torch.empty(m, n, dtype=dtype)
    assert reproducible_update_(weight, u, v, base=base) is weight
    for i in range(m):
        for j in range(n):
            exact = Fraction(base[i, j].item()) + sum(
                Fraction(a) * Fraction(b) for a, b in zip(u[i].tolist(), v[j].tolist(), strict=True)
            )
            place = math.frexp(float(exact))[1]
            bits = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}[dtype]
            lowest = -13 if dtype == torch.float16 else -125
            ulp = Fraction(2) ** (max(place, lowest) - bits)
            # Half of the last place, and what float32 in between and the left out part may move.
            slack = ulp * Fraction(1, 2**12) if dtype != torch.float32 else ulp * Fraction(1, 2**7)
            assert abs(Fraction(weight[i, j].item()) - exact) <= ulp / 2 + slack


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [3, 700, 4500])
def test_the_order_of_columns_threads_and_blocks_changes_no_bit(
    dtype: torch.dtype, r: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, u, v = drawn(37, 53, r)
    base = base.to(dtype)
    # Large products that cancel: in float64 what an order leaves of them would be seen.
    third = r // 3
    u, v = u * 2.0**18, v * 2.0**18
    u[:, third : 2 * third], v[:, third : 2 * third] = -u[:, :third], v[:, :third]
    u[:, 2 * third :], v[:, 2 * third :] = (
        u[:, 2 * third :] * 2.0**-18,
        v[:, 2 * third :] * 2.0**-18,
    )
    wanted = reproducible_update_(torch.empty_like(base), u, v, base=base)
    order = torch.randperm(r, generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    again = []
    for count in (1, 3):
        torch.set_num_threads(count)
        again.append(
            reproducible_update_(torch.empty_like(base), u[:, order], v[:, order], base=base)
        )
    torch.set_num_threads(threads)
    monkeypatch.setattr(reproducible, "_BLOCK", 200)
    again.append(reproducible_update_(torch.empty_like(base), u, v, base=base))
    again.append(reproducible_update_(base.clone(), u, v))
    assert [torch.equal(wanted, other) for other in again] == [True] * 4


def test_it_rounds_as_rank_update_does() -> None:
    """Products that float32 sums exactly: both have one answer."""
    draw = torch.Generator().manual_seed(0)
    u, v = (torch.randint(-8, 9, (20, 6), generator=draw).float() for _ in range(2))
    for dtype in (torch.bfloat16, torch.float16):
        base = torch.randn(20, 20, generator=draw).to(dtype)
        for rounding in ("nearest", "stochastic"):
            ours, theirs = torch.empty_like(base), torch.empty_like(base)
            reproducible_update_(ours, u / 64, v, base=base, rounding=rounding, seed=5)
            rank_update_(theirs, u / 64, v, base=base, rounding=rounding, seed=5)
            assert torch.equal(ours, theirs)
    assert torch.equal(reproducible_update_(ours, u[:, :0], v[:, :0], base=-base * 0), -base * 0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": torch.zeros(4, 3, dtype=torch.float64)}, TypeError, "got torch.float64"),
        ({"u": torch.zeros(4, 3)}, ValueError, r"v must have the shape \(3, 3\)"),
        ({"u": torch.zeros(3, 2)}, ValueError, r"u must have the shape \(4, 2\).*\(3, 2\)"),
        ({"v": torch.full((3, 2), math.inf)}, ValueError, "v holds NaN or infinite"),
        ({"rounding": "stochastic"}, ValueError, "bfloat16 or float16"),
    ],
)
def test_calls_that_are_refused(
    change: dict[str, object], error: type[Exception], words: str
) -> None:
    given: dict[str, object] = {
        "weight": torch.zeros(4, 3), "u": torch.zeros(4, 2), "v": torch.zeros(3, 2),
    }  # fmt: skip
    given |= change
    with pytest.raises(error, match=words):
        reproducible_update_(given.pop("weight"), given.pop("u"), given.pop("v"), **given)  # type: ignore[arg-type]
