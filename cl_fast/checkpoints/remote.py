"""Checkpoints at URLs, through fsspec: ``s3://``, ``gs://``, ``hf://``, ``memory://``, ...

Small files (config, tokenizer, index, code) are kept in a local cache, by the version that the
store tells of them. Of weights only headers are read, by ranges; a tensor is fetched by its range
when it is needed, in pieces side by side. So a remote :class:`Checkpoint` has a local ``path`` with
all but the weights, and tensors whose ``path`` is a URL.

Credentials are found as the store's own library finds them (environment, profile, instance role);
a URL that carries some is refused, because a URL is written into records and messages.

The cache is ``$CL_FAST_CACHE``, or ``cl_fast`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from cl_fast.checkpoints.checkpoint import Checkpoint
from cl_fast.checkpoints.safetensors import MAX_HEADER_BYTES
from cl_fast.errors import CheckpointError, ClFastError

__all__ = [
    "Listing",
    "State",
    "StoreError",
    "cache_folder",
    "check_url",
    "download_whole",
    "fetch",
    "filesystem",
    "is_url",
    "list_folder",
    "local_path",
    "name_of",
    "open_checkpoint",
    "open_shadow",
    "redacted",
    "shadow",
    "state_of",
    "states_of",
    "telling",
]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://", re.ASCII)
_WEB = ("http", "https", "ftp", "sftp", "ssh", "webhdfs", "hdfs")
"""Protocols whose URLs may name a port."""
_SECRET = re.compile(r"token|sig|secret|password|credential|key", re.IGNORECASE)

#: What is not copied to the cache: weights of any kind. Their names alone tell enough.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack")
_LARGEST_SMALL_FILE = 256_000_000

_PIECE = 16 << 20
"""Bytes of one request. Large enough that its latency does not count, small enough to share."""

_CONNECTIONS = 16
_HEADER_GUESS = 256 << 10

#: A store that does not answer is given up after about half a minute, not after many.
_S3_BOUNDS = {
    "connect_timeout": 10,
    "read_timeout": 60,
    "retries": {"max_attempts": 3, "mode": "standard"},
}


class StoreError(CheckpointError):
    """A store did not give what it was asked for; it may do so later."""


@dataclass(frozen=True, slots=True)
class State:
    """What a store tells of a file: size, time of change (0: unknown), and a tag of its content."""

    size: int
    mtime_ns: int
    version: str


@dataclass(frozen=True, slots=True)
class Listing:
    """The files below a URL: ``files`` by name relative to the folder ``url``.

    ``only`` is the name of the file, where the URL asked for is that of one file.
    """

    url: str
    files: dict[str, State]
    only: str | None


# -------------------------------------------------------------------------------------- URLs


def is_url(reference: str | os.PathLike[str]) -> bool:
    """Whether this names something at a URL (``file://`` too) and not a path."""
    return isinstance(reference, str) and _URL.match(reference) is not None


def local_path(url: str) -> str | None:
    """The path that a ``file://`` URL means; ``None`` for other URLs."""
    for start in ("file://", "local://"):
        if url.startswith(start):
            return url.removeprefix(start) or "/"
    return None


def name_of(url: str) -> str:
    """The last component of a URL."""
    return url.rstrip("/").rpartition("/")[2]


def redacted(url: str) -> str:
    """The URL without secrets, query and fragment, for messages."""
    scheme, _, rest = url.partition("://")
    place = re.split(r"[?#]", rest, maxsplit=1)[0]
    if _has_user_secret(scheme, rest):
        place = re.split(r"[?#]", rest.rpartition("@")[2], maxsplit=1)[0]
    return f"{scheme}://{place}"


def _has_user_secret(scheme: str, rest: str) -> bool:
    """Whether USER:PASSWORD@ or TOKEN@ is before the host; a secret may hold '/', '?' and '#'."""
    first = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, at, _ = first.rpartition("@")
    if at:
        return ":" in user or scheme.lower() in ("http", "https")
    word = first.rpartition(":")
    return "@" in rest and word[1] == ":" and not (scheme.lower() in _WEB and word[2].isdigit())


def check_url(url: str, error: type[ClFastError] = CheckpointError, key: str | None = None) -> None:
    """Raises `error` for a URL that carries a secret, or names no folder of a store."""
    prefix = f"{key}: " if key else ""
    scheme, _, rest = url.partition("://")
    try:
        parts = urlsplit(url)
    except ValueError:  # whose text may repeat a secret
        raise error(f"{prefix}{redacted(url)}: is no URL; check what follows ://") from None
    named = any(_SECRET.search(name) for name, _ in parse_qsl(f"{parts.query}&{parts.fragment}"))
    if named or _has_user_secret(scheme, rest):
        raise error(
            f"{prefix}{redacted(url)}: carries credentials in the URL, which would end up in "
            "records and messages; give them as the store's library takes them (for s3 "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile) and leave them out of it"
        )
    if parts.query or parts.fragment:
        raise error(
            f"{prefix}{redacted(url)}: what follows '?' or '#' in the URL has no meaning here; "
            "leave it out"
        )
    if not parts.netloc and not parts.path.strip("/"):
        raise error(f"{prefix}{redacted(url)}: names no folder")


