"""Rows of logits by the C++ core, on the CPU: the functions of `cl_fast.ops.vocabulary_rows`.

float32, bfloat16 and float16 in any mixture, computed in float32. Rows may lie any distance apart;
what does not lie side by side within a row is copied first. The caller has checked the arguments.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cl_fast.backends import native
from cl_fast.backends.native_ops import NAMES

__all__ = ["of"]

_How = tuple[float, float, float, bool]
_Rows = tuple[str, int, int, int, _How]


def of(core: ModuleType) -> Any:
    """The functions by this core; None where it was built without them."""
    return _Native(core) if hasattr(core, "divergence_forward") else None


def _dense(x: Tensor) -> Tensor:
    """Rows whose numbers lie side by side."""
    return x if x.stride(1) == 1 or x.size(1) == 1 else x.contiguous()


def _numbers(x: Tensor) -> Tensor:
    return x.detach().to(torch.float32).contiguous()


def _how(how: Any) -> _How:
    return (float(how.scale), float(how.softcap), float(how.temperature), bool(how.probs))


def _rows(x: Tensor, how: Any) -> _Rows:
    return (NAMES[x.dtype], x.data_ptr(), x.stride(0), x.size(1), _how(how))


class _Target:
    """Where a gradient is written: `out`, or what is copied there in the end.

    A row is read before it is written, so `out` may lie exactly where an input lies; any other
    overlap would have rows read after they were overwritten.
    """

    def __init__(self, out: Tensor, *inputs: Tensor) -> None:
        self._out = out
        at = (out.data_ptr(), out.dtype, out.stride(0))
        crossed = any(
            x.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
            and (x.data_ptr(), x.dtype, x.stride(0)) != at
            for x in inputs
        )
        fits = not crossed and _dense(out) is out and (out.stride(0) >= out.size(1))
        self._written = out if fits else torch.empty(out.shape, dtype=out.dtype)
        self.place = (
            NAMES[out.dtype],
            self._written.data_ptr(),
            self._written.stride(0),
        )

    def finish(self) -> None:
        if self._written is not self._out:
            self._out.copy_(self._written)


class _Native:
    def __init__(self, core: ModuleType) -> None:
        self._core = core

    def normalisers(self, x: Tensor, how: Any) -> Tensor:
        x = _dense(x)
        out = torch.empty((x.size(0), 2), dtype=torch.float32)
        self._core.row_normalisers(x.size(0), _rows(x, how), out.data_ptr(), native.threads())
        return out

    def divergence_sums(
        self,
        student: Tensor,
        teacher: Tensor,
        normal_s: Tensor,
        normal_t: Tensor,
        kind: str,
        mix: float,
        how_s: Any,
        how_t: Any,
    ) -> Tensor:
        student, teacher = _dense(student), _dense(teacher)
        normal_s, normal_t = _numbers(normal_s), _numbers(normal_t)
        out = torch.empty((student.size(0), 2), dtype=torch.float32)
        self._core.divergence_sums(
            student.size(0),
            _rows(student, how_s),
            _rows(teacher, how_t),
            kind,
            mix,
            normal_s.data_ptr(),
            normal_t.data_ptr(),
            out.data_ptr(),
            native.threads(),
        )
        return out

    def divergence_forward(
        self, student: Tensor, teacher: Tensor, kind: str, mix: float, how_s: Any, how_t: Any
    ) -> tuple[Tensor, Tensor]:
        student, teacher = _dense(student), _dense(teacher)
        losses = torch.empty(student.size(0), dtype=torch.float32)
        stats = torch.empty((student.size(0), 5), dtype=torch.float32)
        self._core.divergence_forward(
            student.size(0),
            _rows(student, how_s),
            _rows(teacher, how_t),
            kind,
            mix,
            losses.data_ptr(),
            stats.data_ptr(),
            native.threads(),
        )
        return losses, stats

    def divergence_gradient(
        self,
        out: Tensor,
        grad: Tensor,
        student: Tensor,
        teacher: Tensor,
        stats: Tensor,
        kind: str,
        mix: float,
        how_s: Any,
        how_t: Any,
        extra: Any = None,
    ) -> None:
        student, teacher = _dense(student), _dense(teacher)
        grad, stats = _numbers(grad), _numbers(stats)
        parts: tuple[Tensor, ...] = ()
        if extra is not None:
            ids = extra.ids.to(torch.int64).contiguous()
            parts = (_numbers(extra.grad), _numbers(extra.normal), ids)
        target = _Target(out, student, teacher)
        self._core.divergence_gradient(
            student.size(0),
            _rows(student, how_s),
            _rows(teacher, how_t),
            kind,
            mix,
            target.place,
            grad.data_ptr(),
            stats.data_ptr(),
            *([x.data_ptr() for x in parts] or (0, 0, 0)),
            native.threads(),
        )
        target.finish()

    def logprob_forward(self, x: Tensor, ids: Tensor, how: Any) -> Tensor:
        x, ids = _dense(x), ids.to(torch.int64).contiguous()
        out = torch.empty((x.size(0), 4), dtype=torch.float32)
        self._core.logprob_forward(
            x.size(0), _rows(x, how), ids.data_ptr(), out.data_ptr(), native.threads()
        )
        return out

    def logprob_gradient(
        self,
        out: Tensor,
        grad: Tensor,
        entropy_grad: Tensor | None,
        x: Tensor,
        ids: Tensor,
        stats: Tensor,
        how: Any,
    ) -> None:
        x, ids = _dense(x), ids.to(torch.int64).contiguous()
        grad, stats = _numbers(grad), _numbers(stats)
        entropy = None if entropy_grad is None else _numbers(entropy_grad)
        target = _Target(out, x)
        self._core.logprob_gradient(
            x.size(0),
            _rows(x, how),
            target.place,
            grad.data_ptr(),
            0 if entropy is None else entropy.data_ptr(),
            ids.data_ptr(),
            stats.data_ptr(),
            native.threads(),
        )
        target.finish()
