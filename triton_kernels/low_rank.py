"""Low-rank updates of many matrices in one launch, and second moments of keys.

rank_update, for each matrix W [m, n] with factors U [m, r], V [n, r] and a base B (often W itself):

    W = round(B + alpha (U V^T))        product and sum in float32, one rounding on the store

    kernel   ranks        factors   what one program does
    outer    0 .. 8       any       one tile; r outer products by multiplication
    strip    9 .. 256     half      a strip of tiles along a block of rows: U stays on the chip
    loop     all others   any       one tile; walks over the rank in steps

W is read once and written once by each of them, with 16-byte accesses where its address and its
row stride allow; U and V come from the L2 cache. Float32 factors are multiplied on tensor cores as
six products of bfloat16 parts, which loses no more than float32 does.

gram, for each layer with keys K [tokens, d], one key per row, and moments C [d, d]:

    C += alpha K^T K                    float32 products over a block of tokens, then added to C

One program owns one tile on or above the diagonal, walks over the tokens in order and mirrors its
tile at the end: no atomics, one order of addition, and a symmetric result.

What differs between the layers of a call stands in a table on the device; a program finds its layer
by binary search over the first tiles.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .philox import philox4x32_10
from .tables import float_bits, interpreted, upload

__all__ = ["gram", "rank_update"]

OUTER_RANK = 8
STRIP_RANK = 256
STRIP_TILES = 4
"""Tiles that a program updates with one U."""
TOKENS_PER_FLUSH = 2048
"""Tokens whose products are summed in float32 before they are added to C."""

_GRID = 2**31 - 1
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_TYPES[torch.float64] = tl.float64
_ROW = 18
_GRAM_ROW = 9


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _find(table_ptr, tile, layers, steps, ROW: tl.constexpr):  # type: ignore[no-untyped-def]
    """The row of the table whose tiles hold `tile`: the last one that starts at or before it."""
    low = tile * 0
    high = low + layers - 1
    for _ in range(steps):
        middle = (low + high + 1) // 2
        starts = tl.load(table_ptr + middle * ROW)
        low = tl.where(starts <= tile, middle, low)
        high = tl.where(starts <= tile, high, middle - 1)
    return table_ptr + low * ROW


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _pointer(row, FIELD: tl.constexpr, TYPE: tl.constexpr, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """A pointer from the table; with VECTOR > 1 elements known to start a 16-byte word."""
    pointer = tl.load(row + FIELD).to(tl.pointer_type(TYPE))
    BYTES: tl.constexpr = VECTOR * (TYPE.primitive_bitwidth // 8)
    if VECTOR > 1:
        pointer = tl.multiple_of(pointer, 16 if BYTES > 16 else BYTES)
    return pointer


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _number(row, FIELD: tl.constexpr, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """A number from the table, known to be a multiple of VECTOR."""
    return tl.multiple_of(tl.load(row + FIELD), VECTOR)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _draw(row, rows, cols, ROUNDING: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """16 random bits for each element of a tile: uint32 [BLOCK_M, BLOCK_N].

    Eight elements in a row share a block of the generator. Where the tile starts a group and walks
    along the index (ROUNDING 1) a block is drawn once for them, otherwise once per element.
    """
    key = tl.load(row + 16)
    k0 = (key & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    first = tl.load(row + 13)
    row_step = tl.load(row + 14)
    if ROUNDING == 1:
        groups_of_row = tl.min(cols, axis=0) // 8 + tl.arange(0, BLOCK_N // 8)
        group = (first + rows * row_step)[:, None] // 8 + groups_of_row[None, :]
        zero = tl.full(group.shape, 0, tl.uint32)
        w0, w1, w2, w3 = philox4x32_10(
            (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32), zero, zero, k0, k1
        )
        j = tl.arange(0, 8)[None, None, :]
        word = tl.where(
            j < 4,
            tl.where(j < 2, w0[:, :, None], w1[:, :, None]),
            tl.where(j < 6, w2[:, :, None], w3[:, :, None]),
        )
        half = (word >> ((j & 1) * 16).to(tl.uint32)) & 0xFFFF
        return tl.reshape(half, (BLOCK_M, BLOCK_N))
    col_step = tl.load(row + 15)
    index = first + rows[:, None] * row_step + cols[None, :] * col_step
    group = index >> 3
    zero = tl.full(group.shape, 0, tl.uint32)
    w0, w1, w2, w3 = philox4x32_10(
        (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32), zero, zero, k0, k1
    )
    j = (index & 7).to(tl.int32)
    word = tl.where(j < 4, tl.where(j < 2, w0, w1), tl.where(j < 6, w2, w3))
    return (word >> ((j & 1) * 16).to(tl.uint32)) & 0xFFFF


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _round(total, drawn, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Float32 sums to values of TYPE, still as float32, up or down by the drawn bits."""
    bits = total.to(tl.int32, bitcast=True)
    special = (bits & 0x7F800000) == 0x7F800000
    if TYPE == tl.bfloat16:  # noqa: SIM300
        moved = (bits + drawn.to(tl.int32)) & -65536
    else:
        moved = (bits + (drawn >> 3).to(tl.int32)) & -8192
        # Below the normal numbers of float16 the spacing is 2^-24, whatever the exponent.
        size = tl.abs(total) * 16777216.0
        down = tl.floor(size)
        up = (size - down) * 65536.0 >= drawn.to(tl.int32).to(tl.float32) + 1.0
        small = (down + up.to(tl.float32)) * (1.0 / 16777216.0)
        small_bits = small.to(tl.int32, bitcast=True) | (bits & -2147483648)
        moved = tl.where((bits & 0x7FFFFFFF) < 0x38800000, small_bits, moved)
    return tl.where(special, total, moved.to(tl.float32, bitcast=True))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _load_base(row, rows, cols, m, n, B: tl.constexpr, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tile of the base, 0 outside of it."""
    pointer = _pointer(row, 2, B, VECTOR)
    offset = rows[:, None] * _number(row, 9, VECTOR) + cols[None, :]
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    return tl.load(pointer + offset, mask=inside, other=0.0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _finish(  # type: ignore[no-untyped-def]
    row, rows, cols, m, n, r, base, product,
    W: tl.constexpr, VECTOR: tl.constexpr, ROUNDING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """base + alpha product, rounded, to the tile of W."""
    alpha = tl.load(row + 12).to(tl.int32).to(tl.float32, bitcast=True)
    base = base.to(tl.float32)
    # Without factors the base keeps its bits, also those of -0.
    total = tl.where(r > 0, base + product * alpha, base)
    if ROUNDING > 0:
        total = _round(total, _draw(row, rows, cols, ROUNDING, BLOCK_M, BLOCK_N), W)
    pointer = _pointer(row, 1, W, VECTOR)
    offset = rows[:, None] * _number(row, 8, VECTOR) + cols[None, :]
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    tl.store(pointer + offset, total.to(W), mask=inside)


@triton.jit(do_not_specialize=["layers", "steps"])  # type: ignore[untyped-decorator, unused-ignore]
def _outer_kernel(  # type: ignore[no-untyped-def]
    table_ptr, layers, steps,
    W: tl.constexpr, B: tl.constexpr, F: tl.constexpr,
    VECTOR: tl.constexpr, ROUNDING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of W for ranks so small that a padded matrix product would be mostly padding."""
    tile = tl.program_id(0).to(tl.int64)
    row = _find(table_ptr, tile, layers, steps, 18)
    tile -= tl.load(row)
    m = tl.load(row + 5)
    n = _number(row, 6, VECTOR)
    r = tl.load(row + 7)
    across = tl.load(row + 17)
    rows = tile // across * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
    base = _load_base(row, rows, cols, m, n, B, VECTOR)
    u = _pointer(row, 3, F, 1) + rows * tl.load(row + 10)
    v = _pointer(row, 4, F, 1) + cols * tl.load(row + 11)
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(r):
        a = tl.load(u + k, mask=rows < m, other=0.0).to(tl.float32)
        b = tl.load(v + k, mask=cols < n, other=0.0).to(tl.float32)
        product += a[:, None] * b[None, :]
    _finish(
        row, rows, cols, m, n, r, base, product, W, VECTOR, ROUNDING, BLOCK_M, BLOCK_N
    )  # fmt: skip


@triton.jit(do_not_specialize=["layers", "steps"])  # type: ignore[untyped-decorator, unused-ignore]
def _strip_kernel(  # type: ignore[no-untyped-def]
    table_ptr, layers, steps,
    W: tl.constexpr, B: tl.constexpr, F: tl.constexpr,
    VECTOR: tl.constexpr, FACTOR_VECTOR: tl.constexpr, ROUNDING: tl.constexpr,
    RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
    DOT_F32: tl.constexpr,
):  # fmt: skip
    """TILES tiles of W side by side; U is loaded once and stays on the chip."""
    strip = tl.program_id(0).to(tl.int64)
    row = _find(table_ptr, strip, layers, steps, 18)
    strip -= tl.load(row)
    m = tl.load(row + 5)
    n = _number(row, 6, VECTOR)
    r = _number(row, 7, FACTOR_VECTOR)
    across = tl.load(row + 17)
    rows = strip // across * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, RANK)
    u_ptr = _pointer(row, 3, F, FACTOR_VECTOR)
    v_ptr = _pointer(row, 4, F, FACTOR_VECTOR)
    u = tl.load(
        u_ptr + rows[:, None] * _number(row, 10, FACTOR_VECTOR) + ranks[None, :],
        mask=(rows < m)[:, None] & (ranks < r)[None, :],
        other=0.0,
    )
    if DOT_F32:
        u = u.to(tl.float32)
    v_step = _number(row, 11, FACTOR_VECTOR)
    left = strip % across * (TILES * BLOCK_N)
    end = tl.multiple_of(tl.minimum(n, left + TILES * BLOCK_N), VECTOR)
    base = _load_base(row, rows, left + tl.arange(0, BLOCK_N), m, end, B, VECTOR)
    for t in range(TILES):
        cols = left + t * BLOCK_N + tl.arange(0, BLOCK_N)
        v = tl.load(
            v_ptr + cols[:, None] * v_step + ranks[None, :],
            mask=(cols < n)[:, None] & (ranks < r)[None, :],
            other=0.0,
        )
        # The next tile of the base is on its way while this one is computed.
        upcoming = _load_base(row, rows, cols + BLOCK_N, m, end, B, VECTOR)
        if DOT_F32:
            v = v.to(tl.float32)
        product = tl.dot(u, tl.trans(v))
        _finish(
            row, rows, cols, m, n, r, base, product, W, VECTOR, ROUNDING, BLOCK_M, BLOCK_N
        )  # fmt: skip
        base = upcoming


@triton.jit(do_not_specialize=["layers", "steps"])  # type: ignore[untyped-decorator, unused-ignore]
def _loop_kernel(  # type: ignore[no-untyped-def]
    table_ptr, layers, steps,
    W: tl.constexpr, B: tl.constexpr, F: tl.constexpr,
    VECTOR: tl.constexpr, FACTOR_VECTOR: tl.constexpr, ROUNDING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
    DOT_F32: tl.constexpr,
):  # fmt: skip
    """One tile of W; both factors stream past in steps of BLOCK_R ranks."""
    tile = tl.program_id(0).to(tl.int64)
    row = _find(table_ptr, tile, layers, steps, 18)
    tile -= tl.load(row)
    m = tl.load(row + 5)
    n = _number(row, 6, VECTOR)
    r = _number(row, 7, FACTOR_VECTOR)
    across = tl.load(row + 17)
    # GROUP blocks of rows walk along the columns together: they share the tiles of V in the cache.
    down = (m + BLOCK_M - 1) // BLOCK_M
    top = tile // (GROUP * across) * GROUP
    height = tl.minimum(down - top, GROUP)
    inner = tile % (GROUP * across)
    rows = (top + inner % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = inner // height * BLOCK_N + tl.arange(0, BLOCK_N)
    u = _pointer(row, 3, F, FACTOR_VECTOR) + rows[:, None] * _number(row, 10, FACTOR_VECTOR)
    v = _pointer(row, 4, F, FACTOR_VECTOR) + cols[:, None] * _number(row, 11, FACTOR_VECTOR)
    base = _load_base(row, rows, cols, m, n, B, VECTOR)
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, r, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        inside = (ranks < r)[None, :]
        a = tl.load(u + ranks[None, :], mask=(rows < m)[:, None] & inside, other=0.0)
        b = tl.load(v + ranks[None, :], mask=(cols < n)[:, None] & inside, other=0.0)
        if DOT_F32:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        product = tl.dot(a, tl.trans(b), product, input_precision="ieee" if DOT_F32 else "bf16x6")
    _finish(
        row, rows, cols, m, n, r, base, product, W, VECTOR, ROUNDING, BLOCK_M, BLOCK_N
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _halves(tile, ROWS: tl.constexpr, COLS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The left and the right half of a tile [ROWS, 2 COLS]."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLS)), (0, 2, 1)))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _add_piece(  # type: ignore[no-untyped-def]
    corner, piece, alpha, step, high, wide,
    NUMBER: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Add alpha times one piece of a tile to the moments."""
    rows = tl.arange(0, ROWS)
    cols = NUMBER * COLS + tl.arange(0, COLS)
    at = corner + (rows[:, None] * step + cols[None, :])
    inside = (rows < high)[:, None] & (cols < wide)[None, :]
    sums = tl.load(at, mask=inside, other=0.0)
    tl.store(at, sums + piece.to(C) * alpha, mask=inside)


@triton.jit(do_not_specialize=["layers", "steps", "first", "block", "last"])  # type: ignore[untyped-decorator, unused-ignore]
def _gram_kernel(  # type: ignore[no-untyped-def]
    table_ptr, layers, steps, first, block, last,
    C: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr,
    VECTOR: tl.constexpr, C_VECTOR: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, DOT_F32: tl.constexpr,
):  # fmt: skip
    """One tile of C, for the tokens first .. first + block - 1; the last launch mirrors it."""
    tile = tl.program_id(0).to(tl.int64)
    row = _find(table_ptr, tile, layers, steps, 9)
    tile -= tl.load(row)
    # Tile (i, j), i <= j, is number j (j + 1) / 2 + i; float32 finds j up to one.
    j = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int64)
    j = tl.where(j * (j + 1) // 2 > tile, j - 1, j)
    j = tl.where((j + 1) * (j + 2) // 2 <= tile, j + 1, j)
    i = tile - j * (j + 1) // 2
    tokens = tl.load(row + 4)
    d = _number(row, 5, VECTOR)
    k_ptr = _pointer(row, 1, K, VECTOR)
    k_step = _number(row, 6, VECTOR)
    above = i * BLOCK_D + tl.arange(0, BLOCK_D)
    right = j * BLOCK_D + tl.arange(0, BLOCK_D)
    c_step = _number(row, 7, C_VECTOR)
    c_ptr = _pointer(row, 3, C, C_VECTOR)
    corner = c_ptr + i * BLOCK_D * c_step + j * BLOCK_D
    # Inside a tile 32 bits count the elements: half the registers of 64.
    step = tl.multiple_of(c_step.to(tl.int32), C_VECTOR)
    high = tl.minimum(d - i * BLOCK_D, BLOCK_D).to(tl.int32)
    wide = tl.minimum(d - j * BLOCK_D, BLOCK_D).to(tl.int32)
    alpha = tl.load(row + 8).to(tl.float64, bitcast=True).to(C)
    product = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    begin = tokens * 0 + first
    for start in range(begin, tl.minimum(begin + block, tokens), BLOCK_T):
        at = start + tl.arange(0, BLOCK_T)
        taken = at < tokens
        if MASKED:
            mask_ptr = tl.load(row + 2).to(tl.pointer_type(tl.uint8))
            taken = taken & (tl.load(mask_ptr + at, mask=taken, other=0) != 0)
        lines = k_ptr + at[:, None] * k_step
        a = tl.load(lines + above[None, :], mask=taken[:, None] & (above < d)[None, :], other=0.0)
        b = tl.load(lines + right[None, :], mask=taken[:, None] & (right < d)[None, :], other=0.0)
        if DOT_F32:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        product = tl.dot(tl.trans(a), b, product, input_precision="ieee" if DOT_F32 else "bf16x6")
    # A quarter at a time, or the float64 sums would not fit into the registers.
    left, rest = _halves(product, BLOCK_D, BLOCK_D // 2)
    first_quarter, second_quarter = _halves(left, BLOCK_D, BLOCK_D // 4)
    third_quarter, last_quarter = _halves(rest, BLOCK_D, BLOCK_D // 4)
    _add_piece(corner, first_quarter, alpha, step, high, wide, 0, C, BLOCK_D, BLOCK_D // 4)
    _add_piece(corner, second_quarter, alpha, step, high, wide, 1, C, BLOCK_D, BLOCK_D // 4)
    _add_piece(corner, third_quarter, alpha, step, high, wide, 2, C, BLOCK_D, BLOCK_D // 4)
    _add_piece(corner, last_quarter, alpha, step, high, wide, 3, C, BLOCK_D, BLOCK_D // 4)
    if last == 0:
        return
    # What the loop stored is read back by other threads of the program.
    tl.debug_barrier()
    mirror = c_ptr + j * BLOCK_D * c_step + i * BLOCK_D
    cols = tl.arange(0, BLOCK_D)
    for start in range(0, BLOCK_D, 16):
        rows = start + tl.arange(0, 16)
        inside = (rows < high)[:, None] & (cols < wide)[None, :]
        if i == j:
            inside = inside & (rows[:, None] < cols[None, :])
        sums = tl.load(corner + rows[:, None] * step + cols[None, :], mask=inside, other=0.0)
        there = mirror + cols[:, None] * step + rows[None, :]
        tl.store(there, tl.trans(sums), mask=tl.trans(inside))


@dataclass(frozen=True)
class _Launch:
    """What the layers of one launch share."""

    kind: str
    types: tuple[Any, Any, Any]
    vector: int
    factor_vector: int
    rounding: int
    rank: int
    """The padded rank of a strip, else 0."""

    @property
    def small(self) -> bool:
        """Single accesses need more registers per element, so the tiles are smaller."""
        narrow = self.types[2] != tl.float32 and self.factor_vector == 1
        return self.vector == 1 or self.rounding == 2 or (self.kind == "loop" and narrow)

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of W that a program owns at a time."""
        if self.kind == "outer":
            return (32, 64) if self.small else (32, 128)
        if self.kind == "strip":
            return 128, 64
        if self.small:
            return 64, 64
        return (128, 64) if self.types[2] == tl.float32 else (128, 128)

    @property
    def constants(self) -> dict[str, Any]:
        w, b, f = self.types
        block_m, block_n = self.tile
        shared = {
            "W": w, "B": b, "F": f, "VECTOR": self.vector, "ROUNDING": self.rounding,
            "BLOCK_M": block_m, "BLOCK_N": block_n,
        }  # fmt: skip
        if self.kind == "outer":
            return shared
        shared |= {"FACTOR_VECTOR": self.factor_vector, "DOT_F32": interpreted()}
        if self.kind == "strip":
            return shared | {"RANK": self.rank, "TILES": STRIP_TILES}
        half = not self.small and f != tl.float32 and tl.float32 not in (w, b)
        return shared | {"BLOCK_R": 64 if half else 32, "GROUP": 8}

    @property
    def options(self) -> dict[str, Any]:
        """No fused multiply-add: alpha U V^T is rounded to float32 before B is added."""
        warps = 4 if self.kind == "outer" and self.small else 8
        stages = 3 if self.kind == "loop" and self.tile == (128, 128) else 2
        return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}

    @property
    def kernel(self) -> Any:
        return {"outer": _outer_kernel, "strip": _strip_kernel, "loop": _loop_kernel}[self.kind]


def rank_update(
    outs: Sequence[torch.Tensor],
    bases: Sequence[torch.Tensor],
    us: Sequence[torch.Tensor],
    vs: Sequence[torch.Tensor],
    alphas: Sequence[float],
    keys: Sequence[int] | None = None,
) -> None:
    """outs[i] = round(bases[i] + alphas[i] us[i] vs[i]^T), all of them in a few launches.

    Layers that share dtypes, alignment and kernel share a launch, whatever their shapes and ranks.

    Args:
        outs: [..., m, n], bfloat16, float16 or float32, all on one device; written.
        bases: of the shapes of `outs`; an item may be the item of `outs` itself.
        us, vs: [..., m, r] and [..., n, r] of one dtype: bfloat16, float16 or float32.
        alphas: float32 values.
        keys: 64 bits each, of the streams that round up or down; None rounds to nearest even.
    """
    groups: dict[_Launch, list[list[int]]] = {}
    copies = []
    kept_alive = []
    for i, out in enumerate(outs):
        base, u, v = bases[i], us[i], vs[i]
        if not out.numel():
            continue
        written = out
        if out.stride(-1) != 1 and out.shape[-1] > 1 and out.stride(-2) != 1 and out.shape[-2] > 1:
            written = out.contiguous()
            copies.append((out, written))
            base = written if base is out else base
        launch, rows, used = _layer(
            written, base, u, v, alphas[i], None if keys is None else keys[i]
        )
        kept_alive += used
        groups.setdefault(launch, []).extend(rows)
    for launch, rows in groups.items():
        _run(launch.kernel, rows, _ROW, outs[0].device, launch.constants, launch.options)
    for out, written in copies:
        out.copy_(written)


def _layer(
    out: torch.Tensor,
    base: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    alpha: float,
    key: int | None,
) -> tuple[_Launch, list[list[int]], list[torch.Tensor]]:
    """Which launch serves a layer, its rows of the table, and the tensors that they point to."""
    m, n = out.shape[-2:]
    count = m * n
    r = u.shape[-1]
    turned = out.stride(-1) != 1 and n > 1
    if turned:
        # A transposed W is updated as W^T += V U^T; the stream still counts in the order of W.
        out, base, u, v = out.mT, base.mT, v, u
        m, n = n, m
    if base.stride(-1) != 1 and n > 1:
        base = base.contiguous()
    if u.stride(-1) != 1 and r > 1:
        u = u.contiguous()
    if v.stride(-1) != 1 and r > 1:
        v = v.contiguous()
    steps = [_step(tensor) for tensor in (out, base, u, v)]
    size = u.element_size()

    wide = n % 8 == 0 and _divisible((out, base), 8, 16)
    vector = 8 if wide else 1
    factor_vector = 1
    for width in (8, 4, 2):
        if r % width == 0 and _divisible((u, v), width, min(16, width * size)):
            factor_vector = width
            break
    rounding = 0
    if key is not None:
        rounding = 1 if wide and not turned else 2
    kind, rank = "loop", 0
    if r <= OUTER_RANK:
        kind, factor_vector = "outer", 1
    elif (
        size == 2
        and wide
        and rounding < 2
        and r <= _deepest_strip(out.device, factor_vector, rounding)
    ):
        kind, rank = "strip", max(16, triton.next_power_of_2(r))
    types = (_TYPES[out.dtype], _TYPES[base.dtype], _TYPES[u.dtype])
    launch = _Launch(kind, types, vector, factor_vector, rounding, rank)

    block_m, block_n = launch.tile
    across = triton.cdiv(n, block_n * (STRIP_TILES if kind == "strip" else 1))
    tiles = triton.cdiv(m, block_m) * across
    index_steps = (1, m) if turned else (n, 1)
    rows = []
    for number, starts in enumerate(_starts((out, base, u, v))):
        rows.append(
            [
                tiles, *starts, m, n, r, *steps, float_bits(alpha),
                number * count, *index_steps, key or 0, across,
            ]
        )  # fmt: skip
    return launch, rows, [out, base, u, v]


def _deepest_strip(device: torch.device, factor_vector: int, rounding: int) -> int:
    """The largest rank of a strip: factors read one by one take registers that U needs."""
    if factor_vector > 1:
        return STRIP_RANK if _roomy(device) else STRIP_RANK // 2
    return 0 if rounding else STRIP_RANK // 2


@functools.cache
def _roomy(device: torch.device) -> bool:
    """Whether U of the largest rank fits beside two tiles of V and W: not on small NVIDIA cards."""
    if device.type == "cpu" or torch.version.hip:
        return True
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin) >= 160 << 10


def _step(tensor: torch.Tensor) -> int:
    """The distance of two rows; none where there is one row only."""
    return int(tensor.stride(-2)) if tensor.shape[-2] > 1 else 0


def _divisible(tensors: Sequence[torch.Tensor], elements: int, alignment: int) -> bool:
    """Whether every row of every matrix starts at a multiple of `alignment` bytes."""
    for tensor in tensors:
        if tensor.data_ptr() % alignment or _step(tensor) % elements:
            return False
        batch = zip(tensor.shape[:-2], tensor.stride()[:-2], strict=True)
        if any(length > 1 and stride % elements for length, stride in batch):
            return False
    return True


def _starts(tensors: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """The addresses of the matrices that the leading dimensions count, in row-major order."""
    places = [(tensor.data_ptr(), tensor.element_size(), tensor.stride()) for tensor in tensors]
    for index in itertools.product(*map(range, tensors[0].shape[:-2])):
        yield [
            start + size * sum(i * stride for i, stride in zip(index, strides, strict=False))
            for start, size, strides in places
        ]


def _run(
    kernel: Any,
    rows: list[list[int]],
    width: int,
    device: torch.device,
    constants: dict[str, Any],
    options: dict[str, Any],
    arguments: Sequence[tuple[int, ...]] = ((),),
) -> None:
    """Launch a kernel over all tiles of the rows, once for each item of `arguments`."""
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        for part, tiles in _fitting(rows):
            numbers = [number for row in part for number in row]
            assert len(numbers) == width * len(part)
            table = upload(numbers, device)
            steps = (len(part) - 1).bit_length()
            for more in arguments:
                kernel[(tiles,)](table, len(part), steps, *more, **constants, **options)


def _fitting(rows: list[list[int]]) -> Iterator[tuple[list[list[int]], int]]:
    """Rows whose tiles fit into one grid, with the first tile of each in its first column."""
    part: list[list[int]] = []
    tiles = 0
    for row in rows:
        if tiles and tiles + row[0] > _GRID:
            yield part, tiles
            part, tiles = [], 0
        part.append([tiles, *row[1:]])
        tiles += row[0]
    if part:
        yield part, tiles


def gram(
    cs: Sequence[torch.Tensor],
    ks: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor | None],
    alpha: float,
) -> None:
    """cs[i] += alpha ks[i]^T ks[i] over the tokens that masks[i] takes; a few launches for all.

    The upper triangle is read and updated, the lower one becomes its mirror image.

    Args:
        cs: [..., d, d], float64 or float32, all on one device.
        ks: [..., tokens, d], bfloat16, float16 or float32: one key per row.
        masks: bool [..., tokens], of the leading dimensions of the keys, or None.
        alpha: a float64 value.
    """
    groups: dict[tuple[Any, ...], list[list[int]]] = {}
    lengths: dict[tuple[Any, ...], int] = {}
    copies = []
    kept_alive: list[torch.Tensor] = []
    bits = struct.unpack("<q", struct.pack("<d", alpha))[0]
    for c, k, mask in zip(cs, ks, masks, strict=True):
        tokens, d = k.shape[-2:]
        if not c.numel():
            continue
        written = c
        if d > 1 and (c.stride(-1) != 1 or c.stride(-2) >= 1 << 24):
            written = c.clone(memory_format=torch.contiguous_format)
            copies.append((c, written))
        if d > 1 and k.stride(-1) != 1:
            k = k.contiguous()
        tensors = [written, k]
        if mask is not None:
            tensors.append(mask.contiguous().view(torch.uint8).unsqueeze(-1))
        kept_alive += tensors
        vector = 8 if d % 8 == 0 and _divisible([k], 8, 16) else 1
        c_vector = 2 if d % 2 == 0 and _divisible([written], 2, 2 * c.element_size()) else 1
        group = (_TYPES[c.dtype], _TYPES[k.dtype], mask is not None, vector, c_vector)
        block_d, _, _ = gram_tile(k.dtype, vector)
        down = triton.cdiv(d, block_d)
        for starts in _starts(tensors):
            c_start, k_start, *mask_start = starts
            groups.setdefault(group, []).append(
                [
                    down * (down + 1) // 2, k_start, *(mask_start or [0]), c_start, tokens, d,
                    _step(k), _step(written), bits,
                ]
            )  # fmt: skip
        lengths[group] = max(lengths.get(group, 0), tokens)
    for group, rows in groups.items():
        c_type, k_type, masked, vector, c_vector = group
        dtype = torch.float32 if k_type == tl.float32 else torch.bfloat16
        block_d, block_t, options = gram_tile(dtype, vector)
        constants = {
            "C": c_type, "K": k_type, "MASKED": masked, "VECTOR": vector, "C_VECTOR": c_vector,
            "BLOCK_D": block_d, "BLOCK_T": block_t, "DOT_F32": interpreted(),
        }  # fmt: skip
        firsts = range(0, max(1, lengths[group]), TOKENS_PER_FLUSH)
        arguments = [(first, TOKENS_PER_FLUSH, int(first == firsts[-1])) for first in firsts]
        _run(_gram_kernel, rows, _GRAM_ROW, cs[0].device, constants, options, arguments)
    for c, written in copies:
        c.copy_(written)


def gram_tile(dtype: torch.dtype, vector: int) -> tuple[int, int, dict[str, Any]]:
    """Rows and columns of C per program, tokens per step, and the options of the launch."""
    wide = dtype != torch.float32 and vector > 1
    options = {"num_warps": 8, "num_stages": 3 if wide else 2, "enable_fp_fusion": False}
    return (128, 64, options) if wide else (64, 32, options)
