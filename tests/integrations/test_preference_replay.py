"""Preference replay, the KL to the base and the pre-training loss in TRL's trainers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig, get_peft_model
from tiny_models import WORDS, gradients, llama, tokenizer
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from cl_fast.integrations.alignment import ReplayDPOTrainer, StoredReferences, mix_preferences
from cl_fast.integrations.keeping import KeepCallback, KeepMixin
from cl_fast.integrations.trl import DPOTrainer as OurDPOTrainer
from cl_fast.training.keeping import Task
from cl_fast.training.kl_to_base import KLPenalty, KLToBase, kl_of_tokens
from cl_fast.training.preferences import PreferenceReplay
from cl_fast.training.pretraining_loss import PretrainingLoss
from cl_fast.training.tokens import frozen_copy

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class TheirStored(StoredReferences, DPOTrainer):
    pass


class KeepingDPO(KeepMixin, OurDPOTrainer):
    pass


class KeepingSFT(KeepMixin, SFTTrainer):
    pass


class Keeping(KeepMixin, Trainer):
    pass


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        **changes,
    }


def sentence(seed: int, words: int) -> str:
    order = torch.randperm(len(WORDS), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[int(i)] for i in order[:words])


def texts(seed: int, count: int = 8) -> Dataset:
    rows = [
        {
            "prompt": sentence(100 * seed + i, 3),
            "chosen": " " + sentence(100 * seed + i + 30, 2 + i % 3),
            "rejected": " " + sentence(100 * seed + i + 60, 4 - i % 2),
        }
        for i in range(count)
    ]
    return Dataset.from_list(rows)


def dpo(
    kind: Any, folder: Path, data: Dataset, model: nn.Module | None = None, **given: Any
) -> Any:
    keywords = {k: given.pop(k) for k in ("keep", "task", "past", "eval_dataset") if k in given}
    given.setdefault("precompute_ref_log_probs", True)
    return kind(
        model=model or llama(0),
        args=DPOConfig(**options(folder, **given)),
        train_dataset=data,
        processing_class=tokenizer(),
        **keywords,
    )


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """What a first stage leaves: its pairs, with the references of a model of its own."""
    folder = tmp_path_factory.mktemp("past")
    trainer = dpo(ReplayDPOTrainer, folder, texts(1), llama(7))
    trainer.stage_pairs("safety").save_to_disk(str(folder / "memory"))
    return load_from_disk(str(folder / "memory"))


REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")


def by_hand(model: nn.Module, row: dict[str, Any], answer: str) -> Tensor:
    ids = torch.tensor([row["prompt_ids"] + row[answer]])
    logprobs = model.double()(input_ids=ids).logits[0].log_softmax(-1)
    at = torch.arange(len(row["prompt_ids"]), ids.size(1))
    return logprobs[at - 1, ids[0, at]].sum()


# --- stored references ---------------------------------------------------------------------------


def test_without_replay_all_is_as_in_trl(past: Dataset, tmp_path: Path) -> None:
    data = texts(2)
    assert mix_preferences(data, [past], 0.0) is data
    theirs, mine = dpo(DPOTrainer, tmp_path, data), dpo(TheirStored, tmp_path, data)
    for name in REFERENCES:
        assert list(mine.train_dataset[name]) == list(theirs.train_dataset[name])
    for trainer in (theirs, mine):
        trainer.train()
    for (name, x), y in zip(
        theirs.model.state_dict().items(), mine.model.state_dict().values(), strict=True
    ):
        assert torch.equal(x, y), name
    assert [e.get("loss") for e in theirs.state.log_history] == [
        e.get("loss") for e in mine.state.log_history
    ]


@pytest.mark.parametrize("kind", [TheirStored, ReplayDPOTrainer])
def test_each_pair_has_the_reference_of_its_stage(kind: Any, past: Dataset, tmp_path: Path) -> None:
    """DPO of replayed and of new pairs by the formula, in float64, from logits."""
    model = llama(0)
    mixed = mix_preferences(texts(2), [past], 0.4, seed=1)
    trainer = dpo(kind, tmp_path, mixed, model, beta=0.3)
    assert trainer.ref_model is None
    rows = list(trainer.train_dataset)
    old = [row for row in rows if row["stage"] == "safety"]
    assert abs(len(old) - 0.4 * len(rows)) < 1
    assert len(rows) - len(old) == 8
    losses = []
    for row in rows:
        reference = llama(7 if row["stage"] else 0)
        ratios = []
        for column, answer in zip(REFERENCES, ("chosen_ids", "rejected_ids"), strict=True):
            ref = by_hand(reference, row, answer)
            assert row[column] == pytest.approx(ref.item(), rel=1e-5)
            ratios.append(by_hand(llama(0), row, answer) - ref)
        losses.append(-torch.sigmoid(0.3 * (ratios[0] - ratios[1])).log())
    batch = trainer.data_collator(rows)
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    trainer.train()


def test_a_stage_hands_on_its_own_pairs_alone(past: Dataset, tmp_path: Path) -> None:
    second = dpo(ReplayDPOTrainer, tmp_path, mix_preferences(texts(2), [past], 0.4))
    left = second.stage_pairs("help")
    assert set(left.column_names) == {
        "prompt", "chosen", "rejected", *REFERENCES, "ref_checksum", "stage",
    }  # fmt: skip
    assert set(left["prompt"]) == set(texts(2)["prompt"])
    assert len(left) == 8
    assert len(second.stage_pairs(size=3)) == 3
    mixed = mix_preferences(texts(3), [past, left], 0.5)
    third = dpo(ReplayDPOTrainer, tmp_path, mixed, llama(3))
    kept = {row["prompt"]: row for rows in (past, left) for row in rows}
    replayed = [row for row in third.train_dataset if row["stage"]]
    assert {row["stage"] for row in replayed} == {"safety", "help"}
    for row in replayed:
        assert [row[name] for name in REFERENCES] == [kept[row["prompt"]][n] for n in REFERENCES]


def test_no_model_is_run_where_all_is_stored(past: Dataset, tmp_path: Path) -> None:
    class Silent(TheirStored):
        def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
            raise AssertionError("asked a model")

    trainer = dpo(Silent, tmp_path, past, eval_dataset=past)
    for data in (trainer.train_dataset, trainer.eval_dataset):
        for name in REFERENCES:
            assert list(data[name]) == list(past[name])
    assert not trainer.stage_pairs().num_rows


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": [kind]}
        for kind in (
            "hinge", "ipo", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot_unpaired",
            "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
        )
    ]
    + [
        {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"f_divergence_type": "js_divergence"},
        {"use_weighting": True},
    ],
)  # fmt: skip
def test_losses_of_trl_take_stored_sums(
    changes: dict[str, Any], past: Dataset, tmp_path: Path, trainers: dict[str, Any]
) -> None:
    """The same as with two reference models: TRL's loss of each half, with the half's own model."""
    stored = trainers["stored"]
    for name, value in changes.items():
        field = "loss_types" if name == "loss_type" else name
        for trainer in trainers.values():
            setattr(trainer, field, value)
            if name == "loss_type":
                trainer.loss_weights = changes.get("loss_weights", [1.0] * len(value))
    rows = list(stored.train_dataset)
    halves = {"old": [r for r in rows if r["stage"]], "new": [r for r in rows if not r["stage"]]}
    with torch.no_grad():
        for name, half in halves.items():
            batch = stored.data_collator(half)
            mine = stored._compute_loss(stored.model, batch, False)
            live = {k: v for k, v in batch.items() if k not in REFERENCES}
            theirs = trainers[name]._compute_loss(stored.model, live, False)
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    for trainer in trainers.values():
        trainer.loss_types, trainer.loss_weights = ["sigmoid"], [1.0]
        trainer.label_smoothing, trainer.use_weighting = 0.0, False
        trainer.f_divergence_type = "reverse_kl"


@pytest.fixture(scope="module")
def trainers(past: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """With stored references, and TRL's with the reference models of either stage in memory."""
    folder = tmp_path_factory.mktemp("losses")
    model = llama(5)
    mixed = mix_preferences(texts(2), [past], 0.5)
    given = {"use_weighting": True}
    made: dict[str, Any] = {
        "stored": dpo(TheirStored, folder, mixed, copy.deepcopy(model), **given)
    }
    for name, seed in (("old", 7), ("new", 5)):
        made[name] = DPOTrainer(
            model=copy.deepcopy(model), ref_model=llama(seed), args=DPOConfig(**options(folder)),
            train_dataset=texts(1), processing_class=tokenizer(),
        )  # fmt: skip
    for trainer in made.values():
        trainer.use_weighting = False
    return made


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precompute_ref_log_probs": False}, "precompute_ref_log_probs=True only"),
        ({"loss_type": ["aot"]}, "take 'aot_unpaired'"),
        ({"max_length": 4}, "pair 0 of the train data has reference log-probs of other tokens"),
        ({"ld_alpha": 0.5}, "ld_alpha was another"),
    ],
)
def test_what_would_be_wrong_is_refused(
    changes: dict[str, Any], words: str, past: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        dpo(TheirStored, tmp_path, past, **changes)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda old: mix_preferences(texts(2), old, 1.0), ValueError, "ratio"),
        (lambda old: mix_preferences(texts(2), [], -1.0), ValueError, "ratio must be in"),
        (lambda old: mix_preferences([1], old, 0.5), TypeError, "new must be a datasets.Dataset"),
        (lambda old: mix_preferences(texts(2), [[]], 0.5), TypeError, r"past\[0\] must be"),
        (lambda old: mix_preferences(texts(2).select([]), old, 0.5), ValueError, "new has no"),
        (
            lambda old: mix_preferences(texts(2), [old, texts(1)], 0.5),
            ValueError,
            r"past\[1\] has no column ref_chosen_logps",
        ),
        (
            lambda old: mix_preferences(
                texts(2), old.remove_columns("ref_chosen_logps").add_column(
                    "ref_chosen_logps", [float("nan")] * len(old)
                ).remove_columns("ref_rejected_logps").add_column(
                    "ref_rejected_logps", [float("nan")] * len(old)
                ), 0.5,
            ),
            ValueError,
            r"pair 0 of past\[0\] has no reference",
        ),
    ],
)  # fmt: skip
def test_bad_mixes(call: Any, error: type[Exception], words: str, past: Dataset) -> None:
    with pytest.raises(error, match=words):
        call(past)


