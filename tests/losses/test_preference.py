"""Preference losses: the papers' formulas in float64, extremes, gradients, bad input, TRL."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_fast.losses import cpo_loss, dpo_loss, kto_loss, orpo_loss, simpo_loss

BETA = 0.3


def sums(n: int = 24, seed: int = 0, scale: float = 40.0) -> list[Tensor]:
    """Log-probs of four kinds of answers, in float64; the policy strays a little."""
    g = torch.Generator().manual_seed(seed)
    c0, r0 = (-scale * torch.rand(n, generator=g, dtype=torch.float64) - 1e-3 for _ in range(2))
    c, r = (
        (x + 0.1 * scale * torch.randn(n, generator=g, dtype=torch.float64)).clamp(max=-1e-6)
        for x in (c0, r0)
    )
    return [c, r, c0, r0]


def log_sigmoid(x: Tensor) -> Tensor:
    """By the formula in float64; in float32 as eager code has it."""
    return -(1 + (-x).exp()).log() if x.dtype == torch.float64 else F.logsigmoid(x)


Formula = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Call = Callable[..., Any]


def margin(c: Tensor, r: Tensor, c0: Tensor, r0: Tensor) -> Tensor:
    return BETA * ((c - c0) - (r - r0))


def exo(c: Tensor, r: Tensor, c0: Tensor, r0: Tensor, s: float = 0.1) -> Tensor:
    policy = torch.stack([BETA * (c - c0), BETA * (r - r0)]).softmax(0)
    target = torch.tensor([1 - s, s], dtype=c.dtype)[:, None]
    return (policy * (policy / target).log()).sum(0)


def odds(x: Tensor) -> Tensor:
    return x.exp() / (1 - x.exp())


GOOD = torch.arange(24) % 3 != 0

LOSSES: dict[str, tuple[Call, Formula]] = {
    "dpo": (
        lambda c, r, c0, r0, **k: dpo_loss(c, r, c0, r0, beta=BETA, **k),
        lambda *x: -log_sigmoid(margin(*x)),
    ),
    "smoothed": (
        lambda c, r, c0, r0, **k: dpo_loss(c, r, c0, r0, beta=BETA, label_smoothing=0.1, **k),
        lambda *x: -0.9 * log_sigmoid(margin(*x)) - 0.1 * log_sigmoid(-margin(*x)),
    ),
    "hinge": (
        lambda c, r, c0, r0, **k: dpo_loss(c, r, c0, r0, beta=BETA, loss_type="hinge", **k),
        lambda *x: (1 - margin(*x)).clamp(min=0),
    ),
    "ipo": (
        lambda c, r, c0, r0, **k: dpo_loss(c, r, c0, r0, beta=BETA, loss_type="ipo", **k),
        lambda *x: (margin(*x) / BETA - 1 / (2 * BETA)) ** 2,
    ),
    "robust": (
        lambda c, r, c0, r0, **k: dpo_loss(
            c, r, c0, r0, beta=BETA, loss_type="robust", label_smoothing=0.2, **k
        ),
        lambda *x: (-0.8 * log_sigmoid(margin(*x)) + 0.2 * log_sigmoid(-margin(*x))) / 0.6,
    ),
    "exo": (
        lambda c, r, c0, r0, **k: dpo_loss(
            c, r, c0, r0, beta=BETA, loss_type="exo_pair", label_smoothing=0.1, **k
        ),
        exo,
    ),
    "cpo": (
        lambda c, r, c0, _, **k: cpo_loss(c, r, beta=BETA, nll=-c0, alpha=0.5, **k),
        lambda c, r, c0, _: -log_sigmoid(BETA * (c - r)) - 0.5 * c0,
    ),
    "simpo": (
        lambda c, r, *_, **k: simpo_loss(c, r, beta=BETA, gamma=0.4, **k),
        lambda c, r, *_: -log_sigmoid(BETA * (c - r) - 0.4),
    ),
    "orpo": (
        lambda c, r, c0, _, **k: orpo_loss(c / 40, r / 40, beta=BETA, nll=-c0, **k),
        lambda c, r, c0, _: -BETA * log_sigmoid((odds(c / 40) / odds(r / 40)).log()) - c0,
    ),
    "kto": (
        lambda c, _r, c0, _, **k: kto_loss(
            c, c0, GOOD, kl=torch.tensor(0.7, dtype=torch.float64), beta=BETA, desirable_weight=1.5,
            undesirable_weight=0.5, **k,
        ),
        lambda c, _r, c0, _: torch.where(
            GOOD,
            1.5 * (1 - 1 / (1 + (-BETA * (c - c0 - 0.7)).exp())),
            0.5 * (1 - 1 / (1 + (-BETA * (0.7 - (c - c0))).exp())),
        ),
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", LOSSES)


def run(call: Call, inputs: list[Tensor], up: Tensor | None = None) -> list[Tensor]:
    """Losses, and the gradients of both sides of the policy."""
    c, r, c0, r0 = inputs
    c, r = c.clone().requires_grad_(), r.clone().requires_grad_()
    loss = call(c, r, c0, r0)
    made = torch.autograd.grad(loss, [c, r], up, allow_unused=True)
    return [loss, *(torch.zeros_like(c) if g is None else g for g in made)]


@EVERY
def test_the_papers_formula_in_float64(name: str) -> None:
    call, formula = LOSSES[name]
    up = torch.linspace(-1, 2, 24, dtype=torch.float64)
    got = run(lambda *x: call(*x, reduction="none"), sums(), up)
    want = run(formula, sums(), up)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@EVERY
@pytest.mark.parametrize("scale", [1.0, 40.0, 100.0])
def test_float32_is_no_further_from_float64_than_eager(name: str, scale: float) -> None:
    call, formula = LOSSES[name]
    inputs = [x.float() for x in sums(seed=3, scale=scale)]
    want = run(formula, [x.double() for x in inputs], torch.ones(24, dtype=torch.float64))
    got = run(lambda *x: call(*x, reduction="none"), inputs, torch.ones(24))
    eager = run(formula, inputs, torch.ones(24))
    for a, b, true in zip(got, eager, want, strict=True):
        assert a.dtype == torch.float32
        size = float(true.detach().abs().max())
        mine, theirs = ((t.double() - true).abs().max() for t in (a, b))
        # Eager may be infinitely wrong (0 log 0, inf - inf); ours may not.
        theirs = theirs.nan_to_num(nan=0.0, posinf=0.0)
        assert mine <= 2 * theirs + 2.0**-22 * max(size, 1.0)


@EVERY
def test_reductions(name: str) -> None:
    call = LOSSES[name][0]
    each = call(*sums(), reduction="none")
    torch.testing.assert_close(call(*sums(), reduction="sum"), each.sum())
    torch.testing.assert_close(call(*sums()), each.mean())
    assert each.shape == (24,)


@EVERY
def test_gradcheck(name: str) -> None:
    c, r, c0, r0 = sums(seed=5)
    assert torch.autograd.gradcheck(
        lambda a, b: LOSSES[name][0](a, b, c0, r0, reduction="none"),
        [c.requires_grad_(), r.requires_grad_()],
    )


@EVERY
def test_compiles_without_a_break(name: str) -> None:
    call = LOSSES[name][0]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, sums()), run(call, sums()), strict=True):
        torch.testing.assert_close(a, b)


@EVERY
@pytest.mark.parametrize("far", [0.0, -1e-30, -1e4, -1e30])
def test_extremes_stay_finite(name: str, far: float) -> None:
    """Answers that are certain or impossible: no overflow, no NaN in the gradients."""
    ordinary = torch.full((24,), -3.0)
    for inputs in (
        [ordinary + far, ordinary],
        [ordinary, ordinary + far],
        [ordinary * 0 + far] * 2,
    ):
        loss, *gradients = run(
            LOSSES[name][0], [inputs[0], inputs[1], ordinary.clone(), ordinary.clone()]
        )
        if far > -1e20 or name not in ("ipo", "cpo"):
            assert not loss.isnan()
        for g in gradients:
            assert not g.isnan().any()


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(low: torch.dtype) -> None:
    inputs = [x.to(low) for x in sums()]
    loss = dpo_loss(*inputs)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, dpo_loss(*(x.float() for x in inputs)))


@EVERY
def test_an_empty_batch_is_a_connected_zero(name: str) -> None:
    if name == "kto":
        c = torch.zeros(0, requires_grad=True)
        loss = kto_loss(c, torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    else:
        c = torch.zeros(0, requires_grad=True)
        loss = LOSSES[name][0](c, torch.zeros(0), torch.zeros(0), torch.zeros(0))
    assert loss == 0
    assert torch.autograd.grad(loss, c)[0].shape == (0,)


def test_rewards_are_measured_without_gradients() -> None:
    c, r, c0, r0 = sums()
    _, rewards = dpo_loss(c.requires_grad_(), r, c0, r0, beta=BETA, return_rewards=True)
    torch.testing.assert_close(rewards.chosen, BETA * (c.detach() - c0))
    torch.testing.assert_close(rewards.rejected, BETA * (r - r0))
    assert not rewards.chosen.requires_grad
    for loss in (cpo_loss, simpo_loss, orpo_loss):
        rewards = loss(c, r, beta=BETA, return_rewards=True)[1]
        torch.testing.assert_close(rewards.rejected, BETA * r)
        assert not rewards.chosen.requires_grad


def test_a_number_as_nll_is_added_once() -> None:
    c, r, *_ = sums()
    for reduction in ("mean", "sum"):
        for loss in (cpo_loss, orpo_loss):
            with_nll = loss(c, r, nll=torch.tensor(2.0), reduction=reduction)
            torch.testing.assert_close(with_nll, loss(c, r, reduction=reduction) + 2)


def test_policy_equal_to_reference_is_log_two() -> None:
    c, r, *_ = sums()
    torch.testing.assert_close(dpo_loss(c, r, c, r).item(), math.log(2))
    assert (kto_loss(c, c, GOOD, reduction="none") == 0.5).all()
    # A negative estimate of a KL counts as 0.
    assert (kto_loss(c, c, GOOD, kl=torch.tensor(-3.0), reduction="none") == 0.5).all()
    assert (kto_loss(c, c, GOOD, kl=-3.0, reduction="none") == 0.5).all()


def test_a_kl_that_changes_compiles_without_a_break() -> None:
    """From its second value on a number is a symbol, which math.isfinite cannot be asked about."""
    c, _, c0, _ = sums()

    def step(kl: float) -> Tensor:
        return kto_loss(c, c0, GOOD, kl=kl)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for kl in (0.1, 0.2, 0.7, -1.0):
        torch.testing.assert_close(compiled(kl), step(kl))


def test_a_kl_of_nan_on_its_device_is_shown() -> None:
    """Looking at it would wait for the device; it must not count as 0 either."""
    c, *_ = sums()
    assert kto_loss(c, c, GOOD, kl=torch.tensor(math.nan)).isnan()


C = torch.zeros(3)
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: dpo_loss(C, C[:2], C, C), ValueError, "policy_rejected must have the shape of"),
    (lambda: dpo_loss(C, C, C, C[None]), ValueError, "ref_rejected must have the shape of"),
    (lambda: dpo_loss(C, C.long(), C, C), TypeError, "policy_rejected must be floating point"),
    (lambda: dpo_loss(C, C.to("meta"), C, C), ValueError, "policy_rejected must be on the device"),
    (lambda: dpo_loss(C, C, C.clone().requires_grad_(), C), ValueError,
     "ref_chosen must not require grad"),
    (lambda: dpo_loss(C, C, C, C, beta=0.0), ValueError, "beta must be positive; got 0.0"),
    (lambda: dpo_loss(C, C, C, C, loss_type="dpo"), ValueError, "loss_type must be one of"),
    (lambda: dpo_loss(C, C, C, C, reduction="avg"), ValueError, "reduction must be one of"),
    (lambda: dpo_loss(C, C, C, C, label_smoothing=1.0), ValueError, "label_smoothing must be in"),
    (lambda: dpo_loss(C, C, C, C, loss_type="robust", label_smoothing=0.5), ValueError, "[0, 0.5)"),
    (lambda: dpo_loss(C, C, C, C, loss_type="hinge", label_smoothing=0.1), ValueError,
     "label_smoothing is not offered"),
    (lambda: dpo_loss(C, C, C, C, loss_type="exo_pair"), ValueError, "must be above 0"),
    (lambda: cpo_loss(C, C, loss_type="robust"), ValueError, "loss_type must be one of"),
    (lambda: cpo_loss(C, C, nll=C[:2]), ValueError, "nll must be one number or have the shape"),
    (lambda: simpo_loss(C, C, beta=-1.0), ValueError, "beta must be positive"),
    (lambda: orpo_loss(C, C[:1]), ValueError, "policy_rejected must have the shape of"),
    (lambda: kto_loss(C, C, C), TypeError, "desirable must be bool"),
    (lambda: kto_loss(C, C, C[:2] > 0), ValueError, "desirable must have the shape of policy"),
    (lambda: kto_loss(C, C, C > 0, kl=C), ValueError, "kl must be one number"),
    (lambda: kto_loss(C, C, C > 0, kl=math.nan), ValueError, "kl must be a finite number; got nan"),
    (lambda: kto_loss(C, C, C > 0, kl=math.inf), ValueError, "kl must be a finite number; got inf"),
    (lambda: kto_loss(C, C.clone().requires_grad_(), C > 0), ValueError, "ref must not require"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case: int) -> None:
    call, kind, words = BAD[case]
    with pytest.raises(kind, match=re.escape(words)) as caught:
        call()
    assert type(caught.value) is kind


# --- TRL ---------------------------------------------------------------------------------------


@pytest.mark.peers
def test_orpo_is_that_of_trl() -> None:
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    c, r = (x.float() / 40 for x in sums()[:2])
    host = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device="cpu"))
    ratio, chosen, rejected, _, _ = ORPOTrainer.odds_ratio_loss(host, c, r)
    loss, rewards = orpo_loss(c, r, beta=BETA, reduction="none", return_rewards=True)
    torch.testing.assert_close(loss, -ratio)
    torch.testing.assert_close(rewards.chosen, chosen)
    torch.testing.assert_close(rewards.rejected, rejected)


@pytest.mark.peers
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "simpo"])
def test_cpo_and_simpo_are_those_of_trl(loss_type: Any) -> None:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    c, r = (x.float() for x in sums()[:2])
    smoothing = 0.1 if loss_type in ("sigmoid", "simpo") else 0.0
    host = SimpleNamespace(
        alpha=0.0, beta=BETA, loss_type=loss_type, label_smoothing=smoothing, simpo_gamma=0.4,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    want, chosen, _ = CPOTrainer.cpo_loss(host, c, r)
    options: dict[str, Any] = {
        "beta": BETA, "label_smoothing": smoothing, "reduction": "none", "return_rewards": True,
    }  # fmt: skip
    if loss_type == "simpo":
        loss, rewards = simpo_loss(c, r, gamma=0.4, **options)
    else:
        loss, rewards = cpo_loss(c, r, loss_type=loss_type, **options)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(rewards.chosen, chosen)


def answers(logprobs: Tensor) -> Any:
    """What TRL's models give: here log-probs of answers of one token."""
    column = logprobs[:, None]
    return SimpleNamespace(
        log_probs=column, entropy=torch.zeros_like(column), label_mask=torch.ones_like(column) > 0,
        mean_logits=torch.zeros_like(column), is_top1=torch.zeros_like(column) > 0, aux_loss=None,
    )  # fmt: skip


