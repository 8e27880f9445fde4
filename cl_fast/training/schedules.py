"""Learning rates for training on: re-warm and re-decay, and a schedule without an end.

Pure functions of the step n, from 0. With T_w the end of the warm-up:

    warm-up         eta_max n / T_w                              n < T_w
                    (skip_zero: eta_max max(1, n) / T_w, so that the first step is not lost)

    Rewarm          eta_min + (eta_max - eta_min) (1 + cos(pi (n - T_w) / (N - T_w))) / 2
                    T_w <= n <= N, then eta_min

    Infinite        cool-down to eta_const over T_w <= n < T_cd, with t = (n - T_w) / (T_cd - T_w):
      cosine        eta_const + (eta_max - eta_const) (1 + cos(pi t)) / 2
      inverse_sqrt  eta_max + (eta_const - eta_max) h(t) / h(1),  h(t) = 1 / sqrt(1 + alpha t) - 1
                    constant, eta_const, until T_c; then, if ever, with t = (n - T_c) / (T - T_c):
      exponential   eta_const (eta_min / eta_const)^t
      harmonic      1 / (t / eta_min + (1 - t) / eta_const)
                    T_c <= n <= T, then eta_min

At a boundary a value is the exact one, not one that was computed near it. Sources: Gupta et al.
2023 (arXiv 2308.04014) re-warm and re-decay; Ibrahim et al. 2024 (2403.08763) the same at scale,
and the infinite schedules; the harmonic anneal is that of WSD-S (Wen et al. 2024, 2410.05192).

`rewarm(optimizer, ...)` and `infinite(optimizer, ...)` make a scheduler of torch of them. The
schedule is that of the group with the largest rate; the others keep their ratio to it. An infinite
one is annealed at any step, `scheduler.anneal(steps)`: the checkpoint before it goes on as if
nothing had happened, the branch ends in a model to release.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Generic, Literal, TypeVar

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cl_fast.options import one_of

__all__ = ["Infinite", "InfiniteLR", "Rewarm", "ScheduleLR", "infinite", "rewarm"]

Cooling = Literal["cosine", "inverse_sqrt"]
Annealing = Literal["exponential", "harmonic"]


def _check_rate(name: str, value: Any, zero: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not (value >= 0 if zero else value > 0) or math.isinf(value):
        raise ValueError(f"{name} must be {'0 or more' if zero else 'positive'}; got {value}")


def _check_steps(name: str, value: Any, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a number of steps, an int; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")


def _cosine(high: float, low: float, t: float) -> float:
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * t))


def _check_step(n: int) -> None:
    if n < 0:
        raise ValueError(f"steps count from 0; got {n}")


@dataclass(frozen=True, kw_only=True)
class Rewarm:
    """Warm up to `max_lr`, then a cosine down to `min_lr`: one stage of training on.

    Args:
        max_lr: eta_max.
        min_lr: eta_min, reached at `steps` and kept.
        warmup: T_w, steps; 0 for none.
        steps: N, of the whole stage.
        skip_zero: begin at max_lr / warmup instead of 0.

    Raises:
        ValueError: a stage that ends before its warm-up does, rates that are not positive or in the
            wrong order.
        TypeError: steps that are no ints.
    """

    max_lr: float
    min_lr: float
    warmup: int
    steps: int
    skip_zero: bool = False

    def __post_init__(self) -> None:
        _check_rate("max_lr", self.max_lr)
        _check_rate("min_lr", self.min_lr, zero=True)
        if self.min_lr > self.max_lr:
            raise ValueError(f"min_lr {self.min_lr} is larger than max_lr {self.max_lr}")
        _check_steps("steps", self.steps, 1)
        _check_steps("warmup", self.warmup)
        if self.warmup >= self.steps:
            raise ValueError(
                f"the schedule ends, after steps={self.steps}, before its warm-up of "
                f"warmup={self.warmup} steps does and the decay starts"
            )

    @property
    def peak(self) -> float:
        """The largest rate."""
        return self.max_lr

    def __call__(self, n: int) -> float:
        """The rate of step n."""
        _check_step(n)
        if n < self.warmup:
            return self.max_lr * (max(1, n) if self.skip_zero else n) / self.warmup
        if n == self.warmup:
            return self.max_lr
        if n >= self.steps:
            return self.min_lr
        t = (n - self.warmup) / (self.steps - self.warmup)
        return _cosine(self.max_lr, self.min_lr, t)


@dataclass(frozen=True, kw_only=True)
class Infinite:
    """Warm up, cool down to a constant, stay there; anneal when a model is to be released.

    Args:
        max_lr: eta_max.
        constant_lr: eta_const.
        min_lr: eta_min, reached at the end of the anneal and kept.
        warmup: T_w: steps of the warm-up.
        cooldown: T_cd - T_w: steps of the cool-down. 0 only where max_lr is constant_lr.
        anneal_at: T_c, the step from which it anneals; None for not yet.
        anneal_steps: T - T_c.
        cooling: "cosine" or "inverse_sqrt".
        alpha: of the inverse square root.
        annealing: "exponential" or "harmonic".
        skip_zero: begin at max_lr / warmup instead of 0.

    Raises:
        ValueError: an anneal that starts within the warm-up or has no steps, rates that are not
            positive or in the wrong order.
        TypeError: steps that are no ints.
    """

    max_lr: float
    constant_lr: float
    min_lr: float
    warmup: int
    cooldown: int
    anneal_at: int | None = None
    anneal_steps: int | None = None
    cooling: Cooling = "cosine"
    alpha: float = 10.0
    annealing: Annealing = "exponential"
    skip_zero: bool = False

    def __post_init__(self) -> None:
        for name in ("max_lr", "constant_lr", "min_lr", "alpha"):
            _check_rate(name, getattr(self, name))
        if not self.min_lr <= self.constant_lr <= self.max_lr:
            raise ValueError(
                "rates must not grow from max_lr to constant_lr to min_lr; got "
                f"{self.max_lr}, {self.constant_lr}, {self.min_lr}"
            )
        _check_steps("warmup", self.warmup)
        _check_steps("cooldown", self.cooldown)
        if not self.cooldown and self.max_lr != self.constant_lr:
            raise ValueError(
                f"cooldown=0 would jump from max_lr {self.max_lr} to constant_lr "
                f"{self.constant_lr}: give it steps, or make both equal"
            )
        for name, value, known in (
            ("cooling", self.cooling, ("cosine", "inverse_sqrt")),
            ("annealing", self.annealing, ("exponential", "harmonic")),
        ):
            one_of(name, value, known)
        if (self.anneal_at is None) != (self.anneal_steps is None):
            raise ValueError(
                "anneal_at and anneal_steps belong together; got "
                f"anneal_at={self.anneal_at}, anneal_steps={self.anneal_steps}"
            )
        if self.anneal_at is not None:
            _check_steps("anneal_steps", self.anneal_steps, 1)
            _check_steps("anneal_at", self.anneal_at)
            if self.anneal_at < self.warmup:
                raise ValueError(
                    f"the anneal would start at anneal_at={self.anneal_at}, before the warm-up of "
                    f"warmup={self.warmup} steps ends"
                )

    @property
    def peak(self) -> float:
        """The largest rate."""
        return self.max_lr

    @property
    def end(self) -> int | None:
        """T, the step at which `min_lr` is reached; None while no anneal is planned."""
        if self.anneal_at is None or self.anneal_steps is None:
            return None
        return self.anneal_at + self.anneal_steps

    def annealed(self, at: int, steps: int) -> Infinite:
        """The same, annealed from step `at` over `steps`. Within the cool-down, where it may start
        too, it starts from the rate that is reached there."""
        return replace(self, anneal_at=at, anneal_steps=steps)

    def later(self) -> Infinite:
        """The schedule of a later stage, from a checkpoint that was not annealed: constant from its
        step 0, without warm-up and cool-down."""
        return replace(
            self,
            max_lr=self.constant_lr,
            warmup=0,
            cooldown=0,
            anneal_at=None,
            anneal_steps=None,
        )

    def __call__(self, n: int) -> float:
        """The rate of step n."""
        _check_step(n)
        if self.anneal_at is None or self.anneal_steps is None or n <= self.anneal_at:
            return self._steady(n)
        t = (n - self.anneal_at) / self.anneal_steps
        if t >= 1:
            return self.min_lr
        start = self._steady(self.anneal_at)
        if self.annealing == "harmonic":
            return 1 / (t / self.min_lr + (1 - t) / start)
        return float(start * (self.min_lr / start) ** t)

    def _steady(self, n: int) -> float:
        """Without an anneal."""
        if n < self.warmup:
            return self.max_lr * (max(1, n) if self.skip_zero else n) / self.warmup
        if n == self.warmup and self.cooldown:
            return self.max_lr
        if n >= self.warmup + self.cooldown:
            return self.constant_lr
        t = (n - self.warmup) / self.cooldown
        if self.cooling == "cosine":
            return _cosine(self.max_lr, self.constant_lr, t)
        part = (1 / math.sqrt(1 + self.alpha * t) - 1) / (1 / math.sqrt(1 + self.alpha) - 1)
        return self.max_lr + (self.constant_lr - self.max_lr) * part


Schedule = TypeVar("Schedule", Rewarm, Infinite)
_ANNEAL = ("anneal_at", "anneal_steps")


class ScheduleLR(LRScheduler, Generic[Schedule]):  # type: ignore[misc]
    """A schedule as a scheduler of torch: one `step()` after each step of the optimizer.

    The group with the largest rate gets the schedule's; each other one its own part of it. Its
    state is the step and the schedule, numbers and words; a resumed run has the rates of a straight
    one, bit for bit.

    Attributes:
        schedule: that is followed.
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule) -> None:
        bases = [
            float(group.get("initial_lr", group["lr"]))
            for group in getattr(optimizer, "param_groups", ())
        ]
        if bases and not max(bases) > 0:
            raise ValueError("the optimizer's groups have no positive lr to take their ratios from")
        self.schedule: Schedule = schedule
        self._plan: Schedule = schedule
        self._parts = [base / max(bases) for base in bases]
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        rate = self.schedule(max(0, self.last_epoch))
        return [rate * part for part in self._parts]

    def state_dict(self) -> dict[str, Any]:
        """The step, the rates, and the schedule."""
        return {
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "_last_lr": [float(rate) for rate in self._last_lr],
            "kind": type(self._plan).__name__,
            "plan": asdict(self._plan),
            "anneal": self._asked(),
        }

    def _asked(self) -> list[int] | None:
        """An anneal that was asked for after the plan was made."""
        return None

    def _follow(self, asked: list[int] | None) -> None:
        """Follow the plan, or the anneal that was asked for."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the step of a state, and set the optimizer's rates to those of that step.

        The state of a run that was not annealed takes an anneal back; that of an annealed one goes
        on annealing. A plan may have another anneal than the state's, as long as that is still to
        come: this is how a branch is planned from a checkpoint.

        Raises:
            ValueError: of another schedule: names what differs. Nothing is changed then.
        """
        self._check(state_dict)
        self.last_epoch = int(state_dict["last_epoch"])
        self._step_count = int(state_dict["_step_count"])
        self._follow(state_dict["anneal"])
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = self.get_lr()

    def _check(self, state: Mapping[str, Any]) -> None:
        mine = type(self._plan).__name__
        if state.get("kind") != mine:
            raise ValueError(
                f"the state is of {state.get('kind', 'another scheduler')}, not {mine}"
            )
        if len(state["_last_lr"]) != len(self._parts):
            raise ValueError(
                f"the state has {len(state['_last_lr'])} parameter groups, the optimizer "
                f"{len(self._parts)}"
            )
        saved = state["plan"]
        for field in fields(self._plan):
            name, now = field.name, getattr(self._plan, field.name)
            if name not in _ANNEAL and saved.get(name) != now:
                raise ValueError(f"{name} differs: saved {saved.get(name)!r}, now {now!r}")
        other = any(saved.get(name) != getattr(self._plan, name, None) for name in _ANNEAL)
        passed = [
            at
            for at in (saved.get("anneal_at"), getattr(self._plan, "anneal_at", None))
            if at is not None and at < int(state["last_epoch"])
        ]
        if other and passed:
            raise ValueError(
                f"anneal_at differs: saved {saved.get('anneal_at')}, now "
                f"{getattr(self._plan, 'anneal_at', None)}, and step {state['last_epoch']} of the "
                "state is past it: take a checkpoint from before the anneal"
            )


