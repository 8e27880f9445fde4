"""Packed deltas: masks, round trips, equal bits with dare and combine, gradients, bad input."""

from __future__ import annotations

import itertools
import re

import nasty
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from cl_fast.ops import Policy, combine, dare, keep_threshold, stream_key, streams
from cl_fast.ops.dropping import keep_mask
from cl_fast.ops.packing import (
    PACK_TILE,
    PackedDelta,
    _offsets_by,
    combine_packed,
    combine_packed_many,
    pack,
    unpack,
)

LENGTHS = (0, 1, 15, 2047, 2048, 2049, 70_001)
DENSITIES = (1e-12, 1e-6, 0.1, 0.5, 0.9, 1.0 - 2.0**-32)
NAMES = {"seed": 5, "model": "m", "tensor": "t"}
KEY = stream_key(5, "m", "t")
ops = torch.ops.cl_fast


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, where every NaN counts as the same."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    return bool(((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all())


def offsets_of(key: int, n: int, threshold: int, backend: str | None = None) -> torch.Tensor:
    device = torch.device("cpu")
    return _offsets_by(backend, device)(n, key, threshold, device)


# ---- the layout


def test_offsets_count_the_documented_stream(backend: str) -> None:
    """Against the scalar generator, one element at a time."""
    n = PACK_TILE + 700
    for key in (KEY, 2**64 - 1, 2**63 + 2**31):
        signed = key - (1 << 64) if key >= 1 << 63 else key
        for threshold in (0, 1, 1 << 24, keep_threshold(0.3), (1 << 32) - 1):
            mask = streams.keep_mask(key, 0, n, threshold)
            want = [0, sum(mask[:PACK_TILE]), sum(mask)]
            assert offsets_of(signed, n, threshold, backend).tolist() == want


