"""The fused divergence against eager torch on the CPU: time, and what it needs in memory.

    python benchmarks/linear_divergence.py             # the table of times, then that of memory
    python benchmarks/linear_divergence.py --quick     # small sizes
    python benchmarks/linear_divergence.py --out DIR   # and DIR/linear_divergence_cpu.json, .md

A row is forward + backward of one loss of student hidden states and a frozen head. Eager is what
trainers write: both products, log_softmax of both sides, the formula. Providers run in turns in one
process; losses and gradients are compared with float64 before anything is timed. The floor is the
time of the matrix products alone, which both ways share: the wider the hidden states, the closer
all three. Memory is the largest resident size of a process of its own, beyond what it held before
the call.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_fast.losses import Hidden, Logits, linear_divergence

# tokens, hidden size, vocabulary: from a toy to the shapes of SmolLM 135M and Qwen 2.5 0.5B.
SIZES = [
    (256, 256, 8_192),
    (512, 576, 32_000),
    (2_048, 256, 32_000),
    (2_048, 576, 32_000),
    (2_048, 576, 49_152),
    (1_024, 896, 151_936),
]
QUICK = [(64, 64, 1_000), (128, 64, 4_096)]


def eager(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Mean divergence of logits, as trainers write it."""
    lp, lq = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    if kind == "forward_kl":
        return F.kl_div(lp, lq, reduction="sum", log_target=True) / len(lp)
    if kind == "reverse_kl":
        return F.kl_div(lq, lp, reduction="sum", log_target=True) / len(lp)
    mixture = torch.logsumexp(torch.stack([lp, lq]), 0) - torch.tensor(2.0).log()
    both = F.kl_div(mixture, lq, reduction="sum", log_target=True)
    both = both + F.kl_div(mixture, lp, reduction="sum", log_target=True)
    return both / (2 * len(lp))


