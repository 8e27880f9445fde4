"""`cl-fast adapter`: LoRA adapters composed, extracted from a finetune, and looked at."""

from __future__ import annotations

import argparse
import json
from typing import Any

from cl_fast.cli.arguments import local, positive, seed, talk, threads

__all__ = ["add"]


def add(commands: Any) -> None:
    """Adds the command to the parser."""
    adapter = commands.add_parser(
        "adapter",
        help="LoRA adapters: compose several, extract one from a finetune, look at one",
        description="LoRA adapters of PEFT. As inputs of a merge with their base they are "
        "written in a recipe like any model: docs/merge-adapters.md.",
    )
    kinds = adapter.add_subparsers(dest="kind", metavar="WHAT", required=True)
    _add_merge(kinds)
    _add_extract(kinds)
    _add_info(kinds)


def _add_merge(kinds: Any) -> None:
    merge = kinds.add_parser("merge", help="one adapter of several, without their base")
    merge.add_argument("adapters", nargs="+", metavar="ADAPTER", help="folders of adapters")
    merge.add_argument("--out", required=True, type=local, metavar="FOLDER", help="folder to make")
    merge.add_argument(
        "--method",
        default="svd",
        help="svd, cat, linear, linear_factors, ties, dare_linear, dare_ties, ... (default: svd)",
    )
    merge.add_argument(
        "--weights",
        type=float,
        nargs="+",
        metavar="W",
        help="one number is taken for every adapter; or one for each, in their order (default: 1)",
    )
    merge.add_argument(
        "--density", type=float, nargs="+", metavar="D", help="of ties and dare: one, or one each"
    )
    merge.add_argument("--seed", type=seed, default=0, metavar="N", help="of random masks")
    _sizes(merge, "the largest rank of the adapters")
    merge.set_defaults(run=_merge, late=("adapters", str))


def _add_extract(kinds: Any) -> None:
    extract = kinds.add_parser("extract", help="the adapter that comes nearest to a finetune")
    extract.add_argument("base", help="checkpoint that was finetuned")
    extract.add_argument("finetuned", help="checkpoint of the result")
    extract.add_argument(
        "--out", required=True, type=local, metavar="FOLDER", help="folder to make"
    )
    extract.add_argument(
        "--targets",
        nargs="+",
        metavar="NAME",
        help="last parts of the names of layers, as q_proj (default: every linear layer)",
    )
    extract.add_argument(
        "--others",
        choices=("save", "lose"),
        default="save",
        help="changed norms, biases and embeddings: kept whole, or lost (default: save)",
    )
    extract.add_argument(
        "--prefix",
        default="",
        metavar="TEXT",
        help="before the names of a bare decoder's checkpoint, as transformer. for GPT-2",
    )
    _sizes(extract, "none: give it, or --energy")
    extract.set_defaults(run=_extract)


