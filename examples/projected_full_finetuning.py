"""Full fine-tuning on a second task without touching what the first one needs.

A small language model learns to continue sequences of one kind, then of another kind. The second
training is done plainly, and with the updates of its linear layers kept out of the inputs of the
first task (GPM), or out of the leading singular directions of the weights (OSF). No old data is
used. The last column tells how much of the second update, in the worst layer, reaches the inputs of
the first task. Runs in about ten seconds on a CPU:

    python examples/projected_full_finetuning.py
"""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from cl_fast.integrations.keeping import KeepCallback
from cl_fast.training.projection import Project

VOCABULARY, LENGTH = 64, 12
torch.manual_seed(0)


def sequences(step: int, low: int, count: int) -> list[dict[str, torch.Tensor]]:
    """The kind's mark, then numbers that grow by `step` and stay in low ... low + 24."""
    starts = torch.randint(0, 25, (count, 1))
    numbers = low + (starts + step * torch.arange(LENGTH - 1)) % 25
    ids = torch.cat([torch.full((count, 1), step), numbers], 1)
    labels = ids.clone()
    labels[:, :2] = -100  # neither the mark nor the first number can be told
    return [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]


def arguments(steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
    )


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, task: tuple[int, int]) -> float:
    ids = torch.stack([row["input_ids"] for row in sequences(*task, 200)])
    guesses = model.eval()(ids).logits[:, 1:-1].argmax(-1)
    return (guesses == ids[:, 2:]).float().mean().item()


def train(model: Any, task: tuple[int, int], steps: int, keep: Project | None = None) -> Any:
    callbacks = [] if keep is None else [KeepCallback(keep)]
    data = sequences(*task, 1000)
    Trainer(model, arguments(steps), train_dataset=data, callbacks=callbacks).train()
    return model


def reach(before: Any, after: Any, bases: dict[str, torch.Tensor]) -> float:
    """norm(D M) / norm(D) of the worst layer."""
    worst = 0.0
    for name, basis in bases.items():
        update = after.get_submodule(name).weight.detach() - before.get_submodule(name).weight
        worst = max(worst, float((update.detach() @ basis).norm() / update.detach().norm()))
    return worst


sizes = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
}
first, second = (3, 10), (7, 10)
gpm = Project("inputs", energy=0.99)
before = train(LlamaForCausalLM(LlamaConfig(**sizes)), first, 60, gpm)  # remembers its inputs
bases = dict(gpm.bases)

print(f"{'model':<24}{'first task':>12}{'second task':>13}{'reaches':>11}")
print(f"{'before':<24}{accuracy(before, first):>12.2f}{accuracy(before, second):>13.2f}{0:>11.1e}")
ways = {
    "plainly trained": None,
    "off the first's inputs": gpm,
    "off leading directions": Project("weights", rank=0.5),
}
for name, keep in ways.items():
    model = train(copy.deepcopy(before), second, 60, keep)
    kept, learned = accuracy(model, first), accuracy(model, second)
    print(f"{name:<24}{kept:>12.2f}{learned:>13.2f}{reach(before, model, bases):>11.1e}")
