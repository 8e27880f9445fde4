"""Anchors: weights are pulled back to where earlier tasks left them (L2-SP, EWC).

    penalty = lam/2 sum_i F_i (theta_i - theta*_i)^2         never built: its gradient is added

    task t ends at theta_t with the Fisher diagonal F_t; then, with decay gamma,

    F      <-  gamma F + F_t
    theta* <-  (gamma F theta* + F_t theta_t) / (gamma F + F_t)     center="mean"
    theta* <-  theta_t                                              center="latest"

With center="mean" one anchor stands for all tasks, exactly: up to a constant the penalty is
sum_t gamma^(T-t) lam/2 sum F_t (theta - theta_t)^2, since a sum of parabolas is a parabola. Memory
and time do not grow with the number of tasks, and no task is forgotten by the anchor.
center="latest" is online EWC (Schwarz et al. 2018, arXiv 1805.06370, section 3).

Without a Fisher (L2-SP: Li et al. 2018, arXiv 1802.01483) F_t is 1 and theta_t is where the task
*begins*, so the first task is anchored too.

The Fisher diagonal (EWC: Kirkpatrick et al. 2017, arXiv 1612.00796), per token:

    F = sum_g (grad sum_{tokens of g} log p(y))^2 / number of tokens         g: a sequence, a batch

With labels drawn from the model it is unbiased for either kind of g, because the gradients of two
tokens are then uncorrelated; batches need fewer backward passes and scatter more. With the labels
of the data it is the empirical Fisher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cl_fast.errors import CheckpointError, NonFiniteError
from cl_fast.losses import token_logprobs
from cl_fast.models.heads import (
    IGNORED,
    Evaluating,
    head_of,
    last_hidden,
    next_labels,
    run_inside,
)
from cl_fast.models.sharding import local, row_range, sum_over_ranks_, this_rank
from cl_fast.ops import anchor_gradient_, anchor_penalty, anchor_pull_
from cl_fast.options import at_least, dtype_name, integer, not_negative, one_of, share
from cl_fast.training.keeping import Keep, Task, needs
from cl_fast.training.tokens import counted, on_device_of

__all__ = ["Anchor", "fisher_diagonal"]

Group = Literal["sequence", "batch"]
Labels = Literal["data", "model"]
Fisher = Literal["none", "sequence", "batch"]
Center = Literal["mean", "latest"]
Pull = Literal["gradient", "decoupled"]

_DTYPES = (None, torch.bfloat16, torch.float32, torch.float64)


# --- the Fisher diagonal -----------------------------------------------------------------------


def _groups(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], group: Group
) -> Iterator[tuple[dict[str, Any], Tensor, int]]:
    """What the model is given, labels [B, T] and the number of sequences, group by group."""
    for batch in batches:
        given, labels = counted(on_device_of(model, batch))
        size = labels.size(0)
        if group == "batch":
            yield given, labels, size
            continue
        for i in range(size):
            one = {
                k: v[i : i + 1] if isinstance(v, Tensor) and v.dim() and v.size(0) == size else v
                for k, v in given.items()
            }
            yield one, labels[i : i + 1], 1


def _log_likelihood(
    model: nn.Module, given: Mapping[str, Any], labels: Tensor, generator: torch.Generator | None
) -> Tensor:
    """The sum of log p over the tokens that count; with a generator of labels drawn from p."""
    targets = next_labels(labels)

    def total(inner: Any, **inputs: Any) -> Tensor:
        hidden = last_hidden(inner, **inputs)[:, -targets.size(1) :]
        head, ids = head_of(inner), targets
        if generator is not None:
            counts = targets != IGNORED
            drawn = []
            for _, logits in head.logits(hidden.detach()[counts]):
                p = logits.float().softmax(-1)
                drawn.append(torch.multinomial(p, 1, generator=generator).squeeze(1))
            ids = targets.masked_scatter(counts, torch.cat(drawn).to(targets.dtype))
        return token_logprobs(**head.keywords(hidden), ids=ids).sum()

    value: Tensor = run_inside(model, total, **given)
    return value


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    group: Group = "sequence",
    labels: Labels = "data",
    sequences: int = 1024,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of the parameters that require grad, per token.

    One backward pass per group, in eval mode; gradients that were there are kept. A row of a batch
    counts as a sequence. Several ranks share the work and get the same result; under FSDP2 a group
    has one sequence (or batch) of each rank.

    Args:
        model: a causal language model of transformers; PEFT's too, unwrapped from DDP.
        batches: on any device, with the labels that a trainer has (`cl_fast.training.tokens`).
        group: over what gradients are summed before they are squared.
        labels: "data" as the batches have them, or "model": drawn from the model's own
            distribution at each position that counts.
        sequences: at most so many, over all ranks; the batch that goes beyond is still used.
        seed: of what is drawn; each rank has a stream of its own.

    Returns:
        For each name the part of F on this rank, float32 (float64 for such parameters), in the
        shape of the parameter; 0 where no gradient arrives.

    Raises:
        ValueError: unknown options, nothing requires grad, or no token counts.
        NonFiniteError: a gradient is NaN or infinite; the parameter is named.
    """
    one_of("group", group, get_args(Group))
    one_of("labels", labels, get_args(Labels))
    at_least("sequences", sequences, 1)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("no parameter of the model requires grad: there is nothing to anchor")
    device = local(named[0][1]).device
    rank, ranks = this_rank()
    sharded = any(isinstance(p, DTensor) for _, p in named)
    generator = None
    if labels == "model":
        generator = torch.Generator(device).manual_seed(seed * ranks + rank)
    sums = {}
    for name, p in named:
        x = local(p)
        sums[name] = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    counts = torch.zeros(2, dtype=torch.float64, device=device)  # tokens, groups
    before = [p.grad for _, p in named]
    limit, seen = -(-sequences // ranks), 0
    source = _groups(model, batches, group)
    try:
        with Evaluating(model), torch.enable_grad():
            while True:
                entry = next(source, None) if seen < limit else None
                if sharded and ranks > 1:  # their passes must go together
                    going = torch.tensor(float(entry is not None), device=device)
                    dist.all_reduce(going, dist.ReduceOp.MIN)
                    entry = entry if going else None
                if entry is None:
                    break
                given, ids, size = entry
                seen += size
                tokens = int((next_labels(ids) != IGNORED).sum())
                if not tokens and not sharded:
                    continue
                for _, p in named:
                    p.grad = None
                _log_likelihood(model, given, ids, generator).backward()
                counts[0] += tokens
                counts[1] += 1
                for name, p in named:
                    if p.grad is not None:
                        g = local(p.grad).to(sums[name].dtype)
                        # FSDP2 averages over ranks; the gradient of a group is a sum.
                        sums[name].addcmul_(g, g, value=float(ranks**2) if sharded else 1.0)
    finally:
        for (_, p), grad in zip(named, before, strict=True):
            p.grad = grad
    if ranks > 1:
        dist.all_reduce(counts)
        if not sharded:
            for x in sums.values():
                dist.all_reduce(x)
    if not counts[0]:
        raise ValueError("no token of batches counts, so there is no Fisher: look at their labels")
    for name, x in sums.items():
        if not torch.isfinite(x.div_(counts[0].to(x.dtype)).sum()):
            raise NonFiniteError(
                f"the gradient of {name} is NaN or infinite, so there is no Fisher: is the model, "
                "or a batch, broken?"
            )
    return sums


# --- the keep ----------------------------------------------------------------------------------


class Anchor(Keep):
    """L2-SP or EWC: see the formulas of this module.

    What requires grad is anchored. The pull is added to gradients after clipping, once per step of
    the optimizer, so it does not depend on accumulation; or it is taken off the weights beside the
    optimizer's step. Memory: one anchor, and with EWC one F, per parameter; nothing else of the
    model's size.

    Args:
        weight: lam. F is per token, so lam compares with a loss that is a mean over tokens.
        fisher: "none" for L2-SP, or over what gradients are squared (see `fisher_diagonal`), for
            EWC; it then needs the batches of a task when the task ends.
        labels: "data" for the empirical Fisher, "model" to draw them.
        sequences: at most so many per task.
        decay: gamma; 1 keeps all tasks alike, 0 keeps the last one only.
        center: "mean", which is exact over all tasks, or "latest", online EWC.
        pull: "gradient"; or "decoupled", theta -= min(lr lam F, 1) (theta - theta*), which an
            adaptive optimizer does not rescale.
        learning_rate: for "decoupled": tells lr when called, as `lambda: schedule.get_last_lr()[0]`
            does. Without it lr is 1, so that `weight` is the part taken at each step.
        dtype: of stored anchors and F: None for that of the parameter and float32 (float64 where
            the parameter is); torch.bfloat16 halves float32, torch.float32 keeps the mean of
            several tasks exact where parameters are bfloat16.
        seed: of drawn labels.

    Raises:
        ValueError: an argument is out of range; it is named.
    """

    def __init__(
        self,
        weight: float,
        *,
        fisher: Fisher = "none",
        labels: Labels = "data",
        sequences: int = 1024,
        decay: float = 1.0,
        center: Center = "mean",
        pull: Pull = "gradient",
        learning_rate: Callable[[], float] | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        not_negative("weight", weight)
        share("decay", decay)
        one_of("fisher", fisher, get_args(Fisher))
        one_of("labels", labels, get_args(Labels))
        one_of("center", center, get_args(Center))
        one_of("pull", pull, get_args(Pull))
        at_least("sequences", sequences, 1)
        integer("seed", seed)
        if fisher == "none" and labels == "model":
            raise ValueError("labels='model' has no effect with fisher='none': choose a fisher")
        if learning_rate is not None and pull != "decoupled":
            raise ValueError("learning_rate has no effect with pull='gradient': leave it out")
        if dtype not in _DTYPES:
            raise ValueError(
                f"dtype must be None, torch.bfloat16, torch.float32 or torch.float64; got {dtype} "
                "(float16 cannot hold a small F)"
            )
        self.weight, self.fisher, self.labels = float(weight), fisher, labels
        self.sequences, self.decay, self.center = sequences, float(decay), center
        self.pull, self.learning_rate, self.dtype, self.seed = pull, learning_rate, dtype, seed
        self._anchors: dict[str, Tensor] = {}
        self._fisher: dict[str, Tensor] = {}
        self._terms: dict[str, float] = {}  # F where it is one number
        self._rows: dict[str, list[int]] = {}  # of sharded parameters
        self._last: list[tuple[nn.Parameter, str]] = []

    # Hooks.

    def before_task(self, model: nn.Module, task: Task) -> None:
        named = dict(model.named_parameters())
        for name in self._anchors:
            if name not in named:
                raise ValueError(
                    f"the model has no parameter {name!r}, which is anchored: its modules were "
                    "renamed or taken out (adapters of PEFT rename them)"
                )
            self._check_shape(name, named[name])
        if self.fisher == "none":
            self._add(model, None)

    def on_gradients(self, model: nn.Module) -> None:
        self._last = self._anchored(model)
        if self.pull != "gradient":
            return
        pairs = [(p, name) for p, name in self._last if p.grad is not None]
        if pairs and self.weight:
            grads = [local(p.grad) for p, _ in pairs if p.grad is not None]
            anchor_gradient_(grads, **self._given(pairs, "strength", self.weight))

    def on_update(self, model: nn.Module) -> None:
        if self.pull != "decoupled":
            return
        self._last = self._anchored(model)
        rate = 1.0 if self.learning_rate is None else float(self.learning_rate())
        if self._last and self.weight and rate:
            anchor_pull_(**self._given(self._last, "amount", self.weight * rate))

    def after_task(self, model: nn.Module, task: Task) -> None:
        self._last = []
        if self.fisher == "none":
            return
        batches = needs(task, "batches", "Anchor with a fisher")
        found = fisher_diagonal(
            model,
            batches(),
            group=self.fisher,
            labels=self.labels,
            sequences=self.sequences,
            seed=self.seed + task.index,
        )
        self._add(model, found)

    # The anchors.

    def _anchored(self, model: nn.Module) -> list[tuple[nn.Parameter, str]]:
        """Parameters in training that have an anchor; the anchors are where these are."""
        pairs = []
        for name, p in model.named_parameters():
            if not p.requires_grad or name not in self._anchors:
                continue
            self._check_shape(name, p)
            device = local(p).device
            for kept in (self._anchors, self._fisher):
                if name in kept and kept[name].device != device:
                    kept[name] = kept[name].to(device)
            pairs.append((p, name))
        return pairs

    def _check_shape(self, name: str, p: Tensor) -> None:
        x = local(p)
        rows = [row_range(p).start, row_range(p).stop]
        if x.shape != self._anchors[name].shape or self._rows.get(name, rows) != rows:
            raise ValueError(
                f"the anchor of {name} is of the shape {tuple(self._anchors[name].shape)}"
                f"{self._told(name)}, the parameter of {tuple(x.shape)}: it is of another model, "
                "or of other ranks"
            )

    def _told(self, name: str) -> str:
        return f" (rows {self._rows[name]})" if name in self._rows else ""

    def _given(
        self, pairs: list[tuple[nn.Parameter, str]], strength: str, value: float
    ) -> dict[str, Any]:
        """The arguments of the ops for these parameters."""
        dense = not self._terms
        return {
            "weights": [local(p) for p, _ in pairs],
            "anchors": [self._anchors[n] for _, n in pairs],
            "fisher": [self._fisher[n] for _, n in pairs] if dense else None,
            strength: value if dense else [value * self._terms[n] for _, n in pairs],
        }

    def _add(self, model: nn.Module, fisher: dict[str, Tensor] | None) -> None:
        """One more parabola. New tensors throughout: a state that was given away stays."""
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            theta = local(p)
            if isinstance(p, DTensor):
                self._rows[name] = [row_range(p).start, row_range(p).stop]
            wide = torch.promote_types(theta.dtype, torch.float32)
            old = self._anchors.get(name)
            part: float | Tensor
            if fisher is None:
                total = self.decay * self._terms.get(name, 0.0) + 1.0
                self._terms[name], part = total, 1.0 / total
            else:
                new = fisher[name]
                total_f = new
                if name in self._fisher:
                    total_f = new.add(self._fisher[name].to(new), alpha=self.decay)
                # Where no task minds, theta* is of no account.
                part = torch.where(total_f > 0, new / total_f, 1.0)
                self._fisher[name] = total_f.to(self.dtype or wide)
            if old is None or self.center == "latest":
                anchor = theta.clone()
            else:
                anchor = old.to(theta.device, wide).lerp(theta.to(wide), part)
            self._anchors[name] = anchor.to(self.dtype or theta.dtype)

    # The rest.

    def state_dict(self) -> dict[str, Any]:
        """Anchors, F and counts. Under FSDP2 those of this rank: save and load on each."""
        return {
            "anchors": dict(self._anchors),
            "fisher": dict(self._fisher),
            "terms": dict(self._terms),
            "rows": dict(self._rows),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        wrong = {"anchors", "fisher", "terms", "rows"} ^ set(state)
        if wrong:
            raise CheckpointError(f"this is no state of an Anchor: look at {sorted(wrong)}")
        other = "terms" if self.fisher != "none" else "fisher"
        if state[other]:
            what = "without a Fisher" if other == "terms" else "with a Fisher"
            raise CheckpointError(
                f"the state is of anchors {what}; this Anchor has fisher={self.fisher!r}"
            )
        self._anchors, self._fisher = dict(state["anchors"]), dict(state["fisher"])
        self._terms, self._rows = dict(state["terms"]), dict(state["rows"])
        self._last = []

    def options(self) -> dict[str, Any]:
        return {
            "weight": self.weight,
            "fisher": self.fisher,
            "labels": self.labels,
            "sequences": self.sequences,
            "decay": self.decay,
            "center": self.center,
            "pull": self.pull,
            "learning_rate": "given" if self.learning_rate else None,
            "dtype": dtype_name(self.dtype),
            "seed": self.seed,
        }

    def measures(self) -> dict[str, float]:
        """`anchor/penalty` at the weights as they are now; all ranks must ask under FSDP2."""
        whole = [(p, n) for p, n in self._last if not isinstance(p, DTensor)]
        split = [(p, n) for p, n in self._last if isinstance(p, DTensor)]
        total = 0.0
        for pairs in (whole, split):
            if pairs:
                value = anchor_penalty(**self._given(pairs, "strength", self.weight))
                total += float(sum_over_ranks_(value, pairs[0][0]))
        return {"anchor/penalty": total} if self._last else {}
