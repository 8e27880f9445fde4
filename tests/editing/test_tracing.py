"""Causal tracing against one run for each token, layer and sample."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from tiny_models import MADE_UP, gemma2, llama, word_tokenizer
from transformers import GPT2LMHeadModel

from cl_fast.editing.facts import Fact
from cl_fast.editing.tracing import (
    CausalTrace,
    Corruption,
    average_effects,
    causal_trace,
    embedding_sigma,
)
from cl_fast.errors import NonFiniteError

TEXT, SUBJECT = "kab lod mif nug pek", "lod mif"
ROUNDED = 1e-5
"""RMS norms round to float32 in a float64 model, too: of a probability, this part at most."""


tokenizer = partial(word_tokenizer, MADE_UP)


MODELS = {
    "llama": lambda: llama(2, num_hidden_layers=3),
    "gpt2": lambda: tiny_models.gpt2(1, n_layer=3, n_positions=32, initializer_range=0.4),
    "gemma2": gemma2,
}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]().double().eval()


@pytest.fixture(scope="module")
def small() -> Any:
    return MODELS["llama"]().double().eval()


def parts(model: Any, kind: str) -> list[Any]:
    """The modules whose outputs are put back, by the names that these families give them."""
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    names = {"mlp": ["mlp"], "attention": ["attn", "self_attn"]}
    if kind == "hidden":
        return list(blocks)
    return [next(getattr(b, n) for n in names[kind] if hasattr(b, n)) for b in blocks]


def one_by_one(
    model: Any, ids: list[int], answer: list[int], subject: range, kind: str, noise: torch.Tensor,
    windows: list[range],
) -> tuple[float, float, np.ndarray]:  # fmt: skip
    """Clean and corrupted P(answer), and P [tokens, windows]: one row at a time, from the start."""
    whole = torch.tensor([[*ids, *answer[:-1]]])
    modules = parts(model, kind)
    clean: dict[int, torch.Tensor] = {}

    def run(sample: int | None, token: int = -1, layers: range = range(0)) -> float:
        def corrupt(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
            out = out.clone()
            out[0, subject.start : subject.stop] += noise[sample]
            return out

        def touch(layer: int) -> Any:
            def hook(_: Any, __: Any, out: Any) -> Any:
                x = out[0] if isinstance(out, tuple) else out
                if sample is None:
                    clean[layer] = x.clone()
                    return out
                if layer in layers:
                    x = x.clone()
                    x[0, token] = clean[layer][0, token]
                return (x, *out[1:]) if isinstance(out, tuple) else x

            return hook

        hooks = [m.register_forward_hook(touch(i)) for i, m in enumerate(modules)]
        if sample is not None:
            hooks.append(model.get_input_embeddings().register_forward_hook(corrupt))
        with torch.no_grad():
            z = model(input_ids=whole, use_cache=False).logits[0].double()
        for hook in hooks:
            hook.remove()
        places = range(len(ids) - 1, whole.size(1))
        return math.exp(
            sum(float(z[at].log_softmax(-1)[t]) for at, t in zip(places, answer, strict=True))
        )

    before = run(None)
    samples = range(len(noise))
    corrupted = float(np.mean([run(s) for s in samples]))
    return before, corrupted, np.array(
        [[np.mean([run(s, t, w) for s in samples]) for w in windows] for t in range(len(ids))]
    )  # fmt: skip


def noise_of(
    model: Any, ids: list[int], subject: range, samples: int, size: float, seed: int
) -> Any:
    """sigma, and the noise as it is documented."""
    embedded = model.get_input_embeddings()(
        torch.tensor(ids[subject.start : subject.stop])
    ).detach()
    sigma = float(embedded.std())
    drawn = torch.randn((samples, *embedded.shape), generator=torch.Generator().manual_seed(seed))
    return sigma, drawn.double() * size * sigma


@pytest.mark.parametrize(
    ("kind", "window", "bos", "answer"),
    [
        ("hidden", 10, False, None),
        ("hidden", 1, True, "pek lob"),
        ("mlp", 2, False, "lob"),
        ("attention", 3, True, None),
        ("mlp", 1, False, "pek lob som"),
    ],
)
def test_all_effects_are_those_of_single_runs(
    model: Any, kind: Any, window: int, bos: bool, answer: str | None
) -> None:
    words = tokenizer(bos)
    got = causal_trace(
        model, words, TEXT, SUBJECT, answer, kind=kind, window=window, samples=3, batch=7, seed=5
    )
    ids = words(TEXT)["input_ids"]
    subject = range(1 + bos, 3 + bos)
    sigma, noise = noise_of(model, ids, subject, 3, 3.0, 5)
    with torch.no_grad():
        likeliest = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    wanted = (
        [likeliest] if answer is None else [words.convert_tokens_to_ids(w) for w in answer.split()]
    )
    layers = len(parts(model, kind))
    windows = [
        range(layer, layer + 1)
        if kind == "hidden"
        else range(max(0, layer - window // 2), min(layers, layer - (-window // 2)))
        for layer in range(layers)
    ]
    clean, corrupted, table = one_by_one(model, ids, wanted, subject, kind, noise, windows)
    assert got.subject == subject
    assert [words.convert_tokens_to_ids(t) for t in got.tokens] == ids
    assert got.sigma == pytest.approx(sigma, rel=1e-12)
    near = 1e-10 if isinstance(model, GPT2LMHeadModel) else ROUNDED
    assert got.clean == pytest.approx(clean, rel=near)
    assert got.corrupted == pytest.approx(corrupted, rel=near)
    assert got.probabilities.shape == (len(ids), layers)
    assert got.probabilities == pytest.approx(table, rel=near)
    assert np.array_equal(got.effects, got.probabilities - got.corrupted)
    # Something happens, so that this could fail.
    assert abs(got.total_effect) > 1000 * ROUNDED * clean
    assert np.ptp(got.effects) > 1000 * ROUNDED * clean
    again = causal_trace(
        model, words, TEXT, SUBJECT, answer, kind=kind, window=window, samples=3, seed=5
    )
    assert again.probabilities == pytest.approx(got.probabilities, rel=ROUNDED)
    other = causal_trace(
        model, words, TEXT, SUBJECT, answer, kind=kind, window=window, samples=3, seed=6
    )
    assert other.corrupted != got.corrupted


def test_everything_put_back_is_clean_and_nothing_is_corrupted(model: Any) -> None:
    run = Corruption(model, tokenizer(), TEXT, SUBJECT, "lob som", samples=4)
    assert (run.prompt_length, run.length) == (5, 6)
    masks = torch.zeros(4, run.length, run.layers, dtype=torch.bool)
    masks[0, :, 0] = True  # all tokens after the first block
    masks[1] = True
    masks[3, :, -1] = True
    found = run.restored(masks)
    assert found[[0, 1, 3]] == pytest.approx(run.clean, rel=ROUNDED)
    assert found[2] == run.corrupted
    assert run.clean != pytest.approx(run.corrupted, rel=0.01)
    # What stands before the subject was never corrupted.
    masks[:] = False
    masks[0, 0] = True
    assert run.restored(masks[:1])[0] == pytest.approx(run.corrupted, rel=ROUNDED)


def test_parts_put_back_everywhere_are_clean_when_the_last_token_gets_all(small: Any) -> None:
    """MLPs and attentions of the last token: what is left of the noise is in no part of it."""
    for kind in ("mlp", "attention"):
        run = Corruption(small, tokenizer(), TEXT, SUBJECT, kind=kind)
        masks = torch.ones(1, run.length, run.layers, dtype=torch.bool)
        if kind == "attention":  # with clean attentions the last token sees nothing of the noise
            assert run.restored(masks)[0] == pytest.approx(run.clean, rel=ROUNDED)
        else:
            assert run.restored(masks)[0] != pytest.approx(run.clean, rel=0.01)


def test_no_noise_no_effect(small: Any) -> None:
    got = causal_trace(small, tokenizer(), TEXT, SUBJECT, noise=0.0, samples=1)
    assert got.corrupted == pytest.approx(got.clean, rel=ROUNDED)
    assert got.effects == pytest.approx(0.0, abs=ROUNDED * got.clean)


def test_facts_and_texts_ask_the_same(small: Any) -> None:
    fact = Fact("kab {} nug pek", SUBJECT, "lob")
    one = causal_trace(small, tokenizer(), fact, answer=fact.target, samples=2)
    two = causal_trace(small, tokenizer(), TEXT + " ", SUBJECT, "lob", samples=2)
    assert one.text == two.text == TEXT
    assert np.array_equal(one.probabilities, two.probabilities)
    # The subject's last occurrence, its first token alone.
    twice = causal_trace(small, tokenizer(), "lod kab lod mif", "lod", samples=2)
    assert twice.subject == range(2, 3)


def test_sigma(small: Any) -> None:
    words = tokenizer(bos=True)
    rows = small.get_input_embeddings().weight.detach()
    ids = [words.convert_tokens_to_ids(w) for w in ("kab", "lod", "mif")]
    sigma = embedding_sigma(small, words, ["kab", "lod mif"])
    assert sigma == pytest.approx(float(rows[ids].std()), rel=1e-12)
    got = causal_trace(small, words, TEXT, SUBJECT, sigma=sigma, noise=2.0, samples=2)
    same = causal_trace(small, words, TEXT, SUBJECT, sigma=2 * sigma, noise=1.0, samples=2)
    assert got.sigma == sigma
    assert got.probabilities == pytest.approx(same.probabilities, rel=ROUNDED)


def test_the_model_is_left_as_it_was(small: Any) -> None:
    weights = {k: v.clone() for k, v in small.state_dict().items()}
    small.train()
    state = torch.random.get_rng_state()
    causal_trace(small, tokenizer(), TEXT, SUBJECT, kind="mlp", samples=2)
    with pytest.raises(ValueError, match="batch must be at least samples, 4; got 3"):
        causal_trace(small, tokenizer(), TEXT, SUBJECT, samples=4, batch=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(m.training for m in small.modules())
    small.eval()
    assert all(torch.equal(v, weights[k]) for k, v in small.state_dict().items())
    assert not any(m._forward_hooks or "forward" in m.__dict__ for m in small.modules())


# --- reading it ---------------------------------------------------------------------------------


def made(effects: Any, subject: range, **changes: Any) -> CausalTrace:
    effects = np.asarray(effects, float)
    about: dict[str, Any] = {
        "text": "a text", "tokens": [f"t{i}" for i in range(len(effects))], "subject": subject,
        "answer": " blue", "kind": "hidden", "window": 1, "noise": 3.0, "sigma": 0.1,
        "samples": 10, "seed": 0, "clean": 0.9, "corrupted": 0.1,
    }  # fmt: skip
    return CausalTrace(**about | changes, probabilities=effects + 0.1)


def test_the_strongest_place() -> None:
    trace = made([[0, 0.1], [0.3, 0.7], [0, 0.2]], range(2))
    assert trace.strongest == (1, 1)
    assert trace.total_effect == pytest.approx(0.8)
    assert "+0.700 by the hidden state of 't1' (token 1) at layer 1" in str(trace)


def test_average_effects() -> None:
    a = made([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0], [7.0], [8.0]], range(1, 5))
    b = made([[10.0], [20.0], [30.0]], range(1))
    found = average_effects([a, b])
    assert {place: float(row[0]) for place, row in found.items()} == pytest.approx(
        {
            "before the subject": 1.0,
            "first subject token": 2.0,
            "middle subject tokens": 3.5,
            "last subject token": (5 + 10) / 2,
            "first token after": (6 + 20) / 2,
            "further tokens": 7.0,
            "last token": (8 + 30) / 2,
        }
    )
    assert "middle subject tokens" not in average_effects([b])
    with pytest.raises(ValueError, match="traces is empty"):
        average_effects([])
    with pytest.raises(ValueError, match="of one kind, window and number of layers"):
        average_effects([a, made([[1.0, 2.0]], range(1))])


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    effects = np.full((6, 12), -0.2)
    effects[2, 3] = 0.7
    trace = made(
        effects, range(1, 3), kind="mlp", window=4, tokens=["a", "$x$", " ", "\n", "é", "b"]
    )
    trace.plot(tmp_path / "trace.png")
    picture = imread(tmp_path / "trace.png")
    assert picture.shape[0] > 300
    assert picture.shape[1] > 600
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 50


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"subject": "som"}, ValueError, "the subject 'som' does not occur in the text 'kab"),
        ({"subject": None}, ValueError, "subject is needed"),
        ({"text": 3}, TypeError, "text must be a string or a Fact; got int"),
        ({"text": Fact("{} kab", "lod", "mif")}, ValueError, "subject is told by the fact: 'lod'"),
        ({"kind": "heads"}, ValueError, "kind must be one of 'hidden', 'mlp', 'attention'"),
        ({"noise": -1}, ValueError, "noise must be 0 or more"),
        ({"sigma": 0}, ValueError, "sigma must be positive"),
        ({"samples": 0}, ValueError, "samples must be at least 1"),
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"batch": 0}, ValueError, "batch must be at least 1"),
        ({"seed": "x"}, TypeError, "seed must be an int"),
    ],
)
def test_bad_input(small: Any, options: dict[str, Any], error: type, says: str) -> None:
    given: dict[str, Any] = {"text": TEXT, "subject": SUBJECT, "samples": 1, **options}
    with pytest.raises(error, match=says):
        causal_trace(small, tokenizer(), given.pop("text"), **given)


def test_other_bad_input(small: Any) -> None:
    run = Corruption(small, tokenizer(), TEXT, SUBJECT)
    with pytest.raises(ValueError, match=r"masks must be \[N, 5, 3\]: .* got \[1, 5, 2\]"):
        run.restored(torch.zeros(1, 5, 2))
    with pytest.raises(ValueError, match="subjects is empty"):
        embedding_sigma(small, tokenizer(), [])
    with pytest.raises(TypeError, match="subjects must be a list"):
        embedding_sigma(small, tokenizer(), "kab")
    broken = MODELS["llama"]()
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    with pytest.raises(NonFiniteError, match="the model's logits after 'kab"):
        causal_trace(broken, tokenizer(), TEXT, SUBJECT, "lob")
