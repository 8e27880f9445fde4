"""A LoRA adapter of PEFT on disk, read without torch: what it changes, and by what.

A folder of adapter_config.json and adapter_model.safetensors. Of each adapted module it holds two
factors, A [r, in] and B [out, r], and the module's weight becomes

    W + s B A         s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

or its transpose where the weight is stored as [in, out] (embeddings, and the Conv1D of GPT-2).
Whole tensors may lie beside them: those of modules_to_save, biases that were trained
(bias: all | lora_only), and embeddings. They take the place of the base's.

Variants whose weight is not W + s B A (DoRA and others), and adapters that go on a base that their
initialisation changed (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA), are refused with what to do.

Format: https://huggingface.co/docs/peft/main/en/developer_guides/checkpoint
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_fast.checkpoints.checkpoint import Checkpoint, absolute
from cl_fast.checkpoints.patches import stored_name
from cl_fast.checkpoints.safetensors import Header, TensorInfo, read_header, strict_json
from cl_fast.errors import CheckpointError

__all__ = [
    "BASE_HASHES",
    "CONFIG_NAME",
    "PREFIX",
    "WEIGHTS_NAME",
    "AdaptedModule",
    "AdapterFile",
    "Place",
    "config_text",
    "is_adapter",
    "places",
    "read_adapter",
    "transposed",
]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE_HASHES = "cl_fast.base"
"""Key of the metadata under which adapters that cl_fast extracted name the weights they are for:
JSON, stored name -> hash as `cl_fast.checkpoints.patches` defines it."""

_FACTORS = ("F32", "BF16", "F16", "F64")
_MAX_CONFIG_BYTES = 16_000_000

#: Settings that change what the factors mean, if they are set, and their name for people.
_VARIANTS = {
    "use_dora": "DoRA, whose weight is a product of a magnitude and a direction",
    "use_qalora": "QALoRA, whose A works on pooled inputs",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA, which works from certain tokens on",
    "arrow_config": "Arrow, a router over several adapters",
    "kasa_config": "KaSA, which has singular values beside its factors",
    "monteclora_config": "MonteCLoRA, whose factors are sampled",
    "velora_config": "VeLoRA",
    "layer_replication": "LoRA on replicated layers, which the base does not store",
    "target_parameters": "LoRA on parameters of experts (target_parameters)",
    "trainable_token_indices": "LoRA with trainable tokens",
}

#: Initialisations that leave the base as it is.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "true", "false")

#: Other settings that may be set: none of them changes what the factors mean.
_HARMLESS = frozenset(
    [
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    ]
)

_ALPHA = 8
"""PEFT's own lora_alpha, where the config leaves it out."""
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<part>[AB])\.(?P<kind>weight|bias)|lora_embedding_(?P<emb>[AB]))$"
)


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """One module's factors.

    Attributes:
        name: of the module, without PEFT's prefix: model.layers.0.self_attn.q_proj.
        embedding: whether it is an embedding, whose A is [r, rows] and B is [columns, r].
        a, b: A [r, in] and B [out, r].
        scale: s.
        bias: of B, if lora_bias was set: [out].
        weight: the module's own weight, if the adapter brings it (embeddings).
    """

    name: str
    embedding: bool
    a: TensorInfo
    b: TensorInfo
    scale: float
    bias: TensorInfo | None = None
    weight: TensorInfo | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """(out, in) of B A."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def weight_name(self) -> str:
        return f"{self.name}.weight"


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """What config and header of an adapter tell. The data are not read.

    Attributes:
        path: the folder.
        header: of adapter_model.safetensors.
        config: the content of adapter_config.json.
        modules: those with factors, by name, in the order of the file.
        saved: parameter -> tensor that takes its place, e.g. "lm_head.weight".
    """

    path: Path
    header: Header
    config: dict[str, Any]
    modules: dict[str, AdaptedModule]
    saved: dict[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.header.tensors.values())

    @property
    def base_name(self) -> str | None:
        """base_model_name_or_path, if it says one."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name.strip() else None

    @property
    def fan_in_fan_out(self) -> bool:
        return bool(self.config.get("fan_in_fan_out"))

    @property
    def ranks(self) -> list[int]:
        """The ranks that occur, rising."""
        return sorted({module.rank for module in self.modules.values()})

    @property
    def words(self) -> str:
        """What it is, for people."""
        ranks = self.ranks
        rank = f"rank {ranks[0]}" if ranks[0] == ranks[-1] else f"ranks {ranks[0]} to {ranks[-1]}"
        modules = f"{len(self.modules)} module{'' if len(self.modules) == 1 else 's'}"
        count = len(self.saved)
        beside = f", {count} whole tensor{'' if count == 1 else 's'}" if count else ""
        return f"LoRA adapter ({rank} on {modules}{beside})"

    @property
    def base_hashes(self) -> dict[str, str]:
        """Hashes of the base's weights by stored name, where cl_fast wrote the adapter."""
        said = self.header.metadata.get(BASE_HASHES)
        if said is None:
            return {}
        hashes = strict_json(said.encode(), f"{self.header.path}: {BASE_HASHES}")
        if not isinstance(hashes, dict) or not all(isinstance(v, str) for v in hashes.values()):
            raise CheckpointError(f"{self.header.path}: {BASE_HASHES} must map names to hashes")
        return hashes


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether this is the folder of a PEFT adapter, and not that of a whole checkpoint."""
    folder = Path(path)
    return (folder / CONFIG_NAME).is_file() and not any(
        (folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")
    )


def read_adapter(path: str | os.PathLike[str], *, key: str | None = None) -> AdapterFile:
    """Read and check config and header of an adapter.

    Args:
        path: its folder.
        key: the recipe key that named it, for messages.

    Raises:
        CheckpointError: it is none, is damaged, its config and its tensors contradict each other,
            or it is of a kind whose weights are not W + s B A on an untouched base.
    """
    folder = absolute(os.fspath(path))
    try:
        if "://" in os.fspath(path):  # an adapter at a URL is read from its copy in the cache
            from cl_fast.checkpoints.remote import redacted

            raise CheckpointError(
                f"{redacted(os.fspath(path))}: is no adapter; give the folder of one, with "
                "adapter_config.json and adapter_model.safetensors"
            )
        return _Reader(folder).read()
    except CheckpointError as error:
        if key is None:
            raise
        raise CheckpointError(f"{key}: {error}") from None


class _Reader:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config_path = folder / CONFIG_NAME

    def read(self) -> AdapterFile:
        config = self._read_config()
        self._refuse_variants(config)
        header = self._read_header()
        modules, saved = self._sort(config, header)
        return AdapterFile(self._folder, header, config, modules, saved)

    def _wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._config_path}: {what}")

    def _read_config(self) -> dict[str, Any]:
        path = self._config_path
        if not self._folder.exists():
            raise CheckpointError(
                f"{self._folder}: there is no such folder; give the folder of an adapter, with "
                f"{CONFIG_NAME} and {WEIGHTS_NAME}"
            )
        if not path.is_file():
            raise CheckpointError(
                f"{self._folder}: holds no {CONFIG_NAME}, so it is no adapter of PEFT; give the "
                "folder that save_pretrained wrote"
            )
        try:
            if path.stat().st_size > _MAX_CONFIG_BYTES:
                raise self._wrong("is too large for the config of an adapter")
            config = strict_json(path.read_bytes(), str(path))
        except OSError as error:
            raise self._wrong(f"cannot be read ({error.strerror or error})") from error
        if not isinstance(config, dict):
            raise self._wrong("must be a JSON object")
        return config

    def _refuse_variants(self, config: Mapping[str, Any]) -> None:
        kind = config.get("peft_type")
        if kind != "LORA":
            raise self._wrong(
                f"peft_type is {kind!r}; adapters of the type LORA are understood. Merge this one "
                "into its base with PEFT (merge_and_unload) and give the merged checkpoint"
            )
        for name, words in _VARIANTS.items():
            if config.get(name):
                raise self._wrong(
                    f"{name} is set: {words}. It is not W + s B A; merge it into its base with "
                    "PEFT (merge_and_unload), if PEFT can, and give the merged checkpoint"
                )
        start = config.get("init_lora_weights")
        plain = start.lower() in _PLAIN_STARTS if isinstance(start, str) else start in _PLAIN_STARTS
        if not plain:
            raise self._wrong(
                f"init_lora_weights is {start!r}, which changed the base before the training: the "
                "factors go on that changed base. Save the adapter as plain LoRA first "
                "(save_pretrained(..., path_initial_model_for_weight_conversion=...)), or merge it "
                "with PEFT and give the merged checkpoint"
            )
        unknown = [
            name
            for name, value in config.items()
            if value and name not in _HARMLESS and name not in _VARIANTS
        ]
        if unknown:
            raise self._wrong(
                f"the setting {min(unknown)!r} is not known here, and may change what the factors "
                "mean; merge the adapter with PEFT and give the merged checkpoint"
            )

    def _read_header(self) -> Header:
        path = self._folder / WEIGHTS_NAME
        if not path.exists():
            pickle = self._folder / "adapter_model.bin"
            if pickle.exists():
                raise CheckpointError(
                    f"{pickle}: is a pickle, which can run any code and is not opened; load the "
                    "adapter with PEFT and save it again (save_pretrained writes safetensors)"
                )
            raise CheckpointError(f"{self._folder}: holds {CONFIG_NAME} but no {WEIGHTS_NAME}")
        return read_header(path)

    def _sort(
        self, config: Mapping[str, Any], header: Header
    ) -> tuple[dict[str, AdaptedModule], dict[str, TensorInfo]]:
        parts: dict[str, dict[str, TensorInfo]] = {}
        saved: dict[str, TensorInfo] = {}
        for name, info in header.tensors.items():
            short = name.removeprefix(PREFIX)
            match = _FACTOR.match(short)
            if match is not None:
                part = f"embedding_{match['emb']}" if match["emb"] else match["part"]
                part += ".bias" if match["kind"] == "bias" else ""
                parts.setdefault(match["module"], {})[part] = info
            elif ".lora_" in short or "token_adapter" in short:
                raise CheckpointError(
                    f"{header.path}: tensor {name!r} belongs to a variant of LoRA that is not "
                    "W + s B A; merge the adapter with PEFT and give the merged checkpoint"
                )
            else:
                plain = short.replace(".base_layer.", ".")
                if plain in saved:
                    raise CheckpointError(f"{header.path}: {plain!r} is there twice")
                saved[plain] = info
        if not parts:
            raise CheckpointError(f"{header.path}: holds no factors of LoRA")
        numbers = _Numbers(self._config_path, config)
        modules = {}
        for name, found in parts.items():
            modules[name] = self._module(name, found, saved.pop(f"{name}.weight", None), numbers)
        return modules, saved

    def _module(
        self,
        name: str,
        found: Mapping[str, TensorInfo],
        weight: TensorInfo | None,
        numbers: _Numbers,
    ) -> AdaptedModule:
        where = f"{self._folder / WEIGHTS_NAME}: module {name!r}"
        embedding = any(part.startswith("embedding") for part in found)
        first, second = ("embedding_A", "embedding_B") if embedding else ("A", "B")
        extra = set(found) - {first, second, "B.bias"}
        if first not in found or second not in found or extra:
            raise CheckpointError(
                f"{where}: has {', '.join(sorted(found))} of {first} and {second}; the adapter is "
                "damaged, save it again"
            )
        a, b, bias = found[first], found[second], found.get("B.bias")
        for info in (a, b, *((bias,) if bias else ())):
            if info.dtype not in _FACTORS:
                raise CheckpointError(
                    f"{where}: a factor is {info.dtype}; factors of {', '.join(_FACTORS)} are "
                    "understood, save the adapter in one of them"
                )
        if len(a.shape) != 2 or len(b.shape) != 2:
            raise CheckpointError(
                f"{where}: its factors have the shapes {list(a.shape)} and {list(b.shape)}; LoRA "
                "on convolutions is not understood, merge the adapter with PEFT"
            )
        if a.shape[0] != b.shape[1]:
            raise CheckpointError(
                f"{where}: A {list(a.shape)} and B {list(b.shape)} have no common rank"
            )
        rank, scale = numbers.of(name)
        if a.shape[0] != rank:
            raise CheckpointError(
                f"{where}: has the rank {a.shape[0]}, {CONFIG_NAME} says {rank}; config and "
                "weights are of two adapters"
            )
        if bias is not None and bias.shape != (b.shape[0],):
            raise CheckpointError(
                f"{where}: the bias has the shape {list(bias.shape)}, not {[b.shape[0]]}"
            )
        return AdaptedModule(name, embedding, a, b, scale, bias, weight)


class _Numbers:
    """Rank and scale of a module, as config and its patterns say."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self._path = path
        self._rank = self._whole("r", config.get("r"))
        self._alpha = self._number("lora_alpha", config.get("lora_alpha", _ALPHA))
        self._root = bool(config.get("use_rslora"))
        self._ranks = self._pattern("rank_pattern", config, self._whole)
        self._alphas = self._pattern("alpha_pattern", config, self._number)

    def of(self, module: str) -> tuple[int, float]:
        rank = self._match(self._ranks, module, self._rank)
        alpha = self._match(self._alphas, module, self._alpha)
        return rank, alpha / (math.sqrt(rank) if self._root else rank)

    def _whole(self, key: str, value: Any) -> int:
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"{self._path}: {key}: must be a whole number from 1; got {value!r}"
            )
        return value

    def _number(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{self._path}: {key}: must be a number; got {value!r}")
        return float(value)

    def _pattern(self, key: str, config: Mapping[str, Any], check: Any) -> list[tuple[Any, Any]]:
        given = config.get(key) or {}
        if not isinstance(given, dict):
            raise CheckpointError(f"{self._path}: {key}: must map patterns to numbers")
        patterns = []
        for text, value in given.items():
            try:
                pattern = re.compile(rf"(.*\.)?({text})$")
            except re.error as error:
                raise CheckpointError(
                    f"{self._path}: {key}: {text!r} is no regular expression ({error})"
                ) from None
            patterns.append((pattern, check(f"{key}.{text}", value)))
        return patterns

    @staticmethod
    def _match(patterns: list[tuple[Any, Any]], module: str, default: Any) -> Any:
        return next((value for pattern, value in patterns if pattern.match(module)), default)


# On a base.


@dataclass(frozen=True, slots=True)
class Place:
    """Where an adapter's module lies in a base.

    name: of the stored weight. transposed: whether that is [in, out]. bias: the stored bias that
    the bias of B is added to.
    """

    name: str
    module: AdaptedModule
    transposed: bool
    bias: str | None


def transposed(base: Checkpoint, module: str) -> bool:
    """Whether the base is known to store this module's weight as [in, out] (Conv1D)."""
    kind = (base.config or {}).get("model_type")
    return kind in _CONV1D_MODELS and module.rsplit(".", 1)[-1] in _CONV1D_NAMES


def places(adapter: AdapterFile, base: Checkpoint) -> tuple[list[Place], dict[str, TensorInfo]]:
    """The stored weights that the modules are for, and those that whole tensors replace.

    Raises:
        CheckpointError: the base lacks one, or has it in another shape or a type that is no float
            of 16 bits or more: the adapter is for another base.
    """
    where = f"{adapter.path}"
    found: list[Place] = []
    for module in adapter.modules.values():
        name = _find(where, "adapts", module.weight_name, base)
        out, inner = module.size
        stored = base.tensors[name]
        if stored.dtype not in ("F32", "BF16", "F16"):
            raise CheckpointError(
                f"{where} adapts {name!r}, which {stored.path} stores as {stored.dtype}; an "
                "adapter goes on weights of F32, BF16 or F16: convert the checkpoint first"
            )
        straight, flipped = stored.shape == (out, inner), stored.shape == (inner, out)
        if not (flipped if module.embedding else straight or flipped):
            wanted = [inner, out] if module.embedding else [out, inner]
            raise CheckpointError(
                f"{where} adapts {name!r} as a weight of {wanted}, in {base.path} it has "
                f"{list(stored.shape)}; the adapter is for another base"
                + (f" ({adapter.base_name})" if adapter.base_name else "")
            )
        if module.weight is not None and module.weight.shape != stored.shape:
            raise CheckpointError(
                f"{where} brings {name!r} with the shape {list(module.weight.shape)}, in "
                f"{base.path} it has {list(stored.shape)}: the vocabulary was resized before the "
                "training; resize the base likewise first"
            )
        flip = module.embedding or (flipped and not straight)
        if straight and flipped and not module.embedding:
            # PEFT corrects the setting while it adds modules, so the last one decides it.
            flip = adapter.fan_in_fan_out or transposed(base, module.name)
        bias = None
        if module.bias is not None:
            bias = _find(where, "adds to", f"{module.name}.bias", base)
            if base.tensors[bias].shape != module.bias.shape:
                raise CheckpointError(
                    f"{where} adds to {bias!r} a bias of {list(module.bias.shape)}, in "
                    f"{base.path} it has {list(base.tensors[bias].shape)}"
                )
        found.append(Place(name, module, flip, bias))
    replaced = {}
    for name, info in adapter.saved.items():
        stored = base.tensors[_find(where, "replaces", name, base)]
        if stored.shape != info.shape:
            raise CheckpointError(
                f"{where} replaces {stored.name!r} by a tensor of {list(info.shape)}, in "
                f"{base.path} it has {list(stored.shape)}; the adapter is for another base, or "
                "the vocabulary was resized before the training: resize the base likewise first"
            )
        replaced[stored.name] = info
    return found, replaced


def _find(where: str, does: str, name: str, base: Checkpoint) -> str:
    stored = stored_name(name, base.tensors)
    if stored is not None:
        return stored
    close = difflib.get_close_matches(name, list(base.tensors), 1, 0.0)
    tied = ""
    if base.tied and name.endswith("lm_head.weight"):
        tied = "; it is tied to the embeddings there: untie and save the base first"
    raise CheckpointError(
        f"{where} {does} {name!r}, which {base.path} does not have"
        + (f" (it has {close[0]!r})" if close and not tied else "")
        + (tied or "; the adapter is for another base")
    )


def config_text(config: Mapping[str, Any]) -> bytes:
    """The bytes of an adapter_config.json."""
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
