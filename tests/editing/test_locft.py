"""Fine-tuning of one matrix: a plain loop gives the same bits, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fact_models
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_fast.editing.evaluation import evaluate
from cl_fast.editing.facts import Fact
from cl_fast.editing.finetuning import LocFT
from cl_fast.editing.patch import Patch
from cl_fast.errors import NonFiniteError

FACTS = [
    Fact("the {} sat on", "cat", "tree"),
    Fact("a {} ran under", "dog", "the mat"),
    Fact("the {} ran", "dog", "then"),
    Fact("and then the {} sat", "dog", "under a tree", id="long"),
    Fact("a {} sat under", "cat", "mat"),
]
HOW: dict[str, Any] = {"layer": 1, "lr": 2e-2, "epochs": 3, "batch_size": 2, "keep_prefix": False}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_models.tokenizer()


def llama() -> Any:
    return tiny_models.llama().eval()


def gpt2() -> Any:
    return tiny_models.gpt2(1, n_inner=24, n_positions=32).eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {n: x.clone() for n, x in model.state_dict().items()}


def plain_loop(
    model: Any, weight: Tensor, tokenizer: Any, *, eos: bool = True, adamw: bool = False
) -> Tensor:
    """The paper's training, as one would write it for this case alone: [facts] with weight 1."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is weight)
    kind = torch.optim.AdamW if adamw else torch.optim.Adam
    optimizer = kind([weight], lr=HOW["lr"], weight_decay=0.1 if adamw else 0.0)
    generator = torch.Generator().manual_seed(5)
    end = [tokenizer.eos_token_id] if eos else []
    rows = []
    for fact in FACTS:
        prompt = tokenizer(fact.prompt.format(fact.subject))["input_ids"]
        target = tokenizer(fact.target)["input_ids"] + end
        rows.append((prompt, target))
    for _ in range(HOW["epochs"]):
        order = torch.randperm(len(rows), generator=generator)
        for some in order.split(HOW["batch_size"]):
            batch = [rows[i] for i in some]
            width = max(len(p + t) for p, t in batch)
            ids = torch.tensor([p + t + [0] * (width - len(p + t)) for p, t in batch])
            mask = torch.tensor([[1] * len(p + t) + [0] * (width - len(p + t)) for p, t in batch])
            hidden = model.base_model(ids, attention_mask=mask).last_hidden_state
            before = torch.cat(
                [hidden[i, len(p) - 1 : len(p + t) - 1] for i, (p, t) in enumerate(batch)]
            )
            losses = F.cross_entropy(
                model.lm_head(before),
                torch.tensor([token for _, t in batch for token in t]),
                reduction="none",
            )
            facts = losses.split([len(t) for _, t in batch])
            optimizer.zero_grad()
            torch.stack([each.sum() / len(each) for each in facts]).mean().backward()
            optimizer.step()
    return weight.detach()


@pytest.mark.parametrize(
    ("make", "name", "options"),
    [
        (llama, "model.layers.1.mlp.down_proj", {}),
        (llama, "model.layers.1.mlp.down_proj", {"eos": False}),
        (llama, "model.layers.1.mlp.down_proj", {"optimizer": "adamw", "weight_decay": 0.1}),
        (gpt2, "transformer.h.1.mlp.c_proj", {}),
    ],
)
def test_a_plain_loop_gives_the_same_bits(
    make: Any, name: str, options: dict[str, Any], tokenizer: Any
) -> None:
    model, twin = make(), make()
    before = state(model)
    patch = LocFT(model, tokenizer, seed=5, stop=0.0, **HOW, **options).fit(FACTS)
    loop = plain_loop(
        twin, twin.get_submodule(name).weight, tokenizer, eos=options.get("eos", True),
        adamw="optimizer" in options,
    )  # fmt: skip
    base = before[f"{name}.weight"]
    assert (loop - base).abs().max() > 0.02
    assert patch.layers[0].name == name
    assert torch.equal(patch.layers[0].delta + base.double(), loop.double())
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    with patch:
        edited = state(model)
    torch.testing.assert_close(edited[f"{name}.weight"], loop, rtol=1e-7, atol=2**-26)
    assert [n for n in before if not torch.equal(edited[n], before[n])] == [f"{name}.weight"]
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())


