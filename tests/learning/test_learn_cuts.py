"""`learn` after a kill at places where it had nothing, or only a part, on disk; and what of its
arguments is noticed when a run is resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_learn import (
    Averaged,
    accuracy,
    arguments,
    assert_equal,
    assert_same_report,
    dropping,
    rows,
    tasks,
    weights,
)
from tiny_models import llama
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from cl_fast.errors import CheckpointError
from cl_fast.integrations.keeping import KeepMixin
from cl_fast.learning import Report, learn
from cl_fast.learning.ledger import Ledger, content_hash
from cl_fast.training import Keep, LoraTasks, Orthogonal, Replay, Task


def run(out: Path, keep: Keep | None = None, **given: Any) -> Report:
    made: dict[str, Any] = {"args": arguments(max_steps=3), **given}
    return learn(dropping(), tasks("a", "b"), out=out, keep=keep or Averaged(), **made)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, dict[str, Tensor]]:
    report = run(tmp_path_factory.mktemp("straight") / "run")
    return report, weights(report.model)


def test_cut_off_in_the_first_evaluation(
    straight: tuple[Report, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "evaluate", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, args=arguments(max_steps=2))  # nothing was done: another run may begin there
    monkeypatch.undo()
    report = run(tmp_path)
    assert_equal(weights(report.model), straight[1])
    assert_same_report(report, straight[0])


def test_cut_off_between_a_training_and_its_scores(
    straight: tuple[Report, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Ledger.write

    def dying(ledger: Ledger) -> None:
        write(ledger)
        if ledger.trained == ["a"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    monkeypatch.undo()
    report = run(tmp_path)
    assert_equal(weights(report.model), straight[1])
    assert_same_report(report, straight[0])


@pytest.mark.parametrize("gone", ["model.safetensors", "optimizer.pt", "keeps.json"])
def test_a_checkpoint_that_was_being_deleted_is_left_out(
    gone: str, straight: tuple[Report, dict[str, Tensor]], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Averaged(("b", 3)))
    (tmp_path / "tasks" / "01-b" / "checkpoints" / "checkpoint-2" / gone).unlink()
    report = run(tmp_path)
    assert_equal(weights(report.model), straight[1])


class Dies(Keep):
    def __init__(self, after: str | None = None) -> None:
        self.after = after

    def after_task(self, model: nn.Module, task: Task) -> None:
        if task.name == self.after:
            raise KeyboardInterrupt


class Stops(TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= state.global_step == 2


def _best() -> TrainingArguments:
    # So fast that the loss on the other task grows: the last step is not the best one.
    return arguments(
        max_steps=3, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1,
        metric_for_best_model="eval_a_loss", learning_rate=0.5,
    )  # fmt: skip


@pytest.mark.parametrize(
    "given",
    [
        lambda: {"args": arguments(max_steps=4), "callbacks": [Stops()]},
        lambda: {"args": _best()},
    ],
    ids=["stopped early", "the best model"],
)
def test_cut_off_after_a_last_step_that_is_not_the_end(
    given: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    expected = weights(run(tmp_path / "straight", Dies(), **given()).model)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Dies("b"), **given())
    assert_equal(weights(run(tmp_path / "cut", Dies(), **given()).model), expected)


def collate(examples: Any) -> Any:
    return {name: torch.stack([x[name] for x in examples]) for name in examples[0]}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"score": accuracy}, "another score: nothing there, .test_learn.accuracy. now"),
        ({"schedule": lambda *_: None}, "another schedule"),
        ({"data_collator": collate}, "another trainer.data_collator"),
    ],
)
def test_functions_are_known_by_their_names(
    changes: dict[str, Any], key: str, tmp_path: Path
) -> None:
    run(tmp_path, args=arguments(max_steps=1))
    with pytest.raises(CheckpointError, match=key):
        run(tmp_path, args=arguments(max_steps=1), **changes)
    run(tmp_path, args=arguments(max_steps=1), callbacks=[Stops()])  # these may differ


def test_what_examples_hold_is_hashed_by_value() -> None:
    def of(value: Any) -> str:
        return content_hash([{"x": value}])

    def words() -> Any:
        return np.array(["".join(["a", "b"]), "c"], dtype=object)

    assert of(words()) == of(words())
    assert of(torch.tensor([2**24])) != of(torch.tensor([2**24 + 1]))
    assert of(torch.tensor([1.0], dtype=torch.bfloat16)) == of(torch.tensor([1.0]).bfloat16())


class KeepingTrainer(KeepMixin, Trainer):  # type: ignore[misc]
    pass


def test_a_trainer_takes_up_the_checkpoint_that_it_is_given(tmp_path: Path) -> None:
    def trained(folder: str, seed: int = 0, checkpoint: str | None = None) -> Any:
        args = arguments(max_steps=3, output_dir=str(tmp_path / folder))
        host: Any = KeepingTrainer(llama(seed), args, train_dataset=rows(seed), keep=Averaged())
        host.train(resume_from_checkpoint=checkpoint and str(tmp_path / checkpoint))
        return weights(host.model)

    expected = trained("first")
    trained("second", seed=1)  # another run, with a checkpoint of the same step
    assert_equal(trained("second", checkpoint="first/checkpoint-2"), expected)


def test_adapters_come_with_the_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="peft_config would make new adapters in each trainer"):
        run(tmp_path / "run", peft_config=LoraConfig(r=2))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("train", "name", "keep", "words"),
    [
        (
            [{**row, "n": 1} for row in rows(1)],
            "b",
            Replay(0.25),
            r"tasks\['b'\] with Replay: .*'n'",
        ),
        (rows(1), "b", Replay(0.25, old={"o": [{"text": ""}]}), "'a'.* only 'o' has .'text'"),
        (rows(1), "b.c", LoraTasks(), "'b.c': LoraTasks calls an adapter like the task"),
        (rows(1), "b.c", Orthogonal(past="keep"), "'b.c': Orthogonal calls an adapter"),
    ],
)
def test_what_would_fail_at_the_second_task_fails_before_the_first(
    train: Any, name: str, keep: Keep, words: str, tmp_path: Path
) -> None:
    data = {"a": (rows(0), rows(0)), name: (train, rows(1))}
    with pytest.raises(ValueError, match=words):
        learn(llama(), data, args=arguments(), out=tmp_path / "run", keep=keep)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("keep", [LoraTasks, lambda: Orthogonal(past="keep")])
def test_after_a_resume_the_adapters_of_the_last_task_answer(
    keep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def adapted() -> Any:
        torch.manual_seed(0)
        return get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear"))

    common: dict[str, Any] = {"args": arguments(learning_rate=0.1, max_steps=2)}
    expected = learn(adapted(), tasks("a", "b"), out=tmp_path / "straight", keep=keep(), **common)
    write = Ledger.write

    def dying(ledger: Ledger) -> None:
        write(ledger)
        if ledger.trained == ["a"] and "a" not in ledger.scores:
            raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        learn(adapted(), tasks("a", "b"), out=tmp_path / "cut", keep=keep(), **common)
    monkeypatch.undo()
    found = learn(adapted(), tasks("a", "b"), out=tmp_path / "cut", keep=keep(), **common)
    assert found.matrix.rows == expected.matrix.rows
    again = learn(adapted(), tasks("a", "b"), out=tmp_path / "cut", keep=keep(), **common)
    ids = torch.arange(3, 12)[None]
    answers = [r.model.eval()(ids).logits for r in (expected, found, again)]  # type: ignore[union-attr]
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_a_merge_may_be_asked_for_afterwards(tmp_path: Path) -> None:
    common: dict[str, Any] = {"args": arguments(max_steps=2)}
    merging: dict[str, Any] = {"merge": "ties", "merge_options": {"density": 0.5}}
    expected = learn(llama(), tasks("a", "b"), out=tmp_path / "one", **merging, **common)
    learn(llama(), tasks("a", "b"), out=tmp_path / "two", **common)
    found = learn(llama(), tasks("a", "b"), out=tmp_path / "two", **merging, **common)
    assert found.merged == expected.merged
    assert not list((tmp_path / "two").glob("tasks/*/checkpoints"))

    adapted = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear"))
    first = {name: x.clone() for name, x in adapted.state_dict().items()}
    learn(adapted, tasks("a"), out=tmp_path / "three", **common)
    adapted.load_state_dict(first)
    with pytest.raises(CheckpointError, match="'a' was trained without merge="):
        learn(adapted, tasks("a"), out=tmp_path / "three", merge="linear", **common)
