"""LoRAMoE: a frozen layer with n low-rank experts behind a gate, and a loss that shares them out.

    y = W x + s sum_i p_i B_i A_i x        p = softmax(G x), s = alpha / rank

The experts of a layer are one gated layer of rank n r (`cl_fast.ops.gated_low_rank`): two products,
and n r + n numbers per token kept for the backward pass.

    add_lora_moe(model)                 wraps layers by name, freezes everything else
    lora_moe_state_dict(model)          what was trained, without the base
    load_lora_moe(model, state)         back again, also onto a fresh base
    remove_lora_moe(model)              the base as it was
    Balance(weight, delta)              the localised balancing loss, a Keep
    WithColumn(collate, "task_type")    a collator whose batches tell the type of each task

The localised balancing loss, for a batch of b sequences, in each layer:

    Q[b, i] = sum of p_i over the tokens of sequence b
    I[b, i] = 1 + delta where expert i belongs to the type of task of b, else 1 - delta
    Z       = I o Q
    L       = weight * var(Z) / (mean(Z)^2 + 1e-10)        form="code"
              weight * var(Z) / (mean(Z)   + 1e-10)        form="paper"

The first half of the experts belongs to type 1 (world knowledge), the second to type 0 (the rest).
The variance is the unbiased one over all of Z; the terms of the layers are added up. Note what the
published formula does: Z are equal where the experts that belong to a type get less of it, by
(1 - delta) / (1 + delta). A negative delta turns that around.

Source: Dou et al. 2024, LoRAMoE (arXiv 2312.09979): equations of section 3 and the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from cl_fast.errors import CheckpointError
from cl_fast.models.heads import unwrap
from cl_fast.models.sharding import local, row_range
from cl_fast.ops import gated_low_rank
from cl_fast.options import at_least, not_negative, one_of, positive, share
from cl_fast.training.keeping import Keep, Task

__all__ = [
    "Balance",
    "LoRAMoE",
    "WithColumn",
    "add_lora_moe",
    "load_lora_moe",
    "lora_moe_layers",
    "lora_moe_state_dict",
    "remove_lora_moe",
]

TARGETS = ("gate_proj", "up_proj", "down_proj")
"""The feed-forward layers of Llama and its kin, as in the paper."""

_PARTS = ("down", "gate", "up")
_SAMPLED = 16  # numbers of a base weight by which it is known again


# --- the layer ---------------------------------------------------------------------------------


class LoRAMoE(nn.Module):  # type: ignore[misc]
    """A layer y = W x + c, frozen, with n low-rank experts behind a softmax gate.

    At the start the experts add nothing: B is zero, A and G are uniform in +- 1 / sqrt(d_in).

    Args:
        base_layer: an `nn.Linear` (or a subclass, quantised ones too), or a Conv1D of transformers.
        experts: n.
        rank: r of each expert.
        alpha: s = alpha / rank.
        dropout: of what the experts see of x; one mask for all of them, the gate sees all of x.
            Drawn from torch's global generator, like that of `nn.Dropout`.
        generator: of the start values, on the CPU; torch's global one by default.
        dtype: of the weights; by default float32, or float64 for a base of float64. The products
            are in the dtype of x.

    Attributes:
        down: A, [n r, d_in], the rows of one expert after those of another.
        gate: G, [n, d_in].
        up: B, [d_out, n r].
        gates: a list takes up the gate's probabilities of each call; None for no collecting.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        experts: int = 8,
        rank: int = 4,
        alpha: float = 32.0,
        dropout: float = 0.0,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_options(experts, rank, alpha, dropout)
        self.in_features, self.out_features = _features("base_layer", base_layer)
        weight = base_layer.weight
        assert isinstance(weight, Tensor)
        self.base_layer = base_layer.requires_grad_(False)
        self.experts, self.rank, self.dropout = experts, rank, dropout
        self.scale = alpha / rank
        self.gates: list[Tensor] | None = None
        dtype = dtype or (torch.float64 if weight.dtype == torch.float64 else torch.float32)
        bound = 1.0 / math.sqrt(self.in_features)  # kaiming_uniform with a = sqrt(5)
        wide, rows = self.in_features, experts * rank

        def start(count: int) -> nn.Parameter:
            values = torch.empty(count, wide).uniform_(-bound, bound, generator=generator)
            return nn.Parameter(values.to(weight.device, dtype))

        self.down, self.gate = start(rows), start(experts)
        self.up = nn.Parameter(weight.new_zeros((self.out_features, rows), dtype=dtype))
        self.base_sample = _sample(weight)

    @property
    def weight(self) -> Tensor:
        """That of the base: some models ask a layer for its dtype or device."""
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias = self.base_layer.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] to [..., d_out]."""
        kept, scale = None, self.scale
        if self.training and self.dropout:
            kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - self.dropout)
            scale = scale / (1.0 - self.dropout)
        y, p = gated_low_rank(
            x, self.down, self.gate, self.up, scale=scale, base=self.base_layer(x), kept=kept
        )
        if self.gates is not None:
            self.gates.append(p)
        return y

    def merge(self) -> None:
        """Always an error: what is added depends on the input, so no weight can hold it.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "the experts of LoRAMoE cannot be folded into the weight: their gate depends on the "
            "input. Save them with lora_moe_state_dict and load them beside the base"
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, experts={self.experts}, rank={self.rank}, "
            f"scale={self.scale:g}, dropout={self.dropout:g}"
        )


