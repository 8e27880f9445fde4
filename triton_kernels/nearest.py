"""The nearest key of each query: a matrix product that keeps one running maximum per row.

    score_t = max_i (q_t . k_i + b_i)        index_t = the lowest i that has it

A program owns a block of queries and a contiguous range of the keys. It walks over the keys in
tiles, with products on tensor cores and float32 sums, and keeps score and index of the best key so
far in registers: the matrix of all scores is never stored. A later tile wins only if it is larger,
and inside a tile the lowest index of the maximum is taken, so ties go to the lowest index.
NaN and -inf win against nothing: where no key is left the score is -inf and the index -1.

Few queries, as in a step of decoding, give few programs, so the keys are split among several of
them; each writes its best to a place of its own and a second kernel takes the best of those, the
lowest range first where they are equal. No atomics: the result does not depend on who comes first.

Float32 keys are multiplied as six products of bfloat16 parts, which loses no more than float32
does.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl

from .tables import interpreted

__all__ = ["REDUCE_OPTIONS", "nearest_key", "tile"]

MOST_SPLITS = 1024
"""Ranges of keys, so that one program of the second kernel holds the best of all of them."""
PROGRAMS_PER_UNIT = 4
"""Programs that the split aims at, for each multiprocessor."""
REDUCE_OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["count", "n", "share"])  # type: ignore[untyped-decorator, unused-ignore]
def _nearest_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, b_ptr, score_ptr, index_ptr, count, n, d, q_step, k_step, share,
    BIASED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT_F32: tl.constexpr,
):  # fmt: skip
    """The best of `share` keys for BLOCK_T queries; the split is the second program id."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1).to(tl.int64)
    begin = split * share
    end = tl.minimum(begin + share, n)
    q = q_ptr + rows[:, None] * q_step
    best = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    where = tl.full((BLOCK_T,), -1, tl.int64)
    for first in range(begin, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        k = k_ptr + keys[:, None].to(tl.int64) * k_step
        sums = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for start in range(0, d, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            inside = (cols < d)[None, :]
            a = tl.load(q + cols[None, :], mask=(rows < count)[:, None] & inside, other=0.0)
            b = tl.load(k + cols[None, :], mask=(keys < end)[:, None] & inside, other=0.0)
            if DOT_F32:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            sums = tl.dot(a, tl.trans(b), sums, input_precision="ieee" if DOT_F32 else "bf16x6")
        # Behind the last key, where products are 0 or, of a query with NaN, NaN: -inf or NaN.
        if BIASED:
            sums += tl.load(b_ptr + keys, mask=keys < end, other=float("-inf"))[None, :]
        else:
            sums += tl.where(keys < end, 0.0, float("-inf"))[None, :]
        # A comparison with NaN is false.
        sums = tl.where(sums > float("-inf"), sums, float("-inf"))
        found = tl.max(sums, axis=1)
        place = tl.arange(0, BLOCK_N)[None, :]
        lowest = tl.min(tl.where(sums == found[:, None], place, BLOCK_N), axis=1)
        better = found > best
        best = tl.where(better, found, best)
        where = tl.where(better, first + lowest, where)
    at = split * count + rows
    tl.store(score_ptr + at, best, mask=rows < count)
    tl.store(index_ptr + at, where, mask=rows < count)


@triton.jit(do_not_specialize=["count", "splits"])  # type: ignore[untyped-decorator, unused-ignore]
def _reduce_kernel(  # type: ignore[no-untyped-def]
    scores_ptr, indices_ptr, score_ptr, index_ptr, count, splits, SPLITS: tl.constexpr,
):  # fmt: skip
    """The best of the ranges for one query."""
    row = tl.program_id(0).to(tl.int64)
    ranges = tl.arange(0, SPLITS)
    inside = ranges < splits
    at = ranges.to(tl.int64) * count + row
    scores = tl.load(scores_ptr + at, mask=inside, other=float("-inf"))
    indices = tl.load(indices_ptr + at, mask=inside, other=-1)
    best = tl.max(scores, axis=0)
    # Ranges follow one another: the lowest index of the best ones is that of the first of them.
    # A range without a candidate has -1; it is among the best only if all of them are so.
    where = tl.min(tl.where(scores == best, indices, 0x7FFFFFFFFFFFFFFF), axis=0)
    tl.store(score_ptr + row, best)
    tl.store(index_ptr + row, where)


def tile(count: int, dtype: torch.dtype) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """(queries, keys, columns) of a tile, and the options of the launch."""
    stages = {"num_stages": 3, "enable_fp_fusion": False}
    if count <= 16:
        # The keys are read at the speed of memory; queries are padding mostly.
        columns = 64 if dtype == torch.float32 else 128
        return (16, 64, columns), {"num_warps": 4, **stages}
    columns = 32 if dtype == torch.float32 else 64
    return (64, 128, columns), {"num_warps": 8, **stages}


@functools.cache
def _units(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _splits(count: int, n: int, device: torch.device, block_t: int, block_n: int) -> int:
    """Into how many ranges the keys are cut."""
    programs = triton.cdiv(count, block_t)
    wanted = triton.cdiv(PROGRAMS_PER_UNIT * _units(device), programs)
    most: int = min(wanted, triton.cdiv(n, block_n), MOST_SPLITS)
    return max(1, most)


def nearest_key(
    queries: torch.Tensor,
    keys: torch.Tensor,
    bias: torch.Tensor | None,
    score: torch.Tensor,
    index: torch.Tensor,
) -> None:
    """score, index = max and argmax over the keys of queries keys^T + bias.

    Args:
        queries, keys: [T, d] and [n, d] of one dtype, bfloat16, float16 or float32; T and n at
            least 1.
        bias: float32 [n], or None.
        score, index: float32 and int64 [T], contiguous; written.
    """
    count, d = queries.shape
    n = keys.shape[0]
    queries, keys = (x if x.stride(1) == 1 or d == 1 else x.contiguous() for x in (queries, keys))
    bias = None if bias is None else bias.contiguous()
    (block_t, block_n, block_d), options = tile(count, queries.dtype)
    splits = _splits(count, n, queries.device, block_t, block_n)
    share = triton.cdiv(triton.cdiv(n, splits), block_n) * block_n
    splits = triton.cdiv(n, share)
    device = queries.device
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        scores, indices = score, index
        if splits > 1:
            scores, indices = (x.new_empty(splits * count) for x in (score, index))
        _nearest_kernel[(triton.cdiv(count, block_t), splits)](
            queries, keys, keys if bias is None else bias, scores, indices,
            count, n, d, queries.stride(0), keys.stride(0), share,
            **constants(bias is not None, (block_t, block_n, block_d)), **options,
        )  # fmt: skip
        if splits > 1:
            _reduce_kernel[(count,)](
                scores, indices, score, index, count, splits,
                SPLITS=triton.next_power_of_2(splits), **REDUCE_OPTIONS,
            )  # fmt: skip


def constants(biased: bool, sizes: tuple[int, int, int]) -> dict[str, Any]:
    """What the kernel is compiled for."""
    block_t, block_n, block_d = sizes
    return {
        "BIASED": biased, "BLOCK_T": block_t, "BLOCK_N": block_n, "BLOCK_D": block_d,
        "DOT_F32": interpreted(),
    }  # fmt: skip