@pytest.mark.parametrize("n", [*LENGTHS, 3 * 1024 * PACK_TILE // 2 + 5])
def test_offsets_agree(n: int, backend: str) -> None:
    for density in DENSITIES:
        threshold = keep_threshold(density)
        keep = keep_mask(KEY, n, threshold)
        want = [int(part.sum()) for part in keep.split(PACK_TILE)] if n else []
        offsets = offsets_of(KEY, n, threshold, backend)
        assert offsets.dtype == torch.int64
        assert offsets.diff().tolist() == want
        assert int(offsets[0]) == 0


@pytest.mark.parametrize("dtype", nasty.DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
def test_values_are_the_kept_elements(n: int, dtype: torch.dtype, backend: str) -> None:
    _, (x,) = nasty.models("normal", n, 1, dtype)
    for density in DENSITIES:
        packed = pack(x, density=density, **NAMES, backend=backend)
        keep = keep_mask(KEY, n, keep_threshold(density))
        assert same_bits(packed.values, x[keep])
        assert (packed.holds, packed.dtype, packed.shape) == ("delta", dtype, x.shape)
        assert (packed.key, packed.threshold) == (KEY, keep_threshold(density))
        assert packed.density == keep_threshold(density) / 2**32
        assert packed.numel == n


def test_offsets_are_made_anew() -> None:
    x = torch.randn(70, 100)
    packed = pack(x, density=0.3, **NAMES)
    again = PackedDelta(packed.values, x.shape, KEY, packed.threshold, packed.factor)
    assert torch.equal(again.offsets, packed.offsets)
    assert torch.equal(unpack(again), unpack(packed))
    moved = again.to("cpu")
    assert torch.equal(unpack(moved), unpack(packed))


def test_size() -> None:
    x = torch.zeros(1 << 20, dtype=torch.bfloat16)
    for density in (0.01, 0.1, 0.5):
        packed = pack(x, density=density)
        # six standard deviations of the count, and the offsets: 8 bytes per 2048 elements
        kept = density * x.numel() + 6.0 * (density * x.numel()) ** 0.5
        assert packed.nbytes <= 2.0 * kept + 8.0 * (x.numel() / PACK_TILE + 1)
        assert packed.nbytes <= 1.03 * density * x.nbytes + 8.0 * x.numel() / PACK_TILE + 8


# ---- unpack


@pytest.mark.parametrize("dtype", nasty.DTYPES)
@pytest.mark.parametrize("rescale", ["none", "keep_rate", "l1"])
def test_unpacked_has_the_bits_of_dare(rescale: str, dtype: torch.dtype, backend: str) -> None:
    cases = [*itertools.product(nasty.KINDS, (0, 1, 15, 2049)), ("heavy", 70_001)]
    for i, (kind, n) in enumerate(cases):
        _, (delta,) = nasty.models(kind, n, 1, dtype)
        for density in (1e-6, 0.1, 0.9)[i % 2 :]:
            packed = pack(delta, density=density, rescale=rescale, **NAMES, backend=backend)
            got = unpack(packed, backend=backend)
            want = dare(delta, density=density, rescale=rescale, **NAMES, backend="eager")
            assert same_bits(got, want), (kind, n, density)
            plain = unpack(packed, rescaled=False, backend=backend)
            want = dare(delta, density=density, rescale="none", **NAMES, backend="eager")
            assert same_bits(plain, want)


def test_drop_rate_is_one_minus_density(backend: str) -> None:
    x = torch.randn(1000)
    kept = pack(x, density=0.1, backend=backend)
    assert torch.equal(pack(x, drop_rate=0.9, backend=backend).values, kept.values)


def test_nasty_values(backend: str) -> None:
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, inf, -inf, -0.0, 0.0, 1e-45, 3e38] * 400)
    base = torch.tensor([inf, nan, 1.0, 0.0, -0.0] * 560)
    packed = pack(x, density=0.5, rescale="keep_rate", backend=backend)
    assert same_bits(unpack(packed, backend=backend), dare(x, density=0.5, backend="eager"))
    raw = unpack(packed, rescaled=False, backend=backend)
    assert (raw.signbit() & (raw == 0)).any(), "a kept -0.0 stays -0.0"
    finetuned = pack(x, density=0.5, base=base, rescale="none", backend=backend)
    keep = keep_mask(finetuned.key, x.numel(), finetuned.threshold)
    want = torch.where(keep, x - base, 0.0)
    assert same_bits(unpack(finetuned, base=base, backend=backend), want)


@pytest.mark.parametrize("base_dtype", nasty.DTYPES)
@pytest.mark.parametrize("x_dtype", nasty.DTYPES)
def test_with_a_base(x_dtype: torch.dtype, base_dtype: torch.dtype, backend: str) -> None:
    for n in (0, 17, 70_001):
        base, (x,) = nasty.models("normal", n, 1, torch.float32)
        base, x = base.to(base_dtype), x.to(x_dtype)
        exact = x.float() - base.float()
        for rescale in ("keep_rate", "l1"):
            arguments = {"density": 0.2, "rescale": rescale, **NAMES}
            want = dare(exact, **arguments, backend="eager")
            packed = pack(x, base=base, **arguments, backend=backend)
            assert packed.holds == "finetuned"
            assert same_bits(packed.values, x[keep_mask(KEY, n, packed.threshold)])
            got = unpack(packed, base=base, out_dtype=torch.float32, backend=backend)
            assert same_bits(got, want)
            # a delta that is rounded when packed is the dare of the rounded delta
            packed = pack(x, base=base, holds="delta", **arguments, backend=backend)
            want = dare(exact.to(x_dtype), **arguments, backend="eager")
            assert same_bits(unpack(packed, backend=backend), want)
            wide = pack(
                x, base=base, holds="delta", dtype=torch.float32, **arguments, backend=backend
            )
            assert same_bits(unpack(wide, backend=backend), dare(exact, **arguments))


def test_finetuned_needs_no_base_to_be_packed(backend: str) -> None:
    base, (x,) = nasty.models("normal", 3000, 1)
    packed = pack(x, density=0.3, holds="finetuned", backend=backend)
    assert same_bits(packed.values, pack(x, density=0.3, base=base).values)
    wide = pack(x, density=0.3, holds="finetuned", dtype=torch.float32, backend=backend)
    assert torch.equal(unpack(wide, base=base), unpack(packed, base=base, out_dtype=torch.float32))


@pytest.mark.parametrize("out_dtype", nasty.DTYPES)
@pytest.mark.parametrize("dtype", nasty.DTYPES)
def test_rounded_once(dtype: torch.dtype, out_dtype: torch.dtype, backend: str) -> None:
    _, (x,) = nasty.models("heavy", 5000, 1, dtype)
    x = x.clamp(-100, 100)
    packed = pack(x, density=0.37, **NAMES, backend=backend)
    got = unpack(packed, out_dtype=out_dtype, backend=backend).double().numpy()
    keep = keep_mask(KEY, 5000, packed.threshold)
    want = torch.where(keep, x.double() * (2.0**32 / packed.threshold), 0.0).numpy()
    half = 0.5 * np.maximum(oracle.spacing(want, out_dtype), oracle.spacing(got, out_dtype))
    # the factor as float32 and the product: two roundings before the last one
    assert (np.abs(got - want) <= half + 2.0**-22 * np.abs(want)).all()


def test_strides_and_point(backend: str) -> None:
    x = torch.randn(60, 41)
    base = torch.randn(41, 60).t()
    for holds in ("finetuned", "delta"):
        strided = pack(x.t(), density=0.5, base=base.t(), holds=holds, backend=backend)
        dense = pack(
            x.t().contiguous(), density=0.5, base=base.t().contiguous(), holds=holds,
            backend=backend,
        )  # fmt: skip
        assert torch.equal(strided.values, dense.values)
        assert strided.factor == dense.factor
    packed = pack(x.t(), density=0.5, holds="finetuned", backend=backend)
    wide = torch.randn(60, 41)
    want = unpack(packed, base=wide.t().contiguous(), backend=backend)
    assert torch.equal(unpack(packed, base=wide.t(), backend=backend), want)
    assert want.shape == (41, 60)
    assert want.is_contiguous()
    assert unpack(pack(x[0, 0], density=0.5, backend=backend), backend=backend).shape == ()
    assert unpack(pack(x[:0], density=0.5, backend=backend), backend=backend).shape == (0, 41)


def test_nothing_kept(backend: str) -> None:
    x = torch.randn(3000)
    for rescale in ("none", "keep_rate", "l1"):
        packed = pack(x, density=1e-12, rescale=rescale, backend=backend)
        assert (packed.threshold, packed.factor, packed.values.numel()) == (0, 1.0, 0)
        assert not unpack(packed, backend=backend).any()


@given(
    n=st.integers(0, 5000),
    density=st.floats(1e-4, 0.999),
    seed=st.integers(-(2**63), 2**63 - 1),
    cut=st.integers(0, 5000),
)
@settings(max_examples=30, deadline=None)
def test_properties(n: int, density: float, seed: int, cut: int) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)) + 10.0
    packed = pack(x, density=density, seed=seed, rescale="none")
    dense = unpack(packed)
    keep = dense != 0
    assert torch.equal(x[keep], packed.values)
    # packing what was unpacked changes nothing
    assert torch.equal(pack(dense, density=density, seed=seed).values, packed.values)
    # a prefix of the tensor keeps a prefix of the values
    head = pack(x[: min(cut, n)], density=density, seed=seed)
    assert torch.equal(head.values, packed.values[: head.values.numel()])


