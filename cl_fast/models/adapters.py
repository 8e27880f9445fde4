"""Low-rank adapters of PEFT: on the output head, and on every layer.

`head_parts` gives the output head of a model with adapters in the form in which the losses take it.

    z = W h + b + sum_a s_a B_a A_a h  =  [W, B_1, ...] [h; s_1 A_1 h; ...] + b

A low-rank adapter on the head is not multiplied out: the hidden states grow by its rank, the
weight by its B, so that nothing is rounded to the dtype of W, and gradients reach A and B. The
joined weight is a copy of the head while a step lasts.

LoRA (several at a time, rsLoRA, a bias on B, dropout), modules_to_save and trainable tokens are
understood. What changes the head in another way is refused.

`lora_layers` lists the layers that carry a LoRA of a given name, with its factors as they are: what
penalties, projections, folding and merging of adapters work on. Neither imports PEFT before it
meets one of its modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["HeadParts", "LoraLayer", "LowRank", "active_adapter", "head_parts", "lora_layers"]


@dataclass(frozen=True, eq=False)
class LowRank:
    """One adapter on a head.

    Attributes:
        down: A, [r, H].
        up: B, [V, r].
        scale: s.
        dropout: of what A multiplies.
    """

    down: Tensor
    up: Tensor
    scale: float
    dropout: nn.Module

    def product(self, hidden: Tensor) -> Tensor:
        """s A h: [..., r], in the dtype of A."""
        return F.linear(self.dropout(hidden.to(self.down.dtype)), self.down) * self.scale


@dataclass(frozen=True, eq=False)
class HeadParts:
    """weight [V, H], bias [V] or None, and the adapters that are active."""

    weight: Tensor
    bias: Tensor | None
    adapters: tuple[LowRank, ...] = ()


def head_parts(module: nn.Module) -> HeadParts:
    """The parts of an output head: a linear layer, or one that PEFT has wrapped.

    Raises:
        ValueError: its forward does something else than these parts do.
    """
    if type(module).__module__.split(".")[0] == "peft":
        return _wrapped(module)
    return _linear(module)


def _linear(module: nn.Module) -> HeadParts:
    # By what it computes, not by its class: FSDP swaps the class and keeps the forward.
    if getattr(type(module), "forward", None) is not nn.Linear.forward:
        raise ValueError(
            f"the output head must be an nn.Linear; got {type(module).__name__}, whose product is "
            "not known here. Take the model's logits and divergence_from_logits instead"
        )
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not weight.dtype.is_floating_point or weight.dtype.itemsize == 1:
        raise ValueError(
            f"the output head must have a floating-point weight of 16 bits or more; got "
            f"{weight.dtype}. Leave the head out of the quantisation"
        )
    if weight.is_meta or weight.numel() == 0:
        raise ValueError(
            "the output head has no weight at this moment: it is offloaded or sharded (ZeRO-3). "
            "Keep the head whole on its device"
        )
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor)
    return HeadParts(weight, bias)


def _wrapped(module: Any) -> HeadParts:
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(module, ModulesToSaveWrapper):
        active = [] if module.disable_adapters else module.active_adapters
        return head_parts(module.modules_to_save[active[0]] if active else module.original_module)
    if isinstance(module, TrainableTokensWrapper):
        return _trainable_tokens(module.token_adapter)
    if getattr(type(module), "forward", None) is LoraLinear.forward:
        return _lora(module)
    raise ValueError(
        f"the output head is a {type(module).__module__}.{type(module).__name__}; of PEFT's layers "
        "on a head, LoRA on a linear layer, modules_to_save and trainable tokens are understood. "
        "Take lm_head out of target_modules"
    )


def _trainable_tokens(layer: Any) -> HeadParts:
    active = [] if layer.disable_adapters else layer.active_adapters
    if not active and layer.merged:
        layer.unmerge()  # as its forward would have done
    base = _linear(layer.base_layer)
    if not active or layer.merged:
        return base
    # Its forward leaves the bias out, and so the head has none.
    return HeadParts(layer.get_merged_weights(active), None)


def _lora(layer: Any) -> HeadParts:
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as its forward would have done
    base = head_parts(layer.get_base_layer())
    if layer.disable_adapters or layer.merged:
        return base
    if layer.fan_in_fan_out:
        raise ValueError("LoRA with fan_in_fan_out=True on the output head is not understood")
    bias = base.bias
    adapters = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if name in layer.lora_variant:
            variant = layer.lora_variant[name]
            label = variant.__name__ if isinstance(variant, type) else type(variant).__name__
            raise ValueError(
                f"the adapter {name!r} on the output head is not plain LoRA ({label}): its product "
                "is not B A h. Take lm_head out of target_modules, or use plain LoRA there"
            )
        down, up, scale = layer.lora_A[name], layer.lora_B[name], float(layer.scaling[name])
        adapters.append(LowRank(down.weight, up.weight, scale, layer.lora_dropout[name]))
        if up.bias is not None:
            extra = up.bias * scale
            bias = extra if bias is None else bias + extra
    return HeadParts(base.weight, bias, tuple(adapters))


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """A layer with the LoRA of one name: y = W x + s B A x.

    Attributes:
        name: of the module in the model that was searched.
        module: PEFT's layer.
        base: the linear layer within it.
        down: A, the weight of `lora_A`, [r, d_in].
        up: B, the weight of `lora_B`, [d_out, r].
        scale: s.
    """

    name: str
    module: Any
    base: nn.Module
    down: nn.Parameter
    up: nn.Parameter
    scale: float


def active_adapter(model: nn.Module) -> str:
    """The name of the one adapter that is active.

    Raises:
        ValueError: the model has no adapters of PEFT, or several are active.
    """
    active = getattr(model, "active_adapters", None)
    try:
        names = active() if callable(active) else active
    except ValueError:  # transformers' own method, on a model without any
        names = None
    if names is None:
        raise ValueError(
            f"{type(model).__name__} has no adapters: wrap it with peft.get_peft_model first"
        )
    if len(names) != 1:
        raise ValueError(f"one adapter must be active, or be named; active are {list(names)}")
    return str(next(iter(names)))


def lora_layers(model: nn.Module, adapter: str) -> list[LoraLayer]:
    """The linear layers of `model` that carry the LoRA called `adapter`, in the model's order.

    Raises:
        ValueError: there is none; or one of them is not B A x with a matrix A next to the input
            (DoRA and other variants, embeddings, convolutions, fan_in_fan_out).
    """
    found = []
    for name, module in model.named_modules():
        if adapter not in getattr(module, "lora_embedding_A", ()):
            if adapter not in getattr(module, "lora_A", ()):
                continue
        else:
            raise ValueError(f"{name}: LoRA on an embedding is not understood here")
        down, up = module.lora_A[adapter], module.lora_B[adapter]
        variant = adapter in getattr(module, "lora_variant", ())
        flipped = getattr(module, "fan_in_fan_out", False)
        if variant or flipped or not isinstance(down, nn.Linear) or down.weight.dim() != 2:
            what = "fan_in_fan_out=True" if flipped else "another variant than plain LoRA"
            raise ValueError(f"{name}: the adapter {adapter!r} has {what}, which is not understood")
        scale = float(module.scaling[adapter])
        base = module.get_base_layer()
        found.append(LoraLayer(name, module, base, down.weight, up.weight, scale))
    if not found:
        known = sorted(
            {k for m in model.modules() for k in getattr(m, "lora_A", ()) if isinstance(k, str)}
        )
        raise ValueError(f"no layer has a LoRA called {adapter!r}; there are {known}")
    return found
