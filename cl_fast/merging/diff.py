"""What models changed of their base, and how far they agree: for looking at a merge.

    d_k = x_k - b                       the task vector of model k, tensor by tensor
    ||d_k|| / ||b||                     relative change; L2, L1 and the largest element
    <d_i, d_j> / (||d_i|| ||d_j||)      cosine of two task vectors
    sgn d_i = -sgn d_j != 0             a sign conflict of two models

All of it comes from one read of the files (`cl_fast.merging.survey`), and is told per tensor, per
layer, per kind of module, for each kind in each layer, and for the whole model. `compare` gives a
`Comparison`; its `to_dict` is what the JSON file holds, `cl_fast.merging.diff_page` makes the page.

Sign conflicts and trimming: TIES, arXiv:2306.01708. Task vectors: arXiv:2212.04089.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isinf, sqrt
from typing import TYPE_CHECKING, Any

from cl_fast._version import __version__
from cl_fast.checkpoints.checkpoint import Checkpoint
from cl_fast.errors import CheckpointError
from cl_fast.merging.inputs import Derived, base_and_change, is_derived, resolve, source_of
from cl_fast.merging.matching import natural_key
from cl_fast.merging.places import KINDS, Place, place_of
from cl_fast.merging.references import term_names
from cl_fast.merging.sources import Packed, Source
from cl_fast.merging.survey import Sums, Surveyed, bin_edge, pair_index, survey

if TYPE_CHECKING:
    from types import ModuleType

__all__ = [
    "MOST_MODELS",
    "TRIM_DENSITY",
    "VERSION",
    "BaseStatistics",
    "Comparison",
    "Group",
    "LeftOut",
    "ModelStatistics",
    "MovedRow",
    "Outlier",
    "Statistics",
    "compare",
]

VERSION = 1
"""Of the JSON's schema; docs/diff.md describes it."""
MOST_MODELS = 16
"""More models than this are an error: no page of pairs could be read."""
TRIM_DENSITY = 0.2
"""The density of the model-wide trim whose kept shares are told."""

_FLOATS = ("BF16", "F16", "F32", "F8_E4M3", "F8_E5M2")
_LISTED = 20  # rows and outliers that are told of the whole model
_PAIRS_TOLD, _TENSORS_TOLD = 6, 3
_BINS_PER_OCTAVE = 8
_INFINITE = 0x7F800000 >> 20  # the first bin of what is not finite

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseStatistics:
    """Of the base's weights b: norms, root mean square, largest |b| / rms, NaN and infinities."""

    l2: float
    l1: float
    max: float
    rms: float
    outlier: float | None
    nonfinite: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatistics:
    """Of one model's delta d and weights x. None: a division by nothing.

    Attributes:
        l2, l1, max: norms of d.
        relative_l2, relative_l1, relative_max: the same over that of the base.
        changed, changed_share: elements with d != 0.
        kept, kept_share: elements that stay of d when the largest 20 % of the model's are kept;
            estimated from the sampled magnitudes.
        weight_l2, weight_max, weight_outlier: ||x||, max |x|, and max |x| over its rms.
        nonfinite: NaN and infinite elements of x.
    """

    l2: float
    l1: float
    max: float
    relative_l2: float | None
    relative_l1: float | None
    relative_max: float | None
    changed: int
    changed_share: float
    kept: float
    kept_share: float
    weight_l2: float
    weight_max: float
    weight_outlier: float | None
    nonfinite: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Of one tensor, or of several as if they were one.

    Attributes:
        elements: how many there are, per model.
        cosine: of each two task vectors; None where one of them is zero.
        overlap: share of elements that both of two models change; its diagonal is `changed_share`.
        conflict: share of elements that two models change with unlike signs.
        conflicts, conflict_share: elements on which any two models have unlike signs.
        shared: elements that two or more models change.
    """

    elements: int
    base: BaseStatistics
    models: tuple[ModelStatistics, ...]
    cosine: tuple[tuple[float | None, ...], ...]
    overlap: tuple[tuple[float, ...], ...]
    conflict: tuple[tuple[float, ...], ...]
    conflicts: int
    conflict_share: float
    shared: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        found = _fields(self)
        found["base"] = _fields(self.base)
        found["models"] = [_fields(model) for model in self.models]
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A tensor, or tensors that stand in one place.

    Attributes:
        name: of the tensor; of the layer ("model.layers.3"); a kind; "" for the whole model.
        layer: name of the layer, "" outside the layers or where there are several.
        kind: a key of `places.KINDS`, "" where there are several.
        shape, dtype: of a tensor in the base; None of groups.
    """

    name: str
    layer: str
    kind: str
    shape: tuple[int, ...] | None
    dtype: str | None
    statistics: Statistics

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        found: dict[str, Any] = {"name": self.name, "layer": self.layer, "kind": self.kind}
        if self.shape is not None:
            found |= {"shape": list(self.shape), "dtype": self.dtype}
        return found | self.statistics.to_dict()


