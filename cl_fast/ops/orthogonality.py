"""Orthogonality between tasks: the O-LoRA penalty, and the projection off a subspace.

    S_m = A_m P_m^T                    A_m [r, d] new, P_m [R, d] all past rows of module m

    form       value of module m       gradient to A_m, times the upstream gradient
    l1         sum |S_m|               sign(S_m) P_m, sign(0) = 0
    squared    sum S_m^2               2 S_m P_m

    project:   A - (A Q) Q^T           Q [d, k], orthonormal columns; self-adjoint, so the gradient
                                       is the same projection of the upstream gradient

O-LoRA (Wang et al. 2023, arXiv 2310.14152) writes the squared form, its authors' code computes
l1; A_m is the factor next to the input (`lora_A` of PEFT) and P_m holds those of all past tasks.
The projection is the exact counterpart: with Q a basis of the rows of P_m, S_m becomes 0.

Products and sums are float32 whatever the dtypes (float64 where a tensor is float64); a gradient
or a projection is rounded once, to the dtype of its tensor. The small S_m are all that is kept for
the backward pass, which reads the past a second time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, islice
from types import ModuleType
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from cl_fast.backends import (
    check_backend,
    native_or_say,
    orthogonal_ops,
    require_native,
    triton,
)

__all__ = ["orthogonal_penalty", "orthogonal_project", "orthogonal_project_"]

Form = Literal["l1", "squared"]
Reduction = Literal["sum", "none"]

_FORMS = ("l1", "squared")
_REDUCTIONS = ("sum", "none")
_READABLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_OFFERED = ("eager", "native", "triton")


def _check_matrices(what: str, tensors: Sequence[Tensor], like: str, device: torch.device) -> None:
    """Raise unless all are matrices of a dtype that is read, on `device`, that of `like`."""
    for i, x in enumerate(tensors):
        if x.dtype not in _READABLE:
            raise TypeError(
                f"{what}[{i}] must have one of the dtypes bfloat16, float16, float32, float64; "
                f"got {x.dtype}"
            )
        if x.dim() != 2:
            raise ValueError(f"{what}[{i}] must be a matrix; got the shape {tuple(x.shape)}")
        if x.device != device:
            raise ValueError(
                f"{what}[{i}] must be on the device of {like}, {device}; got {x.device}"
            )


def _check_backend(
    backend: str | None,
    device: torch.device,
    wide: torch.dtype,
    offered: Sequence[str] = ("eager", "triton"),
) -> None:
    if backend is None:
        return
    check_backend(backend, device.type, offered)
    if backend == "triton" and wide == torch.float64:
        raise ValueError("backend='triton' computes in float32; got float64 tensors")


def _wide(*lists: Sequence[Tensor]) -> torch.dtype:
    """The dtype of sums and products."""
    dtypes = {x.dtype for tensors in lists for x in tensors}
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _without_autocast(device: torch.device) -> torch.autocast:
    """Inside an op the products stay wide, whatever the region around it casts to."""
    return torch.autocast(device.type, enabled=False)


# --- the penalty -------------------------------------------------------------------------------


def _check_penalty(
    new: Sequence[Tensor],
    past: Sequence[Tensor],
    counts: Sequence[int],
    form: str,
    backend: str | None,
) -> None:
    if form not in _FORMS:
        raise ValueError(f"form must be one of 'l1', 'squared'; got {form!r}")
    if not new:
        raise ValueError("new must hold at least one matrix; got none")
    if len(counts) != len(new):
        raise ValueError(
            f"past must have an entry for each of the {len(new)} modules of new; got {len(counts)}"
        )
    if sum(counts) != len(past) or min(counts) < 0:
        raise ValueError(f"counts must add up to the {len(past)} matrices of past; got {counts}")
    _check_matrices("new", new, "new[0]", new[0].device)
    _check_matrices("past", past, "new[0]", new[0].device)
    for m, i in _pairs(counts):
        if past[i].size(1) != new[m].size(1):
            raise ValueError(
                f"past of module {m} must have {new[m].size(1)} columns like new[{m}]; "
                f"got {past[i].size(1)}"
            )
    _check_backend(backend, new[0].device, _wide(new, past), _OFFERED)
    if backend == "native" and any(x.dtype != torch.float32 for x in (*new, *past)):
        raise ValueError(
            "backend='native' cannot be used for matrices other than float32; leave backend out"
        )


def _pairs(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(module, index into past), in order."""
    modules = [m for m, count in enumerate(counts) for _ in range(count)]
    return list(zip(modules, range(len(modules)), strict=True))


