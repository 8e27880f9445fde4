"""The pull to an anchor, for many tensors in a few launches: one read of each, one write.

    gradient:  g += s F (w - a)
    pull:      w  = lerp(w, a, min(s F, 1)), exact at both ends

Differences and products are float32, with one rounding on the store; F may be left out. A program
owns a tile of a tensor and finds it by binary search over the first tiles, in a table on the
device; tensors of equal dtypes share a launch. Without a table entry's alignment to 16 bytes the
numbers are read one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .low_rank import _find, _pointer, _run
from .tables import float_bits

__all__ = ["BLOCK", "OPTIONS", "gradient", "pull"]

BLOCK = 2048
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_ROW = 7


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _load(  # type: ignore[no-untyped-def]
    row, offset, inside,
    FIELD: tl.constexpr, TYPE: tl.constexpr, VECTOR: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """A tile as float32."""
    pointer = _pointer(row, FIELD, TYPE, VECTOR) + offset
    if FULL:
        return tl.load(pointer).to(tl.float32)
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _tile(  # type: ignore[no-untyped-def]
    row, offset, n,
    G: tl.constexpr, W: tl.constexpr, A: tl.constexpr, F: tl.constexpr,
    PULL: tl.constexpr, FISHER: tl.constexpr, VECTOR: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    inside = offset < n
    strength = tl.load(row + 6).to(tl.int32).to(tl.float32, bitcast=True)
    w = _load(row, offset, inside, 2, W, VECTOR, FULL)
    a = _load(row, offset, inside, 3, A, VECTOR, FULL)
    if PULL:
        part = tl.zeros_like(w) + strength
        if FISHER:
            part = _load(row, offset, inside, 4, F, VECTOR, FULL) * strength
        part = tl.where(part > 1.0, 1.0, part)  # NaN stays
        end = a - w
        out = tl.where(part < 0.5, w + part * end, a - end * (1.0 - part))
        pointer = _pointer(row, 2, W, VECTOR) + offset
        value = out.to(W)
    else:
        d = w - a
        if FISHER:
            d *= _load(row, offset, inside, 4, F, VECTOR, FULL)
        out = _load(row, offset, inside, 1, G, VECTOR, FULL) + strength * d
        pointer = _pointer(row, 1, G, VECTOR) + offset
        value = out.to(G)
    if FULL:
        tl.store(pointer, value)
    else:
        tl.store(pointer, value, mask=inside)


@triton.jit(do_not_specialize=["tensors", "steps"])  # type: ignore[untyped-decorator, unused-ignore]
def _anchor_kernel(  # type: ignore[no-untyped-def]
    table_ptr, tensors, steps,
    G: tl.constexpr, W: tl.constexpr, A: tl.constexpr, F: tl.constexpr,
    PULL: tl.constexpr, FISHER: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of one tensor. A row: first tile, addresses of g, w, a, F, size, strength."""
    tile = tl.program_id(0).to(tl.int64)
    row = _find(table_ptr, tile, tensors, steps, 7)
    tile -= tl.load(row)
    n = tl.load(row + 5)
    first = tile * BLOCK
    offset = first + tl.arange(0, BLOCK)
    if first + BLOCK <= n:
        _tile(row, offset, n, G, W, A, F, PULL, FISHER, VECTOR, True)
    else:
        _tile(row, offset, n, G, W, A, F, PULL, FISHER, VECTOR, False)


def constants(dtypes: Sequence[Any], pulls: bool, fisher: bool, aligned: bool) -> dict[str, Any]:
    """What a launch is compiled for; `dtypes` of g, w, a, F."""
    g, w, a, f = dtypes
    # 16 bytes of the narrowest type; of the others several words.
    vector = 8 if aligned else 1
    return {
        "G": g, "W": w, "A": a, "F": f, "PULL": pulls, "FISHER": fisher, "VECTOR": vector,
        "BLOCK": BLOCK,
    }  # fmt: skip


def _launch(
    grads: Sequence[torch.Tensor] | None,
    weights: Sequence[torch.Tensor],
    anchors: Sequence[torch.Tensor],
    fisher: Sequence[torch.Tensor],
    strengths: Sequence[float],
) -> None:
    groups: dict[tuple[Any, ...], list[list[int]]] = {}
    for i, (w, a, strength) in enumerate(zip(weights, anchors, strengths, strict=True)):
        if not w.numel():
            continue
        g = w if grads is None else grads[i]
        f = fisher[i] if fisher else w
        entry = (g, w, a, f)
        addresses = [x.data_ptr() for x in entry]
        aligned = all(address % 16 == 0 for address in addresses)
        key = (*(_TYPES[x.dtype] for x in entry), aligned)
        row = [triton.cdiv(w.numel(), BLOCK), *addresses, w.numel(), float_bits(strength)]
        groups.setdefault(key, []).append(row)
    for (*dtypes, aligned), rows in groups.items():
        given = constants(dtypes, grads is None, bool(fisher), aligned)
        _run(_anchor_kernel, rows, _ROW, weights[0].device, given, OPTIONS)


def gradient(
    grads: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    anchors: Sequence[torch.Tensor],
    fisher: Sequence[torch.Tensor],
    strengths: Sequence[float],
) -> None:
    """grads[i] += strengths[i] fisher[i] (weights[i] - anchors[i]).

    Args:
        grads, weights, anchors, fisher: contiguous tensors of equal sizes, bfloat16, float16 or
            float32, on one device; `fisher` may be empty, for 1.
        strengths: float32 values.
    """
    _launch(grads, weights, anchors, fisher, strengths)


def pull(
    weights: Sequence[torch.Tensor],
    anchors: Sequence[torch.Tensor],
    fisher: Sequence[torch.Tensor],
    strengths: Sequence[float],
) -> None:
    """weights[i] -= min(strengths[i] fisher[i], 1) (weights[i] - anchors[i]); see `gradient`."""
    _launch(None, weights, anchors, fisher, strengths)
