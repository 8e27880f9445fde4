"""rank_update, rank_update_many_ and gram: low-rank changes of weights, second moments of keys.

    rank_update    W + U V^T       must read and write W once: the floor is a copy of W
    1,000 updates  of rank one in one call, against 1,000 calls of addr_
    gram           K^T K           tokens d (d + 1) operations, since the result is symmetric: the
                                   floor is a bf16 matrix product

Updates are compared with float64, and may be off by their one rounding and a float32 sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

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


def _normal(machine: Machine, *shape: int, scale: float, seed: int) -> Tensor:
    generator = torch.Generator(device=machine.device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=machine.device).mul_(scale).to(BF16)


def _updated(slack: float) -> Callable[[Tensor, tuple[Tensor, Tensor]], str]:
    """One rounding to bfloat16 of a sum in float32, both `slack` times.

    `expected` is the float64 result, and the most that a float32 sum may be off: 2^-22 for each
    product and sum, of the sum of the absolute values.
    """

    def check(out: Tensor, expected: tuple[Tensor, Tensor]) -> str:
        exact, sums = expected
        limit = slack * (2.0**-8 * exact.abs() + sums)
        error = (out.double() - exact).abs()
        bad = ~(error <= limit)
        if bool(bad.any()):
            raise Mismatch(
                f"{int(bad.sum())} of {bad.numel()} elements are off, by up to "
                f"{float((error / limit.clamp(min=1e-30)).max()):.3g} times what rounding allows"
            )
        return "float64, within one rounding" + (f" times {slack:g}" if slack != 1.0 else "")

    return check


def _exact(weight: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    wide_u, wide_v = u.double(), v.double()
    terms = weight.double().abs() + wide_u.abs() @ wide_v.abs().T
    return weight.double() + wide_u @ wide_v.T, terms.mul_((u.shape[1] + 2) * 2.0**-22)


# ------------------------------------------------------------------------------------ rank_update


def _update_work(rank: int, machine: Machine) -> Work:
    from cl_fast.ops import rank_update

    rows, columns = machine.pick((4096, 14336), (24, 40))
    each = 2 * (rows * columns + rank * (rows + columns))
    sets = machine.sets(each + 2 * rows * columns)
    given = [
        (
            _normal(machine, rows, columns, scale=0.02, seed=3 * i),
            _normal(machine, rows, rank, scale=0.03, seed=3 * i + 1),
            _normal(machine, columns, rank, scale=0.03, seed=3 * i + 2),
        )
        for i in range(sets)
    ]

    def run(**more: Any) -> Callable[[int], Tensor]:
        return lambda i: rank_update(*given[i % sets], **more)

    def addmm(i: int) -> Tensor:
        weight, u, v = given[i % sets]
        return torch.addmm(weight, u, v.T)

    copy = copy_floor(machine, 4 * rows * columns)
    return Work(
        shape=f"{rows} x {columns}, rank {rank}",
        dtype="bfloat16",
        bytes=each + 2 * rows * columns,
        flops=2 * rank * rows * columns,
        input_bytes=each,
        providers=[
            *ours(machine, rank_update, run, _updated(1.0), graph=True),
            copy,
            Provider("torch addmm", "peer", addmm, _updated(3.0), graph=True),
        ],
        sets=sets,
        expected=lambda: _exact(*given[0]),
        output_elements=rows * columns,
        targets=[
            Target(
                f"rank_update, rank {rank}: times a copy of W",
                "cl_fast",
                lambda r: _best(r["cl_fast"]) / _best(r["copy"]),
                1.15,
                at_least=False,
            )
        ],
    )


def _best(row: Any) -> float:
    graph = row["graph_ms_p50"]
    return float(row["ms_p50"] if graph is None else graph)


# ------------------------------------------------------------------------------------ 1,000 of them


def _thousand_work(machine: Machine) -> Work:
    """1,000 rank-one updates of one weight: one call of rank 1,000."""
    from cl_fast.ops import rank_update_

    count = machine.pick(1000, 10)
    rows, columns = machine.pick((4096, 14336), (24, 40))
    weight = _normal(machine, rows, columns, scale=0.02, seed=0)
    u = _normal(machine, rows, count, scale=1e-3, seed=1)
    v = _normal(machine, columns, count, scale=1e-3, seed=2)
    us, vs = u.T.contiguous(), v.T.contiguous()

    def run(**more: Any) -> Callable[[int], Tensor]:
        own = weight.clone()

        def update(i: int) -> Tensor:
            rank_update_(own, u, v, **more)
            return own

        return update

    theirs = weight.clone()

    def one_by_one(i: int) -> Tensor:
        for a, b in zip(us, vs, strict=True):
            theirs.addr_(a, b)
        return theirs

    def roughly(out: Tensor, expected: tuple[Tensor, Tensor]) -> str:
        return _near(out, expected[0])

    moved = 4 * rows * columns + 2 * count * (rows + columns)
    return Work(
        shape=f"{rows} x {columns}, {count} updates",
        dtype="bfloat16",
        bytes=moved,
        flops=2 * count * rows * columns,
        input_bytes=moved - 2 * rows * columns,
        providers=[
            *ours(machine, rank_update_, run, _updated(1.0)),
            copy_floor(machine, 4 * rows * columns),
            matmul_floor(machine),
            Provider(f"torch addr_ x {count}", "peer", one_by_one, roughly),
        ],
        expected=lambda: _exact(weight, u, v),
        targets=[_thousand_target(f"{count} rank-one updates of one weight", count)],
    )


def _near(out: Tensor, exact: Tensor) -> str:
    """A chain of roundings to bfloat16, each of 2^-9 at most, that mostly cancel."""
    error = float((out.double() - exact).norm() / exact.norm())
    if not error < 0.1:
        raise Mismatch(f"relative error {error:.3g}")
    return f"float64, relative error {error:.2g}"


def _thousand_target(text: str, count: int) -> Target:
    return Target(
        f"{text}: times faster than addr_",
        "cl_fast",
        lambda r: r[f"torch addr_ x {count}"]["ms_p50"] / r["cl_fast"]["ms_p50"],
        50.0,
    )


def _many_work(machine: Machine) -> Work:
    """A rank-one update of each of 1,000 weights."""
    from cl_fast.ops import rank_update_many_

    count = machine.pick(1000, 7)
    size = machine.pick(512, 12)
    starts = [_normal(machine, size, size, scale=0.02, seed=i) for i in range(count)]
    us = [_normal(machine, size, 1, scale=1e-3, seed=count + i) for i in range(count)]
    vs = [_normal(machine, size, 1, scale=1e-3, seed=2 * count + i) for i in range(count)]
    pairs = [(u.reshape(-1), v.reshape(-1)) for u, v in zip(us, vs, strict=True)]

    def run(**more: Any) -> Callable[[int], list[Tensor]]:
        own = [weight.clone() for weight in starts]

        def update(i: int) -> list[Tensor]:
            rank_update_many_(own, us, vs, **more)
            return own

        return update

    theirs = [weight.clone() for weight in starts]

    def one_by_one(i: int) -> list[Tensor]:
        for weight, (a, b) in zip(theirs, pairs, strict=True):
            weight.addr_(a, b)
        return theirs

    def each(slack: float) -> Callable[[Sequence[Tensor], Any], str]:
        def check(out: Sequence[Tensor], expected: Any) -> str:
            return _updated(slack)(torch.stack(list(out)), expected)

        return check

    def expected() -> tuple[Tensor, Tensor]:
        found = [_exact(*three) for three in zip(starts, us, vs, strict=True)]
        return torch.stack([e for e, _ in found]), torch.stack([s for _, s in found])

    moved = count * (4 * size * size + 4 * size)
    return Work(
        shape=f"{count} of {size} x {size}, rank 1",
        dtype="bfloat16",
        bytes=moved,
        flops=2 * count * size * size,
        input_bytes=moved - 2 * count * size * size,
        providers=[
            *ours(machine, rank_update_many_, run, each(1.0), graph=True),
            copy_floor(machine, moved),
            Provider(f"torch addr_ x {count}", "peer", one_by_one, each(3.0), graph=True),
        ],
        expected=expected,
    )


# ------------------------------------------------------------------------------------ gram


def _gram_work(width: int, machine: Machine) -> Work:
    from cl_fast.ops import gram

    tokens = machine.pick(8192, 33)
    d = machine.pick(width, 40)
    k = _normal(machine, tokens, d, scale=1.0, seed=0)

    def run(**more: Any) -> Callable[[int], Tensor]:
        return lambda i: gram(k, **more)

    def check(rounding: float, symmetric: bool = False) -> Callable[[Tensor, Tensor], str]:
        def compare(out: Tensor, exact: Tensor) -> str:
            if symmetric and not torch.equal(out, out.T):
                raise Mismatch("not symmetric")
            norms = exact.diagonal().sqrt()
            limit = tokens * 2.0**-24 * norms.unsqueeze(1) * norms + rounding * exact.abs()
            worst = float(((out.double() - exact).abs() / limit).max())
            if not worst <= 1.0:
                raise Mismatch(f"off by {worst:.3g} times the bound of a float32 sum")
            return f"float64, {worst:.2g} of the bound of a float32 sum"

        return compare

    def expected() -> Tensor:
        wide = k.double()
        return wide.T @ wide

    float32 = functools.partial(gram, k, dtype=torch.float32)
    return Work(
        shape=f"{tokens} tokens, d = {d}",
        dtype="bfloat16",
        bytes=2 * tokens * d + 8 * d * d,
        flops=tokens * d * (d + 1),
        input_bytes=2 * tokens * d,
        providers=[
            *ours(machine, gram, run, check(0.0, symmetric=True)),
            Provider("cl_fast float32", "ours", lambda i: float32(), check(0.0, symmetric=True)),
            matmul_floor(machine),
            Provider("torch float32", "peer", lambda i: k.float().T @ k.float(), check(0.0)),
            Provider(
                "torch bfloat16",
                "peer",
                lambda i: k.T @ k,
                check(2.0**-8),
                note="the result is rounded to bfloat16",
            ),
        ],
        expected=expected,
        output_elements=4 * d * d,
    )


CASES = [
    *(
        Case("rank_update", f"rank_update/rank {rank}", functools.partial(_update_work, rank), 6.0)
        for rank in (1, 16, 64, 256)
    ),
    Case("rank_update", "rank_update/1000 of one weight", _thousand_work, 10.0),
    Case("rank_update", "rank_update/1000 weights", _many_work, 8.0),
    *(
        Case("gram", f"gram/d {width}", functools.partial(_gram_work, width), 8.0)
        for width in (4096, 14336)
    ),
]
