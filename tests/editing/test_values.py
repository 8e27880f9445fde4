"""Batched values against a loop that takes one fact at a time, whole prompts, whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from cl_fast.editing.facts import Fact, encode
from cl_fast.editing.values import ValueOptions, group_facts, optimise_values
from cl_fast.models.blocks import decoder_of

FACTS = [
    Fact("the {} sat on", "cat", "mat"),
    Fact("and then the {} ran under the", "dog", "tree and mat"),
    Fact("{} ran on", "tree", "cat"),
    Fact("the {} ran", "mat tree", "on the dog"),
    Fact("{} and", "dog", "dog"),
]
CONTEXTS = ["a dog sat on a mat and "]


def granite() -> GraniteForCausalLM:
    torch.manual_seed(6)
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "residual_multiplier": 0.4}
    return GraniteForCausalLM(
        GraniteConfig(
            vocab_size=67, hidden_size=16, intermediate_size=32, num_hidden_layers=3, **sizes,
            initializer_range=0.5, logits_scaling=2.0,
        )
    )  # fmt: skip


def opt() -> OPTForCausalLM:
    torch.manual_seed(4)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=67, hidden_size=16, ffn_dim=32, num_hidden_layers=3, num_attention_heads=2,
            max_position_embeddings=64, word_embed_proj_dim=16, init_std=0.3,
        )
    )  # fmt: skip


MODELS = {
    "llama": lambda: tiny_models.llama(num_hidden_layers=3),
    "gpt2": lambda: tiny_models.gpt2(3, n_layer=3),
    "gemma3": lambda: tiny_models.gemma3(5, num_hidden_layers=3),
    "granite": granite,
    "opt": opt,
}


def one_by_one(
    model: Any, tokenizer: Any, facts: list[Fact], layer: int, o: ValueOptions
) -> tuple[Tensor, int, float]:
    """compute_z of one group, from the formulas: (delta, steps, loss)."""
    block = decoder_of(model).blocks[layer]
    site = decoder_of(model).site(layer)
    delta = torch.zeros(16, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=o.lr)
    module = block if o.where == "stream" else site.module
    start: list[Tensor] = []

    def logits(ids: list[int], at: int) -> Tensor:
        def add(_: Any, __: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            rows = hidden.view(-1, hidden.size(-1))
            if not start:
                start.append(rows[at].detach().clone())
            rows[at] = rows[at] + delta
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        hook = module.register_forward_hook(add)
        try:
            return model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        finally:
            hook.remove()

    first = None
    for step in range(o.steps):
        nll = 0.0
        kl: Any = 0.0
        for fact in facts:
            mine = 0.0
            for context in ["", *CONTEXTS]:
                span = tuple(x + len(context) for x in fact.subject_span)
                e = encode(tokenizer, context + fact.text, span, fact.target)
                rows = logits(e.ids[:-1], e.lookup)
                mine = mine - sum(rows[i - 1, e.ids[i]] for i in e.targets) / len(e.targets)
            nll = nll + mine / (1 + len(CONTEXTS)) / len(facts)
        words = facts[0].subject + " is a"
        e = encode(tokenizer, words, (0, len(facts[0].subject)))
        now = logits(e.ids[: e.lookup + 1], e.lookup)[e.lookup]
        if first is None:
            first = now.detach()
        kl = (now.exp() * (now - first)).sum()
        norm = start[0].norm()
        size = delta.norm() if float(delta.detach().norm()) else torch.zeros(())
        loss = nll + o.kl_factor * kl + o.weight_decay * size / norm**2
        if float(loss.detach()) < o.stop_loss or step == o.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            if delta.norm() > o.clamp * norm:
                delta.mul_(o.clamp * norm / delta.norm())
    return delta.detach(), step + 1, float(loss.detach())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("where", ["stream", "mlp"])
def test_batched_is_the_loop(name: str, where: Any) -> None:
    model = MODELS[name]().double().eval()
    tokenizer = tiny_models.tokenizer()
    o = ValueOptions(
        steps=9, lr=0.5, clamp=0.2, stop_loss=4.0, where=where, weight_decay=0.1, kl_factor=0.3
    )
    groups = group_facts(FACTS, tokenizer)
    assert [g.ids for g in groups] == [(f.id,) for f in FACTS]
    got = optimise_values(
        decoder_of(model), tokenizer, groups, 1, contexts=CONTEXTS, options=o, batch=4
    )
    stopped = set()
    for i, group in enumerate(groups):
        delta, steps, loss = one_by_one(model, tokenizer, list(group.facts), 1, o)
        stopped.add(steps)
        assert got.report[i]["steps"] == steps
        assert abs(got.report[i]["loss"] - loss) < 1e-5 * max(1, abs(loss))
        torch.testing.assert_close(got.delta[i].double(), delta, rtol=1e-5, atol=1e-5)
    if name == "llama" and where == "stream":
        assert len(stopped) > 1, "facts that stop at different steps are the point"
        assert any(r["clamped"] for r in got.report)


def test_relations_of_one_subject_share_a_value() -> None:
    facts = [Fact("{} sat on", "cat", "mat"), Fact("{} ran", "cat", "a dog"), FACTS[2]]
    tokenizer, model = tiny_models.tokenizer(), tiny_models.llama().double().eval()
    groups = group_facts(facts, tokenizer)
    assert [g.facts for g in groups] == [(facts[0], facts[1]), (facts[2],)]
    o = ValueOptions(steps=6, lr=0.3, clamp=2.0, weight_decay=0.1)
    got = optimise_values(decoder_of(model), tokenizer, groups, 0, contexts=CONTEXTS, options=o)
    delta, _, loss = one_by_one(model, tokenizer, facts[:2], 0, o)
    torch.testing.assert_close(got.delta[0].double(), delta, rtol=1e-5, atol=1e-5)
    assert abs(got.report[0]["loss"] - loss) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_company_order_and_prefixes_do_not_show(name: str) -> None:
    model, tokenizer = MODELS[name]().eval(), tiny_models.tokenizer()
    decoder = decoder_of(model)
    o = ValueOptions(steps=8, lr=0.2, clamp=1.0, stop_loss=0.5)
    whole = optimise_values(decoder, tokenizer, group_facts(FACTS, tokenizer), 1, options=o)
    for other in (
        optimise_values(decoder, tokenizer, group_facts(FACTS, tokenizer), 1, options=o, batch=1),
        optimise_values(
            decoder, tokenizer, group_facts(FACTS, tokenizer), 1,
            options=ValueOptions(**{**o.to_dict(), "suffix": False}),
        ),
        optimise_values(
            decoder, tokenizer, group_facts(FACTS[::-1], tokenizer), 1, options=o
        ).take([4, 3, 2, 1, 0]),
    ):  # fmt: skip
        assert (other.z - whole.z).abs().max() <= 1e-5 * whole.z.abs().max()
        assert [r["steps"] for r in other.report] == [r["steps"] for r in whole.report]


def test_padding_is_no_distance() -> None:
    """MPT's ALiBi counts columns, not positions."""
    torch.manual_seed(1)
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 3, "max_seq_len": 64, "vocab_size": 67}
    model = MptForCausalLM(MptConfig(**sizes, initializer_range=0.3)).eval()
    decoder, tokenizer = decoder_of(model), tiny_models.tokenizer()
    facts = [
        Fact("the {} sat on", "cat", "mat"),
        Fact("the cat and then the mat and the tree and the {} ran under", "dog", "tree"),
    ]
    groups = group_facts(facts, tokenizer)
    o = ValueOptions(steps=4, lr=0.3)
    together = optimise_values(decoder, tokenizer, groups, 1, contexts=CONTEXTS, options=o)
    for i, group in enumerate(groups):
        alone = optimise_values(decoder, tokenizer, [group], 1, contexts=CONTEXTS, options=o)
        torch.testing.assert_close(together.z[i], alone.z[0], rtol=1e-4, atol=1e-5)


