"""The kernel of anchors against the reference. Bfloat16 is only read: its casts are wrong here."""

from __future__ import annotations

import pytest
import torch
from cl_fast.triton_kernels import anchoring as kernels
from torch import Tensor

from cl_fast.ops import anchor_gradient_, anchor_pull_

SIZES = [(), (0,), (1,), (kernels.BLOCK,), (kernels.BLOCK + 5,), (3, 2 * kernels.BLOCK)]


def inputs(*dtypes: torch.dtype) -> list[list[Tensor]]:
    """g, w, a, F of several sizes; the last one starts at an address that is not aligned."""
    g = torch.Generator().manual_seed(0)
    lists: list[list[Tensor]] = []
    for dtype in dtypes:
        lists.append([torch.randn(size, generator=g).to(dtype) for size in SIZES])
        lists[-1].append(torch.randn(50, generator=g).to(dtype)[1:])
    lists[3] = [x.square() for x in lists[3]]
    return lists


@pytest.mark.parametrize("with_fisher", [False, True])
@pytest.mark.parametrize("written", [torch.float32, torch.float16])
@pytest.mark.parametrize("read", [torch.float32, torch.bfloat16])
def test_gradient(written: torch.dtype, read: torch.dtype, with_fisher: bool) -> None:
    g, w, a, f = inputs(written, read, torch.float32, read)
    want = [x.clone() for x in g]
    strengths = [0.1 * i for i in range(len(g))]
    fisher = f if with_fisher else None
    anchor_gradient_(want, w, a, fisher, strength=strengths, backend="eager")
    kernels.gradient(g, w, a, fisher or [], strengths)
    spacing = 2.0**-10 if written == torch.float16 else 1e-6
    torch.testing.assert_close(g, want, rtol=spacing, atol=1e-6)


@pytest.mark.parametrize("with_fisher", [False, True])
@pytest.mark.parametrize("written", [torch.float32, torch.float16])
def test_pull(written: torch.dtype, with_fisher: bool) -> None:
    _, w, a, f = inputs(written, written, torch.float32, torch.bfloat16)
    want = [x.clone() for x in w]
    strengths = [0.3 * i for i in range(len(w))]  # beyond 1 too
    fisher = f if with_fisher else None
    anchor_pull_(want, a, fisher, amount=strengths, backend="eager")
    kernels.pull(w, a, fisher or [], strengths)
    spacing = 2.0**-10 if written == torch.float16 else 1e-6
    torch.testing.assert_close(w, want, rtol=spacing, atol=1e-6)


def test_never_beyond_the_anchor_and_nan_stays() -> None:
    w, a = torch.randn(100), torch.randn(100)
    f = torch.ones(100)
    f[3] = float("nan")
    kernels.pull([w], [a], [f], [7.0])
    assert bool(w[3].isnan())
    w[3] = a[3]
    assert torch.equal(w, a)
