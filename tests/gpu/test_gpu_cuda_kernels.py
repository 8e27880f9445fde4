"""The CUDA C++ kernels on a card: the bits of the eager reference, and of the Triton kernels."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import test_gpu_combine as cases
import torch
from test_gpu_combine import DTYPES, FEW, POLICIES, run, same, values
from torch import Tensor

from cl_fast.backends import cuda, cuda_ops
from cl_fast.ops import (
    Policy,
    combine,
    combine_many,
    combine_many_,
    dare,
    keep_mask,
    keep_threshold,
    magnitude_threshold,
    pack,
    stream_key,
)
from cl_fast.ops.dropping import absolute_sum
from cl_fast.ops.policy import Divisor, Elect, ElectOn, Reduce, Rescale, Sparsify, TrimScope

pytestmark = pytest.mark.gpu

TIES = ("first", "all", "none")
SIZES = (1, 4095, 4097, 32_769, 1_000_003, 1 << 24)


@pytest.fixture(autouse=True)
def built(device: torch.device) -> None:
    """Skips without the kernels; fails without them under CL_FAST_REQUIRE_GPU=1."""
    why = cuda.reason()
    if not why and cuda.on_cpu():
        why = "the CUDA kernels are built for a processor"
    if why:
        if os.environ.get("CL_FAST_REQUIRE_GPU") == "1":
            pytest.fail(f"CL_FAST_REQUIRE_GPU=1, but: {why}", pytrace=False)
        pytest.skip(why)
    assert cuda.serves(device)


# ---- combine


@pytest.mark.parametrize("name", POLICIES)
def test_the_bits_of_eager_and_triton(name: str) -> None:
    bases, rows = cases.model(3)
    got = run(name, bases, rows, "cuda")
    same(got, run(name, bases, rows, "eager"))
    same(got, run(name, bases, rows, "triton"))
    same(run(name, bases, rows, "cuda"), got)  # again: nothing depends on what ran first


def policies() -> Iterator[Policy]:
    choices = (Sparsify, TrimScope, Rescale, Elect, ElectOn, Reduce, Divisor)
    seen = set()
    for number, (sparsify, scope, rescale, elect, on, reduce, divisor) in enumerate(
        itertools.product(*map(get_args, choices))
    ):
        given: dict[str, Any] = {"sparsify": sparsify, "rescale": rescale, "elect": elect}
        given |= {"reduce": reduce, "difference": number % 3 > 0}
        if sparsify == "trim":
            given["trim_scope"] = scope
            given["trim_ties"] = TIES[1 + number % 2 if scope == "model" else number % 3]
        if elect != "none":
            given["elect_on"] = on
        if reduce == "mean":
            given["divisor"] = divisor
        try:
            policy = Policy(**given)
        except ValueError:  # a combination without a meaning
            continue
        whole_l1 = policy.trim_scope == "model" and policy.rescale == "l1"
        if policy not in seen and not whole_l1:  # that one is for the reference only
            seen.add(policy)
            yield policy


def test_every_policy() -> None:
    found = list(policies())
    assert len(found) > 100
    for number, policy in enumerate(found):
        models = 1 + number % 5
        base, *tensors = (
            values(4099, 10 * number + k, DTYPES[(number + k) % 3]) for k in range(models + 1)
        )
        given: dict[str, Any] = {
            "weights": [0.5 - 0.3 * k for k in range(models)],
            "policy": policy,
            "density": 1.0 if policy.sparsify == "none" else 0.3,
            "keys": list(range(models)) if policy.sparsify == "drop" else None,
            "lam": 1.0 if number % 2 else 0.7,
            "out_dtype": DTYPES[number % 3],
        }
        start = base if policy.difference else None
        got = combine(start, tensors, backend="cuda", **given)
        same([got], [combine(start, tensors, backend="eager", **given)])


@pytest.mark.parametrize("models", [1, 2, 4, 5, 8, 9, 32])
@pytest.mark.parametrize("name", FEW)
def test_any_number_of_models(name: str, models: int) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        bases, rows = cases.model(models, dtype)
        same(run(name, bases, rows, "cuda"), run(name, bases, rows, "eager"))


@pytest.mark.parametrize("name", FEW)
def test_many_rows_of_mixed_dtypes(name: str) -> None:
    """More rows than one launch describes; views that begin anywhere."""
    bases, rows = [], []
    for r in range(500):
        n = 1 + 37 * r % 6007
        base, *row = (
            values(n + r % 4, 10 * r + k, DTYPES[(r + k * (r % 5 > 2)) % 3]) for k in range(4)
        )
        bases.append(base[r % 4 :])
        rows.append([x[r % 4 :] for x in row])
    got = run(name, bases, rows, "cuda")
    same(got, run(name, bases, rows, "eager"))
    same(got, run(name, bases, rows, "triton"))


def test_in_place() -> None:
    for name in FEW:
        bases, rows = cases.model(3)
        want = run(name, bases, rows, "eager")
        combine_many_(bases, rows, backend="cuda", **cases.arguments(name, 3, len(rows)))
        same(bases, want)
    bases, rows = cases.model(11)  # in groups of models
    want = run("ties", bases, rows, "eager")
    combine_many_(bases, rows, backend="cuda", **cases.arguments("ties", 11, len(rows)))
    same(bases, want)


PACKED = (
    Policy(sparsify="drop"),
    Policy(sparsify="drop", elect="mass", reduce="mean"),
    Policy(sparsify="drop", elect="frequency", elect_on="unweighted", reduce="max"),
)


@pytest.mark.parametrize("policy", PACKED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed(dtype: torch.dtype, policy: Policy) -> None:
    """Packed finetuned values, packed deltas and dense tensors, few and many, in one call."""
    for models in (2, 5):
        bases, rows = cases.model(models, dtype)
        mixed: list[list[Any]] = []
        for base, row in zip(bases, rows, strict=True):
            under = [base, None, base]
            mixed.append(
                [
                    x if k == 3 else pack(x, density=0.1 + 0.2 * k, seed=k, base=under[k % 3])
                    for k, x in enumerate(row)
                ]
            )
        weights = [0.7 - 0.4 * k for k in range(models)]

        def merged(
            backend: str,
            bases: list[Tensor] = bases,
            mixed: list[list[Any]] = mixed,
            weights: list[float] = weights,
        ) -> list[Tensor]:
            return combine_many(bases, mixed, weights=weights, policy=policy, backend=backend)

        same(merged("cuda"), merged("eager"))
        same(merged("cuda"), merged("triton"))


# ---- magnitude_threshold, dare, sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_magnitude_threshold(n: int, dtype: torch.dtype) -> None:
    """Differences of rounded weights have many ties; tensors on their own have few."""
    base = values(n, n, torch.float32)
    x = (base + 0.005 * values(n, n + 1, torch.float32)).to(dtype)
    base = base.to(dtype)
    for given in (None, base):
        for k in sorted({0, 1, max(1, n // 5), n - n // 5, n}):
            for ties in TIES:
                got = magnitude_threshold(x, k=k, base=given, ties=ties, backend="cuda")
                want = magnitude_threshold(x, k=k, base=given, ties=ties, backend="eager")
                other = magnitude_threshold(x, k=k, base=given, ties=ties, backend="triton")
                for one in (want, other):
                    assert torch.equal(got[0], one[0]), (k, ties)
                    assert torch.equal(got[1], one[1]), (k, ties)


def test_magnitudes_that_mislead_the_sample() -> None:
    """One value nearly everywhere, rare outliers, nothing but zeros, everything sorted."""
    n = 3_000_001
    rare = torch.full((n,), 0.25, device="cuda")
    rare[::100_003] = 8.0
    rare[1::200_003] = float("nan")
    ramp = torch.arange(n, dtype=torch.float32, device="cuda")
    for x in (rare, torch.zeros(n, device="cuda"), ramp, ramp.flip(0)):
        for k in (1, 14, 15, 30, 31, n // 2, n - 1, n):
            for ties in TIES:
                got = magnitude_threshold(x, k=k, ties=ties, backend="cuda")
                want = magnitude_threshold(x, k=k, ties=ties, backend="eager")
                assert torch.equal(got[0].view(torch.int32), want[0].view(torch.int32)), (k, ties)
                assert torch.equal(got[1], want[1]), (k, ties)


@pytest.mark.parametrize("rescale", ["keep_rate", "none", "l1"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dare(dtype: torch.dtype, rescale: str) -> None:
    for n in (0, 1, 15, 4095, 100_003, 9_000_001):
        x = values(n, n, dtype)
        for density in (0.1, 0.9, 1.0, 1e-12):
            more: dict[str, Any] = {"density": density, "seed": n, "rescale": rescale}
            got = dare(x, backend="cuda", **more)
            same([got], [dare(x, backend="eager", **more)])
            same([got], [dare(x, backend="triton", **more)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums(dtype: torch.dtype) -> None:
    """The bits of the reference, around the ends of chunks and of blocks."""
    lengths = (1, 16, 65_535, 65_536, 65_537, 200_000, 0, 33 * 65_536 + 5)
    bases = [values(n, n, dtype) for n in lengths]
    tensors = [values(n, n + 1, dtype) for n in lengths]
    keys = [stream_key(0, "m", str(n)) for n in lengths]
    keeps = [keep_threshold(0.3), 1 << 32] * 4
    ds = [x.float() - b.float() for x, b in zip(tensors, bases, strict=True)]
    levels = torch.stack([values(1, 0, torch.float32).abs().view(torch.int32)[0]] * len(lengths))
    masks = [
        torch.ones_like(d, dtype=torch.bool)
        if keep == 1 << 32
        else keep_mask(key, d.numel(), keep, device="cuda")
        for d, key, keep in zip(ds, keys, keeps, strict=True)
    ]
    above = [d.abs().view(torch.int32) > levels[0] for d in ds]
    for more, kept in (({"keys": keys, "keeps": keeps, "codes": None}, masks),
                       ({"keys": None, "keeps": None, "codes": levels}, above)):  # fmt: skip
        totals, some = cuda_ops.absolute_sums(bases, tensors, 1, **more)
        for r, (d, mask) in enumerate(zip(ds, kept, strict=True)):
            assert float(totals[r]) == absolute_sum(d.cpu())
            assert float(some[r]) == absolute_sum(torch.where(mask, d, 0.0).cpu())


# ---- graphs, streams, size


@pytest.mark.parametrize("name", FEW)
def test_graph(name: str) -> None:
    """Captured once, replayed on other numbers: the arguments of the launches are all it keeps."""
    bases, rows = cases.model(3)
    other_bases, other_rows = cases.model(3, torch.float16)
    run(name, bases, rows, "cuda")  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = run(name, bases, rows, "cuda")
    for _ in range(2):
        graph.replay()
        same(outs, run(name, bases, rows, "eager"))
        for target, source in zip(bases, other_bases, strict=True):
            target.copy_(source * 1.5)
        for targets, sources in zip(rows, other_rows, strict=True):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source * 0.75)


def test_graph_of_a_selection() -> None:
    x, base, other = (values(1_000_003, seed, torch.bfloat16) for seed in range(3))

    def step(backend: str = "cuda") -> tuple[Tensor, Tensor]:
        return magnitude_threshold(x, k=60_000, base=base, backend=backend)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, step("eager"), strict=True))
        x.copy_(other)


@pytest.mark.parametrize("name", FEW)
def test_stream(name: str) -> None:
    bases, rows = cases.model(3)
    want = run(name, bases, rows, "eager")
    late = [torch.zeros_like(base) for base in bases]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what follows must wait for its own stream
        for target, source in zip(late, bases, strict=True):
            target.copy_(source)
        got = run(name, late, rows, "cuda")
    stream.synchronize()
    same(got, want)


def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    for name in FEW:
        bases, rows = cases.model(3, device="cuda:1")
        same(run(name, bases, rows, "cuda"), run(name, bases, rows, "eager"))


def test_no_sync() -> None:
    bases, rows = cases.model(3)
    for name in FEW:
        run(name, bases, rows, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name in FEW:
            run(name, bases, rows, "cuda")
        magnitude_threshold(rows[0][0], k=1000, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["drop", "trim"])
def test_more_than_2_31_elements(name: str, need_memory: Callable[[int], None]) -> None:
    n, key = 2**31 + 5000, stream_key(1, "m", "t")
    need_memory(4 * n + (2 << 30))
    x = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    x[-5:] = 2.0
    if name == "drop":
        policy = Policy(difference=False, sparsify="drop", rescale="keep_rate")
        got = combine(None, [x], weights=1.0, policy=policy, density=0.25, keys=[key],
                      backend="cuda")  # fmt: skip
        for start in (0, 2**31 - 2500, n - 5000):
            keep = keep_mask(key, 5000, 1 << 30, start=start, device="cuda")
            piece = x[start : start + 5000]
            assert torch.equal(got[start : start + 5000], torch.where(keep, piece * 4.0, 0.0))
        return
    for ties, at in (("first", n - 1005), ("all", n - 5), ("none", 0)):
        threshold, kept = magnitude_threshold(x, k=n - 1000, ties=ties, backend="cuda")
        assert (float(threshold), int(kept)) == (1.0, at)
    codes, cuts, _ = cuda_ops.select([], [x], 1, [n - 1000], whole_model=False, ties="first")
    assert (int(codes), int(cuts)) == (0x3F800000, n - 1005)
    totals, some = cuda_ops.absolute_sums([], [x], 1, keys=None, keeps=None, codes=codes)
    assert (float(totals), float(some)) == (float(n + 5), 10.0)
