"""The editors on random models: keys layer by layer, the ridge problem they solve, history."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import pytest
import tiny_models
import torch
from torch import Tensor
from transformers import GPTJConfig, GPTJForCausalLM

from cl_fast.editing.editors import AlphaEdit, Emmet, Memit, Rome, WeightEditor
from cl_fast.editing.facts import Fact, encode
from cl_fast.editing.keys import KeyStream, keys_of
from cl_fast.editing.patch import Patch
from cl_fast.editing.presets import preset_of
from cl_fast.editing.solver import CholeskyPrior, NullSpace, Prior
from cl_fast.editing.store import FactStore
from cl_fast.editing.values import group_facts
from cl_fast.models.blocks import decoder_of

if TYPE_CHECKING:
    from cl_fast.editing.stats import KeyStats

FACTS = [
    Fact("the {} sat on", "cat", "mat"),
    Fact("and then the {} ran under the", "dog", "tree and mat"),
    Fact("{} ran on", "tree", "cat"),
    Fact("the {} ran", "mat tree", "on the dog"),
    Fact("a {} and", "dog", "dog", weight=3.0),
]
CONTEXTS = ["a dog sat on a mat. ", "under tree and mat. "]
OPTIONS = {"steps": 4, "lr": 0.4, "clamp": 2.0, "contexts": CONTEXTS, "prior_weight": 2.0}


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_models.llama(num_hidden_layers=4),
    "gpt2": lambda: tiny_models.gpt2(3, n_layer=4),
    "gemma3": lambda: tiny_models.gemma3(5, num_hidden_layers=4),
}


class KnownMoments:
    """In the place of KeyStats: moments of keys that the test knows."""

    def __init__(self, model: Any) -> None:
        self.sizes = {s.layer: s.key_size for s in decoder_of(model).sites()}
        self.layers = tuple(self.sizes)

    def check(self, model: Any) -> None:
        pass

    def moments(self, layer: int) -> Tensor:
        generator = torch.Generator().manual_seed(layer)
        size = self.sizes[layer]
        x = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
        x = x * torch.logspace(0, -2, size, dtype=torch.float64)
        return x.T @ x / (3 * size)

    def prior(
        self,
        layer: int,
        kind: str = "covariance",
        weight: float = 1.0,
        device: Any = "cpu",
        **o: Any,
    ) -> Prior:
        if kind == "covariance":
            return CholeskyPrior(weight * self.moments(layer))
        return NullSpace(self.moments(layer), **o)


def stats_of(model: Any) -> KeyStats:
    return cast("KeyStats", KnownMoments(model))


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]().double().eval()


def plain_keys(
    model: Any, layer: int, facts: list[Fact], contexts: Sequence[str] = CONTEXTS
) -> Tensor:
    """k = half the plain prompt's, half the mean of those behind contexts: [f, n]."""
    tokenizer, site = tiny_models.tokenizer(), decoder_of(model).site(layer)
    columns = []
    for fact in facts:
        keys = []
        for context in ["", *contexts]:
            span = tuple(x + len(context) for x in fact.subject_span)
            e = encode(tokenizer, context + fact.text, cast(Any, span))
            seen: list[Tensor] = []
            hook = site.module.register_forward_pre_hook(lambda _, a, seen=seen: seen.append(a[0]))
            with torch.no_grad():
                model(torch.tensor([e.ids]))
            hook.remove()
            keys.append(seen[0].reshape(-1, site.key_size)[e.lookup])
        columns.append(keys[0] / 2 + torch.stack(keys[1:]).mean(0) / 2)
    return torch.stack(columns, 1)


