"""LoRA, on the output head too, with the model under the adapters as the teacher.

A penalty keeps the adapted model near what it was: the divergence from the base, which is the
same model with its adapters off, so nothing is held twice. A plain loop, no trainer, no logits.
Runs in a few seconds on a CPU:

    python examples/distill_peft.py
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from cl_fast.integrations.transformers import head_of, hidden_states, next_labels
from cl_fast.losses import linear_divergence

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
numbers = 10 + (torch.randint(0, 50, (16, 1)) + 7 * torch.arange(12)) % 50
labels = next_labels(numbers)


def adapted(weight: float, steps: int = 40) -> tuple[float, float]:
    """Cross-entropy and divergence after training on cross-entropy + weight x divergence."""
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "lm_head"]))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        with torch.no_grad(), model.disable_adapter():
            teacher = head_of(model).teacher(hidden_states(model, input_ids=numbers))
        student = head_of(model).keywords(hidden_states(model, input_ids=numbers))
        loss, seen = linear_divergence(
            **student, teacher=teacher, labels=labels, ce_weight=1 / weight, return_aux=True
        )
        optimiser.zero_grad()
        (weight * loss).backward()
        optimiser.step()
    model.unload()
    cross_entropy = (seen.cross_entropy.sum() / seen.count).item()
    return cross_entropy, loss.item() - cross_entropy / weight


print(f"{'weight of the divergence':<26}{'cross-entropy':>14}{'away from the base':>20}")
for weight in (0.01, 3.0):
    cross_entropy, divergence = adapted(weight)
    print(f"{weight:<26}{cross_entropy:>14.3f}{divergence:>20.3f}")
