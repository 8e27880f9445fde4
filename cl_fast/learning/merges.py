"""The merge at the end of a stream: the models after each task, combined by `cl_fast.merging`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from cl_fast import merging

__all__ = ["Merge", "check_merge", "merge_tasks"]

StateDict: TypeAlias = Mapping[str, Tensor]
Merge: TypeAlias = str | Callable[[StateDict, Mapping[str, StateDict]], StateDict]

_METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "greedy")


def check_merge(merge: Merge | None, options: Mapping[str, Any]) -> None:
    """Raise unless `merge_tasks` can be called with these.

    Raises:
        ValueError: an unknown method, or options that it does not take.
    """
    if merge is None or callable(merge):
        if options:
            raise ValueError(f"merge_options has no effect with merge={merge!r}")
        return
    if merge not in _METHODS:
        raise ValueError(f"merge must be a function or one of {', '.join(_METHODS)}; got {merge!r}")
    function: Any = merging.greedy_soup if merge == "greedy" else getattr(merging, merge)
    parameters = inspect.signature(function).parameters
    taken = {"out_dtype", "into", "output", "scores"}
    known = {k for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY} - taken
    for key in options:
        if key not in known:
            raise ValueError(f"merge_options has {key!r}; {merge} takes {sorted(known)}")
    for key, parameter in parameters.items():
        required = parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
        if required and key not in options:
            raise ValueError(f"merge={merge!r} needs merge_options={{{key!r}: ...}}")


def merge_tasks(
    merge: Merge,
    options: Mapping[str, Any],
    base: StateDict,
    models: Mapping[str, StateDict],
    score: Callable[[StateDict], float],
) -> tuple[StateDict, str]:
    """The merged state dict, and how it was made in words."""
    if callable(merge):
        return merge(base, models), getattr(merge, "__name__", "a function")
    if merge == "greedy":
        soup = merging.greedy_soup(dict(models), score, **options)
        assert soup.state_dict is not None
        return soup.state_dict, f"greedy soup of {', '.join(soup.chosen)}"
    if merge == "linear":
        return merging.linear(dict(models), **options), merge
    return getattr(merging, merge)(base, dict(models), **options), merge
