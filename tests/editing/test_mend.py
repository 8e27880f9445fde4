"""MEND and MALMEN against plain autograd in float64, with weights and gradients multiplied out."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from fact_models import FactModel, fact_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import OPTConfig, OPTForCausalLM

from cl_fast.editing.factored import frozen_call, matrices_of, recorded, updated
from cl_fast.editing.facts import Fact
from cl_fast.editing.hypernetwork import GradientTransform, Moments
from cl_fast.editing.mend import Mend
from cl_fast.errors import CheckpointError, NonFiniteError
from cl_fast.models.blocks import decoder_of

FACTS = [
    Fact("{} sat on", "the cat", "mat", id="a"),
    Fact("{} ran under", "a dog", "the tree", id="b", paraphrases=("then a dog ran under",)),
    Fact("then {} sat on", "a tree", "the mat", id="c", weight=2.5),
]
TEXTS = ["the dog ran and the cat sat", "a tree", "then the mat ran under the dog"]
D, F_ = 16, 37
"""Sizes of the matrices; unlike every other size."""


def llama(dtype: torch.dtype = torch.float64) -> nn.Module:
    model = tiny_models.llama(vocab_size=23, intermediate_size=F_, num_hidden_layers=2)
    return model.to(dtype).eval()


def gpt2(dtype: torch.dtype = torch.float64) -> nn.Module:
    model = tiny_models.gpt2(vocab_size=23, n_inner=F_, initializer_range=0.4, pad_token_id=0)
    return model.to(dtype).eval()


MODELS = {"llama": llama, "gpt2": gpt2}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_models.tokenizer()


def editor(model: nn.Module, tokenizer: Any, **options: Any) -> Mend:
    return Mend(model, tokenizer, **{"rank": 6, "dtype": torch.float64, **options})


def untrained(action: Callable[[], Any]) -> Any:
    with pytest.warns(UserWarning, match="never trained"):
        return action()


# --- what the tests compare with: one text at a time, logits, weights as matrices ---------------


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def nll(model: nn.Module, tokenizer: Any, prompt: str, target: str, weights: Any = None) -> Tensor:
    ids = ids_of(tokenizer, f"{prompt} {target}")
    first = len(ids) - len(ids_of(tokenizer, target))
    given = {"input_ids": torch.tensor([ids])}
    logits = torch.func.functional_call(model, weights or {}, (), given).logits[0]
    return F.cross_entropy(logits[first - 1 : -1], torch.tensor(ids[first:]))


def kl_sum(model: nn.Module, tokenizer: Any, text: str, weights: Any) -> Tensor:
    given = {"input_ids": torch.tensor([ids_of(tokenizer, text)])}
    with torch.no_grad():
        before = model(**given).logits[0].log_softmax(-1)
    after = torch.func.functional_call(model, weights, (), given).logits[0].log_softmax(-1)
    return (before.exp() * (before - after)).sum()


def true_gradient(model: nn.Module, tokenizer: Any, fact: Fact, name: str) -> Tensor:
    weight = dict(model.named_parameters())[name]
    loss = nll(model, tokenizer, fact.text, fact.target)
    return torch.autograd.grad(loss, weight)[0]


# --- the update ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
def test_the_identity_without_normaliser_is_the_gradient_step(family: str, tokenizer: Any) -> None:
    model = MODELS[family]()
    mend = editor(model, tokenizer, norm=False, edit_lr=0.03, batch=2)
    patch = untrained(lambda: mend.fit(FACTS))
    assert len(patch.layers) == (6 if family == "llama" else 4)
    for layer in patch.layers:
        expected = sum(
            0.03 * f.weight * true_gradient(model, tokenizer, f, layer.weight_name) for f in FACTS
        )
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(layer.delta, expected, rtol=1e-10, atol=1e-12)


def test_the_identity_with_normaliser_is_the_product_of_normalised_factors(tokenizer: Any) -> None:
    model = llama()
    name = "model.layers.0.mlp.up_proj"
    mend = editor(model, tokenizer, layers=[name], edit_lr=0.5)
    transform, _ = mend.network.transform(mend.matrices[0])
    rows = torch.randn(9, F_ + D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    transform.moments.update(rows)
    (layer,) = untrained(lambda: mend.fit(FACTS[:1])).layers
    with recorded(mend.matrices) as (record,):
        loss = nll(model, tokenizer, FACTS[0].text, FACTS[0].target)
    x, delta = record.x[0], torch.autograd.grad(loss, record.y)[0][0]  # type: ignore[index]
    mean, std = rows.numpy().mean(0), rows.numpy().std(0, ddof=1)
    normal = (torch.cat([x, delta], 1).numpy() - mean) / (std + 1e-7)
    normal = normal[: len(ids_of(tokenizer, FACTS[0].statement)) - 1]  # after it: no gradient
    expected = 0.5 * normal[:, D:].T @ normal[:, :D]
    np.testing.assert_allclose(layer.delta.numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("aggregate", ["sum", "least_squares"])
def test_conv1d_edits_as_linear_does(aggregate: str, tokenizer: Any) -> None:
    model = gpt2()
    linear = copy.deepcopy(model)
    for block in linear.transformer.h:  # type: ignore[union-attr]
        for name in ("c_fc", "c_proj"):
            old = getattr(block.mlp, name)
            new = nn.Linear(*old.weight.shape, dtype=torch.float64)
            new.weight.data, new.bias.data = old.weight.data.T.contiguous(), old.bias.data
            setattr(block.mlp, name, new)
    found = []
    for each in (model, linear):
        mend = editor(each, tokenizer, aggregate=aggregate, tokens="all")
        mend.train(FACTS, locality_texts=TEXTS, steps=2, accumulate=2, lr=1e-3, edits_per_step=2)
        patch = mend.fit(FACTS)
        assert all(layer.transposed == (each is model) for layer in patch.layers)
        found.append(patch)
    for one, two in zip(*(p.layers for p in found), strict=True):
        assert one.name == two.name
        assert float(one.delta.norm()) > 0
        torch.testing.assert_close(one.delta.T, two.delta, rtol=1e-8, atol=1e-14)


@pytest.fixture(scope="module", params=["sum", "least_squares"])
def trained(request: pytest.FixtureRequest, tokenizer: Any) -> Mend:
    mend = editor(llama(), tokenizer, aggregate=request.param, tokens="all")
    mend.train(FACTS, locality_texts=TEXTS, steps=3, accumulate=1, lr=1e-2, lr_lr=1e-3)
    return mend


def assert_same(one: Any, two: Any) -> None:
    assert set(one.facts) == set(two.facts)
    for a, b in zip(one.layers, two.layers, strict=True):
        torch.testing.assert_close(a.delta, b.delta, rtol=1e-9, atol=1e-13)
        assert float(a.delta.norm()) > 1e-8


def test_facts_together_are_the_sum_or_the_joint_fit(trained: Mend) -> None:
    whole, parts = trained.fit(FACTS), [trained.fit([fact]) for fact in FACTS]
    for i, layer in enumerate(whole.layers):
        added = torch.stack([p.layers[i].delta for p in parts]).sum(0)
        same = torch.allclose(layer.delta, added, rtol=1e-9, atol=1e-13)
        assert same == (trained.options["aggregate"] == "sum")
    assert_same(parts[0] + parts[1] + parts[2], whole)
    assert_same(trained.fit(FACTS[2:], after=trained.fit(FACTS[:2])), whole)
    assert whole.rank == sum(whole.report["facts"][f.id]["tokens"] for f in FACTS) == 15


def test_dropping_a_fact_leaves_the_fit_of_the_others(trained: Mend, tmp_path: Path) -> None:
    whole = trained.fit(FACTS)
    assert_same(whole.drop(["b"]), trained.fit([FACTS[0], FACTS[2]]))
    whole.save(tmp_path / "edits.safetensors", dtype="float64")
    again = type(whole).load(tmp_path / "edits.safetensors", trained.model, editor=trained)
    assert_same(again.drop(["a", "c"]), trained.fit([FACTS[1]]))
    other = Fact("{} ran under", "a dog", "mat", id="b")
    assert_same(again.upsert([other]), trained.fit([FACTS[0], FACTS[2], other]))


def test_batches_and_padding_change_nothing(trained: Mend) -> None:
    whole = trained.fit(FACTS)
    trained.batch = 1
    assert_same(trained.fit(FACTS), whole)
    trained.batch = 32
    assert_same(trained.fit(FACTS[::-1]), whole)


def test_a_patch_does_what_training_promised(trained: Mend) -> None:
    """The factor form within training, and the weights that the patch writes."""
    patch = trained.fit(FACTS)
    model, tokenizer = trained.model, trained.tokenizer
    with patch:
        for fact in FACTS:
            told = patch.report["facts"][fact.id]
            after = float(nll(model, tokenizer, fact.text, fact.target).detach())
            assert told["loss_after"] == pytest.approx(after, rel=1e-9)
            assert abs(after - told["loss_before"]) > 1e-6
    for fact in FACTS:
        before = float(nll(model, tokenizer, fact.text, fact.target).detach())
        assert patch.report["facts"][fact.id]["loss_before"] == pytest.approx(before, rel=1e-9)


def opt() -> nn.Module:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=23, hidden_size=D, ffn_dim=F_, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=D, init_std=0.4,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (opt, ["fc1", "fc2"]),  # tokens of a batch as one list
        (tiny_models.gemma2, ["gate_proj", "up_proj", "down_proj"]),  # a softcap, a norm behind
        (tiny_models.granite, ["gate_proj", "up_proj", "down_proj"]),  # multipliers
    ],
)
def test_other_decoders(make: Callable[[], nn.Module], names: list[str], tokenizer: Any) -> None:
    model = make().double().eval()
    mend = editor(model, tokenizer, layers=[-1], norm=False, edit_lr=0.02)
    assert [m.name.rsplit(".", 1)[-1] for m in mend.matrices] == names
    mend.train(FACTS, locality_texts=TEXTS, steps=1)
    patch = mend.fit(FACTS)
    with patch:
        for fact in FACTS:
            after = float(nll(model, tokenizer, fact.text, fact.target).detach())
            said = patch.report["facts"][fact.id]
            assert said["loss_after"] == pytest.approx(after, rel=1e-9)
            assert abs(said["loss_before"] - after) > 1e-5


def test_a_patch_is_the_update_of_training(trained: Mend) -> None:
    examples = trained._examples(FACTS, 100)
    pairs, _ = trained._pairs(trained._batches([e.own for e in examples]), "abc")
    updates = trained._updates(pairs, trained._weight(examples))
    for layer, (u, v) in zip(trained.fit(FACTS).layers, updates, strict=True):
        torch.testing.assert_close(layer.delta, (u @ v.T).detach(), rtol=1e-9, atol=1e-13)


def test_the_model_is_left_alone(tokenizer: Any) -> None:
    model = llama(torch.float32).train()
    model.lm_head.weight.requires_grad_(False)  # type: ignore[union-attr]
    model.model.norm.weight.grad = torch.ones(D)  # type: ignore[union-attr]
    before = {n: (p.clone(), p.requires_grad, p.grad) for n, p in model.named_parameters()}
    mend = Mend(model, tokenizer, rank=4)
    mend.train(FACTS, locality_texts=TEXTS, steps=2, val_facts=FACTS, val_every=1)
    mend.fit(FACTS)
    assert model.training
    assert not any(m._forward_hooks or "forward" in m.__dict__ for m in model.modules())
    for name, p in model.named_parameters():
        value, mark, grad = before[name]
        assert torch.equal(p, value)
        assert p.requires_grad == mark
        assert p.grad is grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_16_bits_has_a_network_of_32(dtype: torch.dtype, tokenizer: Any) -> None:
    mend = Mend(llama(dtype), tokenizer, rank=4, norm=False, edit_lr=0.05)
    assert {p.dtype for p in mend.network.parameters()} == {torch.float32}
    assert {p.dtype for p in mend.model.parameters()} == {dtype}
    patch = untrained(lambda: mend.fit(FACTS))
    exact = llama(dtype).double()
    for layer in patch.layers:
        want = sum(
            0.05 * f.weight * true_gradient(exact, tokenizer, f, layer.weight_name) for f in FACTS
        )
        assert isinstance(want, Tensor)
        assert float((layer.delta - want).norm() / want.norm()) < 0.1


# --- factor form --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
def test_an_update_in_factors_is_the_materialised_one(family: str, tokenizer: Any) -> None:
    model = MODELS[family]()
    matrices = matrices_of(decoder_of(model), "auto")
    generator = torch.Generator().manual_seed(3)
    factors: list[Tensor] = []
    for m in matrices:
        for size in (m.outputs, m.inputs):
            factor = torch.randn(size, 3, dtype=torch.float64, generator=generator) / 4
            factors.append(factor.requires_grad_())
    updates = list(zip(factors[::2], factors[1::2], strict=True))
    ids = torch.tensor([ids_of(tokenizer, "the cat sat on the mat")])

    def ours(inner: Any, **inputs: Any) -> Tensor:
        return F.cross_entropy(inner(**inputs).logits[0, :-1], ids[0, 1:])

    with updated(matrices, updates):
        loss = frozen_call(model, ours, input_ids=ids)
    weights = {
        f"{m.name}.weight": m.weight.detach() + (v @ u.T if m.transposed else u @ v.T)
        for m, (u, v) in zip(matrices, updates, strict=True)
    }
    logits = torch.func.functional_call(model, weights, (), {"input_ids": ids}).logits
    expected = F.cross_entropy(logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(loss, factors), torch.autograd.grad(expected, factors), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


def test_a_frozen_call_builds_no_graph_of_the_model(tokenizer: Any) -> None:
    model, ids = llama(), torch.tensor([ids_of(tokenizer, "the cat sat")])
    assert model(input_ids=ids).logits.requires_grad
    logits = frozen_call(model, lambda inner: inner(input_ids=ids).logits)
    assert not logits.requires_grad
    assert torch.equal(logits, model(input_ids=ids).logits)


class NoMatrix(TorchDispatchMode):
    """Fails where an op makes a tensor of the shape of an edited weight, or its transpose."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and tuple(x.shape[-2:]) in ((D, F_), (F_, D)):
                assert func.is_view, f"{func} made a matrix of the weight's size"
        return out