def filesystem(url: str, error: type[ClFastError] = CheckpointError) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Raises:
        CheckpointError (or `error`): fsspec or the store's library is not installed, or nobody
            knows the protocol.
    """
    check_url(url, error)
    return _filesystem(url.partition("://")[0].lower(), url, error)


def _filesystem(protocol: str, url: str, error: type[ClFastError]) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError as missing:
        raise error(
            f"{redacted(url)}: URLs need fsspec, which is not installed; pip install "
            "'cl_fast[remote]'"
        ) from missing
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as missing:
        raise error(
            f"{redacted(url)}: {missing} (protocol {protocol}://; pip install {_library(missing)})"
        ) from None
    except ValueError:
        known = ", ".join(f"{name}://" for name in ("s3", "gs", "az", "hf", "https", "memory"))
        raise error(
            f"{redacted(url)}: nobody here knows the protocol {protocol}://; {known} and all that "
            "fsspec lists are known"
        ) from None
    options: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):
        options["config_kwargs"] = _S3_BOUNDS
    with telling(url, "opened", error):
        made, path = fsspec.core.url_to_fs(url, **options)
        return made, str(path)


def _library(missing: ImportError) -> str:
    """The package that fsspec says to install."""
    found = re.search(r"[Ii]nstall (?:the )?[\"'`]?([A-Za-z0-9_.-]+)", str(missing))
    return found[1].rstrip(".") if found else "the library that it names"


@contextmanager
def telling(url: str, done: str, error: type[ClFastError] = CheckpointError) -> Iterator[None]:
    """What a store's library raises, as one of our errors; no text of it is repeated."""
    try:
        yield
    except ClFastError:
        raise
    except Exception as cause:
        place, code = redacted(url), _code_of(cause)
        if isinstance(cause, PermissionError) or code in ("403", "401", "InvalidAccessKeyId"):
            words = (
                f"access is denied{f' ({code})' if code else ''}; check the credentials that the "
                "store's library finds (for s3 AWS_ACCESS_KEY_ID or AWS_PROFILE), and what they "
                "may do"
            )
        elif type(cause).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
            words = (
                "no credentials were found; set them in the environment (for s3 "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
            )
        elif code == "NoSuchBucket":
            words = "there is no such bucket"
        elif isinstance(cause, FileNotFoundError):
            words = f"nothing is there{f' ({code})' if code else ''}"
        elif _unreachable(cause):
            words = (
                f"the store cannot be reached ({type(cause).__name__}); check network and endpoint "
                "(for s3 AWS_ENDPOINT_URL)"
            )
        else:
            words = f"cannot be {done} ({type(cause).__name__}{f', {code}' if code else ''})"
        kind = StoreError if error is CheckpointError else error
        raise kind(f"{place}: {words}") from cause


