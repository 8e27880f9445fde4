"""How far a model has moved from its base: a monitor, and a penalty.

    KL(pi || pi_0) = sum_y pi (log pi - log pi_0)       "reverse_kl", exact per token
    KL(pi_0 || pi) = sum_y pi_0 (log pi_0 - log pi)     "forward_kl", exact per token
    k1 = -d   k2 = d^2 / 2   k3 = e^d - 1 - d           d = log pi_0(y) - log pi(y), y ~ pi

k1 and k3 have the mean KL(pi || pi_0) where y was drawn from pi, and only there; k2 is biased (k1
may be negative, the others are not). As losses their gradients are another matter:

    estimator   value                 mean gradient on own samples
    k1          unbiased              that of KL(pi || pi_0), by the score function: k1 * d log pi,
                                      as a penalty in the reward of PPO has it
    k2          biased                that of KL(pi || pi_0): token by token the same as k1 here
    k3          unbiased              not that of KL(pi || pi_0), but sum_y (pi - pi_0) d log pi,
                                      that is the gradient of KL(pi_0 || pi)
    reverse_kl  exact, any tokens     of KL(pi || pi_0) given what precedes each token

Differentiated plainly k1 has the gradient d log pi, whose mean is 0: it says nothing. The
estimators: Schulman, "Approximating KL divergence" (2020).

The KL on the inputs of a *new* task tells how much of the old ones will be forgotten (Shenfeld et
al. 2025, "RL's Razor"): a monitor that needs no old data. With an adapter the base is the model
with the adapter switched off, so it costs no memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cl_fast.losses import kl_estimate, linear_divergence, token_logprobs
from cl_fast.models.heads import (
    IGNORED,
    Evaluating,
    head_of,
    last_hidden,
    next_labels,
    run_inside,
    unwrap,
)
from cl_fast.options import at_least, integer, one_of, positive
from cl_fast.training.keeping import Keep, Task
from cl_fast.training.tokens import at_base, check_base, counted, on_device_of

__all__ = ["KLPenalty", "KLToBase", "Kind", "draw", "kl_of_tokens"]

Kind = Literal["k1", "k2", "k3", "reverse_kl", "forward_kl"]
_ESTIMATORS = ("k1", "k2", "k3")


def kl_of_tokens(
    model: nn.Module,
    batch: Mapping[str, Any],
    kind: Kind = "reverse_kl",
    *,
    reference: nn.Module | None = None,
) -> Tensor:
    """What `kind` says of each token of a batch that counts: [N], in nats, differentiable.

    Args:
        model: a causal language model of transformers.
        batch: as a trainer has it: labels, or input_ids and completion_mask, or a rollout.
        kind: "reverse_kl" is KL(model || base), "forward_kl" KL(base || model), both over the
            whole vocabulary; "k1", "k2", "k3" look at the token alone, which must have been drawn
            from the model.
        reference: the base; by default the model with its adapters of PEFT switched off.

    Raises:
        ValueError: no such kind; no base; a batch that does not say which tokens count.
    """
    one_of("kind", kind, get_args(Kind))
    return _compared(model, batch, (kind,), reference)[kind]


def _compared(
    model: nn.Module, batch: Mapping[str, Any], kinds: Sequence[Kind], reference: nn.Module | None
) -> dict[str, Tensor]:
    """Each of `kinds` of the tokens that count, from one pass of the base and one of the model."""
    given, labels = counted(batch)
    targets = next_labels(labels)
    length, counts = targets.size(1), targets != IGNORED
    estimators = [kind for kind in kinds if kind in _ESTIMATORS]
    exact = [kind for kind in kinds if kind not in _ESTIMATORS]

    def states(inner: Any, **inputs: Any) -> tuple[Tensor, Tensor | None]:
        # Prompt tuning puts its own positions in front.
        hidden = last_hidden(inner, **inputs)[:, -length:]
        if not estimators:
            return hidden, None
        return hidden, token_logprobs(**head_of(inner).keywords(hidden), ids=targets)

    with at_base(model, reference) as base:
        hidden, ref = run_inside(base, states, **given)
        given_by: Any = head_of(base).teacher(hidden) if exact else None

    def compare(inner: Any, **inputs: Any) -> tuple[Tensor, ...]:
        hidden, logprobs = states(inner, **inputs)
        found = []
        each: Any
        for each in kinds:
            if each in _ESTIMATORS:
                assert logprobs is not None
                found.append(kl_estimate(logprobs, ref.to(logprobs.device), each, mask=counts))
            else:
                student = head_of(inner).keywords(hidden)
                found.append(
                    linear_divergence(
                        **student, teacher=given_by, kind=each, labels=targets, reduction="none"
                    )
                )
        return tuple(found)

    values = run_inside(model, compare, **given)
    return {kind: x[counts] for kind, x in zip(kinds, values, strict=True)}


def draw(
    model: nn.Module, prompts: Mapping[str, Tensor], *, max_new_tokens: int, seed: int
) -> dict[str, Tensor]:
    """Completions drawn from the model itself, at temperature 1 and from its whole vocabulary.

    The global random state is left as it was.

    Args:
        model: with `generate` of transformers.
        prompts: input_ids and attention_mask, padded on the left.
        max_new_tokens: at most; a completion ends with the model's end-of-sequence token.
        seed: of the draw.

    Returns:
        input_ids, attention_mask and labels: the tokens that were drawn count.

    Raises:
        ValueError: the model cannot generate, or prompts are padded on the right.
    """
    inner = unwrap(model)
    own = getattr(inner, "generation_config", None)
    if own is None:
        raise ValueError(f"{type(inner).__name__} has no generate: give completions yourself")
    mask = prompts["attention_mask"]
    if not bool(mask[:, -1].all()):
        raise ValueError("prompts must be padded on the left: a completion follows the last token")
    end = own.eos_token_id
    ends = [end] if isinstance(end, int) else list(end or ())
    pad = own.pad_token_id if own.pad_token_id is not None else (ends[0] if ends else 0)
    # A config of its own: the model's may bend the distribution (top-p, penalties).
    how = type(own)(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=max_new_tokens,
        eos_token_id=ends or None, pad_token_id=pad, bos_token_id=own.bos_token_id,
    )  # fmt: skip
    ids = prompts["input_ids"]
    cards = [ids.device] if ids.is_cuda else []
    with Evaluating(inner), torch.no_grad(), torch.random.fork_rng(devices=cards):
        torch.manual_seed(seed)
        whole = inner.generate(input_ids=ids, attention_mask=mask, generation_config=how)
    answer = whole[:, ids.size(1) :]
    ended = torch.isin(answer, torch.tensor(ends, device=answer.device, dtype=answer.dtype))
    counts = ended.cumsum(1) - ended.to(torch.int64) == 0  # the end itself counts
    return {
        "input_ids": whole,
        "attention_mask": torch.cat([mask, counts.to(mask.dtype)], 1),
        "labels": torch.cat(
            [torch.full_like(ids, IGNORED), answer.masked_fill(~counts, IGNORED)], 1
        ),
    }


class KLToBase(Keep):
    """A monitor: every so many steps, the KL divergence of the model from its base on batches.

    It adds nothing to the loss, so it is at home in `KeepCallback` too. `measures` gives, for each
    kind, `kl_to_base/<kind>` (the mean over tokens, in nats), `..._p95` and `..._max`. In a loop of
    your own call `measure(model)`.

    Every rank measures the same batches.

    Args:
        batches: that say which tokens count (see `kl_of_tokens`): of the new task to foresee
            forgetting, of old prompts to see it. With `max_new_tokens`, prompts: input_ids and
            attention_mask, padded on the left.
        kinds: by default ("reverse_kl", "forward_kl"), with `max_new_tokens` ("k1", "k2", "k3",
            "reverse_kl"). k1, k2 and k3 speak of the KL only where the model drew the tokens.
        reference: the base; by default the model with its adapters of PEFT switched off.
        every: measure after every so many steps of the optimizer, and at the end.
        max_new_tokens: draw completions from the model each time instead, at most this long.
        seed: of those draws.

    Raises:
        ValueError: no batches, an unknown kind, `every` below 1; before the first step: no base.
    """

    def __init__(
        self,
        batches: Iterable[Mapping[str, Any]],
        *,
        kinds: Sequence[Kind] | None = None,
        reference: nn.Module | None = None,
        every: int = 100,
        max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(batches, Mapping):
            batches = [batches]
        self.batches = list(batches)
        if not self.batches:
            raise ValueError("batches is empty: there is nothing to measure the KL on")
        if max_new_tokens is None:
            for batch in self.batches:
                counted(batch)
        else:
            at_least("max_new_tokens", max_new_tokens, 1)
        at_least("every", every, 1)
        integer("seed", seed)
        if kinds is None:
            exact: tuple[Kind, ...] = ("reverse_kl", "forward_kl")
            kinds = exact if max_new_tokens is None else ("k1", "k2", "k3", "reverse_kl")
        for kind in kinds:
            one_of("each of kinds", kind, get_args(Kind))
        self.kinds, self.reference, self.every = tuple(kinds), reference, int(every)
        self.max_new_tokens, self.seed = max_new_tokens, int(seed)
        self.steps = 0
        self.last: dict[str, float] = {}

    def measure(self, model: nn.Module) -> dict[str, float]:
        """The numbers of now. Waits for the device."""
        check_base(model, self.reference)
        found: dict[str, list[Tensor]] = {kind: [] for kind in self.kinds}
        for i, given in enumerate(self.batches):
            batch = on_device_of(model, given)
            if self.max_new_tokens is not None:
                seed = self.seed * 1_000_003 + self.steps * len(self.batches) + i
                batch = draw(model, batch, max_new_tokens=self.max_new_tokens, seed=seed)
            with Evaluating(model), torch.no_grad():
                for kind, tokens in _compared(model, batch, self.kinds, self.reference).items():
                    found[kind].append(tokens)
        self.last = {}
        for kind, values in found.items():
            tokens = torch.cat(values)
            if not tokens.numel():
                raise ValueError("no token of batches counts: all of their labels are ignored")
            high = tokens.kthvalue(-(-95 * tokens.numel() // 100)).values
            self.last[f"kl_to_base/{kind}"] = float(tokens.mean())
            self.last[f"kl_to_base/{kind}_p95"] = float(high)
            self.last[f"kl_to_base/{kind}_max"] = float(tokens.max())
        return self.last

    def before_task(self, model: nn.Module, task: Task) -> None:
        check_base(model, self.reference)

    def on_update(self, model: nn.Module) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            self.measure(model)

    def after_task(self, model: nn.Module, task: Task) -> None:
        if self.steps % self.every:
            self.measure(model)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "last": dict(self.last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.last = int(state["steps"]), dict(state["last"])

    def options(self) -> dict[str, Any]:
        return {
            "batches": len(self.batches),
            "kinds": list(self.kinds),
            "reference": "given" if self.reference is not None else None,
            "every": self.every,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
        }

    def measures(self) -> dict[str, float]:
        return dict(self.last)


class KLPenalty(Keep):
    """weight * the KL divergence of the model from its base, on the tokens of the batch that count.

    The mean over tokens of a micro-batch. With k1, k2 and k3 it is a KL only on completions that
    the model has just drawn (GRPO, RLOO, online DPO). On data that others wrote, "reverse_kl" and
    "forward_kl" are divergences still; k2 there pulls the log-probs of the data to those that the
    base gave them, and k1 and k3 have no such meaning.

    The base costs a forward pass without gradients, and no memory if it is an adapter switched off.

    Args:
        weight: beta, positive.
        estimator: "k1" (value k1, gradient by the score function), "k2", "k3", "reverse_kl",
            "forward_kl"; see the module.
        reference: the base; by default the model with its adapters of PEFT switched off.

    Raises:
        ValueError: weight not positive, an unknown estimator; before the first step: no base.
    """

    def __init__(
        self, weight: float, *, estimator: Kind = "k2", reference: nn.Module | None = None
    ) -> None:
        positive("weight", weight)
        one_of("estimator", estimator, get_args(Kind))
        self.weight, self.estimator, self.reference = float(weight), estimator, reference
        self._last: Tensor | None = None

    def before_task(self, model: nn.Module, task: Task) -> None:
        check_base(model, self.reference)

    def loss(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        if self.estimator == "k1":
            # d k2 = (log pi - log pi_0) d log pi = k1 d log pi: its gradient, the value of k1.
            found = _compared(model, inputs, ("k1", "k2"), self.reference)
            values = found["k2"] + (found["k1"] - found["k2"]).detach()
        else:
            values = kl_of_tokens(model, inputs, self.estimator, reference=self.reference)
        mean = values.sum() / max(1, values.numel())
        self._last = mean.detach()
        return self.weight * mean

    def options(self) -> dict[str, Any]:
        reference = "given" if self.reference is not None else None
        return {"weight": self.weight, "estimator": self.estimator, "reference": reference}

    def measures(self) -> dict[str, float]:
        return {} if self._last is None else {"kl_penalty/kl": float(self._last)}
