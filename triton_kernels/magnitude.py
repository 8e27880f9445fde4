"""The k-th largest |d| of many tensors at once, exactly: radix select over the bits, no sort.

    d      = float32(x) - float32(base), or float32(x) without bases
    code   = bits of |d| as an integer in [0, 2^31): ordered like |d|, NaN first
    t      = the k-th largest code of an entry, or of all rows of a model together
    keep i   <=>   code_i > t  or  (code_i == t and i < cut)

The 31 bits are found in digits of 7, 6, 9 and 9 bits from the top. A pass counts, for each entry,
the elements whose higher digits are those found so far by their next digit; a small kernel then
walks the counts down from the largest digit to the one that holds the k-th element. The first two
digits (exponent and five bits of mantissa) are counted by `tl.histogram`, whose cost grows with
the bins. After them few elements are left, or many of one value: a tile without candidates is
skipped, candidates of one digit are added at once, few candidates by an atomic each.

A base is read once for all models of its row. All rows are served by one launch per pass and
group of equal dtypes. Counts are 64-bit integers, so the result does not depend on their order.
Nothing is read back by the host.

Cost: four reads of the inputs (three for 16-bit tensors without bases) and, where only a part of
the ties is kept, a fifth. Workspace: 4 KiB per entry (per model for a whole model), and 4 bytes
per 4096 elements for the ties, below 0.06 % of large inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .rows import (
    Group,
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

__all__ = ["select"]

DIGITS = (7, 6, 9, 9)
BINS = 1 << 9
TILE = 4096
STEPS = 8
WARPS = 8
FEW = TILE // 32
_TIE_BLOCK = 1024
_EVERY = 1 << 62
# Low bits of a code that are zero by the format: bfloat16 and float16 carry 7 and 10 of 23.
_LOW_ZEROS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _codes(  # type: ignore[no-untyped-def]
    group_ptr, rows, models, row, model, base, offset, inside, full,
    BASED: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    address, kind = entry_address(group_ptr, rows, models, row, model)
    d = load_values(address, kind, offset, inside, full, KIND, ALIGNED)
    if BASED:
        d = d - base
    return magnitude_code(d)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _add_digits(  # type: ignore[no-untyped-def]
    hist_ptr, code, found, shift, inside,
    BITS: tl.constexpr, SPARSE: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Count the next digit of the codes that begin with the digits found."""
    candidate = inside & ((code >> (shift + BITS)) == found)
    digit = (code >> shift) & ((1 << BITS) - 1)
    bins = tl.arange(0, 1 << BITS)
    if SPARSE:
        count = tl.sum(candidate.to(tl.int32), axis=0)
        if count > 0:
            least = tl.min(tl.where(candidate, digit, 1 << BITS), axis=0)
            most = tl.max(tl.where(candidate, digit, -1), axis=0)
            if least == most:
                tl.atomic_add(hist_ptr + most, count.to(tl.int64), sem="relaxed")
            elif count <= FEW:
                one = tl.full(digit.shape, 1, tl.int64)
                tl.atomic_add(hist_ptr + digit, one, mask=candidate, sem="relaxed")
            else:
                counts = tl.histogram(digit, 1 << BITS, mask=candidate)
                tl.atomic_add(hist_ptr + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
    else:
        counts = tl.histogram(digit, 1 << BITS, mask=candidate)
        tl.atomic_add(hist_ptr + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _count_tile(  # type: ignore[no-untyped-def]
    group_ptr, rows, models, row, state_ptr, places, hist_ptr, first, n, shift,
    BITS: tl.constexpr, SPARSE: tl.constexpr, BASE_KIND: tl.constexpr,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr,
    STRIDE: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    offset = first + tl.arange(0, TILE)
    inside = offset < n
    full = first + TILE <= n
    base = 0.0
    if BASE_KIND >= 0:
        address = base_address(group_ptr, rows, row)
        base = load_values(address, BASE_KIND, offset, inside, full, BASE_KIND, ALIGNED)
    for model in range(models):
        place = first * 0 + model
        if not WHOLE:
            place += row_number(group_ptr, rows, row) * models
        if tl.load(state_ptr + place) > 0:
            found = tl.load(state_ptr + places + place).to(tl.int32)
            code = _codes(
                group_ptr, rows, models, row, model, base, offset, inside, full,
                BASE_KIND >= 0, KIND, ALIGNED,
            )  # fmt: skip
            _add_digits(hist_ptr + place * STRIDE, code, found, shift, inside, BITS, SPARSE, FEW)


@triton.jit(do_not_specialize=["first", "rows", "models", "places", "shift"])  # type: ignore[untyped-decorator, unused-ignore]
def _count_kernel(  # type: ignore[no-untyped-def]
    table_ptr, state_ptr, hist_ptr, first, rows, models, places, shift,
    BITS: tl.constexpr, SPARSE: tl.constexpr, BASE_KIND: tl.constexpr, KIND: tl.constexpr,
    ALIGNED: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr,
    STRIDE: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    group_ptr = table_ptr + first
    row, span = find_row(group_ptr, rows, tl.program_id(0).to(tl.int64))
    n = row_size(group_ptr, rows, row)
    for step in range(STEPS):
        start = (span * STEPS + step) * TILE
        if start < n:
            _count_tile(
                group_ptr, rows, models, row, state_ptr, places, hist_ptr, start, n, shift,
                BITS, SPARSE, BASE_KIND, KIND, ALIGNED, WHOLE, TILE, STRIDE, FEW,
            )  # fmt: skip


@triton.jit(do_not_specialize=["places"])  # type: ignore[untyped-decorator, unused-ignore]
def _descend_kernel(state_ptr, hist_ptr, places, BITS: tl.constexpr, STRIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Append the digit that holds the wanted element; its rank becomes that within the digit."""
    place = tl.program_id(0).to(tl.int64)
    want = tl.load(state_ptr + place)
    if want > 0:
        bins = tl.arange(0, 1 << BITS)
        counts = tl.load(hist_ptr + place * STRIDE + bins)
        tl.store(hist_ptr + place * STRIDE + bins, tl.zeros_like(counts))
        from_bin = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
        digit = tl.sum((from_bin >= want).to(tl.int32), axis=0) - 1
        at = tl.sum(tl.where(bins == digit, counts, 0), axis=0)
        above = tl.sum(tl.where(bins == digit, from_bin, 0), axis=0) - at
        found = tl.load(state_ptr + places + place)
        tl.store(state_ptr + place, want - above)
        tl.store(state_ptr + places + place, (found << BITS) | digit)
        tl.store(state_ptr + 2 * places + place, at)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _ties_tile(  # type: ignore[no-untyped-def]
    group_ptr, rows, models, row, state_ptr, places, codes_ptr, ties_ptr, first, n,
    BASE_KIND: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    offset = first + tl.arange(0, TILE)
    inside = offset < n
    full = first + TILE <= n
    number = row_number(group_ptr, rows, row)
    for model in range(models):
        place = number * models + model
        want = tl.load(state_ptr + place)
        if (want > 0) & (want < tl.load(state_ptr + 2 * places + place)):
            base = 0.0
            if BASE_KIND >= 0:
                address = base_address(group_ptr, rows, row)
                base = load_values(address, BASE_KIND, offset, inside, full, BASE_KIND, ALIGNED)
            code = _codes(
                group_ptr, rows, models, row, model, base, offset, inside, full,
                BASE_KIND >= 0, KIND, ALIGNED,
            )  # fmt: skip
            tied = inside & (code == tl.load(codes_ptr + place))
            tl.store(ties_ptr + model, tl.sum(tied.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["first", "rows", "models", "places"])  # type: ignore[untyped-decorator, unused-ignore]
def _ties_kernel(  # type: ignore[no-untyped-def]
    table_ptr, state_ptr, codes_ptr, ties_ptr, first, rows, models, places,
    BASE_KIND: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """How many elements of each tile are at the threshold, where only some of them are kept."""
    group_ptr = table_ptr + first
    program = tl.program_id(0).to(tl.int64)
    row, span = find_row(group_ptr, rows, program)
    n = row_size(group_ptr, rows, row)
    for step in range(STEPS):
        start = (span * STEPS + step) * TILE
        out_ptr = ties_ptr + (program * STEPS + step) * models
        if start < n:
            _ties_tile(
                group_ptr, rows, models, row, state_ptr, places, codes_ptr, out_ptr, start, n,
                BASE_KIND, KIND, ALIGNED, TILE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["first", "rows", "models", "places"])  # type: ignore[untyped-decorator, unused-ignore]
def _cut_kernel(  # type: ignore[no-untyped-def]
    table_ptr, state_ptr, codes_ptr, ties_ptr, cuts_ptr, first, rows, models, places,
    BASE_KIND: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One past the last kept tie: walk the counts of the tiles, then look into one tile."""
    group_ptr = table_ptr + first
    row = tl.program_id(0) // models
    model = tl.program_id(0) % models
    n = row_size(group_ptr, rows, row)
    place = row_number(group_ptr, rows, row) * models + model
    want = tl.load(state_ptr + place)
    if want > 0:
        if want == tl.load(state_ptr + 2 * places + place):
            tl.store(cuts_ptr + place, n)
        else:
            tiles = (n + TILE - 1) // TILE
            ties_ptr += tl.load(group_ptr + row) * STEPS * models + model
            tile = tiles * 0
            i_block = tiles * 0
            while i_block < tiles:
                lane = i_block + tl.arange(0, BLOCK)
                ties = tl.load(ties_ptr + lane * models, mask=lane < tiles, other=0).to(tl.int64)
                total = tl.sum(ties, axis=0)
                if total >= want:
                    before = tl.cumsum(ties, axis=0) < want
                    tile = i_block + tl.sum(before.to(tl.int32), axis=0)
                    want -= tl.sum(tl.where(before, ties, 0), axis=0)
                    i_block = tiles
                else:
                    want -= total
                    i_block += BLOCK
            offset = tile * TILE + tl.arange(0, TILE)
            inside = offset < n
            base = 0.0
            if BASE_KIND >= 0:
                address = base_address(group_ptr, rows, row)
                base = load_values(address, BASE_KIND, offset, inside, False, BASE_KIND, ALIGNED)
            code = _codes(
                group_ptr, rows, models, row, model, base, offset, inside, False,
                BASE_KIND >= 0, KIND, ALIGNED,
            )  # fmt: skip
            tied = inside & (code == tl.load(codes_ptr + place))
            rank = tl.cumsum(tied.to(tl.int32), axis=0)
            earlier = tl.sum((rank < want).to(tl.int32), axis=0)
            tl.store(cuts_ptr + place, tile * TILE + earlier + 1)


def _meta(group: Group) -> dict[str, int | bool]:
    return {
        "BASE_KIND": group.base_kind,
        "KIND": group.kind,
        "ALIGNED": group.aligned,
        "TILE": TILE,
        "STEPS": STEPS,
    }


def select(
    bases: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor],
    models: int,
    counts: Sequence[int],
    *,
    whole_model: bool,
    ties: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The threshold of each entry and which of the elements at it are kept.

    Args:
        bases: one tensor per row, or none: then the tensors themselves are ranked.
        tensors: row-major, `models` per row, all on one device; contiguous bfloat16, float16 or
            float32 in any mixture. Pointers that are no multiple of 16 bytes cost vector loads in
            their row only.
        models: versions of each row.
        counts: how many elements to keep, for each entry, or for each model if `whole_model`;
            -1 keeps everything, 0 nothing.
        whole_model: rank all rows of a model together; the result is repeated for each row.
        ties: "first" keeps the first ties by flat index until the count is reached (not with
            `whole_model`), "all" keeps all of them, "none" none.

    Returns:
        (codes int32, cuts int64, at int64), one each per entry, on the device. Kept are the
        elements with a code above the entry's, and those at it whose flat index is below its cut;
        `at` counts the latter. A count of -1 gives code -1, a count of 0 gives 0x7fffffff.
    """
    if ties not in ("first", "all", "none") or (whole_model and ties == "first"):
        raise ValueError(f"ties must be 'all' or 'none', or 'first' by tensor; got {ties!r}")
    rows = len(tensors) // models
    places = models if whole_model else rows * models
    if len(counts) != places:
        raise ValueError(f"counts must have {places} numbers, got {len(counts)}")
    device = tensors[0].device
    with torch.cuda.device_of(tensors[0]):
        table, groups = tabulate(bases, tensors, models, TILE * STEPS)
        numbers = upload([*table, *counts], device)
        asked = numbers[len(table) :]
        # rank wanted among the elements that share the digits found; the digits; how many share
        state = torch.zeros(3, places, dtype=torch.int64, device=device)
        state[0] = asked
        hist = torch.zeros(places, BINS, dtype=torch.int64, device=device)
        shift, low_zeros = 31, 0 if bases else min(_LOW_ZEROS[x.dtype] for x in tensors)
        for number, bits in enumerate(DIGITS):
            if shift <= low_zeros:
                break
            shift -= bits
            for group in groups:
                _count_kernel[(group.programs,)](
                    numbers, state, hist, group.first, group.rows, models, places, shift,
                    BITS=bits, SPARSE=number > 1, **_meta(group), WHOLE=whole_model,
                    STRIDE=BINS, FEW=FEW, num_warps=WARPS,
                )  # fmt: skip
            _descend_kernel[(places,)](state, hist, places, BITS=bits, STRIDE=BINS, num_warps=1)
        rest, found, total = state.unbind(0)
        codes = torch.where(asked == 0, 0x7FFFFFFF, found << shift)
        codes = torch.where(asked < 0, -1, codes).to(torch.int32)
        if ties == "none":
            cuts, at = torch.zeros_like(rest), torch.zeros_like(rest)
        elif ties == "all":
            cuts, at = torch.where(asked > 0, _EVERY, 0), total
        else:
            cuts, at = torch.zeros_like(rest), torch.where(asked > 0, rest, 0)
            for group in groups:
                shape = (group.programs * STEPS * models,)
                tile_ties = torch.empty(shape, dtype=torch.int32, device=device)
                where = (group.first, group.rows, models, places)
                _ties_kernel[(group.programs,)](
                    numbers, state, codes, tile_ties, *where, **_meta(group), num_warps=WARPS
                )
                _cut_kernel[(group.rows * models,)](
                    numbers, state, codes, tile_ties, cuts, *where, **_meta(group),
                    BLOCK=_TIE_BLOCK, num_warps=WARPS,
                )  # fmt: skip
        if whole_model:
            codes, cuts, at = codes.repeat(rows), cuts.repeat(rows), at.repeat(rows)
    return codes, cuts, at
