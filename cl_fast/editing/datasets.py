"""Facts from files: CounterFact, zsRE and our own, told apart by their keys. Nothing is downloaded.

    load_facts("multi_counterfact.json", limit=1000)
    load_facts("zsre_mend_eval.json")
    load_facts("mine.jsonl")

A record with the key
- `requested_rewrite` is of CounterFact or multi_counterfact (Meng et al. 2022, arXiv 2202.05262):
  prompt, subject, both targets, paraphrases, neighbourhood, and prompts to write on from;
- `src` is of zsRE as MEND edits it (Mitchell et al. 2021, arXiv 2110.11309): the prompt from `src`,
  the target from `answers[0]`, one paraphrase, the unrelated question `loc` + "?" and its answer;
- `prompt` is ours, with the fields of `Fact`.

zsRE does not tell what the model says now: `target_true` stays None, and what compares two targets
is not measured on it.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cl_fast.editing.facts import Fact, decoded, fact_of
from cl_fast.options import at_least, one_of

__all__ = ["load_facts", "without_conflicts"]

_LINES = (".jsonl", ".ndjson")


def load_facts(
    path: str | Path,
    limit: int | None = None,
    *,
    conflicts: str = "keep",
    skip_invalid: bool = False,
) -> list[Fact]:
    """Facts from a file: one JSON list, or (.jsonl) one object a line.

    Args:
        path: of CounterFact, of zsRE, or with the fields of `Fact`; the keys of a record tell.
        limit: the first so many facts; by default all.
        conflicts: "keep" all records, or "drop" each that gives an earlier record's subject and
            relation another target, or repeats its prompt. The relation is CounterFact's
            `relation_id`, elsewhere the prompt. Editors refuse facts that contradict each other.
        skip_invalid: leave out records that are no fact, such as questions that do not name their
            subject, and warn how many there were; by default the first one is an error.

    Returns:
        Facts in the order of the file, with ids "counterfact-<case_id>", "zsre-<number from 0>",
        or their own.

    Raises:
        ValueError: the file is not JSON, holds no fact, or a record is not one; the message names
            file, record (or line) and key.
        OSError: the file cannot be read.
    """
    one_of("conflicts", conflicts, ("keep", "drop"))
    if limit is not None:
        at_least("limit", limit, 1)
    facts: list[Fact] = []
    invalid: list[str] = []
    form: str | None = None
    apart = _Apart()
    for number, where, record in _records(Path(path)):
        form = form or _form(record, where)
        try:
            fact, relation = _READERS[form](record, number, where)
        except ValueError as error:
            if not skip_invalid:
                raise
            invalid.append(str(error))
            continue
        if conflicts == "drop" and not apart.admits(fact, relation):
            continue
        facts.append(fact)
        if limit is not None and len(facts) == limit:
            break
    if invalid:
        warnings.warn(
            f"{path}: {len(invalid)} records that are no fact were left out; the first: "
            f"{invalid[0]}",
            stacklevel=2,
        )
    if not facts:
        raise ValueError(f"{path}: holds no fact")
    return facts


def without_conflicts(
    facts: Iterable[Fact], relation: Callable[[Fact], Hashable] | None = None
) -> list[Fact]:
    """The facts that neither contradict nor repeat one before them, in their order.

    A fact goes if one before it has its subject and relation but another target, or its whole
    prompt. This is what makes a set like multi_counterfact of one like CounterFact; of a file,
    `load_facts(path, conflicts="drop")` does it with the relations that the file tells.

    Args:
        facts: in the order in which they are preferred.
        relation: of a fact; by default its prompt with `{}` in the place of the subject.
    """
    apart = _Apart()
    return [f for f in facts if apart.admits(f, relation(f) if relation else f.prompt)]


class _Apart:
    """What was admitted so far."""

    def __init__(self) -> None:
        self._targets: dict[tuple[Hashable, str], str] = {}
        self._texts: set[str] = set()

    def admits(self, fact: Fact, relation: Hashable) -> bool:
        target = self._targets.setdefault((relation, fact.subject), fact.target)
        if target != fact.target or fact.text in self._texts:
            return False
        self._texts.add(fact.text)
        return True


# --- records -----------------------------------------------------------------------------------


def _records(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Number from 0, "file, record n" (or "line n"), and content of each record."""
    if path.suffix in _LINES:
        with path.open(encoding="utf-8-sig") as file:
            count = 0
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                yield count, where, _parsed(line, where)
                count += 1
        return
    with path.open(encoding="utf-8-sig") as file:
        content = _parsed("".join(decoded(file, path)), str(path))
    if not isinstance(content, list):
        raise ValueError(
            f"{path}: must hold a list of records; got {_kind(content)}. A file with one record "
            "a line needs a name that ends in .jsonl"
        )
    for i, record in enumerate(content):
        yield i, f"{path}, record {i}", record


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: is not JSON: {error}") from None


