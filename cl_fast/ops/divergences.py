"""Divergences between a student and a dense teacher: on logits, and on a head without its logits.

    loss_i = w_i (D(teacher_i, student_i) + c CE_i)      i: a row, that is a token

D is one of the kinds of `cl_fast.ops.vocabulary_rows`, which has the formulas; CE is the
cross-entropy of the row's label at temperature 1.

Two ops. `divergence_rows` takes logits that exist: a forward pass that keeps five numbers per row,
and a backward pass in closed form that may write over the logits. `linear_divergence` takes hidden
states and a head, and makes a chunk of logits at a time; what the chunk owes hidden states, weight
and bias is taken while it exists. The gradient of a row's hidden state is linear in what arrives
for the row's loss, so it is kept per row and scaled in the backward pass: with a frozen head
nothing is computed twice, whatever is done with the losses. The gradient of the weight sums over
rows. Where all rows receive the same (`uniform`: a sum or a mean follows) it is scaled as well,
else the backward pass makes the chunks again.

Not differentiable twice, which torch says.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cl_fast.ops import vocabulary_rows
from cl_fast.ops.heads import CHUNK_BYTES, CPU_CHUNK_BYTES, Head, HeadGradients, chunks
from cl_fast.ops.vocabulary_rows import KINDS, Extra, How, wide_dtype

__all__ = ["divergence_rows", "linear_divergence_rows"]

_READABLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_PLAIN = How()


# --- checks ------------------------------------------------------------------------------------


def check_matrix(name: str, x: Tensor, device: torch.device) -> None:
    """Raise unless `x` is a matrix of a dtype that is read, on `device`."""
    if x.dtype not in _READABLE:
        raise TypeError(
            f"{name} must have one of the dtypes bfloat16, float16, float32, float64; got {x.dtype}"
        )
    if x.dim() != 2:
        raise ValueError(f"{name} must be a matrix; got the shape {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on the device of the student, {device}; got {x.device}")


def check_vector(name: str, x: Tensor | None, size: int, what: str, device: torch.device) -> None:
    """Raise unless `x` is None or has one number per row or column, on `device`."""
    if x is None:
        return
    if tuple(x.shape) != (size,):
        raise ValueError(f"{name} must have one entry per {what}, {size}; got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on the device of the student, {device}; got {x.device}")


def check_how(name: str, how: How) -> None:
    """Raise unless temperature, scale and softcap are usable."""
    if not (how.temperature > 0 and math.isfinite(how.temperature)):
        raise ValueError(f"{name}temperature must be positive; got {how.temperature}")
    if not math.isfinite(how.scale):
        raise ValueError(f"{name}logit_scale must be a finite number; got {how.scale}")
    if not (how.softcap >= 0 and math.isfinite(how.softcap)):
        raise ValueError(f"{name}softcap must be positive, or None; got {how.softcap}")


def check_kind(kind: str, mix: float) -> None:
    """Raise unless there is such a divergence."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}; got {kind!r}")
    if kind in ("jsd", "skew_forward_kl", "skew_reverse_kl") and not 0 < mix < 1:
        name = "beta" if kind == "jsd" else "skew"
        raise ValueError(f"{name} must be between 0 and 1 for kind={kind!r}; got {mix}")


def _check_rows(
    student: Tensor, teacher: Tensor, kind: str, mix: float, how_s: How, how_t: How
) -> None:
    check_kind(kind, mix)
    check_matrix("logits", student, student.device)
    check_matrix("teacher", teacher, student.device)
    if teacher.size(0) != student.size(0):
        raise ValueError(
            f"teacher must have the {student.size(0)} rows of the student; got {teacher.size(0)}"
        )
    if student.size(1) == 0:
        raise ValueError("logits must have at least one column; got none")
    if not 0 < teacher.size(1) <= student.size(1):
        raise ValueError(
            f"teacher must have the {student.size(1)} columns of the student, or fewer; "
            f"got {teacher.size(1)}"
        )
    check_how("", how_s)
    check_how("teacher ", how_t)


def _hows(how_s: list[float], how_t: list[float]) -> tuple[How, How]:
    """From the lists that a schema can hold: scale, softcap, temperature, and whether probs."""
    scale, softcap, temperature, probs = how_t
    return How(how_s[0], how_s[1], how_s[2]), How(scale, softcap, temperature, bool(probs))


