"""Divergences from a teacher that is known on k token ids of a row: its support S.

    q_i, i in S      the teacher's probabilities,  P = sum_S q
    p = softmax(z)   the student's,                Q = sum_S p

    tail     categories            teacher          student
    bucket   S and "anything else" q_i, 1 - P       p_i, 1 - Q
    none     S                     q_i              p_i            sums cut off, nothing made up for
    renorm   S                     q_i / P          p_i / Q

With u the student's probabilities of the categories and g_j = dD/du_j of a kind (the slopes of
`cl_fast.ops.vocabulary_rows`):

    h_j = u_j (g_j - sum u g)                     the gradient, were the categories all there is
    dL/dz_i = h_i on S,   dL/dz_v = h_tail p_v / (1 - Q) elsewhere

so a row is a small problem of k + 1 numbers, and one pass over the vocabulary outside of S, which
gives the log of its sum and then its softmax: 1 - Q is never a difference, however little is left.
In "none" g_tail = 0, and constants in the slopes count. In "renorm" the vocabulary cancels: only k
rows of the head are read for a token. Where k is so large that their scattered rows cost more than
the product with the whole head, that product is made instead.

What rounding leaves: the small problem is float64. The teacher's tail is 1 - P; where P > 1 the
q are scaled to sum to 1, and a tail below 2^-24 (2^-53 where a tensor is float64) is raised to it,
so that reverse KL stays finite. Where k = V there is no tail. A row whose log-probs agree with the
teacher's up to the rounding of float32 is equal to it: loss 0, and gradient 0 except in "none",
which has no minimum there.

A teacher temperature T other than 1 acts on the categories: q_j^(1/T), to sum 1. In "renorm" this
is what the teacher would have said at T. In "bucket" and "none" the tail is tempered as if it were
one token, which it is not: better give log-probs that were made at the temperature of the student.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_fast.ops import vocabulary_rows
from cl_fast.ops.divergences import (
    check_how,
    check_kind,
    check_matrix,
    check_vector,
    counting_rows,
    once,
)
from cl_fast.ops.heads import Head, HeadGradients, chunks
from cl_fast.ops.vocabulary_rows import How, _chain, _terms, _values, wide_dtype

__all__ = ["TAILS", "linear_topk", "topk_from_logits", "topk_logprobs"]

TAILS = ("bucket", "renorm", "none")
_PLAIN = How()
_SCATTERED = {"cpu": 16, "cuda": 128}
"""What a logit of a gathered row of the head costs, in logits of a product with the whole head."""
_GATHER_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Of the gathered rows of the head that exist at once. Fewer would stay in a CPU's cache, but each
chunk waits for all threads, which on a busy machine costs more than it saves."""
_BLOCK = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Logits that are copied at once, without their supports."""
_SUM_AT_MOST = 1.05
"""Log-probs in bfloat16 may sum to that much more than 1; more is a mistake."""


class _Task(NamedTuple):
    """What is asked, as far as a row is concerned."""

    tail: str
    kind: str
    mix: float
    how: How
    teacher_temperature: float
    ce_weight: float

    def has_tail(self, k: int, columns: int) -> bool:
        return self.tail != "renorm" and k < columns


def _how(numbers: list[float]) -> How:
    """From the list that a schema can hold."""
    scale, softcap, temperature = numbers
    return How(scale, softcap, temperature)


# --- checks ------------------------------------------------------------------------------------


def _check_support(
    ids: Tensor, logprobs: Tensor, rows: int, columns: int, device: torch.device, task: _Task
) -> None:
    if task.tail not in TAILS:
        raise ValueError(
            f"teacher.tail must be one of {', '.join(map(repr, TAILS))}; got {task.tail!r}"
        )
    check_kind(task.kind, task.mix)
    if ids.dtype != torch.int64:
        raise TypeError(f"teacher.ids must be int64; got {ids.dtype}")
    check_matrix("teacher.logprobs", logprobs, device)
    if ids.dim() != 2 or ids.shape != logprobs.shape:
        raise ValueError(
            "teacher.ids and teacher.logprobs must be matrices of one shape; "
            f"got {tuple(ids.shape)} and {tuple(logprobs.shape)}"
        )
    if ids.device != device:
        raise ValueError(
            f"teacher.ids must be on the device of the student, {device}; got {ids.device}"
        )
    if ids.size(0) != rows:
        raise ValueError(f"teacher must have the {rows} rows of the student; got {ids.size(0)}")
    if not 0 < ids.size(1) <= columns:
        raise ValueError(
            f"teacher must give between 1 and {columns} ids per row, the size of the vocabulary; "
            f"got {ids.size(1)}"
        )
    check_how("", task.how)
    if not (task.teacher_temperature > 0 and math.isfinite(task.teacher_temperature)):
        raise ValueError(f"teacher temperature must be positive; got {task.teacher_temperature}")
    if not math.isfinite(task.ce_weight):
        raise ValueError(f"ce_weight must be a finite number; got {task.ce_weight}")


def _check_values(ids: Tensor, logprobs: Tensor, columns: int, tail: str, debug: bool) -> None:
    """Raise where the numbers of a support make no sense; on a card assert it without waiting."""
    if ids.numel() == 0:
        return
    in_range = ((ids >= 0) & (ids < columns)).all()
    if ids.is_cuda:
        torch._assert_async(in_range, "teacher.ids: an id is outside of the vocabulary")
        if debug:
            pairs = ids.sort(1).values
            torch._assert_async(
                (pairs[:, 1:] != pairs[:, :-1]).all(), "teacher.ids: a row holds an id twice"
            )
            torch._assert_async(~logprobs.isnan().any(), "teacher.logprobs: a NaN")
            if tail != "renorm":
                torch._assert_async(
                    (logprobs.double().logsumexp(1) <= math.log(_SUM_AT_MOST)).all(),
                    "teacher.logprobs: the probabilities of a row sum to more than 1",
                )
        return
    if not in_range:
        bad = ids[(ids < 0) | (ids >= columns)][0].item()
        raise ValueError(
            f"teacher.ids must be in 0 .. {columns - 1}, the vocabulary of the student; got {bad}"
        )
    ordered = ids.sort(1).values
    twice = ordered[:, 1:] == ordered[:, :-1]
    if twice.any():
        row, column = twice.nonzero()[0].tolist()
        raise ValueError(
            f"teacher.ids must not hold an id twice in a row; got {ordered[row, column].item()} "
            f"twice in row {row}"
        )
    log_mass = logprobs.double().logsumexp(1)
    if log_mass.isnan().any() or (log_mass == torch.inf).any():
        raise ValueError("teacher.logprobs must be log-probabilities; got NaN or infinity")
    if tail == "renorm":
        if (log_mass == -torch.inf).any():
            raise ValueError(
                "teacher.logprobs must not be -inf all over a row with tail='renorm': "
                "nothing is left to renormalise"
            )
    elif (top := log_mass.max().exp().item()) > _SUM_AT_MOST:
        raise ValueError(
            "teacher.logprobs must be log-probabilities, which sum to at most 1 in a row; "
            f"got a sum of {top:.4g}"
        )


def _harmless(ids: Tensor, logprobs: Tensor, row_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows that do not count get a support that is one."""
    if row_weight is None:
        return ids, logprobs
    idle = (row_weight == 0)[:, None]
    k = ids.size(1)
    return (
        torch.where(idle, torch.arange(k, device=ids.device), ids),
        torch.where(idle, -math.log(k), logprobs),
    )


