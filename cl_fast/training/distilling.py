"""Self-distillation: a model that learns a task stays near what it was when the task began.

    L = L_task + weight * mean_i D(teacher_i, student_i)        i: the tokens that count

    SelfDistill(prompts)                       on earlier prompts, which need no labels
    SelfDistill(on="inputs")                   on the new inputs: Learning without Forgetting
    SelfDistill(prompts, teacher="base")       the model without its adapters is the teacher
    SelfDistill(prompts, teacher="ema")        the teacher follows slowly
    SelfDistill(prompts, teacher=cache)        a `TeacherCache`: no teacher is run at all

D is a divergence of `cl_fast.losses.linear_divergence`: it is computed from hidden states and the
head, so logits are never held. Sources: Li & Hoiem 2016, Learning without Forgetting (arXiv
1606.09282), for the new inputs; Robins 1995 and, in language models, LAMOL (1909.03329) and SSR
(2403.01244) for earlier or generated ones; Tarvainen & Valpola 2017 (1703.01780) for the mean
teacher; Hinton et al. 2015 (1503.02531) for temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_fast.errors import CheckpointError
from cl_fast.losses import Hidden, TeacherCache, TopK, linear_divergence
from cl_fast.losses.divergence import kind_and_mix
from cl_fast.models.bases import adapters_off, frozen_copy
from cl_fast.models.heads import (
    IGNORED,
    Evaluating,
    forward_names,
    forward_replaced,
    head_of,
    hidden_states,
    last_hidden,
    next_labels,
    run_inside,
    unwrap,
)
from cl_fast.models.sharding import is_sharded
from cl_fast.options import at_least, dtype_name, function_name, one_of, positive, share
from cl_fast.training.keeping import Dataset, Keep, Task
from cl_fast.training.prompts import PromptDraw, check_prompts, pad_prompts

__all__ = ["SelfDistill"]

Prompts = Dataset | Callable[[nn.Module, Task], Dataset | None]

_BEYOND_SIGNATURE = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Where padding-free batches say where their sequences end; forwards take them as **kwargs."""


