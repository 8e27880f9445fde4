"""Low-rank updates of weights, and second moments of keys: what knowledge editing stands on.

    rank_update    W = round(B + alpha U V^T)        W [m, n], U [m, r], V [n, r], B = base or W
    gram           C = C + alpha K^T K               K [tokens, d], one key per row; C [d, d]

rank_update: ROME, MEMIT, AlphaEdit and merged LoRA adapters are such updates (Meng et al. 2022,
2023). The product is summed in float32, times alpha, plus B, and rounded once, on the store. Added
to an untouched base, the sum of a thousand edits is rounded once as well; added to its own result
a thousand times, it is rounded a thousand times, and bfloat16 loses most of what was added.

Gradients, with G the upstream one:  dB = G,  dU = alpha G V,  dV = alpha G^T U. The rounding counts
as the identity.

rounding="stochastic" rounds up or down at random, so that the expected value is the sum itself.
The bits come from Philox4x32-10, counted by the element's index in the tensor, row by row:

    key      = the stream of (seed, "rank_update", "rounding"), see cl_fast.ops.streams
    block    = Philox4x32-10(counter = (g mod 2^32, g >> 32, 0, 0), key),  g = index >> 3
    drawn    = 16 bits of block[j >> 1], the low half for even j,          j = index & 7

    bfloat16                       (bits(x) + drawn) without the low 16 bits
    float16, |x| >= 2^-14          (bits(x) + drawn / 8) without the low 13 bits, then converted
    float16, |x| <  2^-14          2^-24 (q + 1 if 2^16 f >= drawn + 1, else q);  |x| 2^24 = q + f

where x is the float32 sum and bits(x) its bits read as an integer; below 2^-14 the sign is put
back. Infinities and NaN are converted as they are. Equal sums give equal results on every backend.

gram sums the products of a block of tokens in float32 and adds that sum to C, so that with C in
float64 a million tokens are as exact as one block. The textbook writes keys as columns and K K^T;
here they are rows, as activations come. Only the part on and above the diagonal is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product as every
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from cl_fast.backends import check_backend
from cl_fast.ops.dropping import _level_bytes
from cl_fast.ops.streams import stream_key

__all__ = ["gram", "gram_", "rank_update", "rank_update_", "rank_update_many_"]

Rounding = Literal["nearest", "stochastic"]

MOST_RANK = 4096
_ROUNDINGS = ("nearest", "stochastic")
_OFFERED = ("eager", "triton")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_HALF = (torch.bfloat16, torch.float16)
_LARGEST = torch.finfo(torch.float32).max

_BLOCK = 8 << 20
"""Bytes of a block of float32 sums: bounds the temporaries of the reference."""
_FACTOR_BLOCK = 16 << 20
"""Bytes of the factors, or keys, that are widened at a time."""
_TOKENS = 2048
"""Tokens whose products are summed in float32 before they are added to C."""


# What a call must look like.


def _check_tensor(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must have one of the dtypes {names}; got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got the layout {tensor.layout}")


def _check_place(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}; got {tensor.device}"
        )


def _check_layer(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    base: Tensor | None,
    alpha: float,
    rounding: str,
    names: tuple[str, str, str, str, str] = ("weight", "u", "v", "base", "alpha"),
) -> None:
    """Raise unless these are the arguments of one update."""
    name, u_name, v_name, base_name, alpha_name = names
    _check_tensor(name, weight, _FLOATS)
    _check_tensor(u_name, u, _FLOATS)
    _check_tensor(v_name, v, _FLOATS)
    others = [(u_name, u), (v_name, v)]
    if base is not None:
        _check_tensor(base_name, base, _FLOATS)
        others.append((base_name, base))
    for other_name, other in others:
        if (other.dtype == torch.float64) != (weight.dtype == torch.float64):
            raise TypeError(
                f"float64 is for all or none: {name} is {weight.dtype}, {other_name} {other.dtype}"
            )
        _check_place(other_name, other, name, weight)
    if v.dtype != u.dtype:
        raise TypeError(f"{v_name} must have the dtype of {u_name}, {u.dtype}; got {v.dtype}")
    shape = tuple(weight.shape)
    if weight.dim() < 2:
        raise ValueError(f"{name} must have the shape [..., m, n]; got {shape}")
    if u.dim() != weight.dim() or u.shape[:-1] != weight.shape[:-1]:
        raise ValueError(
            f"{u_name} must have the shape [..., m, r] for {name} of shape {shape}; "
            f"got {tuple(u.shape)}"
        )
    if v.dim() != weight.dim() or v.shape[:-1] != weight.mT.shape[:-1]:
        raise ValueError(
            f"{v_name} must have the shape [..., n, r] for {name} of shape {shape}; "
            f"got {tuple(v.shape)}"
        )
    if v.shape[-1] != u.shape[-1]:
        raise ValueError(
            f"{v_name} must have the rank of {u_name}, {u.shape[-1]}; got {v.shape[-1]}"
        )
    if u.shape[-1] > MOST_RANK:
        raise ValueError(f"{u_name} must have a rank of at most {MOST_RANK}; got {u.shape[-1]}")
    if base is not None and base.shape != weight.shape:
        raise ValueError(
            f"{base_name} must have the shape of {name}, {shape}; got {tuple(base.shape)}"
        )
    if not math.isfinite(alpha) or (weight.dtype != torch.float64 and abs(alpha) > _LARGEST):
        raise ValueError(f"{alpha_name} must be a finite number; got {alpha}")
    if rounding not in _ROUNDINGS:
        raise ValueError(f"rounding must be one of 'nearest', 'stochastic'; got {rounding!r}")
    if rounding == "stochastic" and weight.dtype not in _HALF:
        raise ValueError(
            f"rounding='stochastic' needs a {name} of bfloat16 or float16; got {weight.dtype}"
        )


def _check_layers(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    bases: Sequence[Tensor | None],
    alphas: Sequence[float],
    rounding: str,
) -> None:
    for name, items in (("us", us), ("vs", vs), ("bases", bases), ("alphas", alphas)):
        if len(items) != len(weights):
            raise ValueError(
                f"{name} must have one item for each of the {len(weights)} weights; "
                f"got {len(items)}"
            )
    if rounding not in _ROUNDINGS:
        raise ValueError(f"rounding must be one of 'nearest', 'stochastic'; got {rounding!r}")
    for i, (weight, u, v, base, alpha) in enumerate(
        zip(weights, us, vs, bases, alphas, strict=True)
    ):
        names = (f"weights[{i}]", f"us[{i}]", f"vs[{i}]", f"bases[{i}]", f"alphas[{i}]")
        _check_layer(weight, u, v, base, alpha, rounding, names)
        _check_place(names[0], weight, "weights[0]", weights[0])


def _check_moments(
    cs: Sequence[Tensor | None],
    ks: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    alpha: float,
    one: bool,
) -> None:
    """Raise unless these are the arguments of gram or gram_; `one` names them without index."""
    for names, items in (("c", cs), ("mask", masks)):
        if len(items) != len(ks):
            raise ValueError(
                f"{names} must have one item for each of the {len(ks)} layers of k; "
                f"got {len(items)}"
            )
    for i, (c, k, mask) in enumerate(zip(cs, ks, masks, strict=True)):
        at = "" if one else f"[{i}]"
        _check_tensor(f"k{at}", k, _FLOATS)
        _check_place(f"k{at}", k, "k[0]", ks[0])
        if k.dim() not in (2, 3):
            raise ValueError(
                f"k{at} must have the shape [tokens, d] or [layers, tokens, d]; "
                f"got {tuple(k.shape)}"
            )
        if c is not None:
            _check_tensor(f"c{at}", c, (torch.float64, torch.float32))
            _check_place(f"c{at}", c, f"k{at}", k)
            shape = (*k.shape[:-2], k.shape[-1], k.shape[-1])
            if tuple(c.shape) != shape:
                raise ValueError(
                    f"c{at} must have the shape {tuple(shape)} for k{at} of shape "
                    f"{tuple(k.shape)}; got {tuple(c.shape)}"
                )
            if k.dtype == torch.float64 and c.dtype != torch.float64:
                raise TypeError(f"c{at} must be float64 for float64 k{at}; got {c.dtype}")
        if mask is not None:
            _check_tensor(f"mask{at}", mask, (torch.bool,))
            _check_place(f"mask{at}", mask, f"k{at}", k)
            if mask.shape != k.shape[:-1] and mask.shape != k.shape[-2:-1]:
                raise ValueError(
                    f"mask{at} must have the shape {tuple(k.shape[:-1])} of the tokens of k{at}; "
                    f"got {tuple(mask.shape)}"
                )
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number; got {alpha}")


# Memory that is written must not be read.


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor and the byte after its last one."""
    reach = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    start = tensor.data_ptr()
    return start, start + (reach + 1) * tensor.element_size()


