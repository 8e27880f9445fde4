"""`cl-fast edit`: from files to an edited checkpoint, and on after a cut anywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import llama, tokenizer
from transformers import AutoModelForCausalLM

from cl_fast.cli import main
from cl_fast.editing import patch as patch_module
from cl_fast.editing import report as report_module
from cl_fast.editing import stats as stats_module
from cl_fast.editing.evaluation import evaluate
from cl_fast.editing.facts import Fact
from cl_fast.editing.patch import Patch
from cl_fast.errors import CheckpointError, OutputError
from cl_fast.learning import edits
from cl_fast.learning.edits import EditJob, EditSettings
from cl_fast.merging.journal import WorkLock

FACTS = [
    Fact("the {} sat on", "cat", "mat", target_true="dog", paraphrases=("a cat sat on",)),
    Fact("and then the {} ran under the", "dog", "tree", target_true="mat",
         neighbourhood=("the cat ran under the",)),
    Fact("the {} ran", "cat", "on", target_true="under"),
    Fact("{} ran on", "tree", "cat", target_true="mat"),
]  # fmt: skip
OPTIONS = ["--layers", "1", "--tokens", "300", "--steps", "5", "--lr", "0.3", "--batch", "2",
           "--prior-weight", "3"]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("edit")
    model = llama(num_hidden_layers=3).to(torch.bfloat16)
    model.save_pretrained(root / "base", max_shard_size="6KB")
    tokenizer().save_pretrained(root / "base")
    lines = [json.dumps(fact.to_dict()) for fact in FACTS]
    (root / "facts.jsonl").write_text("\n".join(lines))
    (root / "text.txt").write_text("the cat sat on the mat and then ran\n\na dog ran\n" * 40)
    return root


def command(root: Path, out: Path, *more: str) -> list[str]:
    return ["edit", str(root / "base"), str(root / "facts.jsonl"), str(out), *OPTIONS, *more]


@pytest.fixture(scope="module")
def done(root: Path) -> Path:
    out = root / "done"
    assert main(command(root, out, "--quiet", "--texts", str(root / "text.txt"))) == 0
    return out


def content(folder: Path) -> dict[str, bytes]:
    """All files of an edited checkpoint but those that say where it lies."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.name not in ("README.md", "cl_fast_merge.json")
    }


def test_the_whole_way(root: Path, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not (root / ".done.edit").exists()
    base = AutoModelForCausalLM.from_pretrained(root / "base", dtype="auto")
    patch = Patch.load(done / "edits.safetensors")
    assert patch.ids == tuple(fact.id for fact in (FACTS[0], FACTS[2], FACTS[1], FACTS[3]))
    patch.apply(base)
    edited = AutoModelForCausalLM.from_pretrained(done, dtype="auto")
    for (name, a), (_, b) in zip(
        edited.state_dict().items(), base.state_dict().items(), strict=True
    ):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b), name
    report = json.loads((done / "edits.json").read_text())
    assert [row["id"] for row in report["facts"]] == list(patch.ids)
    assert report["facts"][0]["shares_value_with"] == [FACTS[2].id]
    assert {"es", "ps", "ns"} <= set(report["after"]["metrics"])
    assert "| after |" in (done / "edits.md").read_text()
    assert main(["verify", str(done), "--sample", "all"]) == 0
    assert "model.layers.1.mlp.down_proj.weight" in capsys.readouterr().out


def test_scores_are_those_of_what_was_written(done: Path) -> None:
    """... whose weights are rounded to bfloat16, while the model was edited in float32."""
    model = AutoModelForCausalLM.from_pretrained(done, dtype=torch.float32)
    told = json.loads((done / "edits.json").read_text())["after"]
    for row, want in zip(told["rows"], evaluate(model, tokenizer(), FACTS).rows, strict=True):
        assert row["em"] == pytest.approx(want["em"], rel=1e-5)


