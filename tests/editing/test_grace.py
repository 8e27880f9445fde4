"""GRACE: the rule table, the codebook that any facts leave, its values, and the model around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fact_models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_cases import asked, check_decoding, check_padding, hooks, logits, same
from torch import Tensor, nn

from cl_fast.editing import grace as module
from cl_fast.editing.facts import Fact
from cl_fast.editing.grace import SLACK, Grace, rule
from cl_fast.editing.store import FactStore
from cl_fast.errors import CheckpointError, NonFiniteError, OutputError
from cl_fast.losses.cache import model_fingerprint


@pytest.fixture(scope="module")
def made() -> fact_models.FactModel:
    return fact_models.fact_model(0)


@pytest.fixture(scope="module")
def facts(made: fact_models.FactModel) -> list[Fact]:
    """Of one-token targets, about people whose last name nobody else has."""
    lasts = [person.split()[1] for person in made.world.people]
    return [
        fact
        for fact in made.world.edits(40, seed=0)
        if " " not in fact.target and lasts.count(fact.subject.split()[1]) == 1
    ][:12]


def new(made: Any, **options: Any) -> Grace:
    return Grace(made.model, made.tokenizer, **({"layer": 2, "eps": 1.0, "steps": 30} | options))


# --- the rule ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distance", "radius", "same_label", "want"),
    [
        (None, 0.0, False, ("add", 0.0, 1.0)),
        (2.1, 1.0, False, ("add", 1.0, 1.0)),
        (2.1, 1.0, True, ("add", 1.0, 1.0)),
        (2.6, 1.5, True, ("add", 1.5, 1.0)),
        (2.0, 1.0, False, ("split", 1.0 - 1e-5, 1.0)),  # not beyond: the balls would touch
        (1.2, 1.0, False, ("split", 0.6 - 1e-5, 0.6)),
        (0.3, 1.0, False, ("split", 0.15 - 1e-5, 0.15)),
        (0.0, 1.0, False, ("split", -1e-5, 0.0)),
        (2.0, 1.0, True, ("cover", 2.0, None)),
        (1.2, 1.0, True, ("cover", 1.2, None)),
        (1.0, 1.0, True, ("inside", 1.0, None)),
        (0.3, 1.0, True, ("inside", 1.0, None)),
        (0.0, 0.0, True, ("inside", 0.0, None)),
    ],
)
def test_rule(distance: float | None, radius: float, same_label: bool, want: Any) -> None:
    assert rule(distance, radius, same_label, 1.0) == want


class Points:
    """Facts whose keys are points of a line, and whose values need no search."""

    def __init__(self, made: fact_models.FactModel, monkeypatch: Any, eps: float = 1.0) -> None:
        self.made, self.places = made, {}
        monkeypatch.setattr(Grace, "_with_keys", lambda _, facts: [self.edit(f) for f in facts])
        monkeypatch.setattr(Grace, "_find_values", lambda _, fs: [(self.value(f), 0.0) for f in fs])
        self.eps = eps

    def fact(self, place: float, label: str) -> Fact:
        fact = Fact("{} lives in", f"p{len(self.places)}", label, id=f"p{len(self.places)}")
        self.places[fact.id] = place
        return fact

    def value(self, fact: Fact) -> Tensor:
        return torch.full((64,), float(fact.id[1:]))

    def edit(self, fact: Fact) -> Any:
        key = torch.zeros(256)
        key[3] = self.places[fact.id]
        return module._Edit(fact, key)

    def codebook(self) -> Grace:
        return new(self.made, eps=self.eps)


def by_hand(points: list[tuple[str, float, str]], eps: float) -> list[list[Any]]:
    """[place, radius, label, ids] of each key, as the paper's table has it."""
    keys: list[list[Any]] = []
    for name, place, label in points:
        near = min(keys, key=lambda key: abs(key[0] - place), default=None)
        if near is None or abs(near[0] - place) > eps + near[1]:
            keys.append([place, eps, label, [name]])
            continue
        d = abs(near[0] - place)
        if near[2] != label:
            near[1] = d / 2 - 1e-5
            keys.append([place, d / 2, label, [name]])
        else:
            near[1] = max(near[1], d)
            near[3].append(name)
    return keys


