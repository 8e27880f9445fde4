"""Inputs that break merges: what a base and its finetuned models may look like."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = (
    "normal",
    "heavy",
    "cancel",
    "denormal",
    "ties",
    "zero_delta",
    "one_zero_delta",
    "far_base",
    "signed_zero",
)
LENGTHS = (0, 1, 2, 15, 16, 17, 257, 1000)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def models(
    kind: str, n: int, k: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """A base and k finetuned tensors of n elements."""
    g = torch.Generator().manual_seed(seed + 1000 * n + k)
    base = 0.02 * torch.randn(n, generator=g)
    deltas = [0.001 * torch.randn(n, generator=g) for _ in range(k)]
    if kind == "heavy":
        deltas = [d / (1e-4 + torch.rand(n, generator=g)) ** 2 for d in deltas]
        deltas = [d.clamp(-3e4, 3e4) for d in deltas]
    elif kind == "cancel":
        deltas = [deltas[0] * (-1.0) ** i for i in range(k)]
    elif kind == "denormal":
        tiny = torch.finfo(dtype).tiny
        base, deltas = base * tiny, [d * tiny * 300 for d in deltas]
    elif kind == "ties":
        steps = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]) * 2.0**-9
        base = torch.zeros(n) + 0.5
        deltas = [steps[torch.randint(0, 5, (n,), generator=g)] for _ in range(k)]
    elif kind == "zero_delta":
        deltas = [torch.zeros(n) for _ in range(k)]
    elif kind == "one_zero_delta":
        deltas[0] = torch.zeros(n)
    elif kind == "far_base":
        base = base * 1e4
    elif kind == "signed_zero":
        base = torch.zeros(n) * -1.0
        deltas = [torch.where(torch.rand(n, generator=g) < 0.5, -0.0, d) for d in deltas]
    base = base.to(dtype)
    return base, [(base.float() + d).to(dtype) for d in deltas]
