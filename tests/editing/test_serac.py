"""Edits beside the model: who answers a prompt, and that the base model's bits are its own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import context_models
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from cl_fast.editing.evaluation import evaluate
from cl_fast.editing.facts import Fact
from cl_fast.editing.serac import ScopeClassifier, Serac
from cl_fast.errors import CheckpointError, NonFiniteError


@pytest.fixture(scope="module")
def reader() -> context_models.Reader:
    return context_models.reader()


@pytest.fixture(scope="module")
def trained(reader: context_models.Reader) -> Serac:
    """The store is filled by the tests."""
    editor = Serac(reader.model, reader.tokenizer)
    editor.train_scope(reader.facts(14, seed=1), steps=150)
    return editor


def exact(reader: context_models.Reader, **options: Any) -> Serac:
    """In scope is what has the embedding of an edit."""
    return Serac(reader.model, reader.tokenizer, scale=1e4, **options)


def batch(reader: context_models.Reader, texts: list[str], side: str) -> dict[str, Tensor]:
    rows = [reader.tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows)) + 1
    ids, mask = (
        torch.zeros(len(rows), width, dtype=torch.long),
        torch.zeros(len(rows), width).long(),
    )
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def edited_ids(reader: context_models.Reader, fact: Fact, text: str) -> list[int]:
    """The edit and the prompt behind the begin token."""
    whole = f"New Fact: {fact.statement}\nPrompt: {text}"
    return list(reader.tokenizer(whole)["input_ids"])


# --- the classifier ----------------------------------------------------------------------------


def test_similarities_are_those_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    texts, edits = (torch.randn(n, 12, generator=generator) * 3 + 1 for n in (9, 5))
    scope = ScopeClassifier(12, 4, scale=0.3, seed=2)
    scope.measure(torch.cat([texts, edits]))
    found = torch.exp(-scope.exponents(scope(texts), scope(edits))).detach()
    every = torch.cat([texts, edits]).double()
    scaled = (every - every.mean(0)) / (every.std(0, correction=0) * math.sqrt(12))
    e = scaled @ scope.projection.detach().double().T
    for i in range(9):
        for j in range(5):
            expected = math.exp(-0.3 * float((e[i] - e[9 + j]).square().sum()))
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-5)
    rows = scope.projection.detach().double() / math.sqrt(12 / 4)
    torch.testing.assert_close(rows @ rows.T, torch.eye(4).double(), rtol=0, atol=1e-6)
    same = ScopeClassifier(12, 99, seed=2)
    assert same.projection.shape == (12, 12)


def test_the_loss_is_cross_entropy_over_all_pairs(reader: context_models.Reader) -> None:
    facts = reader.facts(5, seed=3)
    # A prompt around one fact that belongs to another one, and one that belongs to two.
    shared = (facts[0].neighbourhood[0], "Una tea")
    facts[1] = Fact("{} likes", "Una", "rum", paraphrases=shared)
    facts[2] = Fact("the drink of {} is", "Una", "gin", paraphrases=("Una tea",))
    editor = Serac(reader.model, reader.tokenizer, rank=6)
    report = editor.train_scope(facts, steps=2, lr=1e-30, held_out=0.0)
    assert editor.scope is not None
    owned: dict[str, set[int]] = {}
    for i, fact in enumerate(facts):
        for text in (fact.text, *fact.paraphrases):
            owned.setdefault(text, set()).add(i)
    texts = [*owned, *{t: None for f in facts for t in f.neighbourhood if t not in owned}]
    with torch.no_grad():
        e = editor.scope(editor.embed(texts)).double()
        edits = editor.scope(editor.embed([fact.text for fact in facts])).double()
        x = editor.scope.log_scale.double().exp() * torch.cdist(e, edits).square()
    labels = torch.tensor(
        [[float(i in owned.get(text, ())) for i in range(len(facts))] for text in texts]
    ).double()
    apart = torch.exp(-x) < 1 - 1e-6
    assert bool((apart | (labels == 1)).all())
    expected = F.binary_cross_entropy(torch.exp(-x), labels, reduction="sum") / len(texts)
    assert report.losses == pytest.approx([float(expected)] * 2, rel=1e-4)


def test_training_finds_the_scope(trained: Serac, reader: context_models.Reader) -> None:
    """On people that the scope was not trained on, too."""
    editor = Serac(reader.model, reader.tokenizer)
    report = editor.train_scope(reader.facts(14, seed=1), steps=150)
    assert report.losses[-1] < 0.2 * report.losses[0]
    assert report.in_scope is not None
    assert report.in_scope >= 0.9
    assert report.out_of_scope == 1.0
    assert report.held_out_in_scope is not None
    assert report.held_out_in_scope >= 0.5
    assert report.held_out_out_of_scope == 1.0
    assert report.threshold == editor.threshold
    again, mine = trained.scope, editor.scope
    assert again is not None
    assert mine is not None
    assert torch.equal(again.projection, mine.projection)
    assert trained.threshold == editor.threshold
    fresh = reader.facts(10, seed=8)
    editor.fit(fresh)
    inside = [name for name, _ in editor.route([t for f in fresh for t in f.paraphrases])]
    outside = [name for name, _ in editor.route([t for f in fresh for t in f.neighbourhood])]
    assert sum(a == f.id for a, f in zip(inside, fresh, strict=True)) >= 8
    assert sum(name is None for name in outside) >= 0.9 * len(outside)


def test_the_threshold_that_is_found_is_the_best(reader: context_models.Reader) -> None:
    facts = reader.facts(12, seed=4)
    editor = Serac(reader.model, reader.tokenizer)
    report = editor.train_scope(facts, steps=3, held_out=0.0)
    editor.fit(facts)
    owners = {t for f in facts for t in (f.text, *f.paraphrases)}
    asked = {t: f.id for f in facts for t in f.paraphrases}
    around = list(dict.fromkeys(t for f in facts for t in f.neighbourhood if t not in owners))

    def parts(threshold: float) -> tuple[float, float]:
        editor.threshold = threshold
        inside = [name for name, _ in editor.route(list(asked))]
        outside = [name for name, _ in editor.route(around)]
        right = [a == b for a, b in zip(inside, asked.values(), strict=True)]
        return sum(right) / len(right), sum(n is None for n in outside) / len(outside)

    best = report.threshold
    ours = parts(best)
    assert (report.in_scope, report.out_of_scope) == pytest.approx(ours)
    assert report.held_out_in_scope is None
    others = [sum(parts(t / 50)) for t in range(1, 50)]
    assert sum(ours) >= max(others) - 1e-12
    assert min(others) < sum(ours)
    fixed = Serac(reader.model, reader.tokenizer, threshold=0.9)
    assert fixed.train_scope(facts, steps=3).threshold == fixed.threshold == 0.9


def test_batches_of_facts_go_through_all(reader: context_models.Reader) -> None:
    editor = Serac(reader.model, reader.tokenizer)
    facts = reader.facts(14, seed=1)
    report = editor.train_scope(facts, steps=150, batch_facts=5)
    assert report.in_scope is not None
    assert report.in_scope >= 0.9


# --- the routes --------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_outside_of_scope_the_bits_are_those_of_the_base(
    side: str, reader: context_models.Reader
) -> None:
    model, facts = reader.model, reader.facts(4)
    editor = exact(reader).fit(facts)
    outside = batch(reader, ["Zoe", "the drink of Val is", "tea milk"], side)
    labels = outside["input_ids"].masked_fill(outside["attention_mask"] == 0, -100)
    with torch.no_grad():
        expected = model(**outside, labels=labels)
        found = editor(**outside, labels=labels)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    mixed = batch(reader, ["Zoe", facts[0].text, "tea milk", facts[2].text], side)
    with torch.no_grad():
        expected, found = model(**mixed), editor(**mixed)
    assert type(found) is type(expected)
    assert torch.equal(found.logits[[0, 2]], expected.logits[[0, 2]])
    assert not torch.equal(found.logits[[1, 3]], expected.logits[[1, 3]])


@pytest.mark.parametrize("side", ["left", "right"])
def test_in_scope_the_logits_are_those_behind_the_edit(
    side: str, reader: context_models.Reader
) -> None:
    """Each row of a mixed batch against a run of its own."""
    model, facts = reader.model, reader.facts(4)
    editor = exact(reader).fit(facts)
    texts = [facts[1].text, "the drink of Val is", facts[3].text, facts[0].text]
    for some in (texts, texts[:1], texts[1:2], [texts[0], texts[2]]):
        given = batch(reader, some, side)
        labels = torch.full_like(given["input_ids"], -100)
        with torch.no_grad():
            found = editor(**given)
        for i, text in enumerate(some):
            attended = given["attention_mask"][i] != 0
            row = found.logits[i, attended]
            fact = next((f for f in facts if f.text == text), None)
            if fact is None:
                continue
            ids = edited_ids(reader, fact, text)
            with torch.no_grad():
                alone = model(torch.tensor([ids])).logits[0]
            torch.testing.assert_close(row, alone[len(ids) - len(row) :], rtol=1e-4, atol=1e-5)
            assert reader.tokenizer.decode(row[-1].argmax()) == fact.target
            assert not found.logits[i, ~attended].any()
        assert bool((labels == -100).all())


def test_a_tokenizer_without_a_begin_token() -> None:
    """And words that it does not know, all of them in the edit."""
    tokenizer = tiny_models.tokenizer()
    torch.manual_seed(1)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=32, initializer_range=0.3)).eval()
    fact = Fact("the {} sat on", "cat", "tree")
    unknown = Fact("who is {}", "he", "dog")
    editor = Serac(model, tokenizer, scale=1e4).fit([fact, unknown])
    given = tokenizer([fact.text, "a dog", unknown.text], padding=True, return_tensors="pt")
    given.pop("token_type_ids", None)
    assert given["attention_mask"][1].tolist() == [0, 0, 1, 1]
    with torch.no_grad():
        found = editor(**given).logits
        assert torch.equal(found[1], model(**given).logits[1])
        for i, about in ((0, fact), (2, unknown)):
            ids = tokenizer(f"New Fact: {about.statement}\nPrompt: {about.text}")["input_ids"]
            alone = model(torch.tensor([ids])).logits[0]
            row = found[i, given["attention_mask"][i] != 0]
            torch.testing.assert_close(row, alone[-len(row) :], rtol=1e-4, atol=1e-5)


def test_labels_tell_where_the_prompt_ends(reader: context_models.Reader) -> None:
    """A wrong answer behind the prompt is no other prompt; the loss is that of the logits."""
    fact, other = reader.facts(2)
    editor = exact(reader).fit([fact])
    given = batch(reader, [f"{fact.text} rum", "Zoe likes gin"], "right")
    labels = torch.full_like(given["input_ids"], -100)
    labels[:, 3] = given["input_ids"][:, 3]
    with torch.no_grad():
        found = editor(**given, labels=labels)
        assert torch.equal(editor(**given).logits, reader.model(**given).logits)
    ids = edited_ids(reader, fact, f"{fact.text} rum")
    with torch.no_grad():
        alone = reader.model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found.logits[0, :4], alone[-4:], rtol=1e-4, atol=1e-5)
    losses = [
        -float(found.logits[i, 2].double().log_softmax(-1)[given["input_ids"][i, 3]])
        for i in range(2)
    ]
    assert float(found.loss) == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert other.id != fact.id


def test_deleted_facts_have_never_been_there(reader: context_models.Reader) -> None:
    facts = reader.facts(6)
    editor = exact(reader).fit(facts[:4])
    given = batch(reader, [f.text for f in facts], "right")
    with torch.no_grad():
        before = editor(**given).logits
        editor.insert(facts[4:])
        assert [n for n, _ in editor.route([f.text for f in facts])] == [f.id for f in facts]
        assert not torch.equal(editor(**given).logits, before)
        editor.delete([f.id for f in facts[4:]])
        assert torch.equal(editor(**given).logits, before)
        editor.delete([f.id for f in facts[:4]])
        assert torch.equal(editor(**given).logits, reader.model(**given).logits)
    assert editor.facts == {}
    assert editor.route(["Ann"]) == [(None, 0.0)]


def test_the_store_is_embedded_once(reader: context_models.Reader) -> None:
    seen: list[str] = []

    def embed(texts: Any) -> Tensor:
        seen.extend(texts)
        return torch.tensor([[float(len(t)), float(sum(map(ord, t)))] for t in texts])

    facts = reader.facts(6)
    editor = exact(reader, embed=embed).fit(facts[:5])
    editor.insert(facts[5:])
    assert seen == [f.text for f in facts]
    given = batch(reader, ["Zoe likes", facts[0].text], "left")
    for _ in range(3):
        seen.clear()
        with torch.no_grad():
            editor(**given)
        assert seen == ["Zoe likes", facts[0].text]
    editor.generate(**given, max_new_tokens=4)
    assert seen[2:] == ["Zoe likes", facts[0].text]
    seen.clear()
    editor.delete([facts[1].id])
    assert seen == []


# --- writing -----------------------------------------------------------------------------------


def test_mixed_batches_write_what_each_writes_alone(
    trained: Serac, reader: context_models.Reader
) -> None:
    facts = reader.facts(6)
    trained.fit(facts)
    texts = [t for f in facts for t in (*f.paraphrases, f.text, *f.neighbourhood[:1])]
    given = batch(reader, texts, "left")
    together = trained.generate(**given, max_new_tokens=3, do_sample=False)
    names = [name for name, _ in trained.route(texts)]
    assert None in names
    assert len(set(names)) > 4
    width = given["input_ids"].size(1)
    assert torch.equal(together[:, :width], given["input_ids"])
    plain = reader.model.generate(**given, max_new_tokens=3, do_sample=False)
    for i, (text, name) in enumerate(zip(texts, names, strict=True)):
        own = batch(reader, [text], "left")
        alone = trained.generate(**own, max_new_tokens=3, do_sample=False)[0]
        alone = alone[own["input_ids"].size(1) :]
        new = together[i, width:]
        assert torch.equal(new[: len(alone)], alone)
        assert not new[len(alone) :].any()
        fact = next((f for f in facts if f.id == name), None)
        if fact is None:
            assert torch.equal(new[: plain.size(1) - width], plain[i, width:])
        else:
            assert reader.tokenizer.decode(new[0]) == fact.target


def test_decoding_with_a_cache_is_the_full_forward(reader: context_models.Reader) -> None:
    """The route is that of the prompt, whatever is written after it."""
    facts = reader.facts(3)
    editor = exact(reader).fit(facts)
    texts = [facts[0].text, "the drink of Zoe is", facts[2].text]
    given = batch(reader, texts, "left")
    written = editor.generate(
        **given, max_new_tokens=4, min_new_tokens=4, do_sample=False
    )  # fmt: skip
    ids, mask = given["input_ids"], given["attention_mask"]
    width = ids.size(1)
    for _ in range(4):
        labels = torch.where(torch.arange(ids.size(1)) < width, -100, ids)
        with torch.no_grad():
            logits = editor(ids, mask, labels=labels).logits[:, -1]
        logits[:, reader.tokenizer.eos_token_id] = -math.inf
        ids = torch.cat([ids, logits.argmax(-1)[:, None]], 1)
        mask = F.pad(mask, (0, 1), value=1)
    assert torch.equal(written, ids)


def test_samples_and_beams_of_the_base_are_its_own(reader: context_models.Reader) -> None:
    facts = reader.facts(3)
    editor = exact(reader).fit(facts)
    given = batch(reader, ["Zoe", facts[0].text, "the drink of Val is"], "left")
    width = given["input_ids"].size(1)
    for how in (
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    ):
        torch.manual_seed(0)
        expected = reader.model.generate(**given, max_new_tokens=3, min_new_tokens=3, **how)
        torch.manual_seed(0)
        found = editor.generate(**given, max_new_tokens=3, min_new_tokens=3, **how)
        assert torch.equal(found[[0, 1, 4, 5]], expected[[0, 1, 4, 5]])
        assert found.shape == expected.shape == (6, width + 3)
        assert torch.equal(found[:, :width], given["input_ids"].repeat_interleave(2, 0))
        words = reader.tokenizer.batch_decode(found[2:4, width : width + 1])
        assert facts[0].target in words


def test_edits_show_in_the_metrics(trained: Serac, reader: context_models.Reader) -> None:
    model, tokenizer, facts = reader.model, reader.tokenizer, reader.facts(10, seed=6)
    before = {n: x.clone() for n, x in model.state_dict().items()}
    trained.fit(facts)
    suite = ["es", "ps", "ns", "greedy"]
    plain = evaluate(model, tokenizer, facts, suite=suite).summary()
    edited = evaluate(model, tokenizer, facts, suite=suite, in_context=trained.before).summary()
    assert plain["es"] <= 0.1
    assert edited["es"] == 1.0
    assert edited["greedy"] >= 0.9
    assert edited["ps"] >= plain["ps"] + 0.6
    assert edited["ns"] >= plain["ns"] - 0.05
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())


def test_a_counterfactual_model_answers_in_scope(reader: context_models.Reader) -> None:
    torch.manual_seed(3)
    small = tiny_models.llama(vocab_size=len(reader.tokenizer), num_hidden_layers=1).eval()
    fact = reader.facts(1)[0]
    editor = exact(reader, counterfactual=small, context=lambda f: f.target + " ").fit([fact])
    given = batch(reader, [fact.text, "Zoe"], "left")
    with torch.no_grad():
        found = editor(**given).logits
        base = reader.model(**given).logits
        ids = reader.tokenizer(f"{fact.target} {fact.text}")["input_ids"]
        alone = small(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found[0, -3:], alone[-3:], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[1], base[1])
    with pytest.raises(ValueError, match="a counterfactual model answers in scope"):
        editor.before(fact.text)
    other = tiny_models.llama(vocab_size=9)
    with pytest.raises(ValueError, match="counterfactual has 9 tokens in its vocabulary"):
        Serac(reader.model, reader.tokenizer, counterfactual=other)


# --- files -------------------------------------------------------------------------------------


def test_a_store_comes_back(trained: Serac, reader: context_models.Reader, tmp_path: Path) -> None:
    facts, path = reader.facts(6, seed=2), tmp_path / "store.safetensors"
    trained.fit(facts).save(path)
    read = Serac.load(path, reader.model, reader.tokenizer)
    assert read.facts == trained.facts
    texts = [t for f in facts for t in (f.text, *f.paraphrases, *f.neighbourhood)]
    assert read.route(texts) == trained.route(texts)
    given = batch(reader, texts, "left")
    with torch.no_grad():
        assert torch.equal(read(**given).logits, trained(**given).logits)
    read.delete([facts[0].id])
    read.insert([facts[0]])
    assert [n for n, _ in read.route(texts)] == [n for n, _ in trained.route(texts)]
    empty = exact(reader)
    empty.save(path)
    assert Serac.load(path, reader.model, reader.tokenizer).route(["Ann"]) == [(None, 0.0)]


def test_a_store_of_another_encoder_is_refused(
    trained: Serac, reader: context_models.Reader, tmp_path: Path
) -> None:
    path = tmp_path / "store.safetensors"
    trained.fit(reader.facts(3)).save(path)
    model, tokenizer = reader.model, reader.tokenizer
    torch.manual_seed(9)
    other = type(model)(model.config)
    for call, words in [
        (lambda: Serac.load(path, other, tokenizer), "another model, encoder or layer"),
        (lambda: Serac.load(path, model, tokenizer, layer=2), "another model, encoder or layer"),
        (lambda: Serac.load(path, model, tokenizer, embed=lambda t: torch.ones(len(t), 3)),
         "another model, encoder or layer"),
        (lambda: Serac.load(path, model, tokenizer, context=str), "give the same function"),
        (lambda: Serac.load(tmp_path / "none", model, tokenizer), "none"),
    ]:  # fmt: skip
        with pytest.raises(CheckpointError, match=words):
            call()
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not those that were saved"):
        Serac.load(path, model, tokenizer)


# --- bad input ---------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rank": 0}, ValueError, "rank must be at least 1"),
    ({"scale": -1.0}, ValueError, "scale must be positive"),
    ({"threshold": 1.0}, ValueError, r"threshold must be in \[0, 1\)"),
    ({"threshold": 0}, ValueError, "threshold must be positive"),
    ({"threshold": "best"}, TypeError, "threshold must be a number"),
    ({"seed": "a"}, TypeError, "seed must be an int"),
    ({"layer": 7}, ValueError, r"layer must be in \[0, 2\]"),
    ({"pooling": "first"}, ValueError, "pooling must be one of"),
    ({"embed": len, "pooling": "mean"}, ValueError, "layer and pooling are of the default"),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD)
def test_bad_options(
    options: dict[str, Any], error: type[Exception], words: str, reader: context_models.Reader
) -> None:
    with pytest.raises(error, match=words):
        Serac(reader.model, reader.tokenizer, **options)


def test_bad_training_leaves_the_scope(trained: Serac, reader: context_models.Reader) -> None:
    facts = reader.facts(4)
    trained.fit(facts)
    before, threshold = trained.scope, trained.threshold
    bare = [Fact("{} likes", f.subject, f.target) for f in facts]
    asked = [Fact("{} likes", f.subject, f.target, paraphrases=f.paraphrases) for f in facts]
    own = [
        Fact("{} likes", f.subject, f.target, paraphrases=f.paraphrases, neighbourhood=(g.text,))
        for f, g in zip(facts, facts[::-1], strict=True)
    ]
    nan = Serac(
        reader.model, reader.tokenizer, embed=lambda texts: torch.full((len(texts), 2), math.inf)
    )
    for call, error, words in [
        (lambda: trained.train_scope([]), ValueError, "facts is empty"),
        (lambda: trained.train_scope(bare), ValueError, "no fact has paraphrases"),
        (lambda: trained.train_scope(asked), ValueError, "no neighbourhood has a prompt"),
        (lambda: trained.train_scope(own), ValueError, "belongs to none of the facts"),
        (lambda: trained.train_scope(facts[:1]), ValueError, "at least 2 facts are needed"),
        (lambda: trained.train_scope(facts, steps=0), ValueError, "steps must be at least 1"),
        (lambda: trained.train_scope(facts, lr=0), ValueError, "lr must be positive"),
        (lambda: trained.train_scope(facts, lr=1e30), NonFiniteError, "the loss of the scope"),
        (lambda: trained.train_scope(facts, held_out=1), ValueError, "held_out must be in"),
        (lambda: trained.train_scope(facts, batch_facts=0), ValueError, "batch_facts must be"),
        (lambda: nan.train_scope(facts), NonFiniteError, "holds NaN or infinity"),
        (lambda: trained.insert([facts[0]]), ValueError, "there twice"),
        (lambda: trained.delete(["nobody"]), ValueError, "no fact with the id 'nobody'"),
        (lambda: trained.route("Ann"), TypeError, "texts must be a list of strings"),
    ]:  # fmt: skip
        with pytest.raises(error, match=words):
            call()
    assert trained.scope is before
    assert trained.threshold == threshold
    assert list(trained.facts) == [f.id for f in facts]


def test_bad_inputs(reader: context_models.Reader) -> None:
    fact = reader.facts(1)[0]
    untrained = Serac(reader.model, reader.tokenizer).fit([fact])
    editor = exact(reader).fit([fact])
    given = batch(reader, [fact.text, "the drink of Zoe is"], "left")
    right = batch(reader, [fact.text, "the drink of Zoe is"], "right")
    ids, mask = given["input_ids"], given["attention_mask"]
    bos = torch.full((1, 2), reader.tokenizer.bos_token_id)
    cases: list[tuple[Any, str]] = [
        (lambda: untrained(ids, mask), "the scope of edits is not known yet: train_scope"),
        (lambda: untrained.route(["Ann"]), "the scope of edits is not known yet"),
        (lambda: editor(ids[0]), r"input_ids must be tokens \[batch, length\]"),
        (lambda: editor([1, 2]), "input_ids must be tokens"),
        (lambda: editor(ids, mask[:1]), "attention_mask must have the shape of input_ids"),
        (lambda: editor(ids, mask, labels=ids[:, 1:]), "labels must have the shape"),
        (lambda: editor(ids, mask, use_cache=True), "use_cache must be False"),
        (lambda: editor(bos), "row 0 of input_ids holds no text"),
        (lambda: editor.generate(ids, mask, max_new_tokens=0), "max_new_tokens must be at least"),
        (lambda: editor.generate(ids, max_new_tokens=2), "give attention_mask, too"),
        (lambda: editor.generate(**right, max_new_tokens=2), "padded at the left"),
        (lambda: editor.generate(ids, mask, max_new_tokens=2, max_length=9), "max_length cannot"),
        (lambda: editor.generate(ids, mask, max_new_tokens=2, return_dict_in_generate=True),
         "return_dict_in_generate cannot be served"),
        (lambda: editor.generate(ids, mask, max_new_tokens=300), "more than the 256 positions"),
    ]  # fmt: skip
    for call, words in cases:
        with torch.no_grad(), pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="max_new_tokens"):
        editor.generate(ids, mask)  # type: ignore[call-arg]
