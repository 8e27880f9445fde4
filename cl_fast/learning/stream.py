"""`learn`: a stream of tasks in, a model and its transfer matrix out.

    report = learn(model, {"a": (train_a, eval_a), "b": (train_b, eval_b)}, out="runs/x",
                   args=TrainingArguments(...), trainer=SFTTrainer, keep=[Replay(0.05)])

The trainer that you have trains, one task after the other; keeps are called where it lets them. All
that is added: scores before and after each task, a folder from which the same call goes on after a
kill, and a merge at the end. With the same arguments, seeds and number of processes a run that was
killed gives the bits of one that was not, on a CPU.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import math
import os
import shutil
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cl_fast.errors import CheckpointError
from cl_fast.integrations.keeping import (
    KeepMixin,
    is_whole,
    listed,
    load_states,
    save_states,
    trained_columns,
)
from cl_fast.learning.ledger import (
    Ledger,
    content_hash,
    digests,
    load_tensors,
    named,
    save_tensors,
)
from cl_fast.learning.merges import Merge, check_merge, merge_tasks
from cl_fast.learning.report import Report
from cl_fast.models.bases import adapters_off
from cl_fast.models.heads import Evaluating, unwrap
from cl_fast.training.adapters import AdapterPerTask
from cl_fast.training.keeping import Keep, Task
from cl_fast.training.lora_tasks import LoraTasks
from cl_fast.training.metrics import TransferMatrix
from cl_fast.training.mixing import mix
from cl_fast.training.orthogonal import Orthogonal
from cl_fast.training.replay import Replay

__all__ = ["learn"]

_REFERENCE = "ref"
"""What DPOTrainer calls the copy of the adapter that it compares with."""

Score: TypeAlias = Callable[[nn.Module, Any, str], float]
Schedule: TypeAlias = Callable[[torch.optim.Optimizer, int, Task], Any]

# Of TrainingArguments: where a run is, and what it shows; nothing of what it computes.
FREE = (
    "output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "log_level",
    "log_level_replica", "logging_strategy", "logging_steps", "logging_first_step",
    "save_total_limit", "save_steps", "save_strategy", "eval_on_start", "push_to_hub", "hub_token",
    "local_rank", "resume_from_checkpoint", "project", "trackio_space_id", "do_train", "do_eval",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "push_to_hub_token", "hub_model_id", "logging_nan_inf_filter",
)  # fmt: skip


def learn(
    model: nn.Module | Callable[[], nn.Module],
    tasks: Mapping[str, tuple[Any, Any]],
    *,
    args: Any,
    out: str | os.PathLike[str],
    keep: Keep | Iterable[Keep] = (),
    trainer: type[Any] | None = None,
    score: Score | None = None,
    probes: Mapping[str, Any] | None = None,
    score_every: Literal["task", "end"] = "task",
    start: Literal["previous", "base"] = "previous",
    schedule: Schedule | None = None,
    merge: Merge | None = None,
    merge_options: Mapping[str, Any] | None = None,
    **trainer_options: Any,
) -> Report:
    """Trains a model on a stream of tasks, and keeps the transfer matrix.

    Call it again with the same arguments to go on with a run that was cut off: finished tasks are
    not trained again, an unfinished one goes on from the Trainer's last checkpoint (save_strategy
    and save_steps of `args` say how often there is one).

    Args:
        model: what is trained, in place; or a function that makes it, always the same. Under FSDP
            a function is needed, since a sharded model cannot be given to the next Trainer.
        tasks: for each name the training and the evaluation data, in the order of training. What
            the trainer takes as train_dataset and eval_dataset.
        args: its TrainingArguments, or a mapping from each task's name to them. output_dir is set
            to a folder within `out`.
        out: the folder of the run, with report.json, report.md, report.png, a folder for each task,
            and the final model in `model` (`merged`: after a merge).
        keep: see `cl_fast.training`; the hooks are called in this order.
        trainer: Trainer of transformers (the default), or a class derived from it, as TRL's.
        score: score(model, evaluation data, name) -> number, higher is better, called without
            grad in eval mode, on all ranks; the default is the negative loss that the trainer
            evaluates.
        probes: evaluation data of what is never trained on: abilities that should be kept.
        score_every: "task" evaluates all tasks after each task, T^2 evaluations; "end" only the
            task that was just learned, and all of them at the end.
        start: each task starts from the model after the "previous" one, or from the "base", so
            that independent models come out, to be merged.
        schedule: schedule(optimizer, steps, task) makes the learning-rate scheduler of a task; the
            default is what `args` say, anew for each task.
        merge: how the models after the tasks are merged at the end: "linear", "task_arithmetic",
            "ties", "dare_linear", "dare_ties" (on their differences from the base), "greedy" (a
            soup that maximises the mean score), or function(base, {task: state dict}) -> state
            dict. Adapters of PEFT are multiplied out for it.
        merge_options: of the method, as density=0.2 or weight=[...].
        trainer_options: handed to the trainer, as processing_class or data_collator. Where a run
            is resumed, they, `score` and `schedule` are compared by their names; callbacks may
            differ.

    Returns:
        The report; `report.model` is the model that came out.

    Raises:
        CheckpointError: `out` holds a run with other tasks, arguments, keeps or another model; the
            key that differs is named.
        OutputError: `out` holds something else, or cannot be written.
        TypeError, ValueError: an argument is wrong. All of these come before any training.
    """
    stream = _Stream(
        model, tasks, args, Path(out), listed(keep), trainer, score, dict(probes or {}),
        score_every, start, schedule, merge, dict(merge_options or {}), trainer_options,
    )  # fmt: skip
    return stream.run()


class _Stream:
    """One call of `learn`."""

    def __init__(
        self,
        model: Any,
        tasks: Any,
        args: Any,
        out: Path,
        keeps: list[Keep],
        trainer: type[Any] | None,
        score: Score | None,
        probes: dict[str, Any],
        score_every: str,
        start: str,
        schedule: Schedule | None,
        merge: Merge | None,
        merge_options: dict[str, Any],
        trainer_options: dict[str, Any],
    ) -> None:
        if trainer is None:
            from transformers import Trainer

            trainer = Trainer
        if not isinstance(trainer, type):
            raise TypeError(f"trainer must be a Trainer's class; got {trainer!r}")
        self.data = _check_tasks(tasks, probes, score)
        self.names, self.probes = list(self.data), probes
        self.args = _check_args(args, self.names)
        self.args_of_tasks = isinstance(args, Mapping)
        if score_every not in ("task", "end"):
            raise ValueError(f"score_every must be 'task' or 'end'; got {score_every!r}")
        if start not in ("previous", "base"):
            raise ValueError(f"start must be 'previous' or 'base'; got {start!r}")
        check_merge(merge, merge_options)
        for name in (
            "train_dataset",
            "eval_dataset",
            "args",
            "model",
            "task",
            "past",
            "optimizers",
        ):
            if name in trainer_options:
                raise ValueError(f"{name} is given to the trainer by learn; leave it out")
        if trainer_options.get("peft_config") is not None:
            raise ValueError(
                "peft_config would make new adapters in each trainer, task after task: give learn "
                "the model with its adapters, peft.get_peft_model(model, peft_config)"
            )
        self.make = None if isinstance(model, nn.Module) else model
        if self.make is not None and not callable(self.make):
            raise TypeError(f"model must be a module or a function; got {type(model).__name__}")
        self.model: Any = model if self.make is None else self.make()
        if self.make is None and self._sharded():
            raise ValueError(
                "under FSDP learn needs a function that makes the model: a model that one Trainer "
                "has sharded cannot be given to the next. Give model=lambda: from_pretrained(...)"
            )
        self.keeps, self.score, self.start = keeps, score, start
        self.score_every, self.schedule = score_every, schedule
        self.merge, self.merge_options = merge, merge_options
        self.options = trainer_options
        _check_keeps(self.keeps, self.data, trainer)
        self.trainer_class = _kept(trainer)
        self.base = digests(unwrap(self.model).state_dict())
        self.ledger = Ledger(out, self._identity(trainer))
        self.own: dict[str, Any] = {}  # training data of tasks, as their trainers prepared them
        self.forwards: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
        self.foreign = _REFERENCE not in getattr(unwrap(self.model), "peft_config", ())
        self.bar: Any = None

    # --- what the run is made of ---------------------------------------------------------------

    def _sharded(self) -> bool:
        args = next(iter(self.args.values()))
        return bool(getattr(args, "fsdp", None)) or (
            os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        )

    def _identity(self, trainer: type[Any]) -> dict[str, Any]:
        weights = content_hash(sorted(self.base.items()), every=True)
        identity: dict[str, Any] = {"model": weights, "tasks": self.names}
        for name, (train, evaluation) in self.data.items():
            identity[f"tasks.{name}.train"] = content_hash(train)
            identity[f"tasks.{name}.evaluation"] = content_hash(evaluation)
        for name, probe in self.probes.items():
            identity[f"probes.{name}"] = content_hash(probe)
        for name, args in self.args.items():
            prefix = f"args.{name}" if self.args_of_tasks else "args"
            for key, value in args.to_dict().items():
                if key not in FREE:
                    identity[f"{prefix}.{key}"] = value
            identity[f"{prefix}.world_size"] = args.world_size
        for i, one in enumerate(self.keeps):
            identity[f"keep[{i}]"] = type(one).__name__
            identity |= {f"keep[{i}].{k}": value for k, value in one.options().items()}
        identity["trainer"] = f"{trainer.__module__}.{trainer.__qualname__}"
        identity["start"], identity["score_every"] = self.start, self.score_every
        # Of functions and objects the names: what they do is not known.
        identity["score"], identity["schedule"] = named(self.score), named(self.schedule)
        for key, value in self.options.items():
            if key != "callbacks":
                identity[f"trainer.{key}"] = named(value)
        return identity

    def _task(self, index: int) -> Task:
        name = self.names[index]
        return Task(name, index, self.own.get(name))

    def _folder(self, index: int) -> Path:
        return self.ledger.folder(index, self.names[index])

    # --- the run -------------------------------------------------------------------------------

    def run(self) -> Report:
        resumed = self.ledger.read()
        self._together()  # before the first rank makes a folder there
        if not resumed and self._first_args().process_index == 0:
            self.ledger.write()  # before anything else, so that the folder is known as ours
        if self.merge is None:
            self.ledger.merged = {}  # of an earlier call, perhaps of fewer tasks
        done = len(self.ledger.trained)
        self.bar = tqdm(
            total=len(self.names), initial=done, desc="tasks", unit="task",
            disable=self._first_args().disable_tqdm or not self._first_args().should_log,
        )  # fmt: skip
        try:
            if done and self.names[done - 1] not in self.ledger.scores:
                self._take_up_unscored(done)
            elif done:
                self._take_up(done)
            if done < len(self.names):
                self._check_replay()
            for index in range(done, len(self.names)):
                self._learn_one(index)
                self.bar.update()
            return self._finish()
        finally:
            self.bar.close()

    def _together(self) -> None:
        if self._first_args().world_size > 1:
            self._first_args().distributed_state.wait_for_everyone()

    def _first_args(self) -> Any:
        return self.args[self.names[0]]

    def _take_up(self, done: int) -> None:
        """The model and the keeps as they were after `done` tasks."""
        base = self.ledger.out / "base.safetensors"
        if self.merge is not None and not base.exists() and self._first_args().process_index == 0:
            # It ran without a merge before.
            save_tensors(self._own_tensors(unwrap(self.model).state_dict()), base)
        past = [self._task(i) for i in range(done)]
        for one in self.keeps:
            one.restore(unwrap(self.model), past)
        last = self._folder(done - 1)
        self._load(last / "state.safetensors")
        load_states(self.keeps, last)

    def _take_up_unscored(self, done: int) -> None:
        """The same where a kill came between a task's training and its scores, which are made now.

        The trainer that scores begins with the model of the task's start, as the other one did:
        DPOTrainer makes its reference log-probs of the model that it is given.
        """
        index, model = done - 1, unwrap(self.model)
        if index and self.start == "previous":
            earlier = load_tensors(self._folder(index - 1) / "state.safetensors")
            base = {n: x.clone() for n, x in model.state_dict().items() if n in earlier}
            self._take_up(index)
            host = self._trainer(index, self.model, trains=False)
            model.load_state_dict(base, strict=False)  # a later state tells what differs from it
        else:
            host = self._trainer(index, self.model, trains=False)
        self._take_up(done)
        self._phase(f"{self.names[index]}: scores after")
        self._record(self.names[index], self._scores(host, self._to_score(index)), host)

    def _load(self, path: Path) -> None:
        tensors = load_tensors(path)
        wrong = unwrap(self.model).load_state_dict(tensors, strict=False).unexpected_keys
        if wrong:
            raise CheckpointError(f"{path} has the tensor {wrong[0]!r}, which the model lacks")

    def _trainer(self, index: int, model: nn.Module, *, trains: bool = True) -> Any:
        """A trainer of a task; without `trains`, one that only evaluates or prepares data."""
        name, task = self.names[index], self._task(index)
        self._unpatch(model)
        args = copy.deepcopy(self.args[name])
        args.output_dir = str(self._folder(index) / "checkpoints")
        evaluation = None
        if self.score is None:
            evaluation = {n: e for n, (_, e) in self.data.items()} | self.probes
        keeping: dict[str, Any] = {}
        if trains:
            keeping = {
                "keep": self.keeps,
                "task": task,
                "past": [self._task(i) for i in range(index)],
            }
        host = self.trainer_class(
            model=model,
            args=args,
            train_dataset=self.data[name][0],
            eval_dataset=evaluation,
            **keeping,
            **self.options,
        )
        host.stream_schedule = self.schedule and (
            lambda optimizer, steps: self.schedule(optimizer, steps, task)  # type: ignore[misc]
        )
        replays = any(getattr(one, "trained_columns_only", False) for one in self.keeps)
        mine = host.task_dataset
        self.own[name] = trained_columns(host, mine) if replays else mine
        return host

    def _unpatch(self, model: Any) -> None:
        """Takes off what a trainer has left on the model, before it is given to the next one.

        A forward (TRL's, accelerate's): they would pile up, and a copy of the model would run the
        forward of the original. accelerate's mark that the model is prepared: after an evaluation
        it would be trained without DDP, each rank on its own, in silence.
        """
        inner = unwrap(model)
        base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
        if self.foreign and _REFERENCE in getattr(inner, "peft_config", ()):
            inner.delete_adapter(_REFERENCE)
        for module in {inner, base}:
            for mark in ("_is_accelerate_prepared", "_original_forward"):
                module.__dict__.pop(mark, None)
            own = self.forwards.setdefault(module, module.__dict__.get("forward"))
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own

    def _check_replay(self) -> None:
        """All data as the trainer prepares them, and whether they can be mixed, before training."""
        replays = [one for one in self.keeps if isinstance(one, Replay) and one.ratio]
        for one in replays:
            for i, task in enumerate(one.old):
                host = self.trainer_class(
                    model=self.model, args=self._quiet_args(), train_dataset=task.train,
                    **self.options,
                )  # fmt: skip
                one.old[i] = replace(task, train=trained_columns(host, host.train_dataset))
        if not replays:
            return
        for i, name in enumerate(self.names):
            if name not in self.own:
                self._trainer(i, self.model, trains=False)
            past = [self._task(j) for j in range(i)]
            for one in replays:
                try:
                    one.data(self.own[name], past)
                except ValueError as error:
                    raise ValueError(f"tasks[{name!r}] with Replay: {error}") from error

    def _quiet_args(self) -> Any:
        self._unpatch(self.model)
        args = copy.deepcopy(self._first_args())
        args.output_dir = str(self._folder(0) / "checkpoints")
        return args

    def _prepare_past(self, index: int) -> None:
        """The data of earlier tasks as their trainers prepare it, for keeps that ask for it."""
        if any(type(one).data is not Keep.data for one in self.keeps):
            for i in range(index):
                if self.names[i] not in self.own:
                    self._trainer(i, self.model, trains=False)

    def _learn_one(self, index: int) -> None:
        from transformers import set_seed

        name, folder = self.names[index], self._folder(index)
        self._prepare_past(index)
        if index == 0 and "before" not in self.ledger.scores:
            self._phase(f"{name}: scores before")
            evaluated = self.make() if self.make is not None and self._sharded() else self.model
            host = self._trainer(index, evaluated, trains=False)
            self._record("before", self._scores(host, [*self.data, *self.probes]), host)
        elif index and self.make is not None and self._sharded():
            self.model = self.make()
            self._take_up(index)
        if index and self.start == "base":
            self._back_to_base()
        host = self._trainer(index, self.model)
        self._phase(f"{name}: training")
        checkpoint = _last_checkpoint(
            folder / "checkpoints", host.args.world_size, finished=not self._sharded()
        )
        began = time.monotonic()
        set_seed(host.args.seed)
        if checkpoint is not None and _is_finished(checkpoint):
            host.finish_from(checkpoint)
        else:
            host.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        took = time.monotonic() - began
        state = self._changed(host)
        save_states(self.keeps, folder)
        host.accelerator.wait_for_everyone()
        if host.is_world_process_zero():
            save_tensors(state, folder / "state.safetensors")
            if self.merge is not None and hasattr(unwrap(self.model), "merge_and_unload"):
                save_tensors(_multiplied_out(self.model), folder / "merged.safetensors")
            self.ledger.trained.append(name)
            self.ledger.seconds[name] = self.ledger.seconds.get(name, 0.0) + took
            self.ledger.write()
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        else:
            self.ledger.trained.append(name)
        host.accelerator.wait_for_everyone()
        self._phase(f"{name}: scores after")
        self._record(name, self._scores(host, self._to_score(index)), host)

    def _to_score(self, index: int) -> list[str]:
        last = index == len(self.names) - 1
        if self.score_every == "task" or last:
            return [*self.data, *self.probes]
        return [self.names[index]]

    def _phase(self, words: str) -> None:
        self.bar.set_postfix_str(words)

    def _back_to_base(self) -> None:
        self._load(self.ledger.out / "base.safetensors")

    def _own_tensors(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Without DPOTrainer's copy of the adapter, its reference, which each task makes anew."""
        return {
            n: x
            for n, x in state.items()
            if isinstance(x, Tensor) and not (self.foreign and f".{_REFERENCE}." in n)
        }

    def _changed(self, host: Any) -> dict[str, Tensor]:
        """The tensors of the model that differ from those of the start; on the first rank."""
        if self._sharded():
            state = host.accelerator.get_state_dict(host.model_wrapped) or {}
        else:
            state = unwrap(host.model).state_dict()
        tensors = self._own_tensors(state)
        now = digests(tensors)
        return {n: x for n, x in tensors.items() if self.base.get(n) != now[n]}

    # --- scores --------------------------------------------------------------------------------

    def _scores(self, host: Any, names: Sequence[str]) -> dict[str, float]:
        found = {}
        for name in names:
            evaluation = self.data[name][1] if name in self.data else self.probes[name]
            model = host.model
            with contextlib.ExitStack() as stack:
                for one in self.keeps:
                    stack.enter_context(one.scoring(unwrap(model), name))
                if self.score is None:
                    prefix = f"eval_{name}"
                    # By name: the trainer has prepared them.
                    metrics = host.evaluate(name, metric_key_prefix=prefix)
                    found[name] = -float(metrics[f"{prefix}_loss"])
                    continue
                stack.enter_context(torch.no_grad())
                stack.enter_context(Evaluating(model))
                value: Any = self.score(model, evaluation, name)
            try:
                found[name] = float(value)
            except (TypeError, ValueError):
                raise TypeError(
                    f"score must return a number for {name!r}; got {type(value).__name__}"
                ) from None
        return found

    def _record(self, where: str, scores: Mapping[str, float], host: Any) -> None:
        plain = {k: None if math.isnan(x) else x for k, x in scores.items()}
        self.ledger.scores[where] = plain
        if host.is_world_process_zero():
            if where == "before" and (self.start == "base" or self.merge is not None):
                path = self.ledger.out / "base.safetensors"
                save_tensors(self._own_tensors(unwrap(self.model).state_dict()), path)
            self.ledger.write()
            self._report().save(self.ledger.out, picture=False)
        host.accelerator.wait_for_everyone()

    def _report(self) -> Report:
        scores = self.ledger.scores

        def number(where: str, name: str) -> float:
            value = scores.get(where, {}).get(name)
            return math.nan if value is None else value

        matrix = TransferMatrix(self.names, [number("before", n) for n in self.names])
        for name in self.ledger.trained:
            if name in scores:
                matrix.add({n: number(name, n) for n in self.names})
        probes = {p: {where: number(where, p) for where in scores} for p in self.probes}
        metric = "negative loss" if self.score is None else getattr(self.score, "__name__", "score")
        merged = {
            k: math.nan if x is None else x for k, x in self.ledger.merged.get("scores", {}).items()
        }
        words = str(self.ledger.merged.get("words", ""))
        return Report(
            matrix, metric, probes, dict(self.ledger.seconds), merged, words,
            self.start == "previous", self.model,
        )  # fmt: skip

    # --- the end -------------------------------------------------------------------------------

    def _finish(self) -> Report:
        last = len(self.names) - 1
        if self._sharded() and self.make is not None:
            self.model = self.make()
            self._take_up(len(self.names))
        host = self._trainer(last, self.model, trains=False)
        self._leave(host)
        if self.merge is not None:
            self._merge(host)
        report = self._report()
        if host.is_world_process_zero():
            drawn = importlib.util.find_spec("matplotlib") is not None
            if not drawn:
                warnings.warn("matplotlib is not installed: report.png is left out", stacklevel=3)
            report.save(self.ledger.out, picture=drawn)
            for index in range(len(self.names)):  # made anew by trainers that only evaluated
                shutil.rmtree(self._folder(index) / "checkpoints", ignore_errors=True)
        host.accelerator.wait_for_everyone()
        return report

    def _leave(self, host: Any) -> None:
        """The final model, for from_pretrained.

        An adapter is saved as one, unless the weights beneath it have changed (a keep has folded
        earlier tasks into them): then the whole model, multiplied out.
        """
        inner, folder = unwrap(self.model), self.ledger.out / "model"
        if not hasattr(inner, "merge_and_unload") or not self._base_changed(inner):
            host.save_model(str(folder))
        elif host.is_world_process_zero():
            self._unpatch(inner)
            shutil.rmtree(folder, ignore_errors=True)  # no adapter of an earlier call beside it
            copy.deepcopy(inner).merge_and_unload().save_pretrained(folder)
            tokenizer = self.options.get("processing_class")
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)

    def _base_changed(self, model: Any) -> bool:
        kinds = ("lora_", "modules_to_save", "trainable_tokens")
        beneath = {
            name: x
            for name, x in model.state_dict().items()
            if name in self.base and not any(kind in name for kind in kinds)
        }
        return any(self.base[name] != digest for name, digest in digests(beneath).items())

    def _merge(self, host: Any) -> None:
        assert self.merge is not None
        self._phase("merging")
        model, base, models = self._to_merge()

        def scored(state: Mapping[str, Tensor]) -> float:
            model.load_state_dict(state)
            mine = self._trainer(len(self.names) - 1, model, trains=False)
            found = self._scores(mine, list(self.data))
            return math.fsum(found.values()) / len(found)

        merged, words = merge_tasks(self.merge, self.merge_options, base, models, scored)
        model.load_state_dict(dict(merged))
        self.model = model
        mine = self._trainer(len(self.names) - 1, model, trains=False)
        scores = self._scores(mine, [*self.data, *self.probes])
        self.ledger.merged = {"words": words, "scores": scores}
        mine.save_model(str(self.ledger.out / "merged"))
        if mine.is_world_process_zero():
            self.ledger.write()

    def _to_merge(self) -> tuple[Any, dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """The model that the merged weights go into, the base's weights, those after each task."""
        inner = unwrap(self.model)
        start = load_tensors(self.ledger.out / "base.safetensors")
        if not hasattr(inner, "merge_and_unload"):
            return inner, start, self._after_each("state.safetensors", start)
        inner.load_state_dict(start, strict=False)
        self._unpatch(inner)
        with adapters_off(inner):
            model = copy.deepcopy(inner).unload()
        base = {n: x.clone() for n, x in model.state_dict().items()}
        return model, base, self._after_each("merged.safetensors", base)

    def _after_each(self, file: str, base: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        found = {}
        for i, name in enumerate(self.names):
            path = self._folder(i) / file
            if file == "merged.safetensors" and not path.exists():
                raise CheckpointError(
                    f"{path} does not exist: {name!r} was trained without merge=, and then "
                    "adapters are not multiplied out. Train into another folder, with merge="
                )
            found[name] = {**base, **load_tensors(path)}
        return found


def _kept(trainer: type[Any]) -> type[Any]:
    """`trainer` with keeps, the schedule of the stream, and its data as it prepared them."""
    bases = (trainer,) if issubclass(trainer, KeepMixin) else (KeepMixin, trainer)

    class Kept(*bases):  # type: ignore[misc]
        stream_schedule: Callable[[Any, int], Any] | None = None

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            if self.stream_schedule is None:
                return super().create_scheduler(num_training_steps, optimizer)
            host: Any = self
            if host.lr_scheduler is None:
                optimizer = optimizer or host.optimizer
                host.lr_scheduler = self.stream_schedule(optimizer, num_training_steps)
            return host.lr_scheduler

    Kept.__name__ = trainer.__name__
    return Kept


def _multiplied_out(model: Any) -> dict[str, Tensor]:
    """The weights of a PEFT model with its adapters merged, under the names of the base model."""
    state: dict[str, Tensor] = copy.deepcopy(unwrap(model)).merge_and_unload().state_dict()
    return state


def _last_checkpoint(folder: Path, ranks: int, *, finished: bool) -> Path | None:
    """The newest checkpoint that is whole.

    Without `finished`, one that is not of the last step of its task.
    """
    found = [path for path in folder.glob("checkpoint-*") if is_whole(path, ranks)]
    found = [path for path in found if finished or not _is_finished(path)]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def _is_finished(checkpoint: Path) -> bool:
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    control = state["stateful_callbacks"].get("TrainerControl", {"args": {}})["args"]
    stopped = control.get("should_training_stop", False)  # early, by a callback
    return bool(stopped or state["global_step"] >= state["max_steps"])


def _check_tasks(tasks: Any, probes: Mapping[str, Any], score: Any) -> dict[str, tuple[Any, Any]]:
    if not isinstance(tasks, Mapping) or not tasks:
        raise ValueError("tasks must be a mapping from names to (train, evaluation), not empty")
    found = {}
    for name, pair in tasks.items():
        if not isinstance(name, str) or not name or name == "before":
            raise ValueError(f"a task must have a name, other than 'before'; got {name!r}")
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"tasks[{name!r}] must be (train, evaluation)")
        train, evaluation = pair
        if not hasattr(train, "__len__"):
            raise TypeError(f"tasks[{name!r}]: the training data must be map-style, with a length")
        if len(train) == 0:
            raise ValueError(f"tasks[{name!r}]: the training data is empty")
        if evaluation is None and score is None:
            raise ValueError(f"tasks[{name!r}] needs evaluation data, or learn a score function")
        if score is None and hasattr(evaluation, "__len__") and len(evaluation) == 0:
            raise ValueError(f"tasks[{name!r}]: the evaluation data is empty")
        found[name] = (train, evaluation)
    for name in probes:
        if name in found or name == "before":
            raise ValueError(f"probes has {name!r}, which is a task: choose another name")
    return found


def _check_keeps(
    keeps: Sequence[Keep], tasks: Mapping[str, tuple[Any, Any]], trainer: type[Any]
) -> None:
    """What would else be found at a later task, with all before it trained."""
    from transformers import Trainer

    preferences = any(kind.__name__ == "DPOTrainer" for kind in trainer.__mro__)
    if preferences and any(isinstance(one, Replay) and one.ratio for one in keeps):
        raise ValueError(
            "Replay would compare earlier pairs with the reference of a later stage: use "
            "PreferenceReplay with DPOTrainer"
        )
    for one in keeps:
        names_modules = isinstance(one, LoraTasks | AdapterPerTask)
        if names_modules or (isinstance(one, Orthogonal) and one.past == "keep"):
            for name in tasks:
                if "." in name:
                    raise ValueError(
                        f"tasks has {name!r}: {type(one).__name__} calls an adapter like the task, "
                        "and its name must not hold a dot"
                    )
        # Other trainers may prepare their data alike, and unused columns of tables are left out.
        bare = trainer.__init__ is Trainer.__init__ and not any(
            hasattr(train, "select_columns") for train, _ in tasks.values()
        )
        if isinstance(one, Replay) and one.ratio and bare:
            sources: dict[str, Any] = {task.name: task.train for task in one.old}
            sources |= {name: train for name, (train, _) in tasks.items()}
            names = list(sources)
            for name in names[max(1, len(one.old)) :]:
                try:
                    mix([sources[name][0]], {names[0]: [sources[names[0]][0]]}, 0.5)
                except ValueError as error:
                    raise ValueError(f"tasks[{name!r}] with Replay: {error}") from error


def _check_args(args: Any, names: Sequence[str]) -> dict[str, Any]:
    if isinstance(args, Mapping):
        missing = [name for name in names if name not in args]
        unknown = [name for name in args if name not in names]
        if missing or unknown:
            faults = [f"lacks {name!r}" for name in missing] + [f"has {name!r}" for name in unknown]
            what = " and ".join(faults)
            raise ValueError(
                f"args must have an entry for each of the tasks {list(names)}: it {what}"
            )
        return {name: args[name] for name in names}
    if not hasattr(args, "output_dir"):
        raise TypeError(f"args must be TrainingArguments; got {type(args).__name__}")
    return dict.fromkeys(names, args)
