"""The cache of a teacher: what it holds, what it takes, being killed, and being damaged."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_fast.errors import CheckpointError, OutputError
from cl_fast.losses import TeacherCache, TopK, divergence_from_logits
from cl_fast.losses import cache as module

transformers = pytest.importorskip("transformers")

VOCABULARY = 300


def model(kind: str = "gpt2", seed: int = 0, vocabulary: int = VOCABULARY, **more: Any) -> Any:
    torch.manual_seed(seed)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=vocabulary, n_positions=64, n_embd=16, n_layer=1, n_head=2,
            bos_token_id=0, eos_token_id=0, initializer_range=0.5, **more,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    names = {"llama": "Llama", "gemma2": "Gemma2", "cohere": "Cohere", "granite": "Granite"}
    config = getattr(transformers, names[kind] + "Config")(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, initializer_range=0.5,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0, **more,
    )  # fmt: skip
    return getattr(transformers, names[kind] + "ForCausalLM")(config)


def dataset(lengths: tuple[int, ...] = (7, 1, 12, 5, 9), seed: int = 0) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, VOCABULARY, (n,), generator=g)} for n in lengths]


def build(path: Path, **options: Any) -> TeacherCache:
    options = {"model": model(), "dataset": dataset(), "k": 8, "progress": False, **options}
    given = [options.pop(name) for name in ("model", "dataset", "k")]
    return TeacherCache.build(*given, path=path, **options)


class Tokenizer:
    def __init__(self, **changed: int) -> None:
        self._vocabulary = {f"token {i}": i for i in range(20)} | changed

    def get_vocab(self) -> dict[str, int]:
        return self._vocabulary


def files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


# --- what it holds -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("gpt2", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_likeliest_tokens_of_the_model(
    tmp_path: Path, kind: str, more: dict[str, Any], dtype: str
) -> None:
    teacher, data = model(kind, **more).eval(), dataset()
    cache = build(tmp_path / "c", model=teacher, dtype=dtype, batch_size=3)
    assert len(cache) == len(data)
    for example, stored in zip(data, cache, strict=True):
        with torch.no_grad():
            logits = teacher(input_ids=example["input_ids"][None]).logits[0]
        exact = logits.double().log_softmax(-1)
        assert stored.ids.shape == (len(example["input_ids"]), 8)
        assert stored.ids.dtype == torch.int32
        assert str(stored.logprobs.dtype) == f"torch.{dtype}"
        want = exact.topk(8).values
        spacing = torch.finfo(stored.logprobs.dtype).eps
        bound = 0.51 * spacing * want.abs() + 3e-6
        assert ((stored.logprobs.double() - want).abs() <= bound).all()
        picked = exact.gather(1, stored.ids.long())
        torch.testing.assert_close(picked, want, rtol=0, atol=1e-5)


def test_log_probs_at_a_temperature(tmp_path: Path) -> None:
    teacher, data = model().eval(), dataset((6,))
    cache = build(tmp_path / "c", model=teacher, dataset=data, temperature=2.0)
    with torch.no_grad():
        logits = teacher(input_ids=data[0]["input_ids"][None]).logits[0].double()
    want = (logits / 2).log_softmax(-1).topk(8).values
    torch.testing.assert_close(cache[0].logprobs.double(), want, rtol=1e-3, atol=1e-3)
    assert cache.temperature == 2.0


def test_a_loss_reads_what_is_stored(tmp_path: Path) -> None:
    teacher, data = model().eval(), dataset((6,))
    logits = teacher(input_ids=data[0]["input_ids"][None]).logits[0]
    given = build(tmp_path / "c", model=teacher, dataset=data, k=30)[0]
    for tail in ("bucket", "renorm"):
        loss = divergence_from_logits(logits, TopK(given.ids, given.logprobs, tail=tail))
        assert 0 <= loss.item() < 1e-5


@pytest.mark.parametrize(("vocabulary", "size"), [(VOCABULARY, 4), (65_536, 4), (65_537, 6)])
def test_bytes_per_position(tmp_path: Path, vocabulary: int, size: int) -> None:
    data = dataset((60,) * 20)
    cache = build(
        tmp_path / "c", model=model(vocabulary=vocabulary), dataset=data, k=32, shard_tokens=600
    )
    per_token = cache.nbytes / cache.rows
    assert cache.rows == 1200
    assert size * 32 <= per_token <= 6.5 * 32
    assert per_token <= 1.1 * size * 32


def test_ids_beyond_16_bits(tmp_path: Path) -> None:
    teacher = model(vocabulary=70_000)
    with torch.no_grad():
        teacher.lm_head.weight[69_999] *= 40
    cache = build(tmp_path / "c", model=teacher, k=2000)
    assert max(int(x.ids.max()) for x in cache) > 65_536


def test_masks_and_labels(tmp_path: Path) -> None:
    teacher = model().eval()
    tokens = torch.randint(0, VOCABULARY, (6,))
    labels = [-100, -100, 5, 6, -100, 7]
    left = {"input_ids": [0, 0, *tokens.tolist()], "attention_mask": [0, 0] + [1] * 6}
    data = [
        {"input_ids": tokens.tolist(), "labels": labels},
        {**left, "labels": [-100, -100, *labels]},
        {"input_ids": [], "labels": []},
        {"input_ids": tokens.tolist(), "labels": [-100] * 6, "attention_mask": None},
    ]
    every = build(tmp_path / "all", model=teacher, dataset=data, batch_size=4)
    some = build(tmp_path / "labels", model=teacher, dataset=data, keep="labels", batch_size=2)
    assert every.rows == 18
    assert some.rows == 6
    assert every.kept(1).tolist() == [False] * 2 + [True] * 6
    assert some.kept(0).tolist() == [False, True, True, False, True, False]
    assert some[2].ids.shape == (0, 8)
    assert not some.kept(3).any()
    torch.testing.assert_close(every[1].logprobs[2:], every[0].logprobs, rtol=2e-3, atol=2e-3)
    kept = some.kept(0)
    torch.testing.assert_close(
        some[0].logprobs[kept], every[0].logprobs[kept], rtol=2e-3, atol=2e-3
    )
    # What is not stored is a support that losses accept; its rows are masked by their labels.
    weights = kept.float()
    loss = divergence_from_logits(torch.randn(6, VOCABULARY), some[0], token_weight=weights)
    assert loss.isfinite()
    divergence_from_logits(torch.randn(8, VOCABULARY), every[1])


def test_indices_and_batches(tmp_path: Path) -> None:
    cache = build(tmp_path / "c", shard_tokens=12)
    assert len(list((tmp_path / "c").glob("*.safetensors"))) == 4
    assert torch.equal(cache[-1].ids, cache[4].ids)
    with pytest.raises(IndexError, match="sequence 5 of 5"):
        cache[5]
    batch = cache.batch([3, 0])
    assert batch.ids.shape == batch.logprobs.shape == (2, 7, 8)
    assert torch.equal(batch.ids[1], cache[0].ids)
    assert torch.equal(batch.ids[0, :5], cache[3].ids)
    assert batch.ids[0, 5].tolist() == list(range(8))
    assert batch.logprobs.float().exp().sum(-1)[0, 6].item() == pytest.approx(1, abs=1e-2)
    with pytest.raises(ValueError, match="some sequences of one k"):
        cache.batch([])
    assert "5 sequences, 34 positions, k = 8" in repr(cache)


def test_more_shards_than_are_kept_open(tmp_path: Path) -> None:
    cache = build(tmp_path / "c", dataset=dataset((2,) * 40), shard_tokens=2)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    again = {i: cache[i].ids for i in order}
    for i, teacher in enumerate(cache):
        assert torch.equal(again[i], teacher.ids)
    assert len(cache._open) == module._OPEN_SHARDS


def test_attached_to_its_dataset_and_sent_to_workers(tmp_path: Path) -> None:
    data = dataset()
    cache = build(tmp_path / "c")
    cache[0]
    taught = pickle.loads(pickle.dumps(cache.attach(data)))
    assert len(taught) == 5
    for i in range(5):
        example = taught[i]
        assert torch.equal(example["input_ids"], data[i]["input_ids"])
        assert torch.equal(example["teacher_ids"], cache[i].ids)
        assert torch.equal(example["teacher_logprobs"], cache[i].logprobs)
    with pytest.raises(CheckpointError, match="another dataset"):
        cache.attach(dataset(seed=1))
    with pytest.raises(CheckpointError, match="it has 5 sequences, not 4"):
        cache.attach(data[:4], verify=False)
    bare = [x["input_ids"].tolist() for x in data]
    assert cache.attach(bare)[1]["input_ids"] == bare[1]
    assert taught.temperature == cache.temperature
    renormed = cache.batch([0, 1], tail="renorm")
    assert (renormed.tail, cache.batch([0]).tail) == ("renorm", "bucket")


def test_an_empty_dataset(tmp_path: Path) -> None:
    cache = build(tmp_path / "c", dataset=[])
    assert len(cache) == 0
    assert list(cache) == []


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    teacher = model().train()
    build(tmp_path / "c", model=teacher)
    assert teacher.training
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())


def test_the_logits_are_never_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    real = module.chunks
    monkeypatch.setattr(module, "chunks", lambda n, v: real(n, v, 5))
    monkeypatch.setattr(
        module, "topk_logprobs",
        lambda x, *a, **b: (rows.append(x.size(0)), supports_topk(x, *a, **b))[1],
    )  # fmt: skip
    build(tmp_path / "c")
    assert sum(rows) == 34
    assert max(rows) == 5


supports_topk = module.topk_logprobs


# --- what it refuses ---------------------------------------------------------------------------


def test_another_teacher_or_dataset_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    first = build(path, tokenizer=Tokenizer())
    before = files(path)
    assert len(build(path, tokenizer=Tokenizer())) == len(first)
    edited = model()
    with torch.no_grad():
        edited.transformer.h[0].mlp.c_fc.weight[3, 5] += 1e-3
    for changed, words in [
        ({"tokenizer": Tokenizer(extra=20)}, "another tokenizer"),
        ({"tokenizer": None}, "another tokenizer"),
        ({"dataset": dataset(seed=1)}, "another dataset"),
        ({"dataset": dataset()[:4]}, "sequences = 5, not 4"),
        ({"model": model(seed=1)}, "another model"),
        ({"model": edited}, "another model"),
        ({"k": 7}, "k = 8, not 7"),
        ({"dtype": torch.bfloat16}, "dtype = 'float16', not 'bfloat16'"),
        ({"temperature": 2.0}, "temperature = 1.0, not 2.0"),
        ({"shard_tokens": 10}, "shard_tokens = 65536, not 10"),
    ]:
        with pytest.raises(CheckpointError) as raised:
            build(path, **{"tokenizer": Tokenizer(), **changed})
        assert words in str(raised.value)
        assert str(path) in str(raised.value)
    with pytest.raises(CheckpointError, match="another tokenizer"):
        TeacherCache.open(path, tokenizer=Tokenizer(extra=20))
    with pytest.raises(CheckpointError, match="another dataset"):
        TeacherCache.open(path, dataset=dataset(seed=1))
    TeacherCache.open(path, tokenizer=Tokenizer(), dataset=dataset())
    assert files(path) == before
    build(tmp_path / "d")
    with pytest.raises(CheckpointError, match="without naming a tokenizer"):
        TeacherCache.open(tmp_path / "d", tokenizer=Tokenizer())


def test_other_masks_are_another_dataset(tmp_path: Path) -> None:
    ids = [5, 6, 7, 8]
    data = [{"input_ids": ids, "labels": [-100, 6, 7, 8], "attention_mask": [1, 1, 1, 1]}]
    build(tmp_path / "labels", dataset=data, keep="labels")
    build(tmp_path / "all", dataset=data)
    other = [{**data[0], "labels": [-100, -100, 7, 8]}]
    with pytest.raises(CheckpointError, match="another dataset"):
        build(tmp_path / "labels", dataset=other, keep="labels")
    assert build(tmp_path / "all", dataset=other).rows == 4  # which asks for no labels
    for keep in ("labels", "all"):
        other = [{**data[0], "attention_mask": [0, 1, 1, 1]}]
        with pytest.raises(CheckpointError, match="another dataset"):
            build(tmp_path / keep, dataset=other, keep=keep)


def test_bad_arguments(tmp_path: Path) -> None:
    ints = {"input_ids": [1, 2, 3]}
    for changed, error, words in [
        ({"k": 0}, ValueError, "k must be between 1 and 300"),
        ({"k": 301}, ValueError, "k must be between 1 and 300"),
        ({"dtype": "float32"}, ValueError, "dtype must be 'float16' or 'bfloat16'"),
        ({"keep": "some"}, ValueError, "keep must be 'all' or 'labels'"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"batch_size": 0}, ValueError, "batch_size and shard_tokens must be at least 1"),
        ({"tokenizer": "gpt2"}, TypeError, "tokenizer must have get_vocab()"),
        ({"dataset": iter([ints])}, TypeError, "dataset must be map-style"),
        ({"dataset": [ints, {"text": "x"}]}, ValueError, "dataset[1] must have input_ids"),
        ({"dataset": [{"input_ids": [[1]]}]}, ValueError, "must be one sequence of integers"),
        ({"dataset": [{"input_ids": [1.5]}]}, ValueError, "must be one sequence of integers"),
        (
            {"dataset": [{**ints, "attention_mask": [1]}]}, ValueError,
            "attention_mask must be as long as input_ids, 3; got 1",
        ),
        ({"dataset": [ints], "keep": "labels"}, ValueError, "has no labels"),
        ({"model": nn.Linear(2, 2)}, ValueError, "model must have an output head"),
    ]:  # fmt: skip
        with pytest.raises(error) as raised:
            build(tmp_path / "c", **changed)  # type: ignore[arg-type]
        assert words in str(raised.value)
    assert not (tmp_path / "c").exists()


def test_a_model_that_changes_its_logits_otherwise_is_refused(tmp_path: Path) -> None:
    teacher = model()
    real = teacher.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(logits=real(*args, **kwargs).logits * 1.5)

    teacher.forward = forward
    with pytest.raises(ValueError, match="are not those of its decoder and its output head"):
        build(tmp_path / "c", model=teacher)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        build(tmp_path)
    assert files(tmp_path) == {"notes.txt": b"mine"}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot be made"):
        build(tmp_path / "file" / "c")
    with pytest.raises(CheckpointError, match="cannot be read"):
        TeacherCache.open(tmp_path)


# --- killed and resumed ------------------------------------------------------------------------

WORKER = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads(1)  # nothing of a pool is lost in a fork
    import test_teacher_cache as t
    from cl_fast.losses import cache
    t.model()  # loads what children would load one by one

    dies, written, asked = 0, 0, 0
    fsync, ask = os.fsync, cache._Teacher.topk

    def dying_fsync(descriptor):
        global written
        written += 1
        if written == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    def dying_topk(self, batch, k):
        global asked
        asked += 1
        if -asked == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return ask(self, batch, k)

    os.fsync, cache._Teacher.topk = dying_fsync, dying_topk
    for dies in map(int, sys.argv[2:]):
        child = os.fork()
        if child == 0:
            t.build(Path(sys.argv[1]), shard_tokens=12, batch_size=1)
            print(asked, flush=True)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if dies:
            assert os.WTERMSIG(status) == signal.SIGKILL, status
            try:
                cache.TeacherCache.open(sys.argv[1])
            except ValueError as error:
                assert "not whole" in str(error) or "cannot be read" in str(error), error
            else:
                raise AssertionError("half a cache was opened")
"""


