"""The command `cl-fast`: merge, verify, soup, train, edit, env. Thin: it parses, calls, and prints.

Exit codes: 0 done; 1 an error, told on stderr in words; 2 wrong usage; 130 interrupted.
Nothing is imported before it is needed, so `--help` is there at once and a merge by the C++ core
loads neither torch nor numpy.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cl_fast._version import __version__
from cl_fast.errors import ClFastError, Interrupted

if TYPE_CHECKING:
    from cl_fast.merging.plan import Plan

__all__ = ["main"]

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", 1):
    _UNITS |= {_letter: 1000**_power, f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power}

_DESCRIPTION = (
    "Merge language models at memory speed, train on without forgetting, and edit what they know."
)
_EPILOG = (
    "docs: docs/engine.md (how a merge runs), docs/merge-recipes.md (recipes and methods), "
    "docs/train-plan.md (plans of train), docs/editing.md (edit)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (None: that of the process) and returns its exit code."""
    verbose = False
    try:
        parser = _parser()
        arguments = parser.parse_args(argv)
        if arguments.command is None:
            parser.print_help()
            return 2
        verbose = getattr(arguments, "verbose", False)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return int(arguments.run(arguments))
    except (KeyboardInterrupt, Interrupted) as error:
        _complain("interrupted", error)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone: nothing more may go into the closed pipe, not even
        # what Python flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if verbose:
            raise
        if isinstance(error, ClFastError | OSError | ValueError | MemoryError):
            _complain(f"error: {error or type(error).__name__}", error)
        else:
            _complain(
                f"internal error: {type(error).__name__}: {error}; --verbose shows where", error
            )
        return 1


def _complain(words: str, error: BaseException) -> None:
    print(f"cl-fast: {words}", file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
        print(f"         {note}", file=sys.stderr)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"cl-fast: note: {message}", file=sys.stderr)


# ------------------------------------------------------------------------------------ arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cl-fast", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"cl-fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    merge = commands.add_parser(
        "merge", help="merge checkpoints by a recipe", description="Merge checkpoints by a recipe."
    )
    merge.add_argument("recipe", type=Path, help="the recipe, a YAML file")
    merge.add_argument("output", type=Path, help="folder to make; must not exist, or be empty")
    merge.add_argument(
        "--dry-run", action="store_true", help="print what would be done, write nothing"
    )
    merge.add_argument("--seed", type=_seed, help="of the random masks; overrides the recipe's")
    merge.add_argument(
        "--out-shard-size",
        type=_size,
        default=5_000_000_000,
        metavar="SIZE",
        help="largest file of weights, as 5GB or 512MiB (default: 5GB)",
    )
    merge.add_argument(
        "--verify",
        action="store_true",
        help="read the written weights back and compare checksums before they are moved in",
    )
    _execution(merge)
    merge.set_defaults(run=_merge)

    verify = commands.add_parser(
        "verify",
        help="check a merged folder against its record",
        description="Check a merged folder: index, sizes, checksums, finite values, its inputs, "
        "and a sample of tensors computed again.",
    )
    verify.add_argument("folder", type=Path, help="what cl-fast merge wrote")
    verify.add_argument(
        "--sample",
        type=_sample,
        default=8,
        metavar="N",
        help="tensors to compute again from the inputs, or 'all' (default: 8)",
    )
    verify.add_argument(
        "--no-inputs", action="store_true", help="look at the folder only, not at its inputs"
    )
    verify.add_argument("--threads", type=_positive, metavar="N", help="default: all cores")
    verify.add_argument("--backend", choices=("native", "eager"), help=argparse.SUPPRESS)
    _talk(verify)
    verify.set_defaults(run=_verify)

    soup = commands.add_parser(
        "soup",
        help="greedy soup: the mean of those models that raise a score",
        description="Greedy soup: scores every model, starts with the best, and adds the others "
        "one after the other, best first, as long as the mean with them scores higher.",
    )
    soup.add_argument("output", type=Path, help="folder to make; must not exist")
    soup.add_argument("models", nargs="+", metavar="MODEL", help="checkpoint folders")
    soup.add_argument(
        "--evaluate",
        required=True,
        type=_command,
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
    _talk(soup)
    soup.set_defaults(run=_soup)

    train = commands.add_parser(
        "train",
        help="go on pre-training on text files, by a plan",
        description="Continual pre-training and domain adaptation: trains a model on text files, "
        "stage after stage, with replay, by a plan. The same command again goes on with a run "
        "that was cut off.",
        epilog="docs: docs/train-plan.md; on several devices: torchrun --nproc-per-node=N -m "
        "cl_fast train plan.yml",
    )
    train.add_argument("plan", type=Path, help="the plan, a YAML file")
    train.add_argument("--out", type=Path, metavar="FOLDER", help="overrides the plan's output")
    train.add_argument(
        "--dry-run", action="store_true", help="print what would be done, write nothing"
    )
    _talk(train)
    train.set_defaults(run=_train)

    _edit_parser(commands)

    env = commands.add_parser(
        "env",
        help="what runs where on this machine, and why not faster",
        description="Versions, instruction sets, threads, and which backend serves each op.",
    )
    _talk(env)
    env.set_defaults(run=_env)
    return parser


def _edit_parser(commands: Any) -> None:
    edit = commands.add_parser(
        "edit",
        help="write facts into a checkpoint, and the report beside it",
        description="Edits a checkpoint so that it says the given facts: statistics of its keys, "
        "values, a patch, the edited checkpoint, and scores before and after. The same command "
        "again goes on with a job that was cut off.",
        epilog="docs: docs/editing.md. With a patch (edits.safetensors) in the place of the facts "
        "it is applied, without loading the model.",
    )
    edit.add_argument("model", type=Path, help="checkpoint folder, with config and tokenizer")
    edit.add_argument(
        "facts", type=Path, help="facts: .jsonl, CounterFact or zsRE .json; or a saved patch"
    )
    edit.add_argument("output", type=Path, help="folder to make; must not exist")
    edit.add_argument(
        "--method",
        choices=("memit", "rome", "emmet", "alphaedit"),
        default="memit",
        help="default: memit",
    )
    edit.add_argument(
        "--layers", type=_layers, metavar="I,J,...", help="blocks to edit, as 4,5,6 or 4-8"
    )
    edit.add_argument(
        "--edges", action="store_true", help="edit the first and last of the layers only (BLUE)"
    )
    edit.add_argument("--prior-weight", type=float, metavar="X", help="of what the model knows")
    edit.add_argument("--steps", type=_positive, metavar="N", help="of a value's optimisation")
    edit.add_argument("--lr", type=float, metavar="X", help="of a value's optimisation")
    edit.add_argument(
        "--clamp", type=float, metavar="X", help="largest change of a value, in norms of the state"
    )
    edit.add_argument(
        "--stats", type=Path, metavar="FOLDER", help="of the keys: used if there, else made there"
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
        "--tokens", type=_positive, default=150_000, metavar="N", help="for the statistics"
    )
    edit.add_argument("--batch", type=_positive, default=64, metavar="N", help="facts at a time")
    edit.add_argument("--seed", type=_seed, default=0, help="of contexts and samples")
    edit.add_argument("--device", default="auto", help="default: cuda where there is one")
    edit.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the model in memory (default: float32 on the CPU, else as stored)",
    )
    edit.add_argument("--no-evaluate", action="store_true", help="no scores before and after")
    edit.add_argument(
        "--dry-run", action="store_true", help="print what would be done, write nothing"
    )
    edit.add_argument(
        "--restart", action="store_true", help="throw an unfinished job away and begin again"
    )
    _talk(edit)
    edit.set_defaults(defaults=edit.parse_args(["", "", ""]), run=_edit)


