"""What the benchmarks of editing write into models: words, prompts, and facts about made-up names.

Prompts of 8 to 25 tokens in the manner of CounterFact and zsRE, with the subject anywhere and 1 to
7 words after it; subjects of 2 to 4 tokens, targets of one, now and then two.
"""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerFast

from cl_fast.editing.facts import Fact

TEMPLATES = (
    "The mother tongue of the writer {} is",
    "{} was born in the city of",
    "The headquarters of the old company {} are in",
    "According to the register of the town , {} works as a",
    "The official language of the region called {} is",
    "In the national team {} plays the position of",
    "The singer and composer {} is best known for playing the",
    "In the early years of the last century the architect {} designed buildings in",
    "For most of a long career the player {} was a member of",
    "{} is a product that was created by",
    "As the papers of that week said , the film {} was first shown in",
    "What sport does {} play ? They play",
    "After many years of work in the archives of the city , historians agreed that the place where "
    "{} died is",
    "When the committee met again in the spring of the following year , it said that the mayor {} "
    "belongs to",
    "The guide tells every visitor of the old harbour , and writes in the book , that the bridge "
    "{} is in",
    "In a letter to the editor a reader asked which band the drummer {} had joined ; it was",
)


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    """Words: those of the templates, and made-up ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = {w for t in (*TEMPLATES, "is a The Therefore Because I You .") for w in t.split()}
    words = ["<unk>", *sorted(known - {"{}"})]
    words += [f"w{i}" for i in range(vocabulary - len(words))]
    if len(words) != vocabulary:
        raise SystemExit(f"--vocabulary must be {len(words)} at least; got {vocabulary}")
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def words_of(draw: random.Random, vocabulary: int, count: int) -> str:
    return " ".join(f"w{draw.randrange(vocabulary - 200)}" for _ in range(count))


def facts_of(count: int, vocabulary: int) -> list[Fact]:
    draw = random.Random(0)
    return [
        Fact(
            TEMPLATES[i % len(TEMPLATES)],
            words_of(draw, vocabulary, draw.choice((2, 2, 3, 4))),
            words_of(draw, vocabulary, draw.choice((1, 1, 1, 2))),
        )
        for i in range(count)
    ]
