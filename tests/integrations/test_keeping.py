"""Keeps in the trainers of transformers and TRL: when hooks run, and what a loss weighs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_models import VOCABULARY, NoLogits, llama, tokenizer
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from cl_fast.errors import CheckpointError
from cl_fast.integrations.keeping import STATE, KeepCallback, KeepMixin
from cl_fast.training import Keep, Task


class Recorder(Keep):
    """Writes down which hooks ran."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.steps = 0

    def before_task(self, model: nn.Module, task: Task) -> None:
        self.calls.append(f"before {task.name} {task.index}")

    def on_gradients(self, model: nn.Module) -> None:
        assert any(p.grad is not None for p in model.parameters())
        self.calls.append("gradients")

    def on_update(self, model: nn.Module) -> None:
        self.steps += 1
        self.calls.append("update")

    def after_task(self, model: nn.Module, task: Task) -> None:
        assert task.batches is not None
        batches = list(task.batches())
        assert all(isinstance(batch["input_ids"], Tensor) for batch in batches)
        self.calls.append(f"after {task.name}")

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]

    def measures(self) -> dict[str, float]:
        return {"recorder/steps": float(self.steps)}


class Pull(Keep):
    """A loss that does not depend on the batch: half the squared norm of one weight."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def loss(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        weight = next(p for p in model.parameters() if p.requires_grad)
        return 0.5 * self.factor * weight.square().sum()


class Gradients(Keep):
    """Keeps the gradients of the last step."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def on_gradients(self, model: nn.Module) -> None:
        self.seen = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class Keeping(KeepMixin, Trainer):
    """A Trainer with keeps."""


class KeepingSFT(KeepMixin, SFTTrainer):
    """TRL's, whose default loss makes no logits."""


class KeepingDPO(KeepMixin, DPOTrainer):
    """TRL's preference trainer."""


def rows(count: int = 8, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        **changes,
    }


def test_hooks_run_once_a_step_whatever_is_accumulated(tmp_path: Path) -> None:
    keep = Recorder()
    args = TrainingArguments(**options(tmp_path, gradient_accumulation_steps=2))
    trainer = Trainer(llama(), args, train_dataset=rows(), callbacks=[KeepCallback(keep, name="a")])
    trainer.train()
    step = ["gradients", "update"]
    assert keep.calls == ["before a 0", *step, *step, "after a"]


def test_measures_are_logged(tmp_path: Path) -> None:
    args = TrainingArguments(**options(tmp_path, logging_strategy="steps", logging_steps=1))
    trainer = Trainer(llama(), args, train_dataset=rows(), callbacks=[KeepCallback(Recorder())])
    trainer.train()
    logged = [x["recorder/steps"] for x in trainer.state.log_history if "recorder/steps" in x]
    assert logged == [1.0, 2.0]


def trained_gradients(kind: str, folder: Path, pieces: int, keeps: list[Keep]) -> dict[str, Tensor]:
    """Of one step over the same 8 examples in so many micro-batches."""
    last = Gradients()
    common = options(
        folder,
        max_steps=1,
        per_device_train_batch_size=8 // pieces,
        gradient_accumulation_steps=pieces,
    )
    torch.manual_seed(0)
    if kind == "dpo":
        pairs = [
            {"prompt": "the cat", "chosen": f" {a} on", "rejected": f" {b} under"}
            for a, b in [("sat", "ran"), ("ran", "sat"), ("mat", "tree"), ("tree", "mat")] * 2
        ]
        args = DPOConfig(**common, bf16=False, gradient_checkpointing=False)
        KeepingDPO(
            llama(), ref_model=llama(1), args=args, train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer(), keep=[*keeps, last],
        ).train()  # fmt: skip
    elif kind == "sft":
        texts = [
            {"text": f"the {a} sat on the {b}"} for a in ("cat", "dog") for b in ("mat", "tree")
        ]
        args = SFTConfig(**common, bf16=False, gradient_checkpointing=False, max_length=16)
        trainer = KeepingSFT(
            llama(), args=args, train_dataset=Dataset.from_list(texts * 2),
            processing_class=tokenizer(), keep=[*keeps, last],
        )  # fmt: skip
        # SFTTrainer makes its logits in chunks of 256 rows at least: these batches are smaller.
        trainer.train()
    else:
        args = TrainingArguments(**common)
        Keeping(llama(), args, train_dataset=rows(), keep=[*keeps, last]).train()
    return last.seen


