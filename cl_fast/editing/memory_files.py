"""The files of editors that keep facts outside the weights: safetensors with what they were for.

    write_memory(path, "fact_store", tensors, about)        whole or not at all
    tensors, about = read_memory(path, "fact_store")        checked to the last byte

`about` is JSON in the header, the hash of the data beside it: blake2b (16 bytes, hex).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_fast._version import __version__
from cl_fast.checkpoints.safetensors import build_header, read_header, strict_json
from cl_fast.checkpoints.writing import write_whole
from cl_fast.errors import CheckpointError

__all__ = ["VERSION", "read_memory", "write_memory"]

VERSION = 1
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def write_memory(
    path: str | Path, kind: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]
) -> None:
    """Writes tensors and what is to be known of them.

    Raises:
        OutputError: the file cannot be written; what was there before is still there.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    data = []
    for _, x in ordered:
        flat = x.detach().cpu().contiguous().reshape(-1)
        data.append(memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b"")
    content = hashlib.blake2b(digest_size=16)
    for part in data:
        content.update(part)
    header, _, _ = build_header(
        [(name, _NAMES[x.dtype], tuple(x.shape)) for name, x in ordered],
        {
            "format": f"cl_fast.{kind}",
            "version": str(VERSION),
            "cl_fast": __version__,
            "content": content.hexdigest(),
            "about": json.dumps(dict(about), ensure_ascii=False, allow_nan=False),
        },
    )
    write_whole(Path(path), [header, *data])


def read_memory(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, on the CPU, and what is known of them.

    Raises:
        CheckpointError: it is not such a file, of another version, or damaged.
    """
    header = read_header(path)
    told = header.metadata
    if told.get("format") != f"cl_fast.{kind}":
        raise CheckpointError(
            f"{path}: is not a file of the format 'cl_fast.{kind}' (its format is "
            f"{told.get('format', 'not told')!r})"
        )
    if told.get("version") != str(VERSION):
        raise CheckpointError(
            f"{path}: has version {told.get('version')!r} of its format, this cl_fast reads "
            f"{VERSION}; use the cl_fast that wrote it ({told.get('cl_fast', 'unknown')})"
        )
    raw = bytearray(Path(path).read_bytes()[header.data_start :])
    if hashlib.blake2b(raw, digest_size=16).hexdigest() != told.get("content"):
        raise CheckpointError(f"{path}: the data are not those that were saved; save it again")
    about = strict_json(told.get("about", "").encode(), f"{path}: about")
    if not isinstance(about, dict):
        raise CheckpointError(f"{path}: its header does not say what it holds; save it again")
    tensors = {}
    for name, info in header.tensors.items():
        if info.dtype not in _DTYPES:
            raise CheckpointError(f"{path}: tensor {name!r} has the unknown type {info.dtype}")
        dtype, at = _DTYPES[info.dtype], info.offset - header.data_start
        if info.nbytes:
            count = info.nbytes // dtype.itemsize
            flat = torch.frombuffer(raw, dtype=dtype, offset=at, count=count)
            tensors[name] = flat.reshape(info.shape).clone()
        else:
            tensors[name] = torch.empty(info.shape, dtype=dtype)
    return tensors, about
