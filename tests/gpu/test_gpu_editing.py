"""Editors on a card against the CPU: the same keys and updates; patches on and off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from cl_fast.editing import AlphaEdit, Emmet, Fact, KeyStats, Memit, Rome

pytestmark = pytest.mark.gpu

WORDS = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(97))]
FACTS = [
    Fact(
        "{} w1 w2" if i % 2 else "w3 w4 {} w5",
        f"w{20 + i} w{40 + i}",
        f"w{60 + i} w{70 + i}" if i % 2 else f"w{60 + i}",
        f"f{i}",
    )
    for i in range(8)
]
CONTEXTS = ["w7 w8 w9", "w10 w11"]
LAYERS = (1, 2)


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def model(family: str, device: Any, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    if family == "llama":
        config = LlamaConfig(
            vocab_size=len(WORDS), hidden_size=64, intermediate_size=96, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        )  # fmt: skip
        made: Any = LlamaForCausalLM(config)
    else:
        made = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(WORDS), n_embd=64, n_layer=4, n_head=4, initializer_range=0.2,
                bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip
    return made.to(device, dtype).eval()


def texts() -> list[str]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, len(WORDS), (40, 32), generator=generator)
    return [" ".join(WORDS[i] for i in row) for row in ids.tolist()]


def stats(of: Any) -> KeyStats:
    return KeyStats.collect(of, tokenizer(), texts=texts(), layers=LAYERS, tokens=1280)


def relative(got: Tensor, want: Tensor) -> float:
    want = want.double().cpu()
    return float((got.double().cpu() - want).norm() / want.norm())


EDITORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "memit": (Memit, {"layers": LAYERS, "prior_weight": 100.0}),
    "ends": (Memit, {"layers": LAYERS, "prior_weight": 100.0, "spread": "ends"}),
    "rome": (Rome, {"layers": [1]}),
    "emmet": (Emmet, {"layers": [2]}),
    "alphaedit": (AlphaEdit, {"layers": LAYERS, "energy": 0.9}),
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_statistics_are_those_of_the_cpu(device: torch.device, family: str) -> None:
    want = stats(model(family, "cpu", torch.float64))
    got = stats(model(family, device, torch.float64))
    for layer in LAYERS:
        assert relative(got.moment(layer), want.moment(layer)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", EDITORS)
def test_an_editor_finds_what_it_finds_on_the_cpu(
    device: torch.device, family: str, name: str
) -> None:
    """In float64, where the order of sums does not show; deltas are kept in float32."""
    kind, options = EDITORS[name]
    shared = stats(model(family, "cpu", torch.float64))
    shared.any_model = True
    patches = []
    for place in ("cpu", device):
        editor = kind(
            model(family, place, torch.float64), tokenizer(), shared, contexts=CONTEXTS, steps=6,
            lr=0.1, **options,
        )  # fmt: skip
        patches.append(editor.fit(FACTS))
    for want, got in zip(patches[0].layers, patches[1].layers, strict=True):
        assert got.base_hash == want.base_hash
        assert relative(got.delta, want.delta) < 1e-3
        assert want.keys is not None
        assert got.keys is not None
        assert relative(got.keys, want.keys) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_patch_goes_on_and_comes_off(
    device: torch.device, family: str, dtype: torch.dtype
) -> None:
    on = model(family, device, dtype)
    before = {name: p.detach().clone() for name, p in on.named_parameters()}
    editor = Memit(
        on, tokenizer(), stats(on), layers=LAYERS, prior_weight=10.0, contexts=CONTEXTS, steps=5,
        lr=0.1,
    )  # fmt: skip
    patch = editor.fit(FACTS)
    for name, p in on.named_parameters():
        assert torch.equal(p, before[name]), "fit leaves the weights as they are"
    patch.apply()
    unit = torch.finfo(dtype).eps / 2
    for layer in patch.layers:
        got = on.get_parameter(layer.weight_name).detach()
        delta = layer.delta.to(device)
        exact = before[layer.weight_name].double() + delta  # both as the weight is stored
        slack = 1e-5 * float(delta.abs().max()) + unit * exact.abs() * 1.01 + 1e-7
        assert bool(((got.double() - exact).abs() <= slack).all())
        assert not torch.equal(got, before[layer.weight_name])
    patch.undo()
    for name, p in on.named_parameters():
        assert torch.equal(p, before[name])
    with pytest.raises(RuntimeError, match="on purpose"), patch:
        raise RuntimeError("on purpose")
    for name, p in on.named_parameters():
        assert torch.equal(p, before[name])


def test_history_on_a_card_is_the_joint_fit(device: torch.device) -> None:
    on = model("llama", device, torch.float64)
    editor = Memit(
        on, tokenizer(), stats(on), layers=[1], prior_weight=10.0, contexts=CONTEXTS, steps=4
    )
    first = editor.fit(FACTS[:4])
    both = editor.fit(FACTS[4:], after=first)
    assert len(both) == len(FACTS)
    without = both.drop([fact.id for fact in FACTS[4:]])
    assert relative(without.layers[0].delta, first.layers[0].delta) < 1e-9
