"""The YAML of a merge: read, checked in every key, and resolved for each tensor.

Keys and meaning are mergekit's for the methods that are here, and a few more
(docs/merge-recipes.md). The rule is that nothing is ignored: an unknown key, a parameter that the
method does not use, a filter that matches nothing is an error that names the key's path.

A parameter is a scalar, a gradient or a list of filters::

    weight: 0.5                       # everywhere
    weight: [0.2, 0.8]                # layer 0 -> 0.2, last layer -> 0.8, linear in between
    weight:
      - filter: mlp                   # tensors with "mlp" in their name; the first hit wins
        value: [0.2, 0.8]
      - value: 0.5                    # all others

This module imports pydantic and yaml; nothing else of cl_fast does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NoReturn

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from cl_fast.documents import key_path, kind_of, parse_documents, read_document
from cl_fast.errors import RecipeError
from cl_fast.merging.chat_templates import check_chat_template
from cl_fast.merging.methods import (
    CHOICES,
    FILES,
    NUMBERS,
    SWITCHES,
    Method,
    check_parameter,
    find_method,
    make_policy,
    suggest,
)
from cl_fast.merging.references import NO_ARCHITECTURE, BadReference, reference_text
from cl_fast.merging.tokenizer_rules import TokenizerRules, parse_tokenizer
from cl_fast.ops.policy import Policy

__all__ = [
    "Entry",
    "ModelEntry",
    "ModuleEntry",
    "Part",
    "Recipe",
    "Setting",
    "SliceEntry",
    "SourceEntry",
    "load_recipe",
    "map_references",
    "parse_recipe",
]

#: What ``dtype`` and ``out_dtype`` may say -> safetensors name.
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

#: Keys of mergekit recipes that this version does not have, and what to do.
_UNSUPPORTED: dict[str, str] = {}

_WANTED = "a number, a list of numbers (gradient) or a list of filters"

MAX_RECIPE_BYTES = 16_000_000
_MAX_NESTING = 8
_FLOAT32_MAX = 3.4028234663852886e38


_Reference = Annotated[str, BeforeValidator(reference_text)]


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @field_validator("parameters", mode="before", check_fields=False)
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return {} if value is None else value


class ModelEntry(_Block):
    """One entry of ``models``."""

    model: _Reference = Field(description="folder or .safetensors file of the checkpoint")
    parameters: dict[str, Any] = Field(default_factory=dict, description="weight, density")


class SourceEntry(_Block):
    """One entry of a slice's ``sources``."""

    model: _Reference = Field(description="folder or .safetensors file of the checkpoint")
    layer_range: list[int] = Field(description="first layer, and the one after the last")
    parameters: dict[str, Any] = Field(default_factory=dict, description="weight, density, scale")


class SliceEntry(_Block):
    """One entry of ``slices``: layers of the output, and what they are merged from."""

    sources: list[SourceEntry] = Field(description="the models and their layers")
    base_model: _Reference | None = Field(None, description="of this slice's deltas")
    parameters: dict[str, Any] = Field(default_factory=dict, description="for this slice")
    residual_weight: float | None = Field(None, description="accepted, and without effect")


class ModuleEntry(_Block):
    """One entry of ``modules``: a part of a model that has several stacks of layers."""

    models: list[ModelEntry] = Field(default_factory=list, description="as at the top level")
    slices: list[SliceEntry] = Field(default_factory=list, description="as at the top level")
    parameters: dict[str, Any] = Field(default_factory=dict, description="for this module")


