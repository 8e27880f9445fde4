"""The layers of a checkpoint, found from the names of its tensors.

    model.layers.7.mlp.up_proj.weight   =  stack "model.layers.", layer 7, ".mlp.up_proj.weight"

A **stack** is a run of numbered layers. Most checkpoints have one, and all other tensors stand
before it (embeddings) or after it (final norm, head). A model with several stacks is taken apart
into **modules**, under the names that recipes use: the text decoder, a vision tower, an encoder
and a decoder, and the projector between them. No table of architectures is needed, and a tensor
that no table knows is not lost.

Sources: the conventions of Hugging Face checkpoints, as `AutoModel.save_pretrained` writes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "LAYER",
    "OTHER_STACKS",
    "Module",
    "find_module",
    "find_modules",
    "layer_counts",
    "set_layers",
]

#: The number of a layer in a tensor's name; the first one counts (experts have numbers too).
LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)(?=\.|$)")

#: Stacks that are not those of the text.
OTHER_STACKS = re.compile(r"(vis|audio|image|speech)")

_VISION = re.compile(r"(^|[._])(vis|image|img|vit)")
_AUDIO = re.compile(r"(^|[._])(audio|speech)")
_PROJECTOR = re.compile(
    r"(^|\.)(multi_?modal_projector|mm_projector|projector|merger|deepstack_merger_list"
    r"|connector|aligner|embed_vision|embed_audio)\."
)
#: What stands before the layers. Everything else that has no layer stands after them.
_BEFORE = re.compile(
    r"(^|\.)(\w*embed(?!_out)\w*|wte|wpe|embd|emb|shared|relative_pe|rotary_\w+|rope\w*|conv\d"
    r"|patch_conv|ln_pre|layernorm_pre|pre_layer?norm|pre_layrnorm)(\.|$)"
)
_CONTAINER = re.compile(r"\.?(layers|layer|h|blocks|block)\.$")
_NAMES_OF_TEXT = ("text_decoder", "default", "language_model")
_NAMES_OF_VISION = ("vision_tower", "vision_model", "visual")


@dataclass(frozen=True, slots=True)
class Module:
    """One stack of layers with what belongs to it.

    Attributes:
        name: as a recipe calls it; "default" where a model has one module only.
        aliases: other words for it.
        stack: what stands before the layer's number, as "model.layers."; empty without layers.
        layers: of each layer the rest of its tensors' names, as ".mlp.up_proj.weight".
        pre: whole names of the tensors before the layers. post: of those after them.
    """

    name: str
    aliases: tuple[str, ...]
    stack: str
    layers: tuple[tuple[str, ...], ...]
    pre: tuple[str, ...]
    post: tuple[str, ...]

    def tensor(self, layer: int, rest: str) -> str:
        """The whole name of a layer's tensor."""
        return f"{self.stack}{layer}{rest}"


def find_modules(names: Iterable[str]) -> tuple[Module, ...]:
    """Take a checkpoint apart by the names of its tensors.

    Returns:
        the modules, that of the text first; every name is in exactly one of them. A checkpoint
        without layers is one module.
    """
    stacks: dict[str, dict[int, list[str]]] = {}
    loose: list[str] = []
    for name in names:
        match = LAYER.search(name)
        if match is None:
            loose.append(name)
        else:
            stack = stacks.setdefault(name[: match.start(1)], {})
            stack.setdefault(int(match[1]), []).append(name[match.end(1) :])
    if len(stacks) <= 1:
        [stack_name] = stacks or [""]
        return (_module("default", _NAMES_OF_TEXT, stack_name, stacks.get(stack_name, {}), loose),)

    titles = _titles(stacks)
    belongs: dict[str, list[str]] = {stack: [] for stack in stacks}
    others: dict[str, list[str]] = {}
    main = next(iter(titles))
    paired = {"encoder", "decoder"} <= {title for title, _ in titles.values()}
    for name in loose:
        if _PROJECTOR.search(name):
            others.setdefault("multi_modal_projector", []).append(name)
            continue
        owner = _owner(name, titles)
        if owner is None and paired:
            others.setdefault("shared", []).append(name)
        else:
            belongs[owner or main].append(name)
    found = [
        _module(title, aliases, stack, stacks[stack], belongs[stack])
        for stack, (title, aliases) in titles.items()
    ]
    found += [_module(title, (), "", {}, rest) for title, rest in others.items()]
    return tuple(found)


