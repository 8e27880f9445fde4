"""Rows in the order of another vocabulary: gathered tile by tile, as if the matrix were stored."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

WIDTH, ROWS = 37, 9000  # several tiles, and no tile begins with a row
SHIFT = 40


def tables(seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, WIDTH, generator=g).bfloat16() for n in (ROWS, 300, 41)]


def some_codes(seed: int) -> torch.Tensor:
    """Long runs, single rows of other tables, and rows that are made."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.arange(ROWS)
    codes[2000:4000] = torch.randperm(2000, generator=g) + 2000
    places = torch.randperm(ROWS, generator=g)
    codes[places[:300]] = (1 << SHIFT) + torch.arange(300)
    codes[places[300:341]] = (2 << SHIFT) + torch.arange(41)
    codes[places[341:400]] = -1 - torch.randint(0, 3, (59,), generator=g)
    return codes


def gathered(codes: torch.Tensor, listed: list[torch.Tensor], made: torch.Tensor) -> torch.Tensor:
    rows = [
        made[-1 - int(code)]
        if code < 0
        else listed[int(code) >> SHIFT][int(code) & (1 << SHIFT) - 1]
        for code in codes
    ]
    return torch.stack(rows)


def raw(values: torch.Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("mode", ["mmap", "pread", "direct", None])
def test_rows_are_what_a_stored_matrix_is(
    core: ModuleType, tmp_path: Path, mode: str | None
) -> None:
    listed, codes = tables(0), some_codes(1)
    made = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(2)).bfloat16()
    base, dense = torch.zeros(ROWS, WIDTH).bfloat16(), gathered(codes, listed, made)
    base[:50] = 1.5
    results = []
    for stored in (True, False):
        job = core.Job(threads=3, tile_elements=65536)
        out = torch.zeros(ROWS, WIDTH)
        task = job.add_task(
            out.numel(),
            "F32",
            out.data_ptr(),
            base=("BF16", base.data_ptr(), -1, 0),
            difference=True,
            sparsify="trim",
            lam=0.7,
        )
        wanted: dict[str, Any] = {
            "weight": 0.4,
            "density": 0.3,
            "keep_count": ROWS * WIDTH * 3 // 10,
        }
        if stored:
            job.add_term(task, "BF16", dense.data_ptr(), **wanted)
        else:
            places = [("BF16", t.data_ptr(), -1, 0) for t in listed]
            if mode is not None:
                path = tmp_path / "rows"
                path.write_bytes(bytes(24) + b"".join(map(raw, listed)))
                file = job.file(str(path), mode)
                at = [24, 24 + listed[0].nbytes, 24 + listed[0].nbytes + listed[1].nbytes]
                places = [("BF16", 0, file, offset) for offset in at]
            rows = job.rows(
                2 * WIDTH,
                codes.numpy().tobytes(),
                list(zip(places, map(len, listed), strict=True)),
                raw(made),
            )
            job.add_term(task, "BF16", 0, file=rows, **wanted)
        job.run()
        results.append((out, job.result(task)))
    (left, told), (right, told_too) = results
    assert torch.equal(left, right)
    assert told["crc_in"] == told_too["crc_in"]
    assert told["crc_out"] == told_too["crc_out"]


def test_a_copy_of_rows(core: ModuleType) -> None:
    listed, codes = tables(3), some_codes(4)
    made = torch.zeros(3, WIDTH).bfloat16()
    job = core.Job(threads=2, tile_elements=65536)
    out = torch.zeros(ROWS, WIDTH).bfloat16()
    places = [(("BYTES", t.data_ptr(), -1, 0), len(t)) for t in listed]
    rows = job.rows(2 * WIDTH, codes.numpy().tobytes(), places, raw(made))
    task = job.add_task(out.nbytes, "BYTES", out.data_ptr(), kind="copy")
    job.add_term(task, "BYTES", 0, file=rows)
    job.run()
    assert torch.equal(out, gathered(codes, listed, made))


@pytest.mark.parametrize(
    ("codes", "n", "words"),
    [
        ([0, 41], 2, "outside its table"),
        ([0, 1 << SHIFT], 2, "outside its table"),
        ([0, -2], 2, "outside its table"),
        ([0, 1], 3, "not as many rows"),
    ],
)
def test_rows_that_cannot_be(core: ModuleType, codes: list[int], n: int, words: str) -> None:
    table = torch.zeros(41, WIDTH).bfloat16()
    packed = torch.tensor(codes).numpy().tobytes()
    job = core.Job(threads=1)
    out = torch.zeros(n, WIDTH)
    task = job.add_task(out.numel(), "F32", out.data_ptr())
    places = [(("BF16", table.data_ptr(), -1, 0), len(table))]

    def add() -> None:
        rows = job.rows(2 * WIDTH, packed, places, bytes(2 * WIDTH))
        job.add_term(task, "BF16", 0, file=rows)

    with pytest.raises(ValueError, match=words):
        add()