# --- the small problem -------------------------------------------------------------------------

_CONSTANTS = {
    "reverse_kl": (1.0, 0.0),
    "skew_forward_kl": (-1.0, 1.0),
    "skew_reverse_kl": (1.0, -1.0),
}
"""What the slopes leave out of dD/du: a + b mix."""


def _teacher(
    logprobs: Tensor, task: _Task, has_tail: bool, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the categories, float64 [C, k or k + 1], and the mass P [C]."""
    lq = logprobs.double()
    log_mass = lq.logsumexp(1, keepdim=True)
    mass = log_mass.exp().clamp(max=1)[:, 0]
    if task.tail == "renorm":
        lq = lq / task.teacher_temperature
        return lq - lq.logsumexp(1, keepdim=True), mass
    lq = lq - log_mass.clamp(min=0)
    if has_tail:
        least = torch.finfo(wide).eps / 2
        rest = (-torch.expm1(log_mass.clamp(max=0))).clamp(min=least).log()
        lq = torch.cat([lq, rest], 1)
    if task.teacher_temperature != 1.0:
        lq = lq / task.teacher_temperature
        lq = lq - lq.logsumexp(1, keepdim=True)
    return lq, mass


def _logs(z: Tensor, outside: Tensor | None) -> Tensor:
    """Log-probabilities of the categories from their z: float64 [C, k] and the tail's [C]."""
    if outside is not None:
        z = torch.cat([z, outside[:, None]], 1)
    top = z.amax(1, keepdim=True)
    return (z - top) - (z - top).exp().sum(1, keepdim=True).log()


def _small(
    z: Tensor, outside: Tensor | None, logprobs: Tensor, task: _Task, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence over the categories: losses [C], h [C, k or k + 1], masses [C, 2]; float64.

    Args:
        z: float64 [C, k], of the support.
        outside: float64 [C], the log of the sum over all other ids; None: there are none, or they
            do not count.
        logprobs: [C, k], of the teacher.
    """
    k = z.size(1)
    lq, teacher_mass = _teacher(logprobs, task, outside is not None, wide)
    lp = _logs(z, outside)
    size = lq[:, :k]
    near = (lp[:, :k] - size).abs() <= 4 * torch.finfo(wide).eps * (1 + size.abs())
    same = (near | (lp[:, :k] == size)).all(1, keepdim=True)
    lp = torch.where(same, lq, lp)
    u = lp.exp()
    masses = torch.stack([u[:, :k].sum(1), teacher_mass], 1)
    if task.tail == "none":
        loss, h = _truncated(lp, lq, u, k, task)
        return loss, h, masses
    terms, slopes = _terms(lp, lq, task.kind, task.mix)
    if slopes is None:
        h = u - lq.exp()
    else:
        mean = torch.where(u == 0, 0, u * slopes).sum(1, keepdim=True)
        h = torch.where(u == 0, 0, u * (slopes - mean))
    return terms.sum(1), h, masses


def _truncated(lp: Tensor, lq: Tensor, u: Tensor, k: int, task: _Task) -> tuple[Tensor, Tensor]:
    terms, slopes = _terms(lp[:, :k], lq[:, :k], task.kind, task.mix)
    pull = torch.zeros_like(u)  # u g
    if slopes is None:
        pull[:, :k] = -lq[:, :k].exp()
    else:
        a, b = _CONSTANTS.get(task.kind, (0.0, 0.0))
        inside = u[:, :k]
        pull[:, :k] = torch.where(inside == 0, 0, inside * (slopes + (a + b * task.mix)))
    return terms.sum(1), pull - u * pull.sum(1, keepdim=True)


# --- the vocabulary outside of a support -------------------------------------------------------


class _Outside:
    """Rows of logits without their supports.

    Args:
        x: [C, V] logits; overwritten where `own`.
        ids: [C, k].
        how: of the student.
        needed: whether anything outside counts.
        normal: [C, 2], of an earlier look.
    """

    def __init__(
        self,
        x: Tensor,
        ids: Tensor,
        how: How,
        kernels: Any,
        *,
        own: bool,
        needed: bool,
        normal: Tensor | None = None,
    ) -> None:
        self.picked = x.gather(1, ids).double()
        self._ids, self._how, self._kernels, self._needed = ids, how, kernels, needed
        if not needed:
            self.normal = x.new_empty((0, 2), dtype=wide_dtype(x))
            return
        # -inf as a logit is a probability of 0, unless something is made of it first.
        self._plain = how.scale > 0 and not how.softcap
        if self._plain:
            self._x = x if own else x.clone(memory_format=torch.contiguous_format)
            self._inner = how
        else:
            self._x = _values(x, how._replace(temperature=1.0), wide_dtype(x))
            self._inner = How(temperature=how.temperature)
        self._x.scatter_(1, ids, -torch.inf)
        self.normal = kernels.normalisers(self._x, self._inner) if normal is None else normal

    @property
    def z(self) -> Tensor:
        """float64 [C, k], of the support."""
        return _values(self.picked, self._how, torch.float64)

    @property
    def log_sum(self) -> Tensor | None:
        """float64 [C], over what is outside."""
        if not self._needed:
            return None
        top, log = self.normal.double().unbind(1)
        return torch.where(top == -torch.inf, -torch.inf, top + log)

    def gradient(self, out: Tensor, h: Tensor) -> None:
        """Writes dL/dx into `out` [C, V], which may be where x was.

        Args:
            h: [C, k or k + 1].
        """
        k = self._ids.size(1)
        if self._needed:
            self._outside(out, h[:, k])
        elif k < out.size(1):
            out.zero_()
        h = h[:, :k].double()
        inside = torch.where(h == 0, 0, _chain(h, self.picked, self._how))
        out.scatter_(1, self._ids, inside.to(out.dtype))

    def _outside(self, out: Tensor, h: Tensor) -> None:
        normal = self.normal
        stats = torch.cat([normal, torch.zeros_like(normal)], 1)
        # Nothing is outside where all of it has probability 0.
        grad = torch.where(normal[:, 0] == -torch.inf, 0, -h).to(normal.dtype)
        nothing = torch.full_like(self._ids[:, 0], -1)
        if self._plain:
            self._kernels.logprob_gradient(out, grad, None, self._x, nothing, stats, self._inner)
            return
        dz = torch.empty_like(self._x)
        self._kernels.logprob_gradient(dz, grad, None, self._x, nothing, stats, self._inner)
        if self._how.softcap:
            dz.mul_(1 - (self._x / self._how.softcap).square_())
        out.copy_(dz.mul_(self._how.scale).masked_fill_((grad == 0)[:, None], 0))


def _cross_entropy(x: Tensor, labels: Tensor, how: How, kernels: Any) -> tuple[Tensor, Tensor]:
    """Of the labels at temperature 1, [C], and the statistics [C, 4]."""
    stats = kernels.logprob_forward(x, labels, how._replace(temperature=1.0))
    return torch.where(labels < 0, 0, stats[:, 1] - (stats[:, 3] - stats[:, 0])), stats


def _cross_entropy_gradient(
    out: Tensor, grad: Tensor, x: Tensor, labels: Tensor, stats: Tensor, how: How, kernels: Any
) -> None:
    down = torch.where(labels < 0, 0, -grad).to(stats.dtype)
    kernels.logprob_gradient(out, down, None, x, labels, stats, how._replace(temperature=1.0))


def topk_logprobs(
    logits: Tensor, k: int, *, how: How = _PLAIN, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The k most probable ids of rows of logits, and their log-probabilities.

    A student with the same logits has divergence 0 from them, exactly.

    Args:
        logits: [M, V].
        k: at most V.

    Returns:
        ids int64 [M, k], the most probable first, and log-probs [M, k], float32 (float64 where
        the logits are).
    """
    if not 0 < k <= logits.size(1):
        raise ValueError(
            f"k must be between 1 and {logits.size(1)}, the size of the vocabulary; got {k}"
        )
    wide = wide_dtype(logits)
    kernels = vocabulary_rows.kernels(backend, logits)
    ids = logits.new_empty((logits.size(0), k), dtype=torch.int64)
    out = logits.new_empty((logits.size(0), k), dtype=wide)
    for rows in _blocks(logits):
        x = logits[rows]
        # A row of the vocabulary is ordered by its logits whatever is made of them, but for a
        # negative scale.
        ids[rows] = x.topk(k, 1, largest=how.scale >= 0).indices
        outside = _Outside(x, ids[rows], how, kernels, own=False, needed=k < logits.size(1))
        out[rows] = _logs(outside.z, outside.log_sum)[:, :k].to(wide)
    return ids, out


def _blocks(x: Tensor) -> list[slice]:
    block = _BLOCK.get(x.device.type, _BLOCK["cuda"])
    return chunks(x.size(0), 1, max(1, block // max(1, x.size(1))))


# --- a head without its logits -----------------------------------------------------------------


def _check_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    logprobs: Tensor,
    row_weight: Tensor | None,
    labels: Tensor | None,
    task: _Task,
) -> None:
    device = hidden.device
    check_matrix("hidden", hidden, device)
    check_matrix("weight", weight, device)
    if weight.size(1) != hidden.size(1):
        raise ValueError(
            f"weight must have {hidden.size(1)} columns like hidden; got {weight.size(1)}"
        )
    rows, columns = hidden.size(0), weight.size(0)
    if columns == 0:
        raise ValueError("weight must have at least one row; got none")
    _check_support(ids, logprobs, rows, columns, device, task)
    check_vector("bias", bias, columns, "token id", device)
    check_vector("token_weight", row_weight, rows, "token", device)
    check_vector("labels", labels, rows, "token", device)
    if task.ce_weight and labels is None:
        raise ValueError("ce_weight needs labels")


class _Rows(NamedTuple):
    """The rows that count, and what belongs to them."""

    ids: Tensor
    logprobs: Tensor
    weights: Tensor | None
    labels: Tensor | None


def _linear_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    logprobs: Tensor,
    row_weight: Tensor | None,
    labels: Tensor | None,
    tail: str,
    kind: str,
    mix: float,
    how: list[float],
    teacher_temperature: float,
    ce_weight: float,
    chunk_tokens: int | None,
    needed: list[bool],
    uniform: bool,
    debug: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    task = _Task(tail, kind, mix, _how(how), teacher_temperature, ce_weight)
    _check_linear(hidden, weight, bias, ids, logprobs, row_weight, labels, task)
    wide = wide_dtype(hidden, weight, logprobs)
    index = counting_rows(row_weight)
    if index is not None:
        assert row_weight is not None
        rows = _Rows(
            ids[index],
            logprobs[index],
            row_weight[index].to(wide),
            None if labels is None else labels[index],
        )
    else:
        # Without weights, or while a graph is captured: rows that do not count stay.
        rows = _Rows(
            *_harmless(ids, logprobs, row_weight),
            None if row_weight is None else row_weight.to(wide),
            labels,
        )
    _check_values(rows.ids, rows.logprobs, weight.size(0), tail, debug)
    with torch.autocast(hidden.device.type, enabled=False):
        head = Head(hidden, weight, bias, index)
        need_hidden, need_weight, need_bias = needed
        gradients = HeadGradients(head, need_hidden, need_weight and uniform, need_bias and uniform)
        scattered = _SCATTERED.get(hidden.device.type, _SCATTERED["cuda"])
        if tail == "renorm" and not ce_weight and ids.size(1) * scattered <= weight.size(0):
            loss, masses = _gathered(head, rows, task, chunk_tokens, gradients, wide)
        else:
            kernels = vocabulary_rows.kernels(backend, hidden, weight)
            loss, masses = _by_chunks(head, rows, task, chunk_tokens, gradients, wide, kernels)
    if rows.weights is not None:
        loss = torch.where(rows.weights == 0, 0, loss * rows.weights)
    if index is not None:
        count = hidden.size(0)
        loss = loss.new_zeros(count).index_copy_(0, index, loss)
        masses = masses.new_zeros((count, 2)).index_copy_(0, index, masses)
    none = loss.new_empty(0)
    return (
        loss,
        masses,
        none if gradients.hidden is None else gradients.hidden,
        none.clone() if gradients.weight is None else gradients.weight,
        none.clone() if gradients.bias is None else gradients.bias,
    )


_linear_support = torch.library.custom_op(
    "cl_fast::linear_support", _linear_forward, mutates_args=()
)


def _weighted(h: Tensor, weights: Tensor | None, part: slice) -> Tensor:
    if weights is None:
        return h
    w = weights[part, None]
    return torch.where(w == 0, 0, h * w)


def _by_chunks(
    head: Head,
    rows: _Rows,
    task: _Task,
    chunk_tokens: int | None,
    gradients: HeadGradients,
    wide: torch.dtype,
    kernels: Any,
) -> tuple[Tensor, Tensor]:
    """Losses [C] and masses [C, 2] of the rows that count, by chunks of their logits."""
    count, columns = rows.ids.size(0), head.weight.size(0)
    losses = head.hidden.new_zeros(count, dtype=wide)
    masses = head.hidden.new_zeros((count, 2), dtype=wide)
    needed = task.has_tail(rows.ids.size(1), columns)
    many = 8 if gradients.weight is not None else 32
    for part in chunks(count, columns, chunk_tokens, many):
        x, ids = head.logits(part), rows.ids[part]
        hard = None
        if task.ce_weight:
            assert rows.labels is not None
            labels = rows.labels[part]
            ce, stats = _cross_entropy(x, labels, task.how, kernels)
            losses[part] = task.ce_weight * ce
            if gradients.wanted:
                hard = torch.empty_like(x)
                grad = _weighted(torch.full_like(ce, task.ce_weight)[:, None], rows.weights, part)
                _cross_entropy_gradient(hard, grad[:, 0], x, labels, stats, task.how, kernels)
        outside = _Outside(x, ids, task.how, kernels, own=True, needed=needed)
        loss, h, masses[part] = _small(outside.z, outside.log_sum, rows.logprobs[part], task, wide)
        losses[part] += loss
        if gradients.wanted:
            out = x if hard is not None else gradients.target(x)
            outside.gradient(out, _weighted(h, rows.weights, part))
            if hard is not None:
                out += hard
            gradients.add(part, out)
    return losses, masses


def _products(w: Tensor, x: Tensor) -> Tensor:
    """[C, k] of [C, k, H] and [C, H]. On a CPU multiplied and summed, which takes no longer than a
    batched product and adds in a better order."""
    if w.is_cuda:
        return torch.bmm(w, x[:, :, None])[:, :, 0]
    return (w * x[:, None]).sum(-1)


def _gathered(
    head: Head,
    rows: _Rows,
    task: _Task,
    chunk_tokens: int | None,
    gradients: HeadGradients,
    wide: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The same for "renorm", from the k rows of the head that a token names."""
    count, k = rows.ids.shape
    width = head.weight.size(1)
    losses = head.hidden.new_zeros(count, dtype=wide)
    masses = head.hidden.new_zeros((count, 2), dtype=wide)
    room = _GATHER_BYTES.get(head.weight.device.type, _GATHER_BYTES["cuda"])
    step = max(1, room // max(1, k * width * head.wide.itemsize))
    for part in chunks(count, 1, step if chunk_tokens is None else min(step, chunk_tokens)):
        flat = rows.ids[part].reshape(-1)
        w = head.weight.index_select(0, flat).to(head.wide).view(-1, k, width)
        hidden = head.rows(part).to(head.wide)
        x = _products(w, hidden)
        if head.bias is not None:
            x += head.bias[flat].view_as(x)
        picked = x.double()
        z = _values(picked, task.how, torch.float64)
        losses[part], h, masses[part] = _small(z, None, rows.logprobs[part], task, wide)
        if not gradients.wanted:
            continue
        dx = _chain(_weighted(h, rows.weights, part), picked, task.how).to(head.wide)
        if gradients.hidden is not None:
            to = part if head.index is None else head.index[part]
            gradients.hidden[to] = torch.bmm(dx[:, None], w)[:, 0]
        if gradients.weight is not None:
            outer = (dx[:, :, None] * hidden[:, None]).view(-1, width)
            gradients.weight.index_add_(0, flat, outer)
        if gradients.bias is not None:
            gradients.bias.index_add_(0, flat, dx.reshape(-1))
    return losses, masses


def _linear_forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    logprobs: Tensor,
    row_weight: Tensor | None,
    labels: Tensor | None,
    tail: str,
    kind: str,
    mix: float,
    how: list[float],
    teacher_temperature: float,
    ce_weight: float,
    chunk_tokens: int | None,
    needed: list[bool],
    uniform: bool,
    debug: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    task = _Task(tail, kind, mix, _how(how), teacher_temperature, ce_weight)
    _check_linear(hidden, weight, bias, ids, logprobs, row_weight, labels, task)
    own, wide = wide_dtype(hidden, weight), wide_dtype(hidden, weight, logprobs)
    rows = hidden.size(0)
    return (
        hidden.new_empty((rows,), dtype=wide),
        hidden.new_empty((rows, 2), dtype=wide),
        hidden.new_empty(hidden.shape, dtype=own) if needed[0] else hidden.new_empty(0, dtype=wide),
        hidden.new_empty(weight.shape, dtype=own)
        if needed[1] and uniform
        else hidden.new_empty(0, dtype=wide),
        hidden.new_empty((weight.size(0),), dtype=own)
        if needed[2] and uniform
        else hidden.new_empty(0, dtype=wide),
    )


_linear_support.register_fake(_linear_forward_fake)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options = inputs[:7], inputs[7:]
    *_, ctx.needed, ctx.uniform, _debug, _backend = inputs
    ctx.hidden_dtype, ctx.weight_dtype = inputs[0].dtype, inputs[1].dtype
    ctx.bias_dtype = None if inputs[2] is None else inputs[2].dtype
    again = (ctx.needed[1] or ctx.needed[2]) and not ctx.uniform
    ctx.given = [x is not None for x in tensors] if again else []
    ctx.save_for_backward(*output[2:], *([x for x in tensors if x is not None] if again else []))
    ctx.mark_non_differentiable(*output[1:])


def _linear_gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    d_hidden, d_weight, d_bias, *saved = ctx.saved_tensors
    need_hidden, need_weight, need_bias = ctx.needed
    if ctx.given:
        rest = iter(saved)
        tensors = [next(rest) if given else None for given in ctx.given]
        tensors[5] = grad if tensors[5] is None else tensors[5] * grad
        options = list(ctx.options)
        options[-4:-1] = [False, need_weight, need_bias], True, False
        d_weight, d_bias = _linear_support(*tensors, *options)[3:]
    elif need_weight or need_bias:
        # One number for all rows; none where there are no rows.
        common = grad[:1].sum()
        d_weight, d_bias = (
            x * common.to(x.dtype) if needed else x
            for x, needed in ((d_weight, need_weight), (d_bias, need_bias))
        )
    out: list[Tensor | None] = [None] * 3
    if need_hidden:
        # A row that the caller dropped owes nothing, whatever it holds.
        g = grad[:, None].to(d_hidden.dtype)
        out[0] = torch.where(g == 0, 0, d_hidden * g).to(ctx.hidden_dtype)
    if need_weight:
        out[1] = d_weight.to(ctx.weight_dtype)
    if need_bias:
        out[2] = d_bias.to(ctx.bias_dtype)
    return out


def _linear_backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    if ctx.needs_input_grad[4]:
        raise RuntimeError("teacher.logprobs have no gradient: detach them")
    with torch.no_grad():
        gradients = _linear_gradients(ctx, grad)
    rest = [None] * (4 + len(ctx.options))
    return (*(None if x is None else once(x) for x in gradients), *rest)


_linear_support.register_autograd(_linear_backward, setup_context=_linear_setup)


def _detached(ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Ids as int64 and log-probs, of a teacher that has no gradient."""
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"teacher.ids must be integers; got {ids.dtype}")
    if logprobs.requires_grad:
        raise ValueError(
            "teacher.logprobs must not require grad: detach them, or compute them under "
            "torch.no_grad()"
        )
    return ids.long(), logprobs


def _masses(masses: Tensor, tail: str) -> tuple[Tensor, Tensor]:
    """Of student and teacher; what "renorm" does not know is nan."""
    student, teacher = masses.unbind(1)
    return torch.full_like(student, torch.nan) if tail == "renorm" else student, teacher


def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    logprobs: Tensor,
    *,
    tail: str = "bucket",
    kind: str = "forward_kl",
    mix: float = 0.5,
    how: How = _PLAIN,
    teacher_temperature: float = 1.0,
    row_weight: Tensor | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    chunk_tokens: int | None = None,
    uniform: bool = False,
    debug: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of the rows of a head whose teacher gives k ids each.

        loss_i = row_weight_i (D(teacher_i, student_i) + ce_weight CE_i)

    Args:
        hidden: [M, H].
        weight, bias: [V, H], [V] or None; the student's head.
        ids: [M, k] integers, k <= V, none twice in a row.
        logprobs: [M, k]; -inf is a probability of 0. No gradient reaches them. With
            tail="renorm" a constant of the row does not matter.
        tail: "bucket", "renorm" or "none".
        kind, mix: see `cl_fast.ops.vocabulary_rows`.
        how: scale, softcap and temperature of the student.
        teacher_temperature: applied to the log-probs that are given; 1 leaves them.
        row_weight: [M]; rows of weight 0 take no part, and their ids and log-probs are not
            looked at. None: 1.
        labels: int64 [M], a negative one has no cross-entropy.
        ce_weight: of the cross-entropy at temperature 1; with tail="renorm" it costs the
            vocabulary.
        chunk_tokens: rows whose logits exist at once.
        uniform: a promise that all rows will receive the same gradient.
        debug: look for repeated ids, NaN and sums above 1 on a card too.
        backend: "eager", "native" or "triton", for tests and benchmarks.

    Returns:
        Losses [M], and without gradients the masses on the support: of the student [M], nan with
        tail="renorm", which does not compute it, and of the teacher [M].

    Raises:
        TypeError, ValueError: naming the argument.
    """
    ids, logprobs = _detached(ids, logprobs)
    wanted = torch.is_grad_enabled()
    needed = [wanted and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    loss, masses, *_ = _linear_support(
        hidden, weight, bias, ids, logprobs, row_weight, labels, tail, kind, mix, list(how[:3]),
        teacher_temperature, ce_weight, chunk_tokens, needed, uniform, debug, backend,
    )  # fmt: skip
    return loss, *_masses(masses, tail)


# --- logits that exist -------------------------------------------------------------------------


def _check_rows(
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    row_weight: Tensor | None,
    labels: Tensor | None,
    task: _Task,
) -> None:
    check_matrix("logits", logits, logits.device)
    if logits.size(1) == 0:
        raise ValueError("logits must have at least one column; got none")
    _check_support(ids, logprobs, logits.size(0), logits.size(1), logits.device, task)
    check_vector("token_weight", row_weight, logits.size(0), "token", logits.device)
    check_vector("labels", labels, logits.size(0), "token", logits.device)
    if task.ce_weight and labels is None:
        raise ValueError("ce_weight needs labels")


def _rows_forward(
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    row_weight: Tensor | None,
    labels: Tensor | None,
    tail: str,
    kind: str,
    mix: float,
    how: list[float],
    teacher_temperature: float,
    ce_weight: float,
    inplace: bool,
    debug: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    task = _Task(tail, kind, mix, _how(how), teacher_temperature, ce_weight)
    _check_rows(logits, ids, logprobs, row_weight, labels, task)
    ids, logprobs = _harmless(ids, logprobs, row_weight)
    _check_values(ids, logprobs, logits.size(1), tail, debug)
    kernels = vocabulary_rows.kernels(backend, logits)
    wide = wide_dtype(logits, logprobs)
    needed = task.has_tail(ids.size(1), logits.size(1))
    losses, masses, h, normals, stats = _rows_outputs(logits, ids, logprobs, task)
    for part in _blocks(logits):
        x = logits[part]
        if ce_weight:
            assert labels is not None
            ce, stats[part] = _cross_entropy(x, labels[part], task.how, kernels)
            losses[part] = ce_weight * ce
        else:
            losses[part] = 0
        outside = _Outside(x, ids[part], task.how, kernels, own=False, needed=needed)
        loss, h[part], masses[part] = _small(outside.z, outside.log_sum, logprobs[part], task, wide)
        losses[part] += loss
        if needed:
            normals[part] = outside.normal
    if row_weight is not None:
        losses = torch.where(row_weight == 0, 0, losses * row_weight.to(wide))
    return losses, masses, h, normals, stats


def _rows_outputs(
    logits: Tensor, ids: Tensor, logprobs: Tensor, task: _Task
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses [M], masses [M, 2], h [M, k or k + 1], normalisers [M, 2] of what is outside, and
    statistics [M, 4] of the cross-entropy; the last two without rows where not needed."""
    own, wide = wide_dtype(logits), wide_dtype(logits, logprobs)
    rows, k = ids.shape
    needed = task.has_tail(k, logits.size(1))
    return (
        logits.new_empty((rows,), dtype=wide),
        logits.new_empty((rows, 2), dtype=wide),
        logits.new_empty((rows, k + needed), dtype=wide),
        logits.new_empty((rows if needed else 0, 2), dtype=own),
        logits.new_empty((rows if task.ce_weight else 0, 4), dtype=own),
    )


_support_rows = torch.library.custom_op("cl_fast::support_rows", _rows_forward, mutates_args=())


def _rows_forward_fake(
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    row_weight: Tensor | None,
    labels: Tensor | None,
    tail: str,
    kind: str,
    mix: float,
    how: list[float],
    teacher_temperature: float,
    ce_weight: float,
    inplace: bool,
    debug: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    task = _Task(tail, kind, mix, _how(how), teacher_temperature, ce_weight)
    _check_rows(logits, ids, logprobs, row_weight, labels, task)
    return _rows_outputs(logits, ids, logprobs, task)


_support_rows.register_fake(_rows_forward_fake)


def _write_gradient(
    out: Tensor,
    factor: Tensor,
    logits: Tensor,
    ids: Tensor,
    h: Tensor,
    normals: Tensor,
    labels: Tensor | None,
    stats: Tensor,
    ce_weight: float,
    how: list[float],
    backend: str | None,
) -> None:
    """Into `out` [M, V], which may be the logits; `factor` [M] is what arrives for a row."""
    student = _how(how)
    kernels = vocabulary_rows.kernels(backend, logits)
    needed = h.size(1) > ids.size(1)
    for part in _blocks(logits):
        x, to = logits[part], out[part]
        hard = None
        if ce_weight:
            assert labels is not None
            hard = torch.empty_like(x, dtype=stats.dtype)
            _cross_entropy_gradient(
                hard, factor[part] * ce_weight, x, labels[part], stats[part], student, kernels
            )
        own = x.data_ptr() == to.data_ptr()
        outside = _Outside(
            x, ids[part], student, kernels, own=own, needed=needed,
            normal=normals[part] if needed else None,
        )  # fmt: skip
        outside.gradient(to, _weighted(h[part], factor[part], slice(None)))
        if hard is not None:
            to += hard


def _rows_gradient(
    factor: Tensor,
    logits: Tensor,
    ids: Tensor,
    h: Tensor,
    normals: Tensor,
    labels: Tensor | None,
    stats: Tensor,
    ce_weight: float,
    how: list[float],
    backend: str | None,
) -> Tensor:
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _write_gradient(out, factor, logits, ids, h, normals, labels, stats, ce_weight, how, backend)
    return out


_support_gradient = torch.library.custom_op(
    "cl_fast::support_rows_gradient", _rows_gradient, mutates_args=()
)


def _rows_gradient_fake(
    factor: Tensor,
    logits: Tensor,
    ids: Tensor,
    h: Tensor,
    normals: Tensor,
    labels: Tensor | None,
    stats: Tensor,
    ce_weight: float,
    how: list[float],
    backend: str | None,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_support_gradient.register_fake(_rows_gradient_fake)


def _rows_gradient_(
    factor: Tensor,
    logits: Tensor,
    ids: Tensor,
    h: Tensor,
    normals: Tensor,
    labels: Tensor | None,
    stats: Tensor,
    ce_weight: float,
    how: list[float],
    backend: str | None,
) -> None:
    _write_gradient(logits, factor, logits, ids, h, normals, labels, stats, ce_weight, how, backend)


_support_gradient_ = torch.library.custom_op(
    "cl_fast::support_rows_gradient_", _rows_gradient_, mutates_args=("logits",)
)


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ids, _logprobs, row_weight, labels, *options = inputs
    ctx.how, ctx.ce_weight, ctx.inplace, ctx.backend = (
        options[3], options[5], options[6], options[8],
    )  # fmt: skip
    _, _, h, normals, stats = output
    given = [x for x in (row_weight, labels) if x is not None]
    ctx.given = row_weight is not None, labels is not None
    ctx.save_for_backward(logits, ids, h, normals, stats, *given)
    ctx.mark_non_differentiable(*output[1:])


def _rows_backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    if ctx.needs_input_grad[2]:
        raise RuntimeError("teacher.logprobs have no gradient: detach them")
    logits, ids, h, normals, stats, *given = ctx.saved_tensors
    rest = iter(given)
    row_weight, labels = (next(rest) if there else None for there in ctx.given)
    factor = grad.contiguous()
    if row_weight is not None:
        ids, _ = _harmless(ids, h[:, : ids.size(1)], row_weight)
        factor = torch.where(row_weight == 0, 0, factor * row_weight)
    arguments = (
        factor, logits, ids, h, normals, labels, stats, ctx.ce_weight, ctx.how, ctx.backend,
    )  # fmt: skip
    with torch.no_grad():
        if ctx.inplace:
            # A second backward pass would read what this one wrote; torch refuses it by versions.
            _support_gradient_(*arguments)
            gradient = logits.detach()
        else:
            gradient = _support_gradient(*arguments)
    return (once(gradient), *[None] * 13)


_support_rows.register_autograd(_rows_backward, setup_context=_rows_setup)


def topk_from_logits(
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    *,
    tail: str = "bucket",
    kind: str = "forward_kl",
    mix: float = 0.5,
    how: How = _PLAIN,
    teacher_temperature: float = 1.0,
    row_weight: Tensor | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    inplace: bool = False,
    debug: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_topk` of logits that exist already.

    Args:
        logits: [M, V].
        inplace: the backward pass writes the gradient over the logits; nothing else may need them.
        (others): as in `linear_topk`.

    Returns:
        As `linear_topk`.
    """
    ids, logprobs = _detached(ids, logprobs)
    loss, masses, *_ = _support_rows(
        logits, ids, logprobs, row_weight, labels, tail, kind, mix, list(how[:3]),
        teacher_temperature, ce_weight, inplace, debug, backend,
    )  # fmt: skip
    return loss, *_masses(masses, tail)
