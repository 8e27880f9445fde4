"""Exact selection by magnitude: the k-th largest |x| of a tensor, and which of its ties stay.

A magnitude is compared by its code, the bits of |x| in float32 read as an integer: the order of
the codes is the order of the magnitudes, equal codes are equal magnitudes, and NaN comes first.
Codes make the choice exact and independent of the order in which a backend meets the elements:

    t    = the k-th largest code
    keep = code > t, and of the elements with code == t the first ones by flat index until k are
           kept (ties="first"), all of them ("all"), or none of them ("none")

Two histograms find t without sorting: one over the high 15 bits of the code, one over the low 16
bits inside the bin that holds the k-th element. Several tensors may share one histogram, which is
how a threshold over a whole model is found (TIES-Merging, Yadav et al. 2023, trims so).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from cl_fast.backends import check_backend, device_ops, native_ops, native_or_say, require_native
from cl_fast.ops.policy import TrimCount, TrimTies, trim_keep_count

__all__ = ["kept_by_code", "magnitude_codes", "magnitude_threshold", "select_code"]

_LOW_BITS = 16
_HIGH_BINS = 1 << 15
_TIES = ("first", "all", "none")

#: What the ops read. float64 would be rounded to float32 first, so it is refused instead.
READABLE = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


def magnitude_codes(values: Tensor) -> Tensor:
    """The codes of float32 `values`, as int32 of the same shape."""
    return values.contiguous().view(torch.int32) & 0x7FFFFFFF


def select_code(parts: Callable[[], Iterable[Tensor]] | Sequence[Tensor], k: int) -> int:
    """The k-th largest code over all `parts` together; -1 (below every code) if k is 0.

    Args:
        parts: int32 code tensors, or a function that yields them anew for each of the two passes,
            so that not all of them need to be in memory at once.
        k: 0 <= k <= the number of elements of all parts.
    """
    if k == 0:
        return -1
    codes = parts if callable(parts) else lambda: parts
    high, rest = _descend(
        (torch.bincount(part.reshape(-1) >> _LOW_BITS, minlength=_HIGH_BINS) for part in codes()), k
    )
    low, _ = _descend(
        (
            torch.bincount(
                part[(part >> _LOW_BITS) == high] & ((1 << _LOW_BITS) - 1),
                minlength=1 << _LOW_BITS,
            )
            for part in codes()
        ),
        rest,
    )
    return high << _LOW_BITS | low


def _descend(histograms: Iterable[Tensor], k: int) -> tuple[int, int]:
    """The bin that holds the k-th element from the top, and its rank inside that bin."""
    total: Tensor | None = None
    for histogram in histograms:
        total = histogram if total is None else total + histogram.to(total.device)
    if total is None:
        raise ValueError(f"k must be at most the number of elements, got k={k} of 0")
    from_top = total.flip(0).cumsum(0)
    if int(from_top[-1]) < k:
        raise ValueError(f"k must be at most the number of elements, got k={k}")
    position = int(torch.searchsorted(from_top, torch.tensor(k, device=from_top.device)))
    above = int(from_top[position - 1]) if position else 0
    return total.numel() - 1 - position, k - above


def kept_by_code(codes: Tensor, code: int, k: int, ties: TrimTies) -> tuple[Tensor, int]:
    """The mask of what a threshold keeps, and how many elements at the threshold are among it.

    Args:
        codes: flat int32 codes.
        code: the threshold; with k = 0 nothing is kept.
        k: how many are wanted; read for ties="first" and for k = 0 only.
        ties: what happens to elements exactly at the threshold.
    """
    if k == 0:
        return torch.zeros_like(codes, dtype=torch.bool), 0
    if ties == "none":
        return codes > code, 0
    at = codes == code
    if ties == "all":
        return codes >= code, int(at.sum())
    keep = codes > code
    wanted = k - int(keep.sum())
    first = at.nonzero().reshape(-1)[:wanted]
    keep[first] = True
    return keep, first.numel()


def check_readable(argument: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is one that the kernels read."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in READABLE:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in READABLE)
        raise TypeError(f"{argument} must have one of the dtypes {names}; got {tensor.dtype}")


def check_same(argument: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both tensors have one shape and one device."""
    if tensor.shape != other.shape:
        raise ValueError(
            f"{argument} must have the shape of {other_name}, {tuple(other.shape)}; "
            f"got {tuple(tensor.shape)}"
        )
    if tensor.device != other.device:
        raise ValueError(
            f"{argument} must be on the device of {other_name}, {other.device}; got {tensor.device}"
        )


