"""The file of an edit patch, read without torch; docs/patches.md documents the format.

A patch is a safetensors file of factors: the weight of the edited layer `name` becomes

    W = W0 + U V^T        <name>.U [d, n], <name>.V [f, n]; transposed (Conv1D): W = W0 + V U^T

with one column for each fact, or for each group of facts that share a key. Keys `<name>.K` [f, n],
targets `<name>.T` [d, n] and `ridge` [n] are what the columns were fitted from; a slim patch has
none of them. The header says the rest: which facts, and which base weights it is for.

The hash of a base weight is blake2b (16 bytes, hex) over "F32 rows x columns", a line feed, and
the values as little-endian float32, row by row, as the state dict has them. bfloat16 and float16
are widened, which is exact, so a checkpoint and its copy in float32 have one hash; a float64 weight
is hashed as it is, after "F64 ...".
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_fast.checkpoints.safetensors import (
    Header,
    TensorInfo,
    build_header,
    read_header,
    read_header_of_format,
    text_metadata,
)
from cl_fast.checkpoints.safetensors import strict_json as _json
from cl_fast.errors import CheckpointError

__all__ = [
    "FORMAT",
    "VERSION",
    "PatchFile",
    "StoredLayer",
    "check_content",
    "hash_stored",
    "is_patch",
    "lay_out",
    "new_weight_hash",
    "read_patch",
    "stored_name",
]

FORMAT = "cl_fast.patch"
VERSION = 1
_PIECE = 4 << 20
_WIDE = {"BF16": "F32", "F16": "F32", "F32": "F32", "F64": "F64"}


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """One edited layer: `shape` is that of its weight as the state dict has it.

    `keys` and `targets` are None in a slim patch. `prior` names what the columns were fitted
    against.
    """

    name: str
    transposed: bool
    base_hash: str
    prior: str
    u: TensorInfo
    v: TensorInfo
    keys: TensorInfo | None
    targets: TensorInfo | None

    @property
    def weight_name(self) -> str:
        return f"{self.name}.weight"

    @property
    def shape(self) -> tuple[int, int]:
        d, f = self.u.shape[0], self.v.shape[0]
        return (f, d) if self.transposed else (d, f)

    @property
    def rank(self) -> int:
        return self.u.shape[1]


@dataclass(frozen=True, slots=True)
class PatchFile:
    """What the header of a patch file tells. The data are not read.

    Attributes:
        header: of the safetensors file.
        layers: the edited ones, in the order of the edit.
        columns: the ids of the facts of each column.
        facts: each fact as a mapping, by id.
        method, options, report: as the editor told them.
        joint: whether all columns were fitted as one.
        ridge: where the ridge of each column lies; None in a slim patch.
        content: hash of all data: blake2b, 16 bytes, hex.
    """

    header: Header
    layers: tuple[StoredLayer, ...]
    columns: tuple[tuple[str, ...], ...]
    facts: dict[str, dict[str, Any]]
    method: str
    options: dict[str, Any]
    report: dict[str, Any]
    joint: bool
    ridge: TensorInfo | None
    content: str

    @property
    def path(self) -> str:
        return self.header.path

    @property
    def slim(self) -> bool:
        """Whether keys and targets were left out."""
        return self.ridge is None


def new_weight_hash(shape: Iterable[int], dtype: str) -> hashlib.blake2b:
    """The hash of a weight, before its values: `dtype` is "F32" or "F64"."""
    start = f"{dtype} {'x'.join(map(str, shape))}\n"
    return hashlib.blake2b(start.encode(), digest_size=16)


def hash_stored(info: TensorInfo) -> str:
    """The hash of a weight that lies in a file.

    Raises:
        CheckpointError: its type is not a floating one of 16 bits or more, or it cannot be read.
    """
    if info.dtype not in _WIDE:
        raise CheckpointError(
            f"{info.path}: tensor {info.name!r} is {info.dtype}; a patch is applied to weights of "
            "float32, bfloat16, float16 or float64. Dequantise the checkpoint first"
        )
    hasher = new_weight_hash(info.shape, _WIDE[info.dtype])
    for piece in _pieces(info.path, info.offset, info.nbytes):
        hasher.update(_widened(piece, info.dtype))
    return hasher.hexdigest()


def _widened(piece: bytes, dtype: str) -> bytes:
    if dtype not in ("BF16", "F16"):
        return piece
    import numpy as np

    if dtype == "F16":
        return np.frombuffer(piece, "<f2").astype("<f4").tobytes()
    return (np.frombuffer(piece, "<u2").astype("<u4") << np.uint32(16)).astype("<u4").tobytes()


def _pieces(path: str, offset: int, nbytes: int) -> Iterator[bytes]:
    if "://" in path:
        from cl_fast.checkpoints.remote import fetch

        for start in range(0, nbytes, _PIECE):
            yield bytes(fetch(path, offset + start, min(_PIECE, nbytes - start)))
        return
    try:
        with Path(path).open("rb") as file:
            file.seek(offset)
            while nbytes:
                piece = file.read(min(_PIECE, nbytes))
                if not piece:
                    raise CheckpointError(
                        f"{path}: ended {nbytes} bytes before a tensor does; it is truncated or "
                        "was changed while it was read"
                    )
                nbytes -= len(piece)
                yield piece
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


def is_patch(path: str | os.PathLike[str]) -> bool:
    """Whether this is the file of a patch: a .safetensors file whose header says so.

    A file that cannot be read, or that is damaged, is none.
    """
    file = Path(path)
    if file.suffix != ".safetensors" or not file.is_file():
        return False
    try:
        return read_header(file).metadata.get("format") == FORMAT
    except CheckpointError:
        return False


def read_patch(path: str | os.PathLike[str]) -> PatchFile:
    """Read and check the header of a patch file.

    Raises:
        CheckpointError: there is no such file, it is damaged, it is no patch, or one of another
            version.
    """
    header = read_header_of_format(
        path, FORMAT, VERSION, kind="edit patch", give="the file that patch.save wrote"
    )
    return _Reader(header).read()


class _Reader:
    def __init__(self, header: Header) -> None:
        self._header = header
        self._metadata = header.metadata
        self._unclaimed = set(header.tensors)

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._header.path}: {what}; the patch is damaged, save it again")

    def _value(self, key: str, kind: type) -> Any:
        if key not in self._metadata:
            raise self._damaged(f"the header has no {key!r}")
        value = _json(self._metadata[key].encode(), f"{self._header.path}: {key}")
        if not isinstance(value, kind):
            raise self._damaged(f"{key!r} of the header is not of the type {kind.__name__}")
        return value

    def _tensor(self, name: str, rows: int | None, columns: int) -> TensorInfo:
        info = self._header.tensors.get(name)
        if info is None:
            raise self._damaged(f"there is no tensor {name!r}")
        self._unclaimed.discard(name)
        if info.dtype not in ("F32", "F64"):
            raise self._damaged(f"tensor {name!r} is {info.dtype}, not F32 or F64")
        fits = len(info.shape) == 2 and info.shape[1] == columns
        if not fits or rows not in (None, info.shape[0]):
            shape = f"[{'any' if rows is None else rows}, {columns}]"
            raise self._damaged(f"tensor {name!r} has the shape {list(info.shape)}, not {shape}")
        return info

    def read(self) -> PatchFile:
        columns = tuple(tuple(ids) for ids in self._value("columns", list))
        facts = self._value("facts", dict)
        joint = self._value("joint", bool)
        told = {fact for ids in columns for fact in ids}
        if told != set(facts) or (joint and not all(columns)):
            raise self._damaged("its columns and its facts do not belong together")
        slim = self._value("slim", bool)
        ridge = None
        if not slim:
            ridge = self._header.tensors.get("ridge")
            self._unclaimed.discard("ridge")
            if ridge is None or ridge.dtype != "F64" or ridge.shape != (len(columns),):
                raise self._damaged(f"there is no tensor 'ridge' of F64 [{len(columns)}]")
        layers = []
        for entry in self._value("layers", list):
            strings = ("name", "base_hash", "prior")
            if (
                not isinstance(entry, dict)
                or not all(isinstance(entry.get(key), str) for key in strings)
                or not isinstance(entry.get("transposed"), bool)
            ):
                raise self._damaged("an entry of 'layers' does not tell its name, base and prior")
            name = entry["name"]
            u = self._tensor(f"{name}.U", None, len(columns))
            v = self._tensor(f"{name}.V", None, len(columns))
            keys = targets = None
            if not slim:
                keys = self._tensor(f"{name}.K", v.shape[0], len(columns))
                targets = self._tensor(f"{name}.T", u.shape[0], len(columns))
            layers.append(
                StoredLayer(
                    name, entry["transposed"], entry["base_hash"], entry["prior"],
                    u, v, keys, targets,
                )
            )  # fmt: skip
        if not layers or len({layer.name for layer in layers}) != len(layers):
            raise self._damaged("it has no layers, or one of them twice")
        if self._unclaimed:
            raise self._damaged(f"tensor {min(self._unclaimed)!r} belongs to no layer")
        return PatchFile(
            header=self._header,
            layers=tuple(layers),
            columns=columns,
            facts=facts,
            method=self._metadata.get("method", ""),
            options=self._value("options", dict),
            report=self._value("report", dict),
            joint=joint,
            ridge=ridge,
            content=self._metadata.get("content", ""),
        )


def check_content(patch: PatchFile) -> None:
    """Read all data of a patch file once and compare them with the header's hash.

    Raises:
        CheckpointError: they are not what was saved.
    """
    header = patch.header
    hasher = hashlib.blake2b(digest_size=16)
    for piece in _pieces(header.path, header.data_start, header.file_size - header.data_start):
        hasher.update(piece)
    if hasher.hexdigest() != patch.content:
        raise CheckpointError(
            f"{header.path}: the data are not those that were saved (hash {hasher.hexdigest()}, "
            f"the header says {patch.content}); copy or save the patch again"
        )


def lay_out(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, Any]
) -> bytes:
    """The bytes of a patch file before its data: `metadata` are text, or are written as JSON.

    `tensors` (name, dtype, shape) come in the order of their data, the wider types first.
    """
    words = {"format": FORMAT, "version": str(VERSION), **text_metadata(metadata)}
    start, _, _ = build_header(tensors, words)
    return start


def stored_name(weight_name: str, tensors: Mapping[str, Any]) -> str | None:
    """What a checkpoint calls a parameter of a model: its name, or the one that ends alike.

    Checkpoints of a bare decoder lack the prefix that the model with a head gives ("transformer."),
    and others have one more.
    """
    if weight_name in tensors:
        return weight_name
    alike = [
        name
        for name in tensors
        if weight_name.endswith("." + name) or name.endswith("." + weight_name)
    ]
    return alike[0] if len(alike) == 1 else None
