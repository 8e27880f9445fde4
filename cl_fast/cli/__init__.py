"""The command `cl-fast`. Thin: it parses, calls, and prints; each command is a module of its own.

Exit codes: 0 done; 1 an error, told on stderr in words; 2 wrong usage; 130 interrupted.
Nothing is imported before it is needed, so `--help` is there at once and a merge by the C++ core
loads neither torch nor numpy.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from cl_fast._version import __version__
from cl_fast.cli import adapter, delta, diff, edit, env, merge, search, soup, train, verify
from cl_fast.cli.arguments import take_late
from cl_fast.errors import ClFastError, Interrupted

__all__ = ["main"]

#: In the order of `--help`.
_COMMANDS = (merge, verify, diff, delta, soup, search, adapter, train, edit, env)

_DESCRIPTION = (
    "Merge language models at memory speed, train on without forgetting, and edit what they know."
)
_EPILOG = (
    "docs: docs/engine.md (how a merge runs), docs/merge-recipes.md (recipes and methods), "
    "docs/delta-format.md (packed deltas), docs/train-plan.md (plans of train), "
    "docs/editing.md (edit)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (None: that of the process) and returns its exit code."""
    verbose = False
    try:
        parser = _parser()
        arguments, rest = parser.parse_known_args(argv)
        try:
            rest = take_late(arguments, rest)
        except argparse.ArgumentTypeError as error:
            parser.error(str(error))
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        if arguments.command is None:
            parser.print_help()
            return 2
        verbose = getattr(arguments, "verbose", False)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return int(arguments.run(arguments))
    except (KeyboardInterrupt, Interrupted) as error:
        _complain("interrupted", error)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone: nothing more may go into the closed pipe, not even
        # what Python flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if verbose:
            raise
        if isinstance(error, ClFastError | OSError | ValueError | MemoryError):
            _complain(f"error: {error or type(error).__name__}", error)
        else:
            _complain(
                f"internal error: {type(error).__name__}: {error}; --verbose shows where", error
            )
        return 1


def _complain(words: str, error: BaseException) -> None:
    print(f"cl-fast: {words}", file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
        print(f"         {note}", file=sys.stderr)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"cl-fast: note: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cl-fast", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"cl-fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return parser
