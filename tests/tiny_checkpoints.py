"""Real checkpoints of a few bytes, and of a hundred (sparse) gigabytes, written in plain Python.

Independent of cl_fast's own writer, so that a mistake in it cannot hide.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
BYTES |= {"U8": 1, "I8": 1, "BOOL": 1, "F8_E8M0": 1}

#: name -> (dtype, shape), a decoder of two layers.
TINY: dict[str, tuple[str, tuple[int, ...]]] = {
    "model.embed_tokens.weight": ("BF16", (10, 4)),
    "model.layers.0.self_attn.q_proj.weight": ("BF16", (4, 4)),
    "model.layers.0.mlp.up_proj.weight": ("BF16", (8, 4)),
    "model.layers.0.input_layernorm.weight": ("BF16", (4,)),
    "model.layers.1.self_attn.q_proj.weight": ("BF16", (4, 4)),
    "model.layers.1.mlp.up_proj.weight": ("BF16", (8, 4)),
    "model.layers.1.input_layernorm.weight": ("BF16", (4,)),
    "model.norm.weight": ("BF16", (4,)),
}

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "vocab_size": 10,
    "torch_dtype": "bfloat16",
}

TOKENIZER = {"model": {"type": "BPE", "vocab": {f"t{i}": i for i in range(10)}, "merges": []}}


def size_of(dtype: str, shape: Iterable[int]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count * BYTES[dtype]


def header_of(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, int]:
    """Length word and JSON, and the bytes of data that must follow."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = size_of(dtype, shape)
        entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        position += nbytes
    body = json.dumps(entries).encode()
    return struct.pack("<Q", len(body)) + body, position


def write_file(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    data: bytes | None = None,
    *,
    sparse: bool = False,
) -> Path:
    """A safetensors file; without ``data`` the bytes count up, with ``sparse`` they are holes."""
    header, nbytes = header_of(tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(header)
        if sparse:
            file.truncate(len(header) + nbytes)
        else:
            file.write(data if data is not None else bytes(i % 64 for i in range(nbytes)))
    return path


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
    *,
    config: Mapping[str, Any] | None = CONFIG,
    shards: int = 1,
    tokenizer: Mapping[str, Any] | None = TOKENIZER,
    sparse: bool = False,
) -> Path:
    """A Hugging Face folder with one or many weight files."""
    tensors = TINY if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        (folder / "tokenizer_config.json").write_text("{}")
    if shards == 1:
        write_file(folder / "model.safetensors", tensors, sparse=sparse)
        return folder
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        part = names[i::shards]
        filename = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        write_file(folder / filename, {name: tensors[name] for name in part}, sparse=sparse)
        weight_map |= dict.fromkeys(part, filename)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Any) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path
