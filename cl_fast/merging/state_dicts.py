"""Merge models that are in memory: state dicts or nn.Modules in, a state dict out.

    merged = ties(base, [math, code], weight=[1.0, 0.5], density=0.2)
    base_model.load_state_dict(merged)                      # or: ties(..., into=base_model)

The methods, their parameters and their defaults are those of a recipe (docs/merge-recipes.md), and
so are the bits of the result: given the same model names, seed and settings, a recipe on the saved
checkpoints writes exactly these tensors.

Every tensor of the models is one row of one `cl_fast.ops.combine_many`. Integer and boolean
tensors must be equal in all models and are passed on. Names that share storage in all of the models
(tied weights) are merged once, under the first of the names, and share storage in the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from cl_fast.errors import CheckpointError, NonFiniteError, RecipeError
from cl_fast.merging.methods import find_method, make_policy
from cl_fast.ops import combine, combine_many, selective, spherical, stream_key
from cl_fast.ops.magnitude import READABLE
from cl_fast.ops.policy import (
    Divisor,
    Elect,
    ElectOn,
    Policy,
    Reduce,
    TrimCount,
    TrimScope,
    TrimTies,
    check_keep_probabilities,
)
from cl_fast.ops.weighted_means import fisher_mean
from cl_fast.ops.weighted_means import regmean as mean_by_inputs

__all__ = [
    "breadcrumbs",
    "breadcrumbs_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "fisher",
    "karcher",
    "linear",
    "model_stock",
    "multislerp",
    "nuslerp",
    "regmean",
    "sce",
    "slerp",
    "task_arithmetic",
    "ties",
]

StateDict: TypeAlias = Mapping[str, Tensor]
Model: TypeAlias = StateDict | nn.Module
Models: TypeAlias = Sequence[Model] | Mapping[str, Model]
"""A list, whose models are called "0", "1", ..., or a mapping from names to models."""

PerTensor: TypeAlias = float | Mapping[str, float] | Callable[[str], float]
"""A number, or one for each tensor's name."""
PerModel: TypeAlias = PerTensor | Sequence[PerTensor]
"""One for all models, or a list with one per model."""

Label = TypeVar("Label")

Nan: TypeAlias = Literal["refuse", "propagate"]
RescaleBy: TypeAlias = Literal["l1", "keep_rate"]
Variant: TypeAlias = Literal["mergekit", "peft", "paper"]


def linear(
    models: Models,
    *,
    weight: PerModel = 1.0,
    normalize: bool | None = None,
    divisor: Divisor | None = None,
    out_dtype: torch.dtype | None = None,
    into: nn.Module | None = None,
    nan: Nan = "refuse",
    backend: str | None = None,
) -> dict[str, Tensor]:
    """Weighted mean of the models (model soup; Wortsman et al. 2022): sum w x / sum w.

    Args:
        models: see `ties`. There is no base.
        weight: see `ties`.
        normalize: divide by the sum of the weights; true unless said otherwise.
        divisor: "weights", or "count" to divide by the number of models instead.
        out_dtype, into, nan, backend: see `ties`.

    Raises:
        As `ties`; RecipeError too for weights that sum to zero under `normalize`.
    """
    settings = {"normalize": normalize, "divisor": divisor}
    return _merge(
        "linear", None, models, weight, 1.0, 1.0, None, settings, out_dtype, into, nan, backend
    )


def task_arithmetic(
    base: Model,
    models: Models,
    *,
    weight: PerModel = 1.0,
    lam: float = 1.0,
    normalize: bool | None = None,
    divisor: Divisor | None = None,
    out_dtype: torch.dtype | None = None,
    into: nn.Module | None = None,
    nan: Nan = "refuse",
    backend: str | None = None,
) -> dict[str, Tensor]:
    """base + lam * sum w (x - base) (Task Arithmetic; Ilharco et al. 2023).

    A negative weight forgets what a model learned. Arguments and errors: see `ties`; normalize is
    false unless said otherwise.
    """
    settings = {"normalize": normalize, "divisor": divisor}
    return _merge(
        "task_arithmetic",
        base, models, weight, 1.0, lam, None, settings, out_dtype, into, nan, backend,
    )  # fmt: skip


