"""The ops on packed deltas by the C++ core and by the Triton kernels. The caller has checked.

Each function of the Triton kernels gives None where they cannot be loaded; the eager reference
then does the work on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cl_fast.backends import device_ops, native, triton
from cl_fast.backends.device_ops import KERNEL_DTYPES, Engine, dense, float32
from cl_fast.backends.native_ops import NAMES, reads

if TYPE_CHECKING:
    from cl_fast.ops.packing import PackedCall

__all__ = [
    "MOST_MODELS",
    "device_combine",
    "device_takes",
    "native_combine",
    "native_offsets",
    "native_pack",
    "native_sums",
    "native_takes",
    "native_unpack",
    "triton_offsets",
    "triton_pack",
    "triton_sums",
    "triton_unpack",
]

MOST_MODELS = 256
"""What the core combines in one pass."""
_MASK64 = (1 << 64) - 1


class _Pointers:
    """Descriptions of tensors for the core; holds what they point to."""

    def __init__(self) -> None:
        self._alive: list[Tensor] = []

    def _dense(self, tensor: Tensor) -> Tensor:
        dense = tensor.detach().contiguous()
        self._alive.append(dense)
        return dense

    def tensor(self, tensor: Tensor | None) -> tuple[str, int] | None:
        if tensor is None:
            return None
        return NAMES[tensor.dtype], self._dense(tensor).data_ptr()

    def packed(
        self, values: Tensor, offsets: Tensor | None, key: int, threshold: int
    ) -> tuple[str, int, int, int, int, int]:
        return (
            NAMES[values.dtype],
            self._dense(values).data_ptr(),
            values.numel(),
            0 if offsets is None else self._dense(offsets).data_ptr(),
            key & _MASK64,
            threshold & 0xFFFFFFFF,
        )


def native_offsets(core: ModuleType, n: int, key: int, threshold: int, tile: int) -> Tensor:
    offsets = torch.empty(-(-n // tile) + 1, dtype=torch.int64)
    core.pack_offsets(key & _MASK64, threshold, n, offsets.data_ptr(), native.threads())
    return offsets


def native_pack(
    core: ModuleType,
    x: Tensor,
    base: Tensor | None,
    offsets: Tensor,
    key: int,
    threshold: int,
    kept: int,
    dtype: torch.dtype,
) -> Tensor:
    values = torch.empty(kept, dtype=dtype)
    at = _Pointers()
    core.pack_values(
        at.tensor(x),
        at.tensor(base),
        at.packed(values, offsets, key, threshold),
        x.numel(),
        native.threads(),
    )
    return values


def native_unpack(
    core: ModuleType,
    values: Tensor,
    base: Tensor | None,
    offsets: Tensor,
    key: int,
    threshold: int,
    shape: Sequence[int],
    factor: float,
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty(shape, dtype=dtype)
    at = _Pointers()
    core.unpack_values(
        at.packed(values, offsets, key, threshold),
        at.tensor(base),
        factor,
        NAMES[dtype],
        out.data_ptr(),
        out.numel(),
        native.threads(),
    )
    return out


def native_sums(
    core: ModuleType, x: Tensor, base: Tensor | None, held: torch.dtype, key: int, threshold: int
) -> tuple[float, float]:
    """sum |d| and sum |d kept| of x, or of x - base rounded to `held`."""
    at = _Pointers()
    total, kept = core.drop_sums(
        at.tensor(x),
        at.tensor(base),
        NAMES[held],
        key & _MASK64,
        threshold,
        x.numel(),
        native.threads(),
    )
    return total, kept


def native_takes(call: PackedCall) -> bool:
    """Whether the core can carry out `call`."""
    return call.models <= MOST_MODELS and reads(*call.bases, *call.tensors)


def native_combine(core: ModuleType, call: PackedCall) -> list[Tensor]:
    """All rows of `call` in one job."""
    at = _Pointers()
    outs = call.empty()
    rows = []
    for row, out in enumerate(outs):
        terms = [
            (
                at.packed(
                    call.tensors[e],
                    call.offsets[e] if call.is_packed(e) else None,
                    call.keys[e],
                    call.thresholds[e],
                ),
                call.kinds[e] == 1,
                call.weights[e],
                call.weights[e] * call.factors[e],
                call.factors[e],
            )
            for e in call.entries(row)
        ]
        base = at.tensor(call.bases[row]) if call.bases else None
        rows.append(
            (out.numel(), base, call.denominator(row), terms, NAMES[out.dtype], out.data_ptr())
        )
    core.combine_packed(
        rows,
        difference=bool(call.bases),
        elect=call.elect,
        vote_weighted=call.elect_on == "weighted",
        reduce=call.reduce,
        divide_by_weights=call.divisor == "weights",
        lam=call.lam,
        threads=native.threads(),
    )
    return outs


def triton_offsets(n: int, key: int, threshold: int, device: torch.device) -> Tensor | None:
    kernels = triton.load("packing")
    if kernels is None:
        return None
    out: Tensor = kernels.offsets(key, n, threshold, device=device)
    return out


def triton_pack(
    x: Tensor,
    base: Tensor | None,
    offsets: Tensor,
    key: int,
    threshold: int,
    kept: int,
    dtype: torch.dtype,
) -> Tensor | None:
    kernels = triton.load("packing")
    if kernels is None or not _kernels_take(x, base, dtype):
        return None
    out: Tensor = kernels.pack(x, base, offsets.contiguous(), key, threshold, kept, dtype)
    return out


def triton_unpack(
    values: Tensor,
    base: Tensor | None,
    offsets: Tensor,
    key: int,
    threshold: int,
    shape: Sequence[int],
    factor: float,
    dtype: torch.dtype,
) -> Tensor | None:
    kernels = triton.load("packing")
    if kernels is None or not _kernels_take(values, base, dtype):
        return None
    out = torch.empty(shape, dtype=dtype, device=values.device)
    kernels.unpack(values, base, offsets.contiguous(), key, threshold, factor, out)
    return out


def triton_sums(
    x: Tensor, base: Tensor | None, key: int, threshold: int
) -> tuple[Tensor, Tensor] | None:
    """sum |d| and sum |d kept| of x, or of x - base, on the device."""
    kernels = triton.load("sums")
    if kernels is None:
        return None
    bases = [] if base is None else [base.detach().contiguous()]
    total, kept = kernels.absolute_sums(
        bases, [x.detach().contiguous()], 1, keys=[key], keeps=[threshold]
    )
    return total, kept


def device_takes(call: PackedCall) -> bool:
    """Whether the kernels can carry out `call`."""
    return call.models <= device_ops.MOST_MODELS


def device_combine(call: PackedCall, by: Engine) -> list[Tensor]:
    """All rows of `call` on GPU tensors, one call of the kernels per device."""
    outs = call.empty()
    tensors = [dense(tensor) for tensor in call.tensors]
    bases = [dense(base) for base in call.bases]
    for device in dict.fromkeys(out.device for out in outs):
        rows = [row for row, out in enumerate(outs) if out.device == device]
        entries = [e for row in rows for e in call.entries(row)]

        def of(listed: Sequence[Any], places: list[int] = entries) -> list[Any]:
            return [listed[place] for place in places]

        factors = of(call.factors)
        scales = [w * r for w, r in zip(of(call.weights), factors, strict=True)]
        packed = [call.is_packed(e) for e in entries]
        by.combine_rows(
            of(bases, rows) if bases else [],
            of(tensors),
            of(outs, rows),
            call.models,
            weights=[float32(weight) for weight in of(call.weights)],
            scales=[float32(scale) for scale in scales],
            rescales=[float32(factor) for factor in factors],
            sparsify="drop",
            codes=None,
            cuts=None,
            keys=of(call.keys),
            # what is dense is kept whole
            keeps=[
                call.thresholds[e] if is_packed else 1 << 32
                for e, is_packed in zip(entries, packed, strict=True)
            ],
            packed=[
                call.offsets[e].contiguous() if is_packed else None
                for e, is_packed in zip(entries, packed, strict=True)
            ],
            kinds=of(call.kinds),
            elect=call.elect,
            elect_on=call.elect_on,
            reduce=call.reduce,
            divisor=call.divisor,
            denominators=[call.denominator(row) for row in rows],
            lam=float32(call.lam),
        )
    return outs


def _kernels_take(values: Tensor, base: Tensor | None, dtype: torch.dtype) -> bool:
    dtypes = {values.dtype, dtype} | (set() if base is None else {base.dtype})
    return dtypes <= set(KERNEL_DTYPES)
