"""O-LoRA: a new task's LoRA stays orthogonal to those of earlier tasks, on PEFT's own adapters.

With A [r, d] the factor next to the input (`lora_A`) and P [R, d] the rows of A of all past tasks,
per module:

    form        what is done                                when
    project     A <- A - (A Q^T) Q, Q a basis of rows(P)    after each step of the optimizer
    squared     grad += weight * 2 A P^T P                  before it: L + weight ||A P^T||_F^2
    l1          grad += weight * sign(A P^T) P              before it: L + weight sum |A P^T|

`squared` is the penalty of the paper, `l1` that of its authors' code (Wang et al. 2023, arXiv
2310.14152). `project` is what the penalties aim at, exactly and without a weight to choose: A Q^T
is 0, so the new task does not answer to inputs in the span of Q.

After a task,

    past="fold"    W <- W + s B A, and the adapter begins anew: a step costs the same at each task
    past="keep"    the adapter stays beside the next one, frozen: it can be removed exactly
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cl_fast.errors import NonFiniteError
from cl_fast.models.adapters import LoraLayer, active_adapter, lora_layers
from cl_fast.models.sharding import local, row_range
from cl_fast.ops.low_rank import rank_update_many_
from cl_fast.ops.orthogonality import orthogonal_penalty, orthogonal_project, orthogonal_project_
from cl_fast.options import integer, not_negative, one_of
from cl_fast.training.keeping import Keep, Task
from cl_fast.training.lora_tasks import activate, add_lora, check_foldable, initialise, whole

__all__ = ["Orthogonal", "lora_penalty", "row_basis"]

Form = Literal["project", "squared", "l1"]
Past = Literal["fold", "keep"]
_FORMS = ("project", "squared", "l1")
_PASTS = ("fold", "keep")
_WEIGHT = 0.5
_SAMPLES = 64

Pair = tuple[nn.Parameter, Tensor, Tensor]
Factors = dict[str, tuple[Tensor, Tensor]]
"""Of one task: A [r, d_in] and s B [d_out, r] of each layer, by its name."""


class Orthogonal(Keep):
    """O-LoRA on the LoRA adapter of a model.

    The first task trains the adapter as it is. From the second one on, its A is kept orthogonal to
    the rows of A of all earlier tasks.

    The penalties are added to `.grad` once per step of the optimizer, after clipping, from their
    formula: no graph, and no dependence on the number of accumulated micro-batches. They do not
    show in the loss that is logged; `measures` gives them.

    Args:
        form: see the module.
        weight: of a penalty, 0.5 by default, as in the authors' scripts, which mean L1; 0 switches
            it off, at no cost.
        past: what becomes of a task's adapter, see the module.
        adapter: its name; by default the active one. With past="keep" it serves the first task,
            and each later task gets an adapter that is called like the task.
        seed: of the adapters of later tasks.

    Attributes:
        tasks: names of the tasks that are finished and not removed.

    Raises:
        TypeError: `seed` is not an int.
        ValueError: unknown `form` or `past`; a negative `weight`, or one with form="project".
    """

    def __init__(
        self,
        form: Form = "project",
        *,
        weight: float | None = None,
        past: Past = "fold",
        adapter: str | None = None,
        seed: int = 0,
    ) -> None:
        one_of("form", form, _FORMS)
        one_of("past", past, _PASTS)
        if form == "project" and weight is not None:
            raise ValueError("form='project' is exact and has no weight; leave weight out")
        if weight is not None:
            not_negative("weight", weight)
        integer("seed", seed)
        self.form, self.past, self.adapter, self.seed = form, past, adapter, seed
        self.weight = _WEIGHT if weight is None else float(weight)
        self.tasks: list[str] = []
        self._adapters: list[str] = []  # of `tasks`, past="keep"
        self._folded: list[Factors] = []  # of `tasks`, past="fold"; on the CPU
        self._samples: dict[str, Tensor] = {}  # of the base, after the last fold
        self._running: _Running | None = None
        self._bases: dict[str, Tensor] = {}
        self._based = 0  # how many tasks the bases hold
        self._value: Tensor | None = None

    # --- the hooks of a keep ---

    def before_task(self, model: nn.Module, task: Task) -> None:
        """Find the adapter, and turn its A out of the past.

        Raises:
            ValueError: no such adapter, or it is frozen or not plain LoRA; its layers or their
                shapes are not those of the past tasks; the base is not the one that they were
                folded into; with past="fold", it is quantised or tied; the past fills a layer.
        """
        if task.name in self.tasks:
            raise ValueError(
                f"the task {task.name!r} is finished already; give each task a name of its own "
                "(KeepCallback(keep, name=...))"
            )
        if not self._adapters:
            name = self.adapter or active_adapter(model)
        else:
            name = task.name
            self._past_factors(model)  # they are all there
            if name not in _configs(model):
                add_lora(model, name, self._adapters[-1], self.seed)
            activate(model, name, beside=self._adapters)
        self._running = self._bound(model, name)
        if self.form == "project":
            self._running.turn_out()

    def restore(self, model: nn.Module, past: Sequence[Task]) -> None:
        if self.past == "keep" and past:
            first = self.adapter or active_adapter(model)
            for task in past[1:]:
                if task.name not in _configs(model):
                    add_lora(model, task.name, first, self.seed)
            names = [first, *(task.name for task in past[1:])]
            activate(model, names[-1], beside=names[:-1], trains=False)

    def _bound(self, model: nn.Module, name: str) -> _Running:
        layers = lora_layers(model, name)
        for layer in layers:
            if not layer.down.requires_grad:
                raise ValueError(
                    f"{layer.name}: the adapter {name!r} is frozen; load it with "
                    "is_trainable=True, or call model.set_adapter"
                )
        if self.past == "fold":
            check_foldable(layers, name, bias=False, instead="past='keep' leaves the base as it is")
            _check_untied(model, layers)
        factors = self._past_factors(model)
        _check_fit(layers, dict(zip(self.tasks, factors, strict=True)))
        self._check_base(layers)
        rows: list[Tensor | None] = [None] * len(layers)
        if factors and self.form == "project":
            rows = [*self._extended(layers, factors)]
        elif factors:
            rows = [_stacked(layer, factors) for layer in layers]
        return _Running(model, name, layers, rows)

    def _past_factors(self, model: nn.Module) -> list[Factors]:
        if self.past == "fold":
            return self._folded
        found = []
        for name in self._adapters:
            if name not in _configs(model):
                raise ValueError(
                    f"the model has no adapter {name!r}, which earlier tasks left; load it, or "
                    f"call restore first. There are {list(_configs(model))}"
                )
            found.append({x.name: (whole(x.down), whole(x.up)) for x in lora_layers(model, name)})
        return found

    def _extended(self, layers: list[LoraLayer], factors: list[Factors]) -> list[Tensor]:
        """The bases, with those tasks that they do not hold yet: one after the other, so that a
        run that is resumed has the same bits."""
        for task in factors[self._based :]:
            for layer in layers:
                rows = task[layer.name][0]
                self._bases[layer.name] = row_basis(rows, self._bases.get(layer.name))
        self._based = len(factors)
        out = []
        for layer in layers:
            basis = self._bases[layer.name].to(layer.down.device)
            if basis.size(0) >= basis.size(1):
                raise ValueError(
                    f"{layer.name}: the past tasks span all {basis.size(1)} of its inputs, which "
                    "leaves nothing for a new one; use a smaller rank, or a penalty"
                )
            self._bases[layer.name] = basis
            out.append(basis)
        return out

    def on_gradients(self, model: nn.Module) -> None:
        if self.form == "project" or not self.weight:
            return
        running = self._at(model)
        if running.rows[0] is not None:
            self._value = running.add_gradient(self.form, self.weight)

    def on_update(self, model: nn.Module) -> None:
        if self.form == "project":
            self._at(model).project()

    def _at(self, model: nn.Module) -> _Running:
        running = self._running
        if running is None:
            raise ValueError("before_task must be called first")
        if running.stale(model):
            running = self._running = self._bound(model, running.name)
        return running

    def after_task(self, model: nn.Module, task: Task) -> None:
        """Fold the adapter into the base and begin it anew; or freeze it.

        Raises:
            NonFiniteError: a factor holds NaN or infinity; nothing is folded.
        """
        running = self._at(model)
        if self.past == "keep":
            activate(model, running.name, beside=self._adapters, trains=False)
            self._adapters.append(running.name)
        else:
            layers = lora_layers(model, running.name)  # FSDP has put other parameters into them
            factors = _factors(layers)
            _fold(layers, factors, 1.0)
            self._folded.append(factors)
            self._samples = {x.name: _sample(x.base) for x in layers}
            initialise(layers, self.seed, f"after {task.name}")
        self.tasks.append(task.name)
        self._running = self._value = None

    def remove(self, model: nn.Module, task: str) -> None:
        """Take a finished task out of the model, and its rows out of the past.

        With past="keep" its adapter is deleted, and the model answers as if it had never been
        there. With past="fold" s B A is subtracted from the weight: product and difference are
        float32, but fold and removal each round to the dtype of the weight, so the weight comes
        back up to two roundings, in float32 too.

        Raises:
            ValueError: no such task.
        """
        if task not in self.tasks:
            raise ValueError(f"unknown task {task!r}; finished are {self.tasks}")
        i = self.tasks.index(task)
        if self.past == "keep":
            self._delete(model, i)
        else:
            layers = self._folded_layers(model)
            _check_fit(layers, {task: self._folded[i]})
            self._check_base(layers)
            _fold(layers, self._folded.pop(i), -1.0)
            self._samples = {x.name: _sample(x.base) for x in layers}
        del self.tasks[i]
        self._bases, self._based = {}, 0
        if self._running is not None:
            self._running = self._bound(model, self._running.name)

    def _delete(self, model: nn.Module, i: int) -> None:
        name, rest = self._adapters[i], [*self._adapters[:i], *self._adapters[i + 1 :]]
        if self._running is not None:
            front, trains = self._running.name, True
        elif rest:
            front, trains = rest[-1], False
        else:
            raise ValueError(
                f"{name!r} is the last adapter; PeftModel.unload gives the model without any"
            )
        peft_model: Any = model
        peft_model.set_adapter(front, inference_mode=not trains)
        peft_model.delete_adapter(name)
        self._adapters = rest
        activate(model, front, beside=[x for x in rest if x != front], trains=trains)

    def _folded_layers(self, model: nn.Module) -> list[LoraLayer]:
        name = self._running.name if self._running else self.adapter or active_adapter(model)
        return lora_layers(model, name)

    def _check_base(self, layers: Sequence[LoraLayer]) -> None:
        for layer in layers if self._samples else ():
            if not torch.equal(_sample(layer.base), self._samples[layer.name]):
                raise ValueError(
                    f"{layer.name}: its weight is not the one that the tasks {self.tasks} were "
                    "folded into; load the model as it was after the last of them"
                )

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """The finished tasks; with past="fold" their factors A and s B, by task and layer."""
        state: dict[str, Any] = {"past": self.past, "tasks": list(self.tasks)}
        state["running"] = self._running.name if self._running else ""
        if self.past == "keep":
            state["adapters"] = list(self._adapters)
        else:
            state["down"] = [{k: down for k, (down, _) in x.items()} for x in self._folded]
            state["up"] = [{k: up for k, (_, up) in x.items()} for x in self._folded]
            state["base"] = dict(self._samples)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave.

        Raises:
            ValueError: it is of another `past`, of other layers or shapes (the layer is named), of
                another base or, within a task, of another adapter.
        """
        if state["past"] != self.past:
            raise ValueError(f"the state is of past={state['past']!r}; this is {self.past!r}")
        running = self._running
        if running is not None and state["running"] not in ("", running.name):
            raise ValueError(
                f"the state was saved while the adapter {state['running']!r} was trained, and now "
                f"it is {running.name!r}: load the state of the task before, and call restore"
            )
        made = Orthogonal(self.form, past=self.past, adapter=self.adapter)
        made.tasks = list(state["tasks"])
        if self.past == "keep":
            made._adapters = list(state["adapters"])
        else:
            pairs = zip(state["down"], state["up"], strict=True)
            made._folded = [{k: (down[k], up[k]) for k in down} for down, up in pairs]
            made._samples = dict(state["base"])
        if running is not None:
            made._running = made._bound(running.model, running.name)  # refuses what does not fit
            if made._adapters:
                activate(running.model, running.name, beside=made._adapters)
            if self.form == "project":
                made._running.turn_out()
        for kept in ("tasks", "_adapters", "_folded", "_samples", "_running", "_bases", "_based"):
            setattr(self, kept, getattr(made, kept))

    def options(self) -> dict[str, Any]:
        weight = None if self.form == "project" else self.weight
        return {
            "form": self.form,
            "weight": weight,
            "past": self.past,
            "adapter": self.adapter,
            "seed": self.seed,
        }

    def measures(self) -> dict[str, float]:
        """`orthogonal/penalty`, weighted, before the last step; or with form="project"
        `orthogonal/overlap`, the largest ||A Q^T|| / ||A|| of a module. Of the rows on this rank;
        nothing in the first task."""
        if self.form == "project":
            running = self._running
            if running is None or running.rows[0] is None:
                return {}
            return {"orthogonal/overlap": max(running.overlaps(), default=0.0)}
        return {} if self._value is None else {"orthogonal/penalty": float(self._value)}

    def past_rows(self, model: nn.Module) -> dict[str, Tensor]:
        """P [R, d_in] of each layer, for `lora_penalty`; empty before a task is finished."""
        factors = self._past_factors(model)
        name = self._running.name if self._running else self.adapter or active_adapter(model)
        return {x.name: _stacked(x, factors) for x in lora_layers(model, name)} if factors else {}


