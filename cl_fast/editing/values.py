"""The values of facts: what the residual stream should hold at the subject, many facts at a time.

For each fact a vector delta is added to the output of block l (MEMIT), or to what its MLP adds
(ROME), at the lookup token of every rewriting prompt and of the prompt "{} is a":

    loss = mean_prompts( mean_tokens( -log p(target) ) )
           + kl_factor KL(p_now || p_before)              next token at the lookup of "{} is a"
           + weight_decay |delta| / |v0|                  v0: what it is added to, plain prompt
    delta <- Adam(delta), then scaled back to |delta| <= clamp |v0|
    stop where loss < stop_loss, or after `steps` forwards and steps - 1 updates

This is compute_z of Meng et al. 2023 (MEMIT, arXiv 2210.07229, sec. 4.2) and compute_v of Meng et
al. 2022 (ROME, arXiv 2202.05262, eq. 4), which take one fact at a time; the KL at the lookup
position and the weight decay on the norm, not its square, are those of their code.

Here the facts are rows of one batch, and no more is computed than depends on delta. What lies
before the lookup token does not: its keys and values are kept, and every step runs the tokens from
the lookup on, through the blocks after l, and the head on target positions alone. Adam is per
element, so that rows do not see one another; a fact that has stopped leaves the batch. Facts whose
prompts agree up to the lookup token (all relations of one subject, in prompts that begin with it)
have one key, and can only have one value: they share one delta, whose loss is the mean of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast

import torch
from torch import Tensor

from cl_fast.editing.facts import Encoded, Fact, Lookup, encode, encode_many
from cl_fast.losses import Logits, linear_divergence, token_logprobs
from cl_fast.models.blocks import Decoder, Site, batched, cache_rows
from cl_fast.models.heads import LinearHead, head_of
from cl_fast.options import at_least, not_negative, one_of, positive

__all__ = ["Group", "ValueOptions", "Values", "group_facts", "optimise_values", "padded_left"]

Where = Literal["stream", "mlp"]


@dataclass(frozen=True)
class ValueOptions:
    """How values are optimised; defaults are those of MEMIT's code for GPT-J.

    Attributes:
        steps: forward passes; one update less.
        lr: of Adam.
        weight_decay, kl_factor: see the module.
        clamp: the largest |delta| / |v0|.
        stop_loss: a fact whose loss is below is done.
        kl_prompt: with `{}` for the subject.
        where: delta is added to the block's output ("stream") or the MLP's ("mlp").
        suffix: keep what lies before the lookup token. False runs whole prompts, for models whose
            caches do not hold keys and values per layer.
    """

    steps: int = 25
    lr: float = 0.5
    weight_decay: float = 0.5
    clamp: float = 0.75
    kl_factor: float = 0.0625
    stop_loss: float = 0.05
    kl_prompt: str = "{} is a"
    where: Where = "stream"
    suffix: bool = True

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        positive("lr", self.lr)
        positive("clamp", self.clamp)
        for name in ("weight_decay", "kl_factor", "stop_loss"):
            not_negative(name, getattr(self, name))
        one_of("where", self.where, ("stream", "mlp"))
        if self.kl_prompt.count("{}") != 1:
            raise ValueError(
                f"kl_prompt must have one {{}} where the subject stands; got {self.kl_prompt!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Group:
    """Facts with one lookup key: their plain prompts have the same tokens up to the lookup."""

    key: tuple[int, ...]
    facts: tuple[Fact, ...]

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(fact.id for fact in self.facts)


def group_facts(
    facts: Sequence[Fact], tokenizer: Any, lookup: Lookup = "subject_last"
) -> list[Group]:
    """Facts by their tokens up to the lookup, in the order in which each group begins."""
    rows = [(fact.text, fact.subject_span, fact.target) for fact in facts]
    encoded = encode_many(
        tokenizer, rows, separator=[fact.separator for fact in facts], lookup=lookup
    )
    groups: dict[tuple[int, ...], list[Fact]] = {}
    for fact, e in zip(facts, encoded, strict=True):
        groups.setdefault(tuple(e.ids[: e.lookup + 1]), []).append(fact)
    return [Group(key, tuple(members)) for key, members in groups.items()]


@dataclass(frozen=True, eq=False)
class Values:
    """What was found for each group, in their order.

    Attributes:
        groups: the facts.
        delta: [groups, d] float32.
        start: [groups, d] float32, v0.
        report: of each group: loss, nll, kl, steps, norm, start_norm, clamped.
        layer: of the block.
    """

    groups: list[Group]
    delta: Tensor
    start: Tensor
    report: list[dict[str, Any]]
    layer: int

    @property
    def z(self) -> Tensor:
        """[groups, d] float32: v0 + delta."""
        return self.start + self.delta

    def take(self, indices: Sequence[int]) -> Values:
        """Of some groups only."""
        at = torch.tensor(list(indices), dtype=torch.long)
        return Values(
            [self.groups[i] for i in indices],
            self.delta[at],
            self.start[at],
            [self.report[i] for i in indices],
            self.layer,
        )


def padded_left(rows: Sequence[Sequence[int]], pad: int, device: Any) -> dict[str, Tensor]:
    """input_ids, attention_mask and position_ids [rows, longest], padded on the left."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        if len(row):
            ids[i, longest - len(row) :] = torch.tensor(row)
            mask[i, longest - len(row) :] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {name: tensor.to(device) for name, tensor in given.items()}


