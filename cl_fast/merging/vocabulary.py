"""Models whose tokenizers differ: one vocabulary for the output, and rows in its order.

The rows of embeddings and output heads belong to tokens. Where the models' tokenizers differ (or
one has more tokens), each model's matrix is aligned before the merge: output row i of model m is

    its own row for the token with id i               if m has that token
    a filled row (another model's, a mean, or zero)   if it has not
    its own row i, or that of the tokenizer's model   if i is the id of no token (padding)

and then merged like any other tensor. The maps are made here from the tokenizers' files alone; no
weight is read. :class:`~cl_fast.merging.aligned.Aligned` makes the aligned matrix when its turn
comes. A model whose map is the identity is read as it is stored.
"""

from __future__ import annotations

import json
import re
import sys
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import pairwise
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cl_fast.checkpoints.checkpoint import Checkpoint
from cl_fast.checkpoints.safetensors import TensorInfo, strict_json
from cl_fast.checkpoints.sidecar import Sidecar, has_tokenizer
from cl_fast.checkpoints.vocabulary import Vocabulary, VocabularyReader, added_token, extend
from cl_fast.errors import CheckpointError, RecipeError
from cl_fast.merging.aligned import GROUP, MEAN, SHIFT, ZERO, Aligned
from cl_fast.merging.inputs import Derived, is_derived, local_folder, same_path, source_of
from cl_fast.merging.slices import Cut, Group, whole
from cl_fast.merging.sources import Fetched, Made, Packed, Source
from cl_fast.ops.policy import DTYPES

if TYPE_CHECKING:
    from cl_fast.merging.recipe import Recipe
    from cl_fast.merging.tokenizer_rules import TokenizerRules, TokenRule

__all__ = ["VocabularyPlan", "plan_vocabulary", "vocabulary_axis"]

_EMBEDDINGS = re.compile(
    r"(?:^|\.)(?:embed_tokens|embed_tokens_per_layer|wte|word_embeddings|embed_in|tok_embeddings"
    r"|shared|backbone\.embeddings)\.weight$"
)
_HEADS = re.compile(
    r"(?:^|\.)(?:lm_head|lm_head\.linear|lm_head\.decoder|embed_out|output|output_layer"
    r"|vocab_projector|cls\.predictions|cls\.predictions\.decoder|layers\.\d+\.linear"
    r"|final_logits_bias)(?:\.weight|\.bias)?$"
)


@dataclass(frozen=True, slots=True, eq=False)
class VocabularyPlan:
    """The output's vocabulary and where its rows come from.

    Attributes:
        groups: the groups of the plan; the tensors of their inputs have the aligned shapes, and
            those that are not read as they are stored are replaced.
        folder: where the tokenizer comes from; ``None`` if the recipe does not say.
        files: of the tokenizer: name -> content; ``None`` for those that are not copied.
        rows: of the output's embeddings; ``None`` where no tensor has a row per token.
        vocab_size: for config.json; ``None`` where the donor's is right.
        ids: special token ids for config.json and generation_config.json, by file and key.
        digest: of the maps; "" where nothing is aligned.
        source, tokens: for people and for the manifest.
        memory: bytes that the maps, and reading the tokenizers, take.
    """

    groups: list[Group]
    folder: Path | None
    files: Mapping[str, bytes | None]
    rows: int | None
    vocab_size: int | None
    ids: Mapping[str, Mapping[str, Any]]
    digest: str
    source: str
    tokens: int | None
    memory: int = 0

    @property
    def aligned(self) -> tuple[str, ...]:
        """The tensors that are not merged as they are stored, in one model at least."""
        inputs = [checkpoint for group in self.groups for checkpoint in group.inputs]
        return tuple(
            dict.fromkeys(
                name
                for checkpoint in inputs
                if isinstance(checkpoint, Cut)
                for name in checkpoint.replaced
            )
        )

    @property
    def words(self) -> str:
        """What it is, for people."""
        count = "" if self.tokens is None else f", {self.tokens} tokens"
        rows = "" if self.rows is None else f", {self.rows} rows"
        aligned = f"; aligned: {', '.join(self.aligned)}" if self.digest and self.aligned else ""
        return f"{self.source}{count}{rows}{aligned}"

    def sidecars(self, files: Sequence[Sidecar]) -> tuple[Sidecar, ...]:
        """The files beside the weights with the output's tokenizer, and configs that fit it."""
        found = {file.name: file for file in files}
        for name, content in self.files.items():
            if content is None:
                found.pop(name, None)
            else:
                folder = self.folder or Path()
                found[name] = Sidecar(name, folder / name, content, len(content))
        for name in ("config.json", "generation_config.json"):
            if name not in found:
                continue
            file = found[name]
            raw = file.content if file.content is not None else file.source.read_bytes()
            rows = self.vocab_size if name == "config.json" else None
            patched = _patch(raw, rows, self.ids.get(name, {}), str(file.source))
            if patched != raw:
                found[name] = replace(file, content=patched, nbytes=len(patched))
        return tuple(found[name] for name in sorted(found))


