"""DPO in TRL whose log-probs come from hidden states.

The same script as with `from trl import DPOTrainer`; the numbers are TRL's. Runs in a few seconds
on a CPU:

    python examples/dpo_trl.py
"""

from __future__ import annotations

import copy
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig

from cl_fast.integrations.trl import DPOTrainer

torch.manual_seed(0)
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "what", "do", "cats", "dogs", "say", "they", "meow"]
WORDS += ["bark", "loudly"]


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


config = LlamaConfig(
    vocab_size=len(WORDS),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
policy = LlamaForCausalLM(config)
pairs = [
    {"prompt": "what do cats say", "chosen": " they meow", "rejected": " they bark"},
    {"prompt": "what do dogs say", "chosen": " they bark loudly", "rejected": " they meow loudly"},
]
trainer = DPOTrainer(
    model=policy,
    ref_model=copy.deepcopy(policy),
    args=DPOConfig(
        output_dir=tempfile.mkdtemp(),
        loss_type="sigmoid",
        beta=0.5,
        max_steps=20,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=5,
        dataloader_pin_memory=False,
    ),
    train_dataset=Dataset.from_list(pairs * 8),
    processing_class=tokenizer(),
)
trainer.train()

print(f"{'step':>4}{'loss':>9}{'margin':>9}{'chosen preferred':>18}")
for entry in trainer.state.log_history:
    if "loss" in entry:
        print(
            f"{entry['step']:>4}{float(entry['loss']):>9.4f}{entry['rewards/margins']:>9.4f}"
            f"{entry['rewards/accuracies']:>18.2f}"
        )
