"""KL estimates and the clipped surrogate: loops in float64, extremes, packed batches, TRL."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl_fast.losses import clipped_policy_loss, kl_estimate
from cl_fast.losses.policy_gradient import importance_weights

ESTIMATORS = ("k1", "k2", "k3")


def batch(b: int = 5, t: int = 7, seed: int = 0, spread: float = 0.3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    old = -3 * normal(b, t).abs()
    mask = torch.arange(t) < torch.randint(0, t + 1, (b, 1), generator=g)
    return {
        "logprobs": old + spread * normal(b, t), "old_logprobs": old, "advantages": normal(b),
        "mask": mask, "kl": normal(b, t).abs(),
    }  # fmt: skip


# --- KL ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_estimates_to_full_precision(dtype: torch.dtype) -> None:
    """Within a few spacings of the exact numbers, near the reference and far from it."""
    sizes = np.concatenate([10.0 ** np.arange(-12, 1.6, 0.125), [0.0, 0.125, 0.12499]])
    d = torch.tensor(np.concatenate([sizes, -sizes]), dtype=dtype)
    policy = torch.zeros_like(d).requires_grad_()
    mpmath.mp.dps = 50
    spacing = torch.finfo(dtype).eps
    exact: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "k1": (lambda x: -x, lambda x: mpmath.mpf(1)),
        "k2": (lambda x: x * x / 2, lambda x: -x),
        "k3": (lambda x: mpmath.expm1(x) - x, lambda x: -mpmath.expm1(x)),
    }
    for estimator in ESTIMATORS:
        value, slope = exact[estimator]
        got = kl_estimate(policy, d, estimator)
        (grad,) = torch.autograd.grad(got.sum(), policy)
        for x, y, dy in zip(d.tolist(), got.tolist(), grad.tolist(), strict=True):
            want, want_slope = value(mpmath.mpf(x)), slope(mpmath.mpf(x))
            assert abs(y - want) <= 8 * spacing * abs(want) + torch.finfo(dtype).tiny, (x, y)
            assert abs(dy - want_slope) <= 8 * spacing * abs(want_slope), (x, dy)


def test_eager_k3_is_further_from_the_truth() -> None:
    """What the series is for: where the policy is still close to its reference."""
    d = torch.linspace(1e-4, 0.1, 500)
    truth = torch.expm1(d.double()) - d.double()
    ours = ((kl_estimate(torch.zeros(500), d).double() - truth) / truth).abs().max()
    eager = (((d.exp() - 1 - d).double() - truth) / truth).abs().max()
    assert ours <= 1e-6
    assert eager >= 100 * ours


def test_estimates_have_the_mean_that_they_should() -> None:
    """Summed over all tokens of a small vocabulary instead of drawn."""
    g = torch.Generator().manual_seed(3)
    z = torch.randn(11, generator=g, dtype=torch.float64).requires_grad_()
    lp = z.log_softmax(0)
    ref = torch.randn(11, generator=g, dtype=torch.float64).log_softmax(0)
    p = lp.exp()
    kl = (p * (lp - ref)).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((p * kl_estimate(lp, ref, estimator)).sum(), kl)
    (truth,) = torch.autograd.grad(kl, z, retain_graph=True)
    weighted = {e: (p.detach() * kl_estimate(lp, ref, e)).sum() for e in ("k1", "k2")}
    (k2,) = torch.autograd.grad(weighted["k2"], z, retain_graph=True)
    torch.testing.assert_close(k2, truth)
    (k1,) = torch.autograd.grad(weighted["k1"], z)
    torch.testing.assert_close(k1, torch.zeros_like(k1), atol=1e-15, rtol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_equal_policy_is_exactly_zero(estimator: Any) -> None:
    lp = torch.linspace(-30, 0, 9).requires_grad_()
    kl = kl_estimate(lp, lp.detach(), estimator)
    assert not kl.any()
    if estimator != "k1":
        assert not torch.autograd.grad(kl.sum(), lp)[0].any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("held", [math.nan, 200.0, math.inf, -math.inf])
def test_masked_places_may_hold_anything(held: float, estimator: Any) -> None:
    """NaN and what overflows, on either side: neither in the estimate nor in a gradient."""
    mask = torch.tensor([[0, 1, 1]])
    ordinary, strange = torch.tensor([[0.0, -1.0, 0.0]]), torch.tensor([[held, -1.0, 0.0]])
    for policy, ref in ((torch.zeros(1, 3), strange), (-strange, ordinary)):
        lp = policy.clone().requires_grad_()
        kl = kl_estimate(lp, ref, estimator, mask=mask)
        assert kl[0, 0] == 0
        kept = policy[:, 1:].clone().requires_grad_()
        torch.testing.assert_close(kl[:, 1:], kl_estimate(kept, ref[:, 1:], estimator))
        loss = clipped_policy_loss(lp, lp.detach(), torch.ones(1), mask=mask, kl=kl, kl_coef=0.1)
        other = clipped_policy_loss(
            kept, kept.detach(), torch.ones(1), kl=kl_estimate(kept, ref[:, 1:], estimator),
            kl_coef=0.1,
        )  # fmt: skip
        torch.testing.assert_close(loss, other)
        (grad,) = torch.autograd.grad(loss, lp)
        assert grad[0, 0] == 0
        torch.testing.assert_close(grad[:, 1:], torch.autograd.grad(other, kept)[0])


# --- clipped surrogate -------------------------------------------------------------------------


def told(
    x: dict[str, Tensor],
    low: float,
    high: float,
    dual: float | None,
    level: str,
    coefficient: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Losses of tokens and their gradients for the log-ratio, by loops, as the papers have them."""
    rows, columns = x["logprobs"].shape
    losses, slopes = np.zeros((rows, columns)), np.zeros((rows, columns))
    for b in range(rows):
        kept = [t for t in range(columns) if x["mask"][b, t]]
        away = {t: float(x["logprobs"][b, t] - x["old_logprobs"][b, t]) for t in kept}
        mean = sum(away.values()) / max(1, len(kept))
        a = float(x["advantages"][b])
        for t in kept:
            ratio = math.exp(away[t] if level == "token" else mean)
            surrogate = min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
            slope = ratio * a if surrogate == ratio * a else 0.0
            if dual is not None and a < 0 and dual * a > surrogate:
                surrogate, slope = dual * a, 0.0
            losses[b, t] = -surrogate + coefficient * float(x["kl"][b, t])
            slopes[b, t] = -slope
    return losses, slopes


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    ("low", "high", "dual", "coefficient"),
    [(0.2, None, None, 0.0), (0.2, 0.28, None, 0.1), (0.1, 0.2, 1.5, 0.0), (1.0, 0.5, 3.0, 0.5)],
)
def test_the_surrogate_is_that_of_the_papers(
    low: float, high: float | None, dual: float | None, coefficient: float, level: Any, packed: bool
) -> None:
    x = batch(12, 9, seed=4, spread=0.6)
    want, slopes = told(x, low, low if high is None else high, dual, level, coefficient)
    mask = x["mask"]
    number, lengths = mask.numpy().sum(), mask.sum(1)
    if level == "sequence":  # every token moves the ratio of all
        slopes = np.where(
            mask, slopes.sum(1, keepdims=True) / np.maximum(1, lengths.numpy())[:, None], 0
        )
    options: dict[str, Any] = {
        "clip_low": low, "clip_high": high, "dual_clip": dual, "kl_coef": coefficient,
        "importance_level": level,
    }  # fmt: skip
    leaf = x["logprobs"].clone().requires_grad_()
    if packed:
        given = leaf[mask], x["old_logprobs"][mask], x["advantages"]
        options["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        options["kl"] = x["kl"][mask] if coefficient else None
    else:
        given = leaf, x["old_logprobs"], x["advantages"]
        options.update(mask=mask, kl=x["kl"] if coefficient else None)
    each = clipped_policy_loss(*given, reduction="none", **options)
    want_each = want[mask.numpy()] if packed else want
    np.testing.assert_allclose(each.detach().numpy(), want_each, rtol=1e-12, atol=1e-13)
    (grad,) = torch.autograd.grad(each.sum(), leaf)
    np.testing.assert_allclose(grad.numpy(), slopes, rtol=1e-12, atol=1e-13)
    means = want.sum(1) / np.maximum(1, lengths.numpy())
    for reduction, denom, total in (
        ("sum", None, want.sum()),
        ("mean", None, want.sum() / number),
        ("mean", 40, want.sum() / 40),
        ("mean", torch.tensor(40), want.sum() / 40),
        ("mean", torch.tensor([40]), want.sum() / 40),
        ("sequence_mean", None, means.mean()),
        ("sequence_mean", torch.tensor([[24.0]]), means.sum() / 24),
        ("sequence_mean", 24, means.sum() / 24),
    ):
        got = clipped_policy_loss(*given, reduction=reduction, denom=denom, **options)
        assert got.shape == ()
        assert got.dtype == torch.float64
        np.testing.assert_allclose(got.item(), total, rtol=1e-12)


def test_float32_is_no_further_from_float64_than_eager() -> None:
    x = {k: v.float() if v.is_floating_point() else v for k, v in batch(64, 33, seed=1).items()}
    want, _ = told({k: v.double() for k, v in x.items()}, 0.2, 0.2, None, "token", 0.0)
    got = clipped_policy_loss(
        x["logprobs"], x["old_logprobs"], x["advantages"], mask=x["mask"], reduction="none"
    )
    ratio, a = (x["logprobs"] - x["old_logprobs"]).exp(), x["advantages"][:, None]
    eager = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a) * x["mask"]
    mine, theirs = (np.abs(t.double().numpy() - want).max() for t in (got, eager))
    assert got.dtype == torch.float32
    assert mine <= 2 * theirs


