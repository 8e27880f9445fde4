"""What is read of a model's head: the same logits come out as the model itself makes."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny_models import VOCABULARY, NoLogits, batch, cohere, gemma2, gradients, granite, llama
from torch import nn

from cl_fast.integrations.transformers import head_of, hidden_states, unwrap
from cl_fast.losses import linear_divergence

INPUTS = {k: v for k, v in batch().items() if k != "labels"}


def logits_of(model: nn.Module, **inputs: Any) -> torch.Tensor:
    """By what the integration reads."""
    hidden = hidden_states(model, **inputs)
    (_, z), *rest = head_of(model).logits(hidden.flatten(0, 1), chunk_tokens=10_000)
    assert not rest
    return z.reshape(*hidden.shape[:-1], -1)


def lora(model: nn.Module | None = None, seed: int = 1, **changes: Any) -> PeftModel:
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"], **changes}
    adapted = get_peft_model(model or llama(), LoraConfig(**options))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            nn.init.normal_(parameter, std=0.3)
    return adapted


def biased() -> nn.Module:
    model = llama()
    model.lm_head = nn.Linear(16, VOCABULARY, bias=True)
    nn.init.normal_(model.lm_head.bias)
    return model


def modules_to_save() -> nn.Module:
    model = lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    nn.init.normal_(model.get_output_embeddings().modules_to_save["default"].weight)
    return model


def trainable_tokens(tied: bool) -> nn.Module:
    where: Any = [5, 7, 11] if tied else {"lm_head": [5, 7, 11]}
    base = llama(tie_word_embeddings=tied)
    model = lora(base, target_modules=["q_proj"], trainable_token_indices=where)
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            nn.init.normal_(parameter)
    return model


def two_adapters() -> nn.Module:
    model = lora()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"], use_rslora=True))
    nn.init.normal_(model.get_output_embeddings().lora_B["second"].weight)
    model.base_model.set_adapter(["default", "second"])
    return model


def merged() -> nn.Module:
    model = lora()
    model.merge_adapter()
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "biased": biased,
    "softcap": gemma2,
    "multiplied": cohere,
    "divided": granite,
    "lora": lora,
    "lora off the head": lambda: lora(target_modules=["q_proj"]),
    "lora with bias": lambda: lora(lora_bias=True),
    "lora on softcap": lambda: lora(gemma2()),
    "two adapters": two_adapters,
    "merged": merged,
    "modules_to_save": modules_to_save,
    "trainable tokens": lambda: trainable_tokens(False),
    "trainable tokens, tied": lambda: trainable_tokens(True),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model(name: str) -> None:
    model = MODELS[name]().eval()
    expected = model(**INPUTS).logits
    assert expected.std() > 0.2
    torch.testing.assert_close(logits_of(model, **INPUTS), expected, rtol=1e-5, atol=2e-5)
    # Nothing of it stays behind.
    torch.testing.assert_close(model(**INPUTS).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "merged"])
def test_gradients_are_those_of_the_model(name: str) -> None:
    ours, theirs = MODELS[name](), MODELS[name]()
    theirs.load_state_dict(ours.state_dict())
    teacher = llama(seed=9).eval()
    labels = batch()["labels"]
    with torch.no_grad():
        given = head_of(teacher).teacher(hidden_states(teacher, **INPUTS))
        q = teacher(**INPUTS).logits.log_softmax(-1)
    hidden = hidden_states(ours, **INPUTS)
    loss = linear_divergence(
        **head_of(ours).keywords(hidden), teacher=given, kind="reverse_kl", labels=labels
    )
    p = theirs(**INPUTS).logits.log_softmax(-1)
    rows = (p.exp() * (p - q)).sum(-1)
    expected = rows[labels != -100].mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    found, wanted = gradients(ours), gradients(theirs)
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5 * scale + 1e-8)
    if name.startswith("lora") and "off" not in name:
        assert any("lm_head.lora_A" in key for key in found)
        assert any("lm_head.lora_B" in key for key in found)


def test_a_disabled_adapter_is_left_out() -> None:
    model = lora().eval()
    model.merge_adapter()
    with model.disable_adapter():
        ours = logits_of(model, **INPUTS)
        expected = model(**INPUTS).logits
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)


def test_dropout_of_an_adapter_is_applied_in_training() -> None:
    model = lora(lora_dropout=0.5, target_modules=["lm_head"])
    hidden = torch.randn(2, 16)
    first, second = (head_of(model).keywords(hidden)["hidden"] for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first[:, :16], hidden)
    model.eval()
    first, second = (head_of(model).keywords(hidden)["hidden"] for _ in range(2))
    assert torch.equal(first, second)


def test_no_logits_are_made() -> None:
    model = lora()
    ids = INPUTS["input_ids"]
    with NoLogits(ids.numel()):
        hidden = hidden_states(model, **INPUTS)
        hidden.sum().backward()
    with pytest.raises(AssertionError, match="made logits"), NoLogits(ids.numel()):
        model(**INPUTS)


def test_under_autocast_the_dtype_is_that_of_the_product() -> None:
    model = llama().eval()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = hidden_states(model, **INPUTS)
        expected = model(**INPUTS).logits
    assert hidden.dtype == torch.bfloat16
    assert head_of(model).keywords(hidden)["weight"].dtype == torch.bfloat16
    ours = logits_of(model, **INPUTS)  # float32
    with torch.autocast("cpu", torch.bfloat16):
        low = logits_of(model, **INPUTS)
    # Never rounded to bfloat16, so at least as near as the model's own.
    away = (expected.float() - ours).abs().max()
    assert (low - ours).abs().max() <= away * 1.01


def test_prompt_learning_keeps_its_virtual_tokens() -> None:
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    model.eval()
    expected = model(**INPUTS).logits
    assert expected.size(1) == INPUTS["input_ids"].size(1) + 4
    torch.testing.assert_close(logits_of(model, **INPUTS), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 1, "n_head": 2}),
        ("OPTForCausalLM", {"word_embed_proj_dim": 8, "ffn_dim": 16}),  # projects before its head
        ("PhiForCausalLM", {}),  # a bias on the head
        ("BloomForCausalLM", {}),
        ("NanoChatForCausalLM", {}),  # a softcap
        ("Cohere2ForCausalLM", {}),  # a factor
        ("GraniteMoeForCausalLM", {"logits_scaling": 3.0}),  # a divisor
        ("MambaForCausalLM", {}),
        ("MixtralForCausalLM", {}),
    ],
)
def test_other_architectures(name: str, changes: dict[str, Any]) -> None:
    made = getattr(transformers, name)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    model = made(made.config_class(**{**sizes, **changes})).eval()
    for parameter in model.get_output_embeddings().parameters():
        nn.init.normal_(parameter)
    ids = {"input_ids": INPUTS["input_ids"]}
    torch.testing.assert_close(logits_of(model, **ids), model(**ids).logits, rtol=1e-5, atol=1e-5)


def test_a_compiled_decoder_is_used() -> None:
    model = llama().eval()
    expected = model(**INPUTS).logits
    model.get_decoder().compile(backend="eager")
    torch.testing.assert_close(logits_of(model, **INPUTS), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("", ("torch", "transformers", "peft", "trl", "torchtitan")),
        (".transformers", ("transformers", "peft", "trl")),
        (".trl", ("transformers", "peft", "trl", "datasets")),
        (".torchtitan", ("transformers", "peft", "trl")),
        (".keeping", ("trl", "datasets")),
    ],
)
def test_a_host_is_imported_when_it_is_used(module: str, absent: tuple[str, ...]) -> None:
    code = f"import cl_fast.integrations{module}, sys; print({set(absent)} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def _odd_logits(change: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    model = llama()
    forward = type(model).forward

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = change(output.logits)
        return output

    model.__class__ = type("OddLogits", (type(model),), {"forward": wrapped})
    return model


def _without_config_entry() -> nn.Module:
    model = cohere()
    model.config.logit_scale = None
    return model


def _double_head() -> nn.Module:
    model = llama()
    forward = type(model).forward

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        forward(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    model.__class__ = type("TwiceHeaded", (type(model),), {"forward": wrapped})
    return model


def _quantised() -> nn.Module:
    model = llama()

    class Packed(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    model.lm_head = Packed(16, VOCABULARY, bias=False)
    return model


def _experts() -> nn.Module:
    model = llama()
    model.config.output_router_logits = True
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: _odd_logits(lambda z: z + 1), "OddLogits does something to its logits"),
        (lambda: _odd_logits(lambda z: z[..., :-3]), "OddLogits does something to its logits"),
        (lambda: _odd_logits(lambda z: torch.tanh(z)), "logit scale 1.0 and softcap None"),
        (_without_config_entry, "does something to its logits"),
        (_double_head, "2 times"),
        (_quantised, "must be an nn.Linear; got Packed"),
        (_experts, "auxiliary loss of a mixture of experts"),
        (lambda: lora(use_dora=True), "not plain LoRA"),
        (lambda: llama().model, "no output head"),
        (lambda: nn.DataParallel(llama()), "one process per GPU"),
        (lambda: torch.compile(llama()), "compile its decoder"),
    ],
)
def test_what_is_not_understood_is_refused(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        hidden_states(make(), **INPUTS)


def test_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="labels must not be given"):
        hidden_states(llama(), **batch())


def test_a_failing_forward_leaves_the_model_whole() -> None:
    model = lora()
    with pytest.raises(TypeError):
        hidden_states(model, input_ids="words")
    assert "forward" not in unwrap(model).__dict__
    assert "forward" not in model.get_output_embeddings().__dict__
    copy.deepcopy(model)(**INPUTS)
