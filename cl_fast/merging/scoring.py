"""Scores of checkpoints by what the user gives: a command, or a Python function.

A command is run without a shell, `{}` in its words is the folder of the checkpoint, and the last
number on its standard output is the score. A function is named `module:function`.
"""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cl_fast.errors import ClFastError, RecipeError

__all__ = ["EvaluationError", "find_function", "score_by_command"]

_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]*\w)"
    r"|(?<![\w.])[-+]?(?:nan|inf|infinity)(?![\w.])",
    re.IGNORECASE,
)


class EvaluationError(ClFastError):
    """A command gave no score for a checkpoint; another checkpoint may well have one."""


def score_by_command(command: Sequence[str], folder: Path, where: str = "--evaluate") -> float:
    """The last number on the standard output of the user's command for `folder`.

    Args:
        command: its words; `{}` is replaced by the folder.
        folder: the checkpoint.
        where: the option or key that gave the command, for messages.

    Raises:
        ClFastError: the command does not start.
        EvaluationError: it ended with another code than 0, or printed no number.
    """
    filled = [word.replace("{}", str(folder)) for word in command]
    try:
        done = subprocess.run(filled, stdout=subprocess.PIPE, text=True, check=False)
    except OSError as error:
        raise ClFastError(f"{where}: {filled[0]} does not start: {error.strerror}") from error
    if done.returncode != 0:
        raise EvaluationError(f"{where}: {shlex.join(filled)} ended with code {done.returncode}")
    numbers = _NUMBER.findall(done.stdout)
    if not numbers:
        raise EvaluationError(f"{where}: {shlex.join(filled)} printed no number")
    return float(numbers[-1])


def find_function(name: str, beside: Path | None = None) -> Callable[..., Any]:
    """The function that `module:function` names.

    Args:
        name: of it.
        beside: a folder that modules are looked for in, after the working directory.

    Raises:
        RecipeError: there is no such module or function.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise RecipeError(f"function: {name!r} must be written as module:function")
    for folder in (beside, Path.cwd()):
        if folder is not None and str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise RecipeError(f"function: {module_name!r} cannot be imported: {error}") from error
    for part in function_name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise RecipeError(f"function: {module_name!r} has no function {function_name!r}")
    function: Callable[..., Any] = found
    return function
