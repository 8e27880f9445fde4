"""Facts in the context: found for each prompt and put before it; no weight is changed.

    editor = InContext(model, tokenizer).fit(facts)
    editor.prompt("Ada Lum plays the sport of")

IKE (Zheng et al. 2023, arXiv 2305.12740). The prompt is embedded, the facts whose texts are nearest
by cosine are looked up, and the model is given

    New Fact: {statement}                        a demonstration, and more of them, the nearest last
    Prompt: {another prompt} {its answer}

    New Fact: {statement of the fact found}
    Prompt: {the prompt}

A demonstration is made of another fact, and is one of three kinds, in the proportion 1 : 3 : 4 and
in a shuffled order: to copy (its own prompt and target), to update (a paraphrase of it, and its
target) and to retain (a prompt that is not about it, and the answer which that had).

An embedding is a hidden state of the model itself after one of its blocks, at the last token or the
mean of all, or what a function of the user's gives.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from cl_fast.editing.facts import Fact, check_facts, unknown_ids
from cl_fast.editing.rows import check_length, like_lengths, padded, padded_inputs
from cl_fast.errors import NonFiniteError
from cl_fast.models.blocks import decoder_of
from cl_fast.models.heads import Evaluating, unwrap
from cl_fast.options import at_least, integer, one_of

__all__ = [
    "Embed",
    "FactIndex",
    "InContext",
    "IndexedFacts",
    "Pooling",
    "TextEmbedding",
    "prompt_ids",
    "special_ids",
]

Embed = Callable[[Sequence[str]], Tensor]
"""Of n texts the embeddings, floating [n, d]."""

Pooling = Literal["last", "mean"]
Kind = Literal["copy", "update", "retain"]


# --- tokens ------------------------------------------------------------------------------------


def special_ids(tokenizer: Any) -> set[int]:
    """Of tokens that are no text. A word that is not known is one."""
    return set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}


def prompt_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of texts that are to be continued: without what a tokenizer puts at the end."""
    if not texts:
        return []
    batch = tokenizer(list(texts), padding=False, return_special_tokens_mask=True)
    rows = []
    for ids, special in zip(batch["input_ids"], batch["special_tokens_mask"], strict=True):
        length = len(ids)
        while length and special[length - 1]:
            length -= 1
        rows.append(list(ids[:length]))
    return rows


