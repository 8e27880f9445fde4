"""One LoRA per task on one base, with PEFT: train them apart, then switch, compose or merge.

    y = W x + sum_t w_t s_t B_t A_t x        weights w_t of your choice, at inference

`LoraTasks` is a keep: before each task it adds an adapter of PEFT that has the task's name and
trains that one alone. Afterwards

    use(model, "a")                             one task's adapter
    compose(model, {"a": 0.5, "b": 0.5})        one adapter from several, by PEFT: exactly the sum
                                                above (`cat`), or svd, linear, ties, dare_ties, ...
    merged_state_dict(model, {"a": 0.5})        W + sum_t w_t s_t B_t A_t as plain weights, for
                                                `cl_fast.merging` or to save

An adapter begins with A uniform in (-1, 1) / sqrt(d_in), drawn from a seed (it is what
`kaiming_uniform_(a=sqrt(5))` draws), and B = 0.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cl_fast.models.adapters import LoraLayer, active_adapter, lora_layers
from cl_fast.models.bases import adapters_off
from cl_fast.models.sharding import local, row_range
from cl_fast.ops.low_rank import rank_update
from cl_fast.options import integer, one_of
from cl_fast.training.keeping import Keep, Task

__all__ = [
    "LoraTasks",
    "activate",
    "add_lora",
    "check_foldable",
    "compose",
    "initialise",
    "known_adapters",
    "merged_state_dict",
    "use",
    "whole",
]

How = Literal[
    "cat",
    "svd",
    "linear",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
_HOWS = get_args(How)
_STARTS = ("fresh", "previous")
_DENSE = ("cat", "svd", "linear")


class LoraTasks(Keep):
    """A new adapter for each task, named after it; the others are frozen and switched off.

    Nothing that an earlier task learned is touched, so nothing is forgotten as long as the task is
    known at inference. `use`, `compose` and `merged_state_dict` are for that time.

    Args:
        adapter: an adapter of the model whose configuration the new ones get; by default the
            active one. It is not trained.
        start: "fresh", or "previous" to begin a task with the adapter of the task before it.
        seed: of the fresh adapters. What is drawn depends on the task's name as well.

    Raises:
        TypeError: `seed` is not an int.
        ValueError: unknown `start`.
    """

    def __init__(
        self,
        *,
        adapter: str | None = None,
        start: Literal["fresh", "previous"] = "fresh",
        seed: int = 0,
    ) -> None:
        one_of("start", start, _STARTS)
        integer("seed", seed)
        self.adapter, self.start, self.seed = adapter, start, seed
        self.tasks: list[str] = []
        self._template = adapter

    def before_task(self, model: nn.Module, task: Task) -> None:
        """Add the adapter of the task and make it the one that is trained.

        Raises:
            ValueError: the model is not a PeftModel; there is no such template; the task was
                trained before; its name cannot be an adapter's.
        """
        if task.name in self.tasks:
            raise ValueError(
                f"the task {task.name!r} was trained before; give each task a name of its own"
            )
        if task.name not in known_adapters(model):
            self._add(model, task.name)
            if self.start == "previous" and self.tasks:
                _copy_adapter(model, self.tasks[-1], task.name)
        activate(model, task.name)

    def restore(self, model: nn.Module, past: Sequence[Task]) -> None:
        for task in past:
            if task.name not in known_adapters(model):
                self._add(model, task.name)
        if past:
            activate(model, past[-1].name, trains=False)

    def _add(self, model: nn.Module, name: str) -> None:
        if self._template is None:
            self._template = active_adapter(model)
        add_lora(model, name, self._template, self.seed)

    def after_task(self, model: nn.Module, task: Task) -> None:
        self.tasks.append(task.name)
        activate(model, task.name, trains=False)

    @contextlib.contextmanager
    def scoring(self, model: nn.Module, name: str) -> Iterator[None]:
        """The task's own adapter; none where it has none."""
        if name not in self.tasks:
            with adapters_off(model):
                yield
            return
        before = active_adapter(model)
        activate(model, name, trains=False)
        try:
            yield
        finally:
            activate(model, before, trains=False)

    def state_dict(self) -> dict[str, Any]:
        return {"tasks": list(self.tasks), "template": self._template or ""}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.tasks = list(state["tasks"])
        self._template = state["template"] or self.adapter

    def options(self) -> dict[str, Any]:
        return {"adapter": self.adapter, "start": self.start, "seed": self.seed}


# --- at inference ------------------------------------------------------------------------------


def use(model: nn.Module, task: str) -> None:
    """Answer with the adapter of one task, frozen.

    Raises:
        ValueError: the model has no such adapter: those that it has are named.
    """
    _check_tasks(model, [task])
    activate(model, task, trains=False)


