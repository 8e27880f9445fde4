"""Log-probs of tokens from hidden states against eager torch on the CPU: time and memory.

    python benchmarks/logprobs.py            # the table of times, then that of memory
    python benchmarks/logprobs.py --quick    # small sizes

A row is forward + backward of the log-probs of one id per token, from hidden states and a frozen
head. Eager is what trainers write: the product, log_softmax, gather. Providers run in turns in one
process; log-probs and gradients are compared with float64 before anything is timed. Memory is the
largest resident size of a process of its own, beyond what it held before the call.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cl_fast.losses import token_logprobs

# tokens, hidden size, vocabulary; hidden size of SmolLM 135M.
SIZES = [(512, 576, 32_000), (2_048, 576, 32_000)]
QUICK = [(64, 64, 1_000), (128, 64, 4_096)]
PROVIDERS = ("cl_fast", "eager")


class Case:
    """Inputs of one size; half of the tokens are a prompt where `masked`."""

    def __init__(
        self, tokens: int, width: int, vocabulary: int, entropy: bool, masked: bool = False
    ) -> None:
        g = torch.Generator().manual_seed(tokens + vocabulary)
        self.hidden = (3 * torch.randn(tokens, width, generator=g)).requires_grad_()
        self.weight = torch.randn(vocabulary, width, generator=g) * width**-0.5
        self.ids = torch.randint(0, vocabulary, (tokens,), generator=g)
        if masked:
            self.ids[: tokens // 2] = -100
        self.up = torch.randn(tokens, generator=g) / tokens
        self.entropy = entropy

    def cl_fast(self) -> list[Tensor]:
        made = token_logprobs(self.hidden, self.weight, self.ids, entropy=self.entropy)
        logprobs, *rest = made if isinstance(made, tuple) else (made,)
        (dx,) = torch.autograd.grad((logprobs * self.up).sum(), self.hidden)
        return [logprobs.detach(), dx, *(e.detach() for e in rest)]

    def eager(self) -> list[Tensor]:
        lp = (self.hidden @ self.weight.T).log_softmax(-1)
        kept = self.ids != -100
        picked = lp.gather(-1, self.ids.clamp(min=0)[:, None])[:, 0]
        logprobs = torch.where(kept, picked, 0)
        rest = []
        if self.entropy:
            with torch.no_grad():
                rest = [torch.where(kept, -(lp.exp() * lp).sum(-1), 0)]
        (dx,) = torch.autograd.grad((logprobs * self.up).sum(), self.hidden)
        return [logprobs.detach(), dx, *rest]

    def verify(self) -> None:
        """Against float64, on some of the rows: no further from it than twice eager."""
        part = slice(None, None, max(1, len(self.ids) // 32))
        few, exact = (Case.__new__(Case) for _ in range(2))
        few.ids, few.up, few.entropy = self.ids[part], self.up[part], self.entropy
        few.hidden, few.weight = self.hidden.detach()[part].requires_grad_(), self.weight
        exact.ids, exact.up, exact.entropy = few.ids, few.up.double(), self.entropy
        exact.hidden = few.hidden.detach().double().requires_grad_()
        exact.weight = few.weight.double()
        for mine, theirs, true in zip(few.cl_fast(), few.eager(), exact.eager(), strict=True):
            error = (mine.double() - true).abs().max().item()
            allowed = 2 * (theirs.double() - true).abs().max().item() + 1e-9
            if error > allowed:
                raise SystemExit(f"wrong: error {error:.3g}, eager's {allowed / 2:.3g}")


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
    return f"{statistics.median(times):9.1f} ({low:.1f} - {high:.1f})"


def most_resident() -> int:
    """Bytes: the high-water mark of this process (ru_maxrss would hold that of its parent)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(x for x in status.splitlines() if x.startswith("VmHWM")).split()[1])


def peak(provider: str, tokens: int, width: int, vocabulary: int) -> int:
    """Bytes that a call needs beyond its inputs, in this process."""
    case = Case(tokens, width, vocabulary, False)
    # Code and thread pools are loaded before the count begins.
    getattr(Case(64, 16, 512, False), provider)()
    Path("/proc/self/clear_refs").write_text("5")  # the mark begins again at what is resident now
    before = most_resident()
    getattr(case, provider)()
    return most_resident() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=15.0, help="per row")
    parser.add_argument("--peak", nargs=4, metavar=("PROVIDER", "N", "H", "V"))
    arguments = parser.parse_args()
    if arguments.peak:
        provider, *size = arguments.peak
        print(json.dumps(peak(provider, *map(int, size))))
        return
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, float32; ms, median (p20 - p80)")  # fmt: skip
    print(f"{'tokens':>7} {'H':>5} {'V':>7} {'what':22} "
          f"{'cl_fast':>28} {'eager':>28}  eager / cl_fast")  # fmt: skip
    sizes = QUICK if arguments.quick else SIZES
    for size in sizes:
        for what, options in {
            "log-probs": (False, False), "and entropies": (True, False),
            "half of them a prompt": (False, True),
        }.items():  # fmt: skip
            case = Case(*size, *options)
            case.verify()
            times = interleaved({p: getattr(case, p) for p in PROVIDERS}, arguments.seconds)
            ratio = statistics.median(times["eager"]) / statistics.median(times["cl_fast"])
            tokens, width, vocabulary = size
            print(f"{tokens:7} {width:5} {vocabulary:7} {what:22} "
                  f"{spread(times['cl_fast']):>28} {spread(times['eager']):>28}  {ratio:.2f}",
                  flush=True)  # fmt: skip
    last = [str(n) for n in sizes[-1]]
    print(f"\nextra peak of one call, {last[0]} tokens x {last[2]} ids, H {last[1]}, float32")
    for provider in PROVIDERS:
        command = [sys.executable, str(Path(__file__)), "--peak", provider, *last]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        print(f"  {provider:8} {json.loads(done.stdout) / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
