"""Linear layers in factor form: what a gradient is made of, and an update that stays in factors.

    dL/dW = sum_t delta_t x_t^T    x_t [f], what the layer is given at token t; delta_t = dL/dy_t
    y = W x + U (V^T x)            U [d, n], V [f, n]: the update U V^T, never multiplied out

    matrices_of(model, layers)     the matrices that a gradient edits, found from modules
    recorded(matrices)             x_t and y_t of every token while the context lasts
    updated(matrices, updates)     the layers answer with their update, differentiable in U and V
    frozen_call(model, function)   a function as the model's forward, its weights without gradients

GPT-2's Conv1D, whose weight is stored as [f, d], and nn.Linear are one here: W is [d, f].
`frozen_call` is `torch.func.functional_call` with detached weights: no weight is marked, none gets
a `.grad`, and what lies below the first edited layer builds no graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cl_fast.models.blocks import Decoder, widths_of
from cl_fast.models.heads import function_inside

__all__ = ["Matrix", "Record", "frozen_call", "matrices_of", "recorded", "updated"]


@dataclass(frozen=True, eq=False)
class Matrix:
    """A linear layer whose W [d, f] a gradient edits.

    Attributes:
        name: of the module in the model.
        module: an nn.Linear, or GPT-2's Conv1D.
        transposed: the weight is stored as [f, d].
        inputs, outputs: f and d.
    """

    name: str
    module: nn.Module
    transposed: bool
    inputs: int
    outputs: int

    @property
    def weight(self) -> nn.Parameter:
        """As it is stored."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight


def _matrix(name: str, module: nn.Module) -> Matrix:
    widths = widths_of(module)
    weight = getattr(module, "weight", None)
    if widths is None or not isinstance(weight, nn.Parameter):
        raise ValueError(
            f"{name} is a {type(module).__name__}; the layers to edit must be nn.Linear or Conv1D "
            "with a weight of their own"
        )
    if not weight.dtype.is_floating_point or weight.dtype.itemsize == 1:
        raise ValueError(
            f"{name}.weight is quantised ({weight.dtype}): an edit is a small change of a weight, "
            "which needs 16 bits or more. Load the model without quantisation"
        )
    if hasattr(weight, "placements"):
        raise ValueError(f"{name}.weight is sharded over ranks: gather the model on one device")
    if weight.is_meta:
        raise ValueError(f"{name}.weight has no values (meta device): load the model first")
    return Matrix(name, module, not isinstance(module, nn.Linear), *widths)


def _of_block(decoder: Decoder, layer: int) -> list[Matrix]:
    """The linear layers of the MLP of a block: those outside of its attention."""
    decoder.site(layer)  # refuses what cannot be edited, naming the module
    block, block_name = decoder.blocks[layer], decoder.names[layer]
    outside: list[Matrix] = []
    attentions = [n for n, m in block.named_modules() if "attention" in type(m).__name__.lower()]
    for name, module in block.named_modules():
        within = any(name == n or name.startswith(f"{n}.") for n in attentions)
        if name and not within and widths_of(module) is not None:
            outside.append(_matrix(f"{block_name}.{name}", module))
    return outside


def matrices_of(decoder: Decoder, layers: str | Sequence[int] | Sequence[str]) -> list[Matrix]:
    """The matrices to edit, in the order of the model.

    Args:
        decoder: of the model.
        layers: "auto": the MLP's matrices of the last three blocks; indices of blocks: those of
            these; or names of modules.

    Raises:
        TypeError, ValueError: a block or module does not exist, is there twice, or cannot be
            edited; the message names it.
    """
    if isinstance(layers, str):
        if layers != "auto":
            raise ValueError(
                f"layers must be 'auto', indices of blocks, or a list of names; got {layers!r}"
            )
        layers = list(range(max(0, len(decoder) - 3), len(decoder)))
    given: list[Any] = list(layers)
    if not given:
        raise ValueError("layers is empty: name at least one block or module")
    if all(isinstance(item, str) for item in given):
        modules = dict(decoder.model.named_modules())
        for name in given:
            if name not in modules:
                ending = str(name).rsplit(".", 1)[-1]
                close = [n for n in modules if n.endswith(ending) and n][:3]
                hint = f"; there are {', '.join(close)}" if close else ""
                raise ValueError(f"layers: the model has no module {name!r}{hint}")
        found = [_matrix(str(name), modules[name]) for name in given]
    else:
        given = [decoder.layer(index) for index in given]
        found = [m for i in sorted(set(given)) for m in _of_block(decoder, i)]
    twice = [item for i, item in enumerate(given) if item in given[:i]]
    if twice:
        raise ValueError(f"layers: {twice[0]!r} is there twice")
    head = decoder.model.get_output_embeddings()
    if any(matrix.module is head for matrix in found):
        raise ValueError("layers: the output head cannot be edited; choose layers of the blocks")
    order = {name: i for i, (name, _) in enumerate(decoder.model.named_modules())}
    found.sort(key=lambda m: order[m.name])
    for matrix in found:
        others = [
            name
            for name, p in decoder.model.named_parameters(remove_duplicate=False)
            if p is matrix.module.weight and name != f"{matrix.name}.weight"
        ]
        if others:
            raise ValueError(f"{matrix.name}.weight is also {others[0]}: an edit would change both")
    return found


@dataclass(eq=False)
class Record:
    """What a layer was given and what it answered: [batch, length, f] and [batch, length, d].

    `y` requires grad, so that dL/dy is a gradient like any other.
    """

    x: Tensor | None = None
    y: Tensor | None = None


@contextlib.contextmanager
def recorded(matrices: Sequence[Matrix]) -> Iterator[list[Record]]:
    """One `Record` per matrix, filled by the forward pass that runs while this lasts.

    Raises:
        ValueError: a layer is called more than once in it.
    """
    records = [Record() for _ in matrices]
    hooks = []

    def hook_of(matrix: Matrix, record: Record) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if record.y is not None:
                raise ValueError(
                    f"{matrix.name} is called more than once in a forward pass: its gradient is "
                    "not that of one product. Leave it out of layers"
                )
            y = output if output.requires_grad else output.detach().requires_grad_(True)
            record.x, record.y = args[0].detach(), y
            return y

        return hook

    try:
        for matrix, record in zip(matrices, records, strict=True):
            hooks.append(matrix.module.register_forward_hook(hook_of(matrix, record)))
        yield records
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def updated(matrices: Sequence[Matrix], updates: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """y = W x + U (V^T x) while this lasts: the product in the dtype of U, one rounding to y's.

    Args:
        matrices: the layers.
        updates: U [d, n] and V [f, n] of each; gradients flow to both. n may be 0.
    """
    hooks = []

    def hook_of(u: Tensor, v: Tensor) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            with torch.autocast(output.device.type, enabled=False):
                x = args[0].to(u.dtype)
                change = (x @ v.to(x.device)) @ u.to(x.device).T
                return (output + change).to(output.dtype)

        return hook

    try:
        for matrix, (u, v) in zip(matrices, updates, strict=True):
            hooks.append(matrix.module.register_forward_hook(hook_of(u, v)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def frozen_call(inner: nn.Module, function: Callable[..., Any], **inputs: Any) -> Any:
    """`function(inner, **inputs)` as the forward pass of `inner`, all weights of it detached.

    Gradients reach what hooks add, and nothing of the model.
    """
    weights = {name: parameter.detach() for name, parameter in inner.named_parameters()}
    with function_inside(inner, function):
        return functional_call(inner, weights, (), inputs)
