"""`learn` with TRL's trainers and with adapters: what is scored, mixed, and left for others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_learn import arguments, rows, tasks, weights
from tiny_models import llama, tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from cl_fast.errors import CheckpointError
from cl_fast.learning import learn
from cl_fast.learning.ledger import Ledger
from cl_fast.training import (
    AdapterPerTask,
    Anchor,
    LoraTasks,
    Orthogonal,
    PreferenceReplay,
    Replay,
)

QUIET: dict[str, Any] = {
    "output_dir": "unused",
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_strategy": "no",
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
}


def adapted() -> Any:
    torch.manual_seed(0)
    return get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear"))


def pairs(a: str, b: str) -> Dataset:
    both = [(a, b), (b, "mat")] * 3
    return Dataset.from_list(
        [{"prompt": "the cat", "chosen": f" {x} on", "rejected": f" {y} under"} for x, y in both]
    )


def texts(column: str, *words: str) -> Dataset:
    return Dataset.from_list([{column: f"the {x} sat on the mat", "from": x} for x in words] * 3)


STAGES = {"one": (pairs("sat", "ran"),) * 2, "two": (pairs("tree", "mat"),) * 2}


@pytest.mark.parametrize("keep", [[], [PreferenceReplay(0.25)]])
def test_preferences_with_references_made_beforehand(keep: Any, tmp_path: Path) -> None:
    args = DPOConfig(precompute_ref_log_probs=True, **QUIET)
    report = learn(
        llama(), STAGES, args=args, out=tmp_path, trainer=DPOTrainer,
        processing_class=tokenizer(), keep=keep,
    )  # fmt: skip
    # Each stage is its own reference: before it, each pair has the loss log 2.
    assert all(math.isfinite(x) for row in report.matrix.rows for x in row)
    assert report.matrix.before == pytest.approx([-math.log(2)] * 2)


def test_preferences_with_an_adapter_go_on_after_each_stage(tmp_path: Path) -> None:
    common: dict[str, Any] = {"args": DPOConfig(**QUIET), "trainer": DPOTrainer}
    common["processing_class"] = tokenizer()
    report = learn(adapted(), STAGES, out=tmp_path, **common)
    again = learn(adapted(), STAGES, out=tmp_path, **common)
    assert again.matrix.rows == report.matrix.rows
    found, expected = weights(again.model), weights(report.model)
    assert all(torch.equal(x, found[name]) for name, x in expected.items() if ".ref." not in name)


@pytest.mark.parametrize("cut", ["one", "two"])
@pytest.mark.parametrize(("make", "start"), [(llama, "previous"), (adapted, "base")])
def test_scores_after_a_cut_have_the_references_of_their_stage(
    make: Any, start: Any, cut: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common: dict[str, Any] = {"trainer": DPOTrainer, "processing_class": tokenizer()}
    common["args"] = DPOConfig(precompute_ref_log_probs=True, **{**QUIET, "learning_rate": 0.01})
    common["start"] = start
    expected = learn(make(), STAGES, out=tmp_path / "straight", **common)
    write = Ledger.write

    def dying(ledger: Ledger) -> None:
        write(ledger)
        if cut in ledger.trained and cut not in ledger.scores:
            raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        learn(make(), STAGES, out=tmp_path / "cut", **common)
    monkeypatch.undo()
    found = learn(make(), STAGES, out=tmp_path / "cut", **common)
    assert found.matrix.rows == expected.matrix.rows


def test_replay_of_preferences_by_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use PreferenceReplay with DPOTrainer"):
        learn(
            llama(), STAGES, args=DPOConfig(**QUIET), out=tmp_path, trainer=DPOTrainer,
            processing_class=tokenizer(), keep=Replay(0.2),
        )  # fmt: skip


def test_text_of_before_the_stream_and_of_other_columns_is_mixed(tmp_path: Path) -> None:
    completions = [{"prompt": "the cat", "completion": " sat"}] * 6
    stream = {
        "text": (texts("text", "cat", "dog"), texts("text", "cat")),
        "pairs": (Dataset.from_list(completions), texts("text", "mat")),
    }
    keep = Replay(0.25, old={"before": texts("text", "tree")})
    learn(
        llama(), stream, args=SFTConfig(max_length=16, **QUIET), out=tmp_path, trainer=SFTTrainer,
        processing_class=tokenizer(), keep=keep,
    )  # fmt: skip
    assert keep.options()["old"] == {"before": 3}
    assert set(keep.old[0].train[0]) == {"input_ids", "labels"}  # type: ignore[index]


def test_columns_that_cannot_be_mixed_are_told_before_any_training(tmp_path: Path) -> None:
    odd = [{**row, "weight": torch.tensor(1.0)} for row in rows(1)]
    args = arguments(remove_unused_columns=False)
    stream = {"a": tasks("a")["a"], "b": (odd, rows(1))}
    with pytest.raises(ValueError, match=r"tasks\['b'\] with Replay: .*'weight'"):
        learn(llama(), stream, args=args, out=tmp_path / "run", keep=Replay(0.25))
    assert not list(tmp_path.rglob("*.safetensors"))


# --- adapters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "keep"), [(adapted, LoraTasks), (llama, lambda: AdapterPerTask(8))]
)
def test_each_task_is_scored_with_its_own_adapter(make: Any, keep: Any, tmp_path: Path) -> None:
    report = learn(
        make(), tasks("a", "b"), args=arguments(learning_rate=0.05), out=tmp_path, keep=keep(),
        probes={"p": rows(9, 4)},
    )  # fmt: skip
    assert report.backward == 0.0
    assert report.matrix.rows[0][1] == report.matrix.before[1]  # b has none after a
    assert report.kept("p") == 1.0
    assert report.matrix.rows[1][0] > report.matrix.before[0]


def test_a_model_into_which_tasks_were_folded_is_left_whole(tmp_path: Path) -> None:
    report = learn(
        adapted(), tasks("a", "b"), args=arguments(learning_rate=0.05), out=tmp_path,
        keep=Orthogonal(),
    )  # fmt: skip
    ids = torch.arange(3, 12)[None]
    expected: Tensor = report.model.eval()(ids).logits  # type: ignore[misc, union-attr]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_independent_tasks_have_no_transfer(tmp_path: Path) -> None:
    report = learn(
        llama(), tasks("a", "b"), args=arguments(max_steps=1), out=tmp_path, start="base"
    )
    assert math.isnan(report.backward)
    assert set(report.summary()) == {"average", "learned"}


# --- a stream that grows -----------------------------------------------------------------------


def test_tasks_may_be_added_after_the_last_one(tmp_path: Path) -> None:
    common: dict[str, Any] = {"args": arguments(), "keep": Anchor(0.1)}
    learn(llama(), tasks("a", "b"), out=tmp_path / "run", **common)
    common["keep"] = Anchor(0.1)
    report = learn(llama(), tasks("a", "b", "c"), out=tmp_path / "run", **common)
    common["keep"] = Anchor(0.1)
    whole = learn(llama(), tasks("a", "b", "c"), out=tmp_path / "whole", **common)
    assert report.matrix.rows[2] == whole.matrix.rows[2]
    assert math.isnan(report.matrix.rows[0][2])  # c was not known then
    assert report.backward == whole.backward
    found, expected = weights(report.model), weights(whole.model)
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_a_stream_with_arguments_of_each_task_may_grow_from_one(tmp_path: Path) -> None:
    first, second = arguments(max_steps=1), arguments(max_steps=2)
    merging: dict[str, Any] = {"merge": "linear"}
    learn(llama(), tasks("a"), args={"a": first}, out=tmp_path, **merging)
    report = learn(llama(), tasks("a", "b"), args={"a": first, "b": second}, out=tmp_path)
    assert len(report.matrix.rows) == 2
    assert not report.merged  # that of one task is no longer shown
    with pytest.raises(CheckpointError, match=r"another args.a.max_steps: 1 there, 2 now"):
        learn(llama(), tasks("a", "b"), args={"a": second, "b": second}, out=tmp_path)


def test_an_option_of_a_keep_that_differs_is_named(tmp_path: Path) -> None:
    common: dict[str, Any] = {"args": arguments(max_steps=1), "out": tmp_path}
    learn(llama(), tasks("a"), keep=Anchor(0.1), **common)
    with pytest.raises(CheckpointError, match=r"another keep\[0\].weight: 0.1 there, 0.2 now"):
        learn(llama(), tasks("a"), keep=Anchor(0.2), **common)
