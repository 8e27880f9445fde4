"""From the parts of a recipe to the tensors that are merged with one another.

A part is a set of models whose tensors go together: all models of a recipe, or the sources of one
slice. To the rest of planning a source of a slice is a checkpoint that has just the tensors which
the slice needs, under the names that they get in the output (:class:`Cut`): layers ``[8, 16)`` that
become the output's layers 24 to 31 are called so. Tensors before the layers come from the first
slice of their module, those after them from the last.

A gradient runs over the layers of a slice: layer ``i`` of ``L`` is at ``t = i / (L - 1)``, a single
one at 1, and tensors before and after the layers at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cl_fast.checkpoints.checkpoint import Checkpoint
from cl_fast.checkpoints.layers import Module, find_module, find_modules, set_layers
from cl_fast.errors import CheckpointError, RecipeError
from cl_fast.merging.methods import suggest
from cl_fast.merging.numbers import layer_depths

if TYPE_CHECKING:
    from cl_fast.merging.recipe import Entry, Part, Recipe
    from cl_fast.merging.sources import Source

__all__ = ["Cut", "Group", "Listing", "cut", "edit_config", "list_inputs", "whole"]


@dataclass(frozen=True, slots=True)
class Listing:
    """Which inputs a recipe has.

    Attributes:
        bases: what deltas are taken from, each once.
        models: what is merged. Of whole models every entry, else each model once; once more for
            a model that comes more than once in one slice.
        over: of each model the base that it stands on, a position in ``bases``.
        parts: of each part its base and its models, positions in ``bases`` and ``models``.
    """

    bases: tuple[Entry, ...]
    models: tuple[Entry, ...]
    over: tuple[int | None, ...]
    parts: tuple[tuple[int | None, tuple[int, ...]], ...]

    @property
    def entries(self) -> tuple[tuple[str, str], ...]:
        """Recipe key and reference of every input, the bases first."""
        bases = [(entry.key, entry.model) for entry in self.bases]
        return (*bases, *((f"{entry.key}.model", entry.model) for entry in self.models))


def list_inputs(recipe: Recipe) -> Listing:
    """The inputs of a recipe, in the order in which it names them."""
    bases: dict[str, int] = {}
    models: dict[tuple[str, int], int] = {}
    listed_bases: list[Entry] = []
    listed: list[Entry] = []
    over: list[int | None] = []
    parts = []
    for part in recipe.parts:
        base = None
        if part.base is not None:
            base = bases.setdefault(part.base.model, len(bases))
            if base == len(listed_bases):
                listed_bases.append(part.base)
        places = []
        times: dict[str, int] = {}
        for entry in part.entries:
            times[entry.model] = times.get(entry.model, 0) + 1
            place = models.setdefault((entry.model, times[entry.model]), len(models))
            if place == len(listed):
                listed.append(entry)
                over.append(base)
            places.append(place)
        parts.append((base, tuple(places)))
    return Listing(tuple(listed_bases), tuple(listed), tuple(over), tuple(parts))


@dataclass(frozen=True, slots=True)
class Cut(Checkpoint):
    """A part of a checkpoint, under the names that its tensors get.

    Attributes:
        whole: the checkpoint.
        stored: name here -> name in the checkpoint.
        replaced: the sources of tensors that are not read as they are stored.
    """

    whole: Checkpoint
    stored: dict[str, str]
    replaced: dict[str, Source] = field(default_factory=dict)


def whole(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself, where it is a part of one."""
    return checkpoint.whole if isinstance(checkpoint, Cut) else checkpoint


@dataclass(frozen=True, slots=True)
class Group:
    """A part of a recipe with its inputs opened.

    Attributes:
        part: what the recipe says.
        inputs: the base (if the part has one), then the models that are merged.
        positions: of each of them in the inputs of the plan.
        depths: of every tensor its depth for gradients; None: as `layer_depths` says.
        stored: of each model the names of its tensors in the checkpoint, where they are others.
    """

    part: Part
    inputs: tuple[Checkpoint, ...]
    positions: tuple[int, ...]
    depths: dict[str, float] | None

    @property
    def stored(self) -> tuple[dict[str, str], ...]:
        return tuple(
            checkpoint.stored if isinstance(checkpoint, Cut) else {}
            for checkpoint in self.inputs[self.part.base is not None :]
        )

    def depths_of(self, names: list[str]) -> tuple[dict[str, float], bool]:
        """The depth of every tensor, and whether any of them is in a layer."""
        if self.depths is None:
            return layer_depths(names, self.inputs[0])
        return self.depths, True


@dataclass(slots=True)
class _Growing:
    """A module of the output while its slices are read."""

    stack: str
    layers: list[tuple[Checkpoint, int]]
    slices: int
    seen: int = 0