class Recipe(BaseModel):
    """A checked recipe. Immutable. Made by :func:`load_recipe` or :func:`parse_recipe`.

    Both raise :class:`~cl_fast.errors.RecipeError`; constructing the class directly raises
    pydantic's ``ValidationError`` with the same words.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str | None = Field(None, description="of the merge, for the others of its file")
    merge_method: str = Field(description="linear, task_arithmetic, ties, dare_linear, dare_ties")
    models: list[ModelEntry] = Field(
        default_factory=list, description="the models to merge, in order"
    )
    slices: list[SliceEntry] = Field(
        default_factory=list, description="the layers of the output, from first to last"
    )
    modules: dict[str, ModuleEntry] = Field(
        default_factory=dict, description="the same for each module of the model"
    )
    base_model: _Reference | None = Field(None, description="what the deltas are taken from")
    parameters: dict[str, Any] = Field(default_factory=dict, description="for all models")
    dtype: str | None = Field(None, description="type of the output where out_dtype is not given")
    out_dtype: str | None = Field(None, description="type of the output")
    tokenizer_source: _Reference | None = Field(
        None, description="'base', 'union' or a model reference"
    )
    tokenizer: dict[str, Any] | None = Field(
        None, description="tokenizer_source with rules for tokens: source, tokens, padding"
    )
    chat_template: str | None = Field(
        None, description="'auto', a builtin name, Jinja text or a .jinja file"
    )
    seed: int | None = Field(None, ge=0, lt=2**64, description="of the random masks")

    _policy: Policy = PrivateAttr(default_factory=Policy)
    _parts: tuple[Part, ...] = PrivateAttr(())
    _source: Path | None = PrivateAttr(None)
    _text: str | None = PrivateAttr(None)

    @field_validator("parameters", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return {} if value is None else value

    @model_validator(mode="before")
    @classmethod
    def _fold_tokenizer(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        for key, words in _UNSUPPORTED.items():
            if data.get(key) is not None:
                raise RecipeError(f"{key}: {words}")
        data = {
            key: value
            for key, value in data.items()
            if key not in _UNSUPPORTED and (value is not None or key not in ("slices", "modules"))
        }
        block = data.get("tokenizer")
        if block is not None:
            if data.get("tokenizer_source") is not None:
                raise RecipeError("tokenizer: and tokenizer_source: mean the same; give one")
            rules = parse_tokenizer(block)
            if not rules.tokens and rules.pad_to_multiple_of is None:
                data = {**data, "tokenizer": None, "tokenizer_source": rules.source}
        return data

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        method = find_method(self.merge_method)
        for key in ("dtype", "out_dtype"):
            _check_dtype(key, getattr(self, key))
        _check_reference("base_model", self.base_model)
        self._check_tokenizer()
        if self.seed is not None and not method.random:
            raise RecipeError(
                f"seed: has no effect with merge_method {method.name!r}, which draws nothing at "
                "random; remove it"
            )
        everywhere = _scope(method, self.parameters, "parameters")
        self._policy = make_policy(method, everywhere.words)
        self._parts = tuple(self._make_parts(method, everywhere))
        return self

    def _make_parts(self, method: Method, everywhere: _Scope) -> Iterator[Part]:
        given = [key for key in ("models", "slices", "modules") if getattr(self, key)]
        if len(given) > 1:
            raise RecipeError(f"{given[1]}: stands beside {given[0]!r}; give one of them")
        if not given:
            empty = [k for k in ("models", "slices", "modules") if k in self.model_fields_set]
            if empty:
                raise RecipeError(f"{empty[0]}: is empty; list at least one model")
            raise RecipeError("models: is required, or 'slices' or 'modules'")
        if self.models:
            yield self._whole(method, self.models, None, "", [everywhere])
        for i, part in enumerate(self.slices):
            yield self._slice(method, part, None, f"slices[{i}]", [everywhere])
        for name, module in self.modules.items():
            key = f"modules.{name}"
            if bool(module.models) == bool(module.slices):
                raise RecipeError(f"{key}: must have either 'models' or 'slices'")
            scopes = [_scope(method, module.parameters, f"{key}.parameters"), everywhere]
            if module.models:
                yield self._whole(method, module.models, name, f"{key}.", scopes)
            for i, part in enumerate(module.slices):
                yield self._slice(method, part, name, f"{key}.slices[{i}]", scopes)

    def _whole(
        self,
        method: Method,
        models: Sequence[ModelEntry],
        module: str | None,
        prefix: str,
        scopes: list[_Scope],
    ) -> Part:
        """The part that merges all layers of whole models."""
        entries = []
        for i, entry in enumerate(models):
            key = f"{prefix}models[{i}]"
            _check_reference(f"{key}.model", entry.model)
            settings = _own(method, entry.parameters, f"{key}.parameters")
            file = _file(method, entry.parameters, key)
            entries.append(Entry(key, entry.model, None, settings, file))
        base = None
        if self.base_model is not None:
            base = Entry("base_model", self.base_model, None, {})
            if method.base_role.startswith("member") and not any(
                _same(entry.model, base.model) for entry in entries
            ):
                entries.insert(0, base)
        return _part(method, f"{prefix}models", module, base, entries, scopes)

    def _slice(
        self, method: Method, part: SliceEntry, module: str | None, key: str, scopes: list[_Scope]
    ) -> Part:
        entries = []
        if not part.sources:
            raise RecipeError(f"{key}.sources: is empty; list at least one model")
        for i, entry in enumerate(part.sources):
            where = f"{key}.sources[{i}]"
            _check_reference(f"{where}.model", entry.model)
            settings = _own(method, entry.parameters, f"{where}.parameters")
            layers = _layer_range(entry.layer_range, f"{where}.layer_range")
            file = _file(method, entry.parameters, where)
            entries.append(Entry(where, entry.model, layers, settings, file))
        first = entries[0]
        for other in entries[1:]:
            if _length(other) != _length(first):
                raise RecipeError(
                    f"{other.key}.layer_range: has {_length(other)} layers, {first.key} has "
                    f"{_length(first)}; all sources of a slice must have equally many"
                )
        _check_reference(f"{key}.base_model", part.base_model)
        base = None
        if part.base_model is not None:
            if method.base_role == "donor":
                raise RecipeError(
                    f"{key}.base_model: has no effect with merge_method {method.name!r}; remove it"
                )
            base = Entry(f"{key}.base_model", part.base_model, None, {})
        elif self.base_model is not None:
            base = Entry("base_model", self.base_model, None, {})
        own = _scope(method, part.parameters, f"{key}.parameters")
        return _part(method, f"{key}.sources", module, base, entries, [own, *scopes])

    def _check_tokenizer(self) -> None:
        rules = self.tokenizer_rules
        if rules is not None and rules.source not in ("base", "union"):
            _check_reference(rules.key, rules.source.removeprefix("model:"))
        if self.chat_template is not None:
            check_chat_template(self.chat_template)

    # What the plan asks.

    @property
    def method(self) -> Method:
        """The entry of the method table."""
        return find_method(self.merge_method)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is merged: one part for ``models``, else one for each slice, in order."""
        return self._parts

    @property
    def terms(self) -> tuple[int, ...]:
        """Positions in ``models`` of those that are merged; a base listed there is not."""
        merged = {entry.key for part in self.parts for entry in part.entries}
        return tuple(i for i in range(len(self.models)) if f"models[{i}]" in merged)

    @property
    def whole(self) -> bool:
        """Whether it merges whole models as they are, so that there is one part."""
        return bool(self.models)

    @property
    def layered(self) -> bool:
        """Whether layers may change their numbers: there are slices."""
        return any(entry.layers is not None for part in self.parts for entry in part.entries)

    @property
    def output_dtype(self) -> str | None:
        """safetensors name of ``out_dtype`` or ``dtype``; ``None``: as stored in the base."""
        word = self.out_dtype or self.dtype
        return None if word is None else _DTYPES[word.removeprefix("torch.")]

    @property
    def tokenizer_rules(self) -> TokenizerRules | None:
        """The output's tokenizer and the rows of its tokens, ``None`` if not said."""
        if self.tokenizer is not None:
            return parse_tokenizer(self.tokenizer)
        return None if self.tokenizer_source is None else TokenizerRules(self.tokenizer_source)

    @property
    def tokenizer_reference(self) -> str | None:
        """The model reference that the tokenizer comes from, ``None`` if not said."""
        rules = self.tokenizer_rules
        if rules is None:
            return None
        if rules.source in ("base", "union"):
            return self.base_model
        return rules.source.removeprefix("model:")

    @property
    def source(self) -> Path | None:
        """The file it was read from."""
        return self._source

    def text(self) -> str:
        """The recipe as YAML: as read from the file, else written from its values."""
        return self._text if self._text is not None else self.to_yaml()

    def to_yaml(self) -> str:
        """The values as YAML, without what is not set."""
        content = self.model_dump(exclude_none=True, exclude_defaults=True)
        content = {"merge_method": self.merge_method, **content}
        return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))

    @property
    def policy(self) -> Policy:
        """What is done to each element."""
        return self._policy

    def settings(self) -> Iterator[Setting]:
        """Every number of the recipe, with its filters and gradients."""
        found: dict[str, Setting] = {}
        for part in self.parts:
            for scope in (*part.scopes[::-1], *(entry.settings for entry in part.entries)):
                found |= {setting.key: setting for setting in scope.values()}
        yield from found.values()