def _padded_right(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask


@dataclass
class _Rows:
    """Prompts of one batch, cut at the lookup token; tensors are on the model's device.

    `owner` is the index of the group, `at` the column of the lookup in the suffix. Targets are
    (row, column, id, weight) of the positions that predict them; the weights of one group sum to 1.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    at: Tensor
    owner: Tensor
    hidden: Tensor
    cache: Any
    target_row: Tensor
    target_column: Tensor
    target_id: Tensor
    target_weight: Tensor
    kl_row: Tensor
    kl_owner: Tensor
    kl_teacher: Tensor | None = None
    mlp: Tensor | None = None

    def of(self, live: Tensor) -> _Rows:
        """The rows of the groups that are True in `live`; owners keep their numbers."""
        keep = live[self.owner]
        rows = keep.nonzero().squeeze(1)
        new = torch.cumsum(keep, 0) - 1
        targets = keep[self.target_row]
        kl = keep[self.kl_row]
        width = max(1, int(self.mask[rows][:, -self.ids.size(1) :].sum(1).max()))
        past = self.mask.size(1) - self.ids.size(1)
        return _Rows(
            ids=self.ids[rows, :width],
            mask=self.mask[rows, : past + width],
            positions=self.positions[rows, :width],
            at=self.at[rows],
            owner=self.owner[rows],
            hidden=self.hidden[rows, :width],
            cache=None if self.cache is None else cache_rows(self.cache, rows),
            target_row=new[self.target_row[targets]],
            target_column=self.target_column[targets],
            target_id=self.target_id[targets],
            target_weight=self.target_weight[targets],
            kl_row=new[self.kl_row[kl]],
            kl_owner=self.kl_owner[kl],
            kl_teacher=None if self.kl_teacher is None else self.kl_teacher[kl],
            mlp=None if self.mlp is None else self.mlp[rows],
        )

    def inputs(self) -> dict[str, Tensor]:
        return {
            "input_ids": self.ids,
            "attention_mask": self.mask,
            "position_ids": self.positions,
        }


@dataclass
class _Text:
    owner: int
    encoded: Encoded
    weight: float = 0.0
    kl: bool = False
    plain: bool = False
    cut: list[int] = field(default_factory=list)


def _texts(
    groups: Sequence[Group], tokenizer: Any, contexts: Sequence[str], lookup: Lookup, kl_prompt: str
) -> list[_Text]:
    """The rewriting prompts of all facts, and one KL prompt per group."""
    texts: list[_Text] = []
    rows: list[tuple[str, tuple[int, int] | None, str | None]] = []
    spaces: list[str] = []
    for owner, group in enumerate(groups):
        for number, fact in enumerate(group.facts):
            for i, context in enumerate(("", *contexts)):
                start, stop = (x + len(context) for x in fact.subject_span)
                rows.append((context + fact.text, (start, stop), fact.target))
                spaces.append(fact.separator)
                weight = 1.0 / (len(group.facts) * (1 + len(contexts)))
                texts.append(
                    _Text(owner, cast(Encoded, None), weight, plain=i == 0 and number == 0)
                )
    for text, e in zip(
        texts, encode_many(tokenizer, rows, separator=spaces, lookup=lookup), strict=True
    ):
        text.encoded = e
    for owner, group in enumerate(groups):
        subject = group.facts[0].subject
        start = kl_prompt.index("{}")
        e = encode(
            tokenizer,
            kl_prompt.replace("{}", subject),
            (start, start + len(subject)),
            lookup=lookup,
        )
        texts.append(_Text(owner, e, kl=True))
    return texts


def _prepare(
    decoder: Decoder,
    texts: list[_Text],
    layer: int,
    pad: int,
    site: Site | None,
    suffix: bool,
) -> _Rows:
    """Everything that no step changes: prefixes in the cache, hidden states after `layer`."""
    device = decoder.device
    prefixes, suffixes, at = [], [], []
    for text in texts:
        e = text.encoded
        last = e.lookup + 1 if text.kl else e.targets.stop - 1
        cut = e.lookup if suffix else 0
        prefixes.append(e.ids[:cut])
        suffixes.append(e.ids[cut:last])
        at.append(e.lookup - cut)
    ids, own = _padded_right(suffixes, pad)
    starts = torch.tensor([len(p) for p in prefixes])
    positions = starts[:, None] + (own.cumsum(1) - 1).clamp_min(0)
    cache, mask = None, own
    if int(starts.max()):
        from transformers import DynamicCache

        before = padded_left(prefixes, pad, device)
        cache = DynamicCache(config=decoder.config)
        decoder.run(before, cache=cache)
        mask = torch.cat([before["attention_mask"].cpu(), own], 1)
    owners = torch.tensor([text.owner for text in texts])
    columns: list[tuple[int, int, int, float]] = []
    for row, (text, a) in enumerate(zip(texts, at, strict=True)):
        if not text.kl:
            e = text.encoded
            weight = text.weight / len(e.targets)
            for position in e.targets:
                columns.append((row, position - 1 - (e.lookup - a), e.ids[position], weight))
    kl = [row for row, text in enumerate(texts) if text.kl]
    rows = _Rows(
        ids=ids.to(device),
        mask=mask.to(device),
        positions=positions.to(device),
        at=torch.tensor(at, device=device),
        owner=owners.to(device),
        hidden=torch.empty(0),
        cache=cache,
        target_row=torch.tensor([c[0] for c in columns], device=device),
        target_column=torch.tensor([c[1] for c in columns], device=device),
        target_id=torch.tensor([c[2] for c in columns], device=device),
        target_weight=torch.tensor([c[3] for c in columns], device=device, dtype=torch.float32),
        kl_row=torch.tensor(kl, device=device),
        kl_owner=owners[kl].to(device),
    )
    everything = torch.arange(len(texts), device=device)
    taken: list[Tensor] = []
    hook = None
    if site is not None:
        hook = site.module.register_forward_hook(
            lambda _, __, output: taken.append(
                batched(output.detach(), len(texts))[everything, rows.at]
            )
        )
    try:
        rows.hidden = decoder.run(
            rows.inputs(), 0, layer + 1, cache=None if cache is None else cache_rows(cache)
        )
    finally:
        if hook is not None:
            hook.remove()
    if site is not None:
        rows.mlp = taken[0]
    if cache is not None:
        rows.cache = _only_after(cache, layer)
    return rows


def _only_after(cache: Any, layer: int) -> Any:
    """Without the keys and values of blocks that will not run; their length must still be seen."""
    made = cache_rows(cache)
    for i in range(layer + 1):
        made.layers[i].keys = made.layers[i].keys[..., :1].clone()
        made.layers[i].values = made.layers[i].values[..., :1].clone()
    return made


class _Batch:
    """The optimisation of the groups of one batch."""

    def __init__(
        self,
        decoder: Decoder,
        head: LinearHead,
        rows: _Rows,
        plain: Tensor,
        count: int,
        layer: int,
        site: Site | None,
        options: ValueOptions,
    ) -> None:
        self.decoder, self.head, self.rows = decoder, head, rows
        self.layer, self.site, self.options = layer, site, options
        if rows.mlp is None:
            self.start = rows.hidden[plain, rows.at[plain]].float()
        else:
            self.start = rows.mlp[plain].float()
        self.start_norm = self.start.norm(dim=1)
        zero = torch.zeros_like(self.start)
        self.delta, self.mean, self.square = zero.clone(), zero.clone(), zero
        self.live = torch.ones(count, dtype=torch.bool, device=self.start.device)
        self.steps = torch.zeros(count, dtype=torch.long, device=self.start.device)
        self.loss, self.nll, self.kl = (
            torch.full((count,), math.nan, device=self.start.device) for _ in range(3)
        )
        self.clamped = torch.zeros_like(self.live)

    def _losses(self, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, nll, kl), each [groups]; of groups that have left the batch they are 0."""
        rows = self.rows
        everything = torch.arange(rows.ids.size(0), device=rows.ids.device)
        pushed = delta[rows.owner]
        if self.site is not None and rows.mlp is not None:
            y = rows.mlp.float()
            pushed = self.site.contribution((y + pushed).to(rows.hidden.dtype)).float()
            pushed = pushed - self.site.contribution(rows.mlp).float()
        hidden = rows.hidden.clone()
        at = hidden[everything, rows.at].float() + pushed
        hidden = hidden.index_put((everything, rows.at), at.to(hidden.dtype))
        cache = None if rows.cache is None else cache_rows(rows.cache)
        given = self.decoder.run_to_head(rows.inputs(), self.layer + 1, hidden=hidden, cache=cache)
        keywords = self.head.keywords(given[rows.target_row, rows.target_column])
        logprobs = cast(Tensor, token_logprobs(ids=rows.target_id, **keywords))
        nll = torch.zeros(delta.size(0), device=delta.device, dtype=logprobs.dtype)
        owners = rows.owner[rows.target_row]
        nll = nll.index_add(0, owners, -logprobs * rows.target_weight.to(logprobs.dtype))
        kl = torch.zeros_like(nll)
        if self.options.kl_factor:
            keywords = self.head.keywords(given[rows.kl_row, rows.at[rows.kl_row]])
            if rows.kl_teacher is None:
                rows.kl_teacher = self._teacher(keywords)
            divergence = linear_divergence(
                teacher=Logits(rows.kl_teacher), kind="reverse_kl", reduction="none", **keywords
            )
            kl = kl.index_add(0, rows.kl_owner, divergence.to(kl.dtype))
        decay = self.options.weight_decay * _norms(delta) / self.start_norm.clamp_min(1e-30)
        return nll + self.options.kl_factor * kl + decay, nll, kl

    def _teacher(self, keywords: dict[str, Any]) -> Tensor:
        """The logits at the KL positions before any change: the first step, where delta is 0."""
        hidden = keywords["hidden"].detach()
        logits = [z.clone() for _, z in self.head.logits(hidden)]
        return torch.cat(logits)

    def step(self, number: int) -> bool:
        """One forward, and an update of the groups that need one; False when all are done."""
        options = self.options
        delta = self.delta.requires_grad_(True)
        with torch.enable_grad():
            loss, nll, kl = self._losses(delta)
            (gradient,) = torch.autograd.grad(loss[self.live].sum(), delta)
        self.delta = delta.detach()
        live = self.live
        for kept, new in ((self.loss, loss), (self.nll, nll), (self.kl, kl)):
            kept[live] = new.detach().to(kept.dtype)[live]
        self.steps[live] = number + 1
        self._refuse_nan()
        self.live = live & (self.loss >= options.stop_loss)
        if number == options.steps - 1 or not bool(self.live.any()):
            return False
        self._adam(gradient, number + 1)
        self._compact()
        return True

    def _refuse_nan(self) -> None:
        wrong = (~torch.isfinite(self.loss)).nonzero().squeeze(1).tolist()
        if wrong:
            raise _NotFinite(wrong)

    def _adam(self, gradient: Tensor, t: int) -> None:
        live = self.live[:, None]
        self.mean = torch.where(live, 0.9 * self.mean + 0.1 * gradient, self.mean)
        self.square = torch.where(live, 0.999 * self.square + 0.001 * gradient**2, self.square)
        mean, square = self.mean / (1 - 0.9**t), self.square / (1 - 0.999**t)
        moved = self.delta - self.options.lr * mean / (square.sqrt() + 1e-8)
        norm, most = moved.norm(dim=1), self.options.clamp * self.start_norm
        over = norm > most
        scaled = torch.where(over[:, None], moved * (most / norm.clamp_min(1e-30))[:, None], moved)
        self.delta = torch.where(live, scaled, self.delta)
        self.clamped |= over & self.live

    def _compact(self) -> None:
        present = torch.zeros_like(self.live)
        present[self.rows.owner] = True
        if int(self.live.sum()) <= 0.75 * int(present.sum()):
            self.rows = self.rows.of(self.live)


class _NotFinite(Exception):
    def __init__(self, groups: list[int]) -> None:
        self.groups = groups


def _norms(delta: Tensor) -> Tensor:
    """Norms of rows whose gradient at 0 is 0, not NaN."""
    square = (delta * delta).sum(1)
    return torch.where(square > 0, square.clamp_min(1e-45).sqrt(), square)


def optimise_values(
    decoder: Decoder,
    tokenizer: Any,
    groups: Sequence[Group],
    layer: int,
    *,
    contexts: Sequence[str] = (),
    options: ValueOptions | None = None,
    lookup: Lookup = "subject_last",
    batch: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Values:
    """delta of each group at block `layer`; the model is not changed.

    The model must be in eval mode. Parameters that require grad only cost memory.

    Args:
        decoder: from `decoder_of`.
        tokenizer: a fast one.
        groups: from `group_facts`.
        layer: the block whose output, or MLP's output, gets delta.
        contexts: texts put before the prompts, with the space or stop that separates them.
        options: see `ValueOptions`.
        lookup: which token is looked up.
        batch: groups at a time. Memory of one step is that of a backward pass over
            batch (1 + contexts + 1) short rows.
        progress: called with the number of facts that are done.

    Raises:
        ValueError: a loss is NaN or infinite; the facts are named.
    """
    options = ValueOptions() if options is None else options
    at_least("batch", batch, 1)
    layer = decoder.layer(layer, "layer")
    site = decoder.site(layer) if options.where == "mlp" else None
    head = head_of(decoder.model)
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    texts = _texts(groups, tokenizer, contexts, lookup, options.kl_prompt)
    if not options.kl_factor:
        texts = [text for text in texts if not text.kl]
    # Groups of like length go together, so that little of a batch is padding.
    length: dict[int, int] = {}
    for text in texts:
        length[text.owner] = max(length.get(text.owner, 0), len(text.encoded.ids))
    order = sorted(range(len(groups)), key=lambda g: (length[g], g))
    of: dict[int, list[_Text]] = {}
    for text in texts:
        of.setdefault(text.owner, []).append(text)
    delta = torch.empty(len(groups), decoder.hidden_size)
    start = torch.empty_like(delta)
    report: list[dict[str, Any]] = [{} for _ in groups]
    for first in range(0, len(order), batch):
        members = order[first : first + batch]
        chunk = [
            _Text(i, text.encoded, text.weight, text.kl, text.plain)
            for i, group in enumerate(members)
            for text in of[group]
        ]
        plain = torch.tensor([i for i, t in enumerate(chunk) if t.plain], device=decoder.device)
        with torch.no_grad():
            rows = _prepare(decoder, chunk, layer, pad, site, options.suffix)
        run = _Batch(decoder, head, rows, plain, len(members), layer, site, options)
        try:
            for number in range(options.steps):
                if not run.step(number):
                    break
        except _NotFinite as error:
            names = [fact.text for i in error.groups for fact in groups[members[i]].facts]
            raise ValueError(
                f"the loss of {names[:3]} is not finite after {int(run.steps.max())} steps: the "
                f"model's own numbers are not finite there, or lr={options.lr} is too large"
            ) from None
        norms = run.delta.norm(dim=1)
        delta[members], start[members] = run.delta.cpu(), run.start.cpu()
        for i, group in enumerate(members):
            report[group] = {
                "loss": float(run.loss[i]),
                "nll": float(run.nll[i]),
                "kl": float(run.kl[i]),
                "steps": int(run.steps[i]),
                "norm": float(norms[i]),
                "start_norm": float(run.start_norm[i]),
                "clamped": bool(run.clamped[i]),
            }
        if progress is not None:
            progress(sum(len(groups[g].facts) for g in members))
    return Values(list(groups), delta, start, report, layer)
