"""The small products of the O-LoRA penalty in the core, on every instruction set."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from cl_fast.backends import orthogonal_ops

PAIRS = [(0, 0), (0, 1), (2, 2), (3, 3)]  # the second module has no past


@pytest.mark.parametrize("d", [1, 15, 16, 17, 100, 1024])
def test_products_and_gradients(core: ModuleType, d: int) -> None:
    g = torch.Generator().manual_seed(d)
    new = [torch.randn(r, d, generator=g) for r in (8, 3, 1, 11)]
    past = [torch.randn(r, d, generator=g) for r in (8, 5, 1, 4)]
    total = sum(new[m].size(0) * past[i].size(0) for m, i in PAIRS)
    got = orthogonal_ops.products(core, new, past, PAIRS, total)
    exact = torch.cat([(new[m].double() @ past[i].double().t()).reshape(-1) for m, i in PAIRS])
    size = torch.cat(
        [(new[m].double().abs() @ past[i].double().abs().t()).reshape(-1) for m, i in PAIRS]
    )
    # sixteen lanes: d / 16 sums in a lane, then sixteen, and the rounding of each product
    assert ((got.double() - exact).abs() <= (d / 16 + 18) * 2.0**-24 * size).all()

    factor = torch.randn(total, generator=g)
    targets = {m: torch.full_like(new[m], 7.0) for m in (0, 1, 3)}  # the third is not wanted
    orthogonal_ops.gradients(core, factor, new, past, PAIRS, targets)
    assert not targets[1].any()
    blocks = factor.split([new[m].size(0) * past[i].size(0) for m, i in PAIRS])
    for wanted in (0, 3):
        want, size = torch.zeros(2, *new[wanted].shape, dtype=torch.float64)
        terms = 0
        for (m, i), block in zip(PAIRS, blocks, strict=True):
            if m == wanted:
                f = block.view(new[m].size(0), -1).double()
                want += f @ past[i].double()
                size += f.abs() @ past[i].double().abs()
                terms += past[i].size(0)
        assert ((targets[wanted].double() - want).abs() <= (terms + 1) * 2.0**-24 * size).all()


def test_the_same_bits_on_every_instruction_set(core: ModuleType) -> None:
    g = torch.Generator().manual_seed(0)
    new, past = [torch.randn(8, 777, generator=g)], [torch.randn(9, 777, generator=g)]
    got = orthogonal_ops.products(core, new, past, [(0, 0)], 72)
    before = core.isa()
    core.set_isa("portable")
    want = orthogonal_ops.products(core, new, past, [(0, 0)], 72)
    core.set_isa(before)
    assert torch.equal(got, want)
