"""The header reader: agrees with the safetensors package, and names every fault."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import TINY, header_of, write_file

from cl_fast.checkpoints.safetensors import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    build_header,
    parse_header,
    read_header,
    tensor_nbytes,
)
from cl_fast.errors import CheckpointError, ClFastError


def raw(header: Any, data: int = 0, pad: int = 0) -> bytes:
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    body += b" " * pad
    return struct.pack("<Q", len(body)) + body + bytes(data)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> Any:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def test_a_written_file_is_read_back(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.safetensors", TINY)
    header = read_header(path)
    assert {n: (t.dtype, t.shape) for n, t in header.tensors.items()} == TINY
    assert list(header.tensors) == list(TINY)
    assert header.metadata == {"format": "pt"}
    assert header.file_size == path.stat().st_size
    first = header.tensors["model.embed_tokens.weight"]
    assert (first.offset, first.nbytes, first.numel) == (header.data_start, 80, 40)
    last = list(header.tensors.values())[-1]
    assert last.offset + last.nbytes == header.file_size


def test_agrees_with_the_package(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    package = pytest.importorskip("safetensors.torch")
    tensors = {
        "a": torch.zeros(3, 5, dtype=torch.bfloat16),
        "b": torch.zeros((), dtype=torch.float32),
        "c": torch.zeros(0, 4, dtype=torch.float16),
        "d": torch.arange(7),
        "é ü": torch.zeros(3, dtype=torch.float8_e4m3fn),
        "f": torch.zeros(3, dtype=torch.bool),
    }
    path = tmp_path / "x.safetensors"
    package.save_file(tensors, path, metadata={"k": "v"})
    header = read_header(path)
    content = path.read_bytes()
    assert header.metadata == {"k": "v"}
    for name, tensor in tensors.items():
        info = header.tensors[name]
        assert info.shape == tuple(tensor.shape)
        stored = content[info.offset : info.offset + info.nbytes]
        assert stored == bytes(tensor.reshape(-1).view(torch.uint8).tolist())


def test_built_headers_are_read_by_the_package(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors")
    pytest.importorskip("torch")
    tensors = [("w", "F32", (3,)), ("ö\n", "BF16", (2, 2)), ("s", "F16", ()), ("e", "I8", (0,))]
    header, offsets, size = build_header(tensors, {"format": "pt"})
    assert len(header) % 64 == 0
    assert offsets == [len(header), len(header) + 12, len(header) + 20, len(header) + 22]
    assert size == len(header) + 22
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + bytes(size - len(header)))
    with package.safe_open(path, "pt") as file:
        assert {n: tuple(file.get_tensor(n).shape) for n in file.keys()} == {  # noqa: SIM118
            name: shape for name, _, shape in tensors
        }
    assert {n: (t.dtype, t.shape) for n, t in read_header(path).tensors.items()} == {
        name: (dtype, shape) for name, dtype, shape in tensors
    }


def test_sub_byte_types_pack() -> None:
    assert tensor_nbytes("F4", (6,)) == 3
    header, _, size = build_header([("x", "F4", (6,))])
    tensors, _, _ = parse_header(header, size, "f")
    assert tensors["x"].nbytes == 3


def test_above_two_to_the_31(tmp_path: Path) -> None:
    path = write_file(
        tmp_path / "big.safetensors",
        {"a": ("BF16", (2**16, 2**16)), "b": ("F32", (2**32 + 1,))},
        sparse=True,
    )
    header = read_header(path)
    assert header.tensors["a"].numel == 2**32
    assert header.tensors["b"].offset == header.data_start + 2**33
    assert header.tensors["b"].nbytes == 4 * (2**32 + 1)


GAP = {"a": entry(), "b": entry(offsets=(12, 20))}
OVERLAP = {"a": entry(), "b": entry(offsets=(4, 12))}

BAD = [
    pytest.param(b"", "too short", id="empty"),
    pytest.param(b"\x02\0\0", "too short", id="seven bytes"),
    pytest.param(struct.pack("<Q", 50) + b"{}", "beyond the end", id="length beyond file"),
    pytest.param(struct.pack("<Q", 2**63) + b"{}", "beyond the end", id="length 2^63"),
    pytest.param(raw(b""), "not valid UTF-8 JSON", id="no json"),
    pytest.param(raw(b"{"), "not valid UTF-8 JSON", id="half json"),
    pytest.param(raw(b'{"a": \xff}'), "not valid UTF-8 JSON", id="not utf-8"),
    pytest.param(raw(b'{"a": NaN}'), "NaN", id="nan"),
    pytest.param(raw(b"[" * 100_000), "nested too deeply", id="deep"),
    pytest.param(raw(b"[" * 100 + b"]" * 100), "must be a JSON object", id="list"),
    pytest.param(raw(b"3"), "must be a JSON object", id="number"),
    pytest.param(raw(b'{"a":' + b"9" * 5000 + b"}"), "not valid UTF-8 JSON", id="long number"),
    pytest.param(raw({"__metadata__": {"a": 1}}), "__metadata__", id="metadata number"),
    pytest.param(raw({"__metadata__": []}), "__metadata__", id="metadata list"),
    pytest.param(
        raw(b'{"w":{"dtype":"I8","shape":[],"data_offsets":[0,1]},"w":{}}', 1), "twice", id="twice"
    ),
    pytest.param(
        raw(b'{"w":{"dtype":"I8","dtype":"I8","shape":[],"data_offsets":[0,1]}}', 1),
        "'dtype' appears twice",
        id="dtype twice",
    ),
    pytest.param(raw({"w": 3}), "'w': must be described", id="entry number"),
    pytest.param(raw({"w": None}), "'w': must be described", id="entry null"),
    pytest.param(raw({"w": {"dtype": "F32", "shape": []}}), "data_offsets", id="no offsets"),
    pytest.param(raw({"w": entry(extra=1)}, 8), "unknown header field 'extra'", id="extra"),
    pytest.param(raw({"w": entry(dtype="F31")}, 8), "'w': unknown dtype 'F31'", id="dtype"),
    pytest.param(raw({"w": entry(dtype=["F32"])}, 8), "unknown dtype", id="dtype list"),
    pytest.param(raw({"w": entry(shape=2)}, 8), "'w': shape", id="shape number"),
    pytest.param(raw({"w": entry(shape=[-2])}, 8), "'w': shape", id="shape negative"),
    pytest.param(raw({"w": entry(shape=[2.0])}, 8), "'w': shape", id="shape float"),
    pytest.param(raw({"w": entry(shape=[True, 2])}, 8), "'w': shape", id="shape bool"),
    pytest.param(raw({"w": entry(shape=[1] * 1000)}, 8), "'w': shape", id="shape long"),
    pytest.param(raw({"w": entry(shape=[2**70])}, 8), "'w': shape", id="shape huge"),
    pytest.param(raw({"w": entry(offsets=[0])}, 8), "two integers", id="one offset"),
    pytest.param(raw({"w": entry(offsets=[0, "8"])}, 8), "two integers", id="offset text"),
    pytest.param(raw({"w": entry(offsets=[-8, 0])}, 8), "negative", id="offset negative"),
    pytest.param(raw({"w": entry(offsets=[8, 0])}, 8), "backwards", id="offset backwards"),
    pytest.param(raw({"w": entry(shape=[3])}, 8), "F32 of shape [3] takes 12", id="size"),
    pytest.param(raw({"w": entry("F4", [3], [0, 1])}, 1), "whole bytes", id="half byte"),
    pytest.param(raw(OVERLAP, 12), "'b': overlaps 'a' by 4", id="overlap"),
    pytest.param(raw(GAP, 20), "'b': a gap of 4 bytes after 'a'", id="gap"),
    pytest.param(raw({"a": entry(offsets=(4, 12))}, 12), "before the first", id="gap at start"),
    pytest.param(raw({"w": entry()}, 7), "truncated: tensor 'w'", id="truncated"),
    pytest.param(raw({"w": entry()}, 9), "1 bytes follow", id="rest"),
    pytest.param(raw({}, 1), "1 bytes follow", id="rest without tensors"),
    pytest.param(raw(b'{"a\\ud800":{}}'), "not valid Unicode", id="surrogate"),
    pytest.param(raw({"a\0": entry()}, 8), "NUL", id="nul"),
]


@pytest.mark.parametrize(("content", "words"), BAD)
def test_bad_headers(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_length_word_above_the_formats_bound(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(2 * MAX_HEADER_BYTES)
    with pytest.raises(CheckpointError, match="allows 100000000"):
        read_header(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p, "cannot be read"),
        (lambda p: p.mkdir() or p, "cannot be read"),
        (lambda p: Path("a\0b"), "not a path"),
        (lambda p: Path("/dev/null"), "not a regular file"),
    ],
)
def test_unreadable(tmp_path: Path, make: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_header(make(tmp_path / "x.safetensors"))


def test_trailing_spaces_are_padding() -> None:
    content = raw({"w": entry()}, 8, pad=17)
    tensors, _, start = parse_header(content, len(content), "f")
    assert tensors["w"].offset == start == len(content) - 8


def test_messages_stay_short() -> None:
    content = raw({"n" * 100_000: entry(dtype="x" * 100_000)})
    with pytest.raises(CheckpointError) as caught:
        parse_header(content, len(content), "f")
    assert len(str(caught.value)) < 1000


def test_a_header_beyond_the_bound_is_not_built() -> None:
    with pytest.raises(CheckpointError, match="smaller shards"):
        build_header([("n" * (MAX_HEADER_BYTES + 1), "I8", ())])


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BITS, "X"]) | JSONISH,
        "shape": st.lists(st.integers(-1, 2**65), max_size=3) | JSONISH,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | JSONISH,
    }
)


def parses_or_refuses(content: bytes, size: int) -> None:
    try:
        tensors, _, start = parse_header(content, size, "f")
    except CheckpointError:
        return
    # What passes is safe to read from by raw offsets.
    position = start
    for info in sorted(tensors.values(), key=lambda info: info.offset + info.nbytes):
        assert info.offset == position
        position += info.nbytes
    assert position == size


@given(st.binary(max_size=200), st.integers(0, 300))
def test_random_bytes(content: bytes, size: int) -> None:
    parses_or_refuses(content, size)


@given(st.binary(max_size=200))
def test_random_bytes_as_json(body: bytes) -> None:
    content = struct.pack("<Q", len(body)) + body
    parses_or_refuses(content, len(content))


@given(st.dictionaries(st.text(), ENTRY | JSONISH, max_size=4), st.integers(0, 64))
def test_random_headers(header: Any, data: int) -> None:
    body = json.dumps(header, allow_nan=True).encode()
    parses_or_refuses(struct.pack("<Q", len(body)) + body, 8 + len(body) + data)


@settings(max_examples=200)
@given(st.data())
def test_flipped_bytes(data: st.DataObject) -> None:
    good, nbytes = header_of(TINY)
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    parses_or_refuses(bytes(content), len(good) + nbytes)


def test_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, cl_fast.checkpoints, cl_fast.merging, cl_fast.merging.plan;"
        "heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'transformers'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_errors_are_one_family() -> None:
    assert issubclass(CheckpointError, ClFastError)
    assert issubclass(CheckpointError, ValueError)
