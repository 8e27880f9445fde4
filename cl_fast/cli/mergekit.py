"""The flags of `mergekit-yaml` and `mergekit-multi`, under their names.

Those that change a result or where things lie do the same here. Those of which it is true that they
change nothing here are accepted, and it is told why. What has no counterpart is refused in words.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import Any, NamedTuple

from cl_fast.cli.arguments import positive, size
from cl_fast.errors import RecipeError

__all__ = ["add", "notes", "shard_size"]


class _Flag(NamedTuple):
    """A flag without effect. `kind`: a type of its value, or None for --flag/--no-flag."""

    name: str
    kind: Any
    why: str


_ON_CPU = "the merge runs on the CPU"

#: Flags that change nothing here, and why.
_WITHOUT_EFFECT = (
    _Flag("cuda", None, _ON_CPU),
    _Flag("gpu-rich", None, _ON_CPU),
    _Flag(
        "low-cpu-memory",
        None,
        "nothing is kept on a device; --dry-run tells the memory that is needed",
    ),
    _Flag("read-to-gpu", None, _ON_CPU),
    _Flag("multi-gpu", None, _ON_CPU),
    _Flag("lazy-unpickle", None, "pickles are never opened; safetensors are always read in parts"),
    _Flag("clone-tensors", None, "every tensor of the output is written by itself"),
    _Flag("async-write", None, "one file is made durable while the next is computed, always"),
    _Flag("write-threads", positive, "all threads write"),
    _Flag("trust-remote-code", None, "no code of a model is ever run"),
    _Flag("lora-merge-cache", str, "adapters are put on their base while it is read"),
    _Flag("lora-merge-dtype", str, "adapters are put on in float32, whatever it says"),
)


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of mergekit that `cl-fast merge` does not have under names of its own."""
    group = parser.add_argument_group(
        "as in mergekit", "flags of mergekit-yaml and mergekit-multi; docs/from-mergekit.md"
    )
    both = argparse.BooleanOptionalAction
    group.add_argument(
        "--allow-crimes",
        action=both,
        default=False,
        help="let slices put layers together of models that are not of one architecture and size",
    )
    group.add_argument(
        "--unsafe-truncate-embeddings",
        action=both,
        default=False,
        help="where vocabularies differ and the recipe names no tokenizer: cut embeddings to the "
        "fewest rows; right only where the tokens that stay have the same ids in all models",
    )
    group.add_argument(
        "--copy-tokenizer",
        action=both,
        default=True,
        help="with --no- the output gets a tokenizer only if the recipe names one",
    )
    group.add_argument(
        "--write-model-card", action=both, default=True, help="with --no- no README.md is written"
    )
    group.add_argument(
        "--safe-serialization", action=both, default=True, help="the output is always safetensors"
    )
    group.add_argument(
        "--transformers-cache",
        metavar="FOLDER",
        help="where models of the hub are kept, in place of HF_HUB_CACHE",
    )
    group.add_argument(
        "-j", "--num-threads", type=positive, dest="threads", metavar="N", help="as --threads"
    )
    group.add_argument("--device", metavar="DEVICE", help=f"told and accepted: {_ON_CPU}")
    group.add_argument("-v", action="store_true", dest="verbose", help="as --verbose")
    group.add_argument(
        "-I",
        "--intermediate-dir",
        metavar="FOLDER",
        help="where a file of several recipes puts the outputs of all but the last "
        "(default: OUTPUT.stages)",
    )
    group.add_argument(
        "--lazy",
        action=both,
        default=True,
        help="with --no- merges of several recipes are made anew that are finished already",
    )
    for flag in _WITHOUT_EFFECT:
        if flag.kind is None:
            group.add_argument(
                f"--{flag.name}", action=both, default=False, help=f"told and accepted: {flag.why}"
            )
        else:
            group.add_argument(
                f"--{flag.name}",
                type=flag.kind,
                metavar="X",
                help=f"told and accepted: {flag.why}",
            )


def notes(arguments: argparse.Namespace) -> list[str]:
    """What of the flags is told; those for the environment are put there.

    Raises:
        RecipeError: a flag asks for what there is not.
    """
    if not arguments.safe_serialization:
        raise RecipeError(
            "--no-safe-serialization: pickles are not written, since opening one can run any code; "
            "leave it out"
        )
    if arguments.transformers_cache is not None:
        os.environ["HF_HUB_CACHE"] = arguments.transformers_cache
        if constants := sys.modules.get("huggingface_hub.constants"):  # it has looked already
            vars(constants)["HF_HUB_CACHE"] = arguments.transformers_cache
    found = [
        f"--{flag.name} changes nothing: {flag.why}"
        for flag in _WITHOUT_EFFECT
        if getattr(arguments, flag.name.replace("-", "_"))
    ]
    if arguments.device not in (None, "cpu"):
        found.append(f"--device {arguments.device} changes nothing: {_ON_CPU}")
    return found


def shard_size(text: str) -> int:
    """A number of bytes, as 5GB; `K`, `M` and `B` are thousand, million and billion, as there."""
    if re.fullmatch(r"\s*[0-9]+(\.[0-9]+)?[bB]\s*", text):
        text = re.sub(r"[bB]", "G", text)
    return size(text)