def ties(
    base: Model,
    models: Models,
    *,
    density: PerModel,
    weight: PerModel = 1.0,
    lam: float = 1.0,
    variant: Variant | None = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    rescale_by: RescaleBy | None = None,
    trim_scope: TrimScope | None = None,
    trim_count: TrimCount | None = None,
    trim_ties: TrimTies | None = None,
    elect: Elect | None = None,
    elect_on: ElectOn | None = None,
    reduce: Reduce | None = None,
    divisor: Divisor | None = None,
    out_dtype: torch.dtype | None = None,
    into: nn.Module | None = None,
    nan: Nan = "refuse",
    backend: str | None = None,
) -> dict[str, Tensor]:
    """Trim each delta, elect a sign per element, average what agrees (Yadav et al. 2023).

    Args:
        base: state dict or module that the models were finetuned from.
        models: the finetuned ones: a list, or a mapping from names to models. The names key the
            random stream of the dare methods and stand in messages; in a list they are "0", "1"...
        density: the fraction of each delta that is kept, in (0, 1].
        weight: the factor on each delta. `weight` and `density` are one value for all models, or a
            list with one value per model, where a value is a number, a mapping from the names of
            the tensors to numbers, or a function of the name.
        lam: the factor on the combined delta.
        variant: sets what follows as "mergekit" (the default), "peft" or the "paper" has it;
            each can also be set alone. docs/merge-recipes.md tells what they mean.
        normalize, rescale, rescale_by, trim_scope, trim_count, trim_ties, elect, elect_on, reduce,
            divisor: the parameters of a recipe of this method.
        out_dtype: bfloat16, float16 or float32; the default is each tensor's dtype in `base`.
        into: a module that the result is loaded into as well.
        nan: "refuse" raises on NaN or infinity in a model, "propagate" lets it through.
        backend: "native" or "eager", for tests and benchmarks; otherwise the fastest there is.

    Returns:
        A new state dict with the names of `base` in its order. The arithmetic is float32.

    Raises:
        RecipeError: settings that are unknown, contradict, or have no effect.
        CheckpointError: models whose tensors differ in names, shapes, devices or kind, or integer
            tensors that are not equal; the message names the tensor.
        NonFiniteError: NaN or infinity in a model, or an overflow of the output type.
        TypeError, ValueError: an argument of the wrong type or out of its range.
    """
    settings = {
        "variant": variant,
        "normalize": normalize,
        "rescale": rescale,
        "rescale_by": rescale_by,
        "trim_scope": trim_scope,
        "trim_count": trim_count,
        "trim_ties": trim_ties,
        "elect": elect,
        "elect_on": elect_on,
        "reduce": reduce,
        "divisor": divisor,
    }
    return _merge(
        "ties", base, models, weight, density, lam, None, settings, out_dtype, into, nan, backend
    )


def dare_linear(
    base: Model,
    models: Models,
    *,
    density: PerModel,
    weight: PerModel = 1.0,
    lam: float = 1.0,
    seed: int = 0,
    variant: Variant | None = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    rescale_by: RescaleBy | None = None,
    divisor: Divisor | None = None,
    out_dtype: torch.dtype | None = None,
    into: nn.Module | None = None,
    nan: Nan = "refuse",
    backend: str | None = None,
) -> dict[str, Tensor]:
    """Drop elements of each delta at random, rescale the others, add the sum (Yu et al. 2024).

    `density` is the fraction kept, 1 - the drop rate. The masks follow from `seed` and the names of
    models and tensors alone (docs/random-stream.md). Other arguments and errors: see `ties`.
    """
    settings = {
        "variant": variant,
        "normalize": normalize,
        "rescale": rescale,
        "rescale_by": rescale_by,
        "divisor": divisor,
    }
    return _merge(
        "dare_linear",
        base, models, weight, density, lam, seed, settings, out_dtype, into, nan, backend,
    )  # fmt: skip


def dare_ties(
    base: Model,
    models: Models,
    *,
    density: PerModel,
    weight: PerModel = 1.0,
    lam: float = 1.0,
    seed: int = 0,
    variant: Variant | None = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    rescale_by: RescaleBy | None = None,
    elect: Elect | None = None,
    elect_on: ElectOn | None = None,
    reduce: Reduce | None = None,
    divisor: Divisor | None = None,
    out_dtype: torch.dtype | None = None,
    into: nn.Module | None = None,
    nan: Nan = "refuse",
    backend: str | None = None,
) -> dict[str, Tensor]:
    """`dare_linear` with the sign election of `ties`. Arguments and errors: see those."""
    settings = {
        "variant": variant,
        "normalize": normalize,
        "rescale": rescale,
        "rescale_by": rescale_by,
        "elect": elect,
        "elect_on": elect_on,
        "reduce": reduce,
        "divisor": divisor,
    }
    return _merge(
        "dare_ties",
        base, models, weight, density, lam, seed, settings, out_dtype, into, nan, backend,
    )  # fmt: skip


