"""The ops on CPU tensors by the C++ core: pointers of torch tensors become jobs of the core.

The core knows nothing of torch. A job here is in memory: every source and the output is a pointer,
the tensors are kept alive until it has run, NaN is passed on (a merge of files refuses it instead),
and no checksums are taken. The caller has checked the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cl_fast.backends import native
from cl_fast.ops.policy import (
    LONGEST_SCALED_ROW,
    Policy,
    row_length,
    selection_counts,
    trim_keep_count,
)
from cl_fast.ops.streams import keep_threshold

if TYPE_CHECKING:
    from cl_fast.ops.combining import Call

__all__ = ["combine", "dare", "magnitude_threshold", "reads", "takes"]

NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
"""The core's names of dtypes: those of safetensors."""

MOST_MODELS = 256
"""What the core combines in one pass."""


def reads(*tensors: Tensor | None) -> bool:
    """Whether the core can take these tensors."""
    return all(
        tensor is None
        or (
            tensor.device.type == "cpu"
            and tensor.dtype in NAMES
            and tensor.layout == torch.strided
            and not tensor.is_conj()
            and not tensor.is_neg()
        )
        for tensor in tensors
    )


def takes(call: Call) -> bool:
    """Whether the core can carry out `call`; if not, the eager reference does."""
    policy = call.policy
    scaled_whole = policy.trim_scope == "model" and policy.rescale == "l1"
    return (
        call.models <= MOST_MODELS
        and not (policy.sparsify == "trim" and scaled_whole)
        and longest_row(call) <= LONGEST_SCALED_ROW
        and reads(*call.bases, *call.tensors)
    )


def longest_row(call: Call) -> int:
    """Elements of the longest row that magprune is to scale element by element; else 0."""
    if (call.policy.sparsify, call.policy.rescale) != ("magprune", "keep_rate"):
        return 0
    return max(row_length(tuple(call.first(row).shape)) for row in range(call.rows))


def _job(core: ModuleType) -> Any:
    return core.Job(native.threads(), nan="propagate", checksums=False)


class _Tasks:
    """Adds tasks on tensors to a job, and holds the tensors until the job is done."""

    def __init__(self, core: ModuleType) -> None:
        self.job = _job(core)
        self._alive: list[Tensor] = []

    def pointer(self, tensor: Tensor) -> int:
        dense = tensor.detach().contiguous()
        self._alive.append(dense)
        return int(dense.data_ptr())

    def add(
        self,
        n: int,
        base: Tensor | None,
        out: Tensor | None,
        policy: Policy,
        lam: float = 1.0,
        row: int = 0,
    ) -> int:
        """A task of n elements; out is None where only a threshold is wanted."""
        if out is not None:
            self._alive.append(out)
        source = None if base is None else (NAMES[base.dtype], self.pointer(base), -1, 0)
        return int(
            self.job.add_task(
                n,
                "F32" if out is None else NAMES[out.dtype],
                self.pointer(torch.empty(1)) if out is None else out.data_ptr(),
                -1,
                0,
                base=source,
                difference=policy.difference,
                sparsify=policy.sparsify,
                trim_ties=policy.trim_ties,
                rescale=policy.rescale,
                elect=policy.elect,
                elect_on=policy.elect_on,
                reduce=policy.reduce,
                divisor=policy.divisor,
                lam=lam,
                kind="combine",
                row=row,
            )
        )

    def add_term(
        self,
        task: int,
        tensor: Tensor,
        *,
        weight: float = 1.0,
        density: float = 1.0,
        key: int = 0,
        keep_threshold: int = 1 << 32,
        keep_count: int = 0,
        fixed_code: int = -1,
        drop_count: int = 0,
        epsilon: float = 0.0,
    ) -> None:
        self.job.add_term(
            task,
            NAMES[tensor.dtype],
            self.pointer(tensor),
            -1,
            0,
            weight,
            density,
            key & (1 << 64) - 1,
            keep_threshold,
            keep_count,
            fixed_code,
            drop_count,
            epsilon,
        )


