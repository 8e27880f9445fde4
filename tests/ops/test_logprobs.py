"""Log-probs and entropies of tokens: float64, gradients, chunks, masks, compile, bad input, TRL."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl_fast.losses import sequence_sums, token_logprobs, token_logprobs_from_logits
from cl_fast.ops import logprobs as ops
from cl_fast.ops.vocabulary_rows import How

IGNORE = -100
BACKENDS = pytest.mark.parametrize("backend", [None, "eager"])
LOW = (torch.bfloat16, torch.float16)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed + 31 * sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def some_ids(*shape: int, vocabulary: int, seed: int = 0, ignored: float = 0.25) -> Tensor:
    """First and last id among them; about a part `ignored` is ignored."""
    g = torch.Generator().manual_seed(seed + sum(shape))
    ids = torch.randint(0, vocabulary, shape, generator=g)
    flat = ids.view(-1)
    if flat.numel() > 1:
        flat[0], flat[-1] = 0, vocabulary - 1
    ids[torch.rand(shape, generator=g) < ignored] = IGNORE
    return ids


def plain(
    z: Tensor, ids: Tensor, temperature: float = 1.0, scale: float = 1.0, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """What everyone writes: log_softmax, gather; in the dtype of z, by autograd."""
    z = z * scale
    if softcap:
        z = softcap * (z / softcap).tanh()
    lp = (z / temperature).log_softmax(-1)
    away = ids == IGNORE
    picked = lp.gather(-1, ids.masked_fill(away, 0).unsqueeze(-1)).squeeze(-1)
    entropy = -torch.where(lp == -torch.inf, 0, lp.exp() * lp).sum(-1)
    return torch.where(away, 0, picked), torch.where(away, 0, entropy)


def exact(z: Tensor, ids: Tensor, up: Tensor, entropy_up: Tensor) -> tuple[np.ndarray, ...]:
    """Log-probs, entropies and the gradient of the logits, in numpy's long double."""
    x = z.detach().double().numpy().astype(np.longdouble)
    top = x.max(-1, keepdims=True)
    lp = (x - top) - np.log(np.exp(x - top).sum(-1, keepdims=True))
    p = np.exp(lp)
    with np.errstate(invalid="ignore"):
        p_lp = np.where(p == 0, 0, p * lp)
    h = -p_lp.sum(-1)
    kept = (ids != IGNORE).numpy()
    hit = np.zeros_like(x)
    at = np.arange(len(x))
    hit[at[kept], ids.numpy()[kept]] = 1
    g, e = (t.double().numpy().astype(np.longdouble)[:, None] for t in (up, entropy_up))
    dz = g * (hit - p) - e * (p_lp + p * h[:, None])
    picked = np.where(kept, lp[at, np.where(kept, ids.numpy(), 0)], 0)
    return picked, np.where(kept, h, 0), np.where(kept[:, None], dz, 0)


def error(got: Tensor, want: np.ndarray) -> float:
    got64 = got.detach().double().numpy()
    infinite = np.isinf(want)
    assert (got64[infinite] == want[infinite].astype(np.float64)).all()
    assert np.isfinite(got64[~infinite]).all()
    return float(np.abs(got64[~infinite] - want[~infinite]).max(initial=0))


