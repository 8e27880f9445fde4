"""The pull of EWC on the CPU: time and memory of one step, against what trainers write.

    python benchmarks/anchors.py            # 100 million float32 parameters
    python benchmarks/anchors.py --quick    # 4 million

A row adds lam F (theta - theta*) to gradients that are there, as it is done once per step of the
optimizer. Providers run in turns in one process and are compared with float64 before they are
timed. `autograd` is the penalty as an expression added to the loss, and its backward pass; `loop`
is the closed form, parameter by parameter. The floor is the time of a copy that moves as many
bytes as the pull must: four reads and a write of every number. Memory is the largest resident size
of a process of its own, beyond what it held before the call; that of `cl_fast` does not grow with
the model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cl_fast.ops import anchor_gradient_, anchor_pull_

LAM = 0.4
PROVIDERS = ("cl_fast", "loop", "autograd")


def shapes(numbers: int) -> list[tuple[int, ...]]:
    """Matrices and norms as a decoder has them, about `numbers` in all."""
    width = 1024 if numbers >= 1 << 25 else 256
    layer: list[tuple[int, ...]] = [*[(width, width)] * 4, *[(4 * width, width)] * 3]
    layer += [(width,)] * 2
    count = max(1, numbers // sum(int(torch.Size(s).numel()) for s in layer))
    return layer * count


class Case:
    def __init__(self, numbers: int) -> None:
        g = torch.Generator().manual_seed(0)
        sizes = shapes(numbers)
        self.anchors = [torch.randn(s, generator=g) for s in sizes]
        self.weights = [
            (a + 0.01 * torch.randn(a.shape, generator=g)).requires_grad_() for a in self.anchors
        ]
        self.fisher = [torch.rand(s, generator=g) for s in sizes]
        for w in self.weights:
            w.grad = torch.randn(w.shape, generator=g)
        self.numbers = sum(w.numel() for w in self.weights)

    def _grads(self) -> list[Tensor]:
        return [w.grad for w in self.weights if w.grad is not None]

    def cl_fast(self) -> None:
        anchor_gradient_(self._grads(), self.weights, self.anchors, self.fisher, strength=LAM)

    def decoupled(self) -> None:
        anchor_pull_(self.weights, self.anchors, self.fisher, amount=1e-4)

    def autograd(self) -> None:
        triples = zip(self.weights, self.anchors, self.fisher, strict=True)
        penalty: Tensor = sum((f * (w - a).square()).sum() for w, a, f in triples)
        (LAM / 2 * penalty).backward()

    def loop(self) -> None:
        with torch.no_grad():
            for w, a, f in zip(self.weights, self.anchors, self.fisher, strict=True):
                assert w.grad is not None
                w.grad += LAM * f * (w - a)

    def verify(self) -> None:
        """No further from float64 than twice the loop, on some of the tensors."""
        before = [g.clone() for g in self._grads()[:9]]
        wanted = [
            b.double() + LAM * f.double() * (w.detach().double() - a.double())
            for w, a, f, b in zip(self.weights, self.anchors, self.fisher, before, strict=False)
        ]
        errors = {}
        for name in PROVIDERS:
            for g, b in zip(self._grads(), before, strict=False):
                g.copy_(b)
            getattr(self, name)()
            errors[name] = max(
                float((g.double() - exact).abs().max())
                for g, exact in zip(self._grads(), wanted, strict=False)
            )
        if errors["cl_fast"] > 2 * errors["loop"]:
            raise SystemExit(f"wrong: {errors}")


def copied(case: Case) -> Callable[[], None]:
    """As many bytes as the pull moves: 2.5 copies of the parameters."""
    source = torch.cat([a.flatten() for a in case.anchors])
    target = torch.zeros_like(source)

    def run() -> None:
        target.copy_(source)
        target.copy_(source)
        half = source.numel() // 2
        target[:half].copy_(source[:half])

    return run


def spread(times: list[float]) -> str:
    ordered = sorted(times)
    low, high = ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]
    return f"{statistics.median(times):8.1f} ({low:.1f} - {high:.1f})"


def most_resident() -> int:
    """Bytes: the high-water mark of this process (ru_maxrss would hold that of its parent)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(x for x in status.splitlines() if x.startswith("VmHWM")).split()[1])


def peak(provider: str, numbers: int) -> int:
    """Bytes that a call needs beyond its inputs, in this process."""
    case = Case(numbers)
    small = Case(1000)
    getattr(small, provider)()  # code and thread pools are loaded before the count begins
    Path("/proc/self/clear_refs").write_text("5")  # the mark begins again at what is resident now
    before = most_resident()
    getattr(case, provider)()
    return most_resident() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--peak", choices=(*PROVIDERS, "decoupled"))
    arguments = parser.parse_args()
    numbers = 4_000_000 if arguments.quick else 100_000_000
    if arguments.peak:
        print(json.dumps(peak(arguments.peak, numbers)))
        return
    case = Case(numbers)
    case.verify()
    runs: dict[str, Callable[[], None]] = {"floor (copy)": copied(case)}
    runs |= {name: getattr(case, name) for name in (*PROVIDERS, "decoupled")}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(arguments.turns):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")  # fmt: skip
    print(f"{len(case.weights)} tensors, {case.numbers / 1e6:.0f}M parameters, float32, "
          f"{20 * case.numbers / 1e9:.2f} GB to move")  # fmt: skip
    floor = statistics.median(times["floor (copy)"])
    del case, runs
    print(f"{'provider':14} {'ms, median (p20 - p80)':>28} {'x floor':>8} {'extra MB':>9}")
    for name, found in times.items():
        extra = ""
        if not name.startswith("floor"):
            command = [sys.executable, __file__, "--peak", name]
            command += ["--quick"] if arguments.quick else []
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            extra = f"{json.loads(done.stdout) / 1e6:.1f}"
        ratio = statistics.median(found) / floor
        print(f"{name:14} {spread(found):>28} {ratio:8.2f} {extra:>9}", flush=True)


if __name__ == "__main__":
    main()
