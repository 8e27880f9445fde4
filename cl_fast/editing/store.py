"""Facts outside the weights: keys and values at one block, looked up while the model runs.

    store = FactStore(model, tokenizer, stats_texts=texts).fit(facts)
    with store:
        model.generate(...)

    h_t  +=  r_j [cos(q_t, k_j) > gamma_j]        j = argmax_i cos(q_t, k_i) - gamma_i

Of equals the first is taken. h_t is the output of one block at position t, q_t what the matrix
that writes the block's MLP is given there (keys="mlp"), or what the block itself is given
(keys="block"). k_i is that of a fact at its lookup token, and r_i the change of h there with which
the model says the target: the delta of MEMIT's values (`cl_fast.editing.values`). No weight is
touched, and no equation is solved. With one gamma for all facts this is the store of NeuralDB (ICLR
2026), with the values of MEMIT (Meng et al. 2023, arXiv 2210.07229).

Each position asks for itself, prompt and padding and generated tokens alike, so that a step of
decoding with a cache computes what the whole text would. Where no key is near enough the hidden
state keeps its bits. Keys depend on the blocks below and on nothing that the store adds, so facts
come and go without touching one another; only facts that share their tokens up to the lookup
token, as relations of one subject do in prompts that begin with it, have one key, and therefore
one value that is found for all of them.

gate="calibrated" gives each key a threshold of its own, by the N tokens of `stats_texts`:

    c_ti      cos(q_t, k_i) of token t; left out where the subject of fact i (lookup="last": its
              whole prompt) ends in that token, since there it is meant to be found
    spared    the floor(false_fires N) tokens with the largest max_i c_ti
    gamma_i   above c_ti for every token that is not spared: by 2^-14 at least, and then the next
              multiple of 2^-12; and LEAST_GATE at least

so that at most that many of these tokens fire falsely.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cl_fast.editing.contexts import own_contexts
from cl_fast.editing.facts import Fact, check_facts, fact_of, unknown_ids
from cl_fast.editing.keys import key_rows
from cl_fast.editing.memory import BlockMemory, Inputs, Keys
from cl_fast.editing.memory_files import write_memory
from cl_fast.editing.presets import preset_of
from cl_fast.editing.values import Group, ValueOptions, Values, group_facts, optimise_values
from cl_fast.errors import NonFiniteError
from cl_fast.losses.cache import model_fingerprint
from cl_fast.models.blocks import text_config
from cl_fast.models.heads import Evaluating
from cl_fast.ops import nearest_key
from cl_fast.options import at_least, integer, one_of, share

__all__ = ["LEAST_GATE", "FactStore", "Fire"]

_KEYS = ("mlp", "block")
_LOOKUPS = ("subject_last", "last")

LEAST_GATE = 0.5
"""A calibrated threshold is not below: texts that hold nothing like a fact say little about it."""
_GRID, _MARGIN = 4096, 0.25
_BLOCK = 1 << 23
"""Numbers of queries that are widened at a time."""
_NO_MATRIX = "With keys='block' a FactStore needs no matrix"


# --- what the store holds ----------------------------------------------------------------------


@dataclass(frozen=True)
class Fire:
    """A fact that was looked up.

    Attributes:
        position: the token, counted from the first of the text, special ones included.
        ids: of the facts of the entry.
        cosine: of its key and the token's query.
    """

    position: int
    ids: tuple[str, ...]
    cosine: float


_Value = tuple[Tensor, dict[str, Any]]
"""A value, float32 on the CPU, and how it was found."""


@dataclass(eq=False)
class _Entry:
    """Facts with one key: the tokens up to the lookup token, the facts, and earlier values.

    `found` holds the values that the entry has and had, with their reports, by the facts that they
    were found for.
    """

    key: tuple[int, ...]
    facts: tuple[Fact, ...]
    found: dict[frozenset[Fact], _Value] = field(default_factory=dict)

    @property
    def report(self) -> dict[str, Any]:
        return self.found[frozenset(self.facts)][1]

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(fact.id for fact in self.facts)


class _Rows:
    """Numbers of the entries, a row each, in memory that grows by doubling.

    keys: [n, size], of length 1; values: [n, d] float32; bias: [n], minus the thresholds.
    """

    def __init__(self, key_size: int, value_size: int, dtype: torch.dtype, device: Any) -> None:
        self.count = 0
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self._keys = torch.empty(0, key_size, dtype=dtype, device=device)
        self._values = torch.empty(0, value_size, dtype=torch.float32, device=device)
        self._bias = torch.empty(0, dtype=wide, device=device)

    @property
    def keys(self) -> Tensor:
        return self._keys[: self.count]

    @property
    def values(self) -> Tensor:
        return self._values[: self.count]

    @property
    def bias(self) -> Tensor:
        return self._bias[: self.count]

    @property
    def capacity(self) -> int:
        size: int = self._keys.size(0)
        return size

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Rows that are switched off until their thresholds are set."""
        needed = self.count + keys.size(0)
        if needed > self.capacity:
            most = max(needed, 2 * self.capacity, 16)
            for name in ("_keys", "_values", "_bias"):
                old = getattr(self, name)
                new = old.new_empty(most, *old.shape[1:])
                new[: self.count] = old[: self.count]
                setattr(self, name, new)
        self._keys[self.count : needed] = keys
        self._values[self.count : needed] = values
        self._bias[self.count : needed] = -math.inf
        self.count = needed

    def keep(self, rows: Sequence[int]) -> None:
        """Only these, in their order."""
        at = torch.tensor(list(rows), dtype=torch.long, device=self._keys.device)
        for x in (self._keys, self._values, self._bias):
            x[: len(at)] = x[at]
        self.count = len(at)

    def to(self, device: torch.device) -> None:
        self._keys, self._values, self._bias = (
            x.to(device) for x in (self._keys, self._values, self._bias)
        )