def _code_of(cause: BaseException | None) -> str:
    """The code that a store's answer had."""
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        status = getattr(cause, "status", None)
        if isinstance(status, int):
            return str(status)
        cause = cause.__cause__ or cause.__context__
    return ""


def _unreachable(cause: BaseException | None) -> bool:
    names = ("EndpointConnectionError", "ConnectTimeoutError", "FSTimeoutError", "ClientConnector")
    while cause is not None:
        if isinstance(cause, ConnectionError | TimeoutError):
            return True
        if type(cause).__name__.startswith(names):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


# ------------------------------------------------------------------------------------ reading


def state_of(url: str, error: type[ClFastError] = CheckpointError) -> State:
    """What the store says of a file now. Raises `error` where it is not there."""
    store, path = filesystem(url, error)
    with telling(url, "read", error):
        store.invalidate_cache()
        return _state(store.info(path))


def states_of(urls: Sequence[str]) -> list[State]:
    """`state_of` of many files, asked for side by side."""
    if not urls:
        return []
    with ThreadPoolExecutor(_CONNECTIONS, "cl_fast states") as pool:
        return list(pool.map(state_of, urls))


def _state(info: dict[str, Any]) -> State:
    version = next(
        (
            str(info[key])
            for key in (
                "ETag",
                "etag",
                "generation",
                "blob_id",
                "md5Hash",
                "content_md5",
                "Content-MD5",
                "Digest",
                "Last-Modified",
            )
            if info.get(key)
        ),
        "",
    )
    changed = next(
        (
            info[key]
            for key in ("LastModified", "mtime", "last_modified", "updated", "modified", "created")
            if info.get(key)
        ),
        0,
    )
    if isinstance(changed, str):
        try:
            changed = datetime.fromisoformat(changed)
        except ValueError:
            changed = 0
    if isinstance(changed, datetime):
        changed = changed.timestamp()
    # A store may tell one time to the second and the other to the millisecond; its tag says more.
    mtime_ns = int(changed) * 10**9 if version else int(changed * 1e9)
    return State(int(info.get("size") or 0), mtime_ns, version)


def list_folder(url: str, error: type[ClFastError] = CheckpointError) -> Listing:
    """The files at a URL and in its folder of chat templates; none where nothing is there.

    Raises:
        CheckpointError (or `error`): the store cannot be asked.
    """
    store, path = filesystem(url, error)
    url = url.rstrip("/")
    files: dict[str, State] = {}
    only = None
    with telling(url, "listed", error):
        store.invalidate_cache()
        try:
            entries = store.ls(path, detail=True)
        except FileNotFoundError as missing:
            if _code_of(missing) == "NoSuchBucket":
                raise
            return Listing(url, {}, None)
        if not entries and store.isfile(path):  # a page that links to nothing (https)
            entries = [store.info(path)]
        if len(entries) == 1 and entries[0]["type"] == "file":
            name = str(entries[0]["name"]).rstrip("/")
            if name.rpartition("/")[2] == name_of(url) and store.isfile(path):
                only = name_of(url)
                url = url.rpartition("/")[0]
                entries = store.ls(store._parent(path), detail=True)
        for entry in _sized(store, url, entries, error):
            name = str(entry["name"]).rstrip("/").rpartition("/")[2]
            if entry["type"] == "file" and name:
                files[name] = _state(entry)
            elif name == "additional_chat_templates":
                for below in _sized(store, url, store.ls(entry["name"], detail=True), error):
                    if below["type"] == "file":
                        inner = str(below["name"]).rpartition("/")[2]
                        files[f"{name}/{inner}"] = _state(below)
    return Listing(url, files, only)