@settings(max_examples=25)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 10**6), st.sampled_from([
    "token", "sequence"]))  # fmt: skip
def test_padded_and_packed_agree_whatever_is_masked(b: int, t: int, seed: int, level: Any) -> None:
    x = batch(b, t, seed=seed)
    mask = x["mask"]
    spoiled = torch.where(mask, x["logprobs"], torch.nan).requires_grad_()
    padded = clipped_policy_loss(
        spoiled, torch.where(mask, x["old_logprobs"], -torch.inf), x["advantages"][:, None],
        mask=mask, importance_level=level, reduction="sequence_mean",
    )  # fmt: skip
    leaf = x["logprobs"].clone().requires_grad_()
    lengths = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1)])
    packed = clipped_policy_loss(
        torch.cat([leaf[mask], leaf.new_full((2,), torch.nan)])[None],
        torch.cat([x["old_logprobs"][mask], leaf.new_zeros(2)])[None],
        x["advantages"], cu_seqlens=lengths.cumsum(0), importance_level=level,
        reduction="sequence_mean",
    )  # fmt: skip
    torch.testing.assert_close(padded, packed)
    (a,), (c,) = (torch.autograd.grad(*pair) for pair in ((padded, spoiled), (packed, leaf)))
    torch.testing.assert_close(a, c)


