"""What a stream of tasks has on disk, so that the same call goes on where it was cut off.

    out/stream.json                what the run is made of, and what is done
    out/tasks/00-name/state.safetensors   the tensors that differ from those of the start
    out/tasks/00-name/keeps.pt     the states of the keeps after the task
    out/tasks/00-name/checkpoints/ those of the Trainer, while the task is trained

Each file is written under another name and renamed when it is whole; `stream.json` names a task as
trained only when its files are there. So whatever a kill leaves is either whole or not looked at.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cl_fast.errors import CheckpointError, OutputError

__all__ = ["Ledger", "content_hash", "digests", "load_tensors", "named", "save_tensors"]

FORMAT, VERSION = "cl_fast.stream", 1
_LOOKED_AT = 512


class Ledger:
    """The file stream.json.

    Attributes:
        identity: what must not differ when the run is resumed: flat, a word for each key.
        trained: names of the tasks whose training is finished.
        scores: for "before" and each task that was evaluated after its training: all scores.
        seconds: of training, per task.
        merged: what the merge gave, once it is done.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.out = out
        self.identity = {key: _plain(value) for key, value in identity.items()}
        self.trained: list[str] = []
        self.scores: dict[str, dict[str, float | None]] = {}
        self.seconds: dict[str, float] = {}
        self.merged: dict[str, Any] = {}

    @property
    def path(self) -> Path:
        return self.out / "stream.json"

    def read(self) -> bool:
        """Take up what an earlier call left; False where it has done nothing.

        Tasks may have been added after the last one.

        Raises:
            CheckpointError: the folder is of another run: the differing key is named.
            OutputError: it holds something else.
        """
        if not self.path.is_file():
            strange = [p.name for p in self.out.iterdir()] if self.out.is_dir() else []
            strange = [name for name in strange if not name.endswith(".part")]
            if strange:
                raise OutputError(
                    f"out={self.out} is not empty ({sorted(strange)[0]}) and holds no run of "
                    "learn; choose another folder"
                )
            return False
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if (content["format"], content["version"]) != (FORMAT, VERSION):
                raise ValueError(f"format {content['format']!r} version {content['version']!r}")
            saved = content["identity"]
            trained, scores = list(content["trained"]), dict(content["scores"])
            if not trained and not scores:
                return False  # cut off before anything was done: nothing is lost by another run
            self.trained, self.scores = trained, scores
            self.seconds = dict(content["seconds"])
            self.merged = dict(content["merged"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path} is not one that learn wrote: {error}") from error
        names, before = self.identity["tasks"], saved.get("tasks", [])
        more = names[len(before) :] if names[: len(before)] == before else []
        of_more = tuple(f"{kind}.{name}." for name in more for kind in ("tasks", "args"))
        for key in dict.fromkeys([*self.identity, *saved]):
            mine, theirs = self.identity.get(key), saved.get(key)
            if mine != theirs and not (more and (key == "tasks" or key.startswith(of_more))):
                hint = ""
                if key == "model":
                    hint = " (learn trains in place: a model that was trained is another one)"
                raise CheckpointError(
                    f"{self.out} holds a run with another {key}: {_short(theirs)} there, "
                    f"{_short(mine)} now{hint}. Give what it was given, or choose another folder"
                )
        return True

    def write(self) -> None:
        content = {
            "format": FORMAT,
            "version": VERSION,
            "identity": self.identity,
            "trained": self.trained,
            "scores": self.scores,
            "seconds": self.seconds,
            "merged": self.merged,
        }
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            whole(self.path, lambda part: part.write_text(json.dumps(content, indent=1) + "\n"))
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror}") from error

    def folder(self, index: int, name: str) -> Path:
        """Of a task."""
        return self.out / "tasks" / f"{index:02d}-{re.sub(r'[^A-Za-z0-9._-]', '_', name)}"


def whole(path: Path, write: Any) -> None:
    """`write(part)`, made durable, then renamed to `path`."""
    part = path.with_name(path.name + ".part")
    write(part)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


# --- what things are made of -------------------------------------------------------------------


def content_hash(dataset: Any, *, every: bool = False) -> str:
    """Of the length of a dataset and of up to 512 examples, evenly spaced, or of every one."""
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        return f"a {type(dataset).__name__}"
    digest = blake2b(digest_size=12)
    count = len(dataset)
    looked_at = count if every else min(count, _LOOKED_AT)
    for i in np.linspace(0, max(0, count - 1), looked_at).astype(int):
        for part in _parts(dataset[int(i)]):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return f"{count} items, {digest.hexdigest()}"


def _parts(value: Any) -> Iterable[bytes]:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield str(key).encode()
            yield from _parts(value[key])
    elif isinstance(value, np.ndarray) and value.dtype == object:
        yield from _parts(value.tolist())  # its bytes are addresses
    elif isinstance(value, Tensor | np.ndarray):
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = value.float() if value.dtype == torch.bfloat16 else value
        array = np.asarray(value)
        yield f"{array.dtype}{array.shape}".encode()
        yield np.ascontiguousarray(array).tobytes()
    elif isinstance(value, list | tuple):
        yield f"{len(value)} of".encode()
        if value and all(type(one) is int for one in value):  # token ids
            yield np.array(value, dtype=np.int64).tobytes()
            return
        for one in value:
            yield from _parts(one)
    elif isinstance(value, str | int | float | bool | bytes | type(None)):
        yield repr(value).encode()
    else:
        yield type(value).__name__.encode()


def named(value: Any) -> Any:
    """A plain value as it is, a function or an object by its name."""
    if isinstance(value, str | int | float | bool | type(None)):
        return value
    if isinstance(value, Mapping):
        return {str(key): named(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [named(one) for one in value]
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def _bytes_of(tensor: Tensor) -> np.ndarray[Any, Any]:
    whole = tensor.detach().cpu().contiguous()
    return whole.view(torch.uint8).numpy() if whole.numel() else np.empty(0, np.uint8)


def digests(state: Mapping[str, Any]) -> dict[str, str]:
    """A hash of each tensor of a state dict, by its name."""
    found = {}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            digest = blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
            digest.update(_bytes_of(tensor.reshape(-1)).data)
            found[name] = digest.hexdigest()
    return found


def save_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {name: x.detach().cpu().contiguous().clone() for name, x in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        whole(path, lambda part: save_file(tensors, part))
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """What `save_tensors` wrote."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is gone: the run cannot be resumed without it") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
