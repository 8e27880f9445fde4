"""Merging: recipes, plans, the engine that executes them, and the same methods in memory.

On disk::

    plan = make_plan(load_recipe("recipe.yml"), "merged/")
    execute(plan)
    apply_patch("base/", "edits.safetensors", "edited/")

In memory, on state dicts and modules: :func:`linear`, :func:`task_arithmetic`, :func:`ties`,
:func:`dare_linear`, :func:`dare_ties`, :func:`uniform_soup`, :func:`greedy_soup`.

Each name is imported when it is first used, so that planning loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_fast.merging.description import describe
    from cl_fast.merging.engine import execute
    from cl_fast.merging.methods import METHODS, Method, make_policy
    from cl_fast.merging.patches import apply_patch
    from cl_fast.merging.plan import Plan, make_plan
    from cl_fast.merging.recipe import Recipe, load_recipe, parse_recipe
    from cl_fast.merging.soup import greedy_soup, uniform_soup
    from cl_fast.merging.state_dicts import (
        dare_linear,
        dare_ties,
        linear,
        task_arithmetic,
        ties,
    )

_HOME = {
    "METHODS": "methods",
    "Method": "methods",
    "Plan": "plan",
    "Recipe": "recipe",
    "apply_patch": "patches",
    "dare_linear": "state_dicts",
    "dare_ties": "state_dicts",
    "describe": "description",
    "execute": "engine",
    "greedy_soup": "soup",
    "linear": "state_dicts",
    "load_recipe": "recipe",
    "make_plan": "plan",
    "make_policy": "methods",
    "parse_recipe": "recipe",
    "task_arithmetic": "state_dicts",
    "ties": "state_dicts",
    "uniform_soup": "soup",
}

__all__ = [
    "METHODS",
    "Method",
    "Plan",
    "Recipe",
    "apply_patch",
    "dare_linear",
    "dare_ties",
    "describe",
    "execute",
    "greedy_soup",
    "linear",
    "load_recipe",
    "make_plan",
    "make_policy",
    "parse_recipe",
    "task_arithmetic",
    "ties",
    "uniform_soup",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