def grads(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


# --- against float64 ---------------------------------------------------------------------------

ROWS: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: randn(40, 101),
    "peaked": lambda: 30 * randn(40, 101),
    "heavy": lambda: randn(40, 101) / (0.01 + randn(40, 101, seed=3).abs()),
    "excluded": lambda: torch.where(randn(40, 101, seed=5) > 0.8, -torch.inf, 3 * randn(40, 101)),
    "shifted": lambda: randn(40, 101) + 1000,
    "equal": lambda: torch.zeros(40, 101, dtype=torch.float64),
    "one id": lambda: randn(40, 1),
    "two ids": lambda: 5 * randn(40, 2),
    "odd": lambda: 10 * randn(3, 4097),
    "huge vocabulary": lambda: 5 * randn(2, 262_144),
}


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("rows", ROWS)
def test_rows_are_no_further_from_float64_than_eager(
    rows: str, dtype: torch.dtype, backend: str | None
) -> None:
    z = ROWS[rows]().to(dtype)
    ids = some_ids(len(z), vocabulary=z.size(1))
    up, entropy_up = randn(len(z), seed=7).float(), randn(len(z), seed=8).float()
    want = exact(z, ids, up, entropy_up)
    ours = z.clone().requires_grad_()
    logprobs, entropies = token_logprobs_from_logits(ours, ids, entropy=True, backend=backend)
    assert logprobs.dtype == entropies.dtype == torch.float32
    (dz,) = grads((logprobs * up).sum() + (entropies * entropy_up).sum(), ours)
    assert dz.dtype == dtype
    eager = z.clone().requires_grad_()
    theirs, their_entropies = plain(eager.float(), ids)
    excluded = z == -torch.inf
    # Eager entropy has no finite gradient at -inf; ours has: compare what it can do.
    loss = (theirs * up).sum()
    if not excluded.any():
        loss = loss + (their_entropies * entropy_up).sum()
    (their_dz,) = grads(loss, eager)
    spacing = 2.0**-23
    assert error(logprobs, want[0]) <= 2 * error(theirs, want[0]) + spacing
    assert error(entropies, want[1]) <= 2 * error(their_entropies, want[1]) + spacing
    if not excluded.any():
        assert error(dz, want[2]) <= 2 * error(their_dz, want[2]) + spacing
    else:
        # A probability loses a spacing in each of exp, log, two differences; low precision one.
        bound = spacing if dtype == torch.float32 else float(np.abs(want[2]).max()) * 2.0**-8
        assert error(dz, want[2]) <= 8 * bound


HEADS = {"normal": 1.0, "peaked": 30.0}


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("head", HEADS)
def test_a_head_is_no_further_from_float64_than_eager(
    head: str, dtype: torch.dtype, backend: str | None
) -> None:
    """Eager: the product with a float32 accumulator, which is kept, then log_softmax."""
    m, h, v = 64, 32, 301
    x = (HEADS[head] * randn(m, h)).to(dtype)
    w, b = (randn(v, h, seed=1) / h**0.5).to(dtype), randn(v, seed=2).to(dtype)
    ids = some_ids(m, vocabulary=v)
    up, entropy_up = randn(m, seed=7), randn(m, seed=8)

    def run(dtype: torch.dtype, op: bool) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w, b)]
        if op:
            made = token_logprobs(
                leaves[0], leaves[1], ids, bias=leaves[2], entropy=True, backend=backend
            )
        else:
            wide = [t.to(torch.promote_types(dtype, torch.float32)) for t in leaves]
            made = plain(wide[0] @ wide[1].T + wide[2], ids)
        loss = (made[0] * up.to(made[0].dtype)).sum() + (made[1] * entropy_up).sum()
        return [*made, *grads(loss, *leaves)]

    truth = run(torch.float64, False)
    ours, eager = run(dtype, True), run(dtype, False)
    names = ("logprobs", "entropies", "hidden", "weight", "bias")
    for name, mine, theirs, true in zip(names, ours, eager, truth, strict=True):
        assert mine.dtype == theirs.dtype
        want = true.detach().numpy()
        size = float(np.abs(want).max())
        assert error(mine, want) <= 2 * error(theirs, want) + size * 2.0**-23, name


