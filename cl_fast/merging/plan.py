"""What a recipe becomes for these files: every read, every write, known before the first byte.

:func:`make_plan` opens every input header, finds every error that the headers can tell, and
returns a :class:`Plan`: for each output tensor its sources, weights, densities, random keys, its
policy and its exact place in an output shard. Nothing is written and no weight is read. The plan
is a value: the engine executes it, ``--dry-run`` prints it through :func:`describe`, and its
fingerprint lets an interrupted run continue only with the same inputs and settings.

Torch-free and numpy-free; a checkpoint of many thousand tensors plans in well under a second.
"""

from __future__ import annotations

import difflib
import gc
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cl_fast.checkpoints.checkpoint import SINGLE_NAME, Checkpoint, absolute
from cl_fast.checkpoints.safetensors import (
    DTYPE_BITS,
    TensorInfo,
    build_header,
    tensor_nbytes,
)
from cl_fast.checkpoints.sidecar import (
    TORCH_NAMES,
    Sidecar,
    has_tokenizer,
    plan_sidecars,
    token_count,
)
from cl_fast.errors import CheckpointError, RecipeError
from cl_fast.merging.methods import suggest
from cl_fast.merging.patches import PatchedCheckpoint, is_patch
from cl_fast.ops.policy import DTYPES, OUTPUT_DTYPES, Policy, trim_keep_count
from cl_fast.ops.streams import keep_threshold, stream_key

if TYPE_CHECKING:
    from cl_fast.merging.recipe import Recipe, Setting

__all__ = [
    "NUMERICS",
    "Patched",
    "Plan",
    "ShardPlan",
    "Source",
    "TensorPlan",
    "Term",
    "bytes_text",
    "describe",
    "make_plan",
    "natural_key",
    "patched",
    "term_names",
]

#: Version of the arithmetic and of the random stream. It is part of every fingerprint, so a run
#: that was interrupted under other arithmetic is never continued.
NUMERICS = 1


@dataclass(frozen=True, slots=True)
class Source:
    """One stored tensor of an input: ``nbytes`` bytes at absolute ``offset`` of file ``path``.

    ``dtype`` is the safetensors name (``BF16``, ``F32``, ...).
    """

    path: str
    offset: int
    dtype: str
    nbytes: int

    @property
    def stored(self) -> int:
        """Bytes that are read for it."""
        return self.nbytes

    @classmethod
    def of(cls, info: TensorInfo) -> Source:
        return cls(info.path, info.offset, info.dtype, info.nbytes)


@dataclass(frozen=True, slots=True)
class Patched(Source):
    """A tensor that no file holds: a stored weight with the factors of a patch on it.

    ``base + u v^T`` of ``shape``, rounded to ``dtype``; ``u`` and ``v`` are such that it is, also
    where the patch has them the other way round. ``path`` is the patch's file. The executor makes
    it when it is needed, whole.
    """

    shape: tuple[int, int]
    rank: int
    base: Source
    u: Source
    v: Source

    @property
    def stored(self) -> int:
        return self.base.nbytes + self.u.nbytes + self.v.nbytes

    @property
    def memory(self) -> int:
        """Bytes that making it takes: itself, its base, float32 sums, the factors in parts."""
        m, n = self.shape
        factors = 8 * (m + n) * self.rank
        return self.nbytes + self.base.nbytes + 4 * m * n + 5 * factors + _PATCH_BYTES


