"""What `learn` found: scores after every task, and the numbers read off them.

report.matrix      the transfer matrix, `cl_fast.training.metrics.TransferMatrix`
report.average, .backward, .forward, .forgetting, .learning_accuracy
report.to_markdown(), .to_json(), .plot(path), .save(folder); print(report)
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from cl_fast.errors import CheckpointError
from cl_fast.training.metrics import TransferMatrix

__all__ = ["Report"]

_SUMMARY = {
    "average": "average",
    "learning_accuracy": "learned",
    "backward": "backward transfer",
    "forward": "forward transfer",
    "forgetting": "forgetting",
}


@dataclass
class Report:
    """Scores of a stream of tasks, higher is better.

    Attributes:
        matrix: scores of the tasks before, and after each of them.
        metric: what a score is.
        probes: scores of what is never trained on: the name of a probe, then what it was after
            "before" and after each task.
        seconds: of training, per task.
        merged: scores of tasks and probes by the merged model, where one was asked for.
        merge: how it was merged, in words.
        sequential: whether a task starts from the model after the one before it; else there is no
            transfer, and nothing to forget.
        model: what came out: the merged model, or the one that was trained. Not saved.
    """

    matrix: TransferMatrix
    metric: str = "score"
    probes: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    merged: dict[str, float] = field(default_factory=dict)
    merge: str = ""
    sequential: bool = True
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    @property
    def average(self) -> float:
        return self.matrix.average

    @property
    def backward(self) -> float:
        return self.matrix.backward if self.sequential else math.nan

    @property
    def forward(self) -> float:
        return self.matrix.forward if self.sequential else math.nan

    @property
    def forgetting(self) -> float:
        return self.matrix.forgetting if self.sequential else math.nan

    @property
    def learning_accuracy(self) -> float:
        return self.matrix.learning_accuracy

    def summary(self) -> dict[str, float]:
        """The numbers that are defined: of one task there is no transfer."""
        numbers = {words: getattr(self, name) for name, words in _SUMMARY.items()}
        return {words: number for words, number in numbers.items() if not math.isnan(number)}

    def kept(self, probe: str) -> float:
        """The last score of a probe over its score before any training."""
        scores = self.probes[probe]
        last = scores.get(self.matrix.tasks[len(self.matrix.rows) - 1], math.nan)
        return last / scores["before"] if scores.get("before") else math.nan

    def table(self) -> tuple[list[str], list[list[str]]]:
        """A heading, and a row before the training, after each task, and of the merged model."""
        tasks = list(self.matrix.tasks)
        head = ["after", *tasks, *self.probes]
        named = {"before": self.matrix.before, **dict(zip(tasks, self.matrix.rows, strict=False))}
        rows = [
            [
                where,
                *map(_text, scores),
                *(_text(p.get(where, math.nan)) for p in self.probes.values()),
            ]
            for where, scores in named.items()
        ]
        if self.merged:
            found = [self.merged.get(name, math.nan) for name in head[1:]]
            rows.append([f"merged: {self.merge}", *map(_text, found)])
        return head, rows

    def to_markdown(self) -> str:
        head, rows = self.table()
        lines = [
            f"Scores ({self.metric}; higher is better) on each column after each row:",
            "",
            f"| {' | '.join(_cell(x) for x in head)} |",
            f"|{'---|' * len(head)}",
            *(f"| {' | '.join(_cell(x) for x in row)} |" for row in rows),
        ]
        if summary := self.summary():
            lines += ["", f"| {' | '.join(summary)} |", f"|{'---|' * len(summary)}"]
            lines += [f"| {' | '.join(map(_text, summary.values()))} |"]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        head, rows = self.table()
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [
            "  ".join(
                x.ljust(w) if i == 0 else x.rjust(w)
                for i, (x, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in [head, *rows]
        ]
        told = ", ".join(f"{words} {_text(number)}" for words, number in self.summary().items())
        return "\n".join([*lines, told] if told else lines)

    def to_json(self) -> dict[str, Any]:
        """All of it but the model, in JSON's types; what was not measured is None."""
        return {
            "metric": self.metric,
            "tasks": list(self.matrix.tasks),
            "before": [_number(x) for x in self.matrix.before],
            "rows": [[_number(x) for x in row] for row in self.matrix.rows],
            "probes": {k: {w: _number(x) for w, x in v.items()} for k, v in self.probes.items()},
            "seconds": dict(self.seconds),
            "merge": self.merge,
            "sequential": self.sequential,
            "merged": {k: _number(x) for k, x in self.merged.items()},
            "summary": self.summary(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Report:
        """What `to_json` gave."""
        try:
            matrix = TransferMatrix(
                content["tasks"],
                [_read(x) for x in content["before"]],
                [[_read(x) for x in row] for row in content["rows"]],
            )
            return cls(
                matrix,
                content["metric"],
                {k: {w: _read(x) for w, x in v.items()} for k, v in content["probes"].items()},
                dict(content["seconds"]),
                {k: _read(x) for k, x in content["merged"].items()},
                content["merge"],
                content["sequential"],
            )
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"this is no report of cl_fast.learn: {error}") from error

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """The report that `learn` left in its folder."""
        path = Path(folder) / "report.json"
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist: no task is finished there") from None
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{path} is not JSON: {error}") from error

    def save(self, folder: str | Path, *, picture: bool = True) -> None:
        """report.json, report.md and, with `picture`, report.png (needs matplotlib)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "report.json", json.dumps(self.to_json(), indent=1) + "\n")
        _write(folder / "report.md", self.to_markdown())
        if picture:
            self.plot(folder / "report.png")

    def plot(self, path: str | Path) -> None:
        """The transfer matrix as a heat map."""
        from matplotlib.figure import Figure

        head, rows = self.table()
        values = [[math.nan if x == "-" else float(x) for x in row[1:]] for row in rows]
        width = max(5.0, 1.6 + 0.8 * len(head))
        figure = Figure(figsize=(width, 1.8 + 0.5 * len(rows)), layout="constrained")
        axes = figure.subplots()
        finite = [x for row in values for x in row if math.isfinite(x)]
        low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
        image = axes.imshow(values, cmap="viridis", vmin=low, vmax=high, aspect="auto")
        axes.set_xticks(range(len(head) - 1), head[1:], rotation=30, ha="right")
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.set_ylabel("after")
        for y, row in enumerate(rows):
            for x, text in enumerate(row[1:]):
                dark = math.isnan(values[y][x]) or values[y][x] < (low + high) / 2
                axes.text(x, y, text, ha="center", va="center", color="white" if dark else "black")
        if len(rows) > 1:
            axes.axhline(0.5, color="white", linewidth=3)  # before the training | after tasks
        if self.probes:
            axes.axvline(len(self.matrix.tasks) - 0.5, color="white", linewidth=3)
        told = ", ".join(f"{k} {_text(v)}" for k, v in self.summary().items())
        axes.set_title(textwrap.fill(told, int(11 * width)), fontsize=9)
        figure.colorbar(image, label=self.metric)
        figure.savefig(Path(path), dpi=150)


def _text(number: float) -> str:
    return "-" if math.isnan(number) else f"{number:.3f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _number(x: float) -> float | None:
    return None if math.isnan(x) else x


def _read(x: float | None) -> float:
    return math.nan if x is None else float(x)


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
