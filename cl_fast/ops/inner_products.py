"""Inner products of flat tensors in float64, in one fixed order.

    G_ij = sum_e d_i[e] d_j[e],    d_k = x_k, or x_k - base

The differences are float32, whose products are exact in float64. They are summed as
:func:`~cl_fast.ops.dropping.absolute_sum` sums: 16 lanes (index mod 16) in chunks of 65536
elements, the lanes of a chunk in order, the chunks in order. So the C++ core and this module give
the same bits, for any threads and tiles. What is not finite counts as 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_fast.ops.dropping import L1_CHUNK, L1_LANES

__all__ = ["gram_matrix", "gram_reference"]

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_BLOCK = 16 * L1_CHUNK


def gram_matrix(tensors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
    """The Gram matrix of tensors, or of their differences from a base.

    Args:
        tensors: K >= 1 of one shape, of a floating type, on one device.
        base: of that shape; the vectors are then ``x - base``, in float32 (float64 inputs: in
            float64).

    Returns:
        [K, K], float64, on the CPU. On the CPU, for float32, bfloat16 and float16, with the bits of
        a merge by the C++ core. Not differentiable.

    Raises:
        ValueError: no tensors, or shapes that differ.
        TypeError: a tensor is not of a floating type.
    """
    _check(tensors, base)
    every = [*tensors, *([] if base is None else [base])]
    with torch.no_grad():
        if any(x.dtype == torch.float64 for x in every) or any(x.is_cuda for x in every):
            wide = torch.stack([x.reshape(-1) for x in tensors]).double()
            if base is not None:
                wide = wide - base.reshape(-1).double()
            wide = torch.where(torch.isfinite(wide), wide, 0.0)
            return (wide @ wide.t()).cpu()
        packed = _native(tensors, base) or gram_reference(tensors, base)
    count = len(tensors)
    rows, columns = torch.triu_indices(count, count)
    matrix = torch.empty(count, count, dtype=torch.float64)
    matrix[rows, columns] = matrix[columns, rows] = torch.tensor(packed, dtype=torch.float64)
    return matrix


def _check(tensors: Sequence[Tensor], base: Tensor | None) -> None:
    if not tensors:
        raise ValueError("a Gram matrix needs at least one tensor")
    for name, x in [*((f"tensors[{k}]", x) for k, x in enumerate(tensors)), ("base", base)]:
        if x is None:
            continue
        if x.shape != tensors[0].shape:
            raise ValueError(
                f"{name} must have the shape {tuple(tensors[0].shape)} of the first; got "
                f"{tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(f"{name} must be of a floating type; got {x.dtype}")


def _native(tensors: Sequence[Tensor], base: Tensor | None) -> list[float] | None:
    """The packed matrix by the C++ core, where there is one and it reads these types."""
    from cl_fast.backends import native

    core = native.load()
    every = [*tensors, *([] if base is None else [base])]
    if core is None or any(x.dtype not in _NAMES for x in every):
        return None
    held = [x.detach().contiguous() for x in every]
    job = core.Job(threads=native.threads(), nan="propagate", checksums=False)
    task = job.add_task(
        n=held[0].numel(),
        out_dtype="F32",
        base=None if base is None else (_NAMES[base.dtype], held[-1].data_ptr(), -1, 0),
        difference=base is not None,
        gram="only",
    )
    for x in held[: len(tensors)]:
        job.add_term(task, dtype=_NAMES[x.dtype], ptr=x.data_ptr())
    job.run()
    return [float(value) for value in job.result(task)["gram"]]


def gram_reference(tensors: Sequence[Tensor], base: Tensor | None = None) -> list[float]:
    """The same in plain torch: the upper triangle of the matrix, row by row."""
    flat = [x.reshape(-1) for x in tensors]
    origin = None if base is None else base.reshape(-1)
    count, numel = len(flat), flat[0].numel()
    totals = [0.0] * (count * (count + 1) // 2)
    for first in range(0, numel, _BLOCK):
        part = slice(first, first + _BLOCK)
        wide = [_finite(x[part].float()) for x in flat]
        if origin is not None:
            start = _finite(origin[part].float())
            wide = [_finite(x[part].float() - start) for x in flat]
        lanes = [_lanes(x.double()) for x in wide]
        place = 0
        for i in range(count):
            for j in range(i, count):
                # a running sum is the one that torch adds up one after the other
                sums = torch.cumsum(lanes[i] * lanes[j], -1)[..., -1]
                for chunk in torch.cumsum(sums, -1)[..., -1].tolist():
                    totals[place] += chunk
                place += 1
    return totals


def _finite(x: Tensor) -> Tensor:
    return torch.where(torch.isfinite(x), x, 0.0)


def _lanes(part: Tensor) -> Tensor:
    """[chunk, lane, row of the chunk]."""
    rows = -(-min(part.numel(), L1_CHUNK) // L1_LANES)
    width = rows * L1_LANES
    chunks = -(-part.numel() // width)
    padded = torch.nn.functional.pad(part, (0, chunks * width - part.numel()))
    return padded.view(chunks, rows, L1_LANES).transpose(1, 2).contiguous()