@dataclass(frozen=True, slots=True)
class Term:
    """One model's part in one tensor.

    ``model`` is the name that keys its random stream, ``key`` the 64-bit key of this tensor
    (0 where nothing is drawn at random). ``weight`` and ``density`` are the recipe's values for
    this tensor, with filters and gradients resolved.
    """

    model: str
    source: Source
    weight: float
    density: float
    key: int


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One output tensor.

    ``offset`` is absolute in the shard file with index ``shard``; ``dtype`` is the output type.
    ``kind="copy"`` tensors (integers, booleans, empty tensors, and where all models are patches
    what they leave alone) are not combined: the bytes of ``base`` (or of the first term without a
    base) are written, and every term must equal them.
    ``lam`` multiplies the reduced delta; it is 1 where the method has no lambda.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    shard: int
    offset: int
    nbytes: int
    kind: Literal["combine", "copy"]
    base: Source | None
    terms: tuple[Term, ...]
    policy: Policy
    lam: float

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output file: ``header`` (length word, JSON, padding) followed by the tensors.

    ``size`` is that of the whole file, ``tensors`` are indexes into ``Plan.tensors`` in the order
    of their offsets.
    """

    filename: str
    header: bytes
    size: int
    tensors: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a merge will do. See :func:`make_plan`.

    Attributes:
        output: folder to write.
        recipe: the recipe it came from.
        tensors: every output tensor, in natural order of the names.
        shards: the output files.
        index: content of ``model.safetensors.index.json``; ``None`` for a single file.
        inputs: opened checkpoints, base first (if any), then the models in recipe order; a
            checkpoint that is used twice appears twice.
        has_base: whether ``inputs[0]`` is the base of the deltas.
        models: the names of the terms, in recipe order; ``tensors[i].terms`` has this order.
        donor: the checkpoint that config and generation config come from.
        tokenizer_donor: folder that tokenizer and chat template come from.
        sidecars: the files to write beside the weights.
        notes: sentences that the user should be told.
        fingerprint: hex digest of all that decides the output's bytes.
        bytes_read: estimate over all passes. bytes_written: weights, headers and sidecars.
        passes: most often that any input byte is read.
        memory: predicted peak of anonymous memory in bytes.
        seed: the seed of the random stream; ``None`` if the method draws nothing.
        model_keep: for ``trim_scope="model"`` the number of elements that each term keeps over
            the whole model (position = position in ``terms``; the tensors that take part are
            those with ``kind="combine"``); empty otherwise.
    """

    output: Path
    recipe: Recipe
    tensors: tuple[TensorPlan, ...]
    shards: tuple[ShardPlan, ...]
    index: dict[str, Any] | None
    inputs: tuple[Checkpoint, ...]
    has_base: bool
    models: tuple[str, ...]
    donor: Checkpoint
    tokenizer_donor: Path
    sidecars: tuple[Sidecar, ...]
    notes: tuple[str, ...]
    fingerprint: str
    bytes_read: int
    bytes_written: int
    passes: int
    memory: int
    seed: int | None
    model_keep: tuple[int, ...]


def make_plan(
    recipe: Recipe,
    output: str | os.PathLike[str],
    *,
    out_shard_size: int = 5_000_000_000,
    seed: int | None = None,
    threads: int | None = None,
    memory: int | None = None,
) -> Plan:
    """Read every input header, find every error they can tell, and lay out the output.

    Nothing is written, and no weight is read.

    Args:
        recipe: from ``load_recipe`` or ``parse_recipe``.
        output: the folder that the merge will write.
        out_shard_size: bytes of tensors per output file; a larger tensor has a file of its own.
        seed: overrides the recipe's.
        threads: as the engine will be given; only for the prediction of memory.
        memory: likewise, its bound on working memory in bytes.

    Raises:
        CheckpointError: an input is missing, malformed, quantised, or does not fit the others.
        RecipeError: the recipe does not fit these inputs: output is an input, a filter matches
            no tensor, a key has no effect.
    """
    if type(out_shard_size) is not int:
        raise RecipeError(f"out_shard_size: must be a number of bytes; got {out_shard_size!r}")
    if out_shard_size < 1:
        raise RecipeError(f"out_shard_size: must be at least 1 byte; got {out_shard_size}")
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**64):
        raise RecipeError(f"seed: must be a whole number of at least 0 and below 2**64; got {seed}")
    with _collector_paused():
        return _plan(recipe, output, out_shard_size, seed, threads, memory)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Planning makes hundred thousands of tuples and no cycles; collecting costs a third of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _plan(
    recipe: Recipe,
    output: str | os.PathLike[str],
    out_shard_size: int,
    seed: int | None,
    threads: int | None,
    memory: int | None,
) -> Plan:
    folder = os.fspath(output)
    if not folder.strip() or "\0" in folder:
        raise RecipeError(f"output: {folder!r} is not a path; name the folder to write")
    target = absolute(folder)
    method, policy, notes = recipe.method, recipe.policy, list[str]()
    if seed is not None and not method.random:
        notes.append(f"{method.name} draws nothing at random; the seed has no effect")
    if method.random:
        seed = seed if seed is not None else (recipe.seed or 0)
    else:
        seed = None

    _check_output(recipe, target)
    inputs = _open_inputs(recipe)
    first = 1 if method.needs_base else 0
    reference = inputs[0]
    names = _common_tensors(inputs, notes)
    _check_shapes(inputs, names)
    kinds = {name: _kind_of(inputs, name) for name in names}
    combined = [name for name in names if kinds[name] == "combine"]
    models = term_names([recipe.models[i].model for i in recipe.terms])
    numbers = _Numbers(recipe, combined, reference, notes)
    if all(density >= 1.0 for row in numbers.density.values() for density in row):
        policy = replace(
            policy, sparsify="none", rescale="none", trim_scope="tensor", trim_ties="first"
        )
    model_keep = _model_keep(policy, recipe, numbers, reference, combined)

    dtypes = {name: _out_dtype(recipe, reference.tensors[name], kinds[name]) for name in names}
    sources = [
        {
            name: Source(info.path, info.offset, info.dtype, info.nbytes)
            for name, info in checkpoint.tensors.items()
        }
        for checkpoint in inputs
    ]
    for checkpoint, stored in zip(inputs, sources, strict=True):
        if isinstance(checkpoint, PatchedCheckpoint):
            stored.update({name: _patched(checkpoint, name) for name in checkpoint.edited})
    only_patches = bool(first) and all(isinstance(c, PatchedCheckpoint) for c in inputs[1:])
    shards, places = _lay_out(names, dtypes, reference, out_shard_size)
    tensors = []
    for name in names:
        info, (shard, offset) = reference.tensors[name], places[name]
        weights, densities, lam = numbers.of(name)
        terms = tuple(
            Term(
                model,
                sources[first + k][name],
                weights[k],
                densities[k],
                stream_key(seed, model, name)
                if seed is not None and kinds[name] == "combine" and densities[k] < 1.0
                else 0,
            )
            for k, model in enumerate(models)
        )
        kind, base = kinds[name], sources[0][name] if first else None
        if only_patches and kind == "combine" and not model_keep:
            if method.name == "task_arithmetic" and weights == (1.0,) and lam == 1.0:
                terms, alone = _applied(terms[0], dtypes[name])
                kind, base = ("copy", None) if alone else (kind, base)
            if dtypes[name] == info.dtype and all(term.source == base for term in terms):
                kind = "copy"
        tensors.append(
            TensorPlan(
                name,
                info.shape,
                dtypes[name],
                shard,
                offset,
                tensor_nbytes(dtypes[name], info.shape),
                kind,
                base,
                terms,
                policy,
                lam,
            )
        )

    floats = {dtypes[name] for name in combined}
    uniform = next(iter(floats)) if len(floats) == 1 else None
    donor = _donor(recipe, inputs)
    tokenizer_folder = _tokenizer_folder(recipe, inputs, donor)
    sidecars, told = plan_sidecars(donor, tokenizer_folder, uniform)
    notes += told
    _note_configs(inputs, donor, notes)
    _note_recipe(recipe, floats, notes)
    index = _index(tensors, shards)
    passes, bytes_read = _reads(tensors)
    written = sum(shard.size for shard in shards) + sum(file.nbytes for file in sidecars)
    if index is not None:
        written += len(json.dumps(index, indent=2)) + 1
    plan = Plan(
        output=target,
        recipe=recipe,
        tensors=tuple(tensors),
        shards=shards,
        index=index,
        inputs=inputs,
        has_base=bool(first),
        models=models,
        donor=donor,
        tokenizer_donor=tokenizer_folder,
        sidecars=sidecars,
        notes=tuple(notes),
        fingerprint="",
        bytes_read=bytes_read,
        bytes_written=written,
        passes=passes,
        memory=_predicted_memory(policy, inputs, threads, memory)
        + _patches_memory(tensors, whole=bool(model_keep)),
        seed=seed,
        model_keep=model_keep,
    )
    return replace(plan, fingerprint=_fingerprint(plan))


