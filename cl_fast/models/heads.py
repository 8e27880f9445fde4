"""What a loss or an editor must know of a language model: its head, and what the head is given.

    head_of(model)                 the output head: weight, bias, adapters, logit scale, softcap
    hidden_states(model, **batch)  what the head would have been given; no logits are made
    run_inside(model, function)    a function of ours as the forward pass of DDP, FSDP, autocast

The model's own forward runs, wrappers (DDP, FSDP, PEFT, autocast) included, while a stand-in takes
the head's place: it keeps the hidden states and returns one row of probe numbers. What the model
makes of that row - a scale, a softcap - is compared, once per model, with what its config says; a
model that does something else to its logits is refused, never computed wrongly.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_fast.losses import Hidden
from cl_fast.models.adapters import LowRank, head_parts
from cl_fast.models.sharding import reshard
from cl_fast.ops.heads import Head, chunks

__all__ = [
    "IGNORED",
    "Evaluating",
    "LinearHead",
    "capture",
    "forward_names",
    "forward_replaced",
    "function_inside",
    "head_of",
    "hidden_states",
    "last_hidden",
    "next_labels",
    "run_inside",
    "unwrap",
]

IGNORED = -100
"""The label of a position that does not count."""


@dataclass(frozen=True, eq=False)
class LinearHead:
    """An output head, and what the model does to its logits.

    Attributes:
        module: the layer.
        weight: [V, H].
        bias: [V], or None.
        logit_scale, softcap: logits are softcap tanh(logit_scale z / softcap).
        adapters: low-rank adapters on the head that are active.
    """

    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    adapters: tuple[LowRank, ...] = ()

    def keywords(self, hidden: Tensor) -> dict[str, Any]:
        """hidden, weight, bias, logit_scale and softcap as the losses take them."""
        hidden = hidden.to(self.weight.device)
        weight, bias = self.weight.to(hidden.dtype), self.bias
        if self.adapters:
            products = [adapter.product(hidden).to(hidden.dtype) for adapter in self.adapters]
            hidden = torch.cat([hidden, *products], -1)
            ups = [adapter.up.to(weight.dtype) for adapter in self.adapters]
            weight = torch.cat([weight, *ups], 1)
        return {
            "hidden": hidden,
            "weight": weight,
            "bias": None if bias is None else bias.to(hidden.dtype),
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
        }

    def teacher(self, hidden: Tensor) -> Hidden:
        """This head with these hidden states as a teacher: nothing of it requires grad."""
        with torch.no_grad():
            given = self.keywords(hidden.detach())
        return Hidden(**{k: v.detach() if isinstance(v, Tensor) else v for k, v in given.items()})

    def logits(
        self, hidden: Tensor, temperature: float = 1.0, chunk_tokens: int | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Chunk by chunk, the rows of `hidden` [M, H] and their final logits [C, V], without grad.

        The caller may overwrite the logits.
        """
        given = self.teacher(hidden)
        head = Head(given.hidden, given.weight, given.bias)
        for rows in chunks(hidden.size(0), self.weight.size(0), chunk_tokens):
            with torch.no_grad():  # not around the yield: the caller's mode is his own
                z = head.logits(rows)
                if self.logit_scale != 1.0:
                    z *= self.logit_scale
                if self.softcap is not None:
                    z = z.div_(self.softcap).tanh_().mul_(self.softcap)
                if temperature != 1.0:
                    z /= temperature
            yield rows, z


def unwrap(model: nn.Module) -> Any:
    """The model within DDP and FSDP; PEFT's wrapper stays.

    Raises:
        ValueError: it is wrapped by DataParallel or by torch.compile.
    """
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "nn.DataParallel is not supported: launch one process per GPU (torchrun or accelerate)"
        )
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "a model compiled as a whole has its head compiled in: compile its decoder instead, "
            "model.get_decoder().compile()"
        )
    parallel = isinstance(model, nn.parallel.DistributedDataParallel)
    if parallel or type(model).__name__ == "FullyShardedDataParallel":
        return unwrap(model.module)
    return model


