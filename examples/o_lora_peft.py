"""O-LoRA on a stock PEFT adapter: four tasks, one after the other, in the Trainer of transformers.

After each task the adapter is folded into the base and begins anew; its A stays orthogonal to the
rows of A of all tasks before it. The table shows what holds exactly: how far the new A reaches into
the past (nothing), the size of the past, and that the adapter stays as small as it was. It says
nothing about forgetting, which depends on the tasks. Runs in a few seconds on a CPU:

    python examples/o_lora_peft.py
"""

from __future__ import annotations

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from cl_fast.integrations.keeping import KeepCallback
from cl_fast.models.adapters import lora_layers
from cl_fast.training.orthogonal import Orthogonal

torch.manual_seed(0)
sizes = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
}
base = LlamaForCausalLM(LlamaConfig(**sizes))
model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))


def counting(step: int) -> list[dict[str, torch.Tensor]]:
    """A task: sequences that count in steps of its own."""
    numbers = 10 + (torch.randint(0, 50, (64, 1)) + step * torch.arange(12)) % 50
    return [{"input_ids": row, "labels": row} for row in numbers]


keep = Orthogonal()  # form="project", past="fold"
print(f"{'task':<16}{'first loss':>10}{'last loss':>12}{'overlap':>12}{'past rows':>12}{'rank':>8}")
for step in (1, 7, 3, 11):
    name = f"steps of {step}"
    rows = sum(len(p) for p in keep.past_rows(model).values()) // 4
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                max_steps=20,
                per_device_train_batch_size=16,
                learning_rate=1e-2,
                logging_steps=10,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=counting(step),
            callbacks=[KeepCallback(keep, name=name)],
        )
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    overlap = logs[-1].get("orthogonal/overlap", 0.0)
    rank = lora_layers(model, "default")[0].down.shape[0]
    print(
        f"{name:<16}{logs[0]['loss']:>10.3f}{logs[-1]['loss']:>12.3f}{overlap:>12.0e}"
        f"{rows:>12}{rank:>8}"
    )
