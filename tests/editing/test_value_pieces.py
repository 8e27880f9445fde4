"""How values are cut into runs does not show in them: pieces, common beginnings, the last MLP."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from cl_fast.editing import values
from cl_fast.editing.facts import Fact
from cl_fast.editing.values import ValueOptions, Values, group_facts, optimise_values
from cl_fast.models.blocks import decoder_of

FACTS = [
    Fact("the {} sat on", "cat", "mat"),
    Fact("and then the {} ran under the", "dog", "tree and mat"),
    Fact("{} ran on", "tree", "cat"),
    Fact("the {} ran", "mat tree", "on the dog"),
    Fact("{} and", "dog", "dog"),
    Fact("a cat and a {} sat on the", "tree", "mat"),
]
CONTEXTS = ["a dog sat on a mat and ", "then the cat ran under "]
OPTIONS = ValueOptions(steps=7, lr=0.3, clamp=0.4, stop_loss=4.2, weight_decay=0.1)


def found(model: Any, **more: Any) -> Values:
    tokenizer = tiny_models.tokenizer()
    return optimise_values(
        decoder_of(model), tokenizer, group_facts(FACTS, tokenizer), 1, contexts=CONTEXTS,
        options=OPTIONS, **more,
    )  # fmt: skip


def same(got: Values, want: Values) -> None:
    assert [r["steps"] for r in got.report] == [r["steps"] for r in want.report]
    torch.testing.assert_close(got.z, want.z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 20, 60])
def test_pieces_do_not_show(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.llama(num_hidden_layers=3).double().eval()
    want = found(model)
    steps = {r["steps"] for r in want.report}
    assert len(steps) > 1, "facts leave at different steps, and whole pieces with them"
    counts: list[int] = []
    rows: list[int] = []
    own = values._Batch.step

    def step(self: Any, number: int) -> bool:
        counts.append(len(self.parts))
        rows.append(sum(len(part.ids) for part in self.parts))
        return own(self, number)

    monkeypatch.setattr(values._Batch, "step", step)
    monkeypatch.setattr(values, "_CPU_TOKENS", tokens)
    same(found(model), want)
    assert max(counts) > 1
    assert rows[-1] == (1 + len(CONTEXTS)) * sum(r["steps"] == 7 for r in want.report) < rows[0]
    if tokens == 1:
        assert counts[0] == len(FACTS)
        assert counts[-1] < len(FACTS)


def test_common_beginnings_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.llama(num_hidden_layers=3).double().eval()
    read = [0]
    own = values.padded_left

    def counted(rows: Any, *more: Any) -> Any:
        read[0] += sum(map(len, rows))
        return own(rows, *more)

    monkeypatch.setattr(values, "padded_left", counted)
    want = found(model)
    once, read[0] = read[0], 0
    monkeypatch.setattr(values, "_common", lambda rows: [])
    same(found(model), want)
    words = [len(context.split()) for context in CONTEXTS]
    assert read[0] - once >= (len(FACTS) - 1) * sum(words)


def test_a_window_is_not_stretched_by_padding() -> None:
    """A block that sees a few tokens back: padding in the middle would count among them."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = MistralConfig(
        vocab_size=67, sliding_window=6, initializer_range=0.4, **sizes, **heads
    )  # fmt: skip
    model = MistralForCausalLM(config).double().eval()
    want = found(model, batch=1)
    same(found(model), want)


def test_the_last_mlp_works_where_the_head_looks() -> None:
    for model in (tiny_models.llama().eval(), tiny_models.gpt2(3, n_layer=3).eval()):
        decoder = decoder_of(model)
        mlp = values._last_mlp(decoder)
        assert mlp is decoder.blocks[-1].mlp
        x = torch.randn(2, 5, 16)
        row, column = torch.tensor([0, 1, 1]), torch.tensor([4, 0, 3])
        whole = mlp(x)
        with values._only_at(mlp, row, column):
            some = mlp(x)
        torch.testing.assert_close(some[row, column], whole[row, column])
        assert int((some != 0).any(-1).sum()) == 3
        torch.testing.assert_close(mlp(x), whole)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    experts = MixtralForCausalLM(MixtralConfig(vocab_size=67, **sizes, **heads))
    assert values._last_mlp(decoder_of(experts)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_written_out_gelu_is_fused_but_in_16_bits(dtype: torch.dtype) -> None:
    model = tiny_models.gpt2(3, n_layer=3).to(dtype).eval()
    act = model.transformer.h[0].mlp.act
    x = torch.randn(50, dtype=dtype)
    want = act(x)
    with values.fused_activations(decoder_of(model)):
        replaced = "forward" in act.__dict__
        got = act(x)
    assert replaced == (dtype != torch.bfloat16)
    assert "forward" not in act.__dict__
    torch.testing.assert_close(got, want)
