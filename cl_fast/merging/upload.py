"""Outputs at URLs: built in a local working folder, uploaded file by file as each is sealed.

    marker -> weight files, as they are finished -> side files -> index -> record; marker away

A reader that waits for the record (``cl_fast_merge.json``), or for the index of a checkpoint in
several files, never sees a part of a model. The marker, an object beside them, says that an upload
is unfinished; writing it shows before any work whether one may write there. What was uploaded is in
the journal, so `resume` uploads only what is missing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_fast.checkpoints.checkpoint import INDEX_NAME
from cl_fast.checkpoints.remote import (
    State,
    cache_folder,
    check_url,
    fetch,
    filesystem,
    list_folder,
    name_of,
    state_of,
    telling,
)
from cl_fast.errors import ClFastError, OutputError, VerifyError
from cl_fast.merging import manifest

if TYPE_CHECKING:
    from cl_fast.merging.journal import Journal

__all__ = ["MARKER", "Upload", "staging"]

MARKER = "cl_fast_unfinished.json"
"""The object that is there as long as an upload is unfinished."""

_PART = 16 << 20
"""Bytes of one part of an object of S3; ten are on their way, and 10,000 are the most there are."""


def staging(url: str) -> Path:
    """The local folder in which the output for a URL is built; the same for every run.

    Raises OutputError for a URL that carries credentials, or names no folder inside a store.
    """
    check_url(url, OutputError, "output")
    store, path = filesystem(url, OutputError)
    if not str(store._parent(path)).strip("/") and not url.startswith("memory:"):
        raise OutputError(
            f"{url}: is the root of a store; name a folder in it, as {url.rstrip('/')}/merged"
        )
    digest = blake2b(url.rstrip("/").encode(), digest_size=8).hexdigest()
    return cache_folder() / "outputs" / digest / name_of(url)


class Upload:
    """The upload of one output. `fingerprint`: of the plan."""

    def __init__(self, url: str, fingerprint: str) -> None:
        self.url = url.rstrip("/")
        self._fingerprint = fingerprint
        self._store, self._path = filesystem(self.url, OutputError)
        self._s3 = self.url.startswith(("s3:", "s3a:"))
        self._stale: set[str] = set()
        self._put = list[str]()
        self._begun = False
        self._kept: dict[str, State] = {}
        self._there: dict[str, State] = {}
        self._sending: list[tuple[int, Future[None]]] = []
        self._pool = ThreadPoolExecutor(2, "cl_fast upload")

    # --------------------------------------------------------------------------- before any work

    def check(self, *, overwrite: bool, again: bool) -> None:
        """Looks at what is there.

        Args:
            overwrite: it may be replaced.
            again: an unfinished upload of any plan may be replaced, or continued if of this one.

        Raises OutputError where something is there that may not be replaced, or one cannot look.
        """
        there = self._entries()
        marker = MARKER in there
        if there and not overwrite:
            if not marker:
                raise OutputError(
                    f"{self.url}: the output exists and is not empty; give another URL, or "
                    "--overwrite to replace it"
                )
            if not again:
                raise OutputError(
                    f"{self.url}: an unfinished upload is there ({MARKER}); --resume continues it "
                    "on the machine that began it, --restart begins again"
                )
        self._stale = there - {MARKER}

    def _entries(self) -> set[str]:
        """Names of files and folders at the URL."""
        listing = list_folder(self.url, OutputError)
        if listing.only is not None:
            raise OutputError(f"{self.url}: is a file; give the URL of a folder")
        found = set(listing.files)
        with telling(self.url, "listed", OutputError), contextlib.suppress(FileNotFoundError):
            for entry in self._store.ls(self._path, detail=True):
                found.add(str(entry["name"]).rstrip("/").rpartition("/")[2])
        return found - {"", name_of(self.url)} | (set(listing.files) & {name_of(self.url)})

    def begin(self, kept: Mapping[str, State]) -> None:
        """Writes the marker, and takes away what would make an old output look complete.

        `kept`: files that an earlier run of this plan uploaded; those that are still there as they
        were are not uploaded again.
        """
        content = {"what": "an unfinished upload of cl_fast", "fingerprint": self._fingerprint}
        with telling(self.url, "written", OutputError):
            self._make_folder()
            self._store.pipe_file(f"{self._path}/{MARKER}", json.dumps(content).encode())
        self._begun = True
        for name in (manifest.NAME, INDEX_NAME):
            if name in self._stale:
                self._remove(name)
        present = list_folder(self.url, OutputError).files
        self._kept = {name: state for name, state in kept.items() if present.get(name) == state}
        self._there = dict(self._kept)

    def _make_folder(self) -> None:
        # Stores of objects have no folders; local and memory file systems do.
        if not self._s3:
            self._store.makedirs(self._path, exist_ok=True)

    # ------------------------------------------------------------------------------------ the work

    def send(self, path: Path, journal: Journal) -> None:
        """Begins the upload of a sealed file of weights; `journal` hears when it is there."""

        def work() -> None:
            if path.name not in self._kept:
                there = self.put(path, path.name)
                journal.append(
                    "uploaded",
                    filename=path.name,
                    size=there.size,
                    mtime_ns=there.mtime_ns,
                    version=there.version,
                )

        self._sending.append((path.stat().st_size, self._pool.submit(work)))

    def check_sent(self) -> None:
        """Raises OutputError where an upload has failed already."""
        for _, future in self._sending:
            if future.done():
                future.result()

    @property
    def unsent(self) -> int:
        """Bytes of the files whose upload has not ended."""
        return sum(size for size, future in self._sending if not future.done())

    def wait(self, tick: Callable[[int], None]) -> None:
        """Waits for all uploads. `tick` hears of the bytes of each that had not ended."""
        for size, future in [pair for pair in self._sending if not pair[1].done()]:
            future.result()
            tick(size)
        self.check_sent()

    def close(self) -> None:
        """Begins no further upload, and waits for those that are on their way."""
        self._pool.shutdown(cancel_futures=True)

    def put(self, path: Path, name: str) -> State:
        """Uploads one file. Raises OutputError."""
        size = path.stat().st_size
        options: dict[str, Any] = {}
        if self._s3:
            options["chunksize"] = max(_PART, -(-size // 9_000))
        url = f"{self.url}/{name}"
        with telling(url, "written", OutputError):
            if "/" in name and not self._s3:
                self._store.makedirs(f"{self._path}/{name.rpartition('/')[0]}", exist_ok=True)
            self._store.put_file(str(path), f"{self._path}/{name}", **options)
        self._put.append(name)
        there = state_of(url, OutputError)
        if there.size != size:
            raise OutputError(
                f"{url}: has {there.size} bytes after the upload of {size}; run again with --resume"
            )
        self._there[name] = there
        return there

    def finish(self, folder: Path, weights: Iterable[str]) -> None:
        """Uploads all but the weights, index and record last, and takes the rest away."""
        done = set(weights)
        names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - done
        last = [name for name in (INDEX_NAME, manifest.NAME) if name in names]
        for name in [*sorted(names.difference(last)), *last[:-1]]:
            self.put(folder / name, name)
        self._refuse_foreign(done)
        for name in sorted(self._stale - names - done):
            self._remove(name)
        self.put(folder / last[-1], last[-1])
        self._remove(MARKER)

    def _refuse_foreign(self, weights: Iterable[str]) -> None:
        """Raises OutputError where another merge wrote to the URL meanwhile."""
        present = list_folder(self.url, OutputError).files
        foreign = [n for n in sorted(weights) if _differ(present.get(n), self._there[n])]
        if MARKER not in present or self._json(MARKER).get("fingerprint") != self._fingerprint:
            foreign.insert(0, MARKER)
        if foreign:
            raise OutputError(
                f"{self.url}/{foreign[0]}: was changed during the upload, by another merge to this "
                "URL; give each its own, and run again with --resume --overwrite"
            )

    def check_file(
        self, name: str, places: Iterable[tuple[int, int]], checksums: Iterable[int]
    ) -> None:
        """Reads an uploaded file back. Raises VerifyError where it is not what was sent."""
        from cl_fast.merging.checksum import crc64

        for (offset, nbytes), expected in zip(places, checksums, strict=True):
            if crc64(fetch(f"{self.url}/{name}", offset, nbytes)) != expected:
                raise VerifyError(
                    f"{self.url}/{name}: bytes {offset} to {offset + nbytes} read back differently "
                    "from what was uploaded; upload again with --restart"
                )

    def published(self, fingerprint: str) -> bool:
        """Whether the output of the plan with this fingerprint is there, complete."""
        try:
            return self.record().get("fingerprint") == fingerprint
        except ClFastError:
            return False

    def record(self) -> dict[str, Any]:
        """The record of the complete output that is there; empty where none is.

        Raises OutputError where one cannot look.
        """
        entries = self._entries()
        if manifest.NAME not in entries or MARKER in entries:
            return {}
        return self._json(manifest.NAME)

    def sizes(self) -> dict[str, int]:
        """The sizes in bytes of the files at the URL. Raises OutputError."""
        files = list_folder(self.url, OutputError).files
        return {name: state.size for name, state in files.items()}

    def _json(self, name: str) -> dict[str, Any]:
        """A small JSON file at the URL; empty where it is none. Raises OutputError."""
        with telling(f"{self.url}/{name}", "read", OutputError):
            content = self._store.cat_file(f"{self._path}/{name}")
        try:
            found = json.loads(content)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def abandon(self) -> None:
        """Takes away what this run uploaded, as far as the store lets it.

        What stood there before and was replaced is lost; `overwrite` says so.
        """
        if self._begun:
            for name in [*self._put, MARKER]:
                with contextlib.suppress(OutputError):
                    self._remove(name)

    def _remove(self, name: str) -> None:
        path = f"{self._path}/{name}"
        with (
            telling(f"{self.url}/{name}", "removed", OutputError),
            contextlib.suppress(FileNotFoundError),
        ):
            if self._store.isfile(path):
                self._store.rm_file(path)


def _differ(now: State | None, then: State) -> bool:
    """Whether a file is another one; by its tag, where the store gives one."""
    if now is None or now.size != then.size:
        return True
    if now.version and then.version:
        return now.version != then.version
    return 0 not in (now.mtime_ns, then.mtime_ns) and now.mtime_ns != then.mtime_ns
