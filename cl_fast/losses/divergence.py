"""Divergences from a student to a teacher, with and without logits.

    loss = sum_i w_i (D_i + c CE_i) / N     i: tokens that count; N: `denom`, or how many they are

The kinds D and their gradients are tabled in `cl_fast.ops.vocabulary_rows`. Nothing is added that
was not asked for: no cross-entropy (`ce_weight`), no factor T^2, no local mean where the caller
knows the denominator of the whole batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from cl_fast.losses.teachers import Hidden, Logits, Probs, Teacher, TopK
from cl_fast.ops.divergences import check_kind, divergence_rows, linear_divergence_rows
from cl_fast.ops.vocabulary_rows import How

__all__ = ["Measured", "divergence_from_logits", "linear_divergence"]

Kind = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"]
Reduction = Literal["mean", "sum", "none"]
PadVocab = Literal["zero", "shared"]


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured on the way, without gradients; 0 for tokens that do not count.

    Attributes:
        entropy: [...] of the student at temperature 1, in nats; None with a `TopK`, which need not
            look at the whole vocabulary (`token_logprobs` gives both).
        cross_entropy: [...] of the labels at temperature 1; None without labels or with a `TopK`.
        student_mass, teacher_mass: [...] probability on the support of a `TopK`; else None.
        count: 0-dim, how many tokens count.
    """

    entropy: Tensor | None
    cross_entropy: Tensor | None
    student_mass: Tensor | None
    teacher_mass: Tensor | None
    count: Tensor


def kind_and_mix(kind: str, beta: float, skew: float) -> tuple[str, float]:
    """The kind as the kernels have it, and the weight of its mixture.

    Raises:
        ValueError: there is no such kind, or its weight is out of range.
    """
    if kind == "jsd":
        if beta in (0, 1):  # the limits of JSD(beta) / beta, as its paper and peers define them
            return ("reverse_kl" if beta else "forward_kl"), 0.5
        check_kind(kind, beta)
        return kind, beta
    check_kind(kind, skew)
    return kind, skew


def _check_teacher(teacher: Teacher) -> None:
    if not isinstance(teacher, (Hidden, Logits, Probs, TopK)):
        raise TypeError(
            f"teacher must be Hidden, Logits, Probs or TopK; got {type(teacher).__name__}"
        )
    tensors = ("hidden", "weight", "bias", "logits", "probs", "ids", "logprobs")
    check_tensors(**{f"teacher.{k}": v for k, v in vars(teacher).items() if k in tensors})
    for name, value in vars(teacher).items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"teacher.{name} must not require grad, since no gradient reaches a teacher: "
                "detach it, or compute it under torch.no_grad()"
            )


def check_tensors(**arguments: object) -> None:
    """Raise unless every argument that was given is a tensor."""
    for name, x in arguments.items():
        if x is None or isinstance(x, Tensor):
            continue
        hint = ""
        if isinstance(x, torch.nn.Module):
            hint = ": give its .weight" + (", and its .bias as bias" if name == "weight" else "")
        elif isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor):
            hint = ": give the last of them"
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}{hint}")


def _check_shape(
    name: str, x: Tensor | None, lead: torch.Size, device: torch.device | None
) -> None:
    if x is None:
        return
    if x.shape != lead:
        raise ValueError(
            f"{name} must have the shape of the tokens, {tuple(lead)}; got {tuple(x.shape)}"
        )
    if device is not None and x.device != device:
        raise ValueError(f"{name} must be on the device of the student, {device}; got {x.device}")


def check_labels(labels: Tensor, columns: int, ignore_index: int, debug: bool = False) -> None:
    """Raise unless every label is `ignore_index` or a token id.

    On a card the check is an assertion on the device, which stops nothing and asks nothing; with
    `debug` it is made on the host.
    """
    if labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers; got {labels.dtype}")
    labels = labels.long()  # compared as uint8, -100 would be 156
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= columns))
    if torch.compiler.is_compiling() or (wrong.is_cuda and not debug):
        torch._assert_async(~wrong.any(), f"labels must be below {columns}, or {ignore_index}")
    elif wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"labels must be in [0, {columns}) or {ignore_index}; got {int(labels[at])} at {at}"
        )


