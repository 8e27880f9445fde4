"""What one merge does to each element, as a small value that every backend understands.

Every delta merge of this library is the same pass over the elements of a tensor::

    d_k = x_k - base                                  (difference=True; else d_k = x_k)
    d_k = 0 where not kept                            (sparsify: trim, band by magnitude; drop,
                                                       magprune at random)
    v_k = d_k * (weight_k * rescale_k)
    D   = reduce_k(v_k where its sign is the elected) (elect, reduce, divisor)
    out = base + lambda * D                           (difference=True; else lambda * D)

A :class:`Policy` says which of the published variants of each step is meant. It holds no numbers:
weights, densities and lambda travel beside it. The module imports nothing but the standard
library, so that planning a merge needs neither torch nor the native core.

Sources of the variants: TIES-Merging (Yadav et al. 2023), DARE (Yu et al. 2024), Task Arithmetic
(Ilharco et al. 2023), Model Soups (Wortsman et al. 2022), Model Breadcrumbs (Davari and Belilovsky
2023), DELLA-Merging (Deep et al. 2024), and the behaviour of the libraries that implement them;
docs/merge-recipes.md tells which library does what.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

__all__ = [
    "DTYPES",
    "LONGEST_SCALED_ROW",
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
    "band_counts",
    "check_keep_probabilities",
    "row_length",
    "selection_counts",
    "trim_keep_count",
]

#: Floating types that the kernels read, by their safetensors name: bytes per element.
DTYPES: dict[str, int] = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1}

#: Floating types that the kernels write. Eight-bit floats are inputs only: without a scale per
#: tensor they cannot hold a merged weight to half a spacing of anything useful.
OUTPUT_DTYPES: tuple[str, ...] = ("F32", "BF16", "F16")

Sparsify = Literal["none", "trim", "drop", "band", "magprune"]
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
            element with probability ``density`` (DARE); ``band`` drops the ``gamma`` largest
            magnitudes and keeps ``density`` of those below (Model Breadcrumbs); ``magprune`` keeps
            an element with a probability of ``density - epsilon`` to ``density + epsilon`` that
            rises with the rank of its magnitude in its row (DELLA).
        trim_scope: the elements that compete for the kept places: those of one ``tensor``, or of
            the whole ``model``.
        trim_count: how many places there are, see :func:`trim_keep_count`; of a band, too.
        trim_ties: of the elements exactly at the threshold keep the ``first`` by flat index until
            the count is met, ``all`` of them (more than the count), or ``none`` (fewer).
        rescale: factor on what was kept: ``none``; ``keep_rate`` divides by the fraction kept (in
            ``magprune`` each element by its own keep rate); ``l1`` multiplies by
            ``sum|d| / sum|d kept|``.
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
        if self.sparsify == "band" and (self.trim_scope, self.trim_ties) != ("tensor", "first"):
            raise ValueError(
                "Policy.sparsify='band' takes the magnitudes of one tensor, and of equal ones the "
                "first: trim_scope='tensor' and trim_ties='first'; got "
                f"{self.trim_scope!r} and {self.trim_ties!r}"
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


def band_counts(density: float, gamma: float, n: int, rule: TrimCount = "floor") -> tuple[int, int]:
    """How many of ``n`` magnitudes a band drops at the top, and how many it keeps below them.

    ``n_keep`` follows from the density as in :func:`trim_keep_count`; ``n_top = int(gamma n)``, or
    fewer where that would not leave ``n_keep``: the density comes first, as in mergekit. A
    ``density >= 1`` keeps everything, whatever ``gamma`` says.

    Raises:
        ValueError: as :func:`trim_keep_count`; ``gamma`` is not a number in [0, 1].
    """
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must be in [0, 1]; got {gamma!r}")
    keep = trim_keep_count(density, n, rule)
    return min(int(gamma * n), n - keep), keep


def check_keep_probabilities(density: float, epsilon: float) -> str | None:
    """What is wrong with the keep probabilities ``density -+ epsilon`` of magprune, if anything.

    All of them must be above 0 (at least 2^-32, the finest keep rate) and at most 1.
    """
    if density >= 1.0:
        return None
    most = min(density - 2.0**-32, 1.0 - density)
    if 0.0 <= epsilon <= 1.0 and density - epsilon >= 2.0**-32 and density + epsilon <= 1.0:
        return None
    return (
        f"the keep probabilities run from density - epsilon to density + epsilon and must lie in "
        f"(0, 1]; got density {density:g} and epsilon {epsilon:g}, choose an epsilon of at most "
        f"{max(0.0, most):.4g}"
    )


def row_length(shape: Sequence[int]) -> int:
    """Elements of a row of a tensor: its last dimension; 1 for a tensor without dimensions."""
    return shape[-1] if shape else 1


#: Elements of a row up to which the C++ core scales what magprune keeps one by one
#: (``rescale="keep_rate"``): each tile of a longer row would rank all of it again.
LONGEST_SCALED_ROW = 1 << 20


def selection_counts(policy: Policy, n: int, density: float, gamma: float) -> tuple[int, int]:
    """How many of ``n`` magnitudes a term drops at the top, and how many it keeps below them.

    Zeros where the policy selects nothing by magnitude.
    """
    if policy.sparsify == "band":
        return band_counts(density, gamma, n, policy.trim_count)
    if policy.sparsify == "trim":
        return 0, trim_keep_count(density, n, policy.trim_count)
    return 0, 0
