"""Log-probs of given tokens, and entropies of the rows that they were drawn from.

    logprob_i = z_i[id_i] - log sum_j exp z_ij,   H_i = - sum_j p_ij log p_ij,   p = softmax z
    dz_ij = g_i (1[j = id_i] - p_ij) - e_i p_ij (log p_ij + H_i)    g, e: what arrives for the two

z are logits after scale, softcap and division by the temperature, as in
`cl_fast.ops.vocabulary_rows`. Rows whose id is `ignore` have log-prob, entropy and gradient 0.

Two ops. `logprob_rows` takes logits that exist: one pass forward that keeps four numbers per row,
one pass backward that may write over the logits. `linear_logprobs` takes hidden states and a head,
and makes a chunk of logits at a time; rows to be ignored take no part in any product. With a frozen
head the gradient of the hidden states for g = 1 is made while the chunk exists and scaled in the
backward pass. The backward pass makes the chunks again where the sums over rows need g, that is
for the gradients of weight and bias, and where a gradient arrives for the entropies.

Not differentiable twice, which is said where it is tried.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_fast.ops import vocabulary_rows
from cl_fast.ops.divergences import check_how, check_matrix, counting_rows, once
from cl_fast.ops.heads import Head, HeadGradients, chunks
from cl_fast.ops.vocabulary_rows import How, wide_dtype

__all__ = ["linear_logprobs", "logprob_rows"]

_PLAIN = How()


# --- checks ------------------------------------------------------------------------------------


def _check_ids(ids: Tensor, rows: int, device: torch.device) -> None:
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"ids must be integers; got {ids.dtype}")
    if tuple(ids.shape) != (rows,):
        raise ValueError(f"ids must have one entry per row, {rows}; got {tuple(ids.shape)}")
    if ids.device != device:
        raise ValueError(f"ids must be on the device of the rows, {device}; got {ids.device}")


def _check_rows(logits: Tensor, ids: Tensor, how: How) -> None:
    check_matrix("logits", logits, logits.device)
    if logits.size(1) == 0:
        raise ValueError("logits must have at least one column; got none")
    _check_ids(ids, logits.size(0), logits.device)
    check_how("", how)


def _check_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, how: How
) -> None:
    check_matrix("hidden", hidden, hidden.device)
    check_matrix("weight", weight, weight.device)
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.device != hidden.device:
            raise ValueError(
                f"{name} must be on the device of hidden, {hidden.device}; got {x.device}"
            )
    if weight.size(1) != hidden.size(1):
        raise ValueError(
            f"weight must have {hidden.size(1)} columns like hidden; got {weight.size(1)}"
        )
    if weight.size(0) == 0:
        raise ValueError("weight must have at least one row; got none")
    if bias is not None and tuple(bias.shape) != (weight.size(0),):
        raise ValueError(
            f"bias must have one entry per token id, {weight.size(0)}; got {tuple(bias.shape)}"
        )
    _check_ids(ids, hidden.size(0), hidden.device)
    check_how("", how)


def _check_range(ids: Tensor, columns: int, ignore: int, debug: bool) -> None:
    """On a card an assertion of the device, which waits for nothing; with `debug` on the host."""
    ids = ids.long()  # compared as uint8, -100 would be 156
    wrong = (ids != ignore) & ((ids < 0) | (ids >= columns))
    if wrong.is_cuda and not debug:
        torch._assert_async(~wrong.any(), f"ids must be in [0, {columns}), or {ignore}")
    elif wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"ids must be in [0, {columns}) or {ignore}; got {int(ids[row])} in row {row}"
        )


def _targets(ids: Tensor, ignore: int) -> Tensor:
    """int64, -1 where the row is ignored."""
    ids = ids.long()  # before the comparison: as uint8, -100 would be 156
    return torch.where(ids == ignore, -1, ids)


def _how(numbers: list[float]) -> How:
    scale, softcap, temperature = numbers
    return How(scale, softcap, temperature)


def _results(stats: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (or none) from the statistics of `logprob_forward`."""
    away = targets < 0
    logprobs = torch.where(away, 0, (stats[:, 3] - stats[:, 0]) - stats[:, 1])
    if not entropy:
        return logprobs, logprobs.new_empty(0)
    return logprobs, torch.where(away, 0, stats[:, 1] - stats[:, 2])