class _Running:
    """The adapter of the task in training, and what it is kept from.

    rows: of each layer P, or with form="project" the basis; None where there is no past.
    """

    def __init__(
        self, model: nn.Module, name: str, layers: list[LoraLayer], rows: list[Tensor | None]
    ) -> None:
        self.model, self.name, self.rows = model, name, rows
        self.device = layers[0].down.device
        # Not their weights: FSDP puts others into the same modules.
        self.downs = [layer.module.lora_A[name] for layer in layers]

    def stale(self, model: nn.Module) -> bool:
        return model is not self.model or self.downs[0].weight.device != self.device

    def pairs(self) -> list[Pair]:
        """Parameter, its rows on this rank, and the past; where there are both."""
        found = []
        for module, past in zip(self.downs, self.rows, strict=True):
            if past is not None:
                p = module.weight
                mine = local(p) if isinstance(p, DTensor) else p
                if mine.numel():
                    found.append((p, mine, past))
        return found

    def project(self, passes: int = 1) -> None:
        for group in _by_device(self.pairs()):
            orthogonal_project_(
                [a.detach() for _, a, _ in group],
                [q for *_, q in group],
                rows=True,
                passes=passes,
            )

    def overlaps(self) -> list[float]:
        found = []
        for _, a, q in self.pairs():
            x = a.detach().to(q.dtype)
            found.append(float((x @ q.t()).norm()) / max(float(x.norm()), 1e-300))
        return found

    def turn_out(self) -> None:
        """Project, unless A is clean up to its rounding: a run that is resumed keeps its bits."""
        pairs = self.pairs()
        if pairs and max(self.overlaps()) > 8 * torch.finfo(pairs[0][1].dtype).eps:
            self.project(passes=2)

    def add_gradient(self, form: str, weight: float) -> Tensor:
        """The weighted penalty of the rows on this rank."""
        values = []
        for group in _by_device(self.pairs()):
            news, pasts, grads = [], [], []
            for p, a, past in group:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                news.append(a)
                pasts.append(past)
                grads.append(local(p.grad) if isinstance(p.grad, DTensor) else p.grad)
            add = _add_one_by_one if news[0].is_cpu else _add_at_once
            values.append(add(news, pasts, grads, form, weight))
        device = values[0].device if values else self.device
        return torch.stack([v.to(device) for v in values]).sum() if values else torch.zeros(())