def _check_options(experts: int, rank: int, alpha: float, dropout: float) -> None:
    at_least("experts", experts, 1)
    at_least("rank", rank, 1)
    positive("alpha", alpha)
    share("dropout", dropout, whole=False)


def _features(name: str, module: nn.Module) -> tuple[int, int]:
    """d_in and d_out of a layer that can be wrapped.

    Raises:
        TypeError: it is no linear layer.
        ValueError: it has no weight now.
    """
    if isinstance(module, nn.Linear):
        sizes = module.in_features, module.out_features
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        sizes = int(module.weight.shape[0]), int(module.nf)
    else:
        hint = ""
        if hasattr(module, "lora_A"):
            hint = ": it has adapters of PEFT already; merge or unload them first"
        elif isinstance(module, LoRAMoE):
            hint = ": it has experts already; remove_lora_moe takes them away"
        raise TypeError(
            f"{name} must be an nn.Linear or a Conv1D of transformers; got "
            f"{type(module).__name__}{hint}"
        )
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.is_meta:
        raise ValueError(f"{name} has no weights yet (meta device): load the model first")
    if isinstance(weight, DTensor):
        raise ValueError(f"{name} is sharded already: add the experts before fully_shard")
    return sizes


def _sample(weight: Tensor) -> tuple[float, ...]:
    """A few numbers spread over a base weight; none of a quantised one."""
    if not weight.is_floating_point() or weight.dtype.itemsize == 1 or not weight.numel():
        return ()
    flat = weight.detach().reshape(-1)
    count = min(_SAMPLED, flat.numel())
    at = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long()
    return tuple(flat[at.to(flat.device)].double().tolist())


# --- in a model --------------------------------------------------------------------------------


def lora_moe_layers(model: nn.Module) -> dict[str, LoRAMoE]:
    """The layers with experts by their names, in the model's order."""
    found = unwrap(model).named_modules()
    return {name: module for name, module in found if isinstance(module, LoRAMoE)}


