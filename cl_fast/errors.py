"""Every error that cl_fast raises on purpose.

One family, so that a program can write ``except ClFastError`` and be sure to meet only messages
that were meant for a person: each one names the argument, file, tensor or recipe key that is
wrong and says what to do. Anything else that escapes is a defect of cl_fast.

Each class also derives from the builtin that describes it (``ValueError``, ``OSError``), so code
that knows nothing of cl_fast still catches it in the usual way.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ClFastError",
    "Interrupted",
    "NonFiniteError",
    "OutputError",
    "RecipeError",
    "VerifyError",
]


class ClFastError(Exception):
    """Base of all errors raised on purpose by cl_fast."""


class RecipeError(ClFastError, ValueError):
    """A recipe (or the same settings given as arguments) cannot be carried out as written."""


class CheckpointError(ClFastError, ValueError):
    """An input checkpoint is missing, malformed, or does not fit the others."""


class OutputError(ClFastError, OSError):
    """The output cannot be written: it exists, the disk is full, the folder is read-only."""

    def __str__(self) -> str:
        # OSError.__str__ formats "[Errno n] text" once two arguments are given; messages here
        # are complete sentences, so only the single-argument form is ever used.
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


class NonFiniteError(ClFastError, ValueError):
    """A tensor holds NaN or infinity and the ``nan`` policy is ``refuse``."""


class VerifyError(ClFastError, ValueError):
    """A written checkpoint does not match its record: hash, index, size or recomputed values."""


class Interrupted(ClFastError):
    """The run was stopped on request; what is finished is kept and ``--resume`` continues it."""
