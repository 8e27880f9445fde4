"""Exact selection against a sort, in the interpreter."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from cl_fast.triton_kernels import magnitude
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
import nasty

EVERYTHING, NOTHING = -1, 0x7FFFFFFF


def codes_of(base: Tensor | None, x: Tensor) -> Tensor:
    d = x.float() if base is None else x.float() - base.float()
    # Conversions of float16 give NaN different low bits; all of them are one value here.
    d = torch.where(d.isnan(), torch.tensor(0x7FC00000).int().view(torch.float32), d)
    return d.abs().contiguous().view(torch.int32).to(torch.int64).reshape(-1)


def by_sorting(codes: Tensor, k: int) -> int:
    return int(codes.sort(descending=True).values[k - 1])


def check_entry(
    codes: Tensor, k: int, ties: str, got: tuple[int, int, int], size: int | None = None
) -> None:
    """`got` against a sort of `codes` and a walk over the ties."""
    code, cut, at = got
    if k == -1:
        assert got == (EVERYTHING, 0, 0)
        return
    if k == 0:
        assert got == (NOTHING, 0, 0)
        return
    assert code == by_sorting(codes, k)
    tied = (codes == code).nonzero().reshape(-1)
    above = int((codes > code).sum())
    if ties == "none":
        assert (cut, at) == (0, 0)
    elif ties == "all":
        assert cut >= (codes.numel() if size is None else size)
        assert at == tied.numel()
    else:
        assert at == k - above
        index = torch.arange(codes.numel())
        kept = (codes > code) | ((codes == code) & (index < cut))
        assert int(kept.sum()) == k
        assert kept[tied[:at]].all()
        assert not kept[tied[at:]].any()
        assert cut <= codes.numel()


def check(
    bases: Sequence[Tensor], tensors: Sequence[Tensor], models: int, counts: list[int], ties: str
) -> None:
    found = magnitude.select(bases, tensors, models, counts, whole_model=False, ties=ties)
    codes, cuts, at = found
    assert [x.dtype for x in found] == [torch.int32, torch.int64, torch.int64]
    for entry, (x, k) in enumerate(zip(tensors, counts, strict=True)):
        base = bases[entry // models] if bases else None
        got = int(codes[entry]), int(cuts[entry]), int(at[entry])
        check_entry(codes_of(base, x), k, ties, got)


def counts_for(n: int) -> list[int]:
    return [k for k in (-1, 0, 1, 2, n // 5, n // 2, n - 1, n) if k <= n]


@pytest.mark.parametrize("kind", nasty.KINDS)
def test_kinds(kind: str) -> None:
    """Many rows in one call: three dtypes, each length with many counts."""
    for based in (False, True):
        bases, tensors, counts = [], [], []
        for dtype in nasty.DTYPES:
            for n in (1, 15, 2047, 4097):
                base, (x,) = nasty.models(kind, n, 1, dtype)
                for k in counts_for(n)[based :: 3 if n > 15 else 4]:
                    bases.append(base)
                    tensors.append(x)
                    counts.append(k)
        ties = ("first", "all", "none")[(nasty.KINDS.index(kind) + based) % 3]
        check(bases if based else [], tensors, 1, counts, ties)


@pytest.mark.parametrize(
    ("kind", "dtype"), [*zip(("normal", "ties", "heavy"), nasty.DTYPES, strict=True)]
)
def test_many_tiles(kind: str, dtype: torch.dtype) -> None:
    """Several programs and tiles per row, two models."""
    n = 70_001
    base, xs = nasty.models(kind, n, 2, dtype)
    check([base], xs, 2, [n // 5, n - 1], "first")
    check([], xs, 2, [40_000, n // 2], "first")


def test_special_values() -> None:
    nan, inf = float("nan"), float("inf")
    smallest = 2.0**-149
    values = [1.0, nan, inf, -3.0, -inf, 0.0, -0.0, smallest, -smallest, 3.0, nan, 65504.0]
    x = torch.tensor(values * 7)
    for dtype in nasty.DTYPES:
        y = x.to(dtype)
        # torch rounds NaN to different bits in the middle and at the end of a tensor
        y[x.isnan()] = torch.tensor([0x7FC00000], dtype=torch.int32).view(torch.float32).to(dtype)
        counts = list(range(-1, y.numel() + 1, 12))
        for ties in ("first", "all", "none"):
            check([], [y] * len(counts), 1, counts, ties)
    zero = torch.zeros(x.numel())
    check([zero], [x] * 3, 3, [3, 20, 50], "first")
    equal = torch.full((30_000,), -0.375, dtype=torch.bfloat16)
    check([], [equal] * 4, 2, [1, 8192, 8193, 29_999], "first")
    # every digit of the code holds the decision
    ladder = (torch.arange(5000, dtype=torch.int32) * 429_496 & 0x7F7FFFFF).view(torch.float32)
    for step in (1, 1 << 9, 1 << 18):
        near = (torch.arange(600, dtype=torch.int32) * step + 0x3F000000).view(torch.float32)
        check([], [near, ladder] * 3, 1, [1, 1, 77, 2500, 600, 5000], "first")


def test_rows_of_any_kind() -> None:
    """Mixed dtypes between and inside rows, empty rows, unaligned views, all in one call."""
    g = torch.Generator().manual_seed(1)

    def row(n: int, *dtypes: torch.dtype, skip: int = 0) -> list[Tensor]:
        wide = [torch.randn(n + skip, generator=g) for _ in dtypes]
        return [
            (x * 8).round().div(8).to(dtype)[skip:] for x, dtype in zip(wide, dtypes, strict=True)
        ]

    bf16, fp16, fp32 = nasty.DTYPES
    rows = [
        row(9000, bf16, bf16, bf16),
        row(0, fp32, fp32, bf16),
        row(100, fp16, fp32, bf16),
        row(33_000, fp16, bf16, bf16, skip=1),
        row(0, fp16, fp16, fp16),
        row(1, fp32, fp32, fp32),
        row(5000, fp32, fp16, fp16, skip=3),
        row(8192, fp32, fp32, fp32),
        row(16_384, bf16, bf16, bf16),
    ]
    bases, tensors = [r[0] for r in rows], [x for r in rows for x in r[1:]]
    shares = [0.2, 0.9, -1, 0, 0.5, 1.0]
    counts = []
    for entry, x in enumerate(tensors):
        share = shares[entry % len(shares)]
        counts.append(int(share * x.numel()) if share > 0 else int(share))
    assert {-1, 0} < set(counts)
    check(bases, tensors, 2, counts, "first")
    check([], tensors, 2, counts, "first")
    check(bases, tensors, 2, counts, "all")


@pytest.mark.parametrize("ties", ["all", "none"])
def test_whole_model(ties: str) -> None:
    kind = "ties" if ties == "all" else "normal"
    lengths = (17, 5_000, 0, 4_100)
    dtypes = (*nasty.DTYPES, torch.float16)
    rows = [nasty.models(kind, n, 3, dtype) for n, dtype in zip(lengths, dtypes, strict=True)]
    bases, tensors = [base for base, _ in rows], [x for _, xs in rows for x in xs]
    total = sum(base.numel() for base in bases)
    for given, counts in ((bases, [total // 5, 1, total]), ([], [-1, 0, total // 2])):
        codes, cuts, at = magnitude.select(given, tensors, 3, counts, whole_model=True, ties=ties)
        for model, k in enumerate(counts):
            whole = torch.cat([codes_of(base if given else None, xs[model]) for base, xs in rows])
            for entry in range(model, len(tensors), 3):
                got = int(codes[entry]), int(cuts[entry]), int(at[entry])
                check_entry(whole, k, ties, got, tensors[entry].numel())


def test_same_bits_twice() -> None:
    base, xs = nasty.models("ties", 20_000, 2)
    once = magnitude.select([base], xs, 2, [4000, 9000], whole_model=False, ties="first")
    again = magnitude.select([base], xs, 2, [4000, 9000], whole_model=False, ties="first")
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_bad_input() -> None:
    x = torch.randn(4)
    with pytest.raises(ValueError, match="ties must be 'all' or 'none'"):
        magnitude.select([], [x], 1, [2], whole_model=True, ties="first")
    with pytest.raises(ValueError, match="counts must have 2 numbers, got 1"):
        magnitude.select([], [x, x], 2, [2], whole_model=False, ties="all")
