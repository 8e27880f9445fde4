"""`cl-fast train plan.yml`: the whole way from text files to a model, and on after a kill."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import VOCABULARY, WORDS, llama, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from cl_fast.cli import main
from cl_fast.errors import CheckpointError, RecipeError
from cl_fast.learning import Report, pretraining
from cl_fast.learning.plan import parse_plan
from cl_fast.learning.pretraining import Job
from cl_fast.learning.texts import Blocks


def lines(seed: int, count: int = 60) -> str:
    random = Random(seed)
    made = (" ".join(random.choices(WORDS, k=random.randint(3, 20))) for _ in range(count))
    return "\n".join(made) + "\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    # With dropout, so that the state of the random generator matters.
    llama(attention_dropout=0.2).save_pretrained(root / "base")
    llama().save_pretrained(root / "calm")
    tokenizer().save_pretrained(root / "base")
    for seed, name in enumerate(("old", "a", "b", "probe")):
        (root / f"{name}.txt").write_text(lines(seed))
    return root


def content(root: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(root / "base"),
        "documents": "line",
        "held_out": 0.2,
        "learning_rate": {"peak": 1e-2, "min": 1e-3},
        "schedule": {"rewarm": {"warmup": 2}},
        "replay": 0.25,
        "old_texts": [str(root / "old.txt")],
        "probes": {"general": [str(root / "probe.txt")]},
        "batch": {"sequences": 2, "length": 16, "accumulate": 2},
        "save_every": 3,
        "training": {"use_cpu": True},
        "stages": [
            {"name": "a", "texts": [str(root / "a.txt")], "epochs": 1},
            {"name": "b", "texts": [str(root / "b.txt")], "steps": 5, "schedule": "constant",
             "learning_rate": 5e-3},
        ],
        **changes,
    }  # fmt: skip


def written(path: Path, plan: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(plan))
    return path


@pytest.fixture(scope="module")
def done(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run by the command, and what it printed."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("run")
    plan = written(folder / "plan.yml", content(root))
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        assert main(["train", str(plan), "--out", str(folder / "out"), "--verbose"]) == 0
    return folder / "out", told.getvalue()


def test_a_model_comes_out(done: tuple[Path, str], root: Path) -> None:
    out, told = done
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    made = AutoTokenizer.from_pretrained(out / "model")
    batch = made("the cat sat on the mat", return_tensors="pt", return_token_type_ids=False)
    assert model(**batch).logits.shape == (1, 6, VOCABULARY)
    assert model.config.use_cache  # which the Trainer switches off
    base = load_file(root / "base" / "model.safetensors")
    assert any(not torch.equal(x, base[name]) for name, x in model.state_dict().items())
    report = Report.load(out / "run")
    assert report.matrix.tasks == ["a", "b"]
    # The texts have one distribution, so every loss falls; a uniform guess has ln(12 words + end).
    for before, after in zip(report.matrix.before, report.matrix.rows[-1], strict=True):
        assert after > before + 0.5
    assert f"{out / 'model'}: the model after b" in told


def test_the_table_tells_loss_and_perplexity(done: tuple[Path, str]) -> None:
    out, told = done
    report = Report.load(out / "run")
    table = told[told.index("held-out loss (perplexity)") :].splitlines()
    assert table[1].split() == ["after", "a", "b", "general"]
    assert [line.split()[0] for line in table[2:5]] == ["before", "a", "b"]
    loss = -report.probes["general"]["b"]
    assert table[4].endswith(f"{loss:.3f} ({math.exp(loss):.4g})")


def test_losses_are_those_of_the_held_out_texts(done: tuple[Path, str], root: Path) -> None:
    """In the table, against the mean over held-out tokens by hand, in float64."""
    out, _ = done
    documents = [d for d in (root / "b.txt").read_text().split("\n") if d]
    held = [d for n, d in enumerate(documents) if n % 5 == 4]
    made = AutoTokenizer.from_pretrained(out / "model")
    row = [i for d in held for i in [*made(d)["input_ids"], made.eos_token_id]]
    blocks = torch.tensor(row[: len(row) // 16 * 16]).view(-1, 16)
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float64).eval()
    with torch.no_grad():
        logprobs = model(input_ids=blocks).logits[:, :-1].log_softmax(-1)
    loss = -logprobs.gather(-1, blocks[:, 1:, None]).mean()
    report = Report.load(out / "run")
    # Batches of 2, the last of which may be shorter, are weighted by the Trainer as they should.
    assert -report.matrix.rows[-1][1] == pytest.approx(float(loss), abs=1e-5)


def test_what_is_told_before(done: tuple[Path, str], root: Path) -> None:
    _, told = done
    words = r"tokens in (\d+) blocks, and (\d+) more held out"
    blocks, held = (int(n) for n in re.findall(words, told)[0])
    mine = (root / "a.txt").read_text().splitlines()
    rows = [
        sum(len(d.split()) + 1 for n, d in enumerate(mine) if (n % 5 == 4) == out)
        for out in (False, True)
    ]
    assert [blocks, held] == [row // 16 for row in rows]
    assert "LlamaForCausalLM, 6,832 parameters, all trained" in told
    assert "2 sequences x 16 tokens x 2 accumulated x 1 device = 64 tokens" in told
    assert "5 steps, 320 tokens: 15 new blocks" in told
    assert "5 replayed (old_texts 3, a 2)" in told
    assert "weights 27.3 kB, gradients 27.3 kB, moments 54.7 kB" in told
    assert "per second" in told


def test_dry_run_tells_the_same_and_writes_nothing(
    done: tuple[Path, str], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = written(tmp_path / "plan.yml", content(root, output=str(tmp_path / "out")))
    before = sorted(root.iterdir())
    assert main(["train", str(plan), "--dry-run"]) == 0
    told = capsys.readouterr().out.splitlines()
    real = done[1].splitlines()
    for line in told:
        if not line.startswith(("output", "         ")):
            assert line in real
    steps = [line for line in told if " steps, " in line]
    assert [line.split("(")[0] for line in steps] == [
        line.split("(")[0] for line in real if " steps, " in line
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yml"]
    assert sorted(root.iterdir()) == before


def test_quiet_says_nothing(root: Path, tmp_path: Path) -> None:
    """Nor does a fraction of a pass of one stage need more than that."""
    stage = {"name": "a", "texts": [str(root / "a.txt")], "epochs": 0.5}
    changes: dict[str, Any] = {"stages": [stage], "old_texts": [], "replay": 0, "probes": {}}
    plan = parse_plan(content(root, **changes))
    told: list[str] = []
    report = Job(plan, tmp_path / "out", quiet=True).run(told.append)
    assert told == []
    (counts,) = [
        json.loads(p.read_text())
        for p in (tmp_path / "out/tokens").glob("?????*.json")
        if p.name != "files.json"
    ]
    blocks = counts["train"]["tokens"] // 16
    assert report.seconds.keys() == {"a"}
    args = torch.load(tmp_path / "out/model/training_args.bin", weights_only=False)
    assert args.max_steps == math.ceil(blocks / 2 / 4)


# --- resume ------------------------------------------------------------------------------------


def test_again_does_nothing_anew(
    done: tuple[Path, str], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = done
    before = (out / "model" / "model.safetensors").read_bytes()
    monkeypatch.setattr(
        pretraining.BlockTrainer, "training_step", lambda *_, **__: pytest.fail("trained again")
    )
    told: list[str] = []
    Job(parse_plan(content(root)), out).run(told.append)
    assert (out / "model" / "model.safetensors").read_bytes() == before
    assert not any(line.startswith("packed") or "per second" in line for line in told)
    found = [line for line in told if line.startswith("found ")]
    first = [line.split(" (")[0].split()[1:] for line in done[1].splitlines() if "packed " in line]
    assert [line.split(", packed before, ")[0].split()[1:] for line in found] == first
    assert len(found) == 2


def test_a_plan_that_has_changed_is_refused(done: tuple[Path, str], root: Path) -> None:
    out, _ = done
    for changes, words in (
        ({"seed": 1}, "another seed: 0 there, 1 now"),
        ({"replay": 0.5}, r"another stages\[0\].replay.ratio: 0.25 there, 0.5 now"),
        ({"schedule": {"rewarm": {"warmup": 3}}}, r"stages\[0\].schedule.options.warmup: 2 there"),
        ({"training": {"use_cpu": True, "label_smoothing_factor": 0.1}}, "label_smoothing_factor"),
    ):
        with pytest.raises(CheckpointError, match=words):
            Job(parse_plan(content(root, **changes)), out)
    free = {"save_every": 7, "training": {"use_cpu": True, "logging_steps": 3}}
    Job(parse_plan(content(root, **free)), out)


def test_a_mistake_before_training_locks_nothing(root: Path, tmp_path: Path) -> None:
    """Neither in the texts nor in the model: the corrected plan takes the folder over."""
    stage = {"name": "a", "texts": [str(root / "a.txt")], "steps": 3}
    changes: dict[str, Any] = {"stages": [stage], "probes": {}, "old_texts": [], "replay": 0}
    out = tmp_path / "out"
    wrong = parse_plan(content(root, **changes, documents="file"))
    with pytest.raises(RecipeError, match="held_out takes whole documents"):
        Job(wrong, out, quiet=True).run()
    assert (out / "plan.json").is_file()
    right = parse_plan(content(root, **changes))
    (out / "run").mkdir()
    nothing: dict[str, Any] = {"trained": [], "scores": {}}
    (out / "run" / "stream.json").write_text(json.dumps(nothing))
    Job(right, out, quiet=True)
    (out / "run" / "stream.json").write_text(json.dumps({**nothing, "scores": {"before": {}}}))
    with pytest.raises(CheckpointError, match="another documents: 'file' there, 'line' now"):
        Job(right, out, quiet=True)
    (out / "run" / "stream.json").unlink()
    Job(right, out, quiet=True).run()
    assert json.loads((out / "plan.json").read_text())["documents"] == "line"
    with pytest.raises(CheckpointError, match="another documents: 'line' there, 'file' now"):
        Job(wrong, out, quiet=True)


def test_texts_that_have_changed_are_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "mine.txt"
    text.write_text(lines(7))
    stage = {"name": "a", "texts": [str(text)], "steps": 3}
    plan = parse_plan(content(root, stages=[stage], probes={}))
    Job(plan, tmp_path / "out", quiet=True).run()
    text.write_text(lines(8))
    with pytest.raises(CheckpointError, match=r"another tasks\.a\."):
        Job(plan, tmp_path / "out", quiet=True).run()


KILLED = """
import os, signal, sys
from cl_fast.cli import main
from cl_fast.integrations import keeping
save, count = keeping.save_states, 0

