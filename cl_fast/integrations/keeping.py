"""Keeps in the Trainer of transformers and in those that derive from it (TRL's).

    KeepMixin      all of a keep: class MyTrainer(KeepMixin, SFTTrainer); MyTrainer(..., keep=[...])
    KeepCallback   all but its loss and data: Trainer(..., callbacks=[KeepCallback(Project(...))])

The hooks are called where the Trainer has its own: gradients are complete and clipped when
`on_gradients` may add to them; weights are new when `on_update` sees them. A callback cannot add to
the loss: a keep that has a loss is refused by `KeepCallback`.

A checkpoint of the Trainer gets `keeps.json`, a list of its files, and `keeps.pt` (and
`keeps-1.pt`, ... of other ranks), written when the checkpoint is whole;
`train(resume_from_checkpoint=...)` reads it again: from the folder that is given (`KeepMixin`), or
from `output_dir` (`KeepCallback`, which is not told another one). DeepSpeed steps out of sight of
callbacks; it is refused.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from cl_fast.errors import CheckpointError
from cl_fast.models.heads import unwrap
from cl_fast.training.keeping import Keep, Task

__all__ = [
    "STATE",
    "KeepCallback",
    "KeepMixin",
    "is_whole",
    "listed",
    "load_states",
    "save_states",
    "trained_columns",
]

STATE = "keeps.pt"
"""The file of the keeps' states in a checkpoint of the Trainer."""

_FILES = "keeps.json"
"""The file that lists what else a checkpoint has."""


def listed(keep: Keep | Iterable[Keep]) -> list[Keep]:
    """One keep or several, checked, as a list."""
    if isinstance(keep, type | str) or not isinstance(keep, Keep | Iterable):
        hint = ": make an object of it" if isinstance(keep, type) else ""
        raise TypeError(f"keep must be a Keep, or several; got {keep!r}{hint}")
    keeps = [keep] if isinstance(keep, Keep) else list(keep)
    given: list[Any] = [*keeps]
    for i, one in enumerate(given):
        if not isinstance(one, Keep):
            hint = ": make an object of it" if isinstance(one, type) else ""
            raise TypeError(f"keep[{i}] must be a Keep; got {one!r}{hint}")
    return keeps