@dataclass(frozen=True, slots=True, kw_only=True)
class MovedRow:
    """A row of a tensor, and how far a model moved it. index: without the last dimension."""

    model: str
    tensor: str
    index: tuple[int, ...]
    l2: float
    base_l2: float
    relative_l2: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlier:
    """The largest weight of a tensor. model: "base" or a model; ratio: |value| over the rms."""

    model: str
    tensor: str
    index: tuple[int, ...]
    magnitude: float
    ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A tensor that was not compared, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A base and its models, compared.

    Attributes:
        base: the base's reference.
        models: names of the models, unique; references: what they were opened from.
        tensors, layers, kinds, cells, whole: the same statistics of ever more tensors; a cell is
            one kind in one layer. Outside the layers a cell is all tensors of a kind.
        edges: of the bins of |d|, powers of two; the first is the smallest magnitude of the first.
        histogram: per model, elements in each bin; estimated from the sample.
        thresholds: per model, the magnitude above which the largest 20 % of its delta lie.
        sampled: elements per model that the histogram was counted on.
        rows, outliers: the rows that moved farthest; the largest weights for their tensor.
        left_out: tensors that were not compared.
    """

    base: str
    models: tuple[str, ...]
    references: tuple[str, ...]
    tensors: tuple[Group, ...]
    layers: tuple[Group, ...]
    kinds: tuple[Group, ...]
    cells: tuple[Group, ...]
    whole: Group
    edges: tuple[float, ...]
    histogram: tuple[tuple[float, ...], ...]
    thresholds: tuple[float, ...]
    sampled: int
    rows: tuple[MovedRow, ...]
    outliers: tuple[Outlier, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def nonfinite(self) -> int:
        """NaN and infinite elements in all inputs."""
        whole = self.whole.statistics
        return whole.base.nonfinite + sum(model.nonfinite for model in whole.models)

    def lines(self) -> list[str]:
        """The comparison in a few lines, for a terminal."""
        whole, names = self.whole.statistics, self.models
        listed = [f"base    {self.base}: {len(self.tensors)} tensors, {whole.elements:,} elements"]
        for name, model in zip(names, whole.models, strict=True):
            listed.append(
                f"model   {name}: relative L2 change {_words(model.relative_l2)}, "
                f"{_words(model.changed_share)} of the elements changed, largest {model.max:.3g}"
            )
        pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
        for i, j in pairs[:_PAIRS_TOLD]:
            cosine = whole.cosine[i][j]
            listed.append(
                f"pair    {names[i]}, {names[j]}: cosine "
                f"{'none' if cosine is None else f'{cosine:+.3f}'}, signs in conflict on "
                f"{_words(whole.conflict[i][j])} of the elements"
            )
        if len(pairs) > _PAIRS_TOLD:
            listed.append(f"        and {len(pairs) - _PAIRS_TOLD} more pairs")
        moved = [
            (model.relative_l2, -i, name)
            for i, group in enumerate(self.tensors)
            for name, model in zip(names, group.statistics.models, strict=True)
            if model.relative_l2
        ]
        for relative, i, name in sorted(moved, reverse=True)[:_TENSORS_TOLD]:
            listed.append(f"tensor  {self.tensors[-i].name}: {_words(relative)} in {name}")
        if self.nonfinite:
            listed.append(f"note    {self.nonfinite} NaN or infinite elements count as unchanged")
        for tensor in self.left_out[:_TENSORS_TOLD]:
            listed.append(f"note    {tensor.name} is not compared: {tensor.reason}")
        if len(self.left_out) > _TENSORS_TOLD:
            more = len(self.left_out) - _TENSORS_TOLD
            listed.append(f"note    and {more} more tensors are not compared")
        return listed

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; docs/diff.md describes the schema."""
        return {
            "format": "cl_fast.diff",
            "version": VERSION,
            "cl_fast": __version__,
            "base": self.base,
            "models": [
                {"name": name, "reference": reference}
                for name, reference in zip(self.models, self.references, strict=True)
            ],
            "whole": self.whole.to_dict(),
            "layers": [group.to_dict() for group in self.layers],
            "kinds": [group.to_dict() for group in self.kinds],
            "cells": [group.to_dict() for group in self.cells],
            "tensors": [group.to_dict() for group in self.tensors],
            "histogram": {
                "edges": list(self.edges),
                "counts": [list(counts) for counts in self.histogram],
                "sampled": self.sampled,
            },
            "trim": {"density": TRIM_DENSITY, "thresholds": list(self.thresholds)},
            "rows": [_fields(row) for row in self.rows],
            "outliers": [_fields(outlier) for outlier in self.outliers],
            "left_out": [_fields(tensor) for tensor in self.left_out],
        }

    def to_json(self) -> str:
        """One line; NaN and infinity do not occur in it."""
        return json.dumps(self.to_dict(), allow_nan=False, separators=(",", ":")) + "\n"


