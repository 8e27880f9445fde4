"""The random stream "cl_fast philox v1" on the device: which elements of a tensor are kept.

    B_L  = Philox4x32-10(counter = (g mod 2^32, g >> 32, L, 0), key)      one block per 16 elements
    u    = byte_0 2^24 + byte_1 2^16 + byte_2 2^8 + byte_3,               byte_L of B_L, g = i >> 4
    keep = u < T

A mask is made for whole groups of 16 elements, one group per thread: `keep_bits` draws the block
once, compares four bytes at a time inside a word and packs the group's mask into one word. The
readers `kept` and `kept_before` work in the layout of the elements, so that all that moves between
threads is one word per group, by a shuffle where a program is one warp. The first byte decides 255
of 256 elements. A level below it is drawn for all groups of a program as soon as one element needs
it: the second nearly always, the third for one tile of 512 in a hundred. Source of the generator:
Salmon et al., SC11.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

__all__ = [
    "GROUP",
    "keep_bits",
    "keep_mask",
    "keep_tile",
    "kept",
    "kept_before",
    "philox4x32_10",
    "split_key",
    "split_threshold",
    "spread",
]

GROUP = 16
_GROUPS_PER_PROGRAM = 128


def split_key(key: int) -> tuple[int, int]:
    """The two words of a 64-bit key as int32, so that every key has one argument type."""
    return _int32(key & 0xFFFFFFFF), _int32(key >> 32 & 0xFFFFFFFF)


def split_threshold(threshold: int) -> tuple[int, int]:
    """The leading byte and the other 24 bits of a threshold below 2^32."""
    if not 0 <= threshold < 1 << 32:
        raise ValueError(f"threshold must be in [0, 2^32), got {threshold}")
    return threshold >> 24, threshold & 0xFFFFFF


def _int32(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def philox4x32_10(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Ten rounds on uint32 tensors."""
    M0: tl.constexpr = 0xD2511F53
    M1: tl.constexpr = 0xCD9E8D57
    W0: tl.constexpr = 0x9E3779B9
    W1: tl.constexpr = 0xBB67AE85
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, tl.full(c0.shape, M0, tl.uint32))
        high1 = tl.umulhi(c2, tl.full(c2.shape, M1, tl.uint32))
        low0 = tl.mul(c0, M0, sanitize_overflow=False)
        low1 = tl.mul(c2, M1, sanitize_overflow=False)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = tl.add(k0, W0, sanitize_overflow=False)
        k1 = tl.add(k1, W1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _pack(a, b, c, d):  # type: ignore[no-untyped-def]
    """The top bits of the 16 bytes: element j goes to bit 8 (j & 3) + 7 - (j >> 2)."""
    TOPS: tl.constexpr = 0x80808080
    return (a & TOPS) | ((b & TOPS) >> 1) | ((c & TOPS) >> 2) | ((d & TOPS) >> 3)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _less(word, limit):  # type: ignore[no-untyped-def]
    """In the top bit of each byte: is the byte of `word` below that of `limit`?"""
    # The subtraction compares the low seven bits: no byte can borrow from its neighbour.
    low = tl.sub(word | 0x80808080, limit & 0x7F7F7F7F, sanitize_overflow=False)
    return ~((word & low) | ((word | low) & ~limit))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _equal(word, other):  # type: ignore[no-untyped-def]
    """In the top bit of each byte: are the bytes equal?"""
    apart = word ^ other
    low = tl.add(apart & 0x7F7F7F7F, 0x7F7F7F7F, sanitize_overflow=False)
    return ~(low | apart)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _less_bits(w0, w1, w2, w3, byte):  # type: ignore[no-untyped-def]
    limit = byte * 0x01010101
    return _pack(_less(w0, limit), _less(w1, limit), _less(w2, limit), _less(w3, limit))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _equal_bits(w0, w1, w2, w3, byte):  # type: ignore[no-untyped-def]
    other = byte * 0x01010101
    return _pack(_equal(w0, other), _equal(w1, other), _equal(w2, other), _equal(w3, other))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def keep_bits(groups, k0, k1, threshold):  # type: ignore[no-untyped-def]
    """The masks of int64 `groups` [G], for `kept`: uint32 [G].

    The words of the key are uint32, the threshold is int64 in [0, 2^32].
    """
    c0 = (groups & 0xFFFFFFFF).to(tl.uint32)
    c1 = ((groups >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.full(groups.shape, 0, tl.uint32)
    level = zero
    undecided = tl.full(groups.shape, 0xF0F0F0F0, tl.uint32)
    bits = undecided * (threshold >> 32).to(tl.uint32)
    # What is left of the threshold, its next byte on top. Below nothing is no draw.
    left = (threshold & 0xFFFFFFFF).to(tl.uint32)
    again = left != 0
    while again:
        w0, w1, w2, w3 = philox4x32_10(c0, c1, level, zero, k0, k1)
        byte = left >> 24
        bits |= undecided & _less_bits(w0, w1, w2, w3, byte)
        undecided &= _equal_bits(w0, w1, w2, w3, byte)
        level += 1
        left = left << 8
        again = (left != 0) & (tl.max(undecided, axis=0) != 0)
    return bits


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def spread(bits, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The word of each element's group: [GROUPS] becomes [16 GROUPS]."""
    return tl.reshape(tl.broadcast_to(bits[:, None], (GROUPS, 16)), (GROUPS * 16,))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def kept(bits, lane):  # type: ignore[no-untyped-def]
    """Whether the elements are kept; `bits` are spread, `lane` has the low bits of their index."""
    # One shift serves the eight elements of a vector; what is left of the place is a constant.
    half = bits << (((lane >> 3) & 1) * 2).to(tl.uint32)
    one = tl.full(lane.shape, 0x80, tl.uint32) << ((lane & 3) * 8).to(tl.uint32)
    return (half & (one >> ((lane >> 2) & 1).to(tl.uint32))) != 0


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def count_bits(bits):  # type: ignore[no-untyped-def]
    """How many of the 16 bits of a group's mask are set, as int32."""
    bits = bits >> 4
    bits -= (bits >> 1) & 0x55555555
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    return (tl.mul(bits, 0x01010101, sanitize_overflow=False) >> 24).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def kept_before(bits, lane):  # type: ignore[no-untyped-def]
    """How many elements of the same group are kept before the element; arguments as in `kept`."""
    word = ((lane >> 2) & 3).to(tl.uint32)
    byte = (lane & 3).to(tl.uint32)
    words = ((tl.full(lane.shape, 0xF00, tl.uint32) >> word) & 0xF0) * 0x01010101
    bytes_ = (tl.full(lane.shape, 1, tl.uint32) << (byte * 8)) - 1
    return count_bits(
        bits & (words | ((tl.full(lane.shape, 0x80808080, tl.uint32) >> word) & bytes_))
    )


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def keep_tile(groups, k0, k1, lead, rest):  # type: ignore[no-untyped-def]
    """Whether the elements of int64 `groups` [G, 1] are kept: int1 [G, 16]. The rest is int32."""
    bits = keep_bits(
        tl.reshape(groups, (groups.shape[0],)),
        k0.to(tl.uint32, bitcast=True),
        k1.to(tl.uint32, bitcast=True),
        lead.to(tl.int64) * 0x1000000 + rest,
    )
    return kept(bits[:, None], tl.arange(0, 16)[None, :])


@triton.jit(do_not_specialize=["n", "first_group", "k0", "k1", "lead", "rest"])  # type: ignore[untyped-decorator, unused-ignore]
def _keep_mask_kernel(  # type: ignore[no-untyped-def]
    o_ptr, n, first_group, k0, k1, lead, rest, GROUPS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    offset = row * 16 + tl.arange(0, 16)[None, :]
    keep = keep_tile(row + first_group, k0, k1, lead, rest)
    tl.store(o_ptr + offset, keep.to(tl.uint8), mask=offset < n)


def keep_mask(
    key: int, n: int, threshold: int, *, first_group: int = 0, device: Any = "cuda"
) -> torch.Tensor:
    """The mask of the elements 16 first_group .. 16 first_group + n - 1, as bool [n].

    Args:
        key: 64 bits.
        n: number of elements.
        threshold: T in [0, 2^32].
    """
    if threshold >= 1 << 32:
        return torch.ones(n, dtype=torch.bool, device=device)
    out = torch.empty(n, dtype=torch.uint8, device=device)
    if n:
        grid = (triton.cdiv(n, _GROUPS_PER_PROGRAM * GROUP),)
        with torch.cuda.device_of(out):
            _keep_mask_kernel[grid](
                out,
                n,
                first_group,
                *split_key(key),
                *split_threshold(threshold),
                GROUPS=_GROUPS_PER_PROGRAM,
            )
    return out.view(torch.bool)
