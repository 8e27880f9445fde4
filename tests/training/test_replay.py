"""Replay: past tasks in the mixture, and which of their samples a bounded memory holds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, llama
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from cl_fast.integrations.keeping import KeepMixin
from cl_fast.training.keeping import Task
from cl_fast.training.mixing import Mixture, mix
from cl_fast.training.replay import Replay


class Rows(torch.utils.data.Dataset):
    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return {"from": self.name, "at": index}


def stream(*sizes: int) -> list[Task]:
    return [Task(f"t{i}", i, Rows(f"t{i}", size)) for i, size in enumerate(sizes)]


def read(data: Any) -> Counter[str]:
    return Counter(data[i]["from"] for i in range(len(data)))


def test_the_first_task_is_its_own() -> None:
    new = Rows("new", 20)
    assert Replay(0.5).data(new, []) is new
    assert Replay(0).data(new, stream(5)) is new


def test_past_tasks_share_the_ratio() -> None:
    even = Replay(0.25, length=800).data(Rows("new", 600), stream(30, 10))
    assert isinstance(even, Mixture)
    assert even.names == ("new", "t0", "t1")
    assert even.counts(800) == {"new": 600, "t0": 100, "t1": 100}
    by_size = Replay(0.25, split="size", length=160).data(Rows("new", 600), stream(30, 10))
    assert read(by_size) == {"new": 120, "t0": 30, "t1": 10}
    half = Replay(0.25, length="compute-equivalent", shuffle=False)
    data = half.data(Rows("new", 40), stream(30, 10))
    assert len(data) == 40
    assert [data[i]["at"] for i in range(40) if data[i]["from"] == "t0"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("policy", ["reservoir", "balanced"])
def test_a_memory_is_bounded_and_only_lets_go(policy: Any) -> None:
    sizes, before = (70, 9, 200, 31), None
    replay = Replay(0.2, memory=40, policy=policy, seed=5)
    for many in range(1, 5):
        held = replay.held(stream(*sizes[:many]))
        assert sum(map(len, held)) == min(40, sum(sizes[:many]))
        for indices, size in zip(held, sizes, strict=False):
            assert (np.diff(indices) > 0).all()
            assert not len(indices) or (indices[0] >= 0 and indices[-1] < size)
        for indices, earlier in zip(held, before or [], strict=False):
            assert set(indices.tolist()) <= set(earlier.tolist()), "a sample came back"
        before = held
        again = Replay(0.2, memory=40, policy=policy, seed=5).held(stream(*sizes[:many]))
        assert all(np.array_equal(a, b) for a, b in zip(held, again, strict=True))
    other = Replay(0.2, memory=40, policy=policy, seed=6).held(stream(*sizes))
    assert any(not np.array_equal(a, b) for a, b in zip(before or [], other, strict=True))
    data = replay.data(Rows("new", 161), stream(*sizes))
    allowed = {(f"t{i}", at) for i, x in enumerate(before or []) for at in x.tolist()}
    old = [(row["from"], row["at"]) for i in range(200) if (row := data[i])["from"] != "new"]
    assert set(old) <= allowed
    if policy == "reservoir":
        assert len(set(old[:39])) == 39, "each held sample once, before one comes again"


def test_balanced_is_even_and_fills_up() -> None:
    def shares(memory: int, *sizes: int) -> list[int]:
        replay = Replay(0.1, memory=memory, policy="balanced")
        return [len(x) for x in replay.held(stream(*sizes))]

    assert shares(10, 50, 50, 50) == [4, 3, 3]
    assert shares(10, 2, 50, 50) == [2, 4, 4]
    assert shares(12, 1, 2, 50) == [1, 2, 9]
    assert shares(2, 5, 5, 5) == [1, 1, 0]
    assert Replay(0.5, memory=2, policy="balanced").data(Rows("new", 9), stream(5, 5, 5)).names == (
        "new",
        "t0",
        "t1",
    )


def test_a_reservoir_holds_each_sample_as_likely() -> None:
    """Over 3000 seeds, 8 of 40 samples: each is held 600 times, with a deviation of 22."""
    counts = np.zeros(40)
    for seed in range(3000):
        held = Replay(0.1, memory=8, policy="reservoir", seed=seed).held(stream(25, 15))
        counts[held[0]] += 1
        counts[held[1] + 25] += 1
    assert counts.sum() == 3000 * 8
    assert (abs(counts - 600) < 5 * np.sqrt(3000 * 0.2 * 0.8)).all(), counts


def test_a_reservoir_is_algorithm_r() -> None:
    from cl_fast.training.permutations import order_key

    u = np.random.Generator(np.random.Philox(key=order_key(9, "memory", 0)[0])).random(40)
    slots: list[int] = []
    for t in range(40):
        if t < 6:
            slots.append(t)
        elif (j := int(u[t] * (t + 1))) < 6:
            slots[j] = t
    held = Replay(0.1, memory=6, policy="reservoir", seed=9).held(stream(25, 15))
    assert [*held[0].tolist(), *(held[1] + 25).tolist()] == sorted(slots)


def test_tokens_and_their_lengths() -> None:
    def table(first: int, size: int) -> Any:
        rows = [[first] * (1 + i % 4) for i in range(size)]
        return datasets.Dataset.from_dict({"input_ids": rows, "n": [len(r) for r in rows]})

    new, past = table(0, 80), [Task("a", 0, table(1, 20)), Task("b", 1, table(2, 12))]
    tables = {"new": new, "a": past[0].train, "b": past[1].train}
    given = {name: np.array(table["n"]) for name, table in tables.items()}
    for options in (
        {},
        {"memory": 9, "policy": "balanced"},
        {"memory": 9, "policy": "reservoir"},
    ):
        orders = []
        for lengths in (None, "n", given):
            data = Replay(0.3, unit="tokens", lengths=lengths, **options).data(new, past)
            rows = [data[i]["input_ids"] for i in range(len(data))]
            orders.append(rows)
            tokens = sum(map(len, rows))
            old = sum(len(row) for row in rows if row[0] != 0)
            assert abs(old - 0.3 * tokens) < 4
        assert orders[0] == orders[1] == orders[2]


def test_options_tell_all() -> None:
    given = Replay(0.05, memory=9, policy="balanced", seed=4, unit="tokens", lengths=len)
    options = given.options()
    assert json.loads(json.dumps(options)) == options
    assert options == {
        "ratio": "1/20",
        "memory": 9,
        "policy": "balanced",
        "split": "even",
        "unit": "tokens",
        "seed": 4,
        "length": "all-new",
        "epochs": 1,
        "shuffle": True,
        "shuffle_old": None,
        "lengths": "given",
        "old": {},
    }
    assert given.state_dict() == {}


def test_data_from_before_the_stream_are_replayed_from_the_first_task_on() -> None:
    keep = Replay(0.25, old={"base": Rows("base", 50)}, length=400)
    first = keep.data(Rows("new", 300), [])
    assert isinstance(first, Mixture)
    assert read(first) == {"new": 300, "base": 100}
    second = keep.data(Rows("new", 300), stream(50))
    assert read(second) == {"new": 300, "base": 50, "t0": 50}
    assert keep.options()["old"] == {"base": 50}
    with pytest.raises(ValueError, match="old has 'base', which is a task"):
        keep.data(Rows("new", 9), [Task("base", 0, Rows("base", 3))])
    with pytest.raises(ValueError, match=r"old\['base'\] must be a map-style dataset"):
        Replay(0.25, old={"base": []})


def test_a_trainer_with_the_mixin_reads_a_mixture_in_its_order(tmp_path: Path) -> None:
    class Kept(KeepMixin, Trainer):
        pass

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    rows = [{"input_ids": torch.tensor([i])} for i in range(30)]
    keep = Replay(0.25, old={"base": rows[:10]})
    trainer = Kept(llama(), args, train_dataset=rows[10:], keep=keep)
    assert isinstance(trainer.get_train_dataloader().batch_sampler.sampler, SequentialSampler)
    assert args.train_sampling_strategy != "sequential"  # the user's own are left alone
    alone = Kept(llama(), args, train_dataset=rows[10:], keep=Replay(0.25))
    assert not isinstance(alone.get_train_dataloader().batch_sampler.sampler, SequentialSampler)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"ratio": 1.0}, ValueError, r"ratio must lie in \[0, 1\)"),
        ({"memory": 5}, ValueError, "policy='all' keeps all past data"),
        ({"policy": "balanced"}, ValueError, "policy='balanced' needs memory"),
        ({"policy": "fifo"}, ValueError, "policy must be one of"),
        ({"memory": 0, "policy": "balanced"}, ValueError, "memory must hold at least 1"),
        ({"memory": 0.5, "policy": "balanced"}, TypeError, "memory must be a number of samples"),
        ({"unit": "bytes"}, ValueError, "unit must be one of"),
        ({"split": "odd"}, ValueError, "split must be one of"),
        ({"length": "short"}, ValueError, "length must be"),
        ({"lengths": "n"}, ValueError, "lengths are for unit='tokens'"),
        ({"seed": "0"}, TypeError, "seed must be an int"),
    ],
)
def test_bad_options(options: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Replay(**{"ratio": 0.1, **options})


def test_bad_tasks() -> None:
    new = Rows("new", 9)
    with pytest.raises(ValueError, match="Replay needs train of the task"):
        Replay(0.1).data(new, [Task("a")])
    with pytest.raises(ValueError, match="columns of 'new' and 'a' differ"):
        Replay(0.1).data(new, [Task("a", 0, [{"text": "x"}])])
    with pytest.raises(ValueError, match="past task 'a' is empty"):
        Replay(0.1).data(new, [Task("a", 0, [])])


# In the Trainer.


class Ids(torch.utils.data.Dataset):
    """Token ids that tell which sample they are: kind, then its number."""

    def __init__(self, kind: int, size: int) -> None:
        self.kind, self.size = kind, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.tensor([self.kind, 3 + index % 60, 3 + index // 60])
        return {"input_ids": ids, "labels": ids}


class Seen(TrainerCallback):
    """Keeps the ids of each batch that the model is given."""

    def __init__(self) -> None:
        self.ids: list[list[int]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        def keep(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
            self.ids.extend(kwargs["input_ids"].tolist())

        self.handle = given["model"].register_forward_pre_hook(keep, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.handle.remove()


class Dies(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 7:
            raise KeyboardInterrupt


class Replaying(KeepMixin, Trainer):
    pass


def trainer(folder: Path, *extra: TrainerCallback, **changes: Any) -> tuple[Trainer, Seen]:
    seen = Seen()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=12,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        save_steps=5,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-2,
        **changes,
    )
    made = Replaying(
        model=llama(0, num_hidden_layers=1),
        args=arguments,
        train_dataset=Ids(1, 120),
        callbacks=[seen, *extra],
        keep=Replay(0.25, seed=3),
        task=Task("b", 1),
        past=[Task("a", 0, Ids(2, 15))],
    )
    return made, seen


def test_a_run_that_was_killed_sees_what_a_straight_one_sees(tmp_path: Path) -> None:
    assert VOCABULARY > 63
    straight, seen = trainer(tmp_path / "straight")
    straight.train()
    mixture = straight.train_dataset
    assert isinstance(mixture, Mixture)
    assert isinstance(straight._get_train_sampler(), SequentialSampler)
    assert seen.ids == [mixture[i]["input_ids"].tolist() for i in range(48)]
    assert [ids[0] for ids in seen.ids].count(2) == 12

    killed, before = trainer(tmp_path / "killed", Dies())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert before.ids == seen.ids[:28]
    resumed, after = trainer(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    assert after.ids == seen.ids[20:], "from the checkpoint at step 5, 4 samples a step"
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name

    # The same without skipping batch by batch: what was seen is left out of the dataset.
    jumping, then = trainer(tmp_path / "killed", ignore_data_skip=True)
    jumping.train_dataset = jumping.train_dataset.skip(20)
    jumping.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-5"))
    assert then.ids == seen.ids[20:]
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, jumping.model.state_dict()[name]), name


@pytest.mark.parametrize("world", [2, 3])
def test_the_ranks_of_accelerate_share_the_mixture(world: int) -> None:
    from accelerate.data_loader import prepare_data_loader, skip_first_batches

    mixture = mix(Ids(1, 60), Ids(2, 15), 0.25)
    read = []
    for rank in range(world):
        loader = DataLoader(mixture, batch_size=2, sampler=SequentialSampler(mixture))
        mine = prepare_data_loader(
            loader, num_processes=world, process_index=rank, put_on_device=False
        )
        rows = [batch["input_ids"].tolist() for batch in mine]
        assert [b["input_ids"].tolist() for b in skip_first_batches(mine, 3)] == rows[3:]
        read.append(rows)
    order = [mixture[i]["input_ids"].tolist() for i in range(len(mixture))]
    for step in range(len(mixture) // (2 * world)):
        together = [row for rows in read for row in rows[step]]
        assert together == order[step * 2 * world : (step + 1) * 2 * world]
