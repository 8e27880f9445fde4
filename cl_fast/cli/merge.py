"""`cl-fast merge`: checkpoints merged by a recipe."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_fast.cli import mergekit
from cl_fast.cli.arguments import dry_run, execution, execution_options, local, place, seed
from cl_fast.cli.progress import Progress
from cl_fast.errors import OutputError, RecipeError

if TYPE_CHECKING:
    from cl_fast.merging.engine import Result
    from cl_fast.merging.executors import Engine
    from cl_fast.merging.plan import Plan
    from cl_fast.merging.stages import Stage

__all__ = ["add"]


_BESIDE = Path()


def add(commands: Any) -> None:
    """Adds the command to the parser."""
    merge = commands.add_parser(
        "merge", help="merge checkpoints by a recipe", description="Merge checkpoints by a recipe."
    )
    merge.add_argument("recipe", type=local, help="the recipe, a YAML file")
    merge.add_argument(
        "output",
        type=place,
        nargs="?",
        help="folder or URL to make; must not exist, or be empty (or --out-path FOLDER)",
    )
    merge.add_argument("--out-path", type=place, help=argparse.SUPPRESS)
    dry_run(merge)
    merge.add_argument(
        "--seed",
        "--random-seed",
        type=seed,
        help="of the random masks; overrides the recipe's",
    )
    merge.add_argument(
        "--out-shard-size",
        type=mergekit.shard_size,
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
    merge.add_argument(
        "--report",
        type=local,
        nargs="?",
        const=_BESIDE,
        metavar="FILE.html",
        help="compare inputs and result with the base, as a page and as JSON; by default beside "
        "the output",
    )
    execution(merge)
    mergekit.add(merge)
    merge.set_defaults(run=_run, usage=merge.error, late=("output", place))


def _run(arguments: argparse.Namespace) -> int:
    if arguments.ray_address is not None and arguments.engine != "ray":
        raise ValueError("--ray-address goes with --engine ray")
    output = _output(arguments)
    told = mergekit.notes(arguments)
    gc.disable()  # imports and planning make much and drop little: collecting only takes time
    try:
        from cl_fast.merging.stages import load_stages, merge_stages, plan_stages

        stages = load_stages(arguments.recipe, output, intermediate=arguments.intermediate_dir)
        planning = {
            "out_shard_size": arguments.out_shard_size,
            "seed": arguments.seed,
            "threads": arguments.threads,
            "memory": arguments.memory,
            "allow_crimes": arguments.allow_crimes,
            "copy_tokenizer": arguments.copy_tokenizer,
            "truncate_embeddings": arguments.unsafe_truncate_embeddings,
        }
        if arguments.dry_run:
            with _of_file(arguments.recipe):
                plans = plan_stages(stages, **planning)
    finally:
        gc.enable()
    report = _report(arguments, stages[-1])
    if not arguments.quiet:
        for note in told:
            print(f"note: {note}")
    if arguments.dry_run:
        return _dry_run(plans, arguments)
    options = execution_options(arguments)
    options["restart"] |= len(stages) > 1 and not arguments.lazy
    with (
        Progress(quiet=arguments.quiet) as progress,
        _engine(arguments) as engine,
        _of_file(arguments.recipe),
    ):
        merge_stages(
            stages,
            planning=planning,
            reread=arguments.verify,
            write_card=arguments.write_model_card,
            progress=progress,
            engine=engine,
            begin=None if arguments.quiet else _begin,
            tell=None if arguments.quiet else _tell,
            **options,
        )
    if report is not None:
        from cl_fast.merging.report import merge_report

        with Progress(quiet=arguments.quiet) as progress:
            merge_report(
                stages[-1].recipe,
                stages[-1].url or stages[-1].output,
                report,
                threads=arguments.threads,
                backend=arguments.backend,
                progress=progress,
            )
        if not arguments.quiet:
            print(f"{report}: what the models and their merge changed of the base")
    return 0


@contextmanager
def _of_file(recipe: Path) -> Iterator[None]:
    """Errors that planning finds in the recipe tell its file, as those of reading it do."""
    try:
        yield
    except RecipeError as error:
        words = str(error)
        if not words.startswith((f"{recipe}: ", "output: ")):
            error.args = (f"{recipe}: {words}",)
        raise


def _report(arguments: argparse.Namespace, last: Stage) -> Path | None:
    """Where the report goes, if there is to be one and it can be written."""
    report: Path | None = arguments.report
    if report is None:
        return None
    from cl_fast.merging.report import check_merge_report

    if report == _BESIDE:
        if last.url is not None:
            raise OutputError(f"--report: give a path, as the output {last.url} has no folder here")
        report = last.output.with_name(f"{last.output.name}-report.html")
    check_merge_report(last.recipe, report, overwrite=arguments.overwrite)
    return report


def _engine(arguments: argparse.Namespace) -> AbstractContextManager[Engine | None]:
    if arguments.engine == "local":
        return nullcontext()
    from cl_fast.integrations.ray import RayEngine

    return RayEngine(arguments.ray_address or "auto")


def _output(arguments: argparse.Namespace) -> Path | str:
    given: list[Path | str] = [p for p in (arguments.output, arguments.out_path) if p is not None]
    if not given:
        arguments.usage("the following arguments are required: output")
    if len(given) > 1:
        arguments.usage("output and --out-path mean the same; give one")
    return given[0]


def _begin(plan: Plan) -> None:
    for note in plan.notes:
        print(f"note: {note}")


def _tell(plan: Plan, result: Result | None) -> None:
    from cl_fast.merging.description import bytes_text

    if result is None:
        print(f"{plan.output}: finished earlier, and sound")
        return
    if result.earlier:
        print(f"{result.url or result.output}: finished earlier by the same merge; nothing to do")
        return
    kept = f", {result.resumed} of them from the earlier run" if result.resumed else ""
    speed = result.bytes_moved / max(result.seconds, 1e-9)
    print(
        f"{result.url or result.output}: {len(plan.tensors)} tensors in {result.shards} "
        f"file{'s' if result.shards != 1 else ''}{kept}, {bytes_text(plan.bytes_written)} in "
        f"{result.seconds:.1f} s ({bytes_text(speed)}/s read and written, {result.backend})"
    )


def _dry_run(plans: Sequence[Plan], arguments: argparse.Namespace) -> int:
    from cl_fast.environment import available_memory
    from cl_fast.merging.description import bytes_text, describe
    from cl_fast.merging.engine import check_output, read_bandwidth
    from cl_fast.merging.output import free_bytes

    check_output(plans[-1], overwrite=arguments.overwrite)
    for plan in plans:
        for line in describe(plan, read_bandwidth(plan)):
            print(line)
        if plan is not plans[-1]:
            print()
    memory = available_memory()
    free = f"free     {bytes_text(free_bytes(plans[-1].output.parent))} of disk at the output"
    print(free + ("" if memory is None else f", {bytes_text(memory)} of memory"))
    return 0