def _arrived(
    grad: Tensor, entropy_grad: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The gradients that count: none of a row that is ignored, whatever arrived."""
    away = targets < 0
    e = None if entropy_grad is None else torch.where(away, 0, entropy_grad)
    return torch.where(away, 0, grad), e


# --- logits that exist -------------------------------------------------------------------------


def _forward(
    logits: Tensor,
    ids: Tensor,
    ignore: int,
    how: list[float],
    entropy: bool,
    inplace: bool,
    debug: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_rows(logits, ids, _how(how))
    _check_range(ids, logits.size(1), ignore, debug)
    targets = _targets(ids, ignore)
    rows = vocabulary_rows.kernels(backend, logits)
    stats: Tensor = rows.logprob_forward(logits, targets, _how(how))
    return *_results(stats, targets, entropy), stats


_logprob_rows = torch.library.custom_op("cl_fast::logprob_rows", _forward, mutates_args=())


def _forward_fake(
    logits: Tensor,
    ids: Tensor,
    ignore: int,
    how: list[float],
    entropy: bool,
    inplace: bool,
    debug: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_rows(logits, ids, _how(how))
    wide, rows = wide_dtype(logits), logits.size(0)
    return (
        logits.new_empty((rows,), dtype=wide),
        logits.new_empty((rows if entropy else 0,), dtype=wide),
        logits.new_empty((rows, 4), dtype=wide),
    )


_logprob_rows.register_fake(_forward_fake)


def _write_gradient(
    out: Tensor,
    grad: Tensor,
    entropy_grad: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    stats: Tensor,
    ignore: int,
    how: list[float],
    backend: str | None,
) -> None:
    targets = _targets(ids, ignore)
    g, e = _arrived(grad, entropy_grad, targets)
    rows = vocabulary_rows.kernels(backend, logits)
    rows.logprob_gradient(out, g, e, logits, targets, stats, _how(how))


def _gradient(
    grad: Tensor,
    entropy_grad: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    stats: Tensor,
    ignore: int,
    how: list[float],
    backend: str | None,
) -> Tensor:
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _write_gradient(out, grad, entropy_grad, logits, ids, stats, ignore, how, backend)
    return out


_rows_gradient = torch.library.custom_op(
    "cl_fast::logprob_rows_gradient", _gradient, mutates_args=()
)


def _gradient_fake(
    grad: Tensor,
    entropy_grad: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    stats: Tensor,
    ignore: int,
    how: list[float],
    backend: str | None,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_rows_gradient.register_fake(_gradient_fake)


def _gradient_(
    grad: Tensor,
    entropy_grad: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    stats: Tensor,
    ignore: int,
    how: list[float],
    backend: str | None,
) -> None:
    _write_gradient(logits, grad, entropy_grad, logits, ids, stats, ignore, how, backend)


_rows_gradient_ = torch.library.custom_op(
    "cl_fast::logprob_rows_gradient_", _gradient_, mutates_args=("logits",)
)


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ids, ctx.ignore, ctx.how, ctx.entropy, ctx.inplace, _debug, ctx.backend = inputs
    ctx.save_for_backward(logits, ids, output[2])
    ctx.mark_non_differentiable(*(output[2:] if ctx.entropy else output[1:]))
    ctx.set_materialize_grads(False)


def _rows_backward(
    ctx: Any, grad: Tensor | None, entropy_grad: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    logits, ids, stats = ctx.saved_tensors
    if not ctx.entropy:
        entropy_grad = None
    if grad is None:
        if entropy_grad is None:
            return (None,) * 8
        grad = torch.zeros_like(entropy_grad)
    arguments = (grad, entropy_grad, logits, ids, stats, ctx.ignore, ctx.how, ctx.backend)
    with torch.no_grad():
        if ctx.inplace:
            # A second backward pass would read what this one wrote; torch refuses it by versions.
            _rows_gradient_(*arguments)
            gradient = logits.detach()
        else:
            gradient = _rows_gradient(*arguments)
    return (once(gradient), *[None] * 7)


_logprob_rows.register_autograd(_rows_backward, setup_context=_rows_setup)


def logprob_rows(
    logits: Tensor,
    ids: Tensor,
    *,
    ignore: int = -100,
    how: How = _PLAIN,
    entropy: bool = False,
    inplace: bool = False,
    debug: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of one id per row, float32 (float64 where the logits are).

    Args:
        logits: [M, V].
        ids: integer [M]; rows with the id `ignore` are 0.
        how: scale, softcap and temperature of the logits.
        entropy: give the entropies too, which are differentiable.
        inplace: the backward pass writes the gradient over the logits; nothing else may need them.
        debug: check the ids on the host on a card, too.
        backend: "eager", "native" or "triton", for tests and benchmarks.

    Returns:
        Log-probs [M], and entropies [M] or None.

    Raises:
        TypeError, ValueError: an argument, named, is wrong; on a card an id out of range is an
            assertion of the device.
    """
    logprobs, entropies, _ = _logprob_rows(
        logits, ids, ignore, list(how[:3]), entropy, inplace, debug, backend
    )
    return logprobs, entropies if entropy else None


# --- a head without its logits -----------------------------------------------------------------


def _by_chunks(
    head: Head,
    gradients: HeadGradients,
    targets: Tensor,
    grad: Tensor | None,
    entropy_grad: Tensor | None,
    stats: Tensor,
    known: bool,
    how: How,
    chunk_tokens: int | None,
    kernels: Any,
) -> None:
    """One visit to every chunk: its statistics, unless they are known, and its gradients.

    Args:
        grad, entropy_grad: [M]; `grad` None: 1.
        stats: [M, 4], written unless `known`.
    """
    index = head.index
    count = targets.size(0) if index is None else index.size(0)

    def at(x: Tensor, part: slice) -> Tensor:
        return x[part] if index is None else x.index_select(0, index[part])

    many = 32 if gradients.weight is None else 8
    for part in chunks(count, head.weight.size(0), chunk_tokens, many):
        z, ids = head.logits(part), at(targets, part)
        if known:
            own = at(stats, part)
        else:
            own = kernels.logprob_forward(z, ids, how)
            if index is None:
                stats[part] = own
            else:
                stats.index_copy_(0, index[part], own.to(stats.dtype))
        if gradients.wanted:
            g = (ids >= 0).to(stats.dtype) if grad is None else at(grad, part)
            e = None if entropy_grad is None else at(entropy_grad, part)
            out = gradients.target(z)
            kernels.logprob_gradient(out, g, e, z, ids, own, how)
            gradients.add(part, out)


def _linear_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    ignore: int,
    how: list[float],
    entropy: bool,
    chunk_tokens: int | None,
    needed: list[bool],
    debug: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_linear(hidden, weight, bias, ids, _how(how))
    _check_range(ids, weight.size(0), ignore, debug)
    targets = _targets(ids, ignore)
    kernels = vocabulary_rows.kernels(backend, hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        head = Head(hidden, weight, bias, counting_rows(targets >= 0))
        gradients = HeadGradients(head, _made_in_forward(needed), False, False)
        stats = hidden.new_zeros((hidden.size(0), 4), dtype=head.wide)
        _by_chunks(
            head, gradients, targets, None, None, stats, False, _how(how), chunk_tokens, kernels
        )
    dx = hidden.new_empty(0, dtype=head.wide) if gradients.hidden is None else gradients.hidden
    return *_results(stats, targets, entropy), stats, dx


def _made_in_forward(needed: list[bool]) -> bool:
    """Whether the gradient of the hidden states is all that will be asked for."""
    return needed[0] and not (needed[1] or needed[2])


_linear_logprobs = torch.library.custom_op(
    "cl_fast::linear_logprobs", _linear_forward, mutates_args=()
)


def _linear_forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    ignore: int,
    how: list[float],
    entropy: bool,
    chunk_tokens: int | None,
    needed: list[bool],
    debug: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_linear(hidden, weight, bias, ids, _how(how))
    wide, rows = wide_dtype(hidden, weight), hidden.size(0)
    return (
        hidden.new_empty((rows,), dtype=wide),
        hidden.new_empty((rows if entropy else 0,), dtype=wide),
        hidden.new_empty((rows, 4), dtype=wide),
        hidden.new_empty(hidden.shape if _made_in_forward(needed) else (0,), dtype=wide),
    )


_linear_logprobs.register_fake(_linear_forward_fake)


def _linear_gradient(
    grad: Tensor,
    entropy_grad: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    stats: Tensor,
    dx: Tensor | None,
    ignore: int,
    how: list[float],
    chunk_tokens: int | None,
    needed: list[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias in their dtypes, without elements where not needed.

    Args:
        dx: [M, H], the gradient of the hidden states for grad = 1, if it was made already.
    """
    targets = _targets(ids, ignore)
    g, e = _arrived(grad, entropy_grad, targets)
    if dx is not None and entropy_grad is None:
        scaled = torch.where(g[:, None] == 0, 0, dx * g[:, None])
        return scaled.to(hidden.dtype), weight.new_empty(0), weight.new_empty(0)
    kernels = vocabulary_rows.kernels(backend, hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        # What arrives may be 0 for most rows: of a clipped policy, of a mask of the caller.
        counts = g != 0 if e is None else (g != 0) | (e != 0)
        head = Head(hidden, weight, bias, counting_rows(counts))
        gradients = HeadGradients(head, *needed)
        _by_chunks(head, gradients, targets, g, e, stats, True, _how(how), chunk_tokens, kernels)
    made = gradients.hidden, gradients.weight, gradients.bias
    like = hidden, weight, weight if bias is None else bias
    dh, dw, db = (
        y.new_empty(0) if x is None else x.to(y.dtype) for x, y in zip(made, like, strict=True)
    )
    return dh, dw, db


_linear_logprobs_gradient = torch.library.custom_op(
    "cl_fast::linear_logprobs_gradient", _linear_gradient, mutates_args=()
)


def _linear_gradient_fake(
    grad: Tensor,
    entropy_grad: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    stats: Tensor,
    dx: Tensor | None,
    ignore: int,
    how: list[float],
    chunk_tokens: int | None,
    needed: list[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    like = hidden, weight, weight if bias is None else bias
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    dh, dw, db = (
        x.new_empty(shape if need else (0,))
        for x, shape, need in zip(like, shapes, needed, strict=True)
    )
    return dh, dw, db


_linear_logprobs_gradient.register_fake(_linear_gradient_fake)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, ids, *options = inputs
    ctx.ignore, ctx.how, ctx.entropy, ctx.chunk_tokens, ctx.needed, _debug, ctx.backend = options
    _, _, stats, dx = output
    ctx.made = _made_in_forward(ctx.needed)
    ctx.biased = bias is not None
    given = [x for x, there in ((bias, ctx.biased), (dx, ctx.made)) if there]
    ctx.save_for_backward(hidden, weight, ids, stats, *given)
    ctx.mark_non_differentiable(*(output[2:] if ctx.entropy else output[1:]))
    ctx.set_materialize_grads(False)


def _linear_backward(
    ctx: Any, grad: Tensor | None, entropy_grad: Tensor | None, *_: Tensor | None
) -> tuple[Any, ...]:
    hidden, weight, ids, stats, *given = ctx.saved_tensors
    rest = iter(given)
    bias, dx = (next(rest) if there else None for there in (ctx.biased, ctx.made))
    if not ctx.entropy:
        entropy_grad = None
    if grad is None:
        if entropy_grad is None:
            return (None,) * 11
        grad = torch.zeros_like(entropy_grad)
    with torch.no_grad():
        made = _linear_logprobs_gradient(
            grad, entropy_grad, hidden, weight, bias, ids, stats, dx, ctx.ignore, ctx.how,
            ctx.chunk_tokens, ctx.needed, ctx.backend,
        )  # fmt: skip
    gradients = (once(x) if need else None for x, need in zip(made, ctx.needed, strict=True))
    return (*gradients, *[None] * 8)


_linear_logprobs.register_autograd(_linear_backward, setup_context=_linear_setup)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    *,
    ignore: int = -100,
    how: How = _PLAIN,
    entropy: bool = False,
    chunk_tokens: int | None = None,
    debug: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`logprob_rows` of the logits `hidden @ weight.T + bias`, which are never held.

    Args:
        hidden: [M, H].
        weight, bias: [V, H], and [V] or None.
        ids: integer [M]; rows with the id `ignore` are 0 and take no part in any product.
        how: scale, softcap and temperature of the logits.
        entropy: give the entropies too. Their gradient costs another product per chunk, and only
            where one arrives.
        chunk_tokens: rows whose logits exist at once.
        debug: check the ids on the host on a card, too.
        backend: "eager", "native" or "triton", for tests and benchmarks.

    Returns:
        Log-probs [M], and entropies [M] or None: float32, or float64 where an input is.

    Raises:
        TypeError, ValueError: an argument, named, is wrong; on a card an id out of range is an
            assertion of the device.
    """
    wanted = torch.is_grad_enabled()
    needed = [wanted and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    logprobs, entropies, _, _ = _linear_logprobs(
        hidden, weight, bias, ids, ignore, list(how[:3]), entropy, chunk_tokens, needed, debug,
        backend,
    )  # fmt: skip
    return logprobs, entropies if entropy else None
