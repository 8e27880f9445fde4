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
from typing import Any

import torch
import triton
import triton.language as tl

from .tables import interpreted, upload

__all__ = ["penalty", "penalty_gradient", "project"]

L1, SQUARED, PROJECT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

PRODUCT_WORDS = tl.constexpr(9)
MODULE_WORDS = tl.constexpr(3)
TILE_WORDS = tl.constexpr(9)
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


@dataclass(frozen=True)
class _Inputs:
    """What a launch reads: matrices of one dtype each, with a unit stride along a row.

    `past` holds all P, one after the other; with `columns` each of them is stored as its
    transpose. `first[m]` .. `first[m + 1]` are those of module m.
    """

    new: list[torch.Tensor]
    past: list[torch.Tensor]
    first: list[int]
    columns: bool

    @classmethod
    def of(
        cls, new: Sequence[torch.Tensor], past: Sequence[torch.Tensor], counts: Sequence[int]
    ) -> _Inputs:
        first = [0]
        for count in counts:
            first.append(first[-1] + count)
        past = _one_dtype(past)
        # A matrix of one row or column may claim either order: ask for what all can give.
        columns = bool(past) and not all(_unit(p.stride(1), p.size(1)) for p in past)
        columns = columns and all(_unit(p.stride(0), p.size(0)) for p in past)
        if not columns:
            past = [p if _unit(p.stride(1), p.size(1)) else p.contiguous() for p in past]
        new = [a if _unit(a.stride(1), a.size(1)) else a.contiguous() for a in _one_dtype(new)]
        return cls(new, list(past), first, columns)

    def blocks(self) -> tuple[list[int], int]:
        """Where the S of each pair begins, and how many elements there are."""
        offsets, total = [], 0
        for m, a in enumerate(self.new):
            r = a.size(0)
            for i in range(self.first[m], self.first[m + 1]):
                offsets.append(total)
                total += r * self.past[i].size(0)
        return offsets, total

    def past_stride(self, p: torch.Tensor) -> int:
        return int(p.stride(1) if self.columns else p.stride(0))

    def past_step(self, p: torch.Tensor) -> int:
        """Bytes from one row of P to the next."""
        return int(p.stride(0)) * int(p.element_size())

    def aligned(self) -> bool:
        """Whether every row starts at, and consists of, whole vectors of 16 bytes."""
        return all(map(_aligned, self.new)) and all(
            _aligned(p.t() if self.columns else p) and p.size(1) % 8 == 0 for p in self.past
        )


def _unit(stride: int, size: int) -> bool:
    return bool(stride == 1 or size <= 1)


def _aligned(x: torch.Tensor) -> bool:
    return bool(x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.size(1) % 8 == 0)