def vocabulary_axis(name: str, shape: tuple[int, ...]) -> int | None:
    """The axis of a tensor that tokens number, as far as its name and shape tell."""
    if _EMBEDDINGS.search(name):
        return 0 if len(shape) == 2 else None
    if not _HEADS.search(name):
        return None
    if name.endswith("final_logits_bias"):
        return 1 if len(shape) == 2 and shape[0] == 1 else None
    return 0 if len(shape) in (1, 2) else None


def _vocabulary_tensors(group: Group) -> dict[str, int]:
    """Tensor -> axis, embeddings first. What may be a head must have the rows of the embeddings."""
    axes, inputs = dict[str, int](), group.inputs
    names = [name for name in inputs[0].tensors if all(name in other.tensors for other in inputs)]
    rows: tuple[int, ...] | None = None
    for surely in (True, False):
        for name in names:
            if bool(_EMBEDDINGS.search(name)) is not surely:
                continue
            shapes = [checkpoint.tensors[name].shape for checkpoint in inputs]
            axis = vocabulary_axis(name, shapes[0])
            if axis is None or any(len(shape) != len(shapes[0]) for shape in shapes):
                continue
            here = tuple(shape[axis] for shape in shapes)
            if surely:
                axes[name] = axis
                rows = rows or here
            elif here == rows or re.search(r"(?:^|\.)(?:lm_head|embed_out)\.weight$", name):
                axes[name] = axis
    return axes


@dataclass(slots=True, eq=False)
class _Model:
    checkpoint: Checkpoint
    tokens: dict[str, int]


def plan_vocabulary(
    recipe: Recipe,
    inputs: tuple[Checkpoint, ...],
    groups: list[Group],
    donor: Checkpoint,
    notes: list[str],
    *,
    truncate: bool = False,
) -> VocabularyPlan | None:
    """The output's vocabulary, and the rows of every input in its order.

    Args:
        recipe: its keys ``tokenizer_source`` or ``tokenizer``.
        inputs: of the plan, bases first.
        groups: the tensors that are merged with one another.
        donor: the model whose config.json the output gets; perhaps none of the inputs.
        notes: gets sentences that the user should be told.
        truncate: without those keys, cut matrices of more rows than the smallest has.

    Returns:
        ``None`` where the recipe asks for nothing and nothing is cut.

    Raises:
        CheckpointError: a tokenizer cannot be read, or does not fit the others.
        RecipeError: the tokenizers cannot be united; a rule names a model or a token that is not
            there, or has no effect.
    """
    rules = recipe.tokenizer_rules
    if rules is None:
        _note_numbering(groups, donor, notes)
        return _truncated(groups, notes) if truncate else None
    if truncate:
        notes.append(
            "--unsafe-truncate-embeddings has no effect, since the recipe names a tokenizer"
        )
    return _Alignment(recipe, rules, inputs, groups, donor, notes).plan()


def _note_numbering(groups: Sequence[Group], donor: Checkpoint, notes: list[str]) -> None:
    """Tell where a row is another token's in one model than in the output's tokenizer.

    Vocabularies are read only where files of tokenizer.json differ.
    """
    output = _below(donor)
    ours, others = _stored_tokenizer(output), dict[Path, Checkpoint]()
    if ours is None:
        return
    for group in groups:
        found = {c.folder: c for c in (_below(whole(one)) for one in group.inputs)}
        differ = {
            folder: checkpoint
            for folder, checkpoint in found.items()
            if folder not in others and _stored_tokenizer(checkpoint) not in (None, ours)
        }
        if differ and _vocabulary_tensors(group):
            others |= differ
    reader = VocabularyReader()
    for folder, checkpoint in others.items():
        try:
            one = reader.read(output.folder, output.tokenizer_files)
            other = reader.read(folder, checkpoint.tokenizer_files)
        except CheckpointError:
            continue  # whoever loads that tokenizer is told
        if one is None or other is None:
            continue
        at = {number: token for token, number in other.tokens.items()}
        moved = [
            token
            for token, number in one.tokens.items()
            if at.get(number, token) != token or other.tokens.get(token, number) != number
        ]
        if moved:
            notes.append(
                f"the tokenizers of {output.path} and {checkpoint.path} number {len(moved)} "
                f"token{'' if len(moved) == 1 else 's'} differently (as {moved[0]!r}); rows are "
                "merged by number: write tokenizer_source: base to align them"
            )


