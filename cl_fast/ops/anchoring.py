"""The pull to an anchor: EWC and L2-SP without a tensor of the model's size.

    penalty(theta) = lam/2 sum F (theta - theta*)^2

    anchor_gradient_:  grad  += lam F (theta - theta*)
    anchor_pull_:      theta -= min(a F, 1) (theta - theta*)      a = lr lam, decoupled

F is the diagonal of the Fisher information (EWC, Kirkpatrick et al. 2017, arXiv 1612.00796) or 1
(L2-SP, Li et al. 2018, arXiv 1802.01483). The decoupled pull stands beside the optimizer's step as
AdamW's weight decay does. A step of a F > 1 would throw a weight over its anchor, and of a F > 2
further away with each step; it is cut to 1, where the weight lands on its anchor.

Differences and products are float32 whatever the dtypes (float64 where a tensor is float64), with
one rounding on the store. The reference walks over tiles that stay in the cache, with up to three
buffers of a tile: TILE numbers on the CPU, DEVICE_TILE on other devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from cl_fast.backends import check_backend, triton

__all__ = ["DEVICE_TILE", "TILE", "anchor_gradient_", "anchor_penalty", "anchor_pull_"]

TILE = 1 << 16
"""Numbers in a tile on the CPU: buffers of 256 KiB stay in the second-level cache."""
DEVICE_TILE = 1 << 22
"""Numbers in a tile elsewhere, where a launch costs more than memory does."""

_READABLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


# --- checks ------------------------------------------------------------------------------------


def _check(
    written: str,
    lists: dict[str, Sequence[Tensor]],
    strengths: Sequence[float],
    strength: str,
    backend: str | None,
) -> None:
    """Raise unless the tensors of the lists fit one another; nothing has been written yet."""
    first = lists[written]
    if not first:
        raise ValueError(f"{written} must hold at least one tensor; got none")
    device = first[0].device
    for name, tensors in lists.items():
        if name == "fisher" and not tensors:
            continue
        if len(tensors) != len(first):
            raise ValueError(
                f"{name} must hold one tensor for each of the {len(first)} of {written}; got "
                f"{len(tensors)}"
            )
        for i, (x, like) in enumerate(zip(tensors, first, strict=True)):
            if x.dtype not in _READABLE:
                raise TypeError(
                    f"{name}[{i}] must have one of the dtypes bfloat16, float16, float32, "
                    f"float64; got {x.dtype}"
                )
            if x.shape != like.shape:
                raise ValueError(
                    f"{name}[{i}] must have the shape of {written}[{i}], {tuple(like.shape)}; got "
                    f"{tuple(x.shape)}"
                )
            if x.device != device:
                raise ValueError(
                    f"{name}[{i}] must be on the device of {written}[0], {device}; got {x.device}"
                )
    if len(strengths) != len(first):
        raise ValueError(
            f"{strength} must be one number, or one for each of the {len(first)} of {written}; got "
            f"{len(strengths)}"
        )
    for value in strengths:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{strength} must be 0 or more, and finite; got {value}")
    if backend is not None:
        check_backend(backend, device.type, ("eager", "triton"))
        if backend == "triton" and any(
            x.dtype == torch.float64 for tensors in lists.values() for x in tensors
        ):
            raise ValueError("backend='triton' computes in float32; got float64 tensors")


def _check_memory(written: str, lists: dict[str, Sequence[Tensor]]) -> None:
    """Raise where a tensor is its own anchor, or what is written is read elsewhere."""
    for i, x in enumerate(lists[written]):
        if x.numel() and torch._debug_has_internal_overlap(x) == 1:
            raise ValueError(
                f"{written}[{i}] must not overlap itself to be written in place (an expanded "
                "tensor?); give a copy of it"
            )
    names = list(lists)
    for i, entry in enumerate(zip(*(lists[n] for n in names if lists[n]), strict=True)):
        seen: dict[int, str] = {}
        for name, x in zip((n for n in names if lists[n]), entry, strict=True):
            other = seen.setdefault(x.data_ptr(), name) if x.numel() else name
            if other != name:
                raise ValueError(
                    f"{name}[{i}] must not be the memory of {other}[{i}]; give a copy of it "
                    "(.detach().clone())"
                )


# --- the reference -----------------------------------------------------------------------------


class _Buffers:
    """Up to three buffers of a tile for each dtype of sums, made when first asked for."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.made: dict[tuple[torch.dtype, int], Tensor] = {}

    def get(self, number: int, like: Tensor, wide: torch.dtype) -> Tensor:
        key = (wide, number)
        if key not in self.made:
            self.made[key] = torch.empty(self.size, dtype=wide, device=self.device)
        return self.made[key][: like.numel()].view(like.shape)


