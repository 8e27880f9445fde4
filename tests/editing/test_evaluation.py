"""Scores of edits against a loop over single prompts, in float64."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import MADE_UP, VOCABULARY, NoLogits, gemma2, llama, word_tokenizer
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from cl_fast.editing.continuations import continuations, uniforms
from cl_fast.editing.evaluation import (
    SUITE,
    Reference,
    begins_with,
    cover,
    evaluate,
    ngram_entropy,
)
from cl_fast.editing.facts import Fact
from cl_fast.editing.report import Report, compared
from cl_fast.errors import CheckpointError, NonFiniteError

EVERYTHING = tuple(SUITE)
ROUNDED = 1e-7
"""RMS norms round to float32 in a float64 model, too: one unit moves a probability by this much."""


words = partial(word_tokenizer, MADE_UP, side="right")


def letters() -> PreTrainedTokenizerFast:
    """One token a byte; spaces belong to what follows them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(BPE({c: i for i, c in enumerate(["<eos>", *alphabet])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


def gpt2(seed: int = 0, vocabulary: int = VOCABULARY) -> Any:
    return tiny_models.gpt2(
        seed, vocab_size=vocabulary, n_positions=160, initializer_range=0.4,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def says(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    """What the model writes on greedily, reading the whole text for each word."""
    ids = tokens(tokenizer, prompt)
    for _ in range(count):
        ids.append(int(logits(model, ids)[-1].argmax()))
    return str(tokenizer.decode(ids[-count:]))


def tokens(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if ids[-1] == 2 else ids  # no end of sequence


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    device = torch.tensor([ids])
    with torch.no_grad():
        return model(input_ids=device).logits[0].double()


def some_facts(model: Any, tokenizer: Any, count: int, seed: int = 0) -> list[Fact]:
    """Facts of which the model says some, and some neighbours' answers."""
    chance = np.random.default_rng(seed)

    def draw(n: int) -> str:
        return " ".join(chance.choice(MADE_UP, n))

    def known(prompt: str, n: int) -> str:
        said = says(model, tokenizer, prompt, n)
        clean = all(word in MADE_UP for word in said.split()) and said.split()
        return said if clean and chance.random() < 0.6 else draw(n)

    facts = []
    for i in range(count):
        fact = Fact(f"{draw(2)} {{}} {draw(int(chance.integers(1, 4)))}", draw(2), draw(1))
        near = tuple(draw(int(chance.integers(2, 7))) for _ in range(3))
        fact = dataclasses.replace(
            fact,
            id=f"f{i}",
            target=known(fact.text, int(chance.integers(1, 4))),
            target_true=draw(int(chance.integers(1, 3))),
            paraphrases=tuple(draw(3 + j) for j in range(i % 3)),
            neighbourhood=near,
            generation=(draw(3), draw(4)),
        )
        facts.append(
            dataclasses.replace(fact, neighbourhood_target=known(near[0], 1) if i % 2 else None)
        )
    return facts


# --- the oracle: one prompt at a time -----------------------------------------------------------


def given_target(
    model: Any, tokenizer: Any, prompt: str, target: str, separator: str = " "
) -> tuple[float, list[bool]]:
    """Mean negative log-prob per token, and which tokens are the likeliest."""
    before = tokens(tokenizer, prompt)
    whole = tokens(tokenizer, prompt + separator + target)
    assert whole[: len(before)] == before
    z = logits(model, whole)
    nll, hits = [], []
    for place in range(len(before), len(whole)):
        row = z[place - 1].tolist()
        top = max(row)
        total = top + math.log(math.fsum(math.exp(x - top) for x in row))
        nll.append(total - row[whole[place]])
        hits.append(int(np.argmax(row)) == whole[place])
    return math.fsum(nll) / len(nll), hits


def entropy(text: str, n: int) -> float:
    parts = text.split()
    counts = Counter(tuple(parts[i : i + n]) for i in range(len(parts) - n + 1))
    total = sum(counts.values())
    return -math.fsum(c / total * math.log2(c / total) for c in counts.values())


def expected(model: Any, base: Any, tokenizer: Any, fact: Fact) -> dict[str, float]:
    """Every metric but fluency."""
    out: dict[str, float] = {}
    right = fact.target_true if fact.neighbourhood_target is None else fact.neighbourhood_target
    assert fact.target_true is not None
    assert right is not None
    kinds = {
        "es": ([fact.text], fact.target, fact.target_true),
        "ps": (fact.paraphrases, fact.target, fact.target_true),
        "ns": (fact.neighbourhood, right, fact.target),
        "ns_plus": (
            [f"{fact.text} {fact.target}. {prompt}" for prompt in fact.neighbourhood],
            right,
            fact.target,
        ),
    }
    for kind, (prompts, good, bad) in kinds.items():
        rows = [
            (given_target(model, tokenizer, p, good), given_target(model, tokenizer, p, bad))
            for p in prompts
        ]
        if not rows:
            continue
        names = {"es": "em", "ps": "pm", "ns": "nm", "ns_plus": "nm_plus"}
        out[names[kind]] = float(np.mean([math.exp(-g) - math.exp(-b) for (g, _), (b, _) in rows]))
        if good != bad:
            out[kind] = float(np.mean([math.exp(-g) > math.exp(-b) for (g, _), (b, _) in rows]))
        else:
            out.pop(names[kind])
        out[f"{kind}_acc"] = float(np.mean([all(hits) for (_, hits), _ in rows]))
        if kind != "ns_plus":
            out[f"{kind}_tokens"] = float(np.mean([np.mean(hits) for (_, hits), _ in rows]))
    divergences, same = [], []
    for prompt in fact.neighbourhood:
        ids = tokens(tokenizer, prompt)
        q, p = (logits(m, ids)[-1].log_softmax(-1) for m in (base, model))
        divergences.append(float((q.exp() * (q - p)).sum()))
        same.append(int(q.argmax()) == int(p.argmax()))
    out["nkl"], out["n_same"] = float(np.mean(divergences)), float(np.mean(same))
    said = [
        says(model, tokenizer, prompt, len(fact.target.split()) + 3).split()
        for prompt in (fact.text, *fact.paraphrases)
    ]
    length = len(fact.target.split())
    found = [" ".join(text[:length]) == fact.target for text in said]
    out["greedy"] = float(found[0])
    if len(found) > 1:
        out["greedy_ps"] = float(np.mean(found[1:]))
    return out


Build = Callable[[int], Any]


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """A model, and the same one after a change."""
    model, base = llama(3).double().eval(), llama(3).double().eval()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.add_(
            0.1 * torch.randn(16, 32, dtype=torch.float64)
        )
    return model, base


@pytest.fixture(scope="module")
def facts(pair: tuple[Any, Any]) -> list[Fact]:
    return some_facts(pair[0], words(), 12)


@pytest.fixture(scope="module")
def report(pair: tuple[Any, Any], facts: list[Fact]) -> Report:
    model, base = pair
    return evaluate(
        model, words(), facts, EVERYTHING, reference=base, generation_length=14, cohorts=3
    )


def same(a: Report, b: Report, tolerance: float = ROUNDED) -> None:
    assert [row["id"] for row in a.rows] == [row["id"] for row in b.rows]
    for one, other in zip(a.rows, b.rows, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if name != "cohort":
                assert value == (
                    pytest.approx(other[name], abs=tolerance)
                    if isinstance(value, float)
                    else other[name]
                ), (one["id"], name)


# --- each metric --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "tokenizer"),
    [
        (lambda seed: llama(seed), words()),
        (lambda seed: llama(seed), words(bos=True)),
        (lambda seed: gpt2(seed), words(eos=True)),
        (lambda seed: gemma2(seed), words(bos=True, eos=True)),
    ],
    ids=["llama", "llama with bos", "gpt2 with eos", "gemma2 with both"],
)
def test_every_metric_is_that_of_a_loop(build: Build, tokenizer: Any) -> None:
    model, base = build(5).double().eval(), build(6).double().eval()
    listed = some_facts(model, tokenizer, 9, seed=3)
    found = evaluate(model, tokenizer, listed, EVERYTHING[:-1], reference=base, batch=7)
    both: dict[str, set[float]] = {}
    for fact, row in zip(listed, found.rows, strict=True):
        wanted = expected(model, base, tokenizer, fact)
        assert {k: v for k, v in row.items() if isinstance(v, float)} == pytest.approx(
            wanted, abs=1e-12 if isinstance(model, GPT2LMHeadModel) else ROUNDED
        )
        for name, value in wanted.items():
            both.setdefault(name, set()).add(round(value, 9))
    # The facts are such that no metric is constant, so none of the above is trivial.
    for name in ("es", "ps", "ns", "ns_plus", "es_acc", "es_tokens", "ns_acc", "greedy"):
        assert len(both[name]) > 1, name


def test_targets_of_many_tokens_that_share_beginnings() -> None:
    """Byte by byte: targets that begin each other, accents, and no space before a target."""
    tokenizer = letters()
    model, base = (gpt2(s, vocabulary=257).double().eval() for s in (1, 2))
    listed = [
        Fact("{} is", "Ada", "blue", target_true="bluebell", neighbourhood=("Bo is", "Bo is blue")),
        Fact("{} is", "Bo", "Éa", target_true="Éé", neighbourhood=("Ada is",)),
        Fact("{}は", "東京", "青い", separator="", target_true="赤い", neighbourhood=("空は",)),
    ]
    found = evaluate(model, tokenizer, listed, reference=base)
    for fact, row in zip(listed, found.rows, strict=True):
        for kind, prompts, good, bad in (
            ("es", [fact.text], fact.target, fact.target_true),
            ("ns", fact.neighbourhood, fact.target_true, fact.target),
        ):
            gaps, tokens_right = [], []
            for prompt in prompts:
                x, hits = given_target(model, tokenizer, prompt, good, fact.separator)
                y, _ = given_target(model, tokenizer, prompt, bad, fact.separator)
                gaps.append(math.exp(-x) - math.exp(-y))
                tokens_right.append(np.mean(hits))
            assert row[{"es": "em", "ns": "nm"}[kind]] == pytest.approx(np.mean(gaps), abs=ROUNDED)
            assert row[kind] == np.mean([gap > 0 for gap in gaps])
            assert row[f"{kind}_tokens"] == pytest.approx(np.mean(tokens_right), abs=1e-12)


def test_alone_as_in_a_batch(pair: tuple[Any, Any], facts: list[Fact], report: Report) -> None:
    model, base = pair
    options = {"reference": base, "generation_length": 14}
    one_by_one = evaluate(model, words(side="left"), facts, EVERYTHING, batch=1, **options)
    same(report, one_by_one)
    backwards = evaluate(model, words(), facts[::-1], EVERYTHING, batch=5, **options)
    backwards.rows.reverse()
    same(report, backwards)
    for i in (0, 5):
        alone = evaluate(model, words(), facts[i : i + 1], reference=base)
        row = {k: v for k, v in report.rows[i].items() if k != "fluency"}
        same(alone, Report([row], alone.metrics))
    single = copy.deepcopy(model).float()
    one = evaluate(single, words(), facts[:6], reference=base, batch=1)
    same(one, evaluate(single, words(), facts[:6], reference=base, batch=5), 1e-6)


def test_many_windows_of_facts(pair: tuple[Any, Any], facts: list[Fact], report: Report,
                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("cl_fast.editing.evaluation._WINDOW", 5)
    same(report, evaluate(pair[0], words(), facts, EVERYTHING, reference=pair[1],
                          generation_length=14))  # fmt: skip


def test_a_reference_taken_before_is_the_model_before(
    pair: tuple[Any, Any], facts: list[Fact], report: Report
) -> None:
    model, base = pair
    edited = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(base.state_dict())
    before = Reference.take(model, words(), facts, batch=4)
    assert len(before) == len({p for f in facts for p in f.neighbourhood})
    unedited = evaluate(model, words(), facts, ("nkl",), reference=before)
    assert unedited.mean("nkl") == 0.0
    assert unedited.mean("n_same") == 1.0
    # The head changes too: what was kept is a copy.
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    moved = evaluate(model, words(), facts, ("nkl",), reference=before)
    model.load_state_dict(base.state_dict())
    other = llama(3).double().eval()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    same(moved, evaluate(other, words(), facts, ("nkl",), reference=model))
    model.load_state_dict(edited)
    after = evaluate(model, words(), facts, ("nkl",), reference=before)
    for row, whole in zip(after.rows, report.rows, strict=True):
        assert row["nkl"] == pytest.approx(whole["nkl"], abs=1e-12)
        assert row["n_same"] == whole["n_same"]


def test_the_model_is_left_as_it_was(facts: list[Fact]) -> None:
    model = llama(3).train()
    model.model.layers[0].eval()
    state, numbers = torch.random.get_rng_state(), random.getstate()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    evaluate(model, words(), facts[:2], EVERYTHING[:6] + EVERYTHING[7:], generation_length=9)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert random.getstate() == numbers
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.model.layers] == [False, True]
    assert not any(p.grad is not None for p in model.parameters())


def test_no_logits_of_all_positions(pair: tuple[Any, Any], facts: list[Fact]) -> None:
    """Of a batch only the positions before targets meet the head."""
    long = [
        dataclasses.replace(f, paraphrases=(" ".join(MADE_UP[:40]),), neighbourhood=())
        for f in facts
    ]
    with NoLogits(rows=2 * 40):
        evaluate(pair[0], words(), long, ("ps", "acc"))


def test_in_context(pair: tuple[Any, Any], facts: list[Fact]) -> None:
    model, base = pair
    told = {f.text: f"{f.text} {f.target} " for f in facts}

    def before(prompt: str) -> str:
        return told.get(prompt, "kab lod ")

    found = evaluate(model, words(), facts, reference=base, in_context=before)
    fact, row = facts[4], found.rows[4]
    x, hits = given_target(model, words(), told[fact.text] + fact.text, fact.target)
    y, _ = given_target(model, words(), told[fact.text] + fact.text, str(fact.target_true))
    assert row["em"] == pytest.approx(math.exp(-x) - math.exp(-y), abs=ROUNDED)
    assert row["es_acc"] == all(hits)
    values = []
    for prompt in fact.neighbourhood:  # of the reference none has a context
        q = logits(base, tokens(words(), prompt))[-1].log_softmax(-1)
        p = logits(model, tokens(words(), "kab lod " + prompt))[-1].log_softmax(-1)
        values.append(float((q.exp() * (q - p)).sum()))
    assert row["nkl"] == pytest.approx(np.mean(values), abs=ROUNDED)


# --- texts --------------------------------------------------------------------------------------


def test_greedy_is_written_and_compared_as_text() -> None:
    assert begins_with(" blue. And", "blue")
    assert begins_with("New  York\n", "New York")
    assert not begins_with("bluebell", "blue")
    assert not begins_with("blue2", "blue")
    assert begins_with("C++11", "C++")
    assert begins_with("青いです", "青い", words=False)
    assert not begins_with("青いです", "青い")
    assert not begins_with("blu", "blue")


def test_greedy_stops_at_the_end_of_a_text_and_at_the_limit() -> None:
    """The model says what its head's bias prefers; then the end."""
    model = llama(1).eval()
    word, other = 9, 11
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
        model.model.embed_tokens.weight[4:, 0] = 1.0  # any word: then `word`
        model.model.embed_tokens.weight[word] = 0
        model.model.embed_tokens.weight[word, 1] = 1.0  # after it the end
        model.lm_head.weight[word, 0] = 1.0
        model.lm_head.weight[2, 1] = 1.0
        model.lm_head.weight[other, 1] = 0.5
    tokenizer = words()
    name = tokenizer.decode([word])
    facts = [
        Fact("{} kad", "kab", name, id="a", paraphrases=("kab kaf kag", "kab " + name)),
        Fact("{} kad", "kaf", f"{name} {name}", id="b"),
    ]
    found = evaluate(model, tokenizer, facts, ("greedy",))
    assert [row["greedy"] for row in found.rows] == [1.0, 0.0]
    assert [row["greedy_text"] for row in found.rows] == [name, name]
    assert found.rows[0]["greedy_ps"] == 0.5
    assert "greedy_ps" not in found.rows[1]
    model.generation_config.eos_token_id = [7, word]
    assert [r["greedy_text"] for r in evaluate(model, tokenizer, facts, ("greedy",)).rows] == [
        "", ""
    ]  # fmt: skip


def test_greedy_looks_for_whole_words_where_there_are_spaces() -> None:
    """The model says a, a, a, ..."""
    model, tokenizer = llama(1, vocab_size=257, eos_token_id=None).eval(), letters()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.convert_tokens_to_ids("a")] = 1.0
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
    facts = [Fact("{} is", "Ada", "aa", separator=between) for between in ("", " ")]
    rows = evaluate(model, tokenizer, facts, ("greedy",)).rows
    assert [row["greedy"] for row in rows] == [1.0, 0.0]
    assert [row["greedy_text"] for row in rows] == ["a" * 5, "a" * 6]
    assert evaluate(model, tokenizer, facts, ("greedy",), max_new_tokens=2).mean("greedy") == 1.0


@pytest.mark.parametrize("build", [llama, gpt2, gemma2])
def test_continuations_with_and_without_a_cache(build: Build) -> None:
    model = build(4).double().eval()
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12], [13], [5, 6, 7]]
    limits = [5, 3, 0, 6, 2]
    got = continuations(model, prompts, limits, batch=2)
    for prompt, limit, ids in zip(prompts, limits, got, strict=True):
        text = list(prompt)
        for _ in range(limit):
            text.append(int(logits(model, text)[-1].argmax()))
        assert ids == text[len(prompt) :]
    forward = model.forward

    def without_cache(**inputs: Any) -> Any:
        assert inputs.get("past_key_values") is None
        out = forward(**inputs)
        out.past_key_values = None
        return out

    model.forward = without_cache
    assert continuations(model, prompts, limits, batch=2) == got


def test_drawn_tokens_have_their_shares() -> None:
    """Each of the k likeliest is drawn as often as its share of them."""
    model = llama(2).double().eval()
    z = logits(model, [5, 6])[-1]
    best, ids = z.topk(3)
    share = best.softmax(-1)
    draws = [torch.tensor([u], dtype=torch.float64) for u in np.linspace(0, 1, 1000, False)]
    got = continuations(model, [[5, 6]] * 1000, [1] * 1000, batch=500, top_k=3, draws=draws)
    counts = Counter(token for (token,) in got)
    assert set(counts) <= set(ids.tolist())
    for token, part in zip(ids.tolist(), share.tolist(), strict=True):
        assert counts[token] == pytest.approx(1000 * part, abs=1)
    assert torch.equal(uniforms(4, 1, "a"), uniforms(4, 1, "a"))
    assert not torch.equal(uniforms(4, 1, "a"), uniforms(4, 2, "a"))
    assert not torch.equal(uniforms(4, 1, "a", "b"), uniforms(4, 1, "a", "c"))
    assert torch.equal(uniforms(9, 1, "a")[:4], uniforms(4, 1, "a"))


@given(st.lists(st.sampled_from(["ab", "c,", "."]), max_size=12), st.integers(1, 4))
def test_ngram_entropy(parts: list[str], n: int) -> None:
    text = " ".join(parts)
    split = text.replace(",", " , ").replace(".", " . ")
    assert ngram_entropy(text, n) == pytest.approx(entropy(split, n) if split.split() else 0.0)


def test_fluency(pair: tuple[Any, Any], facts: list[Fact], report: Report) -> None:
    assert ngram_entropy("a b a b a", 2) == 1.0  # ab, ba, ab, ba
    assert ngram_entropy("don't stop", 2) == 0.0
    assert ngram_entropy("x", 2) == 0.0
    model, _ = pair
    fact = facts[2]
    values = []
    for prompt in fact.generation:
        ids = tokens(words(), prompt)
        for u in uniforms(14 - len(ids), 0, fact.id, prompt).tolist():
            best, order = logits(model, ids)[-1].topk(5)
            below = best.softmax(-1).cumsum(-1)
            token = int(order[int((below <= u).sum())])
            if token == 2:
                break
            ids.append(token)
        text = words().decode(ids, skip_special_tokens=True)
        values.append(100 * (2 / 3 * entropy(text, 2) + 4 / 3 * entropy(text, 3)) / 2)
    assert report.rows[2]["fluency"] == pytest.approx(np.mean(values), abs=ROUNDED)
    some = evaluate(
        model, words(), facts, ("fluency",), generation_length=14, fluency_every=5
    )  # fmt: skip
    assert [i for i, row in enumerate(some.rows) if "fluency" in row] == [0, 5, 10]
    assert some.count("fluency") == 3
    assert some.rows[5]["fluency"] == pytest.approx(report.rows[5]["fluency"], abs=ROUNDED)
    other = evaluate(model, words(), facts, ("fluency",), generation_length=14, seed=1)
    assert other.mean("fluency") != report.mean("fluency")


# --- what is missing ----------------------------------------------------------------------------


def test_what_is_missing_is_absent_and_said(pair: tuple[Any, Any]) -> None:
    bare = [Fact("kab {} kad", "lob", "mib", id="a"), Fact("kab {} kad", "lod", "mid", id="b")]
    found = evaluate(pair[0], words(), bare)
    assert found.metrics == ("es_acc", "es_tokens", "greedy")
    assert found.absent["es"] == "no fact has target_true"
    assert found.absent["ps_acc"] == "no fact has paraphrases"
    assert found.absent["ns"] == "no fact has a neighbourhood"
    assert found.absent["nkl"] == "no fact has a neighbourhood"
    assert "fluency" not in found.absent  # it was not asked for
    assert "score" not in found.names
    with pytest.raises(ValueError, match="'es' was not measured: no fact has target_true"):
        found.mean("es")
    with pytest.raises(ValueError, match="'score' was not measured: it needs es, ps, ns"):
        _ = found.score
    assert "em" in found.table()
    assert "no fact has target_true" in found.table()

    near = dataclasses.replace(bare[1], neighbourhood=("kab",), neighbourhood_target="kad")
    found = evaluate(pair[0], words(), [bare[0], near])
    assert found.count("ns") == 1
    assert "ns" not in found.rows[0]
    assert found.absent["nkl"] == "no reference was given: take one before the edit"
    # Targets that are equal cannot be told apart: not 0 but absent.
    equal = dataclasses.replace(near, target_true="mid", neighbourhood_target="mid")
    found = evaluate(pair[0], words(), [equal])
    assert found.absent["es"] == "every target_true is the target itself"
    assert found.absent["ns"] == "what neighbours shall keep is the target itself"
    assert found.metrics == ("es_acc", "ns_acc", "ns_plus_acc", "es_tokens", "ns_tokens", "greedy")
    assert not set(found.metrics) & set(found.absent)


def test_a_tie_is_no_success() -> None:
    """All tokens are equally likely: neither target is more likely than the other."""
    model = llama(3).double()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    fact = Fact("kab {}", "lob", "mib", target_true="mid", neighbourhood=("kab",))
    row = evaluate(model, words(), [fact]).rows[0]
    assert (row["es"], row["em"], row["ns"], row["nm"]) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("suite", "changes", "says"),
    [
        (("es",), {}, "suite asks for 'es', but no fact has target_true"),
        (("ps",), {"target_true": "kab"}, "'ps', but no fact has paraphrases"),
        (("ps",), {"paraphrases": ("kab",)}, "'ps', but of facts with paraphrases, no fact has ta"),
        (("ns",), {"target_true": "kab"}, "'ns', but no fact has a neighbourhood"),
        (("ns_plus",), {"neighbourhood": ("kab",)}, "'ns_plus', but no fact with a neighbourhood"),
        (("nkl",), {"neighbourhood": ("kab",)}, "'nkl', but no reference was given"),
        (("acc", "fluency"), {}, "'fluency', but no fact has prompts in `generation`"),
    ],
)
def test_asking_for_what_no_fact_has(
    pair: tuple[Any, Any], suite: tuple[str, ...], changes: dict[str, Any], says: str
) -> None:
    fact = Fact("kab {} kad", "lob", "mib", **changes)
    with pytest.raises(ValueError, match=says):
        evaluate(pair[0], words(), [fact], suite)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"facts": []}, ValueError, "facts is empty"),
        ({"facts": ["kab"]}, TypeError, r"facts\[0\] must be a Fact; got str"),
        ({"suite": ("ess",)}, ValueError, "suite must be one of 'es', .*; got 'ess'"),
        ({"suite": "es"}, TypeError, "suite must be a list of names"),
        ({"suite": ()}, ValueError, "suite is empty"),
        ({"batch": 0}, ValueError, "batch must be at least 1; got 0"),
        ({"cohorts": 13}, ValueError, "cohorts must be at most the 12 facts; got 13"),
        ({"cohorts": 0}, ValueError, "cohorts must be at least 1"),
        ({"seed": 1.5}, TypeError, "seed must be an int"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
        ({"fluency_every": 0}, ValueError, "fluency_every must be at least 1"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1"),
        ({"reference": "base"}, TypeError, "reference must be a model, or what Reference.take"),
        (
            {"suite": ("fluency",), "generation_length": 100},
            ValueError,
            "generation_length=100 from .* takes 100 tokens, but the model has 64 positions",
        ),
        ({"max_new_tokens": 100}, ValueError, "and what is written on.* has 64 positions"),
    ],
)
def test_bad_options(
    pair: tuple[Any, Any], facts: list[Fact], options: dict[str, Any], error: type, says: str
) -> None:
    options = {"facts": facts, **options}
    with pytest.raises(error, match=says):
        evaluate(pair[0], words(), options.pop("facts"), **options)