def test_the_prefix_that_is_kept_gives_the_same(tokenizer: Any) -> None:
    model = llama().double()
    how = {**HOW, "seed": 2, "lr": 1e-2, "epochs": 6, "stop": 0.0}
    one, two = (
        LocFT(model, tokenizer, **{**how, "keep_prefix": kept}).fit(FACTS) for kept in (False, True)
    )
    torch.testing.assert_close(one.layers[0].delta, two.layers[0].delta, rtol=1e-7, atol=1e-8)
    calls = []
    attention = model.model.layers[0].self_attn
    hook = attention.register_forward_hook(lambda *_: calls.append(1))
    LocFT(model, tokenizer, **{**how, "keep_prefix": True}).fit(FACTS)
    hook.remove()
    # Three batches; two calls see what kind of thing a block gives, and how block 1 writes.
    assert len(calls) <= 3 + 2


def test_only_the_matrix_has_a_graph(tokenizer: Any) -> None:
    model = llama()
    frozen = model.model.norm.weight.requires_grad_(False)
    grad = torch.full_like(model.model.layers[1].mlp.down_proj.weight, 3.0)
    model.model.layers[1].mlp.down_proj.weight.grad = grad
    model.train()
    seen: dict[str, set[bool]] = {}

    def look(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, Tensor):
                seen.setdefault(name, set()).add(output.requires_grad)

        return hook

    editor = LocFT(model, tokenizer, **HOW)
    hooks = [m.register_forward_hook(look(n)) for n, m in model.named_modules() if n]
    editor.fit(FACTS)
    for hook in hooks:
        hook.remove()
    assert seen["model.layers.0"] == {False}
    assert seen["model.layers.1.self_attn"] == {False}
    assert seen["model.layers.1.mlp.down_proj"] == {True}
    wants = {n: p.requires_grad for n, p in model.named_parameters()}
    assert not frozen.requires_grad
    assert [n for n, wanted in wants.items() if not wanted] == ["model.norm.weight"]
    assert model.model.layers[1].mlp.down_proj.weight.grad is grad
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        "model.layers.1.mlp.down_proj.weight"
    }
    assert model.training
    assert model.model.layers[0].training


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, fact: Fact, count: int) -> list[int]:
    ids = tokenizer(fact.text)["input_ids"]
    out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    return out[0, len(ids) :].tolist()


def test_facts_are_learnt_and_answers_end(tokenizer: Any) -> None:
    model = tiny_models.llama(hidden_size=32, intermediate_size=64).eval()
    facts = [FACTS[0], FACTS[3]]
    how = {**HOW, "lr": 5e-2, "epochs": 60, "batch_size": 1, "keep_prefix": True}
    before = [greedy(model, tokenizer, fact, 8) for fact in facts]
    patch = LocFT(model, tokenizer, stop=0.05, **how).fit(facts)
    report = patch.report
    assert report["stopped"]
    assert report["losses"][-1] < 0.05
    assert report["steps"] < 2 * len(report["losses"]) <= 2 * 60
    assert set(report["facts"]) == {fact.id for fact in facts}
    wanted = [[*tokenizer(fact.target)["input_ids"], tokenizer.eos_token_id] for fact in facts]
    with patch:
        assert [greedy(model, tokenizer, fact, 8) for fact in facts] == wanted
    assert [greedy(model, tokenizer, fact, 8) for fact in facts] == before != wanted


def test_what_it_does_to_a_model_that_knows_facts() -> None:
    """It learns, and its answers to paraphrases follow; what it costs the neighbours shows."""
    made = fact_models.fact_model(0)
    facts, suite = made.world.edits(50, 0), ["es", "ps", "ns", "greedy"]
    before = evaluate(made.model, made.tokenizer, facts, suite=suite)
    patch = LocFT(made.model, made.tokenizer, layer=1, lr=5e-3, batch_size=10).fit(facts)
    with patch:
        after = evaluate(made.model, made.tokenizer, facts, suite=suite)
    assert before.mean("es") <= 0.05
    assert after.mean("es") >= 0.95
    assert after.mean("greedy") >= 0.95
    assert after.mean("ps") >= before.mean("ps") + 0.6
    assert before.mean("ns") > after.mean("ns") > 0.4
    again = evaluate(made.model, made.tokenizer, facts, suite=suite)
    assert again.rows == before.rows


