"""O-LoRA penalty and gradient on the CPU: `pytest benchmarks/test_orthogonality.py
--benchmark-enable -s`.

T5-large with LoRA on q and v has 144 modules of rank 8 with 1024 columns.
Three ways to the same gradients, interleaved in one run:

    name matching   two nested loops over named_parameters() that look for the past of each module
                    by its name, as training scripts do, with autograd
    autograd loop   one plain loop over the modules, with autograd
    cl_fast         one call

`extra_info` holds the medians in ms and how often cl_fast fits into each of the others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_fast.ops import orthogonal_penalty

RANK, COLUMNS, LAYERS = 8, 1024, 24
REPEATS = 7
OURS = "cl_fast"


class Projection(nn.Module):
    """A linear layer with its past and new LoRA factors, named and nested as PEFT does it."""

    def __init__(self, past_rows: int) -> None:
        super().__init__()
        self.base_layer = nn.Linear(1, 1, bias=False)
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout()})
        self.lora_A = nn.ModuleDict({"default": nn.Linear(COLUMNS, past_rows, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(past_rows, 1, bias=False)})
        self.loranew_A = nn.ModuleDict({"default": nn.Linear(COLUMNS, RANK, bias=False)})
        self.loranew_B = nn.ModuleDict({"default": nn.Linear(RANK, 1, bias=False)})
        self.lora_A.requires_grad_(False)
        self.lora_B.requires_grad_(False)

    @property
    def new(self) -> Tensor:
        return self.loranew_A["default"].weight

    @property
    def past(self) -> Tensor:
        return self.lora_A["default"].weight


class Attention(nn.Module):
    def __init__(self, past_rows: int) -> None:
        super().__init__()
        self.q, self.v = Projection(past_rows), Projection(past_rows)
        self.k, self.o = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.norm = nn.LayerNorm(1, bias=False)


class Layer(nn.Module):
    def __init__(self, past_rows: int, decoder: bool) -> None:
        super().__init__()
        self.self_attention = Attention(past_rows)
        if decoder:
            self.cross_attention = Attention(past_rows)
        self.wi, self.wo = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.norm = nn.LayerNorm(1, bias=False)


def model(past_rows: int) -> nn.Module:
    """The names and the LoRA shapes of T5-large."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "encoder": nn.ModuleList(Layer(past_rows, False) for _ in range(LAYERS)),
            "decoder": nn.ModuleList(Layer(past_rows, True) for _ in range(LAYERS)),
        }
    )


def name_matching(model: nn.Module) -> Tensor:
    loss = torch.zeros(())
    for past_name, past in model.named_parameters():
        if "lora_A" not in past_name:
            continue
        for name, new in model.named_parameters():
            if "loranew_A" in name and name.split("loranew_A")[0] == past_name.split("lora_A")[0]:
                loss = loss + (past @ new.t()).abs().sum()
                break
    return loss


def autograd_loop(new: list[Tensor], past: list[Tensor]) -> Tensor:
    loss = torch.zeros(())
    for a, p in zip(new, past, strict=True):
        loss = loss + (a @ p.t()).abs().sum()
    return loss


def interleaved(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median host time of each in ms, one of each in turn.

    One thread works, and its processor time is taken: what else the machine does is left out.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(REPEATS + 1):
        for name, run in ways.items():
            start = time.process_time()
            run()
            if repeat:  # the first round warms up
                times[name].append(time.process_time() - start)
    return {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}


@pytest.mark.parametrize("tasks", [1, 15])
def test_penalty_and_gradient(benchmark: Any, tasks: int) -> None:
    torch.set_num_threads(1)  # products of 8 rows are too small to share
    t5 = model(RANK * tasks)
    layers = [module for module in t5.modules() if isinstance(module, Projection)]
    new, past = [layer.new for layer in layers], [layer.past for layer in layers]
    assert len(new) == 144

    ways: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "name matching": lambda: torch.autograd.grad(name_matching(t5), new),
        "autograd loop": lambda: torch.autograd.grad(autograd_loop(new, past), new),
        OURS: lambda: torch.autograd.grad(orthogonal_penalty(new, past), new),
    }
    grads = {name: run() for name, run in ways.items()}
    for name in ways:
        for x, y in zip(grads[OURS], grads[name], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(orthogonal_penalty(new, past), autograd_loop(new, past))

    if benchmark.disabled:
        benchmark(ways[OURS])
        return
    medians = interleaved(ways)
    benchmark.pedantic(ways[OURS], rounds=REPEATS, warmup_rounds=1)
    for name, median in medians.items():
        benchmark.extra_info[f"{name}, ms"] = round(median, 2)
        benchmark.extra_info[f"{name} / {OURS}"] = round(median / medians[OURS], 1)
    print(f"\n{tasks} past tasks: {benchmark.extra_info}")
