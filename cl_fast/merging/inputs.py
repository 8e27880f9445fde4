"""Opening what a recipe names: checkpoints, and changes of the base such as patches.

An input that is a change of the base is :class:`Derived`: in a plan it looks like a checkpoint that
shares its base's stored tensors, and those that it changes are :class:`Made` sources. To add a
form of input, add a line to :data:`OPENERS`.
"""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cl_fast.checkpoints.adapters import is_adapter
from cl_fast.checkpoints.checkpoint import Checkpoint, absolute
from cl_fast.checkpoints.deltas import is_delta
from cl_fast.checkpoints.hub import is_hub_id, snapshot
from cl_fast.checkpoints.patches import is_patch
from cl_fast.checkpoints.remote import (
    check_url,
    download_whole,
    is_url,
    local_path,
    open_shadow,
    shadow,
)
from cl_fast.errors import CheckpointError, RecipeError
from cl_fast.merging.slices import Cut, Listing, list_inputs
from cl_fast.merging.sources import Source

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cl_fast.checkpoints.safetensors import Header
    from cl_fast.merging.plan import Plan
    from cl_fast.merging.recipe import Recipe

__all__ = [
    "OPENERS",
    "Derived",
    "Opener",
    "base_and_change",
    "check_derived",
    "forget",
    "is_derived",
    "local_folder",
    "open_inputs",
    "open_model",
    "references",
    "refuse_misplaced",
    "resolve",
    "same_path",
    "source_of",
]


@dataclass(frozen=True, slots=True)
class Derived(Checkpoint):
    """An input that is a change of a base. ``tensors`` tells all of the changed model's tensors."""

    base: Checkpoint

    @property
    def role(self) -> str:
        """What the manifest calls it: ``patch``, ..."""
        raise TypeError("a derived input says itself what it is")

    @property
    def words(self) -> str:
        """What it is, for people."""
        raise TypeError("a derived input says itself what it is")

    @property
    def content(self) -> str:
        """The hash of all that its own files hold, as :meth:`Opener.own` tells it."""
        raise TypeError("a derived input says itself what it holds")

    @property
    def pair(self) -> bool:
        """Whether it is a model of its own, ``BASE+CHANGE``."""
        return False

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that the user should be told."""
        return ()

    def source(self, name: str) -> Source:
        """Where its tensor ``name`` comes from: the base's source for what it leaves alone."""
        raise TypeError("a derived input says itself where its tensors come from")

    def alone(self, reference: str) -> Derived:
        """The same as a model of its own, ``BASE+CHANGE``: of the base's types, with its config.

        Raises:
            RecipeError: this form of input has no such meaning.
        """
        raise RecipeError(
            f"{reference!r}: BASE+CHANGE is for a LoRA adapter or a packed delta on its base; name "
            f"a {self.role} as a model beside the base_model that it changes"
        )

    def dense(self) -> Derived:
        """The same where nobody merges it: every source stands for all of the changed tensor."""
        return self

    def check(self) -> None:
        """Read it, and what it changes, and compare with its hashes, before anything is written.

        Raises:
            CheckpointError: it is damaged, or for another base.
        """


@dataclass(frozen=True, slots=True)
class Opener:
    """A form of input: how it is told, and ``module:function`` that opens one on its base.

    The function is called as ``(base, reference, key=...)`` and returns a :class:`Derived`;
    ``noun`` is for messages, as "an edit patch". ``reader`` names a function of the path that
    reads all of the input's own files: it returns their headers and the hash of what they hold.
    """

    noun: str
    is_it: Callable[[Path], bool]
    opener: str
    reader: str

    def open(self, base: Checkpoint, reference: str, *, key: str) -> Derived:
        module, function = self.opener.split(":")
        opened: Derived = getattr(importlib.import_module(module), function)(
            base, reference, key=key
        )
        return opened

    def own(self, path: Path) -> tuple[tuple[Header, ...], str]:
        """Headers and hash of the input's own files. Raises CheckpointError for a damaged one."""
        module, function = self.reader.split(":")
        read: tuple[tuple[Header, ...], str] = getattr(importlib.import_module(module), function)(
            path
        )
        return read