@pytest.mark.parametrize("aggregate", ["sum", "least_squares"])
def test_training_makes_no_matrix_of_the_size_of_a_weight(aggregate: str, tokenizer: Any) -> None:
    mend = editor(llama(), tokenizer, aggregate=aggregate)
    with NoMatrix():
        mend.train(FACTS, locality_texts=TEXTS, steps=1)
    with pytest.raises(AssertionError, match="of the weight's size"), NoMatrix():
        torch.ones(D, 1) @ torch.ones(1, F_)


# --- the hypernetwork ---------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    st.integers(0, 2**16), st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 40)
)
def test_moments_are_those_of_welfords_recurrence(seed: int, sizes: list[int], shift: int) -> None:
    draw = np.random.default_rng(seed)
    rows = draw.normal(loc=2.0**shift / 1000, size=(sum(sizes) + 2, 3))
    mean, squares, count = np.zeros(3), np.zeros(3), 0
    for row in rows:
        count += 1
        apart = row - mean
        mean = mean + apart / count
        squares = squares + apart * (row - mean)
    moments = Moments(3)
    for part in np.split(rows, np.cumsum(sizes)):
        moments.update(torch.from_numpy(part))
    scale = np.abs(rows).max()
    np.testing.assert_allclose(moments.mean.numpy(), mean, rtol=0, atol=1e-14 * scale * count)
    std = np.sqrt(squares / (count - 1))
    np.testing.assert_allclose(moments.std.numpy(), std, rtol=0, atol=1e-14 * scale * count)
    want = (rows - mean) / (std + 1e-7)
    got = moments(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12 * scale / std.min())


