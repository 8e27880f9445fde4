"""Anneal an infinite schedule from within the Trainer of transformers.

    scheduler = infinite(optimizer, warmup=100, cooldown=900, constant_lr=1e-4, min_lr=1e-5)
    Trainer(..., optimizers=(optimizer, scheduler), callbacks=[AnnealCallback(200, at=5000)])

What it decides follows from the Trainer's own state (its step, its log), so a resumed run decides
as a straight one does, and all ranks decide alike.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from cl_fast.training.schedules import InfiniteLR

__all__ = ["AnnealCallback"]


class AnnealCallback(TrainerCallback):  # type: ignore[misc]
    """Anneal at a step, or when a metric of the evaluations no longer falls; then end the run.

    Args:
        steps: of the anneal.
        at: the step from which it anneals.
        patience: anneal when so many evaluations in a row gave no new minimum of `metric`.
        metric: its name in the log of the Trainer.
        stop: end the run when the anneal has ended.

    Raises:
        ValueError: neither or both of `at` and `patience`; when the training begins, an `at` from
            which the anneal would not end before `max_steps`; when an evaluation has no `metric`.
        TypeError: when the training begins, the Trainer has another scheduler.
    """

    def __init__(
        self,
        steps: int,
        *,
        at: int | None = None,
        patience: int | None = None,
        metric: str = "eval_loss",
        stop: bool = True,
    ) -> None:
        if (at is None) == (patience is None):
            raise ValueError(f"give one of at and patience; got at={at}, patience={patience}")
        for name, value, least in (("steps", steps, 1), ("at", at, 0), ("patience", patience, 1)):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")
        self.steps, self.at, self.patience = steps, at, patience
        self.metric, self.stop = metric, stop

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        scheduler = given.get("lr_scheduler")
        if not isinstance(scheduler, InfiniteLR):
            raise TypeError(
                "AnnealCallback needs a scheduler of cl_fast.training.schedules.infinite, in the "
                f"Trainer's optimizers; got {type(scheduler).__name__}"
            )
        if self.at is not None and self.at + self.steps > state.max_steps:
            raise ValueError(
                f"the anneal would end at step {self.at + self.steps}, the training ends at "
                f"{state.max_steps}"
            )
        if self.at is not None and scheduler.schedule.anneal_at is None:
            if state.global_step > self.at:
                raise ValueError(
                    f"the checkpoint of step {state.global_step} is past at={self.at} and was not "
                    "annealed there"
                )
            self._begin(scheduler, state)

    def _begin(self, scheduler: InfiniteLR, state: Any) -> None:
        if state.global_step == self.at and scheduler.schedule.anneal_at is None:
            scheduler.anneal(self.steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        scheduler = given["lr_scheduler"]
        self._begin(scheduler, state)
        end = scheduler.schedule.end
        if self.stop and end is not None and scheduler.last_epoch >= end:
            control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        scheduler = given.get("lr_scheduler")
        if self.patience is None or scheduler is None or scheduler.schedule.anneal_at is not None:
            return
        values = [log[self.metric] for log in state.log_history if self.metric in log]
        if not values:
            raise ValueError(f"the evaluation gave no {self.metric!r}: give metric another name")
        lowest = min(range(len(values)), key=values.__getitem__)
        if len(values) - 1 - lowest >= self.patience:
            scheduler.anneal(self.steps)
