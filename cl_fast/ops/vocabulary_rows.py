"""One row of logits at a time: normalisers, divergences between two rows, log-probs, gradients.

    v = softcap tanh(scale x / softcap)   x: the stored number; v = scale x without a softcap
    z = v / T                             or z = log(x) / T where the rows hold probabilities
    lp = (z - max z) - log sum exp(z - max z)             log-probs of the student; p = exp lp
    lq                                                    those of the teacher;     q = exp lq
    d = lq - lp,  r(w) = log(1 - w + w e^d) = log m - log p of the mixture m = w q + (1 - w) p

    kind              loss of a row                             slope g
    forward_kl        sum q d                                   dL/dz = p - q
    reverse_kl        sum p (-d)                                -d
    jsd               sum w q (d - r) + (1 - w) p (-r)          (1 - w) (-r)
    skew_forward_kl   sum q (d - r)                             (1 - w) (1 - e^(d - r))
    skew_reverse_kl   sum p (-r), the teacher mixed with 1 - w  -r + w (1 - e^(-r))
    tvd               sum |p - q| / 2                           sign(p - q) / 2, sign(0) = 0

    dL/dz = p (g - K),  K = sum p g;   dL/dx = dL/dz / T * scale * (1 - (v / softcap)^2)

`mix` is w (`jsd`: beta; the skewed kinds: lambda; for `skew_reverse_kl` the mixture is
(1 - lambda) q + lambda p, so r(1 - lambda)). The slopes are written so that a student that equals
its teacher has loss and gradient of exactly 0: every term holds a factor that is 0 at d = 0. A
constant may be added to g, since K takes it back. What a side gives probability 0 it does not
count: 0 log 0 = 0. Where the teacher gives 0 and the student does not, reverse KL is infinite.

What a backward pass needs of a row are five numbers: both maxima, both logarithms of sums, and K.
The maximum and the logarithm are kept apart because their sum would lose the small differences of
peaked rows.

This module is the reference, in plain torch: float64 where a row is float64, else float32. The C++
core and the Triton kernels have the same functions (`kernels` picks one of the three).

Sources: Hinton et al. 2015 (arXiv 1503.02531); generalised JSD: Agarwal et al. 2024 (2306.13649);
skewed KL: Ko et al. 2024 (2402.03898); TVD: Wen et al. 2023 (2307.15190).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_fast.backends import check_backend, native_or_say, require_native, triton, vocabulary_ops

__all__ = [
    "KINDS",
    "Extra",
    "How",
    "divergence_forward",
    "divergence_gradient",
    "divergence_sums",
    "kernels",
    "logprob_forward",
    "logprob_gradient",
    "normalisers",
    "wide_dtype",
]

KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")
OFFERED = ("eager", "native", "triton")
_BLOCK = 1 << 17
"""Elements of a block of rows: what the reference holds of its temporaries at once."""


class How(NamedTuple):
    """What turns stored numbers into log-probabilities, up to a constant of the row."""

    scale: float = 1.0
    softcap: float = 0.0
    """0: none."""
    temperature: float = 1.0
    probs: bool = False
    """The rows hold probabilities, which need not sum to 1; scale and softcap are not applied."""


class Extra(NamedTuple):
    """A cross-entropy at temperature 1 whose gradient is added in the same pass."""

    grad: Tensor
    """[M]: of the cross-entropy of each row."""
    normal: Tensor
    """[M, 2]: `normalisers` of the student at temperature 1."""
    ids: Tensor
    """int64 [M]; a negative id picks nothing."""


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """Of statistics and losses."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _values(x: Tensor, how: How, wide: torch.dtype) -> Tensor:
    """z of the formulas."""
    z = x.to(wide)
    if how.probs:
        z = z.log()
    else:
        if how.scale != 1.0:
            z = z * how.scale
        if how.softcap:
            z = torch.tanh(z / how.softcap) * how.softcap
    return z if how.temperature == 1.0 else z / how.temperature


def _chain(dz: Tensor, x: Tensor, how: How) -> Tensor:
    """dL/dx from dL/dz."""
    if how.temperature != 1.0:
        dz = dz / how.temperature
    if how.softcap:
        t = torch.tanh(x.to(dz.dtype) * (how.scale / how.softcap))
        dz = dz * (1 - t * t)
    return dz if how.scale == 1.0 else dz * how.scale


