"""Orthogonality of many small matrices at once: the O-LoRA penalty, its gradient, the projection.

    products   S = A P^T               per module A [r, d] new, P [R, d] past or a basis
    finish     S and v = sum |S| or sum S^2
    apply      dA = g sign(S) P        l1, sign(0) = 0
               dA = g 2 S P            squared
               out = A - S P           projection

All modules share each launch, however ragged: a table holds pointers and sizes, and a program
whose tile lies outside of its matrix ends at once. A penalty is two launches, its gradient one;
P is read once by each of the two large ones.

The columns are cut into chunks so that a few small modules still fill the card. A chunk writes its
partial S to a place of its own and `finish` adds the chunks in order: no atomics, and the bits
depend on the shapes only.

Tensor cores take the products of two tensors of one 16-bit dtype; those are exact, and sums are
float32. sign(S) is exact in 16 bits too. Where S itself is a factor it is split into three
bfloat16 terms, 24 bits in all, so that a bfloat16 P stays on tensor cores and nothing is lost;
everything else is multiplied in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .tables import interpreted, upload

__all__ = ["penalty", "penalty_gradient", "project"]

# The host counts with plain numbers, a kernel may read constexpr globals only.
_L1, _SQUARED, _PROJECT = 0, 1, 2
L1, SQUARED, PROJECT = tl.constexpr(_L1), tl.constexpr(_SQUARED), tl.constexpr(_PROJECT)

_PRODUCT_WORDS, _TILE_WORDS = 9, 9
PRODUCT_WORDS = tl.constexpr(_PRODUCT_WORDS)
MODULE_WORDS = tl.constexpr(3)
TILE_WORDS = tl.constexpr(_TILE_WORDS)
PAIR_WORDS = tl.constexpr(4)

CHUNK = 512
"""Columns of one partial product, at least; a multiple of every block of columns."""
PROGRAMS = 2048
"""Chunks grow until there are no more programs than this, so that partial sums stay few."""
SUM_BLOCK = 1024

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _load_past(p_ptr, stride, j, col, rows, d, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """P[j, col]; COLUMNS: memory holds its transpose."""
    inside = (j < rows)[:, None] & (col < d)[None, :]
    if COLUMNS:
        offset = col[None, :] * stride + j[:, None]
    else:
        offset = j[:, None] * stride + col[None, :]
    return tl.load(p_ptr + offset, mask=inside, other=0.0)


@triton.jit(  # type: ignore[untyped-decorator, unused-ignore]
    do_not_specialize=["total"],
    do_not_specialize_on_alignment=["table_ptr"],
)
def _products_kernel(  # type: ignore[no-untyped-def]
    table_ptr, o_ptr, total, chunk,
    NEW: tl.constexpr, PAST: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
    WIDEN: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The partial S of one tile of rows of A, one of rows of P, and one chunk of columns."""
    row = table_ptr + tl.program_id(0).to(tl.int64) * PRODUCT_WORDS
    split = tl.program_id(1).to(tl.int64)
    d = tl.load(row + 4)
    first = split * chunk
    if first < d:
        a_ptr = tl.load(row).to(tl.pointer_type(NEW))
        p_ptr = tl.load(row + 1).to(tl.pointer_type(PAST))
        a_rows = tl.load(row + 2)
        p_rows = tl.load(row + 3)
        a_stride = tl.load(row + 5)
        p_stride = tl.load(row + 6)
        if ALIGNED:
            a_ptr = tl.multiple_of(a_ptr, 16)
            p_ptr = tl.multiple_of(p_ptr, 16)
            a_stride = tl.multiple_of(a_stride, 8)
            p_stride = tl.multiple_of(p_stride, 8)
            d = tl.multiple_of(d, 8)
            if COLUMNS:
                p_rows = tl.multiple_of(p_rows, 8)
        i = tl.arange(0, BN).to(tl.int64)
        j = tl.arange(0, BP).to(tl.int64)
        acc = tl.zeros((BP, BN), dtype=tl.float32)
        for start in range(first, min(first + chunk, d), BD):
            col = start + tl.arange(0, BD)
            p = _load_past(p_ptr, p_stride, j, col, p_rows, d, COLUMNS)
            a = tl.load(
                a_ptr + i[:, None] * a_stride + col[None, :],
                mask=(i < a_rows)[:, None] & (col < d)[None, :],
                other=0.0,
            )
            if WIDEN:
                p = p.to(tl.float32)
                a = a.to(tl.float32)
            # P has more rows than A: it is the side whose rows fill the units.
            acc = tl.dot(p, tl.trans(a), acc, input_precision="ieee")
        out = o_ptr + split * total + tl.load(row + 7)
        inside = (j < p_rows)[:, None] & (i < a_rows)[None, :]
        tl.store(out + i[None, :] * tl.load(row + 8) + j[:, None], acc, mask=inside)


