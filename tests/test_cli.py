"""The command: its exit codes, its words, what it imports, how fast it starts."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import merge_cases as cases
import pytest
import torch

import cl_fast
from cl_fast import backends
from cl_fast.cli import arguments, main, progress

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def recipe(root: Path, tmp_path: Path) -> Path:
    return cases.write_recipe(tmp_path / "recipe.yml", cases.recipe(root))


def command(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cl_fast", *map(str, words)],
        capture_output=True,
        text=True,
        env=environment(),
        **options,
    )


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(HERE.parent)}


def test_merge_then_verify(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["merge", str(recipe), str(out), "--out-shard-size", "200KB", "--verify"]) == 0
    told = capsys.readouterr().out
    assert f"{out}: 7 tensors in " in told
    assert "read and written" in told
    assert main(["verify", str(out)]) == 0
    assert f"{out}: sound" in capsys.readouterr().out
    cases.poison(out, "model.norm.weight", 0, 1.0)
    assert main(["verify", str(out), "--no-inputs"]) == 1
    assert "tensor model.norm.weight is not what was written" in capsys.readouterr().err


def test_quiet_says_nothing(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(recipe), str(tmp_path / "out"), "--quiet"]) == 0
    assert main(["verify", str(tmp_path / "out"), "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")


def test_dry_run_tells_and_writes_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(recipe), str(tmp_path / "out"), "--dry-run"]) == 0
    told = capsys.readouterr().out
    for words in ("tensors", "read", "written", "memory", "/s", "free"):
        assert words in told
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yml"]


def test_dry_run_finds_what_the_run_would(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert main(["merge", str(recipe), str(tmp_path / "out"), "--dry-run"]) == 1
    assert "exists and is not empty" in capsys.readouterr().err


def test_options_reach_the_engine(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def execute(plan: Any, **options: Any) -> Any:
        seen.update(options, plan=plan)
        raise KeyboardInterrupt

    monkeypatch.setattr("cl_fast.merging.engine.execute", execute)
    words = "--threads 3 --memory 256MB --io pread --nan zero --resume --overwrite --no-fsync"
    words += " --backend eager --verify --out-shard-size 1MiB --quiet"
    assert main(["merge", str(recipe), str(tmp_path / "out"), *words.split()]) == 130
    assert seen.pop("plan").output == tmp_path / "out"
    assert callable(seen.pop("progress"))
    assert seen == {
        "threads": 3,
        "memory": 256_000_000,
        "io": "pread",
        "nan": "zero",
        "resume": True,
        "restart": False,
        "overwrite": True,
        "fsync": False,
        "backend": "eager",
        "reread": True,
        "engine": None,
        "write_card": True,
    }


def test_seed_overrides_the_recipe(root: Path, tmp_path: Path) -> None:
    content = cases.recipe(root, "dare_linear", seed=1)
    path = cases.write_recipe(tmp_path / "recipe.yml", content)
    assert main(["merge", str(path), str(tmp_path / "a")]) == 0
    assert main(["merge", str(path), str(tmp_path / "b"), "--seed", "2"]) == 0
    seeds = [
        json.loads((tmp_path / name / "cl_fast_merge.json").read_text())["seed"] for name in "ab"
    ]
    assert seeds == [1, 2]
    assert cases.raw(tmp_path / "a") != cases.raw(tmp_path / "b")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("256MB", 256_000_000), ("1.5gb", 1_500_000_000), ("2 GiB", 2 << 30), ("3K", 3000)],
)
def test_sizes(text: str, value: int) -> None:
    assert arguments.size(text) == value


@pytest.mark.parametrize(
    "words",
    [
        ["frobnicate"],
        ["merge", "recipe.yml"],
        ["merge", "r", "o", "--threads", "0"],
        ["merge", "r", "o", "--memory", "lots"],
        ["merge", "r", "o", "--memory", "0"],
        ["merge", "r", "o", "--seed", "-1"],
        ["merge", "r", "o", "--io", "fast"],
        ["merge", "r", "o", "--resume", "--restart"],
        ["merge", "r", "o", "--quiet", "--verbose"],
        ["verify", "x", "--sample", "some"],
        ["soup", "o", "m", "--evaluate", "python score.py"],
        ["soup", "o", "m"],
        ["merge", "r", "--quiet", "o", "junk"],
        ["merge", "r", "o", "--quiet", "junk"],
        ["merge", "r", "--frobnicate", "o"],
        ["verify", "x", "--quiet", "junk"],
        ["delta", "pack", "b", "f", "--drop", "0.9", "o", "junk"],
        ["delta", "pack", "b", "f", "--drop", "0.9", "--frobnicate", "o"],
        ["diff", "b", "m", "--quiet", "--frobnicate", "n"],
    ],
)
def test_wrong_usage_is_two(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: cl-fast" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "taken"),
    [
        ("merge recipe.yml --cuda out", {"output": Path("out")}),
        ("merge recipe.yml --quiet out", {"output": Path("out")}),
        ("merge recipe.yml --seed 3 s3://b/out", {"output": "s3://b/out", "seed": 3}),
        ("merge --quiet recipe.yml --seed 3 out --io mmap", {"output": Path("out"), "io": "mmap"}),
        ("merge recipe.yml --quiet -- -out", {"output": Path("-out")}),
        ("delta pack base math --drop .9 pk", {"output": Path("pk"), "drop": 0.9}),
        ("delta pack base math --drop .9", {"output": None}),
        ("diff base a --threads 1 b c --quiet", {"models": ["a", "b", "c"], "threads": 1}),
        ("soup out a --evaluate {} b", {"models": ["a", "b"]}),
        ("adapter merge a --out o b", {"adapters": ["a", "b"]}),
    ],
)
def test_options_and_positionals_in_any_order(
    words: str, taken: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = words.split()[0]
    module = importlib.import_module(f"cl_fast.cli.{name}")
    seen: list[dict[str, Any]] = []

    def run(arguments: Any) -> int:
        seen.append(vars(arguments))
        return 0

    for attribute in ("_run", "_pack", "_merge"):
        if hasattr(module, attribute):
            monkeypatch.setattr(module, attribute, run)
    assert main(words.split()) == 0
    assert {key: seen[0][key] for key in taken} == taken


@pytest.mark.parametrize(
    "words",
    [
        "verify {}",
        "delta pack b f {} --drop 0.9",
        "delta pack b f --drop 0.9 {}",
        "delta apply b {} o",
        "delta unpack b {} o",
        "delta info {}",
        "merge {} o",
        "merge r o --report {}",
        "diff b m --json {}",
        "soup o {} --evaluate {{}}",
        "soup o m --evaluate {{}} {}",
        "edit {} f o",
        "adapter extract b f --out {}",
    ],
)
def test_urls_are_refused_where_a_path_is_meant(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words.format("s3://key:secret@bucket/x").split())
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert "URLs are not taken here; give a path" in told
    assert "secret" not in told


def test_deltas_of_models_at_urls(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    monkeypatch.setenv("CL_FAST_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    store.put(f"{root}/", "/deltas/", recursive=True)
    here, there = tmp_path / "here.safetensors", tmp_path / "there.safetensors"
    for place, out in ((root, here), ("memory://deltas", there)):
        words = ["delta", "pack", f"{place}/base", f"{place}/one", str(out), "--drop", ".9"]
        assert main(words) == 0
    assert here.read_bytes() == there.read_bytes()
    capsys.readouterr()
    assert main(["delta", "apply", "memory://deltas/base", f"{there}", "memory://deltas/out"]) == 0
    assert capsys.readouterr().out.startswith("memory://deltas/out: 7 tensors, ")
    assert main(["delta", "apply", f"{root}/base", f"{here}", f"{tmp_path / 'out'}"]) == 0
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert store.cat_file("/deltas/out/model.safetensors") == weights
    assert main(["adapter", "info", "memory://deltas/base"]) == 1
    assert "memory://deltas/base: is no adapter" in capsys.readouterr().err
    store.rm("/deltas", recursive=True)


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "merge" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"cl-fast {cl_fast.__version__}\n"


def test_an_error_is_one_in_words(tmp_path: Path) -> None:
    done = command("merge", tmp_path / "none.yml", tmp_path / "out")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("cl-fast: error: ")
    assert "none.yml" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in command("merge", tmp_path / "none.yml", "out", "--verbose").stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("diff nob one", "BASE: {}/nob does not exist"),
        ("diff base one maht", "MODEL maht: {}/maht does not exist"),
        ("delta pack nob one --drop 0.5", "BASE: {}/nob does not exist"),
        ("delta pack base maht --drop 0.5", "FINETUNED: {}/maht does not exist"),
        ("delta pack base base --drop 0.5", "FINETUNED: the model is the base_model"),
    ],
)
def test_errors_name_arguments_as_the_help_does(
    root: Path,
    words: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(root)
    assert main(words.split()) == 1
    assert f"error: {told.format(root)}" in capsys.readouterr().err


def test_errors_of_planning_tell_the_file(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = cases.recipe(root, "ties")
    content["models"][0]["parameters"] = {"weight": [{"filter": "no_such", "value": 1}]}
    path = cases.write_recipe(tmp_path / "recipe.yml", content)
    for more in ([], ["--dry-run"]):
        assert main(["merge", str(path), str(tmp_path / "out"), *more]) == 1
        told = capsys.readouterr().err
        assert f"error: {path}: models[0].parameters.weight" in told
        assert told.count(str(path)) == 1


def test_a_study_is_told_from_a_recipe(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = {"recipe": cases.recipe(root, "ties"), "evaluate": "true {}"}
    path = cases.write_recipe(tmp_path / "study.yml", study)
    assert main(["merge", str(path), str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert f"error: {path}: this is a study" in told
    assert "cl-fast search" in told


def test_env_says_what_serves_and_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    done = command("env")
    assert done.returncode == 0
    assert "combine, combine_many" in done.stdout
    assert "the CUDA kernels are not built" in done.stdout or "CUDA kernels  CUDA" in done.stdout
    assert cl_fast.__version__ in done.stdout
    monkeypatch.setenv("CL_FAST_NATIVE", "0")
    assert "CL_FAST_NATIVE=0 switches the C++ core off" in command("env").stdout


def test_a_reader_that_goes_away_is_no_internal_error() -> None:
    """`cl-fast env | head -1`"""
    script = f"{sys.executable} -u -m cl_fast env | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stdout.splitlines()[1] in ("0", "1")
    assert done.stderr == ""


def test_warnings_are_notes_and_only_inside(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = warnings.showwarning
    content = cases.recipe(root, "ties paper")
    content["parameters"] |= {"rescale": True, "rescale_by": "l1"}
    path = cases.write_recipe(tmp_path / "recipe.yml", content)
    backends._said.clear()
    assert main(["merge", str(path), str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err
    assert "cl-fast: note: rescale_by: l1 together with trim_scope: model" in told
    assert warnings.showwarning is before


def test_help_is_there_at_once() -> None:
    """Best of several: a loaded machine must not fail it, a heavy import must."""
    best = 9.0
    for _ in range(7):
        started = time.perf_counter()
        assert command("--help").returncode == 0
        best = min(best, time.perf_counter() - started)
    assert best < 0.3


LOADED = """
import sys
from cl_fast.cli import main
code = main(sys.argv[1:])
heavy = [m for m in ("torch", "numpy", "transformers", "safetensors") if m in sys.modules]
print(code, heavy)
"""


@pytest.mark.parametrize("what", ["merge", "dry-run", "verify"])
def test_a_merge_loads_neither_torch_nor_numpy(recipe: Path, tmp_path: Path, what: str) -> None:
    cases.need_native()
    words = ["merge", str(recipe), str(tmp_path / "out"), "--quiet"]
    if what == "dry-run":
        words.append("--dry-run")
    elif what == "verify":
        assert main(words) == 0
        words = ["verify", str(tmp_path / "out"), "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *words], capture_output=True, text=True, env=environment()
    )
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


def test_interrupt_signal_is_130(tmp_path: Path) -> None:
    """Whenever it comes: nothing at the output, no traceback, and the run can go on."""
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "one", "two", "three"):  # many files to write, so that there is time
        many = {f"layer.{i}": torch.randn(64, 64, generator=generator) for i in range(300)}
        cases.save(tmp_path / "models" / name, many)
    recipe = cases.write_recipe(tmp_path / "recipe.yml", cases.recipe(tmp_path / "models"))
    interrupted = 0
    delays = (0.0, 0.0, 0.003, 0.006, 0.01, 0.015, 0.02, 0.03)
    for attempt in range(64):
        if attempt >= len(delays) and interrupted:  # on a busy machine the signal often comes late
            break
        delay = delays[attempt % len(delays)]
        out = tmp_path / f"out{attempt}"
        words = ["merge", str(recipe), str(out), "--out-shard-size", "1KB", "--resume", "--quiet"]
        process = subprocess.Popen(
            [sys.executable, "-m", "cl_fast", *words],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            # Where the tests run behind a shell's `&`, interrupts are ignored, also by children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while not cases.partial(out).exists() and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        told = process.communicate()[1]
        if not out.exists():  # else it was faster, and the signal came while Python was ending
            assert process.returncode == 130, told
            assert "Traceback" not in told
            assert "cl-fast: interrupted" in told
            interrupted += 1
            assert main(words) == 0
        assert main(["verify", str(out), "--sample", "1", "--quiet"]) == 0
    assert interrupted


def test_progress_without_a_terminal_is_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    with progress.Progress(quiet=False) as shown:
        shown("merge", 0, 4_000_000_000)
        time.sleep(0.01)
        shown("merge", 1_000_000_000, 4_000_000_000)
    told = capsys.readouterr().err
    assert told.startswith("merge: 25 % of 4 GB, ")
    assert told.endswith(" s left\n")
    assert "\r" not in told
    with progress.Progress(quiet=False) as shown:
        shown("merge", 0, 3_400_000)
        time.sleep(0.01)
        shown("merge", 1_700, 3_400_000)
    told = capsys.readouterr().err
    assert told.startswith("merge: 0 % of 3.4 MB, ")
    assert "kB/s, " in told
    assert "0.0" not in told


def test_progress_on_a_terminal_is_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.Progress(quiet=False) as shown:
        for done in (0, 1_000_000, 2_000_000):
            shown("merge", done, 2_000_000)
            time.sleep(0.11)
    told = capsys.readouterr().err
    assert "merge" in told
    assert "2.00M" in told
    assert "B/s" in told


SCORE = """
import sys
from safetensors.torch import load_file
value = float(load_file(sys.argv[1] + "/model.safetensors")["w"])
print("loss of 3 batches: 0.25")
print(f"score {-abs(value - 2.0):.6f} (model of 1 tensor)" if value == 99 else -abs(value - 2.0))
"""


def test_greedy_soup_keeps_what_helps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The best is at distance 0.5 of the target; one other helps, one does not."""
    import torch

    for name, value in (("a", 2.5), ("b", 1.25), ("c", 9.0)):
        cases.save(tmp_path / name, {"w": torch.tensor([value])})
    script = tmp_path / "score.py"
    script.write_text(SCORE)
    models = [str(tmp_path / name) for name in "abc"]
    evaluate = f"{sys.executable} {script} {{}}"
    assert main(["soup", str(tmp_path / "out"), *models, "--evaluate", evaluate]) == 0
    assert cases.load(tmp_path / "out")["w"].item() == 1.875
    told = capsys.readouterr().out
    assert "2 of 3 models, -0.125" in told
    assert [line.split(maxsplit=1)[1] for line in told.splitlines()[:5]] == [
        "a", "b", "c", "a + b", "a + b + c",
    ]  # fmt: skip
    assert ".trial" not in told


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        ("false {}", "ended with code 1"),
        ("true {}", "printed no number"),
        ("no-such-command-here {}", "does not start"),
    ],
)
def test_soup_whose_score_fails(
    root: Path, tmp_path: Path, evaluate: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["soup", str(tmp_path / "out"), str(root / "one"), "--evaluate", evaluate])
    assert code == 1
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
