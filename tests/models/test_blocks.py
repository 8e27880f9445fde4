"""Decoder blocks of many families: the matrix that writes, and runs of a part of the blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from cl_fast.models.blocks import Decoder, blocks_of, cache_rows, decoder_of

SIZES: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
FEW: dict[str, Any] = {**SIZES, "num_key_value_heads": 1}
OLD: dict[str, Any] = {
    "vocab_size": 67, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OPT: dict[str, Any] = {**SIZES, "ffn_dim": 40, "word_embed_proj_dim": 16}
OPT.pop("intermediate_size")

MODELS: dict[str, tuple[Callable[[], Any], str, float, str]] = {
    "llama": (lambda: tiny_models.llama(num_hidden_layers=3), "model.layers.1.mlp.down_proj", 1,
              ""),
    "gemma2": (tiny_models.gemma2, "model.layers.1.mlp.down_proj", 1, "Gemma2RMSNorm"),
    "gemma3": (lambda: Gemma3ForCausalLM(Gemma3TextConfig(**FEW, head_dim=8)),
               "model.layers.1.mlp.down_proj", 1, "Gemma3RMSNorm"),
    "olmo2": (lambda: Olmo2ForCausalLM(Olmo2Config(**FEW, pad_token_id=0)),
              "model.layers.1.mlp.down_proj", 1, "Olmo2RMSNorm"),
    "granite": (lambda: GraniteForCausalLM(GraniteConfig(**FEW, residual_multiplier=0.3)),
                "model.layers.1.mlp.down_proj", 0.3, ""),
    "cohere": (tiny_models.cohere, "model.layers.1.mlp.down_proj", 1, ""),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**OLD)), "transformer.h.1.mlp.c_proj", 1, ""),
    "gptj": (lambda: GPTJForCausalLM(GPTJConfig(**OLD, rotary_dim=4)), "transformer.h.1.mlp.fc_out",
             1, ""),
    "gpt_neox": (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
                 "gpt_neox.layers.1.mlp.dense_4h_to_h", 1, ""),
    "opt": (lambda: OPTForCausalLM(OPTConfig(**OPT)), "model.decoder.layers.1.fc2", 1, ""),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**FEW)), "model.layers.1.mlp.down_proj", 1, ""),
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**FEW, head_dim=8)),
              "model.layers.1.mlp.down_proj", 1, ""),
    "mistral": (lambda: MistralForCausalLM(MistralConfig(**FEW)), "model.layers.1.mlp.down_proj", 1,
                ""),
    "phi3": (lambda: Phi3ForCausalLM(Phi3Config(**FEW, pad_token_id=0)),
             "model.layers.1.mlp.down_proj", 1, ""),
}  # fmt: skip


def inputs(length: int = 9) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 67, (2, length), generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(length).expand(2, -1),
    }


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[str, Any, Decoder]:
    torch.manual_seed(0)
    model = MODELS[request.param][0]().eval()
    return request.param, model, decoder_of(model)


def test_the_matrix_that_writes(case: tuple[str, Any, Decoder]) -> None:
    name, model, decoder = case
    _, path, scale, norm = MODELS[name]
    site = decoder.site(1)
    assert site.name == path
    assert site.weight is model.get_parameter(site.weight_name)
    assert abs(site.scale - scale) < 1e-4
    assert (type(site.norm).__name__ if site.norm is not None else "") == norm
    assert tuple(site.matrix().shape) == (site.value_size, site.key_size) == (16, site.key_size)
    assert site.key_size == decoder.key_size(1)
    assert site.transposed == (name == "gpt2")


def test_what_it_writes_is_what_the_block_adds(case: tuple[str, Any, Decoder]) -> None:
    """The block's output moves by contribution(y + e) - contribution(y) when y moves by e."""
    _, _, decoder = case
    site, given = decoder.site(1), inputs()
    seen: list[torch.Tensor] = []
    push = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(2))

    def record(_: Any, __: Any, y: torch.Tensor) -> None:
        seen.append(y.reshape(2, 9, 16))

    with torch.no_grad():
        hook = site.module.register_forward_hook(record)
        before = decoder.run(given, 0, 2)
        hook.remove()
        push = push * seen[0].std()
        hook = site.module.register_forward_hook(lambda _, __, y: y + push.reshape(y.shape))
        after = decoder.run(given, 0, 2)
        hook.remove()
        added = site.contribution(seen[0] + push) - site.contribution(seen[0])
        torch.testing.assert_close(after - before, added, rtol=1e-3, atol=1e-5)
        if site.norm is None:
            needed = site.needed(seen[0], added)
            torch.testing.assert_close(needed, push, rtol=1e-3, atol=1e-5)


