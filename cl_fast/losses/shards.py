"""Rows of logits whose columns, the vocabulary, are split over the ranks of a process group.

    rank r holds z_r [C, V_r], the columns start_r .. start_r + V_r of z [C, V]

    max = max_r max_r,  log = log sum_r e^(max_r - max + log_r)        of the normalisers of ranks
    loss = sum_r loss_r,  K = sum_r K_r                                 once these are known
    E = sum_r e^(max_r + log_r - max - log) (E_r + max_r - max)         of the entropy log - E
    dL/dx_r from max, log, K                                            on each rank alone
    dX = sum_r dL/dx_r W_r,  dW_r = dL/dx_r^T X

Two collectives per chunk of rows: the normalisers of both sides are gathered, so that one message
carries maxima and sums, and every rank adds them up in the order of the ranks; loss and K are
reduced, except where the gradient needs no K (forward KL), whose losses travel once at the end. A
teacher known on k ids needs one: the k logits, from whoever has them, travel with the normalisers
of what is outside. The gradient of the hidden states is reduced once, in the forward pass. So the
backward pass has no collective, and none that could meet those of DDP or FSDP in another order.

All ranks give the same rows, labels and weights, and make the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from cl_fast.ops.divergences import once
from cl_fast.ops.heads import Head, HeadGradients, chunks
from cl_fast.ops.supports import _GATHER_BYTES, _SCATTERED, _small, _Task
from cl_fast.ops.vocabulary_rows import Extra, How, _chain, _values

__all__ = ["Dense", "Ranks", "Rows", "Support", "Tokens", "from_head", "from_logits"]


class Ranks:
    """The ranks of a process group, and what they send one another.

    Args:
        process_group: a process group, or a device mesh of one dimension.

    Raises:
        ValueError: this process is none of its ranks.
    """

    def __init__(self, process_group: Any) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "process_group needs an initialised torch.distributed: call init_process_group"
            )
        if hasattr(process_group, "get_group"):
            process_group = process_group.get_group()
        self.group = process_group
        self.rank = dist.get_rank(process_group)
        self.size = dist.get_world_size(process_group)
        if self.rank < 0:
            raise ValueError("process_group must hold the process that calls; got a group without")

    def gather(self, x: Tensor) -> Tensor:
        """[R, ...]: the same shape from each rank."""
        out = x.new_empty((self.size, *x.shape))
        if x.numel():
            dist.all_gather(list(out.unbind(0)), x.contiguous(), group=self.group)
        return out

    def add(self, x: Tensor) -> None:
        """Sum over the ranks, in place; `x` is contiguous."""
        if x.numel():
            dist.all_reduce(x, group=self.group)

    def table(self, row: list[int], device: torch.device) -> list[list[int]]:
        """A few integers of each rank, on the host; on a card this waits for it."""
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a loss with process_group cannot be captured in a CUDA graph: the ranks tell one "
                "another the sizes of their shards through the host"
            )
        found = self.gather(torch.tensor(row, dtype=torch.int64, device=device))
        rows: list[list[int]] = found.tolist()
        return rows


def _whole(tops: Tensor, logs: Tensor, wide: torch.dtype) -> Tensor:
    """Normalisers [C, 2] from those of the ranks, [R, C] each."""
    tops, logs = tops.double(), logs.double()
    top = tops.amax(0)
    # A shard of -inf has no logarithm.
    log = torch.where(tops == -torch.inf, 0, (tops - top + logs).exp()).sum(0).log()
    return torch.stack([top, log], 1).to(wide)


class Rows(Protocol):
    """What is asked of rows of logits."""

    outputs: int
    """Numbers per row."""
    wide: torch.dtype
    ranks: Ranks

    def measure(self, x: Tensor, part: slice) -> Tensor:
        """Statistics [C, n] of the chunk `part` with logits x [C, V_r]: the same on all ranks, but
        for what `finish` still has to add up."""

    def finish(self, stats: Tensor) -> Tensor:
        """Outputs [M, outputs] from the statistics of all chunks."""

    def gradient(self, out: Tensor, grad: Tensor, x: Tensor, part: slice, stats: Tensor) -> None:
        """Writes what grad [C, outputs] gives x into `out`, which may be x. No collective."""


def _weighted(x: Tensor, weights: Tensor | None) -> Tensor:
    return x if weights is None else torch.where(weights == 0, 0, x * weights)


def _cross_entropy(stats: Tensor, labels: Tensor) -> Tensor:
    """From the statistics [C, 3] at temperature 1: max, log, z of the label."""
    top, log, picked = stats.unbind(1)
    return torch.where(labels < 0, 0, log - (picked - top))


class Labels(NamedTuple):
    """Token ids of rows."""

    ids: Tensor
    """int64 [M]; negative: none."""
    local: Tensor
    """The same counted from the first column of this rank; -1 where another rank has it."""

    @classmethod
    def of(cls, ids: Tensor, start: int, columns: int) -> Labels:
        local = ids - start
        return cls(ids, torch.where((local >= 0) & (local < columns) & (ids >= 0), local, -1))


class Dense:
    """The divergence from a teacher whose vocabulary is split alike.

    Args:
        teacher: [M, Vt_r] logits or probabilities, or a head.
        index: rows of that matrix that count; None: all.
        weights: [C], of the rows.
        labels: of the rows, for a cross-entropy.
        slopes: whether a gradient will be asked for.
    """

    outputs = 1

    def __init__(
        self,
        ranks: Ranks,
        kernels: Any,
        teacher: Head | Tensor,
        index: Tensor | None,
        weights: Tensor | None,
        labels: Labels | None,
        ce_weight: float,
        kind: str,
        mix: float,
        how: How,
        teacher_how: How,
        wide: torch.dtype,
        slopes: bool,
    ) -> None:
        self.ranks, self.wide = ranks, wide
        self._kernels, self._teacher, self._index = kernels, teacher, index
        self._weights, self._labels, self._ce_weight = weights, labels, ce_weight
        self._kind, self._mix, self._how, self._teacher_how = kind, mix, how, teacher_how
        self._late = kind == "forward_kl" or not slopes
        self._last: tuple[slice, Tensor] | None = None

    def _rows(self, part: slice) -> Tensor:
        """Of the teacher; those of the last chunk are still there."""
        if self._last is None or self._last[0] != part:
            if isinstance(self._teacher, Head):
                rows = self._teacher.logits(part)
            elif self._index is None:
                rows = self._teacher[part]
            else:
                rows = self._teacher.index_select(0, self._index[part])
            self._last = part, rows
        return self._last[1]

    def measure(self, x: Tensor, part: slice) -> Tensor:
        t, how, kernels = self._rows(part), self._how, self._kernels
        plain = None
        if self._ce_weight:
            assert self._labels is not None
            plain = kernels.logprob_forward(
                x, self._labels.local[part], how._replace(temperature=1.0)
            )
        if plain is not None and how.temperature == 1.0:
            own = plain[:, :2]
        else:
            own = kernels.normalisers(x, how)
        sent = [own, kernels.normalisers(t, self._teacher_how)]
        if plain is not None:
            sent += [plain[:, :2], plain[:, 3:]]
        got = self.ranks.gather(torch.cat([y.to(self.wide) for y in sent], 1))
        normal_s = _whole(got[..., 0], got[..., 1], self.wide)
        normal_t = _whole(got[..., 2], got[..., 3], self.wide)
        sums = kernels.divergence_sums(
            x, t, normal_s, normal_t, self._kind, self._mix, how, self._teacher_how
        ).to(self.wide)
        if not self._late:
            self.ranks.add(sums)
        stats = [normal_s, normal_t, sums.flip(1)]
        if plain is not None:
            stats += [_whole(got[..., 4], got[..., 5], self.wide), got[..., 6].sum(0)[:, None]]
        return torch.cat(stats, 1)

    def finish(self, stats: Tensor) -> Tensor:
        self._last = None
        losses = stats[:, 5].clone()
        if self._late:
            self.ranks.add(losses)
        if self._ce_weight:
            assert self._labels is not None
            losses += self._ce_weight * _cross_entropy(stats[:, 6:], self._labels.ids)
        return _weighted(losses, self._weights)[:, None]

    def gradient(self, out: Tensor, grad: Tensor, x: Tensor, part: slice, stats: Tensor) -> None:
        g = _weighted(grad[:, 0], None if self._weights is None else self._weights[part])
        g = g.to(self.wide).contiguous()
        extra = None
        if self._ce_weight:
            assert self._labels is not None
            extra = Extra(g * self._ce_weight, stats[:, 6:8].contiguous(), self._labels.local[part])
        self._kernels.divergence_gradient(
            out, g, x, self._rows(part), stats[:, :5].contiguous(), self._kind, self._mix,
            self._how, self._teacher_how, extra,
        )  # fmt: skip
        self._last = None


class Tokens:
    """Log-probs of one id per row and, on request, entropies."""

    def __init__(
        self, ranks: Ranks, kernels: Any, labels: Labels, how: How, entropy: bool, wide: torch.dtype
    ) -> None:
        self.ranks, self.wide, self.outputs = ranks, wide, 2 if entropy else 1
        self._kernels, self._ids, self._how = kernels, labels.local, how

    def measure(self, x: Tensor, part: slice) -> Tensor:
        own = self._kernels.logprob_forward(x, self._ids[part], self._how).to(self.wide)
        tops, logs, sums, picked = self.ranks.gather(own).unbind(-1)
        normal = _whole(tops, logs, self.wide)
        away = tops - normal[:, 0]
        share = torch.where(tops == -torch.inf, 0, (away + logs - normal[:, 1]).exp())
        mean = torch.where(share == 0, 0, share * (sums + away)).sum(0)
        return torch.cat([normal, mean[:, None], picked.sum(0)[:, None]], 1)

    def finish(self, stats: Tensor) -> Tensor:
        top, log, mean, picked = stats.unbind(1)
        return torch.stack([(picked - top) - log, log - mean][: self.outputs], 1)

    def gradient(self, out: Tensor, grad: Tensor, x: Tensor, part: slice, stats: Tensor) -> None:
        columns = [g.contiguous() for g in grad.to(self.wide).unbind(1)]
        self._kernels.logprob_gradient(
            out, columns[0], columns[1] if self.outputs == 2 else None, x, self._ids[part],
            stats.contiguous(), self._how,
        )  # fmt: skip


class Support:
    """The divergence from a teacher known on k ids of a row: see `cl_fast.ops.supports`.

    The logits that it is given are scratch: they are overwritten for a while, or for good. Where it
    `gathers` they are [C, k], those of the support alone.

    Args:
        ids, logprobs: [C, k], of the rows that count; ids of the whole vocabulary.
        start, columns: of this rank.
        total: size of the vocabulary.
        head: whether the logits are those of a head, made by `from_head`.
    """

    outputs = 1

    def __init__(
        self,
        ranks: Ranks,
        kernels: Any,
        ids: Tensor,
        logprobs: Tensor,
        weights: Tensor | None,
        labels: Labels | None,
        task: _Task,
        wide: torch.dtype,
        start: int,
        columns: int,
        total: int,
        head: bool,
    ) -> None:
        self.ranks, self.wide = ranks, torch.float64
        self._rows_wide, self._kernels, self._task = wide, kernels, task
        local = ids - start
        self._mine = (local >= 0) & (local < columns)
        # Spread, so that what other ranks own does not meet in one column.
        self.local = local.remainder(columns)
        self._logprobs, self._weights, self._labels = logprobs, weights, labels
        how = task.how
        self._tail = task.has_tail(ids.size(1), total)
        # -inf as a logit is a probability of 0, unless something is made of it first.
        self._plain = how.scale > 0 and not how.softcap
        self._inner = how if self._plain else How(temperature=how.temperature)
        k = ids.size(1)
        scattered = _SCATTERED.get(ids.device.type, _SCATTERED["cuda"])
        self.gathers = head and task.tail == "renorm" and not task.ce_weight
        self.gathers = self.gathers and k * scattered <= total
        """Whether k rows of a head per token cost less than all."""
        self._widths = [k, k + self._tail, 2 * self._tail, 1, 3 if task.ce_weight else 0]

    def _put(self, x: Tensor, part: slice, values: Tensor | float, lowest: bool) -> None:
        """Into the columns of the support that are here; elsewhere nothing changes."""
        nothing = torch.inf if lowest else -torch.inf
        mine = self._mine[part]
        source = torch.where(mine, values, nothing).to(x.dtype)
        x.scatter_reduce_(1, self.local[part], source, "amin" if lowest else "amax")

    def _outside(self, x: Tensor, part: slice) -> Tensor:
        """The logits without the support; x itself where -inf says so."""
        if not self._plain:
            x = _values(x, self._task.how._replace(temperature=1.0), self._rows_wide)
        self._put(x, part, -torch.inf, lowest=True)
        return x

    def measure(self, x: Tensor, part: slice) -> Tensor:
        ranks, task, kernels, wide = self.ranks, self._task, self._kernels, self._rows_wide
        here = x if self.gathers else x.gather(1, self.local[part])
        k, size = here.size(1), ranks.size
        # Each rank has columns of its own, and the ids of a support one owner: a sum brings all.
        width = k + 2 * size * self._tail + (2 * size + 1 if task.ce_weight else 0)
        sent = here.new_zeros((here.size(0), width), dtype=wide)
        sent[:, :k] = torch.where(self._mine[part], here, 0)
        if task.ce_weight:
            assert self._labels is not None
            plain = kernels.logprob_forward(
                x, self._labels.local[part], task.how._replace(temperature=1.0)
            )
            first = width - 2 * size - 1
            sent[:, first + ranks.rank] = plain[:, 0]
            sent[:, first + size + ranks.rank] = plain[:, 1]
            sent[:, -1] = plain[:, 3]
        if self._tail:
            own = kernels.normalisers(self._outside(x, part), self._inner)
            sent[:, k + ranks.rank] = own[:, 0]
            # A shard of -inf has no logarithm.
            sent[:, k + size + ranks.rank] = torch.where(own[:, 0] == -torch.inf, 0, own[:, 1])
            if self._plain:
                self._put(x, part, here, lowest=False)
        ranks.add(sent)
        picked = sent[:, :k].double()
        outside = None
        stats = [picked]
        if self._tail:
            tops, logs = sent[:, k : k + 2 * size].t().reshape(2, size, -1)
            normal = _whole(tops, logs, self.wide)
            outside = torch.where(normal[:, 0] == -torch.inf, -torch.inf, normal.sum(1))
        z = _values(picked, task.how, self.wide)
        loss, h, _ = _small(z, outside, self._logprobs[part], task, wide)
        stats += [h, *([normal] if self._tail else []), loss[:, None]]
        if task.ce_weight:
            tops, logs = sent[:, first:-1].t().reshape(2, size, -1)
            stats += [_whole(tops, logs, self.wide), sent[:, -1:].double()]
        return torch.cat(stats, 1)

    def finish(self, stats: Tensor) -> Tensor:
        *_, losses, plain = stats.split(self._widths, 1)
        total = losses[:, 0]
        if self._task.ce_weight:
            assert self._labels is not None
            total = total + self._task.ce_weight * _cross_entropy(plain, self._labels.ids)
        return _weighted(total, self._weights)[:, None]

    def gradient(self, out: Tensor, grad: Tensor, x: Tensor, part: slice, stats: Tensor) -> None:
        picked, h, normal, _, plain = stats.split(self._widths, 1)
        task, k, wide = self._task, picked.size(1), self._rows_wide
        g = _weighted(grad[:, 0], None if self._weights is None else self._weights[part])
        hard = self._hard(g, x, part, plain.to(wide)) if task.ce_weight else None
        h = torch.where(g[:, None] == 0, 0, h * g[:, None])
        inside = torch.where(self._mine[part], _chain(h[:, :k], picked, task.how), 0)
        if self.gathers:
            out.copy_(inside)
            return
        if self._tail:
            self._outside_gradient(out, h[:, k], x, part, normal.to(wide))
        else:
            out.zero_()
        # What is added to is 0.
        out.scatter_add_(1, self.local[part], inside.to(out.dtype))
        if hard is not None:
            out += hard

    def _outside_gradient(
        self, out: Tensor, h: Tensor, x: Tensor, part: slice, normal: Tensor
    ) -> None:
        # Nothing is outside where all of it has probability 0.
        grad = torch.where(normal[:, 0] == -torch.inf, 0, -h).to(normal.dtype)
        stats = torch.cat([normal, torch.zeros_like(normal)], 1)
        nothing = torch.full_like(self.local[part][:, 0], -1)
        values = self._outside(x, part)
        dz = out if self._plain else torch.empty_like(values)
        self._kernels.logprob_gradient(dz, grad, None, values, nothing, stats, self._inner)
        if not self._plain:
            out.copy_(_chain(dz, x, self._task.how._replace(temperature=1.0)))

    def _hard(self, g: Tensor, x: Tensor, part: slice, plain: Tensor) -> Tensor:
        assert self._labels is not None
        none = self._labels.ids[part] < 0
        down = torch.where(none, 0, -self._task.ce_weight * g).to(plain.dtype)
        stats = torch.cat([plain[:, :2], torch.zeros_like(plain[:, :2])], 1)
        out = torch.empty_like(x, dtype=self._rows_wide)
        self._kernels.logprob_gradient(
            out, down, None, x, self._labels.local[part], stats,
            self._task.how._replace(temperature=1.0),
        )  # fmt: skip
        return out


# --- a head without its logits -----------------------------------------------------------------


def _once(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """A backward pass that is not recorded, whose results refuse to be differentiated."""

    def inner(ctx: Any, grad: Tensor) -> Any:
        with torch.no_grad():
            out = backward(ctx, grad)
        return tuple(x if x is None else once(x) for x in out)

    return inner


class _PickedHead:
    """The rows of a head that a support names, as `Head`."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, support: Support
    ) -> None:
        self.hidden, self.weight, self.bias, self.support = hidden, weight, bias, support
        wide = torch.float64 in (hidden.dtype, weight.dtype)
        self.wide = torch.float64 if wide else torch.float32
        self.rows = weight

    def ids(self, part: slice) -> Tensor:
        return self.support.local[part].reshape(-1)

    def logits(self, part: slice) -> Tensor:
        ids, hidden = self.ids(part), self.hidden[part].to(self.wide)
        self.rows = self.weight.index_select(0, ids).to(self.wide)
        self.rows = self.rows.view(hidden.size(0), -1, hidden.size(1))
        x = torch.bmm(self.rows, hidden[:, :, None])[:, :, 0]
        return x if self.bias is None else x + self.bias[ids].view_as(x)


