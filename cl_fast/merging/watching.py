"""Running a job of the C++ core in a thread, so that this one shows progress and hears Ctrl-C."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from cl_fast.errors import CheckpointError

__all__ = ["watch"]


def watch(job: Any, work: Callable[[], object], tick: Callable[[int], object], size: int) -> None:
    """Runs `work` in a thread while this one shows progress and can be interrupted.

    `tick` hears of `size` bytes in all, in proportion to what the job says of its own passes.
    Raises CheckpointError for an input that cannot be read to its end.
    """
    failure: list[BaseException] = []
    entered, done = threading.Event(), threading.Event()
    abandoned = False

    def run() -> None:
        entered.set()
        try:
            if not abandoned:
                work()
        except BaseException as error:
            failure.append(error)
        finally:
            done.set()

    seen = 0
    try:
        threading.Thread(target=run, name="cl_fast job").start()
        while not done.wait(0.05):
            moved, total = job.progress()
            now = size * min(moved, total) // total if total else 0
            tick(now - seen)
            seen = now
    except BaseException:
        # Ctrl-C may come at any point of the lines above, also while the thread starts: either it
        # sees `abandoned` and does nothing, or it has entered and is waited for. A core that is
        # still at work when Python ends would abort the process, so more Ctrl-C must wait as well.
        abandoned = True
        job.cancel()
        while entered.is_set() and not done.is_set():
            with contextlib.suppress(KeyboardInterrupt):
                done.wait()
        raise
    if failure:
        error = failure[0]
        if isinstance(error, OSError) and "shorter than its header" in str(error.filename):
            raise CheckpointError(
                f"{error.filename}: truncated, or changed while it was read"
            ) from error
        if isinstance(error, OSError) and "not those of its random stream" in str(error.filename):
            raise CheckpointError(
                f"{error.filename}; the delta is damaged, pack it again"
            ) from error
        raise error
    tick(size - seen)
