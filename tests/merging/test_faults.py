"""Whatever goes wrong, the output path is as it was, the inputs are untouched, words say why.

Every case goes through `untouched`, which compares all inputs and the output path before and after.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import merge_cases as cases
import pytest
import torch

from cl_fast.cli import main
from cl_fast.errors import CheckpointError, ClFastError, Interrupted, NonFiniteError, OutputError
from cl_fast.merging import engine, execute, executors, make_plan, output, parse_recipe

needs_mount = pytest.mark.skipif(
    not cases.may_mount(), reason="needs root with the right to mount a tmpfs"
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A family of its own for each test, since some of them damage it."""
    return cases.family(tmp_path / "inputs")


@contextlib.contextmanager
def untouched(root: Path, out: Path) -> Iterator[None]:
    """Inputs and output path must be the same afterwards; a missing output stays missing."""
    inputs = cases.snapshot(root)
    before = cases.snapshot(out) if out.exists() else None
    yield
    assert cases.snapshot(root) == inputs
    assert (cases.snapshot(out) if out.exists() else None) == before


def fails(
    root: Path, out: Path, kind: type[BaseException], words: str, run: Callable[[], object]
) -> list[str]:
    """The notes of the error. The error itself is gone then, with the files open in its frames."""
    with untouched(root, out), pytest.raises(kind, match=words) as caught:
        run()
    notes = list(getattr(caught.value, "__notes__", ()))
    del caught
    gc.collect()
    return notes


# --------------------------------------------------------------------------- where the output goes


def test_output_exists(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    fails(root, out, OutputError, "exists and is not empty.*--overwrite", lambda: run(root, out))
    assert not cases.partial(out).exists()


def run(root: Path, out: Path, method: str = "ties", **options: Any) -> engine.Result:
    return execute(cases.plan(root, out, method), **options)


def test_output_is_a_file_or_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with untouched(root, tmp_path / "real"):
        with pytest.raises(OutputError, match="is a file; give a folder"):
            run(root, tmp_path / "file", overwrite=True)
        with pytest.raises(OutputError, match="is a symbolic link"):
            run(root, tmp_path / "link", overwrite=True)
        with pytest.raises(OutputError, match="file is a file, so no folder can be made in it"):
            run(root, tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("inputs/one", "is the output folder itself|is one of the inputs"),
        ("inputs/one/out", "lies inside the input"),
        ("inputs", "lies inside the output|contains the input"),
        ("alias/two", "is the output folder itself|is one of the inputs"),
    ],
)
def test_output_is_an_input(root: Path, tmp_path: Path, place: str, words: str) -> None:
    """By the plan, and by the engine for a plan that was made otherwise."""
    (tmp_path / "alias").symlink_to(root)
    out = tmp_path / place
    fails(root, out, ClFastError, words, lambda: run(root, out, overwrite=True))
    plan = cases.plan(root, tmp_path / "elsewhere")
    moved = dataclasses.replace(plan, output=out)
    fails(root, out, OutputError, words, lambda: execute(moved, overwrite=True))