# Inputs.


def term_names(references: Sequence[str]) -> tuple[str, ...]:
    """The names that key the random streams of the models, one per reference.

    The last component of the path; where two references share it, the whole reference as written
    without a trailing slash; a reference that comes again gets ``#2``, ``#3``, ...
    """
    stripped = [reference.rstrip("/") or reference for reference in references]
    short = [text if Path(text).name in ("", "..") else Path(text).name for text in stripped]
    owners: dict[str, set[str]] = {}
    for name, text in zip(short, stripped, strict=True):
        owners.setdefault(name, set()).add(text)
    names, seen = [], dict[str, int]()
    for name, text in zip(short, stripped, strict=True):
        unique = name if len(owners[name]) == 1 else text
        seen[unique] = seen.get(unique, 0) + 1
        names.append(unique if seen[unique] == 1 else f"{unique}#{seen[unique]}")
    return tuple(names)


def _references(recipe: Recipe) -> list[tuple[str, str]]:
    listed = [(f"models[{i}].model", recipe.models[i].model) for i in recipe.terms]
    if recipe.method.needs_base and recipe.base_model is not None:
        listed.insert(0, ("base_model", recipe.base_model))
    return listed


def _check_output(recipe: Recipe, target: Path) -> None:
    real = _resolve(target)
    listed = _references(recipe)
    if recipe.tokenizer_reference is not None:
        listed.append(("tokenizer_source", recipe.tokenizer_reference))
    for key, reference in listed:
        folder = _resolve(absolute(reference))
        if folder.is_file() and folder.parent == real:
            folder = folder.parent
        if folder == real:
            raise RecipeError(
                f"{key}: {reference!r} is the output folder itself; choose another output, inputs "
                "are never touched"
            )
        if real.is_relative_to(folder):
            raise RecipeError(
                f"{key}: the output {target} lies inside the input {reference!r}; choose a folder "
                "beside it"
            )
        if folder.is_relative_to(real):
            raise RecipeError(
                f"{key}: the input {reference!r} lies inside the output folder {target}; choose "
                "another output"
            )


