"""Distillation in the Trainer of transformers, and what any host needs of its models.

    head_of(model)                 the output head: weight, bias, adapters, logit scale, softcap
    hidden_states(model, **batch)  what the head would have been given; no logits are made
    distill_loss_func(...)         for `Trainer(compute_loss_func=...)`, which makes logits
    DistillMixin                   for subclasses of Trainer; it does not

The model's own forward runs, wrappers (DDP, FSDP, PEFT, autocast) included, while a stand-in takes
the head's place: it keeps the hidden states and returns one row of probe numbers. What the model
makes of that row - a scale, a softcap - is compared, once per model, with what its config says; a
model that does something else to its logits is refused, never computed wrongly.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_fast.integrations.peft import LowRank, head_parts
from cl_fast.losses import (
    Hidden,
    Logits,
    TopK,
    divergence_from_logits,
    linear_divergence,
    token_logprobs_from_logits,
)
from cl_fast.ops.heads import Head, chunks

__all__ = [
    "DistillLossFunction",
    "DistillMixin",
    "LinearHead",
    "capture",
    "distill_loss_func",
    "forward_replaced",
    "head_of",
    "hidden_states",
    "last_hidden",
    "next_labels",
    "processes",
    "run_inside",
    "unwrap",
]

IGNORED = -100


@dataclass(frozen=True, eq=False)
class LinearHead:
    """An output head, and what the model does to its logits.

    Attributes:
        module: the layer.
        weight: [V, H].
        bias: [V], or None.
        logit_scale, softcap: logits are softcap tanh(logit_scale z / softcap).
        adapters: low-rank adapters on the head that are active.
    """

    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    adapters: tuple[LowRank, ...] = ()

    def keywords(self, hidden: Tensor) -> dict[str, Any]:
        """hidden, weight, bias, logit_scale and softcap as the losses take them."""
        hidden = hidden.to(self.weight.device)
        weight, bias = self.weight.to(hidden.dtype), self.bias
        if self.adapters:
            products = [adapter.product(hidden).to(hidden.dtype) for adapter in self.adapters]
            hidden = torch.cat([hidden, *products], -1)
            ups = [adapter.up.to(weight.dtype) for adapter in self.adapters]
            weight = torch.cat([weight, *ups], 1)
        return {
            "hidden": hidden,
            "weight": weight,
            "bias": None if bias is None else bias.to(hidden.dtype),
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
        }

    def teacher(self, hidden: Tensor) -> Hidden:
        """This head with these hidden states as a teacher: nothing of it requires grad."""
        with torch.no_grad():
            given = self.keywords(hidden.detach())
        return Hidden(**{k: v.detach() if isinstance(v, Tensor) else v for k, v in given.items()})

    def logits(
        self, hidden: Tensor, temperature: float = 1.0, chunk_tokens: int | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Chunk by chunk, the rows of `hidden` [M, H] and their final logits [C, V], without grad.

        The caller may overwrite the logits.
        """
        given = self.teacher(hidden)
        head = Head(given.hidden, given.weight, given.bias)
        for rows in chunks(hidden.size(0), self.weight.size(0), chunk_tokens):
            with torch.no_grad():  # not around the yield: the caller's mode is his own
                z = head.logits(rows)
                if self.logit_scale != 1.0:
                    z *= self.logit_scale
                if self.softcap is not None:
                    z = z.div_(self.softcap).tanh_().mul_(self.softcap)
                if temperature != 1.0:
                    z /= temperature
            yield rows, z


def unwrap(model: nn.Module) -> Any:
    """The model within DDP and FSDP; PEFT's wrapper stays.

    Raises:
        ValueError: it is wrapped by DataParallel or by torch.compile.
    """
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "nn.DataParallel is not supported: launch one process per GPU (torchrun or accelerate)"
        )
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "a model compiled as a whole has its head compiled in: compile its decoder instead, "
            "model.get_decoder().compile()"
        )
    parallel = isinstance(model, nn.parallel.DistributedDataParallel)
    if parallel or type(model).__name__ == "FullyShardedDataParallel":
        return unwrap(model.module)
    return model


def _text_config(model: Any) -> Any:
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(
            f"{type(model).__name__} has no config to read the logit scale and softcap from; give "
            "hidden states, weight and both to linear_divergence yourself"
        )
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _scale_and_cap(config: Any) -> tuple[float, float | None]:
    """What a config says of the logits; the probe of `last_hidden` holds the model to it."""
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            scale = float(value)
            break
    else:
        divisor = getattr(config, "logits_scaling", None)
        if divisor is not None:
            multiplies = getattr(config, "model_type", "") == "hyperclovax"
            scale = float(divisor) if multiplies else 1.0 / float(divisor)
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        cap = getattr(config, name, None)
        if cap is not None:
            return scale, float(cap)
    return scale, None


def head_of(model: nn.Module) -> LinearHead:
    """The output head of a causal language model of transformers, with or without PEFT.

    Args:
        model: also within DDP or FSDP; sharded weights must be gathered at this moment, as they
            are within `run_inside`.

    Raises:
        ValueError: the head is not one that the losses can multiply with.
    """
    inner = unwrap(model)
    module = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if module is None:
        raise ValueError(f"{type(inner).__name__} has no output head (get_output_embeddings)")
    config = _text_config(inner)
    if getattr(inner.config, "is_encoder_decoder", False):
        raise ValueError("an encoder-decoder is not supported: its labels are not shifted by one")
    parts = head_parts(module)
    scale, cap = _scale_and_cap(config)
    return LinearHead(module, parts.weight, parts.bias, scale, cap, parts.adapters)


