"""`learn`: rows, resume, merges, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCABULARY, llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainingArguments

import cl_fast
from cl_fast.errors import CheckpointError, OutputError
from cl_fast.learning import Report, learn, stream
from cl_fast.learning.ledger import Ledger
from cl_fast.training import Keep, Task


def rows(seed: int, count: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def tasks(*names: str) -> dict[str, tuple[Any, Any]]:
    return {name: (rows(i), rows(i, 4)) for i, name in enumerate(names or ("a", "b", "c"))}


def arguments(**changes: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": "unused",
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "report_to": [],
            "save_strategy": "steps",
            "save_steps": 1,
            "disable_tqdm": True,
            "logging_strategy": "no",
            "dataloader_pin_memory": False,
            **changes,
        }
    )


def dropping(seed: int = 0) -> nn.Module:
    """With dropout, so that the state of the random generator matters."""
    return llama(seed, attention_dropout=0.2)


class Averaged(Keep):
    """A state that depends on every step: a running mean of a weight, which pulls it back."""

    def __init__(self, dies_at: tuple[str, int] | None = None) -> None:
        self.dies_at, self.task, self.steps = dies_at, "", 0
        self.mean: Tensor | None = None

    def before_task(self, model: nn.Module, task: Task) -> None:
        self.task, self.steps = task.name, 0

    def on_update(self, model: nn.Module) -> None:
        weight = next(model.parameters())
        now = weight.detach().clone()
        self.mean = now if self.mean is None else self.mean.lerp(now, 0.5)
        weight.data.lerp_(self.mean, 0.1)
        self.steps += 1
        if self.dies_at == (self.task, self.steps):
            raise KeyboardInterrupt

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps} | ({} if self.mean is None else {"mean": self.mean})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.mean = state["steps"], state.get("mean")


def weights(model: nn.Module | None) -> dict[str, Tensor]:
    assert model is not None
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, x in expected.items() if not torch.equal(found[name], x)]
    assert not different


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, dict[str, Tensor], Path]:
    out = tmp_path_factory.mktemp("straight") / "run"
    report = learn(
        dropping(), tasks(), args=arguments(), out=out, keep=Averaged(), probes={"p": rows(9, 4)}
    )
    return report, weights(report.model), out


def test_rows_are_scores_before_and_after_each_task(
    straight: tuple[Report, dict[str, Tensor], Path],
) -> None:
    report, found, out = straight
    assert report.matrix.tasks == ["a", "b", "c"]
    assert [len(row) for row in report.matrix.rows] == [3, 3, 3]
    assert report.learning_accuracy > sum(report.matrix.before) / 3  # it has learned
    assert set(report.probes["p"]) == {"before", "a", "b", "c"}
    ids = torch.stack([row["input_ids"] for row in tasks()["b"][1]])
    model = dropping().eval()
    loss = float(model(input_ids=ids, labels=ids).loss)
    assert report.matrix.before[1] == pytest.approx(-loss, abs=1e-5)
    loaded = AutoModelForCausalLM.from_pretrained(out / "model")
    assert_equal(weights(loaded), found)
    assert_same_report(Report.load(out), report)
    assert (out / "report.png").stat().st_size > 1000
    assert "| before | " in (out / "report.md").read_text()
    assert not list(out.glob("tasks/*/checkpoints/checkpoint-*"))


def assert_same_report(found: Report, expected: Report) -> None:
    mine, theirs = found.to_json(), expected.to_json()
    for seconds in (mine.pop("seconds"), theirs.pop("seconds")):
        assert all(value > 0 for value in seconds.values())
    assert mine == theirs


@pytest.mark.parametrize("when", [("a", 1), ("b", 1), ("b", 4), ("c", 2)])
def test_a_run_that_was_cut_off_ends_with_the_same_bits(
    when: tuple[str, int], straight: tuple[Report, dict[str, Tensor], Path], tmp_path: Path
) -> None:
    common: dict[str, Any] = {"args": arguments(), "out": tmp_path / "run"}
    common["probes"] = {"p": rows(9, 4)}
    with pytest.raises(KeyboardInterrupt):
        learn(dropping(), tasks(), keep=Averaged(when), **common)
    torch.manual_seed(123)  # whatever else happened in the meantime
    report = learn(dropping(), tasks(), keep=Averaged(), **common)
    assert_equal(weights(report.model), straight[1])
    assert_same_report(report, straight[0])


@pytest.mark.parametrize(
    ("owner", "name", "turn"),
    [(Ledger, "write", 4), (stream, "save_tensors", 2), (Report, "save", 2)],
)
def test_a_run_that_was_cut_off_while_it_wrote_goes_on(
    owner: Any,
    name: str,
    turn: int,
    straight: tuple[Report, dict[str, Tensor], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, turns = getattr(owner, name), iter(range(1, 100))

    def dying(*given: Any, **named: Any) -> None:
        if next(turns) == turn:
            raise KeyboardInterrupt
        original(*given, **named)

    common: dict[str, Any] = {"args": arguments(), "out": tmp_path / "run"}
    common["probes"] = {"p": rows(9, 4)}
    monkeypatch.setattr(owner, name, dying)
    with pytest.raises(KeyboardInterrupt):
        learn(dropping(), tasks(), keep=Averaged(), **common)
    monkeypatch.undo()
    report = learn(dropping(), tasks(), keep=Averaged(), **common)
    assert_equal(weights(report.model), straight[1])
    assert_same_report(report, straight[0])


SCRIPT = """
import os, signal
from test_learn import *

