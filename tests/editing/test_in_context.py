"""Facts in the context: which are found, how they are told, and what the model makes of them."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import context_models
import numpy as np
import pytest
import tiny_models
import torch
from torch import Tensor

from cl_fast.editing.evaluation import evaluate
from cl_fast.editing.facts import Fact
from cl_fast.editing.retrieval import InContext, TextEmbedding
from cl_fast.errors import NonFiniteError


def by_number(texts: Any) -> Tensor:
    """A text with the number n in it points at the angle n / 100."""
    angles = [int("".join(filter(str.isdigit, text)) or 0) / 100 for text in texts]
    return torch.tensor([[np.cos(a), np.sin(a)] for a in angles], dtype=torch.float64)


def fact(n: int, **others: Any) -> Fact:
    return Fact("{} is", f"x{n}", f"t{n}", id=str(n), target_true=f"o{n}", **others)


def whole(n: int) -> Fact:
    """A fact that can demonstrate all kinds."""
    return fact(
        n, paraphrases=(f"say x{n} :", f"call x{n}"), neighbourhood=(f"y{n} is", f"z{n} is")
    )


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_models.llama().eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_models.tokenizer()


@pytest.fixture(scope="module")
def reader() -> context_models.Reader:
    return context_models.reader()


# --- embeddings --------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_hidden_states_of_the_texts(
    pooling: Any, reader: context_models.Reader
) -> None:
    texts = ["Ann likes", "the drink of Bob is", "Cid", "the drink of Dee is tea"]
    model, tokenizer = reader.model, reader.tokenizer
    for layer in (0, 2):
        embed = TextEmbedding(model, tokenizer, layer=layer, pooling=pooling, batch_size=3)
        found = embed(texts)
        for text, row in zip(texts, found, strict=True):
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            assert ids[0, 0] == tokenizer.bos_token_id
            with torch.no_grad():
                states = model(ids, output_hidden_states=True).hidden_states
            # The last of transformers' states is that after the final norm.
            state = states[layer + 1][0, 1:] if layer < 2 else None
            if state is None:
                taken: list[Tensor] = []
                hook = model.model.layers[2].register_forward_hook(
                    lambda _, __, out, taken=taken: taken.append(out)
                )
                with torch.no_grad():
                    model(ids)
                hook.remove()
                state = taken[0][0, 1:]
            expected = state[-1] if pooling == "last" else state.double().mean(0)
            torch.testing.assert_close(row.double(), expected.double(), rtol=1e-5, atol=1e-6)
    assert TextEmbedding(model, tokenizer).layer == 1


def test_only_the_blocks_below_work(model: Any, tokenizer: Any) -> None:
    called = []
    hooks = [
        block.self_attn.register_forward_hook(lambda *_, i=i: called.append(i))
        for i, block in enumerate(model.model.layers)
    ]
    TextEmbedding(model, tokenizer, layer=0)(["the cat", "a dog sat"])
    for hook in hooks:
        hook.remove()
    assert called == [0]


# --- retrieval ---------------------------------------------------------------------------------


def test_the_nearest_by_cosine_are_found(model: Any, tokenizer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    facts = [fact(n) for n in range(40)]
    vectors = {f.text: torch.randn(7, generator=generator) for f in facts}
    queries = {f"q{i}": torch.randn(7, generator=generator) for i in range(10)}
    known = vectors | queries
    editor = InContext(
        model, tokenizer, embed=lambda texts: torch.stack([known[t] for t in texts]), retrieved=3,
        demonstrations=0,
    ).fit(facts)  # fmt: skip
    for text, query in queries.items():
        q = query.double().numpy()
        cosines = {
            f.id: float(q @ v / np.linalg.norm(q) / np.linalg.norm(v))
            for f in facts
            for v in [vectors[f.text].double().numpy()]
        }
        expected = sorted(cosines, key=cosines.__getitem__, reverse=True)[:3]
        found = editor.explain(text)["facts"]
        assert [name for name, _ in found] == expected
        assert [c for _, c in found] == pytest.approx([cosines[n] for n in expected], abs=1e-6)
        told = "".join(f"New Fact: x{n} is t{n}\n" for n in reversed(expected))
        assert editor.prompt(text) == f"{told}Prompt: {text}"
        assert editor.before(text) + text == editor.prompt(text)


def test_of_equals_the_earlier_one_is_found(model: Any, tokenizer: Any) -> None:
    facts = [fact(3), fact(1), fact(2)]
    editor = InContext(model, tokenizer, embed=lambda texts: torch.ones(len(texts), 2)).fit(facts)
    assert editor.explain("anything")["facts"][0][0] == "3"


def test_prompts_are_in_the_format_of_the_paper(model: Any, tokenizer: Any) -> None:
    corpus = [whole(n) for n in (10, 20, 30, 40)]
    editor = InContext(
        model, tokenizer, embed=by_number, demonstrations=4, corpus=corpus, seed=1
    ).fit([fact(1)])  # fmt: skip
    assert Counter(editor.kinds) == {"update": 2, "retain": 2}
    shown = []
    for n, kind in zip((10, 20, 30, 40), editor.kinds, strict=True):
        draw = random.Random(f"1 {n}")
        if kind == "update":
            answered = draw.choice([f"say x{n} :", f"call x{n}"]) + f" t{n}"
        else:
            answered = draw.choice([f"y{n} is", f"z{n} is"]) + f" o{n}"
        shown.append(f"New Fact: x{n} is t{n}\nPrompt: {answered}\n\n")
    end = "New Fact: x1 is t1\nPrompt: what is x2?"
    assert editor.prompt("what is x2?") == "".join(reversed(shown)) + end


def test_demonstrations_are_in_the_proportion_of_the_paper(model: Any, tokenizer: Any) -> None:
    facts = [whole(n) for n in range(1, 61)]
    editor = InContext(model, tokenizer, embed=by_number).fit(facts)
    told = editor.explain("x5")
    assert told["demonstrations"] == {"copy": 4, "update": 12, "retain": 16}
    *blocks, last = editor.prompt("x5").split("\n\n")
    assert last == "New Fact: x5 is t5\nPrompt: x5"
    counts: Counter[str] = Counter()
    order = []
    for block in blocks:
        new, asked = block.split("\n")
        n = int("".join(filter(str.isdigit, new.split(" is ")[0])))
        order.append(n)
        assert new == f"New Fact: x{n} is t{n}"
        kinds = {
            "copy": [f"x{n} is t{n}"],
            "update": [f"say x{n} : t{n}", f"call x{n} t{n}"],
            "retain": [f"y{n} is o{n}", f"z{n} is o{n}"],
        }
        counts[next(k for k, v in kinds.items() if asked.removeprefix("Prompt: ") in v)] += 1
    assert counts == {"copy": 4, "update": 12, "retain": 16}
    # The 32 nearest to 5 but for 5 itself, the nearest last.
    assert set(order) == set(range(1, 34)) - {5}
    assert [abs(n - 5) for n in order] == sorted((abs(n - 5) for n in order), reverse=True)
    shuffled = InContext(model, tokenizer, embed=by_number, seed=1).fit(facts)
    assert Counter(shuffled.kinds) == Counter(editor.kinds)
    assert shuffled.kinds != editor.kinds


def test_a_fact_shows_only_what_it_can(model: Any, tokenizer: Any) -> None:
    facts = [fact(n) for n in range(20)]
    editor = InContext(model, tokenizer, embed=by_number, demonstrations=16).fit(facts)
    assert editor.explain("x0")["demonstrations"] == {"copy": 2, "update": 0, "retain": 0}
    unanswered = Fact("{} is", "x50", "t", neighbourhood=("y50 is",))
    editor.insert([unanswered, fact(51, paraphrases=("call x51",))])
    assert editor.explain("x0")["demonstrations"] == {"copy": 2, "update": 1, "retain": 0}


def test_a_threshold_leaves_other_prompts_alone(model: Any, tokenizer: Any) -> None:
    editor = InContext(
        model, tokenizer, embed=by_number, threshold=0.9, retrieved=2, demonstrations=0
    ).fit([fact(10), fact(90)])  # fmt: skip
    assert editor.prompt("x12 and") == "New Fact: x10 is t10\nPrompt: x12 and"
    both = "New Fact: x90 is t90\nNew Fact: x10 is t10\nPrompt: x49 and"
    assert editor.prompt("x49 and") == both
    assert editor.prompt("x200 and") == "x200 and"
    assert editor.before("x200 and") == ""
    assert editor.explain("x200")["facts"] == []


def test_the_store_is_what_is_in_it(model: Any, tokenizer: Any) -> None:
    """Insert and delete against stores that were made of the facts that are left."""
    facts = [whole(n) for n in range(0, 60, 3)]
    texts = [f"x{n}" for n in range(0, 70, 7)]
    count = [0]

    def embed(some: Any) -> Tensor:
        count[0] += len(some)
        return by_number(some)

    def store() -> InContext:
        return InContext(model, tokenizer, embed=embed, demonstrations=8, batch_size=4)

    whole_store = store().fit(facts)
    expected = whole_store.prompts(texts)
    grown = store().fit(facts[:7])
    grown.insert(facts[7:])
    assert grown.prompts(texts) == expected
    more = fact(1000)
    grown.insert([more])
    assert grown.prompts(["x1000"]) != whole_store.prompts(["x1000"])
    grown.delete([more.id])
    assert grown.prompts([*texts, "x1000"]) == whole_store.prompts([*texts, "x1000"])
    grown.delete([f.id for f in facts[::2]])
    assert grown.prompts(texts) == store().fit(facts[1::2]).prompts(texts)
    assert list(grown.facts) == [f.id for f in facts[1::2]]
    before = count[0]
    grown.delete(list(grown.facts))
    assert grown.prompts(texts) == texts
    assert count[0] == before


# --- with a model ------------------------------------------------------------------------------


def test_a_model_that_reads_believes_the_facts(reader: context_models.Reader) -> None:
    facts = reader.facts(12)
    model, tokenizer = reader.model, reader.tokenizer
    before = {n: x.clone() for n, x in model.state_dict().items()}
    editor = InContext(model, tokenizer, demonstrations=0).fit(facts)
    suite = ["es", "ps", "greedy"]
    plain = evaluate(model, tokenizer, facts, suite=suite).summary()
    edited = evaluate(model, tokenizer, facts, suite=suite, in_context=editor.before).summary()
    assert plain["es"] <= 0.1
    assert plain["greedy"] <= 0.1
    assert edited["es"] >= 0.9
    assert edited["greedy"] >= 0.9
    assert edited["ps"] >= plain["ps"] + 0.6
    assert editor.generate([f.text for f in facts[:5]], max_new_tokens=1, do_sample=False) == [
        f.target for f in facts[:5]
    ]
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())


def test_generate_is_that_of_the_model(reader: context_models.Reader) -> None:
    """Texts of different lengths together, against one after the other by hand."""
    model, tokenizer, facts = reader.model, reader.tokenizer, reader.facts(6)
    editor = InContext(model, tokenizer, demonstrations=3, batch_size=2).fit(facts)
    texts = [facts[0].text, *facts[1].paraphrases, "Zoe", "New"]
    written = editor.generate(texts, max_new_tokens=4, do_sample=False)
    model.train()
    assert editor.generate(texts, max_new_tokens=4, do_sample=False) == written
    assert model.training
    model.eval()
    for text, ours in zip(texts, written, strict=True):
        ids = torch.tensor([tokenizer(editor.prompt(text))["input_ids"]])
        out = model.generate(ids, max_new_tokens=4, do_sample=False)
        theirs = tokenizer.decode(out[0, ids.size(1) :], skip_special_tokens=True)
        assert ours == theirs


def test_the_global_random_state_is_left(model: Any, tokenizer: Any) -> None:
    torch.manual_seed(0)
    random.seed(0)
    states = torch.random.get_rng_state(), random.getstate()
    made = [
        InContext(model, tokenizer, embed=by_number).fit([whole(n) for n in range(9)]).prompt("x1")
        for _ in range(2)
    ]
    assert made[0] == made[1]
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]


# --- bad input ---------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"retrieved": 0}, ValueError, "retrieved must be at least 1"),
    ({"demonstrations": -1}, ValueError, "demonstrations must be at least 0"),
    ({"threshold": 1.5}, ValueError, r"threshold must be a cosine in \[-1, 1\]"),
    ({"threshold": "high"}, ValueError, "threshold must be a cosine"),
    ({"seed": None}, TypeError, "seed must be an int"),
    ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    ({"layer": 9}, ValueError, r"layer must be in \[0, 1\]"),
    ({"pooling": "max"}, ValueError, "pooling must be one of 'last', 'mean'"),
    ({"embed": by_number, "layer": 1}, ValueError, "layer and pooling are of the default"),
    ({"embed": by_number, "pooling": "mean"}, ValueError, "layer and pooling are of the default"),
    ({"embed": by_number, "corpus": []}, ValueError, "facts is empty"),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD)
def test_bad_options(
    options: dict[str, Any], error: type[Exception], words: str, model: Any, tokenizer: Any
) -> None:
    with pytest.raises(error, match=words):
        InContext(model, tokenizer, **options)


WRONG: list[tuple[Any, type[Exception], str]] = [
    (lambda texts: torch.ones(len(texts)), ValueError, r"embed must give \[2, d\] numbers"),
    (lambda texts: torch.ones(1, 3), ValueError, "for 2 texts; got the shape"),
    (lambda texts: torch.ones(len(texts), 0), ValueError, "embed must give"),
    (lambda texts: torch.ones(len(texts), 3).long(), TypeError, "floating point numbers"),
    (lambda texts: torch.full((len(texts), 3), torch.nan), NonFiniteError, "'x1 is' holds NaN"),
]


@pytest.mark.parametrize(("embed", "error", "words"), WRONG)
def test_wrong_embeddings(
    embed: Any, error: type[Exception], words: str, model: Any, tokenizer: Any
) -> None:
    with pytest.raises(error, match=words):
        InContext(model, tokenizer, embed=embed).fit([fact(1), fact(2)])


def test_bad_facts_and_texts_change_nothing(model: Any, tokenizer: Any) -> None:
    editor = InContext(model, tokenizer, embed=by_number, demonstrations=0).fit([fact(1), fact(2)])
    other = Fact("{} is", "x1", "another", id="other")
    for call, error, words in [
        (lambda: editor.insert([fact(3), fact(1)]), ValueError, "there twice"),
        (lambda: editor.insert([other]), ValueError, "contradict each other"),
        (lambda: editor.insert([]), ValueError, "facts is empty"),
        (lambda: editor.insert(["a"]), TypeError, "must be a Fact"),
        (lambda: editor.fit([]), ValueError, "facts is empty"),
        (lambda: editor.delete(["1", "9"]), ValueError, "no fact with the id '9'"),
        (lambda: editor.delete("1"), TypeError, "must be a list of ids"),
        (lambda: editor.prompts("x1"), TypeError, "texts must be a list of strings"),
        (lambda: editor.prompts(["x1", " "]), ValueError, r"texts\[1\] must be a string that is"),
        (lambda: editor.prompt(3), ValueError, r"texts\[0\] must be a string"),
        (lambda: editor.generate(["x1"], max_new_tokens=0), ValueError, "max_new_tokens must be"),
        (lambda: editor.generate(["x1"], num_return_sequences=2, do_sample=True), ValueError,
         "one row of tokens for each text"),
        (lambda: editor.generate(["x1 " * 60]), ValueError, "more than the 64 positions"),
    ]:  # fmt: skip
        with pytest.raises(error, match=words):
            call()
    assert list(editor.facts) == ["1", "2"]
    assert editor.prompt("x1") == "New Fact: x1 is t1\nPrompt: x1"


def test_a_text_without_tokens_is_named(reader: context_models.Reader) -> None:
    embed = TextEmbedding(reader.model, reader.tokenizer)
    with pytest.raises(ValueError, match="text 1, '', has no token"):
        embed(["Ann", ""])