@contextlib.contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module(...)` calls `forward` while this lasts; hooks run as ever."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = own


def run_inside(model: nn.Module, function: Callable[..., Any], **inputs: Any) -> Any:
    """`function(unwrap(model), **inputs)` as the forward pass of `model`.

    DDP prepares its reduction and FSDP gathers parameters around it, so a head may be used within
    that is not called. `inputs` pass through the wrapper, which may move or cast them.
    """
    inner = unwrap(model)
    own = inner.__dict__.get("forward")

    def forward(**given: Any) -> Any:
        # The function may want the real one.
        if own is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.__dict__["forward"] = own
        return function(inner, **given)

    with forward_replaced(inner, forward):
        return model(**inputs)


_checked: weakref.WeakKeyDictionary[nn.Module, tuple[float, float | None]] = (
    weakref.WeakKeyDictionary()
)
"""Heads whose models were seen to do to their logits what their configs say."""


def capture(
    inner: Any, forward: Callable[..., Any], *args: Any, **inputs: Any
) -> tuple[Tensor, Any]:
    """What the head is given while `forward` runs, and what `forward` returns."""
    head = head_of(inner)
    taken: list[Tensor] = []
    columns = head.weight.size(0)

    def stand_in(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        taken.append(hidden)
        probe = torch.linspace(-60, 60, columns, device=hidden.device)
        return probe.reshape(*[1] * (hidden.dim() - 1), columns)

    with forward_replaced(head.module, stand_in):
        output = forward(*args, **inputs)
    if len(taken) != 1:
        raise ValueError(
            f"{type(inner).__name__} calls its output head {len(taken)} times in a forward pass, "
            "not once; its hidden states cannot be told. Take its logits and "
            "divergence_from_logits instead"
        )
    if _checked.get(head.module) != (head.logit_scale, head.softcap):
        _check_probe(inner, head, output)
        _checked[head.module] = (head.logit_scale, head.softcap)
    return taken[0], output


def _check_probe(inner: Any, head: LinearHead, output: Any) -> None:
    logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    expected = torch.linspace(-60, 60, head.weight.size(0), device=logits.device)
    expected = expected * head.logit_scale
    if head.softcap is not None:
        expected = torch.tanh(expected / head.softcap) * head.softcap
    tolerance = 1e-4 if logits.dtype == torch.float32 else 2.0**-6
    flat = logits.detach().flatten().to(torch.float32)
    if flat.shape != expected.shape or not torch.allclose(
        flat, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    ):
        raise ValueError(
            f"{type(inner).__name__} does something to its logits that its config does not tell: "
            f"logit scale {head.logit_scale} and softcap {head.softcap} were read. Take its logits "
            "and divergence_from_logits instead"
        )


def last_hidden(inner: Any, **inputs: Any) -> Tensor:
    """`hidden_states` for use within `run_inside`, where the model is unwrapped already."""
    for name in ("labels", "shift_labels"):
        if inputs.get(name) is not None:
            raise ValueError(f"{name} must not be given: the model would make its own loss of them")
    inputs.setdefault("use_cache", False)
    if getattr(_text_config(inner), "output_router_logits", False):
        raise ValueError(
            "output_router_logits=True asks for the auxiliary loss of a mixture of experts, which "
            "this loss would leave out: set it to False, or add outputs.aux_loss yourself"
        )
    return capture(inner, inner.forward, **inputs)[0]


def hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """What the output head of `model` would be given for this batch: [batch, length, H].

    Under autocast it has the dtype in which the head would multiply. The head is not called.

    Args:
        model: a causal language model of transformers; within DDP, FSDP or PEFT too.
        inputs: of its forward, without labels.

    Raises:
        ValueError: the head or what follows it is not understood.
    """
    hidden = run_inside(model, last_hidden, **inputs)
    assert isinstance(hidden, Tensor)
    return hidden


def next_labels(labels: Tensor) -> Tensor:
    """labels[..., i] becomes the token that position i predicts; the last position has none."""
    return F.pad(labels[..., 1:], (0, 1), value=IGNORED)


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


class _Eval(contextlib.AbstractContextManager[None]):
    """A model in eval mode; the modules that were training train again afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.training = [module for module in model.modules() if module.training]

    def __enter__(self) -> None:
        for module in self.training:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module in self.training:
            module.training = True


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
        with torch.no_grad(), _Eval(teacher):
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
            with torch.no_grad(), _Eval(self.teacher):
                hidden = hidden_states(self.teacher, **batch)
                inner = unwrap(self.teacher)
        else:
            inner = unwrap(model)
            with torch.no_grad(), _Eval(model), inner.disable_adapter():
                hidden = hidden_states(model, **batch)
        return _without_virtual_tokens(inner, hidden, batch["input_ids"].size(1))

    def _teacher_head(self, student: Any) -> LinearHead:
        if isinstance(self.teacher, nn.Module):
            return head_of(self.teacher)
        with student.disable_adapter():
            return head_of(student)


def _refuse_sharded(teacher: nn.Module) -> None:
    if any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in teacher.parameters()):
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