# --- keeps in the trainers -----------------------------------------------------------------------


def test_preference_replay_keep_over_two_stages(tmp_path: Path) -> None:
    """One adapter, two stages; the base is the model without it, the stages' references differ."""
    keep = PreferenceReplay(0.5, seed=2)
    model = llama(0)
    first = dpo(KeepingDPO, tmp_path / "a", texts(1), model, keep=keep, task=Task("safety"))
    first.train()
    stored = {tuple(row["chosen_ids"]): row for row in keep.memory.stage("safety")}
    second = dpo(
        KeepingDPO, tmp_path / "b", texts(2), model, keep=keep, task=Task("help", 1),
        past=[Task("safety")],
    )  # fmt: skip
    rows = [second.train_dataset[i] for i in range(len(second.train_dataset))]
    replayed = [row for row in rows if tuple(row["chosen_ids"]) in stored]
    assert abs(len(replayed) - len(rows) / 2) < 1
    for row in replayed:
        assert row == stored[tuple(row["chosen_ids"])]
        ref = by_hand(llama(0), row, "chosen_ids").item()
        assert row["ref_chosen_logps"] == pytest.approx(ref, rel=1e-5)
    fresh = next(row for row in rows if tuple(row["chosen_ids"]) not in stored)
    assert fresh["ref_chosen_logps"] == pytest.approx(
        by_hand(frozen_copy(model), fresh, "chosen_ids").item(), rel=1e-5
    )
    second.train()
    assert list(keep.memory.stages) == ["safety", "help"]


