"""The flags of mergekit's commands: each has its effect, is told to have none, or is refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from merge_cases import family, recipe, write_recipe

from cl_fast.cli import main
from cl_fast.cli.mergekit import shard_size


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family(tmp_path_factory.mktemp("flags"))


def run(root: Path, folder: Path, *flags: str, method: str = "linear") -> int:
    path = write_recipe(folder / "recipe.yml", recipe(root, method))
    return main(["merge", str(path), str(folder / "out"), *flags])


@pytest.mark.parametrize(
    ("text", "value"),
    [("5B", 5_000_000_000), ("2b", 2_000_000_000), ("3M", 3_000_000), ("7k", 7_000), ("9", 9)],
)
def test_shard_sizes_mean_what_they_mean_there(text: str, value: int) -> None:
    assert shard_size(text) == value


def test_flags_with_an_effect(root: Path, tmp_path: Path) -> None:
    flags = ["--random-seed", "7", "-j", "1", "--out-shard-size", "100K", "--no-copy-tokenizer"]
    flags += ["--no-write-model-card"]
    assert run(root, tmp_path, *flags, method="dare_linear") == 0
    out = tmp_path / "out"
    assert json.loads((out / "cl_fast_merge.json").read_text())["seed"] == 7
    names = {path.name for path in out.iterdir()}
    assert sum(name.endswith(".safetensors") for name in names) > 4
    assert not names & {"tokenizer.json", "chat_template.jinja", "README.md"}
    assert {"config.json", "generation_config.json"} <= names
    assert main(["verify", str(out), "--quiet"]) == 0


def test_models_of_the_hub_are_looked_for_in_its_cache(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "other"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "other"))
    cache = tmp_path / "cache" / "models--org--tiny"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "snapshots" / ("a" * 40)).symlink_to(root / "one", target_is_directory=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    content = recipe(root, "linear")
    content["models"][0]["model"] = "org/tiny"
    path = str(write_recipe(tmp_path / "recipe.yml", content))
    words = ["merge", path, str(tmp_path / "out"), "--dry-run"]
    assert main(words) == 1
    assert main([*words, "--transformers-cache", str(tmp_path / "cache")]) == 0
    assert os.environ["HF_HUB_CACHE"] == str(tmp_path / "cache")


NOTHING = ["cuda", "gpu-rich", "low-cpu-memory", "read-to-gpu", "multi-gpu", "lazy-unpickle"]
NOTHING += ["clone-tensors", "async-write", "trust-remote-code"]


def test_flags_without_effect_are_told(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    valued = ["write-threads", "4", "lora-merge-cache", "x", "lora-merge-dtype", "float16"]
    flags = [f"--{name}" for name in NOTHING]
    for name, value in zip(valued[::2], valued[1::2], strict=True):
        flags += [f"--{name}", value]
    assert run(root, tmp_path, *flags, "--device", "cuda:0", "-v", "--dry-run") == 0
    told = capsys.readouterr().out
    for name in [*NOTHING, *valued[::2], "device cuda:0"]:
        assert f"note: --{name} changes nothing: " in told
    assert run(root, tmp_path, "--device", "auto", "--dry-run") == 0
    assert "note: --device auto changes nothing: " in capsys.readouterr().out
    flags = [*(f"--no-{name}" for name in NOTHING), "--device", "cpu"]
    assert run(root, tmp_path, *flags, "--dry-run") == 0
    assert "changes nothing" not in capsys.readouterr().out


def test_pickles_are_not_written(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, tmp_path, "--no-safe-serialization") == 1
    assert "pickles are not written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_page_names_tests_that_there_are() -> None:
    tests = Path(__file__).parents[1]
    page = (tests.parent / "docs" / "from-mergekit.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 20
    text = "\n".join(path.read_text() for path in tests.rglob("test_*.py"))
    assert {name for name in named if f"def {name}(" not in text} == set()