def killing(keeps, folder):
    global count
    save(keeps, folder)
    count += 1
    if count == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

keeping.save_states = killing
main(["train", sys.argv[1], "--quiet"])
"""


def test_killed_and_called_again_gives_equal_bits(
    done: tuple[Path, str], root: Path, tmp_path: Path
) -> None:
    """SIGKILL within the first stage, after a checkpoint; then the same command."""
    plan = written(tmp_path / "plan.yml", content(root, output=str(tmp_path / "out")))
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(plan), "2"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "model").exists()
    assert list((tmp_path / "out/run/tasks/00-a/checkpoints").glob("checkpoint-6/keeps.pt"))
    threads = torch.get_num_threads()
    assert main(["train", str(plan), "--quiet"]) == 0
    assert torch.get_num_threads() == threads
    mine, theirs = (load_file(o / "model/model.safetensors") for o in (tmp_path / "out", done[0]))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    rows = [Report.load(o / "run").matrix.rows for o in (tmp_path / "out", done[0])]
    assert rows[0] == rows[1]


# --- several processes -------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_learn_what_one_does(root: Path, tmp_path: Path) -> None:
    """Half of the sequences on each: the same steps, so the same weights up to rounding."""
    changes: dict[str, Any] = {
        "model": str(root / "calm"),
        "tokenizer": str(root / "base"),
        "optimizer": {"name": "sgd"},  # Adam would make much of differences in rounding
        "probes": {},
    }
    both = content(root, **changes, batch={"sequences": 1, "length": 16, "accumulate": 2})
    plan = written(tmp_path / "plan.yml", both)
    words = ["--standalone", "--nproc-per-node=2", "-m", "cl_fast", "train", str(plan), "--quiet"]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, "--out", str(tmp_path / "two")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        check=True,
    )
    Job(parse_plan(content(root, **changes)), tmp_path / "one", quiet=True).run()
    one, two = (load_file(tmp_path / n / "model/model.safetensors") for n in ("one", "two"))
    base = load_file(root / "calm" / "model.safetensors")
    for name, weight in one.items():
        moved = (weight - base[name]).norm()
        assert (two[name] - weight).norm() < 1e-3 * moved


def test_a_model_that_was_evaluated_is_wrapped_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mark that accelerate leaves when it evaluates would keep DDP away from the model."""
    seen: list[bool] = []
    train, evaluate = pretraining.BlockTrainer.train, pretraining.BlockTrainer.evaluate

    def watched(of: Any) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if of is train:
                seen.append(hasattr(self.model, "_is_accelerate_prepared"))
            done = of(self, *args, **kwargs)
            if of is evaluate:
                seen.append(hasattr(self.model, "_is_accelerate_prepared"))
            return done

        return method

    monkeypatch.setattr(pretraining.BlockTrainer, "train", watched(train))
    monkeypatch.setattr(pretraining.BlockTrainer, "evaluate", watched(evaluate))
    stage = {"name": "a", "texts": [str(root / "a.txt")], "steps": 3}
    changes: dict[str, Any] = {"stages": [stage], "probes": {}, "old_texts": [], "replay": 0}
    Job(parse_plan(content(root, **changes)), tmp_path / "out", quiet=True).run()
    assert seen[:2] == [True, False]  # the scores before, and then the training


