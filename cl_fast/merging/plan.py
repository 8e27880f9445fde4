"""What a recipe becomes for these files: every read, every write, known before the first byte.

:func:`make_plan` opens every input header, finds every error that the headers can tell, and
returns a :class:`Plan`: for each output tensor its sources, weights, densities, random keys, its
policy and its exact place in an output shard. Nothing is written and no weight is read. The plan
is a value: the engine executes it, ``--dry-run`` prints it, and its
fingerprint lets an interrupted run continue only with the same inputs and settings.

Torch-free and numpy-free; a checkpoint of many thousand tensors plans in well under a second.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cl_fast.checkpoints.checkpoint import SINGLE_NAME, Checkpoint, absolute
from cl_fast.checkpoints.hub import is_hub_id
from cl_fast.checkpoints.remote import is_url, local_path
from cl_fast.checkpoints.safetensors import DTYPE_BITS, build_header, tensor_nbytes
from cl_fast.checkpoints.sidecar import Sidecar, plan_sidecars
from cl_fast.errors import CheckpointError, RecipeError
from cl_fast.merging.chat_templates import with_chat_template
from cl_fast.merging.deltas import DeltaCheckpoint
from cl_fast.merging.inputs import (
    Derived,
    base_and_change,
    forget,
    local_folder,
    open_inputs,
    open_model,
    references,
    refuse_misplaced,
    same_path,
    source_of,
)
from cl_fast.merging.matching import (
    check_rows,
    check_shapes,
    common_tensors,
    kind_of_tensor,
    natural_key,
    out_dtype,
)
from cl_fast.merging.numbers import Numbers, Used
from cl_fast.merging.references import term_names
from cl_fast.merging.rules import Blend, Rule, Whole, whole_memory
from cl_fast.merging.slices import Cut, Group, cut, edit_config, list_inputs, whole
from cl_fast.merging.sources import READ_AHEAD, Fetched, Made, Packed, Source, made_whole
from cl_fast.merging.statistics import known_of, open_all
from cl_fast.merging.vocabulary import VocabularyPlan, plan_vocabulary
from cl_fast.ops.policy import (
    Policy,
    check_keep_probabilities,
    row_length,
    trim_keep_count,
)
from cl_fast.ops.streams import keep_threshold, stream_key

if TYPE_CHECKING:
    from cl_fast.merging.recipe import Part, Recipe

__all__ = [
    "NUMERICS",
    "Plan",
    "ShardPlan",
    "TensorPlan",
    "Term",
    "make_plan",
    "plan_change",
    "term_names",
]

#: Version of the arithmetic and of the random stream. It is part of every fingerprint, so a run
#: that was interrupted under other arithmetic is never continued.
NUMERICS = 1


@dataclass(frozen=True, slots=True)
class Term:
    """One model's part in one tensor.

    ``model`` is the name that keys its random stream, ``key`` the 64-bit key of this tensor
    (0 where nothing is drawn at random). ``weight``, ``density``, ``gamma`` and ``epsilon`` are the
    recipe's values for this tensor, with filters and gradients resolved.
    """

    model: str
    source: Source
    weight: float
    density: float
    key: int
    gamma: float = 0.0
    epsilon: float = 0.0


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One output tensor.

    ``offset`` is absolute in the shard file with index ``shard``; ``dtype`` is the output type.
    ``kind="copy"`` tensors (integers, booleans, empty tensors, and where all models are patches
    what they leave alone) are not combined: the bytes of ``base`` (or of the first term without a
    base) are written, and every term must equal them.
    ``lam`` multiplies the reduced delta; it is 1 where the method has no lambda.
    ``origins``: of base (if any) and terms the position in ``Plan.inputs`` and the tensor's name
    there; ``None`` where whole models are merged, so that both are plain.
    ``rule`` is what makes a tensor that no policy makes; of the policy only ``difference`` counts.
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
    origins: tuple[tuple[int, str], ...] | None = None
    rule: Rule | None = None

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return prod(self.shape)


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
        output: folder to write; for an output at a ``url`` the local one that it is built in.
        recipe: the recipe it came from.
        tensors: every output tensor, in natural order of the names.
        shards: the output files.
        index: content of ``model.safetensors.index.json``; ``None`` for a single file.
        inputs: opened checkpoints, bases first (if any), then the models in recipe order; a
            checkpoint that is used twice appears twice.
        bases: how many of ``inputs`` are bases of deltas: one or none, more where slices have
            bases of their own.
        models: the names of the terms, one for each of the other ``inputs``. Where whole models
            are merged ``tensors[i].terms`` has this order.
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
        vocabulary: the output's tokens and the rows of each model in their order, where the recipe
            names a tokenizer (or embeddings are cut).
    """

    output: Path
    recipe: Recipe
    tensors: tuple[TensorPlan, ...]
    shards: tuple[ShardPlan, ...]
    index: dict[str, Any] | None
    inputs: tuple[Checkpoint, ...]
    bases: int
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
    vocabulary: VocabularyPlan | None = None
    url: str | None = None

    @property
    def has_base(self) -> bool:
        """Whether ``inputs[0]`` is the base of deltas."""
        return self.bases > 0


