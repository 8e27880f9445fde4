"""`cl-fast merge`: checkpoints merged by a recipe."""

from __future__ import annotations

import argparse
import gc
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_fast.cli.arguments import execution, execution_options, seed, size
from cl_fast.cli.progress import Progress

if TYPE_CHECKING:
    from cl_fast.merging.executors import Engine
    from cl_fast.merging.plan import Plan

__all__ = ["add"]


def add(commands: Any) -> None:
    """Adds the command to the parser."""
    merge = commands.add_parser(
        "merge", help="merge checkpoints by a recipe", description="Merge checkpoints by a recipe."
    )
    merge.add_argument("recipe", type=Path, help="the recipe, a YAML file")
    merge.add_argument("output", type=Path, help="folder to make; must not exist, or be empty")
    merge.add_argument(
        "--dry-run", action="store_true", help="print what would be done, write nothing"
    )
    merge.add_argument("--seed", type=seed, help="of the random masks; overrides the recipe's")
    merge.add_argument(
        "--out-shard-size",
        type=size,
        default=5_000_000_000,
        metavar="SIZE",
        help="largest file of weights, as 5GB or 512MiB (default: 5GB)",
    )
    merge.add_argument(
        "--verify",
        action="store_true",
        help="read the written weights back and compare checksums before they are moved in",
    )
    merge.add_argument(
        "--allow-crimes",
        action="store_true",
        help="let slices put layers together of models that are not of one architecture and size",
    )
    merge.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="who does the work: this machine, or a Ray cluster that shares storage "
        "(default: local)",
    )
    merge.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="of the cluster's head, 'auto' (the cluster of this machine), or 'local' (one of this "
        "machine alone; default: auto)",
    )
    execution(merge)
    merge.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.ray_address is not None and arguments.engine != "ray":
        raise ValueError("--ray-address goes with --engine ray")
    gc.disable()  # imports and planning make much and drop little: collecting only takes time
    try:
        from cl_fast.merging.description import bytes_text
        from cl_fast.merging.engine import execute
        from cl_fast.merging.plan import make_plan
        from cl_fast.merging.recipe import load_recipe

        plan = make_plan(
            load_recipe(arguments.recipe),
            arguments.output,
            out_shard_size=arguments.out_shard_size,
            seed=arguments.seed,
            threads=arguments.threads,
            memory=arguments.memory,
            allow_crimes=arguments.allow_crimes,
        )
    finally:
        gc.enable()
    if arguments.dry_run:
        return _dry_run(plan, arguments)
    if not arguments.quiet:
        for note in plan.notes:
            print(f"note: {note}")
    with Progress(quiet=arguments.quiet) as progress, _engine(arguments) as engine:
        result = execute(
            plan,
            reread=arguments.verify,
            progress=progress,
            engine=engine,
            **execution_options(arguments),
        )
    if not arguments.quiet:
        kept = f", {result.resumed} of them from the earlier run" if result.resumed else ""
        speed = result.bytes_moved / max(result.seconds, 1e-9)
        print(
            f"{result.output}: {len(plan.tensors)} tensors in {result.shards} "
            f"file{'s' if result.shards != 1 else ''}{kept}, {bytes_text(plan.bytes_written)} in "
            f"{result.seconds:.1f} s ({bytes_text(speed)}/s read and written, {result.backend})"
        )
    return 0


def _engine(arguments: argparse.Namespace) -> AbstractContextManager[Engine | None]:
    if arguments.engine == "local":
        return nullcontext()
    from cl_fast.integrations.ray import RayEngine

    return RayEngine(arguments.ray_address or "auto")


def _dry_run(plan: Plan, arguments: argparse.Namespace) -> int:
    from cl_fast.environment import available_memory
    from cl_fast.merging.description import bytes_text, describe
    from cl_fast.merging.engine import check_output, read_bandwidth
    from cl_fast.merging.output import free_bytes

    check_output(plan, overwrite=arguments.overwrite)
    for line in describe(plan, read_bandwidth(plan)):
        print(line)
    memory = available_memory()
    free = f"free     {bytes_text(free_bytes(plan.output.parent))} of disk at the output"
    print(free + ("" if memory is None else f", {bytes_text(memory)} of memory"))
    return 0