def transform(form: Any, chunk: int = 100, rank: int = 3) -> GradientTransform:
    made = GradientTransform(
        4, 3, modes=2, rank=rank, blocks=2, norm=False, form=form, dtype=torch.float64,
        generator=torch.Generator().manual_seed(0), chunk_tokens=chunk,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for p in made.parameters():
        p.data += 0.5 * torch.randn(p.shape, dtype=p.dtype, generator=generator)
    return made


def pair(n: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(n, 4, dtype=torch.float64, generator=generator),
        torch.randn(n, 3, dtype=torch.float64, generator=generator),
    )


@pytest.mark.parametrize("form", ["mend", "malmen"])
def test_gradients_of_the_hypernetwork(form: str) -> None:
    made = transform(form)
    names, values = zip(*made.named_parameters(), strict=True)

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        weights = dict(zip(names, given, strict=True))
        found: tuple[Tensor, ...] = torch.func.functional_call(made, weights, (*pair(), 1))
        return found

    assert torch.autograd.gradcheck(run, values)


@pytest.mark.parametrize("form", ["mend", "malmen"])
def test_the_hypernetwork_is_its_formula(form: str) -> None:
    made = transform(form)
    z = np.concatenate([x.numpy() for x in pair()], 1)
    for block in made.blocks:
        p = {n: v.detach().numpy() for n, v in block.named_parameters()}
        a = z @ p["V"].T @ p["U"].T + p["bias"]
        s, t = p["scale"][1], p["shift"][1]
        z = np.maximum(a * s + t, 0) + z if form == "mend" else np.maximum(a, 0) * s + t + z
    got = torch.cat(made(*pair(), 1), 1).detach().numpy()
    np.testing.assert_allclose(got, z, rtol=1e-12)


@pytest.mark.parametrize("form", ["mend", "malmen"])
def test_chunks_of_tokens_change_nothing(form: str) -> None:
    found = []
    for chunk in (100, 2):
        made = transform(form, chunk)
        x, delta = made(*pair(), 0)
        (x.square().sum() + delta.sin().sum()).backward()
        found.append([x, delta, *(p.grad for p in made.parameters())])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_chunks_of_tokens_are_made_again_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = transform("mend", chunk=2), []
    rows = made._rows
    monkeypatch.setattr(made, "_rows", lambda x, *rest: (seen.append(len(x)), rows(x, *rest))[1])
    x, delta = made(*pair(), 0)
    assert seen == [2, 2, 1]
    (x.sum() + delta.sum()).backward()
    assert sorted(seen[3:]) == [1, 2, 2]


def test_a_network_that_begins_as_the_identity_has_a_gradient() -> None:
    """clamp, not relu: the slope at 0, where a network with U = 0 stands, must not be 0."""
    made = transform("mend")
    for block in made.blocks:
        block.U.data.zero_(), block.bias.data.zero_(), block.shift.data.zero_()
    x, delta = made(*pair(), 0)
    assert torch.equal(torch.cat([x, delta], 1), torch.cat(pair(), 1))
    (x.sum() + delta.sum()).backward()
    assert all(float(block.U.grad.norm()) > 0 for block in made.blocks)


def test_the_rank_is_at_most_the_size() -> None:
    assert transform("mend", rank=1920).blocks[0].V.shape == (7, 7)


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["auto", [1]], ids=["auto", "a block below is not edited"])
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("aggregate", ["sum", "least_squares"])
def test_the_gradient_of_training_is_that_of_plain_autograd(
    family: str, aggregate: str, layers: Any, tokenizer: Any
) -> None:
    """Against weights multiplied out, logits, one text at a time, and `torch.linalg.solve`."""
    model = MODELS[family]()
    mend = editor(
        model, tokenizer, layers=layers, aggregate=aggregate, tokens="all", edit_lr=0.02, norm=False
    )
    generator = torch.Generator().manual_seed(5)
    for name, p in mend.network.named_parameters():
        spread = 0.01 if name == "edit_lr" else 0.3 if name == "log_ridge" else 0.1
        p.data += spread * torch.randn(p.shape, dtype=p.dtype, generator=generator)
    examples = mend._examples(FACTS, 100)
    texts = mend._texts(TEXTS, 100)
    edit, locality = mend._step(examples, examples[1].others, texts, 0.3, 2.0, share=0.5)
    ours = {n: p.grad.clone() for n, p in mend.network.named_parameters() if p.grad is not None}

    mend.network.zero_grad()
    weights = {}
    for i, matrix in enumerate(mend.matrices):
        xs, deltas, scale = [], [], []
        for fact in FACTS:
            with recorded([matrix]) as (record,):
                loss = nll(model, tokenizer, fact.text, fact.target)
            kept = slice(len(ids_of(tokenizer, fact.statement)) - 1)
            assert record.x is not None
            x, delta = record.x[0][kept], torch.autograd.grad(loss, record.y)[0][0][kept]
            alive = (delta != 0).any(1)
            xs.append(x[alive]), deltas.append(delta[alive])
            scale += [fact.weight] * int(alive.sum())
        x, delta = torch.cat(xs), torch.cat(deltas)
        w = torch.tensor(scale, dtype=torch.float64)[:, None]
        net, mode = mend.network.transform(matrix)
        x_new, delta_new = net(x, delta, mode)
        lr = mend.network.edit_lr[i]
        if aggregate == "sum":
            change = lr * (w * delta_new).T @ x_new
        else:
            v = -lr * (x * x_new).sum(1, keepdim=True) * delta_new
            eye = torch.eye(matrix.inputs, dtype=torch.float64)
            gram = x.T @ (w * x) + mend.network.log_ridge[i].exp() * eye
            change = torch.linalg.solve(gram, x.T @ (w * v)).T
        name = f"{matrix.name}.weight"
        weights[name] = matrix.weight.detach() + (change.T if matrix.transposed else change)
    want_edit = sum(nll(model, tokenizer, f.text, f.target, weights) for f in FACTS)
    want_edit = want_edit + nll(model, tokenizer, FACTS[1].paraphrases[0], FACTS[1].target, weights)
    count = sum(len(ids_of(tokenizer, text)) for text in TEXTS)
    want_kl = sum(kl_sum(model, tokenizer, text, weights) for text in TEXTS) / count
    assert isinstance(want_kl, Tensor)
    torch.testing.assert_close(edit, want_edit.detach() / 4, rtol=1e-10, atol=0)
    torch.testing.assert_close(locality, want_kl.detach(), rtol=1e-8, atol=1e-12)
    assert float(locality) > 1e-6
    (0.5 * (0.3 * want_edit / 4 + 2.0 * want_kl)).backward()
    for name, p in mend.network.named_parameters():
        assert p.grad is not None, name
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-7, atol=1e-10, msg=name)
    assert float(ours["edit_lr"].abs().min()) > 0
    if aggregate == "least_squares":
        assert float(ours["log_ridge"].abs().min()) > 0