def test_other_bad_input(pair: tuple[Any, Any], facts: list[Fact]) -> None:
    model, base = pair
    with pytest.raises(ValueError, match="reference is the model itself"):
        evaluate(model, words(), facts, reference=model)
    before = Reference.take(base, words(), facts[:3])
    with pytest.raises(ValueError, match="the reference holds nothing of the neighbourhood prompt"):
        evaluate(model, words(), facts, reference=before)
    with pytest.raises(ValueError, match="no fact has a neighbourhood"):
        Reference.take(base, words(), [Fact("{}", "kab", "kad")])
    long = Fact(" ".join(["{}", *MADE_UP, "kab"]), "kad", "kaf")
    with pytest.raises(ValueError, match=r"kad kab .* takes 65 tokens, but the model has 64"):
        evaluate(model, words(), [long], ("acc",))
    slow = words()
    slow.__class__ = type("Slow", (PreTrainedTokenizerFast,), {"is_fast": False})
    with pytest.raises(TypeError, match="Slow gives no offsets"):
        evaluate(model, slow, facts)


def test_nan_is_no_score(facts: list[Fact]) -> None:
    model = llama(3)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(NonFiniteError, match=r"logits after '.*' are NaN: the edit, or what came"):
        evaluate(model, words(), facts)
    with pytest.raises(NonFiniteError, match="there is nothing to compare an edit with"):
        Reference.take(model, words(), facts)


