"""Fast continual learning: merge, train and edit models as deltas on a base checkpoint.

The package imports nothing heavy: `import cl_fast` loads neither torch nor numpy, so that the
command line starts at once. Rooms are loaded when they are first named:

    cl_fast.ops        the kernels as registered torch ops
    cl_fast.merging    linear, task_arithmetic, ties, dare_linear, dare_ties, soups, recipes
    cl_fast.losses     distillation, log-probs and preferences without the logits
    cl_fast.integrations   the losses in HF Trainer, TRL, PEFT models and torchtitan
    cl_fast.checkpoints    sharded safetensors, read in tiles
"""

from __future__ import annotations

import importlib
from types import ModuleType

from cl_fast._version import __version__

_ROOMS = ("backends", "checkpoints", "errors", "integrations", "losses", "merging", "ops")

__all__ = ["__version__", *_ROOMS]


def __getattr__(name: str) -> ModuleType:
    if name in _ROOMS:
        return importlib.import_module(f"cl_fast.{name}")
    raise AttributeError(f"module 'cl_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
