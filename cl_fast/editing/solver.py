"""The ridge problem that ROME, MEMIT, EMMET and AlphaEdit share, and its exact solution.

    min_D  sum_i |D k_i - t_i|^2 / ridge_i  +  tr(D C0 D^T)

D [d, f] is added to the weight. K [f, n] holds the keys (inputs of the weight) as columns, T [d, n]
what D shall add to their outputs. The prior C0 [f, f] says what it costs to change the answer to
other keys. With ridge 0 the equations D k_i = t_i hold exactly.

    V = C0^-1 K    U = T (K^T V + diag(ridge))^-1    D = U V^T

    method       prior                                        ridge   columns of K
    ROME         CholeskyPrior(C)                             0       1 key
    EMMET        CholeskyPrior(weight C)                      0       a batch
    MEMIT        CholeskyPrior(weight C)                      1       a batch
    with history CholeskyPrior(weight C)                      1       every fact so far
    AlphaEdit    NullSpace(C, threshold), C0^-1 = P / l2      1       every fact so far

A fact of weight w has the ridge 1 / w. History needs no other prior: old facts are more columns.
Column i of V depends on key i alone, so facts are taken away (`refit`) and added (`known_v`)
without a second solve with C0; what results is the fit of the facts that are left, exactly.

ROME: arXiv 2202.05262, eq. 2. MEMIT: 2210.07229, eq. 14. EMMET: 2403.14236. AlphaEdit: 2410.02355.

Everything is float64, on the device of the tensors.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from cl_fast.options import one_of, positive

__all__ = [
    "CholeskyPrior",
    "NullSpace",
    "Prior",
    "ScaledIdentity",
    "Solution",
    "refit",
    "solve",
]

Method = Literal["auto", "dual", "primal"]
Precision = Literal["float64", "mixed"]

JITTERS = (1e-12, 1e-10, 1e-8, 1e-6, 1e-4)
"""What is added to the diagonal of a singular C0, one after the other, times tr(C0) / f."""
_ASYMMETRY = 1e-5
"""Times the largest entry: what float32 products leave between C0 and its transpose."""
_DEPENDENT = 1e-11
"""Share of a key that is not a combination of the keys before it. Those of one prompt, computed in
float32 in two batches, differ by 1e-13 of their square; keys of two prompts by far more."""
_BLOCK = 256
"""Columns of a block of the Cholesky factorisation."""
_CG_STEPS, _CG_ROUNDS = 60, 3
_CG_TOLERANCE, _CG_ACCEPTED = 1e-12, 1e-8
"""Errors of the conjugate gradients in the norm of C0, relative to the solution: where they stop,
and the largest that is not refused. float64 itself reaches about eps times the condition."""
_SHIFTS = (0, 1, 4, 16, 64, 256)
"""Multiples of float32's eps, added to the unit diagonal of the preconditioner alone."""


class Prior(Protocol):
    """What it costs to change the answer to other keys: C0 [f, f], symmetric and positive.

    Attributes:
        size: f.
        identity: a hash of what it computes. Fits with different priors cannot be added.
    """

    @property
    def size(self) -> int: ...

    @property
    def identity(self) -> str: ...

    def inverse(self, keys: Tensor) -> Tensor:
        """C0^-1 K: [f, n] for K [f, n]."""

    def whiten(self, keys: Tensor) -> Tensor:
        """X [m, n] with X^T X = K^T C0^-1 K, of any m."""

    def matrix(self) -> Tensor | None:
        """C0 [f, f]; None where only its inverse exists, or `whiten` is just as exact."""


@dataclass(frozen=True, eq=False)
class Solution:
    """D = U V^T.

    Attributes:
        U: [d, n], float64.
        V: [f, n], float64; column i is C0^-1 k_i.
        method: "dual" or "primal", what was computed.
    """

    U: Tensor
    V: Tensor
    method: str

    def delta(self) -> Tensor:
        """D as one matrix, [d, f]."""
        return self.U @ self.V.mT


# --- priors ------------------------------------------------------------------------------------