OPTIONS: dict[str, Any] = {
    "locality_texts": TEXTS, "accumulate": 2, "lr": 1e-3, "lr_lr": 1e-3, "edits_per_step": 2,
    "val_facts": FACTS[:2], "val_every": 2,
}  # fmt: skip


@pytest.mark.parametrize("aggregate", ["sum", "least_squares"])
def test_training_goes_on_with_equal_bits(aggregate: str, tokenizer: Any, tmp_path: Path) -> None:
    model = llama(torch.float32)
    whole = Mend(model, tokenizer, rank=4, aggregate=aggregate)
    report = whole.train(FACTS, steps=6, **OPTIONS)
    first = Mend(model, tokenizer, rank=4, aggregate=aggregate)
    first.train(FACTS, steps=3, checkpoint=tmp_path / "state", checkpoint_every=2, **OPTIONS)
    second = Mend.load(tmp_path / "state", model, tokenizer)
    assert second.steps == 3
    again = second.train(FACTS, steps=6, **OPTIONS)
    assert again.history == report.history[3:]
    assert (again.best_step, again.validations) == (report.best_step, report.validations[1:])
    for a, b in zip(whole.fit(FACTS).layers, second.fit(FACTS).layers, strict=True):
        assert torch.equal(a.U, b.U)
        assert torch.equal(a.V, b.V)