def test_files_of_a_download_cache_are_inputs_too(root: Path, tmp_path: Path) -> None:
    """Checkpoint folders there hold links to files elsewhere: that folder is no output either."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in (root / "one").iterdir():
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    before = cases.snapshot(blobs)
    with pytest.raises(OutputError, match="contains the input"):
        run(root, blobs, overwrite=True)
    assert cases.snapshot(blobs) == before


def test_single_files_may_lie_beside_the_output(root: Path, tmp_path: Path) -> None:
    """A folder of .safetensors files is no checkpoint: only the files in it are inputs."""
    models = []
    for name in ("one", "two"):
        cases.save(tmp_path / "made" / name, cases.load(root / name))
        (tmp_path / "made" / name / "model.safetensors").rename(tmp_path / f"{name}.safetensors")
        path = str(tmp_path / f"{name}.safetensors")
        models.append({"model": path, "parameters": {"weight": 1.0}})
    recipe = parse_recipe({"merge_method": "linear", "models": models})
    execute(make_plan(recipe, tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").exists()
    plan = dataclasses.replace(make_plan(recipe, tmp_path / "again"), output=tmp_path)
    with pytest.raises(OutputError, match=r"is one of the inputs|contains the input"):
        execute(plan, overwrite=True)


@needs_mount
def test_read_only_file_system(root: Path, tmp_path: Path) -> None:
    with cases.mounted(tmp_path / "disk", "size=20m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        out = disk / "out"
        fails(root, out, OutputError, "file system is read-only", lambda: run(root, out))


def test_folder_without_permission(root: Path, tmp_path: Path) -> None:
    """Root may write everywhere, so where the tests are root the merge gives that right up, and
    the folder belongs to somebody else."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    recipe = cases.write_recipe(tmp_path / "recipe.yml", cases.recipe(root))
    command = [sys.executable, "-m", "cl_fast", "merge", str(recipe), str(closed / "out")]
    if os.geteuid() == 0:
        command = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all", *command]
        os.chown(closed, 65534, 65534)
        closed.chmod(0o055)
    with untouched(root, closed / "out"):
        done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout) == (1, "")
    assert "no permission to write there" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(closed.iterdir()) == []


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "CL_FAST_THREADS": "2"}


# ------------------------------------------------------------------------------------- full disks


@needs_mount
def test_disk_too_small_is_told_before_any_work(root: Path, tmp_path: Path, backend: str) -> None:
    with cases.mounted(tmp_path / "disk", "size=400k") as disk:
        out = disk / "out"
        words = r"not enough disk space: the output needs .* are free"
        fails(root, out, OutputError, words, lambda: run(root, out, backend=backend))
        assert list(disk.iterdir()) == []