class Case:
    """Inputs of one size, and the two ways to the loss."""

    def __init__(
        self, tokens: int, width: int, vocabulary: int, teacher: str, kind: str, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(tokens + vocabulary)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.kind = kind
        self.hidden = (normal(tokens, width) * 3).to(dtype).requires_grad_()
        self.weight = (normal(vocabulary, width) * width**-0.5).to(dtype)
        self.teacher = (self.hidden.detach().float() + 0.5 * normal(tokens, width)).to(dtype)
        self.given = teacher
        self.logits = self.teacher @ self.weight.T if teacher == "logits" else None

    def ours(self) -> tuple[Tensor, Tensor]:
        if self.logits is None:
            teacher = Hidden(self.teacher, self.weight)
        else:
            teacher = Logits(self.logits)
        loss = linear_divergence(self.hidden, self.weight, teacher, kind=self.kind)
        return loss.detach(), torch.autograd.grad(loss, self.hidden)[0]

    def eager(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher = self.teacher @ self.weight.T if self.logits is None else self.logits
        loss = eager(self.hidden @ self.weight.T, teacher, self.kind)
        return loss.detach(), torch.autograd.grad(loss, self.hidden)[0]

    def products(self) -> Tensor:
        """The floor: the matrix products that any way to the loss needs, and nothing else."""
        with torch.no_grad():
            if self.logits is None:
                self.teacher @ self.weight.T
            return self.hidden @ self.weight.T @ self.weight

    def verify(self) -> None:
        """Against float64, on the first rows: no further from it than twice eager, and four ulp."""
        few = Case.__new__(Case)
        few.kind, few.given = self.kind, self.given
        few.hidden = self.hidden.detach()[:32].requires_grad_()
        few.weight, few.teacher = self.weight, self.teacher[:32]
        few.logits = None if self.logits is None else self.logits[:32]
        exact = Case.__new__(Case)
        exact.kind, exact.given = self.kind, self.given
        exact.hidden = few.hidden.detach().double().requires_grad_()
        exact.weight, exact.teacher = few.weight.double(), few.teacher.double()
        exact.logits = None if few.logits is None else few.logits.double()
        with torch.no_grad():
            other = exact.teacher @ exact.weight.T if exact.logits is None else exact.logits
        z = (exact.hidden @ exact.weight.T).requires_grad_()
        lp, lq = z.log_softmax(-1), other.log_softmax(-1)
        p, q = lp.exp(), lq.exp()
        if self.kind == "forward_kl":
            loss = (q * (lq - lp)).sum() / len(z)
        elif self.kind == "reverse_kl":
            loss = (p * (lp - lq)).sum() / len(z)
        else:
            m = ((p + q) / 2).log()
            loss = (q * (lq - m) + p * (lp - m)).sum() / (2 * len(z))
        truth = loss.detach(), torch.autograd.grad(loss, exact.hidden)[0]
        for mine, theirs, true in zip(few.ours(), few.eager(), truth, strict=True):
            error = (mine.double() - true).abs().max().item()
            # A float32 result may be lucky by an ulp or two; that is not held against ours.
            lucky = 4 * torch.finfo(torch.float32).eps * true.abs().max().item()
            allowed = 2 * (theirs.double() - true).abs().max().item() + lucky
            if error > allowed:
                raise SystemExit(f"wrong: error {error:.3g}, allowed {allowed:.3g}")


def interleaved(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each, in turns, for about `seconds` in all and at least three turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(times[next(iter(runs))]) < 3:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def spread(times: list[float]) -> str:
    ordered = sorted(times)
    low, high = ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]
    return f"{statistics.median(times):.1f} ({low:.1f} - {high:.1f})"


def most_resident() -> int:
    """Bytes: the high-water mark of this process (ru_maxrss would hold that of its parent)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(x for x in status.splitlines() if x.startswith("VmHWM")).split()[1])


def peak(provider: str, tokens: int, width: int, vocabulary: int) -> int:
    """Bytes that a call needs beyond its inputs, in this process."""
    case = Case(tokens, width, vocabulary, "hidden", "forward_kl", torch.float32)
    small = Case(64, 16, 512, "hidden", "forward_kl", torch.float32)
    getattr(small, provider)()  # code and thread pools are loaded before the count begins
    Path("/proc/self/clear_refs").write_text("5")  # the mark begins again at what is resident now
    before = most_resident()
    getattr(case, provider)()
    return most_resident() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=6.0, help="per row")
    parser.add_argument("--kinds", nargs="+", default=["forward_kl", "jsd"])
    parser.add_argument("--teachers", nargs="+", default=["hidden", "logits"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--peak", nargs=4, metavar=("PROVIDER", "N", "H", "V"))
    arguments = parser.parse_args()
    if arguments.peak:
        provider, *size = arguments.peak
        print(json.dumps(peak(provider, *map(int, size))))
        return
    rows = []
    say(f"{about()['cpu']}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, {arguments.dtype}, commit {about()['commit']}. Milliseconds of "
        "forward + backward with a frozen head, in turns: median (p20 - p80).\n")  # fmt: skip
    say("| tokens | H | V | teacher | kind | cl_fast | eager | eager / cl_fast | cl_fast / floor |")
    say("|---|---|---|---|---|---|---|---|---|")
    for tokens, width, vocabulary in QUICK if arguments.quick else SIZES:
        for teacher in arguments.teachers:
            for kind in arguments.kinds:
                dtype = getattr(torch, arguments.dtype)
                case = Case(tokens, width, vocabulary, teacher, kind, dtype)
                case.verify()
                times = interleaved(
                    {"ours": case.ours, "eager": case.eager, "floor": case.products},
                    arguments.seconds,
                )
                ours, other, floor = (statistics.median(x) for x in times.values())
                rows.append({"tokens": tokens, "width": width, "vocabulary": vocabulary,
                             "teacher": teacher, "kind": kind, "milliseconds": times,
                             "eager / cl_fast": other / ours,
                             "cl_fast / floor": ours / floor})  # fmt: skip
                say(f"| {tokens} | {width} | {vocabulary} | {teacher} | {kind} | "
                    f"{spread(times['ours'])} | {spread(times['eager'])} | "
                    f"{other / ours:.2f} | {ours / floor:.2f} |")  # fmt: skip
    size = ("256", "64", "8192") if arguments.quick else ("4096", "576", "128256")
    say(f"\nMemory of one call beyond its inputs, {size[0]} tokens x {size[2]} ids, "
        f"H {size[1]}, teacher as hidden states, float32:\n")  # fmt: skip
    memory = {}
    for provider in ("ours", "eager"):
        command = [sys.executable, str(Path(__file__)), "--peak", provider, *size]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            say(f"- {provider}: did not finish (exit {done.returncode})")
            continue
        memory[provider] = json.loads(done.stdout)
        say(f"- {provider}: {memory[provider] / 1e9:.3f} GB")
    if arguments.out:
        report = {**about(), "dtype": arguments.dtype, "rows": rows, "memory": memory}
        path = arguments.out / f"linear_divergence_cpu_{arguments.dtype}"
        path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        path.with_suffix(".md").write_text("\n".join(said) + "\n")


said: list[str] = []


def say(line: str) -> None:
    print(line, flush=True)
    said.append(line)


def about() -> dict[str, str]:
    """The machine, the versions and the commit."""
    cpu = platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    root = Path(__file__).parents[1]
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"],
                          capture_output=True, text=True)  # fmt: skip
    return {
        "cpu": cpu,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "commit": done.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
