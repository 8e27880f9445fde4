"""The ridge update of an editor beside an LU of the f x f system, on the CPU.

    python benchmarks/editing/ridge.py                            f = 8192, n = 1, 100, 1000
    python benchmarks/editing/ridge.py --out benchmarks/results   writes the table, too

    ours    V = C0^-1 K by the Cholesky factor of C0 that is there, U = T (K^T V + I)^-1
    LU      X = (C0 + K K^T)^-1 K by torch.linalg.solve, as MEMIT's code has it

Both in float64, for the same C0, K [f, n] and T [d, n]. Either gives the change of the weight as
two factors, U V^T or T X^T; a row of its own has that product as a matrix. The products are
compared before anything is timed. The factorisation of C0, once for as many updates as one likes,
is timed, too: "with L" pays for it in one update. Memory is the largest resident size during the
call, beyond what there was before.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cl_fast.editing.solver import CholeskyPrior, solve

RANK = 512
TOLERANCE = 1e-9


def covariance(f: int) -> Tensor:
    """As of keys: some directions with most of the energy, and a floor; float64."""
    generator = torch.Generator().manual_seed(0)
    rank = min(RANK, f)
    A = torch.randn(f, rank, generator=generator, dtype=torch.float64)
    A *= torch.logspace(1, -1, rank, dtype=torch.float64)
    C = A @ A.T
    C.diagonal().add_(0.01 * float(C.diagonal().mean()))
    return C


def by_lu(C0: Tensor, K: Tensor) -> Tensor:
    return torch.linalg.solve(C0 + K @ K.T, K)


def memory(run: Callable[[], object]) -> float | None:
    """MiB; None where the system does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        result = run()
        found = _status("VmHWM") - before
        del result
    except OSError:
        return None
    return found / 1024


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(next(x for x in text.splitlines() if x.startswith(name)).split()[1])


def spread(values: Sequence[float]) -> str:
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]
    return f"{statistics.median(ordered):9.1f} ({low:.1f} - {high:.1f})"


def commit() -> str:
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or "unknown"


def lines(a: argparse.Namespace) -> Iterator[str]:
    torch.set_num_threads(a.threads)
    # Of one thread its processor time, which leaves out what else the machine does.
    now = time.process_time if a.threads == 1 else time.perf_counter
    yield (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {a.threads} "
        f"threads, torch {torch.__version__}, commit {commit()}; float64"
    )
    C0 = covariance(a.f)
    times = []
    for _ in range(a.factors):
        start = now()
        prior = CholeskyPrior(C0)
        times.append(1e3 * (now() - start))
    factor = statistics.median(times)
    yield (
        f"f = {a.f}, d = {a.d}; C0 = L L^T: {spread(times).strip()} ms with its checks, "
        f"{8 * a.f**2 / 2**20:.0f} MiB for C0 and L together"
    )
    yield "ms, median (p20 - p80), in turns"
    yield (
        f"{'n':>6}{'':12}{'ours, warm':>28}{'LU':>30}{'times':>8}{'with L':>8}"
        f"{'difference':>12}{'MiB more: ours':>16}{'LU':>8}"
    )
    for n in a.n:
        generator = torch.Generator().manual_seed(n)
        K = torch.randn(a.f, n, generator=generator, dtype=torch.float64)
        T = torch.randn(a.d, n, generator=generator, dtype=torch.float64)

        def ours(K: Tensor = K, T: Tensor = T) -> tuple[Tensor, Tensor]:
            found = solve(prior, K, T, 1.0)
            return found.U, found.V

        def lu(K: Tensor = K, T: Tensor = T) -> tuple[Tensor, Tensor]:
            return T, by_lu(C0, K)

        want, got = lu(), ours()
        wrong = _difference(got, want)
        if not wrong < TOLERANCE:
            raise SystemExit(f"the two do not agree for n = {n}: {wrong:.1e}")
        held = [memory(run) for run in (ours, lu)]
        found: dict[str, list[float]] = {"ours": [], "lu": [], "ours D": [], "lu D": []}
        for _ in range(a.rounds):
            for name, run in (("ours", ours), ("lu", lu)):
                start = now()
                left, right = run()
                middle = now()
                left @ right.T
                found[name].append(1e3 * (middle - start))
                found[f"{name} D"].append(1e3 * (now() - start))
        told = ["-" if x is None else f"{x:.0f}" for x in held]
        for kind, what in (("", "factors"), (" D", "D, [d, f]")):
            mine, other = found[f"ours{kind}"], found[f"lu{kind}"]
            times_faster = statistics.median(y / x for x, y in zip(mine, other, strict=True))
            cold = statistics.median(other) / (statistics.median(mine) + factor)
            yield (
                f"{n:6}  {what:10}{spread(mine):>28}{spread(other):>30}{times_faster:8.1f}"
                f"{cold:8.1f}" + (f"{wrong:12.1e}{told[0]:>16}{told[1]:>8}" if not kind else "")
            )


def _difference(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> float:
    """||U V^T - T X^T|| / ||T X^T||."""
    exact = want[0] @ want[1].T
    return float((got[0] @ got[1].T).sub_(exact).norm() / exact.norm())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--f", type=int, default=8192)
    add("--d", type=int, default=3072)
    add("--n", type=int, nargs="+", default=[1, 100, 1000])
    add("--rounds", type=int, default=5)
    add("--factors", type=int, default=2, help="times that C0 is factorised")
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--out", type=Path, help="a folder for editing_ridge_cpu.txt")
    a = parser.parse_args(arguments)
    words = " ".join(sys.argv[1:] if arguments is None else arguments)
    told = [f"# python benchmarks/editing/ridge.py {words}".rstrip()]
    for line in lines(a):
        print(line, flush=True)
        told.append(line)
    if a.out is not None:
        (a.out / "editing_ridge_cpu.txt").write_text("\n".join(told) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
