"""Losses over a vocabulary that is split over ranks, and tensors that are distributed.

With `process_group` the public functions end here. Rank r gives the rows `weight_r` [V_r, H] of the
head (in the order of the ranks, of any sizes), its part of the bias, the same hidden states, labels
and weights of tokens as the other ranks, and of the teacher: `Hidden` with its rows of that head,
`Logits` or `Probs` with its columns, or a whole `TopK` with ids of the whole vocabulary. Every rank
gets the loss that one rank with the whole head would get, the whole gradient of the hidden states,
and its part of those of weight and bias. `cl_fast.losses.shards` has the formulas and what travels.

A first message tells sizes and whether a rank refuses its arguments, so that all ranks raise where
one does. What each rank receives for the loss must be the same on all ranks, as it is where the
loss is what `backward` is called on.

Under torch.compile these functions break the graph, and run as they are.

A `DTensor` is made a plain tensor by `plain`, or refused with words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from cl_fast.losses.divergence import (
    _autocast,
    _cap,
    _cast_teacher,
    _check_pad,
    _dense,
    check_finite,
    check_labels,
    check_reduction,
    flat,
    kind_and_mix,
    reduce,
    row_weights,
    support_temperature,
)
from cl_fast.losses.shards import (
    Dense,
    Labels,
    Ranks,
    Support,
    Tokens,
    from_head,
    from_logits,
)
from cl_fast.losses.teachers import Hidden, Teacher, TopK
from cl_fast.ops import vocabulary_rows
from cl_fast.ops.divergences import check_how, check_kind, check_matrix, check_vector, counting_rows
from cl_fast.ops.heads import Head
from cl_fast.ops.supports import _check_support, _check_values, _Task
from cl_fast.ops.vocabulary_rows import How, wide_dtype

__all__ = [
    "divergence_from_logits",
    "linear_divergence",
    "plain",
    "token_logprobs",
    "token_logprobs_from_logits",
]


# --- distributed tensors -----------------------------------------------------------------------

_SPLITS_TENSORS = ("tp", "tensor", "tensor_parallel", "model", "model_parallel", "mp")
"""Names of the dimension of a mesh whose ranks hold parts of one model and the same data."""


class _Average(torch.autograd.Function):  # type: ignore[misc]
    """Of the gradients of ranks that are then summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad / ctx.ranks, None


def plain(name: str, x: Tensor) -> Tensor:
    """The whole of a tensor: a `DTensor` is gathered, and its gradient goes back as a `DTensor`.

    The gradient of a weight or a bias is the mean over the ranks of its mesh, each of which may
    have had other tokens: what DDP and FSDP2 make of it. Hidden states count as computed by all
    ranks of their mesh together: each keeps its part of a gradient that is the same on all.

    Args:
        name: of the argument, for messages.
        x: any tensor.

    Raises:
        ValueError: the vocabulary is split over the ranks, which `process_group` is for.
    """
    if not hasattr(x, "device_mesh"):
        return x
    mesh, parameter = x.device_mesh, name.rpartition(".")[2] in ("weight", "bias")
    for i, placement in enumerate(x.placements):
        if not placement.is_shard():
            continue
        dim = placement.dim % max(1, x.dim())
        if parameter and dim == 0 and _name(mesh, i) in _SPLITS_TENSORS:
            raise ValueError(
                f"{name} is a DTensor whose vocabulary is split over the mesh dimension "
                f"{_name(mesh, i)!r}: pass process_group=mesh.get_group({_name(mesh, i)!r}), and "
                f"the parts stay where they are; or gather it yourself with {name}.full_tensor()"
            )
        vocabulary = name.rpartition(".")[2] in ("logits", "probs") and dim == x.dim() - 1
        if vocabulary:
            raise ValueError(
                f"{name} is a DTensor whose last dimension, the vocabulary, is split over ranks: "
                f"pass it as it is with process_group= of these ranks, or gather it yourself with "
                f"{name}.full_tensor()"
            )
    if not (parameter and x.requires_grad and torch.is_grad_enabled()):
        whole: Tensor = x.full_tensor()
        return whole
    return _mean_back(x, [*range(mesh.ndim)])


def _name(mesh: Any, i: int) -> str:
    names = mesh.mesh_dim_names
    return names[i] if names else ""


