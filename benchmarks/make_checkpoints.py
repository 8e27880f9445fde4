#!/usr/bin/env python3
"""Make checkpoints with the shapes of real decoders and realistic random values.

    python benchmarks/make_checkpoints.py OUT --shape 0.5b

Writes OUT/base and OUT/ft0 .. ft2: sharded bfloat16 safetensors with config.json and index.

    base   matrices: normal with deviation 0.02 times a log-normal gain per row; norms near 1
    ft_k   bfloat16(base + delta): deltas are normal times exp(0.7 normal), the heavy tail of real
           finetuning, and each tensor has its own scale; rounding makes many equal magnitudes and
           about one exact zero in eight, as in real bfloat16 finetunes

Every tensor has its own seed: the same arguments give the same bytes with the same torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

# hidden, layers, intermediate, query heads, key-value heads, vocabulary, tied: the Qwen2.5 family
SHAPES = {
    "tiny": (256, 4, 704, 4, 2, 4096, True),
    "0.5b": (896, 24, 4864, 14, 2, 151936, True),
    "1.5b": (1536, 28, 8960, 12, 2, 151936, True),
    "3b": (2048, 36, 11008, 16, 2, 151936, True),
    "6.7b": (4096, 32, 11008, 32, 32, 32000, False),  # the sizes of Llama 2 7B
    "7b": (3584, 28, 18944, 28, 4, 152064, False),
}


def tensor_shapes(shape: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Qwen2 checkpoint, in its order."""
    hidden, layers, inner, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    head = hidden // heads
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for i in range(layers):
        p = f"model.layers.{i}."
        yield p + "input_layernorm.weight", (hidden,)
        for letter, rows in (("q", heads * head), ("k", kv_heads * head), ("v", kv_heads * head)):
            yield p + f"self_attn.{letter}_proj.weight", (rows, hidden)
            yield p + f"self_attn.{letter}_proj.bias", (rows,)
        yield p + "self_attn.o_proj.weight", (hidden, heads * head)
        yield p + "post_attention_layernorm.weight", (hidden,)
        yield p + "mlp.gate_proj.weight", (inner, hidden)
        yield p + "mlp.up_proj.weight", (inner, hidden)
        yield p + "mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not tied:
        yield "lm_head.weight", (vocabulary, hidden)


def generator(*key: object) -> torch.Generator:
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def base_tensor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    g = generator(seed, "base", name)
    w = torch.randn(shape, generator=g)
    if len(shape) == 1:
        return w.mul_(0.1).add_(1.0 if name.endswith("norm.weight") else 0.0)
    return w.mul_(torch.randn(shape[0], 1, generator=g).mul_(0.3).exp_().mul_(0.02))


def delta(name: str, shape: tuple[int, ...], seed: int, model: int) -> torch.Tensor:
    g = generator(seed, "delta", model, name)
    scale = 4e-4 * float(torch.randn((), generator=g).mul_(0.5).exp_())
    d = torch.randn(shape, generator=g)
    return d.mul_(torch.randn(shape, generator=g).mul_(0.7).exp_()).mul_(scale)


class Writer:
    """Shards of one checkpoint."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.pending: dict[str, torch.Tensor] = {}
        self.parts: list[list[str]] = []
        self.size = self.total = 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self.pending and self.size + tensor.nbytes > self.shard_bytes:
            self.flush()
        self.pending[name] = tensor
        self.size += tensor.nbytes
        self.total += tensor.nbytes

    def flush(self) -> None:
        part = self.folder / f"part-{len(self.parts)}"
        save_file(self.pending, part, metadata={"format": "pt"})
        self.parts.append(list(self.pending))
        self.pending, self.size = {}, 0

    def close(self) -> None:
        self.flush()
        count = len(self.parts)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for i, name in enumerate(names):
            (self.folder / f"part-{i}").rename(self.folder / name)
        index = {
            "metadata": {"total_size": self.total},
            "weight_map": {t: n for n, part in zip(names, self.parts, strict=True) for t in part},
        }
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))


def config(shape: str) -> dict[str, object]:
    hidden, layers, inner, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16",
    }


def make(out: Path, shape: str, models: int, shard_bytes: int, seed: int) -> None:
    """Write the checkpoints, unless a complete set made with the same arguments is there."""
    stamp = json.dumps([shape, models, shard_bytes, seed, torch.__version__])
    done = out / "made-with.json"
    if done.exists() and done.read_text() == stamp:
        return
    folders = [out / "base", *(out / f"ft{k}" for k in range(models))]
    writers = [Writer(folder, shard_bytes) for folder in folders]
    for name, size in tensor_shapes(shape):
        base = base_tensor(name, size, seed).bfloat16()
        writers[0].add(name, base)
        for k in range(models):
            writers[k + 1].add(name, delta(name, size, seed, k).add_(base.float()).bfloat16())
    for writer in writers:
        writer.close()
        (writer.folder / "config.json").write_text(json.dumps(config(shape), indent=2))
    done.write_text(stamp)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--shard-bytes", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=20240601)
    a = parser.parse_args()
    make(a.out, a.shape, a.models, int(a.shard_bytes), a.seed)


if __name__ == "__main__":
    main()