def breadcrumbs(
    base: Model,
    models: Models,
    *,
    density: PerModel,
    gamma: PerModel = 0.01,
    weight: PerModel = 1.0,
    lam: float = 1.0,
    normalize: bool | None = None,
    rescale: bool | None = None,
    rescale_by: RescaleBy | None = None,
    trim_count: TrimCount | None = None,
    divisor: Divisor | None = None,
    out_dtype: torch.dtype | None = None,
    into: nn.Module | None = None,
    nan: Nan = "refuse",
    backend: str | None = None,
) -> dict[str, Tensor]:
    """Drop outliers and small entries of each delta, add the sum (Davari and Belilovsky 2023).

    `gamma` is the fraction of largest magnitudes that is dropped, `density` the fraction that is
    kept of those below them; both count elements of one tensor. Both may be one value per model,
    like `weight`. Other arguments and errors: see `ties`.
    """
    settings = {
        "normalize": normalize,
        "rescale": rescale,
        "rescale_by": rescale_by,
        "trim_count": trim_count,
        "divisor": divisor,
    }
    return _merge(
        "breadcrumbs",
        base, models, weight, density, lam, None, settings, out_dtype, into, nan, backend,
        gamma=gamma,
    )  # fmt: skip


def breadcrumbs_ties(
    base: Model,
    models: Models,
    *,
    density: PerModel,
    gamma: PerModel = 0.01,
    weight: PerModel = 1.0,
    lam: float = 1.0,
    normalize: bool | None = None,
    rescale: bool | None = None,
    rescale_by: RescaleBy | None = None,
    trim_count: TrimCount | None = None,
    elect: Elect | None = None,
    elect_on: ElectOn | None = None,
    reduce: Reduce | None = None,
    divisor: Divisor | None = None,
    out_dtype: torch.dtype | None = None,
    into: nn.Module | None = None,
    nan: Nan = "refuse",
    backend: str | None = None,
) -> dict[str, Tensor]:
    """`breadcrumbs` with the sign election of `ties`. Arguments and errors: see those."""
    settings = {
        "normalize": normalize,
        "rescale": rescale,
        "rescale_by": rescale_by,
        "trim_count": trim_count,
        "elect": elect,
        "elect_on": elect_on,
        "reduce": reduce,
        "divisor": divisor,
    }
    return _merge(
        "breadcrumbs_ties",
        base, models, weight, density, lam, None, settings, out_dtype, into, nan, backend,
        gamma=gamma,
    )  # fmt: skip


def della_linear(
    base: Model,
    models: Models,
    *,
    density: PerModel,
    epsilon: PerModel = 0.15,
    weight: PerModel = 1.0,
    lam: float = 1.0,
    seed: int = 0,
    variant: Literal["mergekit", "paper"] | None = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    rescale_by: RescaleBy | None = None,
    divisor: Divisor | None = None,
    out_dtype: torch.dtype | None = None,
    into: nn.Module | None = None,
    nan: Nan = "refuse",
    backend: str | None = None,
) -> dict[str, Tensor]:
    """Drop at random, the small entries of a row more often, rescale, add the sum (DELLA).

    An element is kept with a probability from `density - epsilon` (the smallest magnitude of its
    row, a row being the last dimension) to `density + epsilon` (the largest): MAGPRUNE of DELLA
    (Deep et al. 2024). All of them must lie above 0 and be at most 1. The variant "paper" divides
    each element that is kept by its own keep probability; "mergekit" rescales a tensor by the ratio
    of L1 norms. `epsilon` may be one value per model, like `weight`. The masks follow from `seed`
    as in `dare_linear`. Other arguments and errors: see `ties`.
    """
    settings = {
        "variant": variant,
        "normalize": normalize,
        "rescale": rescale,
        "rescale_by": rescale_by,
        "divisor": divisor,
    }
    return _merge(
        "della_linear",
        base, models, weight, density, lam, seed, settings, out_dtype, into, nan, backend,
        epsilon=epsilon,
    )  # fmt: skip