def test_weights_of_facts_decide(tokenizer: Any) -> None:
    """Two facts that pull at one token: the heavier one ends with the smaller loss."""
    model = llama()
    losses = []
    for weight in (1.0, 50.0):
        facts = [FACTS[0], Fact("the {} sat on", "dog", "mat", weight=weight)]
        how = {**HOW, "epochs": 1, "batch_size": 2, "optimizer": "adamw"}
        patch = LocFT(model, tokenizer, **how).fit(facts)
        losses.append(patch.report["losses"][0])
        each = [patch.report["facts"][fact.id]["loss"] for fact in facts]
        expected = (each[0] + weight * each[1]) / (1 + weight)
        assert losses[-1] == pytest.approx(expected, rel=1e-6)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_state(tokenizer: Any) -> None:
    model = llama()
    torch.manual_seed(3)
    expected = torch.random.get_rng_state()
    one = LocFT(model, tokenizer, **HOW, seed=1).fit(FACTS)
    assert torch.equal(torch.random.get_rng_state(), expected)
    torch.manual_seed(4)
    again = LocFT(model, tokenizer, **HOW, seed=1).fit(FACTS)
    other = LocFT(model, tokenizer, **HOW, seed=2).fit(FACTS)
    assert torch.equal(one.layers[0].delta, again.layers[0].delta)
    assert not torch.equal(one.layers[0].delta, other.layers[0].delta)


def test_a_lower_precision_is_trained_in_float32(tokenizer: Any) -> None:
    """Steps far below bfloat16's spacing add up."""
    model = llama().to(torch.bfloat16)
    base = model.model.layers[1].mlp.down_proj.weight.detach().clone()
    how = {**HOW, "lr": 1e-5, "epochs": 20, "batch_size": 5}
    patch = LocFT(model, tokenizer, **how).fit(FACTS)
    delta = patch.layers[0].delta
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, base)
    assert 5e-5 < float(delta.abs().max()) <= 2.1e-4
    with patch:
        now = model.model.layers[1].mlp.down_proj.weight.detach()
        assert torch.equal(now, (base.float() + delta.float()).bfloat16())


def test_the_rank_of_the_patch_and_its_error_are_told(tokenizer: Any, tmp_path: Path) -> None:
    model = llama()
    whole = LocFT(model, tokenizer, **HOW).fit(FACTS)
    thin = LocFT(model, tokenizer, rank=3, **HOW).fit(FACTS)
    delta = whole.layers[0].delta
    sizes = torch.linalg.svdvals(delta)
    expected = float(sizes[3:].square().sum().sqrt() / delta.norm())
    assert (whole.rank, thin.rank) == (16, 3)
    assert whole.report["truncation"] == 0.0
    assert thin.report["truncation"] == pytest.approx(expected, rel=1e-9)
    error = (thin.layers[0].delta - delta).norm() / delta.norm()
    assert float(error) == pytest.approx(expected, rel=1e-9)
    for patch in (whole, thin):
        patch.save(tmp_path / "patch.safetensors")
        read = Patch.load(tmp_path / "patch.safetensors", model)
        with patch:
            ours = state(model)
        with read:
            theirs = state(model)
        assert all(torch.equal(x, theirs[n]) for n, x in ours.items())
        assert read.report == patch.report


def test_one_fit_after_another(tokenizer: Any) -> None:
    model = llama()
    editor = LocFT(model, tokenizer, **HOW, seed=3)
    first = editor.fit(FACTS[:2])
    both = editor.fit(FACTS[2:], after=first)
    assert list(both.facts) == [fact.id for fact in FACTS]
    # The same training, on a model that has the first patch in its weights.
    twin = llama()
    with first:
        twin.load_state_dict(model.state_dict())
    second = LocFT(twin, tokenizer, **HOW, seed=3).fit(FACTS[2:])
    total = first.layers[0].delta + second.layers[0].delta
    torch.testing.assert_close(both.layers[0].delta, total, rtol=0, atol=1e-6)
    grown = first.upsert(FACTS[2:])
    assert torch.equal(grown.layers[0].delta, both.layers[0].delta)


