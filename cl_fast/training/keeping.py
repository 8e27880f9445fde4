"""What keeps a model from forgetting, as one object with hooks around a task's training.

    keep.before_task(model, task)
    for every batch:
        loss = host's loss + keep.loss(model, inputs)      for each micro-batch
        loss.backward()
        keep.on_gradients(model)                           once per step: complete, clipped
        optimizer.step()
        keep.on_update(model)                              once per step: the weights are new
    keep.after_task(model, task)

A keep knows nothing of the trainer that calls it. In the Trainer of transformers and in those of
TRL it is driven by `cl_fast.integrations.keeping`, over several tasks by `cl_fast.learn`, and in a
loop of your own by the lines above.

What is added to gradients in `on_gradients`, or taken off weights in `on_update`, happens once per
step of the optimizer, so it does not depend on the number of accumulated micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

__all__ = ["Dataset", "Keep", "Task", "needs"]


class Dataset(Sized, Protocol):
    """A map-style dataset."""

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Task:
    """One task of a stream, as a keep sees it.

    Attributes:
        name: of the task, unique in the stream.
        index: its place, from 0.
        train: its own training examples, without those of earlier tasks; None where a host does
            not tell.
        batches: makes the batches that the host trains on, collated and on the model's device, in
            an order of their own; each call begins anew. None where a host does not tell.
    """

    name: str
    index: int = 0
    train: Dataset | None = None
    batches: Callable[[], Iterable[Mapping[str, Any]]] | None = None


class Keep:
    """The base of all keeps: hooks that do nothing. Override those that you need.

    `model` is the module that the host calls: in `loss` it may be wrapped by DDP or FSDP (see
    `cl_fast.models.heads.run_inside`); elsewhere it is unwrapped, and its parameters may be
    DTensors (`cl_fast.models.sharding`).
    """

    def before_task(self, model: nn.Module, task: Task) -> None:
        """Before the first step of a task, also when its training is resumed: then `model` has the
        weights of the task's start, and `load_state_dict` follows."""

    def restore(self, model: nn.Module, past: Sequence[Task]) -> None:
        """When a stream is resumed at a later task: give `model` the modules that `before_task`
        and `after_task` had added for the `past` ones. Their weights and `load_state_dict` follow,
        then `before_task` of the task to come."""

    def data(self, new: Dataset, past: Sequence[Task]) -> Dataset:
        """What to train on instead of `new`, given the earlier tasks."""
        return new

    def loss(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
        """What to add to the host's loss of a micro-batch: a mean over the micro-batch, which is
        then averaged over micro-batches and ranks; None for nothing."""
        return None

    def on_gradients(self, model: nn.Module) -> None:
        """After the last backward pass (and clipping), before the optimizer's step."""

    def on_update(self, model: nn.Module) -> None:
        """After the optimizer's step."""

    def after_task(self, model: nn.Module, task: Task) -> None:
        """After the last step of a task."""

    def scoring(self, model: nn.Module, name: str) -> AbstractContextManager[Any]:
        """The model as it is to be scored on the task `name`, or on a probe of that name, while
        this lasts; nothing by default."""
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """What changes over time, also within a task: nested dicts and lists of tensors, numbers
        and strings, as `torch.load(weights_only=True)` reads them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state; got {sorted(state)}")

    def options(self) -> dict[str, Any]:
        """What it was made with, in JSON's types: a run is resumed with equal options only."""
        return {}

    def measures(self) -> dict[str, float]:
        """What to log of the last step. May wait for the device."""
        return {}


def needs(task: Task, name: str, what: str) -> Any:
    """`task.train` or `task.batches`.

    Raises:
        ValueError: the host did not tell it.
    """
    value = getattr(task, name)
    if value is None:
        raise ValueError(f"{what} needs {name} of the task, which its caller did not give")
    return value
