"""What a search varies: places of a recipe that hold a range instead of a number.

    weight: {search: [0.0, 1.0]}                  a number in between
    density: {search: [0.05, 1.0], log: true}     evenly in the logarithm
    lambda: {search: [0.5, 1.5], step: 0.25}      on a grid
    weight: {search: [0.0, 1.0], gradient: 4}     a gradient over the layers with four points
    t: {choices: [0.3, 0.5, 0.7]}                 one of these, which may be any values
    weight: {search: [0, 1], name: w}             the same number wherever the name is w

Places may be anywhere in a recipe, filters and slices included. A number is called by its key:
`models[0].parameters.weight`, and `models[0].parameters.weight[2]` for a point of a gradient.

Torch-free.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cl_fast.documents import kind_of
from cl_fast.errors import RecipeError
from cl_fast.merging.methods import NUMBERS, suggest

__all__ = ["Number", "Space", "find_space", "place"]

_KEYS = {"search": ("search", "log", "step", "gradient", "name"), "choices": ("choices", "name")}
_MOST_POINTS = 64
_MOST_STEPS = 1_000_000


@dataclass(frozen=True, slots=True)
class Number:
    """One thing that is varied.

    name: how trials call it. low, high, log, step: of a range. choices: values instead.
    """

    name: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    choices: tuple[Any, ...] | None = None

    @property
    def grid(self) -> list[Any] | None:
        """Every value that it can have; None for a range without steps."""
        if self.choices is not None:
            return list(range(len(self.choices)))
        if self.low == self.high:
            return [self.low]
        if self.step is None:
            return None
        count = math.floor((self.high - self.low) / self.step * (1 + 1e-12) + 1e-9) + 1
        return [self.low + i * self.step for i in range(count)]

    @property
    def words(self) -> str:
        """What it may be, for people."""
        if self.choices is not None:
            return "one of " + ", ".join(map(str, self.choices))
        more = ", in the logarithm" if self.log else ""
        more += f", in steps of {self.step:g}" if self.step is not None else ""
        return f"{self.low:g} to {self.high:g}{more}"


@dataclass(frozen=True, slots=True)
class Space:
    """A recipe with places.

    Attributes:
        recipe: the document, places and all.
        numbers: what is varied, in the order of the document.
    """

    recipe: dict[str, Any]
    numbers: tuple[Number, ...]

    def fill(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe with these values in its places (the position of a choice, for choices)."""
        by_name = {number.name: number for number in self.numbers}

        def value(name: str) -> Any:
            number = by_name[name]
            if number.choices is not None:
                return copy.deepcopy(number.choices[int(values[name])])
            return float(values[name])

        def walk(node: Any, path: str) -> Any:
            found = _read(node, path)
            if found is not None:
                names = [number.name for number in found[0]]
                return [value(name) for name in names] if found[1] else value(names[0])
            if isinstance(node, Mapping):
                return {key: walk(child, _join(path, key)) for key, child in node.items()}
            if isinstance(node, list):
                return [walk(child, f"{path}[{i}]") for i, child in enumerate(node)]
            return node

        filled: dict[str, Any] = walk(self.recipe, "")
        return filled

    def middles(self) -> list[dict[str, Any]]:
        """Values in the middle of the ranges, with each choice in turn."""
        middle: dict[str, Any] = {
            n.name: 0 if n.choices is not None else (n.low + n.high) / 2 for n in self.numbers
        }
        others = [
            middle | {n.name: position}
            for n in self.numbers
            for position in range(1, len(n.choices or ()))
        ]
        return [middle, *others]

    def ends(self) -> list[dict[str, Any]]:
        """All ranges at their lower end, and all at their upper end."""
        ranges = [n for n in self.numbers if n.choices is None]
        if not ranges:
            return []
        middle = self.middles()[0]
        return [middle | {n.name: n.low for n in ranges}, middle | {n.name: n.high for n in ranges}]

    def one_by_one(self, values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The middle with one of these values after the other."""
        middle = self.middles()[0]
        for number in self.numbers:
            if number.choices is None:
                yield middle | {number.name: values[number.name]}

    def told(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values as people read them: choices instead of their positions."""
        return {
            n.name: n.choices[int(values[n.name])] if n.choices is not None else values[n.name]
            for n in self.numbers
            if n.name in values
        }

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(number) for number in self.numbers]


def find_space(recipe: Mapping[str, Any]) -> Space:
    """The places of a recipe.

    Raises:
        RecipeError: a place is malformed; the message names its key.
    """
    found: dict[str, Number] = {}

    def walk(node: Any, path: str) -> None:
        read = _read(node, path)
        if read is not None:
            for number in read[0]:
                _check_bounds(number, path)
                known = found.setdefault(number.name, number)
                if known != number:
                    raise RecipeError(
                        f"{path}: {number.name!r} is {number.words} here and {known.words} "
                        "before; one name is one number"
                    )
        elif isinstance(node, Mapping):
            _check_misspelt(node, path)
            for key, child in node.items():
                walk(child, _join(path, key))
        elif isinstance(node, list):
            for i, child in enumerate(node):
                walk(child, f"{path}[{i}]")

    walk(recipe, "")
    return Space(copy.deepcopy(dict(recipe)), tuple(found.values()))