@dataclass(frozen=True, slots=True)
class Entry:
    """A model in a part.

    Attributes:
        key: where the recipe lists it: ``models[1]``, ``slices[0].sources[1]``, ``base_model``.
        model: its reference.
        layers: the layers that take part, first and after the last; ``None``: all of them.
        settings: its own numbers.
        file: its file of statistics, for a method that needs one.
    """

    key: str
    model: str
    layers: tuple[int, int] | None
    settings: Mapping[str, Setting]
    file: str | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """Models that are merged with one another: all of a recipe's, or those of one slice.

    Attributes:
        key: where the recipe lists them.
        module: of which module of the model; ``None`` where the recipe has no ``modules``.
        base: what the deltas are taken from; ``None`` for methods without deltas.
        entries: the models that are merged, in order; a base among them is not.
        scopes: numbers for all of them, the narrowest scope first.
        policy: what is done to each element.
        switches: those of the method's rule, as given or by default.
        base_position: where among the entries the base is, for a method of which it is one.
    """

    key: str
    module: str | None
    base: Entry | None
    entries: tuple[Entry, ...]
    scopes: tuple[Mapping[str, Setting], ...]
    policy: Policy
    switches: Mapping[str, bool] = field(default_factory=dict)
    base_position: int = 0

    def chain(self, entry: int | None, name: str) -> tuple[Setting, ...]:
        """The settings that may give ``name``, first the model's own (``None``: shared only)."""
        own = [] if entry is None else [self.entries[entry].settings]
        found = (scope.get(name) for scope in (*own, *self.scopes))
        return tuple(setting for setting in found if setting is not None)