def _add_one_by_one(
    news: list[Tensor], pasts: list[Tensor], grads: list[Tensor], form: str, weight: float
) -> Tensor:
    """grad += weight * gradient; the weighted penalty.

    Module by module, each past is read from memory once and for its second product from the cache:
    on a CPU that is faster than one call for all that reads everything twice.
    """
    wide = _widest([*news, *pasts])
    sizes = [a.size(0) * p.size(0) for a, p in zip(news, pasts, strict=True)]
    products = torch.empty(sum(sizes), dtype=wide)
    l1 = form == "l1"
    factor = weight if l1 else 2.0 * weight
    parts = products.split(sizes)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for a, past, grad, flat in zip(news, pasts, grads, parts, strict=True):
            s, p = flat.view(a.size(0), past.size(0)), past.to(wide)
            torch.mm(a.to(wide), p.t(), out=s)
            sign = s.sign() if l1 else s
            if grad.dtype == wide:
                grad.addmm_(sign, p, alpha=factor)
            else:
                grad.copy_(torch.addmm(grad.to(wide), sign, p, alpha=factor))
        return weight * (products.abs().sum() if l1 else products.dot(products))


def _add_at_once(
    news: list[Tensor], pasts: list[Tensor], grads: list[Tensor], form: str, weight: float
) -> Tensor:
    """The same by one call per direction: a few launches on a GPU for all modules."""
    with torch.enable_grad():
        leaves = [a.detach().requires_grad_() for a in news]
        value = orthogonal_penalty(leaves, pasts, form="l1" if form == "l1" else "squared")
        found = torch.autograd.grad(value, leaves)
    with torch.no_grad():
        same = [g.to(grad.dtype) for g, grad in zip(found, grads, strict=True)]
        torch._foreach_add_(grads, same, alpha=weight)
    return weight * value.detach()


