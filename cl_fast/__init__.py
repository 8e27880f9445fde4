"""Fast continual learning: merge, train and edit models as deltas on a base checkpoint.

The package imports nothing heavy: `import cl_fast` loads neither torch nor numpy, so that the
command line starts at once. Rooms are loaded when they are first named:

    cl_fast.ops        the kernels as registered torch ops
    cl_fast.merging    recipes, methods, soups, packed deltas, adapters, comparison, search
    cl_fast.losses     distillation, log-probs and preferences without the logits
    cl_fast.training    replay, schedules, O-LoRA, LoRAMoE, adapters, projections, anchors
    cl_fast.editing    facts in and out of a model: MEMIT, ROME, AlphaEdit, MEND, a fact store
    cl_fast.learning    a stream of tasks in the trainer that you have; `cl_fast.learn`
    cl_fast.integrations   losses and keeps in HF Trainer, TRL and torchtitan; merges on Ray
    cl_fast.models      what a loss or an editor must know of a model
    cl_fast.checkpoints    sharded safetensors, read in tiles
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cl_fast._version import __version__

if TYPE_CHECKING:
    from cl_fast.learning import learn

_ROOMS = (
    "backends",
    "checkpoints",
    "editing",
    "errors",
    "integrations",
    "learning",
    "losses",
    "merging",
    "models",
    "ops",
    "training",
)

__all__ = ["__version__", "learn", *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"cl_fast.{name}")
    if name == "learn":
        return importlib.import_module("cl_fast.learning").learn
    raise AttributeError(f"module 'cl_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
