"""The steps of a merge on CUDA tensors by the kernels of csrc/**/*.cu.

The same functions as in cl_fast.triton_kernels (combine, magnitude, sums), which say what their
arguments mean. Pointers and numbers travel as arguments of the launches, so a call neither syncs
nor copies anything to the device, and a CUDA graph may capture it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cl_fast.backends import cuda

__all__ = ["absolute_sums", "combine_rows", "select"]

CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""The core's numbers of dtypes (csrc/core/dtypes.h)."""


def _module() -> ModuleType:
    module = cuda.load()
    assert module is not None, cuda.reason()
    return module


def _rows(bases: Sequence[Tensor], tensors: Sequence[Tensor], models: int, n: list[int]) -> Any:
    rows = _module().Rows(
        models, n, [x.data_ptr() for x in tensors], [CODES[x.dtype] for x in tensors]
    )
    if bases:
        rows.base = [base.data_ptr() for base in bases]
        rows.base_dtype = [CODES[base.dtype] for base in bases]
    return rows


def _sizes(tensors: Sequence[Tensor], models: int) -> list[int]:
    return [x.numel() for x in tensors[::models]]


class _On:
    """The device that the kernels are launched on, and its current stream."""

    def __init__(self, tensor: Tensor) -> None:
        self._guard = torch.cuda.device(tensor.device) if tensor.is_cuda else None
        self._tensor = tensor

    def __enter__(self) -> int:
        if self._guard is None:
            return 0
        self._guard.__enter__()
        return int(torch.cuda.current_stream(self._tensor.device).cuda_stream)

    def __exit__(self, *error: object) -> None:
        if self._guard is not None:
            self._guard.__exit__(*error)


def select(
    bases: Sequence[Tensor],
    tensors: Sequence[Tensor],
    models: int,
    counts: Sequence[int],
    *,
    whole_model: bool,
    ties: str,
) -> tuple[Tensor, Tensor, Tensor]:
    device = tensors[0].device
    rows = _rows(bases, tensors, models, _sizes(tensors, models))
    codes = torch.empty(len(tensors), dtype=torch.int32, device=device)
    cuts = torch.zeros(len(tensors), dtype=torch.int64, device=device)
    at = torch.zeros_like(cuts)
    module = _module()
    size = module.select_workspace(rows, whole_model, ties)
    work = torch.empty(size, dtype=torch.uint8, device=device)
    with _On(tensors[0]) as stream:
        module.select(
            rows,
            difference=bool(bases),
            whole_model=whole_model,
            ties=ties,
            counts=list(counts),
            work=work.data_ptr(),
            codes=codes.data_ptr(),
            cuts=cuts.data_ptr(),
            kept_ties=at.data_ptr(),
            stream=stream,
        )
    return codes, cuts, at


def absolute_sums(
    bases: Sequence[Tensor],
    tensors: Sequence[Tensor],
    models: int,
    *,
    keys: Sequence[int] | None,
    keeps: Sequence[int] | None,
    codes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    device = tensors[0].device
    rows = _rows(bases, tensors, models, _sizes(tensors, models))
    if keys is not None and keeps is not None:
        rows.key, rows.keep = _unsigned(keys), list(keeps)
    totals = torch.zeros(len(tensors), dtype=torch.float64, device=device)
    kept = torch.zeros_like(totals)
    module = _module()
    partial = torch.empty(module.partial_sums(rows), dtype=torch.float64, device=device)
    with _On(tensors[0]) as stream:
        module.absolute_sums(
            rows,
            difference=bool(bases),
            codes=0 if codes is None else codes.data_ptr(),
            partial=partial.data_ptr(),
            totals=totals.data_ptr(),
            kept=kept.data_ptr(),
            stream=stream,
        )
    return totals, kept


def combine_rows(
    bases: Sequence[Tensor],
    tensors: Sequence[Tensor],
    outs: Sequence[Tensor],
    models: int,
    *,
    weights: Sequence[float],
    scales: Tensor | Sequence[float],
    rescales: Tensor | Sequence[float],
    sparsify: str,
    codes: Tensor | None,
    cuts: Tensor | None,
    keys: Sequence[int] | None,
    keeps: Sequence[int] | None,
    packed: Sequence[Tensor | None] | None,
    kinds: Sequence[int] | None,
    elect: str,
    elect_on: str,
    reduce: str,
    divisor: str,
    denominators: Sequence[float],
    lam: float,
) -> None:
    rows = _rows(bases, tensors, models, [out.numel() for out in outs])
    rows.out = [out.data_ptr() for out in outs]
    rows.out_dtype = [CODES[out.dtype] for out in outs]
    rows.denominator = list(denominators)
    rows.weight = list(weights)
    if not isinstance(scales, Tensor):
        rows.scale = list(scales)
    if not isinstance(rescales, Tensor):
        rows.rescale = list(rescales)
    if keys is not None and keeps is not None:
        rows.key, rows.keep = _unsigned(keys), list(keeps)
    form = sparsify
    if packed is not None:
        form = "packed"
        rows.offsets = [0 if offsets is None else offsets.data_ptr() for offsets in packed]
        rows.values = [x.numel() for x in tensors]
        rows.kind = [0] * len(tensors) if kinds is None else list(kinds)
    with _On(outs[0]) as stream:
        _module().combine(
            rows,
            form=form,
            difference=bool(bases),
            elect=elect,
            vote_weighted=elect_on == "weighted",
            reduce=reduce,
            divide_by_weights=divisor == "weights",
            lam=lam,
            codes=0 if codes is None else codes.data_ptr(),
            cuts=0 if cuts is None else cuts.data_ptr(),
            scales=scales.data_ptr() if isinstance(scales, Tensor) else 0,
            rescales=rescales.data_ptr() if isinstance(rescales, Tensor) else 0,
            stream=stream,
        )


def _unsigned(keys: Sequence[int]) -> list[int]:
    return [key & (1 << 64) - 1 for key in keys]