MODEL = fact_models.FactModel(
    fact_models.untrained_model(fact_models.World(3, people=40), 3, "llama").eval(),
    fact_models.World(3, people=40).tokenizer(True),
    fact_models.World(3, people=40),
)


@settings(max_examples=40)
@given(data=st.data())
def test_any_order_of_facts_and_deletions(data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "model_fingerprint", lambda model: "")
        points = Points(MODEL, monkeypatch)
        codebook = points.codebook()
        left: list[Fact] = []
        for _ in range(data.draw(st.integers(1, 8))):
            if left and data.draw(st.booleans()):
                gone = data.draw(st.lists(st.sampled_from(left), min_size=1, unique=True))
                codebook.delete([fact.id for fact in gone])
                left = [fact for fact in left if fact not in gone]
            else:
                some = [
                    points.fact(
                        data.draw(st.integers(-12, 12)) / 4, data.draw(st.sampled_from("ab"))
                    )
                    for _ in range(data.draw(st.integers(1, 3)))
                ]
                codebook.insert(some)
                left += some
        want = by_hand([(f.id, points.places[f.id], f.target) for f in left], 1.0)
        assert codebook.ids == [fact.id for fact in left]
        found = [(list(k.ids), k.label, k.radius) for k in codebook.codebook]
        assert found == [(ids, label, pytest.approx(r)) for _, r, label, ids in want]
        keys = (codebook._keys + codebook._centre)[:, 3].tolist()
        assert keys == pytest.approx([key[0] for key in want], abs=1e-5)
        assert codebook._values[:, 0].tolist() == [float(key[3][0][1:]) for key in want]
        # and who answers along the line
        line = torch.zeros(101, 256)
        line[:, 3] = torch.linspace(-4.013, 4.017, 101)
        within, index, distance = codebook._look_up(line)
        for place, inside, at, d in zip(
            line[:, 3].tolist(), within.tolist(), index.tolist(), distance.tolist(), strict=True
        ):
            gaps = [abs(key[0] - place) for key in want]
            if not gaps:
                assert (inside, at) == (False, -1)
                continue
            assert d == pytest.approx(min(gaps), abs=1e-5)
            assert gaps[at] == pytest.approx(min(gaps), abs=1e-4)
            limit = want[at][1]
            if abs(d - limit) > SLACK * abs(limit) + 1e-4:
                assert inside == (d <= limit)


