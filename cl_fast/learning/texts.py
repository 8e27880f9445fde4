"""Text files as blocks of tokens, for continual pre-training and domain adaptation.

    documents -> tokens of each, and an end token after it -> one long row -> blocks of equal length

No padding: a block may hold parts of several documents. What is left after the last whole block is
dropped, and told. The row is written once, as a .npy file of uint16 or uint32 that is read through
a memory map, so memory stays flat however many files there are. Its name is a hash of the files'
contents, of the tokenizer, and of how the files are cut into documents; a second run finds it.

    tokens/files.json            hashes of the files seen, so that unchanged ones are not read again
    tokens/KEY.npy               the row
    tokens/KEY.held_out.npy      that of the held-out documents, where a fraction is held out
    tokens/KEY.json              counts; written last, so a row that has one is whole
"""

from __future__ import annotations

import codecs
import contextlib
import glob
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from cl_fast.errors import OutputError, RecipeError

__all__ = [
    "Blocks",
    "Count",
    "Row",
    "Texts",
    "count_tokens",
    "documents",
    "find_files",
    "pack",
    "stacked",
]

Documents = Literal["file", "line", "paragraph"]

SUFFIXES = (".txt", ".jsonl", ".parquet")
PIECE = 1 << 16
"""Bytes after which a document is handed to the tokenizer in pieces."""
_BATCH = 1 << 20
"""Characters that are tokenised together."""
_FORMAT = "cl_fast tokens v1"
_POLL = 0.2


@dataclass(frozen=True)
class Texts:
    """Files, and how they are cut into documents.

    Attributes:
        files: .txt, .jsonl and .parquet files, in this order.
        documents: what one document of a .txt file is: the "file", a "line", or a "paragraph",
            which ends at an empty line.
        key: the field of the text in a line of .jsonl, the column in .parquet.
    """

    files: tuple[Path, ...]
    documents: Documents = "file"
    key: str = "text"

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files)


def find_files(patterns: Sequence[str], where: str) -> tuple[Path, ...]:
    """The files that names and globs (`*`, `?`, `[...]`, `**`) stand for; each glob in order.

    Raises:
        RecipeError: a file is missing, a glob matches nothing, a kind of file is not known, or a
            file is named twice. `where` is the key of the plan.
    """
    found: dict[Path, str] = {}
    for i, pattern in enumerate(patterns):
        at = f"{where}[{i}]"
        if glob.has_magic(pattern):
            names = glob.glob(pattern, recursive=True)  # noqa: PTH207 (may be absolute)
            matches = sorted(path for path in map(Path, names) if path.is_file())
            if not matches:
                raise RecipeError(f"{at}: the pattern {pattern!r} matches no file in {Path.cwd()}")
        else:
            path = Path(pattern).expanduser()
            if path.is_dir():
                raise RecipeError(f"{at}: {pattern} is a folder; write {pattern.rstrip('/')}/*.txt")
            if not path.is_file():
                raise RecipeError(f"{at}: there is no file {pattern} in {Path.cwd()}")
            matches = [path]
        for path in matches:
            if path.suffix not in SUFFIXES:
                raise RecipeError(
                    f"{at}: {path} is of no known kind; known are {', '.join(SUFFIXES)}"
                )
            if path in found:
                raise RecipeError(f"{at}: {path} is already there, by {found[path]!r}")
            found[path] = pattern
    return tuple(found)


# --- documents ---------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """Of a document; `read` bytes of the file were read since the piece before."""

    text: str
    first: bool
    last: bool
    read: int


def documents(texts: Texts) -> Iterator[str]:
    """The documents of all files, one after the other; a very long one in parts of about 64 kB."""
    for path in texts.files:
        for piece in _pieces(path, texts):
            if piece.text.strip():
                yield piece.text


def _pieces(path: Path, texts: Texts) -> Iterator[_Piece]:
    if path.suffix == ".parquet":
        return _rows_of_parquet(path, texts.key)
    lines = _lines(path)
    if path.suffix == ".jsonl":
        return _objects(lines, path, texts.key)
    if texts.documents == "line":
        return (_Piece(line.rstrip("\r\n"), True, True, read) for line, read in lines)
    if texts.documents == "paragraph":
        return _paragraphs(lines)
    return _whole(lines)


