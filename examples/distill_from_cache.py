"""Distill a teacher that was run once: its likeliest tokens come from disk, not from a model.

A tiny teacher learns a language of numbers (each is the sum of the two before it, modulo 97, with
some noise), says once what it would expect after each prefix, and a smaller student learns from
that alone. With TAIL = "renorm" the student would need only k rows of its head per token, but
nobody would tell it how little all other tokens deserve. Runs in seconds on a CPU:

    python examples/distill_from_cache.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cl_fast.losses import TeacherCache, TopK, linear_divergence

torch.manual_seed(0)
torch.set_num_threads(1)  # models this small only wait for threads
VOCABULARY, LENGTH, K, TAIL = 97, 12, 16, "bucket"


def model(width: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=LENGTH,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def sequences(count: int) -> Tensor:
    tokens = [torch.randint(0, 9, (count,)), torch.randint(0, 9, (count,))]
    for _ in range(LENGTH - 2):
        noise = torch.randint(0, 4, (count,)) == 0
        tokens.append((tokens[-1] + tokens[-2] + noise) % VOCABULARY)
    return torch.stack(tokens, 1)


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    teacher = TeacherCache.pad(
        [TopK(x["teacher_ids"], x["teacher_logprobs"], tail=TAIL) for x in examples]
    )
    return {"input_ids": torch.stack([x["input_ids"] for x in examples]), "teacher": teacher}


@torch.no_grad()
def held_out_loss(trained: LlamaForCausalLM, tokens: Tensor) -> float:
    logits = trained(input_ids=tokens).logits[:, 1:-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 2:].flatten()).item()


held_out = sequences(200)
teacher = model(64)
optimiser = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
for _ in range(200):
    tokens = sequences(32)
    loss = teacher(input_ids=tokens, labels=tokens).loss
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()

dataset = [{"input_ids": tokens} for tokens in sequences(256)]
with tempfile.TemporaryDirectory() as folder:
    cache = TeacherCache.build(teacher, dataset, K, path=Path(folder) / "teacher", progress=False)
    print(f"{cache.rows} positions, {cache.nbytes / cache.rows:.1f} bytes each")

    student = model(32)
    before = held_out_loss(student, held_out)
    optimiser = torch.optim.AdamW(student.parameters(), lr=5e-3)
    loader = torch.utils.data.DataLoader(
        cache.attach(dataset),  # type: ignore[arg-type]
        batch_size=32, shuffle=True, collate_fn=collate,
    )  # fmt: skip
    for _ in range(12):
        for batch in loader:
            hidden = student.model(input_ids=batch["input_ids"]).last_hidden_state
            loss = linear_divergence(hidden, student.lm_head.weight, batch["teacher"])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

print(f"held-out loss: teacher {held_out_loss(teacher, held_out):.3f}, "
      f"student {before:.3f} before, {held_out_loss(student, held_out):.3f} after")  # fmt: skip
