"""TRL's trainers with losses that hold no logits: same options, same numbers.

    GKDTrainer           trl.experimental.gkd.GKDTrainer    generalised JSD to a teacher
    SDFTTrainer          trl.experimental.sdft.SDFTTrainer  self-distillation: full, top-k, sampled
    DPOTrainer           trl.DPOTrainer                     all of its losses
    DistillationTrainer  trl.DistillationTrainer            on-policy generalised JSD

    from cl_fast.integrations.trl import SDFTTrainer    # instead of trl.experimental.sdft

Each is made when it is first named, from a mixin of this module and TRL's class: `GKDLoss`,
`SDFTLoss`, `DPOLoss` and `DistillationLoss` go before a subclass of yours as well. What a mixin
does not compute itself it hands to TRL's own method.
"""

from __future__ import annotations

import functools
import importlib
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cl_fast.integrations.transformers import processes
from cl_fast.losses import Hidden, TopK, linear_divergence, token_logprobs
from cl_fast.models.heads import (
    IGNORED,
    LinearHead,
    capture,
    head_of,
    hidden_states,
    last_hidden,
    next_labels,
    run_inside,
    unwrap,
)
from cl_fast.models.sharding import is_sharded

__all__ = ["DPOLoss", "DistillationLoss", "GKDLoss", "SDFTLoss"]

# "SDFTTrainer": the mixin, and where TRL keeps the trainer.
_TRAINERS = {
    "GKDTrainer": ("GKDLoss", "trl.experimental.gkd"),
    "SDFTTrainer": ("SDFTLoss", "trl.experimental.sdft"),
    "DPOTrainer": ("DPOLoss", "trl"),
    "DistillationTrainer": ("DistillationLoss", "trl"),
}


def __dir__() -> list[str]:
    return sorted([*__all__, *_TRAINERS])


def __getattr__(name: str) -> Any:
    if name not in _TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    mixin, home = _TRAINERS[name]
    host = getattr(importlib.import_module(home), name)
    doc = f"`{home}.{name}` with the loss of `{mixin}`: logits are never held."
    made = type(name, (globals()[mixin], host), {"__module__": __name__, "__doc__": doc})
    globals()[name] = made
    return made


def _refuse_sharded_teacher(teacher: nn.Module) -> None:
    if is_sharded(teacher):
        raise ValueError("a teacher whose parameters are sharded is not supported here")