@needs_mount
def test_disk_filled_by_another_is_told_when_reserving(
    root: Path, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The free space was there when it was looked at, and is gone when it is reserved."""
    monkeypatch.setattr(output.OutputFolder, "check_space", lambda *_: None)
    with cases.mounted(tmp_path / "disk", "size=400k") as disk:
        out = disk / "out"
        words = "the disk is full .* wanted"
        fails(root, out, OutputError, words, lambda: run(root, out, backend=backend))
        assert list(disk.iterdir()) == []


@needs_mount
def test_disk_full_in_mid_write_keeps_what_is_finished(
    root: Path, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system that cannot reserve, writing is what fails; more room, and it goes on."""
    execute(cases.plan(root, tmp_path / "whole" / "out", shard=100_000), backend=backend)
    with monkeypatch.context() as patch:
        patch.setattr(output.OutputFolder, "check_space", lambda *_: None)
        patch.setattr(output, "_fallocate", lambda *_: False)
        with cases.mounted(tmp_path / "disk", "size=500k") as disk:
            out = disk / "out"
            plan = cases.plan(root, out, shard=100_000)
            notes = fails(
                root, out, OutputError, "the disk is full", lambda: execute(plan, backend=backend)
            )
            assert "run again with --resume" in notes[0]
            patch.undo()
            subprocess.run(["mount", "-o", "remount,size=40m", str(disk)], check=True)
            with untouched(root, tmp_path / "whole"):
                result = execute(plan, backend=backend, resume=True)
            assert 0 < result.resumed < result.shards
            assert cases.contents(out) == cases.contents(tmp_path / "whole" / "out")
            assert list(disk.iterdir()) == [out]


@pytest.mark.parametrize("reserve", [True, False])
def test_file_size_limit(root: Path, tmp_path: Path, backend: str, reserve: bool) -> None:
    """A limit of the user instead of the disk; runs without any privilege."""
    script = f"""
        import sys
        import merge_cases as cases
        from pathlib import Path
        from cl_fast.merging import execute, output
        if not {reserve}:
            output._fallocate = lambda *_: False
            output.os.ftruncate = lambda *_: None
        root, out = map(Path, sys.argv[1:])
        try:
            execute(cases.plan(root, out), backend={backend!r})
        except Exception as error:
            print(type(error).__name__, error)
    """
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # noqa: E731
    with untouched(root, tmp_path / "out"):
        done = python(script, root, tmp_path / "out", preexec_fn=limit)
    assert "OutputError" in done.stdout, done.stderr
    assert "larger than this system or user may write" in done.stdout
    if reserve:
        assert not cases.partial(tmp_path / "out").exists()
    else:  # one shard was small enough: it is kept, and without the limit the rest follows
        assert run(root, tmp_path / "out", resume=True).resumed == 1


def python(script: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a script in its own process, with the folders of the tests on its path."""
    env = environment()
    env["PYTHONPATH"] += os.pathsep + str(Path(__file__).parents[1])
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, **options)


# ---------------------------------------------------------------------------------- inputs that lie


def test_input_truncated_after_the_plan(root: Path, tmp_path: Path, backend: str) -> None:
    plan = cases.plan(root, tmp_path / "out")
    path = root / "one" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    words = "model.safetensors: was changed after it was planned"
    fails(root, tmp_path / "out", CheckpointError, words, lambda: execute(plan, backend=backend))
    assert not cases.partial(tmp_path / "out").exists()


def test_input_truncated_before(root: Path, tmp_path: Path) -> None:
    path = root / "one" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    out = tmp_path / "out"
    fails(root, out, CheckpointError, "model.safetensors: truncated", lambda: run(root, out))


@pytest.mark.parametrize("io", ["pread", "mmap"])
def test_input_truncated_while_it_is_read(
    root: Path, tmp_path: Path, io: str, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """The stamps are right when the work starts; the file ends too soon when it is read."""
    if backend == "eager" and io == "mmap":
        io = "auto"
    plan = cases.plan(root, tmp_path / "out")
    path = root / "two" / "model-00001-of-00002.safetensors"
    os.truncate(path, 5_000)
    monkeypatch.setattr(engine, "check_inputs", lambda _: None)
    words = "model-00001-of-00002.safetensors.*truncated"
    fails(
        root,
        tmp_path / "out",
        CheckpointError,
        words,
        lambda: execute(plan, backend=backend, io=io),  # type: ignore[arg-type]
    )
    assert not cases.partial(tmp_path / "out").exists()


def test_input_changed_while_it_is_read(root: Path, tmp_path: Path, backend: str) -> None:
    out = tmp_path / "out"

    def touch(phase: str, done: int, total: int) -> None:
        if done:
            os.utime(root / "two" / "model-00001-of-00002.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointError, match="was changed after it was planned"):
        run(root, out, backend=backend, progress=touch)
    assert not out.exists()
    assert not cases.partial(out).exists()


def test_integers_that_differ_name_tensor_and_models(
    root: Path, tmp_path: Path, backend: str
) -> None:
    state = cases.load(root / "one")
    state["model.ids"] = state["model.ids"].flip(0)
    for path in (root / "one").iterdir():
        path.unlink()
    (root / "one").rmdir()
    cases.save(root / "one", state)
    out = tmp_path / "out"
    words = "tensor model.ids is not of a floating type.*differs from that of the base in: one\n"
    fails(root, out, CheckpointError, words, lambda: run(root, out, backend=backend))
    words = "differs from that of model one in: two, three\n"
    fails(root, out, CheckpointError, words, lambda: run(root, out, "linear", backend=backend))
    assert not cases.partial(out).exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("traversal", "is not inside the checkpoint's folder; refused"),
        ("absent", "which is absent from"),
        ("pickle", "is a pickle, which could run any code"),
        ("header", "beyond the end of the file"),
    ],
)
def test_bad_checkpoints_end_the_command_in_words(
    root: Path, tmp_path: Path, damage: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    index = root / "two" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    if damage == "traversal":
        content["weight_map"]["model.norm.weight"] = "../one/model.safetensors"
        index.write_text(json.dumps(content))
    elif damage == "absent":
        (root / "two" / "model-00002-of-00002.safetensors").unlink()
    elif damage == "pickle":
        for path in (root / "two").glob("model*"):
            path.unlink()
        (root / "two" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch boom'\ntR.")
    else:
        path = root / "two" / "model-00001-of-00002.safetensors"
        path.write_bytes(b"\xff" * 7 + path.read_bytes()[7:])
    recipe = cases.write_recipe(tmp_path / "recipe.yml", cases.recipe(root))
    with untouched(root, tmp_path / "out"):
        assert main(["merge", str(recipe), str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs", "recipe.yml"]


# -------------------------------------------------------------------------------- not a number

TENSOR = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(("folder", "model"), [("base", "the base"), ("two", "model two")])
def test_nan_is_refused_by_name_and_number(
    root: Path, tmp_path: Path, backend: str, folder: str, model: str
) -> None:
    path = cases.poison(root / folder, TENSOR, 5, float("nan"))
    cases.poison(root / folder, TENSOR, 70_000, float("-inf"))
    out = tmp_path / "out"
    words = f"{path.name}: tensor {TENSOR} of {model} holds 2 NaN or infinite values.*--nan zero"
    fails(root, out, NonFiniteError, words, lambda: run(root, out, backend=backend))
    assert not (out / "config.json").exists()


@pytest.mark.parametrize(
    ("method", "folder", "count"),
    [
        ("task_arithmetic", "two", "no change of the base"),
        ("task_arithmetic", "base", "0"),
        ("linear", "two", "0"),
    ],
)
def test_a_refused_nan_says_what_zero_would_do(
    root: Path, tmp_path: Path, method: str, folder: str, count: str
) -> None:
    cases.poison(root / folder, TENSOR, 5, float("nan"))
    words = f"--nan zero (they count as {count})"
    with pytest.raises(NonFiniteError, match=re.escape(words)):
        run(root, tmp_path / "out", method)


@pytest.mark.parametrize("method", cases.METHODS)
def test_nan_zero_means_no_change(root: Path, tmp_path: Path, method: str, backend: str) -> None:
    """As if the model had the base's value there (or, without deltas, zero); a bad base is zero."""
    clean = cases.load(root / "base")[TENSOR].reshape(-1)
    cases.poison(root / "two", TENSOR, 5, float("nan"))
    cases.poison(root / "three", TENSOR, 9, float("inf"))
    got = run(root, tmp_path / "zero", method, backend=backend, nan="zero")
    assert got.backend == backend
    cases.poison(root / "two", TENSOR, 5, float(clean[5]) if method != "linear" else 0.0)
    cases.poison(root / "three", TENSOR, 9, float(clean[9]) if method != "linear" else 0.0)
    run(root, tmp_path / "plain", method, backend=backend)
    assert cases.raw(tmp_path / "zero") == cases.raw(tmp_path / "plain")


def test_nan_propagates_where_it_is(root: Path, tmp_path: Path, backend: str) -> None:
    cases.poison(root / "two", TENSOR, 5, float("nan"))
    run(root, tmp_path / "clean", "task_arithmetic", backend=backend, nan="zero")
    run(root, tmp_path / "out", "task_arithmetic", backend=backend, nan="propagate")
    value = cases.load(tmp_path / "out")[TENSOR].reshape(-1)
    expected = cases.load(tmp_path / "clean")[TENSOR].reshape(-1)
    assert value.isnan().nonzero().reshape(-1).tolist() == [5]
    expected[5] = value[5] = 0
    assert torch.equal(value, expected)


def test_bad_base_zero_and_propagate_agree_between_backends(root: Path, tmp_path: Path) -> None:
    cases.need_native()
    cases.poison(root / "base", TENSOR, 5, float("nan"))
    cases.poison(root / "base", TENSOR, 6, float("inf"))
    cases.poison(root / "one", TENSOR, 6, float("inf"))
    for method in cases.METHODS:
        for nan in ("zero", "propagate"):
            outputs = []
            for backend in ("native", "eager"):
                out = tmp_path / f"{method} {nan} {backend}"
                run(root, out, method, backend=backend, nan=nan)
                outputs.append(cases.raw(out))
            assert outputs[0] == outputs[1], (method, nan)


@pytest.mark.parametrize("nan", ["refuse", "zero"])
def test_overflow_of_the_output_type_is_told(tmp_path: Path, backend: str, nan: engine.Nan) -> None:
    root = tmp_path / "inputs"
    for name, value in (("base", 0.0), ("one", 60_000.0), ("two", 60_000.0), ("three", 0.0)):
        cases.save(root / name, {"a": torch.full((9,), value)})
    content = cases.recipe(root, "task_arithmetic", out_dtype="float16")
    content["parameters"]["lambda"] = 1.0
    plan = make_plan(parse_recipe(content), tmp_path / "out")
    words = "tensor a: 9 merged values overflow F16 .*choose out_dtype: bfloat16"
    fails(
        root,
        tmp_path / "out",
        NonFiniteError,
        words,
        lambda: execute(plan, backend=backend, nan=nan),
    )
    execute(plan, backend=backend, nan="propagate")
    assert cases.load(tmp_path / "out")["a"].isinf().all()


# ----------------------------------------------------------------------------- stopped and resumed


def test_interrupt_then_resume(root: Path, tmp_path: Path, backend: str) -> None:
    execute(cases.plan(root, tmp_path / "whole" / "out", "ties paper"), backend=backend)
    out = tmp_path / "out"
    plan = cases.plan(root, out, "ties paper")

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "merge" and done > total // 2:
            raise KeyboardInterrupt

    notes = fails(
        root,
        out,
        Interrupted,
        "interrupted",
        lambda: execute(plan, backend=backend, progress=stop),
    )
    assert "files of weights are finished and kept" in notes[0]
    words = r"unfinished merge \(\d of \d files.*--resume continues it, --restart begins again"
    fails(root, out, OutputError, words, lambda: execute(plan, backend=backend))
    seen = []
    with untouched(root, tmp_path / "whole"):
        result = execute(
            plan, backend=backend, resume=True, progress=lambda phase, *_: seen.append(phase)
        )
    assert result.resumed > 0
    assert "thresholds" not in seen  # they were in the journal
    assert cases.contents(out) == cases.contents(tmp_path / "whole" / "out")
    assert not cases.partial(out).exists()


def test_interrupt_before_anything_is_finished_leaves_nothing(
    root: Path, tmp_path: Path, backend: str
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    notes = fails(
        root,
        tmp_path / "out",
        Interrupted,
        "interrupted",
        lambda: run(root, tmp_path / "out", backend=backend, progress=stop),
    )
    assert notes == ["nothing was kept; the output path is as it was"]
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


def test_interrupt_while_the_job_starts_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A core that is still at work when Python ends aborts the process."""
    working, stop, ended = threading.Event(), threading.Event(), []

    class Job:
        def progress(self) -> tuple[int, int]:
            return 0, 0

        def cancel(self) -> None:
            stop.set()

    def work() -> None:
        working.set()
        stop.wait(10)
        time.sleep(0.05)
        ended.append("work")

    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        real(thread)
        working.wait(10)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(KeyboardInterrupt):
        executors.watch(Job(), work, lambda _: None, 0)
    assert ended == ["work"]


@pytest.fixture
def unfinished(root: Path, tmp_path: Path) -> Path:
    """An output whose merge was interrupted after its first shards."""
    half(root, tmp_path / "out")
    return tmp_path / "out"


def half(root: Path, out: Path, **options: Any) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        if phase == "merge" and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run(root, out, progress=stop, **options)
    assert cases.partial(out).exists()


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("ties peft", {}, "is of another recipe, seed, shard size or version"),
        ("ties", {"shard": 200_000}, "is of another recipe, seed, shard size or version"),
    ],
)
def test_resume_of_another_plan_is_refused(
    root: Path, unfinished: Path, method: str, options: dict[str, Any], words: str
) -> None:
    plan = cases.plan(root, unfinished, method, **options)
    work = cases.snapshot(cases.partial(unfinished))
    fails(root, unfinished, OutputError, words, lambda: execute(plan, resume=True))
    assert cases.snapshot(cases.partial(unfinished)) == work


def test_resume_with_changed_inputs_is_refused(root: Path, unfinished: Path) -> None:
    cases.poison(root / "one", TENSOR, 0, 2.0)
    words = "the inputs are not those that it was reading: .*one/model.safetensors differs"
    fails(root, unfinished, OutputError, words, lambda: run(root, unfinished, resume=True))


def test_resume_with_another_nan_policy(root: Path, tmp_path: Path) -> None:
    """From refuse to any is the same as the whole run under it; between others it is refused."""
    half(root, tmp_path / "a", nan="zero")
    words = "runs with --nan zero and cannot go on with --nan refuse"
    fails(root, tmp_path / "a", OutputError, words, lambda: run(root, tmp_path / "a", resume=True))
    half(root, tmp_path / "b" / "out")
    run(root, tmp_path / "b" / "out", resume=True, nan="zero")
    run(root, tmp_path / "c" / "out", nan="zero")
    assert cases.contents(tmp_path / "b" / "out") == cases.contents(tmp_path / "c" / "out")


def test_restart_begins_again(root: Path, unfinished: Path, tmp_path: Path) -> None:
    result = run(root, unfinished, "linear", restart=True)
    assert result.resumed == 0
    run(root, tmp_path / "b" / "out", "linear")
    assert cases.contents(unfinished) == cases.contents(tmp_path / "b" / "out")


def test_resume_without_anything_to_resume_is_a_plain_run(root: Path, tmp_path: Path) -> None:
    assert run(root, tmp_path / "out", resume=True).resumed == 0


@pytest.mark.parametrize("url", [False, True])
def test_resume_of_what_is_finished_does_nothing(
    root: Path, tmp_path: Path, url: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same plan is done at once; another one, another policy, or a cut file is an error."""
    out: Path | str = tmp_path / "out"
    if url:
        pytest.importorskip("fsspec", reason="fsspec is not installed")
        monkeypatch.setenv("CL_FAST_CACHE", str(tmp_path / "cache"))
        out = "memory://finished/out"

    def go(method: str = "ties", **options: Any) -> engine.Result:
        recipe = parse_recipe(cases.recipe(root, method))
        return execute(make_plan(recipe, out, out_shard_size=100_000), fsync=False, **options)

    first = go(resume=True)
    assert not first.earlier
    with monkeypatch.context() as patch:
        patch.setattr(engine, "make_executor", None)  # nothing may be computed
        again = go(resume=True)
        assert (again.earlier, again.digest, again.bytes_moved) == (True, first.digest, 0)
        assert go(resume=True, nan="zero").earlier
    for method, options in (("linear", {"resume": True}), ("ties", {})):
        with pytest.raises(OutputError, match="exists and is not empty"):
            go(method, **options)
    if isinstance(out, Path):
        os.truncate(min(out.glob("*.safetensors")), 100)
    else:
        import fsspec

        store = fsspec.filesystem("memory")
        store.pipe_file(store.glob("/finished/out/*.safetensors")[0], b"cut")
    with pytest.raises(OutputError, match="exists and is not empty"):
        go(resume=True)
    assert not go(resume=True, overwrite=True).earlier


@pytest.mark.parametrize("damage", ["bytes", "size", "gone"])
def test_a_finished_shard_that_was_damaged_is_made_again(
    root: Path, unfinished: Path, tmp_path: Path, damage: str
) -> None:
    run(root, tmp_path / "whole" / "out")
    shard = min((cases.partial(unfinished) / "model").glob("*.safetensors"))
    if damage == "bytes":
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    elif damage == "size":
        os.truncate(shard, 100)
    else:
        shard.unlink()
    run(root, unfinished, resume=True)
    assert cases.contents(unfinished) == cases.contents(tmp_path / "whole" / "out")


def test_journal_that_ends_in_the_middle_of_a_line(
    root: Path, unfinished: Path, tmp_path: Path
) -> None:
    run(root, tmp_path / "whole" / "out")
    journal = cases.partial(unfinished) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"event": "shard", "sh')
    assert run(root, unfinished, resume=True).resumed > 0
    assert cases.contents(unfinished) == cases.contents(tmp_path / "whole" / "out")


def test_journal_that_is_damaged_is_not_trusted(root: Path, unfinished: Path) -> None:
    journal = cases.partial(unfinished) / "journal.jsonl"
    journal.write_bytes(b"\0\0\n" + journal.read_bytes())
    words = "journal.jsonl: line 1 is damaged.*--restart"
    fails(root, unfinished, OutputError, words, lambda: run(root, unfinished, resume=True))
    run(root, unfinished, restart=True)


def test_two_merges_into_one_folder(root: Path, tmp_path: Path, backend: str) -> None:
    """The second is refused while the first runs, whatever it is asked for."""
    out = tmp_path / "out"
    errors = []

    def second(phase: str, done: int, total: int) -> None:
        if not errors:
            for options in ({}, {"resume": True}, {"restart": True}, {"overwrite": True}):
                with pytest.raises(OutputError, match="another run is writing") as caught:
                    run(root, out, backend=backend, **options)
                errors.append(caught.value)

    with untouched(root, tmp_path / "none"):
        run(root, out, backend=backend, progress=second)
    assert len(errors) == 4
    run(root, tmp_path / "b" / "out", backend=backend)
    assert cases.contents(out) == cases.contents(tmp_path / "b" / "out")


def test_two_processes_into_one_folder(root: Path, tmp_path: Path) -> None:
    recipe = cases.write_recipe(tmp_path / "recipe.yml", cases.recipe(root))
    command = [sys.executable, "-m", "cl_fast", "merge", str(recipe), str(tmp_path / "out")]
    command += ["--out-shard-size", "100KB"]
    started = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
        for _ in range(3)
    ]
    told = [process.communicate()[1] for process in started]
    assert sorted(process.returncode for process in started) == [0, 1, 1]
    for process, words in zip(started, told, strict=True):
        if process.returncode:
            assert "another run is writing" in words or "exists and is not empty" in words
    execute(cases.plan(root, tmp_path / "b" / "out", shard=100_000))
    assert cases.contents(tmp_path / "out") == cases.contents(tmp_path / "b" / "out")


# ------------------------------------------------------------------------------------------- killed

KILLED = """
    import os, signal, sys, threading
    from pathlib import Path
    from cl_fast.merging import execute, load_recipe, make_plan

    recipe, out, at, overwrite = sys.argv[1:]
    at = int(at)
    calls = 0

    def count(frame, event, argument):
        # Every call and return in this process's Python after planning is a moment to die at.
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)

    plan = make_plan(load_recipe(recipe), out, out_shard_size=100_000)
    threading.setprofile(count)
    sys.setprofile(count)
    execute(plan, resume=True, overwrite=overwrite == "1")
    sys.setprofile(None)
    print(calls)
"""


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_moment(root: Path, tmp_path: Path, overwrite: bool) -> None:
    """Twenty moments of the whole run, each killed, and killed once more while resuming.

    The output path always holds nothing (or the whole old folder), or the whole new one; what
    comes out at last is what an uninterrupted run writes.
    """
    cases.need_native()
    whole = tmp_path / "whole" / "out"
    recipe = cases.write_recipe(tmp_path / "recipe.yml", cases.recipe(root))
    done = python(KILLED, recipe, whole, 0, 0)
    assert done.returncode == 0, done.stderr
    total = int(done.stdout)
    expected = cases.contents(whole)
    old = {"mine.txt": b"old"}
    rng = random.Random(20 + overwrite)
    for attempt, moment in enumerate(
        [*sorted(rng.sample(range(1, total), 17)), total - 60, total - 30, total - 2]
    ):
        out = tmp_path / f"case{attempt}" / "out"
        out.parent.mkdir()
        if overwrite:
            out.mkdir()
            (out / "mine.txt").write_bytes(b"old")
        with untouched(root, tmp_path / "none"):
            for at in (moment, rng.randrange(1, total), 0):
                done = python(KILLED, recipe, out, at, int(overwrite))
                # The count is not the same every time (threads): a late moment may not come.
                assert done.returncode in (-signal.SIGKILL, 0), done.stderr
                now = cases.contents(out) if out.exists() else {}
                assert now in ({}, old, expected)
                assert now != {} or not overwrite
                if now == expected:
                    break
        python(KILLED, recipe, out, 0, int(overwrite))  # whatever was left to tidy up
        assert cases.contents(out) == expected
        assert list(out.parent.iterdir()) == [out]


@pytest.mark.slow
def test_killed_inside_the_native_job(tmp_path: Path) -> None:
    """By the clock, so that it also happens while the core is at work on a larger merge."""
    cases.need_native()
    root = tmp_path / "inputs"
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "one", "two", "three"):
        state = {f"layers.{i}.w": torch.randn(500, 4000, generator=generator) for i in range(6)}
        cases.save(root / name, {key: value.bfloat16() for key, value in state.items()})
    recipe = cases.write_recipe(tmp_path / "recipe.yml", cases.recipe(root))
    command = [sys.executable, "-m", "cl_fast", "merge", str(recipe)]
    options = ["--out-shard-size", "4MB", "--resume", "--threads", "1"]
    whole = tmp_path / "whole" / "out"
    assert subprocess.run([*command, str(whole), *options], env=environment()).returncode == 0
    expected = cases.contents(whole)
    rng = random.Random(7)
    for attempt in range(5):
        out = tmp_path / f"case{attempt}" / "out"
        for _ in range(10):
            process = subprocess.Popen([*command, str(out), *options], env=environment())
            deadline = time.monotonic() + 60
            while not (cases.partial(out) / "model").exists() and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.15))
            process.kill()
            process.wait()
            if out.exists():
                break
        subprocess.run([*command, str(out), *options], env=environment())
        assert cases.contents(out) == expected