class InfiniteLR(ScheduleLR[Infinite]):
    """An infinite schedule, which can be annealed at any step."""

    def anneal(self, steps: int) -> None:
        """Anneal from here over `steps`: the rate of this step stays, that of the last is `min_lr`.

        Raises:
            ValueError: it is being annealed already, or still warms up.
        """
        at, end = self.schedule.anneal_at, self.schedule.end
        if at is not None and at <= self.last_epoch:
            raise ValueError(
                f"the anneal has begun at step {at} and ends at {end}: load a state from before it"
            )
        self.schedule = self.schedule.annealed(self.last_epoch, steps)

    def _asked(self) -> list[int] | None:
        at, steps = self.schedule.anneal_at, self.schedule.anneal_steps
        if self.schedule == self._plan or at is None or steps is None:
            return None
        return [at, steps]

    def _follow(self, asked: list[int] | None) -> None:
        self.schedule = self._plan if asked is None else self._plan.annealed(*asked)


def _largest(optimizer: Optimizer, given: float | None) -> float:
    if given is not None:
        return given
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be an optimizer of torch; got {type(optimizer).__name__}")
    return max(float(g.get("initial_lr", g["lr"])) for g in optimizer.param_groups)


def rewarm(
    optimizer: Optimizer,
    *,
    steps: int,
    warmup: int,
    min_lr: float,
    max_lr: float | None = None,
    skip_zero: bool = False,
) -> ScheduleLR[Rewarm]:
    """Re-warm and re-decay (`Rewarm`) as a scheduler.

    Args:
        optimizer: whose rates it sets.
        steps, warmup, min_lr, skip_zero: as for `Rewarm`.
        max_lr: by default the largest rate of the optimizer's groups.

    Raises:
        ValueError: as `Rewarm`.
    """
    schedule = Rewarm(
        max_lr=_largest(optimizer, max_lr),
        min_lr=min_lr,
        warmup=warmup,
        steps=steps,
        skip_zero=skip_zero,
    )
    return ScheduleLR(optimizer, schedule)


def infinite(
    optimizer: Optimizer,
    *,
    warmup: int,
    cooldown: int,
    constant_lr: float,
    min_lr: float,
    max_lr: float | None = None,
    anneal_at: int | None = None,
    anneal_steps: int | None = None,
    cooling: Cooling = "cosine",
    alpha: float = 10.0,
    annealing: Annealing = "exponential",
    skip_zero: bool = False,
) -> InfiniteLR:
    """An infinite schedule (`Infinite`) as a scheduler.

    Args:
        optimizer: whose rates it sets.
        max_lr: by default the largest rate of the optimizer's groups.

    The others are those of `Infinite`.

    Raises:
        ValueError: as `Infinite`.
    """
    schedule = Infinite(
        max_lr=_largest(optimizer, max_lr),
        constant_lr=constant_lr,
        min_lr=min_lr,
        warmup=warmup,
        cooldown=cooldown,
        anneal_at=anneal_at,
        anneal_steps=anneal_steps,
        cooling=cooling,
        alpha=alpha,
        annealing=annealing,
        skip_zero=skip_zero,
    )
    return InfiniteLR(optimizer, schedule)
