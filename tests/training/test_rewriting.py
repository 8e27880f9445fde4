"""Targets rewritten by the model itself: what is taken, what is kept, and a file that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import WORDS, llama, tokenizer
from torch import Tensor, nn

from cl_fast.errors import CheckpointError, OutputError
from cl_fast.training.rewriting import BANNED, TEMPLATE, rewrite_targets, same_number

TOKENIZER = tokenizer()
PLAIN = "{instruction} then {reference}"
EOS = 2


def example(i: int) -> dict[str, str]:
    words = [WORDS[(i + j) % 9] for j in range(2 + i % 3)]
    return {"prompt": " ".join(words), "completion": f"the {WORDS[i % 9]}", "note": str(i)}


EXAMPLES = [example(i) for i in range(7)]


class Scripted(nn.Module):
    """Says for each prompt what it is told to; remembers how it was asked."""

    def __init__(self, says: Any, fails_at: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(max_position_embeddings=64, eos_token_id=EOS, to_dict=dict)
        self.says, self.fails_at = says, fails_at
        self.asked: list[list[list[int]]] = []

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **given: Any) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        rows = [
            ids[mask == 1].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)
        ]
        if len(self.asked) == self.fails_at:
            raise KeyboardInterrupt
        self.asked.append(rows)
        answers = [self.says(TOKENIZER.decode(row))[: given["max_new_tokens"]] for row in rows]
        out = torch.full((len(rows), max(map(len, answers))), given["pad_token_id"])
        for i, answer in enumerate(answers):
            out[i, : len(answer)] = torch.tensor(answer)
        return torch.cat([input_ids, out.long()], 1)


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def echo(prompt: str) -> list[int]:
    """The last word of the request, twice."""
    word = prompt.split()[-1]
    return [*ids(f"{word} {word}"), EOS]


def rewrite(model: Any, examples: Any = EXAMPLES, **options: Any) -> Any:
    given = {"template": PLAIN, "chat": False, "batch_size": 3, "max_new_tokens": 16}
    given["progress"] = False
    return rewrite_targets(model, TOKENIZER, examples, **{**given, **options})


def test_targets_are_replaced_and_nothing_else() -> None:
    model = Scripted(echo)
    model.train()
    found = rewrite(model)
    assert model.training
    for row, new in zip(EXAMPLES, found.examples, strict=True):
        word = row["completion"].split()[-1]
        assert new == {**row, "completion": f"{word} {word}"}
    assert found.reasons == [None] * 7
    assert found.report.rewritten == found.report.total == 7
    assert str(found.report) == "7 of 7 targets rewritten"
    # Longest first; every request is the template, filled in.
    asked = [TOKENIZER.decode(row) for rows in model.asked for row in rows]
    assert [len(rows) for rows in model.asked] == [3, 3, 1]
    assert [len(x.split()) for x in asked] == sorted((len(x.split()) for x in asked), reverse=True)
    requests = {f"{row['prompt']} then {row['completion']}" for row in EXAMPLES}
    assert set(asked) == requests


def test_what_fails_keeps_its_target() -> None:
    answers = [
        [*ids("cat sat"), EOS],  # taken
        [EOS],  # empty
        ids("cat sat on the mat"),  # no end
        [*ids("a cat under"), EOS],  # banned
        [*ids("tree"), EOS],  # disagrees
        [*ids("under a cat"), EOS],  # banned at the beginning only: taken
        [],
    ]
    rows = [{"prompt": WORDS[i], "completion": "mat"} for i in range(6)]
    rows.append({"prompt": "cat " * 60, "completion": "mat"})

    def says(prompt: str) -> list[int]:
        return answers[WORDS.index(prompt.split()[0])]

    found = rewrite(
        Scripted(says),
        rows,
        max_new_tokens=5,
        banned=["A CAT UNDER", "^cat under"],
        check=lambda original, new: (original, new) != ("mat", "tree"),
    )
    assert found.reasons == [None, "empty", "truncated", "banned", "disagrees", None, "too long"]
    targets = [row["completion"] for row in found.examples]
    assert targets == ["cat sat", "mat", "mat", "mat", "mat", "under a cat", "mat"]
    assert found.report.kept == dict.fromkeys(found.report.kept, 1)
    assert sum(found.report.kept.values()) == 5
    assert "2 of 7 targets rewritten; kept: 1 too long, 1 empty" in str(found.report)


@pytest.mark.parametrize(
    ("row", "target"),
    [
        (
            {
                "messages": [
                    {"role": "user", "content": "cat"},
                    {"role": "assistant", "content": "sat"},
                    {"role": "user", "content": "dog"},
                    {"role": "assistant", "content": "ran"},
                ]
            },
            lambda row: row["messages"][-1]["content"],
        ),
        (
            {
                "prompt": [{"role": "user", "content": "dog"}],
                "completion": [{"role": "assistant", "content": "ran"}],
            },
            lambda row: row["completion"][0]["content"],
        ),
    ],
)
def test_conversations_go_through_the_chat_template(row: Any, target: Any) -> None:
    before = json.dumps(row)
    model = Scripted(lambda prompt: [*ids("on a tree"), EOS])
    found = rewrite(model, [row], chat=None, template="{reference} {instruction}")
    assert target(found.examples[0]) == "on a tree"
    assert json.dumps(row) == before
    history = "user cat assistant sat " if "messages" in row else ""
    text = f"{history}user ran dog then"
    assert model.asked == [[ids(text)]]


def test_a_model_of_transformers_writes_the_same_alone_and_in_a_batch() -> None:
    model = llama(3)
    model.generation_config.eos_token_id = list(range(2, 40))  # it ends soon
    batched = rewrite(model, max_new_tokens=8, batch_size=4)
    alone = rewrite(model, max_new_tokens=8, batch_size=1)
    assert batched == alone
    assert batched.report.rewritten > 0
    state = torch.random.get_rng_state()
    sampled = [rewrite(model, max_new_tokens=8, temperature=1.0, seed=s) for s in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert torch.equal(torch.random.get_rng_state(), state)


# --- the file ------------------------------------------------------------------------------------


def test_a_call_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.jsonl", tmp_path / "deep" / "part.jsonl"
    expected = rewrite(Scripted(echo), path=whole)
    with pytest.raises(KeyboardInterrupt):
        rewrite(Scripted(echo, fails_at=2), path=part)
    assert len(part.read_bytes().splitlines()) == 1 + 6
    model = Scripted(echo)
    assert rewrite(model, path=part) == expected
    assert len(model.asked) == 1
    assert part.read_bytes() == whole.read_bytes()
    idle = Scripted(echo)
    assert rewrite(idle, path=part) == expected
    assert idle.asked == []


def test_a_file_cut_at_any_byte_is_continued(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    expected = rewrite(Scripted(echo), path=whole)
    data = whole.read_bytes()
    for size in [*range(0, len(data), 41), len(data) - 1, data.index(b"\n"), data.index(b"\n") + 1]:
        part.write_bytes(data[:size])
        assert rewrite(Scripted(echo), path=part) == expected, size
        assert part.read_bytes() == data, size


def test_what_was_written_may_be_judged_again(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    assert rewrite(Scripted(echo), path=path).report.rewritten == 7
    idle = Scripted(echo)
    found = rewrite(idle, path=path, check=lambda original, new: False)
    assert found.report.kept["disagrees"] == 7
    assert found.examples == EXAMPLES
    assert idle.asked == []


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    rewrite(Scripted(echo), path=path)
    before = path.read_bytes()
    other = Scripted(echo)
    nn.init.ones_(other.weight)
    for words, changes in {
        "another examples": {"examples": EXAMPLES[:3]},
        "another template": {"template": "{reference} or {instruction}"},
        "another max_new_tokens: 16, not 9": {"max_new_tokens": 9},
        "another temperature": {"temperature": 1.0},
        "another model": {"model": other},
    }.items():
        # A changed template changes what is asked, too.
        words = words.replace("template", "(template|examples)")
        with pytest.raises(CheckpointError, match=words):
            rewrite(**{"model": Scripted(echo), "path": path, **changes})
    assert path.read_bytes() == before
    foreign = tmp_path / "data.jsonl"
    for content in ('{"prompt": "cat"}\n', "no json\n", "one line without an end"):
        foreign.write_text(content)
        with pytest.raises(CheckpointError, match=r"data\.jsonl: is"):
            rewrite(Scripted(echo), path=foreign)
        assert foreign.read_text() == content
    lines = before.splitlines(keepends=True)
    for damaged in ([lines[0], b"{]\n", *lines[2:]], [lines[0], *lines[:0:-1]]):
        path.write_bytes(b"".join(damaged))
        with pytest.raises(CheckpointError, match=r"is damaged at|not of the examples expected"):
            rewrite(Scripted(echo), path=path)
    with pytest.raises(OutputError, match="cannot be"):
        rewrite(Scripted(echo), path=tmp_path)


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("original", "rewritten", "agree"),
    [
        ("so 3 + 4 = 7.\n#### 7", "Adding 3 and 4 gives 7.", True),
        ("#### 1,234", "it is 1234.00 in all", True),
        ("#### 7", "It is 8, not 7? No: 8", False),
        ("costs $12.50", "we pay 12.5", True),
        ("-3", "3", False),
        ("the cat", "a cat", True),
        ("the cat", "9 cats", False),
        ("7", "seven", False),
        ("#### 5 apples of 9", "5", True),
        (".5", "0.5", True),
    ],
)
def test_same_number(original: str, rewritten: str, agree: bool) -> None:
    assert same_number(original, rewritten) is agree


@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_numbers_agree_as_numbers(a: int, b: int) -> None:
    assert same_number(f"so it is {a}", f"#### {b:,}") is (a == b)


def test_the_defaults_are_consistent() -> None:
    """The template names no place that is not filled in."""
    assert TEMPLATE.count("{") == 2
    model = Scripted(lambda prompt: [*ids("a cat"), EOS])
    row = {"prompt": "{reference} {instruction}", "completion": "{instruction}"}
    seen = []

    class Watching:
        chat_template, pad_token_id = None, 0

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            seen.append(text)
            return {"input_ids": [5]}

        def decode(self, found: list[int], **_: Any) -> str:
            return "As for the Reference answer, I agree"

    found = rewrite_targets(model, Watching(), [row], max_new_tokens=4, progress=False)
    assert "Instruction:\n{reference} {instruction}\n\nGiven answer:\n{instruction}\n" in seen[0]
    assert found.reasons == ["banned"]
    assert all(phrase == phrase.casefold() for phrase in BANNED)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"template": "{instruction}"}, ValueError, "template must have the place {reference}"),
        ({"banned": "reference"}, ValueError, "banned must be a list"),
        ({"banned": ["", "x"]}, ValueError, "banned must be a list of phrases that are not empty"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"examples": [{"text": "a"}]}, ValueError, r"examples\[0\] must have 'prompt' and"),
        ({"examples": ["a"]}, ValueError, r"examples\[0\] must be a mapping"),
        (
            {"examples": [{"messages": [{"role": "user", "content": "a"}]}]},
            ValueError,
            "must end with a turn of the assistant",
        ),
        (
            {"examples": [{"prompt": [{"role": "system", "content": "a"}], "completion": "b"}]},
            ValueError,
            "a turn of the user before",
        ),
        ({"examples": [{"prompt": "a", "completion": [3]}]}, ValueError, "messages with a role"),
        ({"examples": [{"prompt": "a", "completion": []}]}, ValueError, "one turn; got 0"),
        ({"model": nn.Linear(2, 2)}, TypeError, r"model must have generate\(\)"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        rewrite(**{"model": Scripted(echo), **changes})


def test_bad_models_and_tokenizers() -> None:
    with pytest.raises(TypeError, match="tokenizer must be one of transformers; got str"):
        rewrite_targets(Scripted(echo), "gpt2", EXAMPLES)
    model = Scripted(echo)
    model.config.eos_token_id = None
    with pytest.raises(ValueError, match="no eos_token_id"):
        rewrite(model)
    plain = tokenizer()
    plain.chat_template = None
    with pytest.raises(ValueError, match="chat=True needs a tokenizer with a chat template"):
        rewrite_targets(Scripted(echo), plain, EXAMPLES, chat=True)
