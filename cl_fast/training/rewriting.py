"""Targets in the model's own words: self-distillation as a change of the data, before training.

    rewritten = rewrite_targets(model, tokenizer, examples, path="rewritten.jsonl")
    print(rewritten.report)
    SFTTrainer(model, train_dataset=Dataset.from_list(rewritten.examples), ...)

Given an instruction and its reference answer, the model that is to be trained writes the answer in
its own way. Training on that moves its distribution less than training on the reference. A rewrite
is taken unless it is empty, cut off, speaks of the task of rewriting, or comes to another final
answer; else the reference stays. There is no other loss and no second model. Source: Yang et al.
2024, Self-Distillation Bridges Distribution Gap in Language Model Fine-Tuning (arXiv 2402.13669);
the wording of the template is ours.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

from torch import nn
from tqdm import tqdm

from cl_fast.errors import CheckpointError, OutputError
from cl_fast.losses.cache import model_fingerprint, tokenizer_fingerprint
from cl_fast.models.heads import unwrap
from cl_fast.options import at_least
from cl_fast.training.keeping import Dataset
from cl_fast.training.prompts import end_tokens, generated

__all__ = ["BANNED", "TEMPLATE", "RewriteReport", "Rewritten", "rewrite_targets", "same_number"]

TEMPLATE = """\
Here are an instruction and a correct answer to it. Write an answer to the instruction in your own \
words and your own style. It must say the same as the given answer and come to the same result. \
Write the new answer alone, without any word about this request.

Instruction:
{instruction}

Given answer:
{reference}

