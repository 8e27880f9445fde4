"""The file of a packed delta, read without torch; docs/delta-format.md documents it byte for byte.

A packed delta is what DARE left of a finetuned model: of every tensor that differs from the base
the elements that were kept, and nothing of the others. Which elements they are follows from the
random stream (docs/random-stream.md): element i was kept where its draw u(i) < T. So the delta of
a tensor is

    y_i = keep_i ? (float32(x_p) - float32(base_i)) * float32(r) : 0,    x_p the p-th kept value

The file is a safetensors file with these tensors:

    offsets/NAME   I64 [ceil(n / 65536) + 1]   kept elements before each block of 65536, then all
    kept/NAME      the finetuned tensor's type, [kept]
    whole/NAME     a tensor that is not of a floating type and differs, as it is
    seal           U8 [16]: BLAKE2b of all bytes of the file before its data

The header tells the rest: seed and names of the stream, T, and for every tensor of the model its
shape, r, the CRC-64 of what is stored and of the base's bytes. A tensor that equals the base's is
there by name only. So every byte of the file, and of the base, is covered by a checksum.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from cl_fast.checkpoints.safetensors import (
    DTYPE_BITS,
    Header,
    TensorInfo,
    build_header,
    read_header,
    read_header_of_format,
    text_metadata,
)
from cl_fast.checkpoints.safetensors import strict_json as _json
from cl_fast.errors import CheckpointError
from cl_fast.ops.policy import DTYPES
from cl_fast.ops.streams import stream_key

__all__ = [
    "BLOCK",
    "FORMAT",
    "NAME",
    "VERSION",
    "DeltaFile",
    "DeltaTensor",
    "blocks_of",
    "delta_path",
    "header_of",
    "is_delta",
    "read_delta",
]

FORMAT = "cl_fast.delta"
VERSION = 1
BLOCK = 65_536
"""Elements per entry of the offsets."""
NAME = "delta.safetensors"
"""The file in a folder that holds a delta and what travels with it."""
STREAM = "cl_fast philox v1"
_WHOLE = ("model.safetensors", "model.safetensors.index.json")
RESCALES = ("l1", "keep_rate", "none")

Kind = Literal["kept", "whole", "same"]


def blocks_of(numel: int) -> int:
    """Entries of the offsets of a tensor."""
    return -(-numel // BLOCK) + 1


@dataclass(frozen=True, slots=True)
class DeltaTensor:
    """One tensor of the finetuned model, as the header tells it.

    Attributes:
        kind: "kept": its kept values are stored; "whole": all of it; "same": nothing, since it
            equals the base's.
        dtype, shape: of the finetuned tensor.
        base_dtype, base_crc: of the base's tensor: its type, and CRC-64/NVME of its bytes.
        key, factor: of the stream; r. Without meaning unless kind is "kept".
        values, values_crc: where what is stored lies, and its CRC; None for "same".
        offsets, offsets_crc: likewise; None unless kind is "kept".
    """

    name: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    base_dtype: str
    base_crc: int
    key: int
    factor: float
    values: TensorInfo | None
    values_crc: int
    offsets: TensorInfo | None
    offsets_crc: int

    @property
    def numel(self) -> int:
        """Elements of the dense tensor."""
        return prod(self.shape)

    @property
    def kept(self) -> int:
        """Elements that are stored."""
        return 0 if self.values is None else self.values.numel


@dataclass(frozen=True, slots=True)
class DeltaFile:
    """What the header of a packed delta tells. The data are not read.

    Attributes:
        path: what was named: the file, or the folder that holds it.
        header: of the safetensors file.
        tensors: every tensor of the finetuned model, by name.
        seed, model: of the random stream.
        drop_rate: as it was asked for; threshold: T, of 2**32, which is what counts.
        rescale: "l1", "keep_rate" or "none": how r was chosen.
        cl_fast: the version that wrote it.
    """

    path: Path
    header: Header
    tensors: dict[str, DeltaTensor]
    seed: int
    model: str
    drop_rate: float
    threshold: int
    rescale: str
    cl_fast: str

    @property
    def density(self) -> float:
        """The fraction kept, exactly T / 2**32."""
        return self.threshold / 2.0**32


def delta_path(path: str | os.PathLike[str]) -> Path:
    """The file of a delta: `path` itself, or delta.safetensors in it."""
    where = Path(path)
    return where / NAME if where.is_dir() else where


def is_delta(path: str | os.PathLike[str]) -> bool:
    """Whether this is a packed delta: a file whose header says so, or a folder with one.

    What is called one (NAME.delta.safetensors, a folder with delta.safetensors) and cannot be read
    is taken for one, so that opening it tells of its damage.
    """
    where = Path(path)
    if where.is_dir() and any((where / name).exists() for name in _WHOLE):
        return False
    file = delta_path(where)
    if file.suffix != ".safetensors" or not file.is_file():
        return False
    try:
        words = read_header(file).metadata
    except CheckpointError:
        return where.is_dir() or where.name.endswith(f".{NAME}")
    return words.get("format") == FORMAT or {"stream", "threshold", "block"} <= words.keys()


def header_of(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, Any],
    *,
    size: int = 0,
) -> bytes:
    """The bytes of a delta file before its data, padded to at least `size` bytes.

    `tensors` (name, dtype, shape) come in the order of their data; `metadata` are text, or are
    written as JSON.
    """
    words = {"format": FORMAT, "version": str(VERSION), **text_metadata(metadata)}
    start, _, _ = build_header(tensors, words)
    body = start[8:] + b" " * max(0, size - len(start))
    return len(body).to_bytes(8, "little") + body


def read_delta(path: str | os.PathLike[str]) -> DeltaFile:
    """Read and check the header of a packed delta.

    Args:
        path: the file, or the folder that `pack_delta` made.

    Raises:
        CheckpointError: there is no such file, it is no packed delta, one of another version, or
            its header is damaged.
    """
    header = read_header_of_format(
        delta_path(path),
        FORMAT,
        VERSION,
        kind="packed delta",
        give="what cl-fast delta pack wrote",
    )
    return _Reader(Path(path), header).read()


class _Reader:
    def __init__(self, path: Path, header: Header) -> None:
        self._path = path
        self._header = header
        self._unclaimed = set(header.tensors)

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._header.path}: {what}; the delta is damaged, copy or pack it again"
        )

    def _text(self, key: str) -> str:
        if key not in self._header.metadata:
            raise self._damaged(f"the header has no {key!r}")
        return self._header.metadata[key]

    def _number(self, key: str, least: int, end: int) -> int:
        text = self._text(key)
        if not text.isascii() or not text.isdigit() or not least <= int(text) < end:
            raise self._damaged(f"{key!r} of the header is {text!r}")
        return int(text)

    def _stored(self, name: str, dtype: str, shape: tuple[int, ...] | None) -> TensorInfo:
        info = self._header.tensors.get(name)
        if info is None:
            raise self._damaged(f"there is no tensor {name!r}")
        self._unclaimed.discard(name)
        if info.dtype != dtype or (len(info.shape) != 1 if shape is None else info.shape != shape):
            wanted = "any" if shape is None else list(shape)
            raise self._damaged(
                f"tensor {name!r} is {info.dtype} {list(info.shape)}, not {dtype} {wanted}"
            )
        return info

    def _check_seal(self) -> None:
        info = self._stored("seal", "U8", (16,))
        with Path(info.path).open("rb") as file:
            file.seek(info.offset)
            seal = file.read(info.nbytes).hex()
        if seal != self._header.digest:
            raise self._damaged(
                f"the header is not the one that was written (hash {self._header.digest}, the "
                f"seal says {seal})"
            )

    def read(self) -> DeltaFile:
        self._check_seal()
        seed = self._text("seed")
        if not seed.removeprefix("-").isdigit():
            raise self._damaged(f"'seed' of the header is {seed!r}")
        if self._text("stream") != STREAM or self._text("block") != str(BLOCK):
            raise self._damaged(
                f"its stream is {self._text('stream')!r} in blocks of {self._text('block')}, "
                f"this version reads {STREAM!r} in blocks of {BLOCK}"
            )
        threshold = self._number("threshold", 1, 1 << 32)
        model, rescale = self._text("model"), self._text("rescale")
        try:
            drop_rate = float(self._text("drop_rate"))
        except ValueError:
            drop_rate = math.nan
        if not 0.0 < drop_rate < 1.0 or rescale not in RESCALES:
            raise self._damaged(
                f"its drop rate is {self._text('drop_rate')!r} and its rescale {rescale!r}"
            )
        entries = _json(self._text("tensors").encode(), f"{self._header.path}: tensors")
        if not isinstance(entries, dict) or not entries:
            raise self._damaged("the header lists no tensors")
        tensors = {
            name: self._tensor(name, entry, int(seed), model) for name, entry in entries.items()
        }
        if self._unclaimed:
            raise self._damaged(f"tensor {min(self._unclaimed)!r} belongs to no tensor of a model")
        return DeltaFile(
            path=self._path,
            header=self._header,
            tensors=tensors,
            seed=int(seed),
            model=model,
            drop_rate=drop_rate,
            threshold=threshold,
            rescale=rescale,
            cl_fast=self._header.metadata.get("cl_fast", "unknown"),
        )

    def _tensor(self, name: str, entry: Any, seed: int, model: str) -> DeltaTensor:
        wrong = self._damaged(f"the header's entry of tensor {name!r} is not complete")
        if not isinstance(entry, dict):
            raise wrong
        kind, dtype, shape = entry.get("kind"), entry.get("dtype"), entry.get("shape")
        base_dtype, base_crc = entry.get("base_dtype"), _crc(entry.get("base_crc64"))
        if (
            kind not in ("kept", "whole", "same")
            or dtype not in DTYPE_BITS
            or base_dtype not in DTYPE_BITS
            or not isinstance(shape, list)
            or not all(type(extent) is int and extent >= 0 for extent in shape)
            or base_crc is None
        ):
            raise wrong
        values = offsets = None
        values_crc = offsets_crc = key = 0
        factor = 1.0
        if kind == "kept":
            found = [_crc(entry.get(word)) for word in ("key", "crc64", "offsets_crc64")]
            told = entry.get("factor")
            if (
                None in found
                or not isinstance(told, float)
                or not 0.0 < told < 2.0**128
                or dtype not in DTYPES
                or base_dtype not in DTYPES
            ):
                raise wrong
            factor = told
            key, values_crc, offsets_crc = (number for number in found if number is not None)
            if key != stream_key(seed, model, name):
                raise self._damaged(f"the key of tensor {name!r} is not that of its stream")
            values = self._stored(f"kept/{name}", dtype, None)
            offsets = self._stored(f"offsets/{name}", "I64", (blocks_of(prod(shape)),))
            if values.numel > prod(shape):
                raise self._damaged(f"tensor {name!r} keeps more elements than it has")
        elif kind == "whole":
            crc = _crc(entry.get("crc64"))
            if crc is None:
                raise wrong
            values, values_crc = self._stored(f"whole/{name}", dtype, tuple(shape)), crc
        return DeltaTensor(
            name=name,
            kind=kind,
            dtype=dtype,
            shape=tuple(shape),
            base_dtype=base_dtype,
            base_crc=base_crc,
            key=key,
            factor=factor,
            values=values,
            values_crc=values_crc,
            offsets=offsets,
            offsets_crc=offsets_crc,
        )


def _crc(text: Any) -> int | None:
    """A number of 64 bits as 16 hexadecimal digits."""
    if not isinstance(text, str) or len(text) != 16 or text.strip("0123456789abcdef"):
        return None
    return int(text, 16)