def make_plan(
    recipe: Recipe,
    output: str | os.PathLike[str],
    *,
    out_shard_size: int = 5_000_000_000,
    seed: int | None = None,
    threads: int | None = None,
    memory: int | None = None,
    allow_crimes: bool = False,
    copy_tokenizer: bool = True,
    planned: Mapping[str, Checkpoint] | None = None,
    truncate_embeddings: bool = False,
) -> Plan:
    """Read every input header, find every error they can tell, and lay out the output.

    Nothing is written, and no weight is read.

    Args:
        recipe: from ``load_recipe`` or ``parse_recipe``.
        output: the folder that the merge will write, or a URL.
        out_shard_size: bytes of tensors per output file; a larger tensor has a file of its own.
        seed: overrides the recipe's.
        threads: as the engine will be given; only for the prediction of memory.
        memory: likewise, its bound on working memory in bytes.
        allow_crimes: put layers of models together that are not of one architecture and size.
        copy_tokenizer: give the output a tokenizer and a chat template.
        planned: inputs that an earlier merge of the same run will make, by their references.
        truncate_embeddings: where the recipe names no tokenizer, cut embeddings and heads of
            models with more rows to the least number of rows. Unsafe: it is right only where the
            tokens that stay have the same ids in all models.

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
        return _plan(
            recipe,
            output,
            out_shard_size,
            seed,
            threads,
            memory,
            allow_crimes,
            copy_tokenizer,
            planned,
            truncate_embeddings,
        )


def plan_change(
    base: str | os.PathLike[str],
    change: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    out_dtype: str | None,
    **options: Any,
) -> Plan:
    """A patch or a packed delta on its base, alone. ``options`` and errors are ``make_plan``'s."""
    from cl_fast.merging.recipe import parse_recipe

    recipe: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": os.fspath(base),
        "models": [{"model": os.fspath(change), "parameters": {"weight": 1.0}}],
    }
    if out_dtype is not None:
        recipe["out_dtype"] = out_dtype
    return make_plan(parse_recipe(recipe), output, **options)


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
    allow_crimes: bool,
    copy_tokenizer: bool,
    planned: Mapping[str, Checkpoint] | None,
    truncate_embeddings: bool,
) -> Plan:
    folder, url = os.fspath(output), None
    if not folder.strip() or "\0" in folder:
        raise RecipeError(f"output: {folder!r} is not a path; name the folder to write")
    if is_url(folder):
        folder, url = _staged(recipe, folder)
    target = absolute(folder)
    method, notes = recipe.method, list[str]()
    if seed is not None and not method.random:
        notes.append(f"{method.name} draws nothing at random; the seed has no effect")
    seeded = seed is not None or recipe.seed is not None
    if method.random:
        seed = seed if seed is not None else (recipe.seed or 0)
    else:
        seed = None

    forget()
    refuse_misplaced(recipe)
    _check_output(recipe, target)
    inputs = open_inputs(recipe, planned)
    listing = list_inputs(recipe)
    bases = len(listing.bases)
    groups, changed = cut(recipe, listing, inputs, allow_crimes=allow_crimes)
    donor = _donor(recipe, inputs)
    vocabulary = plan_vocabulary(
        recipe, inputs, groups, donor, notes, truncate=truncate_embeddings
    )
    if vocabulary is not None:
        groups = vocabulary.groups
    models = term_names([entry.model for entry in listing.models])
    streams = _Streams(seed, (None,) * bases + models)
    used = Used()
    drafts = [_Draft(recipe, group, notes, used) for group in groups]
    used.check(recipe)
    model_keep = _model_keep(recipe, drafts)
    shapes = {name: info.shape for draft in drafts for name, info in draft.infos.items()}
    if len(drafts) > 1:
        shapes = {name: shapes[name] for name in sorted(shapes, key=natural_key)}
    if len(drafts) > 1 and not allow_crimes:
        check_rows([draft.infos for draft in drafts])
    dtypes = {name: dtype for draft in drafts for name, dtype in draft.dtypes.items()}
    shards, places = _lay_out(shapes, dtypes, out_shard_size)
    made_ready = {
        tensor.name: tensor
        for draft in drafts
        for tensor in draft.tensors(recipe, streams, places, applied=not model_keep)
    }
    tensors = [made_ready[name] for name in shapes]
    if method.random and seeded:
        _note_seed(method.name, inputs[bases:], tensors, notes)

    floats = {dtypes[name] for draft in drafts for name in draft.combined}
    uniform = next(iter(floats)) if len(floats) == 1 else None
    tokenizer = donor.folder
    if vocabulary is not None and vocabulary.folder is not None:
        tokenizer = vocabulary.folder
    told = list[str]()
    copied = copy_tokenizer or recipe.tokenizer_rules is not None
    sidecars, more = plan_sidecars(
        donor,
        tokenizer if copied else None,
        uniform,
        edit=partial(edit_config, donor=donor, changed=changed, notes=told) if changed else None,
    )
    if len(drafts) == 1 and drafts[0].alone and isinstance(inputs[1], DeltaCheckpoint):
        own = {sidecar.name: sidecar for sidecar in inputs[1].sidecars(uniform)}
        sidecars = tuple(own.pop(file.name, file) for file in sidecars) + tuple(own.values())
    notes += [*told, *more]
    if vocabulary is not None:
        sidecars = vocabulary.sidecars(sidecars)
    sidecars = with_chat_template(recipe, inputs, sidecars, tokenizer, notes, copied=copied)
    for checkpoint in inputs:
        if isinstance(checkpoint, Derived):
            notes += [note for note in checkpoint.notes if note not in notes]
    _note_configs(inputs, donor, notes)
    _note_recipe(recipe, floats, notes)
    inputs = _compared(inputs, tensors)
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
        bases=bases,
        models=models,
        donor=donor,
        tokenizer_donor=tokenizer,
        sidecars=sidecars,
        notes=tuple(notes),
        fingerprint="",
        bytes_read=bytes_read,
        bytes_written=written,
        passes=passes,
        memory=_predicted_memory(tensors, inputs, threads, memory)
        + _made_memory(tensors, whole=bool(model_keep))
        + _rules_memory(tensors, threads)
        + (0 if vocabulary is None else vocabulary.memory),
        seed=seed,
        model_keep=model_keep,
        vocabulary=vocabulary,
        url=url,
    )
    return replace(plan, fingerprint=_fingerprint(plan))