class GKDLoss:
    """`GKDTrainer.compute_loss` from hidden states.

    As in TRL, the divergence is taken at temperature 1, whatever temperature samples are drawn at,
    and the sum is divided by `num_items_in_batch`. Under `average_tokens_across_devices` that
    number is of all processes while gradients are averaged over them, and TRL's GKD leaves out the
    factor by which transformers makes up for it: on N processes gradients are an N-th of those of
    one process with the whole batch. So they are here, unless scale_by_processes=True is given.

    Attributes:
        scale_by_processes: multiply by the number of processes, as transformers does.
    """

    scale_by_processes = False

    def __init__(self, *args: Any, scale_by_processes: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale_by_processes = scale_by_processes

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        host: Any = self
        scale = processes(host, num_items_in_batch) if self.scale_by_processes else 1
        if return_outputs:  # its caller wants logits
            base: Any = super()
            loss, outputs = base.compute_loss(model, inputs, True, num_items_in_batch)
            return loss * scale, outputs
        batch = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        labels = next_labels(inputs["labels"])
        host.teacher_model.eval()
        _refuse_sharded_teacher(host.teacher_model)
        with torch.no_grad():
            given = hidden_states(host.teacher_model, **batch)

        def loss_of(student: Any, **batch: Any) -> Tensor:
            return linear_divergence(
                **head_of(student).keywords(last_hidden(student, **batch)),
                teacher=head_of(host.teacher_model).teacher(given),
                kind="jsd",
                beta=host.beta,
                labels=labels,
                denom=num_items_in_batch,
            )

        return run_inside(model, loss_of, **batch) * scale


def _no_cache(host: Any, ids: Tensor, mask: Tensor, keep: int) -> dict[str, Any]:
    """Inputs of a pass whose last `keep` positions and the one before are wanted."""
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "logits_to_keep" in host.model_kwarg_keys:
        inputs["logits_to_keep"] = keep + 1
    return inputs


def _of_completion(hidden: Tensor, keep: int) -> Tensor:
    """The hidden states that predict the last `keep` tokens."""
    return hidden[:, :-1][:, -keep:]


class SDFTLoss:
    """`SDFTTrainer.compute_loss` from hidden states, in its three modes.

    A teacher behind a vLLM server is left to TRL's own path.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        host: Any = self
        if return_outputs or host.use_teacher_server:
            base: Any = super()
            return base.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        ids, completion_mask = inputs["completion_ids"], inputs["completion_mask"]
        keep = ids.size(1)
        counts = completion_mask != 0
        if host.num_loss_tokens_to_skip > 0:
            position = torch.arange(keep, device=ids.device)
            counts = counts & (position >= host.num_loss_tokens_to_skip)
        teacher = self._teacher(host, inputs, keep)

        def losses_of(student: Any, **batch: Any) -> Tensor:
            hidden = _of_completion(last_hidden(student, **batch), keep)
            return self._per_token(host, head_of(student), hidden, teacher, inputs, counts)

        batch = _no_cache(
            host,
            torch.cat([inputs["prompt_ids"], ids], 1),
            torch.cat([inputs["prompt_mask"], completion_mask], 1),
            keep,
        )
        per_token = run_inside(model, losses_of, **batch)
        mask = counts.to(per_token.dtype)
        loss = ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
        mean = (per_token.detach() * mask).sum() / mask.sum().clamp(min=1)
        mode = "train" if model.training else "eval"
        host._log_self_distillation_metric(mode, host.accelerator.gather(mean).mean().item())
        steps = host.current_gradient_accumulation_steps if host.model.training else 1.0
        return loss / steps

    @staticmethod
    def _teacher(host: Any, inputs: dict[str, Any], keep: int) -> Hidden:
        batch = _no_cache(host, inputs["teacher_input_ids"], inputs["teacher_attention_mask"], keep)
        _refuse_sharded_teacher(host.teacher_model)
        with torch.no_grad(), host._get_teacher_context_for_self_distillation():
            hidden = _of_completion(hidden_states(host.teacher_model, **batch), keep)
            return head_of(host.teacher_model).teacher(hidden)

    @staticmethod
    def _per_token(
        host: Any,
        head: LinearHead,
        hidden: Tensor,
        teacher: Hidden,
        inputs: dict[str, Any],
        counts: Tensor,
    ) -> Tensor:
        from trl.experimental.sdft.loss_utils import apply_importance_sampling_clipping

        args, temperature = host.args, host.temperature
        ids = inputs["completion_ids"].masked_fill(~counts, IGNORED)
        student = head.keywords(hidden)
        common: dict[str, Any] = {"kind": "jsd", "beta": args.distillation_alpha, "labels": ids}
        common.update(temperature=temperature, reduction="none")
        logprobs: Tensor | None = None
        if args.distillation_mode == "topk_logits":
            if args.distillation_topk is None:
                raise ValueError("distillation_mode='topk_logits' needs distillation_topk")
            support = _student_support(
                student, teacher, counts, args.distillation_topk, temperature,
                "bucket" if args.distillation_add_tail else "renorm",
            )  # fmt: skip
            per_token = linear_divergence(**student, teacher=support, **common)
        elif args.distillation_mode == "full_logits":
            per_token = linear_divergence(**student, teacher=teacher, **common)
        elif args.distillation_mode == "sampled_token":
            if args.distillation_alpha != 1.0:
                raise ValueError(
                    "distillation_mode='sampled_token' offers reverse KL only, distillation_alpha="
                    f"1.0; got {args.distillation_alpha}"
                )
            logprobs = token_logprobs(**student, ids=ids, temperature=temperature)
            per_token = (logprobs.detach() - _given(teacher, ids, temperature)) * logprobs
        else:
            raise ValueError(
                "distillation_mode must be one of 'topk_logits', 'full_logits', 'sampled_token'; "
                f"got {args.distillation_mode!r}"
            )
        old = inputs.get("old_per_token_logps")
        if args.distillation_is_clip is not None and old is not None:
            if logprobs is None:
                with torch.no_grad():
                    logprobs = token_logprobs(**student, ids=ids, temperature=temperature)
            # What does not count may hold anything.
            old = torch.where(counts, old, logprobs.detach())
            per_token = apply_importance_sampling_clipping(
                per_token, logprobs, old, args.distillation_is_clip
            )
        return per_token

    def _compute_rollout_logps(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
    ) -> Tensor | None:
        host: Any = self
        every = host.args.steps_per_generation * host.num_iterations
        if host.args.gradient_accumulation_steps % every == 0:
            return None
        keep = completion_ids.size(1)
        batch = _no_cache(
            host,
            torch.cat([prompt_ids, completion_ids], 1),
            torch.cat([prompt_mask, completion_mask], 1),
            keep,
        )

        def logprobs_of(model: Any, **batch: Any) -> Tensor:
            student = head_of(model).keywords(_of_completion(last_hidden(model, **batch), keep))
            return token_logprobs(**student, ids=completion_ids, temperature=host.temperature)

        with torch.no_grad():
            return run_inside(host.model, logprobs_of, **batch)


def _given(teacher: Hidden, ids: Tensor, temperature: float) -> Tensor:
    with torch.no_grad():
        return token_logprobs(**vars(teacher), ids=ids, temperature=temperature)


def _student_support(
    student: dict[str, Any], teacher: Hidden, counts: Tensor, k: int, temperature: float, tail: str
) -> TopK:
    """The teacher's log-probs of the student's k likeliest tokens, of the rows that count."""
    lead = counts.shape
    rows = counts.flatten().nonzero().flatten()
    ids = torch.zeros((counts.numel(), k), dtype=torch.int64, device=counts.device)
    with torch.no_grad():
        flat = {**student, "hidden": student["hidden"].flatten(0, -2).index_select(0, rows)}
        pupil = LinearHead(nn.Identity(), **{n: x for n, x in flat.items() if n != "hidden"})
        given = {n: x for n, x in vars(teacher).items() if n != "hidden"}
        master = LinearHead(nn.Identity(), **given)
        taught = teacher.hidden.flatten(0, -2).index_select(0, rows)
        logprobs = taught.new_zeros(ids.shape, dtype=torch.float32)
        for (block, z), (_, q) in zip(
            pupil.logits(flat["hidden"], temperature),
            master.logits(taught, temperature),
            strict=True,
        ):
            picked = z.topk(k, 1).indices
            ids[rows[block]] = picked
            logprobs = logprobs.to(q.dtype)
            logprobs[rows[block]] = q.gather(1, picked) - q.logsumexp(1, keepdim=True)
    return TopK(ids.reshape(*lead, k), logprobs.reshape(*lead, k), tail, temperature)  # type: ignore[arg-type]


class DPOLoss:
    """`DPOTrainer` whose per-token log-probs come from `cl_fast.losses.token_logprobs`.

    TRL's trainer asks its models for log-probs instead of logits; this replaces what answers. So
    every loss type, f-divergence, weighting, reference and metric of TRL is there, by TRL's code.

    Attributes:
        token_metrics: TRL logs `logits/chosen`, `logits/rejected` and `mean_token_accuracy`, which
            cost one more product with the head. False leaves the three out of the logs; it may be
            set at any time.
    """

    token_metrics = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        host: Any = self
        weighted = ("log_sum_sq_probs",) if host.use_weighting else ()
        trainer = weakref.ref(self)  # the model may outlive it

        def fields() -> tuple[str, ...]:
            mine = trainer()
            measured = mine is None or mine.token_metrics
            return ("entropy", *(("mean_logits", "is_top1") if measured else ()), *weighted)

        _answer_with_logprobs(unwrap(host.model), fields)
        if host.ref_model is not None:
            _answer_with_logprobs(unwrap(host.ref_model), tuple)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        base: Any = super()
        result = base._compute_loss(model, inputs, return_outputs)
        if not self.token_metrics:
            metrics = self._metrics["train" if model.training else "eval"]  # type: ignore[attr-defined]
            for name in ("logits/chosen", "logits/rejected", "mean_token_accuracy"):
                metrics.pop(name, None)
        return result


def _answer_with_logprobs(model: Any, fields_now: Callable[[], tuple[str, ...]]) -> None:
    """`model(..., labels=labels, fused_lm_head=True)` returns log-probs and the fields of now.

    A deep copy of the model binds the method to itself, so the method must hold no module.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    patched = model.get_base_model() if hasattr(model, "get_base_model") else model
    function = _before_trl(patched.forward)
    bound = getattr(function, "__self__", None) is patched
    if bound:
        function = function.__func__

    @functools.wraps(type(patched).forward)  # generate() reads the signature
    def answering(
        inner: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        forward = functools.partial(function, inner) if bound else function
        if not fused_lm_head:
            own = {
                "labels": labels,
                "shift_labels": shift_labels,
                "num_items_in_batch": num_items_in_batch,
            }
            return forward(*args, **kwargs, **{k: v for k, v in own.items() if v is not None})
        fields = fields_now()
        hidden, output = capture(inner, forward, *args, **{**kwargs, "use_cache": False})
        if shift_labels is None:
            assert labels is not None
            hidden, targets = hidden[:, :-1], labels[:, 1:]
        else:
            targets = shift_labels
        head = head_of(inner)
        mask = targets != IGNORED
        logprobs, entropy = token_logprobs(
            **head.keywords(hidden), ids=targets, ignore_index=IGNORED, entropy=True
        )
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = -logprobs.sum() / count
        auxiliary = getattr(output, "aux_loss", None)
        if auxiliary is not None:
            config = inner.config.get_text_config()
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * auxiliary
        measured = _measured(head, hidden, targets, mask, fields)
        return FusedCausalLMOutput(
            loss=loss,
            log_probs=logprobs,
            entropy=entropy if "entropy" in fields else None,
            label_mask=mask,
            aux_loss=auxiliary,
            **measured,
        )

    patched.forward = types.MethodType(answering, patched)


def _before_trl(forward: Any) -> Any:
    """The forward that TRL's `add_fused_lm_head` has replaced, if it has: its own holds the model
    in a closure, which a deep copy of the model would go on to run."""
    code = getattr(getattr(forward, "__func__", None), "__code__", None)
    if code is None or "original_forward" not in code.co_freevars:
        return forward
    cells = forward.__func__.__closure__
    return cells[code.co_freevars.index("original_forward")].cell_contents


def _measured(
    head: LinearHead, hidden: Tensor, targets: Tensor, mask: Tensor, fields: tuple[str, ...]
) -> dict[str, Tensor]:
    """What TRL logs of the logits themselves, or weights by, of the tokens that count."""
    out = {
        "mean_logits": torch.zeros(mask.shape, device=mask.device),
        "is_top1": torch.zeros_like(mask),
        "log_sum_sq_probs": torch.zeros(mask.shape, device=mask.device),
    }
    wanted = [name for name in out if name in fields]
    rows = mask.flatten().nonzero().flatten()
    flat, ids = hidden.detach().flatten(0, -2).index_select(0, rows), targets.flatten()[rows]
    for block, z in head.logits(flat) if wanted else ():
        found: dict[str, Tensor] = {}
        if "mean_logits" in wanted:
            found["mean_logits"] = z.mean(1).float()
        if "is_top1" in wanted:
            found["is_top1"] = z.argmax(1) == ids[block]
        if "log_sum_sq_probs" in wanted:
            found["log_sum_sq_probs"] = (2 * z.log_softmax(1)).logsumexp(1).float()
        for name, values in found.items():
            out[name].view(-1)[rows[block]] = values
    if "is_top1" not in wanted and "entropy" in fields:  # left out of the logs, but read
        wanted += ["mean_logits", "is_top1"]
    return {name: out[name] for name in dict.fromkeys(wanted)}


class DistillationLoss:
    """`trl.DistillationTrainer` with `linear_divergence` in place of its chunked loss."""

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        host: Any = self
        ids, completion_mask = inputs["completion_ids"], inputs["completion_mask"]
        if any(name in inputs for name in _MULTIMODAL):
            base: Any = super()
            return base._compute_loss(unwrapped_student, inputs, num_items_in_batch)  # type: ignore[no-any-return]
        counts = completion_mask != 0
        if "tool_mask" in inputs:
            counts = counts & (inputs["tool_mask"] != 0)
        keep = ids.size(1)
        whole = (
            torch.cat([inputs["prompt_ids"], ids], 1),
            torch.cat([inputs["prompt_mask"], completion_mask], 1),
        )
        batch = _no_cache(host, *whole, keep)
        host.teacher_model.eval()
        _refuse_sharded_teacher(host.teacher_model)
        with torch.no_grad():
            taught = _of_completion(hidden_states(host.teacher_model, **batch), keep)
            teacher = head_of(host.teacher_model).teacher(taught)
        hidden = _of_completion(last_hidden(unwrapped_student, **batch), keep)
        student = head_of(unwrapped_student).keywords(hidden)
        labels = ids.masked_fill(~counts, IGNORED)
        loss = linear_divergence(
            **student, teacher=teacher, kind="jsd", beta=host.beta, labels=labels,
            temperature=host.temperature, denom=num_items_in_batch,
        )  # fmt: skip
        with torch.no_grad():
            _, entropy = token_logprobs(
                **student, ids=labels, entropy=True, temperature=host.temperature
            )
        return loss, entropy.sum(), counts.sum()


_MULTIMODAL = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
