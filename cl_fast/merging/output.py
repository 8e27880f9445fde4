"""The output folder of a merge: checked before any work, filled out of sight, moved in at once.

Everything is written below a hidden sibling of the output::

    parent/.NAME.cl_fast-partial/lock             held while a merge runs
    parent/.NAME.cl_fast-partial/journal.jsonl    what is finished
    parent/.NAME.cl_fast-partial/model/           becomes parent/NAME by one rename

so whoever looks at ``parent/NAME`` sees nothing, or the old folder, or the complete new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from cl_fast.errors import OutputError
from cl_fast.merging.description import bytes_text

__all__ = [
    "OutputFolder",
    "allocate",
    "free_bytes",
    "sync_file",
    "sync_folder",
    "sync_tree",
    "write_all",
    "write_failure",
]

_HEADROOM = 16 << 20  # config, tokenizer, index, manifest, journal and the folder's own blocks


class OutputFolder:
    """One output path with its hidden working folder.

    path: the output, absolute, symbolic links in the parents resolved.
    work: the hidden sibling.
    model: the folder inside it that will become the output.
    """

    def __init__(self, output: str | os.PathLike[str]) -> None:
        asked = Path(output)
        if asked.name in ("", ".."):
            raise OutputError(f"{output}: not a folder name; give the path of the folder to make")
        self.path = asked.parent.resolve() / asked.name
        self.work = self.path.parent / f".{self.path.name}.cl_fast-partial"
        self.model = self.work / "model"
        self.replaced = self.work / "replaced"

    def check(
        self,
        inputs: Iterable[str | os.PathLike[str]],
        beside: Iterable[str | os.PathLike[str]] = (),
        *,
        overwrite: bool,
    ) -> None:
        """Everything that can be known before the first byte.

        Args:
            inputs: checkpoint folders and files that are read; the output may not be one, lie in
                one or hold one.
            beside: folders in which single inputs lie among other things; the output may not be
                or hold one, but it may lie there.
            overwrite: an existing folder may be replaced.

        Raises OutputError: the output is or touches an input, exists (and not `overwrite`), is a
        file or a link, or cannot be created where it is asked for.
        """
        if self.path.is_symlink():
            raise OutputError(f"{self.path}: is a symbolic link; give the folder it points to")
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path}: is a file; give a folder that does not exist yet")
        for asked, whole in [*((path, True) for path in inputs), *((p, False) for p in beside)]:
            # Both as named and resolved: in a download cache the files of a checkpoint folder are
            # links into another folder, and neither may be written or replaced.
            for source in {Path(asked).absolute(), Path(asked).resolve()}:
                if source == self.path:
                    what = "is one of the inputs"
                elif self.path in source.parents:
                    what = f"contains the input {asked}"
                elif whole and source.is_dir() and source in self.path.parents:
                    what = f"lies inside the input {asked}"
                else:
                    continue
                raise OutputError(
                    f"{self.path}: the output {what}; inputs are never written to, give another "
                    "output folder"
                )
        if self.path.is_dir() and any(self.path.iterdir()) and not overwrite:
            raise OutputError(
                f"{self.path}: the output exists and is not empty; give another folder, or "
                "--overwrite to replace it once the new one is complete"
            )
        parent = self.path.parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise OutputError(f"{self.path}: {parent} is a file, so no folder can be made in it")

    def create(self) -> None:
        """Makes the working folder. Raises OutputError when the parent cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.work.mkdir(exist_ok=True)
        except OSError as error:
            reason = {
                errno.EROFS: "the file system is read-only",
                errno.EACCES: "no permission to write there",
                errno.EPERM: "no permission to write there",
                errno.ENOSPC: "the disk is full",
            }.get(error.errno or 0, error.strerror or str(error))
            raise OutputError(
                f"{self.path}: cannot make a folder in {self.path.parent}: {reason}"
            ) from error

    def clear(self) -> None:
        """Empties the working folder, but for the lock, which is held."""
        for entry in self.work.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()

    def check_space(self, needed: int) -> None:
        """Raises OutputError unless `needed` bytes (and a little more) are free."""
        free = free_bytes(self.path.parent)
        if needed + _HEADROOM > free:
            raise OutputError(
                f"{self.path}: not enough disk space: the output needs {bytes_text(needed)} more, "
                f"{bytes_text(free)} are free on the file system of {self.path.parent}"
            )

    def publish(self, *, overwrite: bool, fsync: bool) -> None:
        """Renames the finished folder into place; an old folder there is replaced by a swap.

        At every moment the output path holds the complete old or the complete new folder (on
        Linux; elsewhere a crash in between leaves the old one in the working folder, and
        `recover` puts it back).
        """
        if not (overwrite and self.path.is_dir() and any(self.path.iterdir())):
            # Onto nothing or onto an empty folder; anything else that appeared here meanwhile
            # makes the rename fail.
            self.model.rename(self.path)
        elif not _exchange(self.model, self.path):
            self.path.rename(self.replaced)
            self.model.rename(self.path)
        if fsync:
            sync_folder(self.path.parent)

    def recover(self) -> None:
        """After a crash between the two renames of a replacement: puts the old folder back."""
        if self.replaced.exists() and not self.path.exists():
            self.replaced.rename(self.path)

    def discard(self) -> None:
        """Removes the working folder and all that is in it; the journal last, so that whoever
        finds the rest after a crash still knows what it was."""
        for folder in (self.model, self.replaced):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(self.work, ignore_errors=True)


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write on the file system of `folder` (or of the nearest
    parent that exists)."""
    while not folder.exists():
        folder = folder.parent
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize


def allocate(path: Path, size: int) -> None:
    """Creates `path` with `size` bytes really reserved, so that a full disk shows now.

    Where the file system cannot reserve (fallocate is not supported) the file is sparse and a
    full disk shows while writing. Raises OutputError when there is no room.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
    try:
        os.ftruncate(fd, size)
        if size and not _fallocate(fd, size):
            return
    except OSError as error:
        raise write_failure(path, error, size) from error
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Writes all of `data` at `offset`, in as many calls as the system wants."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(fd, view[done : done + (1 << 30)], offset + done)