def _resolve(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a loop of links: opening it will say so
        return path


def _open_inputs(recipe: Recipe) -> tuple[Checkpoint, ...]:
    opened: dict[str, Checkpoint] = {}
    inputs: list[Checkpoint] = []
    for key, reference in _references(recipe):
        if reference not in opened:
            if is_patch(absolute(reference)):
                opened[reference] = _open_patch(recipe, inputs, key, reference)
                inputs.append(opened[reference])
                continue
            try:
                checkpoint = Checkpoint.open(reference, key=key)
            except CheckpointError as error:
                if recipe.source is None or Path(reference).is_absolute():
                    raise
                beside = recipe.source.parent / reference
                if Path(reference).exists() or not beside.exists():
                    raise
                raise CheckpointError(
                    f"{error}. Relative paths start at the working directory; {beside} exists: "
                    f"run from {recipe.source.parent} or write the whole path"
                ) from None
            checkpoint.refuse_quantised()
            opened[reference] = checkpoint
        inputs.append(opened[reference])
    return tuple(inputs)


def _open_patch(
    recipe: Recipe, inputs: Sequence[Checkpoint], key: str, reference: str
) -> PatchedCheckpoint:
    if key == "base_model":
        raise RecipeError(
            f"base_model: {reference!r} is an edit patch, which is a change of a model and not "
            "one; name the checkpoint that it edits"
        )
    if not recipe.method.needs_base:
        raise RecipeError(
            f"{key}: {reference!r} is an edit patch, whose delta is taken against a base, and "
            f"merge_method {recipe.merge_method!r} has none; use task_arithmetic, ties or a dare "
            "method with the base_model that it edits"
        )
    return PatchedCheckpoint.over(inputs[0], reference, key=key)


def _patched(checkpoint: PatchedCheckpoint, name: str) -> Patched:
    """The source of a tensor that a patch edits."""
    layer, info = checkpoint.edited[name], checkpoint.tensors[name]
    u, v = Source.of(layer.u), Source.of(layer.v)
    if layer.transposed:
        u, v = v, u
    return Patched(
        path=info.path,
        offset=0,
        dtype=info.dtype,
        nbytes=info.nbytes,
        shape=layer.shape,
        rank=layer.rank,
        base=Source.of(checkpoint.base.tensors[name]),
        u=u,
        v=v,
    )


def _applied(term: Term, dtype: str) -> tuple[tuple[Term, ...], bool]:
    """A patch's term as the result itself, rounded once; and whether it is one."""
    source = term.source
    if not isinstance(source, Patched):
        return (term,), False
    source = replace(source, dtype=dtype, nbytes=tensor_nbytes(dtype, source.shape))
    return (replace(term, source=source),), True


def _donor(recipe: Recipe, inputs: tuple[Checkpoint, ...]) -> Checkpoint:
    """The base; without one the model that ``base_model`` names, else the first."""
    if not recipe.method.needs_base and recipe.base_model is not None:
        wanted = _resolve(absolute(recipe.base_model))
        for checkpoint in inputs:
            if _resolve(checkpoint.path) == wanted:
                return checkpoint
    return inputs[0]


def _tokenizer_folder(recipe: Recipe, inputs: tuple[Checkpoint, ...], donor: Checkpoint) -> Path:
    reference = recipe.tokenizer_reference
    if reference is None:
        return donor.folder
    path = absolute(reference)
    if is_patch(path):
        raise RecipeError(
            f"tokenizer_source: {reference!r} is an edit patch, which has no tokenizer; leave it "
            "out, or name the base or a model"
        )
    for checkpoint in inputs:
        if checkpoint.reference == reference or _resolve(checkpoint.path) == _resolve(path):
            return checkpoint.folder
    folder = path if path.is_dir() else path.parent
    if not path.exists() or not has_tokenizer(folder):
        wrong = "holds no tokenizer" if path.exists() else "does not exist"
        raise CheckpointError(
            f"tokenizer_source: {reference!r} {wrong}; name one of the models or a folder with "
            "tokenizer.json"
        )
    count, rows = token_count(folder), _embedding_rows(donor)
    if count is not None and rows is not None and count > rows:
        raise CheckpointError(
            f"tokenizer_source: the tokenizer of {folder} has {count} tokens, but the merged "
            f"embeddings have {rows} rows; use the tokenizer of one of the models"
        )
    return folder


def _embedding_rows(checkpoint: Checkpoint) -> int | None:
    for name, info in checkpoint.tensors.items():
        if _EMBEDDING.search(name) and len(info.shape) == 2:
            return info.shape[0]
    return None


# Which tensors, and whether they fit.

_EMBEDDING = re.compile(r"(embed_tokens|wte|word_embeddings|embed_in|shared|lm_head|embed_out)\b")
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.masked_bias)$")
_DIGITS = re.compile(r"([0-9]+)")


