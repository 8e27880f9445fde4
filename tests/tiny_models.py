"""Causal language models of a few thousand parameters, and a proof that no logits were made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 67  # odd, and unlike every other size
WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then"]
MADE_UP = [a + b for a in ("ka", "lo", "mi", "nu", "pe", "ri", "so") for b in "bdfgklmnr"]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"tie_word_embeddings": False, "initializer_range": 0.4, **_SIZES, **changes}
    return LlamaForCausalLM(LlamaConfig(**sizes))


def gemma2(seed: int = 0) -> Gemma2ForCausalLM:
    torch.manual_seed(seed)
    config = Gemma2Config(
        **_SIZES,
        head_dim=8,
        query_pre_attn_scalar=8,
        final_logit_softcapping=3.0,
        initializer_range=0.7,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config)


def gemma3(seed: int = 0, **changes: Any) -> Gemma3ForCausalLM:
    torch.manual_seed(seed)
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, initializer_range=0.5, **changes,
        )
    )  # fmt: skip


def gpt2(seed: int = 0, **changes: Any) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    special = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**{"initializer_range": 0.3, **sizes, **special, **changes}))


def cohere(seed: int = 0) -> CohereForCausalLM:
    torch.manual_seed(seed)
    return CohereForCausalLM(CohereConfig(**_SIZES, logit_scale=0.25, initializer_range=0.7))


def granite(seed: int = 0) -> GraniteForCausalLM:
    torch.manual_seed(seed)
    return GraniteForCausalLM(GraniteConfig(**_SIZES, logits_scaling=4.0, initializer_range=0.7))


def batch(seed: int = 0, size: int = 3, length: int = 9) -> dict[str, Tensor]:
    """Left-padded prompts, right-masked labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    ids[0, :2] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    labels[-1, -2:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def word_tokenizer(
    words: Iterable[str], bos: bool = False, eos: bool = False, side: str = "left"
) -> PreTrainedTokenizerFast:
    """One token a word, after the special ones; with `bos` and `eos` these around every text."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    if bos or eos:
        made.post_processor = TemplateProcessing(
            single=("<bos> " if bos else "") + "$A" + (" <eos>" if eos else ""),
            special_tokens=[("<bos>", 1), ("<eos>", 2)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side=side,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    fast = word_tokenizer(WORDS)
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}then {% endif %}"
    )
    return fast


class NoLogits(TorchDispatchMode):
    """Fails where an op returns `rows` x VOCABULARY numbers or more with a last dimension of
    VOCABULARY: the logits of a batch. A head's own weight, [VOCABULARY, H], is not meant."""

    def __init__(self, rows: int, columns: int = VOCABULARY) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape[-1] == self.columns:
                assert tensor.numel() < self.rows * self.columns, f"{func} made logits"
        return out


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
