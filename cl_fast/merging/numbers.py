"""The numbers of a recipe for each tensor: filters and gradients resolved.

What has no effect anywhere is an error that names its key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cl_fast.checkpoints.checkpoint import Checkpoint
from cl_fast.checkpoints.layers import LAYER, OTHER_STACKS
from cl_fast.errors import RecipeError
from cl_fast.merging.methods import Number, suggest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cl_fast.merging.recipe import Part, Recipe, Setting

__all__ = ["Numbers", "Used", "layer_depths"]


class Used:
    """What of a recipe's numbers had an effect, over all of its parts.

    Attributes:
        keys: of settings and filters that gave a value, or were asked.
        names: the tensors that they were asked for, as filters saw them.
        layered: whether a tensor had a place among layers.
    """

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.names: dict[str, None] = {}
        self.layered = False

    def check(self, recipe: Recipe) -> None:
        """Refuse settings and filters that had no effect.

        Raises:
            RecipeError: there is one; the message names its key.
        """
        names = list(self.names)
        if not names:
            return
        for setting in recipe.settings():
            if setting.key not in self.keys:
                raise RecipeError(
                    f"{setting.key}: has no effect, since every model has a {setting.name} of its "
                    "own; remove it"
                )
            for key, text in setting.filters():
                if key in self.keys:
                    continue
                if any(text in name for name in names):
                    raise RecipeError(
                        f"{key}: the filter {text!r} has no effect, since other filters or values "
                        "come before it for all of its tensors; move it up or remove it"
                    )
                raise RecipeError(
                    f"{key}: the filter {text!r} matches no tensor{_filter_hint(text, names)}"
                )
            if setting.has_gradient and not self.layered:
                raise RecipeError(
                    f"{setting.key}: a gradient runs over layers, but no tensor name of "
                    f"{recipe.parts[0].entries[0].model!r} has a layer number "
                    "('.layers.3.', '.h.3.', '.blocks.3.'); use filters"
                )


class Numbers:
    """Every number of every combined tensor of a part.

    Attributes:
        model: parameter -> tensor -> one value per model that is merged.
        whole: parameter -> tensor -> the value, of parameters that are for the whole merge.
    """

    def __init__(
        self,
        recipe: Recipe,
        part: Part,
        names: list[str],
        depths: Mapping[str, float],
        stored: Sequence[Mapping[str, str]],
        used: Used,
        notes: list[str],
        *,
        dropped: Sequence[int] = (),
    ) -> None:
        """Resolves them.

        Args:
            recipe, part: what is asked for.
            names: of the tensors.
            depths: of each tensor its depth in [0, 1].
            stored: for each model the names that its tensors have there, where it is another.
            used: told what took part.
            notes: told what is odd.
            dropped: the models that need no density, since their elements were dropped already.
        """
        self._count = len(part.entries)
        method = self._method = recipe.method
        keys = used.keys
        used.names |= dict.fromkeys(names)
        for renamed in stored:
            used.names |= dict.fromkeys(renamed.get(name, name) for name in names if renamed)
        chains = {
            parameter: [part.chain(k, parameter) for k in range(self._count)]
            for parameter in method.model_numbers
        }
        self.model: dict[str, dict[str, tuple[float, ...]]] = {
            parameter: {
                name: tuple(
                    _value(
                        chain,
                        renamed.get(name, name),
                        depths[name],
                        keys,
                        method.number(parameter),
                    )
                    for chain, renamed in zip(chains[parameter], stored, strict=True)
                )
                for name in names
            }
            for parameter in method.model_numbers
        }
        self.whole: dict[str, dict[str, float]] = {}
        for parameter in method.whole_numbers:
            chain = part.chain(None, parameter)
            number = method.number(parameter)
            self.whole[parameter] = {
                name: _value(chain, name, depths[name], keys, number) for name in names
            }
        policy = part.policy
        if not policy.difference and policy.reduce == "mean" and policy.divisor == "weights":
            self._check_sums(names, "normalize")
        if part.switches.get("normalize_weights"):
            self._check_sums(names, "normalize_weights")
        weight = self.model.get("weight", {})
        for k, entry in enumerate(part.entries):
            if weight and all(row[k] == 0.0 for row in weight.values()):
                notes.append(f"{entry.key}: the weight of {entry.model!r} is 0 in every tensor")
            if part.policy.sparsify != "none" and not chains["density"][k] and k not in dropped:
                notes.append(
                    f"{entry.key}: no density is given, so all of the delta of "
                    f"{entry.model!r} is kept"
                )

    def of_models(self, parameter: str, name: str) -> tuple[float, ...]:
        """A parameter of each model for a tensor; its default for a tensor that is copied."""
        row = self.model.get(parameter, {}).get(name)
        return row if row is not None else (self._method.number(parameter).default,) * self._count

    def of_whole(self, parameter: str, name: str) -> float:
        """A parameter of the merge for a tensor; its default for a tensor that is copied."""
        default = self._method.number(parameter).default
        return self.whole.get(parameter, {}).get(name, default)

    def _check_sums(self, names: list[str], switch: str) -> None:
        for name in names:
            total = sum(self.model["weight"][name])
            if abs(total) < 1e-8:
                raise RecipeError(
                    f"parameters.weight: the weights of tensor {name!r} sum to {total:g}, which "
                    f"cannot be normalized to a mean; set {switch}: false or change the weights"
                )


def _value(chain: Sequence[Setting], name: str, t: float, used: set[str], number: Number) -> float:
    for setting in chain:
        value = setting.evaluate(name, t, used)
        if value is not None:
            return value
    if chain and number.required:
        raise RecipeError(
            f"{chain[-1].key}: no filter matches tensor {name!r}; add a default at the end "
            "('- value: ...')"
        )
    return number.default


def _filter_hint(text: str, names: list[str]) -> str:
    parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
    hint = suggest(text.strip("."), parts)
    if hint:
        return hint
    return f"; filters are parts of names such as {names[len(names) // 2]!r}"


def layer_depths(names: list[str], reference: Checkpoint) -> tuple[dict[str, float], bool]:
    """Depth in [0, 1] of every tensor (0 outside the layers), and whether there are layers.

    Stacks (``model.layers.``, ``vision.blocks.``) count for themselves. The number of layers is
    config.json's for the main stack, else one more than the highest number in the names.
    """
    place: dict[str, tuple[str, int]] = {}
    count: dict[str, int] = {}
    size: dict[str, int] = {}
    for name in names:
        match = LAYER.search(name)
        if match is None:
            continue
        stack, layer = name[: match.start(1)], int(match[1])
        place[name] = (stack, layer)
        count[stack] = max(count.get(stack, 0), layer + 1)
        size[stack] = size.get(stack, 0) + 1
    main = [stack for stack in size if not OTHER_STACKS.search(stack)]
    if main and reference.layers is not None:
        count[max(main, key=lambda stack: size[stack])] = reference.layers
    depths = dict.fromkeys(names, 0.0)
    for name, (stack, layer) in place.items():
        last = count[stack] - 1
        depths[name] = min(1.0, layer / last) if last > 0 else 1.0
    return depths, bool(place)