# ---- combine

POLICIES = {
    "sum": Policy(sparsify="drop"),
    "mean": Policy(sparsify="drop", reduce="mean"),
    "count": Policy(sparsify="drop", reduce="mean", divisor="count"),
    "ties": Policy(sparsify="drop", elect="mass", reduce="mean"),
    "unweighted": Policy(sparsify="drop", elect="mass", elect_on="unweighted", reduce="mean"),
    "frequency": Policy(sparsify="drop", elect="frequency", divisor="count", reduce="mean"),
    "max": Policy(sparsify="drop", elect="mass", elect_on="unweighted", reduce="max"),
}


def with_rescale(policy: Policy, rescale: str, difference: bool = True) -> Policy:
    fields = {name: getattr(policy, name) for name in Policy.__dataclass_fields__}
    return Policy(**{**fields, "rescale": rescale, "difference": difference})


KEYS = [stream_key(k, f"model {k}", "w") for k in range(4)]
DENSITY = [0.1, 0.5, 0.9, 0.3]
WEIGHTS = [1.0, -0.7, 0.3, 0.45]


def packed_models(
    tensors: list[torch.Tensor], base: torch.Tensor | None, rescale: str, backend: str, **more: str
) -> list[PackedDelta]:
    return [
        pack(
            x, density=DENSITY[k], seed=k, model=f"model {k}", tensor="w", base=base,
            rescale=rescale, backend=backend, **more,
        )
        for k, x in enumerate(tensors)
    ]  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("rescale", ["none", "keep_rate", "l1"])
def test_combine_has_the_bits_of_dense(name: str, rescale: str, backend: str) -> None:
    """Packed finetuned tensors give what combine gives for the dense ones."""
    policy = with_rescale(POLICIES[name], rescale)
    cases = [(kind, 2100, nasty.DTYPES[i % 3]) for i, kind in enumerate(nasty.KINDS)]
    if name == "ties":
        cases += [(kind, n, torch.bfloat16) for kind in nasty.KINDS for n in (0, 1, 2049)]
        cases += [("normal", 70_001, dtype) for dtype in nasty.DTYPES]
    for kind, n, dtype in cases:
        base, tensors = nasty.models(kind, n, 4, dtype)
        packed = packed_models(tensors, base, rescale, backend)
        for lam, out_dtype in ((1.0, None), (0.6, torch.float32)):
            more = {"weights": WEIGHTS, "policy": policy, "lam": lam, "out_dtype": out_dtype}
            want = combine(base, tensors, density=DENSITY, keys=KEYS, **more, backend="eager")
            got = combine_packed(base, packed, **more, backend=backend)
            assert same_bits(got, want), (kind, n, dtype, lam)


