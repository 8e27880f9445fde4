"""New and old data in an exact ratio, at every prefix, as one map-style dataset.

    mixture = mix(new, old, 0.05)                     5 % of all samples are old
    mixture = mix(new, {"web": web, "code": code}, {"web": 0.04, "code": 0.01})

One old source, or several that share one ratio p/q, in closed form: among the first n samples

    old(n) = floor(n p / q)            so |old(n) - n p / q| < 1, and the same for the new ones
    the o-th old sample is the (o div K)-th of source o mod K      K sources that share evenly

so sample n is old iff old(n + 1) > old(n), and sample 10^12 costs as much as the first. With K
sources c_k(n) is floor or ceil of old(n) / K, which keeps |c_k(n) - n p / (q K)| < 1 too.

Several ratios, p_s / Q over a common denominator, follow Tijdeman ("The chairman assignment
problem", Discrete Mathematics 32, 1980), in integers: of the sources that may take sample n
without getting ahead by more than M = 1 - 1 / (2S - 2), the one that would fall behind by M first.
That gives |c_s(n) - n p_s / Q| <= M < 1 for each of the S sources (new included), always. It
repeats after Q samples, so one period is kept.

By tokens (`unit="tokens"`), a sample is old iff old data is in debt:

    rho (A_i + B_j) > B_j              A_i, B_j: tokens of the i new and j old samples before
    <=>  p A_i > (q - p) B_j           so the sequence is a merge of two sorted ones

and |old tokens - rho tokens| < the longest sample, at every prefix. Several old sources take turns
by the tokens read from each over its share, the smallest first, so that each of K is less than one
longest sample ahead, and less than K of them behind. All of it is computed once from the lengths,
and kept: 4 bytes per sample, and 10 per old one.

Which sample of a source comes at its turn is an order of `cl_fast.training.permutations`, another
one in each epoch of that source, or its own order.
"""

from __future__ import annotations

import math
import operator
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl_fast.options import at_least, integer, one_of
from cl_fast.training.drawing import Draw
from cl_fast.training.keeping import Dataset

__all__ = ["Joined", "Mixture", "exact_ratio", "mix"]

Ints = NDArray[np.int64]
Unit = Literal["samples", "tokens"]
Split = Literal["even", "size"]
Length = Literal["all-new", "compute-equivalent"] | int
Lengths = str | Callable[[Any], int] | Mapping[str, Sequence[int]] | None

NEW, OLD = "new", "old"
_DENOMINATOR = 10**6
_PERIOD = 1 << 18
"""The longest period of several ratios; Tijdeman's rule takes a second or so for it."""
_BLOCK = 4096
"""Neighbouring samples whose places are found at once."""


# Ratios


