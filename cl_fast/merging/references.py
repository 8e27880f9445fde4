"""How a recipe names a model: a text, or the mapping that mergekit's recipes have for one.

    models/one                       a folder or file
    org/name@revision                a model of the hub
    BASE+ADAPTER                     a model with a LoRA adapter on it

    model:                           the same as mappings
      model: {path: org/name, revision: main}
      lora: {path: adapters/one}

Everything behind the recipe works with the text.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cl_fast.errors import RecipeError

__all__ = ["NO_ARCHITECTURE", "BadReference", "reference_text", "term_names"]

#: Why mergekit's override_architecture is refused, wherever it stands.
NO_ARCHITECTURE = (
    "has no counterpart: tensors and layers are found by their names, whatever the architecture is "
    "called, and config.json's 'architectures' is kept; remove it (and change 'architectures' in "
    "the output if another class shall load it)"
)


class BadReference(RecipeError):
    """A reference that cannot be understood; the message has no key yet."""


def reference_text(value: Any) -> Any:
    """The text of a reference; what is neither a mapping nor a path is given back as it is.

    Raises:
        BadReference: a mapping that names no model, or says what has no meaning here.
    """
    if isinstance(value, Path):
        return os.fspath(value)
    if not isinstance(value, Mapping):
        return value
    if "path" in value:
        return _path(value, "")
    known = {"model", "lora", "override_architecture"}
    if unknown := [key for key in value if key not in known]:
        raise BadReference(
            f"a reference has 'model' and 'lora', or 'path' and 'revision'; got {unknown[0]!r}"
        )
    if value.get("override_architecture") is not None:
        raise BadReference(f"override_architecture {NO_ARCHITECTURE}")
    if value.get("model") is None:
        raise BadReference("a reference needs a 'model' (a text, or 'path' and 'revision')")
    text = _path(value["model"], "model")
    if value.get("lora") is not None:
        text += f"+{_path(value['lora'], 'lora')}"
    return text


def _path(value: Any, name: str) -> str:
    where = f"{name}: " if name else ""
    if isinstance(value, str):
        return value
    from cl_fast.documents import kind_of  # it brings YAML, which planning does without

    if not isinstance(value, Mapping) or not isinstance(value.get("path"), str):
        raise BadReference(f"{where}must be a path, or 'path' and 'revision'; got {kind_of(value)}")
    if unknown := [key for key in value if key not in ("path", "revision")]:
        raise BadReference(f"{where}has 'path' and 'revision'; got {unknown[0]!r}")
    revision = value.get("revision")
    if revision is None:
        return str(value["path"])
    if not isinstance(revision, str):
        raise BadReference(f"{where}revision must be text; got {kind_of(revision)}")
    return f"{value['path']}@{revision}"


def term_names(references: Sequence[str]) -> tuple[str, ...]:
    """The names that key the random streams of the models, one per reference.

    The last component of the path; where two references share it, the whole reference as written
    without a trailing slash; a reference that comes again gets ``#2``, ``#3``, ...
    """
    stripped = [reference.rstrip("/") or reference for reference in references]
    short = [text if Path(text).name in ("", "..") else Path(text).name for text in stripped]
    owners: dict[str, set[str]] = {}
    for name, text in zip(short, stripped, strict=True):
        owners.setdefault(name, set()).add(text)
    names, seen = [], dict[str, int]()
    for name, text in zip(short, stripped, strict=True):
        unique = name if len(owners[name]) == 1 else text
        seen[unique] = seen.get(unique, 0) + 1
        names.append(unique if seen[unique] == 1 else f"{unique}#{seen[unique]}")
    return tuple(names)
