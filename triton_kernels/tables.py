"""Small tables of 64-bit numbers on the device: pointers, sizes and keys of many tensors at once.

A kernel that serves all tensors of a model in one launch reads what differs between them from a
table. The table must reach the device without a host sync. Outside of a CUDA graph it travels
through pinned memory, whose block the allocator gives away again only after the copy. A graph would
read that memory at every replay, so while one is captured the numbers travel as arguments of
kernels, which the graph keeps. The driver loads no kernel while it captures: this one is loaded
with the first table outside of a capture.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["float_bits", "interpreted", "upload"]

_PER_LAUNCH = 16
_WORDS = [f"w{i}" for i in range(2 * _PER_LAUNCH)]


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return not isinstance(_store_kernel, triton.runtime.JITFunction)


def float_bits(value: float) -> int:
    """The bits of `value` as float32, for a table; the kernel casts the low word back."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


@triton.jit(do_not_specialize=_WORDS)  # type: ignore[untyped-decorator, unused-ignore]
def _store_kernel(  # type: ignore[no-untyped-def]
    o_ptr,
    w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15,
    w16, w17, w18, w19, w20, w21, w22, w23, w24, w25, w26, w27, w28, w29, w30, w31,
):  # fmt: skip
    words = (
        w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15,
        w16, w17, w18, w19, w20, w21, w22, w23, w24, w25, w26, w27, w28, w29, w30, w31,
    )  # fmt: skip
    for i in tl.static_range(32):
        tl.store(o_ptr + i, words[i])


def upload(numbers: Sequence[int], device: Any) -> torch.Tensor:
    """`numbers` as an int64 tensor on `device`, in stream order, without a host sync.

    Args:
        numbers: in [-2^63, 2^64); what exceeds int64 keeps its 64 bits.
        device: a CUDA or ROCm device, or the CPU for the interpreter.

    Returns:
        int64 [len(numbers)].
    """
    device = torch.device(device)
    signed = [n - (1 << 64) if n >= 1 << 63 else n for n in numbers]
    if device.type == "cpu":
        return torch.tensor(signed, dtype=torch.int64)
    if not torch.cuda.is_current_stream_capturing():
        _load_store_kernel(device)
        host = torch.tensor(signed, dtype=torch.int64).pin_memory()
        return host.to(device, non_blocking=True)
    padded = signed + [0] * (-len(signed) % _PER_LAUNCH)
    out = torch.empty(len(padded), dtype=torch.int64, device=device)
    with torch.cuda.device(device):
        for first in range(0, len(padded), _PER_LAUNCH):
            store_words(out[first:], padded[first : first + _PER_LAUNCH])
    return out[: len(signed)]


@functools.cache
def _load_store_kernel(device: torch.device) -> None:
    """Once per device: a warm-up of an op never launches this kernel, the capture after it does."""
    with torch.cuda.device(device):
        store_words(torch.empty(_PER_LAUNCH, dtype=torch.int64, device=device), [0] * _PER_LAUNCH)


def store_words(out: torch.Tensor, numbers: Sequence[int]) -> None:
    """Write 16 int64 numbers to the head of `out` by one launch that carries them itself."""
    words = struct.unpack(f"<{2 * _PER_LAUNCH}i", struct.pack(f"<{_PER_LAUNCH}q", *numbers))
    _store_kernel[(1,)](out.view(torch.int32), *words)