@dataclass(frozen=True, slots=True)
class _Scope:
    settings: dict[str, Setting]
    words: dict[str, Any]
    key: str


def _scope(method: Method, parameters: Mapping[str, Any], where: str) -> _Scope:
    """The parameters of a recipe, a module or a slice."""
    settings: dict[str, Setting] = {}
    words: dict[str, Any] = {}
    for name, value in parameters.items():
        key = f"{where}.{name}"
        check_parameter(method, name, key)
        if value is None:
            raise RecipeError(f"{key}: has no value; give one or remove the key")
        if name in FILES:
            raise RecipeError(f"{key}: is of one model; move it to that model's 'parameters'")
        if name in NUMBERS:
            settings[name] = _setting(method, name, value, key)
        elif name == "int8_mask":
            if not isinstance(value, bool):
                raise RecipeError(f"{key}: must be true or false; got {kind_of(value)}")
        else:
            words[name] = value
    return _Scope(settings, words, where)


def _file(method: Method, parameters: Mapping[str, Any], where: str) -> str | None:
    """The file of statistics of a model."""
    if method.statistic is None:
        return None
    if parameters.get(method.statistic) is None:
        raise RecipeError(
            f"{where}.parameters.{method.statistic}: is required by merge_method {method.name!r}; "
            f"name the file that cl_fast.merging.statistics.collect_{method.statistic} wrote"
        )
    return str(parameters[method.statistic])


def _own(method: Method, parameters: Mapping[str, Any], where: str) -> dict[str, Setting]:
    """The parameters of one model."""
    own: dict[str, Setting] = {}
    for name, value in parameters.items():
        key = f"{where}.{name}"
        check_parameter(method, name, key)
        if name not in method.model_parameters:
            raise RecipeError(
                f"{key}: is for the whole merge; move it to the top-level 'parameters'"
            )
        if value is None:
            raise RecipeError(f"{key}: has no value; give one or remove the key")
        if name in FILES:
            if not isinstance(value, str | Path) or not str(value).strip():
                raise RecipeError(f"{key}: must be the path of a file; got {kind_of(value)}")
            continue
        own[name] = _setting(method, name, value, key)
    return own


def _part(
    method: Method,
    key: str,
    module: str | None,
    base: Entry | None,
    entries: Sequence[Entry],
    scopes: Sequence[_Scope],
) -> Part:
    """A part, its models checked against the method and its base told from them."""
    words: dict[str, Any] = {}
    for scope in reversed(scopes):
        words |= scope.words
    where = next((scope.key for scope in scopes if scope.words), "parameters")
    terms, role, position = list(entries), method.base_role, 0
    if role == "delta" or (role == "delta_if_given" and base is not None):
        base, terms = _split_base(method, key, base, entries)
    elif role.startswith("member"):
        position = _member(method, key, base, entries)
        base = None
    else:
        if base is not None and entries[0].layers is None:
            _check_listed(method, base, entries)
        base = None
    if method.rule is not None:
        _check_count(method, key, terms, base)
    if method.most is not None and len(terms) > method.most:
        raise RecipeError(
            f"{terms[method.most].key}.model: merge_method {method.name!r} takes {method.most} "
            f"model{'s' if method.most > 1 else ''} here; got {len(terms)}"
        )
    numbers = tuple(scope.settings for scope in scopes)
    policy = make_policy(method, words, where=where)
    policy = replace(policy, difference=base is not None)
    switches = {name: bool(words.get(name, value)) for name, value in method.switches.items()}
    _check_rule(method, where, numbers, switches)
    return Part(key, module, base, tuple(terms), numbers, policy, switches, position)