def _block_shapes(
    new: Sequence[Tensor], past: Sequence[Tensor], counts: Sequence[int]
) -> list[tuple[int, int]]:
    """Of the blocks A_m P_j^T that make up S: one per pair, one after the other."""
    return [(new[m].size(0), past[i].size(0)) for m, i in _pairs(counts)]


def _module_sizes(shapes: Sequence[tuple[int, int]], counts: Sequence[int]) -> list[int]:
    """Elements of S of each module."""
    rest = iter(shapes)
    return [sum(r * k for r, k in islice(rest, count)) for count in counts]


def _blocks(flat: Tensor, shapes: list[tuple[int, int]]) -> Sequence[Tensor]:
    """The blocks as views of S; equal shapes, the usual case, cost one call."""
    if len(set(shapes)) == 1:
        return list(flat.view(len(shapes), *shapes[0]).unbind())
    parts = flat.split([r * k for r, k in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _widened(tensors: Sequence[Tensor], wide: torch.dtype) -> Sequence[Tensor]:
    return [x if x.dtype == wide else x.to(wide) for x in tensors]


def _groups(new: Sequence[Tensor], needed: Sequence[bool]) -> list[list[int]]:
    """Modules that need a gradient, those of one shape and dtype together."""
    kinds: list[tuple[torch.Size, torch.dtype]] = []
    groups: list[list[int]] = []
    for m, a in enumerate(new):
        if not needed[m]:
            continue
        kind = (a.shape, a.dtype)
        # No dictionary: sizes under compile may be symbols, which have no hash.
        for known, group in zip(kinds, groups, strict=True):
            if known == kind:
                group.append(m)
                break
        else:
            kinds.append(kind)
            groups.append([m])
    return groups


def _penalty_eager(
    new: Sequence[Tensor], past: Sequence[Tensor], counts: Sequence[int], form: str
) -> tuple[Tensor, Tensor]:
    """The op in plain torch, on any device: one product per pair, the rest once for all."""
    wide = _wide(new, past)
    shapes = _block_shapes(new, past, counts)
    modules = _module_sizes(shapes, counts)
    products = torch.empty(sum(modules), dtype=wide, device=new[0].device)
    with _without_autocast(products.device):
        left = _widened(new, wide)
        for (m, i), block in zip(_pairs(counts), _blocks(products, shapes), strict=True):
            p = past[i] if past[i].dtype == wide else past[i].to(wide)
            torch.mm(left[m], p.t(), out=block)
    return _values(products, modules, form), products


def _values(products: Tensor, modules: list[int], form: str) -> Tensor:
    """One number per module from S."""
    terms = products.abs() if form == "l1" else products.square()
    if min(modules) == max(modules):
        return terms.view(len(modules), modules[0]).sum(1)
    return torch.stack([part.sum() for part in terms.split(modules)])


def _factor(grad: Tensor, products: Tensor, modules: list[int], form: str) -> Tensor:
    """What the past is multiplied with: the upstream gradient goes into this small factor, not into
    the large result."""
    factor = products.sign() if form == "l1" else products * 2.0
    if min(modules) == max(modules):
        factor.view(len(modules), modules[0]).mul_(grad.unsqueeze(1))
    else:
        for part, g in zip(factor.split(modules), grad.unbind(), strict=True):
            part.mul_(g)
    return factor


def _gradient_eager(
    grad: Tensor,
    products: Tensor,
    new: Sequence[Tensor],
    past: Sequence[Tensor],
    counts: Sequence[int],
    needed: Sequence[bool],
    form: str,
) -> list[Tensor]:
    wide = products.dtype
    shapes = _block_shapes(new, past, counts)
    modules = _module_sizes(shapes, counts)
    blocks = _blocks(_factor(grad, products, modules, form), shapes)
    first = [0, *accumulate(counts)]
    out = []
    with _without_autocast(products.device):
        for group in _groups(new, needed):
            like = new[group[0]]
            stacked = torch.empty((len(group), *like.shape), dtype=wide, device=like.device)
            for target, m in zip(stacked.unbind(), group, strict=True):
                if not counts[m]:
                    target.zero_()
                for i in range(first[m], first[m + 1]):
                    p = past[i] if past[i].dtype == wide else past[i].to(wide)
                    if i == first[m]:
                        torch.mm(blocks[i], p, out=target)
                    else:
                        target.addmm_(blocks[i], p)
            out.append(stacked.to(like.dtype))
    return out


def _core(backend: str | None, new: Sequence[Tensor], past: Sequence[Tensor]) -> ModuleType | None:
    """The C++ core where it is to compute in float32 on the CPU, else None."""
    if backend not in (None, "native") or not orthogonal_ops.takes(new, past):
        return None
    return native_or_say() if backend is None else require_native(backend, "cpu", _OFFERED)


def _penalty_cpu(
    new: Sequence[Tensor],
    past: Sequence[Tensor],
    counts: Sequence[int],
    form: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    _check_penalty(new, past, counts, form, backend)
    core = _core(backend, new, past)
    if core is None:
        return _penalty(new, past, counts, form, backend or "eager")
    modules = _module_sizes(_block_shapes(new, past, counts), counts)
    products = orthogonal_ops.products(core, new, past, _pairs(counts), sum(modules))
    return _values(products, modules, form), products


def _gradient_cpu(
    grad: Tensor,
    products: Tensor,
    new: Sequence[Tensor],
    past: Sequence[Tensor],
    counts: Sequence[int],
    needed: Sequence[bool],
    form: str,
    backend: str | None,
) -> list[Tensor]:
    core = _core(backend, new, past)
    if core is None:
        return _gradient(grad, products, new, past, counts, needed, form, backend or "eager")
    groups = _groups(new, needed)
    stacks = [new[group[0]].new_empty((len(group), *new[group[0]].shape)) for group in groups]
    targets = {
        m: out
        for group, stack in zip(groups, stacks, strict=True)
        for m, out in zip(group, stack.unbind(), strict=True)
    }
    _gradient_native(core, grad, products, new, past, counts, form, targets)
    return stacks


def _gradient_native(
    core: ModuleType,
    grad: Tensor,
    products: Tensor,
    new: Sequence[Tensor],
    past: Sequence[Tensor],
    counts: Sequence[int],
    form: str,
    targets: dict[int, Tensor],
) -> None:
    """The gradients into `targets`, by the core."""
    modules = _module_sizes(_block_shapes(new, past, counts), counts)
    factor = _factor(grad, products, modules, form)
    orthogonal_ops.gradients(core, factor, new, past, _pairs(counts), targets)


def _kernels(backend: str, wide: torch.dtype) -> Any:
    """The module of the Triton kernels where they are to run, else None."""
    if backend != "triton" or wide == torch.float64:
        return None
    return triton.load("orthogonality")


def _penalty(
    new: Sequence[Tensor], past: Sequence[Tensor], counts: Sequence[int], form: str, backend: str
) -> tuple[Tensor, Tensor]:
    kernels = _kernels(backend, _wide(new, past))
    if kernels is None:
        return _penalty_eager(new, past, counts, form)
    return cast(tuple[Tensor, Tensor], kernels.penalty(new, past, counts, form))


def _penalty_generic(
    new: Sequence[Tensor],
    past: Sequence[Tensor],
    counts: Sequence[int],
    form: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    _check_penalty(new, past, counts, form, backend)
    return _penalty(new, past, counts, form, backend or "eager")


def _penalty_cuda(
    new: Sequence[Tensor],
    past: Sequence[Tensor],
    counts: Sequence[int],
    form: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    _check_penalty(new, past, counts, form, backend)
    return _penalty(new, past, counts, form, backend or "triton")


def _penalty_fake(
    new: Sequence[Tensor],
    past: Sequence[Tensor],
    counts: Sequence[int],
    form: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    _check_penalty(new, past, counts, form, backend)
    wide = _wide(new, past)
    total = sum(r * k for r, k in _block_shapes(new, past, counts))
    values = new[0].new_empty((len(new),), dtype=wide)
    return values, new[0].new_empty((total,), dtype=wide)


def _gradient(
    grad: Tensor,
    products: Tensor,
    new: Sequence[Tensor],
    past: Sequence[Tensor],
    counts: Sequence[int],
    needed: Sequence[bool],
    form: str,
    backend: str,
) -> list[Tensor]:
    kernels = _kernels(backend, products.dtype)
    if kernels is None:
        return _gradient_eager(grad, products, new, past, counts, needed, form)
    groups = _groups(new, needed)
    return cast(
        list[Tensor], kernels.penalty_gradient(grad, products, new, past, counts, groups, form)
    )


def _gradient_generic(
    grad: Tensor,
    products: Tensor,
    new: Sequence[Tensor],
    past: Sequence[Tensor],
    counts: Sequence[int],
    needed: Sequence[bool],
    form: str,
    backend: str | None,
) -> list[Tensor]:
    return _gradient(grad, products, new, past, counts, needed, form, backend or "eager")


def _gradient_cuda(
    grad: Tensor,
    products: Tensor,
    new: Sequence[Tensor],
    past: Sequence[Tensor],
    counts: Sequence[int],
    needed: Sequence[bool],
    form: str,
    backend: str | None,
) -> list[Tensor]:
    return _gradient(grad, products, new, past, counts, needed, form, backend or "triton")


def _gradient_fake(
    grad: Tensor,
    products: Tensor,
    new: Sequence[Tensor],
    past: Sequence[Tensor],
    counts: Sequence[int],
    needed: Sequence[bool],
    form: str,
    backend: str | None,
) -> list[Tensor]:
    return [
        new[group[0]].new_empty((len(group), *new[group[0]].shape))
        for group in _groups(new, needed)
    ]


def _penalty_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    new, past, ctx.counts, ctx.form, ctx.backend = inputs
    for m, i in _pairs(ctx.counts):
        if past[i].requires_grad:
            raise ValueError(
                f"past of module {m} requires grad; detach it: the penalty moves the new task only"
            )
    ctx.modules = len(new)
    ctx.needed = [a.requires_grad for a in new]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *new, *past)


def _penalty_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    products, *rest = ctx.saved_tensors
    new, past = rest[: ctx.modules], rest[ctx.modules :]
    grads: list[Tensor | None] = [None] * ctx.modules
    if grad is not None:
        # Nothing records or traces the op here, as in every plain step of training: then its
        # dispatch, which looks at each tensor of the lists several times, is left out.
        plain = type(grad) is Tensor and grad.is_cpu and not torch.is_grad_enabled()
        core = _core(ctx.backend, new, past) if plain else None
        if core is not None:
            targets = {
                m: torch.empty_like(a, memory_format=torch.contiguous_format)
                for m, a in enumerate(new)
                if ctx.needed[m]
            }
            _gradient_native(core, grad, products, new, past, ctx.counts, ctx.form, targets)
            return [targets.get(m) for m in range(ctx.modules)], [None] * len(past), *[None] * 3
        stacks = _gradient_op(
            grad, products, new, past, ctx.counts, ctx.needed, ctx.form, ctx.backend
        )
        for group, stack in zip(_groups(new, ctx.needed), stacks, strict=True):
            for m, g in zip(group, stack.unbind(), strict=True):
                grads[m] = g
    return grads, [None] * len(past), None, None, None


def _gradient_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad, _, new, past, ctx.counts, ctx.needed, ctx.form, _ = inputs
    ctx.modules = len(new)
    ctx.save_for_backward(grad, *new, *past)


def _gradient_backward(ctx: Any, upstream: list[Tensor]) -> tuple[Any, ...]:
    """The second derivative, in plain torch: of use to those who look at curvature, and rare.

    With V_m the upstream gradient and g_m that of the penalty, the first one moves by
    sum (factor of S_m) o (V_m P_m^T), and A_m by 2 g_m V_m P_m^T P_m (squared) or nothing (l1).
    """
    grad, *rest = ctx.saved_tensors
    new, past = rest[: ctx.modules], rest[ctx.modules :]
    wide = _wide(new, past)
    of_module: list[list[Tensor]] = [[] for _ in new]
    for m, i in _pairs(ctx.counts):
        of_module[m].append(past[i].to(wide))
    to_grad: list[Tensor] = [torch.zeros_like(grad[0], dtype=wide) for _ in new]
    to_new: list[Tensor | None] = [None] * ctx.modules
    for group, stack in zip(_groups(new, ctx.needed), upstream, strict=True):
        for m, v in zip(group, stack.unbind(), strict=True):
            if not of_module[m]:
                continue
            p = torch.cat(of_module[m])
            s, moved = new[m].to(wide) @ p.t(), v.to(wide) @ p.t()
            factor = s.sign() if ctx.form == "l1" else 2.0 * s
            to_grad[m] = (factor * moved).sum()
            if ctx.form == "squared":
                to_new[m] = (2.0 * grad[m] * (moved @ p)).to(new[m].dtype)
    nothing = [None] * len(past)
    return torch.stack(to_grad).to(grad.dtype), None, to_new, nothing, None, None, None, None


_penalty_op = torch.library.custom_op(
    "cl_fast::orthogonal_penalty", _penalty_generic, mutates_args=()
)
_penalty_op.register_kernel("cpu")(_penalty_cpu)
_penalty_op.register_kernel("cuda")(_penalty_cuda)
_penalty_op.register_fake(_penalty_fake)
_penalty_op.register_autograd(_penalty_backward, setup_context=_penalty_setup)

_gradient_op = torch.library.custom_op(
    "cl_fast::orthogonal_penalty_backward", _gradient_generic, mutates_args=()
)
_gradient_op.register_kernel("cpu")(_gradient_cpu)
_gradient_op.register_kernel("cuda")(_gradient_cuda)
_gradient_op.register_fake(_gradient_fake)
_gradient_op.register_autograd(_gradient_backward, setup_context=_gradient_setup)


def orthogonal_penalty(
    new: Sequence[Tensor],
    past: Sequence[Tensor | Sequence[Tensor] | None],
    *,
    form: Form = "l1",
    reduction: Reduction = "sum",
    backend: str | None = None,
) -> Tensor:
    """The O-LoRA penalty of all modules at once: how far new tasks overlap with past ones.

    Differentiable with respect to `new`, and twice.

    Args:
        new: for each module its A [r, d] of the task in training. Shapes may differ between
            modules; bfloat16, float16, float32 or float64.
        past: for each module the A of the past tasks: one matrix [R, d] that holds them all, a
            sequence of matrices [r_j, d], or None where there is no past. One matrix per module
            is fastest.
        form: "l1", sum |A_new A_past^T| as in the authors' code, or "squared", as in the paper.
        reduction: "sum" over the modules, or "none": one value per module.
        backend: "eager", "native" or "triton", for tests and benchmarks; otherwise the fastest
            there is.

    Returns:
        float32 (float64 where an input is float64), of no dimension or [modules].

    Raises:
        TypeError: not a tensor, or a dtype that is not readable.
        ValueError: numbers of modules, columns or devices differ; not a matrix; unknown `form`,
            `reduction` or `backend`; `past` requires grad.

    Source: Wang et al. 2023, arXiv 2310.14152.
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of 'sum', 'none'; got {reduction!r}")
    new = _as_list("new", new)
    flat: list[Tensor] = []
    counts: list[int] = []
    for entry in _as_list("past", past):
        if isinstance(entry, Tensor):
            flat.append(entry)
            counts.append(1)
            continue
        parts = [] if entry is None else _as_list(f"past[{len(counts)}]", entry)
        flat.extend(parts)
        counts.append(len(parts))
    _check_elements("new", new)
    _check_elements("past", flat)
    values = cast(Tensor, _penalty_op(new, flat, counts, form, backend)[0])
    return values.sum() if reduction == "sum" else values


def _as_list(what: str, given: Any) -> list[Any]:
    if isinstance(given, (list, tuple)):
        return list(given)
    raise TypeError(f"{what} must be a list or tuple of matrices, got {type(given).__name__}")


def _check_elements(what: str, tensors: Sequence[Any]) -> None:
    """What torch would refuse before the op sees it, in words of ours."""
    for i, x in enumerate(tensors):
        if not isinstance(x, Tensor):
            raise TypeError(f"{what}[{i}] must be a torch.Tensor, got {type(x).__name__}")


# --- the projection ----------------------------------------------------------------------------


def _check_project(
    a: Sequence[Tensor], q: Sequence[Tensor], rows: bool, passes: int, backend: str | None
) -> None:
    if passes not in (1, 2):
        raise ValueError(f"passes must be 1 or 2; got {passes}")
    if not a:
        raise ValueError("a must hold at least one matrix; got none")
    if len(q) != len(a):
        raise ValueError(f"q must hold one basis for each of the {len(a)} of a; got {len(q)}")
    _check_matrices("a", a, "a[0]", a[0].device)
    _check_matrices("q", q, "a[0]", a[0].device)
    for m, (x, basis) in enumerate(zip(a, q, strict=True)):
        d, k = basis.shape[::-1] if rows else basis.shape
        if d != x.shape[1]:
            side = "columns" if rows else "rows"
            raise ValueError(
                f"q[{m}] must have {x.shape[1]} {side}, the columns of a[{m}]; got {d}"
            )
        if k > d:
            raise ValueError(
                f"q[{m}] holds {k} vectors of {d} numbers, which cannot be orthonormal"
            )
    _check_backend(backend, a[0].device, _wide(a, q))


def _project_eager(
    a: Sequence[Tensor], q: Sequence[Tensor], rows: bool, passes: int
) -> list[Tensor]:
    """The op in plain torch, on any device."""
    wide = _wide(a, q)
    out = []
    with _without_autocast(a[0].device):
        for x, basis in zip(a, q, strict=True):
            p = basis.to(wide) if rows else basis.to(wide).t()
            y = x.to(wide)
            for _ in range(passes):
                y = torch.addmm(y, torch.mm(y, p.t()), p, alpha=-1.0)
            out.append(y.to(x.dtype).contiguous())
    return out


def _project(
    a: Sequence[Tensor], q: Sequence[Tensor], rows: bool, passes: int, backend: str
) -> list[Tensor]:
    kernels = _kernels(backend, _wide(a, q))
    if kernels is None:
        return _project_eager(a, q, rows, passes)
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in a]
    kernels.project(a, q if rows else [basis.t() for basis in q], passes, out)
    return out


def _project_in_place(
    a: Sequence[Tensor], q: Sequence[Tensor], rows: bool, passes: int, backend: str
) -> None:
    kernels = _kernels(backend, _wide(a, q))
    if kernels is not None:
        kernels.project(a, q if rows else [basis.t() for basis in q], passes, a)
        return
    for x, y in zip(a, _project_eager(a, q, rows, passes), strict=True):
        x.copy_(y)


def _project_generic(
    a: Sequence[Tensor], q: Sequence[Tensor], rows: bool, passes: int, backend: str | None
) -> list[Tensor]:
    _check_project(a, q, rows, passes, backend)
    return _project(a, q, rows, passes, backend or "eager")


def _project_cuda(
    a: Sequence[Tensor], q: Sequence[Tensor], rows: bool, passes: int, backend: str | None
) -> list[Tensor]:
    _check_project(a, q, rows, passes, backend)
    return _project(a, q, rows, passes, backend or "triton")


def _project_fake(
    a: Sequence[Tensor], q: Sequence[Tensor], rows: bool, passes: int, backend: str | None
) -> list[Tensor]:
    _check_project(a, q, rows, passes, backend)
    return [x.new_empty(x.shape) for x in a]


def _side_by_side(x: Tensor, y: Tensor) -> bool:
    """Whether two matrices are ranges of columns of one matrix, and no column is in both."""
    row = x.stride(0)
    if row != y.stride(0) or (x.stride(1), y.stride(1)) != (1, 1) or x.dtype != y.dtype:
        return False
    apart = (y.data_ptr() - x.data_ptr()) // x.element_size()
    return bool(row > 0 and x.size(1) <= apart % row <= row - y.size(1))


def _check_in_place(a: Sequence[Tensor], q: Sequence[Tensor]) -> None:
    """Raise ValueError unless each of `a` has its memory for itself."""
    spans = []
    for what, tensors in (("a", a), ("q", q)):
        for m, x in enumerate(tensors):
            if not x.numel():
                continue
            if what == "a" and torch._debug_has_internal_overlap(x) == 1:
                raise ValueError(
                    f"a[{m}] must not overlap itself to be written in place (an expanded tensor?); "
                    "give a copy of it"
                )
            reach = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
            start = x.data_ptr()
            spans.append((start, start + (reach + 1) * x.element_size(), what, m, x))
    spans.sort(key=lambda span: span[:2])
    open_spans: list[Any] = []
    for span in spans:
        open_spans = [before for before in open_spans if before[1] > span[0]]
        for before in open_spans:
            written, other = (span, before) if span[2] == "a" else (before, span)
            if written[2] == "a" and not _side_by_side(before[4], span[4]):
                raise ValueError(
                    f"a[{written[3]}] must not overlap {other[2]}[{other[3]}] in memory, because "
                    "it is written in place; give a copy of it, or use orthogonal_project"
                )
        open_spans.append(span)


def _in_place_generic(
    a: Sequence[Tensor], q: Sequence[Tensor], rows: bool, passes: int, backend: str | None
) -> None:
    _check_project(a, q, rows, passes, backend)
    _check_in_place(a, q)
    _project_in_place(a, q, rows, passes, backend or "eager")


def _in_place_cuda(
    a: Sequence[Tensor], q: Sequence[Tensor], rows: bool, passes: int, backend: str | None
) -> None:
    _check_project(a, q, rows, passes, backend)
    _check_in_place(a, q)
    _project_in_place(a, q, rows, passes, backend or "triton")


def _in_place_fake(
    a: Sequence[Tensor], q: Sequence[Tensor], rows: bool, passes: int, backend: str | None
) -> None:
    _check_project(a, q, rows, passes, backend)


def _project_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, q, ctx.rows, ctx.passes, ctx.backend = inputs
    for m, basis in enumerate(q):
        if basis.requires_grad:
            raise ValueError(f"q[{m}] requires grad; detach it: a basis is a constant here")
    ctx.save_for_backward(*q)


def _project_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    q = list(ctx.saved_tensors)
    return (
        _project_op(grads, q, ctx.rows, ctx.passes, ctx.backend),
        [None] * len(q),
        None,
        None,
        None,
    )


_project_op = torch.library.custom_op(
    "cl_fast::orthogonal_project", _project_generic, mutates_args=()
)
_project_op.register_kernel("cuda")(_project_cuda)
_project_op.register_fake(_project_fake)
_project_op.register_autograd(_project_backward, setup_context=_project_setup)

_in_place_op = torch.library.custom_op(
    "cl_fast::orthogonal_project_", _in_place_generic, mutates_args=("a",)
)
_in_place_op.register_kernel("cuda")(_in_place_cuda)
_in_place_op.register_fake(_in_place_fake)


def _orthonormal_or_raise(q: Sequence[Tensor], rows: bool) -> None:
    """Raise ValueError unless the bases are orthonormal, as well as their dtypes can say it.

    Rounding an exact basis to a dtype of unit roundoff u moves an entry of Q^T Q by at most about
    2 u; a basis that was computed in float32 is itself off by a few sqrt(d) 2^-24.
    """
    for m, basis in enumerate(q):
        x = basis.detach().double()
        x = x if rows else x.t()
        u = torch.finfo(basis.dtype).eps / 2
        allowed = 2.02 * u + 16.0 * math.sqrt(x.shape[1]) * min(u, 2.0**-24)
        error = (x @ x.t() - torch.eye(x.shape[0], dtype=x.dtype, device=x.device)).abs()
        worst = float(error.max()) if error.numel() else 0.0
        if not worst <= allowed:
            raise ValueError(
                f"q[{m}] must be orthonormal: an entry of its Gram matrix is off by {worst:.3g}, "
                f"more than {allowed:.3g}"
            )


def _project_lists(a: Any, q: Any) -> tuple[list[Tensor], list[Tensor]]:
    if isinstance(a, Tensor) and isinstance(q, Tensor):
        return [a], [q]
    if isinstance(a, Tensor) or isinstance(q, Tensor):
        raise TypeError("a and q must both be matrices, or both be lists of matrices")
    a, q = _as_list("a", a), _as_list("q", q)
    _check_elements("a", a)
    _check_elements("q", q)
    return a, q


@overload
def orthogonal_project(
    a: Tensor, q: Tensor, *, rows: bool = ..., passes: int = ..., check: bool = ...,
    backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def orthogonal_project(  # type: ignore[overload-cannot-match, unused-ignore]
    a: Sequence[Tensor], q: Sequence[Tensor], *, rows: bool = ..., passes: int = ...,
    check: bool = ..., backend: str | None = ...,
) -> list[Tensor]: ...  # fmt: skip
def orthogonal_project(
    a: Tensor | Sequence[Tensor],
    q: Tensor | Sequence[Tensor],
    *,
    rows: bool = False,
    passes: int = 1,
    check: bool = False,
    backend: str | None = None,
) -> Tensor | list[Tensor]:
    """A - (A Q) Q^T: the part of the rows of `a` that is orthogonal to the columns of `q`.

    Differentiable with respect to `a`; linear and self-adjoint. The other side is the same of the
    transposed matrix: W - U U^T W is `orthogonal_project(W.t(), U).t()`.

    Args:
        a: a matrix [r, d], or a list of matrices, one per module; shapes may differ.
        q: an orthonormal basis [d, k] for each, as `torch.linalg.qr(past.t()).Q` gives it.
        rows: the bases are [k, d] instead, one vector per row.
        passes: 2 projects twice, without a rounding to the dtype of `a` in between. It removes
            what the rounding of the first pass left, and matters where most of `a` lies in the
            subspace.
        check: first verify that the bases are orthonormal. Waits for the device, and breaks a
            compiled graph.
        backend: "eager" or "triton", for tests and benchmarks; otherwise the fastest there is.

    Returns:
        A new contiguous tensor, or a list of them, with the shapes and dtypes of `a`.

    Raises:
        TypeError: not a tensor, or a dtype that is not readable; a matrix beside a list.
        ValueError: numbers of matrices, shapes or devices differ; `q` requires grad or, with
            `check`, is not orthonormal; unknown `passes` or `backend`.
    """
    xs, bases = _project_lists(a, q)
    if check:
        _check_project(xs, bases, rows, passes, backend)
        _orthonormal_or_raise(bases, rows)
    out = cast(list[Tensor], _project_op(xs, bases, rows, passes, backend))
    return out[0] if isinstance(a, Tensor) else out


def orthogonal_project_(
    a: Tensor | Sequence[Tensor],
    q: Tensor | Sequence[Tensor],
    *,
    rows: bool = False,
    passes: int = 1,
    check: bool = False,
    backend: str | None = None,
) -> None:
    """`orthogonal_project` in place, for use after an optimizer's step.

    Like that step it is not recorded: leaves that require grad are changed, while a tensor that
    autograd computed is refused. Arguments and errors are those of `orthogonal_project`; ValueError
    too if a matrix of `a` shares memory with another one, with a basis, or with itself.
    """
    xs, bases = _project_lists(a, q)
    for m, x in enumerate(xs):
        if x.requires_grad and not x.is_leaf and torch.is_grad_enabled():
            raise ValueError(
                f"a[{m}] was computed by autograd and cannot be projected in place; "
                "use orthogonal_project"
            )
    if check:
        _check_project(xs, bases, rows, passes, backend)
        _orthonormal_or_raise(bases, rows)
    with torch.no_grad():
        _in_place_op(xs, bases, rows, passes, backend)