def _mean_back(x: Any, dims: list[int]) -> Tensor:
    """The local part of `x` after it was gathered over `dims` of its mesh, whose gradient is
    averaged over them."""
    from torch.distributed.tensor import Partial, Replicate

    placements, back = list(x.placements), list(x.placements)
    ranks = 1
    for i in dims:
        placements[i], back[i] = Replicate(), Partial()
        ranks *= x.device_mesh.size(i)
    local = x.redistribute(placements=placements).to_local(grad_placements=back)
    out: Tensor = _Average.apply(local, ranks)
    return out


def _shard(name: str, x: Tensor, ranks: Ranks) -> Tensor:
    """This rank's part of a tensor that holds the vocabulary; a plain tensor is one already."""
    if not hasattr(x, "device_mesh"):
        return x
    import torch.distributed as dist

    mesh = x.device_mesh
    members = dist.get_process_group_ranks(ranks.group)
    over = [
        i for i in range(mesh.ndim) if dist.get_process_group_ranks(mesh.get_group(i)) == members
    ]
    dim = x.dim() - 1 if name.rpartition(".")[2] in ("logits", "probs") else 0
    if not (
        over
        and x.placements[over[0]].is_shard()
        and x.placements[over[0]].dim % max(1, x.dim()) == dim
    ):
        raise ValueError(
            f"{name} is a DTensor that is not split by the vocabulary, dimension {dim}, over the "
            f"ranks of process_group; got {x.placements} on {mesh}. Leave out process_group, or "
            f"pass this rank's part of {name} as a plain tensor"
        )
    others = [i for i in range(mesh.ndim) if i != over[0]]
    return _mean_back(x, others)


def _teacher_shard(teacher: Teacher, ranks: Ranks) -> Teacher:
    fields = dict(vars(teacher))
    for key, value in fields.items():
        if isinstance(value, Tensor):
            whole = key == "hidden" or isinstance(teacher, TopK)
            name = f"teacher.{key}"
            fields[key] = plain(name, value) if whole else _shard(name, value, ranks)
    return type(teacher)(**fields)


F = TypeVar("F", bound=Callable[..., Any])


def _eager(function: F) -> F:
    """What torch.compile runs as it is, after a break of the graph."""
    disabled: F = torch.compiler.disable(
        function, reason="the ranks of process_group first agree on sizes, on the host"
    )
    return disabled


# --- what the ranks agree on -------------------------------------------------------------------


class _Sizes(NamedTuple):
    """Columns of the ranks."""

    student: list[int]
    teacher: list[int]
    rank: int

    @property
    def total(self) -> int:
        return sum(self.student)

    @property
    def start(self) -> int:
        return sum(self.student[: self.rank])

    @property
    def columns(self) -> int:
        return max(self.student)


class _Offer(NamedTuple):
    """What a rank brings."""

    columns: int
    teacher_columns: int
    rows: int
    wide: torch.dtype
    gradients: list[bool]
    """Which tensors require one."""
    fingerprint: int
    """Of labels, weights and ids; 0 without `debug`."""
    device: torch.device


_MUST_AGREE = (
    "the number of tokens that count",
    "whether float64 is computed in",
    "which of hidden states, logits or head require grad",
    "labels, token_weight and ids (debug)",
)


def _agree(ranks: Ranks, prepare: Callable[[], tuple[_Offer, Any]], x: Tensor) -> tuple[Any, Any]:
    """Sizes of the shards and what `prepare` made; raises on all ranks if one cannot go on."""
    error: Exception | None = None
    offer, made = None, None
    row = [-1, 0, 0, 0, 0, 0]
    device = x.device
    try:
        offer, made = prepare()
    except Exception as found:
        error = found
    else:
        row = [
            offer.columns, offer.teacher_columns, offer.rows, offer.wide.itemsize,
            sum(g << i for i, g in enumerate(offer.gradients)), offer.fingerprint,
        ]  # fmt: skip
    table = ranks.table(row, device)
    if error is not None:
        raise error
    for rank, other in enumerate(table):
        if other[0] < 0:
            raise ValueError(f"rank {rank} of process_group refused its arguments; see its error")
    for what, *numbers in zip(_MUST_AGREE, *(other[2:] for other in table), strict=True):
        if len(set(numbers)) > 1:
            raise ValueError(f"the ranks of process_group must agree on {what}; got {numbers}")
    return _Sizes([y[0] for y in table], [y[1] for y in table], ranks.rank), made


