"""Projected full fine-tuning beside plain full fine-tuning and the OSF of PEFT, on the CPU.

    python benchmarks/projection.py              # hidden size 256, 4 layers, 2048 tokens per step
    python benchmarks/projection.py --quick      # a small size

First what each lets through: after some steps of AdamW, the part of each layer's update that lies
in the leading half of the singular directions of its weight at the start (from an SVD in float64),

    leak = max(norm(U^T D), norm(D V)) / norm(D),    D = W - W_start

worst layer and mean, with how far the weights had moved. Then whether PEFT's `unload` and
`merge_and_unload` keep what was trained. Then the time of one step (forward, backward, AdamW,
projection), all ways in turns in one process, and the bytes that each holds besides weights,
gradients and the optimizer's state.

All ways train the linear layers of the blocks; embeddings, norms and head are frozen.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from cl_fast.training.keeping import Task
from cl_fast.training.projection import Project

RATE, DECAY, VOCABULARY = 1e-3, 0.01, 512


def llama(width: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("_proj" in name)
    return model


def batch(step: int, tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(1, VOCABULARY, (tokens // 64, 64), generator=generator)
    ids[:, 1::2] = (ids[:, ::2] * 7 + 3) % (VOCABULARY - 1) + 1  # something to learn
    return {"input_ids": ids, "labels": ids}


class Way:
    """One way to train: a model, its optimizer, and what is done after a step."""

    def __init__(
        self,
        name: str,
        width: int,
        layers: int,
        tokens: int,
        rate: float = RATE,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name, self.tokens, self.steps = name, tokens, 0
        model = llama(width, layers).to(dtype)
        self.start = {n: p.detach().clone() for n, p in model.named_parameters() if "_proj" in n}
        self.model: Any = model
        self.keep: Project | None = None
        self.extra = 0
        if name == "PEFT OSF":
            self.model = osf(model)
            held = [*self.model.parameters(), *self.model.buffers()]
            # Its factors, and what it holds of their start, beside the base weights.
            self.extra = _bytes(held) - _bytes(llama(width, layers).parameters())
        elif name != "plain":
            protect = "weights" if name == "Project, weights" else "inputs"
            options = {"rank": 0.5} if protect == "weights" else {"energy": 1.0, "rank": 0.1}
            self.keep = Project(protect, **options)
            if protect == "inputs":
                self.keep.remember(model, [batch(10**6, tokens)])
            self.keep.before_task(model, Task("new"))
            layers_of = self.keep._covered
            bases = {id(x): x for layer in layers_of for x in (layer.left, layer.right)
                     if x is not None}  # fmt: skip
            starts = [layer.start for layer in layers_of if layer.start is not None]
            self.extra = _bytes([*bases.values(), *starts])
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=DECAY)

    def step(self) -> None:
        self.model(**batch(self.steps, self.tokens)).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.keep is not None:
            self.keep.on_update(self.model)
        self.steps += 1

    def weights(self) -> dict[str, Tensor]:
        if self.name != "PEFT OSF":
            return {n: p.detach() for n, p in self.model.named_parameters() if n in self.start}
        found = {}
        for name in self.start:
            layer = self.model.base_model.model.get_submodule(name.removesuffix(".weight"))
            found[name] = layer.base_layer.weight + layer.get_delta_weight("default").detach()
        return found


def osf(model: nn.Module) -> Any:
    from peft import OSFConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, OSFConfig(target_modules=r".*_proj", effective_rank=0.5))


def _bytes(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def leak(start: Tensor, end: Tensor, left: Tensor | None, right: Tensor) -> tuple[float, float]:
    update = end.double() - start.double()
    size = float(update.norm())
    parts = [float((update @ right).norm())]
    if left is not None:
        parts.append(float((left.t() @ update).norm()))
    return max(parts) / size, size / float(start.double().norm())


def leaks(way: Way) -> str:
    found = []
    for name, end in way.weights().items():
        start = way.start[name]
        if way.name == "Project, inputs":
            assert way.keep is not None
            left, right = None, way.keep.bases[name.removesuffix(".weight")].double()
        else:
            u, s, vt = torch.linalg.svd(start.double(), full_matrices=False)
            left, right = u[:, : len(s) // 2], vt[: len(s) // 2].t()
        found.append(leak(start, end, left, right))
    each, moved = zip(*found, strict=True)
    return (f"    {way.name:20} worst {max(each):8.1e}   mean {statistics.mean(each):8.1e}   "
            f"norm(D) / norm(W) {statistics.mean(moved):.3f}")  # fmt: skip


def unloading(width: int, tokens: int) -> None:
    for call in ("unload", "merge_and_unload"):
        way = Way("PEFT OSF", width, 1, tokens)
        for _ in range(3):
            way.step()
        trained = way.weights()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = getattr(way.model, call)()
        ended = dict(plain.named_parameters())
        kept = all(torch.equal(ended[name], trained[name]) for name in trained)
        lost = all(torch.equal(ended[name], way.start[name]) for name in trained)
        said = "the trained weights" if kept else "the weights before training" if lost else "other"
        print(f"  {call + '()':20} gives {said}")


def interleaved(
    runs: dict[str, Callable[[], object]], turns: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if turn:
                times[name].append(1e3 * (clock() - start))
    return times


def spread(times: list[float]) -> str:
    ordered = sorted(times)
    low, high = ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]
    return f"{statistics.median(times):9.1f} ({low:.1f} - {high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    width, layers, tokens = (64, 2, 256) if arguments.quick else (256, 4, 2048)
    import peft
    import transformers

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} thread(s), torch "
          f"{torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, "
          f"commit {commit}; float32, hidden size {width}, {layers} layers, {tokens} tokens per "
          f"step, AdamW, weight decay {DECAY}")  # fmt: skip
    names = ["plain", "Project, inputs", "Project, weights", "PEFT OSF"]
    small = 8 if arguments.quick else 20
    print(f"leak after {small} steps")
    for dtype in (torch.float32, torch.bfloat16):
        for rate in (RATE, RATE / 10):
            print(f"  {str(dtype).removeprefix('torch.')} weights, AdamW at {rate}")
            for name in names:
                way = Way(name, width, layers, 256, rate, dtype)
                for _ in range(small):
                    way.step()
                print(leaks(way), flush=True)
    print("after training with PEFT OSF")
    unloading(64, 256)
    print("time of a step, ms, median (p20 - p80)")
    ways = {name: Way(name, width, layers, tokens) for name in names}
    # The processor's time of one thread leaves out what else the machine does.
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    times = interleaved({name: way.step for name, way in ways.items()}, arguments.turns, clock)
    plain = statistics.median(times["plain"])
    for name, each in times.items():
        more = statistics.median(each) / plain
        print(f"  {name:20} {spread(each):>30}  {more:5.2f}x  holds {ways[name].extra / 2**20:.1f} "
              "MiB more")  # fmt: skip


if __name__ == "__main__":
    main()
