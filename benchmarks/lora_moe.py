"""LoRAMoE as one gated layer on the CPU, against one LoRA of the same rank and a loop over experts.

    python benchmarks/lora_moe.py             # the table of times, then that of memory
    python benchmarks/lora_moe.py --quick     # small sizes
    python benchmarks/lora_moe.py --out DIR   # and DIR/lora_moe_cpu.json, .md

A row is forward + backward, gradients to the input and to what is trained; the base weight is
frozen. `layer` has the base product in it, `branch` has not: there the base output is given, and
what adapters add to a layer's time is seen bare. Providers, in turns in one process:

    cl_fast     n experts of rank r behind a gate, `LoRAMoE` (branch: `gated_low_rank`)
    LoRA        one LoRA of rank n r; for `layer` that of PEFT where it is installed, for `branch`
                the same lines in plain torch: base + B(A(x)) * scale
    fused LoRA  the same LoRA with its scale folded and the sum in the product: the least that a
                branch of rank n r can cost (branch only)
    loop        expert after expert, each output scaled by its gate, as LoRAMoE's authors write it

Outputs and gradients of cl_fast are compared with the loop in float64 before anything is timed.
Memory is what autograd keeps for the backward pass of the layer, the input with it, weights not.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_fast.ops import gated_low_rank
from cl_fast.training.lora_moe import LoRAMoE

# tokens, d_in, d_out: a toy, where calls cost more than numbers; up and down projections of SmolLM
# 135M, and of a Llama of width 1024.
SIZES = [
    (128, 64, 128),
    (512, 576, 1536),
    (2048, 576, 1536),
    (2048, 1536, 576),
    (512, 1024, 2816),
    (2048, 1024, 2816),
    (2048, 2816, 1024),
]
QUICK = [(128, 64, 160)]
EXPERTS, RANK, SCALE = 8, 4, 8.0


class Loop(nn.Module):
    """The experts of a `LoRAMoE`, one after the other."""

    def __init__(self, layer: LoRAMoE) -> None:
        super().__init__()
        self.base_layer, self.gate = layer.base_layer, layer.gate
        self.downs = nn.ParameterList(p.detach().clone() for p in layer.down.chunk(EXPERTS, 0))
        self.ups = nn.ParameterList(p.detach().clone() for p in layer.up.chunk(EXPERTS, 1))

    def forward(self, x: Tensor, base: Tensor | None = None) -> Tensor:
        y = self.base_layer(x) if base is None else base
        p = F.softmax(F.linear(x, self.gate), -1)
        for i, (a, b) in enumerate(zip(self.downs, self.ups, strict=True)):
            y = y + F.linear(F.linear(x, a), b) * p[..., i : i + 1] * SCALE
        return y


class LoRA(nn.Module):
    """One LoRA of rank n r as PEFT computes it; `fused` as it could be computed."""

    def __init__(self, layer: LoRAMoE, fused: bool = False) -> None:
        super().__init__()
        self.base_layer, self.fused = layer.base_layer, fused
        self.a, self.b = (nn.Parameter(p.detach().clone()) for p in (layer.down, layer.up))

    def forward(self, x: Tensor, base: Tensor | None = None) -> Tensor:
        y = self.base_layer(x) if base is None else base
        if self.fused:
            inner = F.linear(x, self.a * SCALE).flatten(0, -2)
            return torch.addmm(y.flatten(0, -2), inner, self.b.t()).view_as(y)
        return y + F.linear(F.linear(x, self.a), self.b) * SCALE


def peft_layer(layer: LoRAMoE) -> nn.Module | None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        return None
    model = nn.Sequential(nn.Linear(layer.in_features, layer.out_features, bias=False))
    model[0].weight = layer.base_layer.weight
    rank = EXPERTS * RANK
    config = LoraConfig(r=rank, lora_alpha=int(SCALE * rank), target_modules=["0"])
    inject_adapter_in_model(config, model)
    return model[0]


class Case:
    """One size: the providers as functions without arguments."""

    def __init__(self, tokens: int, d_in: int, d_out: int) -> None:
        g = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        base = nn.Linear(d_in, d_out, bias=False)
        self.moe = LoRAMoE(base, EXPERTS, RANK, SCALE * RANK, generator=g)
        self.moe.up.data.normal_(generator=g)
        self.moe.gate.data.mul_(4.0)
        self.loop, self.lora = Loop(self.moe), LoRA(self.moe)
        self.fused, self.peft = LoRA(self.moe, fused=True), peft_layer(self.moe)
        shape = (tokens // 128, 128)
        self.x = torch.randn(*shape, d_in, generator=g).requires_grad_()
        self.given = torch.randn(*shape, d_out, generator=g).requires_grad_()
        self.dy = torch.randn(*shape, d_out, generator=g)

    def branch_of_moe(self, x: Tensor, base: Tensor) -> Tensor:
        m = self.moe
        return gated_low_rank(x, m.down, m.gate, m.up, scale=m.scale, base=base)[0]

    def runs(self, what: str) -> dict[str, Callable[[], Any]]:
        def step(f: Callable[..., Tensor], module: nn.Module, *given: Tensor) -> Callable[[], Any]:
            wanted = [self.x, *given, *(p for p in module.parameters() if p.requires_grad)]
            return lambda: torch.autograd.grad(f(self.x, *given), wanted, self.dy)

        if what == "layer":
            lora = self.peft or self.lora
            return {
                "cl_fast": step(self.moe, self.moe),
                "LoRA": step(lora, lora),
                "loop": step(self.loop, self.loop),
            }
        return {
            "cl_fast": step(self.branch_of_moe, self.moe, self.given),
            "LoRA": step(self.lora, self.lora, self.given),
            "fused LoRA": step(self.fused, self.fused, self.given),
            "loop": step(self.loop, self.loop, self.given),
        }

    def verify(self) -> None:
        """Against a loop in float64, on the first rows: within 2e-6 of the largest number."""
        x, dy = self.x.detach()[:1].requires_grad_(), self.dy[:1]
        exact = copy.deepcopy(self.loop).double()
        x64 = x.detach().double().requires_grad_()
        y64 = exact(x64)
        g64 = torch.autograd.grad(y64, [x64, exact.gate, *exact.downs, *exact.ups], dy.double())
        n = EXPERTS
        truth = {"y": y64, "x": g64[0], "gate": g64[1],
                 "down": torch.cat(g64[2 : 2 + n]), "up": torch.cat(g64[2 + n :], 1)}  # fmt: skip
        y = self.moe(x)
        got = torch.autograd.grad(y, [x, self.moe.gate, self.moe.down, self.moe.up], dy)
        mine = {"y": y, **dict(zip(("x", "gate", "down", "up"), got, strict=True))}
        for name, true in truth.items():
            error = (mine[name].double() - true).abs().max().item() / true.abs().max().item()
            if error > 2e-6:
                raise SystemExit(f"wrong: {name} is off by {error:.3g} of its largest number")

    def kept(self) -> dict[str, int]:
        """Bytes that autograd keeps for the backward pass of the layer, without weights."""
        modules: dict[str, nn.Module] = {
            "cl_fast": self.moe,
            "LoRA": self.peft or self.lora,
            "loop": self.loop,
        }
        return {name: kept(module, self.x) for name, module in modules.items()}


def kept(module: nn.Module, x: Tensor) -> int:
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)
    del y
    return sum(sizes.values())


def interleaved(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each, in turns, for about `seconds` in all and at least five turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(times[next(iter(runs))]) < 5:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def spread(times: list[float]) -> str:
    ordered = sorted(times)
    low, high = ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]
    return f"{statistics.median(times):.2f} ({low:.2f} - {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=4.0, help="per row")
    parser.add_argument("--out", type=Path, help="folder of the results")
    arguments = parser.parse_args()
    facts = about()
    say(f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}, {facts['lora']}, "
        f"float32, commit {facts['commit']}. {EXPERTS} experts of rank {RANK}. Milliseconds of "
        "forward + backward, in turns: median (p20 - p80).\n")  # fmt: skip
    say("| tokens | d_in | d_out | what | cl_fast | LoRA | fused LoRA | loop | cl_fast / LoRA | "
        "cl_fast / fused LoRA | loop / cl_fast |")  # fmt: skip
    say("|---|---|---|---|---|---|---|---|---|---|---|")
    rows, memory = [], []
    for size in QUICK if arguments.quick else SIZES:
        case = Case(*size)
        case.verify()
        memory.append({"size": size, **case.kept()})
        for what in ("layer", "branch"):
            times = interleaved(case.runs(what), arguments.seconds)
            middle = {name: statistics.median(x) for name, x in times.items()}
            mine, fused = middle["cl_fast"], middle.get("fused LoRA")
            rows.append({"size": size, "what": what, "milliseconds": times})
            say(f"| {size[0]} | {size[1]} | {size[2]} | {what} | {spread(times['cl_fast'])} | "
                f"{spread(times['LoRA'])} | {spread(times['fused LoRA']) if fused else ''} | "
                f"{spread(times['loop'])} | {mine / middle['LoRA']:.2f} | "
                f"{f'{mine / fused:.2f}' if fused else ''} | "
                f"{middle['loop'] / mine:.2f} |")  # fmt: skip
    say("\nKept for the backward pass of a layer, MB, the input included:\n")
    say("| tokens | d_in | d_out | cl_fast | LoRA | loop | loop / cl_fast |")
    say("|---|---|---|---|---|---|---|")
    for row in memory:
        tokens, d_in, d_out = row["size"]
        mine, lora, many = (row[name] for name in ("cl_fast", "LoRA", "loop"))
        say(f"| {tokens} | {d_in} | {d_out} | {mine / 1e6:.2f} | {lora / 1e6:.2f} | "
            f"{many / 1e6:.2f} | {many / mine:.1f} |")  # fmt: skip
    if arguments.out:
        path = arguments.out / "lora_moe_cpu"
        report = {**facts, "rows": rows, "memory": memory}
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
    try:
        import peft

        lora = f"LoRA of peft {peft.__version__}"
    except ImportError:
        lora = "LoRA in plain torch"
    root = Path(__file__).parents[1]
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"],
                          capture_output=True, text=True)  # fmt: skip
    return {
        "cpu": cpu,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "lora": lora,
        "commit": done.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
