"""Carrying out a plan: from "everything is known" to "the output is in place", or to nothing.

    checks -> working folder, lock -> shards reserved -> shards computed, each journalled
           -> side files, index, manifest, card -> re-read -> inputs unchanged? -> rename

Whatever happens on the way (an error, a full disk, Ctrl-C, a kill, a power failure), the output
path holds nothing, or what it held before; the inputs are only ever opened for reading. What is
finished stays in a hidden sibling, and `resume` goes on from there to the same bytes. For users
docs/engine.md tells it.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_fast.checkpoints.checkpoint import INDEX_NAME, Checkpoint
from cl_fast.checkpoints.remote import State, StoreError, is_url, states_of
from cl_fast.errors import (
    CheckpointError,
    ClFastError,
    Interrupted,
    NonFiniteError,
    OutputError,
    VerifyError,
)
from cl_fast.merging import manifest
from cl_fast.merging.card import card
from cl_fast.merging.checksum import crc64_of_file
from cl_fast.merging.executors import (
    IO_MODES,
    NAN_POLICIES,
    Engine,
    Executor,
    Io,
    Nan,
    ShardJob,
    SpreadExecutor,
    make_executor,
    sources,
)
from cl_fast.merging.inputs import check_derived
from cl_fast.merging.journal import FORMAT, Journal, TensorRecord, WorkLock
from cl_fast.merging.output import (
    OutputFolder,
    allocate,
    sync_file,
    sync_tree,
    write_failure,
)
from cl_fast.merging.upload import Upload

if TYPE_CHECKING:
    from cl_fast.merging.plan import Plan

__all__ = [
    "MEMORY_LEAST",
    "Progress",
    "Result",
    "check_inputs",
    "check_output",
    "execute",
    "read_bandwidth",
]

MEMORY_LEAST = 16 << 20
"""Smallest bound on the working memory, in bytes."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done ("thresholds", "merge", "verify"), bytes done, bytes in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished merge.

    output: the folder. backend: "native", "eager", as "native on 2 Ray nodes", or "none" where an
    earlier run had finished it all (`earlier`: then nothing was computed or written). seconds: wall
    time of this run. shards: how many files of weights. resumed: how many of them an earlier run
    had finished. bytes_moved: read and written by this run. digest: of all tensors of the output
    (see `manifest.digest`). url: where the output is, if that is no folder; `output` is the local
    folder then that it was built in, and gone.
    """

    output: Path
    backend: str
    seconds: float
    shards: int
    resumed: int
    bytes_moved: int
    digest: str
    url: str | None = None
    earlier: bool = False


def execute(
    plan: Plan,
    *,
    threads: int | None = None,
    memory: int | None = None,
    io: Io = "auto",
    nan: Nan = "refuse",
    resume: bool = False,
    restart: bool = False,
    overwrite: bool = False,
    fsync: bool = True,
    reread: bool = False,
    write_card: bool = True,
    backend: str | None = None,
    progress: Progress | None = None,
    engine: Engine | None = None,
) -> Result:
    """Carries out `plan` and returns when its output folder is complete and in place.

    Args:
        plan: from `make_plan`.
        threads: worker threads; None: the cores of this process (`CL_FAST_THREADS`).
        memory: bound in bytes on the working memory; None: a bound that is fast.
        io: how inputs are read; "auto" takes the page cache ("mmap"), "direct" goes past it.
        nan: NaN or infinity in an input: "refuse" (error), "propagate", or "zero": such a base
            element counts as 0, such a model element as no change.
        resume: continue an unfinished merge of the same plan, if there is one. If the output is
            that of a finished one, all is done (unless `overwrite`): by its record and the sizes
            of its files; `cl-fast verify` compares the bytes.
        restart: throw an unfinished merge away.
        overwrite: replace an existing output folder, once the new one is complete.
        fsync: wait until the disk has what was written. Without it a power failure (not a kill)
            may lose or damage a finished output.
        reread: read the written shards back and compare their checksums before they are moved in.
        write_card: write README.md, the model card, as well.
        backend: "native", "eager" or None for the faster one that is there; same bytes.
        progress: called about twenty times a second, from this thread.
        engine: who does the work: this process (None), or a cluster of machines that share storage
            (`cl_fast.integrations.ray.RayEngine`). Checks, journal, and the move into place stay
            here, and the output has the same bytes.

    Raises:
        OutputError: the output exists, lies in an input, cannot be written, or the disk is full;
            an unfinished merge is there and neither `resume` nor `restart` was asked for.
        CheckpointError: an input is truncated, was changed while it was read, integer tensors
            that must agree do not, or a patch is for another base.
        NonFiniteError: NaN or infinity, or overflow of the output type.
        Interrupted: KeyboardInterrupt came; finished shards are kept.
        ValueError: an argument out of its range.
    """
    _check_arguments(threads, memory, io, nan, resume, restart, backend)
    started = time.perf_counter()
    folder = OutputFolder(plan.output)
    lock = WorkLock(folder.work, folder.path)
    journal = Journal(folder.work, fsync=fsync)
    upload = None if plan.url is None else Upload(plan.url, plan.fingerprint)
    try:
        found: _Unfinished | None = None
        if folder.work.is_dir():
            lock.acquire()
            found = _Unfinished.read(journal, ignore_damage=restart)
            if found is not None and found.published(folder, upload):
                # The rename was done, and the process ended before it could tidy up.
                folder.discard()
                if found.start["fingerprint"] == plan.fingerprint:
                    return found.result(folder, time.perf_counter() - started, plan.url)
                found = None  # another merge, which stands at the output like any other
            folder.recover()
            if found is None:
                folder.discard()
                lock.release()
        if resume and not overwrite and found is None:
            earlier = _finished_earlier(plan, folder, upload, nan, started)
            if earlier is not None:
                return earlier
        _check_output(plan, folder, overwrite=overwrite)
        if nan == "zero" and plan.recipe.method.one_as_it_is:
            raise OutputError(
                f"--nan zero has no effect with merge_method {plan.recipe.merge_method}, which "
                "copies the bytes of tensors that are not scaled; leave it out"
            )
        if upload is not None:
            upload.check(overwrite=overwrite, again=restart or (resume and found is not None))
        check_inputs(plan)
        check_derived(plan)
        executor = (engine or make_executor)(
            plan, backend=backend, threads=threads, memory=memory, io=io, nan=nan
        )
        run = _Run(plan, folder, journal, executor, nan, fsync, progress, upload)
        if found is None:
            folder.create()
            lock.acquire()
        elif restart:
            folder.clear()
            found = None
        else:
            found.check(plan, folder, nan, resume=resume)
        if isinstance(executor, SpreadExecutor):
            try:
                executor.prepare(plan, folder.work, fsync=fsync)
            except BaseException:
                if found is None:
                    folder.discard()
                raise
        with run.cleanup():
            run.start(found)
            run.merge()
            digest = run.finish(reread=reread, write_card=write_card)
            run.publish(overwrite=overwrite)
    finally:
        if upload is not None:
            upload.close()
        journal.close()
        lock.release()
    return Result(
        output=folder.path,
        backend=executor.name,
        seconds=time.perf_counter() - started,
        shards=len(plan.shards),
        resumed=run.resumed,
        bytes_moved=run.moved,
        digest=digest,
        url=plan.url,
    )


def _finished_earlier(
    plan: Plan, folder: OutputFolder, upload: Upload | None, nan: str, started: float
) -> Result | None:
    """The result, if what is at the output is this very merge with all of its files."""
    try:
        record = manifest.read(folder.path) if upload is None else upload.record()
    except ClFastError:
        return None
    # What was made under "refuse" had nothing that a policy could change.
    if record.get("fingerprint") != plan.fingerprint or record["nan"] not in ("refuse", nan):
        return None
    sizes = upload.sizes() if upload is not None else None
    for entry in record["files"]:
        if sizes is not None:
            size = sizes.get(entry["name"])
        else:
            path = folder.path / str(entry["name"])
            size = path.stat().st_size if path.is_file() else None
        weights = "blake2b" not in entry  # a card may have been edited since
        if (weights and size != entry["size"]) or (size is None and "/" not in entry["name"]):
            return None
    return Result(
        output=folder.path,
        backend="none",
        seconds=time.perf_counter() - started,
        shards=len(plan.shards),
        resumed=len(plan.shards),
        bytes_moved=0,
        digest=str(record["digest"]),
        url=plan.url,
        earlier=True,
    )


def check_inputs(plan: Plan) -> None:
    """Raises CheckpointError when an input file is not as it was when the plan was made."""
    headers = {header.path: header for cp in plan.inputs for header in cp.files}
    urls = [path for path in headers if is_url(path)]
    for path, there in zip(urls, states_of(urls), strict=True):
        header = headers.pop(path)
        if there != State(header.file_size, header.mtime_ns, header.version):
            raise CheckpointError(
                f"{path}: was changed after it was planned (size {header.file_size} then, "
                f"{there.size} now); merge again when nothing writes to the inputs"
            )
    for header in headers.values():
        try:
            now = Path(header.path).stat()
        except OSError as error:
            raise CheckpointError(
                f"{header.path}: cannot be read any more: {error.strerror or error}"
            ) from error
        if (now.st_size, now.st_mtime_ns) != (header.file_size, header.mtime_ns):
            raise CheckpointError(
                f"{header.path}: was changed after it was planned (size {header.file_size} then, "
                f"{now.st_size} now); merge again when nothing writes to the inputs"
            )


def _check_arguments(
    threads: int | None,
    memory: int | None,
    io: str,
    nan: str,
    resume: bool,
    restart: bool,
    backend: str | None,
) -> None:
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1; got {threads}")
    if memory is not None and memory < MEMORY_LEAST:
        raise ValueError(f"memory must be at least {MEMORY_LEAST} bytes; got {memory}")
    for name, value, choices in (
        ("io", io, IO_MODES),
        ("nan", nan, NAN_POLICIES),
        ("backend", backend, (None, "native", "eager")),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")
    if resume and restart:
        raise ValueError("resume and restart contradict each other; give one of them")


def _check_output(plan: Plan, folder: OutputFolder, *, overwrite: bool) -> None:
    files = [header.path for checkpoint in plan.inputs for header in checkpoint.files]
    checkpoints = [*plan.inputs, plan.donor]
    folder.check(
        dict.fromkeys([*(checkpoint.path for checkpoint in checkpoints), *map(Path, files)]),
        dict.fromkeys([*(checkpoint.folder for checkpoint in checkpoints), plan.tokenizer_donor]),
        overwrite=overwrite,
    )


def _stamps(plan: Plan) -> list[list[Any]]:
    """Path, size and time of change of every input file."""
    stamps = {
        header.path: [header.path, header.file_size, header.mtime_ns]
        + ([header.version] if header.version else [])
        for checkpoint in plan.inputs
        for header in checkpoint.files
    }
    return list(stamps.values())


@dataclass(frozen=True, slots=True)
class _Unfinished:
    """What an earlier run of the same output left in the working folder."""

    start: dict[str, Any]
    codes: list[int] | None
    shards: dict[int, dict[str, Any]]
    uploaded: dict[str, State]
    publish: dict[str, Any] | None

    @classmethod
    def read(cls, journal: Journal, *, ignore_damage: bool) -> _Unfinished | None:
        """None when nothing was finished, so that there is nothing to lose or to continue."""
        by_kind: dict[str, list[dict[str, Any]]] = {}
        try:
            for event in journal.read():
                by_kind.setdefault(event.pop("event"), []).append(event)
        except OutputError:
            if not ignore_damage:
                raise
            return None
        shards = {event["shard"]: event for event in by_kind.get("shard", [])}
        if not shards or "start" not in by_kind:
            return None
        return cls(
            start=by_kind["start"][-1],
            codes=by_kind["thresholds"][-1]["codes"] if "thresholds" in by_kind else None,
            shards=shards,
            uploaded={
                event["filename"]: State(event["size"], event["mtime_ns"], event["version"])
                for event in by_kind.get("uploaded", [])
            },
            publish=by_kind["publish"][-1] if "publish" in by_kind else None,
        )

    def published(self, folder: OutputFolder, upload: Upload | None) -> bool:
        """Whether the output is the very folder that this run was about to move in, or upload."""
        if self.publish is None:
            return False
        if upload is not None:
            return upload.published(str(self.start["fingerprint"]))
        if not folder.path.is_dir():
            return False
        now = folder.path.stat()
        return (now.st_dev, now.st_ino) == (self.publish["device"], self.publish["inode"])

    def result(self, folder: OutputFolder, seconds: float, url: str | None) -> Result:
        """The result of a run that had only its tidying up left."""
        assert self.publish is not None
        return Result(
            output=folder.path,
            backend=self.publish["backend"],
            seconds=seconds,
            shards=len(self.shards),
            resumed=len(self.shards),
            bytes_moved=0,
            digest=self.publish["digest"],
            url=url,
        )

    def check(self, plan: Plan, folder: OutputFolder, nan: str, *, resume: bool) -> None:
        """Raises OutputError unless `plan` may go on from here."""
        where = f"{folder.path}: an unfinished merge ({len(self.shards)} of "
        where += f"{self.start['shards']} files of weights finished) is in {folder.work}"
        if not resume:
            raise OutputError(f"{where}; --resume continues it, --restart begins again")
        again = "; --restart begins again, or give another output folder"
        if self.start["format"] != FORMAT:
            raise OutputError(f"{where}, of another version of cl_fast{again}")
        if self.start["inputs"] != _stamps(plan):
            before = {stamp[0]: stamp for stamp in self.start["inputs"]}
            changed = [s[0] for s in _stamps(plan) if before.get(s[0]) != s] or ["their list"]
            raise OutputError(
                f"{where}, but the inputs are not those that it was reading: {changed[0]} "
                f"differs{again}"
            )
        if self.start["fingerprint"] != plan.fingerprint:
            raise OutputError(
                f"{where}, but it is of another recipe, seed, shard size or version{again}"
            )
        if self.start["nan"] not in ("refuse", nan):
            # A shard finished under "refuse" had nothing that a policy could change.
            raise OutputError(
                f"{where}, which runs with --nan {self.start['nan']} and cannot go on with --nan "
                f"{nan}{again}"
            )


class _Run:
    """One execution of a plan inside its working folder, whose lock is held."""

    def __init__(
        self,
        plan: Plan,
        folder: OutputFolder,
        journal: Journal,
        executor: Executor,
        nan: Nan,
        fsync: bool,
        progress: Progress | None,
        upload: Upload | None,
    ) -> None:
        self._plan = plan
        self._upload = upload
        self._folder = folder
        self._journal = journal
        self._executor = executor
        self._nan = nan
        self._fsync = fsync
        self._progress = progress
        self._finished: dict[int, list[TensorRecord]] = {}
        self._codes: list[int] | None = None
        self.resumed = 0
        self.moved = 0

    # ------------------------------------------------------------------------------ phases

    def start(self, found: _Unfinished | None) -> None:
        """Takes over what is finished, makes room for the rest, and reserves it."""
        folder, plan = self._folder, self._plan
        folder.model.mkdir(exist_ok=True)
        if found is not None:
            self._take_over(found)
        missing = [n for n in range(len(plan.shards)) if n not in self._finished]
        for number in missing:
            self._shard_path(number).unlink(missing_ok=True)
        beside = sum(sidecar.nbytes for sidecar in plan.sidecars)
        folder.check_space(sum(plan.shards[n].size for n in missing) + beside)
        if found is None:
            self._journal.append(
                "start",
                format=FORMAT,
                fingerprint=plan.fingerprint,
                shards=len(plan.shards),
                nan=self._nan,
                inputs=_stamps(plan),
            )
        elif found.start["nan"] != self._nan:
            self._journal.append("start", **{**found.start, "nan": self._nan})
        if self._upload is not None:
            kept = {} if found is None else found.uploaded
            here = {self._shard_path(number).name for number in self._finished}
            self._upload.begin({name: kept[name] for name in kept.keys() & here})
            for number in self._finished:
                self._upload.send(self._shard_path(number), self._journal)
        for number in missing:
            allocate(self._shard_path(number), plan.shards[number].size)

    def merge(self) -> None:
        """Computes every shard that is missing. While one is made durable the next is computed."""
        plan = self._plan
        missing = [n for n in range(len(plan.shards)) if n not in self._finished]
        if missing and plan.model_keep and self._codes is None:
            total = sum(_moved(plan, n) - _written(plan, n) for n in range(len(plan.shards)))
            with self._phase("thresholds", total) as tick:
                self._codes = self._executor.model_thresholds(plan, tick)
            self._journal.append("thresholds", codes=self._codes)
        with (
            self._phase("merge", sum(_moved(plan, n) for n in missing)) as tick,
            ThreadPoolExecutor(1, "cl_fast journal") as sealer,
            contextlib.closing(self._computed(missing, tick)) as shards,
        ):
            sealed: list[Future[None]] = []
            for number, records in shards:
                self.moved += _moved(plan, number)
                sealed.append(sealer.submit(self._seal, number, records))
                for future in sealed:
                    if future.done():
                        future.result()
                if self._upload is not None:
                    self._upload.check_sent()
            for future in sealed:
                future.result()
        if self._upload is not None:
            with self._phase("upload", self._upload.unsent) as tick:
                self._upload.wait(tick)

    def finish(self, *, reread: bool, write_card: bool) -> str:
        """Writes all that stands beside the weights, then checks the folder. Returns the digest."""
        plan, model = self._plan, self._folder.model
        records = [record for number in sorted(self._finished) for record in self._finished[number]]
        files: dict[str, tuple[int, str]] = {}

        def write(name: str, content: bytes) -> None:
            path = model / name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.write_bytes(content)
            except OSError as error:
                raise write_failure(path, error, len(content)) from error
            files[name] = len(content), blake2b(content, digest_size=16).hexdigest()

        for sidecar in plan.sidecars:
            try:
                content = sidecar.content
                if content is None:
                    content = sidecar.source.read_bytes()
            except OSError as error:
                raise CheckpointError(
                    f"{sidecar.source}: cannot be copied: {error.strerror or error}"
                ) from error
            write(sidecar.name, content)
        if plan.index is not None:
            write(INDEX_NAME, (json.dumps(plan.index, indent=2) + "\n").encode())
        summary = manifest.build(plan, records, codes=self._codes, nan=self._nan, files=files)
        if write_card:
            name = "README.md"
            write(name, card(self._folder.path.name, summary).encode())
            size, value = files[name]
            summary["files"].append({"name": name, "size": size, "blake2b": value})
        write(manifest.NAME, manifest.dump(summary))
        self._check_written(records, reread=reread)
        check_inputs(plan)
        if self._fsync:
            sync_tree(model)
        self._digest = str(summary["digest"])
        return self._digest

    def publish(self, *, overwrite: bool) -> None:
        """Moves the finished folder to the output path. After the rename nothing can fail."""
        now = self._folder.model.stat()
        self._journal.append(
            "publish",
            device=now.st_dev,
            inode=now.st_ino,
            backend=self._executor.name,
            digest=self._digest,
        )
        if self._upload is not None:
            self._upload.finish(self._folder.model, [s.filename for s in self._plan.shards])
            self._journal.close()
            self._folder.discard()
            with contextlib.suppress(OSError):
                self._folder.path.parent.rmdir()
            return
        try:
            self._folder.publish(overwrite=overwrite, fsync=self._fsync)
        except OSError as error:
            raise write_failure(self._folder.path, error) from error
        self._journal.close()
        self._folder.discard()

    @contextlib.contextmanager
    def cleanup(self) -> Iterator[None]:
        """After a failure: keeps finished shards where `resume` can use them, else nothing."""
        try:
            yield
        except BaseException as error:
            failure = error
            if isinstance(error, KeyboardInterrupt):
                failure = Interrupted("interrupted")
            useful = isinstance(error, OSError | NonFiniteError | StoreError | KeyboardInterrupt)
            self._folder.recover()
            if self._finished and useful:
                for number in range(len(self._plan.shards)):
                    if number not in self._finished:
                        self._shard_path(number).unlink(missing_ok=True)
                failure.add_note(
                    f"{len(self._finished)} of {len(self._plan.shards)} files of weights are "
                    f"finished and kept in {self._folder.work}: run again with --resume to "
                    "continue, or with --restart to begin again"
                )
            else:
                self._journal.close()
                if self._upload is not None:
                    self._upload.close()
                    self._upload.abandon()
                self._folder.discard()
                failure.add_note("nothing was kept; the output path is as it was")
            if failure is error:
                raise
            raise failure from error

    # ------------------------------------------------------------------------------ pieces

    def _shard_path(self, number: int) -> Path:
        return self._folder.model / self._plan.shards[number].filename

    def _take_over(self, found: _Unfinished) -> None:
        """Accepts the finished shards whose bytes are still those that were journalled."""
        plan = self._plan
        self._codes = found.codes
        total = sum(plan.shards[number].size for number in found.shards)
        with self._phase("verify", total) as tick:
            for number, event in sorted(found.shards.items()):
                records = [TensorRecord.from_json(values) for values in event["records"]]
                try:
                    self._check_shard(number, records, tick)
                except ClFastError:
                    continue  # damaged since: it is computed again, to the same bytes
                self._finished[number] = records
        self.resumed = len(self._finished)

    def _computed(
        self, missing: Sequence[int], tick: Callable[[int], None]
    ) -> Generator[tuple[int, list[TensorRecord]], None, None]:
        """Shards as they become whole: one after the other by this process, or as they come."""
        if isinstance(self._executor, SpreadExecutor):
            jobs = [self._begin(number) for number in missing]
            yield from self._executor.write_shards(jobs, self._codes, tick)
            return
        for number in missing:
            job = self._begin(number)
            yield number, self._executor.write(job.tensors, job.path, self._codes, tick)

    def _begin(self, number: int) -> ShardJob:
        """Writes a shard's header."""
        plan, shard, path = self._plan, self._plan.shards[number], self._shard_path(number)
        try:
            with path.open("r+b", buffering=0) as file:
                file.write(shard.header)
        except OSError as error:
            raise write_failure(path, error, shard.size) from error
        return ShardJob(number, tuple(plan.tensors[i] for i in shard.tensors), path)

    def _seal(self, number: int, records: list[TensorRecord]) -> None:
        """Makes a shard durable and then says so in the journal, in that order."""
        path = self._shard_path(number)
        if self._fsync:
            try:
                sync_file(path)
            except OSError as error:
                raise write_failure(path, error) from error
        try:
            self._journal.append(
                "shard",
                shard=number,
                filename=path.name,
                size=self._plan.shards[number].size,
                records=[record.to_json() for record in records],
            )
        except OSError as error:
            raise write_failure(self._journal.path, error) from error
        self._finished[number] = records
        if self._upload is not None:
            self._upload.send(path, self._journal)

    def _check_written(self, records: Sequence[TensorRecord], *, reread: bool) -> None:
        """The finished folder through the eyes of a reader."""
        plan, model = self._plan, self._folder.model
        written = Checkpoint.open(model)
        for tensor in plan.tensors:
            info = written.tensors.get(tensor.name)
            if info is None or (info.dtype, info.shape) != (tensor.dtype, tensor.shape):
                raise VerifyError(f"{model}: tensor {tensor.name} was not written as planned")
        by_name = {record.name: record for record in records}
        total = sum(shard.size for shard in plan.shards) if reread else 0
        with self._phase("verify", total) as tick:
            for number, shard in enumerate(plan.shards):
                tensors = [by_name[plan.tensors[i].name] for i in shard.tensors]
                self._check_shard(number, tensors if reread else [], tick)
                if reread and self._upload is not None:
                    self._upload.check_file(
                        shard.filename,
                        [(plan.tensors[i].offset, plan.tensors[i].nbytes) for i in shard.tensors],
                        [record.crc64 for record in tensors],
                    )

    def _check_shard(
        self, number: int, records: Sequence[TensorRecord], tick: Callable[[int], None]
    ) -> None:
        """Size and header of a shard, and the checksums of `records`."""
        shard, path = self._plan.shards[number], self._shard_path(number)
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                header = file.read(len(shard.header))
        except OSError as error:
            raise VerifyError(f"{path}: cannot be read back: {error.strerror}") from error
        if size != shard.size or header != shard.header:
            raise VerifyError(f"{path}: size or header are not as written; is the disk sound?")
        tensors = {self._plan.tensors[i].name: self._plan.tensors[i] for i in shard.tensors}
        for record in records:
            tensor = tensors[record.name]
            if crc64_of_file(path, tensor.offset, tensor.nbytes) != record.crc64:
                raise VerifyError(
                    f"{path}: tensor {record.name} reads back differently from what was written; "
                    "is the disk sound?"
                )
            tick(tensor.nbytes)

    @contextlib.contextmanager
    def _phase(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        done = 0

        def tick(more: int) -> None:
            nonlocal done
            done = min(done + more, total)
            if self._progress is not None:
                self._progress(name, done, total)

        if total:
            tick(0)
        yield tick
        if total:
            tick(total)


def _written(plan: Plan, number: int) -> int:
    return sum(plan.tensors[i].nbytes for i in plan.shards[number].tensors)


def _moved(plan: Plan, number: int) -> int:
    """Bytes of a shard's tensors and of all that they are made from, each once."""
    return sum(
        plan.tensors[i].nbytes + sum(source.stored for _, source in sources(plan.tensors[i]))
        for i in plan.shards[number].tensors
    )


def check_output(plan: Plan, *, overwrite: bool) -> None:
    """The checks on the output that need no writing, as `execute` begins with them."""
    _check_output(plan, OutputFolder(plan.output), overwrite=overwrite)
    if plan.url is not None:
        Upload(plan.url, plan.fingerprint).check(overwrite=overwrite, again=True)


def read_bandwidth(plan: Plan, seconds: float = 0.25) -> float | None:
    """Bytes per second at which the inputs can be read now, from a quarter second of reading.

    Pieces from all over the inputs are read, so what the page cache holds and what it does not
    weigh in as they will in the merge. None where there is nothing to read.
    """
    piece = 4 << 20
    files = {
        header.path: header.file_size
        for cp in plan.inputs
        for header in cp.files
        if not is_url(header.path)
    }
    places = [
        (path, offset) for path, size in files.items() for offset in range(0, size, 8 * piece)
    ]
    if not places:
        return None
    random.Random(0).shuffle(places)
    buffer = bytearray(piece)
    read = 0
    started = time.perf_counter()
    for path, offset in places:
        with Path(path).open("rb", buffering=0) as file:
            file.seek(offset)
            read += file.readinto(buffer)
        if time.perf_counter() - started > seconds:
            break
    return read / max(time.perf_counter() - started, 1e-9)
