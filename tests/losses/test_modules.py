"""The losses as modules: what they compute, what they refuse; and what the package exports."""

from __future__ import annotations

import importlib
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cl_fast.losses
from cl_fast.losses import (
    Clipped,
    ClippedPolicyLoss,
    Divergence,
    DPOLoss,
    KTOLoss,
    LinearDivergence,
    ORPOLoss,
    Rewards,
    TokenLogprobs,
    clipped_policy_loss,
    dpo_loss,
    importance_weights,
    kl_estimate,
    kto_loss,
    orpo_loss,
    token_logprobs,
)


def logprobs(*shape: int, seed: int = 0) -> Tensor:
    return -3 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 0.01


C, R, C0, R0 = (logprobs(6, seed=seed) for seed in range(4))
LP, OLD = logprobs(3, 4), logprobs(3, 4, seed=1)
ADVANTAGES, MASK = torch.tensor([1.0, -2.0, 0.5]), LP > -2
GOOD = C > -1.5

Call = Callable[..., Any]
SAME: dict[str, tuple[Call, Call, dict[str, Any], tuple[Any, ...], dict[str, Any]]] = {
    "dpo": (DPOLoss, dpo_loss, {}, (C, R, C0, R0), {}),
    "dpo, options": (
        DPOLoss, dpo_loss,
        {"beta": 0.3, "loss_type": "exo_pair", "label_smoothing": 0.2, "reduction": "none",
         "return_rewards": True},
        (C, R, C0, R0), {},
    ),
    "kto": (
        KTOLoss, kto_loss, {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5},
        (C, C0, GOOD), {"kl": torch.tensor(0.3)},
    ),
    "orpo": (ORPOLoss, orpo_loss, {"beta": 0.3, "reduction": "sum"}, (C, R), {"nll": -C}),
    "policy": (
        ClippedPolicyLoss, clipped_policy_loss, {}, (LP, OLD, ADVANTAGES), {"denom": 7},
    ),
    "policy, options": (
        ClippedPolicyLoss, clipped_policy_loss,
        {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 2.0, "kl_coef": 0.1,
         "importance_level": "sequence", "reduction": "sequence_mean", "return_clipped": True},
        (LP, OLD, ADVANTAGES), {"mask": MASK, "kl": kl_estimate(LP, OLD, mask=MASK)},
    ),
    "policy, packed": (
        ClippedPolicyLoss, clipped_policy_loss, {"reduction": "none"},
        (C, C0, ADVANTAGES), {"cu_seqlens": torch.tensor([0, 2, 2, 5])},
    ),
    "log-probs": (
        TokenLogprobs, token_logprobs, {"temperature": 2.0, "entropy": True},
        (LP, OLD, torch.tensor([0, 2, 1])), {"bias": ADVANTAGES},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_modules_are_the_functions(name: str) -> None:
    module, function, options, tensors, more = SAME[name]
    made: nn.Module = module(**options)
    assert not made.state_dict()
    for key, value in options.items():
        assert f"{key}={value!r}" in repr(made)
    want = function(*tensors, **more, **options)
    for same in (made, pickle.loads(pickle.dumps(made))):
        got = same(*tensors, **more)
        assert type(got) is type(want)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_modules_compile_without_a_break() -> None:
    loss = ClippedPolicyLoss(clip_high=0.3, reduction="sequence_mean")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    given = (LP, OLD, ADVANTAGES)
    torch.testing.assert_close(compiled(*given, mask=MASK), loss(*given, mask=MASK))


EVERY: list[Any] = [
    LinearDivergence, Divergence, TokenLogprobs, DPOLoss, KTOLoss, ORPOLoss, ClippedPolicyLoss,
]  # fmt: skip


@pytest.mark.parametrize("module", EVERY)
def test_a_misspelt_option_is_refused_when_made(module: Any) -> None:
    with pytest.raises(TypeError, match=r"has no option 'temperatur'; it has .*'"):
        module(temperatur=2)


REFUSED: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    # What is given to forward, with each batch.
    (LinearDivergence, {"denom": 3}, TypeError, "has no option 'denom'"),
    (Divergence, {"labels": GOOD}, TypeError, "has no option 'labels'"),
    (Divergence, {"chunk_tokens": 8}, TypeError, "has no option 'chunk_tokens'"),
    (TokenLogprobs, {"bias": ADVANTAGES}, TypeError, "has no option 'bias'"),
    (KTOLoss, {"kl": 0.1}, TypeError, "has no option 'kl'"),
    (ORPOLoss, {"nll": C}, TypeError, "has no option 'nll'"),
    (ClippedPolicyLoss, {"mask": MASK}, TypeError, "has no option 'mask'"),
    # What no batch could be computed with.
    (LinearDivergence, {"temperature": -1}, ValueError, "temperature must be positive; got -1"),
    (LinearDivergence, {"teacher_temperature": 0}, ValueError, "teacher_temperature must be pos"),
    (LinearDivergence, {"softcap": -1.0}, ValueError, "softcap must be positive"),
    (LinearDivergence, {"logit_scale": float("nan")}, ValueError, "logit_scale must be a finite"),
    (LinearDivergence, {"chunk_tokens": 0}, ValueError, "chunk_tokens must be at least 1"),
    (LinearDivergence, {"pad_vocab": "one"}, ValueError, "pad_vocab must be"),
    (LinearDivergence, {"kind": "kl"}, ValueError, "kind must be one of"),
    (Divergence, {"temperature": 0.0}, ValueError, "temperature must be positive"),
    (Divergence, {"pad_vocab": "one"}, ValueError, "pad_vocab must be"),
    (TokenLogprobs, {"temperature": 0.0}, ValueError, "temperature must be positive"),
    (TokenLogprobs, {"softcap": -2}, ValueError, "softcap must be positive"),
    (TokenLogprobs, {"chunk_tokens": -1}, ValueError, "chunk_tokens must be at least 1"),
    (DPOLoss, {"beta": 0}, ValueError, "beta must be positive"),
    (DPOLoss, {"loss_type": "hinge", "label_smoothing": 0.1}, ValueError, "is not offered for"),
    (DPOLoss, {"reduction": "avg"}, ValueError, "reduction must be one of"),
    (KTOLoss, {"beta": -1.0}, ValueError, "beta must be positive"),
    (ORPOLoss, {"beta": float("inf")}, ValueError, "beta must be positive"),
    (ClippedPolicyLoss, {"clip_low": 0.0}, ValueError, "clip_low must be in"),
    (ClippedPolicyLoss, {"dual_clip": 1.1}, ValueError, "dual_clip must be above"),
    (ClippedPolicyLoss, {"reduction": "avg", "kl_coef": 0.1}, ValueError, "reduction must be one"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_refused_when_made(case: int) -> None:
    module, options, kind, words = REFUSED[case]
    with pytest.raises(kind, match=re.escape(words)) as caught:
        module(**options)
    assert type(caught.value) is kind


@pytest.mark.parametrize("module", EVERY)
def test_made_where_tensors_have_no_data(module: Any) -> None:
    with torch.device("meta"):
        module()


# --- what the package exports ------------------------------------------------------------------


def test_every_name_is_importable_from_its_home() -> None:
    package = cl_fast.losses
    assert set(package.__all__) == set(package._HOMES)
    assert dir(package) == sorted(package.__all__)
    for name in package.__all__:
        home = importlib.import_module(f"cl_fast.losses.{package._HOMES[name]}")
        assert getattr(package, name) is getattr(home, name)
        assert name in home.__all__


def test_results_have_names() -> None:
    assert isinstance(dpo_loss(C, R, C0, R0, return_rewards=True)[1], Rewards)
    clipped = clipped_policy_loss(LP, OLD, ADVANTAGES, return_clipped=True)[1]
    assert isinstance(clipped, Clipped)
    assert importance_weights(LP, OLD, clip=2.0).amax() <= 2
