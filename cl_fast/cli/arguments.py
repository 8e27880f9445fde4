"""The types of arguments, and the options that several commands share."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cl_fast.errors import ClFastError

__all__ = [
    "backend",
    "called",
    "command",
    "dry_run",
    "execution",
    "execution_options",
    "local",
    "local_text",
    "place",
    "positive",
    "reading",
    "seed",
    "size",
    "take_late",
    "talk",
    "threads",
]

@contextmanager
def called(names: Mapping[str, str]) -> Iterator[None]:
    """Errors that begin with a key of `names`, as of a recipe, begin with its value instead."""
    try:
        yield
    except ClFastError as error:
        for key, name in names.items():
            found = re.match(rf"{re.escape(key)}(\.\w+)*: ", str(error))
            if found:
                error.args = (f"{name}: {str(error)[found.end() :]}",)
                break
        raise


_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", 1):
    _UNITS |= {_letter: 1000**_power, f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power}


def execution(parser: argparse.ArgumentParser) -> None:
    """Options of everything that writes a checkpoint."""
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true", help="continue an unfinished merge, if there is one"
    )
    existing.add_argument(
        "--restart", action="store_true", help="throw an unfinished merge away and begin again"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an existing output, once the new one is complete",
    )
    threads(parser)
    parser.add_argument(
        "--memory", type=size, metavar="SIZE", help="bound on the working memory, as 256MB"
    )
    reading(parser)
    parser.add_argument(
        "--nan",
        choices=("refuse", "propagate", "zero"),
        default="refuse",
        help="NaN or infinity in an input: an error, kept, or taken for no change "
        "(default: refuse)",
    )
    parser.add_argument(
        "--no-fsync",
        action="store_true",
        help="do not wait for the disk; a power failure may then damage a finished output",
    )
    backend(parser)
    talk(parser)


def threads(parser: argparse.ArgumentParser) -> None:
    """How many threads work."""
    parser.add_argument("--threads", type=positive, metavar="N", help="default: all cores")


def reading(parser: argparse.ArgumentParser) -> None:
    """How files are read."""
    parser.add_argument(
        "--io",
        choices=("auto", "mmap", "pread", "direct"),
        default="auto",
        help="how inputs are read; direct goes past the page cache (default: auto)",
    )


def backend(parser: argparse.ArgumentParser) -> None:
    """What computes."""
    parser.add_argument(
        "--backend", choices=("native", "eager"), help="default: native where it is built"
    )


def dry_run(parser: argparse.ArgumentParser) -> None:
    """Whether anything is done at all."""
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be done, write nothing"
    )


def talk(parser: argparse.ArgumentParser) -> None:
    """How much is said."""
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("--quiet", action="store_true", help="say nothing but errors")
    volume.add_argument("--verbose", action="store_true", help="show the traceback of an error")


def take_late(arguments: argparse.Namespace, rest: list[str]) -> list[str]:
    """Gives words that stand behind options to the positional that may be left out or repeated.

    argparse settles such a positional at the first option. A command names it by
    `set_defaults(late=(name, type))`. Returns what nobody takes: all of `rest`, if there is an
    option or one word too many in it.
    """
    name, kind = getattr(arguments, "late", (None, str))
    cut = rest.index("--") if "--" in rest else len(rest)
    words = rest[:cut] + rest[cut + 1 :]
    if name is None or any(word.startswith("-") for word in rest[:cut]):
        return rest
    held = getattr(arguments, name)
    if isinstance(held, list):
        held += map(kind, words)
    elif held is None and len(words) == 1:
        setattr(arguments, name, kind(words[0]))
    else:
        return rest
    return []


def size(text: str) -> int:
    """A number of bytes, as 256MB or 5GiB."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it as 256MB or 5GiB")
    value = int(float(match[1]) * _UNITS[match[2].upper()])
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than one byte")
    return value


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def place(text: str) -> Path | str:
    """A path, or a URL as it is."""
    return text if "://" in text else Path(text)


def local(text: str) -> Path:
    """A path. A URL is refused; it is not repeated, as it may hold a secret."""
    if "://" in text:
        raise argparse.ArgumentTypeError(
            "URLs are not taken here; give a path (docs/remote-storage.md tells which command "
            "takes URLs where)"
        )
    return Path(text)


def local_text(text: str) -> str:
    """A path, as it was written."""
    local(text)
    return text


def seed(text: str) -> int:
    """A whole number from 0 to 2**64 - 1."""
    if not text.isascii() or not text.isdigit() or int(text) >= 1 << 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2**64 - 1")
    return int(text)


def command(text: str) -> list[str]:
    """A command in which {} stands for a folder."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    if not any("{}" in word for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} does not say {{}} where the folder goes")
    return words


def execution_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `execution` as keywords of `cl_fast.merging.execute`."""
    return {
        "threads": arguments.threads,
        "memory": arguments.memory,
        "io": arguments.io,
        "nan": arguments.nan,
        "resume": arguments.resume,
        "restart": arguments.restart,
        "overwrite": arguments.overwrite,
        "fsync": not arguments.no_fsync,
        "backend": arguments.backend,
    }