def cut(
    recipe: Recipe,
    listing: Listing,
    inputs: Sequence[Checkpoint],
    *,
    allow_crimes: bool = False,
) -> tuple[list[Group], dict[str, list[tuple[Checkpoint, int]]]]:
    """The parts of a recipe over its opened inputs.

    Args:
        recipe: what is asked for.
        listing: of the recipe.
        inputs: the opened inputs, as the listing has them.
        allow_crimes: do not ask that models whose layers follow each other are of one kind.

    Returns:
        the groups, and of every module with other layers than the inputs where each of its layers
        comes from (a model, and the number that the layer has there).

    Raises:
        RecipeError: a slice is out of range; a model has no such module, or no layers; a module
            of the models is not named.
        CheckpointError: models whose layers follow each other are not of one kind and size.
    """
    first = len(listing.bases)
    groups = []
    if recipe.whole:
        for part, (base, places) in zip(recipe.parts, listing.parts, strict=True):
            positions = (*(() if base is None else (base,)), *(first + place for place in places))
            groups.append(Group(part, tuple(inputs[i] for i in positions), positions, None))
        return groups, {}
    if not allow_crimes:
        _check_kinds(listing, inputs)
    modules = {id(checkpoint): find_modules(checkpoint.tensors) for checkpoint in inputs}
    growing: dict[str, _Growing] = {}
    for part, (base, places) in zip(recipe.parts, listing.parts, strict=True):
        positions = (*(() if base is None else (base,)), *(first + place for place in places))
        entries = [*(() if part.base is None else (part.base,)), *part.entries]
        opened = [inputs[i] for i in positions]
        found = [
            _module(part, entry, checkpoint, modules[id(checkpoint)])
            for entry, checkpoint in zip(entries, opened, strict=True)
        ]
        grown = growing.setdefault(
            found[0].name,
            _Growing(
                found[0].stack,
                [],
                sum(other.module == part.module for other in recipe.parts),
            ),
        )
        depths, cuts = _cut_part(part, entries, opened, found, grown)
        groups.append(Group(part, tuple(cuts), positions, depths))
    _check_complete(recipe, modules[id(inputs[0])], growing, inputs[0])
    if not allow_crimes:
        _check_sizes(groups, modules)
    changed = {
        name: grown.layers
        for name, grown in growing.items()
        if any(i != layer for i, (_, layer) in enumerate(grown.layers))
        or any(
            len(grown.layers) != len(module.layers)
            for module in modules[id(inputs[0])]
            if module.name == name
        )
        or len({str(checkpoint.path) for checkpoint, _ in grown.layers}) > 1
    }
    return groups, changed


def _cut_part(
    part: Part,
    entries: Sequence[Entry],
    opened: Sequence[Checkpoint],
    found: Sequence[Module],
    grown: _Growing,
) -> tuple[dict[str, float], list[Cut]]:
    """The inputs of a part under the names of the output, and the depths of its tensors."""
    start = len(grown.layers)
    is_first, is_last = grown.seen == 0, grown.seen == grown.slices - 1
    grown.seen += 1
    depths: dict[str, float] = {}
    cuts = []
    for entry, checkpoint, module in zip(entries, opened, found, strict=True):
        if module.stack != grown.stack:
            raise RecipeError(
                f"{entry.key}.model: the layers of {entry.model!r} are called {module.stack!r}, "
                f"those before them {grown.stack!r}; only models of one architecture can be put "
                "together"
            )
        low, high = entry.layers if entry.layers is not None else (0, len(module.layers))
        if high > len(module.layers):
            raise RecipeError(
                f"{entry.key}.layer_range: [{low}, {high}] is out of range: {entry.model!r} has "
                f"{_layers_words(len(module.layers))}"
                + ("" if part.module is None else f" in {module.name}")
            )
        if low == high and module.layers:
            raise RecipeError(
                f"{entry.key}.layer_range: [{low}, {high}] holds no layer; the second number is "
                "the one after the last layer"
            )
        stored: dict[str, str] = {}
        if is_first:
            stored |= {name: name for name in module.pre}
        for i, layer in enumerate(range(low, high)):
            for rest in module.layers[layer]:
                name = module.tensor(start + i, rest)
                stored[name] = module.tensor(layer, rest)
                depths[name] = i / (high - low - 1) if high - low > 1 else 1.0
        if is_last:
            stored |= {name: name for name in module.post}
        if entry is entries[0]:
            grown.layers += [(checkpoint, layer) for layer in range(low, high)]
        cuts.append(
            Cut(
                reference=checkpoint.reference,
                path=checkpoint.path,
                files=checkpoint.files,
                tensors={
                    name: checkpoint.tensors[source]._replace(name=name)
                    for name, source in stored.items()
                },
                config=checkpoint.config,
                whole=checkpoint,
                stored=stored,
            )
        )
        for name in stored:
            depths.setdefault(name, 0.0)
    lengths = {
        entry.layers[1] - entry.layers[0] if entry.layers is not None else len(module.layers)
        for entry, module in zip(entries, found, strict=True)
    }
    if len(lengths) > 1:
        counts = ", ".join(
            f"{entry.model!r} {len(module.layers)}"
            for entry, module in zip(entries, found, strict=True)
        )
        raise RecipeError(
            f"{part.key}: the models have different numbers of layers ({counts}); use slices"
        )
    return depths, cuts


