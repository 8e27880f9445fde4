"""The values of facts: what the residual stream should hold at the subject, many facts at a time.

For each fact a vector delta is added to the output of block l (MEMIT), or to what its MLP adds
(ROME), at the lookup token of every rewriting prompt and of the prompt "{} is a":

    loss = mean_prompts( mean_tokens( -log p(target) ) )
           + kl_factor KL(p_now || p_before)              next token at the lookup of "{} is a"
           + weight_decay |delta| / |v0|^2                v0: what it is added to, plain prompt
    delta <- Adam(delta), then scaled back to |delta| <= clamp |v0|
    stop where loss < stop_loss, or after `steps` forwards and steps - 1 updates

This is compute_z of Meng et al. 2023 (MEMIT, arXiv 2210.07229, sec. 4.2) and compute_v of Meng et
al. 2022 (ROME, arXiv 2202.05262, eq. 4), which take one fact at a time; the KL at the lookup
position and the weight decay, on the norm of delta but the square of v0's, are those of their code.

Here the facts are rows of one batch, and no more is computed than depends on delta. What lies
before the lookup token does not: its keys and values are kept, and every step runs the tokens from
the lookup on, through the blocks after l, the last MLP and the head on target positions alone. The
texts before the prompts are read once for all facts of a batch; the prompts "{} is a" are a run of
their own, of one token each; facts whose prompts are equally long after the lookup go together, so
that little is padding. Adam is per element, so that rows do not see one another; a fact that has
stopped leaves the batch. Facts whose prompts agree up to the lookup token (all relations of one
subject, in prompts that begin with it) have one key, and can only have one value: they share one
delta, whose loss is the mean of theirs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_fast.editing.facts import Encoded, Fact, Lookup, encode, encode_many
from cl_fast.editing.rows import padded, padded_left
from cl_fast.losses import Logits, linear_divergence, token_logprobs
from cl_fast.models.blocks import Decoder, Site, batched, cache_rows, widths_of
from cl_fast.models.heads import LinearHead, forward_names, forward_replaced, head_of
from cl_fast.options import at_least, not_negative, one_of, positive

__all__ = ["Group", "ValueOptions", "Values", "fused_activations", "group_facts", "optimise_values"]

Where = Literal["stream", "mlp"]

_CPU_TOKENS = 512
"""Of a run on the CPU: enough for its matrix products, and few enough for its caches."""


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


@dataclass
class _Rows:
    """Prompts of one batch, cut at the lookup token; tensors are on the model's device.

    `owner` is the index of the group, `at` the column of the lookup in the suffix. Targets are
    (row, column, id, weight) of the positions that predict them; the weights of one group sum to 1.
    Prompts for the KL have none; `teacher` holds their logits at the lookup before any change.
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
    teacher: Tensor | None = None
    mlp: Tensor | None = None

    def of(self, live: Tensor) -> _Rows:
        """The rows of the groups that are True in `live`; owners keep their numbers."""
        keep = live[self.owner]
        rows = keep.nonzero().squeeze(1)
        new = torch.cumsum(keep, 0) - 1
        targets = keep[self.target_row]
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
            teacher=None if self.teacher is None else self.teacher[rows],
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
    context: int = 0
    plain: bool = False

    @property
    def stop(self) -> int:
        """Where the last token is that something is read at, and one more."""
        e = self.encoded
        return e.lookup + 1 if self.kl else e.targets.stop - 1


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
                plain = i == 0 and number == 0
                texts.append(_Text(owner, cast(Encoded, None), weight, context=i, plain=plain))
    for text, e in zip(
        texts, encode_many(tokenizer, rows, separator=spaces, lookup=lookup), strict=True
    ):
        text.encoded = e
    _refuse_unknown(groups, tokenizer, texts)
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