def compose(
    model: nn.Module,
    weights: Mapping[str, float],
    how: How = "cat",
    *,
    name: str = "composed",
    replace: bool = False,
    seed: int = 0,
    **options: Any,
) -> str:
    """Make one adapter of several, and answer with it.

    `how="cat"` is exactly sum_t w_t s_t B_t A_t, of the sum of the ranks. The others are PEFT's
    `add_weighted_adapter`: "svd" truncates that sum to `svd_rank`; "linear", "ties", "dare_*" and
    "magnitude_prune" work on the factors A and B, which is not a merge of their products; with
    "_svd" they merge the products and truncate. To merge whole products by TIES or DARE without a
    truncation, give `merged_state_dict` of each task to `cl_fast.merging`.

    Args:
        model: a PeftModel.
        weights: w_t, by the names of tasks; may be negative.
        how: see above.
        name: of the new adapter.
        replace: take the place of an adapter of that name.
        seed: of the random masks of "dare_*"; torch's own state is left as it was.
        options: of `add_weighted_adapter`: density, svd_rank, majority_sign_method, ...

    Returns:
        `name`.

    Raises:
        TypeError: `weights` is not a mapping to numbers; `seed` is not an int.
        ValueError: an unknown task (the known ones are named) or `how`; `name` is taken; a
            pruning merge without `density`; an adapter with a bias on B, which PEFT would drop.
    """
    weights = _check_weights(model, weights)
    integer("seed", seed)
    one_of("how", how, _HOWS)
    if how not in _DENSE and len(weights) > 1 and options.get("density") is None:
        raise ValueError(f"how={how!r} needs density, the fraction of entries that is kept")
    if name in weights or (name in known_adapters(model) and not replace):
        raise ValueError(
            f"there is an adapter called {name!r}; choose another name, or replace=True for one "
            "that is not among the weights"
        )
    peft_model: Any = model
    for task in weights:
        if getattr(peft_model.peft_config[task], "lora_bias", False):
            raise ValueError(
                f"the adapter {task!r} has lora_bias=True, and PEFT leaves the bias out when it "
                "combines adapters; use merged_state_dict"
            )
    for task in weights:
        lora_layers(model, task)  # refuses what is not B A x
    if name in known_adapters(model):
        peft_model.delete_adapter(name)
    with torch.random.fork_rng(devices=_cuda_devices(model)):
        torch.manual_seed(seed)
        peft_model.add_weighted_adapter(
            list(weights), list(weights.values()), name, combination_type=how, **options
        )
    if how == "cat":
        _concatenate(model, weights, name)
    # PEFT means the scale 1 by lora_alpha = r, which is not 1 where the configuration that it
    # copied has rsLoRA.
    peft_model.peft_config[name].use_rslora = False
    for layer in lora_layers(model, name):
        layer.module.scaling[name] = 1.0
        layer.module.use_rslora[name] = False
    activate(model, name, trains=False)
    return name


def _concatenate(model: nn.Module, weights: Mapping[str, float], name: str) -> None:
    """The factors of "cat". Of a single adapter PEFT makes something else, with a root of its
    weight in float32 on either side."""
    parts = {t: {x.name: x for x in lora_layers(model, t)} for t in weights}
    with torch.no_grad():
        for layer in lora_layers(model, name):
            rank = 0
            layer.down.zero_()
            layer.up.zero_()
            for task, weight in weights.items():
                if (part := parts[task].get(layer.name)) is None:
                    continue
                rows = slice(rank, rank := rank + part.down.shape[0])
                layer.down[rows] = part.down * (weight * part.scale)
                layer.up[:, rows] = part.up