def della(
    base: Model,
    models: Models,
    *,
    density: PerModel,
    epsilon: PerModel = 0.15,
    weight: PerModel = 1.0,
    lam: float = 1.0,
    seed: int = 0,
    variant: Literal["mergekit", "paper"] | None = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    rescale_by: RescaleBy | None = None,
    elect: Elect | None = None,
    elect_on: ElectOn | None = None,
    reduce: Reduce | None = None,
    divisor: Divisor | None = None,
    out_dtype: torch.dtype | None = None,
    into: nn.Module | None = None,
    nan: Nan = "refuse",
    backend: str | None = None,
) -> dict[str, Tensor]:
    """`della_linear` with the sign election of `ties`, averaged over the weights that agree.

    Arguments and errors: see those.
    """
    settings = {
        "variant": variant,
        "normalize": normalize,
        "rescale": rescale,
        "rescale_by": rescale_by,
        "elect": elect,
        "elect_on": elect_on,
        "reduce": reduce,
        "divisor": divisor,
    }
    return _merge(
        "della",
        base, models, weight, density, lam, seed, settings, out_dtype, into, nan, backend,
        epsilon=epsilon,
    )  # fmt: skip


def sce(
    base: Model,
    models: Models,
    *,
    select_topk: float = 1.0,
    out_dtype: torch.dtype | None = None,
    into: nn.Module | None = None,
    nan: Nan = "refuse",
) -> dict[str, Tensor]:
    """Select what differs most between models, weigh them by their squares, elect a sign (SCE).

    Wan et al., FuseChat, 2024 (arXiv 2408.07990). Each model weighs in a tensor as the mean square
    of its delta, so there are no weights to give. One tensor is worked on at a time.

    Args:
        select_topk: of the elements that differ between the models, the fraction that is kept, in
            [0, 1]: those with the largest variance.
        base, models, out_dtype, into, nan: see `ties`.

    Raises:
        As `ties`.
    """
    if isinstance(select_topk, bool) or not isinstance(select_topk, (int, float)):
        raise TypeError(f"select_topk must be a number, got {type(select_topk).__name__}")
    if not 0.0 <= select_topk <= 1.0:
        raise ValueError(f"select_topk must be in [0, 1]; got {select_topk}")

    def one(name: str, base: Tensor | None, values: list[Tensor], weights: list[float]) -> Tensor:
        assert base is not None
        dtype = out_dtype or base.dtype
        if dtype not in READABLE[:3]:
            raise TypeError(
                f"out_dtype must be bfloat16, float16 or float32; got {dtype} for tensor {name!r}"
            )
        made = selective.sce(values, base, weights=[], select_topk=float(select_topk))
        return made.to(dtype)

    return _by_rule(base, models, 1.0, one, into, nan)


def slerp(
    start: Model,
    end: Model,
    *,
    t: PerTensor,
    out_dtype: torch.dtype | None = None,
    into: nn.Module | None = None,
    nan: Nan = "refuse",
) -> dict[str, Tensor]:
    """Spherical interpolation of each tensor from `start` (t = 0) to `end` (t = 1).

    Args:
        start, end: state dicts or modules.
        t: a number, or one for each tensor: a mapping from names, or a function of the name.
        out_dtype, into, nan: see `ties`.

    Raises:
        As `ties`.
    """

    def one(name: str, base: Tensor | None, values: list[Tensor], weights: list[float]) -> Tensor:
        found = t(name) if callable(t) else t[name] if isinstance(t, Mapping) else t
        return spherical.slerp(values[0], values[1], float(found), out_dtype=out_dtype)

    return _by_rule(None, {"start": start, "end": end}, 1.0, one, into, nan)


def nuslerp(
    models: Models,
    *,
    base: Model | None = None,
    weight: PerModel = 1.0,
    along: spherical.Along = "all",
    out_dtype: torch.dtype | None = None,
    into: nn.Module | None = None,
    nan: Nan = "refuse",
) -> dict[str, Tensor]:
    """Spherical interpolation of two models, or of their deltas from `base`, by their weights.

    `along` is "all", "rows" or "columns" (`cl_fast.ops.spherical.nuslerp`). Other arguments and
    errors: see `ties`; ValueError too where there are not two models.
    """
    if len(models) != 2:
        raise ValueError(f"nuslerp merges two models; got {len(models)}")

    def one(name: str, base: Tensor | None, values: list[Tensor], weights: list[float]) -> Tensor:
        return spherical.nuslerp(
            values[0], values[1], weights, base=base, along=along, out_dtype=out_dtype
        )

    return _by_rule(base, models, weight, one, into, nan)


def multislerp(
    models: Models,
    *,
    base: Model | None = None,
    weight: PerModel = 1.0,
    normalize_weights: bool = True,
    eps: float = 1e-8,
    out_dtype: torch.dtype | None = None,
    into: nn.Module | None = None,
    nan: Nan = "refuse",
) -> dict[str, Tensor]:
    """The weighted mean of the directions of models, or of their deltas, with their mean length.

    `normalize_weights`, `eps`: `cl_fast.ops.spherical.multislerp`. Others and errors: see `ties`.
    """

    def one(name: str, base: Tensor | None, values: list[Tensor], weights: list[float]) -> Tensor:
        return spherical.multislerp(
            values, weights, base=base, normalize_weights=normalize_weights, eps=eps,
            out_dtype=out_dtype,
        )  # fmt: skip

    return _by_rule(base, models, weight, one, into, nan)


