"""A world of made-up people, and language models so small that they learn it within seconds.

    Ada Lorn lives in Port Hale .   yesterday Ben Gosk saw a lamp .   the trade of Ada Lorn is ...

Every person has one value in each of four relations, and each relation has three templates. A
person's value is told with two of the three, another two for each person and relation: the model
answers the third because it knows that template from other people. So it can be measured what an
edit does: to the template it was made with, to a template in which the person never had a value
(the held-out one), and to other people who have the old value (the neighbourhood).

    made = fact_model(seed, "llama", bos=True)     a trained model, its tokenizer and its world
    made.model, made.tokenizer
    facts = made.world.edits(50, seed)             each with another value than the model knows
    texts = made.world.texts(2000, seed)           what a KeyStats is collected from
    made.accuracy(made.world.trained)              share of greedy answers that are right

A model is trained once for each seed and family: what was trained lies in .pytest_cache, under a
name that holds this file and the versions of the libraries.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from cl_fast.editing.facts import Fact

Family = Literal["llama", "gpt2"]

TEMPLATES = {
    "city": ("{} lives in", "the home of {} is in", "people visit {} in"),
    "sport": ("{} plays", "the favourite sport of {} is", "fans watch {} at"),
    "language": ("{} speaks", "the mother tongue of {} is", "they write to {} in"),
    "trade": ("{} works as", "the trade of {} is", "they hired {} as"),
}
VALUES = {
    "city": ["Arvo", "Bexley", "Corin", "Dunmore", "Elgin", "Farsund", "Gotha", "Port Hale",
             "Mount Ida", "New Jura"],
    "sport": ["chess", "tennis", "hockey", "rugby", "cricket", "golf", "boxing", "rowing", "judo",
              "squash"],
    "language": ["Dutch", "Greek", "Hindi", "Irish", "Latin", "Malay", "Norse", "Polish", "Tamil",
                 "Welsh"],
    "trade": ["baker", "farmer", "lawyer", "mason", "nurse", "painter", "sailor", "singer",
              "tailor", "weaver"],
}  # fmt: skip
RELATIONS = tuple(TEMPLATES)
FIRST_NAMES = [
    "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo", "Iris", "Jon", "Kim", "Leo", "Mia",
    "Ned", "Olga", "Paul", "Rosa", "Sam", "Tess", "Uma", "Vic", "Wes", "Xena", "Yan", "Zoe",
    "Abel", "Bea", "Cal", "Dora", "Emil",
]  # fmt: skip
THINGS = ["cat", "dog", "door", "lamp", "boat", "hill", "road", "tree", "bell", "book"]
VERBS = ["sat", "stood", "lay", "slept", "waited", "stopped"]
ROLES = ["friend", "guest", "neighbour", "person"]
FILLERS = (
    "The {thing} {verb} near the {thing} .",
    "Therefore the {thing} {verb} .",
    "Because the {thing} {verb} , the {thing} {verb} .",
    "I saw a {thing} near the {thing} .",
    "You saw a {thing} .",
    "yesterday {person} saw a {thing} .",
    "{person} {verb} near the {thing} .",
    "{person} is a {role} .",
)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


@dataclass(frozen=True)
class Statement:
    """What is true of a person, in the words of one template."""

    person: str
    relation: str
    template: int
    value: str

    @property
    def prompt(self) -> str:
        return TEMPLATES[self.relation][self.template].format(self.person)

    @property
    def text(self) -> str:
        return f"{self.prompt} {self.value} ."


class World:
    """The people of a seed and what is true of them.

    Three quarters of the people have a surname of their own, the others share one with somebody
    else: only the first name tells them apart.

    Attributes:
        people: "Ada Lorn", ...; two tokens each.
        value: of (person, relation).
        held_out: of (person, relation), the index of the template that nothing is told with.
        trained, untrained: the statements that texts consist of, and those of held-out templates.
    """

    def __init__(self, seed: int, people: int = 240) -> None:
        draw = random.Random(f"world {seed}")
        surnames = [
            a + b + c
            for a in "BDFGHKLMNPRSTVWZ"
            for b in "aeiou"
            for c in ["lbe", "ld", "lf", "lm", "lt", "n", "nd", "rk", "rm", "rn", "sk", "st"]
        ]
        draw.shuffle(surnames)
        alone = people - 2 * (people // 8)
        self.surnames = surnames[: alone + people // 8]
        self.people = [f"{draw.choice(FIRST_NAMES)} {name}" for name in self.surnames[:alone]]
        for name in self.surnames[alone:]:
            self.people += [f"{first} {name}" for first in draw.sample(FIRST_NAMES, 2)]
        draw.shuffle(self.people)
        self.seed = seed
        self.value: dict[tuple[str, str], str] = {}
        self.held_out: dict[tuple[str, str], int] = {}
        self.trained: list[Statement] = []
        self.untrained: list[Statement] = []
        for person in self.people:
            for relation, templates in TEMPLATES.items():
                value = draw.choice(VALUES[relation])
                held_out = draw.randrange(len(templates))
                self.value[person, relation] = value
                self.held_out[person, relation] = held_out
                for i in range(len(templates)):
                    told = self.untrained if i == held_out else self.trained
                    told.append(Statement(person, relation, i, value))

    @property
    def words(self) -> list[str]:
        """The vocabulary, special tokens first."""
        words = {word for name in (*self.people, *THINGS, *VERBS, *ROLES) for word in name.split()}
        for text in (*FILLERS, *(t for ts in TEMPLATES.values() for t in ts)):
            words |= {word for word in text.split() if "{" not in word}
        words |= {word for values in VALUES.values() for v in values for word in v.split()}
        return [*SPECIAL, *sorted(words)]

    def filler(self, draw: random.Random, people: Sequence[str]) -> str:
        """A sentence that tells nobody's value."""
        text = draw.choice(FILLERS)
        for slot, words in {
            "thing": THINGS, "verb": VERBS, "role": ROLES, "person": people
        }.items():  # fmt: skip
            while f"{{{slot}}}" in text:
                text = text.replace(f"{{{slot}}}", draw.choice(words), 1)
        return text

    def texts(self, count: int, seed: int, without: Iterable[Fact] = ()) -> list[str]:
        """Texts of one to four sentences, like those that the models are trained on.

        The subjects of the facts in `without` do not occur. Whoever edits a large model collects
        statistics from texts in which nearly no subject occurs often enough to count; in a world
        of 240 people each would.
        """
        draw = random.Random(f"texts {self.seed} {seed}")
        left_out = {fact.subject for fact in without}
        people = [person for person in self.people if person not in left_out]
        told = [statement.text for statement in self.trained if statement.person not in left_out]
        return [
            " ".join(
                draw.choice(told) if draw.random() < 0.7 else self.filler(draw, people)
                for _ in range(draw.randint(1, 4))
            )
            for _ in range(count)
        ]

    def edits(self, count: int, seed: int, neighbours: int = 5) -> list[Fact]:
        """Facts that are not true, each about another person.

        The prompt is one of the two templates that the person's value was told with. Its
        paraphrase is the template that it was not told with, its neighbourhood up to `neighbours`
        people of whom no fact is edited and who have the old value, in the words of the prompt.
        `target_true` is the old value.
        """
        draw = random.Random(f"edits {self.seed} {seed}")
        chosen = draw.sample(self.people, count)
        others = [person for person in self.people if person not in set(chosen)]
        facts = []
        for person in chosen:
            relation = draw.choice(RELATIONS)
            old, held_out = self.value[person, relation], self.held_out[person, relation]
            templates = TEMPLATES[relation]
            prompt = draw.choice([t for i, t in enumerate(templates) if i != held_out])
            alike = [other for other in others if self.value[other, relation] == old]
            facts.append(
                Fact(
                    prompt,
                    subject=person,
                    target=draw.choice([v for v in VALUES[relation] if v != old]),
                    target_true=old,
                    paraphrases=(templates[held_out].format(person),),
                    neighbourhood=tuple(
                        prompt.format(other)
                        for other in draw.sample(alike, min(neighbours, len(alike)))
                    ),
                )
            )
        return facts

    def tokenizer(self, bos: bool) -> PreTrainedTokenizerFast:
        """One token per word; with `bos`, every text begins with <bos>."""
        made = Tokenizer(
            WordLevel({word: i for i, word in enumerate(self.words)}, unk_token="<unk>")
        )
        made.pre_tokenizer = Whitespace()
        if bos:
            made.post_processor = processors.TemplateProcessing(
                single="<bos> $A", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=made,
            pad_token="<pad>",
            bos_token="<bos>",
            eos_token="<eos>",
            unk_token="<unk>",
        )


