"""Where a tensor stands in a model, by its name: which layer, and what kind of module.

    model.layers.3.self_attn.q_proj.weight    layer 3, kind "q"
    model.embed_tokens.weight                 no layer, kind "embed"

Names of the decoders in use are known (Llama, Qwen, Mistral, Gemma, Phi, GPT-2, GPT-NeoX, GPT-J,
Falcon, BLOOM, OPT, T5, mixtures of experts); what fits none of them is of the kind "other".
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["KINDS", "Place", "place_of"]

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)(?=\.|$)")

KINDS: dict[str, str] = {
    "embed": "embeddings",
    "norm": "norms",
    "q": "attention, queries",
    "k": "attention, keys",
    "v": "attention, values",
    "qkv": "attention, queries, keys and values in one",
    "o": "attention, output",
    "router": "routers of experts",
    "gate": "MLP, gate",
    "up": "MLP, up",
    "down": "MLP, down",
    "head": "output head",
    "other": "other tensors",
}
"""Kind of module -> what it is, in the order in which a model runs through them."""

# The first that is found in the name counts; a name is searched from its layer on.
_PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(rf"(?:^|\.)(?:{pattern})(?=\.|$)"))
    for kind, pattern in (
        ("norm", r"\w*[Nn]orm\w*|ln\w*"),
        ("embed", r"embed_tokens|embed_in|embed_positions|wte|wpe|word_embeddings\w*|shared"
                  r"|tok_embeddings|\w*position_embeddings|relative_attention_bias|embeddings"),
        ("head", r"lm_head|embed_out|score|classifier"),
        ("router", r"router|mlp\.gate|block_sparse_moe\.gate|shared_expert_gate|gate\.wg"),
        ("qkv", r"qkv|qkv_proj|c_attn|query_key_value|Wqkv|W_pack|in_proj\w*"),
        ("q", r"q_proj|q_a_proj|q_b_proj|wq|query|SelfAttention\.q|EncDecAttention\.q"),
        ("k", r"k_proj|wk|key|SelfAttention\.k|EncDecAttention\.k|kv_a_proj_with_mqa"),
        ("v", r"v_proj|wv|value|SelfAttention\.v|EncDecAttention\.v|kv_b_proj"),
        ("o", r"o_proj|out_proj|attn\.c_proj|attention\.wo|SelfAttention\.o"
              r"|EncDecAttention\.o|(?:attention|self_attention|self_attn|attn)\.(?:\w+\.)?dense"),
        ("up", r"up_proj|gate_up_proj|w3|fc1|c_fc|fc_in|dense_h_to_4h|wi|wi_1|linear_1|lin1"),
        ("gate", r"gate_proj|w1|wi_0"),
        ("down", r"down_proj|w2|fc2|mlp\.c_proj|fc_out|dense_4h_to_h|wo|linear_2|lin2"),
    )
)  # fmt: skip


class Place(NamedTuple):
    """Attributes: stack: the part of the name before the layer's number, "" outside the layers;
    layer: its number, or None; kind: a key of `KINDS`."""

    stack: str
    layer: int | None
    kind: str


def place_of(name: str) -> Place:
    """The place of the tensor `name`."""
    match = _LAYER.search(name)
    rest = name if match is None else name[match.end() :]
    found = next((kind for kind, pattern in _PATTERNS if pattern.search(rest)), "other")
    if match is None:
        return Place("", None, found)
    return Place(name[: match.start(1)].rstrip("."), int(match[1]), found)
