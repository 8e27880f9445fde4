"""`cl-fast diff`: what models changed of their base, and how far they agree."""

from __future__ import annotations

import argparse
import gc
from typing import Any

from cl_fast.cli.arguments import backend, called, local, reading, talk, threads
from cl_fast.cli.progress import Progress

__all__ = ["add"]


def add(commands: Any) -> None:
    """Adds the command to the parser."""
    diff = commands.add_parser(
        "diff",
        help="what models changed of their base, and how far they agree",
        description="Compares models with their base in one read: how far each layer and module "
        "moved, sign conflicts, cosines, magnitudes, outliers; on the terminal, as a page and as "
        "JSON.",
        epilog="docs: docs/diff.md says what each number means.",
    )
    diff.add_argument("base", help="checkpoint folder or .safetensors file")
    diff.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="likewise, or a change of the base: a patch, a LoRA adapter, a packed delta; each "
        "of them, and the base, may be a URL or a hub id",
    )
    diff.add_argument(
        "--out", type=local, metavar="FILE.html", help="write a page that needs nothing beside it"
    )
    diff.add_argument("--json", type=local, metavar="FILE.json", help="write all numbers")
    diff.add_argument("--overwrite", action="store_true", help="replace files that exist")
    threads(diff)
    reading(diff)
    backend(diff)
    talk(diff)
    diff.set_defaults(run=_run, late=("models", str))


def _run(arguments: argparse.Namespace) -> int:
    gc.disable()  # much is made and little dropped: collecting only takes time
    from cl_fast.merging.diff import compare
    from cl_fast.merging.report import check_report, write_json, write_page

    for path, suffix in ((arguments.out, ".html"), (arguments.json, ".json")):
        if path is not None:
            check_report(path, suffix, overwrite=arguments.overwrite)
    names = {"base": "BASE"}
    names |= {f"models[{i}]": f"MODEL {model}" for i, model in enumerate(arguments.models)}
    with called(names), Progress(quiet=arguments.quiet) as progress:
        comparison = compare(
            arguments.base,
            arguments.models,
            threads=arguments.threads,
            io=arguments.io,
            backend=arguments.backend,
            progress=progress,
        )
    if arguments.out is not None:
        write_page(comparison, arguments.out)
    if arguments.json is not None:
        write_json(comparison, arguments.json)
    if not arguments.quiet:
        for line in comparison.lines():
            print(line)
        for path in (arguments.out, arguments.json):
            if path is not None:
                print(f"wrote   {path}")
    return 0
