"""combine: base and K tensors read once, one output written once, many tensors in one launch.

For models k = 0 .. K-1 in float32, in this order, no product fused with a sum:

    d_k = x_k - b                              or x_k without a base, or for packed deltas
    d_k = 0 where not kept                     trim: code(d_k) against a threshold, where
                                               code(d) = bits of |d|; drop: the stream of philox.py
    v_k = d_k * scale_k
    no election:   D = v_0 + v_1 + ...         mean: / denominator of the row
    election:      vote_k = v_k, or d_k * rescale_k (unweighted)
                   a = sum vote_k (mass) or sum sign(vote_k) (frequency); plus = a >= 0
                   in_k = vote_k > 0 if plus else vote_k < 0           (NaN takes part)
                   D = sum of v_k over in_k    mean: / sum of weights, or / count, over in_k
                   max: v_k of largest |v_k| over in_k, the first of equals
    out = b + D * lam                          or D * lam; rounded once, to nearest even

A launch serves all rows of one signature: equal dtypes, and pointers that are multiples of 16 bytes
or not. What differs between rows stands in a table on the device. A program is one warp. It finds
its row by a search of fan-out 64, so in one or two dependent loads for any model, and walks along a
span of it in tiles of 512 elements; a thread has 16 elements in flight per tensor.

    up to 8 models     unrolled: all tensors of a tile are loaded before the first is used, and the
                       election finds them in registers; up to 4 where they would only fill them,
                       or are float32
    more               a loop over the models by fours; the election sweeps twice, the second time
                       out of the cache, and draws masks twice
    tails              one masked tile per row, always by the loop
    packed             tiles of 2048 elements, as the layout counts, by eight warps; a scan over the
                       masks says which value belongs to which element; models one by one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton
import triton.language as tl

from .philox import count_bits, keep_bits, kept, kept_before, spread
from .tables import float_bits, upload

__all__ = ["MOST_MODELS", "combine_rows"]

MOST_MODELS = 32

_TILE = 512
_PACK_TILE = 2048
_PROGRAMS = 16384
_MOST_STEPS = 32
_FAN = 64

_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_NO_BASE = -1
_MIXED = -1

# How the choices travel to the kernel.
_SPARSIFY = {"none": 0, "trim": 1, "drop": 2}
_PACKED = 3
_ELECT = {"none": 0, "mass": 1, "frequency": 2}
_REDUCE = {"sum": 0, "mean": 1, "max": 2}

# The words of a row in the table: n, base, out, its first entry in the call, its denominator. Then
# `models` words for each field: address and kind; weight where it is a divisor; key and threshold
# of a drop; address of the offsets of a packed entry, and how many values an entry has. A kind is
# the dtype's code, and two flags.
_HEAD = 5
_IS_DELTA = 4
_IS_PACKED = 8


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _find_row(table, rows, width, program):  # type: ignore[no-untyped-def]
    """The last row whose first program is at most `program`; `width` is a power of 64, or 0."""
    row = rows * 0
    fan = tl.arange(0, 64)
    while width > 0:
        index = row + fan * width
        first = tl.load(table + index, mask=index < rows, other=0x7FFFFFFFFFFFFFFF)
        row += (tl.sum((first <= program).to(tl.int32), axis=0) - 1) * width
        width = width // 64
    return row


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _pointer(address, CODE: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    if CODE == 0:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    elif CODE == 1:
        pointer = address.to(tl.pointer_type(tl.float16))
    else:
        pointer = address.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _load(pointer, place, wanted, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    # A mask would break the vectors up, so whole tiles have none.
    if MASKED:
        x = tl.load(pointer + place, mask=wanted, other=0.0)
    else:
        x = tl.load(pointer + place)
    return x


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _load_term(  # type: ignore[no-untyped-def]
    address, kind, start, place, wanted,
    CODE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The values of one model at start + place; float32 if its dtype stands in the table only."""
    if CODE >= 0:
        x = _load(_pointer(address, CODE, ALIGNED) + start, place, wanted, MASKED)
    else:
        code = kind & 3
        if code == 0:
            x = _load(_pointer(address, 0, ALIGNED) + start, place, wanted, MASKED).to(tl.float32)
        elif code == 1:
            x = _load(_pointer(address, 1, ALIGNED) + start, place, wanted, MASKED).to(tl.float32)
        else:
            x = _load(_pointer(address, 2, ALIGNED) + start, place, wanted, MASKED)
    return x


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _mask_words(fields, models, k, start, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The masks of the drop for the groups of a tile: uint32 [TILE // 16]."""
    key = tl.load(fields + 3 * models + k)
    return keep_bits(
        start // 16 + tl.arange(0, TILE // 16),
        (key & 0xFFFFFFFF).to(tl.uint32),
        ((key >> 32) & 0xFFFFFFFF).to(tl.uint32),
        tl.load(fields + 4 * models + k),
    )


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _trim(d, lane, code, cut, SHORT: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a threshold keeps; of the elements at it, the lanes below `cut`."""
    if SHORT:
        at_least = code + (cut <= 0).to(tl.int64)
        whole = (cut <= 0) | (cut >= lane.shape[0])
        if whole & (at_least <= 0x7F800000):
            # One answer for all that is at the threshold: compare magnitudes, NaN above all.
            limit = tl.maximum(at_least, 0).to(tl.int32).to(tl.float32, bitcast=True)
            d = tl.where(tl.abs(d) < limit, 0.0, d)
        else:
            codes = d.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            keep = (codes > code) | ((codes == code) & (lane < cut))
            d = tl.where(keep, d, 0.0)
    else:
        # One more than the code where ties are not kept; -1 becomes 0 there, and keeps everything.
        codes = d.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
        limits = tl.add(
            code.to(tl.uint32, bitcast=True), (lane >= cut).to(tl.uint32), sanitize_overflow=False
        )
        d = tl.where(codes >= limits, d, 0.0)
    return d


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _deltas(  # type: ignore[no-untyped-def]
    fields, models, base, first_entry, k, start, lane, inside, codes_ptr, cuts_ptr,
    COUNT: tl.constexpr, BASE: tl.constexpr, TERMS: tl.constexpr, ALIGNED: tl.constexpr,
    SPARSIFY: tl.constexpr, MASKED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The kept deltas of models k .. k + COUNT - 1, float32; all are loaded before one is used."""
    found = ()
    if SPARSIFY == 3:
        for j in tl.static_range(COUNT):
            kind = tl.load(fields + models + k + j)
            is_packed = (kind & 8) != 0
            bits = _mask_words(fields, models, k + j, start, TILE)
            in_group = count_bits(bits)
            before = tl.cumsum(in_group, axis=0) - in_group
            spread_bits = spread(bits, TILE // 16)
            keep = kept(spread_bits, lane) & inside
            origin, place = start, lane
            if is_packed:
                offsets = tl.load(fields + 5 * models + k + j).to(tl.pointer_type(tl.int64))
                origin = tl.load(offsets + start // TILE)
                place = spread(before, TILE // 16) + kept_before(spread_bits, lane)
            # Offsets of another stream must not read beyond the values.
            count = tl.load(fields + 6 * models + k + j)
            least = tl.minimum(tl.maximum(-origin, 0), TILE).to(tl.int32)
            limit = tl.minimum(tl.maximum(count - origin, 0), TILE).to(tl.int32)
            x = _load_term(
                tl.load(fields + k + j), kind, origin, place,
                keep & (place >= least) & (place < limit),
                (TERMS >> (2 * j)) & 3 if TERMS >= 0 else -1, False, True,
            )  # fmt: skip
            d = x.to(tl.float32)
            if BASE >= 0:  # noqa: SIM102  one is known to the compiler, the other to the device
                if (kind & 4) == 0:
                    d = d - base
            found += (tl.where(keep, d, 0.0),)  # type: ignore[assignment, unused-ignore]
    else:
        loaded = ()
        for j in tl.static_range(COUNT):
            kind = 0
            if TERMS < 0:
                kind = tl.load(fields + models + k + j)
            loaded += (  # type: ignore[assignment, unused-ignore]
                _load_term(
                    tl.load(fields + k + j), kind, start, lane, inside,
                    (TERMS >> (2 * j)) & 3 if TERMS >= 0 else -1, ALIGNED, MASKED,
                ),
            )  # fmt: skip
        for j in tl.static_range(COUNT):
            d = loaded[j].to(tl.float32)
            if BASE >= 0:  # type: ignore[unreachable, unused-ignore]
                d = d - base
            if SPARSIFY == 1:
                code = tl.load(codes_ptr + first_entry + k + j)
                cut = tl.load(cuts_ptr + first_entry + k + j) - start
                cut = tl.minimum(tl.maximum(cut, 0), TILE).to(tl.int32)
                # Where dtypes are mixed the loads branch already, and registers are short.
                d = _trim(d, lane, code, cut, TERMS >= 0)
            elif SPARSIFY == 2:
                bits = _mask_words(fields, models, k + j, start, TILE)
                d = tl.where(kept(spread(bits, TILE // 16), lane), d, 0.0)
            found += (d,)  # type: ignore[assignment, unused-ignore]
    return found


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _value(d, scales_ptr, entry):  # type: ignore[no-untyped-def]
    return d * tl.load(scales_ptr + entry)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _add_vote(mass, d, scales_ptr, rescales_ptr, entry, ELECT: tl.constexpr):  # type: ignore[no-untyped-def]
    if rescales_ptr is None:
        vote = _value(d, scales_ptr, entry)
    else:
        vote = _value(d, rescales_ptr, entry)
    if ELECT == 2:
        vote = (vote > 0).to(tl.float32) - (vote < 0).to(tl.float32)
    return mass + vote


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _add_elected(  # type: ignore[no-untyped-def]
    total, divisor, sign, d, scales_ptr, rescales_ptr, entry, weight_ptr,
    REDUCE: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    value = _value(d, scales_ptr, entry)
    if rescales_ptr is None:
        vote = value
    else:
        vote = _value(d, rescales_ptr, entry)
    # Said by what does not agree, so that NaN agrees and reaches the output.
    against = vote * sign <= 0
    if REDUCE == 2:
        larger = (tl.abs(value) > tl.abs(total)) | ((value != value) & (total == total))
        total = tl.where(against, total, tl.where(larger, value, total))
    else:
        total = total + tl.where(against, 0.0, value)
        if REDUCE == 1:
            if COUNTED:
                share = 1.0
            else:
                share = tl.load(weight_ptr).to(tl.int32).to(tl.float32, bitcast=True)
            divisor = divisor + tl.where(against, 0.0, share)
    return total, divisor


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _tile(  # type: ignore[no-untyped-def]
    record, models, start, n, scales_ptr, rescales_ptr, codes_ptr, cuts_ptr, lam,
    UNROLLED: tl.constexpr, BATCH: tl.constexpr, BASE: tl.constexpr, TERMS: tl.constexpr,
    OUT: tl.constexpr, ALIGNED: tl.constexpr, SPARSIFY: tl.constexpr, ELECT: tl.constexpr,
    REDUCE: tl.constexpr, COUNTED: tl.constexpr, MASKED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The elements start .. start + TILE - 1 of a row.

    UNROLLED: models at once, the only ones; 0: `models`, by BATCH and one by one.
    """
    fields = record + 5
    first_entry = tl.load(record + 3)
    lane = tl.arange(0, TILE)
    if MASKED:
        inside = lane < n - start
    else:
        inside = lane >= 0
    base = 0.0
    if BASE >= 0:
        base_ptr = _pointer(tl.load(record + 1), BASE, ALIGNED) + start
        base = _load(base_ptr, lane, inside, MASKED).to(tl.float32)

    # -0 is what a sum starts with where nothing may change the sign of a first zero.
    total = tl.full((TILE,), -0x80000000, tl.int32).to(tl.float32, bitcast=True)
    mass = tl.zeros((TILE,), tl.float32)
    divisor = tl.zeros((TILE,), tl.float32)
    whole = 0
    if UNROLLED > 0:
        ds = _deltas(
            fields, models, base, first_entry, 0, start, lane, inside, codes_ptr, cuts_ptr,
            UNROLLED, BASE, TERMS, ALIGNED, SPARSIFY, MASKED, TILE,
        )  # fmt: skip
        for j in tl.static_range(UNROLLED):
            if ELECT > 0:
                mass = _add_vote(mass, ds[j], scales_ptr, rescales_ptr, first_entry + j, ELECT)
            else:
                total = total + _value(ds[j], scales_ptr, first_entry + j)
    else:
        if BATCH > 1:
            whole = models // BATCH * BATCH
            for k in range(0, whole, BATCH):
                ds = _deltas(
                    fields, models, base, first_entry, k, start, lane, inside, codes_ptr, cuts_ptr,
                    BATCH, BASE, TERMS, ALIGNED, SPARSIFY, MASKED, TILE,
                )  # fmt: skip
                for j in tl.static_range(BATCH):
                    entry = first_entry + k + j
                    if ELECT > 0:
                        mass = _add_vote(mass, ds[j], scales_ptr, rescales_ptr, entry, ELECT)
                    else:
                        total = total + _value(ds[j], scales_ptr, entry)
        for k in range(whole, models):
            ds = _deltas(
                fields, models, base, first_entry, k, start, lane, inside, codes_ptr, cuts_ptr,
                1, BASE, TERMS, ALIGNED, SPARSIFY, MASKED, TILE,
            )  # fmt: skip
            if ELECT > 0:
                mass = _add_vote(mass, ds[0], scales_ptr, rescales_ptr, first_entry + k, ELECT)
            else:
                total = total + _value(ds[0], scales_ptr, first_entry + k)

    if ELECT > 0:
        sign = tl.where(mass >= 0, 1.0, -1.0)
        total = tl.zeros((TILE,), tl.float32)
        weights = fields + 2 * models
        if UNROLLED > 0:
            for j in tl.static_range(UNROLLED):
                total, divisor = _add_elected(
                    total, divisor, sign, ds[j], scales_ptr, rescales_ptr, first_entry + j,
                    weights + j, REDUCE, COUNTED,
                )  # fmt: skip
        else:
            if BATCH > 1:
                for k in range(0, whole, BATCH):
                    ds = _deltas(
                        fields, models, base, first_entry, k, start, lane, inside, codes_ptr,
                        cuts_ptr, BATCH, BASE, TERMS, ALIGNED, SPARSIFY, MASKED, TILE,
                    )  # fmt: skip
                    for j in tl.static_range(BATCH):
                        total, divisor = _add_elected(
                            total, divisor, sign, ds[j], scales_ptr, rescales_ptr,
                            first_entry + k + j, weights + k + j, REDUCE, COUNTED,
                        )  # fmt: skip
            for k in range(whole, models):
                ds = _deltas(
                    fields, models, base, first_entry, k, start, lane, inside, codes_ptr,
                    cuts_ptr, 1, BASE, TERMS, ALIGNED, SPARSIFY, MASKED, TILE,
                )  # fmt: skip
                total, divisor = _add_elected(
                    total, divisor, sign, ds[0], scales_ptr, rescales_ptr, first_entry + k,
                    weights + k, REDUCE, COUNTED,
                )  # fmt: skip
        if REDUCE == 1:
            total = tl.div_rn(total, tl.where(divisor == 0, 1.0, divisor))
    elif REDUCE == 1:
        denominator = tl.load(record + 4).to(tl.int32).to(tl.float32, bitcast=True)
        total = tl.div_rn(total, tl.full((TILE,), 0.0, tl.float32) + denominator)

    total = total * lam
    if BASE >= 0:
        total = base + total
    out_ptr = _pointer(tl.load(record + 2), OUT, ALIGNED) + start
    if MASKED:
        tl.store(out_ptr + lane, total.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(out_ptr + lane, total.to(out_ptr.dtype.element_ty))


@triton.jit(  # type: ignore[untyped-decorator, unused-ignore]
    do_not_specialize=["rows", "width", "models", "steps"],
    do_not_specialize_on_alignment=[
        "table", "scales_ptr", "rescales_ptr", "codes_ptr", "cuts_ptr"
    ],
)  # fmt: skip
def _combine_kernel(  # type: ignore[no-untyped-def]
    table, rows, width, models, steps, scales_ptr, rescales_ptr, codes_ptr, cuts_ptr, lam,
    UNROLLED: tl.constexpr, FIELDS: tl.constexpr, BASE: tl.constexpr, TERMS: tl.constexpr,
    EACH: tl.constexpr, OUT: tl.constexpr, ALIGNED: tl.constexpr, SPARSIFY: tl.constexpr,
    ELECT: tl.constexpr, REDUCE: tl.constexpr, COUNTED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """TERMS: two bits for the dtype of each unrolled model, or of a batch; EACH: that of any model.

    Both are -1 where the table must say it.
    """
    program = tl.program_id(0).to(tl.int64)
    row = _find_row(table, rows, width, program)
    if UNROLLED > 0:
        models = UNROLLED
    record = table + rows + row * (5 + FIELDS * models)
    n = tl.load(record)
    first = (program - tl.load(table + row)) * steps
    full = tl.minimum(n // TILE - first, steps).to(tl.int32)
    for step in range(full):
        _tile(
            record, models, (first + step) * TILE, n, scales_ptr, rescales_ptr, codes_ptr,
            cuts_ptr, lam, UNROLLED, 1 if SPARSIFY == 3 or TERMS < 0 else 4, BASE, TERMS,
            OUT, ALIGNED, SPARSIFY, ELECT, REDUCE, COUNTED, False, TILE,
        )  # fmt: skip
    edge = (first + full) * TILE
    if (full < steps) & (edge < n):
        _tile(
            record, models, edge, n, scales_ptr, rescales_ptr, codes_ptr, cuts_ptr, lam,
            0, 1, BASE, EACH, OUT, ALIGNED, SPARSIFY, ELECT, REDUCE, COUNTED, True, TILE,
        )  # fmt: skip


@dataclass(frozen=True)
class _Signature:
    """What rows of one launch have in common."""

    base: int
    terms: tuple[int, ...]
    out: int
    aligned: bool

    def constants(self, unrolled: bool) -> dict[str, int | bool]:
        one = self.terms[0] if len(set(self.terms)) == 1 else _MIXED
        if unrolled:
            digits = sum(code << 2 * k for k, code in enumerate(self.terms))
        else:
            digits = one * 0b01010101 if one >= 0 else _MIXED  # of a batch of four
        return {
            "BASE": self.base,
            "TERMS": digits,
            "EACH": one,
            "OUT": self.out,
            "ALIGNED": self.aligned,
        }


@dataclass(frozen=True)
class _Launch:
    signature: _Signature
    rows: list[int]
    tiles: list[int]
    """Of each row."""

    def programs(self) -> tuple[int, list[int]]:
        """The tiles of a program, and the first program of each row and behind the last.

        Enough programs to fill a card come first, then fewer searches of the table.
        """
        steps = max(1, min(_MOST_STEPS, sum(self.tiles) // _PROGRAMS))
        return steps, [0, *accumulate(-(-tiles // steps) for tiles in self.tiles)]


def _launches(
    bases: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor],
    outs: Sequence[torch.Tensor],
    addresses: Sequence[Sequence[int]],
    models: int,
    packed: bool,
) -> list[_Launch]:
    """`addresses`: of the bases, of the tensors and of the outs."""
    tile = _PACK_TILE if packed else _TILE
    at_base, at_tensor, at_out = addresses
    codes = [_CODES[x.dtype] for x in tensors]
    found: dict[tuple[int, tuple[int, ...], int, bool], _Launch] = {}
    for row, out in enumerate(outs):
        n = out.numel()
        if n == 0:
            continue
        entries = slice(row * models, (row + 1) * models)
        every = at_out[row]
        if bases:
            every |= at_base[row]
        if not packed:  # packed values are read one by one; their address says nothing
            for address in at_tensor[entries]:
                every |= address
        base = _CODES[bases[row].dtype] if bases else _NO_BASE
        key = (base, tuple(codes[entries]), _CODES[out.dtype], every % 16 == 0)
        launch = found.get(key)
        if launch is None:
            launch = found[key] = _Launch(_Signature(*key), [], [])
        launch.rows.append(row)
        launch.tiles.append(-(-n // tile))
    return list(found.values())


def _most_unrolled(way: int, elect: str, terms: Sequence[int]) -> int:
    """Up to how many models a tile is unrolled: as many as leave registers free."""
    if way == _PACKED:
        return 0 if elect == "none" else 4
    if 2 in terms:  # float32: twice the registers
        return 4
    return 8 if way == _SPARSIFY["none"] or elect != "none" else 4


def _options(packed: bool) -> dict[str, int]:
    if not packed:
        return {"num_warps": 1}
    # Left alone, the assembler spills a word to stay at 128 registers.
    return {"num_warps": 8} | ({} if torch.version.hip else {"maxnreg": 168})


def _width(rows: int) -> int:
    """The stride of the first step of the search: the least 64^l with 64^(l + 1) >= rows."""
    width = 0 if rows == 1 else 1
    while width and width * _FAN < rows:
        width *= _FAN
    return width


def _words(values: Sequence[float]) -> list[int]:
    """float32 values, two in a word."""
    bits = [float_bits(value) & 0xFFFFFFFF for value in values]
    bits += [0] * (len(bits) % 2)
    return [low | high << 32 for low, high in zip(bits[::2], bits[1::2], strict=True)]


def combine_rows(
    bases: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor],
    outs: Sequence[torch.Tensor],
    models: int,
    *,
    weights: Sequence[float],
    scales: torch.Tensor | Sequence[float],
    rescales: torch.Tensor | Sequence[float] | None = None,
    sparsify: str = "none",
    codes: torch.Tensor | None = None,
    cuts: torch.Tensor | None = None,
    keys: Sequence[int] | None = None,
    keeps: Sequence[int] | None = None,
    packed: Sequence[torch.Tensor | None] | None = None,
    kinds: Sequence[int] | None = None,
    elect: str = "none",
    elect_on: str = "weighted",
    reduce: str = "sum",
    divisor: str = "weights",
    denominators: Sequence[float] | None = None,
    lam: float = 1.0,
) -> None:
    """Combine each row of `models` tensors into its entry of `outs`; the formula is above.

    An entry is one tensor of one row, entry row * models + k. All tensors are contiguous bfloat16,
    float16 or float32 in any mixture, of one device.

    Args:
        bases: one per row, or none: then the tensors themselves are combined.
        tensors: one per entry; of a packed entry its values, 1-D.
        outs: one per row; may be the memory of its base, and of none else.
        models: 1 to 32.
        weights: one per entry, the divisor of an elected mean.
        scales: one per entry, the factor of v_k: float32 [entries] on the device, or numbers.
        rescales: the same for the factor of unweighted votes; read for elect_on="unweighted".
        sparsify: "none", "trim" or "drop".
        codes, cuts: int32 and int64 [entries] on the device. A trim keeps element i where its code
            is above `codes`, or equal and i < `cuts`. A code of -1 keeps everything.
        keys, keeps: one per entry, the key of the stream and T in [0, 2^32], for a drop and for
            what is packed. 2^32 keeps everything.
        packed: one per entry: None, or its offsets, int64 [ceil(n / 2048) + 1]: the number of kept
            elements before each tile of 2048.
        kinds: one per entry of a call with `packed`: 1 for deltas, 0 where the base is subtracted.
        elect, elect_on, reduce, divisor: the fields of the policy.
        denominators: one per row, for a mean without election.
        lam: the factor on the combined delta.
    """
    if not 1 <= models <= MOST_MODELS:
        raise ValueError(f"models must be in 1 .. {MOST_MODELS}, got {models}")
    if packed is not None and all(offsets is None for offsets in packed):
        packed = None
    if packed is not None and sparsify == "trim":
        raise ValueError("packed entries cannot be trimmed")
    at_base = [x.data_ptr() for x in bases]
    at_tensor = [x.data_ptr() for x in tensors]
    at_out = [x.data_ptr() for x in outs]
    launches = _launches(
        bases, tensors, outs, (at_base, at_tensor, at_out), models, packed is not None
    )
    if not launches:
        return
    way = _SPARSIFY[sparsify] if packed is None else _PACKED
    unweighted = elect != "none" and elect_on == "unweighted"
    by_weight = elect != "none" and reduce == "mean" and divisor == "weights"

    # What the table holds for each entry, field by field; a later field needs the earlier ones.
    kind_of = [_CODES[x.dtype] for x in tensors]
    columns = [at_tensor, kind_of]
    if way >= _SPARSIFY["drop"] or by_weight:
        columns.append([float_bits(weight) for weight in weights])
    if way >= _SPARSIFY["drop"]:
        columns.append([0] * len(tensors) if keys is None else list(keys))
        columns.append([1 << 32] * len(tensors) if keeps is None else list(keeps))
    if packed is not None:
        columns.append([0 if offsets is None else offsets.data_ptr() for offsets in packed])
        columns.append([x.numel() for x in tensors])
        for e, offsets in enumerate(packed):
            kind_of[e] |= 0 if offsets is None else _IS_PACKED
            kind_of[e] |= _IS_DELTA if kinds is not None and kinds[e] == 1 else 0
    divisors = [float_bits(by) for by in denominators or [1.0] * len(outs)]

    numbers: list[int] = []
    places = []
    for launch in launches:
        steps, starts = launch.programs()
        places.append((len(numbers), steps, starts[-1]))
        numbers += starts[:-1]
        for row in launch.rows:
            first = row * models
            numbers += (
                outs[row].numel(), at_base[row] if bases else 0, at_out[row], first, divisors[row],
            )  # fmt: skip
            for column in columns:
                numbers += column[first : first + models]
    device = outs[0].device
    factors: list[tuple[int, int] | torch.Tensor | None] = []
    for given in (scales, rescales if unweighted else None):
        if given is None or isinstance(given, torch.Tensor):
            factors.append(given)
        else:
            words = _words(given)
            factors.append((len(numbers), len(words)))
            numbers += words
    table = upload(numbers, device)
    scales_on, rescales_on = (
        table[place[0] : place[0] + place[1]].view(torch.float32)
        if isinstance(place, tuple)
        else place
        for place in factors
    )

    with torch.cuda.device_of(outs[0]):
        for launch, (place, steps, programs) in zip(launches, places, strict=True):
            unrolled = models <= _most_unrolled(way, elect, launch.signature.terms)
            _combine_kernel[(programs,)](
                table[place:],
                len(launch.rows),
                _width(len(launch.rows)),
                models,
                steps,
                scales_on,
                rescales_on,
                codes if way == _SPARSIFY["trim"] else None,
                cuts if way == _SPARSIFY["trim"] else None,
                lam,
                UNROLLED=models if unrolled else 0,
                FIELDS=len(columns),
                **launch.signature.constants(unrolled),
                SPARSIFY=way,
                ELECT=_ELECT[elect],
                REDUCE=_REDUCE[reduce],
                COUNTED=divisor == "count",
                TILE=_PACK_TILE if packed is not None else _TILE,
                enable_fp_fusion=False,
                **_options(packed is not None),
            )
