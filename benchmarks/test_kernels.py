"""The kernels in memory: `python -m pytest benchmarks/test_kernels.py --benchmark-enable`.

Each case verifies its result, then times it. `extra_info` holds GB/s (bytes that the work must
move), for selections G elements/s, and the share of a copy of the same machine in the same run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cl_fast.backends import native
from cl_fast.ops import Policy, combine_reference, trim_keep_count

core = native.load()
pytestmark = pytest.mark.skipif(core is None, reason=f"no C++ core: {native.reason()}")
N = 1 << 26  # 128 MiB of bfloat16 per tensor: far beyond the caches
THREADS = sorted({1, len(os.sched_getaffinity(0))})

CASES: dict[str, tuple[Policy, float]] = {
    "linear": (Policy(difference=False, reduce="mean"), 1.0),
    "task_arithmetic": (Policy(), 1.0),
    "dare_linear, keep rate": (Policy(sparsify="drop", rescale="keep_rate"), 0.1),
    "dare_linear, l1": (Policy(sparsify="drop", rescale="l1"), 0.1),
    "ties": (Policy(sparsify="trim", elect="mass", reduce="mean"), 0.2),
    "ties, all ties kept": (
        Policy(sparsify="trim", trim_ties="all", elect="mass", reduce="mean"), 0.2,
    ),
    "dare_ties": (Policy(sparsify="drop", rescale="l1", elect="mass"), 0.1),
}  # fmt: skip


@pytest.fixture(scope="module")
def tensors() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    base = torch.randn(N, generator=g).mul_(0.02).bfloat16()
    models = []
    for _ in range(3):
        d = torch.randn(N, generator=g).mul_(torch.randn(N, generator=g).mul_(0.7).exp_())
        models.append(d.mul_(4e-4).add_(base.float()).bfloat16())
    return [base, *models]


copy_bandwidth: dict[int, float] = {}


def record(benchmark: Any, run: Callable[[], object], amount: int, unit: str = "GB/s") -> float:
    benchmark.pedantic(run, rounds=7, warmup_rounds=1)
    if benchmark.disabled:
        return float("nan")
    rate = amount / benchmark.stats.stats.median / 1e9
    benchmark.extra_info[unit] = round(rate, 2)
    return rate


@pytest.mark.parametrize("threads", THREADS)
def test_copy(benchmark: Any, tensors: list[torch.Tensor], threads: int) -> None:
    """The floor: numpy's copy, bytes read plus bytes written."""
    x = tensors[0].view(torch.int16).numpy()
    y = np.ones_like(x)
    if threads == 1:
        run: Callable[[], object] = lambda: np.copyto(y, x)  # noqa: E731
    else:
        from concurrent.futures import ThreadPoolExecutor

        pool = ThreadPoolExecutor(threads)
        parts = [(a, b) for a, b in zip(np.array_split(y, threads), np.array_split(x, threads),
                                        strict=True)]  # fmt: skip
        run = lambda: list(pool.map(lambda p: np.copyto(*p), parts))  # noqa: E731
    copy_bandwidth[threads] = record(benchmark, run, 4 * N)
    assert np.array_equal(x, y)


def job(tensors: list[torch.Tensor], case: str, out: torch.Tensor, threads: int, n: int) -> Any:
    policy, density = CASES[case]
    base, *models = tensors
    work = core.Job(threads=threads, checksums=False)
    task = work.add_task(
        n, "BF16", out.data_ptr(), difference=policy.difference, sparsify=policy.sparsify,
        base=("BF16", base.data_ptr(), -1, 0) if policy.difference else None,
        trim_ties=policy.trim_ties, rescale=policy.rescale, elect=policy.elect,
        elect_on=policy.elect_on, reduce=policy.reduce, divisor=policy.divisor,
    )  # fmt: skip
    for k, x in enumerate(models):
        work.add_term(
            task, "BF16", x.data_ptr(), weight=0.4, density=density, key=k,
            keep_threshold=int(density * 2**32 + 0.5),
            keep_count=trim_keep_count(density, n, policy.trim_count),
        )  # fmt: skip
    return work


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("case", CASES)
def test_combine(benchmark: Any, tensors: list[torch.Tensor], case: str, threads: int) -> None:
    """Base and three models in, one out, the data in memory."""
    policy, density = CASES[case]
    out = torch.ones(N, dtype=torch.bfloat16)
    small = 100_003
    job(tensors, case, out, threads, small).run()
    want = combine_reference(
        tensors[0][:small] if policy.difference else None,
        [x[:small] for x in tensors[1:]],
        weights=[0.4] * 3,
        policy=policy,
        density=density,
        keys=[0, 1, 2],
        out_dtype=torch.bfloat16,
    )
    assert torch.equal(out[:small], want)
    streams = 5 if policy.difference else 4
    rate = record(benchmark, lambda: job(tensors, case, out, threads, N).run(), 2 * streams * N)
    if threads in copy_bandwidth:
        benchmark.extra_info["share of copy"] = round(rate / copy_bandwidth[threads], 2)


@pytest.mark.parametrize("threads", THREADS)
def test_selection(benchmark: Any, tensors: list[torch.Tensor], threads: int) -> None:
    """The exact 20 % threshold of three deltas; elements of all three count."""
    base, *models = tensors
    sink = torch.empty(1, dtype=torch.bfloat16)
    counts = [trim_keep_count(0.2, N, "at_least_one")] * 3

    def run() -> list[int]:
        work = core.Job(threads=threads)
        task = work.add_task(
            N, "BF16", sink.data_ptr(), base=("BF16", base.data_ptr(), -1, 0), difference=True,
            sparsify="trim",
        )  # fmt: skip
        for x in models:
            work.add_term(task, "BF16", x.data_ptr())
        return work.select_model(counts)

    for code, x in zip(run(), models, strict=True):
        codes = (x.float() - base.float()).abs().view(torch.int32)
        assert int((codes > code).sum()) < counts[0] <= int((codes >= code).sum())
    record(benchmark, run, 3 * N, "G elements/s")