def _stored_tokenizer(checkpoint: Checkpoint) -> bytes | None:
    """Digest of tokenizer.json; ``None`` where there is none, or it cannot be read."""
    try:
        raw = checkpoint.tokenizer_files.get("tokenizer.json")
        raw = (checkpoint.folder / "tokenizer.json").read_bytes() if raw is None else raw
    except OSError:
        return None
    return blake2b(raw, digest_size=16).digest()


def _truncated(groups: list[Group], notes: list[str]) -> VocabularyPlan | None:
    least: int | None = None
    done = []
    for group in groups:
        found: list[_Replaced] = [{} for _ in group.inputs]
        for name, axis in _vocabulary_tensors(group).items():
            rows = [checkpoint.tensors[name].shape[axis] for checkpoint in group.inputs]
            if len(set(rows)) == 1:
                continue
            kept = min(rows)
            least = kept if least is None or _EMBEDDINGS.search(name) else least
            for replaced, checkpoint in zip(found, group.inputs, strict=True):
                if checkpoint.tensors[name].shape[axis] > kept:
                    replaced[name] = _shorter(checkpoint, name, axis, kept)
            notes.append(
                f"UNSAFE: {name} is cut to {kept} rows, the least that a model has; tokens with "
                "higher ids lose their rows, and ids below must mean the same token in all models"
            )
        done.append(_with(group, found))
    if least is None:
        notes.append(
            "--unsafe-truncate-embeddings has no effect, since all embeddings have as many rows"
        )
        return None
    words = f"truncated to {least}"
    return VocabularyPlan(done, None, {}, least, least, {}, words, "truncated", None)


def _shorter(checkpoint: Checkpoint, name: str, axis: int, rows: int) -> tuple[Source, TensorInfo]:
    info, source = checkpoint.tensors[name], source_of(checkpoint, name)
    if isinstance(source, Made) and not isinstance(source, Fetched):
        raise CheckpointError(
            f"{checkpoint.path}: changes {name!r}, which is cut to {rows} rows; give a tokenizer "
            "in the recipe (tokenizer_source) instead of --unsafe-truncate-embeddings"
        )
    nbytes = info.nbytes // info.shape[axis] * rows
    shape = (*info.shape[:axis], rows, *info.shape[axis + 1 :])
    return replace(source, nbytes=nbytes), info._replace(shape=shape, nbytes=nbytes)


#: Tensor -> where its rows come from instead, and what they look like.
_Replaced = dict[str, tuple[Source, TensorInfo]]


def _with(group: Group, found: Sequence[_Replaced]) -> Group:
    """A group with other sources for some tensors of its inputs."""
    if not any(found):
        return group
    inputs = tuple(
        _replaced(checkpoint, changed) if changed else checkpoint
        for checkpoint, changed in zip(group.inputs, found, strict=True)
    )
    return replace(group, inputs=inputs)


def _replaced(checkpoint: Checkpoint, changed: _Replaced) -> Cut:
    stored = {name: name for name in checkpoint.tensors}
    if isinstance(checkpoint, Cut):
        stored = checkpoint.stored
    return Cut(
        reference=checkpoint.reference,
        path=checkpoint.path,
        files=checkpoint.files,
        tensors={**checkpoint.tensors, **{name: info for name, (_, info) in changed.items()}},
        config=checkpoint.config,
        whole=whole(checkpoint),
        stored=stored,
        replaced={name: source for name, (source, _) in changed.items()},
    )


#: What a token of a tokenizer leaves in the process, measured.
_TOKEN_BYTES = 120

#: In the place of inputs that no row comes from.
_NOTHING = Source("", 0, "F32", 0)