def write_failure(path: str | os.PathLike[str], error: OSError, size: int = 0) -> OutputError:
    """The same failure in words, with what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = "the disk is full" if error.errno == errno.ENOSPC else "the disk quota is used up"
        with contextlib.suppress(OSError):
            what += f" ({bytes_text(free_bytes(Path(path).parent))} free"
            what += f", {bytes_text(size)} wanted)" if size else ")"
        words = f"{path}: {what}; free some space or give an output on another disk"
    elif error.errno == errno.EFBIG:
        words = (
            f"{path}: the file would be larger than this system or user may write; give a smaller "
            "--out-shard-size"
        )
    else:
        words = f"{path}: cannot be written: {error.strerror or error}"
    return OutputError(words)


def sync_folder(folder: Path) -> None:
    """Makes renames and new names inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    """Makes the bytes of `path` durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """Makes every file below `folder`, and the folders themselves, durable."""
    for root, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(root) / name)
        sync_folder(Path(root))


_EXCHANGE = 2
_AT_FDCWD = -100


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two names in one step (Linux renameat2); False where the system cannot."""
    rename = getattr(_libc(), "renameat2", None)
    if rename is None:
        return False
    done = rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _EXCHANGE)
    if done != 0 and ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
        number = ctypes.get_errno()
        raise OutputError(f"{b}: the finished output cannot be moved in: {os.strerror(number)}")
    return bool(done == 0)


def _fallocate(fd: int, size: int) -> bool:
    """fallocate(2) itself: glibc's posix_fallocate would write to every block where it is not
    supported, which for a large file takes longer than the merge. False if not supported."""
    call = getattr(_libc(), "fallocate", None)
    if call is None:
        return False
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    while call(fd, 0, 0, size) != 0:
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True
