"""combine: the one pass behind every merge.

For models k = 0 .. K-1 with tensors x_k, base b, weights w_k and densities rho_k, in float32 and
in this order on every backend (no product is fused with a sum, so all agree bit for bit):

    d_k = x_k - b                              difference=True, else x_k
    d_k = +0 where not kept                    sparsify: trim, band (magnitude), drop, magprune
                                               (random stream)
    v_k = d_k * float32(w_k r_k)               r_k: see below; the product w_k r_k is float64
    no election:
        D = v_0 + v_1 + ...                    reduce="sum"
        D / float32(sum w), or / float32(K)    reduce="mean"; |sum w| < 1e-8 divides by 1
    election, vote_k = v_k ("weighted") or d_k * float32(r_k) ("unweighted"):
        a    = sum vote_k ("mass") or sum sign(vote_k) ("frequency")
        plus = a >= 0
        in_k = vote_k > 0 if plus else vote_k < 0        (NaN takes part)
        D    = sum of v_k over in_k            reduce="sum"
        D / sum of float32(w_k) over in_k      reduce="mean", divisor="weights" (0 divides by 1)
        D / number of in_k                     reduce="mean", divisor="count"   (0 divides by 1)
        D    = v_k of largest |v_k| over in_k  reduce="max", the first of equals, 0 if none
    D   = D * float32(lam)                     skipped for lam = 1
    out = b + D, or D                          rounded once to the output dtype, to nearest even

    r_k    none: 1;  keep_rate: 1 / rho_k for trim and band, 2^32 / T_k for drop (the exact rate);
           l1: sum |d_k| / sum |d_k kept|, sums in float64 in a fixed order, 1 if either < 1e-7
           magprune with keep_rate: d_k times float32(2^32 / T of the element) first, and r_k = 1
    trim   the magnitudes of d_k, see cl_fast.ops.magnitude; drop: see cl_fast.ops.streams; band
           and magprune, with their gamma_k and epsilon_k: see cl_fast.ops.ranking
    rho_k >= 1 leaves d_k as it is: no trim, no drop, no rescale.

Sources of the steps: Model Soups (Wortsman et al. 2022), Task Arithmetic (Ilharco et al. 2023),
TIES-Merging (Yadav et al. 2023), DARE (Yu et al. 2024), Model Breadcrumbs (Davari and Belilovsky
2023), DELLA-Merging (Deep et al. 2024). `Policy` names the variants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from cl_fast.backends import (
    check_backend,
    device_ops,
    native_ops,
    native_or_say,
    require_native,
    say_once,
)
from cl_fast.ops.dropping import (
    absolute_sum,
    drop_factor,
    keep_mask,
    l1_factor,
    round_float32,
    signed_key,
)
from cl_fast.ops.magnitude import (
    READABLE,
    check_readable,
    check_same,
    kept_by_code,
    magnitude_codes,
    select_code,
)
from cl_fast.ops.policy import (
    LONGEST_SCALED_ROW,
    Policy,
    band_counts,
    row_length,
    trim_keep_count,
)
from cl_fast.ops.ranking import band_mask, check_epsilon, magprune_mask
from cl_fast.ops.streams import keep_threshold

if TYPE_CHECKING:
    from cl_fast.ops.packing import PackedDelta

__all__ = [
    "combine",
    "combine_",
    "combine_many",
    "combine_many_",
    "combine_reference",
    "model_thresholds",
]

WRITABLE = READABLE[:3]
_SMALLEST_WEIGHT_SUM = 1e-8


def _per_model(argument: str, value: float | Sequence[float], count: int) -> list[float]:
    """`value` for each of `count` models, as finite floats."""
    values = [value] * count if isinstance(value, (int, float)) else list(value)
    if len(values) != count:
        raise ValueError(f"{argument} must have one entry per model, {count}; got {len(values)}")
    for entry in values:
        if isinstance(entry, bool) or not isinstance(entry, (int, float)):
            raise TypeError(f"{argument} must hold numbers, got {type(entry).__name__}")
        if not math.isfinite(entry):
            raise ValueError(f"{argument} must be finite, got {entry}")
    return [float(entry) for entry in values]


def _delta(base: Tensor | None, tensor: Tensor, policy: Policy, wide: torch.dtype) -> Tensor:
    values = tensor.reshape(-1).to(wide)
    if policy.difference:
        assert base is not None
        values = values - base.reshape(-1).to(wide)
    return values


def _tied_sum(code: int, count: int) -> float:
    """The sum of `count` magnitudes that have one code."""
    if count == 0:
        return 0.0
    return float(torch.tensor(code, dtype=torch.int32).view(torch.float32)) * count


def _band(
    delta: Tensor, magnitudes: Tensor, policy: Policy, density: float, gamma: float
) -> tuple[Tensor, float]:
    counts = band_counts(density, gamma, delta.numel(), policy.trim_count)
    keep, low, at_low, high, at_high = band_mask(magnitudes, *counts)
    kept = torch.where(keep, delta, 0.0)
    if policy.rescale == "keep_rate":
        return kept, 1.0 / density
    if policy.rescale == "l1":
        # What is inside first, then those at each end at once: no order among them matters.
        inside = keep & (magnitudes > low)
        if high >= 0:
            inside &= magnitudes < high
        some = absolute_sum(torch.where(inside, delta, 0.0)) if counts[1] else 0.0
        some = some + _tied_sum(high, at_high) + _tied_sum(low, at_low)
        return kept, l1_factor(absolute_sum(delta), some)
    return kept, 1.0


def _magprune(
    delta: Tensor,
    magnitudes: Tensor,
    policy: Policy,
    row: int,
    density: float,
    epsilon: float,
    key: int,
) -> tuple[Tensor, float]:
    keep, thresholds = magprune_mask(magnitudes, row, density, epsilon, key)
    kept = torch.where(keep, delta, 0.0)
    if policy.rescale == "keep_rate":
        factors = 2.0**32 / thresholds.double()
        return kept * (factors.float() if delta.dtype == torch.float32 else factors), 1.0
    if policy.rescale == "l1":
        return kept, l1_factor(absolute_sum(delta), absolute_sum(kept))
    return kept, 1.0


def _sparsify(
    delta: Tensor,
    codes: Callable[[], Tensor],
    policy: Policy,
    row: int,
    density: float,
    gamma: float,
    epsilon: float,
    key: int,
    code: int,
) -> tuple[Tensor, float]:
    """The kept delta and its factor r. `code` is a threshold given for the model, or -1."""
    if policy.sparsify == "none" or density >= 1.0:
        return delta, 1.0
    if policy.sparsify == "drop":
        threshold = keep_threshold(density)
        keep = keep_mask(key, delta.numel(), threshold, device=delta.device)
        kept = torch.where(keep, delta, 0.0)
        return kept, drop_factor(policy.rescale, threshold, delta, kept)

    magnitudes = codes()
    if policy.sparsify == "band":
        return _band(delta, magnitudes, policy, density, gamma)
    if policy.sparsify == "magprune":
        return _magprune(delta, magnitudes, policy, row, density, epsilon, key)
    if code >= 0:
        wanted = delta.numel()  # the model's choice: nothing is counted per tensor
    else:
        wanted = trim_keep_count(density, delta.numel(), policy.trim_count)
        code = select_code([magnitudes], wanted)
    keep, at = kept_by_code(magnitudes, code, wanted, policy.trim_ties)
    kept = torch.where(keep, delta, 0.0)
    if policy.rescale == "keep_rate":
        return kept, 1.0 / density
    if policy.rescale == "l1":
        # What is above the threshold first, then the ties at once: no order among them matters.
        above = absolute_sum(torch.where(magnitudes > code, delta, 0.0)) if wanted else 0.0
        return kept, l1_factor(absolute_sum(delta), above + _tied_sum(code, at))
    return kept, 1.0


def _scale(values: Tensor, factor: float) -> Tensor:
    return values * (round_float32(factor) if values.dtype == torch.float32 else factor)


def _divide(values: Tensor, divisor: float) -> Tensor:
    # By a tensor: by a number some devices multiply with the reciprocal instead.
    return values / torch.full((), divisor, dtype=values.dtype, device=values.device)


def _reduce_elected(
    values: list[Tensor], votes: list[Tensor], weights: list[float], policy: Policy
) -> Tensor:
    mass = torch.zeros_like(values[0])
    for vote in votes:
        if policy.elect == "frequency":
            vote = (vote > 0).to(mass.dtype) - (vote < 0).to(mass.dtype)
        mass = mass + vote
    plus = mass >= 0
    # Said by what does not agree, so that NaN agrees and reaches the output.
    agree = [torch.where(plus, ~(vote <= 0), ~(vote >= 0)) for vote in votes]

    total = torch.zeros_like(mass)
    if policy.reduce == "max":
        for value, keep in zip(values, agree, strict=True):
            larger = (value.abs() > total.abs()) | (value.isnan() & ~total.isnan())
            total = torch.where(keep & larger, value, total)
        return total
    divisor = torch.zeros_like(mass)
    for value, keep, weight in zip(values, agree, weights, strict=True):
        total = total + torch.where(keep, value, 0.0)
        if policy.reduce == "mean":
            share = 1.0 if policy.divisor == "count" else weight
            divisor = divisor + _scale(keep.to(mass.dtype), share)
    if policy.reduce == "mean":
        total = total / torch.where(divisor == 0, 1.0, divisor)
    return total


def combine_reference(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    *,
    weights: float | Sequence[float],
    policy: Policy,
    density: float | Sequence[float] = 1.0,
    gamma: float | Sequence[float] = 0.0,
    epsilon: float | Sequence[float] = 0.0,
    keys: Sequence[int] | None = None,
    thresholds: Sequence[int] | None = None,
    masks: Sequence[Tensor | None] | None = None,
    factors: Sequence[float] | None = None,
    lam: float = 1.0,
    out_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The whole pass in plain torch, on any device: the definition that every backend must meet.

    With `compute_dtype=torch.float32` the result is the one that all backends give, bit for bit.
    With `torch.float64` nothing is rounded on the way: the oracle for tests. What a trim, a band or
    magprune keeps is decided on float32 magnitudes in both, because that is how it is defined.

    Args:
        base: the base tensor; None without differences.
        tensors: one per model, of the shape and device of `base`; dtypes may differ.
        weights: one per model, or one for all.
        policy: the variants of the steps.
        density: the fraction kept, one per model, or one for all; 1 keeps everything.
        gamma: for sparsify="band", the fraction of largest magnitudes dropped, likewise.
        epsilon: for sparsify="magprune", half the range of the keep probabilities, likewise. Rows
            are the last dimension of `base` or of the first tensor.
        keys: the stream key of each model (`stream_key`), for sparsify="drop" and "magprune".
        thresholds: the magnitude code of each model's threshold where the trim spans a whole
            model (`model_thresholds`); an entry of -1 selects in this tensor alone.
        masks: of a packed delta, which elements it kept; the deltas of all others are 0.
        factors: what the deltas of a packed delta are multiplied by, before the weight.
        lam: the factor on the combined delta.
        out_dtype: bfloat16, float16 or float32; None: that of `base` or of the first tensor.
        compute_dtype: float32 or float64.

    Returns:
        A new contiguous tensor of the common shape; float64 for compute_dtype=float64 unless
        `out_dtype` says otherwise.

    Raises:
        TypeError, ValueError: as `combine`.
    """
    count = len(tensors)
    weights = _per_model("weights", weights, count)
    densities = _per_model("density", density, count)
    gammas, epsilons = _per_model("gamma", gamma, count), _per_model("epsilon", epsilon, count)
    first = base if base is not None else tensors[0]
    if out_dtype is None:
        out_dtype = torch.float64 if compute_dtype == torch.float64 else first.dtype

    values, votes = [], []
    for k, tensor in enumerate(tensors):
        delta = _delta(base, tensor, policy, compute_dtype)
        mask = None if masks is None else masks[k]
        if mask is not None:
            delta = torch.where(mask.reshape(-1), delta, 0.0)

        def codes(tensor: Tensor = tensor) -> Tensor:
            return magnitude_codes(_delta(base, tensor, policy, torch.float32))

        kept, factor = _sparsify(
            delta,
            codes,
            policy,
            row_length(tuple(first.shape)),
            densities[k],
            gammas[k],
            epsilons[k],
            keys[k] if keys is not None else 0,
            thresholds[k] if thresholds is not None else -1,
        )
        if factors is not None:
            factor = factors[k] * factor
        value = _scale(kept, weights[k] * factor)
        values.append(value)
        if policy.elect != "none":
            weighted = policy.elect_on == "weighted"
            votes.append(value if weighted else kept if factor == 1.0 else _scale(kept, factor))

    if policy.elect != "none":
        total = _reduce_elected(values, votes, weights, policy)
    else:
        total = values[0]
        for value in values[1:]:
            total = total + value
        if policy.reduce == "mean":
            by = sum(weights) if policy.divisor == "weights" else float(count)
            total = _divide(
                total,
                1.0
                if abs(by) < _SMALLEST_WEIGHT_SUM
                else round_float32(by)
                if compute_dtype == torch.float32
                else by,
            )
    if lam != 1.0:
        total = _scale(total, lam)
    if policy.difference:
        assert base is not None
        total = base.reshape(-1).to(compute_dtype) + total
    return total.to(out_dtype).reshape(first.shape)


