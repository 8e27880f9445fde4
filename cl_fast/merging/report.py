"""Writing a comparison: the page and the JSON file, each whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from cl_fast.checkpoints.writing import write_whole
from cl_fast.errors import OutputError, RecipeError
from cl_fast.merging.diff import MOST_MODELS, Comparison, compare

if TYPE_CHECKING:
    from cl_fast.merging.diff import Progress
    from cl_fast.merging.plan import Plan

__all__ = ["check_merge_report", "check_report", "merge_report", "write_json", "write_page"]


def check_report(path: Path, suffix: str, *, overwrite: bool) -> None:
    """Raises OutputError if a report cannot go to `path`, before anything is read."""
    if path.suffix.lower() != suffix:
        raise OutputError(f"{path}: a report of this kind needs a name that ends in {suffix}")
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; name the file to write")
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: exists already; choose another name or give --overwrite")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise OutputError(f"{path}: its folder {parent} does not exist; make it first")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{path}: its folder {parent} cannot be written to")


def write_page(comparison: Comparison, path: Path, *, title: str | None = None) -> None:
    """Writes the HTML page. Raises OutputError."""
    from cl_fast.merging.diff_page import page

    write_whole(path, [page(comparison, title=title).encode()])


def write_json(comparison: Comparison, path: Path) -> None:
    """Writes the JSON file. Raises OutputError."""
    write_whole(path, [comparison.to_json().encode("utf-8", "replace")])


def check_merge_report(plan: Plan, path: Path, *, overwrite: bool) -> None:
    """Raises unless `merge_report` can be written once `plan` was carried out.

    Raises:
        RecipeError: the recipe names no base, or too many models.
        OutputError: the file exists, or its folder does not.
    """
    if not plan.has_base and plan.recipe.base_model is None:
        raise RecipeError(
            f"--report: merge_method {plan.recipe.merge_method!r} has no base to compare with; "
            "name base_model in the recipe, or compare by cl-fast diff BASE MODEL ..."
        )
    if len(plan.models) >= MOST_MODELS:
        raise RecipeError(
            f"--report: compares at most {MOST_MODELS} models, the result among them; the recipe "
            f"has {len(plan.models)}. Compare a part of them by cl-fast diff"
        )
    check_report(path, ".html", overwrite=overwrite)
    check_report(path.with_suffix(".json"), ".json", overwrite=overwrite)


def merge_report(
    plan: Plan,
    path: Path,
    *,
    threads: int | None = None,
    backend: str | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compares the base of a merge with its models and its result; writes `path` and its JSON.

    Args:
        plan: that was carried out.
        path: of the page; the JSON file has its name, with .json.
        threads, backend, progress: as in `compare`.

    Raises:
        CheckpointError, OutputError: see `compare` and `check_report`.
    """
    inputs = list(plan.inputs)
    base = inputs.pop(0) if plan.has_base else plan.recipe.base_model
    assert base is not None
    comparison = compare(
        base, [*inputs, plan.output], threads=threads, backend=backend, progress=progress
    )
    write_page(comparison, path, title=f"The merge {plan.output.name}")
    write_json(comparison, path.with_suffix(".json"))
    return comparison
