"""The O-LoRA penalty on CPU tensors by the C++ core: float32 matrices, all modules in one call.

A matrix library is called once per module and past task, and for products of eight rows the calls
are the work. The caller has checked the arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["gradients", "products", "takes"]

Pairs = Sequence[tuple[int, int]]
"""(module, index into past), in order."""


def takes(new: Sequence[Tensor], past: Sequence[Tensor]) -> bool:
    """Whether the core can take these tensors, all of which are on one device."""
    kinds = {(x.dtype, x.layout) for tensors in (new, past) for x in tensors}
    return new[0].is_cpu and kinds == {(torch.float32, torch.strided)}


def _dense(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x if x.is_contiguous() else x.contiguous() for x in tensors]


def products(
    core: ModuleType, new: Sequence[Tensor], past: Sequence[Tensor], pairs: Pairs, total: int
) -> Tensor:
    """S, block after block: float32 [total]."""
    out = torch.empty(total, dtype=torch.float32)
    left, right = _dense(new), _dense(past)
    places = [(x.data_ptr(), *x.shape) for x in left]
    listed = []
    for m, i in pairs:
        a, r, d = places[m]
        p = right[i]
        listed.append((a, p.data_ptr(), 0, r, p.size(0), d, True))
    core.orthogonal_products(listed, out.data_ptr())
    return out


def gradients(
    core: ModuleType,
    factor: Tensor,
    new: Sequence[Tensor],
    past: Sequence[Tensor],
    pairs: Pairs,
    targets: Mapping[int, Tensor],
) -> None:
    """Writes the gradients of the modules named by `targets`: float32 [r, d] each, contiguous."""
    factor, right = factor.contiguous(), _dense(past)
    addresses = {m: out.data_ptr() for m, out in targets.items()}
    without = addresses.keys() - {m for m, _ in pairs}
    for m in without:
        targets[m].zero_()
    listed, before = [], -1
    for m, i in pairs:
        p = right[i]
        listed.append((0, p.data_ptr(), addresses.get(m, 0), new[m].size(0), *p.shape, m != before))
        before = m
    core.orthogonal_apply(listed, factor.data_ptr())
