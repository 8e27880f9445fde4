"""Numbers that travel as arguments of a kernel arrive as they were."""

from __future__ import annotations

import torch
from cl_fast.triton_kernels import tables


def test_words_arrive() -> None:
    assert tables.interpreted()
    numbers = [0, 1, -1, 2**63 - 1, -(2**63), 2**32, 2**31, -(2**31), *range(8)]
    out = torch.full((20,), 7, dtype=torch.int64)
    tables.store_words(out, numbers)
    assert out.tolist() == [*numbers, 7, 7, 7, 7]


def test_upload_keeps_64_bits() -> None:
    got = tables.upload([2**64 - 1, 2**63, 5], "cpu")
    assert got.tolist() == [-1, -(2**63), 5]
    assert tables.upload([], "cpu").numel() == 0


def test_float_bits() -> None:
    bits = torch.tensor([tables.float_bits(x) for x in (0.1, -2.5, 1e-40)], dtype=torch.int32)
    assert torch.equal(bits.view(torch.float32), torch.tensor([0.1, -2.5, 1e-40]))
