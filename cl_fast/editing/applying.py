"""Factors on a model's weights, and off again to the last bit.

    merge    W = round(W0 + U V^T)        from the untouched W0, which is kept; one rounding
    branch   y + U (V^T x)                in float32, beside the untouched weight

Everything is checked before the first weight is written: that each layer is there, has the patch's
shape, holds the very values that the patch was fitted on, and has no other patch on it. What fails
in the middle is taken back.
"""

from __future__ import annotations

import difflib
import os
import warnings
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cl_fast.checkpoints.patches import new_weight_hash
from cl_fast.errors import NonFiniteError
from cl_fast.ops import rank_update_
from cl_fast.ops.low_rank import MOST_RANK
from cl_fast.ops.reproducible import reproducible_update_

__all__ = [
    "How",
    "Rounding",
    "apply_factors",
    "check_bases",
    "find_layers",
    "patch_on",
    "undo_patches",
    "weight_hash",
    "write_factors",
]

How = Literal["merge", "branch"]
Rounding = Literal["nearest", "stochastic"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HALF = (torch.bfloat16, torch.float16)
_BLOCK = 1 << 20
"""Elements that are widened at a time."""

_EDITED: weakref.WeakKeyDictionary[nn.Module, Application] = weakref.WeakKeyDictionary()
"""What is on which layer. The untouched weights live as long as the layers, also where nobody holds
the patch any more; nothing here keeps a model alive."""


class Factors(Protocol):
    """What is put on one layer: W0 + U V^T, or W0 + V U^T where the weight is transposed."""

    @property
    def name(self) -> str: ...
    @property
    def transposed(self) -> bool: ...
    @property
    def base_hash(self) -> str: ...
    @property
    def U(self) -> Tensor: ...
    @property
    def V(self) -> Tensor: ...


def weight_hash(weight: Tensor) -> str:
    """The hash by which a patch knows its base: of the shape and of the values.

    bfloat16, float16 and float32 weights of equal values have one hash; a float64 weight has
    another (cl_fast.checkpoints.patches says how it is made).

    Args:
        weight: as the state dict has it, on any device.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    hasher = new_weight_hash(weight.shape, "F64" if wide == torch.float64 else "F32")
    rows = weight.detach().reshape(-1, weight.shape[-1]) if weight.dim() else weight.reshape(1, 1)
    step = max(1, _BLOCK // max(1, rows.shape[1]))
    for first in range(0, rows.shape[0], step):
        block = rows[first : first + step].to("cpu", wide).contiguous()
        hasher.update(block.numpy().data)
    return hasher.hexdigest()


def _hashes(weights: Sequence[Tensor]) -> list[str]:
    """`weight_hash` of each: hashing lets other threads work."""
    workers = min(len(weights), 4, os.cpu_count() or 1)
    if workers < 2 or sum(weight.numel() for weight in weights) < 4 * _BLOCK:
        return [weight_hash(weight) for weight in weights]
    with ThreadPoolExecutor(workers, "cl_fast hash") as pool:
        return list(pool.map(weight_hash, weights))


def bare(model: nn.Module) -> nn.Module:
    """The model within DDP, FSDP and torch.compile."""
    while True:
        wrapped = isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
        if wrapped or type(model).__name__ == "FullyShardedDataParallel":
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def find_layers(model: nn.Module, layers: Sequence[Factors]) -> list[nn.Module]:
    """The modules that hold the edited weights, once they are of the patch's shapes.

    Raises:
        ValueError: one is missing, sharded, quantised, offloaded, or of another shape.
    """
    inner = bare(model)
    modules = dict(inner.named_modules(remove_duplicate=False))
    found = []
    for layer in layers:
        module = modules.get(layer.name)
        if module is None:
            tail = layer.name.rsplit(".", 1)[-1]
            alike = [name for name in modules if name.endswith(tail)] or list(modules)
            close = difflib.get_close_matches(layer.name, alike, 1, 0.0)
            raise ValueError(
                f"the model {type(inner).__name__} has no layer {layer.name!r}, which the patch "
                f"edits{f' (it has {close[0]!r})' if close else ''}; apply it to the model that it "
                "was fitted on"
            )
        weight = getattr(module, "weight", None)
        what = f"the weight of layer {layer.name!r}"
        if not isinstance(weight, Tensor):
            raise ValueError(f"{what} is missing: {type(module).__name__} has none")
        if isinstance(weight, DTensor):
            raise ValueError(
                f"{what} is sharded over ranks; apply the patch before the model is sharded, or "
                "to the saved checkpoint (cl_fast.merging.apply_patch)"
            )
        if weight.dtype not in _FLOATS:
            raise ValueError(
                f"{what} is {weight.dtype}, a quantised type; apply the patch to the unquantised "
                "model and quantise the result"
            )
        if weight.device.type == "meta":
            raise ValueError(f"{what} is on the meta device (offloaded, or not loaded); load it")
        d, f = layer.U.shape[0], layer.V.shape[0]
        shape = (f, d) if layer.transposed else (d, f)
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"{what} has the shape {tuple(weight.shape)}, the patch is for {shape}; apply it "
                "to the model that it was fitted on"
            )
        found.append(module)
    return found


def check_bases(layers: Sequence[Factors], weights: Sequence[Tensor]) -> None:
    """Raises ValueError unless these weights are those that the patch was fitted on."""
    for layer, found in zip(layers, _hashes(weights), strict=True):
        if found != layer.base_hash:
            raise ValueError(
                f"the patch is for another base: the weight of layer {layer.name!r} is not the "
                f"one that it was fitted on (hash {found}, the patch says {layer.base_hash}). Load "
                "that base in the dtype in which it was fitted (float32 of a 16-bit checkpoint "
                "counts as the same; a cast to fewer bits, or to float64, does not), or fit the "
                "facts on this model"
            )


def patch_on(module: nn.Module) -> str | None:
    """Which patch is on this module now, in words; None for none."""
    application = _EDITED.get(module)
    return None if application is None else application.words


def undo_patches(model: nn.Module) -> list[str]:
    """Takes off every patch that is on a model, also one that nobody holds any more.

    Returns:
        The patches, in words.
    """
    found = {id(a): a for a in map(_EDITED.get, bare(model).modules()) if a is not None}
    for application in found.values():
        application.undo()
    return [application.words for application in found.values()]


def write_factors(
    weight: Tensor, base: Tensor, layer: Factors, rounding: Rounding = "nearest", seed: int = 0
) -> None:
    """weight = round(base + U V^T), rounded once.

    The factors count as float32, as they are saved; for a float64 weight as float64. On the CPU
    the bits are those of any machine, and of a checkpoint that is patched on disk; on other
    devices, and in float64, the order of the sums is the BLAS's.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    pair = (layer.V, layer.U) if layer.transposed else (layer.U, layer.V)
    if weight.device.type == "cpu" and wide == torch.float32:
        left, right = (factor.to(wide) for factor in pair)
        reproducible_update_(weight, left, right, base=base, rounding=rounding, seed=seed)
        return
    rank = layer.U.shape[1]
    with torch.no_grad():
        if rank <= MOST_RANK:
            left, right = (factor.to(weight.device, wide) for factor in pair)
            rank_update_(weight, left, right, base=base, rounding=rounding, seed=seed)
            return
        total = base.to(wide, copy=True)
        for first in range(0, rank, MOST_RANK):
            left, right = (
                factor[:, first : first + MOST_RANK].to(weight.device, wide) for factor in pair
            )
            rank_update_(total, left, right)
        nothing = [left[:, :0], right[:, :0]]
        rank_update_(weight, *nothing, base=total, rounding=rounding, seed=seed)


@dataclass(slots=True)
class _Edit:
    """One layer with the factors on it. `base` is None for a branch."""

    layer: Factors
    module: weakref.ref[nn.Module]
    weight: weakref.ref[Tensor]
    base: Tensor | None
    bits: int = 0
    hook: Any = None

    def restore(self) -> bool:
        """Takes the factors off. Returns whether the weight was as they had left it."""
        if self.hook is not None:
            self.hook.remove()
        module, base = self.module(), self.base
        if module is None or base is None:
            return True
        weight: Tensor = module.weight
        kept = self.weight() is weight  # and not another parameter in its place
        same = kept and weight.dtype == base.dtype and _bits(weight) == self.bits
        with torch.no_grad():
            weight.copy_(base)
        return same


class Application:
    """A patch that is on a model; `words` say which one. It keeps neither alive."""

    def __init__(self, how: How, words: str, edits: list[_Edit]) -> None:
        self.how = how
        self.words = words
        self.active = True
        self._edits = edits
        self._errors: dict[str, float] | None = None

    def undo(self) -> None:
        """Puts every weight back, and warns of those that were changed meanwhile."""
        for edit in self._edits:
            module = edit.module()
            if module is not None and edit.base is not None:
                shape, then = tuple(module.weight.shape), tuple(edit.base.shape)
                if shape != then:
                    raise ValueError(
                        f"the weight of layer {edit.layer.name!r} has the shape {shape} now and "
                        f"had {then} when the patch was applied: it cannot be put back"
                    )
        changed = [edit.layer.name for edit in self._edits if not edit.restore()]
        for edit in self._edits:
            module = edit.module()
            if module is not None:
                _EDITED.pop(module, None)
        self.active = False
        self._edits = []
        if changed:
            warnings.warn(
                f"{len(changed)} edited weights were changed after the patch was applied "
                f"({', '.join(changed)}): trained, edited otherwise, moved or cast. They are again "
                "what they were before the patch, so those changes are lost",
                stacklevel=3,
            )

    def rounding_errors(self) -> dict[str, float]:
        """||rounded - exact|| / ||U V^T|| of each layer; 0 for branches and for nothing."""
        if self._errors is None and self.active:
            self._errors = {edit.layer.name: _rounding_error(edit) for edit in self._edits}
        return self._errors or {}


def apply_factors(
    model: nn.Module,
    layers: Sequence[Factors],
    words: str,
    how: How,
    rounding: Rounding,
    seed: int,
) -> Application:
    """Puts the factors of a patch on a model. `words` say which patch it is.

    Raises:
        ValueError: see the module.
        NonFiniteError: the sum overflows the weight's dtype.
    """
    modules = find_layers(model, layers)
    weights = [module.weight for module in modules]
    for layer, module in zip(layers, modules, strict=True):
        if module in _EDITED:
            raise ValueError(
                f"layer {layer.name!r} has a patch on it already ({patch_on(module)}): undo it "
                "first (undo_patches(model) does, where nobody holds it any more). Patches are "
                "put together with +, not on top of one another"
            )
    if how == "merge" and rounding == "stochastic":
        for layer, weight in zip(layers, weights, strict=True):
            if weight.dtype not in _HALF:
                raise ValueError(
                    "rounding='stochastic' needs weights of bfloat16 or float16; that of layer "
                    f"{layer.name!r} is {weight.dtype}"
                )
    check_bases(layers, weights)
    if how == "branch":
        for part in model.modules():
            if hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None):
                raise ValueError(
                    f"how='branch' adds hooks, which {type(part).__name__} does not see, as it is "
                    "compiled: use how='merge', or compile after applying"
                )
    edits: list[_Edit] = []
    try:
        for number, (layer, module, weight) in enumerate(
            zip(layers, modules, weights, strict=True)
        ):
            edit = _Edit(layer, weakref.ref(module), weakref.ref(weight), None)
            edits.append(edit)
            if how == "branch":
                edit.hook = module.register_forward_hook(_branch(layer, weight), with_kwargs=True)
                continue
            edit.base = base = weight.detach().clone()
            write_factors(weight, base, layer, rounding, seed + number)
            if not _finite(weight):
                raise NonFiniteError(
                    f"the edited weight of layer {layer.name!r} overflows {weight.dtype}; apply "
                    "the patch to the model in bfloat16 or float32"
                )
            edit.bits = _bits(weight)
    except BaseException:
        for edit in reversed(edits):
            edit.restore()
        raise
    application = Application(how, words, edits)
    for module in modules:
        _EDITED[module] = application
    return application


