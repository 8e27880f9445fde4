"""`verify` finds every kind of damage, and finds none where there is none."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import merge_cases as cases
import pytest

from cl_fast.errors import VerifyError
from cl_fast.merging import execute, make_plan, parse_recipe
from cl_fast.merging.checksum import crc64_eager
from cl_fast.merging.verify import Report, verify

TENSOR = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return cases.family(tmp_path / "inputs")


@pytest.fixture
def merged(root: Path, tmp_path: Path) -> Path:
    return execute(cases.plan(root, tmp_path / "out")).output


def found(report: Report, words: str) -> bool:
    """Exactly one problem, and it says this."""
    return not report.ok and len(report.problems) == 1 and words in report.problems[0]


@pytest.mark.parametrize("method", cases.METHODS)
def test_a_sound_folder(root: Path, tmp_path: Path, method: str, backend: str) -> None:
    plan = cases.plan(root, tmp_path / "out", method, **({"seed": 9} if "dare" in method else {}))
    out = execute(plan).output
    before = cases.snapshot(out), cases.snapshot(root)
    report = verify(out, backend=backend, sample=None)
    assert report.ok, report.problems
    assert report.notes == []
    assert (report.tensors, report.inputs) == (len(plan.tensors), len(plan.inputs))
    assert sorted(report.recomputed) == sorted(tensor.name for tensor in plan.tensors)
    assert (cases.snapshot(out), cases.snapshot(root)) == before


def test_relative_references_are_found_from_anywhere(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The streams were keyed by names as written; the paths are the recorded ones."""
    monkeypatch.chdir(root.parent)
    execute(cases.plan(Path("inputs"), tmp_path / "out", "dare_linear"))
    monkeypatch.chdir("/")
    report = verify(tmp_path / "out", sample=None)
    assert report.ok, report.problems
    assert len(report.recomputed) == 7


def test_one_flipped_bit(merged: Path) -> None:
    path = min(merged.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    report = verify(merged, inputs=False)
    assert found(report, "is not what was written (checksum")
    assert str(path) in report.problems[0]


def test_nan_in_the_output(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases.poison(merged, TENSOR, 3, float("nan"))
    for native in ("1", "0"):
        monkeypatch.setenv("CL_FAST_NATIVE", native)
        report = verify(merged, inputs=False)
        assert any(f"tensor {TENSOR} holds 1 NaN" in words for words in report.problems)


@pytest.mark.parametrize("damage", ["truncated", "missing", "index", "header"])
def test_files_that_do_not_fit(merged: Path, damage: str) -> None:
    path = min(merged.glob("*.safetensors"))
    words = path.name
    if damage == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "missing":
        path.unlink()
    elif damage == "header":
        path.write_bytes(b"\0" * 7 + path.read_bytes()[7:])
    else:
        index = merged / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        del content["weight_map"][TENSOR]
        index.write_text(json.dumps(content))
        words = f"holds tensor '{TENSOR}', but {index} does not know it"
    report = verify(merged)
    assert found(report, words)


def test_a_lost_config_and_an_edited_card(merged: Path) -> None:
    (merged / "README.md").write_text("mine")
    report = verify(merged)
    assert report.ok
    assert report.notes == ["README.md was changed since the merge"]
    (merged / "config.json").unlink()
    assert found(verify(merged), "config.json: was written by the merge and is missing")


def test_an_input_that_changed(root: Path, merged: Path) -> None:
    cases.poison(root / "two", TENSOR, 3, 1.0)
    report = verify(merged)
    assert found(report, "is not what was merged: tensor " + TENSOR)
    assert report.recomputed == []
    assert verify(merged, inputs=False).ok


def test_an_input_with_another_header(root: Path, merged: Path) -> None:
    state = cases.load(root / "one")
    shutil.rmtree(root / "one")
    cases.save(root / "one", {name: value.float() for name, value in state.items()})
    assert found(verify(merged), "is not what was merged: the header of model.safetensors")


def test_an_input_that_is_gone(root: Path, merged: Path) -> None:
    shutil.rmtree(root / "one")
    report = verify(merged)
    assert report.ok
    assert any("is not at" in note for note in report.notes)
    assert report.recomputed == []
    assert report.lines()[0] == (
        f"{merged}: as written; nothing was computed again, since 1 of 4 inputs could not be read"
    )
    for name in ("base", "two", "three"):
        shutil.rmtree(root / name)
    assert verify(merged).lines()[0] == (
        f"{merged}: as written; nothing was computed again, since no input could be read"
    )
    assert verify(merged, inputs=False).lines()[0] == f"{merged}: sound"


def test_a_store_that_gives_no_answer_is_not_an_input_that_is_gone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    monkeypatch.setenv("CL_FAST_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    store.put(f"{root}/", "/verified/", recursive=True)
    content = json.dumps(cases.recipe(root)).replace(f"{root}/", "memory://verified/")
    out = execute(make_plan(parse_recipe(json.loads(content)), tmp_path / "out")).output
    assert verify(out).lines()[0] == f"{out}: sound"

    def down(*_: object, **__: object) -> None:
        raise ConnectionError

    with monkeypatch.context() as patch:
        for name in ("ls", "info", "find", "exists", "isdir", "isfile"):
            patch.setattr(type(store), name, down)
        report = verify(out)
    assert report.ok
    assert "since no input could be read" in report.lines()[0]
    assert all("was not looked at: memory://verified/" in note for note in report.notes)
    assert all("the store cannot be reached" in note for note in report.notes)
    store.rm("/verified", recursive=True)
    assert all("is not at memory://verified/" in note for note in verify(out).notes)


def test_a_forged_record_is_found_by_computing_again(merged: Path) -> None:
    """Weights and their checksum changed together: only the inputs can tell."""
    cases.poison(merged, TENSOR, 3, 1.0)
    path = merged / "cl_fast_merge.json"
    manifest = json.loads(path.read_text())
    manifest["tensors"][TENSOR]["crc64"] = f"{crc64_eager(cases.raw(merged)[TENSOR]):016x}"
    path.write_text(json.dumps(manifest))
    report = verify(merged)
    assert found(report, f"tensor {TENSOR} computed again from the inputs differs from byte")
    assert verify(merged, sample=0).ok


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="absent: there is no such folder"):
        verify(tmp_path / "absent")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "holds no cl_fast_merge.json"),
        ("{", "cannot be read"),
        ("[]", "is not a manifest"),
        ('{"format": 99}', "has format 99, this version reads 1"),
        ('{"format": 1}', "is damaged: recipe, inputs, files, tensors"),
    ],
)
def test_without_a_record_there_is_nothing_to_compare_with(
    merged: Path, content: str | None, words: str
) -> None:
    path = merged / "cl_fast_merge.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(VerifyError, match=words):
        verify(merged)


def test_propagated_nan_is_no_fault(root: Path, tmp_path: Path) -> None:
    cases.poison(root / "one", TENSOR, 3, float("nan"))
    execute(cases.plan(root, tmp_path / "out", "linear"), nan="propagate")
    report = verify(tmp_path / "out", sample=None)
    assert report.ok, report.problems
    assert report.notes == ["1 NaN or infinite values, as --nan propagate allows"]


def test_progress_and_lines(merged: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}
    report = verify(merged, progress=lambda phase, done, total: seen.update({phase: (done, total)}))
    assert all(done == total for done, total in seen.values())
    assert set(seen) == {"verify", "inputs"}
    text = "\n".join(report.lines())
    assert f"{merged}: sound" in text
    assert "inputs compared: 4" in text
