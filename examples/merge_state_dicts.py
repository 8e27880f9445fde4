"""Merge finetuned models in memory and see what each method keeps of their skills.

A small network learns two tasks that a base network shares the features of; each finetuned copy is
good at its own. Every merge is one call on state dicts. Runs in a few seconds on a CPU:

    python examples/merge_state_dicts.py
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from cl_fast.merging import dare_ties, greedy_soup, linear, task_arithmetic, ties

torch.manual_seed(0)
TASKS = {"sum": lambda x: x.sum(1, keepdim=True), "product": lambda x: x[:, :1] * x[:, 1:2]}


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)
    )


def loss(model: nn.Module, column: int, x: Tensor) -> Tensor:
    task = list(TASKS.values())[column]
    return ((model(x)[:, column : column + 1] - task(x)) ** 2).mean()


def train(model: nn.Module, columns: list[int], steps: int) -> nn.Module:
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        sum(loss(model, column, torch.randn(128, 4)) for column in columns).backward()
        optimiser.step()
    return model


base = train(network(), [0, 1], 100)
finetuned = {name: train(copy.deepcopy(base), [column], 60) for column, name in enumerate(TASKS)}
held_out = torch.randn(4096, 4)


def score(state: dict[str, Tensor]) -> float:
    """Minus the mean loss over both tasks: what a greedy soup and the table go by."""
    model = network()
    model.load_state_dict(state)
    with torch.no_grad():
        return -sum(loss(model, column, held_out).item() for column in range(2)) / 2


results = {
    "base": base.state_dict(),
    **{f"finetuned on {name}": model.state_dict() for name, model in finetuned.items()},
    "linear": linear(finetuned),
    "task_arithmetic": task_arithmetic(base, finetuned, lam=0.6),
    "ties": ties(base, finetuned, density=0.5),
    "dare_ties": dare_ties(base, finetuned, density=0.5, lam=0.6, seed=0),
    "greedy soup": greedy_soup({"base": base, **finetuned}, score).state_dict,
}

print(f"{'model':<24}{'mean loss':>10}")
for name, state in results.items():
    assert state is not None
    print(f"{name:<24}{-score(state):>10.4f}")