def _refuse_unknown(groups: Sequence[Group], tokenizer: Any, texts: Sequence[_Text]) -> None:
    """A subject or target that is <unk> would be edited for all unknown words at once."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        return
    for text in texts:
        e, fact = text.encoded, groups[text.owner].facts[0]
        for what, ids in (("subject", [e.ids[e.lookup]]), ("target", e.target)):
            if unknown in ids and tokenizer.eos_token_id != unknown:
                raise ValueError(
                    f"the {what} of {fact.statement!r} has a word that the tokenizer does not know "
                    f"({tokenizer.unk_token}): it cannot be told from other unknown words"
                )


def _refuse_unreachable(
    decoder: Decoder, groups: Sequence[Group], texts: Sequence[_Text], layer: int
) -> None:
    """Raise where what is added after `layer` cannot reach the tokens that it shall change."""
    for text in texts:
        decoder.check_ids(text.encoded.ids, groups[text.owner].facts[0].statement)
    if layer < len(decoder) - 1:
        return
    for text in texts:
        e = text.encoded
        if not text.kl and len(e.targets) and e.targets.stop - 2 != e.lookup:
            raise ValueError(
                f"block {layer} is the last: what is added there at the subject reaches no later "
                f"token, and {groups[text.owner].facts[0].statement!r} needs that. Choose an "
                "earlier block"
            )


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
        cut = e.lookup if suffix else 0
        prefixes.append(e.ids[:cut])
        suffixes.append(e.ids[cut : text.stop])
        at.append(e.lookup - cut)
    ids, own = padded(suffixes, side="right", pad=pad)
    starts = torch.tensor([len(p) for p in prefixes])
    positions = starts[:, None] + (own.cumsum(1) - 1).clamp_min(0)
    cache, mask = None, own
    if int(starts.max()):
        cache, before = _read(decoder, prefixes, [text.context for text in texts], pad)
        mask = torch.cat([before, own], 1)
    owners = torch.tensor([text.owner for text in texts])
    columns: list[tuple[int, int, int, float]] = []
    for row, (text, a) in enumerate(zip(texts, at, strict=True)):
        if not text.kl:
            e = text.encoded
            weight = text.weight / len(e.targets)
            for position in e.targets:
                columns.append((row, position - 1 - (e.lookup - a), e.ids[position], weight))
    rows = _Rows(
        ids=ids.to(device),
        mask=mask.to(device),
        positions=positions.to(device),
        at=torch.tensor(at, device=device),
        owner=owners.to(device),
        hidden=torch.empty(0),
        cache=cache,
        target_row=torch.tensor([c[0] for c in columns], device=device, dtype=torch.long),
        target_column=torch.tensor([c[1] for c in columns], device=device, dtype=torch.long),
        target_id=torch.tensor([c[2] for c in columns], device=device, dtype=torch.long),
        target_weight=torch.tensor([c[3] for c in columns], device=device, dtype=torch.float32),
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


def _read(
    decoder: Decoder, rows: list[list[int]], kinds: list[int], pad: int
) -> tuple[Any, Tensor]:
    """Keys and values of `rows`, and the mask [rows, width] of where they lie in the cache.

    What all rows of a kind begin with is read once: [begin, padded | rest, padded].
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=decoder.config)
    begins = {kind: _common([r for r, k in zip(rows, kinds, strict=True) if k == kind])
              for kind in dict.fromkeys(kinds)}  # fmt: skip
    rests = [row[len(begins[kind]) :] for row, kind in zip(rows, kinds, strict=True)]
    width = max(map(len, begins.values())) + max(map(len, rests))
    # Padding between begin and rest would count as distance in a window, and for a model that is
    # not told its positions (the ALiBi of MPT).
    window = getattr(decoder.config, "sliding_window", None)
    told = "position_ids" in forward_names(decoder.model)
    saved = sum(map(len, rows)) - sum(map(len, rests)) - sum(map(len, begins.values()))
    if saved <= 0 or not told or (window and width >= window // 2):
        given = padded_left(rows, pad, decoder.device)
        decoder.run(given, cache=cache)
        return cache, given["attention_mask"].cpu()
    numbers = {kind: number for number, kind in enumerate(begins)}
    given = padded_left(list(begins.values()), pad, decoder.device)
    decoder.run(given, cache=cache)
    index = torch.tensor([numbers[kind] for kind in kinds])
    cache = cache_rows(cache, index.to(decoder.device))
    mask = given["attention_mask"].cpu()[index]
    if not any(rests):
        return cache, mask
    given = padded_left(rests, pad, decoder.device)
    mask = torch.cat([mask, given["attention_mask"].cpu()], 1)
    lengths = torch.tensor([len(begins[kind]) for kind in kinds])
    given["position_ids"] += lengths[:, None].to(decoder.device)
    given["attention_mask"] = mask.to(decoder.device)
    decoder.run(given, cache=cache)
    return cache, mask


def _common(rows: list[list[int]]) -> list[int]:
    """What all rows begin with."""
    first, last = min(rows), max(rows)
    count = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), None)
    return first if count is None else first[:count]


def _only_after(cache: Any, layer: int) -> Any:
    """Without the keys and values of blocks that will not run; their length must still be seen."""
    made = cache_rows(cache)
    for i in range(layer + 1):
        made.layers[i].keys = made.layers[i].keys[..., :1].clone()
        made.layers[i].values = made.layers[i].values[..., :1].clone()
    return made


