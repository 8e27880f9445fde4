"""`cl-fast search`: the weights, densities and gradients of a merge that score best."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_fast.cli.arguments import local, positive, seed, talk

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cl_fast.merging.search import SearchResult, Tried

__all__ = ["add"]


def add(commands: Any) -> None:
    """Adds the command to the parser."""
    search = commands.add_parser(
        "search",
        help="find the numbers of a merge that score best",
        description="Searches the ranges that a study's recipe has in place of numbers, with a "
        "command or a Python function as the score: docs/search.md. The same command goes on.",
    )
    search.add_argument("study", type=local, help="YAML file: recipe, evaluate, trials, ...")
    search.add_argument(
        "--out", required=True, type=local, metavar="FILE", help="the best recipe, as YAML"
    )
    search.add_argument(
        "--storage",
        type=local,
        metavar="FILE",
        help="SQLite file of the trials (default: the study's name with .db, beside it)",
    )
    search.add_argument("--trials", type=positive, metavar="N", help="in all; overrides the study")
    search.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="begin no trial after so long"
    )
    search.add_argument("--seed", type=seed, metavar="N", help="of the sampler")
    search.add_argument("--threads", type=positive, metavar="N", help="of the merges")
    search.add_argument(
        "--json", type=local, metavar="FILE", help="all trials (default: --out with .json)"
    )
    search.add_argument(
        "--top", type=positive, default=10, metavar="K", help="trials in the table (default: 10)"
    )
    talk(search)
    search.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from cl_fast.checkpoints.writing import write_whole
    from cl_fast.merging.search import load_study, search

    study = load_study(arguments.study)
    storage = arguments.storage or arguments.study.with_suffix(".db")
    report = arguments.json or arguments.out.with_suffix(".json")
    _check_files(
        {"study": arguments.study, "--storage": storage, "--out": arguments.out, "--json": report}
    )
    labels = study.labels()

    def write(result: SearchResult) -> None:
        write_whole(arguments.out, [result.to_yaml().encode()])  # its head counts the trials

    def on_trial(trial: Tried, result: SearchResult | None) -> None:
        if result is not None:
            write(result)
        if arguments.quiet:
            return
        values = "  ".join(
            f"{labels.get(name, name)}={_short(value)}" for name, value in trial.values.items()
        )
        score = "failed" if trial.score is None else f"{trial.score:.6g}"
        mark = " *" if result is not None and result.best.number == trial.number else ""
        print(f"{trial.number:<4d} {score:<12s} {values}{mark}", flush=True)
        if trial.error:
            print(f"     {trial.error}", flush=True)

    def say(words: str) -> None:
        if not arguments.quiet:
            print(f"note: {words}", flush=True)

    settings = {
        name: getattr(arguments, name)
        for name in ("trials", "timeout", "seed")
        if getattr(arguments, name) is not None
    }
    try:
        result = search(
            study, storage=storage, threads=arguments.threads, say=say, on_trial=on_trial,
            **settings,
        )  # fmt: skip
    except KeyboardInterrupt as error:
        error.add_note("the same command goes on")
        raise
    write(result)
    write_whole(report, [(json.dumps(result.to_json(), indent=1) + "\n").encode()])
    if not arguments.quiet:
        for line in result.table(arguments.top):
            print(line)
        print(
            f"{arguments.out}: score {result.best.score:.6g} of trial {result.best.number}; "
            f"{len(result.trials)} trials in {storage}, {result.new} of them new"
        )
    return 0


def _check_files(files: Mapping[str, Path]) -> None:
    """Raises OutputError where one would be written over another, or has no folder to lie in."""
    from cl_fast.errors import OutputError

    seen: dict[Path, str] = {}
    for name, path in files.items():
        place = path.resolve()
        if place in seen:
            raise OutputError(
                f"{name}: {path} is the {seen[place].removeprefix('--')} as well; give another name"
            )
        seen[place] = name
        if name != "--storage" and (place.is_dir() or not place.parent.is_dir()):
            what = "is a folder" if place.is_dir() else "lies in a folder that does not exist"
            raise OutputError(f"{name}: {path} {what}; give the name of a file to write")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