def _check_count(method: Method, key: str, terms: Sequence[Entry], base: Entry | None) -> None:
    count = len(terms)
    if method.least <= count <= (method.most or count):
        return
    wanted = str(method.least) if method.least == method.most else f"{method.least} or more"
    beside = " beside the base_model" if base is not None else ""
    plural = "" if wanted == "1" else "s"
    if method.base_role == "member":
        beside = ", one of them the base_model (which joins 'models' that do not list it)"
    raise RecipeError(
        f"{key}: merge_method {method.name!r} merges {wanted} model{plural}{beside}; got {count}"
    )


def _member(method: Method, key: str, base: Entry | None, entries: Sequence[Entry]) -> int:
    """Where the base is among the models."""
    if base is None:
        if method.base_role == "member":
            raise RecipeError(
                f"base_model: is required by merge_method {method.name!r} and is one of the two "
                "models, where t is 0"
            )
        return 0
    for place, entry in enumerate(entries):
        if _same(entry.model, base.model):
            return place
    if method.base_role == "member":
        raise RecipeError(
            f"{key}: none of them is the base_model {base.model!r}, which is one of the two models "
            f"of merge_method {method.name!r}, where t is 0; list it"
        )
    return 0


def _check_rule(
    method: Method,
    where: str,
    scopes: Sequence[Mapping[str, Setting]],
    switches: Mapping[str, bool],
) -> None:
    """Numbers that a rule needs, and switches without effect."""
    for name in method.whole_numbers:
        if math.isnan(method.number(name).default) and not any(name in scope for scope in scopes):
            raise RecipeError(
                f"parameters.{name}: is required by merge_method {method.name!r}; it is "
                f"{method.number(name).words}"
            )
    if switches.get("nuslerp_flatten") and switches["nuslerp_row_wise"]:
        raise RecipeError(
            f"{where}.nuslerp_row_wise: has no effect with nuslerp_flatten: true, its default; set "
            "nuslerp_flatten: false, or remove it"
        )


def _split_base(
    method: Method, key: str, base: Entry | None, entries: Sequence[Entry]
) -> tuple[Entry, list[Entry]]:
    """The base with the layers that it takes part with, and the models but for it."""
    if base is None:
        raise RecipeError(
            f"base_model: is required by merge_method {method.name!r}, which merges "
            "differences from it"
        )
    listed: Entry | None = None
    terms: list[Entry] = []
    for entry in entries:
        if not _same(entry.model, base.model):
            terms.append(entry)
            continue
        if listed is not None:
            raise RecipeError(f"{entry.key}.model: the base_model is listed twice")
        if entry.settings:
            raise RecipeError(
                f"{entry.key}.parameters: the model is the base_model, whose difference "
                "from itself is zero, so its parameters have no effect; remove them"
            )
        listed = entry
    if not terms:
        raise RecipeError(f"{key}: holds only the base_model; list a model to merge")
    ranges = {entry.layers for entry in terms}
    if listed is None and len(ranges) > 1:
        raise RecipeError(
            f"{key}: take different layers of different models; list the base_model "
            f"{base.model!r} among them, with the layer_range that they differ from"
        )
    layers = listed.layers if listed is not None else ranges.pop()
    return replace(base, layers=layers), terms


def _check_listed(method: Method, base: Entry, entries: Sequence[Entry]) -> None:
    if method.one_as_it_is or any(_same(entry.model, base.model) for entry in entries):
        return
    raise RecipeError(
        f"base_model: merge_method {method.name!r} averages the models themselves and "
        "uses no base; list it under 'models' with a weight, or remove it"
    )