@dataclass(eq=False)
class _Texts:
    """Tokens that thresholds are calibrated with.

    Attributes:
        joined: the texts that were read, one after the other.
        token_of: the token of each character of `joined`, -1 where there is none.
        ends: of each token the character after its last one.
        queries: [N, size], of length 1.
        spared: how many tokens may fire falsely.
        cosines, tokens: [entries, spared + 1], of each key the nearest tokens that are not meant,
            the nearest first: -inf and 0 where there are no more.
    """

    texts: int
    joined: str
    token_of: Tensor
    ends: list[int]
    queries: Tensor
    spared: int
    cosines: Tensor
    tokens: Tensor

    def thresholds(self) -> Tensor:
        """gamma of each key, float64."""
        cosines = self.cosines
        if self.spared and cosines.numel():
            # A token that is to be spared is among the nearest of the key that it is nearest to.
            best = torch.full((len(self.ends),), -math.inf, dtype=torch.float64)
            best = best.scatter_reduce(0, self.tokens.flatten(), cosines.flatten(), "amax")
            spared = torch.zeros(len(self.ends), dtype=torch.bool)
            spared[best.argsort(descending=True, stable=True)[: self.spared]] = True
            cosines = cosines.masked_fill(spared[self.tokens], -math.inf)
        nearest = cosines.amax(1) if cosines.numel() else cosines.new_empty(0)
        return ((nearest * _GRID + _MARGIN).ceil() / _GRID).clamp_min(LEAST_GATE)


