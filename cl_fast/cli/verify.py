"""`cl-fast verify`: a merged folder checked against its record."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from cl_fast.cli.arguments import local, talk, threads
from cl_fast.cli.progress import Progress

__all__ = ["add"]


def add(commands: Any) -> None:
    """Adds the command to the parser."""
    verify = commands.add_parser(
        "verify",
        help="check a merged folder against its record",
        description="Check a merged folder: index, sizes, checksums, finite values, its inputs, "
        "and a sample of tensors computed again.",
    )
    verify.add_argument("folder", type=local, help="what cl-fast merge wrote")
    verify.add_argument(
        "--sample",
        type=sample,
        default=8,
        metavar="N",
        help="tensors to compute again from the inputs, or 'all' (default: 8)",
    )
    verify.add_argument(
        "--no-inputs", action="store_true", help="look at the folder only, not at its inputs"
    )
    threads(verify)
    verify.add_argument("--backend", choices=("native", "eager"), help=argparse.SUPPRESS)
    talk(verify)
    verify.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from cl_fast.merging.verify import verify

    with Progress(quiet=arguments.quiet) as progress:
        report = verify(
            arguments.folder,
            sample=arguments.sample,
            inputs=not arguments.no_inputs,
            threads=arguments.threads,
            backend=arguments.backend,
            progress=progress,
        )
    for problem in report.problems:
        print(f"cl-fast: error: {problem}", file=sys.stderr)
    if not arguments.quiet:
        for line in report.lines():
            print(line)
    return 0 if report.ok else 1


def sample(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor 'all'")
    return int(text)