def natural_key(name: str) -> tuple[tuple[tuple[int, str], ...], str]:
    """Sort key with numbers by value: ``layers.2`` comes before ``layers.10``. A total order."""
    parts = _DIGITS.split(name)
    parts[1::2] = [part.lstrip("0") for part in parts[1::2]]
    # Numbers compare by length first; text by itself.
    return tuple((len(part) if i % 2 else 0, part) for i, part in enumerate(parts)), name


def _common_tensors(inputs: tuple[Checkpoint, ...], notes: list[str]) -> list[str]:
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


def _check_shapes(inputs: tuple[Checkpoint, ...], names: list[str]) -> None:
    reference = inputs[0]
    for checkpoint in inputs[1:]:
        if checkpoint is reference:
            continue
        for name in names:
            ours, theirs = reference.tensors[name].shape, checkpoint.tensors[name].shape
            if ours == theirs:
                continue
            if _EMBEDDING.search(name) and len(ours) == len(theirs) == 2 and ours[1] == theirs[1]:
                raise CheckpointError(
                    f"tensor {name!r} has {ours[0]} rows in {reference.path} and {theirs[0]} in "
                    f"{checkpoint.path}: their vocabularies differ. "
                    f"{_vocabulary(reference)}; {_vocabulary(checkpoint)}. This version merges "
                    "models of one vocabulary; resize the embeddings of one of them to the other's "
                    "tokenizer (resize_token_embeddings) first"
                )
            raise CheckpointError(
                f"tensor {name!r} has shape {list(ours)} in {reference.path} and {list(theirs)} in "
                f"{checkpoint.path}; only models of one architecture and size can be merged"
            )


def _vocabulary(checkpoint: Checkpoint) -> str:
    path = checkpoint.folder / "tokenizer.json"
    tokens = token_count(checkpoint.folder)
    said = checkpoint.vocab_size
    count = f"{tokens} tokens in {path}" if tokens is not None else f"no readable {path}"
    return f"{checkpoint.folder.name} has {count}, vocab_size {said if said else 'unknown'}"


def _kind_of(inputs: tuple[Checkpoint, ...], name: str) -> Literal["combine", "copy"]:
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


def _out_dtype(recipe: Recipe, info: TensorInfo, kind: str) -> str:
    if info.dtype not in DTYPES:
        return info.dtype
    dtype = recipe.output_dtype or info.dtype
    if dtype not in OUTPUT_DTYPES and kind == "combine":
        raise RecipeError(
            f"out_dtype: is needed, because {info.path} stores {info.name!r} as {dtype}, which is "
            "read but not written; set out_dtype: bfloat16"
        )
    return dtype


# The numbers of each tensor.

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)(?=\.|$)")
_OTHER_STACKS = re.compile(r"(vis|audio|image|speech)")


class _Numbers:
    """Weights, densities and lambda of every combined tensor; what has no effect is an error."""

    def __init__(
        self, recipe: Recipe, names: list[str], reference: Checkpoint, notes: list[str]
    ) -> None:
        self._count = len(recipe.terms)
        self.weight: dict[str, tuple[float, ...]] = {}
        self.density: dict[str, tuple[float, ...]] = {}
        self.lam: dict[str, float] = {}
        depths, layered = _depths(names, reference)
        used: set[str] = set()
        weights = [recipe.chain(i, "weight") for i in recipe.terms]
        densities = [recipe.chain(i, "density") for i in recipe.terms]
        lam = recipe.chain(None, "lambda")
        normalized = not recipe.policy.difference and recipe.policy.reduce == "mean"
        for name in names:
            t = depths[name]
            row = tuple(_value(chain, name, t, used, required=True) for chain in weights)
            self.weight[name] = row
            self.density[name] = tuple(_value(chain, name, t, used) for chain in densities)
            self.lam[name] = _value(lam, name, t, used)
            if normalized and recipe.policy.divisor == "weights" and abs(sum(row)) < 1e-8:
                raise RecipeError(
                    f"parameters.weight: the weights of tensor {name!r} sum to {sum(row):g}, which "
                    "cannot be normalized to a mean; set normalize: false or change the weights"
                )
        self._check_used(recipe, names, used, layered)
        for k, i in enumerate(recipe.terms):
            if names and all(row[k] == 0.0 for row in self.weight.values()):
                notes.append(
                    f"models[{i}]: the weight of {recipe.models[i].model!r} is 0 in every tensor"
                )
            if recipe.policy.sparsify != "none" and not densities[k]:
                notes.append(
                    f"models[{i}]: no density is given, so all of the delta of "
                    f"{recipe.models[i].model!r} is kept"
                )

    def of(self, name: str) -> tuple[tuple[float, ...], tuple[float, ...], float]:
        """Weights, densities, lambda; ones for a tensor that is copied."""
        ones = (1.0,) * self._count
        return self.weight.get(name, ones), self.density.get(name, ones), self.lam.get(name, 1.0)

    def _check_used(self, recipe: Recipe, names: list[str], used: set[str], layered: bool) -> None:
        if not names:
            return
        for setting in recipe.settings():
            if setting.key not in used:
                raise RecipeError(
                    f"{setting.key}: has no effect, since every model has a {setting.name} of its "
                    "own; remove it"
                )
            for key, text in setting.filters():
                if key in used:
                    continue
                if any(text in name for name in names):
                    raise RecipeError(
                        f"{key}: the filter {text!r} has no effect, since other filters or values "
                        "come before it for all of its tensors; move it up or remove it"
                    )
                raise RecipeError(
                    f"{key}: the filter {text!r} matches no tensor{_filter_hint(text, names)}"
                )
            if setting.has_gradient and not layered:
                raise RecipeError(
                    f"{setting.key}: a gradient runs over layers, but no tensor name of "
                    f"{recipe.models[recipe.terms[0]].model!r} has a layer number "
                    "('.layers.3.', '.h.3.', '.blocks.3.'); use filters"
                )


