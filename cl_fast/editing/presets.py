"""Where and how published work edits which models; other depths of a family in proportion.

The layers and numbers are those of the code of ROME (also GPT-NeoX), MEMIT (GPT-2 XL, GPT-J), EMMET
(those and Llama 2), AlphaEdit (Llama 3), EasyEdit (Llama 2, Mistral, Qwen 2.5) and HalluEditBench
(Gemma 2); MEMIT's layers of GPT-NeoX are in proportion to those of GPT-J. Families are told by the
model's config. A model of a family at another depth, and of a family without an entry, gets the
blocks at the same share of its depth, lambda in proportion to the width of its keys, and smaller
steps (lr 0.1, clamp 1.5): a starting point, to be checked on held-out facts.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from cl_fast.models.blocks import Decoder, decoder_of
from cl_fast.options import one_of

__all__ = ["Method", "Preset", "preset_of"]

Method = Literal["rome", "memit", "emmet", "alphaedit"]


@dataclass(frozen=True)
class Preset:
    """What an editor uses where nothing else is given.

    Attributes:
        family: of the entry. exact: the model has the depth of the entry.
        layers: blocks to edit.
        values: for `ValueOptions`.
        prior_weight: of the covariance (lambda).
        threshold, l2: of AlphaEdit's null space; threshold is None where none was published.
    """

    family: str
    exact: bool
    layers: tuple[int, ...]
    values: dict[str, Any]
    prior_weight: float
    threshold: float | None
    l2: float


@dataclass(frozen=True)
class _Family:
    depth: int
    keys: int
    rome: int
    memit: tuple[int, int]
    rome_values: dict[str, Any]
    memit_values: dict[str, Any]
    prior_weight: float = 15000.0
    emmet_weight: float = 1.0
    threshold: float | None = None


_FIRST = {"steps": 20, "lr": 0.5, "weight_decay": 0.5, "clamp": 4.0}
_EASY = {"steps": 25, "lr": 0.5, "weight_decay": 1e-3, "clamp": 4.0}
_LLAMA3 = {"steps": 25, "lr": 0.1, "weight_decay": 0.5, "clamp": 0.75}
_GPTJ = {"steps": 25, "lr": 0.5, "weight_decay": 0.5, "clamp": 0.75}
_GPT2 = {"steps": 20, "lr": 0.5, "weight_decay": 0.5, "clamp": 0.75}

_FAMILIES = {
    "gpt2": _Family(48, 6400, 17, (13, 17), _FIRST, _GPT2, 20000.0, 1000.0, 2e-2),
    "gptj": _Family(28, 16384, 5, (3, 8), _FIRST, _GPTJ, emmet_weight=10000.0, threshold=2e-2),
    "gpt_neox": _Family(44, 24576, 15, (5, 12), _FIRST, _GPTJ),
    "llama2": _Family(32, 11008, 5, (4, 8), _EASY, _EASY),
    "llama3": _Family(32, 14336, 5, (4, 8), _EASY, _LLAMA3, threshold=2e-2),
    "mistral": _Family(32, 14336, 5, (4, 8), _EASY, _EASY),
    "qwen2": _Family(28, 18944, 5, (4, 8), _EASY, _EASY),
    "gemma2": _Family(42, 14336, 5, (4, 8), _EASY, _EASY),
}
_ALIKE = {"qwen3": "qwen2", "gemma": "gemma2", "gemma3_text": "gemma2", "gemma3": "gemma2"}
_OTHER = "llama3"


def _family(config: Any) -> tuple[str, bool]:
    kind = str(getattr(config, "model_type", ""))
    if kind == "llama":
        # Llama 3's vocabulary is four times Llama 2's; nothing else in the config tells them apart.
        return ("llama3" if int(getattr(config, "vocab_size", 0)) > 100_000 else "llama2"), True
    kind = _ALIKE.get(kind, kind)
    return (kind, True) if kind in _FAMILIES else (_OTHER, False)


def _scaled(layer: int, depth: int, of: int) -> int:
    return min(depth - 1, round(layer * depth / of))


def preset_of(model: nn.Module | Decoder, method: Method) -> Preset:
    """The preset of a model, or of its decoder; see the module.

    Raises:
        ValueError: `method` is none of them, or the model is no decoder.
    """
    one_of("method", method, get_args(Method))
    decoder = model if isinstance(model, Decoder) else decoder_of(model)
    name, known = _family(decoder.config)
    family, depth = _FAMILIES[name], len(decoder)
    exact = known and depth == family.depth
    if method in ("rome", "emmet"):
        layers: tuple[int, ...] = (_scaled(family.rome, depth, family.depth),)
    else:
        first, last = family.memit
        layers = tuple(
            dict.fromkeys(_scaled(i, depth, family.depth) for i in range(first, last + 1))
        )
    values = dict(family.rome_values if method == "rome" else family.memit_values)
    if not exact:
        # Adam moves every element by lr: in a narrow stream 0.5 is at the clamp at once.
        values |= {"lr": 0.1} if method == "rome" else {"lr": 0.1, "clamp": 1.5}
    weight = family.emmet_weight if method == "emmet" else family.prior_weight
    if not exact:
        # k^T C^-1 k is f for an average key, so that lambda means the same where it is in
        # proportion to f.
        with suppress(ValueError):  # a mixture of experts, which editors of weights refuse
            weight *= decoder.key_size(layers[-1]) / family.keys
    return Preset(name, exact, layers, values, weight, family.threshold, 10.0)
