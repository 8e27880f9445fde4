"""magnitude_threshold: the exact k-th largest magnitude of a delta, without a sort.

Bytes that the work must move: tensor and base read once. More reads than one are the price of an
exact answer without a sort, and show as a smaller share of the copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .harness import GIB, Case, Machine, Mismatch, Provider, Work, copy_floor, equal, ours
from .merge import inputs

__all__ = ["CASES"]

DENSITY = 0.2


def torch_topk(x: Tensor, base: Tensor | None) -> Tensor:
    d = x.float() if base is None else x.float() - base.float()
    k = max(1, int(DENSITY * d.numel()))
    return d.abs().reshape(-1).topk(k, sorted=False).values.min()


def torch_sort(x: Tensor, base: Tensor | None) -> Tensor:
    d = x.float() if base is None else x.float() - base.float()
    k = max(1, int(DENSITY * d.numel()))
    return d.abs().reshape(-1).sort(descending=True).values[k - 1]


def _work(with_base: bool, machine: Machine) -> Work:
    from cl_fast.ops import magnitude_threshold

    n = machine.pick(GIB // 2, 5003)
    note = ""
    while 24 * n > machine.free_bytes() and n > 4096:
        n //= 2
        note = f"memory is short: {2 * n / GIB:.3g} GiB instead of 1 GiB"
    first, (x,) = inputs(machine, (n,), 1)
    base = first if with_base else None

    def run(**more: Any) -> Callable[[int], Any]:
        return lambda i: magnitude_threshold(x, base=base, density=DENSITY, **more)

    def expected() -> tuple[Tensor, Tensor]:
        # From a sort, which shares nothing with the selection.
        d = (x.float() - base.float() if base is not None else x.float()).abs().reshape(-1)
        k = max(1, int(DENSITY * n))
        cut = d.sort(descending=True).values[k - 1].clone()
        return cut, k - (d > cut).sum()

    def value_only(out: Tensor, expected: Any) -> str:
        if not torch.equal(out, expected[0]):
            raise Mismatch(f"threshold {out.item()!r} instead of {expected[0].item()!r}")
        return "the threshold, not its ties"

    moved = 2 * n * (1 + with_base)
    return Work(
        shape=f"{n}",
        dtype="bfloat16",
        bytes=moved,
        input_bytes=moved,
        providers=[
            *ours(machine, magnitude_threshold, run, lambda out, e: equal(list(out), list(e))),
            copy_floor(machine, moved),
            Provider("torch topk", "peer", lambda i: torch_topk(x, base), value_only),
            Provider("torch sort", "peer", lambda i: torch_sort(x, base), value_only),
        ],
        note=note,
        expected=expected,
    )


CASES = [
    Case(
        "magnitude_threshold",
        f"magnitude_threshold/{name}",
        functools.partial(_work, with_base),
        12.0,
    )
    for name, with_base in (("x - base", True), ("x", False))
]
