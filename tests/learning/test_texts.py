"""Text files as blocks of tokens: exactly the documents' tokens, once, whatever happens."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import WORDS, gemma2, llama, tokenizer

from cl_fast.errors import RecipeError
from cl_fast.learning import texts as module
from cl_fast.learning.pretraining import documents_are_apart
from cl_fast.learning.texts import Blocks, Row, Texts, count_tokens, find_files, pack, stacked

BOS, EOS = 1, 2
IDS = {word: i + 4 for i, word in enumerate(WORDS)}


def ids(*documents: str, bos: bool = False) -> list[int]:
    """The row that documents of known words must give."""
    row: list[int] = []
    for document in documents:
        row += [BOS] if bos else []
        row += [IDS[word] for word in document.split()]
        row += [EOS]
    return row


def read(row: Row) -> list[int]:
    return [int(x) for x in np.load(row.path, mmap_mode="r")]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


LINES = ["the cat sat", "on the mat", "", "  ", "a dog ran", "under", "the tree and then"]


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("file", ["the cat sat on the mat a dog ran under the tree and then"]),
        ("line", ["the cat sat", "on the mat", "a dog ran", "under", "the tree and then"]),
        ("paragraph", ["the cat sat on the mat", "a dog ran under the tree and then"]),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bos", [False, True])
def test_a_row_is_the_documents_with_ends(
    tmp_path: Path, documents: Any, expected: list[str], end: str, bos: bool
) -> None:
    first = write(tmp_path / "a.txt", end.join(LINES))
    second = write(tmp_path / "b.txt", b"\xef\xbb\xbfcat dog" + end.encode())
    texts = Texts((first, second), documents)
    row, held = pack(texts, tokenizer(), tmp_path / "t", bos=bos, quiet=True)
    assert read(row) == ids(*expected, "cat dog", bos=bos)
    assert held is None
    assert (row.tokens, row.documents) == (len(read(row)), len(expected) + 1)
    count = count_tokens(texts, tokenizer(), bos=bos)
    assert (count.tokens, count.held_out, count.exact) == (row.tokens, 0, True)


def test_json_lines_and_parquet(tmp_path: Path) -> None:
    documents = ["the cat\nsat", "a dog", "", "the mat"]
    lines = "\n\n".join(json.dumps({"id": 3, "content": text}) for text in documents)
    first = write(tmp_path / "a.jsonl", lines)
    pq.write_table(pa.table({"content": documents, "id": [1, 2, 3, 4]}), tmp_path / "b.parquet")
    texts = Texts((first, tmp_path / "b.parquet"), key="content")
    row, _ = pack(texts, tokenizer(), tmp_path / "t", quiet=True)
    once = ids("the cat sat", "a dog", "the mat")
    assert read(row) == once + once


def test_a_large_file_is_tokenised_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pieces' tokens joined are the document's, with one end."""
    monkeypatch.setattr(module, "PIECE", 40)
    monkeypatch.setattr(module, "_BATCH", 30)
    text = "the cat sat on\n  under the mat\na dog ran\n\n" * 9
    seen: list[str] = []

    class Watching:
        eos_token_id, bos_token_id = EOS, None

        def __init__(self) -> None:
            self.inner = tokenizer()

        def __len__(self) -> int:
            return len(self.inner)

        def get_vocab(self) -> dict[str, int]:
            return dict(self.inner.get_vocab())

        def __call__(self, batch: list[str], **options: Any) -> Any:
            seen.extend(batch)
            return self.inner(batch, **options)

    row, _ = pack(Texts((write(tmp_path / "a.txt", text),)), Watching(), tmp_path, quiet=True)
    assert read(row) == ids(text)
    assert row.documents == 1
    assert "".join(seen) == text
    assert len(seen) > 5
    assert all(piece[0].isalnum() for piece in seen)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.fractions(0, Fraction(9, 10)))
def test_held_out_documents_are_evenly_spread(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], part: Fraction
) -> None:
    part = part.limit_denominator(1000)
    documents = [" ".join([WORDS[i % 12]] * (size + 1)) for i, size in enumerate(sizes)]
    folder = tmp_path_factory.mktemp("t")
    texts = Texts((write(folder / "a.txt", "\n".join(documents)),), "line")
    wanted = int(len(documents) * part)
    if part and wanted in (0, len(documents)):
        with pytest.raises(RecipeError, match="held_out takes whole documents"):
            pack(texts, tokenizer(), folder / "t", held_out=float(part), quiet=True)
        assert not list((folder / "t").glob("*.npy*"))
        return
    row, held = pack(texts, tokenizer(), folder / "t", held_out=float(part), quiet=True)
    out = [n for n in range(len(documents)) if int((n + 1) * part) > int(n * part)]
    assert read(row) == ids(*(d for n, d in enumerate(documents) if n not in out))
    assert (held is not None) == bool(part)
    count = count_tokens(texts, tokenizer(), held_out=float(part))
    assert count.tokens == row.tokens
    if held is not None:
        assert read(held) == ids(*(documents[n] for n in out))
        assert held.documents == wanted
        assert count.held_out == held.tokens