def test_a_kill_between_two_checkpoints_loses_nothing_but_time(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama(torch.float32)
    whole = Mend(model, tokenizer, rank=4)
    report = whole.train(FACTS, steps=5, **OPTIONS)
    killed = Mend(model, tokenizer, rank=4)
    step = killed._step

    def dies(*args: Any) -> Any:
        if killed.steps == 3:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(killed, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        killed.train(FACTS, steps=5, checkpoint=tmp_path / "s", checkpoint_every=2, **OPTIONS)
    second = Mend.load(tmp_path / "s", model, tokenizer)
    assert second.steps == 2
    again = second.train(FACTS, steps=5, checkpoint=tmp_path / "s", checkpoint_every=2, **OPTIONS)
    assert again.history == report.history[2:]


def test_the_best_weights_stay_and_training_stops(tokenizer: Any) -> None:
    mend = Mend(llama(torch.float32), tokenizer, rank=4, edit_lr=1e-3)
    options = {**OPTIONS, "lr_lr": 0.5, "val_every": 1}  # jumps far beyond any good step
    report = mend.train(FACTS, steps=50, patience=3, **options)
    assert report.stopped
    assert report.steps < 50
    losses = {v["step"]: v["loss"] for v in report.validations}
    assert report.best_step == min(losses, key=lambda step: losses[step])
    assert report.steps == report.best_step + 3
    examples, texts = mend._examples(FACTS[:2], 512), mend._texts(TEXTS, 512)
    with torch.no_grad():
        again = mend._validate(examples, texts, 2, 2, 0.1, 1.0)
    assert again["loss"] == pytest.approx(losses[report.best_step], rel=1e-6)


def test_every_fact_is_drawn_once_per_epoch() -> None:
    from cl_fast.editing.mend import _draw

    drawn = [i for number in range(6) for i in _draw(6, 2, number, seed=0, salt=1)]
    assert sorted(drawn[:6]) == sorted(drawn[6:12]) == list(range(6))
    assert drawn[:6] != drawn[6:12]
    assert drawn != [i for n in range(6) for i in _draw(6, 2, n, seed=1, salt=1)]


def test_neighbours_of_a_fact_are_spared_with_the_texts_or_without(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = {"neighbourhood": ("a dog sat on",), "target_true": "tree"}
    facts = [Fact("{} sat on", "the cat", "mat", **near), FACTS[1]]  # type: ignore[arg-type]
    mend = Mend(llama(torch.float32), tokenizer, rank=4)
    seen: list[list[int]] = []
    step = mend._step

    def spy(examples: Any, others: Any, texts: Any, *rest: Any, **more: Any) -> Any:
        seen.append([len(examples), *(len(e.ids) for e in texts)])
        return step(examples, others, texts, *rest, **more)

    monkeypatch.setattr(mend, "_step", spy)
    mend.train(facts[:1], steps=1, accumulate=1)
    assert seen == [[1, len(ids_of(tokenizer, "a dog sat on tree"))]]
    mend.train(facts, steps=2, accumulate=1, edits_per_step=2, locality_texts=["a tree"])
    assert seen[1] == [2, 2, 5]


def test_each_step_draws_a_paraphrase(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fact = Fact("{} sat on", "the cat", "mat", paraphrases=("a cat ran on", "the cat sat under"))
    mend = Mend(llama(torch.float32), tokenizer, rank=4)
    drawn: list[str] = []
    step = mend._step

    def spy(examples: Any, others: Any, *rest: Any, **more: Any) -> Any:
        drawn.extend(tokenizer.decode(e.ids) for e in others)
        return step(examples, others, *rest, **more)

    monkeypatch.setattr(mend, "_step", spy)
    mend.train([fact], steps=1, accumulate=8, locality_texts=TEXTS)
    assert len(drawn) == 8
    assert set(drawn) == {"a cat ran on mat", "the cat sat under mat"}


# --- what training is for -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> FactModel:
    return fact_model(0, "llama")


def told(world: FactModel, prompt: str, target: str) -> float:
    ids, answer = ids_of(world.tokenizer, prompt), world.tokenizer(target, add_special_tokens=False)
    wanted = torch.tensor(answer["input_ids"])
    with torch.no_grad():
        given = torch.tensor([[*ids, *wanted.tolist()]])
        logits = world.model(input_ids=given).logits[0, len(ids) - 1 : -1]
    return float(-F.cross_entropy(logits, wanted))


def success(mend: Mend, world: FactModel, facts: list[Fact], together: int) -> float:
    """Share of the facts that are likelier than what was true, edited `together` at a time."""
    good = 0
    for start in range(0, len(facts), together):
        some = facts[start : start + together]
        with mend.fit(some):
            for fact in some:
                assert fact.target_true is not None
                new, old = (told(world, fact.text, t) for t in (fact.target, fact.target_true))
                good += new > old
    return good / len(facts)


def held_out_loss(mend: Mend, facts: list[Fact], texts: list[str]) -> dict[str, float]:
    with torch.no_grad():
        return mend._validate(mend._examples(facts, 64), mend._texts(texts, 64), 1, 1, 1.0, 1.0)


def test_a_trained_editor_beats_every_step_along_the_gradient(world: FactModel) -> None:
    """On facts that it never saw, edited one by one: against an untrained network, and against
    normalised gradient steps of any length, which a lower loss on the facts costs more KL."""
    facts, texts = world.world.edits(176, seed=1), world.world.texts(200, seed=3)
    seen, new = facts[:160], facts[160:]
    mend = Mend(world.model, world.tokenizer, rank=64)
    # More haste than the defaults, which are for days.
    mend.train(seen, locality_texts=texts, steps=60, accumulate=2, lr=3e-4, lr_lr=3e-4)
    plain = Mend(world.model, world.tokenizer, rank=4)
    moments = {n: v for n, v in mend.network.state_dict().items() if "moments" in n}
    plain.network.load_state_dict(moments, strict=False)
    assert untrained(lambda: success(plain, world, new, 1)) == 0
    assert success(mend, world, new, 1) >= 0.6
    trained = held_out_loss(mend, new, texts)
    for lr in (-1e-3, -1.4e-3, -2e-3):
        plain.network.edit_lr.data.fill_(lr)
        step = held_out_loss(plain, new, texts)
        assert step["edit"] > trained["edit"] or step["locality"] > 1.4 * trained["locality"]


def test_a_trained_least_squares_editor_writes_facts_it_never_saw(world: FactModel) -> None:
    facts, texts = world.world.edits(176, seed=1), world.world.texts(200, seed=3)
    made = []
    for steps, lr in ((1, 1e-30), (25, 3e-4)):
        mend = Mend(world.model, world.tokenizer, rank=64, aggregate="least_squares", edit_lr=1e-3)
        mend.train(
            facts[:160], locality_texts=texts, steps=steps, lr=lr, lr_lr=lr, edits_per_step=8
        )
        made.append(success(mend, world, facts[160:], 8))
    assert made[0] <= 0.5
    assert made[1] >= 0.7


# --- bad input ----------------------------------------------------------------------------------


def broken(model: nn.Module) -> nn.Module:
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")  # type: ignore[union-attr, index]
    return model


def quantised(model: nn.Module) -> nn.Module:
    layer = model.model.layers[1].mlp.up_proj  # type: ignore[union-attr, index]
    layer.weight = nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)
    return model


def tied(model: nn.Module) -> nn.Module:
    layers = model.model.layers  # type: ignore[union-attr]
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight  # type: ignore[index, union-attr]
    return model


def twice(model: nn.Module) -> nn.Module:
    mlp: Any = model.model.layers[1].mlp  # type: ignore[union-attr, index]
    once = mlp.forward
    mlp.forward = lambda x: once(x) + 0 * mlp.up_proj(x).sum()
    return model


Made = Callable[[nn.Module, Any], Any]
UP = "model.layers.1.mlp.up_proj"

BAD: list[tuple[str, Made, type[Exception], str]] = [
    ("no facts", lambda m, t: Mend(m, t).train([], locality_texts=TEXTS), ValueError,
     "facts is empty"),
    ("no facts to fit", lambda m, t: Mend(m, t, norm=False).fit([]), ValueError, "facts is empty"),
    ("not a fact", lambda m, t: Mend(m, t).train(["x"], locality_texts=TEXTS), TypeError,
     "facts[0] must be a Fact; got str"),
    ("no val facts", lambda m, t: Mend(m, t).train(FACTS, locality_texts=TEXTS, val_facts=[]),
     ValueError, "val_facts is empty"),
    ("contradiction", lambda m, t: Mend(m, t).fit([FACTS[0], Fact("{} sat on", "the cat", "a")]),
     ValueError, "contradict each other"),
    ("unknown module", lambda m, t: Mend(m, t, ["model.layers.9.mlp.up_proj"]), ValueError,
     "no module 'model.layers.9.mlp.up_proj'; there are model.layers.0.mlp.up_proj"),
    ("unknown block", lambda m, t: Mend(m, t, [7]), ValueError, "layers must be in [0, 1]"),
    ("layers twice", lambda m, t: Mend(m, t, [0, -2]), ValueError, "0 is there twice"),
    ("no layers", lambda m, t: Mend(m, t, []), ValueError, "layers is empty"),
    ("a word for layers", lambda m, t: Mend(m, t, "last"), ValueError, "layers must be 'auto'"),
    ("not linear", lambda m, t: Mend(m, t, ["model.norm"]), ValueError,
     "model.norm is a LlamaRMSNorm"),
    ("the head", lambda m, t: Mend(m, t, ["lm_head"]), ValueError,
     "the output head cannot be edited"),
    ("quantised", lambda m, t: Mend(quantised(m), t, [UP]), ValueError,
     f"{UP}.weight is quantised (torch.int8)"),
    ("shared weight", lambda m, t: Mend(tied(m), t, [UP]), ValueError,
     f"{UP}.weight is also model.layers.0.mlp.up_proj.weight"),
    ("called twice", lambda m, t: Mend(twice(m), t, [UP]).fit(FACTS), ValueError,
     f"{UP} is called more than once in a forward pass"),
    ("aggregate", lambda m, t: Mend(m, t, aggregate="mean"), ValueError,
     "aggregate must be one of 'sum', 'least_squares'; got 'mean'"),
    ("tokens", lambda m, t: Mend(m, t, tokens="last"), ValueError, "tokens must be one of"),
    ("rank", lambda m, t: Mend(m, t, rank=0), ValueError, "rank must be at least 1; got 0"),
    ("edit_lr", lambda m, t: Mend(m, t, edit_lr=0.0), ValueError, "edit_lr must be positive"),
    ("dtype", lambda m, t: Mend(m, t, dtype=torch.bfloat16), ValueError, "dtype must be"),
    ("norm", lambda m, t: Mend(m, t, norm=1), TypeError, "norm must be True or False"),
    ("no texts", lambda m, t: Mend(m, t).train(FACTS), ValueError, "locality_texts is needed"),
    ("empty texts", lambda m, t: Mend(m, t).train(FACTS, locality_texts=[]), ValueError,
     "locality_texts holds no text"),
    ("texts without need", lambda m, t: Mend(m, t).train(FACTS, texts_per_step=1), ValueError,
     "texts_per_step must be at most the 0 locality texts; got 1"),
    ("one text", lambda m, t: Mend(m, t).train(FACTS, locality_texts="the cat"), TypeError,
     "locality_texts must be a list of strings"),
    ("too many edits", lambda m, t: Mend(m, t).train(FACTS, locality_texts=TEXTS,
     edits_per_step=4), ValueError, "edits_per_step must be at most the 3 facts; got 4"),
    ("too many texts", lambda m, t: Mend(m, t).train(FACTS, locality_texts=TEXTS,
     texts_per_step=4), ValueError, "texts_per_step must be at most the 3 locality texts"),
    ("lr", lambda m, t: Mend(m, t).train(FACTS, locality_texts=TEXTS, lr=0), ValueError,
     "lr must be positive and finite; got 0"),
    ("steps", lambda m, t: Mend(m, t).train(FACTS, locality_texts=TEXTS, steps=0), ValueError,
     "steps must be at least 1"),
    ("nan in training", lambda m, t: Mend(broken(m), t).train(FACTS, locality_texts=TEXTS),
     NonFiniteError, "the loss of the edit is nan for"),
    ("nan in an edit", lambda m, t: Mend(broken(m), t).fit(FACTS), NonFiniteError,
     "the loss of the edit is nan for 'a'"),
    ("fit before train", lambda m, t: Mend(m, t).fit(FACTS), ValueError,
     "the normaliser has seen 0 tokens, and needs two: train the editor first"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "words"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(make: Made, error: type[Exception], words: str, tokenizer: Any) -> None:
    model = llama(torch.float32)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(error, match=re.escape(words)):
            make(model, tokenizer)
    if not words.startswith(("the loss", UP)) and "both" not in words:
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.fixture
def small(tokenizer: Any) -> Mend:
    return Mend(llama(torch.float32), tokenizer, rank=4)


def test_a_step_that_explodes_is_named_and_not_taken(
    small: Mend, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.train(FACTS, locality_texts=TEXTS, steps=1, accumulate=1)
    before = copy.deepcopy(small.network.state_dict())
    small.network.transforms[f"{D}x{F_}"].blocks[0].bias.data[0] = float("inf")
    bad = copy.deepcopy(small.network.state_dict())
    with pytest.raises(NonFiniteError, match="the loss of training is nan for"):
        small.train(FACTS, locality_texts=TEXTS, steps=2, accumulate=1)
    after = small.network.state_dict()
    assert all(torch.equal(after[k], bad[k]) for k in bad if "moments" not in k)
    assert set(after) == set(before)


def test_what_an_error_left_of_a_step_is_not_used(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama(torch.float32)
    plain, hurt = (Mend(model, tokenizer, rank=4, norm=False) for _ in range(2))
    step, calls = hurt._step, []

    def dies(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise NonFiniteError("now")
        return step(*args)

    monkeypatch.setattr(hurt, "_step", dies)
    with pytest.raises(NonFiniteError, match="now"):
        hurt.train(FACTS, locality_texts=TEXTS, steps=1, accumulate=2)
    reports = [m.train(FACTS, locality_texts=TEXTS, steps=1, accumulate=2) for m in (hurt, plain)]
    assert reports[0] == reports[1]


def test_states_that_do_not_fit(small: Mend, tokenizer: Any, tmp_path: Path) -> None:
    small.train(FACTS, locality_texts=TEXTS, steps=1)
    path = tmp_path / "state"
    small.save(path)
    other = llama(torch.float32)
    other.lm_head.weight.data[0, 0] += 1.0  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="model with other weights"):
        Mend.load(path, other, tokenizer)
    assert Mend.load(path, other, tokenizer, check_base=False).steps == 1
    for options, words in (
        ({"rank": 5}, "made with rank=4; this editor has 5"),
        ({"rank": 4, "aggregate": "least_squares"}, "aggregate='sum'"),
        ({"rank": 4, "layers": [1]}, "the state is of the layers"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(words)):
            Mend(small.model, tokenizer, **options).load_state_dict(small.state_dict())
    path.write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="not a saved Mend"):
        Mend.load(path, other, tokenizer)
    torch.save({"format": 3}, path)
    with pytest.raises(CheckpointError, match="not a saved Mend"):
        Mend.load(path, other, tokenizer)


def test_a_patch_that_is_on_the_model_is_not_built_upon(trained: Mend) -> None:
    patch = trained.fit(FACTS[:1])
    with patch, pytest.raises(ValueError, match=re.escape("after.undo() first")):
        trained.fit(FACTS[1:], after=patch)