def merged_state_dict(model: nn.Module, weights: str | Mapping[str, float]) -> dict[str, Tensor]:
    """The state dict of the base model with adapters in its weights: W + sum_t w_t s_t B_t A_t.

    Products and sum are float32 (float64 for float64 weights), rounded once to the dtype of W. The
    model is not changed. Tensors without an adapter are those of the model itself, not copies.

    Args:
        model: a PeftModel.
        weights: w_t by the names of tasks, or the name of one task, with weight 1.

    Raises:
        TypeError: `weights` is not a mapping to numbers.
        ValueError: an unknown task; a quantised or sharded base; adapters are merged into it at
            this moment; several tasks, or a weight other than 1, with modules_to_save.
    """
    weights = _check_weights(model, {weights: 1.0} if isinstance(weights, str) else weights)
    saved = _saved_modules(model, weights)
    joined: dict[str, list[tuple[float, LoraLayer]]] = {}
    for task, weight in weights.items():
        layers = lora_layers(model, task)
        check_foldable(layers, task, bias=True, instead="Load the base in bfloat16 or float32")
        for layer in layers:
            joined.setdefault(layer.name, []).append((weight, layer))
    peft_model: Any = model
    inner = peft_model.get_base_model()
    prefix = _prefix_of(model, inner)
    merged: dict[str, Tensor] = {}
    for name, parts in joined.items():
        base: Any = parts[0][1].base
        low = _wide(base.weight)
        u = torch.cat([layer.up.detach().to(low) * (w * layer.scale) for w, layer in parts], 1)
        v = torch.cat([layer.down.detach().to(low) for _, layer in parts], 0)
        merged[f"{name}.weight"] = rank_update(base.weight.detach(), u, v.t().contiguous())
        extra = [(w * y.scale, b) for w, y in parts if (b := _bias_of(y)) is not None]
        if extra:
            bias = sum((b.detach().to(low) * s for s, b in extra), base.bias.detach().to(low))
            assert isinstance(bias, Tensor)
            merged[f"{name}.bias"] = bias.to(base.bias.dtype)
    out: dict[str, Tensor] = {}
    for key, tensor in inner.state_dict().items():
        plain = _plain_name(key, saved)
        if plain is not None:
            out[plain] = merged.pop(prefix + plain, tensor)
    assert not merged, sorted(merged)
    return out


def _saved_modules(model: nn.Module, weights: Mapping[str, float]) -> dict[str, str]:
    """Prefixes of the keys that belong to one of PEFT's copies of whole modules, and what they
    become: of `modules_to_save` of the one task, else of the original."""
    found: dict[str, str] = {}
    peft_model: Any = model
    for name, module in peft_model.get_base_model().named_modules():
        copies = getattr(module, "modules_to_save", None)
        if hasattr(module, "token_adapter"):
            raise ValueError(
                f"{name}: trainable tokens are not part of a merged state dict; call the model's "
                "merge_and_unload instead"
            )
        if not isinstance(copies, nn.ModuleDict):
            continue
        tasks = [task for task in weights if task in copies]
        if tasks and (len(weights) > 1 or weights[tasks[0]] != 1):
            raise ValueError(
                f"{name} is in modules_to_save of the task {tasks[0]!r}: it is a whole module, not "
                "a delta with a weight. Take one task with weight 1, or merge without it"
            )
        kept = f"modules_to_save.{tasks[0]}" if tasks else "original_module"
        found[f"{name}."] = f"{name}.{kept}."
    return found


def _plain_name(key: str, saved: Mapping[str, str]) -> str | None:
    """What a key of the wrapped model is called in the plain one; None where it is PEFT's."""
    for start, kept in saved.items():
        if key.startswith(start):
            return start + key.removeprefix(kept) if key.startswith(kept) else None
    parts = key.split(".")
    if any(part.startswith("lora_") for part in parts):
        return None
    return ".".join(part for part in parts if part != "base_layer")


def _prefix_of(model: nn.Module, inner: nn.Module) -> str:
    for name, module in model.named_modules():
        if module is inner:
            return f"{name}." if name else ""
    raise AssertionError("the base model is part of the PeftModel")


# --- adapters of PEFT --------------------------------------------------------------------------


def known_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters of a PeftModel.

    Raises:
        ValueError: the model is none.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not hasattr(model, "base_model"):
        raise ValueError(
            f"{type(model).__name__} is not a PeftModel: wrap it with peft.get_peft_model first"
        )
    return list(configs)


def add_lora(model: nn.Module, name: str, template: str, seed: int) -> list[LoraLayer]:
    """Add an adapter like the one called `template`, of the same dtype, freshly initialised.

    It is not active yet. torch's own random state is left as it was.

    Raises:
        ValueError: `name` cannot be an adapter's; there is no `template`, or it is not plain LoRA;
            the model is sharded already.
    """
    known = known_adapters(model)
    if not name or "." in name:
        raise ValueError(
            f"a task's name becomes the name of an adapter: it must not be empty or hold a "
            f"dot; got {name!r}"
        )
    if template not in known:
        raise ValueError(f"there is no adapter {template!r} to be like; there are {known}")
    like = {layer.name: layer for layer in lora_layers(model, template)}
    for layer in like.values():
        if isinstance(layer.down, DTensor):
            raise ValueError(
                f"{layer.name} is sharded: adapters must be added before fully_shard; call "
                "before_task first"
            )
    peft_model: Any = model
    config = copy.deepcopy(peft_model.peft_config[template])
    config.init_lora_weights = True  # others (PiSSA, LoftQ, ...) would change the base again
    config.inference_mode = False
    with torch.random.fork_rng(devices=[]):
        peft_model.add_adapter(name, config)
    layers = lora_layers(model, name)
    for layer in layers:
        for new, old in ((layer.down, like[layer.name].down), (layer.up, like[layer.name].up)):
            new.data = new.data.to(dtype=old.dtype, device=old.device)
    initialise(layers, seed, name)
    return layers


