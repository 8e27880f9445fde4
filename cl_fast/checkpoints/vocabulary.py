"""The tokens of a tokenizer and their ids, read from its files, and a tokenizer with more tokens.

A fast tokenizer is ``tokenizer.json``: the vocabulary of its model (BPE, Unigram, WordPiece,
WordLevel) and added tokens, which are cut out of the text before the model sees it. Ids of added
tokens are not what the file says but what loading gives: the id in the model's vocabulary, else the
next one that is free. The special tokens that ``tokenizer_config.json`` names are added when they
are missing. :class:`VocabularyReader` tells what a loaded tokenizer would have, from JSON alone;
where there are only files of a slow tokenizer (``tokenizer.model``, ``vocab.json``) transformers
converts them.

:func:`extend` writes a tokenizer with more tokens: they become added tokens behind the others, so
every token keeps its id, and text that holds none of them is cut as before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from cl_fast.checkpoints.safetensors import strict_json
from cl_fast.checkpoints.sidecar import has_tokenizer
from cl_fast.errors import CheckpointError

__all__ = ["Vocabulary", "VocabularyReader", "added_token", "extend", "read_vocabulary"]

_SPECIAL = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

#: Files that tell a vocabulary in other words than tokenizer.json, and do not hold added tokens.
_STALE = ("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt")
_STALE_ENDINGS = (".model", ".tiktoken", ".spm")


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """What a tokenizer knows.

    Attributes:
        folder: where it lies.
        kind: of its model: ``BPE``, ``Unigram``, ``WordPiece``, ``WordLevel``.
        tokens: token -> id, as loading gives it.
        added: the added tokens with their flags, in the order of their ids.
        content: ``tokenizer.json`` as text.
        config: ``tokenizer_config.json`` as text; ``None`` where there is none.
        moved: a token that loading gives another id than the file says, with both, or ``None``.
    """

    folder: Path
    kind: str
    tokens: dict[str, int]
    added: dict[str, dict[str, Any]]
    content: str
    config: str | None
    moved: tuple[str, int, int] | None

    @property
    def size(self) -> int:
        """One more than the highest id."""
        return max(self.tokens.values(), default=-1) + 1


class VocabularyReader:
    """Reads tokenizers, each different tokenizer.json once."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Vocabulary, _Loaded]] = {}

    def digest(self, folder: Path, instead: Mapping[str, bytes] | None = None) -> str | None:
        """Of all that tells the tokens; ``None`` where that is not tokenizer.json."""
        files = _files(folder, instead)
        if files is None or "tokenizer.json" not in files:
            return None
        hasher = blake2b(digest_size=16)
        for name, data in files.items():
            hasher.update(name.encode() + len(data).to_bytes(8, "little") + data)
        return hasher.hexdigest()

    def read(self, folder: Path, instead: Mapping[str, bytes] | None = None) -> Vocabulary | None:
        """The vocabulary of the tokenizer in ``folder``; ``None`` where there is none.

        Args:
            instead: files that stand for those in the folder, by name.

        Raises:
            CheckpointError: a file cannot be read, or is not a tokenizer; or it is a slow one and
                transformers is not installed, or cannot convert it.
        """
        files = _files(folder, instead)
        if files is None:
            return None
        raw = files["tokenizer.json"] if "tokenizer.json" in files else _convert(folder)
        digest = blake2b(raw, digest_size=16).hexdigest()
        if digest not in self._known:
            self._known[digest] = _parse(folder, raw)
        vocabulary, loaded = self._known[digest]
        implied = [e for e in _implied(folder, files) if e["content"] not in loaded.added]
        if implied:
            loaded = loaded.copy()
            for entry in implied:
                loaded.add(entry)
        config = files.get("tokenizer_config.json")
        return replace(
            vocabulary,
            folder=folder,
            tokens=loaded.tokens,
            added={token: loaded.added[token] for token in loaded.order()},
            config=None if config is None else config.decode("utf-8"),
        )


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The vocabulary of one tokenizer; see :meth:`VocabularyReader.read`."""
    return VocabularyReader().read(folder)


def _files(folder: Path, instead: Mapping[str, bytes] | None) -> dict[str, bytes] | None:
    try:
        files = {name: (folder / name).read_bytes() for name in _FILES if (folder / name).is_file()}
        if not instead and not has_tokenizer(folder):
            return None
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or folder}: cannot be read ({error.strerror or error})"
        ) from error
    return {**files, **{name: data for name, data in (instead or {}).items() if name in _FILES}}


def _convert(folder: Path) -> bytes:
    """tokenizer.json of a slow tokenizer."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise CheckpointError(
            f"{folder}: has no tokenizer.json, and transformers, which converts slow tokenizers, "
            "is not installed; save the tokenizer as a fast one, or install cl_fast[hf]"
        ) from error
    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), use_fast=True, local_files_only=True)
        text = loaded.backend_tokenizer.to_str()
    except Exception as error:
        raise CheckpointError(
            f"{folder}: has no tokenizer.json, and transformers cannot convert what is there "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); save "
            "the tokenizer as a fast one (tokenizer.json) first"
        ) from error
    return str(text).encode()


