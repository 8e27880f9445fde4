"""Which tensors a merge has, and whether its inputs fit each other."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from cl_fast.checkpoints.checkpoint import Checkpoint
from cl_fast.checkpoints.layers import LAYER
from cl_fast.checkpoints.safetensors import TensorInfo
from cl_fast.checkpoints.sidecar import token_count
from cl_fast.errors import CheckpointError, RecipeError
from cl_fast.merging.slices import Cut
from cl_fast.merging.vocabulary import vocabulary_axis
from cl_fast.ops.policy import DTYPES, OUTPUT_DTYPES

if TYPE_CHECKING:
    from cl_fast.merging.recipe import Recipe

__all__ = [
    "check_rows",
    "check_shapes",
    "common_tensors",
    "kind_of_tensor",
    "natural_key",
    "out_dtype",
]

_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.masked_bias)$")
_DIGITS = re.compile(r"([0-9]+)")


def check_rows(groups: Sequence[Mapping[str, TensorInfo]]) -> None:
    """Whether embeddings and head, where they come from different slices, have as many rows.

    Raises:
        CheckpointError: they have not.
    """
    found: dict[str, tuple[int, int, str]] = {}
    for number, infos in enumerate(groups):
        for name, info in infos.items():
            axis = None if LAYER.search(name) else vocabulary_axis(name, info.shape)
            if axis is not None and len(info.shape) == 2:
                found[name] = number, info.shape[axis], info.path
    for name, (number, rows, path) in found.items():
        for other, (owner, first, place) in found.items():
            if owner < number and first != rows:
                raise CheckpointError(
                    f"{other!r} has {first} rows (from {place}), {name!r} {rows} (from {path}): "
                    "models of different vocabularies cannot be put together; name a tokenizer in "
                    "the recipe (tokenizer_source)"
                )


def natural_key(name: str) -> tuple[tuple[tuple[int, str], ...], str]:
    """Sort key with numbers by value: ``layers.2`` comes before ``layers.10``. A total order."""
    parts = _DIGITS.split(name)
    parts[1::2] = [part.lstrip("0") for part in parts[1::2]]
    # Numbers compare by length first; text by itself.
    return tuple((len(part) if i % 2 else 0, part) for i, part in enumerate(parts)), name


def common_tensors(inputs: tuple[Checkpoint, ...], notes: list[str]) -> list[str]:
    """The names that every input has, in natural order. Raises if any input has others."""
    reference = inputs[0]
    wanted = set(reference.tensors)
    dropped = set[str]()
    for checkpoint in inputs[1:]:
        for name in sorted(wanted ^ checkpoint.tensors.keys(), key=natural_key):
            if name in dropped:
                continue
            if name.endswith("lm_head.weight") and _head_is_tied(inputs, name):
                notes.append(
                    f"{name} is stored by some models only and tied to the embeddings; it is left "
                    "out of the output, and loading ties it again"
                )
                dropped.add(name)
            elif _BUFFERS.search(name):
                dropped.add(name)
    buffers = [name for name in dropped if _BUFFERS.search(name)]
    if buffers:
        notes.append(
            f"{len(buffers)} constant buffers ({_listed(buffers, 2)}) are stored by some models "
            "only and left out of the output; loading computes them"
        )
    wanted -= dropped
    for checkpoint in inputs[1:]:
        if checkpoint.tensors.keys() - dropped != wanted:
            raise CheckpointError(_difference(reference, checkpoint, wanted, dropped))
    if not wanted:
        raise CheckpointError(f"{reference.path}: holds no tensors; there is nothing to merge")
    return sorted(wanted, key=natural_key)


def _head_is_tied(inputs: tuple[Checkpoint, ...], name: str) -> bool:
    """Whether every model that stores the head ties it, as far as the configs tell.

    A config that says nothing means its class's default. A model of the same class that says
    nothing either and has no head shows that this default is to tie.
    """
    default_ties = {
        str((checkpoint.config or {}).get("model_type"))
        for checkpoint in inputs
        if name not in checkpoint.tensors and checkpoint.config and checkpoint.tied is None
    }
    return all(
        checkpoint.tied
        or (
            checkpoint.tied is None
            and checkpoint.config is not None
            and str(checkpoint.config.get("model_type")) in default_ties
        )
        for checkpoint in inputs
        if name in checkpoint.tensors
    )


def _difference(
    reference: Checkpoint, checkpoint: Checkpoint, wanted: set[str], dropped: set[str]
) -> str:
    missing = sorted(wanted - checkpoint.tensors.keys(), key=natural_key)
    extra = sorted(checkpoint.tensors.keys() - dropped - wanted, key=natural_key)
    words = [f"{checkpoint.path} does not have the same tensors as {reference.path}:"]
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({_listed(missing)})")
    if extra:
        parts.append(f"{len(extra)} extra ({_listed(extra)})")
    words.append(" and ".join(parts) + ".")
    words.append(_rename_words(missing, extra))
    return " ".join(words).strip()


def _rename_words(missing: list[str], extra: list[str]) -> str:
    """What would explain the difference, if something plain does."""
    unclaimed = set(extra)
    added, removed = dict[str, int](), dict[str, int]()
    tails = {tail for name in missing for tail in _tails(name)} & unclaimed
    for name in missing:
        for tail in _tails(name):
            if tail in tails:
                prefix = name.removesuffix(tail)
                removed[prefix] = removed.get(prefix, 0) + 1
    absent = set(missing)
    for name in extra:
        for tail in _tails(name):
            if tail in absent:
                prefix = name.removesuffix(tail)
                added[prefix] = added.get(prefix, 0) + 1
    for counts, verb in ((removed, "lacks"), (added, "adds")):
        if counts:
            prefix, count = max(counts.items(), key=lambda item: item[1])
            return (
                f"In {count} names it {verb} the prefix {prefix!r}: save both with the same model "
                "class"
            )
    if missing and all(name.endswith("lm_head.weight") for name in missing + extra):
        return "One of them ties its embeddings and the other does not; save both alike"
    if extra and not missing and all(name.endswith("lm_head.weight") for name in extra):
        return (
            "It has an output head of its own (its config.json does not say "
            "tie_word_embeddings: true), which the other has not; save both alike"
        )
    if any("lora_" in name for name in extra):
        return "It holds unmerged LoRA weights; merge them into their base first"
    if missing and extra:
        close = difflib.get_close_matches(missing[0], extra[:2000], n=1, cutoff=0.7)
        if close:
            return f"Perhaps {missing[0]!r} is called {close[0]!r} there"
    return "They are different architectures, or one is incomplete"


def _tails(name: str) -> Iterator[str]:
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)


def _listed(names: Sequence[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return shown + (f", and {len(names) - limit} more" if len(names) > limit else "")


def check_shapes(inputs: tuple[Checkpoint, ...], names: list[str]) -> None:
    """Raise if a tensor has another shape in one of the inputs."""
    reference = inputs[0]
    for checkpoint in inputs[1:]:
        if checkpoint is reference:
            continue
        for name in names:
            ours, theirs = reference.tensors[name].shape, checkpoint.tensors[name].shape
            if ours == theirs:
                continue
            axis = vocabulary_axis(name, ours)
            if axis is not None and _but(ours, axis) == _but(theirs, axis):
                raise CheckpointError(
                    f"tensor {name!r} has {ours[axis]} rows in {reference.path} and {theirs[axis]} "
                    f"in {checkpoint.path}: their vocabularies differ. "
                    f"{_vocabulary(reference)}; {_vocabulary(checkpoint)}. Write in the recipe "
                    "whose tokens the output has, and each model's rows are put in their order: "
                    "tokenizer_source: union (the tokens of all), base, or one of the models"
                )
            raise CheckpointError(
                f"tensor {name!r} has shape {list(ours)} in "
                f"{reference.path}{_stored(reference, name)} and {list(theirs)} in "
                f"{checkpoint.path}{_stored(checkpoint, name)}; only models "
                "of one architecture and size can be merged"
            )


def _stored(checkpoint: Checkpoint, name: str) -> str:
    """What a tensor is called in a model whose layers get other numbers."""
    stored = checkpoint.stored[name] if isinstance(checkpoint, Cut) else name
    return "" if stored == name else f" ({stored!r} there)"


def _but(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def _vocabulary(checkpoint: Checkpoint) -> str:
    path = checkpoint.folder / "tokenizer.json"
    tokens = token_count(checkpoint.folder)
    said = checkpoint.vocab_size
    count = f"{tokens} tokens in {path}" if tokens is not None else f"no readable {path}"
    return f"{checkpoint.folder.name} has {count}, vocab_size {said if said else 'unknown'}"


def kind_of_tensor(inputs: tuple[Checkpoint, ...], name: str) -> Literal["combine", "copy"]:
    """Whether a tensor is combined, or copied because all inputs must have the same. Raises."""
    found = [(checkpoint, checkpoint.tensors[name].dtype) for checkpoint in inputs]
    if all(dtype in DTYPES for _, dtype in found):
        return "combine" if inputs[0].tensors[name].nbytes else "copy"
    for checkpoint, dtype in found:
        if dtype == "F64":
            raise CheckpointError(
                f"{checkpoint.tensors[name].path}: tensor {name!r} is float64, which is not "
                "supported; save the checkpoint in float32 or bfloat16"
            )
        if dtype not in DTYPES and dtype not in _COPIED:
            raise CheckpointError(
                f"{checkpoint.tensors[name].path}: tensor {name!r} has type {dtype}, which cannot "
                f"be merged; supported are {', '.join(DTYPES)}, and integers that all models share"
            )
    if len({dtype for _, dtype in found}) > 1:
        (one, left), (two, right) = found[0], next(f for f in found if f[1] != found[0][1])
        raise CheckpointError(
            f"tensor {name!r} is {left} in {one.path} and {right} in {two.path}; a tensor of "
            "integers or booleans must be the same in all models"
        )
    return "copy"


_COPIED = frozenset(("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"))


def out_dtype(recipe: Recipe, info: TensorInfo, kind: str) -> str:
    """The type that a tensor is written in. Raises where the recipe must say one."""
    if info.dtype not in DTYPES:
        return info.dtype
    dtype = recipe.output_dtype or info.dtype
    if dtype not in OUTPUT_DTYPES and kind == "combine":
        raise RecipeError(
            f"out_dtype: is needed, because {info.path} stores {info.name!r} as {dtype}, which is "
            "read but not written; set out_dtype: bfloat16"
        )
    return dtype
