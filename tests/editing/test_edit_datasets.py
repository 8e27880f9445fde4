"""Facts from the files of CounterFact and zsRE, and our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cl_fast.editing.datasets import load_facts, without_conflicts
from cl_fast.editing.facts import Fact, check_facts

COUNT = 20


def counterfact(i: int, **rewrite: Any) -> dict[str, Any]:
    """A record as the file has it."""
    return {
        "case_id": 100 + i,
        "pararel_idx": i,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "relation_id": "P103",
            "target_new": {"str": f"new{i}", "id": f"Q{i}"},
            "target_true": {"str": f"true{i}", "id": f"Q1{i}"},
            "subject": f"Ada Lum {i}",
            **rewrite,
        },
        "paraphrase_prompts": [f"Rain. Ada Lum {i} speaks", f"Ada Lum {i}'s language is"],
        "neighborhood_prompts": [f"The mother tongue of Bo {i}{j} is" for j in range(10)],
        "attribute_prompts": [f"The mother tongue of Cy {i}{j} is" for j in range(10)],
        "generation_prompts": [f"Ada Lum {i} lives in", f"Ada Lum {i} was"],
    }


def zsre(i: int, **changes: Any) -> dict[str, Any]:
    return {
        "subject": f"Watts Humphrey {i}",
        "src": f"What university did Watts Humphrey {i} attend?",
        "pred": "Trinity College",
        "rephrase": f"What university did Watts Humphrey {i} take part in?",
        "alt": "University of Michigan",
        "answers": [f"Illinois {i}", "another"],
        "loc": "nq question: who played desmond doss father in hacksaw ridge",
        "loc_ans": "Hugo Weaving",
        "cond": "Trinity College >> University of Michigan || ...",
        **changes,
    }


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def test_counterfact(tmp_path: Path) -> None:
    path = write(tmp_path / "multi_counterfact.json", [counterfact(i) for i in range(COUNT)])
    facts = load_facts(path)
    assert len(check_facts(facts)) == COUNT
    fact = facts[3]
    assert fact.id == "counterfact-103"
    assert fact.text == "The mother tongue of Ada Lum 3 is"
    assert fact.text[slice(*fact.subject_span)] == fact.subject == "Ada Lum 3"
    assert (fact.target, fact.target_true) == ("new3", "true3")
    assert fact.paraphrases == ("Rain. Ada Lum 3 speaks", "Ada Lum 3's language is")
    assert fact.neighbourhood[7] == "The mother tongue of Bo 37 is"
    assert len(fact.neighbourhood) == 10
    assert fact.neighbourhood_target is None  # by default target_true
    assert fact.generation == ("Ada Lum 3 lives in", "Ada Lum 3 was")
    assert load_facts(path, limit=5) == facts[:5]
    assert load_facts(lines(tmp_path / "c.jsonl", [counterfact(i) for i in range(COUNT)])) == facts


def test_zsre(tmp_path: Path) -> None:
    facts = load_facts(write(tmp_path / "zsre_mend_eval.json", [zsre(i) for i in range(COUNT)]))
    assert len(check_facts(facts)) == COUNT
    fact = facts[2]
    assert fact.id == "zsre-2"
    assert fact.prompt == "What university did {} attend?"
    assert (fact.subject, fact.target, fact.target_true) == ("Watts Humphrey 2", "Illinois 2", None)
    assert fact.paraphrases == ("What university did Watts Humphrey 2 take part in?",)
    loc = "nq question: who played desmond doss father in hacksaw ridge?"
    assert (fact.neighbourhood, fact.neighbourhood_target) == ((loc,), "Hugo Weaving")
    assert fact.generation == ()


def test_zsre_takes_the_subject_as_the_question_writes_it(tmp_path: Path) -> None:
    record = zsre(0, subject="İda (LUM)", src="Where was İda (Lum) born, and İda (Lum) raised?")
    (fact,) = load_facts(write(tmp_path / "z.json", [record]))
    assert fact.subject == "İda (Lum)"
    assert fact.text == record["src"]


def test_our_own(tmp_path: Path) -> None:
    facts = [
        Fact("{} plays", "Ada", "chess", id="f1", weight=2.0, paraphrases=("Ada's game is",)),
        Fact("{} lives in", "Ada", "東京", separator="", target_true="大阪"),
    ]
    records = [fact.to_dict() for fact in facts]
    assert load_facts(lines(tmp_path / "a.jsonl", records)) == facts
    assert load_facts(write(tmp_path / "a.json", records)) == facts


def test_conflicts(tmp_path: Path) -> None:
    same, other = {"subject": "Ada Lum 0"}, "{} speaks the language"
    records = [
        counterfact(0),
        counterfact(1, **same),  # another target for the same subject and relation
        counterfact(2, prompt=other, **same),  # likewise, by another prompt
        counterfact(3, prompt=other, relation_id="P19", **same),  # another relation
        counterfact(4, target_new={"str": "new0"}, **same),  # the first one again
        counterfact(5, prompt=other, target_new={"str": "new0"}, **same),  # agrees with it
        counterfact(6),
    ]
    path = write(tmp_path / "counterfact.json", records)
    assert len(load_facts(path)) == len(records)
    with pytest.raises(ValueError, match="contradict each other"):
        check_facts(load_facts(path))
    kept = load_facts(path, conflicts="drop")
    # Record 5 agrees with record 0, but repeats the prompt of record 3, which is kept.
    assert [fact.id for fact in kept] == ["counterfact-100", "counterfact-103", "counterfact-106"]
    check_facts(kept)
    assert load_facts(path, 2, conflicts="drop") == kept[:2]

    facts = load_facts(path)
    by_prompt = without_conflicts(facts)
    assert [f.id[-1] for f in by_prompt] == ["0", "2", "6"]
    relations = dict(zip((f.id for f in facts), "aaabaaa", strict=True))
    assert without_conflicts(facts, lambda f: relations[f.id]) == kept
    assert without_conflicts(iter(kept)) == kept


def test_records_that_are_no_fact_are_left_out_when_asked(tmp_path: Path) -> None:
    records = [zsre(0), zsre(1, src="Who is it?"), zsre(2, answers=[]), zsre(3)]
    path = write(tmp_path / "z.json", records)
    with pytest.warns(UserWarning, match=r"z\.json: 2 records .* record 1: the subject"):
        facts = load_facts(path, skip_invalid=True)
    assert [fact.id for fact in facts] == ["zsre-0", "zsre-3"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "[{]", r"a\.json: is not JSON"),
        ("a.json", "[]", r"a\.json: holds no fact"),
        ("a.jsonl", "\n\n", r"a\.jsonl: holds no fact"),
        ("a.json", '{"prompt": "x"}', r"must hold a list of records; got an object.*\.jsonl"),
        ("a.jsonl", '\n{"prompt": \n', r"a\.jsonl, line 2: is not JSON"),
        ("a.json", [1], r"record 0: must be an object; got a number"),
        ("a.json", [{"question": "x"}], r"record 0: is of no known form.*it has 'question'"),
        ("a.json", [{}], "it has no key"),
        ("a.json", [counterfact(0), {"case_id": 1}], "record 1: 'requested_rewrite' is missing"),
        ("a.json", [counterfact(0), zsre(1)], "record 1: 'requested_rewrite' is missing"),
        ("a.json", [{"requested_rewrite": []}], "'requested_rewrite' must be an object; got a l"),
        ("a.json", [counterfact(0, subject=None)], r"'requested_rewrite\.subject' must be a str"),
        ("a.json", [counterfact(0, target_new={})], r"record 0: '.*target_new\.str' is missing"),
        ("a.json", [counterfact(0, target_true={"str": " "})], r"target_true\.str' is empty"),
        ("a.json", [counterfact(0, prompt="Ada Lum 0 is")], r"record 0: the prompt .* one \{\}"),
        ("a.json", [counterfact(0) | {"paraphrase_prompts": "x"}], "'paraphrase_prompts' must be"),
        (
            "a.json",
            [counterfact(0) | {"neighborhood_prompts": ["x", 3]}],
            r"record 0: 'neighborhood_prompts'\[1\] must be a text; got 3",
        ),
        ("a.json", [zsre(0), zsre(1, subject="Nobody")], r"record 1: the subject 'Nobody' does"),
        ("a.json", [zsre(0, answers=[])], "'answers' must begin with the new answer"),
        ("a.json", [zsre(0, loc_ans=7)], "'loc_ans' must be a string; got a number"),
        ("a.jsonl", [{"prompt": "{} is", "subject": "Ada"}], "line 1: 'target' is missing"),
        ("a.json", [{"prompt": "{}", "subject": "A", "targt": "b"}], "unknown key 'targt'.*target"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: Any, words: str) -> None:
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix == ".jsonl":
        lines(path, content)
    else:
        write(path, content)
    with pytest.raises(ValueError, match=words):
        load_facts(path)


def test_bad_options(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [zsre(0)])
    with pytest.raises(ValueError, match="limit must be at least 1; got 0"):
        load_facts(path, 0)
    with pytest.raises(ValueError, match="conflicts must be one of 'keep', 'drop'; got 'first'"):
        load_facts(path, conflicts="first")
    with pytest.raises(OSError, match="nowhere"):
        load_facts(tmp_path / "nowhere.json")