def test_packed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unchanged files are not tokenised again; what changes a row gives another one."""
    file = write(tmp_path / "a.txt", "the cat\nsat\n")
    folder = tmp_path / "t"
    first, _ = pack(Texts((file,)), tokenizer(), folder, quiet=True)
    real = module._write
    monkeypatch.setattr(module, "_write", lambda *_: pytest.fail("packed again"))
    again, _ = pack(Texts((file,)), tokenizer(), folder, quiet=True)
    assert again == first
    moved = write(tmp_path / "b.txt", "the cat\nsat\n")
    assert pack(Texts((moved,)), tokenizer(), folder, quiet=True)[0] == first
    monkeypatch.setattr(module, "_write", real)
    other = tokenizer()
    other.eos_token = "<unk>"
    keys = {first.path}
    keys.add(pack(Texts((file,), "line"), tokenizer(), folder, quiet=True)[0].path)
    keys.add(pack(Texts((file,)), tokenizer(), folder, bos=True, quiet=True)[0].path)
    keys.add(pack(Texts((file,)), other, folder, quiet=True)[0].path)
    write(file, "the cat\nran\n")
    changed, _ = pack(Texts((file,)), tokenizer(), folder, quiet=True)
    assert read(changed) == ids("the cat ran")
    assert len(keys | {changed.path}) == 5


def test_a_failure_leaves_nothing_that_counts(tmp_path: Path) -> None:
    """Then the same call packs all of it."""
    file = write(tmp_path / "a.txt", "the cat\n" + "\xff")
    write(file, b"the cat\nsat \xff\n")
    with pytest.raises(RecipeError):
        pack(Texts((file,), "line"), tokenizer(), tmp_path / "t", quiet=True)
    assert [p.name for p in (tmp_path / "t").iterdir()] == ["files.json"]
    write(file, "the cat\nsat\n")
    row, _ = pack(Texts((file,), "line"), tokenizer(), tmp_path / "t", quiet=True)
    assert read(row) == ids("the cat", "sat")


def test_other_processes_wait_for_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_POLL", 0.005)
    texts = Texts((write(tmp_path / "a.txt", "the cat sat"),))
    found: list[Any] = []
    waiting = threading.Thread(
        target=lambda: found.append(pack(texts, tokenizer(), tmp_path / "t", waits=True))
    )
    waiting.start()
    assert not (tmp_path / "t").exists()
    mine = pack(texts, tokenizer(), tmp_path / "t", quiet=True)
    waiting.join(10)
    assert found == [mine]


def test_beyond_a_sample_counts_are_estimates(tmp_path: Path) -> None:
    files = tuple(write(tmp_path / f"{i}.txt", "the cat sat\n" * 4000) for i in range(3))
    count = count_tokens(Texts(files, "line"), tokenizer(), sample=30_000)
    assert not count.exact
    assert count.tokens == pytest.approx(3 * 4000 * 4, rel=0.01)


# --- blocks ------------------------------------------------------------------------------------


def blocks_of(tmp_path: Path, text: str, length: int, **options: Any) -> Blocks:
    file = write(tmp_path / "a.txt", text)
    row, _ = pack(Texts((file,), "line"), tokenizer(), tmp_path / "t", quiet=True)
    return Blocks(row, length, **options)


def test_blocks_are_the_row_cut(tmp_path: Path) -> None:
    text = "\n".join(["the cat sat on", "a dog", "under the tree", "and"])
    blocks = blocks_of(tmp_path, text, 4)
    row = ids(*text.split("\n"))
    assert (len(blocks), blocks.dropped) == (3, len(row) - 12)
    assert torch.cat([blocks[i]["input_ids"] for i in range(3)]).tolist() == row[:12]
    assert all(torch.equal(blocks[i]["labels"], blocks[i]["input_ids"]) for i in range(3))
    assert blocks[0]["input_ids"].dtype == torch.int64
    for wrong in (-1, 3):
        with pytest.raises(IndexError, match=r"range\(3\)"):
            blocks[wrong]
    copy = pickle.loads(pickle.dumps(blocks))
    assert torch.equal(copy[2]["input_ids"], blocks[2]["input_ids"])
    with pytest.raises(ValueError, match="fewer than one block of 400"):
        blocks_of(tmp_path, text, 400)


def test_positions_begin_with_each_document(tmp_path: Path) -> None:
    blocks = blocks_of(tmp_path, "the cat sat on\na\nunder the tree and", 7, documents_apart=True)
    assert blocks[0]["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert blocks[0]["input_ids"][4] == EOS
    text = "the cat sat on\na\nunder the tree and then the mat"
    later = blocks_of(tmp_path, text, 6, documents_apart=True)[1]
    assert later["position_ids"].tolist() == [0, 0, 1, 2, 3, 4]  # from the block's start


@pytest.mark.parametrize("make", [llama, gemma2])
def test_documents_apart_are_as_if_alone(tmp_path: Path, make: Callable[[], Any]) -> None:
    """Each document's logits in a block are those of the document on its own."""
    documents = ["the cat sat on", "a", "under the tree and"]
    blocks = blocks_of(tmp_path, "\n".join(documents), 12, documents_apart=True)
    model = make().double().eval()
    assert documents_are_apart(model)
    batch = stacked([blocks[0], blocks[0]])
    model.config.use_cache = False  # as the Trainer has it
    with torch.no_grad():
        both = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        alone = [model(input_ids=torch.tensor([ids(d)])).logits[0] for d in documents]
        mixed = model(input_ids=batch["input_ids"]).logits
    torch.testing.assert_close(both[1], torch.cat(alone), rtol=1e-12, atol=1e-12)
    assert (mixed[0] - both[0]).abs().max() > 1e-3


