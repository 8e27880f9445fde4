"""FSDP2: two ranks train, fold and remove what one process does, with A, B and the base split by
rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from forked_ranks import on_two_ranks
from peft import LoraConfig, get_peft_model
from tiny_models import batch, llama
from torch import Tensor

from cl_fast.training.keeping import Task
from cl_fast.training.orthogonal import Form, Orthogonal


def adapted() -> Any:
    torch.manual_seed(0)
    # rank 3: one rank holds two rows of A, the other one
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    return get_peft_model(llama(0), config)


def two_tasks(model: Any, keep: Orthogonal, shard: bool) -> list[dict[str, Tensor]]:
    """The weights after two tasks, the factors that were folded, and the base without the last."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    for name in "ab":
        keep.before_task(model, Task(name))
        if shard and name == "a":
            for layer in model.base_model.model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=3e-2, foreach=False)
        for step in range(2):
            model(**batch(step)).loss.backward()
            keep.on_gradients(model)
            optimizer.step()
            keep.on_update(model)
            optimizer.zero_grad()
        keep.after_task(model, Task(name))

    def whole(part: str) -> dict[str, Tensor]:
        assert all(isinstance(p, DTensor) == shard for p in model.parameters())
        return {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in model.named_parameters()
            if part in name
        }

    found = [whole(""), *copy.deepcopy(keep.state_dict()["down"])]
    if shard:
        keep.before_task(model, Task("c"))  # the base is known again
    keep.remove(model, "b")
    return [*found, whole("base_layer")]


def on_rank(rank: int, form: Form) -> list[dict[str, Tensor]]:
    return two_tasks(adapted(), Orthogonal(form), True)


@pytest.mark.parametrize("form", ["project", "squared", "l1"])
def test_two_ranks_fold_what_one_process_folds(form: Form) -> None:
    expected = two_tasks(adapted(), Orthogonal(form), False)
    for found in on_two_ranks(on_rank, form):
        for mine, wanted in zip(found, expected, strict=True):
            assert mine.keys() == wanted.keys()
            assert wanted
            for name, value in mine.items():
                torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5, msg=name)