def add_lora_moe(
    model: nn.Module,
    targets: str | Sequence[str] = TARGETS,
    *,
    experts: int = 8,
    rank: int = 4,
    alpha: float = 32.0,
    dropout: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Wraps layers of `model` in `LoRAMoE`, in place, and freezes all of its other parameters.

    Args:
        model: any module, with its weights loaded and not yet wrapped by DDP or sharded.
        targets: ends of the names of layers: "down_proj" and "mlp.down_proj" both mean
            "model.layers.0.mlp.down_proj". For GPT-2: ("mlp.c_fc", "mlp.c_proj").
        experts, rank, alpha, dropout, dtype: see `LoRAMoE`.
        seed: of the start values.

    Returns:
        The names of the layers.

    Raises:
        TypeError: a target is a layer that cannot be wrapped.
        ValueError: a target is nowhere in the model, or an option is out of range.
    """
    _check_options(experts, rank, alpha, dropout)
    ends = (targets,) if isinstance(targets, str) else tuple(targets)
    if not ends:
        raise ValueError("targets must name at least one layer; got none")
    names = []
    unmet = dict.fromkeys(ends)
    for name, module in model.named_modules(remove_duplicate=False):
        met = [end for end in ends if name == end or name.endswith("." + end)]
        if met:
            _features(name, module)
            names.append(name)
            for end in met:
                unmet.pop(end, None)
    if unmet:
        raise ValueError(
            f"targets: no layer's name ends in {next(iter(unmet))!r}; the linear layers end in "
            f"{_ends_of_linear_layers(model)}"
        )
    made: dict[int, LoRAMoE] = {}  # one layer under two names stays one
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for name in names:
        base = model.get_submodule(name)
        if id(base) not in made:
            layer = LoRAMoE(base, experts, rank, alpha, dropout, generator=generator, dtype=dtype)
            made[id(base)] = layer.train(base.training)
        _replace(model, name, made[id(base)])
    return names


def _ends_of_linear_layers(model: nn.Module) -> list[str]:
    found = (n for n, m in model.named_modules() if isinstance(m, nn.Linear) or hasattr(m, "nf"))
    return sorted({name.rpartition(".")[2] for name in found})


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def remove_lora_moe(model: nn.Module) -> nn.Module:
    """Puts the base layers back, as they were; they stay frozen.

    Returns:
        The model.

    Raises:
        ValueError: the model has no experts.
    """
    inner = unwrap(model)
    _some_layers(inner)
    for name, module in list(inner.named_modules(remove_duplicate=False)):
        if isinstance(module, LoRAMoE):
            _replace(inner, name, module.base_layer)
    return model


def _some_layers(model: nn.Module) -> dict[str, LoRAMoE]:
    layers = lora_moe_layers(model)
    if not layers:
        raise ValueError(
            f"{type(unwrap(model)).__name__} has no layer with experts: call add_lora_moe first"
        )
    return layers


# --- saving ------------------------------------------------------------------------------------


def lora_moe_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What was trained, by the names of the layers: ready for `safetensors.torch.save_file`.

    Each layer gives `down`, `gate`, `up`, its `scale`, and in `base` a few numbers of the base
    weight by which `load_lora_moe` knows it again. Weights share memory with the model. Under FSDP2
    all ranks must call it, and each gets whole tensors.

    Raises:
        ValueError: the model has no experts.
    """
    state = {}
    for name, layer in _some_layers(model).items():
        for part in _PARTS:
            weight = getattr(layer, part).detach()
            state[f"{name}.{part}"] = (
                weight.full_tensor() if isinstance(weight, DTensor) else weight
            )
        state[f"{name}.scale"] = torch.tensor(layer.scale, dtype=torch.float64)
        state[f"{name}.base"] = torch.tensor(layer.base_sample, dtype=torch.float64)
    return state


def load_lora_moe(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    dropout: float = 0.0,
    check_base: bool = True,
) -> list[str]:
    """Loads what `lora_moe_state_dict` gave, into a model with the same layers or onto a base.

    A model without experts gets those of `state` first, like `add_lora_moe`. Nothing is changed
    before everything has been checked.

    Args:
        model: with experts in the layers that `state` names, or with none.
        state: of `lora_moe_state_dict`.
        dropout: of layers that are made here.
        check_base: whether the base weights must be those that the experts were trained on. A few
            numbers of each are compared, to the precision of bfloat16; quantised ones are not.

    Returns:
        The names of the layers.

    Raises:
        CheckpointError: parts are missing or unknown; a layer is missing, has other shapes, another
            scale, or another base.
    """
    _check_options(1, 1, 1.0, dropout)
    inner = unwrap(model)
    saved = _by_layer(state)
    layers = lora_moe_layers(inner)
    wanted = layers or _linear_layers(inner, list(saved))
    for what, names, others in (
        ("state has no experts for", wanted, saved),
        ("model has no experts in", saved, wanted),
    ):
        missing = [name for name in names if name not in others]
        if missing:
            raise CheckpointError(
                f"{what} the layer {missing[0]}{_and_more(missing)}: they were saved with other "
                "targets, or from another model"
            )
    for name, parts in saved.items():
        _check_layer(name, parts, wanted[name], check_base)
    if not layers:
        inner.requires_grad_(False)
        for name, parts in saved.items():
            n = parts["gate"].size(0)
            rank = parts["down"].size(0) // n
            layers[name] = LoRAMoE(
                wanted[name], n, rank, float(parts["scale"]) * rank, dropout
            ).train(wanted[name].training)  # fmt: skip
            _replace(inner, name, layers[name])
    with torch.no_grad():
        for name, parts in saved.items():
            for part in _PARTS:
                weight = getattr(layers[name], part)
                local(weight).copy_(parts[part][row_range(weight)])
    return list(wanted)


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _by_layer(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    saved: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, _, part = key.rpartition(".")
        if part not in (*_PARTS, "scale", "base") or not name:
            raise CheckpointError(f"{key} is not a part of LoRAMoE: give lora_moe_state_dict's")
        saved.setdefault(name, {})[part] = value
    if not saved:
        raise CheckpointError("state is empty: there are no experts to load")
    for name, parts in saved.items():
        for part in (*_PARTS, "scale", "base"):
            if part not in parts:
                raise CheckpointError(f"state has no {name}.{part}: the file was cut or edited")
    return saved


def _linear_layers(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    found = {}
    for name, module in model.named_modules():
        if name in names:
            try:
                _features(name, module)
            except TypeError as error:
                raise CheckpointError(str(error)) from error
            found[name] = module
    return found


def _check_layer(name: str, parts: Mapping[str, Tensor], onto: nn.Module, base: bool) -> None:
    down, gate, up = (parts[part] for part in _PARTS)
    if isinstance(onto, LoRAMoE):
        shapes = {part: tuple(getattr(onto, part).shape) for part in _PARTS}
        here, scale = onto.base_sample, onto.scale
    else:
        wide, out = _features(name, onto)
        n = gate.size(0) if gate.dim() == 2 else 0
        rows = down.size(0) if n and down.dim() == 2 and down.size(0) % n == 0 else 0
        shapes = {"down": (rows, wide), "gate": (n, wide), "up": (out, rows)}
        weight = onto.weight
        assert isinstance(weight, Tensor)
        here, scale = _sample(weight), float(parts["scale"])
    for part, tensor in (("down", down), ("gate", gate), ("up", up)):
        if tuple(tensor.shape) != shapes[part] or 0 in tensor.shape:
            raise CheckpointError(
                f"{name}.{part} has the shape {tuple(tensor.shape)}, where the model needs "
                f"{shapes[part]}: it has other experts, another rank, or is another base"
            )
    if float(parts["scale"]) != scale:
        raise CheckpointError(
            f"{name} was trained with the scale {float(parts['scale']):g}, the model has {scale:g} "
            "(alpha / rank): add the experts with the same alpha"
        )
    was = parts["base"].double().tolist()
    if base and was and here:
        largest = max(map(abs, was))
        same = len(was) == len(here) and all(
            abs(a - b) <= 2.0**-7 * largest for a, b in zip(was, here, strict=True)
        )
        if not same:
            raise CheckpointError(
                f"{name} was trained on another base: its weight has other numbers. Load the base "
                "that it was trained on, or give check_base=False if this is meant"
            )


# --- the balancing loss ------------------------------------------------------------------------


Form = Literal["code", "paper"]


class Balance(Keep):
    """The localised balancing loss of LoRAMoE: each type of task prefers its half of the experts.

    The batch tells the type of each sequence in a column of 0 and 1, which the model never sees: a
    hook takes it out of the model's keyword arguments, and the gates of this very forward pass are
    what the loss is made of. Forward passes without the column, without gradients or in eval mode
    leave no gates behind, so other keeps may call the model as they like.

    Only one `Balance` at a time on a model. Not for packed sequences: a row has one type.

    Args:
        weight: of the loss.
        delta: in (-1, 1).
        column: of the batch: [b], 1 for the first half of the experts, 0 for the second.
        form: "code", var / mean^2 as the authors compute it, or "paper", var / mean.
        mask_padding: leave tokens out whose `attention_mask` is 0; the authors count them.

    Raises:
        ValueError: an option is out of range.

    Source: Dou et al. 2024, arXiv 2312.09979.
    """

    def __init__(
        self,
        weight: float = 0.1,
        delta: float = 0.1,
        *,
        column: str = "task_type",
        form: Form = "code",
        mask_padding: bool = False,
    ) -> None:
        not_negative("weight", weight)
        if not -1.0 < delta < 1.0:
            raise ValueError(f"delta must be in (-1, 1); got {delta!r}")
        one_of("form", form, ("code", "paper"))
        if column in ("input_ids", "attention_mask", "labels", ""):
            raise ValueError(f"column must be one that the model does not need; got {column!r}")
        self.weight, self.delta, self.column = weight, delta, column
        self.form, self.mask_padding = form, mask_padding
        self._layers: list[LoRAMoE] = []
        self._hooks: list[RemovableHandle] = []
        self._found: list[Tensor] | None = None
        self._last: Tensor | None = None

    def before_task(self, model: nn.Module, task: Task) -> None:
        self._release()
        inner = unwrap(model)
        layers = _some_layers(inner)
        for name, layer in layers.items():
            if layer.experts % 2:
                raise ValueError(
                    f"{name} has {layer.experts} experts, which cannot be halved between two types "
                    "of tasks: use an even number"
                )
        self._layers = list(layers.values())
        self._hooks = [
            inner.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            inner.register_forward_hook(self._after_forward, always_call=True),
        ]

    def after_task(self, model: nn.Module, task: Task) -> None:
        self._release()

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._collect(False)
        self._hooks, self._layers, self._found, self._last = [], [], None, None

    def _collect(self, on: bool) -> None:
        for layer in self._layers:
            layer.gates = [] if on else None

    def _before_forward(
        self, model: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.column not in given:
            return None
        if model.training and torch.is_grad_enabled():
            self._found = None
            self._collect(True)
        return args, {name: value for name, value in given.items() if name != self.column}

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        # Layers collect during this forward pass only: not when checkpointing runs them again.
        collected = [layer.gates for layer in self._layers]
        if collected and collected[0] is not None:
            self._found = [p for gates in collected for p in gates or ()]
            self._collect(False)

    def loss(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
        found, self._found = self._found, None
        types = inputs.get(self.column)
        if types is None:
            raise ValueError(
                f"the batch has no column {self.column!r}: keep it in the dataset "
                "(remove_unused_columns=False) and in the collator (WithColumn)"
            )
        if found is None:
            raise ValueError(
                f"the model was not called with the column {self.column!r}: give the batch to the "
                "model as it is, in training mode, before the loss of Balance is asked for"
            )
        types = _types(types, self.column)
        mask = self._mask(inputs)
        by_experts: dict[int, list[Tensor]] = {}
        for p in found:
            if not p.requires_grad:
                raise ValueError(
                    "the gates have no gradient: reentrant gradient checkpointing hides them. Give "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
            if p.dim() != 3 or p.size(0) != types.numel():
                raise ValueError(
                    f"{self.column} tells the types of {types.numel()} sequences, where a layer "
                    f"saw the shape {tuple(p.shape[:-1])}: packed or flattened batches cannot be "
                    "balanced"
                )
            if mask is None:
                q = p.sum(1)
            else:
                q = torch.bmm(mask.to(p.device, p.dtype).unsqueeze(1), p).squeeze(1)
            by_experts.setdefault(p.size(2), []).append(q.to(types.device))
        total = sum(self._term(torch.stack(q), types) for q in by_experts.values())
        assert isinstance(total, Tensor)
        value = self.weight * total
        self._last = value.detach()
        return value

    def _mask(self, inputs: Mapping[str, Any]) -> Tensor | None:
        if not self.mask_padding:
            return None
        mask = inputs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise ValueError(
                "mask_padding=True needs an attention_mask [batch, length] in the batch; got "
                + ("none" if mask is None else f"{type(mask).__name__}")
            )
        return mask

    def _term(self, q: Tensor, types: Tensor) -> Tensor:
        """The sum over layers, from Q [layers, b, n]."""
        half = q.size(2) // 2
        first = torch.arange(q.size(2), device=q.device) < half
        match = first.unsqueeze(0) == (types == 1).unsqueeze(1)
        z = (q * torch.where(match, 1.0 + self.delta, 1.0 - self.delta)).flatten(1)
        mean = z.mean(1)
        return (z.var(1) / ((mean**2 if self.form == "code" else mean) + 1e-10)).sum()

    def options(self) -> dict[str, Any]:
        return {
            "weight": self.weight,
            "delta": self.delta,
            "column": self.column,
            "form": self.form,
            "mask_padding": self.mask_padding,
        }

    def measures(self) -> dict[str, float]:
        return {} if self._last is None else {"balance/loss": float(self._last)}


def _types(given: Any, column: str) -> Tensor:
    """The types of a batch, [b].

    Raises:
        TypeError: not a tensor of whole numbers.
        ValueError: another type than 0 or 1.
    """
    if not isinstance(given, Tensor) or given.is_floating_point() or given.is_complex():
        kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"{column} must be a tensor of whole numbers, one per sequence; got {kind}")
    types = given.reshape(-1).long()
    if not bool(((types == 0) | (types == 1)).all()):
        unknown = sorted({int(t) for t in types.tolist()} - {0, 1})
        raise ValueError(f"{column} must be 0 or 1 for each sequence; got {unknown}")
    return types


class WithColumn:
    """A collator that takes one more column along: a whole number per example.

        DataLoader(data, collate_fn=WithColumn(collate, "task_type"))

    Args:
        collate: makes a batch (a dict) of a list of examples; it does not see the column.
        column: of the examples and of the batch, [b] of int64; 0 or 1 for each.

    Raises:
        ValueError: when it is called: an example without the column, or with another type.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], column: str = "task_type") -> None:
        if not callable(collate):
            raise TypeError(f"collate must be a collator; got {type(collate).__name__}")
        self.collate, self.column = collate, column

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Any:
        types = list(self._read(examples))
        rest = [{k: v for k, v in one.items() if k != self.column} for one in examples]
        batch = self.collate(rest)
        batch[self.column] = torch.tensor(types, dtype=torch.int64)
        return batch

    def _read(self, examples: Sequence[Mapping[str, Any]]) -> Iterator[int]:
        for i, one in enumerate(examples):
            if self.column not in one:
                raise ValueError(
                    f"example {i} of the batch has no column {self.column!r}; it has {sorted(one)} "
                    "(in the Trainer set remove_unused_columns=False)"
                )
            value = one[self.column]
            if value not in (0, 1):
                raise ValueError(f"{self.column} must be 0 or 1; example {i} has {value!r}")
            yield int(value)