OPENERS: tuple[Opener, ...] = (
    Opener(
        "an edit patch",
        is_patch,
        "cl_fast.merging.patches:open_patch",
        "cl_fast.merging.patches:own",
    ),
    Opener(
        "a LoRA adapter",
        is_adapter,
        "cl_fast.merging.adapters:open_adapter",
        "cl_fast.merging.adapters:own",
    ),
    Opener(
        "a packed delta",
        is_delta,
        "cl_fast.merging.deltas:open_delta",
        "cl_fast.merging.deltas:own",
    ),
)


#: What was found at references that are no paths, until `forget`; checkpoints opened on the way.
_found: dict[str, str] = {}
_opened: dict[str, Checkpoint] = {}


def resolve(reference: str) -> str:
    """What a reference of a recipe opens as. The same for every use of it in a run.

    A path stays as it is. An id of the Hugging Face hub becomes the folder of its snapshot, which
    is downloaded if the hub's cache does not have it. The URL of a checkpoint stays a URL; a change
    of a base (a patch, an adapter) at a URL is copied to the cache and becomes its path there.

    Raises:
        CheckpointError: the hub does not have it; the store cannot be asked, or nothing is there;
            a URL carries credentials.
    """
    if reference in _found:
        return _found[reference]
    if is_url(reference):
        path = local_path(reference)
        _found[reference] = path if path is not None else _resolve_url(reference)
    elif is_hub_id(reference) and not absolute(reference).exists():
        _found[reference] = snapshot(reference)
    else:
        return reference
    return _found[reference]


def _resolve_url(url: str) -> str:
    with shadow(url) as (place, listing, kept):
        if any(opener.is_it(place) for opener in OPENERS):
            return str(download_whole(listing, kept))
        # A tokenizer's folder, and what is wrong, is told by who opens it as what it should be.
        with contextlib.suppress(CheckpointError):
            _opened[url] = open_shadow(url, place, listing, kept)
    return url


def forget() -> None:
    """Look anew at whatever is at URLs and on the hub."""
    _found.clear()
    _opened.clear()


def local_folder(reference: str) -> Path:
    """The path of a reference, or the local folder with all but the weights of one at a URL."""
    found = resolve(reference)
    if not is_url(found):
        return absolute(found)
    if found in _opened:
        return _opened[found].folder
    with shadow(found) as (_, _, kept):
        return kept


def refuse_misplaced(recipe: Recipe) -> None:
    """Raises CheckpointError for a path that leads somewhere from the recipe's folder only.

    Before anything else is made of it: it may look like an id of the hub.
    """
    if recipe.source is None:
        return
    for key, reference in references(recipe):
        if is_url(reference) or Path(reference).is_absolute() or absolute(reference).exists():
            continue
        beside = recipe.source.parent / reference
        if beside.exists():
            raise CheckpointError(
                f"{key}: {absolute(reference)} does not exist. Relative paths start at the working "
                f"directory; {beside} exists: run from {recipe.source.parent} or write the whole "
                "path"
            )


