"""Options as given: what they must be, in the same words everywhere.

    one_of("form", form, ("project", "l1"))    form must be one of 'project', 'l1'; got 'hard'
    integer("seed", seed)                      seed must be an int; got 1.5
    at_least("batch_size", size, 1)            batch_size must be at least 1; got 0
    positive("weight", weight)                 weight must be positive and finite; got 0
    not_negative("weight", weight)             weight must be 0 or more, and finite; got -1
    share("decay", decay)                      decay must be in [0, 1]; got 2

A value of another kind is a TypeError, one out of range a ValueError.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = [
    "at_least",
    "dtype_name",
    "function_name",
    "integer",
    "not_negative",
    "one_of",
    "positive",
    "share",
]


def one_of(name: str, value: Any, known: Iterable[str]) -> None:
    listed = list(known)
    if value not in listed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, listed))}; got {value!r}")


def integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int; got {value!r}")


def at_least(name: str, value: Any, least: int) -> None:
    """An int from `least` on."""
    integer(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {value!r}")


def positive(name: str, value: Any) -> None:
    _number(name, value)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite; got {value}")


def not_negative(name: str, value: Any) -> None:
    _number(name, value)
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be 0 or more, and finite; got {value}")


def share(name: str, value: Any, *, whole: bool = True) -> None:
    """A part of something: all of it too, or less."""
    _number(name, value)
    if not (0 <= value < 1 or (whole and value == 1)):
        raise ValueError(f"{name} must be in [0, 1{']' if whole else ')'}; got {value}")


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """Of a dtype in a keep's `options`: "bfloat16"."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def function_name(function: Callable[..., Any] | None) -> str | None:
    """Of a function in a keep's `options`, which cannot hold it."""
    if function is None:
        return None
    return str(getattr(function, "__qualname__", type(function).__name__))