def _last_mlp(decoder: Decoder) -> nn.Module | None:
    """The MLP of the last block, where it is a module that works on each token alone."""
    last = len(decoder) - 1
    try:
        site = decoder.site(last)
    except ValueError:  # a mixture of experts, say: it may stay, if it is not edited
        return None
    parent = site.name.rpartition(".")[0]
    if parent == decoder.names[last]:
        return None
    mlp: nn.Module = decoder.model.get_submodule(parent)
    own = (m for m in mlp.modules() if list(m.parameters(recurse=False)))
    return mlp if all(widths_of(m) is not None for m in own) else None


@contextlib.contextmanager
def _only_at(mlp: nn.Module | None, row: Tensor, column: Tensor) -> Iterator[None]:
    """`mlp` gives 0 elsewhere."""
    if mlp is None:
        yield
        return
    own = mlp.forward

    def forward(x: Tensor, *more: Any, **named: Any) -> Tensor:
        if more or named or x.dim() != 3:
            return cast(Tensor, own(x, *more, **named))
        y = own(x[row, column][None])[0]
        return cast(Tensor, y.new_zeros(*x.shape[:2], y.size(-1)).index_put((row, column), y))

    with forward_replaced(mlp, forward):
        yield


@contextlib.contextmanager
def fused_activations(decoder: Decoder) -> Iterator[None]:
    """The GELU of GPT-2 and GPT-J, which transformers writes out in eight steps, in one kernel.

    Not in 16 bits, where each of the eight is rounded: the model has learnt with that.
    """
    with contextlib.ExitStack() as stack:
        if decoder.dtype in (torch.float32, torch.float64):
            for module in decoder.model.modules():
                if type(module).__name__ == "NewGELUActivation":
                    stack.enter_context(forward_replaced(module, _gelu))
        yield


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class _Batch:
    """The optimisation of the groups of one batch."""

    def __init__(
        self,
        decoder: Decoder,
        head: LinearHead,
        parts: list[_Rows],
        kl: _Rows | None,
        plain: list[Tensor],
        count: int,
        layer: int,
        site: Site | None,
        options: ValueOptions,
    ) -> None:
        self.decoder, self.head, self.parts, self.kl_rows = decoder, head, parts, kl
        self.layer, self.site, self.options = layer, site, options
        self.mlp = _last_mlp(decoder)
        width, device = decoder.hidden_size, parts[0].ids.device
        self.start = torch.empty(count, width, device=device)
        for rows, one in zip(parts, plain, strict=True):
            found = rows.hidden[one, rows.at[one]] if rows.mlp is None else rows.mlp[one]
            self.start[rows.owner[one]] = found.float()
        self.start_norm = self.start.norm(dim=1)
        zero = torch.zeros_like(self.start)
        self.delta, self.mean, self.square = zero.clone(), zero.clone(), zero
        self.live = torch.ones(count, dtype=torch.bool, device=self.start.device)
        self.steps = torch.zeros(count, dtype=torch.long, device=self.start.device)
        self.loss, self.nll, self.kl = (
            torch.full((count,), math.nan, device=self.start.device) for _ in range(3)
        )
        self.clamped = torch.zeros_like(self.live)

    def _given(self, rows: _Rows, delta: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """What the head is given there with delta at the lookup of every prompt: [positions, d]."""
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
        with _only_at(self.mlp, row, column):
            given = self.decoder.run_to_head(
                rows.inputs(), self.layer + 1, hidden=hidden, cache=cache
            )
        return given[row, column]

    def _nll(self, rows: _Rows, delta: Tensor) -> Tensor:
        """[groups]; 0 for those without a row here."""
        given = self._given(rows, delta, rows.target_row, rows.target_column)
        keywords = self.head.keywords(given)
        logprobs = cast(Tensor, token_logprobs(ids=rows.target_id, **keywords))
        nll = torch.zeros(delta.size(0), device=delta.device, dtype=logprobs.dtype)
        owners = rows.owner[rows.target_row]
        return nll.index_add(0, owners, -logprobs * rows.target_weight.to(logprobs.dtype))

    def _kl(self, rows: _Rows, delta: Tensor) -> Tensor:
        """[groups]; 0 for those that have left the batch."""
        everything = torch.arange(rows.ids.size(0), device=rows.ids.device)
        keywords = self.head.keywords(self._given(rows, delta, everything, rows.at))
        if rows.teacher is None:
            rows.teacher = self._teacher(keywords)
        divergence = linear_divergence(
            teacher=Logits(rows.teacher), kind="reverse_kl", reduction="none", **keywords
        )
        kl = torch.zeros(delta.size(0), device=delta.device, dtype=divergence.dtype)
        return kl.index_add(0, rows.owner, divergence)

    def _decay(self, delta: Tensor) -> Tensor:
        return _norms(delta) / self.start_norm.square().clamp_min(1e-30)

    def _teacher(self, keywords: dict[str, Any]) -> Tensor:
        """The logits at the KL positions before any change: the first step, where delta is 0."""
        hidden = keywords["hidden"].detach()
        logits = [z.clone() for _, z in self.head.logits(hidden)]
        return torch.cat(logits)

    def step(self, number: int) -> bool:
        """One forward, and an update of the groups that need one; False when all are done."""
        options = self.options
        last = number == options.steps - 1
        delta = self.delta.requires_grad_(not last)
        gradient = torch.zeros_like(self.delta)

        def summed(terms: list[Callable[[], Tensor]], weight: float = 1.0) -> Tensor:
            """Of one term after the other, so that one graph at a time is held."""
            total = torch.zeros_like(self.start_norm)
            for term in terms:
                with torch.set_grad_enabled(not last):
                    value = term()
                if not last:
                    gradient.add_(torch.autograd.grad(value.sum(), delta)[0], alpha=weight)
                total = total + value.detach()
            return total

        kl_rows = self.kl_rows
        nll = summed([partial(self._nll, rows, delta) for rows in self.parts])
        kl = summed([partial(self._kl, kl_rows, delta)] if kl_rows else [], options.kl_factor)
        decay = summed([partial(self._decay, delta)], options.weight_decay)
        loss = nll + options.kl_factor * kl + options.weight_decay * decay
        self.delta = delta.detach()
        live = self.live
        for kept, new in ((self.loss, loss), (self.nll, nll), (self.kl, kl)):
            kept[live] = new.to(kept.dtype)[live]
        self.steps[live] = number + 1
        self._refuse_nan()
        self.live = live & (self.loss >= options.stop_loss)
        if last or not bool(self.live.any()):
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
        for rows in self.parts:
            present[rows.owner] = True
        if int(self.live.sum()) <= 0.75 * int(present.sum()):
            used = [rows for rows in self.parts if bool(self.live[rows.owner].any())]
            self.parts = [rows.of(self.live) for rows in used]
            self.kl_rows = None if self.kl_rows is None else self.kl_rows.of(self.live)


def _together(
    texts: dict[int, list[_Text]], batch: int, tokens: int | None, suffix: bool
) -> list[list[int]]:
    """Groups in the order of the lengths of their rows, so that little is padding, in pieces.

    A piece is at most `batch` groups, and `tokens` of their rewriting prompts, or one group.
    """

    def shape(group: int) -> tuple[int, int]:
        rows = [text for text in texts[group] if not text.kl]
        return max(t.stop - (t.encoded.lookup if suffix else 0) for t in rows), len(rows)

    shapes = {group: shape(group) for group in texts}
    found: list[list[int]] = []
    rows = 0
    for group in sorted(texts, key=lambda g: (shapes[g], g)):
        width, more = shapes[group]  # width does not fall
        rows += more
        if not found or len(found[-1]) == batch or (tokens and rows * width > tokens):
            found.append([])
            rows = more
        found[-1].append(group)
    return found


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
            batch (1 + contexts) short rows; on the CPU over some hundred tokens of them.
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
    _refuse_unreachable(decoder, groups, texts, layer)
    if not options.kl_factor:
        texts = [text for text in texts if not text.kl]
    of: dict[int, list[_Text]] = {}
    for text in texts:
        of.setdefault(text.owner, []).append(text)
    delta = torch.empty(len(groups), decoder.hidden_size)
    start = torch.empty_like(delta)
    report: list[dict[str, Any]] = [{} for _ in groups]
    most = _CPU_TOKENS if decoder.device.type == "cpu" else None
    for members in _together(of, batch, None, options.suffix):
        own = {
            group: [replace(text, owner=i) for text in of[group]] for i, group in enumerate(members)
        }
        asides = [text for rows in own.values() for text in rows if text.kl]
        pieces = [
            [text for group in some for text in own[group] if not text.kl]
            for some in _together(own, batch, most, options.suffix)
        ]
        plain = [
            torch.tensor([i for i, text in enumerate(some) if text.plain], device=decoder.device)
            for some in pieces
        ]
        try:
            with fused_activations(decoder):
                with torch.no_grad():
                    *parts, kl = (
                        _prepare(decoder, some, layer, pad, site, options.suffix) if some else None
                        for some in (*pieces, asides)
                    )
                run = _Batch(
                    decoder, head, [rows for rows in parts if rows is not None], kl, plain,
                    len(members), layer, site, options,
                )  # fmt: skip
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