def exact_ratio(value: Any, name: str = "ratio") -> Fraction:
    """A number as the fraction that was meant: 0.05 is 1/20.

    Floats become the nearest fraction with a denominator of at most 10**6, which must be within
    1e-9 of them, relatively; a Fraction stays as it is.

    Raises:
        TypeError: not a number.
        ValueError: not in [0, 1), or no such fraction is near.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Fraction):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not 0 <= value < 1:  # also NaN
        raise ValueError(f"{name} must lie in [0, 1): the part that is old; got {value}")
    if isinstance(value, Fraction):
        return value
    near = Fraction(value).limit_denominator(_DENOMINATOR)
    if abs(near - Fraction(value)) > Fraction(value) / 10**9:
        raise ValueError(
            f"{name} {value!r} is near no fraction with a denominator of up to 10**6, so that it "
            "could not be held exactly: round it, or give a fractions.Fraction"
        )
    return near


# Rules: which source a position belongs to. `old`, `turn` take ints and arrays alike.


class _Rule(Protocol):
    period: int
    """Of the sequence of old sources."""

    def old(self, n: Any) -> Any:
        """Old samples among the first n."""

    def turn(self, o: Any) -> tuple[Any, Any]:
        """Source (from 1) and place in it of the o-th old sample."""

    def sources(self, o: Ints) -> Ints:
        """Of the o-th old samples, o < period."""


class _Even:
    """floor(n p / q), shared by K sources in turn."""

    def __init__(self, ratio: Fraction, shared_by: int) -> None:
        self.p, self.q, self.period = ratio.numerator, ratio.denominator, shared_by

    def old(self, n: Any) -> Any:
        return n * self.p // self.q

    def turn(self, o: Any) -> tuple[Any, Any]:
        return o % self.period + 1, o // self.period

    def sources(self, o: Ints) -> Ints:
        return o % self.period + 1


class _Table:
    """One period of source numbers, 0 for new."""

    def __init__(self, sources: NDArray[np.integer[Any]], count: int) -> None:
        is_old = sources > 0
        self.length = len(sources)
        kind = np.int32 if self.length < 1 << 31 else np.int64
        self._before = np.zeros(self.length + 1, kind)
        np.cumsum(is_old, out=self._before[1:])
        self.old_sources = sources[is_old].astype(np.uint16)
        self.period = len(self.old_sources)
        self._places = np.empty(self.period, np.int64)
        self._counts = np.zeros(count, np.int64)
        for s in range(1, count):
            at = np.flatnonzero(self.old_sources == s)
            self._places[at] = np.arange(len(at))
            self._counts[s] = len(at)

    def old(self, n: Any) -> Any:
        k, r = divmod(n, self.length)
        return k * self.period + self._before[r]

    def turn(self, o: Any) -> tuple[Any, Any]:
        k, r = divmod(o, self.period)
        s = self.old_sources[r].astype(np.int64)
        return s, k * self._counts[s] + self._places[r]

    def sources(self, o: Ints) -> Ints:
        return self.old_sources[o].astype(np.int64)


def _tijdeman(parts: Sequence[int], length: int) -> NDArray[np.uint16]:
    """The first `length` source numbers for the shares `parts`, which sum up to the period."""
    total, among = sum(parts), range(len(parts))
    slack = 2 * len(parts) - 2  # M = 1 - 1 / slack
    behind = [0] * len(parts)  # Q (n rho - c)
    out = np.empty(length, np.uint16)
    for n in range(length):
        best, best_room, best_part = -1, 0, 1
        for s in among:
            part = parts[s]
            behind[s] += part
            if behind[s] * slack >= total:
                room = total * (slack - 1) - slack * behind[s]  # until it is behind by M
                if best < 0 or room * best_part < best_room * part:
                    best, best_room, best_part = s, room, part
        behind[best] -= total
        out[n] = best
    return out


# Sources


class Joined(torch.utils.data.Dataset):  # type: ignore[misc]
    """Several datasets, one after the other."""

    def __init__(self, parts: Sequence[Dataset]) -> None:
        self.parts = list(parts)
        self._ends = list(accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def column_names(self) -> list[str] | None:
        """The columns of the first dataset, if it tells them."""
        named = getattr(self.parts[0], "column_names", None)
        return named if isinstance(named, list) else None

    def where(self, index: int) -> tuple[int, int]:
        """Which dataset, and the index in it."""
        part = bisect_right(self._ends, index)
        return part, index - (self._ends[part - 1] if part else 0)

    def __getitem__(self, index: int) -> Any:
        part, at = self.where(index)
        return self.parts[part][at]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return _fetch(self.parts, [self.where(i) for i in indices])


def _fetch(sources: Sequence[Any], places: Sequence[tuple[int, int]]) -> list[Any]:
    """Samples of several sources, those of a source in one call where it has such a call."""
    groups: dict[int, list[int]] = {}
    for at, (s, _) in enumerate(places):
        groups.setdefault(s, []).append(at)
    out: list[Any] = [None] * len(places)
    for s, ats in groups.items():
        source, indices = sources[s], [places[at][1] for at in ats]
        many = getattr(source, "__getitems__", None)
        found = many(indices) if many else [source[i] for i in indices]
        for at, sample in zip(ats, found, strict=True):
            out[at] = sample
    return out


class _Source:
    """A dataset and the order in which it is read."""

    def __init__(self, name: str, data: Any, seed: int, shuffled: bool) -> None:
        self.name, self.data, self.shuffled = name, data, shuffled
        self.size = len(data)
        self.draw = Draw(self.size, seed, name)

    def place(self, turn: int) -> int:
        """The index of what comes at a turn."""
        return self.draw[turn] if self.shuffled else turn % self.size

    def places(self, turns: Ints) -> Ints:
        """The same for turns that grow."""
        if not self.shuffled:
            return turns % self.size
        out = np.empty_like(turns)
        done = 0
        while done < len(turns):
            epoch = int(turns[done]) // self.size
            end = int(np.searchsorted(turns, (epoch + 1) * self.size))
            out[done:end] = self.draw.order(epoch).many(turns[done:end] - epoch * self.size)
            done = end
        return out


def _columns(name: str, data: Any) -> frozenset[str] | None:
    """The columns of a dataset, or None if its samples have none."""
    named = getattr(data, "column_names", None)
    if isinstance(named, list):
        return frozenset(map(str, named))
    first = data[0]
    return frozenset(map(str, first)) if isinstance(first, Mapping) else None


def _check_columns(sources: Sequence[_Source]) -> None:
    first, *rest = sources
    mine = _columns(first.name, first.data)
    for other in rest:
        theirs = _columns(other.name, other.data)
        if mine == theirs:
            continue
        if mine is None or theirs is None:
            told = [
                f"{s.name!r} are {'of no columns' if c is None else sorted(c)}"
                for s, c in ((first, mine), (other, theirs))
            ]
            raise ValueError(f"the samples of {' and those of '.join(told)}: prepare them alike")
        raise ValueError(
            f"the columns of {first.name!r} and {other.name!r} differ: only {first.name!r} has "
            f"{sorted(mine - theirs)}, only {other.name!r} has {sorted(theirs - mine)}. Prepare "
            "(tokenise, pack) them alike, or remove columns"
        )


def _check_dataset(name: str, data: Any) -> None:
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")) or isinstance(data, str):
        raise TypeError(
            f"{name} must be a map-style dataset, with a length and items by their index; got "
            f"{type(data).__name__}. A stream cannot be read at any place: save it first"
        )


def _is_sample(x: Any) -> bool:
    values = (Mapping, str, bytes, list, tuple, Tensor, np.ndarray)
    return isinstance(x, values) or not (hasattr(x, "__getitem__") and hasattr(x, "__len__"))


def _named(old: Any) -> dict[str, Any]:
    """The old sources by their names."""
    if isinstance(old, Mapping):
        for name in old:
            if not isinstance(name, str) or name in ("", NEW):
                raise ValueError(f"old sources need names other than {NEW!r}; got {name!r}")
        return dict(old)
    if isinstance(old, tuple) or (
        isinstance(old, list) and old and not any(_is_sample(x) for x in old)
    ):
        return {f"{OLD}{i}": data for i, data in enumerate(old)}
    return {OLD: old}


# Lengths


def _lengths(source: _Source, lengths: Lengths) -> Ints:
    """Tokens of each sample of a source."""
    name, data = source.name, source.data
    counted: Any
    if isinstance(data, Joined) and not isinstance(lengths, Mapping):
        parts = [_Source(name, part, 0, False) for part in data.parts]
        return np.concatenate([_lengths(part, lengths) for part in parts])
    if isinstance(lengths, Mapping):
        if name not in lengths:
            raise ValueError(f"lengths has nothing for {name!r}; it has {sorted(lengths)}")
        counted = lengths[name]
    elif isinstance(lengths, str):
        if _is_table(data):
            counted = data[lengths] if lengths in data.column_names else None
        else:
            counted = _each(data, lambda x: x.get(lengths) if isinstance(x, Mapping) else None)
        if counted is None or any(x is None for x in counted):
            raise ValueError(f"{name!r} has no column {lengths!r} of lengths")
    elif callable(lengths):
        counted = _each(data, lengths)
    else:
        counted = _ids(name, data)
    out = np.asarray([int(x) for x in counted] if not isinstance(counted, np.ndarray) else counted)
    if out.shape != (source.size,) or not np.issubdtype(out.dtype, np.integer):
        raise ValueError(
            f"lengths of {name!r} must be {source.size} integers, one per sample; got "
            f"{out.dtype} of the shape {out.shape}"
        )
    if (out < 0).any() or not out.any():
        raise ValueError(f"lengths of {name!r} must not be negative, nor all 0")
    return out.astype(np.int64)


def _is_table(data: Any) -> bool:
    """Whether this is, or acts like, a datasets.Dataset."""
    return isinstance(getattr(data, "column_names", None), list) and hasattr(data, "select_columns")


def _each(data: Any, count: Callable[[Any], Any]) -> list[Any]:
    return [count(data[i]) for i in range(len(data))]


def _ids(name: str, data: Any) -> list[int]:
    if _is_table(data) and "input_ids" in data.column_names:
        # Whole slices of one column are far quicker than rows.
        column = data.select_columns(["input_ids"])
        return [
            len(ids)
            for start in range(0, len(column), 1024)
            for ids in column[start : start + 1024]["input_ids"]
        ]
    if not isinstance(data[0], Mapping) or "input_ids" not in data[0]:
        raise ValueError(
            f"samples of {name!r} have no 'input_ids' to count: give lengths, a function of a "
            "sample, the name of a column, or a mapping from sources to numbers"
        )
    return _each(data, lambda sample: len(sample["input_ids"]))


def _read(source: _Source, lengths: Ints, turns: int) -> Ints:
    """Lengths of the first samples that are read, in their order."""
    chunks: Iterable[Ints] = (
        lengths[source.places(np.arange(start, min(start + (1 << 20), turns)))]
        for start in range(0, turns, 1 << 20)
    )
    return np.concatenate([np.empty(0, np.int64), *chunks])


def _before(lengths: Ints) -> Ints:
    """Tokens before each sample."""
    out = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1], out=out[1:])
    return out


def _turns_for(lengths: Ints, tokens: int) -> int:
    """Samples that hold at least `tokens`, however they are ordered within an epoch."""
    return len(lengths) * (tokens // int(lengths.sum()) + 1)


def _by_tokens(
    sources: Sequence[_Source],
    shares: Sequence[Fraction],
    lengths: Sequence[Ints],
    length: Length,
    epochs: int,
) -> tuple[NDArray[np.uint16], int]:
    """Source numbers of the mixture, and how many."""
    ratio = sum(shares[1:], Fraction(0))
    p, q = ratio.numerator, ratio.denominator
    turns = length if isinstance(length, int) else epochs * sources[0].size
    new = _read(sources[0], lengths[0], turns)
    need = int(new.sum()) * p // (q - p) + 1
    longest = max(int(x.max()) for x in lengths)
    if q * (int(new.sum()) + need + longest) >= 1 << 62:
        raise ValueError(f"ratio {ratio} has too large a denominator for so many tokens: round it")

    # The old ones among themselves: in the order of the tokens read before, over the share.
    olds: list[Ints] = []
    keys: list[NDArray[np.float64]] = []
    for source, share, its in zip(sources[1:], shares[1:], lengths[1:], strict=True):
        tokens = math.ceil((need + longest) * (share / ratio)) + longest + 1
        read = _read(source, its, _turns_for(its, tokens))
        read = read[: int(np.searchsorted(np.cumsum(read), tokens)) + 1]
        olds.append(read)
        keys.append(_before(read) / float(share))
    which = np.repeat(np.arange(1, len(sources)), [len(x) for x in olds])
    by_key = np.argsort(np.concatenate(keys), kind="stable")
    which, old = which[by_key], np.concatenate(olds)[by_key]
    # An old sample comes before the first new one that finds it in debt.
    before_new = _before(new) * p
    place = np.searchsorted(before_new, _before(old) * (q - p), side="right")
    taken = int(np.searchsorted(place, len(new)))  # later ones come after all that is new
    out = np.zeros(len(new) + taken, np.uint16)
    at = place[:taken] + np.arange(taken)
    out[at] = which[:taken]
    if isinstance(length, int):
        return out[:length], length
    if length == "compute-equivalent":
        tokens_of = np.empty(len(out), np.int64)
        is_old = out > 0
        tokens_of[is_old], tokens_of[~is_old] = old[:taken], new
        end = int(np.searchsorted(np.cumsum(tokens_of), int(new.sum()), side="right"))
        return out[:end], end
    return out, len(out)


class Mixture(torch.utils.data.Dataset):  # type: ignore[misc]
    """What `mix` returns: a map-style dataset of new and old samples, in the order of training.

    Read it from 0 to its end, in batches or not; a sampler that shuffles it keeps the ratio of the
    whole, but not that of each prefix.

    Attributes:
        names: of the sources, "new" first.
        ratios: of the sources, exactly; they sum up to 1.
        unit: "samples" or "tokens".
        rank, world: which part of the whole this is (see `shard`).
        first: how many samples of the part were skipped (see `skip`).
        in_order: that a sampler should not shuffle it.
    """

    in_order = True

    def __init__(
        self,
        sources: Sequence[_Source],
        ratios: Sequence[Fraction],
        rule: _Rule,
        total: int,
        unit: Unit,
        tokens: Mapping[str, int],
    ) -> None:
        self._sources, self._rule, self._total = list(sources), rule, total
        self._tokens = dict(tokens)
        self.names = tuple(source.name for source in sources)
        self.ratios = dict(zip(self.names, ratios, strict=True))
        self.unit = unit
        self._place(0, 1, 0, False)

    def _place(self, rank: int, world: int, first: int, drop_last: bool) -> None:
        self.rank, self.world, self.first, self.drop_last = rank, world, first, drop_last
        whole, rest = divmod(self._total, world)
        if rest and not drop_last:
            a, b = self._rule.old(whole * world), self._rule.old(self._total)
            is_old = a + (rank - a) % world < b
            whole += bool(is_old or (rank - b) % world < rest - (b - a))
        self._length = max(0, whole - first)
        self._data = [source.data for source in self._sources]
        self._in_bulk = any(hasattr(data, "__getitems__") for data in self._data)
        self._table, self._starts = self._one_table()
        self._forget()

    def _one_table(self) -> tuple[Any, list[int]]:
        """The sources as one `datasets.Dataset`, a view of them, and where each begins in it.

        A batch is then one call whatever it holds. None unless all are such tables, alike in
        columns, types and format.
        """
        datasets = sys.modules.get("datasets")  # imported, if a source is one of its tables
        parts: list[Any] = []
        for data in self._data:
            parts += data.parts if isinstance(data, Joined) else [data]
        if datasets is None or not all(isinstance(part, datasets.Dataset) for part in parts):
            return None, []
        first: Any = parts[0]
        if any(x.features != first.features or x.format != first.format for x in parts):
            return None, []
        starts = [0, *accumulate(len(d) for d in self._data)]
        table = datasets.concatenate_datasets(parts)
        return (table if table.format == first.format else None), starts

    def _forget(self) -> None:
        """The places of neighbours: found again where they are needed."""
        self._slots = np.empty(len(self._data), object)
        for at, data in enumerate(self._data):
            self._slots[at] = data
        self._missed = -1
        self._block: tuple[int, Ints, list[int]] = (0, np.empty(0, np.int64), [])
        self._near: tuple[int, int, list[Any], list[int]] = (0, 0, [], [])

    def __getstate__(self) -> dict[str, Any]:
        found = ("_slots", "_missed", "_block", "_near")
        return {name: value for name, value in self.__dict__.items() if name not in found}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return self._length

    @property
    def column_names(self) -> list[str] | None:
        """The columns of all sources; None if their samples have none."""
        columns = _columns(self.names[0], self._data[0])
        return None if columns is None else sorted(columns)

    # Where samples come from.

    def _turns(self, at: Any) -> tuple[Any, Any, Any]:
        """Of places in this part: whether old; the number of the old, and of the new sample."""
        start = (at + self.first) * self.world
        end = start + self.world
        if isinstance(end, int):
            end = min(end, self._total)
        else:
            np.minimum(end, self._total, out=end)
        a, b = self._rule.old(start), self._rule.old(end)
        # The old samples of a round go to ranks a, a + 1, ... in turn, the new ones to the rest.
        old = a + (self.rank - a) % self.world
        return old < b, old, start - a + (self.rank - b) % self.world

    def _find(self, at: int) -> tuple[int, int]:
        is_old, old, new = self._turns(at)
        s, turn = self._rule.turn(int(old)) if is_old else (0, new)
        return int(s), self._sources[int(s)].place(int(turn))

    def _find_many(self, start: int, end: int) -> tuple[Ints, Ints]:
        """Of the samples from start to end."""
        if self.world == 1:
            counts = np.arange(start + self.first, end + self.first + 1)
            before = np.asarray(self._rule.old(counts), np.int64)
            old = before[:-1]
            is_old, new = before[1:] > old, counts[:-1] - old
        else:
            is_old, old, new = self._turns(np.arange(start, end))
        s, places = np.zeros(end - start, np.int64), np.empty(end - start, np.int64)
        olds, news = np.flatnonzero(is_old), np.flatnonzero(~is_old)
        places[news] = self._sources[0].places(new[news])
        if len(olds):
            which, turns = self._rule.turn(np.asarray(old[olds], np.int64))
            s[olds] = which
            for each in np.unique(which).tolist():
                these = which == each
                places[olds[these]] = self._sources[each].places(turns[these])
        return s, places

    def _where(self, index: int) -> tuple[int, int]:
        at = operator.index(index)
        at = at + self._length if at < 0 else at
        if not 0 <= at < self._length:
            raise IndexError(f"index {index} is out of range for {self._length} samples")
        start, sources, places = self._block
        if not 0 <= at - start < len(places):
            block = at // _BLOCK
            # Neighbours are found at once where they are read one after the other, and only there.
            if block != self._missed:
                self._missed = block
                return self._find(at)
            start = block * _BLOCK
            sources, found = self._find_many(start, min(start + _BLOCK, self._length))
            places = found.tolist()
            self._block = start, sources, places
            self._near = start, start + len(places), self._slots[sources].tolist(), places
        return int(sources[at - start]), places[at - start]

    def source(self, index: int) -> tuple[str, int]:
        """The name of the source of a sample, and its index there.

        Raises:
            IndexError: there is no such sample.
        """
        s, at = self._where(index)
        return self.names[s], at

    def counts(self, n: int) -> dict[str, int]:
        """How many of the first n samples come from each source.

        Raises:
            ValueError: n is negative, or larger than the length.
        """
        if not 0 <= n <= self._length:
            raise ValueError(f"n must lie in [0, {self._length}]; got {n}")
        olds = self._olds(self.first + n) - self._olds(self.first)
        return dict(zip(self.names, [n - int(olds.sum()), *olds[1:].tolist()], strict=True))

    def _olds(self, rounds: int) -> Ints:
        """Old samples of this rank in the first rounds, by source; [0] stays 0."""
        rule, period = self._rule, max(1, self._rule.period)
        before = int(rule.old(min(rounds * self.world, self._total)))
        many = max(0, -((self.rank - before) // self.world))  # rank, rank + world, ... < before
        cycle = period // math.gcd(self.world, period)
        full, part = divmod(many, cycle)
        out = np.zeros(len(self.names), np.int64)
        for times, steps in ((full, cycle), (1, part)):
            if times and steps:
                of = rule.sources((self.rank + self.world * np.arange(steps)) % period)
                out += times * np.bincount(of, minlength=len(self.names))
        return out

    # Samples.

    def __getitem__(self, index: int) -> Any:
        s, at = self._where(index)
        return self._data[s][at]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        # Written for speed: a loader may hand over a batch in 50 microseconds.
        start, end, data, places = self._near
        if indices and start <= min(indices) and max(indices) < end and not self._in_bulk:
            return [data[i - start][places[i - start]] for i in indices]
        if self._table is not None:
            found = (self._where(i) for i in indices)
            rows: list[Any] = self._table.__getitems__([self._starts[s] + at for s, at in found])
            return rows
        return _fetch(self._data, [self._where(i) for i in indices])

    # Parts.

    def skip(self, n: int) -> Mixture:
        """The same without its first n samples: where a run goes on.

        Raises:
            ValueError: n is negative, or larger than the length.
        """
        n = operator.index(n)
        if not 0 <= n <= self._length:
            raise ValueError(f"n must lie in [0, {self._length}]; got {n}")
        return self._part(self.rank, self.world, self.first + n, self.drop_last)

    def shard(self, rank: int, world: int, *, drop_last: bool = False) -> Mixture:
        """What one of `world` ranks reads, for a loop without a distributed sampler.

        Each rank has one of the samples n world ... (n + 1) world - 1 as its n-th: all ranks
        together have read a prefix of the whole, with its ratio, whatever their number. Old samples
        go to the ranks in turn, so the old ones among the first n of each rank differ from ratio n
        by less than 1, too (by less than 1 + ratio in a last round that is not full). With several
        old sources this holds for all of them together, and which of them a rank meets may be
        uneven; by tokens it holds for the part that is old in the prefix of the whole.

        Args:
            rank: 0 to world - 1.
            world: how many ranks.
            drop_last: leave out what does not fill a round; otherwise some ranks may have one
                sample more, and no sample is left out.

        Raises:
            ValueError: not 0 <= rank < world, or this is a part already.
        """
        if self.world != 1 or self.first:
            raise ValueError("shard a whole mixture: shard(rank, world).skip(n), in this order")
        if not 0 <= operator.index(rank) < operator.index(world):
            raise ValueError(f"rank must lie in [0, world); got rank={rank}, world={world}")
        return self._part(rank, world, 0, drop_last)

    def _part(self, rank: int, world: int, first: int, drop_last: bool) -> Mixture:
        made = Mixture.__new__(Mixture)
        made.__dict__.update(self.__dict__)
        made._place(rank, world, first, drop_last)
        return made

    def to_dataset(self) -> Any:
        """The mixture as a `datasets.Dataset`: views of the sources, in the order of this mixture.

        For hosts that insist on one, as TRL's trainers do: they may tokenise and pack it then.

        Raises:
            TypeError: a source is not a `datasets.Dataset`.
        """
        from datasets import Dataset as Table
        from datasets import concatenate_datasets

        tables: list[Any] = []
        starts: list[int] = []
        total = 0
        for source in self._sources:
            parts = source.data.parts if isinstance(source.data, Joined) else [source.data]
            for part in parts:
                if not isinstance(part, Table):
                    raise TypeError(
                        f"to_dataset needs sources that are datasets.Dataset; {source.name!r} is "
                        f"{type(part).__name__}"
                    )
            tables.extend(parts)
            starts.append(total)
            total += source.size
        s, places = self._find_many(0, self._length)
        return concatenate_datasets(tables).select(np.array(starts, np.int64)[s] + places)

    # What a resumed run must share.

    def state_dict(self) -> dict[str, Any]:
        """What the order of the samples follows from. Nothing of it changes while it is read: a
        place in it is a number, which `skip` takes."""
        return {
            "unit": self.unit,
            "seed": self._sources[0].draw.seed,
            "length": self._total,
            "ratios": {name: str(ratio) for name, ratio in self.ratios.items()},
            "sizes": {source.name: source.size for source in self._sources},
            "shuffled": {source.name: source.shuffled for source in self._sources},
            "tokens": dict(self._tokens),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that this is the mixture that gave a state.

        Raises:
            ValueError: it is another one; names what differs.
        """
        mine = self.state_dict()
        for key in sorted(mine.keys() | state.keys()):
            if mine.get(key) != state.get(key):
                raise ValueError(
                    f"{key} of the mixture differs: saved {state.get(key)!r}, now {mine.get(key)!r}"
                )


