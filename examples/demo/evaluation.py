"""Scores of a checkpoint: what share of held-out questions it answers, and its perplexity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tasks import TASKS, Corpus, Task
from transformers import AutoModelForCausalLM, AutoTokenizer

__all__ = ["Score", "evaluate"]

WINDOW = 64


@dataclass(frozen=True)
class Score:
    """Shares of exact answers by task, and perplexity per character of held-out text."""

    accuracy: dict[str, float]
    perplexity: float

    @property
    def mean(self) -> float:
        return sum(self.accuracy.values()) / len(self.accuracy)


@torch.inference_mode()
def evaluate(folder: Path, corpus: Corpus, questions: int) -> Score:
    """Loads the checkpoint as any user would, with transformers, and lets it generate."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def accuracy(task: Task) -> float:
        asked = corpus.held_questions(task)[:questions]
        expected = [task.answer(question) for question in asked]
        prompts = tokenizer([task.prompt(question) for question in asked], padding=True)
        ids = torch.tensor(prompts["input_ids"])
        answers = model.generate(
            input_ids=ids,
            attention_mask=torch.tensor(prompts["attention_mask"]),
            max_new_tokens=max(map(len, expected)) + 1,
            do_sample=False,
        )
        given = tokenizer.batch_decode(answers[:, ids.shape[1] :], skip_special_tokens=True)
        return sum(map(str.__eq__, given, expected)) / len(expected)

    ids = torch.tensor(tokenizer(corpus.held_text)["input_ids"])
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)[:100]
    loss = model(input_ids=windows, labels=windows).loss
    return Score(
        accuracy={name: accuracy(task) for name, task in TASKS.items()},
        perplexity=float(loss.exp()),
    )
