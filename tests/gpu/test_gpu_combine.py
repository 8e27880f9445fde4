"""combine by the Triton kernel on a card: the bits of the eager reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_fast.ops import (
    Policy,
    combine,
    combine_,
    combine_many,
    combine_many_,
    keep_mask,
    stream_key,
)

pytestmark = pytest.mark.gpu

POLICIES = {
    "linear": Policy(difference=False, reduce="mean"),
    "linear_count": Policy(difference=False, reduce="mean", divisor="count"),
    "task_arithmetic": Policy(),
    "elect": Policy(elect="mass", reduce="mean"),
    "ties": Policy(sparsify="trim", elect="mass", reduce="mean"),
    "ties_whole_model": Policy(
        sparsify="trim",
        trim_scope="model",
        trim_ties="all",
        elect="mass",
        elect_on="unweighted",
        reduce="mean",
        divisor="count",
    ),
    "ties_frequency": Policy(
        sparsify="trim", trim_ties="none", elect="frequency", elect_on="unweighted"
    ),
    "ties_max": Policy(sparsify="trim", elect="mass", reduce="max"),
    "trim_l1": Policy(sparsify="trim", rescale="l1"),
    "dare_linear": Policy(sparsify="drop", rescale="l1"),
    "dare_plain": Policy(sparsify="drop", rescale="keep_rate", difference=False),
    "dare_ties": Policy(sparsify="drop", rescale="l1", elect="mass", reduce="mean"),
}
FEW = ("task_arithmetic", "ties", "dare_linear", "dare_ties")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LENGTHS = (100_003, 0, 1, 511, 513, 4096)
WEIGHTS = (0.7, 0.5, -0.25, 1.0, 0.3)
DENSITIES = (0.2, 0.37, 1.0, 0.5)


def bits(tensor: Tensor) -> Tensor:
    """The bits, every NaN alike."""
    tensor = torch.where(tensor.isnan(), torch.nan, tensor)
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def same(got: list[Tensor], want: list[Tensor]) -> None:
    for r, (one, other) in enumerate(zip(got, want, strict=True)):
        assert one.dtype == other.dtype
        assert one.device == other.device
        assert torch.equal(bits(one), bits(other)), r


def values(n: int, seed: int, dtype: torch.dtype, device: Any = "cuda") -> Tensor:
    g = torch.Generator(device).manual_seed(seed)
    return (0.02 * torch.randn(n, generator=g, device=device)).to(dtype)


def model(
    models: int, dtype: torch.dtype = torch.bfloat16, device: Any = "cuda"
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Bases and rows; some elements are equal, infinite, denormal or no number."""
    bases, rows = [], []
    for r, n in enumerate(LENGTHS):
        base = values(n, 1000 * r, dtype, device)
        row = []
        for k in range(models):
            delta = 0.05 * values(n, 1000 * r + k + 1, torch.float32, device)
            x = (base.float() + delta).to(dtype)
            x[10:20] = base[10:20]
            if k == 1:
                x[20:30], x[30:40], x[40:50] = float("nan"), float("inf"), 1e-39
            row.append(x)
        bases.append(base)
        rows.append(row)
    return bases, rows


def arguments(name: str, models: int, rows: int) -> dict[str, Any]:
    policy = POLICIES[name]
    found: dict[str, Any] = {
        "policy": policy,
        "weights": [WEIGHTS[k % len(WEIGHTS)] for k in range(models)],
        "lam": 0.7,
    }
    if policy.sparsify != "none":
        found["density"] = [DENSITIES[k % len(DENSITIES)] for k in range(models)]
    if policy.sparsify == "drop":
        found["keys"] = [
            [stream_key(7, f"model{k}", f"row{r}") for k in range(models)] for r in range(rows)
        ]
    return found


def run(
    name: str,
    bases: list[Tensor],
    rows: list[list[Tensor]],
    backend: str | None = "triton",
    **more: Any,
) -> list[Tensor]:
    given = bases if POLICIES[name].difference else None
    return combine_many(
        given, rows, backend=backend, **arguments(name, len(rows[0]), len(rows)), **more
    )


@pytest.mark.parametrize("name", POLICIES)
def test_the_bits_of_eager(name: str) -> None:
    bases, rows = model(3)
    got = run(name, bases, rows)
    same(got, run(name, bases, rows, "eager"))
    same(run(name, bases, rows), got)  # again: nothing depends on what ran first
    same(run(name, bases, rows, None), got)  # whoever serves by default


@pytest.mark.parametrize("models", [1, 5, 8, 9, 32])
@pytest.mark.parametrize("name", FEW)
def test_any_number_of_models(name: str, models: int) -> None:
    bases, rows = model(models)
    same(run(name, bases, rows), run(name, bases, rows, "eager"))


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("name", ["ties", "dare_linear"])
def test_dtypes(name: str, out_dtype: torch.dtype) -> None:
    for dtype in DTYPES:
        bases, rows = model(2, dtype)
        got = run(name, bases, rows, out_dtype=out_dtype)
        same(got, run(name, bases, rows, "eager", out_dtype=out_dtype))
    for models in (3, 10):
        bases, rows = model(models, torch.float32)
        rows = [
            [x.to(DTYPES[(r + k) % 3]) for k, x in enumerate(row)] for r, row in enumerate(rows)
        ]
        got = run(name, bases, rows, out_dtype=out_dtype)
        same(got, run(name, bases, rows, "eager", out_dtype=out_dtype))


