"""What `evaluate` found: a row per fact, and the means, counts and intervals read off the rows.

    mean_m       over the facts i that have metric m:  sum_i x_im / n_m
    score        3 / (1/ES + 1/PS + 1/NS)
    interval     facts are drawn anew with replacement; the middle 95 % of the means found so

A fact counts once however many prompts it has. Cohorts are parts of the facts in the order of
editing, oldest first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cl_fast.checkpoints.writing import write_whole
from cl_fast.errors import CheckpointError
from cl_fast.options import at_least, one_of

__all__ = ["Report", "compared"]

FORMAT = 1
_SCORE = ("es", "ps", "ns")
_HEADLINE = ("score", "es", "ps", "ns", "ns_plus", "nkl", "greedy", "fluency")
_ACCURACIES = ("es_acc", "ps_acc", "ns_acc", "es_tokens", "ps_tokens", "ns_tokens")
_RESAMPLES = 2000


@dataclass
class Report:
    """The scores of facts after all edits.

    Attributes:
        rows: one mapping per fact, in the order of editing: "id", "prompt", "target", "cohort"
            (from 0, the oldest), the metrics that the fact has, and "greedy_text", what the model
            wrote, where it was asked.
        metrics: those that some fact has, in order; without the score, which is of all facts.
        absent: metrics that no fact has, and why.
        seed: of the bootstrap and of the texts that were drawn.
        about: how it was measured: suite, lengths.
    """

    rows: list[dict[str, Any]]
    metrics: tuple[str, ...]
    absent: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    about: dict[str, Any] = field(default_factory=dict)
    _intervals: dict[int | None, dict[str, tuple[float, float]]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def cohorts(self) -> int:
        return 1 + max(int(row["cohort"]) for row in self.rows)

    @property
    def has_score(self) -> bool:
        return all(name in self.metrics for name in _SCORE)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all that `mean` knows: the score, if there is one, then the metrics."""
        return ("score", *self.metrics) if self.has_score else self.metrics

    def values(self, metric: str, cohort: int | None = None) -> dict[str, float]:
        """id -> value, of the facts that have this metric."""
        self._known(metric, cohort)
        return {
            row["id"]: row[metric]
            for row in self.rows
            if metric in row and cohort in (None, row["cohort"])
        }

    def count(self, metric: str, cohort: int | None = None) -> int:
        """How many facts have this metric; of the score, the fewest of its three."""
        self._known(metric, cohort)
        present = ~np.isnan(self._table(_columns(metric), cohort))
        return int(present.sum(0).min())

    def mean(self, metric: str, cohort: int | None = None) -> float:
        """Of the facts that have it, of all ages or of one cohort; NaN where there is none.

        Raises:
            ValueError: it was not measured; the message says why.
        """
        self._known(metric, cohort)
        table = self._table(_columns(metric), cohort)
        return float(_combined(metric, _means(table, np.ones((1, len(table)))))[0])

    def interval(self, metric: str, cohort: int | None = None) -> tuple[float, float]:
        """The 95 % interval of `mean`, by bootstrap over facts (seeded); (NaN, NaN) without facts.

        Where all values are equal, as where every edit succeeded, it has no width: draws from what
        was seen hold nothing else.
        """
        self._known(metric, cohort)
        if cohort not in self._intervals:
            means = _resampled(self._table(self.metrics, cohort), self.seed)
            at = {name: i for i, name in enumerate(self.metrics)}
            self._intervals[cohort] = {
                name: _middle(_combined(name, means[:, [at[c] for c in _columns(name)]]))
                for name in self.names
            }
        return self._intervals[cohort][metric]

    @property
    def score(self) -> float:
        """The harmonic mean of ES, PS and NS over all facts; 0 where one of them is 0."""
        return self.mean("score")

    def summary(self) -> dict[str, float]:
        """The mean of each metric over all facts."""
        return {name: self.mean(name) for name in self.names}

    def _known(self, metric: str, cohort: int | None) -> None:
        if metric not in self.names:
            missing = [name for name in _SCORE if name not in self.metrics]
            why = self.absent.get(metric)
            if metric == "score":
                why = f"it needs {', '.join(missing)}"
            raise ValueError(
                f"{metric!r} was not measured" + (f": {why}" if why else "")
                + f"; there are {', '.join(self.names)}"
            )  # fmt: skip
        if cohort is not None:
            at_least("cohort", cohort, 0)
            if cohort >= self.cohorts:
                raise ValueError(f"cohort must be below {self.cohorts}; got {cohort}")

    def _table(self, metrics: Sequence[str], cohort: int | None) -> NDArray[np.float64]:
        """Values [facts, metrics], NaN where a fact lacks one."""
        rows = [row for row in self.rows if cohort in (None, row["cohort"])]
        table = np.array([[row.get(m, math.nan) for m in metrics] for row in rows], np.float64)
        return table.reshape(len(rows), len(metrics))

    # --- for people ---

    def lines(self) -> list[tuple[list[str], list[list[str]]]]:
        """Tables as (heading, rows): all metrics, then, with several cohorts, means by age."""
        whole = [
            [
                name,
                _text(self.mean(name)),
                "[{}, {}]".format(*map(_text, self.interval(name))),
                str(self.count(name)),
            ]
            for name in self.names
        ]
        tables = [(["metric", "mean", "95 % interval", "facts"], whole)]
        if self.cohorts > 1:
            names = [name for name in _HEADLINE if name in self.names]
            names = names or [name for name in _ACCURACIES if name in self.names]
            rows = []
            for cohort in range(self.cohorts):
                age = {0: " (oldest)", self.cohorts - 1: " (newest)"}.get(cohort, "")
                size = sum(row["cohort"] == cohort for row in self.rows)
                means = [_text(self.mean(name, cohort)) for name in names]
                rows.append([f"{cohort + 1}{age}", str(size), *means])
            means = [_text(self.mean(name)) for name in names]
            rows.append(["all", str(len(self.rows)), *means])
            tables.append((["cohort", "facts", *names], rows))
        return tables

    def table(self) -> str:
        """As text: means with intervals, cohorts by age, and what is missing and why."""
        parts = [_aligned(head, rows) for head, rows in self.lines()]
        if self.absent:
            parts.append("\n".join(["not measured:", *self._absent("  ")]))
        return "\n\n".join(parts)

    def markdown(self) -> str:
        """The same in Markdown."""
        parts = [_markdown(head, rows) for head, rows in self.lines()]
        if self.absent:
            parts.append("\n".join(["Not measured:", "", *self._absent("- ")]))
        return "\n\n".join(parts) + "\n"

    def _absent(self, mark: str) -> list[str]:
        reasons: dict[str, list[str]] = {}
        for name, why in self.absent.items():
            reasons.setdefault(why, []).append(name)
        return [f"{mark}{', '.join(names)}: {why}" for why, names in reasons.items()]

    def __str__(self) -> str:
        return self.table()

    # --- files ---

    def to_dict(self) -> dict[str, Any]:
        """Everything, in JSON's types, and means with counts and intervals for other readers."""
        return {
            "format": FORMAT,
            "seed": self.seed,
            "about": dict(self.about),
            "summary": {
                name: {
                    "mean": self.mean(name),
                    "interval": list(self.interval(name)),
                    "facts": self.count(name),
                }
                for name in self.names
            },
            "metrics": list(self.metrics),
            "absent": dict(self.absent),
            "rows": [dict(row) for row in self.rows],
        }

    def to_json(self, path: str | Path) -> None:
        """Written whole or not at all.

        Raises:
            OutputError: the file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
        write_whole(Path(path), [text.encode() + b"\n"])

    @classmethod
    def from_json(cls, path: str | Path) -> Report:
        """What `to_json` wrote.

        Raises:
            CheckpointError: there is no such file, or it is no report.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path} is not JSON: {error}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CheckpointError(f"{path} is no report of cl_fast.editing of format {FORMAT}")
        try:
            report = cls(
                [dict(row) for row in content["rows"]],
                tuple(content["metrics"]),
                dict(content["absent"]),
                content["seed"],
                dict(content["about"]),
            )
            report.summary()
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is no report of cl_fast.editing: {error}") from error
        return report