def mix(
    new: Dataset,
    old: Any,
    ratio: float | Fraction | Mapping[str, float | Fraction] | Sequence[float | Fraction],
    *,
    unit: Unit = "samples",
    seed: int = 0,
    shuffle: bool = True,
    shuffle_old: bool | None = None,
    split: Split = "even",
    length: Length = "all-new",
    epochs: int = 1,
    lengths: Lengths = None,
) -> Mixture:
    """Replay: old data mixed into new data, exactly, at every prefix.

    Nothing is read but the first sample of each source (their columns must agree), and, with
    `unit="tokens"`, what `lengths` needs.

    Args:
        new: a map-style dataset.
        old: one, or several by name or in a tuple (a list counts as several if it holds datasets;
            a list of samples is one dataset). An old source that ends begins again.
        ratio: the part of the mixture that is old, in [0, 1): one number, or one per old source.
            With 0 nothing but new data is read. Held as a fraction (`exact_ratio`).
        unit: what is counted: "samples" (the same as tokens where samples are packed blocks), or
            "tokens" of samples of different lengths.
        seed: of all orders.
        shuffle: read sources in a random order, another one in each epoch of a source; otherwise
            from their start, in their own order.
        shuffle_old: the same for old sources; by default as `shuffle`. Ibrahim et al. 2024 read
            old data in its original order from the start: False.
        split: of one ratio over several old sources: "even", or "size": one pool, named "old", in
            which each sample is as likely.
        length: "all-new": until all of `new` was read, so 1 / (1 - ratio) times as long as `new`;
            "compute-equivalent" (Ibrahim et al. 2024, arXiv 2403.08763): as many samples (or
            tokens, at most) as `new` has, so that (1 - ratio) of `new` is read; or a number of
            samples.
        epochs: passes over `new` (or its compute) within the mixture. A host's own epochs would
            read the same mixture again.
        lengths: with "tokens": a function of a sample, the name of a column that holds the
            numbers, or arrays by source ("new", and "old" or the names of several); by default
            the length of "input_ids".

    Raises:
        ValueError: a ratio outside [0, 1) or their sum, an empty source, sources of different
            columns, samples without lengths.
        TypeError: a source is not map-style.
    """
    _check_options(unit, seed, shuffle, shuffle_old, split, length, epochs, lengths)
    _check_dataset(NEW, new)
    if not len(new):
        raise ValueError("new is empty: there is nothing to train on")
    olds, shares = _shares(old, ratio, split)
    inner = shuffle if shuffle_old is None else shuffle_old
    sources = [_Source(NEW, new, seed, shuffle)]
    sources += [_Source(name, data, seed, inner) for name, data in olds.items()]
    _check_columns(sources)
    together = sum(shares, Fraction(0))
    ratios = [1 - together, *shares]
    if unit == "tokens" and together:
        counted = [_lengths(source, lengths) for source in sources]
        numbers, total = _by_tokens(sources, ratios, counted, length, epochs)
        tokens = {s.name: int(x.sum()) for s, x in zip(sources, counted, strict=True)}
        rule: _Rule = _Table(numbers, len(sources))
    else:
        tokens = {}
        wanted = length if isinstance(length, int) else epochs * len(new)
        # Enough for `wanted` new ones: new(n) > (1 - ratio) n - 1.
        enough = math.ceil((wanted + 1) / (1 - together)) + 1 if length == "all-new" else wanted
        rule = _rule(ratios, enough)
        total = wanted
        if length == "all-new":
            total = bisect_right(range(enough + 1), wanted - 1, key=lambda n: n - rule.old(n))
    if (total + 1) * max(r.denominator for r in ratios) >= 1 << 62:
        raise ValueError(f"the mixture has {total} samples, too many for the ratio {together}")
    return Mixture(sources, ratios, rule, total, unit, tokens)