def _steps(tensor: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions that have steps, the widest stride first."""
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return sorted(((stride, size) for stride, size in pairs if size > 1), reverse=True)


def _folds(tensor: Tensor) -> bool:
    """Whether some elements share their memory; yes where that is not plain to see."""
    reach = 0
    for stride, size in reversed(_steps(tensor)):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _side_by_side(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are ranges of columns of one matrix, and no column is in both."""
    a_steps, b_steps = _steps(a), _steps(b)
    if len(a_steps) < 2 or len(b_steps) < 2 or a.element_size() != b.element_size():
        return False
    (row, _), (a_one, a_width) = a_steps[-2:]
    b_one, b_width = b_steps[-1]
    if a_one != 1 or b_one != 1 or any(step % row for step, _ in a_steps[:-1] + b_steps[:-1]):
        return False
    apart, odd = divmod(b.data_ptr() - a.data_ptr(), a.element_size())
    return not odd and a_width <= apart % row and apart % row + b_width <= row


def _check_overlaps(
    written: Iterable[tuple[str, Tensor]], read: Iterable[tuple[str, Tensor]]
) -> None:
    """Raise ValueError if memory that is written is written twice, or read as something else."""
    spans = []
    for named, writes in ((written, True), (read, False)):
        for name, tensor in named:
            if writes and _folds(tensor):
                raise ValueError(f"{name} has elements that share memory; copy it first")
            if tensor.numel():
                spans.append((*_span(tensor), writes, name, tensor))
    spans.sort(key=lambda item: item[0])
    open_spans: list[Any] = []
    for span in spans:
        open_spans = [other for other in open_spans if other[1] > span[0]]
        for other in open_spans:
            if (span[2] or other[2]) and not _side_by_side(other[4], span[4]):
                first, second = (span, other) if span[2] else (other, span)
                raise ValueError(
                    f"{first[3]} overlaps {second[3]} in memory; "
                    "what is written must not be read as something else"
                )
        open_spans.append(span)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same elements of memory, in one order."""
    return a is b or (
        a.data_ptr() == b.data_ptr()
        and a.dtype == b.dtype
        and a.shape == b.shape
        and a.stride() == b.stride()
    )


# The reference, in plain torch.


@dataclass(frozen=True, slots=True)
class _Layer:
    """out = round(base + alpha u v^T); `base` may be `out`. A key rounds at random."""

    out: Tensor
    base: Tensor
    u: Tensor
    v: Tensor
    alpha: float
    key: int | None

    def eager(self) -> None:
        """On any device, matrix by matrix, with temporaries of bounded size."""
        count = self.out.shape[-2] * self.out.shape[-1]
        wide = torch.float64 if self.out.dtype == torch.float64 else torch.float32
        with torch.autocast(self.out.device.type, enabled=False):
            for number, index in enumerate(every(*map(range, self.out.shape[:-2]))):
                _update_matrix(
                    self.out[index], self.base[index], self.u[index], self.v[index],
                    self.alpha, wide, self.key, number * count,
                )  # fmt: skip


def _update_matrix(
    out: Tensor,
    base: Tensor,
    u: Tensor,
    v: Tensor,
    alpha: float,
    wide: torch.dtype,
    key: int | None,
    first: int,
) -> None:
    m, n = out.shape
    r = u.shape[1]
    size = 8 if wide == torch.float64 else 4
    # Random bits are drawn in int64, with temporaries of their own.
    block = _BLOCK if key is None else _BLOCK // 4
    rows = max(1, block // (size * max(n, r, 1)))
    cols = n if v.dtype == wide else max(1, _FACTOR_BLOCK // (size * max(r, 1)))
    right = v.to(wide) if cols >= n else None
    for top in range(0, m, rows):
        below = min(m, top + rows)
        total = base[top:below].to(wide, copy=True)
        left = u[top:below].to(wide)
        # Without factors the base keeps its bits: adding 0 would turn -0 into 0.
        for start in range(0, n if r else 0, max(1, min(cols, n))):
            stop = min(n, start + cols)
            part = right if right is not None else v[start:stop].to(wide)
            total[:, start:stop] += torch.mm(left, part.t()).mul_(alpha)
        if key is not None:
            total = _round_at_random(total, out.dtype, key, first + top * n)
        out[top:below] = total


def _draw(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """16 random bits for each of the elements from `start` on: int32 [count]."""
    groups = torch.arange(start >> 3, (start + count + 7) >> 3, dtype=torch.int64, device=device)
    halves = _level_bytes(groups, 0, key).view(torch.int16).reshape(-1)
    return halves[start & 7 :][:count].to(torch.int32) & 0xFFFF


def _round_at_random(total: Tensor, dtype: torch.dtype, key: int, start: int) -> Tensor:
    """Float32 sums to values of `dtype`, still as float32; the first has the index `start`."""
    drawn = _draw(key, start, total.numel(), total.device).view(total.shape)
    bits = total.view(torch.int32)
    if dtype == torch.bfloat16:
        moved = (bits + drawn).bitwise_and_(-0x10000)
    else:
        moved = (bits + (drawn >> 3)).bitwise_and_(-0x2000)
        size = total.abs() * 2.0**24
        down = size.floor()
        up = (size - down) * 2.0**16 >= drawn.to(torch.float32) + 1.0
        small = ((down + up) * 2.0**-24).view(torch.int32) | (bits & -0x80000000)
        moved = torch.where((bits & 0x7FFFFFFF) < 0x38800000, small, moved)
    special = (bits & 0x7F800000) == 0x7F800000
    return torch.where(special, total, moved.view(torch.float32))


def _add_moments(c: Tensor, k: Tensor, mask: Tensor | None, alpha: float) -> None:
    """c += alpha k^T k for one layer, on any device."""
    tokens, d = k.shape
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    size = 8 if wide == torch.float64 else 4
    step = min(_TOKENS, max(64, _FACTOR_BLOCK // (size * max(d, 1))))
    panel = max(64, _BLOCK // (2 * size * max(d, 1)))
    for first in range(0, tokens, step):
        part = k[first : first + step].to(wide)
        if mask is not None:
            # A masked token may hold anything, NaN too.
            part = torch.where(mask[first : first + step, None], part, 0.0)
        for left in range(0, d, panel):
            right = min(d, left + panel)
            sums = torch.mm(part[:, :right].t(), part[:, left:right])
            c[:right, left:right] += sums.to(c.dtype).mul_(alpha)
    for left in range(0, d, panel):
        right = min(d, left + panel)
        c[left:right, :left] = c[:left, left:right].t()
        square = c[left:right, left:right]
        square.copy_(square.triu() + square.triu(1).t())


def _moments_eager(
    cs: Sequence[Tensor], ks: Sequence[Tensor], masks: Sequence[Tensor | None], alpha: float
) -> None:
    for c, k, mask in zip(cs, ks, masks, strict=True):
        with torch.autocast(k.device.type, enabled=False):
            for index in every(*map(range, k.shape[:-2])):
                _add_moments(c[index], k[index], None if mask is None else mask[index], alpha)


# Which backend does the work.


def _triton(device: torch.device, backend: str | None) -> ModuleType | None:
    """The Triton kernels where they serve; None means eager."""
    if backend is not None:
        check_backend(backend, device.type, _OFFERED)
    if backend == "eager" or (backend is None and device.type != "cuda"):
        return None
    from cl_fast.backends import triton

    kernels = triton.load("low_rank")
    if kernels is None and backend == "triton":
        raise RuntimeError("backend='triton' cannot be used: triton is not installed")
    return kernels


def _update(layers: Sequence[_Layer], backend: str | None = None) -> None:
    if not layers:
        return
    kernels = _triton(layers[0].out.device, backend)
    fast = []
    for layer in layers:
        if not layer.u.shape[-1] and layer.base.dtype == layer.out.dtype:
            if layer.base is not layer.out:
                layer.out.copy_(layer.base)
        elif kernels is None or layer.out.dtype == torch.float64:
            layer.eager()
        else:
            fast.append(layer)
    if fast and kernels is not None:
        keys = [layer.key for layer in fast]
        kernels.rank_update(
            [layer.out for layer in fast],
            [layer.base for layer in fast],
            [layer.u for layer in fast],
            [layer.v for layer in fast],
            [layer.alpha for layer in fast],
            None if keys[0] is None else keys,
        )


def _update_in_place(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    bases: Sequence[Tensor | None],
    alphas: Sequence[float],
    rounding: str,
    seed: int,
    backend: str | None = None,
    one: bool = False,
) -> None:
    """Checked arguments; memory is looked at here, where it is real."""
    layers = []
    read = []
    for i, (weight, u, v, base) in enumerate(zip(weights, us, vs, bases, strict=True)):
        names = ("u", "v", "base") if one else (f"us[{i}]", f"vs[{i}]", f"bases[{i}]")
        read += [(names[0], u), (names[1], v)]
        if base is None or _same(base, weight):
            base = weight
        else:
            read.append((names[2], base))
        layers.append(_Layer(weight, base, u, v, alphas[i], _key(rounding, seed + i)))
    _check_overlaps(
        [("weight" if one else f"weights[{i}]", weight) for i, weight in enumerate(weights)], read
    )
    _update(layers, backend)


def _key(rounding: str, seed: int) -> int | None:
    return stream_key(seed, "rank_update", "rounding") if rounding == "stochastic" else None


def _updated(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    base: Tensor | None,
    alpha: float,
    rounding: str,
    seed: int,
    backend: str | None = None,
) -> Tensor:
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    source = weight if base is None else base
    _update([_Layer(out, source, u, v, alpha, _key(rounding, seed))], backend)
    return out


def _add_all_moments(
    cs: Sequence[Tensor],
    ks: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    alpha: float,
    backend: str | None = None,
) -> None:
    if not ks:
        return
    masks = [
        mask if mask is None else mask.expand(k.shape[:-1])
        for k, mask in zip(ks, masks, strict=True)
    ]
    kernels = _triton(ks[0].device, backend)
    if kernels is None:
        _moments_eager(cs, ks, masks, alpha)
        return
    layers = list(zip(cs, ks, masks, strict=True))
    for wide in (False, True):
        these = [layer for layer in layers if (layer[1].dtype == torch.float64) == wide]
        run = _moments_eager if wide else kernels.gram
        run([c for c, _, _ in these], [k for _, k, _ in these], [m for _, _, m in these], alpha)


# The ops, as torch knows them.


def _rank_update(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    base: Tensor | None,
    alpha: float,
    rounding: str,
    seed: int,
) -> Tensor:
    _check_layer(weight, u, v, base, alpha, rounding)
    return _updated(weight, u, v, base, alpha, rounding, seed)


def _rank_update_fake(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    base: Tensor | None,
    alpha: float,
    rounding: str,
    seed: int,
) -> Tensor:
    _check_layer(weight, u, v, base, alpha, rounding)
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _rank_update_in_place(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    base: Tensor | None,
    alpha: float,
    rounding: str,
    seed: int,
) -> None:
    _check_layer(weight, u, v, base, alpha, rounding)
    _update_in_place([weight], [u], [v], [base], [alpha], rounding, seed, one=True)


def _rank_update_in_place_fake(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    base: Tensor | None,
    alpha: float,
    rounding: str,
    seed: int,
) -> None:
    _check_layer(weight, u, v, base, alpha, rounding)


def _rank_update_many(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    bases: Sequence[Tensor | None],
    alphas: Sequence[float],
    rounding: str,
    seed: int,
) -> None:
    _check_layers(weights, us, vs, bases, alphas, rounding)
    _update_in_place(weights, us, vs, bases, alphas, rounding, seed)


def _rank_update_many_fake(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    bases: Sequence[Tensor | None],
    alphas: Sequence[float],
    rounding: str,
    seed: int,
) -> None:
    _check_layers(weights, us, vs, bases, alphas, rounding)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, u, v, base, alpha, _, _ = inputs
    ctx.alpha = alpha
    ctx.base_dtype = None if base is None else base.dtype
    ctx.save_for_backward(u, v)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    u, v = ctx.saved_tensors
    needs_weight, needs_u, needs_v, needs_base = ctx.needs_input_grad[:4]
    wide = torch.promote_types(grad.dtype, u.dtype)
    to_u = to_v = None
    if needs_u or needs_v:
        wide_grad = grad.to(wide)
        if needs_u:
            to_u = (wide_grad @ v.to(wide) * ctx.alpha).to(u.dtype)
        if needs_v:
            to_v = (wide_grad.mT @ u.to(wide) * ctx.alpha).to(v.dtype)
    to_weight = grad if needs_weight and ctx.base_dtype is None else None
    to_base = grad.to(ctx.base_dtype) if needs_base else None
    return to_weight, to_u, to_v, to_base, None, None, None


_op = torch.library.custom_op("cl_fast::rank_update", _rank_update, mutates_args=())
_op.register_kernel("cpu")(_rank_update)
_op.register_kernel("cuda")(_rank_update)
_op.register_fake(_rank_update_fake)
_op.register_autograd(_backward, setup_context=_setup)

_op_in_place = torch.library.custom_op(
    "cl_fast::rank_update_", _rank_update_in_place, mutates_args=("weight",)
)
_op_in_place.register_kernel("cpu")(_rank_update_in_place)
_op_in_place.register_kernel("cuda")(_rank_update_in_place)
_op_in_place.register_fake(_rank_update_in_place_fake)

_op_many = torch.library.custom_op(
    "cl_fast::rank_update_many_", _rank_update_many, mutates_args=("weights",)
)
_op_many.register_kernel("cpu")(_rank_update_many)
_op_many.register_kernel("cuda")(_rank_update_many)
_op_many.register_fake(_rank_update_many_fake)


def _gram(k: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    c = _gram_fake(k, mask, dtype).zero_()
    _add_all_moments([c], [k], [mask], 1.0)
    return c


def _gram_fake(k: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    _check_moments([None], [k], [mask], 1.0, one=True)
    if dtype not in (torch.float64, torch.float32):
        raise TypeError(f"dtype must be float64 or float32; got {dtype}")
    if k.dtype == torch.float64 and dtype != torch.float64:
        raise TypeError(f"dtype must be float64 for float64 k; got {dtype}")
    shape = (*k.shape[:-2], k.shape[-1], k.shape[-1])
    return torch.empty(shape, dtype=dtype, device=k.device)


def _gram_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    k, mask, _ = inputs
    ctx.save_for_backward(k, mask)


def _gram_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    k, mask = ctx.saved_tensors
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    keys = k.to(wide)
    to_k = torch.matmul(keys, (grad + grad.mT).to(wide))
    if mask is not None:
        to_k = torch.where(mask.unsqueeze(-1), to_k, 0.0)
    return to_k.to(k.dtype), None, None


def _gram_many(
    cs: Sequence[Tensor],
    ks: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    alpha: float,
    one: bool,
) -> None:
    _check_moments(cs, ks, masks, alpha, one)
    _check_memory_of_moments(cs, ks, masks, one)
    _add_all_moments(cs, ks, masks, alpha)


def _check_memory_of_moments(
    cs: Sequence[Tensor], ks: Sequence[Tensor], masks: Sequence[Tensor | None], one: bool
) -> None:
    at = [""] if one else [f"[{i}]" for i in range(len(ks))]
    read = [(f"k{i}", k) for i, k in zip(at, ks, strict=True)]
    read += [(f"mask{i}", m) for i, m in zip(at, masks, strict=True) if m is not None]
    _check_overlaps([(f"c{i}", c) for i, c in zip(at, cs, strict=True)], read)


def _gram_many_fake(
    cs: Sequence[Tensor],
    ks: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    alpha: float,
    one: bool,
) -> None:
    _check_moments(cs, ks, masks, alpha, one)


_gram_op = torch.library.custom_op("cl_fast::gram", _gram, mutates_args=())
_gram_op.register_kernel("cpu")(_gram)
_gram_op.register_kernel("cuda")(_gram)
_gram_op.register_fake(_gram_fake)
_gram_op.register_autograd(_gram_backward, setup_context=_gram_setup)

_gram_op_many = torch.library.custom_op("cl_fast::gram_", _gram_many, mutates_args=("cs",))
_gram_op_many.register_kernel("cpu")(_gram_many)
_gram_op_many.register_kernel("cuda")(_gram_many)
_gram_op_many.register_fake(_gram_many_fake)


# What a caller sees.


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return value * 1.0


def _check_no_gradient(op: str, tensors: Iterable[tuple[str, Any]]) -> None:
    """An update in place is for inference: autograd would not see it."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, and {op} has none: use rank_update or gram, or call "
                "it under torch.no_grad()"
            )