def _module(part: Part, entry: Entry, checkpoint: Checkpoint, modules: Sequence[Module]) -> Module:
    """The module of a model that a part is about."""
    listed = ", ".join(f"{module.name} ({_layers_words(len(module.layers))})" for module in modules)
    if part.module is None:
        if len(modules) > 1:
            raise RecipeError(
                f"{part.key}: {entry.model!r} has several modules: {listed}. Say under 'modules' "
                "what each of them is made of"
            )
        if not modules[0].layers:
            raise RecipeError(
                f"{entry.key}.model: {entry.model!r} has no layers: no tensor's name has a number "
                "as in '.layers.3.', '.h.3.', '.blocks.3.'; use 'models'"
            )
        return modules[0]
    module = find_module(modules, part.module)
    if module is None:
        words = [word for module in modules for word in (module.name, *module.aliases)]
        raise RecipeError(
            f"modules.{part.module}: {entry.model!r} has no such module"
            f"{suggest(part.module, words)}; it has {listed}"
        )
    return module


def _layers_words(count: int) -> str:
    return "1 layer" if count == 1 else f"{count or 'no'} layers"


def _check_complete(
    recipe: Recipe, modules: Sequence[Module], growing: dict[str, _Growing], model: Checkpoint
) -> None:
    named: dict[str, str] = {}
    for word in recipe.modules:
        module = find_module(modules, word)
        if module is None:
            continue
        if module.name in named:
            raise RecipeError(
                f"modules.{word}: is the same module as modules.{named[module.name]}; give one"
            )
        named[module.name] = word
    for module in modules:
        if module.name not in growing:
            count = len(module.pre) + len(module.post) + sum(map(len, module.layers))
            raise RecipeError(
                f"modules: does not name {module.name!r} of {model.reference!r}, whose "
                f"{count} tensors the output would lack; add it, as\n"
                f"  {module.name}: {{models: [{{model: {model.reference}}}]}}"
            )


def _check_kinds(listing: Listing, inputs: Sequence[Checkpoint]) -> None:
    """Whether the configs of all models name one architecture."""
    known: tuple[str, Any, Checkpoint] | None = None
    for (key, reference), checkpoint in zip(listing.entries, inputs, strict=True):
        for word in ("architectures", "model_type"):
            said = (checkpoint.config or {}).get(word)
            if said is None:
                continue
            if known is None:
                known = word, said, checkpoint
            elif known[0] == word and known[1] != said:
                raise CheckpointError(
                    f"{key}: {reference!r} is of another architecture than "
                    f"{known[2].reference!r} (config.json says {word}: {said!r} and "
                    f"{known[1]!r}); --allow-crimes puts their layers together all the same"
                )
            break


def _check_sizes(groups: Sequence[Group], modules: dict[int, tuple[Module, ...]]) -> None:
    """Whether layers that follow each other come from models of one size."""
    seen: dict[str, tuple[set[tuple[int, ...]], Checkpoint, str]] = {}
    done = set[int]()
    for group in groups:
        for checkpoint in map(whole, group.inputs):
            if id(checkpoint) in done:
                continue
            done.add(id(checkpoint))
            shapes: dict[str, tuple[set[tuple[int, ...]], str]] = {}
            for module in modules[id(checkpoint)]:
                for i, layer in enumerate(module.layers):
                    for rest in layer:
                        name = module.tensor(i, rest)
                        shape = checkpoint.tensors[name].shape
                        shapes.setdefault(module.stack + rest, (set(), name))[0].add(shape)
            for word, (here, name) in shapes.items():
                there, other, example = seen.setdefault(word, (here, checkpoint, name))
                if not here & there:
                    raise CheckpointError(
                        f"tensor {name!r} of {checkpoint.reference!r} has shape "
                        f"{list(min(here))}, {example!r} of {other.reference!r} "
                        f"{list(min(there))}: layers of models of different sizes cannot follow "
                        "each other; --allow-crimes puts them together all the same"
                    )


def edit_config(
    config: dict[str, Any],
    donor: Checkpoint,
    changed: dict[str, list[tuple[Checkpoint, int]]],
    notes: list[str],
) -> None:
    """Make a donor's config speak of the output's layers, and tell what it cannot say."""
    where = str(donor.folder / "config.json")
    for name, layers in changed.items():
        module = find_module(find_modules(donor.tensors), name)
        if module is None:
            notes.append(f"{where} is of a model without {name}; check what it says of its layers")
            continue
        notes += set_layers(config, module, [(c.config, i) for c, i in layers], where)
        kinds = [frozenset(rests) for rests in module.layers]
        if len(set(kinds)) == 1:
            continue
        found = {str(c.path): find_module(find_modules(c.tensors), name) for c, _ in layers}
        moved = [
            new
            for new, (checkpoint, old) in enumerate(layers)
            if (theirs := found[str(checkpoint.path)]) is not None
            and (new >= len(kinds) or frozenset(theirs.layers[old]) != kinds[new])
        ]
        if moved:
            notes.append(
                f"the layers of {donor.reference} are not all of one kind, and the output's layer "
                f"{moved[0]} is of another kind than config.json may say; numbers in it such as "
                "first_k_dense_replace or a period of layers are kept as they were: check them"
            )
