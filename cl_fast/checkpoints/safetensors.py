"""Reading and laying out safetensors files, without torch and without touching the weights.

A file is ``N`` (8 bytes, little endian), ``N`` bytes of JSON, then the data::

    {"__metadata__": {str: str}, name: {"dtype": str, "shape": [int], "data_offsets": [a, b]}, ...}

The offsets count from the end of the JSON and must tile the data exactly: no hole, no overlap, no
rest. Everything that a header can get wrong is an error here that names the file and the tensor,
because a kernel that reads by raw offsets must be able to trust them.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from math import prod
from pathlib import Path
from reprlib import Repr
from typing import Any, NamedTuple

from cl_fast.errors import CheckpointError

__all__ = [
    "DTYPE_BITS",
    "MAX_HEADER_BYTES",
    "Header",
    "TensorInfo",
    "build_header",
    "parse_header",
    "read_header",
    "read_header_of_format",
    "strict_json",
    "tensor_nbytes",
    "text_metadata",
]

#: Every type of the format and the bits of one element.
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
}

#: The format's own bound on the JSON part.
MAX_HEADER_BYTES = 100_000_000

#: Bounds on a shape that keep the products of hostile headers small; no real tensor comes near.
_MAX_DIMENSIONS = 64
_MAX_EXTENT = 2**63

_FIELDS = frozenset(("dtype", "shape", "data_offsets"))

#: The data of files written by cl_fast starts at a multiple of this, so that tensors do too and
#: a memory-mapped reader gets aligned rows.
DATA_ALIGNMENT = 64


_short = Repr()
_short.maxstring = _short.maxother = 200
_q = _short.repr


class TensorInfo(NamedTuple):
    """Where one tensor lies. ``offset`` is absolute in the file ``path``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: str
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header. ``digest`` is that of the header's bytes (blake2b, 16 bytes, hex).

    ``path`` may be a URL; ``version`` is then the store's tag of the file's content, if it has one.
    """

    path: str
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    file_size: int
    mtime_ns: int
    digest: str
    version: str = ""


def tensor_nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes that a tensor takes; sub-byte types are packed and round up to a whole byte."""
    return (prod(shape) * DTYPE_BITS[dtype] + 7) // 8


def strict_json(raw: bytes, where: str) -> Any:
    """Parse JSON as the formats here mean it: UTF-8, no duplicate keys, no NaN or Infinity.

    Raises:
        CheckpointError: naming ``where`` and what is wrong.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise CheckpointError(f"{where}: the key {_q(key)} appears twice")
                seen.add(key)
        return result

    def no_constant(text: str) -> None:
        raise CheckpointError(f"{where}: {text} is not a JSON value")

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except CheckpointError:
        raise
    except RecursionError:
        raise CheckpointError(f"{where}: the JSON is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid UTF-8 JSON ({error})") from None


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a safetensors file; the data is not read.

    Raises:
        CheckpointError: the file cannot be read, or anything in its header is wrong.
    """
    name = os.fspath(path)
    try:
        with Path(name).open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{name}: not a regular file")
            size = status.st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or size < 8 + length or length > MAX_HEADER_BYTES:
                raw = b""
            else:
                raw = file.read(length)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{name}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # a NUL in the path
        raise CheckpointError(f"{name!r}: not a path ({error})") from None
    tensors, metadata, data_start = parse_header(start + raw, size, name)
    digest = blake2b(start + raw, digest_size=16).hexdigest()
    return Header(name, tensors, metadata, data_start, size, status.st_mtime_ns, digest)


def read_header_of_format(
    path: str | os.PathLike[str], format: str, version: int, *, kind: str, give: str
) -> Header:
    """The header of a file in a format of cl_fast's own, which its metadata name.

    Args:
        format, version: what the metadata must say under these words; format is "cl_fast.WORD".
        kind, give: what such a file is, and what to give instead of another, for messages.

    Raises:
        CheckpointError: there is no such file, it is damaged, of another format or version.
    """
    name = os.fspath(path)
    if not Path(name).exists():
        raise CheckpointError(f"{name}: there is no such file; give {give}")
    header = read_header(name)
    said = header.metadata.get("format")
    if said != format:
        raise CheckpointError(
            f"{name}: is no {kind} (its header says format {said!r}, not {format!r}); give {give}"
        )
    found = header.metadata.get("version")
    if found != str(version):
        raise CheckpointError(
            f"{name}: has version {found!r} of the {format.removeprefix('cl_fast.')} format, this "
            f"cl_fast reads {version}; use the cl_fast that wrote it "
            f"({header.metadata.get('cl_fast', 'unknown')})"
        )
    return header


