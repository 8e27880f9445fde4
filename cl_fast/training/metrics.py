"""What a stream of tasks did to each task: the transfer matrix and the numbers read off it.

R[i][j] is the score on task j after training on task i, higher is better; b[j] is the score before
any training. With T tasks:

    average             mean_j R[T-1][j]
    backward transfer   mean_{j<T-1} (R[T-1][j] - R[j][j])
    forward transfer    mean_{j>=1}  (R[j-1][j] - b[j])
    forgetting          mean_{j<T-1} (max_{i<T-1} R[i][j] - R[T-1][j])
    learning accuracy   mean_j R[j][j]
    intransigence       mean_j (joint[j] - R[j][j])     joint: a model trained on all tasks at once

Backward and forward transfer: Lopez-Paz and Ranzato 2017 (arXiv 1706.08840); forgetting and
intransigence: Chaudhry et al. 2018 (arXiv 1801.10112). Some authors divide the second one by T.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["TransferMatrix"]


@dataclass
class TransferMatrix:
    """Scores of tasks after tasks; what was not measured is NaN.

    Attributes:
        tasks: their names, in the order of training.
        before: the scores before any training, [T].
        rows: one per finished task: the scores of all tasks after it, [<= T][T].
    """

    tasks: Sequence[str]
    before: list[float] = field(default_factory=list)
    rows: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tasks = list(self.tasks)
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks must have names of their own; got {self.tasks}")
        rows = [self.before] if self.before else []
        for row in [*rows, *self.rows]:
            if len(row) != len(self.tasks):
                raise ValueError(f"a row must have {len(self.tasks)} scores; got {len(row)}")
        if len(self.rows) > len(self.tasks):
            raise ValueError(f"{len(self.rows)} rows are more than the {len(self.tasks)} tasks")
        if not self.before:
            self.before = [math.nan] * len(self.tasks)

    def add(self, scores: Mapping[str, float]) -> None:
        """The scores after the next task; tasks that were not scored may be left out."""
        unknown = sorted(set(scores) - set(self.tasks))
        if unknown:
            raise ValueError(f"there is no task {unknown[0]!r}; there are {self.tasks}")
        if len(self.rows) == len(self.tasks):
            raise ValueError(f"all {len(self.tasks)} tasks have their row already")
        self.rows.append([float(scores.get(name, math.nan)) for name in self.tasks])

    @property
    def average(self) -> float:
        """Mean score of all tasks after the last one."""
        return _mean(self.rows[-1]) if self._complete() else math.nan

    @property
    def backward(self) -> float:
        """Backward transfer: what later tasks did to earlier ones; negative where they forgot."""
        last = len(self.tasks) - 1
        if not self._complete():
            return math.nan
        return _mean([self.rows[last][j] - self.rows[j][j] for j in range(last)])

    @property
    def forward(self) -> float:
        """Forward transfer: what earlier tasks did to one that is yet to come."""
        if not self._complete():
            return math.nan
        return _mean([self.rows[j - 1][j] - self.before[j] for j in range(1, len(self.tasks))])

    @property
    def forgetting(self) -> float:
        """How far tasks fell from their best score before the last task."""
        last = len(self.tasks) - 1
        if not self._complete():
            return math.nan
        best = [
            max((s for row in self.rows[:last] if not math.isnan(s := row[j])), default=math.nan)
            for j in range(last)
        ]
        return _mean([b - self.rows[last][j] for j, b in enumerate(best)])

    @property
    def learning_accuracy(self) -> float:
        """Mean score of a task right after it was learned."""
        if not self._complete():
            return math.nan
        return _mean([self.rows[j][j] for j in range(len(self.tasks))])

    def intransigence(self, joint: Mapping[str, float]) -> float:
        """How far learning one after the other stays behind learning all at once.

        Args:
            joint: for each task the score of a model that was trained on all of them together.
        """
        missing = [name for name in self.tasks if name not in joint]
        if missing:
            raise ValueError(f"joint must have a score of each task; it lacks {missing[0]!r}")
        if not self._complete():
            return math.nan
        return _mean([joint[name] - self.rows[j][j] for j, name in enumerate(self.tasks)])

    def _complete(self) -> bool:
        return len(self.rows) == len(self.tasks) > 0


def _mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers) if numbers else math.nan