def _lines(path: Path) -> Iterator[tuple[str, int]]:
    """Lines with their ends, and how many bytes they have in the file."""
    offset = 0
    with path.open("rb") as file:
        for raw in file:
            if not offset and raw.startswith(codecs.BOM_UTF8):
                text, skipped = raw[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
            else:
                text, skipped = raw, 0
            try:
                yield text.decode("utf-8"), len(raw)
            except UnicodeDecodeError as error:
                at = offset + skipped + error.start
                raise RecipeError(
                    f"{path}: the byte 0x{text[error.start]:02x} at offset {at} is not UTF-8 "
                    f"({error.reason}); convert the file (iconv -t UTF-8) or leave it out"
                ) from None
            offset += len(raw)


def _objects(lines: Iterator[tuple[str, int]], path: Path, key: str) -> Iterator[_Piece]:
    for number, (line, read) in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise RecipeError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(value, Mapping) or not isinstance(value.get(key), str):
            keys = sorted(value) if isinstance(value, Mapping) else type(value).__name__
            raise RecipeError(
                f"{path}, line {number}: has no text under {key!r} (it has {keys}); "
                "say with text_key where it is"
            )
        yield _Piece(value[key], True, True, read)


def _rows_of_parquet(path: Path, key: str) -> Iterator[_Piece]:
    try:
        import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise RecipeError(f"{path}: reading .parquet needs pyarrow: pip install pyarrow") from None
    try:
        file = pq.ParquetFile(path)
    except Exception as error:
        raise RecipeError(f"{path}: not a .parquet file ({error})") from None
    if key not in file.schema_arrow.names:
        raise RecipeError(
            f"{path}: has no column {key!r} (it has {file.schema_arrow.names}); say with text_key "
            "where the text is"
        )
    size, rows, done = path.stat().st_size, max(1, file.metadata.num_rows), 0
    for batch in file.iter_batches(batch_size=256, columns=[key]):
        for text in batch.column(0).to_pylist():
            if not isinstance(text, str):
                raise RecipeError(f"{path}, row {done}: {key!r} is {type(text).__name__}, no text")
            yield _Piece(text, True, True, size * (done + 1) // rows - size * done // rows)
            done += 1


def _paragraphs(lines: Iterator[tuple[str, int]]) -> Iterator[_Piece]:
    part: list[str] = []
    read = 0
    for line, size in lines:
        read += size
        if line.strip():
            part.append(line)
        elif part:
            yield _Piece("".join(part).rstrip("\r\n"), True, True, read)
            part, read = [], 0
    if part:
        yield _Piece("".join(part).rstrip("\r\n"), True, True, read)


def _whole(lines: Iterator[tuple[str, int]]) -> Iterator[_Piece]:
    """A file in pieces of about 64 kB, cut before a line that begins with a letter or digit,
    where tokenizers cut too."""
    part: list[str] = []
    read, first = 0, True
    for line, size in lines:
        if read >= PIECE and line[:1].isalnum():
            yield _Piece("".join(part), first, False, read)
            part, read, first = [], 0, False
        part.append(line)
        read += size
    yield _Piece("".join(part), first, True, read)


# --- tokens ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Tokens of some texts on disk.

    Attributes:
        path: the .npy file.
        tokens: how many, end tokens included.
        documents: how many.
        read: bytes of the files.
        seconds: that packing took, when it was done.
        begins, ends: the tokens that were put around each document; None for none.
        found: whether an earlier call had packed them.
    """

    path: Path
    tokens: int
    documents: int
    read: int
    seconds: float
    begins: int | None
    ends: int
    found: bool = field(default=False, compare=False)


def end_token(tokenizer: Any) -> int:
    """Raises RecipeError where a tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            "tokenizer: has no end token (eos_token), which goes after each document; set one and "
            "save it again: tokenizer.eos_token = '</s>'; tokenizer.save_pretrained(folder)"
        )
    return int(tokenizer.eos_token_id)


def begin_token(tokenizer: Any, bos: bool) -> int | None:
    """Raises RecipeError where one is asked for and a tokenizer has none."""
    if bos and tokenizer.bos_token_id is None:
        raise RecipeError("bos: the tokenizer has no begin token (bos_token); leave bos out")
    return int(tokenizer.bos_token_id) if bos else None


def fingerprint(tokenizer: Any) -> str:
    """A hash of what a tokenizer makes of texts."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is not None:
        text = inner.to_str()
    else:
        text = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _tokenized(
    texts: Texts, tokenizer: Any, budget: Callable[[Path], float], told: Callable[[int], Any]
) -> Iterator[tuple[list[int], bool, bool]]:
    """Tokens of pieces, and whether they are the first and the last of a document."""

    def encoded(batch: list[_Piece]) -> Iterator[tuple[list[int], bool, bool]]:
        if batch:
            ids = tokenizer(
                [piece.text for piece in batch],
                add_special_tokens=False,
                return_attention_mask=False,
                truncation=False,
                padding=False,
                verbose=False,
            )["input_ids"]
            for piece, mine in zip(batch, ids, strict=True):
                yield mine, piece.first, piece.last
            told(sum(piece.read for piece in batch))

    batch: list[_Piece] = []
    characters = 0
    for path in texts.files:
        read = 0
        for piece in _pieces(path, texts):
            read += piece.read
            if piece.first and piece.last and not piece.text.strip():
                told(piece.read)
                continue
            batch.append(piece)
            characters += len(piece.text)
            if characters >= _BATCH:
                yield from encoded(batch)
                batch, characters = [], 0
            if read >= budget(path):
                break
    yield from encoded(batch)


@dataclass(frozen=True)
class Count:
    """What packing would give.

    Attributes:
        tokens: of what is trained on.
        held_out: of what is held out.
        exact: whether all was read; else both are estimates.
    """

    tokens: int
    held_out: int
    exact: bool


def count_tokens(
    texts: Texts,
    tokenizer: Any,
    *,
    held_out: float = 0.0,
    bos: bool = False,
    sample: int = 16 << 20,
    name: str = "texts",
) -> Count:
    """The tokens that `pack` would give, estimated beyond `sample` bytes of files from the
    beginning of each. Writes nothing.

    Raises:
        RecipeError: as `pack`, of what was read; `name` is that of the texts, in messages.
    """
    end_token(tokenizer)
    part, extra = _fraction(held_out), 1 + (begin_token(tokenizer, bos) is not None)
    size, read, number = texts.size, 0, 0
    exact, counts, documents = size <= sample, [0, 0], [0, 0]

    def budget(path: Path) -> float:
        return float("inf") if exact else sample * path.stat().st_size / size

    def told(count: int) -> None:
        nonlocal read
        read += count

    for ids, _, last in _tokenized(texts, tokenizer, budget, told):
        to = _is_held_out(number, part)
        counts[to] += len(ids) + (extra if last else 0)
        documents[to] += last
        number += last
    if exact:
        _check_documents(documents[: 2 if part else 1], part, name, len(texts.files))
    else:
        factor = size / max(1, read)
        counts = [int(count * factor) for count in counts]
    return Count(counts[0], counts[1], exact)


def _is_held_out(document: int, part: Fraction) -> bool:
    return (document + 1) * part // 1 > document * part // 1


def pack(
    texts: Texts,
    tokenizer: Any,
    folder: str | os.PathLike[str],
    *,
    held_out: float = 0.0,
    bos: bool = False,
    vocabulary: int | None = None,
    name: str = "texts",
    quiet: bool = False,
    waits: bool = False,
) -> tuple[Row, Row | None]:
    """The tokens of all documents on disk, packed now, or by an earlier call.

    Args:
        texts: what is packed.
        tokenizer: of transformers.
        folder: of the files.
        held_out: the part of the documents, evenly spread, that go into a second row: document n
            does where floor((n + 1) f) > floor(n f).
        bos: the tokenizer's begin token goes before each document.
        vocabulary: rows of the model's embedding, which no token may exceed.
        name: of the texts, in messages.
        quiet: no progress bar.
        waits: packs nothing, and waits until another process has: for all ranks but the first.

    Returns:
        The row, and that of the held-out documents.

    Raises:
        RecipeError: a text cannot be read (file and offset, or line, are named), no document is
            there, or a fraction of too few is to be held out; the tokenizer has no end token, or
            tokens that the model lacks.
        OutputError: the folder cannot be written, or a file not be opened.
    """
    home = Path(folder)
    eos, begins = end_token(tokenizer), begin_token(tokenizer, bos)
    part = _fraction(held_out)
    try:
        if not waits:
            home.mkdir(parents=True, exist_ok=True)
        contents = _contents(texts.files, home, waits=waits)
        what = {
            "format": _FORMAT,
            "files": [[path.suffix, contents[path]] for path in texts.files],
            "documents": texts.documents,
            "key": texts.key,
            "tokenizer": fingerprint(tokenizer),
            "eos": eos,
            "bos": begins,
            "held_out": str(part),
        }
        key = blake2b(json.dumps(what).encode(), digest_size=12).hexdigest()
        told = home / f"{key}.json"
        while waits and not told.is_file():
            time.sleep(_POLL)
        found = told.is_file()
        if not found:
            rows = _write(
                texts, tokenizer, home / key, part, (begins, eos), vocabulary, name, quiet
            )
            _whole_file(told, json.dumps(rows, indent=1))
        rows = json.loads(told.read_text())
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{error.filename or home}: {error.strerror or error}") from error
    kept = rows["held_out"]
    _check_vocabulary(rows["largest"], vocabulary, name)
    train = _row(home, rows["train"], found)
    return train, None if kept is None else _row(home, kept, found)


def _row(home: Path, row: Mapping[str, Any], found: bool) -> Row:
    return Row(**{**row, "path": home / row["path"], "found": found})


def _fraction(held_out: float) -> Fraction:
    part = Fraction(held_out).limit_denominator(10**6)
    if not 0 <= part < 1:
        raise RecipeError(f"held_out: a fraction must be at least 0 and below 1; got {held_out}")
    return part


def _check_vocabulary(largest: int, vocabulary: int | None, name: str) -> None:
    if vocabulary is not None and largest >= vocabulary:
        raise RecipeError(
            f"{name}: has the token {largest}, but the model only {vocabulary} embeddings: the "
            "tokenizer is of another model, or model.resize_token_embeddings was not called"
        )


def _contents(files: Sequence[Path], home: Path, *, waits: bool) -> dict[Path, str]:
    """Hashes of files; read again only where size or time of change differ."""
    memo = home / "files.json"
    while True:
        known: dict[str, list[Any]] = {}
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            known = json.loads(memo.read_text())
        found, missing = {}, []
        for path in files:
            seen, stat = known.get(str(path.resolve())), path.stat()
            if seen is not None and seen[:2] == [stat.st_size, stat.st_mtime_ns]:
                found[path] = str(seen[2])
            else:
                missing.append(path)
        if not missing:
            return found
        if waits:
            time.sleep(_POLL)
            continue
        for path in missing:
            stat = path.stat()
            digest = blake2b(digest_size=16)
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
            known[str(path.resolve())] = [stat.st_size, stat.st_mtime_ns, digest.hexdigest()]
        _whole_file(memo, json.dumps(known, indent=1))


def _whole_file(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


class _Writer:
    """A .npy file of one dimension whose length is known at the end."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self.part = path.with_name(f"{path.name}.{os.getpid()}.part")
        self.file = self.part.open("wb")
        self.head = self._header(0)
        self.tokens = self.documents = 0

    def _header(self, count: int) -> int:
        self.file.seek(0)
        content = {"descr": self.dtype.str, "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(self.file, content)
        return self.file.tell()

    def add(self, ids: Sequence[int]) -> None:
        self.file.write(np.asarray(ids, dtype=self.dtype).tobytes())
        self.tokens += len(ids)

    def close(self) -> None:
        if self._header(self.tokens) != self.head:
            raise AssertionError("the header of a .npy file has grown")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.part.replace(self.path)

    def drop(self) -> None:
        self.file.close()
        self.part.unlink(missing_ok=True)


def _write(
    texts: Texts,
    tokenizer: Any,
    base: Path,
    part: Fraction,
    around: tuple[int | None, int],
    vocabulary: int | None,
    name: str,
    quiet: bool,
) -> dict[str, Any]:
    begins, ends = around
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    writers = [_Writer(base.with_suffix(".npy"), dtype)]
    if part:
        writers.append(_Writer(base.with_name(f"{base.name}.held_out.npy"), dtype))
    began, number, largest = time.monotonic(), 0, ends
    bar = tqdm(
        total=texts.size, desc=f"packing {name}", unit="B", unit_scale=True, disable=quiet or None
    )
    try:
        with bar:
            everything = _tokenized(texts, tokenizer, lambda _: float("inf"), bar.update)
            for ids, first, last in everything:
                to = writers[_is_held_out(number, part)]
                if ids:
                    largest = max(largest, max(ids))
                    _check_vocabulary(largest, vocabulary, name)
                if first and begins is not None:
                    to.add([begins])
                to.add(ids)
                if last:
                    to.add([ends])
                    to.documents += 1
                    number += 1
        _check_documents([w.documents for w in writers], part, name, len(texts.files))
        for writer in writers:
            writer.close()
    except BaseException:
        for writer in writers:
            writer.drop()
        raise
    seconds = time.monotonic() - began
    size = texts.size
    rows = [
        asdict(Row(Path(w.path.name), w.tokens, w.documents, size, seconds, begins, ends))
        | {"path": w.path.name}
        for w in writers
    ]
    return {"train": rows[0], "held_out": rows[1] if part else None, "largest": largest}


def _check_documents(documents: Sequence[int], part: Fraction, name: str, files: int) -> None:
    number = sum(documents)
    if not number:
        raise RecipeError(f"{name}: there is no text in {files} files")
    for count, what in zip(documents, ("the rest", "that"), strict=False):
        if not count:
            raise RecipeError(
                f"{name}: held_out takes whole documents, and {float(part):g} of {number} leave "
                f"{what} none: name files to hold out, or make documents smaller (documents: "
                "paragraph or line)"
            )


# --- blocks ------------------------------------------------------------------------------------


def too_short(tokens: int, length: int) -> str:
    """What is said of a row that is shorter than a block."""
    return (
        f"has {tokens} tokens, fewer than one block of {length}: give more text, or shorter "
        "blocks (batch.length)"
    )


class Blocks(torch.utils.data.Dataset[Any]):  # type: ignore[misc]
    """The blocks of a row: `input_ids` and equal `labels`, [length], int64. Map-style; the models
    of transformers shift labels themselves.

    Args:
        row: what `pack` gave.
        length: of a block, in tokens.
        documents_apart: with `position_ids` that begin anew with each document: models of
            transformers then let no token attend to another document.

    Attributes:
        dropped: tokens after the last whole block, which are not in the dataset.

    Raises:
        ValueError: the row is shorter than one block.
    """

    def __init__(self, row: Row, length: int, *, documents_apart: bool = False) -> None:
        if row.tokens < length:
            raise ValueError(too_short(row.tokens, length))
        self.row, self.length, self.documents_apart = row, length, documents_apart
        self.dropped = row.tokens % length
        self._map: NDArray[Any] | None = None

    def __len__(self) -> int:
        return self.row.tokens // self.length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}  # a worker of a loader maps the file itself

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must lie in range({len(self)}); got {index}")
        if self._map is None:
            self._map = np.load(self.row.path, mmap_mode="r")
        ids = self._map[index * self.length : (index + 1) * self.length].astype(np.int64)
        block = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(ids.copy())}
        if self.documents_apart:
            block["position_ids"] = torch.from_numpy(_positions(ids, self.row.ends))
        return block


def _positions(ids: NDArray[np.int64], ends: int) -> NDArray[np.int64]:
    """Places of tokens in their documents, as far as the block shows them."""
    places = np.arange(len(ids))
    starts = np.zeros(len(ids), np.int64)
    after = np.flatnonzero(ids[:-1] == ends) + 1
    starts[after] = after
    return places - np.maximum.accumulate(starts)


def stacked(samples: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Blocks as a batch: they are of equal length."""
    rows = list(samples)
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
