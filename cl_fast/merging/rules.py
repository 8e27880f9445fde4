"""Merge methods that are no :class:`~cl_fast.ops.policy.Policy`: what a tensor's rule is.

A policy treats each element alone. A rule looks at more, in one of two ways:

* :class:`Blend`: the result lies in the span of the models, ``sum_k c_k x_k`` (or
  ``base + sum_k c_k d_k``), with weights that depend on their inner products only. The executor
  sums the Gram matrix in float64 (one pass), asks :meth:`Blend.weights` for the ``c_k`` (a few
  operations in plain Python), and combines with them (the fused pass of every method, one
  rounding). What is not finite counts as 0 in the inner products, so that a NaN stays where it is.
* :class:`Whole`: anything else, as a function of torch tensors in float32 or float64. Memory is
  that of the largest tensor then, and torch is loaded.

Both are values: hashable, comparable, cheap to send elsewhere. ``Method.rule`` makes them, one for
each tensor, from the numbers and settings of the recipe.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from cl_fast.ops.blending import (
    karcher_weights,
    model_stock_weights,
    multislerp_weights,
    nuslerp_weights,
    slerp_weights,
    unpack_gram,
)

if TYPE_CHECKING:
    from torch import Tensor

    from cl_fast.merging.plan import TensorPlan
    from cl_fast.merging.sources import Source

__all__ = ["BLENDS", "PART", "Blend", "Rule", "Unit", "Whole", "whole_memory"]

Settings = tuple[tuple[str, Any], ...]
"""Name and value of the numbers and settings of a rule, in the order of the method's entry."""

Unit = Literal["element", "row", "tensor"]
"""What a function must see at once: any part, whole rows (of the last dimension), or everything."""


#: Elements that a function of torch is given at a time, where it may be cut: what caches hold.
PART = 1 << 18


def _slerp(gram: list[list[float]], weights: Sequence[float], t: float, base: int) -> list[float]:
    # t runs from the base to the other model, wherever the recipe lists them.
    return slerp_weights(gram, 1.0 - t if base else t)


def _karcher(
    gram: list[list[float]], weights: Sequence[float], max_iter: float, tol: float
) -> list[float]:
    return karcher_weights(gram, max_iter=int(max_iter), tol=tol)


def _model_stock(gram: list[list[float]], weights: Sequence[float]) -> list[float]:
    return model_stock_weights(gram)


#: What a Blend may be: the weights of the models from their Gram matrix, their weights in the
#: recipe, and the settings of the rule by name.
BLENDS: Mapping[str, Callable[..., list[float]]] = MappingProxyType(
    {
        "slerp": _slerp,
        "nuslerp": nuslerp_weights,
        "multislerp": multislerp_weights,
        "karcher": _karcher,
        "model_stock": _model_stock,
    }
)


@dataclass(frozen=True, slots=True)
class Rule:
    """How one tensor is made. ``name`` is the method's, ``settings`` what it is given."""

    name: str
    settings: Settings = ()


@dataclass(frozen=True, slots=True)
class Blend(Rule):
    """``sum_k c_k x_k`` with weights from inner products; ``name`` is one of :data:`BLENDS`."""

    def weights(self, packed: Sequence[float], weights: Sequence[float]) -> list[float]:
        """The ``c_k``.

        Args:
            packed: the Gram matrix of the models (or deltas), row by row from the diagonal on.
            weights: the recipe's weight of each.
        """
        gram = unpack_gram(packed, len(weights))
        return BLENDS[self.name](gram, weights, **dict(self.settings))


@dataclass(frozen=True, slots=True)
class Whole(Rule):
    """A function of whole tensors.

    ``function`` is ``module:function`` of::

        function(values: list[Tensor], base: Tensor | None, *, weights: Sequence[float],
                 **settings) -> Tensor

    with float32 inputs of one shape and a result of that shape, in float32 or float64, which is
    rounded once to the output's type. The base is None for a policy without differences. ``unit``
    tells how it may be cut: ``element`` gets flat runs, ``row`` gets [rows, last extent] with
    whole rows, ``tensor`` the tensor in its shape. It is called in several threads, each with one
    torch thread, so the bits do not depend on the number of threads. It changes no input.

    ``statistics`` are further tensors, one for each model, that it is given as ``statistics=``: in
    parts like the models for ``element``, else whole and of ``shape``. ``crcs`` tell, where they
    are known, the CRC-64 of the models' tensors in float32 that they were collected on.

    ``own_parts``, if not 0, says that a function of whole tensors works in parts of its own: it is
    given the tensors in the types that they are stored in, and takes so many bytes more for each
    element.
    """

    function: str = ""
    unit: Unit = "tensor"
    statistics: tuple[Source, ...] = ()
    shape: tuple[int, ...] = ()
    crcs: tuple[int | None, ...] = ()
    own_parts: int = 0

    def apply(
        self,
        values: list[Tensor],
        base: Tensor | None,
        weights: Sequence[float],
        statistics: list[Tensor],
    ) -> Tensor:
        """The result for one part of a tensor."""
        module, function = self.function.split(":")
        more = {"statistics": statistics} if self.statistics else {}
        made: Tensor = getattr(importlib.import_module(module), function)(
            values, base, weights=weights, **more, **dict(self.settings)
        )
        return made


def whole_memory(tensor: TensorPlan, threads: int | None) -> int:
    """Bytes that a tensor of a :class:`Whole` rule takes: its inputs, itself, the parts at work."""
    rule = tensor.rule
    if not isinstance(rule, Whole):
        return 0
    count = len(tensor.terms) + (tensor.base is not None)
    stored = sum(term.source.nbytes for term in tensor.terms)
    stored += tensor.base.nbytes if tensor.base is not None else 0
    stored += sum(source.nbytes for source in rule.statistics)
    count += len(rule.statistics)
    if rule.own_parts:
        # Looking for NaN takes three float32 copies of one input, before the function begins.
        own = tensor.numel * max(rule.own_parts, 12)
        return stored + tensor.nbytes + own + 8 * PART * (2 * count + 4)
    part = tensor.numel
    if rule.unit != "tensor":
        least = tensor.shape[-1] if rule.unit == "row" and tensor.shape else 1
        workers = threads or (os.cpu_count() or 1)
        part = min(part, max(PART, least) * workers)
    return stored + tensor.nbytes + 8 * part * (2 * count + 4)
