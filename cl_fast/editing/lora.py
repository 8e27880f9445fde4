"""A patch as a PEFT adapter: W0 + U V^T is W0 + scale B A with B = U, A = V^T and scale 1.

    adapter_config.json            LoraConfig; rank_pattern where layers differ in rank
    adapter_model.safetensors      base_model.model.<layer>.lora_A.weight [r, f], .lora_B [d, r]

Of a smaller rank it is the best one there is, by the singular values (Eckart and Young): with
U = Q R and V = Q' R', those of U V^T are those of the small matrix R R'^T.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_fast.checkpoints.safetensors import build_header
from cl_fast.checkpoints.writing import write_whole
from cl_fast.editing.applying import Factors
from cl_fast.errors import OutputError
from cl_fast.options import at_least

__all__ = ["truncated", "write_adapter"]


def truncated(U: Tensor, V: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The nearest product of rank at most `rank`, and its relative distance (Frobenius).

    Args:
        U, V: [d, n] and [f, n].

    Returns:
        U' [d, r], V' [f, r] with r = min(rank, n, d, f), equally large, and the distance.
    """
    left, left_small = torch.linalg.qr(U)
    right, right_small = torch.linalg.qr(V)
    inner, sizes, outer = torch.linalg.svd(left_small @ right_small.T, full_matrices=False)
    r = min(rank, sizes.numel())
    root = sizes[:r].sqrt()
    whole = sizes.square().sum()
    lost = sizes[r:].square().sum()
    error = float((lost / whole).sqrt()) if whole > 0 else 0.0
    return left @ inner[:, :r] * root, right @ outer[:r].T * root, error


def write_adapter(
    folder: str | os.PathLike[str], layers: Sequence[Factors], rank: int | None, base: str | None
) -> dict[str, float]:
    """Writes the folder of an adapter. Returns the relative error of each layer.

    Raises:
        ValueError: the patch is empty; rank is not positive.
        OutputError: the folder exists and is not empty, or cannot be written.
    """
    if rank is not None:
        at_least("rank", rank, 1)
    if not layers[0].U.shape[1]:
        raise ValueError("the patch is empty, and an adapter of rank 0 does not exist")
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target}: exists and is not empty; give another folder")
    tensors: list[tuple[str, Tensor]] = []
    ranks, errors = {}, {}
    for layer in layers:
        u, v, error = layer.U, layer.V, 0.0
        most = min(u.shape[0], v.shape[0])
        wanted = most if rank is None else min(rank, most)
        if wanted < u.shape[1]:
            u, v, error = truncated(u, v, wanted)
        ranks[layer.name], errors[layer.name] = int(u.shape[1]), error
        for name, factor in (("lora_A", v.T), ("lora_B", u)):
            value = factor.to(torch.float32).contiguous()
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} of layer {layer.name!r} is beyond float32")
            tensors.append((f"base_model.model.{layer.name}.{name}.weight", value))
    largest = max(ranks.values())
    others = {name: size for name, size in ranks.items() if size != largest}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,  # the scale is alpha / r
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": all(layer.transposed for layer in layers),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{target}: cannot be made ({error.strerror})") from error
    header, _, _ = build_header(
        [(name, "F32", tuple(value.shape)) for name, value in tensors], {"format": "pt"}
    )
    data = (value.numpy().reshape(-1).view("u1").data for _, value in tensors)
    write_whole(target / "adapter_model.safetensors", [header, *data])
    write_whole(target / "adapter_config.json", [json.dumps(config, indent=2).encode() + b"\n"])
    return errors
