"""Generalised knowledge distillation in TRL without logits.

The same script as with `from trl.experimental.gkd import GKDTrainer`; the numbers are TRL's. Half
of the batches are written by the student itself. Runs in a few seconds on a CPU:

    python examples/distill_trl_gkd.py
"""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig

from cl_fast.integrations.trl import GKDTrainer

WORDS = [
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    "user",
    "assistant",
    "what",
    "do",
    "cats",
    "dogs",
    "say",
]
WORDS += ["they", "meow", "bark"]


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    return fast


def model(seed: int, width: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def talk(animal: str, sound: str) -> dict[str, list[dict[str, str]]]:
    question = {"role": "user", "content": f"what do {animal} say"}
    return {"messages": [question, {"role": "assistant", "content": f"they {sound}"}]}


trainer = GKDTrainer(
    model=model(0, 32),
    teacher_model=model(1, 48),
    args=GKDConfig(
        output_dir=tempfile.mkdtemp(),
        beta=0.5,
        lmbda=0.5,
        max_new_tokens=4,
        max_length=32,
        max_steps=40,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=10,
        dataloader_pin_memory=False,
    ),
    train_dataset=Dataset.from_list([talk("cats", "meow"), talk("dogs", "bark")] * 8),
    processing_class=tokenizer(),
)
trainer.train()

print(f"{'step':>4}{'divergence from the teacher':>30}")
for entry in trainer.state.log_history:
    if "loss" in entry:
        print(f"{entry['step']:>4}{float(entry['loss']):>30.4f}")
