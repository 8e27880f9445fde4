"""The packing kernels against the reference, and the op's CUDA path on tensors of the CPU."""

from __future__ import annotations

import pytest
import torch
from cl_fast.triton_kernels import packing as kernels

from cl_fast.ops import keep_mask, keep_threshold, stream_key

LENGTHS = (0, 1, 15, 2047, 2048, 2049, 9001)
THRESHOLDS = (0, 1, 1 << 24, keep_threshold(0.1), 1 << 31, keep_threshold(0.9), (1 << 32) - 1)
KEYS = (stream_key(3, "m", "t"), 2**64 - 1, 2**63 + 2**31)


def offsets_of(mask: torch.Tensor) -> list[int]:
    starts = range(0, mask.numel(), 2048)
    counts = [int(mask[first : first + 2048].sum()) for first in starts]
    return [sum(counts[:tile]) for tile in range(len(counts) + 1)]


def test_offsets() -> None:
    for n in LENGTHS:
        for key, threshold in zip(KEYS * 3, THRESHOLDS, strict=False):
            got = kernels.offsets(key, n, threshold, device="cpu")
            assert got.dtype == torch.int64
            assert got.tolist() == offsets_of(keep_mask(key, n, threshold))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pack_and_unpack(dtype: torch.dtype) -> None:
    for n in LENGTHS:
        for key, threshold in zip(KEYS * 3, THRESHOLDS, strict=False):
            x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
            mask = keep_mask(key, n, threshold)
            at = kernels.offsets(key, n, threshold, device="cpu")
            kept = int(at[-1])
            values = kernels.pack(x, None, at, key, threshold, kept, dtype)
            assert torch.equal(values, x[mask])
            out = torch.full((n,), float("nan"))
            kernels.unpack(values, None, at, key, threshold, 1.5, out)
            assert torch.equal(out, torch.where(mask, x.float() * 1.5, 0.0))


def test_differences() -> None:
    n, key, threshold = 3000, KEYS[0], keep_threshold(0.3)
    at = kernels.offsets(key, n, threshold, device="cpu")
    kept, mask = int(at[-1]), keep_mask(key, n, threshold)
    for x_dtype in (torch.float32, torch.float16, torch.bfloat16):
        for base_dtype in (torch.float32, torch.float16, torch.bfloat16):
            x, base = torch.randn(n).to(x_dtype), torch.randn(n).to(base_dtype)
            want = x.float() - base.float()
            got = kernels.pack(x, base, at, key, threshold, kept, torch.float32)
            assert torch.equal(got, want[mask])
            out = torch.empty(n)
            kernels.unpack(x[mask], base, at, key, threshold, 0.7, out)
            factor = torch.tensor(0.7, dtype=torch.float32)
            assert torch.equal(out, torch.where(mask, want * factor, 0.0))


def test_nasty_values() -> None:
    n, key, threshold = 2100, KEYS[1], keep_threshold(0.5)
    mask = keep_mask(key, n, threshold)
    nasty = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-45])
    x = nasty[torch.arange(n) % 6]
    base = nasty[torch.arange(n) // 6 % 6]
    at = kernels.offsets(key, n, threshold, device="cpu")
    values = kernels.pack(x, None, at, key, threshold, int(at[-1]), torch.float32)
    assert torch.equal(values.view(torch.int32), x[mask].view(torch.int32))
    out = torch.empty(n)
    kernels.unpack(values, None, at, key, threshold, 1.0, out)
    want = torch.where(mask, x, 0.0)
    assert torch.equal(out.view(torch.int32), want.view(torch.int32))
    kernels.unpack(values, base, at, key, threshold, 1.0, out)
    torch.testing.assert_close(
        out, torch.where(mask, x - base, 0.0), rtol=0, atol=0, equal_nan=True
    )


def test_wrong_offsets_stay_inside() -> None:
    """Offsets of another stream give wrong numbers, never an access beyond the values."""
    n, key, threshold = 5000, KEYS[0], keep_threshold(0.5)
    at = kernels.offsets(key, n, threshold, device="cpu")
    kept = int(at[-1])
    x = torch.randn(n)
    for wrong in (at + kept, at - 10 * kept, at * 1000, torch.full_like(at, 2**40)):
        room = torch.full((kept + 2 * n,), 7.0)
        values = kernels.pack(x, None, wrong, key, threshold, kept, torch.float32)
        assert values.shape == (kept,)
        kernels.unpack(room[n : n + kept], None, wrong, key, threshold, 1.0, torch.empty(n))
        assert (room == 7.0).all()