def forward_names(model: Any) -> set[str]:
    """What the forward of a model takes by name; within PEFT, that of its base."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    _, *parameters = inspect.signature(type(base).forward).parameters.values()
    return {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def _text_config(model: Any) -> Any:
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(
            f"{type(model).__name__} has no config to read the logit scale and softcap from; give "
            "hidden states, weight and both to linear_divergence yourself"
        )
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _scale_and_cap(config: Any) -> tuple[float, float | None]:
    """What a config says of the logits; the probe of `last_hidden` holds the model to it."""
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            scale = float(value)
            break
    else:
        divisor = getattr(config, "logits_scaling", None)
        if divisor is not None:
            multiplies = getattr(config, "model_type", "") == "hyperclovax"
            scale = float(divisor) if multiplies else 1.0 / float(divisor)
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        cap = getattr(config, name, None)
        if cap is not None:
            return scale, float(cap)
    return scale, None


def head_of(model: nn.Module) -> LinearHead:
    """The output head of a causal language model of transformers, with or without PEFT.

    Args:
        model: also within DDP or FSDP; sharded weights must be gathered at this moment, as they
            are within `run_inside`.

    Raises:
        ValueError: the head is not one that the losses can multiply with.
    """
    inner = unwrap(model)
    module = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if module is None:
        raise ValueError(f"{type(inner).__name__} has no output head (get_output_embeddings)")
    config = _text_config(inner)
    if getattr(inner.config, "is_encoder_decoder", False):
        raise ValueError("an encoder-decoder is not supported: its labels are not shifted by one")
    parts = head_parts(module)
    scale, cap = _scale_and_cap(config)
    return LinearHead(module, parts.weight, parts.bias, scale, cap, parts.adapters)


@contextlib.contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module(...)` calls `forward` while this lasts; hooks run as ever."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = own


@contextlib.contextmanager
def function_inside(inner: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """The next `inner(**inputs)` is `function(inner, **inputs)`; hooks run as ever."""
    own = inner.__dict__.get("forward")

    def forward(**given: Any) -> Any:
        # The function may want the real one.
        if own is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.__dict__["forward"] = own
        return function(inner, **given)

    with forward_replaced(inner, forward):
        yield


def run_inside(model: nn.Module, function: Callable[..., Any], **inputs: Any) -> Any:
    """`function(unwrap(model), **inputs)` as the forward pass of `model`.

    DDP prepares its reduction and FSDP gathers parameters around it, so a head may be used within
    that is not called. `inputs` pass through the wrapper, which may move or cast them.
    """
    with function_inside(unwrap(model), function):
        result = model(**inputs)
    if not torch.is_grad_enabled():
        reshard(model)
    return result


_checked: weakref.WeakKeyDictionary[nn.Module, tuple[float, float | None]] = (
    weakref.WeakKeyDictionary()
)
"""Heads whose models were seen to do to their logits what their configs say."""


def capture(
    inner: Any, forward: Callable[..., Any], *args: Any, **inputs: Any
) -> tuple[Tensor, Any]:
    """What the head is given while `forward` runs, and what `forward` returns."""
    head = head_of(inner)
    taken: list[Tensor] = []
    columns = head.weight.size(0)

    def stand_in(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        taken.append(hidden)
        probe = torch.linspace(-60, 60, columns, device=hidden.device)
        return probe.reshape(*[1] * (hidden.dim() - 1), columns)

    with forward_replaced(head.module, stand_in):
        output = forward(*args, **inputs)
    if len(taken) != 1:
        raise ValueError(
            f"{type(inner).__name__} calls its output head {len(taken)} times in a forward pass, "
            "not once; its hidden states cannot be told. Take its logits and "
            "divergence_from_logits instead"
        )
    if _checked.get(head.module) != (head.logit_scale, head.softcap):
        _check_probe(inner, head, output)
        _checked[head.module] = (head.logit_scale, head.softcap)
    return taken[0], output


def _check_probe(inner: Any, head: LinearHead, output: Any) -> None:
    logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    expected = torch.linspace(-60, 60, head.weight.size(0), device=logits.device)
    expected = expected * head.logit_scale
    if head.softcap is not None:
        expected = torch.tanh(expected / head.softcap) * head.softcap
    tolerance = 1e-4 if logits.dtype == torch.float32 else 2.0**-6
    flat = logits.detach().flatten().to(torch.float32)
    if flat.shape != expected.shape or not torch.allclose(
        flat, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    ):
        raise ValueError(
            f"{type(inner).__name__} does something to its logits that its config does not tell: "
            f"logit scale {head.logit_scale} and softcap {head.softcap} were read. Take its logits "
            "and divergence_from_logits instead"
        )


def last_hidden(inner: Any, **inputs: Any) -> Tensor:
    """`hidden_states` for use within `run_inside`, where the model is unwrapped already."""
    for name in ("labels", "shift_labels"):
        if inputs.get(name) is not None:
            raise ValueError(f"{name} must not be given: the model would make its own loss of them")
    inputs.setdefault("use_cache", False)
    if getattr(_text_config(inner), "output_router_logits", False):
        raise ValueError(
            "output_router_logits=True asks for the auxiliary loss of a mixture of experts, which "
            "this loss would leave out: set it to False, or add outputs.aux_loss yourself"
        )
    return capture(inner, inner.forward, **inputs)[0]


def hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """What the output head of `model` would be given for this batch: [batch, length, H].

    Under autocast it has the dtype in which the head would multiply. The head is not called.

    Args:
        model: a causal language model of transformers; within DDP, FSDP or PEFT too.
        inputs: of its forward, without labels.

    Raises:
        ValueError: the head or what follows it is not understood.
    """
    hidden = run_inside(model, last_hidden, **inputs)
    assert isinstance(hidden, Tensor)
    return hidden


def next_labels(labels: Tensor) -> Tensor:
    """labels[..., i] becomes the token that position i predicts; the last position has none."""
    return F.pad(labels[..., 1:], (0, 1), value=IGNORED)


class Evaluating(contextlib.AbstractContextManager[None]):
    """A model in eval mode; the modules that were training train again afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.training = [module for module in model.modules() if module.training]

    def __enter__(self) -> None:
        for module in self.training:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module in self.training:
            module.training = True