class _PickedGradients:
    """As `HeadGradients`."""

    def __init__(self, head: _PickedHead, hidden: bool, weight: bool, bias: bool) -> None:
        self._head = head
        x, w = head.hidden, head.weight
        self.hidden = x.new_zeros(x.shape, dtype=head.wide) if hidden else None
        self.weight = w.new_zeros(w.shape, dtype=head.wide) if weight else None
        self.bias = w.new_zeros(w.size(0), dtype=head.wide) if bias else None

    @property
    def wanted(self) -> bool:
        return not (self.hidden is None and self.weight is None and self.bias is None)

    def target(self, logits: Tensor) -> Tensor:
        return logits

    def add(self, part: slice, dy: Tensor) -> None:
        """Of the chunk whose logits were made last."""
        head = self._head
        ids = head.ids(part)
        if self.hidden is not None:
            self.hidden[part] = torch.bmm(dy[:, None], head.rows)[:, 0]
        if self.weight is not None:
            outer = dy[:, :, None] * head.hidden[part].to(head.wide)[:, None]
            self.weight.index_add_(0, ids, outer.view(-1, outer.size(2)))
        if self.bias is not None:
            self.bias.index_add_(0, ids, dy.reshape(-1))


def _opened(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows) -> tuple[Any, Any]:
    """A head and the class of its gradients."""
    if isinstance(rows, Support) and rows.gathers:
        return _PickedHead(hidden, weight, bias, rows), _PickedGradients
    return Head(hidden, weight, bias), HeadGradients


