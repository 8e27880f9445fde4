"""Searching for a merge: known optima, storage that goes on, and everything that is refused."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import merge_cases as cases
import pytest
import torch
import yaml
from torch import Tensor

from cl_fast.cli import main
from cl_fast.errors import CheckpointError, ClFastError, OutputError, RecipeError
from cl_fast.merging import execute, greedy_soup, make_plan, parse_recipe
from cl_fast.merging.candidates import Maker
from cl_fast.merging.search import GIVE_UP, load_study, search
from cl_fast.merging.space import find_space

pytest.importorskip("optuna", reason="Optuna is not installed")

X = "model.layers.{}.w"
TARGET = {"a": 0.25, "b": 0.75}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of zeros and two models, each 1 in half of every tensor: a merge shows its weights."""
    root = tmp_path_factory.mktemp("search")
    layers = [X.format(i) for i in range(3)]
    half = torch.tensor([1.0, 0.0])
    cases.save(root / "base", {name: torch.zeros(2) for name in layers})
    cases.save(root / "a", {name: half.clone() for name in layers})
    cases.save(root / "b", {name: half.flip(0) for name in layers})
    return root


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    """Where a database is quick, since every trial waits for its disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def recipe(root: Path, a: Any, b: Any, **changes: Any) -> dict[str, Any]:
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(root / "base"),
        "models": [
            {"model": str(root / "a"), "parameters": {"weight": a}},
            {"model": str(root / "b"), "parameters": {"weight": b}},
        ],
    } | changes


RANGE = {"search": [0.0, 1.0]}


def bowl(state: Mapping[str, Tensor]) -> float:
    """Best at weights 0.25 and 0.75, in every layer."""
    wanted = torch.tensor([TARGET["a"], TARGET["b"]])
    return -float(sum((value - wanted).square().sum() for value in state.values()))


@pytest.mark.parametrize(("sampler", "close"), [("tpe", 0.12), ("cma-es", 0.12), ("random", 0.35)])
def test_samplers_find_a_known_optimum(inputs: Path, sampler: str, close: float) -> None:
    if sampler == "cma-es":
        pytest.importorskip("cmaes", reason="cmaes is not installed")
    result = search(
        recipe(inputs, RANGE, RANGE), bowl, sampler=sampler, trials=40, device="cpu", seed=1
    )
    values = list(result.best.values.values())
    assert values == pytest.approx([TARGET["a"], TARGET["b"]], abs=close)
    assert len(result.trials) == result.new == 40
    assert result.best.score == max(trial.score for trial in result.trials if trial.score)
    # It is the score of what its recipe makes.
    state = Maker("cpu").state_dict(
        make_plan(parse_recipe(yaml.safe_load(result.to_yaml())), inputs / "nowhere")
    )
    assert bowl(state) == result.best.score


def test_a_grid_tries_every_combination_once(inputs: Path) -> None:
    steps = {"search": [0.0, 1.0], "step": 0.25}
    result = search(
        recipe(inputs, steps, {"choices": [0.5, 0.75]}), bowl, sampler="grid", trials=99,
        device="cpu",
    )  # fmt: skip
    tried = [tuple(trial.values.values()) for trial in result.trials]
    assert sorted(tried) == [(a / 4, b) for a in range(5) for b in (0.5, 0.75)]
    assert list(result.best.values.values()) == [0.25, 0.75]
    assert result.best.score == 0.0
    assert result.recipe["models"][0]["parameters"] == {"weight": 0.25}
    notes: list[str] = []
    search(recipe(inputs, steps, 0.5), bowl, sampler="grid", trials=2, say=notes.append)
    assert notes == ["the grid has 5 combinations, of which 2 are tried"]
    assert result.table(2)[1].split() == ["0", str(result.best.number), "0.25", "0.75"]


def test_places_may_be_anywhere_and_share_a_number(inputs: Path) -> None:
    """Gradients, filters, methods and names; and a direction that goes down."""
    document = recipe(
        inputs,
        {"search": [0, 1], "gradient": 3, "name": "layers"},
        [{"filter": "layers.1", "value": {"search": [0.5, 1], "name": "m"}}, {"value": 0.5}],
    )
    document["parameters"] = {"lambda": {"search": [0.5, 1], "name": "m"}}
    document["merge_method"] = {"choices": ["task_arithmetic", "ties"]}
    space = find_space(document)
    assert [number.name for number in space.numbers] == [
        "merge_method", "layers[0]", "layers[1]", "layers[2]", "m",
    ]  # fmt: skip
    filled = space.fill(
        {"merge_method": 1, "layers[0]": 0.1, "layers[1]": 0.2, "layers[2]": 0.3, "m": 0.7}
    )
    assert filled["merge_method"] == "ties"
    assert filled["models"][0]["parameters"]["weight"] == [0.1, 0.2, 0.3]
    assert filled["models"][1]["parameters"]["weight"][0] == {"filter": "layers.1", "value": 0.7}
    assert filled["parameters"]["lambda"] == 0.7
    document["merge_method"] = "task_arithmetic"
    result = search(
        document, lambda state: -bowl(state), direction="minimize", trials=6, device="cpu"
    )
    scores = [trial.score for trial in result.trials]
    assert result.best.score == min(scores)
    by_key = search(
        recipe(inputs, 0.5, 0.5), bowl, device="cpu", trials=2, seed=3,
        space={"models[1].parameters.weight": RANGE},
    )  # fmt: skip
    assert list(by_key.best.values) == ["models[1].parameters.weight"]


def test_devices_combine_to_the_bits_of_the_engine(tmp_path: Path) -> None:
    """What a GPU would run, run on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, "SHAPES", {"model.layers.0.w": (30, 7), "model.norm": (9,)})
        cases.family(tmp_path)
    maker = Maker("cpu")
    for method in ("linear", "ties", "dare_ties"):
        plan = cases.plan(tmp_path, tmp_path / "out", method)
        state = maker.state_dict(plan)
        written = cases.load(execute(plan, overwrite=True, fsync=False).output)
        for tensor in plan.tensors:
            assert torch.equal(state[tensor.name], written[tensor.name])
            if tensor.kind == "combine":
                assert torch.equal(maker.combined(tensor), written[tensor.name]), method