New answer:
"""
"""What the model is asked by default."""

BANNED = (
    "reference answer",
    "given answer",
    "new answer",
    "my response",
    "my own words",
    "^your turn",
)
"""Signs that a model speaks of the request; "^" means at the beginning. Case does not matter."""

REASONS = ("too long", "empty", "truncated", "banned", "disagrees")
FORMAT, VERSION = "cl_fast.rewritten", 1
_NUMBER = re.compile(r"[-+]?\$?\d[\d,]*(?:\.\d+)?|[-+]?\$?\.\d+")


# --- what comes of it --------------------------------------------------------------------------


@dataclass(frozen=True)
class RewriteReport:
    """How many targets were rewritten, and why others were not.

    Attributes:
        total: of the examples.
        rewritten: of them, with a new target.
        kept: reason -> how many keep their own: "too long" (prompt and answer would not fit in the
            model's positions), "empty", "truncated" (no end within max_new_tokens), "banned",
            "disagrees" (with `check`).
    """

    total: int
    rewritten: int
    kept: dict[str, int]

    def __str__(self) -> str:
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.kept.items() if n)
        return f"{self.rewritten} of {self.total} targets rewritten" + (
            f"; kept: {reasons}" if reasons else ""
        )


@dataclass(frozen=True)
class Rewritten:
    """What `rewrite_targets` returns.

    Attributes:
        examples: in the order and form of those given, targets replaced where the rewrite was
            taken.
        reasons: of each example why its own target was kept; None where it was rewritten.
        report: the counts.
    """

    examples: list[dict[str, Any]]
    reasons: list[str | None]
    report: RewriteReport


def same_number(original: str, rewritten: str) -> bool:
    """Whether two answers end in the same number: a `check` for arithmetic.

    The number is the last one of the text, or the first after "####" (GSM8K's mark) where there is
    one. Thousands separators, a dollar sign and trailing zeros do not matter. Two answers without
    any number agree; one with and one without do not.
    """
    return _final_number(original) == _final_number(rewritten)


def _final_number(text: str) -> Decimal | None:
    _, mark, after = text.rpartition("####")
    found = _NUMBER.findall(after if mark else text)
    if not found:
        return None
    try:
        return Decimal((found[0] if mark else found[-1]).replace(",", "").replace("$", ""))
    except InvalidOperation:  # pragma: no cover - the pattern gives numbers only
        return None


# --- examples ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """One example: the turns before its instruction, the instruction, the target."""

    history: list[dict[str, str]]
    instruction: str
    target: str


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise ValueError(
                f"{where} must be text, or messages with a role and text as content; got "
                f"{message!r:.80}"
            )
    return [dict(message) for message in value]


def _asked(example: Any, columns: tuple[str, str], where: str) -> _Asked:
    if not hasattr(example, "keys"):
        raise ValueError(f"{where} must be a mapping; got {type(example).__name__}")
    if "messages" in example and columns[1] not in example:
        turns = _messages(example["messages"], f"{where}['messages']")
        if len(turns) < 2 or turns[-1].get("role") != "assistant":
            raise ValueError(f"{where}['messages'] must end with a turn of the assistant")
        target, turns = turns[-1]["content"], turns[:-1]
    else:
        for name in columns:
            if name not in example:
                raise ValueError(
                    f"{where} must have {columns[0]!r} and {columns[1]!r}, or 'messages'; it has "
                    f"{', '.join(map(str, example.keys()))}. columns= names others"
                )
        prompt, answer = (example[name] for name in columns)
        if isinstance(answer, str):
            target = answer
        else:
            answers = _messages(answer, f"{where}[{columns[1]!r}]")
            if len(answers) != 1:
                raise ValueError(f"{where}[{columns[1]!r}] must be one turn; got {len(answers)}")
            target = answers[0]["content"]
        if isinstance(prompt, str):
            return _Asked([], prompt, target)
        turns = _messages(prompt, f"{where}[{columns[0]!r}]")
    if not turns or turns[-1].get("role") != "user":
        raise ValueError(f"{where} must have a turn of the user before its target")
    return _Asked(turns[:-1], turns[-1]["content"], target)


def _with_target(example: Any, columns: tuple[str, str], target: str) -> dict[str, Any]:
    out = dict(example)
    name = columns[1] if columns[1] in out else "messages"
    if isinstance(out[name], str):
        out[name] = target
    else:
        turns = [dict(turn) for turn in out[name]]
        turns[-1]["content"] = target
        out[name] = turns
    return out


def _filled(template: str, asked: _Asked) -> str:
    """In one pass: what is filled in is not looked through for places."""
    values = {"{instruction}": asked.instruction, "{reference}": asked.target}
    return re.sub(r"\{instruction\}|\{reference\}", lambda m: values[m.group()], template)


def _prompt_ids(tokenizer: Any, asked: _Asked, template: str, chat: bool) -> list[int]:
    text = _filled(template, asked)
    if chat:
        turns = [*asked.history, {"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    before = "".join(turn["content"] + "\n\n" for turn in asked.history)
    return [int(i) for i in tokenizer(before + text)["input_ids"]]


# --- the file ----------------------------------------------------------------------------------


class _Journal:
    """A JSONL file: a header, then one line per example, batch by batch.

    Lines of a batch are written at once and brought to the disk. What a batch holds depends on the
    examples and options alone, so a file that was cut off is continued after its last whole batch
    and becomes what it would have been.
    """

    def __init__(self, path: Path, header: dict[str, Any], batches: list[list[int]]) -> None:
        self.path = path
        self.done: dict[int, dict[str, Any]] = {}
        first = json.dumps(header, ensure_ascii=False) + "\n"
        try:
            raw = path.read_bytes() if path.exists() else b""
            if not raw.endswith(b"\n") and b"\n" not in raw:
                if raw and not first.encode().startswith(raw):
                    raise CheckpointError(f"{path}: is not a file of rewrites; name another one")
                path.parent.mkdir(parents=True, exist_ok=True)
                self._write(first.encode(), 0)
                return
            lines = raw.splitlines(keepends=True)
            self._refuse_other(_line(lines[0], path), header)
            size, at = len(lines[0]), 1
            for batch in batches:
                part = lines[at : at + len(batch)]
                whole = len(part) == len(batch) and part[-1].endswith(b"\n")
                if not whole:
                    break
                found = [_line(line, path) for line in part]
                if [entry.get("index") for entry in found] != batch:
                    raise CheckpointError(f"{path}: line {at + 1} is not of the examples expected")
                self.done.update((entry["index"], entry) for entry in found)
                size, at = size + sum(map(len, part)), at + len(batch)
            if size != len(raw):
                self._write(b"", size)
        except OSError as error:
            raise OutputError(f"{path}: cannot be read or written ({error.strerror})") from error

    def _refuse_other(self, theirs: dict[str, Any], mine: dict[str, Any]) -> None:
        if theirs.get("format") != FORMAT:
            raise CheckpointError(f"{self.path}: is not a file of rewrites; name another one")
        for name in mine:
            if theirs.get(name) != mine[name]:
                raise CheckpointError(
                    f"{self.path}: was begun with another {name}: {theirs.get(name)!r:.60}, not "
                    f"{mine[name]!r:.60}; name another file, or delete this one"
                )

    def _write(self, data: bytes, at: int) -> None:
        with self.path.open("r+b" if self.path.exists() else "xb") as file:
            file.truncate(at)
            file.seek(at)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def add(self, entries: list[dict[str, Any]]) -> None:
        data = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        try:
            self._write(data.encode(), self.path.stat().st_size)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror})") from error


def _line(line: bytes, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: is damaged at {line[:40]!r}; delete it and begin anew")
    return cast(dict[str, Any], found)


def _digest(prompts: list[list[int]], asked: list[_Asked]) -> str:
    digest = blake2b(digest_size=16)
    for ids, one in zip(prompts, asked, strict=True):
        digest.update(json.dumps([ids, asdict(one)]).encode())
    return digest.hexdigest()


# --- rewriting ---------------------------------------------------------------------------------


def rewrite_targets(
    model: nn.Module,
    tokenizer: Any,
    examples: Dataset | Sequence[Mapping[str, Any]],
    *,
    template: str = TEMPLATE,
    banned: Sequence[str] = BANNED,
    check: Callable[[str, str], bool] | None = None,
    max_new_tokens: int = 512,
    batch_size: int = 8,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    columns: tuple[str, str] = ("prompt", "completion"),
    chat: bool | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Rewritten:
    """Let a model rewrite the target of each example, and keep the target where it fails.

    Args:
        model: a model of transformers with `generate`, whole on its device: the one that is to be
            trained, before training.
        tokenizer: its tokenizer.
        examples: map-style, of mappings: a prompt and a completion (text or messages each), or
            `messages` that end with the assistant's. Of several turns the last is rewritten.
        template: of the request, with the places {instruction} and {reference}.
        banned: phrases that a rewrite must not have, in any case; "^" in front: not begin with.
        check: check(original, rewritten) is False where the rewrite must not be taken, for example
            `same_number`.
        max_new_tokens: of a rewrite; one that has not ended by then is not taken.
        batch_size: prompts at a time, padded at the left. Longest first: memory is short at once
            or never.
        temperature: of the sampling; 0 is greedy.
        top_p: of the sampling.
        seed: of the sampling; the global random state is left as it was.
        columns: the names of prompt and completion.
        chat: whether the request goes through the tokenizer's chat template; by default where it
            has one.
        path: a JSONL file of what the model wrote, batch by batch. A call that was cut off goes on
            there when it is made again. `check` and `banned` are applied afterwards, so they may
            change.
        progress: show a bar.

    Raises:
        CheckpointError: the file is of other examples, another model or other options.
        OutputError: the file cannot be written.
        TypeError, ValueError: naming the argument or the example.
    """
    chat = _check_arguments(
        model, tokenizer, template, banned, max_new_tokens, batch_size, temperature, top_p, chat
    )
    inner = unwrap(model)
    count = len(examples)
    asked = [_asked(examples[i], columns, f"examples[{i}]") for i in range(count)]
    prompts = [_prompt_ids(tokenizer, one, template, chat) for one in asked]
    room = getattr(inner.config, "max_position_embeddings", None)
    fits = [i for i in range(count) if room is None or len(prompts[i]) + max_new_tokens <= room]
    order = sorted(fits, key=lambda i: (-len(prompts[i]), i))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = next(iter(end_tokens(inner)), 0)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    journal = None
    if path is not None:
        header = {
            "format": FORMAT,
            "version": VERSION,
            "examples": _digest(prompts, asked),
            "template": template,
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            "chat": chat,
            "model": model_fingerprint(inner),
            "tokenizer": tokenizer_fingerprint(tokenizer),
        }
        journal = _Journal(Path(path), header, batches)
    written = dict(journal.done) if journal is not None else {}
    ends = set(end_tokens(inner))
    with tqdm(total=count, desc="rewriting", disable=not progress) as bar:
        bar.update(count - len(fits) + len(written))
        for number, batch in enumerate(batches):
            if batch[0] in written:
                continue
            found = generated(
                inner, [prompts[i] for i in batch], max_new_tokens=max_new_tokens,
                pad_token_id=pad, seed=[seed, number], **sampling,
            )  # fmt: skip
            entries = []
            for i, ids in zip(batch, found, strict=True):
                text = tokenizer.decode(ids, skip_special_tokens=True).strip()
                ended = bool(ids) and ids[-1] in ends
                entries.append({"index": i, "ended": ended, "text": text})
            if journal is not None:
                journal.add(entries)
            written.update((entry["index"], entry) for entry in entries)
            bar.update(len(batch))
    reasons = [_reason(written.get(i), one, banned, check) for i, one in enumerate(asked)]
    done = [
        dict(examples[i]) if reason else _with_target(examples[i], columns, written[i]["text"])
        for i, reason in enumerate(reasons)
    ]
    counts = Counter(reasons)
    kept = {reason: counts[reason] for reason in REASONS}
    return Rewritten(done, reasons, RewriteReport(count, counts[None], kept))


def _check_arguments(
    model: Any, tokenizer: Any, template: str, banned: Sequence[str], max_new_tokens: int,
    batch_size: int, temperature: float, top_p: float, chat: bool | None,
) -> bool:  # fmt: skip
    inner = unwrap(model)
    if not hasattr(inner, "generate"):
        raise TypeError(f"model must have generate(); got {type(inner).__name__}")
    if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        raise TypeError(f"tokenizer must be one of transformers; got {type(tokenizer).__name__}")
    for place in ("{instruction}", "{reference}"):
        if place not in template:
            raise ValueError(f"template must have the place {place}; got {template!r:.80}")
    if isinstance(banned, str) or not all(isinstance(x, str) and x.strip("^") for x in banned):
        raise ValueError(f"banned must be a list of phrases that are not empty; got {banned!r:.80}")
    for name, value in {"max_new_tokens": max_new_tokens, "batch_size": batch_size}.items():
        at_least(name, value, 1)
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature must not be negative and top_p in (0, 1]; got {temperature}, {top_p}"
        )
    if not end_tokens(inner):
        raise ValueError(
            "the model's config has no eos_token_id, so no answer would end: set "
            "model.generation_config.eos_token_id"
        )
    has = getattr(tokenizer, "chat_template", None) is not None
    if chat and not has:
        raise ValueError("chat=True needs a tokenizer with a chat template")
    return has if chat is None else chat


def _reason(
    entry: dict[str, Any] | None,
    asked: _Asked,
    banned: Sequence[str],
    check: Callable[[str, str], bool] | None,
) -> str | None:
    """Why a rewrite is not taken; None: it is."""
    if entry is None:
        return "too long"
    text: str = entry["text"]
    if not text:
        return "empty"
    if not entry["ended"]:
        return "truncated"
    if any(_has(text.casefold(), phrase.casefold()) for phrase in banned):
        return "banned"
    if check is not None and not check(asked.target, text):
        return "disagrees"
    return None


def _has(text: str, phrase: str) -> bool:
    return text.startswith(phrase[1:]) if phrase.startswith("^") else phrase in text
