"""Checking a merged folder against the record that the merge left in it.

    index, headers, sizes     as a reader needs them, and as they were written
    checksums, finite values  every tensor is read; its CRC-64 must be the recorded one
    inputs                    where they still are: headers and checksums of all that was merged
    recomputation             a sample of tensors is merged again and compared byte by byte

The folder and the inputs are only read. Nothing of the recorded recipe is trusted beyond what a
recipe from a file would be.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_fast.backends import native
from cl_fast.checkpoints.checkpoint import Checkpoint
from cl_fast.checkpoints.remote import StoreError, is_url, list_folder
from cl_fast.checkpoints.safetensors import Header, TensorInfo, read_header
from cl_fast.errors import CheckpointError, ClFastError
from cl_fast.merging import manifest as manifests
from cl_fast.merging.checksum import combine, crc64, crc64_of_file
from cl_fast.merging.description import bytes_text
from cl_fast.merging.executors import make_executor, torch_dtype
from cl_fast.merging.inputs import check_derived, forget, is_derived
from cl_fast.merging.journal import TensorRecord
from cl_fast.ops.policy import DTYPES
from cl_fast.ops.streams import stream_key

if TYPE_CHECKING:
    from cl_fast.merging.engine import Progress
    from cl_fast.merging.plan import Plan

__all__ = ["Report", "verify"]

_PIECE = 1 << 20  # elements looked at in one go
_LARGEST = 1 << 30  # bytes of the largest tensor that is computed again in memory


@dataclass(slots=True)
class Report:
    """What `verify` found. `problems` is empty for a sound folder; `notes` are no faults.

    tensors, nbytes: read and compared with their checksums. inputs: input checkpoints found and
    compared. recomputed: names of the tensors that were merged again. unread: references of the
    inputs that could not be looked at, as they are gone or their store did not answer.
    unchecked: what was not checked that was asked for, in words; empty if all was.
    """

    folder: Path
    tensors: int = 0
    nbytes: int = 0
    inputs: int = 0
    recomputed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    unchecked: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing was wrong."""
        return not self.problems

    def lines(self) -> list[str]:
        """The report for people."""
        checked = f"{self.tensors} tensors ({bytes_text(self.nbytes)})"
        state = "sound" if self.ok else f"{len(self.problems)} problem(s), see above"
        if self.unchecked:
            state = f"as written; {self.unchecked}" if self.ok else f"{state}; {self.unchecked}"
        return [
            f"{self.folder}: {state}",
            f"  checksums and finite values: {checked}",
            f"  inputs compared: {self.inputs}",
            f"  computed again, byte for byte: {', '.join(self.recomputed) or 'none'}",
            *(f"  note: {note}" for note in self.notes),
        ]


