"""A file is written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from cl_fast.errors import OutputError

__all__ = ["write_whole"]


def write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Writes `parts` one after the other under another name, waits for the disk, and renames.

    Raises:
        OutputError: it cannot be written; what was at `path` is still there.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            for data in parts:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
