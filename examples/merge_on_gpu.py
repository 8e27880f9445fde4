"""Merge two finetuned models with TIES where they lie: on a GPU if there is one, else on the CPU.

The five lines that matter are in `main`; the rest makes models to merge. The bits of the result do
not depend on the device, which the last line shows:

    python examples/merge_on_gpu.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl_fast.merging import ties


def finetuned(base: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """`base` plus small changes, in bfloat16."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: (x.float() + 4e-4 * torch.randn(x.shape, generator=g)).bfloat16()
        for name, x in base.items()
    }


def on(device: str, model: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in model.items()}


def main() -> None:
    g = torch.Generator().manual_seed(0)
    base = {
        f"layers.{i}.{name}.weight": (0.02 * torch.randn(shape, generator=g)).bfloat16()
        for i in range(4)
        for name, shape in {"q": (256, 256), "up": (1024, 256), "norm": (256,)}.items()
    }
    math, code = finetuned(base, 1), finetuned(base, 2)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    b, m, c = on(device, base), on(device, math), on(device, code)
    merged = ties(b, [m, c], density=0.2, weight=[1.0, 0.5])
    moved = sum(int((merged[name] != b[name]).sum()) for name in merged)
    print(f"{device}: {len(merged)} tensors merged, {moved} of their elements moved")

    again = ties(base, [math, code], density=0.2, weight=[1.0, 0.5], backend="eager")
    print("same bits as the reference:", all(torch.equal(merged[n].cpu(), again[n]) for n in again))


if __name__ == "__main__":
    main()
