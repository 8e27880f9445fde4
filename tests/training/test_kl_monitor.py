"""The KL divergence from the base: means and gradients by enumeration, monitor and penalty."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import NoLogits, batch, gemma2, llama
from torch import Tensor, nn

from cl_fast.losses import kl_estimate
from cl_fast.training.keeping import Task
from cl_fast.training.kl_to_base import KLPenalty, KLToBase, draw, kl_of_tokens
from cl_fast.training.tokens import at_base, batch_logprobs, counted

KINDS: list[Any] = ["k1", "k2", "k3", "reverse_kl", "forward_kl"]


def with_adapter(seed: int = 0, **changes: Any) -> Any:
    """A model whose adapter does something."""
    torch.manual_seed(seed)
    model = get_peft_model(
        llama(seed, **changes), LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5)
    return model


def log_softmax(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    return model(**given).logits.detach().double().log_softmax(-1)


# --- a categorical of three --------------------------------------------------------------------


def test_means_and_gradients_of_the_estimators_by_enumeration() -> None:
    """All three outcomes of a categorical, each weighted by its probability."""
    z = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64, requires_grad=True)
    base = torch.tensor([1.0, 0.2, -0.5], dtype=torch.float64).log_softmax(0)
    p = z.detach().softmax(0)
    reverse = (z.softmax(0) * (z.log_softmax(0) - base)).sum()
    forward = (base.exp() * (base - z.log_softmax(0))).sum()
    (of_reverse,) = torch.autograd.grad(reverse, z)
    (of_forward,) = torch.autograd.grad(forward, z)
    means, gradients = {}, {}
    for kind in ("k1", "k2", "k3"):
        values = kl_estimate(z.log_softmax(0), base, kind)  # type: ignore[arg-type]
        means[kind] = (p * values.detach()).sum()
        (gradients[kind],) = torch.autograd.grad((p * values).sum(), z)
    torch.testing.assert_close(means["k1"], reverse.detach())
    torch.testing.assert_close(means["k3"], reverse.detach())
    assert abs(means["k2"] - reverse) > 0.01
    torch.testing.assert_close(gradients["k1"], torch.zeros_like(z))
    torch.testing.assert_close(gradients["k2"], of_reverse)
    torch.testing.assert_close(gradients["k3"], of_forward)
    assert (of_forward - of_reverse).abs().max() > 0.05


@pytest.mark.parametrize("estimator", KINDS)
def test_penalty_on_own_samples_by_enumeration(estimator: Any) -> None:
    """A model of three words; its three answers of one word, weighted by their probabilities."""
    model, base = (
        llama(seed, vocab_size=3, bos_token_id=1, eos_token_id=2).double() for seed in (1, 2)
    )
    prompt = torch.tensor([[1, 0, 1]])
    log_p = model(input_ids=prompt).logits[0, -1].log_softmax(-1)
    log_q = base(input_ids=prompt).logits[0, -1].log_softmax(-1).detach()
    reverse = (log_p.exp() * (log_p - log_q)).sum()
    forward = (log_q.exp() * (log_q - log_p)).sum()
    weight = model.model.layers[1].self_attn.v_proj.weight
    (of_reverse,) = torch.autograd.grad(reverse, weight, retain_graph=True)
    (of_forward,) = torch.autograd.grad(forward, weight)
    keep = KLPenalty(0.7, estimator=estimator, reference=base)
    mean, gradient = torch.zeros(()).double(), torch.zeros_like(weight)
    for word in range(3):
        ids = torch.cat([prompt, torch.tensor([[word]])], 1)
        labels = torch.tensor([[-100, -100, -100, word]])
        model.zero_grad()
        loss = keep.loss(model, {"input_ids": ids, "labels": labels})
        loss.backward()
        p = log_p[word].detach().exp()
        mean += p * loss.detach()
        gradient += p * weight.grad
    value = forward if estimator == "forward_kl" else reverse
    if estimator == "k2":
        value = (log_p.exp() * (log_p - log_q) ** 2 / 2).sum()
    towards = of_forward if estimator in ("k3", "forward_kl") else of_reverse
    torch.testing.assert_close(mean, 0.7 * value.detach())
    torch.testing.assert_close(gradient, 0.7 * towards)
    assert (of_forward - of_reverse).abs().max() > 1e-3 * of_reverse.abs().max()


# --- per token ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, gemma2])
def test_tokens_are_those_of_the_formula_in_float64(make: Any) -> None:
    model, base = make(1), make(2)
    inputs = batch(3)
    found = {k: kl_of_tokens(model, inputs, k, reference=base).detach() for k in KINDS}
    given = {k: v for k, v in inputs.items() if k != "labels"}
    p, q = log_softmax(model, given)[:, :-1], log_softmax(base, given)[:, :-1]
    targets = inputs["labels"][:, 1:]
    counts = targets != -100
    at = targets.clamp(min=0)[..., None]
    d = (q - p).gather(-1, at)[..., 0][counts]
    expected = {
        "k1": -d,
        "k2": d**2 / 2,
        "k3": d.exp() - 1 - d,
        "reverse_kl": (p.exp() * (p - q)).sum(-1)[counts],
        "forward_kl": (q.exp() * (q - p)).sum(-1)[counts],
    }
    for kind, values in expected.items():
        torch.testing.assert_close(
            found[kind].double(), values, rtol=2e-4, atol=1e-5, msg=lambda m, k=kind: f"{k}: {m}"
        )


def test_a_model_is_no_way_from_itself() -> None:
    model = llama(1)
    for kind in KINDS:
        assert not kl_of_tokens(model, batch(), kind, reference=llama(1)).any()


def test_base_is_the_model_without_its_adapter() -> None:
    model = with_adapter()
    inputs = batch(1)
    expected = kl_of_tokens(model, inputs, reference=llama(0)).detach()
    assert expected.mean() > 1e-3
    model.train()
    with NoLogits(27):
        torch.testing.assert_close(kl_of_tokens(model, inputs).detach(), expected)
        kl_of_tokens(model, inputs, "k3").sum().backward()
    assert model.training


def test_frozen_adapters_stay_frozen() -> None:
    """PEFT marks the adapters that it switches on again as trainable."""
    model = with_adapter()
    names = [n for n, p in model.named_parameters() if "lora" in n and "layers.0" in n]
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with at_base(model):
        pass
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    with pytest.raises(RuntimeError, match="stop"), at_base(model):
        raise RuntimeError("stop")
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_three_kinds_of_batches_count_the_same_tokens() -> None:
    model = llama(1)
    prompt = torch.tensor([[0, 5, 6], [7, 8, 9]])
    answer = torch.tensor([[10, 11, 0], [12, 13, 14]])
    seen, counts = (prompt != 0).long(), (answer != 0).long()
    rollout = {
        "prompt_ids": prompt, "prompt_mask": seen, "completion_ids": answer,
        "completion_mask": counts, "advantages": torch.ones(2),
    }  # fmt: skip
    ids, mask = torch.cat([prompt, answer], 1), torch.cat([seen, counts], 1)
    of_answer = torch.cat([torch.zeros_like(seen), counts], 1)
    pairs = {"input_ids": ids, "attention_mask": mask, "completion_mask": of_answer}
    labels = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(of_answer == 0, -100),
    }
    expected, where = batch_logprobs(model, labels)
    assert where.sum() == 5
    for given in (rollout, pairs):
        found, there = batch_logprobs(model, given)
        assert torch.equal(there, where)
        torch.testing.assert_close(found, expected)
    assert set(counted({**pairs, "ref_chosen_logps": torch.ones(1)})[0]) == {
        "input_ids", "attention_mask",
    }  # fmt: skip


# --- samples -----------------------------------------------------------------------------------


def test_draws_are_the_models_own_and_leave_the_global_state() -> None:
    model = llama(0, initializer_range=0.8)
    model.generation_config.top_p = 0.01  # must not bend the draw
    prompts = {
        "input_ids": torch.tensor([[0, 5], [6, 7]]),
        "attention_mask": torch.tensor([[0, 1], [1, 1]]),
    }
    state = torch.get_rng_state()
    first = draw(model, prompts, max_new_tokens=6, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    second = draw(model, prompts, max_new_tokens=6, seed=3)
    other = draw(model, prompts, max_new_tokens=6, seed=4)
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert first["input_ids"].shape != other["input_ids"].shape or not torch.equal(
        first["input_ids"], other["input_ids"]
    )
    greedy = model(**{k: first[k] for k in ("input_ids", "attention_mask")}).logits.argmax(-1)
    counts = first["labels"][:, 1:] != -100
    assert (greedy[:, :-1] != first["labels"][:, 1:])[counts].any()


def test_draws_follow_the_distribution_and_end_once() -> None:
    model = llama(3, initializer_range=0.5, vocab_size=5)
    many = 4000
    prompts = {"input_ids": torch.full((many, 1), 3), "attention_mask": torch.ones(many, 1).long()}
    drawn = draw(model, prompts, max_new_tokens=2, seed=0)
    p = model(input_ids=torch.tensor([[3]])).logits[0, -1].softmax(-1)
    seen = torch.bincount(drawn["input_ids"][:, 1], minlength=5) / many
    assert (seen - p).abs().max() < 5 * (0.25 / many) ** 0.5
    ended = drawn["labels"][:, 1] == 2
    assert 0 < ended.sum() < many
    assert (drawn["labels"][ended, 2] == -100).all()
    assert not drawn["attention_mask"][ended, 2].any()
    assert (drawn["labels"][~ended, 2] >= 0).all()


def test_own_samples_estimate_what_the_vocabulary_says() -> None:
    """k1, k3 and the exact divergence of the same draws have one mean."""
    model, base = llama(1, vocab_size=7), llama(1, vocab_size=7)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    many = {"input_ids": torch.full((2000, 1), 3), "attention_mask": torch.ones(2000, 1).long()}
    keep = KLToBase(many, reference=base, max_new_tokens=3, kinds=KINDS)
    found = keep.measure(model)
    exact = found["kl_to_base/reverse_kl"]
    assert found["kl_to_base/k1"] == pytest.approx(exact, rel=0.25)
    assert found["kl_to_base/k3"] == pytest.approx(exact, rel=0.15)


# --- the monitor -------------------------------------------------------------------------------


def test_monitor_measures_on_its_steps_and_resumes() -> None:
    model, base = llama(1), llama(2)
    keep = KLToBase([batch(0), batch(1)], reference=base, every=2, kinds=("reverse_kl",))
    keep.before_task(model, Task("a"))
    keep.on_update(model)
    assert keep.measures() == {}
    keep.on_update(model)
    tokens = torch.cat([kl_of_tokens(model, batch(i), reference=base) for i in (0, 1)]).detach()
    ranked = tokens.sort().values
    assert keep.measures() == {
        "kl_to_base/reverse_kl": pytest.approx(tokens.mean().item()),
        "kl_to_base/reverse_kl_p95": pytest.approx(ranked[-(-95 * len(ranked) // 100) - 1].item()),
        "kl_to_base/reverse_kl_max": pytest.approx(ranked[-1].item()),
    }
    again = KLToBase([batch(0), batch(1)], reference=base, every=2, kinds=("reverse_kl",))
    again.load_state_dict(keep.state_dict())
    assert again.measures() == keep.measures()
    assert again.options() == keep.options()
    model.lm_head.weight.data.mul_(0.5)
    again.after_task(model, Task("a"))  # was measured at this step
    assert again.measures() == keep.measures()
    again.on_update(model)
    again.after_task(model, Task("a"))
    assert again.measures() != keep.measures()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: KLToBase([]), "batches is empty"),
        (lambda: KLToBase(batch(), every=0), "every must be at least 1"),
        (lambda: KLToBase(batch(), kinds=("k4",)), "each of kinds must be one of 'k1'.*got 'k4'"),  # type: ignore[arg-type]
        (lambda: KLToBase({"input_ids": torch.ones(1, 2)}), "which tokens count"),
        (lambda: KLToBase(batch(), max_new_tokens=0), "max_new_tokens must be at least 1"),
        (lambda: KLToBase(batch()).before_task(llama(), Task("a")), "give reference"),
        (lambda: KLPenalty(0.0), "weight must be positive"),
        (lambda: KLPenalty(1.0, estimator="k0"), "estimator must be one of"),  # type: ignore[arg-type]
        (lambda: KLPenalty(1.0).before_task(llama(), Task("a")), "no adapter of PEFT"),
        (lambda: kl_of_tokens(llama(), batch(), "kl"), "kind must be one of"),  # type: ignore[arg-type]
        (
            lambda: draw(
                llama(),
                {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.tensor([[1, 0]])},
                max_new_tokens=2,
                seed=0,
            ),
            "padded on the left",
        ),
        (
            lambda: KLToBase(
                {**batch(), "labels": torch.full((3, 9), -100)}, reference=llama(1)
            ).measure(llama()),
            "no token",
        ),
    ],
)
def test_bad_input(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_the_model_is_not_its_own_reference() -> None:
    model = llama()
    with pytest.raises(ValueError, match="the model that is trained"):
        KLPenalty(1.0, reference=model).before_task(model, Task("a"))