def _sized(
    store: Any, url: str, entries: Sequence[dict[str, Any]], error: type[ClFastError]
) -> list[dict[str, Any]]:
    """A listing with the sizes that it leaves out (https), asked for file by file."""

    def told(entry: dict[str, Any]) -> dict[str, Any]:
        if entry["type"] != "file" or entry.get("size") is not None:
            return entry
        found: dict[str, Any] = {**entry, **store.info(entry["name"])}
        if found.get("size") is None:
            raise error(
                f"{redacted(url)}: the server does not tell the size of "
                f"{name_of(str(entry['name']))}; download the model and give its folder"
            )
        return found

    if all(entry.get("size") is not None for entry in entries):
        return list(entries)
    with ThreadPoolExecutor(_CONNECTIONS, "cl_fast sizes") as pool:
        return list(pool.map(told, entries))


def fetch(url: str, offset: int, nbytes: int) -> bytearray:
    """Bytes of a file at a URL, in pieces side by side.

    Raises:
        CheckpointError: they cannot be read, or the file ends before.
    """
    store, path = filesystem(url)
    data = bytearray(nbytes)
    view = memoryview(data)

    def piece(start: int) -> None:
        end = min(start + _PIECE, nbytes)
        with telling(url, "read"):
            got = store.cat_file(path, start=offset + start, end=offset + end)
        if len(got) > end - start:
            raise CheckpointError(
                f"{redacted(url)}: the server sends whole files where parts are asked for (no HTTP "
                "ranges); download the model and give its folder"
            )
        if len(got) != end - start:
            raise CheckpointError(
                f"{redacted(url)}: ended after {start + len(got)} of {nbytes} bytes of a tensor at "
                f"offset {offset}; the file is truncated or was changed while it was read"
            )
        view[start:end] = got

    starts = range(0, nbytes, _PIECE)
    if len(starts) <= 1:
        for start in starts:
            piece(start)
    else:
        for _ in _pieces_pool().map(piece, starts):
            pass
    return data


@lru_cache(maxsize=1)
def _pieces_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_CONNECTIONS, "cl_fast fetch")


# -------------------------------------------------------------------------------- checkpoints


def cache_folder() -> Path:
    """Where small files of remote checkpoints, and unfinished remote outputs, are kept."""
    own = os.environ.get("CL_FAST_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "cl_fast"


def open_checkpoint(url: str, *, key: str | None = None) -> Checkpoint:
    """As :meth:`Checkpoint.open`, for a URL; ``path`` is the local copy of all but the weights.

    Raises:
        CheckpointError: the store cannot be asked, or what is there is no checkpoint.
    """
    path = local_path(url)
    if path is not None:
        return Checkpoint.open(path, key=key)
    with shadow(url, key=key) as (place, listing, kept):
        return open_shadow(url, place, listing, kept, key=key)


def open_shadow(
    url: str, place: Path, listing: Listing, kept: Path, *, key: str | None = None
) -> Checkpoint:
    """The checkpoint of a :func:`shadow`."""
    written = listing.url if listing.only is None else f"{listing.url}/{listing.only}"
    try:
        opened = Checkpoint.open(str(place), key=key)
    except CheckpointError as error:
        folder = place if listing.only is None else place.parent
        words = str(error).replace(str(place), written).replace(str(folder), listing.url)
        raise CheckpointError(words) from None

    def moved(path: str) -> str:
        return f"{listing.url}/{Path(path).name}"

    tensors = {name: info._replace(path=moved(info.path)) for name, info in opened.tensors.items()}
    files = tuple(
        replace(
            header,
            path=moved(header.path),
            tensors={name: tensors[name] for name in header.tensors},
            mtime_ns=listing.files[Path(header.path).name].mtime_ns,
            version=listing.files[Path(header.path).name].version,
        )
        for header in opened.files
    )
    path = kept if listing.only is None else kept / listing.only
    return replace(opened, reference=url, path=path, files=files, tensors=tensors)


@contextmanager
def shadow(url: str, *, key: str | None = None) -> Iterator[tuple[Path, Listing, Path]]:
    """A local folder that looks as the one at the URL: small files whole, of weights the headers.

    Yields the folder (or the file in it that the URL names), the listing, and the folder of the
    cache that holds the small files. The first is gone afterwards: it has no weights.

    Raises:
        CheckpointError: nothing is there, or it cannot be read.
    """
    prefix = f"{key}: " if key else ""
    check_url(url, key=key)
    listing = list_folder(url)
    if not listing.files:
        raise CheckpointError(f"{prefix}{redacted(url)}: nothing is there")
    kept = _kept(listing)
    kept.mkdir(parents=True, exist_ok=True)
    wanted = [
        name
        for name, state in listing.files.items()
        if not name.endswith(_WEIGHTS)
        and state.size <= _LARGEST_SMALL_FILE
        and not _is_kept(kept / name, state)
    ]
    weights = [name for name in listing.files if name.endswith(".safetensors")]
    if listing.only is not None:
        weights = [name for name in weights if name == listing.only]
    with (
        tempfile.TemporaryDirectory(prefix="shadow-", dir=kept.parent) as scratch,
        ThreadPoolExecutor(_CONNECTIONS, "cl_fast headers") as pool,
    ):
        folder = Path(scratch) / (name_of(listing.url) or "checkpoint")
        folder.mkdir()
        for _ in pool.map(lambda name: _keep(listing, name, kept), wanted):
            pass
        for _ in pool.map(lambda name: _header_only(listing, name, folder), weights):
            pass
        for name, state in listing.files.items():
            if name in weights:
                continue  # its header is there, also where the cache has all of it
            if _is_kept(kept / name, state):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).symlink_to(kept / name)
            elif not name.endswith(".safetensors"):
                (folder / name).touch()
        yield (folder if listing.only is None else folder / listing.only), listing, kept


