"""An input checkpoint: its tensors by name, its config, and where every byte lies.

:meth:`Checkpoint.open` takes what people have on disk (a Hugging Face folder with one or many
safetensors files, or a ``.safetensors`` file), reads the headers only, and refuses with an
explanation what cannot be merged: pickles (never executed), adapters, quantised weights, hub ids
that are not downloaded.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from cl_fast.checkpoints.safetensors import Header, TensorInfo, read_header, strict_json
from cl_fast.errors import CheckpointError

__all__ = ["INDEX_NAME", "SINGLE_NAME", "Checkpoint", "absolute"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD = re.compile(r".*-\d{5}-of-(\d{5})\.safetensors$")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?$")
_SCALE = re.compile(r"(_scale|_scale_inv|\.scale|\.scales|_scales)$")
_QUANTISED = re.compile(
    r"(\.qweight|\.qzeros|\.g_idx|\.absmax|\.quant_map|\.weight_packed|_blocks"
    r"|quant_state\.[\w.]+)$"
)

#: No JSON beside the weights comes near this; a bound keeps a wrong file from filling memory.
_MAX_JSON_BYTES = 256_000_000


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The headers of one checkpoint. Immutable; no file stays open.

    Attributes:
        reference: as the user wrote it.
        path: the folder, or the one file, as an absolute path (symbolic links kept). Of a remote
            checkpoint the local folder with all but its weights.
        files: the weight files with their checked headers, in the order of their names.
        tensors: every tensor by name.
        config: the content of config.json; ``None`` where there is none.
    """

    reference: str
    path: Path
    files: tuple[Header, ...]
    tensors: dict[str, TensorInfo]
    config: dict[str, Any] | None

    @property
    def folder(self) -> Path:
        """The folder that config and tokenizer are looked for in."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def tokenizer_files(self) -> Mapping[str, bytes]:
        """Files of its tokenizer that stand for those in ``folder``."""
        return {}

    @property
    def place(self) -> str:
        """Where it is: the path, or the URL of a remote one."""
        return self.reference if "://" in self.reference else str(self.path)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @classmethod
    def open(cls, reference: str | os.PathLike[str], *, key: str | None = None) -> Checkpoint:
        """Read the headers of a checkpoint folder or a safetensors file.

        Args:
            reference: a path (``~`` is expanded, relative paths start at the working directory), or
                a URL, see :mod:`cl_fast.checkpoints.remote`.
            key: the recipe key that named it (``models[1].model``), for messages.

        Raises:
            CheckpointError: nothing there, not a checkpoint, or damaged; the message says what
                to do.
        """
        written = os.fspath(reference)
        prefix = f"{key}: " if key else ""
        if not isinstance(written, str) or not written.strip() or "\0" in written:
            raise CheckpointError(f"{prefix}{written!r} is not a path")
        if "://" in written:
            from cl_fast.checkpoints.remote import open_checkpoint

            return open_checkpoint(written, key=key)
        path = absolute(written)
        try:
            if path.is_dir():
                files = _weight_files(path, prefix)
            elif path.exists():
                files = _single_file(path, prefix)
            else:
                raise CheckpointError(f"{prefix}{_why_missing(written, path)}")
        except OSError as error:
            raise CheckpointError(
                f"{prefix}{path}: cannot be read ({error.strerror or error})"
            ) from error
        headers, tensors = files
        folder = path if path.is_dir() else path.parent
        return cls(written, path, headers, tensors, _read_object(folder / "config.json"))

    def refuse_quantised(self) -> None:
        """Refuse weights that are codes of a quantisation and not numbers to be averaged.

        Raises:
            CheckpointError: config.json has a ``quantization_config``, or there are tensors that
                only quantised checkpoints have (packed weights, scales of 8-bit floats).
        """
        config = self.config or {}
        for section in (config, *(v for v in config.values() if isinstance(v, dict))):
            settings = section.get("quantization_config") or section.get("compression_config")
            if settings:
                method = settings.get("quant_method") if isinstance(settings, dict) else None
                raise CheckpointError(
                    f"{self.folder / 'config.json'}: the checkpoint is quantised"
                    f"{f' ({method})' if method else ''}; merge the unquantised weights and "
                    "quantise the result"
                )
        narrow = next((t for t in self.tensors.values() if t.dtype in _NARROW), None)
        for info in self.tensors.values():
            packed = _QUANTISED.search(info.name) and info.dtype in ("U8", "I8", "I32", "U32")
            scale = _SCALE.search(info.name) and narrow is not None
            if packed or scale or info.dtype in ("F8_E8M0", "F4", "F6_E2M3", "F6_E3M2"):
                kind = "a scale" if scale else f"{info.dtype} codes"
                raise CheckpointError(
                    f"{info.path}: tensor {info.name!r} holds {kind} of a quantised checkpoint, "
                    "so its stored values are not the weights; convert the checkpoint to "
                    "bfloat16 first and merge that"
                )

    @property
    def layers(self) -> int | None:
        """The number of layers that config.json tells, or ``None``."""
        for section in self._config_sections():
            for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
                value = section.get(name)
                if type(value) is int and value > 0:
                    return value
        return None

    @property
    def vocab_size(self) -> int | None:
        """The vocabulary size that config.json tells, or ``None``."""
        for section in self._config_sections():
            value = section.get("vocab_size")
            if type(value) is int:
                return value
        return None

    @property
    def tied(self) -> bool | None:
        """``tie_word_embeddings`` of config.json, or ``None`` where it does not say."""
        for section in self._config_sections():
            value = section.get("tie_word_embeddings")
            if isinstance(value, bool):
                return value
        return None

    def _config_sections(self) -> list[dict[str, Any]]:
        config = self.config or {}
        nested = config.get("text_config")
        return [config, nested] if isinstance(nested, dict) else [config]


def absolute(reference: str) -> Path:
    """The absolute path that a reference means: ``~`` expanded, symbolic links kept."""
    path = Path(reference)
    with contextlib.suppress(RuntimeError):  # "~name" of nobody is a folder of that name
        path = path.expanduser()
    return Path(os.path.abspath(path))  # noqa: PTH100 (resolve would follow links)


_NARROW = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8")

_Files = tuple[tuple[Header, ...], dict[str, TensorInfo]]


def _weight_files(folder: Path, prefix: str) -> _Files:
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if index.exists():
        weight_map = _weight_map(index)
        if single.exists() and SINGLE_NAME not in weight_map.values():
            raise CheckpointError(
                f"{prefix}{folder} holds both {SINGLE_NAME} and {INDEX_NAME}, which are two "
                "checkpoints; remove the stale one"
            )
        return _sharded(folder, index, weight_map)
    names = sorted(entry.name for entry in folder.iterdir())
    weights = [name for name in names if name.endswith(".safetensors")]
    if single.exists():
        return _one(single)
    if "adapter_config.json" in names or weights == ["adapter_model.safetensors"]:
        raise CheckpointError(
            f"{prefix}{folder} holds an adapter (LoRA), not a whole checkpoint; in a recipe name "
            "it as a model beside its base_model, or as BASE+ADAPTER"
        )
    if len(weights) == 1 and not _SHARD.match(weights[0]):
        return _one(folder / weights[0])
    if weights:
        raise CheckpointError(
            f"{prefix}{folder} holds {len(weights)} safetensors files ({_some(weights)}) but no "
            f"{INDEX_NAME}; download the index too, or name one file"
        )
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise CheckpointError(f"{prefix}{_pickle_words(folder, pickles[0])}")
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        raise CheckpointError(
            f"{prefix}{folder / gguf[0]} is GGUF (quantised, for inference); merge the original "
            "safetensors checkpoint and convert the result"
        )
    raise CheckpointError(
        f"{prefix}{folder} holds no weights: neither {SINGLE_NAME} nor {INDEX_NAME}"
    )


def _single_file(path: Path, prefix: str) -> _Files:
    if path.name == INDEX_NAME:
        raise CheckpointError(f"{prefix}{path} is an index; give its folder: {path.parent}")
    if path.name.endswith(_PICKLES):
        raise CheckpointError(f"{prefix}{_pickle_words(path.parent, path.name)}")
    if path.suffix in (".yml", ".yaml"):
        raise CheckpointError(
            f"{prefix}{path} is a recipe, not a checkpoint; run that merge first and give its "
            "output folder"
        )
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{prefix}{path} is neither a checkpoint folder nor a .safetensors file"
        )
    shard = _SHARD.match(path.name)
    if shard and int(shard[1]) > 1:
        raise CheckpointError(
            f"{prefix}{path} is one shard of {int(shard[1])}; give its folder: {path.parent}"
        )
    return _one(path)


def _one(path: Path) -> _Files:
    header = read_header(path)
    return (header,), header.tensors


def _sharded(folder: Path, index: Path, weight_map: dict[str, str]) -> _Files:
    headers: list[Header] = []
    tensors: dict[str, TensorInfo] = {}
    for filename in sorted(set(weight_map.values())):
        path = folder / filename
        if not path.exists():
            example = next(name for name, file in weight_map.items() if file == filename)
            raise CheckpointError(
                f"{index}: names the file {filename!r} (for tensor {example!r}), which is absent "
                f"from {folder}; download it"
            )
        header = read_header(path)
        headers.append(header)
        for name, info in header.tensors.items():
            said = weight_map.get(name)
            if said != filename:
                where = f"says it is in {said!r}" if said is not None else "does not know it"
                raise CheckpointError(
                    f"{path}: holds tensor {name!r}, but {index} {where}; the index and the "
                    "files are of different checkpoints, download both again"
                )
            tensors[name] = info
    for name, filename in weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"{index}: says that tensor {name!r} is in {filename!r}, which does not hold it; "
                "the index and the files are of different checkpoints, download both again"
            )
    return tuple(headers), tensors


def _weight_map(index: Path) -> dict[str, str]:
    content = _read_object(index)
    weight_map = (content or {}).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: has no object 'weight_map'; download it again")
    if not weight_map:
        raise CheckpointError(f"{index}: its weight_map is empty; download it again")
    checked: set[str] = set()
    for name, filename in weight_map.items():
        if not isinstance(filename, str):
            raise CheckpointError(
                f"{index}: weight_map of tensor {name!r} must be a file name; got {filename!r}"
            )
        if filename not in checked:
            _check_inside(index, name, filename)
            checked.add(filename)
    return weight_map


def _check_inside(index: Path, name: str, filename: str) -> None:
    """Only names below the folder; links are followed (the hub's cache consists of them)."""
    parts = PurePosixPath(filename).parts
    windows = PureWindowsPath(filename)
    if (
        not parts
        or "\0" in filename
        or "\\" in filename
        or windows.drive
        or windows.root
        or ".." in parts
        or filename.startswith("/")
    ):
        raise CheckpointError(
            f"{index}: weight_map of tensor {name!r} names {filename!r}, which is not inside the "
            "checkpoint's folder; refused"
        )
    if not filename.endswith(".safetensors"):
        raise CheckpointError(
            f"{index}: weight_map of tensor {name!r} names {filename!r}, which is not a "
            ".safetensors file"
        )


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        if not path.exists():
            return None
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes are no JSON to be read")
        content = strict_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return content


def _pickle_words(folder: Path, name: str) -> str:
    return (
        f"{folder / name} is a pickle, which could run any code when opened, so it is never "
        "opened here; convert it where you trust it: "
        f'python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder}').save_pretrained('{folder.name}-safetensors')\""
    )


def _why_missing(written: str, path: Path) -> str:
    if "+" in written and absolute(written.split("+", 1)[0]).exists():
        return (
            f"{written!r} asks for a base with an adapter, but {written.split('+', 1)[1]!r} is no "
            "folder of an adapter (adapter_config.json and adapter_model.safetensors)"
        )
    if path.parent.is_dir() and written.startswith((".", "/", "~")):
        return f"{path} does not exist"
    if _HUB_ID.match(written):
        name = written.split("@")[0]
        return (
            f"{written!r} is not a folder here. If it is a model of the Hugging Face hub, "
            f"download it first (hf download {name} --local-dir {name.split('/')[1]}) and give "
            "that folder"
        )
    return f"{path} does not exist"


def _some(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