def check_finite(**tensors: Tensor | None) -> None:
    """The debug check; on a card it waits for it.

    Raises:
        ValueError: a tensor holds NaN; or infinity, unless it is named as logits or a teacher's,
            where that excludes a token.
    """
    for name, x in tensors.items():
        if x is None or not x.dtype.is_floating_point:
            continue
        excludes = name == "logits" or name.startswith("teacher.log")
        bad = x.isnan() | (x == torch.inf) if excludes else ~x.isfinite()
        if bad.any():
            at = tuple(bad.nonzero()[0].tolist())
            raise ValueError(
                f"{name} must be finite; got {float(x[at])} at {at}, "
                f"{int(bad.sum())} such numbers in all"
            )


def row_weights(
    labels: Tensor | None,
    token_weight: Tensor | None,
    ignore_index: int,
    lead: torch.Size,
    device: torch.device | None = None,
) -> Tensor | None:
    """One weight per token, 0 where it does not count: [M]; None: all are 1.

    Raises:
        ValueError: a shape differs from that of the tokens, a device from `device`, or
            token_weight requires grad.
    """
    _check_shape("labels", labels, lead, device)
    _check_shape("token_weight", token_weight, lead, device)
    if token_weight is not None and token_weight.requires_grad:
        raise ValueError(
            "token_weight must not require grad: detach it, or multiply the result of "
            'reduction="none" by it'
        )
    weight = None
    if token_weight is not None:
        weight = token_weight.reshape(-1)
        if not weight.dtype.is_floating_point:
            weight = weight.to(torch.float32)
    if labels is not None:
        kept = labels.reshape(-1).long() != ignore_index
        # where, not a product: a weight of NaN on a masked token must not count.
        weight = kept.to(torch.float32) if weight is None else torch.where(kept, weight, 0)
    return weight


def reduce(
    losses: Tensor,
    weight: Tensor | None,
    reduction: str,
    denom: float | Tensor | None,
    lead: torch.Size,
) -> Tensor:
    """Losses [M] of weighted rows to what the caller asked for."""
    if reduction == "none":
        return losses.reshape(lead)
    total = losses.sum()
    if reduction == "sum":
        return total
    if denom is None:
        denom = count_of(losses, weight).clamp(min=1)
    # A tensor of one element is one number, whatever its shape and dtype.
    return total / (denom.reshape(()) if isinstance(denom, Tensor) else denom)


def count_of(losses: Tensor, weight: Tensor | None) -> Tensor:
    """How many rows count, 0-dim on their device."""
    if weight is None:
        return losses.new_full((), losses.numel())
    return torch.count_nonzero(weight).to(losses.dtype)


