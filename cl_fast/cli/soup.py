"""`cl-fast soup`: the mean of those models that raise a score."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cl_fast.cli.arguments import command, local, local_text, talk

__all__ = ["add"]


def add(commands: Any) -> None:
    """Adds the command to the parser."""
    soup = commands.add_parser(
        "soup",
        help="greedy soup: the mean of those models that raise a score",
        description="Greedy soup: scores every model, starts with the best, and adds the others "
        "one after the other, best first, as long as the mean with them scores higher.",
    )
    soup.add_argument("output", type=local, help="folder to make; must not exist")
    soup.add_argument(
        "models", type=local_text, nargs="+", metavar="MODEL", help="checkpoint folders"
    )
    soup.add_argument(
        "--evaluate",
        required=True,
        type=command,
        metavar="COMMAND",
        help="a command that scores the checkpoint folder {} on held-out data: the last number "
        "that it prints, higher is better; run without a shell",
    )
    soup.add_argument(
        "--accept",
        choices=("rise", "no_fall"),
        default="rise",
        help="keep a model if the score rises, or also if it stays the same (default: rise)",
    )
    talk(soup)
    soup.set_defaults(run=_run, late=("models", local_text))


def _run(arguments: argparse.Namespace) -> int:
    from cl_fast.merging.scoring import score_by_command
    from cl_fast.merging.soup import greedy_soup

    def evaluate(folder: Path) -> float:
        return score_by_command(arguments.evaluate, folder)

    def tell(names: tuple[str, ...], score: float) -> None:
        if not arguments.quiet:
            print(f"{score:<12g} {' + '.join(names)}", flush=True)

    soup = greedy_soup(
        arguments.models,
        evaluate,
        accept=arguments.accept,
        output=arguments.output,
        on_score=tell,
    )
    if not arguments.quiet:
        for trial in soup.history:
            print(f"{trial.score:<12g} {'+' if trial.accepted else '-'} {trial.name}")
        print(f"{soup.path}: {len(soup.chosen)} of {len(arguments.models)} models, {soup.score:g}")
    return 0