def _check_options(
    unit: str,
    seed: Any,
    shuffle: Any,
    shuffle_old: Any,
    split: str,
    length: Any,
    epochs: Any,
    lengths: Any,
) -> None:
    for name, value, known in (
        ("unit", unit, ("samples", "tokens")),
        ("split", split, ("even", "size")),
    ):
        one_of(name, value, known)
    for name, value in (("shuffle", shuffle), ("shuffle_old", shuffle_old)):
        if not isinstance(value, bool) and (value is not None or name == "shuffle"):
            raise TypeError(f"{name} must be True or False; got {value!r}")
    integer("seed", seed)
    at_least("epochs", epochs, 1)
    if isinstance(length, bool) or not isinstance(length, int | str):
        raise TypeError(f"length must be a number of samples or a word; got {length!r}")
    if isinstance(length, int):
        if length < 1:
            raise ValueError(f"length must be at least 1; got {length}")
        if epochs != 1:
            raise ValueError("epochs says how long the mixture is, and so does length: give one")
    elif length not in ("all-new", "compute-equivalent"):
        raise ValueError(
            f"length must be 'all-new', 'compute-equivalent' or a number of samples; got {length!r}"
        )
    if lengths is not None and unit != "tokens":
        raise ValueError("lengths are for unit='tokens'")