def check_reduction(reduction: str, denom: float | Tensor | None) -> None:
    """Raise unless the reduction exists and a denominator has a use."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be one of 'mean', 'sum', 'none'; got {reduction!r}")
    if denom is None:
        return
    if reduction != "mean":
        raise ValueError(f"denom needs reduction='mean'; got {reduction!r}")
    if isinstance(denom, Tensor) and denom.numel() != 1:
        raise ValueError(f"denom must be one number; got the shape {tuple(denom.shape)}")
    if not isinstance(denom, Tensor) and not denom > 0:
        raise ValueError(f"denom must be positive; got {denom}")


def flat(name: str, x: Tensor, lead: torch.Size) -> Tensor:
    """[..., N] to [M, N].

    Raises:
        ValueError: its leading shape is not that of the student's tokens.
    """
    if x.dim() == 0 or x.shape[:-1] != lead:
        raise ValueError(
            f"{name} must have the leading shape of the student, {tuple(lead)}; "
            f"got the shape {tuple(x.shape)}"
        )
    return _matrix(x)


def _matrix(x: Tensor) -> Tensor:
    """[..., N] to [M, N]; N may be 0."""
    return x[None] if x.dim() == 1 else x.flatten(0, -2)


def check_pad_vocab(pad_vocab: str | None, teacher: Teacher) -> None:
    """Raise unless `pad_vocab` exists and has a meaning for this teacher."""
    if pad_vocab not in (None, "zero", "shared"):
        raise ValueError(f"pad_vocab must be 'zero', 'shared' or None; got {pad_vocab!r}")
    if pad_vocab is not None and isinstance(teacher, TopK):
        raise ValueError(
            "pad_vocab has no meaning for a TopK teacher, whose ids must be the student's: leave "
            "it out, and leave out ids that the student lacks when the log-probs are made"
        )


def _check_pad(pad_vocab: str | None, columns: int, teacher_columns: int, kind: str) -> None:
    if columns == teacher_columns:
        return
    if pad_vocab is None:
        raise ValueError(
            f"student and teacher must have one vocabulary; got {columns} and {teacher_columns} "
            "token ids. If equal ids mean equal tokens and only the padding differs, say "
            "pad_vocab='shared' (compare the shared ids, both sides renormalised) or 'zero' (an "
            "id that the teacher lacks has probability 0)"
        )
    if pad_vocab == "zero" and columns > teacher_columns and kind == "reverse_kl":
        raise ValueError(
            "pad_vocab='zero' makes kind='reverse_kl' infinite, since the teacher gives "
            f"probability 0 to {columns - teacher_columns} ids of the student; use 'shared'"
        )


def support_temperature(teacher: TopK, temperature: float) -> float:
    """What the log-probs that are given must still be divided by, to be those at `temperature`.

    Raises:
        ValueError: they were made at another, and their tail is not known at this one.
    """
    if not (teacher.temperature > 0 and math.isfinite(teacher.temperature)):
        raise ValueError(f"teacher.temperature must be positive; got {teacher.temperature}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"teacher_temperature must be positive; got {temperature}")
    rest = temperature / teacher.temperature
    if rest != 1 and teacher.tail != "renorm":
        raise ValueError(
            f"the teacher's log-probs were made at temperature {teacher.temperature:g}, and its "
            f"tail is not known at {temperature:g}: make them at {temperature:g} and say "
            f"TopK(..., temperature={temperature:g}); or use tail='renorm', or "
            f"teacher_temperature={teacher.temperature:g}"
        )
    return rest


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """What a linear layer would cast its inputs to in this region."""
    device = next(x for x in tensors if x is not None).device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    # float64 stays, as F.linear has it; integers stay, to be refused.
    cast = (torch.bfloat16, torch.float16, torch.float32)
    return [x.to(dtype) if x is not None and x.dtype in cast else x for x in tensors]


def _measured(aux: Tensor, weight: Tensor | None, labels: Tensor | None, lead: torch.Size) -> Any:
    return Measured(
        entropy=aux[:, 1].reshape(lead),
        cross_entropy=None if labels is None else aux[:, 0].reshape(lead),
        student_mass=None,
        teacher_mass=None,
        count=count_of(aux[:, 0], weight),
    )


@overload
def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher,
    *,
    kind: Kind = ...,
    beta: float = ...,
    skew: float = ...,
    labels: Tensor | None = ...,
    token_weight: Tensor | None = ...,
    temperature: float = ...,
    teacher_temperature: float | None = ...,
    bias: Tensor | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    ce_weight: float = ...,
    denom: float | Tensor | None = ...,
    reduction: Reduction = ...,
    ignore_index: int = ...,
    pad_vocab: PadVocab | None = ...,
    chunk_tokens: int | None = ...,
    return_aux: Literal[False] = ...,
    debug: bool = ...,
    process_group: Any = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher,
    *,
    kind: Kind = ...,
    beta: float = ...,
    skew: float = ...,
    labels: Tensor | None = ...,
    token_weight: Tensor | None = ...,
    temperature: float = ...,
    teacher_temperature: float | None = ...,
    bias: Tensor | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    ce_weight: float = ...,
    denom: float | Tensor | None = ...,
    reduction: Reduction = ...,
    ignore_index: int = ...,
    pad_vocab: PadVocab | None = ...,
    chunk_tokens: int | None = ...,
    return_aux: Literal[True],
    debug: bool = ...,
    process_group: Any = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Measured]: ...


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher,
    *,
    kind: Kind = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    labels: Tensor | None = None,
    token_weight: Tensor | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ce_weight: float = 0.0,
    denom: float | Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    pad_vocab: PadVocab | None = None,
    chunk_tokens: int | None = None,
    return_aux: bool = False,
    debug: bool = False,
    process_group: Any = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Measured]:
    """The divergence of a student, given as hidden states and head, from a teacher.

    No more of the logits exists than a chunk of rows. Gradients reach hidden, weight and bias, each
    only where it requires grad; with a frozen head no gradient of the weight is computed. Under
    autocast hidden states and weights are cast as a linear layer casts them.

    Args:
        hidden: [..., H], the student's last hidden states.
        weight: [V, H], its head.
        teacher: `Hidden`, `Logits`, `Probs` or `TopK`.
        kind: "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl" or "tvd"; the
            first is KL(teacher || student).
        beta: of "jsd": the teacher's part of the mixture; 0 is "forward_kl", 1 "reverse_kl".
        skew: of the skewed kinds: lambda.
        labels: integer [...], the token that follows each row; `ignore_index` removes the row.
        token_weight: [...]; 0 removes the row. Its gradient is not computed.
        temperature: the student's logits are divided by it. No factor T^2 is added.
        teacher_temperature: by default `temperature`. A `TopK` says at which its log-probs were
            made; with a tail other than "renorm" it must be this one.
        bias: [V], or None.
        logit_scale, softcap: of the student's logits, see `Hidden`.
        ce_weight: of a cross-entropy with the labels, at temperature 1.
        denom: with reduction="mean": what the sum is divided by, for example the number of tokens
            of all micro-batches and ranks; a tensor stays on its device. By default the number of
            rows of this call that count, and at least 1.
        reduction: "mean", "sum", or "none": [...], 0 for rows that do not count.
        ignore_index: the label that removes a row.
        pad_vocab: for vocabularies whose ids agree but whose padding differs. "shared": both sides
            are renormalised on the shared ids. "zero": ids that the teacher lacks have probability
            0; ids that the student lacks are left out of the teacher, which is renormalised.
        chunk_tokens: rows of a chunk, by default chosen.
        return_aux: return what was measured on the way, too.
        debug: look for NaN, infinities and wrong labels first, in rows that do not count too. On
            a card this waits for it, and torch.compile breaks its graph there.
        process_group: the head is split over the ranks of this group by the vocabulary; see
            `cl_fast.losses.parallel`.
        backend: "eager", "native" or "triton", for tests and benchmarks.

    Returns:
        The loss, float32 (float64 where an input is); with `return_aux` also `Measured`. If no row
        counts it is 0, and its gradients are 0.

    Raises:
        TypeError, ValueError: an argument, named, is wrong.
    """
    kind_, mix = kind_and_mix(kind, beta, skew)
    check_reduction(reduction, denom)
    check_tensors(hidden=hidden, weight=weight, bias=bias, labels=labels, token_weight=token_weight)
    _check_teacher(teacher)
    check_pad_vocab(pad_vocab, teacher)
    if process_group is not None:
        from cl_fast.losses import parallel

        if return_aux:
            raise ValueError("return_aux is not offered with process_group")
        return parallel.linear_divergence(
            hidden, weight, teacher, kind=kind, beta=beta, skew=skew, labels=labels,
            token_weight=token_weight, temperature=temperature,
            teacher_temperature=teacher_temperature, bias=bias, logit_scale=logit_scale,
            softcap=softcap, ce_weight=ce_weight, denom=denom, reduction=reduction,
            ignore_index=ignore_index, pad_vocab=pad_vocab, chunk_tokens=chunk_tokens,
            debug=debug, process_group=process_group, backend=backend,
        )  # fmt: skip
    hidden, weight, teacher = (
        _plain("hidden", hidden), _plain("weight", weight), _plain_teacher(teacher)
    )  # fmt: skip
    bias = None if bias is None else _plain("bias", bias)
    if hidden.dim() == 0:
        raise ValueError("hidden must have a last dimension of hidden states; got a scalar")
    if weight.dim() != 2:
        raise ValueError(f"weight must be a matrix; got the shape {tuple(weight.shape)}")
    lead, columns = hidden.shape[:-1], weight.size(0)
    row_weight = row_weights(labels, token_weight, ignore_index, lead, hidden.device)
    if labels is not None:
        check_labels(labels, columns, ignore_index, debug)
    if debug:
        check_finite(
            hidden=hidden, weight=weight, bias=bias, token_weight=token_weight,
            **{f"teacher.{k}": v for k, v in vars(teacher).items() if isinstance(v, Tensor)},
        )  # fmt: skip
    how = How(float(logit_scale), _cap(softcap), float(temperature))
    heat = temperature if teacher_temperature is None else teacher_temperature
    rows = _matrix(hidden)
    cast, head, offset = _autocast(rows, weight, bias)
    assert cast is not None
    assert head is not None
    ids = None
    if labels is not None:
        flat_labels = labels.reshape(-1).long()
        ids = torch.where(flat_labels == ignore_index, -1, flat_labels)
    if isinstance(teacher, TopK):
        return _top_k(
            cast, head, offset, teacher, kind_, mix, how, support_temperature(teacher, heat),
            row_weight, ids, ce_weight,
            chunk_tokens, reduction, denom, lead, return_aux, debug, backend,
        )  # fmt: skip
    given, given_head, given_bias, teacher_how, teacher_columns = _dense(teacher, heat, lead)
    _check_pad(pad_vocab, columns, teacher_columns, kind_)
    shared = min(columns, teacher_columns)
    if teacher_columns > shared:
        if given_head is None:
            given = given[:, :shared]
        else:
            given_head = given_head[:shared]
            given_bias = None if given_bias is None else given_bias[:shared]
    if pad_vocab == "shared" and columns > shared:
        if ce_weight:
            raise ValueError(
                "ce_weight cannot be used with pad_vocab='shared' where the student's vocabulary "
                "is the larger: labels may lie outside; use 'zero', or add the cross-entropy"
            )
        head, offset, ids = head[:shared], None if offset is None else offset[:shared], None
    given, given_head, given_bias = _cast_teacher(given, given_head, given_bias)
    losses, aux = linear_divergence_rows(
        cast, head, offset, given, given_head, given_bias, row_weight=row_weight, labels=ids,
        ce_weight=float(ce_weight), kind=kind_, mix=mix, how=how, teacher_how=teacher_how,
        chunk_tokens=chunk_tokens, uniform=reduction != "none", measure=return_aux,
        backend=backend,
    )  # fmt: skip
    loss = reduce(losses, row_weight, reduction, denom, lead)
    return (loss, _measured(aux, row_weight, ids, lead)) if return_aux else loss


def _cap(softcap: float | None) -> float:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, or None; got {softcap}")
    return float(softcap or 0.0)


def _cast_teacher(
    given: Tensor, head: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Only a product is cast by autocast; logits and probabilities stay as they are."""
    if head is None:
        return given, None, None
    hidden, head, bias = _autocast(given, head, bias)
    assert hidden is not None
    return hidden, head, bias