def _check_bounds(number: Number, path: str) -> None:
    """Raises where an end of a range, or a choice, is no value of the parameter of that name."""
    found = re.search(r"(?:^|\.)parameters\.(\w+)(?:\[\d+\](?:\.value)?)?$", path)
    bounds = NUMBERS.get(found[1]) if found is not None else None
    if found is None or bounds is None:
        return
    for value in (number.low, number.high) if number.choices is None else number.choices:
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if real and not bounds.allows(value):
            raise RecipeError(f"{path}: {found[1]} must be {bounds.allowed}; got {value}")


def _check_misspelt(node: Mapping[Any, Any], path: str) -> None:
    """Raises for {serch: [0, 1], gradient: 4}, which would be read as a value of the recipe."""
    beside = {key for keys in _KEYS.values() for key in keys}
    others = [key for key in node if key not in beside]
    if len(others) != 1 or not isinstance(node[others[0]], list):
        return
    hint = suggest(str(others[0]), tuple(_KEYS))
    if hint:
        raise RecipeError(f"{path}: unknown key {others[0]!r}{hint}")


def place(recipe: dict[str, Any], path: str, value: Any) -> None:
    """Puts `value` at `path` ("models[0].parameters.weight") of a document, making mappings.

    Raises:
        RecipeError: there is no such place.
    """
    parts = re.findall(r"[^.\[\]]+|\[\d+\]", path)
    if not parts or "".join(parts).replace("[", "").replace("]", "") != re.sub(
        r"[.\[\]]", "", path
    ):
        raise RecipeError(f"space: {path!r} is no key of a recipe")
    node: Any = recipe
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        key: Any = int(part[1:-1]) if part.startswith("[") else part
        fits = (
            isinstance(node, list) and isinstance(key, int) and key < len(node)
            if isinstance(key, int)
            else isinstance(node, dict)
        )
        if not fits:
            raise RecipeError(f"space: {path!r} leads nowhere in the recipe (at {part!r})")
        if last:
            node[key] = value
        elif isinstance(node, dict):
            node = node.setdefault(key, {})
        else:
            node = node[key]


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _read(node: Any, path: str) -> tuple[list[Number], bool] | None:
    """The numbers of a place, and whether it is a gradient; None for what is no place."""
    if not isinstance(node, Mapping) or not ("search" in node or "choices" in node):
        return None
    kind = "search" if "search" in node else "choices"
    for key in node:
        if key not in _KEYS[kind]:
            raise RecipeError(f"{path}: {key!r} is unknown beside {kind}; {_listed(kind)}")
    name = node.get("name", path)
    if not isinstance(name, str) or not name:
        raise RecipeError(f"{path}.name: must be text; got {kind_of(name)}")
    if kind == "choices":
        choices = node["choices"]
        if not isinstance(choices, list) or not choices:
            raise RecipeError(f"{path}.choices: must be a list of values; got {kind_of(choices)}")
        return [Number(name, choices=tuple(choices))], False
    low, high = _range(node["search"], path)
    log, step, points = node.get("log", False), node.get("step"), node.get("gradient")
    if not isinstance(log, bool):
        raise RecipeError(f"{path}.log: must be true or false; got {kind_of(log)}")
    if log and low <= 0:
        raise RecipeError(f"{path}.search: must begin above 0 with log: true; got {low:g}")
    if step is not None:
        if log:
            raise RecipeError(f"{path}: step and log contradict each other; give one of them")
        step = _real(step, f"{path}.step")
        if not (0 < step <= max(high - low, step) and (high - low) / step <= _MOST_STEPS):
            raise RecipeError(f"{path}.step: must be above 0, and not too small; got {step:g}")
    if points is None:
        return [Number(name, low, high, log, step)], False
    if type(points) is not int or not 2 <= points <= _MOST_POINTS:
        raise RecipeError(
            f"{path}.gradient: must be the number of points, 2 to {_MOST_POINTS}; got {points!r}"
        )
    return [Number(f"{name}[{i}]", low, high, log, step) for i in range(points)], True


def _listed(kind: str) -> str:
    return f"a place has {', '.join(_KEYS[kind])}"


def _range(value: Any, path: str) -> tuple[float, float]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise RecipeError(f"{path}.search: must be [low, high]; got {value!r}")
    low, high = (_real(end, f"{path}.search") for end in value)
    if low > high:
        raise RecipeError(f"{path}.search: goes down, [{low:g}, {high:g}]; write the lower first")
    return low, high


def _real(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RecipeError(f"{where}: must be a number; got {kind_of(value)}")
    return float(value)