# --- the plan of rows ---------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple), max_size=20))
def test_rows_cover_those_that_begin_them(rows: list[tuple[int, ...]]) -> None:
    kept, where = cover(rows)
    for row, i in zip(rows, where, strict=True):
        assert kept[i][: len(row)] == row
    assert set(kept) <= set(rows)
    for a in kept:  # none is another's beginning, so no fewer do
        assert sum(b[: len(a)] == a for b in kept) == 1


def test_targets_of_a_prompt_share_its_row(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    seen: list[tuple[int, ...]] = []
    hook = model.model.register_forward_pre_hook(
        lambda _, args, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    fact = Fact("kab {} kad", "lob", "mib", target_true="mid", neighbourhood=("nub nud",))
    evaluate(model, words(), [fact], ("es", "ns"))
    hook.remove()
    assert seen == [(2, 3)]  # the last token of a target is not read


# --- the report ---------------------------------------------------------------------------------


def test_means_counts_and_score(report: Report, facts: list[Fact]) -> None:
    for name in report.metrics:
        values = [row[name] for row in report.rows if name in row]
        assert report.mean(name) == pytest.approx(np.mean(values))
        assert report.count(name) == len(values)
    assert report.count("ps") == sum(bool(f.paraphrases) for f in facts) < len(facts)
    es, ps, ns = (report.mean(name) for name in ("es", "ps", "ns"))
    assert report.score == pytest.approx(3 / (1 / es + 1 / ps + 1 / ns))
    assert report.names[0] == "score"
    assert report.absent == {}
    zero = Report([{"id": "a", "cohort": 0, "es": 1.0, "ps": 0.0, "ns": 1.0}], ("es", "ps", "ns"))
    assert zero.score == 0.0


def test_cohorts_are_by_age(report: Report, facts: list[Fact]) -> None:
    assert [row["cohort"] for row in report.rows] == [0] * 4 + [1] * 4 + [2] * 4
    assert [row["id"] for row in report.rows] == [f.id for f in facts]
    assert report.mean("em", 0) == pytest.approx(np.mean([r["em"] for r in report.rows[:4]]))
    assert list(report.values("em", 1)) == ["f4", "f5", "f6", "f7"]
    lines = report.table().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("cohort"))
    assert lines[at + 1].startswith("1 (oldest)")
    assert lines[at + 3].startswith("3 (newest)")
    assert lines[at + 4].startswith("all")
    assert f"{report.mean('es', 2):.3f}" in lines[at + 3]
    with pytest.raises(ValueError, match="cohort must be below 3; got 3"):
        report.mean("es", 3)


def test_intervals(report: Report) -> None:
    low, high = report.interval("em")
    assert low < report.mean("em") < high
    values = list(report.values("em").values())
    means = np.random.default_rng(7).choice(values, (20_000, len(values))).mean(1)
    assert (low, high) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.15 * (high - low))
    low, high = report.interval("score")
    assert low < report.score < high
    constant = Report([{"id": str(i), "cohort": 0, "es": 1.0} for i in range(5)], ("es",))
    assert constant.interval("es") == (1.0, 1.0)