def _plain(name: str, x: Tensor) -> Tensor:
    """A plain tensor: a distributed one is gathered, or refused with words."""
    if not hasattr(x, "device_mesh"):
        return x
    from cl_fast.losses import parallel

    return parallel.plain(name, x)


def _plain_teacher(teacher: Teacher) -> Teacher:
    fields = {k: v for k, v in vars(teacher).items() if isinstance(v, Tensor)}
    return replace(teacher, **{k: _plain(f"teacher.{k}", v) for k, v in fields.items()})


def _dense(
    teacher: Hidden | Logits | Probs, temperature: float, lead: torch.Size
) -> tuple[Tensor, Tensor | None, Tensor | None, How, int]:
    """Numbers, head and bias of a teacher, what makes them log-probs, and its vocabulary."""
    if isinstance(teacher, Hidden):
        how = How(float(teacher.logit_scale), _cap(teacher.softcap), float(temperature))
        hidden = flat("teacher.hidden", teacher.hidden, lead)
        if teacher.weight.dim() != 2:
            raise ValueError(
                f"teacher.weight must be a matrix; got the shape {tuple(teacher.weight.shape)}"
            )
        return hidden, teacher.weight, teacher.bias, how, teacher.weight.size(0)
    if isinstance(teacher, Logits):
        logits = flat("teacher.logits", teacher.logits, lead)
        return logits, None, None, How(temperature=float(temperature)), logits.size(1)
    if isinstance(teacher, Probs):
        probs = flat("teacher.probs", teacher.probs, lead)
        how = How(temperature=float(temperature), probs=True)
        return probs, None, None, how, probs.size(1)
    raise TypeError(f"teacher must be Hidden, Logits, Probs or TopK; got {type(teacher).__name__}")