def test_a_build_that_was_killed_goes_on_and_writes_the_same_bytes(tmp_path: Path) -> None:
    """In the plan, within a shard, while a shard is written, and when it is there."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    build(tmp_path / "whole", shard_tokens=12, batch_size=1)
    torch.set_num_threads(threads)
    path = tmp_path / "killed"
    code = textwrap.dedent(WORKER).format(tests=str(Path(__file__).parent))
    # fsync 1 and 2 are of the plan and its folder, 3 and 4 of the first shard that is missing;
    # -2 is the second sequence.
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), *map(str, (1, -2, 3, 4, 0))],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 5  # one sequence per batch, and not all of them again
    assert files(path) == files(tmp_path / "whole")
    with pytest.raises(CheckpointError, match="k = 8, not 9"):
        build(path, k=9, shard_tokens=12)


def test_a_full_disk_is_said_and_can_be_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, room = tmp_path / "c", 4
    real = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(
        OutputError, match=r"shard-00001\.safetensors: cannot be written \(No space"
    ):
        build(path, shard_tokens=12)
    assert sorted(files(path)) == ["build.json", "shard-00000.safetensors"]
    room = 100
    build(path, shard_tokens=12)
    build(tmp_path / "whole", shard_tokens=12)
    assert files(path) == files(tmp_path / "whole")


def test_a_shard_that_was_damaged_before_the_end_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "c"
    build(path, shard_tokens=12)
    whole = files(path)
    plan = json.loads(whole["cache.json"])
    plan.pop("shards")
    (path / "build.json").write_text(json.dumps(plan))
    (path / "cache.json").unlink()
    raw = bytearray(whole["shard-00001.safetensors"])
    raw[-3] ^= 1
    (path / "shard-00001.safetensors").write_bytes(raw)
    (path / "shard-00002.safetensors").write_bytes(whole["shard-00002.safetensors"][:100])
    (path / "shard-00003.safetensors.part").write_bytes(b"half")
    build(path, shard_tokens=12)
    assert {k: v for k, v in files(path).items() if not k.endswith(".part")} == whole


# --- damaged -----------------------------------------------------------------------------------


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c"
    build(path, shard_tokens=12)
    shard = path / "shard-00002.safetensors"
    raw = shard.read_bytes()

    def read() -> None:
        for _ in TeacherCache.open(path):
            pass

    other = (path / "shard-00001.safetensors").read_bytes()
    for damaged in (
        raw[:-1], raw[: len(raw) // 2], raw[:7], b"", raw + b"x",
        raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:], raw.replace(b"digest", b"digesT"),
        raw.replace(b'"version":"1"', b'"version":"2"'), other,
        raw.replace(b'teacher_cache"', b'teacher_cachE"'),
    ):  # fmt: skip
        shard.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"shard-00002\.safetensors"):
            read()
    shard.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        read()
    shard.write_bytes(raw)
    read()
    manifest = (path / "cache.json").read_text()
    for damaged, words in (
        (manifest[:-40], "JSON"),
        (manifest.replace('"version": 1', '"version": 9'), "version 9"),
        (manifest.replace("teacher_cache", "student_cache"), "not the manifest"),
        (manifest.replace('"vocab_size"', '"vocab"'), "is damaged"),
    ):
        (path / "cache.json").write_text(damaged)
        with pytest.raises(CheckpointError, match=words):
            read()


def test_any_flipped_byte_of_a_shard_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "c"
    build(path, dataset=dataset((3, 2)), k=2)
    shard = path / "shard-00000.safetensors"
    raw = shard.read_bytes()
    want = [(x.ids.tolist(), x.logprobs.tolist()) for x in TeacherCache.open(path)]
    for at in range(len(raw)):
        damaged = bytearray(raw)
        damaged[at] ^= 0x10
        shard.write_bytes(damaged)
        try:
            got = [(x.ids.tolist(), x.logprobs.tolist()) for x in TeacherCache.open(path)]
        except CheckpointError:
            continue
        assert got == want, at


def test_shards_are_safetensors_files(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    cache = build(tmp_path / "c")
    with safetensors.safe_open(tmp_path / "c" / "shard-00000.safetensors", "np") as file:
        assert file.metadata()["format"] == "cl_fast.teacher_cache"
        ids: Any = file.get_tensor("ids")
    stored: Tensor = torch.cat([x.ids for x in cache])
    assert ids.tolist() == stored.tolist()


def test_what_the_page_shows_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "teacher-cache.md").read_text(encoding="utf-8")
    code = "\n".join(part.split("```")[0] for part in page.split("```python\n")[1:])
    names: dict[str, Any] = {}
    exec(compile(code, "teacher-cache.md", "exec"), names)
    assert names["some"].ids.shape == (2, 20, 16)
    assert names["loss"].isfinite()


def test_the_example_teaches() -> None:
    example = Path(__file__).parents[2] / "examples" / "distill_from_cache.py"
    done = subprocess.run(
        [sys.executable, str(example)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.split("held-out loss: ")[1].replace(",", "").split()
    teacher, before, after = float(words[1]), float(words[3]), float(words[5])
    assert after < teacher + 0.35 * (before - teacher)
