"""A fact: what a model shall say after a prompt about a subject; and where its tokens are.

    Fact("{} plays the sport of", subject="LeBron James", target="football")

The prompt, with the subject in the place of `{}`, is followed by the separator and the target. The
lookup token, whose key is edited, is the token that holds the subject's last character: found by
the tokenizer's offsets in the whole text, so that a beginning-of-sequence token, a leading space or
a subject of many tokens cannot shift it.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from cl_fast.options import one_of

__all__ = [
    "LOOKUPS",
    "Encoded",
    "Fact",
    "Lookup",
    "check_facts",
    "decoded",
    "encode",
    "encode_many",
    "fact_of",
    "listed_facts",
    "read_facts",
    "unknown_ids",
]

Lookup = Literal["subject_last", "subject_first", "subject_first_after_last", "last"]
LOOKUPS: tuple[Lookup, ...] = ("subject_last", "subject_first", "subject_first_after_last", "last")


@dataclass(frozen=True)
class Fact:
    """What a model shall say.

    Attributes:
        prompt: with one `{}` where the subject stands: "{} plays the sport of".
        subject: what the fact is about.
        target: what shall follow; the separator is put before it.
        id: a name of its own, by which it can be dropped; by default the prompt with the subject.
        weight: how much it counts against what the model knew, relative to other facts.
        separator: between prompt and target; "" in scripts without spaces.
        target_true: what the model says now, for evaluation.
        paraphrases: whole prompts that ask for the same in other words.
        neighbourhood: whole prompts that are not about it and whose answer shall stay
            `neighbourhood_target`, by default `target_true`.
        generation: whole prompts to write on from.
    """

    prompt: str
    subject: str
    target: str
    id: str = ""
    weight: float = 1.0
    separator: str = " "
    target_true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbourhood: tuple[str, ...] = ()
    neighbourhood_target: str | None = None
    generation: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target", "id", "separator"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name} of a fact must be a string; got {value!r}")
        for name in ("target_true", "neighbourhood_target"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name} of a fact must be a string or None; got {value!r}")
        for name in ("paraphrases", "neighbourhood", "generation"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(text, str) for text in value):
                raise TypeError(f"{name} of a fact must be a list of strings; got {value!r}")
            object.__setattr__(self, name, tuple(value))
            holed = [text for text in value if "{}" in text]
            if holed:
                raise ValueError(
                    f"{name} of a fact are whole texts: write the subject out instead of {{}} in "
                    f"{holed[0]!r}"
                )
        if not self.subject.strip():
            raise ValueError(f"the subject of the fact {self.prompt!r} is empty; name it")
        object.__setattr__(self, "subject", self.subject.strip())
        if self.prompt.count("{}") != 1:
            hint = (
                f"Fact.from_text({self.prompt!r}, subject={self.subject!r}, ...) finds it"
                if self.subject in self.prompt
                else f"the subject {self.subject!r} does not occur in it either"
            )
            raise ValueError(
                f"the prompt {self.prompt!r} must have one {{}} where the subject stands; {hint}"
            )
        target = self.target.strip()
        if not target:
            raise ValueError(
                f"the target of the fact {self.text!r} is empty; say what shall follow"
            )
        object.__setattr__(self, "target", target)
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float):
            raise TypeError(f"weight of the fact {self.text!r} must be a number")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(
                f"weight of the fact {self.text!r} must be positive and finite; got {self.weight}"
            )
        if not self.id:
            object.__setattr__(self, "id", self.text)

    @classmethod
    def from_text(cls, text: str, subject: str, target: str, **others: Any) -> Fact:
        """From a prompt in which the subject is written out; its last occurrence counts.

        "Ann" does not occur in "Anna": a subject in letters that have upper and lower case must not
        stand within a longer word.

        Raises:
            ValueError: the subject does not occur in the text.
        """
        if isinstance(subject, str):  # the spaces around it stay in the prompt
            subject = subject.strip()
        at = _last_place(text, subject) if subject else -1
        if at < 0:
            raise ValueError(
                f"the subject {subject!r} does not occur in the prompt {text!r}; write it as it "
                "stands there"
            )
        if "{}" in text:
            raise ValueError(f"the text {text!r} has a {{}}: give it to Fact(prompt=...) instead")
        return cls(text[:at] + "{}" + text[at + len(subject) :], subject, target, **others)

    @property
    def text(self) -> str:
        """The prompt about the subject."""
        return self.prompt.replace("{}", self.subject).rstrip()

    @property
    def statement(self) -> str:
        """Prompt and target as one text."""
        return self.text + self.separator + self.target

    @property
    def subject_span(self) -> tuple[int, int]:
        """Where the subject stands in `text`: characters [first, last)."""
        start = self.prompt.index("{}")
        return start, start + len(self.subject)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without those that are the defaults."""
        whole = asdict(self)
        kept = {
            f.name: whole[f.name]
            for f in fields(self)
            if f.default is f.default_factory or whole[f.name] != f.default
        }
        if self.id == self.text:
            kept.pop("id", None)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}


