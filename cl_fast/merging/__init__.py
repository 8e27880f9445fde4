"""Merging: recipes, plans, the engine that executes them, and the same methods in memory.

On disk::

    plan = make_plan(load_recipe("recipe.yml"), "merged/")
    execute(plan)
    apply_patch("base/", "edits.safetensors", "edited/")

Beside a merge: :func:`compare`, :func:`pack_delta` and :func:`apply_delta`, :func:`merge_adapters`,
:func:`extract_adapter`, ``search.search``, :func:`collect_fisher`, :func:`collect_gram`.

In memory, on state dicts and modules: a function for each method (:func:`linear`, :func:`ties`,
...), :func:`uniform_soup`, :func:`greedy_soup`.

Each name is imported when it is first used, so that planning loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_fast.merging.composing import Composition, merge_adapters
    from cl_fast.merging.deltas import apply_delta, check_delta, pack_delta, unpack_delta
    from cl_fast.merging.description import describe
    from cl_fast.merging.diff import Comparison, compare
    from cl_fast.merging.engine import execute
    from cl_fast.merging.extracting import Extraction, extract_adapter
    from cl_fast.merging.methods import METHODS, Method, make_policy
    from cl_fast.merging.patches import apply_patch
    from cl_fast.merging.plan import Plan, make_plan
    from cl_fast.merging.recipe import Recipe, load_recipe, parse_recipe
    from cl_fast.merging.search import SearchResult, Study, load_study
    from cl_fast.merging.soup import greedy_soup, uniform_soup
    from cl_fast.merging.stages import Stage, load_stages, merge_stages, plan_stages
    from cl_fast.merging.state_dicts import (
        breadcrumbs,
        breadcrumbs_ties,
        dare_linear,
        dare_ties,
        della,
        della_linear,
        fisher,
        karcher,
        linear,
        model_stock,
        multislerp,
        nuslerp,
        regmean,
        sce,
        slerp,
        task_arithmetic,
        ties,
    )
    from cl_fast.merging.statistics import collect_fisher, collect_gram

_HOME = {
    "Comparison": "diff",
    "Composition": "composing",
    "Extraction": "extracting",
    "METHODS": "methods",
    "Method": "methods",
    "Plan": "plan",
    "Recipe": "recipe",
    "SearchResult": "search",
    "Stage": "stages",
    "Study": "search",
    "apply_delta": "deltas",
    "apply_patch": "patches",
    "breadcrumbs": "state_dicts",
    "breadcrumbs_ties": "state_dicts",
    "check_delta": "deltas",
    "collect_fisher": "statistics",
    "collect_gram": "statistics",
    "compare": "diff",
    "dare_linear": "state_dicts",
    "dare_ties": "state_dicts",
    "della": "state_dicts",
    "della_linear": "state_dicts",
    "describe": "description",
    "execute": "engine",
    "extract_adapter": "extracting",
    "fisher": "state_dicts",
    "greedy_soup": "soup",
    "karcher": "state_dicts",
    "linear": "state_dicts",
    "load_recipe": "recipe",
    "load_stages": "stages",
    "load_study": "search",
    "make_plan": "plan",
    "make_policy": "methods",
    "merge_adapters": "composing",
    "merge_stages": "stages",
    "model_stock": "state_dicts",
    "multislerp": "state_dicts",
    "nuslerp": "state_dicts",
    "pack_delta": "deltas",
    "parse_recipe": "recipe",
    "plan_stages": "stages",
    "regmean": "state_dicts",
    "sce": "state_dicts",
    "slerp": "state_dicts",
    "task_arithmetic": "state_dicts",
    "ties": "state_dicts",
    "uniform_soup": "soup",
    "unpack_delta": "deltas",
}

__all__ = [
    "METHODS",
    "Comparison",
    "Composition",
    "Extraction",
    "Method",
    "Plan",
    "Recipe",
    "SearchResult",
    "Stage",
    "Study",
    "apply_delta",
    "apply_patch",
    "breadcrumbs",
    "breadcrumbs_ties",
    "check_delta",
    "collect_fisher",
    "collect_gram",
    "compare",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "describe",
    "execute",
    "extract_adapter",
    "fisher",
    "greedy_soup",
    "karcher",
    "linear",
    "load_recipe",
    "load_stages",
    "load_study",
    "make_plan",
    "make_policy",
    "merge_adapters",
    "merge_stages",
    "model_stock",
    "multislerp",
    "nuslerp",
    "pack_delta",
    "parse_recipe",
    "plan_stages",
    "regmean",
    "sce",
    "slerp",
    "task_arithmetic",
    "ties",
    "uniform_soup",
    "unpack_delta",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
