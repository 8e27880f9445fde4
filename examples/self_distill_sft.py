"""Teach a model a second task in TRL's SFTTrainer, and let its earlier self hold the first.

A small language model counts on by threes. It then learns to count on by sevens: plainly, and with
the divergence from the model before the training added to the loss - on the new data, on prompts
that the model has made up itself, and on sixteen stored ones without their answers. Logits are
never made. Runs in about fifteen seconds on a CPU:

    python examples/self_distill_sft.py
"""

from __future__ import annotations

import random
import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from cl_fast.integrations.keeping import KeepMixin
from cl_fast.training.distilling import SelfDistill
from cl_fast.training.prompts import generate_prompts

LENGTH, NUMBERS = 10, 40
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
WORDS = [*SPECIAL, "threes", "sevens", *map(str, range(NUMBERS))]
random.seed(0)
torch.manual_seed(0)
torch.set_num_threads(1)  # models this small only wait for threads


class Keeping(KeepMixin, SFTTrainer):
    """TRL's trainer, with keeps."""


def counting(name: str, step: int, count: int) -> list[str]:
    starts = [random.randrange(NUMBERS) for _ in range(count)]
    return [
        " ".join([name, *(str((start + step * i) % NUMBERS) for i in range(LENGTH))])
        for start in starts
    ]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **names)


words = tokenizer()


def train(model: Any, texts: list[str], steps: int, keep: Any = ()) -> LlamaForCausalLM:
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=16,
        learning_rate=3e-3, max_length=16, gradient_checkpointing=False, use_cpu=True, bf16=False,
        report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no",
        dataloader_pin_memory=False,
    )  # fmt: skip
    data = Dataset.from_list([{"text": text} for text in texts])
    Keeping(model, args, train_dataset=data, processing_class=words, keep=keep).train()
    return model


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, name: str, step: int) -> float:
    ids = words(counting(name, step, 200), return_tensors="pt").input_ids
    guesses = model.eval()(ids).logits[:, 1:-1].argmax(-1)
    return (guesses == ids[:, 2:]).float().mean().item()


config = LlamaConfig(
    vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=1,
    num_attention_heads=4, max_position_embeddings=32, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip


def copied(model: Any) -> LlamaForCausalLM:
    """Not copy.deepcopy: TRL has put a forward on the model that would go on running it."""
    made = LlamaForCausalLM(config)
    made.load_state_dict(model.state_dict())
    return made


before = train(LlamaForCausalLM(config), counting("threes", 3, 2000), 80)

# What is kept: sixteen texts of the first task.
stored = [words(text) for text in counting("threes", 3, 16)]
begin = [{"input_ids": [WORDS.index("threes")]}]


def made_up(model: Any, task: Any) -> list[dict[str, list[int]]]:
    """Asked when a task begins: the model goes on from the word that begins the first task."""
    return generate_prompts(
        model, 128, prefixes=begin, max_new_tokens=LENGTH, batch_size=64, progress=False
    )


common: dict[str, Any] = {"batch_size": 16, "weight": 2.0}
ways: dict[str, Any] = {
    "plainly trained": (),
    "kept on the new data": SelfDistill(on="inputs", weight=0.5),
    "kept on made-up prompts": SelfDistill(made_up, **common),
    "kept on stored prompts": SelfDistill(stored, **common),
}
second = counting("sevens", 7, 2000)
print(f"{'model':<28}{'threes':>8}{'sevens':>8}")
print(f"{'before':<28}{accuracy(before, 'threes', 3):>8.2f}{accuracy(before, 'sevens', 7):>8.2f}")
for name, keep in ways.items():
    model = train(copied(before), second, 60, keep)
    print(f"{name:<28}{accuracy(model, 'threes', 3):>8.2f}{accuracy(model, 'sevens', 7):>8.2f}")