def _compared(
    inputs: tuple[Checkpoint, ...], tensors: Sequence[TensorPlan]
) -> tuple[Checkpoint, ...]:
    """Packed deltas are told whether the merge reads all of the base, and so compares it."""
    apart = {
        source.path
        for tensor in tensors
        for term in tensor.terms
        if isinstance(source := term.source, Packed) and source.apart
    }
    return tuple(
        replace(checkpoint, apart=True)
        if isinstance(checkpoint, DeltaCheckpoint) and checkpoint.delta.header.path in apart
        else checkpoint
        for checkpoint in inputs
    )


# Inputs.


def _staged(recipe: Recipe, url: str) -> tuple[str, str | None]:
    """The folder that an output at a URL is built in, and the URL; of ``file://`` the path."""
    path = local_path(url)
    if path is not None:
        return path, None
    from cl_fast.merging.upload import staging

    folder, url = staging(url), url.rstrip("/")
    for key, reference in references(recipe):
        given = reference.rstrip("/")
        if given == url or given.startswith(f"{url}/") or url.startswith(f"{given}/"):
            raise RecipeError(
                f"{key}: the output {url} is, holds or lies inside the input {reference!r}; choose "
                "another output, inputs are never touched"
            )
    return str(folder), url


def _check_output(recipe: Recipe, target: Path) -> None:
    real = same_path(target)
    listed = references(recipe)
    if recipe.base_model is not None:
        listed.append(("base_model", recipe.base_model))
    if recipe.tokenizer_reference is not None:
        listed.append(("tokenizer_source", recipe.tokenizer_reference))
    parts = [(key, part) for key, ref in listed for part in base_and_change(ref) or (ref,)]
    for key, reference in parts:
        if is_url(reference) or (is_hub_id(reference) and not absolute(reference).exists()):
            continue
        folder = same_path(absolute(reference))
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


