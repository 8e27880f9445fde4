"""YAML documents that people write: read strictly, refused in words.

Recipes of merges and plans of training are such documents. A duplicate key is an error, and `1e-3`
is a number; what is wrong is told with file, key, and line.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from cl_fast.errors import RecipeError

__all__ = ["key_path", "kind_of", "parse_document", "parse_documents", "read_document"]


def read_document(file: Path, what: str, largest: int) -> str:
    """The text of a file.

    Args:
        file: its path.
        what: "recipe" or "plan", for the words of errors.
        largest: how many bytes it may have.

    Raises:
        RecipeError: it is a folder, too large, no UTF-8, or cannot be read.
    """
    try:
        if file.is_dir():
            raise RecipeError(f"{file}: is a folder; name the {what} file in it")
        if file.stat().st_size > largest:
            raise RecipeError(f"{file}: {file.stat().st_size} bytes; not a {what}")
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 text ({error.reason} at {error.start})") from None


def parse_document(text: str, prefix: str = "") -> Any:
    """What the text says.

    Raises:
        RecipeError: it is no YAML; the message begins with `prefix`.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{prefix}not valid YAML: {_yaml_words(error)}") from None


def parse_documents(text: str, prefix: str = "") -> list[Any]:
    """What each of the documents of a text says, which lines of `---` part.

    Raises:
        RecipeError: it is no YAML; the message begins with `prefix`.
    """
    try:
        return list(yaml.load_all(text, Loader=_Loader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{prefix}not valid YAML: {_yaml_words(error)}") from None


def key_path(location: tuple[int | str, ...]) -> str:
    """models[0].weight, of a location as pydantic tells it; nothing for the whole."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part != "[key]":
            path += f".{part}" if path else str(part)
    return path


def kind_of(value: Any) -> str:
    """What a value is, in the words of YAML."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, str):
        return f"the text {value if len(value) <= 60 else value[:57] + '...'!r}"
    if isinstance(value, int | float):
        return f"the number {value}"
    return f"a {type(value).__name__}"


def _yaml_words(error: Exception) -> str:
    problem = getattr(error, "problem", None)
    mark = getattr(error, "problem_mark", None)
    words = problem or str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{words} (line {mark.line + 1}, column {mark.column + 1})" if mark else str(words)


def _construct_mapping(loader: Any, node: Any, deep: bool = False) -> dict[Hashable, Any]:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.endswith(":merge"):
                continue
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} appears twice", key_node.start_mark
                )
            seen.add(key_node.value)
    mapping: dict[Hashable, Any] = yaml.SafeLoader.construct_mapping(loader, node, deep)
    return mapping


#: Safe YAML without two traps: a duplicate key is an error, and ``1e-3`` is a number.
_Loader: Any = type("_Loader", (yaml.SafeLoader,), {"construct_mapping": _construct_mapping})
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
