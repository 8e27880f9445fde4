"""nearest_key: the gate of a store of facts, in a step of decoding and over a long prompt.

    decode    16 queries against 10,000 keys    must read the keys once: the floor is a copy
    prompt    4,096 queries                     2 T n d operations: the floor is a bf16 product

The peer makes the matrix of all scores, in the dtype of the keys, and takes its maximum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .harness import (
    Case,
    Machine,
    Mismatch,
    Provider,
    Target,
    Work,
    copy_floor,
    matmul_floor,
    ours,
)

__all__ = ["CASES"]

BF16 = torch.bfloat16


def _check(slack: float) -> Callable[[tuple[Tensor, Tensor], Tensor], str]:
    """The key found is the best one up to `slack`, and so is its score; scores are cosines."""

    def check(out: tuple[Tensor, Tensor], table: Tensor) -> str:
        score, index = out
        found = table.gather(1, index[:, None])[:, 0]
        behind = float((table.amax(1) - found).max())
        off = float((score.double() - found).abs().max())
        if not max(behind, off) <= slack:
            raise Mismatch(f"the keys found are {behind:.3g} behind, the scores {off:.3g} off")
        return f"float64, within {slack:.2g}"

    return check


def _work(queries: int, machine: Machine) -> Work:
    from cl_fast.ops import nearest_key

    count, n, d = machine.pick((queries, 10_000, 4096), (5, 70, 40))
    generator = torch.Generator(device=machine.device).manual_seed(0)

    def normalised(rows: int) -> Tensor:
        x = torch.randn(rows, d, generator=generator, device=machine.device)
        return (x / x.norm(dim=1, keepdim=True)).to(BF16)

    q = normalised(count)
    sets = machine.sets(2 * n * d)
    keys = [normalised(n) for _ in range(sets)]

    def run(**more: str) -> Callable[[int], tuple[Tensor, Tensor]]:
        return lambda i: nearest_key(q, keys[i % sets], **more)

    def product(i: int) -> tuple[Tensor, Tensor]:
        best = (q @ keys[i % sets].T).max(1)
        return best.values, best.indices

    moved = 2 * (count + n) * d + 12 * count
    decoding = count <= 16
    return Work(
        shape=f"{count} queries, {n} keys, d = {d}",
        dtype="bfloat16",
        bytes=moved,
        flops=2 * count * n * d,
        input_bytes=2 * n * d,
        providers=[
            *ours(machine, nearest_key, run, _check((d + 4) * 2.0**-23), graph=True),
            copy_floor(machine, moved) if decoding else matmul_floor(machine),
            Provider("torch max of the product", "peer", product, _check(2.0**-7), graph=True),
        ],
        sets=sets,
        expected=lambda: q.double() @ keys[0].double().T,
        output_elements=6 * count,
        targets=[
            Target(
                f"nearest_key, {queries} queries: times faster than the maximum of the product",
                "cl_fast",
                lambda r: r["torch max of the product"]["ms_p50"] / r["cl_fast"]["ms_p50"],
                1.0,
            )
        ],
    )


CASES = [
    Case("nearest_key", f"nearest_key/{name}", functools.partial(_work, count), 6.0)
    for name, count in (("decode", 16), ("prompt", 4096))
]