class FactStore(BlockMemory):
    """Facts at one block of a model, which keeps all of its weights.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, a fast one.
        layer: the block, from the end where negative; "auto" is the last one that MEMIT would edit
            (`cl_fast.editing.presets`), or, where there is no matrix to edit, a quarter of the way
            up.
        keys: what is compared: the input of the matrix that writes the block's MLP ("mlp", f
            numbers), or of the block ("block", d numbers: smaller, and also for a mixture of
            experts or a quantised model).
        lookup: "subject_last", so that a fact is found in other words and contexts too; or "last",
            the end of the prompt: it answers that prompt, and hardly another one.
        gate: the cosine above which a fact is added, or "calibrated".
        stats_texts: texts like those that the model will read, for gate="calibrated"; best with
            other subjects of the same kind in them.
        stats_tokens: of these at most so many tokens are read; their queries are kept on the CPU,
            N times the numbers of a key.
        false_fires: the share of these tokens that may fire falsely.
        contexts: texts put before the prompts, as for MEMIT: the value has to work behind each of
            them, and the key is 1/2 that of the plain prompt + 1/2 the mean of those behind
            contexts. "auto": five that the model writes (`own_contexts`); () for none.
        options: how values are found; by default as MEMIT's preset of the model has it.
        batch: entries whose values are found at a time.
        seed: of the contexts.

    Attributes:
        layer, keys, lookup: as above, the layer as a number from 0.
        gate: the cosine that was given, or "calibrated".

    Raises:
        TypeError, ValueError: naming the argument; the block is not understood.
    """

    _noun, _format = "store", "fact_store"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        layer: int | Literal["auto"] = "auto",
        keys: Keys = "mlp",
        lookup: Literal["subject_last", "last"] = "subject_last",
        gate: float | Literal["calibrated"] = "calibrated",
        stats_texts: Sequence[str] | None = None,
        stats_tokens: int = 20_000,
        false_fires: float = 1e-4,
        contexts: Sequence[str] | Literal["auto"] = "auto",
        options: ValueOptions | None = None,
        batch: int = 64,
        seed: int = 0,
    ) -> None:
        one_of("keys", keys, _KEYS)
        one_of("lookup", lookup, _LOOKUPS)
        at_least("stats_tokens", stats_tokens, 1)
        at_least("batch", batch, 1)
        share("false_fires", false_fires, whole=False)
        integer("seed", seed)
        if contexts != "auto":
            if isinstance(contexts, str) or not all(isinstance(c, str) for c in contexts):
                raise TypeError(f"contexts must be a list of texts or 'auto'; got {contexts!r}")
            contexts = tuple(c if not c or c[-1].isspace() else c + " " for c in contexts)
        if options is not None and options.where != "stream":
            raise ValueError(
                "options must have where='stream': a store adds to the output of a block; got "
                f"where={options.where!r}"
            )
        super().__init__(model, tokenizer)
        usual, values = self._usual(keys) if layer == "auto" or options is None else (0, None)
        self.layer = self.decoder.layer(usual if layer == "auto" else layer, "layer")
        if self.layer == len(self.decoder) - 1 and lookup != "last":
            raise ValueError(
                f"layer must be below the last block, {self.layer}: above it nothing carries what "
                "is added at the subject to the end of the prompt. Or use lookup='last'"
            )
        self.keys, self.lookup = keys, lookup
        self.stats_tokens, self.false_fires = stats_tokens, float(false_fires)
        self._contexts: tuple[str, ...] | Literal["auto"] = contexts
        self.options = options or values or ValueOptions()
        self.batch, self.seed = batch, seed
        self._inputs = self._given_at(keys)
        self._rows = self._no_rows()
        self._entries: list[_Entry] = []
        self._texts: _Texts | None = None
        self.gate: float | Literal["calibrated"] = "calibrated"
        if isinstance(gate, str):
            one_of("gate", gate, ("calibrated",))
            if stats_texts is None:
                raise ValueError(
                    "gate='calibrated' needs stats_texts: texts like those that the model will "
                    "read. Or give a cosine, such as gate=0.8"
                )
            self._texts = self._read_texts(stats_texts)
        else:
            _check_gate(gate)
            if stats_texts is not None:
                raise ValueError(f"stats_texts would not be used: gate={gate} is given")
            self.gate = float(gate)

    def _usual(self, keys: Keys) -> tuple[int, ValueOptions]:
        """The block and the options where none are given."""
        try:
            preset = preset_of(self.decoder, "memit")
        except ValueError as error:
            if keys != "block":
                raise ValueError(f"{error}. {_NO_MATRIX}") from None
            return len(self.decoder) // 4, ValueOptions()
        return preset.layers[-1], ValueOptions(**preset.values)

    def _given_at(self, keys: Keys) -> Inputs:
        try:
            return Inputs(self.decoder, self.layer, keys)
        except ValueError as error:
            if keys == "block":
                raise
            raise ValueError(f"{error}. {_NO_MATRIX}") from None

    @property
    def contexts(self) -> tuple[str, ...]:
        """The texts before the prompts; where the model writes them, it does when they are asked
        for, or needed, first."""
        if self._contexts == "auto":
            with self._pause():
                made = own_contexts(self.decoder.model, self.tokenizer, seed=self.seed)
            self._contexts = tuple(made)
        return self._contexts

    def _no_rows(self) -> _Rows:
        weight = next(p for p in self._inputs.block.parameters())
        dtype = weight.dtype if weight.dtype.itemsize > 1 else self.decoder.dtype
        if not dtype.is_floating_point:
            dtype = torch.float32
        return _Rows(self._inputs.size, self.decoder.hidden_size, dtype, weight.device)

    # --- what it holds ---

    @property
    def thresholds(self) -> dict[str, float]:
        """The cosine above which each fact is looked up, by id."""
        gammas = (-self._rows.bias).tolist()
        return {i: g for e, g in zip(self._entries, gammas, strict=True) for i in e.ids}

    def fit(self, facts: Iterable[Fact]) -> FactStore:
        """Makes the store anew, of these facts.

        Raises:
            TypeError, ValueError: as `insert`; the store is then as it was.
        """
        before = self._rows, self._entries, self._facts, self._texts
        self._rows, self._entries, self._facts = self._no_rows(), [], {}
        if self._texts is not None:
            self._texts = _without_keys(self._texts)
        try:
            self.insert(facts)
        except BaseException:
            self._rows, self._entries, self._facts, self._texts = before
            raise
        return self

    def insert(self, facts: Iterable[Fact], values: Values | None = None) -> None:
        """Adds facts. Those that are there keep their keys and values.

        A fact that shares its tokens up to the lookup token with one that is there is found a
        common value with it.

        Args:
            facts: new ones.
            values: what `optimise_values` found for them at this layer, instead of finding it.

        Raises:
            TypeError, ValueError: a fact, or its id, is there twice or contradicts another; a value
                or key is not finite; `values` do not fit. Then nothing has changed.
        """
        self._change((), list(facts), values)

    def upsert(self, facts: Iterable[Fact]) -> None:
        """Adds facts; those with the same id, or the same prompt and subject, are replaced.

        Raises:
            TypeError, ValueError: as `insert`.
        """
        new, gone = self._replacing(facts)
        self._change(gone, new, None)

    def delete(self, ids: Iterable[str]) -> None:
        """Takes facts out: the model answers as if they had never been there.

        Where a fact shared its key with others, they get the value back that they had without it,
        or are found one if they never had.

        Raises:
            ValueError: an id is not known; then nothing has changed.
        """
        gone = unknown_ids(ids, self._facts, "store")
        if gone:
            self._change(gone, [], None)

    def _change(self, gone: Sequence[str], new: list[Fact], values: Values | None) -> None:
        out = set(gone)
        known = {name: fact for name, fact in self._facts.items() if name not in out}
        new = check_facts(new, known=known) if new or not gone else []
        if self.gate == "calibrated" and self._texts is None and new:
            raise ValueError(
                "thresholds of new facts cannot be calibrated: this store was loaded without "
                "stats_texts. Give them to FactStore.load"
            )
        if self._fingerprint is None:
            self._fingerprint = model_fingerprint(self.decoder.model)
        places = {entry.key: i for i, entry in enumerate(self._entries)}
        wanted = {entry.key: entry.facts for entry in self._entries if out & set(entry.ids)}
        wanted = {key: tuple(f for f in fs if f.id not in out) for key, fs in wanted.items()}
        for group in group_facts(new, self.tokenizer, self.lookup) if new else []:
            there = places.get(group.key)
            old = wanted.get(group.key, () if there is None else self._entries[there].facts)
            wanted[group.key] = old + group.facts
        groups = {key: Group(key, facts) for key, facts in wanted.items() if facts}
        found = self._values_of(groups, places, values)
        added = [group for key, group in groups.items() if key not in places]
        fresh = self._keys_of(added)

        # Nothing below can fail.
        rows = self._rows
        before = len(self._entries)
        for key, group in groups.items():
            if key in places:
                entry = self._entries[places[key]]
                rows.values[places[key]] = found[key][0].to(rows.values)
            else:
                entry = _Entry(key, ())
                self._entries.append(entry)
            entry.facts = group.facts
            now = frozenset(group.facts)
            entry.found = {facts: v for facts, v in entry.found.items() if facts < now}
            entry.found[now] = found[key]
        if added:
            rows.append(fresh, torch.stack([found[group.key][0] for group in added]))
        empty = {key for key, facts in wanted.items() if not facts}
        kept = [i for i, entry in enumerate(self._entries) if entry.key not in empty]
        if empty:
            rows.keep(kept)
            self._entries = [self._entries[i] for i in kept]
        self._facts = known | {fact.id: fact for fact in new}
        self._calibrate([i for i in kept if i < before], len(added), set(groups) - empty)

    def _values_of(
        self, groups: dict[tuple[int, ...], Group], places: dict[Any, int], values: Values | None
    ) -> dict[tuple[int, ...], _Value]:
        """The value of each group: given, known, or found."""
        made: dict[tuple[int, ...], _Value] = {}
        if values is not None:
            made = self._given(groups, values)
        for key, group in groups.items():
            if key in places and key not in made:
                entry = self._entries[places[key]]
                known = entry.found.get(frozenset(group.facts))
                if known is not None:
                    made[key] = known
        missing = [group for key, group in groups.items() if key not in made]
        if missing:
            with self._pause(), Evaluating(self.decoder.model):
                found = optimise_values(
                    self.decoder, self.tokenizer, missing, self.layer, contexts=self.contexts,
                    options=self.options, lookup=self.lookup, batch=self.batch,
                )  # fmt: skip
            for group, delta, report in zip(missing, found.delta, found.report, strict=True):
                made[group.key] = delta.float().cpu().clone(), report
        for key, (value, _) in made.items():
            if not bool(value.isfinite().all()):
                raise NonFiniteError(
                    f"the value of {groups[key].facts[0].text!r} holds NaN or infinity"
                )
        return made

    def _given(
        self, groups: dict[tuple[int, ...], Group], values: Values
    ) -> dict[tuple[int, ...], _Value]:
        if values.layer != self.layer:
            raise ValueError(f"values are of block {values.layer}, this store is at {self.layer}")
        if tuple(values.delta.shape) != (len(values.groups), self.decoder.hidden_size):
            raise ValueError(
                f"values.delta must be [{len(values.groups)}, {self.decoder.hidden_size}]; got "
                f"{list(values.delta.shape)}"
            )
        made = {}
        for group, delta, report in zip(values.groups, values.delta, values.report, strict=True):
            wanted = groups.get(group.key)
            if wanted is None or set(wanted.facts) != set(group.facts):
                raise ValueError(
                    f"values were found for {list(group.ids)} together; here they would be for "
                    f"{list(wanted.ids) if wanted else 'no fact of this call'}"
                )
            made[group.key] = delta.detach().float().cpu().clone(), dict(report)
        return made

    def _keys_of(self, groups: Sequence[Group]) -> Tensor:
        """[groups, size], of length 1, in the dtype of the rows."""
        if not groups:
            return self._rows.keys[:0]
        rows = key_rows(self.tokenizer, groups, self.contexts, self.lookup)
        seen = self._at_end(rows)
        wide = torch.float64 if seen.dtype == torch.float64 else torch.float32
        seen = seen.to(wide).view(len(groups), 1 + len(self.contexts), -1)
        keys = seen[:, 0]
        if self.contexts:
            keys = 0.5 * keys + 0.5 * seen[:, 1:].mean(1)
        length = keys.norm(dim=1, keepdim=True)
        bad = ~(length.isfinite() & (length > 0))[:, 0]
        if bool(bad.any()):
            group = groups[int(bad.nonzero()[0])]
            raise NonFiniteError(
                f"the key of {group.facts[0].text!r} at block {self.layer} is zero or not finite: "
                "look at the weights of the model"
            )
        return _normalised(keys, self._rows.keys.dtype)

    # --- the threshold ---

    def _read_texts(self, texts: Sequence[str]) -> _Texts:
        if isinstance(texts, str):
            raise TypeError(f"stats_texts must be a list of texts; got the string {texts!r}")
        limit = getattr(text_config(self.decoder.model), "max_position_embeddings", None)
        rows: list[list[int]] = []
        read: list[str] = []
        ends: list[int] = []
        token_of: list[int] = []
        left = self.stats_tokens
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"stats_texts[{i}] must be a string; got {type(text).__name__}")
            if left <= 0:
                break
            batch = self.tokenizer(text, return_offsets_mapping=True)
            ids, offsets = list(batch["input_ids"]), list(batch["offset_mapping"])
            most = min(left, limit) if isinstance(limit, int) else left
            ids, offsets = ids[:most], offsets[:most]
            if not ids:
                continue
            start, own = len(token_of), [-1] * (len(text) + 1)
            for token, (first, last) in enumerate(offsets, len(ends)):
                own[first:last] = [token] * (last - first)
            ends += [start + last for _, last in offsets]
            token_of += own
            rows.append(ids)
            read.append(text)
            left -= len(ids)
        if not rows:
            raise ValueError("stats_texts hold no token: give texts like those that will be read")
        queries = torch.empty(len(ends), self._inputs.size, dtype=self._rows.keys.dtype)
        starts = [0]
        for row in rows:
            starts.append(starts[-1] + len(row))
        for some, seen, mask in self._run(rows):
            for line, i in enumerate(some):
                found = seen[line][mask[line].bool()]
                queries[starts[i] : starts[i + 1]] = found.to(queries)
        lengths = queries.float().norm(dim=1)
        if not bool(lengths.isfinite().all()):
            raise NonFiniteError(
                f"the model gives NaN or infinity for stats_texts at block {self.layer}"
            )
        spared = math.floor(self.false_fires * len(ends) + 1e-9)
        none = torch.empty(0, min(spared + 1, len(ends)), dtype=torch.float64)
        joined = "\0".join(read) + "\0"
        return _Texts(
            len(read), joined, torch.tensor(token_of), ends, _normalised(queries, queries.dtype),
            spared, none, none.long(),
        )  # fmt: skip

    def _calibrate(self, kept: Sequence[int], added: int, changed: set[tuple[int, ...]]) -> None:
        """Entries `kept` are left of those that there were, `added` are new, others changed."""
        rows, texts = self._rows, self._texts
        if self.gate != "calibrated":
            rows.bias[len(kept) :] = -float(self.gate)
            return
        if texts is None:
            return  # of a store that was loaded, facts were taken out
        at = torch.tensor(list(kept), dtype=torch.long)
        new = range(len(kept), len(kept) + added)
        more = texts.cosines.new_full((added, texts.cosines.size(1)), -math.inf)
        texts.cosines = torch.cat([texts.cosines[at], more])
        texts.tokens = torch.cat([texts.tokens[at], more.new_zeros(more.shape).long()])
        # Which tokens are meant depends on the facts of an entry, too.
        again = {i for i, entry in enumerate(self._entries) if entry.key in changed}
        asked = sorted(again | set(new))
        for start in range(0, len(asked), 256):
            self._look_around(texts, asked[start : start + 256])
        rows.bias.copy_(-texts.thresholds())

    def _look_around(self, texts: _Texts, entries: list[int]) -> None:
        """The nearest tokens of some keys."""
        keys = self._rows.keys[entries]
        # In float64, so that what is rounded differently while the model runs stays in the margin.
        keys = keys.double().T
        rows = max(1, _BLOCK // keys.size(0))
        parts = texts.queries.split(rows)
        table = torch.cat([(some.to(keys.device).double() @ keys).cpu() for some in parts])
        for column, entry in enumerate(entries):
            table[self._meant_tokens(texts, self._entries[entry]), column] = -math.inf
        nearest = table.topk(texts.cosines.size(1), dim=0)
        texts.cosines[entries] = nearest.values.T
        texts.tokens[entries] = nearest.indices.T

    def _meant_tokens(self, texts: _Texts, entry: _Entry) -> list[int]:
        """Tokens in which a subject of the entry, or its whole prompt, ends."""
        found = []
        for fact in entry.facts:
            words = fact.subject if self.lookup == "subject_last" else fact.text
            at = texts.joined.find(words)
            while at >= 0:
                end = at + len(words)
                token = int(texts.token_of[end - 1])
                # "Al" does not end in the token "Alan".
                if token >= 0 and not any(map(str.isalnum, texts.joined[end : texts.ends[token]])):
                    found.append(token)
                at = texts.joined.find(words, at + 1)
        return found

    # --- in the model ---

    def _hooks(self) -> list[Any]:
        return [*self._inputs.hook(), self._inputs.block.register_forward_hook(self._add)]

    def _add(self, _: nn.Module, args: Any, output: Any) -> Any:
        """The hook of the block."""
        seen = self._inputs.take()
        rows = self._rows
        if seen is None or not rows.count:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        fires, index, _ = self._looked_up(seen, hidden)
        if hidden.device.type == "cpu" and not bool(fires.any()):
            return None
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        value = rows.values[index.clamp_min(0)].to(wide).view_as(hidden)
        moved = (hidden.to(wide) + value).to(hidden.dtype)
        changed = torch.where(fires.view(hidden.shape[:-1]).unsqueeze(-1), moved, hidden)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def _look_up(self, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per position, in one row: whether a fact fires, which, and the cosine."""
        return self._looked_up(seen, seen)

    def _looked_up(self, seen: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `_look_up`, where the block gives `hidden`."""
        rows = self._rows
        if rows.keys.device != seen.device:
            rows.to(seen.device)
        flat = seen.reshape(-1, self._inputs.size)
        if flat.size(0) * hidden.size(-1) != hidden.numel():
            raise ValueError(
                f"block {self.layer} calls the matrix of its MLP for {flat.size(0)} tokens of "
                f"{hidden.numel() // hidden.size(-1)}; use keys='block'"
            )
        score, index = nearest_key(_normalised(flat, rows.keys.dtype), rows.keys, rows.bias)
        return score > 0, index, score - rows.bias[index.clamp_min(0)]

    # --- what it does ---

    def fires(self, texts: Sequence[str]) -> list[list[Fire]]:
        """Which facts are looked up in each text, and where.

        Special tokens that the tokenizer puts at the end are left out.
        """
        return [
            [Fire(position, self._entries[key].ids, cosine) for position, key, cosine in hits]
            for hits in self._hits(texts)
        ]

    def report(self) -> dict[str, Any]:
        """What the store holds and how it answers; prompts and paraphrases are run.

        Returns:
            facts, entries, layer; `bytes` of keys and values; `thresholds` by id; `values`: loss,
            steps and norm by ids; `calibration`: texts, tokens, `false_fires` and its `rate`,
            `right_fires`, or None without stats_texts; `prompts`, `paraphrases`: the share of them
            in which the fact is looked up, `neighbourhood`: in which any fact is; None where there
            are none.
        """
        facts = list(self._facts.values())
        told: dict[str, Any] = {
            "facts": len(facts),
            "entries": len(self._entries),
            "layer": self.layer,
            "thresholds": self.thresholds,
            "bytes": self._rows.keys.nbytes + self._rows.values.nbytes,
            "values": {entry.ids: entry.report for entry in self._entries},
            "calibration": None,
        }
        texts = self._texts
        if texts is not None:
            told["calibration"] = self._told(texts)
        asked: dict[str, Callable[[Fact], Iterable[str]]] = {
            "prompts": lambda fact: (fact.text,),
            "paraphrases": lambda fact: fact.paraphrases,
            "neighbourhood": lambda fact: fact.neighbourhood,
        }
        for name, of in asked.items():
            pairs = [(fact.id, text) for fact in facts for text in of(fact)]
            found = self.fires([text for _, text in pairs]) if pairs else []
            own = name != "neighbourhood"
            hits = [
                any(fact in fire.ids or not own for fire in fires)
                for (fact, _), fires in zip(pairs, found, strict=True)
            ]
            told[name] = sum(hits) / len(hits) if hits else None
        return told

    def _told(self, texts: _Texts) -> dict[str, Any]:
        """What happens on the texts of the calibration, with the thresholds as they are."""
        meant = [set(self._meant_tokens(texts, entry)) for entry in self._entries]
        keys, bias = self._rows.keys, self._rows.bias
        right = false = 0
        for start in range(0, len(texts.ends), 8192):
            some = texts.queries[start : start + 8192].to(keys)
            score, index = nearest_key(some, keys, bias)
            for token in (score > 0).nonzero()[:, 0].tolist():
                if start + token in meant[int(index[token])]:
                    right += 1
                else:
                    false += 1
        return {
            "texts": texts.texts,
            "tokens": len(texts.ends),
            "false_fires": false,
            "rate": false / len(texts.ends),
            "right_fires": right,
        }

    # --- files ---

    def save(self, path: str | Path) -> None:
        """Writes the store: keys, values, facts, threshold, and which model it is for.

        Raises:
            ValueError: it is empty.
            OutputError: the file cannot be written.
        """
        about = self._about()
        earlier = [
            (value, [i, sorted(fact.id for fact in facts), report])
            for i, entry in enumerate(self._entries)
            for facts, (value, report) in entry.found.items()
            if len(facts) < len(entry.facts)
        ]
        rows = self._rows
        tensors = {"keys": rows.keys, "values": rows.values, "thresholds": -rows.bias}
        if earlier:
            tensors["earlier"] = torch.stack([value for value, _ in earlier])
        options = {f.name: getattr(self.options, f.name) for f in fields(self.options)}
        about |= {
            "keys": self.keys,
            "lookup": self.lookup,
            "gate": self.gate,
            "stats_tokens": self.stats_tokens,
            "false_fires": self.false_fires,
            "contexts": list(self.contexts),
            "options": options,
            "entries": [[list(e.key), list(e.ids), e.report] for e in self._entries],
            "earlier": [told for _, told in earlier],
        }
        write_memory(path, self._format, tensors, about)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: nn.Module,
        tokenizer: Any,
        *,
        stats_texts: Sequence[str] | None = None,
    ) -> FactStore:
        """Reads a store that was saved.

        Args:
            path: of the file.
            model: the one that it was made for; its weights are compared.
            tokenizer: that of the model.
            stats_texts: needed only to add facts to a store with calibrated thresholds, which are
                calibrated with them from then on.

        Raises:
            CheckpointError: it is not such a file, is damaged, or is for another model or
                tokenizer.
        """
        with cls._opened(path, model, tokenizer) as (tensors, about):
            return cls._read(tensors, about, model, tokenizer, stats_texts)

    @classmethod
    def _read(
        cls,
        tensors: dict[str, Tensor],
        about: dict[str, Any],
        model: nn.Module,
        tokenizer: Any,
        stats_texts: Sequence[str] | None,
    ) -> FactStore:
        store = cls(
            model, tokenizer, layer=about["layer"], keys=about["keys"], lookup=about["lookup"],
            gate=0.0, stats_tokens=about["stats_tokens"],
            false_fires=about["false_fires"], contexts=about["contexts"],
            options=ValueOptions(**about["options"]), batch=about["batch"], seed=about["seed"],
        )  # fmt: skip
        store.gate = about["gate"]
        store._facts = {f.id: f for f in (fact_of(given, "facts") for given in about["facts"])}
        keys, values = tensors["keys"], tensors["values"]
        count = len(about["entries"])
        if keys.shape != (count, store._inputs.size) or values.shape != (
            count, store.decoder.hidden_size,
        ):  # fmt: skip
            raise ValueError(f"keys and values of {count} entries were expected")
        store._rows.append(keys, values)
        store._rows.bias.copy_(-tensors["thresholds"])
        for (key, ids, report), value in zip(about["entries"], values, strict=True):
            members = tuple(store._facts[name] for name in ids)
            entry = _Entry(tuple(key), members, {frozenset(members): (value.clone(), report)})
            store._entries.append(entry)
        for (i, ids, report), value in zip(
            about["earlier"], tensors.get("earlier", ()), strict=True
        ):
            members = tuple(store._facts[name] for name in ids)
            store._entries[i].found[frozenset(members)] = value.clone(), report
        store._fingerprint = about["model"]
        if stats_texts is not None:
            if store.gate != "calibrated":
                raise ValueError("stats_texts would not be used: the gate was given as a number")
            store._texts = store._read_texts(stats_texts)
            store._calibrate([], count, set())
        return store


def _without_keys(texts: _Texts) -> _Texts:
    return replace(texts, cosines=texts.cosines[:0], tokens=texts.tokens[:0])


def _normalised(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of length 1, rounded once; 0 stays 0, NaN stays NaN."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return (wide / wide.norm(dim=1, keepdim=True).clamp_min(1e-30)).to(dtype)


def _check_gate(gate: Any) -> None:
    if isinstance(gate, bool) or not isinstance(gate, int | float):
        raise TypeError(f"gate must be a cosine or 'calibrated'; got {gate!r}")
    if not -1.0 <= gate <= 1.0:
        raise ValueError(f"gate must be a cosine in [-1, 1]; got {gate}")
