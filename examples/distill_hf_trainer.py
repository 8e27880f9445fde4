"""Learn a second task and keep the first: the model before the training is its own teacher.

A small language model can continue sequences of one kind. It is then trained on another kind, once
plainly and once with the divergence from its earlier self added, in the Trainer of transformers.
Logits are never made. Runs in about ten seconds on a CPU:

    python examples/distill_hf_trainer.py
"""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from cl_fast.integrations.transformers import DistillMixin

VOCABULARY, LENGTH = 64, 12
torch.manual_seed(0)


class Distiller(DistillMixin, Trainer):
    """The Trainer, with the loss of a student."""


def sequences(step: int, count: int) -> list[dict[str, torch.Tensor]]:
    """The kind's mark, then numbers that grow by `step`."""
    starts = torch.randint(0, 50, (count, 1))
    numbers = 10 + (starts + step * torch.arange(LENGTH - 1)) % 50
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
def accuracy(model: LlamaForCausalLM, step: int) -> float:
    rows = sequences(step, 200)
    ids = torch.stack([row["input_ids"] for row in rows])
    guesses = model.eval()(ids).logits[:, 1:-1].argmax(-1)
    return (guesses == ids[:, 2:]).float().mean().item()


def train(model: Any, data: list[Any], steps: int, **teacher: Any) -> LlamaForCausalLM:
    kind = Distiller if teacher else Trainer
    kind(model, arguments(steps), train_dataset=data, **teacher).train()
    return model


sizes = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
}
first, second = 3, 7
before = train(LlamaForCausalLM(LlamaConfig(**sizes)), sequences(first, 2000), 100)
plain = train(copy.deepcopy(before), sequences(second, 1000), 80)
# A few old sequences come along, for the teacher to speak about.
mixed = sequences(second, 1000) + sequences(first, 200)
kept = train(copy.deepcopy(before), mixed, 100, teacher=before, kind="forward_kl", ce_weight=5.0)

print(f"{'model':<26}{'first task':>12}{'second task':>13}")
rows = {"before": before, "plainly trained": plain, "with its earlier self": kept}
for name, model in rows.items():
    print(f"{name:<26}{accuracy(model, first):>12.2f}{accuracy(model, second):>13.2f}")
