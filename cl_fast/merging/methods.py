"""The merge methods: each is a name for a :class:`~cl_fast.ops.policy.Policy`.

=================  ==========================================================================
linear             ``sum_k w_k x_k / sum_k w_k`` (uniform and weighted soups)
task_arithmetic    ``base + lambda * sum_k w_k d_k``
ties               ``base + lambda * mean_elected(w_k trim(d_k))``
dare_linear        ``base + lambda * sum_k w_k rescale(drop(d_k))``
dare_ties          ``base + lambda * sum_elected(w_k rescale(drop(d_k)))``
breadcrumbs        ``base + lambda * sum_k w_k band(d_k)``
breadcrumbs_ties   ``base + lambda * sum_elected(w_k band(d_k))``
della_linear       ``base + lambda * sum_k w_k rescale(magprune(d_k))``
della              ``base + lambda * mean_elected(w_k rescale(magprune(d_k)))``
passthrough        ``scale x``, of one model: layers put together by ``slices``
slerp              the arc from one model to another, ``c_0 x_0 + c_1 x_1``
nuslerp            the same with weights, also on deltas and for rows or columns
multislerp         the weighted mean of directions, with the mean length
karcher            the mean on the sphere, with the mean length
model_stock        ``base + t (mean_k x_k - base)``, t from the angles of the deltas
fisher             ``sum_k w_k F_k x_k / sum_k w_k F_k``
regmean            ``(sum_k w_k G_k)^-1 sum_k w_k G_k W_k`` for linear layers
=================  ==========================================================================

with ``d_k = x_k - base``. The defaults under these names are mergekit's. The codes and papers
that use the same names mean different things by them (docs/merge-recipes.md has the table); a
``variant`` sets the parameters the way one of them does, and each parameter can be set alone.

To add a method that uses existing steps, add an entry to :data:`METHODS`: its name, its policy,
and what its variants change. Which parameters a recipe may give for it follows from the policy.
A method that is no policy has a ``rule`` (:mod:`cl_fast.merging.rules`) and names its parameters.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from cl_fast.errors import RecipeError
from cl_fast.merging.rules import Blend, Rule, Unit, Whole
from cl_fast.ops.policy import (
    Divisor,
    Elect,
    ElectOn,
    Policy,
    Reduce,
    Rescale,
    TrimCount,
    TrimScope,
    TrimTies,
)

__all__ = [
    "CHOICES",
    "METHODS",
    "NUMBERS",
    "SWITCHES",
    "Method",
    "Number",
    "find_method",
    "make_policy",
    "suggest",
]


@dataclass(frozen=True, slots=True)
class Number:
    """A parameter that is a number and may differ between tensors, by filters and gradients.

    Attributes:
        default: its value where the recipe gives none.
        of_model: whether each model may have a value of its own.
        required: where the recipe gives filters, one of them must match.
        low, high: bounds; ``low`` itself is allowed only with ``low_too``.
        integer: whether it must be a whole number.
        words: what it is, for the message about a value outside its bounds.
    """

    default: float = 1.0
    of_model: bool = False
    required: bool = False
    low: float = -math.inf
    high: float = math.inf
    low_too: bool = True
    integer: bool = False
    words: str = ""

    @property
    def allowed(self) -> str:
        """The bounds in words: "above 0 and at most 1"."""
        ends = []
        if self.low > -math.inf:
            ends.append(f"{'at least' if self.low_too else 'above'} {self.low:g}")
        if self.high < math.inf:
            ends.append(f"at most {self.high:g}")
        return ("a whole number, " if self.integer else "") + " and ".join(ends)

    def allows(self, value: float) -> bool:
        """Whether a value lies within the bounds."""
        inside = (self.low <= value if self.low_too else self.low < value) and value <= self.high
        return inside and (not self.integer or value == int(value))


#: Every parameter that is a number.
NUMBERS: Mapping[str, Number] = MappingProxyType(
    {
        "weight": Number(of_model=True, required=True),
        "density": Number(
            of_model=True,
            low=0.0,
            high=1.0,
            low_too=False,
            words="the fraction that is kept, above 0 and at most 1",
        ),
        "lambda": Number(),
        "scale": Number(of_model=True),
        "gamma": Number(
            default=0.01,
            of_model=True,
            low=0.0,
            high=1.0,
            words="the fraction of largest magnitudes that is dropped, from 0 to 1",
        ),
        "epsilon": Number(
            default=0.15,
            of_model=True,
            low=0.0,
            high=1.0,
            words="half the range of the keep probabilities, from 0 to 1",
        ),
        "t": Number(
            default=math.nan,
            required=True,
            words="the place on the way from the base (0) to the other model (1)",
        ),
        "eps": Number(
            default=1e-8, low=0.0, low_too=False, words="the smallest length, a number above 0"
        ),
        "max_iter": Number(
            default=10.0, low=0.0, high=1e6, integer=True, words="the most steps, a whole number"
        ),
        "tol": Number(
            default=1e-5, low=0.0, low_too=False, words="the shortest step, a number above 0"
        ),
        "select_topk": Number(
            low=0.0,
            high=1.0,
            words="the fraction of elements that differ between models to keep, from 0 to 1",
        ),
        "r": Number(
            default=0.1, low=0.0, words="how much sharing scales up what is not shared, at least 0"
        ),
        "alpha": Number(
            default=0.2, low=0.0, words="the largest ratio of shared elements, at least 0"
        ),
    }
)

#: Parameters that choose among words, and the words.
CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "trim_scope": get_args(TrimScope),
        "trim_count": get_args(TrimCount),
        "trim_ties": get_args(TrimTies),
        "elect": tuple(word for word in get_args(Elect) if word != "none"),
        "elect_on": get_args(ElectOn),
        "reduce": get_args(Reduce),
        "divisor": get_args(Divisor),
        "rescale_by": tuple(word for word in get_args(Rescale) if word != "none"),
    }
)

#: Parameters that are true or false.
SWITCHES: tuple[str, ...] = (
    "normalize",
    "rescale",
    "filter_wise",
    "normalize_weights",
    "nuslerp_flatten",
    "nuslerp_row_wise",
)

#: Parameters that name a file of each model.
FILES: tuple[str, ...] = ("fisher", "gram")

RuleMaker = Callable[[Mapping[str, Any]], Rule | None]
"""Makes the rule of a tensor from the numbers of the whole merge and the switches, by name;
``None`` where the policy alone is meant."""

#: What ``base_model`` is for a method: what deltas are taken from (needed, or wanted where it is
#: given), one of the models (needed, or possible), or only where config and tokenizer come from.
Base = Literal["delta", "delta_if_given", "member", "member_if_given", "donor"]

_FIELDS = ("trim_scope", "trim_count", "trim_ties", "elect", "elect_on", "reduce", "divisor")


@dataclass(frozen=True, slots=True)
class Method:
    """One merge method.

    Attributes:
        name: the ``merge_method`` of a recipe.
        summary: one line for ``--help`` and the docs.
        policy: what it does under its own name.
        rescale_by: what ``rescale: true`` means for it.
        variants: for each variant beside ``mergekit`` the parameters that it sets.
        numbers: parameters of :data:`NUMBERS` that it has beside ``weight``, and those that
            follow from the policy (``density``, ``lambda``).
        own: those of them that mean something else for it than for other methods.
        factor: the number that a model is multiplied with: ``weight``, or another name for it.
        rule: for a method that is no policy: makes the rule of a tensor. The policy then only
            tells whether deltas are taken, and all parameters are named below.
        switches: names in :data:`SWITCHES` that the rule is given, with their defaults.
        weighted: whether the models have weights.
        base: what ``base_model`` is for it; by default as the policy says.
        statistic: name in :data:`FILES` of the file that each model needs.
        least, most: how many models are merged with one another, a base of deltas not counted.
    """

    name: str
    summary: str
    policy: Policy
    rescale_by: str = "l1"
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    numbers: tuple[str, ...] = ()
    own: Mapping[str, Number] = field(default_factory=dict)
    factor: str = "weight"
    rule: RuleMaker | None = None
    switches: Mapping[str, bool] = field(default_factory=dict)
    weighted: bool = True
    base: Base | None = None
    statistic: str | None = None
    least: int = 1
    most: int | None = None

    @property
    def needs_base(self) -> bool:
        """Whether the method works on deltas and so needs ``base_model``."""
        return self.policy.difference

    @property
    def base_role(self) -> Base:
        """What ``base_model`` is for it."""
        return self.base or ("delta" if self.policy.difference else "donor")

    @property
    def one_as_it_is(self) -> bool:
        """Whether the tensors of a single model are copied or scaled, and nothing is merged."""
        return self.most == 1 and self.rule is None

    def number(self, name: str) -> Number:
        """What a parameter of it is that is a number."""
        return self.own.get(name) or NUMBERS[name]

    @property
    def random(self) -> bool:
        """Whether the method draws random numbers, so that ``seed`` has a meaning."""
        return self.policy.sparsify in ("drop", "magprune")

    @property
    def _all_numbers(self) -> tuple[str, ...]:
        names = [self.factor] if self.weighted else []
        if self.policy.sparsify != "none":
            names.append("density")
        if self.policy.difference and self.rule is None:
            names.append("lambda")
        return (*names, *self.numbers)

    @property
    def model_numbers(self) -> tuple[str, ...]:
        """Numbers that each model may have of its own."""
        return tuple(name for name in self._all_numbers if self.number(name).of_model)

    @property
    def whole_numbers(self) -> tuple[str, ...]:
        """Numbers of the whole merge."""
        return tuple(name for name in self._all_numbers if not self.number(name).of_model)

    @property
    def model_parameters(self) -> tuple[str, ...]:
        """Parameters that each model may have of its own."""
        return self.model_numbers + ((self.statistic,) if self.statistic else ())

    @property
    def parameters(self) -> tuple[str, ...]:
        """Every parameter that means something for the method."""
        if self.one_as_it_is:
            return (*self.model_numbers, *self.whole_numbers)
        if self.rule is not None:
            files = (self.statistic,) if self.statistic else ()
            return (*self._all_numbers, *self.switches, *files)
        names = [*self.model_numbers, "normalize", *self.whole_numbers]
        if self.policy.sparsify != "none":
            names += ["rescale", "rescale_by"]
        if self.policy.sparsify == "trim":
            names += ["trim_scope", "trim_count", "trim_ties"]
        if self.policy.sparsify == "band":
            names.append("trim_count")
        if self.policy.elect != "none":
            names += ["elect", "elect_on"]
        names += ["reduce", "divisor", "variant"]
        return tuple(names)


_TIES_PEFT = {"elect_on": "unweighted", "reduce": "mean", "divisor": "count"}
_TIES_PAPER = {"elect_on": "unweighted", "reduce": "mean", "divisor": "count"}


def _slerp(given: Mapping[str, Any]) -> Rule:
    return Blend("slerp", (("t", given["t"]), ("base", given["base"])))


def _nuslerp(given: Mapping[str, Any]) -> Rule:
    if given["nuslerp_flatten"]:
        return Blend("nuslerp")
    if given["nuslerp_row_wise"]:
        return Whole("nuslerp", function="cl_fast.ops.spherical:nuslerp_columns", unit="tensor")
    return Whole("nuslerp", function="cl_fast.ops.spherical:nuslerp_rows", unit="row")


def _multislerp(given: Mapping[str, Any]) -> Rule:
    return Blend("multislerp", tuple((name, given[name]) for name in ("normalize_weights", "eps")))


def _karcher(given: Mapping[str, Any]) -> Rule:
    return Blend("karcher", tuple((name, given[name]) for name in ("max_iter", "tol")))


def _model_stock(given: Mapping[str, Any]) -> Rule:
    if given["filter_wise"]:
        return Whole("model_stock", function="cl_fast.ops.spherical:model_stock_rows", unit="row")
    return Blend("model_stock")


def _selective(name: str, unit: Unit, *numbers: str, own_parts: int = 0) -> RuleMaker:
    """Makes the rule of a function of ``cl_fast.ops.selective`` that takes these numbers."""

    def make(given: Mapping[str, Any]) -> Rule:
        settings = tuple((number, given[number]) for number in numbers)
        function = f"cl_fast.ops.selective:{name}"
        return Whole(name, settings, function, unit, own_parts=own_parts)

    return make


_FROM_ZERO = Number(
    default=1e-5, low=0.0, words="the magnitude up to which a delta counts as none, at least 0"
)


def _fisher(given: Mapping[str, Any]) -> Rule | None:
    known = given["statistics"]
    if known is None:
        return None
    return Whole(
        "fisher",
        function="cl_fast.ops.weighted_means:fisher_rule",
        unit="element",
        statistics=known.sources,
        shape=known.shape,
        crcs=known.crcs,
    )


def _regmean(given: Mapping[str, Any]) -> Rule | None:
    known = given["statistics"]
    if known is None:
        return None
    return Whole(
        "regmean",
        (("alpha", given["alpha"]), ("in_first", known.in_first)),
        function="cl_fast.ops.weighted_means:regmean_rule",
        unit="tensor",
        statistics=known.sources,
        shape=known.shape,
        crcs=known.crcs,
    )


_MODELS = Policy(difference=False)
_DELTAS = Policy()

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Method(
                name="linear",
                summary="weighted mean of the models (model soup)",
                policy=Policy(difference=False, reduce="mean"),
            ),
            Method(
                name="task_arithmetic",
                summary="base plus the weighted sum of the deltas",
                policy=Policy(),
            ),
            Method(
                name="ties",
                summary="trim each delta, elect a sign, average the deltas that agree with it",
                policy=Policy(sparsify="trim", elect="mass", reduce="mean"),
                variants={
                    "peft": {"trim_count": "floor", **_TIES_PEFT, "rescale_by": "keep_rate"},
                    "paper": {
                        "trim_scope": "model",
                        "trim_count": "floor_plus_one",
                        "trim_ties": "all",
                        **_TIES_PAPER,
                        "rescale_by": "keep_rate",
                    },
                },
            ),
            Method(
                name="dare_linear",
                summary="drop delta entries at random, rescale the rest, add the weighted sum",
                policy=Policy(sparsify="drop", rescale="l1"),
                variants={
                    "peft": {"rescale_by": "keep_rate"},
                    "paper": {"rescale_by": "keep_rate"},
                },
            ),
            Method(
                name="dare_ties",
                summary="drop delta entries at random, rescale, elect a sign, add what agrees",
                policy=Policy(sparsify="drop", rescale="l1", elect="mass"),
                variants={
                    "peft": {**_TIES_PEFT, "rescale_by": "keep_rate"},
                    "paper": {**_TIES_PAPER, "rescale_by": "keep_rate"},
                },
            ),
            Method(
                name="breadcrumbs",
                summary="drop each delta's outliers and its smallest entries, add the weighted sum",
                policy=Policy(sparsify="band", trim_count="floor"),
                numbers=("gamma",),
            ),
            Method(
                name="breadcrumbs_ties",
                summary="breadcrumbs, then elect a sign and add what agrees",
                policy=Policy(sparsify="band", trim_count="floor", elect="mass"),
                numbers=("gamma",),
            ),
            Method(
                name="della_linear",
                summary="drop delta entries at random, small ones more often, rescale, add the sum",
                policy=Policy(sparsify="magprune", rescale="l1"),
                variants={"paper": {"rescale_by": "keep_rate"}},
                numbers=("epsilon",),
            ),
            Method(
                name="della",
                summary="della_linear's drop, then elect a sign and average what agrees",
                policy=Policy(sparsify="magprune", rescale="l1", elect="mass", reduce="mean"),
                variants={"paper": {"rescale_by": "keep_rate"}},
                numbers=("epsilon",),
            ),
            Method(
                name="passthrough",
                summary="the tensors of one model as they are, or scaled: layers by slices",
                policy=Policy(difference=False),
                factor="scale",
                most=1,
            ),
            Method(
                name="slerp",
                summary="spherical interpolation between two models",
                policy=_MODELS,
                rule=_slerp,
                numbers=("t",),
                weighted=False,
                base="member",
                least=2,
                most=2,
            ),
            Method(
                name="nuslerp",
                summary="spherical interpolation between two models or deltas, by weights",
                policy=_MODELS,
                rule=_nuslerp,
                switches={"nuslerp_flatten": True, "nuslerp_row_wise": False},
                base="delta_if_given",
                least=2,
                most=2,
            ),
            Method(
                name="multislerp",
                summary="weighted mean of the directions of models or deltas, with their length",
                policy=_MODELS,
                rule=_multislerp,
                numbers=("eps",),
                switches={"normalize_weights": True},
                base="delta_if_given",
            ),
            Method(
                name="karcher",
                summary="mean of the models on the sphere",
                policy=_MODELS,
                rule=_karcher,
                numbers=("max_iter", "tol"),
                weighted=False,
                base="member_if_given",
            ),
            Method(
                name="model_stock",
                summary="between the base and the mean, as far as the deltas agree",
                policy=_DELTAS,
                rule=_model_stock,
                switches={"filter_wise": False},
                weighted=False,
                least=2,
            ),
            Method(
                name="sce",
                summary="select what differs most, weigh models by their squares, elect a sign",
                policy=_DELTAS,
                rule=_selective("sce", "tensor", "select_topk", own_parts=12),
                numbers=("select_topk",),
                weighted=False,
            ),
            Method(
                name="nearswap",
                summary="the base moved towards one model, no element further than t",
                policy=_DELTAS,
                rule=_selective("nearswap", "element", "t"),
                numbers=("t",),
                own={
                    "t": Number(
                        default=math.nan,
                        required=True,
                        low=0.0,
                        words="the furthest that an element moves, at least 0",
                    )
                },
                weighted=False,
                most=1,
            ),
            Method(
                name="arcee_fusion",
                summary="the elements of one model that matter most, the base elsewhere",
                policy=_DELTAS,
                rule=_selective("arcee_fusion", "tensor", own_parts=8),
                weighted=False,
                most=1,
            ),
            Method(
                name="ram",
                summary="the mean of the deltas of those models that changed an element",
                policy=_DELTAS,
                rule=_selective("ram", "element", "epsilon"),
                numbers=("epsilon",),
                own={"epsilon": _FROM_ZERO},
                weighted=False,
            ),
            Method(
                name="ramplus_tl",
                summary="ram, with what one model alone changed scaled up",
                policy=_DELTAS,
                rule=_selective("ramplus_tl", "tensor", "r", "alpha", "epsilon", own_parts=4),
                numbers=("r", "alpha", "epsilon"),
                own={"epsilon": _FROM_ZERO},
                weighted=False,
            ),
            Method(
                name="fisher",
                summary="mean of the models weighted by their Fisher diagonals",
                policy=Policy(difference=False, reduce="mean"),
                rule=_fisher,
                statistic="fisher",
            ),
            Method(
                name="regmean",
                summary="linear layers that keep the models' outputs on their own inputs",
                policy=Policy(difference=False, reduce="mean"),
                rule=_regmean,
                numbers=("alpha",),
                own={
                    "alpha": Number(
                        default=0.9,
                        low=0.0,
                        high=1.0,
                        words="the factor of the off-diagonals, from 0 to 1",
                    )
                },
                statistic="gram",
            ),
        )
    }
)

#: Parameters of those methods.
_OTHER_PARAMETERS = frozenset(
    [
        "similarity_threshold",
        "residual_weight",
    ]
)


def find_method(name: str, key: str = "merge_method") -> Method:
    """The entry of :data:`METHODS`.

    Raises:
        RecipeError: no such method; the message lists those there are.
    """
    method = METHODS.get(name)
    if method is not None:
        return method
    hint = suggest(name, METHODS)
    raise RecipeError(f"{key}: unknown method {name!r}{hint}; there are {', '.join(METHODS)}")


def suggest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest known word, or nothing."""
    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_parameter(method: Method, name: str, key: str) -> None:
    """Refuse a parameter that would have no effect.

    Raises:
        RecipeError: ``name`` is unknown, or means nothing for ``method``.
    """
    if name in method.parameters or name == "int8_mask":
        return
    everything = {p for other in METHODS.values() for p in other.parameters} | {"int8_mask"}
    if name in everything:
        users = [other.name for other in METHODS.values() if name in other.parameters]
        raise RecipeError(
            f"{key}: {name!r} has no effect with merge_method {method.name!r} (it is for "
            f"{', '.join(users)}); remove it"
        )
    if name in _OTHER_PARAMETERS:
        raise RecipeError(
            f"{key}: {name!r} belongs to other merge methods; {method.name!r} takes "
            f"{', '.join(method.parameters)}"
        )
    raise RecipeError(
        f"{key}: unknown parameter{suggest(name, everything)}; {method.name!r} takes "
        f"{', '.join(method.parameters)}"
    )


