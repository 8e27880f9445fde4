"""The plan of `cl-fast train`: what it says, what is inherited, what is refused."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cl_fast.errors import RecipeError
from cl_fast.learning.plan import (
    _HF_SCHEDULES,
    _OWN_SCHEDULES,
    KEEPS,
    Batch,
    LearningRate,
    Optimizer,
    Peft,
    Plan,
    Replay,
    Stage,
    flat,
    load_plan,
    parse_plan,
)
from cl_fast.learning.pretraining import _keep_class, rate, schedule_words

ROOT = Path(__file__).parents[2]
PLAN: dict[str, Any] = {
    "model": "base",
    "held_out": 0.01,
    "learning_rate": {"peak": 3e-4, "min": 3e-5},
    "schedule": "rewarm",
    "epochs": 1,
    "stages": [
        {"name": "a", "texts": "a.txt"},
        {"name": "b", "texts": ["b/*.txt", "c.jsonl"], "steps": 30, "replay": 0.05},
    ],
}


def changed(stage: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    plan = copy.deepcopy(PLAN)
    for key, value in changes.items():
        plan[key] = value
    for last in plan["stages"][-1:]:
        last.update(stage or {})
    return plan


def test_stages_inherit() -> None:
    plan = parse_plan(changed(text_key="content"))
    a, b = plan.stages
    assert (a.epochs, a.steps, b.epochs, b.steps) == (1.0, None, None, 30)
    assert a.texts == ["a.txt"]
    assert (a.replay, b.replay and b.replay.ratio) == (None, 0.05)
    assert a.learning_rate is not None
    assert a.learning_rate.peak == 3e-4
    assert a.text_key == b.text_key == "content"
    off = parse_plan(changed({"replay": None, "tokens": 2e9, "steps": None}, replay=0.1))
    assert off.stages[1].replay is None
    assert off.stages[1].tokens == 2_000_000_000


def test_yaml_numbers(tmp_path: Path) -> None:
    file = tmp_path / "plan.yml"
    file.write_text(
        "model: m\nheld_out: 1e-2\nlearning_rate: 3e-4\nschedule: constant\ntokens: 1e9\n"
        "stages:\n- {name: a, texts: a.txt}\n"
    )
    (stage,) = load_plan(file).stages
    assert stage.learning_rate is not None
    assert (stage.held_out, stage.learning_rate.peak, stage.tokens) == (0.01, 3e-4, 10**9)


def test_an_infinite_schedule_of_the_plan_goes_over_its_stages() -> None:
    """Warm-up and cool-down at its beginning, the anneal at its end, one constant between."""
    three = [{"name": n, "texts": "x", "steps": 100} for n in "abc"]
    rates = {"peak": 3e-4, "constant": 1.5e-4, "min": 1e-5}
    spans = {"warmup": 10, "cooldown": 0.4, "anneal": 0.25}
    plan = parse_plan(changed(stages=three, schedule={"infinite": spans}, learning_rate=rates))
    first, second, last = (rate(stage, 100) for stage in plan.stages)
    assert first is not None
    assert second is not None
    assert last is not None
    assert [first(n) for n in (0, 10, 50, 100)] == [0.0, 3e-4, 1.5e-4, 1.5e-4]
    assert {second(n) for n in range(101)} == {1.5e-4}
    assert {last(n) for n in range(76)} == {1.5e-4}
    assert last(100) == 1e-5
    assert schedule_words(plan.stages[0], 100) == (
        "infinite: 0 to 0.0003 at step 10, cosine to 0.00015 at 50, 0.00015 to the end"
    )
    assert schedule_words(plan.stages[2], 100) == (
        "infinite: 0.00015 until 75, exponential to 1e-05 at 100"
    )
    own = {"infinite": {"warmup": 0, "cooldown": 0, "anneal": 1.0, "annealing": "harmonic"}}
    stages = [three[0], {**three[1], "schedule": own}]
    plan = parse_plan(changed(stages=stages, learning_rate=rates, schedule="infinite"))
    branch = rate(plan.stages[1], 40)
    assert branch is not None
    assert [branch(0), branch(40)] == [1.5e-4, 1e-5]


def test_rewarm_by_fraction_and_by_steps() -> None:
    for warmup, at in ((0.01, 20), (7, 7)):
        plan = parse_plan(changed(schedule={"rewarm": {"warmup": warmup}}))
        found = rate(plan.stages[0], 2000)
        assert found is not None
        assert [found(0), found(at), found(2000)] == [0.0, 3e-4, 3e-5]
        assert found(at - 1) < 3e-4 > found(at + 1)


def test_flat_has_the_stages_values_once() -> None:
    values = dict(flat(parse_plan(changed())))
    assert values["stages[1].replay.ratio"] == 0.05
    assert values["stages[0].schedule.options.warmup"] == 0.01
    assert "schedule.type" not in values
    assert values["stages[1].texts"] == ["b/*.txt", "c.jsonl"]


@pytest.mark.parametrize("word", KEEPS)
def test_keeps_exist_with_their_options(word: str) -> None:
    import inspect

    parameters = inspect.signature(_keep_class(word)).parameters
    assert set(KEEPS[word][1]) <= set(parameters)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (changed(modle=1), r"modle: unknown key; did you mean 'model'\?; known are .*, model, "),
        (changed({"text": 1}), r"stages\[1\].text: unknown key; did you mean 'texts'\?; known"),
        (changed(batch={"lenght": 8}), r"batch.lenght: .* 'length'\?; known are sequences, len"),
        (changed(learning_rate={"peek": 1.0}), "learning_rate.peek: unknown key"),
        (changed({"learning_rate": {"peak": -1.0}}), r"stages\[1\].learning_rate.peak: .*greater"),
        (changed(learning_rate={"peak": 1e-4, "min": 1e-3}), "learning_rate.min: 0.001 is above p"),
        (changed(learning_rate={"peak": 1.0, "constant": 0.5}), "constant: is of schedule 'infin"),
        (changed({"schedule": "cosine"}), r"stages\[1\].learning_rate.min: has no effect with"),
        (changed(schedule="rewram"), r"schedule: 'rewram' .* did you mean 'rewarm'\?; known are"),
        (changed(schedule={"rewarm": 3}), "schedule.rewarm: must be a mapping of options; got the"),
        (changed(schedule={"rewarm": {"warm": 3}}), "schedule.rewarm.warm: unknown key; did you"),
        (
            changed(schedule={"rewarm": {"warmup": 1.5}}),
            "warmup: must be a number of steps, or a f",
        ),
        (changed(schedule={"rewarm": {"skip_zero": 1}}), "skip_zero: must be true or false"),
        (changed(schedule={"infinite": {"cooling": "x"}}), "cooling: must be cosine or inverse_s"),
        (changed({"schedule": {"cosine": {"min_lr": 1}}}), r"stages\[1\].*min_lr: say it with lea"),
        (changed(schedule=["rewarm"]), "schedule: must be a word, or a mapping"),
        (changed(schedule=None), r"stages\[0\].schedule: is required, here or for the whole plan"),
        (changed(learning_rate=None), r"stages\[0\].learning_rate: is required"),
        (changed(held_out=None), r"stages\[0\].held_out: is required"),
        (changed(held_out=1.0), "held_out: a fraction of the documents must be above 0 and below"),
        (changed({"held_out": 0.0}), r"stages\[1\].held_out: a fraction"),
        (changed({"held_out": []}), r"stages\[1\].held_out: must"),
        (changed(epochs=None), r"stages\[0\]: say how long it trains: epochs, steps or tokens"),
        (changed(steps=3), r"steps: epochs says already how long"),
        (changed({"tokens": 3}), r"stages\[1\].tokens: steps says already how long"),
        (changed(epochs=0), "epochs: must be greater than 0"),
        (changed({"replay": 1.0}), r"stages\[1\].replay.ratio: must be less than 1"),
        (changed({"replay": {"ratio": 0.1, "unit": "tokens"}}), r"replay.unit: unknown key; known"),
        (changed({"name": "a"}), r"stages\[1\].name: 'a' is the name of stages\[0\].name already"),
        (changed({"name": "a b"}), r"stages\[1\].name: must be of letters, digits"),
        (changed({"name": "new"}), r"stages\[1\].name: 'new' is a word of cl-fast"),
        (changed(probes={"a": "x.txt"}), "probes.a: 'a' is the name of"),
        (changed(replay="5%"), "^replay: must be a ratio like 0.05, or a mapping with ratio; got"),
        (changed({"replay": "5%"}), r"stages\[1\].replay: must be a ratio like 0.05"),
        (changed(learning_rate="3e"), "learning_rate: must be a number like 3e-4, or a mapping"),
        (changed(stages=[]), "stages: must not be empty"),
        (changed({"documents": "page"}), r"stages\[1\].documents: must be 'file', 'line' or 'par"),
        (changed(model=None), "model: must be text; got nothing"),
        (changed(dtype="int8"), "dtype: must be 'auto', 'float32', "),
        (changed(optimizer={"betas": [0.9, 1.0]}), r"optimizer.betas: must be in \[0, 1\)"),
        (changed(training={"learning_rate": 1}), "training.learning_rate: say it with learning_r"),
        (changed(training={"bf16": True}), "training.bf16: say it with precision"),
        (changed(training={"deepspeed": "x"}), "training.deepspeed: is not supported"),
        (changed(keep="anchor"), r"keep: must be a list \(each entry begins with '-'\)"),
        (
            changed(keep=["anchr"]),
            r"keep\[0\]: 'anchr' is not known; did you mean 'anchor'\?; know",
        ),
        (changed(keep=[{"replay": {}}]), r"keep\[0\]: 'replay' is not known; replay is a key of"),
        (changed(keep=[{"anchor": 3}]), r"keep\[0\].anchor: must be a mapping of options"),
        ("model: [", "not valid YAML: "),
        ("model: a\nmodel: b", "the key 'model' appears twice"),
        ("- a", "a plan is a mapping with 'model' and 'stages'; got a list"),
    ],
)
def test_bad_plans(plan: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_plan(plan)


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "bytes.yml").write_bytes(b"model: \xff")
    (tmp_path / "bad.yml").write_text("modle: x")
    for name, words in (
        ("none.yml", "none.yml: cannot be read"),
        (".", "is a folder; name the plan"),
        ("bytes.yml", "bytes.yml: not UTF-8"),
        ("bad.yml", "bad.yml: modle: unknown key"),
    ):
        with pytest.raises(RecipeError, match=words):
            load_plan(tmp_path / name)


def test_the_plans_of_the_page_and_of_the_example() -> None:
    page = (ROOT / "docs" / "train-plan.md").read_text()
    plans = [parse_plan(block.split("```")[0]) for block in page.split("```yaml\n")[1:]]
    assert len(plans) == 3
    last = rate(plans[2].stages[0], 1000)
    assert last is not None
    assert [last(0), last(1000)] == [1.5e-4, 1e-5]
    example = load_plan(ROOT / "examples" / "continual_pretraining" / "plan.yml")
    assert [stage.name for stage in example.stages] == ["cooking", "sailing"]


def test_every_key_is_in_the_page() -> None:
    page = (ROOT / "docs" / "train-plan.md").read_text()
    models = (Plan, Stage, Batch, LearningRate, Optimizer, Peft, Replay)
    for key in {key for model in models for key in model.model_fields}:
        assert re.search(rf"`{key}`|[{{ ]{key}[:,}}]", page), key
    for word in (*KEEPS, *_OWN_SCHEDULES, *_HF_SCHEDULES):
        assert f"`{word}`" in page, word


def test_a_plan_is_read_without_torch() -> None:
    code = (
        "import cl_fast.learning.plan, sys\n"
        "print(*{'torch', 'numpy', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == ""
