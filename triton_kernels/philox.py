"""The random stream "cl_fast philox v1" on the device: which elements of a tensor are kept.

    B_L  = Philox4x32-10(counter = (g mod 2^32, g >> 32, L, 0), key)      one block per 16 elements
    u    = byte_0 2^24 + byte_1 2^16 + byte_2 2^8 + byte_3,               byte_L of B_L, g = i >> 4
    keep = u < T

A program works on whole groups of 16 elements, as a tile [groups, 16], so that a block is drawn
once per group and its bytes are spread along the second axis. The first byte decides 255 of 256
elements. A tile of a thousand elements nearly always holds one that it does not decide, so the
second level is drawn for all; levels three and four, needed once in 65536 elements, only in the
tiles that need them. Source of the generator: Salmon et al., SC11.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["GROUP", "keep_mask", "split_key", "split_threshold"]

GROUP = 16
GROUPS_PER_PROGRAM = 128


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
def level_bytes(groups, LEVEL: tl.constexpr, k0, k1):  # type: ignore[no-untyped-def]
    """The bytes of one level for int64 `groups` of shape [G, 1]: uint32 [G, 16]."""
    c0 = (groups & 0xFFFFFFFF).to(tl.uint32)
    c1 = (groups >> 32).to(tl.uint32)
    c2 = tl.full(groups.shape, LEVEL, tl.uint32)
    c3 = tl.full(groups.shape, 0, tl.uint32)
    w0, w1, w2, w3 = philox4x32_10(c0, c1, c2, c3, k0, k1)
    j = tl.arange(0, 16)[None, :]
    word = tl.where(j < 8, tl.where(j < 4, w0, w1), tl.where(j < 12, w2, w3))
    shift = ((j & 3) * 8).to(tl.uint32)
    return (word >> shift) & 0xFF


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def keep_tile(groups, k0, k1, lead, rest):  # type: ignore[no-untyped-def]
    """Whether the elements of int64 `groups` [G, 1] are kept: int1 [G, 16]."""
    k0 = k0.to(tl.uint32, bitcast=True)
    k1 = k1.to(tl.uint32, bitcast=True)
    first = level_bytes(groups, 0, k0, k1).to(tl.int32)
    keep = first < lead
    if rest > 0:
        second = level_bytes(groups, 1, k0, k1).to(tl.int32)
        want = rest >> 16
        keep = keep | ((first == lead) & (second < want))
        undecided = (first == lead) & (second == want)
        if tl.max(tl.max(undecided.to(tl.int32), axis=1), axis=0) > 0:
            third = level_bytes(groups, 2, k0, k1).to(tl.int32)
            fourth = level_bytes(groups, 3, k0, k1).to(tl.int32)
            keep = keep | (undecided & ((third * 256 + fourth) < (rest & 0xFFFF)))
    return keep


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
        grid = (triton.cdiv(n, GROUPS_PER_PROGRAM * GROUP),)
        _keep_mask_kernel[grid](
            out,
            n,
            first_group,
            *split_key(key),
            *split_threshold(threshold),
            GROUPS=GROUPS_PER_PROGRAM,
        )
    return out.view(torch.bool)