def lora_penalty(
    model: nn.Module,
    past: Mapping[str, Tensor],
    *,
    adapter: str | None = None,
    form: Literal["squared", "l1"] = "squared",
) -> Tensor:
    """The O-LoRA penalty as a term of a loss of your own, differentiable in the A of the adapter.

    Under gradient accumulation divide it like the rest of the loss.

    Args:
        model: with an adapter of PEFT.
        past: rows of A of past tasks, [R, d_in], by the names of layers, as
            `Orthogonal.past_rows` gives them. Layers that are not named have none.
        adapter: its name; by default the active one.
        form: "squared" or "l1".

    Raises:
        ValueError: `past` names a layer that has no such adapter, or has other columns; no such
            adapter; unknown `form`.
    """
    layers = lora_layers(model, adapter or active_adapter(model))
    if strange := sorted(past.keys() - {layer.name for layer in layers}):
        raise ValueError(f"past has rows of {strange[0]}, which has no such adapter")
    for layer in layers:
        rows = past.get(layer.name)
        if rows is not None and rows.shape[1:] != layer.down.shape[1:]:
            raise ValueError(
                f"{layer.name}: past has the shape {tuple(rows.shape)}; "
                f"{layer.down.shape[1]} columns are needed"
            )
    return orthogonal_penalty(
        [layer.down for layer in layers], [past.get(layer.name) for layer in layers], form=form
    )


