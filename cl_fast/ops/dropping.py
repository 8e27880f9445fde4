"""DARE: drop elements of a delta at random and rescale the others.

    y_i = keep_i * x_i * r,     keep_i from the documented stream (cl_fast.ops.streams)

    rescale      r                                  as in
    keep_rate    1 / keep rate (exactly 2^32 / T)   the paper, PEFT
    l1           sum |x| / sum |x kept|             mergekit
    none         1

Yu et al., "Language Models are Super Mario", 2024. `density` is the fraction kept, the paper's
drop rate is 1 - density. Arithmetic is float32 (float64 for float64 input), rounded once.

The gradient of keep_rate and none is the same drop of the upstream gradient; that of l1 adds the
derivative of the factor:  dx_j = keep_j r g_j + sign(x_j) s / S_k (1 - keep_j S / S_k)  with
S = sum |x|, S_k = sum |x kept|, s = sum_i g_i keep_i x_i.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from cl_fast.backends import check_backend, device_ops, native_ops, native_or_say, require_native
from cl_fast.ops.magnitude import READABLE
from cl_fast.ops.policy import Policy, Rescale
from cl_fast.ops.streams import keep_threshold, stream_key

__all__ = ["absolute_sum", "dare", "keep_mask", "signed_key"]

_RESCALE = ("none", "keep_rate", "l1")
_MASK32 = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_BLOCK = 1 << 22  # elements whose masks are drawn at once: bounds the int64 temporaries

L1_CHUNK, L1_LANES = 1 << 16, 16
L1_SMALLEST = 1e-7
"""Sums below this are taken for zero: no rescaling."""


def signed_key(key: int) -> int:
    """A 64-bit key as the int64 that a torch schema can carry."""
    return key - (1 << 64) if key >= 1 << 63 else key


def keep_mask(key: int, n: int, threshold: int, *, start: int = 0, device: Any = None) -> Tensor:
    """Which of the elements start .. start + n - 1 of a stream are kept; bool, on any device.

    Equal to `cl_fast.ops.streams.keep_mask`, drawn in int64 arithmetic, many elements at once.
    """
    keep = torch.empty(n, dtype=torch.bool, device=device)
    if threshold <= 0 or threshold >= 1 << 32:
        return keep.fill_(threshold > 0)
    for first in range(0, n, _BLOCK):
        count = min(_BLOCK, n - first)
        keep[first : first + count] = _keep_block(key, start + first, count, threshold, device)
    return keep


def _keep_block(key: int, start: int, n: int, threshold: int, device: Any) -> Tensor:
    first_group = start >> 4
    groups = torch.arange(first_group, (start + n + 15) >> 4, dtype=torch.int64, device=device)
    leading = _level_bytes(groups, 0, key).reshape(-1)[start & 15 :][:n]
    keep = leading < threshold >> 24
    if threshold & 0xFFFFFF == 0:
        return keep
    # Only elements whose first byte equals the threshold's (1 in 256) need the other three.
    undecided = (leading == threshold >> 24).nonzero().reshape(-1)
    index = undecided + start
    rest = torch.zeros_like(index)
    for level in (1, 2, 3):
        drawn = _level_bytes(index >> 4, level, key)
        rest = rest << 8 | drawn.gather(1, (index & 15).unsqueeze(1)).squeeze(1)
    keep[undecided] = rest < threshold & 0xFFFFFF
    return keep


def below_thresholds(key: int, thresholds: Tensor, *, start: int = 0) -> Tensor:
    """Which of the elements start, start + 1, ... of a stream have a draw below their threshold.

    Args:
        key: the stream's key.
        thresholds: flat int64, one per element, in [0, 2^32].
    """
    keep = torch.empty(thresholds.shape, dtype=torch.bool, device=thresholds.device)
    for first in range(0, thresholds.numel(), _BLOCK):
        part = thresholds[first : first + _BLOCK]
        at = start + first
        groups = torch.arange(
            at >> 4, (at + part.numel() + 15) >> 4, dtype=torch.int64, device=part.device
        )
        draws = torch.zeros(groups.numel() * 16, dtype=torch.int64, device=part.device)
        for level in range(4):
            draws = draws << 8 | _level_bytes(groups, level, key).reshape(-1)
        keep[first : first + _BLOCK] = draws[at & 15 :][: part.numel()] < part
    return keep


def _level_bytes(groups: Tensor, level: int, key: int) -> Tensor:
    """The 16 bytes of one level for each group: uint8 [groups, 16]."""
    c0, c1 = groups & _MASK32, groups >> 32
    c2, c3 = torch.full_like(groups, level), torch.zeros_like(groups)
    k0, k1 = key & _MASK32, (key >> 32) & _MASK32
    for _ in range(10):
        # The 64-bit products wrap into the sign bit; the masks read them as unsigned.
        product0, product1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            (product1 >> 32 & _MASK32) ^ c1 ^ k0,
            product1 & _MASK32,
            (product0 >> 32 & _MASK32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
    # int32 keeps the low 32 bits; bytes of a word are read from the low end.
    return torch.stack((c0, c1, c2, c3), dim=1).to(torch.int32).view(torch.uint8)


def absolute_sum(values: Tensor) -> float:
    """sum |values| in float64 in the one order that every backend follows.

    Chunks of 65536 elements by flat index; in a chunk 16 lanes (index mod 16), each summed in
    order; the lanes of a chunk are added in order, then the chunks in order.
    """
    flat = values.reshape(-1).abs().double()
    total = 0.0
    block = 64 * L1_CHUNK
    for first in range(0, flat.numel(), block):
        part = flat[first : first + block]
        rows = -(-min(part.numel(), L1_CHUNK) // L1_LANES)
        width = rows * L1_LANES  # of the only chunk, or a whole chunk
        chunks = -(-part.numel() // width)
        padded = torch.nn.functional.pad(part, (0, chunks * width - part.numel()))
        by_row = padded.view(chunks, rows, L1_LANES).transpose(0, 1).contiguous()
        lanes = torch.zeros_like(by_row[0])
        for row in by_row:
            lanes = lanes + row
        chunk_sums = torch.zeros_like(lanes[:, 0])
        for lane in lanes.unbind(1):
            chunk_sums = chunk_sums + lane
        for chunk in chunk_sums.tolist():
            total += chunk
    return total


def l1_factor(total: float, kept: float) -> float:
    """sum |d| / sum |d kept|; 1 where one of them is as good as zero."""
    return 1.0 if total < L1_SMALLEST or kept < L1_SMALLEST else total / kept


def drop_factor(rescale: str, threshold: int, values: Tensor, kept: Tensor) -> float:
    """The factor r of a drop with keep threshold `threshold`."""
    if rescale == "keep_rate" and threshold > 0:
        return 2.0**32 / threshold
    if rescale == "l1":
        return l1_factor(absolute_sum(values), absolute_sum(kept))
    return 1.0


def round_float32(value: float) -> float:
    """`value` rounded to the nearest float32, as a Python float."""
    return float(torch.tensor(value, dtype=torch.float64).to(torch.float32))


@dataclass(frozen=True, slots=True)
class _Drop:
    """The arguments of the op after its tensor."""

    density: float
    seed: int
    model: str
    tensor: str
    rescale: str

    def check(self, delta: Tensor) -> None:
        if delta.dtype not in READABLE[:3] and delta.dtype != torch.float64:
            raise TypeError(
                "delta must have one of the dtypes bfloat16, float16, float32, float64; "
                f"got {delta.dtype}"
            )
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density must be in (0, 1]; got {self.density}")
        if self.rescale not in _RESCALE:
            raise ValueError(
                f"rescale must be one of 'none', 'keep_rate', 'l1'; got {self.rescale!r}"
            )

    @property
    def key(self) -> int:
        return stream_key(self.seed, self.model, self.tensor)

    def eager(self, delta: Tensor) -> Tensor:
        """The op in plain torch, on any device."""
        if self.density >= 1.0:
            return delta.clone(memory_format=torch.contiguous_format)
        wide = delta.dtype if delta.dtype == torch.float64 else torch.float32
        values = delta.reshape(-1).to(wide)
        threshold = keep_threshold(self.density)
        keep = keep_mask(self.key, values.numel(), threshold, device=delta.device)
        kept = torch.where(keep, values, 0.0)
        factor = drop_factor(self.rescale, threshold, values, kept)
        if wide == torch.float32:
            factor = round_float32(factor)
        return (kept * factor).to(delta.dtype).reshape(delta.shape)

    def device(self, delta: Tensor, by: device_ops.Engine | None) -> Tensor:
        """One term of a combine without a base; float64 is for the eager reference."""
        if by is None or delta.dtype == torch.float64:
            return self.eager(delta)
        from cl_fast.ops.combining import Call

        call = Call(
            bases=[],
            tensors=[delta],
            models=1,
            weights=[1.0],
            densities=[self.density],
            gammas=[0.0],
            epsilons=[0.0],
            keys=[self.key],
            thresholds=[-1],
            policy=Policy(difference=False, sparsify="drop", rescale=self.rescale),  # type: ignore[arg-type]
            lam=1.0,
            out_dtype=None,
        )
        return device_ops.combine(call, by)[0]

    def native(self, core: ModuleType, delta: Tensor) -> Tensor:
        threshold = keep_threshold(self.density)
        return native_ops.dare(core, delta, self.key, self.density, threshold, self.rescale)


def _generic(
    delta: Tensor, density: float, seed: int, model: str, tensor: str, rescale: str
) -> Tensor:
    drop = _Drop(density, seed, model, tensor, rescale)
    drop.check(delta)
    return drop.eager(delta)


def _cpu(delta: Tensor, density: float, seed: int, model: str, tensor: str, rescale: str) -> Tensor:
    drop = _Drop(density, seed, model, tensor, rescale)
    drop.check(delta)
    core = native_or_say()
    if core is not None and native_ops.reads(delta):
        return drop.native(core, delta)
    return drop.eager(delta)


def _cuda(
    delta: Tensor, density: float, seed: int, model: str, tensor: str, rescale: str
) -> Tensor:
    drop = _Drop(density, seed, model, tensor, rescale)
    drop.check(delta)
    return drop.device(delta, device_ops.engine(delta.device))


def _fake(
    delta: Tensor, density: float, seed: int, model: str, tensor: str, rescale: str
) -> Tensor:
    _Drop(density, seed, model, tensor, rescale).check(delta)
    return torch.empty(delta.shape, dtype=delta.dtype, device=delta.device)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    delta, *ctx.arguments = inputs
    density, rescale = ctx.arguments[0], ctx.arguments[-1]
    ctx.factor_moves = rescale == "l1" and density < 1.0
    ctx.save_for_backward(*([delta] if ctx.factor_moves else []))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 5
    if not ctx.factor_moves:
        return _op(grad, *ctx.arguments), *nothing
    (delta,) = ctx.saved_tensors
    wide = delta.dtype if delta.dtype == torch.float64 else torch.float32
    x, g = delta.to(wide), grad.to(wide)
    keep = _op(torch.ones_like(x), *ctx.arguments[:-1], "none")
    total, kept = x.abs().sum(), (x.abs() * keep).sum()
    rescaled = (total >= L1_SMALLEST) & (kept >= L1_SMALLEST)
    safe = torch.where(rescaled, kept, 1.0)
    factor = torch.where(rescaled, total / safe, 1.0)
    pull = torch.where(rescaled, (g * keep * x).sum() / safe, 0.0)
    out = keep * factor * g + x.sign() * pull * (1.0 - keep * factor)
    return out.to(delta.dtype), *nothing


_op = torch.library.custom_op("cl_fast::dare", _generic, mutates_args=())
_op.register_kernel("cpu")(_cpu)
_op.register_kernel("cuda")(_cuda)
_op.register_fake(_fake)
_op.register_autograd(_backward, setup_context=_setup)


def dare(
    delta: Tensor,
    *,
    density: float | None = None,
    drop_rate: float | None = None,
    seed: int = 0,
    model: str = "",
    tensor: str = "",
    rescale: Rescale = "keep_rate",
    backend: str | None = None,
) -> Tensor:
    """Drop elements of `delta` at random and rescale the others. Differentiable.

    The mask depends on `seed`, `model`, `tensor` and the element's index only; give every tensor
    of a model its own name, or they share one mask.

    Args:
        delta: any shape; bfloat16, float16, float32 or float64.
        density: the fraction to keep, in (0, 1]; 1 leaves `delta` as it is.
        drop_rate: the fraction to drop, in [0, 1), instead of `density`.
        seed, model, tensor: name the random stream.
        rescale: factor on what is kept: "keep_rate", "l1" or "none".
        backend: "eager", "native", "triton" or "cuda", for tests and benchmarks; otherwise the
            fastest there is.

    Returns:
        A new contiguous tensor of the shape and dtype of `delta`.

    Raises:
        TypeError: a dtype that is not readable; `seed` is not an int.
        ValueError: `density` or `drop_rate` out of range, unknown `rescale` or `backend`.

    Source: Yu et al. 2024, arXiv 2311.03099.
    """
    if not isinstance(delta, Tensor):
        raise TypeError(f"delta must be a torch.Tensor, got {type(delta).__name__}")
    if (density is None) == (drop_rate is None):
        raise ValueError("give exactly one of density and drop_rate")
    for argument, number in (("density", density), ("drop_rate", drop_rate)):
        if number is not None and (isinstance(number, (bool, str)) or not hasattr(number, "real")):
            raise TypeError(f"{argument} must be a number, got {type(number).__name__}")
    if drop_rate is not None:
        if not 0.0 <= drop_rate < 1.0:
            raise ValueError(f"drop_rate must be in [0, 1); got {drop_rate}")
        density = 1.0 - drop_rate
    assert density is not None
    for argument, name in (("model", model), ("tensor", tensor)):
        if not isinstance(name, str):
            raise TypeError(f"{argument} must be a str, got {type(name).__name__}")
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")
    if backend is None:
        return cast(Tensor, _op(delta, density, seed, model, tensor, rescale))
    drop = _Drop(density, seed, model, tensor, rescale)
    drop.check(delta)
    check_backend(backend, delta.device.type)
    if backend == "eager":
        return drop.eager(delta)
    if backend == "native":
        return drop.native(require_native(backend, "cpu"), delta)
    return drop.device(delta, device_ops.require(backend, delta.device))