class _Inverse(torch.autograd.Function):  # type: ignore[misc]
    """C0^-1 K, whose gradient is C0^-1 times the upstream one: nothing needs to be kept."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, factor: _Factor) -> Tensor:
        ctx.factor = factor
        return factor.solve(keys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Inverse.apply(grads[0], ctx.factor), None


class CholeskyPrior:
    """A covariance as the prior: C0 = weight C, C = L L^T factorised once.

    C and L share one [f, f] float64 buffer, 1.6 GB at f = 14,336: L below, C above the diagonal.

    A C that is singular in float64 (fewer tokens than f, dead neurons) gets a jitter on its
    diagonal, the smallest of 1e-12 ... 1e-4 times tr(C) / f that makes it positive definite, with
    a warning. Singular means that a pivot is less than f eps times its diagonal entry, whatever the
    scale of that neuron (Demmel's condition, Higham 2002, theorem 10.7).

    precision="mixed" is for devices that are slow in float64: L in float32 is the preconditioner
    of conjugate gradients in float64. Where they stall (a condition number of C of 1e9 and more)
    there is a warning, and C is factorised in float64 after all. Takes another 4 f^2 bytes.

    Args:
        C0: [f, f], symmetric, float64 or float32. The part above the diagonal is read.
        name: of the layer, for messages.
        precision: "float64" or "mixed".
        overwrite: use the memory of C0, which must be float64 and contiguous, for L.
        identity: of C0, where the caller has a better one than a hash of its numbers.

    Attributes:
        weight: 1.0; see `reweighted`.
        jitter: what was added to the diagonal of C; 0.0 as a rule.
        relative_jitter: the same, divided by tr(C) / f.
        precision: of the factor; "float64" after "mixed" failed.
        fallback: why "mixed" failed, or "".

    Raises:
        TypeError, ValueError: C0 is not such a matrix; it has NaN or infinite entries; it is not
            positive definite even with the largest jitter.
    """

    def __init__(
        self,
        C0: Tensor,
        *,
        name: str = "",
        precision: Precision = "float64",
        overwrite: bool = False,
        identity: str | None = None,
    ) -> None:
        one_of("precision", precision, ("float64", "mixed"))
        where = f"C0 of {name}" if name else "C0"
        _check_square(where, C0)
        if overwrite and not (C0.dtype == torch.float64 and C0.is_contiguous()):
            raise ValueError(
                f"overwrite=True needs a contiguous float64 C0; got {C0.dtype}, strides "
                f"{tuple(C0.stride())}"
            )
        _check_symmetric(where, C0)
        C0 = C0.detach()
        buffer = C0 if overwrite else C0.to(torch.float64, copy=True).contiguous()
        self.weight = 1.0
        self._factor = _Factor(buffer, where, identity or _hash_matrix(buffer))
        self._factor.factorise(precision)

    @classmethod
    def from_factor(
        cls,
        C0: Tensor,
        factor: Tensor,
        *,
        relative_jitter: float = 0.0,
        name: str = "",
        identity: str | None = None,
    ) -> CholeskyPrior:
        """A prior whose factor is known, for example from a file. The memory of C0 is taken over.

        Args:
            C0: [f, f], float64, contiguous, without the jitter.
            factor: L of C0 + jitter I, row by row without what is above the diagonal:
                [f (f + 1) / 2], float64.
            relative_jitter, name, identity: of the prior that the factor is of.

        Raises:
            ValueError: the sizes do not fit, or L L^T is not C0, as a vector shows.
        """
        where = f"C0 of {name}" if name else "C0"
        _check_square(where, C0)
        f = C0.size(0)
        if C0.dtype != torch.float64 or not C0.is_contiguous():
            raise ValueError(f"{where} must be float64 and contiguous; got {C0.dtype}")
        if factor.shape != (f * (f + 1) // 2,) or factor.dtype != torch.float64:
            raise ValueError(
                f"factor must hold {f * (f + 1) // 2} numbers in float64 for {where}; got "
                f"{tuple(factor.shape)} in {factor.dtype}"
            )
        prior = cls.__new__(cls)
        prior.weight = 1.0
        prior._factor = _Factor(C0.detach(), where, identity or _hash_matrix(C0))
        prior._factor.take(factor, relative_jitter)
        return prior

    def reweighted(self, weight: float) -> CholeskyPrior:
        """The prior weight C0, without another factorisation: for a sweep over MEMIT's lambda.

        Memory, jitter and precision are shared.
        """
        positive("weight", weight)
        other = copy.copy(self)
        other.weight = self.weight * float(weight)
        return other

    @property
    def size(self) -> int:
        return int(self._factor.buffer.size(0))

    @property
    def identity(self) -> str:
        factor = self._factor
        return _hash("cholesky", factor.content, factor.relative.hex(), self.weight.hex())

    @property
    def jitter(self) -> float:
        return self._factor.jitter

    @property
    def relative_jitter(self) -> float:
        return self._factor.relative

    @property
    def precision(self) -> str:
        return self._factor.precision

    @property
    def fallback(self) -> str:
        return self._factor.fallback

    def __repr__(self) -> str:
        return (
            f"CholeskyPrior({self.size}, {self.identity[:8]}, weight={self.weight:g}, "
            f"jitter={self.jitter:g})"
        )

    def inverse(self, keys: Tensor) -> Tensor:
        """C0^-1 K: [f, n], differentiable with respect to K."""
        keys = _check_keys(keys, self.size, self._factor.buffer.device)
        out: Tensor = _Inverse.apply(keys, self._factor)
        return out / self.weight

    def whiten(self, keys: Tensor) -> Tensor:
        """L^-1 K / sqrt(weight): [f, n], differentiable with respect to K."""
        keys = _check_keys(keys, self.size, self._factor.buffer.device)
        self._factor.need_float64("L^-1 K was asked for")
        x = torch.linalg.solve_triangular(self._factor.buffer, keys, upper=False)
        return x / math.sqrt(self.weight)

    def matrix(self) -> Tensor:
        """C0 [f, f], with its jitter: a new tensor."""
        return self._factor.matrix().mul_(self.weight)

    def rows(self) -> Iterator[Tensor]:
        """L of C, row by row without what is above the diagonal: for `from_factor`."""
        self._factor.need_float64("its factor was asked for")
        return (self._factor.buffer[i, : i + 1] for i in range(self.size))


class _Factor:
    """C and its L in one buffer; what priors of several weights share."""

    def __init__(self, buffer: Tensor, where: str, content: str) -> None:
        self.buffer, self.where, self.content = buffer, where, content
        self._diagonal = buffer.diagonal().clone()
        self._scale = float(self._diagonal.mean())
        if not self._scale > 0:
            raise ValueError(f"{where} must have a positive trace; got {self._scale:g} * f")
        self.relative = 0.0
        self.precision: str = "float64"
        self.fallback = ""
        self._low: Tensor | None = None
        self._inverse_scale: Tensor | None = None

    @property
    def jitter(self) -> float:
        return self.relative * self._scale

    def factorise(self, precision: Precision) -> None:
        if precision == "mixed":
            self.precision = precision
            self._factorise_low()
        if self._low is None:
            self._factorise()

    def take(self, factor: Tensor, relative: float) -> None:
        """A factor that is known, compared with C by a vector p: L (L^T p) = C p + jitter p."""
        self.relative = relative
        self._diagonal = self._diagonal + self.jitter
        f = self.buffer.size(0)
        p = torch.sin(torch.arange(1.0, f + 1, dtype=torch.float64)).to(self.buffer.device)
        want = self.buffer @ p + self.jitter * p
        start = 0
        for i in range(f):
            self.buffer[i, : i + 1] = factor[start : start + i + 1]
            start += i + 1
        blocks = [slice(i, min(i + _BLOCK, f)) for i in range(0, f, _BLOCK)]
        half, got = torch.zeros_like(p), torch.empty_like(p)
        for rows in blocks:
            half[: rows.stop] += self.buffer[rows, : rows.stop].tril(rows.start).mT @ p[rows]
        for rows in blocks:
            got[rows] = self.buffer[rows, : rows.stop].tril(rows.start) @ half[: rows.stop]
        if not float((got - want).norm()) <= 1e-8 * float(want.norm()):
            raise ValueError(f"factor is not the Cholesky factor of {self.where}")

    def matrix(self) -> Tensor:
        matrix = self.buffer.clone()
        matrix.diagonal().copy_(self._diagonal)
        mirror_upper_(matrix)
        return matrix

    def need_float64(self, reason: str) -> None:
        """No warning: nothing failed."""
        if self._low is not None:
            self.precision, self.fallback = "float64", reason
            self._low = self._inverse_scale = None
            self._factorise()

    def solve(self, keys: Tensor) -> Tensor:
        if self._low is not None:
            found = self._conjugate_gradients(keys)
            if found is not None:
                return found
        x = torch.linalg.solve_triangular(self.buffer, keys, upper=False)
        return torch.linalg.solve_triangular(self.buffer.mT, x, upper=True)

    # float64

    def _factorise(self) -> None:
        plain = self._diagonal
        for relative in (0.0, *JITTERS):
            self.relative, self._diagonal = relative, plain + relative * self._scale
            if relative:
                mirror_upper_(self.buffer)
            self.buffer.diagonal().copy_(self._diagonal)
            if _cholesky_(self.buffer, self._diagonal):
                break
        else:
            raise ValueError(
                f"{self.where} is not positive definite, not even with {JITTERS[-1]:g} of its "
                "mean diagonal added: second moments of keys cannot be indefinite, so it was "
                "computed wrongly or damaged. Collect the statistics again"
            )
        if relative:
            warnings.warn(
                f"{self.where} is singular in float64: {relative:g} of its mean diagonal, "
                f"{self.jitter:.3g}, was added to its diagonal. Directions that no key of the "
                "statistics had are held by that alone; more tokens are the remedy",
                stacklevel=3,
            )

    # float32 as the preconditioner

    def _factorise_low(self) -> None:
        """L of C0 scaled to a unit diagonal, in float32."""
        mirror_upper_(self.buffer)
        diagonal = self._diagonal
        if not bool((diagonal > 0).all()):
            self._fall_back("its diagonal has entries that are not positive")
            return
        inverse_scale = diagonal.rsqrt()
        low = (self.buffer * inverse_scale).mul_(inverse_scale[:, None]).to(torch.float32)
        for shift in _SHIFTS:
            if shift:
                mirror_upper_(low)
            low.diagonal().fill_(1 + shift * torch.finfo(low.dtype).eps)
            if _cholesky_(low, torch.zeros_like(low.diagonal())):
                self._low, self._inverse_scale = low, inverse_scale
                return
        self._fall_back("it has no Cholesky factor in float32")

    def _precondition(self, residual: Tensor) -> Tensor:
        assert self._low is not None
        assert self._inverse_scale is not None
        scaled = residual * self._inverse_scale[:, None]
        largest = scaled.abs().amax(0).clamp_min(torch.finfo(torch.float64).tiny)
        x = (scaled / largest).to(torch.float32)
        x = torch.linalg.solve_triangular(self._low, x, upper=False)
        x = torch.linalg.solve_triangular(self._low.mT, x, upper=True)
        return x.to(torch.float64).mul_(largest).mul_(self._inverse_scale[:, None])

    def _conjugate_gradients(self, keys: Tensor) -> Tensor | None:
        """C0^-1 K, all columns at once; None after the fall back to float64.

        The error of a column is sqrt(r^T M^-1 r), r its residual and M the preconditioner: nearly
        its error in the norm of C0, which is the one that K^T C0^-1 K feels.
        """
        x, residual = torch.zeros_like(keys), keys
        z = self._precondition(residual)
        first = (residual * z).sum(0)
        error, steps = math.inf, 0
        for _ in range(_CG_ROUNDS):
            rz, p = (residual * z).sum(0), z
            for _ in range(_CG_STEPS):
                active = rz > _CG_TOLERANCE**2 * first
                if not bool(active.any()):
                    break
                q = self.buffer @ p
                step = torch.where(active, rz / (p * q).sum(0), 0.0)
                x = x + step * p
                residual = residual - step * q
                z = self._precondition(residual)
                after = (residual * z).sum(0)
                p = z + torch.where(active, after / rz, 0.0) * p
                rz = torch.where(active, after, rz)
                steps += 1
            # What the updates of the residual added up to drifts from the true one.
            residual = keys - self.buffer @ x
            z = self._precondition(residual)
            relative = (residual * z).sum(0) / first.clamp_min(torch.finfo(first.dtype).tiny)
            before, error = error, float(relative.max().clamp_min(0).sqrt())
            if error <= _CG_ACCEPTED:
                return x
            if not error < 0.1 * before:
                break
        self._fall_back(
            f"conjugate gradients stalled at a relative error of {error:.1e} after {steps} steps"
        )
        self._factorise()
        return None

    def _fall_back(self, reason: str) -> None:
        warnings.warn(
            f"{self.where} is too ill-conditioned for precision='mixed': {reason}. It is "
            "factorised in float64 instead, which is slower but exact",
            stacklevel=3,
        )
        self.precision, self.fallback = "float64", reason
        self._low = self._inverse_scale = None


class ScaledIdentity:
    """C0 = scale I: every direction costs the same. What is left of ROME without statistics.

    Args:
        size: f.
        scale: positive.
    """

    def __init__(self, size: int, scale: float = 1.0) -> None:
        positive("scale", scale)
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"size must be an int; got {size!r}")
        if size < 1:
            raise ValueError(f"size must be at least 1; got {size}")
        self.size, self.scale = size, float(scale)

    @property
    def identity(self) -> str:
        return _hash("identity", str(self.size), self.scale.hex())

    def __repr__(self) -> str:
        return f"ScaledIdentity({self.size}, {self.scale:g})"

    def inverse(self, keys: Tensor) -> Tensor:
        """K / scale."""
        return _check_keys(keys, self.size, None) / self.scale

    def whiten(self, keys: Tensor) -> Tensor:
        """K / sqrt(scale)."""
        return _check_keys(keys, self.size, None) / math.sqrt(self.scale)

    def matrix(self) -> None:
        """None: it need not be written down, `whiten` is all of it."""


class NullSpace:
    """AlphaEdit's prior: C0^-1 = P / l2, P the projection onto directions that keys rarely have.

    D = D P, so that keys in the protected directions keep their answer exactly, and others pay l2.
    P is spanned by the eigenvectors of C with small eigenvalues. Of them and the protected ones,
    those that are fewer are held: P = Q Q^T, or P = I - Q Q^T.

    Args:
        C: [f, f], symmetric, float64 or float32: second moments of keys, `sum k k^T / count`.
        threshold: eigenvalues below are free. Absolute, 2e-2 in the paper's code: it has to fit the
            scale of the model's activations.
        energy: instead: the protected directions are the fewest that hold this share of tr(C),
            0.99 for example. Means the same for every model.
        l2: positive; 10 in the paper's code.
        name, identity: as for `CholeskyPrior`.

    Attributes:
        free: dimensions in which D may act.
        protected: f - free.

    Raises:
        ValueError: neither or both of threshold and energy; nothing is free, or nothing protected.
    """

    def __init__(
        self,
        C: Tensor,
        *,
        threshold: float | None = None,
        energy: float | None = None,
        l2: float = 10.0,
        name: str = "",
        identity: str | None = None,
    ) -> None:
        where = f"C of {name}" if name else "C"
        _null_space_rule(threshold, energy)
        _check_square(where, C)
        _check_symmetric(where, C)
        wide = C.detach().to(torch.float64)
        values, vectors = torch.linalg.eigh(wide, UPLO="U")
        self._choose(values, vectors, threshold, energy, l2, where, identity or _hash_matrix(wide))

    @classmethod
    def from_eigenvectors(
        cls,
        values: Tensor,
        vectors: Tensor,
        *,
        threshold: float | None = None,
        energy: float | None = None,
        l2: float = 10.0,
        name: str = "",
        identity: str,
    ) -> NullSpace:
        """A prior of a C whose eigenvectors are known: another threshold costs nothing.

        Args:
            values, vectors: [f] ascending and [f, f], as `torch.linalg.eigh` gives them, float64.
            threshold, energy, l2, name, identity: as for a C.

        Raises:
            ValueError: as for a C; the vectors are not orthonormal, as one of them shows.
        """
        f = values.numel()
        for what, x, shape in (("values", values, (f,)), ("vectors", vectors, (f, f))):
            if x.dtype != torch.float64 or tuple(x.shape) != shape:
                raise ValueError(
                    f"{what} must be float64 of the shape {shape}; got {x.dtype}, {tuple(x.shape)}"
                )
        p = torch.sin(torch.arange(1.0, f + 1, dtype=torch.float64)).to(vectors.device)
        if not float((vectors.mT @ (vectors @ p) - p).norm()) <= 1e-8 * float(p.norm()):
            raise ValueError("vectors must be orthonormal columns")
        prior = cls.__new__(cls)
        where = f"C of {name}" if name else "C"
        prior._choose(values, vectors, threshold, energy, l2, where, identity)
        return prior

    def _choose(
        self,
        values: Tensor,
        vectors: Tensor,
        threshold: float | None,
        energy: float | None,
        l2: float,
        where: str,
        content: str,
    ) -> None:
        rule = _null_space_rule(threshold, energy)
        positive("l2", l2)
        f = values.numel()
        free = _free_directions(values, threshold, energy)
        if free in (0, f):
            what = "no direction is free" if free == 0 else "every direction is free"
            raise ValueError(
                f"{rule} leaves nothing to do: {what} in {where}, whose eigenvalues lie between "
                f"{float(values[0]):.3g} and {float(values[-1]):.3g}. energy=0.99 adapts to them"
            )
        self.size, self.free, self.protected, self.l2 = f, free, f - free, float(l2)
        self._kept = 2 * free <= f
        self._basis = vectors[:, :free].clone() if self._kept else vectors[:, free:].clone()
        self.identity = _hash("null space", content, rule, self.l2.hex())

    @property
    def basis(self) -> Tensor:
        """[f, r], orthonormal: of the free directions or the protected, whichever are fewer."""
        return self._basis

    def __repr__(self) -> str:
        return f"NullSpace({self.size}, {self.free} free, l2={self.l2:g}, {self.identity[:8]})"

    def project(self, keys: Tensor) -> Tensor:
        """P K: [f, n]."""
        keys = _check_keys(keys, self.size, self._basis.device)
        inside = self._basis @ (self._basis.mT @ keys)
        return inside if self._kept else keys - inside

    def inverse(self, keys: Tensor) -> Tensor:
        """P K / l2."""
        return self.project(keys) / self.l2

    def whiten(self, keys: Tensor) -> Tensor:
        """Q^T K / sqrt(l2), or P K / sqrt(l2)."""
        if not self._kept:
            return self.project(keys) / math.sqrt(self.l2)
        keys = _check_keys(keys, self.size, self._basis.device)
        return (self._basis.mT @ keys) / math.sqrt(self.l2)

    def matrix(self) -> None:
        """None: protected directions cost infinitely much."""


def _null_space_rule(threshold: float | None, energy: float | None) -> str:
    """Which directions are free, in words that also serve as a part of the identity."""
    if (threshold is None) == (energy is None):
        raise ValueError("give one of threshold (absolute) and energy (a share of the trace)")
    if threshold is not None:
        positive("threshold", threshold)
        return f"threshold={float(threshold)!r}"
    positive("energy", energy)
    assert energy is not None
    if energy >= 1:
        raise ValueError(f"energy must be less than 1; got {energy}")
    return f"energy={float(energy)!r}"


def _free_directions(values: Tensor, threshold: float | None, energy: float | None) -> int:
    """How many of the ascending eigenvalues are small."""
    if threshold is not None:
        return int((values < threshold).sum())
    assert energy is not None
    values = values.clamp_min(0)
    largest_first = values.flip(0).cumsum(0)
    protected = int((largest_first < energy * largest_first[-1]).sum()) + 1
    return int(values.numel()) - min(protected, int(values.numel()))


# --- the problem -------------------------------------------------------------------------------


def solve(
    prior: Prior,
    K: Tensor,
    T: Tensor,
    ridge: float | Tensor = 1.0,
    *,
    method: Method = "auto",
    known_v: Tensor | None = None,
) -> Solution:
    """The D = U V^T that adds T to the answers to K, and as little as the prior asks to others.

    Differentiable with respect to K, T and ridge, twice.

        method   computes U as                               multiplications
        dual     T (K^T V + diag(ridge))^-1                  f n^2 + n^3/6 + d n^2
        primal   (T - T W K^T (C0 + K W K^T)^-1 K) W         f^2 n + f^3/6 + 2 d f^2 + 6 d f n

    with W = diag(1 / ridge), after V, which takes f^2 n. "auto" takes the cheaper one: dual up to
    n = f and more. Both give the same D. D = U V^T is a sum of terms u v^T that may cancel: its
    relative error is about eps sum |u| |v| / |D|.

    Args:
        prior: of size f.
        K: [f, n], the keys as columns; float64, or float32 and below, which is widened.
        T: [d, n], what is to be added to their answers.
        ridge: what it costs to miss a target: a number, or [n]; 0 or more. 0: it is not missed.
        method: "auto", "dual" or "primal"; the latter needs every ridge to be positive.
        known_v: [f, m], `V` of the first m columns of K from an earlier solution with this prior.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: shapes, devices or numbers do not fit; columns of K depend on one another while
            their ridge is 0.
    """
    one_of("method", method, ("auto", "dual", "primal"))
    K = _check_columns("K", K, None)
    T = _check_columns("T", T, K)
    f, n = K.shape
    if f != prior.size:
        raise ValueError(f"K must have {prior.size} rows, the size of the prior; got {f}")
    costs = _check_ridge(ridge, n, K)
    V = _all_v(prior, K, known_v)
    if n == 0:
        return Solution(T, V, "dual")
    if method == "auto":
        method = _cheaper(f, T.size(0), n, bool((costs > 0).all()))
    if method == "primal":
        if not bool((costs > 0).all()):
            at = int((costs == 0).nonzero()[0])
            raise ValueError(
                f"method='primal' needs every ridge to be positive; ridge[{at}] is 0. Use "
                "method='dual'"
            )
        return Solution(_primal(prior, K, V, T, costs), V, method)
    return Solution(_dual(K, V, T, costs), V, method)


def refit(V: Tensor, K: Tensor, T: Tensor, ridge: float | Tensor = 1.0) -> Tensor:
    """U [d, n] of the solution for these columns, from V = C0^-1 K alone: no prior is needed.

    With columns left out it is the fit without their facts; with those of two fits by one prior it
    is their joint fit. Takes f n^2 + n^3 / 6 + d n^2 multiplications. Differentiable.

    Args:
        V, K: [f, n].
        T: [d, n].
        ridge: a number or [n], 0 or more.

    Raises:
        TypeError, ValueError: as `solve`.
    """
    K = _check_columns("K", K, None)
    V = _check_columns("V", V, K)
    T = _check_columns("T", T, K)
    if V.shape != K.shape:
        raise ValueError(f"V must have the shape of K, {tuple(K.shape)}; got {tuple(V.shape)}")
    costs = _check_ridge(ridge, K.size(1), K)
    return _dual(K, V, T, costs) if K.size(1) else T


def _cheaper(f: int, d: int, n: int, positive_ridge: bool) -> Literal["dual", "primal"]:
    dual = f * n * n + n**3 / 6 + d * n * n
    primal = f * f * n + f**3 / 6 + 2 * d * f * f + 6 * d * f * n
    return "primal" if positive_ridge and primal < dual else "dual"


def _all_v(prior: Prior, K: Tensor, known: Tensor | None) -> Tensor:
    if known is None:
        return prior.inverse(K)
    known = _check_tensor("known_v", known).to(torch.float64)
    f, n = K.shape
    if known.dim() != 2 or known.size(0) != f or known.size(1) > n:
        raise ValueError(
            f"known_v must be [{f}, m] with m from 0 to {n}, the columns of K; got "
            f"{tuple(known.shape)}"
        )
    if known.device != K.device:
        raise ValueError(f"known_v must be on the device of K, {K.device}; got {known.device}")
    if known.size(1) == n:
        return known
    return torch.cat([known, prior.inverse(K[:, known.size(1) :])], 1)


def _dual(K: Tensor, V: Tensor, T: Tensor, ridge: Tensor) -> Tensor:
    """T (K^T V + diag(ridge))^-1, scaled to a unit diagonal: keys and ridges may differ by much."""
    gram = K.mT @ V
    gram = (gram + gram.mT) / 2 + torch.diag(ridge)
    diagonal = gram.diagonal()
    flat = (diagonal.detach() <= 0).nonzero()
    if len(flat):
        raise ValueError(
            f"column {int(flat[0])} of K is a key that the prior leaves no way to change (it is 0, "
            "or lies in protected directions) while its ridge is 0: its target cannot be reached. "
            "Give it a positive ridge, or leave it out"
        )
    scale = diagonal.rsqrt()
    unit = scale[:, None] * gram * scale
    lower, info = torch.linalg.cholesky_ex(unit)
    at = int(info) - 1
    if at < 0:
        small = (lower.detach().diagonal().square() <= _DEPENDENT).nonzero()
        at = int(small[0]) if len(small) else -1
    if at >= 0:
        _refuse_dependent(unit.detach(), at)
    return torch.cholesky_solve((T * scale).mT, lower).mT * scale


def _refuse_dependent(unit: Tensor, at: int) -> None:
    """Say which columns make up column `at`, the first that depends on those before it."""
    others: list[int] = []
    if at:
        part = unit[:at, :at]
        combination = torch.linalg.lstsq(part, unit[:at, at : at + 1]).solution[:, 0].abs()
        largest = combination.argsort(descending=True)[:4]
        others = sorted(i for i in largest.tolist() if combination[i] > 1e-3)
    listed = ", ".join(map(str, [*others, at]))
    raise ValueError(
        f"columns {listed} of K depend on one another, and a ridge of 0 asks all of their targets "
        "to be met exactly: merge facts that share a key, leave some out, or give them a positive "
        "ridge"
    )


def _primal(prior: Prior, K: Tensor, V: Tensor, T: Tensor, ridge: Tensor) -> Tensor:
    """(T - D K) W with D = T W K^T (C0 + K W K^T)^-1, once refined: the difference may cancel.

    Without a C0, K and C0 are X = whiten(K) and I: then D is in other coordinates, D K the same.
    """
    weight = 1 / ridge
    if not bool(torch.isfinite(weight.detach()).all()):
        raise ValueError(
            f"a ridge of {float(ridge.detach().min()):g} is too small for method='primal': use "
            "method='dual'"
        )
    C0 = prior.matrix()
    X = prior.whiten(K) if C0 is None else K
    inner = (X * weight) @ X.mT
    if C0 is None:
        inner = inner + torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    else:
        inner = inner + C0
    lower = torch.linalg.cholesky((inner + inner.mT) / 2)

    def apply(right: Tensor) -> Tensor:
        D = torch.cholesky_solve(X @ (right * weight).mT, lower).mT
        return (right - D @ X) * weight

    U = apply(T)
    return U + apply(T - U * ridge - (U @ V.mT) @ K)


# --- checks ------------------------------------------------------------------------------------


def _check_tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point; got {value.dtype}")
    return value


def _check_columns(name: str, value: Any, like: Tensor | None) -> Tensor:
    """A finite matrix of columns, as float64."""
    value = _check_tensor(name, value)
    if value.dim() != 2:
        raise ValueError(f"{name} must be a matrix of columns; got {tuple(value.shape)}")
    if like is not None:
        if value.size(1) != like.size(1):
            raise ValueError(
                f"{name} must have a column for each of the {like.size(1)} columns of K; got "
                f"{value.size(1)}"
            )
        if value.device != like.device:
            raise ValueError(
                f"{name} must be on the device of K, {like.device}; got {value.device}"
            )
    finite = torch.isfinite(value.detach()).all(0)
    if not bool(finite.all()):
        raise ValueError(
            f"{name} has NaN or infinity in column {int(finite.logical_not().nonzero()[0])}"
        )
    return value.to(torch.float64)


def _check_ridge(ridge: float | Tensor, n: int, like: Tensor) -> Tensor:
    if isinstance(ridge, Tensor):
        costs = ridge.to(torch.float64)
        if costs.dim() > 1 or (costs.dim() == 1 and costs.numel() != n):
            raise ValueError(f"ridge must be a number or [{n}]; got {tuple(ridge.shape)}")
        if costs.dim() == 1 and costs.device != like.device:
            raise ValueError(f"ridge must be on the device of K, {like.device}; got {costs.device}")
        costs = costs.to(like.device).expand(n)
    elif isinstance(ridge, bool) or not isinstance(ridge, (int, float)):
        raise TypeError(f"ridge must be a number or a tensor; got {type(ridge).__name__}")
    else:
        costs = torch.full((n,), float(ridge), dtype=torch.float64, device=like.device)
    fine = torch.isfinite(costs.detach()) & (costs.detach() >= 0)
    if not bool(fine.all()):
        at = int(fine.logical_not().nonzero()[0])
        raise ValueError(f"ridge must be 0 or more, and finite; ridge[{at}] is {float(costs[at])}")
    return costs


def _check_keys(keys: Tensor, size: int, device: torch.device | None) -> Tensor:
    keys = _check_tensor("keys", keys)
    if keys.dim() != 2 or keys.size(0) != size:
        raise ValueError(f"keys must be [{size}, n]; got {tuple(keys.shape)}")
    if device is not None and keys.device != device:
        raise ValueError(f"keys must be on the device of the prior, {device}; got {keys.device}")
    return keys.to(torch.float64)


def _check_square(where: str, C: Any) -> None:
    if not isinstance(C, Tensor):
        raise TypeError(f"{where} must be a torch.Tensor; got {type(C).__name__}")
    if C.dtype not in (torch.float64, torch.float32):
        raise TypeError(f"{where} must be float64 or float32; got {C.dtype}")
    if C.dim() != 2 or C.size(0) != C.size(1) or not C.numel():
        raise ValueError(f"{where} must be a square matrix; got the shape {tuple(C.shape)}")


def _check_symmetric(where: str, C: Tensor) -> None:
    """Block by block: C may be as large as what is left of the memory."""
    C = C.detach()
    worst, largest = 0.0, 0.0
    for start in range(0, C.size(0), _BLOCK):
        rows = C[start : start + _BLOCK]
        here = float(rows.abs().max())
        if not math.isfinite(here):
            at = start + int(torch.isfinite(rows).all(1).logical_not().nonzero()[0])
            raise ValueError(f"{where} has NaN or infinity in row {at}")
        largest = max(largest, here)
        for left in range(start, C.size(0), _BLOCK):
            mirrored = C[left : left + _BLOCK, start : start + _BLOCK].mT
            worst = max(worst, float((rows[:, left : left + _BLOCK] - mirrored).abs().max()))
    if worst > _ASYMMETRY * largest:
        raise ValueError(
            f"{where} must be symmetric; entries differ from their mirror images by up to "
            f"{worst:.3g}, where the largest is {largest:.3g}"
        )


# --- a factorisation in place -------------------------------------------------------------------


def mirror_upper_(matrix: Tensor) -> None:
    """The part below the diagonal becomes the mirror image of the one above."""
    for start in range(0, matrix.size(0), _BLOCK):
        end = start + _BLOCK
        matrix[end:, start:end] = matrix[start:end, end:].mT
        block = matrix[start:end, start:end]
        block.copy_(block.triu(1) + block.triu().mT)


def _cholesky_(matrix: Tensor, diagonal: Tensor) -> bool:
    """L of a symmetric matrix into its part on and below the diagonal; what is above stays.

    Column blocks from the left to the right (Golub & Van Loan 4.2.6), so that no second matrix of
    this size is needed. False if a pivot is not clearly positive, compared with `diagonal`.
    """
    n = matrix.size(0)
    least = n * torch.finfo(matrix.dtype).eps * diagonal  # n eps a_jj: what rounding may leave
    for start in range(0, n, _BLOCK):
        end = min(start + _BLOCK, n)
        panel = matrix[start:, start:end]
        block = panel[: end - start]
        above = block.triu(1)  # is overwritten on the way, and put back
        if start:
            panel.addmm_(matrix[start:, :start], matrix[start:end, :start].mT, alpha=-1)
        lower, info = torch.linalg.cholesky_ex(block)
        good = lower.diagonal().square() > least[start:end]
        if int(info) != 0 or not bool(good.all()):
            block.copy_(block.tril().add_(above))
            return False
        block.copy_(lower + above)
        if end < n:
            below = panel[end - start :]
            below.copy_(torch.linalg.solve_triangular(lower.mT, below, upper=True, left=False))
    return True


def _hash(*parts: str) -> str:
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part.encode())
    return digest.hexdigest()


def _hash_matrix(matrix: Tensor) -> str:
    """Of the numbers of a symmetric float64 matrix: its size, sums of the bits of each row, and
    its diagonal. Equal on every device."""
    bits = matrix.contiguous().view(torch.int64)
    sums = torch.cat([bits[i : i + _BLOCK].sum(1) for i in range(0, len(bits), _BLOCK)])
    digest = blake2b(digest_size=16)
    digest.update(len(bits).to_bytes(8, "little"))
    digest.update(sums.cpu().numpy().tobytes())
    digest.update(bits.diagonal().cpu().numpy().tobytes())
    return digest.hexdigest()
