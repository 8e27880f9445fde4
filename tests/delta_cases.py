"""Tiny models with a base, and a reader of packed deltas that shares no code with cl_fast's."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import CONFIG, TOKENIZER
from torch import Tensor

#: Crosses a block of 65,536, ends off a vector, one element, a float32 among bfloat16.
SHAPES: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "model.embed_tokens.weight": (torch.bfloat16, (500, 64)),
    "model.layers.0.mlp.up_proj.weight": (torch.bfloat16, (300, 401)),
    "model.layers.0.input_layernorm.weight": (torch.float32, (63,)),
    "model.layers.0.scale": (torch.bfloat16, ()),
    "model.norm.weight": (torch.float16, (64,)),
}
SAME = "model.frozen.weight"
CHANGED, KEPT = "model.ids", "model.flags"
MODELS = ("math", "code", "law")


def base_state() -> dict[str, Tensor]:
    """Random tensors; one that no model changes, with negative zeros in it; integers."""
    draw = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=draw).to(dtype)
        for name, (dtype, shape) in SHAPES.items()
    }
    state[SAME] = torch.randn(70, 10, generator=draw).bfloat16()
    state[SAME][::3] = -0.0
    state[CHANGED] = torch.arange(9)
    state[KEPT] = torch.tensor([True, False, True])
    return state


def tuned_state(base: dict[str, Tensor], seed: int, *, ids: bool = False) -> dict[str, Tensor]:
    """A finetuned model near the base; `ids`: its integers differ, too."""
    draw = torch.Generator().manual_seed(seed)
    state = {name: tensor.clone() for name, tensor in base.items()}
    for name in SHAPES:
        noise = 0.02 * torch.randn(base[name].shape, generator=draw)
        state[name] = (base[name].float() + noise).to(base[name].dtype)
    if ids:
        state[CHANGED] = state[CHANGED] + 1
    return state


def save(folder: Path, state: dict[str, Tensor], vocabulary: str = "t") -> Path:
    """A folder as transformers writes it."""
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tokenizer: dict[str, Any] = json.loads(json.dumps(TOKENIZER).replace('"t', f'"{vocabulary}'))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def family(root: Path) -> Path:
    """base, math, code, law, and renumbered: math with other integers."""
    base = base_state()
    save(root / "base", base)
    for seed, name in enumerate(MODELS, 1):
        save(root / name, tuned_state(base, seed))
    save(root / "renumbered", tuned_state(base, 1, ids=True), vocabulary="u")
    return root


def load(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder."""
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def bits(tensor: Tensor) -> Tensor:
    """What tells -0 from 0."""
    return (
        tensor.contiguous().view(torch.uint8)
        if tensor.dim()
        else tensor.reshape(1).view(torch.uint8)
    )


def same_bits(one: Path, two: Path) -> None:
    """Asserts that two checkpoints hold the same bytes."""
    ours, theirs = load(one), load(two)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(bits(ours[name]), bits(theirs[name])), name


def crc64(data: bytes) -> int:
    """CRC-64/NVME, a bit at a time but for a table."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x9A6C9329AC4BC9B5 if byte & 1 else 0)
        table.append(byte)
    crc = (1 << 64) - 1
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ (1 << 64) - 1


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 of Random123."""
    c, k, mask = list(counter), list(key), 0xFFFFFFFF
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [q >> 32 ^ c[1] ^ k[0], q & mask, p >> 32 ^ c[3] ^ k[1], p & mask]
        k = [k[0] + 0x9E3779B9 & mask, k[1] + 0xBB67AE85 & mask]
    return c


@functools.cache
def kept(key: int, n: int, threshold: int) -> list[int]:
    """The elements that a stream keeps, as docs/random-stream.md says."""
    found = []
    for group in range(-(-n // 16)):
        words = [philox([group, 0, level, 0], [key & 0xFFFFFFFF, key >> 32]) for level in range(4)]
        for j in range(min(16, n - 16 * group)):
            draw = 0
            for level in range(4):
                draw = draw << 8 | words[level][j >> 2] >> 8 * (j & 3) & 255
            if draw < threshold:
                found.append(16 * group + j)
    return found


class Reader:
    """A packed delta, by docs/delta-format.md alone."""

    def __init__(self, path: Path) -> None:
        self.raw = path.read_bytes()
        (length,) = struct.unpack("<Q", self.raw[:8])
        self.start = 8 + length
        self.header = json.loads(self.raw[8 : self.start])
        self.metadata = self.header.pop("__metadata__")
        self.tensors = json.loads(self.metadata["tensors"])

    def data(self, name: str) -> bytes:
        begin, end = self.header[name]["data_offsets"]
        return self.raw[self.start + begin : self.start + end]

    def seal(self) -> bool:
        head = hashlib.blake2b(self.raw[: self.start], digest_size=16).digest()
        return self.data("seal") == head and self.raw.endswith(head)

    def offsets(self, name: str) -> list[int]:
        data = self.data(f"offsets/{name}")
        return list(struct.unpack(f"<{len(data) // 8}q", data))

    def key(self, name: str) -> int:
        text = "\0".join(("cl_fast philox v1", self.metadata["seed"], self.metadata["model"], name))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def seal(path: Path, metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Writes a delta again with other words in its header, and the seal that belongs to them."""
    data = Reader(path)
    words = metadata | {"tensors": json.dumps(tensors)}
    body = json.dumps({"__metadata__": words, **data.header}).encode()
    head = struct.pack("<Q", len(body)) + body
    digest = hashlib.blake2b(head, digest_size=16).digest()
    path.write_bytes(head + data.raw[data.start : -16] + digest)


def forge_offsets(path: Path, name: str, offsets: list[int]) -> None:
    """Gives a tensor other offsets, with their checksum."""
    data = Reader(path)
    table = struct.pack(f"<{len(offsets)}q", *offsets)
    begin, end = data.header[f"offsets/{name}"]["data_offsets"]
    raw = bytearray(data.raw)
    raw[data.start + begin : data.start + end] = table
    path.write_bytes(raw)
    data.tensors[name]["offsets_crc64"] = f"{crc64(table):016x}"
    seal(path, data.metadata, data.tensors)
