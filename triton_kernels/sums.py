"""sum |d| and sum |d kept| of many tensors at once, in float64 and in the one order of the library.

    d = float32(x) - float32(base), or float32(x) without bases

Chunks of 65536 elements by flat index; in a chunk 16 lanes (index mod 16), each summed in order,
starting from 0; the lanes of a chunk are added in order, then the chunks in order, each starting
from 0. Every addition is one rounded float64 addition of that order, so all backends have equal
bits. Chunks and lanes run in parallel: a program walks down some chunks at once, one
accumulator for each lane of each. A second kernel adds the chunks of an entry.

Kept are the elements of the random stream (drop), or those above a threshold (trim).

Cost: one read of the inputs; the models of a row read its base at the same time, mostly from the
cache. Workspace: 16 bytes per 65536 elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .philox import keep_bits, kept
from .rows import (
    MIXED,
    base_address,
    entry_address,
    find_row,
    load_values,
    magnitude_code,
    row_number,
    row_size,
    tabulate,
)
from .tables import upload

__all__ = ["absolute_sums"]

LANES = 16
CHUNK = 1 << 16
ALL, TRIM, DROP = 0, 1, 2
# Chunks of a program, rows of 16 elements that a turn of its loop takes, warps. A thread reads 16
# bytes at once, on waves of 64 too; in a drop it has one element, since it computes more.
SHAPES = {ALL: (32, 4, 1), TRIM: (32, 4, 1), DROP: (8, 16, 4)}
_UNALIGNED_STEPS, _UNALIGNED_WARPS = 1, 4
_AT_ONCE = 16


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _kept_bits(  # type: ignore[no-untyped-def]
    group, drops_ptr, CHUNKS: tl.constexpr, STEPS: tl.constexpr
):
    """int32 [CHUNKS, 16] for int64 `group` [CHUNKS]: bit s = the element in `group` + s is kept."""
    words = drops_ptr.to(tl.pointer_type(tl.uint32))
    step = tl.arange(0, STEPS)[None, :]
    groups = tl.reshape(group[:, None] + step, (CHUNKS * STEPS,))
    masks = keep_bits(groups, tl.load(words), tl.load(words + 1), tl.load(drops_ptr + 1))
    keep = kept(masks[:, None], tl.arange(0, 16)[None, :])
    keep = tl.reshape(keep.to(tl.int32), (CHUNKS, STEPS, 16))
    return tl.sum(keep << tl.arange(0, STEPS)[None, :, None], axis=1)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _walk(  # type: ignore[no-untyped-def]
    base_at, address, kind, start, n, code, drops_ptr, height, full,
    MODE: tl.constexpr, BASE_KIND: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The lanes of all elements and of the kept ones: float64 [CHUNKS, 16] each."""
    chunk = start + tl.arange(0, CHUNKS).to(tl.int64) * CHUNK
    lanes = chunk[:, None] + tl.arange(0, 16)[None, :]
    total = tl.zeros((CHUNKS, 16), tl.float64)
    some = tl.zeros((CHUNKS, 16), tl.float64)
    for top in range(0, height, STEPS):
        if MODE == 2:
            bits = _kept_bits(chunk // 16 + top, drops_ptr, CHUNKS, STEPS)
        for step in tl.static_range(STEPS):
            offset = lanes + (top + step) * 16
            inside = offset < n
            d = load_values(address, kind, offset, inside, full, KIND, ALIGNED)
            if BASE_KIND >= 0:
                d -= load_values(base_at, BASE_KIND, offset, inside, full, BASE_KIND, ALIGNED)
            size = tl.abs(d).to(tl.float64)
            total += size
            if MODE == 1:
                some += tl.where(magnitude_code(d) > code, size, 0.0)
            elif MODE == 2:
                some += tl.where(((bits >> step) & 1) != 0, size, 0.0)
    return total, some


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _add_lanes(lanes, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The lanes of each chunk in order; tl.sum only picks one lane out of zeros."""
    lane = tl.arange(0, 16)[None, :]
    out = tl.zeros((CHUNKS,), tl.float64)
    for i in tl.static_range(16):
        out += tl.sum(tl.where(lane == i, lanes, 0.0), axis=1)
    return out


@triton.jit(do_not_specialize=["first", "rows", "models"])  # type: ignore[untyped-decorator, unused-ignore]
def _chunks_kernel(  # type: ignore[no-untyped-def]
    table_ptr, drops_ptr, codes_ptr, o_ptr, first, rows, models,
    MODE: tl.constexpr, BASE_KIND: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program: CHUNKS chunks of one entry; the models of a row are neighbours."""
    group_ptr = table_ptr + first
    program = tl.program_id(0).to(tl.int64)
    row, span = find_row(group_ptr, rows, program // models)
    model = program % models
    n = row_size(group_ptr, rows, row)
    place = row_number(group_ptr, rows, row) * models + model
    address, kind = entry_address(group_ptr, rows, models, row, model)
    base_at = base_address(group_ptr, rows, row)
    start = span * (CHUNKS * CHUNK)
    code = 0
    if MODE == 1:
        code = tl.load(codes_ptr + place)
    drops_ptr += place * 2
    if start + CHUNKS * CHUNK <= n:
        total, some = _walk(
            base_at, address, kind, start, n, code, drops_ptr, CHUNK // 16, True,
            MODE, BASE_KIND, KIND, ALIGNED, CHUNKS, CHUNK, STEPS,
        )  # fmt: skip
    else:
        height = (tl.minimum(n - start, CHUNK) + 15) // 16
        total, some = _walk(
            base_at, address, kind, start, n, code, drops_ptr, height, False,
            MODE, BASE_KIND, KIND, ALIGNED, CHUNKS, CHUNK, STEPS,
        )  # fmt: skip
    chunk = (tl.load(group_ptr + row) + span) * CHUNKS + tl.arange(0, CHUNKS)
    out = o_ptr + (chunk * models + model) * 2
    tl.store(out, _add_lanes(total, CHUNKS))
    if MODE == 0:
        some = total
    tl.store(out + 1, _add_lanes(some, CHUNKS))


@triton.jit(do_not_specialize=["first", "rows", "models"])  # type: ignore[untyped-decorator, unused-ignore]
def _entries_kernel(  # type: ignore[no-untyped-def]
    table_ptr, x_ptr, totals_ptr, kept_ptr, first, rows, models,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One program adds the chunks of one entry in order; the loads of a turn run ahead of it."""
    group_ptr = table_ptr + first
    row = tl.program_id(0).to(tl.int64) // models
    model = tl.program_id(0) % models
    n = row_size(group_ptr, rows, row)
    chunks = (n + CHUNK - 1) // CHUNK
    x_ptr += (tl.load(group_ptr + row) * CHUNKS * models + model) * 2
    total = tl.zeros((), tl.float64)
    some = tl.zeros((), tl.float64)
    whole = chunks // AT_ONCE * AT_ONCE
    for top in range(0, whole, AT_ONCE):
        for step in tl.static_range(AT_ONCE):
            total += tl.load(x_ptr + (top + step) * models * 2)
            some += tl.load(x_ptr + (top + step) * models * 2 + 1)
    for chunk in range(whole, chunks):
        total += tl.load(x_ptr + chunk * models * 2)
        some += tl.load(x_ptr + chunk * models * 2 + 1)
    place = row_number(group_ptr, rows, row) * models + model
    tl.store(totals_ptr + place, total)
    tl.store(kept_ptr + place, some)


def _shape(mode: int, kind: int, aligned: bool) -> tuple[int, int, int]:
    """As in SHAPES, but where registers would run out."""
    chunks, steps, warps = SHAPES[mode]
    if mode == DROP:
        # Each access of a mixture holds the code of three dtypes.
        return chunks, steps // 2 if kind == MIXED else steps, warps
    if aligned:
        return chunks, steps, warps
    # Single elements hold an address each: a turn is one row, and more threads share it.
    return chunks, _UNALIGNED_STEPS, _UNALIGNED_WARPS


def absolute_sums(
    bases: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor],
    models: int,
    *,
    keys: Sequence[int] | None = None,
    keeps: Sequence[int] | None = None,
    codes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """sum |d| and sum |d kept| of each entry.

    Args:
        bases: one tensor per row, or none.
        tensors: row-major, `models` per row, all on one device; contiguous bfloat16, float16 or
            float32 in any mixture.
        models: versions of each row.
        keys, keeps: drop: the key of the stream and the threshold T in [0, 2^32] of each entry.
        codes: trim: int32 thresholds on the device, one per entry; kept is what lies above.
            With neither, everything is kept.

    Returns:
        (totals, kept), float64, one each per entry, on the device.
    """
    if (keys is None) != (keeps is None) or (keys is not None and codes is not None):
        raise ValueError("give keys and keeps, or codes, or none of them")
    entries = len(tensors)
    drops: list[int] = []
    if keys is not None and keeps is not None:
        mode = DROP
        for key, keep in zip(keys, keeps, strict=True):
            if not 0 <= keep <= 1 << 32:
                raise ValueError(f"keeps must be in [0, 2^32], got {keep}")
            drops += [key & 0xFFFFFFFFFFFFFFFF, keep]
        if len(drops) != 2 * entries:
            raise ValueError(f"keys must have {entries} numbers, got {len(drops) // 2}")
    else:
        mode = ALL if codes is None else TRIM
    chunks = SHAPES[mode][0]
    device = tensors[0].device
    with torch.cuda.device_of(tensors[0]):
        table, groups = tabulate(bases, tensors, models, chunks * CHUNK)
        numbers = upload([*table, *drops], device)
        totals = torch.zeros(entries, dtype=torch.float64, device=device)
        kept = torch.zeros(entries, dtype=torch.float64, device=device)
        for group in groups:
            shape = (group.programs * chunks * models * 2,)
            by_chunk = torch.empty(shape, dtype=torch.float64, device=device)
            where = (group.first, group.rows, models)
            _, steps, warps = _shape(mode, group.kind, group.aligned)
            _chunks_kernel[(group.programs * models,)](
                numbers, numbers[len(table) :], codes if codes is not None else numbers, by_chunk,
                *where, MODE=mode, BASE_KIND=group.base_kind, KIND=group.kind,
                ALIGNED=group.aligned, CHUNKS=chunks, CHUNK=CHUNK,
                STEPS=steps, num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
            _entries_kernel[(group.rows * models,)](
                numbers, by_chunk, totals, kept, *where,
                CHUNKS=chunks, CHUNK=CHUNK, AT_ONCE=_AT_ONCE, num_warps=1,
            )  # fmt: skip
    return totals, kept