def batch_of(n: int) -> dict[str, Tensor]:
    """A prompt token and an answer token each."""
    ids, mask = torch.zeros(n, 2, dtype=torch.int64), torch.tensor([[0, 1]]).expand(n, 2)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}


@pytest.mark.peers
@pytest.mark.parametrize(
    ("loss_type", "smoothing"),
    [("sigmoid", 0.0), ("hinge", 0.0), ("ipo", 0.0), ("robust", 0.2), ("exo_pair", 0.1)],
)
def test_dpo_is_that_of_trls_trainer(loss_type: Any, smoothing: float) -> None:
    """The trainer's own method, on a stand-in that has what the loss reads."""
    from trl import DPOTrainer

    c, r, c0, r0 = (x.float() for x in sums())
    host = MagicMock(
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=False, beta=BETA,
        f_divergence_type="reverse_kl", loss_types=[loss_type], loss_weights=[1.0],
        label_smoothing=smoothing, use_weighting=False,
        ref_model=lambda **_: answers(torch.cat([c0, r0])),
    )  # fmt: skip
    host.accelerator.device = "cpu"
    host.accelerator.gather_for_metrics = lambda t: t
    policy = torch.cat([c, r]).requires_grad_()
    want = DPOTrainer._compute_loss(host, lambda **_: answers(policy), batch_of(48), False)
    own = [c.clone().requires_grad_(), r.clone().requires_grad_()]
    loss = dpo_loss(*own, c0, r0, beta=BETA, loss_type=loss_type, label_smoothing=smoothing)
    torch.testing.assert_close(loss, want)
    mine = torch.cat(torch.autograd.grad(loss, own))
    torch.testing.assert_close(mine, torch.autograd.grad(want, policy)[0])