def _last_place(text: str, subject: str) -> int:
    """Where the subject last stands in the text as words of its own; -1 where it does not."""

    def joins(a: str, b: str) -> bool:
        return all(c.isdigit() or c.lower() != c.upper() for c in (a, b))

    at = text.rfind(subject)
    while at >= 0:
        stop = at + len(subject)
        before, after = text[at - 1 : at] if at else "", text[stop : stop + 1]
        if not (before and joins(before, subject[0])) and not (after and joins(subject[-1], after)):
            return at
        at = text.rfind(subject, 0, stop - 1)
    return -1


def listed_facts(facts: Iterable[Fact], name: str = "facts") -> list[Fact]:
    """The facts as a list; two may be alike, see `check_facts`.

    Raises:
        TypeError: one is not a Fact.
        ValueError: there is none.
    """
    if isinstance(facts, Fact):
        raise TypeError(f"{name} must be a list of Facts; put the one into a list")
    if isinstance(facts, str | Path):
        raise TypeError(
            f"{name} must be a list of Facts; got {os.fspath(facts)!r}. load_facts(path) reads a "
            "file"
        )
    listed = list(facts)
    if not listed:
        raise ValueError(f"{name} is empty: give at least one Fact")
    for i, fact in enumerate(listed):
        if not isinstance(fact, Fact):
            raise TypeError(f"{name}[{i}] must be a Fact; got {type(fact).__name__}")
    return listed


def check_facts(facts: Iterable[Fact], *, known: Mapping[str, Fact] | None = None) -> list[Fact]:
    """The facts as a list, once nothing among them is twice or contradicts itself.

    Args:
        facts: to be edited together.
        known: those that the model was edited with before, by id.

    Raises:
        TypeError: one is not a Fact.
        ValueError: there is none; an id or a fact is there twice; two facts give one prompt
            different targets.
    """
    listed = listed_facts(facts)
    texts: dict[str, Fact] = {fact.text: fact for fact in (known or {}).values()}
    ids: dict[str, Fact] = dict(known or {})
    for fact in listed:
        other = texts.get(fact.text)
        if other is not None:
            edited = " that the patch holds" if known and other.id in known else ""
            if other.target != fact.target:
                raise ValueError(
                    f"two facts contradict each other: {fact.text!r} -> {other.target!r} (id "
                    f"{other.id!r}{edited}) and -> {fact.target!r} (id {fact.id!r}). Keep one"
                    + (", or use upsert to replace the old one" if edited else "")
                )
            raise ValueError(
                f"the fact {fact.statement!r} is there twice: ids {other.id!r}{edited} and "
                f"{fact.id!r}. Remove one"
            )
        if fact.id in ids:
            edited = " (the patch holds it)" if known and fact.id in known else ""
            raise ValueError(
                f"two facts have the id {fact.id!r}{edited}: {ids[fact.id].text!r} and "
                f"{fact.text!r}. Give each its own"
            )
        texts[fact.text], ids[fact.id] = fact, fact
    return listed


def unknown_ids(ids: Iterable[str], known: Iterable[str], what: str = "patch") -> list[str]:
    """`ids` as a list without repetition, once all of them are known; facts count as their ids.

    Raises:
        ValueError: an id is not known; the message lists those that look like it.
    """
    if isinstance(ids, str):
        raise TypeError(f"ids must be a list of ids; got the string {ids!r}")
    held = dict.fromkeys(known)
    wanted = list(dict.fromkeys(i.id if isinstance(i, Fact) else i for i in ids))
    for name in wanted:
        if name not in held:
            close = difflib.get_close_matches(str(name), list(held), 3)
            raise ValueError(
                f"the {what} holds no fact with the id {name!r}"
                + (f"; did you mean {' or '.join(map(repr, close))}?" if close else "")
            )
    return wanted


# --- files -------------------------------------------------------------------------------------