# Storage.


def test_the_same_call_goes_on_as_if_it_had_not_stopped(inputs: Path, store: Path) -> None:
    document = recipe(inputs, RANGE, {"search": [0.1, 1.0], "log": True})

    def values(result: Any) -> list[Any]:
        return [(trial.values, trial.score) for trial in result.trials]

    whole = search(document, bowl, trials=16, seed=7, device="cpu")
    calls: list[int] = []

    def stops(state: Mapping[str, Tensor]) -> float:
        calls.append(1)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return bowl(state)

    stops.__qualname__ = bowl.__qualname__
    given: dict[str, Any] = {"storage": store / "s.db", "seed": 7, "device": "cpu"}
    first = search(document, stops, trials=8, **given)
    assert values(first) == values(whole)[:8]
    with pytest.raises(KeyboardInterrupt):
        search(document, stops, trials=16, **given)
    again = search(document, stops, trials=16, **given)
    assert values(again) == values(whole)
    assert again.new == 3  # the killed one too
    assert search(document, stops, trials=16, **given).new == 0
    other = search(document, bowl, trials=4, seed=8, device="cpu")
    assert values(other) != values(whole)[:4]


def test_another_study_is_refused(inputs: Path, tmp_path: Path, store: Path) -> None:
    storage = store / "s.db"
    document = recipe(inputs, RANGE, 0.5)

    def run(content: dict[str, Any], evaluate: Any = bowl, **more: Any) -> Any:
        return search(content, evaluate, storage=storage, trials=2, device="cpu", **more)

    run(document)

    def refused(words: str, content: dict[str, Any] = document, *rest: Any, **more: Any) -> None:
        with pytest.raises(RecipeError, match=words):
            run(content, *rest, **more)

    refused(
        r"another search space \(models\[0\].parameters.weight differs",
        recipe(inputs, {"search": [0, 2]}, 0.5),
    )
    refused("another recipe", recipe(inputs, RANGE, 0.6))
    refused(r"another direction \(maximize\)", direction="minimize")
    refused(r"another evaluation \(bowl\)", document, lambda state: 0.0)
    other = recipe(tmp_path, RANGE, 0.5)
    for name in ("base", "a", "b"):
        (tmp_path / name).symlink_to(inputs / name)
    refused("another recipe", other)
    weights = inputs / "a" / "model.safetensors"
    before = weights.stat()
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    refused(r"other inputs \(.*model.safetensors differs")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run(document, seed=9).new == 0
    (tmp_path / "no.db").write_bytes(b"text" * 100)
    with pytest.raises(OutputError, match="is no storage of a study"):
        search(document, bowl, storage=tmp_path / "no.db", device="cpu")