@pytest.mark.peers
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_is_that_of_trls_trainer(loss_type: str) -> None:
    from trl import KTOTrainer

    x, away, x0, away0 = (t.float() for t in sums(scale=4.0, seed=2))
    kl = (away - away0).mean() if loss_type == "kto" else 0.0
    host = MagicMock(
        aux_loss_enabled=False, precompute_ref_logps=False, beta=BETA, loss_type=loss_type,
        calculate_KL=loss_type == "kto", desirable_weight=1.5, undesirable_weight=0.5,
        ref_model=lambda **_: answers(x0),
    )  # fmt: skip
    host.accelerator.device = "cpu"
    host.accelerator.gather_for_metrics = lambda t: t
    host._compute_kl_logps = lambda model, _: away0 if model is host.ref_model else away
    policy = x.clone().requires_grad_()
    batch = {**batch_of(24), "label": GOOD}
    want = KTOTrainer._compute_loss(host, lambda **_: answers(policy), batch, False)
    own = x.clone().requires_grad_()
    loss = kto_loss(own, x0, GOOD, kl=kl, beta=BETA, desirable_weight=1.5, undesirable_weight=0.5)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(
        *(torch.autograd.grad(a, b)[0] for a, b in ((loss, own), (want, policy)))
    )


def test_log_probs_of_tokens_are_not_those_of_sequences() -> None:
    x = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"policy_chosen must have one number per sequence"):
        dpo_loss(x, x, x, x)