def same_path(path: Path) -> Path:
    """The path without links, for comparisons."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a loop of links: opening it will say so
        return path


def references(recipe: Recipe) -> list[tuple[str, str]]:
    """Recipe key and reference of every input, the bases of the deltas first."""
    return list(list_inputs(recipe).entries)


def source_of(checkpoint: Checkpoint, name: str) -> Source:
    """Where a tensor of an input comes from."""
    if isinstance(checkpoint, Cut):
        if name in checkpoint.replaced:
            return checkpoint.replaced[name]
        return source_of(checkpoint.whole, checkpoint.stored[name])
    if isinstance(checkpoint, Derived):
        return checkpoint.source(name)
    return Source.of(checkpoint.tensors[name])


def is_derived(reference: str) -> Opener | None:
    """The form of input that a reference is, ``None`` for a checkpoint."""
    path = absolute(resolve(reference))
    return next((opener for opener in OPENERS if opener.is_it(path)), None)


def base_and_change(reference: str) -> tuple[str, str] | None:
    """The parts of ``BASE+CHANGE``, a change on a base of its own; ``None`` for anything else.

    A path that holds a ``+`` itself is not cut.
    """
    if "+" not in reference or _exists(reference):
        return None
    pieces = reference.split("+")
    for cut in range(1, len(pieces)):
        base, change = "+".join(pieces[:cut]), "+".join(pieces[cut:])
        if base and change and is_derived(change) is not None:
            return base, change
    return None


def _exists(reference: str) -> bool:
    if not is_url(reference):
        return absolute(reference).exists()
    check_url(reference)  # what it holds of a secret is neither looked up nor told
    try:
        return bool(resolve(reference))
    except CheckpointError:
        return False


def open_inputs(
    recipe: Recipe, planned: Mapping[str, Checkpoint] | None = None
) -> tuple[Checkpoint, ...]:
    """Every input of a recipe, in the order of :func:`references`; one that comes twice is shared.

    ``planned``: inputs that are not there yet, by their references.

    Raises:
        CheckpointError: an input is missing, malformed, quantised or for another base.
        RecipeError: a change of a model stands where a model must.
    """
    opened: dict[str, Checkpoint] = dict(planned or {})
    inputs: list[Checkpoint] = []
    listing = list_inputs(recipe)
    bases = len(listing.bases)
    for i, (key, reference) in enumerate(listing.entries):
        if reference not in opened:
            parts = base_and_change(reference)
            opener = None if parts is not None else is_derived(reference)
            if parts is not None:
                opened[reference] = _open_pair(key, reference, *parts)
            elif opener is None:
                opened[reference] = _open_checkpoint(key, reference)
            else:
                over = None if i < bases else listing.over[i - bases]
                base = None if over is None else inputs[over]
                opened[reference] = _open_derived(opener, recipe, base, key, reference)
                _check_one_base(opener, listing, key, reference)
        inputs.append(opened[reference])
    return tuple(inputs)


def _check_one_base(opener: Opener, listing: Listing, key: str, reference: str) -> None:
    """A change of a base is opened once, so all slices that use it must have that base."""
    same = {i for i, entry in enumerate(listing.models) if entry.model == reference}
    found = {base for base, places in listing.parts if same & set(places)}
    if len(found) > 1:
        raise RecipeError(
            f"{key}: {reference!r} is {opener.noun}, and the slices that use it have different "
            f"bases; write it as BASE+{reference} in them"
        )


def _open_checkpoint(key: str, reference: str) -> Checkpoint:
    found = resolve(reference)
    checkpoint = _opened.get(found) or Checkpoint.open(found, key=key)
    if not is_url(reference):
        checkpoint = replace(checkpoint, reference=reference)
    checkpoint.refuse_quantised()
    return checkpoint


def open_model(key: str, reference: str) -> Checkpoint:
    """A model that nothing is merged of: config and tokenizer come from it.

    Raises:
        CheckpointError: it is missing, malformed or quantised.
        RecipeError: it is a change of a model.
    """
    if opener := is_derived(reference):
        raise RecipeError(
            f"{key}: {reference!r} is {opener.noun}, which is a change of a model and not one; "
            "name a checkpoint"
        )
    return _open_checkpoint(key, reference)


def _open_pair(key: str, reference: str, base: str, change: str) -> Derived:
    opener = is_derived(change)
    assert opener is not None
    below = _open_checkpoint(key, base)
    derived = opener.open(below, resolve(change), key=key)
    return derived.alone(reference)


def _open_derived(
    opener: Opener, recipe: Recipe, base: Checkpoint | None, key: str, reference: str
) -> Derived:
    if key.endswith("base_model"):
        raise RecipeError(
            f"{key}: {reference!r} is {opener.noun}, which is a change of a model and not "
            "one; name the checkpoint that it changes"
        )
    if base is None:
        raise RecipeError(
            f"{key}: {reference!r} is {opener.noun}, whose delta is taken against a base, and "
            f"merge_method {recipe.merge_method!r} has none; write it with the model that it "
            f"changes as BASE+{reference}, or use task_arithmetic, ties or a dare method with "
            "that base_model"
        )
    return opener.open(base, resolve(reference), key=key)


def check_derived(plan: Plan) -> None:
    """Read the inputs that are changes of a base, and compare them and it with their hashes.

    Raises:
        CheckpointError: one is damaged, or for another base.
    """
    seen = set[str]()
    for checkpoint in plan.inputs:
        if isinstance(checkpoint, Derived) and str(checkpoint.path) not in seen:
            seen.add(str(checkpoint.path))
            checkpoint.check()