def _execution(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--threads", type=_positive, metavar="N", help="default: all cores")
    parser.add_argument(
        "--memory", type=_size, metavar="SIZE", help="bound on the working memory, as 256MB"
    )
    parser.add_argument(
        "--io",
        choices=("auto", "mmap", "pread", "direct"),
        default="auto",
        help="how inputs are read; direct goes past the page cache (default: auto)",
    )
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
    parser.add_argument(
        "--backend", choices=("native", "eager"), help="default: native where it is built"
    )
    _talk(parser)


def _talk(parser: argparse.ArgumentParser) -> None:
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("--quiet", action="store_true", help="say nothing but errors")
    volume.add_argument("--verbose", action="store_true", help="show the traceback of an error")


def _size(text: str) -> int:
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it as 256MB or 5GiB")
    value = int(float(match[1]) * _UNITS[match[2].upper()])
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than one byte")
    return value


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 1 << 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2**64 - 1")
    return int(text)


def _sample(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor 'all'")
    return int(text)


def _layers(text: str) -> tuple[int, ...]:
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


def _command(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    if not any("{}" in word for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} does not say {{}} where the folder goes")
    return words


# ------------------------------------------------------------------------------------- commands


def _merge(arguments: argparse.Namespace) -> int:
    gc.disable()  # imports and planning make much and drop little: collecting only takes time
    try:
        from cl_fast.merging.engine import execute
        from cl_fast.merging.plan import bytes_text, make_plan
        from cl_fast.merging.recipe import load_recipe

        plan = make_plan(
            load_recipe(arguments.recipe),
            arguments.output,
            out_shard_size=arguments.out_shard_size,
            seed=arguments.seed,
            threads=arguments.threads,
            memory=arguments.memory,
        )
    finally:
        gc.enable()
    if arguments.dry_run:
        return _dry_run(plan, arguments)
    if not arguments.quiet:
        for note in plan.notes:
            print(f"note: {note}")
    with _Progress(quiet=arguments.quiet) as progress:
        result = execute(plan, reread=arguments.verify, progress=progress, **_options(arguments))
    if not arguments.quiet:
        kept = f", {result.resumed} of them from the earlier run" if result.resumed else ""
        speed = result.bytes_moved / max(result.seconds, 1e-9)
        print(
            f"{result.output}: {len(plan.tensors)} tensors in {result.shards} "
            f"file{'s' if result.shards != 1 else ''}{kept}, {bytes_text(plan.bytes_written)} in "
            f"{result.seconds:.1f} s ({bytes_text(speed)}/s read and written, {result.backend})"
        )
    return 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
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


def _dry_run(plan: Plan, arguments: argparse.Namespace) -> int:
    from cl_fast.environment import available_memory
    from cl_fast.merging.engine import check_output, read_bandwidth
    from cl_fast.merging.output import free_bytes
    from cl_fast.merging.plan import bytes_text, describe

    check_output(plan, overwrite=arguments.overwrite)
    for line in describe(plan, read_bandwidth(plan)):
        print(line)
    memory = available_memory()
    free = f"free     {bytes_text(free_bytes(plan.output.parent))} of disk at the output"
    print(free + ("" if memory is None else f", {bytes_text(memory)} of memory"))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from cl_fast.merging.verify import verify

    with _Progress(quiet=arguments.quiet) as progress:
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


def _soup(arguments: argparse.Namespace) -> int:
    from cl_fast.merging.soup import greedy_soup

    def evaluate(folder: Path) -> float:
        score = _score(arguments.evaluate, folder)
        if not arguments.quiet:
            print(f"{score:<12g} {folder}", flush=True)
        return score

    soup = greedy_soup(arguments.models, evaluate, accept=arguments.accept, output=arguments.output)
    if not arguments.quiet:
        for trial in soup.history:
            print(f"{trial.score:<12g} {'+' if trial.accepted else '-'} {trial.name}")
        print(f"{soup.path}: {len(soup.chosen)} of {len(arguments.models)} models, {soup.score:g}")
    return 0


def _score(command: Sequence[str], folder: Path) -> float:
    """The last number on the standard output of the user's command for `folder`."""
    import subprocess

    filled = [word.replace("{}", str(folder)) for word in command]
    try:
        done = subprocess.run(filled, stdout=subprocess.PIPE, text=True, check=False)
    except OSError as error:
        raise ClFastError(f"--evaluate: {filled[0]} does not start: {error.strerror}") from error
    if done.returncode != 0:
        raise ClFastError(f"--evaluate: {shlex.join(filled)} ended with code {done.returncode}")
    numbers = re.findall(
        r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]*\w)", done.stdout
    )
    if not numbers:
        raise ClFastError(f"--evaluate: {shlex.join(filled)} printed no number")
    return float(numbers[-1])


def _train(arguments: argparse.Namespace) -> int:
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


_OF_A_PATCH = ("model", "facts", "output", "dry_run", "restart", "quiet", "verbose")


def _edit(arguments: argparse.Namespace) -> int:
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
    with _Progress(quiet=arguments.quiet, counted=PHASES) as progress:
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
    from cl_fast.merging.engine import check_output
    from cl_fast.merging.patches import apply_patch, plan_patch
    from cl_fast.merging.plan import describe

    if arguments.dry_run:
        plan = plan_patch(arguments.model, arguments.facts, arguments.output)
        check_output(plan, overwrite=False)
        for line in describe(plan):
            print(line)
        return 0
    with _Progress(quiet=arguments.quiet) as progress:
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


def _env(arguments: argparse.Namespace) -> int:
    from cl_fast.environment import describe

    for line in describe():
        print(line)
    return 0


# ------------------------------------------------------------------------------------- progress


_EVERY = 5.0  # seconds between lines where there is no terminal


class _Progress:
    """Shows progress: a bar on a terminal, a line every few seconds elsewhere, or nothing.

    `counted` phases have things to count instead of bytes.
    """

    def __init__(self, *, quiet: bool, counted: Sequence[str] = ()) -> None:
        self._quiet, self._counted = quiet, counted
        self._terminal = sys.stderr.isatty()
        self._phase = ""
        self._bar: Any = None
        self._since = self._said = 0.0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def __call__(self, phase: str, done: int, total: int) -> None:
        if self._quiet:
            return
        if phase != self._phase:
            self._close()
            self._phase = phase
            self._since = self._said = time.monotonic()
            if self._terminal:
                from tqdm import tqdm

                self._bar = tqdm(
                    desc=phase,
                    total=total,
                    unit="" if phase in self._counted else "B",
                    unit_scale=phase not in self._counted,
                    leave=False,
                    dynamic_ncols=True,
                )
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._said >= _EVERY and done:
            self._said = now
            if phase in self._counted:
                print(f"{phase}: {done} of {total}", file=sys.stderr)
                return
            speed = done / (now - self._since)
            print(
                f"{phase}: {100 * done // total} % of {total / 1e9:.1f} GB, "
                f"{speed / 1e9:.2f} GB/s, {(total - done) / speed:.0f} s left",
                file=sys.stderr,
            )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._phase = ""
