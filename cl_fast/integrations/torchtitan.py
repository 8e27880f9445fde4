"""Loss classes of torchtitan's contract (0.3): sum over tokens, divided by global_valid_tokens.

    loss, metrics = loss_fn(pred, labels, global_valid_tokens, **per_token_inputs)

    DivergenceLoss         pred are logits; alone, or as the `loss_fn` of a ChunkedLossWrapper
    LinearDivergenceLoss   pred are hidden states; no logits, no loop over chunks

    DivergenceLoss.Config(kind="reverse_kl").build(compile_config=None)

The teacher comes as per-token inputs: `teacher_logits` [B, L, V], or `teacher_ids` and
`teacher_logprobs` [B, L, k], or `teacher_hidden` [B, L, Ht] with `set_teacher_head(head)`. Labels
are aligned with the rows, as torchtitan's are. Where torchtitan is installed the classes are
subclasses of its BaseLoss and ChunkedLossWrapper, so that its trainer hands them the head;
everywhere else they are the same classes on a plain base, for trainers with the same calls.

Where the vocabulary is split over ranks (tensor parallelism, loss parallel), tell the loss which:
`set_process_group(tp_mesh)`. The head, or the logits, is a DTensor or this rank's part, and so is
the teacher's; its top-k columns and hidden states are whole.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_fast.losses import Hidden, Logits, TopK, divergence_from_logits, linear_divergence, parallel
from cl_fast.losses.shards import Ranks
from cl_fast.models.heads import forward_replaced
from cl_fast.ops.heads import Head

__all__ = ["DivergenceLoss", "LinearDivergenceLoss"]

IGNORED = -100  # torchtitan's IGNORE_INDEX


class _PlainBase:
    """What torchtitan's BaseLoss gives: a Config that builds the class it belongs to."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        _owner: ClassVar[type | None] = None

        def build(self, **given: Any) -> Any:
            assert self._owner is not None
            return self._owner(config=replace(self), **given)

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        config = cls.__dict__.get("Config")
        if config is not None:
            config._owner = cls


def _bases() -> tuple[Any, Any]:
    """BaseLoss and ChunkedLossWrapper, or what stands for them."""
    try:
        host = importlib.import_module("torchtitan.components.loss")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "torchtitan":
            raise  # torchtitan is there and something that it needs is not
        return _PlainBase, _PlainBase
    return host.BaseLoss, host.ChunkedLossWrapper


_LEAF: Any
_CHUNKED: Any
_LEAF, _CHUNKED = _bases()


class _Shared:
    """The options of a config, the teacher of a batch, and the contract's division."""

    teacher_head: nn.Module | None = None
    fn: Callable[..., Tensor]

    def set_teacher_head(self, head: nn.Module) -> None:
        """The output head, a linear layer, of the teacher whose hidden states will come."""
        self.teacher_head = head

    def set_process_group(self, process_group: Any) -> None:
        """The ranks over which the vocabulary is split: a group, or a mesh of one dimension.

        None: each rank has the whole vocabulary.
        """
        self.options["process_group"] = process_group

    def _begin(self, config: Any, fn: Callable[..., Tensor], compile_config: Any) -> None:
        self.config = config
        self.options: dict[str, Any] = {
            "kind": config.kind,
            "beta": config.beta,
            "skew": config.skew,
            "temperature": config.temperature,
            "teacher_temperature": config.teacher_temperature,
            "pad_vocab": config.pad_vocab,
        }
        self.fn = fn
        enabled = compile_config is not None and compile_config.enable
        if enabled and "loss" in compile_config.components:
            self.fn = torch.compile(fn, backend=compile_config.backend)

    def _teacher(self, inputs: dict[str, Any]) -> Any:
        config: Any = self.config
        given = [k for k in ("teacher_logits", "teacher_ids", "teacher_hidden") if k in inputs]
        if len(given) != 1:
            raise ValueError(
                "the loss needs one of teacher_logits, teacher_ids (with teacher_logprobs) and "
                f"teacher_hidden among its per-token inputs; got {given or sorted(inputs)}"
            )
        if given[0] == "teacher_logits":
            return Logits(inputs["teacher_logits"].detach())
        if given[0] == "teacher_ids":
            top_k = inputs["teacher_ids"], inputs["teacher_logprobs"].detach()
            return TopK(*top_k, config.tail, config.columns_temperature)
        head: Any = self.teacher_head
        if head is None:
            raise ValueError("teacher_hidden needs set_teacher_head(head)")
        bias = getattr(head, "bias", None)
        return Hidden(
            inputs["teacher_hidden"].detach(),
            head.weight.detach(),
            None if bias is None else bias.detach(),
            config.teacher_logit_scale,
            config.teacher_softcap,
        )


def _scaled(loss: Tensor, global_valid_tokens: Tensor | None) -> Tensor:
    return loss if global_valid_tokens is None else loss / global_valid_tokens


