"""Schedules: the formulas at every step, exact boundaries, resuming, annealing, branching."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import llama
from torch import nn
from transformers import Trainer, TrainingArguments

from cl_fast.integrations.schedules import AnnealCallback
from cl_fast.training.schedules import Infinite, InfiniteLR, Rewarm, infinite, rewarm

REWARM = Rewarm(max_lr=3e-4, min_lr=3e-5, warmup=10, steps=100)
INFINITE = Infinite(max_lr=3e-4, constant_lr=1.65e-4, min_lr=3e-5, warmup=7, cooldown=30)
ANNEALED = INFINITE.annealed(60, 25)


def optimizer(*rates: float) -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": rate} for rate in rates]
    return torch.optim.AdamW(groups)


def rates(scheduler: Any, steps: int) -> list[list[float]]:
    """What each of the next steps of the optimizer uses."""
    out = []
    for _ in range(steps):
        out.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return out


def saved(scheduler: Any) -> Any:
    """A state as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(scheduler.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Functions of n.


def test_rewarm_is_its_formula() -> None:
    for n in range(130):
        if n <= 10:
            expected = 3e-4 * n / 10
        elif n <= 100:
            expected = 3e-5 + 2.7e-4 / 2 * (1 + math.cos(math.pi * (n - 10) / 90))
        else:
            expected = 3e-5
        assert math.isclose(REWARM(n), expected, rel_tol=1e-14, abs_tol=0), n
    assert (REWARM(0), REWARM(10), REWARM(100), REWARM(101)) == (0.0, 3e-4, 3e-5, 3e-5)
    skipping = replace(REWARM, skip_zero=True)
    assert skipping(0) == skipping(1) == REWARM(1) > 0
    assert all(skipping(n) == REWARM(n) for n in range(1, 120))
    assert replace(REWARM, warmup=0)(0) == 3e-4


@pytest.mark.parametrize("cooling", ["cosine", "inverse_sqrt"])
@pytest.mark.parametrize("annealing", ["exponential", "harmonic"])
def test_infinite_is_its_formula(cooling: Any, annealing: Any) -> None:
    schedule = replace(ANNEALED, cooling=cooling, annealing=annealing)
    top, flat, low = 3e-4, 1.65e-4, 3e-5

    def h(t: float) -> float:
        return (1 + 10 * t) ** -0.5 - 1

    for n in range(100):
        if n <= 7:
            expected = top * n / 7
        elif n <= 37:
            t = (n - 7) / 30
            if cooling == "cosine":
                expected = flat + (top - flat) / 2 * (1 + math.cos(math.pi * t))
            else:
                expected = top + (flat - top) * h(t) / h(1)
        elif n <= 60:
            expected = flat
        elif n <= 85:
            t = (n - 60) / 25
            if annealing == "exponential":
                expected = flat * math.exp(t * math.log(low / flat))
            else:
                expected = (t / low + (1 - t) / flat) ** -1
        else:
            expected = low
        assert math.isclose(schedule(n), expected, rel_tol=1e-13, abs_tol=0), n
    at = {0: 0.0, 7: top, 37: flat, 60: flat, 85: low, 86: low}
    assert {n: schedule(n) for n in at} == at
    assert schedule.end == 85
    assert INFINITE.end is None
    assert INFINITE(10**9) == flat


@given(
    warmup=st.integers(0, 50),
    cooldown=st.integers(1, 50),
    hold=st.integers(-20, 50),
    steps=st.integers(1, 50),
    low=st.floats(1e-7, 1e-4),
    flat=st.floats(1e-4, 1e-3),
    top=st.floats(1e-3, 1e-1),
    cooling=st.sampled_from(["cosine", "inverse_sqrt"]),
    annealing=st.sampled_from(["exponential", "harmonic"]),
)
def test_phases_meet(
    warmup: int,
    cooldown: int,
    hold: int,
    steps: int,
    low: float,
    flat: float,
    top: float,
    cooling: Any,
    annealing: Any,
) -> None:
    at = max(warmup, warmup + cooldown + hold)
    steady = Infinite(
        max_lr=top,
        constant_lr=flat,
        min_lr=low,
        warmup=warmup,
        cooldown=cooldown,
        cooling=cooling,
        annealing=annealing,
    )
    schedule = steady.annealed(at, steps)
    assert schedule(warmup) == top
    assert schedule(at) == steady(at)
    assert schedule(at + steps) == low
    assert steady(warmup + cooldown) == flat
    values = [schedule(n) for n in range(at + steps + 5)]
    assert values[: warmup + 1] == sorted(values[: warmup + 1])
    for before, after in zip(values[warmup:], values[warmup + 1 :], strict=False):
        assert after <= before * (1 + 1e-12)
    later = steady.later()
    assert later(0) == later(1000) == flat
    assert later.annealed(5, steps)(5 + steps) == low


# Schedulers.


def made(kind: str, *given: float) -> Any:
    if kind == "rewarm":
        return rewarm(optimizer(*given), steps=100, warmup=10, min_lr=3e-5)
    return infinite(
        optimizer(*given),
        warmup=7,
        cooldown=30,
        constant_lr=1.65e-4,
        min_lr=3e-5,
        **({"anneal_at": 60, "anneal_steps": 25} if kind == "annealed" else {}),
    )


@pytest.mark.parametrize(
    ("kind", "schedule"), [("rewarm", REWARM), ("infinite", INFINITE), ("annealed", ANNEALED)]
)
def test_a_resumed_run_is_the_straight_one(kind: str, schedule: Any) -> None:
    straight = made(kind, 3e-4, 3e-5)
    states, seen = [], []
    for _ in range(110):
        states.append((saved(straight), straight.optimizer.state_dict()))
        seen += rates(straight, 1)
    assert [first for first, _ in seen] == [schedule(n) for n in range(110)]
    assert all(math.isclose(second, first / 10, rel_tol=1e-15) for first, second in seen)
    for n in range(0, 110, 3):
        resumed = made(kind, 3e-4, 3e-5)
        state, of_optimizer = states[n]
        resumed.optimizer.load_state_dict(of_optimizer)
        resumed.load_state_dict(state)
        assert resumed.last_epoch == n
        assert resumed.get_last_lr() == seen[n]
        assert rates(resumed, 110 - n) == seen[n:]


def test_a_given_rate_scales_all_groups() -> None:
    groups = optimizer(1.0, 0.5)
    scheduler = rewarm(groups, steps=100, warmup=10, min_lr=3e-5, max_lr=3e-4)
    assert rates(scheduler, 101)[100] == [3e-5, 1.5e-5]
    tensors = torch.optim.AdamW([nn.Parameter(torch.ones(2))], lr=torch.tensor(3e-4))
    of_tensors = rewarm(tensors, steps=100, warmup=10, min_lr=3e-5)
    state = of_tensors.state_dict()
    kept = tensors.param_groups[0]["lr"]
    rates(of_tensors, 10)
    assert kept is tensors.param_groups[0]["lr"]
    assert math.isclose(float(kept), 3e-4, rel_tol=1e-6)
    of_tensors.load_state_dict(state)
    assert kept == 0


@pytest.mark.parametrize("at", [7, 20, 37, 50])
def test_annealing_at_any_step_and_branching_back(at: int) -> None:
    trunk = made("infinite", 3e-4, 1e-4)
    before = rates(trunk, at)
    state, first = saved(trunk), trunk.get_last_lr()
    assert before == [[INFINITE(n), INFINITE(n) * (1e-4 / 3e-4)] for n in range(at)]

    trunk.anneal(12)
    assert trunk.get_last_lr() == first, "nothing jumps"
    branch = INFINITE.annealed(at, 12)
    halfway = rates(trunk, 6)
    assert [a for a, _ in halfway] == [branch(n) for n in range(at, at + 6)]
    inside = saved(trunk)
    rest = rates(trunk, 8)
    assert rest[-1][0] == 3e-5
    with pytest.raises(ValueError, match=f"has begun at step {at} and ends at {at + 12}"):
        trunk.anneal(3)

    # A branch goes on annealing when it is resumed.
    resumed = made("infinite", 3e-4, 1e-4)
    resumed.load_state_dict(inside)
    assert rates(resumed, 8) == rest
    # The trunk goes on as if there had been no branch: in a new run, and in this one.
    for other in (made("infinite", 3e-4, 1e-4), trunk):
        other.load_state_dict(state)
        assert [a for a, _ in rates(other, 60)] == [INFINITE(n) for n in range(at, at + 60)]
        other.anneal(5)
        assert rates(other, 6)[-1][0] == 3e-5


def test_a_branch_may_be_planned_from_a_checkpoint() -> None:
    trunk = made("infinite", 3e-4)
    rates(trunk, 50)
    planned = made("annealed", 3e-4)
    planned.load_state_dict(saved(trunk))
    assert [a for (a,) in rates(planned, 40)] == [ANNEALED(n) for n in range(50, 90)]
    rates(trunk, 20)
    for state, other in ((saved(trunk), "annealed"), (saved(planned), "infinite")):
        with pytest.raises(ValueError, match=r"anneal_at differs.*is past it"):
            made(other, 3e-4).load_state_dict(state)


# Bad input.

RATES = {"max_lr": 3e-4, "min_lr": 3e-5}


@pytest.mark.parametrize(
    ("kind", "changes", "error", "words"),
    [
        (Rewarm, {"steps": 10}, ValueError, "ends, after steps=10, before its warm-up"),
        (Rewarm, {"steps": 0}, ValueError, "steps must be at least 1; got 0"),
        (Rewarm, {"steps": 10.0}, TypeError, "steps must be a number of steps, an int"),
        (Rewarm, {"warmup": -1}, ValueError, "warmup must be at least 0"),
        (Rewarm, {"min_lr": 1.0}, ValueError, "min_lr 1.0 is larger than max_lr"),
        (Rewarm, {"min_lr": -1.0}, ValueError, "min_lr must be 0 or more"),
        (Rewarm, {"max_lr": 0.0}, ValueError, "max_lr must be positive"),
        (Rewarm, {"max_lr": float("nan")}, ValueError, "max_lr must be positive"),
        (Rewarm, {"max_lr": float("inf")}, ValueError, "max_lr must be positive"),
        (Rewarm, {"max_lr": "1"}, TypeError, "max_lr must be a number"),
        (Infinite, {"anneal_at": 3, "anneal_steps": 9}, ValueError, "anneal_at=3, before the warm"),
        (Infinite, {"anneal_at": 50, "anneal_steps": 0}, ValueError, "anneal_steps must be at lea"),
        (Infinite, {"anneal_at": 50}, ValueError, "anneal_at and anneal_steps belong together"),
        (Infinite, {"cooldown": 0}, ValueError, "cooldown=0 would jump"),
        (Infinite, {"cooldown": -1}, ValueError, "cooldown must be at least 0"),
        (Infinite, {"constant_lr": 1e-3}, ValueError, "rates must not grow"),
        (Infinite, {"min_lr": 0.0}, ValueError, "min_lr must be positive"),
        (Infinite, {"alpha": 0.0}, ValueError, "alpha must be positive"),
        (Infinite, {"cooling": "linear"}, ValueError, "cooling must be one of"),
        (Infinite, {"annealing": "linear"}, ValueError, "annealing must be one of"),
    ],
)
def test_bad_schedules(kind: Any, changes: Any, error: type[Exception], words: str) -> None:
    given: dict[str, Any] = {**RATES, "warmup": 10}
    given |= {"steps": 100} if kind is Rewarm else {"constant_lr": 1e-4, "cooldown": 20}
    kind(**given)
    with pytest.raises(error, match=words):
        kind(**{**given, **changes})


def test_bad_optimizers_and_states() -> None:
    with pytest.raises(ValueError, match="no positive lr"):
        rewarm(optimizer(0.0), steps=100, warmup=10, min_lr=3e-5, max_lr=3e-4)
    with pytest.raises(TypeError, match="optimizer must be an optimizer of torch"):
        rewarm(None, steps=100, warmup=10, min_lr=3e-5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps count from 0"):
        REWARM(-1)
    state = saved(made("rewarm", 3e-4))
    other = rewarm(optimizer(3e-4), steps=200, warmup=10, min_lr=3e-5)
    before = other.state_dict()
    for scheduler, words in (
        (other, "steps differs: saved 100, now 200"),
        (made("infinite", 3e-4), "state is of Rewarm, not Infinite"),
        (made("rewarm", 3e-4, 1e-4), "state has 1 parameter groups, the optimizer 2"),
    ):
        with pytest.raises(ValueError, match=words):
            scheduler.load_state_dict(state)
    assert other.state_dict() == before
    warming = made("infinite", 3e-4)
    with pytest.raises(ValueError, match="before the warm-up of warmup=7 steps ends"):
        warming.anneal(5)


# In the Trainer.


def trainer(folder: Path, *callbacks: Any, **changes: Any) -> Trainer:
    torch.manual_seed(0)
    model = llama(0, num_hidden_layers=1)
    ids = [torch.tensor([3 + i, 4]) for i in range(60)]
    rows = [{"input_ids": x, "labels": x} for x in ids]
    own = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = infinite(own, warmup=2, cooldown=3, constant_lr=5e-3, min_lr=1e-4)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        **{"max_steps": 20, "save_steps": 4, **changes},
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows[:2],
        optimizers=(own, scheduler),
        callbacks=list(callbacks),
    )


def logged(host: Trainer) -> list[float]:
    return [log["learning_rate"] for log in host.state.log_history if "learning_rate" in log]


def test_the_trainer_anneals_and_branches(tmp_path: Path) -> None:
    steady = Infinite(max_lr=1e-2, constant_lr=5e-3, min_lr=1e-4, warmup=2, cooldown=3)
    trunk = trainer(tmp_path, max_steps=8)
    trunk.train()
    assert logged(trunk) == [steady(n) for n in range(8)]

    # Release from the checkpoint of step 8; the run ends where the anneal ends.
    release = steady.annealed(10, 5)
    branch = trainer(tmp_path, AnnealCallback(5, at=10))
    branch.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert branch.state.global_step == 15
    assert logged(branch)[8:] == [release(n) for n in range(8, 15)]
    assert branch.lr_scheduler.get_last_lr() == [1e-4]

    # Cut off within the anneal, and resumed with the same callback.
    again = trainer(tmp_path, AnnealCallback(5, at=10))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert logged(again)[12:] == [release(n) for n in range(12, 15)]
    for name, value in branch.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name

    # The trunk goes on from the same checkpoint.
    onward = trainer(tmp_path)
    onward.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert logged(onward)[8:] == [5e-3] * 12


def test_the_trainer_anneals_when_a_metric_no_longer_falls(tmp_path: Path) -> None:
    values = iter([5.0, 4.0, 4.5, 4.0, 3.0, 3.0])
    host = trainer(
        tmp_path,
        AnnealCallback(4, patience=2, metric="eval_score"),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
    )
    host.evaluation_loop = _scored(host, values)  # type: ignore[method-assign]
    host.train()
    scheduler = host.lr_scheduler
    assert isinstance(scheduler, InfiniteLR)
    assert (scheduler.schedule.anneal_at, scheduler.schedule.end) == (8, 12)
    assert host.state.global_step == 12


def _scored(host: Trainer, values: Any) -> Any:
    loop = host.evaluation_loop

    def scored(*args: Any, **kwargs: Any) -> Any:
        out = loop(*args, **kwargs)
        out.metrics["eval_score"] = next(values)
        return out

    return scored


def test_bad_callbacks(tmp_path: Path) -> None:
    for options, words in (
        ({}, "give one of at and patience"),
        ({"at": 3, "patience": 3}, "give one of at and patience"),
        ({"at": -1}, "at must be at least 0"),
        ({"patience": 0}, "patience must be at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            AnnealCallback(5, **options)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        AnnealCallback(0, at=3)
    with pytest.raises(ValueError, match="the anneal would end at step 21, the training ends at 2"):
        trainer(tmp_path, AnnealCallback(5, at=16)).train()
    other = trainer(tmp_path, AnnealCallback(5, at=10))
    other.lr_scheduler = rewarm(other.optimizer, steps=9, warmup=1, min_lr=0.0)
    with pytest.raises(TypeError, match=r"needs a scheduler of cl_fast.*got ScheduleLR"):
        other.train()
    scoreless = trainer(
        tmp_path,
        AnnealCallback(4, patience=2, metric="eval_x"),
        eval_strategy="steps",
        eval_steps=1,
    )
    with pytest.raises(ValueError, match="gave no 'eval_x'"):
        scoreless.train()