class _Plan(NamedTuple):
    rows: Rows
    needed: tuple[bool, bool, bool]
    """Whose gradient: hidden, weight, bias."""
    uniform: bool
    parts: list[slice]


class _FromHead(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan) -> Any:
        rows, (need_hidden, need_weight, need_bias), uniform, parts = plan
        with torch.autocast(hidden.device.type, enabled=False):
            head, of = _opened(hidden, weight, bias, rows)
            first = of(head, need_hidden, need_weight and uniform, need_bias and uniform)
            others = [of(head, need_hidden, False, False)] * (rows.outputs - 1)
            found = []
            for part in parts:
                x = head.logits(part)
                stats = rows.measure(x, part)
                found.append(stats)
                # The last one may overwrite the logits.
                for i, gradients in [*enumerate(others, 1), (0, first)]:
                    if gradients.wanted:
                        out = gradients.target(x) if i == 0 else torch.empty_like(x)
                        unit = stats.new_zeros((x.size(0), rows.outputs))
                        unit[:, i] = 1
                        rows.gradient(out, unit, x, part, stats)
                        gradients.add(part, out)
            stats = torch.cat(found) if found else hidden.new_zeros((0, 9), dtype=rows.wide)
            out = rows.finish(stats) if found else stats[:, : rows.outputs]
            dx = [y.hidden for y in (first, *others) if y.hidden is not None]
            for y in dx:
                rows.ranks.add(y)
        ctx.plan, ctx.again = plan, (need_weight or need_bias) and not uniform
        kept = [hidden, weight, bias, stats] if ctx.again else [None] * 4
        ctx.dtypes = [None if y is None else y.dtype for y in (hidden, weight, bias)]
        ctx.save_for_backward(*kept, first.weight, first.bias, *dx)
        return out

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, weight, bias, stats, d_weight, d_bias, *dx = ctx.saved_tensors
        rows, (need_hidden, need_weight, need_bias), _, parts = ctx.plan
        if ctx.again:
            with torch.autocast(grad.device.type, enabled=False):
                head, of = _opened(hidden, weight, bias, rows)
                gradients = of(head, False, need_weight, need_bias)
                for part in parts:
                    x = head.logits(part)
                    out = gradients.target(x)
                    rows.gradient(out, grad[part], x, part, stats[part])
                    gradients.add(part, out)
            d_weight, d_bias = gradients.weight, gradients.bias
        else:
            # One number for all rows; none where there are no rows.
            common = grad[:1].sum()
            d_weight, d_bias = (
                None if y is None else y * common.to(y.dtype) for y in (d_weight, d_bias)
            )
        d_hidden = None
        if need_hidden:
            d_hidden = sum(
                g[:, None].to(y.dtype) * y for g, y in zip(grad.unbind(1), dx, strict=True)
            )
        given = zip((d_hidden, d_weight, d_bias), ctx.dtypes, strict=True)
        return (*[None if y is None else y.to(dtype) for y, dtype in given], None)


