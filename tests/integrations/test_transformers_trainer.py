"""Distillation in a real Trainer of transformers: its gradients are those of eager code."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCABULARY, NoLogits, batch, gemma2, gradients, llama
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from cl_fast.integrations.transformers import DistillMixin, distill_loss_func, next_labels
from cl_fast.losses import TeacherCache


class Distiller(DistillMixin, Trainer):
    """What a user would write."""


EIGHT = batch(seed=3, size=8)
# Rows with unlike numbers of labels, so that a mean of means would be wrong.
for _row in range(8):
    EIGHT["labels"][_row, 8 - _row % 5 :] = -100
ROWS = [{k: v[i] for k, v in EIGHT.items()} for i in range(8)]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 1,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        **changes,
    }
    return TrainingArguments(**options)


class Gradients(TrainerCallback):
    """Keeps them from just before the optimiser's step."""

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.seen = gradients(model)


def trained(trainer: Trainer) -> tuple[dict[str, Tensor], float]:
    keeper = Gradients()
    trainer.add_callback(keeper)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return keeper.seen, losses[-1]


def eager(student: nn.Module, teacher: nn.Module, ce_weight: float = 0.0) -> Tensor:
    """KL(student, teacher) at temperature 2 over all eight rows."""
    inputs = {k: EIGHT[k] for k in ("input_ids", "attention_mask")}
    labels = next_labels(EIGHT["labels"])
    student.train()
    z = student(**inputs).logits
    with torch.no_grad():
        q = (teacher.eval()(**inputs).logits / 2).log_softmax(-1)
    p = (z / 2).log_softmax(-1)
    rows = (p.exp() * (p - q)).sum(-1)
    counts = labels != -100
    loss = rows[counts].mean()
    return loss + ce_weight * nn.functional.cross_entropy(z[counts], labels[counts])


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        tolerance = 1e-5 * float(gradient.abs().max()) + 1e-8
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=tolerance, msg=name)