def _fingerprint(*tensors: Tensor | None) -> int:
    total = 0
    for x in tensors:
        if x is not None and x.numel():
            values = x.reshape(-1).double()
            places = torch.arange(1, values.numel() + 1, device=x.device, dtype=torch.float64)
            total = (total * 31 + hash(float((values * places.sqrt()).sum()))) % (1 << 61)
    return total


def _expand(losses: Tensor, index: Tensor | None, count: int) -> Tensor:
    """[M, ...] from the rows that count, 0 elsewhere."""
    if index is None:
        return losses
    return losses.new_zeros((count, *losses.shape[1:])).index_copy(0, index, losses)


def _take(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    device = hidden.device
    check_matrix(f"{prefix}hidden", hidden, device)
    check_matrix(f"{prefix}weight", weight, device)
    if weight.size(1) != hidden.size(1):
        raise ValueError(
            f"{prefix}weight must have {hidden.size(1)} columns like {prefix}hidden; "
            f"got {weight.size(1)}"
        )
    if weight.size(0) == 0:
        raise ValueError(f"{prefix}weight must have at least one row on each rank; got none")
    check_vector(f"{prefix}bias", bias, weight.size(0), "token id", device)


def _check_split(sizes: _Sizes, pad_vocab: str | None, kind: str) -> None:
    """Raise unless the ranks hold the same ids of both sides."""
    student, teacher = sizes.student, sizes.teacher
    _check_pad(pad_vocab, sum(student), sum(teacher), kind)
    for rank, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
        if ours != theirs and (rank < len(student) - 1 or sum(student) == sum(teacher)):
            raise ValueError(
                "each rank of process_group must hold the same token ids of student and teacher "
                f"(only the last one may hold padding); rank {rank} holds {ours} and {theirs}"
            )


# --- divergences -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Side:
    """The student's rows and the teacher, as plain matrices of this rank."""

    rows: Tensor
    head: Tensor | None
    bias: Tensor | None
    teacher: Teacher
    given: Any
    """Of a dense teacher: numbers, head, bias, how."""
    lead: torch.Size
    weights: Tensor | None
    index: Tensor | None
    kind: str
    mix: float
    how: How
    heat: float
    wide: torch.dtype


def _prepare(
    ranks: Ranks,
    student: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    teacher: Teacher,
    kind: str,
    beta: float,
    skew: float,
    labels: Tensor | None,
    token_weight: Tensor | None,
    temperature: float,
    teacher_temperature: float | None,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    ce_weight: float,
    debug: bool,
    backend: str | None,
) -> tuple[_Offer, _Side]:
    """What can be checked and made without the other ranks."""
    kind, mix = kind_and_mix(kind, beta, skew)
    name = "logits" if weight is None else "hidden"
    if weight is None:
        student = _shard("logits", student, ranks)
    else:
        student, weight = plain("hidden", student), _shard("weight", weight, ranks)
        bias = None if bias is None else _shard("bias", bias, ranks)
    teacher = _teacher_shard(teacher, ranks)
    if student.dim() == 0:
        raise ValueError(f"{name} must have a last dimension; got a scalar")
    lead = student.shape[:-1]
    weights = row_weights(labels, token_weight, ignore_index, lead)
    if debug:
        check_finite(
            **{name: student}, weight=weight, bias=bias, token_weight=token_weight,
            **{f"teacher.{k}": v for k, v in vars(teacher).items() if isinstance(v, Tensor)},
        )  # fmt: skip
    if ce_weight and labels is None:
        raise ValueError("ce_weight needs labels")
    how = How(float(logit_scale), _cap(softcap), float(temperature))
    heat = float(temperature if teacher_temperature is None else teacher_temperature)
    check_kind(kind, mix)
    check_how("", how)
    check_how("teacher ", How(temperature=heat))
    if isinstance(teacher, TopK):
        heat = support_temperature(teacher, heat)
    rows = student.reshape(-1, student.size(-1))
    if weight is None:
        check_matrix("logits", rows, rows.device)
        if rows.size(1) == 0:
            raise ValueError("logits must have at least one column on each rank; got none")
        columns = rows.size(1)
    else:
        cast, weight, bias = _autocast(rows, weight, bias)
        assert cast is not None
        assert weight is not None
        rows = cast
        _check_head(rows, weight, bias)
        columns = weight.size(0)
    tensors = [x for x in (rows, weight) if x is not None]
    given, teacher_columns = None, 0
    if isinstance(teacher, TopK):
        flat("teacher.ids", teacher.ids, lead)
        tensors.append(flat("teacher.logprobs", teacher.logprobs, lead))
    else:
        numbers, head, offset, teacher_how, teacher_columns = _dense(teacher, heat, lead)
        check_how("teacher ", teacher_how)
        if numbers.device != rows.device:
            raise ValueError(
                f"teacher must be on the device of the student, {rows.device}; got {numbers.device}"
            )
        numbers, head, offset = _cast_teacher(numbers, head, offset)
        if head is None:
            check_matrix("teacher", numbers, rows.device)
            if numbers.size(1) == 0:
                raise ValueError("teacher must have at least one column on each rank; got none")
        else:
            _check_head(numbers, head, offset, "teacher.")
            tensors.append(head)
        tensors.append(numbers)
        given = numbers, head, offset, teacher_how
    vocabulary_rows.kernels(backend, *tensors)
    index = counting_rows(weights)
    wide = wide_dtype(*tensors)
    on = torch.is_grad_enabled()
    some = [on and x is not None and x.requires_grad for x in (rows, weight, bias)]
    offer = _Offer(
        columns, teacher_columns, rows.size(0) if index is None else index.size(0), wide,
        some,
        _fingerprint(labels, token_weight, *(
            (teacher.ids, teacher.logprobs) if isinstance(teacher, TopK) else ()
        )) if debug else 0,
        rows.device,
    )  # fmt: skip
    side = _Side(
        rows, weight, bias, teacher, given, lead, weights, index, kind, mix, how, heat, wide
    )
    return offer, side


def _labels_of(
    labels: Tensor | None, ignore_index: int, index: Tensor | None, sizes: _Sizes
) -> Labels | None:
    if labels is None:
        return None
    ids = labels.reshape(-1).long()  # compared as uint8, -100 would be 156
    ids = torch.where(ids == ignore_index, -1, ids)
    return Labels.of(_take(ids, index), sizes.start, sizes.student[sizes.rank])


def _rows_of(
    ranks: Ranks,
    sizes: _Sizes,
    side: _Side,
    labels: Tensor | None,
    ignore_index: int,
    ce_weight: float,
    pad_vocab: str | None,
    slopes: bool,
    debug: bool,
    backend: str | None,
) -> tuple[Dense | Support, int]:
    """Rows that know the teacher, and how many of the student's columns here take part."""
    index, teacher = side.index, side.teacher
    weights = None if side.weights is None else _take(side.weights, index).to(side.wide)
    if labels is not None:
        check_labels(labels, sizes.total, ignore_index, debug)
    ids = _labels_of(labels, ignore_index, index, sizes) if ce_weight else None
    columns = sizes.student[sizes.rank]
    tensors = [x for x in (side.rows, side.head) if x is not None]
    if isinstance(teacher, TopK):
        task = _Task(teacher.tail, side.kind, side.mix, side.how, side.heat, float(ce_weight))
        support = _take(flat("teacher.ids", teacher.ids, side.lead), index)
        if support.dtype.is_floating_point or support.dtype == torch.bool:
            raise TypeError(f"teacher.ids must be integers; got {support.dtype}")
        support = support.long()
        logprobs = _take(flat("teacher.logprobs", teacher.logprobs, side.lead), index)
        _check_support(support, logprobs, logprobs.size(0), sizes.total, side.rows.device, task)
        _check_values(support, logprobs, sizes.total, teacher.tail, debug)
        kernels = vocabulary_rows.kernels(backend, *tensors)
        return Support(
            ranks, kernels, support, logprobs, weights, ids, task, side.wide, sizes.start, columns,
            sizes.total, head=side.head is not None,
        ), columns  # fmt: skip
    _check_split(sizes, pad_vocab, side.kind)
    numbers, head, offset, teacher_how = side.given
    teacher_columns = sizes.teacher[sizes.rank]
    shared = min(columns, teacher_columns)
    if pad_vocab == "shared" and sizes.total > sum(sizes.teacher):
        if ce_weight:
            raise ValueError(
                "ce_weight cannot be used with pad_vocab='shared' where the student's vocabulary "
                "is the larger: labels may lie outside; use 'zero', or add the cross-entropy"
            )
        columns = shared
    given: Head | Tensor
    if head is None:
        given = numbers[:, :shared]
        tensors.append(numbers)
    else:
        offset = None if offset is None else offset[:shared]
        given = Head(numbers, head[:shared], offset, index)
        tensors += [numbers, head]
    return Dense(
        ranks, vocabulary_rows.kernels(backend, *tensors), given, index, weights, ids,
        float(ce_weight), side.kind, side.mix, side.how, teacher_how, side.wide, slopes,
    ), columns  # fmt: skip


@_eager
def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher,
    *,
    process_group: Any,
    kind: str = "forward_kl",
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
    reduction: str = "mean",
    ignore_index: int = -100,
    pad_vocab: str | None = None,
    chunk_tokens: int | None = None,
    debug: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`cl_fast.losses.linear_divergence` where this rank holds a part of the vocabulary.

    Args:
        hidden: [..., H], the same on all ranks.
        weight, bias: [V_r, H], [V_r] or None: this rank's part; a `DTensor` split over the group
            gives its part.
        teacher: this rank's part; a `TopK` is whole.
        process_group: a process group, or a device mesh of one dimension.
        debug: also compare labels, weights and ids of the ranks.
        (others): as for one rank, the same on all ranks.

    Raises:
        TypeError, ValueError: on every rank; where the others' arguments are wrong, naming them.
    """
    check_reduction(reduction, denom)
    ranks = Ranks(process_group)

    def prepare() -> tuple[_Offer, _Side]:
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1; got {chunk_tokens}")
        if weight.dim() != 2:
            raise ValueError(f"weight must be a matrix; got the shape {tuple(weight.shape)}")
        return _prepare(
            ranks, hidden, weight, bias, teacher, kind, beta, skew, labels, token_weight,
            temperature, teacher_temperature, logit_scale, softcap, ignore_index, ce_weight, debug,
            backend,
        )  # fmt: skip

    sizes, side = _agree(ranks, prepare, hidden)
    slopes = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (side.rows, side.head, side.bias)
    )
    rows, columns = _rows_of(
        ranks, sizes, side, labels, ignore_index, ce_weight, pad_vocab, slopes, debug, backend
    )
    losses = from_head(
        _take(side.rows, side.index), side.head[:columns],
        None if side.bias is None else side.bias[:columns], rows, columns=sizes.columns,
        chunk_tokens=chunk_tokens, uniform=reduction != "none",
    )  # fmt: skip
    losses = _expand(losses[:, 0], side.index, side.rows.size(0))
    return reduce(losses.to(side.wide), side.weights, reduction, denom, side.lead)


@_eager
def divergence_from_logits(
    logits: Tensor,
    teacher: Teacher,
    *,
    process_group: Any,
    kind: str = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    labels: Tensor | None = None,
    token_weight: Tensor | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    denom: float | Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    pad_vocab: str | None = None,
    inplace: bool = False,
    debug: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`cl_fast.losses.divergence_from_logits` where this rank holds logits [..., V_r].

    Args:
        logits, teacher: this rank's part; a `TopK` is whole.
        process_group: a process group, or a device mesh of one dimension.
        (others): as for one rank, the same on all ranks.

    Raises:
        TypeError, ValueError: on every rank.
    """
    check_reduction(reduction, denom)
    ranks = Ranks(process_group)

    def prepare() -> tuple[_Offer, _Side]:
        if isinstance(teacher, Hidden):
            raise TypeError("teacher must be Logits, Probs or TopK; got Hidden")
        offer, side = _prepare(
            ranks, logits, None, None, teacher, kind, beta, skew, labels, token_weight,
            temperature, teacher_temperature, logit_scale, softcap, ignore_index, 0.0, debug,
            backend,
        )  # fmt: skip
        # Logits are not copied for the sake of rows that do not count, whose numbers are not used.
        if side.index is not None and not isinstance(teacher, TopK):
            side = replace(side, index=None)
            offer = offer._replace(rows=side.rows.size(0))
        return offer, side

    sizes, side = _agree(ranks, prepare, logits)
    slopes = torch.is_grad_enabled() and side.rows.requires_grad
    rows, columns = _rows_of(
        ranks, sizes, side, labels, ignore_index, 0.0, pad_vocab, slopes, debug, backend
    )
    # Rows of a support are copied anyhow; here those that count.
    x = _take(side.rows, side.index)[:, :columns]
    losses = from_logits(x, rows, columns=sizes.columns, inplace=inplace)
    losses = _expand(losses[:, 0], side.index, side.rows.size(0))
    return reduce(losses.to(side.wide), side.weights, reduction, denom, side.lead)


# --- log-probs ---------------------------------------------------------------------------------


def _token_logprobs(
    student: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ids: Tensor,
    process_group: Any,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    entropy: bool,
    chunk_tokens: int | None,
    inplace: bool,
    debug: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    ranks = Ranks(process_group)

    def prepare() -> tuple[_Offer, Any]:
        x, head, offset = student, weight, bias
        name = "logits" if head is None else "hidden"
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1; got {chunk_tokens}")
        if head is None:
            x = _shard("logits", x, ranks)
        else:
            x, head = plain("hidden", x), _shard("weight", head, ranks)
            offset = None if offset is None else _shard("bias", offset, ranks)
        if x.dim() == 0 or ids.shape != x.shape[:-1]:
            raise ValueError(
                f"ids must have the leading shape of {name}, {tuple(x.shape[:-1])}; "
                f"got {tuple(ids.shape)}"
            )
        if ids.dtype.is_floating_point or ids.dtype == torch.bool:
            raise TypeError(f"ids must be integers; got {ids.dtype}")
        if debug:
            check_finite(**{name: x}, weight=head, bias=offset)
        how = How(float(logit_scale), _cap(softcap), float(temperature))
        check_how("", how)
        rows = x.reshape(-1, x.size(-1))
        if head is None:
            check_matrix("logits", rows, rows.device)
            if rows.size(1) == 0:
                raise ValueError("logits must have at least one column on each rank; got none")
        else:
            cast, head, offset = _autocast(rows, head, offset)
            assert cast is not None
            assert head is not None
            rows = cast
            _check_head(rows, head, offset)
        tensors = [y for y in (rows, head) if y is not None]
        kernels = vocabulary_rows.kernels(backend, *tensors)
        counts = ids.reshape(-1).long() != ignore_index
        index = None if head is None else counting_rows(counts)
        wide = wide_dtype(*tensors)
        on = torch.is_grad_enabled()
        some = [on and y is not None and y.requires_grad for y in (rows, head, offset)]
        offer = _Offer(
            rows.size(1) if head is None else head.size(0), 0,
            rows.size(0) if index is None else index.size(0), wide,
            some, _fingerprint(ids) if debug else 0,
            rows.device,
        )  # fmt: skip
        return offer, (rows, head, offset, kernels, how, index, counts, wide, x.shape[:-1])

    sizes, made = _agree(ranks, prepare, student)
    rows, head, offset, kernels, how, index, counts, wide, lead = made
    check_labels(ids, sizes.total, ignore_index, debug)
    picked = _labels_of(ids, ignore_index, index, sizes)
    assert picked is not None
    tokens = Tokens(ranks, kernels, picked, how, entropy, wide)
    if head is None:
        out = from_logits(rows, tokens, columns=sizes.columns, inplace=inplace)
        out = torch.where(counts[:, None], out, 0)
    else:
        out = from_head(
            _take(rows, index), head, offset, tokens, columns=sizes.columns,
            chunk_tokens=chunk_tokens,
        )  # fmt: skip
        out = _expand(out, index, rows.size(0))
    if entropy:
        return out[:, 0].reshape(lead), out[:, 1].reshape(lead)
    return out[:, 0].reshape(lead)


@_eager
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    process_group: Any,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    chunk_tokens: int | None = None,
    debug: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`cl_fast.losses.token_logprobs` where this rank holds a part of the vocabulary.

    Args:
        hidden: [..., H], the same on all ranks.
        weight, bias: [V_r, H], [V_r] or None: this rank's part.
        ids: integer [...], of the whole vocabulary.
        process_group: a process group, or a device mesh of one dimension.
        (others): as for one rank, the same on all ranks.

    Raises:
        TypeError, ValueError: on every rank.
    """
    return _token_logprobs(
        hidden, weight, bias, ids, process_group, logit_scale, softcap, temperature, ignore_index,
        entropy, chunk_tokens, False, debug, backend,
    )  # fmt: skip


@_eager
def token_logprobs_from_logits(
    logits: Tensor,
    ids: Tensor,
    *,
    process_group: Any,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    inplace: bool = False,
    debug: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same from this rank's logits [..., V_r].

    Raises:
        TypeError, ValueError: on every rank.
    """
    return _token_logprobs(
        logits, None, None, ids, process_group, logit_scale, softcap, temperature, ignore_index,
        entropy, None, inplace, debug, backend,
    )  # fmt: skip