def from_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Rows,
    *,
    columns: int,
    chunk_tokens: int | None = None,
    uniform: bool = False,
) -> Tensor:
    """Outputs [M, outputs] of rows of the logits of a head whose vocabulary is split.

    Args:
        hidden: [M, H], the same on all ranks.
        weight, bias: [V_r, H], [V_r] or None.
        columns: of the largest shard: all ranks make the same chunks.
        uniform: a promise that all rows will receive the same gradient.
    """
    wanted = torch.is_grad_enabled()
    needed = [wanted and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    many = 8 if uniform and needed[1] else 32
    parts = chunks(hidden.size(0), columns, chunk_tokens, many)
    if isinstance(rows, Support) and rows.gathers:
        room = _GATHER_BYTES.get(hidden.device.type, _GATHER_BYTES["cuda"])
        step = max(1, room // max(1, rows.local.size(1) * hidden.size(1) * 8))
        parts = chunks(hidden.size(0), 1, step if chunk_tokens is None else min(step, chunk_tokens))
    out: Tensor = _FromHead.apply(
        hidden, weight, bias, _Plan(rows, (needed[0], needed[1], needed[2]), uniform, parts)
    )
    return out


# --- logits that exist -------------------------------------------------------------------------


class _FromLogits(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Rows, parts: list[slice], inplace: bool) -> Tensor:
        scratch = isinstance(rows, Support)
        found = []
        for part in parts:
            x = logits[part]
            found.append(rows.measure(x.clone() if scratch else x, part))
        stats = torch.cat(found) if found else logits.new_zeros((0, 9), dtype=rows.wide)
        ctx.rows, ctx.parts, ctx.inplace, ctx.scratch = rows, parts, inplace, scratch
        ctx.save_for_backward(logits, stats)
        return rows.finish(stats) if found else stats[:, : rows.outputs]

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, stats = ctx.saved_tensors
        logits = logits.detach()
        out = logits
        if not ctx.inplace:
            out = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for part in ctx.parts:
            x = logits[part]
            ctx.rows.gradient(
                out[part], grad[part], x.clone() if ctx.scratch else x, part, stats[part]
            )
        return out, None, None, None


def from_logits(logits: Tensor, rows: Rows, *, columns: int, inplace: bool = False) -> Tensor:
    """Outputs [M, outputs] of logits [M, V_r] whose vocabulary is split.

    Args:
        columns: of the largest shard.
        inplace: the backward pass writes the gradient over the logits.
    """
    count = logits.size(0)
    # Only a support copies logits.
    parts = chunks(count, columns, None if isinstance(rows, Support) else max(1, count))
    out: Tensor = _FromLogits.apply(logits, rows, parts, inplace)
    return out