class _Alignment:
    """The work of `plan_vocabulary` where a recipe names a tokenizer."""

    def __init__(
        self,
        recipe: Recipe,
        rules: TokenizerRules,
        inputs: tuple[Checkpoint, ...],
        groups: list[Group],
        donor: Checkpoint,
        notes: list[str],
    ) -> None:
        self._recipe, self._rules, self._inputs = recipe, rules, inputs
        self._groups, self._config_of, self._notes = groups, donor, notes
        self._reader = VocabularyReader()
        self._own_rows: dict[tuple[int, int], list[int]] = {}
        self._used_ids: dict[int, frozenset[int]] = {}
        self._base = next((i for i, checkpoint in enumerate(inputs) if checkpoint is donor), None)

    def plan(self) -> VocabularyPlan:
        """See `plan_vocabulary`."""
        folder, source = self._source()
        if source is not None and self._all_equal():
            return VocabularyPlan(
                self._groups, folder, {}, None, None, {}, "", self._rules.source, None
            )
        vocabularies = [self._read(checkpoint) for checkpoint in self._inputs]
        first = vocabularies[source] if source is not None else self._external(folder)
        if first is None:
            self._without(folder, vocabularies)
            return VocabularyPlan(
                self._groups, folder, {}, None, None, {}, "", self._rules.source, None
            )
        for position, vocabulary in enumerate(vocabularies):
            if vocabulary is None:
                self._assume(position, first, source)
        known = [v or first for v in vocabularies]
        models = _models(range(len(self._inputs)), self._inputs, known)
        tokens, files = self._output(first, known)
        if any(before >= after for before, after in pairwise(tokens.values())):
            tokens = dict(sorted(tokens.items(), key=itemgetter(1)))
        if source is None:  # elsewhere; perhaps the tokenizer of one of the inputs all the same
            source = next((i for i, v in enumerate(known) if v.tokens == tokens), None)
        self._note_shared(models, tokens, folder)
        self._check_rules(models, first)
        rows, digest, done = None, blake2b(digest_size=16), list[Group]()
        read = {id(v.tokens): len(v.tokens) for v in known}
        memory = _TOKEN_BYTES * sum(read.values())
        for number, group in enumerate(self._groups):
            found: list[_Replaced] = [{} for _ in group.inputs]
            here = _models(group.positions, group.inputs, known)
            for name, axis in _vocabulary_tensors(group).items():
                count, aligned = self._align(name, axis, group, here, tokens, source, bool(files))
                rows = count if rows is None else rows  # the embeddings come first
                for k, (made, info) in aligned.items():
                    digest.update(
                        f"{number} {k} {name} {made.dtype} {made.rows} {made.groups}\n".encode()
                    )
                    digest.update(made.codes)
                    memory += 2 * len(made.codes)
                    for replaced, checkpoint in zip(found, group.inputs, strict=True):
                        if checkpoint.reference == here[k].checkpoint.reference:
                            replaced[name] = made, info
            done.append(_with(group, found))
        changed = any(after is not before for after, before in zip(done, self._groups, strict=True))
        return VocabularyPlan(
            done,
            folder,
            files,
            rows,
            None if rows == _rows(self._config_of) else rows,
            self._special_ids(folder, first, tokens),
            digest.hexdigest() if changed else "",
            self._rules.source,
            len(tokens),
            memory,
        )

    def _all_equal(self) -> bool:
        """Whether all files and shapes are the same, so that there is nothing to read and to do."""
        if self._rules.tokens or self._rules.pad_to_multiple_of:
            return False
        below = {str(_folder(checkpoint)): _below(checkpoint) for checkpoint in self._inputs}
        found = {self._reader.digest(c.folder, c.tokenizer_files) for c in below.values()}
        shapes = {
            (name, checkpoint.tensors[name].shape)
            for group in self._groups
            for name in _vocabulary_tensors(group)
            for checkpoint in group.inputs
        }
        names = {name for name, _ in shapes}
        return len(found) == 1 and None not in found and len(shapes) == len(names)

    # Which tokenizer.

    def _position(self, reference: str) -> int | None:
        path = same_path(local_folder(reference))
        for position, checkpoint in enumerate(self._inputs):
            if checkpoint.reference == reference or same_path(checkpoint.path) == path:
                return position
        return None

    def _source(self) -> tuple[Path, int | None]:
        """The folder whose tokenizer is the first of the output's, and whose input it is."""
        rules = self._rules
        if rules.source in ("base", "union"):
            return _folder(self._config_of), self._base
        reference = rules.source.removeprefix("model:")
        if changed := is_derived(reference):
            raise RecipeError(
                f"{rules.key}: {reference!r} is {changed.noun}, which has no tokenizer; leave it "
                "out, or name the base or a model"
            )
        position = self._position(reference)
        if position is not None:
            return _folder(self._inputs[position]), position
        path = local_folder(reference)
        folder = path if path.is_dir() else path.parent
        if not path.exists() or not has_tokenizer(folder):
            wrong = "holds no tokenizer" if path.exists() else "does not exist"
            raise CheckpointError(
                f"{rules.key}: {reference!r} {wrong}; name one of the models or a folder with "
                "tokenizer.json"
            )
        return folder, None

    def _external(self, folder: Path) -> Vocabulary | None:
        return self._reader.read(folder)

    def _read(self, checkpoint: Checkpoint) -> Vocabulary | None:
        checkpoint = _below(checkpoint)
        return self._reader.read(checkpoint.folder, checkpoint.tokenizer_files)

    def _without(self, folder: Path, vocabularies: Sequence[Vocabulary | None]) -> None:
        """The source has no tokenizer: fine where there is nothing to align."""
        rules = self._rules
        if rules.tokens or rules.pad_to_multiple_of or rules.source == "union":
            other = next((v.folder for v in vocabularies if v is not None), None)
            raise CheckpointError(
                f"{rules.key}: {folder} holds no tokenizer"
                + (f" ({other} does)" if other is not None else "")
                + ", so there is no vocabulary to build one from; put its tokenizer.json there, or "
                "name the tokenizer of another model"
            )

    def _assume(self, position: int, first: Vocabulary, source: int | None) -> None:
        """A model without a tokenizer has that of the output's source, if it has its rows."""
        folder = _folder(self._inputs[position])
        wrong = f"{folder} holds no tokenizer, so what its rows mean is not known"
        if self._rules.source == "union":
            raise CheckpointError(
                f"{self._rules.key}: {wrong}, and it cannot be united with that of "
                f"{first.folder}; put its tokenizer.json there, or write base instead of union"
            )
        rows = _rows(self._inputs[position])
        theirs = first.size if source is None else _rows(self._inputs[source])
        if rows != theirs:
            raise CheckpointError(
                f"{self._rules.key}: {wrong}: its embeddings have {rows} rows, those of the "
                f"tokenizer of {first.folder} have {theirs}; put its tokenizer.json there"
            )
        self._notes.append(
            f"{folder} holds no tokenizer; its rows are taken to be those of {first.folder}"
        )

    def _output(
        self, first: Vocabulary, vocabularies: Sequence[Vocabulary]
    ) -> tuple[dict[str, int], dict[str, bytes | None]]:
        """Token -> id, and the tokenizer's files where they are not copies."""
        plain: dict[str, None] = {}
        added: dict[str, dict[str, Any]] = {}
        if self._rules.source == "union":
            for other in vocabularies:
                if other.kind != first.kind:
                    raise RecipeError(
                        f"{self._rules.key}: union cannot unite the tokenizers of {first.folder} "
                        f"({first.kind}) and {other.folder} ({other.kind}), which cut text into "
                        "different kinds of tokens; write base, or name one of the models"
                    )
            distinct = {id(v.tokens): v for v in vocabularies}
            distinct.pop(id(first.tokens), None)
            for other in distinct.values():
                for token, entry in other.added.items():
                    if token not in first.added:
                        added.setdefault(token, entry)
            for other in distinct.values():
                missing = [token for token in other.tokens if token not in first.tokens]
                for token in sorted(missing, key=other.tokens.__getitem__):
                    if token not in added:
                        plain.setdefault(token)
        for token in self._rules.tokens:
            if token not in first.tokens and token not in plain and token not in added:
                added[token] = added_token(token)
        if not plain and not added:
            return first.tokens, {}
        return extend(first, plain, list(added.values()))

    def _note_shared(self, models: Sequence[_Model], tokens: dict[str, int], folder: Path) -> None:
        for model in models:
            if model.tokens is tokens:
                continue
            shared = len(model.tokens.keys() & tokens.keys())
            if not shared:
                raise CheckpointError(
                    f"{self._rules.key}: the tokenizer of {folder} and that of "
                    f"{_folder(model.checkpoint)} have no token in common; their embeddings cannot "
                    "be merged"
                )
            if shared < len(tokens):
                self._notes.append(
                    f"{model.checkpoint.path}: has {shared} of the output's {len(tokens)} tokens; "
                    "its other rows are filled (docs/tokenizers.md)"
                )

    def _check_rules(self, models: Sequence[_Model], first: Vocabulary) -> None:
        for token, rule in self._rules.tokens.items():
            if rule.kind == "default":
                if token in first.tokens:
                    raise RecipeError(
                        f"{rule.key}: has no effect, since the tokenizer of {first.folder} has "
                        "that token; give a source, or remove it"
                    )
                continue
            if rule.model is not None and self._position(rule.model) is None:
                self._unknown(rule, self._inputs)
            if not rule.force and all(token in model.tokens for model in models):
                self._notes.append(
                    f"{rule.key}: every model has a row for it, so its source is not used "
                    "(force: true would)"
                )

    def _donor(self, rule: TokenRule, models: Sequence[_Model]) -> int:
        position = self._position(rule.model or "")
        place = None if position is None else self._find(position, models)
        if place is None:
            self._unknown(rule, [model.checkpoint for model in models])
        return place

    def _unknown(self, rule: TokenRule, inputs: Sequence[Checkpoint]) -> NoReturn:
        listed = ", ".join(dict.fromkeys(repr(checkpoint.reference) for checkpoint in inputs))
        raise RecipeError(
            f"{rule.key}.source: {rule.model!r} is none of the models whose embeddings are merged "
            f"({listed})"
        )

    # The rows of a tensor.

    def _align(
        self,
        name: str,
        axis: int,
        group: Group,
        models: Sequence[_Model],
        tokens: dict[str, int],
        source: int | None,
        extended: bool,
    ) -> tuple[int, dict[int, tuple[Aligned, TensorInfo]]]:
        """How many rows a tensor gets, and its aligned sources by position in `models`."""
        infos = [model.checkpoint.tensors[name] for model in models]
        limits = [info.shape[axis] for info in infos]
        place = None if source is None else self._find(source, models)
        theirs = 0 if place is None else limits[place]
        if source is not None and place is None and name in self._inputs[source].tensors:
            theirs = self._inputs[source].tensors[name].shape[axis]
        if any(info.dtype not in DTYPES for info in infos):
            return theirs, {}  # refused, or compared, like any tensor of such a type
        order = list(tokens.items())
        own = [
            self._own(model.tokens, tokens, limit)
            for model, limit in zip(models, limits, strict=True)
        ]
        lacking = {i for rows in own for i, row in enumerate(rows) if row < 0}
        forced = {token for token, rule in self._rules.tokens.items() if rule.force}
        if forced:
            lacking |= {i for i, (token, _) in enumerate(order) if token in forced}
        base = self._base_index(group, models)
        filler = _Filler(self._rules, models, own, limits, base, self._donor)
        filled = {i: filler.code(name, i, order[i][0]) for i in sorted(lacking)}
        if extended or source is None:
            needed = max(tokens.values(), default=-1) + 1
        else:
            beyond = [
                (order[i][1], filled[i] != ZERO or order[i][0] in self._rules.tokens)
                for i in filled
                if order[i][1] >= theirs
            ]
            needed = max((index + 1 for index, has in beyond if has), default=0)
            without = sum(index >= max(theirs, needed) for index, _ in beyond)
            if without and _EMBEDDINGS.search(name):
                self._notes.append(
                    f"the tokenizer has {without} tokens beyond the rows of {name}, which no model "
                    "has a row for; they get none, as in the model that the tokenizer comes from"
                )
        rows = max(theirs, needed)
        if pad := self._rules.pad_to_multiple_of:
            rows = -(-rows // pad) * pad
        ids = [index for _, index in order]
        dense = ids == list(range(len(ids)))
        unused = sorted(set(range(rows)).difference(ids))
        aligned = {}
        for k, model in enumerate(models):
            shift, owners = k << SHIFT, {k}
            mine = own[k]
            codes = array("q", [shift + row for row in mine] if dense else [MEAN])
            codes = codes[:rows] + array("q", [MEAN]) * (rows - len(codes))
            if not dense:
                for i, index in enumerate(ids):
                    if index < rows:
                        codes[index] = shift + mine[i]
            for i, code in filled.items():
                if ids[i] < rows and (mine[i] < 0 or order[i][0] in forced):
                    codes[ids[i]] = code
                    owners.add(code >> SHIFT if code >= 0 else k)
            taken = self._ids(model) if unused else frozenset[int]()
            for row in unused:
                if row >= theirs:
                    break  # the others are higher still, and means
                if row < limits[k] and row not in taken:
                    codes[row] = shift + row
                elif place is not None:
                    codes[row] = place << SHIFT | row
                    owners.add(place)
            if rows == limits[k] and codes == array("q", range(shift, shift + rows)):
                continue
            aligned[k] = self._aligned(name, axis, models, k, codes, owners, filler.groups, rows)
        return rows, aligned

    def _aligned(
        self,
        name: str,
        axis: int,
        models: Sequence[_Model],
        k: int,
        codes: array[int],
        owners: set[int],
        groups: Sequence[tuple[int, ...]],
        rows: int,
    ) -> tuple[Aligned, TensorInfo]:
        info = models[k].checkpoint.tensors[name]
        width = prod(info.shape) // info.shape[axis]
        listed = tuple(groups) if min(codes, default=0) <= GROUP else ()
        used = owners | {code >> SHIFT for group in listed for code in group}
        inputs = tuple(
            _whole(source_of(model.checkpoint, name)) if j in used else _NOTHING
            for j, model in enumerate(models)
        )
        kinds = {source.dtype for source in inputs if source is not _NOTHING}
        dtype = kinds.pop() if len(kinds) == 1 else "F32"
        if listed and dtype.startswith("F8"):
            dtype = "F32"
        shape = (*info.shape[:axis], rows, *info.shape[axis + 1 :])
        nbytes = DTYPES[dtype] * rows * width
        packed = codes[:]
        if sys.byteorder == "big":
            packed.byteswap()
        aligned = Aligned(
            path=info.path,
            offset=0,
            dtype=dtype,
            nbytes=nbytes,
            rows=rows,
            width=width,
            inputs=inputs,
            codes=packed.tobytes(),
            groups=listed,
        )
        # The type stays that of the stored tensor: it is what the output gets by default.
        nbytes = DTYPES[info.dtype] * rows * width
        return aligned, info._replace(shape=shape, nbytes=nbytes)

    def _find(self, position: int, models: Sequence[_Model]) -> int | None:
        """The place in `models` of the input at `position`."""
        reference = self._inputs[position].reference
        return next((k for k, m in enumerate(models) if m.checkpoint.reference == reference), None)

    def _base_index(self, group: Group, models: Sequence[_Model]) -> int | None:
        if group.part.base is not None:
            return 0
        if self._recipe.base_model is None or self._base is None:
            return None
        return self._find(self._base, models)

    def _own(self, theirs: dict[str, int], tokens: dict[str, int], limit: int) -> list[int]:
        """For every token of the output the row that a model has for it, or -1."""
        key = (id(theirs), limit)
        if key not in self._own_rows:
            found = [theirs.get(token, -1) for token in tokens]
            if max(found, default=-1) >= limit:
                found = [row if row < limit else -1 for row in found]
            self._own_rows[key] = found
        return self._own_rows[key]

    def _ids(self, model: _Model) -> frozenset[int]:
        """The ids that mean a token in a model."""
        key = id(model.tokens)
        if key not in self._used_ids:
            self._used_ids[key] = frozenset(model.tokens.values())
        return self._used_ids[key]

    # The configs.

    def _special_ids(
        self, folder: Path, first: Vocabulary, tokens: dict[str, int]
    ) -> dict[str, dict[str, Any]]:
        """Token ids of config.json and generation_config.json, where the tokenizer is another's.

        Theirs is what the tokenizer's own model says, else the token that its files name, else
        the id of the token that the donor meant.
        """
        donor = _folder(self._config_of)
        if same_path(donor) == same_path(folder):
            return {}
        theirs = (self._read(self._config_of) or first).tokens
        if theirs is first.tokens:
            return {}
        config = _json(folder / "tokenizer_config.json") or {}
        named = {**(_json(folder / "special_tokens_map.json") or {}), **config}
        meant = {index: token for token, index in theirs.items()}
        model = _flat(_json(folder / "config.json"))
        found: dict[str, dict[str, Any]] = {}
        for file in ("config.json", "generation_config.json"):
            ours = _flat(_json(donor / file))
            other = {**model, **_flat(_json(folder / file))}
            for key, value in ours.items():
                new = _new_id(key, value, other, named, meant, tokens)
                if new == value:
                    continue
                found.setdefault(file, {})[key] = new
                self._notes.append(
                    f"{file}: {key} {json.dumps(value)} becomes {json.dumps(new)}, as the "
                    f"tokenizer of {folder} numbers its tokens"
                )
        return found


class _Filler:
    """The rows of tokens that a model lacks: by the recipe's rules, else by default."""

    def __init__(
        self,
        rules: TokenizerRules,
        models: Sequence[_Model],
        own: Sequence[Sequence[int]],
        limits: Sequence[int],
        base: int | None,
        donor: Callable[[TokenRule, Sequence[_Model]], int],
    ) -> None:
        self._rules, self._models, self._own, self._limits = rules, models, own, limits
        self._base, self._donor = base, donor
        self.groups: list[tuple[int, ...]] = []
        self._seen: dict[tuple[int, ...], int] = {}

    def code(self, name: str, i: int, token: str) -> int:
        """What stands in for token number `i` of the output in tensor `name`."""
        rule = self._rules.tokens.get(token)
        if rule is not None and rule.kind != "default":
            return self._ruled(rule, name, i, token)
        present = [k for k, rows in enumerate(self._own) if rows[i] >= 0]
        if not present:
            return ZERO
        if self._base in present:
            present = [present[present.index(self._base)]]
        codes = tuple(k << SHIFT | self._own[k][i] for k in present)
        if len(codes) == 1:
            return codes[0]
        if codes not in self._seen:
            self._seen[codes] = GROUP - len(self.groups)
            self.groups.append(codes)
        return self._seen[codes]

    def _ruled(self, rule: TokenRule, name: str, i: int, token: str) -> int:
        if rule.kind == "zero":
            return ZERO
        k = self._donor(rule, self._models)
        row: int | None = self._own[k][i]
        wanted = repr(token)
        if rule.kind == "model_token":
            wanted = f"id {rule.token_id}" if rule.token is None else repr(rule.token)
            row = rule.token_id
            if rule.token is not None:
                row = self._models[k].tokens.get(rule.token, -1)
        if row is None or not 0 <= row < self._limits[k]:
            raise RecipeError(
                f"{rule.key}.source: {rule.model!r} has no row for {wanted} in {name}, which has "
                f"{self._limits[k]} rows there; name a token or a model that has one"
            )
        return k << SHIFT | row


def _models(
    positions: Iterable[int], inputs: Sequence[Checkpoint], vocabularies: Sequence[Vocabulary]
) -> list[_Model]:
    """Every input once. `vocabularies`: of the inputs of the plan, which `positions` number."""
    models, seen = list[_Model](), set[str]()
    for position, checkpoint in zip(positions, inputs, strict=True):
        if checkpoint.reference not in seen:
            seen.add(checkpoint.reference)
            models.append(_Model(checkpoint, vocabularies[position].tokens))
    return models


def _whole(source: Source) -> Source:
    """A source as a matrix of its own: a packed delta on its base."""
    return source.as_model() if isinstance(source, Packed) else source


def _rows(checkpoint: Checkpoint) -> int | None:
    """Rows of the embeddings; without any, of a head."""
    for pattern in (_EMBEDDINGS, _HEADS):
        for name, info in checkpoint.tensors.items():
            axis = vocabulary_axis(name, info.shape)
            if axis is not None and pattern.search(name):
                return info.shape[axis]
    return None


def _below(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint whose tokenizer an input has; a change of a model has the model's."""
    while isinstance(checkpoint, Derived):
        checkpoint = checkpoint.base
    return checkpoint


def _folder(checkpoint: Checkpoint) -> Path:
    return _below(checkpoint).folder


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = strict_json(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    return content if isinstance(content, dict) else None


_ID_KEY = re.compile(r"_token_ids?$")


def _flat(config: dict[str, Any] | None) -> dict[str, Any]:
    """The token ids of a config and of its text_config."""
    found: dict[str, Any] = {}
    for section in ((config or {}).get("text_config"), config):
        if isinstance(section, dict):
            found.update({k: v for k, v in section.items() if _ID_KEY.search(k) and v is not None})
    return found


def _new_id(
    key: str,
    value: Any,
    other: Mapping[str, Any],
    named: Mapping[str, Any],
    meant: Mapping[int, str],
    tokens: Mapping[str, int],
) -> Any:
    if key in other:
        return other[key]
    token = named.get(_ID_KEY.sub("_token", key))
    if isinstance(token, dict):
        token = token.get("content")
    if isinstance(token, str) and token in tokens:
        return tokens[token]
    if isinstance(value, list):
        kept = [tokens.get(meant.get(v, "")) for v in value if type(v) is int]
        return [v for v in kept if v is not None] or None
    return tokens.get(meant.get(value, "")) if type(value) is int else value


def _patch(raw: bytes, rows: int | None, ids: Mapping[str, Any], where: str) -> bytes:
    """A config with another vocab_size and other token ids, in the sections that have them."""
    config = strict_json(raw, where)
    if not isinstance(config, dict) or (rows is None and not ids):
        return raw
    text = config.get("text_config")
    sections = [config, text] if isinstance(text, dict) else [config]
    if rows is not None:
        having = [section for section in sections if type(section.get("vocab_size")) is int]
        for section in having or sections[-1:]:
            section["vocab_size"] = rows
    for section in sections:
        for key, value in ids.items():
            if key in section:
                section[key] = value
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