def model_thresholds(
    bases: Sequence[Tensor | None],
    tensors: Sequence[Sequence[Tensor]],
    *,
    policy: Policy,
    density: float | Sequence[float],
) -> list[int]:
    """The threshold code of each model when all of its tensors compete: exact, whole-model TIES.

    Args:
        bases: the base of each tensor of the model.
        tensors: for each tensor of the model one tensor per model.
        policy: `difference` and `trim_count` are read.
        density: the fraction of all elements kept, one per model, or one for all.

    Returns:
        One code per model for `combine_reference(..., thresholds=...)`; -1 where density >= 1.
    """
    count = len(tensors[0]) if tensors else 0
    codes = []
    for k, rho in enumerate(_per_model("density", density, count)):
        if rho >= 1.0:
            codes.append(-1)
            continue

        def parts(k: int = k) -> Iterator[Tensor]:
            for base, row in zip(bases, tensors, strict=True):
                yield magnitude_codes(_delta(base, row[k], policy, torch.float32))

        total = sum(row[k].numel() for row in tensors)
        wanted = trim_keep_count(rho, total, policy.trim_count)
        # Nothing wanted: a threshold that no number exceeds.
        codes.append(select_code(parts, wanted) if wanted else 0x7FFFFFFF)
    return codes


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The arguments of a combine over many tensors: rows of `models` tensors each, flattened."""

    bases: Sequence[Tensor]
    """One per row; empty without differences."""
    tensors: Sequence[Tensor]
    models: int
    weights: Sequence[float]
    """This and the next five: one entry per entry of `tensors`."""
    densities: Sequence[float]
    gammas: Sequence[float]
    epsilons: Sequence[float]
    keys: Sequence[int]
    """Stream keys as int64."""
    thresholds: Sequence[int]
    """Codes from a selection over the whole model; -1: select here."""
    policy: Policy
    lam: float
    out_dtype: torch.dtype | None

    @property
    def rows(self) -> int:
        return len(self.tensors) // self.models

    @property
    def selects_over_rows(self) -> bool:
        """Whether thresholds over the whole model are still to be found."""
        trims = self.policy.sparsify == "trim" and self.policy.trim_scope == "model"
        return trims and max(self.thresholds, default=-1) < 0

    def row(self, row: int) -> slice:
        return slice(row * self.models, (row + 1) * self.models)

    def first(self, row: int) -> Tensor:
        """The tensor that gives the row its shape, device and default dtype."""
        return self.bases[row] if self.bases else self.tensors[row * self.models]

    def check(self) -> None:
        """Raise TypeError or ValueError unless every backend can carry this out."""
        self._check_counts()
        self._check_numbers()
        for row in range(self.rows):
            label = "" if self.rows == 1 else f" of row {row}"
            first = self.first(row)
            first_name = f"base{label}" if self.bases else f"tensors[0]{label}"
            check_readable(first_name, first)
            for k, tensor in enumerate(self.tensors[self.row(row)]):
                check_readable(f"tensors[{k}]{label}", tensor)
                check_same(f"tensors[{k}]{label}", tensor, first_name, first)
            if (self.out_dtype or first.dtype) not in WRITABLE:
                raise TypeError(
                    "out_dtype must be one of bfloat16, float16, float32; "
                    f"got {self.out_dtype or first.dtype}"
                    + ("" if self.out_dtype else f", the dtype of {first_name}: give out_dtype")
                )

    def _check_counts(self) -> None:
        if not self.tensors:
            raise ValueError("tensors must hold at least one tensor")
        if self.models < 1 or len(self.tensors) % self.models:
            raise ValueError(
                f"tensors must come in rows of {self.models} models; got {len(self.tensors)}"
            )
        if self.policy.difference and len(self.bases) != self.rows:
            raise ValueError(
                f"base must be given for each of {self.rows} tensors, since policy.difference "
                f"is True; got {len(self.bases)}"
            )
        if self.bases and not self.policy.difference:
            raise ValueError("base has no effect with policy.difference=False; leave it out")
        for argument in ("weights", "densities", "gammas", "epsilons", "keys", "thresholds"):
            length = len(getattr(self, argument))
            if length != len(self.tensors):
                raise ValueError(
                    f"{argument} must have one entry per tensor, {len(self.tensors)}; got {length}"
                )

    def _check_numbers(self) -> None:
        for weight in self.weights:
            if not math.isfinite(weight):
                raise ValueError(f"weights must be finite, got {weight}")
        for density, code in zip(self.densities, self.thresholds, strict=True):
            if code >= 0 and density >= 1.0:
                raise ValueError(
                    f"thresholds have no effect with density={density}, which keeps everything; "
                    "give the density that they were found for"
                )
            if not 0.0 < density <= 1.0:
                raise ValueError(f"density must be in (0, 1]; got {density}")
            if density < 1.0 and self.policy.sparsify == "none":
                raise ValueError(
                    f"density={density} has no effect with policy.sparsify='none'; leave it out"
                )
        for density, gamma, epsilon in zip(self.densities, self.gammas, self.epsilons, strict=True):
            if not 0.0 <= gamma <= 1.0:
                raise ValueError(f"gamma must be in [0, 1]; got {gamma}")
            if self.policy.sparsify == "magprune":
                check_epsilon(density, epsilon)
        if self.selects_over_rows:
            for row in range(1, self.rows):
                if self.densities[self.row(row)] != self.densities[self.row(0)]:
                    raise ValueError(
                        "density must be one number per model with policy.trim_scope='model'"
                    )
        if not math.isfinite(self.lam):
            raise ValueError(f"lam must be finite, got {self.lam}")

    def run_eager(self) -> list[Tensor]:
        thresholds = self.thresholds
        rows = range(self.rows)
        if self.selects_over_rows:
            found = model_thresholds(
                self.bases or [None] * self.rows,
                [self.tensors[self.row(row)] for row in rows],
                policy=self.policy,
                density=self.densities[self.row(0)],
            )
            thresholds = found * self.rows
        return [
            combine_reference(
                self.bases[row] if self.bases else None,
                self.tensors[self.row(row)],
                weights=self.weights[self.row(row)],
                policy=self.policy,
                density=self.densities[self.row(row)],
                gamma=self.gammas[self.row(row)],
                epsilon=self.epsilons[self.row(row)],
                keys=self.keys[self.row(row)],
                thresholds=thresholds[self.row(row)],
                lam=self.lam,
                out_dtype=self.out_dtype,
            )
            for row in rows
        ]

    def run_cpu(self, outs: Sequence[Tensor] | None = None) -> list[Tensor]:
        core = native_or_say()
        if core is None:
            return _stored(self.run_eager(), outs)
        if not native_ops.takes(self):
            if native_ops.longest_row(self) > LONGEST_SCALED_ROW:
                say_once(
                    f"magprune with rescale='keep_rate' on rows of more than "
                    f"{LONGEST_SCALED_ROW} elements is served by the eager reference"
                )
            return _stored(self.run_eager(), outs)
        return native_ops.combine(core, self, outs)

    def run_device(self, outs: Sequence[Tensor] | None = None) -> list[Tensor]:
        """On GPU tensors: one call of the kernels per device."""
        devices = dict.fromkeys(self.first(row).device for row in range(self.rows))
        if self.policy.sparsify in ("band", "magprune"):
            say_once(
                f"combine with sparsify={self.policy.sparsify!r} has no kernel for GPUs yet: the "
                "eager reference serves it on the device of its tensors"
            )
        if not device_ops.takes(self) or (len(devices) > 1 and self.selects_over_rows):
            return _stored(self.run_eager(), outs)
        results: dict[int, Tensor] = {}
        for device in devices:
            rows = [row for row in range(self.rows) if self.first(row).device == device]
            part = self if len(devices) == 1 else self.part(rows)
            into = None if outs is None else [outs[row] for row in rows]
            by = device_ops.engine(device)
            done = _stored(part.run_eager(), into) if by is None else device_ops.combine(
                part, by, into
            )  # fmt: skip
            results.update(zip(rows, done, strict=True))
        return [results[row] for row in range(self.rows)]

    def part(self, rows: list[int]) -> Call:
        """The call for some of the rows."""

        def of(entries: Sequence[Any]) -> list[Any]:
            return [entry for row in rows for entry in entries[self.row(row)]]

        return replace(
            self,
            bases=[self.bases[row] for row in rows] if self.bases else [],
            tensors=of(self.tensors),
            weights=of(self.weights),
            densities=of(self.densities),
            gammas=of(self.gammas),
            epsilons=of(self.epsilons),
            keys=of(self.keys),
            thresholds=of(self.thresholds),
        )

    def run_fake(self) -> list[Tensor]:
        firsts = map(self.first, range(self.rows))
        return [
            torch.empty(first.shape, dtype=self.out_dtype or first.dtype, device=first.device)
            for first in firsts
        ]

    def run_on(self, backend: str, outs: Sequence[Tensor] | None = None) -> list[Tensor]:
        for tensor in (*self.bases, *self.tensors):
            check_backend(backend, tensor.device.type)
        if backend == "eager":
            return _stored(self.run_eager(), outs)
        if backend == "native":
            core = require_native(backend, "cpu")
            if not native_ops.takes(self):
                raise ValueError(
                    f"backend='native' takes at most {native_ops.MOST_MODELS} models, no "
                    "policy.rescale='l1' with policy.trim_scope='model', and no magprune with "
                    f"rescale='keep_rate' on rows of more than {LONGEST_SCALED_ROW} elements; "
                    "leave backend out"
                )
            return native_ops.combine(core, self, outs)
        if not device_ops.takes(self):
            raise ValueError(
                f"backend={backend!r} takes at most {device_ops.MOST_MODELS} models, no "
                "policy.rescale='l1' with policy.trim_scope='model', and no policy.sparsify="
                "'band' or 'magprune'; leave backend out"
            )
        return device_ops.combine(self, device_ops.require(backend, self.first(0).device), outs)

    def check_in_place(self) -> None:
        """Raise ValueError unless each base may be written while its row is read."""
        if not self.bases:
            raise ValueError(
                "base must be given in place, with policy.difference=True: the result replaces it"
            )
        spans = []
        for row, base in enumerate(self.bases):
            label = "base" if self.rows == 1 else f"base of row {row}"
            if torch._debug_has_internal_overlap(base) == 1:
                raise ValueError(
                    f"{label} must not overlap itself to be written in place (an expanded "
                    "tensor?); give a copy of it"
                )
            spans.append((*_span(base), True, label))
            for k, tensor in enumerate(self.tensors[self.row(row)]):
                name = f"tensors[{k}]" + ("" if self.rows == 1 else f" of row {row}")
                spans.append((*_span(tensor), False, name))
        furthest: list[tuple[Any, ...] | None] = [None, None]  # of all spans; of the written ones
        for span in sorted(span for span in spans if span[1] < span[2]):
            device, start, end, written, label = span
            for before in furthest if written else furthest[1:]:
                if before is not None and before[0] == device and before[2] > start:
                    raise ValueError(
                        f"{label} must not overlap {before[4]} in memory, because a base is "
                        "written in place; give a copy of it, or use the form that returns a tensor"
                    )
            for kind in (0, 1) if written else (0,):
                known = furthest[kind]
                if known is None or known[0] != device or known[2] < end:
                    furthest[kind] = span


def _span(tensor: Tensor) -> tuple[str, int, int]:
    """(device, start, end): the addresses that a tensor occupies."""
    start = tensor.data_ptr()
    if not tensor.numel():
        return str(tensor.device), start, start
    extent = 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return str(tensor.device), start, start + extent * tensor.element_size()


def _stored(results: list[Tensor], outs: Sequence[Tensor] | None) -> list[Tensor]:
    if outs is None:
        return results
    for out, result in zip(outs, results, strict=True):
        out.copy_(result)
    return list(outs)


# The schemas. A policy travels as its fields, so that a graph shows what it computes. Neither op
# has a gradient: calling backward through one raises, because a merge is made of finished models.

_POLICY_FIELDS = tuple(field.name for field in fields(Policy))
_COMMON_SCHEMA = (
    "float[] weights, float[] densities, float[] gammas, float[] epsilons, int[] keys, "
    "int[] thresholds, "
    + ", ".join(f"{'bool' if name == 'difference' else 'str'} {name}" for name in _POLICY_FIELDS)
    + ", float lam, ScalarType? out_dtype"
)


def _call(bases: Sequence[Tensor], tensors: Sequence[Tensor], models: int, *rest: Any) -> Call:
    weights, densities, gammas, epsilons, keys, thresholds, *choices, lam, out_dtype = rest
    call = Call(
        bases=bases,
        tensors=tensors,
        models=models,
        weights=weights,
        densities=densities,
        gammas=gammas,
        epsilons=epsilons,
        keys=keys,
        thresholds=thresholds,
        policy=Policy(**dict(zip(_POLICY_FIELDS, choices, strict=True))),
        lam=lam,
        out_dtype=out_dtype,
    )
    call.check()
    return call


def _call_one(base: Tensor | None, tensors: Sequence[Tensor], *rest: Any) -> Call:
    return _call([] if base is None else [base], tensors, len(tensors), *rest)


def _combine(*args: Any) -> Tensor:
    return _call_one(*args).run_eager()[0]


def _combine_cpu(*args: Any) -> Tensor:
    return _call_one(*args).run_cpu()[0]


def _combine_cuda(*args: Any) -> Tensor:
    return _call_one(*args).run_device()[0]


def _combine_fake(*args: Any) -> Tensor:
    return _call_one(*args).run_fake()[0]


def _combine_many(*args: Any) -> list[Tensor]:
    return _call(*args).run_eager()


def _combine_many_cpu(*args: Any) -> list[Tensor]:
    return _call(*args).run_cpu()


def _combine_many_cuda(*args: Any) -> list[Tensor]:
    return _call(*args).run_device()


def _combine_many_fake(*args: Any) -> list[Tensor]:
    return _call(*args).run_fake()


def _in_place(run: Callable[[Call, list[Tensor]], object]) -> Callable[..., None]:
    """The in-place op by `run`, which writes contiguous tensors."""

    def op(*args: Any) -> None:
        call = _call(*args, None)
        call.check_in_place()
        outs = [base if base.is_contiguous() else torch.empty_like(base).contiguous()
                for base in call.bases]  # fmt: skip
        run(call, outs)
        for base, out in zip(call.bases, outs, strict=True):
            if out is not base:
                base.copy_(out)

    return op


def _combine_many_in_place_fake(*args: Any) -> None:
    _call(*args, None)


_op = torch.library.custom_op(
    "cl_fast::combine",
    _combine,
    mutates_args=(),
    schema=f"(Tensor? base, Tensor[] tensors, {_COMMON_SCHEMA}) -> Tensor",
)
_op.register_kernel("cpu")(_combine_cpu)
_op.register_kernel("cuda")(_combine_cuda)
_op.register_fake(_combine_fake)

_many_op = torch.library.custom_op(
    "cl_fast::combine_many",
    _combine_many,
    mutates_args=(),
    schema=f"(Tensor[] bases, Tensor[] tensors, int models, {_COMMON_SCHEMA}) -> Tensor[]",
)
_many_op.register_kernel("cpu")(_combine_many_cpu)
_many_op.register_kernel("cuda")(_combine_many_cuda)
_many_op.register_fake(_combine_many_fake)

_in_place_op = torch.library.custom_op(
    "cl_fast::combine_many_",
    _in_place(lambda call, outs: _stored(call.run_eager(), outs)),
    mutates_args=("bases",),
    schema="(Tensor(a!)[] bases, Tensor[] tensors, int models, "
    + _COMMON_SCHEMA.removesuffix(", ScalarType? out_dtype")
    + ") -> ()",
)
_in_place_op.register_kernel("cpu")(_in_place(lambda call, outs: call.run_cpu(outs)))
_in_place_op.register_kernel("cuda")(_in_place(lambda call, outs: call.run_device(outs)))
_in_place_op.register_fake(_combine_many_in_place_fake)


def _numbers(argument: str, value: Any, rows: int, models: int, default: Any = None) -> list[Any]:
    """`value` for every entry of rows x models: a number, one per model, or one list per row."""
    if value is None:
        value = default
    if isinstance(value, (bool, str)) or not isinstance(value, (Real, Sequence)):
        raise TypeError(
            f"{argument} must hold numbers, one or a list with one per model; got "
            f"{type(value).__name__}"
        )
    if isinstance(value, Real):
        return [value] * (rows * models)
    listed = list(value)
    nested = bool(listed) and isinstance(listed[0], (list, tuple))
    if nested and len(listed) != rows:
        raise ValueError(f"{argument} must have one list per tensor, {rows}; got {len(listed)}")
    flat: list[Any] = []
    for entries in listed if nested else [listed]:
        if len(entries) != models:
            raise ValueError(
                f"{argument} must have one entry per model, {models}; got {len(entries)}"
            )
        for entry in entries:
            if isinstance(entry, bool) or not isinstance(entry, Real):
                raise TypeError(f"{argument} must hold numbers, got {type(entry).__name__}")
        flat += entries
    return flat if nested else flat * rows


def _code(code: Any) -> int:
    """A magnitude code as `model_thresholds` gives it: the bits of a float32, or -1."""
    if not isinstance(code, int):
        raise TypeError(
            f"thresholds must hold the integer codes of model_thresholds, got {type(code).__name__}"
        )
    if not -1 <= code <= 0x7FFFFFFF:
        raise ValueError(f"thresholds must be -1 or in [0, 2^31), got {code}")
    return code


def _arguments(
    rows: int,
    models: int,
    weights: Any,
    policy: Policy,
    density: Any,
    gamma: Any,
    epsilon: Any,
    keys: Any,
    thresholds: Any,
    lam: float,
    out_dtype: torch.dtype | None,
) -> list[Any]:
    """What follows the tensors in both schemas."""
    if not isinstance(policy, Policy):
        raise TypeError(f"policy must be a cl_fast.ops.Policy, got {type(policy).__name__}")
    if density is None and policy.sparsify != "none":
        raise ValueError(
            f"density must be given with policy.sparsify={policy.sparsify!r}: the fraction to keep"
        )
    for argument, value, user in (("gamma", gamma, "band"), ("epsilon", epsilon, "magprune")):
        if value is not None and policy.sparsify != user:
            raise ValueError(
                f"{argument} has no effect with policy.sparsify={policy.sparsify!r}; leave it out"
            )
        if value is None and policy.sparsify == user:
            raise ValueError(f"{argument} must be given with policy.sparsify={user!r}")
    random = policy.sparsify in ("drop", "magprune")
    if keys is not None and not random:
        raise ValueError(f"keys have no effect with policy.sparsify={policy.sparsify!r}")
    if keys is None and random:
        raise ValueError(
            f"keys must be given for policy.sparsify={policy.sparsify!r}; see stream_key"
        )
    if thresholds is not None and (policy.sparsify, policy.trim_scope) != ("trim", "model"):
        raise ValueError("thresholds have no effect without policy.trim_scope='model'")
    for key in keys or ():
        for entry in key if isinstance(key, (list, tuple)) else (key,):
            if not isinstance(entry, int) or not -(1 << 63) <= entry < 1 << 64:
                raise ValueError(f"keys must be 64-bit integers, got {entry!r}")
    return [
        [float(weight) for weight in _numbers("weights", weights, rows, models)],
        [float(share) for share in _numbers("density", density, rows, models, default=1.0)],
        [float(share) for share in _numbers("gamma", gamma, rows, models, default=0.0)],
        [float(half) for half in _numbers("epsilon", epsilon, rows, models, default=0.0)],
        [signed_key(key) for key in _numbers("keys", keys, rows, models, default=0)],
        [_code(code) for code in _numbers("thresholds", thresholds, rows, models, default=-1)],
        *(getattr(policy, name) for name in _POLICY_FIELDS),
        float(lam),
        out_dtype,
    ]


def combine(
    base: Tensor | None,
    tensors: Sequence[Tensor | PackedDelta],
    *,
    weights: float | Sequence[float],
    policy: Policy | None = None,
    density: float | Sequence[float] | None = None,
    gamma: float | Sequence[float] | None = None,
    epsilon: float | Sequence[float] | None = None,
    keys: Sequence[int] | None = None,
    thresholds: Sequence[int] | None = None,
    lam: float = 1.0,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Combine K finetuned tensors with their base in one pass; the formula is in this module.

    Args:
        base: the base tensor, any shape; None with `Policy(difference=False)`.
        tensors: K >= 1 tensors of the shape and device of `base`. bfloat16, float16, float32 and
            eight-bit floats in any mixture, contiguous or not. A `PackedDelta` may stand for a
            tensor with `Policy(sparsify="drop")`; it brings its density, key and rescale factor,
            so `density` and `keys` are left out, and dense tensors beside it are not dropped.
        weights: one per model, or one for all.
        policy: the variants of the steps; the default is Task Arithmetic.
        density: the fraction of a delta to keep, in (0, 1]: one per model, or one for all. To be
            given where something is sparsified, and only there.
        gamma: the fraction of largest magnitudes to drop, in [0, 1], for sparsify="band".
        epsilon: half the range of the keep probabilities, for sparsify="magprune", where
            density - epsilon must be above 0 and density + epsilon at most 1. Rows are the last
            dimension.
        keys: one stream key per model (`stream_key(seed, model, tensor)`), for sparsify="drop" and
            "magprune".
        thresholds: one magnitude code per model (`model_thresholds`) for a trim over more tensors
            than this one, beside the density that they were found for; without,
            trim_scope="model" takes this tensor for the whole model.
        lam: the factor on the combined delta.
        out_dtype: bfloat16, float16 or float32; the default is the dtype of `base`, without base
            that of `tensors[0]`.
        backend: "eager", "native", "triton" or "cuda", for tests and benchmarks; otherwise the
            fastest there is.

    Returns:
        A new contiguous tensor. NaN and infinity in the inputs reach the elements that they take
        part in, and the whole tensor only through rescale="l1".

    Raises:
        TypeError: a dtype that cannot be read or written; an argument of another type.
        ValueError: shapes or devices differ, a number out of range, an argument without effect.
        RuntimeError: on `backward`: the op has no gradient.
    """
    if not isinstance(tensors, Tensor) and not all(isinstance(x, Tensor) for x in tensors):
        from cl_fast.ops.packing import PackedDelta, combine_packed

        if any(isinstance(tensor, PackedDelta) for tensor in tensors):
            _refuse_beside_packed(
                density=(density, None), gamma=(gamma, None), epsilon=(epsilon, None),
                keys=(keys, None), thresholds=(thresholds, None),
            )  # fmt: skip
            return combine_packed(
                base, tensors, weights=weights, policy=policy, lam=lam, out_dtype=out_dtype,
                backend=backend,
            )  # fmt: skip
    tensors = _listed("tensors", tensors)
    policy = Policy() if policy is None else policy
    rest = _arguments(
        1, len(tensors), weights, policy, density, gamma, epsilon, keys, thresholds, lam, out_dtype
    )
    if backend is None:
        return cast(Tensor, _op(base, tensors, *rest))
    return _call_one(base, tensors, *rest).run_on(backend)[0]


