"""Several recipes in one file: order, references by name, what is planned, skipped and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from merge_cases import family, load, raw, snapshot

from cl_fast.cli import main
from cl_fast.errors import ClFastError, Interrupted, OutputError
from cl_fast.merging.plan import Plan
from cl_fast.merging.stages import load_stages, merge_stages, plan_stages


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family(tmp_path_factory.mktemp("stages"))


def soup(root: Path, *models: str, name: str | None = None) -> dict[str, Any]:
    listed = [{"model": str(root / m) if (root / m).is_dir() else m} for m in models]
    content: dict[str, Any] = {} if name is None else {"name": name}
    return content | {"merge_method": "linear", "models": listed, "out_dtype": "float32"}


def write(folder: Path, *documents: Any) -> Path:
    path = folder / "multi.yml"
    path.write_text("---\n".join(yaml.safe_dump(d, sort_keys=False) for d in documents))
    return path


def test_stages_are_merged_in_order(root: Path, tmp_path: Path) -> None:
    """The mean of a mean, exactly; the file has its parts in another order."""
    final = soup(root, "ab", "three")
    path = write(tmp_path, final, soup(root, "aa", "two", name="ab"), soup(root, "one", name="aa"))
    stages = load_stages(path, tmp_path / "out")
    assert [stage.name for stage in stages] == ["aa", "ab", None]
    assert stages[0].output == tmp_path / "out.stages" / "aa"
    merge_stages(stages)
    one, two, three = (load(root / name) for name in ("one", "two", "three"))
    made = load(tmp_path / "out")
    for name, value in made.items():
        if value.is_floating_point():
            half = ((one[name].double() + two[name].double()) / 2).float()
            want = ((half.double() + three[name].double()) / 2).float()
            assert torch.equal(value, want), name
    assert made.keys() == one.keys()


def test_finished_stages_are_used_again(root: Path, tmp_path: Path) -> None:
    path = write(tmp_path, soup(root, "one", "two", name="ab"), soup(root, "ab", "three"))
    seen: list[bool] = []

    def again() -> list[bool]:
        seen.clear()
        merge_stages(
            load_stages(path, tmp_path / "out"),
            overwrite=True,
            tell=lambda plan, result: seen.append(result is not None),
        )
        return list(seen)

    assert again() == [True, True]
    stage = tmp_path / "out.stages" / "ab"
    before = snapshot(stage)
    assert again() == [False, True]
    assert snapshot(stage) == before
    # One flipped bit of a finished stage, and it is made again, to the same bytes.
    weights = stage / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert again() == [True, True]
    assert {n: d.split()[0] for n, d in snapshot(stage).items()} == {
        n: d.split()[0] for n, d in before.items()
    }
    # Another recipe of the stage.
    write(tmp_path, soup(root, "one", "three", name="ab"), soup(root, "ab", "three"))
    assert again() == [True, True]
    # A folder that no merge made is left alone.
    (stage / "cl_fast_merge.json").unlink()
    with pytest.raises(OutputError, match="holds something else"):
        again()


def test_a_stage_of_another_policy_of_nan_is_made_again(root: Path, tmp_path: Path) -> None:
    path = write(tmp_path, soup(root, "one", "two", name="ab"), soup(root, "ab", "three"))
    stages = load_stages(path, tmp_path / "out")
    seen: list[bool] = []

    def merge(nan: Any) -> list[bool]:
        seen.clear()
        merge_stages(
            stages, overwrite=True, nan=nan, tell=lambda _, result: seen.append(result is not None)
        )
        return list(seen)

    assert merge("propagate") == [True, True]
    assert merge("refuse") == [True, True]
    assert merge("refuse") == [False, True]
    assert merge("propagate") == [False, True]


def test_an_interrupted_stage_goes_on(root: Path, tmp_path: Path) -> None:
    path = write(tmp_path, soup(root, "one", "two", name="ab"), soup(root, "ab", "three"))
    planning = {"out_shard_size": 300_000}
    merge_stages(load_stages(path, tmp_path / "whole"), planning=planning)

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "merge" and done > total // 2:
            raise KeyboardInterrupt

    stages = load_stages(path, tmp_path / "out")
    with pytest.raises(Interrupted):
        merge_stages(stages, planning=planning, progress=stop)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="--resume continues it"):
        merge_stages(stages, planning=planning)
    resumed: list[int] = []
    merge_stages(
        stages,
        planning=planning,
        resume=True,
        tell=lambda plan, result: resumed.append(result.resumed if result else -1),
    )
    assert resumed[0] > 0
    assert raw(tmp_path / "out") == raw(tmp_path / "whole")


def test_all_is_planned_before_anything_is_written(root: Path, tmp_path: Path) -> None:
    last = soup(
        root,
        "ab",
        "three",
    ) | {"merge_method": "ties", "base_model": "ab"}
    last["parameters"] = {"density": [{"filter": "mlpp", "value": 0.5}, {"value": 1}]}
    path = write(tmp_path, soup(root, "one", "two", name="ab"), last)
    with pytest.raises(ClFastError, match=r"the final merge: .*'mlpp' matches no tensor"):
        merge_stages(load_stages(path, tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["multi.yml"]


def test_slices_of_a_stage_are_planned(root: Path, tmp_path: Path) -> None:
    """A merge of a merge with another number of layers."""
    first = {
        "name": "deep",
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": str(root / "one"), "layer_range": [0, 2]}]},
            {"sources": [{"model": str(root / "two"), "layer_range": [1, 2]}]},
        ],
    }
    second = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": "deep", "layer_range": [1, 3]}]}],
    }
    stages = load_stages(write(tmp_path, first, second), tmp_path / "out")
    plans: list[Plan] = plan_stages(stages)
    assert [len(plan.tensors) for plan in plans] == [9, 7]
    merge_stages(stages)
    made, two = load(tmp_path / "out"), load(root / "two")
    assert torch.equal(
        made["model.layers.1.mlp.up_proj.weight"], two["model.layers.1.mlp.up_proj.weight"]
    )


ERRORS: list[tuple[list[Any], str]] = [
    ([{"name": "x", "models": ["y"]}, {"name": "y", "models": ["x"]}], "in a circle"),
    ([{"name": "x", "models": ["one"]}, {"name": "x", "models": ["x"]}], "'x' is taken"),
    ([{"models": ["one"]}, {"models": ["one"]}], "document 2: has no name"),
    ([{"name": "a/b", "models": ["one"]}, {"models": ["one"]}], "fit for a folder's name"),
    ([{"name": 3, "models": ["one"]}, {"models": ["one"]}], "name: must be text"),
    ([{"name": "first", "models": ["one"]}, {"models": ["frist"]}], "called 'first'"),
    ([{"name": "x", "models": ["y"]}, {"name": "y", "models": ["one"]}], "comes last"),
    ([["a"], {"models": ["one"]}], "document 1: a recipe is a mapping"),
    ([{"name": "x", "models": []}, {"models": ["x"]}], r"document 1 \(x\): models: is empty"),
]


@pytest.mark.parametrize(("documents", "words"), ERRORS)
def test_files_that_cannot_be(root: Path, tmp_path: Path, documents: Any, words: str) -> None:
    filled = [
        soup(root, *d["models"]) | ({"name": d["name"]} if "name" in d else {})
        if isinstance(d, dict)
        else d
        for d in documents
    ]
    path = write(tmp_path, *filled)
    with pytest.raises(ClFastError, match=words):
        merge_stages(load_stages(path, tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["multi.yml"]


def test_the_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, soup(root, "one", "two", name="ab"), soup(root, "ab", "three"))
    words = ["merge", str(path), "--out-path", str(tmp_path / "out"), "-I", str(tmp_path / "mid")]
    assert main([*words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert str(tmp_path / "mid" / "ab") in shown
    assert "that is made first" in shown
    assert not (tmp_path / "mid").exists()
    assert main(words) == 0
    assert (tmp_path / "mid" / "ab" / "config.json").exists()
    assert main([*words, "--overwrite"]) == 0
    assert "finished earlier, and sound" in capsys.readouterr().out
    assert main([*words, "--overwrite", "--no-lazy"]) == 0
    assert "finished earlier" not in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "out"), "--sample", "all", "--quiet"]) == 0