@pytest.mark.parametrize("kind", ["plain", "sft", "dpo"])
def test_a_loss_counts_as_much_with_one_micro_batch_as_with_four(kind: str, tmp_path: Path) -> None:
    found = {
        (pieces, bool(keeps)): trained_gradients(kind, tmp_path / f"{pieces}", pieces, keeps)
        for pieces in (1, 4)
        for keeps in ([], [Pull(0.5)])
    }
    name = next(iter(found[1, True]))
    weight = dict(llama().named_parameters())[name]
    for pieces in (1, 4):
        # What the keep adds is its own gradient, whatever the host does with the rest.
        added = found[pieces, True][name] - found[pieces, False][name]
        torch.testing.assert_close(added, 0.5 * weight.detach(), rtol=1e-4, atol=1e-5)


def test_the_loss_of_a_keep_is_left_out_of_evaluation(tmp_path: Path) -> None:
    args = TrainingArguments(**options(tmp_path))
    plain = Trainer(llama(), args, eval_dataset=rows()).evaluate()["eval_loss"]
    kept = Keeping(llama(), args, eval_dataset=rows(), keep=Pull(100.0)).evaluate()["eval_loss"]
    assert kept == plain


def test_states_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    args = TrainingArguments(**options(tmp_path, max_steps=4, save_strategy="steps", save_steps=2))
    trainer = Keeping(llama(), args, train_dataset=rows(), keep=Recorder())
    trainer.train()
    keep = Recorder()
    trainer = Keeping(llama(), args, train_dataset=rows(), keep=keep)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert keep.steps == 4
    assert keep.calls.count("update") == 2
    assert keep.calls[0] == "before task 0"

    (tmp_path / "checkpoint-2" / STATE).unlink()
    trainer = Trainer(llama(), args, train_dataset=rows(), callbacks=[KeepCallback(Recorder())])
    with pytest.raises(CheckpointError, match=f"has no {STATE}"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer = Keeping(llama(), args, train_dataset=rows(), keep=[Recorder(), Gradients()])
    with pytest.raises(CheckpointError, match=r"of the keeps \['Recorder'\]"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_adapters_of_peft_are_seen_unwrapped(tmp_path: Path) -> None:
    last = Gradients()
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    args = TrainingArguments(**options(tmp_path, max_steps=1))
    Keeping(model, args, train_dataset=rows(), keep=last).train()
    assert last.seen
    assert all("lora_" in name for name in last.seen)


def test_no_logits_are_made_for_a_keep_beside_trl(tmp_path: Path) -> None:
    """256 rows is the least that SFTTrainer's chunked loss makes at a time: 8 x 15 tokens less."""
    with NoLogits(257):
        trained_gradients("sft", tmp_path, 1, [Pull()])


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: KeepCallback(Pull()), ValueError, "Pull has a hook `loss`"),
        (lambda: KeepCallback([Recorder(), 3]), TypeError, r"keep\[1\] must be a Keep; got 3"),  # type: ignore[list-item]
        (lambda: KeepCallback([Recorder]), TypeError, "make an object of it"),  # type: ignore[list-item]
        (lambda: Keep().load_state_dict({"a": 1}), ValueError, r"keeps no state; got \['a'\]"),
    ],
)
def test_bad_input(make: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        make()


def test_a_callback_that_came_too_late_for_a_resumed_run_is_refused(tmp_path: Path) -> None:
    args = TrainingArguments(**options(tmp_path, save_strategy="steps", save_steps=1))
    Trainer(llama(), args, train_dataset=rows()).train()
    trainer = Trainer(llama(), args, train_dataset=rows())
    trainer.add_callback(KeepCallback(Recorder()))
    with pytest.raises(ValueError, match="give it to the Trainer's constructor"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