def karcher(
    models: Models,
    *,
    max_iter: int = 10,
    tol: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    into: nn.Module | None = None,
    nan: Nan = "refuse",
) -> dict[str, Tensor]:
    """The mean of the models on the sphere, with their mean length.

    `max_iter`, `tol`: `cl_fast.ops.spherical.karcher_mean`. Others and errors: see `ties`.
    """

    def one(name: str, base: Tensor | None, values: list[Tensor], weights: list[float]) -> Tensor:
        return spherical.karcher_mean(values, max_iter=max_iter, tol=tol, out_dtype=out_dtype)

    return _by_rule(None, models, 1.0, one, into, nan)


def model_stock(
    base: Model,
    models: Models,
    *,
    filter_wise: bool = False,
    out_dtype: torch.dtype | None = None,
    into: nn.Module | None = None,
    nan: Nan = "refuse",
) -> dict[str, Tensor]:
    """Between the base and the mean, as far as the deltas agree (Jang et al. 2024).

    `filter_wise` takes an angle for each row. Other arguments and errors: see `ties`.
    """

    def one(name: str, base: Tensor | None, values: list[Tensor], weights: list[float]) -> Tensor:
        assert base is not None
        return spherical.model_stock(base, values, filter_wise=filter_wise, out_dtype=out_dtype)

    return _by_rule(base, models, 1.0, one, into, nan)


def fisher(
    models: Models,
    fishers: Sequence[StateDict],
    *,
    weight: PerModel = 1.0,
    out_dtype: torch.dtype | None = None,
    into: nn.Module | None = None,
    nan: Nan = "refuse",
) -> dict[str, Tensor]:
    """The mean of the models weighted by their Fisher diagonals (Matena and Raffel 2022).

    Args:
        models: see `ties`. There is no base.
        fishers: for each model, name -> F in the shape of the tensor; tensors of which no model has
            one are the weighted mean, and so are elements where all are 0.
        weight, out_dtype, into, nan: see `ties`.

    Raises:
        As `ties`; ValueError too where the fishers do not fit the models.
    """
    _check_known("fishers", fishers, models)

    def one(name: str, base: Tensor | None, values: list[Tensor], weights: list[float]) -> Tensor:
        known = _known("fishers", fishers, name)
        if known is None:
            return _mean(values, weights, out_dtype)
        return _round(fisher_mean(values, known, weights), out_dtype or values[0].dtype)

    return _by_rule(None, models, weight, one, into, nan)


def regmean(
    models: Models,
    grams: Sequence[StateDict],
    *,
    weight: PerModel = 1.0,
    alpha: float = 0.9,
    in_first: Collection[str] = (),
    out_dtype: torch.dtype | None = None,
    into: nn.Module | None = None,
    nan: Nan = "refuse",
) -> dict[str, Tensor]:
    """Linear layers that keep the models' outputs on their own inputs (RegMean; Jin et al. 2023).

    Args:
        models: see `ties`. There is no base.
        grams: for each model, name of a linear layer's weight -> second moments of its inputs; all
            other tensors are the weighted mean.
        alpha: factor of their off-diagonals.
        in_first: names of weights that are stored as [in, out].
        weight, out_dtype, into, nan: see `ties`.

    Raises:
        As `ties`; ValueError too where the grams do not fit the models.
    """
    _check_known("grams", grams, models)

    def one(name: str, base: Tensor | None, values: list[Tensor], weights: list[float]) -> Tensor:
        known = _known("grams", grams, name)
        if known is None:
            return _mean(values, weights, out_dtype)
        made = mean_by_inputs(values, known, weights, alpha=alpha, in_first=name in in_first)
        return _round(made, out_dtype or values[0].dtype)

    return _by_rule(None, models, weight, one, into, nan)


def _check_known(argument: str, known: Sequence[StateDict], models: Models) -> None:
    if len(known) != len(models):
        raise ValueError(f"{argument}: {len(models)} models need as many; got {len(known)}")


def _known(argument: str, known: Sequence[StateDict], name: str) -> list[Tensor] | None:
    found = [one[name] for one in known if name in one]
    if found and len(found) < len(known):
        raise ValueError(f"{argument}: some of the models have {name!r} there, and some have not")
    return found or None


