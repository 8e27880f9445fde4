"""What test_keeping_ranks.py runs on two gloo ranks: keeps do there what they do in one process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from test_keeping import options, rows
from tiny_models import VOCABULARY, batch, llama
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from cl_fast.learning import learn
from cl_fast.training import Anchor, Keep, Orthogonal, Project, Replay, SelfDistill, Task

LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)


def adapted() -> Any:
    torch.manual_seed(3)
    return get_peft_model(llama(), LORA)


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return list(torch.randint(3, VOCABULARY, (4, 6), generator=generator))


def weights(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, x in model.state_dict().items():
        whole = x.full_tensor() if isinstance(x, DTensor) else x
        found[name.removeprefix("module.")] = whole.detach().clone()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(
            found[name], x, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{what}: {name}: {m}"
        )


CASES: dict[str, tuple[Callable[[], Any], Callable[[int], list[Keep]]]] = {
    "none": (llama, lambda ranks: []),
    "anchor": (llama, lambda ranks: [Anchor(0.5, fisher="sequence", sequences=8)]),
    "inputs": (llama, lambda ranks: [Project(energy=0.8)]),
    "weights": (llama, lambda ranks: [Project("weights", rank=0.5)]),
    "o-lora": (adapted, lambda ranks: [Orthogonal()]),
    "o-lora squared": (adapted, lambda ranks: [Orthogonal("squared", weight=0.1)]),
    "replay": (llama, lambda ranks: [Replay(0.25, seed=1)]),
    "distil": (llama, lambda ranks: [SelfDistill(prompts(), batch_size=4 // ranks, weight=0.5)]),
}


def a_stream(name: str, ranks: int, folder: Path) -> dict[str, Tensor]:
    """Two tasks by `learn`, in DDP where there are ranks."""
    make, keeps = CASES[name]
    args = TrainingArguments(
        **options(
            folder / "unused",
            max_steps=3,
            per_device_train_batch_size=4 // ranks,
            train_sampling_strategy="sequential",
            optim="sgd",
            learning_rate=0.05,
        )
    )
    tasks = {"a": (rows(16, 1), rows(4, 1)), "b": (rows(16, 2), rows(4, 2))}
    report = learn(make(), tasks, args=args, out=folder / "run", keep=keeps(ranks))
    assert len(report.matrix.rows) == 2
    return weights(report.model)  # type: ignore[arg-type]


def loop(model: Any, keeps: list[Keep], mine: slice) -> dict[str, Tensor]:
    """Two tasks of two AdamW steps in a loop of one's own; the batch is 4 sequences in all."""
    for index in range(2):
        full = batch(seed=index, size=4)
        part = {k: x[mine] for k, x in full.items()}
        task = Task(f"t{index}", index, batches=lambda part=part: [part])
        for keep in keeps:
            keep.before_task(model, task)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            inputs = {k: part[k] for k in ("input_ids", "attention_mask")}
            logits = model(**inputs).logits[:, :-1]
            targets = part["labels"][:, 1:]
            loss = nn.functional.cross_entropy(
                logits.transpose(1, 2), targets, ignore_index=-100, reduction="sum"
            )
            count = (full["labels"][:, 1:] != -100).sum()
            (loss / count * (4 / part["labels"].size(0))).backward()
            for keep in keeps:
                keep.on_gradients(model)
            optimizer.step()
            for keep in keeps:
                keep.on_update(model)
        for keep in keeps:
            keep.after_task(model, task)
    return weights(model)


def sharded(model: Any) -> Any:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in inner.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


FSDP = {
    "anchor": lambda: (llama(), [Anchor(0.5)]),
    "inputs": lambda: (llama(), [Project(energy=0.8, others="train")]),
    "weights": lambda: (llama(), [Project("weights", rank=0.5, others="train")]),
    "o-lora": lambda: (adapted(), [Orthogonal()]),
}


def in_one_process(folder: Path) -> None:
    """What the ranks are compared with; there must be no process group, which keeps would ask."""
    for name, case in FSDP.items():
        model, keeps = case()
        torch.save(loop(model, keeps, slice(0, 4)), folder / f"fsdp {name}.pt")
    for name in CASES:
        torch.save(a_stream(name, 1, folder / f"one {name}"), folder / f"ddp {name}.pt")


def main(folder: Path, only: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for name in FSDP:
        if only and f"fsdp {name}" not in only:
            continue
        model, keeps = FSDP[name]()
        found = loop(sharded(model), keeps, slice(2 * rank, 2 * rank + 2))
        assert_same(found, torch.load(folder / f"fsdp {name}.pt"), f"fsdp {name}")
    for name in CASES:
        if only and f"ddp {name}" not in only:
            continue
        found = a_stream(name, 2, folder / f"two {name}")
        assert_same(found, torch.load(folder / f"ddp {name}.pt"), f"ddp {name}")
    if rank == 0:
        sys.stdout.write("all equal\n")
    dist.barrier()
    sys.stdout.flush()
    # gloo's threads may abort a process that ends while they wait: no end, then.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