def _top_k(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: TopK,
    kind: str,
    mix: float,
    how: How,
    teacher_temperature: float,
    row_weight: Tensor | None,
    labels: Tensor | None,
    ce_weight: float,
    chunk_tokens: int | None,
    reduction: str,
    denom: float | Tensor | None,
    lead: torch.Size,
    return_aux: bool,
    debug: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Measured]:
    from cl_fast.ops.supports import linear_topk

    losses, student_mass, teacher_mass = linear_topk(
        hidden, weight, bias, flat("teacher.ids", teacher.ids, lead),
        flat("teacher.logprobs", teacher.logprobs, lead), tail=teacher.tail, kind=kind, mix=mix,
        how=how, teacher_temperature=float(teacher_temperature), row_weight=row_weight,
        labels=labels, ce_weight=float(ce_weight), chunk_tokens=chunk_tokens,
        uniform=reduction != "none", debug=debug, backend=backend,
    )  # fmt: skip
    loss = reduce(losses, row_weight, reduction, denom, lead)
    if not return_aux:
        return loss
    count = count_of(losses, row_weight)
    return loss, Measured(None, None, student_mass.reshape(lead), teacher_mass.reshape(lead), count)


def divergence_from_logits(
    logits: Tensor,
    teacher: Teacher,
    *,
    kind: Kind = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    labels: Tensor | None = None,
    token_weight: Tensor | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ce_weight: float = 0.0,
    denom: float | Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    pad_vocab: PadVocab | None = None,
    inplace: bool = False,
    debug: bool = False,
    process_group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """The divergence of a student, given as logits, from a teacher.

    One pass forward, which keeps five numbers per row, and one pass backward. Arguments, results
    and errors are those of `linear_divergence`, and:

    Args:
        logits: [..., V], of the student.
        teacher: `Logits`, `Probs` or `TopK`; a `Hidden` belongs to `linear_divergence`.
        logit_scale, softcap: still to be applied to the logits; most models have done so.
        ce_weight: of a cross-entropy with the labels, at temperature 1: a second pass over the
            logits each way, so not with `inplace`.
        inplace: the backward pass writes the gradient over the logits and so needs no memory; they
            must not be used for anything else. A second backward pass is refused by torch.
    """
    kind_, mix = kind_and_mix(kind, beta, skew)
    check_reduction(reduction, denom)
    check_tensors(logits=logits, labels=labels, token_weight=token_weight)
    _check_teacher(teacher)
    if isinstance(teacher, Hidden):
        raise TypeError(
            "teacher must be Logits, Probs or TopK where the student is given as logits; got "
            "Hidden: use linear_divergence, or teacher.hidden @ teacher.weight.T"
        )
    check_pad_vocab(pad_vocab, teacher)
    if ce_weight:
        if inplace:
            raise ValueError(
                "ce_weight and inplace=True cannot be had together: two gradients would be "
                "written over the same logits"
            )
        if labels is None:
            raise ValueError("ce_weight needs labels")
    if process_group is not None:
        from cl_fast.losses import parallel

        if ce_weight:
            raise ValueError(
                "ce_weight is not offered here with process_group: subtract ce_weight times "
                "token_logprobs_from_logits(..., process_group=...)"
            )
        return parallel.divergence_from_logits(
            logits, teacher, kind=kind, beta=beta, skew=skew, labels=labels,
            token_weight=token_weight, temperature=temperature,
            teacher_temperature=teacher_temperature, logit_scale=logit_scale, softcap=softcap,
            denom=denom, reduction=reduction, ignore_index=ignore_index, pad_vocab=pad_vocab,
            inplace=inplace, debug=debug, process_group=process_group, backend=backend,
        )  # fmt: skip
    logits, teacher = _plain("logits", logits), _plain_teacher(teacher)
    if logits.dim() == 0:
        raise ValueError("logits must have a last dimension of token ids; got a scalar")
    lead, columns = logits.shape[:-1], logits.size(-1)
    row_weight = row_weights(labels, token_weight, ignore_index, lead, logits.device)
    if labels is not None:
        check_labels(labels, columns, ignore_index, debug)
    if debug:
        check_finite(
            logits=logits,
            token_weight=token_weight,
            **{f"teacher.{k}": v for k, v in vars(teacher).items() if isinstance(v, Tensor)},
        )
    how = How(float(logit_scale), _cap(softcap), float(temperature))
    heat = temperature if teacher_temperature is None else teacher_temperature
    rows = _matrix(logits)
    if isinstance(teacher, TopK):
        from cl_fast.ops.supports import topk_from_logits

        losses, _, _ = topk_from_logits(
            rows, flat("teacher.ids", teacher.ids, lead),
            flat("teacher.logprobs", teacher.logprobs, lead), tail=teacher.tail, kind=kind_,
            mix=mix, how=how, teacher_temperature=support_temperature(teacher, heat),
            row_weight=row_weight, inplace=inplace, debug=debug, backend=backend,
        )  # fmt: skip
    else:
        assert not isinstance(teacher, Hidden)
        losses = _dense_rows(
            rows, teacher, kind_, mix, how, heat, lead, row_weight, pad_vocab, inplace, backend
        )
    if ce_weight and labels is not None:
        losses = losses + _hard(rows, labels, how, ignore_index, ce_weight, row_weight, backend)
    return reduce(losses, row_weight, reduction, denom, lead)


def _dense_rows(
    rows: Tensor,
    teacher: Logits | Probs,
    kind: str,
    mix: float,
    how: How,
    teacher_temperature: float,
    lead: torch.Size,
    row_weight: Tensor | None,
    pad_vocab: str | None,
    inplace: bool,
    backend: str | None,
) -> Tensor:
    """Weighted losses of rows of logits and a teacher over the vocabulary: [M]."""
    given, _, _, teacher_how, teacher_columns = _dense(teacher, teacher_temperature, lead)
    columns = rows.size(1)
    _check_pad(pad_vocab, columns, teacher_columns, kind)
    shared = min(columns, teacher_columns)
    if teacher_columns > shared:
        given = given[:, :shared]
    if pad_vocab == "shared" and columns > shared:
        rows = rows[:, :shared]
    losses = divergence_rows(
        rows, given, kind=kind, mix=mix, how=how, teacher_how=teacher_how, inplace=inplace,
        backend=backend,
    )  # fmt: skip
    return losses if row_weight is None else _weighted(losses, row_weight)


def _weighted(losses: Tensor, row_weight: Tensor) -> Tensor:
    # The gradient of a row that does not count is 0 before it meets the row's numbers.
    counts = row_weight != 0
    return torch.where(counts, losses, 0) * torch.where(counts, row_weight, 0).to(losses.dtype)


def _hard(
    rows: Tensor,
    labels: Tensor,
    how: How,
    ignore_index: int,
    ce_weight: float,
    row_weight: Tensor | None,
    backend: str | None,
) -> Tensor:
    """Weighted cross-entropies of rows of logits at temperature 1: [M]."""
    from cl_fast.ops.logprobs import logprob_rows

    logprobs, _ = logprob_rows(
        rows, labels.reshape(-1).long(), ignore=ignore_index, how=how._replace(temperature=1.0),
        backend=backend,
    )  # fmt: skip
    hard = -ce_weight * logprobs
    return hard if row_weight is None else _weighted(hard, row_weight)
