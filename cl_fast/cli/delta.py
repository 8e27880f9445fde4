"""`cl-fast delta`: finetuned models as packed deltas: pack, apply, unpack, info."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_fast.cli.arguments import (
    backend,
    called,
    dry_run,
    execution,
    execution_options,
    local,
    place,
    seed,
    size,
    talk,
    threads,
)
from cl_fast.cli.progress import Progress

if TYPE_CHECKING:
    from cl_fast.checkpoints.deltas import DeltaFile

__all__ = ["add"]


def add(commands: Any) -> None:
    """Adds the command to the parser."""
    delta = commands.add_parser(
        "delta",
        help="pack what a model learnt into a small file, and put it on its base again",
        description="Packed deltas: of finetuned - base the elements that DARE keeps, rescaled. "
        "About a tenth of the finetuned model at --drop 0.9, a hundredth at 0.99. A packed delta "
        "is an input of every merge.",
        epilog="docs: docs/delta-format.md",
    )
    delta.set_defaults(run=_nothing(delta))
    verbs = delta.add_subparsers(dest="verb", metavar="VERB")

    pack = verbs.add_parser(
        "pack",
        help="base and finetuned model -> packed delta",
        description="Drops elements of finetuned - base at random and writes what is kept.",
    )
    pack.add_argument("base", type=place, help="checkpoint that was finetuned")
    pack.add_argument("finetuned", type=place, help="checkpoint with the same tensors")
    pack.add_argument(
        "output",
        type=local,
        nargs="?",
        help="a .safetensors file, or a folder that config and tokenizer go into where they "
        "differ from the base's (default: FINETUNED.delta.safetensors here)",
    )
    pack.add_argument(
        "--drop", type=_fraction, required=True, metavar="P", help="fraction to drop, as 0.9"
    )
    pack.add_argument("--seed", type=seed, default=0, help="of the random stream (default: 0)")
    pack.add_argument(
        "--rescale",
        choices=("l1", "keep_rate", "none"),
        default="l1",
        help="factor on what is kept: sum |d| / sum |d kept|, 1 / density, or 1 (default: l1)",
    )
    pack.add_argument(
        "--stream",
        metavar="NAME",
        help="name of the random stream (default: the last component of FINETUNED)",
    )
    pack.add_argument("--overwrite", action="store_true", help="replace an existing output")
    _work(pack)
    pack.set_defaults(run=_pack, late=("output", local))

    apply = verbs.add_parser(
        "apply",
        help="base and packed delta -> checkpoint",
        description="Writes base + delta, which is what merge_method dare_linear makes of the one "
        "finetuned model, bit for bit.",
    )
    apply.add_argument("base", type=place, help="checkpoint that the delta was packed on")
    apply.add_argument("delta", type=local, help="what delta pack wrote")
    apply.add_argument("output", type=place, help="folder to make; must not exist, or be empty")
    dry_run(apply)
    apply.add_argument("--dtype", choices=_DTYPES, help="of the output (default: the base's)")
    apply.add_argument(
        "--out-shard-size",
        type=size,
        default=5_000_000_000,
        metavar="SIZE",
        help="largest file of weights, as 5GB or 512MiB (default: 5GB)",
    )
    execution(apply)
    apply.set_defaults(run=_apply)

    unpack = verbs.add_parser(
        "unpack",
        help="base and packed delta -> the dense delta",
        description="Writes the delta itself, dense, 0 where it was dropped: no model, but what "
        "is added to one. Tensors that did not change are left out.",
    )
    unpack.add_argument("base", type=place, help="checkpoint that the delta was packed on")
    unpack.add_argument("delta", type=local, help="what delta pack wrote")
    unpack.add_argument("output", type=local, help="a .safetensors file")
    unpack.add_argument(
        "--dtype", choices=_DTYPES, default="float32", help="of the output (default: float32)"
    )
    unpack.add_argument("--overwrite", action="store_true", help="replace an existing output")
    _work(unpack)
    unpack.set_defaults(run=_unpack)

    info = verbs.add_parser(
        "info", help="what a packed delta holds", description="Tells what a packed delta holds."
    )
    info.add_argument("delta", type=local, help="what delta pack wrote")
    info.add_argument("--json", action="store_true", help="for programs, with every tensor")
    info.add_argument(
        "--check", action="store_true", help="read all of it and compare it with its checksums"
    )
    talk(info)
    info.set_defaults(run=_info)


#: What the library calls the arguments -> what they are called here.
_PACKED = {"base_model": "BASE", "base": "BASE", "finetuned": "FINETUNED", "models[0]": "FINETUNED"}
_APPLIED = {"base_model": "BASE", "base": "BASE", "delta": "DELTA", "models[0]": "DELTA"}

_DTYPES = ("float32", "bfloat16", "float16")


def _work(parser: argparse.ArgumentParser) -> None:
    threads(parser)
    backend(parser)
    talk(parser)


def _nothing(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    def run(_: argparse.Namespace) -> int:
        parser.print_help()
        return 2

    return run


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction above 0 and below 1")
    return value


def _pack(arguments: argparse.Namespace) -> int:
    from cl_fast.checkpoints.checkpoint import absolute
    from cl_fast.merging.deltas import pack_delta
    from cl_fast.merging.description import bytes_text

    output = arguments.output
    if output is None:
        name = absolute(str(arguments.finetuned)).name.removesuffix(".safetensors")
        output = Path(f"{name}.delta.safetensors")
    with called(_PACKED), Progress(quiet=arguments.quiet) as progress:
        delta = pack_delta(
            arguments.base,
            arguments.finetuned,
            output,
            drop_rate=arguments.drop,
            seed=arguments.seed,
            rescale=arguments.rescale,
            stream=arguments.stream,
            threads=arguments.threads,
            backend=arguments.backend,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    if not arguments.quiet:
        words = _summary(delta)
        print(
            f"{output}: {bytes_text(words['file_bytes'])}, {words['ratio']:.3g} of the finetuned "
            f"model's {bytes_text(words['finetuned_bytes'])} ({words['kept']} of "
            f"{words['elements']} elements of {words['changed']} tensors; "
            f"{words['equal']} equal the base's)"
        )
    return 0


def _apply(arguments: argparse.Namespace) -> int:
    from cl_fast.merging.deltas import plan_delta
    from cl_fast.merging.description import bytes_text, describe
    from cl_fast.merging.engine import check_output, execute

    with called(_APPLIED):
        plan = plan_delta(
            arguments.base,
            arguments.delta,
            arguments.output,
            out_shard_size=arguments.out_shard_size,
            out_dtype=arguments.dtype,
            threads=arguments.threads,
            memory=arguments.memory,
        )
    if arguments.dry_run:
        check_output(plan, overwrite=arguments.overwrite)
        for line in describe(plan):
            print(line)
        return 0
    with called(_APPLIED), Progress(quiet=arguments.quiet) as progress:
        result = execute(plan, progress=progress, **execution_options(arguments))
    if result.earlier and not arguments.quiet:
        print(f"{result.url or result.output}: finished earlier by the same merge; nothing to do")
    elif not arguments.quiet:
        print(
            f"{result.url or result.output}: {len(plan.tensors)} tensors, "
            f"{bytes_text(plan.bytes_written)} in {result.seconds:.1f} s ({result.backend})"
        )
    return 0


def _unpack(arguments: argparse.Namespace) -> int:
    from cl_fast.merging.deltas import unpack_delta
    from cl_fast.merging.description import bytes_text

    with called(_APPLIED), Progress(quiet=arguments.quiet) as progress:
        path = unpack_delta(
            arguments.base,
            arguments.delta,
            arguments.output,
            out_dtype=arguments.dtype,
            threads=arguments.threads,
            backend=arguments.backend,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    if not arguments.quiet:
        print(f"{path}: {bytes_text(path.stat().st_size)}")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from cl_fast.checkpoints.deltas import read_delta
    from cl_fast.merging.deltas import check_delta
    from cl_fast.merging.description import bytes_text

    delta = check_delta(arguments.delta) if arguments.check else read_delta(arguments.delta)
    words = _summary(delta)
    if arguments.json:
        words["tensors"] = {
            tensor.name: {
                "kind": tensor.kind,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "kept": tensor.kept,
                "factor": tensor.factor if tensor.kind == "kept" else None,
                "base_dtype": tensor.base_dtype,
                "base_crc64": f"{tensor.base_crc:016x}",
            }
            for tensor in delta.tensors.values()
        }
        json.dump(words, sys.stdout, indent=1)
        print()
        return 0
    kept = [tensor for tensor in delta.tensors.values() if tensor.kind == "kept"]
    factors = [tensor.factor for tensor in kept]
    lines = {
        "file": f"{delta.header.path}, {bytes_text(words['file_bytes'])}",
        "model": f"{len(delta.tensors)} tensors, {bytes_text(words['finetuned_bytes'])}; the delta "
        f"is {words['ratio']:.3g} of it",
        "drop": f"{delta.drop_rate:g} (T = {delta.threshold}), kept {words['kept']} of "
        f"{words['elements']} elements",
        "stream": f"{delta.model!r}, seed {delta.seed}",
        "rescale": delta.rescale
        + (f", factors {min(factors):.6g} to {max(factors):.6g}" if factors else ""),
        "tensors": f"{len(kept)} with kept values, {words['whole']} whole, {words['equal']} equal "
        "to the base's",
        "written": f"by cl_fast {delta.cl_fast}",
    }
    for label, text in lines.items():
        print(f"{label:8} {text}")
    if arguments.check:
        print("checked  every byte agrees with its checksum")
    return 0


def _summary(delta: DeltaFile) -> dict[str, Any]:
    from cl_fast.checkpoints.safetensors import tensor_nbytes

    tensors = list(delta.tensors.values())
    kept = [tensor for tensor in tensors if tensor.kind == "kept"]
    whole = sum(tensor_nbytes(tensor.dtype, tensor.shape) for tensor in tensors)
    return {
        "path": str(delta.header.path),
        "file_bytes": delta.header.file_size,
        "finetuned_bytes": whole,
        "ratio": delta.header.file_size / whole if whole else 1.0,
        "drop_rate": delta.drop_rate,
        "threshold": delta.threshold,
        "rescale": delta.rescale,
        "seed": delta.seed,
        "stream": delta.model,
        "elements": sum(tensor.numel for tensor in kept),
        "kept": sum(tensor.kept for tensor in kept),
        "changed": len(kept),
        "whole": sum(tensor.kind == "whole" for tensor in tensors),
        "equal": sum(tensor.kind == "same" for tensor in tensors),
        "cl_fast": delta.cl_fast,
    }