# --- the example -------------------------------------------------------------------------------


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its domains are learned, and replay keeps what the model knew."""
    folder = Path(__file__).parents[2] / "examples" / "continual_pretraining"
    example = runpy.run_path(str(folder / "prepare.py"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(example["main"].__globals__, "work", tmp_path / "work")
    example["main"]()
    assert main(["train", str(folder / "plan.yml"), "--quiet"]) == 0
    report = Report.load(tmp_path / "work" / "run" / "run")
    losses = -np.array([report.matrix.before, report.matrix.rows[-1]])
    assert (losses[0] > 5).all()
    assert (losses[1] < 2.5).all()
    general = report.probes["general"]
    assert general["sailing"] > general["before"] - 0.5


# --- options -----------------------------------------------------------------------------------


def test_a_lora_with_keeps_and_documents_apart(root: Path, tmp_path: Path) -> None:
    """An adapter is trained and multiplied out; keeps get their options, prompts their texts."""
    plan = parse_plan(
        content(
            root,
            peft={"r": 2, "targets": ["q_proj", "v_proj"], "merge": True},
            documents_apart=True,
            keep=["orthogonal", {"distill": {"prompts": [str(root / "old.txt")], "batch_size": 2}}],
            stages=[{"name": n, "texts": str(root / f"{n}.txt"), "steps": 3} for n in "ab"],
            probes={},
        )
    )
    job = Job(plan, tmp_path / "out", quiet=True)
    assert (job.trainable, job.parameters) == (2 * 2 * (2 * 16 + 16 + 8 + 0), 6832 + 224)
    report = job.run()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    base = load_file(root / "base" / "model.safetensors")
    moved = {n for n, x in model.state_dict().items() if not torch.equal(x, base[n])}
    assert moved == {
        f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in ("q", "v")
    }
    assert len(report.matrix.rows) == 2


def test_order_and_replay_are_exact(root: Path, tmp_path: Path) -> None:
    """At every prefix of a stage; each new block once in a pass, old ones from all that is old."""
    job = Job(parse_plan(content(root, replay={"ratio": 0.3, "split": "size"})), tmp_path / "out")
    blocks, _, _, old, _ = job._data()
    assert isinstance(old, Blocks)
    mixture = job._mixture(1, blocks, old, 200)
    sources = [mixture.source(i) for i in range(200)]
    for n in range(201):
        assert abs(sum(name != "new" for name, _ in sources[:n]) - 0.3 * n) < 1
    count = len(blocks["b"])
    new = [index for name, index in sources if name == "new"]
    assert sorted(new[:count]) == list(range(count))
    assert new[:count] != sorted(new[:count])
    first = job._mixture(0, blocks, old, 7)
    assert [first.source(i)[0] for i in range(7)].count("old_texts") == 2


def test_a_model_with_folded_adapters_is_left_whole(root: Path, tmp_path: Path) -> None:
    """O-LoRA folds what was learned into the base: an adapter alone would answer like the base."""
    plan = parse_plan(
        content(
            root,
            peft={"r": 2, "targets": ["q_proj", "v_proj"]},
            keep=["orthogonal"],
            stages=[{"name": n, "texts": str(root / f"{n}.txt"), "steps": 3} for n in "ab"],
            probes={},
        )
    )
    report = Job(plan, tmp_path / "out", quiet=True).run()
    again = Job(plan, tmp_path / "out", quiet=True).run()  # and once more, with nothing to train
    assert not (tmp_path / "out" / "model" / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").eval()
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(root / "base").eval()(input_ids=ids).logits
        logits = model(input_ids=ids).logits
        for of in (report, again):
            assert of.model is not None
            expected = of.model.eval()(input_ids=ids).logits
            torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    assert (logits - base).abs().max() > 1e-3
    made = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    held = [d for n, d in enumerate((root / "b.txt").read_text().splitlines()) if n % 5 == 4]
    row = [i for d in held for i in [*made(d)["input_ids"], made.eos_token_id]]
    blocks = torch.tensor(row[: len(row) // 16 * 16]).view(-1, 16)
    with torch.no_grad():
        loss = model(input_ids=blocks, labels=blocks).loss
    assert -report.matrix.rows[-1][1] == pytest.approx(float(loss), abs=1e-5)


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": "./nowhere"}, RecipeError, "model: there is no folder ./nowhere"),
        ({"tokenizer": "./nowhere"}, RecipeError, "tokenizer: there is no folder"),
        ({"batch": {"length": 65}}, RecipeError, "batch.length: 65 tokens, but the model has only"),
        ({"training": {"use_cpuu": 1}}, RecipeError, "use_cpuu: .* did you mean 'use_cpu'"),
        ({"training": {"eval_strategy": "x"}}, RecipeError, "training: x is not a valid"),
        ({"old_texts": ["none*.txt"]}, RecipeError, r"old_texts\[0\]: the pattern 'none\*.txt'"),
        ({"probes": {"p": "none.txt"}}, RecipeError, r"probes.p\[0\]: there is no file none.txt"),
        ({"keep": [{"anchor": {"wieght": 1}}]}, RecipeError, "wieght: .* did you mean 'weight'"),
        ({"keep": [{"anchor": {"weight": -1.0}}]}, RecipeError, r"keep\[0\].anchor: weight must"),
        ({"keep": ["anchor"]}, RecipeError, r"keep\[0\].anchor: weight is required"),
        ({"replay": 0}, RecipeError, "old_texts: no stage replays; set replay, or remove"),
        ({"replay": 0, "batch": {"length": 65}}, RecipeError, "batch.length: 65"),  # the other one
        ({"keep": ["orthogonal"]}, RecipeError, "orthogonal: works on a LoRA; set peft"),
        (
            {"peft": {"merge": True}, "training": {"fsdp": True}},
            RecipeError,
            "peft.merge: not with",
        ),
        ({"peft": {"targets": ["nothing"]}}, RecipeError, "peft.targets: "),
        ({"bos": True, "tokenizer": "no-bos"}, RecipeError, "bos: the tokenizer has no begin"),
        ({"tokenizer": "no-eos"}, RecipeError, "tokenizer: has no end token"),
    ],
)
def test_bad_plans(
    root: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    if str(changes.get("tokenizer", "")).startswith("no-"):
        made = tokenizer()
        setattr(made, f"{changes['tokenizer'].removeprefix('no-')}_token", None)
        made.save_pretrained(tmp_path / "tokenizer")
        changes = {**changes, "tokenizer": str(tmp_path / "tokenizer")}
    with pytest.raises(error, match=words):
        Job(parse_plan(content(root, **changes)), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "is_path"),
    [
        ("gpt2", False),
        ("owner/model", False),
        ("here/model", True),
        ("here/my model", True),
        ("here/it", False),  # of the hub, downloaded before
        ("work/steady/model", True),
        ("model/", True),
        ("./model", True),
        ("~/model", True),
        ("/model", True),
    ],
)
def test_a_folder_that_is_missing_is_not_looked_for_elsewhere(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_path: bool
) -> None:
    asked: list[str] = []

    def ask(what: str, **_: Any) -> None:
        asked.append(what)
        raise OSError("asked the hub")

    look = pretraining.try_to_load_from_cache

    def cached(what: str, file: str) -> Any:
        return "somewhere" if what == "here/it" else look(what, file)

    monkeypatch.setattr(pretraining.AutoConfig, "from_pretrained", ask)
    monkeypatch.setattr(pretraining, "try_to_load_from_cache", cached)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises((RecipeError, CheckpointError)) as told:
        Job(parse_plan(content(root, model=name)), tmp_path / "out", quiet=True)
    if is_path:
        assert str(told.value) == f"model: there is no folder {name}"
    assert asked == ([] if is_path else [name])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"documents": "file"}, "a: held_out takes whole documents, and 0.2 of 1 leave that none"),
        ({"held_out": "few.txt"}, "a, held out: has 4 tokens, fewer than one block of 16: give"),
        ({"batch": {"length": 50}, "held_out": 0.02}, r"a, held out: has \d+ tokens, fewer than"),
        ({"texts": "few.txt", "held_out": "few.txt"}, "a: has 4 tokens, fewer than one block"),
        ({"texts": "empty.txt", "held_out": "few.txt"}, "a: there is no text in 1 files"),
    ],
)
def test_a_dry_run_and_a_run_say_the_same_of_small_texts(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.txt").write_text("the cat sat\n")
    (tmp_path / "empty.txt").write_text("\n")
    changes = dict(changes)
    stage = {"name": "a", "texts": changes.pop("texts", str(root / "a.txt")), "epochs": 1}
    plan = parse_plan(content(root, **changes, stages=[stage], old_texts=[], replay=0, probes={}))
    job = Job(plan, tmp_path / "out", quiet=True)
    with pytest.raises(RecipeError, match=f"^{words}") as dry:
        job.estimate()
    with pytest.raises(RecipeError) as wet:
        job.run()
    assert str(wet.value) == str(dry.value)


def test_an_interrupt_tells_how_to_go_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pretraining, "learn", interrupted)
    plan = written(tmp_path / "plan.yml", content(root, output=str(tmp_path / "out")))
    assert main(["train", str(plan)]) == 130
    told = capsys.readouterr().err
    assert "cl-fast: interrupted\n         the same command goes on" in told


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"schedule": {"cosine": {"num_cycels": 1}}}, r"stages\[0\].schedule: .*num_cycels"),
        ({"schedule": {"constant": {"warmup": 2}}}, "constant has no options"),
        ({"schedule": {"rewarm": {"warmup": 9}}, "steps": 5}, r"stages\[0\].schedule: "),
        ({"held_out": 0.001}, "held_out takes whole documents"),
    ],
)
def test_found_before_training(
    root: Path, tmp_path: Path, stage: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining, "learn", lambda *_, **__: pytest.fail("training began"))
    first = {"name": "a", "texts": [str(root / "a.txt")], "epochs": None, "learning_rate": 1e-2}
    whole = {**first, "steps": 5, **stage}
    whole.pop("epochs")
    job = Job(parse_plan(content(root, stages=[whole])), tmp_path / "out", quiet=True)
    with pytest.raises(RecipeError, match=words):
        job.run()


def test_folders_of_others_are_left_alone(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    plan = written(tmp_path / "plan.yml", content(root))
    assert main(["train", str(plan)]) == 1
    assert "output: is required, in the plan or as --out" in capsys.readouterr().err
    assert main(["train", str(plan), "--out", str(tmp_path / "out")]) == 1
    assert "is not empty (mine) and holds no run of cl-fast train" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]