def _branch(layer: Factors, weight: Tensor) -> Callable[..., Tensor]:
    """The hook that adds U (V^T x) to what the layer gives."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    # On the layer's device from the start; another one, should the model move, is met on the way.
    held = {weight.device: (layer.U.to(weight.device, wide), layer.V.to(weight.device, wide))}

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        if output.device not in held:
            held[output.device] = (layer.U.to(output.device, wide), layer.V.to(output.device, wide))
        u, v = held[output.device]
        with torch.autocast(output.device.type, enabled=False):
            added = (x.to(wide) @ v) @ u.t()
            return (output.to(wide) + added).to(output.dtype)

    return hook


def _finite(weight: Tensor) -> bool:
    low, high = torch.aminmax(weight.detach()) if weight.numel() else (weight.new_zeros(()),) * 2
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _bits(weight: Tensor) -> int:
    """A checksum of the bits, made where the weight lies: tells whether someone wrote to it."""
    rows = weight.detach()
    size = rows.element_size()
    whole = rows.shape[1] * size % 8 == 0
    ints = torch.int64 if whole else {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    count = rows.shape[1] * size // 8 if whole else rows.shape[1]
    columns = torch.arange(1, 2 * count, 2, device=rows.device)
    step = max(1, _BLOCK // max(1, rows.shape[1]))
    total = torch.zeros((), dtype=torch.int64, device=rows.device)
    for first in range(0, rows.shape[0], step):
        block = rows[first : first + step].contiguous().view(ints).to(torch.int64)
        numbers = torch.arange(first, first + block.shape[0], device=rows.device)
        # int64 wraps around: a checksum modulo 2^64, with a weight of its own for each place.
        total += ((block * columns).sum(1) * (numbers * 0x51D7_348D + 0x2545_F491)).sum()
    return int(total)


def _rounding_error(edit: _Edit) -> float:
    layer, base, parameter = edit.layer, edit.base, edit.weight()
    if base is None or parameter is None:
        return 0.0
    weight = parameter.detach()
    left, right = (layer.V, layer.U) if layer.transposed else (layer.U, layer.V)
    wrong = torch.zeros((), dtype=torch.float64)
    size = torch.zeros((), dtype=torch.float64)
    right = right.to(weight.device, torch.float64)
    step = max(1, _BLOCK // max(1, weight.shape[1]))
    for first in range(0, weight.shape[0], step):
        rows = slice(first, first + step)
        delta = left[rows].to(weight.device, torch.float64) @ right.t()
        exact = base[rows].to(torch.float64) + delta
        wrong += (weight[rows].to(torch.float64) - exact).square().sum().cpu()
        size += delta.square().sum().cpu()
    return float((wrong / size).sqrt()) if size > 0 else 0.0