def _words(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.3g} %"


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__slots__}


# -------------------------------------------------------------------------------------- comparing


def compare(
    base: str | os.PathLike[str] | Checkpoint,
    models: Sequence[str | os.PathLike[str] | Checkpoint],
    *,
    threads: int | None = None,
    io: str = "auto",
    backend: str | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compares models with their base, in one read of all of them.

    Args:
        base: a checkpoint folder or .safetensors file.
        models: likewise, 1 to 16; or changes of the base, such as an edit patch.
        threads: None: the cores of this process. The result is the same for any number.
        io: "auto" (the page cache), "mmap", "pread", "direct"; of the core.
        backend: "native", "eager" or None for the core where it is. Counts are the same, sums
            differ in their last bits.
        progress: called with "compare", bytes read, bytes in all.

    Raises:
        CheckpointError: an input is missing, damaged, quantised, not a model, or has no floating
            tensor in common with the base. Tensors that only some have, or in another shape, are
            left out and listed in `left_out`.
        ValueError: no model, more than 16, or an argument out of its range.
    """
    from cl_fast.backends import native_or_say

    if isinstance(models, str | os.PathLike | Checkpoint):
        raise TypeError(f"models must be a list of models; got {models!r}")
    if not 1 <= len(models) <= MOST_MODELS:
        raise ValueError(
            f"models must be 1 to {MOST_MODELS} models; got {len(models)}; compare a part of them"
        )
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1; got {threads}")
    if io not in ("auto", "mmap", "pread", "direct"):
        raise ValueError(f"io must be one of auto, mmap, pread, direct; got {io!r}")
    if backend not in (None, "native", "eager"):
        raise ValueError(f"backend must be 'native', 'eager' or None; got {backend!r}")
    core = None if backend == "eager" else native_or_say()
    if core is None and backend == "native":
        from cl_fast.backends import native

        raise ValueError(f"backend 'native' is not available: {native.reason()}")
    if core is None and io not in ("auto", "pread"):
        raise ValueError(f"io={io!r} needs the C++ core; the eager reference reads with pread")
    opened = _open(base, models)
    tensors, left_out = _common(opened)
    for checkpoint in opened:
        if isinstance(checkpoint, Derived):
            checkpoint.check()
    size = sum(source.stored for tensor in tensors for source in tensor.sources)
    done = 0

    def tick(moved: int) -> None:
        nonlocal done
        done += moved
        if progress is not None:
            progress("compare", done, size)

    names = term_names([checkpoint.reference for checkpoint in opened[1:]])
    sums = _surveyed(core, tensors, threads, io, tick)
    return _Whole(opened, names, tensors, sums).comparison(left_out)


def _surveyed(
    core: ModuleType | None,
    tensors: Sequence[Surveyed],
    threads: int | None,
    io: str,
    tick: Callable[[int], None],
) -> list[Sums]:
    return survey(tensors, core=core, threads=threads, io="mmap" if io == "auto" else io, tick=tick)


def _open(
    base: str | os.PathLike[str] | Checkpoint,
    models: Sequence[str | os.PathLike[str] | Checkpoint],
) -> list[Checkpoint]:
    def opened(reference: str | os.PathLike[str] | Checkpoint, key: str) -> Checkpoint:
        if isinstance(reference, Checkpoint):
            return reference
        text = os.fspath(reference)
        parts = base_and_change(text)
        opener = None if parts is not None else is_derived(text)
        if parts is not None:  # a change on a base of its own
            change = is_derived(parts[1])
            assert change is not None
            below = opened(parts[0], key)
            return change.open(below, resolve(parts[1]), key=key).alone(text)
        if opener is not None:
            if key == "base":
                raise CheckpointError(
                    f"base: {text!r} is {opener.noun}, which is a change of a model and not one; "
                    "name the checkpoint that it changes"
                )
            return opener.open(listed[0], resolve(text), key=key)
        checkpoint = Checkpoint.open(resolve(text), key=key)
        checkpoint.refuse_quantised()
        return checkpoint

    listed = [opened(base, "base")]
    for i, model in enumerate(models):
        listed.append(opened(model, f"models[{i}]"))
    return [entry.dense() if isinstance(entry, Derived) else entry for entry in listed]


def _common(inputs: Sequence[Checkpoint]) -> tuple[list[Surveyed], tuple[LeftOut, ...]]:
    """The floating tensors that all have in one shape, in natural order; and the others."""
    base = inputs[0]
    every = dict.fromkeys(name for checkpoint in inputs for name in checkpoint.tensors)
    tensors: list[Surveyed] = []
    left_out: list[LeftOut] = []
    for name in sorted(every, key=natural_key):
        lacking = [c.reference for c in inputs if name not in c.tensors]
        if lacking:
            left_out.append(LeftOut(name=name, reason=f"absent from {', '.join(lacking)}"))
            continue
        infos = [checkpoint.tensors[name] for checkpoint in inputs]
        shape = infos[0].shape
        unlike = [
            f"{list(info.shape)} in {checkpoint.reference}"
            for checkpoint, info in zip(inputs, infos, strict=True)
            if info.shape != shape
        ]
        dtypes = dict.fromkeys(info.dtype for info in infos if info.dtype not in _FLOATS)
        if unlike:
            reason = f"{list(shape)} in {base.reference}, {', '.join(unlike)}"
            left_out.append(LeftOut(name=name, reason=reason))
        elif dtypes:
            reason = f"stored as {', '.join(dtypes)}; {', '.join(_FLOATS)} are compared"
            left_out.append(LeftOut(name=name, reason=reason))
        else:
            sources = tuple(_source(checkpoint, name) for checkpoint in inputs)
            tensors.append(Surveyed(name, shape, sources))
    if not any(tensor.numel for tensor in tensors):
        few = "; ".join(f"{tensor.name}: {tensor.reason}" for tensor in left_out[:3])
        raise CheckpointError(
            f"{base.reference} and {', '.join(c.reference for c in inputs[1:])} have no floating "
            f"tensor in common{f' ({few})' if few else ''}; compare models of one architecture"
        )
    return tensors, tuple(left_out)


def _source(checkpoint: Checkpoint, name: str) -> Source:
    """Where the weights of an input come from; of a packed delta the model that it makes."""
    source = source_of(checkpoint, name)
    return source.as_model() if isinstance(source, Packed) else source


class _Whole:
    """The sums of all tensors, on the way to their statistics."""

    def __init__(
        self,
        inputs: Sequence[Checkpoint],
        names: tuple[str, ...],
        tensors: Sequence[Surveyed],
        sums: Sequence[Sums],
    ) -> None:
        self._inputs, self._names = inputs, names
        self._tensors, self._sums = tensors, sums
        self._k = len(names)
        self._places = [place_of(tensor.name) for tensor in tensors]
        self._totals = [self._magnitudes(k) for k in range(self._k)]
        elements = sum(tensor.numel for tensor in tensors)
        self._cuts = [_cut(totals, TRIM_DENSITY * elements) for totals in self._totals]
        self._kept = [
            [_above(*self._scaled(one, k), self._cuts[k]) for k in range(self._k)] for one in sums
        ]

    def comparison(self, left_out: tuple[LeftOut, ...]) -> Comparison:
        tensors = tuple(
            Group(
                name=tensor.name,
                layer=_layer(place),
                kind=place.kind,
                shape=tensor.shape,
                dtype=self._inputs[0].tensors[tensor.name].dtype,
                statistics=self._statistics([i]),
            )
            for i, (tensor, place) in enumerate(zip(self._tensors, self._places, strict=True))
        )
        layers = self._grouped(lambda place: (_layer(place), ""), lambda place: bool(place.stack))
        cells = self._grouped(lambda place: (_layer(place), place.kind), lambda _: True)
        kinds = self._grouped(lambda place: ("", place.kind), lambda _: True)
        order = list(KINDS)
        edges, histogram = self._histogram()
        return Comparison(
            base=self._inputs[0].reference,
            models=self._names,
            references=tuple(checkpoint.reference for checkpoint in self._inputs[1:]),
            tensors=tensors,
            layers=tuple(layers),
            kinds=tuple(sorted(kinds, key=lambda group: order.index(group.kind))),
            cells=tuple(cells),
            whole=Group(
                name="",
                layer="",
                kind="",
                shape=None,
                dtype=None,
                statistics=self._statistics(range(len(self._tensors))),
            ),
            edges=edges,
            histogram=histogram,
            thresholds=tuple(_threshold(cut) for cut in self._cuts),
            sampled=sum(one.sampled for one in self._sums),
            rows=self._rows(),
            outliers=self._outliers(tensors),
            left_out=left_out,
        )

    def _grouped(
        self, key: Callable[[Place], tuple[str, str]], wanted: Callable[[Place], bool]
    ) -> list[Group]:
        members: dict[tuple[str, str], list[int]] = {}
        for i, place in enumerate(self._places):
            if wanted(place):
                members.setdefault(key(place), []).append(i)
        return [
            Group(
                name=".".join(filter(None, at)),
                layer=at[0],
                kind=at[1],
                shape=None,
                dtype=None,
                statistics=self._statistics(indices),
            )
            for at, indices in members.items()
        ]

    def _statistics(self, indices: Iterable[int]) -> Statistics:
        total, kept = Sums.empty(self._k), [0.0] * self._k
        for i in indices:
            total.add(self._sums[i])
            kept = [x + y for x, y in zip(kept, self._kept[i], strict=True)]
        return _statistics(total, kept)

    # Magnitudes.

    def _scaled(self, one: Sums, k: int) -> tuple[int, list[float]]:
        """First bin and estimated elements of a tensor: as many in all as were changed."""
        first, counts = one.bins[k]
        seen = sum(counts)
        if seen:
            scale = one.changed[k] / seen
            return first, [count * scale for count in counts]
        if not one.changed[k]:
            return 0, []
        # the sample met none of the few that changed: they count at their root mean square
        square = one.products[pair_index(k + 1, k + 1, self._k + 1)] / one.changed[k]
        return _bin_of(sqrt(square)), [float(one.changed[k])]

    def _magnitudes(self, k: int) -> list[float]:
        totals = [0.0] * _INFINITE
        for one in self._sums:
            first, counts = self._scaled(one, k)
            for i, count in enumerate(counts, first):
                totals[i] += count
        return totals

    def _histogram(self) -> tuple[tuple[float, ...], tuple[tuple[float, ...], ...]]:
        octaves = [
            [sum(totals[i : i + _BINS_PER_OCTAVE]) for i in range(0, _INFINITE, _BINS_PER_OCTAVE)]
            for totals in self._totals
        ]
        filled = [i for counts in octaves for i, count in enumerate(counts) if count]
        if not filled:
            return (), tuple(() for _ in octaves)
        low, high = min(filled), max(filled) + 1
        edges = [bin_edge(i * _BINS_PER_OCTAVE) for i in range(low, high + 1)]
        if isinf(edges[-1]):
            edges[-1] = 2.0 * edges[-2]
        return tuple(edges), tuple(tuple(counts[low:high]) for counts in octaves)

    # What stands out.

    def _rows(self) -> tuple[MovedRow, ...]:
        listed = []
        for k, name in enumerate(self._names):
            found = [
                (delta, -i, -row, base)
                for i, one in enumerate(self._sums)
                for row, delta, base in one.rows[k]
            ]
            for delta, at, row, base in sorted(found, reverse=True)[:_LISTED]:
                tensor = self._tensors[-at]
                listed.append(
                    MovedRow(
                        model=name,
                        tensor=tensor.name,
                        index=_index(-row, tensor.shape[:-1]),
                        l2=sqrt(delta),
                        base_l2=sqrt(base),
                        relative_l2=_over(sqrt(delta), sqrt(base)),
                    )
                )
        return tuple(listed)

    def _outliers(self, tensors: Sequence[Group]) -> tuple[Outlier, ...]:
        found = []
        for i, group in enumerate(tensors):
            base, models = group.statistics.base, group.statistics.models
            ratios = [(base.outlier, base.max), *((m.weight_outlier, m.weight_max) for m in models)]
            for k, (ratio, magnitude) in enumerate(ratios):
                if ratio is not None and len(group.shape or ()) > 1:
                    found.append((ratio, -i, -k, magnitude))
        return tuple(
            Outlier(
                model="base" if k == 0 else self._names[-k - 1],
                tensor=tensors[-i].name,
                index=_index(self._sums[-i].largest_at[-k], self._tensors[-i].shape),
                magnitude=magnitude,
                ratio=ratio,
            )
            for ratio, i, k, magnitude in sorted(found, reverse=True)[:_LISTED]
        )


def _layer(place: Place) -> str:
    return "" if place.layer is None else f"{place.stack}.{place.layer}"


def _statistics(s: Sums, kept: Sequence[float]) -> Statistics:
    k = len(s.changed)
    n = k + 1

    def product(i: int, j: int) -> float:
        return s.products[pair_index(min(i, j), max(i, j), n)]

    def matrix(pairs: Sequence[int], diagonal: Sequence[int]) -> tuple[tuple[float, ...], ...]:
        found = [[0.0] * k for _ in range(k)]
        listed = iter(pairs)
        for i in range(k):
            found[i][i] = _share(diagonal[i], s.elements)
            for j in range(i + 1, k):
                found[i][j] = found[j][i] = _share(next(listed), s.elements)
        return tuple(tuple(row) for row in found)

    finite = max(1, s.elements - s.nonfinite[0])
    lengths = [sqrt(product(i, i)) for i in range(n)]
    rms = lengths[0] / sqrt(finite)
    models = []
    for i in range(1, n):
        # ||b + d||^2; what rounding leaves of a weight that is gone is not below zero
        weight = sqrt(max(0.0, product(0, 0) + 2.0 * product(0, i) + product(i, i)))
        own = max(1, s.elements - s.nonfinite[i])
        models.append(
            ModelStatistics(
                l2=lengths[i],
                l1=s.absolute[i],
                max=s.largest[k + i],
                relative_l2=_over(lengths[i], lengths[0]),
                relative_l1=_over(s.absolute[i], s.absolute[0]),
                relative_max=_over(s.largest[k + i], s.largest[0]),
                changed=s.changed[i - 1],
                changed_share=_share(s.changed[i - 1], s.elements),
                kept=kept[i - 1],
                kept_share=_share(kept[i - 1], s.elements),
                weight_l2=weight,
                weight_max=s.largest[i],
                weight_outlier=_over(s.largest[i], weight / sqrt(own)),
                nonfinite=s.nonfinite[i],
            )
        )
    cosine = tuple(
        tuple(
            None
            if not lengths[i] * lengths[j]
            else 1.0
            if i == j
            else max(-1.0, min(1.0, product(i, j) / (lengths[i] * lengths[j])))
            for j in range(1, n)
        )
        for i in range(1, n)
    )
    return Statistics(
        elements=s.elements,
        base=BaseStatistics(
            l2=lengths[0],
            l1=s.absolute[0],
            max=s.largest[0],
            rms=rms,
            outlier=_over(s.largest[0], rms),
            nonfinite=s.nonfinite[0],
        ),
        models=tuple(models),
        cosine=cosine,
        overlap=matrix(s.overlap, s.changed),
        conflict=matrix(s.conflicts, [0] * k),
        conflicts=s.disputed,
        conflict_share=_share(s.disputed, s.elements),
        shared=s.shared,
    )


def _share(count: float, of: int) -> float:
    return count / of if of else 0.0


def _over(x: float, y: float) -> float | None:
    return x / y if y else None


def _index(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    index: list[int] = []
    for extent in reversed(shape):
        flat, rest = divmod(flat, extent)
        index.insert(0, rest)
    return tuple(index)


def _bin_of(magnitude: float) -> int:
    """The bin of the surveys that holds a magnitude."""
    low, high = 1, _INFINITE
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bin_edge(middle) <= magnitude else (low, middle)
    return low


def _cut(totals: Sequence[float], keep: float) -> tuple[int, float]:
    """The bin in which the largest `keep` elements end, and the part of it that is kept.

    Elements are taken to lie evenly in a bin. Where fewer were changed, all of them are kept.
    """
    above = 0.0
    for i in range(len(totals) - 1, 0, -1):
        if above + totals[i] >= keep and totals[i]:
            return i, (keep - above) / totals[i]
        above += totals[i]
    return 0, 1.0


def _above(first: int, counts: Sequence[float], cut: tuple[int, float]) -> float:
    """The elements of a tensor that a cut keeps."""
    at, part = cut[0] - first, cut[1]
    kept = sum(counts[max(0, at + 1) :])
    return kept + part * counts[at] if 0 <= at < len(counts) else kept


def _threshold(cut: tuple[int, float]) -> float:
    if cut[0] == 0:
        return 0.0
    low, high = bin_edge(cut[0]), bin_edge(cut[0] + 1)
    return high - cut[1] * (high - low) if not isinf(high) else low