def initialise(layers: Iterable[LoraLayer], seed: int, label: str) -> None:
    """A uniform in (-1, 1) / sqrt(d_in), B = 0, drawn from the seed and the label.

    Rows that are on other ranks are drawn too, so the result does not depend on their number.
    """
    digest = blake2b(f"{seed}/{label}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    with torch.no_grad():
        for layer in layers:
            bound = 1.0 / math.sqrt(layer.down.shape[1])
            drawn = torch.empty(layer.down.shape, dtype=torch.float32)
            drawn.uniform_(-bound, bound, generator=generator)
            local(layer.down).copy_(drawn[row_range(layer.down)])
            local(layer.up).zero_()
            bias = _bias_of(layer)
            if bias is not None:
                local(bias).zero_()


def _bias_of(layer: LoraLayer) -> Tensor | None:
    for up in layer.module.lora_B.values():
        if up.weight is layer.up:
            bias: Tensor | None = up.bias
            return bias
    return None


def _copy_adapter(model: nn.Module, source: str, target: str) -> None:
    old = {layer.name: layer for layer in lora_layers(model, source)}
    with torch.no_grad():
        for new in lora_layers(model, target):
            local(new.down).copy_(local(old[new.name].down))
            local(new.up).copy_(local(old[new.name].up))


def activate(
    model: nn.Module, adapter: str, beside: Sequence[str] = (), *, trains: bool = True
) -> None:
    """Make `adapter` the one that is trained (or none, with trains=False), and let the adapters
    `beside` it answer too, frozen.

    PEFT's set_adapter makes all adapters trainable that it activates, and PeftModel's own takes
    one only; a Trainer that resumes looks at the first.
    """
    peft_model: Any = model
    peft_model.set_adapter(adapter, inference_mode=not trains)
    if beside:
        peft_model.base_model.set_adapter([adapter, *beside], inference_mode=not trains)
        peft_model.base_model.set_requires_grad(list(beside), requires_grad=False)


def check_foldable(layers: Iterable[LoraLayer], adapter: str, *, bias: bool, instead: str) -> None:
    """Raise ValueError unless s B A can be added to the weight of each layer."""
    for layer in layers:
        weight = getattr(layer.base, "weight", None)
        kind = type(layer.base).__name__
        if not isinstance(weight, Tensor) or not (
            weight.dtype.is_floating_point and weight.dtype.itemsize > 1
        ):
            kept = getattr(weight, "dtype", "no weight")
            raise ValueError(
                f"{layer.name}: the base is quantised ({kind}, {kept}), so nothing can be added "
                f"to it. {instead}"
            )
        expected = (layer.up.shape[0], layer.down.shape[1])
        if tuple(weight.shape) != expected or weight.is_meta:
            raise ValueError(
                f"{layer.name}: the weight of the base has the shape {tuple(weight.shape)} at this "
                f"moment, not {expected}: it is packed, offloaded or sharded (ZeRO-3). {instead}"
            )
        if layer.module.merged:
            raise ValueError(
                f"{layer.name}: adapters are merged into the base at this moment "
                f"({layer.module.merged_adapters}); call unmerge_adapter first"
            )
        up_bias = layer.module.lora_B[adapter].bias
        if up_bias is not None and (not bias or getattr(layer.base, "bias", None) is None):
            raise ValueError(
                f"{layer.name}: the adapter {adapter!r} has lora_bias=True, which is not folded. "
                f"{instead}"
            )


def whole(tensor: Tensor) -> Tensor:
    """All rows of a parameter, on every rank; without a graph."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})


def _check_tasks(model: nn.Module, tasks: Iterable[Any]) -> None:
    known = known_adapters(model)
    for task in tasks:
        if task not in known:
            raise ValueError(f"unknown task {task!r}; the model has adapters of {known}")


def _check_weights(model: nn.Module, weights: Any) -> dict[str, float]:
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights must map names of tasks to numbers; got {weights!r}")
    if not weights:
        raise ValueError("weights must name at least one task; got none")
    _check_tasks(model, weights)
    for task, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise TypeError(f"weights[{task!r}] must be a number; got {weight!r}")
        if not math.isfinite(weight):
            raise ValueError(f"weights[{task!r}] must be finite; got {weight}")
    return {task: float(weight) for task, weight in weights.items()}