def make_policy(
    method: str | Method, settings: Mapping[str, Any] | None = None, *, where: str = "parameters"
) -> Policy:
    """The policy of a method with a recipe's settings applied.

    Args:
        method: name or entry.
        settings: any of ``variant``, :data:`SWITCHES` and the names in :data:`CHOICES`. What is
            absent is as the variant has it, and what the variant leaves open as under the
            method's own name.
        where: the recipe key that holds the settings, for messages.

    Raises:
        RecipeError: an unknown setting or word, a setting without effect, or two that contradict.
    """
    entry = find_method(method) if isinstance(method, str) else method
    given = {name: value for name, value in (settings or {}).items() if value is not None}
    if "variant" in given:
        check_parameter(entry, "variant", f"{where}.variant")
    variant = given.pop("variant", "mergekit")
    for name, value in given.items():
        check_parameter(entry, name, f"{where}.{name}")
        if name in SWITCHES:
            if not isinstance(value, bool):
                raise RecipeError(f"{where}.{name}: must be true or false; got {value!r}")
        elif name not in CHOICES:
            raise RecipeError(f"{where}.{name}: is a number, not a choice of the policy")
        elif not isinstance(value, str) or value not in CHOICES[name]:
            hint = suggest(value, CHOICES[name]) if isinstance(value, str) else ""
            raise RecipeError(
                f"{where}.{name}: must be one of {', '.join(CHOICES[name])}; got {value!r}{hint}"
            )
    if entry.rule is not None:
        return entry.policy
    preset = _preset(entry, variant, where)
    return _build(entry, preset, given, where)


