"""The record that a merge leaves in its output: ``cl_fast_merge.json``.

With it `cl-fast verify` can tell whether every byte is still what was written, whether the inputs
are still what was read, and compute any tensor again. It holds no times, paths of temporary files
or thread counts: the same recipe on the same inputs gives the same manifest.

    format, cl_fast, numerics      versions of this file, of the package, of the arithmetic
    fingerprint                    of the plan: recipe, input headers, policy, seed
    recipe                         the recipe as carried out
    policy, seed, streams          what it resolved to; the names that key the random streams
    nan                            policy for NaN and infinity
    thresholds                     codes of a model-wide trim, one per model, or null
    vocabulary                     null, or where the output's tokens come from and which tensors
                                   were aligned to them; the checksums of these tensors' inputs are
                                   of the aligned bytes
    digest                         of the output's tensors, see `digest`
    inputs                         role (base, model, patch, delta), name, reference, path, digest,
                                   files (name, size, header); a patch's digest is of the base with
                                   it on, a packed delta's of its kept values
    statistics                     where models have files of them: reference, path, size, header
    files                          name, size of every shard; name, size, blake2b of the rest
    tensors                        name -> crc64 of the output's bytes, then of each input's bytes
                                   (base first), nonfinite counts where there were any; of
                                   slices "from": position in inputs and name there, of each

Checksums are CRC-64/NVME as 16 hexadecimal digits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_fast._version import __version__
from cl_fast.checkpoints.checkpoint import absolute
from cl_fast.checkpoints.safetensors import read_header
from cl_fast.checkpoints.writing import write_whole
from cl_fast.errors import VerifyError
from cl_fast.merging.card import card
from cl_fast.merging.journal import TensorRecord

if TYPE_CHECKING:
    from cl_fast.checkpoints.checkpoint import Checkpoint
    from cl_fast.merging.plan import Plan

__all__ = ["FORMAT", "NAME", "build", "digest", "dump", "read", "records", "relocate"]

NAME = "cl_fast_merge.json"
FORMAT = 1


def digest(checksums: Iterable[tuple[str, int]]) -> str:
    """One value for many tensors: blake2b (16 bytes, hex) of lines "name crc64" in name order.

    Equal for two checkpoints that hold the same tensors, however they are cut into shards.
    """
    hasher = hashlib.blake2b(digest_size=16)
    for name, crc in sorted(checksums):
        hasher.update(f"{name} {crc:016x}\n".encode())
    return hasher.hexdigest()


def build(
    plan: Plan,
    records: Sequence[TensorRecord],
    *,
    codes: Sequence[int] | None,
    nan: str,
    files: Mapping[str, tuple[int, str]],
) -> dict[str, Any]:
    """The manifest of a finished plan. `files`: size and blake2b of every file but the shards."""
    from cl_fast.merging.plan import NUMERICS

    combined = next((tensor for tensor in plan.tensors if tensor.kind == "combine"), None)
    by_name = {record.name: record for record in records}
    origins = {tensor.name: tensor.origins for tensor in plan.tensors}
    inputs = []
    for position, checkpoint in enumerate(plan.inputs):
        base = position < plan.bases
        read = []
        for tensor in plan.tensors:
            crcs = by_name[tensor.name].sources
            if tensor.origins is not None:
                read += [
                    (stored, crc)
                    for (place, stored), crc in zip(tensor.origins, crcs, strict=True)
                    if place == position
                ]
                continue
            # Records list the base first where the tensor has one.
            source = position if tensor.base is not None or not plan.has_base else position - 1
            if tensor.base is not None or not base:
                read.append((tensor.name, crcs[source]))
        inputs.append(
            {
                "role": "base" if base else _role(checkpoint),
                "name": None if base else plan.models[position - plan.bases],
                "reference": checkpoint.reference,
                "path": checkpoint.place,
                "digest": digest(set(read)),
                "files": [
                    {
                        "name": Path(header.path).name,
                        "size": header.file_size,
                        "header": header.digest,
                    }
                    for header in checkpoint.files
                ],
                **_own(checkpoint),
            }
        )
    return {
        "format": FORMAT,
        "cl_fast": __version__,
        "numerics": NUMERICS,
        "fingerprint": plan.fingerprint,
        "recipe": plan.recipe.model_dump(mode="json", exclude_none=True, exclude_defaults=True),
        "policy": None if combined is None else dataclasses.asdict(combined.policy),
        **({"rule": combined.rule.name} if combined is not None and combined.rule else {}),
        "seed": plan.seed,
        "streams": list(plan.models),
        "nan": nan,
        "thresholds": None if codes is None else list(codes),
        "vocabulary": _vocabulary(plan),
        "digest": digest((record.name, record.crc64) for record in records),
        "inputs": inputs,
        **({"statistics": known} if (known := _statistics(plan)) else {}),
        "files": [
            *({"name": shard.filename, "size": shard.size} for shard in plan.shards),
            *(
                {"name": name, "size": size, "blake2b": value}
                for name, (size, value) in sorted(files.items())
            ),
        ],
        "tensors": {
            record.name: {key: value for key, value in record.to_json().items() if key != "name"}
            | ({} if origins[record.name] is None else {"from": origins[record.name]})
            for record in records
        },
    }


def _statistics(plan: Plan) -> list[dict[str, Any]]:
    listed = [entry.file for part in plan.recipe.parts for entry in part.entries if entry.file]
    found = []
    for reference in dict.fromkeys(listed):
        path = absolute(reference)
        header = read_header(path)
        found.append(
            {
                "reference": reference,
                "path": str(path),
                "size": header.file_size,
                "header": header.digest,
            }
        )
    return found


def _vocabulary(plan: Plan) -> dict[str, Any] | None:
    vocabulary = plan.vocabulary
    if vocabulary is None or not vocabulary.digest:
        return None
    return {
        "source": vocabulary.source,
        "path": None if vocabulary.folder is None else str(vocabulary.folder),
        "digest": vocabulary.digest,
        "aligned": list(vocabulary.aligned),
    }


def _role(checkpoint: Checkpoint) -> str:
    from cl_fast.merging.inputs import Derived

    return checkpoint.role if isinstance(checkpoint, Derived) else "model"


def _own(checkpoint: Checkpoint) -> dict[str, str]:
    """Of a change of a base: the hash of its own files, and its base where that is its own."""
    from cl_fast.merging.inputs import Derived

    if not isinstance(checkpoint, Derived):
        return {}
    own = {"content": checkpoint.content}
    return own | ({"on": str(checkpoint.base.path)} if checkpoint.pair else {})


def dump(manifest: Mapping[str, Any]) -> bytes:
    """JSON with one line for each entry of the long lists: fit for diff, small enough to ship."""

    def compact(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, separators=(", ", ": "))

    lines = []
    for key, value in manifest.items():
        if key == "tensors":
            inner = ",\n".join(
                f"  {compact(name)}: {compact(entry)}" for name, entry in value.items()
            )
            text = f"{{\n{inner}\n }}" if inner else "{}"
        elif key in ("inputs", "files"):
            inner = ",\n".join(f"  {compact(entry)}" for entry in value)
            text = f"[\n{inner}\n ]" if inner else "[]"
        else:
            text = compact(value)
        lines.append(f" {compact(key)}: {text}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a merged folder.

    Raises VerifyError when there is none, or when it is not one that this version can read.
    """
    if not folder.is_dir():
        raise VerifyError(f"{folder}: there is no such folder; give the output of a merge")
    path = folder / NAME
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise VerifyError(
            f"{folder}: holds no {NAME}, so it was not written by cl-fast merge (or that file was "
            "left behind when it was copied)"
        ) from None
    except (OSError, ValueError) as error:
        raise VerifyError(f"{path}: cannot be read: {error}") from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise VerifyError(f"{path}: is not a manifest of a merge")
    if manifest["format"] != FORMAT:
        raise VerifyError(
            f"{path}: has format {manifest['format']!r}, this version reads {FORMAT}; use the "
            f"cl_fast that wrote it ({manifest.get('cl_fast', 'unknown')})"
        )
    missing = [
        key
        for key, kind in (
            ("recipe", dict),
            ("inputs", list),
            ("files", list),
            ("tensors", dict),
            ("fingerprint", str),
            ("streams", list),
            ("numerics", int),
        )
        if not isinstance(manifest.get(key), kind)
    ]
    if missing:
        raise VerifyError(f"{path}: is damaged: {', '.join(missing)} missing or of a wrong type")
    return manifest