@dataclass(frozen=True, slots=True)
class _Streams:
    """The seed, and of every input the name that keys its random stream."""

    seed: int | None
    names: tuple[str | None, ...]


class _Draft:
    """The tensors of one group, all but their places in the output.

    Attributes:
        infos: what the first input tells of each tensor, in natural order.
        kinds, dtypes: of each tensor. combined: names of those that are not copied.
    """

    def __init__(self, recipe: Recipe, group: Group, notes: list[str], used: Used) -> None:
        part, inputs, method = group.part, group.inputs, recipe.method
        names = common_tensors(inputs, notes)
        check_shapes(inputs, names)
        self._group = group
        self._policy = part.policy
        self._statistics = open_all(part, method.statistic)
        self.infos = {name: inputs[0].tensors[name] for name in names}
        self.kinds = {name: kind_of_tensor(inputs, name) for name in names}
        self.combined = [name for name in names if self.kinds[name] == "combine"]
        depths, layered = group.depths_of(self.combined)
        used.layered |= layered
        models = [whole(checkpoint) for checkpoint in inputs[part.base is not None :]]
        packed = [k for k, model in enumerate(models) if isinstance(model, DeltaCheckpoint)]
        self.numbers = Numbers(
            recipe,
            part,
            self.combined,
            depths,
            group.stored,
            used,
            notes,
            dropped=packed if part.policy.sparsify == "drop" else (),
        )
        _check_dropped(part, self.numbers, packed)
        densities = self.numbers.model.get("density", {}).values()
        if all(density >= 1.0 for row in densities for density in row):
            self._policy = replace(
                part.policy,
                sparsify="none",
                rescale="none",
                trim_scope="tensor",
                trim_ties="first",
            )
        _check_ranked(part, self._policy, self.numbers, self.combined, notes)
        if method.one_as_it_is:
            scale = self.numbers.model[method.factor]
            for name in self.combined:
                # As it is: a copy of bytes, whatever the type.
                as_stored = recipe.output_dtype in (None, self.infos[name].dtype)
                packed_here = isinstance(source_of(inputs[0], name), Packed)
                if scale[name] == (1.0,) and as_stored and not packed_here:
                    self.kinds[name] = "copy"
        self.dtypes = {
            name: out_dtype(recipe, info, self.kinds[name]) for name, info in self.infos.items()
        }

    @property
    def policy(self) -> Policy:
        return self._policy

    @property
    def part(self) -> Part:
        return self._group.part

    @property
    def alone(self) -> bool:
        """Whether this is base + one packed delta and no more, so that all of it is wanted."""
        return (
            self.part.base is not None
            and len(self._group.inputs) == 2
            and isinstance(self._group.inputs[1], DeltaCheckpoint)
            and self.policy == Policy()
            and all(self.numbers.of_models("weight", name) == (1.0,) for name in self.combined)
            and all(self.numbers.of_whole("lambda", name) == 1.0 for name in self.combined)
        )

    @property
    def positions(self) -> tuple[int, ...]:
        """Of the models in the inputs of the plan."""
        return self._group.positions[self.part.base is not None :]

    def tensors(
        self,
        recipe: Recipe,
        streams: _Streams,
        places: Mapping[str, tuple[int, int]],
        *,
        applied: bool,
    ) -> Iterator[TensorPlan]:
        """The tensors. `applied`: a change of a base may be put on it instead of merged."""
        group, numbers, method, seed = self._group, self.numbers, recipe.method, streams.seed
        first = int(group.part.base is not None)
        models = [streams.names[position] or "" for position in group.positions[first:]]
        only_changes = bool(first) and all(
            isinstance(whole(checkpoint), Derived) for checkpoint in group.inputs[1:]
        )
        for name, info in self.infos.items():
            shard, offset = places[name]
            sources = [source_of(checkpoint, name) for checkpoint in group.inputs]
            weights = numbers.of_models(method.factor, name)
            kept = numbers.of_models("density", name)
            gammas, epsilons = (
                numbers.of_models(word, name) if word in numbers.model else (0.0,) * len(models)
                for word in ("gamma", "epsilon")
            )
            lam = numbers.of_whole("lambda", name)
            kind, dtype = self.kinds[name], self.dtypes[name]
            rule = None
            if method.rule is not None and kind == "combine":
                values = {word: numbers.of_whole(word, name) for word in numbers.whole}
                part = group.part
                known = known_of(part, self._statistics, group.stored, name, info.shape)
                given = {"base": part.base_position, "statistics": known}
                rule = method.rule({**values, **part.switches, **given})
            terms = tuple(
                Term(
                    model,
                    sources[first + k],
                    weights[k],
                    kept[k],
                    stream_key(seed, model, name)
                    if seed is not None and kind == "combine" and kept[k] < 1.0
                    else 0,
                    gammas[k],
                    epsilons[k],
                )
                for k, model in enumerate(models)
            )
            base = sources[0] if first else None
            terms, base = _on_base(
                name, terms, base, self._policy.difference and not isinstance(rule, Whole)
            )
            if self.alone and kind == "copy" and terms[0].source != base:
                base = None  # integers that the finetuned model has otherwise
            if only_changes and kind == "combine" and applied:
                if method.name == "task_arithmetic" and weights == (1.0,) and lam == 1.0:
                    terms, alone = _applied(terms[0], base, dtype)
                    kind, base = ("copy", None) if alone else (kind, base)
                if dtype == info.dtype and all(term.source == base for term in terms):
                    kind = "copy"
            origins: tuple[tuple[int, str], ...] | None = None
            if not recipe.whole:
                origins = tuple(
                    (position, checkpoint.stored[name] if isinstance(checkpoint, Cut) else name)
                    for position, checkpoint in zip(group.positions, group.inputs, strict=True)
                )[first - (base is not None) :]
            yield TensorPlan(
                name,
                info.shape,
                dtype,
                shard,
                offset,
                tensor_nbytes(dtype, info.shape),
                kind,
                base,
                terms,
                self._policy,
                lam,
                origins,
                rule if kind == "combine" else None,
            )


