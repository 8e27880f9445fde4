"""torchtitan's contract, with a stand-in of its trainer's calls and of its base classes."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

V, H, B, L = 61, 16, 2, 8


class Decoder(nn.Module):
    """As torchtitan's: labels are shifted by its data, the head can be skipped."""

    _skip_lm_head = False

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tok_embeddings = nn.Embedding(V, H)
        self.layer = nn.Linear(H, H)
        self.lm_head = nn.Linear(H, V, bias=False)
        nn.init.normal_(self.lm_head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.layer(self.tok_embeddings(tokens)))
        return h if self._skip_lm_head else self.lm_head(h)


def step(
    model: nn.Module, loss_fn: Any, batches: list[tuple[Tensor, Tensor, dict[str, Tensor]]]
) -> Tensor:
    """One step of accumulation as torchtitan's trainer makes it."""
    valid = sum((labels != -100).sum() for _, labels, _ in batches)
    total = torch.zeros(())
    for tokens, labels, inputs in batches:
        pred = model(tokens)
        loss, metrics = loss_fn(pred, labels, valid, positions=torch.arange(L), **inputs)
        assert metrics == {}
        loss.backward()
        total += loss.detach()
    return total


def data(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (B, L + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[0, : 2 + seed] = -100
    return ids[:, :-1], labels


def batches(teacher: Decoder, form: str) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    made = []
    for seed in range(2):
        tokens, labels = data(seed)
        with torch.no_grad():
            teacher._skip_lm_head = True
            hidden = teacher(tokens)
            z = teacher.lm_head(hidden)
        if form == "teacher_logits":
            inputs = {form: z}
        elif form == "teacher_hidden":
            inputs = {form: hidden}
        else:
            logprobs, ids = z.log_softmax(-1).sort(-1, descending=True)
            inputs = {"teacher_ids": ids, "teacher_logprobs": logprobs}
        made.append((tokens, labels, inputs))
    return made


def eager(model: Decoder, teacher: Decoder) -> Tensor:
    """Reverse KL, mean over the valid tokens of both batches."""
    rows = []
    for tokens, labels, inputs in batches(teacher, "teacher_logits"):
        p, q = model(tokens).log_softmax(-1), inputs["teacher_logits"].log_softmax(-1)
        rows.append((p.exp() * (p - q)).sum(-1)[labels != -100])
    return torch.cat(rows).mean()


def host() -> types.ModuleType:
    """What torchtitan.components.loss has, as far as our classes and its trainer look."""

    class Configurable:
        @dataclass(kw_only=True, slots=True)
        class Config:
            _owner: ClassVar[type | None] = None

            def build(self, **given: Any) -> Any:
                return self._owner(config=replace(self), **given)

        def __init_subclass__(cls, **given: Any) -> None:
            super().__init_subclass__(**given)
            config = cls.__dict__.get("Config")
            if config is not None:
                assert "__slots__" in config.__dict__, "torchtitan wants slots"
                config._owner = cls

    class BaseLoss(Configurable):
        @dataclass(kw_only=True, slots=True)
        class Config(Configurable.Config):
            pass

        def __call__(self, pred: Any, labels: Any, valid: Any = None, **_: Any) -> Any:
            raise NotImplementedError

    class ChunkedLossWrapper(BaseLoss):
        """Forward and backward by chunks of the sequence; the inner loss sees chunks."""

        @dataclass(kw_only=True, slots=True)
        class Config(BaseLoss.Config):
            num_chunks: int = 4
            loss_fn: Any = field(default=None)

        def __init__(self, config: Any, *, compile_config: Any = None) -> None:
            self.num_chunks = config.num_chunks
            self.loss_fn = config.loss_fn.build(compile_config=compile_config)

        def set_lm_head(self, lm_head: nn.Module) -> None:
            self.lm_head = lm_head

        def __call__(self, pred: Any, labels: Any, valid: Any = None, **inputs: Any) -> Any:
            total = torch.zeros(())
            pieces = pred.chunk(self.num_chunks, 1), labels.chunk(self.num_chunks, 1)
            for i, (h, y) in enumerate(zip(*pieces, strict=True)):
                part = {
                    k: v.chunk(self.num_chunks, 1)[i] if v.dim() > 1 else v
                    for k, v in inputs.items()
                }
                loss, metrics = self.loss_fn(self.lm_head(h), y, valid, **part)
                assert metrics == {}
                total = total + loss
            return total, {}

    module = types.ModuleType("torchtitan.components.loss")
    vars(module).update(BaseLoss=BaseLoss, ChunkedLossWrapper=ChunkedLossWrapper)
    return module


NAME = "cl_fast.integrations.torchtitan"


@pytest.fixture(params=["alone", "hosted"])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if request.param == "hosted":
        for name in ("torchtitan", "torchtitan.components"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "torchtitan.components.loss", host())
    sys.modules.pop(NAME, None)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


FORMS = ["teacher_logits", "teacher_ids", "teacher_hidden"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_contract(module: Any, form: str, linear: bool, compiled: bool) -> None:
    student, teacher = Decoder(0), Decoder(1)
    expected = eager(student, teacher)
    expected.backward()
    wanted = {n: p.grad for n, p in student.named_parameters()}
    student.zero_grad()
    settings = SimpleNamespace(enable=compiled, components=["loss"], backend="eager")
    kind = module.LinearDivergenceLoss if linear else module.DivergenceLoss
    loss_fn = kind.Config(kind="reverse_kl").build(compile_config=settings)
    loss_fn.set_teacher_head(teacher.lm_head)
    if linear:
        loss_fn.set_lm_head(student.lm_head)
        student._skip_lm_head = True
    total = step(student, loss_fn, batches(teacher, form))
    torch.testing.assert_close(total, expected.detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6, msg=name)
    assert "forward" not in student.lm_head.__dict__


@pytest.mark.parametrize("form", FORMS)
def test_as_the_inner_loss_of_the_chunked_wrapper(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    titan = host()
    for name in ("torchtitan", "torchtitan.components"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "torchtitan.components.loss", titan)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    module = importlib.import_module(NAME)
    student, teacher = Decoder(0), Decoder(1)
    expected = eager(student, teacher)
    inner = module.DivergenceLoss.Config(kind="reverse_kl")
    loss_fn = titan.ChunkedLossWrapper.Config(loss_fn=inner).build()
    loss_fn.set_lm_head(student.lm_head)
    loss_fn.loss_fn.set_teacher_head(teacher.lm_head)
    student._skip_lm_head = True
    total = step(student, loss_fn, batches(teacher, form))
    torch.testing.assert_close(total, expected.detach(), rtol=1e-5, atol=1e-6)
    linear = module.LinearDivergenceLoss.Config().build(compile_config=None)
    assert isinstance(linear, titan.ChunkedLossWrapper)  # so that the trainer sets its head
    monkeypatch.delitem(sys.modules, NAME)


def test_without_a_denominator_it_is_the_sum(module: Any) -> None:
    student, teacher = Decoder(0), Decoder(1)
    loss_fn = module.DivergenceLoss.Config().build()
    (tokens, labels, inputs), *_ = batches(teacher, "teacher_logits")
    total, _ = loss_fn(student(tokens), labels, **inputs)
    count = (labels != -100).sum()
    mean, _ = loss_fn(student(tokens), labels, count, **inputs)
    torch.testing.assert_close(total, mean * count)
    weighted, _ = loss_fn(student(tokens), labels, token_weight=torch.full((B, L), 2.0), **inputs)
    torch.testing.assert_close(weighted, 2 * total)


def test_logits_of_a_low_precision_teacher_are_not_rounded(module: Any) -> None:
    torch.manual_seed(0)
    pred, labels = torch.randn(B, L, V), torch.zeros(B, L, dtype=torch.long)
    head = nn.Linear(H, V).bfloat16()
    hidden = (3 * torch.randn(B, L, H)).bfloat16()
    loss_fn = module.DivergenceLoss.Config(
        teacher_logit_scale=3.0, teacher_softcap=20.0, temperature=0.5
    ).build()
    loss_fn.set_teacher_head(head)
    loss, _ = loss_fn(pred, labels, teacher_hidden=hidden)
    z = nn.functional.linear(hidden.double(), head.weight.double(), head.bias.double())
    q = (20 * torch.tanh(3 * z / 20) / 0.5).log_softmax(-1)
    p = (pred.double() / 0.5).log_softmax(-1)
    exact = (q.exp() * (q - p)).sum()
    # float32 from the accumulator; logits in bfloat16 are wrong by thousands of its roundings.
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("tail", ["bucket", "renorm"])
def test_columns_tell_their_temperature(module: Any, linear: bool, tail: str) -> None:
    """All ids at the student's temperature: nothing is tempered twice."""
    student, (tokens, labels) = Decoder(0), data(0)
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(B, L, V, generator=generator)
    logprobs, ids = (z / 2).log_softmax(-1).sort(-1, descending=True)
    kind = module.LinearDivergenceLoss if linear else module.DivergenceLoss
    loss_fn = kind.Config(temperature=2.0, columns_temperature=2.0, tail=tail).build()
    expected, _ = module.DivergenceLoss.Config(temperature=2.0).build()(
        student(tokens), labels, teacher_logits=z
    )
    if linear:
        loss_fn.set_lm_head(student.lm_head)
        student._skip_lm_head = True
    loss, _ = loss_fn(student(tokens), labels, teacher_ids=ids, teacher_logprobs=logprobs)
    torch.testing.assert_close(loss, expected)
    other = kind.Config(temperature=2.0, columns_temperature=3.0).build()
    if linear:
        other.set_lm_head(student.lm_head)
    with pytest.raises(ValueError, match="made at temperature 3, and its tail"):
        other(student(tokens), labels, teacher_ids=ids, teacher_logprobs=logprobs)


def test_what_is_missing_is_named(module: Any) -> None:
    (tokens, labels, inputs), *_ = batches(Decoder(1), "teacher_hidden")
    student = Decoder(0)
    leaf = module.DivergenceLoss.Config().build()
    with pytest.raises(ValueError, match="one of teacher_logits"):
        leaf(student(tokens), labels)
    with pytest.raises(ValueError, match="set_teacher_head"):
        leaf(student(tokens), labels, **inputs)
    linear = module.LinearDivergenceLoss.Config().build()
    with pytest.raises(ValueError, match="set_lm_head"):
        linear(student(tokens), labels, **inputs)


def test_a_broken_torchtitan_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder:
        @staticmethod
        def find_spec(name: str, *_: Any) -> None:
            if name == "torchtitan":
                raise ModuleNotFoundError("No module named 'spmd_types'", name="spmd_types")

    monkeypatch.delitem(sys.modules, NAME, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="spmd_types"):
        importlib.import_module(NAME)
    sys.modules.pop(NAME, None)
