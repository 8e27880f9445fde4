"""What the demo's models read: English that ships with Python, and three small tasks.

Every line of a task is ``<task> <question>: <answer>``, one character a token:

    upper cat: CAT          roman 47: XLVII          words 47: forty-seven

Questions that are asked in the evaluation never occur in training; nor does the last part of the
text, on which perplexity is measured.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pydoc_data.topics import topics

__all__ = ["COPY", "TASKS", "Corpus", "Task", "make_corpus"]

_ROMAN = (
    (1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"),
    (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
)  # fmt: skip
_SMALL = (  # noqa: SIM905
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905


def _roman(question: str) -> str:
    number, answer = int(question), ""
    for value, letters in _ROMAN:
        while number >= value:
            answer += letters
            number -= value
    return answer


def _words(question: str) -> str:
    hundreds, rest = divmod(int(question), 100)
    answer = [f"{_SMALL[hundreds]} hundred"] if hundreds else []
    if rest >= 20:
        tens, ones = divmod(rest, 10)
        answer.append(_TENS[tens] + (f"-{_SMALL[ones]}" if ones else ""))
    elif rest:
        answer.append(_SMALL[rest])
    return " ".join(answer)


@dataclass(frozen=True)
class Task:
    """A task: how its lines begin, how a question is answered, and what may be asked."""

    name: str
    answer: Callable[[str], str]
    numbers: bool

    def prompt(self, question: str) -> str:
        return f"{self.name} {question}: "


TASKS = {
    task.name: task
    for task in (
        Task("upper", str.upper, numbers=False),
        Task("roman", _roman, numbers=True),
        Task("words", _words, numbers=True),
    )
}
# Not a task of the demo: the base learns to look back at its prompt with it.
COPY = Task("say", str, numbers=False)


@dataclass(frozen=True)
class Corpus:
    """Text and questions, each split into a part to train on and a part that is held out."""

    text: str
    held_text: str
    words: list[str]
    held_words: list[str]
    numbers: list[str]
    held_numbers: list[str]

    def questions(self, task: Task) -> list[str]:
        return self.numbers if task.numbers else self.words

    def held_questions(self, task: Task) -> list[str]:
        return self.held_numbers if task.numbers else self.held_words


def make_corpus(seed: int, held_out: int = 200) -> Corpus:
    """Python's own help texts as plain ASCII, their short words, and the numbers up to 999."""
    text = " ".join(topics[name] for name in sorted(topics))
    text = re.sub(r"\s+", " ", re.sub(r"[^\x20-\x7e\n]", "", text))
    words = sorted({word for word in re.findall(r"[a-z]+", text) if 3 <= len(word) <= 6})
    numbers = [str(number) for number in range(1, 1000)]
    shuffle = random.Random(seed).shuffle
    shuffle(words)
    shuffle(numbers)
    cut = int(0.97 * len(text))
    return Corpus(
        text=text[:cut],
        held_text=text[cut:],
        words=words[held_out:],
        held_words=words[:held_out],
        numbers=numbers[held_out:],
        held_numbers=numbers[:held_out],
    )
