"""What one merge does to each element, as a small value that every backend understands.

Every delta merge of this library is the same pass over the elements of a tensor::

    d_k = x_k - base                                  (difference=True; else d_k = x_k)
    d_k = 0 where not kept                            (sparsify: trim by magnitude | drop at random)
    v_k = d_k * (weight_k * rescale_k)
    D   = reduce_k(v_k where its sign is the elected) (elect, reduce, divisor)
    out = base + lambda * D                           (difference=True; else lambda * D)

A :class:`Policy` says which of the published variants of each step is meant. It holds no numbers:
weights, densities and lambda travel beside it. The module imports nothing but the standard
library, so that planning a merge needs neither torch nor the native core.

Sources of the variants: TIES-Merging (Yadav et al. 2023), DARE (Yu et al. 2024), Task Arithmetic
(Ilharco et al. 2023), Model Soups (Wortsman et al. 2022), and the behaviour of the libraries that
implement them; docs/merge-recipes.md tells which library does what.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

__all__ = [
    "DTYPES",
    "OUTPUT_DTYPES",
    "Divisor",
    "Elect",
    "ElectOn",
    "Policy",
    "Reduce",
    "Rescale",
    "Sparsify",
    "TrimCount",
    "TrimScope",
    "TrimTies",
    "trim_keep_count",
]

#: Floating types that the kernels read, by their safetensors name: bytes per element.
DTYPES: dict[str, int] = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1}

#: Floating types that the kernels write. Eight-bit floats are inputs only: without a scale per
#: tensor they cannot hold a merged weight to half a spacing of anything useful.
OUTPUT_DTYPES: tuple[str, ...] = ("F32", "BF16", "F16")

Sparsify = Literal["none", "trim", "drop"]
TrimScope = Literal["tensor", "model"]
TrimCount = Literal["at_least_one", "floor", "floor_plus_one"]
TrimTies = Literal["first", "all", "none"]
Rescale = Literal["none", "keep_rate", "l1"]
Elect = Literal["none", "mass", "frequency"]
ElectOn = Literal["weighted", "unweighted"]
Reduce = Literal["sum", "mean", "max"]
Divisor = Literal["weights", "count"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The variant of each step of ``combine``. Immutable, hashable, without numbers.

    Attributes:
        difference: combine the deltas ``x_k - base`` and add the base back; ``False`` combines
            the ``x_k`` themselves (soups).
        sparsify: ``none``; ``trim`` keeps the largest magnitudes (TIES); ``drop`` keeps each
            element with probability ``density`` (DARE).
        trim_scope: the elements that compete for the kept places: those of one ``tensor``, or of
            the whole ``model``.
        trim_count: how many places there are, see :func:`trim_keep_count`.
        trim_ties: of the elements exactly at the threshold keep the ``first`` by flat index until
            the count is met, ``all`` of them (more than the count), or ``none`` (fewer).
        rescale: factor on what was kept: ``none``; ``keep_rate`` divides by the fraction kept;
            ``l1`` multiplies by ``sum|d| / sum|d kept|``.
        elect: one sign per element: ``none``; ``mass`` takes the sign of the sum of the votes;
            ``frequency`` the sign that more models have. A draw elects ``+``.
        elect_on: votes are the deltas times their weights (``weighted``) or without them.
        reduce: ``sum``, ``mean``, or the entry of largest magnitude (``max``, needs ``elect``).
        divisor: what ``mean`` divides by: the sum of the ``weights`` that take part in the
            element, or their ``count``.

    Raises:
        ValueError: an unknown variant, or a combination that has no meaning.
    """

    difference: bool = True
    sparsify: Sparsify = "none"
    trim_scope: TrimScope = "tensor"
    trim_count: TrimCount = "at_least_one"
    trim_ties: TrimTies = "first"
    rescale: Rescale = "none"
    elect: Elect = "none"
    elect_on: ElectOn = "weighted"
    reduce: Reduce = "sum"
    divisor: Divisor = "weights"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, type(allowed[0])) or value not in allowed:
                options = ", ".join(repr(choice) for choice in allowed)
                raise ValueError(f"Policy.{name} must be one of {options}; got {value!r}")
        if self.sparsify == "trim" and self.trim_scope == "model" and self.trim_ties == "first":
            raise ValueError(
                "Policy.trim_ties='first' needs trim_scope='tensor': the order of the tensors in "
                "a model must not decide what is kept; use trim_ties='all' or 'none'"
            )
        if self.sparsify == "none" and self.rescale != "none":
            raise ValueError(
                f"Policy.rescale={self.rescale!r} has no effect with sparsify='none'; "
                "use rescale='none'"
            )
        if self.elect == "none" and self.reduce == "max":
            raise ValueError(
                "Policy.reduce='max' needs an elected sign; set elect='mass' or 'frequency'"
            )


def _choices() -> dict[str, tuple[object, ...]]:
    hints = get_type_hints(Policy)
    return {
        field.name: (True, False) if hints[field.name] is bool else get_args(hints[field.name])
        for field in fields(Policy)
    }


_CHOICES = _choices()


def trim_keep_count(density: float, n: int, rule: TrimCount = "at_least_one") -> int:
    """How many of ``n`` magnitudes a trim to ``density`` keeps, before ties are looked at.

    ========================  ==============================  ==============================
    rule                      count                           as in
    ========================  ==============================  ==============================
    ``at_least_one``          ``max(1, int(density * n))``    mergekit
    ``floor``                 ``int(density * n)``, may be 0  PEFT
    ``floor_plus_one``        ``int(density * n) + 1``        the TIES authors' code
    ========================  ==============================  ==============================

    The product is taken in float64, as all three do. Never more than ``n``; ``density >= 1``
    keeps everything.

    Raises:
        ValueError: a density that is negative or not a number, a negative ``n``, unknown rule.
    """
    if n < 0:
        raise ValueError(f"n must not be negative; got {n}")
    if not density >= 0.0 or math.isinf(density):
        raise ValueError(f"density must be a finite fraction of at least 0; got {density!r}")
    if rule not in get_args(TrimCount):
        raise ValueError(f"rule must be one of {', '.join(get_args(TrimCount))}; got {rule!r}")
    if density >= 1.0:
        return n
    count = int(density * n)
    if rule == "at_least_one":
        count = max(1, count)
    elif rule == "floor_plus_one":
        count += 1
    return min(n, count)