def _module(
    name: str,
    aliases: Sequence[str],
    stack: str,
    layers: Mapping[int, list[str]],
    loose: Sequence[str],
) -> Module:
    count = max(layers, default=-1) + 1
    pre = tuple(name for name in loose if _BEFORE.search(name))
    return Module(
        name=name,
        aliases=tuple(word for word in (*aliases, _CONTAINER.sub("", stack)) if word != name),
        stack=stack,
        layers=tuple(tuple(layers.get(i, ())) for i in range(count)),
        pre=pre,
        post=tuple(name for name in loose if not _BEFORE.search(name)),
    )


def _titles(stacks: Mapping[str, Any]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Stack -> its module's name and aliases; text first, the largest first."""

    def kind(stack: str) -> int:
        return 1 if _VISION.search(stack) else 2 if _AUDIO.search(stack) else 0

    def size(stack: str) -> int:
        return sum(map(len, stacks[stack].values()))

    ordered = sorted(stacks, key=lambda stack: (kind(stack), -size(stack), stack))
    text = [stack for stack in ordered if kind(stack) == 0]
    words = {stack: set(re.split(r"[._]", stack)) for stack in ordered}
    titles: dict[str, tuple[str, tuple[str, ...]]] = {}
    taken = set[str]()
    both = any("encoder" in words[s] for s in text) and any("decoder" in words[s] for s in text)
    for stack in ordered:
        alone = sum(kind(other) == kind(stack) for other in ordered) == 1
        aliases: tuple[str, ...] = ()
        if kind(stack) == 0 and both and words[stack] & {"encoder", "decoder"}:
            title = "decoder" if "decoder" in words[stack] else "encoder"
        elif kind(stack) == 0 and (alone or not taken):
            title, aliases = _NAMES_OF_TEXT[0], _NAMES_OF_TEXT[1:]
        elif kind(stack) == 1 and alone:
            title, aliases = _NAMES_OF_VISION[0], _NAMES_OF_VISION[1:]
        elif kind(stack) == 2 and alone:
            title = "audio_tower"
        else:
            title = _CONTAINER.sub("", stack)
        if title in taken:
            title = stack.rstrip(".")
        taken.add(title)
        titles[stack] = title, aliases
    return titles


def _owner(name: str, titles: Mapping[str, object]) -> str | None:
    """The stack that shares the longest beginning with a name, if that tells it from others."""
    parts = name.split(".")

    def shared(stack: str) -> int:
        count = 0
        for left, right in zip(parts, stack.split("."), strict=False):
            if left != right:
                break
            count += 1
        return count

    depths = {stack: shared(stack) for stack in titles}
    best = max(depths.values())
    owners = [stack for stack, depth in depths.items() if depth == best]
    return owners[0] if best and len(owners) == 1 else None


def find_module(modules: Sequence[Module], name: str) -> Module | None:
    """The module that a recipe means by a name."""
    for module in modules:
        if module.name == name:
            return module
    for module in modules:
        if name in module.aliases or (module.stack and name == module.stack.rstrip(".")):
            return module
    return None


# config.json

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "layers")
_COUNTS_OF_ENCODER = ("encoder_layers", "n_encoder_layers", "num_encoder_layers", *_COUNTS[:4])
_COUNTS_OF_DECODER = ("decoder_layers", "n_decoder_layers", "num_decoder_layers")
_TEXT_SECTIONS = ("text_config", "llm_config", "language_config")
#: Lists with one entry for each layer have such a word in their name.
_PER_LAYER = re.compile(
    r"(layer|block|pattern|per_layer|intermediate_size|heads|multipliers|sparsity|window)"
)
#: Lists of the numbers of those layers that are of some kind.
_INDICES = re.compile(
    r"(mlp_only_layers|attn_layer_indices|full_attn_idxs|full_attention_idxs|moe_layers"
    r"|cross_attention_layers|attention_layers_idx|fullatt_block_indexes|global_attn_indexes"
    r"|deepstack_visual_indexes|kv_layers|attn_layer_idx)$"
)


