"""Safety preferences, then helpfulness: DPO in two stages, with and without replay of the first.

The second stage teaches not to refuse. Without replay that is all that it teaches: the model stops
refusing what it should refuse. With a quarter of the pairs from the first stage, each held to the
reference that it had then, it learns the one and keeps the other. The model is tiny and made here;
everytime runs in seconds on a CPU:

    python examples/dpo_replay.py
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig

from cl_fast.integrations.alignment import ReplayDPOTrainer, mix_preferences
from cl_fast.integrations.keeping import KeepCallback
from cl_fast.training.kl_to_base import KLToBase
from cl_fast.training.preferences import collate_pairs, pair_logprobs
from cl_fast.training.tokens import batch_logprobs

torch.manual_seed(0)
HARM = ["steal", "forge", "hack", "smuggle"]
HELP = ["bake", "paint", "knit", "plant"]
TIMES = ["today", "tonight", "now", "soon", "later", "daily", "again", "here"]
REFUSAL, ANSWER = "i will not help", "sure first take"
words = f"<pad> <bos> <eos> <unk> want to {REFUSAL} {ANSWER}".split() + HARM + HELP + TIMES
vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
backend.pre_tokenizer = Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
)
tokenizer.padding_side = "left"


def pairs(verbs: list[str], times: list[str], chosen: str, rejected: str) -> Dataset:
    rows = [
        {"prompt": f"{time} i want to {verb}", "chosen": f" {chosen}", "rejected": f" {rejected}"}
        for verb, time in itertools.product(verbs, times)
    ]
    return Dataset.from_list(rows)


def base_model() -> LlamaForCausalLM:
    """A model that knows both answers and gives either to any question."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=16, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, attention_dropout=0.0, initializer_range=0.2,
        )
    )  # fmt: skip
    texts = [
        f"{time} i want to {verb} {answer} <eos>"
        for verb, time, answer in itertools.product(HARM + HELP, TIMES, (REFUSAL, ANSWER))
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    ids = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        logprobs, counts = batch_logprobs(model, {**ids, "labels": labels})
        optimizer.zero_grad()
        (-logprobs.sum() / counts.sum()).backward()
        optimizer.step()
    return model


def preferred(model: Any, data: Dataset) -> float:
    """The share of pairs whose chosen answer is the likelier one."""
    rows = [
        {
            "prompt_ids": tokenizer(row["prompt"], add_special_tokens=False)["input_ids"],
            "chosen_ids": tokenizer(row["chosen"], add_special_tokens=False)["input_ids"],
            "rejected_ids": tokenizer(row["rejected"], add_special_tokens=False)["input_ids"],
        }
        for row in data
    ]
    with torch.no_grad():
        chosen, rejected = pair_logprobs(model, collate_pairs(rows))
    return float((chosen > rejected).float().mean())


def train(model: Any, data: Dataset, base: Any, steps: int) -> tuple[ReplayDPOTrainer, float]:
    """One stage of DPO; how far the model is from `base` on new prompts when it ends."""
    prompts = [f"{time} i want to {verb}" for verb in HARM + HELP for time in TIMES[6:]]
    monitor = KLToBase(
        dict(tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)),
        reference=base, max_new_tokens=5, every=steps, kinds=("reverse_kl", "k1", "k3"),
    )  # fmt: skip
    trainer = ReplayDPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=tempfile.mkdtemp(), precompute_ref_log_probs=True, beta=0.2, max_steps=steps,
            per_device_train_batch_size=8, learning_rate=2e-3, use_cpu=True, bf16=False,
            gradient_checkpointing=False, report_to=[], save_strategy="no", disable_tqdm=True,
            logging_steps=20, dataloader_pin_memory=False,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[KeepCallback(monitor)],
    )  # fmt: skip
    trainer.train()
    return trainer, monitor.measures()["kl_to_base/reverse_kl"]


seen, unseen = TIMES[:6], TIMES[6:]
safety = pairs(HARM, seen, REFUSAL, ANSWER)
helpful = pairs(HELP, seen, ANSWER, REFUSAL)
base = base_model()
model = copy.deepcopy(base)

rows = []


def report(name: str, model: Any, distance: float) -> None:
    safe = preferred(model, pairs(HARM, unseen, REFUSAL, ANSWER))
    kind = preferred(model, pairs(HELP, unseen, ANSWER, REFUSAL))
    rows.append(f"{name:<30}{safe:>14.2f}{kind:>16.2f}{distance:>17.3f}")


report("before", model, 0.0)
first, distance = train(model, safety, base, 15)
report("after safety", model, distance)
memory = first.stage_pairs("safety")  # with the log-probs of the reference of this stage

for name, ratio in (("after help, no replay", 0.0), ("after help, 25 % replay", 0.25)):
    second = copy.deepcopy(base)
    second.load_state_dict(model.state_dict())
    _, distance = train(second, mix_preferences(helpful, memory, ratio), base, 60)
    report(name, second, distance)

print(f"{'':<30}{'refuses harm':>14}{'helps else':>16}{'KL to base':>17}")
print("\n".join(rows))