@BACKENDS
def test_float64_stays_float64(backend: str | None) -> None:
    x, w = randn(6, 4, seed=1), randn(9, 4, seed=2)
    ids = some_ids(6, vocabulary=9)
    made = token_logprobs(x, w, ids, entropy=True, backend=backend)
    for got, want in zip(made, plain(x @ w.T, ids), strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


@BACKENDS
@pytest.mark.parametrize("options", [
    {"temperature": 0.7}, {"logit_scale": 0.0625}, {"softcap": 3.0},
    {"temperature": 1.9, "logit_scale": 2.0, "softcap": 5.0},
], ids=str)  # fmt: skip
def test_temperature_scale_and_softcap(options: dict[str, float], backend: str | None) -> None:
    dtype = torch.float64 if backend == "eager" else torch.float32
    leaves = [randn(3, 5, 4, seed=1), randn(11, 4, seed=2), randn(11, seed=3)]
    ids = some_ids(3, 5, vocabulary=11)
    up, entropy_up = randn(3, 5, seed=4), randn(3, 5, seed=5)

    def run(dtype: torch.dtype, op: Callable[..., Any]) -> list[Tensor]:
        own = [t.to(dtype).requires_grad_() for t in leaves]
        made = op(*own)
        return [*made, *grads((made[0] * up).sum() + (made[1] * entropy_up).sum(), *own)]

    named = {{"logit_scale": "scale"}.get(k, k): value for k, value in options.items()}
    want = run(torch.float64, lambda x, w, b: plain(x @ w.T + b, ids, **named))
    got = run(
        dtype,
        lambda x, w, b: token_logprobs(x, w, ids, bias=b, entropy=True, backend=backend, **options),
    )
    from_logits = run(
        dtype,
        lambda x, w, b: token_logprobs_from_logits(
            x @ w.T + b, ids, entropy=True, backend=backend, **options
        ),
    )
    close = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {}
    for mine, other, true in zip(got, from_logits, want, strict=True):
        torch.testing.assert_close(mine, true.to(dtype), **close)
        torch.testing.assert_close(other, true.to(dtype), **close)


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)])
@pytest.mark.parametrize("entropy", [False, True])
def test_gradcheck(needed: tuple[int, ...], entropy: bool) -> None:
    leaves = [randn(5, 3, seed=1), randn(7, 3, seed=2), randn(7, seed=3)]
    inputs = [t.requires_grad_(bool(n)) for t, n in zip(leaves, needed, strict=True)]
    ids = torch.tensor([0, 6, IGNORE, 3, 3])

    def call(x: Tensor, w: Tensor, b: Tensor) -> Any:
        return token_logprobs(
            x, w, ids, bias=b, entropy=entropy, temperature=1.3, softcap=4.0, chunk_tokens=2
        )

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("entropy", [False, True])
def test_gradcheck_of_rows(entropy: bool) -> None:
    z = randn(4, 7).requires_grad_()
    ids = torch.tensor([0, 6, IGNORE, 3])
    assert torch.autograd.gradcheck(
        lambda x: token_logprobs_from_logits(x, ids, entropy=entropy, logit_scale=0.5), [z]
    )


# --- what must always hold ---------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("trained", [False, True])
def test_chunks_make_no_difference(trained: bool, backend: str | None) -> None:
    m, h, v = 37, 8, 53
    ids = some_ids(m, vocabulary=v)
    up, entropy_up = randn(m, seed=7).float(), randn(m, seed=8).float()
    results = []
    for chunk in (None, 1, 5, 36, 37, 1000):
        x, w = randn(m, h).float().requires_grad_(), randn(v, h).float().requires_grad_(trained)
        lp, e = token_logprobs(x, w, ids, entropy=True, chunk_tokens=chunk, backend=backend)
        loss = (lp * up).sum() + (e * entropy_up).sum()
        results.append([lp, e, *grads(loss, *([x, w] if trained else [x]))])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@settings(max_examples=25)
@given(st.integers(1, 6), st.integers(1, 40), st.floats(-50, 50), st.integers(0, 10**6))
def test_shift_and_permutation(m: int, v: int, shift: float, seed: int) -> None:
    z = 4 * randn(m, v, seed=seed)
    ids = some_ids(m, vocabulary=v, seed=seed)
    want = token_logprobs_from_logits(z, ids, entropy=True)
    moved = token_logprobs_from_logits(z + shift, ids, entropy=True)
    order = torch.randperm(v, generator=torch.Generator().manual_seed(seed))
    place = torch.argsort(order)
    renamed = torch.where(ids == IGNORE, IGNORE, place[ids.clamp(min=0)])
    mixed = token_logprobs_from_logits(z[:, order], renamed, entropy=True)
    for a, b, c in zip(want, moved, mixed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)
    assert (want[0] <= 0).all()
    assert (want[1] >= 0).all()
    assert (want[1] <= math.log(v) + 1e-12).all()


@BACKENDS
def test_one_id_is_certain(backend: str | None) -> None:
    x = randn(4, 3).float().requires_grad_()
    w = randn(1, 3).float().requires_grad_()
    ids = torch.zeros(4, dtype=torch.int64)
    logprobs, entropies = token_logprobs(x, w, ids, entropy=True, backend=backend)
    assert not logprobs.any()
    assert not entropies.any()
    for g in grads((logprobs + entropies).sum(), x, w):
        assert not g.any()