def row_basis(rows: Tensor, basis: Tensor | None = None) -> Tensor:
    """Orthonormal rows [k, d] that span `rows` [R, d] and `basis`, which stays as it is in front.

    Computed in float64, and float32 unless `rows` is float64. A direction that is less than the
    rounding of `rows` is none: k is the numerical rank.
    """
    x = rows.detach().cpu().double()
    tolerance = float(x.norm(dim=1).max()) if x.numel() else 0.0
    tolerance *= max(x.shape) * torch.finfo(rows.dtype).eps
    made = torch.float64 if rows.dtype == torch.float64 else torch.float32
    if basis is not None:
        x = orthogonal_project(x, basis.cpu().double(), rows=True, passes=2)
    _, sizes, directions = torch.linalg.svd(x, full_matrices=False)
    found = directions[sizes > tolerance].to(made)
    if basis is None:
        return found.to(rows.device)
    return torch.cat([basis, found.to(basis.device, basis.dtype)])


# --- factors, and the base under them ----------------------------------------------------------


def _configs(model: nn.Module) -> Mapping[str, Any]:
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    return configs


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    double = any(x.dtype == torch.float64 for x in tensors)
    return torch.float64 if double else torch.float32


def _by_device(items: list[Pair]) -> list[list[Pair]]:
    groups: dict[torch.device, list[Pair]] = {}
    for item in items:
        groups.setdefault(item[1].device, []).append(item)
    return list(groups.values())