def _mean(values: list[Tensor], weights: list[float], dtype: torch.dtype | None) -> Tensor:
    policy = Policy(difference=False, reduce="mean")
    return combine(None, values, weights=weights, policy=policy, out_dtype=dtype)


def _round(made: Tensor, dtype: torch.dtype) -> Tensor:
    """By way of float32, as a merge of files stores it."""
    return made.float().to(dtype)


def _by_rule(
    base: Model | None,
    models: Models,
    weight: PerModel,
    one: Callable[[str, Tensor | None, list[Tensor], list[float]], Tensor],
    into: nn.Module | None,
    nan: Nan,
) -> dict[str, Tensor]:
    """Merges tensor by tensor with a function of name, base, values and weights."""
    with torch.no_grad():
        inputs, names = _inputs(base, models, into, nan)
        rows = _PerModel("weight", weight, inputs.names).rows(names)
        merged = []
        for name, weights in zip(names, rows, strict=True):
            start = inputs.base[name] if inputs.base is not None else None
            merged.append(one(name, start, [model[name] for model in inputs.models], weights))
        return _finish(inputs, names, merged, into, nan, lower="the weights")


def _merge(
    method: str,
    base: Model | None,
    models: Models,
    weight: PerModel,
    density: PerModel,
    lam: float,
    seed: int | None,
    settings: Mapping[str, Any],
    out_dtype: torch.dtype | None,
    into: nn.Module | None,
    nan: Nan,
    backend: str | None,
    *,
    gamma: PerModel | None = None,
    epsilon: PerModel | None = None,
) -> dict[str, Tensor]:
    policy = make_policy(find_method(method), settings, where=method)
    with torch.no_grad():
        inputs, names = _inputs(base, models, into, nan)
        weights = _PerModel("weight", weight, inputs.names).rows(names)
        densities = _PerModel("density", density, inputs.names).rows(names)
        gammas, epsilons = (
            None if value is None else _PerModel(word, value, inputs.names).rows(names)
            for word, value in (("gamma", gamma), ("epsilon", epsilon))
        )
        _check_rows(policy, names, weights, densities)
        if epsilons is not None:
            _check_epsilons(inputs.names, names, densities, epsilons)
        if all(entry >= 1.0 for row in densities for entry in row):
            policy, gammas, epsilons = _unsparsified(policy), None, None
        rows = [[model[name] for model in inputs.models] for name in names]
        keys = None
        if policy.sparsify in ("drop", "magprune"):
            keys = [[stream_key(seed or 0, m, name) for m in inputs.names] for name in names]
        merged = (
            combine_many(
                [inputs.base[name] for name in names] if inputs.base is not None else None,
                rows,
                weights=weights,
                policy=policy,
                density=densities,
                gamma=gammas,
                epsilon=epsilons,
                keys=keys,
                lam=lam,
                out_dtype=out_dtype,
                backend=backend,
            )
            if rows
            else []
        )
        return _finish(inputs, names, merged, into, nan, lower="the weights or lam")


def _inputs(
    base: Model | None, models: Models, into: nn.Module | None, nan: str
) -> tuple[Inputs, list[str]]:
    """The models, checked, and the names of the tensors to combine."""
    if nan not in ("refuse", "propagate"):
        raise ValueError(f"nan must be 'refuse' or 'propagate'; got {nan!r}")
    if into is not None and not isinstance(into, nn.Module):
        raise TypeError(f"into must be an nn.Module, got {type(into).__name__}")
    inputs = Inputs.of(base, models)
    names = inputs.check()
    if nan == "refuse":
        inputs.refuse_nonfinite(names)
    return inputs, names


def _finish(
    inputs: Inputs,
    names: list[str],
    merged: list[Tensor],
    into: nn.Module | None,
    nan: str,
    *,
    lower: str,
) -> dict[str, Tensor]:
    """All tensors of the result, of which `merged` are those of `names`."""
    if nan == "refuse":
        name = first_nonfinite(zip(names, merged, strict=True))
        if name is not None:
            raise NonFiniteError(
                f"tensor {name!r}: the merge overflows {merged[names.index(name)].dtype}; "
                f"lower {lower}, or set out_dtype=torch.float32"
            )
    result = inputs.result(dict(zip(names, merged, strict=True)))
    if into is not None:
        into.load_state_dict(result)
    return result


def _unsparsified(policy: Policy) -> Policy:
    kept = {name: getattr(policy, name) for name in ("difference", "elect", "elect_on", "reduce")}
    return Policy(**kept, divisor=policy.divisor)