@pytest.mark.parametrize("name", POLICIES)
def test_combine_of_deltas_without_base(name: str, backend: str) -> None:
    policy = with_rescale(POLICIES[name], "keep_rate", difference=False)
    _, deltas = nasty.models("cancel", 5000, 4, torch.float16)
    packed = packed_models(deltas, None, "keep_rate", backend)
    want = combine(None, deltas, weights=WEIGHTS, policy=policy, density=DENSITY, keys=KEYS)
    got = combine_packed(None, packed, weights=WEIGHTS, policy=policy, backend=backend)
    assert same_bits(got, want)


@pytest.mark.parametrize("name", POLICIES)
def test_combine_of_mixtures(name: str, backend: str) -> None:
    """Packed finetuned tensors, packed deltas and dense tensors, of several dtypes, in one call."""
    policy = with_rescale(POLICIES[name], "keep_rate")
    base, tensors = nasty.models("normal", 5000, 4, torch.float32)
    base = base.bfloat16()
    tensors = [tensors[0].half(), tensors[1], tensors[2].bfloat16(), tensors[3].bfloat16()]
    delta = tensors[1] - base.float()
    packed = packed_models(tensors, base, "keep_rate", backend)
    packed[1] = pack(
        delta, density=DENSITY[1], seed=1, model="model 1", tensor="w", backend=backend
    )
    terms = [packed[0], packed[1], tensors[2], packed[3]]
    density = [DENSITY[0], DENSITY[1], 1.0, DENSITY[3]]
    want = combine(base, tensors, weights=WEIGHTS, policy=policy, density=density, keys=KEYS)
    got = combine_packed(base, terms, weights=WEIGHTS, policy=policy, backend=backend)
    assert same_bits(got, want)
    if backend == "eager":
        assert same_bits(combine(base, terms, weights=WEIGHTS, policy=policy), want)
    eight = tensors[2].to(torch.float8_e4m3fn)
    want = combine(
        base, [tensors[0], eight], weights=1.0, policy=policy, density=[DENSITY[0], 1.0],
        keys=KEYS[:2],
    )  # fmt: skip
    got = combine_packed(base, [packed[0], eight], weights=1.0, policy=policy, backend=backend)
    assert same_bits(got, want)


def test_dense_tensors_alone(backend: str) -> None:
    base, tensors = nasty.models("normal", 3000, 3)
    policy = Policy(elect="mass", reduce="mean")
    want = combine(base, tensors, weights=0.5, policy=policy)
    got = combine_packed(base, tensors, weights=0.5, policy=policy, backend=backend)
    assert same_bits(got, want)


def test_combine_of_nasty_values(backend: str) -> None:
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, inf, -inf, -0.0, 0.0, 1e-45, 3e38] * 400)
    base = torch.tensor([inf, nan, 1.0, 0.0, -0.0] * 560)
    packed = packed_models([x, x.flip(0)], base, "keep_rate", backend)
    for policy in POLICIES.values():
        policy = with_rescale(policy, "keep_rate")
        want = combine(
            base, [x, x.flip(0)], weights=[1.0, -2.0], policy=policy, density=DENSITY[:2],
            keys=KEYS[:2], backend="eager",
        )  # fmt: skip
        got = combine_packed(base, packed, weights=[1.0, -2.0], policy=policy, backend=backend)
        assert same_bits(got, want)


def test_many_rows(backend: str) -> None:
    policy = with_rescale(POLICIES["ties"], "keep_rate")
    bases, rows, dense = [], [], []
    for shape in ((3, 7), (0,), (), (2049,), (70_001,), (64, 100)):
        n = int(np.prod(shape))
        base, tensors = nasty.models("normal", n, 3)
        base, tensors = base.view(shape), [x.view(shape) for x in tensors]
        bases.append(base)
        dense.append(tensors)
        rows.append([*packed_models(tensors[:2], base, "keep_rate", backend), tensors[2]])
    weights = [[1.0, 0.5, 0.25 * r] for r in range(len(rows))]
    got = combine_packed_many(bases, rows, weights=weights, policy=policy, backend=backend)
    for base, tensors, row, by, out in zip(bases, dense, rows, weights, got, strict=True):
        one = combine_packed(base, row, weights=by, policy=policy, backend=backend)
        assert same_bits(out, one)
        want = combine(
            base, tensors, weights=by, policy=policy, density=[*DENSITY[:2], 1.0], keys=KEYS[:3]
        )
        assert same_bits(out, want)