def _preset(method: Method, variant: object, where: str) -> Mapping[str, Any]:
    if variant == "mergekit":
        return {}
    if isinstance(variant, str) and variant in method.variants:
        return method.variants[variant]
    known = ["mergekit", *method.variants]
    if isinstance(variant, str) and any(variant in other.variants for other in METHODS.values()):
        raise RecipeError(
            f"{where}.variant: {variant!r} has no effect with merge_method {method.name!r}, which "
            "all of them define alike; remove it"
        )
    hint = suggest(variant, known) if isinstance(variant, str) else ""
    raise RecipeError(f"{where}.variant: must be one of {', '.join(known)}; got {variant!r}{hint}")


def _build(
    method: Method, preset: Mapping[str, Any], given: Mapping[str, Any], where: str
) -> Policy:
    def pick(name: str, default: Any) -> Any:
        return given.get(name, preset.get(name, default))

    changes: dict[str, Any] = {name: pick(name, getattr(method.policy, name)) for name in _FIELDS}
    if "normalize" in given:
        wanted = "mean" if given["normalize"] else "sum"
        if given.get("reduce", wanted) != wanted:
            raise RecipeError(
                f"{where}: normalize: {str(given['normalize']).lower()} and reduce: "
                f"{given['reduce']} contradict each other; give one of them"
            )
        changes["reduce"] = wanted
    if changes["reduce"] == "max" and method.policy.elect == "none":
        raise RecipeError(
            f"{where}.reduce: 'max' needs an elected sign, which {method.name!r} has not; use sum "
            "or mean"
        )
    if "divisor" in given and changes["reduce"] != "mean":
        raise RecipeError(
            f"{where}.divisor: has no effect with reduce: {changes['reduce']}; set normalize: "
            "true, or remove it"
        )
    rescale = given.get("rescale", method.policy.rescale != "none")
    if "rescale_by" in given and not rescale:
        raise RecipeError(
            f"{where}.rescale_by: has no effect without rescale: true; set that, or remove it"
        )
    changes["rescale"] = pick("rescale_by", method.rescale_by) if rescale else "none"
    if changes["trim_scope"] == "model" and changes["trim_ties"] == "first":
        if "trim_ties" in given:
            raise RecipeError(
                f"{where}.trim_ties: 'first' needs trim_scope: tensor, because the order of the "
                "tensors must not decide what is kept; use all or none"
            )
        changes["trim_ties"] = "all"
    return replace(method.policy, **changes)
