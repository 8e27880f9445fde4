"""What test_o_lora_two_ranks.py runs on two gloo ranks: two tasks under FSDP2 are those of one
process, with A, B and the base split by rows."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tiny_models import batch, llama
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cl_fast.training.keeping import Task
from cl_fast.training.orthogonal import Orthogonal


def two_tasks(model: Any, keep: Orthogonal, shard: bool) -> None:
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


def main() -> None:
    dist.init_process_group("gloo")
    for form in ("project", "squared", "l1"):
        torch.manual_seed(0)
        # rank 3: one rank holds two rows of A, the other one
        config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"])
        alone: Any = get_peft_model(llama(0), config)
        sharded = copy.deepcopy(alone)
        one, two = Orthogonal(form), Orthogonal(form)  # type: ignore[arg-type]
        two_tasks(alone, one, False)
        two_tasks(sharded, two, True)
        wanted = dict(alone.named_parameters())
        for name, p in sharded.named_parameters():
            assert isinstance(p, DTensor)
            torch.testing.assert_close(p.full_tensor(), wanted[name], rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(two.state_dict()["down"], one.state_dict()["down"], strict=True):
            for name in theirs:
                torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-5)
        two.before_task(sharded, Task("c"))  # the base is known again
        two.remove(sharded, "b")
        one.remove(alone, "b")
        for name, p in sharded.named_parameters():
            if "base_layer" in name:
                torch.testing.assert_close(p.full_tensor(), wanted[name], rtol=1e-4, atol=1e-5)
    if dist.get_rank() == 0:
        print("all equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