def _layer_range(value: Sequence[int], key: str) -> tuple[int, int]:
    if len(value) != 2:
        raise RecipeError(
            f"{key}: must be two numbers, the first layer and the one after the last, as [0, 16]; "
            f"got {len(value)}"
        )
    first, end = value
    if first < 0 or end < first:
        raise RecipeError(
            f"{key}: must run from a layer to a later one, as [0, 16] for the first 16 layers; got "
            f"[{first}, {end}]"
        )
    return first, end


def _length(entry: Entry) -> int:
    return 0 if entry.layers is None else entry.layers[1] - entry.layers[0]


@dataclass(frozen=True, slots=True)
class _Value:
    key: str
    value: float


@dataclass(frozen=True, slots=True)
class _Gradient:
    key: str
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Filter:
    key: str
    text: str | None  # None: every tensor
    then: _Value | _Gradient | _Filters


@dataclass(frozen=True, slots=True)
class _Filters:
    key: str
    filters: tuple[_Filter, ...]


_Node = _Value | _Gradient | _Filters


@dataclass(frozen=True, slots=True)
class Setting:
    """A parameter with its filters and gradients. ``key`` is its path in the recipe."""

    name: str
    key: str
    node: _Node

    def evaluate(self, tensor: str, t: float, used: set[str]) -> float | None:
        """The value for a tensor at depth ``t`` (0 first layer, 1 last).

        ``None`` if no filter matches. The keys of all that took part are added to ``used``.
        """
        node: _Node = self.node
        while True:
            used.add(node.key)
            if isinstance(node, _Value):
                return node.value
            if isinstance(node, _Gradient):
                return _interpolate(node.values, t)
            for entry in node.filters:
                if entry.text is None or entry.text in tensor:
                    used.add(entry.key)
                    node = entry.then
                    break
            else:
                return None

    def leaves(self) -> Iterator[tuple[str, float]]:
        """Every value in it with its key; a gradient's come one by one."""
        return _leaves(self.node)

    def filters(self) -> Iterator[tuple[str, str]]:
        """Every filter in it that can fail to match: its key and its text."""
        return _filters(self.node)

    @property
    def has_gradient(self) -> bool:
        """Whether its value depends on the layer."""
        return _has_gradient(self.node)


def _interpolate(values: tuple[float, ...], t: float) -> float:
    place = t * (len(values) - 1)
    left = min(int(place), len(values) - 1)
    right = min(left + 1, len(values) - 1)
    part = place - left
    return (1.0 - part) * values[left] + part * values[right]


def _leaves(node: _Node) -> Iterator[tuple[str, float]]:
    if isinstance(node, _Value):
        yield node.key, node.value
    elif isinstance(node, _Gradient):
        for i, value in enumerate(node.values):
            yield f"{node.key}[{i}]", value
    else:
        for entry in node.filters:
            yield from _leaves(entry.then)


def _filters(node: _Node) -> Iterator[tuple[str, str]]:
    if isinstance(node, _Filters):
        for entry in node.filters:
            if entry.text is not None:
                yield entry.key, entry.text
            yield from _filters(entry.then)


def _has_gradient(node: _Node) -> bool:
    if isinstance(node, _Filters):
        return any(_has_gradient(entry.then) for entry in node.filters)
    return isinstance(node, _Gradient)


def _setting(method: Method, name: str, value: Any, key: str) -> Setting:
    number = method.number(name)
    setting = Setting(name, key, _parse(value, key, 0))
    for leaf_key, leaf in setting.leaves():
        if not number.allows(leaf):
            percent = f" (for {leaf:g} percent write {leaf / 100:g})"
            raise RecipeError(
                f"{leaf_key}: {name} is {number.words}; got {leaf!r}"
                + (percent if leaf > 1 and number.high == 1 else "")
            )
        if abs(leaf) > _FLOAT32_MAX:
            raise RecipeError(f"{leaf_key}: {leaf!r} is beyond float32")
    return setting


def _parse(value: Any, key: str, depth: int) -> _Node:
    if depth > _MAX_NESTING:
        raise RecipeError(f"{key}: filters are nested more than {_MAX_NESTING} deep")
    if isinstance(value, Mapping):  # one filter without the '-' of a list
        return _Filters(key, (_parse_filter(value, key, depth),))
    if not isinstance(value, list):
        return _Value(key, _scalar(value, key))
    if not value:
        raise RecipeError(f"{key}: is an empty list; must be {_WANTED}")
    if all(isinstance(item, Mapping) for item in value):
        filters = tuple(_parse_filter(item, f"{key}[{i}]", depth) for i, item in enumerate(value))
        for entry, after in pairwise(filters):
            if entry.text is None:
                raise RecipeError(
                    f"{after.key}: has no effect, since {entry.key} before it matches every "
                    "tensor; put the default last"
                )
        return _Filters(key, filters)
    if any(isinstance(item, Mapping | list) for item in value):
        raise RecipeError(f"{key}: mixes numbers, lists and filters; must be {_WANTED}")
    return _Gradient(key, tuple(_scalar(v, f"{key}[{i}]") for i, v in enumerate(value)))