def test_infinite_ratios_of_clipped_tokens_leave_no_nan() -> None:
    lp = torch.tensor([[0.0, 0.0, -1e4, -torch.inf]], requires_grad=True)
    old = torch.tensor([[-200.0, -1e4, 0.0, -1.0]])
    for advantage, finite in ((1.0, True), (-1.0, False), (0.0, True)):
        loss = clipped_policy_loss(lp, old, torch.tensor([advantage]), dual_clip=3.0)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, lp)[0].isfinite().all()
        if not finite:  # without the dual clip a negative advantage has no bound: not hidden
            assert clipped_policy_loss(lp, old, torch.tensor([advantage])) == torch.inf


@pytest.mark.parametrize("reduction", ["mean", "sequence_mean", "sum"])
def test_nothing_counts_and_is_connected(reduction: Any) -> None:
    for shape in ((2, 3), (0, 3), (2, 0)):
        lp = torch.zeros(shape, requires_grad=True)
        mask = torch.zeros(shape)
        loss, clipped = clipped_policy_loss(
            lp, torch.zeros(shape), torch.ones(shape[0]), mask=mask, reduction=reduction,
            return_clipped=True,
        )  # fmt: skip
        assert loss == 0
        assert not torch.autograd.grad(loss, lp)[0].any()
        assert not any(clipped)