@BACKENDS
@pytest.mark.parametrize("trained", [False, True])
def test_what_is_ignored_may_hold_anything(trained: bool, backend: str | None) -> None:
    """Neither NaN in the row nor NaN in what arrives for it comes through."""
    ids = torch.tensor([2, IGNORE, 0, IGNORE])
    x = randn(4, 3).float()
    x[1], x[3, 0] = torch.nan, torch.inf
    w = randn(5, 3).float()
    up = torch.tensor([1.5, torch.nan, -2.0, torch.inf])
    for pair in ([x, w], [x[ids >= 0], w]):
        own = [t.clone().requires_grad_() for t in pair]
        own[1].requires_grad_(trained)
        kept = ids if len(pair[0]) == 4 else ids[ids >= 0]
        lp, e = token_logprobs(*own, kept, entropy=True, backend=backend)
        lp.backward(up if len(pair[0]) == 4 else up[ids >= 0], retain_graph=True)
        e.backward(up if len(pair[0]) == 4 else up[ids >= 0])
        if len(pair[0]) == 4:
            got = [lp[ids >= 0], e[ids >= 0], own[0].grad[ids >= 0], own[1].grad]
            assert not lp[ids < 0].any()
            assert not e[ids < 0].any()
            assert not own[0].grad[ids < 0].any()
        else:
            want = [lp, e, own[0].grad, own[1].grad]
    for a, b in zip(got, want, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b)
    z = (randn(4, 5).float() * torch.tensor([1, torch.nan, 1, torch.inf])[:, None]).requires_grad_()
    logprobs = token_logprobs_from_logits(z, ids, backend=backend)
    logprobs.backward(up)
    assert logprobs.isfinite().all()
    assert z.grad.isfinite().all()
    assert not z.grad[ids < 0].any()


@BACKENDS
@pytest.mark.parametrize("tokens", [0, 3])
def test_nothing_counts_and_is_connected(tokens: int, backend: str | None) -> None:
    x, w, b = randn(tokens, 4).float(), randn(6, 4).float(), randn(6).float()
    leaves = [t.requires_grad_() for t in (x, w, b)]
    ids = torch.full((tokens,), IGNORE)
    lp, e = token_logprobs(x, w, ids, bias=b, entropy=True, backend=backend)
    total = lp.sum() + e.sum()
    assert total == 0
    assert total.requires_grad
    for g, leaf in zip(grads(total, *leaves), leaves, strict=True):
        assert g.shape == leaf.shape
        assert not g.any()
    z = randn(tokens, 6).float().requires_grad_()
    from_logits = token_logprobs_from_logits(z, ids, backend=backend).sum()
    assert from_logits == 0
    assert not grads(from_logits, z)[0].any()


@BACKENDS
def test_an_excluded_id_has_log_prob_minus_infinity(backend: str | None) -> None:
    z = torch.tensor([[0.0, -torch.inf, 1.0], [2.0, 0.0, -torch.inf]], requires_grad=True)
    ids = torch.tensor([1, 0])
    lp, e = token_logprobs_from_logits(z, ids, entropy=True, backend=backend)
    assert lp[0] == -torch.inf
    assert e.isfinite().all()
    (dz,) = grads(lp.sum() + e.sum(), z)
    assert dz.isfinite().all()
    plain_z = z.detach().requires_grad_()
    (want,) = grads(plain(plain_z, ids)[0].sum(), plain_z)
    torch.testing.assert_close(grads(token_logprobs_from_logits(z, ids).sum(), z)[0], want)


@BACKENDS
def test_what_is_used_decides_what_is_computed(backend: str | None) -> None:
    """Log-probs only, entropies only, both, and the input used twice."""
    ids = some_ids(9, vocabulary=13)
    up = randn(9, seed=1).float()
    for use in ("logprobs", "entropies", "both", "twice"):
        ours, eager = (randn(9, 4).float().requires_grad_() for _ in range(2))
        w = randn(13, 4, seed=2).float()

        def loss(pair: tuple[Tensor, Tensor], x: Tensor, use: str = use) -> Tensor:
            lp, e = pair
            terms = {"logprobs": lp * up, "entropies": e * up, "both": lp * up + e}
            return terms.get(use, lp * lp).sum() + (x.square().sum() if use == "twice" else 0)

        mine = loss(token_logprobs(ours, w, ids, entropy=True, backend=backend), ours)
        theirs = loss(plain(eager @ w.T, ids), eager)
        torch.testing.assert_close(grads(mine, ours), grads(theirs, eager))


