"""Distillation in the Trainer of transformers.

    distill_loss_func(...)         for `Trainer(compute_loss_func=...)`, which makes logits
    DistillMixin                   for subclasses of Trainer; it does not

What they ask a model for - its head, its hidden states - is at hand here too, from
`cl_fast.models`: head_of, hidden_states, last_hidden, next_labels, run_inside.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from cl_fast.losses import (
    Logits,
    TopK,
    divergence_from_logits,
    linear_divergence,
    token_logprobs_from_logits,
)
from cl_fast.models.bases import adapters_off
from cl_fast.models.heads import (
    IGNORED,
    Evaluating,
    LinearHead,
    head_of,
    hidden_states,
    last_hidden,
    next_labels,
    run_inside,
    unwrap,
)
from cl_fast.models.sharding import is_sharded

__all__ = [
    "DistillLossFunction",
    "DistillMixin",
    "distill_loss_func",
    "head_of",
    "hidden_states",
    "last_hidden",
    "next_labels",
    "processes",
    "run_inside",
    "unwrap",
]


def _denominator(num_items: Tensor | int | None) -> Tensor | float | None:
    """Of a loss whose number of tokens may be 0, which must not make it NaN."""
    if num_items is None:
        return None
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(
                f"num_items_in_batch must be one number; got the shape {tuple(num_items.shape)}"
            )
        return num_items.reshape(()).clamp(min=1)
    return max(1, num_items)


def processes(host: Any, num_items: Tensor | int | None) -> int:
    """What a loss divided by `num_items` is multiplied by in a Trainer: the count may be of all
    devices, while gradients are averaged over them."""
    if not host.args.average_tokens_across_devices or num_items is None:
        return 1
    copies = host.get_tp_size() if hasattr(host, "get_tp_size") else 1
    return int(host.accelerator.num_processes // copies)


class _Watch:
    """A hook that keeps what a model's forward was given last, until it is taken."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: dict[str, Any] = {}
        if model in _watches:
            _watches[model].stop()
        _watches[model] = self

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if args:
                raise ValueError("distill_loss_func needs the student's inputs by keyword")
            left_out = ("labels", "shift_labels", "num_items_in_batch")
            self.seen = {k: v for k, v in kwargs.items() if k not in left_out}

        # A function, not a method: a copy of the model does not copy the batch.
        self._handle = model.register_forward_pre_hook(keep, with_kwargs=True)

    def take(self) -> dict[str, Any]:
        seen, self.seen = self.seen, {}
        return seen

    def stop(self) -> None:
        self._handle.remove()
        self.seen = {}


_watches: weakref.WeakKeyDictionary[nn.Module, _Watch] = weakref.WeakKeyDictionary()
"""One of a student: a second loss function takes the place of the first."""


