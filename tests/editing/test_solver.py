"""The ridge solver against closed forms in numpy: one problem, its methods, history, refits."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from cl_fast.editing.solver import (
    CholeskyPrior,
    NullSpace,
    Prior,
    ScaledIdentity,
    Solution,
    refit,
    solve,
)

Array = NDArray[np.float64]


# --- the oracle: numpy, LU, no factors -----------------------------------------------------------


def closed_form(C0: Array, K: Array, T: Array, ridge: Array) -> Array:
    """T W K^T (C0 + K W K^T)^-1, as the references compute it."""
    weighted = K / ridge
    return np.linalg.solve(C0 + weighted @ K.T, weighted @ T.T).T


def alphaedit(P: Array, K: Array, R: Array, past: Array, l2: float) -> Array:
    """solve(P (K K^T + C_p) + l2 I, P K R^T)^T, C_p of the keys of the past."""
    system = P @ (K @ K.T + past @ past.T) + l2 * np.eye(len(P))
    return np.linalg.solve(system, P @ K @ R.T).T


def recursive(M: Array, D: Array, k: Array, t: Array, sign: float) -> tuple[Array, Array]:
    """A key and its target into (or, with sign -1, out of) M = C^-1 and D."""
    gain = M @ k / (1 + sign * k @ M @ k)
    D = D + sign * np.outer(t - D @ k, gain)
    return M - sign * np.outer(gain, k @ M), D


def relative(got: Any, want: Any) -> float:
    got, want = np.asarray(got), np.asarray(want)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def tensor(x: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x))


class Problem:
    """A covariance of a given condition number, keys and targets."""

    def __init__(self, seed: int, f: int = 40, d: int = 12, n: int = 9, cond: float = 1e5) -> None:
        g = np.random.default_rng(seed)
        self.Q = np.linalg.qr(g.standard_normal((f, f)))[0]
        self.spectrum = np.geomspace(100.0, 100.0 / cond, f)
        self.C0 = (self.Q * self.spectrum) @ self.Q.T
        self.C0 = (self.C0 + self.C0.T) / 2
        self.K, self.T = g.standard_normal((f, n)), g.standard_normal((d, n))
        self.ridge = g.uniform(0.2, 5.0, n)
        self.n, self.f, self.d = n, f, d

    @property
    def prior(self) -> CholeskyPrior:
        return CholeskyPrior(tensor(self.C0))

    def solve(self, ridge: Any = None, **options: Any) -> Solution:
        ridge = tensor(self.ridge) if ridge is None else ridge
        return solve(self.prior, tensor(self.K), tensor(self.T), ridge, **options)


# --- 1. optimal, and equal to the closed form ----------------------------------------------------


@pytest.mark.parametrize("method", ["dual", "primal"])
@pytest.mark.parametrize("n", [1, 7, 39, 40, 90])
def test_the_gradient_is_zero(method: str, n: int) -> None:
    for seed in range(3):
        p = Problem(seed, n=n)
        D = p.solve(method=method).delta().numpy()
        gradient = D @ p.C0 + ((D @ p.K - p.T) / p.ridge) @ p.K.T
        assert np.linalg.norm(gradient) / np.linalg.norm(p.T / p.ridge @ p.K.T) < 1e-10


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    f=st.integers(1, 30),
    d=st.integers(1, 9),
    n=st.integers(1, 45),
    scale=st.floats(-4, 4),
    method=st.sampled_from(["dual", "primal", "auto"]),
)
def test_it_is_the_closed_form(
    seed: int, f: int, d: int, n: int, scale: float, method: str
) -> None:
    p = Problem(seed, f, d, n, cond=1e4)
    p.C0 *= 10.0**scale
    got = p.solve(method=method)
    want = closed_form(p.C0, p.K, p.T, p.ridge)
    # D is a sum of n rank-one terms, each rounded.
    terms = float((got.U.norm(dim=0) * got.V.norm(dim=0)).sum()) / np.linalg.norm(want)
    assert relative(got.delta(), want) < 1e-9 + 4 * np.finfo(float).eps * terms
    assert relative(got.V, np.linalg.solve(p.C0, p.K)) < 1e-9
    assert got.U.shape == (d, n)
    assert got.V.shape == (f, n)


def test_dual_and_primal_agree_and_the_cheaper_one_is_taken() -> None:
    for n in (3, 30, 200):
        p = Problem(5, n=n)
        dual, primal = p.solve(method="dual"), p.solve(method="primal")
        assert relative(primal.delta(), dual.delta()) < 1e-10
        assert relative(primal.U, dual.U) < 1e-9
        assert (dual.method, primal.method) == ("dual", "primal")
        assert p.solve().method == ("primal" if n == 200 else "dual")
    p.ridge[3] = 0  # exact facts have no primal form
    exact = p.solve()
    assert exact.method == "dual"
    assert relative(exact.delta().numpy() @ p.K[:, 3], p.T[:, 3]) < 1e-9


def test_small_ridges_keep_their_digits_in_the_primal_form() -> None:
    """T - D K cancels where a target is met almost exactly."""
    p = Problem(2, n=60, cond=1e2)
    p.ridge = np.geomspace(1e-7, 1.0, 60)
    # 60 keys in 40 dimensions: the residuals of cheap facts vanish beside those of dear ones.
    dual, primal = p.solve(method="dual"), p.solve(method="primal")
    assert relative(primal.delta(), dual.delta()) < 1e-9
    assert relative(primal.U, dual.U) < 1e-9


def test_lower_precision_is_widened_and_nothing_is_nothing() -> None:
    p = Problem(1)
    K, T = tensor(p.K).bfloat16(), tensor(p.T).float()
    got = solve(p.prior, K, T, 1.0)
    want = closed_form(p.C0, K.double().numpy(), T.double().numpy(), np.ones(p.n))
    assert relative(got.delta(), want) < 1e-9
    none = solve(p.prior, tensor(p.K[:, :0]), tensor(p.T[:, :0]))
    assert none.delta().shape == (p.d, p.f)
    assert not none.delta().any()
    assert refit(none.V, none.V, none.U).shape == (p.d, 0)


# --- 2. one problem, many names ------------------------------------------------------------------


def test_memit_is_emmet_with_ridge_one() -> None:
    p = Problem(3)
    inverse = np.linalg.inv(p.C0)
    emmet = p.T @ np.linalg.inv(p.K.T @ inverse @ p.K + np.eye(p.n)) @ p.K.T @ inverse
    assert relative(p.solve(1.0).delta(), emmet) < 1e-9
    assert relative(p.solve(1.0).delta(), closed_form(p.C0, p.K, p.T, np.ones(p.n))) < 1e-9


def test_rome_is_one_key_with_ridge_zero() -> None:
    p = Problem(4, n=1)
    u = np.linalg.solve(p.C0, p.K[:, 0])
    rome = np.outer(p.T[:, 0], u) / (p.K[:, 0] @ u)
    D = p.solve(0.0).delta().numpy()
    assert relative(D, rome) < 1e-12
    assert relative(D @ p.K, p.T) < 1e-13


def test_ridge_zero_meets_all_targets_and_costs_least() -> None:
    p = Problem(4, n=20)
    D = p.solve(0.0).delta().numpy()
    assert relative(D @ p.K, p.T) < 1e-9
    # Any other D that meets them differs by some E with E K = 0, and costs more.
    g = np.random.default_rng(0)
    E = g.standard_normal(D.shape)
    E -= E @ p.K @ np.linalg.pinv(p.K)
    assert abs(np.trace(D @ p.C0 @ E.T)) < 1e-9 * np.linalg.norm(D) * np.linalg.norm(E)
    assert np.trace((D + E) @ p.C0 @ (D + E).T) > np.trace(D @ p.C0 @ D.T)


def test_exact_and_soft_facts_together() -> None:
    """The conditions for an optimum under constraints, as one system: D C0 + E W K^T = Y J^T on
    soft facts, D J = S on exact ones, Y the multipliers."""
    p = Problem(9, cond=1e3)
    exact, soft = [2, 5], [0, 1, 3, 4, 6, 7, 8]
    p.ridge[exact] = 0
    J, L, weight = p.K[:, exact], p.K[:, soft], 1 / p.ridge[soft]
    system = np.block([[p.C0 + (L * weight) @ L.T, J], [J.T, np.zeros((2, 2))]])
    right = np.concatenate([(L * weight) @ p.T[:, soft].T, p.T[:, exact].T])
    want = np.linalg.solve(system, right)[: p.f].T
    D = p.solve().delta().numpy()
    assert relative(D @ J, p.T[:, exact]) < 1e-10
    assert relative(D, want) < 1e-9


def test_a_weight_is_a_repeated_fact() -> None:
    p = Problem(6)
    p.ridge = np.ones(p.n)
    p.ridge[4] = 1 / 3
    thrice = np.concatenate([p.K, p.K[:, [4, 4]]], 1), np.concatenate([p.T, p.T[:, [4, 4]]], 1)
    want = closed_form(p.C0, *thrice, np.ones(p.n + 2))
    assert relative(p.solve().delta(), want) < 1e-9


@pytest.mark.parametrize("size", [7, 31])
@pytest.mark.parametrize("past", [0, 5])
def test_alphaedit_is_its_code(size: int, past: int) -> None:
    p = Problem(7, n=6)
    bound = float(np.sort(p.spectrum)[size - 1 : size + 1].prod() ** 0.5)
    prior = NullSpace(tensor(p.C0), threshold=bound, l2=10.0)
    assert (prior.free, prior.protected) == (size, p.f - size)
    assert prior.basis.shape == (p.f, min(size, p.f - size))
    kept = p.Q[:, p.spectrum < bound]
    P = kept @ kept.T
    g = np.random.default_rng(1)
    old = g.standard_normal((p.f, past))
    K = np.concatenate([old, p.K], 1)
    T = np.concatenate([np.zeros((p.d, past)), p.T], 1)
    want = alphaedit(P, p.K, p.T, old, 10.0)
    for method in ("dual", "primal"):
        D = solve(prior, tensor(K), tensor(T), 1.0, method=method).delta().numpy()
        assert relative(D, want) < 1e-10
        protected = p.Q[:, p.spectrum >= bound]
        assert np.linalg.norm(D @ (np.eye(p.f) - P)) < 1e-12 * np.linalg.norm(D)
        K0 = protected @ g.standard_normal((p.f - size, 4))
        assert np.linalg.norm(D @ K0) < 1e-12 * np.linalg.norm(D) * np.linalg.norm(K0)
    assert prior.matrix() is None


def test_energy_protects_the_fewest_directions_that_hold_it() -> None:
    C = torch.diag(torch.tensor([1.0, 60.0, 9.0, 30.0], dtype=torch.float64))
    for share, protected in ((0.5, 1), (0.6, 1), (0.61, 2), (0.9, 2), (0.95, 3), (0.99, 3)):
        assert NullSpace(C, energy=share).protected == protected
        assert NullSpace(1e6 * C, energy=share).protected == protected
    answer = NullSpace(C, energy=0.9).project(torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(answer, torch.diag(torch.tensor([1.0, 0, 1, 0])).double())


def test_scaled_identity() -> None:
    p = Problem(8)
    prior = ScaledIdentity(p.f, 2.5)
    for method in ("dual", "primal"):
        got = solve(prior, tensor(p.K), tensor(p.T), tensor(p.ridge), method=method)
        want = closed_form(2.5 * np.eye(p.f), p.K, p.T, p.ridge)
        assert relative(got.delta(), want) < 1e-12


# --- 3. history, taking away, order --------------------------------------------------------------


def test_batches_with_history_are_the_joint_fit() -> None:
    """Four batches, each corrected by what is there already: as the sequential methods do it."""
    p = Problem(10, n=20)
    prior, total = p.prior, np.zeros((p.d, p.f))
    for start in range(0, 20, 5):
        old, new = p.K[:, :start], p.K[:, start : start + 5]
        with_history = CholeskyPrior(tensor(p.C0 + old @ old.T))
        asked = p.T[:, start : start + 5] - total @ new
        total = total + solve(with_history, tensor(new), tensor(asked)).delta().numpy()
    joint = solve(prior, tensor(p.K), tensor(p.T))
    assert relative(total, joint.delta()) < 1e-9
    # The same by more columns: targets of 0 for what is there.
    K = np.concatenate([p.K[:, :15], p.K[:, 15:]], 1)
    first = solve(prior, tensor(p.K[:, :15]), tensor(p.T[:, :15])).delta().numpy()
    asked = p.T - first @ p.K
    asked[:, :15] = 0
    extra = solve(prior, tensor(K), tensor(asked)).delta().numpy()
    assert relative(first + extra, joint.delta()) < 1e-9


def test_plain_batches_without_history_are_not() -> None:
    p = Problem(10, n=20)
    plain = np.zeros((p.d, p.f))
    for start in range(0, 20, 5):
        new = slice(start, start + 5)
        asked = p.T[:, new] - plain @ p.K[:, new]
        plain = plain + solve(p.prior, tensor(p.K[:, new]), tensor(asked)).delta().numpy()
    joint = p.solve(1.0).delta().numpy()
    first = slice(0, 5)
    missed = np.linalg.norm(plain @ p.K[:, first] - p.T[:, first])
    assert missed > 5 * np.linalg.norm(joint @ p.K[:, first] - p.T[:, first])


def test_known_columns_are_not_solved_for_again() -> None:
    p = Problem(11)
    asked: list[int] = []

    class Counting(CholeskyPrior):
        def inverse(self, keys: Tensor) -> Tensor:
            asked.append(keys.size(1))
            return super().inverse(keys)

    prior = Counting(tensor(p.C0))
    first = solve(prior, tensor(p.K[:, :6]), tensor(p.T[:, :6]))
    both = solve(prior, tensor(p.K), tensor(p.T), known_v=first.V)
    assert asked == [6, 3]
    assert torch.equal(both.V[:, :6], first.V)
    assert relative(both.delta(), p.solve(1.0).delta()) < 1e-12
    solve(prior, tensor(p.K), tensor(p.T), known_v=both.V)
    assert asked == [6, 3]


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), gone=st.sets(st.integers(0, 8), max_size=8))
def test_taking_columns_away_is_the_fit_without_them(seed: int, gone: set[int]) -> None:
    p = Problem(seed)
    left = [i for i in range(9) if i not in gone]
    whole = p.solve()
    U = refit(whole.V[:, left], tensor(p.K[:, left]), tensor(p.T[:, left]), tensor(p.ridge[left]))
    want = closed_form(p.C0, p.K[:, left], p.T[:, left], p.ridge[left])
    assert relative(U @ whole.V[:, left].mT, want) < 1e-9


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_order_does_not_matter(seed: int, data: st.DataObject) -> None:
    p = Problem(seed)
    order = data.draw(st.permutations(range(p.n)))
    want = p.solve()
    p.K, p.T, p.ridge = p.K[:, order], p.T[:, order], p.ridge[order]
    got = p.solve()
    assert relative(got.delta(), want.delta()) < 1e-10
    assert relative(got.U, want.U[:, order]) < 1e-10


def test_recursive_least_squares_agrees() -> None:
    """One key in, one key out, by rank-one updates of C^-1: what `refit` replaces."""
    p = Problem(12, cond=1e3)
    M, D = np.linalg.inv(p.C0), np.zeros((p.d, p.f))
    for i in range(p.n):
        M, D = recursive(M, D, p.K[:, i], p.T[:, i], 1.0)
    whole = p.solve(1.0)
    assert relative(whole.delta(), D) < 1e-9
    M, D = recursive(M, D, p.K[:, 3], p.T[:, 3], -1.0)
    left = [0, 1, 2, 4, 5, 6, 7, 8]
    U = refit(whole.V[:, left], tensor(p.K[:, left]), tensor(p.T[:, left]))
    assert relative(U @ whole.V[:, left].mT, D) < 1e-9
    M, D = recursive(M, D, p.K[:, 3], p.T[:, 3], 1.0)  # take away, then add: as before
    assert relative(whole.delta(), D) < 1e-9


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dual", "primal"])
@pytest.mark.parametrize("kind", ["cholesky", "mixed", "identity", "null space"])
def test_gradients(method: str, kind: str) -> None:
    """Meta-learned editors train through the solve, and MALMEN through its ridge too."""
    p = Problem(13, f=6, d=3, n=4, cond=50.0)
    prior: Prior
    if kind == "identity":
        prior = ScaledIdentity(6, 0.7)
    elif kind == "null space":
        prior = NullSpace(tensor(p.C0), threshold=float(p.spectrum[2]), l2=0.5)
    else:
        prior = CholeskyPrior(tensor(p.C0), precision="mixed" if kind == "mixed" else "float64")

    def delta(K: Tensor, T: Tensor, ridge: Tensor) -> Tensor:
        return solve(prior, K, T, ridge, method=method).delta()

    inputs = [tensor(x).requires_grad_() for x in (p.K, p.T, p.ridge)]
    assert torch.autograd.gradcheck(delta, inputs)
    assert torch.autograd.gradgradcheck(delta, inputs)
    one = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: delta(tensor(p.K), tensor(p.T), r), (one,))

    def again(V: Tensor, K: Tensor, T: Tensor) -> Tensor:
        return refit(V, K, T, 1.0)

    V = prior.inverse(tensor(p.K)).requires_grad_()
    with torch.no_grad():
        assert V.shape == (6, 4)
    symmetric = refit(V, inputs[0], inputs[1], 1.0)
    assert all(g is not None for g in torch.autograd.grad(symmetric.sum(), [V, *inputs[:2]]))
    assert torch.autograd.gradcheck(again, (V.detach().requires_grad_(), *inputs[:2]))


def test_gradient_of_a_low_precision_input_has_its_dtype() -> None:
    p = Problem(13)
    K = tensor(p.K).bfloat16().requires_grad_()
    solve(p.prior, K, tensor(p.T)).delta().sum().backward()
    assert K.grad is not None
    assert K.grad.dtype == torch.bfloat16


# --- singular, ill-conditioned -------------------------------------------------------------------


@pytest.mark.parametrize("f", [1, 5, 255, 256, 257, 600])
def test_the_factorisation_in_place(f: int) -> None:
    g = np.random.default_rng(f)
    A = g.standard_normal((f, f + 3))
    C = A @ A.T
    prior = CholeskyPrior(tensor(C))
    assert prior.jitter == 0
    lower = np.zeros((f, f))
    lower[np.tril_indices(f)] = torch.cat(list(prior.rows()))
    assert relative(lower, np.linalg.cholesky(C)) < 1e-10
    assert np.array_equal(prior.matrix().numpy(), np.triu(C) + np.triu(C, 1).T)
    again = CholeskyPrior.from_factor(tensor(C.copy()), torch.cat(list(prior.rows())))
    K = tensor(g.standard_normal((f, 3)))
    assert torch.equal(again.inverse(K), prior.inverse(K))
    assert torch.equal(again.whiten(K), prior.whiten(K))
    assert again.identity == prior.identity
    jitter = 0.1 * np.trace(C) / f
    lower = np.linalg.cholesky(C + jitter * np.eye(f))[np.tril_indices(f)]
    again = CholeskyPrior.from_factor(tensor(C.copy()), tensor(lower), relative_jitter=0.1)
    assert relative(again.inverse(K), np.linalg.solve(C + jitter * np.eye(f), K)) < 1e-9
    assert again.jitter == pytest.approx(jitter)


def test_another_weight_needs_no_other_factor() -> None:
    p = Problem(23, n=50)
    once = CholeskyPrior(tensor(p.C0))
    for method in ("dual", "primal"):
        prior = once.reweighted(300.0).reweighted(50.0)
        got = solve(prior, tensor(p.K), tensor(p.T), method=method)
        assert relative(got.delta(), closed_form(15000 * p.C0, p.K, p.T, np.ones(p.n))) < 1e-9
    white = prior.whiten(tensor(p.K)).numpy()
    assert relative(white.T @ white, p.K.T @ np.linalg.solve(15000 * p.C0, p.K)) < 1e-9
    assert prior.weight == 15000
    assert once.weight == 1
    assert prior.identity == once.reweighted(15000.0).identity != once.identity
    mixed = CholeskyPrior(tensor(p.C0), precision="mixed")
    other = mixed.reweighted(2.0)
    other.whiten(tensor(p.K))  # factorises in the memory that both share
    assert mixed.precision == "float64"
    assert relative(mixed.inverse(tensor(p.K)), np.linalg.solve(p.C0, p.K)) < 1e-9


def test_overwrite_uses_the_memory_of_c0() -> None:
    p = Problem(14)
    mine = tensor(p.C0.copy())
    prior = CholeskyPrior(mine, overwrite=True)
    assert not np.array_equal(mine.numpy(), p.C0)
    assert relative(prior.inverse(tensor(p.K)), np.linalg.solve(p.C0, p.K)) < 1e-9
    other = tensor(p.C0.copy())
    CholeskyPrior(other)
    assert np.array_equal(other.numpy(), p.C0)


@pytest.mark.parametrize("f", [40, 300, 600])
def test_a_singular_covariance_gets_the_smallest_jitter_and_a_warning(f: int) -> None:
    g = np.random.default_rng(0)
    A = g.standard_normal((f, f // 2))  # fewer tokens than neurons
    A[-1] = 0  # and a dead one
    C = A @ A.T / A.shape[1]
    with pytest.warns(UserWarning, match=r"C0 of layers\.4\.down_proj is singular.*1e-1\d of its"):
        prior = CholeskyPrior(tensor(C), name="layers.4.down_proj")
    mean = np.trace(C) / f
    assert 1e-13 < prior.relative_jitter <= 1e-8
    assert prior.jitter == pytest.approx(prior.relative_jitter * mean)
    K, T = g.standard_normal((f, 4)), g.standard_normal((3, 4))
    # The condition number is near 1 / jitter, too much for LU as an oracle.
    D = solve(prior, tensor(K), tensor(T)).delta().numpy()
    gradient = D @ (C + prior.jitter * np.eye(f)) + (D @ K - T) @ K.T
    assert np.linalg.norm(gradient) < 1e-4 * np.linalg.norm(T @ K.T)
    np.testing.assert_allclose(prior.matrix().numpy(), C + prior.jitter * np.eye(f), rtol=1e-12)
    with pytest.warns(UserWarning, match="singular"):
        again = CholeskyPrior(tensor(C))
    assert again.identity == prior.identity
    again = CholeskyPrior.from_factor(
        tensor(C), torch.cat(list(prior.rows())), relative_jitter=prior.relative_jitter
    )
    assert again.identity == prior.identity
    assert again.jitter == pytest.approx(prior.jitter)


def test_a_pivot_that_rounding_may_have_left_is_none() -> None:
    """Two neurons that fire together: LAPACK would divide by a pivot of 4e-16."""
    C = np.eye(40)
    C[3, 7] = C[7, 3] = 1
    C[7, 7] += 4e-16
    assert np.linalg.cholesky(C)[7, 7] > 0
    with pytest.warns(UserWarning, match="is singular in float64: 1e-12 of its mean diagonal"):
        prior = CholeskyPrior(tensor(C))
    assert prior.relative_jitter == 1e-12


def test_neurons_of_very_different_scale_are_not_singular() -> None:
    """What counts is a pivot beside its own diagonal entry: outlier channels are no reason."""
    p = Problem(15, cond=10.0)
    scale = np.geomspace(1e-7, 1e7, p.f)
    C = scale[:, None] * p.C0 * scale
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior = CholeskyPrior(tensor(C))
    K = scale[:, None] * p.K
    assert relative(solve(prior, tensor(K), tensor(p.T)).delta() * tensor(scale),
                    closed_form(p.C0, p.K, p.T, np.ones(p.n))) < 1e-9  # fmt: skip


@pytest.mark.parametrize("cond", [1e2, 1e6, 1e8])
def test_mixed_precision_is_exact_up_to_1e8(cond: float) -> None:
    for seed in range(3):
        p = Problem(seed, f=120, n=15, cond=cond)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            prior = CholeskyPrior(tensor(p.C0), precision="mixed")
            got = solve(prior, tensor(p.K), tensor(p.T), tensor(p.ridge))
        assert (prior.precision, prior.fallback) == ("mixed", "")
        # From the spectrum itself: LU in float64 is not better than 1e-8 at this condition.
        V = p.Q @ ((p.Q.T @ p.K) / p.spectrum[:, None])
        want = p.T @ np.linalg.solve(p.K.T @ V + np.diag(p.ridge), V.T)
        assert relative(got.delta(), want) < 1e-8
        assert relative(got.V, V) < 1e-8
    assert prior.identity == CholeskyPrior(tensor(p.C0)).identity


def test_mixed_precision_takes_keys_of_any_scale_and_zeros() -> None:
    p = Problem(16)
    p.K *= np.geomspace(1e-60, 1e60, p.n)
    p.K[:, 4] = 0
    V = CholeskyPrior(tensor(p.C0 * 1e50), precision="mixed").inverse(tensor(p.K)).numpy()
    want = np.linalg.solve(p.C0 * 1e50, p.K)
    assert not V[:, 4].any()
    for i in (0, 1, 2, 3, 5, 6, 7, 8):
        assert relative(V[:, i], want[:, i]) < 1e-9


def test_mixed_precision_stalls_at_1e10_and_says_so() -> None:
    p = Problem(17, f=120, n=15, cond=1e10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior = CholeskyPrior(tensor(p.C0), precision="mixed", name="layers.2")
    with pytest.warns(UserWarning, match=r"C0 of layers\.2 is too ill-cond.*stalled.*float64"):
        got = solve(prior, tensor(p.K), tensor(p.T))
    assert prior.precision == "float64"
    assert "stalled" in prior.fallback
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        again = solve(prior, tensor(p.K), tensor(p.T))
    exact = solve(CholeskyPrior(tensor(p.C0)), tensor(p.K), tensor(p.T))
    assert torch.equal(got.delta(), exact.delta())
    assert torch.equal(again.delta(), exact.delta())


def test_mixed_precision_of_a_singular_covariance() -> None:
    g = np.random.default_rng(0)
    A = g.standard_normal((30, 10))
    A[2] = 0
    with (
        pytest.warns(UserWarning, match="ill-conditioned for precision='mixed': its diagonal has"),
        pytest.warns(UserWarning, match="singular in float64"),
    ):
        prior = CholeskyPrior(tensor(A @ A.T), precision="mixed")
    assert prior.precision == "float64"
    assert prior.jitter > 0


def test_mixed_precision_gives_the_primal_form_a_float64_factor() -> None:
    p = Problem(18, n=70)
    prior = CholeskyPrior(tensor(p.C0), precision="mixed")
    got = solve(prior, tensor(p.K), tensor(p.T), tensor(p.ridge), method="primal")
    assert relative(got.delta(), closed_form(p.C0, p.K, p.T, p.ridge)) < 1e-9


# --- identity ------------------------------------------------------------------------------------


def test_identity_is_of_what_a_prior_computes() -> None:
    p = Problem(19)
    C, bound = tensor(p.C0), float(p.spectrum[20])
    moved = p.C0.copy()
    moved[2, 5] = moved[5, 2] = np.nextafter(moved[2, 5], 1)
    swap = np.arange(p.f)
    swap[[3, 30]] = [30, 3]
    priors: list[Callable[[], Prior]] = [
        lambda: CholeskyPrior(C),
        lambda: CholeskyPrior(2 * C),
        lambda: CholeskyPrior(tensor(moved)),
        lambda: CholeskyPrior(tensor(p.C0[swap][:, swap])),
        lambda: CholeskyPrior(C, identity="of a file"),
        lambda: ScaledIdentity(p.f),
        lambda: ScaledIdentity(p.f, 2.0),
        lambda: ScaledIdentity(p.f + 1),
        lambda: NullSpace(C, threshold=bound),
        lambda: NullSpace(C, threshold=bound, l2=1.0),
        lambda: NullSpace(C, threshold=2 * bound),
        lambda: NullSpace(C, energy=0.9),
        lambda: NullSpace(tensor(moved), energy=0.9),
    ]
    first = [prior().identity for prior in priors]
    assert [prior().identity for prior in priors] == first
    assert len(set(first)) == len(first)
    assert all(re.fullmatch("[0-9a-f]{32}", identity) for identity in first)


def test_a_null_space_from_eigenvectors() -> None:
    p = Problem(20)
    values, vectors = torch.linalg.eigh(tensor(p.C0))
    for share in (0.5, 0.99, 0.99999):
        prior = NullSpace(tensor(p.C0), energy=share, identity="C")
        again = NullSpace.from_eigenvectors(values, vectors, energy=share, identity="C")
        assert relative(again.inverse(tensor(p.K)), prior.inverse(tensor(p.K))) < 1e-9
        assert (again.free, again.size, again.identity) == (prior.free, prior.size, prior.identity)
    with pytest.raises(ValueError, match="orthonormal"):
        NullSpace.from_eigenvectors(values, 2 * vectors, energy=0.9, identity="x")
    with pytest.raises(ValueError, match="vectors must be float64 of the shape"):
        NullSpace.from_eigenvectors(values, vectors[:3], energy=0.9, identity="x")


# --- bad input -----------------------------------------------------------------------------------

C3 = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
K3 = torch.tensor([[1.0, 2.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
T3 = torch.ones(4, 2, dtype=torch.float64)
NAN3 = K3.clone()
NAN3[1, 1] = torch.nan
CNAN = C3.clone()
CNAN[2, 2] = torch.inf
DEPENDENT = torch.stack([K3[:, 0], K3[:, 1], K3.sum(1)], 1)
PRIOR = CholeskyPrior(C3)


def far_off(f: int) -> Tensor:
    """One pair of entries, in blocks far from the diagonal, differs."""
    C = torch.eye(f, dtype=torch.float64)
    C[f - 2, 1] = 0.5
    return C


def repeated(*columns: int) -> tuple[Tensor, Tensor]:
    return K3[:, columns], T3[:, columns]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: solve(PRIOR, K3.numpy(), T3), TypeError, "K must be a torch.Tensor; got ndarray"),
        (lambda: solve(PRIOR, K3.long(), T3), TypeError, "K must be floating point; got torch.int"),
        (lambda: solve(PRIOR, K3[:, 0], T3), ValueError, "K must be a matrix of columns; got (3,)"),
        (lambda: solve(PRIOR, K3[:2], T3), ValueError, "K must have 3 rows, the size of the prior"),
        (lambda: solve(PRIOR, K3, T3[:, :1]), ValueError, "T must have a column for each of the 2"),
        (lambda: solve(PRIOR, NAN3, T3), ValueError, "K has NaN or infinity in column 1"),
        (lambda: solve(PRIOR, K3, T3 / 0), ValueError, "T has NaN or infinity in column 0"),
        (lambda: solve(PRIOR, K3, T3.to("meta")), ValueError, "T must be on the device of K, cpu"),
        (lambda: solve(PRIOR, K3, T3, -1.0), ValueError, "ridge must be 0 or more, and finite; ri"),
        (lambda: solve(PRIOR, K3, T3, float("nan")), ValueError, "ridge[0] is nan"),
        (lambda: solve(PRIOR, K3, T3, "1"), TypeError, "ridge must be a number or a tensor"),
        (lambda: solve(PRIOR, K3, T3, torch.ones(3)), ValueError, "ridge must be a number or [2]"),
        (lambda: solve(PRIOR, K3, T3, torch.tensor([1.0, -2.0])), ValueError, "ridge[1] is -2.0"),
        (lambda: solve(PRIOR, K3, T3, method="lu"), ValueError, "method must be one of 'auto', 'd"),
        (lambda: solve(PRIOR, K3, T3, 0.0, method="primal"), ValueError, "ridge[0] is 0"),
        (lambda: solve(PRIOR, K3, T3, 1e-310, method="primal"), ValueError, "is too small for met"),
        (lambda: solve(PRIOR, K3, T3, known_v=K3[:2]), ValueError, "known_v must be [3, m] with m"),
        (lambda: solve(PRIOR, K3, T3, known_v=DEPENDENT), ValueError, "m from 0 to 2, the columns"),
        (lambda: solve(PRIOR, *repeated(1, 0, 1), 0.0), ValueError, "columns 0, 2 of K depend on"),
        (
            lambda: solve(PRIOR, DEPENDENT, T3[:, [0, 1, 0]], 0.0),
            ValueError,
            "columns 0, 1, 2 of K",
        ),
        (
            lambda: solve(PRIOR, K3 * 0, T3, 0.0),
            ValueError,
            "column 0 of K is a key that the prior",
        ),
        (lambda: refit(K3, K3[:, :1], T3), ValueError, "V must have a column for each of the 1"),
        (lambda: refit(K3[:2], K3, T3), ValueError, "V must have the shape of K, (3, 2)"),
        (lambda: refit(NAN3, K3, T3), ValueError, "V has NaN or infinity in column 1"),
        (lambda: PRIOR.inverse(K3[:2]), ValueError, "keys must be [3, n]; got (2, 2)"),
        (lambda: PRIOR.whiten(K3.to("meta")), ValueError, "on the device of the prior, cpu; got m"),
        (lambda: CholeskyPrior(C3.numpy()), TypeError, "C0 must be a torch.Tensor; got ndarray"),
        (lambda: CholeskyPrior(C3.half()), TypeError, "C0 must be float64 or float32; got torch.f"),
        (lambda: CholeskyPrior(K3), ValueError, "C0 must be a square matrix; got the shape (3, 2)"),
        (lambda: CholeskyPrior(CNAN, name="h.1"), ValueError, "C0 of h.1 has NaN or infinity in r"),
        (
            lambda: CholeskyPrior(C3.flip(0) + DEPENDENT),
            ValueError,
            "C0 must be symmetric; entries",
        ),
        (lambda: CholeskyPrior(far_off(700)), ValueError, "by up to 0.5, where the largest is 1"),
        (lambda: CholeskyPrior(-C3), ValueError, "C0 must have a positive trace"),
        (
            lambda: CholeskyPrior(C3 - 1.5 * torch.eye(3).double()),
            ValueError,
            "C0 is not positive definite, not even with 0.0001 of its mean diagonal",
        ),
        (
            lambda: CholeskyPrior(C3, precision="half"),
            ValueError,
            "precision must be one of 'float",
        ),
        (
            lambda: CholeskyPrior(C3.float(), overwrite=True),
            ValueError,
            "overwrite=True needs a co",
        ),
        (lambda: CholeskyPrior.from_factor(C3.clone(), K3), ValueError, "factor must hold 6 numb"),
        (
            lambda: CholeskyPrior.from_factor(C3.clone(), torch.ones(6).double()),
            ValueError,
            "factor is not the Cholesky factor of C0",
        ),
        (lambda: PRIOR.reweighted(0.0), ValueError, "weight must be positive and finite; got 0.0"),
        (lambda: ScaledIdentity(0), ValueError, "size must be at least 1; got 0"),
        (lambda: ScaledIdentity(2.0), TypeError, "size must be an int; got 2.0"),
        (lambda: ScaledIdentity(3, 0.0), ValueError, "scale must be positive and finite; got 0.0"),
        (lambda: NullSpace(C3), ValueError, "give one of threshold (absolute) and energy"),
        (lambda: NullSpace(C3, threshold=1.5, energy=0.9), ValueError, "give one of threshold"),
        (lambda: NullSpace(C3, threshold=0.5), ValueError, "threshold=0.5 leaves nothing to do: n"),
        (
            lambda: NullSpace(C3, threshold=4.0),
            ValueError,
            "every direction is free in C, whose ei",
        ),
        (lambda: NullSpace(C3, energy=1.0), ValueError, "energy must be less than 1; got 1.0"),
        (lambda: NullSpace(C3, energy=0.999), ValueError, "no direction is free"),
        (lambda: NullSpace(C3, energy=0.5, l2=0.0), ValueError, "l2 must be positive and finite"),
        (lambda: NullSpace(CNAN, energy=0.5, name="h.2"), ValueError, "C of h.2 has NaN"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        call()


def test_keys_of_one_prompt_in_two_batches_depend_on_one_another() -> None:
    """Equal but for the rounding of float32: exact targets for both would need a huge D."""
    p = Problem(21, f=200, n=6, cond=1e3)
    near = p.K[:, [2]] * (1 + 2e-7 * np.random.default_rng(0).standard_normal((p.f, 1)))
    K, T = np.concatenate([p.K, near], 1), np.concatenate([p.T, -p.T[:, [2]]], 1)
    with pytest.raises(ValueError, match="columns 2, 6 of K depend on one another"):
        solve(p.prior, tensor(K), tensor(T), 0.0)
    got = solve(p.prior, tensor(K), tensor(T), 1.0)  # a ridge averages them
    want = closed_form(p.C0, K, T, np.ones(7))
    assert relative(got.delta(), want) < 1e-9