def test_many_rows_without_base(backend: str) -> None:
    policy = Policy(difference=False, sparsify="drop")
    x = torch.randn(50, 60)
    packed = pack(x, density=0.3, backend=backend)
    got = combine_packed_many(None, [[packed], [x]], weights=2.0, policy=policy, backend=backend)
    assert torch.equal(got[0], unpack(packed) * 2.0)
    assert torch.equal(got[1], x * 2.0)


def test_more_models_than_the_kernels_take() -> None:
    x = torch.randn(100)
    packed = [pack(x, density=0.5, seed=k) for k in range(300)]
    policy = Policy(difference=False, sparsify="drop")
    out = combine_packed(None, packed, weights=1.0, policy=policy)
    assert torch.equal(
        out, combine_packed(None, packed, weights=1.0, policy=policy, backend="eager")
    )


def test_threads_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tensors = nasty.models("normal", 300_000, 3)
    results = []
    for threads in ("1", "3", "8"):
        monkeypatch.setenv("CL_FAST_THREADS", threads)
        packed = packed_models(tensors, base, "l1", None)  # type: ignore[arg-type]
        merged = combine_packed(base, packed, weights=WEIGHTS[:3], policy=POLICIES["ties"])
        results.append((packed[0].values, packed[0].factor, unpack(packed[1], base=base), merged))
    for values, factor, delta, merged in results[1:]:
        assert torch.equal(values, results[0][0])
        assert factor == results[0][1]
        assert torch.equal(delta, results[0][2])
        assert torch.equal(merged, results[0][3])


# ---- torch


def test_opcheck() -> None:
    n, threshold = 2500, keep_threshold(0.3)
    device = torch.device("cpu")
    torch.library.opcheck(ops.packed_offsets, (n, -5, threshold, device))
    at = offsets_of(-5, n, threshold)
    kept = int(at[-1])
    for dtype in (*nasty.DTYPES, torch.float64):
        for grad in (False, True):
            x = torch.randn(50, 50).t().to(dtype).requires_grad_(grad)
            base = torch.randn(50, 50).to(dtype).requires_grad_(grad)
            values = torch.randn(kept).to(dtype).requires_grad_(grad)
            stream = (at, -5, threshold)
            torch.library.opcheck(ops.pack_values, (x, None, *stream, kept, dtype))
            torch.library.opcheck(ops.pack_values, (x, base, *stream, kept, torch.float32))
            arguments = (*stream, [50, 50], 1.5)
            torch.library.opcheck(ops.unpack_values, (values, None, *arguments, dtype))
            torch.library.opcheck(ops.unpack_values, (values, base, *arguments, torch.float32))


def test_opcheck_combine() -> None:
    x, base = torch.randn(50, 50), torch.randn(50, 50).bfloat16()
    packed = pack(x, density=0.3)
    nothing = torch.empty(0, dtype=torch.int64)
    key = packed.key - (1 << 64) if packed.key >= 1 << 63 else packed.key
    rest = (
        [key, 0], [packed.threshold, 0], [1.5, 1.0], [1, 0], [1.0, 0.5],
        "mass", "weighted", "mean", "weights", 0.5, None,
    )  # fmt: skip
    entries = ([packed.values, x], [packed.offsets, nothing])
    torch.library.opcheck(ops.combine_packed, (base, *entries, [50, 50], *rest))
    torch.library.opcheck(ops.combine_packed_many, ([base], *entries, 2, [2500], *rest))