def _tiles(tensors: Sequence[Tensor], size: int) -> Iterator[tuple[Tensor, ...]]:
    """Views of at most `size` numbers each, at the same places of all tensors."""
    shape = tensors[0].shape
    if all(x.is_contiguous() for x in tensors):
        yield from zip(*(x.view(-1).split(size) for x in tensors), strict=True)
    elif tensors[0].numel() <= size:
        yield tuple(tensors)
    else:
        row = math.prod(shape[1:])
        if row > size:
            for rows in zip(*(x.unbind() for x in tensors), strict=True):
                yield from _tiles(rows, size)
        else:
            yield from zip(*(x.split(size // row) for x in tensors), strict=True)


def _walk(
    lists: Sequence[Sequence[Tensor]], strengths: Sequence[float]
) -> Iterator[tuple[tuple[Tensor, ...], Tensor | None, float, torch.dtype, _Buffers]]:
    """Tile by tile: the tensors, F or None, the strength, the dtype of sums, the buffers."""
    *dense, fisher = lists
    first = dense[0]
    size = TILE if first[0].device.type == "cpu" else DEVICE_TILE
    buffers = _Buffers(min(size, max(x.numel() for x in first)), first[0].device)
    for i, strength in enumerate(strengths):
        entry = [tensors[i] for tensors in dense] + ([fisher[i]] if fisher else [])
        if not entry[0].numel():
            continue
        wide = torch.float64 if any(x.dtype == torch.float64 for x in entry) else torch.float32
        for tile in _tiles(entry, size):
            f = tile[-1] if fisher else None
            yield tile[: len(dense)], f, strength, wide, buffers


def _gradient_eager(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fisher: Sequence[Tensor],
    strengths: Sequence[float],
) -> None:
    for (g, w, a), f, lam, wide, buffers in _walk((grads, weights, anchors, fisher), strengths):
        d = buffers.get(0, w, wide)
        same = all(x is None or x.dtype == wide for x in (g, w, a, f))
        if same:
            torch.sub(w, a, out=d)
            if f is None:
                g.add_(d, alpha=lam)
            else:
                g.addcmul_(d, f, value=lam)
            continue
        e = buffers.get(1, w, wide)
        d.copy_(w).sub_(e.copy_(a))
        if f is not None:
            d.mul_(e.copy_(f))
        g.copy_(e.copy_(g).add_(d, alpha=lam))


def _pull_eager(
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fisher: Sequence[Tensor],
    strengths: Sequence[float],
) -> None:
    for (w, a), f, amount, wide, buffers in _walk((weights, anchors, fisher), strengths):
        same = w.dtype == a.dtype == wide
        target = w if same else buffers.get(0, w, wide).copy_(w)
        end = a if same else buffers.get(1, w, wide).copy_(a)
        if f is None:
            target.lerp_(end, min(amount, 1.0))
        else:
            part = buffers.get(2, w, wide).copy_(f).mul_(amount).clamp_(max=1.0)
            target.lerp_(end, part)
        if not same:
            w.copy_(target)


def _kernels(backend: str, *lists: Sequence[Tensor]) -> Any:
    """The module of the Triton kernels where they are to run, else None."""
    if backend != "triton" or any(x.dtype == torch.float64 for xs in lists for x in xs):
        return None
    return triton.load("anchoring")


def _by_layout(strengths: Sequence[float], *lists: Sequence[Tensor]) -> tuple[list[Any], list[Any]]:
    """The arguments, of the entries whose tensors are all contiguous, and of the others."""
    flat = [all(xs[i].is_contiguous() for xs in lists if xs) for i in range(len(strengths))]
    parts: tuple[list[Any], list[Any]] = ([], [])
    for part, wanted in zip(parts, (True, False), strict=True):
        for xs in (*lists, strengths):
            part.append(
                [x for x, is_flat in zip(xs, flat, strict=True) if is_flat == wanted] if xs else []
            )
    return parts


# --- the ops -----------------------------------------------------------------------------------


def _gradient(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fisher: Sequence[Tensor],
    strengths: Sequence[float],
    backend: str | None,
    default: str,
) -> None:
    lists = {"grads": grads, "weights": weights, "anchors": anchors, "fisher": fisher}
    _check("grads", lists, strengths, "strength", backend)
    _check_memory("grads", lists)
    kernels = _kernels(backend or default, *lists.values())
    if kernels is None:
        _gradient_eager(grads, weights, anchors, fisher, strengths)
        return
    dense, strided = _by_layout(strengths, *lists.values())
    if dense[0]:
        kernels.gradient(*dense)
    if strided[0]:
        _gradient_eager(*strided)


def _gradient_generic(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fisher: Sequence[Tensor],
    strengths: Sequence[float],
    backend: str | None,
) -> None:
    _gradient(grads, weights, anchors, fisher, strengths, backend, "eager")


def _gradient_cuda(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fisher: Sequence[Tensor],
    strengths: Sequence[float],
    backend: str | None,
) -> None:
    _gradient(grads, weights, anchors, fisher, strengths, backend, "triton")


def _gradient_fake(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fisher: Sequence[Tensor],
    strengths: Sequence[float],
    backend: str | None,
) -> None:
    lists = {"grads": grads, "weights": weights, "anchors": anchors, "fisher": fisher}
    _check("grads", lists, strengths, "strength", backend)


def _pull(
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fisher: Sequence[Tensor],
    strengths: Sequence[float],
    backend: str | None,
    default: str,
) -> None:
    lists = {"weights": weights, "anchors": anchors, "fisher": fisher}
    _check("weights", lists, strengths, "amount", backend)
    _check_memory("weights", lists)
    kernels = _kernels(backend or default, *lists.values())
    if kernels is None:
        _pull_eager(weights, anchors, fisher, strengths)
        return
    dense, strided = _by_layout(strengths, *lists.values())
    if dense[0]:
        kernels.pull(*dense)
    if strided[0]:
        _pull_eager(*strided)


def _pull_generic(
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fisher: Sequence[Tensor],
    strengths: Sequence[float],
    backend: str | None,
) -> None:
    _pull(weights, anchors, fisher, strengths, backend, "eager")


def _pull_cuda(
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fisher: Sequence[Tensor],
    strengths: Sequence[float],
    backend: str | None,
) -> None:
    _pull(weights, anchors, fisher, strengths, backend, "triton")


def _pull_fake(
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fisher: Sequence[Tensor],
    strengths: Sequence[float],
    backend: str | None,
) -> None:
    lists = {"weights": weights, "anchors": anchors, "fisher": fisher}
    _check("weights", lists, strengths, "amount", backend)


_gradient_op = torch.library.custom_op(
    "cl_fast::anchor_gradient_", _gradient_generic, mutates_args=("grads",)
)
_gradient_op.register_kernel("cuda")(_gradient_cuda)
_gradient_op.register_fake(_gradient_fake)

_pull_op = torch.library.custom_op(
    "cl_fast::anchor_pull_", _pull_generic, mutates_args=("weights",)
)
_pull_op.register_kernel("cuda")(_pull_cuda)
_pull_op.register_fake(_pull_fake)


def _listed(what: str, given: Any) -> list[Tensor]:
    if not isinstance(given, list | tuple):
        raise TypeError(f"{what} must be a list or tuple of tensors, got {type(given).__name__}")
    for i, x in enumerate(given):
        if not isinstance(x, Tensor):
            raise TypeError(f"{what}[{i}] must be a torch.Tensor, got {type(x).__name__}")
    return list(given)


def _numbers(what: str, given: float | Sequence[float], count: int) -> list[float]:
    if isinstance(given, list | tuple):
        return [float(x) for x in given]
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise TypeError(f"{what} must be a number, or a list of them; got {type(given).__name__}")
    return [float(given)] * count


def _not_recorded(what: str, tensors: Sequence[Tensor]) -> None:
    for i, x in enumerate(tensors):
        if x.requires_grad and not x.is_leaf and torch.is_grad_enabled():
            raise ValueError(
                f"{what}[{i}] was computed by autograd and cannot be written in place; give leaves,"
                " or work under torch.no_grad()"
            )


def anchor_gradient_(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fisher: Sequence[Tensor] | None = None,
    *,
    strength: float | Sequence[float] = 1.0,
    backend: str | None = None,
) -> None:
    """grad += strength F (weight - anchor), in place, for all tensors of a model in one call.

    The gradient of strength/2 sum F (weight - anchor)^2, for use between the backward pass and the
    optimizer's step. Extra memory is two tiles, whatever the sizes of the tensors.

    Args:
        grads: tensors of any shapes; bfloat16, float16, float32 or float64.
        weights, anchors: of the same shapes; dtypes may differ.
        fisher: F, of the same shapes, 0 or more; None for 1 everywhere (L2-SP).
        strength: lambda; one number, or one for each tensor.
        backend: "eager" or "triton", for tests and benchmarks; otherwise the fastest there is.

    Raises:
        TypeError: not a tensor, or a dtype that is not readable.
        ValueError: numbers of tensors, shapes or devices differ; a negative `strength`; two tensors
            that are one memory (an anchor that was not cloned); unknown `backend`.

    Source: Kirkpatrick et al. 2017, arXiv 1612.00796; Li et al. 2018, arXiv 1802.01483.
    """
    grads = _listed("grads", grads)
    _not_recorded("grads", grads)
    with torch.no_grad():
        _gradient_op(
            grads,
            _listed("weights", weights),
            _listed("anchors", anchors),
            [] if fisher is None else _listed("fisher", fisher),
            _numbers("strength", strength, len(grads)),
            backend,
        )


def anchor_pull_(
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fisher: Sequence[Tensor] | None = None,
    *,
    amount: float | Sequence[float],
    backend: str | None = None,
) -> None:
    """weight -= min(amount F, 1) (weight - anchor), in place: the pull beside an optimizer's step.

    An adaptive optimizer would divide the pull of `anchor_gradient_` by its running scale; this one
    keeps its size, as decoupled weight decay does. It never overshoots: where amount F is 1 or more
    the weight becomes its anchor. Extra memory is three tiles.

    Args:
        weights: as an optimizer holds them; leaves that require grad are changed.
        anchors: of the same shapes; dtypes may differ.
        fisher: F, of the same shapes, 0 or more; None for 1 everywhere.
        amount: learning rate times lambda; one number, or one for each tensor.
        backend: "eager" or "triton", for tests and benchmarks; otherwise the fastest there is.

    Raises:
        TypeError, ValueError: as `anchor_gradient_`.
    """
    weights = _listed("weights", weights)
    _not_recorded("weights", weights)
    with torch.no_grad():
        _pull_op(
            weights,
            _listed("anchors", anchors),
            [] if fisher is None else _listed("fisher", fisher),
            _numbers("amount", amount, len(weights)),
            backend,
        )


def anchor_penalty(
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fisher: Sequence[Tensor] | None = None,
    *,
    strength: float | Sequence[float] = 1.0,
) -> Tensor:
    """strength/2 sum F (weight - anchor)^2, a float64 number without a graph, for logs.

    Squares are float32 within a tile, sums float64. Arguments and errors are those of
    `anchor_gradient_`.
    """
    weights = _listed("weights", weights)
    lists: dict[str, Sequence[Tensor]] = {
        "weights": weights,
        "anchors": _listed("anchors", anchors),
        "fisher": [] if fisher is None else _listed("fisher", fisher),
    }
    strengths = _numbers("strength", strength, len(weights))
    _check("weights", lists, strengths, "strength", None)
    total = torch.zeros((), dtype=torch.float64, device=weights[0].device)
    with torch.no_grad():
        for (w, a), f, lam, wide, buffers in _walk(tuple(lists.values()), strengths):
            d, e = buffers.get(0, w, wide), buffers.get(1, w, wide)
            d.copy_(w).sub_(e.copy_(a)).square_()
            if f is not None:
                d.mul_(e.copy_(f))
            total.add_(d.sum(dtype=torch.float64), alpha=lam / 2)
    return cast(Tensor, total)