def download_whole(listing: Listing, kept: Path) -> Path:
    """Copies the weights too into the cache, for inputs that are small and read in their own ways.

    Returns the folder, or the file where the listing is of one.
    """
    for name, state in listing.files.items():
        wanted = name.endswith(".safetensors") and listing.only in (None, name)
        if wanted and not _is_kept(kept / name, state):
            _keep(listing, name, kept)
    return kept if listing.only is None else kept / listing.only


def _kept(listing: Listing) -> Path:
    """The folder of the cache for what is at a URL now."""
    digest = blake2b(listing.url.encode(), digest_size=8)
    for name, state in sorted(listing.files.items()):
        digest.update(f"\n{name} {state.size} {state.mtime_ns} {state.version}".encode())
    return cache_folder() / "remote" / digest.hexdigest() / (name_of(listing.url) or "checkpoint")


def _is_kept(path: Path, state: State) -> bool:
    return path.is_file() and path.stat().st_size == state.size


def _keep(listing: Listing, name: str, folder: Path) -> None:
    """One file into the cache, whole or not at all."""
    state, url, path = listing.files[name], f"{listing.url}/{name}", folder / name
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            for start in range(0, state.size, 8 * _PIECE):
                file.write(fetch(url, start, min(8 * _PIECE, state.size - start)))
        # The store's time of change, so that the copy is the same whenever it was made.
        os.utime(part, ns=(state.mtime_ns, state.mtime_ns))
        part.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: the copy of {redacted(url)} cannot be written ({error.strerror or error}); "
            "set CL_FAST_CACHE to a folder with room"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _header_only(listing: Listing, name: str, folder: Path) -> None:
    """A file of the right size that holds the header alone."""
    size, url = listing.files[name].size, f"{listing.url}/{name}"
    start = bytes(fetch(url, 0, min(size, _HEADER_GUESS)))
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 + length <= min(size, 8 + MAX_HEADER_BYTES):
        start += fetch(url, len(start), 8 + length - len(start))
    with (folder / name).open("wb") as file:
        file.write(start)
        file.truncate(size)
