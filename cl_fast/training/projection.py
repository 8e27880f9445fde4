"""Full fine-tuning whose update stays out of subspaces that earlier tasks need.

    D  = W - W_start                       after each step of the optimizer
    D <- (I - U U^T) D (I - M M^T)
    W  = W_start + D

    protect     M                                          U
    "inputs"    basis of the inputs of earlier tasks       none             GPM
    "weights"   leading right singular vectors of W_start  leading left     OSF

GPM (Saha et al. 2021, arXiv 2103.09762): D M = 0, so what a layer answers to inputs in the span of
M does not change. OSF (Nayak et al. 2025, arXiv 2504.07097): the leading singular directions of the
weight stay as they are. Both papers project the gradient. That is exact for SGD; Adam divides each
element by a root of its own, and its steps leave the subspace again, weight decay too. Here it is
the update that is projected, whatever made it.

The projection is linear and idempotent, so to project D, all that has changed since the task began,
is the same as to project each step; but rounding does not add up over steps, and whatever an
optimizer with weights of its own (float32 masters) writes back is taken off as well. It costs one
copy of the covered weights.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cl_fast.models.adapters import active_adapter, lora_layers
from cl_fast.models.heads import unwrap
from cl_fast.models.sharding import local, row_range, sum_over_ranks_
from cl_fast.ops import orthogonal_project_
from cl_fast.options import at_least, dtype_name, one_of, share
from cl_fast.training.keeping import Keep, Task, needs
from cl_fast.training.subspaces import (
    extend_basis,
    input_moments,
    linear_layers,
    weight_subspace,
)

__all__ = ["Project"]

_TOGETHER = 1 << 24
"""Elements of the layers whose updates are held, in float32, at a time."""

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(eq=False)
class _Layer:
    """A matrix that is kept out of a subspace while a task lasts.

    owner: the module whose `weight` it is; FSDP may put another parameter there.
    start: the weight at the task's start, the rows of this rank once they are known; None for zero.
    left: U, like start's rows. right: M.
    """

    name: str
    owner: nn.Linear
    columns: int
    start: Tensor | None
    left: Tensor | None
    right: Tensor | None
    split: bool = False

    @property
    def protected(self) -> bool:
        return self.left is not None or self.right is not None

    def weight(self) -> Tensor:
        weight = self.owner.weight
        if weight.dim() != 2 or weight.size(1) != self.columns:
            raise ValueError(
                f"{self.name}.weight has become {tuple(weight.shape)}: a trainer has flattened or "
                "gathered it (FSDP1, ZeRO-3). FSDP2 and DDP are understood"
            )
        return weight

    def settle(self, weight: Tensor) -> None:
        """Take what belongs to the rows of this rank, on its device."""
        if not self.split:
            rows, device = row_range(weight), local(weight).device
            whole = rows == slice(0, weight.size(0))
            for name in ("start", "left"):
                held = getattr(self, name)
                if held is not None:
                    part = held.to(device) if whole else held[rows].to(device, copy=True)
                    setattr(self, name, part)
            if self.right is not None:
                self.right = self.right.to(device)
            self.split = True


class Project(Keep):
    """Keep updates of linear layers out of what earlier tasks need, whatever optimizer made them.

    With `protect="inputs"` the inputs of each finished task are collected and their leading
    directions protected from then on. The first task is free, unless `remember` was called with
    data that stand for what the model can do. With `protect="weights"` no data are needed: the
    leading singular directions of the weights at the start of each task are protected.

    Args:
        protect: "inputs" (GPM) or "weights" (OSF).
        energy: which share of the energy (sum of squares) of the inputs, or of the weight, the
            protected directions hold. A number, or one per task: for "inputs" of the task that is
            remembered, for "weights" of the task to come; the last stands for all that follow.
            By default 0.99 for "inputs"; for "weights" none, and `rank` decides.
        rank: at most so many directions per layer; an int counts them, a float is a share of d_in
            ("inputs") or of min(d_in, d_out) ("weights"). A number, or one per task. By default
            none for "inputs"; 0.5 for "weights" unless `energy` is given.
        layers: a regular expression for whole names of linear layers; None for all but the output
            head.
        others: "freeze" holds every other parameter (embeddings, norms, biases, head) at its
            value while something is protected: only then old inputs reach the layers unchanged.
            "train" lets them move, unprotected.
        target: "weights", or "lora_A": in a model with a LoRA of PEFT the rows of A are kept off
            the inputs of earlier tasks, A M = 0, so that B A x = 0 there whatever B becomes (as in
            InfLoRA). Each task then needs a new adapter, with B = 0. `layers` and `others` do not
            apply.
        adapter: for target="lora_A", its name; None for the active one.
        tokens: how many tokens of a task to collect inputs of; None for all.
        moments: dtype of the second moments of inputs while they are collected.

    Raises:
        ValueError: an option out of its range, or that does not apply.
    """

    def __init__(
        self,
        protect: Literal["inputs", "weights"] = "inputs",
        *,
        energy: float | Sequence[float] | None = None,
        rank: float | Sequence[float] | None = None,
        layers: str | None = None,
        others: Literal["freeze", "train"] | None = None,
        target: Literal["weights", "lora_A"] = "weights",
        adapter: str | None = None,
        tokens: int | None = 65536,
        moments: torch.dtype = torch.float64,
    ) -> None:
        one_of("protect", protect, ("inputs", "weights"))
        one_of("target", target, ("weights", "lora_A"))
        if target == "lora_A":
            if protect != "inputs":
                raise ValueError("target='lora_A' keeps A off inputs: protect must be 'inputs'")
            for name, value in (("layers", layers), ("others", others)):
                if value is not None:
                    raise ValueError(f"{name} does not apply to target='lora_A': PEFT decides it")
        elif adapter is not None:
            raise ValueError("adapter applies to target='lora_A' only")
        others = others or "freeze"
        one_of("others", others, ("freeze", "train"))
        if energy is None and protect == "inputs":
            energy = 0.99
        if energy is None and rank is None:
            rank = 0.5
        if tokens is not None:
            at_least("tokens", tokens, 1)
        if moments not in (torch.float32, torch.float64):
            raise TypeError(f"moments must be torch.float32 or torch.float64; got {moments}")
        self.protect, self.layers, self.others = protect, layers, others
        self.target, self.adapter = target, adapter
        self.energy = _per_task("energy", energy, _energy)
        self.rank = _per_task("rank", rank, _rank)
        self.tokens, self.moments = tokens, moments

        self.bases: dict[str, Tensor] = {}
        """Of the inputs of what was remembered: layer -> M [d_in, k]. Layers that are called with
        the same tensor have the same basis."""
        self.remembered = 0
        self._covered: list[_Layer] = []
        self._frozen: list[tuple[nn.Module, str]] = []
        self._prints: dict[str, int] = {}
        self._expected: dict[str, int] | None = None
        self._model: nn.Module | None = None

    # Hooks.

    def before_task(self, model: nn.Module, task: Task) -> None:
        """Note the weights at the start, and what of them to protect.

        Raises:
            ValueError: the model has no layers to cover, or others than the bases are of; its
                weights are not those from which a resumed run had started.
        """
        self._release()
        inner = unwrap(model)
        covered = self._cover(inner)
        if self.target == "lora_A":
            self._check_bases(covered)
        else:
            prints = {layer.name: _fingerprint(layer.weight()) for layer in covered}
            self._check_bases(covered)
            self._check_prints(prints, self._expected)
            self._prints, self._expected = prints, None
            for layer in covered:
                layer.start = local(layer.weight()).clone()
                layer.split = hasattr(layer.weight(), "placements")
        if self.protect == "weights":
            self._protect_weights(covered, task.index)
        self._covered, self._model = covered, inner
        self._protect_inputs()
        if self.target == "lora_A" and any(layer.protected for layer in covered):
            self._begin_adapter(inner)

    def on_update(self, model: nn.Module) -> None:
        """Take off the update what lies in the protected subspaces.

        Raises:
            ValueError: `before_task` was not called, or a weight has another shape since.
        """
        if self._model is None:
            raise ValueError("before_task must be called before the first step")
        for layer in self._covered:
            if not layer.protected:
                layer.start = None
        with torch.no_grad(), _whole_float32():
            for group in _groups([layer for layer in self._covered if layer.protected]):
                _project(group)

    def after_task(self, model: nn.Module, task: Task) -> None:
        """Let go of the task's start; for "inputs", `remember` the task.

        Raises:
            ValueError: the host does not tell the batches of the task.
        """
        self._release()
        if self.protect == "inputs":
            self.remember(model, needs(task, "batches", "Project")())

    def remember(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
        """Protect the inputs that the layers of `model` have on `batches` from the next task on.

        After each task it is called with the task's own. Call it before the first task, with data
        that stand for what the model can do already.

        Args:
            model: as it answers now.
            batches: what its forward takes, on its device; `attention_mask` tells padding.

        Raises:
            ValueError: with protect="weights"; while a task lasts; see `input_moments`.
        """
        if self.protect != "inputs":
            raise ValueError("protect='weights' needs no inputs: nothing is to be remembered")
        if self._model is not None:
            raise ValueError("remember must be called between tasks: call after_task first")
        inner = unwrap(model)
        covered = self._cover(inner)
        self._check_bases(covered)
        if self.target == "lora_A":
            named: dict[str, nn.Module] = {
                layer.name: layer.module for layer in lora_layers(inner, self._name(inner))
            }
        else:
            named = {layer.name: layer.owner for layer in covered}
        sums = input_moments(model, batches, named, tokens=self.tokens, dtype=self.moments)
        energy, rank = _at(self.energy, self.remembered), _at(self.rank, self.remembered)
        assert energy is not None
        made: dict[tuple[int, int], Tensor] = {}
        bases: dict[str, Tensor] = {}
        for layer in covered:
            old, total = self.bases.get(layer.name), sums[layer.name]
            key = (id(old), id(total))
            if key not in made:
                wide = layer.weight().dtype == torch.float64
                most = None if rank is None else _directions(rank, total.size(0))
                try:
                    basis = extend_basis(
                        old, total, energy=energy, rank=most, floor=2.0 ** (-44 if wide else -20)
                    )
                except ValueError as error:
                    raise ValueError(f"the inputs of {layer.name}: {error}") from error
                made[key] = basis.to(torch.float64 if wide else torch.float32)
            bases[layer.name] = made[key]
        self.bases = bases
        self.remembered += 1

    def state_dict(self) -> dict[str, Any]:
        """The bases, how many sets of inputs made them, and a checksum of each weight at the start
        of the task in training."""
        return {
            "protect": self.protect,
            "target": self.target,
            "remembered": self.remembered,
            "bases": dict(self.bases),
            "start": dict(self._prints),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave, before a task or within one.

        Raises:
            ValueError: it is of other options or another model, whose layer is named; or the
                weights at the task's start were others.
        """
        wanted = {"protect", "target", "remembered", "bases", "start"}
        if set(state) != wanted:
            raise ValueError(f"state must have the keys {sorted(wanted)}; got {sorted(state)}")
        for name in ("protect", "target"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"state has {name}={state[name]!r}, this Project {getattr(self, name)!r}"
                )
        bases: dict[str, Tensor] = dict(state["bases"])
        start: dict[str, int] = dict(state["start"])
        if self._model is not None:
            self._check_bases(self._covered, bases)
            self._check_prints(self._prints, start or None)
        else:
            self._expected = start or None
        self.bases, self.remembered = bases, int(state["remembered"])
        if self._model is not None:
            self._protect_inputs()

    def options(self) -> dict[str, Any]:
        return {
            "protect": self.protect,
            "energy": self.energy,
            "rank": self.rank,
            "layers": self.layers,
            "others": self.others,
            "target": self.target,
            "adapter": self.adapter,
            "tokens": self.tokens,
            "moments": dtype_name(self.moments),
        }

    def measures(self) -> dict[str, float]:
        """`project/protected`: the share of input directions (for "weights", of min(d_in, d_out))
        that is protected, over all covered layers."""
        held = sum(_width(layer.right) for layer in self._covered)
        whole = sum(
            layer.columns if self.protect == "inputs" else min(layer.owner.weight.shape)
            for layer in self._covered
        )
        return {"project/protected": held / whole} if whole else {}

    # What they are made of.

    def _name(self, model: nn.Module) -> str:
        return active_adapter(model) if self.adapter is None else self.adapter

    def _cover(self, model: nn.Module) -> list[_Layer]:
        if self.target == "lora_A":
            return [
                _Layer(found.name, found.module.lora_A[self._name(model)], found.down.size(1),
                       None, None, None)
                for found in lora_layers(model, self._name(model))
            ]  # fmt: skip
        found = linear_layers(model, self.layers)
        trained = {n: m for n, m in found.items() if m.weight.requires_grad}
        if not trained:
            hint = (
                "it has adapters: use target='lora_A', or Orthogonal"
                if hasattr(model, "peft_config")
                else "let them require grad"
            )
            raise ValueError(
                f"all linear layers of {type(model).__name__} are frozen, as {next(iter(found))}: "
                f"there is no update to project; {hint}"
            )
        return [_Layer(n, m, m.weight.size(1), None, None, None) for n, m in trained.items()]

    def _check_bases(self, covered: list[_Layer], bases: dict[str, Tensor] | None = None) -> None:
        bases = self.bases if bases is None else bases
        if not bases:
            return
        known = {layer.name: layer for layer in covered}
        odd = sorted(bases.keys() ^ known.keys())
        if odd:
            has, lacks = ("state", "model") if odd[0] in bases else ("model", "state")
            raise ValueError(
                f"the layer {odd[0]} is one of the {has} but not of the {lacks} "
                f"({len(odd)} such): the bases are of another model, or of other `layers`"
            )
        for name, basis in bases.items():
            columns = known[name].columns
            if basis.dim() != 2 or basis.size(0) != columns or basis.size(1) > columns:
                raise ValueError(
                    f"the basis of {name} must be [{columns}, k]; got {tuple(basis.shape)}: "
                    "it is of another model"
                )

    def _check_prints(self, mine: dict[str, int], expected: dict[str, int] | None) -> None:
        for name, value in (expected or {}).items():
            if mine.get(name) != value:
                raise ValueError(
                    f"{name}.weight is not what it was when the task began: before_task must see "
                    "the model of the task's start, before a checkpoint is loaded into it"
                )

    def _protect_weights(self, covered: list[_Layer], index: int) -> None:
        energy, rank = _at(self.energy, index), _at(self.rank, index)
        for layer in covered:
            weight = layer.weight()
            most = None if rank is None else _directions(rank, min(weight.shape))
            if most == 0 or energy == 0.0:
                continue
            try:
                u, v = weight_subspace(weight, energy=energy, rank=most)
            except ValueError as error:
                raise ValueError(f"{layer.name}: {error}") from error
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            layer.left = u[row_range(weight)].to(dtype).contiguous()
            layer.right = v.to(dtype).contiguous()

    def _protect_inputs(self) -> None:
        """Hand the bases to the layers, and freeze the rest where something is protected."""
        moved: dict[int, Tensor] = {}
        if self.protect == "inputs":
            for layer in self._covered:
                basis = self.bases.get(layer.name)
                layer.right = None
                if basis is not None and basis.size(1):
                    if layer.start is None and self.target == "weights":
                        raise ValueError(
                            "load_state_dict must come before the first step after before_task"
                        )
                    device = local(layer.weight()).device
                    layer.right = moved.setdefault(id(basis), basis.to(device))
        if not any(layer.protected for layer in self._covered) or self._model is None:
            return
        if self.target == "weights" and self.others == "freeze":
            self._freeze(self._model)

    def _begin_adapter(self, model: nn.Module) -> None:
        fresh = True
        for found in lora_layers(model, self._name(model)):
            fresh = fresh and not bool(local(found.up).any())
        if not fresh:
            raise ValueError(
                f"the adapter {self._name(model)!r} has been trained: to take its A off earlier "
                "inputs would change the model. Give each task a new adapter, with B = 0"
            )
        self.on_update(model)

    def _freeze(self, model: nn.Module) -> None:
        covered = {id(layer.owner) for layer in self._covered}
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                held = id(module) in covered and name == "weight"
                if held or not parameter.requires_grad:
                    continue
                parameter.requires_grad_(False)
                parameter.grad = None
                self._frozen.append((module, name))

    def _release(self) -> None:
        for module, name in self._frozen:
            getattr(module, name).requires_grad_(True)
        self._covered, self._frozen, self._prints, self._model = [], [], {}, None