def _stacked(layer: LoraLayer, factors: list[Factors]) -> Tensor:
    rows = [task[layer.name][0] for task in factors]
    made = torch.float64 if _widest(rows) == torch.float64 else torch.float32
    return torch.cat([x.to(layer.down.device, made) for x in rows])


def _factors(layers: Sequence[LoraLayer]) -> Factors:
    """A and s B, whole and on the CPU."""
    found: Factors = {}
    for layer in layers:
        wide = _widest([layer.base.weight, layer.down])
        down, up = whole(layer.down).to(wide).cpu(), whole(layer.up).to(wide).cpu() * layer.scale
        for name, factor in (("lora_A", down), ("lora_B", up)):
            if not bool(factor.isfinite().all()):
                raise NonFiniteError(
                    f"{layer.name}: {name} holds NaN or infinity, so the task is not folded; train "
                    "it again with a smaller learning rate"
                )
        # `down` may be the parameter itself, which begins anew.
        found[layer.name] = (down.clone(), up)
    return found


def _fold(layers: Sequence[LoraLayer], factors: Factors, sign: float) -> None:
    """W += sign * s B A: the product in float32 (float64 for float64), one rounding."""
    groups: dict[torch.device, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for layer in layers:
        weight: Any = layer.base.weight
        mine, rows = local(weight), row_range(weight)
        wide = torch.float64 if mine.dtype == torch.float64 else torch.float32
        down, up = (x.to(mine.device, wide) for x in factors[layer.name])
        if mine.numel():
            item = (mine, up[rows].contiguous(), down.t().contiguous())
            groups.setdefault(mine.device, []).append(item)
    with torch.no_grad():
        for items in groups.values():
            weights, us, vs = (list(x) for x in zip(*items, strict=True))
            rank_update_many_(weights, us, vs, alphas=sign)


def _sample(base: nn.Module) -> Tensor:
    """Some entries of a weight, to know it again."""
    assert isinstance(base.weight, Tensor)
    flat = whole(base.weight).reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, _SAMPLES, dtype=torch.float64).long()
    taken = flat[places.to(flat.device)].cpu()
    return taken.to(_widest([taken]))


def _check_fit(layers: Sequence[LoraLayer], past: Mapping[str, Factors]) -> None:
    for task, factors in past.items():
        for layer in layers:
            if layer.name not in factors:
                raise ValueError(
                    f"{layer.name} has an adapter now, but had none in the task {task!r}: the "
                    "adapters are of other layers, or of another model"
                )
            down, up = factors[layer.name]
            found = (up.shape[0], down.shape[1])
            if found != (layer.up.shape[0], layer.down.shape[1]):
                raise ValueError(
                    f"{layer.name}: the task {task!r} left factors of a weight "
                    f"{found}, and here it is {(layer.up.shape[0], layer.down.shape[1])}: they "
                    "are of another model"
                )
        if gone := sorted(factors.keys() - {layer.name for layer in layers}):
            raise ValueError(
                f"{gone[0]} had an adapter in the task {task!r} and has none now: train the same "
                "target_modules in every task"
            )


def _check_untied(model: nn.Module, layers: Sequence[LoraLayer]) -> None:
    """A weight that another module uses too would change there as well."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for layer in layers:
        names = owners.get(id(layer.base.weight), [])
        if len(names) > 1:
            raise ValueError(
                f"{layer.name}: its weight is tied ({names[0]}, {names[1]}), so a fold would "
                "change another module too. Leave it out of target_modules, or use past='keep'"
            )
