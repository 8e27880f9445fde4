"""`cl-fast train`: continual pre-training by a plan."""

from __future__ import annotations

import argparse
from typing import Any

from cl_fast.cli.arguments import dry_run, local, talk
from cl_fast.errors import ClFastError

__all__ = ["add"]


def add(commands: Any) -> None:
    """Adds the command to the parser."""
    train = commands.add_parser(
        "train",
        help="go on pre-training on text files, by a plan",
        description="Continual pre-training and domain adaptation: trains a model on text files, "
        "stage after stage, with replay, by a plan. The same command again goes on with a run "
        "that was cut off.",
        epilog="docs: docs/train-plan.md; on several devices: torchrun --nproc-per-node=N -m "
        "cl_fast train plan.yml",
    )
    train.add_argument("plan", type=local, help="the plan, a YAML file")
    train.add_argument("--out", type=local, metavar="FOLDER", help="overrides the plan's output")
    dry_run(train)
    talk(train)
    train.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from cl_fast.learning.plan import load_plan

    plan = load_plan(arguments.plan)
    try:
        from cl_fast.learning.pretraining import Job
    except ImportError as error:
        raise ClFastError(
            f"cl-fast train needs {error.name}: pip install '.[train]' in a checkout of cl_fast"
        ) from error
    job = Job(plan, arguments.out, quiet=arguments.quiet)
    if arguments.dry_run:
        for line in job.describe(job.estimate()):
            print(line)
    else:
        try:
            job.run()
        except KeyboardInterrupt as error:
            error.add_note("the same command goes on, from the last checkpoint if there is one")
            raise
    return 0