def _check_ranked(
    part: Part, policy: Policy, numbers: Numbers, names: list[str], notes: list[str]
) -> None:
    """What the numbers of a band or of magprune can have wrong only together."""
    densities = numbers.model.get("density", {})
    for k, entry in enumerate(part.entries):
        if policy.sparsify == "magprune":
            for name in names:
                wrong = check_keep_probabilities(
                    densities[name][k], numbers.model["epsilon"][name][k]
                )
                if wrong is not None:
                    chain = part.chain(k, "epsilon")
                    key = chain[0].key if chain else f"{entry.key}.parameters.epsilon"
                    raise RecipeError(f"{key}: {wrong} (tensor {name!r})")
        for word in ("gamma", "epsilon"):
            chain = part.chain(k, word)
            if chain and all(row[k] >= 1.0 for row in densities.values()):
                notes.append(
                    f"{chain[0].key}: has no effect on {entry.model!r}, whose density is 1, which "
                    "leaves the delta as it is"
                )


def _check_dropped(part: Part, numbers: Numbers, packed: Sequence[int]) -> None:
    """What a packed delta dropped is not dropped again."""
    if part.policy.sparsify != "drop":
        return
    for k in packed:
        least = min((row[k] for row in numbers.model["density"].values()), default=1.0)
        if least < 1.0:
            entry = part.entries[k]
            raise RecipeError(
                f"{entry.key}.parameters.density: {entry.model!r} is a packed delta, whose "
                f"elements were dropped when it was packed; a density of {least:g} would drop "
                "twice: give it density: 1.0 of its own (one under the recipe's parameters is for "
                "every model)"
            )


