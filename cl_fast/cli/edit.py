"""`cl-fast edit`: facts written into a checkpoint."""

from __future__ import annotations

import argparse
import re
from typing import Any

from cl_fast.cli.arguments import dry_run, local, positive, seed, talk
from cl_fast.cli.progress import Progress
from cl_fast.errors import ClFastError

__all__ = ["add"]


def add(commands: Any) -> None:
    """Adds the command to the parser."""
    edit = commands.add_parser(
        "edit",
        help="write facts into a checkpoint, and the report beside it",
        description="Edits a checkpoint so that it says the given facts: statistics of its keys, "
        "values, a patch, the edited checkpoint, and scores before and after. The same command "
        "again goes on with a job that was cut off.",
        epilog="docs: docs/editing.md. With a patch (edits.safetensors) in the place of the facts "
        "it is applied, without loading the model.",
    )
    edit.add_argument("model", type=local, help="checkpoint folder, with config and tokenizer")
    edit.add_argument(
        "facts", type=local, help="facts: .jsonl, CounterFact or zsRE .json; or a saved patch"
    )
    edit.add_argument("output", type=local, help="folder to make; must not exist")
    edit.add_argument(
        "--method",
        choices=("memit", "rome", "emmet", "alphaedit"),
        default="memit",
        help="default: memit",
    )
    edit.add_argument(
        "--layers", type=layers, metavar="I,J,...", help="blocks to edit, as 4,5,6 or 4-8"
    )
    edit.add_argument(
        "--edges", action="store_true", help="edit the first and last of the layers only (BLUE)"
    )
    edit.add_argument("--prior-weight", type=float, metavar="X", help="of what the model knows")
    edit.add_argument("--steps", type=positive, metavar="N", help="of a value's optimisation")
    edit.add_argument("--lr", type=float, metavar="X", help="of a value's optimisation")
    edit.add_argument(
        "--clamp", type=float, metavar="X", help="largest change of a value, in norms of the state"
    )
    edit.add_argument(
        "--stats", type=local, metavar="FOLDER", help="of the keys: used if there, else made there"
    )
    edit.add_argument("--any-model", action="store_true", help="take statistics of a related model")
    edit.add_argument(
        "--texts",
        nargs="+",
        default=(),
        metavar="FILE",
        help="for the statistics: .txt, .jsonl, .parquet (default: the model's own samples)",
    )
    edit.add_argument(
        "--tokens", type=positive, default=150_000, metavar="N", help="for the statistics"
    )
    edit.add_argument("--batch", type=positive, default=64, metavar="N", help="facts at a time")
    edit.add_argument("--seed", type=seed, default=0, help="of contexts and samples")
    edit.add_argument("--device", default="auto", help="default: cuda where there is one")
    edit.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the model in memory (default: float32 on the CPU, else as stored)",
    )
    edit.add_argument("--no-evaluate", action="store_true", help="no scores before and after")
    dry_run(edit)
    edit.add_argument(
        "--restart", action="store_true", help="throw an unfinished job away and begin again"
    )
    talk(edit)
    edit.set_defaults(defaults=edit.parse_args(["", "", ""]), run=_run)


_OF_A_PATCH = ("model", "facts", "output", "dry_run", "restart", "quiet", "verbose")


def _run(arguments: argparse.Namespace) -> int:
    from cl_fast.checkpoints.patches import is_patch

    if arguments.facts.suffix == ".safetensors" and is_patch(arguments.facts):
        return _apply_patch(arguments)
    try:
        from cl_fast.learning.edits import PHASES, EditJob, EditSettings
    except ImportError as error:
        raise ClFastError(
            f"cl-fast edit needs {error.name}: pip install '.[hf]' in a checkout of cl_fast"
        ) from error
    settings = EditSettings(
        method=arguments.method,
        layers=arguments.layers,
        edges=arguments.edges,
        prior_weight=arguments.prior_weight,
        steps=arguments.steps,
        lr=arguments.lr,
        clamp=arguments.clamp,
        stats=arguments.stats,
        any_model=arguments.any_model,
        texts=tuple(arguments.texts),
        tokens=arguments.tokens,
        seed=arguments.seed,
        batch=arguments.batch,
        dtype=arguments.dtype,
        device=arguments.device,
        evaluate=not arguments.no_evaluate,
    )
    with Progress(quiet=arguments.quiet, counted=PHASES) as progress:
        job = EditJob(
            arguments.model,
            arguments.facts,
            arguments.output,
            settings,
            restart=arguments.restart and not arguments.dry_run,
            progress=None if arguments.quiet else progress,
        )
        if arguments.dry_run:
            for line in job.describe():
                print(line)
            return 0
        try:
            result = job.run()
        except KeyboardInterrupt as error:
            error.add_note("the same command goes on")
            raise
    if not arguments.quiet:
        if result.before is not None and result.report is not None:
            from cl_fast.learning.edits import not_said, side_by_side

            print(side_by_side(result.before, result.report).rstrip())
            missed = len(not_said(result.report))
            if missed:
                print(
                    f"{missed} of {result.facts} facts are not what the model writes; edits.md "
                    "lists them, docs/editing.md says how to look for better settings"
                )
        print(
            f"{result.output}: {result.facts} facts in {result.seconds:.1f} s; edits.safetensors "
            "is the patch, edits.md the report"
        )
    return 0


def _apply_patch(arguments: argparse.Namespace) -> int:
    from cl_fast.errors import OutputError

    for name, default in vars(arguments.defaults).items():
        if name not in _OF_A_PATCH and getattr(arguments, name) != default:
            raise ClFastError(
                f"--{name.replace('_', '-')} has no effect where a saved patch is applied; it was "
                "decided when the facts were fitted"
            )
    if arguments.output.exists():
        raise OutputError(f"{arguments.output}: exists already; choose another folder")
    from cl_fast.merging.description import describe
    from cl_fast.merging.engine import check_output
    from cl_fast.merging.patches import apply_patch, plan_patch

    if arguments.dry_run:
        plan = plan_patch(arguments.model, arguments.facts, arguments.output)
        check_output(plan, overwrite=False)
        for line in describe(plan):
            print(line)
        return 0
    with Progress(quiet=arguments.quiet) as progress:
        result = apply_patch(
            arguments.model,
            arguments.facts,
            arguments.output,
            resume=not arguments.restart,
            restart=arguments.restart,
            progress=progress,
        )
    if not arguments.quiet:
        print(f"{result.output}: the patch {arguments.facts} in {result.seconds:.1f} s")
    return 0


def layers(text: str) -> tuple[int, ...]:
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of blocks; write 4,5,6 or 4-8")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise argparse.ArgumentTypeError(f"{text!r} goes down; write {last}-{first}")
        layers += range(first, last + 1)
    return tuple(layers)
