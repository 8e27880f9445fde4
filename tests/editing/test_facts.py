"""Facts, and where their tokens are: with BOS, spaces, unicode, bytes, pieces and words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers import trainers as trainer
from transformers import PreTrainedTokenizerFast

from cl_fast.editing.facts import Fact, check_facts, encode, encode_many, read_facts, unknown_ids

TEXTS = [
    "LeBron James plays the sport of basketball, said Zoë Müller of Ærø to LeBron James.",
    "東京 is the capital of 日本. The mother tongue of Danielle Darrieux is French.",
    "Ada Lum lives in Port Hale; Ada Lum's trade is that of a weaver in Port Hale.",
] * 3  # fmt: skip


def tokenizer(kind: str, *, bos: bool = False, eos: bool = False) -> Any:
    special = ["<s>", "</s>", "<unk>"]
    if kind == "bytes":  # GPT-2, Llama 3
        made = Tokenizer(models.BPE(unk_token=None))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        learn: Any = trainer.BpeTrainer(
            vocab_size=380, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "pieces":  # Llama 2: a space is a letter, and one is put in front
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
        fallback = [f"<0x{i:02X}>" for i in range(256)]
        learn = trainer.BpeTrainer(
            vocab_size=420, special_tokens=[*special, *fallback], show_progress=False,
            limit_alphabet=40,
        )  # fmt: skip
    else:
        made = Tokenizer(models.WordLevel(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        learn = trainer.WordLevelTrainer(special_tokens=special, show_progress=False)
    made.train_from_iterator(TEXTS, learn)
    if bos or eos:
        template = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
        ids = [(name, made.token_to_id(name)) for name in ("<s>", "</s>")]
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


TOKENIZERS = {
    (kind, bos, eos): tokenizer(kind, bos=bos, eos=eos)
    for kind in ("bytes", "pieces", "words")
    for bos, eos in ((False, False), (True, False), (True, True))
}

CASES = [
    ("LeBron James plays the sport of", (0, 12)),
    ("The mother tongue of Danielle Darrieux is", (21, 38)),
    ("Zoë Müller of Ærø", (0, 10)),
    ("said Zoë Müller", (5, 15)),
    ("東京 is the capital of", (0, 2)),
    ("the capital of 日本", (15, 17)),
    ("Ada Lum's trade is that of", (0, 7)),
    ("Ada Lum lives in Port Hale; Ada Lum", (28, 35)),
]


@pytest.mark.parametrize("which", TOKENIZERS)
@pytest.mark.parametrize(("text", "span"), CASES)
@pytest.mark.parametrize("target", [None, "football", "東京", "French weaver"])
def test_tokens_are_where_their_characters_are(
    which: Any, text: str, span: tuple[int, int], target: str | None
) -> None:
    made = TOKENIZERS[which]
    e = encode(made, text, span, target)
    whole = text if target is None else f"{text} {target}"
    offsets = made(whole, return_offsets_mapping=True)["offset_mapping"]
    assert (e.ids[0] == made.bos_token_id) == which[1], "the beginning stays"
    assert e.ids[-1] != made.eos_token_id, "the end does not"
    start, stop = offsets[e.lookup]
    assert start < span[1] <= stop, "the lookup token holds the subject's last character"
    if target is None:
        assert not len(e.targets)
        assert e.prompt == e.ids
    else:
        assert e.targets.stop == len(e.ids)
        assert offsets[e.targets.start][1] > len(text)
        assert offsets[e.targets.start - 1][1] <= len(text)
        if which[0] != "words":  # whose decoder puts spaces where there were none
            decoded = made.decode(e.target, clean_up_tokenization_spaces=False)
            assert decoded.strip() == target
        assert e.lookup < e.targets.start
    first = encode(made, text, span, target, lookup="subject_first")
    assert offsets[first.lookup][1] > span[0]
    assert first.lookup <= e.lookup
    last = encode(made, text, span, target, lookup="last")
    assert last.lookup == (e.targets.start if target else len(e.ids)) - 1
    after = encode(made, text, span, target, lookup="subject_first_after_last")
    assert after.lookup == min(e.lookup + 1, last.lookup)


@given(st.lists(st.sampled_from(CASES), min_size=1, max_size=6))
def test_many_are_each_alone(cases: list[tuple[str, tuple[int, int]]]) -> None:
    made = TOKENIZERS["bytes", True, False]
    rows = [(text, span, "football") for text, span in cases]
    assert encode_many(made, rows) == [encode(made, *row) for row in rows]


def test_the_separator_of_scripts_without_spaces() -> None:
    made = TOKENIZERS["bytes", False, False]
    fact = Fact("{}は", "東京", "日本", separator="")
    e = encode(made, fact.text, fact.subject_span, fact.target, separator=fact.separator)
    assert made.decode(e.ids) == fact.statement == "東京は日本"
    assert made.decode(e.target) == "日本"


def test_a_prompt_may_end_in_a_space() -> None:
    made = TOKENIZERS["bytes", False, False]
    assert encode(made, "Ada Lum lives in ", (0, 7), "Port Hale") == encode(
        made, "Ada Lum lives in", (0, 7), " Port Hale"
    )


def test_a_fact_knows_its_text() -> None:
    fact = Fact("the mother tongue of {} is ", " Ada Lum ", " Latin ")
    assert fact.subject == "Ada Lum"
    assert fact.text == "the mother tongue of Ada Lum is" == fact.id
    assert fact.statement == "the mother tongue of Ada Lum is Latin"
    assert fact.text[slice(*fact.subject_span)] == "Ada Lum"
    assert fact.weight == 1.0


def test_the_last_of_several_subjects_counts() -> None:
    fact = Fact.from_text("Ada and Ben know that Ada plays", "Ada", "chess", id="x")
    assert fact.prompt == "Ada and Ben know that {} plays"
    assert fact.id == "x"


def test_spaces_around_a_subject_stay_in_the_prompt() -> None:
    for subject in (" Ada", "Ada ", " Ada "):
        fact = Fact.from_text("the mother of Ada is", subject, "Eve")
        assert (fact.prompt, fact.subject) == ("the mother of {} is", "Ada")


@pytest.mark.parametrize(
    ("text", "subject", "prompt"),
    [
        ("Ann met Anna today", "Ann", "{} met Anna today"),
        ("Anna plays", "Ann", None),
        ("Joanna and Jo's dog", "Jo", "Joanna and {}'s dog"),
        ("in 1999 and 19 others", "19", "in 1999 and {} others"),
        ("日本の首都は東京です", "東京", "日本の首都は{}です"),
        ("the C++ of C", "C", "the C++ of {}"),
    ],
)
def test_a_subject_is_whole_words(text: str, subject: str, prompt: str | None) -> None:
    if prompt is None:
        with pytest.raises(ValueError, match="does not occur in the prompt 'Anna plays'"):
            Fact.from_text(text, subject, "golf")
    else:
        assert Fact.from_text(text, subject, "golf").prompt == prompt


def test_files_in_other_encodings(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    line = json.dumps({"prompt": "Zoë plays", "subject": "Zoë", "target": "golf"},
                      ensure_ascii=False)  # fmt: skip
    path.write_text(line, encoding="utf-8-sig")
    assert read_facts(path)[0].subject == "Zoë"
    path.write_text(line, encoding="latin-1")
    with pytest.raises(ValueError, match=r"facts.jsonl: is not UTF-8"):
        read_facts(path)


def test_facts_travel_through_files(tmp_path: Path) -> None:
    facts = [
        Fact("{} plays", "Ada", "chess", paraphrases=("the sport of Ada is",), weight=2.0),
        Fact("the home of {} is", "Zoë", "Ærø", id="7", target_true="Rome", neighbourhood=("a",)),
    ]
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(json.dumps(f.to_dict()) for f in facts) + "\n\n", encoding="utf-8")
    assert read_facts(path) == facts
    assert read_facts(path, limit=1) == facts[:1]
    plain = {"prompt": "Ada plays", "subject": "Ada", "target": "chess"}
    path.write_text(json.dumps(plain))
    assert read_facts(path) == [Fact("{} plays", "Ada", "chess")]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"subject": " "}, ValueError, "the subject of the fact '{} plays' is empty"),
        ({"target": " "}, ValueError, "the target of the fact 'Ada plays' is empty"),
        ({"prompt": "Ada plays"}, ValueError, r"must have one {} .*Fact.from_text\('Ada plays'"),
        ({"prompt": "Ben plays"}, ValueError, "the subject 'Ada' does not occur in it either"),
        ({"prompt": "{} and {}"}, ValueError, "must have one {}"),
        ({"weight": 0}, ValueError, "weight of the fact 'Ada plays' must be positive"),
        ({"weight": float("nan")}, ValueError, "must be positive and finite"),
        ({"weight": "1"}, TypeError, "weight of the fact 'Ada plays' must be a number"),
        ({"target": 3}, TypeError, "target of a fact must be a string"),
        ({"paraphrases": "one"}, TypeError, "paraphrases of a fact must be a list of strings"),
        ({"paraphrases": ["{} likes"]}, ValueError, "write the subject out instead of {} in"),
        ({"neighbourhood": ["{} likes"]}, ValueError, "neighbourhood of a fact are whole texts"),
        ({"target_true": 1}, TypeError, "target_true of a fact must be a string or None"),
    ],
)
def test_bad_facts(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Fact(**{"prompt": "{} plays", "subject": "Ada", "target": "chess", **changes})


FACT = Fact("{} plays", "Ada", "chess")


@pytest.mark.parametrize(
    ("facts", "error", "words"),
    [
        ([], ValueError, "facts is empty"),
        ([FACT, "Ada"], TypeError, r"facts\[1\] must be a Fact"),
        (FACT, TypeError, "must be a list of Facts; put the one into a list"),
        ("facts.jsonl", TypeError, r"got 'facts.jsonl'. load_facts\(path\) reads a file"),
        ([FACT, FACT], ValueError, "'Ada plays chess' is there twice"),
        ([FACT, dataclasses.replace(FACT, target="golf", id="2")], ValueError,
         "contradict each other: 'Ada plays' -> 'chess' .* -> 'golf'"),
        ([FACT, Fact("{} reads", "Ada", "books", id="Ada plays")], ValueError,
         "two facts have the id 'Ada plays'"),
    ],
)  # fmt: skip
def test_facts_that_do_not_go_together(facts: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        check_facts(facts)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: is not JSON"),
        ("[]", "line 2: must be an object"),
        ('{"prompt": "{} plays", "subject": "Ada"}', "line 2: 'target' is missing"),
        ('{"prompt": "{} plays", "subject": "Ada", "targte": "x"}',
         "unknown key 'targte'; did you mean 'target'"),
        ('{"prompt": "{} plays", "subject": "", "target": "x"}', "line 2: the subject .* is empty"),
        ('{"prompt": "Ben plays", "subject": "Ada", "target": "x"}',
         "line 2: the subject 'Ada' does not occur in the prompt 'Ben plays'"),
    ],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(FACT.to_dict()) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=words):
        read_facts(path)


def test_no_facts_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty.jsonl: holds no fact"):
        read_facts(tmp_path / "empty.jsonl")


def test_unknown_ids_are_told_with_those_alike() -> None:
    assert unknown_ids(["a", "b", "a"], ["b", "a"]) == ["a", "b"]
    with pytest.raises(ValueError, match="no fact with the id 'fact1'; did you mean 'fact-1'"):
        unknown_ids(["fact1"], ["fact-1", "x"])
    assert unknown_ids([Fact("{} plays", "Ada", "chess")], ["Ada plays"]) == ["Ada plays"]  # type: ignore[list-item]
    with pytest.raises(TypeError, match="must be a list of ids"):
        unknown_ids("abc", ["abc"])


def test_what_has_no_tokens_is_refused() -> None:
    made = TOKENIZERS["words", False, False]
    with pytest.raises(ValueError, match="no token before its target 'chess'"):
        encode(made, "", None, "chess")
    with pytest.raises(TypeError, match="gives no offsets"):
        encode(object(), "Ada", (0, 3))
    with pytest.raises(ValueError, match="lookup must be one of 'subject_last'"):
        encode(made, "Ada", (0, 3), lookup="middle")  # type: ignore[arg-type]