def test_what_is_measured() -> None:
    old = torch.zeros(4)
    lp = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    a = torch.tensor([1.0, 1.0, -1.0, -1.0])
    _, clipped = clipped_policy_loss(lp, old, a, return_clipped=True)
    assert (clipped.low, clipped.high) == (0.25, 0.25)
    torch.testing.assert_close(clipped.ratio, lp.detach().exp().mean())
    assert not clipped.ratio.requires_grad


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradcheck(level: Any) -> None:
    x = batch(3, 4, seed=2)

    def loss(lp: Tensor) -> Tensor:
        kl = kl_estimate(lp, x["old_logprobs"])
        return clipped_policy_loss(
            lp, x["old_logprobs"], x["advantages"], mask=x["mask"], kl=kl, kl_coef=0.1,
            importance_level=level,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, [x["logprobs"].requires_grad_()])


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_a_break(packed: bool) -> None:
    def step(lp: Tensor, old: Tensor, a: Tensor, where: Tensor) -> Tensor:
        kl = kl_estimate(lp, old)
        options: dict[str, Any] = {"cu_seqlens": where} if packed else {"mask": where}
        return clipped_policy_loss(
            lp, old, a, kl=kl, kl_coef=0.1, importance_level="sequence", **options
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = batch(3, 4, seed=2)
    if packed:
        given = [x["logprobs"].reshape(-1), x["old_logprobs"].reshape(-1), x["advantages"],
                 torch.tensor([0, 4, 4, 12])]  # fmt: skip
    else:
        given = [x["logprobs"], x["old_logprobs"], x["advantages"], x["mask"]]
    results = []
    for run in (step, compiled):
        leaf = given[0].clone().requires_grad_()
        loss = run(leaf, *given[1:])
        results.append([loss, torch.autograd.grad(loss, leaf)[0]])
    torch.testing.assert_close(*results)


LP = torch.zeros(2, 3)
A = torch.ones(2)
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: kl_estimate(LP, LP[:1]), ValueError, "ref_logprobs must have the shape of logprobs"),
    (lambda: kl_estimate(LP, LP, mask=A), ValueError, "mask must have the shape of logprobs"),
    (lambda: kl_estimate(LP, LP, "k4"), ValueError, "estimator must be one of"),
    (lambda: kl_estimate(LP, LP.to("meta")), ValueError, "ref_logprobs must be on the device"),
    (lambda: importance_weights(LP, LP[0]), ValueError, "old_logprobs must have the shape"),
    (lambda: importance_weights(LP, LP, clip=0.0), ValueError, "clip must be positive"),
    (lambda: clipped_policy_loss(LP, LP[0], A), ValueError, "old_logprobs must have the shape"),
    (lambda: clipped_policy_loss(LP, LP, torch.ones(3)), ValueError, "advantages must have the sh"),
    (lambda: clipped_policy_loss(LP, LP, A, mask=A), ValueError, "mask must have the shape of"),
    (lambda: clipped_policy_loss(LP, LP, A, kl=A, kl_coef=1.0), ValueError, "kl must have the sh"),
    (lambda: clipped_policy_loss(LP, LP, A, kl=LP), ValueError, "kl and kl_coef belong together"),
    (lambda: clipped_policy_loss(LP, LP, A, kl_coef=0.1), ValueError, "kl and kl_coef belong"),
    (lambda: clipped_policy_loss(LP, LP.clone().requires_grad_(), A), ValueError,
     "old_logprobs must not require grad"),
    (lambda: clipped_policy_loss(LP, LP, A.clone().requires_grad_()), ValueError,
     "advantages must not require grad"),
    (lambda: clipped_policy_loss(LP, LP, A, clip_low=0.0), ValueError, "clip_low must be in"),
    (lambda: clipped_policy_loss(LP, LP, A, clip_high=-0.1), ValueError, "clip_high must be pos"),
    (lambda: clipped_policy_loss(LP, LP, A, dual_clip=1.1), ValueError, "dual_clip must be above"),
    (lambda: clipped_policy_loss(LP, LP, A, importance_level="word"), ValueError,
     "importance_level must be"),
    (lambda: clipped_policy_loss(LP, LP, A, reduction="avg"), ValueError, "reduction must be one"),
    (lambda: clipped_policy_loss(LP, LP, A, reduction="sum", denom=3), ValueError, "denom needs"),
    (lambda: clipped_policy_loss(LP, LP, A, denom=0), ValueError, "denom must be positive"),
    (lambda: clipped_policy_loss(LP, LP, A, denom=A), ValueError, "denom must be one number"),
    (lambda: clipped_policy_loss(LP.sum(), LP.sum(), A), ValueError, "logprobs must have a last"),
    (lambda: clipped_policy_loss(LP[0], LP[0], A, cu_seqlens=torch.tensor([0, 2, 4])), ValueError,
     "cu_seqlens must rise"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case: int) -> None:
    call, kind, words = BAD[case]
    with pytest.raises(kind, match=re.escape(words)) as caught:
        call()
    assert type(caught.value) is kind