def relocate(folder: Path, moved: Mapping[str, str], title: str) -> None:
    """Tells the record of a merged folder, and its card, where inputs are from now on.

    Args:
        folder: a merged folder that nobody else reads yet.
        moved: paths of inputs, as the record has them, and their new ones.
        title: of the card.

    Raises:
        VerifyError: `folder` has no record.
        OutputError: it cannot be written.
    """
    manifest = read(folder)
    for entry in manifest["inputs"]:
        entry["path"] = moved.get(entry["path"], entry["path"])
        entry["reference"] = moved.get(entry["reference"], entry["reference"])
    from cl_fast.merging.recipe import map_references

    manifest["recipe"] = map_references(
        manifest["recipe"], lambda word: moved.get(word, word), base=False
    )
    text = card(title, manifest).encode()
    for entry in manifest["files"]:
        if entry["name"] == "README.md":
            entry["size"] = len(text)
            entry["blake2b"] = hashlib.blake2b(text, digest_size=16).hexdigest()
    write_whole(folder / "README.md", [text])
    write_whole(folder / NAME, [dump(manifest)])


def records(manifest: Mapping[str, Any]) -> dict[str, TensorRecord]:
    """The recorded tensors by name. Raises VerifyError where an entry is damaged."""
    found = {}
    for name, entry in manifest["tensors"].items():
        try:
            found[name] = TensorRecord.from_json({"name": name, **entry})
        except (KeyError, TypeError, ValueError) as error:
            raise VerifyError(f"{NAME}: the entry of tensor {name} is damaged") from error
    return found
