"""Edits in a store beside the model: a classifier of scope sends a prompt to what answers it.

    editor = Serac(model, tokenizer)
    editor.train_scope(examples)          # facts with paraphrases and neighbourhoods
    editor.fit(facts)
    editor.generate(input_ids, attention_mask, max_new_tokens=20)

SERAC (Mitchell et al. 2022, arXiv 2206.06520). With frozen embeddings phi of texts and a trained
projection P, scaled to the spread of the texts that it was trained on,

    e(x) = P (phi(x) - mean) / spread
    sim(edit, q) = exp(-s |e(edit) - e(q)|^2)            s > 0, trained

A prompt q whose largest sim is above the threshold is in the scope of that edit: the
counterfactual model answers, given the edit before the prompt. Any other prompt goes to the base
model, whose outputs are the same bits as without the editor. The counterfactual model is a small
one of the user's, or the base model itself.

P and s are trained with binary cross-entropy over all pairs of edits and texts of a batch, where a
paraphrase belongs to its edit alone and a neighbourhood prompt to none: with x = s |.|^2 the terms
are x in scope and -log(1 - exp(-x)) outside of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from cl_fast.editing.facts import Fact, check_facts, fact_of
from cl_fast.editing.memory_files import read_memory, write_memory
from cl_fast.editing.retrieval import (
    Embed,
    IndexedFacts,
    Pooling,
    TextEmbedding,
    special_ids,
)
from cl_fast.editing.rows import check_length, padded_inputs
from cl_fast.errors import CheckpointError, NonFiniteError
from cl_fast.models.heads import IGNORED, Evaluating
from cl_fast.options import at_least, function_name, integer, positive, share

__all__ = ["ScopeClassifier", "ScopeReport", "Serac", "edit_context"]

_SAME_TEXT = 1e-6
"""The least x of a pair that is not in scope: two texts of one embedding have x = 0, and an
infinite loss that no projection can change."""


def edit_context(fact: Fact) -> str:
    """What the counterfactual model is given before a prompt in the scope of `fact`."""
    return f"New Fact: {fact.statement}\nPrompt: "


class ScopeClassifier(nn.Module):  # type: ignore[misc, unused-ignore]
    """e(x) and s of `sim = exp(-s |e(edit) - e(q)|^2)`.

    Args:
        size: d, of the embeddings.
        rank: r, of their projections; at most d.
        scale: s to begin with.
        seed: of the projection to begin with: r orthonormal rows, times sqrt(d / r).
    """

    def __init__(self, size: int, rank: int, scale: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        rank = min(rank, size)
        generator = torch.Generator().manual_seed(seed)
        random = torch.randn(size, rank, generator=generator, dtype=torch.float64)
        rows = torch.linalg.qr(random).Q.T * math.sqrt(size / rank)
        self.projection = nn.Parameter(rows.float().contiguous())
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.mean: Tensor
        self.spread: Tensor
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("spread", torch.ones(size))

    def measure(self, embeddings: Tensor) -> None:
        """Takes mean and spread from embeddings [n, d]: theirs become 0, and 1 over all of d."""
        deviation = embeddings.std(0, correction=0)
        least = 1e-6 * float(deviation.max())
        self.mean.copy_(embeddings.mean(0))
        self.spread.copy_(deviation.clamp_min(least) * math.sqrt(embeddings.size(1)))

    def forward(self, embeddings: Tensor) -> Tensor:
        """e: [n, r] of [n, d]."""
        return ((embeddings - self.mean) / self.spread) @ self.projection.T

    def exponents(self, queries: Tensor, edits: Tensor) -> Tensor:
        """s |e(q) - e(edit)|^2 of projections [q, r] and [n, r]: [q, n]."""
        squares = queries.square().sum(1)[:, None] + edits.square().sum(1)[None]
        return self.log_scale.exp() * (squares - 2 * queries @ edits.T).clamp_min(0)


@dataclass(frozen=True)
class ScopeReport:
    """What training the scope came to.

    Attributes:
        losses: of the steps.
        threshold: with which the rest is told.
        in_scope: the part of the paraphrases that are sent to their own edit.
        out_of_scope: the part of the neighbourhood prompts that stay with the base model.
        held_out_in_scope, held_out_out_of_scope: the same of the facts that were not trained on,
            among the edits of all; None without such facts, or without such prompts of theirs.
    """

    losses: list[float] = field(repr=False)
    threshold: float
    in_scope: float | None
    out_of_scope: float | None
    held_out_in_scope: float | None
    held_out_out_of_scope: float | None


@dataclass(frozen=True, eq=False)
class _Texts:
    """Embeddings of edits [n, d] and of texts [q, d]; which belong together, bool [q, n]; and
    which texts are paraphrases or neighbourhood prompts, bool [q]."""

    edits: Tensor
    texts: Tensor
    within: Tensor
    paraphrases: Tensor
    neighbours: Tensor


@dataclass(frozen=True, eq=False)
class _Answers:
    """Largest similarities: of paraphrases, 0 for those whose nearest edit is not theirs, and of
    neighbourhood prompts."""

    inside: Tensor
    outside: Tensor

    @classmethod
    def of(cls, scope: ScopeClassifier, given: _Texts) -> _Answers:
        with torch.no_grad():
            nearest = scope.exponents(scope(given.texts), scope(given.edits)).min(1)
        similar = (-nearest.values.double()).exp()
        own = given.within.gather(1, nearest.indices[:, None])[:, 0]
        return cls((similar * own)[given.paraphrases], similar[given.neighbours])

    def parts(self, threshold: float) -> tuple[float | None, float | None]:
        """Of the paraphrases those above, of the others those that are not."""
        inside, outside = self.inside > threshold, self.outside <= threshold
        return (
            float(inside.double().mean()) if inside.numel() else None,
            float(outside.double().mean()) if outside.numel() else None,
        )

    def best_threshold(self) -> float:
        """Where the sum of both parts is largest; the largest of such thresholds, which lie in the
        middle between two similarities."""
        found = torch.cat([self.inside, self.outside]).clamp(1e-6, 1 - 1e-6)
        found = torch.cat([found, found.new_tensor([1e-6, 1 - 1e-6])]).unique()  # sorted
        candidates = (found[1:] + found[:-1]) / 2
        below = torch.searchsorted(self.inside.sort().values, candidates, right=True)
        kept = torch.searchsorted(self.outside.sort().values, candidates, right=True)
        right = kept / max(1, self.outside.numel()) - below / max(1, self.inside.numel())
        return float(candidates[right == right.max()][-1])


def _all_texts(fact: Fact) -> list[str]:
    return [text.rstrip() for text in (fact.text, *fact.paraphrases, *fact.neighbourhood)]


class Serac(IndexedFacts, nn.Module):  # type: ignore[misc, unused-ignore]
    """A model with edits in a store beside it (SERAC, arXiv 2206.06520).

    It is called, and generates, like the model within; no weight of that is changed.

    Args:
        model: a causal language model of transformers, the base.
        tokenizer: its tokenizer.
        counterfactual: a causal language model of the same vocabulary that answers prompts in
            scope; None for the base model.
        embed: of n texts the embeddings [n, d]; by default `TextEmbedding(model, tokenizer)`.
        layer, pooling: of the default embedding.
        rank: of the projection.
        scale: s to begin with. Given, prompts are classified without `train_scope`, by the
            embeddings as they are.
        threshold: of the similarity, in (0, 1); the paper has one half. "auto" is one half until
            `train_scope` finds a better one on facts that it did not train on.
        context: what the counterfactual model is given before the prompt, by default
            `edit_context`: "New Fact: ...", "Prompt: ".
        seed: of the projection to begin with.
        batch_size: texts that the default embedding takes at a time.

    Attributes:
        facts: those of the store, by id.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        counterfactual: nn.Module | None = None,
        embed: Embed | None = None,
        layer: int | Literal["auto"] = "auto",
        pooling: Pooling = "last",
        rank: int = 128,
        scale: float | None = None,
        threshold: float | Literal["auto"] = "auto",
        context: Callable[[Fact], str] = edit_context,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        at_least("rank", rank, 1)
        integer("seed", seed)
        if scale is not None:
            positive("scale", scale)
        if threshold != "auto":
            share("threshold", threshold, whole=False)
            positive("threshold", threshold)
        super().__init__()
        self._embed_by(embed, model, tokenizer, batch_size, layer, pooling)
        if counterfactual is not None:
            rows = [int(m.get_input_embeddings().weight.size(0)) for m in (model, counterfactual)]
            if rows[0] != rows[1]:
                raise ValueError(
                    f"counterfactual has {rows[1]} tokens in its vocabulary, the model {rows[0]}: "
                    "both must have the same tokenizer"
                )
        self.model: Any = model
        self.counterfactual: Any = model if counterfactual is None else counterfactual
        self.tokenizer = tokenizer
        self.rank, self.scale, self.seed = rank, scale, seed
        self.automatic = threshold == "auto"
        self.threshold = 0.5 if threshold == "auto" else threshold
        self.context = context
        self.scope: ScopeClassifier | None = None
        self._projected: tuple[Tensor, Tensor] | None = None
        self._probe: tuple[str, Tensor] | None = None

    # --- what a model is asked ---

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def generation_config(self) -> Any:
        return self.model.generation_config

    @property
    def device(self) -> torch.device:
        return next(iter(self.model.parameters())).device

    # --- the scope ---

    def _classifier(self, size: int) -> ScopeClassifier:
        if self.scope is None:
            if self.scale is None:
                raise ValueError(
                    "the scope of edits is not known yet: train_scope(facts with paraphrases and "
                    "neighbourhoods), or give scale to classify by the embeddings as they are"
                )
            scope = ScopeClassifier(size, self.rank, self.scale, self.seed)
            self.scope = scope.to(self.device)
        return self.scope

    def _texts(
        self, edits: Sequence[Fact], asked: Sequence[Fact], embedded: dict[str, Tensor]
    ) -> _Texts:
        """The edits, and all texts of the facts in `asked`, which are among them."""
        owners: dict[str, set[int]] = {}
        for i, fact in enumerate(edits):
            for text in (fact.text, *fact.paraphrases):
                owners.setdefault(text.rstrip(), set()).add(i)
        own = {fact.text for fact in edits}
        texts = list(dict.fromkeys(text for fact in asked for text in _all_texts(fact)))
        within = torch.zeros(len(texts), len(edits), dtype=torch.bool)
        for row, text in enumerate(texts):
            within[row, list(owners.get(text, ()))] = True
        device = next(iter(embedded.values())).device
        return _Texts(
            torch.stack([embedded[fact.text] for fact in edits]),
            torch.stack([embedded[text] for text in texts]),
            within.to(device),
            torch.tensor([t in owners and t not in own for t in texts], device=device),
            torch.tensor([t not in owners for t in texts], device=device),
        )

    def train_scope(
        self,
        facts: Iterable[Fact],
        *,
        steps: int = 300,
        lr: float = 1e-2,
        batch_facts: int = 64,
        held_out: float = 0.2,
        seed: int = 0,
        progress: bool = False,
    ) -> ScopeReport:
        """Trains the projection and s on examples of edits; the store is not touched.

        With threshold="auto" the threshold is set, too: to where the part of held-out paraphrases
        that are sent to their own edit, plus the part of held-out neighbourhood prompts that are
        sent to none, is largest with all of the facts in the store; without such held-out prompts,
        of the prompts of all facts.

        Texts are embedded once. Facts of the store, if it has any, are classified anew.

        Args:
            facts: with paraphrases, in their scope, and neighbourhoods, outside of it.
            steps: of Adam.
            lr: of Adam.
            batch_facts: whose texts, in all pairs, make a step.
            held_out: the part of the facts that is not trained on but asked about afterwards, for
                the report and for threshold="auto"; rounded down.
            seed: of what is held out and of the order.
            progress: show a bar.

        Raises:
            TypeError, ValueError: naming the argument; too few facts, or none with paraphrases or
                none with neighbourhoods.
            NonFiniteError: an embedding or the loss is not finite; the classifier stays as it was.
        """
        for name, value in {"steps": steps, "batch_facts": batch_facts}.items():
            at_least(name, value, 1)
        positive("lr", lr)
        share("held_out", held_out, whole=False)
        integer("seed", seed)
        listed = check_facts(facts)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(listed), generator=generator).tolist()
        left = int(held_out * len(listed))
        kept = [listed[i] for i in sorted(order[left:])]
        others = [listed[i] for i in sorted(order[:left])]
        if len(kept) < 2:
            raise ValueError(f"at least 2 facts are needed to train the scope; got {len(kept)}")
        texts = list(dict.fromkeys(text for fact in listed for text in _all_texts(fact)))
        rows = self._index.of(texts)
        embedded = dict(zip(texts, rows, strict=True))
        every = self._texts(listed, listed, embedded)
        if not bool(every.paraphrases.any()):
            raise ValueError("no fact has paraphrases: what is in scope is learnt from them")
        if not bool(every.neighbours.any()):
            raise ValueError(
                "no neighbourhood has a prompt that belongs to none of the facts: what is out of "
                "scope is learnt from them"
            )
        scope = ScopeClassifier(rows.size(1), self.rank, self.scale or 1.0, self.seed)
        scope.to(rows.device)
        mine = dict.fromkeys(text for fact in kept for text in _all_texts(fact))
        scope.measure(torch.stack([embedded[text] for text in mine]))
        losses = self._train(scope, kept, embedded, steps, lr, batch_facts, generator, progress)
        seen = _Answers.of(scope, self._texts(kept, kept, embedded))
        new = _Answers.of(scope, self._texts(listed, others, embedded)) if others else None
        if self.automatic:
            whole = new is not None and new.inside.numel() and new.outside.numel()
            judged = new if whole else _Answers.of(scope, every)
            assert judged is not None
            self.threshold = judged.best_threshold()
        self.scope, self._projected = scope, None
        self._probe = (texts[0], rows[0].clone())
        at = self.threshold
        return ScopeReport(
            losses, at, *seen.parts(at), *((None, None) if new is None else new.parts(at))
        )

    def _train(
        self,
        scope: ScopeClassifier,
        facts: list[Fact],
        embedded: dict[str, Tensor],
        steps: int,
        lr: float,
        batch_facts: int,
        generator: torch.Generator,
        progress: bool,
    ) -> list[float]:
        optimizer = torch.optim.Adam(scope.parameters(), lr=lr)
        losses: list[float] = []
        queue: list[int] = []
        whole = self._texts(facts, facts, embedded) if batch_facts >= len(facts) else None
        with torch.enable_grad(), tqdm(total=steps, desc="scope", disable=not progress) as bar:
            for step in range(steps):
                if whole is None:
                    if len(queue) < batch_facts:
                        queue += torch.randperm(len(facts), generator=generator).tolist()
                    some, queue = queue[:batch_facts], queue[batch_facts:]
                    drawn = [facts[i] for i in dict.fromkeys(some)]
                    batch = self._texts(drawn, drawn, embedded)
                else:
                    batch = whole
                x = scope.exponents(scope(batch.texts), scope(batch.edits))
                outside = -torch.log(-torch.expm1(-x.clamp_min(_SAME_TEXT)))
                loss = torch.where(batch.within, x, outside).sum() / x.size(0)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise NonFiniteError(
                        f"the loss of the scope is {value} after {step} steps: lower lr"
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(value)
                bar.update(1)
        return losses

    def _routed(self, embeddings: Tensor) -> list[tuple[Fact | None, float]]:
        """Of embeddings [q, d] the fact in whose scope they are, and the largest similarity."""
        edits = self._index.embeddings
        if edits is None:
            return [(None, 0.0)] * embeddings.size(0)
        scope = self._classifier(embeddings.size(1))
        with torch.no_grad():
            if self._projected is None or self._projected[0] is not edits:
                self._projected = edits, scope(edits.to(scope.projection.device))
            queries = scope(embeddings.to(scope.projection.device))
            nearest = scope.exponents(queries, self._projected[1]).min(1)
        facts = list(self._index.facts.values())
        return [
            (facts[i] if sim > self.threshold else None, sim)
            for i, sim in zip(
                nearest.indices.tolist(), (-nearest.values).exp().tolist(), strict=True
            )
        ]

    def route(self, texts: Sequence[str]) -> list[tuple[str | None, float]]:
        """Of each text the id of the fact in whose scope it is, None outside; and the largest
        similarity with a fact of the store."""
        if isinstance(texts, str):
            raise TypeError(f"texts must be a list of strings; got the string {texts!r}")
        if not self._index.facts or not texts:
            return [(None, 0.0) for _ in texts]
        routed = self._routed(self._index.of([text.rstrip() for text in texts]))
        return [(None if fact is None else fact.id, sim) for fact, sim in routed]

    def prompts(self, texts: Sequence[str]) -> list[str]:
        """Texts in scope with their edit before them, the others as they are: what the base model
        is given.

        Raises:
            ValueError: another model answers in scope: no prompt of the base model does the same.
        """
        if self.counterfactual is not self.model:
            raise ValueError(
                "a counterfactual model answers in scope: no prompt makes the base model do the "
                "same. Call the editor itself, or its generate"
            )
        facts = self._index.facts
        return [
            text if name is None else self.context(facts[name]) + text
            for text, (name, _) in zip(texts, self.route(texts), strict=True)
        ]

    def before(self, text: str) -> str:
        """What is put before one prompt, "" outside of scope: `evaluate(..., in_context=this)`."""
        return self.prompts([text])[0].removesuffix(text)

    # --- the two routes ---

    def _rows(self, input_ids: Tensor, attended: Tensor) -> list[list[int]]:
        return [
            ids[mask].tolist() for ids, mask in zip(input_ids.cpu(), attended.cpu(), strict=True)
        ]

    def _facts_of(self, rows: list[list[int]]) -> list[Fact | None]:
        """The route of each row of tokens."""
        if not self._index.facts:
            return [None] * len(rows)
        special = special_ids(self.tokenizer)
        words = [[token for token in row if token not in special] for row in rows]
        for i, row in enumerate(words):
            if not row:
                raise ValueError(f"row {i} of input_ids holds no text, so its scope is not known")
        texts = self.tokenizer.batch_decode(words, clean_up_tokenization_spaces=False)
        embed = self.embed
        if isinstance(embed, TextEmbedding) and embed.tokenizer is self.tokenizer:
            embedded = self._index.checked(embed.of_ids(rows), texts)
        else:
            embedded = self._index.of([text.strip() for text in texts])
        return [fact for fact, _ in self._routed(embedded)]

    def _with_edit(self, fact: Fact, row: list[int]) -> list[int]:
        """The tokens of a prompt with the edit after its leading special tokens."""
        special = special_ids(self.tokenizer)
        lead = next(i for i, token in enumerate(row) if token not in special)
        before = self.tokenizer(self.context(fact), add_special_tokens=False)["input_ids"]
        return [*row[:lead], *before, *row[lead:]]

    def _checked_inputs(self, input_ids: Any, attention_mask: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or not input_ids.numel():
            shape = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids)
            raise ValueError(f"input_ids must be tokens [batch, length]; got {shape}")
        if attention_mask is None:
            return input_ids, torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}; got "
                f"{tuple(attention_mask.shape)}"
            )
        return input_ids, attention_mask != 0

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
    ) -> Any:
        """The logits of each row by the model that its prompt is sent to.

        A row's prompt is what stands before its first label, or all of it where there is none.
        Logits of rows out of scope are those of the base model on this batch, bit by bit; of rows
        in scope those that the counterfactual model gives for the same tokens after the edit, 0
        where `attention_mask` is 0.

        Args:
            input_ids, attention_mask: [batch, length].
            labels: [batch, length], -100 where a token does not count.
            use_cache: must be False: to decode with a cache there is `generate`.

        Returns:
            what the model returns; of mixed batches `logits`, and `loss` where labels are given,
            alone.

        Raises:
            ValueError: the inputs are wrong, or longer with the edit than the model can read.
        """
        if use_cache:
            raise ValueError(
                "use_cache must be False: a row in scope has its edit in the cache, too. Decode "
                "with generate, which decides the route at the prompt"
            )
        ids, attended = self._checked_inputs(input_ids, attention_mask)
        prompts = attended
        if labels is not None:
            if labels.shape != ids.shape:
                raise ValueError(
                    f"labels must have the shape of input_ids, {tuple(ids.shape)}; got "
                    f"{tuple(labels.shape)}"
                )
            before = (labels != IGNORED).cumsum(1) == 0
            before = attended & before
            prompts = torch.where(before.any(1, keepdim=True), before, attended)
        routes = self._facts_of(self._rows(ids, prompts))
        inside = [i for i, fact in enumerate(routes) if fact is not None]
        base = None
        if len(inside) < len(routes):
            given = {"input_ids": ids, "attention_mask": attention_mask, "use_cache": False}
            if labels is not None:
                given["labels"] = labels
            base = self.model(**given)
            if not inside:
                return base
        rows = self._rows(ids[inside], attended[inside])
        longer = [self._with_edit(routes[i], row) for i, row in zip(inside, rows, strict=True)]  # type: ignore[arg-type]
        for row in longer:
            check_length(self.counterfactual, len(row), 0, "a prompt in scope, with its edit,")
        wide = padded_inputs(longer, side="right", device=ids.device)
        out = self.counterfactual(**wide, use_cache=False)
        # The last tokens are those of the row; the position before its first word, which is that
        # of a begin token, is where the edit ends.
        own = torch.zeros(len(inside), ids.size(1), out.logits.size(-1)).to(out.logits)
        for j, (row, edited) in enumerate(zip(rows, longer, strict=True)):
            own[j, attended[inside[j]]] = out.logits[j, len(edited) - len(row) : len(edited)]
        if base is None:
            logits = own
        else:
            at = torch.tensor(inside, device=ids.device)
            logits = base.logits.index_copy(0, at, own.to(base.logits.dtype))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED
            )
        return type(out if base is None else base)(loss=loss, logits=logits)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        **options: Any,
    ) -> Tensor:
        """Tokens after each prompt, by the model that the prompt is sent to.

        The route is decided once, at the prompt; each model then decodes with its own cache. Rows
        out of scope get what the base model's `generate` gives for this batch.

        Args:
            input_ids, attention_mask: [batch, length], padded at the left.
            max_new_tokens: at most so many.
            options: of `generate` of transformers, for both models.

        Returns:
            int64 [batch, length + new]: the prompts, and what follows; padded at the right.

        Raises:
            TypeError, ValueError: an option that cannot be served for both routes, or wrong inputs.
        """
        at_least("max_new_tokens", max_new_tokens, 1)
        for name in ("return_dict_in_generate", "streamer", "inputs_embeds", "past_key_values",
                     "max_length", "min_length", "assistant_model"):  # fmt: skip
            if options.get(name):
                raise ValueError(
                    f"{name} cannot be served where rows go to two models, one with the edit "
                    "before the prompt; leave it out"
                )
        ids, attended = self._checked_inputs(input_ids, attention_mask)
        config = options.get("generation_config") or self.generation_config
        pad = options.pop("pad_token_id", getattr(config, "pad_token_id", None))
        if pad is None:
            pad = self.tokenizer.pad_token_id
        if pad is None:
            pad = self.tokenizer.eos_token_id or 0
        if attention_mask is None and bool((ids == pad).any()):
            raise ValueError("input_ids hold padding tokens: give attention_mask, too")
        if not bool(attended[:, -1].all()):
            raise ValueError(
                "prompts must be padded at the left to be continued; a row of attention_mask ends "
                "with 0"
            )
        copies = int(options.get("num_return_sequences") or config.num_return_sequences or 1)
        rows = self._rows(ids, attended)
        routes = self._facts_of(rows)
        inside = [i for i, fact in enumerate(routes) if fact is not None]
        longer = [self._with_edit(routes[i], rows[i]) for i in inside]  # type: ignore[arg-type]
        for row in longer:
            what = "a prompt in scope, with its edit,"
            check_length(self.counterfactual, len(row), max_new_tokens, what)
        options = {**options, "max_new_tokens": max_new_tokens, "pad_token_id": pad}
        width = ids.size(1)
        found: list[tuple[list[int], Tensor]] = []
        with torch.no_grad(), Evaluating(self):
            if len(inside) < len(routes):
                mask = attended.to(ids.dtype)
                out = self.model.generate(input_ids=ids, attention_mask=mask, **options)
                found.append((list(range(len(routes))), out[:, width:]))
            if inside:
                wide = padded_inputs(longer, side="left", pad=pad, device=ids.device)
                out = self.counterfactual.generate(**wide, **options)
                found.append((inside, out[:, wide["input_ids"].size(1) :]))
        new = max(part.size(1) for _, part in found)
        whole = ids.repeat_interleave(copies, 0)
        whole = F.pad(whole, (0, new), value=pad)
        for at, part in found:
            places = [i * copies + j for i in at for j in range(copies)]
            whole[places, width:] = F.pad(part, (0, new - part.size(1)), value=pad)
        return whole

    # --- files ---

    def save(self, path: str | Path) -> None:
        """Writes the store and the classifier, one .safetensors file; no model.

        Raises:
            OutputError: it cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        if self.scope is not None:
            tensors.update({f"scope.{n}": x for n, x in self.scope.state_dict().items()})
        if self._index.embeddings is not None:
            tensors["embeddings"] = self._index.embeddings
        probe = self._probe
        if probe is None and self._index.embeddings is not None:
            probe = (next(iter(self._index.facts.values())).text, self._index.embeddings[0])
        if probe is not None:
            tensors["probe"] = probe[1]
        about = {
            "rank": self.rank,
            "scale": self.scale,
            "threshold": self.threshold,
            "automatic": self.automatic,
            "seed": self.seed,
            "context": function_name(self.context),
            "probe": None if probe is None else probe[0],
            "facts": [fact.to_dict() for fact in self._index.facts.values()],
        }
        write_memory(path, "serac", tensors, about)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: nn.Module,
        tokenizer: Any,
        *,
        counterfactual: nn.Module | None = None,
        embed: Embed | None = None,
        layer: int | Literal["auto"] = "auto",
        pooling: Pooling = "last",
        context: Callable[[Fact], str] = edit_context,
        batch_size: int = 64,
    ) -> Serac:
        """Reads what `save` wrote. Models, encoder and context are given again, as they were.

        Raises:
            CheckpointError: it is no such file, or the encoder does not embed as it did.
        """
        tensors, about = read_memory(path, "serac")
        if about["context"] != function_name(context):
            raise CheckpointError(
                f"{path}: the context was made by {about['context']}, not by "
                f"{function_name(context)}; give the same function"
            )
        made = cls(
            model, tokenizer, counterfactual=counterfactual, embed=embed, layer=layer,
            pooling=pooling, rank=about["rank"], scale=about["scale"],
            threshold=about["threshold"], context=context, seed=about["seed"],
            batch_size=batch_size,
        )  # fmt: skip
        device = made.device
        made.automatic = about["automatic"]
        if about["probe"] is not None:
            now = made._index.of([about["probe"]])[0].cpu()
            then = tensors["probe"]
            if now.shape != then.shape or float((now - then).norm()) > 0.02 * float(then.norm()):
                raise CheckpointError(
                    f"{path}: {about['probe']!r} has another embedding than it had: the store was "
                    "made with another model, encoder or layer"
                )
            made._probe = (about["probe"], then.to(device))
        if "scope.projection" in tensors:
            scope = ScopeClassifier(tensors["scope.mean"].numel(), made.rank)
            scope.load_state_dict(
                {n.removeprefix("scope."): x for n, x in tensors.items() if n.startswith("scope.")}
            )
            made.scope = scope.to(device)
        facts = [fact_of(record, f"{path}, fact {i}") for i, record in enumerate(about["facts"])]
        made._index.facts = {fact.id: fact for fact in facts}
        if facts:
            made._index.embeddings = tensors["embeddings"].to(device)
        return made
