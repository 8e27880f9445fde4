"""All tensors of a call in one launch: the table that tells a program its tensors, and the loads.

A row is one tensor of the model, its entries are the versions of it. Rows whose tensors have the
same dtypes and alignment form a group, and each group is one launch. A program owns one span of
elements of one row. It finds the row by bisection over the number of spans before each row, so
that nothing on the device or the host grows with the number of programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

__all__ = ["KINDS", "MIXED", "NO_BASE", "Group", "tabulate"]

KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
MIXED = 3
"""The entries of a row differ in dtype: each access asks the table."""
NO_BASE = -1


@dataclass(frozen=True)
class Group:
    """One launch: rows of equal dtypes and alignment."""

    first: int
    """Where its part of the table begins."""
    rows: int
    programs: int
    base_kind: int
    kind: int
    aligned: bool
    """All pointers are multiples of 16 bytes."""


def tabulate(
    bases: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], models: int, span: int
) -> tuple[list[int], list[Group]]:
    """The table of all rows that are not empty, an even number of numbers, and its groups.

    Args:
        bases: one tensor per row, or none.
        tensors: row-major, `models` per row; contiguous bfloat16, float16 or float32.
        span: elements of a program.
    """
    groups: dict[tuple[int, int, bool], list[int]] = {}
    for row in range(len(tensors) // models):
        entries = tensors[row * models : (row + 1) * models]
        if entries[0].numel() == 0:
            continue
        kinds = {KINDS[x.dtype] for x in entries}
        every = [*entries, bases[row]] if bases else entries
        key = (
            KINDS[bases[row].dtype] if bases else NO_BASE,
            kinds.pop() if len(kinds) == 1 else MIXED,
            all(x.data_ptr() % 16 == 0 for x in every),
        )
        groups.setdefault(key, []).append(row)
    table: list[int] = []
    found = []
    for (base_kind, kind, aligned), rows in groups.items():
        sizes = [tensors[row * models].numel() for row in rows]
        starts = [0]
        for n in sizes:
            starts.append(starts[-1] - (-n // span))
        found.append(Group(len(table), len(rows), starts[-1], base_kind, kind, aligned))
        table += starts + sizes + rows
        table += [bases[row].data_ptr() if bases else 0 for row in rows]
        entries = [tensors[row * models + model] for row in rows for model in range(models)]
        table += [x.data_ptr() for x in entries]
        table += [KINDS[x.dtype] for x in entries]
        table += [0] * (len(table) % 2)
    return table, found


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def find_row(group_ptr, rows, program):  # type: ignore[no-untyped-def]
    """(row of the group, span within the row) of a program."""
    low = rows * 0
    high = rows
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(group_ptr + middle) <= program:
            low = middle
        else:
            high = middle
    return low, program - tl.load(group_ptr + low)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def row_size(group_ptr, rows, row):  # type: ignore[no-untyped-def]
    return tl.load(group_ptr + rows + 1 + row)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def row_number(group_ptr, rows, row):  # type: ignore[no-untyped-def]
    """The row's place in the call."""
    return tl.load(group_ptr + 2 * rows + 1 + row)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def base_address(group_ptr, rows, row):  # type: ignore[no-untyped-def]
    return tl.load(group_ptr + 3 * rows + 1 + row)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def entry_address(group_ptr, rows, models, row, model):  # type: ignore[no-untyped-def]
    """(address, kind) of an entry."""
    place = group_ptr + 4 * rows + 1 + row * models + model
    return tl.load(place), tl.load(place + rows * models)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _load(  # type: ignore[no-untyped-def]
    address, offset, inside, full, KIND: tl.constexpr, ALIGNED: tl.constexpr
):
    # The hint must stand in the function that makes the pointer: it is lost on an argument.
    # bfloat16 is the high half of a float32, which integers say in the interpreter too.
    if KIND == 0:
        pointer = address.to(tl.pointer_type(tl.int16))
    elif KIND == 1:
        pointer = address.to(tl.pointer_type(tl.float16))
    else:
        pointer = address.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    # A mask would break the vectors up; only the end of a tensor needs one.
    if full:
        x = tl.load(pointer + offset)
    else:
        x = tl.load(pointer + offset, mask=inside, other=0)
    if KIND == 0:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def load_values(  # type: ignore[no-untyped-def]
    address, kind, offset, inside, full, KIND: tl.constexpr, ALIGNED: tl.constexpr
):
    """float32 values at `offset` of the tensor at `address`; 0 outside.

    `full` says that all of them are inside; it may be known when compiling, or not.
    """
    if KIND < 3:
        x = _load(address, offset, inside, full, KIND, ALIGNED)
    else:
        if kind == 0:
            x = _load(address, offset, inside, full, 0, ALIGNED)
        elif kind == 1:
            x = _load(address, offset, inside, full, 1, ALIGNED)
        else:
            x = _load(address, offset, inside, full, 2, ALIGNED)
    return x


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def magnitude_code(x):  # type: ignore[no-untyped-def]
    """The bits of |x| as int32: ordered like |x|, NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
