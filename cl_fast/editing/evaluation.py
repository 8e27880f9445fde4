"""What edits did: success, generalisation, specificity, and what the model really writes.

With x(t) the mean negative log-prob per token of target t after a prompt, P(t) = exp(-x(t)):

| metric | on | of one prompt |
|---|---|---|
| es, ps | the prompt; its paraphrases | P(new) > P(true) |
| em, pm | likewise | P(new) - P(true) |
| ns, nm | neighbourhood prompts | P(true) > P(new); P(true) - P(new) |
| ns_plus, nm_plus | the same, behind the edit as a sentence | likewise |
| es_acc, ps_acc, ns_acc, ns_plus_acc | | every token of the right target is the likeliest |
| es_tokens, ps_tokens, ns_tokens | | the share of its tokens that are the likeliest |
| nkl | neighbourhood prompts | KL(before || after) of the next token, in nats |
| n_same | likewise | the likeliest next token is that of before |
| greedy, greedy_ps | the prompt; its paraphrases | what it writes on begins with the target |
| fluency | texts of its own | 100 (2/3 H_2 + 4/3 H_3) / 2; H_n: entropy of word n-grams, bits |
| score | all facts | harmonic mean of es, ps and ns |

es to ns_acc, score and fluency: Meng et al. 2022, 2023 (arXiv 2202.05262, 2210.07229); es_tokens to
ns_tokens: zsRE as in 2210.07229; ns_plus and nkl: Hoelscher-Obermaier et al. 2023 (arXiv
2305.17553). `docs/editing-evaluation.md` tells what each hides.

All prompts of many facts go through the model together, each only once where several targets share
it; the head multiplies the positions before targets, and no others.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from cl_fast.editing.continuations import continuations, end_tokens, uniforms
from cl_fast.editing.facts import Encoded, Fact, encode_many, listed_facts
from cl_fast.editing.report import Report
from cl_fast.editing.rows import padded_inputs
from cl_fast.errors import NonFiniteError
from cl_fast.losses import Hidden, linear_divergence
from cl_fast.models.blocks import text_config
from cl_fast.models.heads import Evaluating, LinearHead, head_of, last_hidden, run_inside, unwrap
from cl_fast.options import at_least, integer, one_of

__all__ = ["SUITE", "Reference", "evaluate", "ngram_entropy"]

SUITE = ("es", "ps", "ns", "ns_plus", "acc", "zsre", "nkl", "greedy", "fluency")
"""What may be measured."""

_MEASURED = SUITE[:-1]
"""By default; fluency writes ten long texts per fact."""

_WINDOW = 128
"""Facts whose prompts are sorted by length together."""

Context = Callable[[str], str]


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    facts: Iterable[Fact],
    suite: Sequence[str] | None = None,
    *,
    batch: int = 64,
    cohorts: int = 1,
    reference: nn.Module | Reference | None = None,
    in_context: Context | None = None,
    max_new_tokens: int | None = None,
    generation_length: int = 100,
    fluency_every: int = 1,
    top_k: int = 5,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """The scores of `facts` under `model` as it is now: call it after all edits.

        before = Reference.take(model, tokenizer, facts)
        with patch:
            report = evaluate(model, tokenizer, facts, reference=before, cohorts=10)

    The model is put in eval mode meanwhile; gradients are not recorded. A fact's numbers do not
    depend on other facts, their order, `batch`, or the tokenizer's padding side.

    Args:
        model: a causal language model of transformers; with a patch applied, or within one.
        tokenizer: a fast one.
        facts: in the order of editing.
        suite: of `SUITE`; by default all but "fluency" that facts and `reference` allow. "acc" and
            "zsre" are the accuracies of the right target alone, of all tokens or by token.
        batch: rows of a forward pass.
        cohorts: parts of equal size, by age, of which the report tells the means too.
        reference: the model before the edits, for "nkl": another model, or what `Reference.take`
            kept of this one.
        in_context: gives the text that is put before a prompt, for editors that work in context;
            it is asked for each prompt. Of a reference no prompt has any.
        max_new_tokens: to write greedily; by default three more than the target has.
        generation_length: of the texts whose fluency is told: tokens, the prompt included.
        fluency_every: write texts for every n-th fact only.
        top_k: tokens of which each of these texts' is drawn.
        seed: of these texts, and of the bootstrap.
        progress: show bars.

    Returns:
        A `Report`. What no fact allows is in `report.absent` with the reason, never 0.

    Raises:
        ValueError: there is no fact; an option is wrong; `suite` names what no fact allows; a
            prompt is longer than the model's positions.
        TypeError: the tokenizer gives no offsets; an argument is of another kind.
        NonFiniteError: the model gives NaN.
    """
    listed = listed_facts(facts)
    for name, value in (
        ("batch", batch), ("cohorts", cohorts), ("generation_length", generation_length),
        ("fluency_every", fluency_every), ("top_k", top_k),
    ):  # fmt: skip
        at_least(name, value, 1)
    if max_new_tokens is not None:
        at_least("max_new_tokens", max_new_tokens, 1)
    integer("seed", seed)
    if cohorts > len(listed):
        raise ValueError(f"cohorts must be at most the {len(listed)} facts; got {cohorts}")
    wanted = _wanted(suite)
    before = _reference(reference, model, tokenizer, listed, batch, "nkl" in wanted)
    absent = _impossible(listed, wanted, before)
    if suite is not None:
        for name in wanted:
            if (main := _MAIN[name]) in absent:
                raise ValueError(f"suite asks for {name!r}, but {absent[main]}")
    rows: list[dict[str, Any]] = [
        {"id": listed[i].id, "prompt": listed[i].text, "target": listed[i].target, "cohort": cohort}
        for cohort, part in enumerate(np.array_split(np.arange(len(listed)), cohorts))
        for i in part
    ]
    run = _Run(model, tokenizer, batch, in_context or (lambda prompt: ""))
    with tqdm(total=len(listed), desc="scoring facts", disable=not progress) as bar:
        for first in range(0, len(listed), _WINDOW):
            some = slice(first, first + _WINDOW)
            _score(run, listed[some], wanted, before, rows[some])
            bar.update(len(listed[some]))
    if "greedy" in wanted:
        _greedy(run, listed, max_new_tokens, rows, progress)
    if "fluency" in wanted:
        _fluency(run, listed, fluency_every, generation_length, top_k, seed, rows, progress)
    found = {name for row in rows for name in row}
    metrics = tuple(name for names in _COLUMNS.values() for name in names if name in found)
    about: dict[str, Any] = {"suite": list(wanted)}
    if "greedy" in wanted:
        about["max_new_tokens"] = max_new_tokens
    if "fluency" in wanted:
        about |= {
            "generation_length": generation_length, "fluency_every": fluency_every, "top_k": top_k,
        }  # fmt: skip
    return Report(rows, metrics, absent, seed, about)


_COLUMNS = {
    "es": ("es", "em"),
    "ps": ("ps", "pm"),
    "ns": ("ns", "nm"),
    "ns_plus": ("ns_plus", "nm_plus"),
    "acc": ("es_acc", "ps_acc", "ns_acc", "ns_plus_acc"),
    "zsre": ("es_tokens", "ps_tokens", "ns_tokens"),
    "nkl": ("nkl", "n_same"),
    "greedy": ("greedy", "greedy_ps"),
    "fluency": ("fluency",),
}
_MAIN = {name: columns[0] for name, columns in _COLUMNS.items()}


def _wanted(suite: Sequence[str] | None) -> tuple[str, ...]:
    if suite is None:
        return _MEASURED
    if isinstance(suite, str):
        raise TypeError(f"suite must be a list of names; got the string {suite!r}")
    for name in suite:
        one_of("suite", name, SUITE)
    if not suite:
        raise ValueError(f"suite is empty: name some of {', '.join(SUITE)}")
    return tuple(name for name in SUITE if name in suite)


def _right(fact: Fact) -> str | None:
    """The target that neighbours shall keep."""
    return fact.target_true if fact.neighbourhood_target is None else fact.neighbourhood_target


def _impossible(
    facts: list[Fact], wanted: tuple[str, ...], before: Reference | None
) -> dict[str, str]:
    """Metrics of `wanted` that no fact has, and why."""
    paraphrases = any(f.paraphrases for f in facts)
    true = [f for f in facts if f.target_true is not None]
    compared = [f for f in true if f.target_true != f.target]
    near = [f for f in facts if f.neighbourhood]
    kept = [f for f in near if _right(f) is not None]
    no_true = "no fact has target_true" if not true else "every target_true is the target itself"
    no_right = (
        "no fact with a neighbourhood has neighbourhood_target or target_true"
        if not kept
        else "what neighbours shall keep is the target itself"
    )
    reasons: dict[str, str] = {}

    def need(names: Sequence[str], *conditions: tuple[bool, str]) -> None:
        for fulfilled, why in conditions:
            if not fulfilled:
                reasons.update(dict.fromkeys(names, why))
                return

    any_paraphrases = (paraphrases, "no fact has paraphrases")
    any_near = (bool(near), "no fact has a neighbourhood")
    need(("es", "em"), (bool(compared), no_true))
    need(
        ("ps", "pm"), any_paraphrases,
        (any(f.paraphrases for f in compared), f"of facts with paraphrases, {no_true}"),
    )  # fmt: skip
    apart = (any(_right(f) != f.target for f in kept), no_right)
    need(("ns", "nm", "ns_plus", "nm_plus"), any_near, apart)
    need(("ns_acc", "ns_tokens", "ns_plus_acc"), any_near, (bool(kept), no_right))
    need(("ps_acc", "ps_tokens", "greedy_ps"), any_paraphrases)
    if "ns_plus" not in wanted:
        reasons.pop("ns_plus_acc", None)
    need(
        ("nkl", "n_same"), any_near,
        (before is not None, "no reference was given: take one before the edit"),
    )  # fmt: skip
    need(("fluency",), (any(f.generation for f in facts), "no fact has prompts in `generation`"))
    names = {column for name in wanted for column in _COLUMNS[name]}
    return {name: why for name, why in reasons.items() if name in names}


# --- teacher-forced rows -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """What every forward pass of one evaluation shares."""

    model: nn.Module
    tokenizer: Any
    batch: int
    in_context: Context

    def within(self, prompt: str) -> str:
        return self.in_context(prompt) + prompt


@dataclass
class _Asked:
    """Tokens whose log-probs are asked for, or (`kl`) a prompt's next-token distribution."""

    row: tuple[int, ...]
    place: int
    """In `row`, of the hidden state that predicts the first token."""
    tokens: list[int]
    about: str
    kl: str | None = None