def _groups(layers: list[_Layer]) -> Iterator[list[_Layer]]:
    """Layers of one device and width of number together, up to a bound of memory."""
    group: list[_Layer] = []
    size = 0
    for layer in layers:
        weight = local(layer.weight())
        kind = (weight.device, weight.dtype == torch.float64)
        first = local(group[0].weight()) if group else weight
        odd = kind != (first.device, first.dtype == torch.float64)
        if group and (odd or size + weight.numel() > _TOGETHER):
            yield group
            group, size = [], 0
        group.append(layer)
        size += weight.numel()
    if group:
        yield group


@contextlib.contextmanager
def _whole_float32() -> Iterator[None]:
    """Products of float32 without TF32 or bfloat16, whatever the host trains with."""
    settings: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before = [one.fp32_precision for one in settings]
    try:
        for one in settings:
            one.fp32_precision = "ieee"
        yield
    finally:
        for one, value in zip(settings, before, strict=True):
            one.fp32_precision = value


def _project(group: list[_Layer]) -> None:
    """W = W_start + (I - U U^T) (W - W_start) (I - M M^T), for all of a group."""
    updates: list[Tensor] = []
    for layer in group:
        weight = layer.weight()
        layer.settle(weight)
        mine = local(weight)
        wide = torch.float64 if mine.dtype == torch.float64 else torch.float32
        update = mine.to(wide, copy=True).contiguous()
        if layer.start is not None:
            update -= layer.start  # exact but for one rounding: both have the weight's dtype
        updates.append(update)
    right = [(u, layer.right) for u, layer in zip(updates, group, strict=True)
             if layer.right is not None and u.numel()]  # fmt: skip
    if right:
        orthogonal_project_([u for u, _ in right], [m for _, m in right])
    for update, layer in zip(updates, group, strict=True):
        if layer.left is not None:
            with torch.autocast(update.device.type, enabled=False):
                part = layer.left.t() @ update
                sum_over_ranks_(part, layer.weight())
                update.addmm_(layer.left, part, alpha=-1.0)
    for update, layer in zip(updates, group, strict=True):
        if layer.start is not None:
            update += layer.start
        local(layer.weight()).copy_(update)


