"""Packed deltas as terms of a job: the bits of the dense tensors, on every instruction set."""

from __future__ import annotations

import array
from types import ModuleType
from typing import Any

import pytest
import torch

from cl_fast.ops.dropping import keep_mask

NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
NAMES |= {torch.float8_e4m3fn: "F8_E4M3"}
BLOCK, KEY, THRESHOLD = 65536, 0x0123456789ABCDEF, 3 << 29  # keeps 3 of 8


def made(n: int, dtype: torch.dtype, base_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Base, finetuned, mask, kept values."""
    draw = torch.Generator().manual_seed(n)
    base = torch.randn(n, generator=draw).to(base_dtype)
    tuned = (base.float() + 0.1 * torch.randn(n, generator=draw)).to(dtype)
    keep = keep_mask(KEY, n, THRESHOLD)
    return base, tuned, keep, tuned[keep].clone()


def blocks(keep: torch.Tensor) -> array.array[int]:
    ends = range(0, keep.numel() + BLOCK, BLOCK)
    return array.array("q", [int(keep[:end].sum()) for end in ends])


def source(
    base: torch.Tensor, values: torch.Tensor, offsets: array.array[int], as_: str, factor: float
) -> Any:
    address, length = offsets.buffer_info()
    return (
        (NAMES[values.dtype], values.data_ptr() or 1, -1, 0),
        KEY,
        THRESHOLD,
        address,
        length,
        factor,
        as_,
        (NAMES[base.dtype], base.data_ptr(), -1, 0),
    )


def run(
    core: ModuleType,
    base: torch.Tensor | None,
    terms: list[dict[str, Any]],
    n: int,
    threads: int = 1,
    **policy: Any,
) -> tuple[torch.Tensor, dict[str, Any]]:
    job = core.Job(threads=threads, tile_elements=BLOCK)
    out = torch.empty(n)
    task = job.add_task(
        n,
        "F32",
        out.data_ptr(),
        base=None if base is None else (NAMES[base.dtype], base.data_ptr(), -1, 0),
        difference=base is not None,
        **policy,
    )
    for term in terms:
        job.add_term(task, **term)
    job.run()
    return out, job.result(task)


def dense(x: torch.Tensor, **more: Any) -> dict[str, Any]:
    return {"dtype": NAMES[x.dtype], "ptr": x.data_ptr()} | more


@pytest.mark.parametrize("types", [(torch.bfloat16,) * 2, (torch.float8_e4m3fn, torch.bfloat16),
                                   (torch.float32, torch.float16)])  # fmt: skip
@pytest.mark.parametrize("n", [1, 63, 2049, 70_001])
def test_as_the_dense_tensors(
    core: ModuleType, n: int, types: tuple[torch.dtype, torch.dtype]
) -> None:
    """Masked where nothing selects, expanded where something does, as models, and as deltas."""
    base, tuned, keep, values = made(n, *types)
    factor, offsets = 2.5, blocks(keep)
    filled = torch.where(keep, tuned.float(), base.float())

    def packed(as_: str, **more: Any) -> dict[str, Any]:
        return {"dtype": "F32", "packed": source(base, values, offsets, as_, factor)} | more

    d = torch.where(keep, tuned.float() - base.float(), 0.0)
    got, result = run(core, base, [packed("parts", weight=0.5), dense(tuned)], n, threads=2)
    wanted = base.float() + (d * (0.5 * factor) + (tuned.float() - base.float()))
    assert torch.equal(got, wanted)
    assert result["crc_in"][1] == core.crc64(values.view(torch.uint8).numpy())
    assert result["rescale"] == [factor, 1.0]

    trim = {"sparsify": "trim", "elect": "mass", "reduce": "mean"}
    count = {"density": 0.2, "keep_count": max(1, n // 5)}
    got, _ = run(core, base, [packed("parts", **count)], n, threads=2, **trim)
    # One model: the mean of w r d over w is r d.
    plain, _ = run(core, base, [dense(filled, **count)], n, **trim)
    moved = torch.where(plain != base.float(), d, 0.0) * factor
    assert torch.equal(got, base.float() + moved)

    got, _ = run(core, None, [packed("model")], n)
    assert torch.equal(got, base.float() + d * factor)
    got, _ = run(core, None, [packed("delta")], n)
    assert torch.equal(got, d * factor)


def test_what_does_not_belong_together_is_refused(core: ModuleType) -> None:
    n = 70_001
    base, _, keep, values = made(n, torch.bfloat16, torch.bfloat16)
    right = blocks(keep)
    for wrong, error in (
        ([*right[:-1]], ValueError),
        ([1, *right[1:]], ValueError),
        ([0, right[2] + 1, right[2]], ValueError),
        ([0, 65_537, right[2]], ValueError),
        ([0, right[1] - 1, right[2]], OSError),
        ([0, right[1], right[2] - 1], OSError),
    ):
        for policy in ({}, {"sparsify": "trim"}):
            offsets = array.array("q", wrong)
            term = {
                "dtype": "BF16",
                "packed": source(base, values, offsets, "parts", 1.0),
                "density": 0.5 if policy else 1.0,
                "keep_count": 100,
            }
            with pytest.raises(error, match=r"packed source|random stream"):
                run(core, base, [term], n, **policy)


def test_a_run_is_packed(core: ModuleType) -> None:
    """pack_run: kept values, counts and sums, piece by piece."""
    n = 3 * BLOCK + 77
    base, tuned, keep, values = made(n, torch.bfloat16, torch.float16)
    found, counts, every, some = [], [], 0.0, 0.0
    for first in range(0, n, 2 * BLOCK):
        m = min(2 * BLOCK, n - first)
        out = torch.empty(m, dtype=tuned.dtype)
        number = torch.zeros(2, dtype=torch.int64)
        kept, every, some = core.pack_run(
            x=("BF16", tuned[first:].data_ptr()),
            base=("F16", base[first:].data_ptr()),
            key=KEY,
            threshold=THRESHOLD,
            first=first,
            n=m,
            values_ptr=out.data_ptr(),
            counts_ptr=number.data_ptr(),
            all=every,
            kept=some,
            threads=2,
        )
        found.append(out[:kept])
        counts += number[: -(-m // BLOCK)].tolist()
    assert torch.equal(torch.cat(found), values)
    assert counts == [int(keep[b : b + BLOCK].sum()) for b in range(0, n, BLOCK)]
    d = (tuned.float() - base.float()).double().abs()
    assert every == pytest.approx(float(d.sum()), rel=1e-12)
    assert some == pytest.approx(float(d[keep].sum()), rel=1e-12)
    with pytest.raises(ValueError, match="begins at a chunk"):
        core.pack_run(("BF16", 1), ("F16", 1), KEY, THRESHOLD, 5, 1, 1, 1, 0.0, 0.0, 1)