def fact_of(record: Any, where: str) -> Fact:
    """A fact from a mapping of its fields; `where` opens the message of an error.

    Without `{}` in the prompt, the subject is looked for in it.

    Raises:
        ValueError: it is not one.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: must be an object with prompt, subject and target")
    names = [f.name for f in fields(Fact)]
    for key in record:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, 1)
            raise ValueError(
                f"{where}: unknown key {key!r}"
                + (f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(names)}")
            )
    for key in ("prompt", "subject", "target"):
        if key not in record:
            raise ValueError(f"{where}: {key!r} is missing")
    given = dict(record)
    try:
        if isinstance(given["prompt"], str) and "{}" not in given["prompt"]:
            return Fact.from_text(given.pop("prompt"), **given)
        return Fact(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def read_facts(path: str | Path, limit: int | None = None) -> list[Fact]:
    """Facts from a .jsonl file: an object with the fields of `Fact` in each line.

    Raises:
        ValueError: a line is not a fact; the message names it.
        OSError: the file cannot be read.
    """
    facts: list[Fact] = []
    with Path(path).open(encoding="utf-8-sig") as file:
        for number, line in enumerate(decoded(file, path), 1):
            if not line.strip():
                continue
            if limit is not None and len(facts) >= limit:
                break
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: is not JSON: {error}") from None
            facts.append(fact_of(record, where))
    if not facts:
        raise ValueError(f"{path}: holds no fact")
    return facts


def decoded(lines: Iterable[str], path: str | Path) -> Iterator[str]:
    """The lines of a file in UTF-8.

    Raises:
        ValueError: it is in another encoding.
    """
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 ({error.reason}); save it in UTF-8") from None


# --- tokens ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """A text as the model is given it.

    Attributes:
        ids: all tokens, special ones of the beginning included, without an end of sequence.
        lookup: the index of the lookup token in `ids`; -1 where no subject was given.
        targets: the indices in `ids` of the target's tokens; empty without one. The logits at
            position i - 1 are those of ids[i].
    """

    ids: list[int]
    lookup: int
    targets: range

    @property
    def prompt(self) -> list[int]:
        """The tokens before the target."""
        return self.ids[: self.targets.start] if len(self.targets) else self.ids

    @property
    def target(self) -> list[int]:
        return [self.ids[i] for i in self.targets]


def encode(
    tokenizer: Any,
    text: str,
    subject_span: tuple[int, int] | None = None,
    target: str | None = None,
    *,
    separator: str = " ",
    lookup: Lookup = "subject_last",
) -> Encoded:
    """Tokens of `text`, followed by the target, in one piece.

    A token that reaches from the text into the target counts as the target's.

    Args:
        tokenizer: of transformers, a fast one: with offsets.
        text: the prompt.
        subject_span: the characters [first, last) of the subject in `text`.
        target: what follows it, after `separator`.
        lookup: which token is looked up: the subject's last or first, the first after it, or the
            last of the prompt.

    Raises:
        TypeError: the tokenizer gives no offsets.
        ValueError: the subject, or the target, has no token of its own.
    """
    return encode_many(
        tokenizer, [(text, subject_span, target)], separator=separator, lookup=lookup
    )[0]


def encode_many(
    tokenizer: Any,
    rows: Sequence[tuple[str, tuple[int, int] | None, str | None]],
    *,
    separator: str | Sequence[str] = " ",
    lookup: Lookup = "subject_last",
) -> list[Encoded]:
    """`encode` of many (text, subject span, target) at once."""
    one_of("lookup", lookup, LOOKUPS)
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"{type(tokenizer).__name__} gives no offsets of its tokens, by which the subject is "
            "found: load the fast tokenizer (AutoTokenizer.from_pretrained(..., use_fast=True))"
        )
    if not rows:
        return []
    between = [separator] * len(rows) if isinstance(separator, str) else list(separator)
    wholes = [
        text if target is None else text.rstrip() + space + target.strip()
        for (text, _, target), space in zip(rows, between, strict=True)
    ]
    batch = tokenizer(
        wholes, return_offsets_mapping=True, return_special_tokens_mask=True, padding=False
    )
    encoded = []
    for i, (text, span, target) in enumerate(rows):
        ids, special = list(batch["input_ids"][i]), list(batch["special_tokens_mask"][i])
        offsets = [
            None if is_special else tuple(offset)
            for offset, is_special in zip(batch["offset_mapping"][i], special, strict=True)
        ]
        while special and special[-1]:  # an end of sequence would be learnt, or read, as text
            ids.pop(), special.pop(), offsets.pop()
        whole = wholes[i]
        end = len(whole) if target is None else len(text.rstrip())
        targets = range(0)
        if target is not None:
            first = next((j for j, o in enumerate(offsets) if o is not None and o[1] > end), None)
            if first is None:
                raise ValueError(f"the target {target!r} after {text!r} has no tokens")
            targets = range(first, len(ids))
            if first == 0:
                raise ValueError(
                    f"the prompt {text!r} has no token before its target {target!r}: nothing "
                    "predicts it. Use a longer prompt, or a tokenizer that begins with a token"
                )
        at = -1
        if span is not None:
            at = _lookup(offsets, targets, span, lookup, whole, len(ids))
        encoded.append(Encoded(ids, at, targets))
    return encoded


def _lookup(
    offsets: Sequence[Any],
    targets: range,
    span: tuple[int, int],
    lookup: Lookup,
    whole: str,
    length: int,
) -> int:
    start, stop = span
    inside = [
        j for j, o in enumerate(offsets) if o is not None and o[0] < stop and o[1] > start
        and j not in targets
    ]  # fmt: skip
    subject = whole[start:stop]
    if not inside:
        raise ValueError(f"the subject {subject!r} has no token of its own in {whole!r}")
    last = (targets.start if len(targets) else length) - 1
    if lookup == "last":
        return last
    if lookup == "subject_first":
        return inside[0]
    if lookup == "subject_first_after_last":
        return min(inside[-1] + 1, last)
    return inside[-1]