def combine_many(
    bases: Sequence[Tensor] | None,
    tensors: Sequence[Sequence[Tensor | PackedDelta]],
    *,
    weights: float | Sequence[float] | Sequence[Sequence[float]],
    policy: Policy | None = None,
    density: float | Sequence[float] | Sequence[Sequence[float]] | None = None,
    gamma: float | Sequence[float] | Sequence[Sequence[float]] | None = None,
    epsilon: float | Sequence[float] | Sequence[Sequence[float]] | None = None,
    keys: Sequence[Sequence[int]] | None = None,
    lam: float = 1.0,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """`combine` for all tensors of a model in one call.

    With trim_scope="model" all tensors of a model compete for the kept places together; the
    density is then one number per model.

    Args:
        bases: one base per tensor of the model; None with `Policy(difference=False)`.
        tensors: for each tensor of the model the list of its K versions; packed ones as in
            `combine`.
        weights, density, gamma, epsilon: one number; one per model; or for each tensor one per
            model.
        keys: for each tensor one stream key per model.
        policy, lam, out_dtype, backend: as in `combine`.

    Returns:
        One new tensor per entry of `tensors`.

    Raises:
        As `combine`; the words name the row.
    """
    if any(not isinstance(x, Tensor) for row in tensors for x in row):
        from cl_fast.ops.packing import PackedDelta, combine_packed_many

        if any(isinstance(x, PackedDelta) for row in tensors for x in row):
            _refuse_beside_packed(
                density=(density, None), gamma=(gamma, None), epsilon=(epsilon, None),
                keys=(keys, None),
            )  # fmt: skip
            return combine_packed_many(
                bases, tensors, weights=weights, policy=policy, lam=lam, out_dtype=out_dtype,
                backend=backend,
            )  # fmt: skip
    rows, models, policy, rest = _many_arguments(
        tensors, weights, policy, density, gamma, epsilon, keys, lam, out_dtype
    )
    flat = [tensor for row in rows for tensor in row]
    listed = [] if bases is None else list(bases)
    if backend is None:
        return cast("list[Tensor]", _many_op(listed, flat, models, *rest))
    return _call(listed, flat, models, *rest).run_on(backend)


def _refuse_beside_packed(**arguments: tuple[Any, Any]) -> None:
    for argument, (value, left_out) in arguments.items():
        if value is not left_out and value != left_out:
            raise ValueError(
                f"{argument} has no effect where tensors holds a PackedDelta; leave it out"
            )


def combine_(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    weights: float | Sequence[float],
    policy: Policy | None = None,
    density: float | Sequence[float] | None = None,
    gamma: float | Sequence[float] | None = None,
    epsilon: float | Sequence[float] | None = None,
    keys: Sequence[int] | None = None,
    lam: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """`combine`, its result written over `base`. Returns `base`.

    Raises:
        As `combine`; ValueError too if `base` shares memory with one of `tensors`.
    """
    one_each = None if keys is None else [keys]
    combine_many_([base], [tensors], weights=weights, policy=policy, density=density, gamma=gamma,
                  epsilon=epsilon, keys=one_each, lam=lam, backend=backend)  # fmt: skip
    return base


def combine_many_(
    bases: Sequence[Tensor],
    tensors: Sequence[Sequence[Tensor]],
    *,
    weights: float | Sequence[float] | Sequence[Sequence[float]],
    policy: Policy | None = None,
    density: float | Sequence[float] | Sequence[Sequence[float]] | None = None,
    gamma: float | Sequence[float] | Sequence[Sequence[float]] | None = None,
    epsilon: float | Sequence[float] | Sequence[Sequence[float]] | None = None,
    keys: Sequence[Sequence[int]] | None = None,
    lam: float = 1.0,
    backend: str | None = None,
) -> None:
    """`combine_many`, each result written over its base: no second model in memory.

    Args:
        bases: one per entry of `tensors`, bfloat16, float16 or float32; contiguous or not.
        tensors, weights, policy, density, gamma, epsilon, keys, lam, backend: as in
            `combine_many`.

    Raises:
        As `combine_many`; ValueError too if a base shares memory with another tensor of the call.
    """
    rows, models, policy, rest = _many_arguments(
        tensors, weights, policy, density, gamma, epsilon, keys, lam, None
    )
    flat = [tensor for row in rows for tensor in row]
    listed = _listed("bases", bases)
    if torch.is_grad_enabled() and any(base.requires_grad for base in listed):
        raise ValueError(
            "a base that requires grad cannot be written in place, since autograd would not know; "
            "call this under torch.no_grad()"
        )
    if backend is None:
        _in_place_op(listed, flat, models, *rest[:-1])
    else:
        chosen = backend
        _in_place(lambda call, outs: call.run_on(chosen, outs))(listed, flat, models, *rest[:-1])


def _many_arguments(
    tensors: Sequence[Sequence[Any]],
    weights: Any,
    policy: Policy | None,
    density: Any,
    gamma: Any,
    epsilon: Any,
    keys: Any,
    lam: float,
    out_dtype: torch.dtype | None,
) -> tuple[list[list[Tensor]], int, Policy, list[Any]]:
    rows = [_listed("tensors", row) for row in tensors]
    models = len(rows[0]) if rows else 0
    for number, row in enumerate(rows):
        if len(row) != models:
            raise ValueError(
                f"tensors must hold the same number of models in each row; row 0 has {models}, "
                f"row {number} has {len(row)}"
            )
    policy = Policy() if policy is None else policy
    rest = _arguments(
        len(rows), models, weights, policy, density, gamma, epsilon, keys, None, lam, out_dtype
    )
    return rows, models, policy, rest


def _listed(argument: str, tensors: Sequence[Any]) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        raise TypeError(f"{argument} must be a list of tensors, one per model, got one tensor")
    listed = list(tensors)
    if not listed:
        raise ValueError(f"{argument} must hold at least one tensor")
    for k, tensor in enumerate(listed):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{argument}[{k}] must be a torch.Tensor, got {type(tensor).__name__}")
    return listed
