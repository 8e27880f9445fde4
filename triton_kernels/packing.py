"""Packed deltas: the kept values of a drop without the dropped ones.

    offsets[t] = number of kept elements before tile t of PACK_TILE elements
    pack       values[offsets[t] + p] = x_i [- b_i]             kept i of tile t, the p-th of them
    unpack     y_i = keep_i ? (value_i [- b_i]) * factor : 0    rounded once to the dtype of y

`keep` is the stream of philox.py; differences and products are float32. One program serves one
tile: it draws the mask again, and a scan over it says which value belongs to which element. The
offsets make tiles independent of one another; they follow from the stream, so one kernel counts
them and a running sum on the device adds them up, without a host sync.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .philox import (
    count_bits,
    keep_bits,
    kept,
    kept_before,
    split_key,
    split_threshold,
    spread,
)

__all__ = ["PACK_TILE", "offsets", "pack", "unpack"]

PACK_TILE = 2048
"""Elements per entry of the offsets: part of the layout that all backends share."""

# One group of the stream per thread of NVIDIA's.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_PLAIN = ["n", "kept_n", "k0", "k1", "lead", "rest"]


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _groups(tile, k0, k1, lead, rest, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The masks of the groups of a tile: uint32 [TILE / 16]."""
    return keep_bits(
        tile * (TILE // 16) + tl.arange(0, TILE // 16),
        k0.to(tl.uint32, bitcast=True),
        k1.to(tl.uint32, bitcast=True),
        lead.to(tl.int64) * 0x1000000 + rest,
    )


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _places(bits, first, kept_n, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The place of each element among the kept ones of its tile, and which of them have one."""
    lane = tl.arange(0, TILE)
    per_group = count_bits(bits)
    before = tl.cumsum(per_group, axis=0) - per_group
    words = spread(bits, TILE // 16)
    place = spread(before, TILE // 16) + kept_before(words, lane)
    # Offsets of another stream must not reach beyond the values.
    room = tl.where(first >= 0, tl.minimum(tl.maximum(kept_n - first, 0), TILE), 0)
    return place, kept(words, lane) & (place < room.to(tl.int32))


@triton.jit(do_not_specialize=_PLAIN)  # type: ignore[untyped-decorator, unused-ignore]
def _count_kernel(o_ptr, n, k0, k1, lead, rest, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    tile = tl.program_id(0).to(tl.int64)
    bits = _groups(tile, k0, k1, lead, rest, TILE)
    if (tile + 1) * TILE <= n:
        count = tl.sum(count_bits(bits), axis=0)
    else:
        lane = tl.arange(0, TILE)
        keep = kept(spread(bits, TILE // 16), lane) & (lane < n - tile * TILE)
        count = tl.sum(keep.to(tl.int32), axis=0)
    tl.store(o_ptr + tile, count.to(tl.int64))


@triton.jit(do_not_specialize=_PLAIN)  # type: ignore[untyped-decorator, unused-ignore]
def _pack_kernel(  # type: ignore[no-untyped-def]
    x_ptr, b_ptr, at_ptr, o_ptr, n, kept_n, k0, k1, lead, rest,
    HAS_BASE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    first = tl.load(at_ptr + tile)
    start = tile * TILE
    lane = tl.arange(0, TILE)
    # A mask would break the vectors up; only the last tile needs one.
    if start + TILE <= n:
        x = tl.load(x_ptr + start + lane).to(tl.float32)
        if HAS_BASE:
            x = x - tl.load(b_ptr + start + lane).to(tl.float32)
        place, keep = _places(_groups(tile, k0, k1, lead, rest, TILE), first, kept_n, TILE)
        tl.store(o_ptr + first + place, x.to(o_ptr.dtype.element_ty), mask=keep)
    else:
        inside = lane < n - start
        x = tl.load(x_ptr + start + lane, mask=inside, other=0.0).to(tl.float32)
        if HAS_BASE:
            x = x - tl.load(b_ptr + start + lane, mask=inside, other=0.0).to(tl.float32)
        place, keep = _places(_groups(tile, k0, k1, lead, rest, TILE), first, kept_n, TILE)
        tl.store(o_ptr + first + place, x.to(o_ptr.dtype.element_ty), mask=keep & inside)


@triton.jit(do_not_specialize=_PLAIN)  # type: ignore[untyped-decorator, unused-ignore]
def _unpack_kernel(  # type: ignore[no-untyped-def]
    v_ptr, b_ptr, at_ptr, o_ptr, n, kept_n, k0, k1, lead, rest, factor,
    HAS_BASE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    first = tl.load(at_ptr + tile)
    start = tile * TILE
    lane = tl.arange(0, TILE)
    place, keep = _places(_groups(tile, k0, k1, lead, rest, TILE), first, kept_n, TILE)
    # A mask would break the vectors up; only the last tile needs one.
    if start + TILE <= n:
        y = tl.load(v_ptr + first + place, mask=keep, other=0.0).to(tl.float32)
        if HAS_BASE:
            y = y - tl.load(b_ptr + start + lane).to(tl.float32)
        y = tl.where(keep, y * factor, 0.0)
        tl.store(o_ptr + start + lane, y.to(o_ptr.dtype.element_ty))
    else:
        inside = lane < n - start
        y = tl.load(v_ptr + first + place, mask=keep & inside, other=0.0).to(tl.float32)
        if HAS_BASE:
            y = y - tl.load(b_ptr + start + lane, mask=inside, other=0.0).to(tl.float32)
        y = tl.where(keep, y * factor, 0.0)
        tl.store(o_ptr + start + lane, y.to(o_ptr.dtype.element_ty), mask=inside)


def offsets(key: int, n: int, threshold: int, *, device: Any = "cuda") -> torch.Tensor:
    """Where the kept elements of each tile begin: int64 [ceil(n / PACK_TILE) + 1], no host sync.

    Args:
        key: 64 bits, of the stream.
        n: number of elements.
        threshold: T in [0, 2^32).
    """
    tiles = triton.cdiv(n, PACK_TILE)
    out = torch.zeros(tiles + 1, dtype=torch.int64, device=device)
    if tiles:
        counts = out[1:]
        with torch.cuda.device_of(out):
            _count_kernel[(tiles,)](
                counts, n, *split_key(key), *split_threshold(threshold), TILE=PACK_TILE, **_OPTIONS
            )
        torch.cumsum(counts, 0, out=counts)
    return out


def pack(
    x: torch.Tensor,
    base: torch.Tensor | None,
    at: torch.Tensor,
    key: int,
    threshold: int,
    kept: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The kept elements of `x`, or of `x - base`, in order: `dtype` [kept].

    Args:
        x, base: bfloat16, float16 or float32, of one size, on one device.
        at: what `offsets` gives for the stream; `kept` is its last entry.
        key, threshold: the stream, as in `offsets`.
    """
    x = x.contiguous()
    base = None if base is None else base.contiguous()
    out = torch.empty(kept, dtype=dtype, device=x.device)
    tiles = triton.cdiv(x.numel(), PACK_TILE)
    if tiles and kept:
        with torch.cuda.device_of(x):
            _pack_kernel[(tiles,)](
                x,
                x if base is None else base,
                at,
                out,
                x.numel(),
                kept,
                *split_key(key),
                *split_threshold(threshold),
                HAS_BASE=base is not None,
                TILE=PACK_TILE,
                **_OPTIONS,
            )
    return out


def unpack(
    values: torch.Tensor,
    base: torch.Tensor | None,
    at: torch.Tensor,
    key: int,
    threshold: int,
    factor: float,
    out: torch.Tensor,
) -> None:
    """Write the dense tensor of `values` to `out`; with `base` the values less their base.

    Args:
        values, at: what `pack` and `offsets` give for the stream.
        factor: a finite float32 value.
        out: contiguous, bfloat16, float16 or float32; its size is that of the dense tensor.
    """
    values = values.contiguous()
    base = None if base is None else base.contiguous()
    tiles = triton.cdiv(out.numel(), PACK_TILE)
    if tiles:
        with torch.cuda.device_of(out):
            _unpack_kernel[(tiles,)](
                values,
                out if base is None else base,
                at,
                out,
                out.numel(),
                values.numel(),
                *split_key(key),
                *split_threshold(threshold),
                factor,
                HAS_BASE=base is not None,
                TILE=PACK_TILE,
                **_OPTIONS,
            )