def _parse(folder: Path, raw: bytes) -> tuple[Vocabulary, _Loaded]:
    path = folder / "tokenizer.json"
    content = _object(strict_json(raw, str(path)), path)
    model = content.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{path}: has no object 'model', so it is not a fast tokenizer")
    loaded = _Loaded(_model_tokens(model, path))
    moved: tuple[str, int, int] | None = None
    listed = content.get("added_tokens")
    if listed is not None and not isinstance(listed, list):
        raise CheckpointError(f"{path}: added_tokens must be a list")

    for entry in listed or ():
        said = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise CheckpointError(f"{path}: an entry of added_tokens has no text 'content'")
        if not entry["content"]:
            continue  # loading leaves it out
        got = loaded.add(_entry(entry["content"], entry))
        if type(said) is int and said != got and moved is None:
            moved = (entry["content"], said, got)
    text = raw.decode("utf-8")
    return Vocabulary(folder, _kind(model), loaded.tokens, {}, text, None, moved), loaded


class _Loaded:
    """Token ids as the loading of a tokenizer gives them: an added token has the id that the model
    has for it, else one more than the highest so far, and at least the model's size."""

    def __init__(self, tokens: dict[str, int]) -> None:
        self.tokens = tokens
        self.added: dict[str, dict[str, Any]] = {}
        self._size, self._top = len(tokens), -1

    def copy(self) -> _Loaded:
        other = _Loaded(dict(self.tokens))
        other.added = dict(self.added)
        other._size, other._top = self._size, self._top
        return other

    def order(self) -> list[str]:
        """The added tokens by their ids."""
        return sorted(self.added, key=self.tokens.__getitem__)

    def add(self, entry: dict[str, Any]) -> int:
        token: str = entry["content"]
        if token not in self.tokens:
            self.tokens[token] = max(self._top + 1, self._size)
        self.added.setdefault(token, entry)
        self._top = max(self._top, self.tokens[token])
        return self.tokens[token]


def _model_tokens(model: dict[str, Any], path: Path) -> dict[str, int]:
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        for token, index in vocabulary.items():
            if type(index) is not int or index < 0:
                raise CheckpointError(f"{path}: the id of token {token!r} is {index!r}")
        return dict(vocabulary)
    if isinstance(vocabulary, list):
        pieces = [piece[0] if isinstance(piece, list) and piece else piece for piece in vocabulary]
        if all(isinstance(piece, str) for piece in pieces):
            return {piece: i for i, piece in reversed(list(enumerate(pieces)))}
    raise CheckpointError(
        f"{path}: its vocabulary cannot be read (model.vocab is neither token -> id nor a list of "
        "pieces)"
    )


def _kind(model: dict[str, Any]) -> str:
    said = model.get("type")
    if isinstance(said, str):
        return said
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    if "merges" in model:
        return "BPE"
    return "WordPiece" if "continuing_subword_prefix" in model else "WordLevel"


def added_token(content: str, *, special: bool = False) -> dict[str, Any]:
    """The entry of an added token with the flags that adding plain text gives."""
    return _entry(content, {"special": special, "normalized": not special})