def parse_header(
    raw: bytes, file_size: int, path: str
) -> tuple[dict[str, TensorInfo], dict[str, str], int]:
    """Check the first bytes of a file of ``file_size`` bytes.

    ``raw`` starts at byte 0 and holds at least the length word and the JSON, as far as the file
    has them; ``path`` is for messages and for the result.

    Returns:
        the tensors by name, in the order of the header; the metadata; the offset of the data.

    Raises:
        CheckpointError: whatever is wrong, with the file and the tensor.
    """
    if file_size < 8 or len(raw) < 8:
        raise CheckpointError(
            f"{path}: too short for a safetensors file ({file_size} bytes, a header needs at "
            "least 10); download or save it again"
        )
    length = int.from_bytes(raw[:8], "little")
    if length > file_size - 8:
        raise CheckpointError(
            f"{path}: the header is said to have {length} bytes, which is beyond the end of the "
            f"file ({file_size} bytes); the file is truncated or not a safetensors file"
        )
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: the header is said to have {length} bytes; the format allows "
            f"{MAX_HEADER_BYTES}; not a safetensors file"
        )
    if len(raw) < 8 + length:
        raise CheckpointError(f"{path}: the header could not be read whole; read it again")
    entries = strict_json(raw[8 : 8 + length], f"{path}: header")
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: header: must be a JSON object; got {_kind(entries)}")

    metadata = entries.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise CheckpointError(f"{path}: header: __metadata__ must map strings to strings")

    data_start = 8 + length
    tensors = {name: _tensor(path, name, entry, data_start) for name, entry in entries.items()}
    _check_tiling(path, tensors, data_start, file_size)
    return tensors, metadata, data_start


class _Wrong(Exception):
    """What is wrong with one entry; the caller knows whose it is."""


def _tensor(path: str, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype, shape, begin, end = _entry(name, entry)
    except _Wrong as error:
        raise CheckpointError(f"{path}: tensor {_q(name)}: {error}") from None
    return TensorInfo(name, dtype, shape, path, data_start + begin, end - begin)


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise _Wrong("the name is not valid Unicode") from None
    if "\0" in name:
        raise _Wrong("the name holds a NUL character")
    if not isinstance(entry, dict):
        raise _Wrong(f"must be described by a JSON object; got {_kind(entry)}")
    if entry.keys() != _FIELDS:
        missing = sorted(_FIELDS - entry.keys())
        if missing:
            raise _Wrong(f"the header does not tell its {missing[0]}")
        raise _Wrong(f"unknown header field {_q(min(entry.keys() - _FIELDS))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _Wrong(f"unknown dtype {_q(dtype)}; known are {', '.join(DTYPE_BITS)}")
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_DIMENSIONS
        or not all(type(extent) is int and 0 <= extent < _MAX_EXTENT for extent in shape)
    ):
        raise _Wrong(f"shape must be a list of sizes of at least 0; got {_q(shape)}")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(x) is int and abs(x) < _MAX_EXTENT for x in offsets)
    ):
        raise _Wrong(f"data_offsets must be two integers; got {_q(offsets)}")
    begin, end = offsets
    if begin < 0 or end < begin:
        raise _Wrong(f"data_offsets {begin}..{end} are negative or run backwards")
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise _Wrong(f"{prod(shape)} elements of {dtype} do not fill whole bytes")
    if end - begin != bits // 8:
        raise _Wrong(
            f"data_offsets span {end - begin} bytes, but {dtype} of shape {shape} takes {bits // 8}"
        )
    return dtype, tuple(shape), begin, end


def _check_tiling(
    path: str, tensors: Mapping[str, TensorInfo], data_start: int, file_size: int
) -> None:
    position, previous = data_start, None
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset < position:
            raise CheckpointError(
                f"{path}: tensor {_q(info.name)}: overlaps "
                f"{_q(previous)} by {position - info.offset} bytes"
            )
        if info.offset > position:
            after = f"after {_q(previous)}" if previous is not None else "before the first tensor"
            raise CheckpointError(
                f"{path}: tensor {_q(info.name)}: a gap of {info.offset - position} bytes {after}"
            )
        position, previous = info.offset + info.nbytes, info.name
    if position > file_size:
        raise CheckpointError(
            f"{path}: truncated: tensor {_q(previous)} ends at byte {position}, the file has "
            f"{file_size}; download or save it again"
        )
    if position < file_size:
        raise CheckpointError(
            f"{path}: {file_size - position} bytes follow the last tensor; the file is damaged "
            "or was written by something else"
        )


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), "null" if value is None else "a number")


def text_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata as a header has them: text as it is, all else as JSON."""
    return {
        key: value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        for key, value in metadata.items()
    }


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> tuple[bytes, list[int], int]:
    """Lay out a file: its tensors (name, dtype, shape) follow one another in the given order.

    The JSON is padded with spaces so that the data starts at a multiple of 64 bytes. Give the
    wider types first, so that every tensor is aligned to its own element.

    Returns:
        the bytes before the data, the absolute offset of each tensor, the size of the file.

    Raises:
        CheckpointError: the header would be longer than the format allows.
    """
    entries: dict[str, Any] = {}
    if metadata:
        entries["__metadata__"] = dict(metadata)
    position, relative = 0, []
    for name, dtype, shape in tensors:
        nbytes = tensor_nbytes(dtype, shape)
        relative.append(position)
        entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        position += nbytes
    body = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-(8 + len(body)) % DATA_ALIGNMENT)
    if len(body) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"the header of an output file would have {len(body)} bytes, the format allows "
            f"{MAX_HEADER_BYTES}; write smaller shards"
        )
    header = len(body).to_bytes(8, "little") + body
    return header, [len(header) + begin for begin in relative], len(header) + position