def _lists(**arguments: Any) -> None:
    for name, items in arguments.items():
        if not isinstance(items, (list, tuple)):
            raise TypeError(f"{name} must be a list of tensors, got {type(items).__name__}")


def rank_update(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    base: Tensor | None = None,
    alpha: float = 1.0,
    rounding: Rounding = "nearest",
    seed: int = 0,
    backend: str | None = None,
) -> Tensor:
    """round(B + alpha u v^T), B being `base` if given, else `weight`. Differentiable.

    Product and sum are float32 (float64 for float64 tensors), rounded once.

    Args:
        weight: [..., m, n], bfloat16, float16, float32 or float64. With a `base` its values are
            not read; it says which shape and dtype the result has.
        u: [..., m, r], r from 0 to 4096; float64 if and only if `weight` is.
        v: [..., n, r], of the dtype of `u`.
        base: the untouched weight, of the shape of `weight`.
        alpha: a finite number, rounded to float32.
        rounding: "nearest" (ties to even), or "stochastic" for bfloat16 and float16 weights: up
            or down at random, so that the mean is the sum itself.
        seed: of the random bits; the module says how they are drawn.
        backend: "eager" or "triton", for tests and benchmarks, without gradient; otherwise the
            fastest there is.

    Returns:
        A new contiguous tensor of the shape and dtype of `weight`.

    Raises:
        TypeError: not a tensor, a dtype that is not supported, `seed` is not an int.
        ValueError: shapes, ranks or devices differ, unknown `rounding` or `backend`, `alpha` is
            not finite.
    """
    _check_seed(seed)
    alpha = _number("alpha", alpha)
    for name, tensor in (("weight", weight), ("u", u), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if base is not None and not isinstance(base, Tensor):
        raise TypeError(f"base must be a torch.Tensor, got {type(base).__name__}")
    if backend is None:
        return _op(weight, u, v, base, alpha, rounding, seed)
    _check_layer(weight, u, v, base, alpha, rounding)
    with torch.no_grad():
        return _updated(weight, u, v, base, alpha, rounding, seed, backend)


def rank_update_(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    base: Tensor | None = None,
    alpha: float = 1.0,
    rounding: Rounding = "nearest",
    seed: int = 0,
    backend: str | None = None,
) -> Tensor:
    """`rank_update` into `weight` itself, which is returned.

    With the untouched weight as `base`, edits do not add up their roundings, and rank 0 puts the
    weight back bit for bit. `base` may be `weight`; otherwise nothing may overlap it.

    Raises:
        ValueError: as `rank_update`; also where `weight` overlaps another argument in memory, or
            where an argument requires a gradient while gradients are recorded.
    """
    _check_seed(seed)
    alpha = _number("alpha", alpha)
    named = (("weight", weight), ("u", u), ("v", v), ("base", base))
    for name, tensor in named:
        if not isinstance(tensor, Tensor) and not (name == "base" and tensor is None):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    _check_no_gradient("rank_update_", named)
    if base is weight:
        base = None
    if backend is None:
        _op_in_place(weight, u, v, base, alpha, rounding, seed)
    else:
        _check_layer(weight, u, v, base, alpha, rounding)
        _update_in_place([weight], [u], [v], [base], [alpha], rounding, seed, backend, one=True)
    return weight


def rank_update_many_(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    bases: Sequence[Tensor | None] | None = None,
    alphas: float | Sequence[float] = 1.0,
    rounding: Rounding = "nearest",
    seed: int = 0,
    backend: str | None = None,
) -> None:
    """`rank_update_` for many layers, of any shapes and ranks, in one or a few launches.

    Args:
        weights, us, vs: one item per layer, all on one device.
        bases: one item per layer, None where the weight itself is the base; or None for all.
        alphas: one number, or one per layer.
        rounding, backend: as for `rank_update`.
        seed: layer i draws its random bits as `rank_update_` does with seed + i.

    Raises:
        TypeError, ValueError: as `rank_update_`, the argument named with its index, before any
            layer is written.
    """
    _lists(weights=weights, us=us, vs=vs)
    if bases is None:
        bases = [None] * len(weights)
    _lists(bases=bases)
    _check_seed(seed)
    if isinstance(alphas, (list, tuple)):
        numbers = [_number(f"alphas[{i}]", alpha) for i, alpha in enumerate(alphas)]
    else:
        numbers = [_number("alphas", alphas)] * len(weights)  # type: ignore[arg-type]
    for name, items in (("weights", weights), ("us", us), ("vs", vs), ("bases", bases)):
        for i, item in enumerate(items):
            if not isinstance(item, Tensor) and not (name == "bases" and item is None):
                raise TypeError(f"{name}[{i}] must be a torch.Tensor, got {type(item).__name__}")
        _check_no_gradient(
            "rank_update_many_", [(f"{name}[{i}]", item) for i, item in enumerate(items)]
        )
    own = [
        None if i < len(weights) and base is weights[i] else base for i, base in enumerate(bases)
    ]
    if backend is None:
        _op_many(weights, us, vs, own, numbers, rounding, seed)
        return
    _check_layers(weights, us, vs, own, numbers, rounding)
    _update_in_place(weights, us, vs, own, numbers, rounding, seed, backend)


def gram(
    k: Tensor | Sequence[Tensor],
    *,
    mask: Tensor | Sequence[Tensor | None] | None = None,
    dtype: torch.dtype = torch.float64,
    backend: str | None = None,
) -> Any:
    """K^T K over the tokens: the sum of the outer products of the keys, which are the rows of k.

    Args:
        k: [tokens, d] or [layers, tokens, d], bfloat16, float16, float32 or float64; or a list of
            such tensors, of any sizes.
        mask: bool [tokens] or [layers, tokens]; tokens that are False are skipped, whatever they
            hold. For a list: one mask for all, or a list of masks and None.
        dtype: of the result, float64 or float32.
        backend: "eager" or "triton", for tests and benchmarks, without gradient; otherwise the
            fastest there is.

    Returns:
        [d, d] or [layers, d, d], exactly symmetric; a list for a list. Differentiable, if k is
        one tensor.

    Raises:
        TypeError: not a tensor, a dtype that is not supported.
        ValueError: shapes or devices do not fit, unknown `backend`.
    """
    if isinstance(k, Tensor) and (mask is None or isinstance(mask, Tensor)):
        if backend is None:
            return _gram_op(k, mask, dtype)
        c = _gram_fake(k, mask, dtype).zero_()
        with torch.no_grad():
            _add_all_moments([c], [k], [mask], 1.0, backend)
        return c
    ks, masks = _moment_lists(k, mask)
    _check_moments([None] * len(ks), ks, masks, 1.0, one=False)
    cs = [_gram_fake(k, mask, dtype).zero_() for k, mask in zip(ks, masks, strict=True)]
    gram_(cs, ks, mask=masks, backend=backend)
    return cs


def gram_(
    c: Tensor | Sequence[Tensor],
    k: Tensor | Sequence[Tensor],
    *,
    mask: Tensor | Sequence[Tensor | None] | None = None,
    alpha: float = 1.0,
    backend: str | None = None,
) -> Any:
    """c += alpha K^T K, see `gram`; c is returned.

    Args:
        c: symmetric, [d, d] or [layers, d, d], float64 or float32; a list if k is a list. The
            part on and above the diagonal is read, the other becomes its mirror image.
        k, mask, backend: as for `gram`.
        alpha: a finite number; negative to take keys out again.

    Raises:
        TypeError, ValueError: as `gram`; also where c overlaps k or mask in memory, or where k
            requires a gradient while gradients are recorded.
    """
    alpha = _number("alpha", alpha)
    one = isinstance(k, Tensor)
    ks, masks = _moment_lists(k, mask)
    if one != isinstance(c, Tensor):
        raise TypeError(f"c must be a {'torch.Tensor' if one else 'list'} like k")
    cs = [c] if isinstance(c, Tensor) else list(c)
    for name, items in (("c", cs), ("k", ks)):
        for i, item in enumerate(items):
            at = "" if one else f"[{i}]"
            if not isinstance(item, Tensor):
                raise TypeError(f"{name}{at} must be a torch.Tensor, got {type(item).__name__}")
            _check_no_gradient("gram_", [(f"{name}{at}", item)])
    if backend is None:
        _gram_op_many(cs, ks, masks, alpha, one)
    else:
        _check_moments(cs, ks, masks, alpha, one)
        _check_memory_of_moments(cs, ks, masks, one)
        _add_all_moments(cs, ks, masks, alpha, backend)
    return c


def _moment_lists(k: Any, mask: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    """Keys and masks as lists of one length."""
    if isinstance(k, Tensor):
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
        return [k], [mask]
    if not isinstance(k, (list, tuple)):
        raise TypeError(f"k must be a torch.Tensor or a list of them, got {type(k).__name__}")
    ks = list(k)
    if mask is None or isinstance(mask, Tensor):
        return ks, [mask] * len(ks)
    if not isinstance(mask, (list, tuple)):
        raise TypeError(f"mask must be a torch.Tensor or a list, got {type(mask).__name__}")
    return ks, list(mask)