def _value(
    chain: Sequence[Setting], name: str, t: float, used: set[str], *, required: bool = False
) -> float:
    for setting in chain:
        value = setting.evaluate(name, t, used)
        if value is not None:
            return value
    if chain and required:
        raise RecipeError(
            f"{chain[-1].key}: no filter matches tensor {name!r}; add a default at the end "
            "('- value: ...')"
        )
    return 1.0


def _filter_hint(text: str, names: list[str]) -> str:
    parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
    hint = suggest(text.strip("."), parts)
    if hint:
        return hint
    return f"; filters are parts of names such as {names[len(names) // 2]!r}"


def _depths(names: list[str], reference: Checkpoint) -> tuple[dict[str, float], bool]:
    """Depth in [0, 1] of every tensor (0 outside the layers), and whether there are layers.

    Stacks (``model.layers.``, ``vision.blocks.``) count for themselves. The number of layers is
    config.json's for the main stack, else one more than the highest number in the names.
    """
    place: dict[str, tuple[str, int]] = {}
    count: dict[str, int] = {}
    size: dict[str, int] = {}
    for name in names:
        match = _LAYER.search(name)
        if match is None:
            continue
        stack, layer = name[: match.start(1)], int(match[1])
        place[name] = (stack, layer)
        count[stack] = max(count.get(stack, 0), layer + 1)
        size[stack] = size.get(stack, 0) + 1
    main = [stack for stack in size if not _OTHER_STACKS.search(stack)]
    if main and reference.layers is not None:
        count[max(main, key=lambda stack: size[stack])] = reference.layers
    depths = dict.fromkeys(names, 0.0)
    for name, (stack, layer) in place.items():
        last = count[stack] - 1
        depths[name] = min(1.0, layer / last) if last > 0 else 1.0
    return depths, bool(place)


def _model_keep(
    policy: Policy, recipe: Recipe, numbers: _Numbers, reference: Checkpoint, names: list[str]
) -> tuple[int, ...]:
    """How many elements each model keeps of all its elements; empty if trimmed per tensor."""
    if policy.sparsify == "drop":
        for i, row in zip(recipe.terms, zip(*numbers.density.values(), strict=True), strict=True):
            if any(keep_threshold(density) == 0 for density in row):
                raise RecipeError(
                    f"models[{i}]: a density of {min(row):g} keeps nothing; the smallest is 2**-32"
                )
    if policy.sparsify != "trim" or policy.trim_scope != "model":
        return ()
    total = sum(reference.tensors[name].numel for name in names)
    keep = []
    for k, i in enumerate(recipe.terms):
        densities = {numbers.density[name][k] for name in names}
        if len(densities) > 1:
            chain = recipe.chain(i, "density")
            raise RecipeError(
                f"{chain[0].key}: trim_scope: model has one density for the whole model; give a "
                "plain number instead of a gradient or filters"
            )
        keep.append(trim_keep_count(densities.pop(), total, policy.trim_count))
    return tuple(keep)


# The output.


def _lay_out(
    names: list[str], dtypes: dict[str, str], reference: Checkpoint, limit: int
) -> tuple[tuple[ShardPlan, ...], dict[str, tuple[int, int]]]:
    """Fill shards in the order of the names; inside a shard wider types come first."""
    groups: list[list[int]] = [[]]
    filled = 0
    shapes = [reference.tensors[name].shape for name in names]
    for i, name in enumerate(names):
        nbytes = tensor_nbytes(dtypes[name], shapes[i])
        if groups[-1] and filled + nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(i)
        filled += nbytes
    shards, places = [], dict[str, tuple[int, int]]()
    for number, group in enumerate(groups):
        group.sort(key=lambda i: (-DTYPE_BITS[dtypes[names[i]]], i))
        header, offsets, size = build_header(
            ((names[i], dtypes[names[i]], shapes[i]) for i in group), {"format": "pt"}
        )
        for i, offset in zip(group, offsets, strict=True):
            places[names[i]] = (number, offset)
        filename = (
            SINGLE_NAME
            if len(groups) == 1
            else f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        )
        shards.append(ShardPlan(filename, header, size, tuple(group)))
    return tuple(shards), places