class StopsOnce(TrainerCallback):
    """Within the second stage, after a checkpoint."""

    def __init__(self) -> None:
        self.saved = 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self.saved == 3:
            self.saved += 1
            raise RuntimeError("stopped")

    def on_save(self, *_: Any, **__: Any) -> None:
        self.saved += 1


def test_preference_replay_in_learn(tmp_path: Path) -> None:
    """Stopped within the second stage and called again, it ends with the bits of a straight run."""
    from cl_fast.learning import learn

    def run(out: Path, *callbacks: Any) -> dict[str, Tensor]:
        model, keep = llama(0), PreferenceReplay(0.5, size=6)
        saving = {"save_strategy": "steps", "save_steps": 1}
        learn(
            model,
            {"safety": (texts(1), texts(3, 4)), "help": (texts(2), texts(4, 4))},
            args=DPOConfig(**options(out, precompute_ref_log_probs=True, **saving)),
            out=out,
            keep=[keep],
            trainer=DPOTrainer,
            processing_class=tokenizer(),
            score=lambda *_: 0.0,
            callbacks=list(callbacks),
        )
        assert keep.memory.stages == {"safety": 6, "help": 6}
        refs = [row["ref_chosen_logps"] for row in keep.memory.stage("help")]
        return {**model.state_dict(), "refs": torch.tensor(refs)}

    straight = run(tmp_path / "a")
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path / "b", StopsOnce())
    again = run(tmp_path / "b")
    for name, x in straight.items():
        assert torch.equal(again[name], x), name


def test_a_frozen_copy_does_not_follow_the_model(tmp_path: Path) -> None:
    """A plain copy of a model that a trainer of TRL has had does."""
    model = llama(0)
    dpo(DPOTrainer, tmp_path, texts(1), model)
    reference, plain = frozen_copy(model), copy.deepcopy(model)
    inputs = {k: v for k, v in ids_batch().items() if k != "labels"}
    before = reference(**inputs).logits
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    assert torch.equal(reference(**inputs).logits, before)
    assert not torch.equal(plain(**inputs).logits, before)
    assert kl_of_tokens(model, ids_batch(), reference=reference).mean() > 0.01
    assert not any(p.requires_grad for p in reference.parameters())