class TextEmbedding:
    """Texts as hidden states of a causal model: float32 [n, d].

    Special tokens do not count. Only the blocks up to `layer` run.

    Args:
        model: a causal language model of transformers; it is embedded with as it is at each call.
        tokenizer: its tokenizer.
        layer: the block after which states are read, from the end where negative; "auto" is the
            middle one, L // 2.
        pooling: "last", the state at the last token, which has seen all others; or "mean", of all
            tokens.
        batch_size: texts at a time; those of similar lengths go together.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        layer: int | Literal["auto"] = "auto",
        pooling: Pooling = "last",
        batch_size: int = 64,
    ) -> None:
        at_least("batch_size", batch_size, 1)
        one_of("pooling", pooling, ("last", "mean"))
        self.pooling = pooling
        self.decoder = decoder_of(model)
        self.tokenizer = tokenizer
        if layer == "auto":
            layer = len(self.decoder) // 2
        self.layer = self.decoder.layer(layer, "layer")
        self.batch_size = batch_size

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts.

        Raises:
            ValueError: a text has no token but special ones.
        """
        return self.of_ids(prompt_ids(self.tokenizer, texts))

    def of_ids(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Embeddings of token ids, without padding; special tokens may be among them."""
        special = special_ids(self.tokenizer)
        for i, row in enumerate(rows):
            if all(token in special for token in row):
                text = self.tokenizer.decode(list(row))
                raise ValueError(f"text {i}, {text!r}, has no token to embed but special ones")
        out = torch.empty(len(rows), self.decoder.hidden_size, device=self.decoder.device)
        with torch.no_grad(), Evaluating(self.decoder.model):
            for some in like_lengths(rows, most=self.batch_size):
                ids, mask = padded([rows[i] for i in some], side="right")
                counts = torch.tensor(
                    [[t not in special for t in row] for row in ids.tolist()]
                ) & (mask != 0)  # fmt: skip
                inputs = {
                    "input_ids": ids.to(out.device),
                    "attention_mask": mask.to(out.device),
                }
                hidden = self.decoder.run(inputs, 0, self.layer + 1).float()
                if self.pooling == "last":
                    last = counts.long().cumsum(1).argmax(1)  # the first place of the full count
                    counts = nn.functional.one_hot(last, counts.size(1))
                share = counts.to(out.device, torch.float32)
                share /= share.sum(1, keepdim=True)
                out[some] = torch.einsum("nt,ntd->nd", share, hidden)
        return out


# --- the index ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Ranking:
    """Facts and cosines, nearest first; read as far as is asked for."""

    facts: list[Fact]
    order: Tensor
    cosines: Tensor

    def __iter__(self) -> Iterator[tuple[Fact, float]]:
        for at in range(0, len(self.facts), 64):
            some = slice(at, at + 64)
            pairs = zip(self.order[some].tolist(), self.cosines[some].tolist(), strict=True)
            yield from ((self.facts[i], c) for i, c in pairs)


class FactIndex:
    """Facts and the embeddings of their texts, in the order in which they came.

    A text is embedded once, when its fact is inserted.

    Args:
        embed: gives the embeddings.

    Attributes:
        facts: by id.
        embeddings: float32 [n, d], or None while there is none.
    """

    def __init__(self, embed: Embed) -> None:
        self.embed = embed
        self.facts: dict[str, Fact] = {}
        self.embeddings: Tensor | None = None
        self._units: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.facts)

    def of(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts, looked at.

        Raises:
            TypeError, ValueError: `embed` gives something else than numbers [n, d].
            NonFiniteError: among them is NaN or an infinity; the message names the text.
        """
        return self.checked(self.embed(texts), texts)

    def checked(self, given: Any, texts: Sequence[str]) -> Tensor:
        """What `embed` gave for `texts`, as float32 [n, d]; see `of`."""
        if not isinstance(given, Tensor):
            given = torch.as_tensor(given)
        size = None if self.embeddings is None else self.embeddings.size(1)
        wrong = given.dim() != 2 or given.size(0) != len(texts) or given.size(1) == 0
        if wrong or (size is not None and given.size(1) != size):
            raise ValueError(
                f"embed must give [{len(texts)}, {size or 'd'}] numbers for {len(texts)} texts; "
                f"got the shape {list(given.shape)}"
            )
        if not given.is_floating_point():
            raise TypeError(f"embed must give floating point numbers; got {given.dtype}")
        given = given.detach().float()
        bad = (~given.isfinite()).any(1).nonzero()
        if bad.numel():
            raise NonFiniteError(
                f"the embedding of {texts[int(bad[0])]!r} holds NaN or infinity: look at the "
                "weights of the model that embeds"
            )
        return given

    def insert(self, facts: Iterable[Fact]) -> list[Fact]:
        """Adds facts; none if one is wrong.

        Raises:
            TypeError, ValueError: a fact, or its id, is there twice or contradicts another.
        """
        new = check_facts(facts, known=self.facts)
        given = self.of([fact.text for fact in new])
        if self.embeddings is not None:
            given = torch.cat([self.embeddings, given.to(self.embeddings.device)])
        self.embeddings = given
        self.facts.update({fact.id: fact for fact in new})
        return new

    def delete(self, ids: Iterable[str]) -> list[int]:
        """Takes facts out; the rows that stay, of those that were.

        Raises:
            ValueError: an id is not known.
        """
        gone = set(unknown_ids(ids, self.facts, "store"))
        stay = [i for i, name in enumerate(self.facts) if name not in gone]
        if self.embeddings is not None:
            self.embeddings = self.embeddings[stay] if stay else None
        self.facts = {name: f for name, f in self.facts.items() if name not in gone}
        return stay

    def cosines(self, queries: Tensor) -> Tensor:
        """[q, n] of embeddings [q, d] with those of the facts; 0 where one of them is 0."""
        assert self.embeddings is not None
        if self._units is None or self._units[0] is not self.embeddings:
            self._units = (self.embeddings, nn.functional.normalize(self.embeddings, dim=1))
        units = self._units[1]
        return nn.functional.normalize(queries.to(units.device), dim=1) @ units.T

    def nearest(self, queries: Tensor | None, count: int) -> list[Ranking]:
        """Of each of `count` embeddings all facts and their cosines, nearest first; of equals the
        earlier one."""
        facts = list(self.facts.values())
        if queries is None or not facts:
            return [Ranking([], torch.empty(0), torch.empty(0))] * count
        cosines, order = self.cosines(queries).sort(dim=1, descending=True, stable=True)
        return [Ranking(facts, o, c) for o, c in zip(order, cosines, strict=True)]


class IndexedFacts:
    """An editor whose facts lie in a `FactIndex`: they come and go, and nothing is trained.

    Attributes:
        embed: gives the embeddings.
    """

    embed: Embed
    _index: FactIndex

    def _embed_by(
        self, embed: Embed | None, model: nn.Module, tokenizer: Any, batch_size: int,
        layer: int | Literal["auto"], pooling: Pooling,
    ) -> None:  # fmt: skip
        """An empty index; without `embed` the embeddings are hidden states of the model."""
        if embed is not None and (layer != "auto" or pooling != "last"):
            raise ValueError(
                "layer and pooling are of the default embedding: leave them out where embed is "
                "given"
            )
        self.embed = embed or TextEmbedding(
            model, tokenizer, layer=layer, pooling=pooling, batch_size=batch_size
        )
        self._index = FactIndex(self.embed)

    @property
    def facts(self) -> dict[str, Fact]:
        """The facts of the store, by id."""
        return dict(self._index.facts)

    def fit(self, facts: Iterable[Fact]) -> Self:
        """Makes the store anew, of these facts.

        Raises:
            TypeError, ValueError: a fact is wrong; see `cl_fast.editing.facts.check_facts`.
        """
        index = FactIndex(self.embed)
        index.insert(facts)
        self._index = index
        return self

    def insert(self, facts: Iterable[Fact]) -> None:
        """Adds facts to the store; their texts are embedded now, and not again.

        Raises:
            TypeError, ValueError: one is there already, or contradicts another.
        """
        self._index.insert(facts)

    def delete(self, ids: Iterable[str]) -> None:
        """Takes facts out of the store: it is as if they had never been there.

        Raises:
            ValueError: an id is not known.
        """
        self._index.delete(ids)


def _check_texts(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError(f"texts must be a list of strings; got the string {texts!r}")
    listed = list(texts)
    for i, text in enumerate(listed):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"texts[{i}] must be a string that is not empty; got {text!r}")
    return listed


# --- the editor --------------------------------------------------------------------------------


def _kinds(fact: Fact) -> set[Kind]:
    """What a fact can demonstrate."""
    kinds: set[Kind] = {"copy"}
    if fact.paraphrases:
        kinds.add("update")
    if fact.neighbourhood and (fact.neighbourhood_target or fact.target_true):
        kinds.add("retain")
    return kinds


class InContext(IndexedFacts):
    """In-context knowledge editing by retrieval (IKE, arXiv 2305.12740).

    Args:
        model: a causal language model of transformers; its weights are never changed.
        tokenizer: its tokenizer.
        embed: of n texts the embeddings [n, d]; by default `TextEmbedding(model, tokenizer)`, whose
            cosines are a weak measure of what a text is about: an encoder made for retrieval is
            better.
        layer, pooling: of the default embedding.
        retrieved: facts that are put before a prompt, the nearest last.
        threshold: facts with a smaller cosine are not put before a prompt, and one without any
            stays as it is; None puts the nearest ones before every prompt, as IKE does.
        demonstrations: at most so many, 32 in the paper. A fact without paraphrases cannot show an
            update, one without neighbourhood (or without what that answers) cannot show what is
            retained: where facts for a kind are lacking there are fewer; `explain` tells.
        corpus: facts to demonstrate with; by default the other facts of the store.
        seed: of the order of kinds, and of which paraphrase is taken. The same text with the same
            store gives the same prompt.
        batch_size: texts that are embedded, or generated from, at a time.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        embed: Embed | None = None,
        layer: int | Literal["auto"] = "auto",
        pooling: Pooling = "last",
        retrieved: int = 1,
        threshold: float | None = None,
        demonstrations: int = 32,
        corpus: Iterable[Fact] | None = None,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        at_least("retrieved", retrieved, 1)
        at_least("demonstrations", demonstrations, 0)
        at_least("batch_size", batch_size, 1)
        integer("seed", seed)
        if threshold is not None and not (
            isinstance(threshold, int | float) and math.isfinite(threshold) and abs(threshold) <= 1
        ):
            raise ValueError(f"threshold must be a cosine in [-1, 1], or None; got {threshold!r}")
        self._embed_by(embed, model, tokenizer, batch_size, layer, pooling)
        self.model, self.tokenizer = model, tokenizer
        self.retrieved, self.threshold = retrieved, threshold
        self.seed, self.batch_size = seed, batch_size
        copies, updates = round(demonstrations / 8), round(3 * demonstrations / 8)
        counts: dict[Kind, int] = {
            "copy": copies, "update": updates, "retain": demonstrations - copies - updates
        }  # fmt: skip
        self.kinds: list[Kind] = [kind for kind, count in counts.items() for _ in range(count)]
        random.Random(f"{seed} kinds").shuffle(self.kinds)
        self._corpus: FactIndex | None = None
        if corpus is not None:
            self._corpus = FactIndex(self.embed)
            self._corpus.insert(corpus)

    # --- prompts ---

    def _shown(
        self, found: Sequence[Fact], near: Iterable[tuple[Fact, float]], possible: set[Kind]
    ) -> list[tuple[Kind, Fact, str]]:
        """The demonstrations, nearest first: kind, fact and the text after "Prompt: "."""
        left, used = list(self.kinds), {fact.text for fact in found}
        made: list[tuple[Kind, Fact, str]] = []
        for fact, _ in near:
            if not possible.intersection(left):
                break
            if fact.text in used:
                continue
            able = _kinds(fact)
            kind = next((k for k in left if k in able), None)
            if kind is None:
                continue
            left.remove(kind)
            draw = random.Random(f"{self.seed} {fact.id}")
            if kind == "copy":
                shown = fact.statement
            elif kind == "update":
                shown = draw.choice(fact.paraphrases).rstrip() + fact.separator + fact.target
            else:
                answer = fact.neighbourhood_target or fact.target_true
                assert answer is not None
                shown = draw.choice(fact.neighbourhood).rstrip() + fact.separator + answer
            made.append((kind, fact, shown))
        return made

    def explain(self, text: str) -> dict[str, Any]:
        """What is put before a prompt: `facts`, pairs of id and cosine, nearest first; and
        `demonstrations`, of each kind how many."""
        _, found, shown = next(self._prompts(_check_texts([text])))
        counts = {
            kind: sum(k == kind for k, _, _ in shown) for kind in ("copy", "update", "retain")
        }
        return {"facts": [(fact.id, c) for fact, c in found], "demonstrations": counts}

    def _prompts(
        self, texts: list[str]
    ) -> Iterator[tuple[str, list[tuple[Fact, float]], list[tuple[Kind, Fact, str]]]]:
        shows = self._index if self._corpus is None else self._corpus
        possible: set[Kind] = set().union(*map(_kinds, shows.facts.values()))
        for start in range(0, len(texts), self.batch_size):
            some = texts[start : start + self.batch_size]
            embedded = self._index.of(some) if len(self._index) else None
            nearest = self._index.nearest(embedded, len(some))
            corpus = nearest if shows is self._index else shows.nearest(embedded, len(some))
            for text, near, others in zip(some, nearest, corpus, strict=True):
                found = [
                    (fact, c)
                    for fact, c in islice(near, self.retrieved)
                    if self.threshold is None or c >= self.threshold
                ]
                if not found:
                    yield text, [], []
                    continue
                shown = self._shown([fact for fact, _ in found], others, possible)
                blocks = [
                    f"New Fact: {fact.statement}\nPrompt: {answered}\n\n"
                    for _, fact, answered in reversed(shown)
                ]
                blocks += [f"New Fact: {fact.statement}\n" for fact, _ in reversed(found)]
                yield "".join(blocks) + f"Prompt: {text}", found, shown

    def prompts(self, texts: Sequence[str]) -> list[str]:
        """The texts with facts and demonstrations before them; unchanged where none is in scope."""
        return [prompt for prompt, _, _ in self._prompts(_check_texts(texts))]

    def prompt(self, text: str) -> str:
        """`prompts` of one text: what to give to any `generate`."""
        return self.prompts([text])[0]

    def before(self, text: str) -> str:
        """What is put before one prompt: `evaluate(..., in_context=editor.before)`."""
        return self.prompt(text).removesuffix(text)

    def generate(
        self, texts: Sequence[str], *, max_new_tokens: int = 32, **options: Any
    ) -> list[str]:
        """What the model writes after the prompts of `texts`.

        Args:
            options: of the model's `generate`; one text each is returned.

        Raises:
            ValueError: a prompt is longer than the model can read.
        """
        at_least("max_new_tokens", max_new_tokens, 1)
        rows = prompt_ids(self.tokenizer, self.prompts(texts))
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        inner = unwrap(self.model)
        device = next(inner.parameters()).device
        for i, row in enumerate(rows):
            what = f"the prompt of texts[{i}], with what is put before it,"
            check_length(inner, len(row), max_new_tokens, what)
        written: list[str] = []
        for start in range(0, len(rows), self.batch_size):
            some = rows[start : start + self.batch_size]
            inputs = padded_inputs(some, side="left", pad=pad or 0, device=device)
            with torch.no_grad(), Evaluating(inner):
                out = inner.generate(
                    **inputs, max_new_tokens=max_new_tokens, pad_token_id=pad or 0, **options
                )
            if not isinstance(out, Tensor) or out.size(0) != len(some):
                raise ValueError(
                    "generate must return one row of tokens for each text: leave "
                    "return_dict_in_generate and num_return_sequences out"
                )
            new = out[:, inputs["input_ids"].size(1) :].tolist()
            written += self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return written
