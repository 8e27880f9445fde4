"""The files beside the weights: which ones an output gets, from whom, and what is patched.

Config and generation config come from the donor (the base, or the first model without one);
tokenizer and chat template from the tokenizer's donor. Only names known here are copied, so no
stale index, no pickle, no training state and no model card of another model slips into the
output. Code (``*.py``) is copied only where config.json refers to it, and never run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_fast.checkpoints.checkpoint import Checkpoint
from cl_fast.checkpoints.safetensors import strict_json
from cl_fast.errors import CheckpointError

__all__ = [
    "TORCH_NAMES",
    "Sidecar",
    "has_tokenizer",
    "patch_config",
    "plan_sidecars",
    "token_count",
]

#: safetensors name of a type -> the name that config.json uses.
TORCH_NAMES: dict[str, str] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

_MODEL_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

#: sentencepiece and tiktoken vocabularies have many names; these endings are theirs. Weights
#: that end in ``.model`` exist (``consolidated.model``): the size tells them apart.
_VOCABULARY_ENDINGS = (".model", ".tiktoken", ".spm", ".bpe.model")
_MAX_VOCABULARY_BYTES = 64_000_000


@dataclass(frozen=True, slots=True)
class Sidecar:
    """One file to write: ``content`` if given, else a byte copy of ``source``.

    ``name`` is relative to the output folder; ``nbytes`` its size.
    """

    name: str
    source: Path
    content: bytes | None
    nbytes: int


def plan_sidecars(
    donor: Checkpoint,
    tokenizer_folder: Path | None,
    dtype: str | None,
    *,
    edit: Callable[[dict[str, Any]], object] | None = None,
) -> tuple[tuple[Sidecar, ...], list[str]]:
    """List the files that an output gets beside its weights.

    Args:
        donor: gives config.json, generation and processor configs, and code that they name.
        tokenizer_folder: gives tokenizer, vocabulary and chat template; ``None``: nobody does.
        dtype: safetensors name of the type of all output tensors, ``None`` if they are mixed.
        edit: changes the content of config.json in place, beside its type.

    Returns:
        the files in the order of their names, and sentences that the user should be told.

    Raises:
        CheckpointError: a file cannot be read.
    """
    try:
        return _plan(donor, tokenizer_folder, dtype, edit)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or donor.folder}: cannot be read ({error.strerror or error})"
        ) from error


def _plan(
    donor: Checkpoint,
    tokenizer_folder: Path | None,
    dtype: str | None,
    edit: Callable[[dict[str, Any]], object] | None,
) -> tuple[tuple[Sidecar, ...], list[str]]:
    found: dict[str, Sidecar] = {}
    notes: list[str] = []
    folder = donor.folder
    if donor.config is None:
        notes.append(f"{folder} has no config.json; the output gets none")
    else:
        original = (folder / "config.json").read_bytes()
        patched = patch_config(original, dtype, str(folder / "config.json"), edit=edit)
        content = None if patched == original else patched
        found["config.json"] = Sidecar("config.json", folder / "config.json", content, len(patched))
    for name in _MODEL_FILES:
        _add(found, folder / name)
    if donor.config is not None and _refers_to_code(donor.config, folder):
        scripts = sorted(path for path in folder.iterdir() if path.suffix == ".py")
        for path in scripts:
            _add(found, path)
        if scripts:
            notes.append(
                f"config.json of {folder} names custom code; "
                f"{', '.join(path.name for path in scripts)} copied as found, never run"
            )

    if tokenizer_folder is None:
        return tuple(found[name] for name in sorted(found)), notes
    for name in _TOKENIZER_FILES:
        _add(found, tokenizer_folder / name)
    for path in sorted(tokenizer_folder.iterdir()):
        if path.name.endswith(_VOCABULARY_ENDINGS):
            if path.stat().st_size <= _MAX_VOCABULARY_BYTES:
                _add(found, path)
            else:
                notes.append(f"{path} is too large for a vocabulary and is not copied")
    templates = tokenizer_folder / "additional_chat_templates"
    if templates.is_dir():
        for path in sorted(templates.glob("*.jinja")):
            _add(found, path, f"additional_chat_templates/{path.name}")
    if not has_tokenizer(tokenizer_folder):
        notes.append(f"{tokenizer_folder} has no tokenizer; the output gets none")
    return tuple(found[name] for name in sorted(found)), notes


def patch_config(
    raw: bytes,
    dtype: str | None,
    where: str = "config.json",
    *,
    edit: Callable[[dict[str, Any]], object] | None = None,
) -> bytes:
    """Make the stored type in a config.json that of the merged weights.

    ``dtype`` and ``torch_dtype`` are patched where they stand (also in nested configs such as
    ``text_config``) if all output tensors have one type and it is another one; nothing is added.
    ``edit`` then changes the content in place.
    Returns ``raw`` itself where nothing changes, else the same JSON indented by two spaces.

    Raises:
        CheckpointError: not a JSON object.
    """
    config = strict_json(raw, where)
    if not isinstance(config, dict):
        raise CheckpointError(f"{where}: must hold a JSON object")
    before = json.dumps(config)
    if dtype in TORCH_NAMES:
        for section in (config, *(v for v in config.values() if isinstance(v, dict))):
            for key in ("dtype", "torch_dtype"):
                if isinstance(section.get(key), str):
                    section[key] = TORCH_NAMES[dtype]
    if edit is not None:
        edit(config)
    if json.dumps(config) == before:
        return raw
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer of any kind."""
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        return True
    return any(
        path.name.endswith(_VOCABULARY_ENDINGS) and path.stat().st_size <= _MAX_VOCABULARY_BYTES
        for path in folder.iterdir()
    )


def token_count(folder: Path) -> int | None:
    """One more than the highest token id in ``tokenizer.json``; ``None`` where it is not told."""
    path = folder / "tokenizer.json"
    try:
        content = strict_json(path.read_bytes(), str(path))
    except (OSError, CheckpointError):
        return None
    if not isinstance(content, dict):
        return None
    ids: list[int] = []
    model = content.get("model")
    vocabulary: Any = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        ids.extend(value for value in vocabulary.values() if type(value) is int)
    elif isinstance(vocabulary, list):
        ids.append(len(vocabulary) - 1)
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and type(token.get("id")) is int:
            ids.append(token["id"])
    return max(ids) + 1 if ids else None


def _add(found: dict[str, Sidecar], path: Path, name: str | None = None) -> None:
    if path.is_file():
        name = name or path.name
        found[name] = Sidecar(name, path, None, path.stat().st_size)


def _refers_to_code(config: dict[str, Any], folder: Path) -> bool:
    if config.get("auto_map"):
        return True
    # A tokenizer may have code of its own.
    path = folder / "tokenizer_config.json"
    try:
        return b'"auto_map"' in path.read_bytes()
    except OSError:
        return False