@pytest.mark.parametrize("density", [1e-12, 0.4])
def test_gradients(density: float) -> None:
    torch.manual_seed(0)
    threshold = keep_threshold(density)
    at = offsets_of(7, 21, threshold)
    kept = int(at[-1])
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    base = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    values = torch.randn(kept, dtype=torch.float64, requires_grad=True)

    def packing(x: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        return ops.pack_values(x, base, at, 7, threshold, kept, torch.float64)

    def unpacking(values: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        return ops.unpack_values(values, base, at, 7, threshold, [3, 7], 2.5, torch.float64)

    for f, arguments in ((packing, (x, base)), (unpacking, (values, base))):
        if kept or f is unpacking:
            assert torch.autograd.gradcheck(f, arguments)
            assert torch.autograd.gradgradcheck(f, arguments)


def test_gradient_of_pack_and_unpack_is_that_of_dare() -> None:
    x = torch.randn(5000, dtype=torch.bfloat16, requires_grad=True)
    up = torch.randn(5000, dtype=torch.bfloat16)
    (unpack(pack(x, density=0.3)) * up).sum().backward()
    assert same_bits(x.grad, dare(up, density=0.3))


def test_combine_has_no_gradient_and_says_so() -> None:
    packed = pack(torch.randn(100, requires_grad=True), density=0.5)
    policy = Policy(difference=False, sparsify="drop")
    out = combine_packed(None, [packed], weights=1.0, policy=policy)
    with pytest.raises(RuntimeError, match=r"backward.*cl_fast[.:]+combine_packed"):
        out.sum().backward()


def test_compile_fullgraph() -> None:
    base, (x, y) = nasty.models("normal", 5000, 2, torch.float32)
    packed = pack(x, density=0.3, base=base)

    def step(base: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        merged = combine_packed(base, [packed, y], weights=[1.0, 0.5])
        (again,) = combine_packed_many([base], [[packed, y]], weights=[1.0, 0.5])
        return merged + again + unpack(packed, base=base)

    got = torch.compile(step, fullgraph=True, backend="aot_eager")(base, y)
    assert torch.equal(got, step(base, y))


def test_compile_with_gradient() -> None:
    packed = pack(torch.randn(3000), density=0.3)

    def loss(values: torch.Tensor) -> torch.Tensor:
        dense = ops.unpack_values(
            values, None, packed.offsets, 3, packed.threshold, [3000], 2.0, torch.float32
        )
        return (dense**2).sum()

    at = offsets_of(3, 3000, packed.threshold)
    packed = PackedDelta(torch.randn(int(at[-1])), (3000,), 3, packed.threshold)
    a = packed.values.clone().requires_grad_()
    b = packed.values.clone().requires_grad_()
    loss(a).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(b).backward()
    assert torch.equal(a.grad, b.grad)


def test_fake() -> None:
    with FakeTensorMode():
        at = ops.packed_offsets(5000, 1, 1 << 30, torch.device("cpu"))
        assert (at.shape, at.dtype) == ((4,), torch.int64)
        x = torch.empty(50, 100, dtype=torch.bfloat16)
        values = ops.pack_values(x, None, at, 1, 1 << 30, 1200, torch.float16)
        assert (values.shape, values.dtype) == ((1200,), torch.float16)
        out = ops.unpack_values(values, None, at, 1, 1 << 30, [50, 100], 1.0, torch.float32)
        assert (out.shape, out.dtype) == ((50, 100), torch.float32)


def test_without_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5000)
    want = pack(x, density=0.3, rescale="l1")
    dense = unpack(want)
    monkeypatch.setenv("CL_FAST_NATIVE", "0")
    got = pack(x, density=0.3, rescale="l1")
    assert torch.equal(got.values, want.values)
    assert got.factor == want.factor
    assert torch.equal(unpack(got), dense)


# ---- bad input

X = torch.randn(3000)
GOOD = pack(X, density=0.5)
FINETUNED = pack(X, density=0.5, holds="finetuned")
DROP = Policy(sparsify="drop")
SUM = Policy(difference=False, sparsify="drop")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ValueError, "exactly one of density and drop_rate"),
        ({"density": 0.5, "drop_rate": 0.5}, ValueError, "exactly one of density and drop_rate"),
        ({"density": 0.0}, ValueError, "density must be in (0, 1]; got 0.0"),
        ({"density": float("nan")}, ValueError, "density must be in (0, 1]; got nan"),
        ({"density": 1.0}, ValueError, "keeps every element"),
        ({"drop_rate": 1e-12}, ValueError, "keeps every element"),
        ({"drop_rate": 1.0}, ValueError, "drop_rate must be in [0, 1); got 1.0"),
        ({"density": 0.5, "rescale": "L1"}, ValueError, "rescale must be one of 'none'"),
        ({"density": 0.5, "holds": "base"}, ValueError, "holds must be 'finetuned' or 'delta'"),
        ({"density": 0.5, "seed": 1.5}, TypeError, "seed must be an int"),
        ({"density": 0.5, "model": 3}, TypeError, "model must be a str"),
        ({"density": 0.5, "x": X.long()}, TypeError, "x must have one of the dtypes"),
        ({"density": 0.5, "x": X.double()}, TypeError, "x must have one of the dtypes"),
        ({"density": 0.5, "x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"density": 0.5, "dtype": torch.int8}, TypeError, "dtype must have one of the dtypes"),
        ({"density": 0.5, "base": X[:5]}, ValueError, "base must have the shape of x, (3000,)"),
        ({"density": 0.5, "base": X.to("meta")}, ValueError, "base must be on the device of x"),
        (
            {"density": 0.5, "rescale": "l1", "holds": "finetuned"},
            ValueError,
            "base must be given for rescale='l1'",
        ),
        (
            {"density": 0.5, "holds": "finetuned", "dtype": torch.bfloat16},
            ValueError,
            "dtype must hold every value of x",
        ),
        (
            {"density": 0.5, "rescale": "l1", "x": X * float("inf")},
            ValueError,
            "x must be finite for rescale='l1'",
        ),
    ],
)
def test_bad_pack(arguments: dict, error: type[Exception], words: str, backend: str) -> None:
    x = arguments.get("x", X)
    rest = {name: value for name, value in arguments.items() if name != "x"}
    for chosen in (backend, None):
        with pytest.raises(error, match=re.escape(words)):
            pack(x, **rest, backend=chosen)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"values": GOOD.values[1:]}, ValueError, "values must hold the"),
        ({"values": torch.zeros(5000)}, ValueError, "values must hold the"),
        ({"values": GOOD.values.double()}, TypeError, "values must have one of the dtypes"),
        ({"values": [1.0]}, TypeError, "values must be a torch.Tensor"),
        ({"values": GOOD.values[None]}, ValueError, "values must have one dimension"),
        ({"key": 1 << 64}, ValueError, "key must be a 64-bit integer"),
        ({"key": -(1 << 63) - 1}, ValueError, "key must be a 64-bit integer"),
        ({"key": 1.0}, TypeError, "key must be an int"),
        ({"threshold": 1 << 32}, ValueError, "threshold must be in [0, 2^32)"),
        ({"threshold": -1}, ValueError, "threshold must be in [0, 2^32)"),
        ({"threshold": True}, TypeError, "threshold must be an int"),
        ({"factor": 0.0}, ValueError, "factor must be a positive number of float32"),
        ({"factor": float("nan")}, ValueError, "factor must be a positive number of float32"),
        ({"factor": float("inf")}, ValueError, "factor must be a positive number of float32"),
        ({"factor": "1"}, TypeError, "factor must be a number"),
        ({"holds": "nothing"}, ValueError, "holds must be 'finetuned' or 'delta'; got 'nothing'"),
        ({"shape": (2999,)}, ValueError, "values must hold the"),
        ({"offsets": GOOD.offsets[1:]}, ValueError, "offsets must have the shape (3,)"),
        ({"offsets": GOOD.offsets.int()}, TypeError, "offsets must have the dtype int64"),
        ({"offsets": GOOD.offsets.to("meta")}, ValueError, "offsets must be on cpu; got meta"),
    ],
)
def test_bad_packed_delta(arguments: dict, error: type[Exception], words: str) -> None:
    names = ("values", "shape", "key", "threshold", "factor", "holds")
    fields = {name: getattr(GOOD, name) for name in names} | arguments
    with pytest.raises(error, match=re.escape(words)):
        PackedDelta(**fields)