def test_distances_between_large_vectors(
    made: fact_models.FactModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys far from the origin and near one another: the nearest is found by small differences."""
    points = Points(made, monkeypatch, eps=0.01)
    facts = [points.fact(1000 + i / 16, "ab"[i % 2]) for i in range(20)]
    codebook = points.codebook().fit(facts)
    assert len(codebook.codebook) == 20
    queries = torch.zeros(20, 256)
    queries[:, 3] = torch.arange(20) / 16 + 1000 + 1 / 256
    within, index, distance = codebook._look_up(queries)
    assert index.tolist() == list(range(20))
    assert bool(within.all())
    torch.testing.assert_close(distance, torch.full((20,), 1 / 256), rtol=1e-3, atol=0)


# --- values ------------------------------------------------------------------------------------


def test_edits_hold_and_the_rest_keeps_its_bits(
    made: fact_models.FactModel, facts: list[Fact]
) -> None:
    before = model_fingerprint(made.model)
    others = [text for fact in facts for text in fact.neighbourhood]
    unedited = logits(made, others)
    codebook = new(made).fit(facts)
    told = codebook.report()
    with codebook:
        edited = logits(made, others)
        for fact in facts:
            found = logits(made, [fact.text])[0][-1].log_softmax(-1)
            answer = made.tokenizer(fact.target, add_special_tokens=False)["input_ids"]
            loss = told["edits"][fact.id]["loss"]
            if loss is not None:
                assert -float(found[answer[0]]) == pytest.approx(loss, rel=1e-3, abs=1e-4)
                assert int(found.argmax()) == answer[0]
    quiet = [not hits for hits in codebook.within(others)]
    assert sum(quiet) >= 0.9 * len(others)
    for is_quiet, a, b in zip(quiet, unedited, edited, strict=True):
        assert torch.equal(a, b) or not is_quiet
    assert told["keys"] == sum(e["action"] in ("add", "split") for e in told["edits"].values()) > 5
    assert same(logits(made, others), unedited)
    assert model_fingerprint(made.model) == before


@pytest.mark.parametrize("init", ["cold", "warm"])
@pytest.mark.parametrize("layer", [1, 3])
def test_values_as_a_loop_over_facts_finds_them(
    made: fact_models.FactModel, facts: list[Fact], layer: int, init: Any
) -> None:
    """One fact at a time through the whole model, with torch's own Adam and cross entropy."""
    codebook = new(made, layer=layer, steps=4, init=init, lr=0.3, eps=1e-3).fit(facts[:3])
    down = codebook._site.module
    for fact, value in zip(facts, codebook._values, strict=False):
        ids = torch.tensor([made.tokenizer(fact.statement)["input_ids"]])
        at = len(made.tokenizer(fact.text)["input_ids"]) - 1
        outputs: list[Tensor] = []
        hook = down.register_forward_hook(lambda _, __, out, o=outputs: o.append(out.detach()))
        with torch.no_grad():
            made.model(input_ids=ids)
        hook.remove()
        start = codebook._cold(fact) if init == "cold" else outputs[0][0, at]
        found = start.clone().requires_grad_()

        def put(_: Any, __: Any, out: Tensor, at: int = at, found: Tensor = found) -> Tensor:
            return torch.cat([out[:, :at], found[None, None], out[:, at + 1 :]], 1)

        hook = down.register_forward_hook(put)
        adam = torch.optim.Adam([found], lr=0.3)
        for _ in range(4):
            scores = made.model(input_ids=ids).logits[0, at:-1]
            (found.grad,) = torch.autograd.grad(
                nn.functional.cross_entropy(scores, ids[0, at + 1 :]), found
            )
            adam.step()
        hook.remove()
        torch.testing.assert_close(value, found.detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_replaced(family: Any, dtype: torch.dtype) -> None:
    """At the prompts' last tokens, and nowhere else, the layer gives the value."""
    world = fact_models.World(3, people=40)
    bare = fact_models.FactModel(
        fact_models.untrained_model(world, 3, family).to(dtype).eval(), world.tokenizer(True), world
    )
    facts = world.edits(4, seed=0)
    codebook = new(bare, layer=1, eps=1e-4, steps=2).fit(facts)
    assert len(codebook.codebook) == 4
    seen: list[Tensor] = []
    module_ = codebook._site.module
    ids = [bare.tokenizer(fact.statement)["input_ids"] for fact in facts]
    for row, fact, value in zip(ids, facts, codebook._values, strict=True):
        seen.clear()
        given = torch.tensor([row])
        with torch.no_grad():
            hook = module_.register_forward_hook(lambda _, __, out: seen.append(out))
            bare.model(input_ids=given)
            hook.remove()
            with codebook:
                hook = module_.register_forward_hook(lambda _, __, out: seen.append(out))
                bare.model(input_ids=given)
                hook.remove()
        base, edited = (out.reshape(-1, out.size(-1)) for out in seen)
        at = len(bare.tokenizer(fact.text)["input_ids"]) - 1
        assert edited.dtype == dtype
        assert torch.equal(edited[at], value.to(dtype))
        assert not torch.equal(edited[at], base[at])
        rest = torch.arange(len(base)) != at
        assert torch.equal(edited[rest], base[rest])


# --- batches, padding, caches ------------------------------------------------------------------


def test_padding_on_either_side_is_the_prompt_alone(
    made: fact_models.FactModel, facts: list[Fact]
) -> None:
    check_padding(made, new(made).fit(facts[:3]), facts)


def test_decoding_with_a_cache_is_the_whole_text(
    made: fact_models.FactModel, facts: list[Fact]
) -> None:
    """Also where a prompt is completed only by what is written."""
    text = facts[0].statement
    codebook = new(made).fit(facts[:3])
    tokens = len(made.tokenizer(text)["input_ids"])
    with codebook:
        (hits,) = codebook.within([text])
    assert tokens - 2 in [hit.position for hit in hits]
    check_decoding(made, codebook, text, tokens - 1)


# --- facts come and go -------------------------------------------------------------------------


def test_delete_takes_back_exactly(made: fact_models.FactModel, facts: list[Fact]) -> None:
    prompts = asked(facts[:6])
    bare = logits(made, prompts)
    codebook = new(made).fit(facts[:3])
    with codebook:
        three = logits(made, prompts)
        codebook.insert(facts[3:6])
        assert not same(logits(made, prompts), three)
        codebook.delete([fact.id for fact in facts[3:6]])
        assert same(logits(made, prompts), three)
        codebook.delete([facts[0].id])
        codebook.delete([facts[2].id])
        assert codebook.ids == [facts[1].id]
        codebook.delete([facts[1].id])
        assert same(logits(made, prompts), bare)
        assert len(codebook) == 0


def test_what_was_covered_gets_a_key_of_its_own(
    made: fact_models.FactModel, facts: list[Fact]
) -> None:
    """It is as if the fact that covered it had never been there."""
    wide = new(made, eps=50.0)
    first, second = facts[0], replace(facts[1], target=facts[0].target)
    wide.fit([first, second])
    assert [key.ids for key in wide.codebook] == [(first.id, second.id)]
    assert wide.report()["edits"][second.id]["action"] == "inside"
    wide.delete([first.id])
    fresh = new(made, eps=50.0).fit([second])
    assert torch.equal(wide._values, fresh._values)
    assert torch.equal(wide._keys + wide._centre, fresh._keys + fresh._centre)
    assert wide.codebook == fresh.codebook


def test_upsert(made: fact_models.FactModel, facts: list[Fact]) -> None:
    codebook = new(made, steps=2).fit(facts[:3])
    other = replace(facts[1], target=str(facts[1].target_true))
    codebook.upsert([other])
    assert codebook.ids == [facts[0].id, facts[2].id, other.id]
    assert codebook.facts[other.id].target == other.target
    assert other.id in codebook
    with pytest.raises(ValueError, match="contradict each other"):
        codebook.insert([replace(facts[0], target="zzz", id="new")])


# --- in the model, files -----------------------------------------------------------------------


def test_attached_and_detached(made: fact_models.FactModel, facts: list[Fact]) -> None:
    codebook = new(made, steps=2).fit(facts[:2])
    before = logits(made, asked(facts[:2]))
    with pytest.raises(KeyError, match="on purpose"), codebook:
        raise KeyError("on purpose" * codebook.attached)
    assert hooks(made.model) == 0
    assert same(logits(made, asked(facts[:2])), before)
    codebook.attach()
    with pytest.raises(ValueError, match="attached already"):
        codebook.attach()
    with pytest.raises(ValueError, match="another editor is attached to block 2"):
        FactStore(made.model, made.tokenizer, layer=2, gate=0.9)
    codebook.detach()
    codebook.detach()
    assert hooks(made.model) == 0


def test_save_and_load(made: fact_models.FactModel, facts: list[Fact], tmp_path: Path) -> None:
    path = tmp_path / "codebook.safetensors"
    codebook = new(made, eps=3.0, steps=5).fit(facts[:8])
    codebook.save(path)
    again = Grace.load(path, made.model, made.tokenizer)
    assert again.codebook == codebook.codebook
    assert again.facts == codebook.facts
    assert again.report() == codebook.report()
    with codebook:
        want = logits(made, asked(facts))
    with again:
        assert same(logits(made, asked(facts)), want)
    for one in (codebook, again):
        one.delete([facts[0].id])
    assert torch.equal(again._values, codebook._values)


def test_files_that_are_refused(
    made: fact_models.FactModel, facts: list[Fact], tmp_path: Path
) -> None:
    path = tmp_path / "c"
    with pytest.raises(ValueError, match="the codebook is empty"):
        new(made).save(path)
    codebook = new(made, steps=1).fit(facts[:2])
    with pytest.raises(OutputError, match="cannot be written"):
        codebook.save(tmp_path / "none" / "c")
    codebook.save(path)
    whole = path.read_bytes()
    other = fact_models.untrained_model(made.world, 1, "llama")
    with pytest.raises(CheckpointError, match="was made for other weights"):
        Grace.load(path, other, made.tokenizer)
    smaller = fact_models.World(1, people=40).tokenizer(bos=True)
    with pytest.raises(CheckpointError, match="was made with another tokenizer"):
        Grace.load(path, made.model, smaller)
    with pytest.raises(CheckpointError, match=r"not a file of the format 'cl_fast.fact_store'"):
        FactStore.load(path, made.model, made.tokenizer)
    for data, words in (
        (whole[:-9], "truncated|beyond|size|end of the file"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "not those that were saved"),
        (whole.replace(b'\\"valued\\"', b'\\"walued\\"'), "does not hold what a codebook has"),
    ):
        assert data != whole
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=words):
            Grace.load(path, made.model, made.tokenizer)


# --- bad input ---------------------------------------------------------------------------------


def _nan(where: str) -> None:
    world = fact_models.World(3, people=40)
    model = fact_models.untrained_model(world, 3, "llama").eval()
    codebook = Grace(model, world.tokenizer(True), layer=1, steps=1)
    with torch.no_grad():
        model.get_submodule(where).weight.fill_(math.nan)
    codebook.fit(world.edits(1, seed=0))


BAD: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
    (lambda m: new(m, layer=9), ValueError, r"layer must be in \[0, 3\]"),
    (lambda m: new(m, layer="first"), TypeError, "layer must be indices"),
    (lambda m: new(m, eps=0), ValueError, "eps must be positive and finite; got 0"),
    (lambda m: new(m, eps="1"), TypeError, "eps must be a number"),
    (lambda m: new(m, lr=-1.0), ValueError, "lr must be positive"),
    (lambda m: new(m, steps=0), ValueError, "steps must be at least 1"),
    (lambda m: new(m, batch=0), ValueError, "batch must be at least 1"),
    (lambda m: new(m, seed=0.5), TypeError, "seed must be an int"),
    (lambda m: new(m, init="rand"), ValueError, "init must be one of 'cold', 'warm'; got 'rand'"),
    (lambda m: new(m).fit([]), ValueError, "facts is empty"),
    (lambda m: new(m).insert(["x"]), TypeError, r"facts\[0\] must be a Fact; got str"),
    (lambda m: new(m).upsert(["x"]), TypeError, r"facts\[0\] must be a Fact; got str"),
    (lambda m: new(m).insert(m.world.edits(1, 0) * 2), ValueError, "is there twice"),
    (lambda m: new(m).delete(["x"]), ValueError, "the codebook holds no fact with the id 'x'"),
    (lambda m: new(m).within("x"), TypeError, "texts must be a list of texts"),
    (
        lambda m: _nan("model.layers.0.mlp.gate_proj"),
        NonFiniteError,
        "the key of .* holds NaN or infinity",
    ),
    (lambda m: _nan("model.norm"), NonFiniteError, r"not finite .* lr=1.0 is too large"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_input(made: fact_models.FactModel, number: int) -> None:
    call, kind, words = BAD[number]
    with pytest.raises(kind, match=words):
        call(made)
    assert hooks(made.model) == 0


def test_a_failure_changes_nothing(made: fact_models.FactModel, facts: list[Fact]) -> None:
    codebook = new(made, steps=2).fit(facts[:3])
    with codebook:
        before = logits(made, asked(facts))
        for change in (
            lambda: codebook.insert([facts[4], replace(facts[1], target="zzz", id="z")]),
            lambda: codebook.delete([facts[0].id, "nobody"]),
            lambda: codebook.fit([facts[4], facts[4]]),
        ):
            with pytest.raises(ValueError, match=r"twice|contradict|no fact"):
                change()
        assert codebook.ids == [fact.id for fact in facts[:3]]
        assert same(logits(made, asked(facts)), before)
