"""The drop kernels against the reference stream."""

from __future__ import annotations

import pytest
import torch
from cl_fast.triton_kernels import dare as dare_kernel
from cl_fast.triton_kernels import philox

from cl_fast.backends import device_ops
from cl_fast.ops import dare, keep_mask, keep_threshold, stream_key
from cl_fast.ops.dropping import _Drop


def test_masks() -> None:
    key = stream_key(0, "math", "w")
    thresholds = [0, 1, 1 << 24, 77 << 24, (77 << 24) + 5, 1 << 31, (1 << 32) - 1, 1 << 32]
    thresholds += [keep_threshold(density) for density in (0.1, 0.37, 0.9)]
    for threshold in thresholds:
        for n in (0, 1, 15, 16, 17, 1000, 3000):
            got = philox.keep_mask(key, n, threshold, device="cpu")
            assert torch.equal(got, keep_mask(key, n, threshold)), (n, threshold)
    # far down the stream: the counter's second word; and keys with their high bits set
    for key, first in ((0, 2**32 - 3), (2**64 - 1, 2**32 + 7), (2**63 + 2**31, 5)):
        got = philox.keep_mask(key, 200, keep_threshold(0.3), first_group=first, device="cpu")
        assert torch.equal(got, keep_mask(key, 200, keep_threshold(0.3), start=16 * first))


def test_third_and_fourth_level() -> None:
    """Thresholds that share two bytes with a draw: the rare branch, taken."""
    from cl_fast.ops import streams

    key = stream_key(0, "m", "t")
    for index in (0, 5, 700):
        draw = streams.uniform32(key, index)
        for threshold in (draw, draw + 1, (draw & 0xFFFF0000) + 1, draw | 0xFFFF):
            got = philox.keep_mask(key, 1024, threshold, device="cpu")
            assert torch.equal(got, keep_mask(key, 1024, threshold))
            assert bool(got[index]) == (draw < threshold)


def test_dare() -> None:
    key = stream_key(3, "m", "t")
    threshold = keep_threshold(0.3)
    factor = float(torch.tensor(2.0**32 / threshold, dtype=torch.float32))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for n in (0, 1, 16, 1023, 3000):
            x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
            want = dare(x, density=0.3, seed=3, model="m", tensor="t", backend="eager")
            got = dare_kernel.dare(x, key, threshold, factor)
            assert got.dtype == dtype
            if dtype == torch.bfloat16:
                # The interpreter truncates this cast instead of rounding it: one spacing is free.
                assert torch.equal(got != 0, want != 0)
                torch.testing.assert_close(got, want, rtol=2.0**-7, atol=0.0)
            else:
                assert torch.equal(got, want)
    x = torch.randn(30, 40)
    want = dare(x.t(), density=0.3, seed=3, model="m", tensor="t", backend="eager")
    assert torch.equal(dare_kernel.dare(x.t(), key, threshold, factor), want)
    x[0, :] = float("nan")
    out = dare_kernel.dare(x, key, threshold, 1.0)
    keep = keep_mask(key, x.numel(), threshold).view_as(x)
    assert torch.equal(out.isnan(), keep & x.isnan())


def test_dispatch() -> None:
    """What the op does on a CUDA tensor, here on one that the interpreter can read."""
    x = torch.randn(500)
    by = device_ops.require("triton", x.device)
    for rescale in ("none", "keep_rate", "l1"):
        for density in (0.3, 1.0, 1e-12, 1 - 2.0**-40):
            want = dare(x, density=density, rescale=rescale, backend="eager")
            assert torch.equal(_Drop(density, 0, "", "", rescale).device(x, by), want)
    wide = x.double()
    assert torch.equal(
        _Drop(0.3, 0, "", "", "none").device(wide, by), dare(wide, density=0.3, rescale="none")
    )


def test_bad_threshold() -> None:
    for threshold in (-1, 1 << 32):
        with pytest.raises(ValueError, match=r"threshold must be in \[0, 2\^32\)"):
            philox.split_threshold(threshold)