def test_the_model_stays_as_it_was() -> None:
    model, tokenizer = tiny_models.llama().eval(), tiny_models.tokenizer()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimise_values(
        decoder_of(model), tokenizer, group_facts(FACTS, tokenizer), 0,
        options=ValueOptions(steps=3),
    )  # fmt: skip
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or "forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"lr": 0.0}, ValueError, "lr must be positive"),
        ({"clamp": -1.0}, ValueError, "clamp must be positive"),
        ({"kl_factor": -1}, ValueError, "kl_factor must be 0 or more"),
        ({"kl_prompt": "is a"}, ValueError, "kl_prompt must have one {}"),
        ({"where": "attention"}, ValueError, "where must be one of 'stream', 'mlp'"),
    ],
)
def test_bad_options(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ValueOptions(**change)


@pytest.mark.parametrize(
    ("fact", "words"),
    [
        (Fact("the {} sat on", "cat", "mat"), "block 1 is the last: .* 'the cat sat on mat'"),
        (Fact("the {} sat on", "zebra", "mat"), "the subject of .* has a word that the tokenizer"),
        (Fact("the {} sat on", "cat", "zebra mat"), "the target of .* has a word"),
        (Fact("the " * 80 + "{} sat on", "cat", "mat"), "takes 84 tokens, but the model has 64"),
    ],
)
def test_facts_that_cannot_be_edited(fact: Fact, words: str) -> None:
    model, tokenizer = tiny_models.llama().eval(), tiny_models.tokenizer()
    with pytest.raises(ValueError, match=words):
        optimise_values(decoder_of(model), tokenizer, group_facts([fact], tokenizer), 1)


def test_the_tokenizer_of_another_model_is_refused() -> None:
    model, tokenizer = tiny_models.llama(vocab_size=9).eval(), tiny_models.tokenizer()
    with pytest.raises(ValueError, match="vocabulary has 9: this is the tokenizer of another"):
        optimise_values(decoder_of(model), tokenizer, group_facts(FACTS, tokenizer), 0)


def test_the_last_block_serves_what_follows_at_once() -> None:
    model, tokenizer = tiny_models.llama().eval(), tiny_models.tokenizer()
    fact = Fact("the {}", "cat", "mat")
    nlls = [
        optimise_values(
            decoder_of(model), tokenizer, group_facts([fact], tokenizer), 1,
            options=ValueOptions(steps=steps, weight_decay=0.0, clamp=5.0),
        ).report[0]["nll"]
        for steps in (1, 25)
    ]  # fmt: skip
    assert nlls[1] < nlls[0] / 2


def test_a_loss_that_is_not_finite_names_its_fact() -> None:
    model, tokenizer = tiny_models.llama().eval(), tiny_models.tokenizer()
    dog = tokenizer.convert_tokens_to_ids("dog")
    with torch.no_grad():
        model.get_input_embeddings().weight[dog] = float("nan")
    facts = [Fact("the {} sat on", "cat", "mat"), Fact("the {} sat on", "dog", "mat")]
    with pytest.raises(ValueError, match=r"the loss of \['the dog sat on'\] is not finite"):
        optimise_values(
            decoder_of(model), tokenizer, group_facts(facts, tokenizer), 0,
            options=ValueOptions(kl_factor=0),
        )  # fmt: skip