def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which products are made from here on, in order."""
    made: list[str] = []
    logits, add = ops.Head.logits, ops.HeadGradients.add
    monkeypatch.setattr(
        ops.Head, "logits", lambda self, rows: made.append("logits") or logits(self, rows)
    )
    monkeypatch.setattr(
        ops.HeadGradients, "add",
        lambda self, rows, dy: made.append(
            "+".join(n for n in ("hidden", "weight", "bias") if getattr(self, n) is not None)
        ) or add(self, rows, dy),
    )  # fmt: skip
    return made


def test_a_frozen_head_is_met_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = products(monkeypatch)
    x, w = randn(5, 3).float().requires_grad_(), randn(7, 3).float()
    ids = torch.tensor([1, 2, IGNORE, 0, 3])
    lp, e = token_logprobs(x, w, ids, entropy=True)
    assert made == ["logits", "hidden"]
    (lp * randn(5).float()).sum().backward(retain_graph=True)
    (lp * 2 + e.detach()).sum().backward(retain_graph=True)
    assert made == ["logits", "hidden"]
    e.sum().backward()
    assert made == ["logits", "hidden", "logits", "hidden"]
    made.clear()
    w.requires_grad_()
    lp = token_logprobs(x, w, ids)
    assert made == ["logits"]
    lp.sum().backward()
    assert made == ["logits", "logits", "hidden+weight"]
    made.clear()
    with torch.no_grad():
        token_logprobs(x, w, ids)
    assert made == ["logits"]


def test_ignored_rows_meet_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    logits = ops.Head.logits

    def counted(self: Any, rows: slice) -> Tensor:
        z = logits(self, rows)
        seen.append(len(z))
        return z

    monkeypatch.setattr(ops.Head, "logits", counted)
    ids = torch.tensor([1, IGNORE, IGNORE, 0, IGNORE])
    w = randn(7, 3).float().requires_grad_()
    lp = token_logprobs(randn(5, 3).float(), w, ids)
    lp[0].backward()
    assert seen == [2, 1]  # and in the backward pass only rows for which a gradient arrives


def test_at_most_five_numbers_per_row_are_saved() -> None:
    z = randn(50, 301).float().requires_grad_()
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        token_logprobs_from_logits(z, some_ids(50, vocabulary=301), entropy=True)
    own = [t for t in saved if t.data_ptr() != z.data_ptr() and t.dtype.is_floating_point]
    assert sum(t.numel() for t in own) <= 5 * 50


def test_in_place_and_a_second_backward() -> None:
    ids = some_ids(6, vocabulary=9)
    up = randn(6, seed=1).float()
    leaf = randn(6, 9).float().requires_grad_()
    z = leaf * 1
    lp = token_logprobs_from_logits(z, ids, inplace=True)
    lp.backward(up, retain_graph=True)
    other = leaf.detach().requires_grad_()
    token_logprobs_from_logits(other, ids).backward(up)
    torch.testing.assert_close(leaf.grad, other.grad)
    torch.testing.assert_close(z.detach(), other.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        lp.backward(up)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("form", ["frozen", "trained", "rows", "in place"])
def test_a_second_derivative_is_refused(form: str, entropy: bool) -> None:
    """Never a silent 0 in its place."""
    x, w = randn(3, 2).requires_grad_(), randn(5, 2).requires_grad_(form == "trained")
    ids = torch.tensor([0, 1, 2])
    if form in ("frozen", "trained"):
        made = token_logprobs(x, w, ids, entropy=entropy)
    else:
        made = token_logprobs_from_logits(x @ w.T, ids, entropy=entropy, inplace=form == "in place")
    total = made[0].sum() + made[1].sum() if entropy else made.sum()
    # As a gradient penalty is written, with a part that is differentiable twice.
    (grad,) = torch.autograd.grad(total + (x**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        grad.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_integer_ids_and_strided_inputs(dtype: torch.dtype) -> None:
    ids = torch.tensor([[3, 0], [6, 5], [1, 1]]).to(dtype)
    x, w = randn(3, 2, 8).float()[..., ::2], randn(4, 7).float().t()
    want, _ = plain(x @ w.T, ids.long())
    torch.testing.assert_close(token_logprobs(x, w, ids), want)
    z = (x @ w.T).transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(token_logprobs_from_logits(z, ids), want)


@BACKENDS
def test_uint8_ids_are_not_taken_for_ignored(backend: str | None) -> None:
    """As uint8, -100 is 156."""
    ids = torch.tensor([156, 3, 255], dtype=torch.uint8)
    x, w = randn(3, 4).float(), randn(300, 4).float()
    want = plain(x @ w.T, ids.long())
    for made in (
        token_logprobs(x, w, ids, entropy=True, backend=backend),
        token_logprobs_from_logits(x @ w.T, ids, entropy=True, backend=backend),
    ):
        torch.testing.assert_close(made, want)
    with pytest.raises(ValueError, match="got 156 in row 0"):
        token_logprobs(x, w[:150], ids, backend=backend)


def test_another_ignore_index() -> None:
    x, w = randn(3, 2).float(), randn(5, 2).float()
    got = token_logprobs(x, w, torch.tensor([0, 4, 2]), ignore_index=0)
    assert got[0] == 0
    want, _ = plain(x @ w.T, torch.tensor([1, 4, 2]))
    torch.testing.assert_close(got[1:], want[1:])


# --- autocast, opcheck, compile ----------------------------------------------------------------


def test_autocast_casts_as_a_linear_layer_does() -> None:
    x, w, b = randn(5, 4).float(), randn(7, 4).float(), randn(7).float()
    ids = some_ids(5, vocabulary=7)
    with torch.autocast("cpu", torch.bfloat16):
        own = [t.clone().requires_grad_() for t in (x, w, b)]
        got = token_logprobs(own[0], own[1], ids, bias=own[2])
    low = [t.bfloat16().float().requires_grad_() for t in (x, w, b)]
    want = token_logprobs(low[0], low[1], ids, bias=low[2])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want)
    for a, c in zip(grads(got.sum(), *own), grads(want.sum(), *low), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, c.bfloat16().float(), rtol=2**-7, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        z = randn(5, 7).float()
        assert torch.equal(
            token_logprobs_from_logits(z, ids), token_logprobs_from_logits(z.clone(), ids)
        )


PLAIN = [1.0, 0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW])
@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck_of_rows(entropy: bool, dtype: torch.dtype) -> None:
    z, ids = randn(4, 5).to(dtype), torch.tensor([0, IGNORE, 4, 2])
    rest = (ids, IGNORE, PLAIN, entropy, False, False, None)
    torch.library.opcheck(ops._logprob_rows, (z.clone().requires_grad_(), *rest))
    stats = ops._logprob_rows(z, *rest)[2]
    e = torch.ones(4, dtype=stats.dtype) if entropy else None
    gradient = (torch.ones(4, dtype=stats.dtype), e, z, ids, stats, IGNORE, PLAIN, None)
    torch.library.opcheck(ops._rows_gradient, gradient)
    torch.library.opcheck(ops._rows_gradient_, (*gradient[:2], z.clone(), *gradient[3:]))


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("needed", [[True, True, True], [True, False, False], [False] * 3])
def test_opcheck_of_the_linear_op(needed: list[bool], entropy: bool) -> None:
    tensors = [randn(5, 3).float(), randn(4, 3).float(), randn(4).float()]
    inputs = [x.requires_grad_(need) for x, need in zip(tensors, needed, strict=True)]
    ids = torch.tensor([0, 3, IGNORE, 1, 1])
    arguments = (*inputs, ids, IGNORE, PLAIN, entropy, 2, needed, False, None)
    torch.library.opcheck(ops._linear_logprobs, arguments)
    plain_inputs = [x.detach() for x in inputs]
    _, _, stats, dx = ops._linear_logprobs(*plain_inputs, *arguments[3:])
    torch.library.opcheck(
        ops._linear_logprobs_gradient,
        (torch.ones(5), torch.ones(5) if entropy else None, *plain_inputs, ids, stats,
         dx if dx.numel() else None, IGNORE, PLAIN, 2, needed, None),
    )  # fmt: skip


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("entropy", ["no", "measured", "used"])
def test_compile_of_a_head(entropy: str, trained: bool) -> None:
    def step(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        if entropy == "no":
            return (3.7 * token_logprobs(x * 2, w, ids)).sum()
        lp, e = token_logprobs(x * 2, w, ids, entropy=True, chunk_tokens=2)
        return (lp * lp).sum() + (e if entropy == "used" else e.detach()).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens, h, v in ((3, 5, 7), (6, 4, 11)):
        results = []
        for run in (step, compiled):
            x = randn(2, tokens, h).float().requires_grad_()
            w = randn(v, h).float().requires_grad_(trained)
            loss = run(x, w, some_ids(2, tokens, vocabulary=v))
            results.append([loss, *grads(loss, *([x, w] if trained else [x]))])
        torch.testing.assert_close(*results)


def test_compile_of_rows_and_sums() -> None:
    def step(z: Tensor, ids: Tensor, cu: Tensor) -> Tensor:
        lp = token_logprobs_from_logits(z, ids, temperature=0.5)
        return (sequence_sums(lp, cu_seqlens=cu, average=True) ** 2).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (6, 9):
        results = []
        for run in (step, compiled):
            z = randn(n, 5).float().requires_grad_()
            loss = run(z, some_ids(n, vocabulary=5), torch.tensor([0, 2, 2, n]))
            results.append([loss, *grads(loss, z)])
        torch.testing.assert_close(*results)


# --- sums over sequences -----------------------------------------------------------------------


@settings(max_examples=25)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(0, 3), st.booleans(),
       st.integers(0, 10**6))  # fmt: skip
def test_padded_and_packed_sums_agree(
    lengths: list[int], rest: int, average: bool, seed: int
) -> None:
    longest, total = max(1, *lengths), sum(lengths)
    padded = randn(len(lengths), longest, seed=seed)
    inside = torch.arange(longest) < torch.tensor(lengths)[:, None]
    counts = inside & (randn(len(lengths), longest, seed=seed + 1) > -0.5)
    want = np.array([
        sum(float(v) for v, c in zip(row, keep, strict=True) if c)
        / (max(1, int(keep.sum())) if average else 1)
        for row, keep in zip(padded, counts, strict=True)
    ])  # fmt: skip
    packed = torch.cat([padded[inside], randn(rest, seed=seed + 2)]).requires_grad_()
    mask = torch.cat([counts[inside], torch.ones(rest, dtype=torch.bool)])
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    ids = torch.cat([torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
                     torch.full((rest,), -1)])  # fmt: skip
    leaf = padded.clone().requires_grad_()
    up = randn(len(lengths), seed=seed + 3)
    sums = [
        sequence_sums(torch.where(inside, leaf, torch.nan), mask=counts, average=average),
        sequence_sums(packed, mask=mask, cu_seqlens=cu, average=average),
        sequence_sums(
            packed[None], mask=mask[None], sequence_ids=ids[None], sequences=len(lengths),
            average=average,
        ),
    ]  # fmt: skip
    for got in sums:
        np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-12, atol=1e-12)
    (padded_grad,) = grads((sums[0] * up).sum(), leaf)
    for got in sums[1:]:
        (packed_grad,) = grads((got * up).sum(), packed)
        torch.testing.assert_close(packed_grad[:total], padded_grad[inside])
        assert not packed_grad[total:].any()


def test_sums_of_low_precision_are_float32() -> None:
    values = randn(3, 500, dtype=torch.bfloat16)
    got = sequence_sums(values)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, values.float().sum(-1))


# --- bad input ---------------------------------------------------------------------------------

X, W, B, IDS, Z = (
    torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(5), torch.tensor([0, 4]), torch.zeros(2, 5),
)  # fmt: skip

BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: token_logprobs(X, W, torch.tensor([0, 5])), ValueError,
     "ids must be in [0, 5) or -100; got 5 in row 1"),
    (lambda: token_logprobs(X, W, torch.tensor([-1, 0])), ValueError, "got -1 in row 0"),
    (lambda: token_logprobs_from_logits(Z, torch.tensor([0, 9])), ValueError, "got 9 in row 1"),
    (lambda: token_logprobs(X, W, IDS.float()), TypeError, "ids must be integers"),
    (lambda: token_logprobs(X, W, IDS > 0), TypeError, "ids must be integers"),
    (lambda: token_logprobs(X, W, IDS[:1]), ValueError, "ids must have the shape of the tokens"),
    (lambda: token_logprobs_from_logits(Z, IDS[None]), ValueError, "shape of the tokens, (2,)"),
    (lambda: token_logprobs(X.sum(), W, IDS), ValueError, "hidden must have a last dimension"),
    (lambda: token_logprobs_from_logits(Z.sum(), IDS), ValueError, "logits must have a last"),
    (lambda: token_logprobs(X, W[:, :2], IDS), ValueError, "weight must have 3 columns"),
    (lambda: token_logprobs(X, W[0], IDS), ValueError, "weight must be a matrix"),
    (lambda: token_logprobs(X, W[:0], IDS), ValueError, "weight must have at least one row"),
    (lambda: token_logprobs_from_logits(Z[:, :0], IDS), ValueError, "at least one column"),
    (lambda: token_logprobs(X, W, IDS, bias=B[:4]), ValueError, "bias must have one entry per"),
    (lambda: token_logprobs(X.long(), W, IDS), TypeError, "hidden must have one of the dtypes"),
    (lambda: token_logprobs(X, W.int(), IDS), TypeError, "weight must have one of the dtypes"),
    (lambda: token_logprobs(X, W.to("meta"), IDS), ValueError, "weight must be on the device of"),
    (lambda: token_logprobs(X, W, IDS.to("meta")), ValueError, "ids must be on the device of"),
    (lambda: token_logprobs(X, W, IDS, temperature=0.0), ValueError, "temperature must be posit"),
    (lambda: token_logprobs(X, W, IDS, softcap=-1.0), ValueError, "softcap must be positive"),
    (lambda: token_logprobs(X, W, IDS, logit_scale=math.inf), ValueError, "logit_scale must be a"),
    (lambda: token_logprobs(X, W, IDS, chunk_tokens=0), ValueError, "chunk_tokens must be at le"),
    (lambda: token_logprobs(X, W, IDS, backend="cuda"), ValueError, "backend"),
    (lambda: token_logprobs(X + math.nan, W, IDS, debug=True), ValueError, "hidden must be fini"),
    (lambda: token_logprobs_from_logits(Z + math.inf, IDS, debug=True), ValueError,
     "logits must be finite"),
    (lambda: sequence_sums(X, mask=IDS), ValueError, "mask must have the shape of values"),
    (lambda: sequence_sums(X.sum()), ValueError, "values must have a last dimension"),
    (lambda: sequence_sums(B, cu_seqlens=torch.tensor([0, 6])), ValueError, "at most the 5 tok"),
    (lambda: sequence_sums(B, cu_seqlens=torch.tensor([0, 3, 2])), ValueError, "must rise from 0"),
    (lambda: sequence_sums(B, cu_seqlens=torch.tensor([1, 3])), ValueError, "must rise from 0"),
    (lambda: sequence_sums(B, cu_seqlens=torch.tensor(3)), ValueError, "must be a vector"),
    (lambda: sequence_sums(B, cu_seqlens=B), TypeError, "cu_seqlens must be integers"),
    (lambda: sequence_sums(B, sequence_ids=B.long()), ValueError, "sequence_ids needs sequences"),
    (lambda: sequence_sums(B, sequence_ids=B, sequences=1), TypeError, "sequence_ids must be int"),
    (lambda: sequence_sums(B, sequence_ids=B.long() + 2, sequences=2), ValueError, "below sequen"),
    (lambda: sequence_sums(B, sequence_ids=IDS, sequences=9), ValueError, "shape of values"),
    (lambda: sequence_sums(B, sequences=2), ValueError, "sequences needs sequence_ids"),
    (lambda: sequence_sums(B, cu_seqlens=torch.tensor([0, 5]), sequences=1), ValueError,
     "sequences needs sequence_ids"),
    (lambda: sequence_sums(B, cu_seqlens=IDS, sequence_ids=IDS), ValueError, "exclude each other"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case: int) -> None:
    call, kind, words = BAD[case]
    with pytest.raises(kind, match=re.escape(words)) as caught:
        call()
    assert type(caught.value) is kind


def test_a_wrong_id_is_named_inside_a_compiled_graph() -> None:
    compiled = torch.compile(
        lambda x, w, ids: token_logprobs(x, w, ids).sum(), fullgraph=True, backend="aot_eager"
    )
    compiled(X, W, IDS)
    with pytest.raises(ValueError, match=r"got 5 in row 1"):
        compiled(X, W, torch.tensor([0, 5]))


def test_rows_as_the_op_has_them() -> None:
    lp, e = ops.logprob_rows(Z, IDS, how=How(temperature=2.0))
    assert e is None
    torch.testing.assert_close(lp, torch.full((2,), -math.log(5)))


# --- peers -------------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_same_as_trl(temperature: float, scale: float) -> None:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    z = (scale * randn(3, 7, 211)).float()
    ids = some_ids(3, 7, vocabulary=211, ignored=0.0)
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    lp, e = token_logprobs_from_logits(ours, ids, entropy=True, temperature=temperature)
    want = selective_log_softmax(theirs, ids, temperature=temperature)
    torch.testing.assert_close(lp, want, rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(e, entropy_from_logits(z / temperature), rtol=1e-5, atol=4e-6)
    up = randn(3, 7, seed=1).float()
    torch.testing.assert_close(
        grads((lp * up).sum(), ours), grads((want * up).sum(), theirs), rtol=1e-5, atol=1e-6
    )
    exact_lp, _ = plain(z.double() / temperature, ids)
    mine, other = (lp - exact_lp).abs().max(), (want - exact_lp).abs().max()
    assert mine <= 2 * other + 2.0**-23
