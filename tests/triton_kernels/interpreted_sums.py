"""Float64 sums of |d|, bit for bit those of the reference, in the interpreter."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from cl_fast.triton_kernels import sums
from torch import Tensor

from cl_fast.ops import dropping, keep_threshold, stream_key
from cl_fast.ops.dropping import absolute_sum, keep_mask

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
import nasty

SMALL_CHUNK = 256
LENGTHS = (1, 16, SMALL_CHUNK - 1, SMALL_CHUNK, SMALL_CHUNK + 1, 3 * SMALL_CHUNK + 40)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that the interpreter walks quickly, in the kernel and in the reference."""
    monkeypatch.setattr(sums, "CHUNK", SMALL_CHUNK)
    monkeypatch.setattr(dropping, "L1_CHUNK", SMALL_CHUNK)


def delta(bases: Sequence[Tensor], tensors: Sequence[Tensor], models: int, entry: int) -> Tensor:
    x = tensors[entry].float()
    return x - bases[entry // models].float() if bases else x


def bits(x: Tensor) -> list[int]:
    return x.view(torch.int64).tolist()


def check(
    bases: Sequence[Tensor],
    tensors: Sequence[Tensor],
    models: int,
    keep: Sequence[Tensor] | None = None,
    **how: object,
) -> None:
    totals, kept = sums.absolute_sums(bases, tensors, models, **how)
    ds = [delta(bases, tensors, models, entry) for entry in range(len(tensors))]
    want = [absolute_sum(d) for d in ds]
    some = want if keep is None else [
        absolute_sum(torch.where(k, d, 0.0)) for k, d in zip(keep, ds, strict=True)
    ]  # fmt: skip
    assert bits(totals) == bits(torch.tensor(want, dtype=torch.float64))
    assert bits(kept) == bits(torch.tensor(some, dtype=torch.float64))


def rows(kind: str, models: int, lengths: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Rows of three dtypes in turn."""
    made = [
        nasty.models(kind, n, models, nasty.DTYPES[i % 3], seed=i) for i, n in enumerate(lengths)
    ]
    return [base for base, _ in made], [x for _, xs in made for x in xs]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("based", [False, True])
def test_trim(based: bool) -> None:
    trim("heavy" if based else "normal", based, LENGTHS)


def test_real_chunks() -> None:
    """Four chunks side by side in one program."""
    check([], rows("normal", 1, (0, 0, 200_000))[1], 1)


def trim(kind: str, based: bool, lengths: Sequence[int]) -> None:
    bases, tensors = rows(kind, 1, lengths)
    given = bases if based else []
    ds = [delta(given, tensors, 1, entry) for entry in range(len(tensors))]
    codes = [d.abs().contiguous().view(torch.int32) for d in ds]
    levels = [c.median() for c in codes]
    if len(levels) > 4:
        levels[3], levels[4] = torch.tensor(-1), torch.tensor(0x7FFFFFFF)
    check(
        given,
        tensors,
        1,
        [c > level for c, level in zip(codes, levels, strict=True)],
        codes=torch.stack([level.to(torch.int32) for level in levels]),
    )


@pytest.mark.usefixtures("small_chunks")
def test_everything() -> None:
    bases, tensors = rows("cancel", 2, (17, 0, 3000))
    check(bases, tensors, 2)
    check([], tensors, 2)


def drop(bases: Sequence[Tensor], tensors: Sequence[Tensor], models: int) -> None:
    keys = [stream_key(5, "m", str(i)) | (1 << 63) * (i % 2) for i in range(len(tensors))]
    some = [keep_threshold(0.3), 1 << 32, 0, 77 << 24, (1 << 32) - 1, keep_threshold(0.9)]
    keeps = [some[i % len(some)] for i in range(len(tensors))]
    masks = [keep_mask(k, x.numel(), t) for k, x, t in zip(keys, tensors, keeps, strict=True)]
    check(bases, tensors, models, masks, keys=keys, keeps=keeps)


@pytest.mark.usefixtures("small_chunks")
def test_drop() -> None:
    drop(*rows("normal", 1, LENGTHS[::-1]), 1)


def test_drop_in_real_chunks() -> None:
    drop(*rows("normal", 1, (1_000, 4_999)), 1)


@pytest.mark.usefixtures("small_chunks")
def test_rows_of_any_kind() -> None:
    """Mixed dtypes in a row, empty rows, unaligned views; several programs of one row."""
    bf16, fp16, fp32 = nasty.DTYPES
    g = torch.Generator().manual_seed(2)
    tensors = []
    for n, dtypes, skip in (
        (1000, (bf16, fp16, fp32), 0),
        (0, (fp32, fp32, fp32), 0),
        (333, (fp32, bf16, fp16), 3),
        (700, (fp16, fp16, fp16), 1),
        (64, (bf16, bf16, bf16), 0),
    ):
        tensors += [torch.randn(n + skip, generator=g).to(dtype)[skip:] for dtype in dtypes]
    bases, others = tensors[::3], [x for i, x in enumerate(tensors) if i % 3]
    drop(bases, others, 2)
    drop([], tensors, 3)


@pytest.mark.usefixtures("small_chunks")
def test_several_programs_of_a_row() -> None:
    """More chunks than a program and than a turn of the second kernel takes."""
    chunks = 3 * max(sums.SHAPES[sums.ALL][0], sums._AT_ONCE)
    base, xs = nasty.models("normal", chunks * SMALL_CHUNK + 300, 2, torch.float16)
    check([base], xs, 2)


def test_special_values() -> None:
    x = torch.tensor([1.0, float("nan"), -2.0, float("inf"), -0.0, 2.0**-149] * 5)
    y = x.nan_to_num(0.0, 3.0e38)
    totals, kept = sums.absolute_sums([], [x, y], 2, codes=torch.tensor([0, 1], dtype=torch.int32))
    assert totals[0].isnan()
    assert kept[0].isnan()
    assert float(totals[1]) == absolute_sum(y)


def test_bad_input() -> None:
    x = torch.randn(4)
    with pytest.raises(ValueError, match="give keys and keeps, or codes, or none of them"):
        sums.absolute_sums([], [x], 1, keys=[1])
    with pytest.raises(ValueError, match=r"keeps must be in \[0, 2\^32\], got -1"):
        sums.absolute_sums([], [x], 1, keys=[1], keeps=[-1])
    with pytest.raises(ValueError, match="keys must have 2 numbers, got 1"):
        sums.absolute_sums([], [x, x], 2, keys=[1], keeps=[1])