def _sizes(parser: argparse.ArgumentParser, default: str) -> None:
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rank", type=positive, metavar="R", help=f"default: {default}")
    size.add_argument(
        "--energy", type=float, metavar="E", help="the part of |D|^2 that each layer keeps"
    )
    parser.add_argument("--max-rank", type=positive, metavar="R", help="bound with --energy")
    parser.add_argument(
        "--svd",
        choices=("auto", "exact", "randomized"),
        default="auto",
        help="auto: randomized where the rank is below an eighth of the sides (default: auto)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the factors"
    )
    threads(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--json", type=local, metavar="FILE", help="write the report there")
    talk(parser)


def _add_info(kinds: Any) -> None:
    info = kinds.add_parser("info", help="what an adapter is, and whether it fits a base")
    info.add_argument("adapter", help="folder of an adapter")
    info.add_argument("--base", metavar="CHECKPOINT", help="compare it with this base")
    talk(info)
    info.set_defaults(run=_info)


def _merge(arguments: argparse.Namespace) -> int:
    from cl_fast.merging.composing import merge_adapters

    weights = arguments.weights or [1.0]
    density = arguments.density
    made = merge_adapters(
        arguments.adapters,
        arguments.out,
        weights=weights[0] if len(weights) == 1 else weights,
        method=arguments.method,
        rank=arguments.rank,
        energy=arguments.energy,
        max_rank=arguments.max_rank,
        density=density[0] if density is not None and len(density) == 1 else density,
        seed=arguments.seed,
        svd=arguments.svd,
        dtype=arguments.dtype,
        threads=arguments.threads,
        overwrite=arguments.overwrite,
    )
    _report(arguments, made)
    if not arguments.quiet:
        for note in made.notes:
            print(f"note: {note}")
        print(
            f"{made.path}: {_ranks(made.modules)}, relative error {made.relative:.3g} of the "
            f"combined change ({made.method})"
        )
    return 0


def _extract(arguments: argparse.Namespace) -> int:
    from cl_fast.merging.extracting import extract_adapter

    made = extract_adapter(
        arguments.base,
        arguments.finetuned,
        arguments.out,
        rank=arguments.rank,
        energy=arguments.energy,
        max_rank=arguments.max_rank,
        targets=arguments.targets,
        others=arguments.others,
        svd=arguments.svd,
        dtype=arguments.dtype or "float32",
        prefix=arguments.prefix,
        threads=arguments.threads,
        overwrite=arguments.overwrite,
    )
    _report(arguments, made)
    if not arguments.quiet:
        for lost in made.lost:
            print(f"lost: {lost.name} changed by {lost.norm:.3g}, which is not in the adapter")
        worst = sorted(made.modules, key=lambda module: -module.relative)[:5]
        if len(worst) < len(made.modules):
            print(f"the {len(worst)} largest losses of {len(made.modules)} modules:")
        for module in worst:
            print(f"{module.relative:<8.3g} of the change is lost in {module.name}")
        saved = f", {len(made.saved)} tensors kept whole" if made.saved else ""
        print(
            f"{made.path}: {_ranks(made.modules)}{saved}, relative error {made.relative:.3g} of "
            "the whole change"
        )
    return 0


def _report(arguments: argparse.Namespace, made: Any) -> None:
    if arguments.json is not None:
        from cl_fast.checkpoints.writing import write_whole

        write_whole(arguments.json, [(json.dumps(made.to_json(), indent=1) + "\n").encode()])


def _ranks(modules: Any) -> str:
    ranks = sorted({module.rank for module in modules})
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return f"{span} on {len(modules)} module{'' if len(modules) == 1 else 's'}"


def _info(arguments: argparse.Namespace) -> int:
    from cl_fast.checkpoints.adapters import read_adapter
    from cl_fast.merging.description import bytes_text
    from cl_fast.merging.inputs import resolve

    path = resolve(arguments.adapter)
    adapter = read_adapter(path)
    if arguments.base is not None:
        from cl_fast.checkpoints.checkpoint import Checkpoint
        from cl_fast.merging.adapters import open_adapter

        base = Checkpoint.open(resolve(arguments.base), key="--base")
        derived = open_adapter(base, path, key="adapter")
        derived.check()
        for note in derived.notes:
            print(f"note: {note}")
    if arguments.quiet:
        return 0
    print(f"{adapter.path}: {adapter.words}, {bytes_text(adapter.nbytes)}")
    print(f"base     {adapter.base_name or 'not said'}")
    scales = sorted({module.scale for module in adapter.modules.values()})
    print(f"scale    {' '.join(f'{scale:g}' for scale in scales)}")
    for name, module in adapter.modules.items():
        out, inner = module.size
        kind = "embedding" if module.embedding else "linear"
        print(f"module   {name}: {kind} [{out}, {inner}], rank {module.rank}, {module.a.dtype}")
    for name in adapter.saved:
        print(f"whole    {name}")
    if arguments.base is not None:
        print(f"{'shapes fit' if derived.notes else 'fits    '} {arguments.base}")
    return 0
