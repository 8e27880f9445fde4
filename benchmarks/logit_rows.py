#!/usr/bin/env python3
"""Losses of rows of logits on the CPU: the C++ core and plain torch, as people write it.

    python benchmarks/logit_rows.py [--out FILE] [--quick]

Forward and backward from logits that exist, upstream gradient not 1. Providers take turns within
one process, after each has been checked against float64.

    eager     log_softmax of both sides and kl_div, or the mixture by logsumexp for `jsd`, and
              autograd; bfloat16 logits are widened first, as trainers do
    cl_fast   one call for all rows forward, one in closed form backward
    in place  the same; the gradient goes where there is room already, as into the student, which
              spares the system the new memory that a gradient of its own takes
    floor     what a copy of the student takes, times the rows that are read and written: both
              sides forward, both sides and the gradient backward (log-probs: one side)

The table has medians (20th to 80th percentile) in milliseconds. `jsd` takes torch long, so it has
the smallest size only. `--quick` is for a look.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import cl_fast
from cl_fast.backends import native, vocabulary_ops
from cl_fast.ops import vocabulary_rows as reference
from cl_fast.ops.vocabulary_rows import How

SIZES = [(512, 32_000), (2048, 32_000), (1024, 128_256)]
DTYPES = [torch.float32, torch.bfloat16]
JOBS = ["forward_kl", "reverse_kl", "jsd", "logprobs"]
BETA = 0.5
CHECKED = 16
"""Rows that are checked."""
PLAIN = How()


def eager(job: str, student: Tensor, teacher: Tensor, ids: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a loss per row, by autograd."""
    leaf = student.detach().requires_grad_()
    wide = torch.promote_types(student.dtype, torch.float32)
    lp = functional.log_softmax(leaf.to(wide), -1)
    if job == "logprobs":
        loss = lp.gather(1, ids[:, None])[:, 0]
    else:
        lq = functional.log_softmax(teacher.to(wide), -1)
        divergence = functional.kl_div
        if job == "forward_kl":
            terms = divergence(lp, lq, reduction="none", log_target=True)
        elif job == "reverse_kl":
            terms = divergence(lq, lp, reduction="none", log_target=True)
        else:
            beta = torch.tensor(BETA, dtype=wide)
            lm = torch.logsumexp(torch.stack([lq + beta.log(), lp + (1 - beta).log()]), 0)
            far = divergence(lm, lq, reduction="none", log_target=True)
            near = divergence(lm, lp, reduction="none", log_target=True)
            terms = beta * far + (1 - beta) * near
        loss = terms.sum(-1)
    (loss * grad.to(wide)).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def ours(
    rows: Any,
    out: Tensor | None,
    job: str,
    student: Tensor,
    teacher: Tensor,
    ids: Tensor,
    grad: Tensor,
) -> Tensor:
    """The gradient by these row functions, into `out` where there is one."""
    out = torch.empty_like(student) if out is None else out[: student.size(0)]
    if job == "logprobs":
        stats = rows.logprob_forward(student, ids, PLAIN)
        rows.logprob_gradient(out, grad, None, student, ids, stats, PLAIN)
    else:
        inputs = (job, BETA, PLAIN, PLAIN)
        _, stats = rows.divergence_forward(student, teacher, *inputs)
        rows.divergence_gradient(out, grad, student, teacher, stats, *inputs)
    return out


def check(
    job: str, inputs: tuple[Tensor, ...], providers: dict[str, Callable[..., Tensor]]
) -> None:
    """Our gradient is off by no more than twice what eager is off by, or one rounding."""
    few = tuple(x[:CHECKED] for x in inputs)
    student, teacher, ids, grad = few
    exact = ours(reference, None, job, student.double(), teacher.double(), ids, grad)
    off = {
        name: (run(job, *few).double() - exact).abs().max().item()
        for name, run in providers.items()
    }
    rounding = torch.finfo(student.dtype).eps * exact.abs().max().item()
    for name in ("cl_fast", "in place"):
        assert off[name] <= 2 * off["eager"] + rounding, (job, off)


def percentile(times: list[float], share: float) -> float:
    return sorted(times)[round(share * (len(times) - 1))]


def measure(
    core_rows: Any, rows: int, columns: int, dtype: torch.dtype, reps: int
) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    student = (torch.randn(rows, columns, generator=g) * 4).to(dtype)
    teacher = (student.float() + torch.randn(rows, columns, generator=g)).to(dtype)
    ids = torch.randint(0, columns, (rows,), generator=g)
    grad = torch.rand(rows, generator=g) / rows
    inputs = (student, teacher, ids, grad)
    target = torch.empty_like(student)
    providers: dict[str, Callable[..., Tensor]] = {
        "eager": eager,
        "cl_fast": partial(ours, core_rows, None),
        "in place": partial(ours, core_rows, target),
    }
    found = []
    for job in JOBS:
        if job == "jsd" and (rows, columns) != SIZES[0]:
            continue
        check(job, inputs, providers)
        times: dict[str, list[float]] = {name: [] for name in (*providers, "copy")}
        for rep in range(reps + 1):
            for name, run in providers.items():
                start = time.perf_counter()
                run(job, *inputs)
                times[name].append(time.perf_counter() - start)
            start = time.perf_counter()
            target.copy_(student)
            times["copy"].append(time.perf_counter() - start)
            if rep == 0:  # a first time touches new memory
                times = {name: [] for name in times}
        moved = 3 if job == "logprobs" else 5  # a copy moves two
        row: dict[str, Any] = {
            "job": job,
            "dtype": str(dtype).removeprefix("torch."),
            "rows": rows,
            "columns": columns,
            "floor_ms": statistics.median(times["copy"]) * 1e3 * moved / 2,
        }
        for name in providers:
            row[name] = {f"p{p}": percentile(times[name], p / 100) * 1e3 for p in (20, 50, 80)}
        row["ratio"] = row["eager"]["p50"] / row["cl_fast"]["p50"]
        found.append(row)
        print(line(row), flush=True)
    return found


def line(row: dict[str, Any]) -> str:
    def spread(t: dict[str, float]) -> str:
        return f"{t['p50']:.1f} ({t['p20']:.1f} to {t['p80']:.1f})"

    floor = row["floor_ms"] / row["in place"]["p50"]
    return (
        f"| {row['job']} | {row['rows']} x {row['columns']} | {row['dtype']} "
        f"| {spread(row['eager'])} | {spread(row['cl_fast'])} | {row['ratio']:.1f}x "
        f"| {spread(row['in place'])} | {row['eager']['p50'] / row['in place']['p50']:.1f}x "
        f"| {floor:.0%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the rows here, as JSON")
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the smallest size, once")
    a = parser.parse_args()
    core = native.load()
    if core is None:
        parser.error(native.reason())
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        check=False,
        capture_output=True,
        text=True,
    ).stdout.strip()
    about = {
        "processor": platform.machine(),
        "isa": core.isa(),
        "threads": native.threads(),
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cl_fast": cl_fast.__version__,
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(
        "\n| job | rows | dtype | eager ms | cl_fast ms | faster | in place ms | faster | floor |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for size in SIZES[:1] if a.quick else SIZES:
        for dtype in DTYPES:
            rows += measure(vocabulary_ops.of(core), *size, dtype, 1 if a.quick else a.reps)
    if a.out is not None:
        a.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