def _sections(config: Mapping[str, Any], module: Module) -> list[tuple[str, ...]]:
    """Where config.json speaks of a module."""
    if _VISION.search(module.stack) and module.name != "default":
        return [(k,) for k in config if _VISION.search(k) and isinstance(config[k], dict)]
    if _AUDIO.search(module.stack) and module.name != "default":
        return [(k,) for k in config if _AUDIO.search(k) and isinstance(config[k], dict)]
    nested = [(k,) for k in _TEXT_SECTIONS if isinstance(config.get(k), dict)]
    return [(), *nested]


def _section(config: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        config = config.get(key) if isinstance(config, dict) else None
    return config if isinstance(config, dict) else None


def layer_counts(config: Mapping[str, Any], module: Module) -> list[tuple[tuple[str, ...], int]]:
    """Where config.json tells the number of a module's layers: places and values."""
    words = {"encoder": _COUNTS_OF_ENCODER, "decoder": _COUNTS_OF_DECODER}.get(module.name, _COUNTS)
    found = []
    for path in _sections(config, module):
        section = _section(config, path)
        for word in words:
            value = section.get(word)
            if type(value) is int and value > 0:
                found.append(((*path, word), value))
    return found


def set_layers(
    config: dict[str, Any],
    module: Module,
    layers: Sequence[tuple[Mapping[str, Any] | None, int]],
    where: str,
) -> list[str]:
    """Make a config speak of other layers.

    The number of layers is set wherever it stands. A list that has an entry for each layer
    (`layer_types`) gets the entries of the new layers, each from the config of the model that the
    layer comes from; a list of layers' numbers (`mlp_only_layers`) gets the new numbers. All other
    values stay, and a list that one of the models has not is left out.

    Args:
        config: of the donor; changed.
        module: whose layers change, as the donor has it.
        layers: for each new layer the config and the number of the layer that it comes from.
        where: the file that the config was read from, for messages.

    Returns:
        sentences that the user should be told.
    """
    notes = list[str]()
    counts = layer_counts(config, module)
    if not counts and len(layers) != len(module.layers):
        notes.append(
            f"{where} does not tell the number of layers of {module.name}; the output has "
            f"{len(layers)}"
        )
    old = {value for _, value in counts} or {len(module.layers)}
    for path, _ in counts:
        _section(config, path[:-1])[path[-1]] = len(layers)
    for path in _sections(config, module):
        section = _section(config, path)
        for key, value in list(section.items()):
            if isinstance(value, list) and _INDICES.search(key):
                if all(type(item) is int for item in value):
                    section[key] = [
                        new
                        for new, (theirs, layer) in enumerate(layers)
                        if layer in ((_section(theirs, path) or {}).get(key) or ())
                    ]
            elif isinstance(value, list | str) and len(value) in old and _PER_LAYER.search(key):
                if isinstance(value, str) and not key.endswith("pattern"):
                    continue
                lists: list[Any] = [(_section(theirs, path) or {}).get(key) for theirs, _ in layers]
                if all(
                    isinstance(entries, type(value)) and layer < len(entries)
                    for entries, (_, layer) in zip(lists, layers, strict=True)
                ):
                    new = [entries[i] for entries, (_, i) in zip(lists, layers, strict=True)]
                    section[key] = "".join(new) if isinstance(value, str) else new
                    continue
                del section[key]
                notes.append(
                    f"{'.'.join((*path, key))} is left out of config.json: it has an entry for "
                    "each layer, but one of the models has no such list; loading takes its default"
                )
    return notes