def test_a_model_that_ignores_positions_is_found_out() -> None:
    model = llama()
    forward = model.forward
    model.forward = lambda position_ids=None, **given: forward(**given)
    assert not documents_are_apart(model)


# --- what is refused ---------------------------------------------------------------------------


def _without(token: str) -> Any:
    made = tokenizer()
    setattr(made, token, None)
    return made


@pytest.mark.parametrize(
    ("name", "content", "options", "words"),
    [
        ("a.txt", b"the cat\nsat \xff on", {}, r"a.txt: the byte 0xff at offset 12 is not UTF-8"),
        ("a.txt", b"\xef\xbb\xbfa\xff", {}, r"at offset 4 is"),
        ("a.txt", b" \n\n", {}, "there is no text in 1 files"),
        ("a.jsonl", b'{"text": "a"}\n{"text', {}, r"a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"content": "a"}', {}, r"line 1: has no text under 'text' \(it has \['con"),
        ("a.jsonl", b'{"text": 3}', {}, "line 1: has no text under 'text'"),
        ("a.jsonl", b'["text"]', {}, r"line 1: has no text under 'text' \(it has list"),
        ("a.parquet", b"PAR2", {}, "a.parquet: not a .parquet file"),
        ("a.txt", b"the cat", {"tokenizer": _without("eos_token")}, "has no end token"),
        ("a.txt", b"the cat", {"tokenizer": _without("bos_token"), "bos": True}, "no begin token"),
        ("a.txt", b"the cat", {"vocabulary": 5}, "has the token 6, but the model only 5 embedd"),
        (
            "a.txt",
            b"the cat",
            {"held_out": 0.5},
            "held_out takes whole documents, and 0.5 of 1 leave that none",
        ),
        ("a.txt", b"the cat", {"held_out": 1.0}, "at least 0 and below 1"),
    ],
)
def test_bad_texts(
    tmp_path: Path, name: str, content: bytes, options: dict[str, Any], words: str
) -> None:
    options = {"tokenizer": tokenizer(), "quiet": True, **options}
    texts = Texts((write(tmp_path / name, content),))
    with pytest.raises(RecipeError, match=words):
        pack(texts, folder=tmp_path / "t", **options)
    assert not list((tmp_path / "t").glob("*.npy*"))


def test_parquet_says_which_columns_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["a"], "n": [1]}), tmp_path / "a.parquet")
    for key, words in (("text", r"no column 'text' \(it has \['content', 'n'\]\)"), ("n", "row 0")):
        with pytest.raises(RecipeError, match=words):
            pack(Texts((tmp_path / "a.parquet",), key=key), tokenizer(), tmp_path, quiet=True)


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.txt", "c.jsonl", "d.bin"):
        write(tmp_path / name, "x")
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "e.txt", "x")
    assert list(map(str, find_files(["c.jsonl", "*.txt"], "texts"))) == [
        "c.jsonl",
        "a.txt",
        "b.txt",
    ]
    assert [p.name for p in find_files([f"{tmp_path}/**/e.txt"], "texts")] == ["e.txt"]
    for names, words in (
        (["a.txt", "none.txt"], r"texts\[1\]: there is no file none.txt in "),
        (["*.csv"], r"texts\[0\]: the pattern '\*.csv' matches no file in "),
        (["in"], r"texts\[0\]: in is a folder; write in/\*.txt"),
        (["d.bin"], "d.bin is of no known kind; known are .txt, .jsonl, .parquet"),
        (["a.txt", "*.txt"], r"texts\[1\]: a.txt is already there, by 'a.txt'"),
    ):
        with pytest.raises(RecipeError, match=words):
            find_files(names, "texts")