def _shares(old: Any, ratio: Any, split: str) -> tuple[dict[str, Any], list[Fraction]]:
    """The old sources that are read, and the part of each."""
    named = {} if old is None else _named(old)
    if isinstance(ratio, Mapping):
        if ratio.keys() != named.keys():
            raise ValueError(f"ratio is for {sorted(ratio)}, but old has {sorted(named)}")
        each = {name: exact_ratio(ratio[name], f"ratio of {name!r}") for name in named}
    elif isinstance(ratio, Sequence) and not isinstance(ratio, str):
        if len(ratio) != len(named):
            raise ValueError(f"ratio has {len(ratio)} numbers for {len(named)} old sources")
        each = {
            name: exact_ratio(r, f"ratio of {name!r}") for name, r in zip(named, ratio, strict=True)
        }
    else:
        all_of_it = exact_ratio(ratio)
        if all_of_it and not named:
            raise ValueError("old is empty: with a ratio above 0 there must be something to replay")
        if split == "size" and len(named) > 1 and all_of_it:
            for name, data in named.items():
                _check_old(name, data)
            _check_columns([_Source(name, data, 0, False) for name, data in named.items()])
            return {OLD: Joined(list(named.values()))}, [all_of_it]
        each = {name: all_of_it / len(named) for name in named}
    if isinstance(ratio, Mapping | Sequence) and split != "even":
        raise ValueError("split is for one ratio over several sources; here each has its own")
    if sum(each.values()) >= 1:
        raise ValueError(f"the ratios sum up to {float(sum(each.values()))}: nothing new is left")
    read = {name: share for name, share in each.items() if share}
    for name in read:
        _check_old(name, named[name])
    return {name: named[name] for name in read}, list(read.values())


def _check_old(name: str, data: Any) -> None:
    _check_dataset(name, data)
    if not len(data):
        raise ValueError(f"the old source {name!r} is empty: leave it out")


def _rule(ratios: Sequence[Fraction], length: int) -> _Rule:
    """Of samples: in closed form, or one period."""
    shares = ratios[1:]
    if not shares:
        return _Even(Fraction(0), 1)
    if len(set(shares)) == 1:
        return _Even(1 - ratios[0], len(shares))
    period = math.lcm(*(r.denominator for r in ratios))
    if min(period, length) > _PERIOD:
        raise ValueError(
            f"the ratios {[str(r) for r in shares]} repeat after {period} samples only, more than "
            f"{_PERIOD}: round them, for example to 3 digits"
        )
    parts = [int(r * period) for r in ratios]
    return _Table(_tijdeman(parts, min(period, length)), len(ratios))