def recorded(module: Any, into: dict[str, Tensor], name: str, at: int) -> Any:
    def record(_: Any, __: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        into[name] = hidden.reshape(-1, 16)[at]

    return module.register_forward_hook(record)


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: Any, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def fitted(model: Any, kind: type[WeightEditor] = Memit, **changes: Any) -> WeightEditor:
    layers = [1, 2] if kind in (Memit, AlphaEdit) else [1]
    given = {"layers": layers, **OPTIONS, **changes}
    if given.get("prior", kind.defaults.get("prior")) in ("nullspace", "identity"):
        del given["prior_weight"]
    return kind(model, tiny_models.tokenizer(), stats_of(model), **given)


def test_each_layer_solves_its_ridge_problem(model: Any) -> None:
    before, stats = state(model), KnownMoments(model)
    patch = fitted(model).fit(FACTS)
    assert same(model, before)
    assert patch.ids == tuple(fact.id for fact in FACTS)
    assert torch.equal(patch.ridge, 1 / torch.tensor([f.weight for f in FACTS]).double())
    for layer, number in zip(patch.layers, (1, 2), strict=True):
        delta = layer.U @ layer.V.T
        assert layer.keys is not None
        assert layer.targets is not None
        missed = (delta @ layer.keys - layer.targets) / patch.ridge
        gradient = delta @ (2.0 * stats.moments(number)) + missed @ layer.keys.T
        assert gradient.norm() < 1e-10 * (layer.targets @ layer.keys.T).norm()


def test_keys_are_those_of_the_model_edited_so_far(model: Any) -> None:
    """... and collecting all of them before any edit gives others."""
    patch = fitted(model).fit(FACTS)
    first, second = patch.layers
    assert first.keys is not None
    assert second.keys is not None
    torch.testing.assert_close(first.keys, plain_keys(model, 1, FACTS))
    once = plain_keys(model, 2, FACTS)
    assert (second.keys - once).norm() > 1e-3 * once.norm()
    weight = decoder_of(model).site(1).weight
    with torch.no_grad():
        delta = first.U @ first.V.T
        weight += delta.T if first.transposed else delta
    torch.testing.assert_close(second.keys, plain_keys(model, 2, FACTS))


def test_the_mean_over_three_contexts_is_one_in_float64() -> None:
    model, tokenizer = MODELS["llama"]().double().eval(), tiny_models.tokenizer()
    contexts = [*CONTEXTS, "the mat sat. "]
    keys = keys_of(decoder_of(model), tokenizer, group_facts(FACTS, tokenizer), [1], contexts)[1]
    want = plain_keys(model, 1, FACTS, contexts)
    torch.testing.assert_close(keys, want, rtol=1e-12, atol=1e-12)


def test_what_is_left_is_spread_over_the_layers(model: Any) -> None:
    """h measured after the edits below; at each layer (z - h) / (layers left)."""
    editor = fitted(model)
    values = editor.optimise(FACTS)
    patch = editor.fit(FACTS, values=values)
    tokenizer, decoder = tiny_models.tokenizer(), decoder_of(model)
    for number, layer in enumerate(patch.layers):
        site = decoder.site(1 + number)
        for i, fact in enumerate(FACTS):
            e = encode(tokenizer, fact.text, fact.subject_span)
            outputs: dict[str, Tensor] = {}

            hooks = [
                recorded(decoder.blocks[2], outputs, "h", e.lookup),
                recorded(site.module, outputs, "y", e.lookup),
            ]
            with torch.no_grad():
                model(torch.tensor([e.ids]))
            for hook in hooks:
                hook.remove()
            rest = (values[0].z[i].double() - outputs["h"]) / (2 - number)
            assert layer.targets is not None
            got = layer.targets[:, i]
            if site.norm is None:
                torch.testing.assert_close(got, rest, rtol=1e-5, atol=1e-5)
            else:  # the direction is reached, the length is the norm's
                y = outputs["y"]
                now, wanted = site.contribution(y), site.contribution(y) + rest
                new = site.contribution(y + got)
                gain = site.contribution(torch.ones_like(y))
                a, b = new / gain, wanted / gain
                cosine = (a @ b) / (a.norm() * b.norm())
                assert cosine > 1 - 1e-6
                assert (new - now).norm() > 0
        with torch.no_grad():
            delta = layer.U @ layer.V.T
            weight = site.weight
            weight += delta.T if layer.transposed else delta


def test_rome_reaches_its_value_at_its_key(model: Any) -> None:
    editor = fitted(model, Rome)
    facts = FACTS[:4]  # the weight of the fifth has no effect where every value is reached
    values = editor.optimise(facts)
    (layer,) = editor.fit(facts, values=values).layers
    assert layer.keys is not None
    assert layer.targets is not None
    delta = layer.U @ layer.V.T
    torch.testing.assert_close(delta @ layer.keys, layer.targets)
    site = decoder_of(model).site(1)
    now = (site.matrix() + delta) @ layer.keys  # of the mean keys: r-ROME has no other
    bias = getattr(site.module, "bias", None)
    now = now if bias is None else now + bias.detach()[:, None]
    torch.testing.assert_close(now.T, values[0].z.double(), rtol=1e-5, atol=1e-5)
    one = fitted(model, Rome).fit(FACTS[:1]).layers[0]
    # right u^T with u = C^-1 k:  the closed form of the paper
    c = KnownMoments(model).moments(1)
    assert one.keys is not None
    assert one.targets is not None
    u = torch.linalg.solve(c, one.keys[:, 0])
    torch.testing.assert_close(
        one.U @ one.V.T, torch.outer(one.targets[:, 0], u) / (one.keys[:, 0] @ u)
    )


def test_contexts_are_those_of_the_bare_model() -> None:
    """A patch that is read from a file is gone on from as the one that was just made."""
    model = MODELS["llama"]().eval()
    first = fitted(model, contexts="auto", clamp=50.0, lr=20.0, prior_weight=1e-3)
    patch = first.fit(FACTS[:2])
    with patch:
        other = fitted(model, contexts="auto").contexts
    assert other != first.contexts, "the model says other things now"
    second = fitted(model, contexts="auto", prior_weight=1e-3)
    second.fit(FACTS[2:], after=patch)
    assert second.contexts == first.contexts


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_targets_of_a_model_in_16_bits_are_not_rounded_to_them(name: str) -> None:
    model = MODELS[name]().bfloat16().eval()
    editor, tokenizer = fitted(model), tiny_models.tokenizer()
    values = editor.optimise(FACTS)[0]
    layer = editor.fit(FACTS, values=[values]).layers[1]
    # The same, by the formulas in float64, from what the bfloat16 model gives.
    first = editor.fit(FACTS, values=[values]).layers[0]
    decoder, exact = decoder_of(model), MODELS[name]().bfloat16().double().eval()
    weight = decoder.site(1).weight.data
    weight.copy_((weight.double() + first.U @ first.V.T).float())
    stream = KeyStream(decoder, tokenizer, group_facts(FACTS, tokenizer), CONTEXTS)
    _, output, ahead = stream.look(2)
    want = decoder_of(exact).site(2).needed(output.double(), (values.z - ahead).double())
    assert layer.targets is not None
    error = (layer.targets.T - want).norm() / want.norm()
    assert error < 1e-5


def test_history_after_batches_of_several_priors_has_one() -> None:
    model = MODELS["llama"]().double().eval()
    patch = fitted(model, history=False, layers=[1], prior_weight=2.0).fit(FACTS[:2])
    other = fitted(model, history=False, layers=[1], prior_weight=5.0)
    patch = other.fit(FACTS[2:4], after=patch)
    patch = fitted(model, layers=[1], prior_weight=5.0).fit(FACTS[4:], after=patch)
    (layer,) = patch.layers
    delta = layer.U @ layer.V.T
    assert layer.keys is not None
    assert layer.targets is not None
    missed = (delta @ layer.keys - layer.targets) / patch.ridge
    gradient = delta @ (5.0 * KnownMoments(model).moments(1)) + missed @ layer.keys.T
    assert gradient.norm() < 1e-10 * (layer.targets @ layer.keys.T).norm()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_grad_mode_of_the_caller_makes_no_difference(mode: Any) -> None:
    model = MODELS["llama"]().eval()
    want = fitted(model).fit(FACTS).layers[1]
    with mode():
        got = fitted(model).fit(FACTS).layers[1]
    assert torch.equal(got.U, want.U)


def test_emmet_with_ridge_1_is_memit_of_one_layer() -> None:
    model = MODELS["llama"]().double().eval()
    memit = fitted(model, layers=[1]).fit(FACTS)
    emmet = fitted(model, Emmet, ridge=1.0).fit(FACTS)
    torch.testing.assert_close(emmet.layers[0].delta, memit.layers[0].delta)


def test_alphaedit_leaves_what_is_protected_alone(model: Any) -> None:
    editor = fitted(model, AlphaEdit, energy=0.6, prior_weight="auto")
    patch = editor.fit(FACTS)
    for layer, number in zip(patch.layers, (1, 2), strict=True):
        values, vectors = torch.linalg.eigh(KnownMoments(model).moments(number))
        top = vectors[:, values > 0][:, -1:]
        delta = layer.U @ layer.V.T
        assert (delta @ top).norm() < 1e-10 * delta.norm()
        assert delta.norm() > 0


def test_history_is_the_joint_fit(model: Any) -> None:
    """At one layer: batch after batch, and all (key, target) at once, by a system of equations."""
    editor = fitted(model, layers=[1])
    one = editor.fit(FACTS[:2])
    both = editor.fit(FACTS[2:], after=one)
    (layer,) = both.layers
    assert layer.keys is not None
    assert layer.targets is not None
    k, t, w = layer.keys, layer.targets, torch.diag(1 / both.ridge)
    c0 = 2.0 * KnownMoments(model).moments(1)
    joint = torch.linalg.solve(c0 + k @ w @ k.T, k @ w @ t.T).T
    torch.testing.assert_close(layer.U @ layer.V.T, joint)
    torch.testing.assert_close(k[:, :2], one.layers[0].keys)
    assert both.joint
    assert both.ids == tuple(f.id for f in FACTS)
    back = both.drop([f.id for f in FACTS[2:]])
    torch.testing.assert_close(back.layers[0].delta, one.layers[0].delta)


def test_without_history_a_batch_forgets_those_before() -> None:
    model = MODELS["llama"]().double().eval()
    one = fitted(model, history=False, layers=[1]).fit(FACTS[:2])
    two = fitted(model, history=False, layers=[1]).fit(FACTS[2:], after=one)
    (layer,) = two.layers
    assert layer.keys is not None
    assert layer.targets is not None
    torch.testing.assert_close(layer.U[:, :2], one.layers[0].U)
    new = layer.U[:, 2:] @ layer.V[:, 2:].T
    k = layer.keys[:, 2:]
    rest = layer.targets[:, 2:] - one.layers[0].delta @ k
    w = torch.diag(1 / two.ridge[2:])
    c0 = 2.0 * KnownMoments(model).moments(1)
    torch.testing.assert_close(new, torch.linalg.solve(c0 + k @ w @ k.T, k @ w @ rest.T).T)
    with pytest.raises(ValueError, match="without history"):
        two.drop([FACTS[0].id])


def test_the_ends_have_values_of_their_own() -> None:
    model = MODELS["llama"]().double().eval()
    editor = fitted(model, layers=[0, 1, 2], spread="ends")
    assert editor.layers == (0, 2)
    values = editor.optimise(FACTS)
    assert [v.layer for v in values] == [0, 2]
    patch = editor.fit(FACTS, values=values)
    tokenizer = tiny_models.tokenizer()
    stream = KeyStream(decoder_of(model), tokenizer, group_facts(FACTS, tokenizer), CONTEXTS)
    _, _, h = stream.look(0)
    assert patch.layers[0].targets is not None
    torch.testing.assert_close(
        patch.layers[0].targets.T, (values[0].z - h).double(), rtol=1e-4, atol=1e-5
    )


def test_four_relations_of_one_subject_are_one_column() -> None:
    model, tokenizer = MODELS["llama"]().double().eval(), tiny_models.tokenizer()
    relations = [Fact(f"{{}} {verb}", "cat", word) for verb, word in
                 [("sat", "mat"), ("ran", "dog"), ("and", "tree"), ("on", "a")]]  # fmt: skip
    editor = Memit(model, tokenizer, stats_of(model), layers=[1, 2], **OPTIONS)
    patch = editor.fit([*relations[:3], FACTS[1]])
    assert patch.columns == (tuple(f.id for f in relations[:3]), (FACTS[1].id,))
    shared = patch.report["facts"][relations[0].id]["shares_value_with"]
    assert shared == [f.id for f in relations[1:3]]
    more = editor.fit(relations[3:], after=patch)
    assert more.columns == ((FACTS[1].id,), tuple(f.id for f in relations))
    with pytest.raises(ValueError, match="share one key"):
        more.drop([relations[0].id])
    less = editor.drop(more, [relations[0].id])
    assert less.columns == ((FACTS[1].id,), tuple(f.id for f in relations[1:]))


def test_upsert_puts_a_new_target_in_the_place_of_the_old() -> None:
    model = MODELS["llama"]().double().eval()
    editor = fitted(model)
    patch = editor.fit(FACTS)
    other = Fact(FACTS[0].prompt, FACTS[0].subject, "tree")
    changed = patch.upsert([other])
    assert changed.facts[other.id].target == "tree"
    assert len(changed) == len(FACTS)
    rest = patch.drop([FACTS[0].id])
    expected = editor.fit([other], after=rest)
    for a, b in zip(changed.layers, expected.layers, strict=True):
        torch.testing.assert_close(a.delta, b.delta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_patch_goes_on_and_comes_off(dtype: torch.dtype) -> None:
    model = MODELS["llama"]().to(dtype).eval()
    before = state(model)
    patch = fitted(model).fit(FACTS)
    assert same(model, before)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        base = model(ids).logits
        with patch:
            assert not torch.equal(model(ids).logits, base)
        assert torch.equal(model(ids).logits, base)
    assert same(model, before)
    with pytest.raises(RuntimeError, match="mine"), patch:
        raise RuntimeError("mine")
    assert same(model, before)


def test_a_failure_in_the_middle_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = MODELS["llama"]().eval()
    model.train()
    model.lm_head.weight.requires_grad_(False)
    marks = [p.requires_grad for p in model.parameters()]
    before = state(model)
    editor = fitted(model)
    calls = []
    whole = KeyStream.look

    def fail(self: Any, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            assert not same(model, before), "one layer is edited by now"
            raise KeyboardInterrupt
        return whole(self, *args)

    monkeypatch.setattr(KeyStream, "look", fail)
    with pytest.raises(KeyboardInterrupt):
        editor.fit(FACTS)
    assert same(model, before)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == marks
    assert not any(m._forward_hooks or "forward" in m.__dict__ for m in model.modules())


def test_low_memory_changes_nothing_but_memory() -> None:
    model = MODELS["llama"]().double().eval()
    plain, low = fitted(model), fitted(model, low_memory=True)
    forgotten: list[int] = []
    low.stats.forget = lambda: forgotten.append(1)  # type: ignore[union-attr, method-assign]
    for a, b in zip(plain.fit(FACTS).layers, low.fit(FACTS).layers, strict=True):
        assert torch.equal(a.U, b.U)
        assert torch.equal(a.V, b.V)
    assert len(forgotten) == 2


def test_the_same_again_is_the_same() -> None:
    model = MODELS["llama"]().eval()
    patches = [fitted(model, contexts="auto").fit(FACTS) for _ in range(2)]
    for a, b in zip(patches[0].layers, patches[1].layers, strict=True):
        assert torch.equal(a.U, b.U)
        assert torch.equal(a.V, b.V)
    assert 1 <= len(patches[0].options["contexts"]) <= 5


def test_presets_follow_the_family_and_its_depth() -> None:
    assert preset_of(decoder_of(MODELS["llama"]()), "memit").layers == (0, 1)
    deep = tiny_models.llama(num_hidden_layers=32)
    preset = preset_of(decoder_of(deep), "memit")
    assert preset.exact
    assert preset.family == "llama2"
    assert preset.layers == (4, 5, 6, 7, 8)
    assert preset_of(decoder_of(deep), "rome").layers == (5,)
    assert preset.prior_weight == 15000.0
    assert preset_of(decoder_of(MODELS["gpt2"]()), "emmet").prior_weight == 1000.0 * 64 / 6400
    assert preset_of(decoder_of(MODELS["gemma3"]()), "memit").family == "gemma2"
    assert not preset_of(decoder_of(tiny_models.granite()), "memit").exact
    config = GPTJConfig(vocab_size=9, n_embd=8, n_head=2, n_layer=28, rotary_dim=4, n_inner=16)
    with torch.device("meta"):
        gptj = decoder_of(GPTJForCausalLM(config))
    assert preset_of(gptj, "memit").prior_weight == 15000.0
    assert preset_of(gptj, "emmet").prior_weight == 10000.0


def refuse(kind: str, model: Any) -> Any:
    tokenizer, stats = tiny_models.tokenizer(), stats_of(model)
    editor = fitted(model)
    match kind:
        case "stats of a path":
            return Memit(model, tokenizer, "stats")  # type: ignore[arg-type]
        case "attached":
            store = FactStore(model, tokenizer, layer=0, gate=0.9, contexts=())
            with store:
                return editor.fit(FACTS)
        case "no stats":
            return Memit(model, tokenizer)
        case "layer":
            return Memit(model, tokenizer, stats, layers=[9])
        case "descending":
            return Memit(model, tokenizer, stats, layers=[2, 1])
        case "prior":
            return Memit(model, tokenizer, stats, prior="flat")  # type: ignore[arg-type]
        case "energy":
            return Memit(model, tokenizer, stats, energy=0.9)
        case "devices":
            spread = MODELS["llama"]()
            spread.lm_head.to("meta")
            return Memit(spread, tokenizer, stats, layers=[1])
        case "prior_weight":
            return Memit(model, tokenizer, prior="identity", layers=[1], prior_weight=2.0)
        case "mlp":
            return Memit(model, tokenizer, stats, layers=[1, 2], where="mlp")
        case "contexts":
            return Memit(model, tokenizer, stats, contexts="The")  # type: ignore[arg-type]
        case "empty":
            return editor.fit([])
        case "no fact":
            return editor.fit(["a"])  # type: ignore[list-item]
        case "twice":
            return editor.fit([FACTS[0], FACTS[0]])
        case "contradiction":
            return editor.fit([FACTS[0], Fact("the {} sat on", "cat", "tree", id="x")])
        case "after holds it":
            return editor.fit([FACTS[0]], after=editor.fit(FACTS[:1]))
        case "after contradicts":
            return editor.fit([Fact("the {} sat on", "cat", "tree")], after=editor.fit(FACTS[:1]))
        case "other layers":
            return editor.fit(FACTS[1:], after=fitted(model, layers=[1]).fit(FACTS[:1]))
        case "other prior":
            other = fitted(model, prior_weight=3.0).fit(FACTS[:1])
            return editor.fit(FACTS[1:], after=other)
        case "other base":
            other = MODELS["llama"]()
            torch.nn.init.normal_(other.model.layers[1].mlp.down_proj.weight)
            return editor.fit(FACTS[1:], after=fitted(other.double().eval()).fit(FACTS[:1]))
        case "applied":
            with fitted(model).fit(FACTS[:1]):
                return editor.fit(FACTS[1:])
        case "weight":
            return fitted(model, Rome).fit(FACTS)
        case "other values":
            return editor.fit(FACTS[1:], values=editor.optimise(FACTS[:1]))
        case "slow tokenizer":
            return Memit(model, object(), stats, layers=[1, 2], **OPTIONS).fit(FACTS)
    raise AssertionError(kind)


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("stats of a path", TypeError, "stats must be KeyStats; got str. KeyStats.load"),
        ("attached", ValueError, "a FactStore is attached to block 0 of the model: detach it"),
        ("no stats", ValueError, "stats is needed for prior='covariance': KeyStats.collect"),
        ("layer", ValueError, r"layers must be in \[0, 3\]"),
        ("descending", ValueError, "layers must ascend"),
        ("prior", ValueError, "prior must be one of 'covariance', 'nullspace', 'identity'"),
        ("energy", ValueError, "energy has no effect with prior='covariance'"),
        ("devices", ValueError, "the model is spread over cpu, meta: put it on one device"),
        ("prior_weight", ValueError, "prior_weight has no effect with prior='identity'"),
        ("mlp", ValueError, "where='mlp' has values for the output of one MLP"),
        ("contexts", TypeError, "contexts must be a list of texts"),
        ("empty", ValueError, "facts is empty"),
        ("no fact", TypeError, r"facts\[0\] must be a Fact"),
        ("twice", ValueError, "'the cat sat on mat' is there twice"),
        ("contradiction", ValueError, "contradict each other: 'the cat sat on' -> 'mat'"),
        ("after holds it", ValueError, "is there twice.*that the patch holds"),
        ("after contradicts", ValueError, "contradict each other.*use upsert"),
        ("other layers", ValueError, "after edits .*this editor"),
        ("other prior", ValueError, "after was fitted with another prior"),
        ("other base", ValueError, "after was fitted on another base"),
        ("applied", ValueError, "has a patch on it .*undo it first"),
        ("weight", ValueError, "weight of the fact 'a dog and' has no effect with ridge=0"),
        ("other values", ValueError, "values are of other facts"),
        ("slow tokenizer", TypeError, "gives no offsets"),
    ],
)
def test_bad_input_is_named_before_anything_changes(
    kind: str, error: type[Exception], words: str
) -> None:
    model = MODELS["llama"]().double().eval()
    before = state(model)
    with pytest.raises(error, match=words):
        refuse(kind, model)
    assert same(model, before)


def test_a_fit_that_does_nothing_says_so() -> None:
    model = MODELS["llama"]().double().eval()
    with pytest.warns(UserWarning, match="leave their targets unlikely .* larger clamp than 0.001"):
        fitted(model, clamp=1e-3).fit(FACTS)
    with pytest.warns(UserWarning, match="the prior holds them back. Try a smaller"):
        fitted(
            model, prior_weight=1e9, clamp=50.0, steps=60, lr=0.3, weight_decay=0, kl_factor=0
        ).fit([Fact("the {}", "cat", "mat")])
    with pytest.warns(UserWarning, match=r"down_proj is larger than the weight itself"):
        fitted(model, layers=[1], prior_weight=1e-6, clamp=200.0, steps=20, lr=9.0).fit(FACTS[:1])


def test_patches_of_one_base_add_up() -> None:
    model = MODELS["llama"]().double().eval()
    editor = fitted(model, layers=[1])
    one, two = editor.fit(FACTS[:2]), editor.fit(FACTS[2:])
    both: Patch = one + two
    k, t = both.layers[0].keys, both.layers[0].targets
    assert k is not None
    assert t is not None
    w = torch.diag(1 / both.ridge)
    c0 = 2.0 * KnownMoments(model).moments(1)
    joint = torch.linalg.solve(c0 + k @ w @ k.T, k @ w @ t.T).T
    torch.testing.assert_close(both.layers[0].delta, joint)