def _on_base(
    name: str, terms: tuple[Term, ...], base: Source | None, parts: bool
) -> tuple[tuple[Term, ...], Source | None]:
    """Packed deltas as the method needs them, and the base with the checksum that they tell.

    Where deltas are taken from the very tensor that one was packed on, its kept values stand for
    themselves; everywhere else it is the model base + delta. `parts`: whether deltas are taken, by
    something that knows of parts.
    """
    found: dict[int, Source] = {}
    merged = []
    for term in terms:
        source = term.source
        told = source.base if isinstance(source, Packed) else source
        if isinstance(source, Packed) and not (parts and source.base == base):
            term = replace(term, source=source.as_model())
        elif told == base and told.crc64 is not None:
            found.setdefault(told.crc64, source)
        merged.append(term)
    if len(found) > 1:
        one, two = (source.path for source in list(found.values())[:2])
        raise CheckpointError(
            f"{one} and {two} were packed on different bases: they do not say the same of tensor "
            f"{name!r}; pack both on one base"
        )
    if base is not None and found:
        base = replace(base, crc64=next(iter(found)))
    return tuple(merged), base


def _applied(term: Term, base: Source | None, dtype: str) -> tuple[tuple[Term, ...], bool]:
    """A changed tensor's term as the result itself, rounded once; and whether it is one."""
    source = term.source
    if isinstance(source, Made) and not isinstance(source, Fetched):
        made = source.rounded(dtype)
        return ((term,), False) if made is None else ((replace(term, source=made),), True)
    return (term,), source != base and source.dtype == dtype


def _donor(recipe: Recipe, inputs: tuple[Checkpoint, ...]) -> Checkpoint:
    """The model that ``base_model`` names, also if it is merged nowhere; without one the first."""
    if recipe.base_model is None:
        return inputs[0]
    wanted = same_path(local_folder(recipe.base_model))
    for checkpoint in inputs:
        if checkpoint.reference == recipe.base_model or wanted in (
            same_path(checkpoint.path),
            same_path(checkpoint.folder),
        ):
            return checkpoint
    return open_model("base_model", recipe.base_model)