def adapted() -> Any:
    torch.manual_seed(0)
    return get_peft_model(llama(0), LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))


def ids(seed: int, count: int = 16) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 16, (count, 8), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def make(host: str, folder: Path, keep: Any, size: int, accumulate: int) -> Any:
    given: dict[str, Any] = {
        "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate,
    }  # fmt: skip
    if host == "dpo":
        return dpo(KeepingDPO, folder, texts(1), adapted(), keep=keep, **given)
    if host == "sft":
        rows = Dataset.from_list([{"input_ids": row["input_ids"]} for row in ids(3)])
        return KeepingSFT(
            model=adapted(), args=SFTConfig(**options(folder, **given)), train_dataset=rows,
            processing_class=tokenizer(), keep=keep,
        )  # fmt: skip
    return Keeping(
        model=adapted(), args=TrainingArguments(**options(folder, **given)),
        train_dataset=ids(3), keep=keep,
    )  # fmt: skip


def updates(trainer: Any) -> dict[str, Tensor]:
    """The gradients that each step of the optimizer was given."""
    seen: dict[str, Tensor] = {}
    step = trainer.create_optimizer().step

    def watched(*args: Any, **kwargs: Any) -> Any:
        at = len(seen)
        seen.update({f"{at}.{n}": g for n, g in gradients(trainer.model).items()})
        return step(*args, **kwargs)

    trainer.optimizer.step = watched
    trainer.train()
    return seen


@pytest.mark.parametrize("host", ["trainer", "sft", "dpo"])
def test_keeps_do_not_depend_on_accumulation(host: str, tmp_path: Path) -> None:
    """Batch 4 at once, and four times 1: the same gradients (texts of one length)."""
    found = []
    for size, accumulate in ((4, 1), (1, 4)):
        keeps = [
            PretrainingLoss(ids(9), weight=0.7, batch_size=2 * size, seed=1),
            KLToBase(ids_batch(), every=1),
        ]
        if host != "dpo":  # whose pairs differ in length, so that a mean over tokens depends on it
            keeps.insert(0, KLPenalty(0.5, estimator="reverse_kl"))
        trainer = make(host, tmp_path, keeps, size, accumulate)
        found.append(updates(trainer))
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(logs) == 2
        for entry in logs:
            assert entry["kl_to_base/reverse_kl"] > 0
            assert entry["pretraining_loss/nll"] > 0
        assert keeps[-1].measures()["kl_to_base/reverse_kl"] > 0
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        scale = 1e-4 * float(gradient.abs().max()) + 1e-7
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=scale, msg=name)


def ids_batch() -> dict[str, Tensor]:
    rows = torch.tensor([row["input_ids"] for row in ids(4, 3)])
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows}


@pytest.mark.parametrize("host", ["trainer", "sft", "dpo"])
def test_penalty_and_pretraining_add_their_gradients(host: str, tmp_path: Path) -> None:
    """A step's gradient is the host's and those of the keeps, computed apart."""
    pretraining = PretrainingLoss(ids(9), weight=0.7, batch_size=2)
    penalty = KLPenalty(0.5, estimator="forward_kl")
    trainer = make(host, tmp_path, [penalty, pretraining], 4, 1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # away from the base
            parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.train()
    trainer.compute_loss(model, dict(batch)).backward()
    whole = gradients(model)
    model.zero_grad()
    trainer.keeps, kept = [], trainer.keeps
    trainer.compute_loss(model, dict(batch)).backward()
    pretraining.load_state_dict({"drawn": 0})
    for keep in kept:
        keep.loss(model, batch).backward()
    for name, gradient in gradients(model).items():
        scale = 1e-4 * float(gradient.abs().max()) + 1e-7
        torch.testing.assert_close(whole[name], gradient, rtol=1e-3, atol=scale, msg=name)
    mean = kl_of_tokens(model, batch, "forward_kl").mean().item()
    assert penalty.measures()["kl_penalty/kl"] == pytest.approx(mean, rel=1e-4)


def test_monitor_in_a_callback(tmp_path: Path) -> None:
    base = llama(0)
    keep = KLToBase(ids_batch(), reference=base, every=2, max_new_tokens=3,
                    kinds=("k1", "k2", "k3", "reverse_kl"))  # fmt: skip
    del keep.batches[0]["labels"]
    trainer = Trainer(
        model=copy.deepcopy(base), args=TrainingArguments(**options(tmp_path)),
        train_dataset=ids(3), callbacks=[KeepCallback(keep)],
    )  # fmt: skip
    trainer.train()
    found = keep.measures()
    assert len(found) == 12
    assert found["kl_to_base/reverse_kl"] > 0
    assert found["kl_to_base/reverse_kl"] <= found["kl_to_base/reverse_kl_max"]