def _fingerprint(weight: Tensor) -> int:
    """A sum of bits that does not depend on how rows are split, nor on the order of summation."""
    mine = local(weight)
    bits = mine.contiguous().view(_BITS[mine.dtype.itemsize])
    return int(sum_over_ranks_(bits.sum(dtype=torch.int64), weight))


def _width(basis: Tensor | None) -> int:
    return 0 if basis is None else basis.size(1)


def _energy(value: float) -> None:
    share("energy", value)


def _rank(value: float) -> None:
    if isinstance(value, bool) or not value >= 0:
        raise ValueError(f"rank must be a count, or a share between 0.0 and 1.0; got {value}")
    if isinstance(value, float) and not value <= 1.0:
        raise ValueError(
            f"rank as a float is a share between 0.0 and 1.0; got {value}. Give an int to count"
        )


def _per_task(name: str, value: Any, check: Any) -> list[float] | None:
    if value is None:
        return None
    values = [value] if isinstance(value, int | float) else list(value)
    if not values:
        raise ValueError(f"{name} must be a number, or one per task; got none")
    for one in values:
        if not isinstance(one, int | float) or math.isnan(one):
            raise ValueError(f"{name} must be a number, or one per task; got {one!r}")
        check(one)
    return values


def _at(values: list[float] | None, index: int) -> float | None:
    return None if values is None else values[min(index, len(values) - 1)]


def _directions(rank: float, whole: int) -> int:
    return min(whole, rank if isinstance(rank, int) else round(rank * whole))