@pytest.mark.parametrize(
    ("packed", "arguments", "error", "words"),
    [
        (FINETUNED, {}, ValueError, "base must be given"),
        (GOOD, {"base": X}, ValueError, "base has no effect on packed deltas"),
        (FINETUNED, {"base": X[1:]}, ValueError, "base must have the shape of the packed delta"),
        (FINETUNED, {"base": X.long()}, TypeError, "base must have one of the dtypes"),
        (FINETUNED, {"base": X.to("meta")}, ValueError, "base must be on the device of the packed"),
        (GOOD, {"out_dtype": torch.int8}, TypeError, "out_dtype must have one of the dtypes"),
        (X, {}, TypeError, "packed must be a PackedDelta, got Tensor"),
    ],
)
def test_bad_unpack(
    packed: PackedDelta, arguments: dict, error: type[Exception], words: str, backend: str
) -> None:
    for chosen in (backend, None):
        with pytest.raises(error, match=re.escape(words)):
            unpack(packed, **arguments, backend=chosen)


@pytest.mark.parametrize(
    ("base", "tensors", "arguments", "error", "words"),
    [
        (X, [], {}, ValueError, "tensors must hold at least one tensor"),
        (X, GOOD, {}, TypeError, "tensors must be a list, one entry per model, got one tensor"),
        (X, [1.0], {}, TypeError, "tensors[0] must be a torch.Tensor or a PackedDelta, got float"),
        (None, [GOOD], {}, ValueError, "base must be given, since policy.difference is True"),
        (None, [FINETUNED], {"policy": SUM}, ValueError, "base must be given: tensors[0] holds"),
        (X, [GOOD], {"policy": SUM}, ValueError, "base has no effect with policy.difference=False"),
        (X, [GOOD], {"policy": Policy()}, ValueError, "policy.sparsify must be 'drop' with packed"),
        (X, [X], {"policy": Policy(sparsify="trim")}, ValueError, "policy.sparsify must be 'drop'"),
        (X, [GOOD], {"policy": "ties"}, TypeError, "policy must be a cl_fast.ops.Policy"),
        (X[:5], [GOOD], {}, ValueError, "tensors[0] must have the shape of base, (5,)"),
        (X, [GOOD, X[:5]], {}, ValueError, "tensors[1] must have the shape of base, (3000,)"),
        (X.to("meta"), [GOOD], {}, ValueError, "tensors[0] must be on the device of base, meta"),
        (X.long(), [GOOD], {}, TypeError, "base must have one of the dtypes"),
        (X, [GOOD, X.long()], {}, TypeError, "tensors[1] must have one of the dtypes"),
        (X, [GOOD], {"weights": [1.0, 2.0]}, ValueError, "weights must have one entry per model"),
        (X, [GOOD], {"weights": float("nan")}, ValueError, "weights must be finite, got nan"),
        (X, [GOOD], {"lam": float("inf")}, ValueError, "lam must be finite, got inf"),
        (X, [GOOD], {"out_dtype": torch.int8}, TypeError, "out_dtype must be one of bfloat16"),
    ],
)
def test_bad_combine(
    base: torch.Tensor | None,
    tensors: list,
    arguments: dict,
    error: type[Exception],
    words: str,
    backend: str,
) -> None:
    given = {"weights": 1.0, "policy": DROP} | arguments
    for chosen in (backend, None):
        with pytest.raises(error, match=re.escape(words)):
            combine_packed(base, tensors, **given, backend=chosen)


