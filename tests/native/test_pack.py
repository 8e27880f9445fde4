"""The packed deltas of the core: equal to the plain torch of the drop, on every instruction set."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from cl_fast.backends import packed_ops
from cl_fast.ops.dropping import absolute_sum, keep_mask

KEY, T = 2**63 + 12345, (77 << 24) + 5


@pytest.mark.parametrize("n", [0, 1, 2047, 2049, 70_001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pack_and_back(core: ModuleType, n: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=g).to(dtype)
    keep = keep_mask(KEY, n, T)
    offsets = packed_ops.native_offsets(core, n, KEY, T, 2048)
    counts = [int(part.sum()) for part in keep.split(2048)] if n else []
    assert offsets.tolist() == [0, *torch.tensor(counts).cumsum(0).tolist()]
    values = packed_ops.native_pack(core, x, None, offsets, KEY, T, int(offsets[-1]), dtype)
    assert torch.equal(values, x[keep])
    back = packed_ops.native_unpack(core, values, None, offsets, KEY, T, [n], 1.0, dtype)
    assert torch.equal(back, torch.where(keep, x, 0.0))
    if n:
        sums = packed_ops.native_sums(core, x, None, dtype, KEY, T)
        wide = x.float()
        assert sums == (absolute_sum(wide), absolute_sum(torch.where(keep, wide, 0.0)))


@pytest.mark.parametrize("elect", ["none", "mass"])
def test_combine_from_kept_values(core: ModuleType, elect: str) -> None:
    n = 70_001
    g = torch.Generator().manual_seed(0)
    base = torch.randn(n, generator=g).bfloat16()
    models = [(base.float() + 0.05 * torch.randn(n, generator=g)).bfloat16() for _ in range(3)]
    masks = [keep_mask(KEY + k, n, T) for k in range(3)]
    terms = []
    offsets = [packed_ops.native_offsets(core, n, KEY + k, T, 2048) for k in range(3)]
    values = [x[keep] for x, keep in zip(models, masks, strict=True)]
    for k in range(3):
        place = ("BF16", values[k].data_ptr(), values[k].numel(), offsets[k].data_ptr(), KEY + k, T)
        terms.append((place, False, 0.5, 1.5, 3.0))
    out = torch.full((n,), 7.0)
    core.combine_packed(
        [(n, ("BF16", base.data_ptr()), 1.0, terms, "F32", out.data_ptr())],
        difference=True,
        elect=elect,
        vote_weighted=True,
        reduce="sum",
        divide_by_weights=True,
        lam=1.0,
        threads=2,
    )
    parts = [
        torch.where(keep, x.float() - base.float(), 0.0) * 1.5
        for x, keep in zip(models, masks, strict=True)
    ]
    if elect == "mass":
        plus = torch.zeros(n) + parts[0] + parts[1] + parts[2] >= 0
        parts = [torch.where(torch.where(plus, p > 0, p < 0), p, 0.0) for p in parts]
    assert torch.equal(out, base.float() + (parts[0] + parts[1] + parts[2]))