def combine(core: ModuleType, call: Call, into: Sequence[Tensor] | None = None) -> list[Tensor]:
    """All rows of `call`, which has been checked, in one job.

    `into`: contiguous tensors for the results, which may be the bases themselves: a block of a base
    is read before its result is written, and thresholds and sums are known before the first. A
    magprune in place makes one tensor after the other.
    """
    if into is not None and call.policy.sparsify == "magprune":
        # Tiles rank whole rows, so a row must not be written before both its tiles have read it.
        for row, out in enumerate(into):
            out.copy_(combine(core, call.part([row]))[0])
        return list(into)
    thresholds = call.thresholds
    if call.selects_over_rows:
        thresholds = _model_thresholds(core, call) * call.rows
    tasks = _Tasks(core)
    outs = []
    for row in range(call.rows):
        first = call.first(row)
        if into is None:
            out = torch.empty(first.shape, dtype=call.out_dtype or first.dtype)
        else:
            out = into[row]
        outs.append(out)
        if out.numel() == 0:
            continue
        base = call.bases[row] if call.bases else None
        length = row_length(tuple(first.shape))
        task = tasks.add(out.numel(), base, out, call.policy, call.lam, length)
        for at in range(row * call.models, (row + 1) * call.models):
            density = call.densities[at]
            top, keep = selection_counts(call.policy, out.numel(), density, call.gammas[at])
            tasks.add_term(
                task,
                call.tensors[at],
                weight=call.weights[at],
                density=density,
                key=call.keys[at],
                keep_threshold=keep_threshold(density),
                keep_count=keep,
                fixed_code=thresholds[at],
                drop_count=top,
                epsilon=call.epsilons[at],
            )
    tasks.job.run()
    return outs


def _model_thresholds(core: ModuleType, call: Call) -> list[int]:
    """One threshold code per model over all rows; -1 where everything is kept."""
    tasks = _Tasks(core)
    total = 0
    for row in range(call.rows):
        first = call.first(row)
        total += first.numel()
        if first.numel() == 0:
            continue
        base = call.bases[row] if call.bases else None
        task = tasks.add(first.numel(), base, None, call.policy)
        for tensor in call.tensors[call.row(row)]:
            tasks.add_term(task, tensor, density=0.5, keep_count=1)
    densities = call.densities[: call.models]
    counts = [trim_keep_count(rho, total, call.policy.trim_count) for rho in densities]
    codes = tasks.job.select_model([max(count, 1) for count in counts]) if total else counts
    return [
        -1 if rho >= 1.0 else int(code) if count else 0x7FFFFFFF
        for rho, count, code in zip(densities, counts, codes, strict=True)
    ]


def dare(
    core: ModuleType, delta: Tensor, key: int, density: float, threshold: int, rescale: str
) -> Tensor:
    """`cl_fast::dare` on a CPU tensor that `reads` accepts."""
    out = torch.empty(delta.shape, dtype=delta.dtype)
    if out.numel() == 0:
        return out
    tasks = _Tasks(core)
    policy = Policy(
        difference=False,
        sparsify="drop",
        rescale=rescale,  # type: ignore[arg-type]
    )
    task = tasks.add(out.numel(), None, out, policy)
    tasks.add_term(task, delta, density=density, key=key, keep_threshold=threshold)
    tasks.job.run()
    return out


def magnitude_threshold(
    core: ModuleType, x: Tensor, base: Tensor | None, k: int, ties: str
) -> tuple[Tensor, Tensor]:
    """`cl_fast::magnitude_threshold` on CPU tensors that `reads` accepts."""
    if k == 0:
        return torch.tensor(float("inf")), torch.tensor(0)
    tasks = _Tasks(core)
    policy = Policy(difference=base is not None, sparsify="trim")
    task = tasks.add(x.numel(), base, None, policy)
    tasks.add_term(task, x, density=0.5, keep_count=k)
    (code,) = tasks.job.select_model([k])
    threshold = torch.tensor(code, dtype=torch.int32).view(torch.float32)
    magnitude = (x.float() if base is None else x.float() - base.float()).abs()
    if ties == "none":
        at = torch.tensor(0)
    elif ties == "all":
        at = (magnitude == threshold).sum()
    else:
        at = k - (magnitude > threshold).sum()
    return threshold, at