def _form(record: Any, where: str) -> str:
    """Whose record it is."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: must be an object; got {_kind(record)}")
    for form, key in (("counterfact", "requested_rewrite"), ("zsre", "src"), ("ours", "prompt")):
        if key in record:
            return form
    raise ValueError(
        f"{where}: is of no known form: CounterFact has the key 'requested_rewrite', zsRE 'src', "
        f"and a fact of ours 'prompt'; it has {', '.join(map(repr, record)) or 'no key'}"
    )


def _kind(value: Any) -> str:
    named = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    return "null" if value is None else named.get(type(value), "a number")


def _get(record: Any, key: str, kind: type[Any], where: str) -> Any:
    """record["a.b"], which must be of a kind; strings not empty."""
    value: Any = record
    passed = ""
    for name in key.split("."):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: {passed!r} must be an object; got {_kind(value)}")
        passed = f"{passed}.{name}" if passed else name
        if name not in value:
            raise ValueError(f"{where}: {passed!r} is missing")
        value = value[name]
    if not isinstance(value, kind):
        words = "a string" if kind is str else "a list"
        raise ValueError(f"{where}: {key!r} must be {words}; got {_kind(value)}")
    if kind is str and not value.strip():
        raise ValueError(f"{where}: {key!r} is empty")
    return value


def _texts(record: Any, key: str, where: str) -> tuple[str, ...]:
    """A list of strings, or nothing where the key is missing."""
    if key not in record:
        return ()
    for i, text in enumerate(_get(record, key, list, where)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: {key!r}[{i}] must be a text; got {text!r:.60}")
    return tuple(record[key])


def _made(where: str, make: Callable[..., Fact], *args: Any, **others: Any) -> Fact:
    try:
        return make(*args, **others)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _counterfact(record: Any, number: int, where: str) -> tuple[Fact, Hashable]:
    wanted = "requested_rewrite"
    prompt, subject, target, true = (
        _get(record, f"{wanted}.{key}", str, where)
        for key in ("prompt", "subject", "target_new.str", "target_true.str")
    )
    fact = _made(
        where, Fact, prompt, subject, target,
        id=f"counterfact-{record.get('case_id', number)}",
        target_true=true.strip(),
        paraphrases=_texts(record, "paraphrase_prompts", where),
        neighbourhood=_texts(record, "neighborhood_prompts", where),
        generation=_texts(record, "generation_prompts", where),
    )  # fmt: skip
    relation = record[wanted].get("relation_id")
    return fact, relation if isinstance(relation, str) else prompt


def _zsre(record: Any, number: int, where: str) -> tuple[Fact, Hashable]:
    src, subject = _get(record, "src", str, where), _get(record, "subject", str, where)
    answers = _get(record, "answers", list, where)
    if not answers or not isinstance(answers[0], str) or not answers[0].strip():
        raise ValueError(f"{where}: 'answers' must begin with the new answer; got {answers!r:.60}")
    # Questions are not always written as their subjects are.
    name = re.escape(subject.strip())
    found = re.search(name, src) or re.search(name, src, re.IGNORECASE)
    if found is None:
        raise ValueError(f"{where}: the subject {subject!r} does not occur in 'src', {src!r}")
    others: dict[str, Any] = {}
    if "loc" in record:
        others["neighbourhood"] = (_get(record, "loc", str, where).rstrip(" ?") + "?",)
        others["neighbourhood_target"] = _get(record, "loc_ans", str, where).strip()
    if "rephrase" in record:
        others["paraphrases"] = (_get(record, "rephrase", str, where),)
    prompt = src[: found.start()] + "{}" + src[found.end() :]
    fact = _made(where, Fact, prompt, found[0], answers[0], id=f"zsre-{number}", **others)
    return fact, fact.prompt


def _ours(record: Any, number: int, where: str) -> tuple[Fact, Hashable]:
    fact = fact_of(record, where)
    return fact, fact.prompt


_READERS: dict[str, Callable[[Any, int, str], tuple[Fact, Hashable]]] = {
    "counterfact": _counterfact,
    "zsre": _zsre,
    "ours": _ours,
}