def test_a_report_is_kept_in_a_file(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report.to_json(path)
    read = Report.from_json(path)
    assert read == report
    assert read.table() == report.table()
    assert read.interval("score") == report.interval("score")
    content = json.loads(path.read_text())
    assert content["summary"]["es"]["facts"] == 12
    assert content["summary"]["es"]["mean"] == report.mean("es")
    for text, says in (
        ("{", "is not JSON"),
        ("[]", "is no report of cl_fast.editing of format 1"),
        (json.dumps(content | {"rows": [{"id": "a"}]}), "is no report of cl_fast.editing: 'coho"),
        (json.dumps({"format": 1}), "is no report of cl_fast.editing: 'rows'"),
    ):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=says):
            Report.from_json(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        Report.from_json(tmp_path / "nowhere.json")


def test_tables_for_people(report: Report) -> None:
    assert str(report) == report.table()
    assert report.markdown().startswith(
        "| metric | mean | 95 % interval | facts |\n|---|---|---|---"
    )
    few = Report([{"id": "a", "cohort": 0, "es_acc": 1.0}], ("es_acc",), {"es": "why"})
    text = compared({"before": few, "a|b": report})
    assert text.splitlines()[1].split() == ["before", *["-"] * 8]
    assert f"{report.score:.3f}" in text
    assert "a\\|b" in compared({"a|b": report}, ("es", "em"), "markdown")
    with pytest.raises(ValueError, match="no report has the metric 'x'"):
        compared({"a": report}, ("x",))
    with pytest.raises(ValueError, match="reports is empty"):
        compared({})