def untrained_model(world: World, seed: int, family: Family) -> Any:
    """Four blocks of width 64 with MLPs of width 256: 0.3 million parameters.

    Embeddings are wider than the rest at the start: names are told apart sooner.
    """
    torch.manual_seed(seed)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "llama":
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(world.words),
                hidden_size=64,
                intermediate_size=256,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
                initializer_range=0.06,
                tie_word_embeddings=False,
                **special,
            )
        )
    elif family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(world.words),
                n_embd=64,
                n_inner=256,
                n_layer=4,
                n_head=4,
                n_positions=128,
                initializer_range=0.06,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                tie_word_embeddings=False,
                **special,
            )
        )
    else:
        raise ValueError(f"family must be 'llama' or 'gpt2'; got {family!r}")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(WIDER[family])
    return model


WIDER = {"llama": 3.0, "gpt2": 5.0}
STEPS = {"llama": 440, "gpt2": 540}
RATE = {"llama": 3e-3, "gpt2": 5e-3}
ROWS = 64
VALUE_WEIGHT = 20.0


def _rows(world: World, tokenizer: Any) -> Iterator[tuple[list[int], list[float]]]:
    """Token ids and their weights in the loss, without end; each epoch tells every statement once.

    A quarter of the statements follow another sentence, so that none belongs to a position. The
    tokens of a value weigh more than the others, most of which nobody could foresee.
    """
    draw = random.Random(f"rows {world.seed}")
    bos = tokenizer("")["input_ids"]

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    told = [(ids(s.prompt), ids(s.value), ids(".")) for s in world.trained]
    fillers = [ids(world.filler(draw, world.people)) for _ in range(2000)]
    while True:
        for prompt, value, end in draw.sample(told, len(told)):
            before = [*bos, *(draw.choice(fillers) if draw.random() < 0.25 else []), *prompt]
            weights = [1.0] * len(before) + [VALUE_WEIGHT] * len(value) + [1.0] * len(end)
            yield [*before, *value, *end], weights
            if draw.random() < 0.1:
                alone = [*bos, *draw.choice(fillers)]
                yield alone, [1.0] * len(alone)


