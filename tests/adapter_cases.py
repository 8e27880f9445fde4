"""LoRA adapters of a few numbers, written without PEFT and without cl_fast."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PREFIX = "base_model.model."


def factors(
    shapes: Mapping[str, tuple[int, int]], rank: int, *, seed: int = 0, size: float = 0.1
) -> dict[str, tuple[Tensor, Tensor]]:
    """module -> (A [r, in], B [out, r]) for modules of these (out, in)."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, inner, generator=draw) * size,
            torch.randn(out, rank, generator=draw) * size,
        )
        for name, (out, inner) in shapes.items()
    }


def write(
    folder: Path,
    made: Mapping[str, tuple[Tensor, Tensor]],
    *,
    alpha: float | None = None,
    more: Mapping[str, Tensor] | None = None,
    embeddings: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """The folder of an adapter. `more` are further tensors, without the prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = next(iter(made.values()))[0].shape[0]
    tensors = {}
    for name, (a, b) in made.items():
        if name in embeddings:
            tensors[f"{PREFIX}{name}.lora_embedding_A"] = a
            tensors[f"{PREFIX}{name}.lora_embedding_B"] = b
        else:
            tensors[f"{PREFIX}{name}.lora_A.weight"] = a
            tensors[f"{PREFIX}{name}.lora_B.weight"] = b
    tensors = {name: value.to(dtype).contiguous() for name, value in tensors.items()}
    tensors |= {PREFIX + name: value for name, value in (more or {}).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank if alpha is None else alpha,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in made}),
        "init_lora_weights": True,
        "bias": "none",
        "base_model_name_or_path": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return folder