def test_views() -> None:
    bases, rows = model(3)
    wide = [torch.stack([base, base], 1) for base in bases]
    for name in FEW:
        cut = [base[1:] for base in bases], [[x[1:] for x in row] for row in rows]
        same(run(name, *cut), run(name, *cut, "eager"))
        strided = [base[:, 0] for base in wide]
        same(run(name, strided, rows), run(name, bases, rows, "eager"))
    base, x = values(1, 0, torch.bfloat16).view(()), values(1, 1, torch.bfloat16).view(())
    got = combine(base, [x], weights=0.5, backend="triton")
    same([got], [combine(base, [x], weights=0.5, backend="eager")])


def test_in_place() -> None:
    for name in FEW:
        bases, rows = model(3)
        want = run(name, bases, rows, "eager")
        combine_many_(bases, rows, backend="triton", **arguments(name, 3, len(rows)))
        same(bases, want)
    bases, rows = model(3)
    want = combine(bases[0], rows[0], weights=0.3, backend="eager")
    assert combine_(bases[0], rows[0], weights=0.3, backend="triton") is bases[0]
    same([bases[0]], [want])


@pytest.mark.parametrize("name", FEW)
def test_graph(name: str) -> None:
    """Captured once, replayed on other numbers: no sync, and nothing that the host has to keep."""
    bases, rows = model(3)
    other_bases, other_rows = model(3, torch.float16)
    run(name, bases, rows)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = run(name, bases, rows)
    for _ in range(2):
        graph.replay()
        same(outs, run(name, bases, rows, "eager"))
        for target, source in zip(bases, other_bases, strict=True):
            target.copy_(source * 1.5)
        for targets, sources in zip(rows, other_rows, strict=True):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source * 0.75)
        torch.cuda.synchronize()


@pytest.mark.parametrize("name", FEW)
def test_stream(name: str) -> None:
    bases, rows = model(3)
    want = run(name, bases, rows, "eager")
    late = [torch.zeros_like(base) for base in bases]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what follows must wait for its own stream
        for target, source in zip(late, bases, strict=True):
            target.copy_(source)
        got = run(name, late, rows)
    stream.synchronize()
    same(got, want)


def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    for name in FEW:
        bases, rows = model(3, device="cuda:1")
        same(run(name, bases, rows), run(name, bases, rows, "eager"))


def test_no_sync() -> None:
    bases, rows = model(3)
    for name in FEW:
        run(name, bases, rows)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name in FEW:
            run(name, bases, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled() -> None:
    bases, rows = model(3)

    @torch.compile(fullgraph=True)
    def merged(base: Tensor, tensors: list[Tensor]) -> Tensor:
        return combine(base, tensors, weights=0.5, policy=POLICIES["ties"], density=0.3) + 1

    want = combine(
        bases[0], rows[0], weights=0.5, policy=POLICIES["ties"], density=0.3, backend="eager"
    )
    same([merged(bases[0], rows[0])], [want + 1])


def test_more_rows_than_one_search_step() -> None:
    lengths = [1 + r % 700 for r in range(5000)]
    bases = list(values(sum(lengths), 0, torch.bfloat16).split(lengths))
    rows = [list(values(sum(lengths), k, torch.bfloat16).split(lengths)) for k in (1, 2)]
    pairs = [list(pair) for pair in zip(*rows, strict=True)]
    got = torch.cat(combine_many(bases, pairs, weights=[0.7, 0.3], backend="triton"))
    want = combine(
        torch.cat(bases),
        [torch.cat([pair[k] for pair in pairs]) for k in (0, 1)],
        weights=[0.7, 0.3],
        backend="eager",
    )
    same([got], [want])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "drop", "trim"])
def test_more_than_2_31_elements(name: str, need_memory: Callable[[int], None]) -> None:
    n, at_least, key = 2**31 + 5000, 0.03, stream_key(1, "m", "t")
    need_memory((6 if name == "trim" else 4) * n + (2 << 30))
    part = values(1 << 20, 0, torch.float16)
    x = torch.empty(n, dtype=torch.float16, device="cuda")
    for start in range(0, n, part.numel()):
        x[start : start + part.numel()] = part[: n - start]
    base = None
    if name == "linear":
        policy, more = POLICIES["linear"], {}
    elif name == "drop":
        policy, more = POLICIES["dare_plain"], {"density": 0.25, "keys": [key]}
    else:
        policy = POLICIES["ties_whole_model"]
        code = int(torch.tensor(at_least).view(torch.int32))
        more = {"density": 0.25, "thresholds": [code]}
        base = torch.zeros_like(x)
    got = combine(base, [x], weights=0.7, policy=policy, backend="triton", **more)
    weight = torch.tensor(0.7, device="cuda")
    for start in (0, 2**31 - 2500, n - 5000):
        piece = x[start : start + 5000].float()
        if name == "linear":
            want = piece * weight / weight
        elif name == "drop":
            keep = keep_mask(key, 5000, 1 << 30, start=start, device="cuda")
            want = torch.where(keep, piece, 0.0) * torch.tensor(0.7 * 4.0, device="cuda")
        else:
            want = torch.where(piece.abs() >= at_least, piece, 0.0) * weight + 0.0
        same([got[start : start + 5000]], [want.half()])