def test_bad_rows(backend: str) -> None:
    with pytest.raises(ValueError, match="row 0 has 1, row 1 has 2"):
        combine_packed_many([X, X], [[GOOD], [GOOD, X]], weights=1.0, backend=backend)
    with pytest.raises(ValueError, match="base must be given for each of 2 tensors"):
        combine_packed_many([X], [[GOOD], [GOOD]], weights=1.0, backend=backend)
    with pytest.raises(ValueError, match=r"tensors\[0\] of row 1 must have the shape of base of"):
        combine_packed_many([X, X[:5]], [[GOOD], [GOOD]], weights=1.0, backend=backend)
    with pytest.raises(ValueError, match="at least one tensor"):
        combine_packed_many([], [], weights=1.0, backend=backend)


def test_wrong_offsets_do_not_decide_the_count() -> None:
    key = stream_key(0, "of no other", "test")
    at = torch.zeros(3, dtype=torch.int64)
    for _ in range(2):
        with pytest.raises(ValueError, match="values must hold the"):
            PackedDelta(torch.empty(0), (3000,), key, 1 << 31, offsets=at)


def test_wrong_offsets_are_refused(backend: str) -> None:
    """Offsets of another stream: told, and nothing is read beyond the values."""
    key = GOOD.key - (1 << 64) if GOOD.key >= 1 << 63 else GOOD.key
    wrong = [GOOD.offsets + 1, GOOD.offsets - 1, offsets_of(key, 3000, 1 << 30)]
    words = "offsets must be those of the stream of key and threshold"
    for at in wrong:
        bad = PackedDelta(GOOD.values, GOOD.shape, GOOD.key, GOOD.threshold, offsets=at)
        with pytest.raises(ValueError, match=words):
            unpack(bad, backend=backend)
        with pytest.raises(ValueError, match=words):
            combine_packed(X, [bad], weights=1.0, backend=backend)
        with pytest.raises(ValueError, match=words):
            ops.pack_values(X, None, at, key, GOOD.threshold, GOOD.values.numel(), torch.float32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((-1, 0, 0), "n must not be negative"),
        ((5, 0, 1 << 32), "threshold must be in [0, 2^32)"),
    ],
)
def test_ops_say_the_same_words_under_compile(arguments: tuple, words: str) -> None:
    def bad() -> torch.Tensor:
        return ops.packed_offsets(*arguments, torch.device("cpu"))

    with pytest.raises(ValueError, match=re.escape(words)):
        bad()
    with pytest.raises(Exception, match=re.escape(words)):
        torch.compile(bad, fullgraph=True, backend="aot_eager")()