def _blocks(rows: int, columns: int) -> list[slice]:
    step = max(1, _BLOCK // max(1, columns))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def _normal(z: Tensor) -> Tensor:
    top = z.amax(1)
    return torch.stack([top, (z - top[:, None]).exp().sum(1).log()], 1)


def _logs(z: Tensor, normal: Tensor) -> Tensor:
    return (z - normal[:, 0:1]) - normal[:, 1:2]


def _teacher_logs(teacher: Tensor, normal: Tensor, how: How, columns: int) -> Tensor:
    lq = _logs(_values(teacher, how, normal.dtype), normal)
    if lq.size(1) == columns:
        return lq
    out = lq.new_full((lq.size(0), columns), -torch.inf)
    out[:, : lq.size(1)] = lq
    return out


def _mixture(d: Tensor, w: float) -> tuple[Tensor, Tensor]:
    """r = log m - log p and d - r = log q - log m: exactly 0 at d = 0, without overflow."""
    away = torch.expm1(-d.abs())
    tail = torch.log1p(torch.where(d > 0, (1 - w) * away, w * away))
    return torch.where(d > 0, d, 0) + tail, torch.where(d > 0, 0, d) - tail


def _terms(lp: Tensor, lq: Tensor, kind: str, w: float) -> tuple[Tensor, Tensor | None]:
    """The summands of the loss and the slopes g (None: the gradient needs none)."""
    p, q = lp.exp(), lq.exp()
    # Both 0: neither side counts the id, and -inf - -inf must not become NaN.
    d = torch.where((p == 0) & (q == 0), 0, lq - lp)
    if kind == "forward_kl":
        return torch.where(q == 0, 0, q * d), None
    if kind == "tvd":
        return (p - q).abs() / 2, (p - q).sign() / 2
    if kind == "reverse_kl":
        return torch.where(p == 0, 0, p * -d), -d
    r, away = _mixture(d, 1 - w if kind == "skew_reverse_kl" else w)
    if kind == "skew_reverse_kl":
        return torch.where(p == 0, 0, p * -r), -r - w * torch.expm1(-r)
    if kind == "skew_forward_kl":
        return torch.where(q == 0, 0, q * away), -(1 - w) * torch.expm1(away)
    terms = w * torch.where(q == 0, 0, q * away) + (1 - w) * torch.where(p == 0, 0, p * -r)
    return terms, (1 - w) * -r


def normalisers(x: Tensor, how: How) -> Tensor:
    """[M, 2] of rows [M, V]: the maximum of z, and the logarithm of sum exp(z - maximum)."""
    wide = wide_dtype(x)
    out = torch.empty((x.size(0), 2), dtype=wide, device=x.device)
    for rows in _blocks(*x.shape):
        out[rows] = _normal(_values(x[rows], how, wide))
    return out


def divergence_sums(
    student: Tensor,
    teacher: Tensor,
    normal_s: Tensor,
    normal_t: Tensor,
    kind: str,
    mix: float,
    how_s: How,
    how_t: How,
) -> Tensor:
    """[M, 2]: loss and K of rows whose normalisers are known; partial sums where the columns are a
    part of the vocabulary.

    Args:
        student: [M, V].
        teacher: [M, Vt], Vt <= V; it gives probability 0 to the columns that it lacks.
        normal_s, normal_t: [M, 2], of the whole vocabulary.
    """
    wide = normal_s.dtype
    out = torch.zeros((student.size(0), 2), dtype=wide, device=student.device)
    for rows in _blocks(*student.shape):
        lp = _logs(_values(student[rows], how_s, wide), normal_s[rows])
        lq = _teacher_logs(teacher[rows], normal_t[rows].to(wide), how_t, lp.size(1))
        terms, slopes = _terms(lp, lq, kind, mix)
        out[rows, 0] = terms.sum(1)
        if kind == "reverse_kl":
            out[rows, 1] = out[rows, 0]
        elif slopes is not None:
            p = lp.exp()
            out[rows, 1] = torch.where(p == 0, 0, p * slopes).sum(1)
    return out


def divergence_forward(
    student: Tensor, teacher: Tensor, kind: str, mix: float, how_s: How, how_t: How
) -> tuple[Tensor, Tensor]:
    """Losses [M] and statistics [M, 5]: max_s, log_s, max_t, log_t, K.

    Args:
        student: [M, V].
        teacher: [M, Vt], Vt <= V.
    """
    wide = wide_dtype(student, teacher)
    normal_s = normalisers(student, how_s).to(wide)
    normal_t = normalisers(teacher, how_t).to(wide)
    sums = divergence_sums(student, teacher, normal_s, normal_t, kind, mix, how_s, how_t)
    return sums[:, 0].clone(), torch.cat([normal_s, normal_t, sums[:, 1:]], 1)


def divergence_gradient(
    out: Tensor,
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    stats: Tensor,
    kind: str,
    mix: float,
    how_s: How,
    how_t: How,
    extra: Extra | None = None,
) -> None:
    """Writes grad * dL/dx into `out` [M, V], which may be the student itself.

    A row whose gradients are 0 is written as 0 without a look at its numbers.

    Args:
        grad: [M], of the losses.
        stats: [M, 5], of `divergence_forward`.
        extra: a cross-entropy to add.
    """
    wide = stats.dtype
    for rows in _blocks(*student.shape):
        lp = _logs(_values(student[rows], how_s, wide), stats[rows, 0:2])
        lq = _teacher_logs(teacher[rows], stats[rows, 2:4], how_t, lp.size(1))
        p = lp.exp()
        if kind == "forward_kl":
            dz = p - lq.exp()
        else:
            slopes = _terms(lp, lq, kind, mix)[1]
            assert slopes is not None
            dz = torch.where(p == 0, 0, p * (slopes - stats[rows, 4:5]))
        g = grad[rows, None].to(wide)
        dx = torch.where(g == 0, 0, _chain(dz * g, student[rows], how_s))
        if extra is not None:
            dx += _cross_entropy(extra, rows, student, how_s, wide)
        out[rows] = dx.to(out.dtype)


def _cross_entropy(
    extra: Extra, rows: slice, student: Tensor, how: How, wide: torch.dtype
) -> Tensor:
    plain = how._replace(temperature=1.0)
    dz = _logs(_values(student[rows], plain, wide), extra.normal[rows].to(wide)).exp()
    g = extra.grad[rows, None].to(wide)
    dz = torch.where(g == 0, 0, dz * g)
    _add_at(dz, extra.ids[rows], -extra.grad[rows].to(wide))
    return torch.where(g == 0, 0, _chain(dz, student[rows], plain))


def _add_at(z: Tensor, ids: Tensor, values: Tensor) -> None:
    """z[i, ids[i]] += values[i] where the id is not negative."""
    picked = ids >= 0
    z.scatter_add_(1, ids.clamp(min=0)[:, None], torch.where(picked, values, 0)[:, None])


def logprob_forward(x: Tensor, ids: Tensor, how: How) -> Tensor:
    """[M, 4] of rows [M, V]: max, log, E = sum p (z - max), and z of the id (0 for a negative one).

    The log-prob of the id is (z - max) - log, the entropy of the row log - E.
    """
    wide = wide_dtype(x)
    out = torch.empty((x.size(0), 4), dtype=wide, device=x.device)
    for rows in _blocks(*x.shape):
        z = _values(x[rows], how, wide)
        out[rows, :2] = normal = _normal(z)
        away = z - normal[:, 0:1]
        p = (away - normal[:, 1:2]).exp()
        out[rows, 2] = torch.where(p == 0, 0, p * away).sum(1)
        picked = z.gather(1, ids[rows].clamp(min=0)[:, None])[:, 0]
        out[rows, 3] = torch.where(ids[rows] < 0, 0, picked)
    return out


def logprob_gradient(
    out: Tensor,
    grad: Tensor,
    entropy_grad: Tensor | None,
    x: Tensor,
    ids: Tensor,
    stats: Tensor,
    how: How,
) -> None:
    """Writes the gradient of log-probs and entropies into `out` [M, V], which may be x itself.

        dz_j = grad (1[j = id] - p_j) - entropy_grad p_j (lp_j + H),  H = log - E

    A row whose gradients are 0 is written as 0 without a look at its numbers. A negative id drops
    the first term's 1 and keeps its p.

    Args:
        grad: [M], of the log-probs.
        entropy_grad: [M], of the entropies, or None.
        stats: [M, 4], of `logprob_forward`.
    """
    wide = stats.dtype
    for rows in _blocks(*x.shape):
        lp = _logs(_values(x[rows], how, wide), stats[rows, :2])
        g = grad[rows, None].to(wide)
        idle = g == 0
        factor = -g
        if entropy_grad is not None:
            e = entropy_grad[rows, None].to(wide)
            idle = idle & (e == 0)
            entropy = stats[rows, 1:2] - stats[rows, 2:3]
            factor = factor - torch.where(e == 0, 0, e * (lp + entropy))
        p = lp.exp()
        dz = torch.where(idle | (p == 0), 0, p * factor)
        _add_at(dz, ids[rows], grad[rows].to(wide))
        out[rows] = torch.where(idle, 0, _chain(dz, x[rows], how)).to(out.dtype)


class _Eager:
    """The functions above as one object, so that callers name none of the three."""

    normalisers = staticmethod(normalisers)
    divergence_sums = staticmethod(divergence_sums)
    divergence_forward = staticmethod(divergence_forward)
    divergence_gradient = staticmethod(divergence_gradient)
    logprob_forward = staticmethod(logprob_forward)
    logprob_gradient = staticmethod(logprob_gradient)


def kernels(backend: str | None, *tensors: Tensor) -> Any:
    """What computes rows of these tensors: an object with the functions of this module.

    Args:
        backend: "eager", "native" (CPU), "triton" (CUDA), or None for the fastest at hand.
        tensors: the logits or hidden states of the call, on one device.

    Raises:
        ValueError: the backend is not offered, or not for this device or dtype.
        RuntimeError: backend="native" without the C++ core.
    """
    device = tensors[0].device.type
    if backend is not None:
        check_backend(backend, device, OFFERED)
    wide = wide_dtype(*tensors) == torch.float64
    if backend in ("native", "triton") and wide:
        raise ValueError(f"backend={backend!r} computes in float32; got float64 tensors")
    if wide or backend == "eager":
        return _Eager
    if backend == "triton" or (backend is None and device == "cuda"):
        return triton.load("vocabulary") or _Eager
    if device == "cpu":
        core = require_native(backend, device, OFFERED) if backend else native_or_say()
        if core is not None:
            return vocabulary_ops.of(core) or _Eager
    return _Eager