def _entry(content: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    special = bool(flags.get("special", False))
    given = {"normalized": not special, **flags}
    return {"content": content, **{name: bool(given.get(name, False)) for name in _FLAGS}}


def _implied(folder: Path, files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """The added tokens that the files beside tokenizer.json name, in the order of loading."""

    def read(name: str) -> dict[str, Any]:
        if name not in files:
            return {}
        return _object(strict_json(files[name], str(folder / name)), folder / name)

    config = read("tokenizer_config.json")
    entries: list[dict[str, Any]] = []
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        numbered = [
            (int(key), value)
            for key, value in decoder.items()
            if key.isdecimal() and isinstance(value, dict) and isinstance(value.get("content"), str)
        ]
        entries += [_entry(value["content"], value) for _, value in sorted(numbered, key=_first)]
    else:
        config = {**config, **read("special_tokens_map.json")}
        legacy = read("added_tokens.json")
        named = {_text(config.get(key)) for key in _SPECIAL}
        pairs = [(i, token) for token, i in legacy.items() if type(i) is int]
        entries += [
            added_token(token, special=token in named) for _, token in sorted(pairs, key=_first)
        ]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    more = list(extra.values() if isinstance(extra, dict) else extra)
    custom = [v for k, v in config.items() if k.endswith("_token") and k not in _SPECIAL]
    for value in (*(config.get(key) for key in _SPECIAL), *custom, *more):
        text = _text(value)
        if text:
            flags = value if isinstance(value, dict) else {}
            entries.append(_entry(text, {**flags, "special": True, "normalized": False}))
    return entries


def _first(pair: tuple[int, Any]) -> int:
    return pair[0]


def _text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _object(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value


def extend(
    base: Vocabulary, plain: Iterable[str], added: Sequence[dict[str, Any]]
) -> tuple[dict[str, int], dict[str, bytes | None]]:
    """The tokenizer ``base`` with more tokens.

    Args:
        base: keeps all that it has, with its ids.
        plain: tokens to add behind its last id, in this order, matched as text; known ones are
            left alone.
        added: added tokens with their flags, likewise; one that is a plain token of ``base``
            becomes an added token with the id that it has.

    Returns:
        token -> id, and the files to write: name -> content, ``None`` for files of ``base`` that
        must not be copied, since they tell the old vocabulary.

    Raises:
        CheckpointError: the ids of ``base`` are not those that loading it gives.
    """
    path = base.folder / "tokenizer.json"
    if base.moved is not None:
        token, said, got = base.moved
        raise CheckpointError(
            f"{path}: says that token {token!r} has id {said}, loading it gives {got}; a tokenizer "
            "whose ids have gaps cannot be extended: save it again with transformers first"
        )
    tokens = dict(base.tokens)
    entries = dict(base.added)
    first_free = base.size
    for entry in (*(added_token(token) for token in plain if token not in tokens), *added):
        token = entry["content"]
        if token not in tokens:
            tokens[token] = first_free
            first_free += 1
            entries[token] = entry
        elif token not in entries:  # a plain token becomes an added one, with the id that it has
            entries[token] = entry
    content = strict_json(base.content.encode(), str(path))
    content["added_tokens"] = [
        {"id": tokens[token], **entries[token]} for token in sorted(entries, key=tokens.__getitem__)
    ]
    raw = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if base.config is not None:
        config_path = base.folder / "tokenizer_config.json"
        config = _object(strict_json(base.config.encode(), str(config_path)), config_path)
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
            for entry in content["added_tokens"]
        }
    files: dict[str, bytes | None] = {
        "tokenizer.json": raw,
        "tokenizer_config.json": _dump(config),
    }
    again = _Loaded(_model_tokens(content["model"], path))
    if any(again.add(entry) != entry["id"] for entry in content["added_tokens"]):
        raise CheckpointError(
            f"{path}: the ids of its tokens have gaps, so tokens added behind them would not get "
            "the ids that they need; save it again with transformers first"
        )
    for file in sorted(base.folder.iterdir()):
        if file.name in _STALE or file.name.endswith(_STALE_ENDINGS):
            files[file.name] = None
    return tokens, files


def _dump(config: dict[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
