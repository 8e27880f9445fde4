"""Bands and magprune in the tile engine: tiles, threads and rows against a plain sort."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from cl_fast.ops.streams import uniform32

ROWS, LENGTH = 30, 4621  # two tiles and a half, rows across their ends
KEY = 11


def run(core: ModuleType, x: torch.Tensor, threads: int, **given: Any) -> torch.Tensor:
    term = {name: given.pop(name) for name in ("keep_count", "drop_count", "epsilon", "density")
            if name in given}  # fmt: skip
    memory = given.pop("memory", 0)
    job = core.Job(threads=threads, tile_elements=65536, nan="propagate", memory=memory)
    out = torch.full_like(x, 7.0)
    task = job.add_task(x.numel(), "F32", out.data_ptr(), **given)
    job.add_term(task, "F32", x.data_ptr(), key=KEY, **term)
    job.run()
    return out


def values() -> torch.Tensor:
    g = torch.Generator().manual_seed(4)
    x = torch.randn(ROWS, LENGTH, generator=g)
    return torch.where(torch.rand(x.shape, generator=g) < 0.5, (4 * x).round() / 4, x)


@pytest.mark.parametrize("threads", [1, 3])
def test_band(core: ModuleType, threads: int) -> None:
    x = values()
    order = x.abs().flatten().sort(descending=True, stable=True).indices
    for top, keep in ((0, 1000), (5000, 70_000), (5000, x.numel() - 5000), (9, 0), (0, x.numel())):
        out = run(core, x, threads, sparsify="band", density=0.5, keep_count=keep, drop_count=top)
        want = torch.zeros(x.numel())
        kept = order[top : top + keep]
        want[kept] = x.flatten()[kept]
        assert torch.equal(out.flatten(), want), (top, keep)


@pytest.mark.parametrize(("threads", "memory"), [(1, 0), (3, 0), (2, 1000)])
@pytest.mark.parametrize("rescale", ["none", "keep_rate", "l1"])
def test_magprune(core: ModuleType, threads: int, memory: int, rescale: str) -> None:
    x = values()
    out = run(
        core, x, threads, sparsify="magprune", density=0.5, epsilon=0.25, row=LENGTH,
        rescale=rescale, memory=memory,
    )  # fmt: skip
    if rescale == "l1":
        plain = run(
            core, x, 1, sparsify="magprune", density=0.5, epsilon=0.25, row=LENGTH, rescale="none"
        )
        factor = float(x.double().abs().sum() / plain.double().abs().sum())
        assert torch.equal(out, plain * torch.tensor(factor).float())
        return
    order = x.abs().sort(dim=1, descending=True, stable=True).indices
    rise = torch.arange(LENGTH - 1, -1, -1, dtype=torch.float64) / (LENGTH - 1)
    chance = torch.empty(x.shape, dtype=torch.float64)
    chance.scatter_(1, order, (0.25 + 0.5 * rise).expand(ROWS, -1))
    some = torch.randint(0, x.numel(), (400,), generator=torch.Generator().manual_seed(1))
    for i in some.tolist():
        p = float(chance.flatten()[i])
        kept = uniform32(KEY, i) < int(p * 2**32 + 0.5)
        got, value = float(out.flatten()[i]), float(x.flatten()[i])
        if not kept:
            assert got == 0.0
        elif rescale == "keep_rate":
            assert abs(got - value / p) <= 1e-6 * abs(got)
        else:
            assert got == value


def test_refused(core: ModuleType) -> None:
    x = torch.ones(4, 5)
    with pytest.raises(ValueError, match="whole rows"):
        run(core, x, 1, sparsify="magprune", density=0.5, epsilon=0.1, row=3)
    with pytest.raises(ValueError, match="outside of"):
        run(core, x, 1, sparsify="magprune", density=0.1, epsilon=0.2, row=5)
