"""The packing kernels against the reference, and the op's CUDA path on tensors of the CPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from cl_fast.triton_kernels import packing as kernels

from cl_fast.ops import Policy, combine, keep_mask, keep_threshold, stream_key
from cl_fast.ops.packing import PackedDelta, combine_packed, combine_packed_many, pack, unpack

LENGTHS = (0, 1, 15, 2047, 2048, 2049, 4500)
THRESHOLDS = (0, 1, 1 << 24, keep_threshold(0.1), 1 << 31, keep_threshold(0.9), (1 << 32) - 1)
KEYS = (stream_key(3, "m", "t"), 2**64 - 1, 2**63 + 2**31)


def offsets_of(mask: torch.Tensor) -> list[int]:
    starts = range(0, mask.numel(), 2048)
    counts = [int(mask[first : first + 2048].sum()) for first in starts]
    return [sum(counts[:tile]) for tile in range(len(counts) + 1)]


def test_offsets() -> None:
    for n in LENGTHS:
        for key, threshold in zip(KEYS * 3, THRESHOLDS, strict=False):
            got = kernels.offsets(key, n, threshold, device="cpu")
            assert got.dtype == torch.int64
            assert got.tolist() == offsets_of(keep_mask(key, n, threshold))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pack_and_unpack(dtype: torch.dtype) -> None:
    for i, (n, threshold) in enumerate(itertools.product((0, 1, 15, 4500), THRESHOLDS)):
        if n in (0, 4500) or threshold in THRESHOLDS[3:5]:
            key = KEYS[i % 3]
            x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
            mask = keep_mask(key, n, threshold)
            at = kernels.offsets(key, n, threshold, device="cpu")
            kept = int(at[-1])
            values = kernels.pack(x, None, at, key, threshold, kept, dtype)
            assert torch.equal(values, x[mask])
            out = torch.full((n,), float("nan"))
            kernels.unpack(values, None, at, key, threshold, 1.5, out)
            assert torch.equal(out, torch.where(mask, x.float() * 1.5, 0.0))


def test_differences() -> None:
    n, key, threshold = 3000, KEYS[0], keep_threshold(0.3)
    at = kernels.offsets(key, n, threshold, device="cpu")
    kept, mask = int(at[-1]), keep_mask(key, n, threshold)
    for x_dtype in (torch.float32, torch.float16, torch.bfloat16):
        for base_dtype in (torch.float32, torch.float16, torch.bfloat16):
            x, base = torch.randn(n).to(x_dtype), torch.randn(n).to(base_dtype)
            want = x.float() - base.float()
            got = kernels.pack(x, base, at, key, threshold, kept, torch.float32)
            assert torch.equal(got, want[mask])
            out = torch.empty(n)
            kernels.unpack(x[mask], base, at, key, threshold, 0.7, out)
            factor = torch.tensor(0.7, dtype=torch.float32)
            assert torch.equal(out, torch.where(mask, want * factor, 0.0))


def test_nasty_values() -> None:
    n, key, threshold = 2100, KEYS[1], keep_threshold(0.5)
    mask = keep_mask(key, n, threshold)
    nasty = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-45])
    x = nasty[torch.arange(n) % 6]
    base = nasty[torch.arange(n) // 6 % 6]
    at = kernels.offsets(key, n, threshold, device="cpu")
    values = kernels.pack(x, None, at, key, threshold, int(at[-1]), torch.float32)
    assert torch.equal(values.view(torch.int32), x[mask].view(torch.int32))
    out = torch.empty(n)
    kernels.unpack(values, None, at, key, threshold, 1.0, out)
    want = torch.where(mask, x, 0.0)
    assert torch.equal(out.view(torch.int32), want.view(torch.int32))
    kernels.unpack(values, base, at, key, threshold, 1.0, out)
    torch.testing.assert_close(
        out, torch.where(mask, x - base, 0.0), rtol=0, atol=0, equal_nan=True
    )


def test_wrong_offsets_stay_inside() -> None:
    """Offsets of another stream give wrong numbers, never an access beyond the values."""
    n, key, threshold = 5000, KEYS[0], keep_threshold(0.5)
    at = kernels.offsets(key, n, threshold, device="cpu")
    kept = int(at[-1])
    x = torch.randn(n)
    for wrong in (at + kept, at - 10 * kept, at * 1000, torch.full_like(at, 2**40)):
        room = torch.full((kept + 2 * n,), 7.0)
        values = kernels.pack(x, None, wrong, key, threshold, kept, torch.float32)
        assert values.shape == (kept,)
        kernels.unpack(room[n : n + kept], None, wrong, key, threshold, 1.0, torch.empty(n))
        assert (room == 7.0).all()


def test_dispatch() -> None:
    """What the ops do on CUDA tensors, here on ones that the interpreter can read."""
    x, base = torch.randn(41, 60).t(), torch.randn(60, 41).half()
    for holds in ("finetuned", "delta"):
        for rescale in ("none", "keep_rate", "l1"):
            arguments = {"density": 0.3, "seed": 4, "rescale": rescale, "holds": holds}
            want = pack(x, base=base, **arguments, backend="eager")
            got = pack(x, base=base, **arguments, backend="triton")
            assert torch.equal(got.values, want.values)
            assert torch.equal(got.offsets, want.offsets)
            assert got.factor == want.factor
            under = base if holds == "finetuned" else None
            dense = unpack(want, base=under, backend="eager")
            assert torch.equal(unpack(want, base=under, backend="triton"), dense)


POLICIES = (
    Policy(sparsify="drop", rescale="keep_rate"),
    Policy(sparsify="drop", rescale="keep_rate", reduce="mean"),
    Policy(sparsify="drop", rescale="keep_rate", elect="mass", reduce="mean"),
    Policy(
        sparsify="drop", rescale="keep_rate", elect="frequency", elect_on="unweighted",
        reduce="mean", divisor="count",
    ),
    Policy(sparsify="drop", rescale="keep_rate", elect="mass", elect_on="unweighted", reduce="max"),
)  # fmt: skip


def packed_model(x: torch.Tensor, base: torch.Tensor, k: int, density: float) -> PackedDelta:
    return pack(x, density=density, seed=k, base=base, backend="eager")


@pytest.mark.parametrize("policy", POLICIES)
def test_combine(policy: Policy) -> None:
    """Packed and dense entries in one call: the bits of combine on dense tensors."""
    generator = torch.Generator().manual_seed(7)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for n in (1, 2049, 5000):
        base = torch.randn(n, generator=generator).bfloat16()
        tensors = [
            (base.float() + 0.1 * torch.randn(n, generator=generator)).to(dtype) for dtype in dtypes
        ]
        keys = [stream_key(k, "", "") for k in range(3)]
        terms = [
            packed_model(tensors[0], base, 0, 0.1), packed_model(tensors[1], base, 1, 0.9),
            tensors[2],
        ]  # fmt: skip
        more = {"weights": [1.0, -0.5, 0.7], "policy": policy, "lam": 0.8}
        more["out_dtype"] = torch.float32
        want = combine(
            base, tensors, density=[0.1, 0.9, 1.0], keys=keys, **more, backend="eager"
        )
        got = combine_packed(base, terms, **more, backend="triton")
        assert torch.equal(got.view(torch.int32), want.view(torch.int32)), n


def test_combine_of_deltas_and_rows() -> None:
    policy = Policy(difference=False, sparsify="drop", elect="mass", reduce="mean")
    deltas = [[torch.randn(n) for _ in range(2)] for n in (0, 3000, 17)]
    rows = [[pack(d, density=0.4, seed=k) for k, d in enumerate(row)] for row in deltas]
    want = combine_packed_many(None, rows, weights=[1.0, 0.5], policy=policy, backend="eager")
    got = combine_packed_many(None, rows, weights=[1.0, 0.5], policy=policy, backend="triton")
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    mixed = Policy(sparsify="drop")
    base = torch.randn(3000)
    terms = [rows[1][0], packed_model(base + deltas[1][1], base, 5, 0.5)]
    want_one = combine_packed(base, terms, weights=1.0, policy=mixed, backend="eager")
    got_one = combine_packed(base, terms, weights=1.0, policy=mixed, backend="triton")
    assert torch.equal(got_one, want_one)
