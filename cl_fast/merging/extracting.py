"""A LoRA adapter extracted from a finetune: the best low-rank part of what it changed.

    B A ~ finetuned - base      per linear layer, of least |D - B A|_F for its rank

A LoRA holds nothing but products of factors, so what a full finetune changed beyond the rank kept
is lost: the report tells how much, per layer and in all. Tensors that are no matrices of linear
layers (norms, biases, embeddings) are kept whole, as modules_to_save and trained biases, or are
lost and told. Tensors that the finetune left alone are left alone.

The written adapter names the hashes of the base's weights, so a merge refuses it on another base.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cl_fast import options
from cl_fast.checkpoints.adapters import BASE_HASHES, transposed
from cl_fast.checkpoints.checkpoint import Checkpoint
from cl_fast.checkpoints.patches import new_weight_hash
from cl_fast.errors import CheckpointError, NonFiniteError, OutputError
from cl_fast.merging.composing import ModuleError, rank_settings
from cl_fast.merging.factors import (
    DTYPES,
    AdapterWriter,
    Rank,
    Svd,
    frobenius,
    layer_by_layer,
    torch_read,
    truncate,
)
from cl_fast.merging.inputs import resolve
from cl_fast.merging.matching import natural_key

__all__ = ["Extraction", "LostTensor", "extract_adapter"]

_EMBEDDINGS = re.compile(
    r"(^|\.)(embed_tokens|embed_in|embed_positions|wte|wpe|shared|[a-z_]*_embeddings?)$"
)
_FLOATS = ("F32", "BF16", "F16")


@dataclass(frozen=True, slots=True)
class LostTensor:
    """A tensor that the finetune changed and the adapter leaves as the base has it."""

    name: str
    norm: float


@dataclass(frozen=True, slots=True)
class Extraction:
    """A written adapter, and what it is off by.

    Attributes:
        path: its folder.
        modules: the adapted layers: rank, |D|_F of the change, |D - B A|_F.
        saved: tensors that the adapter brings whole.
        lost: tensors whose change is not in it.
        unchanged: how many tensors are equal in base and finetune.
        change: |finetuned - base|_F over all tensors. error: what of it is not in the adapter.
    """

    path: Path
    modules: tuple[ModuleError, ...]
    saved: tuple[str, ...]
    lost: tuple[LostTensor, ...]
    unchanged: int
    change: float
    error: float

    @property
    def relative(self) -> float:
        """error / change."""
        return self.error / self.change if self.change else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "change": self.change,
            "error": self.error,
            "relative_error": self.relative,
            "modules": [module.to_json() for module in self.modules],
            "saved": list(self.saved),
            "lost": [asdict(tensor) for tensor in self.lost],
            "unchanged": self.unchanged,
        }


@dataclass(frozen=True, slots=True)
class _Job:
    """One tensor. `kind`: "linear", or what becomes of a change: "saved", "bias", "lost"."""

    name: str
    module: str
    kind: Literal["linear", "saved", "bias", "lost"]
    flipped: bool


@dataclass(frozen=True, slots=True)
class _Done:
    job: _Job
    norm: float
    error: float = 0.0
    a: Tensor | None = None
    b: Tensor | None = None
    whole: Tensor | None = None
    base_hash: str = ""


def extract_adapter(
    base: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    targets: Sequence[str] | None = None,
    others: Literal["save", "lose"] = "save",
    svd: Svd = "auto",
    dtype: str = "float32",
    prefix: str = "",
    seed: int = 0,
    threads: int | None = None,
    overwrite: bool = False,
) -> Extraction:
    """Writes the PEFT adapter that comes nearest to a finetune.

    Args:
        base: the checkpoint that was finetuned: a folder or file, or what else a recipe may name
            (an id of the hub, a URL).
        finetuned: that of the result: tensors of the same names and shapes.
        output: the folder to make.
        rank: of every layer; or
        energy: as few directions per layer as hold this part of |D|_F^2, at most `max_rank`.
        targets: last parts of the names of layers to adapt ("q_proj"); None: every matrix that is
            no embedding.
        others: what becomes of other tensors that changed: "save" brings them whole, "lose" leaves
            them as the base has them.
        svd: "exact", "randomized", or "auto": the latter where the rank is below an eighth of the
            sides. The error told is measured in any case.
        dtype: of the factors: "float32", "bfloat16" or "float16".
        prefix: what the model has before the names of a checkpoint of a bare decoder, as
            "transformer." for GPT-2.
        seed: of the randomized start.
        threads: layers that are worked on at the same time; None: the cores of this process. Each
            takes about three times its layer in float64.
        overwrite: replace an existing output once the new one is complete.

    Raises:
        CheckpointError: the checkpoints do not fit one another, are quantised, or are equal.
        NonFiniteError: a tensor holds NaN or infinity.
        OutputError: the output exists or cannot be written.
        ValueError: an argument is out of its range; targets match nothing.
    """
    wanted = Rank(rank, energy, max_rank)
    options.one_of("others", others, ("save", "lose"))
    options.one_of("svd", svd, ("auto", "exact", "randomized"))
    options.one_of("dtype", dtype, DTYPES)
    if svd == "randomized" and wanted.bound is None:
        raise ValueError("svd='randomized' needs rank or max_rank")
    below = Checkpoint.open(resolve(os.fspath(base)), key="base")
    above = Checkpoint.open(resolve(os.fspath(finetuned)), key="finetuned")
    for checkpoint in (below, above):
        checkpoint.refuse_quantised()
    _check_output(output, (below, above))
    jobs = _jobs(below, above, targets, others)

    def work(job: _Job) -> _Done:
        return _extract(job, below, above, wanted, svd, seed, DTYPES[dtype])

    modules: list[ModuleError] = []
    saved: list[str] = []
    lost: list[LostTensor] = []
    hashes: dict[str, str] = {}
    biases: list[tuple[_Job, Tensor]] = []
    norms, errors, unchanged = [0.0], [0.0], 0
    with AdapterWriter(output, overwrite=overwrite) as writer:
        for done in layer_by_layer(jobs, work, threads):
            job, name = done.job, prefix + done.job.module
            norms.append(done.norm)
            errors.append(done.error)
            if not done.norm:
                unchanged += 1
            elif done.a is not None and done.b is not None:
                writer.add(f"{name}.lora_A.weight", done.a)
                writer.add(f"{name}.lora_B.weight", done.b)
                modules.append(ModuleError(name, done.a.shape[0], done.norm, done.error))
                hashes[job.name] = done.base_hash
            elif job.kind == "bias" and done.whole is not None:
                biases.append((job, done.whole))
            elif job.kind == "saved" and done.whole is not None:
                writer.add(prefix + job.name, done.whole)
                saved.append(job.name)
            else:
                lost.append(LostTensor(job.name, done.norm))
        if not modules:
            raise CheckpointError(
                f"{above.path}: differs from {below.path} in no layer that is adapted"
                + (f", but in {saved[0]!r}" if saved else "; there is nothing to extract")
            )
        adapted = {module.name for module in modules}
        biased = False
        for job, bias in biases:
            # Of a layer whose weight did not change the bias is that of a module to save.
            own = prefix + job.module in adapted
            biased |= own
            writer.add(f"{prefix}{job.module}.base_layer.bias" if own else prefix + job.name, bias)
            saved.append(job.name)
        config = _config(below, jobs, modules, saved, prefix, biased=biased)
        writer.finish(config, {BASE_HASHES: hashes, "cl_fast.made": {"method": "extract"}})
    return Extraction(
        writer.path, tuple(modules), tuple(saved), tuple(lost), unchanged,
        math.hypot(*norms), math.hypot(*errors),
    )  # fmt: skip


def _check_output(output: str | os.PathLike[str], inputs: Sequence[Checkpoint]) -> None:
    target = Path(output).resolve()
    for checkpoint in inputs:
        folder = checkpoint.path.resolve()
        if target == folder or target in folder.parents or folder in target.parents:
            raise OutputError(
                f"{output}: the output touches the input {checkpoint.path}; choose another folder"
            )


def _jobs(
    base: Checkpoint, finetuned: Checkpoint, targets: Sequence[str] | None, others: str
) -> list[_Job]:
    names = _names(base, finetuned)
    if targets is not None:
        if isinstance(targets, str) or not targets:
            raise ValueError("targets must be a list of the last parts of names, as ['q_proj']")
        ends = tuple(targets)
    jobs: list[_Job] = []
    linear = set[str]()
    for name in names:
        info = base.tensors[name]
        module, _, part = name.rpartition(".")
        chosen = targets is None or any(module == t or module.endswith("." + t) for t in ends)
        is_matrix = part == "weight" and len(info.shape) == 2 and info.dtype in _FLOATS
        if is_matrix and chosen and (targets is not None or not _EMBEDDINGS.search(module)):
            if _EMBEDDINGS.search(module):
                raise ValueError(
                    f"targets: {module!r} is an embedding, which is kept whole or lost here"
                )
            linear.add(module)
            jobs.append(_Job(name, module, "linear", transposed(base, module)))
        else:
            jobs.append(_Job(name, module, "saved" if others == "save" else "lost", False))
    if targets is not None:
        for target in ends:
            if not any(module == target or module.endswith("." + target) for module in linear):
                raise ValueError(f"targets: {target!r} is no linear layer of {base.path}")
    return [
        _Job(job.name, job.module, "bias", False)
        if job.kind == "saved" and job.module in linear
        else job
        for job in jobs
    ]


def _names(base: Checkpoint, finetuned: Checkpoint) -> list[str]:
    """The tensors that both have. A tied head that one of them stores is left out."""
    names = sorted(base.tensors.keys() | finetuned.tensors.keys(), key=natural_key)
    both = []
    for name in names:
        first, second = base.tensors.get(name), finetuned.tensors.get(name)
        if first is None or second is None:
            there, lacks = (finetuned, base) if first is None else (base, finetuned)
            if name.endswith("lm_head.weight") and (base.tied or finetuned.tied):
                if there.tied:
                    continue
                raise CheckpointError(
                    f"{there.path} has a {name!r} of its own, in {lacks.path} it is tied to the "
                    "embeddings; untie and save the tied one first (tie_word_embeddings: false)"
                )
            raise CheckpointError(
                f"{lacks.path} has no tensor {name!r}, which {there.path} has; give a finetune and "
                "the very base that it began from"
            )
        if first.shape != second.shape:
            raise CheckpointError(
                f"tensor {name!r} has the shape {list(first.shape)} in {base.path} and "
                f"{list(second.shape)} in {finetuned.path}; where the vocabulary was resized, "
                "resize the base likewise first"
            )
        both.append(name)
    return both


def _extract(
    job: _Job,
    base: Checkpoint,
    finetuned: Checkpoint,
    rank: Rank,
    svd: Svd,
    seed: int,
    dtype: torch.dtype,
) -> _Done:
    below, above = torch_read(base.tensors[job.name]), torch_read(finetuned.tensors[job.name])
    if not below.is_floating_point():
        if not torch.equal(below, above):
            raise CheckpointError(
                f"tensor {job.name!r} holds integers or booleans that differ between {base.path} "
                f"and {finetuned.path}; an adapter cannot change them"
            )
        return _Done(job, 0.0)
    delta = above.float() - below.float()
    norm = frobenius(delta) if delta.numel() else 0.0
    if not math.isfinite(norm):
        raise NonFiniteError(
            f"tensor {job.name!r} of {finetuned.path} or {base.path} holds NaN or infinity"
        )
    if not norm:
        return _Done(job, 0.0)
    if job.kind == "lost":
        return _Done(job, norm, norm)
    if job.kind != "linear":
        return _Done(job, norm, whole=above)
    delta = delta.t() if job.flipped else delta
    b, a = truncate(delta, rank, svd, seed=seed, name=job.name)
    b, a = b.to(dtype), a.to(dtype)
    if not bool(torch.isfinite(b).all() and torch.isfinite(a).all()):
        raise NonFiniteError(f"{job.name}: the factors overflow {dtype}; choose dtype='float32'")
    left = delta.double()
    left -= b.double() @ a.double()
    return _Done(job, norm, frobenius(left), a, b, base_hash=_hash(below))


def _hash(weight: Tensor) -> str:
    hasher = new_weight_hash(weight.shape, "F32")
    for part in weight.split(max(1, (1 << 20) // max(1, weight.shape[1]))):
        hasher.update(part.float().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def _config(
    base: Checkpoint,
    jobs: Sequence[_Job],
    modules: Sequence[ModuleError],
    saved: Sequence[str],
    prefix: str,
    *,
    biased: bool,
) -> dict[str, Any]:
    adapted = {module.name for module in modules}
    every = {prefix + job.module for job in jobs}
    ends = {name.rsplit(".", 1)[-1] for name in adapted}
    short = {name for name in every if name.rsplit(".", 1)[-1] in ends} == adapted
    whole = {prefix + name.rpartition(".")[0] for name in saved}
    return rank_settings({module.name: module.rank for module in modules}) | {
        "task_type": "CAUSAL_LM" if _is_causal(base) else None,
        "base_model_name_or_path": str(base.path),
        "target_modules": sorted(ends if short else adapted),
        "fan_in_fan_out": any(job.flipped for job in jobs if prefix + job.module in adapted),
        "bias": "lora_only" if biased else "none",
        "modules_to_save": sorted(whole - adapted) or None,
    }


def _is_causal(base: Checkpoint) -> bool:
    architectures = (base.config or {}).get("architectures") or [""]
    return any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