def test_a_part_of_the_blocks_is_the_whole(case: tuple[str, Any, Decoder]) -> None:
    _, model, decoder = case
    given = inputs()
    with torch.no_grad():
        whole = decoder.run_to_head(given)
        middle = decoder.run(given, 0, 1)
        assert torch.equal(decoder.run_to_head(given, 1, hidden=middle), whole)
        end = decoder.run(given, 1, hidden=middle)
        assert torch.equal(decoder.run_to_head(given, len(decoder), hidden=end), whole)
        head = model.get_output_embeddings()
        logits = model(**given).logits
        scale = getattr(model.config, "logit_scale", None) or 1 / getattr(
            model.config, "logits_scaling", 1.0
        )
        cap = getattr(model.config, "final_logit_softcapping", None)
        ours = head(whole) * scale
        ours = ours if cap is None else cap * torch.tanh(ours / cap)
        torch.testing.assert_close(ours, logits)


def test_a_prefix_is_kept(case: tuple[str, Any, Decoder]) -> None:
    """Also where prompts differ in length and are padded on the left."""
    _, model, decoder = case
    given, cut = inputs(), 4
    short = given["input_ids"][1:, 2:]
    padded = given["input_ids"].clone()
    padded[1, :2] = 0
    mask = given["attention_mask"].clone()
    mask[1, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        whole = decoder.run_to_head(given)[0]
        alone = decoder.run_to_head({"input_ids": short, "attention_mask": torch.ones_like(short)})
        before = {
            "input_ids": padded[:, :cut], "attention_mask": mask[:, :cut],
            "position_ids": positions[:, :cut],
        }  # fmt: skip
        after = {
            "input_ids": padded[:, cut:], "attention_mask": mask, "position_ids": positions[:, cut:]
        }  # fmt: skip
        cache = DynamicCache(config=model.config)
        decoder.run(before, cache=cache)
        hidden = decoder.run(after, 0, 1, cache=cache_rows(cache))
        got = decoder.run_to_head(after, 1, hidden=hidden, cache=cache_rows(cache))
        rows = cache_rows(cache, torch.tensor([1]))
        one = {k: v[1:] for k, v in after.items()}
        got_one = decoder.run_to_head(one, 1, hidden=hidden[1:], cache=rows)
    tolerance = {"rtol": 1e-4, "atol": 1e-5 * float(whole.abs().max())}
    torch.testing.assert_close(got[0], whole[cut:], **tolerance)
    torch.testing.assert_close(got[1], alone[0, cut - 2 :], **tolerance)
    torch.testing.assert_close(got_one[0], got[1], **tolerance)
    assert cache.get_seq_length() == cut, "the kept cache must not grow"


def test_gradients_reach_the_hidden_states(case: tuple[str, Any, Decoder]) -> None:
    _, _, decoder = case
    given = inputs()
    with torch.no_grad():
        hidden = decoder.run(given, 0, 2)
    hidden = hidden.requires_grad_(True)
    (decoder.run_to_head(given, 2, hidden=hidden)[:, -1] * torch.arange(16.0)).sum().backward()
    assert hidden.grad is not None
    assert float(hidden.grad.abs().sum()) > 0


def test_nothing_stays_on_the_model(case: tuple[str, Any, Decoder]) -> None:
    _, model, decoder = case
    decoder.sites()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any("forward" in m.__dict__ for m in model.modules())


class PackedQuantLinear(nn.Module):
    """As quantising libraries put in: no weight of a float type."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., :16]


def broken(kind: str) -> Any:
    torch.manual_seed(0)
    model: Any = tiny_models.llama(num_hidden_layers=3)
    mlp = model.model.layers[1].mlp
    match kind:
        case "quantised":
            mlp.down_proj.weight = nn.Parameter(
                mlp.down_proj.weight.to(torch.float8_e4m3fn), requires_grad=False
            )
        case "packed":
            mlp.down_proj = PackedQuantLinear()
        case "shared":
            model.model.layers[2].mlp.down_proj.weight = mlp.down_proj.weight
        case "meta":
            mlp.down_proj = nn.Linear(32, 16, device="meta")
        case "two":
            mlp.other = nn.Linear(32, 16)
        case "odd":
            forward = mlp.forward
            mlp.forward = lambda x: forward(x) ** 2
        case "mixtral":
            config = MixtralConfig(**FEW, num_local_experts=2)
            return decoder_of(MixtralForCausalLM(config)).site(1)
        case "qwen3_moe":
            config_ = Qwen3MoeConfig(
                **FEW, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8
            )
            return decoder_of(Qwen3MoeForCausalLM(config_)).site(1)
        case "peft":
            from peft import LoraConfig, get_peft_model

            return decoder_of(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))
        case "encoder":
            config__ = T5Config(
                vocab_size=8, d_model=8, num_layers=1, num_heads=1, d_kv=8, d_ff=8,
                num_decoder_layers=2,
            )  # fmt: skip
            return decoder_of(T5ForConditionalGeneration(config__))
        case "none":
            return blocks_of(nn.Linear(2, 2))
        case "index":
            return decoder_of(model).site(3)
        case "hidden":
            return decoder_of(model).run(inputs(), 1, 2)
        case "order":
            return decoder_of(model).run(inputs(), 2, 2)
    return decoder_of(model).site(1)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("quantised", r"layers.1.mlp.down_proj.weight is quantised \(torch.float8_e4m3fn\)"),
        ("packed", "layers.1.mlp.down_proj is quantised"),
        ("shared", "down_proj.weight is also model.layers.2.mlp.down_proj.weight"),
        ("meta", "has no values"),
        ("two", r"has 2 linear layers that could write .*\['mlp.down_proj', 'mlp.other'\]"),
        ("odd", "model.layers.1 does something to the output of its MLP"),
        ("mixtral", "model.layers.1.mlp is a mixture of experts"),
        ("qwen3_moe", "model.layers.1.mlp is a mixture of experts"),
        ("peft", "carries adapters of PEFT: merge them first"),
        ("encoder", "encoder-decoder|exactly one is needed"),
        ("none", "no config with num_hidden_layers"),
        ("index", r"layers must be in \[0, 2\]"),
        ("hidden", "hidden is what block 1 is given"),
        ("order", "start and stop must satisfy"),
    ],
)
def test_what_is_not_understood_is_refused(kind: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        broken(kind)


def test_a_few_large_numbers_in_the_stream_do_not_hide_what_a_block_does() -> None:
    """Their rounding in 16 bits is as large as what the MLP adds: attention sinks have such."""
    for seed in range(8):
        sizes = {"hidden_size": 512, "intermediate_size": 600, "num_hidden_layers": 2}
        model = tiny_models.llama(seed, **sizes, initializer_range=0.02)
        with torch.no_grad():
            embedding = model.get_input_embeddings().weight.mul_(15)
            embedding[:, 7], embedding[:, 100] = 300.0, -210.0
        site = decoder_of(model.half().eval()).site(1)
        assert site.scale == 1.0
        assert site.norm is None


def test_a_block_is_measured_without_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert decoder_of(tiny_models.llama()).site(1).scale == 1.0
