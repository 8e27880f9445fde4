"""Several low-rank adapters behind one gate, as two matrix products (LoRAMoE).

    [H, g] = x [A; G]^T         A [n r, d_in]: the rows of expert 1, of expert 2, ...; G [n, d_in]
    p      = softmax(g)         over the n experts, in float32
    Z      = s p_i H_i          H_i [T, r], the columns of expert i
    y      = base + Z B^T       B [d_out, n r]

    This is sum_i p_i s B_i A_i x: a dense mixture of n LoRAs is one LoRA of rank n r whose columns
    are scaled per token. No expert makes an output of its own.

    backward, from dy and dp' (what comes back for p):
    dZ     = dy B               dB = dy^T Z, with Z made again
    dH_i   = s p_i dZ_i         dp_i = s <dZ_i, H_i> + dp'_i
    dg_i   = p_i (dp_i - sum_j p_j dp_j)
    dx     = [dH, dg] [A; G]    d[A; G] = [dH, dg]^T x       dbase = dy

Kept for the backward pass are x, which the base layer has as its input anyway, H and p: n r + n
numbers per token. The loop over experts keeps d_out numbers per token and expert.

With `kept`, a mask over x, the experts see x o kept and the gate sees x: one mask for all experts.

Source: Dou et al. 2024, LoRAMoE (arXiv 2312.09979).
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["gated_low_rank"]

_READABLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _check(
    x: Tensor, down: Tensor, gate: Tensor, up: Tensor, base: Tensor | None, kept: Tensor | None
) -> None:
    for name, tensor in (("x", x), ("down", down), ("gate", gate), ("up", up)):
        if tensor.dtype not in _READABLE:
            raise TypeError(
                f"{name} must have one of the dtypes bfloat16, float16, float32, float64; "
                f"got {tensor.dtype}"
            )
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}; got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}; got {tensor.device}")
        if name != "x" and tensor.dim() != 2:
            raise ValueError(f"{name} must be a matrix; got the shape {tuple(tensor.shape)}")
    if x.dim() < 1:
        raise ValueError("x must have the shape [..., d_in]; got a number")
    width, rows, experts = x.size(-1), down.size(0), gate.size(0)
    for name, tensor in (("down", down), ("gate", gate)):
        if tensor.size(1) != width:
            raise ValueError(
                f"{name} must have {width} columns, the last dimension of x; got {tensor.size(1)}"
            )
    if experts < 1 or rows % experts:
        raise ValueError(
            f"down must have the same number of rows for each of the {experts} experts of gate; "
            f"got {rows} rows"
        )
    if up.size(1) != rows:
        raise ValueError(f"up must have {rows} columns, the rows of down; got {up.size(1)}")
    if base is not None:
        wanted = (*x.shape[:-1], up.size(0))
        if base.shape != wanted:
            raise ValueError(f"base must have the shape {wanted}; got {tuple(base.shape)}")
        if base.dtype != x.dtype:
            raise TypeError(f"base must have the dtype of x, {x.dtype}; got {base.dtype}")
        if base.device != x.device:
            raise ValueError(f"base must be on the device of x, {x.device}; got {base.device}")
    if kept is not None:
        if kept.dtype != torch.bool or kept.shape != x.shape:
            raise ValueError(
                f"kept must be a mask of bool with the shape of x, {tuple(x.shape)}; got "
                f"{kept.dtype} {tuple(kept.shape)}"
            )
        if kept.device != x.device:
            raise ValueError(f"kept must be on the device of x, {x.device}; got {kept.device}")


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the softmax and of what is scaled by it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The products keep their dtype; entering the region costs time, so only where it is needed."""
    region: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if torch.is_autocast_enabled(device.type):
        region = torch.autocast(device.type, enabled=False)
    return region