def verify(
    folder: str | Path,
    *,
    sample: int | None = 8,
    inputs: bool = True,
    threads: int | None = None,
    backend: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Checks a folder that `execute` wrote.

    Args:
        folder: the merged folder.
        sample: how many tensors to compute again from the inputs; None: all of them.
        inputs: look at the inputs at all; where they are gone a note says so.
        threads: None: the cores of this process.
        backend: "native", "eager" or None: who computes the sample again.
        progress: called as by `execute`.

    Returns:
        A report; `report.ok` is False when something is not as it was written.

    Raises:
        VerifyError: the folder has no readable record, so there is nothing to compare with.
    """
    folder = Path(folder)
    forget()
    manifest = manifests.read(folder)
    records = manifests.records(manifest)
    for entry in manifest["inputs"]:
        entry["path"] = _place(entry, folder)
    report = Report(folder)
    workers = threads or native.threads()
    try:
        written = Checkpoint.open(folder)
    except ClFastError as error:
        report.problems.append(str(error))
        return report
    with ThreadPoolExecutor(workers, "cl_fast verify") as pool:
        _check_files(report, folder, manifest)
        _check_tensors(report, pool, written, records, manifest, progress)
        if inputs:
            present = _check_inputs(report, pool, manifest, records, progress)
            present = _check_statistics(report, manifest) and present
            if present and sample != 0:
                _recompute(report, written, manifest, records, sample, threads, backend)
            report.unchecked = _unchecked(report, len(manifest["inputs"]), present, sample)
    return report


def _unchecked(report: Report, inputs: int, present: bool, sample: int | None) -> str:
    """What was asked for and not done, in words."""
    nothing = "nothing was computed again"
    if report.unread and len(report.unread) == inputs:
        return f"{nothing}, since no input could be read"
    if report.unread:
        return f"{nothing}, since {len(report.unread)} of {inputs} inputs could not be read"
    if sample != 0 and not report.recomputed and report.ok and report.tensors:
        return f"{nothing}, see the notes"
    return ""


def _check_files(report: Report, folder: Path, manifest: dict[str, Any]) -> None:
    for entry in manifest["files"]:
        path = folder / str(entry["name"])
        if not path.is_file():
            report.problems.append(f"{path}: was written by the merge and is missing")
        elif path.stat().st_size != entry["size"] and "blake2b" not in entry:
            report.problems.append(
                f"{path}: has {path.stat().st_size} bytes, {entry['size']} were written"
            )
        elif "blake2b" in entry:
            now = blake2b(path.read_bytes(), digest_size=16).hexdigest()
            if now != entry["blake2b"]:
                report.notes.append(f"{path.name} was changed since the merge")


def _check_tensors(
    report: Report,
    pool: ThreadPoolExecutor,
    written: Checkpoint,
    records: dict[str, TensorRecord],
    manifest: dict[str, Any],
    progress: Progress | None,
) -> None:
    for name in records.keys() - written.tensors.keys():
        report.problems.append(f"{report.folder}: tensor {name} was written and is missing")
    for name in written.tensors.keys() - records.keys():
        report.problems.append(f"{report.folder}: tensor {name} was not written by the merge")
    both = [info for name, info in written.tensors.items() if name in records]
    allowed = copied = 0
    done, total = 0, sum(info.nbytes for info in both)
    for info in both:
        crc, nonfinite = _scan(pool, info)
        record = records[info.name]
        if crc != record.crc64:
            report.problems.append(
                f"{info.path}: tensor {info.name} is not what was written (checksum {crc:016x}, "
                f"recorded {record.crc64:016x})"
            )
        if nonfinite:
            if record.sources == (record.crc64,):
                copied += nonfinite  # bytes as they were found, on purpose
            elif manifest.get("nan") == "propagate":
                allowed += nonfinite
            else:
                report.problems.append(
                    f"{info.path}: tensor {info.name} holds {nonfinite} NaN or infinite values"
                )
        report.tensors += 1
        report.nbytes += info.nbytes
        done += info.nbytes
        if progress is not None:
            progress("verify", done, total)
    if allowed:
        report.notes.append(f"{allowed} NaN or infinite values, as --nan propagate allows")
    if copied:
        report.notes.append(f"{copied} NaN or infinite values in tensors that were copied")


def _scan(pool: ThreadPoolExecutor, info: TensorInfo) -> tuple[int, int]:
    """CRC-64 of a stored tensor and how many of its elements are not finite."""
    item = DTYPES.get(info.dtype)
    if item is None:  # integers and the like are always finite
        return crc64_of_file(info.path, info.offset, info.nbytes), 0

    def piece(start: int) -> tuple[int, int]:
        n = min(_PIECE, info.nbytes // item - start)
        with Path(info.path).open("rb", buffering=0) as file:
            file.seek(info.offset + start * item)
            data = bytearray(n * item)
            view = memoryview(data)
            while view:
                got = file.readinto(view)
                if not got:
                    raise EOFError(info.path)
                view = view[got:]
        return crc64(data), _nonfinite(data, info.dtype, n)

    crc = bad = 0
    starts = range(0, info.nbytes // item, _PIECE)
    for start, (part, count) in zip(starts, _in_order(pool, piece, starts), strict=True):
        crc = combine(crc, part, min(_PIECE * item, info.nbytes - start * item))
        bad += count
    return crc, bad


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[int], tuple[int, int]], items: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """Results in order; only a few pieces are in memory at a time."""
    ahead = 16
    for start in range(0, len(items), ahead):
        yield from pool.map(work, items[start : start + ahead])


def _nonfinite(data: bytearray, dtype: str, n: int) -> int:
    core = native.load()
    if core is None:
        import torch

        return int(
            (~torch.isfinite(torch.frombuffer(data, dtype=torch_dtype(dtype)).float())).sum()
        )
    # The merge kernel with one model and weight 1 counts on the way; its output goes nowhere.
    out = bytearray(4 * n)
    job = core.Job(threads=1, nan="propagate", checksums=False)
    task = job.add_task(n=n, out_dtype="F32", out_ptr=_address(out))
    job.add_term(task, dtype=dtype, ptr=_address(data))
    job.run()
    return int(job.result(task)["nonfinite"][0])


def _address(buffer: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _check_inputs(
    report: Report,
    pool: ThreadPoolExecutor,
    manifest: dict[str, Any],
    records: dict[str, TensorRecord],
    progress: Progress | None,
) -> bool:
    """Whether all inputs are there and are what was merged."""
    sound = True
    opened: list[tuple[int, dict[str, Any], tuple[Header, ...], dict[str, TensorInfo]]] = []
    for position, entry in enumerate(manifest["inputs"]):
        places = (entry["path"], entry.get("on"))
        missing = next((why for place in places if place and (why := _missing(place))), "")
        if missing:
            report.notes.append(f"input {entry['reference']} {missing}")
            report.unread.append(str(entry["reference"]))
            sound = False
            continue
        try:
            opened.append((position, entry, *_open(entry)))
        except StoreError as error:
            report.notes.append(f"input {entry['reference']} was not looked at: {error}")
            report.unread.append(str(entry["reference"]))
            sound = False
        except ClFastError as error:
            report.problems.append(_not_merged(entry, str(error)))
            report.inputs += 1
            sound = False
    total = sum(info.nbytes for *_, tensors in opened for info in tensors.values())
    done = 0
    for position, entry, files, tensors in opened:
        changed = _changed_headers(entry, files)
        wanted = _wanted(position, tensors, manifest, records)

        def same(item: tuple[TensorInfo, int]) -> bool:
            info, crc = item
            return crc64_of_file(info.path, info.offset, info.nbytes) == crc

        if not changed:
            for (info, _), equal in zip(wanted, pool.map(same, wanted), strict=True):
                if not equal:
                    changed = f"tensor {info.name} in {info.path}"
                    break
                done += info.nbytes
                if progress is not None:
                    progress("inputs", done, total)
        if changed:
            report.problems.append(_not_merged(entry, f"{changed} differs"))
            sound = False
        report.inputs += 1
    return sound


def _check_statistics(report: Report, manifest: dict[str, Any]) -> bool:
    """Whether the models' files of statistics are there and are what was merged with."""
    sound = True
    for entry in manifest.get("statistics", ()):
        if not Path(entry["path"]).is_file():
            report.notes.append(f"the statistics {entry['path']} are not there any more")
            sound = False
            continue
        try:
            header = read_header(entry["path"])
        except CheckpointError as error:
            report.problems.append(str(error))
            sound = False
            continue
        if (header.file_size, header.digest) != (entry["size"], entry["header"]):
            report.problems.append(
                f"the statistics {entry['path']} are not what was merged with; --no-inputs leaves "
                "them and the inputs out"
            )
            sound = False
    return sound


def _wanted(
    position: int,
    tensors: dict[str, TensorInfo],
    manifest: dict[str, Any],
    records: dict[str, TensorRecord],
) -> list[tuple[TensorInfo, int]]:
    """The tensors that were read of an input, and what their checksums were."""
    has_base = any(entry["role"] == "base" for entry in manifest["inputs"])
    wanted: dict[tuple[str, int], TensorInfo] = {}
    for name, record in records.items():
        if name in _aligned(manifest):
            continue  # the checksums are of the aligned rows; computing it again compares them
        origins = manifest["tensors"][name].get("from")
        if origins is not None:
            read = [
                (stored, crc)
                for (place, stored), crc in zip(origins, record.sources, strict=True)
                if place == position
            ]
        else:
            # Copies of a method without deltas have no base among their sources.
            index = position - (has_base and len(record.sources) < len(manifest["inputs"]))
            read = [(name, crc) for crc in record.sources[max(index, 0) :][: index >= 0]]
        for stored, crc in read:
            info = tensors.get(stored)
            if info is not None:
                wanted[stored, crc] = info
    return [(info, crc) for (_, crc), info in wanted.items()]


def _not_merged(entry: dict[str, Any], why: str) -> str:
    return (
        f"input {entry['reference']} ({entry['path']}) is not what was merged: {why}; --no-inputs "
        "leaves the inputs out"
    )


def _open(entry: dict[str, Any]) -> tuple[tuple[Header, ...], dict[str, TensorInfo]]:
    """The files of an input, and the tensors that the records have the checksums of."""
    opener = is_derived(entry["path"])
    if opener is None:
        checkpoint = Checkpoint.open(entry["path"])
        return checkpoint.files, checkpoint.tensors
    files, content = opener.own(Path(entry["path"]))
    tensors: dict[str, TensorInfo] = {}
    if "on" in entry:
        files += Checkpoint.open(entry["on"]).files
    if not _changed_headers(entry, files) and entry.get("content", content) != content:
        raise CheckpointError("its data differ from those that were merged")
    return files, tensors


def _changed_headers(entry: dict[str, Any], files: tuple[Header, ...]) -> str:
    then = {file["name"]: (file["size"], file["header"]) for file in entry["files"]}
    now = {Path(h.path).name: (h.file_size, h.digest) for h in files}
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            return f"the header of {name}"
    return ""


def _recompute(
    report: Report,
    written: Checkpoint,
    manifest: dict[str, Any],
    records: dict[str, TensorRecord],
    sample: int | None,
    threads: int | None,
    backend: str | None,
) -> None:
    from cl_fast.merging.plan import NUMERICS

    if manifest["numerics"] != NUMERICS:
        report.notes.append(
            f"written with arithmetic {manifest['numerics']}, this version has {NUMERICS}: no "
            "tensor was computed again"
        )
        return
    try:
        plan = _rebuild(manifest, report.folder)
        check_derived(plan)
    except ClFastError as error:
        report.problems.append(f"{report.folder}: its recorded recipe cannot be planned: {error}")
        return
    executor = make_executor(
        plan, backend=backend, threads=threads, memory=None, io="auto", nan=manifest["nan"]
    )
    recorded = manifest.get("vocabulary")
    now = "" if plan.vocabulary is None else plan.vocabulary.digest
    if recorded is not None and recorded["digest"] != now:
        report.problems.append(
            f"{report.folder}: the tokenizers of its inputs are not those that were merged: the "
            "rows of the embeddings would be put in another order"
        )
        return
    small = [t for t in plan.tensors if t.nbytes <= _LARGEST and t.name in written.tensors]
    if len(small) < len(plan.tensors):
        report.notes.append(
            f"{len(plan.tensors) - len(small)} tensors above {bytes_text(_LARGEST)} are not "
            "computed again"
        )
    if sample is None or sample >= len(small):
        chosen = small
    else:
        # The largest always; the others by the fingerprint, so that a second look is the same.
        # So are aligned ones, whose inputs are compared in no other way.
        largest = max(small, key=lambda tensor: tensor.nbytes)
        chosen = [t for t in small if t is largest or t.name in _aligned(manifest)]
        rest = [tensor for tensor in small if tensor not in chosen]
        more = min(len(rest), max(0, sample - len(chosen)))
        chosen += random.Random(plan.fingerprint).sample(rest, more)
    for tensor in chosen:
        info = written.tensors[tensor.name]
        with Path(info.path).open("rb") as file:
            file.seek(info.offset)
            stored = file.read(info.nbytes)
        try:
            again, record = executor.compute(tensor, manifest.get("thresholds"))
        except ClFastError as error:
            report.problems.append(f"tensor {tensor.name} cannot be computed again: {error}")
            continue
        if again != stored:
            where = next(
                (i for i, (a, b) in enumerate(zip(again, stored, strict=False)) if a != b),
                min(len(again), len(stored)),
            )
            report.problems.append(
                f"{info.path}: tensor {tensor.name} computed again from the inputs differs from "
                f"byte {where} on"
            )
        elif tensor.name in _aligned(manifest):
            then = records[tensor.name].sources
            if record.sources != then:
                report.problems.append(
                    f"the inputs of tensor {tensor.name} are not what was merged: the checksums "
                    "of their aligned rows differ"
                )
        report.recomputed.append(tensor.name)


def _place(entry: dict[str, Any], folder: Path) -> str:
    """Where an input is: where it was, or, of a change that was moved with the output, there."""
    place = str(entry["path"])
    beside = folder / Path(place).name
    if entry["role"] in ("patch", "delta") and beside.is_file() and _missing(place):
        return str(beside)
    return place


def _missing(place: str) -> str:
    """Why an input cannot be looked at: it is gone, or its store gives no answer. Empty: it can."""
    gone = f"is not at {place} any more"
    if not is_url(place):
        return "" if Path(place).exists() else gone
    try:
        return "" if list_folder(place).files else gone
    except ClFastError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return gone
        return f"was not looked at: {error}"


def _rebuild(manifest: dict[str, Any], folder: Path) -> Plan:
    """The plan as it was: the recorded recipe on the recorded paths, with the recorded streams."""
    from cl_fast.merging.plan import make_plan
    from cl_fast.merging.recipe import map_files, map_references, parse_recipe

    paths = {
        entry["reference"]: f"{entry['on']}+{entry['path']}" if "on" in entry else entry["path"]
        for entry in manifest["inputs"]
    }
    recipe = map_references(copy.deepcopy(manifest["recipe"]), lambda word: paths.get(word, word))
    files = {entry["reference"]: entry["path"] for entry in manifest.get("statistics", ())}
    recipe = map_files(recipe, lambda word: files.get(word, word))
    recorded = manifest.get("vocabulary")
    truncated = recorded is not None and recorded["path"] is None
    recipe.pop("chat_template", None)
    if recorded is None or truncated:  # where the tokenizer's files come from changes no tensor
        recipe.pop("tokenizer_source", None)
        recipe.pop("tokenizer", None)
        if recipe.get("base_model") not in paths.values():
            recipe.pop("base_model", None)  # it gave the config, and no tensor
    else:
        for place, key in ((recipe, "tokenizer_source"), (recipe.get("tokenizer") or {}, "source")):
            if place.get(key, "base") not in ("base", "union", *paths.values()):
                place[key] = recorded["path"]
    # Nothing is written; an input may lie in the folder, as the patch of an edited model does.
    nowhere = folder.with_name(f".{folder.name}.verify")
    plan = make_plan(
        parse_recipe(recipe),
        nowhere,
        seed=manifest.get("seed"),
        allow_crimes=True,
        truncate_embeddings=truncated,
    )
    if plan.seed is None:
        return plan
    # The recorded names, not those of the paths, key the random streams.
    names = dict(zip(plan.models, manifest["streams"], strict=True))
    tensors = tuple(
        dataclasses.replace(
            tensor,
            terms=tuple(
                dataclasses.replace(
                    term,
                    model=names[term.model],
                    key=stream_key(plan.seed, names[term.model], tensor.name),
                )
                for term in tensor.terms
            ),
        )
        for tensor in plan.tensors
    )
    return dataclasses.replace(plan, tensors=tensors)


def _aligned(manifest: dict[str, Any]) -> list[str]:
    """The tensors whose inputs are not read as they are stored."""
    return list((manifest.get("vocabulary") or {}).get("aligned", ()))
