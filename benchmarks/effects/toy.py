"""A language model so small that it forgets within seconds, and a stream of tasks to make it.

    prompt  [task, a, b, =]        answer: one symbol of 16

The base model computes four functions: a, b, max(a, b), min(a, b). A task of the stream is a new
task token, whose answer is a permutation, drawn by the seed, of a or of b. All tokens count in the
loss, as in a language model: it can write prompts, too.

    shared     all tasks use the 16 symbols of the base: learning one overwrites the others
    disjoint   each task has 16 symbols of its own, which the base has never seen
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

SYMBOLS = 16
BASE = ("a", "b", "max", "min")
STREAM = ("task 1", "task 2", "task 3", "task 4")
KINDS = ("shared", "disjoint")
IGNORED = -100


class Examples:
    """A map-style dataset of prompts with their answers, as a Trainer takes them."""

    column_names = ("input_ids", "labels")

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self.labels = ids.clone()
        self.labels[:, 0] = IGNORED  # nothing tells which task comes

    def __len__(self) -> int:
        return self.ids.size(0)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}

    def prompts(self) -> list[Tensor]:
        """The prompts alone: nobody stored an answer."""
        return list(self.ids[:, :-1])


class Toy:
    """The skills of one seed."""

    def __init__(self, seed: int, kind: str = "shared") -> None:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}; got {kind!r}")
        self.seed, self.kind = seed, kind
        alphabets = 1 if kind == "shared" else 1 + len(STREAM)
        self.equals = SYMBOLS * alphabets
        self.first_task = self.equals + 1
        self.vocabulary = self.first_task + len(BASE) + len(STREAM)

    def _prompts(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        shift = 0
        if name in BASE:
            answer = {"a": a, "b": b, "max": torch.maximum(a, b), "min": torch.minimum(a, b)}[name]
        else:
            index = STREAM.index(name)
            generator = torch.Generator().manual_seed(1000 * self.seed + index)
            order = torch.randperm(SYMBOLS, generator=generator)
            answer = order[b if index % 2 else a]
            shift = SYMBOLS * (1 + index) if self.kind == "disjoint" else 0
        task = torch.full_like(a, self.first_task + [*BASE, *STREAM].index(name))
        columns = [task, a + shift, b + shift, torch.full_like(a, self.equals), answer + shift]
        return torch.stack(columns, 1)

    def draw(self, names: tuple[str, ...], count: int, draw: int) -> Examples:
        """`count` examples of the skills in random order; another `draw`, others."""
        generator = torch.Generator().manual_seed(7919 * self.seed + draw)
        a, b = torch.randint(0, SYMBOLS, (2, count), generator=generator)
        which = torch.randint(0, len(names), (count,), generator=generator)
        ids = torch.stack([self._prompts(name, a, b) for name in names])
        return Examples(ids[which, torch.arange(count)])

    def every(self, name: str) -> Examples:
        """All 256 prompts of a skill."""
        a = torch.arange(SYMBOLS).repeat_interleave(SYMBOLS)
        return Examples(self._prompts(name, a, torch.arange(SYMBOLS).repeat(SYMBOLS)))

    def model(self, weights: Mapping[str, Tensor] | None = None) -> LlamaForCausalLM:
        """85 to 93 thousand parameters: random ones of the seed, or those that are given."""
        torch.manual_seed(self.seed)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=8,
            tie_word_embeddings=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = LlamaForCausalLM(config)
        if weights is not None:
            model.load_state_dict(weights)
        return model

    def trained_base(self, steps: int = 500, size: int = 128) -> dict[str, Tensor]:
        """The weights of a model that computes the four functions of the base."""
        model = self.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        data = self.draw(BASE, steps * size, draw=0)
        for start in range(0, steps * size, size):
            part = slice(start, start + size)
            model(input_ids=data.ids[part], labels=data.labels[part]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: x.clone() for name, x in model.state_dict().items()}


@torch.no_grad()
def accuracy(model: nn.Module, examples: Any, name: str = "") -> float:
    """Share of the prompts whose likeliest next token is the answer."""
    logits = model(input_ids=examples.ids[:, :-1]).logits[:, -1]
    found: Tensor = logits.argmax(-1) == examples.ids[:, -1]
    return float(found.float().mean())