def _index(tensors: list[TensorPlan], shards: tuple[ShardPlan, ...]) -> dict[str, Any] | None:
    if len(shards) == 1:
        return None
    return {
        "metadata": {
            "total_parameters": sum(t.numel for t in tensors),
            "total_size": sum(t.nbytes for t in tensors),
        },
        "weight_map": {t.name: shards[t.shard].filename for t in tensors},
    }


_COMPARED = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "layer_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
)


def _note_configs(inputs: tuple[Checkpoint, ...], donor: Checkpoint, notes: list[str]) -> None:
    """Tell where configs differ in what the shapes cannot show."""
    told = set[str]()
    for checkpoint in inputs:
        if checkpoint.config is None or donor.config is None or str(checkpoint.path) in told:
            continue
        told.add(str(checkpoint.path))
        for key in _COMPARED:
            if key not in checkpoint.config or key not in donor.config:
                continue
            theirs, ours = checkpoint.config[key], donor.config[key]
            if theirs != ours:
                notes.append(
                    f"{checkpoint.path}: config.json says {key}: {theirs!r}, the output takes "
                    f"{ours!r} from {donor.path}"
                )


def _note_recipe(recipe: Recipe, floats: set[str], notes: list[str]) -> None:
    if "int8_mask" in recipe.parameters:
        notes.append("int8_mask changes no result and is not needed here")
    narrow = recipe.dtype is not None and recipe.dtype.removeprefix("torch.") != "float32"
    if narrow and recipe.out_dtype is not None:
        notes.append(
            f"dtype: {recipe.dtype} has no effect beside out_dtype: the arithmetic is float32 here "
            "whatever dtype says"
        )
    if len(floats) > 1:
        notes.append(
            f"the output has tensors of {', '.join(sorted(floats))}, as the base or first model "
            "stores them; set out_dtype for one type"
        )


def _reads(tensors: list[TensorPlan]) -> tuple[int, int]:
    """Most often that a byte is read, and bytes read in all."""
    most, total = 0, 0
    for tensor in tensors:
        policy, passes = tensor.policy, 1
        nbytes = sum(
            term.source.stored
            for term in tensor.terms
            if tensor.kind == "combine" or term.source != tensor.base
        )
        nbytes += tensor.base.stored if tensor.base is not None else 0
        if tensor.kind == "combine" and any(term.density < 1.0 for term in tensor.terms):
            passes += (policy.sparsify == "trim") + (policy.rescale == "l1")
        most = max(most, passes)
        total += passes * nbytes
    return most, total


def patched(tensor: TensorPlan) -> list[Patched]:
    """The sources of a tensor that must be made first."""
    return [term.source for term in tensor.terms if isinstance(term.source, Patched)]


#: The blocks in which a patch is put on its base; and torch, loaded and at work, measured.
_PATCH_BYTES = 40_000_000
_TORCH_BYTES = 300_000_000


def _patches_memory(tensors: Sequence[TensorPlan], *, whole: bool) -> int:
    """What patched tensors add: one is made at a time, or all for a trim over the whole model."""
    needs = [sum(source.memory for source in patched(tensor)) for tensor in tensors]
    if not any(needs):
        return 0
    return _TORCH_BYTES + (sum(needs) if whole else max(needs))


#: Interpreter with pydantic, yaml and the native core loaded, measured.
_PROCESS_BYTES = 60_000_000
_TILE_ELEMENTS = 131_072
_HEADER_ENTRY_BYTES = 1_500


def _predicted_memory(
    policy: Policy, inputs: tuple[Checkpoint, ...], threads: int | None, bound: int | None
) -> int:
    """Anonymous memory of a merge by the native core: it does not depend on the weights' size."""
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    working = threads * (len(inputs) + 2) * _TILE_ELEMENTS * 4
    if policy.sparsify == "trim":
        working += threads * len(inputs) * 65_536 * 8
    if bound is not None:
        working = min(working, bound)
    headers = sum(len(checkpoint.tensors) for checkpoint in inputs) * _HEADER_ENTRY_BYTES
    return _PROCESS_BYTES + working + headers