def compared(
    reports: Mapping[str, Report], metrics: Sequence[str] | None = None, form: str = "text"
) -> str:
    """Reports side by side, a row for each: before and after an edit, or several editors.

    Args:
        reports: by name.
        metrics: columns; by default the score, ES, PS, NS, neighbourhood with the edit before it,
            NKL, greedy match and fluency, those that some report has.
        form: "text" or "markdown". "-" stands where a report lacks a metric.
    """
    one_of("form", form, ("text", "markdown"))
    if not reports:
        raise ValueError("reports is empty: give at least one")
    known = dict.fromkeys(name for report in reports.values() for name in report.names)
    columns = [name for name in _HEADLINE if name in known] if metrics is None else list(metrics)
    for name in columns:
        if name not in known:
            raise ValueError(f"no report has the metric {name!r}; there are {', '.join(known)}")
    rows = [
        [where, *(_text(report.mean(n)) if n in report.names else "-" for n in columns)]
        for where, report in reports.items()
    ]
    head = ["", *columns]
    return _aligned(head, rows) if form == "text" else _markdown(head, rows) + "\n"


# --- numbers -----------------------------------------------------------------------------------


def _columns(metric: str) -> tuple[str, ...]:
    return _SCORE if metric == "score" else (metric,)


def _combined(metric: str, means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means [R, columns of a metric] -> [R]; the harmonic mean is 0 where one is 0."""
    if metric != "score":
        return means[:, 0]
    with np.errstate(divide="ignore"):
        return np.asarray(means.shape[1] / (1.0 / means).sum(1), np.float64)


def _means(table: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of the columns [n, m] under weights [R, n], without what is NaN: [R, m]."""
    present = ~np.isnan(table)
    with np.errstate(invalid="ignore"):
        sums = weights @ np.where(present, table, 0.0)
        return np.asarray(sums / (weights @ present), np.float64)


def _resampled(table: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Means of the columns [n, m] of as many rows drawn with replacement: [resamples, m]."""
    facts = len(table)
    random = np.random.default_rng(seed)
    found = []
    step = max(1, (1 << 22) // max(1, facts))
    for first in range(0, _RESAMPLES if facts else 0, step):
        count = min(step, _RESAMPLES - first)
        drawn = random.integers(facts, size=(count, facts)) + facts * np.arange(count)[:, None]
        times = np.bincount(drawn.reshape(-1), minlength=count * facts).reshape(count, facts)
        found.append(_means(table, times.astype(np.float64)))
    return np.concatenate(found) if found else np.empty((0, table.shape[1]))


def _middle(values: NDArray[np.float64]) -> tuple[float, float]:
    """Within which the middle 95 % of them lie; a draw that met no value does not count."""
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def _text(number: float) -> str:
    if math.isnan(number):
        return "-"
    return f"{number:.1f}" if abs(number) >= 100 else f"{number:.3f}"


def _aligned(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    )


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [head, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], f"|{'---|' * len(head)}", *lines[1:]])