class _Once(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError("this gradient is in closed form, which is not differentiable twice")


def once(gradient: Tensor) -> Tensor:
    """The gradient that a backward pass made without autograd.

    Where a graph of the backward pass is made, one that refuses to be differentiated: left as it
    is, it would pass for a constant.
    """
    return _Once.apply(gradient.requires_grad_()) if torch.is_grad_enabled() else gradient


# --- logits that exist -------------------------------------------------------------------------


def _forward(
    student: Tensor,
    teacher: Tensor,
    kind: str,
    mix: float,
    how_s: list[float],
    how_t: list[float],
    inplace: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    hows = _hows(how_s, how_t)
    _check_rows(student, teacher, kind, mix, *hows)
    rows = vocabulary_rows.kernels(backend, student, teacher)
    loss, stats = rows.divergence_forward(student, teacher, kind, mix, *hows)
    return loss, stats


_divergence_rows = torch.library.custom_op("cl_fast::divergence_rows", _forward, mutates_args=())


def _forward_fake(
    student: Tensor,
    teacher: Tensor,
    kind: str,
    mix: float,
    how_s: list[float],
    how_t: list[float],
    inplace: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    _check_rows(student, teacher, kind, mix, *_hows(how_s, how_t))
    wide = wide_dtype(student, teacher)
    rows = student.size(0)
    return student.new_empty((rows,), dtype=wide), student.new_empty((rows, 5), dtype=wide)


_divergence_rows.register_fake(_forward_fake)


def _gradient(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    stats: Tensor,
    kind: str,
    mix: float,
    how_s: list[float],
    how_t: list[float],
    backend: str | None,
) -> Tensor:
    out = torch.empty_like(student, memory_format=torch.contiguous_format)
    rows = vocabulary_rows.kernels(backend, student, teacher)
    rows.divergence_gradient(out, grad, student, teacher, stats, kind, mix, *_hows(how_s, how_t))
    return out


_rows_gradient = torch.library.custom_op(
    "cl_fast::divergence_rows_gradient", _gradient, mutates_args=()
)


def _gradient_fake(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    stats: Tensor,
    kind: str,
    mix: float,
    how_s: list[float],
    how_t: list[float],
    backend: str | None,
) -> Tensor:
    return torch.empty_like(student, memory_format=torch.contiguous_format)


_rows_gradient.register_fake(_gradient_fake)


def _gradient_(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    stats: Tensor,
    kind: str,
    mix: float,
    how_s: list[float],
    how_t: list[float],
    backend: str | None,
) -> None:
    rows = vocabulary_rows.kernels(backend, student, teacher)
    rows.divergence_gradient(
        student, grad, student, teacher, stats, kind, mix, *_hows(how_s, how_t)
    )


_rows_gradient_ = torch.library.custom_op(
    "cl_fast::divergence_rows_gradient_", _gradient_, mutates_args=("student",)
)


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, *ctx.options, ctx.inplace, ctx.backend = inputs
    ctx.save_for_backward(student, teacher, output[1])
    ctx.mark_non_differentiable(output[1])


def _rows_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    if ctx.needs_input_grad[1]:
        raise RuntimeError("the teacher of a divergence has no gradient: detach it")
    student, teacher, stats = ctx.saved_tensors
    arguments = (grad.contiguous(), student, teacher, stats, *ctx.options, ctx.backend)
    with torch.no_grad():
        if ctx.inplace:
            # A second backward pass would read what this one wrote; torch refuses it by versions.
            _rows_gradient_(*arguments)
            gradient = student.detach()
        else:
            gradient = _rows_gradient(*arguments)
    return (once(gradient), *[None] * 7)


_divergence_rows.register_autograd(_rows_backward, setup_context=_rows_setup)


def divergence_rows(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: str = "forward_kl",
    mix: float = 0.5,
    how: How = _PLAIN,
    teacher_how: How = _PLAIN,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The divergence of each row, float32 (float64 where an input is): [M].

    Args:
        student: [M, V] logits.
        teacher: [M, Vt] logits, or probabilities where `teacher_how.probs`; Vt <= V, and what the
            teacher lacks has probability 0. No gradient reaches it.
        kind, mix: see `cl_fast.ops.vocabulary_rows`.
        how, teacher_how: scale, softcap and temperature of each side.
        inplace: the backward pass writes the gradient over `student`; nothing else may need it.
        backend: "eager", "native" or "triton", for tests and benchmarks.
    """
    return _divergence_rows(
        student, teacher, kind, mix, list(how[:3]), list(map(float, teacher_how)), inplace, backend
    )[0]


# --- a head without its logits -----------------------------------------------------------------


def counting_rows(row_weight: Tensor | None) -> Tensor | None:
    """Indices of the rows whose weight is not 0; None: all, or unknown while a graph is captured.

    Asks the host how many there are, which on a card waits for it.
    """
    if row_weight is None:
        return None
    if row_weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    return row_weight.nonzero()[:, 0]


def _check_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    row_weight: Tensor | None,
    labels: Tensor | None,
    ce_weight: float,
    kind: str,
    mix: float,
    how_s: How,
    how_t: How,
) -> None:
    device = hidden.device
    check_kind(kind, mix)
    check_matrix("hidden", hidden, device)
    check_matrix("weight", weight, device)
    check_matrix("teacher", teacher, device)
    if weight.size(1) != hidden.size(1):
        raise ValueError(
            f"weight must have {hidden.size(1)} columns like hidden; got {weight.size(1)}"
        )
    rows, columns = hidden.size(0), weight.size(0)
    if columns == 0:
        raise ValueError("weight must have at least one row; got none")
    if teacher.size(0) != rows:
        raise ValueError(f"teacher must have the {rows} rows of hidden; got {teacher.size(0)}")
    teacher_columns = teacher.size(1)
    if teacher_weight is not None:
        check_matrix("teacher.weight", teacher_weight, device)
        if teacher_weight.size(1) != teacher.size(1):
            raise ValueError(
                f"teacher.weight must have {teacher.size(1)} columns like teacher.hidden; "
                f"got {teacher_weight.size(1)}"
            )
        teacher_columns = teacher_weight.size(0)
        check_vector("teacher.bias", teacher_bias, teacher_columns, "token id", device)
    if not 0 < teacher_columns <= columns:
        raise ValueError(
            f"teacher must have the {columns} token ids of the student, or fewer; "
            f"got {teacher_columns}"
        )
    check_vector("bias", bias, columns, "token id", device)
    check_vector("token_weight", row_weight, rows, "token", device)
    check_vector("labels", labels, rows, "token", device)
    if ce_weight and labels is None:
        raise ValueError("ce_weight needs labels")
    check_how("", how_s)
    check_how("teacher ", how_t)


def _linear_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    row_weight: Tensor | None,
    labels: Tensor | None,
    ce_weight: float,
    kind: str,
    mix: float,
    how_s: list[float],
    how_t: list[float],
    chunk_tokens: int | None,
    needed: list[bool],
    uniform: bool,
    measure: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    student_how, teacher_how = _hows(how_s, how_t)
    _check_linear(
        hidden, weight, bias, teacher, teacher_weight, teacher_bias, row_weight, labels,
        ce_weight, kind, mix, student_how, teacher_how,
    )  # fmt: skip
    index = counting_rows(row_weight)
    if row_weight is not None and index is None:
        # Their gradient is 0, and 0 times what they hold must be 0 in the gradient of the weight.
        hidden = torch.where(row_weight[:, None] == 0, 0, hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        student = Head(hidden, weight, bias, index, recycle=True)
        other = (
            None
            if teacher_weight is None
            else Head(teacher, teacher_weight, teacher_bias, index, recycle=True)
        )
        tensors = [hidden, weight, teacher, *([] if teacher_weight is None else [teacher_weight])]
        rows = vocabulary_rows.kernels(backend, *tensors)
        loss, aux, gradients = _by_chunks(
            student, other, teacher, row_weight, labels, ce_weight, kind, mix, student_how,
            teacher_how, chunk_tokens, needed, uniform, measure, rows,
        )  # fmt: skip
    none = loss.new_empty(0)
    return (
        loss,
        aux,
        none if gradients.hidden is None else gradients.hidden,
        none.clone() if gradients.weight is None else gradients.weight,
        none.clone() if gradients.bias is None else gradients.bias,
    )


_linear_divergence = torch.library.custom_op(
    "cl_fast::linear_divergence", _linear_forward, mutates_args=()
)


def _unit_weights(
    weights: Tensor, row_weight: Tensor | None, gradients: HeadGradients
) -> tuple[Tensor | None, Tensor]:
    """The factors of the sums, and what is left of the weights for the gradients of the logits.

    A weight of 1 / tokens would take the gradients of float16 logits into the subnormals before
    the factor of a gradient scaler comes. So the rows of hidden states take their weights after the
    product; sums over rows take the power of two that brings the largest one to 1.
    """
    if row_weight is None or not gradients.wanted:
        return None, weights
    if gradients.weight is None and gradients.bias is None:
        return weights, (weights != 0).to(weights.dtype)
    if not weights.numel():
        return None, weights
    largest = weights.abs().amax()
    power = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
    return power, weights / power


def _by_chunks(
    student: Head,
    other: Head | None,
    teacher: Tensor,
    row_weight: Tensor | None,
    labels: Tensor | None,
    ce_weight: float,
    kind: str,
    mix: float,
    how_s: How,
    how_t: How,
    chunk_tokens: int | None,
    needed: list[bool],
    uniform: bool,
    measure: bool,
    kernels: Any,
) -> tuple[Tensor, Tensor, HeadGradients]:
    """Losses [M], cross-entropies and entropies [M, 2] (or empty), and the gradients."""
    hidden, weight, index, wide = student.hidden, student.weight, student.index, student.wide
    need_hidden, need_weight, need_bias = needed
    gradients = HeadGradients(student, need_hidden, need_weight and uniform, need_bias and uniform)
    count = hidden.size(0) if index is None else index.size(0)
    wide = wide if other is None else torch.promote_types(wide, other.wide)
    wide = torch.promote_types(wide, wide_dtype(teacher))
    losses = hidden.new_zeros(count, dtype=wide)
    aux = hidden.new_zeros((count, 2) if measure else (0, 2), dtype=wide)
    if row_weight is None:
        weights = hidden.new_ones(count, dtype=wide)
    else:
        weights = (row_weight if index is None else row_weight[index]).to(wide)
    scale, unit = _unit_weights(weights, row_weight, gradients)
    if labels is not None and index is not None:
        labels = labels[index]
    many = 8 if gradients.weight is not None else 32
    size = CPU_CHUNK_BYTES if hidden.is_cpu else CHUNK_BYTES
    for part in chunks(count, weight.size(0), chunk_tokens, many, size):
        z = student.logits(part)
        if other is not None:
            t = other.logits(part)
        else:
            t = teacher[part] if index is None else teacher.index_select(0, index[part])
        loss, stats = kernels.divergence_forward(z, t, kind, mix, how_s, how_t)
        extra = None
        if ce_weight or measure:
            ids = labels[part] if labels is not None else torch.full_like(loss, -1).long()
            plain = kernels.logprob_forward(z, ids, how_s._replace(temperature=1.0))
            entropy = plain[:, 1] - plain[:, 2]
            ce = torch.where(ids < 0, 0, plain[:, 1] - (plain[:, 3] - plain[:, 0]))
            if measure:
                aux[part] = torch.stack([ce, entropy], 1).to(wide)
            if ce_weight:
                loss = loss + ce_weight * ce
                upstream = torch.where(ids < 0, 0, unit[part] * ce_weight)
                extra = Extra(upstream, plain[:, :2].contiguous(), ids)
        losses[part] = loss
        if gradients.wanted:
            out = gradients.target(z)
            kernels.divergence_gradient(
                out, unit[part], z, t, stats, kind, mix, how_s, how_t, extra
            )
            gradients.add(part, out)
            del out
        del z, t  # else the next chunk's logits are made beside them
    if scale is not None:
        gradients.scale(scale)
    if row_weight is not None:
        losses = torch.where(weights == 0, 0, losses * weights)
        if index is None:
            aux = torch.where(weights[:, None] == 0, 0, aux) if measure else aux
    if index is not None:
        losses = hidden.new_zeros(hidden.size(0), dtype=wide).index_copy_(0, index, losses)
        if measure:
            aux = hidden.new_zeros((hidden.size(0), 2), dtype=wide).index_copy_(0, index, aux)
    return losses, aux, gradients


def _linear_forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    row_weight: Tensor | None,
    labels: Tensor | None,
    ce_weight: float,
    kind: str,
    mix: float,
    how_s: list[float],
    how_t: list[float],
    chunk_tokens: int | None,
    needed: list[bool],
    uniform: bool,
    measure: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_linear(
        hidden, weight, bias, teacher, teacher_weight, teacher_bias, row_weight, labels,
        ce_weight, kind, mix, *_hows(how_s, how_t),
    )  # fmt: skip
    own = wide_dtype(hidden, weight)
    wide = wide_dtype(
        hidden, weight, teacher, *([] if teacher_weight is None else [teacher_weight])
    )
    rows = hidden.size(0)
    return (
        hidden.new_empty((rows,), dtype=wide),
        hidden.new_empty((rows if measure else 0, 2), dtype=wide),
        hidden.new_empty(hidden.shape if needed[0] else (0,), dtype=own),
        hidden.new_empty(weight.shape if needed[1] and uniform else (0,), dtype=own),
        hidden.new_empty((weight.size(0),) if needed[2] and uniform else (0,), dtype=own),
    )


_linear_divergence.register_fake(_linear_forward_fake)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options = inputs[:8], inputs[8:]
    *_, ctx.needed, ctx.uniform, _measure, _backend = inputs
    ctx.hidden_dtype, ctx.weight_dtype = inputs[0].dtype, inputs[1].dtype
    ctx.bias_dtype = None if inputs[2] is None else inputs[2].dtype
    again = (ctx.needed[1] or ctx.needed[2]) and not ctx.uniform
    ctx.given = [x is not None for x in tensors] if again else []
    ctx.save_for_backward(*output[2:], *([x for x in tensors if x is not None] if again else []))
    ctx.mark_non_differentiable(*output[1:])


def _linear_gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    d_hidden, d_weight, d_bias, *saved = ctx.saved_tensors
    need_hidden, need_weight, need_bias = ctx.needed
    wide = d_hidden.dtype
    if ctx.given:
        rest = iter(saved)
        tensors = [next(rest) if given else None for given in ctx.given]
        tensors[6] = grad if tensors[6] is None else tensors[6] * grad
        options = list(ctx.options)
        options[-4:-1] = [False, need_weight, need_bias], True, False
        d_weight, d_bias = _linear_divergence(*tensors, *options)[3:]
    elif need_weight or need_bias:
        # One number for all rows; none where there are no rows.
        common = grad[:1].sum().to(wide)
        d_weight, d_bias = d_weight * common, d_bias * common
    out: list[Tensor | None] = [None] * 3
    if need_hidden:
        # A row that the caller dropped owes nothing, whatever it holds.
        g = grad[:, None].to(wide)
        out[0] = torch.where(g == 0, 0, d_hidden * g).to(ctx.hidden_dtype)
    if need_weight:
        out[1] = d_weight.to(ctx.weight_dtype)
    if need_bias:
        out[2] = d_bias.to(ctx.bias_dtype)
    return out


def _linear_backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    with torch.no_grad():
        gradients = _linear_gradients(ctx, grad)
    rest = [None] * (5 + len(ctx.options))
    return (*(None if x is None else once(x) for x in gradients), *rest)


_linear_divergence.register_autograd(_linear_backward, setup_context=_linear_setup)


def linear_divergence_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    *,
    row_weight: Tensor | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    kind: str = "forward_kl",
    mix: float = 0.5,
    how: How = _PLAIN,
    teacher_how: How = _PLAIN,
    chunk_tokens: int | None = None,
    uniform: bool = False,
    measure: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses of the rows, and what was measured of them.

    Args:
        hidden: [M, H].
        weight, bias: [V, H], [V] or None; the student's head.
        teacher: [M, Vt] logits (probabilities where `teacher_how.probs`), or [M, Ht] hidden states
            where `teacher_weight` [Vt, Ht] is given; Vt <= V.
        row_weight: [M]; rows of weight 0 take no part. None: 1.
        labels: int64 [M], a negative one has no cross-entropy.
        uniform: a promise that all rows will receive the same gradient.
        measure: give cross-entropy and entropy too.

    Returns:
        Losses [M] and, where `measure`, [M, 2]: cross-entropy and entropy of the student at
        temperature 1, without gradients.
    """
    wanted = torch.is_grad_enabled()
    needed = [wanted and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    out = _linear_divergence(
        hidden, weight, bias, teacher, teacher_weight, teacher_bias, row_weight, labels,
        ce_weight, kind, mix, list(how[:3]), list(map(float, teacher_how)), chunk_tokens, needed,
        uniform, measure, backend,
    )  # fmt: skip
    return out[0], out[1]
