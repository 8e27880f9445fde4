"""The journal of a merge in progress: what is finished, so that `--resume` can go on from there.

One JSON object a line in ``journal.jsonl`` inside the hidden working folder, appended and fsynced
when a shard's bytes are on disk. A line is finished by its newline: a process killed while
writing leaves at most one unfinished line, which reading ignores. The kinds, by their ``event``:

    start       format, fingerprint of the plan, numerics, nan policy, inputs (path, size, mtime_ns)
    thresholds  codes (one list per threshold group of a model-wide trim)
    shard       shard (number), filename, size, records (one per tensor: crc64, sources, ...)
    publish     device and inode of the finished folder, written just before it is renamed

The working folder also carries the lock that keeps two merges out of one output.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from cl_fast.errors import OutputError

__all__ = ["FORMAT", "Journal", "TensorRecord", "WorkLock"]

FORMAT = 1
NAME = "journal.jsonl"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """What a finished tensor left behind; CRCs are CRC-64/NVME of the stored bytes.

    name: the output tensor.
    crc64: of the output's bytes.
    sources: of every input's bytes, the base first (when there is one), then the terms in order.
    nonfinite: NaN or infinite elements seen in each of those inputs, then in the output; empty if
        there were none.
    """

    name: str
    crc64: int
    sources: tuple[int, ...]
    nonfinite: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Checksums as hexadecimal text: JSON numbers are not safe above 2**53 everywhere."""
        values = dataclasses.asdict(self)
        values["crc64"] = f"{self.crc64:016x}"
        values["sources"] = [f"{crc:016x}" for crc in self.sources]
        return {key: value for key, value in values.items() if value not in ((), [])}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TensorRecord:
        return cls(
            name=values["name"],
            crc64=int(values["crc64"], 16),
            sources=tuple(int(crc, 16) for crc in values["sources"]),
            nonfinite=tuple(values.get("nonfinite", ())),
        )


class Journal:
    """Appends events to, and reads them from, the journal of one working folder."""

    def __init__(self, folder: Path, *, fsync: bool = True) -> None:
        self.path = folder / NAME
        self._fsync = fsync
        self._file: BinaryIO | None = None

    def read(self) -> list[dict[str, Any]]:
        """Every finished event, in order; an unfinished last line is left out.

        Raises OutputError for a line in the middle that is not JSON: the file was damaged, so
        nothing that it says can be trusted.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        lines = data.split(b"\n")[:-1]
        events = []
        for number, line in enumerate(lines, 1):
            try:
                event = json.loads(line)
                if not isinstance(event, dict) or not isinstance(event.get("event"), str):
                    raise ValueError("not an event")
            except ValueError as error:
                raise OutputError(
                    f"{self.path}: line {number} is damaged, so the unfinished merge cannot be "
                    "continued; start again with --restart"
                ) from error
            events.append(event)
        return events

    def append(self, event: str, **values: Any) -> None:
        """Writes one event and, unless fsync is off, waits until it is on disk."""
        line = json.dumps({"event": event, **values}, ensure_ascii=False) + "\n"
        if self._file is None:
            self._drop_unfinished_line()
            self._file = self.path.open("ab", buffering=0)
        self._file.write(line.encode())
        if self._fsync:
            os.fsync(self._file.fileno())

    def _drop_unfinished_line(self) -> None:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return
        finished = data.rfind(b"\n") + 1
        if finished < len(data):
            os.truncate(self.path, finished)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class WorkLock:
    """An exclusive flock inside the working folder, held for the length of a merge.

    The kernel drops it when the process ends in whatever way, so a killed merge never leaves a
    stale lock behind.
    """

    def __init__(self, folder: Path, output: Path) -> None:
        self._path = folder / "lock"
        self._output = output
        self._fd = -1

    def acquire(self) -> None:
        """Raises OutputError when another process holds it."""
        try:
            import fcntl
        except ImportError:  # not a POSIX system: no flock, so no protection from a second merge
            return
        busy = OutputError(
            f"{self._output}: another run is writing this output now; wait for it to finish or "
            "give another output folder"
        )
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us may have finished and removed the folder between our open and
            # our lock: then this lock is on a file that nobody else can see.
            here = self._path.stat()
            mine = os.fstat(fd)
            if (here.st_dev, here.st_ino) != (mine.st_dev, mine.st_ino):
                raise busy
        except OSError as error:
            os.close(fd)
            if error is busy or error.errno in (errno.EAGAIN, errno.EACCES, errno.ENOENT):
                raise busy from None
            raise
        self._fd = fd

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