@triton.jit(  # type: ignore[untyped-decorator, unused-ignore]
    do_not_specialize=["total"],
    do_not_specialize_on_alignment=["table_ptr"],
)
def _finish_kernel(  # type: ignore[no-untyped-def]
    table_ptr, partial_ptr, s_ptr, v_ptr, total, FORM: tl.constexpr, BLOCK: tl.constexpr
):
    """S and the value of one module, its partial products added in the order of the columns."""
    module = tl.program_id(0).to(tl.int64)
    row = table_ptr + module * MODULE_WORDS
    first = tl.load(row)
    size = tl.load(row + 1)
    splits = tl.load(row + 2)
    value = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < size
        s = tl.zeros((BLOCK,), dtype=tl.float32)
        for split in range(splits):
            s += tl.load(partial_ptr + split * total + first + index, mask=inside, other=0.0)
        tl.store(s_ptr + first + index, s, mask=inside)
        if FORM == L1:
            value += tl.abs(s)
        elif FORM == SQUARED:
            value += s * s
    if FORM != PROJECT:
        tl.store(v_ptr + module, tl.sum(value, axis=0))


@triton.jit(  # type: ignore[untyped-decorator, unused-ignore]
    do_not_specialize=["g_stride"],
    do_not_specialize_on_alignment=["tiles_ptr", "pairs_ptr", "g_ptr"],
)
def _apply_kernel(  # type: ignore[no-untyped-def]
    tiles_ptr, pairs_ptr, s_ptr, g_ptr, g_stride,
    MODE: tl.constexpr, NEW: tl.constexpr, OUT: tl.constexpr, PAST: tl.constexpr,
    COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, SPLIT: tl.constexpr,
    INTERPRETED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One tile of a gradient or of a projection: a module's S times its P, summed over its past."""
    row = tiles_ptr + tl.program_id(0).to(tl.int64) * TILE_WORDS
    start = tl.program_id(1).to(tl.int64) * BD
    d = tl.load(row + 2)
    if start < d:
        o_ptr = tl.load(row).to(tl.pointer_type(OUT))
        rows = tl.load(row + 1)
        o_stride = tl.load(row + 3)
        first_row = tl.load(row + 6)
        if ALIGNED:
            o_ptr = tl.multiple_of(o_ptr, 16)
            o_stride = tl.multiple_of(o_stride, 8)
            d = tl.multiple_of(d, 8)
        col = start + tl.arange(0, BD)
        i = tl.arange(0, BN).to(tl.int64)
        acc = tl.zeros((BN, BD), dtype=tl.float32)
        for pair in range(tl.load(row + 4), tl.load(row + 5)):
            entry = pairs_ptr + pair * PAIR_WORDS
            p_ptr = tl.load(entry).to(tl.pointer_type(PAST))
            p_rows = tl.load(entry + 1)
            p_stride = tl.load(entry + 2)
            block = s_ptr + tl.load(entry + 3) + (first_row + i)[:, None] * p_rows
            p_rows_hint = p_rows
            if ALIGNED:
                p_ptr = tl.multiple_of(p_ptr, 16)
                p_stride = tl.multiple_of(p_stride, 8)
                if COLUMNS:
                    p_rows_hint = tl.multiple_of(p_rows, 8)
            for j0 in range(0, p_rows, BK):
                j = j0 + tl.arange(0, BK)
                s = tl.load(
                    block + j[None, :], mask=(i < rows)[:, None] & (j < p_rows)[None, :], other=0.0
                )
                p = _load_past(p_ptr, p_stride, j, col, p_rows_hint, d, COLUMNS)
                if MODE == L1:
                    # NaN has no sign and stays zero, as in torch.sign.
                    sign = tl.where(s > 0.0, 1.0, tl.where(s < 0.0, -1.0, 0.0))
                    if INTERPRETED:
                        acc = tl.dot(sign, p.to(tl.float32), acc, input_precision="ieee")
                    else:
                        acc = tl.dot(sign.to(PAST), p, acc, input_precision="ieee")
                elif SPLIT:
                    for _ in tl.static_range(3):
                        term = s.to(tl.bfloat16)
                        s -= term.to(tl.float32)
                        if INTERPRETED:
                            acc = tl.dot(term.to(tl.float32), p.to(tl.float32), acc)
                        else:
                            acc = tl.dot(term, p, acc)
                else:
                    acc = tl.dot(s, p.to(tl.float32), acc, input_precision="ieee")
        inside = (i < rows)[:, None] & (col < d)[None, :]
        if MODE == PROJECT:
            a_ptr = tl.load(row + 7).to(tl.pointer_type(NEW))
            a_stride = tl.load(row + 8)
            if ALIGNED:
                a_ptr = tl.multiple_of(a_ptr, 16)
                a_stride = tl.multiple_of(a_stride, 8)
            a = tl.load(a_ptr + i[:, None] * a_stride + col[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
            acc = a - acc
        else:
            g = tl.load(g_ptr + tl.load(row + 7) * g_stride)
            if MODE == SQUARED:
                g *= 2.0
            acc *= g
        tl.store(o_ptr + i[:, None] * o_stride + col[None, :], acc.to(OUT), mask=inside)


class _Matrix(NamedTuple):
    """A matrix as a table tells it, read from its tensor once: every question costs host time."""

    pointer: int
    rows: int
    columns: int
    stride: int
    """Elements from one line in memory to the next: a row, or a column of a transpose."""
    step: int
    """Bytes from one row to the next."""

    @classmethod
    def of(cls, x: torch.Tensor, transposed: bool = False) -> _Matrix:
        rows, columns = x.shape
        row, column = x.stride()
        stride = column if transposed else row
        return cls(x.data_ptr(), rows, columns, stride, row * x.element_size())

    def aligned(self) -> bool:
        """Whether its rows start at, and consist of, whole vectors of 16 bytes."""
        return self.pointer % 16 == 0 and self.stride % 8 == 0 and self.columns % 8 == 0


@dataclass(frozen=True)
class _Inputs:
    """What a launch reads: matrices of one dtype each, with a unit stride along a line.

    `past` holds all P, one after the other; `transposed` if memory holds them column by column.
    `first[m]` .. `first[m + 1]` are those of module m, and `offsets` tells where the S of each
    begins.
    """

    new: list[_Matrix]
    past: list[_Matrix]
    first: list[int]
    offsets: list[int]
    total: int
    transposed: bool
    aligned: bool
    dtypes: tuple[torch.dtype, torch.dtype]
    owners: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]
    """Keeps the memory, of which some may be a copy."""

    @classmethod
    def of(
        cls, new: Sequence[torch.Tensor], past: Sequence[torch.Tensor], counts: Sequence[int]
    ) -> _Inputs:
        new, past = _one_dtype(new), _one_dtype(past)
        by_rows = all(_unit(p, 1) for p in past)
        transposed = not by_rows and all(_unit(p, 0) for p in past)
        if not by_rows and not transposed:
            past = [p if _unit(p, 1) else p.contiguous() for p in past]
        new = [a if _unit(a, 1) else a.contiguous() for a in new]
        of_new = [_Matrix.of(a) for a in new]
        of_past = [_Matrix.of(p, transposed) for p in past]
        first, offsets, total = [0], [], 0
        for a, count in zip(of_new, counts, strict=True):
            for p in of_past[first[-1] : first[-1] + count]:
                offsets.append(total)
                total += a.rows * p.rows
            first.append(first[-1] + count)
        aligned = all(x.aligned() for x in (*of_new, *of_past))
        if transposed:
            aligned = aligned and all(p.rows % 8 == 0 for p in of_past)
        dtypes = (new[0].dtype, past[0].dtype if past else new[0].dtype)
        return cls(of_new, of_past, first, offsets, total, transposed, aligned, dtypes, (new, past))

    @property
    def device(self) -> torch.device:
        return self.owners[0][0].device

    def most_past(self) -> int:
        return max((p.rows for p in self.past), default=0)


def _unit(x: torch.Tensor, dim: int) -> bool:
    """Whether neighbours along `dim` are neighbours in memory; one alone may claim any stride."""
    return bool(x.stride(dim) == 1 or x.size(dim) <= 1)


def _cdiv(x: int, by: int) -> int:
    return -(-x // by)


def _one_dtype(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors as they are, or in float32 where their dtypes differ."""
    if len({x.dtype for x in tensors}) <= 1:
        return list(tensors)
    return [x.float() for x in tensors]


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _row_block(rows: int, most: int) -> int:
    """A power of two of at least 16 that covers `rows`, or `most`."""
    return min(most, max(16, 1 << (rows - 1).bit_length())) if rows else 16


def _tiles(rows: int, block: int) -> Iterator[tuple[int, int]]:
    for start in range(0, rows, block):
        yield start, min(block, rows - start)


def _chunk(items: int, d: int) -> int:
    chunk = CHUNK
    while chunk < d and items * _cdiv(d, chunk) > PROGRAMS:
        chunk *= 2
    return chunk


def product_blocks(rows: int, past_rows: int, narrow: bool, aligned: bool) -> dict[str, int]:
    """BN, BP, BD and the warps of `_products_kernel`; narrow: both operands have 16 bits.

    Few rows of P ask for more columns at once, or a thread has less than 16 bytes to load. Loads
    of single elements hold an address each: half the columns then.
    """
    bp = _row_block(past_rows, 128 if narrow else 64)
    bd = (64 if narrow else 32) * (2 if bp == 16 else 1) // (1 if aligned else 2)
    return {
        "BN": _row_block(rows, 64 if narrow else 32), "BP": bp, "BD": bd,
        "num_warps": 4, "num_stages": 4 if narrow else 3,
    }  # fmt: skip


def apply_blocks(
    rows: int, past_rows: int, narrow: bool, split: bool, aligned: bool
) -> dict[str, int]:
    """BN, BK, BD and the warps of `_apply_kernel`; narrow: tensor cores; split: three terms."""
    if not narrow:
        return {
            "BN": 16, "BK": _row_block(past_rows, 32), "BD": 64, "num_warps": 4, "num_stages": 2
        }  # fmt: skip
    return {
        "BN": _row_block(rows, 32), "BK": _row_block(past_rows, 32 if split or not aligned else 64),
        "BD": 128 if aligned else 64, "num_warps": 4, "num_stages": 3,
    }  # fmt: skip


def _products(inputs: _Inputs, mode: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of the modules (of no meaning for a projection) and all S."""
    new, first, total, device = inputs.new, inputs.first, inputs.total, inputs.device
    narrow = inputs.dtypes[0] == inputs.dtypes[1] != torch.float32
    blocks = product_blocks(max(a.rows for a in new), inputs.most_past(), narrow, inputs.aligned)
    words: list[int] = []
    for m, a in enumerate(new):
        for i in range(first[m], first[m + 1]):
            p, offset = inputs.past[i], inputs.offsets[i]
            for i0, a_rows in _tiles(a.rows, blocks["BN"]):
                for j0, p_rows in _tiles(p.rows, blocks["BP"]):
                    words += (
                        a.pointer + i0 * a.step, p.pointer + j0 * p.step, a_rows, p_rows,
                        a.columns, a.stride, p.stride, offset + i0 * p.rows + j0, p.rows,
                    )  # fmt: skip
    items = len(words) // _PRODUCT_WORDS
    most_d = max(a.columns for a in new)
    chunk = _chunk(items, most_d)
    splits = max(1, _cdiv(most_d, chunk))
    begins = [*inputs.offsets, total]
    for m, a in enumerate(new):
        begin = begins[first[m]]
        words += (begin, begins[first[m + 1]] - begin, _cdiv(a.columns, chunk))
    values = torch.empty(len(new), dtype=torch.float32, device=device)
    s = torch.empty(total, dtype=torch.float32, device=device)
    with _on(device):
        table = upload(words, device)
        partial = s.new_empty(splits * total)
        if items and most_d:
            _products_kernel[(items, splits)](
                table, partial, total, chunk,
                NEW=_TYPES[inputs.dtypes[0]], PAST=_TYPES[inputs.dtypes[1]],
                COLUMNS=inputs.transposed, ALIGNED=inputs.aligned,
                WIDEN=interpreted() or not narrow, **blocks,
            )  # fmt: skip
        _finish_kernel[(len(new),)](
            table[items * _PRODUCT_WORDS :], partial, s, values, total,
            FORM=mode, BLOCK=SUM_BLOCK, num_warps=4,
        )  # fmt: skip
    return values, s


def _apply(
    inputs: _Inputs,
    s: torch.Tensor,
    out: Sequence[tuple[int, torch.Tensor]],
    mode: int,
    grad: torch.Tensor | None,
) -> None:
    """Write S P of the modules (m, where to), scaled by grad[m] or taken from A."""
    first, past_dtype = inputs.first, inputs.dtypes[1]
    narrow = past_dtype == torch.bfloat16 or (mode == _L1 and past_dtype == torch.float16)
    split = past_dtype == torch.bfloat16 and mode != _L1
    targets = [(m, _Matrix.of(o)) for m, o in out]
    aligned = inputs.aligned and all(o.aligned() for _, o in targets)
    blocks = apply_blocks(
        max(o.rows for _, o in targets), inputs.most_past(), narrow, split, aligned
    )
    words: list[int] = []
    for m, o in targets:
        a = inputs.new[m]
        for i0, rows in _tiles(o.rows, blocks["BN"]):
            words += (
                o.pointer + i0 * o.step, rows, o.columns, o.stride, first[m], first[m + 1], i0,
                *((m, 0) if grad is not None else (a.pointer + i0 * a.step, a.stride)),
            )  # fmt: skip
    tiles = len(words) // _TILE_WORDS
    most_d = max(o.columns for _, o in targets)
    if not tiles or not most_d:
        return
    for p, offset in zip(inputs.past, inputs.offsets, strict=True):
        words += (p.pointer, p.rows, p.stride, offset)
    with _on(inputs.device):
        table = upload(words, inputs.device)
        _apply_kernel[(tiles, _cdiv(most_d, blocks["BD"]))](
            table, table[tiles * _TILE_WORDS :], s,
            s if grad is None else grad, 0 if grad is None else grad.stride(0),
            MODE=mode, NEW=_TYPES[inputs.dtypes[0]], OUT=_TYPES[out[0][1].dtype],
            PAST=_TYPES[past_dtype], COLUMNS=inputs.transposed, ALIGNED=aligned,
            SPLIT=split, INTERPRETED=interpreted(), **blocks,
        )  # fmt: skip


def penalty(
    new: Sequence[torch.Tensor], past: Sequence[torch.Tensor], counts: Sequence[int], form: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The penalty of each module, and all S.

    Args:
        new: A [r, d] of each module; bfloat16, float16 or float32, in any mixture.
        past: the P [R, d] of all modules, one after the other; likewise.
        counts: how many of `past` each module has; 0 is allowed.
        form: "l1" or "squared".

    Returns:
        float32 [modules], and float32 [all r R]: row-major blocks, one for each of `past`.
    """
    return _products(_Inputs.of(new, past, counts), _L1 if form == "l1" else _SQUARED)


def penalty_gradient(
    grad: torch.Tensor,
    s: torch.Tensor,
    new: Sequence[torch.Tensor],
    past: Sequence[torch.Tensor],
    counts: Sequence[int],
    groups: Sequence[Sequence[int]],
    form: str,
) -> list[torch.Tensor]:
    """The gradients to the modules of each group, stacked; a group has one shape and dtype.

    Args:
        grad: float32 [modules], any stride; the upstream gradient.
        s: what `penalty` returned.
        groups: the modules that need a gradient.
    """
    inputs = _Inputs.of(new, past, counts)
    mixed = len({new[group[0]].dtype for group in groups}) > 1
    stacks: list[torch.Tensor] = []
    out: list[tuple[int, torch.Tensor]] = []
    for group in groups:
        like = new[group[0]]
        dtype = torch.float32 if mixed else like.dtype
        stack = torch.empty((len(group), *like.shape), dtype=dtype, device=like.device)
        stacks.append(stack)
        out.extend(zip(group, stack.unbind(), strict=True))
    if out:
        _apply(inputs, s, out, _L1 if form == "l1" else _SQUARED, grad)
    return [stack.to(new[group[0]].dtype) for stack, group in zip(stacks, groups, strict=True)]


def project(
    a: Sequence[torch.Tensor],
    p: Sequence[torch.Tensor],
    passes: int,
    out: Sequence[torch.Tensor],
) -> None:
    """out = A - (A P^T) P for each matrix, `passes` times, rounded once; `out` may be `a`.

    Args:
        a: [r, d]; bfloat16, float16 or float32, in any mixture.
        p: [k, d] with orthonormal rows, in memory row by row or column by column; likewise.
        out: of the shapes and dtypes of `a`.
    """
    counts = [1] * len(a)
    for _ in range(passes - 1):
        wide = [torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in a]
        project(a, p, 1, wide)
        a = wide
    inputs = _Inputs.of(a, p, counts)
    _, s = _products(inputs, _PROJECT)
    # The kernel writes one dtype, with a unit stride along a row.
    plain = len({o.dtype for o in out}) == 1 and all(_unit(o, 1) for o in out)
    written = (
        list(out)
        if plain
        else [torch.empty(o.shape, dtype=torch.float32, device=o.device) for o in out]
    )
    _apply(inputs, s, list(enumerate(written)), _PROJECT, None)
    if not plain:
        for o, w in zip(out, written, strict=True):
            o.copy_(w)
