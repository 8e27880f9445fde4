"""Packed deltas: a dropped delta (DARE) as its kept values alone, the mask implied by the stream.

    packed     value_p = x_i of the p-th kept element i of the documented stream
    unpacked   y_i = keep_i ? d_i * float32(r) : 0,    d_i = value_i, or value_i - base_i

    holds        the values are                     exactness
    finetuned    those of the finetuned tensor      the tensor's own bits; the base is subtracted
                                                    in float32 where the delta is used
    delta        deltas                             as good as their dtype

Nothing else is stored: which elements were kept follows from the key of the stream and the
threshold T (cl_fast.ops.streams), and r is one number, chosen when packing. At a drop rate of 0.9
a packed bfloat16 delta is a tenth of the dense one. The offsets, the number of kept elements
before each tile of 2048, follow from the stream too; they let tiles be read in any order.

`combine` takes packed deltas beside dense tensors and gives the bits that it gives for dense
finetuned tensors of the same keys and densities: the formula is in cl_fast.ops.combining, with
d_k and r_k from above. The drop is that of Yu et al. 2024, arXiv 2311.03099; docs/packing.md has
the layout and its cost.

The gradient of packing is an unpacking of the upstream gradient, and the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from cl_fast.backends import check_backend, device_ops, native_or_say, packed_ops, require_native
from cl_fast.backends.native_ops import reads
from cl_fast.ops.combining import (
    _SMALLEST_WEIGHT_SUM,
    WRITABLE,
    _divide,
    _numbers,
    _reduce_elected,
    _scale,
)
from cl_fast.ops.dropping import absolute_sum, keep_mask, l1_factor, round_float32, signed_key
from cl_fast.ops.magnitude import check_readable, check_same
from cl_fast.ops.policy import Policy, Rescale
from cl_fast.ops.streams import keep_threshold, stream_key

__all__ = [
    "PACK_TILE",
    "Holds",
    "PackedDelta",
    "combine_packed",
    "combine_packed_many",
    "pack",
    "unpack",
]

PACK_TILE = 2048
"""Elements per entry of the offsets."""
PACKABLE = WRITABLE
Holds = Literal["finetuned", "delta"]

_BLOCK = 512 * PACK_TILE  # elements that the eager reference expands at a time
_WRONG_OFFSETS = "offsets must be those of the stream of key and threshold"
_OFFERED = ("eager", "native", "triton")


def _tiles(n: int) -> int:
    return -(-n // PACK_TILE)


def _check_stream(key: int, threshold: int) -> None:
    if not -(1 << 63) <= key < 1 << 64:
        raise ValueError(f"key must be a 64-bit integer, got {key}")
    if not 0 <= threshold < 1 << 32:
        raise ValueError(f"threshold must be in [0, 2^32), got {threshold}")


def _check_offsets(argument: str, offsets: Tensor, n: int, device: torch.device) -> None:
    if not isinstance(offsets, Tensor):
        raise TypeError(f"{argument} must be a torch.Tensor, got {type(offsets).__name__}")
    if offsets.dtype != torch.int64:
        raise TypeError(f"{argument} must have the dtype int64; got {offsets.dtype}")
    if offsets.shape != (_tiles(n) + 1,):
        raise ValueError(
            f"{argument} must have the shape ({_tiles(n) + 1},), one entry per {PACK_TILE} of "
            f"{n} elements and one more; got {tuple(offsets.shape)}"
        )
    if offsets.device != device:
        raise ValueError(f"{argument} must be on {device}; got {offsets.device}")


def _check_packable(argument: str, tensor: Tensor, *more: torch.dtype) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument} must be a torch.Tensor, got {type(tensor).__name__}")
    _check_dtype(argument, tensor.dtype, *more)


def _check_dtype(argument: str, dtype: torch.dtype, *more: torch.dtype) -> None:
    if dtype not in (*PACKABLE, *more):
        names = ", ".join(str(known).removeprefix("torch.") for known in (*PACKABLE, *more))
        raise TypeError(f"{argument} must have one of the dtypes {names}; got {dtype}")


# ---- the eager reference: plain torch, blocks of whole tiles


def _tile_counts(keep: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(keep, (0, -keep.numel() % PACK_TILE))
    return padded.view(-1, PACK_TILE).sum(1)


def _eager_offsets(n: int, key: int, threshold: int, device: Any) -> Tensor:
    counts = [torch.zeros(1, dtype=torch.int64, device=device)]
    for first in range(0, n, _BLOCK):
        count = min(_BLOCK, n - first)
        counts.append(_tile_counts(keep_mask(key, count, threshold, start=first, device=device)))
    return torch.cat(counts).cumsum(0)


def _blocks(
    n: int, key: int, threshold: int, offsets: Tensor, kept: int
) -> Iterator[tuple[slice, Tensor, slice]]:
    """The elements of each block, their mask, and where their values are."""
    for first in range(0, n, _BLOCK):
        count = min(_BLOCK, n - first)
        keep = keep_mask(key, count, threshold, start=first, device=offsets.device)
        bounds = offsets[first // PACK_TILE :][: _tiles(count) + 1]
        start, end = int(bounds[0]), int(bounds[-1])
        if start < 0 or end > kept or not torch.equal(bounds.diff(), _tile_counts(keep)):
            raise ValueError(_WRONG_OFFSETS)
        yield slice(first, first + count), keep, slice(start, end)


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _eager_pack(
    x: Tensor,
    base: Tensor | None,
    offsets: Tensor,
    key: int,
    threshold: int,
    kept: int,
    dtype: torch.dtype,
) -> Tensor:
    flat = x.reshape(-1)
    values = torch.empty(kept, dtype=dtype, device=x.device)
    for block, keep, places in _blocks(x.numel(), key, threshold, offsets, kept):
        mine = flat[block][keep]
        if base is not None:
            wide = _wide(x.dtype, base.dtype)
            mine = mine.to(wide) - base.reshape(-1)[block][keep].to(wide)
        values[places] = mine.to(dtype)
    return values


def _expanded(
    values: Tensor, base: Tensor | None, keep: Tensor, block: slice, wide: torch.dtype
) -> Tensor:
    """d of one block: +0 where it was dropped."""
    dense = torch.zeros(keep.numel(), dtype=wide, device=values.device)
    mine = values.to(wide)
    if base is not None:
        mine = mine - base.reshape(-1)[block][keep].to(wide)
    dense[keep] = mine
    return dense


def _eager_unpack(
    values: Tensor,
    base: Tensor | None,
    offsets: Tensor,
    key: int,
    threshold: int,
    shape: Sequence[int],
    factor: float,
    dtype: torch.dtype,
) -> Tensor:
    wide = _wide(values.dtype, dtype)
    out = torch.empty(math.prod(shape), dtype=dtype, device=values.device)
    for block, keep, places in _blocks(out.numel(), key, threshold, offsets, values.numel()):
        dense = _expanded(values[places], base, keep, block, wide)
        out[block] = _scale(dense, factor).to(dtype)
    return out.reshape(tuple(shape))


# ---- cl_fast::packed_offsets


def _check_offsets_call(n: int, key: int, threshold: int) -> None:
    if n < 0:
        raise ValueError(f"n must not be negative; got {n}")
    _check_stream(key, threshold)


def _offsets_generic(n: int, key: int, threshold: int, device: torch.device) -> Tensor:
    _check_offsets_call(n, key, threshold)
    return _eager_offsets(n, key, threshold, device)


def _offsets_cpu(n: int, key: int, threshold: int, device: torch.device) -> Tensor:
    _check_offsets_call(n, key, threshold)
    core = native_or_say()
    if core is None:
        return _eager_offsets(n, key, threshold, device)
    return packed_ops.native_offsets(core, n, key, threshold, PACK_TILE)


def _offsets_cuda(n: int, key: int, threshold: int, device: torch.device) -> Tensor:
    _check_offsets_call(n, key, threshold)
    out = packed_ops.triton_offsets(n, key, threshold, device)
    return _eager_offsets(n, key, threshold, device) if out is None else out


def _offsets_fake(n: int, key: int, threshold: int, device: torch.device) -> Tensor:
    _check_offsets_call(n, key, threshold)
    return torch.empty(_tiles(n) + 1, dtype=torch.int64, device=device)


_offsets_op = torch.library.custom_op(
    "cl_fast::packed_offsets",
    _offsets_generic,
    mutates_args=(),
    schema="(SymInt n, int key, int threshold, Device device) -> Tensor",
)
_offsets_op.register_kernel("cpu")(_offsets_cpu)
_offsets_op.register_kernel("cuda")(_offsets_cuda)
_offsets_op.register_fake(_offsets_fake)


# ---- cl_fast::pack_values


def _check_pack(
    x: Tensor,
    base: Tensor | None,
    offsets: Tensor,
    key: int,
    threshold: int,
    kept: int,
    dtype: torch.dtype,
) -> None:
    _check_packable("x", x, torch.float64)
    if base is not None:
        _check_packable("base", base, torch.float64)
        check_same("base", base, "x", x)
    _check_dtype("dtype", dtype, torch.float64)
    _check_stream(key, threshold)
    _check_offsets("offsets", offsets, x.numel(), x.device)
    if not 0 <= kept <= x.numel():
        raise ValueError(f"kept must be in [0, {x.numel()}]; got {kept}")


def _pack_generic(*args: Any) -> Tensor:
    _check_pack(*args)
    return _eager_pack(*args)


def _pack_cpu(*args: Any) -> Tensor:
    _check_pack(*args)
    x, base, *_, dtype = args
    core = native_or_say()
    if core is not None and reads(x, base) and dtype in PACKABLE:
        return packed_ops.native_pack(core, *args)
    return _eager_pack(*args)


def _pack_cuda(*args: Any) -> Tensor:
    _check_pack(*args)
    out = packed_ops.triton_pack(*args)
    return _eager_pack(*args) if out is None else out


def _pack_fake(*args: Any) -> Tensor:
    _check_pack(*args)
    x, *_, kept, dtype = args
    return torch.empty(kept, dtype=dtype, device=x.device)


def _pack_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, base, offsets, ctx.key, ctx.threshold, *_ = inputs
    ctx.save_for_backward(offsets)
    ctx.shape, ctx.dtype = x.shape, x.dtype
    ctx.base_dtype = None if base is None else base.dtype


def _pack_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (offsets,) = ctx.saved_tensors
    stream = (offsets, ctx.key, ctx.threshold, ctx.shape, 1.0)
    by_x = _unpack_op(grad.contiguous(), None, *stream, ctx.dtype)
    by_base = None
    if ctx.base_dtype is not None:
        by_base = -_unpack_op(grad.contiguous(), None, *stream, ctx.base_dtype)
    return by_x, by_base, None, None, None, None, None


_pack_op = torch.library.custom_op(
    "cl_fast::pack_values",
    _pack_generic,
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor? base, Tensor offsets, int key, int threshold, SymInt kept, "
        "ScalarType dtype) -> Tensor"
    ),
)
_pack_op.register_kernel("cpu")(_pack_cpu)
_pack_op.register_kernel("cuda")(_pack_cuda)
_pack_op.register_fake(_pack_fake)
_pack_op.register_autograd(_pack_backward, setup_context=_pack_setup)


# ---- cl_fast::unpack_values


def _check_unpack(
    values: Tensor,
    base: Tensor | None,
    offsets: Tensor,
    key: int,
    threshold: int,
    shape: Sequence[int],
    factor: float,
    dtype: torch.dtype,
) -> None:
    _check_packable("values", values, torch.float64)
    if values.dim() != 1:
        raise ValueError(f"values must have one dimension; got {tuple(values.shape)}")
    _check_dtype("out_dtype", dtype, torch.float64)
    if min(shape, default=0) < 0:
        raise ValueError(f"shape must not be negative; got {tuple(shape)}")
    if base is not None:
        _check_packable("base", base, torch.float64)
        _check_base(base, shape, values.device)
    _check_stream(key, threshold)
    _check_offsets("offsets", offsets, math.prod(shape), values.device)
    _check_factor(factor)


def _check_base(base: Tensor, shape: Sequence[int], device: torch.device) -> None:
    if tuple(base.shape) != tuple(shape):
        raise ValueError(
            f"base must have the shape of the packed delta, {tuple(shape)}; got {tuple(base.shape)}"
        )
    if base.device != device:
        raise ValueError(
            f"base must be on the device of the packed delta, {device}; got {base.device}"
        )


def _check_factor(factor: float) -> None:
    if not 0.0 < factor < 2.0**128:
        raise ValueError(f"factor must be a positive number of float32; got {factor}")


def _unpack_generic(*args: Any) -> Tensor:
    _check_unpack(*args)
    return _eager_unpack(*args)


def _unpack_cpu(*args: Any) -> Tensor:
    _check_unpack(*args)
    values, base, *_, dtype = args
    core = native_or_say()
    if core is not None and reads(values, base) and dtype in PACKABLE:
        return packed_ops.native_unpack(core, *args)
    return _eager_unpack(*args)


def _unpack_cuda(*args: Any) -> Tensor:
    _check_unpack(*args)
    out = packed_ops.triton_unpack(*args)
    return _eager_unpack(*args) if out is None else out


def _unpack_fake(*args: Any) -> Tensor:
    _check_unpack(*args)
    values, _, _, _, _, shape, _, dtype = args
    return torch.empty(shape, dtype=dtype, device=values.device)


def _unpack_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, base, offsets, ctx.key, ctx.threshold, _, ctx.factor, _ = inputs
    ctx.save_for_backward(offsets)
    ctx.kept, ctx.dtype = values.numel(), values.dtype
    ctx.base_dtype = None if base is None else base.dtype
    ctx.shape = output.shape


def _unpack_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (offsets,) = ctx.saved_tensors
    wide = _wide(ctx.dtype)
    stream = (offsets, ctx.key, ctx.threshold)
    kept = _scale(_pack_op(grad.contiguous(), None, *stream, ctx.kept, wide), ctx.factor)
    by_base = None
    if ctx.base_dtype is not None:
        by_base = -_unpack_op(kept, None, *stream, ctx.shape, 1.0, ctx.base_dtype)
    return kept.to(ctx.dtype), by_base, *(None,) * 6


_unpack_op = torch.library.custom_op(
    "cl_fast::unpack_values",
    _unpack_generic,
    mutates_args=(),
    schema=(
        "(Tensor values, Tensor? base, Tensor offsets, int key, int threshold, SymInt[] shape, "
        "float factor, ScalarType dtype) -> Tensor"
    ),
)
_unpack_op.register_kernel("cpu")(_unpack_cpu)
_unpack_op.register_kernel("cuda")(_unpack_cuda)
_unpack_op.register_fake(_unpack_fake)
_unpack_op.register_autograd(_unpack_backward, setup_context=_unpack_setup)


# ---- one of the backends, for tests and benchmarks; otherwise the op chooses


def _choose(
    backend: str | None,
    device: str,
    op: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    native: Callable[..., Tensor],
    triton: Callable[..., Tensor | None],
) -> Callable[..., Tensor]:
    if backend is None:
        return op
    check_backend(backend, device, _OFFERED)
    if backend == "eager":
        return eager
    if backend == "native":
        core = require_native(backend, device)
        return lambda *args: native(core, *args)

    def by_triton(*args: Any) -> Tensor:
        out = triton(*args)
        if out is None:
            raise RuntimeError("backend='triton' cannot be used: triton is not installed")
        return out

    return by_triton


def _native_offsets(core: ModuleType, n: int, key: int, threshold: int, device: Any) -> Tensor:
    return packed_ops.native_offsets(core, n, key, threshold, PACK_TILE)


def _offsets_by(backend: str | None, device: torch.device) -> Callable[..., Tensor]:
    return _choose(
        backend, device.type, _offsets_op, _eager_offsets, _native_offsets,
        packed_ops.triton_offsets,
    )  # fmt: skip


def _pack_by(backend: str | None, device: torch.device) -> Callable[..., Tensor]:
    return _choose(
        backend, device.type, _pack_op, _eager_pack, packed_ops.native_pack,
        packed_ops.triton_pack,
    )  # fmt: skip


def _unpack_by(backend: str | None, device: torch.device) -> Callable[..., Tensor]:
    return _choose(
        backend, device.type, _unpack_op, _eager_unpack, packed_ops.native_unpack,
        packed_ops.triton_unpack,
    )  # fmt: skip


# ---- how many elements a stream keeps, on the host

_MOST_COUNTS = 1 << 16
_counts: dict[tuple[int, int, int], int] = {}


def _remember(n: int, key: int, threshold: int, kept: int) -> int:
    if len(_counts) >= _MOST_COUNTS:
        _counts.clear()
    _counts[n, key, threshold] = kept
    return kept


def _kept_count(n: int, key: int, threshold: int, offsets: Tensor | None) -> int:
    """How many elements a stream keeps, without a sync where it can be had without.

    `offsets` are those of the stream, where they are at hand.
    """
    known = _counts.get((n, key, threshold))
    if known is not None:
        return known
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if offsets is None or (offsets.is_cuda and capturing):
        # Nothing may be read back from the device while it is captured: count on the host.
        offsets = _offsets_op(n, key, threshold, torch.device("cpu"))
    return _remember(n, key, threshold, int(offsets[-1]))


# ---- the value that travels


@dataclass(frozen=True, slots=True, eq=False)
class PackedDelta:
    """The kept values of one tensor's dropped delta, and what says which elements they are.

    Attributes:
        values: 1-D, bfloat16, float16 or float32: the kept elements in order of the flat index.
        shape: of the dense tensor.
        key: 64 bits, of the stream: `stream_key(seed, model, tensor)`.
        threshold: T in [0, 2^32): element i is kept where its draw is below T.
        factor: r, what kept deltas are multiplied with where they are used.
        holds: "finetuned": the values are those of the finetuned tensor, and the base is
            subtracted where they are used; "delta": they are deltas.
        offsets: int64 [ceil(n / 2048) + 1], the number of kept elements before each tile of 2048.
            It follows from the stream and is made anew where it is not given.

    Making one checks that the number of values is the number of kept elements. On the CPU that
    costs nothing beside the offsets. On a CUDA device it reads one number back, unless this
    process has met the same stream and size before; while a CUDA graph is captured the number is
    counted on the host instead.

    Raises:
        TypeError, ValueError: an attribute that is out of range or does not fit the others.
    """

    values: Tensor
    shape: torch.Size
    key: int
    threshold: int
    factor: float = 1.0
    holds: Holds = "delta"
    offsets: Tensor = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _check_packable("values", self.values)
        if self.values.dim() != 1:
            raise ValueError(f"values must have one dimension; got {tuple(self.values.shape)}")
        for name in ("key", "threshold"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"{name} must be an int, got {type(number).__name__}")
        _check_stream(self.key, self.threshold)
        if isinstance(self.factor, bool) or not isinstance(self.factor, (int, float)):
            raise TypeError(f"factor must be a number, got {type(self.factor).__name__}")
        _check_factor(self.factor)
        if self.holds not in get_args(Holds):
            raise ValueError(f"holds must be 'finetuned' or 'delta'; got {self.holds!r}")
        shape = torch.Size(self.shape)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "key", self.key & (1 << 64) - 1)
        object.__setattr__(self, "factor", float(self.factor))
        n, key = shape.numel(), signed_key(self.key)
        device = self.values.device
        made = _offsets_op(n, key, self.threshold, device) if self.offsets is None else None
        if made is not None:
            object.__setattr__(self, "offsets", made)
        _check_offsets("offsets", self.offsets, n, device)
        if torch.compiler.is_compiling() or device.type == "meta":
            return
        # Offsets that were given may be wrong; they are not what the number is taken from.
        kept = _kept_count(n, key, self.threshold, made)
        if self.values.numel() != kept:
            raise ValueError(
                f"values must hold the {kept} elements that the stream keeps of {n}; "
                f"got {self.values.numel()}"
            )

    @property
    def numel(self) -> int:
        """Elements of the dense tensor."""
        return int(self.shape.numel())

    @property
    def density(self) -> float:
        """The keep rate, exactly T / 2^32."""
        return self.threshold / 2.0**32

    @property
    def nbytes(self) -> int:
        """Bytes in memory, the offsets included; a file needs the values only."""
        return int(self.values.nbytes + self.offsets.nbytes)

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def to(self, device: torch.device | str | int) -> PackedDelta:
        """The same on another device."""
        return replace(self, values=self.values.to(device), offsets=self.offsets.to(device))


# ---- pack and unpack


def _threshold_of(density: float | None, drop_rate: float | None) -> int:
    if (density is None) == (drop_rate is None):
        raise ValueError("give exactly one of density and drop_rate")
    if drop_rate is not None:
        if not 0.0 <= drop_rate < 1.0:
            raise ValueError(f"drop_rate must be in [0, 1); got {drop_rate}")
        density = 1.0 - drop_rate
    assert density is not None
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must be in (0, 1]; got {density}")
    threshold = keep_threshold(density)
    if threshold >= 1 << 32:
        raise ValueError(
            f"density={density} keeps every element: nothing is gained by packing, use the tensor"
        )
    return threshold


def _l1_sums(
    x: Tensor, base: Tensor | None, held: torch.dtype, key: int, threshold: int, backend: str | None
) -> tuple[float, float]:
    """sum |d| and sum |d kept| as numbers."""
    if backend is None:
        backend = {"cpu": "native", "cuda": "triton"}.get(x.device.type, "eager")
        core = native_or_say() if backend == "native" else None
    else:
        core = require_native(backend, x.device.type) if backend == "native" else None
    if core is not None:
        return packed_ops.native_sums(core, x, base, held, key, threshold)
    if base is not None and held != torch.float32:
        x, base = (x.float() - base.float()).to(held), None
    if backend == "triton":
        sums = packed_ops.triton_sums(x, base, key, threshold)
        if sums is not None:
            return float(sums[0]), float(sums[1])
    delta = x.reshape(-1).float()
    if base is not None:
        delta = delta - base.reshape(-1).float()
    keep = keep_mask(key, delta.numel(), threshold, device=x.device)
    return absolute_sum(delta), absolute_sum(torch.where(keep, delta, 0.0))


def pack(
    x: Tensor,
    *,
    density: float | None = None,
    drop_rate: float | None = None,
    seed: int = 0,
    model: str = "",
    tensor: str = "",
    base: Tensor | None = None,
    rescale: Rescale = "keep_rate",
    holds: Holds | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> PackedDelta:
    """Drop elements of a delta at random and keep the values of the others only.

    The same elements as `dare` and the drop of `combine` keep: `seed`, `model` and `tensor` name
    the stream. Give every tensor of a model its own name, or they share one mask.

    Args:
        x: the finetuned tensor, or without `base` and `holds` the delta itself; any shape,
            bfloat16, float16 or float32.
        density: the fraction to keep, in (0, 1).
        drop_rate: the fraction to drop, in (0, 1), instead of `density`.
        seed, model, tensor: name the random stream.
        base: of the shape and device of `x`.
        rescale: the factor on what is kept: "keep_rate" (2^32 / T), "l1" (sum |d| / sum |d kept|)
            or "none".
        holds: "finetuned" stores the kept elements of `x` as they are, without rounding;
            "delta" stores `x - base`, or `x` without a base. The default is "finetuned" with a
            base. With "finetuned" only rescale="l1" reads the base, so it may be left out.
        dtype: of the values: the default is that of `x`. For "finetuned" one that holds every
            value of `x`.
        backend: "eager", "native" or "triton", for tests and benchmarks.

    Returns:
        A `PackedDelta` on the device of `x`. On a CUDA device its size is read back once per
        stream and size, see there, and rescale="l1" reads two numbers back.

    Raises:
        TypeError: a dtype that is not readable; `seed` is not an int.
        ValueError: a number out of range or an argument without effect; infinite sums for "l1".
    """
    _check_packable("x", x)
    if base is not None:
        _check_packable("base", base)
        check_same("base", base, "x", x)
    if holds is None:
        holds = "delta" if base is None else "finetuned"
    if holds not in get_args(Holds):
        raise ValueError(f"holds must be 'finetuned' or 'delta'; got {holds!r}")
    if rescale not in get_args(Rescale):
        raise ValueError(f"rescale must be one of 'none', 'keep_rate', 'l1'; got {rescale!r}")
    if holds == "finetuned" and rescale == "l1" and base is None:
        raise ValueError("base must be given for rescale='l1' with holds='finetuned'")
    dtype = x.dtype if dtype is None else dtype
    _check_dtype("dtype", dtype)
    if holds == "finetuned" and dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"dtype must hold every value of x with holds='finetuned': {x.dtype} or float32; "
            f"got {dtype}"
        )
    threshold = _threshold_of(density, drop_rate)
    unsigned = stream_key(seed, model, tensor)
    key, n = signed_key(unsigned), x.numel()

    factor = 1.0
    if rescale == "keep_rate" and threshold > 0:
        factor = 2.0**32 / threshold
    elif rescale == "l1":
        held = torch.float32 if holds == "finetuned" else dtype
        # A delta that is rounded when packed is rescaled as what it was rounded to.
        given = x if base is not None or holds == "finetuned" else x.to(held)
        total, kept_sum = _l1_sums(given.detach(), base, held, key, threshold, backend)
        if not math.isfinite(total):
            raise ValueError(f"x must be finite for rescale='l1'; the sum of magnitudes is {total}")
        factor = l1_factor(total, kept_sum)

    offsets = _offsets_by(backend, x.device)(n, key, threshold, x.device)
    kept = _kept_count(n, key, threshold, offsets)
    subtracted = base if holds == "delta" else None
    values = _pack_by(backend, x.device)(x, subtracted, offsets, key, threshold, kept, dtype)
    return PackedDelta(values, x.shape, unsigned, threshold, factor, holds, offsets)


def unpack(
    packed: PackedDelta,
    *,
    base: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    rescaled: bool = True,
    backend: str | None = None,
) -> Tensor:
    """The dense delta: dropped elements are 0, kept ones rescaled. Differentiable in the values.

    For values that are deltas, of the dtype of the result, the bits are those of `dare`.

    Args:
        packed: what `pack` gives.
        base: the base tensor where `packed.holds` is "finetuned".
        out_dtype: bfloat16, float16 or float32; the default is that of the values. The delta is
            taken and rescaled in float32 and rounded once.
        rescaled: multiply with `packed.factor`.
        backend: "eager", "native" or "triton", for tests and benchmarks.

    Returns:
        A new contiguous tensor of `packed.shape`.

    Raises:
        TypeError: a dtype that cannot be read or written; `packed` is no PackedDelta.
        ValueError: the base is missing, without effect, or of another shape or device.
    """
    if not isinstance(packed, PackedDelta):
        raise TypeError(f"packed must be a PackedDelta, got {type(packed).__name__}")
    if packed.holds == "finetuned" and base is None:
        raise ValueError("base must be given: the packed values are those of the finetuned tensor")
    if packed.holds == "delta" and base is not None:
        raise ValueError("base has no effect on packed deltas; leave it out")
    if base is not None:
        _check_packable("base", base)
        _check_base(base, packed.shape, packed.device)
    dtype = packed.dtype if out_dtype is None else out_dtype
    _check_dtype("out_dtype", dtype)
    return _unpack_by(backend, packed.device)(
        packed.values,
        base,
        packed.offsets,
        signed_key(packed.key),
        packed.threshold,
        list(packed.shape),
        packed.factor if rescaled else 1.0,
        dtype,
    )


# ---- combine from packed deltas

FINETUNED, DELTA = 0, 1
"""The kinds of an entry: whether the base is subtracted from its values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedCall:
    """The arguments of a combine over rows of `models` entries, dense ones and packed ones."""

    bases: Sequence[Tensor]
    """One per row; empty without differences."""
    tensors: Sequence[Tensor]
    """One per entry: a dense tensor, or the values of a packed one."""
    offsets: Sequence[Tensor]
    """This and the next five: one per entry. Empty for a dense tensor."""
    keys: Sequence[int]
    thresholds: Sequence[int]
    factors: Sequence[float]
    kinds: Sequence[int]
    weights: Sequence[float]
    models: int
    shapes: Sequence[Sequence[int]]
    """Of the output of each row."""
    flat: bool
    """The rows are given by their sizes alone."""
    elect: str
    elect_on: str
    reduce: str
    divisor: str
    lam: float
    out_dtype: torch.dtype | None

    @property
    def rows(self) -> int:
        return len(self.shapes)

    def entries(self, row: int) -> range:
        return range(row * self.models, (row + 1) * self.models)

    def is_packed(self, entry: int) -> bool:
        return bool(self.offsets[entry].numel() > 0)

    def first(self, row: int) -> Tensor:
        """The tensor that gives the row its device and default dtype."""
        return self.bases[row] if self.bases else self.tensors[row * self.models]

    def empty(self) -> list[Tensor]:
        """New tensors for the results."""
        firsts = map(self.first, range(self.rows))
        return [
            torch.empty(shape, dtype=self.out_dtype or first.dtype, device=first.device)
            for shape, first in zip(self.shapes, firsts, strict=True)
        ]

    @property
    def policy(self) -> Policy:
        return Policy(
            difference=bool(self.bases),
            elect=self.elect,  # type: ignore[arg-type]
            elect_on=self.elect_on,  # type: ignore[arg-type]
            reduce=self.reduce,  # type: ignore[arg-type]
            divisor=self.divisor,  # type: ignore[arg-type]
        )

    def denominator(self, row: int) -> float:
        """What a mean without election divides by, a float32 value."""
        if self.elect != "none" or self.reduce != "mean":
            return 1.0
        weights = [self.weights[e] for e in self.entries(row)]
        by = sum(weights) if self.divisor == "weights" else float(len(weights))
        return 1.0 if abs(by) < _SMALLEST_WEIGHT_SUM else round_float32(by)

    def check(self) -> None:
        """Raise TypeError or ValueError unless every backend can carry this out."""
        _ = self.policy
        if self.models < 1 or len(self.tensors) != self.models * self.rows or not self.tensors:
            raise ValueError(
                f"tensors must come in {self.rows} rows of {self.models} models; "
                f"got {len(self.tensors)}"
            )
        if self.bases and len(self.bases) != self.rows:
            raise ValueError(
                f"base must be given for each of {self.rows} tensors; got {len(self.bases)}"
            )
        for argument in ("offsets", "keys", "thresholds", "factors", "kinds", "weights"):
            length = len(getattr(self, argument))
            if length != len(self.tensors):
                raise ValueError(
                    f"{argument} must have one entry per tensor, {len(self.tensors)}; got {length}"
                )
        for weight in self.weights:
            if not math.isfinite(weight):
                raise ValueError(f"weights must be finite, got {weight}")
        if not math.isfinite(self.lam):
            raise ValueError(f"lam must be finite, got {self.lam}")
        for row in range(self.rows):
            self._check_row(row, "" if self.rows == 1 else f" of row {row}")

    def _check_row(self, row: int, label: str) -> None:
        shape, device = tuple(self.shapes[row]), self.first(row).device
        if min(shape, default=0) < 0:
            raise ValueError(f"shape{label} must not be negative; got {shape}")
        if self.bases:
            self._check_dense(f"base{label}", self.bases[row], shape, device)
        for k, e in enumerate(self.entries(row)):
            name = f"tensors[{k}]{label}"
            if self.is_packed(e):
                self._check_packed(name, e, math.prod(shape), device)
            else:
                self._check_dense(name, self.tensors[e], shape, device)
        dtype = self.out_dtype or self.first(row).dtype
        if dtype not in WRITABLE:
            raise TypeError(
                f"out_dtype must be one of bfloat16, float16, float32; got {dtype}"
                + ("" if self.out_dtype else f", that of the first tensor{label}: give out_dtype")
            )

    def _check_dense(
        self, name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device
    ) -> None:
        check_readable(name, tensor)
        fits = tensor.numel() == shape[0] if self.flat else tuple(tensor.shape) == shape
        if not fits:
            raise ValueError(
                f"{name} must have the shape of the result, {shape}; got {tuple(tensor.shape)}"
            )
        if tensor.device != device:
            raise ValueError(f"{name} must be on the device {device}; got {tensor.device}")

    def _check_packed(self, name: str, e: int, n: int, device: torch.device) -> None:
        values = self.tensors[e]
        _check_packable(f"values of {name}", values)
        if values.dim() != 1 or values.numel() > n:
            raise ValueError(
                f"values of {name} must have one dimension and at most {n} elements; "
                f"got {tuple(values.shape)}"
            )
        if values.device != device:
            raise ValueError(f"{name} must be on the device {device}; got {values.device}")
        _check_stream(self.keys[e], self.thresholds[e])
        _check_offsets(f"offsets of {name}", self.offsets[e], n, device)
        _check_factor(self.factors[e])
        if self.kinds[e] not in (FINETUNED, DELTA):
            raise ValueError(f"kinds must be 0 or 1; got {self.kinds[e]}")
        if self.kinds[e] == FINETUNED and not self.bases:
            raise ValueError(f"base must be given: {name} holds values of a finetuned tensor")

    def run_eager(self) -> list[Tensor]:
        outs = self.empty()
        for row, out in enumerate(outs):
            flat = out.view(-1)
            for first in range(0, out.numel(), _BLOCK):
                block = slice(first, min(first + _BLOCK, out.numel()))
                flat[block] = self._eager_block(row, block, out.numel()).to(out.dtype)
        return outs

    def _eager_block(self, row: int, block: slice, n: int) -> Tensor:
        base = self.bases[row].reshape(-1)[block].float() if self.bases else None
        values, votes = [], []
        for e in self.entries(row):
            delta = self._eager_delta(e, base, block, n)
            value = _scale(delta, self.weights[e] * self.factors[e])
            values.append(value)
            weighted = self.elect_on == "weighted" or self.elect == "none"
            votes.append(value if weighted else _scale(delta, self.factors[e]))
        if self.elect != "none":
            weights = [self.weights[e] for e in self.entries(row)]
            total = _reduce_elected(values, votes, weights, self.policy)
        else:
            total = values[0]
            for value in values[1:]:
                total = total + value
            if self.reduce == "mean":
                total = _divide(total, self.denominator(row))
        if self.lam != 1.0:
            total = _scale(total, self.lam)
        return total if base is None else base + total

    def _eager_delta(self, e: int, base: Tensor | None, block: slice, n: int) -> Tensor:
        tensor = self.tensors[e]
        subtracted = base if self.kinds[e] == FINETUNED else None
        if not self.is_packed(e):
            delta = tensor.reshape(-1)[block].float()
            return delta if subtracted is None else delta - subtracted
        count = block.stop - block.start
        # The offsets of the block alone, counted from its first value.
        bounds = self.offsets[e][block.start // PACK_TILE :][: _tiles(count) + 1]
        keep = keep_mask(
            self.keys[e], count, self.thresholds[e], start=block.start, device=tensor.device
        )
        start, end = int(bounds[0]), int(bounds[-1])
        wrong = start < 0 or end > tensor.numel()
        if wrong or not torch.equal(bounds.diff(), _tile_counts(keep)):
            raise ValueError(_WRONG_OFFSETS)
        return _expanded(tensor[start:end], subtracted, keep, slice(0, count), torch.float32)

    def run_cpu(self) -> list[Tensor]:
        core = native_or_say()
        if core is None or not packed_ops.native_takes(self):
            return self.run_eager()
        return packed_ops.native_combine(core, self)

    def run_cuda(self) -> list[Tensor]:
        by = device_ops.engine(self.first(0).device) if packed_ops.device_takes(self) else None
        return self.run_eager() if by is None else packed_ops.device_combine(self, by)

    def run_on(self, backend: str) -> list[Tensor]:
        device = self.first(0).device.type
        check_backend(backend, device)
        if backend == "eager":
            return self.run_eager()
        if backend == "native":
            core = require_native(backend, device)
            if not packed_ops.native_takes(self):
                raise ValueError(
                    f"backend='native' takes at most {packed_ops.MOST_MODELS} models; "
                    "leave backend out"
                )
            return packed_ops.native_combine(core, self)
        if not packed_ops.device_takes(self):
            raise ValueError(
                f"backend={backend!r} takes at most {device_ops.MOST_MODELS} models; "
                "leave backend out"
            )
        by = device_ops.require(backend, self.first(0).device)
        return packed_ops.device_combine(self, by)


_COMMON_SCHEMA = (
    "int[] keys, int[] thresholds, float[] factors, int[] kinds, float[] weights, "
    "str elect, str elect_on, str reduce, str divisor, float lam, ScalarType? out_dtype"
)


def _call(
    bases: Sequence[Tensor],
    tensors: Sequence[Tensor],
    offsets: Sequence[Tensor],
    models: int,
    shapes: Sequence[Sequence[int]],
    flat: bool,
    *rest: Any,
) -> PackedCall:
    keys, thresholds, factors, kinds, weights, elect, elect_on, reduce, divisor, lam, dtype = rest
    call = PackedCall(
        bases=bases,
        tensors=tensors,
        offsets=offsets,
        models=models,
        shapes=shapes,
        flat=flat,
        keys=keys,
        thresholds=thresholds,
        factors=factors,
        kinds=kinds,
        weights=weights,
        elect=elect,
        elect_on=elect_on,
        reduce=reduce,
        divisor=divisor,
        lam=lam,
        out_dtype=dtype,
    )
    call.check()
    return call


def _call_one(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    offsets: Sequence[Tensor],
    shape: Sequence[int],
    *rest: Any,
) -> PackedCall:
    bases = [] if base is None else [base]
    return _call(bases, tensors, offsets, len(tensors), [shape], False, *rest)


def _call_many(
    bases: Sequence[Tensor],
    tensors: Sequence[Tensor],
    offsets: Sequence[Tensor],
    models: int,
    sizes: Sequence[int],
    *rest: Any,
) -> PackedCall:
    return _call(bases, tensors, offsets, models, [(n,) for n in sizes], True, *rest)


_combine_op = torch.library.custom_op(
    "cl_fast::combine_packed",
    lambda *args: _call_one(*args).run_eager()[0],
    mutates_args=(),
    schema=(
        "(Tensor? base, Tensor[] tensors, Tensor[] offsets, SymInt[] shape, "
        f"{_COMMON_SCHEMA}) -> Tensor"
    ),
)
_combine_op.register_kernel("cpu")(lambda *args: _call_one(*args).run_cpu()[0])
_combine_op.register_kernel("cuda")(lambda *args: _call_one(*args).run_cuda()[0])
_combine_op.register_fake(lambda *args: _call_one(*args).empty()[0])

_combine_many_op = torch.library.custom_op(
    "cl_fast::combine_packed_many",
    lambda *args: _call_many(*args).run_eager(),
    mutates_args=(),
    schema=(
        "(Tensor[] bases, Tensor[] tensors, Tensor[] offsets, int models, SymInt[] sizes, "
        f"{_COMMON_SCHEMA}) -> Tensor[]"
    ),
)
_combine_many_op.register_kernel("cpu")(lambda *args: _call_many(*args).run_cpu())
_combine_many_op.register_kernel("cuda")(lambda *args: _call_many(*args).run_cuda())
_combine_many_op.register_fake(lambda *args: _call_many(*args).empty())


def _listed(argument: str, terms: Any) -> list[Tensor | PackedDelta]:
    if isinstance(terms, (Tensor, PackedDelta)):
        raise TypeError(f"{argument} must be a list, one entry per model, got one tensor")
    listed = list(terms)
    if not listed:
        raise ValueError(f"{argument} must hold at least one tensor")
    for k, term in enumerate(listed):
        if not isinstance(term, (Tensor, PackedDelta)):
            raise TypeError(
                f"{argument}[{k}] must be a torch.Tensor or a PackedDelta, "
                f"got {type(term).__name__}"
            )
    return listed


def _check_policy(policy: Policy, bases: Any, any_packed: bool) -> None:
    if not isinstance(policy, Policy):
        raise TypeError(f"policy must be a cl_fast.ops.Policy, got {type(policy).__name__}")
    if any_packed and policy.sparsify != "drop":
        raise ValueError(
            f"policy.sparsify must be 'drop' with packed deltas; got {policy.sparsify!r}"
        )
    if policy.sparsify not in ("drop", "none"):
        raise ValueError(f"policy.sparsify must be 'drop' or 'none'; got {policy.sparsify!r}")
    if policy.difference and bases is None:
        raise ValueError("base must be given, since policy.difference is True")
    if bases is not None and not policy.difference:
        raise ValueError("base has no effect with policy.difference=False; leave it out")


def _shape_of(base: Tensor | None, row: list[Tensor | PackedDelta], label: str) -> torch.Size:
    first = row[0] if base is None else base
    name = f"base{label}" if base is not None else f"tensors[0]{label}"
    if not isinstance(first, (Tensor, PackedDelta)):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(first).__name__}")
    for k, term in enumerate(row):
        if term.shape != first.shape:
            raise ValueError(
                f"tensors[{k}]{label} must have the shape of {name}, {tuple(first.shape)}; "
                f"got {tuple(term.shape)}"
            )
        if term.device != first.device:
            raise ValueError(
                f"tensors[{k}]{label} must be on the device of {name}, {first.device}; "
                f"got {term.device}"
            )
    return first.shape


