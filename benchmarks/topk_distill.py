"""Distillation from k cached tokens against the loss over the whole vocabulary, on the CPU.

    python benchmarks/topk_distill.py            # 2048 tokens x 32k ids, H 576, k = 100
    python benchmarks/topk_distill.py --quick    # a small size

A row is forward + backward of the mean KL of student hidden states and a head from a teacher. The
eager loss is what trainers write: all logits, their log_softmax, gather, and renormalisation on the
k ids. `renorm` and `bucket` are those of cl_fast. Each is compared with float64 on some rows before
anything is timed; then they run in turns in one process.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from cl_fast.losses import TopK, linear_divergence


class Case:
    """Inputs of one size: hidden states, a head, and a teacher's k ids per row."""

    def __init__(self, tokens: int, width: int, vocabulary: int, k: int, frozen: bool) -> None:
        g = torch.Generator().manual_seed(tokens + vocabulary)
        self.hidden = (3 * torch.randn(tokens, width, generator=g)).requires_grad_()
        self.weight = torch.randn(vocabulary, width, generator=g) * width**-0.5
        self.weight.requires_grad_(not frozen)
        logprobs, ids = [], []
        for rows in self.hidden.detach().split(256):
            noisy = rows + 0.5 * torch.randn(rows.shape, generator=g)
            values, picked = (noisy @ self.weight.detach().T).log_softmax(-1).topk(k)
            logprobs.append(values)
            ids.append(picked)
        self.ids, self.logprobs = torch.cat(ids), torch.cat(logprobs)

    @property
    def trained(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight) if x.requires_grad]

    def ours(self, tail: str) -> tuple[Tensor, ...]:
        teacher = TopK(self.ids, self.logprobs, tail=tail)  # type: ignore[arg-type]
        loss = linear_divergence(self.hidden, self.weight, teacher)
        return loss.detach(), *torch.autograd.grad(loss, self.trained)

    def eager(self, tail: str) -> tuple[Tensor, ...]:
        lp = (self.hidden @ self.weight.T).log_softmax(-1).gather(1, self.ids)
        lq = self.logprobs.to(lp.dtype)
        if tail == "renorm":
            lp, lq = lp.log_softmax(-1), lq.log_softmax(-1)
        else:
            lp, lq = (
                torch.cat([x, (-torch.expm1(x.logsumexp(1, keepdim=True))).log()], 1)
                for x in (lp, lq)
            )
        loss = (lq.exp() * (lq - lp)).sum() / len(lp)
        return loss.detach(), *torch.autograd.grad(loss, self.trained)

    def few(self, dtype: torch.dtype) -> Case:
        """The first rows."""
        case = Case.__new__(Case)
        case.hidden = self.hidden.detach()[:48].to(dtype).requires_grad_()
        case.weight = self.weight.detach().to(dtype).requires_grad_(self.weight.requires_grad)
        case.ids, case.logprobs = self.ids[:48], self.logprobs[:48]
        return case

    def verify(self, tail: str) -> None:
        """No further from float64 than twice eager."""
        truth, mine, theirs = (
            self.few(torch.float64).eager(tail),
            self.few(torch.float32).ours(tail),
            self.few(torch.float32).eager(tail),
        )
        for exact, x, y in zip(truth, mine, theirs, strict=True):
            error = (x.double() - exact).abs().max().item()
            allowed = 2 * (y.double() - exact).abs().max().item() + 1e-9
            if not error <= allowed:
                raise SystemExit(f"{tail}: error {error:.3g}, eager's {allowed / 2:.3g}")


def interleaved(runs: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def spread(times: list[float]) -> str:
    ordered = sorted(times)
    low, high = ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]
    return f"{statistics.median(times):9.1f} ({low:.1f} - {high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--k", type=int, nargs="+", default=[100])
    arguments = parser.parse_args()
    tokens, width, vocabulary = (128, 64, 4_096) if arguments.quick else (2_048, 576, 32_000)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, float32; {tokens} tokens x {vocabulary} ids, H {width}; "
          "ms, median (p20 - p80)")  # fmt: skip
    for k in arguments.k:
        for frozen in (True, False):
            case = Case(tokens, width, vocabulary, k, frozen)
            runs: dict[str, Callable[[], object]] = {}
            for tail in ("renorm", "bucket"):
                case.verify(tail)
                runs[f"cl_fast {tail}"] = lambda case=case, tail=tail: case.ours(tail)
            runs["eager, whole vocabulary"] = lambda case=case: case.eager("renorm")
            times = interleaved(runs, arguments.turns)
            eager = statistics.median(times["eager, whole vocabulary"])
            print(f"k = {k}, {'frozen head' if frozen else 'trained head'}")
            for name, each in times.items():
                ratio = eager / statistics.median(each)
                print(f"  {name:24} {spread(each):>30}  {ratio:6.2f}x", flush=True)


if __name__ == "__main__":
    main()
