"""orthogonal_penalty with its gradient, and orthogonal_project.

The penalty of 64 modules against 15 past tasks of rank 8 at d = 4096. Bytes that the work must
move: new and past factors read once, the gradients written. A module's past is 1 MB, and the
gradient needs it again after the products are known, so a real kernel reads it twice, the second
time in part from the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .harness import Case, Machine, Mismatch, Provider, Target, Work, copy_floor, ours

__all__ = ["CASES"]

MODULES, TASKS, RANK, WIDTH = 64, 15, 8, 4096
Set = tuple[list[Tensor], list[Tensor], list[list[Tensor]]]


def _sets(machine: Machine, dtype: torch.dtype) -> tuple[list[Set], int, tuple[int, ...]]:
    sizes = machine.pick((MODULES, TASKS, RANK, WIDTH), (3, 2, 4, 24))
    modules, tasks, rank, width = sizes
    new_bytes = modules * rank * width * dtype.itemsize
    each = new_bytes * (1 + tasks)
    generator = torch.Generator(device=machine.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        made = torch.randn(*shape, generator=generator, device=machine.device)
        return made.mul_(width**-0.5).to(dtype)

    sets: list[Set] = []
    for _ in range(machine.sets(each)):
        new = [normal(rank, width).requires_grad_() for _ in range(modules)]
        past = [normal(tasks * rank, width) for _ in range(modules)]
        sets.append((new, past, [list(p.split(rank)) for p in past]))
    return sets, each, sizes


def _penalty_work(dtype: torch.dtype, machine: Machine) -> Work:
    from cl_fast.ops import orthogonal_penalty

    sets, each, (modules, tasks, rank, width) = _sets(machine, dtype)
    stacked = [torch.stack(past) for _, past, _ in sets]

    def with_gradient(loss: Tensor, new: Sequence[Tensor]) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, list(new))]

    def run(**more: Any) -> Callable[[int], list[Tensor]]:
        def penalty(i: int) -> list[Tensor]:
            new, past, _ = sets[i % len(sets)]
            return with_gradient(orthogonal_penalty(new, past, form="l1", **more), new)

        return penalty

    def loop(i: int) -> list[Tensor]:
        new, _, by_task = sets[i % len(sets)]
        loss = torch.zeros((), device=machine.device)
        for a, matrices in zip(new, by_task, strict=True):
            for p in matrices:
                loss = loss + (a @ p.T).abs().sum()
        return with_gradient(loss, new)

    def batched(i: int) -> list[Tensor]:
        new = sets[i % len(sets)][0]
        products = torch.bmm(torch.stack(new), stacked[i % len(sets)].mT)
        return with_gradient(products.abs().sum(dtype=torch.float32), new)

    def expected() -> list[Tensor]:
        new, past, _ = sets[0]
        value = torch.zeros((), dtype=torch.float64, device=machine.device)
        gradients = []
        for a, p in zip(new, past, strict=True):
            products = a.detach().double() @ p.double().T
            value = value + products.abs().sum()
            gradients.append(products.sign() @ p.double())
        return [value, torch.stack(gradients)]

    def check(limit: float) -> Callable[[list[Tensor], list[Tensor]], str]:
        def compare(out: list[Tensor], exact: list[Tensor]) -> str:
            value = float((out[0].double() - exact[0]).abs() / exact[0])
            gradient = torch.stack([g.double() for g in out[1:]])
            error = float((gradient - exact[1]).norm() / exact[1].norm())
            # A product near zero may come out with the other sign: one row in 61,440, 0.8 % of
            # the norm.
            if not (value < limit and error < 2e-2):
                raise Mismatch(f"relative error {value:.3g} of the value, {error:.3g} of gradients")
            return f"float64, relative error {value:.2g} of the value, {error:.2g} of gradients"

        return compare

    new_bytes = each // (1 + tasks)
    text = f"penalty and gradient, {modules} modules, {str(dtype).removeprefix('torch.')}"
    return Work(
        shape=f"{modules} modules, {tasks} tasks, rank {rank}, d = {width}",
        dtype=str(dtype).removeprefix("torch."),
        bytes=each + new_bytes,
        flops=4 * modules * rank * tasks * rank * width,
        input_bytes=each,
        providers=[
            *ours(machine, orthogonal_penalty, run, check(1e-4), graph=True),
            copy_floor(machine, each + new_bytes),
            Provider("torch loop", "peer", loop, check(1e-2), note="each module, each task"),
            Provider("torch bmm", "peer", batched, check(1e-2), graph=True,
                     note="equal shapes, the past stacked before"),
        ],
        sets=len(sets),
        expected=expected,
        targets=[
            Target(f"{text}: ms", "cl_fast", lambda r: r["cl_fast"]["ms_p50"], 0.2, False),
            Target(
                f"{text}: ms in a graph",
                "cl_fast",
                lambda r: r["cl_fast"]["graph_ms_p50"],
                0.2,
                False,
            ),
        ],
    )  # fmt: skip


def _project_work(machine: Machine) -> Work:
    from cl_fast.ops import orthogonal_project

    rank, width, k = machine.pick((64, 4096, 120), (4, 24, 5))
    count = machine.sets(2 * width * (2 * rank + k))
    generator = torch.Generator(device=machine.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=machine.device)

    given = [
        (normal(rank, width).to(torch.bfloat16), torch.linalg.qr(normal(width, k))[0].bfloat16())
        for _ in range(count)
    ]

    def run(**more: Any) -> Callable[[int], Tensor]:
        return lambda i: orthogonal_project(*given[i % count], **more)

    def plain(i: int) -> Tensor:
        a, q = given[i % count]
        return a - (a @ q) @ q.T

    def expected() -> Tensor:
        a, q = (x.double() for x in given[0])
        return a - (a @ q) @ q.T

    def check(limit: float) -> Callable[[Tensor, Tensor], str]:
        def compare(out: Tensor, exact: Tensor) -> str:
            error = float((out.double() - exact).norm() / exact.norm())
            if not error < limit:
                raise Mismatch(f"relative error {error:.3g}")
            return f"float64, relative error {error:.2g}"

        return compare

    each = 2 * width * (rank + k)
    return Work(
        shape=f"{rank} x {width}, k = {k}",
        dtype="bfloat16",
        bytes=each + 2 * rank * width,
        flops=4 * rank * width * k,
        input_bytes=each,
        providers=[
            # One rounding to bfloat16 is 2^-9 at most.
            *ours(machine, orthogonal_project, run, check(2.0**-8), graph=True),
            copy_floor(machine, each + 2 * rank * width),
            Provider("torch eager", "peer", plain, check(2.0**-6), graph=True),
        ],
        sets=count,
        expected=expected,
        output_elements=rank * width,
    )


CASES = [
    *(
        Case(
            "orthogonal_penalty",
            f"orthogonal_penalty/{str(dtype).removeprefix('torch.')}",
            functools.partial(_penalty_work, dtype),
            8.0,
        )
        for dtype in (torch.bfloat16, torch.float32)
    ),
    Case("orthogonal_project", "orthogonal_project/4096", _project_work, 5.0),
]
