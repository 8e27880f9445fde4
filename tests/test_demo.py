"""The demo, with a few training steps: every stage runs, and the files are what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo"
METHODS = {"linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"}

for needed in ("transformers", "matplotlib", "rich"):
    pytest.importorskip(needed, reason=f"{needed} is not installed (pip install 'cl_fast[demo]')")


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEMO / "demo.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_demo_runs_every_stage(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_demo(
        "--out", str(out), "--base-steps", "2", "--finetune-steps", "1", "--questions", "4"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert set(scores["finetuned"]) == {"upper", "roman", "words"}
    assert set(scores["merged"]) == METHODS
    assert (out / "scores.png").read_bytes().startswith(b"\x89PNG")
    for folder in (*(out / "models").iterdir(), *(out / "merged").iterdir()):
        assert len(list(folder.glob("model-*.safetensors"))) > 1, folder
        assert (folder / "model.safetensors.index.json").exists()
        assert (folder / "tokenizer.json").exists()
    for method in METHODS:
        assert method in done.stdout


def test_demo_leaves_a_folder_of_others_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep", encoding="utf-8")
    done = run_demo("--out", str(tmp_path))
    assert done.returncode != 0
    assert "was not made by this demo" in done.stderr
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "keep"


@pytest.mark.parametrize(
    ("task", "question", "answer"),
    [
        ("upper", "cat", "CAT"),
        ("roman", "47", "XLVII"),
        ("roman", "999", "CMXCIX"),
        ("words", "7", "seven"),
        ("words", "40", "forty"),
        ("words", "300", "three hundred"),
        ("words", "912", "nine hundred twelve"),
        ("words", "347", "three hundred forty-seven"),
    ],
)
def test_tasks_are_answered_right(
    task: str, question: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(DEMO))
    import tasks

    assert tasks.TASKS[task].answer(question) == answer


def test_what_is_asked_was_never_seen_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DEMO))
    import tasks

    corpus = tasks.make_corpus(0)
    assert len(corpus.held_words) == len(corpus.held_numbers) == 200
    assert not set(corpus.words) & set(corpus.held_words)
    assert not set(corpus.numbers) & set(corpus.held_numbers)
    assert len(corpus.numbers) + len(corpus.held_numbers) == 999