def _by_expert(x: Tensor, experts: int) -> Tensor:
    """[T, n r] as [T, n, r]."""
    return x.reshape(x.size(0), experts, x.size(1) // experts)


def _gated(inner: Tensor, p: Tensor, scale: float) -> Tensor:
    """Z, rounded once to the dtype of H."""
    z = _by_expert(inner.to(p.dtype), p.size(1)) * (p * scale).unsqueeze(2)
    return z.view(inner.shape).to(inner.dtype)


def _rows(x: Tensor) -> Tensor:
    """[..., k] as [T, k], also where k is 0."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.size(-1))


def _forward(
    x: Tensor,
    down: Tensor,
    gate: Tensor,
    up: Tensor,
    scale: float,
    base: Tensor | None,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [..., d_out], p [..., n], H [T, n r]. Two products on any device: they are the work."""
    _check(x, down, gate, up, base, kept)
    shape = x.shape[:-1]
    with _without_autocast(x.device):
        rows = _rows(x)
        if kept is None:
            # The weights are small beside x: joining them is cheaper than reading x twice.
            both = torch.mm(rows, torch.cat([down, gate]).t())
            inner, logits = both.split([down.size(0), gate.size(0)], 1)
            inner = inner.contiguous()
        else:
            inner = torch.mm(rows * _rows(kept), down.t())
            logits = torch.mm(rows, gate.t())
        p = torch.softmax(logits, 1, dtype=_wide(x.dtype))
        z = _gated(inner, p, scale)
        if base is None:
            y = torch.mm(z, up.t())
        else:
            y = torch.addmm(_rows(base), z, up.t())
    return y.view(*shape, up.size(0)), p.view(*shape, gate.size(0)), inner


def _fake(
    x: Tensor,
    down: Tensor,
    gate: Tensor,
    up: Tensor,
    scale: float,
    base: Tensor | None,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, down, gate, up, base, kept)
    shape = x.shape[:-1]
    return (
        x.new_empty((*shape, up.size(0))),
        x.new_empty((*shape, gate.size(0)), dtype=_wide(x.dtype)),
        x.new_empty((math.prod(shape), down.size(0))),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, down, gate, up, ctx.scale, _, kept = inputs
    _, p, inner = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, down, gate, up, kept, p, inner)


def _backward(
    ctx: Any, to_y: Tensor | None, to_p: Tensor | None, to_inner: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Plain torch, out of place, so that it can be differentiated and traced itself."""
    x, down, gate, up, kept, p, inner = ctx.saved_tensors
    needs_x, needs_down, needs_gate, needs_up, _, needs_base, _ = ctx.needs_input_grad
    if to_y is None and to_p is None and to_inner is None:
        return (None,) * 7
    n, dtype, wide = gate.size(0), x.dtype, p.dtype
    rows, p = _rows(x), _rows(p)
    inner_wide = _by_expert(inner.to(wide), n)
    with _without_autocast(x.device):
        dup = None
        d_inner = torch.zeros_like(inner) if to_inner is None and to_y is None else to_inner
        dp = None if to_p is None else _rows(to_p)
        if to_y is not None:
            dy = _rows(to_y)
            if needs_up:
                # This way around the long dimension is the inner one of a row-major product.
                dup = torch.mm(_gated(inner, p, ctx.scale).t(), dy).t().contiguous()
            dz = _by_expert(torch.mm(dy, up).to(wide), n)
            mine = (dz * inner_wide).sum(2) * ctx.scale
            dp = mine if dp is None else dp + mine
            from_y = (dz * (p * ctx.scale).unsqueeze(2)).view(inner.shape).to(dtype)
            d_inner = from_y if d_inner is None else d_inner + from_y
        assert d_inner is not None
        if dp is None:
            dlogits = torch.zeros_like(p, dtype=dtype)
        else:
            dlogits = (p * (dp - (p * dp).sum(1, keepdim=True))).to(dtype)
        dx = ddown = dgate = None
        if kept is None:
            both = torch.cat([d_inner, dlogits], 1)
            if needs_x:
                dx = torch.mm(both, torch.cat([down, gate])).view(x.shape)
            if needs_down or needs_gate:
                ddown, dgate = torch.mm(both.t(), rows).split([down.size(0), n])
        else:
            mask = _rows(kept)
            if needs_x:
                seen = torch.mm(d_inner, down) * mask
                dx = torch.addmm(seen, dlogits, gate).view(x.shape)
            if needs_down:
                ddown = torch.mm(d_inner.t(), rows * mask)
            if needs_gate:
                dgate = torch.mm(dlogits.t(), rows)
    return (
        dx,
        ddown if needs_down else None,
        dgate if needs_gate else None,
        dup,
        None,
        to_y if needs_base else None,
        None,
    )


_op = torch.library.custom_op("cl_fast::gated_low_rank", _forward, mutates_args=())
_op.register_fake(_fake)
_op.register_autograd(_backward, setup_context=_setup)


def gated_low_rank(
    x: Tensor,
    down: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    scale: float = 1.0,
    base: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What n low-rank adapters behind a softmax gate add to a layer's output, and the gate.

    Differentiable in all tensors but `kept`, any number of times. Under autocast x and the weights
    are cast as for a matrix product. The products are in the dtype of x, to which the weights are
    cast (a gradient has the dtype of its weight); softmax and scaling are float32, or float64 for
    float64.

    Args:
        x: [..., d_in], the input of the layer; bfloat16, float16, float32 or float64.
        down: A, [n r, d_in], the rows of one expert after those of another.
        gate: G, [n, d_in].
        up: B, [d_out, n r].
        scale: s; with `kept` multiply it by 1 / (1 - dropout).
        base: [..., d_out], the output of the layer without experts, to which theirs is added.
        kept: of bool, like x: False where dropout hides a number of x from the experts. The gate
            sees all of x.

    Returns:
        y: [..., d_out], of the dtype of `base`, or of x where there is none.
        p: [..., n], the gate's probabilities; float32 (float64 for float64).

    Raises:
        TypeError: not a tensor, or a dtype that is not readable.
        ValueError: shapes or devices that do not fit; rows of `down` that cannot be shared out
            evenly among the experts; `kept` is not a mask of bool.

    Source: Dou et al. 2024, arXiv 2312.09979.
    """
    given: dict[str, Any] = {"x": x, "down": down, "gate": gate, "up": up}
    for name, tensor in (*given.items(), ("base", base), ("kept", kept)):
        if not isinstance(tensor, Tensor) and not (tensor is None and name in ("base", "kept")):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if name != "kept" and tensor is not None and tensor.dtype not in _READABLE:
            raise TypeError(
                f"{name} must have one of the dtypes bfloat16, float16, float32, float64; "
                f"got {tensor.dtype}"
            )
    kind = x.device.type
    dtype = x.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    parts = [t if t.dtype == dtype else t.to(dtype) for t in (x, down, gate, up)]
    if base is None or base.dtype == dtype:
        y, p, _ = _op(*parts, float(scale), base, kept)
        return y, p
    y, p, _ = _op(*parts, float(scale), None, kept)
    if base.shape != y.shape:
        raise ValueError(f"base must have the shape {tuple(y.shape)}; got {tuple(base.shape)}")
    return cast(Tensor, base + y.to(base.dtype)), p