def test_auto_takes_the_depth_of_the_paper(tokenizer: Any) -> None:
    assert LocFT(llama(), tokenizer).layer == 1  # 22 of 32 blocks
    deep = tiny_models.llama(num_hidden_layers=8)
    assert LocFT(deep, tokenizer).layer == 5
    deep.config.model_type = "qwen2"  # 6 of 28
    assert LocFT(deep, tokenizer).layer == 1


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": 0}, ValueError, "lr must be positive"),
    ({"lr": "fast"}, TypeError, "lr must be a number"),
    ({"epochs": 0}, ValueError, "epochs must be at least 1"),
    ({"batch_size": 1.5}, TypeError, "batch_size must be an int"),
    ({"stop": -1}, ValueError, "stop must be 0 or more"),
    ({"optimizer": "sgd"}, ValueError, "optimizer must be one of 'adam', 'adamw'"),
    ({"weight_decay": float("nan")}, ValueError, "weight_decay"),
    ({"layer": 2}, ValueError, r"layer must be in \[0, 1\]"),
    ({"layer": "middle"}, TypeError, "layer must be"),
    ({"rank": 17}, ValueError, "rank must be at most 16"),
    ({"rank": 0}, ValueError, "rank must be at least 1"),
    ({"seed": 1.0}, TypeError, "seed must be an int"),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD)
def test_bad_options(
    options: dict[str, Any], error: type[Exception], words: str, tokenizer: Any
) -> None:
    with pytest.raises(error, match=words):
        LocFT(llama(), tokenizer, **options)


def test_bad_facts_and_patches(tokenizer: Any) -> None:
    model = llama()
    before = state(model)
    editor = LocFT(model, tokenizer, **HOW)
    first = editor.fit(FACTS[:1])
    elsewhere = LocFT(model, tokenizer, **{**HOW, "layer": 0}).fit(FACTS[:1])
    foreign = LocFT(tiny_models.llama(7), tokenizer, **HOW).fit(FACTS[:1])
    long = Fact("the {} sat " + "on the mat and " * 20, "cat", "tree")
    other = Fact(FACTS[0].prompt, FACTS[0].subject, "mat", id="other")
    cases: list[tuple[list[Fact], Patch | None, str]] = [
        ([], None, "facts is empty"),
        ([FACTS[0], other], None, "contradict each other"),
        ([FACTS[0]], first, "there twice"),
        ([long], None, "more than the 64 positions"),
        ([FACTS[1]], elsewhere, "only a patch of 'model.layers.1.mlp.down_proj' alone"),
        ([FACTS[1]], foreign, "fitted on another base"),
    ]
    for facts, after, words in cases:
        with pytest.raises(ValueError, match=words):
            editor.fit(facts, after=after)
    for how in ("merge", "branch"):
        first.apply(how=how)
        with pytest.raises(
            ValueError, match=r"has a patch on it \(LocFT of 1 facts\): undo it first"
        ):
            editor.fit([FACTS[1]], after=first)
        first.undo()
    with pytest.raises(ValueError, match="factors belong to all of its facts together"):
        first.drop([FACTS[0].id])
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    tokenizer = tiny_models.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token to learn: give eos=False"):
        LocFT(model, tokenizer)
    LocFT(model, tokenizer, eos=False, **{**HOW, "epochs": 1}).fit(FACTS[:1])


def test_a_loss_that_is_not_finite_leaves_the_model(tokenizer: Any) -> None:
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("and")] = float("nan")
    before = state(model)
    editor = LocFT(model, tokenizer, **HOW)
    with pytest.raises(NonFiniteError, match=r"loss of the facts \['long'\] is not finite after"):
        editor.fit(FACTS)
    after = model.state_dict()
    assert all(torch.equal(x.nan_to_num(), after[n].nan_to_num()) for n, x in before.items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
