"""`cl-fast env`: what runs where on this machine."""

from __future__ import annotations

import argparse
from typing import Any

from cl_fast.cli.arguments import talk

__all__ = ["add"]


def add(commands: Any) -> None:
    """Adds the command to the parser."""
    env = commands.add_parser(
        "env",
        help="what runs where on this machine, and why not faster",
        description="Versions, instruction sets, threads, and which backend serves each op.",
    )
    talk(env)
    env.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from cl_fast.environment import describe

    for line in describe():
        print(line)
    return 0
