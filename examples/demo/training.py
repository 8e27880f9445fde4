"""A base language model and one finetuned model per task, small enough for two CPU cores.

The base reads text, a copying exercise, and a few lines of every task: it knows the format and
some answers, as a pre-trained model does. Each finetuned model continues from the base on lines of
one task, with some of the text mixed in. All are saved as ordinary sharded checkpoints.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from tasks import COPY, TASKS, Corpus, Task
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["Schedule", "finetune", "make_tokenizer", "save", "train_base"]

IGNORED = -100  # the label that the loss of transformers leaves out
SHARD_SIZE = "256KB"

Sample = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Schedule:
    """How long to train, and on how much at a time."""

    base_steps: int
    finetune_steps: int
    sequences: int = 64
    length: int = 64


def make_tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    """One token per character of the text."""
    special = ["<pad>", "<eos>", "<unk>"]
    characters = sorted(set(corpus.text))
    vocabulary = {token: index for index, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


class Reader:
    """Draws batches of token ids and labels."""

    def __init__(
        self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, schedule: Schedule, seed: int
    ) -> None:
        self.corpus = corpus
        self.ids = tokenizer.get_vocab()
        self.eos = tokenizer.eos_token_id
        self.schedule = schedule
        self.random = random.Random(seed)
        self.text = [self.ids[character] for character in corpus.text]

    def from_text(self) -> Sample:
        """A stretch of the text, every token of it to be predicted."""
        start = self.random.randrange(len(self.text) - self.schedule.length)
        ids = self.text[start : start + self.schedule.length]
        return ids, ids

    def from_task(self, task: Task) -> Sample:
        """Lines of one task, of which only the answers are to be predicted."""
        ids: list[int] = []
        labels: list[int] = []
        questions = self.corpus.questions(task)
        while len(ids) < self.schedule.length:
            question = self.random.choice(questions)
            prompt = [self.ids[character] for character in task.prompt(question)]
            answer = [self.ids[character] for character in task.answer(question)]
            answer.append(self.eos)
            ids += prompt + answer
            labels += [IGNORED] * len(prompt) + answer
        return ids[: self.schedule.length], labels[: self.schedule.length]

    def batch(self, draw: Callable[[], Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        samples = [draw() for _ in range(self.schedule.sequences)]
        ids, labels = zip(*samples, strict=True)
        return torch.tensor(ids), torch.tensor(labels)


def train_base(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, schedule: Schedule, seed: int
) -> LlamaForCausalLM:
    """A language model from scratch."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    reader = Reader(corpus, tokenizer, schedule, seed)
    kinds: list[Task | None] = [None, COPY, TASKS["upper"], TASKS["roman"], TASKS["words"]]
    shares = (0.54, 0.30, 0.07, 0.04, 0.05)

    def draw() -> Sample:
        (task,) = reader.random.choices(kinds, shares)
        return reader.from_text() if task is None else reader.from_task(task)

    model = LlamaForCausalLM(config)
    _fit(model, reader, draw, steps=schedule.base_steps, rate=3e-3)
    return model


def finetune(
    base: LlamaForCausalLM,
    task: Task,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    schedule: Schedule,
    seed: int,
) -> LlamaForCausalLM:
    """A copy of the base, trained on one task with 30 % of text and copying mixed in."""
    reader = Reader(corpus, tokenizer, schedule, seed)

    def draw() -> Sample:
        share = reader.random.random()
        if share < 0.2:
            return reader.from_text()
        return reader.from_task(COPY if share < 0.3 else task)

    model = deepcopy(base)
    _fit(model, reader, draw, steps=schedule.finetune_steps, rate=1e-3)
    return model


def _fit(
    model: LlamaForCausalLM,
    reader: Reader,
    draw: Callable[[], Sample],
    *,
    steps: int,
    rate: float,
) -> None:
    """Muon on the matrices inside the layers, AdamW on the rest; the rate falls to zero."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = (
        torch.optim.Muon(inner, lr=5 * rate, momentum=0.9, weight_decay=0.0),
        torch.optim.AdamW(outer, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    )
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / steps) ** 0.7
        )
        for optimizer in optimizers
    ]
    model.train()
    for _ in range(steps):
        ids, labels = reader.batch(draw)
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        model.zero_grad()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes an ordinary bfloat16 checkpoint of several shards."""
    stored = deepcopy(model).to(torch.bfloat16)
    stored.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(folder)