@dataclass
class _Found:
    logprobs: NDArray[np.float64]
    hits: NDArray[np.bool_]
    kl: float = math.nan
    best: int = -1

    @property
    def nll(self) -> float:
        """Per token."""
        return -float(self.logprobs.mean())


def cover(rows: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Rows of which none begins another, and for each of `rows` the index of one it begins."""
    kept: list[tuple[int, ...]] = []
    where = [0] * len(rows)
    # Sorted, those that a row begins follow it at once; so look at them first.
    for i in sorted(range(len(rows)), key=rows.__getitem__, reverse=True):
        if not kept or kept[-1][: len(rows[i])] != rows[i]:
            kept.append(rows[i])
        where[i] = len(kept) - 1
    return kept, where


def _asked_target(encoded: Encoded, about: str) -> _Asked:
    return _Asked(
        tuple(encoded.ids[: encoded.targets.stop - 1]),
        encoded.targets.start - 1,
        encoded.target,
        about,
    )


def _asked_next(encoded: Encoded, prompt: str) -> _Asked:
    return _Asked(tuple(encoded.ids), len(encoded.ids) - 1, [], prompt, prompt)


def _check_length(model: nn.Module, length: int, text: str) -> None:
    positions = getattr(text_config(unwrap(model)), "max_position_embeddings", None)
    if isinstance(positions, int) and length > positions:
        raise ValueError(
            f"{text!r:.200} takes {length} tokens, but the model has {positions} positions"
        )


def _batches(
    model: nn.Module, rows: list[tuple[int, ...]], batch: int, pad: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Indices of rows, longest first, and the inputs of the model, padded on the right."""
    device = unwrap(model).get_input_embeddings().weight.device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    for first in range(0, len(order), batch):
        some = order[first : first + batch]
        inputs = padded_inputs([rows[i] for i in some], side="right", pad=pad, device=device)
        yield some, inputs


def _ask(run: _Run, asked: list[_Asked], before: Reference | None) -> list[_Found]:
    """The answers, in the order of the questions."""
    rows, where = cover([a.row for a in asked])
    of_row: list[list[int]] = [[] for _ in rows]
    for i, row in enumerate(where):
        of_row[row].append(i)
        _check_length(run.model, len(rows[row]), asked[i].about)
    found = [
        _Found(np.full(len(a.tokens), math.nan), np.zeros(len(a.tokens), np.bool_)) for a in asked
    ]
    with torch.no_grad(), Evaluating(run.model):
        for some, inputs in _batches(run.model, rows, run.batch, _pad(run.tokenizer)):
            pairs = [  # row of the batch, position, question, token of the question
                (b, asked[i].place + j, i, j)
                for b, row in enumerate(some)
                for i in of_row[row]
                for j in range(max(1, len(asked[i].tokens)))
            ]
            answer = partial(_answer, pairs=pairs, asked=asked, found=found, before=before)
            run_inside(run.model, answer, **inputs)
    return found


def _pad(tokenizer: Any) -> int:
    """Any id: what follows a text on the right is not seen by it."""
    for name in ("pad_token_id", "eos_token_id"):
        if isinstance(token := getattr(tokenizer, name, None), int):
            return token
    return 0


def _answer(
    inner: Any,
    *,
    pairs: list[tuple[int, int, int, int]],
    asked: list[_Asked],
    found: list[_Found],
    before: Reference | None,
    **inputs: Tensor,
) -> None:
    """One forward pass, and the head at the positions of `pairs`."""
    hidden = last_hidden(inner, **inputs)
    head = head_of(inner)
    length = hidden.size(1)
    # Several tokens may be asked for at one place.
    places = sorted({b * length + at for b, at, _, _ in pairs})
    local = {place: i for i, place in enumerate(places)}
    pairs = sorted(pairs, key=lambda p: local[p[0] * length + p[1]])
    at = torch.tensor([local[b * length + p] for b, p, _, _ in pairs])
    tokens = torch.tensor([asked[i].tokens[j] if asked[i].tokens else 0 for _, _, i, j in pairs])
    states = hidden.reshape(-1, hidden.size(-1))[torch.tensor(places, device=hidden.device)]
    logprobs, best = _token_rows(head, states, at, tokens)
    answers = zip(pairs, logprobs.tolist(), best.tolist(), strict=True)
    for (_, _, i, j), logprob, token in answers:
        if math.isnan(logprob):
            raise NonFiniteError(
                f"the model's logits after {asked[i].about!r:.200} are NaN: the edit, or what came "
                "before it, broke the model"
            )
        if asked[i].tokens:
            found[i].logprobs[j], found[i].hits[j] = logprob, token == asked[i].tokens[j]
        else:
            found[i].best = token
    kept = [(n, i) for n, (_, _, i, _) in enumerate(pairs) if asked[i].kl is not None]
    if kept and before is not None:
        now = states[at[[n for n, _ in kept]].to(states.device)]
        prompts = [str(asked[i].kl) for _, i in kept]
        for (_, i), value in zip(kept, before.divergence(head, now, prompts).tolist(), strict=True):
            found[i].kl = value


def _token_rows(
    head: LinearHead, states: Tensor, at: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probs of `tokens` after states[at], and the likeliest tokens there; `at` ascends."""
    logprobs = torch.empty(len(at), dtype=torch.float64)
    best = torch.empty(len(at), dtype=torch.long)
    for chunk, z in head.logits(states):
        first, last = torch.searchsorted(at, torch.tensor([chunk.start, chunk.stop])).tolist()
        if first == last:
            continue
        rows = (at[first:last] - chunk.start).to(z.device)
        picked = z[rows, tokens[first:last].to(z.device)] - z.logsumexp(-1)[rows]
        logprobs[first:last] = picked.double().cpu()
        best[first:last] = z.argmax(-1)[rows].cpu()
    return logprobs, best


def _score(
    run: _Run,
    facts: list[Fact],
    wanted: tuple[str, ...],
    before: Reference | None,
    rows: list[dict[str, Any]],
) -> None:
    """Fills in what is read off log-probs of given targets, and the divergence."""
    texts: list[tuple[str, str | None]] = []
    separators: list[str] = []
    owners: list[tuple[int, str, str]] = []  # fact, kind, "right" or "wrong" (nkl: the prompt)

    def ask(i: int, kind: str, prompt: str, right: str | None, wrong: str | None) -> None:
        given = run.within(prompt)
        for role, target in (("right", right), ("wrong", wrong)):
            if target is not None:
                texts.append((given, target))
                separators.append(facts[i].separator)
                owners.append((i, kind, role))

    accuracies = "acc" in wanted or "zsre" in wanted
    for i, fact in enumerate(facts):
        other = fact.target_true if fact.target_true != fact.target else None
        if "es" in wanted or accuracies:
            ask(i, "es", fact.text, fact.target, other if "es" in wanted else None)
        if "ps" in wanted or accuracies:
            for prompt in fact.paraphrases:
                ask(i, "ps", prompt, fact.target, other if "ps" in wanted else None)
        right = _right(fact)
        wrong = fact.target if right != fact.target else None
        for prompt in fact.neighbourhood if right is not None else ():
            if "ns" in wanted or accuracies:
                ask(i, "ns", prompt, right, wrong if "ns" in wanted else None)
            if "ns_plus" in wanted:
                ask(i, "ns_plus", f"{fact.statement}. {prompt}", right, wrong)
        if "nkl" in wanted and before is not None:
            for prompt in fact.neighbourhood:
                texts.append((run.within(prompt).rstrip(), None))
                separators.append(fact.separator)
                owners.append((i, "nkl", prompt))
    encoded = encode_many(run.tokenizer, [(t, None, g) for t, g in texts], separator=separators)
    asked = [
        _asked_target(e, f"{text}{space}{target}") if target is not None else _asked_next(e, owner)
        for e, (text, target), space, (_, _, owner) in zip(
            encoded, texts, separators, owners, strict=True
        )
    ]
    answers = _ask(run, asked, before)
    seen: dict[tuple[int, str], list[tuple[_Found, _Found | None]]] = {}
    for (i, kind, role), answer in zip(owners, answers, strict=True):
        pairs = seen.setdefault((i, kind), [])
        if kind != "nkl" and role == "wrong":  # it follows the right one of its prompt
            pairs[-1] = (pairs[-1][0], answer)
        else:
            pairs.append((answer, None))
        if kind == "nkl" and before is not None:
            answer.hits = np.array([answer.best == before.likeliest(role)])
    for (i, kind), pairs in seen.items():
        rows[i].update(_columns(kind, pairs, wanted))


def _columns(
    kind: str, pairs: list[tuple[_Found, _Found | None]], wanted: tuple[str, ...]
) -> dict[str, float]:
    """The metrics of one fact: means over its prompts of one kind."""
    if kind == "nkl":
        return {
            "nkl": float(np.mean([answer.kl for answer, _ in pairs])),
            "n_same": float(np.mean([answer.hits[0] for answer, _ in pairs])),
        }
    made: dict[str, float] = {}
    both = [(right.nll, wrong.nll) for right, wrong in pairs if wrong is not None]
    if both:
        success, magnitude = _COLUMNS[kind]
        made[success] = float(np.mean([right < wrong for right, wrong in both]))
        made[magnitude] = float(np.mean([math.exp(-r) - math.exp(-w) for r, w in both]))
    if "acc" in wanted:
        made[f"{kind}_acc"] = float(np.mean([right.hits.all() for right, _ in pairs]))
    if "zsre" in wanted and kind != "ns_plus":
        made[f"{kind}_tokens"] = float(np.mean([right.hits.mean() for right, _ in pairs]))
    return made


# --- before the edit ---------------------------------------------------------------------------


class Reference:
    """What a model would say next at neighbourhood prompts, kept from before an edit.

        before = Reference.take(model, tokenizer, facts)
        patch.apply()
        evaluate(model, tokenizer, facts, reference=before)

    It holds, in main memory, the last hidden state of each prompt [N, H] and a copy of the head
    [V, H], not distributions [N, V]. A patch that is applied already must be undone first.
    """

    def __init__(self, prompts: Sequence[str], teacher: Hidden, best: Tensor) -> None:
        self._places = {prompt: i for i, prompt in enumerate(prompts)}
        self._teacher = teacher
        self._best = best
        self._moved: dict[torch.device, tuple[Tensor, Tensor | None]] = {}

    @classmethod
    def take(
        cls, model: nn.Module, tokenizer: Any, facts: Iterable[Fact], *, batch: int = 64
    ) -> Reference:
        """Of all neighbourhood prompts of `facts`, under `model` as it is now.

        Raises:
            ValueError: no fact has a neighbourhood.
            NonFiniteError: the model gives NaN.
        """
        at_least("batch", batch, 1)
        prompts = list(dict.fromkeys(p for f in listed_facts(facts) for p in f.neighbourhood))
        if not prompts:
            raise ValueError("no fact has a neighbourhood, at whose prompts a reference is taken")
        encoded = encode_many(tokenizer, [(prompt.rstrip(), None, None) for prompt in prompts])
        rows, where = cover([tuple(e.ids) for e in encoded])
        of_row: list[list[int]] = [[] for _ in rows]
        for i, row in enumerate(where):
            of_row[row].append(i)
            _check_length(model, len(rows[row]), prompts[i])
        states: list[Tensor | None] = [None] * len(prompts)
        best = torch.zeros(len(prompts), dtype=torch.long)
        heads: list[Hidden] = []

        def keep(inner: Any, *, places: list[tuple[int, int, int]], **inputs: Tensor) -> None:
            hidden = last_hidden(inner, **inputs)
            head = head_of(inner)
            taken = hidden[[b for b, _, _ in places], [at for _, at, _ in places]]
            likeliest = torch.cat([_no_nan(z, prompts, places) for _, z in head.logits(taken)])
            teacher = head.teacher(taken)
            for (_, _, i), state, token in zip(places, teacher.hidden, likeliest, strict=True):
                states[i], best[i] = state.cpu(), token
            if not heads:
                heads.append(teacher)

        with torch.no_grad(), Evaluating(model):
            for some, inputs in _batches(model, rows, batch, _pad(tokenizer)):
                places = [
                    (b, len(encoded[i].ids) - 1, i)
                    for b, row in enumerate(some)
                    for i in of_row[row]
                ]
                run_inside(model, partial(keep, places=places), **inputs)
        head = heads[0]
        kept = Hidden(
            torch.stack([state for state in states if state is not None]),
            head.weight.to("cpu", copy=True),
            None if head.bias is None else head.bias.to("cpu", copy=True),
            head.logit_scale,
            head.softcap,
        )
        return cls(prompts, kept, best)

    def __len__(self) -> int:
        return len(self._places)

    def _index(self, prompt: str) -> int:
        if prompt not in self._places:
            raise ValueError(
                f"the reference holds nothing of the neighbourhood prompt {prompt!r}: take it with "
                "all facts that are evaluated"
            )
        return self._places[prompt]

    def likeliest(self, prompt: str) -> int:
        """The likeliest token after it."""
        return int(self._best[self._index(prompt)])

    def divergence(self, head: LinearHead, hidden: Tensor, prompts: Sequence[str]) -> Tensor:
        """KL(before || now) after each prompt: [N], in nats.

        Args:
            head, hidden: the head of now, and its hidden states [N, H].
            prompts: N, as they were taken.
        """
        given = head.keywords(hidden)
        device = given["weight"].device
        if device not in self._moved:
            weight, bias = self._teacher.weight, self._teacher.bias
            self._moved[device] = (
                weight.to(device), None if bias is None else bias.to(device),
            )  # fmt: skip
        weight, bias = self._moved[device]
        rows = self._teacher.hidden[[self._index(prompt) for prompt in prompts]].to(device)
        teacher = Hidden(rows, weight, bias, self._teacher.logit_scale, self._teacher.softcap)
        return linear_divergence(
            given["hidden"], given["weight"], teacher, kind="forward_kl", bias=given["bias"],
            logit_scale=given["logit_scale"], softcap=given["softcap"], reduction="none",
        )  # fmt: skip


def _no_nan(z: Tensor, prompts: list[str], places: list[tuple[int, int, int]]) -> Tensor:
    if bool(z.isnan().any()):
        raise NonFiniteError(
            f"the model's logits after {prompts[places[0][2]]!r:.200}, or another prompt of its "
            "batch, are NaN: there is nothing to compare an edit with"
        )
    return z.argmax(-1).cpu()


def _reference(
    given: nn.Module | Reference | None,
    model: nn.Module,
    tokenizer: Any,
    facts: list[Fact],
    batch: int,
    wanted: bool,
) -> Reference | None:
    if given is None or isinstance(given, Reference):
        return given
    if not isinstance(given, nn.Module):
        raise TypeError(
            "reference must be a model, or what Reference.take gave before the edit; got "
            f"{type(given).__name__}"
        )
    if unwrap(given) is unwrap(model):
        raise ValueError(
            "reference is the model itself, from which it cannot differ: take "
            "Reference.take(model, tokenizer, facts) before the edit and give that"
        )
    if not wanted or not any(fact.neighbourhood for fact in facts):
        return None
    return Reference.take(given, tokenizer, facts, batch=batch)


# --- texts -------------------------------------------------------------------------------------


def _greedy(
    run: _Run,
    facts: list[Fact],
    max_new_tokens: int | None,
    rows: list[dict[str, Any]],
    progress: bool,
) -> None:
    """Fills in whether what the model writes by itself begins with the target."""
    owners = [(i, prompt) for i, f in enumerate(facts) for prompt in (f.text, *f.paraphrases)]
    texts = [run.within(prompt) for _, prompt in owners]
    separators = [facts[i].separator for i, _ in owners]
    whole = encode_many(
        run.tokenizer,
        [(text, None, facts[i].target) for text, (i, _) in zip(texts, owners, strict=True)],
        separator=separators,
    )
    prompts = encode_many(run.tokenizer, [(text.rstrip(), None, None) for text in texts])
    limits = [
        (len(e.targets) + 3) if max_new_tokens is None else max_new_tokens for e in whole
    ]  # fmt: skip
    for encoded, limit, text in zip(prompts, limits, texts, strict=True):
        _check_length(run.model, len(encoded.ids) + limit, f"{text} and what is written on")
    with tqdm(total=len(owners), desc="writing on", disable=not progress) as bar:
        written = continuations(
            run.model, [e.ids for e in prompts], limits, batch=run.batch,
            ends=end_tokens(run.model, run.tokenizer), bar=bar,
        )  # fmt: skip
    said: list[list[bool]] = [[] for _ in facts]
    for (i, _), ids in zip(owners, written, strict=True):
        text = run.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if not said[i]:
            rows[i]["greedy_text"] = text
        said[i].append(begins_with(text, facts[i].target, words=bool(facts[i].separator)))
    for row, found in zip(rows, said, strict=True):
        row["greedy"] = float(found[0])
        if len(found) > 1:
            row["greedy_ps"] = float(np.mean(found[1:]))


def begins_with(text: str, target: str, *, words: bool = True) -> bool:
    """Whether `text` begins with `target`; with `words`, as whole words. Spaces count as one."""
    text, target = " ".join(text.split()), " ".join(target.split())
    if not text.startswith(target):
        return False
    rest = text[len(target) :]
    return not (words and target[-1:].isalnum() and rest[:1].isalnum())


def _fluency(
    run: _Run,
    facts: list[Fact],
    every: int,
    length: int,
    top_k: int,
    seed: int,
    rows: list[dict[str, Any]],
    progress: bool,
) -> None:
    """Fills in the entropy of the n-grams of texts."""
    owners = [(i, prompt) for i in range(0, len(facts), every) for prompt in facts[i].generation]
    texts = [run.within(prompt).rstrip() for _, prompt in owners]
    prompts = [e.ids for e in encode_many(run.tokenizer, [(t, None, None) for t in texts])]
    for ids, text in zip(prompts, texts, strict=True):
        _check_length(run.model, max(length, len(ids)), f"generation_length={length} from {text}")
    limits = [max(0, length - len(ids)) for ids in prompts]
    draws = [
        uniforms(limit, seed, facts[i].id, prompt)
        for limit, (i, prompt) in zip(limits, owners, strict=True)
    ]
    with tqdm(total=len(owners), desc="writing texts", disable=not progress) as bar:
        written = continuations(
            run.model, prompts, limits, batch=run.batch, top_k=top_k, draws=draws, bar=bar,
            ends=end_tokens(run.model, run.tokenizer),
        )  # fmt: skip
    found: dict[int, list[float]] = {}
    for (i, _), before, ids in zip(owners, prompts, written, strict=True):
        text = run.tokenizer.decode(
            [*before, *ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        entropy = (2 / 3 * ngram_entropy(text, 2) + 4 / 3 * ngram_entropy(text, 3)) / 2
        found.setdefault(i, []).append(100 * entropy)
    for i, values in found.items():
        rows[i]["fluency"] = float(np.mean(values))


_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


def ngram_entropy(text: str, n: int) -> float:
    """The entropy of the n-grams of words and signs in a text, in bits; 0 where there is none.

    A text that repeats itself has little. Words are runs of letters and digits, an apostrophe
    within one included; other signs stand for themselves.
    """
    at_least("n", n, 1)
    words = _WORD.findall(text)
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = sum(counts.values())
    return math.fsum(-c / total * math.log2(c / total) for c in counts.values())