def _terms(terms: Sequence[Tensor | PackedDelta], difference: bool) -> tuple[list[Any], ...]:
    """Tensors, offsets, keys, thresholds, factors and kinds of the entries."""
    columns: tuple[list[Any], ...] = ([], [], [], [], [], [])
    for term in terms:
        if isinstance(term, PackedDelta):
            kind = FINETUNED if term.holds == "finetuned" else DELTA
            entry = (term.values, term.offsets, signed_key(term.key), term.threshold)
            words: tuple[Any, ...] = (*entry, term.factor, kind)
        else:
            nothing = torch.empty(0, dtype=torch.int64, device=term.device)
            words = (term, nothing, 0, 0, 1.0, FINETUNED if difference else DELTA)
        for column, word in zip(columns, words, strict=True):
            column.append(word)
    return columns


def combine_packed(
    base: Tensor | None,
    tensors: Sequence[Tensor | PackedDelta],
    *,
    weights: float | Sequence[float],
    policy: Policy | None = None,
    lam: float = 1.0,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """`combine` where some of the tensors are packed deltas.

    Args:
        base: the base tensor; None with `Policy(difference=False)`, then packed deltas must hold
            deltas.
        tensors: one per model, packed or dense, of one shape and device. A dense one is a
            finetuned tensor, without a base a delta; it takes part whole, without a drop.
        weights: one per model, or one for all.
        policy: sparsify="drop", which is also the default. What was dropped, and the rescaling,
            are those of the packing; policy.rescale is not looked at.
        lam: the factor on the combined delta.
        out_dtype: bfloat16, float16 or float32; the default is that of the base, without one
            that of the first tensor.
        backend: "eager", "native", "triton" or "cuda", for tests and benchmarks.

    Returns:
        A new contiguous tensor, without a gradient. No packed delta is expanded as a whole.

    Raises:
        TypeError: a dtype that cannot be read or written; an argument of another type.
        ValueError: shapes or devices differ, a number out of range, a base that is missing.
    """
    listed = _listed("tensors", tensors)
    policy = Policy(sparsify="drop") if policy is None else policy
    _check_policy(policy, base, any(isinstance(term, PackedDelta) for term in listed))
    shape = _shape_of(base, listed, "")
    values, offsets, *numbers = _terms(listed, policy.difference)
    rest = [
        *numbers,
        [float(weight) for weight in _numbers("weights", weights, 1, len(listed))],
        *(policy.elect, policy.elect_on, policy.reduce, policy.divisor, float(lam), out_dtype),
    ]
    arguments: list[Any] = [base, values, offsets, list(shape), *rest]
    if backend is None:
        return cast(Tensor, _combine_op(*arguments))
    return _call_one(*arguments).run_on(backend)[0]


def combine_packed_many(
    bases: Sequence[Tensor] | None,
    rows: Sequence[Sequence[Tensor | PackedDelta]],
    *,
    weights: float | Sequence[float] | Sequence[Sequence[float]],
    policy: Policy | None = None,
    lam: float = 1.0,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """`combine_packed` for all tensors of a model in one call.

    Args:
        bases: one base per tensor of the model; None with `Policy(difference=False)`.
        rows: for each tensor of the model the list of its versions, packed or dense.
        weights: one number; one per model; or for each tensor one per model.
        policy, lam, out_dtype, backend: as in `combine_packed`.

    Returns:
        One new tensor per row.

    Raises:
        As `combine_packed`; the words name the row.
    """
    listed = [_listed("tensors", row) for row in rows]
    if not listed:
        raise ValueError("tensors must hold at least one tensor")
    models = len(listed[0])
    for number, row in enumerate(listed):
        if len(row) != models:
            raise ValueError(
                f"tensors must hold the same number of models in each row; row 0 has {models}, "
                f"row {number} has {len(row)}"
            )
    flat = [term for row in listed for term in row]
    policy = Policy(sparsify="drop") if policy is None else policy
    _check_policy(policy, bases, any(isinstance(term, PackedDelta) for term in flat))
    given: list[Tensor] = [] if bases is None else list(bases)
    if given and len(given) != len(listed):
        raise ValueError(
            f"base must be given for each of {len(listed)} tensors, since policy.difference is "
            f"True; got {len(given)}"
        )
    shapes = [
        _shape_of(given[r] if given else None, row, "" if len(listed) == 1 else f" of row {r}")
        for r, row in enumerate(listed)
    ]
    values, offsets, *numbers = _terms(flat, policy.difference)
    rest = [
        *numbers,
        [float(weight) for weight in _numbers("weights", weights, len(listed), models)],
        *(policy.elect, policy.elect_on, policy.reduce, policy.divisor, float(lam), out_dtype),
    ]
    arguments: list[Any] = [
        given,
        values,
        offsets,
        models,
        [shape.numel() for shape in shapes],
        *rest,
    ]
    if backend is None:
        outs = _combine_many_op(*arguments)
    else:
        outs = _call_many(*arguments).run_on(backend)
    return [out.view(shape) for out, shape in zip(outs, shapes, strict=True)]