def _parse_filter(item: Mapping[Any, Any], key: str, depth: int) -> _Filter:
    for name in item:
        if name not in ("filter", "value"):
            hint = suggest(name, ("filter", "value")) if isinstance(name, str) else ""
            raise RecipeError(f"{key}.{name}: unknown key{hint}; an entry has 'filter' and 'value'")
    if "value" not in item:
        raise RecipeError(f"{key}: has no 'value'")
    text = item.get("filter")
    if text is not None and not isinstance(text, str):
        raise RecipeError(f"{key}.filter: must be a part of tensor names; got {kind_of(text)}")
    if text == "":
        raise RecipeError(f"{key}.filter: is empty; leave it out for the default")
    if text == "*":
        text = None
    return _Filter(key, text, _parse(item["value"], f"{key}.value", depth + 1))


def _scalar(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecipeError(f"{key}: must be {_WANTED}; got {kind_of(value)}")
    try:
        number = float(value)
    except OverflowError:
        raise RecipeError(f"{key}: is beyond float32") from None
    if not math.isfinite(number):
        raise RecipeError(f"{key}: must be a finite number; got {number}")
    return number


def _check_dtype(key: str, word: str | None) -> None:
    if word is None or word.removeprefix("torch.") in _DTYPES:
        return
    if "float64" in word or "double" in word:
        hint = "; the arithmetic is float32 with exact rounding, which float64 would not improve"
    elif "8" in word or "int" in word:
        hint = "; merge to bfloat16 and quantise the result"
    else:
        hint = suggest(word, _DTYPES)
    raise RecipeError(f"{key}: must be one of {', '.join(_DTYPES)}; got {word!r}{hint}")


def _check_reference(key: str, reference: str | None) -> None:
    if reference is None:
        return
    if not reference.strip():
        raise RecipeError(f"{key}: is empty; name a checkpoint folder")
    if "\0" in reference:
        raise RecipeError(f"{key}: {reference!r} is not a path")


def _same(left: str, right: str) -> bool:
    """Whether two references are the same folder, by spelling or on disk."""
    if left.rstrip("/") == right.rstrip("/"):
        return True
    try:
        return Path(left).expanduser().resolve() == Path(right).expanduser().resolve()
    except (OSError, RuntimeError, ValueError):
        return False


def map_references(
    content: dict[str, Any], change: Callable[[str], str], *, base: bool = True
) -> dict[str, Any]:
    """A recipe as a mapping with other references to its models, also where its tokenizer is told.

    Args:
        content: as `Recipe.model_dump` gives it; changed.
        change: gives the new reference for an old one.
        base: whether the bases change too.
    """
    blocks = [content, *(content.get("modules") or {}).values()]
    slices = [part for block in blocks for part in block.get("slices") or ()]
    for block in blocks:
        for entry in block.get("models") or ():
            entry["model"] = change(entry["model"])
    for part in slices:
        for entry in part["sources"]:
            entry["model"] = change(entry["model"])
    for block in [content, *slices] if base else []:
        if block.get("base_model") is not None:
            block["base_model"] = change(block["base_model"])
    tokenizer: dict[str, Any] = content.get("tokenizer") or {}
    for place, key in ((content, "tokenizer_source"), (tokenizer, "source")):
        source: Any = place.get(key)
        if isinstance(source, str):
            source = source.removeprefix("model:")
        if source not in (None, "base", "union"):
            place[key] = change(source)
    for rule in (tokenizer.get("tokens") or {}).values():
        source = rule.get("source") if isinstance(rule, dict) else None
        if isinstance(source, dict) and "kind" in source:
            if source.get("model") is not None:
                source["model"] = change(source["model"])
        elif source is not None:
            rule["source"] = change(source)
    return content


def map_files(content: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """A recipe as `map_references` takes it with other paths of its files of statistics."""
    blocks = [content, *(content.get("modules") or {}).values()]
    listed = [entry for block in blocks for entry in block.get("models") or ()]
    slices = [part for block in blocks for part in block.get("slices") or ()]
    listed += [entry for part in slices for entry in part["sources"]]
    for entry in listed:
        parameters = entry.get("parameters") or {}
        for name in FILES:
            if name in parameters:
                parameters[name] = change(str(parameters[name]))
    return content


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe file.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or anything in it is wrong.
    """
    file = Path(path)
    return parse_recipe(read_document(file, "recipe", MAX_RECIPE_BYTES), source=file)


def parse_recipe(content: str | Mapping[str, Any], *, source: Path | None = None) -> Recipe:
    """Check a recipe given as YAML text or as a mapping.

    Raises:
        RecipeError: what is wrong, beginning with ``source`` (if given) and the key's path.
    """
    prefix = f"{source}: " if source is not None else ""
    text = content if isinstance(content, str) else None
    data: Any = content
    if text is not None:
        documents = parse_documents(text, prefix)
        if len(documents) > 1:
            raise RecipeError(
                f"{prefix}holds {len(documents)} recipes, parted by '---'; load_stages (or "
                "cl-fast merge) carries them out in order"
            )
        data = documents[0] if documents else None
    if not isinstance(data, Mapping):
        raise RecipeError(
            f"{prefix}a recipe is a mapping with 'merge_method' and 'models'; got {kind_of(data)}"
        )
    if "merge_method" not in data and "recipe" in data and data.keys() & {"evaluate", "function"}:
        raise RecipeError(
            f"{prefix}this is a study, whose recipe has ranges in place of numbers: cl-fast search "
            "finds the numbers and writes the recipe"
        )
    try:
        recipe = Recipe.model_validate(dict(data))
    except ValidationError as error:
        _raise(error, prefix)
    recipe._source = source
    recipe._text = text
    return recipe


_TYPE_WORDS = {
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "list_type": "must be a list (each entry begins with '-')",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping with 'model' and 'parameters'",
    "model_attributes_type": "must be a mapping with 'model' and 'parameters'",
    "greater_than_equal": "must be at least 0",
    "less_than": "must be below 2**64",
}

_TOP_KEYS = (*Recipe.model_fields, *_UNSUPPORTED)
#: Keys below the top, and what they belong to.
_INNER_KEYS = {
    "models": tuple(ModelEntry.model_fields),
    "slices": tuple(SliceEntry.model_fields),
    "sources": tuple(SourceEntry.model_fields),
    "modules": tuple(ModuleEntry.model_fields),
}


def _raise(error: ValidationError, prefix: str) -> NoReturn:
    # A misspelt key is both unknown and missing; "unknown" can say what was meant.
    first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    cause = (first.get("ctx") or {}).get("error")
    if isinstance(cause, BadReference):
        raise RecipeError(f"{prefix}{key_path(first['loc'])}: {cause}") from None
    if isinstance(cause, RecipeError):
        raise RecipeError(f"{prefix}{cause}") from None
    where = key_path(first["loc"]) or "recipe"
    kind, value = first["type"], first.get("input")
    if kind == "extra_forbidden":
        last = first["loc"][-1]
        if last == "override_architecture":
            raise RecipeError(f"{prefix}{where}: {NO_ARCHITECTURE}") from None
        inside = [part for part in first["loc"][:-1] if part in _INNER_KEYS]
        known: Iterable[str] = _INNER_KEYS[str(inside[-1])] if inside else _TOP_KEYS
        parameters = (*CHOICES, *SWITCHES, *NUMBERS, "int8_mask", "variant")
        hint = suggest(str(last), known)
        if last in parameters:
            hint = "; it belongs under 'parameters'"
        elif not hint and (hint := suggest(str(last), parameters)):
            hint += " (under 'parameters')"
        raise RecipeError(f"{prefix}{where}: unknown key{hint}") from None
    if kind == "invalid_key" or first["loc"][-1:] == ("[key]",):
        raise RecipeError(f"{prefix}{where}: a key must be text; got {kind_of(value)}") from None
    if kind == "missing":
        raise RecipeError(f"{prefix}{where}: is required") from None
    words = _TYPE_WORDS.get(kind, str(first["msg"]))
    got = value if isinstance(value, int | float) else kind_of(value)
    raise RecipeError(f"{prefix}{where}: {words}; got {got}") from None