def test_a_saved_patch_is_applied_without_the_model(
    root: Path, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(root / "base"), str(done / "edits.safetensors"), str(tmp_path / "out")]
    assert main(["edit", *given, "--dry-run"]) == 0
    assert "patch (memit, 4 facts in 1 layer" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert main(["edit", *given]) == 0
    for name in (p.name for p in done.glob("*.safetensors") if p.name != "edits.safetensors"):
        ours, theirs = load_file(tmp_path / "out" / name), load_file(done / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


class Cut(BaseException):
    """In the place of a kill: nothing of ours catches it."""


def test_a_cut_at_any_write_is_gone_on_from(
    root: Path, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after every file of the job; in the end the same bytes."""
    out = root / "cut"
    given = command(root, out, "--quiet", "--texts", str(root / "text.txt"))
    real: dict[Any, Callable[..., Any]] = {}
    writes: list[str] = []
    at = [0, ""]

    def spy(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            writes.append(function.__name__)
            if len(writes) == at[0] and at[1] == "before":
                raise Cut
            result = function(*args, **kwargs)
            if len(writes) == at[0]:
                raise Cut
            return result

        return call

    places = [
        (edits, "write_whole"), (edits, "save_tensors"), (edits, "apply_patch"),
        (edits, "relocate"), (stats_module, "write_whole"), (patch_module, "write_whole"),
        (report_module, "write_whole"), (shutil, "rmtree"), (Path, "rename"),
    ]  # fmt: skip
    for module, name in places:
        real[module, name] = getattr(module, name)
        monkeypatch.setattr(module, name, spy(real[module, name]))
    number = 0
    while True:
        number += 1
        writes.clear()
        at[:] = [number, "before" if number % 2 else "after"]
        try:
            main(given)
        except Cut:
            assert number < 60
            continue
        break
    assert number > 6, "there are as many places to cut at"
    monkeypatch.undo()
    assert content(out) == content(done)
    assert main(["verify", str(out), "--quiet"]) == 0
    assert not (root / ".cut.edit").exists()


@pytest.mark.parametrize("method", ["rome", "emmet", "alphaedit"])
def test_other_methods(root: Path, tmp_path: Path, method: str) -> None:
    settings = EditSettings(
        method=method, layers=(1,), tokens=300, steps=3, evaluate=False,
        stats=None if method == "rome" else tmp_path / "stats",
    )  # fmt: skip
    job = EditJob(root / "base", root / "facts.jsonl", tmp_path / method, settings)
    result = job.run()
    assert result.report is None
    patch = Patch.load(result.output / "edits.safetensors")
    assert patch.method == method
    assert (tmp_path / "stats" / "moments.safetensors").is_file() == (method != "rome")


def test_the_edges_are_edited(root: Path, tmp_path: Path) -> None:
    settings = EditSettings(layers=(0, 1), edges=True, tokens=300, steps=3, evaluate=False)
    result = EditJob(root / "base", root / "facts.jsonl", tmp_path / "out", settings).run()
    patch = Patch.load(result.output / "edits.safetensors")
    assert [layer.name[:14] for layer in patch.layers] == ["model.layers.0", "model.layers.1"]
    assert patch.options["spread"] == "ends"


def test_dry_run_writes_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(root, tmp_path / "out", "--dry-run")) == 0
    told = capsys.readouterr().out
    assert "4, about 3 keys" in told
    assert "300 tokens of the model's own samples" in told
    assert not list(tmp_path.iterdir())


def refused(kind: str, root: Path, tmp: Path) -> None:
    base, facts, out = root / "base", root / "facts.jsonl", tmp / "out"
    match kind:
        case "model":
            base = tmp / "nothing"
        case "no tokenizer":
            shutil.copytree(base, tmp / "bare")
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (tmp / "bare" / name).unlink()
            base = tmp / "bare"
        case "facts":
            facts = tmp / "facts.jsonl"
        case "line":
            facts = tmp / "facts.jsonl"
            facts.write_text('{"prompt": "{} ran", "subject": "cat"}\n')
        case "exists":
            out.mkdir()
        case "texts":
            EditJob(base, facts, out, EditSettings(texts=("nothing.txt",)))
        case "device":
            EditJob(base, facts, out, EditSettings(device="cuda:99"))
        case "method":
            EditJob(base, facts, out, EditSettings(method="magic"))
        case "edges":
            EditSettings(method="rome", edges=True)
        case "layers":
            EditJob(base, facts, out, EditSettings(layers=(7,), tokens=50)).run()
        case "stats":
            (tmp / "stats").mkdir()
            (tmp / "stats" / "moments.safetensors.part").touch()  # of a kill: no obstacle
            EditJob(base, facts, out, EditSettings(stats=tmp / "stats"))
            (tmp / "stats" / "notes").touch()
            EditJob(base, facts, out, EditSettings(stats=tmp / "stats"))
        case "any model":
            EditJob(base, facts, out, EditSettings(any_model=True))
        case "prior weight":
            EditJob(base, facts, out, EditSettings(method="alphaedit", prior_weight=2.0))
        case "texts of rome":
            EditJob(base, facts, out, EditSettings(method="rome", texts=("text.txt",)))
        case "dtype":
            wide = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            torch.nn.init.normal_(wide.model.layers[1].mlp.down_proj.weight)
            shutil.copytree(base, tmp / "wide", ignore=shutil.ignore_patterns("*.safetensors*"))
            wide.save_pretrained(tmp / "wide")
            settings = EditSettings(layers=(1,), dtype="bfloat16", stats=tmp / "stats")
            try:
                EditJob(tmp / "wide", facts, out, settings).run()
            finally:
                assert not (tmp / "stats").exists(), "it is refused before anything is collected"
        case "another job":
            work = tmp / ".out.edit"
            work.mkdir()
            job = EditJob(base, facts, out, EditSettings(steps=3))
            (work / "job.json").write_text(json.dumps(job.identity))
            (work / "values").mkdir()
            EditJob(base, facts, out, EditSettings(steps=4))
    EditJob(base, facts, out)


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("model", CheckpointError, "does not exist"),
        ("no tokenizer", CheckpointError, "config or tokenizer cannot be read"),
        ("facts", ValueError, "facts.jsonl: cannot be read"),
        ("line", ValueError, "facts.jsonl, line 1: 'target' is missing"),
        ("exists", OutputError, "out: exists already"),
        ("texts", ValueError, "there is no file nothing.txt"),
        ("device", ValueError, "device 'cuda:99' is not there"),
        ("method", ValueError, "method must be one of 'memit'"),
        ("edges", ValueError, "edges has no effect with method='rome'"),
        ("layers", ValueError, "the model has the blocks 0 to 2, and none with the number 7"),
        ("stats", OutputError, "stats: is not empty, and holds no statistics"),
        ("any model", ValueError, "any_model has no effect without stats"),
        ("prior weight", ValueError, "prior_weight has no effect with method='alphaedit'"),
        ("texts of rome", ValueError, "texts has no effect without stats"),
        ("dtype", ValueError, "down_proj.weight is torch.bfloat16 in memory and F32 in.*dtype out"),
        ("another job", OutputError, "has other steps: 3 there, 4 now.*--restart"),
    ],
)
def test_bad_input(
    kind: str, error: type[Exception], words: str, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        refused(kind, root, tmp_path)
    assert not list((tmp_path / "out").glob("*"))


def test_a_job_that_did_nothing_stands_in_no_way(root: Path, tmp_path: Path) -> None:
    given = (root / "base", root / "facts.jsonl", tmp_path / "out")
    work = tmp_path / ".out.edit"
    work.mkdir()
    (work / "job.json").write_text(json.dumps({"steps": 7}))
    assert EditJob(*given).work == work


def test_two_jobs_at_once_are_refused(root: Path, tmp_path: Path) -> None:
    settings = EditSettings(layers=(1,), tokens=300, steps=2, evaluate=False)
    job = EditJob(root / "base", root / "facts.jsonl", tmp_path / "out", settings)
    job.work.mkdir()
    lock = WorkLock(job.work, job.out)
    lock.acquire()
    with pytest.raises(OutputError, match="is writing this output now"):
        job.run()
    lock.release()
    assert job.run().facts == 4


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--layers", "1"], "--layers has no effect where a saved patch is applied"),
        (["--method", "rome"], "--method has no effect"),
        (["--stats", "nothing"], "--stats has no effect"),
    ],
)
def test_options_without_effect_on_a_patch_are_refused(
    root: Path, done: Path, tmp_path: Path, more: list[str], words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = [str(root / "base"), str(done / "edits.safetensors"), str(tmp_path / "out")]
    assert main(["edit", *given, *more]) == 1
    assert words in capsys.readouterr().err
    assert main(["edit", *given[:2], str(root)]) == 1
    assert "exists already; choose another folder" in capsys.readouterr().err


def test_a_moved_folder_is_verified_with_the_patch_in_it(
    root: Path, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(done, tmp_path / "moved")
    record = tmp_path / "moved" / "cl_fast_merge.json"
    record.write_text(record.read_text().replace(str(done), "/nowhere"))
    assert main(["verify", str(tmp_path / "moved"), "--sample", "all"]) == 0
    told = capsys.readouterr().out
    assert "inputs compared: 2" in told
    assert "model.layers.1.mlp.down_proj.weight" in told


def test_restart_throws_an_unfinished_job_away(root: Path, tmp_path: Path) -> None:
    work = tmp_path / ".out.edit"
    work.mkdir()
    (work / "job.json").write_text("{}")
    (work / "stats").mkdir()
    settings = EditSettings(layers=(1,), tokens=300, steps=2, evaluate=False)
    given = (root / "base", root / "facts.jsonl", tmp_path / "out", settings)
    with pytest.raises(OutputError, match="--restart"):
        EditJob(*given)
    assert EditJob(*given, restart=True).run().facts == 4