def _model_keep(recipe: Recipe, drafts: Sequence[_Draft]) -> tuple[int, ...]:
    """How many elements each model keeps of all its elements; empty if trimmed per tensor."""
    for draft in drafts:
        if draft.policy.sparsify != "drop":
            continue
        for k, entry in enumerate(draft.part.entries):
            least = min((row[k] for row in draft.numbers.model["density"].values()), default=1.0)
            if keep_threshold(least) == 0:
                raise RecipeError(
                    f"{entry.key}: a density of {least:g} keeps nothing; the smallest is 2**-32"
                )
    trimming = [draft for draft in drafts if draft.policy.trim_scope == "model"]
    if not trimming or all(draft.policy.sparsify != "trim" for draft in trimming):
        return ()
    first = trimming[0]
    for draft in drafts:
        if draft.policy != first.policy or draft.positions != first.positions:
            raise RecipeError(
                f"{draft.part.key}: trim_scope: model trims over all tensors of a model together, "
                f"but {first.part.key} has other models or parameters; give all slices the same, "
                "or use trim_scope: tensor"
            )
    total = sum(draft.infos[name].numel for draft in drafts for name in draft.combined)
    keep = []
    for k, entry in enumerate(first.part.entries):
        densities = {
            draft.numbers.model["density"][name][k] for draft in drafts for name in draft.combined
        }
        if len(densities) > 1:
            chain = first.part.chain(k, "density")
            raise RecipeError(
                f"{chain[0].key if chain else entry.key}: trim_scope: model has one density for "
                "the whole model; give a plain number instead of a gradient or filters"
            )
        keep.append(trim_keep_count(densities.pop(), total, first.policy.trim_count))
    return tuple(keep)


# The output.


def _lay_out(
    named: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], limit: int
) -> tuple[tuple[ShardPlan, ...], dict[str, tuple[int, int]]]:
    """Fill shards in the order of the names; inside a shard wider types come first."""
    groups: list[list[int]] = [[]]
    filled = 0
    names, shapes = list(named), list(named.values())
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