def test_one_process_at_a_time(inputs: Path, tmp_path: Path) -> None:
    def inner(state: Mapping[str, Tensor]) -> float:
        with pytest.raises(OutputError, match="another search is at work"):
            search(recipe(inputs, RANGE, 0.5), bowl, storage=tmp_path / "s.db", device="cpu")
        return bowl(state)

    search(recipe(inputs, RANGE, 0.5), inner, storage=tmp_path / "s.db", trials=1, device="cpu")


# Trials that fail.


def test_failed_trials_are_no_crash_unless_all_fail(inputs: Path) -> None:
    calls: list[int] = []

    def sometimes(state: Mapping[str, Tensor]) -> float:
        calls.append(1)
        if len(calls) == 2:
            return math.nan
        if len(calls) == 3:
            raise ZeroDivisionError("no")
        return bowl(state)

    result = search(recipe(inputs, RANGE, RANGE), sometimes, trials=6, device="cpu")
    assert [trial.score is None for trial in result.trials] == [False, True, True] + [False] * 3
    assert result.trials[1].error == "the score is nan"
    assert "ZeroDivisionError: no" in result.trials[2].error
    assert "2 of which failed" in result.to_yaml()
    json.dumps(result.to_json(), allow_nan=False)
    with pytest.raises(ClFastError, match=f"the first {GIVE_UP} trials failed.*the score is nan"):
        search(recipe(inputs, RANGE, RANGE), lambda _: math.nan, trials=50, device="cpu")
    with pytest.raises(ClFastError, match="must return a number; got str"):
        search(recipe(inputs, RANGE, RANGE), lambda _: "x", trials=50, device="cpu")  # type: ignore[return-value, arg-type]
    with pytest.raises(ClFastError, match="no trial of 2 gave a score"):
        search(recipe(inputs, RANGE, RANGE), lambda _: math.inf, trials=2, device="cpu")


def test_a_study_without_a_score_begins_anew_when_it_is_mended(inputs: Path, store: Path) -> None:
    storage, document = store / "s.db", recipe(inputs, RANGE, RANGE)
    notes: list[str] = []

    def broken(state: Mapping[str, Tensor]) -> float:
        raise ZeroDivisionError

    def run(evaluate: Any, document: Any = document, **more: Any) -> Any:
        return search(
            document, evaluate, storage=storage, trials=6, device="cpu", say=notes.append, **more
        )

    with pytest.raises(ClFastError, match="the first 5 trials failed"):
        run(broken)
    with pytest.raises(ClFastError, match="the first 5 trials failed"):
        run(broken)  # it may have been mended inside
    with pytest.raises(ClFastError, match="the first 5 trials failed"):
        run(broken, recipe(inputs, RANGE, {"search": [0, 2]}), direction="minimize")
    result = run(bowl)
    assert [trial.error for trial in result.trials] == [""] * 6
    assert len(notes) == 3
    assert re.search(r"no trial in .* \(5 failed\): begins anew", notes[0])
    with pytest.raises(RecipeError, match="another evaluation"):
        run(broken)