def _check(x: Tensor, base: Tensor | None, k: int, ties: str) -> None:
    check_readable("x", x)
    if base is not None:
        check_readable("base", base)
        check_same("base", base, "x", x)
    if not 0 <= k <= x.numel():
        raise ValueError(f"k must be in 0 .. {x.numel()}, the number of elements of x; got {k}")
    if ties not in _TIES:
        raise ValueError(f"ties must be one of 'first', 'all', 'none'; got {ties!r}")


def magnitude_threshold_reference(
    x: Tensor, base: Tensor | None, k: int, ties: TrimTies
) -> tuple[Tensor, Tensor]:
    """The op in plain torch, on any device."""
    values = x.float() if base is None else x.float() - base.float()
    codes = magnitude_codes(values.reshape(-1))
    if k == 0:
        return values.new_full((), float("inf")), codes.new_zeros((), dtype=torch.int64)
    code = select_code([codes], k)
    _, at = kept_by_code(codes, code, k, ties)
    bits = torch.tensor(code, dtype=torch.int32, device=x.device)
    return bits.view(torch.float32), torch.tensor(at, dtype=torch.int64, device=x.device)


def _generic(x: Tensor, base: Tensor | None, k: int, ties: str) -> tuple[Tensor, Tensor]:
    _check(x, base, k, ties)
    return magnitude_threshold_reference(x, base, k, ties)  # type: ignore[arg-type]


def _cpu(x: Tensor, base: Tensor | None, k: int, ties: str) -> tuple[Tensor, Tensor]:
    _check(x, base, k, ties)
    core = native_or_say()
    if core is not None and native_ops.reads(x, base):
        return native_ops.magnitude_threshold(core, x, base, k, ties)
    return magnitude_threshold_reference(x, base, k, ties)  # type: ignore[arg-type]


def _cuda(x: Tensor, base: Tensor | None, k: int, ties: str) -> tuple[Tensor, Tensor]:
    _check(x, base, k, ties)
    by = device_ops.engine(x.device)
    if by is None:
        return magnitude_threshold_reference(x, base, k, ties)  # type: ignore[arg-type]
    return device_ops.magnitude_threshold(by, x, base, k, ties)


def _fake(x: Tensor, base: Tensor | None, k: int, ties: str) -> tuple[Tensor, Tensor]:
    _check(x, base, k, ties)
    return x.new_empty((), dtype=torch.float32), x.new_empty((), dtype=torch.int64)


_op = torch.library.custom_op("cl_fast::magnitude_threshold", _generic, mutates_args=())
_op.register_kernel("cpu")(_cpu)
_op.register_kernel("cuda")(_cuda)
_op.register_fake(_fake)


def magnitude_threshold(
    x: Tensor,
    *,
    density: float | None = None,
    k: int | None = None,
    base: Tensor | None = None,
    count: TrimCount = "at_least_one",
    ties: TrimTies = "first",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k-th largest magnitude of `x`, or of `x - base`, and how many of its ties are kept.

    Everything with a magnitude above the threshold is kept, and so are the first `keep_ties`
    elements at it, by flat index. Exact; no sort; magnitudes are compared in float32.

    Args:
        x: any shape; bfloat16, float16, float32 or eight-bit float.
        density: the fraction to keep, in (0, 1]; `count` makes it a number.
        k: the number to keep, instead of `density`.
        base: subtracted first, in float32; the shape and device of `x`.
        count: how a density becomes a number, see `cl_fast.ops.trim_keep_count`.
        ties: the elements at the threshold: the "first" ones until k are kept, "all", "none".
        backend: "eager", "native", "triton" or "cuda", for tests and benchmarks; otherwise the
            fastest there is.

    Returns:
        (threshold, keep_ties): a float32 and an int64 scalar on the device of `x`. With k = 0
        the threshold is infinite and nothing is kept.

    Raises:
        TypeError: a dtype that is not readable.
        ValueError: shapes or devices differ, `density` or `k` out of range, unknown `ties`.
    """
    check_readable("x", x)
    if base is not None:
        check_readable("base", base)
    if (density is None) == (k is None):
        raise ValueError("give exactly one of density and k")
    if density is not None:
        if not 0.0 < density <= 1.0:
            raise ValueError(f"density must be in (0, 1]; got {density}")
        k = trim_keep_count(density, x.numel(), count)
    assert k is not None
    if isinstance(k, (bool, float, str)):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if backend is None:
        return cast(tuple[Tensor, Tensor], _op(x, base, k, ties))
    _check(x, base, k, ties)
    check_backend(backend, x.device.type)
    if backend == "eager":
        return magnitude_threshold_reference(x, base, k, ties)
    if backend == "native":
        return native_ops.magnitude_threshold(require_native(backend, "cpu"), x, base, k, ties)
    by = device_ops.require(backend, x.device)
    return device_ops.magnitude_threshold(by, x, base, k, ties)