class SelfDistill(Keep):
    """Adds the divergence of the model from its earlier self to the loss of a task.

    It has a loss, so in a Trainer it needs `cl_fast.integrations.keeping.KeepMixin`. The loss is
    made by a second forward pass of the student (and one of the teacher, without gradients) through
    whatever wraps it: DDP, FSDP, PEFT.

    Args:
        prompts: earlier prompts or texts: a map-style dataset of token ids, or of mappings with
            `input_ids` and perhaps `attention_mask` and `labels`. Or a function (model, task) that
            gives such a dataset at the start of a task, or None where there is nothing to keep
            yet: the model is as the task finds it, so it may generate them
            (`generate_prompts`). It is called again on resume and must give the same.
        teacher: "copy": a frozen copy of the model as the task finds it. "base": the student with
            its adapters off (PEFT), which costs no memory. "ema": an exponential moving average of
            the trained weights that begins at the task's start; frozen weights are shared, so of a
            LoRA only the factors are held. A `TeacherCache` that was built of `prompts`.
        on: "prompts"; or "inputs", the batches that the task trains on.
        batch_size: prompts that each micro-batch draws, on each rank.
        tokens: which positions count. "all" that are attended to, the last one of a prompt among
            them; "labels": those whose next token has a label other than -100. By default "all" of
            prompts and the "labels" of inputs.
        average: "sequences": each sequence is averaged over its tokens, then all have one weight,
            so that the gradient of a step does not depend on how its prompts are split into
            micro-batches. "tokens": over the tokens of a micro-batch.
        weight: of the divergence beside the loss of the task.
        kind, beta, skew, temperature, teacher_temperature, chunk_tokens: see `linear_divergence`.
        temperature_squared: multiply by temperature^2, which keeps the size of the gradients
            (Hinton et al.). TRL and `linear_divergence` do not, and by default it is not done.
        tail: of a `TeacherCache`, see `TopK`.
        decay: of "ema": teacher <- decay teacher + (1 - decay) student after each step. 1 freezes
            it: the model at the task's start, of which only the trained weights are held.
        dtype: of "copy", by default the model's.
        seed: of the order of prompts.

    Raises:
        TypeError, ValueError: naming the argument; before training starts.
        CheckpointError: the cache was built of other prompts.
    """

    def __init__(
        self,
        prompts: Prompts | None = None,
        *,
        teacher: str | TeacherCache = "copy",
        on: Literal["prompts", "inputs"] = "prompts",
        batch_size: int = 8,
        tokens: Literal["all", "labels"] | None = None,
        average: Literal["sequences", "tokens"] = "sequences",
        weight: float = 1.0,
        kind: str = "forward_kl",
        beta: float = 0.5,
        skew: float = 0.1,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        temperature_squared: bool = False,
        tail: str = "bucket",
        decay: float = 0.999,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        chunk_tokens: int | None = None,
    ) -> None:
        one_of("on", on, ("prompts", "inputs"))
        if tokens is None:
            tokens = "all" if on == "prompts" else "labels"
        one_of("tokens", tokens, ("all", "labels"))
        one_of("average", average, ("sequences", "tokens"))
        one_of("tail", tail, ("bucket", "renorm", "none"))
        if not isinstance(teacher, TeacherCache):
            if isinstance(teacher, nn.Module):
                raise TypeError(
                    "teacher must be 'copy', 'base', 'ema' or a TeacherCache: the model itself is "
                    "the teacher. Another one fits DistillMixin"
                )
            one_of("teacher", teacher, ("copy", "base", "ema"))
        at_least("batch_size", batch_size, 1)
        if chunk_tokens is not None:
            at_least("chunk_tokens", chunk_tokens, 1)
        positive("weight", weight)
        positive("temperature", temperature)
        if teacher_temperature is not None:
            positive("teacher_temperature", teacher_temperature)
        share("decay", decay)
        at_least("seed", seed, 0)
        if dtype is not None and teacher != "copy":
            raise ValueError(f"dtype is of teacher='copy' only; got teacher={teacher!r}")
        kind_and_mix(kind, beta, skew)  # raises
        self.teacher, self.on, self.tokens, self.average = teacher, on, tokens, average
        self.batch_size, self.weight, self.decay = batch_size, float(weight), decay
        self.dtype, self.seed, self.tail = dtype, seed, tail
        self.temperature_squared = temperature_squared
        self.divergence: dict[str, Any] = {
            "kind": kind,
            "beta": beta,
            "skew": skew,
            "temperature": temperature,
            "teacher_temperature": teacher_temperature,
            "chunk_tokens": chunk_tokens,
        }
        self.prompts = prompts
        self._check_source()
        self._forget()

    def _check_source(self) -> None:
        cached, made = isinstance(self.teacher, TeacherCache), _is_function(self.prompts)
        if self.on == "inputs":
            if self.prompts is not None:
                raise ValueError("prompts have no use with on='inputs': leave one of them out")
            if cached:
                raise ValueError(
                    "a TeacherCache answers to stored prompts, not to on='inputs': attach it to "
                    "the training data (TeacherCache.attach) and use DistillMixin"
                )
            return
        if self.prompts is None:
            raise ValueError(
                "prompts are needed: a dataset, or a function (model, task) such as "
                "lambda model, task: generate_prompts(model, 1000). Without any, on='inputs' "
                "distills on the new data"
            )
        if made and cached:
            raise ValueError("a TeacherCache needs the dataset that it was built of as prompts")
        if not made:
            check_prompts(self.prompts, labels=self.tokens == "labels")
        if isinstance(self.teacher, TeacherCache):
            self.teacher.attach(self.prompts)  # refuses another dataset
            wanted = self.divergence["teacher_temperature"] or self.divergence["temperature"]
            if self.tail != "renorm" and self.teacher.temperature != wanted:
                raise ValueError(
                    f"the cache was built at temperature {self.teacher.temperature:g} and its tail "
                    f"is not known at {wanted:g}: build it at {wanted:g}, or use tail='renorm'"
                )

    def _forget(self) -> None:
        self._ready = False
        self._dataset: Any = None
        self._draw: PromptDraw | None = None
        self._copy: nn.Module | None = None
        self._ema: dict[str, Tensor] = {}
        self._cast: dict[str, Tensor] = {}
        self._seen: tuple[Tensor, int] | None = None

    # --- hooks ---------------------------------------------------------------------------------

    def before_task(self, model: nn.Module, task: Task) -> None:
        self._forget()
        model = unwrap(model)
        _refuse_borrowed_forward(model)
        head_of(model)  # raises where the head is not understood
        prompts: Any = self.prompts
        if _is_function(prompts):
            prompts = prompts(model, task)
            if prompts is not None:
                check_prompts(prompts, "what prompts() gave", self.tokens == "labels")
        self._ready, self._dataset = True, prompts
        if prompts is not None:
            self._draw = PromptDraw(len(prompts), self.seed, task.index)
        elif self.on == "prompts":
            return  # nothing to keep in this task, so no teacher either
        if self.teacher == "base":
            if not hasattr(model, "disable_adapter"):
                raise ValueError(
                    "teacher='base' needs a PEFT model, whose adapters it leaves out; got "
                    f"{type(model).__name__}. teacher='copy' works for every model"
                )
        elif self.teacher == "copy":
            _refuse_sharded(model, "copy")
            self._copy = frozen_copy(model, self.dtype)
        elif self.teacher == "ema":
            _refuse_sharded(model, "ema")
            self._ema = {name: _wide(p) for name, p in _trained(model)}
            if not self._ema:
                raise ValueError("teacher='ema' averages trained weights, and none requires grad")

    def after_task(self, model: nn.Module, task: Task) -> None:
        self._forget()

    def loss(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
        if not self._ready:
            raise ValueError("SelfDistill.before_task(model, task) must be called before its loss")
        if self.on == "inputs":
            batch, counts = self._of_inputs(model, inputs)
            taught: Any = None
        elif self._draw is None:
            return None
        else:
            batch, counts, taught = self._of_prompts(model, inputs)
        length = counts.size(1)
        if self.teacher == "ema":
            taught = self._ema_pass(unwrap(model), batch, length)
        elif self.teacher == "base":
            with torch.no_grad(), Evaluating(model), adapters_off(unwrap(model)):
                taught = hidden_states(model, **batch)[:, -length:]
        per_sequence = self.average == "sequences"

        def loss_of(inner: Any, **batch: Any) -> Tensor:
            # Prompt learning puts its own tokens before those of the batch.
            hidden = last_hidden(inner, **batch)[:, -length:]
            weights = counts.to(torch.promote_types(hidden.dtype, torch.float32))
            if per_sequence:
                weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
            value = linear_divergence(
                **head_of(inner).keywords(hidden),
                teacher=self._teacher_of(inner, hidden, batch, taught),
                token_weight=weights,
                denom=counts.size(0) if per_sequence else None,
                **self.divergence,
            )
            assert isinstance(value, Tensor)
            return value

        value: Tensor = run_inside(model, loss_of, **batch)
        total, passes = self._seen or (torch.zeros_like(value), 0)
        self._seen = (total + value.detach(), passes + 1)
        factor = self.weight
        if self.temperature_squared:
            factor *= self.divergence["temperature"] ** 2
        return factor * value

    def on_update(self, model: nn.Module) -> None:
        if not self._ema or self.decay == 1:
            return
        student = dict(_trained(model))
        if student.keys() != self._ema.keys():
            odd = sorted(student.keys() ^ self._ema.keys())
            raise ValueError(
                f"the weights that are trained are not those of the task's start: {odd[:3]}, "
                f"{len(odd)} in all. Freeze and unfreeze before the task, not within it"
            )
        self._place(student)
        self._cast = {}
        with torch.no_grad():
            averages, values = list(self._ema.values()), [student[k] for k in self._ema]
            rate = 1 - self.decay
            if all(a.dtype == v.dtype for a, v in zip(averages, values, strict=True)):
                torch._foreach_lerp_(averages, values, rate)
            else:  # one at a time: no second copy of the model
                for average, value in zip(averages, values, strict=True):
                    average.lerp_(value.to(average.dtype), rate)

    def state_dict(self) -> dict[str, Any]:
        """How many prompts were drawn, and the average of "ema". A "copy" is none: it is made again
        of the weights that `before_task` sees, also on resume."""
        state: dict[str, Any] = {}
        if self._draw is not None:
            state["drawn"] = self._draw.drawn
        if self._ema and self.decay != 1:
            state["ema"] = {k: v.cpu().clone() for k, v in self._ema.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        mine = self.state_dict()
        if mine.keys() != state.keys():
            raise CheckpointError(
                f"the state of SelfDistill holds {sorted(state)}, where these options keep "
                f"{sorted(mine)}: resume with the options that it was saved with"
            )
        average = state.get("ema", {})
        for name in sorted({*average, *mine.get("ema", {})}):
            found = tuple(average[name].shape) if name in average else None
            wanted = tuple(self._ema[name].shape) if name in self._ema else None
            if found != wanted:
                raise CheckpointError(
                    f"the average of {name} that was saved has the shape {found}, the model's "
                    f"{wanted}: it is of another model"
                )
        if self._draw is not None:
            self._draw.drawn = int(state["drawn"])
        for name, value in average.items():
            self._ema[name].copy_(value)
        self._cast = {}

    def options(self) -> dict[str, Any]:
        teacher: Any = self.teacher
        if isinstance(teacher, TeacherCache):
            teacher = f"cache of {teacher.k} tokens at temperature {teacher.temperature:g}"
        prompts: Any = self.prompts
        if _is_function(prompts):
            prompts = function_name(prompts)
        elif prompts is not None:
            prompts = len(prompts)
        return {
            "prompts": prompts,
            "teacher": teacher,
            "on": self.on,
            "batch_size": self.batch_size,
            "tokens": self.tokens,
            "average": self.average,
            "weight": self.weight,
            **{k: v for k, v in self.divergence.items() if k != "chunk_tokens"},
            "temperature_squared": self.temperature_squared,
            "tail": self.tail,
            "decay": self.decay,
            "dtype": dtype_name(self.dtype),
            "seed": self.seed,
        }

    def measures(self) -> dict[str, float]:
        """`self_distill/divergence`, without its weight, averaged over the micro-batches of this
        rank since it was last asked for."""
        if self._seen is None:
            return {}
        (total, passes), self._seen = self._seen, None
        return {"self_distill/divergence": float(total) / passes}

    # --- what is distilled on --------------------------------------------------------------------

    def _of_inputs(
        self, model: nn.Module, inputs: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Tensor]:
        if "input_ids" not in inputs:
            raise ValueError(
                "on='inputs' needs input_ids in the batch; it has "
                f"{', '.join(map(str, inputs)) or 'nothing'}"
            )
        names = forward_names(unwrap(model))
        batch = {
            k: v
            for k, v in inputs.items()
            if (k in names or k in _BEYOND_SIGNATURE) and k not in ("labels", "use_cache")
        }
        mask = inputs.get("attention_mask")
        ids: Tensor = inputs["input_ids"]
        counts = torch.ones_like(ids, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            counts = mask != 0
        if self.tokens == "labels":
            shifted = inputs.get("shift_labels")
            if shifted is None:
                if inputs.get("labels") is None:
                    raise ValueError(
                        "the batch has no labels, which say the tokens that count: say tokens='all'"
                    )
                shifted = next_labels(inputs["labels"])
            counts = counts & (shifted != IGNORED)
        return batch, counts

    def _of_prompts(
        self, model: nn.Module, inputs: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Tensor, TopK | None]:
        assert self._draw is not None
        indices = self._draw.next(self.batch_size)
        name = "what prompts() gave" if _is_function(self.prompts) else "prompts"
        batch = pad_prompts(self._dataset, indices, name)
        labels = batch.pop("labels", None)
        counts = batch["attention_mask"] != 0
        if self.tokens == "labels":
            if labels is None:
                raise ValueError(f"{name}: one of {indices} has no labels, unlike the first")
            counts &= next_labels(labels) != IGNORED
        inner = unwrap(model)
        rows = getattr(inner.get_input_embeddings(), "num_embeddings", None)
        if rows is not None and not 0 <= int(batch["input_ids"].max()) < rows:
            raise ValueError(
                f"{name} must hold token ids below {rows}, those that the model embeds; got "
                f"{int(batch['input_ids'].max())} in one of {indices}"
            )
        taught = None
        if isinstance(self.teacher, TeacherCache):
            taught = self.teacher.batch(indices, self.tail)  # type: ignore[arg-type]
            width = counts.size(1)
            for row, i in enumerate(indices):  # what was not stored is not known
                kept = self.teacher.kept(i)
                counts[row] &= F.pad(kept, (0, width - kept.numel()))
        device = next(
            (x.device for x in inputs.values() if isinstance(x, Tensor)),
            next(inner.parameters()).device,
        )
        moved = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
        if taught is not None:
            taught = TopK(
                taught.ids.to(device), taught.logprobs.to(device, torch.float32), taught.tail,
                taught.temperature,
            )  # fmt: skip
        return moved, counts.to(device), taught

    # --- teachers --------------------------------------------------------------------------------

    def _teacher_of(
        self, inner: Any, hidden: Tensor, batch: dict[str, Any], taught: Any
    ) -> Hidden | TopK:
        """Within the student's forward pass, where its own weights are whole."""
        if self.teacher == "base":
            with adapters_off(inner):
                return head_of(inner).teacher(taught)
        if self.teacher != "copy":
            assert isinstance(taught, (Hidden, TopK))
            return taught
        assert self._copy is not None
        if next(self._copy.parameters()).device != hidden.device:
            self._copy.to(hidden.device)  # the model was moved after the task had begun
        # A host may run the student's own forward under autocast, where ours does not stand.
        weight = head_of(inner).weight
        lowered = hidden.dtype != weight.dtype and hidden.dtype.itemsize < weight.dtype.itemsize
        autocast = torch.autocast(hidden.device.type, hidden.dtype, enabled=lowered)
        with torch.no_grad(), autocast:
            found = hidden_states(self._copy, **batch)[:, -hidden.size(1) :]
        return head_of(self._copy).teacher(found)

    def _ema_pass(self, inner: Any, batch: dict[str, Any], length: int) -> Hidden:
        """The student's module with the averaged weights in the place of its own."""
        student = dict(inner.named_parameters())
        _refuse_sharded(inner, "ema")
        self._place(student)
        if not self._cast:
            self._cast = {k: v.to(student[k].dtype) for k, v in self._ema.items()}
        own = inner.__dict__.get("forward")

        def forward(**given: Any) -> Hidden:
            if own is None:
                inner.__dict__.pop("forward", None)
            else:
                inner.__dict__["forward"] = own
            hidden = last_hidden(inner, **given)[:, -length:]
            return head_of(inner).teacher(hidden)

        with torch.no_grad(), Evaluating(inner), forward_replaced(inner, forward):
            made = torch.func.functional_call(inner, self._cast, kwargs=batch)
        assert isinstance(made, Hidden)
        return made

    def _place(self, student: Mapping[str, Tensor]) -> None:
        """The model may have been moved after the task had begun."""
        for name, average in self._ema.items():
            if average.device != student[name].device:
                self._ema[name] = average.to(student[name].device)
                self._cast = {}


def _is_function(prompts: Any) -> bool:
    return callable(prompts) and not hasattr(prompts, "__getitem__")


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _wide(parameter: Tensor) -> Tensor:
    """A copy in which small steps are not rounded away."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(dtype, copy=True)


def _refuse_sharded(model: nn.Module, teacher: str) -> None:
    if is_sharded(model):
        raise ValueError(
            f"teacher={teacher!r} needs whole parameters, and the model's are sharded: begin the "
            "task before the model is sharded (teacher='copy'), or use 'base' or a TeacherCache"
        )


def _refuse_borrowed_forward(model: Any) -> None:
    """TRL's trainers put a forward on a model that holds the model: a deep copy of it runs the
    first one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for module in (model, base):
        own = module.__dict__.get("forward")
        for cell in getattr(getattr(own, "__func__", own), "__closure__", None) or ():
            owner = getattr(cell.cell_contents, "__self__", None)
            if isinstance(owner, type(module)) and owner is not module:
                raise ValueError(
                    f"the forward of this {type(module).__name__} runs another one: it is a deep "
                    "copy of a model that a trainer of TRL has patched. Undo that on the copy, "
                    'del model.__dict__["forward"], or load the weights into a new model'
                )