def _note_seed(
    method: str,
    models: Sequence[Checkpoint],
    tensors: Sequence[TensorPlan],
    notes: list[str],
) -> None:
    """Tell if nothing is drawn since all that would be was dropped when the models were packed."""
    packed = [isinstance(whole(checkpoint), DeltaCheckpoint) for checkpoint in models]
    if all(packed) and not any(term.density < 1.0 for tensor in tensors for term in tensor.terms):
        notes.append(
            f"seed: has no effect: every model of {method} is a packed delta, whose elements were "
            "dropped when it was packed"
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
    if recipe.name is not None:
        notes.append(f"name: {recipe.name!r} has no effect; no other recipe of the file uses it")
    slices = [*recipe.slices, *(part for m in recipe.modules.values() for part in m.slices)]
    if any(part.residual_weight is not None for part in slices):
        notes.append("residual_weight changes nothing, here as in mergekit")
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
            passes += (policy.sparsify in ("trim", "band")) + (policy.rescale == "l1")
        if isinstance(tensor.rule, Blend):
            passes += 1
        if isinstance(tensor.rule, Whole):
            nbytes += sum(source.nbytes for source in tensor.rule.statistics)
        most = max(most, passes)
        total += passes * nbytes
    return most, total


#: torch, loaded and at work, measured.
_TORCH_BYTES = 300_000_000


def _made_memory(tensors: Sequence[TensorPlan], *, whole: bool) -> int:
    """What made sources add: a tensor's at a time, or all for a trim over the whole model."""
    sources = [made_whole(tensor) for tensor in tensors]
    fetched = [sum(s.memory for s in own if isinstance(s, Fetched)) for own in sources]
    needs = [sum(s.memory for s in own if not isinstance(s, Fetched)) for own in sources]
    memory = min(sum(fetched), max(fetched) + READ_AHEAD) if any(fetched) else 0
    if any(needs):
        memory += _TORCH_BYTES + (sum(needs) if whole else max(needs))
    return memory


def _rules_memory(tensors: Sequence[TensorPlan], threads: int | None) -> int:
    """What tensors add that are made by a function of torch."""
    needs = [whole_memory(tensor, threads) for tensor in tensors if isinstance(tensor.rule, Whole)]
    if not needs:
        return 0
    loaded = 0 if any(made_whole(tensor) for tensor in tensors) else _TORCH_BYTES
    return loaded + max(needs)


#: Interpreter with pydantic, yaml and the native core loaded, measured.
_PROCESS_BYTES = 60_000_000
_TILE_ELEMENTS = 131_072
_HEADER_ENTRY_BYTES = 1_500
_WORKING_BYTES = 256 << 20  # the core's allowance where none is given
_ROW_BYTES = 50  # for each element of the longest row that magprune ranks: keys, thresholds


def _predicted_memory(
    tensors: Sequence[TensorPlan],
    inputs: tuple[Checkpoint, ...],
    threads: int | None,
    bound: int | None,
) -> int:
    """Anonymous memory of a merge by the native core.

    It does not depend on the weights' size, but for the rows and the masks of magprune.
    """
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    most = max(len(tensor.terms) + (tensor.base is not None) for tensor in tensors)
    working = threads * (most + 2) * _TILE_ELEMENTS * 4
    if any(tensor.policy.sparsify == "trim" for tensor in tensors):
        working += threads * most * 65_536 * 8
    if any(tensor.policy.sparsify == "band" for tensor in tensors):
        working += 2 * threads * most * 65_536 * 8
    if bound is not None:
        working = min(working, bound)
    ranked = [
        tensor
        for tensor in tensors
        if tensor.kind == "combine" and tensor.policy.sparsify == "magprune"
    ]
    if ranked:
        working += threads * _ROW_BYTES * max(row_length(tensor.shape) for tensor in ranked)
        masks = max(
            len(tensor.terms) * tensor.numel // 8 if tensor.policy.rescale == "l1" else 0
            for tensor in ranked
        )
        if masks <= (_WORKING_BYTES if bound is None else bound) // 4:
            working += 2 * masks  # drawn for the sums and kept for the pass, of two tensors
    headers = sum(len(checkpoint.tensors) for checkpoint in inputs) * _HEADER_ENTRY_BYTES
    return _PROCESS_BYTES + working + headers


def _copied(file: Sidecar) -> bytes:
    """What a file holds that is copied as it is."""
    try:
        return file.source.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{file.source}: cannot be read ({error.strerror or error})"
        ) from error


def _fingerprint(plan: Plan) -> str:
    """Digest of all that decides the bytes of the output."""
    digest = blake2b(digest_size=16)
    paths = {
        source.path
        for tensor in plan.tensors
        if isinstance(tensor.rule, Whole)
        for source in tensor.rule.statistics
    }
    stats = {path: Path(path).stat() for path in sorted(paths)}
    files = [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()]
    rules = sorted({repr(tensor.rule) for tensor in plan.tensors if tensor.rule is not None})
    digest.update(
        json.dumps(
            {
                "numerics": NUMERICS,
                "recipe": plan.recipe.model_dump(mode="json"),
                "policies": sorted({repr(tensor.policy) for tensor in plan.tensors}),
                **({"rules": rules} if rules else {}),
                **({"statistics": files} if files else {}),
                "seed": plan.seed,
                "vocabulary": plan.vocabulary.digest if plan.vocabulary is not None else "",
                "models": plan.models,
                "inputs": [
                    [
                        checkpoint.reference,
                        [[f.file_size, f.mtime_ns, f.digest, f.version] for f in checkpoint.files],
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
        digest.update(file.content if file.content is not None else _copied(file))
    return digest.hexdigest()