# --- TRL ---------------------------------------------------------------------------------------


@pytest.mark.peers
def test_importance_weights_are_those_of_trl() -> None:
    from trl.experimental.sdft.loss_utils import apply_importance_sampling_clipping

    g = torch.Generator().manual_seed(0)
    lp, old, losses = (10 * torch.randn(50, generator=g) for _ in range(3))
    want = apply_importance_sampling_clipping(losses, lp, old, 2.5)
    lp.requires_grad_()
    weights = importance_weights(lp, old, clip=2.5)
    assert not weights.requires_grad
    torch.testing.assert_close(losses * weights, want)


@pytest.mark.peers
@pytest.mark.parametrize(
    ("loss_type", "level"),
    [(name, "token") for name in ("grpo", "bnpo", "dr_grpo", "dapo")] + [("grpo", "sequence")],
)
def test_the_loss_is_that_of_trls_grpo(loss_type: str, level: Any) -> None:
    """The trainer's own method, on a stand-in that has what the loss reads."""
    from trl import GRPOTrainer

    x = {k: v.float() if v.is_floating_point() else v for k, v in batch(6, 8, seed=9).items()}
    mask = x["mask"].clone()
    mask[:, 0] = True
    policy = x["logprobs"].clone().requires_grad_()
    ref = x["old_logprobs"] + 0.1 * x["kl"]
    host = MagicMock(
        beta=0.05, epsilon_low=0.2, epsilon_high=0.28, loss_type=loss_type, use_vllm=False,
        importance_sampling_level=level, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        current_gradient_accumulation_steps=1, max_completion_length=8, tools=None,
        args=SimpleNamespace(
            delta=1.6, use_bias_correction_kl=False, steps_per_generation=1,
        ),
        aux_loss_enabled=False, _entropy_bonus_enabled=False,
    )  # fmt: skip
    host.accelerator.reduce = lambda t, **_: t
    host.accelerator.num_processes = 1
    host.accelerator.gather = lambda t: t
    answer = policy, torch.zeros_like(policy), None
    host._get_per_token_logps_and_entropies = lambda *_, **__: answer
    inputs = {
        "prompt_ids": torch.zeros(6, 2, dtype=torch.int64),
        "prompt_mask": torch.ones(6, 2, dtype=torch.int64),
        "completion_ids": torch.zeros(6, 8, dtype=torch.int64), "completion_mask": mask.long(),
        "advantages": x["advantages"], "old_per_token_logps": x["old_logprobs"],
        "ref_per_token_logps": ref, "num_items_in_batch": torch.tensor(50.0),
    }  # fmt: skip
    want = GRPOTrainer._compute_loss(host, host.model, inputs)
    own = x["logprobs"].clone().requires_grad_()
    how: dict[str, Any] = {
        "grpo": {"reduction": "sequence_mean"}, "bnpo": {}, "dr_grpo": {"denom": 6 * 8},
        "dapo": {"denom": torch.tensor(50.0)},
    }[loss_type]  # fmt: skip
    loss = clipped_policy_loss(
        own, x["old_logprobs"], x["advantages"], clip_high=0.28, dual_clip=1.6, mask=mask,
        kl=kl_estimate(own, ref), kl_coef=0.05, importance_level=level, **how,
    )  # fmt: skip
    torch.testing.assert_close(loss, want)
    grads = [torch.autograd.grad(a, b)[0] for a, b in ((loss, own), (want, policy))]
    torch.testing.assert_close(*grads)