@pytest.mark.parametrize("make", [llama, gemma2])
@pytest.mark.parametrize("steps", [1, 4])
def test_gradient_and_loss_do_not_depend_on_accumulation(
    make: Callable[..., nn.Module], steps: int, tmp_path: Path
) -> None:
    student, teacher = make(0), make(1)
    expected = eager(student, teacher, ce_weight=0.3)
    expected.backward()
    wanted = gradients(student)
    student.zero_grad()
    split = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
    trainer = Distiller(
        student,
        arguments(tmp_path, **split),
        train_dataset=ROWS,
        teacher=teacher,
        kind="reverse_kl",
        temperature=2.0,
        ce_weight=0.3,
    )
    with NoLogits(8 // steps * 9):
        found, loss = trained(trainer)
    assert_same(found, wanted)
    assert loss == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("steps", [1, 4])
def test_loss_function_of_a_plain_trainer(steps: int, tmp_path: Path) -> None:
    student, teacher = llama(0), llama(1)
    expected = eager(student, teacher, ce_weight=0.3)
    expected.backward()
    wanted = gradients(student)
    student.zero_grad()
    split = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
    loss_func = distill_loss_func(
        teacher, student, kind="reverse_kl", temperature=2.0, ce_weight=0.3
    )
    trainer = Trainer(
        student, arguments(tmp_path, **split), train_dataset=ROWS, compute_loss_func=loss_func
    )
    found, loss = trained(trainer)
    assert_same(found, wanted)
    assert loss == pytest.approx(float(expected), rel=1e-3)


def test_teacher_of_columns(tmp_path: Path) -> None:
    """All ids of the vocabulary as top-k: the full loss."""
    student, teacher = llama(0), llama(1).eval()
    inputs = {k: EIGHT[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logprobs, ids = (teacher(**inputs).logits / 2).log_softmax(-1).sort(-1, descending=True)
    rows = [
        {**row, "teacher_ids": i, "teacher_logprobs": q}
        for row, i, q in zip(ROWS, ids, logprobs, strict=True)
    ]
    expected = eager(student, teacher)
    expected.backward()
    wanted = gradients(student)
    student.zero_grad()
    options = {"kind": "reverse_kl", "temperature": 2.0, "columns_temperature": 2.0}
    trainer = Distiller(student, arguments(tmp_path), train_dataset=rows, **options)
    found, _ = trained(trainer)
    assert_same(found, wanted)
    both = Distiller(student, arguments(tmp_path), train_dataset=rows, teacher=teacher)
    with pytest.raises(ValueError, match="one of them"):
        both.train()


def test_columns_of_another_temperature_are_refused(tmp_path: Path) -> None:
    """What is outside of them is not known at the student's."""
    rows = [
        {**row, "teacher_ids": torch.arange(3).expand(9, 3), "teacher_logprobs": -torch.ones(9, 3)}
        for row in ROWS
    ]
    trainer = Distiller(
        llama(), arguments(tmp_path), train_dataset=rows, temperature=2.0, columns_temperature=3.0
    )
    with pytest.raises(ValueError, match="made at temperature 3, and its tail"):
        trainer.train()


def test_teacher_of_a_cache(tmp_path: Path) -> None:
    """Its positions are aligned with ours: all ids are the full loss, up to float16."""
    student, teacher = llama(0), llama(1)
    expected = eager(student, teacher)
    expected.backward()
    wanted = gradients(student)
    student.zero_grad()
    cache = TeacherCache.build(
        teacher, ROWS, VOCABULARY, path=tmp_path / "cache", temperature=2.0, progress=False
    )
    options = {"kind": "reverse_kl", "temperature": 2.0}
    data = cache.attach(ROWS)  # which tells the temperature of its columns
    trainer = Distiller(student, arguments(tmp_path), train_dataset=data, **options)
    found, loss = trained(trainer)
    assert loss == pytest.approx(float(expected), rel=0.01)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() < 0.01 * gradient.norm(), name


def test_base_of_an_adapter_is_its_teacher(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"r": 4, "target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.0}
    student = get_peft_model(llama(0), LoraConfig(**options))
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    expected = eager(student, llama(0))
    expected.backward()
    wanted = gradients(student)
    student.zero_grad()
    trainer = Distiller(
        student,
        arguments(tmp_path),
        train_dataset=ROWS,
        teacher="base",
        kind="reverse_kl",
        temperature=2.0,
    )
    with NoLogits(8 * 9):
        found, _ = trained(trainer)
    assert any("lm_head.lora_A" in name for name in found)
    assert_same(found, wanted)


def test_adapters_that_were_frozen_stay_so_beside_their_base(tmp_path: Path) -> None:
    """PEFT marks all parameters of the adapters that it switches on again as trainable."""
    student = get_peft_model(llama(0), LoraConfig(r=2, target_modules=["q_proj"]))
    first = [p for n, p in student.named_parameters() if "lora" in n and "layers.0" in n]
    for parameter in first:
        parameter.requires_grad_(False)
    before = {n: p.requires_grad for n, p in student.named_parameters()}
    trainer = Distiller(student, arguments(tmp_path), train_dataset=ROWS, teacher="base")
    trainer.compute_loss(student, dict(EIGHT)).backward()
    assert {n: p.requires_grad for n, p in student.named_parameters()} == before
    assert first
    assert all(parameter.grad is None for parameter in first)


def test_token_weights_count(tmp_path: Path) -> None:
    student, teacher = llama(0), llama(1)
    weights = torch.rand(8, 9)
    rows = [{**row, "token_weight": w} for row, w in zip(ROWS, weights, strict=True)]
    trainer = Distiller(student, arguments(tmp_path), train_dataset=rows, teacher=teacher)
    weighted, _ = trained(trainer)
    zero = [{**row, "token_weight": torch.zeros(9)} for row in ROWS]
    trainer = Distiller(llama(0), arguments(tmp_path), train_dataset=zero, teacher=teacher)
    nothing, loss = trained(trainer)
    assert loss == 0
    assert all(not gradient.any() for gradient in nothing.values())
    assert any(gradient.any() for gradient in weighted.values())


def test_it_learns_and_evaluates(tmp_path: Path) -> None:
    student, teacher = llama(0), llama(1)
    before = copy.deepcopy(teacher.state_dict())
    options = {"learning_rate": 5e-3, "max_steps": 30, "logging_steps": 30, "bf16": False}
    trainer = Distiller(
        student,
        arguments(tmp_path, **options),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        teacher=teacher,
    )
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    with NoLogits(8 * 9):
        end = trainer.evaluate()["eval_loss"]
    assert end < 0.7 * start
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_autocast_of_the_trainer_reaches_the_head(tmp_path: Path) -> None:
    student, teacher = llama(0), llama(1)
    eager(student, teacher).backward()
    wanted = gradients(student)
    student.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = eager(student, teacher)
    loss.backward()
    low = gradients(student)
    student.zero_grad()
    trainer = Distiller(
        student,
        arguments(tmp_path, bf16=True),
        train_dataset=ROWS,
        teacher=teacher,
        kind="reverse_kl",
        temperature=2.0,
    )
    found, _ = trained(trainer)

    def distance(given: dict[str, Tensor]) -> float:
        return sum(float((given[k] - g).norm() / g.norm()) for k, g in wanted.items())

    # bfloat16 took part, and did no more harm than it does in eager code.
    assert 1e-4 < distance(found) < 1.25 * distance(low)


@pytest.mark.parametrize(
    ("changes", "given", "words"),
    [
        ({}, {"compute_metrics": lambda _: {}}, "compute_metrics needs logits"),
        ({}, {"compute_loss_func": lambda *_, **__: 0}, "compute_loss_func needs logits"),
        ({"label_smoothing_factor": 0.1}, {}, "label_smoother needs logits"),
        ({}, {"teacher": "itself"}, "teacher must be a model, 'base' or None; got 'itself'"),
        ({}, {"teacher": "base"}, "needs a PEFT model"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    changes: dict[str, Any], given: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        Distiller(llama(), arguments(tmp_path, **changes), train_dataset=ROWS, **given)


def test_no_teacher_is_refused(tmp_path: Path) -> None:
    trainer = Distiller(llama(), arguments(tmp_path), train_dataset=ROWS)
    with pytest.raises(ValueError, match="no teacher"):
        trainer.train()


def test_predictions_are_refused(tmp_path: Path) -> None:
    trainer = Distiller(llama(), arguments(tmp_path), train_dataset=ROWS, teacher=llama(1))
    with pytest.raises(ValueError, match="predictions are logits"):
        trainer.predict(ROWS)


def test_no_labels_are_refused(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in ROWS]
    trainer = Distiller(llama(), arguments(tmp_path), train_dataset=rows, teacher=llama(1))
    with pytest.raises(ValueError, match="needs labels"):
        trainer.train()


def test_a_student_that_is_not_trained_is_noticed(tmp_path: Path) -> None:
    loss_func = distill_loss_func(llama(1), llama(2))
    trainer = Trainer(
        llama(0), arguments(tmp_path), train_dataset=ROWS, compute_loss_func=loss_func
    )
    with pytest.raises(ValueError, match="student's forward was not seen"):
        trainer.train()


def test_a_loss_function_is_replaced_and_removed() -> None:
    student = llama(0)
    first = distill_loss_func(llama(1), student)
    inputs = {k: EIGHT[k].clone() for k in ("input_ids", "attention_mask")}
    held = weakref.ref(inputs["attention_mask"])
    student(**inputs)
    second = distill_loss_func(llama(1), student)  # in place of the first
    assert len(student._forward_pre_hooks) == 1
    del inputs
    assert held() is None, "a function that was replaced holds a batch"
    inputs = {k: EIGHT[k].clone() for k in ("input_ids", "attention_mask")}
    held = weakref.ref(inputs["attention_mask"])
    outputs = student(**inputs)
    with pytest.raises(ValueError, match="forward was not seen"):
        first(outputs, EIGHT["labels"])
    first.remove()  # of what is gone: the second stays
    assert float(second(outputs, EIGHT["labels"]).detach()) > 0
    del inputs, outputs
    assert held() is None, "a batch is held after its loss"
    student(**{k: EIGHT[k].clone() for k in ("input_ids", "attention_mask")})
    second.remove()
    second.remove()
    assert not student._forward_pre_hooks
    with pytest.raises(ValueError, match="forward was not seen"):
        second({"logits": torch.zeros(8, 9, VOCABULARY)}, EIGHT["labels"])


def test_a_batch_is_dropped_where_the_teacher_fails() -> None:
    student, teacher = llama(0), llama(1, num_hidden_layers=1)
    loss_func = distill_loss_func(teacher, student)
    outputs = student(**{k: EIGHT[k] for k in ("input_ids", "attention_mask")})
    teacher.forward = None
    with pytest.raises(TypeError):
        loss_func(outputs, EIGHT["labels"])
    with pytest.raises(ValueError, match="forward was not seen"):
        loss_func(outputs, EIGHT["labels"])


def test_labels_are_shifted_without_copying_logits() -> None:
    labels = torch.tensor([[1, 2, -100, 4]])
    assert next_labels(labels).tolist() == [[2, -100, 4, -100]]


def test_labels_that_are_shifted_already(tmp_path: Path) -> None:
    """As collators of packed sequences and context parallelism give them."""
    trainer = Distiller(llama(), arguments(tmp_path), train_dataset=ROWS, teacher=llama(1))
    expected = trainer.compute_loss(trainer.model, dict(EIGHT))
    shifted = {**EIGHT, "shift_labels": next_labels(EIGHT["labels"])}
    shifted["labels"] = torch.full_like(EIGHT["labels"], 5)
    assert torch.equal(trainer.compute_loss(trainer.model, shifted), expected)


def test_columns_survive_the_trainer(tmp_path: Path) -> None:
    trainer = Distiller(llama(), arguments(tmp_path), train_dataset=ROWS, teacher=llama(1))
    trainer._set_signature_columns_if_needed()
    columns = {"teacher_ids", "teacher_logprobs", "token_weight", "input_ids"}
    assert columns <= set(trainer._signature_columns)


def test_a_model_is_not_its_own_teacher(tmp_path: Path) -> None:
    student = llama(0)
    with pytest.raises(ValueError, match="would chase itself"):
        Distiller(student, arguments(tmp_path), train_dataset=ROWS, teacher=student)
