"""On-policy self-distillation (SDFT, arXiv 2601.19897) through TRL's trainer, without logits.

A small language model knows an answer to each question, and says what a hint tells it where there
is one. Half of the answers change. The model answers the questions itself; its teacher is the same
model as it was, which is shown the new answer as a hint, and tells token by token what it would
have said. So new answers move from the context into the weights. Runs in seconds on a CPU:

    python examples/sdft_on_policy.py
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.sdft import SDFTConfig

from cl_fast.integrations.trl import SDFTTrainer  # instead of trl.experimental.sdft

QUESTIONS = 16
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "hint", "ask", "say"]
WORDS = [*SPECIAL, *(f"q{i}" for i in range(QUESTIONS)), *(f"a{i}" for i in range(QUESTIONS))]
ID = {word: i for i, word in enumerate(WORDS)}
EOS = ID["<eos>"]
torch.manual_seed(0)
torch.set_num_threads(1)  # models this small only wait for threads

old = torch.randperm(QUESTIONS).tolist()
new = [(a + 5) % QUESTIONS if q < QUESTIONS // 2 else a for q, a in enumerate(old)]
changed, others = range(QUESTIONS // 2), range(QUESTIONS // 2, QUESTIONS)


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(WordLevel(ID, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", padding_side="left", **names
    )


def known() -> LlamaForCausalLM:
    """A model that knows the old answers, and follows hints."""
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=EOS,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(260):
        q = torch.randint(0, QUESTIONS, (64,))
        said = torch.tensor(old)[q]
        hint = torch.randint(0, QUESTIONS, (64,)) if step % 2 else said
        first, answers = ID["q0"], ID["a0"]
        fixed = {w: torch.full((64,), ID[w]) for w in ("hint", "ask", "say", "<eos>")}
        asked = [fixed["ask"], first + q, fixed["say"], answers + hint, fixed["<eos>"]]
        shown = [fixed["hint"], answers + hint] if step % 2 else []
        ids = torch.stack([*shown, *asked], 1)
        labels = ids.clone()
        labels[:, :-2] = -100
        optimiser.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimiser.step()
    return model


@torch.no_grad()
def right(model: Any, questions: range, answers: list[int]) -> float:
    ids = torch.tensor([[ID["ask"], ID[f"q{q}"], ID["say"]] for q in questions])
    said = model.eval()(input_ids=ids).logits[:, -1].argmax(-1) - ID["a0"]
    return (said == torch.tensor(answers)[list(questions)]).float().mean().item()


def row(name: str, model: Any) -> None:
    values = right(model, changed, old), right(model, changed, new), right(model, others, old)
    print(f"{name:<10}" + "".join(f"{value:>16.2f}" for value in values))


# TRL makes the teacher from the files that the student came from, not from its weights in memory:
# between the tasks of a stream the model is saved and loaded.
folder = tempfile.mkdtemp()
known().save_pretrained(folder)
model = LlamaForCausalLM.from_pretrained(folder)
facts = [{"prompt": f"ask q{q} say", "privileged_context": f"a{new[q]}"} for q in changed]
trainer = SDFTTrainer(
    model=model,
    args=SDFTConfig(
        output_dir=tempfile.mkdtemp(),
        teacher_model_kind="base",
        teacher_prompt_template="hint {privileged_context} {prompt}",
        distillation_mode="full_logits",
        distillation_alpha=0.5,
        num_generations=2,
        max_completion_length=2,
        max_steps=40,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
    ),
    train_dataset=Dataset.from_list(facts * 8),
    processing_class=tokenizer(),
)
before = LlamaForCausalLM.from_pretrained(folder)
trainer.train()
print(f"{'answers':<10}{'changed, old':>16}{'changed, new':>16}{'unchanged':>16}")
row("before", before)
row("after", model)
