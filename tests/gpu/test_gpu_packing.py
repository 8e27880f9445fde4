"""Packed deltas on a card: the host's masks and bits, graphs, streams, more than 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cl_fast.ops import Policy, combine, dare, keep_threshold, stream_key
from cl_fast.ops.packing import (
    PackedDelta,
    combine_packed,
    combine_packed_many,
    pack,
    unpack,
)

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LENGTHS = (0, 1, 15, 2047, 2048, 2049, 70_001, 5_000_003)
TIES = Policy(sparsify="drop", rescale="keep_rate", elect="mass", reduce="mean")
KEYS = [stream_key(k, f"model {k}", "w") for k in range(3)]
DENSITY = [0.1, 0.5, 0.9]
WEIGHTS = [1.0, -0.7, 0.3]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    a, b = a.cpu(), b.cpu()
    return bool(((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all())


def models(n: int, dtype: torch.dtype, k: int = 3) -> tuple[torch.Tensor, list[torch.Tensor]]:
    g = torch.Generator().manual_seed(n)
    base = 0.02 * torch.randn(n, generator=g)
    tensors = [(base + 0.001 * torch.randn(n, generator=g)).to(dtype) for _ in range(k)]
    return base.to(dtype), tensors


def packed_model(x: torch.Tensor, base: torch.Tensor | None, k: int, **more: str) -> PackedDelta:
    names = {"seed": k, "model": f"model {k}", "tensor": "w"}
    return pack(x, density=DENSITY[k], base=base, **names, **more)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
def test_layout_and_values_are_those_of_the_host(
    n: int, dtype: torch.dtype, device: torch.device
) -> None:
    base, (x,) = models(n, dtype, 1)
    for density in (1e-12, 1e-6, 0.1, 0.5, 0.9, 1.0 - 2.0**-32):
        for rescale in ("none", "keep_rate", "l1"):
            for holds in ("finetuned", "delta"):
                arguments = {"density": density, "rescale": rescale, "holds": holds}
                want = pack(x, base=base, **arguments)
                got = pack(x.to(device), base=base.to(device), **arguments)
                assert torch.equal(got.offsets.cpu(), want.offsets)
                assert same_bits(got.values, want.values)
                assert got.factor == want.factor
                under = base if holds == "finetuned" else None
                dense = unpack(want, base=under)
                on_device = unpack(got, base=None if under is None else under.to(device))
                assert same_bits(on_device, dense)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacked_has_the_bits_of_dare(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(100_003, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    x[::7] = -0.0
    x[5::1001] = float("nan")
    x[6::1001] = float("inf")
    for density in (0.1, 0.9):
        assert same_bits(unpack(pack(x, density=density)), dare(x, density=density))
    # a view that begins anywhere
    assert same_bits(unpack(pack(x[3:], density=0.3)), dare(x[3:].clone(), density=0.3))


def test_rounded_once_against_float64(device: torch.device) -> None:
    x = torch.randn(100_003, device=device).bfloat16()
    packed = pack(x, density=0.3)
    keep = unpack(packed, rescaled=False) != 0
    want = torch.where(keep, x.double() * (2.0**32 / packed.threshold), 0.0)
    error = (unpack(packed).double() - want).abs()
    # half a spacing of bfloat16, and the two roundings of float32 before it
    assert bool((error <= (2.0**-8 + 2.0**-21) * want.abs()).all())


POLICIES = (
    Policy(sparsify="drop", rescale="keep_rate"),
    Policy(sparsify="drop", rescale="keep_rate", reduce="mean", divisor="count"),
    TIES,
    Policy(
        sparsify="drop", rescale="keep_rate", elect="frequency", elect_on="unweighted",
        reduce="mean",
    ),
    Policy(sparsify="drop", rescale="keep_rate", elect="mass", reduce="max"),
)  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_has_the_bits_of_dense(
    dtype: torch.dtype, policy: Policy, device: torch.device
) -> None:
    for n in LENGTHS[:-1]:
        base, tensors = models(n, dtype)
        more = {"weights": WEIGHTS, "policy": policy, "lam": 0.6}
        want = combine(base, tensors, density=DENSITY, keys=KEYS, **more)
        on_device = [x.to(device) for x in tensors]
        packed = [packed_model(x, base.to(device), k) for k, x in enumerate(on_device)]
        got = combine_packed(base.to(device), packed, **more)
        assert same_bits(got, want)
        assert same_bits(combine_packed(base.to(device), packed, **more), got)
        mixed = [packed[0], on_device[1], packed[2]]
        want = combine(base, tensors, density=[0.1, 1.0, 0.9], keys=KEYS, **more)
        assert same_bits(combine_packed(base.to(device), mixed, **more), want)


def test_many_rows(device: torch.device) -> None:
    shapes = ((3, 7), (0,), (), (2049,), (70_001,), (64, 100))
    bases, rows, dense = [], [], []
    for shape in shapes:
        base, tensors = models(torch.Size(shape).numel(), torch.bfloat16)
        bases.append(base.view(shape))
        dense.append([x.view(shape) for x in tensors])
        rows.append([packed_model(x, bases[-1], k) for k, x in enumerate(dense[-1])])
    want = combine_packed_many(bases, rows, weights=WEIGHTS, policy=TIES)
    got = combine_packed_many(
        [base.to(device) for base in bases],
        [[packed.to(device) for packed in row] for row in rows],
        weights=WEIGHTS,
        policy=TIES,
    )
    for a, b in zip(got, want, strict=True):
        assert same_bits(a, b)
        assert a.shape == b.shape


def test_graph(device: torch.device) -> None:
    """Packing, unpacking and combining are captured: nothing of them syncs."""
    n = 200_003
    x, base = torch.randn(n, device=device), torch.randn(n, device=device)

    def step() -> tuple[torch.Tensor, ...]:
        finetuned = pack(x, density=0.3, seed=9, base=base)
        delta = pack(x, density=0.2, seed=10)
        merged = combine_packed(base, [finetuned, delta], weights=[1.0, 0.5], policy=TIES)
        return unpack(finetuned, base=base), unpack(delta), merged

    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step()
    x.copy_(torch.randn(n, device=device))
    base.copy_(torch.randn(n, device=device))
    graph.replay()
    torch.cuda.synchronize(device)
    for out, want in zip(outs, step(), strict=True):
        assert same_bits(out, want)


def test_graph_of_a_stream_that_was_never_met(device: torch.device) -> None:
    """The number of kept elements is counted on the host then."""
    x = torch.randn(50_001, device=device)
    unpack(pack(x, density=0.25, seed=11))  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = unpack(pack(x, density=0.25, seed=12))
    graph.replay()
    assert same_bits(out, dare(x, density=0.25, seed=12))


def test_no_sync_once_a_stream_is_known(device: torch.device) -> None:
    x = torch.randn(100_003, device=device).bfloat16()
    base = torch.randn(100_003, device=device).bfloat16()
    first = pack(x, density=0.3, seed=13, base=base)
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed = pack(x, density=0.3, seed=13, base=base)
        dense = unpack(packed, base=base)
        merged = combine_packed(base, [packed, x], weights=1.0, policy=TIES)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same_bits(packed.values, first.values)
    assert same_bits(dense, unpack(first, base=base))
    assert same_bits(merged, combine_packed(base, [first, x], weights=1.0, policy=TIES))


def test_another_stream(device: torch.device) -> None:
    x = torch.randn(1_000_003, device=device)
    want = unpack(pack(x, density=0.3))
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        got = unpack(pack(x, density=0.3))
    torch.cuda.current_stream(device).wait_stream(stream)
    assert same_bits(got, want)


def test_another_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x = torch.randn(100_003, device="cuda:1")
    with torch.cuda.device(0):
        packed = pack(x, density=0.3)
        merged = combine_packed(x, [packed], weights=1.0)
    assert packed.device == merged.device == x.device
    assert same_bits(unpack(packed), dare(x.cpu(), density=0.3))


def test_compile(device: torch.device) -> None:
    x = torch.randn(5000, device=device)
    base = torch.randn(5000, device=device)
    packed = pack(x, density=0.3, base=base)

    def step(base: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        merged = combine_packed(base, [packed, y], weights=[1.0, 0.5])
        return merged + unpack(packed, base=base)

    got = torch.compile(step, fullgraph=True)(base, x)
    assert torch.equal(got, step(base, x))


def test_gradient(device: torch.device) -> None:
    x = torch.randn(5000, device=device, dtype=torch.bfloat16, requires_grad=True)
    up = torch.randn(5000, device=device, dtype=torch.bfloat16)
    (unpack(pack(x, density=0.3)) * up).sum().backward()
    assert same_bits(x.grad, dare(up, density=0.3))


def test_more_than_2_31_elements(
    device: torch.device, need_memory: Callable[[int], None]
) -> None:
    n = 2**31 + 5000
    need_memory(16 * n)
    x = torch.ones(n, dtype=torch.bfloat16, device=device)
    x[-5000:] = 2.0
    threshold = keep_threshold(0.1)
    packed = pack(x, density=0.1, rescale="none", seed=21)
    out = unpack(packed)
    want = dare(x, density=0.1, rescale="none", seed=21)
    assert torch.equal(out, want)
    assert packed.threshold == threshold
    assert int((out != 0).sum()) == packed.values.numel()
    del want
    merged = combine_packed(
        None, [packed], weights=1.0, policy=Policy(difference=False, sparsify="drop")
    )
    assert torch.equal(merged, out)