class DistillLossFunction:
    """What `distill_loss_func` returns."""

    def __init__(
        self, teacher: nn.Module, student: nn.Module, ce_weight: float, options: dict[str, Any]
    ) -> None:
        self._teacher, self._ce_weight, self._options = teacher, ce_weight, options
        self._watch = _Watch(student)

    def remove(self) -> None:
        """Take the hook off the student and let go of its last batch."""
        self._watch.stop()

    def __call__(
        self,
        outputs: Any,
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The loss over the labels shifted by one.

        Args:
            outputs: of the student's forward.
            labels: [batch, length].
            num_items_in_batch: what the sum is divided by; by default the tokens that count.
        """
        seen = self._watch.take()
        if labels is None:
            raise ValueError("distill_loss_func needs labels: they say which tokens count")
        if not seen:
            raise ValueError(
                "the student's forward was not seen: give distill_loss_func the model that the "
                "trainer trains. A later function for the same student, or remove(), ends this one"
            )
        teacher = self._teacher
        with torch.no_grad(), Evaluating(teacher):
            given = teacher(**{"use_cache": False, **seen}).logits
        targets, denom = next_labels(labels), _denominator(num_items_in_batch)
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        loss = divergence_from_logits(
            logits, Logits(given), labels=targets, denom=denom, **self._options
        )
        if self._ce_weight:
            if denom is None:
                denom = (targets != IGNORED).sum().clamp(min=1)
            correct = token_logprobs_from_logits(logits, targets).sum() / denom
            loss = loss - self._ce_weight * correct
        return loss


def distill_loss_func(
    teacher: nn.Module,
    student: nn.Module,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    ce_weight: float = 0.0,
    pad_vocab: str | None = None,
) -> DistillLossFunction:
    """A loss for `Trainer(model=student, compute_loss_func=...)`.

    The trainer hands over the student's logits, so they exist; `DistillMixin` does without. The
    teacher sees what the student's forward is given, by a hook on it. A second function for the
    same student takes the place of the first.

    Args:
        teacher: a causal language model on the student's device; run in eval mode without grad.
        student: the model that is given to the trainer.
        kind, beta, skew, temperature, teacher_temperature, pad_vocab: see `linear_divergence`.
        ce_weight: of an added cross-entropy at temperature 1.

    Returns:
        f(outputs, labels, num_items_in_batch=None): the loss over the labels shifted by one,
        divided by num_items_in_batch, or else by the number of tokens that count. `f.remove()`
        takes the hook off.
    """
    options: dict[str, Any] = {
        "kind": kind,
        "beta": beta,
        "skew": skew,
        "temperature": temperature,
        "teacher_temperature": teacher_temperature,
        "pad_vocab": pad_vocab,
    }
    return DistillLossFunction(teacher, student, ce_weight, options)


class DistillMixin:
    """Distillation in a Trainer of transformers, from hidden states: logits are never made.

        class Distiller(DistillMixin, Trainer): ...
        Distiller(model, args, train_dataset=data, teacher=teacher, kind="reverse_kl").train()

    The loss is the divergence over the tokens whose label counts, divided by the number of such
    tokens in the whole batch: over accumulation steps, and over devices where
    `average_tokens_across_devices` says so, as the Trainer's own loss is.

    Args:
        teacher: a causal language model, put on the trainer's device and run in eval mode without
            grad on the same batch; or "base", the student without its adapters (PEFT); or None:
            the batch has the columns `teacher_ids` and `teacher_logprobs` [batch, length, k], of
            which position i is the teacher's prediction after token i.
        kind, beta, skew, temperature, teacher_temperature, ce_weight, pad_vocab, chunk_tokens:
            see `linear_divergence`.
        tail, columns_temperature: of the columns, see `TopK`: what is outside of them, and the
            temperature at which their log-probs were made: by default what a dataset of
            `TeacherCache.attach` tells, else 1.

    A column `token_weight` [batch, length] weights the tokens by what position i predicts.

    Raises:
        ValueError: an argument of the Trainer would have no effect: compute_loss_func,
            compute_metrics, label_smoothing_factor.
    """

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | str | None = None,
        kind: str = "forward_kl",
        beta: float = 0.5,
        skew: float = 0.1,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        ce_weight: float = 0.0,
        tail: str = "bucket",
        columns_temperature: float | None = None,
        pad_vocab: str | None = None,
        chunk_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        host: Any = self
        for name in ("compute_loss_func", "compute_metrics", "label_smoother"):
            if getattr(host, name, None) is not None:
                raise ValueError(f"{name} needs logits, which DistillMixin does not make")
        if isinstance(teacher, str) and teacher != "base":
            raise ValueError(f"teacher must be a model, 'base' or None; got {teacher!r}")
        if teacher == "base" and not hasattr(host.model, "disable_adapter"):
            raise ValueError("teacher='base' needs a PEFT model, whose adapters it leaves out")
        if isinstance(teacher, nn.Module):
            if teacher is host.model:
                raise ValueError(
                    "teacher is the model that is trained, which would chase itself: give "
                    "copy.deepcopy(model), or 'base' for a PEFT model"
                )
            _refuse_sharded(teacher)
            placed = any(hasattr(teacher, name) for name in ("hf_device_map", "hf_quantizer"))
            teacher = teacher if placed else teacher.to(host.args.device)
        self.teacher = teacher
        self.tail = tail
        if columns_temperature is None:  # a dataset of TeacherCache.attach tells
            columns_temperature = float(getattr(host.train_dataset, "temperature", 1.0))
        self.columns_temperature = columns_temperature
        self.distillation: dict[str, Any] = {
            "kind": kind,
            "beta": beta,
            "skew": skew,
            "temperature": temperature,
            "teacher_temperature": teacher_temperature,
            "ce_weight": ce_weight,
            "pad_vocab": pad_vocab,
            "chunk_tokens": chunk_tokens,
        }
        # The tokens are counted for us, and our labels are shifted by one.
        host.model_accepts_loss_kwargs = True
        if hasattr(host, "_loss_shifts_labels"):
            host._loss_shifts_labels = True

    _COLUMNS = ("teacher_ids", "teacher_logprobs", "token_weight")

    def _set_signature_columns_if_needed(self) -> None:
        host: Any = super()
        host._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns  # type: ignore[has-type]
        self._signature_columns = list(dict.fromkeys([*columns, *self._COLUMNS]))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        host: Any = self
        batch = {k: v for k, v in inputs.items() if k != "num_items_in_batch"}
        labels, shifted = batch.pop("labels", None), batch.pop("shift_labels", None)
        if labels is None and shifted is None:
            raise ValueError("DistillMixin needs labels: they say which tokens count")
        columns = {k: batch.pop(k) for k in self._COLUMNS if k in batch}
        targets = next_labels(labels) if shifted is None else shifted
        given = None
        if "teacher_ids" in columns:
            if self.teacher is not None:
                raise ValueError("the batch has teacher_ids, and a teacher was given: one of them")
        elif self.teacher is None:
            raise ValueError(
                "no teacher: give one to the trainer, or batches with the columns teacher_ids and "
                "teacher_logprobs"
            )
        else:
            given = self._teacher_pass(model, batch)

        def loss_of(inner: Any, **batch: Any) -> Tensor:
            if given is None:
                top_k = columns["teacher_ids"], columns["teacher_logprobs"]
                teacher: Any = TopK(*top_k, self.tail, self.columns_temperature)  # type: ignore[arg-type]
            else:
                teacher = self._teacher_head(inner).teacher(given)
            hidden = _without_virtual_tokens(inner, last_hidden(inner, **batch), targets.size(1))
            loss = linear_divergence(
                **head_of(inner).keywords(hidden), teacher=teacher, labels=targets,
                token_weight=columns.get("token_weight"), denom=_denominator(num_items_in_batch),
                **self.distillation,
            )  # fmt: skip
            assert isinstance(loss, Tensor)
            return loss

        loss = run_inside(model, loss_of, **batch) * processes(host, num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        if not prediction_loss_only:
            raise ValueError(
                "predictions are logits, which DistillMixin does not make: predict with a plain "
                "Trainer, or evaluate()"
            )
        host: Any = super()
        return host.prediction_step(model, inputs, True, ignore_keys)

    def _teacher_pass(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Before the student's pass: a wrapper must not be called within its own forward."""
        if isinstance(self.teacher, nn.Module):
            with torch.no_grad(), Evaluating(self.teacher):
                hidden = hidden_states(self.teacher, **batch)
                inner = unwrap(self.teacher)
        else:
            inner = unwrap(model)
            with torch.no_grad(), Evaluating(model), adapters_off(inner):
                hidden = hidden_states(model, **batch)
        return _without_virtual_tokens(inner, hidden, batch["input_ids"].size(1))

    def _teacher_head(self, student: Any) -> LinearHead:
        if isinstance(self.teacher, nn.Module):
            return head_of(self.teacher)
        with adapters_off(student):
            return head_of(student)


def _refuse_sharded(teacher: nn.Module) -> None:
    if is_sharded(teacher):
        raise ValueError(
            "a teacher whose parameters are sharded is not supported: give a whole one, or its "
            "predictions as the columns teacher_ids and teacher_logprobs"
        )


def _without_virtual_tokens(inner: Any, hidden: Tensor, length: int) -> Tensor:
    """Prompt learning puts its own tokens before those of the batch."""
    config = getattr(inner, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        return hidden[:, -length:]
    return hidden