class KeepCallback(TrainerCallback):  # type: ignore[misc]
    """Keeps as a callback of the Trainer.

    Give it to the Trainer's constructor, so that it sees the model before a checkpoint is loaded.

    Args:
        keep: one keep, or several; their hooks are called in this order.
        name: of the task.
        index: of the task.

    Raises:
        TypeError: not a keep.
        ValueError: a keep has a loss or changes the data, which a callback cannot: use `KeepMixin`.
    """

    def __init__(self, keep: Keep | Iterable[Keep], *, name: str = "task", index: int = 0) -> None:
        self._setup(listed(keep), Task(name, index))
        for one in self.keeps:
            for hook in ("loss", "data"):
                if getattr(type(one), hook) is not getattr(Keep, hook):
                    raise ValueError(
                        f"{type(one).__name__} has a hook `{hook}`, which a callback cannot serve: "
                        "derive your trainer from KeepMixin"
                    )

    def _setup(self, keeps: list[Keep], task: Task) -> None:
        self.keeps, self.task = keeps, task
        self.begun = False
        self.alone = True  # else the mixin logs
        self.checkpoint: Path | None = None  # from which it is resumed, where a host tells

    @classmethod
    def of_mixin(cls, keeps: list[Keep], task: Task, batches: Any) -> KeepCallback:
        made = cls.__new__(cls)
        made._setup(keeps, task if task.batches else replace(task, batches=batches))
        made.alone = False
        return made

    # What the Trainer calls, in order.

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if getattr(args, "deepspeed", None) is not None:
            raise ValueError("keeps cannot be used under DeepSpeed, which steps out of their sight")
        self._begin(given["model"])

    def _begin(self, model: nn.Module) -> None:
        if not self.begun:
            self.begun = True
            for keep in self.keeps:
                keep.before_task(unwrap(model), self.task)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if not self.begun and state.global_step:
            raise ValueError(
                "a run cannot be resumed with a KeepCallback that was added later: give it to the "
                "Trainer's constructor"
            )
        self._begin(given["model"])
        if state.global_step:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            load_states(self.keeps, self.checkpoint or folder)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        for keep in self.keeps:
            keep.on_gradients(unwrap(given["model"]))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        for keep in self.keeps:
            keep.on_update(unwrap(given["model"]))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs is not None and "loss" in logs and self.alone:
            found = measured(self.keeps)
            logs.update(found)  # for the callbacks after this one
            if state.log_history:
                state.log_history[-1].update(found)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            _list_files(folder)
        save_states(self.keeps, folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        model, loader = given["model"], given.get("train_dataloader")
        task = self.task
        if task.batches is None and loader is not None:
            task = replace(task, batches=lambda: _batches(loader, args.device))
        for keep in self.keeps:
            keep.after_task(unwrap(model), task)
        self.begun = False


def measured(keeps: Iterable[Keep]) -> dict[str, float]:
    """What all of them measure."""
    return {name: value for keep in keeps for name, value in keep.measures().items()}


def _batches(loader: Any, device: torch.device) -> Iterator[Mapping[str, Any]]:
    for batch in loader:
        yield {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _state_file(folder: Path) -> Path:
    """Of this rank: under FSDP a state may hold the rows of its rank only."""
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return folder / (f"keeps-{rank}.pt" if rank else STATE)


def save_states(keeps: Sequence[Keep], folder: Path) -> None:
    """The states of `keeps` into a checkpoint; whole or not at all."""
    path = _state_file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    states = [
        {
            "keep": type(keep).__name__,
            "options": json.dumps(keep.options(), sort_keys=True, default=str),
            "state": keep.state_dict(),
        }
        for keep in keeps
    ]
    torch.save(states, part)
    part.replace(path)


def _list_files(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{_FILES}.part"
    names = [path.name for path in folder.iterdir() if path.suffix != ".part"]
    part.write_text(json.dumps(sorted(names)), encoding="utf-8")
    part.replace(folder / _FILES)


def is_whole(checkpoint: Path, ranks: int = 1) -> bool:
    """Whether a checkpoint was saved to its end, by all ranks, and nothing of it is gone since.

    The Trainer deletes old ones file by file; what a kill leaves of that must not be taken up.
    """
    files = checkpoint / _FILES
    states = [STATE, *(f"keeps-{rank}.pt" for rank in range(1, ranks))]
    if not files.is_file() or not all((checkpoint / name).is_file() for name in states):
        return False
    return all((checkpoint / name).exists() for name in json.loads(files.read_text("utf-8")))


def load_states(keeps: Sequence[Keep], folder: Path) -> None:
    """What `save_states` wrote.

    Raises:
        CheckpointError: there is nothing, or it is of other keeps, or of keeps with other options.
    """
    path = _state_file(folder)
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {path.name}: it was saved without these keeps, or the save was cut "
            "off. Resume from another checkpoint"
        )
    states = torch.load(path, map_location="cpu", weights_only=True)
    saved, mine = [s["keep"] for s in states], [type(keep).__name__ for keep in keeps]
    if saved != mine:
        raise CheckpointError(f"{path} is of the keeps {saved}, not {mine}: give the same ones")
    for keep, state in zip(keeps, states, strict=True):
        before = json.loads(state["options"])
        now = json.loads(json.dumps(keep.options(), default=str))
        for key in dict.fromkeys([*now, *before]):
            if now.get(key) != before.get(key):
                raise CheckpointError(
                    f"{path} is of {type(keep).__name__} with {key}={before.get(key)!r}; now it is "
                    f"{now.get(key)!r}: give what it was given"
                )
    for keep, state in zip(keeps, states, strict=True):
        keep.load_state_dict(state["state"])


def trained_columns(host: Any, dataset: Any) -> Any:
    """A `datasets.Dataset` without the columns that the Trainer would not give to its model."""
    if not (hasattr(dataset, "select_columns") and host.args.remove_unused_columns):
        return dataset
    host._set_signature_columns_if_needed()
    used = [name for name in dataset.column_names if name in host._signature_columns]
    return dataset.select_columns(used) if used else dataset


class KeepMixin:
    """A Trainer that keeps: before the Trainer's class in a subclass.

        class Keeping(KeepMixin, SFTTrainer): ...
        Keeping(model, args, train_dataset=data, keep=[SelfDistill(...), Orthogonal()]).train()

    The losses of keeps are means over their micro-batches; they are averaged over micro-batches
    and ranks, whatever the host does with its own. They are left out of evaluation.

    Args:
        keep: one keep, or several.
        task: which task of a stream this is; by default the only one. With `past` tasks, a keep's
            `data` is asked what to train on.
        past: the tasks before it.

    Attributes:
        task_dataset: the task's own training data, as the host prepared it.
    """

    def __init__(
        self,
        *args: Any,
        keep: Keep | Iterable[Keep] = (),
        task: Task | None = None,
        past: Sequence[Task] = (),
        **kwargs: Any,
    ) -> None:
        self.keeps = listed(keep)
        if task is not None and not isinstance(task, Task):
            raise TypeError(f"task must be a Task; got {task!r}: Task(name, index)")
        asks = [one for one in self.keeps if type(one).data is not Keep.data]
        if asks and task is not None and task.index > 0 and not past:
            raise ValueError(
                f"{type(asks[0]).__name__} needs past=[Task(name, index, train), ...]: the tasks "
                f"before task {task.index}, with the task_dataset of their trainers as train"
            )
        self.keep_callback = KeepCallback.of_mixin(self.keeps, task or Task("task"), self._batches)
        kwargs["callbacks"] = [*(kwargs.get("callbacks") or ()), self.keep_callback]
        super().__init__(*args, **kwargs)
        host: Any = self
        if any(getattr(one, "trained_columns_only", False) for one in self.keeps):
            host.train_dataset = trained_columns(host, host.train_dataset)
        self.task_dataset = host.train_dataset
        for one in self.keeps if host.train_dataset is not None else ():
            host.train_dataset = one.data(host.train_dataset, past)
        if getattr(host.train_dataset, "in_order", False):
            # A mixture has its order already: shuffled, its prefixes would lose their ratio.
            host.args = copy.copy(host.args)
            host.args.train_sampling_strategy = "sequential"

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = {**logs, **measured(self.keeps)}
        host: Any = super()
        host.log(logs, *args, **kwargs)

    def _batches(self) -> Iterator[Mapping[str, Any]]:
        # A new loader: the order must not depend on how far the last one was read.
        host: Any = self
        return _batches(host.get_train_dataloader(), host.args.device)

    def finish_from(self, checkpoint: Path) -> None:
        """What `train` does after its last step, from a checkpoint of that step.

        `train(resume_from_checkpoint=...)` would make one step more.
        """
        from transformers import TrainerState

        host: Any = self
        host.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        host._load_from_checkpoint(str(checkpoint))
        if host.args.load_best_model_at_end and host.state.best_model_checkpoint is not None:
            host._load_best_model()
        load_states(self.keeps, checkpoint)
        self.keep_callback.on_train_end(host.args, host.state, host.control, model=host.model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        self.keep_callback.checkpoint = Path(resume_from_checkpoint)  # perhaps of another run
        host: Any = super()
        host._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        host: Any = super()
        trains = model.training
        # The host may take labels out of its inputs.
        given = dict(inputs) if trains else inputs
        result = host.compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if not trains:
            return result
        terms = [x for keep in self.keeps if (x := keep.loss(model, given)) is not None]
        if not terms:
            return result
        extra: Any = sum(terms)
        if self._host_divides_itself(num_items_in_batch):
            extra = extra / self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        if return_outputs:
            return result[0] + extra, result[1]
        return result + extra

    def _host_divides_itself(self, num_items: Tensor | int | None) -> bool:
        """Whether the Trainer leaves the loss as it is when it accumulates (see training_step)."""
        host: Any = self
        told = getattr(host, "loss_is_scaled_for_ga", None)
        if told is not None:
            return bool(told)
        normalised = host.model_accepts_loss_kwargs and num_items is not None
        return normalised or host.compute_loss_func is not None