class DivergenceLoss(_Shared, _LEAF):  # type: ignore[misc]
    """A divergence from logits, as a leaf loss.

    Config:
        kind, beta, skew, temperature, teacher_temperature, pad_vocab: see `linear_divergence`.
        tail, columns_temperature: of teacher_ids and teacher_logprobs, see `TopK`: what is outside
            of them, and the temperature at which they were made.
        logit_scale, softcap: still to be applied to the logits of the model.
        teacher_logit_scale, teacher_softcap: to those of `teacher_hidden` and its head.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(_LEAF.Config):  # type: ignore[misc]
        kind: str = "forward_kl"
        beta: float = 0.5
        skew: float = 0.1
        temperature: float = 1.0
        teacher_temperature: float | None = None
        pad_vocab: str | None = None
        tail: str = "bucket"
        columns_temperature: float = 1.0
        logit_scale: float = 1.0
        softcap: float | None = None
        teacher_logit_scale: float = 1.0
        teacher_softcap: float | None = None

    def __init__(self, config: Any, *, compile_config: Any = None) -> None:
        self._begin(config, divergence_from_logits, compile_config)
        self.options.update(logit_scale=config.logit_scale, softcap=config.softcap)

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and no metrics.

        Args:
            pred: logits [B, L, V].
            labels: [B, L]; -100 does not count.
            inputs: the teacher's; `token_weight` [B, L]; others have no effect.
        """
        teacher = self._teacher(inputs)
        if isinstance(teacher, Hidden):
            teacher = Logits(_logits(teacher, self.options.get("process_group")))
        loss = self.fn(
            pred, teacher, labels=labels, token_weight=inputs.get("token_weight"),
            reduction="sum", ignore_index=IGNORED, **self.options,
        )  # fmt: skip
        return _scaled(loss, global_valid_tokens), {}


@torch.no_grad()  # type: ignore[untyped-decorator]
def _logits(teacher: Hidden, process_group: Any) -> Tensor:
    """Of one chunk, float32: a leaf loss has the student's logits before it anyway."""
    if process_group is not None:
        part = parallel._teacher_shard(teacher, Ranks(process_group))
        assert isinstance(part, Hidden)
        hidden, weight, bias = part.hidden, part.weight, part.bias
    else:
        hidden = parallel.plain("teacher_hidden", teacher.hidden)
        weight = parallel.plain("teacher.weight", teacher.weight)
        bias = None if teacher.bias is None else parallel.plain("teacher.bias", teacher.bias)
    flat = hidden.flatten(0, -2)
    z = Head(flat, weight, bias).logits(slice(0, flat.size(0)))
    if teacher.logit_scale != 1.0:
        z *= teacher.logit_scale
    if teacher.softcap is not None:
        z = z.div_(teacher.softcap).tanh_().mul_(teacher.softcap)
    return z.unflatten(0, hidden.shape[:-1])


class LinearDivergenceLoss(_Shared, _CHUNKED):  # type: ignore[misc]
    """A divergence from hidden states; the trainer sets the head and skips it in the model.

    The loss is computed as the forward pass of the head module, so FSDP gathers its weight before
    and reduces its gradient after. The returned loss is differentiable once, like any other.

    Config: as for `DivergenceLoss`, and
        ce_weight: of an added cross-entropy of the labels at temperature 1.
        chunk_tokens: how many tokens' logits exist at once.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(_LEAF.Config):  # type: ignore[misc]  # not the wrapper's, whose chunks are not ours
        kind: str = "forward_kl"
        beta: float = 0.5
        skew: float = 0.1
        temperature: float = 1.0
        teacher_temperature: float | None = None
        pad_vocab: str | None = None
        tail: str = "bucket"
        columns_temperature: float = 1.0
        logit_scale: float = 1.0
        softcap: float | None = None
        teacher_logit_scale: float = 1.0
        teacher_softcap: float | None = None
        ce_weight: float = 0.0
        chunk_tokens: int | None = None

    def __init__(self, config: Any, *, compile_config: Any = None) -> None:
        self._begin(config, linear_divergence, compile_config)
        self.options.update(
            logit_scale=config.logit_scale,
            softcap=config.softcap,
            ce_weight=config.ce_weight,
            chunk_tokens=config.chunk_tokens,
        )
        self.lm_head: nn.Module | None = None

    def set_lm_head(self, lm_head: nn.Module) -> None:
        """The output head of the model; to be called before the first loss."""
        self.lm_head = lm_head

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and no metrics.

        Args:
            pred: hidden states [B, L, H].
            labels: [B, L]; -100 does not count.
            inputs: the teacher's; `token_weight` [B, L]; others have no effect.
        """
        head = self.lm_head
        if head is None:
            raise ValueError("set_lm_head(head) must be called before the first loss")
        loss_of = functools.partial(self._loss, head, labels, inputs)
        with forward_replaced(head, loss_of):
            loss = _unwrapped(head(pred))
        return _scaled(loss, global_valid_tokens), {}

    def _loss(self, head: Any, labels: Tensor, inputs: dict[str, Any], hidden: Any) -> Tensor:
        loss = self.fn(
            hidden, head.weight, self._teacher(inputs), bias=getattr(head, "bias", None),
            labels=labels, token_weight=inputs.get("token_weight"), reduction="sum",
            ignore_index=IGNORED, **self.options,
        )  # fmt: skip
        return _wrapped(loss, hidden)


def _wrapped(loss: Tensor, hidden: Any) -> Tensor:
    """A loss as what a head of tensor parallelism returns: each rank's column of a DTensor."""
    if not hasattr(hidden, "device_mesh"):
        return loss
    from torch.distributed.tensor import DTensor, Shard

    shape = [1] * hidden.dim()
    columns = [Shard(hidden.dim() - 1)] * hidden.device_mesh.ndim
    return DTensor.from_local(loss.reshape(shape), hidden.device_mesh, columns)


def _unwrapped(loss: Any) -> Tensor:
    """Of what the hooks of the head made of it."""
    if hasattr(loss, "device_mesh"):
        loss = loss.to_local()
    if loss.numel() == 0:
        raise ValueError(
            "the head splits its output by tokens, so that a rank is left without a loss: use "
            "ColwiseParallel(output_layouts=Shard(-1))"
        )
    if loss.numel() == 1:
        return loss.reshape(())
    # Gathered: the losses of all ranks, which are the same. Each rank is sent its own gradient.
    total = loss.sum()
    return loss.detach().flatten()[0] + (total - total.detach())
