"""Progress on a terminal, in a log, or not at all."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

__all__ = ["Progress"]

_EVERY = 5.0  # seconds between lines where there is no terminal


class Progress:
    """Shows progress: a bar on a terminal, a line every few seconds elsewhere, or nothing.

    `counted` phases have things to count instead of bytes.
    """

    def __init__(self, *, quiet: bool, counted: Sequence[str] = ()) -> None:
        self._quiet, self._counted = quiet, counted
        self._terminal = sys.stderr.isatty()
        self._phase = ""
        self._bar: Any = None
        self._since = self._said = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def __call__(self, phase: str, done: int, total: int) -> None:
        if self._quiet:
            return
        if phase != self._phase:
            self._close()
            self._phase = phase
            self._since = self._said = time.monotonic()
            if self._terminal:
                from tqdm import tqdm

                self._bar = tqdm(
                    desc=phase,
                    total=total,
                    unit="" if phase in self._counted else "B",
                    unit_scale=phase not in self._counted,
                    leave=False,
                    dynamic_ncols=True,
                )
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._said >= _EVERY and done:
            self._said = now
            if phase in self._counted:
                print(f"{phase}: {done} of {total}", file=sys.stderr)
                return
            from cl_fast.merging.description import bytes_text

            speed = done / max(now - self._since, 1e-9)
            print(
                f"{phase}: {100 * done // total} % of {bytes_text(total)}, "
                f"{bytes_text(speed)}/s, {(total - done) / speed:.0f} s left",
                file=sys.stderr,
            )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._phase = ""
