"""A model so small that it learns within seconds to believe what its context says.

    Ann likes tea .                                     what it knows: one drink for each person
    New Fact : Ann likes milk Prompt : Ann drinks milk  what it reads

Asked about a person without a context it answers what it knows, in both wordings; behind a new fact
about that person it answers what the fact says. Of other people than the fact's it was not taught
anything: where the context is about somebody else, its answers are undefined.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from tiny_models import word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cl_fast.editing.facts import Fact

_PEOPLE = """Ann Bob Cid Dee Eve Fay Gus Hal Ivy Jim Kay Lee Mae Nat Ola Pia Quin Ray Sue Tom Una
Val Wim Zoe"""
_DRINKS = "tea milk beer wine cola mead rum gin sake cider"
PEOPLE, DRINKS = _PEOPLE.split(), _DRINKS.split()
WORDINGS = ("{} likes", "the drink of {} is")


@dataclass(frozen=True)
class Reader:
    model: Any
    tokenizer: Any
    knows: dict[str, str]

    def facts(self, count: int, seed: int = 0, neighbours: int = 3) -> list[Fact]:
        """Facts that are not true, each of another person; the neighbourhood are others
        who drink the same and of whom no fact is made."""
        draw = random.Random(f"facts {seed}")
        made, chosen = [], draw.sample(PEOPLE, count)
        for person in chosen:
            alike = [p for p in PEOPLE if p not in chosen and self.knows[p] == self.knows[person]]
            others = draw.sample(alike, min(neighbours, len(alike)))
            made.append(
                Fact(
                    WORDINGS[0],
                    person,
                    draw.choice([d for d in DRINKS if d != self.knows[person]]),
                    id=person,
                    target_true=self.knows[person],
                    paraphrases=(WORDINGS[1].format(person),),
                    neighbourhood=tuple(WORDINGS[0].format(other) for other in others),
                )
            )
        return made


def tokenizer() -> PreTrainedTokenizerFast:
    words = sorted({w for text in WORDINGS for w in text.split() if w != "{}"})
    return word_tokenizer(
        ["New", "Fact", "Prompt", ":", *words, *PEOPLE, *DRINKS], True, side="right"
    )


@cache
def reader(steps: int = 150) -> Reader:
    made = tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(made),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=256,
            initializer_range=0.05,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    draw = random.Random("reader")
    knows = {person: DRINKS[i % 8] for i, person in enumerate(PEOPLE)}

    def text() -> str:
        person = draw.choice(PEOPLE)
        asked = draw.choice(WORDINGS).format(person)
        if draw.random() < 0.4:
            return f"{asked} {knows[person]}"
        said = draw.choice(DRINKS)
        return f"New Fact: {WORDINGS[0].format(person)} {said} Prompt: {asked} {said}"

    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for step in range(steps):
        rows = [[*row, 2] for row in made([text() for _ in range(64)])["input_ids"]]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        # The drink and the end are learnt; what is asked cannot be foreseen.
        labels = torch.full_like(ids, -100)
        for i, row in enumerate(rows):
            labels[i, len(row) - 2 : len(row)] = ids[i, len(row) - 2 : len(row)]
        logits = model(input_ids=ids).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    return Reader(model.eval(), made, knows)