def _one_dtype(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors as they are, or in float32 where their dtypes differ."""
    if len({x.dtype for x in tensors}) <= 1:
        return list(tensors)
    return [x.float() for x in tensors]


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _row_block(rows: int, most: int) -> int:
    """A power of two of at least 16 that covers `rows`, or `most`."""
    return int(min(most, max(16, triton.next_power_of_2(rows))))


def _tiles(rows: int, block: int) -> Iterator[tuple[int, int]]:
    for start in range(0, rows, block):
        yield start, min(block, rows - start)


def _chunk(items: int, d: int) -> int:
    chunk = CHUNK
    while chunk < d and items * triton.cdiv(d, chunk) > PROGRAMS:
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
    new, past, first = inputs.new, inputs.past, inputs.first
    device = new[0].device
    offsets, total = inputs.blocks()
    most_rows = max(a.size(0) for a in new)
    most_past = max((p.size(0) for p in past), default=0)
    dtypes = (new[0].dtype, past[0].dtype if past else new[0].dtype)
    narrow = dtypes[0] == dtypes[1] != torch.float32
    aligned = inputs.aligned()
    blocks = product_blocks(most_rows, most_past, narrow, aligned)
    words: list[int] = []
    for m, a in enumerate(new):
        a_ptr, a_stride, d = a.data_ptr(), a.stride(0), a.size(1)
        a_step = a_stride * a.element_size()
        for i in range(first[m], first[m + 1]):
            p = past[i]
            p_ptr, p_stride, p_step = p.data_ptr(), inputs.past_stride(p), inputs.past_step(p)
            width = p.size(0)
            for i0, a_rows in _tiles(a.size(0), blocks["BN"]):
                for j0, p_rows in _tiles(width, blocks["BP"]):
                    words += (
                        a_ptr + i0 * a_step, p_ptr + j0 * p_step, a_rows, p_rows, d,
                        a_stride, p_stride, offsets[i] + i0 * width + j0, width,
                    )  # fmt: skip
    items = len(words) // int(PRODUCT_WORDS)
    most_d = max(a.size(1) for a in new)
    chunk = _chunk(items, most_d)
    splits = max(1, triton.cdiv(most_d, chunk))
    for m, a in enumerate(new):
        begin = offsets[first[m]] if first[m] < first[m + 1] else 0
        size = a.size(0) * sum(p.size(0) for p in past[first[m] : first[m + 1]])
        words += (begin, size, triton.cdiv(a.size(1), chunk))
    values = torch.empty(len(new), dtype=torch.float32, device=device)
    s = torch.empty(total, dtype=torch.float32, device=device)
    with _on(device):
        table = upload(words, device)
        partial = s.new_empty(splits * total)
        if items and most_d:
            _products_kernel[(items, splits)](
                table, partial, total, chunk,
                NEW=_TYPES[dtypes[0]], PAST=_TYPES[dtypes[1]], COLUMNS=inputs.columns,
                ALIGNED=aligned, WIDEN=interpreted() or not narrow, **blocks,
            )  # fmt: skip
        _finish_kernel[(len(new),)](
            table[items * int(PRODUCT_WORDS) :], partial, s, values, total,
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
    new, past, first = inputs.new, inputs.past, inputs.first
    device = new[0].device
    offsets, _ = inputs.blocks()
    past_dtype = past[0].dtype if past else new[0].dtype
    narrow = past_dtype == torch.bfloat16 or (mode == L1 and past_dtype == torch.float16)
    split = past_dtype == torch.bfloat16 and mode != L1
    aligned = inputs.aligned() and all(_aligned(o) for _, o in out)
    blocks = apply_blocks(
        max(o.size(0) for _, o in out),
        max((p.size(0) for p in past), default=0),
        narrow, split, aligned,
    )  # fmt: skip
    words: list[int] = []
    for m, o in out:
        a, o_ptr, a_ptr = new[m], o.data_ptr(), new[m].data_ptr()
        o_step, a_step = o.stride(0) * o.element_size(), a.stride(0) * a.element_size()
        for i0, rows in _tiles(o.size(0), blocks["BN"]):
            words += (
                o_ptr + i0 * o_step, rows, o.size(1), o.stride(0), first[m], first[m + 1], i0,
                *((m, 0) if grad is not None else (a_ptr + i0 * a_step, a.stride(0))),
            )  # fmt: skip
    tiles = len(words) // int(TILE_WORDS)
    most_d = max(o.size(1) for _, o in out)
    if not tiles or not most_d:
        return
    for p, offset in zip(past, offsets, strict=True):
        words += (p.data_ptr(), p.size(0), inputs.past_stride(p), offset)
    with _on(device):
        table = upload(words, device)
        _apply_kernel[(tiles, triton.cdiv(most_d, blocks["BD"]))](
            table, table[tiles * int(TILE_WORDS) :], s,
            s if grad is None else grad, 0 if grad is None else grad.stride(0),
            MODE=mode, NEW=_TYPES[new[0].dtype], OUT=_TYPES[out[0][1].dtype],
            PAST=_TYPES[past_dtype], COLUMNS=inputs.columns,
            ALIGNED=aligned, SPLIT=split, INTERPRETED=interpreted(), **blocks,
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
    return _products(_Inputs.of(new, past, counts), int(L1 if form == "l1" else SQUARED))


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
        _apply(inputs, s, out, int(L1 if form == "l1" else SQUARED), grad)
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
    _, s = _products(inputs, int(PROJECT))
    # The kernel writes one dtype, with a unit stride along a row.
    plain = len({o.dtype for o in out}) == 1 and all(_unit(o.stride(1), o.size(1)) for o in out)
    written = (
        list(out)
        if plain
        else [torch.empty(o.shape, dtype=torch.float32, device=o.device) for o in out]
    )
    _apply(inputs, s, list(enumerate(written)), int(PROJECT), None)
    if not plain:
        for o, w in zip(out, written, strict=True):
            o.copy_(w)