def test_a_leftover_of_the_last_moment_is_tidied_up(root: Path, tmp_path: Path) -> None:
    """Killed after the rename and before the working folder is gone: the merge is done."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output.OutputFolder, "discard", lambda *_: None)
        first = run(root, out)
    assert cases.partial(out).exists()
    again = run(root, out)
    assert (again.digest, again.resumed, again.bytes_moved) == (first.digest, first.shards, 0)
    assert not cases.partial(out).exists()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_no_file_stays_open(root: Path, tmp_path: Path, backend: str) -> None:
    """Also where no garbage is collected, as while a command plans."""
    gc.collect()
    gc.disable()
    try:
        run(root, tmp_path / "out", backend=backend)
        left = [
            file
            for link in Path("/proc/self/fd").iterdir()
            if link.is_symlink() and tmp_path in (file := link.readlink()).parents
        ]
    finally:
        gc.enable()
    assert left == []


def test_a_leftover_of_another_merge_is_not_taken_for_this_one(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output.OutputFolder, "discard", lambda *_: None)
        first = run(root, out)
        linear = run(root, tmp_path / "linear", "linear")
    with pytest.raises(OutputError, match="exists and is not empty"):
        run(root, out, "linear")
    again = run(root, out, "linear", overwrite=True)
    assert again.digest == linear.digest != first.digest


def test_replacing_without_an_exchange(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two names cannot be swapped in one step, a crash between the two is mended."""
    monkeypatch.setattr(output, "_exchange", lambda *_: False)
    out = tmp_path / "out"
    run(root, out)
    old = cases.contents(out)
    run(root, out, "linear", overwrite=True)
    new = cases.contents(out)
    assert new != old

    real = Path.rename

    def dies(self: Path, target: Path) -> Path:
        if self.name == "model":
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dies)
        # As in a kill: nobody is left to put the old folder back.
        patch.setattr(output.OutputFolder, "recover", lambda *_: None)
        with pytest.raises(Interrupted):
            run(root, out, overwrite=True)
    assert not out.exists()  # the one moment that such a system cannot avoid
    with pytest.raises(OutputError, match="exists and is not empty"):
        run(root, out)
    assert cases.contents(out) == new  # put back
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dies)
        with pytest.raises(Interrupted):
            run(root, out, overwrite=True, resume=True)
    assert cases.contents(out) == new
    run(root, out, overwrite=True, resume=True)
    assert cases.contents(out) == old
