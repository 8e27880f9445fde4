"""The table on the terminal and the picture beside it."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from evaluation import Score
from rich.console import Console
from rich.table import Table
from tasks import TASKS

__all__ = ["draw_picture", "print_table"]

mpl.use("Agg")

Groups = dict[str, dict[str, Score]]  # "base" | "finetuned" | "merged" -> model -> score


def print_table(groups: Groups, console: Console) -> None:
    """One row a model; the best of each column among finetuned and merged is not hidden."""
    table = Table(title="Held-out questions answered exactly", title_justify="left")
    table.add_column("model")
    for name in TASKS:
        table.add_column(name, justify="right")
    table.add_column("mean", justify="right", style="bold")
    table.add_column("perplexity of text", justify="right")
    for group, scores in groups.items():
        for model, score in scores.items():
            table.add_row(
                model if group == "base" else f"{group}: {model}",
                *(f"{score.accuracy[name]:.0%}" for name in TASKS),
                f"{score.mean:.0%}",
                f"{score.perplexity:.2f}",
            )
        table.add_section()
    console.print(table)


def draw_picture(groups: Groups, path: Path) -> None:
    """A heat map: a row a model, a column a task."""
    import matplotlib.pyplot as plt

    rows = [
        (group, model, score) for group, scores in groups.items() for model, score in scores.items()
    ]
    columns = [*TASKS, "mean"]
    gap = 0.35  # between groups, in rows
    figure, axes = plt.subplots(figsize=(7.2, 0.42 * len(rows) + 1.5), layout="constrained")
    colours = mpl.colormaps["YlGnBu"]
    y, last = 0.0, None
    for group, model, score in rows:
        if last is not None and group != last:
            y += gap
        values = [*(score.accuracy[name] for name in TASKS), score.mean]
        for x, value in enumerate(values):
            at = x + (0.15 if columns[x] == "mean" else 0)
            axes.add_patch(plt.Rectangle((at, y), 0.96, 0.92, color=colours(0.05 + 0.8 * value)))
            axes.text(
                at + 0.48, y + 0.47, f"{value:.0%}", ha="center", va="center",
                color="white" if value > 0.65 else "black",
                weight="bold" if columns[x] == "mean" else "normal",
            )  # fmt: skip
        axes.text(len(columns) + 0.6, y + 0.47, f"{score.perplexity:.2f}", ha="center", va="center")
        label = {"base": "base", "finetuned": f"finetuned on {model}", "merged": model}[group]
        axes.text(-0.1, y + 0.47, label, ha="right", va="center",
                  weight="bold" if group == "merged" else "normal")  # fmt: skip
        last = group
        y += 1
    for x, name in enumerate(columns):
        at = x + (0.15 if name == "mean" else 0)
        axes.text(at + 0.48, -0.2, name, ha="center", va="bottom")
    axes.text(len(columns) + 0.6, -0.2, "perplexity\nof text", ha="center", va="bottom")
    axes.set_xlim(-2.2, len(columns) + 1.1)
    axes.set_ylim(y, -0.9)
    axes.axis("off")
    figure.suptitle("Held-out questions answered exactly, by task", x=0.5)
    figure.savefig(path, dpi=150)
    plt.close(figure)