def _fingerprint(plan: Plan) -> str:
    """Digest of all that decides the bytes of the output."""
    digest = blake2b(digest_size=16)
    digest.update(
        json.dumps(
            {
                "numerics": NUMERICS,
                "recipe": plan.recipe.model_dump(mode="json"),
                "policies": sorted({repr(tensor.policy) for tensor in plan.tensors}),
                "seed": plan.seed,
                "models": plan.models,
                "inputs": [
                    [
                        checkpoint.reference,
                        [[f.file_size, f.mtime_ns, f.digest] for f in checkpoint.files],
                    ]
                    for checkpoint in plan.inputs
                ],
                "sidecars": [[file.name, file.nbytes] for file in plan.sidecars],
            },
            sort_keys=True,
        ).encode()
    )
    for shard in plan.shards:
        digest.update(shard.filename.encode() + shard.header)
    for file in plan.sidecars:
        digest.update(file.content or b"")
    return digest.hexdigest()


# For people.


def describe(plan: Plan, bandwidth: float | None = None) -> list[str]:
    """The plan as plain text lines; ``bandwidth`` in bytes per second adds the predicted time."""
    numel = sum(tensor.numel for tensor in plan.tensors)
    copied = sum(tensor.kind == "copy" and not patched(tensor) for tensor in plan.tensors)
    lines = [f"method   {plan.recipe.merge_method}: {_policy_words(plan)}"]
    roles = ["base", *plan.models] if plan.has_base else list(plan.models)
    for k, (role, checkpoint) in enumerate(zip(roles, plan.inputs, strict=True)):
        label = "base   " if plan.has_base and k == 0 else "model  "
        line = f"{label}  {checkpoint.reference}: "
        if isinstance(checkpoint, PatchedCheckpoint):
            line += f"{checkpoint.words}, {bytes_text(checkpoint.nbytes)}"
        else:
            line += f"{bytes_text(checkpoint.nbytes)} in "
            line += _counted(len(checkpoint.files), "file")
        if not (plan.has_base and k == 0):
            line += f", {_term_words(plan, k - plan.has_base)}"
            if plan.seed is not None:
                line += f", random stream {role!r}"
        lines.append(line)
    dtypes = sorted({TORCH_NAMES.get(t.dtype, t.dtype) for t in plan.tensors})
    lines.append(f"output   {plan.output}")
    tensors = (
        f"tensors  {len(plan.tensors)} with {_count_text(numel)} elements ({', '.join(dtypes)})"
    )
    lines.append(tensors + (f"; {copied} of them copied unchanged" if copied else ""))
    weights = sum(shard.size for shard in plan.shards)
    lines.append(
        f"files    {_counted(len(plan.shards), 'shard')}, {bytes_text(weights)}, and "
        + (", ".join(file.name for file in plan.sidecars) or "nothing else")
    )
    times = {1: "once", 2: "up to twice"}.get(plan.passes, f"up to {plan.passes} times")
    lines.append(f"read     {bytes_text(plan.bytes_read)} (each input {times})")
    lines.append(f"written  {bytes_text(plan.bytes_written)}")
    lines.append(f"memory   about {bytes_text(plan.memory)}")
    if bandwidth is not None and bandwidth > 0:
        seconds = (plan.bytes_read + plan.bytes_written) / bandwidth
        lines.append(
            f"time     about {_time_text(seconds)} at {bytes_text(bandwidth)}/s read and written"
        )
    if plan.seed is not None:
        lines.append(f"seed     {plan.seed}")
    lines += [f"note     {note}" for note in plan.notes]
    return lines


def _policy_words(plan: Plan) -> str:
    policy = plan.tensors[0].policy
    steps = ["deltas" if policy.difference else "the models themselves"]
    if policy.sparsify == "trim":
        scope = "over the whole model" if policy.trim_scope == "model" else "per tensor"
        steps.append(f"trimmed {scope} (count {policy.trim_count}, ties {policy.trim_ties})")
    if policy.sparsify == "drop":
        steps.append("dropped at random")
    if policy.rescale != "none":
        steps.append(f"rescaled by {policy.rescale}")
    if policy.elect != "none":
        steps.append(f"sign elected by {policy.elect} of the {policy.elect_on} deltas")
    reduce = {"sum": "summed", "max": "largest taken", "mean": f"averaged over {policy.divisor}"}
    steps.append(reduce[policy.reduce])
    lams = {tensor.lam for tensor in plan.tensors if tensor.kind == "combine"}
    if lams - {1.0}:
        steps.append(f"lambda {_range_text(lams)}")
    return ", ".join(steps)


def _term_words(plan: Plan, k: int) -> str:
    combined = [tensor.terms[k] for tensor in plan.tensors if tensor.kind == "combine"]
    if not combined and any(patched(tensor) for tensor in plan.tensors):
        return "applied to the base with one rounding"
    words = f"weight {_range_text({term.weight for term in combined})}"
    if any(tensor.policy.sparsify != "none" for tensor in plan.tensors):
        words += f", density {_range_text({term.density for term in combined})}"
    return words


def _range_text(values: set[float]) -> str:
    if not values:
        return "unused"
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _counted(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")


def _count_text(count: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:g}"


def bytes_text(count: float) -> str:
    """``1.23 GB``, in powers of ten."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def _time_text(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