class Killed(Averaged):
    def on_update(self, model):
        super().on_update(model)
        if (self.task, self.steps) == ("b", 3):
            os.kill(os.getpid(), signal.SIGKILL)

# The class is named as in the run that was not killed.
Killed.__name__ = "Averaged"
report = learn(dropping(), tasks(), args=arguments(), out=sys.argv[1], keep=Killed(),
               probes={"p": rows(9, 4)})
"""


@pytest.mark.slow
def test_a_killed_process_goes_on(
    straight: tuple[Report, dict[str, Tensor], Path], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    common: dict[str, Any] = {"args": arguments(), "out": tmp_path / "run"}
    report = learn(dropping(), tasks(), keep=Averaged(), probes={"p": rows(9, 4)}, **common)
    assert_equal(weights(report.model), straight[1])
    assert_same_report(report, straight[0])


def test_a_finished_run_is_only_read(
    straight: tuple[Report, dict[str, Tensor], Path], tmp_path: Path
) -> None:
    out = shutil.copytree(straight[2], tmp_path / "run")
    keep = Averaged(("a", 1))  # would raise if anything were trained
    report = learn(
        dropping(), tasks(), args=arguments(), out=out, keep=keep, probes={"p": rows(9, 4)}
    )
    assert_equal(weights(report.model), straight[1])
    assert_same_report(report, straight[0])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"tasks": dict(reversed(tasks().items()))}, "another tasks:"),
        ({"tasks": tasks("a", "b")}, "another tasks:"),
        ({"tasks": {"d": (rows(3), rows(3)), **tasks()}}, "another tasks:"),
        ({"tasks": tasks() | {"b": (rows(7), rows(1, 4))}}, "another tasks.b.train"),
        ({"tasks": tasks() | {"b": (rows(1), rows(7, 4))}}, "another tasks.b.evaluation"),
        ({"model": dropping(1)}, "another model"),
        ({"args": arguments(learning_rate=2e-2)}, "another args.learning_rate: 0.01 there, 0.02"),
        ({"keep": []}, r"another keep\[0\]"),
        ({"probes": {}}, "another probes.p"),
        ({"start": "base"}, "another start"),
    ],
)
def test_another_run_in_the_folder_is_refused_by_the_key_that_differs(
    changes: dict[str, Any],
    key: str,
    straight: tuple[Report, dict[str, Tensor], Path],
) -> None:
    out = straight[2]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    given: dict[str, Any] = {"model": dropping(), "tasks": tasks(), "keep": Averaged()}
    given |= {"args": arguments(), "probes": {"p": rows(9, 4)}, **changes}
    with pytest.raises(CheckpointError, match=key):
        learn(out=out, **given)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_what_does_not_change_a_result_may_change(
    straight: tuple[Report, dict[str, Tensor], Path], tmp_path: Path
) -> None:
    out = shutil.copytree(straight[2], tmp_path / "run")
    args = arguments(save_steps=2, logging_strategy="steps", logging_steps=3)
    learn(dropping(), tasks(), args=args, out=out, keep=Averaged(), probes={"p": rows(9, 4)})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda out: (out / "tasks" / "02-c" / "state.safetensors").unlink(), "is gone"),
        (lambda out: (out / "tasks" / "02-c" / "state.safetensors").write_bytes(b"no"), "damaged"),
        (lambda out: (out / "stream.json").write_text("{}"), "not one that learn wrote"),
        (lambda out: (out / "tasks" / "02-c" / "keeps.pt").unlink(), "no keeps.pt"),
    ],
)
def test_damage_is_told(
    damage: Callable[[Path], Any],
    words: str,
    straight: tuple[Report, dict[str, Tensor], Path],
    tmp_path: Path,
) -> None:
    out = shutil.copytree(straight[2], tmp_path / "run")
    damage(out)
    with pytest.raises(CheckpointError, match=words):
        learn(
            dropping(), tasks(), args=arguments(), out=out, keep=Averaged(),
            probes={"p": rows(9, 4)},
        )  # fmt: skip


# --- scores, starts, schedules, merges ---------------------------------------------------------


def accuracy(model: nn.Module, examples: list[dict[str, Tensor]], name: str) -> float:
    assert not model.training
    assert not torch.is_grad_enabled()
    ids = torch.stack([row["input_ids"] for row in examples])
    found: Tensor = model(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]
    return float(found.float().mean())


def test_a_score_of_ones_own_at_the_end_only(tmp_path: Path) -> None:
    seen: list[str] = []

    def counted(model: nn.Module, examples: Any, name: str) -> float:
        seen.append(name)
        return accuracy(model, examples, name)

    report = learn(
        llama(), tasks(), args=arguments(max_steps=1), out=tmp_path, score=counted,
        score_every="end",
    )  # fmt: skip
    assert seen == ["a", "b", "c", "a", "b", "a", "b", "c"]
    assert report.metric == "counted"
    assert report.backward == report.backward  # not NaN: all that it needs was scored


def test_independent_tasks_start_from_the_base(tmp_path: Path) -> None:
    report = learn(llama(), tasks("a", "b"), args=arguments(), out=tmp_path / "run", start="base")
    alone = learn(llama(), {"b": tasks("a", "b")["b"]}, args=arguments(), out=tmp_path / "alone")
    assert_equal(weights(report.model), weights(alone.model))


def test_a_schedule_over_the_stream(tmp_path: Path) -> None:
    rates: list[tuple[str, float]] = []

    class Watch(Keep):
        def before_task(self, model: nn.Module, task: Task) -> None:
            self.task = task.name

    def schedule(optimizer: torch.optim.Optimizer, steps: int, task: Task) -> Any:
        assert steps == 4
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda n: rates.append((task.name, n)) or 0.5 ** (task.index + n),  # type: ignore[func-returns-value]
        )

    learn(llama(), tasks("a", "b"), args=arguments(), out=tmp_path, keep=Watch(), schedule=schedule)
    assert {name for name, _ in rates} == {"a", "b"}
    assert max(n for _, n in rates) == 4


OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {"weight": [1.0, 3.0]},
    "task_arithmetic": {"lam": 0.5},
    "ties": {"density": 0.3},
    "dare_linear": {"density": 0.5, "seed": 3},
    "dare_ties": {"density": 0.5, "seed": 3},
    "greedy": {},
}


@pytest.mark.parametrize(
    ("method", "peft"),
    [*((method, False) for method in OPTIONS), ("ties", True), ("greedy", True)],
)
def test_merges_are_those_of_the_merging_room(method: str, peft: bool, tmp_path: Path) -> None:
    def model() -> Any:
        if not peft:
            return llama()
        torch.manual_seed(0)
        return get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear"))

    args, out = arguments(max_steps=3), tmp_path / "run"
    common: dict[str, Any] = {"args": args, "start": "base"}
    report = learn(
        model(), tasks("a", "b"), out=out, merge=method, merge_options=OPTIONS[method], **common
    )
    parts = {}
    for name in ("a", "b"):
        one = learn(model(), {name: tasks("a", "b")[name]}, out=tmp_path / name, **common)
        parts[name] = weights(one.model.merge_and_unload() if peft else one.model)  # type: ignore[operator, union-attr]
    base = weights(llama())
    merging = cl_fast.merging
    if method == "greedy":
        best = max(report.merged["a"] + report.merged["b"], -1e9) / 2
        rows_ = report.matrix.rows
        assert best >= (rows_[0][0] + rows_[0][1]) / 2 - 1e-6
        assert "greedy soup of" in report.merge
        return
    function = getattr(merging, method)
    given = (parts,) if method == "linear" else (base, parts)
    assert_equal(weights(report.model), function(*given, **OPTIONS[method]))
    loaded = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert_equal(weights(loaded), weights(report.model))
    # Once more: nothing is trained, the merge is another one.
    again = learn(
        model(), tasks("a", "b"), out=out, merge=lambda base, models: models["b"], **common
    )
    assert_equal(weights(again.model), parts["b"])


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"tasks": {}}, ValueError, "not empty"),
        ({"tasks": {"a": rows(0)}}, ValueError, r"tasks\['a'\] must be \(train, evaluation\)"),
        ({"tasks": {"a": ([], rows(0))}}, ValueError, "training data is empty"),
        ({"tasks": {"a": (iter(rows(0)), rows(0))}}, TypeError, "map-style"),
        ({"tasks": {"a": (rows(0), None)}}, ValueError, "needs evaluation data, or learn a score"),
        ({"tasks": {"before": (rows(0), rows(0))}}, ValueError, "other than 'before'"),
        ({"probes": {"a": rows(0)}}, ValueError, "which is a task"),
        ({"args": {"a": arguments()}}, ValueError, "lacks 'b'"),
        ({"args": 3}, TypeError, "TrainingArguments; got int"),
        ({"keep": [Averaged]}, TypeError, "make an object of it"),
        ({"keep": Averaged}, TypeError, "make an object of it"),
        ({"keep": "replay"}, TypeError, "keep must be a Keep, or several; got 'replay'"),
        ({"trainer": "SFTTrainer"}, TypeError, "trainer must be a Trainer's class"),
        ({"tasks": {"a": (rows(0), [])}}, ValueError, "the evaluation data is empty"),
        ({"args": {"a": arguments(), "c": arguments()}}, ValueError, "lacks 'b' and has 'c'"),
        ({"score_every": "step"}, ValueError, "'task' or 'end'; got 'step'"),
        ({"start": "end"}, ValueError, "'previous' or 'base'; got 'end'"),
        ({"merge": "tie"}, ValueError, "one of linear, .*; got 'tie'"),
        ({"merge": "ties"}, ValueError, "needs merge_options={'density'"),
        ({"merge": "linear", "merge_options": {"density": 1}}, ValueError, "linear takes"),
        ({"merge_options": {"density": 1}}, ValueError, "no effect"),
        ({"eval_dataset": rows(0)}, ValueError, "eval_dataset is given to the trainer by learn"),
        ({"model": 3}, TypeError, "a module or a function; got int"),
        ({"args": arguments(fsdp="full_shard")}, ValueError, "a function that makes the model"),
    ],
)
def test_bad_input(
    changes: dict[str, Any], kind: type[Exception], words: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"model": llama(), "tasks": tasks("a", "b"), "args": arguments()}
    before = weights(given["model"])
    with pytest.raises(kind, match=words):
        learn(**{**given, **changes}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert_equal(weights(given["model"]), before)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match=r"not empty \(thesis.tex\)"):
        learn(llama(), tasks(), args=arguments(), out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_score_that_is_no_number_is_told(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="score must return a number for 'a'; got NoneType"):
        learn(llama(), tasks(), args=arguments(), out=tmp_path, score=lambda *_: None)  # type: ignore[arg-type, return-value]


def test_reports_tell_what_they_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Report.load(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({"tasks": []}))
    with pytest.raises(CheckpointError, match="no report of"):
        Report.load(tmp_path)