def test_steps_that_repeat_are_not_evaluated_again(inputs: Path) -> None:
    calls: list[float] = []

    def score(state: Mapping[str, Tensor]) -> float:
        calls.append(float(state[X.format(0)][0]))
        return bowl(state)

    steps = {"search": [0.0, 1.0], "step": 0.5}
    result = search(recipe(inputs, steps, 0.75), score, trials=15, device="cpu")
    assert sorted(calls) == [0.0, 0.5, 1.0]
    assert len(result.trials) == 15
    known = {tuple(t.values.values()): t.score for t in result.trials[::-1]}
    assert all(known[tuple(t.values.values())] == t.score for t in result.trials)


# Greedy soup.


def test_the_greedy_soup_is_that_of_the_soup(tmp_path: Path, store: Path) -> None:
    values = {"one": 0.9, "two": 0.2, "three": 0.6, "four": 0.1}
    for name, value in values.items():
        cases.save(tmp_path / name, {"w": torch.tensor([value])})

    def near(state: Mapping[str, Tensor]) -> float:
        return -abs(float(state["w"]) - 0.55)

    document = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / n), "parameters": {"weight": 1.0}} for n in values],
    }
    wanted = greedy_soup(
        {name: cases.load(tmp_path / name) for name in values}, lambda state: near(state)
    )
    given: dict[str, Any] = {"strategy": "greedy_soup", "device": "cpu", "storage": store / "s"}
    with pytest.raises(ClFastError, match="no trial"):
        search(document, near, timeout=1e-9, **given)
    part = search(document, near, trials=3, **given)
    assert part.new == 3
    assert search(document, near, trials=3, **given).new == 0  # they are counted with earlier ones
    result = search(document, near, **given)
    assert result.new == 2 * len(values) - 1 - 3
    chosen = [Path(entry["model"]).name for entry in result.recipe["models"]]
    assert tuple(chosen) == wanted.chosen
    assert result.best.score == wanted.score
    assert result.table(1)[0].split() == ["score", "trial", "models"]
    down = search(
        document, lambda state: -near(state), direction="minimize",
        **(given | {"storage": None}),
    )  # fmt: skip
    assert down.recipe == result.recipe


# Models, commands.


def test_a_function_may_take_the_model(tmp_path: Path) -> None:
    import tiny_models

    for sign, name in ((1, "one"), (-1, "two")):
        model = tiny_models.llama()
        with torch.no_grad():
            for value in model.parameters():
                value += (
                    sign
                    * 0.1
                    * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
                )
        model.save_pretrained(tmp_path / name)
    from transformers import AutoModelForCausalLM

    one = AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval()
    x = torch.arange(1, 9)[None]
    wanted = one(x).logits
    seen = set()

    def like_one(model: Any) -> float:
        seen.add(id(model))
        with torch.no_grad():
            return -float((model(x).logits - wanted).square().mean())

    document = {
        "merge_method": "linear",
        "models": [
            {"model": str(tmp_path / "one"), "parameters": {"weight": {"choices": [0.5, 1.0]}}},
            {"model": str(tmp_path / "two"), "parameters": {"weight": {"choices": [0.5, 0.0]}}},
        ],
    }
    result = search(document, like_one, sampler="grid", gives="model", device="cpu")
    assert [trial.values["models[1].parameters.weight"] for trial in result.top(2)] == [0.0, 0.0]
    assert result.best.score == pytest.approx(0, abs=1e-9)
    assert result.top(3)[2].score < -1e-4
    assert len(result.trials) == 4
    assert len(seen) == 1


