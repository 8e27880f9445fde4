"""Writing a comparison: the page and the JSON file, each whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from cl_fast.checkpoints.writing import write_whole
from cl_fast.errors import OutputError, RecipeError
from cl_fast.merging.diff import MOST_MODELS, Comparison, compare
from cl_fast.merging.slices import list_inputs

if TYPE_CHECKING:
    from cl_fast.merging.diff import Progress
    from cl_fast.merging.recipe import Recipe

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


def check_merge_report(recipe: Recipe, path: Path, *, overwrite: bool) -> None:
    """Raises unless `merge_report` can be written once `recipe` was carried out.

    Raises:
        RecipeError: the recipe names no base, more than one, or too many models.
        OutputError: the file exists, or its folder does not.
    """
    _, models = _inputs(recipe)
    if len(models) >= MOST_MODELS:
        raise RecipeError(
            f"--report: compares at most {MOST_MODELS} models, the result among them; the recipe "
            f"has {len(models)}. Compare a part of them by cl-fast diff"
        )
    check_report(path, ".html", overwrite=overwrite)
    check_report(path.with_suffix(".json"), ".json", overwrite=overwrite)


def merge_report(
    recipe: Recipe,
    output: str | Path,
    path: Path,
    *,
    threads: int | None = None,
    backend: str | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compares the base of a merge with its models and its result; writes `path` and its JSON.

    Args:
        recipe: that was carried out; output: the folder or URL of what it made.
        path: of the page; the JSON file has its name, with .json.
        threads, backend, progress: as in `compare`.

    Raises:
        CheckpointError, OutputError, RecipeError: see `compare` and `check_merge_report`.
    """
    base, models = _inputs(recipe)
    comparison = compare(
        base, [*models, output], threads=threads, backend=backend, progress=progress
    )
    write_page(comparison, path, title=f"The merge {Path(output).name}")
    write_json(comparison, path.with_suffix(".json"))
    return comparison


def _inputs(recipe: Recipe) -> tuple[str, list[str]]:
    """The base that a recipe's models are compared with, and the models, each once."""
    listing = list_inputs(recipe)
    bases = {reference for _, reference in listing.entries[: len(listing.bases)]}
    if recipe.base_model is not None:
        bases = {recipe.base_model}
    if len(bases) != 1:
        what = "several bases" if bases else "no base"
        raise RecipeError(
            f"--report: merge_method {recipe.merge_method!r} has {what} to compare with; merge "
            "without it and compare by cl-fast diff BASE MODEL ... OUTPUT"
        )
    [base] = bases
    models = dict.fromkeys(reference for _, reference in listing.entries[len(listing.bases) :])
    models.pop(base, None)
    return base, list(models)