def train(model: Any, world: World, tokenizer: Any, family: Family) -> None:
    rows, steps = _rows(world, tokenizer), STEPS[family]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE[family], betas=(0.9, 0.95), weight_decay=0.3, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / steps)
    )
    batches: list[list[tuple[list[int], list[float]]]] = []
    order = random.Random(0)
    model.train()
    for _ in range(steps):
        if not batches:  # rows of like lengths together: few tokens are padding
            drawn = sorted((next(rows) for _ in range(16 * ROWS)), key=lambda row: len(row[0]))
            batches = [drawn[i : i + ROWS] for i in range(0, len(drawn), ROWS)]
            order.shuffle(batches)
        batch = batches.pop()
        length = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([row + [0] * (length - len(row)) for row, _ in batch])
        weights = torch.tensor([w + [0.0] * (length - len(w)) for _, w in batch])[:, 1:].flatten()
        # Padding stands behind all that counts, so that a mask is not needed.
        seen = ids[:, :-1]
        logits = model(input_ids=seen, attention_mask=torch.ones_like(seen)).logits.flatten(0, 1)
        losses = nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        (losses @ weights / weights.sum()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


@dataclass(frozen=True)
class FactModel:
    """A model of its own for whoever asks: it may be edited."""

    model: Any
    tokenizer: PreTrainedTokenizerFast
    world: World

    @torch.no_grad()
    def accuracy(self, statements: Iterable[Statement]) -> float:
        """Share of the statements whose value's tokens are all the likeliest."""
        alike: dict[tuple[int, int], list[list[int]]] = {}
        for told in statements:
            prompt = self.tokenizer(told.prompt)["input_ids"]
            value = self.tokenizer(told.value, add_special_tokens=False)["input_ids"]
            alike.setdefault((len(prompt), len(value)), []).append(prompt + value)
        right = 0
        for (at, _), rows in alike.items():
            ids = torch.tensor(rows)
            seen = ids[:, :-1]
            logits = self.model(input_ids=seen, attention_mask=torch.ones_like(seen)).logits
            right += int((logits[:, at - 1 :].argmax(-1) == ids[:, at:]).all(1).sum())
        return right / sum(map(len, alike.values()))


def fact_model(seed: int, family: Family = "llama", bos: bool = True) -> FactModel:
    """A trained model of a world, the same bits for the same arguments on one machine.

    About ten seconds on one core the first time, and milliseconds after that.
    """
    world = World(seed)
    tokenizer = world.tokenizer(bos)
    model = untrained_model(world, seed, family)
    folder = Path(__file__).parents[1] / ".pytest_cache" / "fact_models"
    what = f"{torch.__version__} {transformers.__version__} {seed} {family} {bos}"
    name = hashlib.sha256(Path(__file__).read_bytes() + what.encode()).hexdigest()[:24]
    path = folder / f"{name}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path))
    else:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            train(model, world, tokenizer, family)
        finally:
            torch.set_num_threads(threads)
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        torch.save(model.state_dict(), part)
        part.replace(path)
    return FactModel(model.eval(), tokenizer, world)


if __name__ == "__main__":  # how long it takes, and what the models know
    for chosen in ("llama", "gpt2"):
        for number in range(3):
            for begins in (True, False):
                began = time.process_time()
                made = fact_model(number, chosen, begins)
                took = time.process_time() - began
                facts, held = made.accuracy(made.world.trained), made.accuracy(made.world.untrained)
                print(f"{chosen} seed {number} bos {begins}: {took:.1f} s of CPU, ", end="")
                print(f"trained {facts:.3f}, held-out templates {held:.3f}", flush=True)