SCORE = """import json, os, struct, sys, time
folder = sys.argv[1]
assert os.path.exists(os.path.join(folder, "config.json"))
open({log!r}, "a").write(folder + chr(10))
with open(os.path.join(folder, "model.safetensors"), "rb") as file:
    size = struct.unpack("<Q", file.read(8))[0]
    header = json.loads(file.read(size))
    start, _ = header["model.layers.0.w"]["data_offsets"]
    file.seek(8 + size + start)
    a, b = struct.unpack("<2f", file.read(8))
if os.path.exists({stop!r}):
    time.sleep(60)
if a > 0.9:
    sys.exit(3)
print("loss", (a - 0.25) ** 2)
"""


@pytest.fixture
def study(inputs: Path, tmp_path: Path) -> Path:
    log, stop = str(tmp_path / "log"), str(tmp_path / "stop")
    (tmp_path / "score.py").write_text(SCORE.format(log=log, stop=stop))
    content = {
        "recipe": recipe(inputs, {"search": [0.0, 1.0], "step": 0.25}, 0.5),
        "evaluate": f"{sys.executable} -S {tmp_path / 'score.py'} {{}}",
        "direction": "minimize",
        "sampler": "grid",
    }
    file = tmp_path / "study.yml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_a_command_scores_folders_in_memory(
    inputs: Path, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "best.yml"
    assert main(["search", str(study), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "ended with code 3" in said
    assert said.splitlines()[-1].endswith("study.db, 5 of them new")
    assert re.search(r"^1 .* a.weight=0.25 \*$", said, re.MULTILINE)
    assert re.search(r"^score +trial +a.weight$", said, re.MULTILINE)
    folders = (tmp_path / "log").read_text().split()
    assert all(folder.startswith("/dev/shm/cl_fast-search-") for folder in folders)
    assert not any(Path(folder).exists() for folder in folders)
    assert not list(Path(folders[0]).parents[1].glob("*"))
    best = yaml.safe_load(out.read_text())
    assert best == recipe(inputs, 0.25, 0.5)
    assert main(["merge", str(out), str(tmp_path / "merged"), "--quiet"]) == 0
    merged = cases.load(tmp_path / "merged")[X.format(0)]
    assert torch.equal(merged, torch.tensor([0.25, 0.5]))
    trials = json.loads(out.with_suffix(".json").read_text())["trials"]
    assert [trial["score"] is None for trial in trials] == [False] * 4 + [True]
    assert main(["search", str(study), "--out", str(out)]) == 0
    assert "0 of them new" in capsys.readouterr().out


def test_the_head_of_the_best_recipe_counts_the_trials_so_far(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: list[str] = []

    def stop(path: Path, parts: Any, **_: Any) -> None:
        text = b"".join(parts).decode()
        if text.startswith("#"):
            heads.append(text.splitlines()[0].split(", ", 1)[1])

    monkeypatch.setattr("cl_fast.checkpoints.writing.write_whole", stop)
    assert main(["search", str(study), "--out", str(tmp_path / "b"), "--quiet"]) == 0
    assert [head.split(" of ")[1].split(",")[0] for head in heads[:5]] == ["1", "2", "3", "4", "5"]


def test_a_killed_search_goes_on(study: Path, tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    command = [sys.executable, "-m", "cl_fast", "search", str(study), "--out", str(tmp_path / "b")]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    log = tmp_path / "log"
    deadline = time.monotonic() + 60
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    left = Path(log.read_text().split()[0])
    assert left.exists()
    (tmp_path / "stop").unlink()
    assert main(["search", str(study), "--out", str(tmp_path / "b"), "--quiet"]) == 0
    assert not left.exists()
    trials = json.loads((tmp_path / "b.json").read_text())["trials"]
    assert [trial["values"]["models[0].parameters.weight"] for trial in trials] == [
        0.0, 0.25, 0.5, 0.75, 1.0,
    ]  # fmt: skip


def test_without_room_in_memory_the_disk_serves_and_says_so(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cl_fast.merging import candidates

    monkeypatch.setattr(candidates, "_SHARED", tmp_path / "none")
    notes: list[str] = []
    search(load_study(study), storage=tmp_path / "s.db", trials=2, say=notes.append)
    assert [("candidates are written to" in note) for note in notes] == [False, True]
    folders = (tmp_path / "log").read_text().split()
    assert all(folder.startswith(str(tmp_path / ".s.db.candidates")) for folder in folders)
    assert not (tmp_path / ".s.db.candidates").exists()


def test_a_study_names_a_function_beside_it(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "scores_of_mine.py").write_text(
        "def first(state):\n    return float(state['model.layers.0.w'][0])\n"
    )
    content = {
        "recipe": recipe(inputs, {"choices": [0.25, 0.5]}, 0.5),
        "function": "scores_of_mine:first", "device": "cpu", "sampler": "grid",
    }  # fmt: skip
    (tmp_path / "study.yml").write_text(yaml.safe_dump(content))
    result = search(load_study(tmp_path / "study.yml"))
    assert result.best.values == {"models[0].parameters.weight": 0.5}


def test_an_input_that_changes_during_a_study_ends_it(inputs: Path, tmp_path: Path) -> None:
    cases.save(tmp_path / "b", {X.format(i): torch.ones(2) for i in range(3)})
    content = recipe(inputs, RANGE, 0.5)
    content["models"][1]["model"] = str(tmp_path / "b")
    scored: list[float] = []

    def evaluate(state: Mapping[str, Tensor]) -> float:
        scored.append(bowl(state))
        if len(scored) == 2:  # a training goes on there
            shutil.rmtree(tmp_path / "b")
            cases.save(tmp_path / "b", {X.format(i): -torch.ones(2) for i in range(3)})
        return scored[-1]

    with pytest.raises(CheckpointError, match=r"b/model\.safetensors: was changed since the study"):
        search(content, evaluate, trials=5, device="cpu", sampler="random")
    assert len(scored) == 2


def test_a_storage_that_sqlite_would_call_otherwise_is_refused(
    inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match=r"SQLite takes no '\?'"):
        search(recipe(inputs, RANGE, 1), bowl, storage=tmp_path / "a?b.db", device="cpu", trials=1)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "study.yml"], r"--out: study\.yml is the study as well"),
        (["--out", "best.json"], r"--json: best\.json is the out as well"),
        (["--out", "best.yml", "--storage", "best.yml"], "--out: best.yml is the storage as well"),
        (["--out", "best.yml", "--json", "study.db"], "--json: study.db is the storage as well"),
        (["--out", "none/best.yml"], "--out: none/best.yml lies in a folder that does not exist"),
    ],
)
def test_no_file_of_a_search_is_written_over_another(
    study: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["search", study.name, *arguments]) == 1
    assert re.search(words, capsys.readouterr().err)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# Bad input.

PLACES: list[Any] = [
    ({"search": [1, 0]}, "goes down"),
    ({"search": 3}, r"must be \[low, high\]"),
    ({"search": ["a", 1]}, "must be a number"),
    ({"search": [0, 1], "log": True}, "must begin above 0"),
    ({"search": [1, 2], "log": 1}, "log: must be true or false"),
    ({"search": [0, 1], "step": 0}, "step: must be above 0"),
    ({"search": [1, 2], "step": 0.1, "log": True}, "contradict"),
    ({"search": [0, 1], "gradient": 1}, "number of points, 2 to 64"),
    ({"search": [0, 1], "steps": 2}, "'steps' is unknown beside search"),
    ({"choices": []}, "must be a list of values"),
    ({"search": [0, 1], "name": 3}, "name: must be text"),
    (0.5, "has no place to search"),
    ({"search": [0, math.inf]}, "must be a number"),
    ({"search": [0, 1e39]}, r"the recipe with models\[0\].parameters.weight: 5e\+38"),
    ({"choices": [0.5, "much"]}, "the recipe with .*weight: much"),
    ({"serch": [0, 1], "gradient": 4}, "unknown key 'serch'; did you mean 'search'"),
]


@pytest.mark.parametrize(("node", "words"), PLACES)
def test_places_that_are_refused(inputs: Path, node: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        search(recipe(inputs, node, 0.5), bowl, trials=1, device="cpu")


STUDIES: list[Any] = [
    ({"trails": 5}, "unknown key 'trails'; did you mean 'trials'"),
    ({"recipe": 3}, "recipe: must be a recipe"),
    ({"evaluate": None}, "give either evaluate"),
    ({"evaluate": "score"}, "does not say {}"),
    ({"evaluate": None, "function": "score"}, "must be written as module:function"),
    ({"evaluate": None, "function": "no_such_module_x:f"}, "cannot be imported"),
    ({"evaluate": None, "function": "math:no_such"}, "has no function"),
    ({"trials": 0}, "trials must be at least 1"),
    ({"trials": "many"}, "trials must be an int"),
    ({"sampler": "gp"}, "sampler must be one of"),
    ({"direction": "up"}, "direction must be one of"),
    ({"timeout": -1}, "timeout must be positive"),
    ({"gives": "model"}, "gives: has no effect with a command"),
    ({"strategy": "greedy_soup"}, "greedy_soup chooses among the models"),
    *(
        (
            {"recipe": {"merge_method": "ties", "parameters": {"density": place}}},
            r"study.yml: parameters.density: density must be above 0 and at most 1; got " + got,
        )
        for place, got in (
            ({"search": [0.05, 2.0]}, "2.0"),
            ({"search": [0, 1], "gradient": 3}, "0.0"),
            ({"choices": [0.5, 1.5]}, "1.5"),
        )
    ),
]


@pytest.mark.parametrize(("changes", "words"), STUDIES)
def test_studies_that_are_refused(
    inputs: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    content = {"recipe": recipe(inputs, RANGE, 0.5), "evaluate": "score {}"} | changes
    (tmp_path / "study.yml").write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=words):
        search(load_study(tmp_path / "study.yml"), storage=tmp_path / "s.db")
    assert not (tmp_path / "s.db").exists()


def test_what_else_is_found_before_the_first_trial(inputs: Path, tmp_path: Path) -> None:
    def never(state: Any) -> float:
        raise AssertionError("evaluated")

    with pytest.raises(RecipeError, match=r"is 0 to 2 here and 0 to 1 before"):
        search(
            recipe(inputs, {"search": [0, 1], "name": "w"}, {"search": [0, 2], "name": "w"}), never
        )
    with pytest.raises(CheckpointError, match=r"^models\[0\].model.*nowhere"):
        search(recipe(tmp_path / "nowhere", RANGE, 0.5, base_model=str(inputs / "base")), never)
    with pytest.raises(RecipeError, match="sampler: grid needs a step"):
        search(recipe(inputs, RANGE, 0.5), never, sampler="grid")
    with pytest.raises(RecipeError, match="adapts two ranges or more; the recipe has 1"):
        search(recipe(inputs, RANGE, 0.5), never, sampler="cma-es")
    with pytest.raises(RecipeError, match="device: 'nonsense' cannot be used here"):
        search(recipe(inputs, RANGE, 0.5), never, device="nonsense")
    with pytest.raises(RecipeError, match="leads nowhere in the recipe"):
        search(recipe(inputs, 0.5, 0.5), never, space={"models[7].weight": RANGE})
    content = recipe(inputs, RANGE, 0.5, merge_method="ties")
    content["parameters"] = {"density": {"search": [0, 1]}}
    with pytest.raises(RecipeError, match="density"):
        search(content, never)
    with pytest.raises(ClFastError, match="does not start"):
        search(recipe(inputs, RANGE, 0.5), "no-such-command-x {}")
    # Two weights that may both be 0 are no error: such a trial would fail.
    linear = {
        "merge_method": "linear",
        "models": [
            {"model": str(inputs / name), "parameters": {"weight": RANGE}} for name in ("a", "b")
        ],
    }
    assert search(linear, bowl, trials=1, device="cpu").new == 1
