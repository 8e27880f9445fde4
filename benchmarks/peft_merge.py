#!/usr/bin/env python3
"""Merge checkpoints with PEFT's own merge functions, tensor by tensor: the peer of a benchmark.

    python benchmarks/peft_merge.py METHOD OUT BASE MODEL... --weight 0.4 --density 0.2

PEFT applies these functions to the matrices of LoRA adapters; here they get task vectors, in the
type of the checkpoint, one tensor at a time. Imports are part of what a user waits for.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft.utils import merge_utils
from safetensors import safe_open
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("method", choices=["task_arithmetic", "ties", "dare_linear", "dare_ties"])
    parser.add_argument("out", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--weight", type=float, required=True)
    parser.add_argument("--density", type=float, default=1.0)
    a = parser.parse_args()
    function = getattr(merge_utils, a.method)
    weights = torch.full((len(a.models),), a.weight)
    a.out.mkdir(parents=True)
    for shard in sorted(a.base.glob("*.safetensors")):
        merged = {}
        with safe_open(shard, "pt") as base:
            models = [safe_open(m / shard.name, "pt") for m in a.models]
            for name in base.keys():  # noqa: SIM118 - not a mapping
                b = base.get_tensor(name)
                deltas = [m.get_tensor(name) - b for m in models]
                extra = () if a.method == "task_arithmetic" else (a.density,)
                merged[name] = b + function(deltas, weights.to(b.dtype), *extra)
        save_file(merged, a.out / shard.name, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
