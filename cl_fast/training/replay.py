"""Replay as a keep: the data of past tasks, mixed into the new task's at an exact ratio.

    learn(..., keep=[Replay(0.05)])                             all past data
    Replay(0.05, memory=1000, policy="balanced")                at most 1000 past samples

The mixing is that of `cl_fast.training.mixing`. Which past samples a bounded memory holds is a pure
function of the seed and of the sizes (and names) of the past tasks, not of when it is asked:

    reservoir   Vitter's algorithm R over all past samples in turn: sample t (from 0) goes to slot
                t while the memory is not full, then to slot j = floor(u_t (t + 1)) if j < memory,
                u_t uniform in [0, 1). Each past sample is held with probability memory / t.
    balanced    memory div T of each of T past tasks, one more of the first ones for the rest: the
                first of a fixed random order of each task (`permutations`). What a smaller task
                cannot fill, the larger ones share.

In both, a sample that was let go does not come back: as tasks are added a reservoir only
replaces, and the share of a task only shrinks, so what it does not hold may be deleted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Subset

from cl_fast.training.keeping import Dataset, Keep, Task, needs
from cl_fast.training.mixing import Length, Lengths, Split, Unit, exact_ratio, mix
from cl_fast.training.permutations import Permutation, order_key

__all__ = ["Replay"]

Policy = Literal["all", "reservoir", "balanced"]
_CHUNK = 1 << 20


class Replay(Keep):
    """Train on the new task and, for a part of the samples, on what past tasks trained on.

    The first task is trained on its own data. After that `data` gives a `Mixture`, whose order must
    not be shuffled again: `KeepMixin` and `learn` see to it; with another Trainer set
    `train_sampling_strategy="sequential"`.

    Args:
        ratio: the part of what is trained on that is old, in [0, 1).
        unit: "samples" or "tokens": what is counted.
        seed: of orders and of the memory.
        memory: how many past samples at most; None for all.
        policy: which: "all" (with memory=None), "reservoir" or "balanced".
        split: of the ratio over past tasks: "even", or "size" (each held sample as likely). By
            default "size" with a reservoir, whose content is what to draw from, else "even".
        length: as for `mix`: "all-new", "compute-equivalent" or a number of samples.
        epochs: passes over the new data within the mixture.
        shuffle: read new and old data in a random order.
        shuffle_old: the same for old data; by default as `shuffle`.
        lengths: with unit="tokens", as for `mix`; a mapping is from the names of tasks (and "new").
        old: data from before the stream, by names of their own. They count as tasks before the
            first one, which is then mixed too. `learn` has them prepared by the trainer, like the
            data of tasks; elsewhere they need the columns that the trainer gives its data.

    Attributes:
        trained_columns_only: that a host may leave out what the trainer does not read.

    Raises:
        ValueError: a ratio outside [0, 1), a memory without a policy or the other way round, old
            data that are empty.
    """

    trained_columns_only = True

    def __init__(
        self,
        ratio: float | Fraction,
        *,
        unit: Unit = "samples",
        seed: int = 0,
        memory: int | None = None,
        policy: Policy = "all",
        split: Split | None = None,
        length: Length = "all-new",
        epochs: int = 1,
        shuffle: bool = True,
        shuffle_old: bool | None = None,
        lengths: Lengths = None,
        old: Mapping[str, Dataset] | None = None,
    ) -> None:
        if policy not in ("all", "reservoir", "balanced"):
            raise ValueError(
                f"policy must be one of ('all', 'reservoir', 'balanced'); got {policy!r}"
            )
        if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int)):
            raise TypeError(f"memory must be a number of samples, or None; got {memory!r}")
        if memory is not None and memory < 1:
            raise ValueError(f"memory must hold at least 1 sample; got {memory}")
        if (memory is None) != (policy == "all"):
            raise ValueError(
                "policy='all' keeps all past data: give memory with 'reservoir' or 'balanced'"
                if policy == "all"
                else f"policy={policy!r} needs memory, a number of samples"
            )
        self.ratio = exact_ratio(ratio)
        for name, data in (old or {}).items():
            if not hasattr(data, "__len__") or len(data) == 0:
                raise ValueError(f"old[{name!r}] must be a map-style dataset that is not empty")
        self.old = [Task(name, -1, data) for name, data in (old or {}).items()]
        self._old_sizes = {task.name: len(needs(task, "train", "Replay")) for task in self.old}
        self.seed, self.memory, self.policy = seed, memory, policy
        self.split: Split = split or ("size" if policy == "reservoir" else "even")
        self._mixing: dict[str, Any] = {
            "unit": unit,
            "seed": seed,
            "length": length,
            "epochs": epochs,
            "shuffle": shuffle,
            "shuffle_old": shuffle_old,
            "lengths": lengths,
        }
        # The options are checked now, not when the second task begins.
        one = [{"input_ids": [0]}]
        lengths_of_one = None if unit == "samples" else {"new": [1]}
        mix(one, None, 0, split=self.split, **{**self._mixing, "lengths": lengths_of_one})
        if unit == "samples" and lengths is not None:
            raise ValueError("lengths are for unit='tokens'")

    def data(self, new: Dataset, past: Sequence[Task]) -> Dataset:
        """`new` where nothing is old (or for ratio 0), else a `Mixture` with past tasks by name.

        Raises:
            ValueError: a past task has no `train`, an empty one, or one whose columns are not those
                of `new`.
        """
        names = {task.name for task in past}
        for task in self.old:
            if task.name in names:
                raise ValueError(f"old has {task.name!r}, which is a task: choose another name")
        past = [*self.old, *past]
        if not past or not self.ratio:
            return new
        held = self.held(past)
        old: dict[str, Dataset] = {}
        lengths = self._mixing["lengths"]
        if isinstance(lengths, Mapping):
            lengths = {"new": lengths["new"]} if "new" in lengths else {}
        for task, indices in zip(past, held, strict=True):
            if not len(indices):
                continue
            data = needs(task, "train", "Replay")
            whole = self.memory is None
            old[task.name] = data if whole else _part(data, indices)
            given = self._mixing["lengths"]
            if isinstance(given, Mapping) and task.name in given:
                its = np.asarray(given[task.name])
                lengths[task.name] = its if whole else its[indices]
        if isinstance(lengths, dict) and self.split == "size" and len(old) > 1:
            parts = [lengths.pop(name) for name in old if name in lengths]
            lengths["old"] = np.concatenate(parts) if parts else []
        return mix(new, old, self.ratio, split=self.split, **{**self._mixing, "lengths": lengths})

    def held(self, past: Sequence[Task]) -> list[NDArray[np.int64]]:
        """The indices, growing, of what is kept of each past task's `train`.

        Raises:
            ValueError: a past task has no `train`, or an empty one.
        """
        sizes = [len(needs(task, "train", "Replay")) for task in past]
        for task, size in zip(past, sizes, strict=True):
            if not size:
                raise ValueError(f"train of the past task {task.name!r} is empty")
        if self.memory is None or sum(sizes) <= self.memory:
            return [np.arange(size) for size in sizes]
        if self.policy == "reservoir":
            return _reservoir(sizes, self.memory, self.seed)
        chosen = []
        for task, size, share in zip(past, sizes, _balanced(sizes, self.memory), strict=True):
            order = Permutation(size, order_key(self.seed, f"memory\0{task.name}", 0))
            chosen.append(np.sort(order.many(np.arange(share))))
        return chosen

    def options(self) -> dict[str, Any]:
        lengths = self._mixing["lengths"]
        told = lengths if lengths is None or isinstance(lengths, str) else "given"
        return {
            "ratio": str(self.ratio),
            "memory": self.memory,
            "policy": self.policy,
            "split": self.split,
            **self._mixing,
            "lengths": told,
            "old": self._old_sizes,
        }


def _part(data: Any, indices: NDArray[np.int64]) -> Any:
    """Some samples of a dataset, as its own kind of view where it has one."""
    select = getattr(data, "select", None)
    return select(indices) if callable(select) else Subset(data, indices.tolist())


def _reservoir(sizes: Sequence[int], memory: int, seed: int) -> list[NDArray[np.int64]]:
    """What algorithm R holds after all samples."""
    total = sum(sizes)
    slots = np.arange(memory)  # the last sample that went to each
    generator = np.random.Generator(np.random.Philox(key=order_key(seed, "memory", 0)[0]))
    # A stream of numbers: the draw of a sample depends on its number alone.
    for start in range(0, total, _CHUNK):
        count = min(_CHUNK, total - start)
        u = generator.random(count)
        t = np.arange(start, start + count)
        slot = np.floor(u * (t + 1)).astype(np.int64)
        taken = np.flatnonzero((t >= memory) & (slot < memory))
        np.maximum.at(slots, slot[taken], t[taken])
    slots.sort()
    ends = np.cumsum(sizes)
    bounds = np.searchsorted(slots, [0, *ends.tolist()])
    return [
        slots[low:high] - (end - size)
        for low, high, end, size in zip(bounds[:-1], bounds[1:], ends, sizes, strict=True)
    ]


def _balanced(sizes: Sequence[int], memory: int) -> list[int]:
    """Shares of the tasks: as even as their sizes allow, the rest to the first ones."""
    shares, left = [0] * len(sizes), memory
    open_ones = [i for i, size in enumerate(sizes) if size]
    while left and open_ones:
        each, rest = divmod(left, len(open_ones))
        for place, i in enumerate(open_ones):
            more = min(sizes[i] - shares[i], each + (place < rest))
            shares[i] += more
            left -= more
        open_ones = [i for i in open_ones if shares[i] < sizes[i]]
    return shares
