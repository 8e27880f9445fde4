"""What a recipe becomes for these files: every read, every write, known before the first byte.

:func:`make_plan` opens every input header, finds every error that the headers can tell, and
returns a :class:`Plan`: for each output tensor its sources, weights, densities, random keys, its
policy and its exact place in an output shard. Nothing is written and no weight is read. The plan
is a value: the engine executes it, ``--dry-run`` prints it through :func:`describe`, and its
fingerprint lets an interrupted run continue only with the same inputs and settings.

Torch-free and numpy-free; a checkpoint of many thousand tensors plans in well under a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cl_fast.ops.policy import Policy

if TYPE_CHECKING:
    from cl_fast.checkpoints.checkpoint import Checkpoint
    from cl_fast.checkpoints.sidecar import Sidecar
    from cl_fast.merging.recipe import Recipe

__all__ = [
    "NUMERICS",
    "Plan",
    "ShardPlan",
    "Source",
    "TensorPlan",
    "Term",
    "describe",
    "make_plan",
]

#: Version of the arithmetic and of the random stream. It is part of every fingerprint, so a run
#: that was interrupted under other arithmetic is never continued.
NUMERICS = 1


@dataclass(frozen=True, slots=True)
class Source:
    """One stored tensor of an input: ``nbytes`` bytes at absolute ``offset`` of file ``path``.

    ``dtype`` is the safetensors name (``BF16``, ``F32``, ...).
    """

    path: str
    offset: int
    dtype: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Term:
    """One model's part in one tensor.

    ``model`` is the name that keys its random stream, ``key`` the 64-bit key of this tensor
    (0 where nothing is drawn at random). ``weight`` and ``density`` are the recipe's values for
    this tensor, with filters and gradients resolved.
    """

    model: str
    source: Source
    weight: float
    density: float
    key: int


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One output tensor.

    ``offset`` is absolute in the shard file with index ``shard``; ``dtype`` is the output type.
    ``kind="copy"`` tensors (integers, booleans, empty tensors) are not combined: the bytes of
    ``base`` (or of the first term without a base) are written, and every term must equal them.
    ``lam`` multiplies the reduced delta; it is 1 where the method has no lambda.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    shard: int
    offset: int
    nbytes: int
    kind: Literal["combine", "copy"]
    base: Source | None
    terms: tuple[Term, ...]
    policy: Policy
    lam: float

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output file: ``header`` (length word, JSON, padding) followed by the tensors.

    ``size`` is that of the whole file, ``tensors`` are indexes into ``Plan.tensors`` in the order
    of their offsets.
    """

    filename: str
    header: bytes
    size: int
    tensors: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a merge will do. See :func:`make_plan`.

    Attributes:
        output: folder to write.
        recipe: the recipe it came from.
        tensors: every output tensor, in natural order of the names.
        shards: the output files.
        index: content of ``model.safetensors.index.json``; ``None`` for a single file.
        inputs: opened checkpoints, base first (if any), then the models in recipe order; a
            checkpoint that is used twice appears twice.
        has_base: whether ``inputs[0]`` is the base of the deltas.
        models: the names of the terms, in recipe order; ``tensors[i].terms`` has this order.
        donor: the checkpoint that config and generation config come from.
        tokenizer_donor: folder that tokenizer and chat template come from.
        sidecars: the files to write beside the weights.
        notes: sentences that the user should be told.
        fingerprint: hex digest of all that decides the output's bytes.
        bytes_read: estimate over all passes. bytes_written: weights, headers and sidecars.
        passes: most often that any input byte is read.
        memory: predicted peak of anonymous memory in bytes.
        seed: the seed of the random stream; ``None`` if the method draws nothing.
        model_keep: for ``trim_scope="model"`` the number of elements that each term keeps over
            the whole model (position = position in ``terms``; the tensors that take part are
            those with ``kind="combine"``); empty otherwise.
    """

    output: Path
    recipe: Recipe
    tensors: tuple[TensorPlan, ...]
    shards: tuple[ShardPlan, ...]
    index: dict[str, Any] | None
    inputs: tuple[Checkpoint, ...]
    has_base: bool
    models: tuple[str, ...]
    donor: Checkpoint
    tokenizer_donor: Path
    sidecars: tuple[Sidecar, ...]
    notes: tuple[str, ...]
    fingerprint: str
    bytes_read: int
    bytes_written: int
    passes: int
    memory: int
    seed: int | None
    model_keep: tuple[int, ...]


def make_plan(
    recipe: Recipe,
    output: str | Path,
    *,
    out_shard_size: int = 5_000_000_000,
    seed: int | None = None,
    threads: int | None = None,
) -> Plan:
    """Read every input header, find every error they can tell, and lay out the output."""
    raise NotImplementedError


def describe(plan: Plan, bandwidth: float | None = None) -> list[str]:
    """The plan as plain text lines; ``bandwidth`` in bytes per second adds the predicted time."""
    raise NotImplementedError