def _check_epsilons(
    models: list[str],
    names: list[str],
    densities: list[list[float]],
    epsilons: list[list[float]],
) -> None:
    for name, kept, halves in zip(names, densities, epsilons, strict=True):
        for model, density, epsilon in zip(models, kept, halves, strict=True):
            wrong = check_keep_probabilities(density, epsilon)
            if wrong is not None:
                raise ValueError(f"epsilon of models[{model!r}] for tensor {name!r}: {wrong}")


def _check_rows(
    policy: Policy, names: list[str], weights: list[list[float]], densities: list[list[float]]
) -> None:
    for name, row in zip(names, weights, strict=True):
        normalized = not policy.difference and policy.reduce == "mean"
        if normalized and policy.divisor == "weights" and abs(sum(row)) < 1e-8:
            raise RecipeError(
                f"weight: the weights of tensor {name!r} sum to {sum(row):g}, which cannot be "
                "normalized to a mean; set normalize=False or change the weights"
            )
    if policy.sparsify == "trim" and policy.trim_scope == "model":
        for row in densities[1:]:
            if row != densities[0]:
                raise RecipeError(
                    "density: trim_scope='model' has one density for a whole model; give a number "
                    "per model"
                )


@dataclass(frozen=True, slots=True)
class Inputs:
    """The models as state dicts, checked against the first of them: the base, if there is one."""

    base: StateDict | None
    names: list[str]
    models: list[StateDict]

    @classmethod
    def of(cls, base: Model | None, models: Models) -> Inputs:
        if isinstance(models, nn.Module) or not isinstance(models, (Mapping, Sequence)):
            raise TypeError(
                "models must be a list of models or a mapping from names to models, got "
                f"{type(models).__name__}"
            )
        if isinstance(models, Mapping):
            named = {str(name): model for name, model in models.items()}
            if any(isinstance(model, Tensor) for model in named.values()):
                raise TypeError(
                    "models must be a list of models or a mapping from names to models, got one "
                    "state dict; put it into a list"
                )
        else:
            named = {str(number): model for number, model in enumerate(models)}
        if not named:
            raise ValueError("models must hold at least one model")
        return cls(
            None if base is None else as_state_dict("base", base),
            list(named),
            [as_state_dict(f"models[{name!r}]", model) for name, model in named.items()],
        )

    def _all(self) -> Iterator[tuple[str, StateDict]]:
        if self.base is not None:
            yield "base", self.base
        for name, model in zip(self.names, self.models, strict=True):
            yield f"models[{name!r}]", model

    @property
    def reference(self) -> tuple[str, StateDict]:
        return next(self._all())

    def check(self) -> list[str]:
        """The names to combine. Raises CheckpointError where the models do not fit."""
        reference_name, reference = self.reference
        for where, model in self._all():
            missing = [name for name in reference if name not in model]
            extra = [name for name in model if name not in reference]
            for problem, keys in (("lacks", missing), ("has, beyond those of the base,", extra)):
                if keys:
                    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
                    raise CheckpointError(
                        f"{where} {problem} tensor {keys[0]!r}{more}; all must have the tensors of "
                        f"{reference_name}"
                    )
            for name, tensor in model.items():
                _check_tensor(name, where, tensor, reference_name, reference[name])
        tied = self._tied()
        names = []
        for name, tensor in reference.items():
            if kind_of(tensor) == "copy":
                self._check_equal(name)
            elif tied[name] == name:
                names.append(name)
        return names

    def _check_equal(self, name: str) -> None:
        reference_name, reference = self.reference
        for where, model in self._all():
            if not torch.equal(model[name], reference[name]):
                raise CheckpointError(
                    f"tensor {name!r} holds integers or booleans that differ between "
                    f"{reference_name} and {where}; they must be equal, since they cannot be merged"
                )

    def _tied(self) -> dict[str, str]:
        """For each name the first one that means the same storage in all of the models."""
        firsts: dict[Any, str] = {}
        return {
            name: firsts.setdefault(tuple(_address(model[name]) for _, model in self._all()), name)
            if tensor.numel() and tensor.device.type != "meta"
            else name
            for name, tensor in self.reference[1].items()
        }

    def refuse_nonfinite(self, names: list[str]) -> None:
        found = first_nonfinite(
            ((name, where), model[name]) for name in names for where, model in self._all()
        )
        if found is not None:
            name, where = found
            raise NonFiniteError(
                f"tensor {name!r} of {where} holds NaN or infinity; repair the model, or "
                "set nan='propagate'"
            )

    def result(self, merged: dict[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of the reference in its order: merged, tied to a merged one, or copied."""
        tied = self._tied()
        return {
            name: merged[tied[name]] if kind_of(tensor) == "combine" else tensor.detach().clone()
            for name, tensor in self.reference[1].items()
        }


def as_state_dict(where: str, model: Model) -> StateDict:
    if isinstance(model, nn.Module):
        return dict(model.state_dict())
    if not isinstance(model, Mapping):
        raise TypeError(f"{where} must be a state dict or an nn.Module, got {type(model).__name__}")
    return model


def kind_of(tensor: Tensor) -> Literal["combine", "copy"]:
    return "combine" if tensor.is_floating_point() else "copy"


def _address(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _check_tensor(name: str, where: str, tensor: Tensor, ref: str, reference: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where}[{name!r}] must be a tensor, got {type(tensor).__name__}")
    if tensor.is_floating_point() and tensor.dtype not in READABLE:
        raise CheckpointError(
            f"tensor {name!r} of {where} is {tensor.dtype}, which is not supported; convert the "
            "model to float32 or bfloat16"
        )
    if tensor.is_complex() or kind_of(tensor) != kind_of(reference):
        raise CheckpointError(
            f"tensor {name!r} is {reference.dtype} in {ref} and {tensor.dtype} in {where}; both "
            "must be floating, or equal integers"
        )
    if tensor.shape != reference.shape:
        raise CheckpointError(
            f"tensor {name!r} has shape {list(reference.shape)} in {ref} and {list(tensor.shape)} "
            f"in {where}; only models of one architecture and size can be merged"
        )
    if tensor.device != reference.device:
        raise CheckpointError(
            f"tensor {name!r} is on {reference.device} in {ref} and on {tensor.device} in {where}; "
            "move the models to one device"
        )


def first_nonfinite(tensors: Iterable[tuple[Label, Tensor]]) -> Label | None:
    """The label of a tensor that holds NaN or infinity, the first of its device; None without one.

    On a GPU the answers are gathered and fetched once per device: asking for each would stop the
    host as often.
    """
    waiting: dict[torch.device, list[tuple[Label, Tensor]]] = {}
    for label, tensor in tensors:
        if not tensor.numel() or tensor.device.type == "meta":
            continue
        wide = tensor if tensor.element_size() > 1 else tensor.float()
        low, high = torch.aminmax(wide)  # one pass, and NaN comes through
        finite = torch.isfinite(low) & torch.isfinite(high)
        if tensor.device.type != "cpu":
            waiting.setdefault(tensor.device, []).append((label, finite))
        elif not finite:
            return label
    for answers in waiting.values():
        together = torch.stack([finite for _, finite in answers]).tolist()
        for (label, _), finite in zip(answers, together, strict=True):
            if not finite:
                return label
    return None


class _PerModel:
    """`weight`, `density` and the like: the numbers of each tensor, one per model."""

    def __init__(self, argument: str, value: PerModel, models: list[str]) -> None:
        self.argument = argument
        self.models = models
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        self.values: list[PerTensor] = list(value) if listed else [value] * len(models)  # type: ignore[arg-type, list-item]
        if len(self.values) != len(models):
            raise ValueError(
                f"{argument} must have one entry per model, {len(models)}; got {len(self.values)}"
            )

    def rows(self, names: list[str]) -> list[list[float]]:
        return [
            [
                self._number(value, model, name)
                for value, model in zip(self.values, self.models, strict=True)
            ]
            for name in names
        ]

    def _number(self, value: PerTensor, model: str, name: str) -> float:
        if isinstance(value, Mapping):
            if name not in value:
                raise ValueError(
                    f"{self.argument} of models[{model!r}] has no entry for tensor {name!r}"
                )
            number: Any = value[name]
        elif callable(value):
            number = value(name)
        else:
            number = value
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(
                f"{self.argument} of models[{model!r}] must be a number for tensor {name!r}, got "
                f"{type(number).__name__}"
            )
        if not math.isfinite(number):
            raise ValueError(
                f"{self.argument} of models[{model!r}] must be finite for tensor {name!r}, got "
                f"{number}"
            )
        if self.argument == "density" and not 0.0 < number <= 1.0:
            raise ValueError(
                f"density of models[{model!r}] must be in (0, 1] for tensor {name!r}; got {number}"
            )
        if self.argument == "gamma" and not 0.0 <= number <= 1.0:
            raise ValueError(
                f"gamma of models[{model!r}] must be in [0, 1] for tensor {name!r}; got {number}"
            )
        return float(number)
